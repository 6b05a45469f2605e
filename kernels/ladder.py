"""A ladder of integer knots, dense where numbers are small, and piecewise-linear look-up on it.

Functions of a token count are tabulated once per scenario, before the loop, and read by two neighbouring
entries inside it. The knots are 0, 1, ..., 16 and then 8 per octave, so their spacing is at most 1/8 of the
count, finding the rung takes a count of leading zeros and a shift, and counts up to 16 are exact.
"""

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

_SUB_BITS = 3
_SUB = 1 << _SUB_BITS


def num_knots(max_value: int) -> int:
    """Entries needed to cover 0..max_value (the last knot is at or above max_value)."""
    rung = int(rung_reference(np.asarray([max(int(max_value), 1)]))[0][0])
    return rung + 2


def knots(max_value: int) -> Int[np.ndarray, " knots"]:
    """The knot positions that cover 0..max_value."""
    index = np.arange(num_knots(max_value))
    octave = np.maximum(index // _SUB - 1, 0)
    return np.where(index < 2 * _SUB, index, (index - octave * _SUB) << octave)


def rung(value: Int[Array, "*shape"]) -> tuple[Int[Array, "*shape"], Int[Array, "*shape"], Int[Array, "*shape"]]:
    """Index of the knot at or below `value`, distance to it, and log2 of the spacing above it."""
    value = jnp.maximum(value, 0)
    octave = jnp.maximum(31 - lax.clz(jnp.maximum(value, 1)) - _SUB_BITS, 0)
    index = (value >> octave) + octave * _SUB
    return index, value - ((value >> octave) << octave), octave


def rung_reference(value: Int[np.ndarray, "*shape"]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`rung` in NumPy, for the host and for tests."""
    value = np.maximum(value, 0)
    octave = np.maximum(np.floor(np.log2(np.maximum(value, 1))).astype(np.int64) - _SUB_BITS, 0)
    return (value >> octave) + octave * _SUB, value - ((value >> octave) << octave), octave


def look_up(table: Float[Array, " knots"], value: Int[Array, ""]) -> Float[Array, ""]:
    """Piecewise-linear interpolation of `table` (values at `knots`) at an integer `value`."""
    index, offset, octave = rung(value)
    low = table[index]
    high = table[jnp.minimum(index + 1, table.shape[0] - 1)]
    return low + (high - low) * (offset.astype(table.dtype) / (jnp.int32(1) << octave).astype(table.dtype))
