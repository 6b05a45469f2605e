"""Prompts that are partly computed side by side, and the line of those that wait.

A rank has a small table of partly computed prompts (`Dims.num_partial`); `Rank.forming_*` is the view of the one that a
step works on, and between passes that of the first there is, so the rest of the engine goes on knowing a single one;
`forming_chunk` is that of the last chunk, of whomever, from which the next one's is guessed. Every step of a pass looks
at one prompt: the first by the order (`jaxsim.policy.partial_prefills`) of those partly computed that have
had no turn in this pass, and of those that wait. What does not fit:

* A partly computed prompt for which there is no time or no token left goes without a chunk in this batch.
* A long one that waits lets short ones pass where only time lacks; no other long one follows in this batch.
* Any other that waits closes the line for this batch: nobody passes it, partly computed ones go on.

Relative slack changes with time, and from prompt to prompt at another pace. So every step asks anew, of a line of
static size (`Dims.line_window`): O(line + table) a step, and a fault where more wait. While somebody waits who could
have a place, iterations are steps. All blocks of a request are taken as it begins, so that nobody is preempted.
The linked queue of a rank only counts who waits. Nobody is at its front, so routers and controllers that ask what the
first of a queue needs (`jaxsim.engine.loads`) are refused.
"""

from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxsim.engine.common import Context, choose, has, mark, take
from jaxsim.engine.writes import Put, Writes, at
from jaxsim.kernels import clock, packed
from jaxsim.kernels.clock import Time
from jaxsim.policy.arrivals import relative_to
from jaxsim.policy.partial_prefills import MOST_PARTS, PARTS, PartialPrefills
from jaxsim.state import world as w
from jaxsim.state.requests import PROMPT
from jaxsim.state.world import Counts, PartialPrompts, Rank

if TYPE_CHECKING:
    from jaxsim.engine.chunks import Sized
    from jaxsim.engine.passes import Placed
    from jaxsim.engine.touched import Touched

WHOSE, TOKENS, WORK = range(3)
"""Columns of `World.line`: one more than the request (0: nobody), its prompt tokens, and its work."""

_PART_BITS = PARTS.bit_length() - 1


class Others(NamedTuple):
    """Prompts beside the chosen one that could have a turn: partly computed ones and waiting ones, short and long."""

    partial: Int[Array, " 2"]
    waiting: Int[Array, " 2"]


class Chosen(NamedTuple):
    """Who has its turn in this step, if anybody: a partly computed prompt of a row of the table, or one of a place in
    line; whether it is long, and up to when its chunk may fill the iteration. others: of those that could have one.
    free: place for who arrives, entry and due: its own there; is_full: there is none."""

    is_any: Bool[Array, ""]
    is_partial: Bool[Array, ""]
    row: Int[Array, ""]
    place: Int[Array, ""]
    request: Int[Array, ""]
    is_long: Bool[Array, ""]
    target_s: Float[Array, ""]
    others: Others
    free: Int[Array, ""]
    entry: Int[Array, " 3"]
    due: Float[Array, " 3"]
    is_full: Bool[Array, ""]


def due_of(rule: PartialPrefills, arrival: Float[Array, "*shape 3"], base: Int[Array, "*shape"],
           work: Int[Array, "*shape"]) -> Float[Array, "*shape 3"]:
    """Deadlines (epoch, hi, lo) of prompts that arrive then, with their own limits in parts."""
    limit, epoch = rule.limit(base, work), arrival[..., 0]
    seconds, fine = (limit >> _PART_BITS).astype(jnp.float32), (limit & (PARTS - 1)).astype(jnp.float32) / PARTS
    due = clock.add(clock.add(Time(arrival[..., 1], arrival[..., 2]), seconds), fine)
    return jnp.stack([epoch, due.hi, due.lo], axis=-1)


def parts_left(context: Context, due: Float[Array, "*shape 3"], now: Time) -> Int[Array, "*shape"]:
    """Until deadlines, to the nearest part, from between two to the later one."""
    until = clock.add(relative_to(context.world.epoch, tuple(jnp.moveaxis(due, -1, 0))), Time(-now.hi, -now.lo))
    # What is behind the point, and the rest of the time, are few bits: their sum is exact.
    parts = jnp.clip(until.hi * PARTS, -2.0 * MOST_PARTS, 2.0 * MOST_PARTS - 256.0)
    whole = jnp.floor(parts)
    fine = jnp.floor((parts - whole) + until.lo * PARTS + 0.5)
    return jnp.clip(whole.astype(jnp.int32) + fine.astype(jnp.int32), -MOST_PARTS, MOST_PARTS)


