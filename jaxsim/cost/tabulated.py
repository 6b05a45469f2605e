"""A cost model as the loop reads it: small tables over token and sequence counts, affine in the decode context.

Whatever computes operator times does so once per scenario, before the loop, and hands over this. Two lanes, joined by
max-plus: `serial + max(launch, device)`.
"""

import abc

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxsim.cost.attention import APART, TILE_TOKENS, Tail, chunk_seconds
from jaxsim.cost.base import UNBOUNDED, AbstractIterationCost, BatchStats, DecodePace
from jaxsim.cost.context_parallel import Ring
from jaxsim.kernels import octaves

DECODE_DEVICE, DECODE_LAUNCH, MIXED_LAUNCH, SERIAL, BESIDE, CONTEXT, WINDOW, SHARED = range(8)
"""Columns of `TabulatedCost.by_sequences`; the first four are those of any tables."""

FULL_LAYERS, WINDOW_LAYERS = range(2)
"""Rows of `TabulatedCost.attention`."""

TOKENS, SAMPLED = (0, 6), (0, 4)
"""Grids of counts (`octaves`): every one up to 128 (32), then 64 (16) knots an octave, which resolve tiles of 128 rows
up to 8,192 tokens."""


class Together(eqx.Module):
    """Seconds of what the ranks of an executor do with the tokens of all: experts, and the exchange around them.

    by_sequences: of decodes only, for every count of the fullest rank, to whose captured graph the others are padded.
    experts, exchange: where some have prompt chunks, on the grid `TOKENS`, by tokens on every rank.
    captured: up to so many tokens on the fullest rank pieces are captured, and all are padded to it. Beyond, experts
    have the tokens there are, and the exchange lasts until the emptiest rank has received those of all others.

    Source: vllm-project/vllm 0.19, `coordinate_batch_across_dp` (vllm/v1/worker/dp_utils.py): ranks are padded to the
    fullest where all run captured, and one that does not keeps all others from it; `all_gatherv`, `reduce_scatterv`
    (vllm/distributed/device_communicators/pynccl.py): a broadcast or reduction for each rank, of its own size.
    Approximated: of more than two ranks those that are not the fullest have as many tokens each, and an all-to-all is
    bound by what is received too.
    """

    by_sequences: Float[Array, " sequences"]
    experts: Float[Array, " token_knots"]
    exchange: Float[Array, " token_knots"]
    captured: Int[Array, ""]
    num_ranks: int = eqx.field(static=True)

    def seconds(self, is_decode: Bool[Array, ""], tokens: Int[Array, ""], most: Int[Array, ""],
                num_ranks: Int[Array, ""] | None = None) -> Float[Array, ""]:
        """Arguments as of `AbstractIterationCost.together_seconds`; num_ranks: where it is traced."""
        ranks = self.num_ranks if num_ranks is None else num_ranks
        others = ranks - 1 if num_ranks is None else jnp.maximum(num_ranks - 1, 1)
        is_padded = most <= self.captured
        mean = (tokens + others) // ranks
        # Even ranks on which each receives as much as the emptiest: (tokens - (tokens - most) / others) / others.
        even = (tokens * (others - 1) + most + others**2 - 1) // others**2
        mixed = (octaves.look_up(TOKENS, self.experts, jnp.where(is_padded, most, mean))
                 + octaves.look_up(TOKENS, self.exchange, jnp.where(is_padded, most, even)))
        return jnp.where(is_decode, self.by_sequences[jnp.minimum(most, self.by_sequences.shape[0] - 1)], mixed)


