"""One step of one scenario: gather what one event touches, fire the phases in order, write it back.

A step takes the earliest event (an iteration's end, an arrival, or a scheduling pass still under way), works on
that executor alone, and fires each phase at most once: settle the iteration that ended, retire one sequence,
enqueue one arrival, and, in the pass, preempt one victim or place one prompt, then start the next iteration.
Work in bulk is several steps at the same instant. Written for one scenario; the loop runs it under `vmap`.

A step reads arrays and returns writes; the next step applies them first. So every array is read after its last
write, which is what lets the compiled loop update it in place: a read that could be ordered after a write would
make XLA copy the array in every step.
"""

from dataclasses import replace
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxsim.cost.base import AbstractIterationCost, BatchStats
from jaxsim.kernels import bitmap, clock, packed, residues
from jaxsim.kernels.clock import Time
from jaxsim.kernels.fence import Fence
from jaxsim.policy.batching import Batching
from jaxsim.policy.routing import AbstractRouting, View
from jaxsim.spec.dims import NUM_ITL_BINS, Dims
from jaxsim.state import world as w
from jaxsim.state.requests import MAX_TOKENS, OUTPUT, PROMPT, RANK, Requests
from jaxsim.state.world import Clocks, Counts, Executor, World

FREEZE_S = 1.5 * clock.EPOCH_S
"""A scenario whose next event lies beyond this waits for the outer loop to move its epoch."""

MAX_SPAN_S = clock.EPOCH_S / 4
"""A jump covers at most about this much time."""


class Params(eqx.Module):
    """What a scenario is, besides its workload: policies and costs, all numbers traced."""

    batching: Batching
    routing: AbstractRouting
    cost: AbstractIterationCost
    max_steps: Int[Array, ""]


class Event(NamedTuple):
    """What happens next, where, and when. `is_tied`: an arrival at this very instant comes before any pass."""

    now: Time
    executor: Int[Array, ""]
    is_arrival: Bool[Array, ""]
    is_ending: Bool[Array, ""]
    is_passing: Bool[Array, ""]
    is_tied: Bool[Array, ""]


class Retired(NamedTuple):
    """The sequence retired in this step, if any."""

    is_any: Bool[Array, ""]
    slot: Int[Array, ""]
    request: Int[Array, ""]


class Placed(NamedTuple):
    """The prompt placed in this step, if any: a new admission, or the forming prompt's next chunk."""

    is_admitted: Bool[Array, ""]
    is_completing: Bool[Array, ""]
    is_first_token: Bool[Array, ""]
    request: Int[Array, ""]
    slot: Int[Array, ""]
    key: Int[Array, ""]
    entry: Int[Array, " entry_fields"]


class Plan(NamedTuple):
    """The iteration (or jump) started in this step, if any."""

    is_any: Bool[Array, ""]
    first_end: Time
    end: Time
    stats: BatchStats


def blocks_for(tokens: Int[Array, ""], dims: Dims) -> Int[Array, ""]:
    """KV blocks that hold `tokens`."""
    return (tokens + (dims.block_size - 1)) >> dims.block_bits


def take(array, *index):
    """One entry by indices known to be in bounds."""
    return array.at[index].get(mode="promise_in_bounds")


class Put(NamedTuple):
    """Overwrite one entry."""

    index: tuple[Int[Array, "..."], ...]
    value: Array


class Add(NamedTuple):
    """Add to one entry, or to several."""

    index: tuple[Int[Array, "..."], ...]
    value: Array


class Pair(NamedTuple):
    """Overwrite two slots of an executor's row, distinct unless both are the scratch slot."""

    index: tuple[Int[Array, ""], Int[Array, ""], Int[Array, ""]]
    value: tuple[Array, Array]


Writes = dict[str, Put | Add | Pair]
"""What a step changes in the large arrays, by name. The next step applies it before it reads anything."""


def apply(world: World, writes: Writes) -> World:
    """Write what a step decided."""
    arrays = {}
    for name, write in writes.items():
        array = getattr(world, name)
        if isinstance(write, Pair):
            e, first, second = write.index
            arrays[name] = array.at[jnp.stack([e, e]), jnp.stack([first, second])].set(
                jnp.stack(write.value), mode="promise_in_bounds")
        elif isinstance(write, Put):
            arrays[name] = array.at[write.index].set(write.value, mode="promise_in_bounds", unique_indices=True)
        else:
            arrays[name] = array.at[write.index].add(write.value, mode="promise_in_bounds")
    return replace(world, **arrays)


def span_s(pace_s: Float[Array, ""], growth_s: Float[Array, ""], count: Int[Array, ""]) -> Float[Array, ""]:
    """Seconds of the first `count` iterations of a run: `count pace + growth count (count - 1) / 2`, on the grid."""
    j = count.astype(jnp.float32)
    return clock.on_grid(j * pace_s + growth_s * (j * (j - 1) * 0.5))


def iterations_to_reach(pace_s, growth_s, distance_s) -> Int[Array, ""]:
    """The smallest count whose `span_s` is about `distance_s`; at most one off, which the caller mends."""
    linear = pace_s - 0.5 * growth_s
    root = jnp.sqrt(linear * linear + 2.0 * growth_s * jnp.maximum(distance_s, 0.0))
    count = 2.0 * jnp.maximum(distance_s, 0.0) / jnp.maximum(linear + root, 1e-30)
    return lax.stop_gradient(jnp.ceil(jnp.minimum(count, 1e9)).astype(jnp.int32))


# --- What happens next -------------------------------------------------------------------------------------------


def next_arrival_time(world: World, requests: Requests) -> tuple[Time, Bool[Array, ""]]:
    """Time of the next arrival relative to the world's epoch, and whether the one after it is simultaneous."""
    epoch, hi, lo, is_tied = take(requests.arrival, world.next_arrival)
    distance = (epoch - world.epoch.astype(jnp.float32)) * clock.EPOCH_S
    moved = clock.add(clock.two_sum(jnp.where(jnp.isinf(hi), 0.0, hi), lo), distance)
    return clock.select(jnp.isinf(hi), clock.never(), moved), is_tied > 0


def earliest_wake(world: World) -> tuple[Time, Int[Array, ""], Int[Array, ""]]:
    """First executor to wake by (time, phase, index): its time, phase and index."""
    if world.phase.shape[0] == 1:
        return Time(world.wake_hi[0], world.wake_lo[0]), world.phase[0], jnp.int32(0)
    hi = jnp.min(world.wake_hi)
    lo = jnp.min(jnp.where(world.wake_hi == hi, world.wake_lo, jnp.inf))
    is_first = (world.wake_hi == hi) & (world.wake_lo == lo)
    bits = packed.index_bits(world.phase.shape[0])
    index = jnp.arange(world.phase.shape[0], dtype=jnp.int32)
    best = jnp.min(jnp.where(is_first, packed.pack_key(world.phase, index, bits), packed.EMPTY))
    phase, executor = packed.unpack_key(best, bits)
    return Time(hi, jnp.where(jnp.isinf(hi), 0.0, lo)), phase, executor


