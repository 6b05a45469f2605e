"""Prefill and decode on different executors: who leaves one for another, and the door by which its KV comes in.

A prompt that completes where only prompts are computed emits its first token there; if more are to come it leaves the
batch, its blocks stay, and an executor that decodes is chosen, which has it as unaccepted. That one accepts from the
front, until one does not fit, whenever somebody joins, a delivery to it ends, or an iteration of it (after who is done
has left, before its pass). Accepting takes blocks there and hands the transfer to the links: one out of its source, one
into its destination, each of which carries one after the other. At the delivery the blocks at the source come back, and
the request is ready: it joins a pass as a decode with its context, before requests that wait.

A step works on one executor. What one does to another goes through the other's door, which has a time to open as an
executor has a time to wake, and opens before iterations end at that instant: for the transfer that is through by then,
or at once, to take blocks back or see who fits. What an iteration in a jump has taken by now is settled first.

Approximated: an unaccepted request is not moved to another executor; a transfer is of the whole prompt; with `layers`
it is shorter by the last iteration of its prompt, as if the link had been free for it.
"""

from dataclasses import replace
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxsim.engine import ending
from jaxsim.engine.common import Context, blocks_for, choose, has, take
from jaxsim.engine.ending import Retired
from jaxsim.engine.events import AT_ONCE, Event, chosen_by
from jaxsim.engine.writes import Add, Put, Writes
from jaxsim.kernels import clock, queues
from jaxsim.kernels.clock import Time
from jaxsim.kernels.queues import Link, Queue
from jaxsim.policy.arrivals import relative_to
from jaxsim.state import world as w
from jaxsim.state.requests import OUTPUT, PROMPT
from jaxsim.state.world import Clocks, Counts, World


class Opened(NamedTuple):
    """What opening a door did.

    next_time, next_turn: when this one opens again, and for whom; queue: who is not accepted then; link: the one that
    changes. accepted, due: the request, and when its transfer ends; links: whose link out and whose in are busy until
    then. delivered: the request; ready_before: who was ready last before it; owed: whose door opens for the blocks, and
    how many; returned: those taken back here. What there is none of is the scratch row.
    """

    is_any: Bool[Array, ""]
    next_time: Time
    next_turn: Int[Array, ""]
    queue: Queue
    link: Link
    accepted: Int[Array, ""]
    due: Time
    links: tuple[Int[Array, ""], Int[Array, ""]]
    delivered: Int[Array, ""]
    ready_before: Int[Array, ""]
    owed: tuple[Int[Array, ""], Int[Array, ""]]
    returned: Int[Array, ""]


class Left(NamedTuple):
    """Who left for another executor in this step, if anybody: the request, where it goes, the queue there, the link
    that changes, and the seconds of its transfer."""

    is_any: Bool[Array, ""]
    request: Int[Array, ""]
    target: Int[Array, ""]
    queue: Queue
    link: Link
    transfer_s: Float[Array, ""]


def unaccepted_of(world: World, executor: Int[Array, ""]) -> Queue:
    """Who an executor has not accepted."""
    row = take(world.unaccepted, executor)
    return Queue(row[0], row[1], row[2])


def fits(context: Context, event: Event, counts: Counts, queue: Queue) -> Bool[Array, ""]:
    """Whether the front of `queue` is there and would be accepted."""
    rules, rank = context.group.batching, counts.rank
    most = take(context.params.hand_over.most_held, event.executor)
    need = _blocks(context, queue.front)
    return (queue.length > 0) & (rank.held_blocks < most) & (need <= rules.num_blocks - rank.used_blocks)


def _blocks(context: Context, request: Int[Array, ""]) -> Int[Array, ""]:
    if not context.group.batching.kv_accounting:
        return jnp.int32(0)
    return blocks_for(take(context.requests.table, request)[PROMPT], context.dims)


def lengths_here(context: Context, event: Event, lengths: Int[Array, " 4"]) -> Int[Array, " 4"]:
    """What a request comes to on this executor: one token where only prompts are computed."""
    computes_prompts = take(context.params.hand_over.computes_prompts, event.executor)
    return lengths.at[OUTPUT].set(jnp.where(computes_prompts, 1, lengths[OUTPUT]))


def is_leaving(context: Context, event: Event, request: Int[Array, ""]) -> Bool[Array, ""]:
    """Whether a request whose last token on this executor is out has more to come on another."""
    computes_prompts = take(context.params.hand_over.computes_prompts, event.executor)
    return computes_prompts & (take(context.requests.table, request)[OUTPUT] > 1)


