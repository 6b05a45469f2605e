"""The phases of a step, in the order of `jaxsim.engine.step`, each written for one scenario.

An event is an iteration's end, an arrival, a door that opens, or a scheduling pass still under way; most phases have
nothing to do in most steps, and leave everything as it is.
"""

from dataclasses import replace
from functools import partial

import jax.numpy as jnp

from jaxsim.engine import (
    caches,
    clients,
    context_reuse,
    decode_queue,
    ending,
    events,
    failures,
    fair,
    free_stages,
    gathering,
    hand_over,
    lockstep,
    migration,
    offload,
    parts,
    passes,
    pipeline,
    prefix,
    role_switching,
    slack,
    swapping,
    tape,
)
from jaxsim.engine.common import Context, blocks_for, choose, has, mark, take
from jaxsim.engine.slots import Slots, is_retracting, limit_context, next_ratio, walk
from jaxsim.engine.touched import Touched
from jaxsim.kernels import bitmap, clock, packed, queues, stack
from jaxsim.kernels.clock import Time
from jaxsim.state import world as w
from jaxsim.state.requests import PLACE, PROMPT
from jaxsim.state.world import Counts


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
        flying, fair.of_row(take(world.tenants, rank)) if dims.num_tenants else None)


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
    counts = replace(counts, rank=replace(counts.rank, queue=queue))
    if context.dims.has_demands:
        blocks = blocks_for(take(requests.table, arriving)[PROMPT], context.dims)
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
            and not (params.source.answers and context.dims.num_executors > 1)):
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
        event, counts, wake, phase, loss = failures.strike(
            context, t.event, t.rank, t.counts, t.times, t.wake, t.phase)
        t = replace(t, event=event, counts=counts, wake=wake, phase=phase)
    counts, wake, phase, residue_row, link, cut_off = clients.give_up(
        context, t.event, t.rank, t.counts, t.times, t.wake, t.phase, t.residue_row, t.link, loss)
    return replace(t, counts=counts, wake=wake, phase=phase, residue_row=residue_row, link=link, cut_off=cut_off)


def settle(context: Context, t: Touched) -> Touched:
    """Settle the iteration that ended."""
    if context.dims.has_free_stages:
        # Counted when it was launched.
        return t
    counts, times, itl_s, itl_weights = ending.settle(
        context.dims, context.group, t.event, t.counts, t.times, t.residue_row)
    taped = None
    if context.dims.num_records:
        is_running = t.event.is_arrival & (t.phase == w.ENDING)
        taped = tape.known(context.dims, t.event.is_ending, is_running, t.counts)
    tenants = None if t.tenants is None else fair.settle(context, t)
    return replace(t, counts=counts, times=times, itl_s=itl_s, itl_weights=itl_weights, taped=taped, tenants=tenants)