def used_blocks_now(dims: Dims, world: World, now: Time) -> Int[Array, " instances"]:
    """Blocks every executor holds at `now`, inside its jump: those of passes up to its last boundary."""
    def one(row, times, counts):
        c = packed.from_row(w.row_templates(dims)[0], row)
        t = packed.from_row(w.row_templates(dims)[1], times)
        after_first = clock.add(t.start, t.first_s)
        guess = iterations_to_reach(t.pace_s, t.growth_s, clock.elapsed(after_first, now))
        done = jnp.int32(0)
        for j in (guess - 1, guess, guess + 1):
            reached = clock.add(after_first, span_s(t.pace_s, t.growth_s, jnp.maximum(j, 0))) < now
            done = jnp.where(reached & (j > done), j, done)
        # The pass at each boundary behind us has taken its blocks; one at this very instant comes after arrivals.
        passes = jnp.where(after_first < now, jnp.minimum(done + 1, c.executor.extra), 0)
        is_running = (c.executor.is_committed == 0) & (c.executor.extra > 0)
        taken = residues.crossings_between(counts, c.batch.count + c.batch.joining,
                                           c.batch.counter + c.executor.advance, passes)
        return c.rank.used_blocks + jnp.where(is_running, taken, 0)

    return jax.vmap(one)(world.counts, world.clocks, world.residues)


def route(dims: Dims, params: Params, requests: Requests, world: World, now: Time) -> Int[Array, ""]:
    """The instance for the request that arrives now."""
    if dims.num_instances == 1:
        return jnp.int32(0)
    used = None
    if params.routing.reads_kv and params.batching.kv_accounting:
        used = used_blocks_now(dims, world, now)
    waiting = None
    if params.routing.reads_waiting:
        template = w.row_templates(dims)[0]
        waiting = packed.from_row(template, world.counts.T).rank.waiting
    view = View(world.outstanding, waiting, used, params.batching.num_blocks, world.next_arrival,
                take(requests.uniforms, world.next_arrival))
    return params.routing.choose(view)


def next_event(dims: Dims, params: Params, requests: Requests, world: World) -> tuple[Event, Bool[Array, ""]]:
    """The next event of a live scenario, and whether it lies too far ahead for the current epoch."""
    arrival, next_is_tied = next_arrival_time(world, requests)
    wake, phase, executor = earliest_wake(world)
    is_arrival = (arrival < wake) | (arrival.equals(wake) & (phase == w.PASSING))
    now = clock.select(is_arrival, arrival, wake)
    is_frozen = now.hi >= FREEZE_S
    is_live = (world.num_finished < requests.count) & (world.fault == 0) & ~is_frozen
    is_arrival = is_arrival & is_live
    is_wake = ~is_arrival & is_live
    executor = jnp.where(is_arrival, route(dims, params, requests, world, now), executor)
    is_tied = jnp.where(is_arrival, next_is_tied, arrival.equals(now))
    event = Event(now, executor, is_arrival, is_wake & (phase == w.ENDING), is_wake & (phase == w.PASSING), is_tied)
    return event, is_frozen & (world.num_finished < requests.count) & (world.fault == 0)


