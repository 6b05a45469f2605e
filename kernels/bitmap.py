"""Sets of small integers as hierarchical bitmaps: insert, remove and smallest member in three or four words.

Level 0 holds one bit a member, a bit of level k + 1 says that the word below it is not empty. All levels lie in one
row, the lowest first, with one spare word at the end for writes that are not meant. Functions take `read`, which
gives a word of the row, and return the words to write, so that a set may live anywhere.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int

_BITS = 5

Read = Callable[[Int[Array, ""]], Int[Array, ""]]


def level_offsets(num_members: int) -> tuple[int, ...]:
    """Where each level starts in the row, then where the spare word is."""
    offsets, size = [0], num_members
    while True:
        size = -(-size // 32)
        offsets.append(offsets[-1] + size)
        if size == 1:
            return tuple(offsets)


def num_words(num_members: int) -> int:
    """Words of a row."""
    return level_offsets(num_members)[-1] + 1


def smallest(read: Read, num_members: int) -> Int[Array, ""]:
    """The smallest member of a set that is not empty."""
    index = jnp.int32(0)
    for offset in reversed(level_offsets(num_members)[:-1]):
        word = read(offset + index)
        index = (index << _BITS) + 31 - lax.clz(word & -word)
    return index


def change(read: Read, num_members: int, member: Int[Array, ""], is_inserting: Bool[Array, ""],
           is_meant: Bool[Array, ""]) -> tuple[Int[Array, " levels"], Int[Array, " levels"]]:
    """Positions and values of the words that change when a member enters or leaves; the spare word if not meant."""
    *offsets, spare = level_offsets(num_members)
    positions, values = [], []
    touches = is_meant
    for offset in offsets:
        bit = jnp.int32(1) << (member & 31)
        member = member >> _BITS
        word = read(offset + member)
        word = jnp.where(is_inserting, word | bit, word & ~bit)
        positions.append(jnp.where(touches, offset + member, spare))
        values.append(jnp.where(touches, word, 0))
        # A level above hears of a word that became empty, or may have been.
        touches = touches & (is_inserting | (word == 0))
    return jnp.stack(positions), jnp.stack(values)
