"""Prefix caching as vLLM V1 does it, in segments of blocks that the same requests share.

A request's prompt is a path of segments (`jaxsim.workload.segments`). Of a segment the first `resident` blocks are in
memory, and `references` running requests hold it; what nobody holds stays until it is evicted. Blocks are evicted in
the order in which they were released, those of one release from the end of its prompt to the start, and what a request
computed behind its path (its *tail*: partial blocks, output) before these. That order is a log of items, segments and
tails; an entry counts if it is the item's newest and nobody holds the item, so that a hit needs no search. Evictions
are settled before a look-up: as many blocks as were taken from the free ones since, from the head of the log on.

A tail can be hit again by its own request, after a preemption. Paths of sessions go on through the answers: of those
blocks a release notes what has been computed, and the next turn finds it. Source: vllm-project/vllm, `vllm/v1/core`
(`BlockPool`, `KVCacheManager.get_computed_blocks`, `get_num_blocks_to_allocate`). Approximated: a second copy of a
block, which only a wholly cached prompt of whole blocks makes, is hit by nobody; blocks that a request leaves behind
where it is preempted for the third time go to the front of that order.
"""

from dataclasses import replace
from typing import NamedTuple

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from jaxsim.engine.common import Context, blocks_for, take
from jaxsim.engine.writes import Add, Put, Writes, at
from jaxsim.spec.dims import Dims
from jaxsim.state.world import Cache, Rank

LOOKS = 8
"""Entries of the log that a step looks at."""


class Path(NamedTuple):
    """The segments of a request's prompt, the first block of each and their lengths, and where the last ends."""

    items: Int[Array, " path"]
    begins: Int[Array, " path"]
    lengths: Int[Array, " path"]
    end: Int[Array, ""]


class Release(eqx.Module):
    """What a request gives back: blocks that nobody holds any more, and the entries of the log they become.

    resident, has_grown: of sessions, what of the path is in memory, and which segments have more of it than when the
    prompt was placed: those of the answer.
    """

    path: Path
    is_owned: Bool[Array, " path"]
    freed: Int[Array, ""]
    request: Int[Array, ""]
    items: Int[Array, " entries"]
    is_entry: Bool[Array, " entries"]
    first: Int[Array, ""]
    tail: Int[Array, ""]
    num_keyed: Int[Array, ""]
    resident: Int[Array, " path"] | None = None
    has_grown: Bool[Array, " path"] | None = None

    @property
    def num_entries(self) -> Int[Array, ""]:
        """Entries appended to the log."""
        return jnp.sum(self.is_entry)


class Found(eqx.Module):
    """What a look-up found, and what was evicted before it.

    blocks: cached ones; revived: those of them that nobody held; least: blocks that admission needs whatever is evicted
    until then; owned: blocks of the path that the request shares, if it is admitted. evicted: item and blocks left.
    loaded: blocks that come from host memory behind those found, if there is any (`jaxsim.engine.offload`); fetched: of
    these the ones that come from a store that instances share (`jaxsim.engine.remote_store`).
    """

    path: Path
    resident: Int[Array, " path"]
    blocks: Int[Array, ""]
    revived: Int[Array, ""]
    least: Int[Array, ""]
    owned: Int[Array, ""]
    tail_item: Int[Array, ""]
    tail_left: Int[Array, ""]
    tail_hit: Int[Array, ""]
    evicted_items: Int[Array, " looks"]
    evicted_left: Int[Array, " looks"]
    is_evicted: Bool[Array, " looks"]
    loaded: Int[Array, ""] | None = None
    fetched: Int[Array, ""] | None = None


def path_of(context: Context, request: Int[Array, ""]) -> Path:
    """Of a request; segments that it does not have are the null segment, of no blocks."""
    bounds = take(context.requests.bounds, request)
    return Path(take(context.requests.paths, request), bounds[:-1], bounds[1:] - bounds[:-1], bounds[-1])


