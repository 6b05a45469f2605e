"""What a metric is made of: its derivatives by every parameter of the cost model, and by resource (reverse mode).

The transpose of `jaxsim.sensitivity.direct`, at the same fixed schedule: a running sum over the records says what each
of them weighs in the metric, one batched reverse pass over the cost model what that makes of its tables, and one
product with the derivatives of the tables what it makes of all parameters, however many there are.

By resource the shares of a latency sum to one: with every fixed second of a resource longer, or its rates lower, by
1 % the latency is longer by that share of 1 %, and all resources together are all of its time (Euler's theorem; what a
request spends in front of the engine is one of them). A share is of what would be gained, not of what is busy: where
two resources overlap it is the one that binds that has it.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from jaxsim._core.errors import InputError, suggest
from jaxsim.sensitivity import costs, schedule
from jaxsim.sensitivity.measures import Measure, measures
from jaxsim.sensitivity.recorded import Recorded, record
from jaxsim.sensitivity.runs import INSTEAD, check_ends
from jaxsim.spec.scenario import Scenario

METRICS = ("mean_ttft_ms", "p99_ttft_ms", "mean_tpot_ms", "p99_tpot_ms", "mean_e2el_ms", "p99_e2el_ms", "energy_j")
"""Those of an attribution, as far as they have a value, unless others are asked for."""

FRONT_END = "front end"
"""A resource beside those of the cost model: seconds of a request outside the engine."""


class Attribution(NamedTuple):
    """Of one scenario; rows are metrics.

    value: of the metric. by_resource, by_parameter: elasticities, percent per percent: columns are resources, of which
    it is by all their seconds at once, and parameters of the cost model, called as in `cost.overrides` or as the
    section of fitted coefficients. All are of means over seeds.
    """

    value: pd.Series
    by_resource: pd.DataFrame
    by_parameter: pd.DataFrame

    def top(self, metric: str, count: int = 10) -> pd.Series:
        """The parameters that matter most to a metric."""
        row = self.by_parameter.loc[metric]
        return row[row.abs().sort_values(ascending=False).index[:count]]


def attribution(scenario: Scenario, metrics: Sequence[str] | None = None) -> Attribution:
    """What metrics of a scenario are made of, at its schedule.

    metrics: names of the summary; `METRICS` unless given. Raises `InputError` where one of these is no sum of times, is
    0 or is not there in some run, where the cost has no parameters, where a bound stopped a run, or where a schedule is
    not one of iterations one after another.
    """
    (runs,) = record([scenario])
    return of_runs(scenario, runs, metrics)


def of_runs(scenario: Scenario, runs: Sequence[Recorded], metrics: Sequence[str] | None = None) -> Attribution:
    """The same of recorded runs."""
    made = runs[0].made
    check_ends([run.result for run in runs])
    model = costs.cost_model(made, scenario)
    check_parameters(model, scenario)
    own = schedule.of_runs(runs)
    wanted = METRICS if metrics is None else metrics
    known = measures(scenario, [run.result for run in runs], answers=made.params.source.answers, only=wanted)
    sums = {name: one for name, one in known.items() if one.value}
    for name in metrics or ():
        if name not in sums:
            raise _no_share(name, known, runs, scenario)
    names = [name for name in wanted if name in sums]
    if not names:
        raise InputError("metric", list(wanted), "are 0 or have no value", f"ask for others, or {INSTEAD}")
    asked, count = costs.joined([costs.asked_of([run.tape for run in runs], own.record)])
    # Of the mean over seeds: the sum of changes to the sum of values.
    weights = weights_of(own, [sums[name] for name in names]) / np.array([sums[n].value for n in names])[:, None, None]
    padding = np.zeros((len(names), len(asked[0].num_decode) - count, 3))
    by_leaf = costs.reverse(model, asked, np.concatenate([weights, padding], axis=1))
    values = pd.Series({name: float(sums[name].value / len(runs)) for name in names})
    by_resource = pd.DataFrame(by_leaf @ model.directions(), index=names, columns=list(model.resources))
    by_resource[FRONT_END] = [sums[name].front_end * made.front_end_s / sums[name].value for name in names]
    by_parameter = pd.DataFrame(model.by_name(by_leaf * model.values), index=names)
    return Attribution(values, by_resource, by_parameter)


def weights_of(own: schedule.Schedule, known: Sequence[Measure]) -> np.ndarray:
    """What the atoms of a schedule weigh in metrics."""
    latencies = schedule.Latencies(*(np.stack(rows) for rows in zip(*(one.latencies for one in known), strict=True)))
    return own.transposed(latencies) + own.busy(np.stack([one.busy for one in known]))


def check_parameters(model: costs.CostModel, scenario: Scenario) -> None:
    """Raises `InputError` for a kind of cost without parameters to attribute to."""
    if model.names is None:
        raise InputError("cost.kind", scenario.to_dict().get("cost", {}).get("kind", "roofline"),
                         "(here, with engine.hybrid if that is given) has tables, and no parameters to attribute to",
                         "use 'roofline' or 'fitted', or ask for the direct derivative by single fields")


def _no_share(name: str, known: dict[str, Measure], runs: Sequence[Recorded], scenario: Scenario) -> InputError:
    """Why a metric has no shares: it is 0, a run has no value of it, or it is no sum of times."""
    if name in known:
        return InputError("metric", name, "is 0, of which there are no shares", f"ask for another, or {INSTEAD}")
    answers = runs[0].made.params.source.answers
    each = [measures(scenario, [run.result], answers=answers) for run in runs]
    count = sum(name not in one for one in each)
    if 0 < count < len(runs):
        return InputError("metric", name, f"has no value in {count} of {len(runs)} runs",
                          f"ask for another, or {INSTEAD}")
    return InputError("metric", name, "is no sum of times of this run",
                      suggest(name, each[0], f"choose from {', '.join(each[0])}; or {INSTEAD}"))
