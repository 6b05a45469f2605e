"""Runs with the tape of their schedule, on the host: what derivatives at a fixed schedule are made of."""

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from jaxsim._core.errors import InputError
from jaxsim.engine import tape
from jaxsim.engine.outcomes import Lane, lane_result
from jaxsim.engine.simulate import memory_bytes, prepare, program_of, run_bytes, run_together
from jaxsim.engine.tape import Tape
from jaxsim.metrics import LaneResult
from jaxsim.spec.dims import Dims
from jaxsim.spec.scenario import Scenario
from jaxsim.state.requests import Requests
from jaxsim.state.world import World

LANES = 64
"""Runs in a batch, at most: a tape is a megabyte for a thousand requests."""

BATCH_BYTES, ROOM = 1 << 30, 0.25
"""Of a batch, at most; as a share of the machine's memory."""

RECORD_BYTES = 160
"""Of a record once the tape is laid out (`jaxsim.engine.tape.Tape`), about 35 numbers and those of the requests."""

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


def check_ends(runs: Sequence[Recorded]) -> None:
    """Refuse runs that a bound stopped: what they left undone is in no latency. Raises `InputError`."""
    for run in runs:
        if run.result.fault:
            raise InputError("fault", run.result.fault, "stopped a run: there is no derivative at a fixed schedule",
                             "see what `jaxsim run` says of it")


def record(scenarios: Sequence[Scenario]) -> list[list[Recorded]]:
    """Simulate every scenario under each of its seeds, and keep the schedules. Raises `InputError`."""
    found = dict(recordings(scenarios))
    for index in range(len(scenarios)):
        if isinstance(found[index], InputError):
            raise found[index]
    return [found[index] for index in range(len(scenarios))]


def recordings(scenarios: Sequence[Scenario]) -> Iterator[tuple[int, list[Recorded] | InputError]]:
    """The same one by one, with the index of the scenario: program by program, so that never all tapes are held.

    Of a scenario that cannot be simulated, or whose tape would not tell everything (`check`) or is too short, the error
    stands in place of its runs, and the others go on.
    """
    groups: dict = {}
    done: dict[int, list[Recorded | InputError | None]] = {}
    for index, scenario in enumerate(scenarios):
        try:
            made = prepare(index, scenario.checked(), record_steps=True)
            check(made[0])
            lanes_at_once(made[0].dims)
        except InputError as error:
            yield index, error
            continue
        done[index] = [None] * len(made)
        for seed, lane in enumerate(made):
            groups.setdefault(program_of(lane), []).append((index, seed, lane))
    while groups:
        (dims, *_), group = groups.popitem()
        # Batches of one size, so that they are one program.
        width = -(-len(group) // -(-len(group) // lanes_at_once(dims)))
        for low in range(0, len(group), width):
            some = group[low:low + width]
            for (index, seed, _), run in zip(some, _run(dims, [lane for *_, lane in some], width), strict=True):
                done[index][seed] = run
            for index in dict.fromkeys(index for index, *_ in some):
                if None not in done[index]:
                    runs = done.pop(index)
                    yield index, next((one for one in runs if isinstance(one, InputError)), runs)


def lanes_at_once(dims: Dims) -> int:
    """How many runs are a batch: at most `LANES`, and as many as there is room for. Raises `InputError`."""
    # As drawn and as the loop reads it, and the schedule that is made of it, on the device and on the host.
    each, room = 2 * (run_bytes(dims) + RECORD_BYTES * dims.num_records), memory_bytes()
    if room and each > room:
        raise InputError("workload.num_requests", dims.num_requests, f"makes a run with its schedule of"
                         f" {dims.num_records:,} records take about {each / 2**30:,.0f} GiB, this machine has"
                         f" {room / 2**30:,.0f} GiB", f"simulate fewer requests, or {INSTEAD}")
    return max(min(LANES, int(ROOM * (room or BATCH_BYTES) / each), BATCH_BYTES // each), 1)


def _run(dims: Dims, group: list[Lane], width: int) -> list[Recorded | InputError]:
    """Runs of one program; fewer than its width are filled up with the first."""
    requests, world = run_together(group + group[:1] * (width - len(group)))
    # A tape has room for what may happen, of which most is empty; a power of two, so that runs share programs.
    most = int(jax.device_get(world.num_recorded).max())
    tapes = _tapes(dims, min(1 << most.bit_length(), dims.num_records), requests, world)
    tapes, world = jax.device_get((tapes, tape.left_out(world)))
    return [_recorded(dims, world, index, made, jax.tree.map(lambda x, index=index: np.asarray(x[index]), tapes))
            for index, made in enumerate(group)]


def _recorded(dims: Dims, world: World, index: int, made: Lane, own: Tape) -> Recorded | InputError:
    if own.is_full:
        return InputError("workload.num_requests", len(made.workload), f"gives a run of {int(own.count):,} records, of"
                          f" which a tape keeps {dims.num_records:,}: there is no derivative at a fixed schedule",
                          "compute prompts in fewer parts (a larger engine.max_num_batched_tokens, no"
                          " engine.target_batch_time_ms), give memory to preempt fewer requests, or " + INSTEAD)
    return Recorded(made, lane_result(dims, world, index, made, has_steps=False), own)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _tapes(dims: Dims, size: int, requests: Requests, world: World) -> Tape:
    return jax.vmap(functools.partial(tape.of_world, dims, size=size))(requests, world)
