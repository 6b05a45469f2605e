"""The loop: one `while` over a batched step, and the dense pass that keeps counters and clocks small."""

from dataclasses import replace
from functools import partial
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, PyTree

from jaxsim.engine import (
    clients,
    events,
    hand_over,
    migration,
    pipeline,
    remote_store,
    role_switching,
    siblings,
    swapping,
)
from jaxsim.engine.common import Params
from jaxsim.engine.step import step, writes_of_a_step
from jaxsim.engine.writes import apply, forget, recall, rewrites
from jaxsim.kernels import bitmap, clock, packed
from jaxsim.kernels.clock import Time
from jaxsim.kernels.fence import unpartitioned
from jaxsim.spec.dims import Dims
from jaxsim.state import world as w
from jaxsim.state.requests import Requests
from jaxsim.state.world import World

T = TypeVar("T")

STEPS_BETWEEN_REBASES = 256
"""Steps between dense passes. Few enough for the packed iteration counters, many enough to cost nothing."""

REBASE_COUNTER = 1 << 12
"""A batch's iteration counter is wound back once it passes this."""


def is_live(requests: Requests, world: World):
    """Whether a scenario has anything left to simulate."""
    return (world.num_finished < requests.count) & (world.fault == 0)


def rebase(dims: Dims, params: Params, requests: Requests, world: World) -> World:
    """Move the epoch to the next event and wind back iteration counters, without changing any result."""
    counts, times = w.count_rows(dims).everything(world.counts), w.clock_rows(dims).everything(world.clocks)
    # Iteration counters: by whole blocks, so that residues stay what they are.
    batch = counts.batch
    turns = jnp.where(batch.counter >= REBASE_COUNTER, (batch.counter >> dims.block_bits) << dims.block_bits, 0)
    batch = replace(batch, counter=batch.counter - turns, offsets=batch.offsets + turns * batch.count,
                    joining_offsets=batch.joining_offsets + turns * batch.joining)
    is_used = world.slot_keys != packed.EMPTY
    turns = turns.reshape(-1, 1)
    keys = jnp.where(is_used, world.slot_keys - (turns << dims.slot_bits), packed.EMPTY)
    # A slot is in at most one batch of its rank.
    wound = jnp.where(is_used, turns, 0).reshape(dims.all_ranks, dims.num_batches, -1)
    entries = world.slot_entries.at[:, :, w.OFFSET].add(jnp.sum(wound, axis=1))
    # Clocks: so that the earliest wake-up or arrival lies in the first epoch.
    coming = params.source.coming(requests, world.source, world.due, world.epoch)
    ahead = jnp.minimum(coming.time.hi, jnp.min(world.wake_hi))
    if dims.has_moves:
        ahead = jnp.minimum(ahead, jnp.min(world.doors[:-1, 0]))
    if dims.num_flights:
        ahead = jnp.minimum(ahead, world.flights.next_end.hi)
    if dims.has_migration:
        ahead = jnp.minimum(ahead, events.next_tick(world).hi)
    if dims.has_clients:
        ahead = jnp.minimum(ahead, events.first_timer(requests, world).time.hi)
    if dims.has_failures:
        ahead = jnp.minimum(ahead, events.next_outage(params, world).time.hi)
    if dims.has_role_switching:
        ahead = jnp.minimum(ahead, role_switching.next_turn(world.roles).hi)
    is_starved = jnp.isinf(ahead) & (world.num_finished < requests.count)
    epochs = jnp.where(jnp.isinf(ahead), 0.0, jnp.floor(ahead / clock.EPOCH_S))
    back = -epochs * clock.EPOCH_S
    start = times.batch.start
    start = clock.shift(start, jnp.broadcast_to(back, start.hi.shape))
    times = replace(times, batch=replace(times.batch, start=start))
    if dims.num_stages > 1:
        end = clock.shift(times.batch.end, jnp.broadcast_to(back, start.hi.shape))
        times = replace(times, executor=pipeline.shifted(times.executor, back), batch=replace(times.batch, end=end))
    wake = clock.shift(Time(world.wake_hi, world.wake_lo), jnp.broadcast_to(back, world.wake_hi.shape))
    if dims.has_roles:
        world = hand_over.shifted(world, back)
    if dims.has_role_switching:
        world = role_switching.shifted(world, back)
    if dims.has_free_stages:
        ends = Time(world.slot_ends[..., 0], world.slot_ends[..., 1])
        ends = clock.shift(ends, jnp.broadcast_to(back, ends.hi.shape))
        world = replace(world, slot_ends=jnp.stack(ends, axis=-1))
    if dims.has_migration:
        world = migration.shifted(world, back)
    if dims.has_egress:
        world = remote_store.shifted(world, back)
    if dims.has_siblings:
        world = siblings.shifted(world, back)
    if dims.has_swap:
        world = swapping.shifted(world, back)
        times = replace(times, rank=replace(times.rank, swap=swapping.links_shifted(times.rank.swap, back)))
    return replace(
        world, counts=w.count_rows(dims).row(replace(counts, batch=batch)), clocks=w.clock_rows(dims).row(times),
        slot_keys=keys, slot_entries=entries,
        epoch=world.epoch + epochs.astype(jnp.int32), wake_hi=wake.hi, wake_lo=wake.lo, is_frozen=jnp.int32(0),
        fault=world.fault | jnp.where(is_starved, w.STARVED, 0))


