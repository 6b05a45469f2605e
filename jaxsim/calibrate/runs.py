"""Host and front-end seconds of an engine from end-to-end runs: the least squares of `least_squares.py` over replays.

A row is the logarithm of simulated over measured, of the mean TTFT, TPOT or end-to-end latency of one run. Derivatives
are differences of whole simulations: a point and a step along every parameter are lanes of one program, so that a fit
costs little more than its evaluations. (The derivative of one simulation at a fixed schedule would be wrong by orders
of magnitude where requests arrive over time.)
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from jaxsim._core.errors import InputError, suggest
from jaxsim.calibrate.least_squares import Fit, Parameter, Problem
from jaxsim.engine.simulate import simulate
from jaxsim.metrics import request_frame
from jaxsim.spec.presets import resolve
from jaxsim.spec.scenario import Scenario
from jaxsim.validate.measured import MeasuredRun, read_run
from jaxsim.validate.replay import LATENCIES, compare, with_measured

PARAMETERS = {p.name: p for p in (
    Parameter("cost.front_end_s", 6e-3, 1e-5, 0.5, 6e-3, 1.0),
    Parameter("cost.overrides.async_step_s", 3e-4, 1e-5, 0.02, 3e-4, 1.0),
    Parameter("cost.overrides.host_step_s", 1e-3, 1e-5, 0.05, 1e-3, 1.0),
    Parameter("cost.overrides.host_sequence_s", 4e-5, 1e-7, 2e-3, 4e-5, 1.0))}
"""What can be fitted, by the field of a scenario, from the values of vLLM V1; to the prior a factor of e is nothing."""

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
        scenarios, runs = [], []
        for scenario, path in pairs:
            scenario = scenario.with_values({"workload": {"kind": "trace", "trace": str(path)}, "num_seeds": 1,
                                             "warmup_s": None})
            run = read_run(path, resolve(scenario.engine).block_size)
            if not 0 <= skip < int(run.is_answered.sum()):
                raise InputError("--skip", skip, f"leaves no request of {path}", "give a smaller number, 0 or more")
            scenarios.append(scenario)
            runs.append(run)
        return cls(tuple(scenarios), tuple(runs), skip)

    def errors(self, points: Sequence[Mapping[str, float]]) -> Float[np.ndarray, "points rows"]:
        """At several values of the parameters: `LATENCIES` of every run, one behind the other."""
        found = []
        for scenario, run in zip(self.scenarios, self.runs, strict=True):
            result = simulate([scenario.with_values(dict(point)) for point in points], workload=run.workload)
            found.append([self._of(run, lanes[0]) for lanes in result.lanes])
        return np.concatenate(found, axis=1)

    def _of(self, run: MeasuredRun, lane) -> list[float]:
        metrics = compare(with_measured(request_frame(lane), run, self.skip))
        return [np.log(m.simulated / m.measured) if (m := metrics.get(f"mean_{name}")) else np.nan
                for name in LATENCIES]


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
    """What a fit to runs found. before, after, held_out: signed errors (`runs latencies`) with the start's values, with
    the fit's, and of each run with the fit to the others (nan where there are no others)."""

    fit: Fit
    data: EndToEnd
    before: Float[np.ndarray, "runs latencies"]
    after: Float[np.ndarray, "runs latencies"]
    held_out: Float[np.ndarray, "runs latencies"]

    def overrides(self) -> dict[str, float]:
        """Fields of a scenario."""
        return dict(self.fit.values)


def fit_runs(data: EndToEnd, names: Sequence[str], progress: Callable[[str], None] = lambda text: None) -> EngineFit:
    """Fit the named fields to the runs, and once more without each of them. Raises `InputError`."""
    for name in names:
        if name not in PARAMETERS:
            raise InputError("--fit", name, "cannot be fitted to runs", suggest(name, PARAMETERS))
    if not names or len(set(names)) < len(names):
        raise InputError("--fit", list(names), "is empty or names a field twice", f"choose of {', '.join(PARAMETERS)}")
    problem = replays(data, [PARAMETERS[name] for name in names])
    many, start = len(data.runs), {name: PARAMETERS[name].start for name in names}
    labels = np.repeat(np.arange(many), len(LATENCIES))

    def errors(values):
        return np.expm1(problem.errors(values)).reshape(many, -1)

    def known(weights):
        return np.where(np.isfinite(problem.errors(start)), weights, 0.0)

    before = errors(start)
    progress(f"{many} runs, {', '.join(names)}")
    fit = problem.solve(known(np.ones(len(labels))), labels, max_evaluations=20)
    after, held_out = errors(fit.values), np.full_like(before, np.nan)
    for left_out in range(many if many > 1 else 0):
        progress(f"without {data.runs[left_out].path}")
        other = problem.solve(known((labels != left_out).astype(float)), labels, max_evaluations=20)
        held_out[left_out] = errors(other.values)[left_out]
    return EngineFit(fit, data, before, after, held_out)