# --- An iteration ends -------------------------------------------------------------------------------------------


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
    jump_s = span_s(times.pace_s, times.growth_s, ex.extra)
    total_s = times.first_s + jump_s
    mean_s = times.pace_s + times.growth_s * (0.5 * (ex.extra - 1))
    if params.batching.is_unified:
        gap_s, gap_count = jnp.float32(0), jnp.int32(0)
        samples_s = jnp.stack([times.first_s, mean_s])
        weights = jnp.stack([batch.count - batch.stalled, decoding * ex.extra])
    else:
        # Sequences kept waiting by prompt-only iterations see the whole gap as one time between tokens, at the
        # next decode iteration: this one, or the first of the jump behind a prompt-only one.
        is_decoding = ex.advance == 1
        late = jnp.where(times.gap_s > 0, jnp.minimum(ex.gap_count, batch.count - batch.stalled),
                         jnp.where(is_decoding, 0, batch.count))
        gap_s = times.gap_s + times.first_s
        is_open = ~is_decoding & (ex.extra == 0)
        samples_s = jnp.stack([gap_s + jnp.where(is_decoding, 0.0, times.pace_s), times.first_s, mean_s])
        weights = jnp.stack([jnp.where(is_open, 0, late), jnp.where(is_decoding, batch.count - batch.stalled - late, 0),
                             decoding * ex.extra - jnp.where(is_decoding | is_open, 0, late)])
        gap_s, gap_count = jnp.where(is_open, gap_s, 0.0), jnp.where(is_open, late, 0)
    weights = jnp.where(is_first_look, weights, 0)
    settled_batch = replace(
        batch, counter=after_first + ex.extra, count=decoding,
        offsets=batch.offsets + batch.joining_offsets,
        joining=jnp.int32(0), joining_offsets=jnp.int32(0), joining_first=jnp.int32(0),
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


def retire(dims: Dims, params: Params, event: Event, counts: Counts, keys, entries, residue_row):
    """Retire the lowest slot among those whose last token this iteration produced.

    keys, entries: the executor's completion keys and slot entries. Returns the new counts and residues, who
    retired, whether more do at this instant, and the smallest key among those that stay.
    """
    rank, batch = counts.rank, counts.batch
    bits = dims.slot_bits
    counter, slot = packed.unpack_key(packed.row_min(keys), bits)
    is_any = event.is_ending & (counter == batch.counter)
    slot = jnp.where(is_any, slot, dims.null_slot)
    index = jnp.arange(dims.slot_width, dtype=jnp.int32)
    next_key = packed.row_min(jnp.where(index == slot, packed.EMPTY, keys))
    has_more = is_any & (packed.unpack_key(next_key, bits)[0] == batch.counter)
    request, offset, reserved = take(entries, slot)[:3]
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


# --- A request arrives -------------------------------------------------------------------------------------------


def cut_jump(params: Params, event: Event, counts: Counts, times: Clocks) -> tuple[Counts, Time]:
    """End the jump in flight at the first boundary at or after now, if the arrival may join there.

    Returns the counts and the executor's wake-up time.
    """
    after_first = clock.add(times.start, times.first_s)
    guess = iterations_to_reach(times.pace_s, times.growth_s, clock.elapsed(after_first, event.now))
    extra = counts.executor.extra
    for j in (guess + 1, guess, guess - 1):
        reaches = event.now <= clock.add(after_first, span_s(times.pace_s, times.growth_s, j))
        extra = jnp.where(reaches & (j >= 0), jnp.minimum(extra, j), extra)
    extra = jnp.where(event.now <= after_first, 0, extra)
    end = clock.add(after_first, span_s(times.pace_s, times.growth_s, extra))
    return replace(counts, executor=replace(counts.executor, extra=extra)), end


def is_before_last(event: Event, counts: Counts, times: Clocks) -> Bool[Array, ""]:
    """Whether the last iteration of the jump in flight starts at or after now."""
    extra = counts.executor.extra
    start_of_last = clock.add(clock.add(times.start, times.first_s),
                              span_s(times.pace_s, times.growth_s, jnp.maximum(extra - 1, 0)))
    return (extra > 0) & (event.now <= start_of_last)


def enqueue(params: Params, event: Event, counts: Counts, request: Int[Array, ""]) -> Counts:
    """Put the arriving request at the back of its instance's queue."""
    rank = counts.rank
    one = event.is_arrival.astype(jnp.int32)
    is_alone = rank.waiting == 0
    return replace(counts, rank=replace(
        rank, head=jnp.where(event.is_arrival & is_alone, request, rank.head),
        back=jnp.where(event.is_arrival, request, rank.back), waiting=rank.waiting + one))


def choose(condition, a, b):
    """Leaf-wise choice between two records."""
    return jax.tree.map(lambda x, y: x if x is y else jnp.where(condition, x, y), a, b)


# --- A scheduling pass -------------------------------------------------------------------------------------------


def begin_pass(params: Params, is_passing: Bool[Array, ""], counts: Counts) -> Counts:
    """Fresh token budget and progress flags, unless a pass is already under way."""
    ex, batch, rank = counts.executor, counts.batch, counts.rank
    is_fresh = is_passing & (ex.progress == 0)
    decodes = batch.count if params.batching.is_unified else 0
    was_empty = jnp.where(rank.running == 0, w.WAS_EMPTY, 0)
    if params.batching.async_scheduling:
        is_blind = is_fresh & (rank.running == 0) & (rank.visible == 0)
        rank = replace(rank, visible=jnp.where(is_blind, rank.waiting, rank.visible))
    if params.batching.order == "priority":
        rank = replace(rank, cursor=jnp.where(is_fresh, -1, rank.cursor))
    return Counts(
        replace(ex, progress=jnp.where(is_fresh, w.PASS | was_empty, ex.progress)), rank,
        replace(batch, budget=jnp.where(is_fresh, params.batching.max_num_batched_tokens - decodes, batch.budget)))


def has(counts: Counts, flag: int) -> Bool[Array, ""]:
    """Whether the pass has reached `flag`."""
    return (counts.executor.progress & flag) != 0


def mark(counts: Counts, condition: Bool[Array, ""], flag: int) -> Counts:
    """Set `flag` where `condition`."""
    progress = jnp.where(condition, counts.executor.progress | flag, counts.executor.progress)
    return replace(counts, executor=replace(counts.executor, progress=progress))


def decode_need(dims: Dims, params: Params, counts: Counts, residue_row, tail_offset):
    """Blocks the decodes of this pass take, and blocks that must be free for them (and the forming prompt's
    next chunk) to go ahead."""
    rank, batch = counts.rank, counts.batch
    crossing = residues.crossing_at(residue_row, batch.counter)
    if params.batching.decode_needs_free_block == "always":
        tail_crosses = ((tail_offset + batch.counter) & (dims.block_size - 1)) == 0
        need = jnp.where(batch.count > 0, crossing - tail_crosses + 1, 0)
    else:
        need = crossing
    if params.batching.reserve == "none" and params.batching.chunked_prefill and params.batching.is_unified:
        chunk = jnp.minimum(rank.forming_known - rank.forming_computed, batch.budget)
        grown = blocks_for(rank.forming_computed + chunk, dims) - blocks_for(rank.forming_computed, dims)
        need = need + jnp.where(rank.forming_slot != dims.null_slot, grown, 0)
    return crossing, need


def place(dims: Dims, params: Params, is_open: Bool[Array, ""], counts: Counts, times: Clocks, residue_row,
          lengths, emitted, request, free_slot, slots: "Slots"):
    """Give the forming prompt its chunk, or admit the head of the queue if it fits.

    is_open: whether this step may place anything. lengths: the candidate's (prompt, output, max_tokens);
    emitted: its output tokens so far. Returns counts, times, residues, what was placed, whether the queue's head
    is blocked by something that only an event can lift, and whether more may be placed at this instant.
    """
    rules = params.batching
    ex, rank, batch = counts.executor, counts.rank, counts.batch
    prompt, output, max_tokens = lengths[PROMPT], lengths[OUTPUT], lengths[MAX_TOKENS]
    known = prompt + emitted
    null = jnp.int32(dims.null_slot)
    is_forming = jnp.bool_(False)
    if rules.chunked_prefill:
        is_forming = (rank.forming_slot != null) & ~has(counts, w.FORMED)
    computed = jnp.where(is_forming, rank.forming_computed, 0)
    rest = known - computed
    chunk = jnp.minimum(rest, batch.budget) if rules.chunked_prefill else rest
    if rules.order == "priority":
        chunk = jnp.where(is_forming & has(counts, w.CHUNKED), rank.forming_chunk, chunk)
    reserved = {
        "none": blocks_for(chunk, dims), "prompt": blocks_for(known, dims),
        "expected": blocks_for(known, dims), "max_tokens": blocks_for(prompt + max_tokens, dims),
        "max_model_len": blocks_for(rules.max_model_len, dims)}[rules.reserve]
    if not rules.kv_accounting:
        reserved = jnp.int32(0)
    grown = reserved
    if rules.chunked_prefill:
        more = 0
        if rules.reserve == "none" and rules.kv_accounting:
            more = blocks_for(computed + chunk, dims) - blocks_for(computed, dims)
        grown = jnp.where(is_forming, more, reserved)

    has_budget = (batch.budget > 0) if rules.chunked_prefill else (rest <= batch.budget)
    has_slot = rank.running < rules.max_num_seqs
    has_blocks = jnp.bool_(True)
    if rules.kv_accounting:
        has_blocks = rules.num_blocks - rank.used_blocks - reserved >= rules.watermark_blocks
    if rules.reserve == "expected":
        own = (reserved << dims.block_bits) + jnp.minimum(max_tokens - emitted, rules.reserve_clip_tokens)
        free_tokens = ((rules.num_blocks - rank.used_blocks) << dims.block_bits).astype(jnp.float32)
        others = slots.expected_tokens(dims, rules, counts).astype(jnp.float32) * times.ratio
        has_blocks = has_blocks & (own.astype(jnp.float32) <= free_tokens - others)
    is_head_visible = (rank.visible > 0) if rules.async_scheduling else (rank.waiting > 0)
    is_closed = has(counts, w.CLOSED)
    if rules.admit == "when_empty":
        is_closed = is_closed | ~has(counts, w.WAS_EMPTY)
    is_head_tried = is_open & ~is_forming & is_head_visible & ~is_closed
    is_admitted = is_head_tried & has_budget & has_slot & has_blocks
    is_forming = is_open & is_forming
    is_placed = is_admitted | is_forming
    # What keeps the head waiting until a sequence leaves, rather than only for this iteration.
    is_held = ~has_slot | ~has_blocks
    if rules.reserve == "expected":
        is_held = jnp.bool_(False)
    if rules.admit == "when_empty":
        is_held = jnp.bool_(True)

    is_completing = is_placed & (computed + chunk == known)
    is_partial = is_placed & ~is_completing
    slot = jnp.where(is_forming, rank.forming_slot, jnp.where(is_admitted, free_slot, null))
    # The first iteration advances the token clock in a unified batch; beside a prompt-only one, decodes wait.
    after_first = batch.counter + (1 if rules.is_unified else 0)
    offset = known - after_first
    is_first_token = is_completing & (emitted == 0)
    one = is_completing.astype(jnp.int32)
    tokens = jnp.where(is_placed, chunk, 0)
    start, end = computed.astype(jnp.float32), (computed + tokens).astype(jnp.float32)
    batch = replace(
        batch, budget=batch.budget - tokens, joining=batch.joining + one,
        joining_offsets=batch.joining_offsets + one * offset,
        joining_first=batch.joining_first + is_first_token,
        num_chunks=batch.num_chunks + (tokens > 0),
        chunk_tokens=batch.chunk_tokens + tokens,
        chunk_context=batch.chunk_context + jnp.where(tokens > 0, computed + tokens, 0))
    times = replace(times, chunk_pairs=times.chunk_pairs
                    + jnp.where(tokens > 0, (end - start) * (end + start), 0.0))
    is_in = is_admitted.astype(jnp.int32)
    used = rank.used_blocks + jnp.where(is_placed, grown, 0)
    rank = replace(
        rank, waiting=rank.waiting - is_in, running=rank.running + is_in, used_blocks=used,
        peak_blocks=jnp.maximum(rank.peak_blocks, used), next_stamp=rank.next_stamp + is_placed)
    if rules.async_scheduling:
        rank = replace(rank, visible=rank.visible - is_in)
    if rules.chunked_prefill:
        rank = replace(
            rank, forming_slot=jnp.where(is_partial, slot, jnp.where(is_completing, null, rank.forming_slot)),
            forming_request=jnp.where(is_partial, request, rank.forming_request),
            forming_computed=jnp.where(is_partial, computed + tokens, rank.forming_computed),
            forming_known=jnp.where(is_partial, known, rank.forming_known))
    if rules.grows:
        residue_row = residue_row + one * (jnp.arange(dims.block_size) == (offset & (dims.block_size - 1)))
    counts = Counts(ex, rank, batch)
    counts = mark(counts, is_forming, w.FORMED)
    counts = mark(counts, is_placed & (tokens > 0), w.FILLED)
    left = (rank.visible if rules.async_scheduling else rank.waiting) > 0
    can_go_on = is_placed & left & (batch.budget > 0) & (rank.running < rules.max_num_seqs) & ~is_closed
    key = packed.pack_key(after_first + (output - emitted - 1), slot, dims.slot_bits)
    entry = [request, offset, max_tokens if rules.reserve == "expected" else reserved]
    if rules.scans_slots:
        stamp = batch.num_iterations if rules.reserve == "expected" else rank.next_stamp
        entry += [lengths[RANK] if rules.order == "priority" else prompt, stamp]
    placed = Placed(is_admitted, is_completing, is_first_token, request, slot, key, jnp.stack(entry))
    is_held = (rank.running >= rules.max_num_seqs) | (is_head_tried & ~is_admitted & is_held)
    return counts, times, residue_row, placed, is_held, can_go_on


def start(dims: Dims, params: Params, is_starting: Bool[Array, ""], event: Event, counts: Counts, times: Clocks,
          residue_row, next_key, is_held):
    """Price the iteration that was formed, and the decode iterations that can follow it undisturbed.

    next_key: smallest completion key of the executor, the joining sequences included. is_held: the queue's head,
    if any, can join only after an event.
    """
    rules = params.batching
    rank, batch = counts.rank, counts.batch
    is_prompt_only = jnp.bool_(False) if rules.is_unified else has(counts, w.FILLED)
    decodes = jnp.where(is_prompt_only, 0, batch.count - batch.stalled)
    advance = jnp.where(is_prompt_only, 0, 1)
    stats = BatchStats(
        decodes, jnp.where(is_prompt_only, 0, batch.offsets - batch.stalled_offsets
                           + decodes * (batch.counter + 1)),
        batch.num_chunks, batch.chunk_tokens, batch.chunk_context, times.chunk_pairs, decodes + batch.joining)
    first_s = clock.on_grid(params.cost.iteration(stats))
    after_first = batch.counter + advance
    followers = batch.count + batch.joining
    pace = params.cost.decode(
        followers, batch.offsets + batch.joining_offsets + followers * (after_first + 1))
    to_completion = packed.unpack_key(next_key, dims.slot_bits)[0] - after_first
    extra = jnp.minimum(jnp.minimum(to_completion, pace.horizon), dims.max_jump - 1)
    if rules.grows:
        room = rules.num_blocks - rank.used_blocks
        if rules.decode_needs_free_block == "always":
            room = room - 1
        extra = jnp.minimum(extra, residues.times_that_fit(residue_row, followers, after_first, room))
    slowest_s = jnp.maximum(pace.first_s + pace.growth_s * extra.astype(jnp.float32), 1e-9)
    extra = jnp.minimum(extra, jnp.minimum(MAX_SPAN_S / slowest_s, 1e9).astype(jnp.int32))
    may_follow = (followers > 0) & ((rank.waiting == 0) | is_held) & (batch.stalled == 0)
    if rules.has_context_limit:
        room = rules.decode_context_limit - (batch.offsets + batch.joining_offsets + followers * after_first)
        extra = jnp.minimum(extra, jnp.floor(room / jnp.maximum(followers, 1)).astype(jnp.int32))
    if rules.chunked_prefill:
        may_follow = may_follow & (rank.forming_slot == dims.null_slot)
    extra = jnp.where(may_follow, jnp.maximum(extra, 0), 0)
    first_end = clock.add(event.now, first_s)
    end = clock.add(first_end, span_s(pace.first_s, pace.growth_s, extra))
    ex = Executor(extra=extra, advance=advance, is_committed=jnp.int32(0), progress=jnp.int32(0),
                  gap_count=counts.executor.gap_count, log_row=counts.executor.log_row)
    if rules.async_scheduling:
        rank = replace(rank, visible=rank.waiting)
    times_now = replace(times, start=event.now, first_s=first_s, pace_s=pace.first_s, growth_s=pace.growth_s)
    counts = choose(is_starting, Counts(ex, rank, batch), counts)
    return counts, choose(is_starting, times_now, times), Plan(is_starting, first_end, end, stats)


def preempt(dims: Dims, params: Params, is_any: Bool[Array, ""], counts: Counts, residue_row, slot, request,
            offset, previous, known_prompt):
    """Take a sequence off the batch: all its blocks, back to the front of the queue.

    slot, request, offset, previous: of the victim; `known_prompt` its prompt tokens. Returns counts, residues and the
    tokens it has emitted.
    """
    rank, batch = counts.rank, counts.batch
    null = jnp.int32(dims.null_slot)
    is_forming = (slot == rank.forming_slot) & (slot != null)
    held_tokens = jnp.where(is_forming, rank.forming_computed, offset + batch.counter)
    if params.batching.reserve != "none":
        held_tokens = jnp.where(is_forming, rank.forming_known, held_tokens)
    emitted = jnp.where(is_forming, rank.forming_known, offset + batch.counter + 1) - known_prompt
    one = is_any.astype(jnp.int32)
    is_decoding = is_any & ~is_forming
    gone = is_decoding.astype(jnp.int32)
    residue_row = residue_row - gone * (jnp.arange(dims.block_size) == (offset & (dims.block_size - 1)))
    is_alone = rank.waiting == 0
    rank = replace(
        rank, head=jnp.where(is_any, request, rank.head),
        back=jnp.where(is_any & is_alone, request, rank.back), waiting=rank.waiting + one,
        running=rank.running - one, used_blocks=rank.used_blocks - one * blocks_for(held_tokens, dims),
        forming_slot=jnp.where(is_any & is_forming, null, rank.forming_slot),
        tail=jnp.where(is_decoding, previous, rank.tail))
    if params.batching.async_scheduling:
        rank = replace(rank, visible=rank.visible + one)
    batch = replace(batch, count=batch.count - gone, offsets=batch.offsets - gone * offset)
    if params.batching.is_unified:
        batch = replace(batch, budget=batch.budget + gone)
    return Counts(counts.executor, rank, batch), residue_row, emitted


class Slots(eqx.Module):
    """All slots of an executor, for policies that look at every running sequence: O(slots), and only there."""

    keys: Int[Array, " slot_width"]
    entries: Int[Array, "slot_width entry_fields"]
    retired: Int[Array, ""]

    @property
    def is_decoding(self) -> Bool[Array, " slot_width"]:
        """Slots of sequences past their prompt."""
        return (self.keys != packed.EMPTY) & (jnp.arange(self.keys.shape[0]) != self.retired)

    def emitted(self, counts: Counts) -> Int[Array, " slot_width"]:
        """Output tokens of each; one less for those placed in this very pass."""
        tokens = self.entries[:, w.OFFSET] + counts.batch.counter + 1 - self.entries[:, w.PROMPT]
        is_new = self.entries[:, w.STAMP] == counts.batch.num_iterations
        return tokens - is_new

    def expected_tokens(self, dims: Dims, rules: Batching, counts: Counts) -> Int[Array, ""]:
        """Output tokens the running sequences may yet ask for, each clipped, summed."""
        is_forming = jnp.arange(dims.slot_width) == counts.rank.forming_slot
        is_forming = is_forming & (counts.rank.forming_slot != dims.null_slot)
        known_forming = counts.rank.forming_known - self.entries[:, w.PROMPT]
        emitted = jnp.where(is_forming, known_forming, self.emitted(counts))
        left = jnp.minimum(self.entries[:, w.RESERVED] - emitted, rules.reserve_clip_tokens)
        return jnp.sum(jnp.where(self.is_decoding | is_forming, left, 0))

    def fewest_outputs(self, dims: Dims, counts: Counts) -> Int[Array, ""]:
        """Slot of the sequence with the fewest output tokens; then the longest prompt; then the latest."""
        choice = self.is_decoding
        for value in (self.emitted(counts), -self.entries[:, w.PROMPT], -self.entries[:, w.REQUEST]):
            value = jnp.where(choice, value, packed.EMPTY)
            choice = choice & (value == jnp.min(value))
        return jnp.where(jnp.any(choice), jnp.argmax(choice), dims.null_slot).astype(jnp.int32)


def is_retracting(dims: Dims, rules: Batching, counts: Counts) -> Bool[Array, ""]:
    """Whether a retraction under way goes on: until every sequence left has room for some tokens more."""
    free_tokens = (rules.num_blocks - counts.rank.used_blocks) << dims.block_bits
    is_tight = free_tokens < rules.retract_free_tokens * counts.batch.count
    return has(counts, w.PREEMPTED) & (counts.batch.count > 1) & is_tight


def next_ratio(rules: Batching, counts: Counts, slots: Slots, ratio: Float[Array, ""]) -> Float[Array, ""]:
    """The reserve ratio after a decode pass: a step down, or what the running need after a retraction."""
    running = slots.is_decoding
    emitted = jnp.sum(jnp.where(running, slots.emitted(counts), 0))
    limit = jnp.sum(jnp.where(running, slots.entries[:, w.RESERVED], 0))
    needed = (emitted + rules.retract_free_tokens * counts.batch.count) / jnp.maximum(limit, 1)
    down = jnp.maximum(ratio - rules.ratio_decay, rules.ratio_floor)
    return jnp.where(has(counts, w.PREEMPTED), jnp.minimum(needed, 1.0), down)


def stall(counts: Counts, slots: Slots, is_stalled: Bool[Array, " slot_width"], bits: int):
    """Let some sequences sit out the next iteration: they stand one token lower on the common clock.

    Returns counts, and the executor's keys and entries.
    """
    batch = counts.batch
    stalled = jnp.sum(is_stalled)
    entries = slots.entries.at[:, w.OFFSET].add(-is_stalled.astype(jnp.int32))
    keys = slots.keys + (is_stalled.astype(jnp.int32) << bits)
    batch = replace(batch, offsets=batch.offsets - stalled, stalled=stalled,
                    stalled_offsets=jnp.sum(jnp.where(is_stalled, entries[:, w.OFFSET], 0)))
    return replace(counts, batch=batch), keys, entries


def walk(dims: Dims, params: Params, wants_decode, may_preempt, counts: Counts, slots: Slots, residue_row):
    """vLLM V1's loop over running sequences under PRIORITY, one look a step, and only when blocks run short.

    In the order of admission every sequence takes its block; where none is left the running sequence with the
    largest (priority, arrival) is preempted and the same one tried again; if that is the very one, the loop ends
    and those behind it sit out this iteration. The forming prompt comes last, with the chunk it had when it was
    first tried.

    Returns counts, residues, whether the pass must go on with another step, whether it preempts in this one and
    whom, blocks the decodes take, the executor's keys and entries, whether the loop ended early, and
    whether nobody goes ahead then.
    """
    rank, batch = counts.rank, counts.batch
    null = jnp.int32(dims.null_slot)
    free = params.batching.num_blocks - rank.used_blocks
    is_decoding = slots.is_decoding
    stamp = slots.entries[:, w.STAMP]
    crosses = is_decoding & (((slots.entries[:, w.OFFSET] + batch.counter) & (dims.block_size - 1)) == 0)
    crossing = jnp.sum(crosses)
    is_forming = rank.forming_slot != null
    is_over = wants_decode & has(counts, w.ENDED)
    # The forming prompt is reached once all others fit; from then on its chunk stays.
    reaches_forming = wants_decode & is_forming & (crossing <= free) & ~has(counts, w.CHUNKED) & ~is_over
    chunk = jnp.minimum(rank.forming_known - rank.forming_computed, batch.budget)
    chunk = jnp.where(has(counts, w.CHUNKED), rank.forming_chunk, chunk)
    rank = replace(rank, forming_chunk=jnp.where(reaches_forming, chunk, rank.forming_chunk))
    grown = blocks_for(rank.forming_computed + chunk, dims) - blocks_for(rank.forming_computed, dims)
    grown = jnp.where(is_forming, grown, 0)
    is_short_of_decodes = crossing > free
    is_short = wants_decode & ~is_over & (is_short_of_decodes | (crossing + grown > free))
    # Who lacks a block: the next crossing sequence behind the cursor, once those before it used up the free ones.
    before = jnp.sum(crosses & (stamp <= rank.cursor))
    following = jnp.min(jnp.where(crosses & (stamp > rank.cursor), stamp, packed.EMPTY))
    is_advancing = is_short & is_short_of_decodes & (before < free)
    forming_stamp = stamp[rank.forming_slot]
    lacking = jnp.where(is_short_of_decodes, following, forming_stamp)
    is_candidate = is_decoding | ((jnp.arange(dims.slot_width) == rank.forming_slot) & is_forming)
    victim = jnp.argmax(jnp.where(is_candidate, slots.entries[:, w.PROMPT], -1)).astype(jnp.int32)
    is_preempting = is_short & ~is_advancing & may_preempt
    ends = is_preempting & (stamp[victim] == lacking)
    cursor = jnp.where(is_advancing, following, jnp.where(ends, lacking, rank.cursor))
    counts = replace(counts, rank=replace(rank, cursor=cursor))
    counts = mark(mark(counts, reaches_forming, w.CHUNKED), ends, w.ENDED)
    # After an early end, those before the cursor go ahead.
    goes = is_decoding & (stamp < rank.cursor)
    is_stalling = is_over & jnp.any(goes)
    stalled, keys, entries = stall(counts, slots, is_stalling & is_decoding & ~goes, dims.slot_bits)
    residue = entries[:, w.OFFSET] & (dims.block_size - 1)
    recounted = jnp.sum((residue[:, None] == jnp.arange(dims.block_size)) & is_decoding[:, None], axis=0)
    residue_row = jnp.where(is_stalling, recounted.astype(jnp.int32), residue_row)
    crossing = jnp.where(is_over, jnp.sum(crosses & goes), crossing)
    return (choose(is_stalling, stalled, counts), residue_row, is_short, is_preempting, victim, crossing, keys,
            entries, is_over, is_over & ~jnp.any(goes))


def limit_context(dims: Dims, rules: Batching, is_any: Bool[Array, ""], counts: Counts, slots: Slots):
    """Decodes as a queue: from its front while their context fits the limit; then those go to the back.

    Returns counts, and the executor's keys and entries.

    Source: the public DistServe simulator (simdistserve), decode batches of at most 50,000 tokens.
    """
    is_decoding = slots.is_decoding
    context = slots.entries[:, w.OFFSET] + counts.batch.counter + 1
    stamp = jnp.where(is_decoding, slots.entries[:, w.STAMP], packed.EMPTY)
    order = jnp.argsort(stamp)
    total = jnp.cumsum(jnp.where(is_decoding, context, 0)[order])
    fits = jnp.zeros_like(is_decoding).at[order].set(total <= rules.decode_context_limit) & is_decoding
    is_over = is_any & jnp.any(is_decoding & ~fits)
    counts_now, keys, entries = stall(counts, slots, is_over & is_decoding & ~fits, dims.slot_bits)
    # Keep their order, behind everybody else.
    first = jnp.min(jnp.where(fits, stamp, packed.EMPTY))
    last = jnp.max(jnp.where(fits, stamp, 0))
    moved = jnp.where(is_over & fits, stamp - first + counts.rank.next_stamp + 1, entries[:, w.STAMP])
    entries = entries.at[:, w.STAMP].set(moved)
    rank = replace(counts.rank, next_stamp=counts.rank.next_stamp + jnp.where(is_over, last - first + 1, 0))
    return choose(is_over, replace(counts_now, rank=rank), counts), keys, entries


# --- The step ----------------------------------------------------------------------------------------------------


def step(dims: Dims, is_true, params: Params, requests: Requests, world: World) -> tuple[World, Writes]:
    """Advance one scenario by one step; a scenario with nothing left to do steps to itself.

    Returns the world with its scalars advanced, and the writes to its arrays.
    """
    rules = params.batching
    fence = Fence(is_true)
    null = jnp.int32(dims.null_slot)
    scratch = dims.num_requests
    event, is_frozen = next_event(dims, params, requests, world)
    now, e = event.now, event.executor
    count_template, clock_template = w.row_templates(dims)
    counts = packed.from_row(count_template, take(world.counts, e))
    times = packed.from_row(clock_template, take(world.clocks, e))
    residue_row = take(world.residues, e)
    phase, wake = take(world.phase, e), Time(take(world.wake_hi, e), take(world.wake_lo, e))
    event, counts, times, residue_row, phase, wake, is_frozen = fence(
        event, counts, times, residue_row, phase, wake, is_frozen)
    now, e = event.now, event.executor

    # An iteration ends.
    counts, times, itl_s, itl_weights = settle(dims, params, event, counts, times, residue_row)
    keys, entries = take(world.slot_keys, e), take(world.slot_entries, e)
    counts, residue_row, retired, has_more, next_key = retire(
        dims, params, event, counts, keys, entries, residue_row)
    slots = Slots(keys, entries, retired.slot)
    tail = counts.rank.tail
    if rules.keeps_running_list:
        before = take(world.slot_previous, e, retired.slot)
        after = take(world.slot_next, e, retired.slot)
        is_tail = retired.is_any & (retired.slot == tail)
        tail = jnp.where(is_tail, before, tail)
        counts = replace(counts, rank=replace(counts.rank, tail=tail))

    counts, times, itl_s, itl_weights, residue_row, retired, has_more, next_key, tail = fence(
        counts, times, itl_s, itl_weights, residue_row, retired, has_more, next_key, tail)

    # A request arrives.
    arriving = world.next_arrival
    is_queued_behind = event.is_arrival & (counts.rank.waiting > 0)
    link_from, link_to = jnp.where(is_queued_behind, counts.rank.back, scratch), arriving
    is_first_in_line = counts.rank.waiting == 0
    if rules.order == "priority":
        def read(position):
            return take(world.waiting_set, e, position)

        arriving_rank = take(requests.table, arriving)[RANK]
        best = bitmap.smallest(read, dims.num_requests)
        is_first_in_line = is_first_in_line | (arriving_rank < best)
        best = jnp.where(event.is_arrival & is_first_in_line, arriving_rank, best)
    is_cut = (event.is_arrival & (phase == w.ENDING) & (counts.executor.extra > 0) & is_first_in_line
              & (counts.rank.running < rules.max_num_seqs))
    counts = enqueue(params, event, counts, arriving)
    if rules.admit != "when_empty":
        cut, cut_end = cut_jump(params, event, counts, times)
        counts = choose(is_cut, cut, counts)
        wake = clock.select(is_cut, cut_end, wake)
    if rules.async_scheduling:
        is_seen = event.is_arrival & is_before_last(event, counts, times)
        counts = replace(counts, rank=replace(counts.rank, visible=counts.rank.visible + is_seen))

    # A scheduling pass, unless something at this instant comes before it.
    has_ended = event.is_ending & ~has_more
    has_work = (counts.rank.running > 0) | (counts.rank.waiting > 0)
    is_due = (has_ended & has_work) | (event.is_arrival & (phase == w.IDLE))
    is_passing = event.is_passing | (is_due & ~event.is_tied)
    counts = begin_pass(params, is_passing, counts)
    is_forming = counts.rank.forming_slot != null
    tail_request, tail_offset = take(world.slot_entries, e, tail)[:2]
    was_closed = has(counts, w.CLOSED)
    victim_slot = jnp.where(is_forming, counts.rank.forming_slot, tail)
    victim_request = jnp.where(is_forming, counts.rank.forming_request, tail_request)
    victim_offset = tail_offset
    if rules.victim == "fewest_outputs":
        victim_slot = slots.fewest_outputs(dims, counts)
        victim_request, victim_offset = take(world.slot_entries, e, victim_slot)[:2]
    candidate = counts.rank.head
    if rules.order == "priority":
        candidate = take(requests.by_rank, jnp.where(counts.rank.waiting > 0, best, 0))
    if rules.chunked_prefill:
        is_due_chunk = is_forming & ~has(counts, w.FORMED)
        candidate = jnp.where(is_due_chunk, counts.rank.forming_request, candidate)

    is_short = jnp.bool_(False)
    wants_decode = is_passing & ~has(counts, w.DECODED)
    keys_now, entries_now = keys, entries
    if rules.order == "priority" and rules.grows:
        (counts, residue_row, is_short, is_preempting, victim_slot, crossing, keys_now, entries_now,
         is_over, is_empty) = walk(dims, params, wants_decode, ~retired.is_any, counts, slots, residue_row)
        victim_request, victim_offset = take(world.slot_entries, e, victim_slot)[:2]
        counts = take_blocks(counts, wants_decode & ~is_short, crossing)
        counts = mark(counts, is_over, w.FORMED)
    elif rules.grows and rules.is_unified:
        crossing, need = decode_need(dims, params, counts, residue_row, tail_offset)
        is_short = wants_decode & (need > rules.num_blocks - counts.rank.used_blocks)
        is_preempting = is_short & ~retired.is_any
        counts = take_blocks(counts, wants_decode & ~is_short, crossing)
    elif rules.grows:
        is_preempting = is_passing & was_closed
    is_placing = is_passing & ~is_short
    if rules.grows:
        candidate = jnp.where(is_preempting, victim_request, candidate)
        if not rules.is_unified:
            is_placing = is_placing & ~was_closed
    candidate = jnp.where(is_passing, candidate, scratch)
    lengths = take(requests.table, candidate)
    emitted, preemptions = take(world.progress, candidate) if rules.grows else (jnp.int32(0), jnp.int32(0))
    next_head = take(world.next_waiting, candidate)

    (counts, wake, is_passing, is_placing, is_short, candidate, lengths, emitted, preemptions, next_head, is_due,
     has_ended, has_work, is_forming, link_from, link_to) = fence(
        counts, wake, is_passing, is_placing, is_short, candidate, lengths, emitted, preemptions,
                  next_head, is_due, has_ended, has_work, is_forming, link_from, link_to)
    free = jnp.maximum(dims.num_slots - counts.rank.running - 1, 0)
    free_slot = jnp.where(retired.is_any, retired.slot, take(world.free_slots, e, free))
    counts, times, residue_row, placed, is_held, can_go_on = place(
        dims, params, is_placing, counts, times, residue_row, lengths, emitted, candidate, free_slot, slots)
    # The first prompt to produce its first token in this iteration opens a row of the log.
    opens_log = placed.is_first_token & (counts.batch.joining_first == 1)
    log_row = jnp.where(opens_log, world.num_logged, counts.executor.log_row)
    counts = replace(counts, executor=replace(counts.executor, log_row=log_row))
    # The queue may have had one entry, the request that arrived in this very step.
    counts = replace(counts, rank=replace(
        counts.rank, head=jnp.where(placed.is_admitted, next_head, counts.rank.head)))
    if rules.keeps_running_list:
        counts = replace(counts, rank=replace(
            counts.rank, tail=jnp.where(placed.is_completing, placed.slot, counts.rank.tail)))

    if not rules.is_unified:
        wants_decode = is_passing & ~can_go_on & ~has(counts, w.FILLED)
        if rules.grows:
            crossing, need = decode_need(dims, params, counts, residue_row, tail_offset)
            is_short = wants_decode & (need > rules.num_blocks - counts.rank.used_blocks)
            if rules.reserve == "expected":
                is_short = is_short | (wants_decode & is_retracting(dims, rules, counts))
            counts = mark(counts, is_short, w.CLOSED)
            is_preempting = is_short & was_closed & ~retired.is_any
            counts = take_blocks(counts, wants_decode & ~is_short, crossing)
        if rules.reserve == "expected":
            times = replace(times, ratio=jnp.where(
                wants_decode & ~is_short, next_ratio(rules, counts, slots, times.ratio), times.ratio))
        if rules.has_context_limit:
            counts, keys_now, entries_now = limit_context(
                dims, rules, wants_decode, counts, slots)

    if rules.grows:
        victim_slot = jnp.where(is_preempting, victim_slot, null)
        counts = mark(counts, is_preempting, w.PREEMPTED)
        if rules.waiting_blocked_after_preempt:
            counts = mark(counts, is_preempting, w.CLOSED)
        link_from = jnp.where(is_preempting, victim_request, link_from)
        link_to = jnp.where(is_preempting, counts.rank.head, link_to)
        before_tail = take(world.slot_previous, e, tail) if rules.keeps_running_list else null
        counts, residue_row, victim_emitted = preempt(
            dims, params, is_preempting, counts, residue_row, victim_slot, victim_request, victim_offset,
            before_tail, lengths[PROMPT])

    counts, times, residue_row, placed, is_held, can_go_on, is_short, log_row = fence(
        counts, times, residue_row, placed, is_held, can_go_on, is_short, log_row)

    # Start what was formed.
    is_formed = is_passing & ~is_short & ~can_go_on
    has_batch = (counts.batch.count > counts.batch.stalled) | has(counts, w.FILLED)
    if rules.order == "priority":
        has_batch = has_batch & ~is_empty
    is_starting = is_formed & has_batch
    is_idle_pass = is_formed & ~has_batch
    own_key = jnp.where(placed.is_completing, placed.key, packed.EMPTY)
    counts, times, plan = start(dims, params, is_starting, event, counts, times, residue_row,
                                jnp.minimum(next_key, own_key), is_held)
    # A pass that preempted all it had begins again; one that can place nothing never will.
    is_stuck = is_idle_pass & ~has(counts, w.PREEMPTED)
    counts = replace(counts, executor=replace(
        counts.executor, progress=jnp.where(is_idle_pass, 0, counts.executor.progress)))

    # What wakes this executor next.
    is_waiting_pass = (is_passing & ~is_starting) | (is_due & event.is_tied)
    is_resting = has_ended & ~has_work
    wake = clock.select(is_starting, plan.end, clock.select(has_more | is_waiting_pass, now, wake))
    wake = clock.select(is_resting, clock.never(), wake)
    phase = jnp.where(is_starting, w.ENDING, jnp.where(is_waiting_pass, w.PASSING, phase))
    phase = jnp.where(is_resting, w.IDLE, phase)

    counts, times, plan, wake, phase = fence(
        counts, times, plan, wake, phase)

    # What to write back.
    epoch = world.epoch.astype(jnp.float32)
    stamp = jnp.stack([epoch, now.hi, now.lo])
    is_active = event.is_arrival | event.is_ending | event.is_passing
    logs = is_starting & (counts.batch.joining_first > 0)
    is_reserved = retired.is_any & (retired.slot != placed.slot)
    leaving = jnp.where(is_reserved, retired.slot, null)
    entering = placed.slot
    is_new = placed.is_admitted & (preemptions == 0)
    is_unplaced = (placed.is_admitted | placed.is_completing) & (emitted == 0)
    is_returned = retired.is_any & ~placed.is_admitted
    returned = retired.slot
    writes = {}
    if rules.grows:
        entering = jnp.where(is_preempting, victim_slot, entering)
        is_returned = is_returned | is_preempting
        returned = jnp.where(is_preempting, victim_slot, returned)
        is_returning = placed.is_admitted & (preemptions > 0)
        writes["progress"] = Put((jnp.where(is_preempting, victim_request, scratch),),
                                 jnp.stack([victim_emitted, preemptions + 1]))
        writes["stalled"] = Add((jnp.where(is_preempting | is_returning, candidate, scratch),),
                                jnp.where(is_returning, stamp, jnp.where(is_preempting, -stamp, 0.0)))
        writes["residues"] = Put((e,), residue_row)
    if rules.keeps_running_list:
        is_inner = retired.is_any & ~is_tail
        after = jnp.where(is_inner, after, null)
        linked = jnp.where(placed.is_completing, placed.slot, null)
        writes["slot_previous"] = Pair((e, after, linked), (before, tail))
        writes["slot_next"] = Pair((e, jnp.where(is_inner, before, null),
                                    jnp.where(placed.is_completing, tail, null)), (after, linked))
    stack_top = jnp.where(is_returned, dims.num_slots - counts.rank.running - 1, dims.slot_width - 1)
    if dims.num_records:
        writes |= record(dims, world, plan, e, stamp, counts)
    writes |= {
        "wake_hi": Put((e,), wake.hi), "wake_lo": Put((e,), wake.lo), "phase": Put((e,), phase),
        "outstanding": Add((e,), event.is_arrival.astype(jnp.int32) - retired.is_any),
        "counts": Put((e,), packed.to_row(counts)), "clocks": Put((e,), packed.to_row(times)),
        "slot_keys": Pair((e, leaving, entering), (jnp.int32(packed.EMPTY), own_key)),
        "slot_entries": Put((e, placed.slot), placed.entry),
        "free_slots": Put((e, stack_top), returned),
        "next_waiting": Put((link_from,), link_to),
        "placed": Put((jnp.where(is_unplaced, candidate, scratch),),
                      jnp.stack([jnp.where(placed.is_first_token, log_row, -1), e])),
        "scheduled": Put((jnp.where(is_new, candidate, scratch),), stamp),
        "finished": Put((jnp.where(retired.is_any, retired.request, scratch),), stamp),
        "first_tokens": Put((jnp.where(logs, log_row, scratch),),
                            jnp.stack([epoch, plan.first_end.hi, plan.first_end.lo])),
        "itl": Add((itl_bin(itl_s),), itl_weights),
    }
    if rules.order == "priority":
        is_entering_set = is_preempting | (event.is_arrival & ~placed.is_admitted)
        is_leaving_set = placed.is_admitted & ~event.is_arrival
        member = jnp.where(event.is_arrival, arriving_rank, lengths[RANK])
        positions, words = bitmap.change(read, dims.num_requests, member, is_entering_set,
                                         is_entering_set | is_leaving_set)
        writes["waiting_set"] = Put((e, positions), words)
    if rules.stalls:
        index = jnp.arange(dims.slot_width)
        is_leaving, is_entering = index == leaving, index == entering
        keys_now = jnp.where(is_leaving, packed.EMPTY, jnp.where(is_entering, own_key, keys_now))
        writes["slot_keys"] = Put((e,), keys_now.at[null].set(packed.EMPTY))
        writes["slot_entries"] = Put((e,), jnp.where(is_entering[:, None], placed.entry, entries_now))
    progress = dict(
        steps=world.steps + is_active,
        next_arrival=world.next_arrival + event.is_arrival,
        num_finished=world.num_finished + retired.is_any,
        num_logged=world.num_logged + opens_log,
        fault=world.fault | jnp.where(is_stuck, w.STUCK, 0)
        | jnp.where(is_active & (world.steps >= params.max_steps), w.STEP_LIMIT, 0),
        is_frozen=is_frozen.astype(jnp.int32))
    if dims.num_records:
        progress["num_recorded"] = world.num_recorded + plan.is_any
    return replace(world, **progress), writes


def take_blocks(counts: Counts, condition: Bool[Array, ""], blocks: Int[Array, ""]) -> Counts:
    """The decodes of this pass take their blocks."""
    used = counts.rank.used_blocks + jnp.where(condition, blocks, 0)
    rank = replace(counts.rank, used_blocks=used, peak_blocks=jnp.maximum(counts.rank.peak_blocks, used))
    return mark(replace(counts, rank=rank), condition, w.DECODED)


def itl_bin(seconds: Float[Array, " samples"]) -> Int[Array, " samples"]:
    """Histogram bin of a duration: exponent and the top six bits of its mantissa."""
    bits = lax.bitcast_convert_type(lax.stop_gradient(seconds), jnp.int32)
    return jnp.clip((bits >> 17) - ((127 - 20) << 6), 0, NUM_ITL_BINS - 1)


def record(dims: Dims, world: World, plan: Plan, executor, stamp, counts: Counts) -> Writes:
    """Append the iteration that starts to the tape; past its end, to the scratch row."""
    index = jnp.where(plan.is_any, jnp.minimum(world.num_recorded, dims.num_records), dims.num_records)
    seconds = clock.elapsed(Time(stamp[1], stamp[2]), plan.end)
    rank, batch = counts.rank, counts.batch
    row = jnp.stack([executor, rank.running, rank.waiting, rank.used_blocks, counts.executor.extra + 1,
                     batch.chunk_tokens, plan.stats.num_decode])
    return {"tape_times": Put((index,), jnp.append(stamp, seconds)), "tape_counts": Put((index,), row)}
