"""Parallel plans and number formats."""

import pytest

from jaxsim._core.errors import InputError
from jaxsim.spec.model import load_model
from jaxsim.spec.plan import Plan, kv_cache_bytes, weight_format


def test_degrees():
    plan = Plan(tensor_parallel_size=4, pipeline_parallel_size=2, data_parallel_size=2)
    assert plan.num_devices == 16 and plan.expert_ranks == 1
    assert Plan(tensor_parallel_size=4, data_parallel_size=2, enable_expert_parallel=True).expert_ranks == 8
    # Of 8 experts with 14,336 columns: two whole ones on each of four ranks, or a quarter of all.
    mixtral = load_model("mixtral-8x7b")
    for spread, expected in ((True, (2, 14336)), (False, (8, 3584))):
        plan = Plan(tensor_parallel_size=2, data_parallel_size=2, enable_expert_parallel=spread)
        shape = plan.expert_shape(mixtral)
        assert (shape.num_experts, shape.moe_ffn) == expected and plan.ranks_in_step(mixtral) == 2
    assert Plan(data_parallel_size=2).ranks_in_step(load_model("llama-3.1-8b")) == 1
    with pytest.raises(InputError, match="at least 1"):
        Plan(tensor_parallel_size=0)


@pytest.mark.parametrize("stages, expected", [(1, (10,)), (2, (5, 5)), (3, (3, 4, 3)), (4, (2, 3, 3, 2))])
def test_stage_layers(stages, expected):
    assert Plan(pipeline_parallel_size=stages).stage_layers(10) == expected


@pytest.mark.parametrize("name, plan, message", [
    ("llama-3.1-8b", dict(tensor_parallel_size=3), "does not divide the 32 attention heads.*one of 1, 2, 4"),
    ("qwen2.5-7b", dict(tensor_parallel_size=7), "KV heads"),
    ("llama-3.1-8b", dict(enable_expert_parallel=True), "has no experts"),
    ("mixtral-8x7b", dict(data_parallel_size=16, enable_expert_parallel=True), "cannot share the 8 experts"),
    ("mixtral-8x7b", dict(tensor_parallel_size=2, data_parallel_size=3),
     "6 tensor x data ranks, which do not divide the 14336 columns"),
    ("llama-3.1-8b", dict(pipeline_parallel_size=33), "more than the 32 layers"),
])
def test_impossible_plans(name, plan, message):
    with pytest.raises(InputError, match=message):
        Plan(**plan).check(load_model(name))


def test_possible_plans():
    for name, plan in (("llama-3.1-70b", dict(tensor_parallel_size=16)), ("deepseek-v3", dict(
            tensor_parallel_size=8, data_parallel_size=4, enable_expert_parallel=True))):
        assert Plan(**plan).check(load_model(name)) == Plan(**plan)


def test_formats():
    assert weight_format("half") is weight_format("float16")
    assert weight_format("auto", load_model("deepseek-v3")).linear_bytes == 1
    oss = weight_format("auto", load_model("gpt-oss-20b"))
    assert (oss.linear_bytes, oss.expert_bytes) == (2, 0.53125)
    assert kv_cache_bytes("auto", "fp8") == 2 and kv_cache_bytes("fp8_e5m2") == 1
    with pytest.raises(InputError, match="did you mean"):
        weight_format("float17")
    with pytest.raises(InputError, match="KV cache format"):
        kv_cache_bytes("blob")
