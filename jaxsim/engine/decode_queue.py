"""Decodes as a queue: a batch takes them from the front while their context fits a limit; then they go to the back.

The place of a sequence in the queue is its stamp, `next_stamp` the last that was given. One that comes with its KV
takes its place at the delivery, also while an iteration is under way; those that run in it go behind everybody when it
ends. Source: the public simulator of DistServe (simdistserve), whose decode batches have at most 50,000 tokens of
context.
"""

from dataclasses import replace

import jax.numpy as jnp
from jaxtyping import Array, Bool

from jaxsim.engine.common import choose
from jaxsim.engine.slots import Slots, front, stall
from jaxsim.kernels import packed
from jaxsim.policy.batching import Batching
from jaxsim.spec.dims import Dims
from jaxsim.state import world as w
from jaxsim.state.world import Counts


def take_front(dims: Dims, rules: Batching, is_any: Bool[Array, ""], counts: Counts, slots: Slots,
               is_queued: Bool[Array, " slot_width"]) -> tuple[Counts, Slots, Bool[Array, " slot_width"]]:
    """The next batch of decodes: from the front of the queue; all others sit it out. Returns who is in it."""
    bound = front(rules, counts, slots, is_queued)
    fits = is_queued & (slots.entries[:, w.STAMP] < bound)
    is_over = is_any & jnp.any(slots.is_decoding & ~fits)
    stalled, slots = stall(counts, slots, is_over & slots.is_decoding & ~fits, dims.slot_bits)
    counts = choose(is_over, stalled, counts)
    rank = counts.rank
    # Who runs, until the iteration ends: everybody before this place.
    cursor = jnp.where(is_any, jnp.minimum(bound, rank.next_stamp + 1), rank.cursor)
    return replace(counts, rank=replace(rank, cursor=cursor)), slots, fits


def to_the_back(counts: Counts, slots: Slots, is_moved: Bool[Array, " slot_width"]) -> tuple[Counts, Slots]:
    """These go behind everybody else, in the order they have."""
    stamps, rank = slots.entries[:, w.STAMP], counts.rank
    first = jnp.min(jnp.where(is_moved, stamps, packed.EMPTY))
    last = jnp.max(jnp.where(is_moved, stamps, -1))
    slots = slots.with_column(w.STAMP, jnp.where(is_moved, stamps - first + rank.next_stamp + 1, stamps))
    taken = jnp.where(last >= 0, last - first + 1, 0)
    return replace(counts, rank=replace(rank, next_stamp=rank.next_stamp + taken)), slots


def ran(counts: Counts, slots: Slots, has_ended: Bool[Array, ""]) -> tuple[Counts, Bool[Array, " slot_width"]]:
    """Who was in the decode iteration that has ended, and must go behind others; that these have been told."""
    rank = counts.rank
    is_moved = has_ended & (rank.cursor <= rank.next_stamp) & (slots.entries[:, w.STAMP] < rank.cursor)
    cursor = jnp.where(has_ended, 0, rank.cursor)
    return replace(counts, rank=replace(rank, cursor=cursor)), is_moved & slots.is_decoding
