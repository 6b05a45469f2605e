"""Laws of durations: think times of people, latencies of tools.

As with lengths, a law is its quantile function, so that a turn keeps its uniform whatever the law.
"""

import abc
import math

import equinox as eqx
import numpy as np
from jaxtyping import Float
from scipy.special import ndtri

from jaxsim._core.errors import InputError
from jaxsim.workload.workload import MAX_THINK_S


class AbstractDuration(eqx.Module):
    """The law of one duration."""

    @abc.abstractmethod
    def quantile(self, levels: Float[np.ndarray, " turns"]) -> Float[np.ndarray, " turns"]:
        """Seconds at the given levels in (0, 1), non-decreasing in the level, from 0 to `MAX_THINK_S`."""


def _check_seconds(field: str, value: float, low: float = 0.0) -> None:
    if isinstance(value, bool) or not low <= value <= MAX_THINK_S:
        problem = "is negative" if value < 0 else f"is not between {low:g} and {MAX_THINK_S:g} s"
        raise InputError(field, value, problem, "give seconds, 0 or more")


class FixedTime(AbstractDuration):
    """Always the same."""

    seconds: float

    def __check_init__(self):
        _check_seconds("seconds", self.seconds)

    def quantile(self, levels: Float[np.ndarray, " turns"]) -> Float[np.ndarray, " turns"]:
        """The constant."""
        return np.full(np.shape(levels), float(self.seconds))


class ExponentialTime(AbstractDuration):
    """Exponential, of mean `mean_s`."""

    mean_s: float

    def __check_init__(self):
        _check_seconds("mean_s", self.mean_s)

    def quantile(self, levels: Float[np.ndarray, " turns"]) -> Float[np.ndarray, " turns"]:
        """-mean ln(1 - u)."""
        return np.minimum(-self.mean_s * np.log1p(-np.asarray(levels)), MAX_THINK_S)


class LogNormalTime(AbstractDuration):
    """exp(ln(median) + sigma z), at most `max_s`: what lies beyond piles up there."""

    median_s: float
    sigma: float
    max_s: float = MAX_THINK_S

    def __check_init__(self):
        _check_seconds("median_s", self.median_s)
        _check_seconds("max_s", self.max_s)
        if not (self.sigma >= 0 and math.isfinite(self.sigma)):
            raise InputError(
                "sigma", self.sigma, "is negative or not finite", "give the standard deviation of the logarithm"
            )

    def quantile(self, levels: Float[np.ndarray, " turns"]) -> Float[np.ndarray, " turns"]:
        """median exp(sigma ndtri(u))."""
        # Bounded before exp, so that absurd parameters clip instead of overflowing.
        return np.minimum(self.median_s * np.exp(np.minimum(self.sigma * ndtri(levels), 300.0)), self.max_s)


class QuantilesTime(AbstractDuration):
    """Any measured distribution as a table of its quantiles, linear in between; `levels` rise from 0 to 1."""

    levels: Float[np.ndarray, " knots"] = eqx.field(converter=lambda x: np.asarray(x, np.float64))
    seconds: Float[np.ndarray, " knots"] = eqx.field(converter=lambda x: np.asarray(x, np.float64))

    def __check_init__(self):
        levels, seconds = self.levels, self.seconds
        is_rising = levels.ndim == 1 and len(levels) >= 2 and np.all(np.diff(levels) > 0)
        if not is_rising or levels[0] != 0 or levels[-1] != 1:
            raise InputError("levels", levels, "does not rise from 0 to 1", "sort them, 0 and 1 included")
        if seconds.shape != levels.shape or not np.all(np.diff(seconds) >= 0):
            raise InputError("seconds", seconds, f"is not {len(levels)} rising times", "give one a level")
        _check_seconds("seconds", seconds[0])
        _check_seconds("seconds", seconds[-1])

    def quantile(self, levels: Float[np.ndarray, " turns"]) -> Float[np.ndarray, " turns"]:
        """Linear interpolation."""
        return np.interp(levels, self.levels, self.seconds)
