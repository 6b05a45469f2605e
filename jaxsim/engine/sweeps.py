"""Whose KV is on an instance that goes down, among those whom others are to decode: a walk over the queues of these.

A request whose prompt is computed stands, until its KV is through, in a queue of the instance that is to decode it, and
nothing says of an instance whose KV it keeps. So where one goes down that keeps KV for any of them, the two queues
of others are turned round once, one request a step, until it keeps none: the first leaves, and joins again behind all
others unless its KV is lost. All of that is at one instant, behind deliveries and ends of iterations, so nobody sees
them half turned.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from jaxsim.engine.common import Context, take
from jaxsim.state import world as w

EXECUTOR, UNACCEPTED, IN_TRANSFER, LOST = range(4)
"""Columns of `World.sweep`: whose queues are turned, or were last; how many of each are still to come; how many of them
were lost so far."""


class Sweep(NamedTuple):
    """The next request of a queue to be looked at: whether there is one, where, and `World.sweep` before it."""

    is_any: Bool[Array, ""]
    executor: Int[Array, ""]
    unaccepted: Int[Array, ""]
    in_transfer: Int[Array, ""]
    lost: Int[Array, ""]


def coming(context: Context, failing: Int[Array, ""]) -> Sweep:
    """What comes next where `failing` goes down."""
    dims, _, _, world, _ = context
    row, here = world.sweep, jnp.arange(dims.num_executors)
    unaccepted = world.unaccepted[:-1, 2]
    ranks = w.count_rows(dims).everything(world.counts).rank
    in_transfer = ranks.in_transfer.length.ravel()
    # Blocks that it keeps for somebody, but those given back since its last step.
    keeps_any = take(ranks.kept_blocks.ravel(), failing) > take(world.returned, failing)
    is_within = row[UNACCEPTED] + row[IN_TRANSFER] > 0
    are_next = keeps_any & (here > row[EXECUTOR]) & (here != failing) & (unaccepted + in_transfer > 0)
    executor = jnp.where(is_within, row[EXECUTOR], jnp.argmax(are_next)).astype(jnp.int32)
    return Sweep(is_within | jnp.any(are_next), executor,
                 jnp.where(is_within, row[UNACCEPTED], take(unaccepted, executor)),
                 jnp.where(is_within, row[IN_TRANSFER], take(in_transfer, executor)),
                 jnp.where(is_within, row[LOST], 0))
