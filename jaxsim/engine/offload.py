"""Host memory behind the prefix cache of an instance: blocks that the device has dropped are loaded, not computed.

Of a prompt that is admitted, the prefix cache has the first blocks (`jaxsim.engine.prefix`); what host memory has right
behind these is loaded, up to the block before the last token known. Loaded blocks are the request's own from then on,
as computed ones are. Each time a prompt, or a chunk of it, is placed, all full blocks of it so far are in host memory
and touched, its end first; stores overlap with iterations and cost nothing. What decodes compute is not stored. The
iteration in which a request is admitted carries its load, and those of all admitted in it one after the other
(`jaxsim.policy.offload`).

`stored` says of every segment, and of what each request has behind its path, how many first blocks are there. Where
host memory holds all that the workload could store (`Dims.offload_log` = 0) that is all there is to it. Else the
longest untouched go first, block by block: a log of touches, in which only the newest entry of an item counts, as of
the prefix cache; evictions are settled from its head before a prompt is placed, `LOOKS` entries a step.

Source: LMCache's connector for vLLM with its defaults (`save_decode_cache: false`), which loads in the iteration that
first schedules a request; the order of eviction is that of vLLM's `OffloadingConnector`, which touches a prompt from
its end to its start. Approximated: a prompt placed later in a pass finds what an earlier one of the same pass stored;
whole blocks are kept, where LMCache keeps chunks of 256 tokens; stores never wait for the link, nor do loads for them.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from jaxsim.engine.common import Context, take
from jaxsim.engine.context_reuse import lengthen
from jaxsim.engine.passes import Placed, Plan
from jaxsim.engine.prefix import LOOKS, Found, Path, sums_before
from jaxsim.engine.writes import Put, Writes, at
from jaxsim.spec.dims import Dims
from jaxsim.state import world as w
from jaxsim.state.world import Clocks, Counts, Rank


class Evicted(NamedTuple):
    """What a look at the head of the log of touches evicted: items, blocks of each, and blocks that are left of it."""

    items: Int[Array, " looks"]
    evicted: Int[Array, " looks"]
    left: Int[Array, " looks"]


class Behind(NamedTuple):
    """What host memory has of a request: blocks of each segment of its path, and behind the path (`own`, an item of its
    own). evicted: before that; None where all is kept."""

    path: Path
    stored: Int[Array, " path"]
    own: Int[Array, ""]
    own_item: Int[Array, ""]
    evicted: Evicted | None


class Kept(NamedTuple):
    """What a step stores: items (the null one where there is nothing), their blocks, and of a log of touches the place
    of each; tokens that the request loads."""

    items: Int[Array, " entries"]
    stored: Int[Array, " entries"]
    places: Int[Array, " entries"] | None
    loaded_tokens: Int[Array, ""]


def own_item(dims: Dims, request: Int[Array, ""]) -> Int[Array, ""]:
    """The item of what a request has behind its path."""
    return dims.num_segments + 1 + request


def look(context: Context, which: Int[Array, ""], rank: Rank, is_any: Bool[Array, ""], candidate: Int[Array, ""],
         known: Int[Array, ""], found: Found) -> tuple[Rank, Found, Behind, Bool[Array, ""]]:
    """Settle evictions, then see what is behind the blocks that the prefix cache has of a candidate.

    which: the rank among those of all executors; is_any: whether a prompt may be placed in this step; known: tokens.
    Returns the rank, `found` with what is to be loaded, what host memory has, and whether all evictions are settled.
    """
    dims, world, path = context.dims, context.world, found.path
    stored = jnp.where(path.lengths > 0, take(world.stored, which, path.items), 0)
    item, gone, is_settled = own_item(dims, candidate), None, jnp.bool_(True)
    own = take(world.stored, which, item)
    if dims.offload_log:
        rank, gone, owed = evict(context, which, rank, is_any)
        stored = stored - jnp.sum(jnp.where(gone.items[None, :] == path.items[:, None], gone.evicted[None, :], 0), 1)
        own, is_settled = own - jnp.sum(jnp.where(gone.items == item, gone.evicted, 0)), owed == 0
    loaded = reached(dims, known, found, stored, own)
    return rank, replace(found, loaded=loaded), Behind(path, stored, own, item, gone), is_settled


def reached(dims: Dims, known: Int[Array, ""], found: Found, stored: Int[Array, " path"], own: Int[Array, ""]
            ) -> Int[Array, ""]:
    """Blocks from the first that the prefix cache lacks to the first that is not stored either. stored: of the segments
    of the path; own: behind it."""
    path = found.path
    ends, last = path.begins + path.lengths, path.end + own
    is_gap = (ends > found.blocks) & (stored < path.lengths)
    there = jnp.minimum(jnp.min(jnp.where(is_gap, path.begins + stored, last)), last)
    there = jnp.minimum(there, (known - 1) >> dims.block_bits)
    return jnp.maximum(there - found.blocks, 0)


def evict(context: Context, which: Int[Array, ""], rank: Rank, is_any: Bool[Array, ""]
          ) -> tuple[Rank, Evicted, Int[Array, ""]]:
    """The longest untouched blocks beyond the capacity, as far as a look at the head of the log goes. Returns the
    blocks that remain to be evicted, too."""
    dims, world, held = context.dims, context.world, rank.offload
    debt = jnp.where(is_any, held.stored_blocks - context.group.batching.offload.capacity_blocks, 0)
    gone, num_over, owed = longest_untouched(
        dims.num_segments, debt, is_any, held.head, held.end,
        lambda place: take(world.touches, which, place & (dims.offload_log - 1)),
        lambda items: (take(world.touched, which, items), take(world.stored, which, items)))
    stored_blocks = held.stored_blocks - jnp.sum(gone.evicted)
    held = replace(held, head=held.head + num_over, stored_blocks=stored_blocks)
    return replace(rank, offload=held), gone, owed


def longest_untouched(null_item: int, debt: Int[Array, ""], is_any: Bool[Array, ""], head: Int[Array, ""],
                      end: Int[Array, ""], touches_at: Callable, state_of: Callable
                      ) -> tuple[Evicted, Int[Array, ""], Int[Array, ""]]:
    """So many blocks of a log of touches from its head on, as far as a look goes. touches_at: items at places of it;
    state_of: newest places of items, and their blocks. Returns what is evicted, how many entries are over with it, and
    the blocks that remain to be evicted."""
    debt = jnp.maximum(debt, 0)
    place = head + jnp.arange(LOOKS)
    is_written = place < end
    items = touches_at(place)
    items = jnp.where(is_written, items, null_item)
    newest, blocks = state_of(items)
    is_valid = is_written & (newest == place)
    content = jnp.where(is_valid, blocks, 0)
    evicted = jnp.clip(debt - sums_before(content), 0, content)
    is_over = (evicted == content) & is_written & is_any
    num_over = jnp.sum((is_over & (sums_before((~is_over).astype(jnp.int32)) == 0)).astype(jnp.int32))
    return Evicted(items, evicted, content - evicted), num_over, debt - jnp.sum(evicted)


def keep(context: Context, counts: Counts, placed: Placed, behind: Behind, found: Found, known: Int[Array, ""]
         ) -> tuple[Counts, Kept]:
    """Store and touch what is computed of the prompt that was placed; count what it loads."""
    dims, rank, path = context.dims, counts.rank, behind.path
    is_placed = placed.slot != dims.null_slot
    computed = jnp.where(placed.is_completing, known, rank.forming_computed)
    filled = jnp.where(is_placed, computed >> dims.block_bits, 0)
    stored = jnp.maximum(behind.stored, jnp.clip(filled - path.begins, 0, path.lengths))
    own = jnp.maximum(behind.own, filled - path.end)
    # The end of the prompt first, as in the order of eviction.
    are_touched = jnp.append((filled > path.end), ((filled > path.begins) & (path.lengths > 0))[::-1])
    items = jnp.where(are_touched, jnp.append(behind.own_item, path.items[::-1]), dims.num_segments)
    loaded = jnp.where(placed.is_admitted, found.loaded, 0)
    held = replace(rank.offload, loaded_blocks=rank.offload.loaded_blocks + loaded,
                   stored_blocks=rank.offload.stored_blocks + jnp.sum(stored - behind.stored) + own - behind.own)
    places = None
    if dims.offload_log:
        places = held.end + sums_before(are_touched.astype(jnp.int32))
        held = replace(held, end=held.end + jnp.sum(are_touched))
    kept = Kept(items, jnp.append(own, stored[::-1]), places, found.loaded << dims.block_bits)
    return replace(counts, rank=replace(rank, offload=held)), kept


def writes(context: Context, which: Int[Array, ""], behind: Behind, kept: Kept, candidate: Int[Array, ""],
           is_new: Bool[Array, ""]) -> Writes:
    """What a step changes. is_new: the candidate was admitted for the first time."""
    dims, items, stored, made = context.dims, kept.items, kept.stored, {}
    if dims.offload_log:
        gone, places = behind.evicted, kept.places
        is_rewritten = jnp.any(gone.items[:, None] == items[None, :], axis=1)
        evicted = jnp.where((gone.evicted > 0) & ~is_rewritten, gone.items, dims.num_segments)
        items, stored = jnp.append(items, evicted), jnp.append(stored, gone.left)
        is_entry = kept.items != dims.num_segments
        where = jnp.where(is_entry, places & (dims.offload_log - 1), dims.offload_log)
        made = {"touches": Put(at(dims, "touches", which, where), kept.items),
                "touched": Put(at(dims, "touched", which, kept.items), places)}
    return made | {
        "stored": Put(at(dims, "stored", which, items), stored),
        "loaded": Put((jnp.where(is_new, candidate, dims.num_requests),), kept.loaded_tokens)}


def begin(context: Context, is_starting: Bool[Array, ""], counts: Counts, times: Clocks, plan: Plan
          ) -> tuple[Clocks, Plan]:
    """The iteration that starts, with its loads."""
    first = context.group.batching.offload.lengthened(times.batch.first, counts.batch.loading)
    return lengthen(is_starting, first, times, plan)


def fault(dims: Dims, counts: Counts) -> Int[Array, ""]:
    """A fault bit where there are more touches than the log holds."""
    held = counts.rank.offload
    return jnp.where(held.end - held.head > dims.offload_log, w.LOG_FULL, 0)
