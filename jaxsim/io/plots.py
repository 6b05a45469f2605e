"""Plots of a run: latency distributions, load over time, and what happened to single requests.

Drawn without a display. matplotlib is imported when the first plot is drawn, so that nothing else waits for
it.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from jaxsim.metrics import LaneResult, Result, meets, request_frame

PHASES = {"queue": "#E69F00", "prefill": "#0072B2", "stall": "#D55E00", "decode": "#66C2A5"}
"""Colours told apart by readers with any colour vision (after Okabe and Ito)."""

_INK, _FAINT, _LINE, _LIMIT = "#222222", "#777777", "#0072B2", "#D55E00"
_STYLE = {
    "figure.facecolor": "white", "axes.facecolor": "white", "axes.edgecolor": "#999999",
    "axes.linewidth": 0.8,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "#E6E6E6",
    "grid.linewidth": 0.7, "axes.axisbelow": True, "font.size": 10, "axes.titlesize": 11,
    "axes.titleweight": "bold", "axes.titlelocation": "left", "axes.labelcolor": _INK, "text.color": _INK,
    "xtick.color": _FAINT, "ytick.color": _FAINT, "xtick.labelcolor": _INK, "ytick.labelcolor": _INK,
    "legend.frameon": False, "legend.fontsize": 9,
}
_PAPER = {"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 1}
_DPI = 130
_MOST_POINTS = 2000
_MOST_ROWS = 80


@contextlib.contextmanager
def _figure(path: Path, *args: Any, **kwargs: Any) -> Iterator[Any]:
    # Agg and not pyplot's default: a window system may be absent, and pyplot would keep every figure alive.
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with rc_context(_STYLE):
        figure = Figure(*args, layout="constrained", **kwargs)
        FigureCanvasAgg(figure)
        yield figure
        figure.savefig(path, dpi=_DPI)


def plot_latencies(result: Result, path: str | Path, index: int = 0) -> Path:
    """Cumulative distributions of TTFT, TPOT and end-to-end latency, each seed thin, all together thick."""
    path, scenario = Path(path), result.scenarios[index]
    frames = [request_frame(lane) for lane in result.lanes[index]]
    pooled = pd.concat(frames, ignore_index=True)
    met = meets(pooled, scenario.slo)
    panels = (("Time to first token", "ttft", "ttft_s", scenario.slo.ttft_ms),
              ("Time per output token", "tpot", "tpot_s", scenario.slo.tpot_ms),
              ("End to end", "e2e", "e2e_s", scenario.slo.e2e_ms))
    with _figure(path, figsize=(11, 3.6)) as figure:
        axes = figure.subplots(1, 3, sharey=True)
        for axis, (title, name, column, limit_ms) in zip(axes, panels, strict=True):
            for frame in frames:
                axis.step(*_cdf(frame[column]), where="post", color=_LINE, alpha=0.25, linewidth=0.8)
            values, shares = _cdf(pooled[column])
            axis.step(values, shares, where="post", color=_LINE, linewidth=2)
            axis.set_title(title)
            axis.set_ylim(0, 1.02)
            axis.yaxis.set_major_formatter(lambda y, _: f"{100 * y:.0f} %")
            axis.set_xlabel("milliseconds")
            if len(values):
                _time_axis(axis, values, limit_ms)
                _mark_percentiles(axis, values, shares)
            if limit_ms is not None:
                _mark_limit(axis, limit_ms, float(met[name].mean()))
        axes[0].set_ylabel("share of requests" + (" (thin: single seeds)" if len(frames) > 1 else ""))
    return path


def _cdf(seconds: pd.Series) -> tuple[np.ndarray, np.ndarray]:
    values = np.sort(seconds.dropna().to_numpy()) * 1e3
    shares = np.arange(1, len(values) + 1) / max(len(values), 1)
    if len(values) > _MOST_POINTS:
        # Evenly in share, the extremes kept: what a plot this size can show.
        keep = np.unique(np.linspace(0, len(values) - 1, _MOST_POINTS).astype(int))
        values, shares = values[keep], shares[keep]
    return values, shares


def _time_axis(axis: Any, values: np.ndarray, limit_ms: float | None) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = max(float(values[0]), 1e-3), max(float(values[-1]), 1e-3)
    if limit_ms is not None:
        low, high = min(low, limit_ms), max(high, limit_ms)
    if high / low > 8:
        axis.set_xscale("log")
        axis.set_xlim(low / 1.15, high * 1.5)
        ratio = high / low
        ticks = (1, 2, 5) if ratio < 40 else (1, 3) if ratio < 300 else (1,)
        axis.xaxis.set_major_locator(LogLocator(subs=ticks))
        axis.xaxis.set_minor_formatter(NullFormatter())
    else:
        margin = 0.08 * (high - low) or 0.05 * high
        axis.set_xlim(max(low - margin, 0), high + 2 * margin)
    axis.xaxis.set_major_formatter(FuncFormatter(_short))


def _short(value: float, _: int) -> str:
    return f"{value / 1000:g}k" if value >= 10_000 else f"{value:,g}"


def _mark_percentiles(axis: Any, values: np.ndarray, shares: np.ndarray) -> None:
    for percentile in (50, 90, 99):
        value = values[min(np.searchsorted(shares, percentile / 100), len(values) - 1)]
        text = f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
        axis.plot(value, percentile / 100, "o", color=_LINE, markersize=5, markeredgecolor="white", zorder=4)
        is_right = axis.transAxes.inverted().transform(axis.transData.transform((value, 0)))[0] > 0.7
        axis.annotate(f"p{percentile}  {text}", (value, percentile / 100), fontsize=9, zorder=5,
                      xytext=(-7, 3) if is_right else (7, -10), textcoords="offset points",
                      ha="right" if is_right else "left", bbox=_PAPER)


def _mark_limit(axis: Any, limit_ms: float, met: float) -> None:
    axis.axvline(limit_ms, color=_LIMIT, linestyle=(0, (4, 3)), linewidth=1.3)
    # On the side that has room, and where the curve is not.
    is_right = axis.transAxes.inverted().transform(axis.transData.transform((limit_ms, 0)))[0] > 0.6
    is_low = met > 0.5
    axis.annotate(f"limit {limit_ms:g} ms\nmet by {100 * met:.1f} %", (limit_ms, 0.04 if is_low else 0.72),
                  xytext=(-5 if is_right else 5, 0), textcoords="offset points", color=_LIMIT, fontsize=9,
                  ha="right" if is_right else "left", va="bottom" if is_low else "center", bbox=_PAPER)


def plot_load(result: Result, path: str | Path, index: int = 0) -> Path:
    """Running and waiting requests, and KV memory, over the time of the first run."""
    from matplotlib.ticker import MaxNLocator

    path, lane = Path(path), result.lanes[index][0]
    curves = _curves(lane)
    num_instances = len(lane.busy_s)
    with _figure(path, figsize=(11, 5.4)) as figure:
        axes = np.atleast_1d(figure.subplots(len(curves), 1, sharex=True))
        for axis, (title, series, colour, is_share) in zip(axes, curves, strict=True):
            times, total, low, high = series
            axis.fill_between(times, 0, total, step="post", color=colour, alpha=0.18, linewidth=0)
            axis.step(times, total, where="post", color=colour, linewidth=1.3)
            axis.axvline(lane.arrival_s[-1], color=_FAINT, linestyle=(0, (1, 2)), linewidth=1.2)
            axis.set_title(title)
            if is_share:
                peak = float(np.max(total if high is None else high))
                axis.set_ylim(0, 1.05 if peak > 0.6 else max(1.4 * peak, 0.05))
                axis.yaxis.set_major_formatter(lambda y, _: f"{100 * y:g} %")
                axis.set_ylabel("of the blocks")
                if low is not None:
                    axis.fill_between(times, low, high, step="post", color=_INK, alpha=0.14, linewidth=0,
                                      label="emptiest to fullest instance")
                    axis.legend(loc="lower left", bbox_to_anchor=(0.2, 0.97), borderaxespad=0.2)
            else:
                axis.set_ylim(0, max(float(np.max(total)), 1.0) * 1.12)
                axis.yaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))
                axis.set_ylabel("requests")
                if not np.any(total):
                    axis.annotate("none", (0.5, 0.5), xycoords="axes fraction", ha="center", va="center", color=_FAINT)
        axes[0].annotate("last arrival", (lane.arrival_s[-1], 1), xycoords=("data", "axes fraction"),
                         xytext=(4, -2), textcoords="offset points", va="top", fontsize=9, color=_FAINT)
        axes[-1].set_xlabel("seconds" + (f", {num_instances} instances" if num_instances > 1 else ""))
        axes[-1].set_xlim(0, float(curves[0][1][0][-1]))
    return path


def _curves(lane: LaneResult) -> list[tuple[str, tuple, str, bool]]:
    """Title, (times, total, least, most), colour and whether it is a share, from top to bottom."""
    if lane.steps is None:
        # Without a tape the requests still tell how many were where; a preempted one counts as running.
        return [("Running", _count(lane.scheduled_s, lane.finish_s), PHASES["prefill"], False),
                ("Waiting", _count(lane.arrival_s, lane.scheduled_s), PHASES["queue"], False)]
    curves = [("Running", _over_time(lane, lane.steps["running"]), PHASES["prefill"], False),
              ("Waiting", _waiting(lane), PHASES["queue"], False)]
    if lane.num_blocks:
        times, total, low, high = _over_time(lane, lane.steps["used_blocks"])
        bands = (None, None) if low is None else (low / lane.num_blocks, high / lane.num_blocks)
        shares = total / (lane.num_blocks * len(lane.busy_s))
        curves.append(("KV memory in use", (times, shares, *bands), "#009E73", True))
    return curves


def _count(start_s: np.ndarray, end_s: np.ndarray) -> tuple:
    times = np.concatenate([start_s, end_s])
    change = np.concatenate([np.ones(len(start_s)), -np.ones(len(end_s))])
    known = ~np.isnan(times)
    order = np.argsort(times[known], kind="stable")
    return _thin(times[known][order], np.cumsum(change[known][order])[None])


def _waiting(lane: LaneResult) -> tuple:
    """Requests not scheduled yet, at any time, and preempted ones that wait again, as every step leaves them."""
    times, first, _, _ = _count(lane.arrival_s, lane.scheduled_s)
    if not np.any(lane.preemptions):
        return times, first, None, None
    when, instance = np.asarray(lane.steps["time_s"]), np.asarray(lane.steps["instance"])
    again = np.array(lane.steps["waiting"], np.float64)
    for i in range(len(lane.busy_s)):
        here, rows = lane.instance == i, instance == i
        scheduled = lane.scheduled_s[here & ~np.isnan(lane.scheduled_s)]
        again[rows] -= (np.searchsorted(np.sort(lane.arrival_s[here]), when[rows], side="right")
                        - np.searchsorted(np.sort(scheduled), when[rows], side="right"))
    held, total, _, _ = _over_time(lane, np.maximum(again, 0))
    both = np.union1d(times, held)
    at = [np.searchsorted(x, both, side="right") - 1 for x in (times, held)]
    return both, np.where(at[0] >= 0, first[at[0]], 0) + np.where(at[1] >= 0, total[at[1]], 0), None, None


def _over_time(lane: LaneResult, column: np.ndarray) -> tuple:
    """Sum, least and most over instances of a count, which holds from one step's start to the next."""
    steps, num_instances = lane.steps, len(lane.busy_s)
    order = np.argsort(steps["time_s"], kind="stable")
    times = np.asarray(steps["time_s"], np.float64)[order]
    instance, value = np.asarray(steps["instance"])[order], np.asarray(column, np.float64)[order]
    end = float((np.asarray(steps["time_s"]) + np.asarray(steps["duration_s"])).max())
    held = np.zeros((num_instances, len(times) + 1))
    for i in range(num_instances):
        mine = np.flatnonzero(instance == i)
        if len(mine) == 0:
            continue
        latest = np.searchsorted(mine, np.arange(len(times)), side="right") - 1
        held[i, :-1] = np.where(latest >= 0, value[mine[np.maximum(latest, 0)]], 0)
        # An instance that has nothing more to do holds nothing.
        ends = times[mine[-1]] + float(np.asarray(steps["duration_s"])[order][mine[-1]])
        held[i, :-1][times >= ends] = 0
    return _thin(np.append(times, end), held)


