"""Live migration of running requests: stages of copying while they decode, a short stop, the move.

Every `polling_s` the controller pairs executors (`jaxsim.policy.migration`), one pair a step; a source chooses a
request that decodes there and has computed a token there, and a migration begins. Its stages are as in
AlibabaPAI/llumnix: at the beginning of a stage the blocks that the request holds and its destination has no room for
yet are counted, that of the iteration in flight included. If they are more than `last_stage_blocks`, all but the last,
which is being written, are taken at the destination and copied while the request decodes on. Otherwise it leaves the
batch at the end of the iteration in flight, and all of them are taken and copied; at the end of that its blocks at the
source come back, and it is ready at the destination: it joins a pass as a decode, before requests that wait there. A
stage takes its blocks times their seconds, and the latency. An executor takes part in one migration at a time, so no
link is shared.

A migration is given up at the beginning of a stage if its request has finished or was preempted meanwhile (or finishes
at the end of the very iteration it was to leave after), if the destination lacks blocks for the stage, its watermark
aside, or after `max_stages` stages that were not the last. Who had stopped for a last stage that there is no room for
is ready again where it was, at that instant.

A step works on one executor: what a migration does at one of its two goes through that one's door, as with roles
(`jaxsim.engine.hand_over`), before iterations end at that instant. The controller looks after those, before arrivals,
and not while no request is anywhere: its timer begins anew with the arrival that ends this.

An executor that goes down (`jaxsim.engine.failures`) ends the migration that it is in, before it loses anything else.
With the destination down the request goes on at its source: as if nothing had been, where it has not left its batch
yet, and else it is ready there again, at that instant. With the source down its blocks at the destination come back,
and it is lost like all who were there, although it may have stopped already.

Known gaps: a copy does not slow down iterations (Llumnix measures 1 %); handshakes take no time of their own.
"""

from dataclasses import replace
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxsim.engine import ending
from jaxsim.engine.common import Context, blocks_for, choose, take
from jaxsim.engine.ending import Retired
from jaxsim.engine.events import Event
from jaxsim.engine.writes import Add, Put, Writes
from jaxsim.kernels import clock, packed, queues
from jaxsim.kernels.clock import Time
from jaxsim.kernels.queues import Link
from jaxsim.policy.scaling import Scaling
from jaxsim.state import world as w
from jaxsim.state.control import (
    COPIED,
    DRAINING,
    FINISHED,
    LEAVES,
    LOST,
    NO_ROOM,
    NUM_CAUSES,
    OFF,
    ON,
    OUTAGE,
    PARTNER,
    PREEMPTED,
    REQUEST,
    SLOT,
    STAGE,
    STARTING,
    TOO_MANY_STAGES,
    WANTED,
    Control,
    Fleet,
)
from jaxsim.state.requests import OUTPUT, PROMPT
from jaxsim.state.world import Clocks, Counts, World

BEGIN_STAGE, ALLOCATE, COMMIT, RELEASE, FREE, PUT_BACK, ABANDON = range(7)
"""What a door opens for, in `World.doors`: at the source the beginning of a stage; at the destination to take blocks,
and for the request; at the source to give its blocks back; at the destination to give back those it took, of a
migration given up; at the source to have the request again, or whatever there is to undo
where the destination went down."""

Door = tuple[Int[Array, ""], Float[Array, " 3"]]
"""Whose it is (nobody's: the number of executors), when it opens next (hi, lo) and for what."""


class Acted(NamedTuple):
    """What the controller or a door did.

    doors: that of this executor, and another's. link: the one that changes; joined: who is ready here now, else the
    scratch row, and who was ready last before it. marked, key: the slot of who is to leave at the end of the iteration
    in flight (else the null slot), and the key by which it will. source: where who moved here was, or this executor.
    moved: who, and what is added to its row of `World.moved`.
    """

    doors: tuple[Door, Door]
    link: Link
    joined: Int[Array, ""]
    joined_behind: Int[Array, ""]
    marked: Int[Array, ""]
    key: Int[Array, ""]
    source: Int[Array, ""]
    is_commit: Bool[Array, ""]
    moved: tuple[Int[Array, ""], Int[Array, " 5"]]


