"""What routers may know of prompts and of the instances' caches: compiled only for a router that reads it.

* `reads_cache`: what each instance has of the prompt that arrives, exactly what it would find if it were admitted now.
  One walk over the prompt's segments for all instances. Evictions of a jump under way are settled before: an arrival
  that meets more of them than one look at the head of a log covers waits for steps that settle them, at its instant.
* `reads_sent`: a router's own tree of what it sent where, with no word from the instances. A prompt enters it whole
  when it is sent. Known gap: the tree forgets nothing, so a workload that outgrows it is refused.
* `reads_prefill`: prompt tokens of requests that were sent to an instance and have no first token yet, less what was
  cached of them when they were sent.
"""

from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from jaxsim.engine import prefix
from jaxsim.engine.common import Context, take
from jaxsim.engine.writes import Put, Writes, at
from jaxsim.kernels import clock
from jaxsim.kernels.clock import Time
from jaxsim.state import world as w
from jaxsim.state.requests import PROMPT
from jaxsim.state.world import Counts


class Caches(NamedTuple):
    """Of the prompt that arrives at every rank: tokens in its cache, whether evictions there are still to be settled,
    tokens of it that were sent there before, tokens of all that was, and of prompts on their way to a first token."""

    cached_tokens: Int[Array, " ranks"] | None
    is_owing: Bool[Array, " ranks"] | None
    used_blocks: Int[Array, " ranks"] | None
    matched_tokens: Int[Array, " ranks"] | None
    tree_tokens: Int[Array, " ranks"] | None
    prefill_tokens: Int[Array, " ranks"] | None


class Met(NamedTuple):
    """Of a step: whether it settles evictions of its rank instead of an arrival, blocks in use there; of the request
    that arrives, prompt tokens not cached where it goes, its segments and the blocks of them that are sent there, by
    how much the tree grows."""

    is_settling: Bool[Array, ""] | None
    used: Int[Array, ""] | None
    uncached: Int[Array, ""] | None
    items: Int[Array, " path"] | None
    blocks: Int[Array, " path"] | None
    growth: Int[Array, ""] | None


def are_read(context: Context) -> bool:
    """Whether the router asks for any of it."""
    dims, routing = context.dims, context.params.routing
    return dims.all_ranks > 1 and bool(
        routing.reads_cache or routing.reads_sent or routing.reads_prefill)


def look(context: Context, request: Int[Array, ""], now: Time, used: Int[Array, " ranks"]) -> Caches:
    """At a request's arrival; used: blocks in use at every rank by then."""
    dims, params, requests, world, _ = context
    routing, ranks = params.routing, jnp.arange(dims.all_ranks)
    path, prompt = prefix.path_of(context, request), take(requests.table, request)[PROMPT]
    counts = w.count_rows(dims).everything(world.counts)
    cached = is_owing = matched = tree = prefill = None
    if routing.reads_cache:
        num_blocks = params.of_executors(lambda batching: batching.num_blocks)
        num_blocks = jnp.repeat(jnp.broadcast_to(num_blocks, dims.num_executors), dims.num_ranks)
        # The last token of a prompt is always computed.
        limit = (prompt - 1) >> dims.block_bits

        def found(which, cache, free):
            gone = prefix.evictions(context, which, cache, free, jnp.bool_(True))
            resident = take(world.resident, which, path.items) - prefix.gone_of(path, gone)
            return jnp.sum(prefix.reached(path, resident, limit)), gone.owed > 0

        blocks, is_owing = jax.vmap(found)(ranks, jax.tree.map(jnp.ravel, counts.rank.cache), num_blocks - used)
        cached = blocks << dims.block_bits
    if routing.reads_sent:
        blocks = world.sent_blocks[:, path.items]
        sent = jax.vmap(lambda row: prefix.reached(path, row, prompt >> dims.block_bits))(blocks)
        matched, tree = jnp.sum(sent, axis=1) << dims.block_bits, counts.rank.tree_tokens.ravel()
    if routing.reads_prefill:
        batches = w.clock_rows(dims).everything(world.clocks).batch
        is_over = (counts.batch.is_committed == 0) & (clock.add(batches.start, batches.first) <= now)
        prefill = counts.rank.prefill_tokens - jnp.sum(jnp.where(is_over, counts.batch.joining_prefill, 0), axis=-1)
        prefill = prefill.ravel()
    return Caches(cached, is_owing, used, matched, tree, prefill)


def at_rank(context: Context, caches: Caches, request: Int[Array, ""], rank: Int[Array, ""],
            is_settling: Bool[Array, ""] | None) -> Met:
    """What the step is to know of it, which sends the request to a rank or settles evictions there."""
    dims = context.dims
    prompt = take(context.requests.table, request)[PROMPT]
    uncached = items = blocks = growth = None
    if caches.prefill_tokens is not None:
        uncached = prompt - (0 if caches.cached_tokens is None else take(caches.cached_tokens, rank))
    if caches.matched_tokens is not None:
        path = prefix.path_of(context, request)
        items, blocks = path.items, jnp.clip((prompt >> dims.block_bits) - path.begins, 0, path.lengths)
        growth = prompt - take(caches.matched_tokens, rank)
    return Met(is_settling, None if is_settling is None else take(caches.used_blocks, rank), uncached, items, blocks,
               growth)


def receive(met: Met, is_arrival: Bool[Array, ""], counts: Counts) -> Counts:
    """The accounts of the rank that a request is sent to."""
    rank = counts.rank
    if met.uncached is not None:
        rank = replace(rank, prefill_tokens=rank.prefill_tokens + jnp.where(is_arrival, met.uncached, 0))
    if met.growth is not None:
        rank = replace(rank, tree_tokens=rank.tree_tokens + jnp.where(is_arrival, met.growth, 0))
    return replace(counts, rank=rank)


def charge_of(context: Context, met: Met | None, arriving: Int[Array, ""], candidate: Int[Array, ""]
              ) -> Int[Array, ""]:
    """A request's part of `Rank.prefill_tokens`; it may be the one that arrives in this very step."""
    charged = take(context.world.charged, candidate)
    return charged if met is None else jnp.where(candidate == arriving, met.uncached, charged)


def writes(context: Context, met: Met, request: Int[Array, ""], is_arrival: Bool[Array, ""], rank: Int[Array, ""]
           ) -> Writes:
    """What a step changes of what routers keep."""
    dims, found = context.dims, {}
    if met.uncached is not None:
        found["charged"] = Put((jnp.where(is_arrival, request, dims.num_requests),), met.uncached)
    if met.items is not None:
        before = take(context.world.sent_blocks, rank, met.items)
        items = jnp.where(is_arrival & (met.blocks > 0), met.items, dims.num_segments)
        found["sent_blocks"] = Put(at(dims, "sent_blocks", rank, items), jnp.maximum(before, met.blocks))
    return found
