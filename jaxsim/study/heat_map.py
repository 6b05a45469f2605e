"""Heat maps: a metric over two parameters."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from jaxsim.io.figure import INK
from jaxsim.study.panels import (
    SHARE,
    compact,
    finish,
    format_metric,
    grid_of,
    is_first,
    is_lowest,
    is_wide,
    saved,
    small_multiples,
)
from jaxsim.study.view import (
    checked_metric,
    default_metric,
    is_numeric,
    is_true,
    label,
    map_axes,
    metrics,
    prepared,
    rows_where,
    value_text,
    values_of,
)

MOST_WRITTEN = 12
"""Cells a side whose values are written."""


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
    columns, rows = grid_of(frame, fields, 1, max(1, int(15 / wide)) if wide > 4 else 3)
    found = frame[value].dropna().to_numpy(float)
    is_share = bool(SHARE.search(value))
    is_log = is_wide(found) and not is_share
    norm = LogNorm(found.min(), found.max()) if is_log else Normalize(
        *((0.0, 1.0) if is_share and found.max() > 0.5 else (found.min(), found.max())))
    kept: dict[str, bool] = {}
    with saved(out, (max(wide * columns + 2.6, 6.5), (high + 0.75) * rows + 1.3)) as figure:
        panels = small_multiples(figure, frame, fields, most=max(1, int(15 / wide)) if wide > 4 else 3)
        image = None
        for _, values, axis in panels:
            cells = _Cells(rows_where(frame, fields, values), x, y, value, across, up)
            image = _draw_cells(axis, cells, norm, is_written, is_share, kept)
            _cell_ticks(axis, across, up)
            if is_lowest(panels, axis):
                axis.set_xlabel(x)
            if is_first(axis):
                axis.set_ylabel(y)
        bar = figure.colorbar(image, ax=[axis for *_, axis in panels], pad=0.02, aspect=30, fraction=0.06)
        bar.set_label(label(value))
        bar.outline.set_visible(False)
        format_metric(bar.ax.yaxis, value, np.array([norm.vmin, norm.vmax]), is_log)
        _map_legend(figure, kept)
        finish(figure, frame, label(value).partition(",")[0], ())
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
            axis.text(j, i, compact(cells.value[i, j], is_share), ha="center", va="center", fontsize=8,
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
