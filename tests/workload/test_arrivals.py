"""Arrival processes against theory: gaps, dispersion, modulation, and the sharing of random numbers."""

import contextlib
import math

import jax
import numpy as np
import pytest

from jaxsim._core.errors import InputError
from jaxsim.workload import (
    MMPP2,
    AbstractArrivals,
    Deterministic,
    Gamma,
    Modulated,
    Poisson,
    Replay,
    Weibull,
    arrival_times,
)
from jaxsim.workload.arrivals import GRID_S, weibull_shape
from jaxsim.workload.fit import index_of_dispersion
from jaxsim.workload.named import classes

N = 100_000
CURVE = (0.5, 1.5, 1.0, 2.0, 0.25)
EVERY = {
    "poisson": Poisson(),
    "gamma": Gamma(2.0),
    "weibull": Weibull(2.0),
    "deterministic": Deterministic(),
    "mmpp2": MMPP2(5.0, 40.0, 120.0),
    "modulated": Modulated(Poisson(), CURVE, 1000.0),
    "replay": Replay(np.cumsum(np.linspace(0.1, 0.9, 5000))),
}


def gaps(process, seed=0, n=N):
    times = process.unit_times(seed, n)
    return np.diff(times, prepend=0.0)


def ks_against(sample, cdf):
    ordered = np.sort(sample)
    model, n = cdf(ordered), len(sample)
    return max(np.max(np.arange(1, n + 1) / n - model), np.max(model - np.arange(n) / n))


# 0.1 % point of the Kolmogorov-Smirnov statistic.
KS_LIMIT = 1.95 / math.sqrt(N)


def test_every_process_is_tried():
    assert set(classes(AbstractArrivals)) == set(EVERY)


@pytest.mark.parametrize("name", EVERY)
def test_positions_are_sorted_float64_at_unit_rate(name):
    n = 5000
    times = EVERY[name].unit_times(3, n)
    assert times.shape == (n,) and times.dtype == np.float64
    assert np.all(np.diff(times) >= 0) and times[0] >= 0
    # The burstiest of them, the MMPP, has dispersion 46 in long windows: five standard errors.
    assert abs(times[-1] / n - 1.0) < 5 * math.sqrt(46 / n)


@pytest.mark.parametrize("name", EVERY)
def test_rate_is_only_a_scale(name):
    slow = arrival_times(EVERY[name], 5, 2000, 0.5)
    fast = arrival_times(EVERY[name], 5, 2000, 4.0)
    np.testing.assert_allclose(slow / 8.0, fast, atol=GRID_S)
    assert np.all(slow / GRID_S == np.round(slow / GRID_S))


@pytest.mark.parametrize("name", sorted(set(EVERY) - {"modulated"}))
def test_the_first_of_many_are_the_few(name):
    process = EVERY[name]
    np.testing.assert_array_equal(process.unit_times(7, 4000)[:300], process.unit_times(7, 300))


@pytest.mark.parametrize("name", ["poisson", "gamma", "weibull", "mmpp2", "modulated"])
def test_seeds_differ_and_keys_equal_seeds(name):
    process = EVERY[name]
    first = process.unit_times(0, 100)
    np.testing.assert_array_equal(first, process.unit_times(jax.random.key(0), 100))
    np.testing.assert_array_equal(first, process.unit_times(jax.random.PRNGKey(0), 100))
    assert np.all(first != process.unit_times(1, 100))


def test_draws_ignore_session_flags():
    before = Gamma(2.0).unit_times(0, 1000)
    x64 = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64
    sequential = getattr(jax, "threefry_partitionable", lambda _: contextlib.nullcontext())
    with x64(True), sequential(False):
        after = Gamma(2.0).unit_times(0, 1000)
    np.testing.assert_array_equal(before, after)


def test_poisson_gaps_are_exponential_and_uncorrelated():
    g = gaps(Poisson())
    assert ks_against(g, lambda x: 1 - np.exp(-x)) < KS_LIMIT
    assert abs(np.corrcoef(g[:-1], g[1:])[0, 1]) < 4 / math.sqrt(N)
    times = np.cumsum(g)
    for window in (1.0, 10.0):
        assert index_of_dispersion(times, window) == pytest.approx(1.0, abs=5 * math.sqrt(2 * window / N))


