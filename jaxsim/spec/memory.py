"""KV blocks from device memory, the way the engine derives them at start-up, with the sum written out.

    blocks = floor((share x (visible memory - before) - after) / block bytes)

What an engine takes off before and after its share of memory is its rule (`KvRule`, one row of `KV_RULES` each).
A serving engine measures the terms by running its largest batch once. Here they are a formula over what the engine
allocates, with a few numbers per engine version (`Workspace`), checked against counts that real engines printed.
"""

import re
from collections.abc import Callable
from typing import Literal, NamedTuple

import msgspec

from jaxsim._core.errors import InputError, suggest
from jaxsim.spec.device import GIB, DeviceSpec
from jaxsim.spec.model import ModelSpec
from jaxsim.spec.plan import Plan, WeightFormat, kv_cache_bytes, weight_format

HIDDEN_COPIES = 4
"""Hidden-state tensors alive beside the FFN's: residual, normed input, output and one in flight."""

SAMPLER_HIDDEN_COPIES = 2
"""Hidden-state tensors still alive while logits are sampled."""


MOST_UTILIZATION = 0.95
"""The largest share of device memory that an error message proposes."""


LARGE_SHARE = 0.2
"""Activations above this share of device memory are large: an error message then proposes a smaller batch."""


class Workspace(NamedTuple):
    """Memory of an engine version beyond weights and KV blocks.

    bytes_per_logit: peak of the sampler for each sequence and vocabulary entry, 0 where the engine does not count
        it; non_torch_bytes: memory outside the framework's allocator (kernels, handles; in vLLM only its growth
        during start-up) on one device; non_torch_parallel_bytes: the same with tensor parallelism (communicators
        and their buffers); cuda_graph_bytes: set aside for captured graphs before the blocks are counted.
    """

    bytes_per_logit: float
    non_torch_bytes: float
    non_torch_parallel_bytes: float
    cuda_graph_bytes: float = 0.0

    def other_bytes(self, is_parallel: bool) -> float:
        """What is neither weights nor activations, on a device alone or one of several."""
        return self.cuda_graph_bytes + (self.non_torch_parallel_bytes if is_parallel else self.non_torch_bytes)


SORTED_LOGIT_BYTES = 2 + 4 + (4 + 8) + 8 + (4 + 8)
"""The sampler that sorts, B a logit: logits of 2 B and in float32, sorted values and int64 indices, int64 indices
before the sort, second buffers of the radix sort for both.

Source: `apply_top_k_top_p`, vllm/v1/sample/ops/topk_topp_sampler.py; `segmented_sort_pairs`, PyTorch's SortStable.cu.
"""

MASKED_LOGIT_BYTES = 2 + 4 + 4 + 4
"""The sampler whose Triton kernel masks in place, B a logit: logits of 2 B and in float32, probabilities, noise.

Source: `apply_top_k_top_p_triton`, `random_sample`, vllm/v1/sample/ops/topk_topp_sampler.py. Known gap: the kernel's
own buffer, one vocabulary in float32 per program.
"""

NON_TORCH_BYTES = 0.10 * GIB
"""vLLM 0.15 on one device, B. Source: KV blocks of Llama-2-7B on H100, vllm_h100_inferenceperf (shared data)."""

NON_TORCH_PARALLEL_BYTES = 0.48 * GIB
"""vLLM 0.15, a rank at TP2, B. Source: KV blocks of CodeLlama-34B, Mixtral-8x7B and Mistral-Nemo on two H100,
vllm_h100_inferenceperf and vllm_stage_aggregates (shared data): 0.49, 0.43, 0.51 GiB."""


Term = Literal["weights", "activations", "other"]

LABELS: dict[Term, str] = {"weights": "weights", "activations": "peak activations and sampler",
                           "other": "other (runtime, communicators, graphs)"}
"""The terms of the sum in words."""


