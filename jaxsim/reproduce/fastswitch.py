"""FastSwitch (arXiv 2411.18424): what swapping costs where priorities are drawn anew, and what three remedies save.

Conversations share one GPU; every 1/f iterations each request draws a new priority, and whoever then has no place on
the device moves to host memory. vLLM copies block by block while the engine stands still. The remedies, each on top of
the one before: block groups (longer copies), a swap manager that copies while the engine goes on, and copies kept in
host memory for the next time.

The paper does not say what the CPU takes to issue a copy. That one number is fitted, to the share that stalls have in
the latency of the slowest hundredth of vLLM's requests, on the first system; everything else follows.

The length of block groups follows from how free blocks lie, and copies outlast a turn: with reuse the next one of the
conversation copies its context in, and computes only what is new. Known gaps: docs/reproduce/fastswitch.md.
"""

import functools
from concurrent import futures
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pandas as pd

from jaxsim._core.errors import InputError
from jaxsim.engine.simulate import simulate
from jaxsim.io.figure import INK, drawn, heading
from jaxsim.kernels import histogram
from jaxsim.metrics import LaneResult
from jaxsim.reproduce.claim import FALLS, RISES, Claim, Factor, Reproduction
from jaxsim.reproduce.runs import half_width, study
from jaxsim.spec.scenario import Scenario

DESCRIPTION = "FastSwitch: swaps at re-drawn priorities; block groups, asynchronous copies, reuse"

PAPER = "arXiv 2411.18424"

VARIANTS = ("vLLM", "+groups", "+async", "+reuse")
"""Each with what stands before it."""

SYSTEMS = {"LLaMA-8B, A10": "fastswitch-llama-8b", "Qwen-32B, A100": "fastswitch-qwen-32b"}

STALL_SHARE = 0.599
"""Of the latency at P99, in vLLM under stress: what the cost of a copy is fitted to."""

DISPATCH_US = (5.0, 8.0, 11.0, 14.0)
"""Between which it is looked for."""

ORDERS = {"ttft_p99_s": FALLS, "tbt_p999_s": FALLS, "throughput": RISES}
NAMES = {"ttft_p99_s": "TTFT P99, s", "tbt_p999_s": "TBT P99.9, s", "throughput": "output tokens/s"}

UP_TO = {"ttft_p99_s": ("TTFT P99, vLLM over FastSwitch", 5.8), "tbt_p999_s": ("TBT P99.9, vLLM over FastSwitch", 11.2),
         "throughput": ("gain in throughput, FastSwitch over vLLM", 0.44)}

TOLERANCE = Factor(2)
"""Of factors, after a fit of one number."""


def reproduce(num_seeds: int | None = None) -> Reproduction:
    """All claims of this system; num_seeds: runs of each point instead of the studies' own number."""
    first = _scenarios(SYSTEMS["LLaMA-8B, A10"], num_seeds)
    fits = _rows(simulate([_dispatching(first[0], us) for us in DISPATCH_US]).lanes, DISPATCH_US)
    dispatch_us, share = fitted(fits)
    # A program each, one of which is that of the fit.
    with futures.ThreadPoolExecutor(len(SYSTEMS)) as pool:
        lanes = list(pool.map(lambda name: simulate([
            _dispatching(s, dispatch_us) for s in _scenarios(name, num_seeds)]).lanes, SYSTEMS.values()))
    tables = {system: _rows(found, VARIANTS) for system, found in zip(SYSTEMS, lanes, strict=True)}
    return Reproduction((*_order_claims(tables), *_factor_claims(tables), *_other_claims(tables, dispatch_us, share)),
                        functools.partial(_draw, tables, fits, dispatch_us))


def _scenarios(name: str, num_seeds: int | None) -> list[Scenario]:
    made = study(name, num_seeds)
    base = made.base_tree()
    return [made.scenario_at(point, base) for point in made.points()]


def _dispatching(scenario: Scenario, us: float) -> Scenario:
    swap = msgspec.structs.replace(scenario.engine.swap, dispatch_us=float(us))
    return msgspec.structs.replace(scenario, engine=msgspec.structs.replace(scenario.engine, swap=swap))


