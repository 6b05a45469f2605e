"""The simulator as a pure function of pytrees, for other people's `jit`, `vmap`, `shard_map` and `jvp`.

    dims, params, requests = functional.inputs(scenario)

    def mean_ttft_s(max_num_seqs):
        changed = eqx.tree_at(lambda p: p.groups[0].batching.max_num_seqs, params, max_num_seqs)
        world = functional.simulate(dims, changed, requests)
        return jnp.mean(functional.latencies(dims, params, requests, world).ttft_s)

    jax.jit(jax.vmap(mean_ttft_s))(jnp.array([16, 64, 256]))

Under `vmap` scenarios become lanes of one loop, also under `jvp` and `jax.jacfwd`. Forward mode gives the derivative at
a fixed schedule (`jaxsim.engine.forward`), by costs alone: what latencies change by while every iteration does what it
did. `simulate_recorded` keeps the schedule itself, and reverse mode works on that:

    world, tape = functional.simulate_recorded(dims, params, requests)
    jax.grad(lambda params: functional.record_seconds(dims, params, tape).sum(), allow_int=True)(params)
"""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
import msgspec
import numpy as np
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Bool, Float, Int, PyTree

from jaxsim._core.errors import InputError
from jaxsim._core.precision import enable_x64
from jaxsim.engine import forward, loop, lower, tape
from jaxsim.engine.common import Params
from jaxsim.engine.simulate import RECORDS_A_REQUEST, prepare
from jaxsim.engine.tape import Tape
from jaxsim.kernels import clock
from jaxsim.kernels.clock import Time
from jaxsim.spec.dims import Dims
from jaxsim.spec.scenario import Scenario
from jaxsim.state.requests import OUTPUT, Requests
from jaxsim.state.world import World


class Latencies(eqx.Module):
    """Of every request, in order of arrival; padding and requests without an end have NaN.

    ttft_s: from arrival to the end of the iteration that computes the last prompt token; tpot_s: (end - first token) /
    (output tokens - 1), NaN for one output token; e2e_s: from arrival to the end; queue_s: from arrival to the start of
    the first iteration with the request. Seconds.
    """

    ttft_s: Float[Array, " requests"]
    tpot_s: Float[Array, " requests"]
    e2e_s: Float[Array, " requests"]
    queue_s: Float[Array, " requests"]
    is_finished: Bool[Array, " requests"]
    preemptions: Int[Array, " requests"]


def inputs(scenario: Scenario, seed: int | None = None) -> tuple[Dims, Params, Requests]:
    """Sizes, policies with costs, and the workload of one run; `seed` is the scenario's first unless given.

    Raises `InputError` for whatever is wrong with the scenario.
    """
    scenario = msgspec.structs.replace(scenario.checked(), num_seeds=1)
    if seed is not None:
        scenario = msgspec.structs.replace(scenario, workload=msgspec.structs.replace(scenario.workload, seed=seed))
    if scenario.has_clients:
        raise InputError("workload.client", None, "requests that end without an answer have no derivatives here",
                         "leave out workload.client, cluster.admission and cluster.failures, or use jaxsim.simulate")
    (lane,) = prepare(0, scenario, record_steps=False)
    requests = lower.make_requests(lane.workload, lane.dims, lane.prefixes, is_split=lane.is_split,
                                   order=lane.params.flags.order, slack=lane.params.slack)
    return lane.dims, *jax.tree.map(jnp.asarray, (lane.params, requests))


def simulate(dims: Dims, params: Params, requests: Requests) -> World:
    """One scenario, all of its leaves traced; under `vmap`, lanes of one loop.

    The world at the end: `latencies` reads it. `world.fault` is 0, or has the bits of what stopped it
    (`jaxsim.engine.outcomes.FAULTS` says what they mean); requests that it left without an end have NaN.

    Forward mode is at a fixed schedule, by the costs of `params`, of what `latencies` reads; by other numbers it raises
    `ValueError`.
    """
    return in_lanes(forward.simulated, dims, (params, requests), forward.along)


def simulate_recorded(dims: Dims, params: Params, requests: Requests, num_records: int | None = None
                      ) -> tuple[World, Tape]:
    """The same, with the schedule: what every iteration did, and when. One bounded structure, whatever happens.

    num_records: rows of the tape (static), enough for eight a request and a thousand unless given; a run with more
    says so in `tape.is_full`. Raises `ValueError` with pipeline stages, where iterations overlap and no record goes on
    from the one before it, and with roles, where a request goes on elsewhere. To derivatives the schedule is a
    constant: what is to be differentiated, forward or reverse, is what a function like `record_seconds` makes of it and
    of the costs.
    """
    forward.check(dims)
    size = num_records or dims.num_records
    dims = replace(dims, num_records=size or dims.num_ranks * (RECORDS_A_REQUEST * dims.num_requests + 1000))
    params, requests = jax.lax.stop_gradient((params, requests))
    world = in_lanes(loop.run, dims, (params, requests))
    return world, tape.of_world(dims, requests, world)


record_seconds = tape.seconds


def in_lanes(run: Callable[..., PyTree], dims: Dims, inputs: tuple, along: Callable | None = None) -> PyTree:
    """`run(dims, *inputs)`, a loop over a batch, for one scenario; under the caller's `vmap` its scenarios are lanes.

    A loop under `vmap` would select over the whole state in each iteration. along: what forward mode is, as
    `forward.along`; without, inputs are to have no tangents.
    """
    # As a flat list: JAX's rule for `vmap` of `jvp` trips over structures with None in them.
    leaves, structure = jax.tree.flatten(jax.tree.map(_narrow, inputs))
    return _entry(run, along, dims, structure)(*leaves)


