"""Seconds of an iteration from peaks and efficiency curves: every number a traced, differentiable leaf.

    GEMM           floor + max(FLOP (1 + half/m) / (peak eta), bytes / (bandwidth eta_mem))
    elementwise    kernels x floor + bytes / (bandwidth eta_el)
    attention      floor + slopes x (context, KV tokens of chunks, query-key pairs)
    collectives    alpha + 2 (N-1)/N bytes / (link eta_link)
    iteration      serial host + max(host launches, device)

`roofline(...)` makes one from a model, a device and a plan with stated priors; `Roofline.tabulate` turns it
into the small tables that the event loop reads; `Roofline.explain` says where the time of one iteration goes.
"""

from typing import Literal, NamedTuple

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxsim._core.errors import InputError, suggest
from jaxsim.cost import operators
from jaxsim.cost.base import BatchStats
from jaxsim.cost.operators import AttentionWork, Work
from jaxsim.cost.tabulated import TabulatedCost
from jaxsim.kernels import ladder
from jaxsim.spec.device import DeviceSpec
from jaxsim.spec.model import ModelSpec
from jaxsim.spec.plan import Plan, WeightFormat, kv_cache_bytes, weight_format

CUDA_GRAPH_SIZES = (1, 2, 4, *range(8, 513, 8))
"""Batch sizes captured by vLLM; a decode batch is padded to the next. Source: its compilation config."""

PIECEWISE_LAUNCHES = 2
"""Launches a layer of an iteration with prompt chunks when graphs are on: captured piece, attention."""

SWEEP_ROWS = 128
"""Query rows of one tile of the prefill attention kernel."""


class OperatorCost(NamedTuple):
    """One operator of one iteration, all layers; `bytes` of device memory, `bound` by what."""

    name: str
    seconds: float
    flops: float
    bytes: float
    message_bytes: float
    bound: Literal["compute", "memory", "network", "latency"]


class StepCost(NamedTuple):
    """Where the time of one iteration goes, as plain numbers (for people, not for the loop).

    seconds = serial_s + max(launch_s, device_s); device_s is the sum over operators. `bound` is "host" where
    the launches take longer than the device, otherwise the resource with most device seconds.
    """

    seconds: float
    serial_s: float
    launch_s: float
    device_s: float
    operators: tuple[OperatorCost, ...]
    flops: float
    bytes: float
    bound: str


