"""Preemption by swap: victims move to host memory and return, and priorities may be drawn anew.

Of an engine with the rules of vLLM V0. Who is preempted moves its blocks to host memory; where that has no room, it is
recomputed (V0 itself stops there). In line for a place are those swapped out, by arrival, then those waiting, who is
recomputed in front, or all by a priority that is drawn every so many iterations (`jaxsim.policy.swap`). At the pass of
a draw all that are here are sorted: the longest prefix whose tokens fit the pool, less the watermark, stays or may
come; who runs behind it is swapped out, the last first. A pass is then: prompts while the first in line is one; else
decodes, then those whose copy in is through, then, if nobody lacked a block, those swapped out while they are first and
fit with one block more.

A copy lengthens the iteration that is formed, or, asynchronous, has one of two links, each of which carries one after
the other: the blocks come back at the end of a copy out, and who comes in has its blocks from the start and joins the
pass behind the end. That end cuts a jump; an executor with nothing else to do rests until then; a pass that only called
somebody in is followed by another at once.

Who is in line with KV, and where priorities are drawn everybody in line, has a place in a *window* of static size
(`Dims.swap_window`), which every step looks at as a whole, beside all slots: O(window + slots), also between draws. One
swap a step: the last that runs leaves as long as those up to it do not all fit. Beyond the window the run stops with a
fault.

With `reuse`, host memory also keeps what turns of sessions end with, the last answer included. What has no copy there
is copied out on the link beside iterations, in any case, and holds its blocks and a place of the window until then. The
next turn, if it comes to the same instance, comes back as who is swapped out does, once that copy is through, and
computes what is behind it: in the iteration that its copy lengthens, or asynchronously in the first that begins behind
it, before the line. Where room in host memory lacks, finished turns lose their copies first, the one that ended first
first (the least recently used), then the least urgent that run; a turn that ends takes room only from the former, and
without enough of it is not kept. The copies of sessions that are over go the same way: nobody knows that they are.

Approximated: how long block groups are is a mean field (`jaxsim.policy.swap`); asynchronous copies never wait for
blocks that others are being copied from, since these are not free before; room for what a turn adds is not kept free in
host memory; copies of finished turns do not stand before iterations where others do, nor do those wait for them; blocks
in copies out are held all of them until the end, those with a copy in host memory too.
"""

from dataclasses import replace
from typing import NamedTuple

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxsim.engine import ending
from jaxsim.engine.common import Context, blocks_for, choose, has, mark, take
from jaxsim.engine.events import Event
from jaxsim.engine.passes import Placed, Plan
from jaxsim.engine.slots import Slots
from jaxsim.engine.writes import Add, Put, Writes, at
from jaxsim.kernels import clock, packed
from jaxsim.kernels.clock import Time
from jaxsim.kernels.queues import Link, pop_front, push_back
from jaxsim.policy.swap import ONE_HOLE, Swap
from jaxsim.spec.dims import Dims
from jaxsim.state import world as w
from jaxsim.state.requests import OUTPUT, PROMPT
from jaxsim.state.world import Clocks, Counts, World

EMPTY, WAITING, OUT, COMING, ENDED, CALLED = range(6)
"""What is at a place of the window: nothing, a prompt, who is swapped out (or on the way), who is on the way in; a
finished turn until its copy out is through, and a prompt whose turn before is on the way in."""

REQUEST, STATE, TOKENS, SEQUENCE, SERVED, GROUPS = range(6)
"""Columns of `World.window`. TOKENS with KV, of a prompt all but one of those known; SEQUENCE among arrivals; SERVED:
the number of the draw at which it was on the device, if it left since, else -1; of who comes in the draw since which it
is on the device, as in `ENTERED`; GROUPS, of who is on the way in, only with block groups."""

SWAPS, SECONDS, ARRIVED = 0, 1, 4
"""Columns of `World.swaps`: swaps out, seconds lost to copies (parts as of `clock.to_integers`), arrivals before it."""

CLEAN, ENTERED, RUN = w.RESERVED, 5, 6
"""Columns of `World.slot_entries`: blocks with a copy in host memory; the draw since which it is on the device. The
places of the running order (STAMP) are those of arrival. RUN, only with block groups: as of `pack_groups`."""

RUN_BITS = 12

FAR_S = 1e6
"""Beyond any jump."""


class Sight(eqx.Module):
    """What a step sees of the line.

    entries: places of the window, who arrives in this step included; arrived_at: its place (the spare one if there is
    none); overflows: there was no room. head, coming: places of the first in line and of one whose copy in is through,
    and whether there is any; due: when the next copy is through (`FAR_S` if none is under way). running_keys: order of
    those that run; victim: (slot, request, offset) of the last of them. is_leaving: it is to be swapped out for a draw;
    is_decoded, may_place: decodes of this pass have their blocks; a prompt may be placed. candidate: whom this step is
    about; sequence, served: of the candidate, its order of arrival and whether it counts as served at this draw;
    draw: number of this one; entered: of the candidate, since which draw it is on the device. stood: seconds that
    copies have taken so far. ended_at: the place of the turn that ended in this step (the spare one if none did).
    """

    entries: Int[Array, "places 5"]
    arrived_at: Int[Array, ""]
    overflows: Bool[Array, ""]
    head: Int[Array, ""]
    has_head: Bool[Array, ""]
    is_head_out: Bool[Array, ""]
    is_head_through: Bool[Array, ""]
    coming: Int[Array, ""]
    has_coming: Bool[Array, ""]
    due: Time
    running_keys: Int[Array, " slot_width"]
    victim: tuple[Int[Array, ""], Int[Array, ""], Int[Array, ""]]
    is_leaving: Bool[Array, ""]
    is_decoded: Bool[Array, ""]
    is_joining: Bool[Array, ""]
    may_place: Bool[Array, ""]
    candidate: Int[Array, ""]
    sequence: Int[Array, ""]
    is_served: Bool[Array, ""]
    entered: Int[Array, ""]
    draw: Int[Array, ""]
    stood: Time
    ended_at: Int[Array, ""] | None = None


