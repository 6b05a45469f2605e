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
