"""What happens next: the earliest of arrivals and wake-ups, and where an arriving request goes."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from jaxsim.engine.common import Context, Params, iterations_to_reach, span, take
from jaxsim.kernels import clock, packed, residues
from jaxsim.kernels.clock import Time
from jaxsim.policy.arrivals import relative_to
from jaxsim.policy.routing import AbstractRouting, View
from jaxsim.spec.dims import Dims
from jaxsim.state import world as w
from jaxsim.state.requests import PROMPT, Requests
from jaxsim.state.world import Batch, BatchTimes, World

FREEZE_S = 1.5 * clock.EPOCH_S
"""A scenario whose next event lies beyond this waits for the outer loop to move its epoch."""


class Event(NamedTuple):
    """What happens next, where, and when: to which executor, which of its ranks, which batch of that rank.

    `request` is the one that arrives, `following` the time of the arrival after it.

    With roles: `is_door`, a door opens. With roles, or where ends bring arrivals about: `is_met`, a door opens or an
    iteration ends elsewhere at this instant.

    An arrival may bring the end of an iteration along: where the executor it meets stops before the following
    arrival, both are one step, and `now` is the time of the later one.
    """

    now: Time
    following: Time
    request: Int[Array, ""]
    executor: Int[Array, ""]
    rank: Int[Array, ""]
    batch: Int[Array, ""]
    is_arrival: Bool[Array, ""]
    is_ending: Bool[Array, ""]
    is_passing: Bool[Array, ""]
    is_door: Bool[Array, ""] | None = None
    is_met: Bool[Array, ""] | bool = False

    @property
    def is_tied(self) -> Bool[Array, ""]:
        """An arrival at this very instant comes before any pass, and what happens elsewhere where that matters."""
        return self.following.equals(self.now) | self.is_met


def is_allowed(world: World, time: Time) -> Bool[Array, ""] | bool:
    """Whether the loop may go as far: up to `World.until`, and not to it."""
    return True if world.until is None else time < relative_to(world.epoch, world.until)


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


def earliest_door(world: World) -> tuple[Time, Int[Array, ""]]:
    """When a door opens next, and whose: at one instant those that open at once, then in the order of acceptance."""
    hi, lo, turn = world.doors[:-1].T
    first_hi = jnp.min(hi)
    first_lo = jnp.min(jnp.where(hi == first_hi, lo, jnp.inf))
    is_first = (hi == first_hi) & (lo == first_lo)
    executor = jnp.argmin(jnp.where(is_first, turn, jnp.inf)).astype(jnp.int32)
    return Time(first_hi, jnp.where(jnp.isinf(first_hi), 0.0, first_lo)), executor


AT_ONCE = -1
"""In `World.doors`, instead of the number of a transfer: the door opens to see what is there."""


def next_time(params: Params, requests: Requests, world: World) -> Time:
    """When the next event is, an arrival or a wake-up; `clock.never()` if there is none."""
    arrival = params.source.coming(requests, world.source, world.due, world.epoch).time
    wake, _, _ = earliest_wake(world)
    first = clock.select(arrival <= wake, arrival, wake)
    if world.doors is not None:
        door, _ = earliest_door(world)
        first = clock.select(door <= first, door, first)
    return first


def used_blocks_now(dims: Dims, world: World, now: Time) -> Int[Array, " ranks"]:
    """Blocks every rank holds at `now`, inside its jumps: those of passes up to the last boundary."""
    def taken(batch: Batch, t: BatchTimes, counts_by_residue):
        after_first = clock.add(t.start, t.first)
        guess = iterations_to_reach(t.pace.hi, t.growth_s, clock.elapsed(after_first, now))
        done = jnp.int32(0)
        for j in (guess - 1, guess, guess + 1):
            reached = clock.add(after_first, span(t.pace, t.growth_s, jnp.maximum(j, 0))) < now
            done = jnp.where(reached & (j > done), j, done)
        # The pass at each boundary behind us has taken its blocks; one at this very instant comes after arrivals.
        passes = jnp.where(after_first < now, jnp.minimum(done + 1, batch.extra), 0)
        is_running = (batch.is_committed == 0) & (batch.extra > 0)
        if batch.taken is not None:
            is_running = is_running & (batch.taken == 0)
        blocks = residues.crossings_between(counts_by_residue, batch.count + batch.joining,
                                            batch.counter + batch.advance, passes)
        return jnp.where(is_running, blocks, 0)

    counts, times = w.count_rows(dims).everything(world.counts), w.clock_rows(dims).everything(world.clocks)
    batches = jax.tree.map(jnp.ravel, (counts.batch, times.batch))
    blocks = jax.vmap(taken)(*batches, world.residues).reshape(dims.all_ranks, dims.num_batches)
    return counts.rank.used_blocks.ravel() + jnp.sum(blocks, axis=1)


def route(context: Context, request: Int[Array, ""], now: Time) -> Int[Array, ""]:
    """The rank, among those of all executors, for the request that arrives now."""
    dims, params, _, world, _ = context
    if dims.all_ranks == 1:
        return jnp.int32(0)
    is_active = params.is_active
    if dims.has_roles:
        takes_prompts = ~params.hand_over.decodes
        is_active = takes_prompts if is_active is None else takes_prompts & is_active
    return chosen_by(context, request, now, params.routing, world.num_routed, is_active)


def chosen_by(context: Context, request: Int[Array, ""], now: Time, routing: AbstractRouting,
              num_routed: Int[Array, ""], is_active: Bool[Array, " ranks"] | None) -> Int[Array, ""]:
    """The rank that a router chooses for a request, among the active ones."""
    dims, params, requests, world, _ = context
    ranks = w.count_rows(dims).everything(world.counts).rank
    used = num_blocks = None
    if routing.reads_kv:
        used = used_blocks_now(dims, world, now) if params.flags.grows else ranks.used_blocks.ravel()
        if dims.has_roles:
            # Blocks that came back are taken at the next step there.
            used = used - world.returned[:-1]
        num_blocks = params.of_executors(lambda batching: batching.num_blocks)
        num_blocks = jnp.repeat(jnp.broadcast_to(num_blocks, dims.num_executors), dims.num_ranks)
    waiting = ranks.waiting.ravel() if routing.reads_waiting else None
    prompt_tokens = take(requests.table, request)[PROMPT] if routing.reads_prompt else None
    view = View(world.outstanding, waiting, used, num_blocks, num_routed, take(requests.uniforms, request),
                prompt_tokens, is_active)
    chosen = routing.choose(view)
    if is_active is not None:
        behind = (jnp.arange(dims.all_ranks) - chosen) % dims.all_ranks
        chosen = jnp.argmin(jnp.where(is_active, behind, dims.all_ranks)).astype(jnp.int32)
    return chosen


def next_event(context: Context) -> tuple[Event, Bool[Array, ""]]:
    """The next event of a live scenario, and whether it lies too far ahead for now."""
    dims, params, requests, world, _ = context
    arrival, request, after_it = params.source.coming(requests, world.source, world.due, world.epoch)
    wake, phase, executor = earliest_wake(world)
    is_arrival = (arrival < wake) | (arrival.equals(wake) & (phase == w.PASSING))
    now = clock.select(is_arrival, arrival, wake)
    if dims.has_swap:
        # Somebody may rest until a copy is through.
        is_arrival = is_arrival | (arrival.equals(wake) & (phase == w.RESTING))
        now = clock.select(is_arrival, arrival, wake)
    is_door = None
    if dims.has_roles:
        door, its_executor = earliest_door(world)
        is_door = door <= now
        is_arrival, now = is_arrival & ~is_door, clock.select(is_door, door, now)
    is_frozen = (now.hi >= FREEZE_S) | ~jnp.asarray(is_allowed(world, now))
    is_live = (world.num_finished < requests.count) & (world.fault == 0) & ~is_frozen
    is_arrival = is_arrival & is_live
    is_wake = ~is_arrival & is_live
    if dims.has_roles:
        is_door, is_wake = is_door & is_live, is_wake & ~is_door
        executor = jnp.where(is_door, its_executor, executor)
    target, rank = route(context, request, now), jnp.int32(0)
    if dims.num_ranks > 1:
        rank = jnp.where(is_arrival, target % dims.num_ranks, rank)
        target = target // dims.num_ranks
    executor = jnp.where(is_arrival, target, executor)
    following = clock.select(is_arrival, after_it, arrival)
    event = Event(now, following, request, executor, rank, jnp.int32(0), is_arrival, is_wake & (phase == w.ENDING),
                  is_wake & (phase == w.PASSING), is_door)
    if dims.has_swap:
        event = event._replace(is_passing=event.is_passing | (is_wake & (phase == w.RESTING)))
    if dims.has_roles or (params.source.answers and dims.num_executors > 1):
        event = event._replace(is_met=_is_met(dims, world, now, executor))
    return event, is_frozen & (world.num_finished < requests.count) & (world.fault == 0)


def _is_met(dims: Dims, world: World, now: Time, executor: Int[Array, ""]) -> Bool[Array, ""]:
    """Whether a door opens, or an iteration of another executor ends, at this very instant."""
    ends = (world.phase == w.ENDING) & (world.wake_hi == now.hi) & (world.wake_lo == now.lo)
    is_met = jnp.any(ends & (jnp.arange(ends.shape[0]) != executor))
    return is_met | earliest_door(world)[0].equals(now) if dims.has_roles else is_met
