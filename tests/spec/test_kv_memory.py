"""KV blocks against the counts that real engines printed at start-up."""

import pytest

from jaxsim._core.errors import InputError
from jaxsim.spec.device import load_device
from jaxsim.spec.memory import KV_RULES, Workspace, activation_bytes, kv_blocks, kv_rule, rank_weight_bytes
from jaxsim.spec.model import load_model
from jaxsim.spec.plan import Plan, weight_format
from jaxsim.spec.presets import all_presets
from jaxsim.spec.scenario import Scenario

H100_RUN = dict(dtype="float16", max_num_batched_tokens=2048, max_num_seqs=128, max_model_len=4096)
SGLANG = dict(rule="sglang@0.5", block_size=1)
TENSORRT = dict(rule="tensorrt-llm@1.0", block_size=32)


def blocks(model, device, tensor_ranks=1, **arguments):
    return kv_blocks(load_model(model), load_device(device), Plan(tensor_parallel_size=tensor_ranks),
                     **arguments)


@pytest.mark.parametrize("model, device, tensor_ranks, arguments, printed", [
    # vLLM 0.15 on H100, runs of vllm_h100_inferenceperf (shared data)
    ("llama-2-7b", "h100", 1, H100_RUN, 7462),
    ("codellama-34b", "h100", 2, H100_RUN, 26602),
    ("mixtral-8x7b", "h100", 2, H100_RUN, 27510),
    # the same engine, vllm_stage_aggregates (shared data)
    ("llama-2-7b", "h100", 1, H100_RUN, 7463),
    ("mistral-nemo", "h100", 1, H100_RUN, 19251),
    ("mistral-nemo", "h100", 2, H100_RUN | dict(max_num_batched_tokens=1024), 48009),
    # a 24 GB card with vLLM's defaults
    ("llama-3.1-8b", "rtx4090", 1, {}, 2588),
])
def test_printed_block_counts(model, device, tensor_ranks, arguments, printed):
    assert blocks(model, device, tensor_ranks, **arguments).num_blocks == pytest.approx(printed, rel=0.03)


@pytest.mark.parametrize("model, tensor_ranks, stages, tokens", [
    ("opt-13b", 1, 1, 66144), ("opt-13b", 2, 1, 163008), ("opt-13b", 4, 1, 356736), ("opt-66b", 4, 1, 78496),
    ("opt-66b", 8, 1, 212304), ("opt-66b", 2, 2, 78512), ("opt-66b", 4, 2, 212320), ("opt-175b", 3, 3, 76192),
    ("opt-175b", 4, 3, 126160),
])
def test_kv_capacities_of_distserve(model, tensor_ranks, stages, tokens):
    """Source: shared physics, serving.md 1.2: A100-80GB, memory utilisation 0.95. Step sizes: vLLM's defaults."""
    plan = Plan(tensor_parallel_size=tensor_ranks, pipeline_parallel_size=stages)
    budget = kv_blocks(load_model(model), load_device("a100"), plan, gpu_memory_utilization=0.95)
    assert budget.num_tokens == pytest.approx(tokens, rel=0.03)


@pytest.mark.parametrize("model, tensor_ranks, version, tokens, sequences, expected", [
    # By hand: 3 x 11,008 + 4 x 4,096 columns of 2 B for each token, more than the sampler's 128 x 32,000 x 38 B.
    ("llama-2-7b", 1, "0.15", 2048, 128, 2048 * 49408 * 2),
    ("codellama-34b", 2, "0.15", 2048, 128, 2048 * (3 * 11008 + 4 * 8192) * 2),
    # The sampler: 38 B a logit where it sorts, 14 B where it masks, and two hidden states.
    ("llama-3.1-8b", 1, "0.16", 2048, 256, 256 * 128256 * 38 + 2 * 2048 * 4096 * 2),
    ("llama-3.1-8b", 1, "0.17", 2048, 256, 256 * 128256 * 14 + 2 * 2048 * 4096 * 2),
    ("llama-3.1-8b", 4, "0.19", 2048, 256, 256 * 128256 * 14 + 2 * 2048 * 4096 * 2),
    # Experts: two rows a token, of max(2 x 14,336 / 2, 4,096) and 14,336 / 2 columns; then the sampler.
    ("mixtral-8x7b", 2, "0.15", 2048, 128, 2048 * 2 * (14336 + 7168) * 2 + 128 * 32000 * 38 + 2 * 2048 * 4096 * 2),
])
def test_peak_activations(model, tensor_ranks, version, tokens, sequences, expected):
    model, space = load_model(model), kv_rule(f"vllm@{version}")[1]
    plan = Plan(tensor_parallel_size=tensor_ranks)
    assert activation_bytes(model, plan, weight_format("auto", model), space, tokens, sequences) == expected


