"""Derivatives over a study: fields down, scenarios across, a panel a metric."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxsim._core.errors import InputError
from jaxsim.io.figure import INK, heading
from jaxsim.sensitivity.table import signed
from jaxsim.sensitivity.total import Sensitivity
from jaxsim.study.panels import saved
from jaxsim.study.view import label, short, value_text

MOST_FIELDS, MOST_LABELS, MOST_WRITTEN = 14, 40, 12
"""Rows of a panel; points whose parameters are written below; points whose values are written in cells."""


def heat_map(found: Sensitivity, *, metrics: Sequence[str] | None = None, out: Any = None) -> Any:
    """`total` as colour, red where the metric grows with the number and blue where it falls.

    Cells without a value are hatched; those whose interval includes 0 have a dot, and fields with no other cells are
    left out, unless the metric has no others at all. out: a path (.png, .svg) or a stream. Returns the figure. Raises
    `InputError`, also where nothing has a derivative.
    """
    from matplotlib import colormaps
    from matplotlib.colors import Normalize

    chosen = list(found.metrics if metrics is None else metrics)
    points = sorted({row.point for row in found.rows})
    if len(points) < 2:
        raise InputError("found", "1 scenario", "has nothing to lay beside it", "draw a tornado of it")
    names, panels = short(found.fields), []
    for metric in chosen:
        cells = _cells(found, metric, points)
        if cells is not None:
            panels.append((metric, *cells))
    if not panels:
        raise InputError("metrics", chosen, "have no derivative at any point", "name others")
    deep = sum(0.26 * len(fields) + 0.9 for _, fields, *_ in panels)
    texts = [", ".join(value_text(value) for value in found.points[point].values()) for point in points]
    is_labelled = len(points) <= MOST_LABELS
    with saved(out, (min(max(0.42 * len(points), 5) + 3.2, 15), deep + (1.4 if is_labelled else 0.9))) as figure:
        axes = figure.subplots(len(panels), 1, squeeze=False, sharex=True,
                               height_ratios=[len(fields) + 2 for _, fields, *_ in panels]).flatten()
        for axis, (metric, fields, values, is_sure) in zip(axes, panels, strict=True):
            reach = float(np.nanquantile(np.abs(values), 0.98)) or 1.0
            image = axis.pcolormesh(np.ma.masked_invalid(values), cmap=colormaps["RdBu_r"],
                                    norm=Normalize(-reach, reach))
            _marks(axis, values, is_sure, reach)
            axis.grid(visible=False)
            axis.invert_yaxis()
            axis.set_yticks(np.arange(len(fields)) + 0.5, [names[name] for name in fields])
            axis.set_title(label(metric))
            figure.colorbar(image, ax=axis, pad=0.01, fraction=0.04, aspect=12).outline.set_visible(False)
        below = axes[-1]
        below.set_xlabel("scenario: " + ", ".join(dict.fromkeys(k for p in points for k in found.points[p])))
        if is_labelled:
            below.set_xticks(np.arange(len(points)) + 0.5, texts, rotation=45, ha="right")
        heading(figure, "change of the metric, % for 1 % of each number; a dot where the interval includes 0")
    return figure


def _cells(found: Sensitivity, metric: str, points: Sequence[int]) -> tuple[list[str], np.ndarray, np.ndarray] | None:
    """The fields that matter most, `total` and whether its sign is known, `fields points`."""
    column = {point: at for at, point in enumerate(points)}
    row_of = {name: at for at, name in enumerate(found.fields)}
    values = np.full((len(row_of), len(column)), np.nan)
    is_sure = np.zeros(values.shape, bool)
    for row in found.rows:
        if row.metric == metric and row.total is not None:
            place = row_of[row.field], column[row.point]
            values[place], is_sure[place] = row.total, row.is_sure
    has_any = ~np.isnan(values).all(axis=1)
    # What is known to matter somewhere; where nothing is, what may; where nothing does, what was asked for.
    sizes = np.where(is_sure, np.abs(values), 0.0).max(axis=1), np.nan_to_num(np.abs(values)).max(axis=1), has_any
    size = next((one for one in sizes if one.any()), sizes[-1]).astype(float)
    order = [at for at in np.argsort(-size, kind="stable") if size[at] > 0][:MOST_FIELDS]
    return ([found.fields[at] for at in order], values[order], is_sure[order]) if order else None


def _marks(axis: Any, values: np.ndarray, is_sure: np.ndarray, reach: float) -> None:
    from matplotlib.patches import Rectangle

    is_written = values.shape[1] <= MOST_WRITTEN
    for i, j in np.ndindex(values.shape):
        if np.isnan(values[i, j]):
            axis.add_patch(Rectangle((j, i), 1, 1, fill=False, hatch="////", lw=0, ec="#BBBBBB"))
        elif is_written:
            colour = "white" if abs(values[i, j]) > 0.6 * reach else INK
            axis.text(j + 0.5, i + 0.5, signed(values[i, j]) + ("" if is_sure[i, j] else "·"), ha="center",
                      va="center", fontsize=8, color=colour)
        elif not is_sure[i, j]:
            axis.plot([j + 0.5], [i + 0.5], ".", ms=2.5, color="#777777")
