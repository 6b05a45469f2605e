"""Exact simulated time without 64-bit floats: an epoch counter and a two-float offset on a fixed grid.

Every time is a multiple of 2^-30 s (about a nanosecond). A pair (hi, lo) of float32 carries such a number exactly
while it stays under 2^17 s, because two-sum splits it into a leading part and its exact remainder; past that the
loop moves the epoch. Since both the operands and every sum lie on the grid, addition is exact and associative: a
time does not depend on when the epoch was moved, so results do not depend on batch neighbours or on idle gaps.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

GRID_S = 2.0**-30
"""Resolution of simulated time."""

EPOCH_S = 2.0**16
"""Length of an epoch; offsets stay below two of them between moves."""

ARRIVAL_GRID_S = 2.0**-20
"""Arrivals are rounded to this on the host."""


class Time(NamedTuple):
    """A time offset within an epoch, `hi + lo` seconds, canonical: `hi` is the sum rounded to float32."""

    hi: Float[Array, "*shape"]
    lo: Float[Array, "*shape"]

    def __lt__(self, other: "Time") -> Bool[Array, "*shape"]:
        return (self.hi < other.hi) | ((self.hi == other.hi) & (self.lo < other.lo))

    def __le__(self, other: "Time") -> Bool[Array, "*shape"]:
        return (self.hi < other.hi) | ((self.hi == other.hi) & (self.lo <= other.lo))

    def equals(self, other: "Time") -> Bool[Array, "*shape"]:
        """Exact equality (canonical pairs are unique)."""
        return (self.hi == other.hi) & (self.lo == other.lo)


def never(shape=()) -> Time:
    """Later than everything."""
    return Time(jnp.full(shape, jnp.inf, jnp.float32), jnp.zeros(shape, jnp.float32))


def two_sum(a: Float[Array, "*shape"], b: Float[Array, "*shape"]) -> Time:
    """The exact sum of two floats as a canonical pair (Knuth)."""
    s = a + b
    v = s - a
    return Time(s, (a - (s - v)) + (b - v))


def _upper(a: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The upper half of the mantissa."""
    return lax.bitcast_convert_type(lax.bitcast_convert_type(a, jnp.int32) & ~0xFFF, jnp.float32)


def two_product(a: Float[Array, "*shape"], b: Float[Array, "*shape"], zero: Int[Array, ""]) -> Time:
    """The exact product of two floats as a pair (Dekker). `zero` is a zero the compiler does not know of."""
    product = lax.bitcast_convert_type(lax.bitcast_convert_type(a * b, jnp.int32) ^ zero, jnp.float32)
    a_upper, b_upper = _upper(a), _upper(b)
    a_lower, b_lower = a - a_upper, b - b_upper
    return Time(product, ((a_upper * b_upper - product) + a_upper * b_lower + a_lower * b_upper) + a_lower * b_lower)


def add(t: Time, duration: "Time | Float[Array, '*shape']") -> Time:
    """`t + duration`, exact on the grid; the duration is seconds or a pair."""
    hi, lo = duration if isinstance(duration, Time) else (duration, 0.0)
    s = two_sum(t.hi, hi)
    tail = s.lo + (t.lo + lo)
    hi = s.hi + tail
    return Time(hi, tail - (hi - s.hi))


def multiply(count: Int[Array, "*shape"], duration_s: Float[Array, "*shape"]) -> Time:
    """`count * duration` rounded to the nearest tick, for counts below 2^12.

    Single float32 products would lose a microsecond over a run of iterations of twenty seconds.
    """
    count = count.astype(jnp.float32)
    product = on_grid(count * duration_s)
    # What the product lost, exactly: half a mantissa at a time. The select inside `on_grid` keeps the compiler
    # from fusing the product into the subtraction, where it would not be rounded and nothing be left.
    exact = lax.stop_gradient(duration_s)
    upper = _upper(exact)
    lost = (count * upper - lax.stop_gradient(product)) + count * (exact - upper)
    return Time(product, on_grid(lost))


