"""Arrival processes: when requests come.

A process gives cumulative positions at unit mean rate; the rate is a scale applied afterwards, so the same
seed gives the same pattern at every rate (common random numbers), and a sweep over rates shares one draw.
Slow changes of the rate enter by time rescaling: if S_i are the points of a unit-rate process and L the
integrated relative rate, L^-1(S_i) are the points of the modulated one.

Source: time rescaling, e.g. Brown et al., Neural Computation 14 (2002).
"""

import abc
import math

import equinox as eqx
import jax
import numpy as np
from jaxtyping import Float, PRNGKeyArray
from scipy.special import gammaincinv

from jaxsim._core.errors import InputError
from jaxsim.workload.streams import Stream, as_key, stream_key, uniforms

GRID_S = 2.0**-20
"""Arrivals lie on this grid (0.95 microseconds), so that two engines agree on every comparison of times."""


def round_to_grid(times_s: Float[np.ndarray, " requests"]) -> Float[np.ndarray, " requests"]:
    """Times rounded to `GRID_S`, half to even."""
    return np.rint(np.asarray(times_s, np.float64) / GRID_S) * GRID_S


class AbstractArrivals(eqx.Module):
    """A point process of unit mean rate."""

    @abc.abstractmethod
    def unit_times(self, key: PRNGKeyArray, num_requests: int) -> Float[np.ndarray, " requests"]:
        """Positions of the first `num_requests` arrivals, in mean gaps from 0, non-decreasing, float64."""


def arrival_times(
    arrivals: AbstractArrivals, seed: int | PRNGKeyArray, num_requests: int, rate_rps: float
) -> Float[np.ndarray, " requests"]:
    """Arrival times in seconds on the grid: unit positions over the rate, all at 0 if it is infinite."""
    return round_to_grid(arrivals.unit_times(as_key(seed), num_requests) / check_rate(rate_rps))


def check_rate(rate_rps: float) -> float:
    """The rate as a float, if it is positive (infinite is allowed)."""
    if not isinstance(rate_rps, (int, float, np.number)) or isinstance(rate_rps, bool) or not rate_rps > 0:
        raise InputError(
            "rate_rps",
            rate_rps,
            "is not a positive number of requests per second",
            "give a number above 0, or inf for everything at once",
        )
    return float(rate_rps)


def _check_positive(field: str, value: float, remedy: str = "give a number above 0") -> None:
    if not (value > 0 and math.isfinite(value)):
        raise InputError(field, value, "is not positive and finite", remedy)


def _check_cv(cv: float) -> None:
    if not 0.02 <= cv <= 50:
        raise InputError(
            "cv",
            cv,
            "is not between 0.02 and 50",
            "give the coefficient of variation of the gaps; Poisson has 1",
        )


class Poisson(AbstractArrivals):
    """Independent exponential gaps: CV 1, index of dispersion 1 in every window."""

    def unit_times(self, key: PRNGKeyArray, num_requests: int) -> Float[np.ndarray, " requests"]:
        """Cumulative sum of -ln(u)."""
        draws = uniforms(stream_key(key, Stream.ARRIVALS), num_requests)[:, 0]
        return np.cumsum(-np.log(draws))


class Gamma(AbstractArrivals):
    """Independent Gamma gaps: shape 1/CV^2, mean 1.

    `cv` below 1 is smoother than Poisson, above 1 burstier; the index of dispersion tends to CV^2 in long
    windows. vLLM's benchmark client calls the shape `burstiness`.

    Known gaps: the first gap is drawn from the gap law, not from the equilibrium law.
    """

    cv: float

    def __check_init__(self):
        _check_cv(self.cv)

    def unit_times(self, key: PRNGKeyArray, num_requests: int) -> Float[np.ndarray, " requests"]:
        """Cumulative sum of the Gamma(1/CV^2) quantiles of uniforms, times CV^2."""
        shape = 1.0 / self.cv**2
        draws = uniforms(stream_key(key, Stream.ARRIVALS), num_requests)[:, 0]
        # By quantile rather than by rejection: a request keeps its place in the law at every CV, and nothing
        # has to be compiled.
        return np.cumsum(gammaincinv(shape, draws) / shape)


class Weibull(AbstractArrivals):
    """Independent Weibull gaps of mean 1 with a given CV, heavier-tailed than Gamma at the same CV.

    The shape k solves Gamma(1 + 2/k) / Gamma(1 + 1/k)^2 - 1 = CV^2.

    Source: ServeGen (Alibaba), which fits the better of Gamma and Weibull per client and window.
    """

    cv: float

    def __check_init__(self):
        _check_cv(self.cv)

    def unit_times(self, key: PRNGKeyArray, num_requests: int) -> Float[np.ndarray, " requests"]:
        """Cumulative sum of (-ln u)^(1/k) / Gamma(1 + 1/k)."""
        shape = weibull_shape(self.cv)
        draws = uniforms(stream_key(key, Stream.ARRIVALS), num_requests)[:, 0]
        return np.cumsum((-np.log(draws)) ** (1.0 / shape) * math.exp(-math.lgamma(1.0 + 1.0 / shape)))


