"""One very long prompt, chunk by chunk: adaptive chunks, chunks in a pipeline, KV spread over groups of GPUs.

    iteration   g0 + b c + a c (kv + c / 2) / p + rest + merge [p > 1]
                c new tokens behind kv tokens, over p groups that each hold a part of the KV (KV parallelism)
    chunk       the c for which that is the budget: with a' = a / p
                [sqrt((b + a' kv)^2 + 2 a' (budget - g0 - rest - merge)) - (b + a' kv)] / a'
    prefill     t_1 + t_2 + ...                                     one chunk after the other through all stages
    pipelined   (t_1 + t_2 + ...) / S + (S - 1) max t / S + S hop   chunk i + 1 enters stage 1 as chunk i leaves it
    decode      g0 + weights + kv k / p + merge [p > 1]

Source: Mnemosyne (arXiv 2409.17264): adaptive chunking, sequence pipeline parallelism, KV-cache parallelism. Attention
is causal here; the paper counts all pairs in its FLOP, twice as many (`prefill_flops`). Its pipeline ends with the last
chunk, (S - 1) t_n / S, which is the same while chunks become no shorter; the maximum is exact for any.

Approximated: chunks take what FLOP and bytes take at given shares of the peaks; the event engine has operators.
"""

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxsim._core.errors import InputError
from jaxsim.spec.model import ModelSpec

Scalar = Float[Array, "*shape"] | float


class LongContext(eqx.Module):
    """Coefficients of an instance; every number is traced.

    fixed_s: of any iteration; token_s: a new token of a prompt; pair_s: a query and a token that it attends to;
    weights_s: reading the active weights once, which a decode does; read_s: reading the KV of a token; merge_s: of
    partial outputs where groups share the KV; hop_s: between stages.
    """

    fixed_s: Scalar
    token_s: Scalar
    pair_s: Scalar
    weights_s: Scalar
    read_s: Scalar
    merge_s: Scalar = 0.0
    hop_s: Scalar = 0.0

    def _merged_s(self, groups: Scalar) -> Scalar:
        return jnp.where(jnp.asarray(groups) > 1, self.merge_s, 0.0)

    def iteration_s(self, chunk: Scalar, history: Scalar, groups: Scalar = 1, rest_s: Scalar = 0.0) -> Scalar:
        """Seconds of a chunk of so many tokens behind `history` ones; rest_s: of what else is in the batch."""
        pairs = chunk * (history + chunk / 2)
        return self.fixed_s + self.token_s * chunk + self.pair_s * pairs / groups + rest_s + self._merged_s(groups)

    def chunk(self, budget_s: Scalar, history: Scalar, groups: Scalar = 1, rest_s: Scalar = 0.0) -> Scalar:
        """Tokens of the chunk that takes just the budget; 0 where not even an empty one fits. Not rounded."""
        left = jnp.maximum(budget_s - self.fixed_s - rest_s - self._merged_s(groups), 0.0)
        pair_s = self.pair_s / groups
        linear = self.token_s + pair_s * history
        # The root in the form that loses no digits while history is long and the chunk short.
        return 2 * left / (linear + jnp.sqrt(linear**2 + 2 * pair_s * left))

    def decode_s(self, history: Scalar, groups: Scalar = 1) -> Scalar:
        """Seconds of a decode of one sequence with so long a context."""
        return self.fixed_s + self.weights_s + self.read_s * history / groups + self._merged_s(groups)

    def chunk_seconds(self, chunks: Float[np.ndarray, " chunks"], groups: Scalar = 1) -> Float[Array, " chunks"]:
        """Of the chunks of one prompt, one after the other."""
        chunks = np.asarray(chunks, float)
        return self.iteration_s(chunks, np.cumsum(chunks) - chunks, groups)

    def prefill_s(self, chunks: Float[np.ndarray, " chunks"], groups: Scalar = 1) -> Scalar:
        """Of a prompt, a chunk through all stages before the next."""
        return jnp.sum(self.chunk_seconds(chunks, groups))

    def pipelined_s(self, chunks: Float[np.ndarray, " chunks"], stages: int, groups: Scalar = 1) -> Scalar:
        """Of a prompt whose chunks follow each other through so many stages, each an equal part of every chunk."""
        seconds = self.chunk_seconds(chunks, groups)
        return (jnp.sum(seconds) + (stages - 1) * jnp.max(seconds)) / stages + stages * self.hop_s


def fixed_chunks(tokens: int, chunk: int) -> Float[np.ndarray, " chunks"]:
    """Chunks of one size, the last one what is left."""
    count = -(-tokens // chunk)
    chunks = np.full(count, float(chunk))
    chunks[-1] = tokens - chunk * (count - 1)
    return chunks


def adaptive_chunks(tokens: int, cost: LongContext, budget_s: float, *, least: int = 1, most: int = 1 << 30,
                    groups: int = 1) -> Float[np.ndarray, " chunks"]:
    """Whole chunks of a prompt that each fit the budget, large ones first; at least `least` tokens, whatever it takes.

    Raises `InputError` where a chunk would have less than one token.
    """
    if least < 1:
        raise InputError("least", least, "is a chunk without tokens", "give 1 or more")
    fixed, token, pair = (float(x) for x in (cost.fixed_s + cost._merged_s(groups), cost.token_s,
                                             cost.pair_s / groups))
    left = budget_s - fixed
    if left <= 0:
        raise InputError("budget_s", budget_s, f"is less than the {fixed:.4g} s of an empty iteration",
                         "give more than that")
    chunks, done = [], 0
    while done < tokens:
        linear = token + pair * done
        # As `LongContext.chunk`, in plain numbers: a prompt of ten million tokens has some forty thousand chunks.
        size = int(2 * left / (linear + (linear**2 + 2 * pair * left) ** 0.5))
        size = min(max(size, least), most, tokens - done)
        chunks.append(size)
        done += size
    return np.asarray(chunks, float)


def saturating_chunk(peak_flops: float, memory_bytes_per_s: float, queries_per_kv_head: int, kv_bytes: float = 2.0
                     ) -> float:
    """Tokens of a chunk from which reading KV takes less time than attending to it, however long the context is."""
    return peak_flops / memory_bytes_per_s * kv_bytes / 2 / queries_per_kv_head


def prefill_flops(model: ModelSpec, tokens: float, *, causal: bool = True) -> float:
    """FLOP of a prompt: weights of all its tokens, and its pairs (all of them unless causal)."""
    pairs = tokens**2 / (2 if causal else 1)
    return 2 * model.num_active_parameters * tokens + 4 * model.layers * model.heads * model.head_dim * pairs


def long_context(model: ModelSpec, *, peak_flops: float, memory_bytes_per_s: float, gpus: int,
                 compute_efficiency: float = 1.0, memory_efficiency: float = 1.0, fixed_s: float = 0.0,
                 merge_s: float = 0.0, hop_s: float = 0.0, weight_bytes: float = 2.0, kv_bytes: float = 2.0
                 ) -> LongContext:
    """Of a model over so many GPUs that split every operator, by peaks and what is reached of them; per GPU."""
    flops = gpus * peak_flops * compute_efficiency
    memory = gpus * memory_bytes_per_s * memory_efficiency
    return LongContext(
        fixed_s, 2 * model.num_active_parameters / flops, 4 * model.layers * model.heads * model.head_dim / flops,
        weight_bytes * model.num_active_parameters / memory, model.kv_bytes_per_token(kv_bytes) / memory, merge_s,
        hop_s)
