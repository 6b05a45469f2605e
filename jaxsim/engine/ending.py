"""A request arrives. An iteration ends: its effects are applied, sequences that are done leave."""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxsim.engine import pipeline
from jaxsim.engine.common import Group, blocks_for, choose, iterations_to_reach, span, without_chunks
from jaxsim.engine.events import Event
from jaxsim.kernels import clock, packed, residues
from jaxsim.kernels.clock import Time
from jaxsim.spec.dims import Dims
from jaxsim.state.world import Batch, Clocks, Counts


class Retired(NamedTuple):
    """The sequence retired in this step, if any, and the tokens it has computed."""

    is_any: Bool[Array, ""]
    slot: Int[Array, ""]
    request: Int[Array, ""]
    tokens: Int[Array, ""]


def settle(dims: Dims, group: Group, event: Event, counts: Counts, times: Clocks,
           counts_by_residue: Int[Array, " block_size"]
           ) -> tuple[Counts, Clocks, Float[Array, " samples"], Int[Array, " samples"]]:
    """Apply the iteration (and the jump after it) that just ended, once.

    Returns the new row halves and the time-between-token samples `(seconds, weights)`: the first iteration, and
    the jump at its mean.
    """
    rank, batch, own = counts.rank, counts.batch, times.batch
    is_first_look = event.is_ending & (batch.is_committed == 0)
    after_first = batch.counter + batch.advance
    decoding = batch.count + batch.joining
    used = rank.used_blocks
    if group.batching.grows:
        used = used + blocks_of_jump(batch, counts_by_residue)
    jump_s = span(own.pace, own.growth_s, batch.extra).hi
    total_s = own.first.hi + jump_s
    # Batches of a pipeline overlap: time counts once, until the last return.
    counted, spent_s = times.executor.counted, total_s
    if dims.num_stages > 1:
        counted, spent_s = event.now, pipeline.since_counted(event.now, own.start, times.executor)
    whole, counter, most_used = batch.extra, after_first + batch.extra, used
    if dims.has_failures:
        # The last iteration may be lost: it took its blocks and its time up to now, and computed nothing.
        is_lost = batch.is_lost == 1
        whole, counter = jnp.maximum(batch.extra - batch.is_lost, 0), counter - batch.is_lost
        if group.batching.grows:
            used = used - jnp.where(is_lost, residues.crossing_at(counts_by_residue, counter), 0)
        before = clock.add(clock.add(own.start, own.first), span(own.pace, own.growth_s, whole))
        begun = clock.select(batch.extra > 0, before, own.start)
        # What is through and what is not are added one by one, the latter as a pair: they may be no numbers of 24 bits.
        done_s = jnp.where(batch.extra > 0, own.first.hi + span(own.pace, own.growth_s, whole).hi, 0.0)
        counted_s = jnp.where(is_lost, done_s, spent_s)
        since = clock.add(event.now, Time(-begun.hi, -begun.lo))
        lost = clock.select(is_lost, since, Time(jnp.zeros_like(since.hi), jnp.zeros_like(since.lo)))
        spent_s = jnp.where(is_lost, clock.elapsed(own.start, event.now), spent_s)
    mean_s = own.pace.hi + own.growth_s * (0.5 * (whole - 1))
    if group.batching.is_unified:
        gap_s, gap_count = jnp.float32(0), jnp.int32(0)
        samples_s = jnp.stack([own.first.hi, mean_s])
        known = batch.count - batch.stalled
        if dims.has_moves:
            known = known - batch.entering
        weights = jnp.stack([known, decoding * whole])
    else:
        # Sequences kept waiting by prompt-only iterations see the whole gap as one time between tokens, at the
        # next decode iteration: this one, or the first of the jump behind a prompt-only one.
        known = batch.count - batch.stalled
        if dims.has_swap:
            known = known - batch.entering
        is_decoding = batch.advance == 1
        late = jnp.where(own.gap_s > 0, jnp.minimum(batch.gap_count, known),
                         jnp.where(is_decoding, 0, batch.count))
        gap_s = own.gap_s + own.first.hi
        is_open = ~is_decoding & (batch.extra == 0)
        samples_s = jnp.stack([gap_s + jnp.where(is_decoding, 0.0, own.pace.hi), own.first.hi, mean_s])
        weights = jnp.stack([jnp.where(is_open, 0, late), jnp.where(is_decoding, known - late, 0),
                             decoding * batch.extra - jnp.where(is_decoding | is_open, 0, late)])
        gap_s, gap_count = jnp.where(is_open, gap_s, 0.0), jnp.where(is_open, late, 0)
        if dims.has_roles:
            # Who has just come has its own gap, below.
            weights = weights.at[1].set(jnp.maximum(weights[1] - jnp.where(is_decoding, batch.entering, 0), 0))
    if group.batching.grows or dims.has_roles:
        # Sequences recomputed after a preemption: one gap each, at their mean where several end together.
        resumed_s = own.resume_s / jnp.maximum(batch.resuming, 1) + own.first.hi
        samples_s, weights = jnp.append(samples_s, resumed_s), jnp.append(weights, batch.resuming)
        own = replace(own, resume_s=jnp.where(is_first_look, 0.0, own.resume_s))
    if dims.has_failures:
        # Of the first iteration nothing counts where it is the one that is lost.
        is_behind = jnp.arange(weights.shape[0]) == 1
        weights = jnp.where(is_behind | ~is_lost | (batch.extra > 0), weights, 0)
    weights = jnp.where(is_first_look, weights, 0)
    settled_batch = replace(
        batch, counter=counter, count=decoding,
        offsets=batch.offsets + batch.joining_offsets,
        joining=jnp.int32(0), joining_offsets=jnp.int32(0), joining_first=jnp.int32(0), resuming=jnp.int32(0),
        stalled=jnp.int32(0), stalled_offsets=jnp.int32(0),
        num_chunks=jnp.int32(0), chunk_tokens=jnp.int32(0), chunk_context=jnp.int32(0),
        is_committed=jnp.int32(1), extra=jnp.int32(0), gap_count=gap_count,
        taken=None if batch.taken is None else jnp.int32(0),
        entering=None if batch.entering is None else jnp.int32(0),
        joining_prefill=None if batch.joining_prefill is None else jnp.int32(0),
        loading=None if batch.loading is None else jnp.int32(0),
        fetching=None if batch.fetching is None else jnp.int32(0),
        spread_chunks=None if batch.spread_chunks is None else jnp.int32(0),
        longest_chunk=None if batch.longest_chunk is None else jnp.int32(0))
    settled_rank = replace(rank, used_blocks=used, peak_blocks=jnp.maximum(rank.peak_blocks, most_used))
    if batch.tiles is not None:
        settled_batch = replace(settled_batch, tiles=jnp.int32(0))
        if rank.cached_tiles is not None:
            settled_rank = replace(settled_rank, cached_tiles=rank.cached_tiles - batch.tiles)
    if batch.joining_prefill is not None:
        settled_rank = replace(settled_rank, prefill_tokens=rank.prefill_tokens - batch.joining_prefill)
    integrals = replace(
        times.rank, running=clock.add(times.rank.running, spent_s * rank.running),
        held=clock.add(times.rank.held, spent_s * (0.5 * (rank.used_blocks + used))))
    if group.batching.reserve == "expected":
        # A rank that only runs along decodes nothing.
        decode_iterations = jnp.where(decoding > 0, batch.extra, 0) if dims.num_ranks > 1 else batch.extra
        faded = integrals.ratio - group.batching.ratio_decay * decode_iterations.astype(jnp.float32)
        integrals = replace(integrals, ratio=jnp.maximum(faded, group.batching.ratio_floor))
    executor, busy = counts.executor, clock.add(times.executor.busy, spent_s)
    if dims.has_failures:
        busy = clock.add(clock.add(times.executor.busy, counted_s), lost)
    num_iterations = executor.num_iterations + 1 + batch.extra
    if dims.num_ranks > 1:
        # An iteration of all ranks counts once.
        is_first = event.rank == 0
        num_iterations = jnp.where(is_first, num_iterations, executor.num_iterations)
        busy = clock.select(is_first, busy, times.executor.busy)
    alone = times.executor.alone
    if dims.num_stages > 1:
        alone = clock.add(alone, jump_s)
    settled_times = Clocks(replace(times.executor, busy=busy, counted=counted, alone=alone), integrals,
                           replace(without_chunks(own), gap_s=gap_s))
    if dims.has_failures:
        start = clock.select(is_lost, begun, own.start)
        settled_times = replace(settled_times, batch=replace(settled_times.batch, start=start))
    settled = Counts(replace(executor, num_iterations=num_iterations), settled_rank, settled_batch)
    times = replace(times, batch=own)
    return choose(is_first_look, settled, counts), choose(is_first_look, settled_times, times), samples_s, weights


