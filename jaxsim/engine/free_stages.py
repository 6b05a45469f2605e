"""Pipeline stages that take a new batch whenever the first is free, however many are in flight.

A prefill engine then has prompts in every stage, and a decode engine disjoint batches, which are made anew from whoever
is in the queue: batches that return while another waits to be formed become one with it. So a batch is not a thing that
lasts, and a sequence itself knows when the iteration ends that it is in (`World.slot_ends`). Its token counts at
the launch; until the end it is in no queue and cannot leave. Every iteration is a step.

When a pass is due: as soon as somebody is in the queue and the first stage is free. An engine of one stage beside
others is one whose further stages take no time.

Source: the public simulator of DistServe (simdistserve). Approximated: there, decode batches that wait before a later
stage become one; here they stay apart, as its prompts do. Of the time between tokens (the histogram), the first of a
batch stands for all of it; busy time and the sequences at work are counted when an iteration is launched.
"""

from dataclasses import replace
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxsim.cost.base import BatchStats
from jaxsim.engine.common import Context, Group, choose, take, without_chunks
from jaxsim.engine.events import Event
from jaxsim.engine.slots import Slots
from jaxsim.kernels import clock, packed
from jaxsim.kernels.clock import Time
from jaxsim.spec.dims import Dims
from jaxsim.state import world as w
from jaxsim.state.world import Clocks, Counts


def stage_parts(dims: Dims, group: Group, stats: BatchStats) -> Float[Array, " stages+1"]:
    """Seconds of an iteration in the engine, which are none, and in each stage: equal ones, but for the head's."""
    head, stage = group.cost.head_seconds(stats), jnp.arange(dims.num_stages + 1)
    each = (group.cost.iteration(stats) - head) / group.batching.num_stages
    is_used = (stage > 0) & (stage <= group.batching.num_stages)
    return jnp.where(is_used, each, 0.0) + jnp.where(stage == 1, head, 0.0)


def ends_of(context: Context, rank: Int[Array, ""]) -> Time:
    """When the iteration of each slot ends."""
    ends = take(context.world.slot_ends, rank)
    return Time(ends[:, 0], ends[:, 1])


def are_away(ends: Time, now: Time) -> Bool[Array, " slot_width"]:
    """Whose iteration is under way."""
    return (ends.hi > now.hi) | ((ends.hi == now.hi) & (ends.lo > now.lo))


def keys_here(context: Context, event: Event, rank: Int[Array, ""], keys: Int[Array, " slot_width"]
              ) -> Int[Array, " slot_width"]:
    """Completion keys of those whose iteration is not under way."""
    return jnp.where(are_away(ends_of(context, rank), event.now), packed.EMPTY, keys)


def returning(context: Context, event: Event, rank: Int[Array, ""], slots: Slots, has_ended: Bool[Array, ""]
              ) -> Bool[Array, " slot_width"]:
    """Who comes back to the queue now."""
    ends = ends_of(context, rank)
    return has_ended & slots.is_decoding & (ends.hi == event.now.hi) & (ends.lo == event.now.lo)


def fresh(condition: Bool[Array, ""], counts: Counts, times: Clocks) -> tuple[Counts, Clocks]:
    """Without what the batch before was made of, where a pass begins."""
    batch = counts.batch
    names = ("joining", "joining_offsets", "joining_first", "resuming", "stalled", "stalled_offsets", "num_chunks",
             "chunk_tokens", "chunk_context", "entering", "longest_chunk")
    zeroed = {name: jnp.where(condition, 0, getattr(batch, name)) for name in names
              if getattr(batch, name) is not None}
    own = choose(condition, without_chunks(times.batch), times.batch)
    own = replace(own, resume_s=jnp.where(condition, 0.0, own.resume_s))
    return replace(counts, batch=replace(batch, **zeroed)), replace(times, batch=own)


class Launched(NamedTuple):
    """What wakes the executor next; counts and clocks; when the iteration of each slot ends; a sample of the time
    between tokens, and for how many it stands."""

    wake: Time
    phase: Int[Array, ""]
    counts: Counts
    times: Clocks
    ends: Float[Array, "slot_width 2"]
    itl_s: Float[Array, " 1"]
    itl_weights: Int[Array, " 1"]


