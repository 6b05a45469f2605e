"""What one iteration costs: the interface between the engine and every cost model.

The engine describes an iteration by `BatchStats`, which it maintains in O(1), and asks two questions: how long
does this iteration take, and, if nothing but context growth changes, how do the following ones go on. A cost
model must be affine in the decode context between the edges it reports, so that a run of iterations has a
closed-form duration (DecodePace).
"""

import abc

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

UNBOUNDED = 1 << 30
"""Iterations a pace holds for when no edge lies ahead."""


class BatchStats(eqx.Module):
    """One iteration of one executor.

    num_decode: sequences that decode one token each.
    decode_context: KV tokens read by them, the new one included, summed; decode_shared: those of them that another
    sequence of the batch reads as well (cached prefixes), each sequence after the first counted.
    longest_context: of the tokens that one of them reads; 0 unless the cost reads it.
    num_prefill: prompt chunks; prefill_tokens: their new tokens; prefill_context: the KV tokens each ends with
    (history + chunk), summed; prefill_pairs: sum of (history + chunk)^2 - history^2, which is twice the causal
    query-key pairs less the tokens.
    num_sampled: sequences that emit a token when the iteration ends.
    prefill_tiled: `prefill_pairs` with the tokens of each chunk rounded up to whole tiles of the attention kernel
    (`AbstractIterationCost.tile_tokens`); prefill_longest: the most KV tokens a chunk ends with. None: chunks are
    alike.
    """

    num_decode: Int[Array, ""]
    decode_context: Int[Array, ""]
    num_prefill: Int[Array, ""]
    prefill_tokens: Int[Array, ""]
    prefill_context: Int[Array, ""]
    prefill_pairs: Float[Array, ""]
    num_sampled: Int[Array, ""]
    decode_shared: Int[Array, ""] | int = 0
    longest_context: Int[Array, ""] | int = 0
    prefill_tiled: Float[Array, ""] | None = None
    prefill_longest: Int[Array, ""] | None = None

    @property
    def distinct_context(self) -> Int[Array, ""]:
        """KV tokens that decodes read, those in shared blocks once."""
        return self.decode_context - self.decode_shared

    @classmethod
    def of(cls, num_decode=0, decode_context=0, num_prefill=0, prefill_tokens=0, prefill_context=0,
           prefill_pairs=0.0, num_sampled=None, decode_shared=0, longest_context=0) -> "BatchStats":
        """From plain numbers; `num_sampled` defaults to every sequence in the batch."""
        num_sampled = num_decode + num_prefill if num_sampled is None else num_sampled
        ints = (num_decode, decode_context, num_prefill, prefill_tokens, prefill_context)
        return cls(*(jnp.asarray(x, jnp.int32) for x in ints), jnp.asarray(prefill_pairs, jnp.float32),
                   *(jnp.asarray(x, jnp.int32) for x in (num_sampled, decode_shared, longest_context)))


class DecodePace(eqx.Module):
    """A run of decode iterations over one unchanging batch: iteration j takes `first_s + j * growth_s`.

    Holds for j < `horizon`, which may fall short of the true edge but never past it, and is at least 1.
    """

    first_s: Float[Array, ""]
    growth_s: Float[Array, ""]
    horizon: Int[Array, ""]


