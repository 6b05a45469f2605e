"""Seconds of a pass on a platform that is nothing but peaks, efficiencies and links: a sum of rooflines.

    operator    max(FLOP / (peak eta_c), bytes / (BW eta_m))
    collective  start + hops x latency + wire bytes / (link eta_l)      a ring: 2 (N - 1) hops, 2 (N - 1)/N of the bytes
    pass        the sum of all of them over all layers; nothing overlaps, no host, no launches

What a pass consists of is what the event engine's cost model counts (`jaxsim.cost.operators`), so all models and plans
that it prices are here, latent attention and windows included. A device has kernels besides its peaks: those are in
`jaxsim.cost.roofline`. This is for platforms that nobody has built yet.

Source: GenZ (arXiv 2406.01698) for the form. Unlike it, attention is causal, the head runs over the last token of a
prompt, norms and cache writes move bytes, 16-bit operators stay 16-bit beside narrow weights, and the FLOP of beams are
their own.

Known gaps: kernels that do not reach their efficiency (small batches); overlap of collectives and arithmetic; in a
pipeline one batch goes through all stages, so that stages wait for each other.
"""

import math
from types import ModuleType
from typing import NamedTuple

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxsim.cost import operators
from jaxsim.cost.collectives import WIRE
from jaxsim.cost.operators import EXPECTED, HOP
from jaxsim.spec.memory import rank_weight_bytes
from jaxsim.spec.model import ModelSpec
from jaxsim.spec.plan import Plan
from jaxsim.spec.quantization import WeightFormat

Scalar = Float[Array, ""] | float

WIDER = {"fp8": 2.0, "int8": 2.0, "fp4": 4.0}
"""FLOP/s of a narrow type over those of 16-bit ones, of tensor cores that have it. Source: datasheets of Hopper and
Blackwell; GenZ, system.py."""


class Platform(eqx.Module):
    """One device of a platform; every leaf a traced scalar.

    flops, wide_flops: FLOP/s of products of weights, and of 16-bit ones (attention, router, LM head).
    memory_bytes_per_s. link_bytes_per_s: per direction, among the ranks of a layer; stage_bytes_per_s: between stages.
    start_s: of a collective before its first byte; hop_s: latency of a link, of which a ring pays 2 (N - 1).
    compute_efficiency, memory_efficiency, link_efficiency: shares of all these that are reached. stage_start_s,
    stage_efficiency: of a message between stages, before its first byte, and of its bandwidth; `link_efficiency` where
    that is None.
    """

    flops: Scalar
    wide_flops: Scalar
    memory_bytes_per_s: Scalar
    link_bytes_per_s: Scalar
    stage_bytes_per_s: Scalar
    start_s: Scalar
    hop_s: Scalar
    compute_efficiency: Scalar = 1.0
    memory_efficiency: Scalar = 1.0
    link_efficiency: Scalar = 1.0
    stage_start_s: Scalar = 0.0
    stage_efficiency: Scalar | None = None


class PassSeconds(NamedTuple):
    """Seconds of a pass: operators bound by arithmetic, operators bound by memory, collectives."""

    compute: Scalar
    memory: Scalar
    links: Scalar

    @property
    def total(self) -> Scalar:
        """Their sum."""
        return self.compute + self.memory + self.links