class Left(NamedTuple):
    """Whether somebody left the batch in this step to be copied, who, the tokens it has emitted, and the door of its
    destination."""

    is_any: Bool[Array, ""]
    request: Int[Array, ""]
    emitted: Int[Array, ""]
    door: Door


def _at(time: Time, what: Int[Array, ""] | int) -> Float[Array, " 3"]:
    return jnp.stack([time.hi, time.lo, jnp.asarray(what, jnp.float32)])


def _with_row(moves: Int[Array, "executors 8"], executor: Int[Array, ""], is_meant: Bool[Array, ""],
              row: Int[Array, " 8"]) -> Int[Array, "executors 8"]:
    is_own = (jnp.arange(moves.shape[0]) == executor) & is_meant
    return jnp.where(is_own[:, None], row, moves)


def _nothing() -> Int[Array, " 8"]:
    return jnp.where(jnp.arange(8) == PARTNER, -1, 0)


def _with(row: Int[Array, " 8"], columns: dict[int, Int[Array, ""] | int]) -> Int[Array, " 8"]:
    for column, value in columns.items():
        row = jnp.where(jnp.arange(8) == column, value, row)
    return row


def _is_chosen(context: Context, event: Event, counts: Counts, times: Clocks
               ) -> tuple[Bool[Array, ""], Int[Array, ""], Int[Array, ""]]:
    """Whether a request of this executor may migrate; its slot, and who it is."""
    dims, params, _, world, _ = context
    keys, entries = take(world.slot_keys, event.executor), take(world.slot_entries, event.executor)
    own = times.batch
    # Those placed by the pass before the first iteration have computed nothing here before it ends.
    has_ended = (counts.batch.is_committed == 1) | (clock.add(own.start, own.first) <= event.now)
    stamps = entries[:, w.STAMP]
    may_go = (keys != packed.EMPTY) & (has_ended | (stamps <= counts.rank.first_stamp))
    choice = may_go
    if dims.has_urgent:
        is_calm = may_go & (take(context.requests.is_urgent, entries[:, w.REQUEST]) == 0)
        choice = jnp.where(jnp.any(is_calm), is_calm, may_go)
    if params.migration.choice == "shortest":
        offsets = jnp.where(choice, entries[:, w.OFFSET], packed.EMPTY)
        choice = choice & (offsets == jnp.min(offsets))
        stamps = jnp.where(choice, stamps, packed.EMPTY)
        slot = jnp.argmin(stamps)
    else:
        slot = jnp.argmax(jnp.where(choice, stamps, -1))
    slot = slot.astype(jnp.int32)
    return jnp.any(may_go), slot, entries[slot, w.REQUEST]


