"""What happens and to whom: the next event, an arrival, a door, a client that gives up."""

from dataclasses import replace

import jax.numpy as jnp

from jaxsim.engine import (
    caches,
    clients,
    ending,
    events,
    failures,
    fair,
    hand_over,
    lost_hand_overs,
    migration,
    passes,
    pipeline,
    role_switching,
    slack,
    swapping,
    tangents,
)
from jaxsim.engine.common import Context, blocks_for, choose, take
from jaxsim.engine.touched import Touched
from jaxsim.kernels import bitmap, clock, queues
from jaxsim.kernels.clock import Time
from jaxsim.state import world as w
from jaxsim.state.requests import PLACE, PROMPT


def look(context: Context, _) -> Touched:
    """Find the next event and gather the row of its executor."""
    dims, world = context.dims, context.world
    event, is_frozen = events.next_event(context)
    e = event.executor
    count_row, clock_row = take(world.counts, e), take(world.clocks, e)
    rank = e
    if dims.num_ranks > 1:
        turn = w.count_rows(dims).everything(count_row).executor.turn
        is_there = event.is_arrival
        if event.met is not None and event.met.is_settling is not None:
            is_there = is_there | event.met.is_settling
        event = event._replace(rank=jnp.where(is_there, event.rank, turn))
        rank = e * dims.num_ranks + event.rank
    flying = None
    if dims.num_stages > 1 and not dims.has_free_stages:
        flying = pipeline.flights(dims, clock_row)
        turn = w.count_rows(dims).everything(count_row).executor.turn
        event = event._replace(batch=pipeline.batch_of(event, flying, turn))
    batch = rank if dims.num_batches == 1 else rank * dims.num_batches + event.batch
    return Touched(
        event, is_frozen, rank, batch, count_row, clock_row,
        w.count_rows(dims).one(count_row, event.rank, event.batch),
        w.clock_rows(dims).one(clock_row, event.rank, event.batch),
        take(world.residues, batch), take(world.phase, e), Time(take(world.wake_hi, e), take(world.wake_lo, e)),
        flying, fair.of_row(take(world.tenants, rank)) if dims.num_tenants else None,
        tangents.of_row(dims, take(world.tangents, rank)) if dims.num_tangents else None)


def receive(context: Context, t: Touched) -> Touched:
    """Enqueue an arrival. If its executor stops before the following one, go on to that stop."""
    params, requests, world = context.params, context.requests, context.world
    rules, event, counts, times, wake = context.group.batching, t.event, t.counts, t.times, t.wake
    arriving = event.request
    is_first_in_line = counts.rank.waiting == 0
    queue, link = queues.push_back(counts.rank.queue, arriving, event.is_arrival, context.dims.num_requests)
    places = None
    if rules.sorts:
        place = take(requests.table, arriving)[PLACE]
        best = bitmap.smallest(lambda word: take(world.waiting_set, t.rank, word), context.dims.num_requests)
        is_first_in_line = is_first_in_line | (place < best)
        if context.dims.slack_window:
            again = slack.look(context, t.rank)
            best = jnp.where(counts.rank.waiting > again.count, best, context.dims.num_requests)
            is_first_in_line = (place < best) & slack.is_before(context, again, arriving)
            t = replace(t, again=again)
            best = jnp.where(event.is_arrival, jnp.minimum(place, best), best)
            places = (place, best)
        else:
            places = (place, jnp.where(event.is_arrival & is_first_in_line, place, best))
    if context.dims.has_swap:
        is_first_in_line = swapping.is_first(rules.swap, counts, is_first_in_line)
    tenants = None
    if t.tenants is not None:
        # The first of a tenant may be next, whoever waits.
        tenants, link, is_first_in_line = fair.arrive(context, t)
    is_running = event.is_arrival & (t.phase == w.ENDING)
    is_cut = (is_running & (counts.batch.extra > 0) & is_first_in_line
              & (counts.rank.running < rules.max_num_seqs))
    if context.dims.has_clients and rules.async_scheduling:
        # Who has come since the iteration in flight began is then who has since the jump did.
        is_cut = is_running & (counts.batch.extra > 0)
    if t.moving is not None:
        t = replace(t, arrived=tangents.at_arrival(t.moving, is_running, event.now, times.batch))
    counts = replace(counts, rank=replace(counts.rank, queue=queue))
    if context.dims.has_demands:
        tokens = take(requests.table, arriving)[PROMPT]
        if context.dims.has_failures:
            tokens = tokens + take(world.progress, arriving)[0]
        blocks = blocks_for(tokens, context.dims)
        waiting = counts.rank.waiting_blocks + jnp.where(event.is_arrival, blocks, 0)
        counts = replace(counts, rank=replace(counts.rank, waiting_blocks=waiting))
    cut_extra = jnp.int32(context.dims.max_jump) if context.dims.num_ranks > 1 else None
    if rules.admit == "when_empty":
        # Only a rank that runs along with others is empty.
        is_cut = is_cut & (counts.rank.running == 0)
    if rules.admit != "when_empty" or cut_extra is not None:
        cut, cut_end = ending.cut_jump(event.now, counts, t.times)
        counts, wake = choose(is_cut, cut, counts), clock.select(is_cut, cut_end, wake)
        if t.flying is not None:
            own, executor = times.batch, times.executor
            if rules.pass_on_arrival:
                # What the next batch will find: the stages at work on the last iteration, and its blocks.
                is_jump = is_cut & (counts.batch.extra > 0) & ~t.flying.without(event.batch)
                last = passes.last_of_jump(counts)
                stages = pipeline.stages_of_last(context.dims, context.group, last, cut_end, executor)
                executor = choose(is_jump, stages, executor)
                counts = ending.take_blocks_of_jump(context.group, is_jump, counts, t.residue_row)
            times = replace(times, executor=executor, batch=replace(own, end=clock.select(is_cut, cut_end, own.end)))
            if rules.pass_on_arrival:
                # Who comes now was not there before: time is counted up to here first.
                times = choose(is_running, pipeline.count(event.now, times, t.counts.rank, counts.rank), times)
        if cut_extra is not None:
            cut_extra = jnp.where(is_cut, cut.batch.extra, cut_extra)
    if rules.async_scheduling:
        is_seen = event.is_arrival & ending.is_before_last(event, counts, t.times)
        counts = replace(counts, rank=replace(counts.rank, visible=counts.rank.visible + is_seen))
    # A sorted queue changes once a step, and the pass may change it too. An earlier end elsewhere may bring an arrival.
    if (not rules.sorts and context.dims.num_ranks == 1 and not context.dims.has_moves
            and not context.dims.has_siblings
            and not (params.source.answers and context.dims.num_executors > 1)
            and not (context.dims.has_remote and context.dims.num_executors > 1)):
        goes_on = is_running & (wake <= event.following) & (wake.hi < events.FREEZE_S) & events.is_allowed(world, wake)
        if rules.pass_on_arrival and t.flying is not None:
            goes_on = goes_on & ~t.flying.free[0]
        event = event._replace(now=clock.select(goes_on, wake, event.now), is_ending=event.is_ending | goes_on)
    is_delivered = event.is_arrival
    if context.dims.has_clients:
        is_delivered = (event.is_arrival | event.is_refused) & ~event.is_again
    if context.dims.has_role_switching:
        is_delivered = is_delivered & ~event.is_handed
    source = params.source.delivered(world.source, arriving, is_delivered)
    if event.met is not None:
        counts = caches.receive(event.met, event.is_arrival, counts)
    return replace(t, event=event, counts=counts, times=times, wake=wake, source=source, link=link, places=places,
                   cut_extra=cut_extra, tenants=tenants)


