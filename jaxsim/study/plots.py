"""Plots of a study's table: families of lines, heat maps, and Pareto fronts.

    frame = view.read("results/limits")            # the table, knowing its study
    lines(frame, out="lines.png")                  # axes are chosen from the study where none are given
    heatmap(frame, "workload.rate_rps", "engine.max_num_seqs", "slo.attainment", out="map.svg")
    pareto(frame, "p99_tpot_ms", "output_throughput_per_device", out="front.png")

Each returns its matplotlib figure. A table of `jaxsim.load` serves too; its plots lack what only the study knows: its
name, and limits and numbers of devices that are no axes.
"""

import contextlib
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool

from jaxsim._core.errors import InputError
from jaxsim.io.figure import FAINT, INK, LIMIT, LINE, drawn, heading
from jaxsim.io.table import number
from jaxsim.study.results import HALF_WIDTH
from jaxsim.study.view import (
    LATENCIES,
    MOST_HUES,
    MOST_PANELS,
    PER_DEVICE,
    checked_metric,
    checked_parameter,
    combinations,
    default_metric,
    devices_vary,
    is_numeric,
    is_true,
    joins_nothing,
    known,
    label,
    limits,
    line_axes,
    map_axes,
    metrics,
    prepared,
    rows_where,
    short,
    study_of,
    value_text,
    values_of,
    varying,
    writer,
)

MOST_WRITTEN = 12
"""Cells a side whose values are written."""
MOST_LABELS = 12
MOST_COLUMNS = 5
"""Parameters in the table beside a front."""

ENDINGS = (".png", ".svg")

# Told apart with any colour vision (Okabe and Ito, then Tol), none of them the colour of limits; and by their shape.
_COLOURS = (LINE, "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#222222", "#882255", "#999933", "#6699CC", "#AA4466")
_MARKERS = "os^DvPX<>*"
_SHARE = re.compile(r"_share$|attainment$")
_PERCENTILE = re.compile(r"(p\d+|median)_(ttft|tpot|e2el)_ms")
_LOG_BEYOND = 12.0
"""Ratio of the largest to the smallest value from which metrics are drawn on a logarithmic axis."""


@contextlib.contextmanager
def _figure(out: Any, size: tuple[float, float]) -> Iterator[Any]:
    """A figure, saved to a file or to a stream of PNG bytes; the same bytes for the same table."""
    from matplotlib import rc_context

    is_svg = isinstance(out, (str, Path)) and Path(out).suffix == ".svg"
    if isinstance(out, (str, Path)) and Path(out).suffix not in ENDINGS:
        raise InputError("out", str(out), "is neither PNG nor SVG", "end it in .png or .svg")
    # Ids and the date would differ from run to run, and a user's names hold no mathematics.
    with rc_context({"svg.hashsalt": "jaxsim", "text.parse_math": False}):
        with drawn(io.BytesIO() if out is None or is_svg else out, figsize=size) as figure:
            yield figure
            if is_svg:
                figure.savefig(out, metadata={"Date": None})


def _is_log_spaced(values: Sequence[Any]) -> bool:
    """Whether ratios of neighbours are more alike than their distances."""
    numbers = np.array(sorted(values), float)
    if len(numbers) < 3 or numbers[0] <= 0 or numbers[-1] < 4 * numbers[0]:
        return False
    steps, ratios = np.diff(numbers), np.diff(np.log(numbers))
    return bool(ratios.std() / ratios.mean() < steps.std() / steps.mean())


def _is_wide(values: np.ndarray) -> bool:
    values = values[np.isfinite(values)]
    return bool(len(values) and values.min() > 0 and values.max() > _LOG_BEYOND * values.min())


