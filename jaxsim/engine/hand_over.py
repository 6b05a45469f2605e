"""Prefill and decode on different executors: who leaves one for another, and the door by which its KV comes in.

A prompt that completes where only prompts are computed emits its first token there; if more are to come it leaves the
batch, its blocks stay, and an executor that decodes is chosen, which has it as unaccepted. That one accepts from the
front, until one does not fit, whenever somebody joins, a delivery to it ends, or an iteration of it (after who is done
has left, before its pass). Accepting takes blocks there and hands the transfer to the links: one out of its source, one
into its destination, each of which carries one after the other, or with `discipline = "fair"` all that are under way at
once (`jaxsim.engine.fair_links`). At the delivery the blocks at the source come back, and the request is ready: it
joins a pass as a decode with its context, before requests that wait.

A step works on one executor. What one does to another goes through the other's door, which has a time to open as an
executor has a time to wake, and opens before iterations end at that instant: for the transfer that is through by then,
or at once, to see who fits. What an iteration in a jump has taken by now is settled first. Blocks that come back are
taken at the next step of the source, for which its door opens if it rests for want of them.

How long it takes may depend on the pools of both ends (`HandOver.over`), and one link may be shared by all executors of
two pools: a transfer then has that link, too. It takes a tick of the clock at least, so that none overtakes another.

Where executors fail (`jaxsim.engine.lost_hand_overs`) a prompt may be computed with tokens that were emitted before;
then one more is emitted, and KV of the prompt and all of them but the last goes over. With all that decode down a
request waits, unaccepted, for the one that it is sent to.

Approximated: an unaccepted request is not moved to another executor; a transfer is of all that was computed, whatever
the other side may have; with `layers` it is shorter by the last iteration of its prompt, as if the link had been free
for it.
"""

from dataclasses import replace
from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxsim.engine import ending, fair_links, parts, role_switching
from jaxsim.engine.common import Context, blocks_for, choose, has, take
from jaxsim.engine.ending import Retired
from jaxsim.engine.events import AT_ONCE, Event, chosen_by
from jaxsim.engine.writes import Add, Put, Writes
from jaxsim.kernels import clock, queues
from jaxsim.kernels.clock import Time
from jaxsim.kernels.queues import Link, Queue
from jaxsim.policy.arrivals import relative_to
from jaxsim.state import world as w
from jaxsim.state.flights import REQUEST, SOURCE, Flights
from jaxsim.state.requests import OUTPUT, PROMPT, TILES
from jaxsim.state.world import Clocks, Counts, World

SECONDS, NUMBER, TARGET, ACCEPTED, DUE = 0, 1, 2, 3, 6
"""Columns of `World.transfers`: how long it takes, its place among those accepted, where it goes, and when (epoch, hi,
lo) it was accepted and is through."""


class Front(NamedTuple):
    """Who an executor has not accepted, and the blocks that the first of them needs; tiles where it computes
    prompts."""

    queue: Queue
    blocks: Int[Array, ""]


class Opened(NamedTuple):
    """What opening a door did.

    next_time, next_turn: when this one opens again, and for whom; front: who is not accepted then; link: the one that
    changes. accepted, due: the request, and when its transfer ends; links: the two that are busy until then. delivered:
    the request; ready_before: who was ready last before it; owed: to whom its blocks come back, and how many; woken:
    the same, if it rests for want of them. returned: those taken back here. parent: of the part that was accepted or
    delivered. Where links are shared: transfers under way, whether there are too many, and whose has ended, after which
    `due` is known. What there is none of is the scratch row.
    """

    is_any: Bool[Array, ""]
    next_time: Time
    next_turn: Int[Array, ""]
    front: Front
    link: Link
    accepted: Int[Array, ""]
    due: Time
    links: tuple[Int[Array, ""], ...]
    delivered: Int[Array, ""]
    ready_before: Int[Array, ""]
    owed: tuple[Int[Array, ""], Int[Array, ""]]
    woken: Int[Array, ""]
    returned: Int[Array, ""]
    parent: Int[Array, ""] | None = None
    flights: Flights | None = None
    overflows: Bool[Array, ""] | None = None
    ended: Int[Array, ""] | None = None


