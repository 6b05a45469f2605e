"""Steady states: queueing theory, the event engine, gradients against differences, laws."""

import equinox as eqx
import jax
import jax.flatten_util
import jax.numpy as jnp
import msgspec
import numpy as np
import pytest

from jaxsim._core.errors import InputError
from jaxsim.analytic import (
    Executor,
    Load,
    capacity_rps,
    highest_rate,
    load_of,
    of_scenario,
    steady_state,
    steady_states,
)
from jaxsim.cost.fitted import fitted
from jaxsim.engine.lower import make_workload
from jaxsim.spec.scenario import Scenario
from jaxsim.study import runner

pytestmark = pytest.mark.unoptimised

BASE = {
    "schema_version": 1, "engine": {"max_num_seqs": 64, "num_gpu_blocks_override": 4096, "max_model_len": 8192},
    "num_seeds": 4, "warmup_s": 20.0,
    "cost": {"kind": "fitted", "prefill": [{"a": 0.003, "b": 2e-5, "e": 1e-10}],
             "decode": [{"a": 0.008, "c": 1e-7, "d": 1e-4}]},
    "workload": {"kind": "poisson", "rate_rps": 4.0, "num_requests": 1500, "input": {
        "kind": "log-normal", "mean_tokens": 400, "sigma": 0.6, "max_tokens": 2048}, "output": {
        "kind": "log-normal", "mean_tokens": 120, "sigma": 0.6, "max_tokens": 1024}}}
STATE = eqx.filter_jit(steady_state)
STATES = eqx.filter_jit(steady_states)
CAPACITY = eqx.filter_jit(capacity_rps)


def at_rate(rate: float, **engine) -> Scenario:
    scenario = Scenario.from_dict({**BASE, "engine": {**BASE["engine"], **engine}})
    return msgspec.structs.replace(scenario, workload=msgspec.structs.replace(scenario.workload, rate_rps=rate))


def executor_of(decode, prefill=(0.0, 0.0, 0.0, 0.0, 0.0), max_num_seqs=64.0, kv_tokens=1e6) -> Executor:
    numbers = (max_num_seqs, 2048.0, kv_tokens, 16.0, 8192.0, 1.0, 0.0, 1.0)
    return Executor(fitted([prefill], [decode]), *(jnp.asarray(x, float) for x in numbers), num_batches=65)


# Theory

def test_many_servers_have_a_poisson_number_of_sequences():
    """Where a step takes as long for any batch nobody waits: the mean is Little's law at that very time."""
    state = STATE(executor_of((0.01, 0, 0, 0, 0)), Load.of(2.0, 10.0, 501.0))
    assert float(state.tpot_s) == pytest.approx(0.01, rel=1e-4)
    assert float(state.running) == pytest.approx(2.0 * 500 * 0.01, rel=1e-4)


def test_a_step_in_proportion_to_its_batch_is_processor_sharing():
    """M/G/1 with processor sharing: E[N] = rho / (1 - rho), whatever the law of the work."""
    executor = executor_of((0, 0, 0, 1e-4, 0))
    for sd in (0.0, 3000.0):
        state = STATE(executor, Load.of(1.2, 10.0, 5001.0, output_sd=sd))
        assert float(state.running + state.waiting) == pytest.approx(0.6 / 0.4, rel=1e-3)


def test_one_at_a_time_waits_as_in_a_queue_of_one_server():
    """One slot, memoryless by the product form: M/M/1."""
    state = STATE(executor_of((0.001, 0, 0, 0, 0), max_num_seqs=1.0), Load.of(1.2, 10.0, 501.0))
    assert float(state.waiting) == pytest.approx(0.6**2 / 0.4, rel=1e-3)
    assert float(state.slot_s) == pytest.approx(0.6 * 0.5 / 0.4, rel=1e-3)


