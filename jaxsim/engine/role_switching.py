"""Executors that change their role while they serve: who is what now, and the turns of the controller.

The controller has turns, at one instant in this order: sample the queues and decide, in one step; then the executors
that poll, one a step, which learn that they are to move; then those that are looked at, one a step, whether they are
empty or have loaded. Turns come behind deliveries and ends of iterations of their instant, before arrivals and passes.

Who learns that it moves takes nobody from then on. One that encodes hands its waiting parts to the others, as the
router of parts deals them: its whole queue is taken away in one step, and each part is then an arrival of this very
instant, one a step, in the order they waited. So it is with the queues of all that encode, one behind the other, where
one more of them has them dealt anew. Empty is an executor that has nobody and of whose blocks none are kept
for a transfer. All that depends on the role (`HandOver`, `Encoding`, the group) is asked of `as_of_now`, so that the
other phases know nothing of this.

Who is down (`jaxsim.engine.failures`) counts for no stage and is not moved; a stage of which all are down is none. A
move that was decided before goes on: who is down is empty, so it has its new role at the next look, and comes back in
it.

Approximated: turns go on while nobody is there. Parts that move behind those of later requests may leave caches full of
parts that wait for each other; a run in which nothing can happen any more is stopped.
"""

from dataclasses import replace
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxsim.engine.common import Context, Params, choose, take
from jaxsim.engine.writes import Put, Writes
from jaxsim.kernels import clock, packed, queues
from jaxsim.kernels.clock import Time
from jaxsim.kernels.queues import Link, Queue
from jaxsim.policy.role_switching import DECODE, ENCODE, PREFILL, ROLES, RoleSwitching
from jaxsim.state import world as w
from jaxsim.state.roles import (
    ASKED,
    CHANGED,
    DRAINS,
    EMPTIED,
    LOADS,
    MOST_SWITCHES,
    STAYS,
    STOPPED,
    Roles,
)
from jaxsim.state.world import Counts, World


class Switched(NamedTuple):
    """What a turn did: the controller's state behind it, the link that changes, how many left the executor of the step,
    what is kept of a switch (row, values), and whether nothing will ever happen again."""

    roles: Roles
    link: Link
    gone: Int[Array, ""]
    row: Int[Array, ""]
    kept: Float[Array, " 15"]
    is_starved: Bool[Array, ""]


def as_of_now(params: Params, world: World) -> Params:
    """The policies and numbers of a scenario with the roles that its executors have now."""
    role, policy = world.roles.role, params.switching
    encodes, decodes = role == ENCODE, role == DECODE
    pool_of = None if policy.pool_of is None else take(policy.pool_of, role)
    hand_over = replace(params.hand_over, computes_prompts=(role == PREFILL) | encodes, decodes=decodes,
                        pool_of=pool_of)
    encoding = None if params.encoding is None else replace(params.encoding, encodes=encodes)
    group_of = None if policy.group_of is None else take(policy.group_of, role)
    return replace(params, hand_over=hand_over, encoding=encoding, group_of=group_of)


def taking(context: Context, has_role: Bool[Array, " executors"]) -> Bool[Array, " executors"]:
    """Who of those that have a role takes anybody for it."""
    return has_role & (context.world.roles.status < DRAINS) if context.dims.has_role_switching else has_role


def next_turn(roles: Roles) -> Time:
    """When the controller, or an executor for its sake, does something next."""
    is_watched = roles.status >= DRAINS
    timers = roles.sample, roles.decide, roles.poll, roles.again
    hi = jnp.append(jnp.where(is_watched, roles.check.hi, jnp.inf), jnp.stack([timer.hi for timer in timers]))
    lo = jnp.append(roles.check.lo, jnp.stack([timer.lo for timer in timers]))
    first = jnp.min(hi)
    return Time(first, jnp.min(jnp.where(hi == first, lo, jnp.inf)))


def who_acts(roles: Roles) -> Int[Array, ""]:
    """The first executor that is to give away what waits there, or to learn that it moves."""
    return jnp.argmax(jnp.where(jnp.any(roles.dealing), roles.dealing, roles.status == ASKED)).astype(jnp.int32)


