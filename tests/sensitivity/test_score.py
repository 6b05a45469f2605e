"""Score functions: densities against differences of the law itself, estimates against theory and differences."""

import math

import numpy as np
import pytest
from scipy.special import ndtr
from scipy.stats import gamma

from jaxsim._core.errors import InputError
from jaxsim.engine.lower import make_workload
from jaxsim.sensitivity import score as module
from jaxsim.sensitivity.score import Estimate, estimate, score
from jaxsim.spec.scenario import Scenario
from jaxsim.study import runner

pytestmark = pytest.mark.unoptimised

LENGTHS = {"kind": "log-normal", "mean_tokens": 400, "sigma": 0.8, "max_tokens": 3000}
ENGINE = {"preset": "vllm-v1@0.9", "max_num_seqs": 1, "max_num_batched_tokens": 4096, "max_model_len": 4096,
          "num_gpu_blocks_override": 512}


def scenario(**changes) -> Scenario:
    """M/G/1: prompts alone, a service in proportion to their tokens."""
    return Scenario.from_dict({
        "schema_version": 1, "num_seeds": 16, "engine": ENGINE,
        "cost": {"kind": "fitted", "prefill": {"b": 1.25e-4}, "decode": {"a": 1.0}},
        "workload": {"kind": "poisson", "rate_rps": 10.0, "num_requests": 24, "input": LENGTHS, "output": 1}} | changes)


def test_the_score_of_whole_tokens_is_the_derivative_of_their_probability():
    """Rounded, piled up at both limits, far into both tails; and it has no mean."""
    tokens, sigma, h = np.arange(20.0, 3001.0), 0.8, 1e-5

    def shares(mu):
        above = np.where(tokens >= 3000, 1.0, ndtr((np.log(tokens + 0.5) - mu) / sigma))
        return above - np.where(tokens <= 20, 0.0, ndtr((np.log(tokens - 0.5) - mu) / sigma))

    for mu in (4.0, 5.7, 7.5):
        law = module._Law(mu, sigma, 20, 3000)
        ours = module._lognormal(tokens, law)
        theirs = (np.log(shares(mu + h)) - np.log(shares(mu - h))) / (2 * h)
        is_sound = shares(mu) > 1e-7
        assert is_sound.sum() > 1000
        assert np.allclose(ours[is_sound], theirs[is_sound], rtol=1e-3, atol=1e-3)
        assert np.isfinite(ours).all() and abs(np.sum(ours * shares(mu))) < 1e-6


def test_the_estimate_finds_known_derivatives():
    """Of the maximum of three exponential gaps, (1 + 1/2 + 1/3) / rate: elasticity -1 by the rate; of a metric that
    jumps, P(sum > 2 means of a gap), by the same: from the Erlang law."""
    rng = np.random.default_rng(0)
    gaps = rng.exponential(size=(20_000, 3))
    scores = 3 - gaps.sum(axis=1)
    jump = (gaps.sum(axis=1) > 4.0).astype(float)
    share = math.exp(-4) * (1 + 4 + 8)
    slope = -4 * (math.exp(-4) * 8) / share
    for values, truth in ((gaps.max(axis=1), -1.0), (jump, slope)):
        found = estimate(values, scores)
        assert isinstance(found, Estimate) and found.low < truth < found.high
        assert found.high - found.low < 0.2 * abs(truth) + 0.02
    values = gaps.max(axis=1)
    values[::2] = np.nan
    assert estimate(values, scores).runs == 10_000


def test_other_laws_are_refused():
    for changes, parameter, field in (
            ({}, "workload.cv", "parameter"),
            ({"workload": {"kind": "deterministic", "rate_rps": 10.0, "num_requests": 24}}, "workload.rate_rps",
             "workload.kind"),
            ({"workload": {"kind": "azure-conv-2023", "rate_rps": 10.0, "num_requests": 24}}, "workload.rate_rps",
             "workload.kind"),
            ({}, "workload.output.mean_tokens", "workload.output"),
            ({"num_seeds": 4}, "workload.rate_rps", "num_seeds")):
        with pytest.raises(InputError) as told:
            score(scenario(**changes), parameter)
        assert told.value.field == field


def test_scores_of_gaps_and_of_lengths_that_are_cut():
    """Of gamma gaps, the derivative of their log density; of outputs, with what a client's limit piles up on it."""
    for cv in (1.0, 0.5, 2.0):
        one = scenario(workload={"kind": "gamma", "cv": cv, "rate_rps": 10.0, "num_requests": 24, "input": 400,
                                 "output": 1})
        drawn = make_workload(one, 0)
        gaps, shape, h = np.diff(np.append(0.0, drawn.unit_times)), 1 / cv**2, 1e-4

        def log_density(rate, gaps=gaps, shape=shape):
            return gamma.logpdf(gaps / 10.0, shape, scale=1 / (shape * rate)).sum()

        expected = 10.0 * (log_density(10.0 + h) - log_density(10.0 - h)) / (2 * h)
        assert module.of_draws(one, "workload.rate_rps", drawn) == pytest.approx(expected, rel=1e-4, abs=1e-4)
        assert abs(expected) > 0.1
    law = {"kind": "log-normal", "mean_tokens": 60, "sigma": 0.8, "max_tokens": 500}
    one = scenario(workload={"kind": "poisson", "rate_rps": 10.0, "num_requests": 200, "input": 400, "output": law,
                             "output_limit": 100})
    drawn, mu = make_workload(one, 0), math.log(60) - 0.32
    cut = drawn.output_tokens >= 100
    assert 10 < cut.sum() < 100 and drawn.output_tokens.max() == 100
    tokens, h = drawn.output_tokens.astype(float), 1e-5

    def log_share(mu):
        above = np.where(cut, 1.0, ndtr((np.log(tokens + 0.5) - mu) / 0.8))
        return np.log(above - np.where(tokens <= 1, 0.0, ndtr((np.log(np.maximum(tokens - 0.5, 0.5)) - mu) / 0.8)))

    expected = (log_share(mu + h) - log_share(mu - h)).sum() / (2 * h)
    assert module.of_draws(one, "workload.output.mean_tokens", drawn) == pytest.approx(expected, rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("parameter", ["workload.rate_rps", "workload.input.mean_tokens"])
def test_a_queue_is_what_differences_and_theory_say(parameter):
    """M/G/1 at half load that begins empty: within the intervals of both, and near the steady state's."""
    one = scenario(num_seeds=1280)
    found = score(one, parameter)["mean_ttft_ms"]
    at, step = {"workload.rate_rps": 10.0, "workload.input.mean_tokens": 400.0}[parameter], 0.05
    sides, _ = runner.table([one.with_values({parameter: at * (1 + sign * step), "num_seeds": 160})
                             for sign in (1, -1)])
    means = sides.groupby("point")["mean_ttft_ms"].mean()
    difference = (means[0] - means[1]) / (2 * step) / means.mean()
    # Narrow enough to tell the two parameters apart, and a slope that is off by a half.
    assert found.low < difference < found.high and 0 < found.high - found.low < 0.85
    # In the steady state of half the load waits w = rate E[S^2] / (2 (1 - rho)) have d log w = 2 by the rate and 3 by
    # the mean, and service 0 and 1; less where it begins empty and no one is served before.
    assert 0.2 < difference < {"workload.rate_rps": 1.4, "workload.input.mean_tokens": 2.4}[parameter]