def is_going(params: Params, requests: Requests, world: World) -> Bool[Array, ""]:
    """Whether the loop has anything to do for a scenario: it is live, and what comes next comes before `until`."""
    going = is_live(requests, world)
    if world.until is None:
        return going
    # One that nothing will ever happen to goes on until it is said to be starved.
    first = events.next_time(params, requests, world)
    return going & (events.is_allowed(world, first) | jnp.isinf(first.hi))


def start(dims: Dims, params: Params, requests: Requests, is_stepped: bool = False) -> World:
    """One scenario before its first event; `requests` as its source prepared them.

    is_stepped: with `until`, at time zero, and `routed`.
    """
    rules = params.flags
    fields = 5 if rules.stamps_slots or dims.has_moves else 3
    fields = 6 + dims.has_block_groups if dims.has_swap else fields
    words = bitmap.num_words(dims.num_requests) if rules.sorts else 1
    ratio = params.of_executors(lambda batching: batching.ratio_start)
    num_blocks = params.of_executors(lambda batching: batching.num_blocks)
    world = w.initial_world(dims, *params.source.start(requests), fields, words, ratio, num_blocks)
    if dims.has_scaling:
        world = migration.opened(world, params.scaling)
    if dims.has_role_switching:
        world = role_switching.opened(world, params.switching)
    if dims.has_clients:
        world = replace(world, **clients.start(requests, rules.async_scheduling))
    if is_stepped:
        world = replace(world, until=jnp.zeros(3, jnp.float32),
                        routed=jnp.full(dims.num_requests + 1, -1, jnp.int32))
    return world


def varying_with(inputs: PyTree, tree: T) -> T:
    """The tree, which under `shard_map` varies between devices if any of the inputs does.

    A loop must carry what varies as such from the start, also where it begins as a constant.
    """
    if not jax.sharding.get_abstract_mesh().manual_axes:
        return tree
    # Zero, whatever they hold.
    zero = sum(lax.bitcast_convert_type(x.astype(jnp.float32).ravel()[0], jnp.int32) & 0
               for x in jax.tree.leaves(inputs) if x.size)
    return jax.tree.map(lambda x: x + zero.astype(x.dtype), tree)


def advance(dims: Dims, params: Params, requests: Requests, world: World) -> World:
    """Go on with a batch of scenarios to their ends, or to where each `until` is."""
    # The writes of a step travel to the next packed, whatever their number.
    world = varying_with((params, requests), world)
    like = writes_of_a_step(dims, params, requests, world)
    packing = packed.Packing(like)
    one_step = partial(step, dims, packing, params, requests)

    def inner_continues(carry):
        i, world, _ = carry
        return (i < STEPS_BETWEEN_REBASES) & jnp.any(is_live(requests, world) & (world.is_frozen == 0))

    def inner(carry):
        i, world, writes = carry
        return i + 1, *one_step(world, writes)

    def outer(world):
        world = varying_with(world, jax.vmap(partial(rebase, dims))(params, requests, world))
        nothing = varying_with(world, jax.vmap(partial(rewrites, dims, like=like))(world))
        carry = jnp.int32(0), forget(world, nothing), packing.pack(nothing)
        _, world, writes = lax.while_loop(inner_continues, inner, carry)
        world = jax.vmap(recall)(world, packing.unpack(writes))
        return apply(dims, world, packing, writes)

    def outer_continues(world):
        return jnp.any(jax.vmap(is_going)(params, requests, world))

    return lax.while_loop(outer_continues, outer, world)


@partial(jax.jit, static_argnums=0)
def run(dims: Dims, params: Params, requests: Requests) -> World:
    """Simulate a batch of scenarios; every leaf of `params` and `requests` has a leading axis of scenarios."""
    params, requests = as_arguments((params, requests))
    requests = prepared(params, requests)
    return advance(dims, params, requests, jax.vmap(partial(start, dims))(params, requests))


def as_arguments(inputs: T) -> T:
    """What a caller's program may have as constants, as if it were given: XLA on CPU aborts on a kernel that reads a
    large constant (seen with jaxlib 0.10.1)."""
    return lax.optimization_barrier(inputs)


def run_on_one_device(dims: Dims, params: Params, requests: Requests) -> World:
    """The same of host arrays: on the default device, as one kernel a step also where there are other devices."""
    return run(dims, params, requests) if jax.device_count() == 1 else _run_unpartitioned(dims, params, requests)


@partial(jax.jit, static_argnums=0)
def _run_unpartitioned(dims: Dims, params: Params, requests: Requests) -> World:
    with unpartitioned():
        return run.__wrapped__(dims, params, requests)


@partial(jax.jit, static_argnums=0)
def run_until(dims: Dims, params: Params, requests: Requests, world: World) -> World:
    """The same from a world on, until the `until` of each; `world` as `start` with `is_stepped` or this left it."""
    params, requests = as_arguments((params, requests))
    return advance(dims, params, prepared(params, requests), world)


def prepared(params: Params, requests: Requests) -> Requests:
    """A batch of requests as the loop is to read them."""
    return jax.vmap(lambda params, requests: params.source.prepare(requests))(params, requests)