def launch(context: Context, event: Event, rank: Int[Array, ""], counts: Counts, times: Clocks, slots: Slots, *,
           wake: Time, phase: Int[Array, ""], end: Time, is_starting: Bool[Array, ""], is_prompts: Bool[Array, ""],
           are_going: Bool[Array, " slot_width"], placed: Int[Array, ""], is_ready: Bool[Array, ""],
           is_waiting_pass: Bool[Array, ""], has_more: Bool[Array, ""]) -> Launched:
    """After a step: whose iteration ends when, what counts from now on, and what comes next.

    end: of what starts. is_prompts: it is of prompts, else of the decodes `are_going`. placed: the slot taken in this
    step, the null slot if none; is_ready: by who comes with its KV. has_more: others leave at this instant.
    """
    dims, now, batch = context.dims, event.now, counts.batch
    ends = ends_of(context, rank)
    is_placed = jnp.arange(dims.slot_width) == jnp.where(placed == dims.null_slot, -1, placed)
    # Prompts of a pass under way have no end yet.
    ends = clock.select(is_placed, Time(jnp.where(is_ready, now.hi, jnp.inf), jnp.where(is_ready, now.lo, 0.0)), ends)
    leaves = is_starting & jnp.where(is_prompts, jnp.isinf(ends.hi), are_going)

    # The front of a batch of decodes tells how long a token took.
    stamps = slots.entries[:, w.STAMP]
    first = jnp.argmin(jnp.where(are_going, stamps, packed.EMPTY))
    before = Time(ends.hi[first], ends.lo[first])
    is_decoding = is_starting & ~is_prompts
    itl_s = jnp.where(is_decoding, clock.elapsed(before, end), 0.0)
    ends = clock.select(leaves, end, ends)

    # Ends are in the order of launches: what is in flight before ends at `counted`.
    counted = times.executor.counted
    spent_s = jnp.where(is_starting, clock.elapsed(clock.select(counted < now, now, counted), end), 0.0)
    executor = replace(times.executor, busy=clock.add(times.executor.busy, spent_s),
                       counted=clock.select(is_starting, end, counted))
    running = clock.add(times.rank.running, spent_s * counts.rank.running)
    times = replace(times, executor=executor, rank=replace(times.rank, running=running))
    joined = jnp.where(is_starting, batch.joining, 0)
    num_decode = batch.count - batch.stalled
    counter = batch.counter + is_decoding
    batch = replace(batch, counter=counter, count=batch.count + joined, extra=jnp.int32(0),
                    offsets=batch.offsets + jnp.where(is_starting, batch.joining_offsets, 0))
    num_iterations = counts.executor.num_iterations + is_starting
    counts = Counts(replace(counts.executor, num_iterations=num_iterations), counts.rank, batch)

    is_in = slots.is_decoding | is_placed
    is_away = is_in & are_away(ends, now)
    hi = jnp.min(jnp.where(is_away, ends.hi, jnp.inf))
    lo = jnp.min(jnp.where(is_away & (ends.hi == hi), ends.lo, jnp.inf))
    first_end = Time(hi, jnp.where(jnp.isinf(hi), 0.0, lo))
    is_queued = jnp.any(is_in & ~is_away) | (counts.rank.waiting > 0) | (counts.rank.ready.length > 0)
    free = times.executor.free[1]
    next_pass = clock.select(is_queued, clock.select(free < now, now, free), clock.never())
    is_end_next = first_end <= next_pass
    coming = clock.select(is_end_next, first_end, next_pass)
    own_phase = jnp.where(is_end_next, jnp.where(jnp.isinf(hi), w.IDLE, w.ENDING), w.PASSING)
    coming = clock.select(has_more | is_waiting_pass, now, coming)
    own_phase = jnp.where(has_more, w.ENDING, jnp.where(is_waiting_pass, w.PASSING, own_phase))
    is_active = event.is_arrival | event.is_ending | event.is_passing | event.is_door
    return Launched(
        clock.select(is_active, coming, wake), jnp.where(is_active, own_phase, phase), counts, times,
        jnp.stack(ends, axis=-1), itl_s[None], jnp.where(is_decoding, num_decode, 0)[None])
