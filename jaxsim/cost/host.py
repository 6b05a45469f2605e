"""What a host does for its GPU, priced: rates of link, memory and cores, attention, experts, and the lanes of it all.

    attention   context tokens x layers x max(bytes / B_cpu, FLOP / C_cpu)
    experts     layers x max(distinct cold experts x their bytes / B_cpu, FLOP of cold rows / C_cpu)
    link        streamed weights / B_link; of a decode query, key and value out and its output in; of a prompt token its
                key and value out; of a token that goes to experts its hidden state out and in
    threshold   n where a + b n, GPU seconds of a layer, are those of a layer's transfer

**One memory for cores and link.** While the CPU reads at its rate and the link at its own and both exceed what the
memory gives, all T threads and the link share it fairly (max-min): no requester gets more than another unless that one
has all it wants. So the link keeps at least 1/(T + 1) of the memory, and loses the rest of what it wants in the seconds
in which the CPU reads; the CPU reads more slowly by what the link keeps. On average over an iteration both demands may
be far below the memory's rate; reads come in bursts, of attention and of experts, each with its own demand: what is
bound by FLOP wants less than the memory gives, and may take nothing from the link. A contention that is given counts in
the seconds that the bytes take by themselves. Weights that are resident leave the link little to lose, so nothing is.

**Hot experts.** Popularities are gamma-distributed with the coefficient of variation v of the roofline
(`jaxsim.cost.operators.distinct_experts`), a = 1/v^2. The H hottest of E have popularities above x, the 1 - H/E
quantile, and are asked by a share 1 - P(a + 1, a x) of rows (P: the regularised incomplete gamma function). Of the
others m tokens touch E [P(a, a x) - (1 + l/a)^-a P(a, (a + l) x)], with l as there.

Source: MoE-Lens (arXiv 2504.09345) for streaming, attention on the CPU and the threshold; KTransformers
(kvcache-ai/ktransformers) for experts on the CPU, with shared and hot experts on the GPU beside them.
Known gaps: one socket, threads all alike, no NUMA; CPU kernels have no time of their own beside bytes and FLOP; the
threshold leaves out attention of prompts.
"""

import dataclasses
from types import ModuleType
from typing import NamedTuple

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from scipy.special import gammainc, gammaincc, gammaincinv

from jaxsim._core.errors import InputError
from jaxsim.cost import operators
from jaxsim.cost.gemm import ExpertLoad, expected_blocks
from jaxsim.cost.hybrid import HybridCost
from jaxsim.cost.rank import Roofline
from jaxsim.cost.roofline import EXPERT_SKEW
from jaxsim.cost.tabulated import DECODE_DEVICE, TOKENS, TabulatedCost
from jaxsim.kernels import octaves
from jaxsim.spec.device import DeviceSpec
from jaxsim.spec.efficiency import EXPERT_ROWS
from jaxsim.spec.host_memory import Weights
from jaxsim.spec.hybrid import HybridSection
from jaxsim.spec.plan import WeightFormat

Rate = Float[Array | np.ndarray, "*shape"] | float

READ_SHARE = 0.73
"""Of a CPU's memory bandwidth that is reached. Source: MoE-Lens, about 150 of 204.8 GB/s on a Xeon 8380."""

LINK_SHARE = 0.61
"""Of a GPU's host link that is reached. Source: MoE-Lens, 19.5 of 32 GB/s (PCIe 4 x16, copies of 1 GB)."""

MATRIX_SHARE, VECTOR_SHARE = 0.15, 0.5
"""Of a CPU's FLOP/s that are reached, of matrix units (bf16_flops) and of vectors. Source: matrix units: 21.3 TFLOP/s
that KTransformers quotes for Sapphire Rapids, of 144 at the base clock of 32 cores. Vectors: assumed; attention is
bound by memory long before."""

SHARED_EXPERTS = ("shared_expert_up", "shared_expert_down")

PROFILED_TOKENS = np.arange(1024, 32769, 1024)
"""Tokens of the iterations to which the threshold's line is fitted."""


class Host(NamedTuple):
    """Rates as they are reached: of the link each way, of host memory, of the CPU; threads that read side by side."""

    link_bytes_per_s: float
    memory_bytes_per_s: float
    flops: float
    threads: int


