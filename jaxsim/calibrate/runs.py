"""Host and front-end seconds of an engine from end-to-end runs: the least squares of `least_squares.py` over replays.

A row is the logarithm of simulated over measured, of the mean TTFT, TPOT or end-to-end latency of one run. Derivatives
are differences of whole simulations: a point and a step along every parameter are lanes of one program, so that a fit
costs little more than its evaluations. (The derivative of one simulation at a fixed schedule would be wrong by orders
of magnitude where requests arrive over time.)
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float

from jaxsim._core.errors import InputError, suggest
from jaxsim.calibrate.least_squares import Fit, Parameter, Problem
from jaxsim.cost.roofline import HOSTS
from jaxsim.engine import lower
from jaxsim.metrics import request_frame
from jaxsim.profiles import _table
from jaxsim.spec.presets import resolve
from jaxsim.spec.scenario import FittedCost, Scenario
from jaxsim.validate.measured import MeasuredRun
from jaxsim.validate.replay import LATENCIES, compare, simulated, system_and_run, with_measured

PARAMETERS = {p.name: p for p in (
    Parameter("cost.front_end_s", 6e-3, 1e-5, 0.5),
    Parameter("cost.overrides.async_step_s", 3e-4, 1e-5, 0.02),
    Parameter("cost.overrides.host_step_s", 1e-3, 1e-5, 0.05),
    Parameter("cost.overrides.host_sequence_s", 4e-5, 1e-7, 2e-3))}
"""What can be fitted, by the field of a scenario; starts where no scenario has a value of its own above 0."""

WIDTH = 1.0
"""Of the priors around the scenarios' own values: a factor of e is nothing."""

STEP = 0.1
"""Of a logarithm, along which derivatives are taken: more than a replay's own jumps."""

SCALE = 0.05
"""Size of a good error."""


@dataclass(frozen=True, eq=False)
class EndToEnd:
    """Runs, the scenario each was measured on, and the first requests that are not compared."""

    scenarios: tuple[Scenario, ...]
    runs: tuple[MeasuredRun, ...]
    skip: int

    @classmethod
    def read(cls, pairs: Iterable[tuple[Scenario, str]], skip: int = 0) -> "EndToEnd":
        """From scenarios and files of `jaxsim validate`. Raises `InputError`."""
        scenarios, runs = zip(*(system_and_run(scenario, path, skip) for scenario, path in pairs), strict=True)
        _table.digests([Path(run.path).expanduser() for run in runs], "--run")
        return cls(scenarios, runs, skip)

    def usual_names(self) -> list[str]:
        """What is fitted if nobody says: the front end, and the steps of the schedulers that were measured."""
        names = ["cost.front_end_s"]
        for scenario in self.scenarios:
            if not isinstance(scenario.cost, FittedCost):
                kind = "async" if resolve(scenario.engine).async_scheduling else "host"
                names.append(f"cost.overrides.{kind}_step_s")
        return list(dict.fromkeys(names))

    def present(self, name: str) -> list[float]:
        """What every scenario has for a field now. Raises `InputError` where it has none."""
        return [_present(scenario, name) for scenario in self.scenarios]

    def parameter(self, name: str) -> Parameter:
        """A field as it is fitted: from the scenarios' own values, and pulled to them. Raises `InputError`."""
        if name not in PARAMETERS:
            raise InputError("--fit", name, "cannot be fitted to runs", suggest(name, PARAMETERS))
        usual = PARAMETERS[name]
        known = [value for value in self.present(name) if value > 0]
        if not known:
            # A zero says that nobody knows it, or that there is none: no prior.
            return usual
        centre = min(max(float(np.exp(np.mean(np.log(known)))), usual.lower), usual.upper)
        return usual._replace(start=centre, centre=centre, width=WIDTH)

    def errors(self, points: Sequence[Mapping[str, float]]) -> Float[np.ndarray, "points rows"]:
        """At several values of the parameters: `LATENCIES` of every run, one behind the other."""
        found = []
        for scenario, run in zip(self.scenarios, self.runs, strict=True):
            result = simulated([scenario.with_values(dict(point)) for point in points], run)
            found.append([self._of(run, lanes[0]) for lanes in result.lanes])
        return np.concatenate(found, axis=1)

    def _of(self, run: MeasuredRun, lane) -> list[float]:
        metrics = compare(with_measured(request_frame(lane), run, self.skip))
        return [np.log(m.simulated / m.measured) if (m := metrics.get(f"mean_{name}")) and m.simulated > 0 else np.nan
                for name in LATENCIES]


