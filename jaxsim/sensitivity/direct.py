"""The direct effect of a number: what a metric changes by while every iteration does what it did (forward mode).

Iterations get longer or shorter, requests come as far into them as they came, and who runs with whom stays. What is
left out is the feedback of queueing: that longer iterations let more requests wait, and join, and make them longer yet.
`total` derivatives, by differences of whole runs, have it; the gap between the two is how much of an effect it is.

    number -> parameters of the cost model -> tables -> atoms of records -> latencies -> metric

One tangent a field, all fields at once, over the records of all seeds (`jaxsim.sensitivity.costs`,
`jaxsim.sensitivity.schedule`). The schedule is recorded once and is a constant.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from jaxsim._core.errors import InputError
from jaxsim.metrics.power import devices_of
from jaxsim.sensitivity import costs, schedule
from jaxsim.sensitivity.measures import Measure, measures, together
from jaxsim.sensitivity.recorded import Recorded, check_ends, recordings
from jaxsim.sensitivity.schedule import Schedule
from jaxsim.spec.scenario import Scenario

FRONT_END = "cost.front_end_s"

Direct = dict[tuple[int, str, str], float]
"""Elasticities by (index of the scenario, metric, field)."""


def direct(scenarios: Sequence[Scenario], fields: Sequence[str], metrics: Sequence[str]) -> Direct:
    """Elasticities, percent per percent, of metrics by fields at the schedule as it was: of the means over the seeds.

    fields: dotted names, as studies have them; metrics: names of the summary. A pair that has no such derivative is not
    there: limits and other whole numbers, rates of arrival, fields that the scenario does not use, metrics that are no
    sum of times (`jaxsim.sensitivity.measures`), all of a scenario whose schedule does not tell (`derivatives`).
    Raises `InputError` where that is so of every scenario.
    """
    found, without = derivatives(scenarios, fields, metrics)
    if len(without) == len(scenarios) and without:
        raise next(iter(without.values()))
    return found


def derivatives(scenarios: Sequence[Scenario], fields: Sequence[str], metrics: Sequence[str]
                ) -> tuple[Direct, dict[int, InputError]]:
    """The same, and by index why a scenario has none: it cannot be recorded, or a bound stopped a run of it."""
    found: Direct = {}
    without: dict[int, InputError] = {}
    for index, runs in recordings(scenarios):
        scenario = scenarios[index]
        try:
            if isinstance(runs, InputError):
                raise runs
            check_ends(runs)
            pairs = of_runs(scenario, runs, fields, metrics)
        except InputError as error:
            without[index] = error
            continue
        found |= {(index, metric, field): value for (metric, field), value in pairs.items()}
    return found, dict(sorted(without.items()))


def of_runs(scenario: Scenario, runs: Sequence[Recorded], fields: Sequence[str], metrics: Sequence[str]
            ) -> dict[tuple[str, str], float]:
    """The same of the recorded runs of one scenario, by (metric, field): sum of the changes over the runs to the sum of
    the values, as `total` is of the mean too."""
    made = runs[0].made
    model = costs.cost_model(made, scenario)
    tangents = costs.tangents(model, made, scenario, fields)
    own = schedule.of_runs(runs)
    known = together([measures(scenario, run.result, answers=made.params.source.answers, only=metrics) for run in runs])
    # Of what is 0 in every run no per cent are known.
    known = {name: measure for name, measure in known.items() if measure.value}
    by_times: dict[tuple[str, str], float] = {}
    if tangents and known:
        asked, count = costs.joined([costs.asked_of([run.tape for run in runs], own.record)])
        stacked = jax.tree.map(lambda *x: np.stack(x), *tangents.values())
        by_times = _by_times(own, list(tangents), costs.forward(model.tables, asked, stacked)[:, :count], known)
    found: dict[tuple[str, str], float] = {}
    for field in fields:
        watts = _watts(scenario, field, len(runs[0].result.busy_s))
        front_end = made.front_end_s if field == FRONT_END else 0.0
        for name, measure in known.items():
            value, is_there = by_times.get((name, field), 0.0), (name, field) in by_times
            if measure.front_end * front_end != 0:
                value, is_there = value + measure.front_end * front_end, True
            if watts is not None and (measure.busy_w.any() or measure.idle_w.any()):
                idle_w, busy_w = (np.tile(one, len(runs)) for one in watts)
                value, is_there = value + measure.idle_w @ idle_w + measure.busy_w @ busy_w, True
            if is_there:
                found[name, field] = float(value / measure.value)
    return found


def _by_times(own: Schedule, fields: Sequence[str], atoms: Float[np.ndarray, "fields records 3"],
              known: dict[str, Measure]) -> dict[tuple[str, str], float]:
    """Of metrics that times are in, by (metric, field): what they change by while atoms change as by each field."""
    measured = list(known.values())
    found, is_there = np.zeros((len(measured), len(fields))), np.zeros(len(measured), bool)
    for weights, change in zip(zip(*(one.latencies for one in measured), strict=True), own.latencies(atoms),
                               strict=True):
        kinds = np.stack(weights)
        is_there |= kinds.any(axis=1)
        is_lost = np.isnan(change[0])
        if is_lost.any():
            # Who has no such latency is in no metric; what would be of one has no value.
            found[kinds[:, is_lost].any(axis=1)] = np.nan
            change = np.where(is_lost, 0.0, change)
        # A small product: threads of a matrix library would take longer to meet than to multiply.
        found += np.einsum("mr,fr->mf", kinds, change)
    instances = int(own.instance.max(initial=-1)) + 1
    seconds = np.sum(atoms * own.whole, axis=2)
    busy = np.stack([np.bincount(own.instance, row, instances) for row in seconds])
    at_work = np.stack([one.busy for one in measured])
    is_there |= at_work.any(axis=1)
    found += np.einsum("mi,fi->mf", at_work[:, :instances], busy)
    return {(name, field): float(found[row, column]) for row, name in enumerate(known) if is_there[row]
            for column, field in enumerate(fields)}


def _watts(scenario: Scenario, field: str, instances: int) -> tuple[Any, Any] | None:
    """Of what devices draw, idle and at work, by the logarithm of a field; None where nothing changes."""
    if not field.startswith("device."):
        return None
    try:
        near = costs.neighbours(scenario, field, costs.STEP)
    except InputError:
        return None
    if near is None:
        return None
    drawn, weights = [devices_of(one, instances) for one, _ in near], [weight for _, weight in near]
    idle, busy = (costs.slope(weights, [getattr(one, name) for one in drawn]) for name in ("idle_w", "busy_w"))
    return (idle, busy) if np.any(idle) or np.any(busy) else None
