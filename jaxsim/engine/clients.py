"""Clients that do not wait for ever: deadlines, cancelled requests, sendings after the first, refusals.

Every request has a timer (`World.timers`): when its client gives up, or when it is sent again. First arrivals are the
source's; all others are timers. At one instant timeouts come after the ends of iterations and before arrivals, and
these in the order of their requests, whichever sending they are.

A request that is given up leaves a waiting queue at once. One that runs leaves its batch as the iteration in flight
ends, which cuts a jump there: its slot is held for nobody from then on (its entry names the scratch row), and its
completion key is the end of that iteration, so that it retires as any other, gives its blocks back and emits nothing.
A prompt that is partly computed joins the batch for that. Between iterations it leaves before the next pass.

Refused requests never enter a queue: an instance refuses who is routed to it while so many wait there, the cluster
while so many are there at all. A request that ended without an answer is sent again, from scratch, while its client has
sendings left; its row is used again.

Approximated: the engine computes the token of the iteration in flight, and the histogram of the time between tokens
counts it; a client hears of a refusal at once, and gives up in no time.
"""

from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxsim.engine import ending, failures
from jaxsim.engine.common import Context, blocks_for, choose, take
from jaxsim.engine.events import Event
from jaxsim.engine.writes import Add, Put, Writes
from jaxsim.kernels import clock, packed, queues, timers
from jaxsim.kernels.clock import Time
from jaxsim.kernels.queues import Link
from jaxsim.kernels.timers import NEVER, Instant
from jaxsim.policy.arrivals import relative_to
from jaxsim.state import world as w
from jaxsim.state.requests import PROMPT, Requests
from jaxsim.state.world import Clocks, Counts

TIMED_OUT, REJECTED = 2, 3
"""How a sending ended, in `World.clients`, as `jaxsim.metrics` numbers it."""

FIRST_SENDING = 2
"""Of `World.clients` before anything was sent again."""


NOWHERE = -1
"""In `World.routed`: the last sending was refused."""


class CutOff(NamedTuple):
    """Whose client gave up in this step, if any did.

    is_any: a request was cut off; is_kept: it has its first token in time, and its client goes on waiting. is_waiting,
    is_running: where it was; if it ran, its slot, its entry and completion key from now on; is_forming: its prompt was
    partly computed, and the slot joins the running list behind `tail`. loss: the same of an instance that goes down;
    a slot that is held for nobody is then running too, but nobody is cut off.
    """

    is_any: Bool[Array, ""]
    is_kept: Bool[Array, ""]
    is_waiting: Bool[Array, ""]
    is_running: Bool[Array, ""]
    is_forming: Bool[Array, ""]
    slot: Int[Array, ""]
    entry: Int[Array, " entry_fields"]
    key: Int[Array, ""]
    tail: Int[Array, ""]
    loss: failures.Loss | None = None


def start(requests: Requests, is_async: bool) -> dict[str, Array]:
    """Before the first event: every timer is set to when the client of the first sending gives up."""
    epoch, hi, lo = requests.arrival[:-1, :3].T
    is_there = ~jnp.isinf(hi)
    sent = jax.vmap(timers.instant_of)(jnp.where(is_there, epoch, 0).astype(jnp.int32), Time(
        jnp.where(is_there, hi, 0.0), lo))
    seconds, ticks = requests.patience[:-1, :2].T
    due = _doubled(timers.later(sent, Instant(jnp.where(is_there, seconds, NEVER.seconds), ticks)), 0)
    rows = requests.arrival.shape[0]
    noted = {"sent": jnp.concatenate([jnp.stack(sent, axis=-1), jnp.zeros((1, 2), jnp.int32)])} if is_async else {}
    return noted | {
        "timers": timers.tree(due),
        "clients": jnp.broadcast_to(jnp.array([FIRST_SENDING, 0], jnp.int32), (rows, 2))}


