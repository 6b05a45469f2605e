"""What plots of a study share: figures, panels, scales, colours, limits, notes."""

import contextlib
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from jaxsim._core.errors import InputError
from jaxsim.io.figure import FAINT, LIMIT, LINE, drawn, heading
from jaxsim.io.table import number
from jaxsim.study.view import (
    LATENCIES,
    MOST_PANELS,
    combinations,
    is_numeric,
    limits,
    short,
    study_of,
    value_text,
    values_of,
    varying,
    window_note,
    writer,
)

ENDINGS = (".png", ".svg")

# Told apart with any colour vision (Okabe and Ito, then Tol), none of them the colour of limits; and by their shape.
_HUES = (LINE, "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#222222", "#882255", "#999933", "#6699CC", "#AA4466")
_MARKERS = "os^DvPX<>*"
SHARE = re.compile(r"_share$|attainment$")
PERCENTILE = re.compile(r"(p\d+|median)_(ttft|tpot|e2el)_ms")
_LOG_BEYOND = 12.0
"""Ratio of the largest to the smallest value from which metrics are drawn on a logarithmic axis."""


@contextlib.contextmanager
def saved(out: Any, size: tuple[float, float]) -> Iterator[Any]:
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


def is_log_spaced(values: Sequence[Any]) -> bool:
    """Whether ratios of neighbours are more alike than their distances."""
    numbers = np.array(sorted(values), float)
    if len(numbers) < 3 or numbers[0] <= 0 or numbers[-1] < 4 * numbers[0]:
        return False
    steps, ratios = np.diff(numbers), np.diff(np.log(numbers))
    return bool(ratios.std() / ratios.mean() < steps.std() / steps.mean())


def is_wide(values: np.ndarray) -> bool:
    """Whether a metric wants a logarithmic axis."""
    values = values[np.isfinite(values)]
    return bool(len(values) and values.min() > 0 and values.max() > _LOG_BEYOND * values.min())


def format_metric(axis: Any, name: str, values: np.ndarray, is_log: bool) -> None:
    """Ticks of a metric's axis."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    if is_log:
        ratio = np.nanmax(values) / np.nanmin(values)
        subs = (1, 2, 5) if ratio < 40 else (1, 3) if ratio < 300 else (1,)
        axis.set_major_locator(LogLocator(subs=subs, numticks=8))
        axis.set_minor_formatter(NullFormatter())
    else:
        axis.set_major_locator(MaxNLocator(nbins=5, steps=(1, 2, 2.5, 5, 10)))
    scale, behind = (100, " %") if SHARE.search(name) else (1, "")
    axis.set_major_formatter(FuncFormatter(lambda v, _: f"{scale * v:,.10g}{behind}"))


def parameter_axis(axis: Any, column: pd.Series, at: Mapping[Any, float] | None) -> None:
    """Scale and ticks of x: the values themselves where they are few."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

    if at is not None:
        texts = [value_text(v) for v in at]
        is_long = sum(map(len, texts)) > 36
        axis.set_xticks(list(at.values()), texts, rotation=30 if is_long else 0, ha="right" if is_long else "center")
        axis.set_xlim(-0.5, len(at) - 0.5)
        return
    values = np.array([v for v in values_of(column) if v == v], float)
    is_log = is_log_spaced(values)
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


def styles_of(frame: pd.DataFrame, hue: str | None) -> dict[str, tuple[Any, str]]:
    """Colour and marker of each value of hue, by its text: shades for numbers, hues for names."""
    from matplotlib import colormaps

    if hue is None:
        return {"": (LINE, "o")}
    texts = [writer(frame[hue])(v) for v in values_of(frame[hue])]
    is_scale = is_numeric(frame[hue]) and len(texts) > 2
    # Without the yellow end, which white paper swallows.
    shades = colormaps["viridis"](np.linspace(0, 0.82, len(texts))) if is_scale else _HUES
    return {text: (shades[k], _MARKERS[k % len(_MARKERS)]) for k, text in enumerate(texts)}


def small_multiples(figure: Any, frame: pd.DataFrame, fields: list[str], rows: int = 1, most: int = 3
            ) -> list[tuple[int, tuple, Any]]:
    """Axes in small multiples: (row of metrics, values of the fields, axis), titled by those values."""
    found, names = combinations(frame, fields), short(varying(frame))
    num_columns, num_rows = grid_of(frame, fields, rows, most)
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


def grid_of(frame: pd.DataFrame, fields: list[str], rows: int, most: int) -> tuple[int, int]:
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


def is_lowest(panels: list[tuple[int, tuple, Any]], axis: Any) -> bool:
    """Whether no panel is below, so that it carries the label of x."""
    spec = axis.get_subplotspec()
    return not any(other.get_subplotspec().colspan.start == spec.colspan.start
                   and other.get_subplotspec().rowspan.start > spec.rowspan.start for *_, other in panels)


def is_first(axis: Any) -> bool:
    """Whether no panel is to the left, so that it carries the label of y."""
    return axis.get_subplotspec().colspan.start == 0


def finish(figure: Any, frame: pd.DataFrame, what: str, notes: Sequence[str]) -> None:
    """The line above and the notes below; what is measured is one of them."""
    name = study_of(frame).get("name", "")
    heading(figure, f"{name}: {what}" if name else what)
    notes = [*notes, *window_note(frame)]
    if notes:
        figure.supxlabel("\n".join(notes), x=0.008, ha="left", fontsize=8.5, color=FAINT)


def unsimulated(frame: pd.DataFrame) -> list[str]:
    """A note where scenarios were refused."""
    count = int(frame["refused"].notna().sum())
    return [f"{count:,} refused scenario{'s' * (count > 1)} not shown (column `refused` says why)"] if count else []


def mark_limit(axis: Any, rows: pd.DataFrame, metric: str, along: str, drew: dict[str, Any]) -> None:
    """The limit of a latency, where one holds for the whole panel."""
    found = PERCENTILE.fullmatch(metric)
    limit = limits(rows).get(found[2]) if found else None
    if limit is not None:
        draw = axis.axhline if along == "y" else axis.axvline
        draw(limit, color=LIMIT, linestyle=(0, (4, 3)), linewidth=1.3, zorder=2)
        drew.setdefault("limits", set()).add((LATENCIES[found[2]], limit))


def compact(value: float, is_share: bool) -> str:
    """At most five characters or so."""
    if is_share:
        return f"{100 * value:.0f} %"
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 10 * size or (letter != "k" and abs(value) >= size):
            return number(value / size, 2 if abs(value) < 100 * size else 3) + letter
    return number(value)
