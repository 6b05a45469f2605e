"""Length laws: marginals against their distribution, joint laws against their correlation."""

import math

import numpy as np
import pytest
from scipy.special import ndtr

from jaxsim._core.errors import InputError
from jaxsim.workload import (
    AbstractLength,
    AbstractLengths,
    Fixed,
    GaussianCopula,
    Independent,
    LogNormal,
    LogNormalMixture,
    Paired,
    Quantiles,
    Samples,
    Stream,
    Uniform,
    stream_key,
)
from jaxsim.workload.fit import spearman
from jaxsim.workload.named import classes
from jaxsim.workload.streams import uniforms

N = 50_000
U = uniforms(stream_key(0, Stream.LENGTHS), N, 2)
GRID = (
    np.arange(20_000) + 0.5
) / 20_000  # evenly spaced levels: quantile(GRID) is the law without sampling noise

EVERY = {
    "fixed": Fixed(128),
    "uniform": Uniform(1, 1024),
    "log-normal": LogNormal(mean_tokens=512.0, sigma=1.0, min_tokens=4, max_tokens=8192),
    "log-normal-mixture": LogNormalMixture(0.3, (3.0, 6.5), (0.5, 0.8), max_tokens=4096),
    "quantiles": Quantiles((0.0, 0.5, 0.9, 1.0), (10, 100, 1000, 5000)),
    "samples": Samples([5, 9, 9, 400, 77]),
}


def test_every_law_is_tried():
    assert set(classes(AbstractLength)) == set(EVERY)
    assert set(classes(AbstractLengths)) == {"independent", "gaussian-copula", "paired"}


@pytest.mark.parametrize("name", EVERY)
def test_quantiles_are_whole_positive_and_rise_with_the_level(name):
    tokens = EVERY[name].quantile(GRID)
    assert tokens.dtype == np.int64 and tokens.min() >= 1
    assert np.all(np.diff(tokens) >= 0)
    extremes = EVERY[name].quantile(np.array([2.0**-33, 1 - 2.0**-33]))
    assert extremes[0] <= tokens[0] and extremes[1] >= tokens[-1]