@pytest.mark.parametrize("cv", [0.25, 1.0, 2.0, 4.0])
def test_gamma_has_its_cv_and_long_window_dispersion(cv):
    g = gaps(Gamma(cv))
    # Standard error of the CV of Gamma gaps: relative sqrt((1 + 2 cv^2) / 2n), roughly; 5 of them.
    assert np.std(g) / np.mean(g) == pytest.approx(cv, rel=5 * math.sqrt((1 + 3 * cv**2) / (2 * N)))
    assert np.mean(g) == pytest.approx(1.0, abs=5 * cv / math.sqrt(N))
    window = 200.0 * max(cv, 1.0) ** 2
    expected = index_of_dispersion(np.cumsum(g), window)
    # Counts in long windows: variance over mean tends to CV^2; relative error sqrt(2 / windows), 5 of them.
    assert expected == pytest.approx(cv**2, rel=5 * math.sqrt(2 * window / N))


def test_gamma_gaps_follow_the_gamma_law():
    from scipy.special import gammainc

    g = gaps(Gamma(2.0))
    assert ks_against(g, lambda x: gammainc(0.25, 0.25 * x)) < KS_LIMIT


@pytest.mark.parametrize("cv", [0.5, 1.0, 3.0])
def test_weibull_gaps_follow_the_weibull_law(cv):
    k = weibull_shape(cv)
    moments = [math.gamma(1 + i / k) for i in (1, 2)]
    assert math.sqrt(moments[1] / moments[0] ** 2 - 1) == pytest.approx(cv, rel=1e-9)
    g = gaps(Weibull(cv))
    assert ks_against(g, lambda x: 1 - np.exp(-((x * moments[0]) ** k))) < KS_LIMIT


def test_deterministic_is_equally_spaced():
    np.testing.assert_array_equal(arrival_times(Deterministic(), 0, 4, 4.0), [0.25, 0.5, 0.75, 1.0])


def mmpp_dispersion(process, window):
    """Exact index of dispersion of a stationary MMPP2 of unit rate: covariance exp(-(q12 + q21) t)."""
    high, low = process.rates()
    to_low, to_high = 1 / process.high_dwell_gaps, 1 / process.low_dwell_gaps
    total = to_low + to_high
    limit = 2 * (high - low) ** 2 * to_low * to_high / total**3
    return 1 + limit * (1 - (1 - math.exp(-total * window)) / (total * window))


@pytest.mark.parametrize(
    "process", [MMPP2(5.0, 10.0, 30.0), MMPP2(math.inf, 5.0, 15.0)], ids=["mmpp", "on-off"]
)
def test_mmpp2_rate_and_dispersion(process):
    high, low = process.rates()
    total = process.high_dwell_gaps + process.low_dwell_gaps
    assert (high * process.high_dwell_gaps + low * process.low_dwell_gaps) / total == pytest.approx(1.0)
    assert (low == 0) == math.isinf(process.rate_ratio)
    runs = [process.unit_times(seed, N) for seed in range(4)]
    for window in (2.0, 20.0, 200.0):
        measured = np.mean([index_of_dispersion(t, window) for t in runs])
        assert measured == pytest.approx(mmpp_dispersion(process, window), rel=0.1)
    # The mean over the runs: variance of a count of N is about dispersion x N.
    mean = np.mean([t[-1] / N for t in runs])
    assert mean == pytest.approx(1.0, abs=5 * math.sqrt(mmpp_dispersion(process, 1e6) / (4 * N)))


def test_mmpp2_starts_stationary():
    process = MMPP2(math.inf, 10.0, 30.0)
    early = [np.sum(process.unit_times(seed, 40) < 1.0) for seed in range(300)]
    # A start in the burst (probability 1/4) brings 4 in the first mean gap: mean 1, deviation about 1.9.
    assert np.mean(early) == pytest.approx(1.0, abs=4 * 1.9 / math.sqrt(300))


def test_mmpp2_dwell_times_in_seconds():
    process = MMPP2.from_seconds(4.0, 3.0, 10.0, 20.0)
    assert (process.high_dwell_gaps, process.low_dwell_gaps) == (40.0, 80.0)


