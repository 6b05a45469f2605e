"""What one iteration asks of a rank: FLOP, bytes, kernels and messages of every operator.

Pure counting, no device: `token_work` for what depends on the tokens of the iteration, `head_work` for what
depends on the sequences that are sampled, `attention_shape` and `AttentionWork` for attention.
Counts are for one rank and one call; `calls` says how many layers make the call.

Symbols: m tokens, d hidden, H heads, K KV heads, dh head size, f FFN size, E experts, k experts a token.

Source: standard transformer algebra (a multiply and an add are 2 FLOP).
"""

from typing import NamedTuple

import jax.numpy as jnp
import msgspec
from jaxtyping import Array, Float

from jaxsim.cost.attention import AttentionShape, LatentShape
from jaxsim.cost.expert_load import Routing, busiest_pairs
from jaxsim.cost.gemm import ExpertLoad, expected_blocks
from jaxsim.spec.efficiency import EXPERT_ROWS
from jaxsim.spec.model import ModelSpec
from jaxsim.spec.plan import Plan, WeightFormat

GEMM, EXPERTS, ELEMENTWISE, ALL_REDUCE, ALL_GATHER, REDUCE_SCATTER, ALL_TO_ALL, HOP = (
    "gemm", "experts", "elementwise", "all_reduce", "all_gather", "reduce_scatter", "all_to_all", "hop")
DEEP_EP = "deep_ep"

EXPERT_KERNELS = 12
"""Launches of a fused MoE block: routing, alignment, two grouped products, activation, sum, and casts and fills."""

SAMPLER_KERNELS = 8
"""Kernels of the sampler. Source: 25 us at batch 1 in vLLM 0.19 layer timings on an RTX PRO 6000."""

LOGIT_BYTES = 8
"""Bytes moved for each logit in sampling. Source: the same timings, 0.55 us a sequence at 128,256 entries."""

LARGE_WINDOW_TOKENS = 1024
"""Decodes are taken to have filled windows smaller than this (`window_s` of their kernel)."""

LOGITS_MESSAGE_BYTES = 2

DISPATCH_BYTES = 1 + 4 / 128
"""Of a number that DeepEP dispatches in 8 bits, a float32 scale for every 128 of them included. Source: DeepEP."""

TOPK, EXPECTED, ALL = "topk", "expected", "all"
DISTINCT_EXPERTS = (TOPK, EXPECTED, ALL)
"""Experts an iteration reads: k whatever the batch (GenZ), expected by their popularity, or all."""


SMALLEST_SKEW = 0.03
"""Below, popularities are taken for equal: a difference of less than a thousandth, which float32 would round off."""

HEAD = ("final_norm", "lm_head", "sampler", "logits_gather")
"""Names of what only the last pipeline stage does."""

TOGETHER = ("experts", "expert_gather", "expert_scatter", "expert_exchange", "expert_dispatch", "expert_combine")
"""Operators of the tokens of all data-parallel ranks."""


class Work(NamedTuple):
    """One operator, over an array of token counts.

    flops, weight_bytes, activation_bytes: of one call. shape: (m, n, k) of a GEMM; is_linear: whether it is in the
    format of the linear layers, or in 16 bits. load: of routed experts. message_bytes and ranks: of a collective, the
    whole buffer of one call; is_exchange: among the ranks of experts, not of tensors.
    kernels: launches of one call; calls: layers that make it.
    """

    name: str
    kind: str
    calls: float
    kernels: float
    flops: Float[Array, " counts"] | float = 0.0
    weight_bytes: Float[Array, " counts"] | float = 0.0
    activation_bytes: Float[Array, " counts"] | float = 0.0
    message_bytes: Float[Array, " counts"] | float = 0.0
    ranks: int = 1
    shape: tuple | None = None
    is_linear: bool = True
    load: ExpertLoad | None = None
    is_exchange: bool = False


def sends_tokens(plan: Plan) -> bool:
    """Whether each token is sent to the ranks of its experts, and only there (`Plan.sends_tokens`)."""
    return plan.sends_tokens


