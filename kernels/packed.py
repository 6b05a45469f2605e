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


class Packing:
    """How a pytree of small arrays travels through a loop: its integers as one row, its floats once each.

    Carrying many scalars costs a copy each. Integers are laid side by side, repeated ones once. Floats stay apart,
    because XLA on CPU fuses a short concatenation with everything that leads to it and computes shared parts again
    for every operand (measured: 4x on the whole step).
    """

    def __init__(self, function, *arguments):
        """Plans for what `function(*arguments)` returns, by abstract evaluation."""
        self._slots = None
        jax.eval_shape(lambda *a: self.pack(function(*a)), *arguments)

    def pack(self, tree) -> tuple[Shaped[Array, " ints"], list[Array]]:
        """The row of integers and the list of floats."""
        leaves, self._treedef = jax.tree.flatten(tree)
        places, ints, floats, width = {}, [], [], 0
        slots = []
        for leaf in map(jnp.asarray, leaves):
            place = places.get(id(leaf))
            if place is None:
                if jnp.issubdtype(leaf.dtype, jnp.floating):
                    place = (True, len(floats), leaf.shape)
                    floats.append(leaf)
                else:
                    place = (False, width, leaf.shape)
                    width += leaf.size
                    ints.append(leaf)
                places[id(leaf)] = place
            slots.append(place)
        if self._slots not in (None, slots):
            raise AssertionError("a packing changed between two traces of one function")
        self._slots = slots
        return jnp.concatenate([jnp.ravel(x) for x in ints]), floats

    def unpack(self, packed):
        """The pytree."""
        row, floats = packed
        leaves = [floats[at] if is_float else row[at:at + int(np.prod(shape))].reshape(shape)
                  for is_float, at, shape in self._slots]
        return jax.tree.unflatten(self._treedef, leaves)
