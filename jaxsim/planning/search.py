"""Plan search: enumerate, screen in closed form, simulate the survivors in one batch, rank."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd

from jaxsim._core.errors import InputError
from jaxsim.analytic.columns import columns
from jaxsim.analytic.lower import executor_of, load_of_scenario
from jaxsim.analytic.steady import FULLEST, Executor, Steady, capacity_rps, steady_states
from jaxsim.analytic.workload import Load
from jaxsim.engine.lower import System, make_cost, resolve_system
from jaxsim.planning.candidates import Candidate, candidates, vllm_line
from jaxsim.planning.cells import cell_cost, cell_memory
from jaxsim.spec.device import load_device
from jaxsim.spec.scenario import ProfiledCost, RooflineCost, Scenario
from jaxsim.study import runner
from jaxsim.study.plots import front

RankBy = Literal["e2e", "ttft", "tpot", "p99_ttft", "p99_tpot", "goodput", "cost"]

COLUMNS = {"e2e": "mean_e2el_ms", "ttft": "mean_ttft_ms", "tpot": "mean_tpot_ms", "p99_ttft": "p99_ttft_ms",
           "p99_tpot": "p99_tpot_ms", "goodput": "screened.rate_within_limits",
           "cost": "screened.usd_per_million_output_tokens"}
"""What plans are ranked by; goodput and cost are those of the closed form, as a simulation is at one rate."""

HIGHER = ("goodput",)

SCREENED = {"e2e": "screened.e2e_ms", "ttft": "screened.ttft_ms", "tpot": "screened.tpot_ms",
            "p99_ttft": "screened.ttft_ms", "p99_tpot": "screened.tpot_ms", "goodput": COLUMNS["goodput"],
            "cost": COLUMNS["cost"]}
"""And what stands for that before anything is simulated: a closed form has means."""

LARGEST_GRID = 1024
"""Batch sizes of a rank that are screened."""

SIMULATED = ("mean_ttft_ms", "p99_ttft_ms", "mean_tpot_ms", "p99_tpot_ms", "mean_e2el_ms", "request_throughput",
             "output_throughput", "slo.attainment", "kv.peak_share", "utilisation.busy_share", "preemptions.total",
             "unstable", "fault")


@dataclasses.dataclass(frozen=True, eq=False)
class Plans:
    """Every plan that was looked at, the best first.

    table: a row a plan: rank (of those simulated), plan, device and its degrees, what was screened, what was simulated
    (means over seeds), whether it meets the limits and is on the front, and `refused`: why it cannot run, or was not
    simulated. scenarios: of rows that were simulated, by row. load: what was screened.
    """

    table: pd.DataFrame
    scenarios: dict[int, Scenario]
    candidates: dict[int, Candidate]
    load: Load

    @property
    def best(self) -> int | None:
        """Row of the best plan that was simulated to its end and is stable; None where there is none."""
        ranked = self.table.index[self.table["rank"].notna() & _is_sound(self.table)]
        return int(ranked[0]) if len(ranked) else None

    def vllm_line(self, row: int | None = None) -> str:
        """`vllm serve ...` of a row, the best one unless given: of each of its replicas. Raises `InputError`."""
        row = self.best if row is None else row
        if row is None or row not in self.scenarios:
            raise InputError("plan", row, "was not simulated", "choose a row with a rank")
        scenario = self.scenarios[row]
        return vllm_line(scenario, resolve_system(scenario).scheduler, self.candidates[row])


def search(scenario: Scenario, devices: Sequence[tuple[str, int]], *, attainment: float = 0.9, top: int = 8,
           rank_by: RankBy = "e2e", workers: int | None = None,
           progress: Callable[[str, int, int], None] = lambda *_: None) -> Plans:
    """Every plan for the scenario's model and workload on these devices: name and count of each kind.

    attainment: share of requests that must meet the scenario's limits, if it has any. top: plans that are simulated,
    the best of those that are screened as stable. rank_by: plans that meet the limits come first, in this order; then
    the others, by the share they reach. Raises `InputError`, also where not one plan can run (all refusals are in the
    message).
    """
    _check(scenario, devices, attainment, top, rank_by)
    listed = [c for name, count in devices for c in candidates(scenario.model.spec(), load_device(name).name, count)]
    load = load_of_scenario(scenario)
    made: dict[int, Scenario] = {}
    rows, screen = [], _Screen(scenario, load)
    for number, candidate in enumerate(listed):
        progress("screening", number, len(listed))
        try:
            made[number] = _scenario(scenario, candidate)
        except InputError as error:
            rows.append(_described(candidate) | {"refused": str(error)})
        else:
            rows.append(_described(candidate) | screen(candidate, made[number]))
    table = pd.DataFrame(rows)
    if "screened.tpot_ms" not in table:
        raise _none_fits(devices, rows)
    chosen = _survivors(table, scenario, top, rank_by)
    progress("simulating", 0, len(chosen))
    table = _simulated(table, [made[k] for k in chosen], chosen, scenario, attainment, workers)
    order = _order(table, rank_by)
    table = table.iloc[order]
    is_ranked = table["mean_e2el_ms"].notna().to_numpy()
    table.insert(0, "rank", pd.array(np.where(is_ranked, np.cumsum(is_ranked), 0), dtype="Int64"))
    table.loc[~is_ranked, "rank"] = pd.NA
    table = table.reset_index(drop=True)
    places = {int(old): new for new, old in enumerate(order)}
    return Plans(table, {places[k]: made[k] for k in chosen}, {places[k]: c for k, c in enumerate(listed)}, load)


def _check(scenario: Scenario, devices, attainment, top, rank_by) -> None:
    if not devices:
        raise InputError("--devices", None, "names no device", "write e.g. --devices h100:8")
    kinds = [(load_device(name).name, count) for name, count in devices]
    for name, count in kinds:
        if kinds.count((name, count)) > 1:
            raise InputError("--devices", f"{name}:{count}", "is given twice", "name each kind and count once")
    if not isinstance(scenario.cost, RooflineCost | ProfiledCost) or scenario.model is None:
        raise InputError("cost.kind", scenario.cost.__struct_config__.tag, "does not know how plans differ",
                         "use a roofline cost, with a model")
    if isinstance(scenario.cost, ProfiledCost):
        raise InputError("cost.kind", "profiled", "is of one tensor-parallel degree", "use a roofline cost")
    if not 0 < attainment <= 1:
        raise InputError("--attainment", attainment, "is not a share", "give e.g. 0.9")
    if not isinstance(top, int) or top < 1:
        raise InputError("--top", top, "leaves nothing to simulate", "give at least 1")
    if rank_by not in COLUMNS:
        raise InputError("--rank-by", rank_by, "is no order", "choose from " + ", ".join(COLUMNS))
    if scenario.cluster.pools:
        raise InputError("cluster.pools", [pool.role for pool in scenario.cluster.pools], "are not searched",
                         "leave them out, or compare them in a study")
    if scenario.engine.prefill_context_parallel_size > 1:
        raise InputError("engine.prefill_context_parallel_size", scenario.engine.prefill_context_parallel_size,
                         "takes devices that the search does not deal out",
                         "use 1, or a study: `jaxsim sweep --closed-form`")
    if scenario.cluster.variants is not None:
        raise InputError("cluster.variants", scenario.cluster.variants, "is not searched",
                         "leave it out, or compare numbers of replicas in a study")
    if scenario.workload.kind in ("closed-loop", "batch"):
        raise InputError("workload.kind", scenario.workload.kind, "has no rate of arrivals",
                         "use an open arrival process, or a trace")
    if scenario.workload.has_sessions:
        raise InputError("workload.sessions", scenario.workload.kind, "arrive as answers come out, and plans are"
                         " screened at a rate of arrivals", "use single requests")


def _scenario(base: Scenario, candidate: Candidate) -> Scenario:
    tree = base.to_dict()
    tree["device"] = {"name": candidate.device}
    return Scenario.from_dict(tree).with_values(candidate.values())


def _described(candidate: Candidate) -> dict[str, Any]:
    plan = candidate.plan
    return {"plan": candidate.label, "device": candidate.device, "num_devices": candidate.num_devices,
            "replicas": candidate.replicas, "data_parallel_size": plan.data_parallel_size,
            "tensor_parallel_size": plan.tensor_parallel_size, "pipeline_parallel_size": plan.pipeline_parallel_size,
            "enable_expert_parallel": plan.enable_expert_parallel, "is_cell_level": candidate.is_cell_level}


SHARES = np.linspace(1 / 64, FULLEST, 64, dtype=np.float32)
"""Of the capacity: rates at which plans are screened, besides the one asked for."""


@eqx.filter_jit
def _states(executor: Executor, load: Load) -> Steady:
    """At the load's rate, and at all shares of the capacity. A grid, as a root takes three times as long to compile."""
    return steady_states(executor, load, jnp.append(load.rate_rps, capacity_rps(executor, load) * SHARES))