def act(context: Context, event: Event, counts: Counts, times: Clocks, wake: Time, phase: Int[Array, ""],
        residue_row: Int[Array, " block_size"]) -> tuple[Counts, Time, Int[Array, ""], Control, Acted]:
    """Open a door, or let the controller look at one pair. Returns what this changes, and what wakes the executor."""
    dims, params, requests, world, group = context
    rules, policy, control = group.batching, params.migration, world.control
    e, now, nobody, nowhere = event.executor, event.now, dims.num_executors, dims.num_requests
    what = take(world.doors, e)[2]

    def is_for(code):
        return event.is_door & (what == code)

    # Iterations of a jump that have begun have taken their blocks; it ends where somebody may join or leave.
    batch = counts.batch
    is_cut = event.is_door & (phase == w.ENDING) & (batch.is_committed == 0) & (batch.extra > 0)
    cut, cut_end = ending.cut_jump(now, counts, times)
    counts, wake = choose(is_cut, cut, counts), clock.select(is_cut, cut_end, wake)
    counts = ending.take_blocks_of_jump(group, is_cut, counts, residue_row)
    rank, batch = counts.rank, counts.batch

    # A look at a pair: this executor is the source.
    is_pair = event.is_tick & event.has_pair
    own = take(control.moves, e)
    partner = jnp.where(is_pair, event.partner, jnp.maximum(own[PARTNER], 0))
    other = take(control.moves, partner)
    may_go, slot, chosen = _is_chosen(context, event, counts, times)
    begins = is_pair & (own[PARTNER] < 0) & (other[PARTNER] < 0) & may_go
    at_destination = is_for(ALLOCATE) | is_for(COMMIT) | is_for(FREE)
    row = jnp.where(at_destination, other, own)
    slot, request = jnp.where(begins, slot, row[SLOT]), jnp.where(begins, chosen, row[REQUEST])
    preemptions = take(world.progress, request)[1]
    row = jnp.where(begins, _with(_nothing(), {PARTNER: partner, REQUEST: request, SLOT: slot, LOST: preemptions}), row)

    # The beginning of a stage, at the source.
    entry = take(world.slot_entries, e, slot)
    is_preempted = preemptions != row[LOST]
    is_here = (take(world.slot_keys, e, slot) != packed.EMPTY) & (entry[w.REQUEST] == request)
    end = batch.counter + jnp.where(batch.is_committed == 1, 0, batch.advance + batch.extra)
    left = blocks_for(entry[w.OFFSET] + end, dims) - row[COPIED]
    is_last = left <= policy.last_stage_blocks
    is_given_up = is_for(BEGIN_STAGE) & (is_preempted | ~is_here | (row[STAGE] >= policy.max_stages))
    stops = is_for(BEGIN_STAGE) & ~is_given_up & is_last
    copies = is_for(BEGIN_STAGE) & ~is_given_up & ~is_last
    row = jnp.where(copies, _with(row, {WANTED: left - 1}), jnp.where(stops, _with(row, {LEAVES: 1}), row))
    # Who is between iterations leaves at once.
    is_between = stops & (batch.is_committed == 1)

    # Blocks at the destination.
    leaves = row[LEAVES] == 1
    wanted = row[WANTED]
    fits = rules.num_blocks - rank.used_blocks - wanted >= rules.watermark_blocks
    is_taking, is_refused = is_for(ALLOCATE) & fits, is_for(ALLOCATE) & ~fits
    is_commit, is_back = is_for(COMMIT), is_for(PUT_BACK)
    is_undone = is_abandoned = False
    if dims.has_failures:
        is_abandoned = is_for(ABANDON)
        is_back = is_back | (is_abandoned & (rank.kept_blocks > 0))
        # Who was to leave stays, and completes where it would have.
        is_undone = is_abandoned & ~is_back & (row[LEAVES] == 1)
    taken = jnp.where(is_taking, wanted, 0)
    row = jnp.where(is_taking, _with(row, {STAGE: row[STAGE] + 1, COPIED: row[COPIED] + wanted}), row)
    gives_back = is_refused | is_for(FREE)
    used = rank.used_blocks + taken - jnp.where(gives_back, rank.held_blocks, 0)
    used = used - jnp.where(is_for(RELEASE), rank.kept_blocks, 0)
    held = jnp.where(gives_back | is_commit, 0, rank.held_blocks + taken)
    kept = jnp.where(is_for(RELEASE) | is_back, 0, rank.kept_blocks)
    joins = is_commit | is_back
    joined_behind = rank.ready.back
    ready, link = queues.push_back(rank.ready, request, joins, nowhere)
    counts = replace(counts, rank=replace(
        rank, used_blocks=used, peak_blocks=jnp.maximum(rank.peak_blocks, used), held_blocks=held, kept_blocks=kept,
        ready=ready))

    seconds = clock.on_grid(wanted.astype(jnp.float32) * policy.block_s)
    due = clock.add(clock.add(now, policy.latency_s), seconds)
    is_other_asked = is_given_up | copies | (is_taking & ~leaves) | (is_refused & leaves) | is_commit
    for_what = jnp.where(is_given_up, FREE, jnp.where(copies, ALLOCATE, jnp.where(
        is_taking, BEGIN_STAGE, jnp.where(is_refused, PUT_BACK, RELEASE))))
    own_time = clock.select(is_taking & leaves, due, clock.select(begins, now, clock.never()))
    own_what = jnp.where(begins, BEGIN_STAGE, COMMIT)
    doors = ((jnp.where(event.is_door | begins, e, nobody), _at(own_time, own_what)),
             (jnp.where(is_other_asked, partner, nobody), _at(clock.select(is_taking, due, now), for_what)))

    source, destination = jnp.where(at_destination, partner, e), jnp.where(at_destination, e, partner)
    is_over = is_given_up | (is_refused & ~leaves) | is_for(RELEASE) | is_back | is_abandoned
    is_out = gives_back | is_commit
    is_any = event.is_door | begins
    moves = _with_row(control.moves, source, is_any, jnp.where(is_over, _nothing(), row))
    moves = _with_row(moves, destination, begins | is_out, _with(_nothing(), {PARTNER: jnp.where(begins, e, -1)}))
    cause = jnp.where(is_refused, NO_ROOM, jnp.where(is_preempted, PREEMPTED, jnp.where(
        ~is_here, FINISHED, TOO_MANY_STAGES)))
    aborts = (jnp.arange(NUM_CAUSES) == cause) & (is_given_up | is_refused)
    is_here_now = jnp.arange(dims.num_executors)
    paired = control.paired | ((is_here_now == e) | (is_here_now == event.partner))
    is_look, fleet = event.is_tick, control.fleet
    if fleet is not None:
        is_look = is_look & ~event.scales[0]
        fleet = _scaled(context, event)
    is_done = is_look & ~event.has_pair
    paired = jnp.where(is_pair, paired, control.paired & ~is_done)
    has_requests = jnp.sum(world.outstanding) > 0
    begins_anew = event.is_arrival & ~has_requests
    poll = clock.select(begins_anew | (is_done & has_requests), clock.add(now, policy.polling_s), control.poll)
    poll = clock.select(is_done & ~has_requests, clock.never(), poll)
    control = Control(poll, paired, moves, control.started + begins, control.aborted + aborts, fleet)

    has_work = (rank.running > 0) | (rank.waiting > 0) | (ready.length > 0)
    is_asked = event.is_door & ((joins & (phase == w.IDLE)) | (phase == w.RESTING)) & has_work
    wake, phase = clock.select(is_asked | is_between, now, wake), jnp.where(is_asked, w.PASSING, phase)
    phase = jnp.where(is_between, w.ENDING, phase)
    shift = jnp.where(is_commit, e - partner, 0)
    parts = jnp.where(joins, clock.to_integers(world.epoch, now), 0)
    if dims.has_failures:
        lengths = take(requests.table, request)
        end = jnp.where(is_undone, lengths[PROMPT] + lengths[OUTPUT] - 1 - entry[w.OFFSET], end)
        stops = stops | is_undone
    acted = Acted(
        doors, link, jnp.where(joins, request, nowhere), joined_behind, jnp.where(stops, slot, dims.null_slot),
        packed.pack_key(end, slot, dims.slot_bits), jnp.where(is_commit, partner, e), is_commit,
        (jnp.where(joins, request, nowhere),
         jnp.concatenate([jnp.stack([is_commit.astype(jnp.int32), shift]), parts])))
    return counts, wake, phase, control, acted