def who_gives_way(context: Context, is_joining: Bool[Array, ""], counts: Counts, candidate: Int[Array, ""],
                  victim: tuple[Int[Array, ""], Int[Array, ""], Int[Array, ""]]
                  ) -> tuple[Bool[Array, ""], tuple[Int[Array, ""], Int[Array, ""], Int[Array, ""]]]:
    """Whether the first of those ready lacks a block that no event will bring, and the last has to go.

    Prompts alone may fill a pool; so it is where nothing runs and nobody comes. victim: (slot, request, offset) of who
    is preempted otherwise; the ready one has no slot.
    """
    dims, _, requests, _, group = context
    rank, batch = counts.rank, counts.batch
    prompt = take(requests.table, candidate)[PROMPT]
    need = blocks_for(prompt + 1, dims) - blocks_for(prompt, dims)
    if group.batching.decode_needs_free_block == "always":
        need = jnp.maximum(need, 1)
    gives_way = (is_joining & (rank.running == 0) & (rank.in_transfer.length == 0) & ~has(counts, w.CLOSED)
                 & (need > group.batching.num_blocks - rank.used_blocks))
    last = jnp.where(gives_way, rank.ready.back, victim[1])
    offset = jnp.where(gives_way, take(requests.table, last)[PROMPT] - batch.counter, victim[2])
    return gives_way, (jnp.where(gives_way, dims.null_slot, victim[0]), last, offset)


def without_last_ready(context: Context, is_gone: Bool[Array, ""], counts: Counts, prompt: Int[Array, ""]) -> Counts:
    """The last of those ready, of so many prompt tokens, is preempted."""
    rank = counts.rank
    before = take(context.world.ready_before, rank.ready.back)
    ready = Queue(rank.ready.front, jnp.where(is_gone, before, rank.ready.back), rank.ready.length - is_gone)
    held = rank.held_blocks - jnp.where(is_gone, blocks_for(prompt, context.dims), 0)
    return replace(counts, rank=replace(rank, ready=ready, held_blocks=held))


def is_waiting_for_blocks(counts: Counts) -> Bool[Array, ""]:
    """Blocks will come back to this executor, or somebody to it, without any pass."""
    return (counts.rank.kept_blocks > 0) | (counts.rank.in_transfer.length > 0)


def open_door(context: Context, event: Event, counts: Counts, times: Clocks, wake: Time, phase: Int[Array, ""],
              residue_row: Int[Array, " block_size"]) -> tuple[Counts, Time, Int[Array, ""], Opened]:
    """Deliver one request, accept one, or take blocks back. Returns what this changes, and what wakes the executor."""
    dims, params, requests, world, group = context
    e, now, nowhere = event.executor, event.now, dims.num_requests
    turn, returned = take(world.door_turn, e), take(world.returned, e)
    queue = unaccepted_of(world, e)
    is_at_once = event.is_door & (turn == AT_ONCE)
    is_returning = is_at_once & (returned > 0)
    is_trying = is_at_once & ~is_returning & (queue.length > 0)
    is_delivering = event.is_door & (turn != AT_ONCE)

    # The iterations of a jump that has begun have taken their blocks; it ends where somebody may join.
    rank = counts.rank
    may_join = (rank.ready.length == 0) & (rank.running < group.batching.max_num_seqs)
    is_running = (phase == w.ENDING) & (counts.batch.is_committed == 0) & (counts.batch.extra > 0)
    is_cut = is_running & (is_trying | (is_delivering & may_join))
    cut, cut_end = ending.cut_jump(now, counts, times)
    counts, wake = choose(is_cut, cut, counts), clock.select(is_cut, cut_end, wake)
    counts = ending.take_blocks_of_jump(group, is_cut, counts, residue_row)

    rank = counts.rank
    accepted = queue.front
    is_accepting = is_trying & fits(context, event, counts, queue)
    accepted = jnp.where(is_accepting, accepted, nowhere)
    delivered = jnp.where(is_delivering, rank.in_transfer.front, nowhere)
    # One of the two leaves a queue and joins another.
    moving = jnp.where(is_delivering, delivered, accepted)
    following = take(world.next_waiting, moving)
    source = take(world.placed, moving)[1]
    in_transfer = queues.pop_front(rank.in_transfer, following, is_delivering)
    queue = queues.pop_front(queue, following, is_accepting)
    in_transfer, joined = queues.push_back(in_transfer, accepted, is_accepting, nowhere)
    last_ready = rank.ready.back
    ready, became = queues.push_back(rank.ready, delivered, is_delivering, nowhere)
    link = jnp.where(is_delivering, became[0], joined[0]), moving
    blocks = _blocks(context, moving)
    one = is_accepting.astype(jnp.int32)
    used = rank.used_blocks + one * blocks - jnp.where(is_returning, returned, 0)
    rank = replace(
        rank, in_transfer=in_transfer, ready=ready, used_blocks=used, peak_blocks=jnp.maximum(rank.peak_blocks, used),
        held_blocks=rank.held_blocks + one * blocks,
        kept_blocks=rank.kept_blocks - jnp.where(is_returning, returned, 0))
    counts = replace(counts, rank=rank)

    hand_over = params.hand_over
    work = take(world.transfer_s, accepted)
    begin = now
    for links, which in ((world.egress, source), (world.ingress, e)):
        busy = Time(*take(links, which))
        begin = clock.select((begin < busy) & (work > 0), busy, begin)
    due = clock.add(clock.add(begin, hand_over.latency_s), work)
    # When the next transfer is through: the one accepted now if it is the only one.
    first = in_transfer.front
    is_only = is_accepting & (first == accepted)
    first_due = clock.select(is_only, due, relative_to(world.epoch, tuple(take(world.delivered, first))))
    first_turn = jnp.where(is_only, world.num_accepted, take(world.transfer_turn, first))
    opens_again = (is_accepting | is_delivering) & (queue.length > 0)
    next_time = clock.select(in_transfer.length > 0, first_due, clock.never())
    next_time = clock.select(opens_again, now, next_time)

    is_asked = (is_delivering | is_returning) & (phase == w.IDLE) & (
        (rank.running > 0) | (rank.waiting > 0) | (rank.ready.length > 0))
    wake, phase = clock.select(is_asked, now, wake), jnp.where(is_asked, w.PASSING, phase)
    is_linked, nobody = is_accepting & (work > 0), dims.num_executors
    opened = Opened(
        event.is_door, next_time, jnp.where(opens_again, AT_ONCE, first_turn), queue, link, accepted, due,
        (jnp.where(is_linked, source, nobody), jnp.where(is_linked, e, nobody)), delivered, last_ready,
        (jnp.where(is_delivering, source, nobody), jnp.where(is_delivering, blocks, 0)),
        jnp.where(is_returning, returned, 0))
    return counts, wake, phase, opened


