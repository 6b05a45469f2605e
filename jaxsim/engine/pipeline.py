"""Pipeline stages: several batches of a rank in flight, one behind the other.

An engine core forms batches, and each goes through the stages in turn; every one of these works on one batch at a time,
first come first served. A sequence stays with the batch in which its prompt ended: when this returns, all of it is
scheduled again at once. So a batch lives on the lazy token clock like that of a plain replica. Passes in between form
further batches, of prompts; the next chunk of a prompt may follow in the batch behind, which comes to each stage after
the one before. With a single batch in flight, undisturbed iterations are one jump as ever; with more, each is a step.

When a pass is due: at an arrival, if nothing is in flight or, with `pass_on_arrival`, if any batch is not; and when a
batch returns. Passes go on at that instant, each for a batch that is not in flight, until one schedules nothing. Then
vLLM V1 blocks on its oldest batch, so who arrives meanwhile is seen when that returns.

Source: vllm-project/vllm, `vllm/v1/engine/core.py` (`step_with_batch_queue`) and `v1/core/sched/scheduler.py`;
microsoft/vidur, `base_replica_scheduler` and `replica_stage_schduler` (`pass_on_arrival`). Approximated: nobody in
flight is preempted, where vLLM V1 takes the last admitted even then; so a prompt in flight, the last of all, at least
goes without its next chunk where blocks run short.
"""

from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxsim.cost.base import BatchStats
from jaxsim.engine.common import Group
from jaxsim.engine.events import Event
from jaxsim.kernels import clock
from jaxsim.kernels.clock import Time
from jaxsim.spec.dims import Dims
from jaxsim.state import world as w
from jaxsim.state.world import Clocks, Counts, ExecutorTimes, Rank


class Flights(NamedTuple):
    """Batches in flight: when each returns (`clock.never()` for those that are not), the first to, and when.

    A batch that returns is in flight until all that are done have left it.
    """

    ends: Time
    oldest: Int[Array, ""]
    first_end: Time

    @property
    def are_in(self) -> Bool[Array, " batches"]:
        """Which are in flight."""
        return ~jnp.isinf(self.ends.hi)

    @property
    def free(self) -> tuple[Bool[Array, ""], Int[Array, ""]]:
        """Whether there is a batch that is not, and the first of these."""
        return ~jnp.all(self.are_in), jnp.argmin(self.are_in).astype(jnp.int32)

    def without(self, batch: Int[Array, ""]) -> Bool[Array, ""]:
        """Whether any other is in flight."""
        return jnp.any(self.are_in & (jnp.arange(len(self.are_in)) != batch))

    def is_away(self, batch: Int[Array, ""], own: Int[Array, ""]) -> Bool[Array, ""]:
        """Whether `batch` is in flight, and not `own`, of which the pass is."""
        return jnp.any(self.are_in & (jnp.arange(len(self.are_in)) == batch)) & (batch != own)


def flights(dims: Dims, clock_row: Float[Array, " clock_fields"]) -> Flights:
    """Of the executor whose row this is."""
    return _flights(jax.tree.map(lambda x: x[0], w.clock_rows(dims).everything(clock_row).batch.end))


def _flights(ends: Time) -> Flights:
    hi = jnp.min(ends.hi)
    lo = jnp.min(jnp.where(ends.hi == hi, ends.lo, jnp.inf))
    oldest = jnp.argmax((ends.hi == hi) & (ends.lo == lo)).astype(jnp.int32)
    return Flights(ends, oldest, Time(hi, lo))


def batch_of(event: Event, flying: Flights, turn: Int[Array, ""]) -> Int[Array, ""]:
    """What an event is about: the pass under way, or the batch that returns first; for an arrival at an executor with
    nothing in flight, the first."""
    return jnp.where(event.is_passing, turn, flying.oldest)


def enter(dims: Dims, group: Group, now: Time, stats: BatchStats, seconds: Float[Array, ""], times: ExecutorTimes,
          parts: Float[Array, " stages+1"] | None = None) -> tuple[Time, tuple[Time, ...]]:
    """Send an iteration of so many `seconds` in all through the engine and the stages; parts: unless the cost says.

    Returns how long it takes, waiting included, and when each is free again.
    """
    parts = group.cost.stage_seconds(stats, dims.num_stages) if parts is None else parts
    lost = group.cost.iteration_remainder(stats, seconds) / jnp.maximum(jnp.sum(parts), 1e-30)
    at, free = now, []
    for stage, is_free in enumerate(times.free):
        part = clock.on_grid(parts[stage])
        at = clock.select(at < is_free, is_free, at)
        at = clock.add(at, Time(part, clock.on_grid(lost * parts[stage] + (parts[stage] - part))))
        free.append(at)
    return clock.add(at, Time(-now.hi, -now.lo)), tuple(free)


