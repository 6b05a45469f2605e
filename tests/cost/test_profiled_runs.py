"""The profiled tier in a scenario: what a run was made of, what of it was extrapolated, and what is refused."""

import dataclasses

import jax
import numpy as np
import pytest

import jaxsim
from jaxsim._core.errors import InputError
from jaxsim.cost.profile import OperatorTable, Profile
from jaxsim.cost.profiled import coverage
from jaxsim.cost.roofline import roofline
from jaxsim.engine import functional, measured
from jaxsim.io import result as files
from jaxsim.io.table import print_summary
from jaxsim.profiles import write
from jaxsim.spec.device import load_device
from jaxsim.spec.model import load_model
from jaxsim.spec.scenario import Scenario
from tests.metrics import lanes
from tests.profiles.synthetic import profile_of
from tests.reference import simulator

pytestmark = pytest.mark.unoptimised

DENSE = ("embedding", "qkv", "attention_output", "rotary_and_cache_write", "norms", "ffn_up", "ffn_down",
         "ffn_activation", "final_norm", "lm_head", "sampler")
ATTENTION = ("attention_decode", "attention_prefill", "attention_mixed")


@pytest.fixture(scope="module")
def base():
    return roofline(load_model("llama-3.1-8b"), load_device("h100"), None, "bfloat16")


def scenario_of(path, **values) -> Scenario:
    return Scenario.from_dict({
        "schema_version": 1, "num_seeds": 1, "model": {"name": "llama-3.1-8b"}, "device": {"name": "h100"},
        "engine": {"max_num_seqs": 32, "max_num_batched_tokens": 512, "max_model_len": 2048},
        "workload": {"kind": "poisson", "rate_rps": 10.0, "num_requests": 60,
                     "input": {"kind": "uniform", "min_tokens": 1, "max_tokens": 700},
                     "output": {"kind": "uniform", "min_tokens": 1, "max_tokens": 120}},
        "cost": {"kind": "profiled", "path": str(path)}}).with_values(values)


@pytest.fixture(scope="module")
def path(base, tmp_path_factory):
    """All operators, prompts of up to 1,024 tokens and contexts of up to 4,096."""
    profile = profile_of(base, (*DENSE, *ATTENTION), model="llama-3.1-8b", device="h100", dtype="bfloat16")
    return write(profile, tmp_path_factory.mktemp("profiles") / "all.parquet")


@pytest.fixture(scope="module")
def lane(path):
    return jaxsim.simulate(scenario_of(path), record_steps=True).lanes[0][0]


def reference(preset, **numbers):
    """A run of the reference simulator: its lane, and the batches it knows, by instance."""
    rng = np.random.default_rng(3)
    flags = simulator.preset(preset, **{"max_num_seqs": 16, "max_num_batched_tokens": 256, "num_blocks": 10_000,
                                        "max_model_len": 2048, **numbers})
    arrivals = np.cumsum(rng.exponential(0.05, 120))
    requests = [simulator.Request(i, float(t), int(rng.integers(1, 700)), int(rng.integers(1, 80)))
                for i, t in enumerate(arrivals)]
    result = simulator.simulate(requests, flags, 2, "round_robin", lanes.cost)
    lane = lanes.lane(result, requests, flags, 2)
    steps = {**lane.steps, "first_s": lane.steps["duration_s"]}
    return dataclasses.replace(lane, steps=steps), [r.stats for i in range(2) for r in result.iterations
                                                    if r.instance == i]


# ---- what a run was made of


@pytest.mark.parametrize("preset", ["vllm-v1", "vllm-v1-async", "sarathi"])
def test_batches_are_those_of_the_reference(preset):
    found, weight = measured.batches((case := reference(preset))[0])
    assert np.all(weight == 1) and len(weight) == len(case[1])
    for name in ("num_decode", "decode_context", "prefill_tokens", "num_prefill", "num_sampled"):
        assert np.array_equal(getattr(found, name), [getattr(s, name) for s in case[1]]), name
    exact = np.array([s.prefill_pairs for s in case[1]], float)
    assert found.prefill_pairs.sum() == pytest.approx(exact.sum(), rel=0.05)
    # Where several prompts share an iteration, their parts of it are not on the tape.
    is_alone = np.array([s.num_prefill == 1 for s in case[1]])
    assert np.median(np.abs(found.prefill_pairs[is_alone] / exact[is_alone] - 1)) < 0.05


@pytest.mark.parametrize("preset, numbers", [("vllm-v0", {"max_num_batched_tokens": 2048}),
                                             ("orca", {"max_num_batched_tokens": simulator.UNLIMITED})])
def test_batches_without_chunks_are_exact(preset, numbers):
    lane, known = reference(preset, **numbers)
    found, _ = measured.batches(lane)
    for name in ("num_decode", "decode_context", "prefill_tokens", "num_prefill", "num_sampled"):
        assert np.array_equal(getattr(found, name), [getattr(s, name) for s in known]), name
    assert np.allclose(found.prefill_pairs, [s.prefill_pairs for s in known])


def test_batches_under_preemption_are_near():
    lane, known = reference("vllm-v1", num_blocks=120)
    assert lane.preemptions.sum() > 5
    found, _ = measured.batches(lane)
    exact = np.array([s.decode_context for s in known], float)
    assert found.decode_context.sum() == pytest.approx(exact.sum(), rel=0.02)
    assert found.prefill_pairs.sum() == pytest.approx(sum(s.prefill_pairs for s in known), rel=0.1)