def _rate_within(states: Steady, limits: dict[str, float]) -> float:
    """Requests/s up to which the means of states at rising shares of the capacity keep the limits; 0 if never."""
    rates = np.append(0.0, states.capacity_rps[0] * SHARES)
    room = np.min([1 - getattr(states, name) / limit for name, limit in limits.items()], axis=0) if limits else (
        np.ones(len(SHARES)))
    missed = np.flatnonzero(room <= 0)
    if not len(missed):
        return float(states.capacity_rps[0])
    first = missed[0]
    if first == 0:
        return 0.0
    part = room[first - 1] / (room[first - 1] - room[first])
    return float(rates[first] + (rates[first + 1] - rates[first]) * part)


class _Screen:
    """Closed forms of candidates: columns of a row each."""

    def __init__(self, scenario: Scenario, load: Load):
        """What all have in common."""
        self.load, limits = load, {name: getattr(scenario.slo, f"{name}_ms") for name in ("ttft", "tpot", "e2e")}
        self.limits = {f"{name}_s": limit / 1e3 for name, limit in limits.items() if limit is not None}

    def __call__(self, candidate: Candidate, scenario: Scenario) -> dict[str, Any]:
        """What is known without simulating, and why it cannot run."""
        try:
            system, executor = self._executor(candidate, scenario)
        except InputError as error:
            return {"refused": str(error)}
        states = jax.device_get(_states(executor, self.load))
        state, grid = (jax.tree.map(lambda x, part=part: x[part], states) for part in (0, slice(1, None)))
        rate = _rate_within(grid, self.limits)
        found = columns(state, rate, float(self.load.output_tokens), candidate.num_devices, system.device.usd_per_h)
        row = {f"screened.{name}": value for name, value in found.items()}
        row |= {"kv_tokens": int(system.num_blocks * system.scheduler.block_size),
                "refused": candidate.why_not_simulated}
        if system.memory is not None:
            row |= {"weight_gib": system.memory.weight_bytes / 2**30, "kv_gib": system.memory.kv_bytes / 2**30}
        return row

    @staticmethod
    def _executor(candidate: Candidate, scenario: Scenario) -> tuple[System, Executor]:
        """Raises `InputError`."""
        plan = candidate.plan
        if candidate.is_cell_level:
            system = cell_memory(scenario, plan)
        else:
            system = resolve_system(scenario)
        longest = system.max_model_len
        batches = max(system.scheduler.max_num_seqs, LARGEST_GRID) + 1
        # Operator by operator: the same small programs for all plans, where tables would be one for each.
        if candidate.is_cell_level:
            with jax.disable_jit():
                cost = cell_cost(scenario, system, batches - 1, longest)
        else:
            cost = make_cost(scenario, system, batches - 1, longest, is_one_of_many=True)
        ranks = plan.data_parallel_size if candidate.is_cell_level else None
        return system, executor_of(scenario, system, cost, num_batches=batches, num_ranks=ranks)