def _thin(times: np.ndarray, held: np.ndarray) -> tuple:
    if len(times) > _MOST_POINTS:
        keep = np.unique(np.linspace(0, len(times) - 1, _MOST_POINTS).astype(int))
        times, held = times[keep], held[:, keep]
    many = len(held) > 1
    return times, held.sum(0), held.min(0) if many else None, held.max(0) if many else None


def plot_requests(result: Result, path: str | Path, index: int = 0) -> Path:
    """What happened to consecutive requests of the first run: one bar each, coloured by phase."""
    path, lane = Path(path), result.lanes[index][0]
    frame = _window(request_frame(lane))
    with _figure(path, figsize=(11, 5.4)) as figure:
        axis = figure.subplots()
        start = frame["arrival_s"].to_numpy()
        rows = np.arange(len(frame))
        totals = {}
        for name, colour in PHASES.items():
            length = frame[f"{name}_s"].fillna(0.0).to_numpy()
            totals[name] = float(length.sum())
            label = name if name != "stall" else "stalled (drawn as one piece)"
            if totals[name] > 0 or name != "stall":
                axis.barh(rows, length, left=start, height=0.82, color=colour, linewidth=0, label=label)
            start = start + length
        axis.set_ylim(len(frame) - 0.4, -0.6)
        axis.set_xlim(float(frame["arrival_s"].min()), float(np.max(start)) * 1.001)
        axis.grid(axis="y", visible=False)
        first, last = int(frame["request_id"].iloc[0]), int(frame["request_id"].iloc[-1])
        axis.set_title(f"Requests {first} to {last}, from arrival to last token")
        axis.set_xlabel("seconds")
        axis.set_ylabel("request, in order of arrival")
        ticks = np.unique(np.linspace(0, len(frame) - 1, min(len(frame), 9)).astype(int))
        axis.set_yticks(ticks, [str(int(frame["request_id"].iloc[t])) for t in ticks])
        axis.legend(ncols=4, loc="lower right", bbox_to_anchor=(1.0, 1.0), borderaxespad=0.3)
    return path


def _window(frame: pd.DataFrame) -> pd.DataFrame:
    """At most 80 consecutive requests: those around the most waiting and stalling, which are worth seeing."""
    if len(frame) <= _MOST_ROWS:
        return frame
    trouble = (frame["queue_s"].fillna(0.0) + frame["stall_s"]).rolling(_MOST_ROWS).sum().to_numpy()
    last = int(np.nanargmax(trouble))
    return frame.iloc[last - _MOST_ROWS + 1: last + 1]


def plot_all(result: Result, folder: str | Path, index: int = 0) -> list[Path]:
    """The three plots of one scenario, as PNG files in a folder."""
    folder = Path(folder)
    return [plot_latencies(result, folder / "latency.png", index),
            plot_load(result, folder / "load.png", index),
            plot_requests(result, folder / "requests.png", index)]
