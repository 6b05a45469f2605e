"""A store that instances share, behind their prefix caches and host memory: what one puts there others may load.

Of a prompt that is admitted, the prefix cache has the first blocks; behind these every block comes from host memory if
that has it, else from the store, up to the first that neither has and at most up to the block before the last token
known. All full blocks of a prompt, or of a chunk of it, are put into the store as the iteration that computes them
ends, and can be loaded from that instant on, by passes at it too; puts cost nothing. What decodes compute is not
stored.

Whatever the store has of a segment is its first blocks, the most that a rank has put. Of each item (`World.stored` says
which there are) every rank keeps how many it had put before the last iteration that put any, how many since, and which
iteration that was: while it goes on, the former are in the store, then the latter. So a put is a write of its own rank,
and a look-up reads one row a rank for each segment of a path.

Where the store holds all that the workload could put there (`Dims.remote_log` = 0) that is all there is to it. Else
room is made for blocks as they are scheduled: whenever a prompt, or a chunk of it, is placed, its segments so far are
touched, the end of it first, and the longest untouched blocks go, whether they are there already or only have room.
They go from the head of a log of touches like that of host memory, before the next prompt is placed anywhere, and no
rank has put them any more.

Source: LMCache's connector for vLLM with a local CPU and a remote backend, and its defaults (`save_decode_cache:
false`). Approximated: puts take no time and no bandwidth; whole blocks are kept, where LMCache keeps chunks of 256
tokens, and touched with all of their segment, the longest run that the same requests share; what is loaded from the
store is in host memory as soon as the request is scheduled.
"""

from dataclasses import replace
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxsim.engine.common import Context, take
from jaxsim.engine.context_reuse import lengthen
from jaxsim.engine.offload import Behind, Evicted, longest_untouched, own_item, reached
from jaxsim.engine.passes import Placed, Plan
from jaxsim.engine.prefix import Found, sums_before
from jaxsim.engine.writes import Put, Writes
from jaxsim.kernels import clock
from jaxsim.kernels.clock import Time
from jaxsim.spec.dims import Dims
from jaxsim.state import world as w
from jaxsim.state.world import Clocks, Counts, World

BEFORE, SINCE, ITERATION = range(3)
"""Columns of `World.puts`: blocks put before the last iteration that put any, and with it; iterations of the executor
before that one. Nothing has ever been put where SINCE is 0."""


BLOCKS, HEAD, END = range(3)
"""Of `World.room`: all blocks for which the store has room, and where its log of touches begins and ends."""


class OwnPuts(NamedTuple):
    """What a rank has put of a request, items and rows of `World.puts`: segments of its path, and what is behind it.

    roomed: blocks for which the store has room; gone: evicted before that, and room: `World.room` since; all None where
    it holds everything.
    """

    items: Int[Array, " entries"]
    rows: Int[Array, "entries 3"]
    roomed: Int[Array, " entries"] | None = None
    gone: Evicted | None = None
    room: Int[Array, " 3"] | None = None


class Puts(NamedTuple):
    """What a step changes of it; the null item where it puts nothing. places: of a log of touches, in the order of
    `items`."""

    items: Int[Array, " entries"]
    rows: Int[Array, "entries 3"]
    roomed: Int[Array, " entries"] | None = None
    places: Int[Array, " entries"] | None = None
    room: Int[Array, " 3"] | None = None


def num_items(dims: Dims) -> int:
    """Rows of `World.puts` of a rank."""
    return dims.num_segments + 2 + dims.num_requests


def rows_of(context: Context, which: Int[Array, "*ranks"], items: Int[Array, " items"]) -> Int[Array, "*ranks items 3"]:
    """Of `World.puts`."""
    return take(context.world.puts, which[..., None] * num_items(context.dims) + items)


