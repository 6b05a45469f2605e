"""`total`: central differences under common random numbers, all of them in one batch.

Of a metric m averaged over seeds, by a parameter x that a step h moves to x- = x exp(-h) and x+ = x exp(h):

    total = ln(m+ / m-) / ln(x+ / x-)

the elasticity, per cent per per cent, exact where m is a power of x. A run below and one above draw the same arrivals
and lengths, so that most noise cancels. The interval is Student's over what the seeds add, m+_s / m+ - m-_s / m- over
ln(x+ / x-), the linear part of the ratio's error. Every scenario, field, side and seed is one lane of the same
compiled program; a side that would need another is left out, and the difference is then one-sided.

Known gaps: an error of the order of h^2, so that elasticities of some tens close to saturation are too large by a few
per cent at h = 0.1; a metric that jumps (a limit that is crossed, a plan that no longer fits) has a difference, not a
derivative, and is flagged where its two sides disagree.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float
from scipy.special import stdtrit

from jaxsim._core.errors import InputError
from jaxsim.io.result import to_json
from jaxsim.sensitivity import direct as at_schedule
from jaxsim.sensitivity import metrics as kinds
from jaxsim.sensitivity import tenants
from jaxsim.sensitivity.fields import Field, Side, chosen, field_of, sides
from jaxsim.spec.scenario import Scenario
from jaxsim.study.design import Point
from jaxsim.study.plan import plan_of
from jaxsim.study.runner import LANES, check_memory, estimate, rows_of, table_and_requests
from jaxsim.study.study import Study

FEWEST_SEEDS = 8
"""From which an interval is not flagged; runs have as many unless told."""

NOISY = 0.1
"""Half of an interval over zero, from which it says nothing."""

BEND, LEAST_BEND = 0.5, 0.1
"""One-sided elasticities further apart than this share of the larger, and than this, with certainty, are of a kink."""

FEW = 1e6
"""Of a number that counts, below which it is said where its steps lead."""

CENTRAL, UPWARD, DOWNWARD = "central difference", "forward difference", "backward difference"

Progress = Callable[..., None]


@dataclasses.dataclass(frozen=True)
class Row:
    """The derivative of a metric by a field at one point.

    total, total_low, total_high: elasticity with its 95 % interval over seeds; None where the metric is 0 or not there.
    direct: at a fixed schedule; None where it has no meaning or was not asked for. method: of `total`. flags: what to
    mind. point: of the study. value: of the field. metric_value: the mean over seeds. per_percent: by how much the
    metric changes when the field grows by 1 %. step: of the logarithm of the field, upwards.
    """

    metric: str
    field: str
    total: float | None
    total_low: float | None
    total_high: float | None
    direct: float | None
    method: str
    flags: tuple[str, ...]
    point: int
    value: float
    metric_value: float | None
    per_percent: float | None
    step: float

    @property
    def feedback(self) -> float | None:
        """What queueing adds to the derivative at a fixed schedule."""
        return None if self.total is None or self.direct is None else self.total - self.direct

    @property
    def is_sure(self) -> bool:
        """Whether the interval tells the sign."""
        return self.total is not None and not self.total_low < 0 < self.total_high


@dataclasses.dataclass(frozen=True, eq=False)
class Sensitivity:
    """Derivatives of a study. rows: those of a metric and field at every point; refused: points that could not be
    simulated, and why; programs: that were needed; direct_note: why there is no `direct`, where there is none; notes:
    metrics that were left out, and points without `direct`."""

    scenarios: tuple[Scenario, ...]
    points: tuple[Point, ...]
    metrics: tuple[str, ...]
    fields: tuple[str, ...]
    rows: tuple[Row, ...]
    refused: Mapping[int, str]
    num_seeds: int
    num_runs: int
    programs: int
    elapsed_s: float
    direct_note: str = ""
    notes: tuple[str, ...] = ()

    def to_frame(self) -> pd.DataFrame:
        """A row a metric, field and point, with the parameters of the point in front."""
        columns = [field.name for field in dataclasses.fields(Row)]
        frame = pd.DataFrame([[getattr(row, name) for name in columns] for row in self.rows], columns=columns)
        frame["flags"] = frame["flags"].map("; ".join)
        numbers = ["total", "total_low", "total_high", "direct", "value", "metric_value", "per_percent", "step"]
        frame[numbers] = frame[numbers].astype(float)
        parameters = list(dict.fromkeys(name for point in self.points for name in point))
        for place, name in enumerate(parameters):
            frame.insert(place, name, [self.points[row.point].get(name) for row in self.rows])
        return frame

    def to_dict(self) -> dict[str, Any]:
        """As `--json` prints it."""
        def plain(value: Any) -> Any:
            return None if isinstance(value, float) and not math.isfinite(value) else value

        rows = [{name: plain(value) for name, value in dataclasses.asdict(row).items()} | {"flags": list(row.flags)}
                for row in self.rows]
        about = {"num_seeds": self.num_seeds, "runs": self.num_runs, "programs": self.programs,
                 "elapsed_s": round(self.elapsed_s, 3), "direct_note": self.direct_note or None,
                 "notes": list(self.notes)}
        parts = [{"point": index, "parameters": dict(point), "refused": self.refused.get(index)}
                 for index, point in enumerate(self.points)]
        return {"rows": rows, "points": parts, **about}

    def to_json(self) -> str:
        """The same as text."""
        return to_json(self.to_dict())


def sensitivity(scenarios: Scenario | str | Sequence[Scenario] | Study | None = None, wrt: str | Sequence[str] = "all",
                of: str | Sequence[str] | None = None, *, num_seeds: int | None = None,
                steps: float | Mapping[str, float] | None = None, direct: bool = True, workers: int | None = None,
                progress: Progress = lambda *_, **__: None) -> Sensitivity:
    """Elasticities of metrics by fields, of one scenario, some, or all of a study; the default scenario unless given.

    scenarios: of one also the name of a shipped scenario, or the path of a file.
    wrt: dotted names of numbers, patterns of names, or "all" that have an effect on the first scenario. of: columns of
    a study's table; a few usual ones if left out. num_seeds: as many as the scenarios have, at least 8, if left out.
    steps: of the logarithm of a field, for all metrics or by kind (`metrics.STEPS`). direct: the derivative at a fixed
    schedule too. Raises `InputError` for what has no derivative.
    """
    start = time.perf_counter()
    by_kind = kinds.steps_of(steps)
    points, made, refused = _scenarios(scenarios, num_seeds)
    able = [index for index in range(len(made)) if made[index] is not None]
    if not able:
        raise InputError("scenarios", f"{len(made)} points", "are all refused", next(iter(refused.values())))
    metrics = kinds.chosen([made[index] for index in able], of, LANES)
    sizes = sorted({by_kind[kinds.kind(metric)] for metric in metrics})
    fields = chosen(made[able[0]], wrt, sizes[-1], LANES)
    if not fields:
        raise InputError("wrt", wrt, "finds no number with an effect", "name a field of the scenario")
    batch, runs = _Batch(), []
    for index in able:
        base = batch.add(made[index])
        for field in fields:
            runs += _runs_of(batch, made[index], index, base, field.name, sizes)
        progress("looking at scenarios", index + 1, 0)
    found, programs = batch.run(workers, progress, [name for name in metrics if tenants.parts(name)])
    metrics, notes = _with_values(found, [run.base for run in runs], metrics)
    at_fixed, without = _direct([made[index] for index in able], fields, metrics, progress) if direct else ({}, {})
    note = next(iter(without.values())) if len(without) == len(able) else ""
    if not note:
        notes += [f"no direct at point {able[at]}: {reason}" for at, reason in without.items()]
    rows, place = [], {point: at for at, point in enumerate(able)}
    for metric in metrics:
        step = by_kind[kinds.kind(metric)]
        values = found.values(metric)
        for run in runs:
            if run.step == step:
                fixed = at_fixed.get((place[run.point], metric, run.field.name))
                rows.append(_row(metric, run, values, found, fixed))
    count = max(made[index].num_seeds for index in able)
    return Sensitivity(tuple(made[index] for index in able), tuple(points), tuple(metrics),
                       tuple(field.name for field in fields), tuple(rows), refused, count, len(found.frame), programs,
                       time.perf_counter() - start, note, tuple(notes))


def _scenarios(given: Any, num_seeds: int | None) -> tuple[list[Point], list[Scenario | None], dict[int, str]]:
    """Points, their scenarios, and why some have none. Raises `InputError`."""
    if num_seeds is not None and (isinstance(num_seeds, bool) or not isinstance(num_seeds, int) or num_seeds < 2):
        raise InputError("num_seeds", num_seeds, "leaves nothing to make an interval from",
                         f"give {FEWEST_SEEDS} or more")
    points: list[Point] = []
    made: list[Scenario | None] = []
    refused: dict[int, str] = {}

    def seeded(scenario: Scenario) -> Scenario:
        count = max(scenario.num_seeds, FEWEST_SEEDS) if num_seeds is None else num_seeds
        return LANES.shared(scenario.with_values({"num_seeds": count}))

    if isinstance(given, Study):
        points, base = list(given.points()), given.base_tree()
        if not points:
            raise InputError("where", given.where, "leaves no point of the study", "loosen a condition")
        for index, point in enumerate(points):
            try:
                scenario = seeded(given.scenario_at(point, base))
                LANES.shape(scenario)
                made.append(scenario)
            except InputError as error:
                refused[index] = str(error)
                made.append(None)
        return points, made, refused
    if given is None or isinstance(given, str):
        given = Scenario.from_toml(given or "default")
    listed = [given] if isinstance(given, Scenario) else given
    if isinstance(listed, (str, bytes, dict)) or not isinstance(listed, Sequence) or not listed:
        raise InputError("scenarios", given, "is not a Scenario, a list of them, or a Study",
                         "make one with Scenario.from_toml(path)")
    for index, scenario in enumerate(listed):
        if not isinstance(scenario, Scenario):
            raise InputError(f"scenarios[{index}]", scenario, "is not a Scenario",
                             "make one with Scenario.from_toml(path)")
        made.append(seeded(scenario.checked()))
        LANES.shape(made[-1])
    return [{"scenario": s.name or str(k)} if len(listed) > 1 else {} for k, s in enumerate(made)], made, refused


@dataclasses.dataclass(frozen=True)
class _Run:
    """Runs of one field with one step: places in the batch of the base and of both sides, -1 where there is none."""

    point: int
    field: Field
    step: float
    base: int
    below: int
    above: int
    low: float
    high: float
    reason: str


class _Batch:
    """Scenarios that are simulated together."""

    def __init__(self):
        self._scenarios: list[Scenario] = []

    def add(self, scenario: Scenario) -> int:
        """Its place."""
        self._scenarios.append(scenario)
        return len(self._scenarios) - 1

    def run(self, workers: int | None, progress: Progress, of_tenants: Sequence[str] = ()) -> tuple["_Found", int]:
        """Raises `InputError` where the machine has no room. of_tenants: metrics that need every request."""
        made = plan_of([lambda s=s: s for s in self._scenarios], LANES)
        check_memory(estimate(made), workers)
        progress("simulating", 0, made.num_runs)
        if not of_tenants:
            return _Found(rows_of(made.tiles, workers), len(self._scenarios)), made.num_programs
        frame, requests, _ = table_and_requests(self._scenarios, workers)
        own = tenants.columns(self._scenarios, requests, of_tenants, LANES)
        return _Found(frame.merge(own, on=["point", "seed"], how="left"), len(self._scenarios)), made.num_programs


class _Found:
    """What the runs of a batch gave, `scenarios seeds` arrays."""

    def __init__(self, frame: pd.DataFrame, count: int):
        self.frame = frame.sort_values(["point", "seed"], kind="stable", ignore_index=True)
        self._count = count
        self._at = self.frame["point"].to_numpy(), self.frame.groupby("point").cumcount().to_numpy()
        there = ~np.isnan(self._spread(np.zeros(len(frame))))
        self.is_unstable = (self._grid("unstable") == 1).sum(axis=1) > 0.5 * there.sum(axis=1)
        self.is_stopped = (self._spread(self.frame["fault"].notna().to_numpy(float)) == 1).any(axis=1)

    def _spread(self, column: np.ndarray) -> Float[np.ndarray, "scenarios seeds"]:
        grid = np.full((self._count, self._at[1].max() + 1), np.nan)
        grid[self._at] = column
        return grid

    def _grid(self, name: str) -> Float[np.ndarray, "scenarios seeds"]:
        return self._spread(self.frame[name].astype(float).to_numpy())

    def values(self, metric: str) -> Float[np.ndarray, "scenarios seeds"]:
        """A metric of every run, NaN where it was not computed."""
        return self._grid(metric) if metric in self.frame else self._spread(np.full(len(self.frame), np.nan))


def _with_values(found: _Found, bases: Sequence[int], metrics: Sequence[str]) -> tuple[list[str], list[str]]:
    """The metrics with a value in some run, and what to say of the others. Raises `InputError` where none has any."""
    rows = sorted(set(bases))
    kept = [metric for metric in metrics if not np.isnan(found.values(metric)[rows]).all()]
    if not kept:
        raise InputError("of", list(metrics), "are not computed: they have no value in any of the runs",
                         "ask for a metric that `jaxsim run` shows of this scenario")
    return kept, [f"left out: {metric} has no value in any of the runs" for metric in metrics if metric not in kept]


def _runs_of(batch: _Batch, scenario: Scenario, point: int, base: int, name: str, sizes: Sequence[float]
             ) -> list[_Run]:
    """Of one field, with every step; adds the sides to the batch."""
    try:
        field = field_of(scenario, name)
    except InputError as error:
        nan = math.nan
        return [_Run(point, Field(name, nan, False), step, base, -1, -1, nan, nan, str(error)) for step in sizes]
    runs, kept = [], {}
    for step in sizes:
        both = sides(scenario, field, step, LANES)
        places = [_place(batch, side, kept) for side in both]
        reasons = [side.reason for side in both if side.scenario is None]
        runs.append(_Run(point, field, step, base, *places, both[0].value, both[1].value, "; ".join(reasons)))
    return runs


def _place(batch: _Batch, side: Side, kept: dict[float, int]) -> int:
    if side.scenario is None:
        return -1
    if side.value not in kept:
        # Two steps of a number that counts may be one.
        kept[side.value] = batch.add(side.scenario)
    return kept[side.value]


def _row(metric: str, run: _Run, values: Float[np.ndarray, "scenarios seeds"], found: _Found, direct: float | None
         ) -> Row:
    field, flags = run.field, []
    base = values[run.base]
    here = np.nanmean(base) if not np.isnan(base).all() else math.nan
    below, above = (run.below if run.below >= 0 else run.base), (run.above if run.above >= 0 else run.base)
    low_x, high_x = (run.low if run.below >= 0 else field.value), (run.high if run.above >= 0 else field.value)
    method = CENTRAL if run.below >= 0 and run.above >= 0 else UPWARD if run.above >= 0 else DOWNWARD

    def row(elasticity: Any = None, per_percent: float | None = None) -> Row:
        low, total, high = (None, None, None) if elasticity is None else elasticity
        return Row(metric, field.name, total, low, high, direct, method, tuple(flags), run.point, field.value,
                   None if math.isnan(here) else float(here), per_percent,
                   math.log(high_x / field.value) if run.above >= 0 else math.log(field.value / low_x))

    if below == above:
        flags.append(f"no neighbour: {run.reason}" if run.reason else "no neighbour")
        return Row(metric, field.name, None, None, None, direct, method, tuple(flags), run.point, field.value,
                   None if math.isnan(here) else float(here), None, math.nan)
    if method != CENTRAL:
        flags.append("one-sided")
    if field.is_whole and field.value < FEW:
        flags.append(f"whole steps {low_x:,.0f} to {high_x:,.0f}")
    stopped = [at for at in (below, run.base, above) if found.is_stopped[at]]
    if stopped:
        flags.append("stopped")
        return row()
    if found.is_unstable[run.base]:
        flags.append("unstable")
    elif found.is_unstable[above] or found.is_unstable[below]:
        flags.append("saturated")
    span = math.log(high_x / low_x)
    there = ~np.isnan(values[below]) & ~np.isnan(values[above]) & ~np.isnan(base)
    count = int(there.sum())
    if count < 2:
        flags.append("no value")
        return row()
    if count < FEWEST_SEEDS:
        flags.append(f"{count} seeds")
    down, up, middle = (values[at][there] for at in (below, above, run.base))
    slope = float((up.mean() - down.mean()) / span * 0.01)
    if not (down.mean() > 0 and up.mean() > 0):
        flags.append("zero" if here == 0 else "not positive")
        return row(per_percent=slope)
    total, half = _elasticity(down, up, span)
    if total == 0 and np.array_equal(down, up):
        flags.append("no change")
    elif total - half < 0 < total + half and half > NOISY:
        flags.append("noisy")
    if count > 1 and np.ptp(down) == 0 == np.ptp(up) and found.frame["seed"].nunique() > 1:
        flags.append("all seeds alike")
    if method == CENTRAL and middle.mean() > 0 and _has_kink(down, middle, up, low_x, field.value, high_x):
        flags.append("kink")
    return row((total - half, total, total + half), slope)


def _elasticity(down: Float[np.ndarray, " seeds"], up: Float[np.ndarray, " seeds"], span: float, level: float = 0.975
                ) -> tuple[float, float]:
    """Of the mean over seeds, and half of its interval."""
    total = math.log(up.mean() / down.mean()) / span
    parts = (up / up.mean() - down / down.mean()) / span
    return total, float(stdtrit(len(up) - 1, level) * parts.std(ddof=1) / math.sqrt(len(up)))


def _has_kink(down, middle, up, low_x: float, x: float, high_x: float) -> Bool:
    """Whether the elasticities below and above differ by more than noise, and by much."""
    below, above = math.log(x / low_x), math.log(high_x / x)
    first = math.log(middle.mean() / down.mean()) / below
    second = math.log(up.mean() / middle.mean()) / above
    parts = ((up / up.mean() - middle / middle.mean()) / above - (middle / middle.mean() - down / down.mean()) / below)
    half = stdtrit(len(up) - 1, 0.995) * parts.std(ddof=1) / math.sqrt(len(up))
    apart = abs(second - first)
    return bool(apart > half and apart > LEAST_BEND and apart > BEND * max(abs(first), abs(second)))


def _direct(scenarios: Sequence[Scenario], fields: Sequence[Field], metrics: Sequence[str], progress: Progress
            ) -> tuple[dict[tuple[int, str, str], float], dict[int, str]]:
    """Derivatives at a fixed schedule, and by scenario why it has none."""
    progress("recording schedules", 0, sum(scenario.num_seeds for scenario in scenarios))
    found, without = at_schedule.derivatives(scenarios, [field.name for field in fields], list(metrics))
    return found, {index: str(error) for index, error in without.items()}
