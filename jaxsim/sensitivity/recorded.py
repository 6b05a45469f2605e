"""Runs with the tape of their schedule, on the host: what reverse mode and critical paths are made of."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from jaxsim._core.errors import InputError
from jaxsim.engine import tape
from jaxsim.engine.outcomes import Lane, lane_result
from jaxsim.engine.simulate import prepare, run_together
from jaxsim.engine.tape import Tape
from jaxsim.metrics import LaneResult
from jaxsim.sensitivity.runs import INSTEAD, filled_up, in_batches
from jaxsim.spec.dims import Dims
from jaxsim.spec.scenario import Scenario
from jaxsim.state.requests import Requests
from jaxsim.state.world import World


class Recorded(NamedTuple):
    """One run: as it was made, what came out, and its schedule as host arrays, padding left out."""

    made: Lane
    result: LaneResult
    tape: Tape


def record(scenarios: Sequence[Scenario]) -> list[list[Recorded]]:
    """Simulate every scenario under each of its seeds, and keep the schedules. Raises `InputError` for what cannot be
    simulated, whose tape would not tell everything (`jaxsim.sensitivity.runs.check`), or is too short."""
    found = dict(in_batches(scenarios, functools.partial(prepare, record_steps=True), _run))
    for index in range(len(scenarios)):
        if isinstance(found[index], InputError):
            raise found[index]
    return [found[index] for index in range(len(scenarios))]


def _run(dims: Dims, group: list[Lane], width: int) -> list[Recorded | InputError]:
    requests, world = run_together(filled_up(group, width))
    # A tape has room for what may happen, of which most is empty; a power of two, so that runs share programs.
    most = int(jax.device_get(world.num_recorded).max())
    tapes = _tapes(dims, min(1 << most.bit_length(), dims.num_records), requests, world)
    tapes, world = jax.device_get((tapes, tape.left_out(world)))
    return [_recorded(dims, world, index, made, jax.tree.map(lambda x, index=index: np.asarray(x[index]), tapes))
            for index, made in enumerate(group)]


def _recorded(dims: Dims, world: World, index: int, made: Lane, own: Tape) -> Recorded | InputError:
    if own.is_full:
        return InputError("workload.num_requests", len(made.workload), f"gives a run of {int(own.count):,} records, of"
                          f" which a tape keeps {dims.num_records:,}: there is no attribution at its schedule",
                          "compute prompts in fewer parts (a larger engine.max_num_batched_tokens, no"
                          " engine.target_batch_time_ms), give memory to preempt fewer requests, or " + INSTEAD)
    return Recorded(made, lane_result(dims, world, index, made, has_steps=False), own)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _tapes(dims: Dims, size: int, requests: Requests, world: World) -> Tape:
    return jax.vmap(functools.partial(tape.of_world, dims, size=size))(requests, world)
