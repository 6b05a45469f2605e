"""Deployments as named numbers: derivatives against differences, both modes, edges where quotients would be none."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsim._core.errors import InputError
from jaxsim.analytic import Measures, deployment, of_scenario, steady_state
from jaxsim.spec.scenario import Scenario

pytestmark = pytest.mark.unoptimised

A30 = {"name": "a30-like", "numbers": {"memory_bytes_per_s": 9.33e11, "memory_bytes": 25769803776,
                                       "bf16_flops": 1.65e14,
                                       "power": {"idle_w": 30.0, "busy_w": 165.0}, "usd_per_h": 0.6}}


def scenario(**changes) -> Scenario:
    return Scenario.from_dict({
        "schema_version": 1, "engine": {"max_num_seqs": 24, "num_gpu_blocks_override": 500, "max_model_len": 2048},
        "cluster": {"replicas": 2},
        "cost": {"kind": "fitted", "prefill": {"a": 0.003, "b": 2e-5, "e": 1e-10},
                 "decode": {"a": 0.008, "c": 1e-7, "d": 1e-4}},
        "workload": {"kind": "poisson", "rate_rps": 8.0, "num_requests": 200, "input": {
            "kind": "log-normal", "mean_tokens": 300, "sigma": 0.6, "max_tokens": 1024}, "output": {
            "kind": "log-normal", "mean_tokens": 90, "sigma": 0.6, "max_tokens": 512}}} | changes)


@pytest.fixture(scope="module")
def made():
    """In 64 bits: programs of all measures by all numbers, forward and reverse, and of measures alone."""
    with jax.enable_x64(True):
        deployed = deployment(scenario(device=A30))
        numbers = {name: jnp.asarray(value, jnp.float64) for name, value in deployed.numbers.items()}

        def measures(numbers):
            return jnp.stack(deployed.measures(numbers))

        yield numbers, jax.jit(measures), jax.jit(jax.jacrev(measures)), jax.jit(
            lambda n, t: jax.jvp(measures, (n,), (t,))[1])


@pytest.mark.slow
def test_measures_are_those_of_the_steady_state(made):
    """And energy and cost those of a run's two states and of the price."""
    numbers, measures, *_ = made
    found = Measures(*map(float, measures(numbers)))
    state = steady_state(*of_scenario(scenario(device=A30)))
    for name in ("ttft_s", "tpot_s", "running", "utilisation", "capacity_rps", "output_tokens_per_s"):
        assert getattr(found, name) == pytest.approx(float(getattr(state, name)), rel=1e-4), name
    assert found.power_w == pytest.approx(2 * (30 + 135 * found.utilisation))
    assert found.energy_j_per_output_token == pytest.approx(found.power_w / found.output_tokens_per_s)
    assert found.usd_per_million_output_tokens == pytest.approx(2 * 0.6 / 3600 / found.output_tokens_per_s * 1e6)


@pytest.mark.slow
def test_gradients_are_differences_in_both_modes(made):
    """Every measure by every number that is one; of tables, along all entries together."""
    numbers, measures, reverse, forward = made
    slopes, count = reverse(numbers), 0
    rng = np.random.default_rng(0)
    for name, value in numbers.items():
        way = jnp.asarray(rng.uniform(0.5, 1.5, np.shape(value))) * value
        if not np.any(way):
            continue
        count += 1
        zero = {n: jnp.zeros_like(v) for n, v in numbers.items()}
        along = np.asarray(forward(numbers, zero | {name: way}))
        backward = np.asarray([jnp.sum(row * way) for row in slopes[name]])
        assert np.allclose(along, backward, rtol=1e-9, atol=1e-12), name
        # Two sizes: beside a kink, which whole tokens have, one of them is free of it.
        differences = [np.asarray((measures(numbers | {name: value + h * way}) - measures(numbers | {
            name: value - h * way})) / (2 * h)) for h in (1e-6, 1e-7)]
        scale = np.abs(np.asarray(measures(numbers)))
        errors = np.min([np.abs(d - along) for d in differences], axis=0)
        assert np.all(errors <= 1e-5 * np.abs(along) + 1e-7 * scale), (name, along, differences)
    assert count >= 15


@pytest.mark.slow
@pytest.mark.parametrize("case", ["no arrivals", "saturated", "one token", "an empty queue", "a tie"])
def test_no_derivative_is_lost_at_an_edge(made, case):
    """Finite everywhere, but of what is infinite itself; without arrivals it is the one from the right."""
    numbers, measures, reverse, _ = made
    rate = {"no arrivals": 0.0, "saturated": 1e3, "an empty queue": 1e-3}.get(case, 8.0)
    # Of one type with the other cases', so that all of them are one program.
    numbers = numbers | {"load.rate_rps": jnp.asarray(rate, jnp.float64)}
    if case == "one token":
        numbers |= dict.fromkeys(("load.output_tokens", "load.output_square"), jnp.asarray(1.0, jnp.float64))
        numbers |= {"load.input_output": numbers["load.input_tokens"]}
    if case == "a tie":
        # Room for just as many sequences as may run.
        held = float(numbers["executor.kv_tokens"]) / 24
        context = (float(numbers["load.input_output"]) + 0.5 * float(numbers["load.output_square"])) / float(
            numbers["load.output_tokens"])
        numbers |= {"executor.block_size": jnp.asarray(2 * (held - context), jnp.float64)}
    value, slopes = Measures(*map(float, measures(numbers))), reverse(numbers)
    for index, name in enumerate(Measures._fields):
        for by, slope in slopes.items():
            assert np.all(np.isfinite(slope[index])), (name, by)
    if case == "no arrivals":
        assert np.isinf(value.energy_j_per_output_token) and value.running < 1e-3
        near = (measures(numbers | {"load.rate_rps": jnp.asarray(1e-2, jnp.float64)}) - measures(numbers)) / 1e-2
        for name in ("tpot_s", "ttft_s", "utilisation", "running"):
            index = Measures._fields.index(name)
            assert float(slopes["load.rate_rps"][index]) == pytest.approx(float(near[index]), rel=0.02), name
            assert float(near[index]) > 0
    if case == "saturated":
        with pytest.raises(InputError, match="no elasticity"):
            deployment(scenario(device=A30)).elasticities("ttft_s", {"load.rate_rps": jnp.asarray(1e3)})
        assert np.isinf(value.ttft_s) and value.utilisation > 0.99


