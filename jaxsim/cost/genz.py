"""GenZ's own analytic mode on jaxsim's models and plans: a second opinion on layers and passes, quirks included.

    operator    max(FLOP / (peak eta_c), (off-chip bytes / BW + on-chip bytes / BW_chip) / eta_m)
    collective  5 us + w (N - 1) latency + w (N - 1)/N bytes / link,   w = 2 all-reduce, else 1
    pass        sum of operators and collectives x layers; nothing overlaps, no host, no launch

Counting is GenZ's where it differs from `jaxsim.cost.operators`, and each place says so: no norms, rotary, cache write
or sampler; prompts attend S x S; scores and decode activations are on-chip traffic; an expert layer reads k experts
whatever the batch. Projections, dense FFN and LM head have the same FLOP, weights and activations in both.

    machine = Machine.of(300, 1200, compute_efficiency=0.8, memory_efficiency=0.8)
    layer_seconds(decode_work(load_model("llama-2-7b"), context=1024), machine)

A function of arrays: differentiable in every leaf of `Machine` and in contexts, tokens and batch, but for the whole
tokens that an expert gets of a prompt. Golden sums to six digits need 64-bit floats (`jax.enable_x64`).

Source: GenZ, arXiv 2406.01698, repository abhibambhaniya/GenZ-LLM-Analyzer.
Known gaps: GenZ's pipeline stages, sequence parallelism, mixed tensor and expert parallelism of one layer, shared
experts, LoRA, state-space models, quantised KV, ASTRA-sim. It has no latent attention itself.
"""

import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import equinox as eqx
import jax.numpy as jnp
import msgspec
from jaxtyping import Array, Float

from jaxsim._core.errors import InputError, suggest
from jaxsim._core.precision import enable_x64
from jaxsim.cost import operators
from jaxsim.cost.operators import ALL_GATHER, ALL_REDUCE, ALL_TO_ALL, HOP
from jaxsim.spec.model import ModelSpec, load_model
from jaxsim.spec.plan import Plan
from jaxsim.spec.quantization import WeightFormat

Scalar = Float[Array, ""] | float

GIB = 1 << 30

START_S = 5e-6
"""Seconds before a collective's first byte. Source: GenZ, collective_times.py."""

ON_CHIP_GB_PER_S = 18_000
"""Bandwidth of on-chip memory. Source: default of GenZ's System."""

LINK_LATENCY_S = 1e-6
"""Seconds of a link (0.25e-6 for its Blackwell entries). Source: default of GenZ's inference systems."""

OFFLOAD_GB_PER_S = 128
"""Bandwidth of the slow tier. Source: GenZ, LLM_inference/utils.py."""

WIRE = {ALL_REDUCE: 2.0, ALL_GATHER: 1.0, ALL_TO_ALL: 1.0}
"""Times (N - 1)/N of a message crosses a link, and times N - 1 latencies are paid."""

DTYPES = {"f32": (4.0, 2.0), "bf16": (2.0, 1.0), "int8": (1.0, 0.5), "fp8": (1.0, 0.5), "fp6": (0.75, 0.5),
          "int4": (0.5, 0.25), "fp4": (0.5, 0.25)}
"""Bytes of a number, of every tensor alike, and seconds of its arithmetic over those of bf16.

Source: GenZ, system.py.
"""

DEVICES = {
    "A100_40GB": (312, 40, 1600, 150), "A100_80GB": (312, 80, 2039, 150), "H100": (989, 80, 3400, 450),
    "GH200": (1979, 144, 4900, 450), "B100": (3500, 192, 8000, 900), "GB200": (4500, 192, 8000, 900),
    "TPUv4": (275, 32, 1228, 24), "TPUv5e": (197, 16, 820, 50), "TPUv5p": (459, 95, 2765, 450),
    "TPUv6": (926, 32, 1640, 100), "MI300X": (1307, 192, 5300, 400), "MI325X": (1307, 256, 6000, 400),
    "Gaudi3": (1835, 128, 3675, 300),
}
"""TFLOP/s, GB, GB/s, link GB/s as GenZ prints them. Those of GH200, B100 and GB200 are sparse peaks, twice the dense.

Source: GenZ, Systems/system_configs.py.
"""