def _doubled(instant: Instant, is_again: Bool[Array, "*shape"] | int) -> Instant:
    """As timers hold it: behind all that go off at the same instant for another reason."""
    return Instant(instant.seconds, jnp.where(instant.seconds == NEVER.seconds, 0, 2 * instant.parts + is_again))


def give_up(context: Context, event: Event, at_rank: Int[Array, ""], counts: Counts, times: Clocks, wake: Time,
            phase: Int[Array, ""], residue_row: Int[Array, " block_size"], link: Link,
            loss: failures.Loss | None = None
            ) -> tuple[Counts, Time, Int[Array, ""], Int[Array, " block_size"], Link, CutOff]:
    """A timeout, or a loss: the request leaves its queue, or its slot is marked to leave. Returns what this changes."""
    dims, _, requests, world, group = context
    request, now, nobody, null = event.request, event.now, dims.num_requests, jnp.int32(dims.null_slot)
    log_row = take(world.placed, request)[0]
    first_token = relative_to(world.epoch, tuple(take(world.first_tokens, jnp.maximum(log_row, 0))))
    waits_for_first = (take(requests.patience, request)[2] >= 0) & ((take(world.clients, request)[0] & 1) == 0)
    is_kept = event.is_timeout & waits_for_first & (log_row >= 0) & (first_token <= now)
    is_any = event.is_timeout & ~is_kept
    slot = jnp.where(is_any, take(world.slot_of, request), null)
    if loss is not None:
        is_any, slot = is_any | loss.is_request, jnp.where(loss.is_running, loss.slot, slot)
    is_running, is_waiting = slot != null, is_any & (slot == null)
    if dims.has_moves:
        is_waiting = is_waiting & ~loss.is_held

    # Where somebody could join now who could not before, the jump in flight ends with the iteration.
    is_flying = phase == w.ENDING
    is_front = is_waiting & (counts.rank.queue.front == request) & (counts.rank.waiting > 1)
    is_cut = is_flying & (counts.batch.extra > 0) & (is_running | is_front)
    cut, cut_end = ending.cut_jump(now, counts, times)
    counts, wake = choose(is_cut, cut, counts), clock.select(is_cut, cut_end, wake)

    rank, batch = counts.rank, counts.batch
    queue, removed = queues.remove(
        rank.queue, request, take(world.previous_waiting, request), take(world.next_waiting, request), is_waiting,
        nobody)
    link = choose(is_waiting, removed, link)

    end_counter = batch.counter + jnp.where(is_flying, batch.advance + batch.extra, 0)
    is_forming = is_running & (slot == rank.forming_slot)
    entry = take(world.slot_entries, at_rank, slot)
    held = rank.forming_computed if group.batching.reserve == "none" else rank.forming_known
    offset = jnp.where(is_forming, held - end_counter, entry[w.OFFSET])
    column = jnp.arange(entry.shape[0])
    entry = jnp.where(column == w.REQUEST, nobody, jnp.where(column == w.OFFSET, offset, entry))
    joins, enters = (is_forming & is_flying).astype(jnp.int32), (is_forming & ~is_flying).astype(jnp.int32)
    tail = batch.tail
    batch = replace(
        batch, joining=batch.joining + joins, joining_offsets=batch.joining_offsets + joins * offset,
        count=batch.count + enters, offsets=batch.offsets + enters * offset,
        tail=jnp.where(is_forming, slot, tail) if group.batching.keeps_running_list else tail)
    if group.batching.grows:
        residue_row = residue_row + is_forming * (jnp.arange(dims.block_size) == (offset & (dims.block_size - 1)))
    if group.batching.async_scheduling:
        # A pass sees who was there when the iteration began; any arrival ends a jump with the iteration it meets.
        is_hidden = timers.instant_of(world.epoch, times.batch.start) < Instant(*take(world.sent, request))
        rank = replace(rank, visible=rank.visible - (is_waiting & ~is_hidden))
    rank = replace(rank, queue=queue, forming_slot=jnp.where(is_forming, null, rank.forming_slot))
    if dims.has_demands:
        emitted, preemptions = take(world.progress, request)
        blocks = blocks_for(take(requests.table, request)[PROMPT] + emitted, dims)
        rank = replace(rank, waiting_blocks=rank.waiting_blocks - jnp.where(is_waiting, blocks, 0))
        if dims.has_migration:
            was_preempted = preemptions > take(world.lost, request)[failures.BEFORE]
            rank = replace(rank, killed=rank.killed - (is_waiting & was_preempted))
        if dims.has_urgent:
            gone = (is_any & is_running) * take(requests.is_urgent, request)
            rank = replace(rank, urgent=rank.urgent - gone)
    counts = Counts(counts.executor, rank, batch)

    # Between iterations it leaves at once, before the pass; if nobody is left there is none.
    leaves_now = is_running & ~is_flying
    rests = is_waiting & ~is_flying & (rank.running == 0) & (queue.length == 0)
    wake = clock.select(leaves_now, now, clock.select(rests, clock.never(), wake))
    phase = jnp.where(leaves_now, w.ENDING, jnp.where(rests, w.IDLE, phase))
    key = packed.pack_key(end_counter, slot, dims.slot_bits)
    cut_off = CutOff(is_any, is_kept, is_waiting, is_running, is_forming, slot, entry, key, tail, loss)
    return counts, wake, phase, residue_row, link, cut_off


