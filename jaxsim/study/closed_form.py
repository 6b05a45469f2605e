"""A study in closed form: every point's steady state, without a simulation, in one compiled call where plans allow.

`jaxsim sweep STUDY --closed-form`. Means only; what has no closed form is a row with the reason.
"""

from typing import Any

import pandas as pd

from jaxsim._core.errors import InputError
from jaxsim.analytic import plans
from jaxsim.analytic.columns import columns
from jaxsim.analytic.lower import load_of_scenario
from jaxsim.spec.plan import plan_of
from jaxsim.spec.scenario import Scenario
from jaxsim.study.lanes import Lanes
from jaxsim.study.study import Study


def closed_form(study: Study) -> tuple[pd.DataFrame, int]:
    """A row a point, and the number of programs that were compiled for all. Raises `InputError` where the study is
    wrong.

    Columns: the point's fields; plan; devices; refused; those of `jaxsim.analytic.columns` (rate_within_limits: up to
    which means keep [slo]); kv_tokens: KV capacity of one replica, of all its ranks.
    """
    points, base, lanes = list(study.points()), study.base_tree(), Lanes()
    if not points:
        raise InputError("where", study.where, "leaves no point of the study", "loosen a condition")
    scenarios: list[Scenario | InputError] = []
    for point in points:
        try:
            scenarios.append(study.scenario_at(point, base))
        except InputError as error:
            scenarios.append(error)
    able = [s for s in scenarios if isinstance(s, Scenario)]
    made = iter(zip(able, plans.of_scenarios(able, lanes.system), strict=True))
    rows, executors, loads, limits, places = [], [], [], [], []
    for point, scenario in zip(points, scenarios, strict=True):
        row: dict[str, Any] = dict(point)
        if isinstance(scenario, InputError):
            rows.append(row | {"refused": str(scenario)})
            continue
        _, executor = next(made)
        row |= {"plan": plan_of(scenario.engine).label, "devices": scenario.num_devices}
        try:
            if isinstance(executor, InputError):
                raise executor
            loads.append(load_of_scenario(scenario, lanes.workload))
        except InputError as error:
            rows.append(row | {"refused": str(error)})
            continue
        executors.append(executor)
        limits.append(tuple(None if ms is None else ms / 1e3 for ms in (
            scenario.slo.ttft_ms, scenario.slo.tpot_ms, scenario.slo.e2e_ms)))
        places.append((len(rows), scenario))
        rows.append(row | {"refused": None})
    if not executors:
        raise InputError("axes", f"{len(points):,} points", "are all refused",
                         f"mend what they have in common; the first: {rows[0]['refused']}")
    found = plans.screened(executors, loads, limits)
    for (place, scenario), executor, load, state, rate in zip(places, executors, loads, found.states, found.rates_rps,
                                                              strict=True):
        rows[place] |= columns(state, rate, float(load.output_tokens), scenario.num_devices,
                               lanes.system(scenario).device.usd_per_h)
        rows[place] |= {"kv_tokens": float(executor.kv_tokens) * float(executor.rank_count)}
    return pd.DataFrame(rows), found.num_programs
