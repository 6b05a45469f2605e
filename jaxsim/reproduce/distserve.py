"""DistServe (arXiv 2401.09670, OSDI 2024): prefill instances as queues, and the arithmetic of moving KV.

Prompts that are all alike and arrive at random, served one at a time in D seconds on one GPU, make a queue M/D/1. Two
GPUs serve them as two stages of D / 2 (inter-op), or as one server that is K times as fast (intra-op, 1 < K < 2). With
the utilisation rho = R D, of one GPU, at rate R:

    one GPU    TTFT / D = 1 + rho / (2 (1 - rho))
    inter-op   TTFT / D = 1 + rho / (4 (2 - rho))
    intra-op   TTFT / D = 1 / K + rho / (2 K (K - rho))

Source: equations 1 to 3 of the paper. Intra-op is better up to some rho, inter-op beyond: the crossover.

Its public simulator: `jaxsim.reproduce.distserve_golden`. Known gaps: what the paper says of ShareGPT, HumanEval and
LongBench, whose lengths, as it prepares them, are not here.
"""

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.optimize import brentq

from jaxsim.io.figure import FAINT, INK, drawn, heading
from jaxsim.reproduce import distserve_golden
from jaxsim.reproduce.claim import Claim, Reproduction
from jaxsim.reproduce.runs import simulated, study
from jaxsim.spec.model import load_model

DESCRIPTION = "DistServe: prefill as queues (R: requests/s, D: seconds of a prompt, one GPU), KV, its simulator"

PAPER = "arXiv 2401.09670"

ONE, INTER, INTRA = "one GPU", "inter-op", "intra-op"
STAGES = {ONE: 1, INTER: 2, INTRA: 1}

CROSSOVERS = {1.3: 0.611, 1.5: 0.936, 1.7: 1.257, 1.9: 1.626}
"""Utilisation at which inter-op becomes better, by the speed-up K of intra-op: from equations 2 and 3."""

TOLERANCE = 0.02
"""Of mean TTFT up to 0.8 of what a system can serve, over 100,000 requests, and of crossovers."""

SHARES = (0.4, 0.8)
"""Of what a system can serve, at which its TTFT is a claim."""

SHOWN_SPEEDUP = 1.5

_COLOURS = {1.3: "#E69F00", 1.5: "#009E73", 1.7: "#CC79A7", 1.9: "#56B4E9"}


def mean_ttft(layout: str, rho: float | np.ndarray, speedup: float = 1.0) -> float | np.ndarray:
    """Mean TTFT in units of D at the utilisation `rho` of one GPU.

    Source: equations 1 to 3 of arXiv 2401.09670; Pollaczek and Khinchine's waiting time of M/D/1 in each.
    """
    if layout == INTER:
        return 1 + rho / (4 * (2 - rho))
    return 1 / speedup + rho / (2 * speedup * (speedup - rho))


def limit(layout: str, speedup: float = 1.0) -> float:
    """The utilisation of one GPU that a layout cannot reach."""
    return 2.0 if layout == INTER else speedup


def crossover(speedup: float) -> float:
    """The utilisation at which inter-op becomes better than intra-op of a speed-up between 1 and 2."""
    def gain(rho: float) -> float:
        return mean_ttft(INTER, rho) - mean_ttft(INTRA, rho, speedup)

    # Intra-op is better where nobody waits, and unbounded at its limit.
    return float(brentq(gain, 0.0, speedup * (1 - 1e-9)))


def reproduce(num_seeds: int | None = None) -> Reproduction:
    """All claims of this system; num_seeds: runs of each point instead of the study's own number."""
    queues = queue_means(simulated(study("distserve-queues", num_seeds)))
    claims = (*_queue_claims(queues), *_crossover_claims(queues), *_memory_claims(), *distserve_golden.claims(),
              *_unreproduced_claims())
    return Reproduction(claims, functools.partial(_draw, queues))