def test_on_off_is_silent_between_bursts():
    process = MMPP2(math.inf, 50.0, 500.0)
    g = gaps(process, n=20_000)
    # In a burst gaps have mean 50/550; each silence is one gap of mean 500 (plus that).
    silences = g[g > 5.0]
    assert len(silences) == pytest.approx(20_000 / 550, rel=0.6)
    assert np.mean(g[g <= 5.0]) == pytest.approx(50 / 550, rel=0.05)


def test_modulated_inverts_its_integral_exactly():
    process = Modulated(Poisson(), CURVE, 1000.0)
    points = np.linspace(0.0, 3500.0, 4001)
    areas = process.integral(points)
    # The trapezoid rule is exact where no knot (every 250) lies inside a step.
    fine = np.interp(points % 1000.0, np.linspace(0, 1000.0, 5), CURVE)
    assert areas[-1] == pytest.approx(
        3 * 250 * (0.25 + 1.5 + 1.0 + 2.0 + 0.125) + 250 * 1.0 + 250 * 1.25, rel=1e-12
    )
    steps = 0.5 * (fine[1:] + fine[:-1]) * np.diff(points)
    inner = np.flatnonzero(points[1:] % 1000.0 > 1.0)
    np.testing.assert_allclose(np.diff(areas)[inner], steps[inner], rtol=2e-3)
    np.testing.assert_allclose(process.invert(areas), points, atol=1e-8)


def test_modulated_follows_its_curve():
    process = Modulated(Poisson(), CURVE, float(N))
    times = process.unit_times(0, N)
    counts, edges = np.histogram(times, bins=20, range=(0.0, N))
    expected = np.diff(process.integral(edges)) * N / process.integral(np.array([float(N)]))[0]
    # Chi-square with 19 degrees of freedom: 0.1 % point 43.8.
    assert np.sum((counts - expected) ** 2 / expected) < 43.8 * 1.1


def test_modulated_short_sample_has_the_asked_rate():
    process = Modulated(Deterministic(), CURVE, 1e6)
    # The first 1,000 of a million gaps see the curve near 0.5: they must still come at unit rate.
    assert process.unit_times(0, 1000)[-1] == pytest.approx(1000.0, rel=1e-3)


def test_replay_gives_its_times_back():
    times = np.sort(np.random.default_rng(0).uniform(100.0, 500.0, 1000))
    process = Replay(times)
    np.testing.assert_allclose(
        arrival_times(process, 0, 1000, process.rate_rps), times - times[0], atol=GRID_S
    )
    assert process.rate_rps == pytest.approx(999 / (times[-1] - times[0]))
    np.testing.assert_array_equal(Replay([2.0, 2.0]).unit_times(0, 2), [0.0, 0.0])
    with pytest.raises(InputError, match="num_requests = 1001.*more than the 1000"):
        process.unit_times(0, 1001)


def test_infinite_rate_is_everything_at_once():
    np.testing.assert_array_equal(arrival_times(Poisson(), 0, 5, math.inf), np.zeros(5))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Gamma(0.0), "cv = 0.0"),
        (lambda: Gamma(math.nan), "cv = nan"),
        (lambda: Weibull(1e4), "cv = 10000.0"),
        (lambda: MMPP2(0.5, 1.0, 1.0), "rate_ratio = 0.5"),
        (lambda: MMPP2(2.0, -1.0, 1.0), "high_dwell_gaps"),
        (lambda: MMPP2(2.0, 1.0, math.inf), "low_dwell_gaps"),
        (lambda: Modulated(Poisson(), (1.0, 0.0), 10.0), "relative_rates"),
        (lambda: Modulated(Poisson(), (1.0, 2.0), 0.0), "period_gaps"),
        (lambda: Replay([]), "arrival_s"),
        (lambda: Replay([1.0, 0.5]), "not sorted"),
        (lambda: Replay([0.0, math.nan]), "finite"),
        (lambda: arrival_times(Poisson(), 0, 5, 0.0), "rate_rps = 0.0"),
        (lambda: arrival_times(Poisson(), 0, 5, math.nan), "rate_rps = nan"),
        (lambda: arrival_times(Poisson(), "seven", 5, 1.0), "seed = 'seven'"),
    ],
)
def test_bad_numbers_are_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()