class KvRule(NamedTuple):
    """How an engine splits device memory: KV = share x (visible - before) - after.

    engine: whose rule it is; share: its own name of the share, `engine.gpu_memory_utilization` here;
    before, after: what is taken off before and after the share is taken; must_hold_max_model_len: the engine
    does not start where one sequence of that length has no room; workspaces: by first version of the engine.
    """

    engine: str
    share: str
    before: tuple[Term, ...]
    after: tuple[Term, ...]
    must_hold_max_model_len: bool
    workspaces: tuple[tuple[tuple[int, int], Workspace], ...]

    def usable_bytes(self, visible_bytes: float, share: float, spent: dict[Term, float]) -> float:
        """Bytes that the share is."""
        return share * (visible_bytes - sum(spent[term] for term in self.before))

    def kv_bytes(self, visible_bytes: float, share: float, spent: dict[Term, float]) -> float:
        """Bytes left for KV blocks."""
        return self.usable_bytes(visible_bytes, share, spent) - sum(spent[term] for term in self.after)

    @property
    def knob(self) -> str:
        """The scenario's field of the share, with the engine's own name."""
        own = "" if self.share == "gpu_memory_utilization" else f" ({self.engine}'s {self.share})"
        return "engine.gpu_memory_utilization" + own


KV_RULES: dict[str, KvRule] = {
    # Source of the rule: `determine_available_memory`, vllm/v1/worker/gpu_worker.py: the requested share of all
    # memory, less weights, the measured activation peak and non-torch growth.
    # Non-torch memory is approximated by that of 0.15 in all other versions.
    "vllm": KvRule("vLLM", "gpu_memory_utilization", (), ("weights", "activations", "other"), True, (
        ((0, 0), Workspace(SORTED_LOGIT_BYTES, NON_TORCH_BYTES, NON_TORCH_PARALLEL_BYTES)),
        ((0, 17), Workspace(MASKED_LOGIT_BYTES, NON_TORCH_BYTES, NON_TORCH_PARALLEL_BYTES)))),
    # Source of the rule: `profile_max_num_token`, sglang/srt/model_executor/model_runner.py: free after loading, less
    # (1 - share) of what was free before loading. Activations and graphs live in the other 1 - share.
    # Runtime memory is approximated by vLLM 0.15's non-torch memory.
    "sglang": KvRule("SGLang", "mem_fraction_static", ("other",), ("weights",), False, (
        ((0, 0), Workspace(0.0, NON_TORCH_BYTES, NON_TORCH_PARALLEL_BYTES)),)),
    # Source of the rule: `_cal_max_tokens`, tensorrt_llm/_torch/pyexecutor/_util.py: the share of what is free at the
    # peak of a run of prompts as long as max_num_tokens, too few of them for their logits to count.
    # Runtime memory is approximated by vLLM 0.15's non-torch memory.
    "tensorrt-llm": KvRule("TensorRT-LLM", "free_gpu_memory_fraction", ("weights", "activations", "other"), (), False, (
        ((0, 0), Workspace(0.0, NON_TORCH_BYTES, NON_TORCH_PARALLEL_BYTES)),)),
}
"""By the name before the @ of a preset's `kv_rule`."""


def kv_rule(name: str) -> tuple[KvRule, Workspace]:
    """The rule of an engine and the workspace of its version: "vllm@0.15", "sglang@0.5"."""
    engine, _, version = name.partition("@")
    if engine not in KV_RULES:
        raise InputError("kv_rule", name, "no such rule", suggest(engine, KV_RULES))
    numbers = re.match(r"v?(\d+)(?:\.(\d+))?", version)
    if numbers is None:
        raise InputError("kv_rule", name, "names no version", f"write it like {engine}@1.0")
    rule, at = KV_RULES[engine], tuple(int(number or 0) for number in numbers.groups())
    return rule, [space for first, space in rule.workspaces if first <= at][-1]