def shift(t: Time, amount_s: Float[Array, "*shape"]) -> Time:
    """`t + amount` where `t` may be `never` (stays so)."""
    moved = add(Time(jnp.where(jnp.isinf(t.hi), 0.0, t.hi), t.lo), amount_s)
    return select(jnp.isinf(t.hi), never(t.hi.shape), moved)


def elapsed(start: Time, end: Time) -> Float[Array, "*shape"]:
    """`end - start` in seconds, rounded to float32 once."""
    return (end.hi - start.hi) + (end.lo - start.lo)


def select(condition: Bool[Array, "*shape"], a: Time, b: Time) -> Time:
    """Element-wise choice."""
    return Time(jnp.where(condition, a.hi, b.hi), jnp.where(condition, a.lo, b.lo))


def on_grid(duration_s: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Round a duration to the grid; the derivative passes through unrounded.

    Above 2^-6 s a float32 is already coarser than the grid.
    """
    rounded = jnp.round(duration_s * (1 / GRID_S)) * GRID_S
    return duration_s + lax.stop_gradient(jnp.where(duration_s < 2.0**-5, rounded, duration_s) - duration_s)


def round_to_arrival_grid(t: Time) -> Time:
    """The nearest multiple of 2^-20 s; the derivative passes through unrounded."""
    upper = jnp.round(t.hi / ARRIVAL_GRID_S) * ARRIVAL_GRID_S
    lower = jnp.round(((t.hi - upper) + t.lo) / ARRIVAL_GRID_S) * ARRIVAL_GRID_S
    rounded = two_sum(upper, lower)
    return Time(t.hi + lax.stop_gradient(rounded.hi - t.hi), lax.stop_gradient(rounded.lo))


def to_integers(epoch: Int[Array, ""], t: Time) -> Int[Array, " 3"]:
    """A time as whole seconds, units of 2^-15 s and units of 2^-30 s, none of them rounded.

    Differences of times, summed part by part in integers, stay exact where floats of the time of day would not.
    """
    seconds = jnp.floor(t.hi)
    fine = (t.hi - seconds) * 2.0**15
    units = jnp.floor(fine)
    ticks = (fine - units) * 2.0**15 + t.lo * 2.0**30
    return jnp.stack([seconds.astype(jnp.int32) + epoch * int(EPOCH_S), units.astype(jnp.int32),
                      ticks.astype(jnp.int32)])


def from_integers_reference(parts: Int[np.ndarray, "*shape 3"]) -> Float[np.ndarray, "*shape"]:
    """Host: the seconds of (sums of) such parts."""
    return np.asarray(parts, np.float64) @ np.array([1.0, 2.0**-15, 2.0**-30])


def split_reference(seconds: Float[np.ndarray, "*shape"]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Host: float64 seconds to (epoch, hi, lo); exact for multiples of the grid below 2^22 s."""
    seconds = np.asarray(seconds, np.float64)
    epoch = np.floor(seconds / EPOCH_S)
    offset = seconds - epoch * EPOCH_S
    hi = offset.astype(np.float32)
    return epoch.astype(np.int32), hi, (offset - hi.astype(np.float64)).astype(np.float32)


def join_reference(epoch: np.ndarray, hi: np.ndarray, lo: np.ndarray) -> Float[np.ndarray, "*shape"]:
    """Host: (epoch, hi, lo) to float64 seconds, exact."""
    return epoch.astype(np.float64) * EPOCH_S + hi.astype(np.float64) + lo.astype(np.float64)


def round_arrivals_reference(seconds: Float[np.ndarray, " requests"]) -> Float[np.ndarray, " requests"]:
    """Host: arrivals to their grid (half to even)."""
    return np.round(np.asarray(seconds, np.float64) / ARRIVAL_GRID_S) * ARRIVAL_GRID_S