def distinct_experts(model: ModelSpec, tokens: Float[Array, " counts"], mode: str = EXPECTED,
                     skew: Float[Array, ""] | float = 0.0) -> Float[Array, " counts"]:
    """Experts that `tokens` tokens touch in one layer, when expected: with popularities of coefficient of variation v,

        E (1 - (1 + m x)^(-1/v^2)),  x = (1 - k/E)^(-v^2) - 1;    E (1 - (1 - k/E)^m) for v = 0

    Source: independent top-k routing; gamma-distributed popularities (the zero term of a negative binomial law), of a
    mean that makes one token touch k.
    """
    tokens = jnp.asarray(tokens, float)
    share = model.experts_per_token / model.experts
    if mode == TOPK:
        return jnp.full_like(tokens, model.experts_per_token)
    if mode == ALL or share == 1:
        return jnp.full_like(tokens, model.experts)
    each = -jnp.log1p(-share)
    square = jnp.square(jnp.maximum(jnp.asarray(skew, float), SMALLEST_SKEW))
    untouched = jnp.where(jnp.asarray(skew) < SMALLEST_SKEW, tokens * each,
                          jnp.log1p(tokens * jnp.expm1(each * square)) / square)
    return -model.experts * jnp.expm1(-untouched)


def _gemm(name, calls, m, rows, columns, weight_bytes, activation_bytes, is_linear=True):
    # Bytes of a matrix do not fit 32-bit integers.
    return Work(name, GEMM, calls, 1, flops=2.0 * rows * columns * m, weight_bytes=1.0 * rows * columns * weight_bytes,
                activation_bytes=m * (rows + columns) * activation_bytes, shape=(m, columns, rows), is_linear=is_linear)


def _ffn(name, calls, m, hidden, inner, gated, weight_bytes, activation_bytes):
    up = (2 if gated else 1) * inner
    return [_gemm(name + "_up", calls, m, hidden, up, weight_bytes, activation_bytes),
            _gemm(name + "_down", calls, m, inner, hidden, weight_bytes, activation_bytes)]


def _attention_projections(model: ModelSpec, plan: Plan, fmt: WeightFormat, m) -> list[Work]:
    d, calls, w, a = model.hidden, model.layers, fmt.linear_bytes, fmt.activation_bytes
    rank = model.rank_shape(plan.tensor_parallel_size)
    if not model.is_mla:
        qkv = (rank.heads + 2 * rank.kv_heads) * model.head_dim
        return [_gemm("qkv", calls, m, d, qkv, w, a),
                _gemm("attention_output", calls, m, rank.heads * model.head_dim, d, w, a)]
    qk = model.qk_nope_head_dim + model.qk_rope_head_dim
    latent = model.kv_lora_rank + model.qk_rope_head_dim
    work = [_gemm("latent_down", calls, m, d, model.q_lora_rank + latent, w, a)]
    source = model.q_lora_rank or d
    work.append(_gemm("query_up", calls, m, source, rank.heads * qk, w, a))
    # Absorbed in decode, expanded in prefill: the same matrices and the same FLOP for a new token.
    work.append(_gemm("latent_up", calls, m, model.kv_lora_rank,
                      rank.heads * (model.qk_nope_head_dim + model.v_head_dim), w, a))
    work.append(_gemm("attention_output", calls, m, rank.heads * model.v_head_dim, d, w, a))
    return work


