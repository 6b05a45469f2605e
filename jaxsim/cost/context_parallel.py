"""Contexts cut over ranks: prompts in a ring (prefill context parallelism), KV caches by tokens (decode context
parallelism).

    Ring       C ranks hold 1/C of a chunk's tokens each. Block by block the keys of these pass round: a rank attends to
               one and sends it on meanwhile.
               tokens of a rank    2 ceil(n / 2C)        causal pairs of a rank    pairs / C
               attention           a + (C - 1) max(latency + n bytes / (C link eta) - a / C, 0) a layer
    KvShards   D ranks that would hold the same KV heads hold 1/D of the tokens each. In decode they gather the queries
               of all their heads, attend to their own tokens, and scatter the sums back, with the weights of each.
               a layer    gather(queries) + gather(log-sum-exps) + scatter(outputs);  context / D, heads x D

Ranks take one part from the front of a chunk and one from the back (zig-zag), so that all have as many causal pairs:
exactly, where 2C divides the chunk, to which it is padded. Everything else of a chunk (projections, FFN, norms) is done
for a rank's own tokens; decodes are computed by every context rank alike, each of which keeps all of the KV cache.

Source: ring attention (arXiv 2310.01889), zig-zag as in Llama 3 (arXiv 2407.21783); vLLM,
docs/serving/context_parallel_deployment.md, for decode context parallelism, its bound tensor ranks / KV heads and the
replicated cache of prefill context parallelism (vLLM-Ascend cuts that too, which is not simulated). Approximated: all
chunks of an iteration are cut as one, so that only the whole is padded; attention to what all ranks have in their
caches, of which nothing is sent, is spread evenly over the blocks and hides their messages too; with KvShards, what
chunks read of the cache is gathered at the speed of the link, without latency.
"""

from dataclasses import replace

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxsim.cost.base import BatchStats
from jaxsim.cost.collectives import Nccl
from jaxsim.cost.two_level import TwoLevel
from jaxsim.spec.model import ModelSpec

LSE_BYTES = 4
"""Of the log-sum-exp of a head, in float32."""


def merged_numbers(model: ModelSpec) -> tuple[int, int]:
    """Of a head and a token, numbers of the query that goes to the holders of a cache, and of the partial output that
    comes back. MLA attends absorbed: to latents, of which its outputs are sums."""
    if model.is_mla:
        return model.kv_lora_rank + model.qk_rope_head_dim, model.kv_lora_rank
    return model.head_dim, model.head_dim


class Ring(eqx.Module):
    """Ring attention over prompt chunks, all layers.

    ranks: context-parallel ones; layers; latency_s: of passing a block on; key_s: seconds of the keys of one token on
    the link, a layer; floor_s: of a call of attention, all layers, which every block costs.
    """

    ranks: Int[Array, ""]
    layers: Float[Array, ""]
    latency_s: Float[Array, ""]
    key_s: Float[Array, ""]
    floor_s: Float[Array, ""]

    @classmethod
    def of(cls, ranks: int, layers: int, latency_s: float, key_s: float, floor_s: float) -> "Ring":
        """Leaves from numbers."""
        return cls(jnp.asarray(ranks, jnp.int32), *(jnp.asarray(x, float) for x in (layers, latency_s, key_s, floor_s)))

    def of_rank(self, stats: BatchStats) -> BatchStats:
        """What a rank computes of an iteration: its share of the chunks, as if these were alike, and all decodes."""
        tokens = 2 * ((stats.prefill_tokens + 2 * self.ranks - 1) // (2 * self.ranks))
        tokens = jnp.where(self.ranks == 1, stats.prefill_tokens, tokens)
        return replace(stats, prefill_tokens=tokens, prefill_pairs=stats.prefill_pairs / self.ranks,
                       prefill_tiled=None, prefill_longest=None)

    def more_seconds(self, attention_s: Float[Array, ""], tokens: Int[Array, ""]) -> Float[Array, ""]:
        """What the ring adds to a rank's attention of `attention_s` to chunks of so many tokens on all ranks together:
        theirs alone go round, those before them are in the cache of every rank."""
        ranks = self.ranks.astype(attention_s.dtype)
        send_s = self.layers * (self.latency_s + tokens / ranks * self.key_s)
        return (ranks - 1) * (jnp.maximum(send_s - attention_s / ranks, 0.0) + self.floor_s)


class KvShards(eqx.Module):
    """Ranks that share KV heads and hold different tokens; gather, scatter: among them; ranks: how many."""

    gather: Nccl | TwoLevel
    scatter: Nccl | TwoLevel
    bytes_per_s: Float[Array, ""]
    ranks: int = eqx.field(static=True)

    def decode_seconds(self, sequences: Float[Array, "*shape"], heads: int, query: int, value: int,
                       number_bytes: float) -> Float[Array, "*shape"]:
        """Seconds of messages in one layer. heads: of all these ranks; query, value: numbers of each."""
        rows = sequences * heads
        return (self.gather.seconds(self.ranks, rows * query * number_bytes, self.bytes_per_s)
                + self.gather.seconds(self.ranks, self.ranks * rows * LSE_BYTES, self.bytes_per_s)
                + self.scatter.seconds(self.ranks, rows * value * number_bytes, self.bytes_per_s))

    def key_seconds(self, key_bytes: float) -> Float[Array, ""]:
        """Of the cached numbers of one token that are gathered for a chunk, in one layer."""
        return (self.ranks - 1) / self.ranks * key_bytes / (self.bytes_per_s * self.gather.efficiency)