def test_named_gradients_and_what_they_refuse():
    known = deployment(scenario(device=A30))
    found = known.elasticities("tpot_s")
    assert list(found.values()) == sorted(found.values(), key=lambda x: -abs(x))
    # Every second is a coefficient, so all of them together, at a rate less by as much, change a time by as much.
    assert found["kernels.coefficients"] - found["load.rate_rps"] == pytest.approx(1.0, rel=1e-3)
    with pytest.raises(InputError, match="tpot_s"):
        known.gradient("tpot_ms")
    with pytest.raises(InputError, match="load.rate_rps"):
        known.measures({"rate_rps": 3.0})
    with pytest.raises(InputError, match="device.power"):
        deployment(scenario()).gradient("power_w")
    with pytest.raises(InputError, match="rate of arrivals"):
        deployment(scenario(workload={"kind": "batch", "num_requests": 8}))


OF_KERNELS = ("tpot_s", "ttft_s", "utilisation", "capacity_rps", "running")


@pytest.fixture(scope="module")
def of_kernels():
    """In 64 bits, of a roofline: programs of some measures by all numbers, and forward and reverse."""
    with jax.enable_x64(True):
        deployed = deployment(scenario(
            cost={"kind": "roofline"}, model={"name": "llama-3.1-8b"}, device={"name": "h100"},
            engine={"max_num_seqs": 24, "max_model_len": 2048, "async_scheduling": False}))
        numbers = {name: jnp.asarray(np.asarray(value, np.float64)) for name, value in deployed.numbers.items()}

        def measures(numbers):
            found = deployed.measures(numbers)
            return jnp.stack([getattr(found, name) for name in OF_KERNELS])

        yield numbers, jax.jit(measures), jax.jit(lambda n, w: jax.vjp(measures, n)[1](w)[0]), jax.jit(
            lambda n, t: jax.jvp(measures, (n,), (t,))[1])


@pytest.mark.slow
def test_gradients_of_kernels_are_differences(of_kernels):
    """Of a roofline, in 64 bits: every constant of its operators, by reverse mode at once."""
    numbers, measures, reverse, _ = of_kernels
    here, slopes, count = measures(numbers), [reverse(numbers, jnp.eye(len(OF_KERNELS))[i]) for i in range(2)], 0
    for name, value in numbers.items():
        if not (name.startswith("kernels") and float(value)):
            continue
        h = 1e-5 * float(value)
        changes = (measures(numbers | {name: value + h}) - measures(numbers | {name: value - h})) / (2 * h)
        for i in range(2):
            slope, change, scale = float(slopes[i][name]), float(changes[i]), float(here[i]) / abs(float(value))
            assert abs(slope - change) <= 1e-3 * abs(change) + 1e-6 * scale, (name, i, slope, change)
            count += abs(slope) > 1e-3 * scale
    assert count >= 12


@pytest.mark.slow
def test_gradients_of_kernels_hold_at_edges(of_kernels):
    """Of a roofline in both modes: without arrivals, beyond the capacity, of one token; finite, alike, and differences
    along all kernels together where these are no kink."""
    numbers, measures, reverse, forward = of_kernels
    rng, moved = np.random.default_rng(0), 0
    way = {name: jnp.where(jnp.isfinite(value), value * rng.uniform(0.5, 1.5), 0.0) if name.startswith("kernels")
           else jnp.zeros_like(value) for name, value in numbers.items()}
    one_token = {"load.output_tokens": 1.0, "load.output_square": 1.0,
                 "load.input_output": float(numbers["load.input_tokens"])}
    for case in ({"load.rate_rps": 0.0}, {"load.rate_rps": 1e4}, one_token, {}):
        # Of one type with the usual numbers, so that all cases are one program.
        at = numbers | {name: jnp.asarray(value, jnp.float64) for name, value in case.items()}
        along = np.asarray(forward(at, way))
        above, below = (np.asarray(measures({n: v + sign * 1e-6 * way[n] for n, v in at.items()}))
                        for sign in (1, -1))
        for index, name in enumerate(OF_KERNELS):
            slopes = reverse(at, jnp.eye(len(OF_KERNELS))[index])
            assert all(np.all(np.isfinite(slope)) for slope in slopes.values()), (case, name)
            assert along[index] == pytest.approx(float(sum(jnp.sum(slopes[n] * way[n]) for n in way)), rel=1e-8,
                                                 abs=1e-12), (case, name)
            if not np.isfinite(above[index]):
                assert case.get("load.rate_rps") == 1e4 and name == "ttft_s" and along[index] == 0
                continue
            if case.get("load.rate_rps") == 0 and name in ("utilisation", "running"):
                # Nothing is there, whatever the kernels; the value is of the few arrivals that stand in for none.
                assert abs(along[index]) < 1e-4 and above[index] < 1e-3, (case, name)
                continue
            change = (above[index] - below[index]) / 2e-6
            assert along[index] == pytest.approx(change, rel=1e-3, abs=1e-7 * abs(above[index])), (case, name)
            moved += abs(change) > 1e-3 * abs(above[index])
    assert moved >= 12