class Ended(NamedTuple):
    """The turn that ended in this step, if its KV is kept in host memory: its request, its tokens, when its copy out is
    through, and the link of the queue of such copies that changes."""

    is_kept: Bool[Array, ""]
    request: Int[Array, ""]
    tokens: Int[Array, ""]
    due: Time
    link: Link


class Turn(NamedTuple):
    """What host memory has of the candidate.

    tokens, blocks: of the turn before it (0: nothing); before: that turn, the scratch row if there is nothing.
    is_here: it was called, and the copy is through; place: where it is in the window then. is_called: its copy in
    begins; is_blocked: its copy out is under way. is_first: it is the first in line, and not called before.
    """

    tokens: Int[Array, ""]
    blocks: Int[Array, ""]
    before: Int[Array, ""]
    is_here: Bool[Array, ""]
    place: Int[Array, ""]
    is_called: Bool[Array, ""]
    is_blocked: Bool[Array, ""]
    is_first: Bool[Array, ""]


class Moved(NamedTuple):
    """What a step did: the place of the window that changes, and its entry; when the copy there is through; the slot of
    who lost its copy in host memory, and its entry; what is added to the records of the candidate; and whether the
    window was too small. dropped: the finished turn whose copy is gone or used, the scratch row if there is none."""

    place: Int[Array, ""]
    entry: Int[Array, " window_fields"]
    due: Time
    donor: Int[Array, ""]
    donor_entry: Int[Array, " entry_fields"]
    record: Int[Array, " 5"]
    overflows: Bool[Array, ""]
    dropped: Int[Array, ""] | None = None


def sequence_bits(dims: Dims) -> int:
    """Low bits of a key that hold the order of arrival."""
    return packed.index_bits(dims.num_requests + 1)


def _key(dims: Dims, swap: Swap, request, sequence, draw, is_served):
    if not swap.draws:
        return sequence
    return (swap.level(request, draw, is_served) << sequence_bits(dims)) | sequence


def is_first(swap: Swap, counts: Counts, is_first_in_line: Bool[Array, ""]) -> Bool[Array, ""]:
    """Whether an arrival may be first in line; where priorities are drawn any may."""
    return jnp.bool_(True) if swap.draws else is_first_in_line & (counts.rank.swap.out == 0)