class Roofline(eqx.Module):
    """Roofline of one rank of a serving instance.

    Leaves (scalars; SI units; shares are of the stated peak):
        peak_flops: dense peak of the weight products; attention_flops: of attention products (16-bit).
        memory_bytes_per_s; link_bytes_per_s: per direction; hop_bytes_per_s: between pipeline stages.
        gemm_efficiency, gemm_half_tokens: eta_inf and m_half of eta(m) = eta_inf m / (m + m_half).
        expert_efficiency, expert_half_tokens: the same for grouped products, m = tokens per expert.
        weight_read_efficiency: bandwidth share of GEMMs; expert_read_efficiency: of grouped products;
        elementwise_efficiency: of norms, rotary, activation, sampler.
        kernel_floor_s: of a GEMM and of each kernel of an expert block; elementwise_floor_s: of the others.
        attention_floor_s: of one layer's attention; attention_item_s: of each decoding (sequence, KV head);
        attention_chunk_s: of each prompt chunk, a layer.
        decode_read_efficiency, decode_flops_efficiency: of decode attention; prefill_efficiency: of prefill
        attention; sweep_s: seconds for one row of tiles to pass one KV token, a layer.
        collective_s: latency of an all-reduce; link_efficiency; hop_s: latency of a stage hop.
        host_step_s, host_sequence_s: host seconds of an iteration and of each sequence in it, which do not
        overlap the device, unless scheduling is asynchronous: then only async_step_s stays serial and the
        others join the launches. launch_kernel_s: host seconds to issue one kernel or captured piece;
        launch_graph_s: one graph.

    Static: model, plan, weights (number format), kv_bytes, distinct_experts.

    Known gaps: no overlap of collectives with compute; expert routing uniform; sequence lengths enter
    attention only through sums; with pipeline stages an iteration is the whole way through all stages
    (latency, not throughput); windowed layers in prefill are all or nothing
    (`operators.WINDOW_AS_FULL_TOKENS`).
    """

    peak_flops: Float[Array, ""]
    attention_flops: Float[Array, ""]
    memory_bytes_per_s: Float[Array, ""]
    link_bytes_per_s: Float[Array, ""]
    hop_bytes_per_s: Float[Array, ""]

    gemm_efficiency: Float[Array, ""]
    gemm_half_tokens: Float[Array, ""]
    expert_efficiency: Float[Array, ""]
    expert_half_tokens: Float[Array, ""]
    weight_read_efficiency: Float[Array, ""]
    expert_read_efficiency: Float[Array, ""]
    elementwise_efficiency: Float[Array, ""]
    kernel_floor_s: Float[Array, ""]
    elementwise_floor_s: Float[Array, ""]

    attention_floor_s: Float[Array, ""]
    attention_item_s: Float[Array, ""]
    attention_chunk_s: Float[Array, ""]
    decode_read_efficiency: Float[Array, ""]
    decode_flops_efficiency: Float[Array, ""]
    prefill_efficiency: Float[Array, ""]
    sweep_s: Float[Array, ""]

    collective_s: Float[Array, ""]
    link_efficiency: Float[Array, ""]
    hop_s: Float[Array, ""]

    host_step_s: Float[Array, ""]
    host_sequence_s: Float[Array, ""]
    async_step_s: Float[Array, ""]
    launch_kernel_s: Float[Array, ""]
    launch_graph_s: Float[Array, ""]

    model: ModelSpec = eqx.field(static=True)
    plan: Plan = eqx.field(static=True)
    weights: WeightFormat = eqx.field(static=True)
    kv_bytes: float = eqx.field(static=True)
    distinct_experts: str = eqx.field(static=True)

    # Device seconds

    def _parts(self, work: Work) -> tuple[Array, Array, Array, Array]:
        """Seconds of one call: floor, compute, memory, network."""
        moved = work.weight_bytes + work.activation_bytes
        zero = jnp.zeros_like(self.kernel_floor_s)
        if work.kind == operators.GEMM:
            compute = (work.flops + self.gemm_half_tokens * work.tile_flops) / (
                self.peak_flops * self.gemm_efficiency)
            return (self.kernel_floor_s * work.kernels, compute,
                    moved / (self.memory_bytes_per_s * self.weight_read_efficiency), zero)
        if work.kind == operators.EXPERTS:
            compute = (work.flops + self.expert_half_tokens * work.tile_flops) / (
                self.peak_flops * self.expert_efficiency)
            return (self.kernel_floor_s * work.kernels, compute,
                    moved / (self.memory_bytes_per_s * self.expert_read_efficiency), zero)
        if work.kind == operators.ELEMENTWISE:
            return (self.elementwise_floor_s * work.kernels, zero,
                    moved / (self.memory_bytes_per_s * self.elementwise_efficiency), zero)
        link = self.link_bytes_per_s * self.link_efficiency
        if work.kind == operators.HOP:
            return self.hop_s, zero, zero, work.message_bytes / (self.hop_bytes_per_s * self.link_efficiency)
        share = (work.ranks - 1) / work.ranks * (2 if work.kind == operators.ALL_REDUCE else 1)
        return self.collective_s * work.kernels, zero, zero, share * work.message_bytes / link

    def _seconds(self, work: Work) -> Float[Array, " counts"]:
        floor, compute, memory, network = self._parts(work)
        return work.calls * (floor + jnp.maximum(compute, memory) + network)

    def _total(self, works: list[Work], counts: Float[Array, " counts"]) -> Float[Array, " counts"]:
        return sum((self._seconds(w) for w in works), jnp.zeros_like(counts))

    @property
    def _attention_work(self) -> AttentionWork:
        return operators.attention_work(self.model, self.plan, self.kv_bytes)

    def attention_slopes(self) -> Float[Array, " 5"]:
        """Seconds per decode context token, per one inside the window, per chunk, KV token, pair unit."""
        work, model = self._attention_work, self.model
        flops = self.attention_flops
        decode = jnp.maximum(work.decode_bytes / (self.memory_bytes_per_s * self.decode_read_efficiency),
                             work.decode_flops / (flops * self.decode_flops_efficiency))
        pair = work.pair_flops / (flops * self.prefill_efficiency)
        swept = (self.sweep_s + work.chunk_bytes / (self.memory_bytes_per_s * self.decode_read_efficiency)
                 + work.chunk_flops / (flops * self.prefill_efficiency))
        full, windowed = work.full_layers, work.window_layers
        chunk = self.attention_chunk_s * model.layers
        if model.sliding_window >= operators.WINDOW_AS_FULL_TOKENS:
            prefill_layers = full + windowed
        else:
            prefill_layers = full
            chunk = chunk + windowed * model.sliding_window * swept
        return jnp.stack([full * decode, windowed * decode, chunk, prefill_layers * swept,
                          prefill_layers * pair])

    def token_seconds(self, tokens: Float[Array, " counts"]) -> Float[Array, " counts"]:
        """Device seconds that depend on the tokens of an iteration, the floor of attention included."""
        model, work = self.model, self._attention_work
        rate = self.attention_flops * self.prefill_efficiency
        diagonal = work.full_layers * work.token_flops / rate
        if model.sliding_window >= operators.WINDOW_AS_FULL_TOKENS:
            diagonal = diagonal + work.window_layers * work.token_flops / rate
        elif work.window_layers:
            diagonal = diagonal + work.window_layers * 2 * model.sliding_window * work.pair_flops / rate
        works = operators.token_work(model, self.plan, self.weights, tokens, self.distinct_experts)
        return self._total(works, tokens) + model.layers * self.attention_floor_s + diagonal * tokens

    def sampled_seconds(self, sampled: Float[Array, " counts"]) -> Float[Array, " counts"]:
        """Device seconds that depend on the sampled sequences: LM head, sampler, their attention items."""
        works = operators.head_work(self.model, self.plan, self.weights, sampled)
        items = self.model.layers * self._attention_work.items * self.attention_item_s
        return self._total(works, sampled) + items * sampled

    def decode_seconds(self, sequences: Float[Array, " counts"], padded: Float[Array, " counts"]
                       ) -> Float[Array, " counts"]:
        """Device seconds of a decode-only iteration less its context reads, run at `padded` tokens."""
        works = operators.token_work(self.model, self.plan, self.weights, padded, self.distinct_experts)
        return (self._total(works, padded) + self.model.layers * self.attention_floor_s
                + self.sampled_seconds(sequences))

    @property
    def num_kernels(self) -> float:
        """Kernels of one iteration, launched one by one where graphs are off."""
        one = jnp.ones(())
        works = operators.token_work(self.model, self.plan, self.weights, one) + operators.head_work(
            self.model, self.plan, self.weights, one)
        return sum(w.calls * w.kernels for w in works) + self.model.layers

    # Host seconds

    def host_seconds(self, sequences: Float[Array, " counts"], *, cuda_graphs: bool = True,
                     async_scheduling: bool = False) -> tuple[Array, Array, Array]:
        """Launch seconds of a decode-only and of a mixed iteration, and serial seconds."""
        eager = self.num_kernels * self.launch_kernel_s
        host = self.host_step_s + self.host_sequence_s * sequences
        decode = mixed = eager + 0 * host
        if cuda_graphs:
            pieces = PIECEWISE_LAUNCHES * self.model.layers * self.launch_kernel_s
            mixed = jnp.minimum(eager, pieces) + 0 * host
            decode = jnp.where(sequences <= CUDA_GRAPH_SIZES[-1], self.launch_graph_s, mixed)
        if async_scheduling:
            return decode + host, mixed + host, self.async_step_s + 0 * host
        return decode, mixed, host

    # The engine's tables

    @eqx.filter_jit
    def tabulate(self, max_tokens: int, max_sequences: int, *, cuda_graphs: bool = True,
                 async_scheduling: bool = False) -> TabulatedCost:
        """The tables the loop reads, up to `max_tokens` tokens and `max_sequences` sequences an iteration.

        Differentiable in every leaf. Decode-only iterations are exact for every count; iterations with prompt
        chunks are exact at the knots of the ladder and linear between them.
        """
        float_type = self.peak_flops.dtype
        tokens = jnp.asarray(ladder.knots(max_tokens), float_type)
        sampled = jnp.asarray(ladder.knots(max_sequences), float_type)
        counts = np.arange(max_sequences + 1)
        padded = pad_to_graph(counts) if cuda_graphs else counts
        sequences = jnp.asarray(counts, float_type)
        decode = self.decode_seconds(sequences, jnp.asarray(padded, float_type))
        launch, mixed_launch, serial = self.host_seconds(sequences, cuda_graphs=cuda_graphs,
                                                         async_scheduling=async_scheduling)
        return TabulatedCost(
            by_tokens=self.token_seconds(tokens), by_sampled=self.sampled_seconds(sampled),
            by_sequences=jnp.stack([decode, launch, mixed_launch, serial], axis=1),
            attention=self.attention_slopes(),
            window=jnp.asarray(self.model.sliding_window, jnp.int32))

    # For people

    def explain(self, stats: BatchStats, *, cuda_graphs: bool = True, async_scheduling: bool = False
                ) -> StepCost:
        """Seconds of one iteration by operator and lane, evaluated directly (no tables), as plain numbers."""
        num_decode, num_prefill = float(stats.num_decode), float(stats.num_prefill)
        sampled, tokens = float(stats.num_sampled), float(stats.num_decode + stats.prefill_tokens)
        if num_prefill == 0:
            sampled = num_decode
            tokens = float(pad_to_graph(np.asarray([num_decode]))[0]) if cuda_graphs else tokens
        works = operators.token_work(self.model, self.plan, self.weights, jnp.asarray(tokens, float),
                                     self.distinct_experts)
        works += operators.head_work(self.model, self.plan, self.weights, jnp.asarray(sampled, float))
        costs = [self._explain(work) for work in works]
        costs += self._explain_attention(stats, tokens, sampled)
        device = sum(c.seconds for c in costs)
        launch, mixed, serial = (float(x) for x in self.host_seconds(
            jnp.asarray(num_decode + num_prefill, float), cuda_graphs=cuda_graphs,
            async_scheduling=async_scheduling))
        launch = mixed if num_prefill else launch
        by_bound: dict[str, float] = {}
        for cost in costs:
            by_bound[cost.bound] = by_bound.get(cost.bound, 0.0) + cost.seconds
        return StepCost(
            seconds=serial + max(launch, device), serial_s=serial, launch_s=launch, device_s=device,
            operators=tuple(sorted(costs, key=lambda c: -c.seconds)), flops=sum(c.flops for c in costs),
            bytes=sum(c.bytes for c in costs),
            bound="host" if launch > device else max(by_bound, key=by_bound.__getitem__))

    def _explain(self, work: Work) -> OperatorCost:
        floor, compute, memory, network = (float(x) for x in self._parts(work))
        parts = {"latency": floor, "compute": compute, "memory": memory, "network": network}
        return OperatorCost(
            work.name, float(self._seconds(work)), work.calls * float(work.flops),
            work.calls * float(work.weight_bytes + work.activation_bytes),
            work.calls * float(work.message_bytes), max(parts, key=parts.__getitem__))

    def _explain_attention(self, stats: BatchStats, tokens: float, sampled: float) -> list[OperatorCost]:
        work, layers = self._attention_work, self.model.layers
        slopes = [float(x) for x in self.attention_slopes()]
        context, window = float(stats.decode_context), self.model.sliding_window
        inside = min(context, float(stats.num_decode) * window)
        read = work.full_layers * context + work.window_layers * inside
        costs = [
            OperatorCost("attention_floor", layers * (float(self.attention_floor_s)
                                                      + sampled * work.items * float(self.attention_item_s)),
                         0.0, 0.0, 0.0, "latency"),
            OperatorCost("attention_decode", slopes[0] * context + slopes[1] * inside,
                         work.decode_flops * read, work.decode_bytes * read, 0.0, self._decode_bound())]
        if int(stats.num_prefill):
            # The diagonal is what token_seconds adds to the plain operators.
            point = jnp.asarray(tokens, float)
            plain = self._total(operators.token_work(self.model, self.plan, self.weights, point,
                                                     self.distinct_experts), point)
            diagonal = float(self.token_seconds(point) - plain) - layers * float(self.attention_floor_s)
            pairs, keys = float(stats.prefill_pairs), float(stats.prefill_context)
            costs += [
                OperatorCost("attention_prefill", slopes[4] * pairs + diagonal,
                             work.full_layers * work.pair_flops * (pairs + tokens), 0.0, 0.0, "compute"),
                OperatorCost("attention_sweep", slopes[2] * float(stats.num_prefill) + slopes[3] * keys,
                             layers * work.chunk_flops * keys, layers * work.chunk_bytes * keys, 0.0,
                             "latency")]
        return costs

    def _decode_bound(self) -> Literal["compute", "memory"]:
        work = self._attention_work
        memory = work.decode_bytes / float(self.memory_bytes_per_s * self.decode_read_efficiency)
        compute = work.decode_flops / float(self.attention_flops * self.decode_flops_efficiency)
        return "memory" if memory >= compute else "compute"


