"""A tile: runs that share a compiled program, simulated in one batch, as arrays with a row for each run."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from jaxsim.engine import loop, lower
from jaxsim.engine.common import Params
from jaxsim.engine.outcomes import (
    FAULTS,
    block_seconds,
    blocks_of,
    ends,
    handed_over,
    images_of,
    loaded,
    lost_of,
    migrated,
    swapped,
    switched_roles,
)
from jaxsim.kernels import clock
from jaxsim.metrics import FINISHED
from jaxsim.spec.dims import Dims
from jaxsim.state import world as w
from jaxsim.state.requests import Requests
from jaxsim.state.world import World
from jaxsim.study.lanes import Run

MULTIPLE = 8
"""Batches are padded to this, as vectors are."""


@dataclasses.dataclass(frozen=True, eq=False)
class Runs:
    """What happened, a row a run; requests behind the last of a run are not real. Names as in `LaneResult`."""

    is_real: Bool[np.ndarray, "runs requests"]
    is_finished: Bool[np.ndarray, "runs requests"]
    arrival_s: Float[np.ndarray, "runs requests"]
    input_tokens: Int[np.ndarray, "runs requests"]
    output_tokens: Int[np.ndarray, "runs requests"]
    scheduled_s: Float[np.ndarray, "runs requests"]
    first_token_s: Float[np.ndarray, "runs requests"]
    finish_s: Float[np.ndarray, "runs requests"]
    stall_s: Float[np.ndarray, "runs requests"]
    preemptions: Int[np.ndarray, "runs requests"]
    itl_counts: Int[np.ndarray, "runs bins"]
    busy_s: Float[np.ndarray, "runs instances"]
    device_busy_s: Float[np.ndarray, "runs instances"]
    kv_block_s: Float[np.ndarray, "runs instances"]
    kv_peak_blocks: Int[np.ndarray, "runs instances"]
    running_s: Float[np.ndarray, "runs instances"]
    cached_tokens: Int[np.ndarray, "runs requests"] | None
    accepted_s: Float[np.ndarray, "runs requests"] | None
    delivered_s: Float[np.ndarray, "runs requests"] | None
    decode_instance: Int[np.ndarray, "runs requests"] | None
    migrations: Int[np.ndarray, "runs requests"] | None
    downtime_s: Float[np.ndarray, "runs requests"] | None
    last_instance: Int[np.ndarray, "runs requests"] | None
    aborted_migrations: Int[np.ndarray, "runs causes"] | None
    instance_s: Float[np.ndarray, " runs"] | None
    starts: Int[np.ndarray, " runs"] | None
    drains: Int[np.ndarray, " runs"] | None
    role_switches: Int[np.ndarray, " runs"] | None
    drain_s: Float[np.ndarray, " runs"] | None
    session: Int[np.ndarray, "runs requests"] | None
    turn: Int[np.ndarray, "runs requests"] | None
    num_context_limited: Int[np.ndarray, " runs"]
    num_blocks: Int[np.ndarray, "runs instances"]
    num_iterations: Int[np.ndarray, " runs"]
    front_end_s: Float[np.ndarray, " runs"]
    fault: tuple[str, ...]
    status: Int[np.ndarray, "runs requests"] | None = None
    attempts: Int[np.ndarray, "runs requests"] | None = None
    ended_s: Float[np.ndarray, "runs requests"] | None = None
    swaps: Int[np.ndarray, "runs requests"] | None = None
    swap_s: Float[np.ndarray, "runs requests"] | None = None
    swap_delay_s: Float[np.ndarray, "runs instances"] | None = None
    swapped_blocks: Int[np.ndarray, "runs 2"] | None = None
    num_images: Int[np.ndarray, "runs requests"] | None = None
    encoded_s: Float[np.ndarray, "runs requests"] | None = None
    embedded_s: Float[np.ndarray, "runs requests"] | None = None
    losses: Int[np.ndarray, "runs requests"] | None = None
    restarts: Int[np.ndarray, "runs requests"] | None = None
    num_outages: Int[np.ndarray, " runs"] | None = None
    down_s: Float[np.ndarray, "runs instances"] | None = None
    loaded_tokens: Int[np.ndarray, "runs requests"] | None = None
    load_s: Float[np.ndarray, "runs instances"] | None = None
    load_delay_s: Float[np.ndarray, "runs instances"] | None = None
    fetched_tokens: Int[np.ndarray, "runs requests"] | None = None
    loaded_from: Int[np.ndarray, "runs requests"] | None = None
    variant: Int[np.ndarray, "runs requests"] | None = None
    left_s: Float[np.ndarray, "runs requests"] | None = None


def simulate_runs(dims: Dims, runs: Sequence[Run], lanes: int | None = None) -> Runs:
    """Simulate runs whose programs are one. lanes: width of the batch, a program of its own; the rest is padding."""
    count = len(runs)
    width = max(lanes or 0, -(-count // MULTIPLE) * MULTIPLE)
    # Copies of the first are as good as nothing, and as long as it.
    padded = [*runs, *[runs[0]] * (width - count)]
    params, requests = together(dims, padded)
    world = jax.device_get(loop.run_on_one_device(dims, params, requests))
    return unpack(dims, jax.tree.map(lambda leaf: leaf[:count], world), runs)


def together(dims: Dims, runs: Sequence[Run]) -> tuple[Params, Requests]:
    """Parameters and requests with a leading axis of runs; what runs share is stacked once."""
    params = _gathered([run.params for run in runs])
    params = eqx.tree_at(lambda p: p.max_steps, params, np.array([run.max_steps for run in runs], np.int32))
    packed: dict[tuple, Requests] = {}
    keys = [(id(run.workload), id(run.patience), lower.is_split(run.scenario), run.params.flags.order,
             tuple(int(x) for x in jax.tree.leaves(run.params.slack))) for run in runs]
    for key, run in zip(keys, runs, strict=True):
        if key not in packed:
            packed[key] = lower.make_requests(run.workload, dims, run.prefixes, patience=run.patience,
                                              is_split=key[2], order=key[3], slack=run.params.slack)
    requests = _gathered([packed[key] for key in keys])
    rows = dims.num_requests + 1
    seconds = np.full((len(runs), rows + 1), np.inf)
    for row, run in zip(seconds, runs, strict=True):
        row[:len(run.arrival_s)] = run.arrival_s
    is_real = np.isfinite(seconds)
    epoch, hi, lo = clock.split_reference(clock.round_arrivals_reference(np.where(is_real, seconds, 0.0)))
    arrival = np.stack([epoch.astype(np.float32), np.where(is_real, hi, np.float32(np.inf)), lo], axis=-1)
    return params, eqx.tree_at(lambda r: r.arrival, requests,
                               np.concatenate([arrival[:, :-1], arrival[:, 1:]], axis=-1))


def _gathered(trees):
    """Stacked along a new axis; each tree is stacked once, however often it stands there."""
    places, index = _distinct(trees)

    def gather(*leaves):
        if len(leaves) == 1:
            return np.broadcast_to(np.asarray(leaves[0]), (len(index), *np.shape(leaves[0])))
        return np.stack(leaves)[index]

    return jax.tree.map(gather, *(trees[at] for at in places))


def _distinct(things: Sequence[Any]) -> tuple[list[int], Int[np.ndarray, " things"]]:
    """Places of things that are not one and the same, and which of these each is."""
    first: dict[int, int] = {}
    for at, thing in enumerate(things):
        first.setdefault(id(thing), at)
    order = {key: k for k, key in enumerate(first)}
    return list(first.values()), np.array([order[id(thing)] for thing in things])


def unpack(dims: Dims, world: World, runs: Sequence[Run]) -> Runs:
    """Host arrays of a batch that has ended."""
    rows = slice(0, dims.num_requests)
    counts, times = w.count_rows(dims).everything(world.counts), w.clock_rows(dims).everything(world.clocks)

    def seconds(stamps):
        return clock.join_reference(stamps[..., 0], stamps[..., 1], stamps[..., 2])

    def joined(pair):
        return (pair.hi.astype(np.float64) + pair.lo.astype(np.float64)).reshape(len(runs), -1)

    lengths = np.array([len(run.workload) for run in runs])
    is_real = np.arange(dims.num_requests) < lengths[:, None]
    finish_s = seconds(world.finished[:, rows])
    is_finished = is_real & (finish_s > 0)
    log_row, instance = world.placed[:, rows, 0], world.placed[:, rows, 1]
    first_s = np.take_along_axis(seconds(world.first_tokens), np.maximum(log_row, 0), axis=1)

    places, index = _distinct([run.workload for run in runs])

    def column(name):
        out = np.zeros((len(places), is_real.shape[1]), np.int64)
        for row, at in zip(out, places, strict=True):
            row[:lengths[at]] = getattr(runs[at].workload, name)
        return out[index]

    if runs[0].params.source.answers:
        due = world.due[:, rows]
        arrival_s = np.where(np.isinf(due[..., 1]), np.nan, seconds(due))
    else:
        arrival_s = np.zeros(is_real.shape)
        for row, run in zip(arrival_s, runs, strict=True):
            row[:len(run.arrival_s)] = run.arrival_s
    nan = np.float64(np.nan)
    first_token_s, clients = np.where(is_real & (log_row >= 0), first_s, nan), {}
    if dims.has_clients:
        clients = ends(world, np.s_[:, rows], np.where(is_real, finish_s, 0.0), first_token_s)
        del clients["instance"]
        first_token_s, is_finished = clients.pop("first_token_s"), clients["status"] == FINISHED
    lost = lost_of_runs(world, runs, rows, clients.get("ended_s"))
    preemptions = world.progress[:, rows, 1] - lost.pop("repeated", 0)
    moved = handed_over(world, np.s_[:, rows]) | migrated(world, np.s_[:], np.s_[:, rows], finish_s)
    return Runs(
        is_real=is_real, is_finished=is_finished, arrival_s=arrival_s, input_tokens=column("input_tokens"),
        output_tokens=column("output_tokens"),
        scheduled_s=np.where(is_real & (instance >= 0), seconds(world.scheduled[:, rows]), nan),
        first_token_s=first_token_s, finish_s=np.where(is_finished, finish_s, nan),
        stall_s=clock.from_integers_reference(world.stalled[:, rows]), preemptions=preemptions,
        itl_counts=world.itl, busy_s=np.repeat(joined(times.executor.busy), dims.num_ranks, axis=1),
        device_busy_s=np.repeat(joined(times.executor.alone) / dims.num_stages if dims.num_stages > 1
                                else joined(times.executor.busy), dims.num_ranks, axis=1),
        kv_block_s=joined(times.rank.held), kv_peak_blocks=counts.rank.peak_blocks.reshape(len(runs), -1),
        running_s=joined(times.rank.running),
        cached_tokens=None if world.cached is None else world.cached[:, rows],
        variant=column("variant") if dims.has_variants else None,
        **{name: moved.get(name) for name in ("accepted_s", "delivered_s", "left_s", "decode_instance")},
        **{name: moved.get(name) for name in ("migrations", "downtime_s", "last_instance", "aborted_migrations",
                                              "instance_s", "starts", "drains")},
        **{name: switched_roles(world, np.s_[:]).get(name) for name in ("role_switches", "drain_s")},
        session=_labels(runs, "session", rows), turn=_labels(runs, "turn", rows),
        num_context_limited=np.array([run.workload.num_context_limited for run in runs]),
        num_blocks=np.stack([np.broadcast_to(blocks_of(run.system), dims.all_ranks) for run in runs]),
        num_iterations=counts.executor.num_iterations.reshape(len(runs), -1).sum(axis=1),
        front_end_s=np.array([run.front_end_s for run in runs]),
        fault=tuple("; ".join(text for bit, text in FAULTS.items() if int(bits) & bit) for bits in world.fault),
        **clients, **lost, **swapped(dims, world, np.s_[:, rows], slice(None)), **_images(dims, world, runs),
        **loaded(dims, world, np.s_[:, rows], slice(None), np.array([block_seconds(run.params) for run in runs])))


def _images(dims: Dims, world: World, runs: Sequence[Run]) -> dict[str, np.ndarray]:
    """What `Runs` has of images; nothing where no run has any."""
    found: dict[str, np.ndarray] = {}
    for row, run in enumerate(runs):
        own = images_of(dims, world, row, run.workload, lower.is_split(run.scenario))
        for name, values in own.items():
            whole = found.setdefault(name, np.zeros((len(runs), dims.num_requests), values.dtype))
            whole[row, :len(values)] = values
    return found


def lost_of_runs(world: World, runs: Sequence[Run], rows: slice, ended_s: np.ndarray | None) -> dict[str, np.ndarray]:
    """`lost_of` every run, with an axis of runs in front."""
    if world.lost is None:
        return {}
    each = [lost_of(world, run.params, np.s_[k, rows], ended_s[k]) for k, run in enumerate(runs)]
    return {name: np.stack([one[name] for one in each]) for name in each[0]}


def _labels(runs: Sequence[Run], name: str, rows: slice) -> Int[np.ndarray, "runs requests"] | None:
    """`session` or `turn` of the requests of all runs, -1 where there are none; None where no run has any."""
    if all(run.workload.session is None for run in runs):
        return None
    out = np.full((len(runs), rows.stop), -1)
    for row, run in zip(out, runs, strict=True):
        if run.workload.session is not None:
            row[:len(run.workload)] = getattr(run.workload, name)
    return out
