"""Figures of single tenants, `tenants.NAME.*` of the summary: a study's table has none, so they are of its requests.

Known gaps: `tenants.NAME.service_share` is refused, since what was served while requests arrived is not in a row of a
request.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from jaxsim.metrics.lane import FINISHED, STATUS_NAMES
from jaxsim.metrics.limits import meets
from jaxsim.metrics.window import measured_span_s
from jaxsim.spec.scenario import Scenario
from jaxsim.study.lanes import Lanes

COLUMNS = {"ttft": "ttft_s", "tpot": "tpot_s", "e2el": "e2e_s"}
"""Of requests, by latency."""

LATENCIES = {f"{statistic}_{name}_ms": (statistic, name) for name in COLUMNS for statistic in ("mean", "p50", "p99")}
"""Statistic and latency by the name of the figure, as the summary has them."""

FIGURES = ("requests", "completed", "failed", "attainment", *LATENCIES)


def parts(metric: str) -> tuple[str, str] | None:
    """The tenant and the figure of `tenants.NAME.FIGURE`; None for other metrics."""
    head, _, rest = metric.partition(".")
    name, _, figure = rest.rpartition(".")
    return (name, figure) if head == "tenants" and name else None


def missing(metric: str, scenario: Scenario, lanes: Lanes) -> str:
    """Why no run of a scenario has such a figure; "" else."""
    name, figure = parts(metric)
    workload = lanes.workload(scenario, scenario.seeds[0])
    if len(workload.tenant_names) < 2:
        return "the scenario has no tenants to tell apart"
    if name not in workload.tenant_names:
        return f"the scenario's tenants are {', '.join(workload.tenant_names)}"
    if figure not in FIGURES:
        return f"of a tenant there are {', '.join(FIGURES)}"
    mine = next((t for t in scenario.workload.tenants if t.name == name), None)
    limits = [getattr(scenario.slo, field) for field in ("ttft_ms", "tpot_ms", "e2e_ms")]
    limits += [getattr(mine, field, None) for field in ("ttft_ms", "tpot_ms", "deadline_ms")]
    if figure == "attainment" and not any(limits):
        return f"{name} has no limits"
    if figure.endswith("tpot_ms") and lanes.shape(scenario).longest_output <= 1:
        return "every answer is one token, behind which there is no gap"
    return ""


def columns(scenarios: Sequence[Scenario], requests: pd.DataFrame, metrics: Sequence[str], lanes: Lanes
            ) -> pd.DataFrame:
    """A row a run with `point`, the place of its scenario, `seed`, and those of the metrics that are of tenants."""
    rows = []
    for (point, seed), frame in requests.groupby(["point", "seed"], sort=True):
        frame, scenario = frame.sort_values("request_id"), scenarios[int(point)]
        workload = lanes.workload(scenario, int(seed))
        frame = frame.assign(tenant=np.asarray(workload.tenant_names, object)[workload.tenant])
        met = meets(frame, scenario.slo, scenario.workload.tenants)
        arrival_s = frame["arrival_s"].to_numpy()
        _, end_s = measured_span_s(arrival_s, scenario.warmup_s, scenario.cooldown_s)
        is_mine = (arrival_s - arrival_s[:1] >= scenario.warmup_s) & (arrival_s <= end_s)
        is_done = is_mine & (frame["status"] == STATUS_NAMES[FINISHED]).to_numpy()
        row = {"point": point, "seed": seed}
        for metric in metrics:
            name, figure = parts(metric)
            is_own = (frame["tenant"] == name).to_numpy()
            row[metric] = _figure(figure, frame, is_mine & is_own, is_done & is_own, met)
        rows.append(row)
    return pd.DataFrame(rows)


def _figure(figure: str, frame: pd.DataFrame, is_mine: np.ndarray, is_done: np.ndarray, met: dict) -> float:
    """NaN where there is none."""
    if figure in ("requests", "completed"):
        return float((is_mine if figure == "requests" else is_done).sum())
    if figure == "failed":
        return float(is_mine.sum() - is_done.sum())
    if figure == "attainment":
        return float(met["all"][is_mine].mean()) if met and is_mine.any() else np.nan
    statistic, latency = LATENCIES[figure]
    seconds = frame[COLUMNS[latency]].to_numpy()[is_done]
    seconds = seconds[~np.isnan(seconds)]
    if not len(seconds):
        return np.nan
    return 1e3 * float(seconds.mean() if statistic == "mean" else np.percentile(seconds, int(statistic[1:])))
