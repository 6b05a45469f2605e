"""Instances that go down and come back: what they run and what waits there is lost.

Outages are known before the loop (`Params.failures`), as a table of changes in the order of time. At one instant they
come after the ends of iterations and after timeouts, before arrivals and passes; instances that come back before those
that go down.

An instance that goes down loses its iteration in flight: what ended up to that instant counts, the jump is cut there,
and the iteration it was in gives nobody a token. Then it loses its requests, one a step, those that run before those
that wait: a slot is held for nobody from then on and retires as if a client had given up (`jaxsim.engine.clients`), so
blocks and slots come back as ever. Once nobody is left it is down: routers leave it out until it comes back, empty.

Where requests move between instances, what is between this one and others ends first: its migration
(`jaxsim.engine.migration`), or hand-overs from and to it (`jaxsim.engine.lost_hand_overs`). Who is ready and does not
run is lost last.

A request that was lost is sent on by the router, up to `most_restarts` times a sending, at that instant and among the
arrivals of that instant, by its number. The router has the tokens that were emitted: at its next instance they are
computed with the prompt, as after a preemption, and none is emitted twice. Its client notices nothing, and its deadline
stays. Otherwise the sending has failed, and its client sends again from scratch while it has sendings left. With all
instances down an arrival is refused, and a request on its way fails. What refuses arrivals (`jaxsim.engine.clients`)
refuses requests on their way too, and they have failed then.

Source: NVIDIA Dynamo's request migration, in which the front end keeps what was generated and a worker that is up
continues behind it; its limit of migrations is `most_restarts`.

Approximated: routers know of an outage at once; a gap between tokens across an outage begins with the last token, but
for a request that was just resuming after a preemption, where it begins with the iteration that was lost.
"""

from dataclasses import replace
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from jaxsim.engine import ending, lost_hand_overs, migration
from jaxsim.engine.common import Context, blocks_for, choose, take
from jaxsim.engine.events import Event
from jaxsim.engine.writes import Put, Writes
from jaxsim.kernels import clock, queues
from jaxsim.kernels.clock import Time
from jaxsim.kernels.timers import Instant
from jaxsim.policy.failures import FAILED, ON_ITS_WAY
from jaxsim.state import world as w
from jaxsim.state.requests import PROMPT
from jaxsim.state.world import Clocks, Counts

LOSSES, RESTARTS, SENT_ON, REPEATED, DUE, DUE_PARTS, BEFORE = range(7)
"""Columns of `World.lost`: how often the request was lost, and how often another instance took it then; of this
sending, how often it was sent on, and how often of these it ran; the timer of its client while it is on its way; with
migration, its preemptions when it was last sent on."""

class Loss(NamedTuple):
    """What an instance that goes down loses in this step.

    is_any: somebody had a place; is_request: that is not held for nobody. is_running, slot: whether it ran, and where
    (else the null slot). emitted: tokens of it, the last of them at `last_token`. is_sent_on: to another instance.
    is_over: nobody is left, or the instance comes back. is_held: where requests move, whether it had its
    KV there, or on the way, and did not run; else None.
    """

    is_any: Bool[Array, ""]
    is_request: Bool[Array, ""]
    is_running: Bool[Array, ""]
    slot: Int[Array, ""]
    emitted: Int[Array, ""]
    last_token: Time
    is_sent_on: Bool[Array, ""]
    is_over: Bool[Array, ""]
    is_held: Bool[Array, ""] | None = None

    @property
    def has_kv(self) -> Bool[Array, ""]:
        """Whether it had its place, or at least its KV."""
        return self.is_running if self.is_held is None else self.is_running | self.is_held


def goes_down(event: Event) -> Bool[Array, ""]:
    """Whether the step is about an instance that goes down, and on it."""
    is_failing = event.outage.is_due & ~event.outage.is_back
    return is_failing if event.outage.sweep is None else is_failing & ~event.outage.sweep.is_any