def in_32_bits() -> AbstractContextManager:
    """A context in which arrays have 32 bits, as the loop has them throughout, whatever the caller's mode."""
    return enable_x64(False)


def _narrow(x):
    """Of 32 bits, for numbers that a caller in 64-bit mode has made."""
    dtype = jnp.result_type(x)
    return jnp.asarray(x, {"float64": jnp.float32, "int64": jnp.int32}.get(dtype.name, dtype))


@functools.lru_cache(maxsize=64)
def _entry(batched, along, dims: Dims, structure):
    def run(leaves, _):
        with in_32_bits():
            return batched(dims, *structure.unflatten(leaves)), ()

    def pushed(leaves, tangents):
        """Results, and tangents of those that are no integers. tangents: of leaves that have one, by their place."""
        with in_32_bits():
            return along(dims, structure, leaves, tangents)

    plain, forward = _of_one(run), _of_one(pushed)

    # JAX's own rule puts the axis twice on a tangent that has it where an integer has it too.
    @jax.custom_jvp
    def one(*leaves):
        return plain(list(leaves), {})[0]

    # Of most leaves there is none, and what follows from them alone carries none through the loop.
    @functools.partial(one.defjvp, symbolic_zeros=True)
    def _one_forward(leaves, tangents):
        given = {place: tangent for place, tangent in enumerate(tangents)
                 if not isinstance(tangent, jax.custom_derivatives.SymbolicZero)
                 and jnp.issubdtype(jnp.result_type(leaves[place]), jnp.inexact)}
        result, slopes = forward(list(leaves), given)
        nothing = jax.tree.map(lambda x: np.zeros(jnp.shape(x), jax.dtypes.float0), result)
        return result, eqx.combine(slopes, nothing)

    return one


def _of_one(run: Callable[[list, dict], tuple[PyTree, PyTree]]) -> Callable[[list, dict], tuple[PyTree, PyTree]]:
    """A function of a batch, lanes in front, for one lane, with results and their tangents; under `vmap`, lanes."""
    def spread(axis_size, is_batched, values):
        return jax.tree.map(lambda has_axis, x: x if has_axis else jnp.broadcast_to(x, (axis_size, *jnp.shape(x))),
                            is_batched, values)

    @custom_vmap
    def many(leaves, tangents):
        return run(leaves, tangents)

    @many.def_vmap
    def _many_many(axis_size, is_batched, leaves, tangents):
        if not any(is_batched[0]):
            return alone(run, axis_size, is_batched, leaves, tangents)
        flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), spread(axis_size, is_batched, [leaves, tangents]))
        result = jax.tree.map(lambda x: x.reshape(axis_size, -1, *x.shape[1:]), many(*flat))
        return result, jax.tree.map(lambda _: True, result)

    def alone(call, axis_size, is_batched, leaves, tangents):
        # Only tangents have the axis, as in `jax.jacfwd`: they ride along in the same loop.
        have = any(is_batched[1].values())
        if have:
            call = jax.vmap(call, (None, 0), (None, 0))
            tangents = spread(axis_size, is_batched[1], tangents)
        result, slopes = call(leaves, tangents)
        return (result, slopes), (jax.tree.map(lambda _: False, result), jax.tree.map(lambda _: have, slopes))

    @custom_vmap
    def one(leaves, tangents):
        return of_first(many, leaves, tangents)

    def of_first(call, leaves, tangents):
        return jax.tree.map(lambda x: x[0], call(*jax.tree.map(lambda x: jnp.expand_dims(x, 0), [leaves, tangents])))

    @one.def_vmap
    def _one_many(axis_size, is_batched, leaves, tangents):
        if not any(is_batched[0]):
            return alone(functools.partial(of_first, run), axis_size, is_batched, leaves, tangents)
        result = many(*spread(axis_size, is_batched, [leaves, tangents]))
        return result, jax.tree.map(lambda _: True, result)

    return one


def latencies(dims: Dims, params: Params, requests: Requests, world: World) -> Latencies:
    """What every request of one scenario met with, in the engine: `cost.front_end_s` comes to TTFT and end to end."""
    rows = slice(0, dims.num_requests)
    log_row, _ = world.placed[rows].T
    arrival = params.source.arrivals(params.source.prepare(requests), world.due)[rows]
    if world.arrival_moves is not None:
        arrival = arrival.at[:, 1:].add(world.arrival_moves[rows])
    finish = world.finished[rows]
    first_token = world.first_tokens[jnp.maximum(log_row, 0)]
    is_real = jnp.arange(dims.num_requests) < requests.count
    is_finished = is_real & (finish[:, 1] + finish[:, 2] + finish[:, 0] > 0)
    is_placed = is_real & (log_row >= 0)

    def between(start, end, is_known):
        seconds = (end[:, 0] - start[:, 0]) * clock.EPOCH_S + clock.elapsed(Time(*start[:, 1:].T), Time(*end[:, 1:].T))
        return jnp.where(is_known, seconds, jnp.nan)

    gaps = requests.table[rows, OUTPUT] - 1
    decode_s = between(first_token, finish, is_finished & (gaps > 0))
    return Latencies(
        ttft_s=between(arrival, first_token, is_placed), tpot_s=decode_s / jnp.maximum(gaps, 1),
        e2e_s=between(arrival, finish, is_finished),
        queue_s=between(arrival, world.scheduled[rows], is_real & (world.placed[rows, 1] >= 0)),
        is_finished=is_finished, preemptions=world.progress[rows, 1])