class MemoryBudget(msgspec.Struct, frozen=True, kw_only=True):
    """How device memory is spent on one rank (of the pipeline stage that has the fewest blocks).

    gpu_memory_utilization: the share of memory, whatever the engine calls it.
    """

    rule: KvRule
    num_blocks: int
    block_size: int
    block_bytes: float
    visible_bytes: int
    gpu_memory_utilization: float
    weight_bytes: float
    activation_bytes: float
    other_bytes: float
    kv_bytes: float

    @property
    def num_tokens(self) -> int:
        """Tokens the blocks hold."""
        return self.num_blocks * self.block_size

    @property
    def spent(self) -> dict[Term, float]:
        """Bytes of each term of the sum."""
        return {"weights": self.weight_bytes, "activations": self.activation_bytes, "other": self.other_bytes}

    @property
    def usable_bytes(self) -> float:
        """Bytes that the share is."""
        return self.rule.usable_bytes(self.visible_bytes, self.gpu_memory_utilization, self.spent)

    @property
    def lines(self) -> tuple[str, ...]:
        """The sum, one term a line."""
        kib = self.block_bytes / 1024
        before, after = ([f"- {self.spent[term] / GIB:7.2f} GiB {LABELS[term]}" for term in terms]
                         for terms in (self.rule.before, self.rule.after))
        return (f"{self.visible_bytes / GIB:9.2f} GiB of device memory visible", *before,
                f"{self.usable_bytes / GIB:9.2f} GiB at {self.rule.share} {self.gpu_memory_utilization:g}", *after,
                f"= {self.kv_bytes / GIB:7.2f} GiB for KV = {self.num_blocks:,} blocks of {kib:,.0f} KiB "
                f"({self.num_tokens:,} tokens)")

    @property
    def sum(self) -> str:
        """The sum on one line."""
        before, after = ("".join(f" - {self.spent[term] / GIB:.2f} {term}" for term in terms)
                         for terms in (self.rule.before, self.rule.after))
        visible = f"{self.visible_bytes / GIB:.2f}"
        memory = f"({visible}{before}) GiB" if before else f"{visible} GiB"
        left = f"{after} = {self.kv_bytes / GIB:.2f} GiB" if after else ""
        return f"{self.gpu_memory_utilization:g} x {memory} = {self.usable_bytes / GIB:.2f} GiB{left}"


def rank_weight_bytes(model: ModelSpec, plan: Plan | None = None, fmt: WeightFormat | None = None,
                      stage: int = 0) -> float:
    """Weight bytes on one rank of a pipeline stage.

    Embeddings are on the first stage and the LM head on the last, both cut over tensor-parallel ranks; norms
    and the router are on every rank. MoE and dense layers are taken to be spread evenly over stages.
    """
    plan, fmt = plan or Plan(), fmt or weight_format("auto", model)
    tp, stages = plan.tensor_parallel_size, plan.pipeline_parallel_size
    layers = plan.stage_layers(model.layers)[stage]
    layer = model.layer_parameters(tp)
    experts = model.layer_parameters(plan.expert_group, plan.expert_ranks).experts * plan.expert_copies(model)
    moe = layers * model.num_moe_layers / model.layers
    # Copied where each of these ranks has tokens of its own.
    shared = model.layer_parameters(1 if plan.sends_tokens else tp).shared
    total = layers * (layer.attention * fmt.linear_bytes + layer.norms * fmt.other_bytes)
    total += (layers - moe) * layer.dense_ffn * fmt.linear_bytes
    total += moe * (experts * fmt.expert_bytes + shared * fmt.linear_bytes
                    + layer.router * fmt.other_bytes)
    first, last = stage == 0, stage == stages - 1
    head = 0 if model.tie_embeddings and first else model.vocab * model.hidden
    total += first * model.embedding_parameters / tp * fmt.other_bytes
    total += last * head / tp * fmt.other_bytes
    return total


