"""Llumnix (arXiv 2406.03243, OSDI 2024): live migration between instances, urgent requests, scaling.

Four studies of LLaMA-7B on A10s, with the lengths of the trace "Medium" as far as they are published: load with and
without migration, urgent requests with and without room kept for them, bands of scaling, and the stop of a migration by
context length.

Known gaps: the A10 is priced by the roofline, with the efficiency of another GPU with GDDR memory, not from
measurements; engines are vLLM V1's, which chunk prompts, where Llumnix ran on vLLM 0.1.7; the distribution of lengths
is a log-normal through the published mean and median of prompts; urgent requests have room kept for them but do not
overtake others in the queue; a migration costs its copies alone, where Llumnix's also pays for handshakes.
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

MIGRATES, STAYS = 10.0, 1e9
"""Values of `TAKES`: instances freer than this take requests."""

LIVE, BLOCKING = 16, 100_000
"""Values of `LAST`."""

OVERLOADED = ("at these rates queues grow without migration, so how many times depends on how long a run is; the rates"
              " at which the published traces were run are not at hand")

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
    """Mean end-to-end milliseconds of both classes, a row a run."""
    made = study("llumnix-urgent", num_seeds)
    points = list(made.points())
    result = simulate([made.scenario_at(point) for point in points])
    rows = []
    for index, (point, lanes) in enumerate(zip(points, result.lanes, strict=True)):
        for seed, lane in enumerate(lanes):
            e2e_ms = 1e3 * (lane.finish_s - lane.arrival_s + lane.front_end_s)
            mine = {name: float(np.nanmean(e2e_ms[lane.tenant == k])) for k, name in enumerate(lane.tenant_names)}
            rows.append({"point": index, "seed": seed, **point, **mine})
    return pd.DataFrame(rows)


def _memory_claims() -> list[Claim]:
    """The KV cache of LLaMA-7B, and what copying it takes."""
    made = study("llumnix-load")
    scenario = made.scenario_at(next(iter(made.points())))
    bytes_per_token, bytes_per_s = lower.migration_rates(scenario, lower.resolve_system(scenario))
    claims = [Claim(system="llumnix", claim="KV of a token of LLaMA-7B, MiB", source="arithmetic", paper=0.5,
                    ours=float(bytes_per_token / 2**20), tolerance=0.0)]
    return claims + [Claim(
        system="llumnix", claim=f"{tokens} tokens over 64 Gb/s, ms", source="arithmetic", paper=paper,
        ours=float(1e3 * tokens * bytes_per_token / bytes_per_s), tolerance=0.01)
        for tokens, paper in COPIES_MS.items()]


def _gain(load: pd.DataFrame, metric: str) -> pd.Series:
    """How many times larger a metric is without migration, by rate: means over seeds. Rates at which most runs with
    either fall behind are left out."""
    means = load.pivot_table(index=RATE, columns=TAKES, values=metric)
    behind = load.assign(unstable=load["unstable"].astype(float).fillna(0)).groupby(RATE)["unstable"].mean()
    return (means[STAYS] / means[MIGRATES])[behind <= 0.5]


def _load_claims(load: pd.DataFrame) -> list[Claim]:
    claims = []
    for metric, what in (("preemptions.total", "preemptions"), ("p99_ttft_ms", "P99 TTFT, ms"),
                         ("p99_e2el_ms", "P99 end to end, ms")):
        for rate in sorted(load[RATE].unique()):
            values, margins = means_in_order(load[load[RATE] == rate], TAKES, (STAYS, MIGRATES), metric)
            claims.append(Claim(
                system="llumnix", claim=f"{what} at {rate:g} requests/s: without migration, with it", source=PAPER,
                paper=FALLS, ours=values, tolerance=margins))
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
            ours=float(_gain(load, metric).max()), tolerance=None, reason=OVERLOADED))
    return claims


def _urgent_claims(urgent: pd.DataFrame) -> list[Claim]:
    means = urgent.pivot_table(index="workload.cv", columns="cluster.headroom_blocks", values="urgent")
    gain = means.iloc[:, 0] / means.iloc[:, -1]
    return [
        Claim(system="llumnix", claim="urgent requests end to end: up to so many times faster with room kept for them",
              source=PAPER, paper=1.5, ours=float(gain.max()), tolerance=0.15,
              reason="they do not overtake others in the queue, and at this load queues are what they wait in"),
        Claim(system="llumnix", claim="urgent requests: 2.9 to 8.6 times faster, of what is unclear", source=PAPER,
              paper=None, ours=float(gain.max()), tolerance=None, reason="it is not known which latency this is")]


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
                  reason="no number where the sweeps with and without migration have no P99 in common")]


def _downtime_claims(downtime: pd.DataFrame) -> list[Claim]:
    means = downtime.pivot_table(index=INPUT, columns=LAST, values="migrations.mean_downtime_ms")
    blocking, margins = means_in_order(downtime[downtime[LAST] == BLOCKING], INPUT, list(means.index),
                                       "migrations.mean_downtime_ms")
    spread = float(means[LIVE].max() / means[LIVE].min())
    return [
        Claim(system="llumnix", claim="stop of a migration that copies all at once, by context of 512 to 7168, ms",
              source=PAPER, paper=RISES, ours=blocking, tolerance=margins),
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
        for takes, colour, label in ((STAYS, FAINT, "stays"), (MIGRATES, LINE, "migrates")):
            rows = scaling[scaling[TAKES] == takes].groupby(OUT)[["scaling.mean_instances", "p99_ttft_ms"]].mean()
            axes[2].plot(rows.iloc[:, 0], rows.iloc[:, 1], "o-", color=colour, label=label)
        axes[2].set(title="Scaling", xlabel="mean instances", ylabel="P99 TTFT, ms")
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
    axis.set(title=title, xlabel=label, yscale="log")
    axis.legend()
