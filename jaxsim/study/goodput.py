"""Goodput: the highest rate at which a system keeps its limits, for many systems at once.

Every round simulates the same number of rates inside each system's bracket, all systems, rates and seeds in one batch:
the rate only stretches the arrivals, so no round compiles anything. A bracket ends between the first rate tried that
misses the target and the one below. The requests are the same at all rates.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import msgspec
import numpy as np
import pandas as pd
from scipy.special import stdtrit

from jaxsim._core.errors import InputError
from jaxsim.spec.scenario import Scenario, SloSection
from jaxsim.study import runner

RATES_A_ROUND = 8
MOST_ROUNDS = 12
WIDEN = 64.0
"""A bracket that holds no answer is moved on by this factor."""

LOWEST_RPS, HIGHEST_RPS = 1e-4, 1e6
"""Beyond these it is not moved: nobody is alone at a lower rate, and all come at once at a higher."""

Rule = Literal["joint", "separate"]


def search(scenarios: Sequence[Scenario], *, slo: SloSection | None = None, attainment: float = 0.9,
           rule: Rule = "joint", rates: tuple[float, float] = (0.1, 100.0), tolerance: float = 0.02,
           workers: int | None = None,
           progress: Callable[[str, int, int], None] = lambda *_: None) -> pd.DataFrame:
    """The goodput of every scenario: a row each.

    slo: limits, instead of each scenario's own. attainment: share of requests that must meet them, all of them at once
    (`joint`) or each by itself (`separate`, DistServe's rule). rates: requests/s to begin with; a bracket that they
    miss is moved on. tolerance: relative width of the bracket at the end.

    Columns: rate_rps, the highest rate found to meet the target with all tried below it (0 if none did, NaN if the
    scenario cannot be simulated: `refused` says why); next_rps, the lowest found to miss it (infinite if none did);
    rate_rps.ci95, half of the 95 % interval of the highest of the rates tried that single seeds meet, coarse where a
    seed is far from the mean; attainment, mean_ttft_ms, p99_ttft_ms, mean_tpot_ms, output_throughput,
    usd_per_million_output_tokens at `rate_rps`. A rate at which requests pile up (`unstable`) misses
    the target, however few there are. Raises `InputError`.
    """
    wanted = [s if slo is None else msgspec.structs.replace(s, slo=slo) for s in scenarios]
    _check(wanted, attainment, rates, tolerance)
    low, high = np.full(len(wanted), rates[0]), np.full(len(wanted), rates[1])
    # Whether the ends of a bracket were tried.
    is_low_met, is_high_missed, is_given_up = (np.zeros(len(wanted), bool) for _ in range(3))
    tried: list[pd.DataFrame] = []
    refused: dict[int, str] = {}
    for turn in range(MOST_ROUNDS):
        is_done = is_low_met & is_high_missed & (high <= low * (1 + tolerance)) | is_given_up
        if all(is_done[k] or k in refused for k in range(len(wanted))):
            break
        # Ends that were not tried yet are part of the round.
        steps = RATES_A_ROUND - 1 + is_low_met + is_high_missed
        share = (is_low_met[:, None] + np.arange(RATES_A_ROUND)) / steps[:, None]
        inner = low[:, None] * (high / low)[:, None] ** share
        asked = [(k, j, scenario_at(wanted[k], rate)) for k in range(len(wanted)) for j, rate in enumerate(inner[k])]
        progress("searching", turn * len(asked), 0)
        frame, why = runner.table([scenario for *_, scenario in asked], workers=workers)
        # A rate that cannot be simulated is missed; a system of which none can is refused.
        for k in {asked[index][0] for index in why}:
            mine = [index for index, (owner, *_) in enumerate(asked) if owner == k]
            if all(index in why for index in mine):
                refused.setdefault(k, why[mine[0]])
        frame["scenario"] = [asked[p][0] for p in frame["point"]]
        frame["rate_rps"] = [inner[asked[p][0], asked[p][1]] for p in frame["point"]]
        tried.append(frame)
        for k in range(len(wanted)):
            if k in refused or is_done[k]:
                continue
            mine = frame[frame["scenario"] == k]
            met = [_meets(mine[mine["rate_rps"] == rate], wanted[k].slo, attainment, rule) for rate in inner[k]]
            first = met.index(False) if False in met else len(met)
            if first:
                low[k], is_low_met[k] = inner[k, first - 1], True
            if first < len(met):
                high[k], is_high_missed[k] = inner[k, first], True
            if not first and not is_low_met[k]:
                is_given_up[k], low[k] = low[k] <= LOWEST_RPS, max(low[k] / WIDEN, min(LOWEST_RPS, low[k]))
            elif first == len(met) and not is_high_missed[k]:
                is_given_up[k], high[k] = high[k] >= HIGHEST_RPS, min(high[k] * WIDEN, max(HIGHEST_RPS, high[k]))
    runs = pd.concat(tried, ignore_index=True) if tried else pd.DataFrame()
    return pd.DataFrame([_row(k, runs, refused.get(k), low[k] if is_low_met[k] else 0.0,
                              high[k] if is_high_missed[k] else np.inf, wanted[k].slo, attainment, rule)
                         for k in range(len(wanted))])


def scenario_at(scenario: Scenario, rate_rps: float) -> Scenario:
    """The scenario at another rate."""
    workload = msgspec.structs.replace(scenario.workload, rate_rps=float(rate_rps))
    return msgspec.structs.replace(scenario, workload=workload)


def _check(scenarios, attainment, rates, tolerance) -> None:
    for slo in (scenario.slo for scenario in scenarios):
        if slo.ttft_ms is None and slo.tpot_ms is None and slo.e2e_ms is None:
            raise InputError("--slo", None, "names no limit", "give e.g. --slo ttft:200 tpot:50, milliseconds")
    if not 0 < attainment <= 1:
        raise InputError("--attainment", attainment, "is not a share", "give e.g. 0.9")
    if not 0 < rates[0] < rates[1] < float("inf"):
        raise InputError("--rates", list(rates), "is no range of rates", "give the lower, then the higher")
    if not 1e-4 <= tolerance < 1:
        raise InputError("--tolerance", tolerance, "is not between 0.0001 and 1", "give e.g. 0.02")
    for scenario in scenarios:
        if scenario.workload.kind in ("closed-loop", "batch"):
            raise InputError("workload.kind", scenario.workload.kind, "has no rate to search over",
                             "use an open arrival process, or a trace")
        if scenario.warmup_s:
            raise InputError("warmup_s", scenario.warmup_s, "is longer than whole runs at high rates", "leave it out")


def _attained(runs: pd.DataFrame, slo: SloSection, rule: Rule) -> pd.Series:
    """By run: the share that counts."""
    if rule == "joint":
        return runs["slo.attainment"]
    names = [f"slo.{name}_attainment" for name in ("ttft", "tpot", "e2e") if getattr(slo, f"{name}_ms") is not None]
    return runs[names].min(axis=1)


def _meets(runs: pd.DataFrame, slo: SloSection, attainment: float, rule: Rule) -> bool:
    """Whether a rate meets the target in the mean over seeds, and most of them do not see requests pile up."""
    if not len(runs) or runs["fault"].notna().any():
        return False
    return bool(_attained(runs, slo, rule).mean() >= attainment and not runs["unstable"].mean() > 0.5)


def _row(k: int, runs: pd.DataFrame, refusal: str | None, low: float, high: float, slo: SloSection, attainment: float,
         rule: Rule) -> dict:
    row = {"scenario": k, "rate_rps": np.nan, "next_rps": np.nan, "rate_rps.ci95": np.nan, "attainment": np.nan}
    shown = ("mean_ttft_ms", "p99_ttft_ms", "mean_tpot_ms", "p99_tpot_ms", "output_throughput", "num_devices",
             "usd_per_million_output_tokens")
    row |= dict.fromkeys(shown, np.nan) | {"refused": refusal}
    if refusal is not None:
        return row
    mine = runs[runs["scenario"] == k]
    row |= {"rate_rps": low, "next_rps": high}
    by_seed = [_of_seed(group, slo, attainment, rule) for _, group in mine.groupby("seed")]
    if len(by_seed) > 1:
        row["rate_rps.ci95"] = float(stdtrit(len(by_seed) - 1, 0.975) * np.std(by_seed, ddof=1) / np.sqrt(len(by_seed)))
    here = mine[mine["rate_rps"] == low]
    if len(here):
        row["attainment"] = float(_attained(here, slo, rule).mean())
        row |= {name: float(here[name].mean()) for name in shown if name in here}
    return row


def _of_seed(runs: pd.DataFrame, slo: SloSection, attainment: float, rule: Rule) -> float:
    """The highest rate tried that one seed meets with all below."""
    ordered = runs.sort_values("rate_rps")
    is_met = (_attained(ordered, slo, rule) >= attainment) & ~(ordered["unstable"] > 0.5)
    misses = np.flatnonzero(~is_met.to_numpy())
    first = misses[0] if len(misses) else len(ordered)
    return float(ordered["rate_rps"].iloc[first - 1]) if first else 0.0
