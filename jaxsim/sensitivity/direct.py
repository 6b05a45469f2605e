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

from jaxsim._core.errors import InputError
from jaxsim.metrics.power import devices_of
from jaxsim.sensitivity import costs, schedule
from jaxsim.sensitivity.measures import Measure, measures
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
    schedules = [schedule.of_run(run) for run in runs]
    changes: list[dict[str, np.ndarray]] = [{} for _ in runs]
    if tangents:
        asked, _ = costs.joined([costs.asked_of(run.tape, own.record)
                                 for run, own in zip(runs, schedules, strict=True)])
        stacked = jax.tree.map(lambda *x: np.stack(x), *tangents.values())
        atoms, low = costs.forward(model.tables, asked, stacked), 0
        for change, own in zip(changes, schedules, strict=True):
            part = atoms[:, low:low + len(own.record)]
            change |= dict(zip(tangents, part, strict=True))
            low += len(own.record)
    watts = {field: _watts(scenario, field, len(runs[0].result.busy_s)) for field in fields}
    known = [measures(scenario, run.result, answers=made.params.source.answers, only=metrics) for run in runs]
    sums = {name: sum(one[name].value for one in known) for name in known[0] if all(name in one for one in known)}
    found: dict[tuple[str, str], float] = {}
    for own, change, one in zip(schedules, changes, known, strict=True):
        for field in fields:
            by_field = watts[field]
            front_end = made.front_end_s if field == FRONT_END else 0.0
            if field not in change and by_field is None and not front_end:
                continue
            for metric, value in _changes(own, change.get(field), by_field, front_end, one).items():
                # Of what is 0 in every run no per cent are known.
                if sums.get(metric):
                    found[metric, field] = found.get((metric, field), 0.0) + value / sums[metric]
    return {pair: float(value) for pair, value in found.items()}


def _changes(own: Schedule, atoms: np.ndarray | None, watts: tuple | None, front_end: float,
             known: dict[str, Measure]) -> dict[str, float]:
    """Of metrics, by the logarithm of a field."""
    latencies = busy = None
    if atoms is not None:
        latencies = own.latencies(atoms)
        busy = np.bincount(own.instance, np.sum(atoms * own.whole, axis=1))
    found = {}
    for name, one in known.items():
        value, is_there = one.front_end * front_end, one.front_end * front_end != 0
        if atoms is not None:
            for weights, change in zip(one.latencies, latencies, strict=True):
                mine = weights != 0
                value, is_there = value + float(weights[mine] @ change[mine]), is_there or bool(mine.any())
            value, is_there = value + float(one.busy[:len(busy)] @ busy), is_there or bool(one.busy.any())
        if watts is not None and (one.busy_w.any() or one.idle_w.any()):
            value, is_there = value + float(one.idle_w @ watts[0] + one.busy_w @ watts[1]), True
        if is_there:
            found[name] = value
    return found


def _watts(scenario: Scenario, field: str, instances: int) -> tuple[Any, Any] | None:
    """Of what devices draw, idle and at work, by the logarithm of a field; None where nothing changes."""
    if not field.startswith("device.numbers."):
        return None
    try:
        ends = [costs.changed(scenario, field, 1 + sign * costs.STEP) for sign in (1, -1)]
    except InputError:
        return None
    if None in ends:
        return None
    up, down = (devices_of(one, instances) for one in ends)
    idle, busy = ((a - b) / (2 * costs.STEP) for a, b in ((up.idle_w, down.idle_w), (up.busy_w, down.busy_w)))
    return (idle, busy) if np.any(idle) or np.any(busy) else None