def _scaled(context: Context, event: Event) -> Fleet:
    """Who is on from now, when the controller looks."""
    params, world = context.params, context.world
    is_up = ~world.is_down if context.dims.has_failures else True
    fleet, now, executors = world.control.fleet, event.now, jnp.arange(context.dims.num_executors)
    is_empty = (world.outstanding == 0) & (world.control.moves[:, PARTNER] < 0)
    status = jnp.where(event.is_tick & ~event.has_pair, fleet.settled(now, is_empty), fleet.status)
    num_off = jnp.sum((fleet.status == DRAINING) & (status == OFF))
    is_check, wants_more, wants_less = (event.is_tick & is_it for is_it in event.scales)
    are_off = (status == OFF) & is_up
    starts = is_check & wants_more & jnp.any(are_off)
    drains = is_check & wants_less
    starting = (executors == jnp.argmax(are_off)) & starts
    draining = (executors == jnp.argmin(jnp.where((status == ON) & is_up, world.outstanding, packed.EMPTY))) & drains
    status = jnp.where(starting, STARTING, jnp.where(draining, DRAINING, status))
    ready = clock.add(now, params.scaling.startup_s)
    ready = clock.select(starting, Time(*(jnp.broadcast_to(x, starting.shape) for x in ready)), fleet.ready)
    check = clock.select(is_check, clock.add(now, params.scaling.check_s), fleet.check)
    return Fleet(status, ready, check, fleet.used + (num_off - starts) * clock.to_integers(world.epoch, now),
                 fleet.starts + starts, fleet.drains + drains)


