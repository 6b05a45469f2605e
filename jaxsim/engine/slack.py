"""Least slack first: requests that never ran by a rank known before the run, preempted ones in a window.

By how much slack differs does not depend on the time at which one looks (`jaxsim.policy.slack`): of two that wait the
one with the smaller due - remaining goes first, all the while that both do. So those who never ran lie in the set of
ranks of all sorted orders, exact however many wait. Who is preempted has output tokens, and another remaining time than
it was ranked by; its key is settled then, and it goes to a window of static size (`Dims.slack_window`), of which every
step takes the smallest. The next is the better of both; equal ones go by arrival. Beyond the window the run stops with
a fault. O(window) a step, and no approximation, but that keys are whole milliseconds.
"""

from typing import TYPE_CHECKING, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from jaxsim.engine.common import Context, take
from jaxsim.engine.writes import Put, Writes, at
from jaxsim.kernels import packed
from jaxsim.state.requests import PROMPT

if TYPE_CHECKING:
    from jaxsim.engine.touched import Touched

WHOSE, KEY = 0, 1
"""Columns of `World.again`: one more than the request (0: nobody), and its key."""

DUE, PREDICTED = 0, 1
"""Columns of `Requests.slack`: when it is due in milliseconds, and its predicted output tokens."""


class Again(NamedTuple):
    """Those preempted that wait: how many, and the first of them, with its key and its place in the window; and where
    the next one would go, and whether there is room."""

    count: Int[Array, ""]
    request: Int[Array, ""]
    key: Int[Array, ""]
    place: Int[Array, ""]
    free: Int[Array, ""]
    is_full: Bool[Array, ""]


def look(context: Context, rank: Int[Array, ""]) -> Again:
    """The window of a rank."""
    spare = context.dims.slack_window
    entries, is_real = take(context.world.again, rank), jnp.arange(spare + 1) < spare
    is_there = is_real & (entries[:, WHOSE] > 0)
    keys = jnp.where(is_there, entries[:, KEY], packed.EMPTY)
    key = jnp.min(keys)
    whose = jnp.where(is_there & (keys == key), entries[:, WHOSE], packed.EMPTY)
    place, is_free = jnp.argmin(whose).astype(jnp.int32), is_real & ~is_there
    free = jnp.where(jnp.any(is_free), jnp.argmax(is_free), spare).astype(jnp.int32)
    return Again(jnp.sum(is_there), whose[place] - 1, key, place, free, ~jnp.any(is_free))


def is_before(context: Context, again: Again, request: Int[Array, ""]) -> Bool[Array, ""]:
    """Whether a request that never ran goes before all who were preempted."""
    due, predicted = take(context.requests.slack, request)
    key = context.params.slack.key_ms(due, take(context.requests.table, request)[PROMPT], predicted)
    return (again.count == 0) | (key < again.key) | ((key == again.key) & (request < again.request))


def writes(context: Context, t: "Touched") -> tuple[Writes, Bool[Array, ""]]:
    """Who was preempted comes in, who was admitted leaves. Returns whether there was no room, too."""
    dims, again = context.dims, t.again
    due, predicted = take(context.requests.slack, t.victim[1])
    left = jnp.maximum(predicted - t.victim_emitted, 1)
    key = context.params.slack.key_ms(due, t.lengths[PROMPT] + t.victim_emitted, left)
    leaves = t.placed.is_admitted & t.is_again
    place = jnp.where(t.is_preempting, again.free, jnp.where(leaves, again.place, dims.slack_window))
    entry = jnp.stack([jnp.where(t.is_preempting, t.victim[1] + 1, 0), key])
    return {"again": Put(at(dims, "again", t.rank, place), entry)}, t.is_preempting & again.is_full