def _expert_work(model: ModelSpec, plan: Plan, fmt: WeightFormat, m, mode: str, skew, routing: Routing = "balanced",
                 placed=None) -> list[Work]:
    d, calls, a = model.hidden, model.num_moe_layers, fmt.activation_bytes
    rank, ranks = plan.expert_shape(model), plan.ranks_of_tokens(model)
    matrices = 3 if model.gated else 2
    together = m * ranks
    # A copy of an expert is read like another one.
    places = model if not plan.num_redundant_experts else msgspec.structs.replace(
        model, experts=model.experts + plan.num_redundant_experts, expert_groups=0, groups_per_token=0)
    spread = skew if placed is None else placed[1]
    distinct = distinct_experts(places, together, mode, spread) / plan.expert_ranks
    pairs = together * model.experts_per_token / plan.expert_ranks
    if plan.expert_ranks > 1:
        pairs = busiest_pairs(pairs, plan.expert_ranks, load=routing, local_experts=rank.num_experts, skew=skew,
                              share=None if placed is None else placed[0])
        pairs = jnp.minimum(pairs, together * min(model.experts_per_token, rank.num_experts))
    row_tokens = pairs / model.experts_per_token if sends_tokens(plan) else None
    one = 2.0 * matrices * d * rank.moe_ffn
    weights = 1.0 * matrices * d * rank.moe_ffn * fmt.expert_bytes * distinct
    load = ExpertLoad(together, pairs, {rows: expected_blocks(pairs, distinct, rows) for rows in EXPERT_ROWS}, weights,
                      model.experts_per_token, rank.num_experts, d, rank.moe_ffn, model.gated, a, row_tokens)
    tp = plan.tensor_parallel_size
    # Where tokens are sent, tensor-parallel ranks have a share of them each, and all of the shared experts.
    own, cuts = (jnp.ceil(m / tp), 1) if sends_tokens(plan) else (m, tp)
    work = [_gemm("router", calls, own, d, model.experts, fmt.other_bytes, a, is_linear=False),
            Work("experts", EXPERTS, calls, EXPERT_KERNELS, flops=one * pairs, weight_bytes=weights,
                 activation_bytes=pairs * (2 * d + matrices * rank.moe_ffn) * a, load=load)]
    if model.shared_experts:
        inner = model.shared_experts * model.moe_ffn // cuts
        work += _ffn("shared_expert", calls, own, d, inner, model.gated, fmt.linear_bytes, a)
    if ranks > 1:
        if sends_tokens(plan) and plan.deep_ep:
            sent, group = m * d / plan.tensor_parallel_size, plan.expert_ranks
            dispatched = DISPATCH_BYTES if fmt.compute in ("fp8", "int8", "fp4") else a
            # Tokens, not copies of them: the kernels know how many each has.
            work += [Work("expert_dispatch", DEEP_EP, calls, 1, message_bytes=sent * dispatched, ranks=group,
                          is_exchange=True),
                     Work("expert_combine", DEEP_EP, calls, 1, message_bytes=sent * a, ranks=group, is_exchange=True)]
        elif sends_tokens(plan):
            message = m * model.experts_per_token * d * a / plan.tensor_parallel_size
            # Dispatch and combine.
            work.append(Work("expert_exchange", ALL_TO_ALL, 2 * calls, 1, message_bytes=message,
                             ranks=plan.expert_ranks, is_exchange=True))
        else:
            # vLLM's default backend, for experts that are cut the only one: every rank gets all tokens, hidden states
            # and router logits, and sums come back.
            work += [Work("expert_gather", ALL_GATHER, calls, 1, message_bytes=m * ranks * (d + model.experts) * a,
                          ranks=ranks, is_exchange=True),
                     Work("expert_scatter", REDUCE_SCATTER, calls, 1, message_bytes=m * ranks * d * a, ranks=ranks,
                          is_exchange=True)]
    return work


def token_work(model: ModelSpec, plan: Plan, fmt: WeightFormat, tokens: Float[Array, " counts"],
               distinct: str = EXPECTED, skew: Float[Array, ""] | float = 0.0, routing: Routing = "balanced",
               placed: tuple[Float[Array, ""], Float[Array, ""]] | None = None) -> list[Work]:
    """Everything of an iteration that depends only on its number of tokens, attention itself excepted.

    distinct, skew: as `distinct_experts` takes them. routing: load of the busiest rank (`busiest_pairs`); placed: where
    a load balancer has placed experts, the busiest rank's share and the spread of their copies (`balanced_share`).
    """
    m, d, a, tp = tokens, model.hidden, fmt.activation_bytes, plan.tensor_parallel_size
    rank = model.rank_shape(tp)
    work = [Work("embedding", ELEMENTWISE, 1, 1, activation_bytes=2 * m * d * a / tp)]
    work += _attention_projections(model, plan, fmt, m)
    cached = model.layer_kv_bytes_per_token(a, tp)
    rotary = rank.heads * model.head_dim * a
    work.append(Work("rotary_and_cache_write", ELEMENTWISE, model.layers, 2,
                     activation_bytes=m * (rotary + 2 * cached)))
    normed = tp if plan.enable_sequence_parallelism else 1
    work.append(Work("norms", ELEMENTWISE, model.layers, 2, activation_bytes=4 * m * d * a / normed))
    if model.num_dense_layers:
        work += _ffn("ffn", model.num_dense_layers, m, d, rank.ffn, model.gated, fmt.linear_bytes, a)
        work.append(Work("ffn_activation", ELEMENTWISE, model.num_dense_layers, 1,
                         activation_bytes=m * (3 if model.gated else 2) * rank.ffn * a))
    if model.num_moe_layers:
        work += _expert_work(model, plan, fmt, m, distinct, skew, routing, placed)
    if tp > 1:
        # One for the embedding, two a layer; where tokens are sent to their experts, their sums are made on the
        # way back.
        exchanged = model.num_moe_layers if sends_tokens(plan) else 0
        reduced = 2 * model.layers + 1 - exchanged
        if plan.enable_sequence_parallelism:
            # Of tokens that are padded to a multiple of the ranks; norms lie between.
            padded = jnp.ceil(m / tp) * tp * d * a
            work += [Work("sequence_scatter", REDUCE_SCATTER, reduced, 1, message_bytes=padded, ranks=tp),
                     Work("sequence_gather", ALL_GATHER, reduced, 1, message_bytes=padded, ranks=tp)]
        else:
            work.append(Work("all_reduce", ALL_REDUCE, reduced, 1, message_bytes=m * d * a, ranks=tp))
            if exchanged:
                # Each has its share of them back from the experts; attention takes all.
                work.append(Work("expert_output_gather", ALL_GATHER, exchanged, 1,
                                 message_bytes=jnp.ceil(m / tp) * tp * d * a, ranks=tp))
    if plan.pipeline_parallel_size > 1:
        # Hidden state and residual.
        work.append(Work("stage_hop", HOP, plan.pipeline_parallel_size - 1, 1, message_bytes=2 * m * d * a,
                         ranks=2))
    return work