def stacked(partial: PartialPrompts) -> PartialPrompts:
    """Columns of the table as arrays."""
    return PartialPrompts(*(jnp.stack(column) for column in (
        partial.slot, partial.request, partial.computed, partial.known, partial.had_turn)), partial.had_long)


def unstacked(partial: PartialPrompts) -> PartialPrompts:
    """The table as a row of scalars."""
    return PartialPrompts(*(tuple(column) for column in (
        partial.slot, partial.request, partial.computed, partial.known, partial.had_turn)), partial.had_long)


def has_row(rank: Rank, null_slot: int) -> Bool[Array, ""]:
    """Whether another prompt may be partly computed."""
    return jnp.any(jnp.stack(rank.partial.slot) == null_slot)


def begin(context: Context, t: "Touched", is_passing: Bool[Array, ""], counts: Counts) -> tuple[Counts, Chosen]:
    """Choose whose turn it is, with its view in `Rank.forming_*`. counts: of a pass that has begun; `t` has those
    before."""
    dims, _, requests, world, group = context
    rule, event, null = group.batching.partial, t.event, dims.null_slot
    rows = stacked(counts.rank.partial)
    is_fresh = is_passing & (t.counts.rank.progress == 0)
    rows = replace(rows, had_turn=jnp.where(is_fresh, 0, rows.had_turn), had_long=jnp.where(is_fresh, 0, rows.had_long))

    line, due = take(world.line, t.rank), take(world.line_due, t.rank)
    is_real = jnp.arange(dims.line_window + 1) < dims.line_window
    is_free = is_real & (line[:, WHOSE] == 0)
    free = jnp.where(jnp.any(is_free), jnp.argmax(is_free), dims.line_window).astype(jnp.int32)
    prompt = take(requests.table, event.request)[PROMPT]
    work = rule.work(prompt)
    entry = jnp.stack([event.request + 1, prompt, work])
    own_due = due_of(rule, take(requests.arrival, event.request)[:3], take(requests.limit, event.request), work)
    is_arriving = (event.is_arrival & (jnp.arange(dims.line_window + 1) == free) & is_real)[:, None]
    line, due = jnp.where(is_arriving, entry, line), jnp.where(is_arriving, own_due, due)

    row_works = rule.work(requests.table.at[rows.request].get(mode="promise_in_bounds")[:, PROMPT])
    row_due = due_of(rule, requests.arrival.at[rows.request].get(mode="promise_in_bounds")[:, :3],
                     requests.limit.at[rows.request].get(mode="promise_in_bounds"), row_works)
    whose = jnp.concatenate([rows.request, line[:, WHOSE] - 1])
    works = jnp.concatenate([row_works, line[:, WORK]])
    done = jnp.concatenate([rule.work(rows.computed), jnp.zeros_like(line[:, WORK])])
    left = parts_left(context, jnp.concatenate([row_due, due]), event.now)
    slack, works = left - (works - done), jnp.maximum(works, 1)
    is_long = jnp.concatenate([rows.known, line[:, TOKENS]]) > rule.long_tokens

    is_begun = rows.slot != null
    num_long = jnp.sum(is_begun & is_long[:dims.num_partial])
    may_have_long = rows.had_long == 0
    are_partial = is_begun & (rows.had_turn == 0) & (may_have_long | ~is_long[:dims.num_partial])
    are_waiting = is_real & (line[:, WHOSE] > 0) & ~has(counts, w.CLOSED)
    are_waiting = are_waiting & (~is_long[dims.num_partial:] | (may_have_long & (num_long < rule.most_long)))
    can = jnp.concatenate([are_partial, are_waiting])
    keys = jnp.where(can, rule.key(whose, left, slack, works), packed.EMPTY)
    first = can & (keys == jnp.min(keys))
    index = jnp.argmin(jnp.where(first, whose, packed.EMPTY)).astype(jnp.int32)

    is_any, is_partial = is_passing & jnp.any(can), index < dims.num_partial
    own_long, rho = take(is_long, index), rule.relative(take(slack, index), take(works, index))
    is_other = can & (jnp.arange(can.shape[0]) != index)

    def number(which: Bool[Array, " prompts"], long: Bool[Array, " prompts"]) -> Int[Array, " 2"]:
        return jnp.stack([jnp.sum(which & ~long), jnp.sum(which & long)])

    others = Others(number(is_other[:dims.num_partial], is_long[:dims.num_partial]),
                    number(is_other[dims.num_partial:], is_long[dims.num_partial:]))
    row = jnp.minimum(index, dims.num_partial - 1)
    rank, viewed = replace(counts.rank, partial=unstacked(rows)), is_any & is_partial
    rank = choose(is_passing, replace(
        rank, forming_slot=jnp.where(viewed, take(rows.slot, row), null), forming_request=take(rows.request, row),
        forming_computed=take(rows.computed, row), forming_known=take(rows.known, row),
        progress=rank.progress & ~w.FORMED), rank)
    return replace(counts, rank=rank), Chosen(
        is_any, is_partial, row, jnp.maximum(index - dims.num_partial, 0),
        jnp.where(is_any, take(whose, index), dims.num_requests), own_long,
        rule.share(rho, own_long) * group.batching.chunks.target_s, others, free, entry, own_due,
        event.is_arrival & ~jnp.any(is_free))