def test_uniform_reaches_every_length_equally():
    tokens = Uniform(3, 7).quantile(GRID)
    np.testing.assert_array_equal(np.bincount(tokens)[3:], np.full(5, len(GRID) // 5))


def test_log_normal_mean_median_and_walls():
    law = LogNormal(mean_tokens=512.0, sigma=0.8)
    tokens = law.quantile(GRID)
    assert np.mean(tokens) == pytest.approx(512.0, rel=5e-3)
    assert np.median(tokens) == pytest.approx(math.exp(law.mu), rel=5e-3)
    assert np.mean(tokens <= 200) == pytest.approx(ndtr((math.log(200.5) - law.mu) / 0.8), abs=1e-3)
    walled = LogNormal(mean_tokens=512.0, sigma=0.8, min_tokens=100, max_tokens=1000).quantile(GRID)
    np.testing.assert_array_equal(walled, np.clip(tokens, 100, 1000))
    same = LogNormal(mu=law.mu, sigma=0.8).quantile(GRID)
    np.testing.assert_array_equal(same, tokens)
    assert LogNormal(mu=800.0, sigma=1.0, max_tokens=64).quantile(GRID).max() == 64


def test_mixture_matches_its_components_and_wall():
    law = EVERY["log-normal-mixture"]
    tokens = law.quantile(GRID)
    for at in (5, 20, 60, 300, 1500, 4000):
        direct = 0.3 * ndtr((math.log(at + 0.5) - 3.0) / 0.5) + 0.7 * ndtr((math.log(at + 0.5) - 6.5) / 0.8)
        assert np.mean(tokens <= at) == pytest.approx(direct, abs=1e-4)
    beyond = 1 - float(law.cdf(np.array([4095.5]))[0])
    assert np.mean(tokens == 4096) == pytest.approx(beyond, abs=1e-4)
    assert tokens.max() == 4096


def test_quantile_table_is_met_at_its_levels():
    tokens = EVERY["quantiles"].quantile(GRID)
    np.testing.assert_allclose(np.quantile(tokens, [0.5, 0.9]), [100, 1000], rtol=2e-3)
    # Linear in between: the mean is that of the trapezoids.
    assert np.mean(tokens) == pytest.approx(0.5 * 55 + 0.4 * 550 + 0.1 * 3000, rel=1e-3)


def test_samples_are_resampled_evenly():
    tokens, counts = np.unique(EVERY["samples"].quantile(GRID), return_counts=True)
    np.testing.assert_array_equal(tokens, [5, 9, 77, 400])
    np.testing.assert_array_equal(counts, np.array([1, 2, 1, 1]) * len(GRID) // 5)


@pytest.mark.parametrize("rho", [-0.8, -0.2, 0.0, 0.5, 0.95])
def test_copula_has_the_rank_correlation_and_keeps_the_marginals(rho):
    first, second = LogNormal(mean_tokens=900.0, sigma=0.9), LogNormal(mean_tokens=200.0, sigma=0.7)
    inputs, outputs = GaussianCopula(first, second, rho).pairs(U)
    # Four standard errors, tight enough to tell rank from normal-score correlation (they differ by 0.017).
    assert spearman(inputs, outputs) == pytest.approx(rho, abs=4 * (1 - rho**2) / math.sqrt(N) + 0.0015)
    np.testing.assert_array_equal(inputs, first.quantile(U[:, 0]))
    for level in (0.1, 0.5, 0.9):
        below = np.mean(outputs <= second.quantile(np.array([level]))[0])
        assert below == pytest.approx(level, abs=0.012)


def test_pearson_is_that_of_the_normal_scores():
    law = LogNormal(mu=9.0, sigma=0.5)
    inputs, outputs = GaussianCopula(law, law, 0.6, "pearson").pairs(U)
    scores = np.corrcoef(np.log(inputs), np.log(outputs))[0, 1]
    assert scores == pytest.approx(0.6, abs=0.02)


def test_full_correlation_is_one_order():
    law = LogNormal(mu=6.0, sigma=1.0)
    inputs, outputs = GaussianCopula(law, law, 1.0).pairs(U)
    np.testing.assert_array_equal(inputs, outputs)


def test_independent_is():
    law = LogNormal(mu=9.0, sigma=0.5)
    inputs, outputs = Independent(law, law).pairs(U)
    assert abs(spearman(inputs, outputs)) < 5 / math.sqrt(N)


def test_paired_keeps_pairs_together():
    table = {(10, 1): 0, (20, 2): 0, (30, 1): 0, (30, 9): 0}
    inputs, outputs = Paired([10, 20, 30, 30], [1, 2, 1, 9]).pairs(U)
    for pair in zip(inputs.tolist(), outputs.tolist(), strict=True):
        table[pair] += 1  # a pair that is not in the table is a KeyError
    np.testing.assert_allclose(np.array(list(table.values())) / N, 0.25, atol=5 * math.sqrt(0.1875 / N))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Fixed(0), "tokens = 0"),
        (lambda: Fixed(2.5), "tokens = 2.5"),
        (lambda: Fixed(True), "tokens = True"),
        (lambda: Uniform(10, 5), "min_tokens = 10.*above"),
        (lambda: LogNormal(sigma=1.0), "exactly one"),
        (lambda: LogNormal(sigma=1.0, mu=1.0, mean_tokens=3.0), "exactly one"),
        (lambda: LogNormal(sigma=-1.0, mu=1.0), "sigma"),
        (lambda: LogNormal(sigma=1.0, mean_tokens=-5.0), "mean_tokens"),
        (lambda: LogNormalMixture(1.5, (1, 2), (1, 1), max_tokens=9), "weight"),
        (lambda: LogNormalMixture(0.5, (1, 2), (1, 0), max_tokens=9), "sigmas"),
        (lambda: Quantiles((0.0, 0.4), (1, 2)), "levels"),
        (lambda: Quantiles((0.0, 1.0), (5, 2)), "non-decreasing"),
        (lambda: Quantiles((0.0, 1.0), (0, 2)), "range"),
        (lambda: Quantiles((0.0, 1.0), (1, 2, 3)), "one quantile per level"),
        (lambda: Samples([]), "non-empty"),
        (lambda: Samples([3.0, math.nan]), r"tokens\[1\] = nan"),
        (lambda: GaussianCopula(Fixed(1), Fixed(1), 1.5), "rho"),
        (lambda: GaussianCopula(Fixed(1), Fixed(1), 0.5, "kendal"), "measure.*spearman"),
        (lambda: Paired([1, 2], [1]), "give pairs"),
        (lambda: Paired([1, 0], [1, 1]), r"input_tokens\[1\] = 0"),
    ],
)
def test_bad_numbers_are_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()