def open_door(context: Context, t: Touched) -> Touched:
    """With roles: deliver a request, accept one, or take blocks back. With migration what one does here, or its
    controller."""
    if context.dims.has_migration:
        counts, wake, phase, control, acted = migration.act(
            context, t.event, t.counts, t.times, t.wake, t.phase, t.residue_row)
        return replace(t, counts=counts, wake=wake, phase=phase, control=control, acted=acted)
    if not context.dims.has_roles:
        return t
    counts, wake, phase, opened = hand_over.open_door(
        context, t.event, t.counts, t.times, t.wake, t.phase, t.residue_row)
    switched = None
    if context.dims.has_role_switching:
        event = t.event
        counts, wake, phase, switched = role_switching.act(
            context, event.now, event.is_turn, event.is_handed, event.is_idle, event.executor, counts, wake, phase)
        t = replace(t, link=choose(event.is_turn & ~event.is_handed, switched.link, t.link))
    return replace(t, counts=counts, wake=wake, phase=phase, opened=opened, switched=switched)


def give_up(context: Context, t: Touched) -> Touched:
    """A client has waited for long enough: its request leaves the queue, or its slot at the end of the iteration. Or an
    instance goes down, and what is there is lost."""
    if not context.dims.has_clients:
        return t
    loss = None
    if context.dims.has_failures:
        item, is_losing = None, failures.goes_down(t.event) & (t.phase != w.ENDING)
        if context.dims.has_roles:
            counts, wake, link, opened, item = lost_hand_overs.look(
                context, t.event, t.counts, t.times, t.wake, t.phase, t.residue_row, t.link, t.opened, is_losing)
            t = replace(t, counts=counts, wake=wake, link=link, opened=opened, item=item)
        event, counts, wake, phase, loss, broken = failures.strike(
            context, t.event, t.rank, t.counts, t.times, t.wake, t.phase, is_losing, item)
        if broken is not None:
            counts, control, acted = migration.break_off(context, event, broken, counts, t.control, t.acted)
            t = replace(t, control=control, acted=acted)
        t = replace(t, event=event, counts=counts, wake=wake, phase=phase)
    counts, wake, phase, residue_row, link, cut_off = clients.give_up(
        context, t.event, t.rank, t.counts, t.times, t.wake, t.phase, t.residue_row, t.link, loss)
    return replace(t, counts=counts, wake=wake, phase=phase, residue_row=residue_row, link=link, cut_off=cut_off)
