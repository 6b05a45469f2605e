"""Length laws: how many tokens go in and come out.

A marginal law is its quantile function, so that common random numbers, copulas and sweeps of a parameter all
work the same way: a request keeps its uniforms whatever the law. A joint law turns two uniforms per request
into a pair. Everything is drawn on the host in float64 and rounded to whole tokens, at least 1.

Known gaps: lengths of different requests are independent (but for contexts of sessions; no drift of the mix over time).
"""

import abc
import math
from typing import Literal

import equinox as eqx
import numpy as np
from jaxtyping import Float, Int
from scipy.special import ndtr, ndtri

from jaxsim._core.errors import InputError, suggest

LARGEST_WALL_TOKENS = 1 << 24
"""Longest sequence a law may produce: token counts stay exact in float32."""


class AbstractLength(eqx.Module):
    """The law of one length."""

    @abc.abstractmethod
    def quantile(self, levels: Float[np.ndarray, " requests"]) -> Int[np.ndarray, " requests"]:
        """Tokens at the given levels in (0, 1), non-decreasing in the level, at least 1."""


class AbstractLengths(eqx.Module):
    """The joint law of input and output lengths."""

    @abc.abstractmethod
    def pairs(
        self, levels: Float[np.ndarray, "requests 2"]
    ) -> tuple[Int[np.ndarray, " requests"], Int[np.ndarray, " requests"]]:
        """Input and output tokens from two uniforms per request."""


def _whole(tokens: np.ndarray, low: float = 1, high: float = LARGEST_WALL_TOKENS) -> np.ndarray:
    return np.floor(np.clip(tokens, low, high) + 0.5).astype(np.int64)


def _check_tokens(field: str, value: float) -> None:
    if isinstance(value, bool) or not 1 <= value <= LARGEST_WALL_TOKENS or value != int(value):
        raise InputError(
            field,
            value,
            f"is not a whole number of tokens from 1 to {LARGEST_WALL_TOKENS}",
            "give a positive integer",
        )


def _check_range(min_tokens: int, max_tokens: int) -> None:
    _check_tokens("min_tokens", min_tokens)
    _check_tokens("max_tokens", max_tokens)
    if min_tokens > max_tokens:
        raise InputError("min_tokens", min_tokens, f"is above max_tokens = {max_tokens}", "swap them")


class Fixed(AbstractLength):
    """Always the same length."""

    tokens: int

    def __check_init__(self):
        _check_tokens("tokens", self.tokens)

    def quantile(self, levels: Float[np.ndarray, " requests"]) -> Int[np.ndarray, " requests"]:
        """The constant."""
        return np.full(np.shape(levels), int(self.tokens), np.int64)


class Uniform(AbstractLength):
    """Every whole number from `min_tokens` to `max_tokens` equally often."""

    min_tokens: int
    max_tokens: int

    def __check_init__(self):
        _check_range(self.min_tokens, self.max_tokens)

    def quantile(self, levels: Float[np.ndarray, " requests"]) -> Int[np.ndarray, " requests"]:
        """min + floor(u x (max - min + 1))."""
        count = self.max_tokens - self.min_tokens + 1
        return self.min_tokens + np.minimum(np.floor(np.asarray(levels) * count), count - 1).astype(np.int64)


class LogNormal(AbstractLength):
    """exp(mu + sigma z), clipped to [min_tokens, max_tokens]: what lies outside piles up at the edges.

    Give `mu`, or `mean_tokens`, the mean before clipping: mu = ln(mean) - sigma^2 / 2.
    """

    mu: float
    sigma: float
    min_tokens: int
    max_tokens: int

    def __init__(
        self,
        *,
        sigma: float,
        mu: float | None = None,
        mean_tokens: float | None = None,
        min_tokens: int = 1,
        max_tokens: int | None = None,
    ):
        if not (sigma >= 0 and math.isfinite(sigma)):
            raise InputError(
                "sigma", sigma, "is negative or not finite", "give the standard deviation of the logarithm"
            )
        if (mu is None) == (mean_tokens is None):
            raise InputError(
                "mu", mu, f"comes with mean_tokens = {mean_tokens}", "give exactly one of the two"
            )
        if mean_tokens is not None and not (mean_tokens > 0 and math.isfinite(mean_tokens)):
            raise InputError("mean_tokens", mean_tokens, "is not positive and finite", "give tokens")
        if mu is not None and not math.isfinite(mu):
            raise InputError("mu", mu, "is not finite", "give the mean of the logarithm")
        max_tokens = LARGEST_WALL_TOKENS if max_tokens is None else max_tokens
        _check_range(min_tokens, max_tokens)
        self.mu = float(math.log(mean_tokens) - 0.5 * sigma**2 if mu is None else mu)
        self.sigma = float(sigma)
        self.min_tokens, self.max_tokens = int(min_tokens), int(max_tokens)

    def quantile(self, levels: Float[np.ndarray, " requests"]) -> Int[np.ndarray, " requests"]:
        """exp(mu + sigma ndtri(u)), rounded."""
        # The exponent is bounded before exp so that absurd parameters clip instead of overflowing.
        log_tokens = np.minimum(self.mu + self.sigma * ndtri(np.asarray(levels)), 50.0)
        return _whole(np.exp(log_tokens), self.min_tokens, self.max_tokens)