def look(context: Context, now: Time, which: Int[Array, ""], is_any: Bool[Array, ""], counts: Counts,
         candidate: Int[Array, ""], known: Int[Array, ""], found: Found, behind: Behind | None
         ) -> tuple[Found, OwnPuts, Bool[Array, ""]]:
    """Settle evictions, then see what host memory and the store together have behind the blocks that the prefix cache
    has of a candidate.

    which: the rank among those of all executors; is_any: whether a prompt may be placed in this step; counts: of the
    rank, as they are now; known: tokens; behind: what host memory has, if there is any. Returns `found` with what is
    loaded, and what of it from the store; what the rank has put; whether all evictions are settled.
    """
    dims, path, is_settled = context.dims, found.path, jnp.bool_(True)
    iteration, is_out = iterations_forming(context, now, which, counts)
    item = own_item(dims, candidate)
    items = jnp.append(path.items, item)
    rows, made = rows_of(context, jnp.arange(dims.num_executors), items), ()
    if dims.remote_log:
        gone, room, owed = evict(context, is_any)
        lost = jnp.sum(jnp.where(gone.items[None, :] == items[:, None], gone.evicted[None, :], 0), axis=1)
        roomed = take(context.world.roomed, items) - lost
        rows = within(rows, roomed)
        made, is_settled = (roomed, gone, room), owed == 0
    there = jnp.max(in_store(rows, iteration[:, None], is_out[:, None]), axis=0)
    remote, own = jnp.where(path.lengths > 0, there[:-1], 0), there[-1]
    if behind is None:
        fetched = loaded = reached(dims, known, found, remote, own)
    else:
        loaded = reached(dims, known, found, jnp.maximum(behind.stored, remote), jnp.maximum(behind.own, own))
        begins, blocks = jnp.append(path.begins, path.end), jnp.append(behind.stored, behind.own)
        ends = jnp.minimum(begins + blocks, found.blocks + loaded)
        fetched = loaded - jnp.sum(jnp.maximum(ends - jnp.maximum(begins, found.blocks), 0))
    return replace(found, loaded=loaded, fetched=fetched), OwnPuts(items, take(rows, which), *made), is_settled


def evict(context: Context, is_any: Bool[Array, ""]) -> tuple[Evicted, Int[Array, " 3"], Int[Array, ""]]:
    """The longest untouched blocks beyond the capacity, as far as a look at the head of the log goes. Returns
    `World.room` after that, and the blocks that remain to be evicted, too."""
    dims, world = context.dims, context.world
    blocks, head, end = world.room
    debt = jnp.where(is_any, blocks - context.group.batching.remote.capacity_blocks, 0)
    gone, num_over, owed = longest_untouched(
        dims.num_segments, debt, is_any, head, end,
        lambda place: take(world.room_touches, place & (dims.remote_log - 1)),
        lambda items: (take(world.room_touched, items), take(world.roomed, items)))
    return gone, jnp.stack([blocks - jnp.sum(gone.evicted), head + num_over, end]), owed


def within(rows: Int[Array, "*ranks items 3"], roomed: Int[Array, " items"]) -> Int[Array, "*ranks items 3"]:
    """What is left of what ranks have put where the store has room for so many blocks."""
    return jnp.stack([jnp.minimum(rows[..., BEFORE], roomed), jnp.minimum(rows[..., SINCE], roomed),
                      rows[..., ITERATION]], axis=-1)


def iterations_forming(context: Context, now: Time, which: Int[Array, ""], counts: Counts
                       ) -> tuple[Int[Array, " ranks"], Bool[Array, " ranks"]]:
    """Of every rank, iterations before the one in flight, or being formed, and whether that is through: the first of a
    jump, which alone computes prompts. `counts` of one rank, whose pass this is."""
    dims, world = context.dims, context.world
    if dims.num_executors == 1:
        return counts.executor.num_iterations[None], jnp.zeros(1, bool)
    batch = w.clock_rows(dims).everything(world.clocks).batch
    end = clock.add(Time(*map(jnp.ravel, batch.start)), Time(*map(jnp.ravel, batch.first)))
    iteration = w.count_rows(dims).everything(world.counts).executor.num_iterations
    is_own = jnp.arange(dims.num_executors) == which
    is_out = (world.phase == w.ENDING) & (end <= now) & ~is_own
    return jnp.where(is_own, counts.executor.num_iterations, iteration), is_out


def in_store(rows: Int[Array, "*shape 3"], iteration: Int[Array, "*shape"], is_out: Bool[Array, "*shape"]
             ) -> Int[Array, "*shape"]:
    """Blocks that are there of what a rank put."""
    is_coming = (rows[..., ITERATION] == iteration) & ~is_out
    return jnp.where(is_coming, rows[..., BEFORE], rows[..., SINCE])


