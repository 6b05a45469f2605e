"""Seconds of an iteration of one rank from peaks and kernel constants: every number a traced, differentiable leaf.

    products, experts   jaxsim.cost.gemm          collectives   jaxsim.cost.collectives
    attention           jaxsim.cost.attention     elementwise   kernels x floor + bytes / (bandwidth eta)
    iteration           serial host + max(host launches, device)

`Roofline.operator_seconds` prices one iteration operator by operator; `Roofline.tabulate` turns it into the small
tables that the event loop reads; `Roofline.explain` says where the time of one iteration goes. `jaxsim.cost.roofline`
makes one.
"""

from typing import Literal, NamedTuple

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxsim.cost import attention as attend
from jaxsim.cost import operators
from jaxsim.cost.attention import AttentionShape, Decode, Latent, LatentShape, Prefill, Tail
from jaxsim.cost.base import BatchStats
from jaxsim.cost.collectives import CustomAllReduce, Hop, Nccl
from jaxsim.cost.context_parallel import KvShards, Ring, merged_numbers
from jaxsim.cost.expert_load import Routing
from jaxsim.cost.gemm import Experts, Gemm
from jaxsim.cost.operators import AttentionWork, Work
from jaxsim.cost.rates import Rates
from jaxsim.cost.tabulated import SAMPLED, TOKENS, TabulatedCost, Together
from jaxsim.cost.two_level import DeepEp, TwoLevel
from jaxsim.kernels import octaves
from jaxsim.spec.model import ModelSpec
from jaxsim.spec.plan import Plan, WeightFormat

CUDA_GRAPH_SIZES = (1, 2, 4, *range(8, 513, 8))
"""Tokens of an iteration captured by vLLM; fewer are padded to the next, pieces between attention too.

Source: its compilation config, `cudagraph_capture_sizes` and PIECEWISE mode.
"""

CUDA_GRAPHS = {"full_and_piecewise": True, "full_decode_only": "decodes", "none": False}
"""By `cudagraph_mode`, what `Roofline.tabulate` takes as `cuda_graphs`."""

UNLIMITED = 1e30
"""Bytes/s of reads that cost nothing."""