class _Outcome(NamedTuple):
    """What becomes of a request whose sending ended without an answer in this step, if any did."""

    is_over: Bool[Array, ""]
    is_again: Bool[Array, ""]
    sendings: Int[Array, ""]
    wait: Instant


def _outcome(context: Context, event: Event, cut_off: CutOff) -> _Outcome:
    state, backoff = take(context.world.clients, event.request)[0], context.params.clients.backoff
    sendings = (state >> 1) + event.is_again
    is_over = cut_off.is_any | event.is_refused
    if cut_off.loss is not None:
        # Who is sent on is in the same sending as before.
        sendings, is_over = sendings - event.is_rerouted, is_over & ~cut_off.loss.is_sent_on
    wait = Instant(*take(backoff, jnp.minimum(sendings, backoff.shape[0]) - 1))
    return _Outcome(is_over, is_over & (wait.seconds != NEVER.seconds), sendings, wait)


def writes(context: Context, t, known: Writes, stamp: Float[Array, " 3"], own) -> Writes:
    """What a step changes for clients. known: what it writes anyway, some of which changes; own: index of its own."""
    dims, _, requests, world, group = context
    event, cut_off, placed, retired = t.event, t.cut_off, t.placed, t.retired
    request, nobody, null = event.request, dims.num_requests, jnp.int32(dims.null_slot)
    is_over, is_again, sendings, wait = _outcome(context, event, cut_off)
    is_sent = event.is_arrival & event.is_again
    is_own = is_over | cut_off.is_kept | is_sent

    now = timers.instant_of(world.epoch, event.now)
    patience = take(requests.patience, request)
    first, rest = Instant(*patience[:2]), Instant(*patience[2:])
    wait = choose(is_over, wait, choose(cut_off.is_kept, rest, first))
    due = _doubled(timers.later(now, wait), is_over)
    due = choose(is_own, due, Instant(*map(jnp.int32, NEVER)))
    status = jnp.where(cut_off.is_any, TIMED_OUT, jnp.where(event.is_refused, REJECTED, 0))
    is_kept = cut_off.is_kept
    if cut_off.loss is not None:
        due, is_own, status, is_kept = failures.on_its_way(
            context, event, cut_off.loss, now, failures.Timer(due, is_own, status, is_kept))
    is_answered = retired.is_any & (retired.request != nobody)
    if t.left is not None:
        is_answered = is_answered & ~t.left.is_any
    positions, rows = timers.change(lambda row: take(world.timers, row), nobody,
                                    jnp.where(is_own, request, retired.request), due, is_own | is_answered)
    changed = {
        "timers": Put((positions,), rows),
        "clients": Put((jnp.where(is_own, request, nobody),),
                       jnp.stack([2 * sendings + is_kept, status])),
        "finished": Put((jnp.where(is_over, request, known["finished"].index[0]),), stamp),
        "placed": Put((jnp.where(is_again, request, known["placed"].index[0]),),
                      jnp.where(is_again, -1, known["placed"].value))}

    if world.sent is not None:
        changed["sent"] = Put((jnp.where(is_sent, request, nobody),), jnp.stack(now))
    changed["routed"] = Put((jnp.where(event.is_arrival | event.is_refused, request, nobody),),
                            jnp.where(event.is_refused, NOWHERE, t.rank))

    # A slot is held for nobody from here on.
    leaving, entering = known["slot_keys"].index[-1]
    empty, key = known["slot_keys"].value
    is_marked = cut_off.is_running
    changed["slot_keys"] = Put(own("slot_keys", (leaving, jnp.where(is_marked, cut_off.slot, entering))),
                               (empty, jnp.where(is_marked, cut_off.key, key)))
    changed["slot_entries"] = Put(own("slot_entries", jnp.where(is_marked, cut_off.slot, placed.slot)),
                                  jnp.where(is_marked, cut_off.entry, placed.entry))
    moved = jnp.where(placed.is_admitted, t.candidate, jnp.where(is_over, request, nobody))
    if group.batching.grows:
        moved = jnp.where(t.is_preempting, t.victim[1], moved)
        progress, stalled = known["progress"], known["stalled"]
        changed["progress"] = Put((jnp.where(is_again, request, progress.index[0]),),
                                  jnp.where(is_again, 0, progress.value))
        # The next sending begins anew; if there is none, who waited after a preemption did so until now.
        is_stalled = cut_off.is_waiting & (take(world.progress, request)[1] > 0)
        if dims.has_migration:
            is_stalled = is_stalled | cut_off.loss.is_held
        until = clock.to_integers(world.epoch, event.now)
        value = jnp.where(is_again, -take(world.stalled, request), jnp.where(is_stalled, until, 0))
        changed["stalled"] = Add((jnp.where(is_over, request, stalled.index[0]),),
                                 jnp.where(is_over, value, stalled.value))
    changed["slot_of"] = Put((moved,), jnp.where(placed.is_admitted, placed.slot, null))
    index, value = queues.mirrored(known["next_waiting"].index + (known["next_waiting"].value,), nobody)
    if group.batching.grows:
        # Behind who is alone in a queue its link means nothing: that request may be in another queue by now.
        index = jnp.where(t.is_preempting & (t.counts.rank.queue.length == 1), nobody, index)
    changed["previous_waiting"] = Put((index,), value)
    if cut_off.loss is not None:
        changed |= failures.writes(context, event, cut_off.loss, is_again, t.rank, known | changed)
    return changed


def progress(context: Context, t, is_answered: Bool[Array, ""]) -> dict[str, Array]:
    """The world's scalars that clients change. is_answered: a request retired that somebody waits for."""
    world, event, cut_off, retired = context.world, t.event, t.cut_off, t.retired
    outcome = _outcome(context, event, cut_off)
    ended = is_answered.astype(jnp.int32) + (outcome.is_over & ~outcome.is_again)
    freed = (retired.is_any & ~is_answered).astype(jnp.int32) - cut_off.is_running
    if t.left is not None:
        freed = freed - t.left.is_any
    if cut_off.loss is not None:
        # Counted before, where its client gave up.
        freed = freed + (cut_off.is_running & ~cut_off.is_any)
    there = event.is_arrival.astype(jnp.int32) - is_answered - cut_off.is_any
    return dict(num_finished=world.num_finished + ended + freed, num_outstanding=world.num_outstanding + there,
                num_routed=world.num_routed + (event.is_arrival | event.is_routed))
