"""A claim: what was published, what the simulator says, and the verdict that follows from the two."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from jaxsim.io.result import plain

REPRODUCED, NOT_REPRODUCED, NO_GATE = "reproduced", "not reproduced", "no gate"

RISES, FALLS = "rises", "falls"
"""Claims about an order: `paper` is one of these, `ours` the values in that order."""


@dataclasses.dataclass(frozen=True)
class Factor:
    """A tolerance of numbers above 0: at most so many `times` larger than published, and as many times smaller.

    A relative distance of 100 % is no "factor of 2": nothing is too small for it.
    """

    times: float

    def __post_init__(self):
        if not 1.0 < self.times < np.inf:
            raise ValueError(f"a factor of {self.times} is not above 1")

    def __str__(self) -> str:
        return f"x{self.times:g}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Claim:
    """One published claim.

        system: whose.
        claim: what is claimed, with its unit.
        source: where it was published.
        paper: a number, several, or an order (`RISES`, `FALLS`); None where nothing usable was published.
        ours: the number, or numbers, that the simulator gives; None where it cannot say.
        tolerance: of numbers, the largest relative distance, or a `Factor`; of an order, what every step must exceed,
            in units of `ours`, one number or one a step; None where nothing usable as a gate was published.
        reason: why there is no gate or no number of ours; otherwise a remark.
    """

    system: str
    claim: str
    source: str
    paper: float | tuple[float, ...] | str | None
    ours: float | tuple[float, ...] | None
    tolerance: float | tuple[float, ...] | Factor | None
    reason: str = ""

    def __post_init__(self):
        if isinstance(self.paper, str) and self.paper not in (RISES, FALLS):
            raise ValueError(f"{self.claim}: paper = {self.paper!r} is neither a number nor an order")
        if (self.ours is None or not self.is_gate) and not self.reason:
            raise ValueError(f"{self.claim}: a claim without a gate, or without a number of ours, says why")
        if self.ours is not None and self.is_gate:
            self._check_shapes()

    def _check_shapes(self) -> None:
        ours, margins = np.size(self.ours), np.shape(self.tolerance)
        if isinstance(self.tolerance, Factor):
            if self.is_order or np.shape(self.paper) != np.shape(self.ours) or np.any(np.asarray(self.paper) <= 0):
                raise ValueError(f"{self.claim}: {self.tolerance} is of numbers above 0, as many as published")
            return
        if np.any(np.asarray(self.tolerance) < 0):
            raise ValueError(f"{self.claim}: tolerance = {self.tolerance} is negative")
        if self.is_order:
            if ours < 2 or margins not in ((), (ours - 1,)):
                raise ValueError(f"{self.claim}: {ours} values and a tolerance of shape {margins} are no order")
        elif np.shape(self.paper) != np.shape(self.ours) or margins != ():
            raise ValueError(f"{self.claim}: paper, ours and one tolerance do not belong together")

    @property
    def is_order(self) -> bool:
        """Whether it is about an order of several values."""
        return isinstance(self.paper, str)

    @property
    def is_gate(self) -> bool:
        """Whether what was published can be missed."""
        return self.paper is not None and self.tolerance is not None

    @property
    def verdict(self) -> str:
        """`reproduced`, `not reproduced` or `no gate`, from `paper`, `ours` and `tolerance`."""
        if not self.is_gate:
            return NO_GATE
        if self.ours is None:
            return NOT_REPRODUCED
        return REPRODUCED if np.all(self._is_met()) else NOT_REPRODUCED

    def _steps(self) -> np.ndarray:
        """Of an order, how far each value is on the right side of the one before."""
        return np.diff(np.asarray(self.ours, float)) * (1 if self.paper == RISES else -1)

    def _is_met(self) -> np.ndarray:
        """Whether each number, or each step of an order, is within its tolerance; no number is never."""
        if self.is_order:
            return self._steps() > self.tolerance
        paper = np.atleast_1d(np.asarray(self.paper, float))
        # Inclusive, whatever way the difference of two decimal fractions is rounded.
        if isinstance(self.tolerance, Factor):
            ratio, most = np.asarray(self.ours, float) / paper, self.tolerance.times * (1 + 1e-12)
            return (ratio >= 1 / most) & (ratio <= most)
        return np.abs(np.asarray(self.ours, float) - paper) <= (self.tolerance + 1e-12) * np.abs(paper)

    @property
    def why(self) -> str:
        """The reason, and where numbers decide against the claim what they miss it by."""
        parts = [self.reason] if self.reason else []
        if self.ours is not None and self.verdict == NOT_REPRODUCED:
            parts.append(self._missed_by())
        return "; ".join(parts)

    def _missed_by(self) -> str:
        ours = np.atleast_1d(np.asarray(self.ours, float))
        if not np.all(np.isfinite(ours)):
            return "no number came out"
        if self.is_order:
            is_met, margins = self._is_met(), np.broadcast_to(self.tolerance, len(ours) - 1)
            worst = int(np.argmax(np.where(is_met, -np.inf, margins - self._steps())))
            noise = f", where {margins[worst]:.2g} can be noise" if margins[worst] else ""
            return (f"{int((~is_met).sum())} of {len(is_met)} steps are not there: from {ours[worst]:.4g} to"
                    f" {ours[worst + 1]:.4g}{noise}")
        paper = np.atleast_1d(np.asarray(self.paper, float))
        if isinstance(self.tolerance, Factor):
            ratio = ours / paper
            # Nothing is further off than 0, or less.
            off = np.where(ratio > 0, np.abs(np.log(np.where(ratio > 0, ratio, 1.0))), np.inf)
            return f"{ratio[int(np.argmax(off))]:.3g} times what was published"
        worst = int(np.argmax(np.abs(ours - paper) / np.maximum(np.abs(paper), np.finfo(float).tiny)))
        if paper[worst] == 0:
            return f"{ours[worst]:.3g} instead of 0"
        return f"off by {100 * (ours[worst] / paper[worst] - 1):+.3g} %"

    def record(self) -> dict[str, Any]:
        """As `jaxsim reproduce --json` prints it; `reason` only where there is one."""
        found = {name: plain(getattr(self, name))
                 for name in ("system", "claim", "source", "paper", "ours", "tolerance", "verdict")}
        if isinstance(self.tolerance, Factor):
            found["tolerance"] = str(self.tolerance)
        return found | ({"reason": self.why} if self.why else {})


@dataclasses.dataclass(frozen=True)
class Reproduction:
    """What a system's module gives: its claims, and how to draw what they are made of into a PNG file."""

    claims: tuple[Claim, ...]
    draw: Callable[[Path], None]