def host_of(given: HybridSection, device: DeviceSpec, cpu: DeviceSpec | None) -> Host:
    """Rates by the section, or as shares of what the devices have at best. Raises `InputError`."""
    if given.link_gb_per_s is None and device.host_link_bytes_per_s is None:
        raise InputError("engine.hybrid.link_gb_per_s", None,
                         f"missing, and the link of {device.name} to the host is not known", "give it")
    link = (1e9 * given.link_gb_per_s if given.link_gb_per_s is not None
            else LINK_SHARE * device.host_link_bytes_per_s)
    memory, flops, threads = np.inf, np.inf, 1
    if cpu is not None:
        share = VECTOR_SHARE if cpu.bf16_flops is None else MATRIX_SHARE
        memory, flops = READ_SHARE * cpu.memory_bytes_per_s, share * cpu.peak("bf16").flops
        threads = cpu.num_cores or 1
    if given.cpu_gb_per_s is not None:
        memory = 1e9 * given.cpu_gb_per_s
    if given.cpu_tflops is not None:
        flops = 1e12 * given.cpu_tflops
    return Host(link, memory, flops, given.cpu_threads or threads)


def shared_memory(host: Host, cpu_bytes_per_s: Rate, xp: ModuleType = np) -> tuple[Rate, Rate]:
    """Bytes/s of the CPU, which wants so many, and of the link, while both use host memory: max-min fair shares.

    xp: jax.numpy for numbers that are traced.
    """
    memory, wanted = host.memory_bytes_per_s, host.link_bytes_per_s
    # Threads want alike; what they leave, and at least the share of one requester, is the link's.
    left = xp.maximum(memory / (host.threads + 1), memory - cpu_bytes_per_s)
    link = xp.where(cpu_bytes_per_s + wanted <= memory, wanted, xp.minimum(wanted, left))
    return xp.minimum(cpu_bytes_per_s, memory - link), link


class Reading(NamedTuple):
    """Of bytes that the CPU reads and computes with: its seconds, and those that the link loses meanwhile."""

    cpu_s: Float[np.ndarray, "*shape"]
    lost_s: Float[np.ndarray, "*shape"]


def reading(given: HybridSection, host: Host, num_bytes: Float[np.ndarray, "*shape"] | float,
            flops: Float[np.ndarray, "*shape"] | float) -> Reading:
    """Seconds of so many bytes and FLOP, beside the link where weights stream while the CPU computes."""
    num_bytes, flops = np.asarray(num_bytes, float), np.asarray(flops, float)
    by_bytes = num_bytes / host.memory_bytes_per_s
    alone = np.maximum(by_bytes, flops / host.flops)
    if not (given.is_streamed and given.overlaps):
        return Reading(alone, np.zeros_like(alone))
    if given.contention is not None:
        return Reading(alone, given.contention * by_bytes)
    is_read = num_bytes > 0
    # Where nothing is read FLOP are none of the memory's.
    reached, link = shared_memory(host, np.where(is_read, num_bytes, 1.0) / np.where(is_read, alone, 1.0))
    cpu_s = np.where(is_read, num_bytes / reached, alone)
    return Reading(cpu_s, np.where(is_read, cpu_s * (1 - link / host.link_bytes_per_s), 0.0))


def hot_share(experts: int, hot: int, skew: float) -> float:
    """Share of rows that go to the `hot` most popular of `experts`."""
    if not hot or hot >= experts or skew < operators.SMALLEST_SKEW:
        return hot / experts
    a = 1 / skew**2
    return float(gammaincc(a + 1, gammaincinv(a, 1 - hot / experts)))


def cold_experts(experts: int, per_token: int, hot: int, skew: float, tokens: Float[np.ndarray, " counts"]
                 ) -> Float[np.ndarray, " counts"]:
    """Of the experts that are not hot, those that so many tokens touch in one layer, as expected."""
    cold, each = 1 - hot / experts, -np.log1p(-per_token / experts) if per_token < experts else np.inf
    if not cold:
        return np.zeros(len(tokens))
    if skew < operators.SMALLEST_SKEW or np.isinf(each):
        return -experts * cold * np.expm1(-np.asarray(tokens) * (each if np.isfinite(each) else 1e9))
    a = 1 / skew**2
    asked = a * np.expm1(each / a) * np.asarray(tokens, float)
    edge = gammaincinv(a, cold)
    untouched = np.exp(-a * np.log1p(asked / a)) * (gammainc(a, (1 + asked / a) * edge) if hot else 1.0)
    return experts * (cold - untouched)