class AbstractTables(AbstractIterationCost):
    """Tables of one rank, and its two lanes.

    by_sampled: device seconds of the LM head and sampling, on the grid `SAMPLED` of the sampled sequences.
    by_sequences: for every count 0..max, the first columns as above. tail: what unequal contexts add, None where they
    do not. together: of ranks that iterate together; then an iteration is without it, and without the launch lane.
    stages: share of each pipeline stage in the layers, None with a single one. The last has the LM head as well, and
    each has both lanes; messages between stages count as if every stage had as many.
    """

    by_sampled: eqx.AbstractVar[Float[Array, " sampled_knots"]]
    by_sequences: eqx.AbstractVar[Float[Array, "sequences columns"]]
    tail: eqx.AbstractVar[Tail | None]
    together: eqx.AbstractVar[Together | None]
    stages: eqx.AbstractVar[Float[Array, " stages"] | None]

    @abc.abstractmethod
    def own_seconds(self, stats: BatchStats) -> Float[Array, ""]:
        """Device seconds of an iteration without what ranks do together."""

    @property
    def reads_longest(self) -> bool:
        """With a tail."""
        return self.tail is not None

    def row(self, num_sequences: Int[Array, ""]) -> Float[Array, " columns"]:
        """Of so many sequences, or of the most there are."""
        return self.by_sequences[jnp.minimum(num_sequences, self.by_sequences.shape[0] - 1)]

    def iteration(self, stats: BatchStats) -> Float[Array, ""]:
        """Seconds of one iteration."""
        row = self.row(stats.num_decode + stats.num_prefill)
        if self.together is not None:
            return row[SERIAL] + self.own_seconds(stats)
        launch = jnp.where(stats.num_prefill == 0, row[DECODE_LAUNCH], row[MIXED_LAUNCH])
        if self.stages is not None:
            return row[SERIAL] + jnp.sum(self._staged(launch, self.own_seconds(stats), stats.num_sampled))
        return row[SERIAL] + jnp.maximum(launch, self.own_seconds(stats))

    def stage_seconds(self, stats: BatchStats, num_stages: int) -> Float[Array, " stages+1"]:
        """The serial part holds the engine; each stage takes as long as the slower of its lanes."""
        row = self.row(stats.num_decode + stats.num_prefill)
        launch = jnp.where(stats.num_prefill == 0, row[DECODE_LAUNCH], row[MIXED_LAUNCH])
        staged = self._staged(launch, self.own_seconds(stats), stats.num_sampled)
        return jnp.concatenate([row[SERIAL][None], staged])

    def _on_stages(self, device_s: Float[Array, ""], num_sampled: Int[Array, ""]) -> Float[Array, " stages"]:
        """Device seconds of each stage."""
        head = jnp.minimum(octaves.look_up(SAMPLED, self.by_sampled, num_sampled), device_s)
        is_last = jnp.arange(self.stages.shape[0]) == self.stages.shape[0] - 1
        return self.stages * (device_s - head) + jnp.where(is_last, head, 0.0)

    def _staged(self, launch_s: Float[Array, ""], device_s: Float[Array, ""], num_sampled: Int[Array, ""]
                ) -> Float[Array, " stages"]:
        """Seconds of each stage."""
        return jnp.maximum(self.stages * launch_s, self._on_stages(device_s, num_sampled))

    def host_seconds(self, is_decode: Bool[Array, ""], num_sequences: Int[Array, ""]) -> Float[Array, ""]:
        """Serial and launches."""
        if self.together is None:
            return jnp.float32(0)
        row = self.row(num_sequences)
        return row[SERIAL] + jnp.where(is_decode, row[DECODE_LAUNCH], row[MIXED_LAUNCH])

    def together_seconds(self, is_decode: Bool[Array, ""], tokens: Int[Array, ""], most: Int[Array, ""]
                         ) -> Float[Array, ""]:
        """Experts and exchange."""
        return jnp.float32(0) if self.together is None else self.together.seconds(is_decode, tokens, most)

    def device_seconds(self, stats: BatchStats) -> Float[Array, ""]:
        """Seconds of the device lane, of ranks that are all alike."""
        own = self.own_seconds(stats)
        if self.together is None:
            return own
        tokens = stats.prefill_tokens + stats.num_decode
        return own + self.together.seconds(stats.num_prefill == 0, tokens * self.together.num_ranks, tokens)

    def paced(self, num_sequences: Int[Array, ""], row: Float[Array, " columns"], device_s: Float[Array, ""],
              growth_s: Float[Array, ""], to_edge: Float[Array, ""] | Int[Array, ""]) -> DecodePace:
        """Pace of decodes that take `device_s` and grow by `growth_s`, until the device overtakes the host (in any
        stage) or they reach an edge."""
        if self.together is not None:
            return DecodePace(row[SERIAL] + device_s, growth_s, jnp.maximum(to_edge.astype(jnp.int32), 1))
        launch_s = row[DECODE_LAUNCH]
        if self.stages is not None:
            launch_s, growth_s = self.stages * launch_s, self.stages * growth_s
            device_s = self._on_stages(device_s, num_sequences)
        slack = launch_s - device_s
        is_host_bound = slack > 0
        to_device = jnp.where(is_host_bound & (growth_s > 0), slack / jnp.where(growth_s > 0, growth_s, 1.0), UNBOUNDED)
        lanes_s, growth_s = jnp.maximum(launch_s, device_s), jnp.where(is_host_bound, 0.0, growth_s)
        if self.stages is not None:
            lanes_s, growth_s, to_device = jnp.sum(lanes_s), jnp.sum(growth_s), jnp.min(to_device)
        horizon = jnp.minimum(jnp.minimum(to_device, UNBOUNDED).astype(jnp.int32), to_edge.astype(jnp.int32))
        return DecodePace(row[SERIAL] + lanes_s, growth_s, jnp.maximum(horizon, 1))


