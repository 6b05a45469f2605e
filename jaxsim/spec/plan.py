"""How a model is laid out on devices, and in which number formats."""

from typing import Annotated

import msgspec
from msgspec import Meta

from jaxsim._core.errors import InputError, suggest
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
    `all_to_all` sends each to the ranks of its experts, which have to be whole. `kv_parallel_size` groups, each with
    all of the model, share the KV of long contexts.
    """

    tensor_parallel_size: Degree = 1
    pipeline_parallel_size: Degree = 1
    data_parallel_size: Degree = 1
    enable_expert_parallel: bool = False
    all_to_all: bool = False
    kv_parallel_size: Degree = 1

    def __post_init__(self):
        for field in ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size",
                      "kv_parallel_size"):
            if not isinstance(getattr(self, field), int) or getattr(self, field) < 1:
                raise InputError(f"engine.{field}", getattr(self, field), "must be an integer of at least 1")

    @property
    def num_devices(self) -> int:
        """Devices of the instance."""
        one = self.tensor_parallel_size * self.pipeline_parallel_size * self.data_parallel_size
        return one * self.kv_parallel_size

    @property
    def expert_ranks(self) -> int:
        """Ranks over which whole experts are spread; 1 where each expert is cut."""
        return self.tensor_parallel_size * self.data_parallel_size if self.enable_expert_parallel else 1

    def ranks_in_step(self, model: ModelSpec) -> int:
        """Data-parallel ranks that iterate together, around experts that they share; 1 where each is by itself."""
        return self.data_parallel_size if model.experts else 1

    def expert_shape(self, model: ModelSpec) -> RankShape:
        """What one rank holds of the experts: a share of whole ones, or a slice of each.

        Source: vLLM, `FusedMoEParallelConfig.make`: both are over tensor x data ranks.
        """
        ranks = self.tensor_parallel_size * self.data_parallel_size
        return model.rank_shape(ranks, self.expert_ranks)

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
            if model.moe_ffn % (tp * self.data_parallel_size):
                raise InputError("engine.data_parallel_size", self.data_parallel_size,
                                 f"makes {tp * self.data_parallel_size} tensor x data ranks, which do not divide the"
                                 f" {model.moe_ffn} columns of an expert of {model.name}",
                                 "use fewer ranks, or set engine.enable_expert_parallel = true")
        if model.experts and ranks > model.experts:
            raise InputError("engine.enable_expert_parallel", True,
                             f"{ranks} ranks cannot share the {model.experts} experts of {model.name}",
                             "use fewer ranks")
        if self.pipeline_parallel_size > model.layers:
            raise InputError("engine.pipeline_parallel_size", self.pipeline_parallel_size,
                             f"more than the {model.layers} layers of {model.name}", "use fewer stages")
        return self
