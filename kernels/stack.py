"""Free places as a stack: a row whose first `size` entries are free, so that finding one never searches."""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int


def full(num_places: int, width: int) -> Int[np.ndarray, " width"]:
    """All of 0, 1, ..., `num_places` - 1, the lowest on top; the rest of the row is spare."""
    return np.arange(num_places - 1, num_places - 1 - width, -1, dtype=np.int32)


def top(read: Callable[[Int[Array, ""]], Int[Array, ""]], size: Int[Array, ""]) -> Int[Array, ""]:
    """The place on top; `read` gives an entry of the row. Any entry if there is none."""
    return read(jnp.maximum(size - 1, 0))


def push_at(size: Int[Array, ""], is_meant: Bool[Array, ""], spare: int) -> Int[Array, ""]:
    """Where a place goes that comes back, `size` before it; the `spare` entry if not meant."""
    return jnp.where(is_meant, size, spare)