def executors(scenario: Scenario, device: str, num_devices: int) -> list[tuple[Candidate, Executor]]:
    """Every plan on so many devices that fits them, as the closed forms have it; nothing is simulated, or ranked.

    For studies of one set of plans under many loads. Raises `InputError` where the search would, also where not one
    plan fits.
    """
    _check(scenario, [(device, num_devices)], 0.9, 1, "e2e")
    found, refused = [], []
    for candidate in candidates(scenario.model.spec(), load_device(device).name, num_devices):
        try:
            found.append((candidate, _Screen._executor(candidate, _scenario(scenario, candidate))[1]))
        except InputError as error:
            # What cannot be cut that way, or does not fit, is not among them.
            refused.append(_described(candidate) | {"refused": str(error)})
    if not found:
        raise _none_fits([(device, num_devices)], refused)
    return found


def _none_fits(devices: Sequence[tuple[str, int]], rows: list[dict[str, Any]]) -> InputError:
    reasons = "; ".join(f"{row['device']} {row['plan']}: {row['refused']}" for row in rows)
    return InputError("--devices", [f"{name}:{count}" for name, count in devices], f"no plan can run: {reasons}",
                      "use more or larger devices, a narrower dtype, a smaller engine.max_model_len, or more of the"
                      " memory (engine.gpu_memory_utilization)")


