"""How a model is laid out on devices, and in which number formats."""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from jaxsim._core.errors import InputError, suggest
from jaxsim.spec.engine import EngineConfig
from jaxsim.spec.model import ModelSpec, RankShape
from jaxsim.spec.quantization import (
    EXAMPLES,
    KV_BYTES,
    WEIGHT_ONLY,
    Quantization,
    WeightFormat,
    is_quantization_name,
)

Degree = Annotated[int, Meta(ge=1)]

_FORMATS = {f.name: f for f in (
    WeightFormat("float32", 4, 4, 4, 4, "fp32"),
    WeightFormat("bfloat16", 2, 2, 2, 2, "bf16"),
    WeightFormat("float16", 2, 2, 2, 2, "bf16"),
    WeightFormat("fp8", 1, 1, 2, 2, "fp8"),
    # 8-bit values, one scale for every 128 x 128 (and for every 128 activations)
    WeightFormat("fp8_block", 1, 1, 2, 2, "fp8"),
    WeightFormat("int8", 1, 1, 2, 2, "int8"),
    # 4-bit values, one 16-bit scale for every 128, no zero points
    WeightFormat("int4", 0.515625, 0.515625, 2, 2, "bf16", WEIGHT_ONLY),
    # 4-bit values, one 8-bit scale for every 16 (nvfp4)
    WeightFormat("fp4", 0.5625, 0.5625, 2, 2, "fp4"),
    # 4-bit experts with an 8-bit scale for every 32, the rest 16-bit; Hopper multiplies in bf16
    WeightFormat("mxfp4", 2, 0.53125, 2, 2, "bf16"),
)}
_FORMAT_ALIASES = {
    "fp32": "float32", "float": "float32", "bf16": "bfloat16", "fp16": "float16", "half": "float16",
    "fp8_e4m3": "fp8", "float8_e4m3fn": "fp8", "w8a8": "int8", "w4a16": "int4", "awq": "int4", "gptq": "int4",
    "nvfp4": "fp4",
}


def weight_format(dtype: str, model: ModelSpec | None = None) -> WeightFormat:
    """The number format called `dtype`; "auto" is the model's own.

    Besides the formats here: names of `jaxsim.spec.quantization.Quantization.from_name`, such as "int3-g128".
    """
    name = (model.dtype if model is not None else "bfloat16") if dtype == "auto" else dtype
    name = _FORMAT_ALIASES.get(str(name).lower(), str(name).lower())
    if name not in _FORMATS and is_quantization_name(name):
        return Quantization.from_name(name).weight_format(model)
    if name not in _FORMATS:
        of = f" (of {model.name})" if dtype == "auto" and model is not None else ""
        raise InputError("model.dtype", model.dtype if of else dtype, f"is not a weight format{of}",
                         suggest(name, [*_FORMATS, *_FORMAT_ALIASES, *EXAMPLES]))
    return _FORMATS[name]


def kv_cache_bytes(kv_dtype: str, dtype: str = "auto", model: ModelSpec | None = None) -> float:
    """Bytes of a cached number; "auto" is what the name of a quantised `dtype` says, or the width of activations."""
    if kv_dtype == "auto":
        fmt = weight_format(dtype, model)
        kv_format = Quantization.from_name(fmt.name).kv_format if fmt.name not in _FORMATS else "auto"
        return fmt.activation_bytes if kv_format == "auto" else KV_BYTES[kv_format]
    if str(kv_dtype).lower() not in KV_BYTES:
        raise InputError("model.kv_dtype", kv_dtype, "is not a KV cache format", suggest(kv_dtype, KV_BYTES))
    return KV_BYTES[str(kv_dtype).lower()]


