"""Pareto fronts: scenarios that no other beats in every metric."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool

from jaxsim._core.errors import InputError
from jaxsim.io.figure import FAINT, INK, LIMIT
from jaxsim.study.panels import (
    SHARE,
    compact,
    finish,
    format_metric,
    is_wide,
    mark_limit,
    saved,
    styles_of,
    unsimulated,
)
from jaxsim.study.view import (
    MOST_HUES,
    PER_DEVICE,
    checked_metric,
    checked_parameter,
    default_metric,
    devices_vary,
    is_numeric,
    is_true,
    known,
    label,
    prepared,
    short,
    value_text,
    values_of,
    varying,
    wrapped,
    writer,
)

MOST_LABELS = 12
MOST_COLUMNS = 5
"""Parameters in the table beside a front."""


def front(frame: pd.DataFrame, lower: str | Sequence[str], higher: str | Sequence[str]
          ) -> Bool[np.ndarray, " rows"]:
    """Rows that no other row beats: none is as good in every column and better in one.

    lower, higher: columns of which less, or more, is better. Rows that lack a value are never among them.
    """
    down, up = ([names] if isinstance(names, str) else list(names) for names in (lower, higher))
    cost = np.column_stack([*(frame[n].to_numpy(float) for n in down), *(-frame[n].to_numpy(float) for n in up)])
    is_best = np.zeros(len(frame), bool)
    known = np.flatnonzero(~np.isnan(cost).any(axis=1))
    best = np.empty((0, cost.shape[1]))
    # In this order a row is beaten by earlier ones only.
    for row in known[np.lexsort(cost[known].T[::-1])]:
        if not ((best <= cost[row]).all(axis=1) & (best < cost[row]).any(axis=1)).any():
            is_best[row] = True
            best = np.vstack([best, cost[row]])
    return is_best


def lower_is_better(name: str) -> bool:
    """Whether less of a metric is better, by its name."""
    return bool(re.search(r"_ms$|^duration$|^failed$|preemption|num_devices|_share$|^usd_|energy|_power_w$", name))


def pareto(frame: pd.DataFrame, x: str | None = None, y: str | None = None, hue: str | None = None, *,
           minimise: str | Sequence[str] = (), maximise: str | Sequence[str] = (), out: Any = None) -> Any:
    """Two metrics against each other, and the front of the stable scenarios that no other beats in both.

    By default the 99th percentile of TTFT, and output throughput, per device where devices differ. minimise, maximise:
    metrics whose better side is not what their names say. Returns the figure. Raises `InputError`.
    """
    from matplotlib.lines import Line2D

    frame = prepared(frame)
    x = default_metric(frame) if x is None else x
    if y is None:
        y = PER_DEVICE if devices_vary(frame) else "output_throughput"
    checked_metric(frame, "x", x), checked_metric(frame, "y", y)
    is_lower = _senses(frame, (x, y), minimise, maximise)
    if hue is not None:
        checked_parameter(frame, "hue", hue)
    else:
        names = [n for n in varying(frame) if frame[n].nunique(dropna=False) <= MOST_HUES]
        hue = min(names, key=lambda n: (is_numeric(frame[n]), frame[n].nunique(dropna=False)), default=None)
    if hue is not None and frame[hue].nunique(dropna=False) > MOST_HUES:
        raise InputError("hue", hue, f"has {frame[hue].nunique():,} values, more than {MOST_HUES} colours tell apart",
                         "choose another --hue")
    is_unstable = is_true(frame["unstable"])
    points = frame[~is_unstable & frame[x].notna().to_numpy() & frame[y].notna().to_numpy()]
    if not len(points):
        raise InputError("unstable", f"{int(is_unstable.sum()):,} of {len(frame):,} rows",
                         "leave no stable scenario with both metrics", "lower the rates of the study")
    mask = front(points, [n for n in (x, y) if is_lower[n]], [n for n in (x, y) if not is_lower[n]])
    best = points[mask].sort_values([x, y], ascending=[is_lower[x], not is_lower[y]], kind="stable")
    names, styles = short(varying(frame)), styles_of(frame, hue)
    differing, written = varying(best), writer(frame[hue]) if hue else value_text
    room = _table_inches(best, differing[:MOST_COLUMNS], names)
    with saved(out, (7.2 + room, 5.8)) as figure:
        axis, beside = figure.subplots(1, 2, width_ratios=(7.0, room))
        for text, (colour, marker) in styles.items():
            is_mine = np.ones(len(points), bool) if hue is None else (points[hue].map(written) == text).to_numpy()
            for chosen, look in ((points[is_mine & ~mask], {"alpha": 0.28, "zorder": 2, "markersize": 5}),
                                 (points[is_mine & mask], {"zorder": 4, "markersize": 6.5, "markeredgecolor": "white",
                                                           "markeredgewidth": 0.7})):
                axis.plot(chosen[x], chosen[y], marker, color=colour, linestyle="none", **look)
        axis.step(best[x], best[y], where="post", color=INK, linewidth=1.1, zorder=3)
        drew: dict[str, Any] = {}
        mark_limit(axis, points, x, "x", drew)
        mark_limit(axis, points, y, "y", drew)
        for name, which, setter in ((x, axis.xaxis, axis.set_xscale), (y, axis.yaxis, axis.set_yscale)):
            values = points[name].to_numpy(float)
            is_log = is_wide(values) and not SHARE.search(name)
            if is_log:
                setter("log")
            format_metric(which, name, values, is_log)
            arrow = {(True, True): "←", (True, False): "→", (False, True): "↓", (False, False): "↑"}
            better = arrow[which is axis.xaxis, is_lower[name]] + " better"
            (axis.set_xlabel if which is axis.xaxis else axis.set_ylabel)(f"{label(name)}  ({better})")
        axis.margins(0.07)
        figure.draw_without_rendering()
        numbered = _number_front(axis, best, x, y)
        _front_table(beside, best, numbered, differing[:MOST_COLUMNS], names, {n: label(n) for n in (x, y)})
        handles = [] if hue is None else [
            Line2D([], [], color=c, marker=m, markersize=5.5, linestyle="none", label=f"{names[hue]} {t}")
            for t, (c, m) in styles.items()]
        handles += [Line2D([], [], color=INK, linewidth=1.1, label="front"),
                    *(Line2D([], [], color=LIMIT, linestyle=(0, (4, 3)), label=f"{n} limit {value_text(v)} ms")
                      for n, v in sorted(drew.get("limits", ())))]
        figure.legend(handles=handles, loc="outside upper right", ncols=min(len(handles), 6))
        same = [f"{names[n]} {value_text(best[n].iloc[0])}" for n in varying(frame) if n not in differing]
        notes = ["the same on the whole front: " + ", ".join(same)] if same else []
        different = len(best.drop_duplicates([x, y]))
        if len(numbered) < different:
            notes.append(f"{len(numbered)} of the {different:,} points of the front, far enough apart, are numbered")
        if is_unstable.any():
            notes.append(f"{int(is_unstable.sum()):,} unstable scenarios left out: their latencies are of the run's"
                         " length, not of the system")
        finish(figure, frame, f"{len(best):,} of {len(points):,} scenarios are on the front",
                [*notes, *unsimulated(frame)])
    return figure


def _senses(frame: pd.DataFrame, chosen: Sequence[str], minimise: str | Sequence[str],
            maximise: str | Sequence[str]) -> dict[str, bool]:
    """Whether less is better, of each. Raises `InputError`."""
    is_lower = {name: lower_is_better(name) for name in chosen}
    for option, names, sense in (("minimise", minimise, True), ("maximise", maximise, False)):
        for name in [names] if isinstance(names, str) else names:
            if known(frame, option, name) not in is_lower:
                raise InputError(option, name, "is neither x nor y", f"name {' or '.join(chosen)}")
            is_lower[name] = sense
    return is_lower


def _number_front(axis: Any, best: pd.DataFrame, x: str, y: str) -> list[int]:
    """Numbers at points of the front that are far enough apart to read; their places on it."""
    from matplotlib.patheffects import withStroke

    place = axis.transData.transform(best[[x, y]].to_numpy(float))
    apart, chosen = 14.0, list(range(len(best)))
    while apart == 14.0 or len(chosen) > MOST_LABELS:
        chosen = []
        for k in range(len(best)):
            if not chosen or min(np.linalg.norm(place[k] - place[other]) for other in chosen) >= apart:
                chosen.append(k)
        apart *= 1.2
    for count, k in enumerate(chosen, 1):
        axis.annotate(str(count), tuple(best[[x, y]].iloc[k]), xytext=(-5, 5), textcoords="offset points", ha="right",
                      va="bottom", fontsize=9, fontweight="bold", zorder=6,
                      path_effects=[withStroke(linewidth=2.5, foreground="white")])
    return chosen


def _front_table(axis: Any, best: pd.DataFrame, numbered: Sequence[int], differing: Sequence[str],
                 names: Mapping[str, str], labels: Mapping[str, str]) -> None:
    """The numbered scenarios: what differs between them, and the two metrics. Exact equals share a row."""
    axis.set_axis_off()
    header = ["", *(wrapped(names[n]) for n in differing), *(wrapped(labels[n], " ") for n in labels)]
    cells = []
    for count, k in enumerate(numbered, 1):
        row = best.iloc[k]
        equals = best[(best[list(labels)] == row[list(labels)]).all(axis=1)]
        cells.append([str(count), *(_clipped(" or ".join(map(value_text, values_of(equals[n])))) for n in differing),
                      *(compact(row[n], bool(SHARE.search(n))) for n in labels)])
    widths = [max(len(line) for text in column for line in text.split("\n")) + 1.5
              for column in zip(header, *cells, strict=True)]
    edges = np.cumsum(widths) / sum(widths)
    size = 8.5
    deep = max(text.count("\n") for text in header) + 1
    top = 1 - 0.037 * deep
    for k, text in enumerate(header):
        axis.text(edges[k], top + 0.012, text, ha="right", va="bottom", fontsize=size, color=FAINT,
                  transform=axis.transAxes)
    for i, row in enumerate(cells):
        for k, text in enumerate(row):
            axis.text(edges[k], top - 0.018 - 0.052 * i, text, ha="right", va="top", fontsize=size,
                      fontweight="bold" if k == 0 else "normal", transform=axis.transAxes)
    axis.plot([0, 1], [top, top], color="#BBBBBB", linewidth=0.8, transform=axis.transAxes)


def _table_inches(best: pd.DataFrame, differing: Sequence[str], names: Mapping[str, str]) -> float:
    """Room that the table of a front takes, at most."""
    longest = [max(max(map(len, wrapped(names[n]).split("\n"))),
                   *(len(_clipped(value_text(v))) for v in best[n].drop_duplicates())) for n in differing]
    return 0.075 * (sum(longest) + 1.5 * len(longest) + 34)


def _clipped(text: str, most: int = 18) -> str:
    return text if len(text) <= most else text[:most - 1] + "…"