def settle(context: Context, chosen: Chosen, is_open: Bool[Array, ""], counts: Counts, placed: "Placed",
           sized: "Sized") -> tuple[Counts, Bool[Array, ""]]:
    """After its turn: the table with what became of it, and `Rank.forming_*` of any that is partly computed. Returns
    whether somebody else may have a turn in this pass, too."""
    dims, _, _, _, group = context
    rank, batch, null = counts.rank, counts.batch, dims.null_slot
    rows, had_turn = stacked(rank.partial), is_open & chosen.is_any
    is_placed = placed.slot != null
    is_kept = had_turn & (chosen.is_partial | (placed.is_admitted & ~placed.is_completing))
    free = jnp.argmax(rows.slot == null).astype(jnp.int32)
    is_row = is_kept & (jnp.arange(dims.num_partial) == jnp.where(chosen.is_partial, chosen.row, free))
    has_long = had_turn & chosen.is_long & (is_placed | ~sized.has_time)
    closes = had_turn & ~is_placed & ~chosen.is_partial & (~chosen.is_long | sized.has_time)
    rows = PartialPrompts(
        jnp.where(is_row, rank.forming_slot, rows.slot), jnp.where(is_row, rank.forming_request, rows.request),
        jnp.where(is_row, rank.forming_computed, rows.computed), jnp.where(is_row, rank.forming_known, rows.known),
        jnp.where(is_row, 1, rows.had_turn), jnp.where(has_long, 1, rows.had_long))
    is_begun = rows.slot != null
    first = jnp.argmax(is_begun)
    rank = replace(rank, partial=unstacked(rows),
                   forming_slot=jnp.where(jnp.any(is_begun), take(rows.slot, first), null),
                   forming_request=take(rows.request, first), forming_computed=take(rows.computed, first),
                   forming_known=take(rows.known, first))
    counts = mark(replace(counts, rank=rank), closes, w.CLOSED)
    others = chosen.others.partial + jnp.where(has(counts, w.CLOSED), 0, chosen.others.waiting)
    are_left = others[0] + jnp.where(rows.had_long == 0, others[1], 0) > 0
    goes_on = had_turn & are_left & (batch.budget > 0)
    if group.batching.max_batch_seqs is not None:
        goes_on = goes_on & (batch.count + batch.num_chunks < group.batching.max_batch_seqs)
    return counts, goes_on


def writes(context: Context, t: "Touched") -> tuple[Writes, Bool[Array, ""]]:
    """Who arrives comes into line, who was admitted leaves it. Returns whether there was no room, too."""
    dims, chosen, spare = context.dims, t.chosen, context.dims.line_window
    is_leaving = t.placed.is_admitted
    is_both = is_leaving & t.event.is_arrival & (chosen.place == chosen.free)
    entering = jnp.where(t.event.is_arrival & ~is_both, chosen.free, spare)
    leaving = jnp.where(is_leaving & ~is_both, chosen.place, spare)
    places = jnp.stack([entering, leaving])
    return {"line": Put(at(dims, "line", t.rank, places), jnp.stack([chosen.entry, jnp.zeros_like(chosen.entry)])),
            "line_due": Put(at(dims, "line_due", t.rank, places),
                            jnp.stack([chosen.due, jnp.zeros_like(chosen.due)]))}, chosen.is_full
