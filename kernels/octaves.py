"""Grids with a fixed number of knots an octave, in a given unit, found by bit arithmetic.

Knots are 0, 1, ..., 2 S units and then S an octave, with S = 2^sub_bits and a unit of 2^unit_bits: `ladder` with both
choices left open, for tables of several axes, where every axis affords another number of knots.
"""

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

Grid = tuple[int, int]
"""unit_bits, sub_bits."""


def knots(grid: Grid, max_value: int) -> Int[np.ndarray, " knots"]:
    """Knot positions that cover 0..max_value, at least two of them."""
    unit_bits, sub_bits = grid
    last = int(rung_reference(grid, np.asarray(max(int(max_value) - 1, 0)))[0]) + 1
    index = np.arange(last + 1)
    octave = np.maximum((index >> sub_bits) - 1, 0)
    return (index - (octave << sub_bits)) << (octave + unit_bits)


def rung(grid: Grid, value: Int[Array, "*shape"], num_knots: int
         ) -> tuple[Int[Array, "*shape"], Int[Array, "*shape"], Int[Array, "*shape"]]:
    """Index of the cell of `value`, its lower knot and log2 of its width; values past the end are in the last cell."""
    unit_bits, sub_bits = grid
    value = jnp.maximum(value, 0)
    octave = jnp.maximum(31 - lax.clz(jnp.maximum(value, 1)) - sub_bits, unit_bits)
    index = (value >> octave) + ((octave - unit_bits) << sub_bits)
    index = jnp.minimum(index, num_knots - 2)
    octave = unit_bits + jnp.maximum((index >> sub_bits) - 1, 0)
    return index, (index - ((octave - unit_bits) << sub_bits)) << octave, octave


def rung_reference(grid: Grid, value: Int[np.ndarray, "*shape"]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`rung` without an end, in NumPy."""
    unit_bits, sub_bits = grid
    value = np.maximum(value, 0)
    bits = np.floor(np.log2(np.maximum(value, 1))).astype(np.int64)
    octave = np.maximum(bits - sub_bits, unit_bits)
    return (value >> octave) + ((octave - unit_bits) << sub_bits), (value >> octave) << octave, octave


def share(value: Float[Array, "*shape"], low: Int[Array, "*shape"], octave: Int[Array, "*shape"]
          ) -> Float[Array, "*shape"]:
    """Where in its cell `value` lies, 0..1 (more past the end of the grid)."""
    return (value - low.astype(value.dtype)) / (jnp.int32(1) << octave).astype(value.dtype)


def look_up(grid: Grid, table: Float[Array, " knots"], value: Int[Array, ""]) -> Float[Array, ""]:
    """Piecewise-linear interpolation of one axis, linear past its end."""
    index, low, octave = rung(grid, value, table.shape[0])
    below = table[index]
    return below + (table[index + 1] - below) * share(value.astype(table.dtype), low, octave)