def retire(context: Context, t: Touched) -> Touched:
    """Retire one sequence whose last token the iteration produced."""
    dims, params, requests, world, group = context
    event, counts, keys = t.event, t.counts, take(world.slot_keys, t.batch)
    here = free_stages.keys_here(context, event, t.rank, keys) if dims.has_free_stages else keys
    counts, residue_row, retired, has_more, next_key = ending.retire(
        dims, group, event, counts, here, lambda slot: take(world.slot_entries, t.rank, slot), t.residue_row,
        take(world.slot_entries, t.rank)[:, w.STAMP]
        if group.batching.prefix_caching or dims.has_roles or dims.keeps_turns or dims.has_block_groups else None,
        partial((hand_over if dims.has_roles else migration).is_leaving, context, event) if dims.has_moves else None)
    if dims.has_urgent:
        gone = retired.is_any * take(requests.is_urgent, retired.request)
        counts = replace(counts, rank=replace(counts.rank, urgent=counts.rank.urgent - gone))
    tail, unlinked, slots = counts.batch.tail, None, None
    if group.batching.keeps_running_list:
        tail, *unlinked = queues.unlink(
            tail, retired.slot, take(world.slot_previous, t.rank, retired.slot),
            take(world.slot_next, t.rank, retired.slot), retired.is_any, dims.null_slot)
        counts = replace(counts, batch=replace(counts.batch, tail=tail))
    if group.batching.scans_slots:
        slots = Slots(keys, take(world.slot_entries, t.rank), retired.slot)
    if group.batching.has_context_limit and dims.has_roles:
        has_ended = event.is_ending & ~has_more
        is_behind = hand_over.comes_behind(context, event, t.opened, t.wake, t.phase)
        counts, moved = decode_queue.ran(counts, slots, has_ended | is_behind)
        if dims.has_free_stages:
            moved = free_stages.returning(context, event, t.rank, slots, has_ended)
        counts, slots = decode_queue.to_the_back(counts, slots, moved)
        counts, opened = hand_over.take_place(context, counts, t.opened)
        t = replace(t, opened=opened)
    if dims.has_swap:
        counts, times, ended = swapping.leave(
            context, event, t.rank, counts, t.times, retired, t.counts.rank.used_blocks)
        t = replace(t, times=times, ended=ended)
    longest = None
    if group.cost.reads_longest:
        is_in = (keys != packed.EMPTY) & (jnp.arange(dims.slot_width) != retired.slot)
        longest = jnp.max(jnp.where(is_in, take(world.slot_entries, t.rank)[:, w.OFFSET], -packed.EMPTY))
    released = None
    if group.batching.prefix_caching:
        preemptions = take(world.progress, retired.request)[1]
        rank, released = prefix.release(context, t.rank, counts.rank, retired.request, retired.is_any, retired.tokens,
                                        preemptions)
        rank = replace(rank, used_blocks=rank.used_blocks - released.freed)
        counts = replace(counts, rank=rank)
    left = is_looking = None
    if dims.has_roles:
        left = hand_over.leave(context, event, retired, t.times)
        is_looking = event.is_ending & ~has_more & hand_over.fits(context, event, counts, t.opened.front)
        # What that leads to at this instant comes before the pass; blocks of a transfer that takes time come later.
        is_instant = left.is_any & (left.seconds <= 0) & (params.hand_over.latency_s <= 0)
        event = event._replace(is_met=event.is_met | is_instant | is_looking)
    control = t.control
    if dims.has_migration:
        left, control, opens = migration.leave(context, event, retired, control)
        event = event._replace(is_met=event.is_met | opens)
    tenants = None if t.tenants is None else fair.retire(context, t.tenants, retired)
    source, due = t.source, None
    if params.source.answers:
        is_over = retired.is_any if left is None else retired.is_any & ~left.is_any
        source, *entry = params.source.ended(requests, source, world.due, world.epoch, event.now, retired.request,
                                             is_over, dims.num_requests)
        due = tuple(entry)
        event = event._replace(following=params.source.coming(requests, source, world.due, world.epoch).time)
    return replace(t, event=event, counts=counts, residue_row=residue_row, source=source, due=due, released=released,
                   left=left, is_looking=is_looking, retired=retired, has_more=has_more, next_key=next_key, tail=tail,
                   longest=longest, unlinked=unlinked and tuple(unlinked), slots=slots, control=control,
                   tenants=tenants)