def head_work(model: ModelSpec, plan: Plan, fmt: WeightFormat, sampled: Float[Array, " counts"]
              ) -> list[Work]:
    """LM head and sampler over the sampled sequences (at least one: engines sample a discarded row)."""
    n, tp, a = jnp.maximum(sampled, 1.0), plan.tensor_parallel_size, fmt.activation_bytes
    work = [Work("final_norm", ELEMENTWISE, 1, 1, activation_bytes=2 * n * model.hidden * a),
            _gemm("lm_head", 1, n, model.hidden, model.vocab / tp, fmt.other_bytes, a, is_linear=False),
            Work("sampler", ELEMENTWISE, 1, SAMPLER_KERNELS, activation_bytes=n * model.vocab * LOGIT_BYTES)]
    if tp > 1:
        work.append(Work("logits_gather", ALL_GATHER, 1, 1, message_bytes=n * model.vocab * LOGITS_MESSAGE_BYTES,
                         ranks=tp))
    return work


class AttentionWork(NamedTuple):
    """Amounts of attention in one layer of one rank.

    decode_bytes, decode_flops: for each context token a decode reads. pair_flops: for each unit of
        prefill_pairs (twice the causal pairs).
    chunk_bytes, chunk_flops: for each KV token a prompt chunk reads from the cache.
    token_flops: for each token of a chunk, the diagonal of the causal triangle.
    full_layers, window_layers: how many layers see everything, or only the window.
    """

    decode_bytes: float
    decode_flops: float
    pair_flops: float
    chunk_bytes: float
    chunk_flops: float
    token_flops: float
    full_layers: int
    window_layers: int


def attention_work(model: ModelSpec, plan: Plan, kv_bytes: float) -> AttentionWork:
    """Per-token amounts of attention.

    GQA: decode 4 H dh FLOP and 2 K dh b bytes a context token; prefill 2 H dh FLOP a unit of prefill_pairs.
    MLA, absorbed decode: H (4 d_c + 2 d_r) FLOP over (d_c + d_r) b bytes; prefill H (d_nope + d_r + d_v) a
    unit, and 2 d_c H (d_nope + d_v) to expand each cached token again (a chunk's own are expanded by `latent_up`).
    """
    rank = model.rank_shape(plan.tensor_parallel_size)
    cached = model.layer_kv_bytes_per_token(kv_bytes, plan.tensor_parallel_size)
    layers = (model.layers - model.window_layers, model.window_layers)
    # Ranks that share a cache by tokens read a part of it each, for the heads of all of them.
    shards = plan.decode_context_parallel_size
    if model.is_mla:
        nope, rope, v, latent = (model.qk_nope_head_dim, model.qk_rope_head_dim, model.v_head_dim,
                                 model.kv_lora_rank)
        pair = rank.heads * (nope + rope + v)
        return AttentionWork(cached / shards, rank.heads * (4 * latent + 2 * rope), pair, cached,
                             2 * latent * rank.heads * (nope + v), pair, *layers)
    pair = 2 * rank.heads * model.head_dim
    return AttentionWork(cached / shards, 2 * pair, pair, cached, 0, pair, *layers)


def attention_shape(model: ModelSpec, plan: Plan, fmt: WeightFormat, kv_bytes: float, *, windowed: bool = False
                    ) -> AttentionShape | LatentShape:
    """Attention of one layer on one rank, of a windowed layer or of a full one."""
    rank = model.rank_shape(plan.tensor_parallel_size)
    if model.is_mla:
        return LatentShape(rank.heads, model.kv_lora_rank, model.qk_rope_head_dim, model.qk_nope_head_dim,
                           model.v_head_dim, kv_bytes, fmt.linear_bytes < 2, model.hidden)
    return AttentionShape(rank.heads, rank.kv_heads, model.head_dim, kv_bytes, model.sliding_window if windowed else 0)