def queue_means(rows: pd.DataFrame) -> pd.DataFrame:
    """What the engine says: `ttft` in units of D by `layout`, `speedup` and `rho`, a row a point of the study."""
    service_s = rows["cost.prefill.a"].max()
    rows = rows.assign(rho=(rows["workload.rate_rps"] * service_s).round(9),
                       speedup=(service_s / rows["cost.prefill.a"]).round(9),
                       ttft=rows["mean_ttft_ms"] / 1e3 / service_s)
    is_inter = rows["engine.pipeline_parallel_size"] == STAGES[INTER]
    rows["layout"] = np.where(is_inter, INTER, np.where(rows["speedup"] > 1, INTRA, ONE))
    return rows.groupby(["layout", "speedup", "rho"], as_index=False)["ttft"].mean()


def _curve(queues: pd.DataFrame, layout: str, speedup: float = 1.0) -> pd.Series:
    """TTFT in units of D over rho."""
    rows = queues[(queues["layout"] == layout) & (queues["speedup"] == speedup)]
    return rows.set_index("rho")["ttft"].sort_index()


def _queue_claims(queues: pd.DataFrame) -> list[Claim]:
    claims = []
    for layout, equation, speedup in ((ONE, 1, 1.0), (INTER, 2, 1.0), (INTRA, 3, SHOWN_SPEEDUP)):
        curve = _curve(queues, layout, speedup)
        name = f"{layout}, K = {speedup:g}" if layout == INTRA else layout
        for share in SHARES:
            rho = round(share * limit(layout, speedup), 9)
            claims.append(Claim(
                system="distserve", claim=f"{name}: mean TTFT / D at R D = {rho:g}", source=f"{PAPER}, eq. {equation}",
                paper=float(mean_ttft(layout, rho, speedup)), ours=float(curve[rho]), tolerance=TOLERANCE))
    return claims


def _crossover_claims(queues: pd.DataFrame) -> list[Claim]:
    inter = _curve(queues, INTER)
    claims = []
    for how in ("closed form", "engine"):
        for speedup, published in CROSSOVERS.items():
            ours = crossover(speedup) if how == "closed form" else _crossing(
                inter, _curve(queues, INTRA, speedup), speedup)
            claims.append(Claim(
                system="distserve", claim=f"R D from which inter-op beats intra-op of K = {speedup:g}, {how}",
                source=f"{PAPER}, from eq. 2, 3", paper=published, ours=ours,
                tolerance=TOLERANCE if how == "engine" else None,
                reason="" if how == "engine" else "arithmetic on both sides; the engine's rows are the gate"))
    return claims


def _crossing(inter: pd.Series, intra: pd.Series, speedup: float) -> float:
    """Where two simulated curves cross; NaN where they do not.

    Interpolated are the differences times the distance to intra-op's limit, where they would grow without bound.
    """
    gain = (inter - intra).dropna()
    rho, scaled = gain.index.to_numpy(), (gain * (speedup - gain.index)).to_numpy()
    after = np.flatnonzero((scaled[:-1] > 0) & (scaled[1:] <= 0))
    if not len(after):
        return float("nan")
    at = after[-1]
    return float(rho[at] + (rho[at + 1] - rho[at]) * scaled[at] / (scaled[at] - scaled[at + 1]))


def _memory_claims() -> list[Claim]:
    """KV of a prompt of 512 tokens of OPT-66B, and what moving ten a second takes."""
    prompt_bytes = 512 * load_model("facebook/opt-66b").kv_bytes_per_token()
    return [
        Claim(system="distserve", claim="KV of a prompt of 512 tokens, OPT-66B, GiB (the paper: GB)", source=PAPER,
              paper=1.13, ours=float(prompt_bytes / 2**30), tolerance=0.01),
        Claim(system="distserve", claim="network for 10 such prompts a second, Gib/s (the paper: Gb/s)", source=PAPER,
              paper=90.0, ours=float(10 * 8 * prompt_bytes / 2**30), tolerance=0.01)]