PIECEWISE_LAUNCHES = 2
"""Launches a layer of an iteration with prompt chunks when graphs are on: captured piece, attention."""


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

    seconds = serial_s + max(launch_s, device_s), in a pipeline the maxima of its stages; device_s is the sum over
    operators. `bound` is "host" where the launches take longer than the device, otherwise the resource with most
    device seconds.
    """

    seconds: float
    serial_s: float
    launch_s: float
    device_s: float
    operators: tuple[OperatorCost, ...]
    flops: float
    bytes: float
    bound: str


class Elementwise(eqx.Module):
    """Norms, rotary, activation, sampler: floor of a kernel, share of the bandwidth."""

    floor_s: Float[Array, ""]
    efficiency: Float[Array, ""]


class Roofline(eqx.Module):
    """Roofline of one rank of a serving instance.

    Leaves (scalars; SI units; shares are of the stated peak):
        peak_flops: dense peak of the linear layers' products; attention_flops: of 16-bit ones.
        memory_bytes_per_s; link_bytes_per_s: per direction, among tensor-parallel ranks; exchange_bytes_per_s: among
        those that share experts; hop_bytes_per_s: between pipeline stages; num_multiprocessors (a whole number).
        gemm, gemm_16: products in the format of the linear layers, and in 16 bits; experts; elementwise; decode,
        prefill, latent (None without latent attention): attention; all_reduce, all_gather, hop, and for experts
        exchange_gather, reduce_scatter, all_to_all: messages. Their own leaves: `jaxsim.spec.efficiency`.
        host_step_s, host_sequence_s: host seconds of an iteration and of each sequence in it, which do not
        overlap the device, unless scheduling is asynchronous: then only async_step_s stays serial and the
        others join the launches. launch_kernel_s: host seconds to issue one kernel or captured piece;
        launch_graph_s: one graph. expert_skew: coefficient of variation of the experts' popularity; expert_share,
        expert_spread: where a load balancer has placed experts, the busiest rank's load in averages and the coefficient
        of variation of the copies' popularity. tensor_scatter (sequence parallelism), deep_ep, shards and passing (ring
        attention; pass_bytes_per_s its link): None where not there. Groups that span nodes have both levels in one.

    Static: model, plan, weights (number format), kv_bytes, distinct_experts, expert_load; elsewhere: names of operators
    that another processor has (`jaxsim.cost.host`), "attention_decode" for the attention of decodes.

    Known gaps: no overlap of collectives with compute; popularities of experts have one spread for all models, and the
    busiest rank's load is that of uniform routing unless `expert_load` says otherwise; sequence lengths enter attention
    through sums and, with FlashAttention 2, the longest context. With pipeline stages an iteration is the whole way
    through all of them; tables say how long each is held.
    """

    peak_flops: Float[Array, ""]
    attention_flops: Float[Array, ""]
    memory_bytes_per_s: Float[Array, ""]
    link_bytes_per_s: Float[Array, ""]
    exchange_bytes_per_s: Float[Array, ""]
    hop_bytes_per_s: Float[Array, ""]
    num_multiprocessors: Int[Array, ""]

    gemm: Gemm
    gemm_16: Gemm
    experts: Experts
    elementwise: Elementwise
    decode: Decode
    prefill: Prefill
    latent: Latent | None
    all_reduce: CustomAllReduce | Nccl | TwoLevel
    all_gather: Nccl | TwoLevel
    exchange_gather: Nccl | TwoLevel
    reduce_scatter: Nccl | TwoLevel
    all_to_all: Nccl | TwoLevel
    hop: Hop

    host_step_s: Float[Array, ""]
    host_sequence_s: Float[Array, ""]
    async_step_s: Float[Array, ""]
    launch_kernel_s: Float[Array, ""]
    launch_graph_s: Float[Array, ""]
    expert_skew: Float[Array, ""]

    model: ModelSpec = eqx.field(static=True)
    plan: Plan = eqx.field(static=True)
    weights: WeightFormat = eqx.field(static=True)
    kv_bytes: float = eqx.field(static=True)
    distinct_experts: str = eqx.field(static=True)
    elsewhere: tuple[str, ...] = eqx.field(static=True, default=())
    expert_load: Routing = eqx.field(static=True, default="balanced")

    tensor_scatter: Nccl | TwoLevel | None = None
    deep_ep: DeepEp | None = None
    shards: KvShards | None = None
    passing: Hop | None = None
    pass_bytes_per_s: Float[Array, ""] | None = None
    expert_share: Float[Array, ""] | None = None
    expert_spread: Float[Array, ""] | None = None

    # Device seconds

    def rates(self, *, linear: bool = False) -> Rates:
        """Peaks, with FLOP/s of the linear layers or of 16-bit products."""
        return Rates(self.peak_flops if linear else self.attention_flops, self.memory_bytes_per_s,
                     self.num_multiprocessors)

    def call_seconds(self, work: Work) -> Float[Array, " counts"]:
        """Seconds of one call of an operator."""
        if work.kind == operators.GEMM:
            kernel = self.gemm if work.is_linear else self.gemm_16
            return kernel.seconds(*work.shape, work.weight_bytes, self.rates(linear=work.is_linear),
                                  self.weights.activation_bytes)
        if work.kind == operators.EXPERTS:
            return self.experts.seconds(work.load, self.rates(linear=True))
        if work.kind == operators.ELEMENTWISE:
            moved = work.weight_bytes + work.activation_bytes
            return (self.elementwise.floor_s * work.kernels
                    + moved / (self.memory_bytes_per_s * self.elementwise.efficiency))
        if work.kind == operators.HOP:
            return self.hop.seconds(work.message_bytes, self.hop_bytes_per_s)
        if work.kind == operators.DEEP_EP:
            return self.deep_ep.seconds(work.ranks, work.message_bytes, self.exchange_bytes_per_s)
        if work.kind == operators.REDUCE_SCATTER and not work.is_exchange:
            return self.tensor_scatter.seconds(work.ranks, work.message_bytes, self.link_bytes_per_s)
        if work.is_exchange:
            kernel = self.exchange_gather if work.kind == operators.ALL_GATHER else getattr(self, work.kind)
            return kernel.seconds(work.ranks, work.message_bytes, self.exchange_bytes_per_s)
        return getattr(self, work.kind).seconds(work.ranks, work.message_bytes, self.link_bytes_per_s)

    def _total(self, works: list[Work], counts: Float[Array, " counts"]) -> Float[Array, " counts"]:
        return sum((w.calls * self.call_seconds(w) for w in works), jnp.zeros_like(counts))

    @property
    def num_ranks(self) -> int:
        """Ranks that iterate together, around experts they share."""
        return self.plan.ranks_in_step(self.model)

    def token_works(self, tokens: Float[Array, " counts"], together: bool | None = None) -> list[Work]:
        """Operators that depend on the tokens of an iteration, with as many tokens on every rank.

        together: only what ranks that iterate together do with the tokens of all, or only the rest.
        """
        placed = None if self.expert_share is None else (self.expert_share, self.expert_spread)
        works = operators.token_work(self.model, self.plan, self.weights, tokens, self.distinct_experts,
                                     self.expert_skew, self.expert_load, placed)
        works = [w for w in works if w.name not in self.elsewhere]
        if together is None:
            return works
        return [w for w in works if (self.num_ranks > 1 and w.name in operators.TOGETHER) == together]

    def sampled_works(self, sampled: Float[Array, " counts"]) -> list[Work]:
        """Operators that depend on the sampled sequences."""
        return operators.head_work(self.model, self.plan, self.weights, sampled)

    @property
    def _attention_work(self) -> AttentionWork:
        return operators.attention_work(self.model, self.plan, self.kv_bytes)

    def attention_shape(self, windowed: bool = False) -> AttentionShape | LatentShape:
        """Attention of a full, or of a windowed layer."""
        return operators.attention_shape(self.model, self.plan, self.weights, self.kv_bytes, windowed=windowed)

    def decode_attention(self, sequences: Float[Array, "*shape"]) -> tuple[Array, Array, Array, Array]:
        """Decode attention of all layers: fixed seconds, seconds per context token of full and of windowed layers, and
        what of the former a token saves that another sequence has read: the L2 cache holds it."""
        if "attention_decode" in self.elsewhere:
            return (jnp.zeros_like(sequences),) * 4
        kernel, work, rates = self.latent or self.decode, self._attention_work, self.rates()
        full, windowed = self.attention_shape(), self.attention_shape(True)
        if self.model.sliding_window >= operators.LARGE_WINDOW_TOKENS:
            windowed = full
        if self.shards is not None:
            return self._sharded_decode(sequences)
        fixed = (work.full_layers * kernel.fixed_seconds(full, sequences, rates)
                 + work.window_layers * kernel.fixed_seconds(windowed, sequences, rates))
        slope = kernel.slope(full, sequences, rates)
        saved = slope - kernel.slope(full, sequences, rates._replace(bytes_per_s=jnp.asarray(UNLIMITED, float)))
        return fixed, work.full_layers * slope, work.window_layers * slope, work.full_layers * saved

    def _sharded_decode(self, sequences: Float[Array, "*shape"]) -> tuple[Array, Array, Array, Array]:
        """The same of ranks that share a cache by tokens: the heads of all of them, a part of each context."""
        ranks, model, rates = self.shards.ranks, self.model, self.rates()
        kernel, shape = self.latent or self.decode, self.attention_shape()
        shape = shape._replace(heads=shape.heads * ranks)
        fixed = kernel.fixed_seconds(shape, sequences, rates) + self.shards.decode_seconds(
            sequences, shape.heads, *merged_numbers(model), self.weights.activation_bytes)
        slope = kernel.slope(shape, sequences, rates)
        saved = slope - kernel.slope(shape, sequences, rates._replace(bytes_per_s=jnp.asarray(UNLIMITED, float)))
        return (model.layers * fixed, model.layers * slope / ranks, 0 * slope, model.layers * saved / ranks)

    def chunk_coefficients(self) -> Float[Array, "2 columns"]:
        """Coefficients of `attention.chunk_seconds`, for all full and all windowed layers."""
        kernel, work, rates = self.latent or self.prefill, self._attention_work, self.rates()
        layers = jnp.asarray([i not in attend.NOT_SECONDS for i in range(attend.CHUNK_COLUMNS)], float)
        both = []
        for count, windowed in ((work.full_layers, False), (work.window_layers, True)):
            each = kernel.coefficients(self.attention_shape(windowed), rates)
            if "attention_decode" in self.elsewhere:
                each = each.at[jnp.asarray(attend.OF_DECODES)].set(0.0)
            if self.shards is not None:
                # A chunk gathers what it reads of the cache, and has its own tokens.
                key_s = self.shards.key_seconds(work.chunk_bytes)
                each = each.at[attend.ADD_KEYS].add(key_s).at[attend.ADD_TOKEN].add(-key_s)
            both.append(each * (count * layers + (1 - layers)))
        return jnp.stack(both)

    @property
    def chunk_floor_s(self) -> Float[Array, ""]:
        """Floor of attention in iterations with chunks, all layers."""
        return self.model.layers * (self.latent or self.prefill).chunk_floor(self.attention_shape())

    @property
    def window_reach(self) -> int:
        """Tokens of a context that windowed layers read at most; 0 where there are none."""
        window = self.model.sliding_window
        return window + attend.WINDOW_TILE if window else 0

    def token_seconds(self, tokens: Float[Array, " counts"]) -> Float[Array, " counts"]:
        """Device seconds of an iteration with chunks that depend on its tokens, the floor of attention included, what
        ranks do together not."""
        return self._total(self.token_works(tokens, together=False), tokens) + self.chunk_floor_s

    def together_seconds(self, tokens: Float[Array, " counts"]
                         ) -> tuple[Float[Array, " counts"], Float[Array, " counts"]]:
        """Device seconds of what ranks that iterate together do with the tokens of all, so many on each: experts, and
        the exchange around them."""
        works = self.token_works(tokens, together=True)
        experts, exchange = ([w for w in works if w.is_exchange == is_exchange] for is_exchange in (False, True))
        return self._total(experts, tokens), self._total(exchange, tokens)

    def sampled_seconds(self, sampled: Float[Array, " counts"]) -> Float[Array, " counts"]:
        """Device seconds that depend on the sampled sequences: LM head, sampler."""
        return self._total(self.sampled_works(sampled), sampled)

    def decode_seconds(self, sequences: Float[Array, " counts"], padded: Float[Array, " counts"]
                       ) -> Float[Array, " counts"]:
        """Device seconds of a decode-only iteration less its context reads, run at `padded` tokens."""
        fixed, *_ = self.decode_attention(sequences)
        return self._total(self.token_works(padded, together=False), padded) + fixed + self.sampled_seconds(sequences)

    @property
    def num_kernels(self) -> float:
        """Kernels of one iteration, launched one by one where graphs are off."""
        one = jnp.ones(())
        return (sum(w.calls * w.kernels for w in self.token_works(one) + self.sampled_works(one))
                + self.model.layers)

    # Host seconds

    def host_seconds(self, sequences: Float[Array, " counts"], *, cuda_graphs: bool | str = True,
                     async_scheduling: bool = False) -> tuple[Array, Array, Array]:
        """Launch seconds of a decode-only and of a mixed iteration, and serial seconds.

        cuda_graphs: "decodes" if only they are captured.
        """
        eager = self.num_kernels * self.launch_kernel_s
        host = self.host_step_s + self.host_sequence_s * sequences
        decode = mixed = eager + 0 * host
        if cuda_graphs:
            if cuda_graphs != "decodes":
                mixed = jnp.minimum(eager, PIECEWISE_LAUNCHES * self.model.layers * self.launch_kernel_s) + 0 * host
            # Every pipeline stage launches a graph of its own.
            graphs_s = self.plan.pipeline_parallel_size * self.launch_graph_s
            decode = jnp.where(sequences <= CUDA_GRAPH_SIZES[-1], graphs_s, mixed)
        if async_scheduling:
            return decode + host, mixed + host, self.async_step_s + 0 * host
        return decode, mixed, host

    # The engine's tables

    @eqx.filter_jit
    def tabulate(self, max_tokens: int, max_sequences: int, *, cuda_graphs: bool | str = True,
                 async_scheduling: bool = False) -> TabulatedCost:
        """The tables the loop reads, up to `max_tokens` tokens and `max_sequences` sequences an iteration.

        Differentiable in every leaf. Decode-only iterations are exact for every count; iterations with prompt
        chunks are exact at the knots of the ladder and linear between them. Both run at the size of a captured graph,
        or of captured pieces, up to the largest. cuda_graphs: "decodes" if only they are captured.
        """
        return self.tables(max_tokens, max_sequences, cuda_graphs=cuda_graphs, async_scheduling=async_scheduling)

    def tables(self, max_tokens: int, max_sequences: int, *, cuda_graphs: bool | str = True,
               async_scheduling: bool = False) -> TabulatedCost:
        """The same operator by operator: small programs that plans share, where `tabulate` compiles one for each."""
        float_type = self.peak_flops.dtype
        knots = octaves.knots(TOKENS, max_tokens)
        # Where only decodes are captured, iterations with prompts run as they are.
        run_at = jnp.asarray(pad_to_graph(knots) if cuda_graphs is True else knots, float_type)
        sampled = jnp.asarray(octaves.knots(SAMPLED, max_sequences), float_type)
        counts = np.arange(max_sequences + 1)
        padded = pad_to_graph(counts) if cuda_graphs else counts
        sequences = jnp.asarray(counts, float_type)
        padded = jnp.asarray(padded, float_type)
        decode, together = self.decode_seconds(sequences, padded), None
        if self.num_ranks > 1:
            experts, exchange = self.together_seconds(run_at)
            together = Together(sum(self.together_seconds(padded)), experts, exchange, captured_tokens(cuda_graphs),
                                self.num_ranks)
        launch, mixed_launch, serial = self.host_seconds(sequences, cuda_graphs=cuda_graphs,
                                                         async_scheduling=async_scheduling)
        return TabulatedCost(
            by_tokens=self.token_seconds(run_at), by_sampled=self.sampled_seconds(sampled),
            by_sequences=jnp.stack([decode, launch, mixed_launch, serial, self._beside(sequences),
                                    *self.decode_attention(sequences)[1:]], axis=1),
            attention=self.chunk_coefficients(), window=jnp.asarray(self.window_reach, jnp.int32), tail=self.tail,
            together=together, stages=self.stages, ring=self.ring)

    @property
    def ring(self) -> Ring | None:
        """Of prefill context parallelism."""
        if self.passing is None:
            return None
        work = self._attention_work
        return Ring.of(self.plan.prefill_context_parallel_size, self.model.layers, self.passing.latency_s,
                       work.chunk_bytes / (self.pass_bytes_per_s * self.passing.efficiency), self.chunk_floor_s)

    @property
    def stages(self) -> Float[Array, " stages"] | None:
        """Share of each pipeline stage in the layers, None with a single one."""
        if self.plan.pipeline_parallel_size == 1:
            return None
        return jnp.asarray(self.plan.stage_layers(self.model.layers), self.peak_flops.dtype) / self.model.layers

    @property
    def tail(self) -> Tail | None:
        """What unequal contexts add to decode attention."""
        if self.latent is not None or "attention_decode" in self.elsewhere or self.prefill.splits:
            return None
        made = self.decode.tail(self.attention_shape(), self.rates(), self._attention_work.full_layers)
        if made is None or self.shards is None:
            return made
        return eqx.tree_at(lambda t: (t.alone_s, t.beside_s), made,
                           (made.alone_s / self.shards.ranks, made.beside_s / self.shards.ranks))

    def _beside(self, sequences: Float[Array, " counts"]) -> Float[Array, " counts"]:
        """What the attention of decodes adds beside chunks, its reads excepted: all but the floor they share."""
        fixed, *_ = self.decode_attention(sequences)
        added = jnp.where(sequences > 0, jnp.maximum(fixed - self.chunk_floor_s, 0.0), 0.0)
        return added * self.chunk_coefficients()[0, attend.APART]

    # For people

    def operator_seconds(self, stats: BatchStats, *, cuda_graphs: bool | str = True) -> dict[str, Float[Array, ""]]:
        """Device seconds of one iteration by operator, all calls, evaluated directly (no tables).

        An iteration runs at the size its captured graph, or pieces of one, are padded to. "attention_floor" is what
        attention takes without contexts, "attention_decode" what decodes add, "attention_prefill" what prompt chunks
        add.
        """
        own = self._of_rank(stats)
        works, attention = self._of(own, cuda_graphs, stats.prefill_tokens)
        return {w.name: w.calls * self.call_seconds(w) for w in works} | attention

    def _of_rank(self, stats: BatchStats) -> BatchStats:
        return stats if self.ring is None else self.ring.of_rank(stats)

    def _of(self, stats: BatchStats, cuda_graphs: bool | str, new: Int[Array, ""]
            ) -> tuple[list[Work], dict[str, Array]]:
        """new: tokens of the chunks on all context-parallel ranks; `stats` are of one."""
        num_decode, is_mixed = float(stats.num_decode), int(stats.num_prefill) > 0
        sampled = float(stats.num_sampled) if is_mixed else num_decode
        tokens = num_decode + float(stats.prefill_tokens)
        if cuda_graphs is True or cuda_graphs and not is_mixed:
            tokens = float(pad_to_graph(np.asarray([tokens]))[0])
        works = self.token_works(jnp.asarray(tokens, float)) + self.sampled_works(jnp.asarray(sampled, float))
        decodes = jnp.asarray(num_decode, float)
        fixed, full, windowed, saved = self.decode_attention(decodes)
        context = jnp.asarray(stats.decode_context, float)
        inside = jnp.minimum(context, decodes * self.window_reach)
        context = context - jnp.where(full > 0, saved / jnp.maximum(full, 1e-30), 0.0) * float(stats.decode_shared)
        tail = self.tail
        if not is_mixed:
            extra = 0.0 if tail is None else tail.alone(
                stats.num_decode, stats.decode_context, stats.longest_context)
            return works, {"attention_floor": fixed, "attention_decode": full * context + windowed * inside + extra}
        coefficients, unlike = self.chunk_coefficients(), (stats.prefill_tiled, stats.prefill_longest)
        chunks = [jnp.asarray(x, float) for x in (stats.prefill_tokens, stats.num_prefill, stats.prefill_pairs,
                                                  stats.prefill_context)]
        alone = jnp.sum(attend.chunk_seconds(coefficients, *chunks, jnp.zeros(()), jnp.zeros(2), *unlike))
        both = jnp.sum(attend.chunk_seconds(coefficients, *chunks, decodes, jnp.stack([context, inside]), *unlike))
        if tail is not None:
            both = both + tail.beside(stats.num_decode, stats.decode_context, stats.longest_context,
                                      stats.num_prefill, stats.prefill_context)
        ring = {} if self.ring is None else {"attention_ring": self.ring.more_seconds(alone, new)}
        apart = self._beside(decodes) + coefficients[0, attend.APART] * (full * context + windowed * inside)
        return works, {"attention_floor": self.chunk_floor_s, "attention_prefill": alone,
                       "attention_decode": both - alone + apart} | ring

    def explain(self, stats: BatchStats, *, cuda_graphs: bool | str = True, async_scheduling: bool = False
                ) -> StepCost:
        """Seconds of one iteration by operator and lane, evaluated directly (no tables), as plain numbers."""
        new, stats = stats.prefill_tokens, self._of_rank(stats)
        works, attention = self._of(stats, cuda_graphs, new)
        costs = [self._explain(work) for work in works] + self._explain_attention(stats, attention)
        device = sum(c.seconds for c in costs)
        launch, mixed, serial = (float(x) for x in self.host_seconds(
            jnp.asarray(stats.num_decode + stats.num_prefill, float), cuda_graphs=cuda_graphs,
            async_scheduling=async_scheduling))
        launch = mixed if int(stats.num_prefill) else launch
        by_bound: dict[str, float] = {}
        for cost in costs:
            by_bound[cost.bound] = by_bound.get(cost.bound, 0.0) + cost.seconds
        lanes = max(launch, device)
        if self.stages is not None:
            head = sum(c.seconds for c in costs if c.name in operators.HEAD)
            shares = np.asarray(self.stages, float)
            on_device = shares * (device - head)
            on_device[-1] += head
            lanes = float(np.maximum(shares * launch, on_device).sum())
        return StepCost(
            seconds=serial + lanes, serial_s=serial, launch_s=launch, device_s=device,
            operators=tuple(sorted(costs, key=lambda c: -c.seconds)), flops=sum(c.flops for c in costs),
            bytes=sum(c.bytes for c in costs),
            bound="host" if launch > device else max(by_bound, key=by_bound.__getitem__))

    def _parts(self, work: Work) -> dict[str, float]:
        """Seconds of one call by what binds it; they overlap."""
        total = float(self.call_seconds(work))
        if work.kind == operators.GEMM:
            kernel = self.gemm if work.is_linear else self.gemm_16
            floor, tiled, memory = kernel.parts(*work.shape, work.weight_bytes, self.rates(linear=work.is_linear),
                                                self.weights.activation_bytes)
        elif work.kind == operators.EXPERTS:
            floor, tiled, weights, between = self.experts.parts(work.load, self.rates(linear=True))
            memory = weights + between
        elif work.kind == operators.ELEMENTWISE:
            floor, tiled = self.elementwise.floor_s * work.kernels, 0.0
            memory = total - floor
        else:
            floor = float(self.call_seconds(work._replace(message_bytes=0.0 * work.message_bytes)))
            return {"latency": floor, "network": total - floor}
        return {"latency": float(floor), "compute": float(tiled), "memory": float(memory)}

    def _explain(self, work: Work) -> OperatorCost:
        parts = self._parts(work)
        return OperatorCost(
            work.name, work.calls * float(self.call_seconds(work)), work.calls * float(work.flops),
            work.calls * float(work.weight_bytes + work.activation_bytes),
            work.calls * float(work.message_bytes), max(parts, key=parts.__getitem__))

    def _explain_attention(self, stats: BatchStats, seconds: dict[str, Array]) -> list[OperatorCost]:
        work, kernel = self._attention_work, self.latent or self.decode
        context, pairs = float(stats.decode_context), float(stats.prefill_pairs)
        inside = min(context, float(stats.num_decode) * self.window_reach)
        read = work.full_layers * context + work.window_layers * inside
        new, keys = float(stats.prefill_tokens), float(stats.prefill_context)
        # Twice the causal pairs, those in the window, and the keys that some query sees.
        causal, window = pairs + new, self.model.sliding_window
        seen = min(causal, 2 * window * new)
        reached = min(keys, new + float(stats.num_prefill) * window)
        again = max(keys - new, 0.0)
        bound = "memory" if kernel.is_memory_bound(self.attention_shape(), self.rates()) else "compute"
        amounts = {
            "attention_floor": (0.0, 0.0, "latency"),
            "attention_decode": (work.decode_flops * read, work.decode_bytes * read, bound),
            "attention_prefill": (
                work.pair_flops * (work.full_layers * causal + work.window_layers * seen)
                + self.model.layers * work.chunk_flops * again,
                work.chunk_bytes * (work.full_layers * keys + work.window_layers * reached), "compute"),
            "attention_ring": (0.0, 0.0, "network")}
        return [OperatorCost(name, float(s), amounts[name][0], amounts[name][1], 0.0, amounts[name][2])
                for name, s in seconds.items()]


def pad_to_graph(counts: Int[np.ndarray, " counts"]) -> Int[np.ndarray, " counts"]:
    """The captured size each batch runs at; beyond the largest, and for 0, the count itself."""
    sizes = np.asarray(CUDA_GRAPH_SIZES)
    index = np.searchsorted(sizes, counts)
    padded = sizes[np.minimum(index, len(sizes) - 1)]
    return np.where((counts > 0) & (index < len(sizes)), padded, counts)


def captured_tokens(cuda_graphs: bool | str) -> Int[Array, ""]:
    """Most tokens of an iteration with prompts whose pieces are captured; 0 where none are."""
    return jnp.asarray(CUDA_GRAPH_SIZES[-1] if cuda_graphs is True else 0, jnp.int32)
