"""Runs at whose schedule there are derivatives: which scenarios have such, and their runs, batch by batch."""

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from jaxsim._core.errors import InputError
from jaxsim.engine.outcomes import Lane
from jaxsim.engine.simulate import memory_bytes, program_of, run_bytes
from jaxsim.metrics import LaneResult
from jaxsim.spec.dims import Dims
from jaxsim.spec.scenario import Scenario

T = TypeVar("T")

LANES = 64
"""Runs in a batch, at most: a tape is a megabyte for a thousand requests."""

BATCH_BYTES, ROOM = 1 << 30, 0.25
"""Of a batch, at most; as a share of the machine's memory."""

RECORD_BYTES = 160
"""Of a record once the tape is laid out (`jaxsim.engine.tape.Tape`), about 35 numbers and those of the requests."""

INSTEAD = "ask for the total derivative, which is by differences of whole runs and knows every feature"


def check(made: Lane) -> None:
    """Refuse what a tape does not tell, and tangents neither. Raises `InputError`."""
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


def check_ends(results: Sequence[LaneResult]) -> None:
    """Refuse runs that a bound stopped: what they left undone is in no latency. Raises `InputError`."""
    for result in results:
        if result.fault:
            raise InputError("fault", result.fault, "stopped a run: there is no derivative at a fixed schedule",
                             "see what `jaxsim run` says of it")


def in_batches(scenarios: Sequence[Scenario], prepared: Callable[[int, Scenario], list[Lane]],
               run: Callable[[Dims, list[Lane], int], list[T | InputError]]
               ) -> Iterator[tuple[int, list[T] | InputError]]:
    """The runs of every scenario, one a seed, with its index: program by program, so that never all are held.

    prepared: the lanes of a checked scenario; run: runs of one program, of a batch of that width. Of a scenario that
    cannot be simulated, or has no derivatives (`check`), or of which a run comes to nothing, the error stands in place
    of its runs, and the others go on.
    """
    groups: dict = {}
    done: dict[int, list[T | InputError | None]] = {}
    for index, scenario in enumerate(scenarios):
        try:
            made = prepared(index, scenario.checked())
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
            for (index, seed, _), found in zip(some, run(dims, [lane for *_, lane in some], width), strict=True):
                done[index][seed] = found
            for index in dict.fromkeys(index for index, *_ in some):
                if None not in done[index]:
                    runs = done.pop(index)
                    yield index, next((one for one in runs if isinstance(one, InputError)), runs)


def filled_up(group: list[Lane], width: int) -> list[Lane]:
    """As many lanes as a batch is wide: fewer are filled up with the first."""
    return group + group[:1] * (width - len(group))


def lanes_at_once(dims: Dims) -> int:
    """How many runs are a batch: at most `LANES`, and as many as there is room for. Raises `InputError`."""
    # As drawn and as the loop reads it, and the schedule that is made of it, on the device and on the host.
    each, room = 2 * (run_bytes(dims) + RECORD_BYTES * dims.num_records), memory_bytes()
    if room and each > room:
        what = (f"schedule of {dims.num_records:,} records" if dims.num_records else
                f"derivatives by {dims.num_tangents:,} fields")
        raise InputError("workload.num_requests", dims.num_requests, f"makes a run with its {what} take about"
                         f" {each / 2**30:,.0f} GiB, this machine has {room / 2**30:,.0f} GiB",
                         f"simulate fewer requests, or {INSTEAD}")
    return max(min(LANES, int(ROOM * (room or BATCH_BYTES) / each), BATCH_BYTES // each), 1)
