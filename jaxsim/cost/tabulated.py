"""A cost model as the loop reads it: small tables over token and sequence counts, affine in the context.

Whatever computes operator times (a roofline, measured profiles) does so once per scenario, before the loop, and
hands over this. Two lanes, joined by max-plus: `serial + max(launch, device)`.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxsim.cost.base import UNBOUNDED, AbstractIterationCost, BatchStats, DecodePace
from jaxsim.kernels import ladder

DECODE_DEVICE, DECODE_LAUNCH, MIXED_LAUNCH, SERIAL = range(4)
"""Columns of `TabulatedCost.by_sequences`."""

DECODE_CONTEXT, DECODE_WINDOW, CHUNK, CHUNK_CONTEXT, CHUNK_PAIRS = range(5)
"""Entries of `TabulatedCost.attention`."""


class TabulatedCost(AbstractIterationCost):
    """Tables over counts, slopes over contexts.

    by_tokens: device seconds of everything that depends only on the tokens of the iteration (projections, FFN,
        MoE, norms, collectives), at `ladder.knots`, for iterations that carry a prompt chunk.
    by_sampled: device seconds of the LM head and sampling, at `ladder.knots` of the sampled sequences.
    by_sequences: for every count of sequences 0..max: device seconds of a decode-only iteration less its
        attention reads (so that captured graphs, padded to their sizes, are exact); host launch seconds of a
        decode-only and of a mixed iteration; host seconds that never overlap the device.
    attention: seconds per decode context token, per decode context token inside the sliding window, per prompt
        chunk, per KV token a chunk reads, and per unit of `prefill_pairs`.
    window: sliding window in tokens, 0 where no layer has one. Sequences are taken at the batch's mean context.
    """

    by_tokens: Float[Array, " token_knots"]
    by_sampled: Float[Array, " sampled_knots"]
    by_sequences: Float[Array, "sequences 4"]
    attention: Float[Array, " 5"]
    window: Int[Array, ""]

    def _windowed(self, num_sequences: Int[Array, ""], context: Int[Array, ""]) -> Int[Array, ""]:
        return jnp.minimum(context, num_sequences * self.window)

    def iteration(self, stats: BatchStats) -> Float[Array, ""]:
        """Seconds of one iteration."""
        row = self.by_sequences[jnp.minimum(stats.num_decode + stats.num_prefill, self.by_sequences.shape[0] - 1)]
        decode_only = stats.num_prefill == 0
        weights = jnp.where(
            decode_only, row[DECODE_DEVICE],
            ladder.look_up(self.by_tokens, stats.prefill_tokens + stats.num_decode)
            + ladder.look_up(self.by_sampled, stats.num_sampled))
        device = (weights + self.attention[DECODE_CONTEXT] * stats.decode_context
                  + self.attention[DECODE_WINDOW] * self._windowed(stats.num_decode, stats.decode_context)
                  + self.attention[CHUNK] * stats.num_prefill
                  + self.attention[CHUNK_CONTEXT] * stats.prefill_context
                  + self.attention[CHUNK_PAIRS] * stats.prefill_pairs)
        return row[SERIAL] + jnp.maximum(jnp.where(decode_only, row[DECODE_LAUNCH], row[MIXED_LAUNCH]), device)

    def decode(self, num_sequences: Int[Array, ""], context: Int[Array, ""]) -> DecodePace:
        """Pace until the device overtakes the host, or the mean context leaves the sliding window."""
        row = self.by_sequences[jnp.minimum(num_sequences, self.by_sequences.shape[0] - 1)]
        count = num_sequences.astype(jnp.float32)
        room = num_sequences * self.window - context
        device = (row[DECODE_DEVICE] + self.attention[DECODE_CONTEXT] * context
                  + self.attention[DECODE_WINDOW] * self._windowed(num_sequences, context))
        growth = count * (self.attention[DECODE_CONTEXT]
                          + jnp.where(room >= num_sequences, self.attention[DECODE_WINDOW], 0.0))
        slack = row[DECODE_LAUNCH] - device
        is_host_bound = slack > 0
        to_device = jnp.where(is_host_bound & (growth > 0), slack / jnp.where(growth > 0, growth, 1.0), UNBOUNDED)
        to_window = jnp.where((room > 0) & (self.attention[DECODE_WINDOW] > 0),
                              room.astype(jnp.float32) / jnp.maximum(count, 1.0), UNBOUNDED)
        horizon = jnp.clip(jnp.minimum(to_device, to_window), 1, UNBOUNDED).astype(jnp.int32)
        return DecodePace(row[SERIAL] + jnp.maximum(row[DECODE_LAUNCH], device),
                          jnp.where(is_host_bound, 0.0, growth), horizon)
