"""Derivatives that the loop carries along, over random scenarios full of ties, cuts and preemptions.

Seconds are linear in costs: with all costs a share longer, at the schedule as it is, every latency is so much longer.
So along the costs themselves a latency changes by itself (Euler's theorem). A replay by hand in float64, and reverse
mode over the tape, are in `tests/sensitivity/test_direct.py`.
"""

import re
from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsim.engine import functional, loop, tangents
from jaxsim.kernels.clock import Time
from tests.engine import cases as c
from tests.engine.test_compiled import computations, inner_body, large_shapes, problems, reached
from tests.reference import simulator

pytestmark = pytest.mark.unoptimised

FIELDS = 2
"""All costs at once, and the coefficient of a token of context."""


def along(params):
    """Directions in front of the axes of a batch's costs, behind its lanes."""
    floats = eqx.filter(params.groups[0].cost, eqx.is_inexact_array)
    one = jax.tree.map(lambda x: np.where(np.arange(np.shape(x)[-1]) == 2, x, 0).astype(np.float32), floats)
    return replace(params, tangents=jax.tree.map(lambda *x: np.stack(x, 1), floats, one))


def batch(name: str):
    flags, dims = simulator.preset(name), c.dims_of(name, 3)
    drawn = c.draw_many(5, flags, dims)
    params, requests = c.inputs(drawn, flags, dims, "mixed")
    return dims, params, requests, drawn


@pytest.mark.parametrize("name", ["vllm-v1", pytest.param("vllm-v0", marks=pytest.mark.slow), "sglang"])
def test_along_the_costs_latencies_change_by_themselves(name):
    dims, params, requests, drawn = batch(name)
    moving = replace(dims, num_tangents=FIELDS)
    plain = jax.device_get(loop.run(dims, params, requests))
    world = jax.device_get(loop.run(moving, along(params), requests))
    latencies = jax.device_get(jax.vmap(lambda *lane: functional.latencies(dims, *lane))(params, requests, world))
    compared, preemptions = 0, 0
    for lane, case in enumerate(drawn):
        count = len(case)
        changes = tangents.read(moving, world, lane, count)
        times = c.unpack(dims, world, lane, count)
        for ours, seconds in ((changes.queue, latencies.queue_s[lane, :count]),
                              (changes.ttft, latencies.ttft_s[lane, :count]),
                              (changes.e2e, latencies.e2e_s[lane, :count]), (changes.busy, times["busy_s"])):
            is_there = np.isfinite(seconds)
            assert np.allclose(ours[0, is_there], seconds[is_there], rtol=1e-5, atol=1e-6), lane
            assert np.all(ours[1, is_there] <= ours[0, is_there] + 1e-6)
            compared += is_there.sum()
        preemptions += times["preemptions"].sum()
    assert compared > 2000 and preemptions > 5
    # Nothing that is decided reads them.
    for one, other in zip(jax.tree.leaves(plain), jax.tree.leaves(
            replace(world, tangents=None, tangent_marks=None)), strict=True):
        assert np.array_equal(one, other, equal_nan=True)


def test_a_step_with_tangents_is_one_kernel_and_copies_nothing_large():
    dims, params, requests, _ = batch("vllm-v1")
    dims = replace(dims, num_tangents=FIELDS)
    text = loop.run.lower(dims, along(params), requests).compile().as_text()
    large, small = large_shapes(dims, c.LANES)
    assert not large & small
    kernels = re.findall(r" call\(.*?to_apply=%?([a-z]+)\S*,.*xla_cpu_small_call", text)
    assert sorted(kernels) == ["aim", "aim", "step"]
    assert problems(text, large) == []
    found = computations(text)
    assert "scatter" in {i.op for _, _, i in reached(found, inner_body(found))}


def test_an_arrival_moves_with_the_iteration_that_it_met():
    """Numbers made up here: into the first, a third into one behind it, at ends, with nothing there."""
    def time(seconds):
        return Time(jnp.float32(seconds), jnp.float32(0))

    def one(x):
        return jnp.array([x], jnp.float32)

    own = tangents.Tangents(Time(one(100.0), one(0.0)), one(8.0), one(4.0), one(0.5))
    empty = c.w.empty_clocks(c.dims_of("vllm-v1", 1)).batch
    batch = replace(empty, start=time(10.0), first=time(2.0), pace=time(1.0), growth_s=jnp.float32(0.5))
    # Iterations end at 12, 13, 14.5, 16.5.
    for now, expected in ((10.0, 100.0), (11.0, 104.0), (12.0, 108.0), (13.0, 112.0),
                          (13.5, 112.0 + 4.5 / 3), (14.5, 116.5), (16.5, 121.5)):
        moved = tangents.at_arrival(own, jnp.bool_(True), time(now), batch)
        assert float(moved.hi[0]) == pytest.approx(expected, rel=1e-6), now
    assert float(tangents.at_arrival(own, jnp.bool_(False), time(99.0), batch).hi[0]) == 100.0
    instant = replace(batch, first=time(0.0))
    assert float(tangents.at_arrival(own, jnp.bool_(True), time(10.0), instant).hi[0]) == 108.0
