"""The core: known parameters come back within their standard errors, and what the data cannot tell is named."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from jaxsim._core.errors import InputError
from jaxsim.calibrate.least_squares import Parameter, Problem

pytestmark = pytest.mark.unoptimised

X = np.geomspace(1e-3, 1e3, 300)
TRUTH = {"floor": 2.0, "slope": 0.5}


def line(values, data):
    return jnp.log(values["floor"] + values["slope"] * data["x"]) - data["log_y"]


def made(x=X, noise=0.05, seed=0, outliers=0):
    rng = np.random.default_rng(seed)
    y = (TRUTH["floor"] + TRUTH["slope"] * x) * np.exp(noise * rng.standard_normal(len(x)))
    y[rng.choice(len(x), outliers, replace=False)] *= 5
    return {"x": x, "log_y": np.log(y)}


FREE = [Parameter("floor", 1.0, 0.01, 100), Parameter("slope", 1.0, 0.01, 100)]


def with_prior(width, centre=1.0):
    return [p._replace(centre=centre, width=width) for p in FREE]


def z(fit):
    return np.array([math.log(fit.values[n] / TRUTH[n]) / fit.errors[n] for n in TRUTH])


def test_known_parameters_come_back_within_their_standard_errors():
    """Over many draws of noise their distances have the size that the standard errors say."""
    draws = [made(seed=seed) for seed in range(40)]
    solver = Problem.compiled(line, FREE, {k: np.concatenate([d[k] for d in draws]) for k in draws[0]})
    draw = np.repeat(np.arange(40), len(X))
    fits = [solver.solve((draw == i).astype(float)) for i in range(40)]
    assert fits[0].converged and not fits[0].sentences() and fits[0].condition < 3
    distances = [z(fit) for fit in fits]
    assert 0.75 < np.std(distances) < 1.25 and np.abs(np.mean(distances)) < 0.35


def test_rows_that_err_together_widen_the_errors():
    """Sixty shapes, each off by 20 %: independent rows would claim too much."""
    rng = np.random.default_rng(1)
    group = np.repeat(np.arange(60), 5)[rng.permutation(300)]
    data = made(noise=0.01)
    data["log_y"] = data["log_y"] + 0.2 * rng.standard_normal(60)[group]
    solver = Problem.compiled(line, FREE, data)
    alone, together = solver.solve(), solver.solve(groups=group)
    assert all(together.errors[n] > 1.2 * alone.errors[n] for n in TRUTH)
    # The mean of sixty shapes is known to 0.2 / sqrt(60) = 0.026.
    assert all(0.018 < together.errors[n] < 0.05 for n in TRUTH) and np.abs(z(together)).max() < 3


def test_outliers_do_not_pull():
    fit = Problem.compiled(line, FREE, made(outliers=30)).solve()
    assert all(fit.values[n] == pytest.approx(TRUTH[n], rel=0.05) for n in TRUTH)


def test_a_floor_that_large_sizes_cannot_tell_is_named():
    fit = Problem.compiled(line, with_prior(0.5), made(x=np.geomspace(1e4, 1e6, 200))).solve()
    assert fit.undetermined == ("floor",) and fit.values["slope"] == pytest.approx(0.5, rel=0.02)
    # The prior stands in, with its own width.
    assert fit.values["floor"] == pytest.approx(1.0, rel=0.1) and fit.errors["floor"] == pytest.approx(0.5, rel=0.05)
    assert any(s.startswith("floor is not determined: the data leave it") for s in fit.sentences())


def test_a_parameter_no_row_depends_on_is_named():
    fit = Problem.compiled(line, [*FREE, Parameter("idle", 3.0, 0.1, 10, 3.0, 0.5)], made()).solve()
    assert fit.undetermined == ("idle",) and fit.values["idle"] == pytest.approx(3.0)
    assert "idle is not determined: no row depends on it." in fit.sentences()
    alone = Problem.compiled(line, [*FREE, Parameter("idle", 3.0, 0.1, 10)], made()).solve()
    assert math.isinf(alone.errors["idle"]) and alone.values["slope"] == pytest.approx(0.5, rel=0.02)


def test_parameters_known_only_together_are_named():
    def product(values, data):
        return jnp.log(values["one"] * values["two"] * data["x"]) - data["log_y"]

    data = {"x": X, "log_y": np.log(6 * X)}
    fit = Problem.compiled(product, [Parameter(n, 1, 0.01, 100, 1, 1.0) for n in ("one", "two")], data).solve()
    assert fit.values["one"] * fit.values["two"] == pytest.approx(6, rel=1e-3)
    assert fit.correlated[0][2] == pytest.approx(-1, abs=1e-3) and fit.condition > 1e4
    assert set(fit.undetermined) == {"one", "two"}


def test_a_prior_of_equal_weight_halves_the_way():
    """One row and a prior, both with standard deviation 0.1: the result is their mean."""
    solver = Problem.compiled(lambda v, data: jnp.log(v["p"]) - data["log_y"], [Parameter("p", 1, 0.01, 100, 1.0, 0.1)],
                     {"log_y": np.array([0.02])}, scale=0.1)
    assert math.log(solver.solve().values["p"]) == pytest.approx(0.01, rel=0.02)


def test_a_bound_is_kept_and_named():
    fit = Problem.compiled(line, [FREE[0], FREE[1]._replace(upper=0.3, start=0.2)], made()).solve()
    assert fit.bounds == {"slope": "upper"} and math.isnan(fit.errors["slope"])
    assert "slope is at its upper bound, 0.3." in fit.sentences()


def test_a_fit_cut_short_is_named():
    fit = Problem.compiled(line, [p._replace(start=90.0) for p in FREE], made()).solve(max_evaluations=2)
    assert not fit.converged and set(fit.moving) == {"floor", "slope"}
    assert fit.sentences()[0].startswith("Did not converge in 2 evaluations; still moving: ")


def test_rows_without_weight_do_not_count():
    data = made()
    half = np.arange(len(X)) % 2
    solver = Problem.compiled(line, FREE, data)
    some = Problem.compiled(line, FREE, {k: v[half == 1] for k, v in data.items()}).solve()
    assert solver.solve(half).values == pytest.approx(some.values, rel=1e-4)


def test_jax_stays_in_single_precision():
    Problem.compiled(line, FREE, made()).solve()
    assert jnp.asarray(1.0, float).dtype == jnp.float32


@pytest.mark.parametrize("parameters, field", [
    ([], "calibration parameters"), ([FREE[0]._replace(lower=0.0)], "floor"),
    ([FREE[0]._replace(start=200.0)], "floor"), ([FREE[0]._replace(width=0.0)], "floor")])
def test_parameters_that_cannot_be(parameters, field):
    with pytest.raises(InputError, match=field):
        Problem.compiled(line, parameters, made())


def test_errors_that_are_not_finite_are_refused():
    data = made()
    data["log_y"][7] = np.nan
    with pytest.raises(InputError, match="= 7: the error of this row is not finite"):
        Problem.compiled(line, FREE, data).solve()
