"""A scheduling pass: who is preempted, who is placed."""

from dataclasses import replace

import jax.numpy as jnp

from jaxsim.engine import (
    caches,
    chunks,
    context_reuse,
    decode_queue,
    failures,
    fair,
    free_stages,
    gathering,
    hand_over,
    offload,
    partial_prefills,
    parts,
    passes,
    prefix,
    remote_store,
    siblings,
    slack,
    swapping,
)
from jaxsim.engine.common import Context, blocks_for, choose, has, mark, take
from jaxsim.engine.events import blocks_at_pass
from jaxsim.engine.slots import is_retracting, limit_context, next_ratio, walk
from jaxsim.engine.touched import Touched
from jaxsim.kernels import clock, stack
from jaxsim.kernels.clock import Time
from jaxsim.state import world as w
from jaxsim.state.requests import PROMPT
from jaxsim.state.world import Counts


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
    chosen = None
    if dims.num_partial > 1:
        counts, chosen = partial_prefills.begin(context, t, is_passing, counts)
        candidate = chosen.request
    is_forming = counts.rank.forming_slot != null
    is_ready = None
    if dims.has_moves:
        is_ready = (passes.ready_seen(rules, counts.rank) > 0) & ~(is_forming & ~has(counts, w.FORMED))
        candidate = jnp.where(is_ready, counts.rank.ready.front, candidate)
    if rules.chunked_prefill:
        candidate = jnp.where(is_forming & ~has(counts, w.FORMED), counts.rank.forming_request, candidate)
    sized = None
    if rules.chunks is not None:
        begun = is_forming & ~has(counts, w.FORMED)
        planned = jnp.where(is_passing, candidate, scratch)
        known = take(requests.table, planned)[PROMPT]
        if rules.grows:
            known = known + take(world.progress, planned)[0]
        known = jnp.where(planned == scratch, 0, known)
        sized = chunks.size(dims, group, counts, times, t.longest, t.decoding, known,
                            jnp.where(begun, counts.rank.forming_computed, 0),
                            None if chosen is None else chosen.target_s)

    is_short, is_placing = jnp.bool_(False), is_passing
    if chosen is not None:
        is_placing = is_passing & chosen.is_any
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
                crossing, need, grown = passes.decode_need(dims, group, counts, residue_row, tail_offset, sized)
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
        before = take(world.progress, candidate)[0] if dims.has_failures else 0
        lengths = hand_over.lengths_here(context, event, lengths, before)
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
        sized=sized, chosen=chosen,
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
    offer = None
    if dims.has_siblings:
        held = blocks_at_pass(context, t.event.now, t.event.executor)
        found, offer, is_clear = siblings.look(
            context, t.event.executor, t.event.now, held, t.lengths[PROMPT] + t.emitted, found,
            t.is_placing & ~is_forming & (rank.waiting > 0))
        is_settled = is_settled & is_clear
    elif dims.has_reuse:
        found = context_reuse.look(dims, t.lengths[PROMPT] + t.emitted, found)
    own_puts = None
    if dims.has_remote:
        found, own_puts, is_there = remote_store.look(
            context, t.event.now, t.rank, t.is_placing, counts, t.candidate, t.lengths[PROMPT] + t.emitted, found,
            behind)
        is_settled = is_settled & is_there
    return replace(t, counts=replace(counts, rank=rank), released=released, found=found, behind=behind,
                   own_puts=own_puts, offer=offer,
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
        take(world.ready_before, t.candidate) if dims.has_roles and rules.has_context_limit else None, t.kept_turn,
        t.sized)
    if t.kept_turn is not None:
        can_go_on = can_go_on | t.kept_turn.is_called
    if t.chosen is not None:
        counts, can_go_on = partial_prefills.settle(context, t.chosen, t.is_placing, counts, placed, t.sized)
    tenants = None if t.tenants is None else fair.place(context, t, placed)
    kept = loan = None
    if dims.has_offload:
        counts, kept = offload.keep(context, counts, placed, t.behind, t.found, t.lengths[PROMPT] + t.emitted)
    if dims.has_reuse:
        counts, times, loan = context_reuse.recompute(context, counts, times, placed, t.found, t.event.now, t.offer)
    puts = None
    if dims.has_remote:
        counts, puts = remote_store.put(context, counts, placed, t.own_puts, t.found, t.lengths[PROMPT] + t.emitted)
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
            tokens = t.lengths[PROMPT] + t.emitted - 1 if dims.has_failures else t.lengths[PROMPT]
            counts = hand_over.without_last_ready(context, gives_way, counts, tokens)
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
            before = take(world.lost, t.candidate)[failures.BEFORE] if dims.has_failures else 0
            rank = replace(rank, killed=rank.killed + is_preempting - (is_from_queue & (t.preemptions > before)))
        if dims.has_urgent:
            joins, goes = placed.is_admitted.astype(jnp.int32), jnp.int32(0)
            if rules.grows:
                goes = (is_preempting & (victim[0] != null)).astype(jnp.int32)
            rank = replace(rank, urgent=rank.urgent + take(context.requests.is_urgent, t.candidate) * (joins - goes))
        counts = replace(counts, rank=rank)
    return replace(
        t, counts=counts, times=times, residue_row=residue_row, slots=slots, link=link, placed=placed,
        opens_log=opens_log, is_held=is_held, can_go_on=can_go_on, is_short=is_short, is_preempting=is_preempting,
        victim=victim, victim_emitted=victim_emitted, are_going=are_going, moved=moved, tenants=tenants, kept=kept,
        puts=puts, loan=loan)