def _format(axis: Any, name: str, values: np.ndarray, is_log: bool) -> None:
    """Ticks of a metric's axis."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    if is_log:
        ratio = np.nanmax(values) / np.nanmin(values)
        subs = (1, 2, 5) if ratio < 40 else (1, 3) if ratio < 300 else (1,)
        axis.set_major_locator(LogLocator(subs=subs, numticks=8))
        axis.set_minor_formatter(NullFormatter())
    else:
        axis.set_major_locator(MaxNLocator(nbins=5, steps=(1, 2, 2.5, 5, 10)))
    scale, behind = (100, " %") if _SHARE.search(name) else (1, "")
    axis.set_major_formatter(FuncFormatter(lambda v, _: f"{scale * v:,.10g}{behind}"))


def _parameter_axis(axis: Any, column: pd.Series, at: Mapping[Any, float] | None) -> None:
    """Scale and ticks of x: the values themselves where they are few."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

    if at is not None:
        texts = [value_text(v) for v in at]
        is_long = sum(map(len, texts)) > 36
        axis.set_xticks(list(at.values()), texts, rotation=30 if is_long else 0, ha="right" if is_long else "center")
        axis.set_xlim(-0.5, len(at) - 0.5)
        return
    values = np.array([v for v in values_of(column) if v == v], float)
    is_log = _is_log_spaced(values)
    if is_log:
        axis.set_xscale("log")
        axis.xaxis.set_minor_locator(NullLocator())
        axis.xaxis.set_minor_formatter(NullFormatter())
    place = np.log(values) if is_log else values
    gaps = np.diff(place) / max(place[-1] - place[0], 1e-300)
    if len(values) <= 7 and gaps.min(initial=1) >= 0.09:
        axis.xaxis.set_major_locator(FixedLocator(values))
    elif is_log:
        ratio = values[-1] / values[0]
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if ratio < 100 else (1,), numticks=9))
    else:
        axis.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=(1, 2, 2.5, 5, 10)))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda v, _: value_text(float(v))))


def _colours(frame: pd.DataFrame, hue: str | None) -> dict[str, tuple[Any, str]]:
    """Colour and marker of each value of hue, by its text: shades for numbers, hues for names."""
    from matplotlib import colormaps

    if hue is None:
        return {"": (LINE, "o")}
    texts = [writer(frame[hue])(v) for v in values_of(frame[hue])]
    is_scale = is_numeric(frame[hue]) and len(texts) > 2
    # Without the yellow end, which white paper swallows.
    shades = colormaps["viridis"](np.linspace(0, 0.82, len(texts))) if is_scale else _COLOURS
    return {text: (shades[k], _MARKERS[k % len(_MARKERS)]) for k, text in enumerate(texts)}


def _panels(figure: Any, frame: pd.DataFrame, fields: list[str], rows: int = 1, most: int = 3
            ) -> list[tuple[int, tuple, Any]]:
    """Axes in small multiples: (row of metrics, values of the fields, axis), titled by those values."""
    found, names = combinations(frame, fields), short(varying(frame))
    num_columns, num_rows = _grid(frame, fields, rows, most)
    axes = figure.subplots(num_rows, num_columns, squeeze=False, sharex=True, sharey="row" if rows > 1 else True)
    panels = []
    if rows == 1 and len(fields) == 2 and num_columns * num_rows == _full(frame, fields):
        across = max(fields, key=lambda n: frame[n].nunique(dropna=False))
        down = fields[0] if across == fields[1] else fields[1]
        write = {n: writer(frame[n]) for n in fields}
        at = {n: [write[n](v) for v in values_of(frame[n])] for n in fields}
        for values in found:
            text = {n: write[n](v) for n, v in zip(fields, values, strict=True)}
            panels.append((0, values, axes[at[down].index(text[down]), at[across].index(text[across])]))
    else:
        for row in range(rows):
            for k, values in enumerate(found):
                panels.append((row, values, axes[row, k] if rows > 1 else axes[divmod(k, num_columns)]))
    used = {id(axis) for *_, axis in panels}
    for index, axis in np.ndenumerate(axes):
        if id(axis) not in used:
            axis.set_visible(False)
            if index[0]:
                # The one above is the last of its column.
                axes[index[0] - 1, index[1]].tick_params(labelbottom=True)
    for row, values, axis in panels:
        if fields and (row == 0 or rows == 1):
            text = "\n".join(f"{names[n]} {writer(frame[n])(v)}" for n, v in zip(fields, values, strict=True))
            axis.set_title(text, fontsize=9.5)
    return panels


