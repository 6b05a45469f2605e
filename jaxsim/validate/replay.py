"""Simulate what was measured, and compare: signed errors of latencies and throughput, with the noise of both.

    error = simulated / measured - 1
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from jaxsim._core.errors import InputError
from jaxsim.engine.simulate import simulate
from jaxsim.metrics import LaneResult, Result, request_frame
from jaxsim.spec.presets import resolve
from jaxsim.spec.scenario import Scenario
from jaxsim.validate.measured import MeasuredRun, read_run

STATISTICS = ("mean", "p50", "p90", "p95", "p99")
LATENCIES = {"ttft_ms": "ttft_s", "tpot_ms": "tpot_s", "e2el_ms": "e2e_s"}
"""Names of vLLM's benchmark client, and columns of a request table."""

BATCHES = 10
"""Stretches of a run whose spread tells how far its statistics would move if it were measured again."""

T_BATCHES = 2.262
"""Student's t at 97.5 % with BATCHES - 1 degrees of freedom."""


@dataclass(frozen=True)
class Metric:
    """One statistic on both sides; error: signed and relative. noise: half of the 95 % interval of the measured one,
    relative, from the spread over `BATCHES` stretches of the run; None where a stretch is too short for it."""

    measured: float
    simulated: float
    noise: float | None = None

    @property
    def error(self) -> float:
        """Simulated over measured, less 1."""
        return self.simulated / self.measured - 1


@dataclass(frozen=True, eq=False)
class Comparison:
    """A replay beside its measurement.

    metrics: by name. requests: what was compared, one row a request: `row` of the file, `measured_` and simulated
    columns. result: of the simulation. utilisation: what the simulated engine was busy with, None where nothing ran.
    notes: what a reader should know.
    """

    run: MeasuredRun
    result: Result
    metrics: dict[str, Metric]
    requests: pd.DataFrame
    utilisation: dict[str, float | None]
    notes: tuple[str, ...]

    @property
    def lane(self) -> LaneResult:
        """The run that was simulated."""
        return self.result.lanes[0][0]


def replay(scenario: Scenario, path: str, *, skip: int = 0) -> Comparison:
    """Replay the run measured in `path` on the system of `scenario`, whose workload and seeds are not used.

    skip: the first requests are replayed and not compared (warm-up). Raises `InputError`.
    """
    scenario, run = system_and_run(scenario, path, skip)
    result = simulated([scenario], run, record_steps=True)
    lane = result.lanes[0][0]
    frame = with_measured(request_frame(lane), run, skip)
    return Comparison(run, result, compare(frame), frame, utilisation(lane),
                      tuple(_notes(run, scenario, lane, frame, skip)))


def system_and_run(scenario: Scenario, path: str, skip: int) -> tuple[Scenario, MeasuredRun]:
    """A run, and the scenario with it as its workload. Raises `InputError`."""
    scenario = scenario.with_values({"workload": {"kind": "trace", "trace": str(path)}, "num_seeds": 1,
                                     "warmup_s": None})
    run = read_run(path, resolve(scenario.engine).block_size)
    run.check_skip(skip)
    return scenario, run


def simulated(scenarios: Sequence[Scenario], run: MeasuredRun, **options: Any) -> Result:
    """The run on each system. Raises `InputError`, for a request with its row in the file."""
    try:
        return simulate(scenarios, workload=run.workload, **options)
    except InputError as error:
        found = re.search(r"workload request (\d+)$", error.field)
        if not found:
            raise
        raise InputError(f"measured row {run.rows[int(found[1])]}", error.value, error.problem,
                         error.remedy) from None


def with_measured(frame: pd.DataFrame, run: MeasuredRun, skip: int) -> pd.DataFrame:
    """Requests that were answered, but for the first `skip` of the run, with measured latencies beside simulated."""
    compared = run.is_answered & (np.arange(len(run.workload)) >= skip)
    gaps = np.maximum(run.workload.output_tokens - 1, 1)
    tpot_s = np.where(run.workload.output_tokens > 1, (run.e2e_s - run.ttft_s) / gaps, np.nan)
    frame = frame.assign(row=run.rows, measured_ttft_s=run.ttft_s, measured_tpot_s=tpot_s, measured_e2e_s=run.e2e_s)
    return frame[compared]