def pad_to_graph(counts: Int[np.ndarray, " counts"]) -> Int[np.ndarray, " counts"]:
    """The captured size each batch runs at; beyond the largest, and for 0, the count itself."""
    sizes = np.asarray(CUDA_GRAPH_SIZES)
    index = np.searchsorted(sizes, counts)
    padded = sizes[np.minimum(index, len(sizes) - 1)]
    return np.where((counts > 0) & (index < len(sizes)), padded, counts)


HOSTS = {
    "vllm-v0": dict(host_step_s=3.0e-3, host_sequence_s=40e-6, async_step_s=3.0e-3),
    "vllm-v1": dict(host_step_s=1.0e-3, host_sequence_s=40e-6, async_step_s=0.7e-3),
    "none": dict(host_step_s=0.0, host_sequence_s=0.0, async_step_s=0.0),
}
"""Host seconds by engine generation.

Source: v0: decode steps of Llama-3.1-70B in vLLM 0.6 on H100 (microsoft/apex_plus logs) show 5 to 6.5 ms
beside the weight stream, of which kernel floors are 2 to 3; 40 us a sequence from the scheduler, sampler,
input and output times of an early vLLM fork (microsoft/vidur). v1: what the device lane leaves over of the
median inter-token times of Qwen3-8B in vLLM 0.11 on H100 at batches of 8 to 256 (ML.ENERGY), 1.2 ms + 65 us a
sequence, prefill interference included; asynchronous: of vLLM 0.15 on H100 at batches of 4 to 45
(inference-sim/training), 0.7 ms, no visible slope.
"""