def _full(frame: pd.DataFrame, fields: Sequence[str]) -> int:
    return int(np.prod([frame[n].nunique(dropna=False) for n in fields]))


def _grid(frame: pd.DataFrame, fields: list[str], rows: int, most: int) -> tuple[int, int]:
    """Columns and rows of panels."""
    count = len(combinations(frame, fields))
    if rows > 1:
        return count, rows
    if len(fields) == 2 and _full(frame, fields) <= MOST_PANELS:
        few, many = sorted(frame[n].nunique(dropna=False) for n in fields)
        if many <= most:
            return many, few
    num_columns = min(count, most, 2 if count == 4 else most)
    return num_columns, -(-count // num_columns)


def _is_lowest(panels: list[tuple[int, tuple, Any]], axis: Any) -> bool:
    """Whether no panel is below, so that it carries the label of x."""
    spec = axis.get_subplotspec()
    return not any(other.get_subplotspec().colspan.start == spec.colspan.start
                   and other.get_subplotspec().rowspan.start > spec.rowspan.start for *_, other in panels)


def _is_first(axis: Any) -> bool:
    return axis.get_subplotspec().colspan.start == 0


def _finish(figure: Any, frame: pd.DataFrame, what: str, notes: Sequence[str]) -> None:
    """The line above and the notes below."""
    name = study_of(frame).get("name", "")
    heading(figure, f"{name}: {what}" if name else what)
    if notes:
        figure.supxlabel("\n".join(notes), x=0.008, ha="left", fontsize=8.5, color=FAINT)


def _unsimulated(frame: pd.DataFrame) -> list[str]:
    count = int(frame["refused"].notna().sum())
    return [f"{count:,} refused scenario{'s' * (count > 1)} not shown (column `refused` says why)"] if count else []


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
    names, styles = short(varying(frame)), _colours(frame, hue)
    written = writer(frame[hue]) if hue else value_text
    columns, rows = _grid(frame, fields, len(chosen), 3)
    is_scattered = joins_nothing(frame, x, hue)
    at = None if is_numeric(frame[x]) else {v: float(k) for k, v in enumerate(values_of(frame[x]))}
    size = ({1: 7.6, 2: 10.2}.get(columns, 3.7 * columns + 2.2), {1: 4.6}.get(rows, 3.0 * rows + 1.0))
    with _figure(out, size) as figure:
        panels = _panels(figure, frame, fields, len(chosen))
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
            _limit(axis, inside, metric, "y", drew)
            _parameter_axis(axis, frame[x], at)
            if _is_first(axis):
                axis.set_ylabel(label(metric))
            if _is_lowest(panels, axis):
                axis.set_xlabel(x)
        _line_legend(figure, styles, names[hue] if hue else "", "none" if is_scattered else "-", drew)
        notes = _unsimulated(frame)
        if is_scattered and at is None:
            notes.append("points are not joined: other parameters differ between them")
        unknown = int((frame["unstable"].isna() & frame["refused"].isna()).sum())
        if unknown and frame["unstable"].notna().any():
            notes.append(f"{unknown:,} scenario{'s' * (unknown > 1)} drawn as stable: runs too short to tell")
        _finish(figure, frame, ", ".join(label(name).partition(",")[0] for name in chosen) + f" over {names[x]}", notes)
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


def _limit(axis: Any, rows: pd.DataFrame, metric: str, along: str, drew: dict[str, Any]) -> None:
    """The limit of a latency, where one holds for the whole panel."""
    found = _PERCENTILE.fullmatch(metric)
    limit = limits(rows).get(found[2]) if found else None
    if limit is not None:
        draw = axis.axhline if along == "y" else axis.axvline
        draw(limit, color=LIMIT, linestyle=(0, (4, 3)), linewidth=1.3, zorder=2)
        drew.setdefault("limits", set()).add((LATENCIES[found[2]], limit))


def _metric_range(axes: list[Any], frame: pd.DataFrame, metric: str) -> None:
    """The same range in all panels of a metric: its means, intervals within reason, the limit unless it is far away."""
    values = frame[metric].dropna().to_numpy(float)
    half = frame[metric + HALF_WIDTH].fillna(0) if metric + HALF_WIDTH in frame else pd.Series(0.0, frame.index)
    half = half[frame[metric].notna()].to_numpy(float)
    is_log = _is_wide(values) and not _SHARE.search(metric)
    found = _PERCENTILE.fullmatch(metric)
    limit = limits(frame).get(found[2]) if found else None
    low, high = values.min(), max(values.max(), (values + np.minimum(half, 0.4 * np.abs(values))).max())
    if limit is not None and (is_log or limit < 2.5 * high):
        low, high = min(low, limit), max(high, limit)
    for axis in axes:
        if is_log:
            axis.set_yscale("log")
            axis.set_ylim(low / 1.25, high * 1.25)
        elif _SHARE.search(metric) and high > 0.5:
            axis.set_ylim(-0.04, 1.04)
        else:
            start = 0.0 if low >= 0 and low < 0.5 * high else low - 0.06 * (high - low or abs(high) or 1)
            axis.set_ylim(start, high + 0.07 * (high - start or 1))
        _format(axis.yaxis, metric, np.array([low, high]), is_log)


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


# ---- heat map


def heatmap(frame: pd.DataFrame, x: str | None = None, y: str | None = None, value: str | None = None, *,
            out: Any = None) -> Any:
    """A metric over two parameters, as colour; the rest that varies takes panels with the same colours.

    Refused cells are hatched, unstable ones marked with a ring; values are written in cells of up to 12 x 12.
    Returns the figure. Raises `InputError`.
    """
    from matplotlib.colors import LogNorm, Normalize

    frame = prepared(frame)
    if value is None:
        is_judged = "slo.attainment" in metrics(frame) and frame["slo.attainment"].notna().any()
        value = "slo.attainment" if is_judged else default_metric(frame)
    value = checked_metric(frame, "value", value)
    x, y, fields = map_axes(frame, x, y)
    across, up = values_of(frame[x]), values_of(frame[y])
    is_written = max(len(across), len(up)) <= MOST_WRITTEN
    wide, high = (max(n * each, least) for n, each, least in (
        (len(across), 0.5 if is_written else 0.12, 3.0), (len(up), 0.36 if is_written else 0.1, 1.5)))
    wide, high = min(wide, 8.0), min(high, 6.0)
    columns, rows = _grid(frame, fields, 1, max(1, int(15 / wide)) if wide > 4 else 3)
    found = frame[value].dropna().to_numpy(float)
    is_share = bool(_SHARE.search(value))
    is_log = _is_wide(found) and not is_share
    norm = LogNorm(found.min(), found.max()) if is_log else Normalize(
        *((0.0, 1.0) if is_share and found.max() > 0.5 else (found.min(), found.max())))
    kept: dict[str, bool] = {}
    with _figure(out, (max(wide * columns + 2.6, 6.5), (high + 0.75) * rows + 1.3)) as figure:
        panels = _panels(figure, frame, fields, most=max(1, int(15 / wide)) if wide > 4 else 3)
        image = None
        for _, values, axis in panels:
            cells = _Cells(rows_where(frame, fields, values), x, y, value, across, up)
            image = _draw_cells(axis, cells, norm, is_written, is_share, kept)
            _cell_ticks(axis, across, up)
            if _is_lowest(panels, axis):
                axis.set_xlabel(x)
            if _is_first(axis):
                axis.set_ylabel(y)
        bar = figure.colorbar(image, ax=[axis for *_, axis in panels], pad=0.02, aspect=30, fraction=0.06)
        bar.set_label(label(value))
        bar.outline.set_visible(False)
        _format(bar.ax.yaxis, value, np.array([norm.vmin, norm.vmax]), is_log)
        _map_legend(figure, kept)
        _finish(figure, frame, label(value).partition(",")[0], ())
    return figure


class _Cells:
    """Rows of a panel as grids: the metric, and which cells are unstable, refused, or no part of the study."""

    def __init__(self, rows: pd.DataFrame, x: str, y: str, metric: str, across: list[Any], up: list[Any]):
        column = {value_text(v): k for k, v in enumerate(across)} if not is_numeric(rows[x]) else None
        row = {value_text(v): k for k, v in enumerate(up)} if not is_numeric(rows[y]) else None
        shape = (len(up), len(across))
        self.value = np.full(shape, np.nan)
        self.is_unstable, self.is_refused, self.is_there = (np.zeros(shape, bool) for _ in range(3))
        i = _index(rows[y], up) if row is None else rows[y].map(value_text).map(row).to_numpy()
        j = _index(rows[x], across) if column is None else rows[x].map(value_text).map(column).to_numpy()
        self.value[i, j] = rows[metric].to_numpy(float)
        self.is_unstable[i, j] = is_true(rows["unstable"])
        self.is_refused[i, j] = rows["refused"].notna().to_numpy()
        self.is_there[i, j] = True


def _index(column: pd.Series, values: list[Any]) -> np.ndarray:
    numbers = np.array(values, float)
    known = numbers[~np.isnan(numbers)]
    found = np.searchsorted(known, column.to_numpy(float))
    return np.where(column.isna(), len(known), found)


def _draw_cells(axis: Any, cells: _Cells, norm: Any, is_written: bool, is_share: bool, kept: dict[str, bool]) -> Any:
    from matplotlib import colormaps
    from matplotlib.patches import Rectangle

    colours = colormaps["viridis"].with_extremes(bad=(1, 1, 1, 0))
    height, width = cells.value.shape
    axis.grid(visible=False)
    image = axis.pcolormesh(np.arange(width + 1) - 0.5, np.arange(height + 1) - 0.5, np.ma.masked_invalid(cells.value),
                            norm=norm, cmap=colours, edgecolors="white", linewidth=0.6 if is_written else 0)
    for i, j in np.argwhere(~np.isfinite(cells.value)):
        kind = "refused" if cells.is_refused[i, j] else "no value" if cells.is_there[i, j] else "not in the study"
        kept[kind] = True
        if kind != "not in the study":
            edge = {} if is_written else {"linewidth": 0}
            axis.add_patch(Rectangle((j - 0.5, i - 0.5), 1, 1, **_CELL[kind] | edge))
    luminance = colours(norm(np.where(np.isfinite(cells.value), cells.value, norm.vmin)))[..., :3] @ (0.3, 0.59, 0.11)
    ink = np.where(luminance > 0.5, INK, "white")
    if is_written:
        for i, j in np.argwhere(np.isfinite(cells.value)):
            axis.text(j, i, _compact(cells.value[i, j], is_share), ha="center", va="center", fontsize=8,
                      color=ink[i, j])
    rows, columns = np.nonzero(cells.is_unstable & np.isfinite(cells.value))
    if len(rows):
        kept["unstable"] = True
        beside = 0.37 if is_written else 0.0
        axis.scatter(columns + beside, rows + 0.8 * beside, s=13 if is_written else 5, facecolors="none",
                     edgecolors=ink[rows, columns], linewidths=0.9)
    axis.set_xlim(-0.5, width - 0.5)
    axis.set_ylim(-0.5, height - 0.5)
    return image


_CELL: dict[str, dict[str, Any]] = {
    "refused": {"facecolor": "#F4F4F4", "edgecolor": "#8C8C8C", "hatch": "////", "linewidth": 0.4},
    "no value": {"facecolor": "#DDDDDD", "edgecolor": "white", "linewidth": 0.4},
    "not in the study": {"facecolor": "white", "edgecolor": "#BBBBBB", "linewidth": 0.6}}


def _compact(value: float, is_share: bool) -> str:
    """At most five characters or so."""
    if is_share:
        return f"{100 * value:.0f} %"
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 10 * size or (letter != "k" and abs(value) >= size):
            return number(value / size, 2 if abs(value) < 100 * size else 3) + letter
    return number(value)


def _cell_ticks(axis: Any, across: list[Any], up: list[Any]) -> None:
    """Values at the middle of cells, at most a dozen a side."""
    for values, setter, is_x in ((across, axis.set_xticks, True), (up, axis.set_yticks, False)):
        step = -(-len(values) // 12)
        texts = [value_text(v) for v in values][::step]
        is_long = is_x and sum(map(len, texts)) > 42
        setter(range(0, len(values), step), texts,
               **({"rotation": 35, "ha": "right", "rotation_mode": "anchor"} if is_long else {}))
    axis.tick_params(length=0)
    for side in ("left", "bottom"):
        axis.spines[side].set_visible(False)


def _map_legend(figure: Any, kept: Mapping[str, bool]) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = [Patch(**_CELL[kind], label=kind) for kind in _CELL if kept.get(kind)]
    if kept.get("unstable"):
        handles.append(Line2D([], [], color=INK, marker="o", markerfacecolor="none", markersize=4.5,
                              markeredgewidth=0.9, linestyle="none", label="unstable"))
    if handles:
        figure.legend(handles=handles, loc="outside upper right", ncols=len(handles))


# ---- Pareto front


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
    return bool(re.search(r"_ms$|^duration$|^failed$|preemption|num_devices|_share$", name))


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
    names, styles = short(varying(frame)), _colours(frame, hue)
    differing, written = varying(best), writer(frame[hue]) if hue else value_text
    room = _table_inches(best, differing[:MOST_COLUMNS], names)
    with _figure(out, (7.2 + room, 5.8)) as figure:
        axis, beside = figure.subplots(1, 2, width_ratios=(7.0, room))
        for text, (colour, marker) in styles.items():
            is_mine = np.ones(len(points), bool) if hue is None else (points[hue].map(written) == text).to_numpy()
            for chosen, look in ((points[is_mine & ~mask], {"alpha": 0.28, "zorder": 2, "markersize": 5}),
                                 (points[is_mine & mask], {"zorder": 4, "markersize": 6.5, "markeredgecolor": "white",
                                                           "markeredgewidth": 0.7})):
                axis.plot(chosen[x], chosen[y], marker, color=colour, linestyle="none", **look)
        axis.step(best[x], best[y], where="post", color=INK, linewidth=1.1, zorder=3)
        drew: dict[str, Any] = {}
        _limit(axis, points, x, "x", drew)
        _limit(axis, points, y, "y", drew)
        for name, which, setter in ((x, axis.xaxis, axis.set_xscale), (y, axis.yaxis, axis.set_yscale)):
            values = points[name].to_numpy(float)
            is_log = _is_wide(values) and not _SHARE.search(name)
            if is_log:
                setter("log")
            _format(which, name, values, is_log)
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
        _finish(figure, frame, f"{len(best):,} of {len(points):,} scenarios are on the front",
                [*notes, *_unsimulated(frame)])
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
    header = ["", *(_wrapped(names[n]) for n in differing), *(_wrapped(labels[n], " ") for n in labels)]
    cells = []
    for count, k in enumerate(numbered, 1):
        row = best.iloc[k]
        equals = best[(best[list(labels)] == row[list(labels)]).all(axis=1)]
        cells.append([str(count), *(_clipped(" or ".join(map(value_text, values_of(equals[n])))) for n in differing),
                      *(_compact(row[n], bool(_SHARE.search(n))) for n in labels)])
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
    longest = [max(max(map(len, _wrapped(names[n]).split("\n"))),
                   *(len(_clipped(value_text(v))) for v in best[n].drop_duplicates())) for n in differing]
    return 0.075 * (sum(longest) + 1.5 * len(longest) + 34)


def _wrapped(text: str, at: str = "_") -> str:
    """Broken into lines of about ten characters."""
    found = [""]
    for part in re.findall(rf"[^{at}]+{at}?", text):
        if found[-1] and len(found[-1]) + len(part) > 11:
            found.append("")
        found[-1] += part
    return "\n".join(line.strip() for line in found)


def _clipped(text: str, most: int = 18) -> str:
    return text if len(text) <= most else text[:most - 1] + "…"