def test_batches_price_what_the_tape_took(lane, path):
    """Iterations that were planned ahead included: the loop's own tables give the loop's own time."""
    stats, weight = measured.batches(lane)
    assert weight.sum() == lane.num_iterations and (weight > 1).sum() > 20
    _, params, _ = functional.inputs(scenario_of(path))
    cost = params.groups[0].cost
    total_s = float(np.asarray(jax.vmap(cost.iteration)(stats), float) @ weight)
    assert total_s == pytest.approx(lane.busy_s.sum(), rel=2e-3)


# ---- what of it was extrapolated


def test_a_profile_that_covers_the_run(lane):
    assert 0 <= lane.extrapolated_share < 0.005


def test_what_was_not_measured_is_told(base, tmp_path, capsys):
    """Half of the operators: the share is that of `coverage`, over all batches of the run."""
    profile = profile_of(base, ("qkv", "ffn_up", "ffn_down", *ATTENTION))
    scenario = scenario_of(write(profile, tmp_path / "half.parquet"))
    result = jaxsim.simulate(scenario, record_steps=True)
    lane = result.lanes[0][0]
    stats, weight = measured.batches(lane)
    some = np.argsort(-weight)[:50]
    covered = coverage(profile, base, jax.tree.map(lambda x: x[some], stats))
    assert (1 - covered).min() - 0.02 < lane.extrapolated_share < (1 - covered).max() + 0.02
    assert files.summary(result)["cost"] == {"extrapolated_share": lane.extrapolated_share}
    print_summary(result)
    out = capsys.readouterr().out
    assert "cost: profile half.parquet" in out
    assert f"extrapolated {100 * lane.extrapolated_share:.1f} %" in " ".join(out.split())


def test_longer_contexts_than_measured_are_told(base, tmp_path):
    tables = profile_of(base, (*DENSE, *ATTENTION)).tables
    short = {}
    for name, table in tables.items():
        kept = np.ones(len(table.seconds), bool)
        if "context_tokens" in table.axes:
            kept = table.points[:, table.axes.index("context_tokens")] <= 64
        short[name] = OperatorTable(name, table.points[kept], table.seconds[kept])
    share = jaxsim.simulate(scenario_of(write(Profile(short), tmp_path / "short.parquet")),
                            record_steps=True).lanes[0][0].extrapolated_share
    assert 0.01 < share < 0.5


def test_without_a_tape_or_a_profile_nothing_is_said(path, capsys):
    result = jaxsim.simulate(scenario_of(path))
    assert result.lanes[0][0].extrapolated_share is None and result.lanes[0][0].steps is None
    assert files.summary(result)["cost"] == {"extrapolated_share": None}
    print_summary(result)
    assert "extrapolated" not in capsys.readouterr().out


# ---- tables are kept, and refused


@pytest.mark.slow
def test_nothing_is_said_of_pools_that_differ(path):
    """The tape does not follow a request from one instance to another, and one table is not that of all."""
    pools = [{"role": "prefill"}, {"role": "decode"}]
    lane = jaxsim.simulate(scenario_of(path, **{"cluster.pools": pools}), record_steps=True).lanes[0][0]
    assert lane.steps is not None and lane.extrapolated_share is None


def test_scenarios_share_tables_until_the_file_changes(base, tmp_path):
    first = profile_of(base, ("qkv", "ffn_up", *ATTENTION))
    path = write(first, tmp_path / "p.parquet")
    measured._tables.cache_clear()
    scenarios = [scenario_of(path, **{"workload.rate_rps": rate, "num_seeds": 2}) for rate in (5.0, 10.0)]
    before_s = jaxsim.simulate(scenarios).lanes[0][0].busy_s.sum()
    assert measured._tables.cache_info().misses == 1
    slower = profile_of(base, ("qkv", "ffn_up", *ATTENTION), lambda points: np.full(len(points), 3.0))
    write(slower, path)
    assert jaxsim.simulate(scenarios).lanes[0][0].busy_s.sum() > 1.05 * before_s
    assert measured._tables.cache_info().misses == 2


@pytest.mark.parametrize("values, field, says", [
    ({"device.name": "a100"}, "profile.device", "is not a100"),
    ({"engine.tensor_parallel_size": 2}, "profile.tensor_parallel_size", "engine.tensor_parallel_size = 2"),
    ({"model.name": "qwen3-8b"}, "profile.model", "Qwen3-8B has"),
    ({"model.dtype": "fp8", "model.kv_dtype": "bf16"}, "profile.dtype", "2 bytes a weight"),
    ({"cost.path": "nowhere.parquet"}, "cost.path", "is not there"),
    ({"cost.path": __file__}, "cost.path", "cannot be read"),
    ({"cost.host": "vllm-v9"}, "cost.host", "is not known"),
    ({"cost.overrides": {"gemm_eficiency": 0.5}}, "cost.overrides.gemm_eficiency", "is not a parameter"),
])
def test_another_system_is_refused(path, values, field, says):
    with pytest.raises(InputError) as info:
        jaxsim.simulate(scenario_of(path, **values))
    assert info.value.field == field and says in str(info.value) and info.value.remedy


def test_numbers_of_another_width_are_refused(base, tmp_path):
    profile = profile_of(base, ("qkv",), kv_dtype="fp8")
    with pytest.raises(InputError, match="profile.kv_dtype = 'fp8': has 1 bytes a number"):
        jaxsim.simulate(scenario_of(write(profile, tmp_path / "fp8.parquet")))
