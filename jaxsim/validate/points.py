"""Operating points at fixed concurrency: so many clients, each with one request at a time, against TTFT and TPOT.

A point is a closed loop: all clients send at once, each sends again as soon as it has its answer, `WAVES` requests a
client. Latencies are means over all of them, the first wave included, as benchmark clients report them.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from jaxsim._core.errors import InputError
from jaxsim.engine import lower
from jaxsim.engine.simulate import simulate
from jaxsim.metrics import LaneResult, request_frame
from jaxsim.profiles import _table
from jaxsim.spec.scenario import ClusterSection, FittedCost, Scenario
from jaxsim.validate import silicon

COLUMNS = ("model", "device", "tensor_parallel_size", "data_parallel_size", "expert_parallel_size", "isl", "osl",
           "concurrency", "ttft_ms", "tpot_ms")
OPTIONAL = ("preset", "dtype", "kv_dtype", "range_ratio")
"""What differs between points beyond that: the engine imitated, number formats, and the shortest length as a share of
isl and osl, between which and the whole lengths are uniform (benchmark clients call it so; 1 = all are equal). A column
with a dot in its name is a field of the scenario ("engine.max_num_batched_tokens")."""

FIELD = "points"

WAVES = 10
"""Requests a client. Source: InferenceX sends ten prompts for every client."""

SPARE_TOKENS = 256
"""Of max_model_len beyond the longest request, unless the scenario says otherwise."""

USUAL_MS = {"ttft_ms": (1.0, 1e6), "tpot_ms": (0.1, 5000.0)}
"""Medians outside of these are in another unit."""


@dataclass(frozen=True, eq=False)
class Points:
    """Points measured and simulated: the file's columns, `simulated_ttft_ms`, `simulated_tpot_ms`, their signed
    relative errors `ttft_ms_error`, `tpot_ms_error`, and `refused`, why a point was not simulated. The index is the row
    of the file. num_stopped: points whose simulation a bound stopped."""

    frame: pd.DataFrame
    notes: tuple[str, ...]
    num_stopped: int = 0

    def summary(self) -> dict[str, dict[str, float]]:
        """Median and 90th percentile of absolute errors, median error, by latency."""
        found = {}
        for name in ("ttft_ms", "tpot_ms"):
            errors = self.frame[f"{name}_error"].dropna().to_numpy(np.float64)
            if len(errors):
                found[name] = {"median_absolute_error": float(np.median(np.abs(errors))),
                               "p90_absolute_error": float(np.percentile(np.abs(errors), 90)),
                               "median_error": float(np.median(errors)), "count": len(errors)}
        return found


def read_points(path: str | Path) -> tuple[pd.DataFrame, list[str]]:
    """The points of a file, checked, and what was left out of it. Raises `InputError` naming the row.

    A table with aiconfigurator's columns (`jaxsim.validate.silicon`) is read as it is.
    """
    frame, notes = _table.load(path, FIELD), []
    if silicon.is_silicon(frame):
        frame, notes = silicon.convert(frame)
    _table.check_columns(frame, path, COLUMNS, FIELD)
    for name in ("model", "device"):
        if frame[name].isna().any():
            raise InputError(f"{FIELD} row {frame.index[frame[name].isna()][0]}, {name}", None, "is missing",
                             "give its name")
    for name in COLUMNS[2:8]:
        frame[name] = _table.column(frame, name, FIELD, low=1, is_whole=True).astype(np.int64)
    # One token has no time between tokens.
    is_single = frame["osl"] == 1
    frame["tpot_ms"] = frame["tpot_ms"].mask(is_single)
    for name in ("ttft_ms", "tpot_ms"):
        frame[name] = _table.column(frame, name, FIELD, low=1e-6, may_be_empty=name == "tpot_ms")
    lacking = frame.index[frame["tpot_ms"].isna() & ~is_single]
    if len(lacking):
        raise InputError(f"{FIELD} row {lacking[0]}, tpot_ms", None, "is missing", "fix or remove that row")
    if "range_ratio" in frame:
        frame["range_ratio"] = _table.column(frame, "range_ratio", FIELD, low=1e-6, may_be_empty=True)
    for name, (low, high) in USUAL_MS.items():
        middle = float(frame[name].median())
        if middle < low or middle > high:
            raise InputError(f"{FIELD} {name}", f"{middle:.3g} in the median", "cannot be milliseconds",
                             "multiply by 1000 if they are seconds, divide if they are microseconds")
    return frame, notes


def point_scenario(base: dict[str, Any], row: dict[str, Any]) -> Scenario:
    """The closed loop of one point on top of the fields of a scenario. Raises `InputError`."""
    tree = {**base, "schema_version": 1, "num_seeds": 1}
    tree.pop("warmup_s", None)
    model = {key: value for key, value in tree.get("model", {}).items() if key not in ("name", "config", "dimensions")}
    tree["model"] = {**model, "name": str(row["model"]), **{k: row[k] for k in ("dtype", "kv_dtype") if _given(row, k)}}
    tree["device"] = {"name": str(row["device"])}
    longest = int(row["isl"]) + int(row["osl"]) + SPARE_TOKENS
    engine = dict(tree.get("engine", {}))
    if _given(row, "preset"):
        engine["preset"] = str(row["preset"])
    tensor, data, expert = (int(row[f"{kind}_parallel_size"]) for kind in ("tensor", "data", "expert"))
    if expert not in (1, tensor * data):
        raise InputError("expert_parallel_size", expert, f"is neither 1 nor {tensor * data}, all ranks",
                         "experts are spread over all ranks, or cut over the tensor-parallel ones")
    engine |= {"tensor_parallel_size": tensor, "data_parallel_size": data, "enable_expert_parallel": expert > 1}
    engine.setdefault("max_model_len", longest)
    engine.setdefault("max_num_seqs", max(256, -(-int(row["concurrency"]) // data)))
    tree["engine"] = engine
    ratio = float(row["range_ratio"]) if _given(row, "range_ratio") else 1.0
    tree["workload"] = {
        "kind": "closed-loop", "concurrency": int(row["concurrency"]),
        "num_requests": WAVES * int(row["concurrency"]),
        "input": _length(int(row["isl"]), ratio), "output": _length(int(row["osl"]), ratio)}
    for name in row:
        if "." in name and _given(row, name):
            section, _, field = name.partition(".")
            value = row[name]
            whole = isinstance(value, float) and value.is_integer()
            tree[section] = {**tree.get(section, {}), field: int(value) if whole else value}
    return Scenario.from_dict(tree)


def _given(row: dict[str, Any], name: str) -> bool:
    value = row.get(name)
    return value is not None and value == value and value != ""


def _length(tokens: int, ratio: float) -> Any:
    if ratio >= 1:
        return tokens
    return {"kind": "uniform", "min_tokens": max(round(ratio * tokens), 1), "max_tokens": tokens}


def simulate_points(path: str | Path, base: Scenario | None = None) -> Points:
    """Simulate every point of a file; one that cannot be says why, and the others go on.

    base: engine, cost and limits that all points share. Raises `InputError` where the file is wrong, or no point can
    be simulated.
    """
    frame, left_out = read_points(path)
    common: dict[str, Any] = {}
    if base is not None:
        if isinstance(base.cost, FittedCost):
            raise InputError("cost.kind", "fitted", "has one system's coefficients, and points have many systems",
                             "use kind = 'roofline'")
        if base.cluster != ClusterSection():
            left_out.append("a point is one instance: [cluster] of the scenario is not used")
        common = {k: v for k, v in base.to_dict().items() if k not in ("workload", "device", "cluster")}
    scenarios, refused, first = {}, dict.fromkeys(frame.index), None
    for index, row in zip(frame.index, frame.to_dict("records"), strict=True):
        try:
            scenario = point_scenario(common, row)
            lower_check(scenario)
            scenarios[index] = scenario
        except InputError as error:
            refused[index] = str(error)
            first = first or InputError(f"{FIELD} row {index}: {error.field}", error.value, error.problem, error.remedy)
    if not scenarios:
        raise InputError(first.field, first.value, f"{first.problem} (and none of the {len(frame)} points can be"
                         " simulated)", first.remedy)
    result = simulate(list(scenarios.values()))
    done = {index: lanes[0] for index, lanes in zip(scenarios, result.lanes, strict=True)}
    stopped = {index: lane.fault for index, lane in done.items() if lane.fault}
    simulated = {index: latencies_ms(lane) for index, lane in done.items() if index not in stopped}
    for i, name in enumerate(("ttft_ms", "tpot_ms")):
        frame[f"simulated_{name}"] = [simulated[k][i] if k in simulated else np.nan for k in frame.index]
        frame[f"{name}_error"] = frame[f"simulated_{name}"] / frame[name] - 1
    refused |= stopped
    frame["refused"] = [refused[k] for k in frame.index]
    return Points(frame, (*left_out, *_notes(frame, scenarios)), len(stopped))


def lower_check(scenario: Scenario) -> None:
    """Refuse now what cannot be simulated."""
    system = lower.resolve_system(scenario)
    lower.check_requests(system, lower.make_workload(scenario, 0))


def latencies_ms(lane: LaneResult) -> tuple[float, float]:
    """Mean TTFT and TPOT of all requests."""
    frame = request_frame(lane)
    return float(frame["ttft_s"].mean() * 1e3), float(frame["tpot_s"].mean() * 1e3)


def _notes(frame: pd.DataFrame, scenarios: dict[int, Scenario]):
    many = int(frame["refused"].notna().sum())
    if many:
        first = frame[frame["refused"].notna()].iloc[0]
        yield (f"{many} of {len(frame)} points were not simulated, the first: {FIELD} row {first.name}:"
               f" {first['refused']}")
    families = {s.device.spec().name: s.device.spec() for s in scenarios.values()}
    for name, device in families.items():
        if device.calibration != "measured":
            yield f"{name} was not calibrated: constants of {device.family}"
    if "range_ratio" not in frame:
        yield "all prompts and outputs have the full length; give a column range_ratio where a client drew them"