def open_pass(context: Context, t: Touched) -> Touched:
    """Begin or resume a scheduling pass; decodes take their blocks; find the candidate."""
    dims, _, requests, world, group = context
    rules, event, counts = group.batching, t.event, t.counts
    null, scratch = jnp.int32(dims.null_slot), dims.num_requests

    # A scheduling pass, unless something at this instant comes before it.
    has_ended = event.is_ending & ~t.has_more
    has_work = (counts.rank.running > 0) | (counts.rank.waiting > 0)
    if dims.has_moves:
        has_work = has_work | (counts.rank.ready.length > 0)
    if dims.has_swap:
        has_work = has_work | (counts.rank.swap.out + counts.rank.swap.coming > 0)
    is_due = (has_ended & has_work) | (event.is_arrival & (t.phase >= w.IDLE))
    is_passing = event.is_passing | (is_due & ~event.is_tied)
    if dims.num_ranks > 1:
        # Only when all ranks have settled.
        is_passing = event.is_passing & has_work
    times = t.times
    if dims.has_free_stages:
        # Only when the first stage is free, which wakes the executor.
        is_due, is_passing = jnp.bool_(False), event.is_passing
        counts, times = free_stages.fresh(is_passing & (counts.rank.progress == 0), counts, times)
    is_trimming = trimmed = None
    if dims.keeps_turns:
        # Copies that were displaced are dropped first, one a step in which nobody ends.
        is_trimming = is_passing & swapping.is_over_full(context, counts)
        is_passing = is_passing & ~is_trimming
        counts, trimmed = swapping.drop_first(context, t.rank, counts, is_trimming & ~t.retired.is_any)
    counts = passes.begin_pass(group, is_passing, counts)
    if dims.has_migration:
        is_fresh = is_passing & (t.counts.rank.progress == 0)
        stamp = jnp.where(is_fresh, counts.rank.next_stamp, counts.rank.first_stamp)
        counts = replace(counts, rank=replace(counts.rank, first_stamp=stamp))
    was_closed = has(counts, w.CLOSED)
    candidate = counts.rank.queue.front
    if rules.sorts:
        candidate = take(requests.by_place, jnp.where(counts.rank.waiting > 0, t.places[1], 0))
    is_again = None
    if t.again is not None:
        is_new = (t.places[1] < dims.num_requests) & slack.is_before(context, t.again, candidate)
        is_again = (t.again.count > 0) & ~is_new
        candidate = jnp.where(is_again, t.again.request, candidate)
    if t.tenants is not None:
        candidate = t.tenants.head
    if rules.gathers:
        candidate = gathering.candidate(counts, world.next_waiting, t.link)
    is_forming = counts.rank.forming_slot != null
    is_ready = None
    if dims.has_moves:
        is_ready = (passes.ready_seen(rules, counts.rank) > 0) & ~(is_forming & ~has(counts, w.FORMED))
        candidate = jnp.where(is_ready, counts.rank.ready.front, candidate)
    if rules.chunked_prefill:
        candidate = jnp.where(is_forming & ~has(counts, w.FORMED), counts.rank.forming_request, candidate)

    is_short, is_placing = jnp.bool_(False), is_passing
    slots, residue_row = t.slots, t.residue_row
    victim = is_preempting = is_empty = sight = kept_turn = None
    if is_ready is not None and not rules.is_unified and not rules.grows:
        counts = mark(counts, is_passing & is_ready, w.DECODED)
    if rules.grows:
        wants_decode = is_passing & ~has(counts, w.DECODED)
        # One sequence may leave or one link may change in a step.
        may_preempt = ~t.retired.is_any & ~event.is_arrival
        if rules.walks:
            counts, residue_row, slots, walked = walk(
                dims, group, wants_decode, may_preempt, counts, slots, residue_row)
            is_short, is_preempting, is_empty = walked.is_short, walked.is_preempting, walked.is_empty
            victim = (walked.victim, *take(world.slot_entries, t.rank, walked.victim)[:2])
            counts = passes.take_blocks(counts, wants_decode & ~is_short, walked.crossing)
            counts = mark(counts, walked.is_over, w.FORMED)
        else:
            tail_request, tail_offset = take(world.slot_entries, t.rank, t.tail)[:2]
            if t.flying is not None:
                is_away = is_forming & t.flying.is_away(counts.rank.forming_batch, event.batch)
                is_forming = is_forming & ~is_away
            victim = (jnp.where(is_forming, counts.rank.forming_slot, t.tail),
                      jnp.where(is_forming, counts.rank.forming_request, tail_request), tail_offset)
            if rules.victim == "fewest_outputs":
                slot = slots.fewest_outputs(dims, counts)
                victim = (slot, *take(world.slot_entries, t.rank, slot)[:2])
            is_preempting = is_passing & was_closed
            if dims.has_swap:
                counts, sight, kept_turn = swapping.look(
                    context, event, t.rank, is_passing, was_closed, counts, t.times, slots, t.ended)
                victim, candidate, is_preempting = sight.victim, sight.candidate, sight.is_leaving & may_preempt
            if rules.is_unified:
                crossing, need, grown = passes.decode_need(dims, group, counts, residue_row, tail_offset)
                free = rules.num_blocks - counts.rank.used_blocks
                is_short = wants_decode & (need + grown > free)
                if t.flying is not None:
                    # A prompt in flight can go without its next chunk; then nobody behind it is admitted.
                    are_short = wants_decode & (need > free)
                    is_barred = is_away & wants_decode & ~are_short & (is_short | has(counts, w.PREEMPTED))
                    is_short = jnp.where(is_away, are_short, is_short)
                    counts = mark(mark(counts, is_barred, w.FORMED), is_barred, w.CLOSED)
                is_preempting = is_short & may_preempt
                counts = passes.take_blocks(counts, wants_decode & ~is_short, crossing)
            elif is_ready is not None:
                # Nobody computes a prompt before those who have theirs join: a pass of decodes.
                crossing, need, _ = passes.decode_need(dims, group, counts, residue_row, tail_offset)
                joins = wants_decode & is_ready
                is_short = joins & (need > rules.num_blocks - counts.rank.used_blocks)
                is_preempting = is_short & may_preempt
                counts = passes.take_blocks(counts, joins & ~is_short, crossing)
            if is_ready is not None:
                gives_way, victim = hand_over.who_gives_way(
                    context, is_passing & ~is_short & is_ready, counts, candidate, victim)
                is_short = is_short | gives_way
                is_preempting = is_preempting | (gives_way & may_preempt)
        is_placing = is_passing & ~is_short
        if not rules.is_unified:
            is_placing = is_placing & ~was_closed
            if is_ready is not None:
                candidate = jnp.where(is_passing & was_closed, victim[1], candidate)
        if sight is not None:
            is_placing = is_placing & sight.may_place
        candidate = jnp.where(is_preempting, victim[1], candidate)
    if is_ready is not None and not rules.is_unified:
        # No prompts in a pass of decodes.
        is_placing = is_placing & (is_ready | ~has(counts, w.DECODED))
    candidate = jnp.where(is_passing, candidate, scratch)
    lengths = take(requests.table, candidate)
    if dims.has_roles:
        lengths = hand_over.lengths_here(context, event, lengths)
    emitted, preemptions, preempted_s = jnp.int32(0), jnp.int32(0), None
    if is_ready is not None and not rules.grows:
        emitted = is_ready.astype(jnp.int32)
    if rules.grows:
        emitted, preemptions = take(world.progress, candidate)
    if rules.grows or is_ready is not None:
        epoch, hi, lo = take(world.preempted, candidate)
        preempted_s = clock.elapsed(Time(hi, lo), event.now) + (world.epoch - epoch) * clock.EPOCH_S
    return replace(
        t, counts=counts, times=times, residue_row=residue_row, slots=slots, is_due=is_due, is_ready=is_ready,
        has_ended=has_ended, has_work=has_work, is_passing=is_passing, is_placing=is_placing, is_short=is_short,
        was_closed=was_closed, is_preempting=is_preempting, is_empty=is_empty, victim=victim,
        sight=sight, candidate=candidate, lengths=lengths, emitted=emitted, preemptions=preemptions,
        preempted_s=preempted_s, is_again=is_again, kept_turn=kept_turn, is_trimming=is_trimming, trimmed=trimmed,
        # The link behind the candidate may be the one the arrival has just made.
        next_head=jnp.where(candidate == t.link[0], t.link[1], take(world.next_waiting, candidate)))