def attention_seconds(cost: Roofline, given: HybridSection, host: Host) -> Reading:
    """Of a context token that a decode reads on the CPU, all layers."""
    work = operators.attention_work(cost.model, cost.plan, cost.kv_bytes)
    return reading(given, host, cost.model.layers * work.decode_bytes, cost.model.layers * work.decode_flops)


def gpu_part(cost: Roofline, given: HybridSection) -> Roofline:
    """The roofline without what the CPU does, and what the GPU does beside that while a layer waits for it."""
    elsewhere = ("attention_decode",) * (given.attention == "cpu") + ("experts",) * (given.experts == "cpu")
    if given.experts == "cpu" and not given.overlaps:
        elsewhere += SHARED_EXPERTS
    return dataclasses.replace(cost, elsewhere=elsewhere)


class Threshold(NamedTuple):
    """GPU seconds of a layer, `a_s + b_s n` of n tokens, and the tokens at which they are `layer_s`, its transfer's."""

    a_s: float
    b_s: float
    layer_s: float
    tokens: int


def token_threshold(gpu: Roofline, given: HybridSection, weights: Weights, host: Host, *,
                    expert_skew: float = EXPERT_SKEW) -> Threshold:
    """Tokens of an iteration up to which weights take longest; gpu: of `gpu_part`, which hot experts are added to."""
    seconds = gpu.token_seconds(jnp.asarray(PROFILED_TOKENS, float))
    if given.experts == "cpu" and given.hot_experts:
        seconds = seconds + _experts(gpu, gpu.weights, given, host, PROFILED_TOKENS.astype(float),
                                     _skew(given, expert_skew))[1]
    slope, constant = np.polyfit(PROFILED_TOKENS, np.asarray(seconds, float) / gpu.model.layers, 1)
    layer_s = weights.layer / host.link_bytes_per_s
    return Threshold(float(constant), float(slope), layer_s, max(int((layer_s - constant) / slope), 1))


def hybrid_cost(cost: Roofline, given: HybridSection, weights: Weights, host: Host, max_tokens: int,
                max_sequences: int, *, expert_skew: float = EXPERT_SKEW, cuda_graphs: bool | str = True,
                async_scheduling: bool = False) -> HybridCost:
    """Lanes of a model whose whole price on the GPU is `cost`, up to so many tokens and sequences an iteration.

    expert_skew: that of `cost`, as a plain number.
    """
    model, fmt, width = cost.model, cost.weights, cost.weights.activation_bytes
    gpu = gpu_part(cost, given)
    tables = gpu.tabulate(max_tokens, max_sequences, cuda_graphs=cuda_graphs, async_scheduling=async_scheduling)
    per_byte = 1.0 / host.link_bytes_per_s
    read_s = lost = in_s = out_s = prompt_in_s = prompt_out_s = history_in_s = fixed_s = decode_fixed_s = 0.0
    cached = model.layers * model.layer_kv_bytes_per_token(cost.kv_bytes)

    def leaf(value):
        return jnp.asarray(value, jnp.float32)

    if given.attention == "cpu":
        read_s, lost_s = attention_seconds(cost, given, host)
        lost = lost_s / read_s
        shape = cost.attention_shape()
        # Of a token and layer: queries (absorbed ones of latent attention), and what comes back.
        asked, answered = ((model.heads * (model.kv_lora_rank + model.qk_rope_head_dim), model.heads * shape.latent)
                           if model.is_mla else (model.heads * model.head_dim,) * 2)
        out_s = per_byte * (model.layers * asked * width + cached)
        in_s = per_byte * model.layers * answered * width
        prompt_out_s = history_in_s = per_byte * cached
        # Prompts attend on the GPU.
        decode_fixed_s = model.layers * 1e-6 * given.hand_over_us
    expert_s = expert_lost_s = None
    if given.experts == "cpu":
        knots = octaves.knots(TOKENS, max_tokens).astype(float)
        (on_cpu, lost_s), beside = _experts(gpu, fmt, given, host, knots, _skew(given, expert_skew))
        state_s = per_byte * model.num_moe_layers * model.hidden * width
        if given.overlaps:
            in_s, out_s = in_s + state_s, out_s + state_s
            prompt_in_s, prompt_out_s = prompt_in_s + state_s, prompt_out_s + state_s
            expert_s = on_cpu
            if given.hot_experts:
                tables = _with_hot(tables, knots, beside, max_sequences)
            if given.is_streamed:
                expert_lost_s = leaf(lost_s)
        else:
            expert_s = jnp.maximum(on_cpu, beside) + 2 * state_s * knots
        fixed_s = model.num_moe_layers * 1e-6 * given.hand_over_us
    return HybridCost(
        gpu=tables, read_s=leaf(read_s), expert_s=None if expert_s is None else leaf(expert_s),
        stream_s=leaf(weights.streamed * per_byte), in_s=leaf(in_s), out_s=leaf(out_s), prompt_out_s=leaf(prompt_out_s),
        contention=leaf(lost), is_chained=not given.overlaps, prompt_in_s=leaf(prompt_in_s),
        history_in_s=leaf(history_in_s), hand_over_s=leaf(fixed_s), decode_hand_over_s=leaf(decode_fixed_s),
        expert_lost_s=expert_lost_s)