def look(context: Context, event: Event, rank: Int[Array, ""], is_passing: Bool[Array, ""], was_closed: Bool[Array, ""],
         counts: Counts, times: Clocks, slots: Slots, ended: Ended | None = None) -> tuple[Counts, Sight]:
    """The line and the running as this step finds them; blocks whose copy out is through are free for a pass."""
    dims, params, requests, world, group = context
    rules, swap, now = group.batching, group.batching.swap, event.now
    entries, due = take(world.window, rank), take(world.copies, rank)
    due = Time(due[:, 0], due[:, 1])
    spare = dims.swap_window
    is_real = jnp.arange(spare + 1) < spare
    arrived_at, overflows = jnp.int32(spare), jnp.bool_(False)
    ended_at = None
    if ended is not None:
        # A place whose copy is through is free again.
        is_over = (entries[:, STATE] == ENDED) & (due <= spread(now, due))
        is_state = jnp.arange(entries.shape[1]) == STATE
        entries = jnp.where(is_over[:, None] & is_state, EMPTY, entries)
        is_free = is_real & (entries[:, STATE] == EMPTY)
        overflows = ended.is_kept & ~jnp.any(is_free)
        ended_at = jnp.where(ended.is_kept & ~overflows, jnp.argmax(is_free), spare).astype(jnp.int32)
        is_own = ((jnp.arange(spare + 1) == ended_at) & is_real)
        entry = [ended.request, jnp.int32(ENDED), ended.tokens, jnp.int32(0), jnp.int32(-1)]
        entries = jnp.where(is_own[:, None], jnp.stack(padded(entry, dims)), entries)
        due = clock.select(is_own, spread(ended.due, due), due)
    if swap.draws:
        is_free = is_real & (entries[:, STATE] == EMPTY)
        is_out_of_room = event.is_arrival & ~jnp.any(is_free)
        overflows = overflows | is_out_of_room
        arrived_at = jnp.where(event.is_arrival & ~is_out_of_room, jnp.argmax(is_free), spare).astype(jnp.int32)
        entry = jnp.stack(padded([event.request, jnp.int32(WAITING), take(requests.table, event.request)[PROMPT] - 1,
                                  world.num_routed, jnp.int32(-1)], dims))
        entries = jnp.where(((jnp.arange(spare + 1) == arrived_at) & is_real)[:, None], entry, entries)
    request, state, tokens, sequence, served = entries.T[:5]
    state = jnp.where(is_real, state, EMPTY)

    is_through = due <= Time(jnp.broadcast_to(now.hi, due.hi.shape), jnp.broadcast_to(now.lo, due.hi.shape))
    is_leaving_now, is_on_the_way = (state == OUT) & ~is_through, state == COMING
    if ended is not None:
        is_leaving_now = is_leaving_now | ((state == ENDED) & ~is_through)
        is_on_the_way = is_on_the_way | (state == CALLED)
    is_under_way = is_leaving_now | is_on_the_way
    first_hi = jnp.min(jnp.where(is_under_way, due.hi, FAR_S))
    first_lo = jnp.min(jnp.where(is_under_way & (due.hi == first_hi), due.lo, jnp.inf))
    next_due = Time(first_hi, jnp.where(first_hi == FAR_S, 0.0, first_lo))
    leaving = jnp.sum(jnp.where(is_leaving_now, blocks_for(tokens, dims), 0))
    own = counts.rank
    leaving = jnp.where(is_passing, leaving, own.swap.leaving_blocks)
    own = replace(own, used_blocks=own.used_blocks + leaving - own.swap.leaving_blocks,
                  swap=replace(own.swap, leaving_blocks=leaving))
    counts = replace(counts, rank=own)

    draw, is_drawing = jnp.int32(0), jnp.bool_(False)
    if swap.draws:
        draw = counts.executor.num_iterations // swap.period
        is_drawing = counts.executor.num_iterations == draw * swap.period
    was_served = jnp.where(is_on_the_way, served < draw, served == draw)
    keys = _key(dims, swap, request, sequence, draw, was_served)
    is_in_line = (state == WAITING) | (state == OUT)
    in_line = jnp.where(is_in_line, keys, packed.EMPTY)
    head = jnp.argmin(in_line).astype(jnp.int32)
    has_head, is_out = jnp.any(is_in_line), state[head] == OUT
    head_request = request[head]
    if not swap.draws:
        head_request = jnp.where(has_head, head_request, own.queue.front)
        is_out, has_head = has_head, has_head | (own.waiting > 0)
    is_here = (state == COMING) & is_through
    coming, has_coming = jnp.argmax(is_here).astype(jnp.int32), jnp.any(is_here)

    runs, slot_entries = slots.is_decoding, slots.entries
    running_keys = _key(dims, swap, slot_entries[:, w.REQUEST], slot_entries[:, w.STAMP], draw,
                        slot_entries[:, ENTERED] < draw)
    running_keys = jnp.where(runs, running_keys, -1)
    victim = jnp.where(jnp.any(runs), jnp.argmax(running_keys), dims.null_slot).astype(jnp.int32)
    is_decoded = has(counts, w.DECODED)
    is_leaving = jnp.bool_(False)
    if swap.draws:
        is_there = state != EMPTY if ended is None else (state != EMPTY) & (state != ENDED)
        all_keys = jnp.concatenate([jnp.where(runs, running_keys, packed.EMPTY),
                                    jnp.where(is_there, keys, packed.EMPTY)])
        needs = jnp.concatenate([blocks_for(slot_entries[:, w.OFFSET] + counts.batch.counter + 1, dims),
                                 blocks_for(tokens + 1, dims)])
        # Those up to the last that runs fit, or it is not among those that stay.
        are_up_to = all_keys <= running_keys[victim]
        is_over = ((jnp.sum(jnp.where(are_up_to, needs, 0)) > rules.num_blocks - rules.watermark_blocks)
                   | (jnp.sum(are_up_to) > rules.max_num_seqs))
        is_leaving = is_passing & is_drawing & ~is_decoded & ~has(counts, w.FILLED) & jnp.any(runs) & is_over
    is_joining = is_passing & is_decoded & has_coming
    may_place = ~is_leaving & ~is_decoded & has_head & ~is_out
    entry = slot_entries[victim]
    place = jnp.where(is_joining, coming, head)
    candidate = jnp.where(is_joining, request[coming], head_request)
    is_prompt_here = None
    if ended is not None:
        # Prompts whose turn before is here, in the order in which they were called: the link has one after the other.
        is_here = (state == CALLED) & is_through
        hi = jnp.where(is_here, due.hi, jnp.inf)
        lo = jnp.where(hi == jnp.min(hi), due.lo, jnp.inf)
        called_at = jnp.argmin(jnp.where(is_here, lo, jnp.inf)).astype(jnp.int32)
        is_prompt_here = is_passing & jnp.any(is_here) & ~is_leaving & ~is_decoded & ~was_closed
        place = jnp.where(is_prompt_here, called_at, place)
        candidate = jnp.where(is_prompt_here, request[called_at], candidate)
    candidate = jnp.where((is_passing & was_closed & ~is_decoded) | is_leaving, entry[w.REQUEST], candidate)
    own_sequence = jnp.where(event.is_arrival & (candidate == event.request), world.num_routed,
                             take(world.swaps, candidate)[ARRIVED])
    # Who was on the device at the draw and left since is as it was.
    is_served = was_served[place] if swap.draws else jnp.bool_(False)
    is_back = is_joining if is_prompt_here is None else is_joining | is_prompt_here
    entered = jnp.where(is_back, served[place], draw - is_served)
    is_head_through = is_through[head]
    turn = None
    if ended is not None:
        turn = find_turn(context, rank, counts, candidate, is_prompt_here, place, is_passing & may_place & ~was_closed,
                         request, (state == ENDED) & ~is_through)
        may_place = is_prompt_here | (may_place & ((turn.tokens == 0) | ~(swap.is_async | turn.is_blocked)))
    return counts, Sight(
        entries, arrived_at, overflows, head, has_head, is_out, is_head_through, coming, has_coming, next_due,
        running_keys, (victim, entry[w.REQUEST], entry[w.OFFSET]), is_leaving, is_decoded, is_joining, may_place,
        candidate, own_sequence, is_served, entered, draw, times.rank.swap.stood, ended_at), turn


