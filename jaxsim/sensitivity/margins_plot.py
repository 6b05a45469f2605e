"""Figure of margins."""

from pathlib import Path

import numpy as np

from jaxsim.io.figure import FAINT, LIMIT, LINE, drawn
from jaxsim.sensitivity.margins import RADII, Margins


def draw(found: Margins, path: Path) -> None:
    """Attainment along every way, and the length of each until the share is passed."""
    with drawn(path, figsize=(9.5, 3.4)) as figure:
        axes = figure.subplots(1, 2, width_ratios=(1.2, 1))
        worst = found.worst["way"] if found.table["radius"].notna().any() else None

        def colour(way):
            if way == worst:
                return LIMIT
            return LINE if way in found.fields else "#CCCCCC" if way.startswith("random") else "#009E73"

        for name, values in found.curves.items():
            is_worst = name == worst
            axes[0].plot(100 * np.append(0, RADII), 100 * np.append(found.attainment, values),
                         lw=2.2 if is_worst else 1.1, color=colour(name), zorder=3 if is_worst else 2)
        axes[0].axhline(100 * found.share, color=FAINT, lw=1, ls="--")
        axes[0].set(xlabel="length of the change (logarithms) x 100", ylabel="requests within limits, %",
                    ylim=(80, 100.5))
        rows = found.table.sort_values("radius", na_position="last")
        colours = [colour(way) for way in rows["way"]]
        lengths = 100 * rows["radius"].fillna(RADII[-1])
        axes[1].barh(np.arange(len(rows)), lengths, color=colours, height=0.6)
        axes[1].set_yticks(np.arange(len(rows)), rows["way"], fontsize=8)
        axes[1].invert_yaxis()
        axes[1].set_xlabel(f"length until {found.share:.0%} is passed, x 100")
