"""A tornado: what moves a metric, the largest first, a panel a metric."""

from collections.abc import Sequence
from typing import Any

from jaxsim._core.errors import InputError
from jaxsim.io.figure import FAINT, INK, LIMIT, LINE, heading
from jaxsim.io.table import number
from jaxsim.sensitivity.table import worth_showing
from jaxsim.sensitivity.total import Row, Sensitivity
from jaxsim.study.panels import saved
from jaxsim.study.view import label, short

MOST_BARS = 10


def tornado(found: Sensitivity, *, point: int | None = None, metrics: Sequence[str] | None = None, out: Any = None
            ) -> Any:
    """Bars of `total` with their intervals, and `direct` as a diamond joined to the bar's end: queueing is in between.

    point: of a study, the first unless given. metrics: all unless given. out: a path (.png, .svg) or a stream. Returns
    the figure. Raises `InputError`.
    """
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    at = found.rows[0].point if point is None else point
    here = [row for row in found.rows if row.point == at]
    if not here:
        raise InputError("point", point, "has no rows", "name a point of the study that was simulated")
    chosen = list(found.metrics if metrics is None else metrics)
    names = short(found.fields)
    panels = [(metric, [row for row in worth_showing([r for r in here if r.metric == metric])
                        if row.total is not None][:MOST_BARS]) for metric in chosen]
    columns = min(len(panels), 2)
    deep = -(-len(panels) // columns)
    bars = max((len(rows) for _, rows in panels), default=1)
    with saved(out, (5.4 * columns + 0.4, deep * (0.27 * max(bars, 3) + 1.0) + 0.7)) as figure:
        axes = figure.subplots(deep, columns, squeeze=False).flatten()
        for axis, (metric, rows) in zip(axes, panels, strict=False):
            _panel(axis, metric, rows, names)
        for axis in axes[len(panels):]:
            axis.set_axis_off()
        marks = [Patch(color=LINE, label="total"), Line2D([], [], color=INK, lw=1.2, label="95 % interval over seeds"),
                 Patch(color="#BBBBBB", label="interval includes both signs")]
        if any(row.direct is not None for row in here):
            marks.insert(1, Line2D([], [], color=LIMIT, marker="D", ms=5, lw=1.2,
                                   label="direct, and the gap: queueing feedback"))
        figure.legend(handles=marks, loc="outside lower center", ncols=len(marks))
        heading(figure, "change of the metric, % for 1 % of each number")
    return figure


def _panel(axis: Any, metric: str, rows: Sequence[Row], names: dict[str, str]) -> None:
    from matplotlib.ticker import MaxNLocator

    places = list(range(len(rows)))[::-1]
    for y, row in zip(places, rows, strict=True):
        axis.barh(y, row.total, height=0.66, color=LINE if row.is_sure else "#BBBBBB")
        axis.plot([row.total_low, row.total_high], [y, y], color=INK, lw=1.2, solid_capstyle="butt")
        if row.direct is not None:
            axis.plot([row.direct, row.total], [y + 0.22, y + 0.22], color=LIMIT, lw=1.2)
            axis.plot([row.direct], [y + 0.22], marker="D", ms=4.5, color=LIMIT)
    axis.axvline(0, color=FAINT, lw=0.8)
    axis.grid(visible=False, axis="y")
    axis.set_yticks(places, [names[row.field] for row in rows])
    # Noise is not to hide what is known.
    ends = [abs(end) for row in rows for end in (row.total, row.direct or 0.0)]
    sure = [abs(end) for row in rows if "noisy" not in row.flags for end in (row.total_low, row.total_high)]
    reach = 1.08 * max([*ends, *sure], default=1.0) or 1.0
    low = -reach if any(min(row.total, row.total_low, row.direct or 0.0) < 0 for row in rows) else -0.05 * reach
    high = reach if any(max(row.total, row.total_high, row.direct or 0.0) > 0 for row in rows) else 0.05 * reach
    axis.set_xlim(low, high)
    axis.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=(1, 2, 2.5, 5, 10)))
    base = next((row.metric_value for row in rows if row.metric_value is not None), None)
    axis.set_title(f"{label(metric)}: {number(base)}")
