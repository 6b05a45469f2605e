"""Derivatives by the parameters of distributions: the score function (likelihood ratio).

    d E[metric] / d theta = E[(metric - baseline) d log p(draws; theta) / d theta]

A mean over runs of a product: nothing is differentiated but the density of what was drawn, so metrics may jump (counts,
attainment) and schedules may change. It is unbiased whatever the system is, and noisy: the score grows with the root of
the number of draws, so use many short runs rather than few long ones. The baseline is the mean of the other runs, which
changes the noise alone. Everything is by the logarithm of the parameter, which makes it an elasticity.

    workload.rate_rps      poisson       n - S                   S: arrivals' positions in mean gaps, of n requests
                           gamma         (n - S) / cv^2          independent gaps of shape 1 / cv^2
    workload.input.mean_tokens, workload.output.mean_tokens (or mu: by the mean too)
                           log-normal    sum of d log P(tokens) / d mu
                           P: of whole tokens as they are drawn, rounded, with what piles up at the limits

Source: Glynn, Communications of the ACM 33 (1990); Williams, Machine Learning 8 (1992), for the baseline.

Known gaps: other laws (a score needs a density that is smooth in its parameter), lengths that are correlated, sessions,
traces and images are refused. A parameter that moves the support has no score. Runs that a bound stopped are refused
too: leaving them out would be another expectation.
"""

import dataclasses
import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy.special import log_ndtr

from jaxsim._core.errors import InputError, suggest
from jaxsim.engine import lower
from jaxsim.metrics.result import interval
from jaxsim.spec.scenario import Scenario
from jaxsim.spec.workload import LogNormalLength
from jaxsim.study import runner
from jaxsim.workload.lengths import LARGEST_WALL_TOKENS
from jaxsim.workload.workload import Workload

FEWEST_RUNS = 8
"""Seeds, below which an interval says nothing."""

PARAMETERS = ("workload.rate_rps", "workload.input.mean_tokens", "workload.output.mean_tokens")

