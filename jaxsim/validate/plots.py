"""Measured against simulated: distributions and single requests of a replay, operating points on the diagonal."""

from pathlib import Path

import numpy as np

from jaxsim.io.figure import FAINT, INK, LIMIT, LINE, drawn, heading
from jaxsim.validate.points import Points
from jaxsim.validate.replay import LATENCIES, Comparison

TITLES = {"ttft_ms": "Time to first token", "tpot_ms": "Time per output token", "e2el_ms": "End to end"}
MOST_POINTS = 4000


def plot_comparison(comparison: Comparison, path: str | Path) -> Path:
    """Cumulative distributions above, request against request below."""
    path, frame = Path(path), comparison.requests
    scenario = comparison.result.scenarios[0]
    with drawn(path, figsize=(11, 7.2)) as figure:
        axes = figure.subplots(2, 3)
        for (name, column), above, below in zip(LATENCIES.items(), *axes, strict=True):
            pair = frame[[f"measured_{column}", column]].dropna().to_numpy() * 1e3
            above.set_title(TITLES[name])
            if not len(pair):
                continue
            high = 1.02 * np.percentile(pair, 99.5)
            for values, colour, label in ((pair[:, 0], INK, "measured"), (pair[:, 1], LINE, "simulated")):
                above.step(np.sort(values), np.arange(1, len(values) + 1) / len(values), where="post", color=colour,
                           label=label, linewidth=1.6)
            above.set_xlim(max(0.95 * np.percentile(pair, 0.2), 0), high)
            above.set_ylim(0, 1.02)
            above.yaxis.set_major_formatter(lambda y, _: f"{100 * y:.0f} %")
            above.set_xlabel("milliseconds")
            some = pair[np.unique(np.linspace(0, len(pair) - 1, MOST_POINTS).astype(int))]
            below.plot(some[:, 0], some[:, 1], ".", color=LINE, markersize=2.5, alpha=0.35, rasterized=True)
            ends = [max(0.95 * np.percentile(pair, 0.2), 0), high]
            below.plot(ends, ends, color=FAINT, linewidth=1, linestyle=(0, (4, 3)))
            below.set_xlim(*ends)
            below.set_ylim(*ends)
            below.set_xlabel("measured, milliseconds")
        axes[0, 0].set_ylabel("share of requests")
        axes[0, 0].legend(loc="lower right")
        axes[1, 0].set_ylabel("simulated, milliseconds")
        heading(figure, f"{scenario.name or 'scenario'}, {len(frame):,} requests; up to the 99.5th percentile")
    return path


def plot_points(points: Points, path: str | Path) -> Path:
    """Every point against the diagonal; the band is 10 %."""
    path, frame = Path(path), points.frame[points.frame["refused"].isna()]
    with drawn(path, figsize=(10, 4.8)) as figure:
        for axis, name in zip(figure.subplots(1, 2), ("ttft_ms", "tpot_ms"), strict=True):
            for index, (label, rows) in enumerate(frame.groupby(["model", "device"])):
                axis.plot(rows[name], rows[f"simulated_{name}"], ".", markersize=4, alpha=0.7, color=f"C{index % 10}",
                          label=f"{str(label[0]).rpartition('/')[2]}, {label[1]}")
            both = frame[[name, f"simulated_{name}"]].to_numpy()
            ends = np.array([both.min() / 1.3, both.max() * 1.3])
            axis.plot(ends, ends, color=FAINT, linewidth=1)
            axis.fill_between(ends, ends / 1.1, ends * 1.1, color=LIMIT, alpha=0.12, linewidth=0)
            axis.set_xscale("log")
            axis.set_yscale("log")
            axis.set_xlim(*ends)
            axis.set_ylim(*ends)
            axis.set_title(TITLES[name])
            axis.set_xlabel("measured, milliseconds")
            axis.set_ylabel("simulated, milliseconds")
        figure.axes[0].legend(fontsize=7, markerscale=1.6)
        heading(figure, f"{len(frame)} operating points; band: 10 %")
    return path