def look_up(context: Context, t: Touched) -> Touched:
    """With prefix caching: give a victim's blocks back, settle evictions, find what is cached of the candidate."""
    dims, _, _, world, group = context
    if not group.batching.prefix_caching:
        return t
    counts, rank, batch = t.counts, t.counts.rank, t.counts.batch
    slot, request, offset = t.victim
    is_forming = (slot == rank.forming_slot) & (slot != dims.null_slot)
    tokens = jnp.where(is_forming, rank.forming_computed, offset + batch.counter)
    rank, victims = prefix.release(context, t.rank, rank, request, t.is_preempting, tokens, t.preemptions)
    rank = replace(rank, used_blocks=rank.used_blocks - victims.freed)
    released = choose(t.is_preempting, victims, t.released)
    is_forming = (rank.forming_slot != dims.null_slot) & ~has(counts, w.FORMED)
    is_trying, used = t.is_placing & ~is_forming & (rank.waiting > 0), None
    if t.event.met is not None and t.event.met.is_settling is not None:
        is_trying = is_trying | t.event.met.is_settling
        used = jnp.where(t.event.met.is_settling, t.event.met.used, rank.used_blocks)
    rank, found, is_settled = prefix.look_up(
        context, t.rank, rank, is_trying, t.candidate, t.lengths[PROMPT] + t.emitted, batch.budget, t.preemptions,
        released, used)
    behind = None
    if dims.has_offload:
        rank, found, behind, is_stored = offload.look(
            context, t.rank, rank, t.is_placing, t.candidate, t.lengths[PROMPT] + t.emitted, found)
        is_settled = is_settled & is_stored
    if dims.has_reuse:
        found = context_reuse.look(dims, t.lengths[PROMPT] + t.emitted, found)
    return replace(t, counts=replace(counts, rank=rank), released=released, found=found, behind=behind,
                   is_placing=t.is_placing & is_settled, is_short=t.is_short | ~is_settled)


