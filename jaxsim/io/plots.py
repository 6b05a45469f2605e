"""Plots of a run: latency distributions, load over time, and what happened to single requests."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from jaxsim.io.figure import FAINT, INK, LIMIT, LINE, drawn, heading
from jaxsim.io.table import number
from jaxsim.metrics import (
    FINISHED,
    STATUS_NAMES,
    Interval,
    LaneResult,
    Result,
    is_measured,
    request_frame,
    waiting_and_running_until,
)
from jaxsim.spec.scenario import Scenario

PHASES = {"encode": "#56B4E9", "embedding": "#999999", "queue": "#E69F00", "prefill": "#0072B2", "transfer": "#CC79A7",
          "stall": "#D55E00", "decode": "#66C2A5"}
"""Colours told apart by readers with any colour vision (after Okabe and Ito)."""
RARE = ("encode", "embedding", "transfer", "stall")
"""Phases that are named only where they happen."""

_STEPS = (1, 2, 2.5, 5, 10)
_MOST_POINTS = 2000
_MOST_ROWS = 80


def _label(result: Result, index: int) -> str:
    return result.scenarios[index].name or "scenario"


def _first_seed(result: Result, index: int) -> str:
    """The scenario and the one run that a plot over time shows."""
    seeds, many = result.scenarios[index].seeds, len(result.lanes[index])
    return f"{_label(result, index)}, seed {seeds[0]}" + (f" (the first of {many})" if many > 1 else "")


def _thousands(value: float, _: int | None = None) -> str:
    return f"{value:,.10g}"


def plot_latencies(result: Result, path: str | Path, index: int = 0) -> Path:
    """Cumulative distributions of TTFT, TPOT and end-to-end latency, each seed thin, all together thick.

    The percentiles marked and the shares that meet a limit are those of the metrics: means over the seeds.
    """
    path, scenario = Path(path), result.scenarios[index]
    metrics, intervals = result.metrics[index], result.intervals[index]
    frames = [_measured(lane, scenario.warmup_s, scenario.cooldown_s) for lane in result.lanes[index]]
    pooled = pd.concat(frames, ignore_index=True)
    panels = (("Time to first token", "ttft", "ttft", "ttft_s"), ("Time per output token", "tpot", "tpot", "tpot_s"),
              ("End to end", "e2e", "e2el", "e2e_s"))
    has_limits = any(metrics["slo"][f"{limit}_ms"] is not None for _, limit, _, _ in panels)
    with drawn(path, figsize=(11, 4.1)) as figure:
        axes = figure.subplots(1, 3, sharey=True)
        for axis, (title, limit, name, column) in zip(axes, panels, strict=True):
            for frame in frames if len(frames) > 1 else ():
                axis.step(*_cdf(frame[column]), where="post", color=LINE, alpha=0.25, linewidth=0.8)
            values, shares = _cdf(pooled[column])
            axis.step(values, shares, where="post", color=LINE, linewidth=2)
            limit_ms = metrics["slo"][f"{limit}_ms"]
            axis.set_title(title, pad=20 if has_limits else 7)
            axis.set_ylim(0, 1.08)
            axis.set_yticks(np.linspace(0, 1, 6))
            axis.yaxis.set_major_formatter(lambda y, _: f"{100 * y:.0f} %")
            axis.set_xlabel("milliseconds")
            if len(values):
                marks = {p: (metrics[f"p{p}_{name}_ms"], intervals.get(f"p{p}_{name}_ms")) for p in (50, 90, 99)}
                _time_axis(axis, values, limit_ms)
                _mark_percentiles(axis, marks)
            if limit_ms is not None:
                _mark_limit(axis, limit_ms, metrics["slo"][f"{limit}_attainment"])
        axes[0].set_ylabel("share of requests")
        seeds = f", {len(frames)} seeds" if len(frames) > 1 else ""
        heading(figure, f"{_label(result, index)}{seeds}")
        figure.supxlabel("\n".join(_footnotes(pooled, len(frames), scenario.slo.tpot_ms is not None, scenario)),
                         x=0.008, ha="left", fontsize=8.5, color=FAINT)
    return path


def _measured(lane: LaneResult, warmup_s: float, cooldown_s: float = 0.0) -> pd.DataFrame:
    """The requests that the metrics are made of, and of those the latencies of the ones that finished."""
    frame = request_frame(lane)[is_measured(lane, warmup_s, cooldown_s)]
    is_done = frame["status"] == STATUS_NAMES[FINISHED]
    columns = ["ttft_s", "tpot_s", "e2e_s"]
    return frame.assign(**{name: frame[name].where(is_done) for name in columns})


def _footnotes(pooled: pd.DataFrame, num_seeds: int, has_tpot_limit: bool, scenario: Scenario) -> list[str]:
    """What a reader would otherwise take for a contradiction between curves, marks and shares."""
    notes = []
    if num_seeds > 1:
        notes.append("thin: single seeds; thick: all requests of all seeds; dots: mean of the seeds' percentiles with"
                     " its 95 % interval, as in the table")
    windows = ("first", scenario.warmup_s), ("last", scenario.cooldown_s)
    left_out = [f"the {part} {seconds:g} s" for part, seconds in windows if seconds]
    if left_out:
        notes.append(f"requests that arrive in {' or '.join(left_out)} are not measured")
    num_failed = int((pooled["status"] != STATUS_NAMES[FINISHED]).sum())
    num_short = int((pooled["tpot_s"].isna() & pooled["e2e_s"].notna()).sum())
    if num_short:
        meets = ", and meet its limit" if has_tpot_limit else ""
        notes.append(f"{100 * num_short / len(pooled):.3g} % of requests have a single output token: they have no time"
                     f" per output token{meets}")
    if num_failed:
        notes.append(f"{100 * num_failed / len(pooled):.3g} % of requests did not finish: they are in no curve, and"
                     " meet no limit")
    return notes


def _cdf(seconds: pd.Series) -> tuple[np.ndarray, np.ndarray]:
    values = np.sort(seconds.dropna().to_numpy()) * 1e3
    shares = np.arange(1, len(values) + 1) / max(len(values), 1)
    if len(values) > _MOST_POINTS:
        # Evenly in share, the extremes kept: what a plot this size can show.
        keep = np.unique(np.linspace(0, len(values) - 1, _MOST_POINTS).astype(int))
        values, shares = values[keep], shares[keep]
    return values, shares


def _time_axis(axis: Any, values: np.ndarray, limit_ms: float | None) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    low, high = max(float(values[0]), 1e-3), max(float(values[-1]), 1e-3)
    if limit_ms is not None:
        low, high = min(low, limit_ms), max(high, limit_ms)
    if high / low > 8:
        axis.set_xscale("log")
        axis.set_xlim(low / 1.15, high * 1.5)
        ratio = high / low
        ticks = (1, 2, 5) if ratio < 40 else (1, 3) if ratio < 300 else (1,)
        axis.xaxis.set_major_locator(LogLocator(subs=ticks, numticks=6))
        axis.xaxis.set_minor_formatter(NullFormatter())
    else:
        margin = 0.08 * (high - low) or 0.05 * high
        axis.set_xlim(max(low - margin, 0), high + 2 * margin)
        axis.xaxis.set_major_locator(MaxNLocator(nbins=5, steps=_STEPS))
    axis.xaxis.set_major_formatter(FuncFormatter(_thousands))


def _place(axis: Any, value: float) -> float:
    """Where a time lies between the ends of the axis, 0 to 1."""
    return float(axis.transAxes.inverted().transform(axis.transData.transform((value, 0)))[0])


def _mark_percentiles(axis: Any, marks: dict[int, tuple[float | None, Interval]]) -> None:
    from matplotlib.patheffects import withStroke

    for percentile, (value, ends) in marks.items():
        if value is None:
            continue
        level = percentile / 100
        if ends is not None:
            # The interval of a mean of few seeds may reach below zero, where no logarithm goes.
            axis.hlines(level, max(ends[0], axis.get_xlim()[0]), ends[1], color=INK, linewidth=1, zorder=3)
        axis.plot(value, level, "o", color=LINE, markersize=5, markeredgecolor="white", zorder=5)
        # Rising curves leave room on the lower right and the upper left.
        is_right = _place(axis, value) > 0.65
        axis.annotate(f"p{percentile}  {number(value)}", (value, level), fontsize=9, zorder=6,
                      xytext=(-7, 3) if is_right else (7, -11), textcoords="offset points",
                      ha="right" if is_right else "left",
                      path_effects=[withStroke(linewidth=2.5, foreground="white")])


def _mark_limit(axis: Any, limit_ms: float, met: float | None) -> None:
    axis.axvline(limit_ms, color=LIMIT, linestyle=(0, (4, 3)), linewidth=1.3)
    # Above the frame, where no curve runs.
    place = _place(axis, limit_ms)
    side = "left" if place < 0.35 else "right" if place > 0.65 else "center"
    share = "" if met is None else f", met by {100 * met:.1f} %"
    axis.annotate(f"limit {_thousands(limit_ms)} ms{share}", (limit_ms, 1), xycoords=("data", "axes fraction"),
                  xytext=({"left": -4, "right": 4, "center": 0}[side], 4), textcoords="offset points",
                  color=LIMIT, fontsize=9, ha=side, va="bottom")


def plot_load(result: Result, path: str | Path, index: int = 0) -> Path:
    """Running and waiting requests, and KV memory, over the time of the first run."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    path, lane = Path(path), result.lanes[index][0]
    curves = _curves(lane)
    num_instances = len(lane.busy_s)
    # A tape that was too short ends before the run.
    last, end = float(lane.arrival_s[-1]), float(curves[0][1][0][-1])
    with drawn(path, figsize=(11, 5.4)) as figure:
        axes = np.atleast_1d(figure.subplots(len(curves), 1, sharex=True))
        for axis, (title, series, colour, is_share) in zip(axes, curves, strict=True):
            times, total, low, high = series
            axis.fill_between(times, 0, total, step="post", color=colour, alpha=0.18, linewidth=0)
            axis.step(times, total, where="post", color=colour, linewidth=1.3)
            if last <= end:
                axis.axvline(last, color=FAINT, linestyle=(0, (1, 2)), linewidth=1.2)
            axis.set_title(title)
            if is_share:
                peak = float(np.max(total if high is None else high))
                axis.set_ylim(0, 1.05 if peak > 0.6 else max(1.4 * peak, 0.05))
                axis.yaxis.set_major_formatter(lambda y, _: f"{100 * y:g} %")
                axis.set_ylabel("of the blocks")
                if low is not None:
                    axis.fill_between(times, low, high, step="post", color=INK, alpha=0.14, linewidth=0,
                                      label="emptiest to fullest instance")
                    axis.legend(loc="lower left", bbox_to_anchor=(0.2, 0.97), borderaxespad=0.2)
            else:
                axis.set_ylim(0, max(float(np.max(total)), 1.0) * 1.12)
                axis.yaxis.set_major_locator(MaxNLocator(nbins=4, integer=True, steps=_STEPS))
                axis.yaxis.set_major_formatter(FuncFormatter(_thousands))
                axis.set_ylabel("requests")
                if not np.any(total):
                    axis.annotate("none", (0.5, 0.5), xycoords="axes fraction", ha="center", va="center", color=FAINT)
        heading(figure, _first_seed(result, index))
        axes[-1].xaxis.set_major_formatter(FuncFormatter(_thousands))
        axes[-1].set_xlabel("seconds" + (f", {num_instances} instances" if num_instances > 1 else ""))
        axes[-1].set_xlim(0, end)
        if last <= end:
            # Above the frame, where no curve runs, and clear of the title.
            place = _place(axes[0], last)
            axes[0].annotate("last arrival", (last, 1), xycoords=("data", "axes fraction"),
                             xytext=(3 if place > 0.9 else -3 if place < 0.1 else 0, 3), textcoords="offset points",
                             ha="right" if place > 0.9 else "left" if place < 0.1 else "center", va="bottom",
                             fontsize=9, color=FAINT)
    return path