PRIORS = dict(
    gemm_efficiency=0.75, gemm_half_tokens=16.0, expert_efficiency=0.46, expert_half_tokens=40.0,
    weight_read_efficiency=0.87, expert_read_efficiency=0.87, elementwise_efficiency=0.80,
    kernel_floor_s=3.0e-6, elementwise_floor_s=1.5e-6,
    attention_floor_s=8.0e-6, attention_item_s=0.024e-6, attention_chunk_s=0.0,
    decode_read_efficiency=0.85, decode_flops_efficiency=0.72, prefill_efficiency=0.62,
    launch_kernel_s=30e-6, launch_graph_s=60e-6,
)
"""Default leaves for 16-bit weights.

Source: fits of this module's own forms to the vLLM 0.19 operator tables of ai-dynamo/aiconfigurator on H100
and H200 (GEMM: eta 0.79, half 4 to 38, read 0.83, floor 4 us, median error 5 to 7 %; decode attention 0.82 to
0.94, floor 9.6 us; prefill attention 0.62; experts eta 0.46, half 130 per expert, read 0.81, floor 48 us),
moved within what whole steps allow: sustained GEMMs run at 0.70 to 0.75, captured graphs hide part of the
floors (decode steps of vLLM 0.15 on H100), and a half count of 130 an expert would double the steps of
gpt-oss-120b (vLLM 0.18 on H100 and H200). Launches: between the several us a kernel of SKIP
(arXiv 2504.11750) and the 50 us of SGLang without graphs (microsoft/apex_plus).
"""

