"""Weights and KV of a model that a GPU and its host hold together, with the sums written out.

    host   streamed weights + experts that the CPU computes + KV, where the CPU attends
    GPU    resident weights, hot experts among them + two layers of streamed ones + activations + runtime
           [+ KV, where the GPU attends]

A layer computes while the next one arrives, hence two (MoE-Lens, arXiv 2504.09345; host memory is pinned whole). KV in
host memory is given by blocks like KV on the device.
"""

from typing import NamedTuple

import msgspec

from jaxsim._core.errors import InputError
from jaxsim.spec.device import DeviceSpec
from jaxsim.spec.hybrid import HybridSection
from jaxsim.spec.memory import activation_bytes, kv_rule, rank_weight_bytes
from jaxsim.spec.model import ModelSpec
from jaxsim.spec.plan import Plan, kv_cache_bytes, weight_format

GB = 1e9

FIELD = "engine.hybrid"

STREAMED_LAYERS = 2
"""On the GPU at a time: one computes, the next arrives."""


class Weights(NamedTuple):
    """Where weights are, in bytes.

    resident: on the GPU, hot experts among them whatever is streamed; streamed: over the link in every iteration;
    on_cpu: experts that the CPU computes.
    layer: of the streamed ones, a layer's (embeddings and LM head are spread over the layers).
    """

    resident: float
    streamed: float
    on_cpu: float
    layer: float

    @property
    def on_host(self) -> float:
        """In host memory."""
        return self.streamed + self.on_cpu

    @property
    def on_gpu(self) -> float:
        """In GPU memory at a time."""
        return self.resident + min(STREAMED_LAYERS * self.layer, self.streamed)


def place_weights(model: ModelSpec, given: HybridSection, dtype: str = "auto") -> Weights:
    """Weights by place. Raises `InputError` for parts of a model that it has not."""
    fmt = weight_format(dtype, model)
    total = rank_weight_bytes(model, Plan(), fmt)
    on_cpu = hot = 0.0
    if given.experts == "cpu":
        if not model.experts:
            raise InputError(f"{FIELD}.experts", "cpu", f"{model.name} has no experts", "use 'gpu'")
        if given.hot_experts > model.experts:
            raise InputError(f"{FIELD}.hot_experts", given.hot_experts,
                             f"are more than the {model.experts} experts of a layer of {model.name}", "lower it")
        experts = model.num_moe_layers * model.layer_parameters().experts * fmt.expert_bytes
        on_cpu = experts * (1 - given.hot_experts / model.experts)
        hot = experts - on_cpu
    by_gpu, streamed = total - on_cpu, 0.0
    if given.is_streamed:
        # Hot experts stay.
        most = by_gpu - hot
        streamed = most - GB * (given.resident_weight_gb or 0.0)
        field, value = "resident_weight_gb", given.resident_weight_gb
        if given.cpu_offload_gb is not None:
            streamed, field, value = GB * given.cpu_offload_gb, "cpu_offload_gb", given.cpu_offload_gb
        if not 0 <= streamed <= most:
            beside = " beside hot experts" if hot else ""
            raise InputError(f"{FIELD}.{field}", value,
                             f"is more than the {most / GB:.1f} GB of weights that the GPU computes with{beside}",
                             "lower it")
    return Weights(by_gpu - streamed, streamed, on_cpu, streamed / model.layers)


class HostBudget(msgspec.Struct, frozen=True, kw_only=True):
    """KV blocks of an engine with a hybrid section, and what the rest of both memories holds.

    kv_bytes: room for KV, in host memory if `is_on_host`, else on the GPU; weight_bytes: on the GPU at a time.
    """

    num_blocks: int
    block_size: int
    block_bytes: float
    kv_bytes: float
    is_on_host: bool
    weight_bytes: float
    host_weight_bytes: float
    activation_bytes: float
    other_bytes: float
    usable_bytes: float

    @property
    def num_tokens(self) -> int:
        """Tokens the blocks hold."""
        return self.num_blocks * self.block_size

    @property
    def lines(self) -> tuple[str, ...]:
        """Both sums, one a line."""
        where = "host memory" if self.is_on_host else "GPU memory"
        return (f"host memory: {self.host_weight_bytes / GB:.1f} GB of weights"
                + (f", {self.kv_bytes / GB:.1f} GB for KV" if self.is_on_host else ""),
                f"GPU memory: {self.weight_bytes / GB:.1f} GB of weights at a time,"
                f" {(self.activation_bytes + self.other_bytes) / GB:.1f} GB of activations and runtime, of"
                f" {self.usable_bytes / GB:.1f} GB",
                f"{self.num_blocks:,} KV blocks in {where} ({self.num_tokens:,} tokens)")


