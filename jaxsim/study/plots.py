"""Plots of a study's table: families of lines, heat maps, and Pareto fronts.

    frame = view.read("results/limits")            # the table, knowing its study
    plot(frame, out="limits.png")                  # the kind that suits it, axes chosen from the study
    lines(frame, "workload.rate_rps", ["p99_ttft_ms", "p99_tpot_ms"], "device.name", out="lines.png")
    heatmap(frame, "workload.rate_rps", "engine.max_num_seqs", "slo.attainment", out="map.svg")
    pareto(frame, "p99_tpot_ms", "output_throughput_per_device", out="front.png")

Each returns its matplotlib figure. A table of `jaxsim.load` serves too; its plots lack what only the study knows: its
name, and limits and numbers of devices that are no axes. `view` chooses what is shown, `panels` is what all draw with.
"""

from collections.abc import Sequence
from typing import Any, Literal

import pandas as pd

from jaxsim._core.errors import InputError, suggest
from jaxsim.study.heat_map import heatmap
from jaxsim.study.line_plot import lines
from jaxsim.study.pareto_plot import front, lower_is_better, pareto
from jaxsim.study.view import choose, parameters

__all__ = ["front", "heatmap", "lines", "lower_is_better", "pareto", "plot"]

KINDS = ("auto", "lines", "heatmap", "pareto")


def plot(frame: pd.DataFrame, kind: Literal["auto", "lines", "heatmap", "pareto"] = "auto", x: str | None = None,
         y: str | Sequence[str] | None = None, hue: str | None = None, *, out: Any = None) -> Any:
    """Draw a table as `jaxsim.load` or `view.read` gives it; what is not given is chosen from its axes.

    kind: lines (metrics `y` over the parameter `x`, a line a value of `hue`), heatmap (`x`: the parameter along x, `y`:
    the one along y and the metric), pareto (the metrics `x` and `y`). out: a .png or .svg file, or a stream for PNG
    bytes. Returns the figure. Raises `InputError`.
    """
    if kind not in KINDS:
        raise InputError("kind", kind, "is no kind of plot", suggest(str(kind), KINDS, "use " + ", ".join(KINDS)))
    names = [] if y is None else [y] if isinstance(y, str) else list(y)
    kind = choose(frame) if kind == "auto" else kind
    if kind == "lines":
        return lines(frame, x, names or None, hue, out=out)
    if kind == "pareto":
        if len(names) > 1:
            raise InputError("y", names, "is more than one metric", "a Pareto front has two: x and y")
        return pareto(frame, x, *(names or [None]), hue, out=out)
    if hue:
        raise InputError("hue", hue, "is not for a heat map", "give x, and a field and a metric as y")
    fields = [name for name in names if name in parameters(frame)]
    values = [name for name in names if name not in fields]
    if len(fields) > 1 or len(values) > 1:
        raise InputError("y", names, "is more than one field and one metric",
                         "a heat map shows one metric over two fields: --x FIELD --y FIELD METRIC")
    return heatmap(frame, x, *(fields or [None]), *(values or [None]), out=out)