def is_handing(roles: Roles) -> Bool[Array, ""]:
    """Whether a part that is nowhere is to arrive somewhere at this instant."""
    return (roles.handed.length > 0) & ~jnp.any(roles.dealing)


def act(context: Context, now: Time, is_turn: Bool[Array, ""], is_handed: Bool[Array, ""], is_idle: Bool[Array, ""],
        executor: Int[Array, ""], counts: Counts, wake: Time, phase: Int[Array, ""]
        ) -> tuple[Counts, Time, Int[Array, ""], Switched]:
    """One turn, or the arrival of a part that was handed on. Returns what this changes at the executor of the step, and
    what wakes it.

    is_handed: the turn is such an arrival; is_idle: but for turns nothing is going to happen.
    """
    dims, params, _, world, _ = context
    roles, policy, e = world.roles, params.switching, executor
    here = jnp.arange(dims.num_executors)
    ranks = w.count_rows(dims).everything(world.counts).rank
    handed = queues.pop_front(roles.handed, take(world.next_waiting, roles.handed.front), is_handed)
    status, role, next_role = roles.status, roles.role, roles.next_role

    deals = is_turn & jnp.any(roles.dealing)
    is_other = is_turn & ~is_handed & ~deals
    is_sample, is_decision = is_other & roles.sample.equals(now), is_other & roles.decide.equals(now)
    is_other = is_other & ~is_sample & ~is_decision
    is_of = role == jnp.arange(len(ROLES))[:, None]
    lengths = jnp.sum(jnp.where(is_of, world.outstanding - ranks.running.ravel(), 0), axis=1, dtype=jnp.int32)
    queued = roles.queued + jnp.where(is_sample, lengths, 0)
    stays = status == STAYS
    if dims.has_failures:
        stays = stays & ~world.is_down
    moves, source, target = policy.decide(queued, jnp.sum(is_of & stays, axis=1, dtype=jnp.int32))
    moves = moves & is_decision
    spare = jnp.where((role == source) & stays, world.outstanding, packed.EMPTY)
    mover = jnp.argmin(spare).astype(jnp.int32)

    is_poll = is_other & roles.poll.equals(now)
    is_other = is_other & ~is_poll
    stops = is_poll & jnp.any(status == ASKED)
    hands = deals | (stops & (take(role, e) == ENCODE))
    is_over = is_other & roles.again.equals(now)
    is_other = is_other & ~is_over

    watched = jnp.argmax((status >= DRAINS) & roles.check.equals(now)).astype(jnp.int32)
    are_empty = (world.outstanding == 0) & (ranks.kept_blocks.ravel() == world.returned[:-1])
    is_empty = is_other & (take(status, watched) == DRAINS) & take(are_empty, watched)
    loads = is_empty & (policy.switch_s > 0)
    changes = (is_empty & ~loads) | (is_other & (take(status, watched) == LOADS))

    begins = changes & policy.deals_anew & (take(next_role, watched) == ENCODE)
    about = jnp.where(moves, mover, jnp.where(stops, e, watched))
    is_about = here == about
    new = jnp.where(moves, ASKED, jnp.where(stops, DRAINS, jnp.where(changes, STAYS, jnp.where(
        loads, LOADS, take(status, about)))))
    check = clock.add(now, jnp.where(loads, policy.switch_s, policy.drain_check_s))
    own_row = jnp.where(moves, jnp.minimum(roles.num_switches, MOST_SWITCHES), take(roles.row, about))

    def timer(is_over, time, period_s):
        return clock.select(is_over, clock.add(now, period_s), time)

    after = Roles(
        role=jnp.where(is_about & changes, next_role, role),
        next_role=jnp.where(is_about & moves, target, next_role),
        status=jnp.where(is_about, new, status),
        check=clock.select(is_about & (stops | is_other), Time(*(jnp.broadcast_to(x, here.shape) for x in check)),
                           roles.check),
        row=jnp.where(is_about, own_row, roles.row),
        sample=timer(is_sample, roles.sample, policy.sample_s),
        decide=timer(is_decision, roles.decide, policy.decide_s),
        poll=timer(is_poll & ~stops, roles.poll, policy.poll_s),
        queued=jnp.where(is_decision, 0, queued),
        handed=choose(hands, _behind(handed, counts.rank.queue), handed),
        dealing=(roles.dealing & ~(deals & (here == e))) | (begins & (role == ENCODE) & (status < DRAINS)),
        again=clock.select(begins, now, clock.select(is_over, clock.never(), roles.again)),
        num_handed=roles.num_handed + is_handed, num_switches=roles.num_switches + moves,
        num_changed=roles.num_changed + changes, steps=jnp.where(is_decision, world.steps, roles.steps))

    stamp = jnp.stack([world.epoch.astype(jnp.float32), now.hi, now.lo])
    fresh = jnp.concatenate([jnp.stack([mover, take(role, mover), target]).astype(jnp.float32), stamp,
                             -jnp.ones(9, jnp.float32)])
    columns = jnp.arange(fresh.shape[0])
    values = take(world.switches, own_row)
    for is_now, column in ((stops, STOPPED), (is_empty, EMPTIED), (changes, CHANGED)):
        is_column = is_now & (columns >= column) & (columns < column + 3)
        values = jnp.where(is_column, jnp.tile(stamp, 5), values)
    is_kept = moves | stops | is_empty | changes
    values = jnp.where(moves, fresh, values)

    is_linked = hands & (handed.length > 0) & (counts.rank.queue.length > 0)
    link = jnp.where(is_linked, handed.back, dims.num_requests), counts.rank.queue.front
    # Who hands its parts on may have nothing left to do at this instant.
    rank = counts.rank
    gone = jnp.where(hands, rank.queue.length, 0)
    counts = replace(counts, rank=replace(rank, queue=rank.queue._replace(length=rank.queue.length - gone)))
    rests = hands & (rank.running == 0) & ((phase == w.PASSING) | (phase == w.RESTING))
    wake, phase = clock.select(rests, clock.never(), wake), jnp.where(rests, w.IDLE, phase)
    # Nobody has done anything since the last decision, so the next one is like this; who drains has to wait for others.
    are_still = (status == STAYS) | ((status == DRAINS) & ~are_empty)
    is_starved = is_decision & ~moves & is_idle & jnp.all(are_still) & (world.steps == roles.steps)
    row = jnp.where(is_kept, own_row, MOST_SWITCHES)
    return counts, wake, phase, Switched(after, link, gone, row, values, is_starved)