def blocks_of_jump(batch: Batch, counts_by_residue: Int[Array, " block_size"]) -> Int[Array, ""]:
    """Blocks that the iterations behind the first take, and have not taken yet."""
    decoding, after_first = batch.count + batch.joining, batch.counter + batch.advance
    blocks = residues.crossings_between(counts_by_residue, decoding, after_first, batch.extra)
    if batch.taken is None:
        return blocks
    return blocks - residues.crossings_between(counts_by_residue, decoding, after_first, batch.taken)


def take_blocks_of_jump(group: Group, condition: Bool[Array, ""], counts: Counts,
                        counts_by_residue: Int[Array, " block_size"]) -> Counts:
    """All blocks of a jump now, of which the last iteration is under way, since others are to be admitted beside it."""
    rank, batch = counts.rank, counts.batch
    if not group.batching.grows:
        return counts
    used = rank.used_blocks + jnp.where(condition, blocks_of_jump(batch, counts_by_residue), 0)
    rank = replace(rank, used_blocks=used, peak_blocks=jnp.maximum(rank.peak_blocks, used))
    return replace(counts, rank=rank, batch=replace(batch, taken=jnp.where(condition, batch.extra, batch.taken)))


def retire(dims: Dims, group: Group, event: Event, counts: Counts, keys: Int[Array, " slot_width"],
           entry_of: Callable[[Int[Array, ""]], Int[Array, " entry_fields"]], residue_row: Int[Array, " block_size"],
           stamps: Int[Array, " slot_width"] | None = None,
           is_kept: Callable[[Int[Array, ""], Int[Array, ""]], Bool[Array, ""]] | None = None
           ) -> tuple[Counts, Int[Array, " block_size"], Retired, Bool[Array, ""], Int[Array, ""]]:
    """Retire the lowest slot among those whose last token this iteration produced; by `stamps` the first to run.

    keys: the batch's completion keys; entry_of: gives the entry of a slot; is_kept: whether blocks of a request
    stay, by its computed tokens.
    Returns the new counts and residues, who
    retired, whether more do at this instant, and the smallest key among those that stay.
    """
    rank, batch = counts.rank, counts.batch
    bits = dims.slot_bits
    smallest, second = packed.two_smallest(keys)
    counter, slot = packed.unpack_key(smallest, bits)
    is_any = event.is_ending & (counter == batch.counter)
    next_key = jnp.where(is_any, second, smallest)
    if stamps is not None:
        is_tied = packed.unpack_key(keys, bits)[0] == batch.counter
        first = jnp.argmin(jnp.where(is_tied, stamps, packed.EMPTY)).astype(jnp.int32)
        next_key = jnp.where(is_any & (first != slot), smallest, next_key)
        slot = first
    slot = jnp.where(is_any, slot, dims.null_slot)
    has_more = is_any & (packed.unpack_key(next_key, bits)[0] == batch.counter)
    request, offset, reserved = entry_of(slot)[:3]
    one = is_any.astype(jnp.int32)
    used = rank.used_blocks
    if group.batching.kv_accounting and not group.batching.prefix_caching:
        held = blocks_for(offset + batch.counter, dims) if group.batching.grows else reserved
        if is_kept is not None:
            kept = one * is_kept(request, offset + batch.counter) * held
            used, rank = used + kept, replace(rank, kept_blocks=rank.kept_blocks + kept)
        used = used - one * held
    if group.batching.grows:
        residue_row = residue_row - one * (jnp.arange(dims.block_size) == (offset & (dims.block_size - 1)))
    rank = replace(rank, running=rank.running - one, used_blocks=used)
    batch = replace(batch, count=batch.count - one, offsets=batch.offsets - one * offset)
    retired = Retired(is_any, slot, request, offset + batch.counter)
    return Counts(counts.executor, rank, batch), residue_row, retired, has_more, next_key