def weibull_shape(cv: float) -> float:
    """Shape of a Weibull law with coefficient of variation `cv`, by bisection (the CV falls with it)."""
    target = math.log1p(cv * cv)
    low, high = math.log(0.05), math.log(200.0)
    for _ in range(100):
        middle = 0.5 * (low + high)
        k = math.exp(middle)
        if math.lgamma(1.0 + 2.0 / k) - 2.0 * math.lgamma(1.0 + 1.0 / k) > target:
            low = middle
        else:
            high = middle
    return math.exp(0.5 * (low + high))


class Deterministic(AbstractArrivals):
    """Equal gaps: positions 1, 2, 3, ..."""

    def unit_times(self, key: PRNGKeyArray, num_requests: int) -> Float[np.ndarray, " requests"]:
        """1..n; the key is not used."""
        return np.arange(1, num_requests + 1, dtype=np.float64)


class MMPP2(AbstractArrivals):
    """Two-state Markov-modulated Poisson process: exponential periods of high and of low rate, in turn.

    `rate_ratio` = high rate over low rate (infinite: on-off, silent in the low state). The dwell times D_h
    and D_l are the means of the two kinds of period, in mean gaps, that is seconds x mean rate
    (`MMPP2.from_seconds`), so a burst keeps its number of requests when the rate is scaled. The state at the
    start is stationary. With D = D_h + D_l and relative rates r_h, r_l:

        (r_h D_h + r_l D_l) / D = 1
        index of dispersion in long windows = 1 + 2 (r_h - r_l)^2 D_h^2 D_l^2 / D^3

    Source: Fischer and Meier-Hellstern, "The Markov-modulated Poisson process cookbook" (1993).
    """

    rate_ratio: float
    high_dwell_gaps: float
    low_dwell_gaps: float

    def __check_init__(self):
        if not self.rate_ratio >= 1:
            raise InputError(
                "rate_ratio", self.rate_ratio, "is below 1", "give high rate over low rate; inf is on-off"
            )
        _check_positive("high_dwell_gaps", self.high_dwell_gaps)
        _check_positive("low_dwell_gaps", self.low_dwell_gaps)

    @classmethod
    def from_seconds(
        cls, rate_rps: float, rate_ratio: float, high_dwell_s: float, low_dwell_s: float
    ) -> "MMPP2":
        """From dwell times in seconds at the mean rate the process is meant for."""
        rate_rps = check_rate(rate_rps)
        return cls(rate_ratio, high_dwell_s * rate_rps, low_dwell_s * rate_rps)

    def rates(self) -> tuple[float, float]:
        """Relative rates (high, low) with mean 1."""
        total = self.high_dwell_gaps + self.low_dwell_gaps
        low_weight = 0.0 if math.isinf(self.rate_ratio) else 1.0 / self.rate_ratio
        high = total / (self.high_dwell_gaps + low_weight * self.low_dwell_gaps)
        return high, high * low_weight

    def unit_times(self, key: PRNGKeyArray, num_requests: int) -> Float[np.ndarray, " requests"]:
        """Unit-rate Poisson points through the inverse of the integrated rate of a sampled state path."""
        draws = uniforms(stream_key(key, Stream.ARRIVALS), num_requests)[:, 0]
        positions = np.cumsum(-np.log(draws))
        knots, areas = self._state_path(stream_key(key, Stream.ARRIVAL_STATES), positions[-1])
        # Increasing wherever a point can fall: silent periods have no area and are skipped.
        period = np.clip(np.searchsorted(areas, positions, side="left") - 1, 0, len(areas) - 2)
        width, area = knots[period + 1] - knots[period], areas[period + 1] - areas[period]
        return knots[period] + (positions - areas[period]) * width / area

    def _state_path(self, key: PRNGKeyArray, area_needed: float) -> tuple[np.ndarray, np.ndarray]:
        """Ends of the periods and the integrated rate at them, both from 0, past `area_needed`."""
        high, low = self.rates()
        total = self.high_dwell_gaps + self.low_dwell_gaps
        is_high_first = uniforms(jax.random.fold_in(key, 0), 1)[0, 0] * total < self.high_dwell_gaps
        # Whole cycles: their mean area is the mean cycle length, as the mean rate is 1.
        cycles = int(area_needed / total * 1.5) + 16
        while True:
            lengths = -np.log(uniforms(jax.random.fold_in(key, 1), 2 * cycles)[:, 0])
            is_high = (np.arange(2 * cycles) % 2 == 0) == is_high_first
            lengths = lengths * np.where(is_high, self.high_dwell_gaps, self.low_dwell_gaps)
            areas = np.concatenate([[0.0], np.cumsum(lengths * np.where(is_high, high, low))])
            if areas[-1] > area_needed:
                return np.concatenate([[0.0], np.cumsum(lengths)]), areas
            cycles *= 2