class Left(NamedTuple):
    """Who left for another executor in this step, if anybody: the request, where it goes, the queue there, the link
    that changes, and the seconds of its transfer; the part whose encoding has ended, maybe the last of the request."""

    is_any: Bool[Array, ""]
    request: Int[Array, ""]
    target: Int[Array, ""]
    queue: Queue
    link: Link
    seconds: Float[Array, ""]
    part: parts.Encoded | None = None

    @property
    def is_kv(self) -> Bool[Array, ""]:
        """Whether who left has its first token; otherwise its images are encoded."""
        return self.is_any if self.part is None else self.is_any & ~self.part.is_any


def unaccepted_of(world: World, executor: Int[Array, ""]) -> Queue:
    """Who an executor has not accepted."""
    row = take(world.unaccepted, executor)
    return Queue(row[0], row[1], row[2])


def fits(context: Context, event: Event, counts: Counts, front: Front) -> Bool[Array, ""]:
    """Whether there is a first one who would be accepted."""
    rules, rank = context.group.batching, counts.rank
    most = take(context.params.hand_over.most_held, event.executor)
    is_fitting = ((front.queue.length > 0) & (rank.held_blocks < most)
                  & (front.blocks <= rules.num_blocks - rank.used_blocks))
    if context.dims.has_failures:
        # Nor does one whose iteration was cut off, which is about to go down.
        is_fitting = is_fitting & ~take(context.world.is_down, event.executor) & (counts.batch.is_lost == 0)
    if context.dims.has_parts:
        is_kv = take(context.params.hand_over.decodes, event.executor)
        fit_tiles = (front.queue.length > 0) & parts.fits(context, event, counts, front.blocks)
        is_fitting = jnp.where(is_kv, is_fitting, fit_tiles)
    return is_fitting


def kv_blocks(context: Context, request: Int[Array, ""]) -> Int[Array, ""]:
    """Blocks of the KV that goes over for a request."""
    if not context.group.batching.kv_accounting:
        return jnp.int32(0)
    if context.dims.has_failures:
        return blocks_for(_computed(context, request), context.dims)
    return blocks_for(take(context.requests.table, request)[PROMPT], context.dims)


def _needed(context: Context, part: parts.Part | None, request: Int[Array, ""]) -> Int[Array, ""]:
    """Blocks of the first one not accepted; tiles where it comes with embeddings."""
    blocks = kv_blocks(context, request)
    if part is None:
        return blocks
    return jnp.where(part.is_kv, blocks, take(context.requests.images, request)[TILES])


def lengths_here(context: Context, event: Event, lengths: Int[Array, " 4"], emitted: Int[Array, ""] | int = 0
                 ) -> Int[Array, " 4"]:
    """What a request comes to on this executor: one token more than it has where only prompts are computed."""
    computes_prompts = take(context.params.hand_over.computes_prompts, event.executor)
    return jnp.where(computes_prompts & (jnp.arange(lengths.shape[0]) == OUTPUT), emitted + 1, lengths)


def is_leaving(context: Context, event: Event, request: Int[Array, ""], tokens: Int[Array, ""] | None = None
               ) -> Bool[Array, ""]:
    """Whether a request whose last token on this executor is out has more to come on another, whatever its tokens;
    these matter where executors fail, since then it may have emitted some elsewhere."""
    computes_prompts = take(context.params.hand_over.computes_prompts, event.executor)
    if context.dims.has_failures:
        lengths = take(context.requests.table, request)
        is_request = request != context.dims.num_requests
        return computes_prompts & is_request & (tokens - lengths[PROMPT] + 1 < lengths[OUTPUT])
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
    context_of = partial(_computed, context)
    prompt = context_of(candidate)
    need = blocks_for(prompt + 1, dims) - blocks_for(prompt, dims)
    if group.batching.decode_needs_free_block == "always":
        need = jnp.maximum(need, 1)
    gives_way = (is_joining & (rank.running == 0) & (rank.in_transfer.length == 0) & ~has(counts, w.CLOSED)
                 & (need > group.batching.num_blocks - rank.used_blocks))
    if dims.num_flights:
        gives_way = gives_way & (rank.on_links == 0)
    if dims.has_migration:
        gives_way = gives_way & (rank.kept_blocks == 0) & (rank.held_blocks == 0)
    last = jnp.where(gives_way, rank.ready.back, victim[1])
    offset = jnp.where(gives_way, context_of(last) - batch.counter, victim[2])
    return gives_way, (jnp.where(gives_way, dims.null_slot, victim[0]), last, offset)