def spread(time: Time, like: Time) -> Time:
    """One instant in as many entries."""
    return Time(jnp.broadcast_to(time.hi, like.hi.shape), jnp.broadcast_to(time.lo, like.lo.shape))


def padded(entry: list[Int[Array, ""]], dims: Dims) -> list[Int[Array, ""]]:
    """An entry of the window, without groups."""
    return entry + [jnp.int32(0)] if dims.has_block_groups else entry


def find_turn(context: Context, rank: Int[Array, ""], counts: Counts, candidate: Int[Array, ""],
              is_here: Bool[Array, ""], place: Int[Array, ""], may_begin: Bool[Array, ""],
              request: Int[Array, " places"], is_leaving: Bool[Array, " places"]) -> Turn:
    """What is kept for the candidate. may_begin: it is the first in line, a prompt, and it is its turn to be placed;
    request, is_leaving: of the window, and which of them are turns whose copy out is under way."""
    dims, _, requests, world, group = context
    before = take(requests.before, candidate)
    has_before = before >= 0
    before = jnp.where(has_before, before, dims.num_requests)
    is_kept = has_before & (take(world.kept, before) == rank + 1)
    lengths = take(requests.table, before)
    tokens = jnp.where(is_here | is_kept, lengths[PROMPT] + lengths[OUTPUT] - 1, 0)
    is_blocked = is_kept & jnp.any(is_leaving & (request == before))
    is_first = may_begin & ~is_here
    known = take(requests.table, candidate)[PROMPT]
    is_called = (is_first & is_kept & ~is_blocked & group.batching.swap.is_async
                 & fits(context, counts, blocks_for(known, dims)))
    return Turn(tokens, blocks_for(tokens, dims), jnp.where(tokens > 0, before, dims.num_requests), is_here, place,
                is_called, is_blocked, is_first)


def leave(context: Context, event: Event, rank: Int[Array, ""], counts: Counts, times: Clocks, retired: ending.Retired,
          used_before: Int[Array, ""]) -> tuple[Counts, Clocks, Ended | None]:
    """Host memory as somebody's last token is out: its copy there goes, or is kept for the turn that follows.

    used_before: blocks in use with its own.
    """
    dims, _, _, world, group = context
    swap, own, now = group.batching.swap, counts.rank.swap, event.now
    entry = take(world.slot_entries, rank, retired.slot)
    clean, blocks = jnp.where(retired.is_any, entry[CLEAN], 0), blocks_for(retired.tokens, dims)
    if dims.has_block_groups:
        own = replace(own, holes=jnp.where(retired.is_any, given_back(context, own, used_before, blocks, entry[RUN]),
                                           own.holes))
    if not dims.keeps_turns:
        own = replace(own, host_blocks=own.host_blocks - clean)
        return replace(counts, rank=replace(counts.rank, swap=own)), times, None
    lacking = blocks - clean
    is_kept = (retired.is_any & swap.reuse & (retired.request != dims.num_requests)
               & (lacking <= swap.host_blocks - own.host_blocks + own.turn_blocks))
    length = clock.on_grid(swap.seconds(lacking, run_of(entry, dims)))
    link_out = times.rank.swap.link_out
    due = clock.add(clock.select(link_out < now, now, link_out), length)
    turns, link = push_back(own.turns, retired.request, is_kept, dims.num_requests)
    held = jnp.where(is_kept & (now < due), blocks, 0)
    own = replace(
        own, host_blocks=own.host_blocks + jnp.where(is_kept, lacking, -clean), turns=turns,
        turn_blocks=own.turn_blocks + jnp.where(is_kept, blocks, 0), leaving_blocks=own.leaving_blocks + held,
        copied_blocks=own.copied_blocks + jnp.where(is_kept, lacking, 0),
        spared_blocks=own.spared_blocks + jnp.where(is_kept, clean, 0))
    counts = replace(counts, rank=replace(counts.rank, swap=own, used_blocks=counts.rank.used_blocks + held))
    state = replace(times.rank.swap, link_out=clock.select(is_kept, due, link_out))
    return counts, replace(times, rank=replace(times.rank, swap=state)), Ended(
        is_kept, retired.request, retired.tokens, due, link)


def is_over_full(context: Context, counts: Counts) -> Bool[Array, ""]:
    """Turns that ended are kept, and the copies they displace are not dropped yet."""
    return counts.rank.swap.host_blocks > context.group.batching.swap.host_blocks


