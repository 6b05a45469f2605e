"""Families of lines: metrics over a parameter, with intervals."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from jaxsim.io.figure import FAINT, LIMIT
from jaxsim.study.panels import (
    PERCENTILE,
    SHARE,
    finish,
    format_metric,
    grid_of,
    is_first,
    is_lowest,
    is_wide,
    mark_limit,
    parameter_axis,
    saved,
    small_multiples,
    styles_of,
    unsimulated,
)
from jaxsim.study.results import HALF_WIDTH
from jaxsim.study.view import (
    checked_metric,
    default_metric,
    is_numeric,
    is_true,
    joins_nothing,
    label,
    limits,
    line_axes,
    prepared,
    rows_where,
    short,
    value_text,
    values_of,
    varying,
    writer,
)


def lines(frame: pd.DataFrame, x: str | None = None, y: str | Sequence[str] | None = None, hue: str | None = None, *,
          out: Any = None) -> Any:
    """Metrics over a parameter: a line a value of `hue` with 95 % intervals, a panel a value of whatever else varies.

    Unstable points are hollow. x is logarithmic if its values are. out: a file, or a stream for PNG bytes.
    Returns the figure. Raises `InputError`.
    """
    frame = prepared(frame)
    chosen = [default_metric(frame)] if y is None else [y] if isinstance(y, str) else list(y)
    chosen = [checked_metric(frame, "y", name) for name in chosen]
    x, hue, fields = line_axes(frame, x, hue, len(chosen))
    names, styles = short(varying(frame)), styles_of(frame, hue)
    written = writer(frame[hue]) if hue else value_text
    columns, rows = grid_of(frame, fields, len(chosen), 3)
    is_scattered = joins_nothing(frame, x, hue)
    at = None if is_numeric(frame[x]) else {v: float(k) for k, v in enumerate(values_of(frame[x]))}
    size = ({1: 7.6, 2: 10.2}.get(columns, 3.7 * columns + 2.2), {1: 4.6}.get(rows, 3.0 * rows + 1.0))
    with saved(out, size) as figure:
        panels = small_multiples(figure, frame, fields, len(chosen))
        drew: dict[str, Any] = {}
        for row, metric in enumerate(chosen):
            _metric_range([axis for r, _, axis in panels if r == row], frame, metric)
        for row, values, axis in panels:
            metric = chosen[row]
            inside = rows_where(frame, fields, values)
            for k, (text, (colour, marker)) in enumerate(styles.items()):
                # Names leave room beside each other, numbers do not.
                beside = None if at is None else {v: p + 0.5 * (k + 0.5) / len(styles) - 0.25 for v, p in at.items()}
                mine = inside if hue is None else inside[inside[hue].map(written) == text]
                _family(axis, mine, x, metric, colour, marker, beside, None if is_scattered else "-", drew)
            if len(inside) and inside["refused"].notna().all():
                axis.text(0.5, 0.5, "all refused", transform=axis.transAxes, ha="center", fontsize=9.5, color=FAINT)
            mark_limit(axis, inside, metric, "y", drew)
            parameter_axis(axis, frame[x], at)
            if is_first(axis):
                axis.set_ylabel(label(metric))
            if is_lowest(panels, axis):
                axis.set_xlabel(x)
        _line_legend(figure, styles, names[hue] if hue else "", "none" if is_scattered else "-", drew)
        notes = unsimulated(frame)
        if is_scattered and at is None:
            notes.append("points are not joined: other parameters differ between them")
        unknown = int((frame["unstable"].isna() & frame["refused"].isna()).sum())
        if unknown and frame["unstable"].notna().any():
            notes.append(f"{unknown:,} scenario{'s' * (unknown > 1)} drawn as stable: runs too short to tell")
        finish(figure, frame, ", ".join(label(name).partition(",")[0] for name in chosen) + f" over {names[x]}", notes)
    return figure


def _family(axis: Any, rows: pd.DataFrame, x: str, y: str, colour: Any, marker: str, at: Mapping[Any, float] | None,
            style: str | None, drew: dict[str, Any]) -> None:
    """One line: band, line, filled and hollow points."""
    rows = rows[rows[y].notna() & rows[x].notna()]
    place = rows[x].to_numpy(float) if at is None else rows[x].map(at).to_numpy(float)
    order = np.argsort(place, kind="stable")
    rows, place = rows.iloc[order], place[order]
    if not len(rows):
        return
    value = rows[y].to_numpy(float)
    half = rows[y + HALF_WIDTH].fillna(0).to_numpy(float) if y + HALF_WIDTH in rows else np.zeros(len(rows))
    if half.any():
        drew["interval"] = True
        # The interval of a mean of few seeds may reach below zero, where no logarithm goes.
        low = np.maximum(value - half, axis.get_ylim()[0] / 1.1) if axis.get_yscale() == "log" else value - half
        if style and len(rows) > 1:
            axis.fill_between(place, low, value + half, color=colour, alpha=0.16, linewidth=0)
        else:
            axis.errorbar(place, value, (value - low, half), fmt="none", ecolor=colour, elinewidth=1, capsize=2)
    if style:
        axis.plot(place, value, style, color=colour, linewidth=1.5)
    is_unstable = is_true(rows["unstable"])
    for mask, face in ((~is_unstable, colour), (is_unstable, "white")):
        if mask.any():
            axis.plot(place[mask], value[mask], marker, color=colour, markerfacecolor=face, markersize=5,
                      markeredgewidth=1.2, linestyle="none", zorder=3)
    drew["unstable"] = drew.get("unstable", False) or bool(is_unstable.any())


def _metric_range(axes: list[Any], frame: pd.DataFrame, metric: str) -> None:
    """The same range in all panels of a metric: its means, intervals within reason, the limit unless it is far away."""
    values = frame[metric].dropna().to_numpy(float)
    half = frame[metric + HALF_WIDTH].fillna(0) if metric + HALF_WIDTH in frame else pd.Series(0.0, frame.index)
    half = half[frame[metric].notna()].to_numpy(float)
    is_log = is_wide(values) and not SHARE.search(metric)
    found = PERCENTILE.fullmatch(metric)
    limit = limits(frame).get(found[2]) if found else None
    low, high = values.min(), max(values.max(), (values + np.minimum(half, 0.4 * np.abs(values))).max())
    if limit is not None and (is_log or limit < 2.5 * high):
        low, high = min(low, limit), max(high, limit)
    for axis in axes:
        if is_log:
            axis.set_yscale("log")
            axis.set_ylim(low / 1.25, high * 1.25)
        elif SHARE.search(metric) and high > 0.5:
            axis.set_ylim(-0.04, 1.04)
        else:
            start = 0.0 if low >= 0 and low < 0.5 * high else low - 0.06 * (high - low or abs(high) or 1)
            axis.set_ylim(start, high + 0.07 * (high - start or 1))
        format_metric(axis.yaxis, metric, np.array([low, high]), is_log)


def _line_legend(figure: Any, styles: Mapping[str, tuple[Any, str]], title: str, style: str, drew: Mapping[str, Any]
                 ) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = []
    if title:
        handles += [Line2D([], [], color=colour, marker=marker, markersize=5, linestyle=style, label=text)
                    for text, (colour, marker) in styles.items()]
    if drew.get("unstable"):
        handles.append(Line2D([], [], color=FAINT, marker="o", markerfacecolor="white", markersize=5.5,
                              markeredgewidth=1.2, linestyle="none", label="unstable"))
    if drew.get("interval"):
        handles.append(Patch(color=FAINT, alpha=0.25, linewidth=0, label="95 % interval"))
    for name, limit in sorted(drew.get("limits", ())):
        text = f"{name} limit\n{value_text(limit)} ms"
        handles.append(Line2D([], [], color=LIMIT, linestyle=(0, (4, 3)), label=text))
    if handles:
        legend = figure.legend(handles=handles, loc="outside right upper", title=title or None, alignment="left")
        legend.get_title().set_fontweight("bold")
        legend.get_title().set_fontsize(9)