class Pass(eqx.Module):
    """What a pass asks of one device (of every stage of a pipeline, one after the other).

    flops, bytes: of an operator's calls; is_wide: operators that stay 16-bit; names: of operators.
    wire_bytes, starts, hops: of collectives among the ranks of a layer; stage_bytes, stage_hops: between stages.
    """

    flops: Float[Array, " operators"]
    bytes: Float[Array, " operators"]
    wire_bytes: Scalar
    starts: Scalar
    hops: Scalar
    stage_bytes: Scalar
    stage_hops: Scalar
    is_wide: tuple[bool, ...] = eqx.field(static=True)
    names: tuple[str, ...] = eqx.field(static=True)

    def scaled_flops(self, wider: Scalar, arrays: ModuleType = jnp) -> Scalar:
        """FLOP in units of the weights' type, `wider` times as fast as 16 bits; arrays: as `seconds` takes it."""
        return arrays.sum(self.flops * arrays.where(np.array(self.is_wide), wider, 1.0))

    def seconds(self, platform: Platform, arrays: ModuleType = jnp) -> PassSeconds:
        """Seconds on a platform; arrays: `numpy`, where neither a derivative nor a compiled program is wanted."""
        p = platform
        arithmetic = self.flops / (arrays.where(np.array(self.is_wide), p.wide_flops, p.flops) * p.compute_efficiency)
        memory = self.bytes / (p.memory_bytes_per_s * p.memory_efficiency)
        is_compute = arithmetic > memory
        stage_efficiency = p.link_efficiency if p.stage_efficiency is None else p.stage_efficiency
        links = (self.starts * p.start_s + self.hops * p.hop_s + self.stage_hops * (p.stage_start_s + p.hop_s)
                 + self.wire_bytes / (p.link_bytes_per_s * p.link_efficiency)
                 + self.stage_bytes / (p.stage_bytes_per_s * stage_efficiency))
        return PassSeconds(arrays.sum(arrays.where(is_compute, arithmetic, 0.0)),
                           arrays.sum(arrays.where(is_compute, 0.0, memory)), links)

    def _of(self, amounts: Float[Array, " operators"], prefix: str, but: str) -> float:
        return math.fsum(float(x) for name, x in zip(self.names, amounts, strict=True)
                         if name.startswith(prefix) and name != but)

    def bytes_of(self, prefix: str, but: str = "") -> float:
        """Bytes of operators whose names begin so, without one of them."""
        return self._of(np.asarray(self.bytes), prefix, but)

    def flops_of(self, prefix: str, but: str = "") -> float:
        """FLOP of operators whose names begin so, without one of them."""
        return self._of(np.asarray(self.flops), prefix, but)


def prefill_pass(model: ModelSpec, plan: Plan, fmt: WeightFormat, kv_bytes: float, *, prompt: Scalar, batch: Scalar = 1,
                 distinct_experts: str = EXPECTED) -> Pass:
    """A pass over `batch` prompts of `prompt` tokens at once, spread over data-parallel ranks.

    Causal attention; keys and values are read once. One token of each prompt goes through the LM head.
    """
    # Amounts do not fit 32-bit integers.
    sequences, prompt = 1.0 * _of_rank(batch, plan), 1.0 * prompt
    work, attention = operators.attention_work(model, plan, kv_bytes), []
    for layers, window in ((work.full_layers, 0), (work.window_layers, model.sliding_window)):
        if layers:
            seen = jnp.minimum(prompt, window) if window else prompt
            # Twice the pairs less the diagonal: S^2 where all is seen, else without the triangle beyond the window.
            units = prompt * prompt - jnp.square(prompt - seen)
            flops = work.pair_flops * units + work.token_flops * seen
            moved = prompt * (work.decode_bytes + _query_bytes(model, plan, fmt))
            attention.append((layers, sequences * flops, sequences * moved))
    return _pass(model, plan, fmt, sequences * prompt, sequences, distinct_experts, attention)


def decode_pass(model: ModelSpec, plan: Plan, fmt: WeightFormat, kv_bytes: float, *, prompt: Scalar,
                generated: Scalar, batch: Scalar = 1, beams: Scalar = 1, shares_prompt: bool = True,
                distinct_experts: str = EXPECTED) -> Pass:
    """A pass that makes one token for `batch` x `beams` sequences, `generated` tokens behind a prompt each.

    shares_prompt: the prompt's KV is read once for the beams of a request; otherwise by each. Its FLOP are each beam's
    own in both cases.
    """
    requests, prompt, generated = 1.0 * _of_rank(batch, plan), 1.0 * prompt, 1.0 * generated
    sequences = requests * beams
    work, attention = operators.attention_work(model, plan, kv_bytes), []
    for layers, window in ((work.full_layers, 0), (work.window_layers, model.sliding_window)):
        if layers:
            own = jnp.minimum(generated, window) if window else generated
            shared = jnp.minimum(prompt, jnp.maximum(window - own, 0)) if window else prompt
            read = sequences * own + (requests if shares_prompt else sequences) * shared
            attention.append((layers, work.decode_flops * sequences * (own + shared),
                              work.decode_bytes * read + sequences * _query_bytes(model, plan, fmt)))
    return _pass(model, plan, fmt, sequences, sequences, distinct_experts, attention)