@pytest.mark.parametrize("engine, visible, share, weights, activations, other, kv", [
    # By hand: 80 GiB at 0.9, 15 GiB weights, 2 GiB activations, 1 GiB other.
    ("vllm", 80, 0.9, 15, 2, 1, 54.0),           # 72 - 18
    ("sglang", 80, 0.9, 15, 2, 1, 56.1),         # 0.9 x 79 - 15
    ("tensorrt-llm", 80, 0.9, 15, 2, 1, 55.8),   # 0.9 x 62
    ("vllm", 24, 0.95, 15, 1, 0.5, 6.3),         # 22.8 - 16.5
    ("sglang", 24, 0.8, 15, 1, 0.5, 3.8),        # 0.8 x 23.5 - 15
    ("tensorrt-llm", 24, 0.8, 15, 1, 0.5, 6.0),  # 0.8 x 7.5
])
def test_rules_are_the_engines_sums(engine, visible, share, weights, activations, other, kv):
    spent = {"weights": weights, "activations": activations, "other": other}
    assert KV_RULES[engine].kv_bytes(visible, share, spent) == pytest.approx(kv)


@pytest.mark.parametrize("rule, share, lines", [
    ("vllm@0.15", 0.9, ["visible", "gpu_memory_utilization 0.9", "weights", "activations", "other"]),
    ("sglang@0.5", 0.88, ["visible", "other", "mem_fraction_static 0.88", "weights"]),
    ("tensorrt-llm@1.0", 0.9, ["visible", "weights", "activations", "other", "free_gpu_memory_fraction 0.9"]),
])
def test_lines_are_in_the_order_of_the_rule(rule, share, lines):
    budget = blocks("llama-3.1-8b", "h100", rule=rule, gpu_memory_utilization=share)
    assert len(budget.lines) == len(lines) + 1
    for line, word in zip(budget.lines, [*lines, "for KV"], strict=True):
        assert word in line
    assert 0 <= budget.kv_bytes - budget.num_blocks * budget.block_bytes < budget.block_bytes


def test_sglang_counts_no_activations():
    few, many = (blocks("llama-3.1-8b", "h100", max_num_batched_tokens=n, **SGLANG) for n in (2048, 16384))
    assert few.num_blocks == many.num_blocks
    few, many = (blocks("llama-3.1-8b", "h100", max_num_batched_tokens=n, **TENSORRT) for n in (2048, 16384))
    assert few.num_blocks > many.num_blocks


def test_every_preset_names_a_rule():
    engines = {p.name: kv_rule(p.kv_rule)[0].engine for p in all_presets()}
    assert (engines.pop("sglang@0.5"), engines.pop("tensorrt-llm@1.0")) == ("SGLang", "TensorRT-LLM")
    assert set(engines.values()) == {"vLLM"}
    # vLLM's constants are those of the version that the preset imitates.
    assert all(p.kv_rule == f"vllm@{p.version}" for p in all_presets() if p.name.startswith("vllm"))
    with pytest.raises(InputError, match=r"no such rule; did you mean 'sglang'\?"):
        blocks("llama-3.1-8b", "h100", rule="sgland@0.5")