def put(context: Context, counts: Counts, placed: Placed, own: OwnPuts, found: Found, known: Int[Array, ""]
        ) -> tuple[Counts, Puts]:
    """Put what is computed of the prompt that was placed; count what it fetches."""
    dims, rank, path = context.dims, counts.rank, found.path
    computed = jnp.where(placed.is_completing, known, rank.forming_computed)
    filled = jnp.where(placed.slot != dims.null_slot, computed >> dims.block_bits, 0)
    blocks = jnp.append(jnp.clip(filled - path.begins, 0, path.lengths), jnp.maximum(filled - path.end, 0))
    iteration, since = counts.executor.num_iterations, own.rows[:, SINCE]
    before = jnp.where(own.rows[:, ITERATION] == iteration, own.rows[:, BEFORE], since)
    rows = jnp.stack([before, jnp.maximum(since, blocks), jnp.broadcast_to(iteration, since.shape)], axis=-1)
    held = rank.offload
    held = replace(held, fetched_blocks=held.fetched_blocks + jnp.where(placed.is_admitted, found.fetched, 0))
    if not dims.has_offload:
        held = replace(held, loaded_blocks=held.loaded_blocks + jnp.where(placed.is_admitted, found.loaded, 0))
    puts = Puts(jnp.where(blocks > 0, own.items, dims.num_segments), rows)
    if dims.remote_log:
        # The end of the prompt first, as in the order of eviction.
        are_touched = (blocks > 0)[::-1]
        roomed = jnp.maximum(own.roomed, blocks)
        more = jnp.sum(jnp.where(blocks > 0, roomed - own.roomed, 0))
        places = own.room[END] + sums_before(are_touched.astype(jnp.int32))
        puts = puts._replace(roomed=roomed, places=places[::-1],
                             room=own.room + jnp.stack([more, jnp.int32(0), jnp.sum(are_touched)]))
    return replace(counts, rank=replace(rank, offload=held)), puts


def writes(context: Context, which: Int[Array, ""], found: Found, own: OwnPuts, puts: Puts, candidate: Int[Array, ""],
           is_new: Bool[Array, ""]) -> Writes:
    """What a step changes. is_new: the candidate was admitted for the first time."""
    dims, null = context.dims, context.dims.num_segments
    request = jnp.where(is_new, candidate, dims.num_requests)
    index, rows, made = which * num_items(dims) + puts.items, puts.rows, {}
    if dims.remote_log:
        gone, ranks = own.gone, jnp.arange(dims.num_executors)
        is_rewritten = jnp.any(gone.items[:, None] == puts.items[None, :], axis=1)
        is_gone = gone.evicted > 0
        made["roomed"] = Put((jnp.append(puts.items, jnp.where(is_gone & ~is_rewritten, gone.items, null)),),
                             jnp.append(puts.roomed, gone.left))
        # Of all ranks; what this one puts of it now is another write.
        is_theirs = is_gone & ~(is_rewritten & (ranks == which)[:, None])
        others = ranks[:, None] * num_items(dims) + jnp.where(is_theirs, gone.items, null)
        left = within(rows_of(context, ranks, gone.items), gone.left)
        index, rows = jnp.append(index, others), jnp.concatenate([rows, left.reshape(-1, 3)])
        is_entry = puts.items != null
        made["room_touches"] = Put((jnp.where(is_entry, puts.places & (dims.remote_log - 1), dims.remote_log),),
                                   puts.items)
        made["room_touched"] = Put((puts.items,), puts.places)
    made |= {"puts": Put((index,), rows), "fetched": Put((request,), found.fetched << dims.block_bits)}
    if not dims.has_offload:
        made["loaded"] = Put((request,), found.loaded << dims.block_bits)
    return made


def fault(dims: Dims, puts: Puts) -> Int[Array, ""]:
    """A fault bit where there are more touches than the log holds."""
    return jnp.where(puts.room[END] - puts.room[HEAD] > dims.remote_log, w.LOG_FULL, 0)


def begin(context: Context, is_starting: Bool[Array, ""], now: Time, counts: Counts, times: Clocks, plan: Plan
          ) -> tuple[Clocks, Plan, Time | None]:
    """The iteration that starts, with its loads from host memory and from the store; until when the egress of this is
    busy then, if all loads share one."""
    rules, batch, host_s = context.group.batching, counts.batch, jnp.float32(0)
    if rules.offload is not None:
        host_s = rules.offload.seconds(batch.loading - batch.fetching)
    egress = None if context.world.egress is None else Time(*context.world.egress)
    fetching = jnp.where(is_starting, batch.fetching, 0)
    wait, egress = rules.remote.wait(now, fetching, egress)
    first = rules.remote.lengthened(times.batch.first, host_s, fetching, wait)
    return *lengthen(is_starting, first, times, plan), egress


def shifted(world: World, back_s: Float[Array, ""]) -> World:
    """In an epoch that begins later; an egress that was free before it is free at its beginning."""
    moved, zero = clock.shift(Time(*world.egress), back_s), jnp.float32(0)
    return replace(world, egress=jnp.stack(clock.select(moved.hi < 0, Time(zero, zero), moved)))
