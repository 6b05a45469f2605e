"""Llumnix (arXiv 2406.03243, OSDI 2024): live migration between instances, urgent requests, scaling.

Four studies of LLaMA-7B on A10s, with the lengths of the trace "Medium" as far as they are published: load with and
without migration, urgent requests with and without priorities, bands of scaling, and the stop of a migration by context
length.

Known gaps: the A10 is priced by the roofline, with the efficiency of another GPU with GDDR memory, not from
measurements; engines are vLLM V1's, which chunk prompts, where Llumnix ran on vLLM 0.1.7; the distribution of lengths
is a log-normal through the published mean and median of prompts; a migration costs its copies alone, where Llumnix's
also pays for handshakes.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from jaxsim.engine import lower
from jaxsim.engine.simulate import simulate
from jaxsim.io.figure import FAINT, INK, LIMIT, LINE, drawn, heading
from jaxsim.reproduce.claim import FALLS, RISES, Claim, Reproduction
from jaxsim.reproduce.runs import half_width, means_in_order, simulated, study

DESCRIPTION = "Llumnix: live migration on 16 A10s with LLaMA-7B, urgent requests, scaling, the stop of a migration"

PAPER = "arXiv 2406.03243"

RATE, TAKES, INPUT = "workload.rate_rps", "cluster.migration.in_above", "workload.input"
LAST, OUT = "cluster.migration.last_stage_blocks", "cluster.scaling.out_below"
POLICY = "engine.scheduling_policy"

MIGRATES, STAYS = 10.0, 1e9
"""Values of `TAKES`: instances freer than this take requests."""

LIVE, BLOCKING = 16, 100_000
"""Values of `LAST`."""

RATES = "how many times depends on the rate, and those at which the published traces were run are not at hand"

ARITHMETIC = "arithmetic on both sides: what the studies below are made of"

COPIES_MS = {1024: 67.0, 8192: 537.0}
"""Milliseconds that the KV of so many tokens of LLaMA-7B takes over 64 Gb/s: arithmetic."""


def reproduce(num_seeds: int | None = None) -> Reproduction:
    """Run the studies and compare; num_seeds: of every point, the studies' own if not given."""
    load = simulated(study("llumnix-load", num_seeds))
    scaling = simulated(study("llumnix-scaling", num_seeds))
    downtime = simulated(study("llumnix-downtime", num_seeds))
    urgent = _urgent(num_seeds)
    claims = (*_memory_claims(), *_load_claims(load), *_urgent_claims(urgent), *_scaling_claims(scaling),
              *_downtime_claims(downtime))
    return Reproduction(claims, lambda path: _draw(load, scaling, downtime, path))


def _urgent(num_seeds: int | None) -> pd.DataFrame:
    """Mean milliseconds of urgent requests, a row a run."""
    made = study("llumnix-urgent", num_seeds)
    points = list(made.points())
    result = simulate([made.scenario_at(point) for point in points])
    rows = []
    for index, (point, lanes) in enumerate(zip(points, result.lanes, strict=True)):
        for seed, lane in enumerate(lanes):
            is_urgent = lane.tenant == lane.tenant_names.index("urgent")
            mine = {name: 1e3 * float(np.nanmean((until - lane.arrival_s + lane.front_end_s)[is_urgent]))
                    for name, until in (("ttft_ms", lane.first_token_s), ("e2e_ms", lane.finish_s))}
            rows.append({"point": index, "seed": seed, **point, **mine})
    return pd.DataFrame(rows)


def _memory_claims() -> list[Claim]:
    """The KV cache of LLaMA-7B, and what copying it takes."""
    made = study("llumnix-load")
    scenario = made.scenario_at(next(iter(made.points())))
    bytes_per_token, bytes_per_s = lower.migration_rates(scenario, lower.resolve_system(scenario))
    claims = [Claim(system="llumnix", claim="KV of a token of LLaMA-7B, MiB", source="arithmetic", paper=0.5,
                    ours=float(bytes_per_token / 2**20), tolerance=None, reason=ARITHMETIC)]
    return claims + [Claim(
        system="llumnix", claim=f"{tokens} tokens over 64 Gb/s, ms", source="arithmetic", paper=paper,
        ours=float(1e3 * tokens * bytes_per_token / bytes_per_s), tolerance=None, reason=ARITHMETIC)
        for tokens, paper in COPIES_MS.items()]


def _gain(load: pd.DataFrame, metric: str) -> pd.Series:
    """How many times larger a metric is without migration, by rate: means over seeds. Rates at which most runs with
    either fall behind are left out."""
    means = load.pivot_table(index=RATE, columns=TAKES, values=metric)
    behind = load.assign(unstable=load["unstable"].astype(float).fillna(0)).groupby(RATE)["unstable"].mean()
    return (means[STAYS] / means[MIGRATES])[behind <= 0.5]


