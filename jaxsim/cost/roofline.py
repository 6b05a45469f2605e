"""Makes a `Roofline` (`jaxsim.cost.rank`) from a model, a device and a plan: `roofline(...)`.

Constants of kernels are the device's (`jaxsim.spec.efficiency`), messages the plan's (`jaxsim.cost.messages`), seconds
of the host its engine's; any of them is replaced by name. `notes` says which of them were not measured.
"""

import dataclasses
import functools
from collections.abc import Collection
from typing import Literal, get_args

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from jaxsim._core.errors import InputError, suggest
from jaxsim.cost import operators
from jaxsim.cost.attention import Decode, Latent, Prefill
from jaxsim.cost.expert_load import Routing, balanced_share
from jaxsim.cost.gemm import Experts, Gemm
from jaxsim.cost.messages import links, messages
from jaxsim.cost.rank import Elementwise, Roofline
from jaxsim.cost.two_level import TwoLevel, ranks_in_node
from jaxsim.spec.device import NOMINAL_MULTIPROCESSORS, DeviceSpec, load_device
from jaxsim.spec.efficiency import Efficiency, section_records
from jaxsim.spec.engine import MoeBackend
from jaxsim.spec.model import ModelSpec
from jaxsim.spec.plan import Plan, WeightFormat, kv_cache_bytes, weight_format
from jaxsim.spec.quantization import WEIGHT_ONLY

HOSTS = {
    "vllm-v0": dict(host_step_s=3.8e-3, host_sequence_s=40e-6, async_step_s=3.8e-3),
    "vllm-v1": dict(host_step_s=1.0e-3, host_sequence_s=40e-6, async_step_s=0.3e-3),
    "tensorrt-llm": dict(host_step_s=1.5e-3, host_sequence_s=50e-6, async_step_s=0.3e-3, launch_kernel_s=48e-6),
    "none": dict(host_step_s=0.0, host_sequence_s=0.0, async_step_s=0.0),
}
"""Host seconds by engine generation: what the device lane leaves over of measured steps; launches where not `LAUNCHES`.

Source: v0: decode steps of Llama-3.1-70B in vLLM 0.6 on H100 (microsoft/apex_plus), 2.9, 4.3 and 4.3 ms at 2, 4 and 8
ranks; 40 us a sequence from the scheduler, sampler, input and output times of an early vLLM fork (microsoft/vidur). v1:
median inter-token times of Qwen3-8B in vLLM 0.11 on H100 at batches of 8 to 256 (ML.ENERGY), prefill interference
included; asynchronous: five runs of vLLM 0.15 on H100 (inference-sim/training), 0 +- 0.3 ms a step and no slope, and
0.9 ms of vLLM 0.19 on an RTX PRO 6000 (casys-kaist/LLMServingSim). tensorrt-llm: least absolute log error of TPOT =
decode + n/output x (iteration with a prompt - decode), n sequences decoding, over 60 points of Llama-3.1-8B with
prompts of 1,024 in TensorRT-LLM 1.0 on 1 to 8 H100 (ai-dynamo/aiconfigurator, gap analysis); 60 with prompts of 2,048
give 1.9 ms and 57 us a kernel. In the overlap loop of its PyExecutor all of the host's work runs beside the device:
scheduling, inputs of every sequence, launches, then update and answers of the previous batch. Copies and sampling
outside of the graph do not: async_step_s is vLLM's, not fitted.
"""

FRONT_ENDS = {"vllm-v0": 14e-3, "vllm-v1": 6e-3, "tensorrt-llm": 6e-3, "none": 0.0}
"""Seconds of a request outside the engine, by engine generation: HTTP server, tokenizer, and the way to the engine.

Source: v1: mean TTFT of five runs of vLLM 0.15 on H100 (inference-sim/training), 5 to 7 ms each; v0: cells of vLLM 0.6
with short prompts (microsoft/apex_plus), 9 to 20 ms, 14 in the middle; tensorrt-llm: that of v1, not measured.
"""