def _computed(context: Context, request: Int[Array, ""]) -> Int[Array, ""]:
    """Tokens of a ready request whose KV is here: its prompt, and what it emitted before it came but the last."""
    prompt = take(context.requests.table, request)[PROMPT]
    is_anywhere = context.dims.has_migration or context.dims.has_failures
    return prompt + take(context.world.progress, request)[0] - 1 if is_anywhere else prompt


def without_last_ready(context: Context, is_gone: Bool[Array, ""], counts: Counts, tokens: Int[Array, ""]) -> Counts:
    """The last of those ready, with the KV of so many tokens, is preempted."""
    rank = counts.rank
    before = take(context.world.ready_before, rank.ready.back)
    ready = Queue(rank.ready.front, jnp.where(is_gone, before, rank.ready.back), rank.ready.length - is_gone)
    held = rank.held_blocks
    if context.dims.has_roles:
        held = held - jnp.where(is_gone, blocks_for(tokens, context.dims), 0)
    visible = jnp.minimum(rank.visible_ready, ready.length)
    return replace(counts, rank=replace(rank, ready=ready, held_blocks=held, visible_ready=visible))


def is_waiting_for_blocks(counts: Counts) -> Bool[Array, ""]:
    """Blocks will come back to this executor, or somebody to it, without any pass."""
    is_any = (counts.rank.kept_blocks > 0) | (counts.rank.in_transfer.length > 0)
    return is_any if counts.rank.on_links is None else is_any | (counts.rank.on_links > 0)


