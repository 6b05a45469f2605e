"""Figures of designs."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from jaxsim.io.figure import FAINT, INK, LIMIT, LINE, drawn, heading


def worth(found: pd.DataFrame, confirmed: pd.DataFrame | None, path: Path) -> None:
    """What one percent more of each resource brings, in closed form, and a tenth more by simulation."""
    budgets = [name for name in found if name.startswith("percent_a_percent_of_")]
    with drawn(path, figsize=(8.5, 3.0)) as figure:
        axes = figure.subplots(1, 2)
        places = np.arange(len(found))
        axes[0].barh(places, found["elasticity"], height=0.5, color=LINE, label="closed form")
        if confirmed is not None:
            more = confirmed.iloc[1:]
            scale = 1 / np.log(1.1)
            gains = np.log1p(more["gain"].to_numpy(float)) * scale
            ends = [np.abs(gains - np.log1p(more[side].to_numpy(float)) * scale) for side in ("low", "high")]
            axes[0].errorbar(gains, places, xerr=ends, fmt="o", color=LIMIT, capsize=3, label="simulated, +10 %")
            axes[0].legend()
        axes[0].set_yticks(places, found["resource"])
        axes[0].set_xlabel("% more requests/s for 1 % more")
        width = 0.8 / max(len(budgets), 1)
        for index, (name, colour) in enumerate(zip(budgets, (LINE, LIMIT, FAINT, INK), strict=False)):
            axes[1].barh(places + (index - (len(budgets) - 1) / 2) * width, found[name], height=width, color=colour,
                         label=name.removeprefix("percent_a_percent_of_"))
        axes[1].set_yticks(places, found["resource"])
        axes[1].set_xlabel("% more requests/s for 1 % of a budget")
        for axis in axes:
            # In the order of the table.
            axis.invert_yaxis()
        axes[1].legend()
        heading(figure, "Which resource next")


def design(space: Any, found: Any, amounts: np.ndarray, confirmed: pd.DataFrame | None, path: Path) -> None:
    """The way of every start, where the budget goes, and designs beside the best by simulation."""
    with drawn(path, figsize=(11, 3.2)) as figure:
        axes = figure.subplots(1, 3, width_ratios=(1, 0.9, 1.2))
        rates = np.exp(found.history)
        for index in range(rates.shape[1]):
            is_own = found.has_own and index == 0
            axes[0].plot(rates[:, index], color=LIMIT if is_own else LINE, lw=1.3,
                         label="from what there is" if is_own else
                         "from random splits" if index == int(found.has_own) else None)
        axes[0].set(xlabel="step", ylabel="requests/s within limits", title="search")
        axes[0].legend(loc="lower right")
        left = np.zeros(len(space.design.budgets))
        names, limits = list(space.design.budgets), np.array(list(space.design.budgets.values()))
        shades = ("#0072B2", "#56B4E9", "#009E73", "#E69F00", "#CC79A7", "#999999")
        fixed = np.array([space.design.fixed.get(name, 0.0) for name in names]) / limits
        axes[1].bar(names, fixed, color="#DDDDDD", label="fixed")
        left += fixed
        for index, name in enumerate(space.names):
            part = space.costs[:, index] * amounts[index] / limits
            axes[1].bar(names, part, bottom=left, color=shades[index % len(shades)],
                        label=f"{name}: {amounts[index]:.3g} {space.design.resources[index].label}")
            left += part
        axes[1].set(title="where it goes", ylim=(0, 1.9), yticks=(0, 0.5, 1))
        axes[1].legend(loc="upper center", fontsize=8)
        if confirmed is not None:
            beside = confirmed.iloc[1:]
            places = np.arange(len(beside))
            gain = 100 * beside["gain"].to_numpy(float)
            ends = [np.abs(gain - 100 * beside[side].to_numpy(float)) for side in ("low", "high")]
            axes[2].errorbar(gain, places, xerr=ends, fmt="o", color=LINE, capsize=3, label="simulated, 95 %")
            closed = 100 * (beside["closed_form_rps"] / confirmed["closed_form_rps"].iloc[0] - 1)
            axes[2].plot(closed, places, "|", color=LIMIT, ms=12, mew=2, label="closed form")
            axes[2].axvline(0, color=FAINT, lw=1)
            axes[2].set_yticks(places, beside["design"])
            axes[2].set(xlabel="% requests/s beside the best", title="neighbours on the same budgets")
            axes[2].legend()

