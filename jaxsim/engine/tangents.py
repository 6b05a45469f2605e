"""Forward mode at a fixed schedule: what latencies change by, carried along by the loop itself.

Each executor has a clock of changes: by how much the start of what comes next has moved, by each of several fields,
while every iteration does what it did. An iteration that ends moves it by what its seconds change by (the derivative of
its price, `jax.jvp`). Whoever arrives while one is in flight is as far into it as it was: where the share `phase` of it
has passed, its arrival moves with the start of that iteration and with `phase` times what the iteration changes by.
What a request is told at its arrival, at the start of its first iteration, at the end of the one with its first token
and at its end are marks of this clock, and what its latencies change by are differences of these. An executor that
rests leaves its clock where it is, so that arrivals and pauses are held fixed, as who runs with whom is.

Sums are pairs of float32 (`jaxsim.kernels.clock`), as a mark is the sum of all iterations before it, and differences of
marks are small. Nothing that decides what is done next reads any of this: results are the same bits without it.
"""

from typing import TYPE_CHECKING, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxsim.cost.base import DecodePace
from jaxsim.engine.common import Context, Group, iterations_to_reach
from jaxsim.engine.writes import Put, Writes
from jaxsim.kernels import clock
from jaxsim.kernels.clock import Time
from jaxsim.spec.dims import Dims
from jaxsim.state.world import Batch, BatchTimes, World

if TYPE_CHECKING:
    from collections.abc import Callable

MARKS = ARRIVED, JOINED, FIRST, LAST = range(4)
"""Parts of `World.tangent_marks`: at the arrival, the start of the first iteration, the first token (by row of the log
of these), the end."""


class Tangents(NamedTuple):
    """What an executor's times change by, by each field: the end of what it has done, and, of the iterations in flight,
    the first, the one behind it, and by how much each that follows is longer. Seconds by unit of the field."""

    done: Time
    first: Float[Array, " fields"]
    pace: Float[Array, " fields"]
    growth: Float[Array, " fields"]


def of_row(dims: Dims, row: Float[Array, " columns"]) -> Tangents:
    """A row of `World.tangents`."""
    hi, lo, *in_flight = row.reshape(5, dims.num_tangents)
    return Tangents(Time(hi, lo), *in_flight)


def after(own: Tangents, firsts: Float[Array, ""] | float, extra: Float[Array, ""], pairs: Float[Array, ""]) -> Time:
    """What the times change by so far into the iterations in flight; `pairs`: how often growth has come in."""
    # Behind the first there may be none, and what it would take is no matter.
    behind = jnp.where(extra > 0, extra * own.pace + pairs * own.growth, 0.0)
    return clock.add(own.done, firsts * own.first + behind)


def at_arrival(own: Tangents, is_running: Bool[Array, ""], now: Time, times: BatchTimes) -> Time:
    """What an arrival now moves by; is_running: iterations are in flight, as `times` has them."""
    begun = clock.add(times.start, times.first)
    ahead_s = clock.elapsed(begun, now)
    through = jnp.maximum(iterations_to_reach(times.pace.hi, times.growth_s, ahead_s) - 1, 0).astype(jnp.float32)
    pairs = 0.5 * through * (through - 1)
    pace_s = times.pace.hi + through * times.growth_s
    phase = (ahead_s - through * times.pace.hi - pairs * times.growth_s) / jnp.maximum(pace_s, 1e-30)
    in_jump = after(own, 1.0, through + phase, pairs + phase * through)
    # One that ends now has passed whole, one without seconds too.
    in_first = jnp.where(times.first.hi > 0, clock.elapsed(times.start, now) / jnp.maximum(times.first.hi, 1e-30), 1.0)
    moved = clock.select(ahead_s > 0, in_jump, clock.add(own.done, in_first * own.first))
    return clock.select(is_running, moved, own.done)


def settle(own: Tangents, is_ending: Bool[Array, ""], batch: Batch) -> Tangents:
    """Iterations have ended: `batch` as they did them, not committed yet unless this has been said before."""
    extra = batch.extra.astype(jnp.float32)
    done = after(own, 1.0, extra, 0.5 * extra * (extra - 1))
    return own._replace(done=clock.select(is_ending & (batch.is_committed == 0), done, own.done))


def launch(context: Context, own: Tangents, is_starting: Bool[Array, ""],
           price: "Callable[[Group], tuple[Float[Array, ''], DecodePace]]") -> Tangents:
    """Iterations start, which `price` prices by the cost of a group."""
    group = context.group
    floats, rest = eqx.partition(group.cost, eqx.is_inexact_array)

    def priced(floats):
        first_s, pace = price(Group(group.batching, eqx.combine(floats, rest)))
        return first_s, pace.first_s, pace.growth_s

    changes = jax.vmap(lambda change: jax.jvp(priced, (floats,), (change,))[1])(context.params.tangents)
    return Tangents(own.done, *(jnp.where(is_starting, change, before)
                                for change, before in zip(changes, own[1:], strict=True)))


def writes(dims: Dims, own: Tangents, row: tuple, arrived: Time, *, arriving: Int[Array, ""], joining: Int[Array, ""],
           logged: Int[Array, ""], leaving: Int[Array, ""]) -> Writes:
    """The executor's row, at index `row`, and the marks of requests; masked ones are scratch rows."""
    size = rows_of_a_mark(dims)
    index = jnp.stack([arriving, size * JOINED + joining, size * FIRST + logged, size * LAST + leaving])
    marks = arrived, own.done, clock.add(own.done, own.first), own.done
    return {"tangents": Put(row, jnp.concatenate([*own.done, *own[1:]])),
            "tangent_marks": Put((index,), jnp.stack([jnp.concatenate(mark) for mark in marks]))}


def rows_of_a_mark(dims: Dims) -> int:
    """Of `World.tangent_marks`: requests, or entries of the log of first tokens, and scratch."""
    return dims.num_requests + 1 + dims.num_more_logs


class Changes(NamedTuple):
    """Of a run, by each field, in float64: of the latencies of requests (as `jaxsim.sensitivity.schedule.Latencies`;
    what is no mark of the run has no meaning) and of the seconds at work of ranks."""

    queue: Float[np.ndarray, "fields requests"]
    ttft: Float[np.ndarray, "fields requests"]
    e2e: Float[np.ndarray, "fields requests"]
    busy: Float[np.ndarray, "fields ranks"]


def read(dims: Dims, world: World, lane: int, num_requests: int) -> Changes:
    """Host: of a lane of a finished batch."""
    size, count = rows_of_a_mark(dims), dims.num_tangents

    def pairs(rows):
        return rows[..., :count].astype(np.float64) + rows[..., count:2 * count]

    marks = world.tangent_marks[lane]
    log_row = np.maximum(world.placed[lane, :num_requests, 0], 0)
    arrived, joined, last = (pairs(marks[size * mark:size * mark + num_requests]) for mark in (ARRIVED, JOINED, LAST))
    first = pairs(marks[size * FIRST + log_row])
    return Changes(*((mark - arrived).T for mark in (joined, first, last)), pairs(world.tangents[lane]).T)