LAUNCHES = dict(launch_kernel_s=30e-6, launch_graph_s=60e-6)
"""Host seconds of launches.

Source: between the several us a kernel of SKIP (arXiv 2504.11750) and the 50 us of SGLang without graphs
(microsoft/apex_plus).
"""

EXPERT_SKEW = 0.5
"""Coefficient of variation of the popularity of experts.

Source: seconds of decode iterations with 9 to 214 sequences of Qwen3-30B-A3B on two RTX PRO 6000 (casys-kaist/
LLMServingSim): no error in the median at 0.5, within 4 % from 20 sequences on; at few sequences 8 % slow at 0, 8 %
fast at 1.2. Routers of other models differ: gpt-oss-120b in vLLM on H200 (InferenceX) is closer to 1.
"""

LINKS = ("link_bytes_per_s", "exchange_bytes_per_s", "hop_bytes_per_s")

NUMBERS = ("peak_flops", "memory_bytes_per_s", "attention_flops", *LINKS, *LAUNCHES, *HOSTS["none"], "expert_skew")
"""Leaves of the roofline itself that have the name of the leaf."""

_MORE_LINKS = (*((name, "inside_bytes_per_s") for name in (
    "all_reduce", "all_gather", "exchange_gather", "reduce_scatter", "all_to_all", "tensor_scatter", "deep_ep")),
    ("shards", "bytes_per_s"), ("pass_bytes_per_s",))
"""Links that only some plans have."""


def _has(tree, place: tuple[str, ...]) -> bool:
    for field in place:
        tree = getattr(tree, field, None)
    return tree is not None


_PREFIXES = {"gemm": ("gemm", "gemm_16"), "expert": ("experts",), "elementwise": ("elementwise",),
             "decode": ("decode",), "prefill": ("prefill",), "latent": ("latent",), "all_reduce": ("all_reduce",),
             "all_gather": ("all_gather", "exchange_gather"), "reduce_scatter": ("reduce_scatter",),
             "all_to_all": ("all_to_all",), "hop": ("hop",)}
"""Overrides are called PREFIX_LEAF; `gemm_efficiency` is that of linear layers and of 16-bit products."""


def _sections(record: Efficiency, weights: WeightFormat, compute: str, model: ModelSpec, plan: Plan, moe_backend: str
              ) -> tuple[str, str]:
    """Names of the constants of linear layers and of experts, for products in `compute`. Raises `InputError`."""
    name, kernel = "bf16", weights.kernel or weights.name
    if compute in ("fp8", "int8", "fp4"):
        name = weights.name if weights.name in record.gemm else "fp8" if "fp8" in record.gemm else "bf16"
    expert = name if name in record.experts else "bf16"
    if compute == "bf16":
        # Only weight-only kernels dequantise: 8-bit weights on a device without their arithmetic keep 16-bit constants.
        # Where only experts are quantised, the rest has 16 bits.
        name = weights.kernel if weights.kernel in record.gemm and weights.linear_bytes < 2 else name
        expert = kernel if kernel in record.experts else expert
    if model.experts and (moe_backend == "marlin" or expert == WEIGHT_ONLY):
        # For 4-bit integers (GPTQ, AWQ, compressed-tensors) vLLM takes Marlin by itself, if the record has it.
        if expert + "_marlin" in record.experts:
            expert += "_marlin"
        elif expert != WEIGHT_ONLY:
            raise InputError("engine.moe_backend", moe_backend,
                             f"has no constants for experts in {weights.name} on this device", "use 'auto'")
    tuned = record.experts.get(expert + "_tuned")
    rank = plan.expert_shape(model)
    if tuned and (rank.num_experts, rank.moe_ffn) in tuned.configs:
        expert += "_tuned"
    return name, expert


NOT_MEASURED = ("not measured", "constants of")
"""How the source of a section begins whose format has no table."""