def open_door(context: Context, event: Event, counts: Counts, times: Clocks, wake: Time, phase: Int[Array, ""],
              residue_row: Int[Array, " block_size"]) -> tuple[Counts, Time, Int[Array, ""], Opened]:
    """Deliver one request or accept one, if a door opens; take back blocks. Returns what this changes, and what wakes
    the executor."""
    dims, params, requests, world, group = context
    e, now, nowhere, nobody = event.executor, event.now, dims.num_requests, dims.num_executors
    turn, returned, queue = take(world.doors, e)[2], take(world.returned, e), unaccepted_of(world, e)
    part = None
    is_trying = event.is_door & (turn == AT_ONCE) & (queue.length > 0)
    is_delivering = event.is_door & (turn != AT_ONCE)
    if dims.num_flights:
        # Of a transfer that leaves its link nobody knows yet but who waits for it.
        is_landing = event.is_door & world.flights.next_end.equals(now)
        was_open = (turn == AT_ONCE) & Time(*take(world.doors, e)[:2]).equals(now)
        is_trying, is_delivering = is_trying & ~is_landing, is_delivering & ~is_landing
        flight = take(world.flights.rows, world.flights.next_row)
        ended = jnp.where(is_landing, flight[REQUEST], nowhere)
    rank = counts.rank
    counts = replace(counts, rank=replace(rank, used_blocks=rank.used_blocks - returned,
                                          kept_blocks=rank.kept_blocks - returned))

    # The iterations of a jump that has begun have taken their blocks; it ends where somebody may join.
    may_join = (rank.ready.length == 0) & (rank.running < group.batching.max_num_seqs)
    if dims.has_parts:
        part = parts.at_door(context, event, queue.front, rank.in_transfer.front)
    is_running = (phase == w.ENDING) & (counts.batch.is_committed == 0) & (counts.batch.extra > 0)
    is_cut = is_running & (is_trying | (is_delivering & may_join))
    cut, cut_end = ending.cut_jump(now, counts, times)
    counts, wake = choose(is_cut, cut, counts), clock.select(is_cut, cut_end, wake)
    counts = ending.take_blocks_of_jump(group, is_cut, counts, residue_row)

    rank, front = counts.rank, Front(queue, _needed(context, part, queue.front))
    is_accepting = is_trying & fits(context, event, counts, front)
    accepted = jnp.where(is_accepting, queue.front, nowhere)
    if part is not None:
        is_accepting = is_accepting | (is_trying & ~part.is_kv & part.is_begun)
        accepted = jnp.where(is_accepting, jnp.where(part.is_kv, queue.front, part.row), nowhere)
    delivered = jnp.where(is_delivering, rank.in_transfer.front, nowhere)
    # One of the two leaves a queue and joins another.
    moving = jnp.where(is_delivering, delivered, accepted)
    following, source = take(world.next_waiting, moving), jnp.maximum(take(world.placed, moving)[1], 0)
    if dims.has_failures:
        # Where it was computed last.
        source = jnp.maximum(take(world.routed, moving), 0)
    in_transfer = queues.pop_front(rank.in_transfer, following, is_delivering)
    behind, is_gone = following, is_accepting
    if part is not None:
        # A request stays first until all of its parts are accepted.
        behind = jnp.where(part.is_kv, following, take(world.next_waiting, queue.front))
        is_gone = is_accepting & (part.is_kv | part.is_last)
    queue = queues.pop_front(queue, behind, is_gone)
    work = take(world.transfers, accepted)[SECONDS]
    if part is not None:
        work = jnp.where(part.is_kv, work, parts.transfer_s(context, accepted, source, e))
    if dims.num_flights:
        is_flying = is_accepting & (work > 0)
        landed = jnp.where(is_landing, ended, jnp.where(is_flying, nowhere, accepted))
        in_transfer, joined = queues.push_back(in_transfer, landed, landed != nowhere, nowhere)
        rank = replace(rank, on_links=rank.on_links + is_flying - is_landing)
    else:
        in_transfer, joined = queues.push_back(in_transfer, accepted, is_accepting, nowhere)
    if group.batching.async_scheduling:
        is_seen = is_delivering & (phase == w.ENDING) & ending.is_before_last(event, counts, times)
        rank = replace(rank, visible_ready=rank.visible_ready + is_seen)
    last_ready = rank.ready.back
    brings_kv = is_delivering if part is None else is_delivering & part.is_kv
    ready, became = queues.push_back(rank.ready, delivered, brings_kv, nowhere)
    if part is not None:
        # With the last of its parts a request waits, as one that arrives.
        is_whole = is_delivering & ~part.is_kv & part.is_whole
        waiting, joined_waiting = queues.push_back(rank.queue, part.parent, is_whole, nowhere)
        rank, became = replace(rank, queue=waiting), choose(part.is_kv, became, joined_waiting)
    link = jnp.where(is_delivering, became[0], joined[0]), moving
    if dims.num_flights:
        link = jnp.where(is_delivering, became[0], joined[0]), jnp.where(is_landing, ended, moving)
    if part is not None:
        link = choose(is_delivering, became, joined)
    taken = jnp.where(is_accepting if part is None else is_accepting & part.is_kv, front.blocks, 0)
    used = rank.used_blocks + taken
    counts = replace(counts, rank=replace(
        rank, in_transfer=in_transfer, ready=ready, used_blocks=used, peak_blocks=jnp.maximum(rank.peak_blocks, used),
        held_blocks=rank.held_blocks + taken))
    if part is not None:
        is_begun = is_accepting & ~part.is_kv & ~part.is_begun
        counts = parts.with_tiles(counts, jnp.where(is_begun, part.tiles, 0))
        rank = counts.rank

    ends = source, nobody + 1 + e
    latency_s = params.hand_over.over(params.hand_over.latency_s, source, e)
    if dims.num_links:
        shared = params.hand_over.over(params.hand_over.shared_link, source, e)
        # Who has none of these has its own way out once more.
        ends = *ends, jnp.where(shared >= 0, 2 * (nobody + 1) + shared, source)
    begin = now
    for end in ends:
        busy = Time(*take(world.links, end))
        begin = clock.select((begin < busy) & (work > 0), busy, begin)
    due = clock.add(clock.add(begin, latency_s), work)
    newest, more = accepted, {}
    if dims.num_flights:
        starting = jnp.stack([accepted, source, e, world.num_accepted])
        way = None if world.flights.ways is None else fair_links.way_of(context, source, e)
        flights, overflows = fair_links.change(
            world.flights, now, nowhere, is_ending=is_landing, is_starting=is_flying, starting=starting, work_s=work,
            way=way, is_max_min=dims.is_max_min)
        if params.hand_over.pool_of is not None:
            from_there = jnp.where(is_landing, flight[SOURCE], source)
            latency_s = params.hand_over.over(params.hand_over.latency_s, from_there, e)
        due, newest = clock.add(now, latency_s), landed
        more = dict(flights=flights, overflows=overflows, ended=ended)
    # When the next transfer is through: the one accepted now if it is the only one.
    first = in_transfer.front
    is_only, known = (is_accepting & (first == accepted)), take(world.transfers, first)
    first_due = clock.select(is_only, due, relative_to(world.epoch, tuple(known[DUE:DUE + 3])))
    first_turn = jnp.where(is_only, world.num_accepted.astype(jnp.float32), known[NUMBER])
    if dims.num_flights:
        # One that has landed has its number from when it was accepted.
        is_new = (newest != nowhere) & (first == newest)
        first_due = clock.select(is_new, due, first_due)
    opens_again = (is_accepting | is_delivering) & (queue.length > 0)
    next_time = clock.select(in_transfer.length > 0, first_due, clock.never())
    next_time = clock.select(opens_again, now, next_time)
    if dims.num_flights:
        opens_again = opens_again | (is_landing & was_open)
        next_time = clock.select(opens_again, now, next_time)

    has_work = (rank.running > 0) | (rank.waiting > 0) | (ready.length > 0)
    is_open = event.is_door if not dims.num_flights else event.is_door & ~is_landing
    is_asked = is_open & ((is_delivering & (phase == w.IDLE)) | (phase == w.RESTING)) & has_work
    wake, phase = clock.select(is_asked, now, wake), jnp.where(is_asked, w.PASSING, phase)
    is_linked, prompt_blocks = is_accepting & (work > 0), kv_blocks(context, moving)
    is_woken = is_delivering & (take(world.phase, source) == w.RESTING)
    # Of whoever is first now.
    front = Front(queue, jnp.where(is_accepting, _needed(context, part, queue.front), front.blocks))
    parent = None
    if part is not None:
        moved = jnp.where(is_delivering, part.parent, unaccepted_of(world, e).front)
        parent = jnp.where((is_accepting | is_delivering) & ~part.is_kv, moved, nowhere)
    opened = Opened(
        event.is_door, next_time, jnp.where(opens_again, AT_ONCE, first_turn), front, link, accepted, due,
        tuple(jnp.where(is_linked, end, nobody) for end in ends), delivered, last_ready,
        (jnp.where(is_delivering, source, nobody), jnp.where(is_delivering, prompt_blocks, 0)),
        jnp.where(is_woken, source, nobody), returned, parent, **more)
    return counts, wake, phase, opened