def strike(context: Context, event: Event, at_rank: Int[Array, ""], counts: Counts, times: Clocks, wake: Time,
           phase: Int[Array, ""], is_losing: Bool[Array, ""], item: lost_hand_overs.Item | None = None
           ) -> tuple[Event, Counts, Time, Int[Array, ""], Loss, migration.Broken | None]:
    """An instance goes down or comes back: its iteration is cut off, one request is lost, or nobody is left.

    is_losing: it goes down, and its iteration is over. Returns what this changes; the event is about the request that
    is lost; with migration, what breaks off.
    """
    dims, params, requests, world, _ = context
    nobody, null = dims.num_requests, jnp.int32(dims.null_slot)
    # The iteration ends here and now, and is settled in the next step.
    is_cut = goes_down(event) & ~is_losing
    cut, cut_end = ending.cut_jump(event.now, counts, times)
    counts, wake = choose(is_cut, cut, counts), clock.select(is_cut, event.now, wake)
    is_lost = jnp.where(is_cut & (event.now < cut_end), 1, counts.batch.is_lost)
    rank, batch = counts.rank, counts.batch

    broken, is_loss = None, is_losing
    if dims.has_migration:
        broken = migration.broken(context, event, counts, is_losing)
        is_loss = is_losing & ~broken.is_any
    if item is not None:
        is_loss = is_losing & ~item.is_any
    is_forming = rank.forming_slot != null
    is_running = is_loss & (rank.running > 0)
    is_waiting = is_loss & ~is_running & (rank.waiting > 0)
    slot = jnp.where(is_running, jnp.where(is_forming, rank.forming_slot, batch.tail), null)
    entry = take(world.slot_entries, at_rank, slot)
    request = jnp.where(is_running, entry[w.REQUEST], jnp.where(is_waiting, rank.queue.front, nobody))
    known = jnp.where(is_forming, rank.forming_known, entry[w.OFFSET] + batch.counter + 1)
    emitted = jnp.where(is_running, known - take(requests.table, request)[PROMPT], take(world.progress, request)[0])
    is_any, is_held = is_running | is_waiting, None
    if dims.has_moves:
        # Those who are ready go last; who had stopped for a migration went with it, who was on the way before.
        is_ready = is_loss & ~is_any & (rank.ready.length > 0)
        is_gone, gone = (item.is_lost, item.request) if broken is None else (broken.is_stopped, broken.request)
        request = jnp.where(is_ready, rank.ready.front, jnp.where(is_gone, gone, request))
        is_held = is_ready | is_gone
        emitted = jnp.where(is_running, emitted, take(world.progress, request)[0])
        is_any = is_any | is_held
        blocks = blocks_for(take(requests.table, request)[PROMPT] + emitted - 1, dims)
        rank = replace(rank, used_blocks=rank.used_blocks - jnp.where(is_ready, blocks, 0),
                       ready=queues.pop_front(rank.ready, take(world.next_waiting, rank.ready.front), is_ready))
        if dims.has_roles:
            rank = replace(rank, held_blocks=rank.held_blocks - jnp.where(is_ready, blocks, 0),
                           visible_ready=jnp.where(is_ready, 0, rank.visible_ready))
    is_request = is_any & (request != nobody)
    is_sent_on = is_request & (take(world.lost, request)[SENT_ON] < params.failures.most_restarts)
    last_token = clock.select(is_lost == 1, times.batch.start, event.now)

    is_empty = is_loss & ~is_any
    rank = replace(rank, visible=jnp.where(is_empty, 0, rank.visible), progress=jnp.where(is_empty, 0, rank.progress))
    batch = replace(batch, is_lost=jnp.where(is_empty, 0, is_lost))
    wake, phase = clock.select(is_empty, clock.never(), wake), jnp.where(is_empty, w.IDLE, phase)
    event = event._replace(request=jnp.where(event.outage.is_due, request, event.request))
    loss = Loss(is_any, is_request, is_running, slot, emitted, last_token, is_sent_on,
                (event.outage.is_due & event.outage.is_back) | is_empty, is_held)
    return event, Counts(counts.executor, rank, batch), wake, phase, loss, broken


class Timer(NamedTuple):
    """Of a request in this step: its timer as the tree holds it, and whether that changes; how its sending ended; and
    whether its client has the first token."""

    due: Instant
    is_own: Bool[Array, ""]
    status: Int[Array, ""]
    is_kept: Bool[Array, ""]


