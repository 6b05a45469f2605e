"""The direct effect of a number: what a metric changes by while every iteration does what it did (forward mode).

Iterations get longer or shorter, requests come as far into them as they came, and who runs with whom stays. What is
left out is the feedback of queueing: that longer iterations let more requests wait, and join, and make them longer yet.
`total` derivatives, by differences of whole runs, have it; the gap between the two is how much of an effect it is.

    number -> parameters of the cost model -> tables -> seconds of iterations -> latencies -> metric

The loop carries the derivatives of all latencies by all fields along (`jaxsim.engine.tangents`), over the seeds in one
program; what a metric makes of them is on the host (`jaxsim.sensitivity.measures`).
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import numpy as np
from jaxtyping import PyTree

from jaxsim._core.errors import InputError
from jaxsim.engine import tangents
from jaxsim.engine.outcomes import Lane, lane_result
from jaxsim.engine.simulate import prepare, run_together
from jaxsim.engine.tangents import Changes
from jaxsim.metrics import LaneResult
from jaxsim.metrics.power import devices_of
from jaxsim.sensitivity import costs
from jaxsim.sensitivity.measures import Measure, measures
from jaxsim.sensitivity.runs import check_ends, filled_up, in_batches
from jaxsim.spec.dims import Dims
from jaxsim.spec.scenario import Scenario

FRONT_END = "cost.front_end_s"

Direct = dict[tuple[int, str, str], float]
"""Elasticities by (index of the scenario, metric, field)."""


class Moved(NamedTuple):
    """One run: as it was made, what came out, and what its times change by, by the logarithm of each of `fields`."""

    made: Lane
    result: LaneResult
    changes: Changes
    fields: tuple[str, ...]


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
    """The same, and by index why a scenario has none: its schedule does not tell, or a bound stopped a run of it."""
    found: Direct = {}
    without: dict[int, InputError] = {}
    for index, runs in moved(scenarios, fields):
        try:
            if isinstance(runs, InputError):
                raise runs
            check_ends([run.result for run in runs])
        except InputError as error:
            without[index] = error
            continue
        pairs = of_runs(scenarios[index], runs, fields, metrics)
        found |= {(index, metric, field): value for (metric, field), value in pairs.items()}
    return found, dict(sorted(without.items()))


def moved(scenarios: Sequence[Scenario], fields: Sequence[str]) -> Iterator[tuple[int, list[Moved] | InputError]]:
    """The runs of every scenario with derivatives by those fields that change what iterations take, as
    `jaxsim.sensitivity.runs.in_batches` has them."""
    names: dict[int, tuple[str, ...]] = {}

    def prepared(index: int, scenario: Scenario) -> list[Lane]:
        lanes = prepare(index, scenario, record_steps=False)
        model = costs.cost_model(lanes[0], scenario)
        by_field = costs.tangents(model, lanes[0], scenario, fields)
        names[index] = tuple(by_field)
        return _with_tangents(lanes, list(by_field.values()))

    def run(dims: Dims, group: list[Lane], width: int) -> list[Moved]:
        world = jax.device_get(run_together(filled_up(group, width))[1])
        return [Moved(made, lane_result(dims, world, index, made), _changes(dims, world, index, made),
                      names[made.scenario]) for index, made in enumerate(group)]

    return in_batches(scenarios, prepared, run)


def _with_tangents(lanes: list[Lane], given: Sequence[PyTree]) -> list[Lane]:
    """Runs of a scenario that carry derivatives along; given: of the tables of its cost. With many these are padded, so
    that scenarios share programs."""
    groups = lanes[0].params.groups
    if not given or len(groups) > 1:
        return lanes
    step = 1 << max(len(given).bit_length() - 3, 0)
    size = -(-len(given) // step) * step

    def rows(own, *changes):
        if own is None:
            return None
        # What was left of rounding tables has no derivative.
        made = np.zeros((size, *own.shape), own.dtype)
        for row, change in enumerate(changes):
            made[row] = 0 if change is None else change
        return made

    along = jax.tree.map(rows, eqx.filter(groups[0].cost, eqx.is_inexact_array), *given, is_leaf=lambda x: x is None)
    dims = dataclasses.replace(lanes[0].dims, num_tangents=size)
    return [dataclasses.replace(lane, dims=dims, params=dataclasses.replace(lane.params, tangents=along))
            for lane in lanes]


def _changes(dims: Dims, world: Any, index: int, made: Lane) -> Changes:
    count = len(made.workload)
    if dims.num_tangents:
        return tangents.read(dims, world, index, count)
    return Changes(*(np.zeros((0, size)) for size in (count, count, count, dims.all_ranks)))


def of_runs(scenario: Scenario, runs: Sequence[Moved], fields: Sequence[str], metrics: Sequence[str]
            ) -> dict[tuple[str, str], float]:
    """Elasticities of one scenario, by (metric, field): sum of the changes over the runs to the sum of the values, as
    `total` is of the mean too."""
    made = runs[0].made
    known = measures(scenario, [run.result for run in runs], answers=made.params.source.answers, only=metrics)
    # Of what is 0 in every run no per cent are known.
    known = {name: measure for name, measure in known.items() if measure.value}
    by_times = _by_times(runs, known) if known else {}
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


def _by_times(runs: Sequence[Moved], known: dict[str, Measure]) -> dict[tuple[str, str], float]:
    """Of metrics that times are in, by (metric, field): what they change by with all times of the runs."""
    measured, fields = list(known.values()), runs[0].fields
    weights = [np.stack(rows) for rows in (*zip(*(one.latencies for one in measured), strict=True),
                                           [one.busy for one in measured])]
    changes = [np.concatenate(rows, axis=1)[:len(fields)] for rows in zip(*(run.changes for run in runs), strict=True)]
    is_there = np.any([rows.any(axis=1) for rows in weights], axis=0)
    # A small product: threads of a matrix library would take longer to meet than to multiply.
    found = sum(np.einsum("mr,fr->mf", *pair) for pair in zip(weights, changes, strict=True))
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
