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


def to_row(record) -> Shaped[Array, " fields"]:
    """Stack the scalar leaves of a pytree into a row."""
    return jnp.stack(jax.tree.leaves(record))


def from_row(like: T, row: Shaped[Array, " fields"]) -> T:
    """Rebuild a record of the structure of `like` from its row."""
    leaves, treedef = jax.tree.flatten(like)
    return jax.tree.unflatten(treedef, [row[i] for i in range(len(leaves))])