class LogNormalMixture(AbstractLength):
    """Two log-normal components with a hard wall: with probability `weight` the first, else the second.

    Rounded to whole tokens and clipped to [min_tokens, max_tokens]; the mass beyond the wall sits on it, as
    truncated prompts do in production traces.

    Source: the shape of the Azure 2023 and ServeGen length distributions.
    """

    weight: float
    mus: tuple[float, float] = eqx.field(converter=lambda x: tuple(float(v) for v in x))
    sigmas: tuple[float, float] = eqx.field(converter=lambda x: tuple(float(v) for v in x))
    max_tokens: int
    min_tokens: int = 1

    def __check_init__(self):
        if not 0 <= self.weight <= 1:
            raise InputError(
                "weight", self.weight, "is not between 0 and 1", "give the share of the first component"
            )
        if len(self.mus) != 2 or not all(map(math.isfinite, self.mus)):
            raise InputError("mus", self.mus, "is not two finite numbers", "give the means of the logarithm")
        if len(self.sigmas) != 2 or not all(0 < s < math.inf for s in self.sigmas):
            raise InputError(
                "sigmas",
                self.sigmas,
                "is not two positive numbers",
                "give the standard deviations of the logarithm",
            )
        _check_range(self.min_tokens, self.max_tokens)

    def cdf(self, tokens: Float[np.ndarray, " points"]) -> Float[np.ndarray, " points"]:
        """Distribution function of the continuous mixture, before rounding and the wall."""
        log_tokens = np.log(np.asarray(tokens, np.float64))
        first, second = (ndtr((log_tokens - m) / s) for m, s in zip(self.mus, self.sigmas, strict=True))
        return self.weight * first + (1.0 - self.weight) * second

    def quantile(self, levels: Float[np.ndarray, " requests"]) -> Int[np.ndarray, " requests"]:
        """Smallest k with cdf(k + 1/2) >= u: a table over the support inverts the discrete law exactly."""
        support = np.arange(self.min_tokens, self.max_tokens + 1)
        return support[np.searchsorted(self.cdf(support[:-1] + 0.5), np.asarray(levels), side="left")]


class Quantiles(AbstractLength):
    """Any measured distribution as a table of quantiles, linear in between.

    `levels` rise from 0 to 1; `tokens` are the quantiles there (the first and last are the smallest and
    largest).
    """

    levels: Float[np.ndarray, " knots"] = eqx.field(converter=lambda x: np.asarray(x, np.float64))
    tokens: Float[np.ndarray, " knots"] = eqx.field(converter=lambda x: np.asarray(x, np.float64))

    def __check_init__(self):
        levels, tokens = self.levels, self.tokens
        if (
            levels.ndim != 1
            or len(levels) < 2
            or levels[0] != 0
            or levels[-1] != 1
            or not np.all(np.diff(levels) > 0)
        ):
            raise InputError(
                "levels", levels, "does not rise from 0 to 1", "give increasing levels, 0 and 1 included"
            )
        if tokens.shape != levels.shape:
            raise InputError(
                "tokens",
                tokens,
                f"has shape {tokens.shape}, not {levels.shape}",
                "give one quantile per level",
            )
        if not np.all(np.isfinite(tokens)) or not np.all(np.diff(tokens) >= 0):
            raise InputError("tokens", tokens, "is not finite and non-decreasing", "sort the quantiles")
        if tokens[0] < 1 or tokens[-1] > LARGEST_WALL_TOKENS:
            raise InputError(
                "tokens", tokens, f"leaves the range 1 to {LARGEST_WALL_TOKENS}", "clip the quantiles"
            )

    def quantile(self, levels: Float[np.ndarray, " requests"]) -> Int[np.ndarray, " requests"]:
        """Linear interpolation, rounded half up."""
        return _whole(np.interp(np.asarray(levels), self.levels, self.tokens))