def tail_of(dims: Dims, request: Int[Array, ""], preemptions: Int[Array, ""]) -> Int[Array, ""]:
    """The item of what a request leaves behind its path; by turns, as the last one may not be evicted yet."""
    return dims.num_segments + 1 + 2 * request + (preemptions & 1)


WIDE = 16
"""Entries that are summed pairwise; longer rows in pieces of so many."""


def sums_before(values: Int[Array, " n"]) -> Int[Array, " n"]:
    """Sums of what stands before each entry."""
    size = values.shape[0]
    if size > WIDE:
        pieces = jnp.pad(values, (0, -size % WIDE)).reshape(-1, WIDE)
        whole = sums_before(jnp.sum(pieces, axis=1))
        return (whole[:, None] + _sums_before(pieces)).reshape(-1)[:size]
    return _sums_before(values)


def _sums_before(values: Int[Array, "*rows n"]) -> Int[Array, "*rows n"]:
    index = jnp.arange(values.shape[-1])
    return jnp.sum(jnp.where(index[None, :] < index[:, None], values[..., None, :], 0), axis=-1)


def release(context: Context, which: Int[Array, ""], rank: Rank, request: Int[Array, ""], is_any: Bool[Array, ""],
            tokens: Int[Array, ""], preemptions: Int[Array, ""]) -> tuple[Rank, Release]:
    """Give back what a request holds that has computed `tokens`; `which` rank among those of all executors.

    Returns the rank with its account of free blocks (`used_blocks` apart).
    """
    dims, world = context.dims, context.world
    path = path_of(context, request)
    resident = take(world.resident, which, path.items)
    owned = take(world.shared, request)[0]
    is_owned = is_any & (path.begins < owned) & (path.lengths > 0)
    is_freed = is_owned & (take(world.references, which, path.items) == 1)
    keyed = tokens >> dims.block_bits
    grown = {}
    if context.requests.successor is not None:
        # The path goes on through the answer, whose blocks the next turn may find.
        filled = jnp.where(is_owned, jnp.clip(keyed - path.begins, 0, path.lengths), 0)
        grown = dict(resident=jnp.maximum(resident, filled), has_grown=filled > resident)
        resident = grown["resident"]
    tail = jnp.where(is_any, blocks_for(tokens, dims) - jnp.minimum(keyed, owned), 0)
    freed = jnp.sum(jnp.where(is_freed, resident, 0)) + tail
    item = tail_of(dims, request, preemptions)
    forgotten = jnp.where(is_any & (preemptions > 1), take(world.resident, which, item), 0)
    items = jnp.concatenate([item[None], path.items[::-1]])
    is_entry = jnp.concatenate([(tail > 0)[None], (is_freed & (resident > 0))[::-1]])
    cache = rank.cache
    made = Release(path, is_owned, freed, jnp.where(is_any, request, dims.num_requests), items, is_entry, cache.end,
                   tail, jnp.maximum(keyed - path.end, 0), **grown)
    cache = replace(
        cache, never_used=cache.never_used + forgotten, released=cache.released + freed - forgotten,
        end=cache.end + made.num_entries,
        shared=cache.shared - jnp.where(is_any, blocks_for(tokens, dims) - freed, 0))
    return replace(rank, cache=cache), made


class Evictions(NamedTuple):
    """Evictions settled by a look at the head of the log: the cache's account after them, the items looked at, blocks
    evicted of each and those it had, and blocks that remain to be evicted."""

    cache: Cache
    items: Int[Array, " looks"]
    evicted: Int[Array, " looks"]
    content: Int[Array, " looks"]
    owed: Int[Array, ""]


