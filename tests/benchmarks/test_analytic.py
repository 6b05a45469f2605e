"""What `jaxsim bench --suite analytic` measures is what the models say, tile by tile."""

import jax
import numpy as np
import pytest

from jaxsim.bench import analytic
from jaxsim.cost.base import BatchStats
from jaxsim.cost.roofline import roofline
from jaxsim.spec.device import load_device
from jaxsim.spec.model import load_model

pytestmark = [pytest.mark.unoptimised, pytest.mark.slow]


@pytest.mark.parametrize("name", ["genz", "ideal", "roofline"])
def test_tiles_change_nothing(monkeypatch, name):
    monkeypatch.setattr(analytic, "TILE", 8)
    question = analytic.QUESTIONS[name](32, np.random.default_rng(1))
    values, slopes = jax.jit(analytic.tiled(jax.value_and_grad(question.seconds)))(question.numbers)
    assert values.shape == (32,) and np.all(values > 1e-3) and len(set(np.asarray(values))) > 30
    assert np.asarray(values) == pytest.approx(np.asarray(jax.vmap(question.seconds)(question.numbers)), rel=1e-5)
    assert all(np.isfinite(leaf).all() and leaf.shape[0] == 32 for leaf in jax.tree.leaves(slopes))


def test_a_roofline_is_that_of_the_engine():
    """Of an H100 as it is: the decode step that `Roofline.explain` tells."""
    question = analytic.roofline_question(1, np.random.default_rng(0))
    cost = roofline(load_model(analytic.MODEL), load_device(analytic.DEVICE), analytic.PLAN)
    leaves = jax.tree.map(jax.numpy.asarray, analytic.eqx.partition(cost, analytic.eqx.is_inexact_array)[0])
    found = question.seconds((leaves, jax.numpy.float32(32), jax.numpy.float32(900)))
    told = cost.explain(BatchStats.of(num_decode=32, decode_context=32 * 900))
    assert float(found) == pytest.approx(float(told.seconds), rel=1e-4)


def test_the_suite_reports_every_case(monkeypatch):
    monkeypatch.setattr(analytic, "TILE", 64)
    row = analytic.measured("genz", 256, 2)
    assert row["gradient_ratio"] > 0 and row["numbers"] == 10 and len(row["value_s"]) == 2
    report = {"results": [row, {"name": "ideal", "error": "ended with 1"}], "duration_s": 1.0,
              "machine": {"cpu": "a processor", "jax": "1", "python": "3"}}
    analytic.show(report)