def comes_behind(context: Context, event: Event, opened: Opened, wake: Time, phase: Int[Array, ""]) -> Bool[Array, ""]:
    """Whether a delivery comes behind the end of an iteration here at this instant, although its door opens before it.

    So it is where the prompt's iteration ends at this instant too, on an executor of a higher index: had a jump not
    covered it, the end here would have been looked at before.
    """
    transfer = take(context.world.transfers, opened.delivered)
    takes_no_time = jnp.all(transfer[ACCEPTED:ACCEPTED + 3] == transfer[DUE:DUE + 3])
    is_any = opened.delivered != context.dims.num_requests
    return is_any & takes_no_time & (opened.owed[0] > event.executor) & (phase == w.ENDING) & wake.equals(event.now)


def take_place(context: Context, counts: Counts, opened: Opened) -> tuple[Counts, Opened]:
    """Where decodes are a queue: who is delivered gets its place there, kept instead of who was ready before it, since
    nobody gives way."""
    stamp = counts.rank.next_stamp + (opened.delivered != context.dims.num_requests)
    return replace(counts, rank=replace(counts.rank, next_stamp=stamp)), opened._replace(ready_before=stamp)


def leave(context: Context, event: Event, retired: Retired, times: Clocks) -> Left:
    """Whether who retired has more tokens to come, elsewhere: where, and how long its transfer is to take."""
    dims, params, requests, world, _ = context
    hand_over = params.hand_over
    lengths = take(requests.table, retired.request)
    is_any = retired.is_any & is_leaving(context, event, retired.request, retired.tokens)
    taking = role_switching.taking(context, hand_over.decodes)
    if dims.has_failures:
        # With all of them down it waits for the one that it is sent to.
        are_up = taking & ~world.is_down
        taking = jnp.where(jnp.any(are_up), are_up, taking)
    target = chosen_by(context, retired.request, event.now, hand_over.routing, world.num_handed_over, taking)
    leaver, part = retired.request, None
    if dims.has_parts:
        part = parts.encoded(context, event, retired.request, retired.is_any)
        leaver, target = jnp.where(part.is_any, part.parent, leaver), jnp.where(part.is_any, part.target, target)
        is_any = is_any & (~part.is_any | part.is_last)
    chosen = target
    target = jnp.where(is_any, target, dims.num_executors)
    queue, link = queues.push_back(unaccepted_of(world, target), leaver, is_any, dims.num_requests)
    per_token = hand_over.over(hand_over.seconds_per_token, event.executor, chosen)
    tokens = retired.tokens if dims.has_failures else lengths[PROMPT]
    seconds = tokens.astype(jnp.float32) * per_token
    layer_s = seconds / jnp.maximum(hand_over.layers, 1)
    overlapped = jnp.maximum(clock.on_grid(seconds) - times.batch.first.hi, clock.on_grid(layer_s))
    seconds = jnp.where(hand_over.layers > 0, overlapped, clock.on_grid(seconds))
    if hand_over.pool_of is not None:
        seconds = jnp.maximum(seconds, clock.GRID_S)
    if part is not None:
        part_s = parts.transfer_s(context, retired.request, event.executor, chosen)
        seconds = jnp.where(part.is_any, part_s, seconds)
    return Left(is_any, leaver, target, queue, link, seconds, part)


