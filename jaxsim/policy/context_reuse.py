"""Contexts whose KV a sibling has computed, a fine-tune of the same base: how long an iteration takes with one.

Of n tokens with KV of a sibling, k of L layers are recomputed and the KV of the others is loaded; the recomputation
needs the hidden states before the first of these layers (the E cache).

    recompute  R = k / L P(n)               P: an iteration of these tokens alone
    serial     compute + E / B + V / B + R  E: bytes of the hidden states, none for k = 0; V: of the KV loaded
    pipelined  compute + E / B + max(R, V / B)

An instance of the receiver's own variant gives all of the KV, with nothing to recompute.

Source: DroidSpeak (arXiv 2411.02820), section 4. The same algebra as `jaxsim.analytic.context_reuse`, there of one
context on an idle engine.
"""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxsim.kernels import clock
from jaxsim.kernels.clock import Time


class ContextReuse(eqx.Module):
    """What a receiver does with siblings' contexts.

    recomputed_share: of the layers; hidden_s, kv_s: seconds on the link of a block's hidden states, and of its KV in
    the layers that are not recomputed; latency_s: of the link, once for each of both; pipelined: KV comes while layers
    are recomputed. whole_kv_s: of a block's KV in all layers, where siblings are instances of the run.
    """

    recomputed_share: Float[Array, ""]
    hidden_s: Float[Array, ""]
    kv_s: Float[Array, ""]
    latency_s: Float[Array, ""]
    pipelined: Bool[Array, ""]
    whole_kv_s: Float[Array, ""] | None = None

    def lengthened(self, compute: Time, blocks: Int[Array, ""], recompute: Time) -> Time:
        """How long an iteration takes that loads so many blocks, recomputes so long, and takes `compute` besides."""
        entry_s, load_s = self.transfer(blocks, jnp.bool_(False))
        load = Time(load_s, jnp.zeros_like(load_s))
        return clock.add(clock.add(compute, self.together(load, recompute)), entry_s)

    def together(self, load: Time, recompute: Time) -> Time:
        """KV that is loaded, and layers that are recomputed."""
        longer = clock.select(recompute < load, load, recompute)
        return clock.select(self.pipelined, longer, clock.add(load, recompute))

    def transfer(self, blocks: Int[Array, ""], is_same: Bool[Array, ""]) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """Seconds on the link of so many blocks for one request: hidden states, and KV; is_same: of its variant."""
        count, is_any = blocks.astype(jnp.float32), blocks > 0
        entry_s = clock.on_grid(count * self.hidden_s + self.latency_s)
        whole_kv_s = self.kv_s if self.whole_kv_s is None else self.whole_kv_s
        kv_s = clock.on_grid(count * jnp.where(is_same, whole_kv_s, self.kv_s) + self.latency_s)
        return (jnp.where(is_any & ~is_same & (self.recomputed_share > 0), entry_s, 0.0),
                jnp.where(is_any & (is_same | (self.recomputed_share < 1)), kv_s, 0.0))