class Plan(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Parallel degrees of one serving instance, by vLLM's names.

    Data-parallel ranks of a dense model are independent copies. Those of a mixture of experts copy attention and share
    the experts: with `enable_expert_parallel` whole ones are spread over tensor x data ranks, without it each is cut
    over them. A step exchanges tokens among them: all are gathered everywhere and their sums scattered, unless
    `all_to_all` sends each to the ranks of its experts, which have to be whole; by DeepEP's kernels where `deep_ep`
    says which. `kv_parallel_size` groups, each with all of the model, share the KV of long contexts.

    prefill_context_parallel_size: groups of tensor-parallel ranks that share the tokens of a prompt chunk, on devices
    of their own; decode_context_parallel_size: tensor-parallel ranks that share the tokens of a KV cache instead of
    copying its heads (`jaxsim.cost.context_parallel`). enable_sequence_parallelism: reduce-scatter and all-gather
    instead of all-reduce, norms on a share of the tokens. enable_eplb: a load balancer places experts, with
    `num_redundant_experts` copies of the most popular in all (`jaxsim.cost.expert_load`).
    """

    tensor_parallel_size: Degree = 1
    pipeline_parallel_size: Degree = 1
    data_parallel_size: Degree = 1
    enable_expert_parallel: bool = False
    all_to_all: bool = False
    kv_parallel_size: Degree = 1
    deep_ep: Literal["", "high_throughput", "low_latency"] = ""
    prefill_context_parallel_size: Degree = 1
    decode_context_parallel_size: Degree = 1
    enable_sequence_parallelism: bool = False
    enable_eplb: bool = False
    num_redundant_experts: int = 0

    def __post_init__(self):
        for field in ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size",
                      "prefill_context_parallel_size", "decode_context_parallel_size", "kv_parallel_size"):
            if not isinstance(getattr(self, field), int) or getattr(self, field) < 1:
                raise InputError(f"engine.{field}", getattr(self, field), "must be an integer of at least 1")

    @property
    def num_devices(self) -> int:
        """Devices of the instance."""
        return (self.tensor_parallel_size * self.pipeline_parallel_size * self.data_parallel_size
                * self.prefill_context_parallel_size * self.kv_parallel_size)

    @property
    def label(self) -> str:
        """As people write it: "TP2 DP4 EP"."""
        named = (("TP", self.tensor_parallel_size), ("DP", self.data_parallel_size),
                 ("PP", self.pipeline_parallel_size), ("PCP", self.prefill_context_parallel_size),
                 ("DCP", self.decode_context_parallel_size), ("KVP", self.kv_parallel_size))
        parts = [f"{name}{size}" for name, size in named if size > 1 or name == "TP"]
        parts += ["EP"] if self.enable_expert_parallel else []
        parts += [f"+{self.num_redundant_experts}"] if self.num_redundant_experts else []
        return " ".join(parts + (["SP"] if self.enable_sequence_parallelism else []))

    @property
    def expert_group(self) -> int:
        """Ranks over which experts are spread or cut."""
        return self.tensor_parallel_size * self.data_parallel_size * self.prefill_context_parallel_size

    @property
    def expert_ranks(self) -> int:
        """Ranks over which whole experts are spread; 1 where each expert is cut."""
        return self.expert_group if self.enable_expert_parallel else 1

    @property
    def sends_tokens(self) -> bool:
        """Whether each token is sent to the ranks of its experts, and only there.

        Tensor-parallel ranks then have a share of the tokens each, from the router to the combine; shared experts are
        copied, and hidden states are gathered after it. Source: vllm-project/vllm from 0.11 (pull request 24134),
        `use_sequence_parallel_moe`, which asks for data-parallel ranks, as is taken to hold for context ranks too.
        """
        groups = self.data_parallel_size * self.prefill_context_parallel_size
        return self.all_to_all and self.enable_expert_parallel and groups > 1

    def ranks_in_step(self, model: ModelSpec) -> int:
        """Data-parallel ranks that iterate together, around experts that they share; 1 where each is by itself."""
        return self.data_parallel_size if model.experts else 1

    def expert_shape(self, model: ModelSpec) -> RankShape:
        """What one rank holds of the experts: a share of whole ones, or a slice of each.

        Source: vLLM, `FusedMoEParallelConfig.make`: both are over tensor x data ranks.
        """
        shape = model.rank_shape(self.expert_group, self.expert_ranks)
        if not self.num_redundant_experts:
            return shape
        return shape._replace(num_experts=shape.num_experts * self.expert_copies(model))

    def expert_copies(self, model: ModelSpec) -> float:
        """Places for experts, over experts."""
        return 1 + self.num_redundant_experts / model.experts if self.num_redundant_experts else 1.0

    def ranks_of_tokens(self, model: ModelSpec) -> int:
        """Groups of tensor-parallel ranks with tokens of their own that meet around shared experts."""
        return self.ranks_in_step(model) * (self.prefill_context_parallel_size if model.experts else 1)

    def stage_layers(self, layers: int) -> tuple[int, ...]:
        """Layers of each pipeline stage. A remainder goes to the stages before the last, from the back.

        Source: vLLM, `get_pp_indices`: the last stage also has the LM head, so it gets no extra layer.
        """
        stages = self.pipeline_parallel_size
        counts = [layers // stages] * stages
        for i in range(layers % stages):
            counts[-2 - i] += 1
        return tuple(counts)

    def check(self, model: ModelSpec) -> "Plan":
        """Raise where the model cannot be cut this way; returns itself."""
        tp, ranks = self.tensor_parallel_size, self.expert_ranks

        def divides(field, count, by, what):
            if count % by:
                near = [n for n in range(1, count + 1) if count % n == 0 and n <= 2 * by]
                raise InputError(f"engine.{field}", by, f"does not divide the {count} {what} of {model.name}",
                                 f"use one of {', '.join(map(str, near))}")

        divides("tensor_parallel_size", model.heads, tp, "attention heads")
        if not model.is_mla and model.kv_heads % tp and tp % model.kv_heads:
            raise InputError("engine.tensor_parallel_size", tp,
                             f"is no divisor or multiple of the {model.kv_heads} KV heads of {model.name}",
                             f"use a divisor or a multiple of {model.kv_heads}")
        if model.num_dense_layers:
            divides("tensor_parallel_size", model.ffn, tp, "FFN columns")
        if self.enable_expert_parallel and not model.experts:
            raise InputError("engine.enable_expert_parallel", True, f"{model.name} has no experts",
                             "leave it out")
        if model.experts and not self.enable_expert_parallel:
            divides("tensor_parallel_size", model.moe_ffn, tp, "columns of an expert")
            if model.moe_ffn % self.expert_group:
                raise InputError("engine.data_parallel_size", self.data_parallel_size,
                                 f"makes {self.expert_group} tensor x data ranks, which do not divide the"
                                 f" {model.moe_ffn} columns of an expert of {model.name}",
                                 "use fewer ranks, or set engine.enable_expert_parallel = true")
        if model.experts and ranks > model.experts + self.num_redundant_experts:
            raise InputError("engine.enable_expert_parallel", True,
                             f"{ranks} ranks cannot share the {model.experts} experts of {model.name}",
                             "use fewer ranks")
        check_experts(self, model)
        check_contexts(self, model)
        if self.pipeline_parallel_size > model.layers:
            raise InputError("engine.pipeline_parallel_size", self.pipeline_parallel_size,
                             f"more than the {model.layers} layers of {model.name}", "use fewer stages")
        return self


def plan_of(engine: EngineConfig) -> Plan:
    """The plan of an engine, not checked against a model."""
    backend = engine.all2all_backend
    return Plan(**{name: getattr(engine, name) for name in (
        "tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size", "enable_expert_parallel",
        "prefill_context_parallel_size", "decode_context_parallel_size", "enable_sequence_parallelism", "enable_eplb",
        "num_redundant_experts", "kv_parallel_size")}, all_to_all=backend not in ("allgather_reducescatter", "naive"),
        deep_ep=backend.removeprefix("deepep_") if backend.startswith("deepep_") else "")


def check_experts(plan: Plan, model: ModelSpec) -> None:
    """Refuse whole experts that cannot be spread evenly. Raises `InputError`."""
    ranks, redundant = plan.expert_ranks, plan.num_redundant_experts
    if redundant < 0:
        raise InputError("engine.num_redundant_experts", redundant, "is negative", "give 0 or more")
    for field, value in (("enable_eplb", plan.enable_eplb), ("num_redundant_experts", redundant)):
        if value and (ranks == 1 or not model.experts):
            raise InputError(f"engine.{field}", value, "without whole experts on several ranks there is nothing to"
                             " balance", "set engine.enable_expert_parallel = true with more ranks, or leave it out")
    if redundant and not plan.enable_eplb:
        raise InputError("engine.num_redundant_experts", redundant, "has no effect without a load balancer",
                         "set engine.enable_eplb = true, or leave it out")
    places = model.experts + redundant
    if ranks > 1 and places % ranks:
        what = f"{model.experts} experts" + (f" + {redundant} redundant = {places}" if redundant else "")
        low, high = places - places % ranks - model.experts, places - places % ranks + ranks - model.experts
        fits = " or ".join(str(count) for count in (low, high) if count >= 0)
        raise InputError("engine.enable_expert_parallel", True,
                         f"{ranks} ranks do not divide the {what} of {model.name}: {places % ranks} would be left over",
                         f"use ranks that divide them, or num_redundant_experts = {fits} with enable_eplb")
    if plan.deep_ep and not plan.all_to_all:
        raise InputError("deep_ep", plan.deep_ep, "sends tokens", "set all_to_all as well")


def check_contexts(plan: Plan, model: ModelSpec) -> None:
    """Refuse contexts that cannot be cut this way. Raises `InputError`."""
    tensors, shards, ring = (plan.tensor_parallel_size, plan.decode_context_parallel_size,
                             plan.prefill_context_parallel_size)
    heads = 1 if model.is_mla else model.kv_heads
    if shards > 1 and (tensors % shards or shards * heads > tensors):
        fits = [n for n in range(1, tensors + 1) if tensors % n == 0 and n * heads <= tensors]
        raise InputError("engine.decode_context_parallel_size", shards,
                         f"{tensors} tensor-parallel ranks hold {heads} KV head{'s' * (heads > 1)} {tensors / heads:g}"
                         f" times: no more ranks than that, and no divisor of {tensors}, can share a cache by tokens",
                         f"use {' or '.join(map(str, fits))}" if fits else
                         f"leave it out, or use more than {heads} tensor-parallel ranks")
    if ring > 1 and plan.ranks_in_step(model) > 1:
        raise InputError("engine.prefill_context_parallel_size", ring,
                         "with data-parallel ranks that iterate together is not simulated",
                         "use 1, or engine.data_parallel_size = 1")
    for field, value in (("prefill_context_parallel_size", ring), ("decode_context_parallel_size", shards)):
        if value > 1 and model.window_layers:
            raise InputError(f"engine.{field}", value, f"is not simulated with the sliding windows of {model.name}",
                             "use 1")
    if plan.enable_sequence_parallelism and tensors == 1:
        raise InputError("engine.enable_sequence_parallelism", True, "one tensor-parallel rank has nobody to share"
                         " tokens with", "use more tensor-parallel ranks, or leave it out")