def writes(context: Context, event: Event, opened: Opened, left: Left, is_looking: Bool[Array, ""],
           stamp: Float[Array, " 3"]) -> Writes:
    """What a step changes of doors, links and transfers. is_looking: this executor is to see who fits at once."""
    dims, _, _, world, _ = context
    nobody, e, now = dims.num_executors, event.executor, event.now
    # A door that opens for somebody else's sake does so now.
    other = jnp.where(left.is_any, left.target, opened.woken)
    own = jnp.where(opened.is_any | is_looking, e, nobody)
    at_once = jnp.stack([now.hi, now.lo, jnp.float32(AT_ONCE)])
    mine = jnp.stack([opened.next_time.hi, opened.next_time.lo, opened.next_turn])
    queue = choose(opened.is_any, opened.front.queue, left.queue)
    due = jnp.stack([opened.due.hi, opened.due.lo])
    nothing = -jnp.ones(3, jnp.float32)
    is_accepting = opened.accepted != dims.num_requests
    target = jnp.where(is_accepting, e, left.target).astype(jnp.float32)
    transfer = jnp.where(
        is_accepting,
        jnp.concatenate([jnp.stack([jnp.float32(0), world.num_accepted.astype(jnp.float32), target]), stamp, stamp[:1],
                         due]),
        jnp.concatenate([jnp.stack([left.seconds, jnp.float32(-1), target]), nothing, nothing]))
    steps = {}
    accepted = opened.accepted
    if dims.num_flights:
        is_ended = opened.ended != dims.num_requests
        accepted = jnp.where(is_ended, opened.ended, accepted)
        known = take(world.transfers, accepted)
        transfer = jnp.where(is_ended, jnp.concatenate([known[:DUE], stamp[:1], due]), transfer)
    if left.part is not None:
        row = jnp.where(opened.is_any, opened.parent, left.part.parent)
        steps = {"steps_of_parts": Add((row,), jnp.int32(1))}
    if dims.has_failures:
        steps["left_at"] = Put((jnp.where(left.is_kv, left.request, dims.num_requests),), stamp)
    return steps | {
        "doors": Put((jnp.stack([own, other]),), jnp.stack([jnp.where(opened.is_any, mine, at_once), at_once])),
        "unaccepted": Put((jnp.where(opened.is_any, e, left.target),), jnp.stack(queue)),
        "links": Put((jnp.stack(opened.links),), jnp.stack([due] * len(opened.links))),
        "returned": Add((jnp.stack([opened.owed[0], e]),), jnp.stack([opened.owed[1], -opened.returned])),
        "ready_before": Put((opened.delivered,), opened.ready_before),
        "transfers": Put((jnp.where(left.is_kv, left.request, accepted),), transfer),
    }


def shifted(world: World, back_s: Float[Array, ""]) -> World:
    """In an epoch that begins later; what lies before it is over, whenever it was."""
    def moved(times):
        return clock.shift(Time(times[:, 0], times[:, 1]), jnp.broadcast_to(back_s, times.shape[:1]))

    if world.flights is not None:
        world = replace(world, flights=fair_links.shifted(world.flights, back_s))
    doors, links = moved(world.doors), moved(world.links)
    links = clock.select(links.hi < 0, Time(jnp.zeros_like(links.hi), jnp.zeros_like(links.lo)), links)
    return replace(world, doors=jnp.stack([*doors, world.doors[:, 2]], axis=-1), links=jnp.stack(links, axis=-1))