def on_its_way(context: Context, event: Event, loss: Loss, now: Instant, timer: Timer) -> Timer:
    """The timer of a request that is lost, or that another instance takes; of others it stays what it is.

    Who is sent on arrives at this instant; who is taken has its client's timer back.
    """
    request, is_taken = event.request, event.is_arrival & event.is_rerouted
    row, state = take(context.world.lost, request), take(context.world.clients, request)[0]
    due = choose(is_taken, Instant(row[DUE], row[DUE_PARTS]), timer.due)
    due = choose(loss.is_sent_on, Instant(now.seconds, 2 * now.parts + 1), due)
    is_failed = (event.is_refused & event.is_rerouted) | (loss.is_request & ~loss.is_sent_on)
    status = jnp.where(loss.is_sent_on, ON_ITS_WAY, jnp.where(is_failed, FAILED, timer.status))
    is_same = loss.is_sent_on | is_taken
    return Timer(due, timer.is_own | loss.is_sent_on, status, timer.is_kept | (is_same & ((state & 1) == 1)))


def writes(context: Context, event: Event, loss: Loss, is_again: Bool[Array, ""], at_rank: Int[Array, ""],
           known: Writes) -> Writes:
    """What a step changes for requests that are lost. is_again: the client is to send this one from scratch; known:
    what the step writes anyway, of which some changes."""
    world, nobody = context.world, context.dims.num_requests
    request, is_taken = event.request, event.is_arrival & event.is_rerouted
    row = take(world.lost, request)
    repeats, ran = loss.is_sent_on & loss.has_kv, loss.is_sent_on & loss.is_running
    timer = take(world.timers, request)[:2]
    lost = jnp.stack([
        row[LOSSES] + loss.is_request, row[RESTARTS] + is_taken, jnp.where(is_again, 0, row[SENT_ON] + loss.is_sent_on),
        jnp.where(is_again, 0, row[REPEATED] + repeats), *jnp.where(loss.is_sent_on, timer, row[DUE:BEFORE])])
    if context.dims.has_migration:
        before = jnp.where(is_again, 0, jnp.where(is_taken, take(world.progress, request)[1], row[BEFORE]))
        lost = jnp.append(lost, before)
    changed = {"lost": Put((jnp.where(loss.is_request | is_taken | is_again, request, nobody),), lost)}

    def also(name, condition, value):
        put = known[name]
        index = (jnp.where(condition, request, put.index[0]),)
        changed[name] = type(put)(index, jnp.where(condition, value, put.value))

    also("placed", repeats & (loss.emitted == 0), jnp.stack([jnp.int32(-1), at_rank]))
    also("slot_of", loss.is_sent_on, context.dims.null_slot)
    # As if it were preempted: it stands still from now on, and has had its last token before. Who was to migrate stands
    # still already.
    preemptions = take(world.progress, request)[1]
    also("progress", repeats, jnp.stack([loss.emitted, preemptions + 1]))
    until = clock.to_integers(world.epoch, event.now)
    also("stalled", ran if context.dims.has_migration else repeats, -until)
    # Nobody took it.
    is_refused = event.is_refused & event.is_rerouted & ~is_again & (preemptions > 0)
    changed["stalled"] = _of_value(changed["stalled"], is_refused, until)
    stamp = jnp.stack([world.epoch.astype(jnp.float32), loss.last_token.hi, loss.last_token.lo])
    also("preempted", ran, stamp)
    if context.dims.has_roles:
        also("transfers", loss.is_request, -jnp.ones(9, jnp.float32))
    return changed


def _of_value(write, condition: Bool[Array, ""], value: Array):
    """The same write of another value where `condition`."""
    return write._replace(value=jnp.where(condition, value, write.value))


def progress(context: Context, event: Event, loss: Loss, item: lost_hand_overs.Item | None) -> dict[str, Array]:
    """The world's scalars that outages change."""
    world = context.world
    is_own = jnp.arange(context.dims.num_executors) == event.executor
    is_down = jnp.where(is_own & loss.is_over, ~event.outage.is_back, world.is_down)
    swept = {}
    if item is not None:
        swept = dict(sweep=jnp.where(loss.is_over, jnp.array(w.NO_SWEEP, jnp.int32), item.sweep))
    return dict(next_outage=world.next_outage + loss.is_over, is_down=is_down, **swept)