def host_blocks(model: ModelSpec, device: DeviceSpec, cpu: DeviceSpec | None, given: HybridSection, *,
                dtype: str = "auto", kv_dtype: str = "auto", block_size: int = 16, gpu_memory_utilization: float = 0.9,
                max_num_batched_tokens: int = 2048, max_num_seqs: int = 256, max_model_len: int | None = None,
                rule: str = "vllm@0.15", num_gpu_blocks_override: int | None = None) -> HostBudget:
    """KV blocks of a GPU and its host, or an `InputError` with the sum that does not work out.

    Arguments carry vLLM's names, as those of `jaxsim.spec.memory.kv_blocks`; whatever the rule of the engine, the GPU's
    share is of all of its memory. cpu: where it is named. num_gpu_blocks_override: so many, if they fit.
    """
    weights, fmt = place_weights(model, given, dtype), weight_format(dtype, model)
    split, space = kv_rule(rule)
    usable = gpu_memory_utilization * visible_bytes(device, given)
    activations = activation_bytes(model, Plan(), fmt, space, max_num_batched_tokens, max_num_seqs)
    other = space.other_bytes(False)
    left = usable - weights.on_gpu - activations - other
    if left <= 0:
        _refuse_gpu(model, given, weights, activations + other, usable, fmt.expert_bytes)
    block_bytes = block_size * model.kv_bytes_per_token(kv_cache_bytes(kv_dtype, dtype, model))
    is_on_host = given.attention == "cpu"
    asked = _Asked(f"{FIELD}.kv_space_gb", given.kv_space_gb, GB * (given.kv_space_gb or 0.0))
    if num_gpu_blocks_override is not None:
        asked = _Asked("engine.num_gpu_blocks_override", num_gpu_blocks_override, num_gpu_blocks_override * block_bytes)
    room = _host_room(model, cpu, given, weights, asked)
    kv_bytes = left
    if is_on_host:
        kv_bytes = room if asked.value is None else asked.num_bytes
    elif num_gpu_blocks_override is not None:
        if asked.num_bytes > left:
            raise InputError(asked.field, asked.value, f"are {asked.num_bytes / GB:.1f} GB of KV, more than the"
                             f" {left / GB:.1f} GB that weights and activations leave of the GPU", "lower it")
        kv_bytes = asked.num_bytes
    budget = HostBudget(
        num_blocks=num_gpu_blocks_override or min(int(kv_bytes // block_bytes), 1 << 30), block_size=block_size,
        block_bytes=block_bytes, kv_bytes=kv_bytes, is_on_host=is_on_host, weight_bytes=weights.on_gpu,
        host_weight_bytes=weights.on_host, activation_bytes=activations, other_bytes=other, usable_bytes=usable)
    is_derived = num_gpu_blocks_override is None
    need = max_model_len if max_model_len is not None and split.must_hold_max_model_len and is_derived else 1
    if budget.num_tokens < need:
        where = f"{FIELD}.kv_space_gb" if is_on_host else "engine.gpu_memory_utilization"
        value = given.kv_space_gb if is_on_host else gpu_memory_utilization
        raise InputError(where, value, f"leaves {kv_bytes / GB:.2f} GB for KV, room for {budget.num_tokens:,} tokens,"
                         f" fewer than max_model_len = {need:,}", "raise it, or lower engine.max_model_len")
    return budget


def visible_bytes(device: DeviceSpec, given: HybridSection) -> float:
    """GPU memory that there is to fill. Raises `InputError`."""
    visible = device.usable_memory_bytes
    if given.gpu_memory_gb is None:
        return visible
    if GB * given.gpu_memory_gb > (device.memory_bytes or visible):
        raise InputError(f"{FIELD}.gpu_memory_gb", given.gpu_memory_gb,
                         f"is more than the {(device.memory_bytes or visible) / GB:.1f} GB of {device.name}",
                         "lower it, or leave it out")
    return min(visible, GB * given.gpu_memory_gb)


ACTIVATION_SHARE = 0.5
"""Of the GPU's memory beside weights, what a token cap by default may take where KV is there too: ours."""


def tokens_that_fit(model: ModelSpec, device: DeviceSpec, given: HybridSection, weights: Weights, most: int, *,
                    dtype: str = "auto", gpu_memory_utilization: float = 0.9, max_num_seqs: int = 256,
                    rule: str = "vllm@0.15") -> int:
    """Tokens of an iteration, up to `most`, whose activations the GPU holds beside the weights; 0 if none."""
    fmt, space = weight_format(dtype, model), kv_rule(rule)[1]
    left = gpu_memory_utilization * visible_bytes(device, given) - weights.on_gpu - space.other_bytes(False)
    left *= 1.0 if given.attention == "cpu" else ACTIVATION_SHARE
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        fits = activation_bytes(model, Plan(), fmt, space, middle, max_num_seqs) <= left
        low, high = (middle, high) if fits else (low, middle - 1)
    return low


def _refuse_gpu(model: ModelSpec, given: HybridSection, weights: Weights, rest: float, usable: float,
                expert_bytes: float) -> None:
    """What the GPU does not hold, told by the field that is to blame. Raises `InputError`."""
    two = weights.on_gpu - weights.resident
    per_hot = (model.num_moe_layers * model.layer_parameters().experts * expert_bytes / model.experts
               if model.experts else 0.0)
    hot = per_hot * given.hot_experts
    text = (f"{weights.resident / GB:.1f} resident + {two / GB:.1f} (two layers of streamed weights) +"
            f" {rest / GB:.1f} (activations, runtime) = {(weights.on_gpu + rest) / GB:.1f} GB, more than the"
            f" {usable / GB:.1f} GB that the engine may fill")
    if hot and weights.on_gpu - hot + rest <= usable:
        most = int((usable - rest - weights.on_gpu + hot) // per_hot)
        raise InputError(f"{FIELD}.hot_experts", given.hot_experts,
                         f"do not fit on the GPU ({hot / GB:.1f} GB of them): {text}", f"use at most {most}")
    remedy = "raise engine.gpu_memory_utilization, or use a narrower dtype"
    if not given.is_streamed:
        remedy = "set weights = 'streamed', " + remedy
    elif given.resident_weight_gb or given.cpu_offload_gb:
        remedy = "keep fewer weights resident, " + remedy
    if given.gpu_memory_gb is not None:
        raise InputError(f"{FIELD}.gpu_memory_gb", given.gpu_memory_gb, f"is too little: {text}", f"raise it, {remedy}")
    raise InputError(f"{FIELD}.weights", given.weights, f"do not fit on the GPU: {text}",
                     f"{remedy}, or lower engine.max_num_batched_tokens")


class _Asked(NamedTuple):
    """Room for KV as it was asked for: by which field, with which value (None: not at all), in bytes."""

    field: str
    value: float | None
    num_bytes: float


def _host_room(model: ModelSpec, cpu: DeviceSpec | None, given: HybridSection, weights: Weights, asked: _Asked
               ) -> float:
    """Bytes of host memory beside the weights; without end where nobody knows. Raises `InputError`."""
    memory = GB * given.host_memory_gb if given.host_memory_gb is not None else (cpu and cpu.memory_bytes)
    if memory is None:
        if given.attention == "cpu" and asked.value is None:
            raise InputError(f"{FIELD}.kv_space_gb", None, "missing, and host memory is not known to derive it from",
                             f"give it, or {FIELD}.host_memory_gb")
        return float("inf")
    kv = asked.num_bytes if given.attention == "cpu" else 0.0
    if weights.on_host + kv > memory:
        more = f" + {kv / GB:.1f} GB of KV" if kv else ""
        is_kv = kv and weights.on_host <= memory
        raise InputError(asked.field if is_kv else f"{FIELD}.host_memory_gb",
                         asked.value if is_kv else memory / GB,
                         f"does not go: {weights.on_host / GB:.1f} GB of weights{more} of {model.name} ="
                         f" {(weights.on_host + kv) / GB:.1f} GB, host memory has {memory / GB:.1f} GB",
                         f"lower {asked.field}, use a narrower dtype or a host with more memory")
    return memory - weights.on_host