def _present(scenario: Scenario, name: str) -> float:
    cost, field = scenario.cost, name.rpartition(".")[2]
    if name == "cost.front_end_s":
        return lower.front_end_s(scenario, lower.resolve_system(scenario))
    if isinstance(cost, FittedCost):
        raise InputError("--fit", name, f"is nothing that a fitted cost has (scenario {scenario.name!r})",
                         "use cost.kind = 'roofline' or 'profiled', or --fit cost.front_end_s alone")
    return cost.overrides.get(field, HOSTS[cost.host or resolve(scenario.engine).host][field])


def replays(data: EndToEnd, parameters: Sequence[Parameter]) -> Problem:
    """A problem whose rows are replays, and their derivatives differences of them."""
    names, upper = [p.name for p in parameters], np.log([p.upper for p in parameters])

    def evaluate(x):
        # Backwards at an upper bound.
        steps = np.where(x + STEP > upper, -STEP, STEP)
        points = np.exp(np.concatenate([x[None], x + np.diag(steps)]))
        found = data.errors([dict(zip(names, p.tolist(), strict=True)) for p in points])
        return found[0], (found[1:] - found[0]).T / steps

    return Problem(evaluate, parameters, scale=SCALE)


@dataclass(frozen=True, eq=False)
class EngineFit:
    """What a fit to runs found. present: values of the scenarios, one a run, by field. before, after, held_out: signed
    errors (`runs latencies`) of the scenarios as they are, with what `overrides` gives, and of each run with what the
    fit to the others gives (nan where there are no others)."""

    fit: Fit
    data: EndToEnd
    present: Mapping[str, Sequence[float]]
    before: Float[np.ndarray, "runs latencies"]
    after: Float[np.ndarray, "runs latencies"]
    held_out: Float[np.ndarray, "runs latencies"]

    def overrides(self) -> dict[str, float]:
        """Fields of a scenario that the runs determine; where they do not, a scenario's own values stay."""
        return determined(self.fit)


def determined(fit: Fit) -> dict[str, float]:
    """What the data determine, to four digits; 0 at a lower bound, which stands for nothing."""
    return {name: 0.0 if fit.bounds.get(name) == "lower" else float(f"{value:.4g}")
            for name, value in fit.values.items() if name not in fit.undetermined}


def fit_runs(data: EndToEnd, names: Sequence[str], progress: Callable[[str], None] = lambda text: None) -> EngineFit:
    """Fit the named fields to the runs, and once more without each of them. Raises `InputError`."""
    if not names or len(set(names)) < len(names):
        raise InputError("--fit", list(names), "is empty or names a field twice", f"choose of {', '.join(PARAMETERS)}")
    parameters = [data.parameter(name) for name in names]
    problem = replays(data, parameters)
    many, start = len(data.runs), {p.name: p.start for p in parameters}
    labels = np.repeat(np.arange(many), len(LATENCIES))

    def errors(fields):
        # As many points as the derivatives have: the same program.
        return np.expm1(data.errors([fields] * (len(names) + 1))[0]).reshape(many, -1)

    progress(f"{many} runs, {', '.join(names)}")
    before = errors({})
    is_known = np.isfinite(before.ravel()) & np.isfinite(problem.errors(start))
    if not is_known.any():
        raise InputError("--run", [run.path for run in data.runs], "have no latencies to compare",
                         "look at them with `jaxsim validate`")
    fit = problem.solve(np.where(is_known, 1.0, 0.0), labels, max_evaluations=20)
    after, held_out = errors(determined(fit)), np.full_like(before, np.nan)
    for left_out in range(many if many > 1 else 0):
        progress(f"without {data.runs[left_out].path}")
        other = problem.solve(np.where(is_known, labels != left_out, 0.0), labels, max_evaluations=20)
        held_out[left_out] = errors(determined(other))[left_out]
    return EngineFit(fit, data, {name: data.present(name) for name in names}, before, after, held_out)
