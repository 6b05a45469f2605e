"""The embedded default generator against the trace it was fitted to."""

import numpy as np
import pandas as pd
import pytest

from jaxsim._core.errors import InputError
from jaxsim.workload import Gamma, LogNormal, Poisson, azure2023, azure_conv_2023, fit

SEEDS = range(8)


@pytest.fixture(scope="module")
def trace(shared_data):
    path = shared_data / "traces" / "azure2023_conv.csv"
    if not path.exists():
        pytest.skip("no Azure 2023 trace")
    frame = pd.read_csv(path)
    return frame.assign(arrival_s=frame["arrival_ms"] / 1e3)


@pytest.fixture(scope="module")
def hours():
    """The hour, drawn eight times."""
    generator = azure_conv_2023()
    return [generator.sample(seed, azure2023.NUM_REQUESTS) for seed in SEEDS]


def test_refit_gives_the_constants(trace):
    again = fit.fit_trace(trace.drop(columns="arrival_s"))  # from arrival_ms, as the file has it
    assert again.num_requests == azure2023.NUM_REQUESTS
    assert again.rate_rps == pytest.approx(azure2023.RATE_RPS, abs=5e-5)
    assert again.gap_cv == pytest.approx(azure2023.GAP_CV, abs=5e-5)
    assert again.spearman == pytest.approx(azure2023.SPEARMAN, abs=5e-5)
    np.testing.assert_allclose(again.drift, azure2023.DRIFT, atol=5.1e-5)
    np.testing.assert_array_equal(again.input.tokens, azure2023.INPUT_TOKENS)
    np.testing.assert_array_equal(again.output.tokens, azure2023.OUTPUT_TOKENS)


@pytest.mark.parametrize("column", ["input_tokens", "output_tokens"])
def test_lengths_match_the_trace(trace, hours, column):
    drawn = np.concatenate([getattr(w, column) for w in hours])
    report = fit.compare(trace[column].to_numpy(), drawn)
    assert report["ks"] < 0.02
    assert abs(report["mean"]) < 0.01
    assert abs(report["p50"]) < 0.02 and abs(report["p90"]) < 0.03 and abs(report["p99"]) < 0.01


def test_arrivals_match_the_trace(trace, hours):
    measured = trace["arrival_s"].to_numpy()
    # One hour drawn twice differs by 3, 6 and 8 %; the limits are about twice that.
    for window_s, limit in ((1.0, 0.06), (10.0, 0.08), (60.0, 0.12)):
        drawn = np.mean([fit.index_of_dispersion(w.arrival_s, window_s) for w in hours])
        assert drawn == pytest.approx(fit.index_of_dispersion(measured, window_s), rel=limit)
    assert np.mean([fit.ks_distance(np.diff(w.arrival_s), np.diff(measured)) for w in hours]) < 0.03
    assert np.mean([w.mean_rate_rps for w in hours]) == pytest.approx(5.53, rel=0.02)


def test_drift_follows_the_hour(trace, hours):
    span = float(trace["arrival_s"].iloc[-1])
    edges = np.linspace(0.0, span, 13)
    measured = np.histogram(trace["arrival_s"], edges)[0]
    drawn = np.mean([np.histogram(w.arrival_s, edges)[0] for w in hours], axis=0)
    # Five-minute counts of about 1,600: the trace's own Poisson noise is 2.5 %.
    np.testing.assert_allclose(drawn[:-1], measured[:-1], rtol=0.1)


def test_rank_correlation_matches(trace, hours):
    drawn = np.mean([fit.spearman(w.input_tokens, w.output_tokens) for w in hours])
    measured = fit.spearman(trace["input_tokens"].to_numpy(), trace["output_tokens"].to_numpy())
    assert drawn == pytest.approx(measured, abs=0.01)


