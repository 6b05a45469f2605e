"""Keys that carry an index in their low bits, and rows of scalar fields packed into one vector.

A minimum over `key << bits | index` is a minimum and an argmin in one reduction. A record of scalars stored as
one row costs one gather to read and one scatter to write, however many fields it has.
"""

from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
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


def row_min(row: Int[Array, " width"]) -> Int[Array, ""]:
    """Minimum of a row whose width is a multiple of 16.

    Sixteen partial minima, taken over slices, then one reduction: a plain minimum over the row is split by XLA on
    CPU into windows and costs seven times as much.
    """
    parts = row.reshape(-1, 16)
    smallest = parts[0]
    for i in range(1, parts.shape[0]):
        smallest = jnp.minimum(smallest, parts[i])
    return jnp.min(smallest)


def to_row(record) -> Shaped[Array, " fields"]:
    """Stack the scalar leaves of a pytree into a row."""
    return jnp.stack(jax.tree.leaves(record))


def from_row(like: T, row: Shaped[Array, " fields"]) -> T:
    """Rebuild a record of the structure of `like` from its row."""
    leaves, treedef = jax.tree.flatten(like)
    return jax.tree.unflatten(treedef, [row[i] for i in range(len(leaves))])


class Packing:
    """How a batch of records travels through a loop: integer scalars side by side, the rest as it is, all once.

    Carrying many scalars costs a copy each. They are laid out as `scalars batch`, each contiguous over the batch:
    `batch scalars` would cost a cache miss a lane at every use. Floats stay apart, because XLA on CPU fuses a
    short concatenation with everything that leads to it and computes shared parts again for every operand
    (measured: 4x on the whole step).
    """

    def __init__(self):
        """Empty; `pack` learns the structure."""
        self._slots, self._treedef = None, None

    def pack(self, tree) -> tuple[Int[Array, "scalars batch"], list[Array]]:
        """Batched leaves to the stacked integer scalars and the list of everything else."""
        leaves, treedef = jax.tree.flatten(tree)
        places, slots, scalars, others = {}, [], [], []
        for leaf in leaves:
            if id(leaf) not in places:
                is_scalar = leaf.ndim == 1 and leaf.dtype == jnp.int32
                group = scalars if is_scalar else others
                places[id(leaf)] = (is_scalar, len(group))
                group.append(leaf)
            slots.append(places[id(leaf)])
        if self._slots not in (None, slots):
            raise AssertionError("a packing changed between two traces of one function")
        self._slots, self._treedef = slots, treedef
        return jnp.stack(scalars), others

    def unpack(self, packed):
        """The records again."""
        scalars, others = packed
        return jax.tree.unflatten(
            self._treedef, [scalars[at] if is_scalar else others[at] for is_scalar, at in self._slots])