@pytest.mark.parametrize("name", ["mem_fraction_static", "free_gpu_memory_fraction"])
def test_the_engines_names_of_the_share(name):
    with pytest.raises(InputError, match="did you mean 'gpu_memory_utilization'"):
        Scenario.from_dict({"schema_version": 1, "engine": {name: 0.9},
                            "workload": {"kind": "poisson", "rate_rps": 1.0}})


@pytest.mark.parametrize("dtype, expected", [
    # By hand: 8,030,261,248 parameters, of which 525,336,576 each in embeddings and LM head; norms 65 x 4,096, the
    # last of which is not counted.
    ("bfloat16", 2 * 8030257152), ("float32", 4 * 8030257152),
    ("fp8", 8030257152 + 2 * 525336576 + 64 * 4096)])
def test_weights(dtype, expected):
    model = load_model("llama-3.1-8b")
    assert rank_weight_bytes(model, Plan(), weight_format(dtype)) == pytest.approx(expected, rel=1e-9)


def test_weights_of_all_ranks_hold_every_parameter():
    for name in ("llama-3.1-70b", "qwen3-30b-a3b", "llama-3.2-1b", "deepseek-v3"):
        model = load_model(name)
        plan = Plan(pipeline_parallel_size=4)
        total = sum(rank_weight_bytes(model, plan, weight_format("bfloat16"), s) for s in range(4))
        # A tied LM head exists twice where first and last stage differ; the last norm is not counted.
        tied = model.tie_embeddings * model.vocab * model.hidden
        assert total == pytest.approx(2 * (model.num_parameters + tied), rel=1e-4)