def leave(context: Context, event: Event, retired: Retired, times: Clocks) -> Left:
    """Whether who retired has more tokens to come, elsewhere: where, and how long its transfer is to take."""
    dims, params, requests, world, _ = context
    hand_over = params.hand_over
    lengths = take(requests.table, retired.request)
    is_any = retired.is_any & is_leaving(context, event, retired.request)
    target = chosen_by(context, retired.request, event.now, hand_over.routing, world.num_handed_over, hand_over.decodes)
    target = jnp.where(is_any, target, dims.num_executors)
    queue, link = queues.push_back(unaccepted_of(world, target), retired.request, is_any, dims.num_requests)
    seconds = lengths[PROMPT].astype(jnp.float32) * hand_over.seconds_per_token
    layer_s = seconds / jnp.maximum(hand_over.layers, 1)
    overlapped = jnp.maximum(clock.on_grid(seconds) - times.batch.first.hi, clock.on_grid(layer_s))
    seconds = jnp.where(hand_over.layers > 0, overlapped, clock.on_grid(seconds))
    return Left(is_any, retired.request, target, queue, link, seconds)


def writes(context: Context, event: Event, opened: Opened, left: Left, is_looking: Bool[Array, ""],
           stamp: Float[Array, " 3"]) -> Writes:
    """What a step changes of doors, links and transfers. is_looking: this executor is to see who fits at once."""
    dims, _, _, world, _ = context
    nobody, e, now = dims.num_executors, event.executor, event.now
    # A door that opens for somebody else's sake does so now.
    other = jnp.where(left.is_any, left.target, opened.owed[0])
    own = jnp.where(opened.is_any | is_looking, e, nobody)
    mine = clock.select(opened.is_any, opened.next_time, now)
    turn = jnp.where(opened.is_any, opened.next_turn, AT_ONCE)
    queue = choose(opened.is_any, opened.queue, left.queue)
    due = jnp.stack([stamp[0], opened.due.hi, opened.due.lo])
    out_of, into = opened.links
    leaving = jnp.where(left.is_any, left.request, dims.num_requests)
    return {
        "door_hi": Put(((own, other),), (mine.hi, now.hi)), "door_lo": Put(((own, other),), (mine.lo, now.lo)),
        "door_turn": Put(((own, other),), (turn, jnp.int32(AT_ONCE))),
        "unaccepted": Put((jnp.where(opened.is_any, e, left.target),), jnp.stack(queue)),
        "egress": Put((out_of,), due[1:]), "ingress": Put((into,), due[1:]),
        "returned": Add((jnp.stack([opened.owed[0], jnp.where(opened.returned > 0, e, nobody)]),),
                        jnp.stack([opened.owed[1], -opened.returned])),
        "ready_before": Put((opened.delivered,), opened.ready_before),
        "transfer_s": Put((leaving,), left.transfer_s), "decoded_on": Put((leaving,), left.target),
        "transfer_turn": Put((opened.accepted,), world.num_accepted),
        "accepted": Put((opened.accepted,), stamp), "delivered": Put((opened.accepted,), due),
    }


def shifted(world: World, back_s: Float[Array, ""]) -> World:
    """In an epoch that begins later; what lies before it is over, whenever it was."""
    door = clock.shift(Time(world.door_hi, world.door_lo), jnp.broadcast_to(back_s, world.door_hi.shape))

    def moved(links):
        until = clock.shift(Time(links[:, 0], links[:, 1]), jnp.broadcast_to(back_s, links.shape[:1]))
        is_over = until.hi < 0
        return jnp.where(is_over[:, None], 0.0, jnp.stack(until, axis=-1))

    return replace(world, door_hi=door.hi, door_lo=door.lo, egress=moved(world.egress), ingress=moved(world.ingress))
