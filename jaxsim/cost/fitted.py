"""Published latency forms: seconds as an affine function of batch statistics, with coefficients from the user."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxsim.cost.base import UNBOUNDED, AbstractIterationCost, BatchStats, DecodePace

PREFILL, DECODE, MIXED = 0, 1, 2


class FittedCost(AbstractIterationCost):
    """`a + b prefill_tokens + c decode_context + d sequences + e prefill_pairs`, by composition and batch size.

    Three rows of coefficients, for prefill-only, decode-only and mixed iterations; each may change at batch
    sizes given by `thresholds` (the last piece whose threshold is at or below the number of sequences applies).
    `remainders` is what rounding the coefficients to float32 left.

    Source: the form of DistServe's simulator (arXiv 2401.09670, appendix A) and of most published linear fits.
    """

    coefficients: Float[Array, "kinds pieces 5"]
    remainders: Float[Array, "kinds pieces 5"]
    thresholds: Int[Array, "kinds pieces"]

    def _seconds(self, kind: Int[Array, ""], num_sequences: Int[Array, ""], *statistics) -> Float[Array, ""]:
        """The form's value; `statistics` go with the coefficients in order, None where one does not occur.

        What float32 leaves of a coefficient is added apart: the same rounding in every iteration would grow into
        microseconds over a run.
        """
        piece = 0
        if self.thresholds.shape[1] > 1:
            piece = jnp.maximum(jnp.sum(self.thresholds[kind] <= num_sequences) - 1, 0)
        totals = []
        for row in (self.coefficients[kind, piece], self.remainders[kind, piece]):
            terms = [row[i] * x for i, x in enumerate(statistics) if x is not None]
            totals.append(sum(terms[1:], terms[0]))
        return totals[0] + totals[1]

    def iteration(self, stats: BatchStats) -> Float[Array, ""]:
        """Seconds of one iteration."""
        kind = jnp.where(stats.num_prefill == 0, DECODE, jnp.where(stats.num_decode == 0, PREFILL, MIXED))
        num_sequences = stats.num_decode + stats.num_prefill
        return self._seconds(kind, num_sequences, 1.0, stats.prefill_tokens, stats.decode_context, num_sequences,
                             stats.prefill_pairs)

    def decode(self, num_sequences: Int[Array, ""], context: Int[Array, ""]) -> DecodePace:
        """Decode-only pace: the context grows by one token a sequence, so seconds grow by c a sequence."""
        kind = jnp.int32(DECODE)
        first_s = self._seconds(kind, num_sequences, 1.0, None, context, num_sequences)
        growth_s = self._seconds(kind, num_sequences, None, None, num_sequences)
        return DecodePace(first_s, growth_s, jnp.int32(UNBOUNDED))


def fitted(prefill, decode, mixed=None) -> FittedCost:
    """Build from rows `(min_sequences, a, b, c, d, e)` (or a single `(a, b, c, d, e)`) a kind.

    `mixed` defaults to the prefill row with the decode row's context and sequence terms added, which is what a
    single linear model fitted to both would give.
    """
    def pieces(rows):
        rows = np.atleast_2d(np.asarray(rows, np.float64))
        return rows if rows.shape[1] == 6 else np.hstack([np.zeros((len(rows), 1)), rows])

    prefill, decode = pieces(prefill), pieces(decode)
    if mixed is None:
        mixed = prefill[:1].copy()
        mixed[0, 3] += decode[0, 3]
        mixed[0, 4] = max(mixed[0, 4], decode[0, 4])
    kinds = [prefill, decode, pieces(mixed)]
    width = max(len(k) for k in kinds)
    kinds = [np.vstack([k, np.repeat(k[-1:], width - len(k), 0)]) for k in kinds]
    stacked = np.stack(kinds)
    rounded = stacked[:, :, 1:].astype(np.float32)
    remainders = (stacked[:, :, 1:] - rounded).astype(np.float32)
    return FittedCost(jnp.asarray(rounded), jnp.asarray(remainders), jnp.asarray(stacked[:, :, 0], jnp.int32))