def notes(model: ModelSpec, device: DeviceSpec, plan: Plan | None = None, dtype: str = "auto", *,
          moe_backend: MoeBackend = "auto", kv_dtype: str = "auto") -> tuple[str, ...]:
    """What a reader should know of the constants that `roofline` takes: whose they are where not of this device, or of
    this format, and which links were assumed. Nothing where all were measured.
    """
    plan, fmt, record = plan or Plan(), weight_format(dtype, model), device.kernel_efficiency()
    compute, found = device.peak(fmt.compute).compute, []
    linear, expert = _sections(record, fmt, compute, model, plan, moe_backend)
    linear, expert = f"gemm.{linear}", f"experts.{expert}"
    used = [linear, *(("latent",) if model.is_mla else ("decode", "prefill")), *((expert,) if model.experts else ())]
    if device.efficiency is None:
        if device.family != device.name:
            found.append(f"kernel constants are those of {device.family}: {device.name} was not measured")
        records, lent = section_records(load_device(device.family).name), {}
        for section in used:
            if records[section] != load_device(device.family).name:
                lent.setdefault(records[section], []).append(section)
        found += [f"{', '.join(sections)}: not measured on {load_device(device.family).name}, constants of {other}"
                  for other, sections in lent.items()]
    for section in used:
        kind, _, name = section.partition(".")
        source = (getattr(record, kind)[name] if name else getattr(record, kind)).source
        if source.startswith(NOT_MEASURED):
            found.append(f"{section}: not measured, {source.removeprefix('not measured: ').partition(';')[0]}")
    # Carried to other bandwidths the shares differ even where one stands for the other.
    source = record if device.efficiency is not None else load_device(device.family).kernel_efficiency()
    if not model.is_mla and kv_cache_bytes(kv_dtype, dtype, model) < 2 and not source.decode.is_8bit_measured:
        found.append("decode: 8-bit KV caches were not measured, their share of the bandwidth is that of 16-bit ones")
    narrow = {linear: fmt.linear_bytes < 2, expert: bool(model.experts) and fmt.expert_bytes < 2}
    found += [f"{fmt.name} in {compute} was not measured: constants of {section}"
              for section, is_narrow in narrow.items() if is_narrow and not _is_of(section, fmt)]
    used_links = [link for link in links(model, device, plan) if link.ranks > 1]
    if any(link.kind == "host" for link in used_links):
        found.append("messages between devices go over PCIe, whose constants are a guess")
    found += [f"{device.name} does not say its links: {text} taken" for text in
              dict.fromkeys(text for link in used_links for text in link.assumed)]
    return tuple(found)


def _is_of(section: str, fmt: WeightFormat) -> bool:
    """Whether constants are of a format."""
    name = section.partition(".")[2].removesuffix("_tuned").removesuffix("_marlin")
    return name in (fmt.name, fmt.kernel)


def roofline(model: ModelSpec, device: DeviceSpec, plan: Plan | None = None, dtype: str = "auto",
             kv_dtype: str = "auto", *, host: str = "vllm-v1", distinct_experts: str = operators.EXPECTED,
             all_reduce: Literal["custom", "nccl"] = "custom", moe_backend: MoeBackend = "auto", split_kv: bool = False,
             expert_load: Routing = "balanced", **overrides: float) -> Roofline:
    """A roofline with the device's constants, any leaf of which `overrides` replaces by name.

    dtype, kv_dtype: number formats ("auto" = the checkpoint's own). A format the device has no arithmetic for
    keeps its bytes and is multiplied in the next wider type it has. host: a name in `HOSTS`.
    distinct_experts: "topk", "expected" or "all". all_reduce: vLLM's own where it can run, or NCCL's always.
    moe_backend: kernels of the experts. split_kv: attention is cut over the keys, too. expert_load: how tokens fall on
    the ranks of experts (`jaxsim.cost.expert_load`): "balanced", "skewed" by `expert_skew`, as a load balancer leaves
    it where the plan has one, or "worst".
    """
    plan = (plan or Plan()).check(model)
    _check_effects(model, plan, split_kv, expert_load)
    weight_format(dtype, model)
    for field, value, known in (
            ("host", host, HOSTS), ("distinct_experts", distinct_experts, operators.DISTINCT_EXPERTS),
            ("all_reduce", all_reduce, ("custom", "nccl")), ("moe_backend", moe_backend, get_args(MoeBackend)),
            ("expert_load", expert_load, get_args(Routing))):
        if value not in known:
            raise InputError(f"cost.{field}", value, "is not known", suggest(value, known))
    skew = float(overrides.get("expert_skew", EXPERT_SKEW)) if expert_load == "skewed" and plan.enable_eplb else None
    # Of one system many are made that differ in a number or two. A device with constants written out is not hashable.
    made = _calibrated if device.efficiency is None else _calibrated.__wrapped__
    cost, places = made(model, device, plan, dtype, kv_dtype, host, distinct_experts, all_reduce, moe_backend,
                        split_kv, expert_load, skew, jax.config.jax_enable_x64)
    return _overridden(cost, places, overrides)


