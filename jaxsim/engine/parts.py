"""Images encoded on executors of their own: parts of a request, and how their embeddings come to its prompt.

A request with images is dealt out in parts, one an image or all in one. Each is a row of its own behind all requests,
and arrives instead of the request, at an executor that encodes. There it is a prompt of as many blocks as it has tiles,
in a pool that is the multimodal cache: admitted first come first served until one does not fit (sequences, blocks),
computed whole in one iteration, its blocks kept.

When the last part is encoded, an executor that computes prompts is chosen, which has the request as unaccepted. It
accepts as one that decodes does (`jaxsim.engine.hand_over`): whenever somebody joins, a delivery ends or an iteration,
from the front, while tiles of requests accepted and not yet taken by a pass are fewer than a share of its cache and the
request's fit in. Then all parts are accepted at that instant, one a step; each is a transfer of its own, out of where
it was encoded and into here, and frees its blocks there when it ends. With the last the request joins the waiting
queue, as if it arrived. Its tiles stay in the cache until the iteration that completes its prompt ends.

`World.steps_of_parts` counts, for all parts of a request together, the encoded, then the accepted, then the delivered.

Approximated: text is not computed before the last image is there; a request stays with who accepts it; a prompt that
is preempted half way keeps its embeddings.
"""

from dataclasses import replace
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxsim.engine import role_switching
from jaxsim.engine.common import Context, take
from jaxsim.engine.events import Event, chosen_by
from jaxsim.kernels import clock
from jaxsim.state.requests import FIRST_PART, PARENT, PARTS, TILES
from jaxsim.state.world import Counts


class Part(NamedTuple):
    """What a door has to do with a part of the first request not accepted, or of the first in transfer.

    is_kv: nothing, this executor takes KV; is_begun: some of the first request's parts are accepted; is_last: all but
    this one are; row: the part to accept; tiles: of the whole request; parent: of the part to deliver, which completes
    it if is_whole.
    """

    is_kv: Bool[Array, ""]
    is_begun: Bool[Array, ""]
    is_last: Bool[Array, ""]
    row: Int[Array, ""]
    tiles: Int[Array, ""]
    parent: Int[Array, ""]
    is_whole: Bool[Array, ""]


def at_door(context: Context, event: Event, first: Int[Array, ""], coming: Int[Array, ""]) -> Part:
    """first: of those not accepted; coming: the part in transfer that is due first."""
    _, params, requests, world, _ = context
    of_first = take(requests.images, first)
    accepted = take(world.steps_of_parts, first) - of_first[PARTS]
    parent = jnp.maximum(take(requests.images, coming)[PARENT], 0)
    delivered = take(world.steps_of_parts, parent) - 2 * take(requests.images, parent)[PARTS]
    return Part(
        take(params.hand_over.decodes, event.executor), accepted > 0, accepted + 1 == of_first[PARTS],
        of_first[FIRST_PART] + jnp.maximum(accepted, 0), of_first[TILES], parent,
        delivered + 1 == take(requests.images, parent)[PARTS])


def fits(context: Context, event: Event, counts: Counts, tiles: Int[Array, ""]) -> Bool[Array, ""]:
    """Whether the first request not accepted, of so many tiles, would be."""
    encoding, rank = context.params.encoding, counts.rank
    return ((rank.waiting_tiles < take(encoding.most_tiles, event.executor))
            & (tiles <= take(encoding.cache_tiles, event.executor) - rank.cached_tiles))


def with_tiles(counts: Counts, tiles: Int[Array, ""]) -> Counts:
    """So many more in the cache, of a request that waits to be taken by a pass."""
    rank = counts.rank
    return replace(counts, rank=replace(rank, cached_tiles=rank.cached_tiles + tiles,
                                        waiting_tiles=rank.waiting_tiles + tiles))


def is_part(context: Context, row: Int[Array, ""]) -> Bool[Array, ""]:
    """Whether a row is not a request of its own."""
    return take(context.requests.images, row)[PARENT] >= 0


def takes_prompts(context: Context) -> Bool[Array, " executors"]:
    """Who computes prompts."""
    computes = ~context.params.hand_over.decodes & ~context.params.encoding.encodes
    return role_switching.taking(context, computes)


class Encoded(NamedTuple):
    """A part whose encoding has ended in this step, if any: its request (else the scratch row), and, if it was the
    last, where that goes."""

    is_any: Bool[Array, ""]
    parent: Int[Array, ""]
    is_last: Bool[Array, ""]
    target: Int[Array, ""]


def encoded(context: Context, event: Event, row: Int[Array, ""], is_retired: Bool[Array, ""]) -> Encoded:
    """Of a row that has left its batch."""
    dims, params, requests, world, _ = context
    is_any = is_retired & is_part(context, row)
    parent = jnp.where(is_any, take(requests.images, row)[PARENT], dims.num_requests)
    is_last = is_any & (take(world.steps_of_parts, parent) + 1 == take(requests.images, parent)[PARTS])
    target = chosen_by(context, parent, event.now, params.routing, world.num_routed, takes_prompts(context))
    return Encoded(is_any, parent, is_last, target)


def transfer_s(context: Context, row: Int[Array, ""], source: Int[Array, ""], target: Int[Array, ""]
               ) -> Float[Array, ""]:
    """Seconds that the embeddings of a part take on a link of their own, on the clock's grid."""
    hand_over, tiles = context.params.hand_over, take(context.requests.images, row)[TILES].astype(jnp.float32)
    seconds = clock.on_grid(tiles * hand_over.over(context.params.encoding.seconds_per_tile, source, target))
    return seconds if hand_over.pool_of is None else jnp.maximum(seconds, clock.GRID_S)


def placed(context: Context, counts: Counts, request: Int[Array, ""], is_new: Bool[Array, ""],
           is_first_token: Bool[Array, ""]) -> Counts:
    """A pass has taken a request for the first time, or all that is left of its prompt.

    Where an executor encodes images itself it does so with the first tokens of the prompt, whole.
    """
    row = take(context.requests.images, request)
    tiles = jnp.where(row[PARENT] < 0, row[TILES], 0)
    rank, batch = counts.rank, counts.batch
    if context.dims.has_encoder:
        return replace(counts, batch=replace(batch, tiles=batch.tiles + jnp.where(is_new, tiles, 0)))
    rank = replace(rank, waiting_tiles=rank.waiting_tiles - jnp.where(is_new, tiles, 0))
    return replace(counts, rank=rank, batch=replace(batch, tiles=batch.tiles + jnp.where(is_first_token, tiles, 0)))


def encoding_s(context: Context, event: Event, counts: Counts) -> Float[Array, ""]:
    """Seconds that the iteration which was formed encodes images."""
    encoder, tiles = context.params.encoder, counts.batch.tiles
    seconds = take(encoder.base_s, event.executor) + take(encoder.tile_s, event.executor) * tiles.astype(jnp.float32)
    return jnp.where(tiles > 0, seconds, 0.0)
