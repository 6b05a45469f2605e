"""KV blocks from device memory, the way the engine derives them at start-up, with the sum written out.

    blocks = floor((visible memory x gpu_memory_utilization - weights - activations - other) / block bytes)

A serving engine measures the last terms by running its largest batch once. Here they are a formula with a few
numbers per engine version (`Workspace`), checked against published start-up logs.
"""

from collections.abc import Callable
from typing import NamedTuple

import msgspec

from jaxsim._core.errors import InputError
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

    bytes_per_logit: peak of the sampler for each sequence and vocabulary entry (fp32 logits, sorted values
        and indices, probabilities); non_torch_bytes: CUDA context growth, kernels, handles on one device;
    non_torch_parallel_bytes: the same with tensor parallelism (communicators and their buffers);
    cuda_graph_bytes: set aside for captured graphs before the blocks are counted.
    """

    bytes_per_logit: float
    non_torch_bytes: float
    non_torch_parallel_bytes: float
    cuda_graph_bytes: float = 0.0


WORKSPACES: tuple[tuple[tuple[int, int], Workspace], ...] = (
    ((0, 0), Workspace(39.0, 0.13 * GIB, 0.60 * GIB)),
    ((0, 17), Workspace(14.2, 0.13 * GIB, 0.60 * GIB)),
    ((0, 18), Workspace(14.2, 0.25 * GIB, 2.08 * GIB)),
)
"""By first vLLM version.