def stages_of_last(dims: Dims, group: Group, last: BatchStats, end: Time, times: ExecutorTimes) -> ExecutorTimes:
    """The stages at work on the `last` iteration of a jump, that of the only batch in flight, which ends at `end`."""
    parts = group.cost.stage_seconds(last, dims.num_stages)
    free = [end]
    for stage in range(dims.num_stages, 0, -1):
        free.append(clock.add(free[-1], -clock.on_grid(parts[stage])))
    return replace(times, free=tuple(free[::-1]))


def since_counted(now: Time, start: Time, times: ExecutorTimes) -> Float[Array, ""]:
    """Seconds with anything in flight that the return of a batch, on its way since `start`, adds to those counted."""
    return clock.elapsed(clock.select(times.counted < start, start, times.counted), now)


def count(now: Time, times: Clocks, before: Rank, after: Rank) -> Clocks:
    """The integrals over time, with something in flight, up to now; blocks have grown from `before` to `after`."""
    spent_s = since_counted(now, times.batch.start, times.executor)
    held = 0.5 * (before.used_blocks + after.used_blocks)
    return replace(
        times, executor=replace(times.executor, busy=clock.add(times.executor.busy, spent_s), counted=now),
        rank=replace(times.rank, running=clock.add(times.rank.running, spent_s * before.running),
                     held=clock.add(times.rank.held, spent_s * held)))


class NextPass(NamedTuple):
    """What wakes an executor next; counts and clocks with it noted."""

    wake: Time
    phase: Int[Array, ""]
    counts: Counts
    times: Clocks


def go_on(dims: Dims, group: Group, event: Event, flying: Flights, counts: Counts, times: Clocks, *, wake: Time,
          phase: Int[Array, ""], end: Time, has_more: Bool[Array, ""], has_ended: Bool[Array, ""],
          is_starting: Bool[Array, ""], is_waiting_pass: Bool[Array, ""], is_idle: Bool[Array, ""],
          is_held: Bool[Array, ""]) -> NextPass:
    """After a step: go on with the pass, or with the next batch's, or wait for the oldest batch.

    flying: before the step. counts, times: of `event.batch` after it. wake, phase: as far as an arrival changed them.
    end: of what starts. is_waiting_pass: a pass is due or under way; is_idle: it has come to nothing. is_held: the head
    of the queue can join only after an event.
    """
    rank = counts.rank
    own_end = clock.select(has_ended, clock.never(), times.batch.end)
    own_end = clock.select(is_starting, end, own_end)
    is_own = jnp.arange(dims.num_batches) == event.batch
    after = _flights(clock.select(is_own, own_end, flying.ends))
    has_free, free = after.free
    has_work = (rank.running > 0) | (rank.waiting > 0)
    # What cannot be scheduled now can once something returns; without anything in flight, in a pass that begins again.
    gives_up = is_idle & jnp.any(after.are_in)
    is_next = is_starting & has_free & (((rank.waiting > 0) & ~is_held) | (rank.forming_slot != dims.null_slot))
    if group.batching.pass_on_arrival:
        # What returns at this very instant, its jump cut short, does so first.
        is_met = event.is_arrival & ~event.is_ending & (phase == w.ENDING) & (event.now < after.first_end)
        is_next = is_next | (is_met & has_free)
    is_own_pass = is_waiting_pass & ~gives_up
    is_passing = is_own_pass | is_next
    is_waiting = is_starting | gives_up | (has_ended & ~is_own_pass)
    turn = jnp.where(is_own_pass, event.batch, jnp.where(is_next, free, counts.executor.turn))
    wake = clock.select(is_waiting, after.first_end, wake)
    wake = clock.select(is_passing | has_more, event.now, wake)
    phase = jnp.where(is_waiting, jnp.where(has_work, w.ENDING, w.IDLE), phase)
    phase = jnp.where(is_passing, w.PASSING, phase)
    counts = replace(counts, executor=replace(counts.executor, turn=turn))
    return NextPass(wake, phase, counts, replace(times, batch=replace(times.batch, end=own_end)))


def shifted(times: ExecutorTimes, back_s: Float[Array, ""]) -> ExecutorTimes:
    """In an epoch that begins later; what lies before it is over, whenever it was."""
    def moved(t: Time) -> Time:
        t = clock.shift(t, jnp.broadcast_to(back_s, t.hi.shape))
        return clock.select(t.hi < 0, Time(jnp.zeros_like(t.hi), jnp.zeros_like(t.lo)), t)

    return replace(times, free=tuple(map(moved, times.free)), counted=moved(times.counted))
