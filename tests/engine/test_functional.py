"""The pure function inside other people's transformations."""


import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsim
from jaxsim import Scenario
from jaxsim.engine import functional, loop

FORM = {"a": 0.01, "b": 1e-5, "c": 1e-7, "d": 1e-5}


def scenario(**workload) -> Scenario:
    return Scenario.from_dict({
        "schema_version": 1, "num_seeds": 2, "cluster": {"replicas": 2},
        "engine": {"max_num_seqs": 8, "max_num_batched_tokens": 256, "max_model_len": 256,
                   "num_gpu_blocks_override": 24},
        "workload": {"kind": "poisson", "rate_rps": 8.0, "num_requests": 24, "input": 60,
                     "output": {"kind": "uniform", "min_tokens": 1, "max_tokens": 80}} | workload,
        "cost": {"kind": "fitted", "prefill": FORM, "decode": FORM}})


@pytest.fixture(scope="module")
def made():
    return functional.inputs(scenario())


def test_it_gives_what_simulate_gives(made):
    dims, params, requests = made
    ours = jax.jit(lambda p, r: functional.latencies(dims, p, r, functional.simulate(dims, p, r)))(params, requests)
    frame = jaxsim.simulate(scenario()).requests.query("seed == 0")
    for name in ("ttft_s", "tpot_s", "e2e_s", "queue_s"):
        assert np.allclose(getattr(ours, name), frame[name], rtol=1e-6, atol=1e-7, equal_nan=True), name
    assert ours.is_finished.all() and np.array_equal(ours.preemptions, frame["preemptions"])


def test_another_seed_is_another_workload(made):
    _, _, other = functional.inputs(scenario(), seed=1)
    assert not np.array_equal(other.arrival, made[2].arrival)


def slower(params, factor):
    """Every cost times a factor."""
    return eqx.tree_at(lambda p: p.groups[0].cost, params, replace_fn=lambda cost: jax.tree.map(
        lambda x: x * factor, cost))


def test_vmap_makes_lanes_of_one_loop(made, monkeypatch):
    """Also twice, with one argument shared: never a loop under vmap."""
    dims, params, requests = made
    lanes, run = [], loop.run

    def spy(dims, params, requests):
        lanes.append(requests.count.shape[0])
        return run(dims, params, requests)

    monkeypatch.setattr(functional.loop, "run", spy)

    def finish(max_num_seqs, factor):
        changed = slower(params, factor)
        changed = eqx.tree_at(lambda p: p.groups[0].batching.max_num_seqs, changed, max_num_seqs)
        return functional.latencies(dims, params, requests, functional.simulate(dims, changed, requests)).e2e_s

    seqs, factors = jnp.array([2, 5, 8]), jnp.array([1.0, 2.0])
    grid = jax.jit(jax.vmap(jax.vmap(finish, (None, 0)), (0, None)))(seqs, factors)
    assert lanes[-1] == 6 and grid.shape == (3, 2, 24)
    for i, j in ((0, 1), (2, 0)):
        assert np.array_equal(grid[i, j], finish(seqs[i], factors[j]))
    assert grid[0].mean() > grid[2].mean() and np.all(grid[:, 1].mean(1) > grid[:, 0].mean(1))


def test_forward_mode_where_all_arrive_at_once():
    """Costs times s are times times s: the derivative of a time by s is the time itself."""
    dims, params, requests = functional.inputs(scenario(kind="batch", rate_rps=None))

    def end_s(s):
        changed = slower(params, s)
        return functional.latencies(dims, params, requests, functional.simulate(dims, changed, requests)).e2e_s

    times, slopes = jax.jit(lambda s: jax.jvp(end_s, (s,), (jnp.float32(1.0),)))(jnp.float32(1.0))
    assert np.all(times > 0)
    assert np.allclose(slopes, times, rtol=1e-4)


def test_forward_mode_goes_under_vmap():
    """`jacfwd`, alone and over lanes, has the columns of `jvp`."""
    dims, params, requests = functional.inputs(scenario(kind="batch", rate_rps=None))

    def end_s(factors):
        changed = slower(params, factors[0] * factors[1])
        return functional.latencies(dims, changed, requests, functional.simulate(dims, changed, requests)).e2e_s

    at = jnp.array([[1.0, 1.0], [2.0, 0.5], [0.5, 3.0]])
    columns = jnp.stack([jax.jvp(end_s, (at[1],), (jnp.eye(2)[i],))[1] for i in range(2)], axis=1)
    assert np.allclose(jax.jit(jax.jacfwd(end_s))(at[1]), columns, rtol=1e-5)
    lanes = jax.jit(jax.vmap(jax.jacfwd(end_s)))(at)
    assert np.allclose(lanes[1], columns, rtol=1e-5)
    assert np.allclose(lanes[:, :, 0] * at[:, :1], lanes[:, :, 1] * at[:, 1:], rtol=1e-4)