def activation_bytes(model: ModelSpec, plan: Plan, fmt: WeightFormat, space: Workspace,
                     max_num_batched_tokens: int, max_num_seqs: int, is_last_stage: bool = True) -> float:
    """Peak activations of the largest step: the larger of an FFN and the sampler.

    FFN: tokens x (3 ffn + 4 hidden) numbers (2 ffn when not gated), or, for experts, two buffers over
    tokens x experts_per_token rows, of max(2 moe_ffn, hidden) and moe_ffn columns, which stay allocated.
    Sampler: sequences x vocabulary x bytes_per_logit, and two hidden states.
    """
    tokens, width = max_num_batched_tokens, fmt.activation_bytes
    # Context-parallel ranks share them; all sample.
    tokens = -(-tokens // plan.prefill_context_parallel_size)
    columns = 3 if model.gated else 2
    hidden = tokens * model.hidden * width
    dense = model.rank_shape(plan.tensor_parallel_size)
    ffn = tokens * columns * dense.ffn * width if model.num_dense_layers else 0.0
    experts = 0.0
    if model.experts:
        rows = tokens * model.experts_per_token * plan.data_parallel_size / plan.expert_ranks
        rows *= plan.prefill_context_parallel_size
        rows = max(rows, tokens) if plan.enable_expert_parallel else rows
        inner = plan.expert_shape(model).moe_ffn
        experts = rows * (max(2 * inner, model.hidden) + inner) * width
    sampler = 0.0
    if is_last_stage:
        sampler = (min(max_num_seqs, max_num_batched_tokens) * model.vocab * space.bytes_per_logit
                   + SAMPLER_HIDDEN_COPIES * hidden)
    return experts + max(ffn + HIDDEN_COPIES * hidden, sampler)


def kv_blocks(model: ModelSpec, device: DeviceSpec, plan: Plan | None = None, *, dtype: str = "auto",
              kv_dtype: str = "auto", block_size: int = 16, gpu_memory_utilization: float = 0.9,
              max_num_batched_tokens: int = 2048, max_num_seqs: int = 256, max_model_len: int | None = None,
              rule: str = "vllm@0.15", reserve: Workspace | None = None) -> MemoryBudget:
    """KV blocks of an instance, or an InputError that shows the sum.

    Arguments carry vLLM's names; `rule` is the engine's, with its version (`kv_rule`); `reserve` replaces the
    workspace of that version. With `max_model_len` it is an error if a single sequence of that length does not fit,
    for engines that then do not start. With pipeline stages the poorest stage decides.

    Source: see `KV_RULES`.
    Known gaps: windowed layers take blocks like full ones (vLLM pools them apart); vision towers; KV offload;
    whether activations fit beside SGLang's pool.
    """
    plan = (plan or Plan()).check(model)
    if not 0 < gpu_memory_utilization <= 1:
        raise InputError("engine.gpu_memory_utilization", gpu_memory_utilization, "must be between 0 and 1",
                         "give the share of device memory the engine may fill")
    split, space = kv_rule(rule)
    fmt, space = weight_format(dtype, model), reserve or space
    width = kv_cache_bytes(kv_dtype, dtype, model)
    need = max_model_len if max_model_len is not None and split.must_hold_max_model_len else 1

    def spend(plan: Plan, tokens: int, sequences: int, utilization: float = gpu_memory_utilization) -> MemoryBudget:
        return _spend(model, device, plan, split, fmt, space, width, block_size, utilization, tokens, sequences)

    budget = spend(plan, max_num_batched_tokens, max_num_seqs)
    if budget.num_tokens >= need:
        return budget
    tp = plan.tensor_parallel_size
    what = (f"does not fit on {device.name}" if budget.num_blocks < 1 else
            f"leaves room for {budget.num_tokens:,} KV tokens on {device.name}, fewer than max_model_len = {need:,}")
    per_rank = f" a rank at tensor_parallel_size {tp}" if tp > 1 else ""
    remedies = []
    # The least change first: more of the same memory, a smaller batch, then more devices.
    for share in range(int(100 * gpu_memory_utilization) + 1, int(100 * MOST_UTILIZATION) + 1):
        if spend(plan, max_num_batched_tokens, max_num_seqs, share / 100).num_tokens >= need:
            remedies.append(f"raise {split.knob} to at least {share / 100:g}")
            break
    if budget.activation_bytes > LARGE_SHARE * device.usable_memory_bytes:
        # Where one of the two sizes the largest step the other does not help.
        for field, tokens, sequences in (("max_num_batched_tokens", 1, 0), ("max_num_seqs", 0, 1)):
            for halvings in range(1, 32):
                smaller = (max_num_batched_tokens >> tokens * halvings, max_num_seqs >> sequences * halvings)
                if min(smaller) < 1:
                    break
                if spend(plan, *smaller).num_tokens >= need:
                    remedies.append(f"lower engine.{field} to at most {smaller[0] if tokens else smaller[1]}")
                    break
    if not remedies:
        wider = _fitting_tensor_ranks(model, plan, lambda p: spend(p, max_num_batched_tokens, max_num_seqs), need)
        remedies.append(f"use tensor_parallel_size = {wider}" if wider else "use a larger device or a narrower dtype")
    if budget.num_blocks >= 1:
        remedies.append("lower max_model_len")
    raise InputError("model.name", model.name, f"{what}: {budget.sum} for KV{per_rank}", ", or ".join(remedies))


def _spend(model: ModelSpec, device: DeviceSpec, plan: Plan, rule: KvRule, fmt: WeightFormat, space: Workspace,
           kv_width: float, block_size: int, gpu_memory_utilization: float, max_num_batched_tokens: int,
           max_num_seqs: int) -> MemoryBudget:
    """The budget of the pipeline stage that has the fewest blocks, whether or not anything fits."""
    tp, stages = plan.tensor_parallel_size, plan.pipeline_parallel_size
    # A block has as many tokens on all ranks that share a cache by tokens.
    per_layer = model.layer_kv_bytes_per_token(kv_width, tp) * block_size / plan.decode_context_parallel_size
    is_parallel = tp > 1 or plan.ranks_of_tokens(model) > 1 or plan.prefill_context_parallel_size > 1
    other = space.other_bytes(is_parallel)
    budgets = []
    for stage, layers in enumerate(plan.stage_layers(model.layers)):
        weights = rank_weight_bytes(model, plan, fmt, stage)
        activations = activation_bytes(model, plan, fmt, space, max_num_batched_tokens, max_num_seqs,
                                       stage == stages - 1)
        left = rule.kv_bytes(device.usable_memory_bytes, gpu_memory_utilization,
                             {"weights": weights, "activations": activations, "other": other})
        budgets.append(MemoryBudget(
            rule=rule,
            num_blocks=max(int(left // (per_layer * layers)), 0), block_size=block_size,
            block_bytes=per_layer * layers, visible_bytes=device.usable_memory_bytes,
            gpu_memory_utilization=gpu_memory_utilization, weight_bytes=weights, activation_bytes=activations,
            other_bytes=other, kv_bytes=left))
    return min(budgets, key=lambda b: b.num_blocks)


def _fitting_tensor_ranks(model: ModelSpec, plan: Plan, spend: Callable[[Plan], MemoryBudget],
                          need: int) -> int | None:
    """The next doubling of tensor parallelism that fits, up to 16, for the error message."""
    ranks = 2 * plan.tensor_parallel_size
    while ranks <= 16:
        wider = msgspec.structs.replace(plan, tensor_parallel_size=ranks)
        try:
            if spend(wider.check(model)).num_tokens >= need:
                return ranks
        except InputError:
            return None
        ranks *= 2
    return None
