"""Counters that advance in lockstep, tracked by residue: how many cross a multiple of the period, and when.

`count` counters share one increment: after `t` increments a counter stands at `d + t` for its own offset `d`. It
crosses at a time t with (d + t) mod period = 0. Keeping only the number of counters at each residue of `d` answers,
in O(period), how many cross at one time, over a span of times, and how many times fit before a total is reached.
Periods are powers of two.
"""

import jax.numpy as jnp
from jaxtyping import Array, Int


def crossing_at(counts: Int[Array, " period"], t: Int[Array, ""]) -> Int[Array, ""]:
    """Counters that cross at time `t`."""
    period = counts.shape[0]
    return counts[(-t) & (period - 1)]


def crossings_between(counts: Int[Array, " period"], total: Int[Array, ""], t: Int[Array, ""],
                      span: Int[Array, ""]) -> Int[Array, ""]:
    """Crossings at times t, ..., t + span - 1; `total` is the sum of `counts`."""
    period = counts.shape[0]
    bits = period.bit_length() - 1
    first_crossing = -(t + jnp.arange(period)) & (period - 1)
    partial = jnp.sum(jnp.where(first_crossing < (span & (period - 1)), counts, 0))
    return total * (span >> bits) + partial


def times_that_fit(counts: Int[Array, " period"], total: Int[Array, ""], t: Int[Array, ""],
                   room: Int[Array, ""]) -> Int[Array, ""]:
    """The largest span whose `crossings_between` stays within `room` (2^30 where nothing crosses)."""
    period = counts.shape[0]
    safe_total = jnp.maximum(total, 1)
    # Whole turns by float division: below 2^24 blocks it is exact up to one, which the comparisons mend.
    turns = (room.astype(jnp.float32) / safe_total.astype(jnp.float32)).astype(jnp.int32)
    turns = turns - (turns * safe_total > room)
    turns = turns + ((turns + 1) * safe_total <= room)
    rest = room - turns * safe_total
    ahead = counts[-(t + jnp.arange(period)) & (period - 1)]
    running = jnp.zeros((), counts.dtype)
    fits = jnp.zeros((), jnp.int32)
    for i in range(period):
        running = running + ahead[i]
        fits = fits + (running <= rest)
    span = turns * period + fits
    return jnp.where(total == 0, 1 << 30, jnp.where(room < 0, 0, span))
