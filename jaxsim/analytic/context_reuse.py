"""A context whose KV a sibling has computed: how soon a fine-tune of the same base can go on from it (DroidSpeak).

A receiver that prefills n tokens in P(n) seconds takes the sibling's KV of all of its L layers but k, recomputes those
k, for which it needs the hidden states of the n tokens before the first of them (the E cache), and goes on with what
the sibling has not seen. With a link of B bytes/s:

    full       P(n)
    recompute  R = k / L P(n) + rest
    serial     (E + V) / B + R                      E: bytes of the hidden states, none for k = 0; V: of the KV loaded
    pipelined  E / B + max(R, V / B)                the hidden states first, KV while the layers are recomputed

Source: DroidSpeak (arXiv 2411.02820), section 4: groups of contiguous layers, so that there is one entry, and transfers
behind recomputation. Approximated: layers are alike; P(n) is of the receiver alone; which layers matter is the user's.
"""

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxsim._core.errors import InputError
from jaxsim.cost.base import AbstractIterationCost, BatchStats
from jaxsim.spec.model import ModelSpec


class ContextReuse(eqx.Module):
    """One context on an idle receiver, and the link its KV comes over; every number is traced.

    prefill_s: of the context, all layers; suffix_s: of the tokens behind it, up to the first token of the answer;
    rest_s: what is computed for the context whatever is reused. num_layers of the model; kv_bytes of the context in
    all of them, hidden_bytes of it before one; bytes_per_s and latency_s of the link, its latency once a transfer.
    """

    prefill_s: Float[Array, ""]
    suffix_s: Float[Array, ""]
    rest_s: Float[Array, ""]
    num_layers: Float[Array, ""]
    kv_bytes: Float[Array, ""]
    hidden_bytes: Float[Array, ""]
    bytes_per_s: Float[Array, ""]
    latency_s: Float[Array, ""]

    def full_s(self) -> Float[Array, ""]:
        """Time to the first token without reuse."""
        return self.prefill_s + self.suffix_s

    def recompute_s(self, recomputed: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """Seconds of `recomputed` layers of the context."""
        return recomputed / self.num_layers * self.prefill_s + self.rest_s

    def load_bytes(self, recomputed: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """KV of the layers that are not recomputed."""
        return (1 - recomputed / self.num_layers) * self.kv_bytes

    def entry_s(self, recomputed: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """Until the hidden states are here; without recomputed layers none are needed."""
        return jnp.where(recomputed > 0, self.hidden_bytes / self.bytes_per_s + self.latency_s, 0.0)

    def load_s(self, recomputed: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """Seconds of the KV on the link; without layers to load none."""
        loaded = self.load_bytes(recomputed)
        return jnp.where(loaded > 0, loaded / self.bytes_per_s + self.latency_s, 0.0)

    def serial_s(self, recomputed: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """Time to the first token where layers are recomputed when everything is here."""
        return self.entry_s(recomputed) + self.load_s(recomputed) + self.recompute_s(recomputed) + self.suffix_s

    def pipelined_s(self, recomputed: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """Time to the first token where KV is loaded while layers are recomputed."""
        overlapped = jnp.maximum(self.recompute_s(recomputed), self.load_s(recomputed))
        return self.entry_s(recomputed) + overlapped + self.suffix_s

    def speedup(self, recomputed: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """Time to the first token without reuse over that with it, pipelined."""
        return self.full_s() / self.pipelined_s(recomputed)

    def bound(self, recomputed: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """What the speed-up of the context alone cannot exceed, without suffix, rest and hidden states: the layers
        recomputed, or the link."""
        computed = self.num_layers / jnp.maximum(recomputed, 1e-30)
        linked = self.prefill_s * self.bytes_per_s / jnp.maximum(self.load_bytes(recomputed), 1e-30)
        return jnp.minimum(computed, linked)


def prefill_seconds(cost: AbstractIterationCost, tokens: int, history: int, max_tokens: int) -> Float[Array, ""]:
    """Iterations of one prompt alone, in chunks of at most `max_tokens`, behind `history` tokens."""
    total, done = jnp.float32(0), history
    while done < history + tokens:
        chunk = min(max_tokens, history + tokens - done)
        pairs = float((done + chunk) ** 2 - done**2)
        is_last = done + chunk == history + tokens
        total = total + cost.iteration(BatchStats.of(
            num_prefill=1, prefill_tokens=chunk, prefill_context=done + chunk, prefill_pairs=pairs,
            num_sampled=int(is_last)))
        done += chunk
    return total


def context_reuse(model: ModelSpec, cost: AbstractIterationCost, *, context_tokens: int, suffix_tokens: int,
                  max_num_batched_tokens: int, bytes_per_s: float, latency_s: float = 0.0, rest_s: float = 0.0,
                  kv_bytes: float = 2.0, hidden_bytes: float = 2.0) -> ContextReuse:
    """Of a context and the tokens behind it, priced by the cost model of the event engine.

    kv_bytes, hidden_bytes: of one number. Raises `InputError`.
    """
    for name, value, least in (("context_tokens", context_tokens, 1), ("suffix_tokens", suffix_tokens, 1),
                               ("max_num_batched_tokens", max_num_batched_tokens, 1)):
        if value < least:
            raise InputError(name, value, "is not a number of tokens", f"give {least} or more")
    if not (bytes_per_s > 0 and np.isfinite(bytes_per_s)):
        raise InputError("bytes_per_s", bytes_per_s, "is no rate of a link", "give a positive number")
    numbers = (
        prefill_seconds(cost, context_tokens, 0, max_num_batched_tokens),
        prefill_seconds(cost, suffix_tokens, context_tokens, max_num_batched_tokens), rest_s, model.layers,
        context_tokens * model.kv_bytes_per_token(kv_bytes), context_tokens * model.hidden * hidden_bytes, bytes_per_s,
        latency_s)
    return ContextReuse(*(jnp.asarray(x, jnp.float32) for x in numbers))
