"""Dynamic timers as a 16-ary tournament tree: set, clear and earliest in a word a level.

Every timer is a leaf with the instant at which it goes off, `NEVER` while it is not set; a node above holds the
earliest of its sixteen children and which timer that is, so the root knows the earliest of all. Ties go to the lowest
number. All levels lie in one array of (seconds, parts, timer), the leaves first, with one spare row at the end for
writes that are not meant. Functions take `read`, which gives rows of the array, and return the rows to write, so that a
tree may live anywhere.

An instant is whole seconds and a part of a second, integers that compare part by part, however far apart; what a part
counts is up to the user (ticks of `jaxsim.kernels.clock`, or twice as many with a rank of its own among ties).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from jaxsim.kernels import clock
from jaxsim.kernels.clock import Time

_BITS = 4
_WIDTH = 1 << _BITS

TICK_BITS = 30
"""Ticks of the clock's grid are so many bits of a second."""

Read = Callable[[Int[Array, "*shape"]], Int[Array, "*shape 3"]]


class Instant(NamedTuple):
    """Whole seconds, and a part of one."""

    seconds: Int[Array, "*shape"]
    parts: Int[Array, "*shape"]

    def __lt__(self, other: "Instant") -> Bool[Array, "*shape"]:
        return (self.seconds < other.seconds) | ((self.seconds == other.seconds) & (self.parts < other.parts))


NEVER = Instant(2**31 - 1, 0)
"""Behind all others."""


def level_offsets(num_timers: int) -> tuple[int, ...]:
    """Where each level starts, the leaves first, then where the spare row is."""
    offsets, size = [0], num_timers
    while True:
        # Whole groups of siblings, but for the root.
        offsets.append(offsets[-1] + (-(-size // _WIDTH) * _WIDTH if size > 1 else 1))
        if size == 1:
            return tuple(offsets)
        size = -(-size // _WIDTH)


def num_rows(num_timers: int) -> int:
    """Rows of the array."""
    return level_offsets(num_timers)[-1] + 1


def tree(instants: Instant) -> Int[Array, "rows 3"]:
    """The tree of so many timers, set to these instants."""
    num_timers = instants.seconds.shape[0]
    offsets = level_offsets(num_timers)
    level = jnp.stack([*instants, jnp.arange(num_timers)], axis=-1).astype(jnp.int32)
    rows = []
    for start, end in zip(offsets, offsets[1:], strict=False):
        level = jnp.pad(level, ((0, end - start - level.shape[0]), (0, 0)))
        # Behind the last timer there is none.
        is_there = jnp.arange(end - start) < (num_timers if start == 0 else -(-num_timers >> _BITS * len(rows)))
        level = jnp.where(is_there[:, None], level, jnp.array([*NEVER, 0], jnp.int32))
        rows.append(level)
        if end - start > 1:
            level = _earliest(level.reshape(-1, _WIDTH, 3))
    return jnp.concatenate([*rows, jnp.array([[*NEVER, 0]], jnp.int32)])


def earliest(read: Read, num_timers: int) -> tuple[Instant, Int[Array, ""]]:
    """When the first timer goes off, and which it is; `NEVER` if none is set."""
    seconds, parts, timer = read(jnp.int32(level_offsets(num_timers)[-2]))
    return Instant(seconds, parts), timer


def change(read: Read, num_timers: int, timer: Int[Array, ""], instant: Instant, is_meant: Bool[Array, ""]
           ) -> tuple[Int[Array, " levels"], Int[Array, "levels 3"]]:
    """Set a timer, or clear it by `NEVER`: positions and values of the rows that change; the spare row if not meant."""
    *offsets, spare = level_offsets(num_timers)
    # Where nothing is meant, some timer is as good as any to read beside.
    place = jnp.where(is_meant, timer, 0)
    row = jnp.stack([instant.seconds, instant.parts, place]).astype(jnp.int32)
    positions, values = [jnp.where(is_meant, place, spare)], [row]
    child = jnp.arange(_WIDTH)
    for below, offset in zip(offsets, offsets[1:], strict=False):
        group = place >> _BITS
        siblings = read(below + (group << _BITS) + child)
        row = _earliest(jnp.where((child == (place & (_WIDTH - 1)))[:, None], row, siblings))
        place = group
        positions.append(jnp.where(is_meant, offset + place, spare))
        values.append(row)
    return jnp.stack(positions), jnp.where(is_meant, jnp.stack(values), jnp.array([*NEVER, 0], jnp.int32))


def _earliest(rows: Int[Array, "*groups children 3"]) -> Int[Array, "*groups 3"]:
    """The first of the smallest; children are in the order of their timers."""
    seconds, parts = rows[..., 0], rows[..., 1]
    is_first = seconds == jnp.min(seconds, axis=-1, keepdims=True)
    part = jnp.min(jnp.where(is_first, parts, NEVER.seconds), axis=-1, keepdims=True)
    place = jnp.argmax(is_first & (parts == part), axis=-1)
    return jnp.take_along_axis(rows, place[..., None, None], axis=-2)[..., 0, :]


def instant_of(epoch: Int[Array, "*shape"], time: Time) -> Instant:
    """Of a time within an epoch, in ticks of the clock's grid."""
    seconds, units, ticks = clock.to_integers(epoch, time)
    return later(Instant(seconds, units << (TICK_BITS // 2)), Instant(jnp.int32(0), ticks))


def time_of(epoch: Int[Array, "*shape"], instant: Instant) -> Time:
    """As an offset within an epoch, exactly; an instant in ticks of the clock's grid."""
    offset = Time((instant.seconds & 0xFFFF).astype(jnp.float32), jnp.zeros(jnp.shape(instant.seconds), jnp.float32))
    for part, unit in ((instant.parts >> 15, 2.0**-15), (instant.parts & 0x7FFF, clock.GRID_S)):
        offset = clock.add(offset, part.astype(jnp.float32) * unit)
    time = clock.add(offset, ((instant.seconds >> 16) - epoch).astype(jnp.float32) * clock.EPOCH_S)
    return clock.select(instant.seconds == NEVER.seconds, clock.never(jnp.shape(instant.seconds)), time)


def later(instant: Instant, more: Instant) -> Instant:
    """The sum, of ticks of the clock's grid; `NEVER` where one of the two is."""
    ticks = instant.parts + more.parts
    is_never = (instant.seconds == NEVER.seconds) | (more.seconds == NEVER.seconds)
    seconds = jnp.where(is_never, 0, instant.seconds) + jnp.where(is_never, 0, more.seconds) + (ticks >> TICK_BITS)
    return Instant(jnp.where(is_never, NEVER.seconds, seconds),
                   jnp.where(is_never, NEVER.parts, ticks & ((1 << TICK_BITS) - 1)))