def evictions(context: Context, which: Int[Array, ""], cache: Cache, free: Int[Array, ""], is_any: Bool[Array, ""],
              num_unwritten: Int[Array, ""] | int = 0) -> Evictions:
    """What taking blocks until `free` are left has evicted; num_unwritten: entries that the log does not have yet."""
    dims, world = context.dims, context.world
    debt = jnp.where(is_any, cache.never_used + cache.released - free, 0)
    from_new = jnp.minimum(cache.never_used, debt)
    debt = debt - from_new
    place = cache.head + jnp.arange(LOOKS)
    is_written = place < cache.end - num_unwritten
    items = take(world.log, which, place & (dims.log_size - 1))
    items = jnp.where(is_written, items, dims.num_segments)
    is_held = take(world.references, which, jnp.minimum(items, dims.num_segments)) > 0
    is_valid = is_written & (take(world.newest, which, items) == place) & ~is_held
    content = jnp.where(is_valid, take(world.resident, which, items), 0)
    evicted = jnp.clip(debt - sums_before(content), 0, content)
    is_over = (evicted == content) & is_written & is_any
    num_over = jnp.sum((is_over & (sums_before((~is_over).astype(jnp.int32)) == 0)).astype(jnp.int32))
    cache = replace(cache, never_used=cache.never_used - from_new, released=cache.released - jnp.sum(evicted),
                    head=cache.head + num_over)
    return Evictions(cache, items, evicted, content, debt - jnp.sum(evicted))


def gone_of(path: Path, found: Evictions) -> Int[Array, " path"]:
    """Blocks evicted of each segment of a path."""
    return jnp.sum(jnp.where(found.items[None, :] == path.items[:, None], found.evicted[None, :], 0), axis=1)


def reached(path: Path, blocks: Int[Array, " path"], limit: Int[Array, ""]) -> Int[Array, " path"]:
    """Of the blocks of each segment that are there, those from the start to the first that is not, up to a limit."""
    is_reached = sums_before((blocks < path.lengths).astype(jnp.int32)) == 0
    hit = jnp.where(is_reached, jnp.minimum(blocks, path.lengths), 0)
    return jnp.where(path.begins < limit, jnp.minimum(hit, limit - path.begins), 0)


def look_up(context: Context, which: Int[Array, ""], rank: Rank, is_trying: Bool[Array, ""],
            candidate: Int[Array, ""], known: Int[Array, ""], budget: Int[Array, ""], preemptions: Int[Array, ""],
            released: Release, used: Int[Array, ""] | None = None) -> tuple[Rank, Found, Bool[Array, ""]]:
    """Settle evictions, then find the candidate's blocks; `released` is what this step gives back before.

    used: blocks in use, where this is not what the rank's account says, in the midst of a jump.

    Returns the rank, what was found, and whether all evictions are settled: if not, another step must go on.
    """
    dims, world, cache = context.dims, context.world, rank.cache
    used = rank.used_blocks if used is None else used
    gone = evictions(context, which, cache, context.group.batching.num_blocks - used, is_trying, released.num_entries)
    cache, items, evicted, content, debt = gone.cache, gone.items, gone.evicted, gone.content, gone.owed

    path = path_of(context, candidate)
    resident = take(world.resident, which, path.items) - gone_of(path, gone)
    # A segment stands at the same place in all paths.
    returned = (released.path.items == path.items) & released.is_owned
    references = take(world.references, which, path.items) - returned
    limit = (known - 1) >> dims.block_bits
    is_broken = resident < path.lengths
    is_reached = sums_before(is_broken.astype(jnp.int32)) == 0
    hit = jnp.where(is_reached, jnp.minimum(resident, path.lengths), 0)
    is_whole = jnp.sum(hit) == path.end
    hit = jnp.where(path.begins < limit, jnp.minimum(hit, limit - path.begins), 0)
    was_owned, num_keyed = take(world.shared, candidate)
    owned = jnp.where(is_whole, jnp.minimum(path.end, limit), path.end)
    tail_item = tail_of(dims, candidate, preemptions - 1)
    tail = jnp.where(preemptions > 0, take(world.resident, which, tail_item), 0)
    tail = tail - jnp.sum(jnp.where(items == tail_item, evicted, 0))
    own = jnp.minimum(tail - jnp.maximum(path.end - was_owned, 0), jnp.minimum(num_keyed, limit - path.end))
    own = jnp.where(is_whole & (preemptions > 0), jnp.maximum(own, 0), 0)
    held = jnp.sum(jnp.where(references > 0, hit, 0))
    revived = jnp.sum(jnp.where(references > 0, 0, hit)) + own
    least = blocks_for(jnp.minimum(known - (held << dims.block_bits), budget), dims)
    found = Found(path, resident, jnp.sum(hit) + own, revived, least, owned, tail_item, tail - own, own, items,
                  content - evicted, evicted > 0)
    return replace(rank, cache=cache), found, debt == 0