def _rows(lanes: list[list[LaneResult]], points: tuple) -> pd.DataFrame:
    """A row a run, by point and seed."""
    return pd.DataFrame([{"point": point, "seed": seed, **figures(lane)}
                         for point, runs in zip(points, lanes, strict=True) for seed, lane in enumerate(runs)])


def figures(lane: LaneResult) -> dict[str, float]:
    """What the claims are about. stall_share: of the time that the slowest hundredth of requests took, what was lost to
    copies; delay_share: of the engine's busy time, that of copies before iterations; swap_s: seconds of these a swap;
    running: sequences that run, on average; spared_share: of the blocks that left the device, those already in host
    memory. Raises `InputError` for a run that a bound stopped. copied_blocks: to host memory. found_share: of prompt
    tokens, those that were there."""
    if lane.fault:
        raise InputError("study fastswitch", "a run", f"has no result ({lane.fault})", "change the study")
    e2e_s, ttft_s = lane.finish_s - lane.arrival_s, lane.first_token_s - lane.arrival_s
    is_slow = e2e_s >= np.quantile(e2e_s, 0.99)
    delay_s, swaps = float(lane.swap_delay_s.sum()), int(lane.swaps.sum())
    # Without reuse nothing is there.
    found = 0 if lane.cached_tokens is None else lane.cached_tokens.sum()
    return {
        "ttft_p99_s": float(np.quantile(ttft_s, 0.99)),
        "tbt_p999_s": float(histogram.percentiles(lane.itl_counts, (99.9,))[0]),
        "throughput": float(lane.output_tokens.sum() / lane.duration_s),
        "stall_share": float(lane.swap_s[is_slow].sum() / e2e_s[is_slow].sum()),
        "delay_share": delay_s / float(lane.busy_s.sum()), "swaps": swaps,
        "running": float(lane.running_s.sum()) / lane.duration_s,
        "swap_s": delay_s / swaps if swaps else 0.0,
        "copied_blocks": int(lane.swapped_blocks[0]),
        "found_share": float(found / lane.input_tokens.sum()),
        "spared_share": float(lane.swapped_blocks[1] / max(lane.swapped_blocks.sum(), 1))}


def fitted(fits: pd.DataFrame) -> tuple[float, float]:
    """Microseconds of a copy at which the share of stalls is the published one, to a tenth, between simulated ones; and
    that share, NaN where none of them is as large or as small."""
    shares = fits.groupby("point")["stall_share"].mean()
    us, share = shares.index.to_numpy(float), shares.to_numpy()
    if not share.min() <= STALL_SHARE <= share.max():
        return float(us[np.argmin(np.abs(share - STALL_SHARE))]), float("nan")
    return round(float(np.interp(STALL_SHARE, np.maximum.accumulate(share), us)), 1), STALL_SHARE


def _order_claims(tables: dict[str, pd.DataFrame]) -> list[Claim]:
    claims = []
    for system, rows in tables.items():
        means = rows.groupby("point")[["delay_share", "running"]].mean()
        stood, (before, after) = means.loc["+groups", "delay_share"], means.loc[["+groups", "+async"], "running"]
        hidden = (f"with groups the engine stands still for copies {stood:.1%} of its busy time, which is all that"
                  f" asynchronous ones can save; beside these {after:.1f} sequences run on average, not {before:.1f},"
                  " as blocks are not free while they are copied")
        for metric, order in ORDERS.items():
            table = rows.pivot(index="seed", columns="point", values=metric)[list(VARIANTS)].to_numpy(float)
            claims.append(Claim(
                system="fastswitch", claim=f"{system}: {NAMES[metric]}, {', '.join(VARIANTS)}", source=PAPER,
                paper=order, ours=tuple(map(float, table.mean(axis=0))),
                tolerance=tuple(map(float, half_width(np.diff(table, axis=1)))),
                reason=hidden if metric == "tbt_p999_s" else ""))
    return claims


def factors(rows: pd.DataFrame) -> dict[str, float]:
    """vLLM against all remedies: how much less, and how much more throughput."""
    means = rows.groupby("point")[list(ORDERS)].mean()
    before, after = means.loc[VARIANTS[0]], means.loc[VARIANTS[-1]]
    return {"ttft_p99_s": before["ttft_p99_s"] / after["ttft_p99_s"],
            "tbt_p999_s": before["tbt_p999_s"] / after["tbt_p999_s"],
            "throughput": after["throughput"] / before["throughput"] - 1}