def _behind(first: Queue, second: Queue) -> Queue:
    """One queue with another behind it, once they are linked."""
    return Queue(jnp.where(first.length > 0, first.front, second.front),
                 jnp.where(second.length > 0, second.back, first.back), first.length + second.length)


def writes(switched: Switched) -> Writes:
    """What a step changes of what is kept of switches."""
    return {"switches": Put((switched.row,), switched.kept)}


def opened(world: World, policy: RoleSwitching) -> World:
    """Before the first event, with the roles and times of the beginning."""
    def first(period_s):
        return Time(period_s, jnp.zeros_like(period_s))

    roles = replace(world.roles, role=policy.roles, next_role=policy.roles, sample=first(policy.sample_s),
                    decide=first(policy.decide_s), poll=first(policy.poll_s))
    return replace(world, roles=roles)


def shifted(world: World, back_s: Float[Array, ""]) -> World:
    """In an epoch that begins later."""
    roles = world.roles
    check = clock.shift(roles.check, jnp.broadcast_to(back_s, roles.check.hi.shape))
    check = clock.select(roles.status >= DRAINS, check, clock.never(check.hi.shape))
    return replace(world, roles=replace(
        roles, check=check, sample=clock.shift(roles.sample, back_s), decide=clock.shift(roles.decide, back_s),
        poll=clock.shift(roles.poll, back_s), again=clock.shift(roles.again, back_s)))
