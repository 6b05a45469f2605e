"""Keys that carry an index in their low bits, and rows of scalar fields packed into one vector.

A minimum over `key << bits | index` is a minimum and an argmin in one reduction. A record of scalars stored as
one row costs one gather to read and one scatter to write, however many fields it has.
"""

from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int, Shaped

EMPTY = np.int32(2**31 - 1)
"""A key above every other: no entry."""

T = TypeVar("T")


def index_bits(count: int) -> int:
    """Bits that hold an index below `count`."""
    return max(int(count - 1).bit_length(), 1)


def pack_key(key: Int[Array, ""], index: Int[Array, ""], bits: int) -> Int[Array, ""]:
    """`key` with `index` in the low `bits`."""
    return (key << bits) | index


def unpack_key(packed: Int[Array, ""], bits: int) -> tuple[Int[Array, ""], Int[Array, ""]]:
    """The key and the index of a packed key."""
    return packed >> bits, packed & ((1 << bits) - 1)


def two_smallest(row: Int[Array, " width"]) -> tuple[Int[Array, ""], Int[Array, ""]]:
    """The two smallest entries of a row whose width is a multiple of 16; entries are distinct, but for `EMPTY`.

    Sixteen partial pairs, taken over slices in one pass, then one reduction: a plain minimum over the row is split by
    XLA on CPU into windows and costs seven times as much.
    """
    parts = row.reshape(-1, 16)
    first, second = parts[0], jnp.full(16, EMPTY)
    for i in range(1, parts.shape[0]):
        second = jnp.minimum(second, jnp.maximum(first, parts[i]))
        first = jnp.minimum(first, parts[i])
    smallest = jnp.min(first)
    return smallest, jnp.min(jnp.where(first == smallest, second, first))


def to_row(record) -> Shaped[Array, " fields"]:
    """Stack the scalar leaves of a pytree into a row."""
    return jnp.stack(jax.tree.leaves(record))


def from_row(like: T, row: Shaped[Array, " fields"]) -> T:
    """Rebuild a record of the structure of `like` from its row."""
    leaves, treedef = jax.tree.flatten(like)
    return jax.tree.unflatten(treedef, [row[i] for i in range(len(leaves))])


class Packing:
    """How a batch of records travels through a loop: scalars of 32 bits side by side, the rest as it is.

    Carrying many scalars costs a copy each. They are laid out as `scalars batch`, each contiguous over the batch:
    `batch scalars` would cost a cache miss a lane at every use.
    """

    def __init__(self, like):
        """like: the record of one scenario, its arrays or their shapes and dtypes."""
        leaves, self._structure = jax.tree.flatten(like)
        self._dtypes = [leaf.dtype if leaf.shape == () and leaf.dtype.itemsize == 4 else None for leaf in leaves]

    def pack(self, records) -> tuple[Int[Array, "scalars batch"], list[Array]]:
        """The bits of a batch's scalars, and the list of everything else."""
        leaves = list(zip(self._structure.flatten_up_to(records), self._dtypes, strict=True))
        scalars = [lax.bitcast_convert_type(leaf, jnp.int32) for leaf, dtype in leaves if dtype is not None]
        return jnp.stack(scalars), [leaf for leaf, dtype in leaves if dtype is None]

    def unpack(self, packed):
        """The records again."""
        scalars, others = iter(packed[0]), iter(packed[1])
        return self._structure.unflatten(
            [next(others) if dtype is None else lax.bitcast_convert_type(next(scalars), dtype)
             for dtype in self._dtypes])
