"""Runs of scenarios together: means over seeds, intervals, frames."""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import stdtrit

from jaxsim.metrics.fairness import token_weights
from jaxsim.metrics.lane import LaneResult, request_frame
from jaxsim.metrics.power import devices_of
from jaxsim.metrics.summary import lane_metrics
from jaxsim.spec.scenario import Scenario

Interval = tuple[float, float] | None
"""Ends of a confidence interval; None from too few runs."""


def flatten(metrics: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested groups as dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in metrics.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat


def interval(values: Sequence[float | None], level: float = 0.95) -> Interval:
    """Student-t interval of a mean over independent runs; None from fewer than two values."""
    numbers = np.array([v for v in values if v is not None], np.float64)
    if len(numbers) < 2:
        return None
    half = float(stdtrit(len(numbers) - 1, 0.5 + level / 2) * numbers.std(ddof=1) / math.sqrt(len(numbers)))
    return float(numbers.mean() - half), float(numbers.mean() + half)


def combine(runs: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], dict[str, Interval]]:
    """Metrics of several seeds as their mean, and a 95 % interval of each by dotted key.

    A metric that some seeds lack is averaged over those that have it. `unstable` and `slo.separate_p90` are
    what most seeds say, and None where most say nothing; `fault` is the first.
    """
    means: dict[str, Any] = {}
    intervals: dict[str, Interval] = {}
    for key, first in runs[0].items():
        if isinstance(first, Mapping):
            means[key], inner = combine([run[key] for run in runs])
            intervals |= {f"{key}.{name}": ends for name, ends in inner.items()}
            continue
        values = [run[key] for run in runs if run[key] is not None]
        if not values:
            means[key] = None
        elif isinstance(values[0], bool):
            means[key] = 2 * sum(values) > len(values) if 2 * len(values) >= len(runs) else None
        elif isinstance(values[0], str):
            means[key] = values[0]
        else:
            mean = math.fsum(values) / len(values)
            is_count = all(isinstance(v, int) for v in values) and mean == int(mean)
            means[key] = int(mean) if is_count else mean
            intervals[key] = interval(values)
    return means, intervals


class Result:
    """Scenarios simulated: host arrays a lane, and pandas frames made from them when asked for.

    lanes: for every scenario, for every seed, a `LaneResult`.
    """

    def __init__(self, scenarios: Sequence[Scenario], lanes: Sequence[Sequence[LaneResult]]):
        if len(scenarios) != len(lanes):
            raise ValueError(f"{len(scenarios)} scenarios but lanes for {len(lanes)}")
        self.scenarios = tuple(scenarios)
        self.lanes = tuple(tuple(runs) for runs in lanes)

    def __len__(self) -> int:
        return len(self.scenarios)

    def __repr__(self) -> str:
        return f"Result({len(self)} scenarios, {sum(map(len, self.lanes))} runs)"

    @functools.cached_property
    def runs(self) -> tuple[tuple[dict[str, Any], ...], ...]:
        """Metrics of every seed of every scenario (`lane_metrics`)."""
        return tuple(tuple(lane_metrics(lane, s.slo, s.warmup_s, s.cooldown_s, devices_of(s, len(lane.busy_s)),
                                        s.workload.tenants, token_weights(s))
                           for lane in lanes) for s, lanes in zip(self.scenarios, self.lanes, strict=True))

    @functools.cached_property
    def metrics(self) -> tuple[dict[str, Any], ...]:
        """Metrics of every scenario: mean over its seeds, in the layout of `summary.json`."""
        return tuple(combine(runs)[0] for runs in self.runs)

    @functools.cached_property
    def intervals(self) -> tuple[dict[str, Interval], ...]:
        """95 % intervals over the seeds of every scenario, by dotted key."""
        return tuple(combine(runs)[1] for runs in self.runs)

    @functools.cached_property
    def summary(self) -> pd.DataFrame:
        """One row a scenario: its name and every metric, nested groups as dotted columns."""
        rows = [{"name": s.name, **flatten(m)} for s, m in zip(self.scenarios, self.metrics, strict=True)]
        return pd.DataFrame(rows)

    @functools.cached_property
    def requests(self) -> pd.DataFrame:
        """One row a request of every run: `scenario` and `seed`, then the columns of `request_frame`."""
        frames = []
        for index, (scenario, lanes) in enumerate(zip(self.scenarios, self.lanes, strict=True)):
            for seed, lane in zip(scenario.seeds, lanes, strict=False):
                frame = request_frame(lane)
                frame.insert(0, "scenario", index)
                frame.insert(1, "seed", seed)
                frames.append(frame)
        return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()

    @property
    def faults(self) -> tuple[str, ...]:
        """The bounds that stopped runs, each once."""
        return tuple(dict.fromkeys(lane.fault for lanes in self.lanes for lane in lanes if lane.fault))