def _unreproduced_claims() -> list[Claim]:
    """What was published and cannot be said here."""
    lengths = "the lengths, as the paper prepares the data set, are not here, and the ratio depends on them"
    rows = [(f"{what} vs vLLM, {where}", paper, 0.25, lengths) for what, where, paper in (
        ("request rate", "ShareGPT, OPT-13B to 175B", (2.0, 4.6)), ("tighter limits", "ShareGPT", (1.8, 3.2)),
        ("request rate", "HumanEval, OPT-66B", 5.7), ("request rate", "LongBench, OPT-66B", 4.3))]
    rows += [("share of latency that moving KV takes, OPT-175B, below", 1e-3, 0.0,
              "there are no published coefficients of OPT-175B"),
             ("search for the largest placement, s, on 96 cores below", 78.0, None,
              "`jaxsim place` takes 8 s of one core for OPT-66B on 4x8, the largest case with published coefficients")]
    return [Claim(system="distserve", claim=claim, source=PAPER, paper=paper, ours=None, tolerance=tolerance,
                  reason=reason) for claim, paper, tolerance, reason in rows]


def _draw(queues: pd.DataFrame, path: Path) -> None:
    with drawn(path, figsize=(11, 5)) as figure:
        left, right = figure.subplots(1, 2, width_ratios=(1.5, 1))
        _draw_queues(left, queues)
        _draw_crossovers(right, queues)
        heading(figure, "DistServe: prefill instances as queues. Lines: equations 1 to 3; dots: event engine")


def _draw_queues(axis: Any, queues: pd.DataFrame) -> None:
    speedups = sorted(CROSSOVERS)
    systems = [(ONE, 1.0, INK), (INTER, 1.0, "#0072B2"), *((INTRA, k, _COLOURS[k]) for k in speedups)]
    for layout, speedup, colour in systems:
        rho = np.linspace(0, 0.999 * limit(layout, speedup), 400)
        label = f"{layout}, K = {speedup:g}" if layout == INTRA else layout
        axis.plot(rho, mean_ttft(layout, rho, speedup), color=colour, linewidth=1.4, label=label)
        curve = _curve(queues, layout, speedup)
        axis.plot(curve.index, curve, "o", color=colour, markersize=4, markeredgecolor="white", markeredgewidth=0.5)
    for speedup in speedups:
        rho = crossover(speedup)
        axis.plot(rho, mean_ttft(INTER, rho), "D", markersize=8, markerfacecolor="none", markeredgecolor=INK,
                  markeredgewidth=1.1, zorder=5, linestyle="none",
                  label="crossover" if speedup == speedups[-1] else None)
    axis.set_xlim(0, 2)
    axis.set_ylim(0.4, 4)
    axis.set_title("Time to first token")
    axis.set_xlabel("R D, utilisation of one GPU")
    axis.set_ylabel("mean TTFT / D")
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=4)


def _draw_crossovers(axis: Any, queues: pd.DataFrame) -> None:
    speedups = np.linspace(1.02, 1.98, 100)
    axis.plot(speedups, [crossover(k) for k in speedups], color=INK, linewidth=1.4, label="closed form")
    inter = _curve(queues, INTER)
    axis.plot(list(CROSSOVERS), list(CROSSOVERS.values()), "D", markersize=9, markerfacecolor="none",
              markeredgecolor="#D55E00", markeredgewidth=1.3, linestyle="none", label="published")
    axis.plot(list(CROSSOVERS), [_crossing(inter, _curve(queues, INTRA, k), k) for k in CROSSOVERS], "o",
              color="#0072B2", markersize=5, label="event engine")
    axis.annotate("inter-op is better", (1.25, 1.3), fontsize=9.5, color=FAINT)
    axis.annotate("intra-op is better", (1.62, 0.45), fontsize=9.5, color=FAINT)
    axis.set_xlim(1, 2)
    axis.set_ylim(0, 2)
    axis.set_title("Crossover")
    axis.set_xlabel("K, speed-up of intra-op on two GPUs")
    axis.set_ylabel("R D")
    axis.legend(loc="upper left")
