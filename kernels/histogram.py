"""Histograms of durations with logarithmic bins, and quantiles from their counts.

64 bins an octave, equal inside it, from 2^-20 s to 2^12 s: the bin of a float32 is its exponent and the top six bits of
its mantissa. The outer bins take what lies beyond.
"""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

BITS_PER_OCTAVE = 6
LOWEST_OCTAVE = -20
NUM_OCTAVES = 32
NUM_BINS = NUM_OCTAVES << BITS_PER_OCTAVE


def bin_of(seconds: Float[Array, "*shape"]) -> Int[Array, "*shape"]:
    """The bin of a duration."""
    bits = lax.bitcast_convert_type(lax.stop_gradient(seconds), jnp.int32)
    lowest = (127 + LOWEST_OCTAVE) << BITS_PER_OCTAVE
    return jnp.clip((bits >> (23 - BITS_PER_OCTAVE)) - lowest, 0, NUM_BINS - 1)


def edges() -> Float[np.ndarray, " edges"]:
    """Edges of the bins in seconds: 2^(k div 64 - 20) (1 + (k mod 64)/64)."""
    per_octave = 1 << BITS_PER_OCTAVE
    octave, part = np.divmod(np.arange(NUM_BINS + 1), per_octave)
    return np.ldexp(1.0 + part / per_octave, octave + LOWEST_OCTAVE)


def percentiles(counts: Int[np.ndarray, " bins"], at: Sequence[float]) -> list[float | None]:
    """Percentiles in seconds; what a bin holds is taken as spread evenly over it. None where nothing was counted."""
    counts = np.asarray(counts, np.int64)
    if not counts.any():
        return [None] * len(at)
    return [float(value) for value in percentiles_of_rows(counts[None, :], at)[0]]


def percentiles_of_rows(counts: Int[np.ndarray, "rows bins"], at: Sequence[float]) -> Float[np.ndarray, "rows at"]:
    """The same of many histograms; NaN where nothing was counted."""
    counts = np.asarray(counts)
    # Only the bins that somebody fell into: few of all.
    used = np.flatnonzero(counts.any(axis=0))
    start, stop = (used[0], used[-1] + 1) if len(used) else (0, 1)
    counts, bounds = counts[:, start:stop].astype(np.int64), edges()[start:stop + 1]
    ends = np.cumsum(counts, axis=1)
    total = ends[:, -1]
    last = np.maximum(total - 1, 0)

    def order_statistic(rank: Int[np.ndarray, " rows"]) -> Float[np.ndarray, " rows"]:
        index = np.minimum(np.sum(ends <= rank[:, None], axis=1), len(bounds) - 2)
        here = np.take_along_axis(counts, index[:, None], axis=1)[:, 0]
        before = np.take_along_axis(ends, index[:, None], axis=1)[:, 0] - here
        inside = (rank - before + 0.5) / np.maximum(here, 1)
        return bounds[index] + inside * (bounds[index + 1] - bounds[index])

    values = []
    for percentile in at:
        rank = percentile / 100 * last
        low = np.floor(rank).astype(np.int64)
        part = rank - low
        high = np.minimum(low + 1, last)
        values.append(np.where(total > 0, (1 - part) * order_statistic(low) + part * order_statistic(high), np.nan))
    return np.stack(values, axis=1)
