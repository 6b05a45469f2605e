"""Which plans there are, and the flags that say so."""

import warnings

import pytest

from jaxsim._core.errors import InputError
from jaxsim.planning.candidates import Candidate, candidates, vllm_line
from jaxsim.spec.model import load_model
from jaxsim.spec.plan import Plan
from jaxsim.spec.presets import resolve
from jaxsim.spec.scenario import Scenario
from jaxsim.spec.vllm import import_vllm

LLAMA, MIXTRAL = load_model("llama-3.1-70b"), load_model("mixtral-8x7b")


def test_every_way_to_multiply_to_the_devices():
    """Ordered products of 8 = 2^3: C(5, 2) of three degrees, C(6, 3) of four."""
    dense = candidates(LLAMA, "h100", 8, cells=False)
    assert len(dense) == 10 and {c.num_devices for c in dense} == {8}
    assert len({c.plan for c in dense}) == len({c.label for c in dense}) == 10
    assert all(c.plan.data_parallel_size == 1 and not c.plan.enable_expert_parallel for c in dense)
    experts = candidates(MIXTRAL, "h100", 8)
    # All of them with and without expert parallelism, but four whose instances are single devices or pipelines.
    assert len(experts) == 2 * 20 - 4 == len(set(experts))
    assert {c.num_devices for c in experts} == {8}
    assert Plan(tensor_parallel_size=2, data_parallel_size=4, enable_expert_parallel=True) in {c.plan for c in experts}
    assert len(candidates(LLAMA, "h100", 1)) == 1
    for count in (6, 12):
        assert {c.num_devices for c in candidates(LLAMA, "h100", count)} == {count}


def test_cells_are_those_that_apex_scores():
    """Attention copied 2, 4 or 8 times over ranks that share an FFN, alone or beside replicas."""
    cells = [c for c in candidates(LLAMA, "h100", 8) if c.is_cell_level]
    found = {(c.replicas, c.plan.data_parallel_size, c.plan.tensor_parallel_size) for c in cells}
    assert found == {(1, 2, 4), (1, 4, 2), (1, 8, 1), (2, 2, 2), (2, 4, 1), (4, 2, 1)}
    assert all("not simulated" in c.why_not_simulated for c in cells)
    assert not any(c.is_cell_level for c in candidates(MIXTRAL, "h100", 8))


@pytest.mark.parametrize("count", [0, -1, 2.5])
def test_no_devices(count):
    with pytest.raises(InputError, match="no count of devices"):
        candidates(LLAMA, "h100", count)


def test_more_stages_than_layers_are_no_plan():
    small = load_model("opt-125m")
    assert max(c.plan.pipeline_parallel_size for c in candidates(small, "h100", 16)) == 8 < 16


ENGINE = {"max_num_batched_tokens": 4096, "max_num_seqs": 64, "max_model_len": 8192, "block_size": 32,
          "async_scheduling": True, "enforce_eager": True, "kv_cache_dtype": "fp8", "num_gpu_blocks_override": 900,
          "gpu_memory_utilization": 0.85, "enable_chunked_prefill": True, "scheduling_policy": "fcfs"}


@pytest.mark.parametrize("plan", [
    Plan(tensor_parallel_size=4), Plan(tensor_parallel_size=2, data_parallel_size=4, enable_expert_parallel=True)])
def test_the_line_says_what_was_simulated(plan):
    """Read back, it is the same engine."""
    candidate = Candidate(device="h100", plan=plan, replicas=2)
    scenario = Scenario.from_dict({
        "schema_version": 1, "model": {"name": "mixtral-8x7b"}, "device": {"name": "h100"}, "engine": ENGINE,
        "workload": {"kind": "poisson", "rate_rps": 1.0, "input": 10, "output": 10}}).with_values(candidate.values())
    line = vllm_line(scenario, resolve(scenario.engine), candidate)
    assert line.startswith("vllm serve mistralai/Mixtral-8x7B-v0.1 --tensor-parallel-size ")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read = import_vllm(line, device="h100")
    assert read.engine == scenario.engine and read.model.spec() == scenario.model.spec()


def serving(preset: str = "vllm-v1", **model) -> Scenario:
    return Scenario.from_dict({
        "schema_version": 1, "model": {"name": "llama-3.1-8b", **model}, "device": {"name": "h100"},
        "engine": {"preset": preset}, "workload": {"kind": "poisson", "rate_rps": 1.0, "input": 10, "output": 10}})


def line_of(scenario: Scenario) -> str:
    return vllm_line(scenario, resolve(scenario.engine), Candidate(device="h100", plan=Plan()))