def cut_jump(now: Time, counts: Counts, times: Clocks) -> tuple[Counts, Time]:
    """End the jump in flight at the first boundary at or after now.

    Returns the counts and when that is, which wakes the executor.
    """
    t = times.batch
    after_first = clock.add(t.start, t.first)
    guess = iterations_to_reach(t.pace.hi, t.growth_s, clock.elapsed(after_first, now))
    extra = counts.batch.extra
    for j in (guess + 1, guess, guess - 1):
        reaches = now <= clock.add(after_first, span(t.pace, t.growth_s, j))
        extra = jnp.where(reaches & (j >= 0), jnp.minimum(extra, j), extra)
    extra = jnp.where(now <= after_first, 0, extra)
    end = clock.add(after_first, span(t.pace, t.growth_s, extra))
    return replace(counts, batch=replace(counts.batch, extra=extra)), end


def is_before_last(event: Event, counts: Counts, times: Clocks) -> Bool[Array, ""]:
    """Whether the last iteration of the jump in flight starts at or after now."""
    extra, t = counts.batch.extra, times.batch
    start_of_last = clock.add(clock.add(t.start, t.first), span(t.pace, t.growth_s, jnp.maximum(extra - 1, 0)))
    return (extra > 0) & (event.now <= start_of_last)
