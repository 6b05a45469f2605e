"""Sources of requests: the closed loop against the reference on the arrivals it came to; stretched open arrivals."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsim
from jaxsim import Scenario
from jaxsim.engine import loop
from jaxsim.kernels import clock
from jaxsim.policy.arrivals import ClosedLoop, SortedArrivals
from jaxsim.state.requests import pack_requests
from tests.engine import cases as c
from tests.reference import simulator


@pytest.mark.slow
@pytest.mark.parametrize("name, num_executors", [("vllm-v1", 1), ("vllm-v0", 3)])
def test_a_closed_loop_is_the_open_loop_of_the_arrivals_it_came_to(name, num_executors):
    """Bit for bit: without think time every arrival but the first ties with the end that brought it about."""
    flags, dims = simulator.preset(name), c.dims_of(name, num_executors)
    batch = c.draw_many(7, flags, dims)
    params, requests = c.inputs(batch, flags, dims, "mixed")
    rng = np.random.default_rng(1)
    clients = rng.integers(1, 12, len(batch)).astype(np.int32)
    think = np.where(rng.random(len(batch)) < 0.5, 0, rng.integers(0, 8, len(batch)) / 4).astype(np.float32)
    source = ClosedLoop(jnp.asarray(clients), jnp.asarray(think))
    world = jax.device_get(loop.run(dims, replace(params, source=source), requests))
    assert world.fault.max() == 0
    ties = 0
    for lane, (case, seats) in enumerate(zip(batch, clients, strict=True)):
        ours, count = c.unpack(dims, world, lane, len(case)), len(case)
        arrival = clock.join_reference(*world.due[lane, :count].T)
        ends = np.sort(ours["finish_s"])
        assert np.array_equal(arrival[:seats], case.arrival_s[:seats])
        assert np.array_equal(np.sort(arrival[seats:]), ends[:max(count - seats, 0)] + think[lane])
        assert np.all(np.diff(arrival[seats:]) >= 0)
        if np.any(np.diff(arrival) < 0):
            continue  # the reference numbers requests by arrival
        replayed = c.reference(replace(case, arrival_s=arrival), flags, dims, "mixed")
        assert c.differences(ours, c.answer(replayed, dims.num_executors, case.limits["num_blocks"])) == []
        ties += np.isin(arrival, ends).sum()
    assert ties > 50


def test_stretching_is_rounding_the_product():
    """Times of a month against float64, and a factor of one changes nothing at all."""
    rng = np.random.default_rng(0)
    arrival_s = clock.round_arrivals_reference(np.cumsum(rng.exponential(10.0 ** rng.uniform(-3, 4, 500))))
    requests = jax.tree.map(jnp.asarray, pack_requests(arrival_s, np.ones(500, int), np.ones(500, int),
                                                       num_requests=512))
    stretch = jax.jit(lambda requests, factor: SortedArrivals(factor).prepare(requests).arrival)
    same = stretch(requests, jnp.float32(1))
    assert np.array_equal(same, requests.arrival)
    for factor in (0.125, 3.0, np.float32(0.3), np.float32(1.7e-3)):
        got = np.asarray(stretch(requests, jnp.float32(factor)))
        ours = clock.join_reference(*got[:500, :3].T)
        assert np.all(np.abs(ours - arrival_s * float(factor)) <= 0.51 * clock.ARRIVAL_GRID_S)
        assert np.all(got[:500, 1] < clock.EPOCH_S) and np.all(got[:500, 1] >= 0)
        assert np.all(np.isinf(got[500:, 1])) and np.array_equal(got[1:, :3], got[:-1, 3:])


@pytest.mark.slow
def test_a_traced_rate_is_that_rate():
    """Stretched arrivals give what arrivals at that rate give."""
    flags, dims = simulator.preset("vllm-v1"), c.dims_of("vllm-v1", 3)
    batch = c.draw_many(9, flags, dims)
    params, requests = c.inputs(batch, flags, dims, "mixed")
    factor = 2.0 ** np.random.default_rng(0).integers(-2, 3, len(batch))
    source = SortedArrivals(jnp.asarray(factor, jnp.float32))
    traced = jax.device_get(loop.run(dims, replace(params, source=source), requests))
    given = [replace(case, arrival_s=case.arrival_s * f) for case, f in zip(batch, factor, strict=True)]
    for lane, (case, want) in enumerate(zip(batch, c.simulate(given, flags, dims, "mixed"), strict=True)):
        assert c.differences(c.unpack(dims, traced, lane, len(case)), want) == []


def test_clients_of_a_scenario():
    """From the file to the frame: as many requests in the system as there are clients, until no more are sent."""
    form = {"a": 0.01, "b": 1e-5, "c": 1e-7, "d": 1e-5}
    made = Scenario.from_dict({
        "schema_version": 1, "num_seeds": 2, "cluster": {"replicas": 2},
        "engine": {"max_num_seqs": 4, "max_num_batched_tokens": 256, "max_model_len": 256,
                   "num_gpu_blocks_override": 40},
        "workload": {"kind": "closed-loop", "concurrency": 12, "think_s": 0.25, "num_requests": 200, "input": 60,
                     "output": {"kind": "uniform", "min_tokens": 1, "max_tokens": 80}},
        "cost": {"kind": "fitted", "prefill": form, "decode": form}})
    result = jaxsim.simulate(made)
    assert not result.faults
    for _, frame in result.requests.groupby("seed"):
        arrival = np.sort(frame["arrival_s"])
        finish = np.sort(frame["arrival_s"] + frame["e2e_s"])
        assert np.all(arrival[:12] == 0)
        assert np.allclose(arrival[12:], finish[:-12] + 0.25, atol=1e-6)