def fill(context: Context, t: Touched) -> Touched:
    """Place one prompt, or preempt one victim. Prompt-first engines look at their decodes here."""
    dims, _, _, world, group = context
    rules, counts, times = group.batching, t.counts, t.times
    null = jnp.int32(dims.null_slot)
    free_slot = stack.top(lambda height: take(world.free_slots, t.rank, height), dims.num_slots - counts.rank.running)
    free_slot = jnp.where(t.retired.is_any, t.retired.slot, free_slot)
    counts, times, residue_row, placed, is_held, can_go_on = passes.place(
        dims, group, t.is_placing, counts, times, t.residue_row, t.lengths, t.emitted, t.candidate, t.next_head,
        free_slot, t.slots, t.found, t.is_ready,
        take(world.ready_before, t.candidate) if dims.has_roles and rules.has_context_limit else None, t.kept_turn)
    if t.kept_turn is not None:
        can_go_on = can_go_on | t.kept_turn.is_called
    tenants = None if t.tenants is None else fair.place(context, t, placed)
    kept = None
    if dims.has_offload:
        counts, kept = offload.keep(context, counts, placed, t.behind, t.found, t.lengths[PROMPT] + t.emitted)
    if dims.has_reuse:
        counts, times = context_reuse.recompute(context, counts, times, placed, t.found)
    # The first prompt to produce its first token in this iteration opens a row of the log.
    opens_log = placed.is_first_token & (counts.batch.joining_first == 1)
    rank, tail = counts.rank, counts.batch.tail
    if rules.keeps_running_list:
        tail = jnp.where(placed.is_completing, placed.slot, counts.batch.tail)
    if t.flying is not None:
        is_forming = (placed.slot != null) & ~placed.is_completing
        rank = replace(rank, forming_batch=jnp.where(is_forming, t.event.batch, rank.forming_batch))
    batch = replace(counts.batch, tail=tail, log_row=jnp.where(opens_log, world.num_logged, counts.batch.log_row))
    if dims.tracks_prefill:
        arriving = jnp.where(t.event.is_arrival, t.event.request, dims.num_requests)
        charge = caches.charge_of(context, t.event.met, arriving, t.candidate)
        batch = replace(batch, joining_prefill=batch.joining_prefill + jnp.where(placed.is_first_token, charge, 0))
    if rules.grows or t.is_ready is not None:
        is_resuming = placed.is_completing & (t.emitted > 0)
        batch = replace(batch, resuming=batch.resuming + is_resuming)
        resume_s = times.batch.resume_s + jnp.where(is_resuming, t.preempted_s, 0.0)
        times = replace(times, batch=replace(times.batch, resume_s=resume_s))
    counts = Counts(counts.executor, rank, batch)
    if dims.has_parts or dims.has_encoder:
        is_new = placed.is_admitted & (t.preemptions == 0)
        is_new = is_new if t.is_ready is None else is_new & ~t.is_ready
        counts = parts.placed(context, counts, t.candidate, is_new, placed.is_first_token)

    is_short, is_preempting, slots, link, victim = t.is_short, t.is_preempting, t.slots, t.link, t.victim
    are_going = moved = None
    if not rules.is_unified:
        wants_decode = t.is_passing & ~can_go_on & ~has(counts, w.FILLED)
        were_short, were_preempting, is_batch = is_short, is_preempting, wants_decode
        if t.is_ready is not None:
            # In a pass in which somebody joined decodes have their blocks, or are short of them, already.
            wants_decode = wants_decode & ~is_short & ~has(counts, w.DECODED)
        if t.sight is not None:
            wants_decode = wants_decode & ~t.sight.is_leaving & ~t.sight.is_decoded
        if rules.grows:
            crossing, need, _ = passes.decode_need(dims, group, counts, residue_row, victim[2])
            is_short = wants_decode & (need > rules.num_blocks - counts.rank.used_blocks)
            if rules.reserve == "expected":
                is_short = is_short | (wants_decode & is_retracting(dims, rules, counts))
            counts = mark(counts, is_short, w.CLOSED)
            is_preempting = is_short & t.was_closed & ~t.retired.is_any & ~t.event.is_arrival
            counts = passes.take_blocks(counts, wants_decode & ~is_short, crossing)
            if t.is_ready is not None:
                is_short, is_preempting = is_short | were_short, is_preempting | were_preempting
        if t.sight is not None:
            is_preempting = is_preempting | t.is_preempting
            comes_next = t.sight.has_coming | swapping.may_return(context, counts, t.sight)
            can_go_on = can_go_on | (wants_decode & ~is_short & comes_next)
            is_short = is_short | (t.is_passing & t.sight.is_leaving)
        if rules.reserve == "expected":
            ratio = times.rank.ratio
            ratio = jnp.where(wants_decode & ~is_short, next_ratio(rules, counts, slots, ratio), ratio)
            times = replace(times, rank=replace(times.rank, ratio=ratio))
        if rules.has_context_limit and t.is_ready is not None:
            is_here = slots.is_decoding
            if dims.has_free_stages:
                is_here = is_here & ~free_stages.are_away(free_stages.ends_of(context, t.rank), t.event.now)
            counts, slots, are_going = decode_queue.take_front(dims, rules, is_batch, counts, slots, is_here)
        elif rules.has_context_limit:
            counts, slots = limit_context(dims, rules, wants_decode, counts, slots)
    victim_emitted = None
    if t.sight is not None:
        is_preempting, is_swapped, donor, counts, dropped = swapping.make_room(
            context, is_preempting, counts, slots, t.sight, t.rank)
        if t.trimmed is not None:
            dropped = jnp.minimum(dropped, t.trimmed)
    if rules.grows:
        victim = (jnp.where(is_preempting, victim[0], null), *victim[1:])
        if t.sight is None:
            counts = mark(counts, is_preempting, w.PREEMPTED)
        else:
            counts = mark(counts, is_preempting & t.sight.is_leaving, w.DRAWN)
            counts = mark(counts, is_preempting & ~t.sight.is_leaving, w.PREEMPTED)
        gives_way = None if t.is_ready is None else is_preempting & (victim[0] == null)
        if rules.waiting_blocked_after_preempt:
            is_closing = is_preempting if t.sight is None else is_preempting & ~t.sight.is_leaving
            if gives_way is not None:
                # Who is ready goes on while the last of them make room.
                is_closing = is_closing & (~gives_way | (counts.rank.ready.length == 1))
            counts = mark(counts, is_closing, w.CLOSED)
        before_tail = take(world.slot_previous, t.rank, t.tail) if rules.keeps_running_list else null
        before = counts
        counts, residue_row, victim_emitted, own_link = passes.preempt(
            dims, group, is_preempting, counts, residue_row, *victim, before_tail, t.lengths[PROMPT],
            t.released, gives_way)
        if tenants is not None:
            is_forming = victim[0] == t.counts.rank.forming_slot
            tenants, own_link = fair.preempt(context, tenants, is_preempting, victim[1], is_forming)
        if gives_way is not None:
            counts = hand_over.without_last_ready(context, gives_way, counts, t.lengths[PROMPT])
        if t.sight is not None:
            counts, times, link, moved = swapping.move_out(
                context, t.event, is_preempting, is_swapped, donor, before, counts, times, slots, t.sight, link,
                own_link, dropped)
            counts, times, residue_row, placed, moved, goes_on = swapping.bring_in(
                context, t.event, t.is_passing, counts, times, residue_row, placed, moved, t.sight, t.lengths,
                t.emitted, t.preempted_s, free_slot, t.kept_turn, t.next_head, t.counts.rank.used_blocks)
            can_go_on = can_go_on | goes_on
            is_unknown = placed.is_admitted | t.was_closed
            is_held = swapping.is_held(context, counts, t.sight, is_unknown, t.lengths[PROMPT] + t.emitted, t.kept_turn)
        else:
            link = choose(is_preempting, own_link, link)
    if dims.has_demands:
        rank, is_from_queue = counts.rank, placed.is_admitted
        if t.is_ready is not None:
            is_from_queue = is_from_queue & ~t.is_ready
        if t.kept_turn is not None:
            is_from_queue = t.kept_turn.is_called | (is_from_queue & ~t.kept_turn.is_here)
        blocks = rank.waiting_blocks - jnp.where(is_from_queue, blocks_for(t.lengths[PROMPT] + t.emitted, dims), 0)
        if rules.grows:
            again = blocks_for(t.lengths[PROMPT] + victim_emitted, dims)
            blocks = blocks + jnp.where(is_preempting, again, 0)
        rank = replace(rank, waiting_blocks=blocks)
        if dims.has_migration:
            rank = replace(rank, killed=rank.killed + is_preempting - (is_from_queue & (t.preemptions > 0)))
        if dims.has_urgent:
            joins, goes = placed.is_admitted.astype(jnp.int32), jnp.int32(0)
            if rules.grows:
                goes = (is_preempting & (victim[0] != null)).astype(jnp.int32)
            rank = replace(rank, urgent=rank.urgent + take(context.requests.is_urgent, t.candidate) * (joins - goes))
        counts = replace(counts, rank=rank)
    return replace(
        t, counts=counts, times=times, residue_row=residue_row, slots=slots, link=link, placed=placed,
        opens_log=opens_log, is_held=is_held, can_go_on=can_go_on, is_short=is_short, is_preempting=is_preempting,
        victim=victim, victim_emitted=victim_emitted, are_going=are_going, moved=moved, tenants=tenants, kept=kept)