def admit(rank: Rank, found: Found, is_admitted: Bool[Array, ""]) -> Rank:
    """What was found leaves the blocks that nobody holds."""
    cache = rank.cache
    cache = replace(cache, released=cache.released - jnp.where(is_admitted, found.revived, 0),
                    shared=cache.shared + jnp.where(is_admitted, found.blocks - found.revived, 0))
    return replace(rank, cache=cache)


def writes(context: Context, which: Int[Array, ""], found: Found, released: Release, candidate: Int[Array, ""],
           is_placed: Bool[Array, ""], is_admitted: Bool[Array, ""], is_new: Bool[Array, ""],
           computed: Int[Array, ""]) -> Writes:
    """What a step changes; `computed` are the candidate's tokens once what was placed of it is.

    is_new: it was admitted for the first time.
    """
    dims, world = context.dims, context.world
    null, scratch = dims.num_segments, dims.num_requests
    path = found.path
    owned = jnp.where(is_admitted, found.owned, take(world.shared, candidate)[0])
    is_own = is_placed & (path.begins < owned) & (path.lengths > 0)
    filled = jnp.clip((computed >> dims.block_bits) - path.begins, 0, path.lengths)
    own_items = jnp.where(is_own, path.items, null)
    tail_item = jnp.where(is_admitted & (found.tail_hit > 0), found.tail_item, null)
    is_rewritten = jnp.any(found.evicted_items[:, None] == own_items[None, :], axis=1)
    is_rewritten = is_rewritten | (found.evicted_items == tail_item)
    evicted = jnp.where(found.is_evicted & ~is_rewritten, found.evicted_items, null)
    is_release = released.request != scratch
    left = jnp.where(is_release, released.items[0], null)
    places = released.first + sums_before(released.is_entry.astype(jnp.int32))
    entries = jnp.where(released.is_entry, released.items, null)

    def own(name, index):
        return at(dims, name, which, index)

    items = [own_items, evicted, tail_item[None], left[None]]
    resident = [jnp.maximum(found.resident, filled), found.evicted_left, found.tail_left[None], released.tail[None]]
    if released.has_grown is not None:
        items.append(jnp.where(released.has_grown, released.path.items, null))
        resident.append(released.resident)
    return {
        "resident": Put(own("resident", jnp.concatenate(items)), jnp.concatenate(resident)),
        "references": Add(own("references", jnp.concatenate([jnp.where(is_admitted, own_items, null),
                                                             jnp.where(released.is_owned, released.path.items, null)])),
                          jnp.concatenate([(is_own & is_admitted).astype(jnp.int32),
                                           -released.is_owned.astype(jnp.int32)])),
        "log": Put(own("log", jnp.where(released.is_entry, places & (dims.log_size - 1), dims.log_size)),
                   released.items),
        "newest": Put(own("newest", entries), places),
        "shared": Put((jnp.stack([jnp.where(is_admitted, candidate, scratch), released.request], -1),),
                      jnp.stack([jnp.stack([found.owned, jnp.int32(0)]),
                                 jnp.stack([take(world.shared, released.request)[0], released.num_keyed])])),
        "cached": Put((jnp.where(is_new, candidate, scratch),), found.blocks << dims.block_bits),
    }