def compare(frame: pd.DataFrame) -> dict[str, Metric]:
    """Statistics of both sides over the same requests; one that either side does not have, or that is 0 when measured,
    is left out."""
    metrics = {}
    for name, column in LATENCIES.items():
        pair = frame[[f"measured_{column}", column]].dropna().to_numpy() * 1e3
        if not len(pair):
            continue
        stretches = np.array_split(pair[:, 0], BATCHES) if len(pair) >= 20 * BATCHES else []
        for statistic in STATISTICS:
            measured, simulated = (_statistic(statistic, x) for x in pair.T)
            if measured == 0:
                continue
            # A stretch has to have a few requests beyond a percentile.
            beyond = 1.0 if statistic == "mean" else 1 - float(statistic[1:]) / 100
            noise = None
            if stretches and beyond * len(stretches[-1]) >= 5:
                # From neighbours, so that a load that grows, or goes in stages, does not count as noise.
                spread = np.sqrt(np.mean(np.diff([_statistic(statistic, x) for x in stretches]) ** 2) / 2)
                noise = float(T_BATCHES * spread / np.sqrt(BATCHES) / measured)
            metrics[f"{statistic}_{name}"] = Metric(measured, simulated, noise)
    both = frame.dropna(subset=["measured_e2e_s", "e2e_s"])
    if len(both) > 1:
        tokens = float(both["output_tokens"].sum())
        spans = [(both["arrival_s"] + both[c]).max() - both["arrival_s"].min() for c in ("measured_e2e_s", "e2e_s")]
        metrics["output_throughput"] = Metric(*(tokens / span for span in spans))
    return metrics


def _statistic(name: str, values: np.ndarray) -> float:
    return float(np.mean(values) if name == "mean" else np.percentile(values, float(name[1:])))


def utilisation(lane: LaneResult) -> dict[str, float | None]:
    """Shares of the run: an iteration in flight, KV blocks in use (mean, peak); sequences running in the mean."""
    duration_s = lane.duration_s or np.nan
    found = {"busy": float(np.mean(lane.busy_s)) / duration_s,
             "running": float(np.sum(lane.running_s)) / duration_s}
    if lane.num_blocks:
        found["kv_mean"] = float(np.mean(lane.kv_block_s)) / duration_s / lane.num_blocks
        found["kv_peak"] = float(np.max(lane.kv_peak_blocks)) / lane.num_blocks
    if lane.cached_tokens is not None:
        found["cached"] = float(lane.cached_tokens.sum() / lane.input_tokens.sum())
    if lane.extrapolated_share is not None:
        found["extrapolated"] = lane.extrapolated_share
    return {name: float(value) if np.isfinite(value) else None for name, value in found.items()}


def _notes(run: MeasuredRun, scenario: Scenario, lane: LaneResult, frame: pd.DataFrame, skip: int):
    if lane.fault:
        yield f"the simulation stopped before the end: {lane.fault}"
    failed = len(run.workload) - int(run.is_answered.sum())
    if failed:
        yield f"{failed} requests failed when measured: replayed, not compared"
    if run.num_dropped:
        yield f"{run.num_dropped} rows have no tokens and were left out"
    if not run.was_sorted:
        yield "rows were sorted by arrival"
    for name, column in LATENCIES.items():
        zero = int((frame[f"measured_{column}"] == 0).sum())
        if zero:
            yield (f"measured {name.removesuffix('_ms').upper()} of {zero:,} requests is 0: no error can be told of"
                   " statistics that are 0")
    if run.looks_like_ms:
        yield (f"{run.mean_at_once:.2g} requests were on their way on average: check that arrival_s is in seconds, not"
               " milliseconds")
    if skip:
        yield f"the first {skip} requests were replayed, not compared"
    elif len(run.workload) >= 500:
        yield "nothing was skipped: engines are slow at first (graphs, caches); --skip leaves a warm-up out"
    if run.workload.prefix_hashes is not None and not scenario.engine.enable_prefix_caching:
        yield "the run names blocks of its prompts, and engine.enable_prefix_caching is off"
    if run.workload.prefix_hashes is None and scenario.engine.enable_prefix_caching:
        yield "engine.enable_prefix_caching is on, and the run does not name blocks of its prompts: nothing is found"
    if lane.front_end_s:
        yield (f"{lane.front_end_s * 1e3:g} ms of every TTFT are outside the engine (cost.front_end_s; 0 for clocks"
               " inside it)")
    device = scenario.device.spec() if scenario.device else None
    if device is not None and device.calibration != "measured" and scenario.cost.__struct_config__.tag == "roofline":
        yield f"{device.name} was not calibrated: constants of {device.family}"