def price(context: Context, t: Touched) -> Touched:
    """What the iteration that was formed costs, and the decodes that may follow it."""
    rules, counts = context.group.batching, t.counts
    is_formed = t.is_passing & ~t.is_short & ~t.can_go_on
    has_batch = (counts.batch.count > counts.batch.stalled) | has(counts, w.FILLED)
    if rules.walks:
        has_batch = has_batch & ~t.is_empty
    # A pass that preempted all it had begins again; one that can place nothing never will.
    is_idle = is_formed & ~has_batch
    progress = jnp.where(is_idle, 0, counts.rank.progress)
    is_stuck = is_idle & ~has(counts, w.PREEMPTED)
    is_resting = None
    if rules.async_scheduling:
        # Nothing runs: the engine's loop comes round at once, seeing everybody.
        is_stuck = is_stuck & ~passes.is_somebody_hidden(counts)
        counts = passes.seeing_all(is_idle, counts)
    if context.dims.has_moves:
        is_waiting = (hand_over if context.dims.has_roles else migration).is_waiting_for_blocks(counts)
        is_resting = is_stuck & is_waiting
        is_stuck = is_stuck & ~is_resting
        if rules.async_scheduling:
            counts = passes.seeing_all(is_resting, counts, begins_anew=True)
    if context.dims.has_swap:
        is_stuck = is_stuck & ~has(t.counts, w.DRAWN)
        is_resting = is_stuck & (t.sight.due.hi < swapping.FAR_S)
        is_stuck = is_stuck & ~is_resting
    if t.flying is not None:
        is_stuck = is_stuck & ~t.flying.without(t.event.batch)
    counts = replace(counts, rank=replace(counts.rank, progress=progress))
    longest = t.longest
    if longest is not None:
        longest = jnp.maximum(longest, jnp.where(t.placed.is_completing, t.placed.entry[w.OFFSET], longest))
    priced = passes.price(context.dims, context.group, t.counts, t.times, longest)
    if context.dims.has_encoder:
        priced = priced[0] + parts.encoding_s(context, t.event, t.counts), priced[1]
    return replace(t, counts=counts, longest=longest, is_starting=is_formed & has_batch, is_idle=is_idle,
                   is_stuck=is_stuck, is_resting=is_resting, price=priced)


