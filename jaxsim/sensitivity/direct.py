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
        # Of what is 0 in every run no per cent are known.
        mine = {name: measure for name, measure in one.items() if sums.get(name)}
        by_times = _by_times(own, change, mine) if change else {}
        for field in fields:
            by_field, front_end = watts[field], made.front_end_s if field == FRONT_END else 0.0
            for name, measure in mine.items():
                value, is_there = by_times.get((name, field), 0.0), (name, field) in by_times
                if measure.front_end * front_end != 0:
                    value, is_there = value + measure.front_end * front_end, True
                if by_field is not None and (measure.busy_w.any() or measure.idle_w.any()):
                    value += float(measure.idle_w @ by_field[0] + measure.busy_w @ by_field[1])
                    is_there = True
                if is_there:
                    found[name, field] = found.get((name, field), 0.0) + value / sums[name]
    return {pair: float(value) for pair, value in found.items()}


def _by_times(own: Schedule, atoms: dict[str, np.ndarray], known: dict[str, Measure]) -> dict[tuple[str, str], float]:
    """Of metrics that times are in, by (metric, field): what they change by while atoms change as by each field."""
    stacked, measured = np.stack(list(atoms.values())), list(known.values())
    found, is_there = np.zeros((len(measured), len(atoms))), np.zeros(len(measured), bool)
    if not measured:
        return {}
    for weights, change in zip(zip(*(one.latencies for one in measured), strict=True), own.latencies(stacked),
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
    seconds = np.sum(stacked * own.whole, axis=2)
    busy = np.stack([np.bincount(own.instance, row, instances) for row in seconds])
    at_work = np.stack([one.busy for one in measured])
    is_there |= at_work.any(axis=1)
    found += np.einsum("mi,fi->mf", at_work[:, :instances], busy)
    return {(name, field): float(found[row, column]) for row, name in enumerate(known) if is_there[row]
            for column, field in enumerate(atoms)}


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