def test_moments_of_a_decoding_sequence():
    """Its context on average, met at a random instant."""
    rng = np.random.default_rng(0)
    prompt = rng.integers(1, 500, 100_000)
    output = np.maximum(prompt // 2 + rng.integers(0, 300, 100_000), 1)
    met = rng.choice(len(prompt), 200_000, p=output / output.sum())
    context = prompt[met] + output[met] * rng.random(len(met))
    correlation = np.corrcoef(prompt, output)[0, 1]
    load = Load.of(1.0, prompt.mean(), output.mean(), input_sd=prompt.std(), output_sd=output.std(),
                   correlation=correlation)
    assert float(load.decode_context) == pytest.approx(context.mean(), rel=0.01)
    assert float(load.longest_held) == pytest.approx((prompt + output)[met].mean(), rel=0.01)
    workload = make_workload(at_rate(4.0), 0)
    assert float(load_of(workload).rate_rps) == pytest.approx(4.0, rel=0.1)


# The event engine

RATES = (1.0, 4.0, 8.0, 10.0)


@pytest.fixture(scope="module")
def compared():
    """Rates up to nine tenths of what can be served, and one beyond."""
    executor, load = of_scenario(at_rate(1.0))
    scenarios = [at_rate(rate) for rate in (*RATES, 40.0)]
    scenarios[-1] = msgspec.structs.replace(scenarios[-1], warmup_s=0.0)
    frame, refused = runner.table(scenarios)
    assert not refused
    return executor, load, frame.groupby("point").mean(numeric_only=True)


def test_latencies_are_those_of_the_engine(compared):
    executor, load, simulated = compared
    for point, rate in enumerate(RATES):
        state, run = STATE(executor, load.at_rate(rate)), simulated.loc[point]
        assert 1e3 * float(state.tpot_s) == pytest.approx(run["mean_tpot_ms"], rel=0.04), rate
        assert 1e3 * float(state.ttft_s) == pytest.approx(run["mean_ttft_ms"], rel=0.08), rate
        assert float(state.e2e_s) == pytest.approx(float(state.ttft_s + (load.output_tokens - 1) * state.tpot_s))


def test_more_than_can_be_served_is_not_steady(compared):
    executor, load, simulated = compared
    state = STATE(executor, load.at_rate(40.0))
    assert not bool(state.is_stable) and np.isinf(state.ttft_s) and np.isfinite(state.tpot_s)
    # A run begins empty and ends empty, so it serves somewhat less.
    served = simulated.loc[len(RATES)]["request_throughput"]
    assert served == pytest.approx(float(state.capacity_rps), rel=0.12)
    assert float(CAPACITY(executor, load)) == pytest.approx(float(state.capacity_rps), rel=1e-5)


# Derivatives

@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


def test_gradients_are_differences(float64):
    """Of every output by every number; lengths off the grid, where seconds have kinks."""
    cost = fitted([(0.003, 2e-5, 0, 0, 1e-10)], [(0.008, 0, 1e-7, 1e-4, 0)])
    cost = eqx.tree_at(lambda c: c.coefficients, cost, jnp.asarray(np.asarray(cost.coefficients, np.float64)))
    numbers = (64.0, 2048.0, 9000.0, 16.0, 8192.0, 2.0, 0.01, 1.0)
    executor = Executor(cost, *(jnp.asarray(x) for x in numbers), num_batches=65)
    load = Load.of(14.0, 403.3, 121.7, input_sd=200.0, output_sd=80.0)
    numeric, rest = eqx.partition((executor, load), eqx.is_inexact_array)
    flat, unflatten = jax.flatten_util.ravel_pytree(numeric)

    def of(flat):
        state = steady_state(*eqx.combine(unflatten(flat), rest))
        return jnp.stack([state.tpot_s, state.ttft_s, state.running, state.waiting, state.utilisation, state.kv_share,
                          state.capacity_rps])

    sizes = 1e-6 * np.maximum(np.abs(np.asarray(flat)), 1e-5)
    # One row at a time: a batched program takes twice as long to compile.
    value, pulled = jax.jit(of), jax.jit(lambda flat, weights: jax.vjp(of, flat)[1](weights)[0])
    backward = np.stack([pulled(flat, weights) for weights in np.eye(7)])
    above, below = (np.stack([value(flat + row) for row in sign * np.diag(sizes)]) for sign in (1, -1))
    difference = ((above - below) / (2 * sizes[:, None])).T
    # What rounding of float64 leaves in a difference.
    noise = 1e-14 * np.abs(above).T / sizes
    assert np.all(np.abs(backward - difference) <= 2e-4 * np.abs(difference) + noise)
    # Rate, lengths, limits and coefficients all matter, and by more than the noise.
    assert np.mean((np.abs(difference) > 100 * noise).any(axis=0)) > 0.6


def test_the_highest_rate_meets_its_limit(float64):
    executor = executor_of((0.008, 0, 1e-7, 1e-4, 0), (0.003, 2e-5, 0, 0, 1e-10))
    load = Load.of(1.0, 403.3, 121.7, input_sd=200.0, output_sd=80.0)

    @jax.jit
    @jax.value_and_grad
    def find(tpot_s, ttft_s):
        return highest_rate(executor, load, tpot_s=tpot_s, ttft_s=ttft_s)

    tpot_s, ttft_s = (0.012, 0.01201, 0.01199, 0.001, 10.0, 0.012), (10.0, 10.0, 10.0, 10.0, 1e9, 0.02)
    rates, slopes = (jnp.stack(x) for x in zip(*map(find, tpot_s, ttft_s), strict=True))
    states = STATES(executor, load, rates)
    assert float(states.tpot_s[0]) == pytest.approx(0.012, rel=1e-6)
    assert float(slopes[0]) == pytest.approx(float(rates[1] - rates[2]) / 2e-5, rel=1e-3)
    assert float(rates[3]) == 0.0 and float(rates[4]) == pytest.approx(float(states.capacity_rps[0]))
    # There the other limit binds.
    assert 0 < float(rates[5]) < float(rates[0]) and float(states.ttft_s[5]) == pytest.approx(0.02, rel=1e-6)


# Laws

def test_more_arrivals_never_speed_anything_up(compared):
    executor, load, _ = compared
    capacity = float(CAPACITY(executor, load))
    rates = jnp.linspace(0.01, 1.2, 60) * capacity
    states = STATES(executor, load, rates)
    for name in ("tpot_s", "ttft_s", "e2e_s", "running", "waiting", "utilisation", "kv_share"):
        values = np.asarray(getattr(states, name))
        assert np.all(np.diff(values[np.isfinite(values)]) >= -1e-5 * np.abs(values[np.isfinite(values)][1:])), name
    assert np.array_equal(np.asarray(states.is_stable), np.asarray(rates) < capacity)
    one = STATE(executor, load.at_rate(rates[20]))
    assert float(one.tpot_s) == pytest.approx(float(states.tpot_s[20]), rel=1e-5)


def test_room_never_harms(compared):
    executor, load, _ = compared
    kv = jnp.asarray([1000.0, 4000.0, 16000.0, 65536.0])
    slots = jnp.asarray([1.0, 4.0, 16.0, 64.0])
    by_kv, by_slots = (jax.jit(jax.vmap(lambda x, name=name: capacity_rps(
        eqx.tree_at(lambda e: getattr(e, name), executor, x), load)))(values)
        for name, values in (("kv_tokens", kv), ("max_num_seqs", slots)))
    for capacities in (by_kv, by_slots):
        assert np.all(np.diff(np.asarray(capacities)) >= 0) and capacities[-1] > 2 * capacities[0]


def test_executors_share_the_arrivals(compared):
    executor, load, _ = compared
    two = eqx.tree_at(lambda e: e.num_executors, executor, jnp.asarray(2.0))
    one, both = STATE(executor, load.at_rate(5.0)), STATE(two, load.at_rate(10.0))
    assert float(both.tpot_s) == pytest.approx(float(one.tpot_s), rel=1e-5)
    assert float(both.running) == pytest.approx(2 * float(one.running), rel=1e-5)


def test_what_has_no_rate_is_refused():
    scenario = Scenario.from_dict({**BASE, "warmup_s": 0.0, "workload": {
        "kind": "batch", "num_requests": 10, "input": 10, "output": 10}})
    with pytest.raises(InputError, match="no rate of arrivals"):
        of_scenario(scenario)
    with pytest.raises(InputError, match="is not positive"):
        Load.of(0.0, 1.0, 1.0)
    with pytest.raises(InputError, match="does not hold max_num_seqs"):
        of_scenario(at_rate(1.0), num_batches=8)