Source: llm-d-planner accuracy report (58 start-ups of vLLM 0.15 to 0.19 on H100): activations of Qwen3-14B
5.64 GiB to 0.16 and 2.23 GiB from 0.17 on; from 0.17 on 1.52, 1.89, 2.21 and 3.63 GiB at vocabularies of
100,352, 128,256, 152,064 and 256,000 with 1,024 sequences, a line of 14.2 B a logit; non-torch memory 0.13
GiB to 0.17, 0.25 GiB from 0.18, 2.08 GiB a rank at TP2. Parallel non-torch memory to 0.17: 0.6 GiB, from KV
blocks of public H100 TP2 runs.
"""


def workspace(engine_version: str) -> Workspace:
    """The workspace of a vLLM version ("0.15", "0.19.0")."""
    try:
        major, minor = (int(part) for part in (str(engine_version).lstrip("v") + ".0").split(".")[:2])
    except ValueError:
        raise InputError("engine_version", engine_version, "is not a version", "write it like 0.19") from None
    return [w for first, w in WORKSPACES if first <= (major, minor)][-1]


class MemoryBudget(msgspec.Struct, frozen=True, kw_only=True):
    """How device memory is spent on one rank (of the pipeline stage that has the fewest blocks)."""

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
    def lines(self) -> tuple[str, ...]:
        """The sum, one term a line."""
        usable = self.visible_bytes * self.gpu_memory_utilization
        kib = self.block_bytes / 1024
        return (f"{self.visible_bytes / GIB:9.2f} GiB of device memory visible",
                f"{usable / GIB:9.2f} GiB at gpu_memory_utilization {self.gpu_memory_utilization:g}",
                f"- {self.weight_bytes / GIB:7.2f} GiB weights",
                f"- {self.activation_bytes / GIB:7.2f} GiB peak activations and sampler",
                f"- {self.other_bytes / GIB:7.2f} GiB other (runtime, communicators, graphs)",
                f"= {self.kv_bytes / GIB:7.2f} GiB for KV = {self.num_blocks:,} blocks of {kib:,.0f} KiB "
                f"({self.num_tokens:,} tokens)")

    @property
    def sum(self) -> str:
        """The sum on one line."""
        usable = self.visible_bytes * self.gpu_memory_utilization
        visible = self.visible_bytes / GIB
        return (f"{self.gpu_memory_utilization:g} x {visible:.2f} GiB = {usable / GIB:.2f} GiB "
                f"- {self.weight_bytes / GIB:.2f} weights - {self.activation_bytes / GIB:.2f} activations "
                f"- {self.other_bytes / GIB:.2f} other = {self.kv_bytes / GIB:.2f} GiB")


def rank_weight_bytes(model: ModelSpec, plan: Plan | None = None, fmt: WeightFormat | None = None,
                      stage: int = 0) -> float:
    """Weight bytes on one rank of a pipeline stage.

    Embeddings are on the first stage and the LM head on the last, both cut over tensor-parallel ranks; norms
    and the router are on every rank. MoE and dense layers are taken to be spread evenly over stages.
    """
    plan, fmt = plan or Plan(), fmt or weight_format("auto", model)
    tp, stages = plan.tensor_parallel_size, plan.pipeline_parallel_size
    layers = plan.stage_layers(model.layers)[stage]
    layer = model.layer_parameters(tp, plan.expert_ranks)
    moe = layers * model.num_moe_layers / model.layers
    total = layers * (layer.attention * fmt.linear_bytes + layer.norms * fmt.other_bytes)
    total += (layers - moe) * layer.dense_ffn * fmt.linear_bytes
    total += moe * (layer.experts * fmt.expert_bytes + layer.shared * fmt.linear_bytes
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
    rank = model.rank_shape(plan.tensor_parallel_size, plan.expert_ranks)
    columns = 3 if model.gated else 2
    hidden = tokens * model.hidden * width
    ffn = tokens * columns * rank.ffn * width if model.num_dense_layers else 0.0
    experts = 0.0
    if model.experts:
        rows = tokens * model.experts_per_token * plan.data_parallel_size / plan.expert_ranks
        rows = max(rows, tokens) if plan.enable_expert_parallel else rows
        experts = rows * (max(2 * rank.moe_ffn, model.hidden) + rank.moe_ffn) * width
    sampler = 0.0
    if is_last_stage:
        sampler = (min(max_num_seqs, tokens) * model.vocab * space.bytes_per_logit
                   + SAMPLER_HIDDEN_COPIES * hidden)
    return experts + max(ffn + HIDDEN_COPIES * hidden, sampler)


def kv_blocks(model: ModelSpec, device: DeviceSpec, plan: Plan | None = None, *, dtype: str = "auto",
              kv_dtype: str = "auto", block_size: int = 16, gpu_memory_utilization: float = 0.9,
              max_num_batched_tokens: int = 2048, max_num_seqs: int = 256, max_model_len: int | None = None,
              engine_version: str = "0.15", reserve: Workspace | None = None) -> MemoryBudget:
    """KV blocks of an instance, or an InputError that shows the sum.

    Arguments carry vLLM's names; `reserve` replaces the workspace of `engine_version`. With `max_model_len`
    it is an error if a single sequence of that length does not fit, as in the engine.

    Source: vLLM's `determine_available_memory`: the KV pool is what is left of the requested share of memory
    after weights, the measured activation peak and non-torch growth; with pipeline stages the poorest stage
    decides.
    Known gaps: windowed layers take blocks like full ones (vLLM pools them apart); vision towers; KV offload.
    """
    plan = (plan or Plan()).check(model)
    if not 0 < gpu_memory_utilization <= 1:
        raise InputError("engine.gpu_memory_utilization", gpu_memory_utilization, "must be between 0 and 1",
                         "give the share of device memory the engine may fill")
    fmt, space = weight_format(dtype, model), reserve or workspace(engine_version)
    width = kv_cache_bytes(kv_dtype, dtype, model)
    need = 1 if max_model_len is None else max_model_len

    def spend(plan: Plan, tokens: int, sequences: int, utilization: float = gpu_memory_utilization) -> MemoryBudget:
        return _spend(model, device, plan, fmt, space, width, block_size, utilization, tokens, sequences)

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
            remedies.append(f"raise engine.gpu_memory_utilization to at least {share / 100:g}")
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


def _spend(model: ModelSpec, device: DeviceSpec, plan: Plan, fmt: WeightFormat, space: Workspace, kv_width: float,
           block_size: int, gpu_memory_utilization: float, max_num_batched_tokens: int,
           max_num_seqs: int) -> MemoryBudget:
    """The budget of the pipeline stage that has the fewest blocks, whether or not anything fits."""
    tp, stages = plan.tensor_parallel_size, plan.pipeline_parallel_size
    per_layer = model.layer_kv_bytes_per_token(kv_width, tp) * block_size
    is_parallel = tp > 1 or (plan.enable_expert_parallel and plan.data_parallel_size > 1)
    other = space.non_torch_parallel_bytes if is_parallel else space.non_torch_bytes
    other += space.cuda_graph_bytes
    budgets = []
    for stage, layers in enumerate(plan.stage_layers(model.layers)):
        weights = rank_weight_bytes(model, plan, fmt, stage)
        activations = activation_bytes(model, plan, fmt, space, max_num_batched_tokens, max_num_seqs,
                                       stage == stages - 1)
        left = device.usable_memory_bytes * gpu_memory_utilization - weights - activations - other
        budgets.append(MemoryBudget(
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