def drop_first(context: Context, rank: Int[Array, ""], counts: Counts, condition: Bool[Array, ""]
               ) -> tuple[Counts, Int[Array, ""]]:
    """The finished turn that ended first loses its copy, if it still has one; which is for another step to go on with.
    Returns it, the scratch row if there is none. Nobody ends in such a step."""
    dims, _, requests, world, _ = context
    own = counts.rank.swap
    first = jnp.where(own.turns.length > 0, own.turns.front, dims.num_requests)
    condition = condition & (own.turns.length > 0)
    lengths = take(requests.table, first)
    is_there = condition & (take(world.kept, first) == rank + 1)
    given = jnp.where(is_there, blocks_for(lengths[PROMPT] + lengths[OUTPUT] - 1, dims), 0)
    own = replace(own, turns=pop_front(own.turns, take(world.next_kept, first), condition),
                  host_blocks=own.host_blocks - given, turn_blocks=own.turn_blocks - given)
    return (replace(counts, rank=replace(counts.rank, swap=own)),
            jnp.where(condition, first, dims.num_requests))


def pack_groups(run: Int[Array, ""], groups: Int[Array, ""]) -> Int[Array, ""]:
    """How long the block groups of a request were when it came, and how many."""
    return (groups << RUN_BITS) | run


def run_of(entry: Int[Array, " entry_fields"], dims: Dims) -> Int[Array, ""] | None:
    """Blocks that lie in a row, of who has this entry of the slots; None without block groups."""
    return jnp.maximum(entry[RUN] & ((1 << RUN_BITS) - 1), 1) if dims.has_block_groups else None


def given_back(context: Context, own: w.SwapCounts, used: Int[Array, ""], blocks: Int[Array, ""],
               groups: Int[Array, ""]) -> Int[Array, ""]:
    """Holes beyond the first once a request gives its blocks back. used: blocks in use, its own among them."""
    rules = context.group.batching
    run = jnp.maximum(groups & ((1 << RUN_BITS) - 1), 1)
    holes = rules.swap.given(own.holes + ONE_HOLE, rules.num_blocks - used, rules.num_blocks, blocks, run,
                             groups >> RUN_BITS)
    return holes - ONE_HOLE


def make_room(context: Context, is_preempting: Bool[Array, ""], counts: Counts, slots: Slots, sight: Sight,
              rank_index: Int[Array, ""]
              ) -> tuple[Bool[Array, ""], Bool[Array, ""], Int[Array, ""], Counts, Int[Array, ""] | None]:
    """Host memory for the victim. Returns whether it is preempted in this step, whether by swap, and who loses its copy
    in host memory instead (the null slot if nobody does), which is for another step to go on with; last the finished
    turn that does, before anybody who runs."""
    dims, _, _, _, group = context
    swap, rank = group.batching.swap, counts.rank
    slot = sight.victim[0]
    lacking = blocks_for(sight.victim[2] + counts.batch.counter, dims) - slots.entries[slot, CLEAN]
    is_short = lacking > swap.host_blocks - rank.swap.host_blocks
    may_give = slots.is_decoding & (slots.entries[:, CLEAN] > 0) & (jnp.arange(dims.slot_width) != slot)
    dropped = None
    if dims.keeps_turns:
        is_forgetting = is_preempting & is_short & (rank.swap.turns.length > 0)
        counts, dropped = drop_first(context, rank_index, counts, is_forgetting)
        rank, is_preempting = counts.rank, is_preempting & ~is_forgetting
    is_dropping = is_preempting & is_short & jnp.any(may_give)
    donor = jnp.argmax(jnp.where(may_give, sight.running_keys, -1)).astype(jnp.int32)
    given = jnp.where(is_dropping, slots.entries[donor, CLEAN], 0)
    rank = replace(rank, swap=replace(rank.swap, host_blocks=rank.swap.host_blocks - given))
    is_preempting = is_preempting & ~is_dropping
    return (is_preempting, is_preempting & ~is_short, jnp.where(is_dropping, donor, dims.null_slot),
            replace(counts, rank=rank), dropped)