class Machine(eqx.Module):
    """A device as GenZ sees it. Leaves are scalars: FLOP/s of bf16, bytes/s, seconds, and shares in (0, 1]."""

    flops: Scalar
    bytes_per_s: Scalar
    on_chip_bytes_per_s: Scalar
    link_bytes_per_s: Scalar
    link_latency_s: Scalar
    compute_efficiency: Scalar
    memory_efficiency: Scalar
    link_efficiency: Scalar

    @classmethod
    def of(cls, tflops: Scalar, gb_per_s: Scalar, link_gb_per_s: Scalar = 25.0, *,
           on_chip_gb_per_s: Scalar = ON_CHIP_GB_PER_S, link_latency_s: Scalar = LINK_LATENCY_S,
           compute_efficiency: Scalar = 1.0, memory_efficiency: Scalar = 1.0, link_efficiency: Scalar = 1.0
           ) -> "Machine":
        """From TFLOP/s (10^12) and "GB/s", which GenZ takes for 2^30 bytes/s: 7.4 % above a datasheet.

        Raises `InputError` where a plain number is not positive, or a share exceeds 1.
        """
        given = dict(tflops=tflops, gb_per_s=gb_per_s, link_gb_per_s=link_gb_per_s, on_chip_gb_per_s=on_chip_gb_per_s,
                     link_latency_s=link_latency_s, compute_efficiency=compute_efficiency,
                     memory_efficiency=memory_efficiency, link_efficiency=link_efficiency)
        for name, value in given.items():
            is_share = name.endswith("efficiency")
            if isinstance(value, numbers.Real) and not (0 < value <= (1 if is_share else math.inf)
                                                        or name == "link_latency_s" and value == 0):
                raise InputError(f"machine.{name}", value, "is out of range",
                                 "give a share above 0, at most 1" if is_share else "give a positive number")
        # Traps: binary GB for memory and links, decimal TFLOP.
        leaves = dict(given, flops=tflops * 1e12, bytes_per_s=gb_per_s * GIB,
                      on_chip_bytes_per_s=on_chip_gb_per_s * GIB, link_bytes_per_s=link_gb_per_s * GIB)
        return cls(**{field: jnp.asarray(leaves[field], float) for field in cls.__dataclass_fields__})

    @classmethod
    def named(cls, device: str, efficiency: Scalar = 1.0, link_latency_s: Scalar = LINK_LATENCY_S) -> "Machine":
        """An entry of `DEVICES`, one efficiency for arithmetic and memory. Raises `InputError`."""
        if device not in DEVICES:
            raise InputError("machine", device, "is not in GenZ's table", suggest(device, DEVICES))
        tflops, _, memory, link = DEVICES[device]
        return cls.of(tflops, memory, link, link_latency_s=link_latency_s, compute_efficiency=efficiency,
                      memory_efficiency=efficiency)


class Operator(NamedTuple):
    """One operator of GenZ on one rank, one call.

    calls: how often in a pass; is_layer: whether a layer makes it. flops: bf16-equivalent, so already scaled by the
    number type. kind: "" or that of a collective over `ranks`.
    """

    name: str
    calls: float
    is_layer: bool
    flops: Scalar = 0.0
    off_chip_bytes: Scalar = 0.0
    on_chip_bytes: Scalar = 0.0
    kind: Literal["", "all_reduce", "all_gather", "all_to_all", "hop"] = ""
    message_bytes: Scalar = 0.0
    ranks: int = 1


class PassSeconds(NamedTuple):
    """Seconds of a pass: `compute` (operators) and `communication` (collectives); `total` is their sum."""

    compute: Float[Array, ""]
    communication: Float[Array, ""]

    @property
    def total(self) -> Float[Array, ""]:
        """Seconds; GenZ overlaps nothing."""
        return self.compute + self.communication