class AbstractIterationCost(eqx.Module):
    """Seconds of an iteration. Implementations hold only arrays, made before the loop."""

    @property
    def reads_longest(self) -> bool:
        """Whether `longest_context` matters; finding it takes a look at all sequences."""
        return False

    @property
    def tile_tokens(self) -> Float[Array, ""] | None:
        """Query tokens of a tile of attention, where `prefill_tiled` and `prefill_longest` matter."""
        return None

    @abc.abstractmethod
    def iteration(self, stats: BatchStats) -> Float[Array, ""]:
        """Seconds of one iteration of any composition."""

    @abc.abstractmethod
    def decode(self, num_sequences: Int[Array, ""], context: Int[Array, ""], shared: Int[Array, ""] | int = 0,
               longest: Int[Array, ""] | int = 0) -> DecodePace:
        """Pace of decode-only iterations; `context`, `shared`, `longest` as `BatchStats` of the first has them."""

    def stage_seconds(self, stats: BatchStats, num_stages: int) -> Float[Array, " stages+1"]:
        """How long an iteration holds the engine, which forms one batch at a time, and then every stage of a pipeline.

        Together they are `iteration(stats)`; unless a model knows better, equal parts of it for the stages.
        """
        each = self.iteration(stats) / num_stages
        return jnp.where(jnp.arange(num_stages + 1) == 0, 0.0, each)

    def head_seconds(self, stats: BatchStats) -> Float[Array, ""]:
        """Of `iteration(stats)`, what the first stage of a pipeline takes beyond an equal part."""
        return jnp.float32(0)

    def iteration_remainder(self, stats: BatchStats, seconds: Float[Array, ""]) -> Float[Array, ""]:
        """What float32 left of `seconds = iteration(stats)`, where the model is known better than that."""
        return jnp.float32(0)

    def decode_remainder(self, num_sequences: Int[Array, ""], context: Int[Array, ""],
                         first_s: Float[Array, ""]) -> Float[Array, ""]:
        """The same for `first_s` of `decode(num_sequences, context)`."""
        return jnp.float32(0)

    def together_seconds(self, is_decode: Bool[Array, ""], tokens: Int[Array, ""], most: Int[Array, ""]
                         ) -> Float[Array, ""]:
        """What ranks that iterate together add to the slowest's seconds, for the tokens of all.

        is_decode: whether none has a prompt chunk; tokens: of all ranks; most: of the fullest.
        """
        return jnp.float32(0)

    def host_seconds(self, is_decode: Bool[Array, ""], num_sequences: Int[Array, ""]) -> Float[Array, ""]:
        """What an iteration of ranks that iterate together takes at least, whatever their devices do.

        Where this is not 0, `iteration` and `decode` are of the device alone, as `together_seconds` come to it first.
        """
        return jnp.float32(0)


class OneOf(AbstractIterationCost):
    """The cost at `index` of several, which are all evaluated."""

    costs: tuple[AbstractIterationCost, ...]
    index: Int[Array, ""]

    def iteration(self, stats: BatchStats) -> Float[Array, ""]:
        """Seconds by the chosen cost."""
        return self._chosen(lambda cost: cost.iteration(stats))

    @property
    def reads_longest(self) -> bool:
        """Whether any does."""
        return any(cost.reads_longest for cost in self.costs)

    @property
    def tile_tokens(self) -> Float[Array, ""] | None:
        """Of the chosen cost."""
        each = [cost.tile_tokens for cost in self.costs]
        if all(tokens is None for tokens in each):
            return None
        return jax.lax.select_n(self.index, *(jnp.float32(1) if tokens is None else tokens for tokens in each))

    def decode(self, num_sequences: Int[Array, ""], context: Int[Array, ""], shared: Int[Array, ""] | int = 0,
               longest: Int[Array, ""] | int = 0) -> DecodePace:
        """Pace by the chosen cost."""
        return self._chosen(lambda cost: cost.decode(num_sequences, context, shared, longest))

    def together_seconds(self, is_decode: Bool[Array, ""], tokens: Int[Array, ""], most: Int[Array, ""]
                         ) -> Float[Array, ""]:
        """By the chosen cost."""
        return self._chosen(lambda cost: cost.together_seconds(is_decode, tokens, most))

    def host_seconds(self, is_decode: Bool[Array, ""], num_sequences: Int[Array, ""]) -> Float[Array, ""]:
        """By the chosen cost."""
        return self._chosen(lambda cost: cost.host_seconds(is_decode, num_sequences))

    def stage_seconds(self, stats: BatchStats, num_stages: int) -> Float[Array, " stages+1"]:
        """By the chosen cost."""
        return self._chosen(lambda cost: cost.stage_seconds(stats, num_stages))

    def head_seconds(self, stats: BatchStats) -> Float[Array, ""]:
        """By the chosen cost."""
        return self._chosen(lambda cost: cost.head_seconds(stats))

    def iteration_remainder(self, stats: BatchStats, seconds: Float[Array, ""]) -> Float[Array, ""]:
        """Remainder by the chosen cost."""
        return self._chosen(lambda cost: cost.iteration_remainder(stats, seconds))

    def decode_remainder(self, num_sequences: Int[Array, ""], context: Int[Array, ""],
                         first_s: Float[Array, ""]) -> Float[Array, ""]:
        """Remainder by the chosen cost."""
        return self._chosen(lambda cost: cost.decode_remainder(num_sequences, context, first_s))

    def _chosen(self, question):
        return jax.tree.map(lambda *answers: jax.lax.select_n(self.index, *answers), *map(question, self.costs))