def _skew(given: HybridSection, expert_skew: float) -> float:
    return 0.0 if given.popularity == "uniform" else expert_skew


def _experts(gpu: Roofline, fmt: WeightFormat, given: HybridSection, host: Host, tokens: np.ndarray, skew: float
             ) -> tuple[Reading, Float[Array, " knots"]]:
    """Seconds of all layers by tokens: of cold experts on the CPU; of hot and shared ones on the GPU."""
    model, k, hot = gpu.model, gpu.model.experts_per_token, given.hot_experts
    share = hot_share(model.experts, hot, skew)
    matrices = 3 if model.gated else 2
    size = matrices * model.hidden * model.moe_ffn
    cold = _touched(gpu, hot, skew, tokens)
    rows = tokens * k * (1 - share)
    layers = model.num_moe_layers
    on_cpu = reading(given, host, np.where(tokens > 0, layers * cold * size * fmt.expert_bytes, 0.0),
                     layers * 2.0 * size * rows)
    beside = jnp.zeros(len(tokens))
    if hot:
        pairs = jnp.asarray(tokens * k * share, float)
        touched = _touched(gpu, 0, skew, tokens) - cold
        distinct = jnp.asarray(touched, float)
        load = ExpertLoad(jnp.asarray(tokens, float), pairs,
                          {height: expected_blocks(pairs, distinct, height) for height in EXPERT_ROWS},
                          distinct * size * fmt.expert_bytes, k, hot, model.hidden, model.moe_ffn, model.gated,
                          fmt.activation_bytes, pairs / k)
        beside = beside + model.num_moe_layers * gpu.experts.seconds(load, gpu.rates(linear=True))
    away = [work for work in operators.token_work(model, gpu.plan, fmt, jnp.asarray(tokens, float))
            if work.name in SHARED_EXPERTS and work.name in gpu.elsewhere]
    beside = beside + sum(work.calls * gpu.call_seconds(work) for work in away)
    return on_cpu, jnp.where(tokens > 0, beside, 0.0)


def _touched(gpu: Roofline, hot: int, skew: float, tokens: Float[np.ndarray, " counts"]
             ) -> Float[np.ndarray, " counts"]:
    """Distinct experts that are not hot, the way the roofline counts them."""
    experts, k = gpu.model.experts, gpu.model.experts_per_token
    if gpu.distinct_experts == operators.EXPECTED:
        return cold_experts(experts, k, hot, skew, tokens)
    some = experts - hot if gpu.distinct_experts == operators.ALL else k * (1 - hot_share(experts, hot, skew))
    return np.full(len(tokens), float(some))


def _with_hot(tables: TabulatedCost, tokens: np.ndarray, beside: Array, max_sequences: int) -> TabulatedCost:
    """Tables of the GPU with what it does of experts, by tokens."""
    decode = jnp.interp(jnp.arange(max_sequences + 1.0), jnp.asarray(tokens, float), beside)
    return eqx.tree_at(lambda t: (t.by_tokens, t.by_sequences), tables, (
        tables.by_tokens + beside, tables.by_sequences.at[:, DECODE_DEVICE].add(decode)))
