"""How loaded every instance is at one instant, for routers and controllers that ask."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jaxsim.engine.common import Context, blocks_for, take
from jaxsim.kernels import bitmap
from jaxsim.policy.loads import Loads
from jaxsim.state import world as w
from jaxsim.state.requests import PROMPT


def pool_sizes(context: Context) -> Int[Array, " ranks"]:
    """KV blocks of every rank."""
    dims = context.dims
    num_blocks = context.params.of_executors(lambda batching: batching.num_blocks)
    return jnp.repeat(jnp.broadcast_to(num_blocks, dims.num_executors), dims.num_ranks)


def loads_of(context: Context, used_blocks: Int[Array, " ranks"]) -> Loads:
    """Of all ranks; used_blocks: what they hold at this instant."""
    dims, _, requests, world, _ = context
    ranks = w.count_rows(dims).everything(world.counts).rank
    heads, waiting, running = ranks.queue.front.ravel(), ranks.waiting.ravel(), ranks.running.ravel()
    if context.params.flags.sorts:
        places = jax.vmap(lambda rank: bitmap.smallest(lambda word: take(world.waiting_set, rank, word),
                                                       dims.num_requests))(jnp.arange(dims.all_ranks))
        heads = take(requests.by_place, jnp.where(waiting > 0, places, 0))
    if ranks.ready is not None:
        running = running + ranks.ready.length.ravel()
    known = take(requests.table, heads)[:, PROMPT] + take(world.progress, heads)[:, 0]
    reserved = None
    if dims.has_urgent:
        reserved = jnp.where(ranks.urgent.ravel() > 0, context.params.headroom_blocks, 0)
    return Loads(
        used_blocks, pool_sizes(context), running, waiting, ranks.waiting_blocks.ravel(),
        jnp.where(waiting > 0, blocks_for(known, dims), 0), reserved,
        killed=None if ranks.killed is None else ranks.killed.ravel())