def _factor_claims(tables: dict[str, pd.DataFrame]) -> list[Claim]:
    found = {system: factors(rows) for system, rows in tables.items()}
    claims = []
    for metric, (name, published) in UP_TO.items():
        each = "; ".join(f"{system} {found[system][metric]:.3g}" for system in found)
        claims.append(Claim(
            system="fastswitch", claim=f"{name}, at most", source=PAPER, paper=published,
            ours=float(max(values[metric] for values in found.values())), tolerance=TOLERANCE, reason=each))
    return claims


def _other_claims(tables: dict[str, pd.DataFrame], dispatch_us: float, share: float) -> list[Claim]:
    means = next(iter(tables.values())).groupby("point").mean(numeric_only=True)
    unconfirmed = "published figure not confirmed"
    ours = float(means.loc["vLLM", "stall_share"])
    volume, reused = means["copied_blocks"], means.loc["+reuse"]
    return [
        Claim(system="fastswitch", claim="share of stalls in latency at P99, vLLM, LLaMA-8B", source=PAPER,
              paper=STALL_SHARE, ours=ours, tolerance=None,
              reason=f"{'fitted to it' if share == share else 'not met by any'}: {dispatch_us:g} us to issue a copy"),
        Claim(system="fastswitch", claim="+groups: cost of a swap, vLLM over it, at most", source=PAPER, paper=3.11,
              ours=float(means.loc["vLLM", "swap_s"] / means.loc["+groups", "swap_s"]), tolerance=None,
              reason=unconfirmed),
        Claim(system="fastswitch", claim="+reuse: less volume swapped out", source=PAPER, paper=0.53,
              ours=float(1 - volume["+reuse"] / volume["+async"]), tolerance=None,
              reason=f"{unconfirmed}; {reused['spared_share']:.0%} of the blocks that leave are there already,"
                     f" {reused['found_share']:.0%} of all prompt tokens come from there"),
        Claim(system="fastswitch", claim="+async: token efficiency at P99", source=PAPER, paper=0.218, ours=None,
              tolerance=None, reason=f"{unconfirmed}, and not defined")]


def _draw(tables: dict[str, pd.DataFrame], fits: pd.DataFrame, dispatch_us: float, path: Path) -> None:
    with drawn(path, figsize=(12, 4.6)) as figure:
        axes = figure.subplots(1, 4)
        for axis, metric in zip(axes, ORDERS, strict=False):
            _draw_metric(axis, tables, metric)
        axes[0].legend(loc="upper right")
        _draw_fit(axes[-1], fits, dispatch_us)
        heading(figure, "FastSwitch: priorities drawn anew, preemption by swap. Lines: means; dots: runs")


def _draw_metric(axis: Any, tables: dict[str, pd.DataFrame], metric: str) -> None:
    for (system, rows), colour in zip(tables.items(), ("#0072B2", "#D55E00"), strict=True):
        means = rows.groupby("point")[metric].mean()[list(VARIANTS)]
        axis.plot(range(len(VARIANTS)), means, color=colour, linewidth=1.4, label=system)
        axis.plot([VARIANTS.index(p) for p in rows["point"]], rows[metric], "o", color=colour, markersize=3.5)
    axis.set_xticks(range(len(VARIANTS)), VARIANTS, rotation=30)
    axis.set_ylim(bottom=0)
    axis.set_title(NAMES[metric][0].upper() + NAMES[metric][1:])


def _draw_fit(axis: Any, fits: pd.DataFrame, dispatch_us: float) -> None:
    axis.plot(fits["point"], fits["stall_share"], "o", color="#0072B2", markersize=3.5)
    means = fits.groupby("point")["stall_share"].mean()
    axis.plot(means.index, means, color="#0072B2", linewidth=1.4)
    axis.axhline(STALL_SHARE, color=INK, linewidth=0.9, label="published")
    axis.axvline(dispatch_us, color=INK, linewidth=0.9, linestyle=":", label="fitted")
    axis.legend(loc="upper left")
    axis.set_ylim(0, 1)
    axis.set_title("Share of stalls at P99, vLLM")
    axis.set_xlabel("us to issue a copy")
