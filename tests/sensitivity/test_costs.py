"""Derivatives of the cost model: by its parameters against differences in float64, by resource against Euler's theorem,
and where two lanes are equally long."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsim import InputError, Scenario
from jaxsim._core.precision import enable_x64
from jaxsim.cost import attention as attend
from jaxsim.cost.base import BatchStats
from jaxsim.cost.roofline import roofline
from jaxsim.cost.tabulated import TabulatedCost
from jaxsim.engine.simulate import prepare
from jaxsim.engine.tape import Following
from jaxsim.sensitivity import attribution, costs, direct, recorded, schedule
from jaxsim.sensitivity.critical_path import critical_paths
from jaxsim.sensitivity.measures import measures
from jaxsim.spec.device import load_device
from jaxsim.spec.model import load_model
from tests.engine.test_hybrid_scenarios import scenario as hybrid
from tests.sensitivity.replay import latencies

pytestmark = pytest.mark.unoptimised

SIZES = (512, 16, True, False)


def asked(rng, count=60, most_sequences=12, most_tokens=400):
    """Iterations of all compositions: decodes, prompts, both, neither; contexts short and long."""
    decodes = rng.integers(0, most_sequences, count)
    chunks = rng.integers(0, 4, count)
    chunks[(decodes == 0) & (rng.random(count) < 0.9)] = 1
    tokens = np.where(chunks > 0, np.maximum(rng.integers(1, most_tokens, count), chunks), 0)
    history = np.where(chunks > 0, rng.integers(0, 3000, count), 0)
    context = decodes * rng.integers(1, 4000, count)
    pairs = (history + tokens).astype(float)**2 - history.astype(float)**2
    followers = np.maximum(decodes + chunks, 1)
    stats = BatchStats.of(decodes, context, chunks, tokens, tokens + history, pairs, decodes + chunks, 0 * decodes,
                          np.where(decodes > 0, -(-context // np.maximum(decodes, 1)), 0))
    then = Following(*(jnp.asarray(x, jnp.int32) for x in (followers, context + 40 * followers, 0 * followers,
                                                          0 * followers)))
    return jax.device_get((stats, then))


def priced_again(cost, questions):
    """First, pace and growth of records."""
    with enable_x64(True):
        return np.asarray(jax.jit(costs._atoms)(jax.tree.map(jnp.asarray, cost), questions))


@pytest.mark.slow
def test_tables_of_a_roofline_have_the_derivatives_of_differences():
    """Every parameter at once, in random directions, and those that matter one by one; then their resources."""
    rng = np.random.default_rng(3)
    with enable_x64(True):
        model = roofline(load_model("llama-3.1-8b"), load_device("h100"))
        leaves, structure = jax.tree.flatten(model)
        paths, values = costs._leaves(structure, [leaf.item() for leaf in leaves])
        _, jacobian = costs._tabulated(model, *SIZES)

        def tables(changed):
            found = iter(changed)
            own = structure.unflatten([jnp.asarray(next(found)) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf
                                       for leaf in leaves])
            made, _ = costs._tabulated(own, *SIZES)
            return [np.asarray(x) for x in jax.tree.leaves(made) if jnp.issubdtype(x.dtype, jnp.floating)]

        names = [path[-1] for path in paths]
        directions = [rng.uniform(-1, 1, len(values)) for _ in range(3)]
        directions += [np.arange(len(values)) == names.index(name) for name in (
            "peak_flops", "memory_bytes_per_s", "host_step_s", "launch_graph_s")]
        largest = 0.0
        for direction in directions:
            step = 1e-5 * direction * values
            up, down = tables(values + step), tables(values - step)
            for above, below, j in zip(up, down, jax.tree.leaves(jacobian), strict=True):
                expected, ours = (above - below) / 2e-5, np.asarray(j) @ (direction * values)
                scale = np.abs(above).max()
                assert np.allclose(ours, expected, rtol=1e-5, atol=1e-8 * scale)
                largest = max(largest, float(np.abs(expected).max() / scale))
    assert largest > 0.5 and len(values) > 60


def test_equally_long_lanes_share_the_derivative():
    """Launches as long as the device: finite, and half of each, forward and in reverse."""
    with enable_x64(True):
        by_sequences = np.zeros((4, 8))
        by_sequences[:, 0] = by_sequences[:, 1] = by_sequences[:, 2] = 0.01
        # No attention in any layer: the branch of chunks is not taken, and still must have a derivative.
        attention = np.zeros((2, attend.CHUNK_COLUMNS))
        attention[:, attend.TILE_TOKENS], attention[:, attend.MOST_KEYS] = 128, attend.UNBOUNDED_KEYS
        made = TabulatedCost(np.full(8, 0.005), np.zeros(3), by_sequences, attention, np.int32(0))
        stats = BatchStats.of(*(np.array([x]) for x in (2, 40)), *(np.zeros(1, int),) * 3, np.zeros(1), np.array([2]),
                              np.zeros(1, int), np.zeros(1, int))
        one = jax.device_get((stats, Following(*(np.array([x]) for x in (2, 42, 0, 0)))))
        size = by_sequences.size
        jacobian = TabulatedCost(*(np.zeros((*np.shape(x), size)) for x in (made.by_tokens, made.by_sampled)),
                                 np.eye(size).reshape(4, 8, size), np.zeros((2, 15, size)), None)
        model = costs.CostModel(made, tuple(map(str, range(size))), np.ones(size), (None,) * size, np.zeros(size),
                                jacobian, {})
        back = costs.reverse(model, one, np.array([[[1.0, 0, 0]]])).reshape(4, 8)
        along = costs.forward(made, one, model.tangents(np.eye(size)))[:, 0, 0].reshape(4, 8)
    assert np.array_equal(back, along) and np.isfinite(back).all()
    assert back[2, 0] == back[2, 1] == 0.5 and back[2, 3] == 1.0 and not back[[0, 1, 3]].any()


PLANS = {
    "dense": {"model": {"name": "llama-3.1-8b"}, "device": {"name": "h100"}},
    "asynchronous, eager": {"model": {"name": "llama-3.1-8b"}, "device": {"name": "a100"},
                            "engine": {"preset": "vllm-v1@0.19", "enforce_eager": True}},
    "experts over four": {"model": {"name": "mixtral-8x7b"}, "device": {"name": "h100"},
                          "engine": {"tensor_parallel_size": 4}},
    "latent attention, two nodes": {"model": {"name": "deepseek-v3"}, "device": {"name": "h100"},
                                    "engine": {"tensor_parallel_size": 16, "enable_expert_parallel": True}},
}


def system(name: str, **workload) -> Scenario:
    tree = {"schema_version": 1, "num_seeds": 2, **PLANS[name]}
    tree["engine"] = {"max_num_seqs": 16, "max_num_batched_tokens": 512, "max_model_len": 4096} | tree.get("engine", {})
    return Scenario.from_dict(tree | {"workload": {
        "kind": "poisson", "rate_rps": 6.0, "num_requests": 40, "input": 300, "output": 40} | workload})


@pytest.mark.slow
@pytest.mark.parametrize("name", PLANS)
def test_resources_are_all_of_an_iteration(name):
    """Euler: what an iteration would change by with each resource adds up to it, whatever it is made of; and no
    parameter that is seconds or a rate is without a resource."""
    one = system(name)
    made = prepare(0, one, record_steps=True)[0]
    model = costs.cost_model(made, one)
    questions = asked(np.random.default_rng(5))
    seconds = priced_again(model.tables, questions)
    parts = costs.forward(model.tables, questions, model.tangents(model.directions()))
    assert np.isfinite(parts).all()
    # Two classes of layers; where one has none, the root in `chunk_seconds` is a nanosecond and not nothing.
    assert np.allclose(parts.sum(axis=0), seconds, rtol=1e-9, atol=1.01e-9)
    some = [parts[k].max() for k in range(len(model.resources))]
    used = {resource for resource, most in zip(model.resources, some, strict=True) if most > 1e-6}
    assert used >= {"HBM", "tensor cores", "host", "kernel floors"} and ("network" in used) == (
        made.system.plan.num_devices > 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", PLANS)
def test_real_costs_forward_reverse_and_total(name):
    """All names of `cost.overrides`, on open arrivals; and of a batch, differences of whole runs."""
    one = system(name)
    (runs,) = recorded.record([one])
    reverse = attribution.of_runs(one, runs, ["mean_ttft_ms", "p99_e2el_ms", "mean_tpot_ms"])
    assert np.allclose(reverse.by_resource.sum(axis=1), 1.0, rtol=0, atol=2e-5)
    fields = {f"cost.overrides.{name}": name for name in reverse.by_parameter if "." not in name}
    assert "cost.overrides.link_bytes_per_s" in fields
    forward = direct.direct([one], list(fields), list(reverse.by_parameter.index))
    compared = 0
    for (_, metric, field), value in forward.items():
        compared += abs(value) > 1e-3
        assert value == pytest.approx(float(reverse.by_parameter.loc[metric, fields[field]]), rel=1e-5, abs=1e-9)
    assert compared > 15

    batch = with_written(system(name, kind="batch", rate_rps=None))
    metrics, step = ["mean_ttft_ms", "mean_e2el_ms", "p99_tpot_ms", "output_throughput"], 0.01
    fields = ["cost.overrides.gemm_read_efficiency", "cost.overrides.host_step_s",
              "device.numbers.memory_bytes_per_s"]
    found = direct.direct([batch], fields, metrics)
    sides = [costs.changed(batch, field, 1 + sign * step) for field in fields for sign in (1, -1)]
    runs = recorded.record(sides)
    for k, field in enumerate(fields):
        for metric in metrics:
            above, below = (np.mean([measures(batch, [run.result])[metric].value for run in side])
                            for side in runs[2 * k:2 * k + 2])
            total = np.log(above / below) / np.log((1 + step) / (1 - step))
            ours = found.get((0, metric, field), 0.0)
            assert ours == pytest.approx(total, rel=1e-3, abs=2e-5), (metric, field)


def with_written(one: Scenario) -> Scenario:
    """With the values of some parameters written out, so that they can be changed."""
    made = prepare(0, one, record_steps=True)[0]
    model = costs.cost_model(made, one)
    return one.with_values({f"cost.overrides.{name}": float(model.values[model.names.index(name)])
                            for name in ("gemm_read_efficiency", "host_step_s")})


@pytest.mark.slow
def test_costs_without_parameters_have_differences_of_tables():
    """A GPU and its host: direct is the total derivative of a batch, and there is nothing to attribute to."""
    bandwidth = 696e9
    batch = hybrid({"experts": "cpu", "cpu": "xeon_8380", "host_memory_gb": 512.0},
                   cost={"overrides": {"memory_bytes_per_s": bandwidth}})
    field, metrics, step = "cost.overrides.memory_bytes_per_s", ["mean_e2el_ms", "mean_ttft_ms"], 0.01
    found = direct.direct([batch], [field, "engine.hybrid.host_memory_gb"], metrics)
    assert {name for *_, name in found} == {field}
    runs = recorded.record([batch.with_values({field: bandwidth * (1 + sign * step)}) for sign in (1, -1)])
    for metric in metrics:
        above, below = (measures(batch, [side[0].result])[metric].value for side in runs)
        total = np.log(above / below) / np.log((1 + step) / (1 - step))
        assert abs(total) > 3e-4 and found[0, metric, field] == pytest.approx(total, rel=2e-2)
    with pytest.raises(InputError, match="has tables, and no parameters"):
        attribution.attribution(batch)


@pytest.mark.slow
@pytest.mark.parametrize("name, values", [
    ("conversations", {}), ("sglang", {}),
    ("default", {"workload": {"kind": "closed-loop", "concurrency": 24, "num_requests": 200, "input": 500,
                              "output": 100}})])
def test_other_schedules_are_priced_as_they_were(name, values):
    """Shared prefixes and turns, iterations of prompts alone, arrivals that answer ends: records are priced again as
    the loop priced them, and add up to latencies, of which resources and parts are all."""
    one = Scenario.named(name).with_values({"num_seeds": 1, "workload.num_requests": 200} | values)
    ((run,),) = recorded.record([one])
    own, lane = schedule.of_run(run), run.result
    priced = priced_again(costs.cost_model(run.made, one).tables, costs.asked_of([run.tape], own.record))
    assert np.allclose(np.where(own.whole > 0, priced, 0), np.where(own.whole > 0, own.atoms, 0), rtol=5e-7, atol=1e-12)
    assert np.allclose(latencies(own, own.atoms).e2e, lane.finish_s - lane.arrival_s, rtol=0, atol=1e-7)
    found = attribution.of_runs(one, [run], ["mean_ttft_ms", "mean_e2el_ms"])
    assert np.allclose(found.by_resource.sum(axis=1), 1, rtol=0, atol=2e-5)
    names = ["gemm_read_efficiency", "peak_flops", "host_step_s"]
    forward = direct.direct([one], [f"cost.overrides.{name}" for name in names], ["mean_ttft_ms", "mean_e2el_ms"])
    assert len(forward) == 6 and all(
        value == pytest.approx(found.by_parameter.loc[metric, field.split(".")[-1]], rel=1e-5, abs=1e-8)
        for (_, metric, field), value in forward.items())
    paths = critical_paths(one, run)
    assert paths.table("e2e").to_numpy().sum() == pytest.approx(paths.latency_s["e2e"].mean(), rel=1e-12)
    is_open = not run.made.params.source.answers
    assert ("duration" in measures(one, [lane], answers=not is_open)) == is_open
    if name == "conversations":
        assert run.tape.stats.decode_shared.max() > 1000 and lane.cached_tokens.sum() > 1000
