"""Figures of a critical path, and of what metrics are made of."""

from pathlib import Path

import pandas as pd

from jaxsim.io.figure import FAINT, drawn, heading
from jaxsim.sensitivity.attribution import FRONT_END, Attribution
from jaxsim.sensitivity.costs import FITTED_RESOURCES, RESOURCES
from jaxsim.sensitivity.critical_path import PAUSE

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")
COLOURS = {**dict(zip(RESOURCES, _COLOURS, strict=True)),
           **dict(zip(FITTED_RESOURCES.values(), _COLOURS, strict=True)), FRONT_END: "#999999", PAUSE: "#DDDDDD"}

LEAST_SHARE = 1e-3
"""A part or a resource with less is not drawn."""


def plot_path(table: pd.DataFrame, path: str | Path, title: str) -> Path:
    """A waterfall: every part of a request's time where the one before it ends, cut by resource."""
    path, total = Path(path), float(table.to_numpy().sum())
    shown = table.loc[table.abs().sum(axis=1) > LEAST_SHARE * total]
    resources = [name for name in table if table[name].abs().sum() > LEAST_SHARE * total]
    with drawn(path, figsize=(10, 0.9 + 0.42 * max(len(shown), 3))) as figure:
        axis, start, named = figure.subplots(), 0.0, set()
        for row, (_, values) in enumerate(shown.iterrows()):
            for name in resources:
                width = 1e3 * float(values[name])
                axis.barh(row, width, left=start, height=0.7, color=COLOURS[name], linewidth=0,
                          label=None if name in named else name)
                named.add(name)
                start += width
            axis.annotate(f" {100 * float(values.sum()) / total:.1f} %", (start, row), va="center", color=FAINT)
        axis.set_yticks(range(len(shown)), list(shown.index))
        axis.invert_yaxis()
        axis.grid(axis="y", visible=False)
        axis.set_xlim(0, 1.08 * 1e3 * total)
        axis.set_xlabel("milliseconds since arrival")
        heading(figure, title)
        axis.legend(ncols=len(resources), loc="lower right", bbox_to_anchor=(1.0, 1.0), borderaxespad=0.3)
    return path


def plot_attribution(found: Attribution, path: str | Path, title: str) -> Path:
    """A stacked bar a metric: what it is made of, by resource."""
    path, table = Path(path), found.by_resource
    names = [name for name in table if table[name].abs().max() > LEAST_SHARE]
    with drawn(path, figsize=(10, 0.9 + 0.42 * max(len(table), 3))) as figure:
        axis = figure.subplots()
        start = 0.0 * table.iloc[:, 0]
        for name in names:
            axis.barh(range(len(table)), 100 * table[name], left=100 * start, height=0.7, color=COLOURS[name],
                      linewidth=0, label=name)
            start = start + table[name]
        axis.set_yticks(range(len(table)), list(table.index))
        axis.invert_yaxis()
        axis.grid(axis="y", visible=False)
        axis.set_xlabel("percent, for 100 % longer seconds (or slower rates) of a resource, at this schedule")
        heading(figure, title)
        axis.legend(ncols=len(names), loc="lower right", bbox_to_anchor=(1.0, 1.0), borderaxespad=0.3)
    return path