def test_published_statistics(hours):
    """The trace's statistics as published, so that this holds without the data."""
    inputs = np.concatenate([w.input_tokens for w in hours])
    outputs = np.concatenate([w.output_tokens for w in hours])
    assert np.mean(inputs) == pytest.approx(1155, rel=0.02)
    assert np.percentile(inputs, [50, 90, 99]) == pytest.approx([1020, 2735, 4142], rel=0.03)
    assert inputs.max() <= 14_050
    assert np.mean(outputs) == pytest.approx(211, rel=0.02)
    assert np.percentile(outputs, [50, 90, 99]) == pytest.approx([129, 424, 601], rel=0.03)
    dispersion = [
        np.mean([fit.index_of_dispersion(w.arrival_s, s) for w in hours]) for s in (1.0, 10.0, 60.0)
    ]
    assert dispersion == pytest.approx([1.39, 3.86, 16.1], rel=0.12)


def test_another_rate_is_the_same_pattern():
    one, other = azure_conv_2023().sample(0, 500), azure_conv_2023(11.06).sample(0, 500)
    np.testing.assert_array_equal(one.unit_times, other.unit_times)
    # A short sample has the asked rate although the hour starts slowly.
    assert azure_conv_2023(8.0).sample(0, 4000).mean_rate_rps == pytest.approx(8.0, rel=0.1)


# ---- the estimators on data of known law


def test_fit_recovers_what_was_drawn():
    truth = azure_conv_2023(20.0).sample(0, 60_000)
    again = fit.fit_trace(truth.to_frame(), num_knots=9)
    assert again.rate_rps == pytest.approx(truth.mean_rate_rps)
    assert again.spearman == pytest.approx(azure2023.SPEARMAN, abs=0.02)
    drawn = again.generator().sample(1, 20_000)
    assert fit.compare(truth.input_tokens, drawn.input_tokens)["ks"] < 0.03


@pytest.mark.parametrize("cv", [0.5, 1.0, 2.0])
def test_gap_cv_is_recovered(cv):
    times = Gamma(cv).unit_times(0, 100_000)
    flat = np.ones(5)
    # Longer windows for burstier gaps: the dispersion of counts reaches CV^2 only there.
    assert fit.fit_gap_cv(times, flat, window_gaps=100.0) == pytest.approx(cv, rel=0.1)


def test_drift_is_recovered():
    from jaxsim.workload import Modulated

    curve = np.array([0.5, 1.5, 1.0, 1.6, 0.4])
    times = Modulated(Poisson(), curve, 100_000.0).unit_times(0, 100_000)
    mean = np.trapezoid(curve) / 4
    np.testing.assert_allclose(fit.fit_drift(times, 5, bin_s=100.0), curve / mean, atol=0.03)


def test_mixture_is_recovered():
    from jaxsim.workload import LogNormalMixture

    law = LogNormalMixture(0.4, (3.0, 6.0), (0.4, 0.6), max_tokens=20_000)
    again = fit.fit_lognormal_mixture(law.quantile((np.arange(50_000) + 0.5) / 50_000))
    assert again.weight == pytest.approx(0.4, abs=0.01)
    assert again.mus == pytest.approx((3.0, 6.0), abs=0.03)
    assert again.sigmas == pytest.approx((0.4, 0.6), abs=0.03)


def test_distances_on_known_samples():
    assert fit.ks_distance([1, 2, 3, 4], [1, 2, 3, 4]) == 0.0
    assert fit.ks_distance([1, 2, 3, 4], [3, 4, 5, 6]) == 0.5
    assert fit.spearman(np.array([1, 2, 3, 4]), np.array([10, 20, 30, 45])) == pytest.approx(1.0)
    assert fit.spearman(np.array([1, 1, 2, 2]), np.array([1, 2, 1, 2])) == pytest.approx(0.0)
    assert fit.index_of_dispersion(np.arange(0.0, 100.0, 0.5), 10.0) == 0.0
    with pytest.raises(InputError, match="window_s"):
        fit.index_of_dispersion(np.arange(5.0), 3.0)
    levels = (np.arange(20_000) + 0.5) / 20_000
    assert fit.lognormal_ks(LogNormal(mu=9.0, sigma=0.5).quantile(levels)) < 0.002


def test_fit_needs_its_columns():
    with pytest.raises(InputError, match="output_tokens"):
        fit.fit_trace(pd.DataFrame({"arrival_s": [0.0], "input_tokens": [1]}))
    with pytest.raises(InputError, match="arrival_s"):
        fit.fit_trace(pd.DataFrame({"input_tokens": [1], "output_tokens": [1]}))