def launch(context: Context, t: Touched) -> Touched:
    """Start it, and say what wakes this executor next."""
    event, placed = t.event, t.placed
    if context.dims.has_roles:
        # At its end somebody may be accepted.
        fits = hand_over.fits(context, event, t.counts, t.opened.front)
        if context.dims.has_parts:
            # Then tiles are given back, too.
            fits = fits | (t.counts.batch.tiles > 0)
    if context.dims.has_free_stages:
        fits = jnp.bool_(True)
    own_key = jnp.where(placed.is_completing, placed.key, packed.EMPTY)
    counts, times, plan = passes.start(
        context.dims, context.group, t.is_starting, event, t.counts, t.times, t.residue_row,
        jnp.minimum(t.next_key, own_key), t.is_held, *t.price,
        is_alone=~t.flying.without(event.batch) if t.flying is not None else ~fits if context.dims.has_roles else True,
        most_extra=None if t.tenants is None else fair.iterations_alike(context, t.tenants, t.counts))
    if t.sight is not None:
        counts, times, plan = swapping.begin(context, t.is_starting, counts, times, plan, t.sight)
    if context.dims.has_offload:
        times, plan = offload.begin(context, t.is_starting, counts, times, plan)
    if context.dims.has_reuse:
        times, plan = context_reuse.begin(context, t.is_starting, counts, times, plan)
    if context.dims.num_ranks > 1:
        is_skipped = event.is_passing & ~t.has_work
        counts, times = lockstep.runs_along(context.dims, is_skipped, counts, times)
        is_resting = t.has_ended & ~t.has_work
        if context.group.batching.reserve == "expected":
            ratio = jnp.where(is_resting, context.group.batching.ratio_start, times.rank.ratio)
            times = replace(times, rank=replace(times.rank, ratio=ratio))
        turn = lockstep.take_turn(
            context, event, (t.count_row, t.clock_row), counts, times, cut_extra=t.cut_extra, has_ended=t.has_ended,
            is_formed=t.is_starting | is_skipped, phase=t.phase, wake=t.wake)
        return replace(t, counts=counts, times=times, plan=plan, wake=turn.wake, phase=turn.phase, turn=turn)
    if context.dims.num_records:
        record = jnp.where(t.is_starting, context.world.num_recorded, counts.batch.record)
        counts = replace(counts, batch=replace(counts.batch, record=record))
    is_waiting_pass = (t.is_passing & ~t.is_starting) | (t.is_due & event.is_tied)
    if t.is_trimming is not None:
        is_waiting_pass = is_waiting_pass | t.is_trimming
    if t.is_resting is not None:
        is_waiting_pass = is_waiting_pass & ~t.is_resting
    if context.dims.has_free_stages:
        launched = free_stages.launch(
            context, event, t.rank, counts, times, t.slots, wake=t.wake, phase=t.phase, end=plan.end,
            is_starting=t.is_starting, is_prompts=has(t.counts, w.FILLED), are_going=t.are_going,
            placed=placed.slot, is_ready=t.is_ready, is_waiting_pass=is_waiting_pass, has_more=t.has_more)
        return replace(t, counts=launched.counts, times=launched.times, plan=plan, wake=launched.wake,
                       phase=launched.phase, itl_s=launched.itl_s, itl_weights=launched.itl_weights,
                       slot_ends=launched.ends)
    if t.flying is not None:
        following = pipeline.go_on(
            context.dims, context.group, event, t.flying, counts, times, wake=t.wake, phase=t.phase, end=plan.end,
            has_more=t.has_more, has_ended=t.has_ended, is_starting=t.is_starting, is_waiting_pass=is_waiting_pass,
            is_idle=t.is_idle, is_held=t.is_held)
        return replace(t, counts=following.counts, times=following.times, plan=plan, wake=following.wake,
                       phase=following.phase)
    is_resting = t.has_ended & ~t.has_work
    if t.is_resting is not None:
        is_resting = is_resting | t.is_resting
    wake = clock.select(t.has_more | is_waiting_pass, event.now, t.wake)
    wake = clock.select(t.is_starting, plan.end, wake)
    wake = clock.select(is_resting, clock.never(), wake)
    if context.group.batching.reserve == "expected":
        ratio = jnp.where(is_resting, context.group.batching.ratio_start, times.rank.ratio)
        times = replace(times, rank=replace(times.rank, ratio=ratio))
    phase = jnp.where(is_waiting_pass, w.PASSING, t.phase)
    phase = jnp.where(t.is_starting, w.ENDING, phase)
    phase = jnp.where(is_resting, w.IDLE, phase)
    if t.is_resting is not None:
        phase = jnp.where(t.is_resting, w.RESTING, phase)
    if t.sight is not None:
        wake = clock.select(t.is_resting, t.sight.due, wake)
    return replace(t, counts=counts, times=times, plan=plan, wake=wake, phase=phase)
