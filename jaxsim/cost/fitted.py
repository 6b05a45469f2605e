"""Published latency forms: seconds as an affine function of batch statistics, with coefficients from the user."""

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from jaxsim.cost.base import UNBOUNDED, AbstractIterationCost, BatchStats, DecodePace
from jaxsim.kernels import clock

PREFILL, DECODE, MIXED = 0, 1, 2


class FittedCost(AbstractIterationCost):
    """`a + b prefill_tokens + c decode_context + d sequences + e prefill_pairs`, by composition and batch size.

    Three rows of coefficients, for prefill-only, decode-only and mixed iterations; each may change at batch
    sizes given by `thresholds` (the last piece whose threshold is at or below the number of sequences applies).
    `remainders` is what rounding the coefficients to float32 left; None where nobody asked for that much. `head`: of
    these seconds, what the first pipeline stage takes beyond an equal part, `h0 + h1 context`, with the tokens of
    context before the iteration, of prompts their length; None where all parts are equal.

    Source: the form of DistServe's simulator (arXiv 2401.09670, appendix A) and of most published linear fits.
    """

    coefficients: Float[Array, "kinds pieces 5"]
    remainders: Float[Array, "kinds pieces 5"] | None
    thresholds: Int[Array, "kinds pieces"]
    head: Float[Array, " 2"] | None = None

    def _piece(self, kind: Int[Array, ""], num_sequences: Int[Array, ""]) -> tuple:
        if self.thresholds.shape[1] == 1:
            return kind, 0
        return kind, jnp.maximum(jnp.sum(self.thresholds[kind] <= num_sequences) - 1, 0)

    @staticmethod
    def _kind(stats: BatchStats) -> Int[Array, ""]:
        return jnp.where(stats.num_prefill == 0, DECODE, jnp.where(stats.num_decode == 0, PREFILL, MIXED))

    def iteration(self, stats: BatchStats) -> Float[Array, ""]:
        """Seconds of one iteration."""
        num_sequences = stats.num_decode + stats.num_prefill
        a, b, c, d, e = self.coefficients[self._piece(self._kind(stats), num_sequences)]
        return (a + b * stats.prefill_tokens + c * stats.decode_context + d * num_sequences
                + e * stats.prefill_pairs)

    def decode(self, num_sequences: Int[Array, ""], context: Int[Array, ""], shared: Int[Array, ""] | int = 0,
               longest: Int[Array, ""] | int = 0) -> DecodePace:
        """Decode-only pace: the context grows by one token a sequence, so seconds grow by c a sequence. Shared tokens
        cost what others do."""
        a, _, c, d, _ = self.coefficients[self._piece(jnp.int32(DECODE), num_sequences)]
        return DecodePace(a + c * context + d * num_sequences, c * num_sequences, jnp.int32(UNBOUNDED))

    def head_seconds(self, stats: BatchStats) -> Float[Array, ""]:
        """What the first stage takes beyond an equal part."""
        if self.head is None:
            return jnp.float32(0)
        return self.head[0] + self.head[1] * (stats.prefill_context + stats.decode_context - stats.num_decode)

    def stage_seconds(self, stats: BatchStats, num_stages: int) -> Float[Array, " stages+1"]:
        """Equal parts, but for the first stage's."""
        if self.head is None:
            return super().stage_seconds(stats, num_stages)
        head = self.head_seconds(stats)
        each, stage = (self.iteration(stats) - head) / num_stages, jnp.arange(num_stages + 1)
        return jnp.where(stage == 0, 0.0, each + jnp.where(stage == 1, head, 0.0))

    def iteration_remainder(self, stats: BatchStats, seconds: Float[Array, ""]) -> Float[Array, ""]:
        """What float32 left of `seconds`; the same rounding in every iteration would grow into microseconds."""
        num_sequences = stats.num_decode + stats.num_prefill
        return self._remainder(seconds, self._piece(self._kind(stats), num_sequences), (
            1, stats.prefill_tokens, stats.decode_context, num_sequences, stats.prefill_pairs))

    def decode_remainder(self, num_sequences: Int[Array, ""], context: Int[Array, ""],
                         first_s: Float[Array, ""]) -> Float[Array, ""]:
        """The same for a pace."""
        return self._remainder(first_s, self._piece(jnp.int32(DECODE), num_sequences),
                               (1, 0, context, num_sequences, 0))

    def _remainder(self, seconds: Float[Array, ""], piece: tuple, statistics: tuple) -> Float[Array, ""]:
        if self.remainders is None:
            return jnp.float32(0)
        coefficients, remainders = self.coefficients[piece], self.remainders[piece]
        # Zero at run time; the compiler does not know, so it cannot fuse a product into a sum and skip its rounding.
        zero = self.thresholds[0, 0]
        total, left = -seconds, jnp.float32(0)
        for i, x in enumerate(statistics):
            x = jnp.asarray(x, jnp.float32)
            product, lost = clock.two_product(coefficients[i], x, zero)
            total, rounding = clock.two_sum(total, product)
            left = left + (lost + rounding + remainders[i] * x)
        return lax.stop_gradient(total + left)


def fitted(prefill, decode, mixed=None, *, exact: bool = False, head=None) -> FittedCost:
    """Build from rows `(min_sequences, a, b, c, d, e)` (or a single `(a, b, c, d, e)`) a kind.

    `mixed` defaults to prefill's token terms and decode's context term, with the larger of both constants and of
    both sequence terms, piece by piece: never cheaper than its prompts or its decodes alone. `exact` keeps what
    float32 rounds off, in coefficients and in sums, so that a run of minutes stays within a microsecond of its
    float64 value, for a tenth of the speed. head: (constant, a token of context) of the first stage alone.
    """
    def pieces(rows):
        rows = np.atleast_2d(np.asarray(rows, np.float64))
        return rows if rows.shape[1] == 6 else np.hstack([np.zeros((len(rows), 1)), rows])

    prefill, decode = pieces(prefill), pieces(decode)
    if mixed is None:
        starts = np.union1d(prefill[:, 0], decode[:, 0])
        p, d = (rows[np.maximum(np.searchsorted(rows[:, 0], starts, side="right") - 1, 0)]
                for rows in (prefill, decode))
        mixed = np.column_stack([starts, np.maximum(p[:, 1], d[:, 1]), p[:, 2], p[:, 3] + d[:, 3],
                                 np.maximum(p[:, 4], d[:, 4]), p[:, 5]])
    kinds = [prefill, decode, pieces(mixed)]
    width = max(len(k) for k in kinds)
    kinds = [np.vstack([k, np.repeat(k[-1:], width - len(k), 0)]) for k in kinds]
    stacked = np.stack(kinds)
    rounded = stacked[:, :, 1:].astype(np.float32)
    remainders = jnp.asarray((stacked[:, :, 1:] - rounded).astype(np.float32)) if exact else None
    return FittedCost(jnp.asarray(rounded), remainders, jnp.asarray(stacked[:, :, 0], jnp.int32),
                      None if head is None else jnp.asarray(head, jnp.float32))


