"""A request arrives. An iteration ends: its effects are applied, sequences that are done leave."""

from dataclasses import replace
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from jaxsim.engine.common import Params, blocks_for, choose, iterations_to_reach, span
from jaxsim.engine.events import Event
from jaxsim.kernels import clock, packed, residues
from jaxsim.kernels.clock import Time
from jaxsim.spec.dims import Dims
from jaxsim.state.world import Clocks, Counts


class Retired(NamedTuple):
    """The sequence retired in this step, if any."""

    is_any: Bool[Array, ""]
    slot: Int[Array, ""]
    request: Int[Array, ""]


def settle(dims: Dims, params: Params, event: Event, counts: Counts, times: Clocks, counts_by_residue):
    """Apply the iteration (and the jump after it) that just ended, once.

    Returns the new row halves and the time-between-token samples `(seconds, weights)`: the first iteration, and
    the jump at its mean.
    """
    ex, rank, batch = counts.executor, counts.rank, counts.batch
    is_first_look = event.is_ending & (ex.is_committed == 0)
    after_first = batch.counter + ex.advance
    decoding = batch.count + batch.joining
    used = rank.used_blocks
    if params.batching.grows:
        used = used + residues.crossings_between(counts_by_residue, decoding, after_first, ex.extra)
    jump_s = span(times.pace, times.growth_s, ex.extra).hi
    total_s = times.first.hi + jump_s
    mean_s = times.pace.hi + times.growth_s * (0.5 * (ex.extra - 1))
    if params.batching.is_unified:
        gap_s, gap_count = jnp.float32(0), jnp.int32(0)
        samples_s = jnp.stack([times.first.hi, mean_s])
        weights = jnp.stack([batch.count - batch.stalled, decoding * ex.extra])
    else:
        # Sequences kept waiting by prompt-only iterations see the whole gap as one time between tokens, at the
        # next decode iteration: this one, or the first of the jump behind a prompt-only one.
        is_decoding = ex.advance == 1
        late = jnp.where(times.gap_s > 0, jnp.minimum(ex.gap_count, batch.count - batch.stalled),
                         jnp.where(is_decoding, 0, batch.count))
        gap_s = times.gap_s + times.first.hi
        is_open = ~is_decoding & (ex.extra == 0)
        samples_s = jnp.stack([gap_s + jnp.where(is_decoding, 0.0, times.pace.hi), times.first.hi, mean_s])
        weights = jnp.stack([jnp.where(is_open, 0, late), jnp.where(is_decoding, batch.count - batch.stalled - late, 0),
                             decoding * ex.extra - jnp.where(is_decoding | is_open, 0, late)])
        gap_s, gap_count = jnp.where(is_open, gap_s, 0.0), jnp.where(is_open, late, 0)
    if params.batching.grows:
        # Sequences recomputed after a preemption: one gap each, at their mean where several end together.
        resumed_s = times.resume_s / jnp.maximum(batch.resuming, 1) + times.first.hi
        samples_s, weights = jnp.append(samples_s, resumed_s), jnp.append(weights, batch.resuming)
        times = replace(times, resume_s=jnp.where(is_first_look, 0.0, times.resume_s))
    weights = jnp.where(is_first_look, weights, 0)
    settled_batch = replace(
        batch, counter=after_first + ex.extra, count=decoding,
        offsets=batch.offsets + batch.joining_offsets,
        joining=jnp.int32(0), joining_offsets=jnp.int32(0), joining_first=jnp.int32(0), resuming=jnp.int32(0),
        stalled=jnp.int32(0), stalled_offsets=jnp.int32(0),
        num_chunks=jnp.int32(0), chunk_tokens=jnp.int32(0), chunk_context=jnp.int32(0),
        num_iterations=batch.num_iterations + 1 + ex.extra)
    settled_rank = replace(rank, used_blocks=used, peak_blocks=jnp.maximum(rank.peak_blocks, used))
    settled_times = replace(
        times, busy=clock.add(times.busy, total_s),
        running=clock.add(times.running, total_s * rank.running),
        held=clock.add(times.held, total_s * (0.5 * (rank.used_blocks + used))),
        gap_s=gap_s, chunk_pairs=jnp.float32(0))
    if params.batching.reserve == "expected":
        faded = times.ratio - params.batching.ratio_decay * ex.extra.astype(jnp.float32)
        settled_times = replace(settled_times, ratio=jnp.maximum(faded, params.batching.ratio_floor))
    settled_ex = replace(ex, is_committed=jnp.int32(1), extra=jnp.int32(0), gap_count=gap_count)
    new = Counts(settled_ex, settled_rank, settled_batch)
    return choose(is_first_look, new, counts), choose(is_first_look, settled_times, times), samples_s, weights


def retire(dims: Dims, params: Params, event: Event, counts: Counts, keys, entry_of, residue_row):
    """Retire the lowest slot among those whose last token this iteration produced.

    keys: the executor's completion keys; entry_of: gives the entry of a slot. Returns the new counts and residues, who
    retired, whether more do at this instant, and the smallest key among those that stay.
    """
    rank, batch = counts.rank, counts.batch
    bits = dims.slot_bits
    smallest, second = packed.two_smallest(keys)
    counter, slot = packed.unpack_key(smallest, bits)
    is_any = event.is_ending & (counter == batch.counter)
    slot = jnp.where(is_any, slot, dims.null_slot)
    next_key = jnp.where(is_any, second, smallest)
    has_more = is_any & (packed.unpack_key(next_key, bits)[0] == batch.counter)
    request, offset, reserved = entry_of(slot)[:3]
    one = is_any.astype(jnp.int32)
    used = rank.used_blocks
    if params.batching.kv_accounting:
        held = blocks_for(offset + batch.counter, dims) if params.batching.grows else reserved
        used = used - one * held
    if params.batching.grows:
        residue_row = residue_row - one * (jnp.arange(dims.block_size) == (offset & (dims.block_size - 1)))
    rank = replace(rank, running=rank.running - one, used_blocks=used)
    batch = replace(batch, count=batch.count - one, offsets=batch.offsets - one * offset)
    return (Counts(counts.executor, rank, batch), residue_row, Retired(is_any, slot, request), has_more,
            next_key)


def cut_jump(event: Event, counts: Counts, times: Clocks) -> tuple[Counts, Time]:
    """End the jump in flight at the first boundary at or after now, if the arrival may join there.

    Returns the counts and the executor's wake-up time.
    """
    after_first = clock.add(times.start, times.first)
    guess = iterations_to_reach(times.pace.hi, times.growth_s, clock.elapsed(after_first, event.now))
    extra = counts.executor.extra
    for j in (guess + 1, guess, guess - 1):
        reaches = event.now <= clock.add(after_first, span(times.pace, times.growth_s, j))
        extra = jnp.where(reaches & (j >= 0), jnp.minimum(extra, j), extra)
    extra = jnp.where(event.now <= after_first, 0, extra)
    end = clock.add(after_first, span(times.pace, times.growth_s, extra))
    return replace(counts, executor=replace(counts.executor, extra=extra)), end


def is_before_last(event: Event, counts: Counts, times: Clocks) -> Bool[Array, ""]:
    """Whether the last iteration of the jump in flight starts at or after now."""
    extra = counts.executor.extra
    start_of_last = clock.add(clock.add(times.start, times.first),
                              span(times.pace, times.growth_s, jnp.maximum(extra - 1, 0)))
    return (extra > 0) & (event.now <= start_of_last)
