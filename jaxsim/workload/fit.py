"""Fitting generators to measured requests, and saying how far off they are.

Source: the estimators are textbook ones; the length model (quantile table, two-component log-normal) and the
arrival model (slow drift, near-Poisson gaps) follow what production traces look like.
"""

import dataclasses
import math

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy.special import ndtr

from jaxsim._core.errors import InputError
from jaxsim.workload.arrivals import Gamma, Modulated
from jaxsim.workload.generator import Generator
from jaxsim.workload.lengths import GaussianCopula, LogNormalMixture, Quantiles

TABLE_LEVELS = np.concatenate(
    [
        [0.0, 0.001, 0.0025, 0.005, 0.01],
        np.linspace(0.02, 0.98, 49),
        [0.985, 0.9875, 0.99, 0.9925, 0.995, 0.9975, 0.999, 0.9995, 0.9998, 1.0],
    ]
)
"""64 levels: every 2 %, denser in the tails: equal spacing would smear the largest request over 1.6 %."""


def ks_distance(sample: np.ndarray, other: np.ndarray) -> float:
    """Largest gap between the empirical distribution functions of two samples (Kolmogorov-Smirnov)."""
    first, second = np.sort(sample), np.sort(other)
    points = np.concatenate([first, second])
    return float(
        np.max(
            np.abs(
                np.searchsorted(first, points, side="right") / len(first)
                - np.searchsorted(second, points, side="right") / len(second)
            )
        )
    )


def spearman(first: np.ndarray, second: np.ndarray) -> float:
    """Rank correlation, ties sharing their mean rank."""
    ranks = [pd.Series(x).rank().to_numpy() for x in (first, second)]
    return float(np.corrcoef(*ranks)[0, 1])