def held_tokens(prompt: float, generated: float, batch: int = 1, beams: int = 1, shares_prompt: bool = True) -> float:
    """Tokens in the cache at the end of `batch` requests: the prompt once a request, or once a beam."""
    return batch * (prompt * (1 if shares_prompt else beams) + beams * generated)


class Memory(NamedTuple):
    """Bytes of weights and of the cache, of the device that holds most and of all together."""

    weights: float
    cache: float
    total_weights: float
    total_cache: float

    @property
    def device_bytes(self) -> float:
        """Of the fullest device."""
        return self.weights + self.cache

    @property
    def total_bytes(self) -> float:
        """Of all devices."""
        return self.total_weights + self.total_cache


def memory(model: ModelSpec, plan: Plan, fmt: WeightFormat, kv_bytes: float, *, prompt: float, generated: float,
           batch: int = 1, beams: int = 1, shares_prompt: bool = True) -> Memory:
    """Memory of a plan at the end of these requests, in plain 64-bit numbers.

    Known gaps: activations and what an engine reserves; windowed layers hold all tokens (`ModelSpec`).
    """
    tp, dp = plan.tensor_parallel_size, plan.data_parallel_size
    kept = model.layer_kv_bytes_per_token(kv_bytes, tp)
    each, whole = (kept * held_tokens(prompt, generated, count, beams, shares_prompt)
                   for count in (int(_of_rank(batch, plan)), batch))
    layers, rows, known = plan.stage_layers(model.layers), [], {}
    for stage, count in enumerate(layers):
        # Stages with as many layers, neither first nor last, are alike.
        kind = (count, stage == 0, stage == len(layers) - 1)
        if kind not in known:
            known[kind] = (float(rank_weight_bytes(model, plan, fmt, stage)), count * each)
        rows.append(known[kind])
    weights, cache = max(rows, key=sum)
    return Memory(weights, cache, tp * dp * math.fsum(row[0] for row in rows), tp * model.layers * whole)


def _of_rank(batch: Scalar, plan: Plan) -> Scalar:
    """Requests of the fullest data-parallel rank."""
    if plan.data_parallel_size == 1:
        return batch
    return -(-batch // plan.data_parallel_size)


def _query_bytes(model: ModelSpec, plan: Plan, fmt: WeightFormat) -> float:
    """Queries and outputs of attention, a token and layer."""
    heads = model.rank_shape(plan.tensor_parallel_size).heads
    sizes = ((model.kv_lora_rank + model.qk_rope_head_dim + model.kv_lora_rank) if model.is_mla
             else 2 * model.head_dim)
    return float(heads * sizes * fmt.activation_bytes)


def _pass(model: ModelSpec, plan: Plan, fmt: WeightFormat, tokens: Scalar, sampled: Scalar, distinct: str,
          attention: list[tuple[int, Scalar, Scalar]]) -> Pass:
    works = (operators.token_work(model, plan, fmt, tokens, distinct)
             + operators.head_work(model, plan, fmt, sampled))
    rows = [(w.name, w.calls * w.flops, w.calls * (w.weight_bytes + w.activation_bytes),
             not w.is_linear) for w in works if not w.ranks > 1]
    rows += [("attention", layers * flops, layers * moved, True) for layers, flops, moved in attention]
    names, flops, moved, is_wide = zip(*rows, strict=True)
    wire = starts = hops = stage_bytes = stage_hops = 0.0
    for w in works:
        if w.ranks == 1:
            continue
        if w.kind == HOP:
            stage_bytes, stage_hops = stage_bytes + w.calls * w.message_bytes, stage_hops + w.calls
            continue
        passes = w.calls * WIRE[w.kind]
        wire = wire + passes * (w.ranks - 1) / w.ranks * w.message_bytes
        starts, hops = starts + w.calls, hops + passes * (w.ranks - 1)
    return Pass(jnp.stack([jnp.asarray(x, float) for x in flops]), jnp.stack([jnp.asarray(x, float) for x in moved]),
                wire, starts, hops, stage_bytes, stage_hops, tuple(is_wide), tuple(names))

