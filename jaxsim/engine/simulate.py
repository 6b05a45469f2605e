"""Simulate scenarios: group those of one structure, run each group as one program, hand back host arrays."""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from jaxsim.engine import loop, lower
from jaxsim.engine.common import Params
from jaxsim.kernels import clock, packed
from jaxsim.metrics import LaneResult, Result
from jaxsim.spec.dims import Dims
from jaxsim.spec.scenario import Scenario
from jaxsim.state import world as w
from jaxsim.state.world import World
from jaxsim.workload.workload import Workload

RECORDS_A_REQUEST = 8
"""Rows of the tape a request, on top of a thousand."""

SMALLEST_SLOTS = 8

FAULTS = {
    w.STUCK: "a scheduling pass could place nothing and never would: a request needs more than the engine has",
    w.STEP_LIMIT: f"more than {lower.MAX_STEPS_A_TOKEN} steps for every token of the workload: the scheduler is"
                  " going in circles (the KV pool is too small for the preemption rule)",
}


@dataclass(frozen=True)
class _Lane:
    """One scenario, one seed, on its way through the engine."""

    scenario: int
    system: lower.System
    workload: Workload
    dims: Dims
    params: Params


def simulate(scenarios: Scenario | Sequence[Scenario], *, record_steps: bool = False) -> Result:
    """Simulate every scenario under every one of its seeds.

    record_steps: keep a tape of iterations, for timelines and curves over time.

    Returns host arrays a run and pandas frames made from them. Raises `InputError` for whatever is wrong with a
    scenario, before anything is compiled. A run that a bound stopped says so in its `fault`.
    """
    scenarios = [scenarios] if isinstance(scenarios, Scenario) else list(scenarios)
    lanes = [lane for index, scenario in enumerate(scenarios)
             for lane in _prepare(index, scenario.checked(), record_steps)]
    results: list[list[LaneResult]] = [[] for _ in scenarios]
    groups: dict = {}
    for lane in lanes:
        leaves, structure = jax.tree.flatten(lane.params)
        shapes = tuple(np.shape(x) for x in leaves)
        groups.setdefault((lane.dims, structure, shapes), []).append(lane)
    done = {}
    for (dims, *_), group in groups.items():
        params = _stack([lane.params for lane in group])
        requests = _stack([lower.make_requests(lane.workload, dims.num_requests) for lane in group])
        world = jax.device_get(loop.run(dims, params, requests))
        done |= {id(lane): _unpack(dims, world, index, lane) for index, lane in enumerate(group)}
    for lane in lanes:
        results[lane.scenario].append(done[id(lane)])
    return Result(scenarios, results)


def _stack(trees):
    return jax.tree.map(lambda *leaves: jnp.asarray(np.stack(leaves)), *trees)


def _prepare(index: int, scenario: Scenario, record_steps: bool) -> list[_Lane]:
    system = lower.resolve_system(scenario)
    workloads = [lower.make_workload(scenario, seed) for seed in scenario.seeds]
    for workload in workloads:
        lower.check_requests(system, workload)
    most = max(len(workload) for workload in workloads)
    longest = max(int((workload.input_tokens + workload.output_tokens).max()) for workload in workloads)
    # Never more slots than could be filled; powers of two, so that scenarios share programs.
    slots = max(min(system.scheduler.max_num_seqs, most), SMALLEST_SLOTS)
    dims = Dims(num_requests=most, num_instances=scenario.cluster.replicas,
                num_slots=1 << (slots - 1).bit_length(), block_size=system.scheduler.block_size,
                num_records=RECORDS_A_REQUEST * most + 1000 if record_steps else 0)
    lower.check_counters(dims, workloads)
    cost = jax.device_get(lower.make_cost(scenario, system, dims.num_slots, longest))
    return [_Lane(index, system, workload, dims,
                  lower.make_params(scenario, system, cost, lower.step_limit(workload)))
            for workload in workloads]


def _unpack(dims: Dims, world: World, lane: int, made: _Lane) -> LaneResult:
    workload, count = made.workload, len(made.workload)
    is_finished = np.zeros(count, bool)
    counts = packed.from_row(w.row_templates(dims)[0], world.counts[lane].T)
    times = packed.from_row(w.row_templates(dims)[1], world.clocks[lane].T)

    def seconds(array):
        return clock.join_reference(*array[lane].T)

    finish_s = seconds(world.finished)[:count]
    is_finished = finish_s > 0
    log_row, instance = world.placed[lane, :count].T
    first_s = seconds(world.first_tokens)
    scheduled_s = seconds(world.scheduled)[:count]

    def joined(pair):
        return pair.hi.astype(np.float64) + pair.lo.astype(np.float64)

    fault = int(world.fault[lane])
    names = [text for bit, text in FAULTS.items() if fault & bit]
    return LaneResult(
        arrival_s=np.asarray(workload.arrival_s), input_tokens=workload.input_tokens,
        output_tokens=workload.output_tokens, max_tokens=workload.max_tokens,
        scheduled_s=np.where(instance >= 0, scheduled_s, np.nan),
        first_token_s=np.where(log_row >= 0, first_s[log_row], np.nan),
        finish_s=np.where(is_finished, finish_s, np.nan),
        stall_s=clock.from_integers_reference(world.stalled[lane, :count]), preemptions=world.progress[lane, :count, 1],
        instance=np.maximum(instance, 0), priority=workload.priority, tenant=workload.tenant,
        tenant_names=workload.tenant_names, status=np.where(is_finished, 0, 1).astype(np.int8),
        itl_counts=world.itl[lane], busy_s=joined(times.busy), kv_block_s=joined(times.held),
        running_s=joined(times.running), kv_peak_blocks=counts.rank.peak_blocks,
        num_blocks=made.system.num_blocks if made.system.scheduler.kv_accounting else 0,
        num_iterations=int(counts.batch.num_iterations.sum()), fault="; ".join(names),
        steps=_tape(dims, world, lane) if dims.num_records else None)


def _tape(dims: Dims, world: World, lane: int) -> dict[str, np.ndarray]:
    length = min(int(world.num_recorded[lane]), dims.num_records)
    epoch, hi, lo, duration = world.tape_times[lane, :length].T
    names = ("instance", "running", "waiting", "used_blocks", "iterations", "prefill_tokens", "decode_seqs")
    columns = dict(zip(names, world.tape_counts[lane, :length].T, strict=True))
    return {"time_s": clock.join_reference(epoch, hi, lo), "duration_s": duration.astype(np.float64), **columns}