def index_of_dispersion(arrival_s: Float[np.ndarray, " requests"], window_s: float) -> float:
    """Variance over mean of the counts in whole consecutive windows from the first arrival; 1 for Poisson."""
    times = np.asarray(arrival_s, np.float64)
    windows = int((times[-1] - times[0]) // window_s)
    if windows < 2:
        raise InputError(
            "window_s",
            window_s,
            f"fits {windows} times into the {times[-1] - times[0]:g} s of arrivals",
            "give a shorter window",
        )
    counts = np.bincount(((times - times[0]) / window_s).astype(np.int64))[:windows]
    return float(counts.var() / counts.mean())


def fit_quantiles(tokens: np.ndarray, levels: Float[np.ndarray, " knots"] = TABLE_LEVELS) -> Quantiles:
    """Quantile table of a sample (linear between order statistics), to a tenth of a token."""
    return Quantiles(levels, np.round(np.quantile(np.asarray(tokens, np.float64), levels), 1))


def fit_lognormal(tokens: np.ndarray) -> tuple[float, float]:
    """Mean and standard deviation of the logarithm."""
    logs = np.log(np.asarray(tokens, np.float64))
    return float(logs.mean()), float(logs.std())


def fit_lognormal_mixture(tokens: np.ndarray, num_iterations: int = 300) -> LogNormalMixture:
    """Two log-normal components by expectation-maximisation, started from the halves about the median.

    The wall is the largest sample. Components are ordered by their mean.
    """
    values, counts = np.unique(np.asarray(tokens, np.float64), return_counts=True)
    logs = np.log(values)
    weights = counts / counts.sum()
    is_low = np.cumsum(weights) <= 0.5
    belongs = np.where(is_low, 0.9, 0.1)
    for _ in range(num_iterations):
        shares = np.array([(weights * belongs).sum(), (weights * (1 - belongs)).sum()])
        means = np.array([(weights * belongs * logs).sum(), (weights * (1 - belongs) * logs).sum()]) / shares
        spreads = np.sqrt(
            np.array(
                [
                    (weights * belongs * (logs - means[0]) ** 2).sum(),
                    (weights * (1 - belongs) * (logs - means[1]) ** 2).sum(),
                ]
            )
            / shares
        )
        spreads = np.maximum(spreads, 0.02)  # a component must not collapse onto one popular length
        log_density = np.log(shares) - np.log(spreads) - 0.5 * ((logs[:, None] - means) / spreads) ** 2
        belongs = 1.0 / (1.0 + np.exp(np.clip(log_density[:, 1] - log_density[:, 0], -700, 700)))
    order = np.argsort(means)
    return LogNormalMixture(
        weight=float(shares[order[0]]), mus=means[order], sigmas=spreads[order], max_tokens=int(values[-1])
    )


def fit_drift(
    arrival_s: Float[np.ndarray, " requests"], num_knots: int = 25, bin_s: float = 5.0
) -> Float[np.ndarray, " knots"]:
    """Relative rate, mean 1, at equally spaced knots over the trace, by least squares on binned counts."""
    times = np.asarray(arrival_s, np.float64) - arrival_s[0]
    span = times[-1]
    bins = max(4 * num_knots, int(span / bin_s))
    counts, edges = np.histogram(times, bins=bins, range=(0.0, span))
    middles = 0.5 * (edges[1:] + edges[:-1])
    knots = np.linspace(0.0, span, num_knots)
    hats = np.stack([np.interp(middles, knots, row) for row in np.eye(num_knots)], axis=1)
    rates = np.linalg.lstsq(hats, counts / (span / bins), rcond=None)[0]
    if np.any(rates <= 0):
        raise InputError("num_knots", num_knots, "gives a rate below zero at a knot", "use fewer knots")
    return rates / (np.trapezoid(rates, knots) / span)


def fit_gap_cv(
    arrival_s: Float[np.ndarray, " requests"], drift: Float[np.ndarray, " knots"], window_gaps: float = 5.0
) -> float:
    """CV of renewal gaps that reproduces the short-window dispersion left once the drift is taken out.

    Arrivals are carried through the integrated drift, where their mean rate is constant; the root of the
    index of dispersion there is the CV a renewal process needs to queue alike (the CV of single gaps would
    ignore that neighbouring gaps go together).
    """
    times = np.asarray(arrival_s, np.float64) - arrival_s[0]
    count = len(times)
    curve = Modulated(Gamma(1.0), drift, float(count))
    rescaled = curve.integral(times / times[-1] * count)
    return math.sqrt(index_of_dispersion(rescaled, window_gaps))


@dataclasses.dataclass(frozen=True)
class Fit:
    """Numbers fitted to a trace; `generator` makes a workload generator of them."""

    rate_rps: float
    num_requests: int
    drift: Float[np.ndarray, " knots"]
    gap_cv: float
    spearman: float
    input: Quantiles
    output: Quantiles

    def generator(self, name: str = "fitted") -> Generator:
        """Drifting near-Poisson arrivals, tabulated lengths, Gaussian copula."""
        return Generator(
            arrivals=Modulated(Gamma(self.gap_cv), self.drift, float(self.num_requests)),
            lengths=GaussianCopula(self.input, self.output, self.spearman),
            rate_rps=self.rate_rps,
            name=name,
        )


def fit_trace(frame: pd.DataFrame, num_knots: int = 25) -> Fit:
    """Fit a frame with the columns `arrival_s` (or `arrival_ms`), `input_tokens`, `output_tokens`."""
    missing = [c for c in ("input_tokens", "output_tokens") if c not in frame]
    if missing or not {"arrival_s", "arrival_ms"} & set(frame):
        raise InputError(
            "frame", list(frame), f"lacks {', '.join(missing) or 'arrival_s'}", "rename the columns"
        )
    arrival_s = (
        frame["arrival_s"].to_numpy() if "arrival_s" in frame else frame["arrival_ms"].to_numpy() / 1e3
    )
    drift = fit_drift(arrival_s, num_knots)
    return Fit(
        rate_rps=(len(frame) - 1) / float(arrival_s[-1] - arrival_s[0]),
        num_requests=len(frame),
        drift=drift,
        gap_cv=fit_gap_cv(arrival_s, drift),
        spearman=spearman(frame["input_tokens"].to_numpy(), frame["output_tokens"].to_numpy()),
        input=fit_quantiles(frame["input_tokens"].to_numpy()),
        output=fit_quantiles(frame["output_tokens"].to_numpy()),
    )


def compare(measured: np.ndarray, drawn: np.ndarray) -> dict[str, float]:
    """KS distance and relative errors of mean, p50, p90 and p99 of a drawn sample against a measured one."""
    report = {"ks": ks_distance(measured, drawn), "mean": float(np.mean(drawn) / np.mean(measured) - 1.0)}
    for level in (50, 90, 99):
        report[f"p{level}"] = float(np.percentile(drawn, level) / np.percentile(measured, level) - 1.0)
    return report


def lognormal_ks(tokens: np.ndarray) -> float:
    """KS distance of the best single log-normal, as a yardstick for the richer models."""
    mu, sigma = fit_lognormal(tokens)
    ordered = np.sort(np.asarray(tokens, np.float64))
    model = ndtr((np.log(ordered) - mu) / sigma)
    count = len(ordered)
    return float(
        max(np.max(np.arange(1, count + 1) / count - model), np.max(model - np.arange(count) / count))
    )
