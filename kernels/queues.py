"""Queues and lists linked through arrays: every change is O(1), wherever the links live.

Items are small integers, links are arrays indexed by item. Functions take what a record knows (ends, length), return it
changed, and say which links to write as (index, value); a write that is not meant goes to `nowhere`, a spare index.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

Link = tuple[Int[Array, ""], Int[Array, ""]]
"""Of one entry of an array of links: its index, its value."""


class Queue(NamedTuple):
    """A queue linked from front to back; `front` and `back` mean nothing while it is empty."""

    front: Int[Array, ""]
    back: Int[Array, ""]
    length: Int[Array, ""]


def push_back(queue: Queue, item: Int[Array, ""], is_meant: Bool[Array, ""], nowhere: int) -> tuple[Queue, Link]:
    """Add an item behind all others."""
    is_first = queue.length == 0
    link = jnp.where(is_meant & ~is_first, queue.back, nowhere), item
    return Queue(jnp.where(is_meant & is_first, item, queue.front), jnp.where(is_meant, item, queue.back),
                 queue.length + is_meant), link


def push_front(queue: Queue, item: Int[Array, ""], is_meant: Bool[Array, ""], nowhere: int) -> tuple[Queue, Link]:
    """Add an item before all others."""
    is_first = queue.length == 0
    link = jnp.where(is_meant, item, nowhere), queue.front
    return Queue(jnp.where(is_meant, item, queue.front), jnp.where(is_meant & is_first, item, queue.back),
                 queue.length + is_meant), link


def pop_front(queue: Queue, following: Int[Array, ""], is_meant: Bool[Array, ""]) -> Queue:
    """Take the front away; `following` is what its link says."""
    return Queue(jnp.where(is_meant, following, queue.front), queue.back, queue.length - is_meant)


def remove(queue: Queue, item: Int[Array, ""], before: Int[Array, ""], after: Int[Array, ""],
           is_meant: Bool[Array, ""], nowhere: int) -> tuple[Queue, Link]:
    """Take an item out from anywhere, `before` and `after` its neighbours where it has any. Returns the forward link
    that changes; the one back, where both are kept, is its mirror image (`mirrored`)."""
    is_front, is_back = is_meant & (item == queue.front), is_meant & (item == queue.back)
    link = jnp.where(is_meant & ~is_front & ~is_back, before, nowhere), after
    return Queue(jnp.where(is_front, after, queue.front), jnp.where(is_back, before, queue.back),
                 queue.length - is_meant), link


def mirrored(link: Link, nowhere: int) -> Link:
    """The link back of a forward link that changes."""
    return jnp.where(link[0] == nowhere, nowhere, link[1]), link[0]


def append(tail: Int[Array, ""], item: Int[Array, ""], is_meant: Bool[Array, ""], nowhere: int
           ) -> tuple[Int[Array, ""], Link, Link]:
    """Add an item to the end of a list linked both ways. Returns the tail, the `previous` and the `next` link."""
    linked = jnp.where(is_meant, item, nowhere)
    return (jnp.where(is_meant, item, tail), (linked, tail), (jnp.where(is_meant, tail, nowhere), linked))


def unlink(tail: Int[Array, ""], item: Int[Array, ""], before: Int[Array, ""], after: Int[Array, ""],
           is_meant: Bool[Array, ""], nowhere: int) -> tuple[Int[Array, ""], Link, Link]:
    """Take an item out of a list linked both ways, `before` and `after` its neighbours.

    Returns the tail, the `previous` and the `next` link. At the tail no link changes: those beyond the tail are never
    followed.
    """
    is_tail = is_meant & (item == tail)
    is_inner = is_meant & ~is_tail
    after = jnp.where(is_inner, after, nowhere)
    return jnp.where(is_tail, before, tail), (after, before), (jnp.where(is_inner, before, nowhere), after)