def move_out(context: Context, event: Event, is_preempting: Bool[Array, ""], is_swapped: Bool[Array, ""],
             donor: Int[Array, ""], before: Counts, counts: Counts, times: Clocks, slots: Slots, sight: Sight,
             link: Link, own_link: Link, dropped: Int[Array, ""] | None = None
             ) -> tuple[Counts, Clocks, Link, Moved]:
    """A victim that `passes.preempt` has put back into the queue: to host memory instead, if it is swapped.

    before: the counts without that; dropped: as of `make_room`.
    """
    dims, _, _, world, group = context
    swap, rank, state, now = group.batching.swap, counts.rank, times.rank.swap, event.now
    slot, request, offset = sight.victim
    tokens, clean = offset + before.batch.counter, slots.entries[slot, CLEAN]
    blocks = blocks_for(tokens, dims)
    length = clock.on_grid(swap.seconds(blocks - clean, run_of(slots.entries[slot], dims)))
    if dims.has_block_groups:
        holes = given_back(context, rank.swap, before.rank.used_blocks, blocks, slots.entries[slot, RUN])
        rank = replace(rank, swap=replace(rank.swap, holes=jnp.where(is_preempting, holes, rank.swap.holes)))
    link_out = state.link_out
    begin = clock.select(link_out < now, now, link_out)
    through = clock.add(begin, length)
    is_async = is_swapped & swap.is_async
    is_sync = is_swapped & ~swap.is_async
    due = clock.select(is_async, through, now)
    held = jnp.where(is_async & (now < due), blocks, 0)
    change = jnp.where(is_swapped, blocks - clean, jnp.where(is_preempting, -clean, 0))
    rank = replace(
        rank, queue=choose(is_swapped, before.rank.queue, rank.queue), used_blocks=rank.used_blocks + held,
        swap=replace(rank.swap, out=rank.swap.out + is_swapped, leaving_blocks=rank.swap.leaving_blocks + held,
                     host_blocks=rank.swap.host_blocks + change,
                     copied_blocks=rank.swap.copied_blocks + jnp.where(is_swapped, blocks - clean, 0),
                     spared_blocks=rank.swap.spared_blocks + jnp.where(is_swapped, clean, 0)))
    state = replace(state, link_out=clock.select(is_async, through, link_out),
                    delay=choose(is_sync, clock.add(state.delay, length), state.delay))
    times = replace(times, rank=replace(times.rank, swap=state))
    link = choose(is_preempting & ~is_swapped, own_link, link)

    # Into the window: who is swapped, and where the line is there, who is recomputed.
    is_in = is_preempting if swap.draws else is_swapped
    is_free = (sight.entries[:, STATE] == EMPTY) & (jnp.arange(dims.swap_window + 1) < dims.swap_window)
    overflows = is_in & ~jnp.any(is_free)
    place = jnp.where(is_in & ~overflows, jnp.argmax(is_free), dims.swap_window).astype(jnp.int32)
    was_served = slots.entries[slot, ENTERED] < sight.draw
    entry = jnp.stack(padded([request, jnp.where(is_swapped, OUT, WAITING), tokens, slots.entries[slot, w.STAMP],
                              jnp.where(was_served, sight.draw, -1)], dims))
    donor_entry = jnp.where(jnp.arange(slots.entries.shape[1]) == CLEAN, 0, slots.entries[donor])
    record = jnp.where(jnp.arange(5) == SWAPS, is_swapped.astype(jnp.int32), 0)
    return replace(counts, rank=rank), times, link, Moved(
        place, entry, due, donor, donor_entry, record, overflows, dropped)


def fits(context: Context, counts: Counts, blocks: Int[Array, ""]) -> Bool[Array, ""]:
    """Whether one more with so many blocks may come."""
    rules, rank = context.group.batching, counts.rank
    return ((rules.num_blocks - rank.used_blocks - blocks >= rules.watermark_blocks)
            & (rank.running + rank.swap.coming < rules.max_num_seqs))


def may_return(context: Context, counts: Counts, sight: Sight) -> Bool[Array, ""]:
    """Whether the first in line is to come back now."""
    blocks = blocks_for(sight.entries[sight.head, TOKENS], context.dims) + 1
    return (sight.is_head_out & sight.is_head_through & ~has(counts, w.PREEMPTED) & fits(context, counts, blocks))