class Broken(NamedTuple):
    """What an executor that goes down has of a migration: whether it is in one, and has the rest of who had stopped for
    the last stage; that request."""

    is_any: Bool[Array, ""]
    is_stopped: Bool[Array, ""]
    request: Int[Array, ""]


def broken(context: Context, event: Event, counts: Counts, is_losing: Bool[Array, ""]) -> Broken:
    """What breaks off where an executor goes down, before anything else is lost there."""
    row = take(context.world.control.moves, event.executor)
    is_any = is_losing & (row[PARTNER] >= 0)
    return Broken(is_any, is_any & (counts.rank.kept_blocks > 0), row[REQUEST])


def break_off(context: Context, event: Event, found: Broken, counts: Counts, control: Control, acted: Acted
              ) -> tuple[Counts, Control, Acted]:
    """End the migration that an executor is in that goes down: its blocks here come back, and its partner's door opens
    to undo the rest."""
    dims, world, e, rank = context.dims, context.world, event.executor, counts.rank
    row = take(control.moves, e)
    # Nothing happens between the choice of a request and the first look at its stage.
    is_source = (row[LEAVES] == 1) | (row[STAGE] > 0)
    back = jnp.where(found.is_any, rank.held_blocks + rank.kept_blocks, 0)
    rank = replace(rank, used_blocks=rank.used_blocks - back, held_blocks=jnp.where(found.is_any, 0, rank.held_blocks),
                   kept_blocks=jnp.where(found.is_any, 0, rank.kept_blocks))
    moves = _with_row(control.moves, e, found.is_any, _nothing())
    aborted = control.aborted + ((jnp.arange(NUM_CAUSES) == OUTAGE) & found.is_any)
    nobody = dims.num_executors
    doors = ((jnp.where(found.is_any, e, nobody), _at(clock.never(), FREE)),
             (jnp.where(found.is_any, row[PARTNER], nobody), _at(event.now, jnp.where(is_source, FREE, ABANDON))))
    # Who had stopped does so for a migration no more.
    parts = clock.to_integers(world.epoch, event.now)
    moved = jnp.where(found.is_stopped, found.request, acted.moved[0]), jnp.where(
        found.is_stopped, jnp.concatenate([jnp.zeros(2, jnp.int32), parts]), acted.moved[1])
    acted = acted._replace(doors=choose(found.is_any, doors, acted.doors), moved=moved)
    return replace(counts, rank=rank), replace(control, moves=moves, aborted=aborted), acted


def opened(world: World, scaling: Scaling) -> World:
    """Before the first event, with as few executors on as there may be."""
    fleet = world.control.fleet
    status = jnp.where(jnp.arange(fleet.status.shape[0]) < scaling.fewest, ON, OFF)
    fleet = replace(fleet, status=status, check=Time(scaling.check_s, jnp.zeros_like(scaling.check_s)))
    return replace(world, control=replace(world.control, fleet=fleet))