@pytest.mark.parametrize("formats, flags", [
    ({}, ""), ({"dtype": "bf16"}, "--dtype bfloat16"), ({"dtype": "half"}, "--dtype float16"),
    ({"dtype": "fp8_e4m3"}, "--quantization fp8"), ({"kv_dtype": "bf16"}, ""),
    ({"dtype": "fp8", "kv_dtype": "fp8_e5m2"}, "--quantization fp8 --kv-cache-dtype fp8_e5m2")])
def test_formats_are_named_as_vllm_names_them(formats, flags):
    """--dtype {auto, half, float16, bfloat16, float, float32}; --quantization fp8 narrows as it loads (its manual)."""
    assert f"--tensor-parallel-size 1 {flags} --max-num-seqs".replace("  ", " ") in line_of(serving(**formats))


@pytest.mark.parametrize("formats, says", [
    ({"dtype": "int4"}, "serve a checkpoint"), ({"dtype": "w8a8"}, "serve a checkpoint"),
    ({"dtype": "int3-g128"}, "serve a checkpoint"), ({"kv_dtype": "int8"}, "no --kv-cache-dtype")])
def test_formats_that_only_a_checkpoint_has(formats, says):
    """vLLM: "Cannot find the config file for awq" where the weights are not narrow already."""
    with pytest.raises(InputError, match=says):
        line_of(serving(**formats))


def test_flags_of_the_older_engine():
    """vLLM 0.6 turns chunked prefill on by itself for long models, and has no --no- form of it."""
    line = line_of(serving("vllm-v0"))
    assert "--enable-chunked-prefill=False" in line and "--no-" not in line
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert import_vllm(line, device="h100", preset="vllm-v0").engine.enable_chunked_prefill is False


def test_a_shared_store_has_no_flag():
    scenario = Scenario.from_dict({
        "schema_version": 1, "model": {"name": "llama-3.1-8b"}, "device": {"name": "h100"},
        "engine": {"enable_prefix_caching": True}, "cluster": {"remote_store": {"gb_per_s": 10.0}},
        "workload": {"kind": "poisson", "rate_rps": 1.0, "input": 10, "output": 10}})
    with pytest.raises(InputError) as caught:
        line_of(scenario)
    assert caught.value.field == "cluster.remote_store"


@pytest.mark.parametrize("field, engine", [
    ("victim", {"preset": "vllm-v1@0.9", "scheduling_policy": "priority", "victim": "last_admitted"}),
    ("reserve", {"reserve": "max_tokens"}), ("kv_accounting", {"kv_accounting": False}),
    ("swap", {"preset": "vllm-v0", "swap": {"space_gb": 4.0, "dispatch_us": 5.0}}),
    ("offload", {"enable_prefix_caching": True, "offload": {"space_gb": 4.0}}),
    ("context_reuse", {"enable_prefix_caching": True, "context_reuse": {"gb_per_s": 25.0, "recomputed_layers": 4}}),
])
def test_what_vllm_has_no_flag_for(field, engine):
    """It decides the timing, so there is no line without it."""
    scenario = Scenario.from_dict({
        "schema_version": 1, "model": {"name": "llama-3.1-8b"}, "device": {"name": "h100"}, "engine": engine,
        "workload": {"kind": "poisson", "rate_rps": 1.0, "input": 10, "output": 10,
                     "prefix_groups": {"number": 4, "tokens": 512}}})
    with pytest.raises(InputError) as caught:
        line_of(scenario)
    assert caught.value.field == f"engine.{field}"


def test_flags_that_say_what_the_preset_says():
    """They change nothing, and the line needs none."""
    said = serving().with_values({"engine.victim": "last_admitted", "engine.reserve": "none"})
    assert line_of(said) == line_of(serving())


def test_lines_that_cannot_be_written():
    scenario = Scenario.from_dict({
        "schema_version": 1, "model": {"name": "llama-3.1-8b"}, "device": {"name": "h100"},
        "engine": {"preset": "sglang"}, "workload": {"kind": "poisson", "rate_rps": 1.0, "input": 10, "output": 10}})
    plain, cell = (Candidate(device="h100", plan=Plan(data_parallel_size=2), is_cell_level=x) for x in (False, True))
    with pytest.raises(InputError, match="not vLLM"):
        vllm_line(scenario, resolve(scenario.engine), plain)
    ours = scenario.with_values({"engine.preset": "vllm-v1"})
    with pytest.raises(InputError, match="cannot be told to vLLM"):
        vllm_line(ours, resolve(ours.engine), cell)
