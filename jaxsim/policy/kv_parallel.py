"""KV-cache parallelism: the KV of a long context is cut over groups of devices, each with a copy of the model."""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class KvParallel(eqx.Module):
    """Groups that hold the KV of a rank together, and what putting partial outputs together takes.

    groups: of devices, each of which could run the model alone; tokens: of a context that a group takes before the next
    one does; once all groups have as many, what follows is spread evenly. Of a context of n tokens the busiest group
    has

        shard(n) = min(n, max(tokens, n / groups))

    merge_s, token_merge_s: of an iteration that has tokens of contexts in several groups, and of each of these tokens:
    queries on their way to the groups, and partial outputs back.

    Source: Mnemosyne and Medha (arXiv 2409.17264), KV-cache parallelism: queries are replicated, KV is cut by tokens,
    groups are added as the context grows.
    """

    groups: Int[Array, ""]
    tokens: Int[Array, ""]
    merge_s: Float[Array, ""]
    token_merge_s: Float[Array, ""]

    def shard(self, context: Int[Array, "*shape"]) -> Int[Array, "*shape"]:
        """Tokens of a context on the busiest group; a part of one counts as whole."""
        even = (context + self.groups - 1) // self.groups
        return jnp.minimum(context, jnp.maximum(self.tokens, even))

    def pairs(self, start: Int[Array, "*shape"], end: Int[Array, "*shape"]) -> Float[Array, "*shape"]:
        """Of a chunk, `prefill_pairs` of `BatchStats` on the busiest group: the integral of 2 shard(n) from its first
        token to its last."""
        whole = self.tokens * self.groups

        def squared(low: Array, high: Array) -> Float[Array, "*shape"]:
            low, high = low.astype(jnp.float32), high.astype(jnp.float32)
            return (high - low) * (high + low)

        alone = squared(jnp.minimum(start, self.tokens), jnp.minimum(end, self.tokens))
        filling = (jnp.clip(end, self.tokens, whole) - jnp.clip(start, self.tokens, whole)).astype(jnp.float32)
        spread = squared(jnp.maximum(start, whole), jnp.maximum(end, whole))
        return alone + 2.0 * self.tokens * filling + spread / self.groups

    def merge_seconds(self, tokens: Int[Array, "*shape"]) -> Float[Array, "*shape"]:
        """Of an iteration with so many tokens of contexts that several groups hold."""
        return jnp.where(tokens > 0, self.merge_s + self.token_merge_s * tokens, 0.0)