class Samples(AbstractLength):
    """Resampling of given lengths: the empirical distribution, steps and atoms included."""

    tokens: Int[np.ndarray, " samples"] = eqx.field(converter=lambda x: np.sort(np.asarray(x)))

    def __check_init__(self):
        _check_samples("tokens", self.tokens)

    def quantile(self, levels: Float[np.ndarray, " requests"]) -> Int[np.ndarray, " requests"]:
        """The floor(u x n)-th smallest sample."""
        return self.tokens[_pick(levels, len(self.tokens))].astype(np.int64)


def _pick(levels: np.ndarray, count: int) -> np.ndarray:
    return np.minimum((np.asarray(levels) * count).astype(np.int64), count - 1)


def _check_samples(field: str, tokens: np.ndarray) -> None:
    if tokens.ndim != 1 or len(tokens) == 0 or tokens.dtype.kind not in "iuf":
        raise InputError(field, tokens, "is not a non-empty list of numbers", "give token counts")
    bad = ~((tokens >= 1) & (tokens <= LARGEST_WALL_TOKENS) & (tokens == np.floor(tokens)))
    if np.any(bad):
        at = int(np.argmax(bad))
        raise InputError(
            f"{field}[{at}]",
            tokens[at].item(),
            "is not a positive whole number of tokens",
            "leave such samples out",
        )


class Independent(AbstractLengths):
    """Input and output drawn independently."""

    input: AbstractLength
    output: AbstractLength

    def pairs(
        self, levels: Float[np.ndarray, "requests 2"]
    ) -> tuple[Int[np.ndarray, " requests"], Int[np.ndarray, " requests"]]:
        """One uniform for each."""
        return self.input.quantile(levels[:, 0]), self.output.quantile(levels[:, 1])


class GaussianCopula(AbstractLengths):
    """Two marginals tied by a Gaussian copula of correlation `rho`.

    `measure` says what `rho` is: "spearman", the rank correlation of the (continuous) lengths, converted by 2
    sin(pi rho / 6); or "pearson", the linear correlation of the underlying normal scores.

    Known gaps: one number cannot carry a dependence that bends, such as one sign for short and another for
    long prompts; resample pairs (`Paired`) to keep it.
    """

    input: AbstractLength
    output: AbstractLength
    rho: float
    measure: Literal["spearman", "pearson"] = eqx.field(default="spearman", static=True)

    def __check_init__(self):
        if not -1 <= self.rho <= 1:
            raise InputError("rho", self.rho, "is not between -1 and 1", "give a correlation")
        if self.measure not in ("spearman", "pearson"):
            raise InputError(
                "measure", self.measure, "is unknown", suggest(self.measure, ("spearman", "pearson"))
            )

    @property
    def normal_rho(self) -> float:
        """Correlation of the normal scores."""
        return 2.0 * math.sin(math.pi * self.rho / 6.0) if self.measure == "spearman" else float(self.rho)

    def pairs(
        self, levels: Float[np.ndarray, "requests 2"]
    ) -> tuple[Int[np.ndarray, " requests"], Int[np.ndarray, " requests"]]:
        """z2 = rho z1 + sqrt(1 - rho^2) e; the input keeps its own uniform."""
        rho = self.normal_rho
        first, second = ndtri(levels[:, 0]), ndtri(levels[:, 1])
        mixed = ndtr(rho * first + math.sqrt(max(0.0, 1.0 - rho * rho)) * second)
        return self.input.quantile(levels[:, 0]), self.output.quantile(mixed)


class Paired(AbstractLengths):
    """Joint resampling of (input, output) pairs from a table: whatever dependence they have is kept."""

    input_tokens: Int[np.ndarray, " samples"] = eqx.field(converter=np.asarray)
    output_tokens: Int[np.ndarray, " samples"] = eqx.field(converter=np.asarray)

    def __check_init__(self):
        _check_samples("input_tokens", self.input_tokens)
        _check_samples("output_tokens", self.output_tokens)
        if self.input_tokens.shape != self.output_tokens.shape:
            raise InputError(
                "output_tokens",
                self.output_tokens,
                f"has {len(self.output_tokens)} entries, input_tokens {len(self.input_tokens)}",
                "give pairs",
            )

    def pairs(
        self, levels: Float[np.ndarray, "requests 2"]
    ) -> tuple[Int[np.ndarray, " requests"], Int[np.ndarray, " requests"]]:
        """The floor(u x n)-th pair; the second uniform is not used."""
        row = _pick(levels[:, 0], len(self.input_tokens))
        return self.input_tokens[row].astype(np.int64), self.output_tokens[row].astype(np.int64)