def _curves(lane: LaneResult) -> list[tuple[str, tuple, str, bool]]:
    """Title, (times, total, least, most), colour and whether it is a share, from top to bottom."""
    if lane.steps is None:
        # Without a tape the requests still tell how many were where; one that was preempted, or lost with an instance
        # and sent on, counts as running, one that is to be sent again as waiting.
        waiting_until, running_until = waiting_and_running_until(lane.scheduled_s, lane.finish_s, lane.ended_s)
        return [("Running", _count(lane.scheduled_s, running_until), PHASES["prefill"], False),
                ("Waiting", _count(lane.arrival_s, waiting_until), PHASES["queue"], False)]
    curves = [("Running", _over_time(lane, lane.steps["running"]), PHASES["prefill"], False),
              ("Waiting", _waiting(lane), PHASES["queue"], False)]
    num_instances = len(lane.busy_s)
    capacity = np.broadcast_to(lane.num_blocks, (num_instances,))
    if capacity.any():
        # Who encodes images holds no KV.
        capacity = np.where(capacity > 0, capacity, np.inf)
        num_instances = np.isfinite(capacity).sum()
        used = np.asarray(lane.steps["used_blocks"]) / capacity[np.asarray(lane.steps["instance"])]
        # With roles prompts hold blocks until their transfer is through.
        times, total, low, high = _over_time(lane, used, lane.decode_instance is None)
        curves.append(("KV memory in use", (times, total / num_instances, low, high), "#009E73", True))
    return curves