def _in_runs(rows: pd.DataFrame) -> str:
    """In how many runs, of those at one rate, somebody queues: means of P99 TTFT are of these."""
    each = rows.pivot(index="seed", columns=TAKES, values="p99_ttft_ms")
    longer = int((each[STAYS] > 2 * each[MIGRATES]).sum())
    return (f"in {longer} of {len(each)} runs more than twice as long without migration; median over runs"
            f" {each[STAYS].median():.4g} and {each[MIGRATES].median():.4g}")


def _load_claims(load: pd.DataFrame) -> list[Claim]:
    claims = []
    for metric, what in (("preemptions.total", "preemptions"), ("p99_ttft_ms", "P99 TTFT, ms"),
                         ("p99_e2el_ms", "P99 end to end, ms")):
        for rate in sorted(load[RATE].unique()):
            rows = load[load[RATE] == rate]
            values, margins = means_in_order(rows, TAKES, (STAYS, MIGRATES), metric)
            claims.append(Claim(
                system="llumnix", claim=f"{what} at {rate:g} requests/s: without migration, with it", source=PAPER,
                paper=FALLS, ours=values, tolerance=margins, reason=_in_runs(rows) if metric == "p99_ttft_ms" else ""))
    stall_ms = load["preemptions.mean_stall_ms"].astype(float).fillna(0)
    lost = load.assign(loss=load["preemptions.requests_share"] * stall_ms)
    saved = 1 - 1 / _gain(lost, "loss")
    claims.append(Claim(
        system="llumnix", claim="time lost to preemptions a request, saved by migration, mean over rates", source=PAPER,
        paper=0.704, ours=float(saved.mean()), tolerance=0.15 / 0.704,
        reason="the baseline preempts more here: instances are V1's, dispatch is by freeness"))
    for metric, what, paper in (("p99_ttft_ms", "P99 TTFT", 14.8), ("p99_e2el_ms", "P99 end to end", 2.9),
                                ("p99_tpot_ms", "P99 of time per output token", 2.0)):
        claims.append(Claim(
            system="llumnix", claim=f"{what}: up to so many times shorter with migration", source=PAPER, paper=paper,
            ours=float(_gain(load, metric).max()), tolerance=None, reason=RATES))
    return claims


def _urgent_claims(urgent: pd.DataFrame) -> list[Claim]:
    means = urgent.pivot_table(index="workload.cv", columns=POLICY, values=["e2e_ms", "ttft_ms"])
    e2e, ttft = (means[metric]["fcfs"] / means[metric]["priority"] for metric in ("e2e_ms", "ttft_ms"))
    burstiest = urgent[urgent["workload.cv"] == urgent["workload.cv"].max()]
    claims = [Claim(
        system="llumnix", claim=f"urgent requests, mean {what}, ms, at the burstiest: without priorities, with them",
        source=PAPER, paper=FALLS, ours=values, tolerance=margins)
        for what, (values, margins) in ((name, means_in_order(burstiest, POLICY, ("fcfs", "priority"), metric))
                                        for name, metric in (("end to end", "e2e_ms"), ("TTFT", "ttft_ms")))]
    return [
        *claims,
        Claim(system="llumnix", claim="urgent requests end to end: up to so many times faster with priorities",
              source=PAPER, paper=1.5, ours=float(e2e.max()), tolerance=0.15,
              reason="outputs are most of it, and those of an urgent request take little longer in a full batch than"
                     " alone, by the roofline; the paged attention of vLLM 0.1.7 was slower than that"),
        Claim(system="llumnix", claim="urgent requests: 2.9 to 8.6 times faster, of what is unclear; ours: TTFT",
              source=PAPER, paper=None, ours=float(ttft.max()), tolerance=None,
              reason="it is not known which latency this is")]


def _saved(scaling: pd.DataFrame) -> float:
    """The largest share of instances saved at equal P99 TTFT, between the points of both sweeps; NaN if they share no
    P99."""
    curves = {}
    for takes in (STAYS, MIGRATES):
        rows = scaling[scaling[TAKES] == takes].groupby(OUT)[["scaling.mean_instances", "p99_ttft_ms"]].mean()
        curves[takes] = rows.sort_values("p99_ttft_ms").to_numpy().T
    (many, slow), (few, fast) = curves[STAYS], curves[MIGRATES]
    at = np.unique(np.concatenate([slow, fast]))
    at = at[(at >= max(slow[0], fast[0])) & (at <= min(slow[-1], fast[-1]))]
    return float(np.max(1 - np.interp(at, fast, few) / np.interp(at, slow, many))) if len(at) else float("nan")