def collective_seconds(kind: str, message_bytes: Scalar, ranks: int, machine: Machine) -> Float[Array, ""]:
    """Seconds of a collective of `message_bytes`, the whole buffer, among `ranks`.

    5 us + w (N - 1) latency + w (N - 1)/N bytes / link; a hop: latency + bytes / link.
    Source: GenZ, collective_times.py. Its all-to-all is priced like its all-gather.
    """
    bandwidth = machine.link_bytes_per_s
    if kind == HOP:
        return machine.link_latency_s + message_bytes / bandwidth
    if kind not in WIRE:
        raise InputError("kind", kind, "is no collective of GenZ", suggest(kind, [*WIRE, HOP]))
    if ranks == 1:
        return jnp.zeros(())
    times = WIRE[kind] * (ranks - 1)
    return START_S + times * machine.link_latency_s + times / ranks * message_bytes / bandwidth


def operator_seconds(work: Operator, machine: Machine) -> Float[Array, ""]:
    """Seconds of one call."""
    if work.kind:
        return collective_seconds(work.kind, work.message_bytes, work.ranks, machine) / machine.link_efficiency
    memory = work.off_chip_bytes / machine.bytes_per_s + work.on_chip_bytes / machine.on_chip_bytes_per_s
    return jnp.maximum(work.flops / machine.flops / machine.compute_efficiency, memory / machine.memory_efficiency)


def layer_seconds(works: list[Operator], machine: Machine) -> Float[Array, ""]:
    """Seconds of a layer, collectives included: GenZ's golden sums. Of a model with two kinds of layers, both added."""
    return sum((operator_seconds(work, machine) for work in works if work.is_layer), start=jnp.zeros(()))


def pass_seconds(works: list[Operator], machine: Machine) -> PassSeconds:
    """Seconds of a whole pass over one rank."""
    def total(is_collective):
        return sum((work.calls * operator_seconds(work, machine) for work in works
                    if bool(work.kind) == is_collective), start=jnp.zeros(()))

    return PassSeconds(total(False), total(True))