@functools.lru_cache(maxsize=256)
def _calibrated(model: ModelSpec, device: DeviceSpec, plan: Plan, dtype: str, kv_dtype: str, host: str,
                distinct_experts: str, all_reduce: str, moe_backend: MoeBackend, split_kv: bool, expert_load: Routing,
                skew: float | None, _: bool) -> tuple[Roofline, dict[str, list[tuple[str, ...]]]]:
    """A roofline of the device's constants, and its `override_places`; skew: of experts that a load balancer places."""
    # Never made of the tracers of whoever asks first.
    with jax.ensure_compile_time_eval():
        return _of_constants(model, device, plan, dtype, kv_dtype, host, distinct_experts, all_reduce, moe_backend,
                             split_kv, expert_load, skew)


def _of_constants(model, device, plan, dtype, kv_dtype, host, distinct_experts, all_reduce, moe_backend, split_kv,
                  expert_load, skew) -> tuple[Roofline, dict[str, list[tuple[str, ...]]]]:
    fmt = weight_format(dtype, model)
    record, peak = device.kernel_efficiency(), device.peak(fmt.compute)
    linear, expert = _sections(record, fmt, peak.compute, model, plan, moe_backend)
    element = record.elementwise
    parts = dict(gemm=Gemm.of(record.gemm[linear]), gemm_16=Gemm.of(record.gemm["bf16"]),
                 experts=Experts.of(record.experts[expert]), decode=Decode.of(record.decode),
                 prefill=dataclasses.replace(Prefill.of(record.prefill), splits=split_kv),
                 latent=Latent.of(record.latent) if model.is_mla else None,
                 elementwise=Elementwise(jnp.asarray(element.floor_s, float), jnp.asarray(element.efficiency, float)),
                 **messages(record, model, device, plan, all_reduce))
    if skew is not None:
        parts |= _placed(model, device, plan, skew)
    numbers = dict(peak_flops=peak.flops, memory_bytes_per_s=device.memory_bytes_per_s,
                   attention_flops=device.peak("fp32" if fmt.compute == "fp32" else "bf16").flops,
                   **{name: parts.pop(name) for name in LINKS},
                   **(LAUNCHES | HOSTS[host]), expert_skew=EXPERT_SKEW)
    cost = Roofline(
        **{name: jnp.asarray(value, float) for name, value in numbers.items()}, **parts,
        num_multiprocessors=jnp.asarray(device.num_multiprocessors or NOMINAL_MULTIPROCESSORS, jnp.int32), model=model,
        plan=plan, weights=fmt, kv_bytes=kv_cache_bytes(kv_dtype, dtype, model), distinct_experts=distinct_experts,
        expert_load=expert_load)
    return cost, override_places(cost)