def _count(start_s: np.ndarray, end_s: np.ndarray) -> tuple:
    return _thin(*_counted(start_s, end_s))


def _counted(start_s: np.ndarray, end_s: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Those that have started and not ended, from each time on. Who never started did not end either."""
    times = np.concatenate([start_s, np.where(np.isnan(start_s), np.nan, end_s)])
    change = np.concatenate([np.ones(len(start_s)), -np.ones(len(end_s))])
    known = ~np.isnan(times)
    order = np.argsort(times[known], kind="stable")
    return times[known][order], np.cumsum(change[known][order])[None]


def _waiting(lane: LaneResult) -> tuple:
    """Requests not scheduled yet, at any time, and preempted ones that wait again, as every step leaves them.

    Where requests end without an answer: all that have not ended and do not run, so also those that were lost with an
    instance, or are to be sent again.
    """
    if lane.ended_s is not None:
        arrived = _counted(lane.arrival_s, lane.ended_s)
        ran = _held(lane, lane.steps["running"])
        # A tape that was too short says nothing beyond its end.
        both = np.union1d(arrived[0], ran[0])
        both = both[both < ran[0][-1]]
        there, running = (np.append(0, levels.sum(0))[np.searchsorted(times, both, side="right")]
                          for times, levels in (arrived, ran))
        return _thin(both, np.maximum(there - running, 0)[None])
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


_AT_ONCE_S = 1e-5
"""Steps this close follow each other: their ends are sums that round."""


def _over_time(lane: LaneResult, column: np.ndarray, is_empty_at_rest: bool = True) -> tuple:
    """Sum, least and most over instances of a count, which holds from one step's start to the next.

    is_empty_at_rest: or to its end, where no other follows at once.
    """
    return _thin(*_held(lane, column, is_empty_at_rest))


def _held(lane: LaneResult, column: np.ndarray, is_empty_at_rest: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """The count of every instance, from each time on."""
    steps, num_instances = lane.steps, len(lane.busy_s)
    order = np.argsort(steps["time_s"], kind="stable")
    times, ends = (np.asarray(x, np.float64)[order] for x in (
        steps["time_s"], np.asarray(steps["time_s"]) + np.asarray(steps["duration_s"])))
    instance, value = np.asarray(steps["instance"])[order], np.asarray(column, np.float64)[order]
    end, rests = float(ends.max()), []
    for i in range(num_instances):
        mine = np.flatnonzero(instance == i)
        over = np.maximum.accumulate(ends[mine])
        # An instance that has nothing more to do holds nothing.
        is_resting = np.append(times[mine][1:] > over[:-1] + _AT_ONCE_S, True)[:len(mine)]
        is_resting[:-1] &= is_empty_at_rest
        rests.append(np.stack([over[is_resting], np.full(is_resting.sum(), i), np.zeros(is_resting.sum())]))
    times, instance, value = np.concatenate([np.stack([times, instance, value]), *rests], axis=1)
    order = np.argsort(times, kind="stable")
    times, instance, value = times[order], instance[order], value[order]
    held = np.zeros((num_instances, len(times) + 1))
    for i in range(num_instances):
        mine = np.flatnonzero(instance == i)
        if len(mine) == 0:
            continue
        latest = np.searchsorted(mine, np.arange(len(times)), side="right") - 1
        held[i, :-1] = np.where(latest >= 0, value[mine[np.maximum(latest, 0)]], 0)
    return np.append(times, end), held


def _thin(times: np.ndarray, held: np.ndarray) -> tuple:
    if len(times) > _MOST_POINTS:
        keep = np.unique(np.linspace(0, len(times) - 1, _MOST_POINTS).astype(int))
        times, held = times[keep], held[:, keep]
    many = len(held) > 1
    return times, held.sum(0), held.min(0) if many else None, held.max(0) if many else None


def plot_requests(result: Result, path: str | Path, index: int = 0) -> Path:
    """What happened to consecutive requests of the first run: one bar each, coloured by phase."""
    from matplotlib.ticker import FuncFormatter

    path, lane = Path(path), result.lanes[index][0]
    frame = _window(request_frame(lane))
    with drawn(path, figsize=(11, 5.4)) as figure:
        axis = figure.subplots()
        start = frame["arrival_s"].to_numpy()
        rows = np.arange(len(frame))
        totals = {}
        for name, colour in PHASES.items():
            length = frame[f"{name}_s"].fillna(0.0).to_numpy() if f"{name}_s" in frame else np.zeros(len(frame))
            totals[name] = float(length.sum())
            label = name if name != "stall" else "stalled (drawn as one piece)"
            if totals[name] > 0 or name not in RARE:
                axis.barh(rows, length, left=start, height=0.82, color=colour, linewidth=0, label=label)
            start = start + length
        axis.set_ylim(len(frame) - 0.4, -0.6)
        axis.set_xlim(float(frame["arrival_s"].min()), float(np.max(start)) * 1.001)
        axis.grid(axis="y", visible=False)
        first, last = int(frame["request_id"].iloc[0]), int(frame["request_id"].iloc[-1])
        axis.set_title(f"Requests {first:,} to {last:,}, from arrival to last token")
        axis.set_xlabel("seconds")
        axis.set_ylabel("request, in order of arrival")
        ids = frame["request_id"].to_numpy()
        ticks = np.flatnonzero(ids % (10 if len(ids) > 20 else 5 if len(ids) > 8 else 1) == 0)
        axis.set_yticks(ticks, [_thousands(int(ids[t])) for t in ticks])
        axis.xaxis.set_major_formatter(FuncFormatter(_thousands))
        heading(figure, _first_seed(result, index))
        axis.legend(ncols=len(PHASES), loc="lower right", bbox_to_anchor=(1.0, 1.0), borderaxespad=0.3)
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
