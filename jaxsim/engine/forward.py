"""Forward mode of `jaxsim.functional.simulate`: the derivative at a fixed schedule, of lanes of one loop.

The derivative along the path of a run would be wrong by orders of magnitude where requests arrive over time, so the
loop is not differentiated. It carries tangents along instead (`jaxsim.engine.tangents`), and results get these: times
of requests, by which they move at the schedule as it is, an arrival with the iteration that it met
(`World.arrival_moves`, zeros, whose tangent that is); seconds at work. Whatever else is no integer has NaN.
"""

from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Float

from jaxsim.engine import loop, tangents
from jaxsim.engine.common import Params
from jaxsim.kernels.clock import Time
from jaxsim.spec.dims import Dims
from jaxsim.state import world as w
from jaxsim.state.requests import Requests
from jaxsim.state.world import World


def simulated(dims: Dims, params: Params, requests: Requests) -> World:
    """A batch of runs, whose results have a place for what arrivals move by."""
    world = loop.run(dims, params, requests)
    return replace(world, arrival_moves=jnp.zeros((*world.fault.shape, dims.num_requests + 1, 2), jnp.float32))


def along(dims: Dims, structure, leaves: list[Array], given: dict[int, Array]) -> tuple[World, World]:
    """The same of leaves of (params, requests), and tangents of what is no integer; given: of leaves, by their place.

    Under `vmap` of tangents alone they ride along in the same loop. Raises `ValueError` for what has no derivative at a
    fixed schedule.
    """
    _check(dims, structure, given)

    @custom_vmap
    def one(leaves, given):
        result, slopes = _directions(dims, structure, leaves, {at: x[None] for at, x in given.items()})
        return result, jax.tree.map(lambda x: x[0], slopes)

    @one.def_vmap
    def _several(axis_size, is_batched, leaves, given):
        if any(is_batched[0]):
            raise NotImplementedError("lanes of a batch of lanes")
        spread = {at: x if is_batched[1][at] else jnp.broadcast_to(x, (axis_size, *x.shape)) for at, x in given.items()}
        result, slopes = _directions(dims, structure, leaves, spread)
        return (result, slopes), (jax.tree.map(lambda _: False, result), jax.tree.map(lambda _: True, slopes))

    return one(leaves, given)


def check(dims: Dims) -> None:
    """Raises `ValueError` where a tape, or tangents, would not tell everything."""
    for is_on, what in (
            (dims.num_stages > 1, f"num_stages = {dims.num_stages}: iterations overlap, and a schedule is of one after"
             " the other"),
            (dims.has_kv_parallel, "has_kv_parallel: what groups merge is not on the tape"),
            (dims.has_moves, "has_roles, has_migration: a tape does not follow a request from one executor to another"),
            (dims.has_swap, "swap_window: a tape does not say what an iteration copies"),
            (dims.has_encoder, "has_encoder: a tape does not say which images an iteration encodes"),
            (dims.has_loads, "has_offload, has_reuse, has_remote: a tape does not say what an iteration loads")):
        if is_on:
            raise ValueError(what)


def _check(dims: Dims, structure, given: dict[int, Array]) -> None:
    check(dims)
    places = structure.unflatten(range(structure.num_leaves))
    params, _ = places
    if dims.num_ranks > 1 or len(params.groups) > 1:
        raise ValueError(f"num_ranks = {dims.num_ranks}, {len(params.groups)} groups: forward mode is of executors of"
                         " one rank, all of one kind")
    costs = set(jax.tree.leaves(params.groups[0].cost))
    for path, place in jax.tree_util.tree_flatten_with_path(places)[0]:
        if place in given and place not in costs:
            name = ("params", "requests")[path[0].idx] + jax.tree_util.keystr(path[1:])
            raise ValueError(f"{name}: only costs (params.groups[0].cost) have derivatives at a fixed schedule, which"
                             " is what forward mode gives; change no other number under it, or ask"
                             " jaxsim.sensitivity for the total derivative")


def _directions(dims: Dims, structure, leaves: list[Array], given: dict[int, Float[Array, "directions lanes ..."]]
                ) -> tuple[World, World]:
    """Lanes of a loop, and their tangents along several directions, which are in front."""
    params, requests = structure.unflatten(leaves)
    lanes, count = params.max_steps.shape[0], next(len(x) for x in given.values())
    nothing = [jnp.zeros((count, *x.shape), x.dtype) for x in leaves]
    moves = structure.unflatten([given.get(at, zero) for at, zero in enumerate(nothing)])[0].groups[0].cost
    moves = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), eqx.filter(moves, eqx.is_inexact_array))
    moving = replace(dims, num_tangents=count)
    found = loop.run(moving, replace(params, tangents=moves), requests)
    marks = found.tangent_marks.reshape(lanes, len(tangents.MARKS), -1, 2, count)
    arrived, joined, first, last = jnp.moveaxis(marks, (1, 4), (0, 1))
    rows = slice(0, dims.num_requests + 1)
    world = replace(found, tangents=None, tangent_marks=None,
                    arrival_moves=jnp.zeros((lanes, dims.num_requests + 1, 2), jnp.float32))

    def unknown(x):
        return jnp.full((count, *x.shape), jnp.nan)

    def stamp(mark):
        # Epochs do not move.
        return jnp.concatenate([jnp.zeros((*mark.shape[:-1], 1), jnp.float32), mark], axis=-1)

    slopes = jax.tree.map(unknown, eqx.filter(world, eqx.is_inexact_array))
    done = jnp.moveaxis(found.tangents.reshape(lanes, -1, 5, count), (2, 3), (0, 1))[:2]
    clocks = w.clock_rows(dims)
    times = jax.tree.map(unknown, clocks.everything(world.clocks))
    times = replace(times, executor=replace(times.executor, busy=Time(*done)))
    return world, replace(
        slopes, scheduled=stamp(joined[:, :, rows]), first_tokens=stamp(first), finished=stamp(last[:, :, rows]),
        arrival_moves=arrived[:, :, rows], due=jnp.zeros((count, *world.due.shape), jnp.float32),
        clocks=jax.vmap(clocks.row)(times))
