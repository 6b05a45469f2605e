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
    """How a batch of records travels through a loop: scalars of one type side by side, the rest as it is.

    Carrying many scalars costs a copy each. They are laid out as `scalars batch`, each contiguous over the batch:
    `batch scalars` would cost a cache miss a lane at every use.
    """

    def __init__(self, like):
        """like: the record of one scenario, its arrays or their shapes and dtypes."""
        leaves, self._structure = jax.tree.flatten(like)
        # Derivatives pass through floats, so these are not carried as bits among the integers.
        self._groups = [leaf.dtype.name if leaf.shape == () and leaf.dtype in (jnp.int32, jnp.float32) else "other"
                        for leaf in leaves]

    def pack(self, records) -> dict[str, Shaped[Array, "scalars batch"] | list[Array]]:
        """Scalars of a batch stacked by type, and the list of everything else."""
        groups = {name: [] for name in ("int32", "float32", "other")}
        for name, leaf in zip(self._groups, self._structure.flatten_up_to(records), strict=True):
            groups[name].append(leaf)
        return {name: leaves if name == "other" else jnp.stack(leaves) for name, leaves in groups.items() if leaves}

    def unpack(self, packed):
        """The records again."""
        groups = {name: iter(leaves) for name, leaves in packed.items()}
        return self._structure.unflatten([next(groups[name]) for name in self._groups])