def _scaling_claims(scaling: pd.DataFrame) -> list[Claim]:
    return [Claim(system="llumnix", claim="instances saved by migration at equal P99 TTFT, at most", source=PAPER,
                  paper=0.36, ours=_saved(scaling), tolerance=0.25,
                  reason="where the sweeps with and without migration have a P99 in common; those without are of"
                         " few runs, some of which queue for minutes")]


def _downtime_claims(downtime: pd.DataFrame) -> list[Claim]:
    means = downtime.pivot_table(index=INPUT, columns=LAST, values="migrations.mean_downtime_ms")
    blocking, margins = means_in_order(downtime[downtime[LAST] == BLOCKING], INPUT, list(means.index),
                                       "migrations.mean_downtime_ms")
    spread = float(means[LIVE].max() / means[LIVE].min())
    # How much longer the stop is with the longest context than with the shortest, a row a seed.
    ends = downtime[downtime[INPUT].isin([means.index.min(), means.index.max()])]
    grown = ends.pivot_table(index=["seed", LAST], columns=INPUT, values="migrations.mean_downtime_ms")
    grown = grown.diff(axis=1).iloc[:, -1].rename("grown").reset_index()
    growth, noise = means_in_order(grown, LAST, (BLOCKING, LIVE), "grown")
    return [
        Claim(system="llumnix", claim="stop of a migration that copies all at once, by context of 512 to 7168, ms",
              source=PAPER, paper=RISES, ours=blocking, tolerance=margins),
        Claim(system="llumnix", claim="stop longer by context of 7168 than of 512, ms: copied all at once, live",
              source=PAPER, paper=FALLS, ours=growth, tolerance=noise),
        Claim(system="llumnix", claim="stop of a live migration: longest over shortest, contexts of 512 to 7168",
              source=PAPER, paper=1.0, ours=spread, tolerance=0.25, reason="one block is left to copy, or two"),
        Claim(system="llumnix", claim="stop of a live migration, ms (20 to 30)", source=PAPER, paper=25.0,
              ours=float(means[LIVE].mean()), tolerance=0.2, reason="copies alone; handshakes take no time here"),
        Claim(system="llumnix", claim="stop of a copy of 8k tokens of LLaMA-30B over that of a migration: 111",
              source="unconfirmed", paper=None, ours=float((means[BLOCKING] / means[LIVE]).max()), tolerance=None,
              reason="published for another model, and not confirmed")]


def _draw(load: pd.DataFrame, scaling: pd.DataFrame, downtime: pd.DataFrame, path: Path) -> None:
    with drawn(path, figsize=(13, 4.2)) as figure:
        axes = figure.subplots(1, 4)
        _lines(axes[0], load, RATE, "p99_ttft_ms", "P99 TTFT, ms", "requests/s")
        _lines(axes[1], load, RATE, "preemptions.total", "Preemptions", "requests/s")
        axes[1].legend(loc="upper left")
        for takes, colour, label in ((STAYS, FAINT, "stays"), (MIGRATES, LINE, "migrates")):
            rows = scaling[scaling[TAKES] == takes].groupby(OUT)[["scaling.mean_instances", "p99_ttft_ms"]].mean()
            axes[2].plot(rows.iloc[:, 0], rows.iloc[:, 1], "o-", color=colour, label=label)
        axes[2].set(title="Scaling: P99 TTFT, ms", xlabel="mean instances", yscale="log")
        for last, colour, label in ((BLOCKING, LIMIT, "all at once"), (LIVE, INK, "live")):
            means = downtime[downtime[LAST] == last].groupby(INPUT)["migrations.mean_downtime_ms"].mean()
            axes[3].plot(means.index, means, "o-", color=colour, label=label)
        axes[3].set(title="Stop of a migration, ms", xlabel="prompt tokens", yscale="log")
        axes[3].legend()
        heading(figure, "Llumnix: LLaMA-7B on A10s, lengths of the trace Medium")


def _lines(axis: Any, load: pd.DataFrame, by: str, metric: str, title: str, label: str) -> None:
    for takes, colour, name in ((STAYS, FAINT, "stays"), (MIGRATES, LINE, "migrates")):
        rows = load[load[TAKES] == takes].pivot(index="seed", columns=by, values=metric)
        axis.errorbar(rows.columns, rows.mean(), half_width(rows.to_numpy(float)), color=colour, marker="o", label=name)
    axis.set(title=title, xlabel=label, yscale="log", xticks=sorted(load[by].unique()))