def is_leaving(context: Context, event: Event, request: Int[Array, ""], tokens: Int[Array, ""]) -> Bool[Array, ""]:
    """Whether a request, of so many tokens computed, leaves the batch here to go on elsewhere."""
    row, lengths = take(context.world.control.moves, event.executor), take(context.requests.table, request)
    is_marked = (row[LEAVES] == 1) & (row[PARTNER] >= 0) & (row[REQUEST] == request)
    return is_marked & (tokens < lengths[PROMPT] + lengths[OUTPUT] - 1)


def leave(context: Context, event: Event, retired: Retired, control: Control
          ) -> tuple[Left, Control, Bool[Array, ""]]:
    """Send the rest of who stops behind the iteration that ended; give up if that was its last.

    Returns also whether a door opens at this instant.
    """
    dims, _, requests, _, _ = context
    e = event.executor
    row = take(control.moves, e)
    is_own = retired.is_any & (row[LEAVES] == 1) & (row[PARTNER] >= 0) & (row[REQUEST] == retired.request)
    is_any = is_own & is_leaving(context, event, retired.request, retired.tokens)
    is_over = is_own & ~is_any
    wanted = blocks_for(retired.tokens, dims) - row[COPIED]
    door = (jnp.where(is_own, row[PARTNER], dims.num_executors), _at(event.now, jnp.where(is_any, ALLOCATE, FREE)))
    moves = _with_row(control.moves, e, is_own, jnp.where(is_over, _nothing(), _with(row, {WANTED: wanted})))
    aborted = control.aborted + ((jnp.arange(NUM_CAUSES) == FINISHED) & is_over)
    emitted = retired.tokens - take(requests.table, retired.request)[PROMPT] + 1
    return Left(is_any, retired.request, emitted, door), replace(control, moves=moves, aborted=aborted), is_own


def writes(context: Context, event: Event, acted: Acted, left: Left) -> Writes:
    """What a step changes of doors and of requests that migrate."""
    world = context.world
    own, other = acted.doors
    is_leaving = left.door[0] != context.dims.num_executors
    other = (jnp.where(is_leaving, left.door[0], other[0]), jnp.where(is_leaving, left.door[1], other[1]))
    request, moved = acted.moved
    if context.dims.has_failures:
        # Who is sent counts from where it is sent to.
        request = jnp.where(event.is_arrival, event.request, request)
        shift = take(world.moved, event.request)[1] * (jnp.arange(moved.shape[0]) == 1)
        moved = jnp.where(event.is_arrival, -shift, moved)
    parts = clock.to_integers(world.epoch, event.now)
    gone = jnp.concatenate([jnp.zeros(2, jnp.int32), -parts])
    return {
        "doors": Put((jnp.stack([own[0], other[0]]),), jnp.stack([own[1], other[1]])),
        "ready_before": Put((acted.joined,), acted.joined_behind),
        "moved": Add((jnp.where(left.is_any, left.request, request),),
                     jnp.where(left.is_any, gone, moved)),
    }


def shifted(world: World, back_s: Float[Array, ""]) -> World:
    """In an epoch that begins later."""
    doors = clock.shift(Time(world.doors[:, 0], world.doors[:, 1]), jnp.broadcast_to(back_s, world.doors.shape[:1]))
    control, fleet = world.control, world.control.fleet
    if fleet is not None:
        ready = clock.shift(fleet.ready, jnp.broadcast_to(back_s, fleet.status.shape))
        fleet = replace(fleet, ready=ready, check=clock.shift(fleet.check, back_s))
    control = replace(control, poll=clock.shift(control.poll, back_s), fleet=fleet)
    return replace(world, doors=jnp.stack([*doors, world.doors[:, 2]], axis=-1), control=control)


def is_waiting_for_blocks(counts: Counts) -> Bool[Array, ""]:
    """Blocks will come back to this executor, or somebody to it, without any pass."""
    return (counts.rank.kept_blocks > 0) | (counts.rank.held_blocks > 0)
