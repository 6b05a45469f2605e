"""Relaxed attainment: the hard one as the temperature falls, slopes against differences, nothing lost at NaN."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsim._core.errors import InputError
from jaxsim.sensitivity.relaxed import attainment, hard, limits_s, slope
from jaxsim.spec.sections import SloSection
from jaxsim.spec.workload import TenantSection

LIMITS = {"ttft": 0.3, "tpot": 0.02, "e2e": 4.0}


def latencies(seed: int = 0) -> dict[str, np.ndarray]:
    """Two runs of 500, some of one token (no TPOT) and some without an answer."""
    rng = np.random.default_rng(seed)
    ttft, tpot = 0.3 * rng.lognormal(-0.5, 0.8, (2, 500)), 0.02 * rng.lognormal(-0.3, 0.4, (2, 500))
    tpot[:, :40] = np.nan
    e2e = ttft + 100 * np.nan_to_num(tpot)
    for values in (ttft, tpot, e2e):
        values[:, 40:60] = np.nan
    return {"ttft": ttft, "tpot": tpot, "e2e": e2e}


def test_it_goes_to_the_hard_one_as_the_temperature_falls():
    found = latencies()
    exact = hard(found, LIMITS)
    # By hand: answered, and nothing over its limit.
    by_hand = np.mean([[np.isfinite(e) and t <= 0.3 and not p > 0.02 and e <= 4 for t, p, e in zip(*rows, strict=True)]
                       for rows in zip(found["ttft"], found["tpot"], found["e2e"], strict=True)], axis=1)
    assert np.allclose(exact, by_hand) and 0.2 < exact.min() < exact.max() < 0.9
    gaps = [np.abs(attainment(found, LIMITS, t) - exact).max() for t in (0.3, 0.1, 0.03, 0.01, 1e-3, 1e-4)]
    assert all(a > b for a, b in zip(gaps, gaps[1:], strict=False)), gaps
    assert gaps[0] > 0.02 and gaps[-1] < 1e-3
    # One at its limit counts a half, one a temperature over it 1 / (1 + e).
    one = {name: np.array([value]) for name, value in {"ttft": 0.33, "e2e": 1.0}.items()}
    assert float(attainment(one, {"ttft": 0.33})) == pytest.approx(0.5)
    assert float(attainment(one, {"ttft": 0.3}, 0.1)) == pytest.approx(1 / (1 + np.e), rel=1e-5)


def test_slopes_are_differences_and_finite():
    """By a factor on all times; NaN and infinite latencies have none."""
    with jax.enable_x64(True):
        found = {name: jnp.asarray(value) for name, value in latencies(1).items()}
        value, along = slope(found, found, LIMITS, 0.1)
        h = 1e-6
        sides = [attainment({n: v * (1 + s * h) for n, v in found.items()}, LIMITS, 0.1) for s in (1, -1)]
        assert np.allclose(along, (sides[0] - sides[1]) / (2 * h), rtol=1e-6)
        assert np.all(along < -0.05) and np.allclose(value, attainment(found, LIMITS, 0.1))
        backward = jax.grad(lambda v: attainment({"e2e": v}, {"e2e": 4.0}).sum())(found["e2e"])
        assert np.isfinite(backward).all() and np.count_nonzero(backward[:, 40:60]) == 0


def test_what_it_refuses():
    assert limits_s(SloSection(ttft_ms=300.0, e2e_ms=4000.0)) == {"ttft": 0.3, "e2e": 4.0}
    for tenants in ((), (TenantSection(name="a"),)):
        with pytest.raises(InputError, match="no limits"):
            limits_s(SloSection(), tenants)
    with pytest.raises(InputError, match="temperature"):
        attainment(latencies(), LIMITS, 0.0)


def test_each_request_keeps_the_limit_of_its_own():
    """As if each were alone with its limits; one that has none misses nothing and adds no slope."""
    found = {name: value[0] for name, value in latencies().items()}
    own = np.where(np.arange(500) % 3 == 0, 0.2, np.where(np.arange(500) % 3 == 1, 0.4, np.inf))
    parts = [(own == limit, limit) for limit in (0.2, 0.4)]
    answered = np.isfinite(found["e2e"])
    apart = sum(attainment({n: v[is_in] for n, v in found.items()}, {"ttft": limit}) * is_in.sum()
                for is_in, limit in parts) + (answered & np.isinf(own)).sum()
    assert float(attainment(found, {"ttft": own})) == pytest.approx(float(apart) / 500, rel=1e-5)
    met = np.mean(answered & (found["ttft"] <= own))
    assert float(hard(found, {"ttft": own})) == pytest.approx(met) and 0.3 < met < 0.9
    backward = jax.grad(lambda v: attainment(found | {"ttft": v}, {"ttft": own}).sum())(jnp.asarray(found["ttft"]))
    assert np.isfinite(backward).all() and np.count_nonzero(backward[np.isinf(own)]) == 0
    assert np.count_nonzero(backward) > 200