def bring_in(context: Context, event: Event, is_passing: Bool[Array, ""], counts: Counts, times: Clocks,
             residue_row: Int[Array, " block_size"], placed: Placed, moved: Moved, sight: Sight,
             lengths: Int[Array, " 4"], emitted: Int[Array, ""], preempted_s: Float[Array, ""],
             free_slot: Int[Array, ""], turn: Turn | None = None, next_head: Int[Array, ""] | None = None,
             used_before: Int[Array, ""] | None = None
             ) -> tuple[Counts, Clocks, Int[Array, " block_size"], Placed, Moved, Bool[Array, ""]]:
    """Start a copy in for the first in line, or let somebody join whose copy is through. A prompt that was placed
    leaves the window. Returns whether either happened too.

    next_head: behind the first in the queue; used_before: blocks in use before a prompt was placed.
    """
    dims, _, _, world, group = context
    swap, rank, state, now = group.batching.swap, counts.rank, times.rank.swap, event.now
    is_joining = sight.is_joining
    is_returning = is_passing & sight.is_decoded & ~sight.has_coming & may_return(context, counts, sight)
    place = jnp.where(is_joining, sight.coming, sight.head)
    tokens = sight.entries[place, TOKENS]
    blocks, room = blocks_for(tokens, dims), blocks_for(tokens + 1, dims)
    is_coming, is_found, is_begun, is_called = is_returning, False, jnp.bool_(False), False
    if turn is not None:
        # Of a prompt, the turn before it.
        is_called, is_found = turn.is_called, placed.is_admitted & ~turn.is_here & (turn.tokens > 0)
        is_coming, is_begun = is_returning | is_called | is_found, placed.is_admitted & (turn.tokens > 0)
        copied = jnp.where(is_returning, blocks, turn.blocks)
        room = jnp.where(is_called, blocks_for(lengths[PROMPT], dims), room)
    else:
        copied = blocks
    run = groups = None
    if dims.has_block_groups:
        own, is_taking = rank.swap, is_coming | (placed.is_admitted if turn is None else placed.is_admitted
                                                 & ~turn.is_here)
        wanted = jnp.where(placed.is_admitted, blocks_for(lengths[PROMPT] + emitted, dims), room)
        used = jnp.where(placed.is_admitted, used_before, rank.used_blocks)
        holes, run, number = swap.taken(own.holes + ONE_HOLE, group.batching.num_blocks - used, wanted)
        rank = replace(rank, swap=replace(own, holes=jnp.where(is_taking, holes - ONE_HOLE, own.holes)))
        groups = pack_groups(run, number)
    length = clock.on_grid(swap.seconds(copied, run))
    is_async, is_sync = is_coming & swap.is_async, is_coming & ~swap.is_async
    joins = is_joining | (is_returning & ~swap.is_async)
    one = joins.astype(jnp.int32)
    link_in = state.link_in
    due = clock.add(clock.select(link_in < now, now, link_in), length)
    kept = jnp.where(swap.reuse, tokens >> dims.block_bits, 0)
    used = rank.used_blocks + jnp.where(is_returning | is_called, room, 0)
    if turn is not None:
        own, full = rank.swap, turn.tokens >> dims.block_bits
        own = replace(own, coming=own.coming - (is_begun & turn.is_here),
                      host_blocks=own.host_blocks - jnp.where(is_begun, turn.blocks - full, 0),
                      turn_blocks=own.turn_blocks - jnp.where(is_called | is_found, turn.blocks, 0))
        rank = replace(rank, swap=own, queue=pop_front(rank.queue, next_head, is_called))
        moved = moved._replace(dropped=jnp.where(is_called | is_found, turn.before, moved.dropped))
    rank = replace(
        rank, used_blocks=used, peak_blocks=jnp.maximum(rank.peak_blocks, used), running=rank.running + one,
        swap=replace(rank.swap, out=rank.swap.out - is_returning,
                     coming=rank.swap.coming + is_async.astype(jnp.int32) - is_joining,
                     host_blocks=rank.swap.host_blocks - one * (blocks - kept)))
    state = replace(state, link_in=clock.select(is_async, due, link_in),
                    delay=choose(is_sync, clock.add(state.delay, length), state.delay))
    # It decodes in this very iteration, and its block for that is here.
    batch = counts.batch
    offset = tokens - batch.counter
    batch = replace(batch, count=batch.count + one, offsets=batch.offsets + one * offset,
                    entering=batch.entering + one, resuming=batch.resuming + one)
    residue_row = residue_row + one * (jnp.arange(dims.block_size) == (offset & (dims.block_size - 1)))
    counts = mark(Counts(counts.executor, rank, batch), is_returning | is_called, w.DRAWN)
    resume_s = times.batch.resume_s + jnp.where(joins, preempted_s, 0.0)
    times = replace(times, rank=replace(times.rank, swap=state), batch=replace(times.batch, resume_s=resume_s))

    key = packed.pack_key(batch.counter + (lengths[OUTPUT] - emitted), free_slot, dims.slot_bits)
    slot = jnp.where(joins, free_slot, dims.null_slot)
    more = []
    if dims.has_block_groups:
        is_back = is_joining if turn is None else is_joining | turn.is_here
        more = [jnp.where(is_back, sight.entries[place if turn is None else jnp.where(
            turn.is_here, turn.place, place), GROUPS], groups)]
    entry = jnp.stack([sight.candidate, offset, kept, lengths[PROMPT], sight.sequence, sight.entered, *more])
    own = Placed(joins, joins, jnp.bool_(False), sight.candidate, slot, key, entry)
    clean = jnp.int32(0) if turn is None else jnp.where(is_begun, turn.tokens >> dims.block_bits, 0)
    prompt_entry = jnp.concatenate([placed.entry[:w.RESERVED], jnp.stack([
        clean, lengths[PROMPT], sight.sequence, sight.entered, *more])])
    leaves_line = joins | (placed.is_admitted if swap.draws else False)
    column = jnp.arange(sight.entries.shape[1])
    on_its_way = COMING
    if turn is not None:
        leaves_line = leaves_line | (placed.is_admitted & turn.is_here)
        place = jnp.where(turn.is_here, turn.place, place)
        on_its_way = jnp.where(is_called, CALLED, COMING)
    line_entry, is_full = sight.entries[place], jnp.bool_(False)
    if turn is not None and not swap.draws:
        # Who waits is not in the window.
        is_free = (sight.entries[:, STATE] == EMPTY) & (jnp.arange(dims.swap_window + 1) < dims.swap_window)
        is_full = is_called & ~jnp.any(is_free)
        place = jnp.where(is_called, jnp.where(is_full, dims.swap_window, jnp.argmax(is_free)), place).astype(jnp.int32)
        new = jnp.stack(padded([sight.candidate, jnp.int32(CALLED), lengths[PROMPT] - 1, sight.sequence,
                                sight.entered], dims))
        line_entry = jnp.where(is_called, new, line_entry)
    placed = choose(joins, own, placed._replace(entry=prompt_entry))
    is_changed = leaves_line | is_async
    changed = jnp.where(column != STATE, line_entry, jnp.where(leaves_line, EMPTY, on_its_way))
    changed = jnp.where(is_async & (column == SERVED), sight.entered, changed)
    if dims.has_block_groups:
        changed = jnp.where(is_async & (column == GROUPS), groups, changed)
    parts, zero = clock.to_integers(world.epoch, now), jnp.zeros(1, jnp.int32)
    is_in = is_joining if turn is None else is_joining | (is_begun & turn.is_here)
    waited = jnp.where(is_in, parts, jnp.where(is_async, -parts, 0))
    moved = Moved(
        jnp.where(is_changed, place, moved.place), jnp.where(is_changed, changed, moved.entry),
        clock.select(is_changed, due, moved.due), moved.donor, moved.donor_entry,
        moved.record + jnp.concatenate([zero, waited, zero]), moved.overflows | is_full, moved.dropped)
    return counts, times, residue_row, placed, moved, is_returning | is_joining | is_called