NARROW_PRIORS = dict(gemm_efficiency=0.54, gemm_half_tokens=135.0, expert_efficiency=0.34,
                     kernel_floor_s=5.0e-6)
"""What changes where products run in 8 or 4 bits (shares are of the narrow peak; the floor holds a
quantisation kernel). Source: as above, fp8 rows on H100."""

DEVICE_PRIORS = {
    "a100": dict(gemm_efficiency=0.85, gemm_half_tokens=100.0, weight_read_efficiency=0.76,
                 expert_read_efficiency=0.76, kernel_floor_s=5.0e-6),
    "rtx_pro_6000": dict(gemm_efficiency=0.87, weight_read_efficiency=0.83, elementwise_floor_s=2.5e-6,
                         attention_floor_s=9.5e-6, prefill_efficiency=0.70),
}
"""Where a device differs, by the start of its name, for 16-bit weights.

Source: A100: vLLM 0.14 GEMM table of aiconfigurator (eta 0.88, half 118, read 0.76, floor 6 us). RTX PRO
6000: layer timings of vLLM 0.19 in casys-kaist/LLMServingSim.
"""

UNTILED_SWEEP_S = 20e-9
"""`sweep_s` where the number of multiprocessors is not known."""


def _sweep_s(model: ModelSpec, device: DeviceSpec, attention_flops: float) -> float:
    """Seconds for a tile of query rows to pass one KV token: 4 rows dh FLOP at one multiprocessor's peak.

    A chunk smaller than the device has tiles for cannot go faster, whatever its size. Source: 22.5 ns a KV
    token and layer measured on an RTX PRO 6000 for chunks of 16 to 256 tokens (26 by this formula).
    """
    if device.num_multiprocessors is None:
        return UNTILED_SWEEP_S
    head = model.v_head_dim if model.is_mla else model.head_dim
    return 4 * SWEEP_ROWS * head * device.num_multiprocessors / attention_flops