def _check_effects(model: ModelSpec, plan: Plan, split_kv: bool, expert_load: str) -> None:
    """Refuse what would change nothing. Raises `InputError`."""
    if split_kv and model.is_mla:
        raise InputError("cost.split_kv", True, f"has no effect with model.name = {model.name!r}: the kernel of its"
                         " latent attention is another", "leave it out")
    if expert_load != "balanced" and not model.experts:
        raise InputError("cost.expert_load", expert_load, f"has no effect with model.name = {model.name!r}, which has"
                         " no experts", "leave it out")
    if plan.enable_eplb and expert_load != "skewed":
        raise InputError("engine.enable_eplb", True, f"has no effect with cost.expert_load = {expert_load!r}: there is"
                         " nothing, or no way, to balance", "set cost.expert_load = 'skewed', or leave it out")


def _placed(model: ModelSpec, device: DeviceSpec, plan: Plan, skew: float) -> dict:
    """What a load balancer leaves; its numbers are of this skew, with no derivative by it."""
    ranks = plan.expert_ranks
    nodes = -(-ranks // ranks_in_node(device, ranks))
    share, spread = balanced_share(model.experts, plan.num_redundant_experts, ranks, nodes, model.expert_groups or 1,
                                   skew)
    return {"expert_share": jnp.asarray(share, float), "expert_spread": jnp.asarray(spread, float)}


def override_places(cost: Roofline, overrides: Collection[str] = ()) -> dict[str, list[tuple[str, ...]]]:
    """The leaves, as paths of fields, that each name of `overrides` stands for; overrides: names that are given."""
    places = {name: [(name,)] for name in NUMBERS}
    # One number for all groups, unless that of experts is given too.
    if "exchange_bytes_per_s" not in overrides:
        places["link_bytes_per_s"].append(("exchange_bytes_per_s",))
    places["link_bytes_per_s"] += [place for place in _MORE_LINKS if _has(cost, place)]
    for prefix, parts in _PREFIXES.items():
        for part in parts:
            # Of a group that spans nodes the constants of the network.
            kernel, place = getattr(cost, part), (part,)
            if isinstance(kernel, TwoLevel):
                places.setdefault(f"{prefix}_inside_bytes_per_s", []).append((part, "inside_bytes_per_s"))
                kernel, place = kernel.between, (part, "between")
            for name, leaf in vars(kernel or Elementwise(None, None)).items():
                if eqx.is_array(leaf):
                    places.setdefault(f"{prefix}_{name}", []).append((*place, name))
    return places


def override_values(cost: Roofline, overrides: Collection[str] = ()) -> dict[str, tuple[float, ...]]:
    """Values of the leaves that each name of `overrides` stands for, where these are scalars."""
    found = {}
    for name, places in override_places(cost, overrides).items():
        leaves = [functools.reduce(getattr, place, cost) for place in places]
        if all(np.ndim(leaf) == 0 for leaf in leaves):
            found[name] = tuple(float(leaf) for leaf in leaves)
    return found


def _overridden(cost: Roofline, places: dict[str, list[tuple[str, ...]]], overrides: dict[str, float]) -> Roofline:
    """`cost` with leaves replaced by name; places: of `override_places` without any. Raises `InputError`."""
    if "exchange_bytes_per_s" in overrides:
        places = override_places(cost, overrides)
    for name, value in overrides.items():
        if name not in places:
            raise InputError("cost.overrides." + name, value, "is not a parameter of the roofline",
                             suggest(name, places, "docs/cost-model.md, section 3, has their names: FAMILY_LEAF"))
        is_rate = name.endswith(("flops", "bytes_per_s", "efficiency", "efficiency_8bit"))
        if not np.all(np.asarray(value) >= 0) or (is_rate and not np.all(np.asarray(value) > 0)):
            raise InputError("cost.overrides." + name, value, "must be positive",
                             "give a positive number, or leave it out")
        for place in places[name]:
            def leaf(tree, place=place):
                for field in place:
                    tree = getattr(tree, field)
                return tree

            cost = eqx.tree_at(leaf, cost, jnp.asarray(value, float))
    return cost
