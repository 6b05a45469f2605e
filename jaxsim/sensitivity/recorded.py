"""Runs with the tape of their schedule, on the host: what derivatives at a fixed schedule are made of."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxsim._core.errors import InputError
from jaxsim.engine import loop, lower, tape
from jaxsim.engine.outcomes import Lane, lane_result
from jaxsim.engine.simulate import prepare
from jaxsim.engine.tape import Tape
from jaxsim.metrics import LaneResult
from jaxsim.spec.dims import Dims
from jaxsim.spec.scenario import Scenario
from jaxsim.state.requests import Requests
from jaxsim.state.world import World

LANES = 64
"""Runs in a batch, at most: a tape is a megabyte for a thousand requests."""

INSTEAD = "ask for the total derivative, which is by differences of whole runs and knows every feature"


class Recorded(NamedTuple):
    """One run: as it was made, what came out, and its schedule as host arrays, padding left out."""

    made: Lane
    result: LaneResult
    tape: Tape


def check(made: Lane) -> None:
    """Refuse what a tape does not tell. Raises `InputError`."""
    dims = made.dims
    for is_on, field, why in (
            (dims.num_stages > 1, "engine.pipeline_parallel_size", "overlaps iterations, and a tape is of one after the"
             " other"),
            (dims.has_kv_parallel, "engine.kv_parallel_size", "merges what groups read, which is not on the tape"),
            (dims.has_roles, "cluster.pools", "hand requests over, and a tape does not follow them"),
            (dims.has_migration, "cluster.migration", "moves requests, and a tape does not follow them"),
            (dims.swap_window > 0, "engine.swap", "copies beside iterations, which is not on the tape"),
            (dims.has_encoder, "workload.images", "are encoded in iterations, which is not on the tape"),
            (dims.has_loads, "engine.offload", "(or context_reuse, or cluster.remote_store) loads beside iterations,"
             " which is not on the tape"),
            (dims.has_clients, "workload.client", "(or cluster.admission, cluster.failures) ends requests without an"
             " answer, which have no latency"),
            (dims.num_ranks > 1, "engine.data_parallel_size", "makes ranks iterate together, where no iteration has a"
             " price alone"),
            (len(made.params.groups) > 1, "cluster.pools", "differ in what an iteration costs")):
        if is_on:
            raise InputError(field, "given", f"{why}: there is no derivative at a fixed schedule", INSTEAD)


def record(scenarios: Sequence[Scenario], *, leaves_out: bool = False) -> list[list[Recorded]]:
    """Simulate every scenario under each of its seeds, and keep the schedules.

    leaves_out: of several scenarios those whose tape would not tell everything (`check`) have no runs. Raises
    `InputError`, else also for these.
    """
    lanes, refused = [], []
    for index, scenario in enumerate(scenarios):
        made = prepare(index, scenario.checked(), record_steps=True)
        try:
            check(made[0])
        except InputError as error:
            refused.append(error)
            made = []
        lanes.append(made)
    if refused and (not leaves_out or not any(lanes)):
        raise refused[0]
    groups: dict = {}
    for made in (lane for runs in lanes for lane in runs):
        leaves, structure = jax.tree.flatten(made.params)
        groups.setdefault((made.dims, structure, tuple(map(np.shape, leaves))), []).append(made)
    done = {}
    for (dims, *_), group in groups.items():
        # Batches of one size, so that they are one program.
        width = -(-len(group) // -(-len(group) // LANES))
        for low in range(0, len(group), width):
            some = group[low:low + width]
            for made, found in zip(some, _run(dims, some, width), strict=True):
                done[id(made)] = found
    return [[done[id(made)] for made in runs] for runs in lanes]


def _run(dims: Dims, group: list[Lane], width: int) -> list[Recorded]:
    """Runs of one program; fewer than its width are filled up with the first."""
    filled = group + group[:1] * (width - len(group))
    params = _stack([made.params for made in filled])
    requests = _stack([lower.make_requests(made.workload, dims, made.prefixes, patience=made.patience,
                                           is_split=made.is_split, order=made.params.flags.order,
                                           slack=made.params.slack) for made in filled])
    world = loop.run_on_one_device(dims, params, requests)
    tapes, world = jax.device_get((_tapes(dims, requests, world), world))
    found = []
    for index, made in enumerate(group):
        own = jax.tree.map(lambda x, index=index: np.asarray(x[index]), tapes)
        if own.is_full:
            raise InputError("workload.num_requests", len(made.workload), f"gives a run of {int(own.count):,} records,"
                             f" of which a tape keeps {dims.num_records:,}", "simulate fewer requests")
        found.append(Recorded(made, lane_result(dims, world, index, made), own))
    return found


def _stack(trees):
    return jax.tree.map(lambda *leaves: jnp.asarray(np.stack(leaves)), *trees)


@functools.partial(jax.jit, static_argnums=0)
def _tapes(dims: Dims, requests: Requests, world: World) -> Tape:
    return jax.vmap(functools.partial(tape.of_world, dims))(requests, world)