def _links(device: DeviceSpec, plan: Plan) -> dict[str, float]:
    """Link priors: custom all-reduce kernels on switched links, NCCL over PCIe, the network beyond a node.

    Source: H100: 4.5 us and about 60 % of 450 GB/s from vLLM 0.19 all-reduce tables (aiconfigurator); NCCL
    alone has 8.8 / 12.3 / 19 us at 2 / 4 / 8 ranks (microsoft/apex_plus). PCIe, network and TPU figures are
    guesses.
    """
    per_node = device.devices_per_node or 8
    inside = device.link_bytes_per_s or device.host_link_bytes_per_s or 1e9
    outside = device.internode_bytes_per_s or 12.5e9
    group = plan.expert_ranks if plan.enable_expert_parallel else plan.tensor_parallel_size
    is_outside = max(group, plan.tensor_parallel_size) > per_node
    latency = 20e-6 if is_outside else 4.5e-6 if device.is_switched else 20e-6
    hop_outside = plan.tensor_parallel_size * plan.pipeline_parallel_size > per_node
    return dict(link_bytes_per_s=min(inside, outside) if is_outside else inside, collective_s=latency,
                link_efficiency=0.6 if device.is_switched or is_outside else 0.5,
                hop_bytes_per_s=min(inside, outside) if hop_outside else inside,
                hop_s=20e-6 if hop_outside else 8e-6)


def roofline(model: ModelSpec, device: DeviceSpec, plan: Plan | None = None, dtype: str = "auto",
             kv_dtype: str = "auto", *, host: str = "vllm-v1", distinct_experts: str = operators.EXPECTED,
             **overrides: float) -> Roofline:
    """A roofline with default efficiencies, any leaf of which `overrides` replaces by name.

    dtype, kv_dtype: number formats ("auto" = the checkpoint's own). A format the device has no arithmetic for
    keeps its bytes and is multiplied in the next wider type it has. host: a name in `HOSTS`.
    distinct_experts: "topk", "expected" or "all".
    """
    plan = (plan or Plan()).check(model)
    fmt = weight_format(dtype, model)
    if host not in HOSTS:
        raise InputError("cost.host", host, "is not known", suggest(host, HOSTS))
    if distinct_experts not in operators.DISTINCT_EXPERTS:
        raise InputError("cost.distinct_experts", distinct_experts, "is not known",
                         suggest(distinct_experts, operators.DISTINCT_EXPERTS))
    peak = device.peak(fmt.compute)
    attention = device.peak("fp32" if fmt.compute == "fp32" else "bf16")
    values = dict(peak_flops=peak.flops, attention_flops=attention.flops,
                  memory_bytes_per_s=device.memory_bytes_per_s,
                  sweep_s=_sweep_s(model, device, attention.flops))
    values |= PRIORS
    if peak.compute in ("fp8", "int8", "fp4"):
        values |= NARROW_PRIORS
    else:
        values |= next((v for k, v in DEVICE_PRIORS.items() if device.name.startswith(k)), {})
    values |= _links(device, plan) | HOSTS[host]
    unknown = [name for name in overrides if name not in values]
    if unknown:
        raise InputError("cost.overrides." + unknown[0], overrides[unknown[0]], "is not a parameter of the roofline",
                         suggest(unknown[0], values))
    values |= overrides
    for name, value in values.items():
        if not np.all(np.asarray(value) >= 0) or (name.endswith(("flops", "bytes_per_s", "efficiency"))
                                                  and not np.all(np.asarray(value) > 0)):
            raise InputError("cost.overrides." + name, value, "must be positive",
                             "give a positive number, or leave it out")
    leaves = {name: jnp.asarray(value, float) for name, value in values.items()}
    return Roofline(**leaves, model=model, plan=plan, weights=fmt,
                    kv_bytes=kv_cache_bytes(kv_dtype, dtype, model), distinct_experts=distinct_experts)
