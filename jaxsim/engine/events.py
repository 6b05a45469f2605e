"""What happens next: the earliest of arrivals and wake-ups, and where an arriving request goes."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from jaxsim.engine.common import Context, iterations_to_reach, span, take
from jaxsim.kernels import clock, packed, residues
from jaxsim.kernels.clock import Time
from jaxsim.policy.routing import View
from jaxsim.spec.dims import Dims
from jaxsim.state import world as w
from jaxsim.state.requests import Requests
from jaxsim.state.world import World

FREEZE_S = 1.5 * clock.EPOCH_S
"""A scenario whose next event lies beyond this waits for the outer loop to move its epoch."""


class Event(NamedTuple):
    """What happens next, where, and when; `following` is the arrival after it.

    An arrival may bring the end of an iteration along: where the executor it meets stops before the following
    arrival, both are one step, and `now` is the time of the later one.
    """

    now: Time
    following: Time
    executor: Int[Array, ""]
    is_arrival: Bool[Array, ""]
    is_ending: Bool[Array, ""]
    is_passing: Bool[Array, ""]

    @property
    def is_tied(self) -> Bool[Array, ""]:
        """An arrival at this very instant comes before any pass."""
        return self.following.equals(self.now)


def next_arrivals(world: World, requests: Requests) -> tuple[Time, Time]:
    """The next two arrivals, relative to the world's epoch."""
    row = take(requests.arrival, world.next_arrival)

    def relative(epoch, hi, lo):
        distance = (epoch - world.epoch.astype(jnp.float32)) * clock.EPOCH_S
        moved = clock.add(clock.two_sum(jnp.where(jnp.isinf(hi), 0.0, hi), lo), distance)
        return clock.select(jnp.isinf(hi), clock.never(), moved)

    return relative(*row[:3]), relative(*row[3:])


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
        after_first = clock.add(t.start, t.first)
        guess = iterations_to_reach(t.pace.hi, t.growth_s, clock.elapsed(after_first, now))
        done = jnp.int32(0)
        for j in (guess - 1, guess, guess + 1):
            reached = clock.add(after_first, span(t.pace, t.growth_s, jnp.maximum(j, 0))) < now
            done = jnp.where(reached & (j > done), j, done)
        # The pass at each boundary behind us has taken its blocks; one at this very instant comes after arrivals.
        passes = jnp.where(after_first < now, jnp.minimum(done + 1, c.executor.extra), 0)
        is_running = (c.executor.is_committed == 0) & (c.executor.extra > 0)
        taken = residues.crossings_between(counts, c.batch.count + c.batch.joining,
                                           c.batch.counter + c.executor.advance, passes)
        return c.rank.used_blocks + jnp.where(is_running, taken, 0)

    return jax.vmap(one)(world.counts, world.clocks, world.residues)


def route(context: Context, now: Time) -> Int[Array, ""]:
    """The instance for the request that arrives now."""
    dims, params, requests, world = context
    if dims.num_instances == 1:
        return jnp.int32(0)
    used = None
    if params.routing.reads_kv and params.batching.grows:
        used = used_blocks_now(dims, world, now)
    elif params.routing.reads_kv:
        used = packed.from_row(w.row_templates(dims)[0], world.counts.T).rank.used_blocks
    waiting = None
    if params.routing.reads_waiting:
        template = w.row_templates(dims)[0]
        waiting = packed.from_row(template, world.counts.T).rank.waiting
    view = View(world.outstanding, waiting, used, params.batching.num_blocks, world.next_arrival,
                take(requests.uniforms, world.next_arrival))
    return params.routing.choose(view)


def next_event(context: Context) -> tuple[Event, Bool[Array, ""]]:
    """The next event of a live scenario, and whether it lies too far ahead for the current epoch."""
    requests, world = context.requests, context.world
    arrival, after_it = next_arrivals(world, requests)
    wake, phase, executor = earliest_wake(world)
    is_arrival = (arrival < wake) | (arrival.equals(wake) & (phase == w.PASSING))
    now = clock.select(is_arrival, arrival, wake)
    is_frozen = now.hi >= FREEZE_S
    is_live = (world.num_finished < requests.count) & (world.fault == 0) & ~is_frozen
    is_arrival = is_arrival & is_live
    is_wake = ~is_arrival & is_live
    executor = jnp.where(is_arrival, route(context, now), executor)
    following = clock.select(is_arrival, after_it, arrival)
    event = Event(now, following, executor, is_arrival, is_wake & (phase == w.ENDING),
                  is_wake & (phase == w.PASSING))
    return event, is_frozen & (world.num_finished < requests.count) & (world.fault == 0)
