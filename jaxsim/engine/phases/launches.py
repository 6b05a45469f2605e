"""The next iteration: its price, its start."""

from dataclasses import replace

import jax.numpy as jnp

from jaxsim.engine import (
    chunk_runs,
    context_reuse,
    fair,
    free_stages,
    hand_over,
    kv_parallel,
    lockstep,
    migration,
    offload,
    parts,
    passes,
    pipeline,
    remote_store,
    swapping,
    tangents,
)
from jaxsim.engine.common import Context, has
from jaxsim.engine.touched import Touched
from jaxsim.kernels import clock, packed
from jaxsim.state import world as w
from jaxsim.state.requests import PROMPT


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
    decoding = t.decoding
    if decoding is not None:
        known = t.lengths[PROMPT] + t.emitted
        following = kv_parallel.with_one(rules.kv_parallel, decoding.following, known + 1, t.placed.is_completing)
        decoding = replace(decoding, following=following)
    priced = passes.price(context.dims, context.group, t.counts, t.times, longest, decoding)
    if context.dims.has_encoder:
        priced = priced[0] + parts.encoding_s(context, t.event, t.counts), priced[1]
    moving, is_starting = t.moving, is_formed & has_batch
    if moving is not None:
        moving = tangents.launch(context, moving, is_starting, lambda group: passes.price(
            context.dims, group, t.counts, t.times, longest))
    return replace(t, counts=counts, longest=longest, is_starting=is_starting, is_idle=is_idle, is_stuck=is_stuck,
                   is_resting=is_resting, price=priced, moving=moving)


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
        most_extra=None if t.tenants is None else fair.iterations_alike(context, t.tenants, t.counts),
        reads=None if t.decoding is None else kv_parallel.reads(
            context.group.batching.kv_parallel, t.decoding.first, t.counts.batch.spread_chunks))
    if chunk_runs.are_possible(context):
        counts, times, plan = chunk_runs.go_on(context, t, counts, times, plan)
    if t.sight is not None:
        counts, times, plan = swapping.begin(context, t.is_starting, counts, times, plan, t.sight)
    if context.dims.has_remote:
        times, plan, egress = remote_store.begin(context, t.is_starting, event.now, counts, times, plan)
        t = replace(t, egress=egress)
    elif context.dims.has_offload:
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