def _survivors(table: pd.DataFrame, scenario: Scenario, top: int, rank_by: RankBy) -> list[int]:
    """Rows to simulate: within their capacity and the limits on means if any are, the best by what is screened."""
    able = table[table["refused"].isna()]
    misses = ~able["screened.is_stable"].astype(bool)
    slow = np.zeros(len(able), int)
    for column, limit in (("screened.ttft_ms", scenario.slo.ttft_ms), ("screened.tpot_ms", scenario.slo.tpot_ms),
                          ("screened.e2e_ms", scenario.slo.e2e_ms)):
        if limit is not None:
            slow = slow + (able[column] > limit).to_numpy()
    value = able[SCREENED[rank_by]].to_numpy(float) * (-1 if rank_by in HIGHER else 1)
    value = np.where(np.isnan(value), np.inf, value)
    order = np.lexsort((able["screened.tpot_ms"], value, slow, misses))
    return [int(able.index[k]) for k in order[:top]]


def _simulated(table: pd.DataFrame, scenarios: list[Scenario], rows: list[int], base: Scenario, attainment: float,
               workers: int | None) -> pd.DataFrame:
    """The table with what was simulated, the verdicts and the front."""
    runs, refusals = runner.table(scenarios, workers=workers) if scenarios else (pd.DataFrame({"point": []}), {})
    found = {name: pd.Series(np.nan, table.index, object if name == "fault" else float) for name in SIMULATED}
    for point, mine in runs.groupby("point"):
        for name in SIMULATED:
            values = mine[name].dropna() if name in mine else []
            if len(values):
                found[name][rows[int(point)]] = values.iloc[0] if name == "fault" else float(values.mean())
    refused = table["refused"].copy()
    refused[table["screened.tpot_ms"].notna() & refused.isna() & ~table.index.isin(rows)] = (
        f"below the {len(rows)} best of the closed forms, which are simulated: raise --top to simulate it")
    for point, why in refusals.items():
        refused[rows[point]] = why
    has_limits = any(limit is not None for limit in (base.slo.ttft_ms, base.slo.tpot_ms, base.slo.e2e_ms))
    table = table.assign(**found, refused=refused)
    is_sound = _is_sound(table)
    meets = (table["slo.attainment"] >= attainment) & is_sound
    table = table.assign(meets_limits=meets.where(table["mean_e2el_ms"].notna()) if has_limits else None)
    return table.assign(is_on_front=front(table.where(is_sound), ["mean_ttft_ms", "mean_tpot_ms"], [_axis(table)]))


def _is_sound(table: pd.DataFrame) -> pd.Series:
    """Rows in which no requests pile up, in most runs, and no run was stopped: its latencies are of what had ended."""
    return ~(table["unstable"] > 0.5) & table["fault"].isna()


def _axis(table: pd.DataFrame) -> str:
    """What latency is bought with: tokens by price where devices differ and all have one, else by device."""
    if table["device"].nunique() > 1 and table.loc[table["screened.tpot_ms"].notna(), COLUMNS["cost"]].notna().all():
        table["screened.output_tokens_per_usd"] = 1e6 / table[COLUMNS["cost"]]
        return "screened.output_tokens_per_usd"
    return "screened.output_tokens_per_s_per_device"


def _order(table: pd.DataFrame, rank_by: RankBy) -> np.ndarray:
    """Positions of rows: simulated, sound, meeting limits, by the metric; then screened ones; then refused ones."""
    sign = -1 if rank_by in HIGHER else 1
    simulated = (sign * table[COLUMNS[rank_by]].where(table["mean_e2el_ms"].notna())).to_numpy(float)
    screened = (sign * table[SCREENED[rank_by]]).to_numpy(float)
    is_simulated = table["mean_e2el_ms"].notna().to_numpy()
    misses = table["meets_limits"].map(lambda x: x is False or x == 0 if x is not None else False).to_numpy(bool)
    short = np.where(misses, 1 - table["slo.attainment"].fillna(0).to_numpy(float), 0.0)
    value = np.where(is_simulated, simulated, screened)
    value = np.where(np.isnan(value), np.inf, value)
    return np.lexsort((np.arange(len(table)), value, short, misses, ~_is_sound(table).to_numpy(), ~is_simulated))