def is_held(context: Context, counts: Counts, sight: Sight, is_blocked: Bool[Array, ""], known: Int[Array, ""],
            turn: Turn | None = None) -> Bool[Array, ""]:
    """Whether the first in line can come only after an event; is_blocked: not known here, so no. known: its tokens."""
    dims = context.dims
    if turn is not None:
        is_waiting = turn.is_first & turn.is_blocked
        return (~(is_blocked | turn.is_here | turn.is_called)
                & (is_waiting | is_held(context, counts, sight, is_blocked, known)))
    blocks = jnp.where(sight.is_head_out, blocks_for(sight.entries[sight.head, TOKENS], dims) + 1,
                       blocks_for(known, dims))
    return ~is_blocked & (~fits(context, counts, blocks) | (sight.is_head_out & ~sight.is_head_through))


def begin(context: Context, is_starting: Bool[Array, ""], counts: Counts, times: Clocks, plan: Plan, sight: Sight
          ) -> tuple[Counts, Clocks, Plan]:
    """The iteration that starts, behind its copies; its jump ends at a draw, or when a copy is through."""
    swap, state = context.group.batching.swap, times.rank.swap
    delay = state.delay
    first = clock.add(times.batch.first, delay)
    extra = counts.batch.extra
    if swap.draws:
        over = counts.executor.num_iterations - sight.draw * swap.period
        extra = jnp.minimum(extra, swap.period - 1 - over)
    started = replace(times, batch=replace(times.batch, first=first), rank=replace(times.rank, swap=replace(
        state, stood=clock.add(state.stood, delay), delay=Time(jnp.float32(0), jnp.float32(0)))))
    cut, end = ending.cut_jump(sight.due, replace(counts, batch=replace(counts.batch, extra=extra)), started)
    plan = plan._replace(first_end=clock.add(plan.first_end, delay), end=end)
    return choose(is_starting, cut, counts), choose(is_starting, started, times), plan


def writes(context: Context, event: Event, rank: Int[Array, ""], retired: Int[Array, ""], placed: Placed,
           moved: Moved, sight: Sight, candidate: Int[Array, ""], finished: Ended | None = None,
           turn: Turn | None = None) -> Writes:
    """What a step changes of the window and the records of requests. retired: who left, the scratch row if nobody."""
    dims, world = context.dims, context.world
    spare, scratch = dims.swap_window, dims.num_requests
    # One that is placed in the step of its arrival was never in line.
    arrived_at = jnp.where(moved.place == sight.arrived_at, spare, sight.arrived_at)
    stood = clock.to_integers(jnp.int32(0), sight.stood)
    zero = jnp.zeros(1, jnp.int32)
    arrival = jnp.concatenate([zero, -stood, world.num_routed[None]])
    ended = jnp.concatenate([zero, stood, zero])
    owners = jnp.stack([jnp.where(event.is_arrival, event.request, scratch), retired, candidate])
    turns, places, dues = {}, [arrived_at, moved.place], [jnp.stack(moved.due)]
    entries = [sight.entries[sight.arrived_at], moved.entry]
    if finished is not None:
        places, entries = [*places, sight.ended_at], [*entries, sight.entries[sight.ended_at]]
        dues = [*dues, jnp.stack(finished.due)]
        found = jnp.where(placed.is_admitted & (turn.tokens > 0), candidate, scratch)
        turns = {
            "kept": Put((jnp.stack([jnp.where(finished.is_kept, finished.request, scratch), moved.dropped]),),
                        jnp.stack([rank + 1, jnp.int32(0)])),
            "next_kept": Put(finished.link[:1], finished.link[1]),
            "cached": Put((found,), turn.tokens)}
    return turns | {
        "window": Put(at(dims, "window", rank, jnp.stack(places)), jnp.stack(entries)),
        "copies": Put(at(dims, "copies", rank, jnp.stack(places[1:])), jnp.stack(dues)),
        "swaps": Add((owners,), jnp.stack([arrival, ended, moved.record])),
        "slot_entries": Put(at(dims, "slot_entries", rank, jnp.stack([placed.slot, moved.donor])),
                            jnp.stack([placed.entry, moved.donor_entry])),
    }


def shifted(world: World, back_s: Float[Array, ""]) -> World:
    """Copies in an epoch that begins later; what lies before it is over, whenever it was."""
    moved = over_at_most(Time(world.copies[..., 0], world.copies[..., 1]), back_s)
    return replace(world, copies=jnp.stack(moved, axis=-1))


def links_shifted(times: w.SwapTimes, back_s: Float[Array, ""]) -> w.SwapTimes:
    """The same of the links."""
    return replace(times, link_out=over_at_most(times.link_out, back_s), link_in=over_at_most(times.link_in, back_s))


def over_at_most(times: Time, back_s: Float[Array, ""]) -> Time:
    """Shifted times, none of them before the epoch."""
    moved = clock.shift(times, jnp.broadcast_to(back_s, times.hi.shape))
    nothing = jnp.zeros_like(moved.hi)
    return clock.select(moved.hi < 0, Time(nothing, nothing), moved)