class Modulated(AbstractArrivals):
    """Any process with a slowly varying rate: a periodic piecewise-linear curve of the relative rate.

    `relative_rates` are the values at equally spaced knots, the first at position 0, the last at
    `period_gaps` (positions count mean gaps, so the curve keeps its number of requests when the rate is
    scaled). The part of the curve a sample covers is scaled to mean 1, so a short sample has the asked mean
    rate and the local slope.

    Known gaps: because of that scaling the first n of N arrivals are not the n arrivals.
    """

    base: AbstractArrivals
    relative_rates: Float[np.ndarray, " knots"] = eqx.field(converter=lambda x: np.asarray(x, np.float64))
    period_gaps: float

    def __check_init__(self):
        rates = self.relative_rates
        if rates.ndim != 1 or len(rates) < 2 or not np.all(np.isfinite(rates)) or not np.all(rates > 0):
            raise InputError(
                "relative_rates",
                rates,
                "is not a list of two or more positive numbers",
                "give the relative rate at equally spaced times of one period",
            )
        _check_positive("period_gaps", self.period_gaps)

    def unit_times(self, key: PRNGKeyArray, num_requests: int) -> Float[np.ndarray, " requests"]:
        """L^-1(S_i), where L is the integral of the curve, scaled so that L(n) = n."""
        positions = self.base.unit_times(key, num_requests)
        covered = float(num_requests)
        return self.invert(positions * (self.integral(np.array([covered]))[0] / covered))

    def _knots(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        knots = np.linspace(0.0, self.period_gaps, len(self.relative_rates))
        rates = self.relative_rates
        areas = np.concatenate([[0.0], np.cumsum(0.5 * (rates[1:] + rates[:-1]) * np.diff(knots))])
        return knots, rates, areas

    def integral(self, positions: Float[np.ndarray, " points"]) -> Float[np.ndarray, " points"]:
        """L(t): the curve integrated from 0, exactly (a quadratic in each piece)."""
        knots, rates, areas = self._knots()
        cycles, rest = np.divmod(np.asarray(positions, np.float64), self.period_gaps)
        piece = np.clip(np.searchsorted(knots, rest, side="right") - 1, 0, len(knots) - 2)
        slope = (rates[piece + 1] - rates[piece]) / (knots[piece + 1] - knots[piece])
        inside = rest - knots[piece]
        return cycles * areas[-1] + areas[piece] + inside * (rates[piece] + 0.5 * slope * inside)

    def invert(self, areas: Float[np.ndarray, " points"]) -> Float[np.ndarray, " points"]:
        """L^-1(a), exactly: the stable root of the quadratic in each piece."""
        knots, rates, ends = self._knots()
        cycles, rest = np.divmod(np.asarray(areas, np.float64), ends[-1])
        piece = np.clip(np.searchsorted(ends, rest, side="right") - 1, 0, len(knots) - 2)
        slope = (rates[piece + 1] - rates[piece]) / (knots[piece + 1] - knots[piece])
        wanted = rest - ends[piece]
        root = np.sqrt(np.maximum(rates[piece] ** 2 + 2.0 * slope * wanted, 0.0))
        return cycles * self.period_gaps + knots[piece] + 2.0 * wanted / (rates[piece] + root)


class Replay(AbstractArrivals):
    """Given arrival times, in order; scaling the rate stretches them.

    Positions are (a_i - a_0) x `rate_rps`, where `rate_rps` = (n - 1) / (a_last - a_0) over all given times,
    so sampling at `rate_rps` gives the times back (from 0), and fewer requests are the first ones.
    """

    arrival_s: Float[np.ndarray, " times"] = eqx.field(converter=lambda x: np.asarray(x, np.float64))

    def __check_init__(self):
        times = self.arrival_s
        if times.ndim != 1 or len(times) == 0 or not np.all(np.isfinite(times)):
            raise InputError("arrival_s", times, "is not a non-empty list of finite times", "give seconds")
        if np.any(np.diff(times) < 0):
            raise InputError("arrival_s", times, "is not sorted", "sort the times first")

    @property
    def rate_rps(self) -> float:
        """Mean rate of the given times; infinite if they are all at one instant."""
        span = float(self.arrival_s[-1] - self.arrival_s[0])
        return (len(self.arrival_s) - 1) / span if span > 0 else math.inf

    def unit_times(self, key: PRNGKeyArray, num_requests: int) -> Float[np.ndarray, " requests"]:
        """The given times from 0 at unit mean rate; the key is not used."""
        if num_requests > len(self.arrival_s):
            raise InputError(
                "num_requests",
                num_requests,
                f"is more than the {len(self.arrival_s)} given arrivals",
                "ask for fewer, or fit a process to the trace",
            )
        from_zero = self.arrival_s[:num_requests] - self.arrival_s[0]
        return from_zero * self.rate_rps if math.isfinite(self.rate_rps) else from_zero
