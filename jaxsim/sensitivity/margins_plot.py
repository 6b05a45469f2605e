"""Figure of margins."""

from pathlib import Path

import numpy as np

from jaxsim.io.figure import FAINT, LIMIT, LINE, drawn
from jaxsim.sensitivity.margins import RADII, Margins
from jaxsim.study.view import short

SINGLE, STEEP, RANDOM = "one field alone", "along the slope", "random"
COLOURS = {SINGLE: LINE, STEEP: "#009E73", RANDOM: "#BBBBBB"}
"""Of kinds of ways."""


def draw(found: Margins, path: Path) -> None:
    """Attainment along every way, and the length of each until the share is passed; hollow: not before the end."""
    with drawn(path, figsize=(10.5, 3.6)) as figure:
        axes = figure.subplots(1, 2, width_ratios=(1.2, 1))
        worst = found.worst["way"] if found.table["radius"].notna().any() else None

        def kind(way):
            return SINGLE if way in found.fields else RANDOM if way.startswith("random") else STEEP

        names = short(found.fields)
        for name, values in found.curves.items():
            is_worst = name == worst
            axes[0].plot(100 * np.append(0, found.radii), 100 * np.append(found.attainment, values),
                         lw=2.2 if is_worst else 1.1, color=LIMIT if is_worst else COLOURS[kind(name)],
                         zorder=3 if is_worst else 2, label=f"shortest: {names.get(name, name)}" if is_worst else None)
        for name in dict.fromkeys(map(kind, found.curves)):
            axes[0].plot([], [], lw=1.1, color=COLOURS[name], label=name)
        axes[0].axhline(100 * found.share, color=FAINT, lw=1, ls="--")
        if found.radii[0] < RADII[0]:
            # A short margin is seen near 0.
            axes[0].set_xlim(-0.5, 22)
        axes[0].set(xlabel="length of the change (logarithms) x 100", ylabel="requests within limits, %",
                    ylim=(80, 100.5))
        axes[0].legend(loc="lower left", fontsize=8)
        rows = found.table.sort_values("radius", na_position="last", kind="stable")
        is_passed = rows["radius"].notna().to_numpy()
        lengths = 100 * rows["radius"].fillna(found.radii[-1]).to_numpy()
        for place, (way, length, is_filled) in enumerate(zip(rows["way"], lengths, is_passed, strict=True)):
            colour = LIMIT if way == worst else COLOURS[kind(way)]
            axes[1].barh(place, length, height=0.6, lw=1, color=colour if is_filled else "none", ec=colour)
            if not is_filled:
                stopped = found.table.loc[found.table["way"] == way, "ends"].notna().any()
                axes[1].text(1, place, "ends before" if stopped else f"not within {length:.0f}", va="center",
                             fontsize=7, color=FAINT)
        axes[1].set_yticks(np.arange(len(rows)), [names.get(way, way) for way in rows["way"]], fontsize=8)
        axes[1].invert_yaxis()
        axes[1].set_xlabel(f"length until {found.share:.0%} is passed, x 100")
