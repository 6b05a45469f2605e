"""Measured against simulated: distributions and single requests of a replay, operating points on the diagonal."""

import math
from pathlib import Path
from typing import Any

import numpy as np

from jaxsim.io.figure import FAINT, INK, LIMIT, LINE, drawn, heading
from jaxsim.validate.points import Points
from jaxsim.validate.replay import LATENCIES, Comparison

TITLES = {"ttft_ms": "Time to first token", "tpot_ms": "Time per output token", "e2el_ms": "End to end"}
MOST_POINTS = 4000
MOST_TICKS = 9


def plot_comparison(comparison: Comparison, path: str | Path) -> Path:
    """Cumulative distributions above, request against request below."""
    path, frame = Path(path), comparison.requests
    scenario = comparison.result.scenarios[0]
    with drawn(path, figsize=(11, 7.2)) as figure:
        axes = figure.subplots(2, 3)
        for (name, column), above, below in zip(LATENCIES.items(), *axes, strict=True):
            pair = frame[[f"measured_{column}", column]].dropna().to_numpy() * 1e3
            above.set_title(TITLES[name])
            above.set_xlabel("milliseconds")
            below.set_xlabel("measured, milliseconds")
            if not len(pair):
                say_nothing(above, below)
                continue
            low, high = 0.95 * np.percentile(pair, 0.2), 1.02 * np.percentile(pair, 99.5) or 1.0
            for values, colour, label in ((pair[:, 0], INK, "measured"), (pair[:, 1], LINE, "simulated")):
                above.ecdf(values, color=colour, label=label, linewidth=1.6)
            above.set_xlim(low, high)
            above.set_ylim(0, 1.02)
            above.yaxis.set_major_formatter(lambda y, _: f"{100 * y:.0f} %")
            some = pair[np.unique(np.linspace(0, len(pair) - 1, MOST_POINTS).astype(int))]
            below.plot(some[:, 0], some[:, 1], ".", color=LINE, markersize=2.5, alpha=0.35, rasterized=True)
            below.plot([low, high], [low, high], color=FAINT, linewidth=1, linestyle=(0, (4, 3)))
            below.set_xlim(low, high)
            below.set_ylim(low, high)
            count_outside(below, int(((pair < low) | (pair > high)).any(axis=1).sum()))
        axes[0, 0].set_ylabel("share of requests")
        axes[1, 0].set_ylabel("simulated, milliseconds")
        labelled = [axis for axis in axes[0] if axis.get_legend_handles_labels()[0]]
        if labelled:
            labelled[0].legend(loc="lower right")
        name = plain_text(scenario.name or "scenario")
        heading(figure, f"{name}, {len(frame):,} requests; up to the 99.5th percentile")
    return path


def plot_points(points: Points, path: str | Path) -> Path:
    """Every point against the diagonal; the band is 10 %."""
    path, frame = Path(path), points.frame[points.frame["refused"].isna()]
    with drawn(path, figsize=(10, 4.8)) as figure:
        for axis, name in zip(figure.subplots(1, 2), ("ttft_ms", "tpot_ms"), strict=True):
            axis.set_title(TITLES[name])
            axis.set_xlabel("measured, milliseconds")
            axis.set_ylabel("simulated, milliseconds")
            both = frame[[name, f"simulated_{name}"]].dropna().to_numpy()
            if not len(both):
                say_nothing(axis)
                continue
            for index, (label, rows) in enumerate(frame.groupby(["model", "device"])):
                axis.plot(rows[name], rows[f"simulated_{name}"], ".", markersize=4, alpha=0.7, color=f"C{index % 10}",
                          label=plain_text(f"{str(label[0]).rpartition('/')[2]}, {label[1]}"))
            ends = np.array([both.min() / 1.3, both.max() * 1.3])
            axis.plot(ends, ends, color=FAINT, linewidth=1)
            axis.fill_between(ends, ends / 1.1, ends * 1.1, color=LIMIT, alpha=0.12, linewidth=0)
            axis.set(xscale="log", yscale="log", xlim=ends, ylim=ends)
            for one in (axis.xaxis, axis.yaxis):
                plain_logarithms(one, *ends)
        labelled = [axis for axis in figure.axes if axis.get_legend_handles_labels()[0]]
        if labelled:
            labelled[0].legend(fontsize=7, markerscale=1.6)
        heading(figure, f"{len(frame)} operating points; band: 10 %")
    return path


def plain_text(text: str) -> str:
    """A name as it is: dollars would begin a formula."""
    return text.replace("$", r"\$")


def say_nothing(*panels: Any) -> None:
    """Panels without data say so."""
    for panel in panels:
        panel.set(xticks=[], yticks=[])
        panel.text(0.5, 0.5, "nothing to compare", transform=panel.transAxes, ha="center", va="center", color=FAINT)


def count_outside(panel: Any, count: int) -> None:
    """Says how many points lie beyond the edges."""
    if count:
        panel.text(0.98, 0.02, f"{count:,} outside", transform=panel.transAxes, ha="right", va="bottom", fontsize=8,
                   color=FAINT)


def plain_logarithms(axis: Any, low: float, high: float) -> None:
    """Ticks of a logarithmic axis as numbers: 1, 2, 5, 10, or as many as there is room for."""
    decades = 10.0 ** np.arange(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8), (1, 2, 5), (1,)):
        ticks = (decades[:, None] * steps).ravel()
        ticks = ticks[(ticks >= low) & (ticks <= high)]
        if len(ticks) <= MOST_TICKS:
            break
    ticks = ticks[::-(-len(ticks) // MOST_TICKS)] if len(ticks) else np.array([low, high])
    axis.set_ticks(ticks, [f"{tick:,.3g}" if tick < 1000 else f"{tick:,.0f}" for tick in ticks])
    axis.set_minor_formatter(lambda value, position: "")