class TabulatedCost(AbstractTables):
    """Tables over counts, coefficients of attention.

    by_tokens: device seconds of everything that depends only on the tokens of the iteration (projections, FFN,
        MoE, norms, collectives), on the grid `TOKENS`, for iterations that carry a prompt chunk.
    by_sequences: for every count of sequences 0..max: device seconds of a decode-only iteration less its
        attention reads (so that captured graphs, padded to their sizes, are exact); host launch seconds of a
        decode-only and of a mixed iteration; host seconds that never overlap the device; and of as many decodes: what
        their attention adds beside chunks, seconds per context token in full and in windowed layers, and what of the
        former a token saves that was read for another sequence.
    attention: coefficients of `attention.chunk_seconds`, for all full and all windowed layers.
    window: tokens of a context that windowed layers read, 0 where there are none. Sequences are taken at the batch's
        mean context. tail: what unequal contexts add, in full layers. together: of ranks that iterate together; then
        an iteration is without it, and `device_seconds` those of ranks that are all alike. by_sampled, stages: as of
        any tables. ring: of context-parallel ranks that share prompt chunks, of which the tables are for one.
    """

    by_tokens: Float[Array, " token_knots"]
    by_sampled: Float[Array, " sampled_knots"]
    by_sequences: Float[Array, "sequences 8"]
    attention: Float[Array, "2 columns"]
    window: Int[Array, ""]
    tail: Tail | None = None
    together: Together | None = None
    stages: Float[Array, " stages"] | None = None
    ring: Ring | None = None

    @property
    def tile_tokens(self) -> Float[Array, ""]:
        """Of all layers alike: tiles go by heads."""
        return self.attention[0, TILE_TOKENS]

    def _windowed(self, num_sequences: Int[Array, ""], context: Int[Array, ""]) -> Int[Array, ""]:
        return jnp.minimum(context, num_sequences * self.window)

    def chunk_attention(self, stats: BatchStats) -> Float[Array, ""]:
        """Seconds of attention in an iteration with prompt chunks, its decodes included, its floor excepted."""
        row = self.row(stats.num_decode)
        contexts = jnp.stack([stats.decode_context, self._windowed(stats.num_decode, stats.decode_context)]).astype(
            jnp.float32)
        # In tokens, as decodes beside chunks have prices of their own.
        saved = row[SHARED] * stats.decode_shared / jnp.maximum(row[CONTEXT], 1e-30)
        contexts = jnp.stack([contexts[0] - saved, contexts[1]])
        tokens, chunks, keys, decodes = (x.astype(jnp.float32) for x in (
            stats.prefill_tokens, stats.num_prefill, stats.prefill_context, stats.num_decode))
        together = chunk_seconds(self.attention, tokens, chunks, stats.prefill_pairs, keys, decodes, contexts,
                                 stats.prefill_tiled, stats.prefill_longest)
        apart = self.attention[:, APART] * row[CONTEXT:WINDOW + 1] * contexts
        seconds = row[BESIDE] + jnp.sum(together + apart)
        if self.tail is None:
            return seconds
        return seconds + self.tail.beside(stats.num_decode, stats.decode_context, stats.longest_context,
                                          stats.num_prefill, stats.prefill_context)

    def _chunks_alone(self, stats: BatchStats) -> Float[Array, ""]:
        """Seconds of attention to prompt chunks without decodes beside them."""
        tokens, chunks, keys = (x.astype(jnp.float32) for x in (
            stats.prefill_tokens, stats.num_prefill, stats.prefill_context))
        return jnp.sum(chunk_seconds(self.attention, tokens, chunks, stats.prefill_pairs, keys, jnp.float32(0),
                                     jnp.zeros(2, jnp.float32), stats.prefill_tiled, stats.prefill_longest))

    def own_seconds(self, stats: BatchStats) -> Float[Array, ""]:
        """Device seconds without what ranks do together."""
        new = stats.prefill_tokens
        if self.ring is not None:
            stats = self.ring.of_rank(stats)
        row = self.row(stats.num_decode)
        decode = (row[DECODE_DEVICE] + row[CONTEXT] * stats.decode_context - row[SHARED] * stats.decode_shared
                  + row[WINDOW] * self._windowed(stats.num_decode, stats.decode_context))
        if self.tail is not None:
            decode = decode + self.tail.alone(stats.num_decode, stats.decode_context, stats.longest_context)
        mixed = (octaves.look_up(TOKENS, self.by_tokens, stats.prefill_tokens + stats.num_decode)
                 + octaves.look_up(SAMPLED, self.by_sampled, stats.num_sampled) + self.chunk_attention(stats))
        if self.ring is not None:
            mixed = mixed + self.ring.more_seconds(self._chunks_alone(stats), new)
        return jnp.where(stats.num_prefill == 0, decode, mixed)

    def decode(self, num_sequences: Int[Array, ""], context: Int[Array, ""], shared: Int[Array, ""] | int = 0,
               longest: Int[Array, ""] | int = 0) -> DecodePace:
        """Pace until the device overtakes the host, or the mean context leaves the sliding window."""
        row = self.row(num_sequences)
        count = num_sequences.astype(jnp.float32)
        room = num_sequences * self.window - context
        device = (row[DECODE_DEVICE] + row[CONTEXT] * context - row[SHARED] * shared
                  + row[WINDOW] * self._windowed(num_sequences, context))
        if self.tail is not None:
            device = device + self.tail.alone(num_sequences, context, longest)
        growth = count * (row[CONTEXT] + jnp.where(room >= num_sequences, row[WINDOW], 0.0))
        to_window = jnp.where((room > 0) & (row[WINDOW] > 0),
                              room.astype(jnp.float32) / jnp.maximum(count, 1.0), UNBOUNDED)
        return self.paced(num_sequences, row, device, growth, to_window)