def test_weights_of_experts_cut_over_data_parallel_ranks():
    """Mixtral on 2 x 4 ranks: three quarters of a tensor-parallel rank's experts are elsewhere, nothing of a dense
    model is. Every rank multiplies the pairs of all, two a token of four ranks, in 14,336 / 8 columns."""
    plan, model = Plan(tensor_parallel_size=2, data_parallel_size=4), load_model("mixtral-8x7b")
    alone = rank_weight_bytes(model, Plan(tensor_parallel_size=2))
    experts = 32 * 8 * 3 * 4096 * (14336 // 2) * 2
    assert rank_weight_bytes(model, plan) == pytest.approx(alone - 0.75 * experts)
    dense = load_model("llama-3.1-8b")
    assert rank_weight_bytes(dense, plan) == rank_weight_bytes(dense, Plan(tensor_parallel_size=2))
    rule, space = kv_rule("vllm@0.15")
    # 4,096 columns, as 2 x 1,792 are fewer, and 1,792; then the sampler.
    assert activation_bytes(model, plan, weight_format("bfloat16"), space, 2048, 128) == (
        2048 * 2 * 4 * (4096 + 1792) * 2 + 128 * 32000 * 38 + 2 * 2048 * 4096 * 2)
    # Communicators, though there is one tensor-parallel rank.
    budget = kv_blocks(model, load_device("h100"), Plan(data_parallel_size=4), dtype="bfloat16")
    assert budget.other_bytes == space.non_torch_parallel_bytes


def test_more_memory_more_blocks():
    base = blocks("llama-3.1-8b", "h100").num_blocks
    assert blocks("llama-3.1-8b", "h100", gpu_memory_utilization=0.95).num_blocks > base
    assert blocks("llama-3.1-8b", "h100", kv_dtype="fp8").num_blocks == pytest.approx(2 * base, abs=1)
    assert blocks("llama-3.1-8b", "h100", max_num_batched_tokens=16384).num_blocks < base
    assert blocks("llama-3.1-8b", "h100", block_size=32).num_blocks == pytest.approx(base / 2, abs=1)
    roomy = Workspace(0.0, 0.0, 0.0)
    assert blocks("llama-3.1-8b", "h100", reserve=roomy).num_blocks > base
    staged = kv_blocks(load_model("llama-3.1-8b"), load_device("h100"), Plan(pipeline_parallel_size=2))
    assert staged.num_blocks > 2 * base


def test_the_sum_adds_up():
    budget = blocks("llama-2-7b", "h100", **H100_RUN)
    spent = budget.weight_bytes + budget.activation_bytes + budget.other_bytes + budget.kv_bytes
    assert spent == pytest.approx(budget.visible_bytes * budget.gpu_memory_utilization)
    assert 0 <= budget.kv_bytes - budget.num_blocks * budget.block_bytes < budget.block_bytes
    text = "\n".join(budget.lines)
    assert "79.04 GiB of device memory" in text and f"{budget.num_blocks:,} blocks" in text


def test_refusals_show_the_sum():
    with pytest.raises(InputError) as refusal:
        blocks("llama-3.1-70b", "h100")
    text = str(refusal.value)
    assert "does not fit on h100_sxm_80: 0.9 x 79.04 GiB = 71.14 GiB - 131.42 weights" in text
    assert text.endswith("use tensor_parallel_size = 2") and "\n" not in text
    with pytest.raises(InputError, match="fewer than max_model_len = 131,072.*tensor_parallel_size = 2"):
        blocks("llama-3.1-8b", "l4", max_model_len=131072)
    with pytest.raises(InputError, match="use a larger device"):
        blocks("llama-3.1-405b", "l4")
    with pytest.raises(InputError, match="between 0 and 1"):
        blocks("llama-3.1-8b", "h100", gpu_memory_utilization=1.5)
    with pytest.raises(InputError, match="write it like"):
        blocks("llama-3.1-8b", "h100", rule="vllm@latest")
    with pytest.raises(InputError, match=r"0.9 x \(79.04 - 0.10 other\) GiB = 71.05 GiB - 131.42 weights = -60.37 GiB"):
        blocks("llama-3.1-70b", "h100", **SGLANG)
    with pytest.raises(InputError, match=r"0.9 x \(79.04 - 131.42 weights - 0.45 activations - 0.10 other\) GiB = -47"):
        blocks("llama-3.1-70b", "h100", **TENSORRT)


def test_only_vllm_refuses_what_one_sequence_cannot_fill():
    for rule in (SGLANG, TENSORRT):
        assert blocks("llama-3.1-8b", "l4", max_model_len=131072, **rule).num_tokens < 131072


@pytest.mark.parametrize("model, device, arguments, remedy", [
    ("llama-3.1-8b", "h100", dict(gpu_memory_utilization=0.1), "raise engine.gpu_memory_utilization to at least 0.21"),
    ("llama-3.1-8b", "h100", dict(max_num_batched_tokens=1 << 20),
     "lower engine.max_num_batched_tokens to at most 262144"),
    ("llama-3.1-8b", "rtx4090", dict(max_num_batched_tokens=4096, max_num_seqs=4096),
     "lower engine.max_num_seqs to at most 1024"),
    ("llama-3.1-70b", "h100", {}, "use tensor_parallel_size = 2"),
    ("llama-3.1-8b", "h100", SGLANG | dict(gpu_memory_utilization=0.1),
     "raise engine.gpu_memory_utilization (SGLang's mem_fraction_static) to at least 0.19"),
    ("llama-3.1-8b", "h100", TENSORRT | dict(max_num_batched_tokens=1 << 20),
     "lower engine.max_num_batched_tokens to at most 524288"),
    ("llama-3.1-70b", "h100", TENSORRT, "use tensor_parallel_size = 2"),
    ("llama-3.1-405b", "l4", {}, "use a larger device or a narrower dtype"),
])
def test_the_remedy_is_the_knob_that_decides(model, device, arguments, remedy):
    with pytest.raises(InputError) as refusal:
        blocks(model, device, **arguments)
    assert remedy in refusal.value.remedy
    assert ("larger device" in refusal.value.remedy) == ("larger device" in remedy)
    knob, _, value = remedy.partition(" to at least " if "at least" in remedy else " to at most ")
    if value:
        field = knob.partition("engine.")[2].partition(" ")[0]
        assert blocks(model, device, **arguments | {field: float(value) if "." in value else int(value)}).num_blocks > 0
