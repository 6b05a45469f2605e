"""KV blocks against the counts that real engines printed at start-up."""

import pytest

from jaxsim._core.errors import InputError
from jaxsim.spec.device import GIB, load_device
from jaxsim.spec.memory import Workspace, kv_blocks, rank_weight_bytes
from jaxsim.spec.model import load_model
from jaxsim.spec.plan import Plan, weight_format

H100_RUN = dict(dtype="float16", max_num_batched_tokens=2048, max_num_seqs=128, max_model_len=4096)
H100_START = dict(max_num_batched_tokens=8192, max_num_seqs=1024, gpu_memory_utilization=0.95,
                  engine_version="0.19")


def blocks(model, device, tensor_ranks=1, **arguments):
    return kv_blocks(load_model(model), load_device(device), Plan(tensor_parallel_size=tensor_ranks),
                     **arguments)


@pytest.mark.parametrize("model, device, tensor_ranks, arguments, printed", [
    # vLLM 0.15 on H100, public runs of inference-sim/training
    ("llama-2-7b", "h100", 1, H100_RUN, 7462),
    ("codellama-34b", "h100", 2, H100_RUN, 26602),
    ("mixtral-8x7b", "h100", 2, H100_RUN, 27510),
    ("mistral-nemo", "h100", 1, H100_RUN, 19251),
    ("mistral-nemo", "h100", 2, H100_RUN | dict(max_num_batched_tokens=1024), 48009),
    # a 24 GB card with vLLM's defaults
    ("llama-3.1-8b", "rtx4090", 1, {}, 2588),
    # vLLM 0.19 on H100, accuracy report of llm-d-planner
    ("llama-3.1-8b", "h100", 1, H100_START, 476016 // 16),
    ("qwen2.5-7b", "h100", 1, H100_START, 1096000 // 16),
    ("qwen2.5-7b", "h100", 1, H100_START | dict(kv_dtype="fp8"), 2192000 // 16),
])
def test_printed_block_counts(model, device, tensor_ranks, arguments, printed):
    assert blocks(model, device, tensor_ranks, **arguments).num_blocks == pytest.approx(printed, rel=0.03)


@pytest.mark.parametrize("model, tensor_ranks, printed_gib", [
    ("llama-3.1-8b", 1, 1.89), ("llama-3.1-8b", 4, 1.89), ("qwen2.5-7b", 1, 2.21), ("qwen3-8b", 1, 2.21),
    ("phi-4", 1, 1.52), ("deepseek-v2-lite", 1, 1.93), ("mixtral-8x7b", 2, 1.21), ("qwen3-30b-a3b", 1, 2.68),
    ("gpt-oss-20b", 2, 2.87),
])
def test_peak_activations(model, tensor_ranks, printed_gib):
    """Source: llm-d-planner accuracy report, vLLM 0.19 on H100."""
    budget = blocks(model, "h100", tensor_ranks, **H100_START)
    assert budget.activation_bytes / GIB == pytest.approx(printed_gib, rel=0.1)


@pytest.mark.parametrize("dtype, printed_gib", [("bfloat16", 14.99), ("fp8", 8.49), ("float32", 29.98)])
def test_weights(dtype, printed_gib):
    """Source: as above, Llama-3.1-8B."""
    model = load_model("llama-3.1-8b")
    assert rank_weight_bytes(model, Plan(), weight_format(dtype)) / GIB == pytest.approx(printed_gib,
                                                                                         rel=0.01)


def test_weights_of_all_ranks_hold_every_parameter():
    for name in ("llama-3.1-70b", "qwen3-30b-a3b", "llama-3.2-1b", "deepseek-v3"):
        model = load_model(name)
        plan = Plan(pipeline_parallel_size=4)
        total = sum(rank_weight_bytes(model, plan, weight_format("bfloat16"), s) for s in range(4))
        # A tied LM head exists twice where first and last stage differ; the last norm is not counted.
        tied = model.tie_embeddings * model.vocab * model.hidden
        assert total == pytest.approx(2 * (model.num_parameters + tied), rel=1e-4)


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
    assert "79.19 GiB of device memory" in text and f"{budget.num_blocks:,} blocks" in text


def test_refusals_show_the_sum():
    with pytest.raises(InputError) as refusal:
        blocks("llama-3.1-70b", "h100")
    text = str(refusal.value)
    assert "does not fit on h100_sxm_80: 0.9 x 79.19 GiB = 71.27 GiB - 131.42 weights" in text
    assert text.endswith("use tensor_parallel_size = 2") and "\n" not in text
    with pytest.raises(InputError, match="fewer than max_model_len = 131,072.*tensor_parallel_size = 2"):
        blocks("llama-3.1-8b", "l4", max_model_len=131072)
    with pytest.raises(InputError, match="use a larger device"):
        blocks("llama-3.1-405b", "l4")
    with pytest.raises(InputError, match="between 0 and 1"):
        blocks("llama-3.1-8b", "h100", gpu_memory_utilization=1.5)
    with pytest.raises(InputError, match="write it like"):
        blocks("llama-3.1-8b", "h100", engine_version="latest")


@pytest.mark.parametrize("model, device, arguments, remedy", [
    ("llama-3.1-8b", "h100", dict(gpu_memory_utilization=0.1), "raise engine.gpu_memory_utilization to at least 0.21"),
    ("llama-3.1-8b", "h100", dict(max_num_batched_tokens=1 << 20),
     "lower engine.max_num_batched_tokens to at most 262144"),
    ("llama-3.1-8b", "rtx4090", dict(max_num_batched_tokens=4096, max_num_seqs=4096),
     "lower engine.max_num_seqs to at most 1024"),
    ("llama-3.1-70b", "h100", {}, "use tensor_parallel_size = 2"),
    ("llama-3.1-405b", "l4", {}, "use a larger device or a narrower dtype"),
])
def test_the_remedy_is_the_knob_that_decides(model, device, arguments, remedy):
    with pytest.raises(InputError) as refusal:
        blocks(model, device, **arguments)
    assert remedy in refusal.value.remedy
    assert ("larger device" in refusal.value.remedy) == ("larger device" in remedy)
    knob, _, value = remedy.partition(" to at least " if "at least" in remedy else " to at most ")
    if value:
        field = knob.partition("engine.")[2]
        assert blocks(model, device, **arguments | {field: float(value) if "." in value else int(value)}).num_blocks > 0