class _Counter:
    """Operators of a model under a plan, in GenZ's terms."""

    def __init__(self, model: ModelSpec, plan: Plan | None, dtype: str):
        plan = (plan or Plan()).check(model)
        if dtype not in DTYPES:
            raise InputError("dtype", dtype, "is not a number type of GenZ", suggest(dtype, DTYPES))
        for field in ("pipeline_parallel_size", "data_parallel_size"):
            if getattr(plan, field) > 1:
                raise InputError(f"engine.{field}", getattr(plan, field), "is not in GenZ's layer sums",
                                 "give the plan of one stage and one replica")
        if model.is_mla or model.shared_experts or model.window_layers:
            raise InputError("model.name", model.name, "has latent attention, shared experts or a sliding window, "
                             "which this mode does not count", "use jaxsim.cost.roofline")
        self.model, self.plan, self.ranks = model, plan, plan.tensor_parallel_size
        self.width, self.slowness = DTYPES[dtype]
        # Every rank of an expert group is one more tensor rank for attention, so `rank` is the same in both.
        self.rank = model.rank_shape(self.ranks, plan.expert_ranks)
        self.fmt = WeightFormat("genz", self.width, self.width, self.width, self.width, "bf16")

    def product(self, name, m, rows, columns, calls, is_on_chip, is_layer=True) -> Operator:
        """A matrix product: 2 m rows columns FLOP; weights are off-chip, activations where `is_on_chip` says."""
        activations = m * (rows + columns) * self.width
        weights = rows * columns * self.width
        return Operator(name, calls, is_layer, 2.0 * m * rows * columns * self.slowness,
                        weights if is_on_chip else weights + activations, activations if is_on_chip else 0.0)

    def shared(self, names, m, is_on_chip) -> list[Operator]:
        """Products that jaxsim counts alike, taken from its own counts."""
        works = operators.token_work(self.model, self.plan, self.fmt, m)
        found = []
        for work in works:
            if work.name in names:
                off, on = work.weight_bytes + work.activation_bytes, 0.0
                if is_on_chip:
                    off, on = work.weight_bytes, work.activation_bytes
                found.append(Operator(work.name, work.calls, True, work.flops * self.slowness, off, on))
        return found

    def attention(self, name, batch, queries, keys, is_decode) -> list[Operator]:
        """Scores and their product with the values, over `queries` x `keys` of each of `batch`.

        GenZ halves nothing for causality. Scores are on-chip; queries and outputs too where `is_decode`.
        """
        heads, size, layers = self.rank.heads, self.model.head_dim, self.model.layers
        flops = 2.0 * batch * heads * queries * keys * size * self.slowness
        cached = batch * self.rank.kv_heads * keys * size * self.width
        small = batch * heads * queries * size * self.width
        scores = batch * heads * queries * keys * self.width
        off, on = (cached, small + scores) if is_decode else (cached + small, scores)
        return [Operator(f"{part}_{name}", layers, True, flops, off, on) for part in ("logit", "attend")]

    def collective(self, name, kind, elements, calls, ranks, is_layer=True) -> list[Operator]:
        if ranks == 1:
            return []
        return [Operator(name, calls, is_layer, kind=kind, message_bytes=elements * self.width, ranks=ranks)]

    def experts(self, m, tokens_per_expert, experts, router_message, is_on_chip) -> list[Operator]:
        """Router, exchange, and the experts of a rank as one product."""
        model, calls = self.model, self.model.num_moe_layers
        if not calls:
            return []
        group = self.plan.expert_ranks
        tensor = 1 if group > 1 else self.ranks
        matrices, inner = (2 if model.gated else 1), experts * self.rank.moe_ffn
        # The router's input is cut over tensor ranks (jaxsim has all of it on each) and its activations are off-chip
        # even in decode.
        found = [self.product("router", m, model.hidden // tensor, model.experts, calls, False)]
        found += self.collective("router_all_reduce", ALL_REDUCE, m * router_message, calls, tensor)
        exchanged = m * model.experts_per_token * model.hidden
        exchange = self.collective("expert_exchange", ALL_TO_ALL, exchanged, calls, group)
        found += exchange
        found += [self.product("experts_up", tokens_per_expert, model.hidden, matrices * inner, calls, is_on_chip),
                  self.product("experts_down", tokens_per_expert, inner, model.hidden, calls, is_on_chip)]
        return found + exchange + self.collective("experts_all_reduce", ALL_REDUCE, m * model.hidden, calls, tensor)

    def reductions(self, m) -> list[Operator]:
        """All-reduces of attention and of dense FFNs."""
        model = self.model
        found = self.collective("attention_all_reduce", ALL_REDUCE, m * model.hidden, model.layers, self.ranks)
        if model.num_dense_layers:
            found += self.collective("ffn_all_reduce", ALL_REDUCE, m * model.hidden, model.num_dense_layers, self.ranks)
        return found

    def head(self, m) -> list[Operator]:
        """The LM head, its activations off-chip even in decode."""
        work = self.product("lm_head", m, self.model.hidden, self.model.vocab // self.ranks, 1, False, False)
        return [work, *self.collective("logits_gather", ALL_GATHER, m * self.model.vocab, 1, self.ranks, False)]


PROJECTIONS = ("qkv", "attention_output", "ffn_up", "ffn_down")
"""Operators of `jaxsim.cost.operators.token_work` that GenZ counts alike."""


def prefill_work(model: ModelSpec, plan: Plan | None = None, *, tokens: Scalar, batch: Scalar = 1,
                 dtype: str = "bf16") -> list[Operator]:
    """Operators of a prompt pass: `batch` prompts of `tokens` tokens each.

    GenZ's ways: activations off-chip; attention S x S; every expert gets floor(S k / E) tokens of a prompt; the
    embedding is a product with a one-hot matrix; the head runs over every token of the prompt.
    With `plan.enable_expert_parallel` experts are whole on the ranks. Raises `InputError`.
    """
    count = _Counter(model, plan, dtype)
    # Amounts do not fit 32-bit integers.
    batch, tokens = 1.0 * batch, 1.0 * tokens
    m = batch * tokens
    found = count.shared(PROJECTIONS, m, is_on_chip=False) + count.attention("prompt", batch, tokens, tokens, False)
    if model.num_moe_layers:
        each = batch * (tokens * model.experts_per_token // model.experts)
        found += count.experts(m, each, model.experts / count.plan.expert_ranks, model.experts, False)
    found += count.reductions(m)
    found.append(count.product("embedding", m, model.vocab // count.ranks, model.hidden, 1, False, False))
    found += count.collective("embedding_all_reduce", ALL_REDUCE, m * model.hidden, 1, count.ranks, False)
    return found + count.head(m)


def decode_work(model: ModelSpec, plan: Plan | None = None, *, context: Scalar, generated: Scalar = 32,
                batch: Scalar = 1, beams: int = 1, dtype: str = "bf16", experts_per_rank: float | None = None,
                router_message: Literal["hidden", "experts"] = "hidden",
                distinct_experts: Literal["topk", "expected", "all"] = "topk") -> list[Operator]:
    """Operators of a decode pass: `batch` x `beams` sequences, a prompt of `context` and `generated` tokens behind it.

    GenZ's ways: activations and scores on-chip; the prompt's KV, its FLOP and its scores are counted once for the
    beams of a request; weights of ceil(k / ranks) experts whatever the batch. `generated` defaults to its 32.
    experts_per_rank: experts a rank reads instead (k / ranks: spread evenly; k: all on one rank). distinct_experts:
    "topk" is GenZ's way; "expected" and "all" are what uniform routing and full batches read, over the ranks evenly.
    router_message: what the router's all-reduce sends, a hidden state a token (released code) or a number an expert
    (the version behind its Mixtral notebook). Raises `InputError`.
    """
    count = _Counter(model, plan, dtype)
    if distinct_experts not in operators.DISTINCT_EXPERTS:
        raise InputError("distinct_experts", distinct_experts, "is not known",
                         suggest(distinct_experts, operators.DISTINCT_EXPERTS))
    if beams < 1:
        raise InputError("beams", beams, "is no count", "give a whole number of at least 1")
    messages = {"hidden": model.hidden, "experts": model.experts}
    if router_message not in messages:
        raise InputError("router_message", router_message, "is not known", suggest(router_message, messages))
    batch, context, generated = 1.0 * batch, 1.0 * context, 1.0 * generated
    m = batch * beams
    found = count.shared(PROJECTIONS, m, is_on_chip=True)
    found += count.attention("prompt", batch, 1, context, True) + count.attention("generated", m, 1, generated, True)
    if model.num_moe_layers:
        each = m
        if experts_per_rank is None and distinct_experts == "topk":
            experts_per_rank = max(1, -(-model.experts_per_token // count.plan.expert_ranks))
        elif experts_per_rank is None:
            distinct = operators.distinct_experts(model, m, distinct_experts)
            experts_per_rank = distinct / count.plan.expert_ranks
            # Tokens go to their own experts only.
            each = m * model.experts_per_token / distinct
        found += count.experts(m, each, experts_per_rank, messages[router_message], True)
    return found + count.reductions(m) + count.head(m)


def chunked_work(model: ModelSpec, plan: Plan | None = None, *, prefills: Sequence[tuple[Scalar, Scalar]] = (),
                 decodes: Sequence[Scalar] = (), dtype: str = "bf16") -> list[Operator]:
    """Operators of an iteration of prompt chunks and decodes: one pass of products over all of its tokens.

    prefills: tokens there and new ones, of each chunk, whose attention is new x (there + new); decodes: context of
    each, whose attention is 1 x context. Products, experts and head are those of a prompt pass of as many tokens.
    With one chunk of `length` new tokens a sequence it is the pass that verifies speculated tokens.
    Source: GenZ, LLM_inference/llm_chunked.py, by notes; that activations are off-chip, as in a prompt pass, is ours.
    Raises `InputError`.
    """
    count = _Counter(model, plan, dtype)
    if not len(prefills) and not len(decodes):
        raise InputError("prefills", list(prefills), "leaves nothing to do", "give chunks, or contexts of decodes")
    m = 1.0 * sum(new for _, new in prefills) + 1.0 * len(decodes)
    found = count.shared(PROJECTIONS, m, is_on_chip=False)
    for past, new in prefills:
        past, new = 1.0 * past, 1.0 * new
        found += count.attention("prompt", 1.0, new, past + new, False)
    for context in decodes:
        found += count.attention("decode", 1.0, 1.0, 1.0 * context, True)
    if model.num_moe_layers:
        each = m * model.experts_per_token // model.experts
        found += count.experts(m, each, model.experts / count.plan.expert_ranks, model.experts, False)
    return found + count.reductions(m) + count.head(m)


def speculative_seconds(verify_s: Scalar, draft_s: Scalar, length: int, acceptance: Scalar) -> Float[Array, ""]:
    """Seconds a token: a cycle is one pass that verifies `length` tokens, and as many of the draft model.

    (verify + N draft) / `speculative_tokens`. Source: GenZ, LLM_inference/llm_spec_decode.py.
    """
    return (verify_s + length * draft_s) / speculative_tokens(length, acceptance)


def offloaded_bytes_per_s(total_bytes: Scalar, capacity_bytes: Scalar, machine: Machine,
                          external_bytes_per_s: Scalar = 1.0 * OFFLOAD_GB_PER_S * GIB) -> Float[Array, ""]:
    """Bandwidth where `total_bytes` exceed the device: total / max(min(total, HBM)/BW, (total - HBM)/external).

    Both tiers are read at once. Source: GenZ, LLM_inference/utils.py.
    """
    total_bytes, capacity_bytes = 1.0 * total_bytes, 1.0 * capacity_bytes
    inside = jnp.minimum(total_bytes, capacity_bytes) / machine.bytes_per_s
    outside = jnp.maximum(total_bytes - capacity_bytes, 0.0) / external_bytes_per_s
    return total_bytes / jnp.maximum(inside, outside)


def offloaded(machine: Machine, total_bytes: Scalar, capacity_bytes: Scalar,
              external_bytes_per_s: Scalar = 1.0 * OFFLOAD_GB_PER_S * GIB) -> Machine:
    """The machine at its `offloaded_bytes_per_s`; the same where everything fits."""
    slower = offloaded_bytes_per_s(total_bytes, capacity_bytes, machine, external_bytes_per_s)
    return eqx.tree_at(lambda m: m.bytes_per_s, machine, slower)


def speculative_tokens(length: int, acceptance: Scalar) -> Float[Array, ""]:
    """Expected tokens of a cycle of `length` drafts: min(1 + sum_{k<N} k x^k (1 - x) + N x^N, N), N = `length`.

    That is (1 - x^(N+1)) / (1 - x), the usual closed form, capped at N: GenZ's cap loses the bonus token.
    Source: GenZ, LLM_inference/llm_spec_decode.py.
    """
    if length < 1:
        raise InputError("length", length, "is no count of drafts", "give a whole number of at least 1")
    x = jnp.asarray(acceptance, float)
    accepted = sum((k * x ** k * (1 - x) for k in range(1, length)), start=jnp.zeros(()))
    return jnp.minimum(1 + accepted + length * x ** length, length)


# Golden numbers


def _golden_machine() -> Machine:
    return Machine.of(300, 1200, compute_efficiency=0.8, memory_efficiency=0.8)


def _golden_moe_machine() -> Machine:
    return Machine.of(2000, 4900, compute_efficiency=0.8, memory_efficiency=0.8)


BEAMS_VOCAB, A100_LATENCY_S, ROUTER_MESSAGE = 32_000, 2e-6, "experts"
"""What the notebooks do not print, read off what they do: Llama 2's vocabulary, off the collectives of the beams case;
seconds of a link of the A100, off those of Mixtral's prompt pass; what its router sends, off those of its decode."""


def beams(part: str, vocab: int = BEAMS_VOCAB) -> Float[Array, ""]:
    """Seconds of a decode of Llama-3.1-70B on four H100 with 8 beams, or of a part of `PassSeconds`."""
    model = msgspec.structs.replace(load_model("llama-3.1-70b"), vocab=vocab)
    works = decode_work(model, Plan(tensor_parallel_size=4), context=2589, generated=30, beams=8)
    return getattr(pass_seconds(works, Machine.named("H100", 0.75)), part)


def mixtral(part: str, is_decode: bool, latency_s: float = A100_LATENCY_S,
            router_message: Literal["hidden", "experts"] = ROUTER_MESSAGE) -> Float[Array, ""]:
    """The same of Mixtral-8x7B on four A100: a decode, or a prompt."""
    model, plan = load_model("mixtral-8x7b"), Plan(tensor_parallel_size=4)
    works = (decode_work(model, plan, context=1024, generated=256, router_message=router_message) if is_decode
             else prefill_work(model, plan, tokens=1024))
    return getattr(pass_seconds(works, Machine.named("A100_40GB", link_latency_s=latency_s)), part)


EXPERTS = Plan(tensor_parallel_size=4, enable_expert_parallel=True)


def mixtral_22b(part: str = "total", **experts: Any) -> Float[Array, ""]:
    """The same of a decode of Mixtral-8x22B in fp8 on four H100 with expert parallelism, batch 32; experts: as
    `decode_work` takes them."""
    works = decode_work(load_model("mixtral-8x22b"), EXPERTS, context=0, generated=1, batch=32, dtype="fp8", **experts)
    return getattr(pass_seconds(works, Machine.named("H100")), part)


class Claim(NamedTuple):
    """A published time in ms as printed, and what computes it here in seconds."""

    name: str
    published_ms: str
    seconds: Callable[[], Float[Array, ""]]

    def found_ms(self) -> float:
        """Milliseconds here, in 64-bit floats."""
        with enable_x64(True):
            return 1e3 * float(self.seconds())

    def status(self) -> str:
        """"digits" (every printed digit), "exact" (0.1 %), "tight" (10 %), or "missed"."""
        found, published = self.found_ms(), float(self.published_ms)
        if f"{found:.{len(self.published_ms.partition('.')[2])}f}" == self.published_ms:
            return "digits"
        error = abs(found / published - 1)
        return "exact" if error < 1e-3 else "tight" if error < 0.1 else "missed"


CLAIMS = (
    Claim("Llama-2-7B layer, decode at 1024 + 32", "0.409464",
          lambda: layer_seconds(decode_work(load_model("llama-2-7b"), context=1024), _golden_machine())),
    Claim("Llama-2-7B layer, prompt of 1024", "1.798518",
          lambda: layer_seconds(prefill_work(load_model("llama-2-7b"), tokens=1024), _golden_machine())),
    Claim("Mixtral-8x7B layer, decode at 1024 + 32", "0.188411",
          lambda: layer_seconds(decode_work(load_model("mixtral-8x7b"), context=1024), _golden_moe_machine())),
    Claim("Mixtral-8x7B layer, prompt of 1024", "0.781855",
          lambda: layer_seconds(prefill_work(load_model("mixtral-8x7b"), tokens=1024), _golden_moe_machine())),
    Claim("Llama-3.1-70B, 4 H100, 8 beams at 2589 + 30", "14.481", lambda: beams("total")),
    Claim("of which collectives", "1.834", lambda: beams("communication")),
    Claim("Mixtral-8x7B, 4 A100-40, decode at 1024 + 256", "5.383", lambda: mixtral("total", True)),
    Claim("of which collectives", "1.648", lambda: mixtral("communication", True)),
    Claim("Mixtral-8x7B, 4 A100-40, prompt of 1024", "28.66", lambda: mixtral("total", False)),
    Claim("of which collectives", "7.05", lambda: mixtral("communication", False)),
    Claim("Mixtral-8x22B fp8, 4 H100, EP, batch 32, spread evenly", "3.23", lambda: mixtral_22b(experts_per_rank=0.5)),
    Claim("the same, all tokens to the experts of one chip", "11.33", lambda: mixtral_22b(experts_per_rank=2)),
)
"""Times that GenZ publishes. Source: its golden tests, its notebooks, and (the last two) notes on the paper."""