INSTEAD = "use poisson or gamma arrivals, log-normal lengths, or ask for the total derivative"


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Percent of a metric's mean for a percent of a parameter, with a 95 % interval over runs.

    value: of the metric; runs: that have it.
    """

    value: float
    elasticity: float
    low: float
    high: float
    runs: int


class _Law(NamedTuple):
    """Log-normal, as `jaxsim.workload.lengths` draws it."""

    mu: float
    sigma: float
    least: int
    most: int


def score(scenario: Scenario, parameter: str, metrics: tuple[str, ...] = ("mean_ttft_ms",)) -> dict[str, Estimate]:
    """Elasticities of metrics by a parameter of a distribution, over the runs of a scenario (`num_seeds`: hundreds).

    metrics: columns of a study's table. Raises `InputError` for a parameter without a density, for a metric that fewer
    than `FEWEST_RUNS` runs have, and where a bound stopped a run.
    """
    scenario = scenario.checked()
    if scenario.num_seeds < FEWEST_RUNS:
        raise InputError("num_seeds", scenario.num_seeds, "is too few for a score function",
                         f"give at least {FEWEST_RUNS}, better hundreds of short runs")
    scores = np.array([of_draws(scenario, parameter, lower.make_workload(scenario, seed)) for seed in scenario.seeds])
    frame, refused = runner.table([scenario])
    if refused:
        raise InputError("scenario", scenario.name, next(iter(refused.values())), "change it as that says")
    by_seed = frame.set_index("seed").loc[list(scenario.seeds)]
    if (stopped := by_seed["fault"].dropna()).size:
        raise InputError("scenario", scenario.name, f"did not get to its end under seed {stopped.index[0]}:"
                         f" {stopped.iloc[0]}", "change it as that says")
    found = {}
    for name in metrics:
        if name not in by_seed or not by_seed[name].notna().any():
            raise InputError("metrics", name, "was not computed", suggest(name, by_seed.columns))
        found[name] = estimate(by_seed[name].to_numpy(np.float64), scores)
    return found


def estimate(values: Float[np.ndarray, " runs"], scores: Float[np.ndarray, " runs"]) -> Estimate:
    """From a metric and the score of each of independent runs; runs without the metric are left out."""
    has_value = np.isfinite(values)
    values, scores = values[has_value], scores[has_value]
    runs = len(values)
    if runs < FEWEST_RUNS:
        raise InputError("num_seeds", runs, "is how many runs have the metric, too few for a score function",
                         f"take more seeds, until at least {FEWEST_RUNS} have it")
    mean = values.mean()
    # The mean of the others is independent of a run, so that nothing is biased.
    others = (values.sum() - values) / (runs - 1)
    each = (values - others) * scores / mean
    low, high = interval(each)
    return Estimate(float(mean), float(each.mean()), low, high, runs)


def of_draws(scenario: Scenario, parameter: str, drawn: Workload) -> float:
    """d log p / d log parameter of one workload. Raises `InputError` for a parameter without a density."""
    w = scenario.workload
    if parameter not in PARAMETERS:
        raise InputError("parameter", parameter, "has no score function", suggest(parameter, PARAMETERS, INSTEAD))
    for field, value in (("sessions", w.sessions), ("lengths_from", w.lengths_from), ("images", w.images)):
        if value is not None:
            raise InputError(f"workload.{field}", "given", "are draws whose density is not known here", INSTEAD)
    if w.has_sessions or w.kind in ("trace", "azure-conv-2023"):
        raise InputError("workload.kind", w.kind, "is no law with a density", INSTEAD)
    if parameter == "workload.rate_rps":
        if w.kind not in ("poisson", "gamma"):
            raise InputError("workload.kind", w.kind, "has no density by its rate", INSTEAD)
        shape = 1.0 if w.kind == "poisson" else 1 / w.cv**2
        return shape * (len(drawn) - float(drawn.unit_times[-1]))
    side = parameter.split(".")[1]
    law = getattr(w, side)
    if not isinstance(law, LogNormalLength) or law.sigma == 0:
        raise InputError(f"workload.{side}", "given", "has no density that is smooth in its mean", INSTEAD)
    if w.spearman:
        raise InputError("workload.spearman", w.spearman, "correlates lengths, whose density is another", "use 0")
    most = law.max_tokens or LARGEST_WALL_TOKENS
    if side == "output" and w.output_limit is not None:
        most = min(most, w.output_limit)
    mu = math.log(law.mean_tokens) - 0.5 * law.sigma**2 if law.mu is None else law.mu
    tokens = drawn.input_tokens if side == "input" else drawn.output_tokens
    prefix = 0 if w.prefix_groups is None or side == "output" else w.prefix_groups.tokens
    return float(_lognormal(np.asarray(tokens) - prefix, _Law(mu, law.sigma, law.min_tokens, most)).sum())


def _lognormal(tokens: Float[np.ndarray, " requests"], law: _Law) -> Float[np.ndarray, " requests"]:
    """d log P(tokens) / d mu: of the tokens between two halves, of all below or above at a limit."""
    with np.errstate(divide="ignore"):
        ends = [np.where(is_last, sign * np.inf, (np.log(np.maximum(tokens + sign * 0.5, 0.0)) - law.mu) / law.sigma)
                for sign, is_last in ((-1, tokens <= law.least), (1, tokens >= law.most))]
    low, high = ends
    # In the tail where both are small: the law is symmetric.
    is_above = low > 0
    low, high = np.where(is_above, -high, low), np.where(is_above, -low, high)
    log_share = np.log(-np.expm1(np.minimum(log_ndtr(low) - log_ndtr(high), -1e-300))) + log_ndtr(high)
    density = [np.exp(-0.5 * np.where(np.isinf(x), 0.0, x) ** 2 - log_share) * np.isfinite(x) for x in (low, high)]
    slope = (density[0] - density[1]) / (math.sqrt(2 * math.pi) * law.sigma)
    return np.where(is_above, -slope, slope)

