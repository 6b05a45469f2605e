"""What happens next: the earliest of arrivals and wake-ups, and where an arriving request goes."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from jaxsim.engine import caches, role_switching, siblings, sweeps
from jaxsim.engine.common import Context, Params, iterations_to_reach, span, take
from jaxsim.engine.loads import loads_of, pool_sizes
from jaxsim.kernels import clock, packed, residues, timers
from jaxsim.kernels.clock import Time
from jaxsim.policy.arrivals import Coming, relative_to
from jaxsim.policy.failures import ON_ITS_WAY
from jaxsim.policy.routing import AbstractRouting, View
from jaxsim.spec.dims import Dims
from jaxsim.state import world as w
from jaxsim.state.control import DRAINING, ON, PARTNER, STARTING
from jaxsim.state.flights import TARGET
from jaxsim.state.requests import PARENT, PROMPT, Requests
from jaxsim.state.world import Batch, BatchTimes, World

FREEZE_S = 1.5 * clock.EPOCH_S
"""A scenario whose next event lies beyond this waits for the outer loop to move its epoch."""


class OutageChange(NamedTuple):
    """The next instance to go down or to come back, and when; is_due: that is what the step is about; sweep: with
    roles, whether it is about a queue of another."""

    time: Time
    executor: Int[Array, ""]
    is_back: Bool[Array, ""]
    is_due: Bool[Array, ""] | bool = False
    sweep: sweeps.Sweep | None = None


class Event(NamedTuple):
    """What happens next, where, and when: to which executor, which of its ranks, which batch of that rank.

    `request` is the one that arrives, `following` the time of the arrival after it.

    With roles or migration: `is_door`, a door opens. With these, or where ends bring arrivals about: `is_met`, a door
    opens or an iteration ends elsewhere at this instant, or the controller looks. With migration: `is_tick`, it does
    now, and `has_pair`, it has a pair to look at, of this executor and `partner`. With scaling: `scales`, whether it
    looks at all instances instead, and wants one more, one less.
    With clients: `is_timeout`, a client has waited for long enough; `is_again`, the arrival is not the first of its
    request; `is_refused`, nobody takes it, and `is_routed`, if by the instance it was routed to. `met`: with routers
    that know caches, what the request meets. With instances that fail: `outage`, and `is_rerouted`, the arrival is of
    a request that one of them lost. With roles that change: `is_turn`, their controller has one, and `is_handed`, it is
    the arrival of a part that another executor had; `is_idle`, nothing but its turns lies ahead.

    An arrival may bring the end of an iteration along: where the executor it meets stops before the following
    arrival, both are one step, and `now` is the time of the later one.
    """

    now: Time
    following: Time
    request: Int[Array, ""]
    executor: Int[Array, ""]
    rank: Int[Array, ""]
    batch: Int[Array, ""]
    is_arrival: Bool[Array, ""]
    is_ending: Bool[Array, ""]
    is_passing: Bool[Array, ""]
    is_door: Bool[Array, ""] | None = None
    is_met: Bool[Array, ""] | bool = False
    is_tick: Bool[Array, ""] | None = None
    has_pair: Bool[Array, ""] | None = None
    scales: tuple[Bool[Array, ""], Bool[Array, ""], Bool[Array, ""]] | None = None
    partner: Int[Array, ""] | None = None
    is_timeout: Bool[Array, ""] | None = None
    is_again: Bool[Array, ""] | None = None
    is_refused: Bool[Array, ""] | None = None
    is_routed: Bool[Array, ""] | None = None
    outage: OutageChange | None = None
    is_rerouted: Bool[Array, ""] | None = None
    met: caches.Met | None = None
    is_turn: Bool[Array, ""] | None = None
    is_handed: Bool[Array, ""] | None = None
    is_idle: Bool[Array, ""] | None = None

    @property
    def is_tied(self) -> Bool[Array, ""]:
        """An arrival at this very instant comes before any pass, and what happens elsewhere where that matters."""
        return self.following.equals(self.now) | self.is_met


def is_allowed(world: World, time: Time) -> Bool[Array, ""] | bool:
    """Whether the loop may go as far: up to `World.until`, and not to it."""
    return True if world.until is None else time < relative_to(world.epoch, world.until)


def earliest_wake(world: World) -> tuple[Time, Int[Array, ""], Int[Array, ""]]:
    """First executor to wake by (time, phase, index): its time, phase and index."""
    if world.phase.shape[0] == 1:
        return Time(world.wake_hi[0], world.wake_lo[0]), world.phase[0], jnp.int32(0)
    hi = jnp.min(world.wake_hi)
    lo = jnp.min(jnp.where(world.wake_hi == hi, world.wake_lo, jnp.inf))
    is_first = (world.wake_hi == hi) & (world.wake_lo == lo)
    bits = packed.index_bits(world.phase.shape[0])
    index = jnp.arange(world.phase.shape[0], dtype=jnp.int32)
    best = jnp.min(jnp.where(is_first, packed.pack_key(world.phase, index, bits), packed.EMPTY))
    phase, executor = packed.unpack_key(best, bits)
    return Time(hi, jnp.where(jnp.isinf(hi), 0.0, lo)), phase, executor


def earliest_door(world: World) -> tuple[Time, Int[Array, ""]]:
    """When a door opens next, and whose: at one instant those that open at once, then in the order of acceptance.

    Before all of them, where links are shared: that into which a transfer ends.
    """
    hi, lo, turn = world.doors[:-1].T
    first_hi = jnp.min(hi)
    first_lo = jnp.min(jnp.where(hi == first_hi, lo, jnp.inf))
    is_first = (hi == first_hi) & (lo == first_lo)
    executor = jnp.argmin(jnp.where(is_first, turn, jnp.inf)).astype(jnp.int32)
    time = Time(first_hi, jnp.where(jnp.isinf(first_hi), 0.0, first_lo))
    if world.flights is not None:
        end = world.flights.next_end
        is_end = end <= time
        into = take(world.flights.rows, world.flights.next_row)[TARGET]
        executor, time = jnp.where(is_end & ~jnp.isinf(end.hi), into, executor), clock.select(is_end, end, time)
    return time, executor


AT_ONCE = -1
"""In `World.doors`, instead of the number of a transfer: the door opens to see what is there."""


def next_time(params: Params, requests: Requests, world: World) -> Time:
    """When the next event is, an arrival or a wake-up; `clock.never()` if there is none."""
    arrival = params.source.coming(requests, world.source, world.due, world.epoch).time
    wake, _, _ = earliest_wake(world)
    first = clock.select(arrival <= wake, arrival, wake)
    if world.doors is not None:
        door, _ = earliest_door(world)
        first = clock.select(door <= first, door, first)
    if world.control is not None:
        tick = next_tick(world)
        first = clock.select(tick <= first, tick, first)
    if world.roles is not None:
        turn = role_switching.next_turn(world.roles)
        first = clock.select(turn <= first, turn, first)
    if world.timers is not None:
        timer = first_timer(requests, world).time
        first = clock.select(timer <= first, timer, first)
    return first


def next_tick(world: World) -> Time:
    """When the controller of migrations, or of how many executors are on, looks next."""
    poll, fleet = world.control.poll, world.control.fleet
    return poll if fleet is None else clock.select(fleet.check <= poll, fleet.check, poll)


class Timer(NamedTuple):
    """The first timer of a client: when it goes off, whose it is, and whether the request is sent again then."""

    time: Time
    request: Int[Array, ""]
    is_again: Bool[Array, ""]


def first_timer(requests: Requests, world: World) -> Timer:
    """Of all clients. At one instant nobody is sent again before all those who give up have."""
    instant, request = timers.earliest(lambda row: take(world.timers, row), requests.arrival.shape[0] - 1)
    time = timers.time_of(world.epoch, timers.Instant(instant.seconds, instant.parts >> 1))
    return Timer(time, request, (instant.parts & 1) == 1)


def before(timer: Timer, coming: Coming) -> tuple[Coming, Bool[Array, ""], Bool[Array, ""]]:
    """What comes next of arrivals and timers, and whether it is a timeout or an arrival that is not the first of its
    request. Timeouts come before arrivals, and these in the order of their requests."""
    is_tied = timer.time.equals(coming.time)
    is_again = timer.is_again & ((timer.time < coming.time) | (is_tied & (timer.request < coming.request)))
    is_timeout = ~timer.is_again & (timer.time <= coming.time)
    is_first = is_again | is_timeout
    # What a timer brings about is a step by itself, and so is what follows it.
    is_before_next = is_first | (timer.time <= coming.following)
    first = Coming(clock.select(is_first, timer.time, coming.time), jnp.where(is_first, timer.request, coming.request),
                   clock.select(is_before_next, timer.time, coming.following))
    return first, is_timeout, is_again


def next_outage(params: Params, world: World) -> OutageChange:
    """The next instance to go down or to come back; `clock.never()` behind the last."""
    table = params.failures
    time = relative_to(world.epoch, tuple(take(table.times, world.next_outage)))
    return OutageChange(time, take(table.instance, world.next_outage), take(table.is_back, world.next_outage))


def used_blocks_now(dims: Dims, world: World, now: Time, are_through: Bool[Array, " ranks"] | None = None
                    ) -> Int[Array, " ranks"]:
    """Blocks every rank holds at `now`, inside its jumps: those of passes up to the last boundary.

    are_through: whose passes of this very instant are behind us, where any are.
    """
    def taken(batch: Batch, t: BatchTimes, counts_by_residue, is_through=None):
        after_first = clock.add(t.start, t.first)
        guess = iterations_to_reach(t.pace.hi, t.growth_s, clock.elapsed(after_first, now))
        done = jnp.int32(0)

        def is_behind(boundary):
            return boundary < now if is_through is None else (boundary < now) | (is_through & boundary.equals(now))

        for j in (guess - 1, guess, guess + 1):
            reached = is_behind(clock.add(after_first, span(t.pace, t.growth_s, jnp.maximum(j, 0))))
            done = jnp.where(reached & (j > done), j, done)
        # The pass at each boundary behind us has taken its blocks; one at this very instant comes after arrivals.
        passes = jnp.where(is_behind(after_first), jnp.minimum(done + 1, batch.extra), 0)
        is_running = (batch.is_committed == 0) & (batch.extra > 0)
        if batch.taken is not None:
            is_running = is_running & (batch.taken == 0)
        blocks = residues.crossings_between(counts_by_residue, batch.count + batch.joining,
                                            batch.counter + batch.advance, passes)
        return jnp.where(is_running, blocks, 0)

    counts, times = w.count_rows(dims).everything(world.counts), w.clock_rows(dims).everything(world.clocks)
    batches = jax.tree.map(jnp.ravel, (counts.batch, times.batch))
    more = () if are_through is None else (are_through,)
    blocks = jax.vmap(taken)(*batches, world.residues, *more).reshape(dims.all_ranks, dims.num_batches)
    return counts.rank.used_blocks.ravel() + jnp.sum(blocks, axis=1)


def blocks_at_pass(context: Context, now: Time, executor: Int[Array, ""]) -> Int[Array, " executors"]:
    """Blocks every executor holds where a pass of one begins at `now`, passes of an instant in their order."""
    dims, world = context.dims, context.world
    return used_blocks_now(dims, world, now, jnp.arange(dims.num_executors) < executor)


def used_blocks(context: Context, now: Time) -> Int[Array, " ranks"]:
    """Blocks every rank holds at `now`."""
    dims, params, _, world, _ = context
    if params.flags.grows:
        return used_blocks_now(dims, world, now)
    return w.count_rows(dims).everything(world.counts).rank.used_blocks.ravel()


def able_to_take(context: Context, now: Time) -> Bool[Array, " executors"]:
    """Who takes prompts, where only some of the executors do, are on, or are up."""
    dims, world = context.dims, context.world
    if dims.has_roles:
        takes_prompts = role_switching.taking(context, ~context.params.hand_over.decodes)
        return takes_prompts & ~world.is_down if dims.has_failures else takes_prompts
    if not dims.has_failures:
        return world.control.fleet.is_on(now)
    return ~world.is_down & world.control.fleet.is_on(now) if dims.has_scaling else ~world.is_down


def route(context: Context, request: Int[Array, ""], now: Time, known: caches.Caches | None = None
          ) -> Int[Array, ""]:
    """The rank, among those of all executors, for the request that arrives now."""
    dims, params, _, world, _ = context
    if dims.all_ranks == 1:
        return jnp.int32(0)
    is_active = params.is_active
    if dims.has_roles or dims.has_scaling or dims.has_failures:
        able = able_to_take(context, now)
        is_active = able if is_active is None else able & is_active
    num_routed = world.num_routed
    if dims.has_variants:
        variant = take(context.requests.variant, request)
        serves = jnp.arange(dims.all_ranks) % params.variants == variant
        is_active, num_routed = serves if is_active is None else serves & is_active, take(
            world.routed_by_variant, variant)
    if dims.has_parts:
        encoding = params.encoding
        dealt = chosen_by(context, request, now, encoding.dealing, world.num_dealt,
                          role_switching.taking(context, encoding.encodes))
        prompt = chosen_by(context, request, now, params.routing, world.num_routed, is_active & ~encoding.encodes)
        return jnp.where(take(context.requests.images, request)[PARENT] >= 0, dealt, prompt)
    return chosen_by(context, request, now, params.routing, num_routed, is_active, known)


def chosen_by(context: Context, request: Int[Array, ""], now: Time, routing: AbstractRouting,
              num_routed: Int[Array, ""], is_active: Bool[Array, " ranks"] | None,
              known: caches.Caches | None = None) -> Int[Array, ""]:
    """The rank that a router chooses for a request, among the active ones; known: of caches, what it reads."""
    dims, params, requests, world, _ = context
    ranks = w.count_rows(dims).everything(world.counts).rank
    used = num_blocks = loads = None
    if routing.reads_kv or routing.reads_loads:
        used = used_blocks(context, now) if known is None else known.used_blocks
        if dims.has_roles:
            # Blocks that came back are taken at the next step there.
            used = used - world.returned[:-1]
        num_blocks = pool_sizes(context)
    if routing.reads_loads:
        loads = loads_of(context, used)
    waiting = ranks.waiting.ravel() if routing.reads_waiting else None
    prompt_tokens = take(requests.table, request)[PROMPT] if routing.reads_prompt else None
    more = {}
    if known is not None:
        more = {name: getattr(known, name)
                for name in ("cached_tokens", "matched_tokens", "tree_tokens", "prefill_tokens")}
    if routing.route_by:
        more["home"] = take(requests.home, request)
    if routing.reads_noise:
        more["noise"] = take(requests.noise, request)
    view = View(world.outstanding, waiting, used, num_blocks, num_routed, take(requests.uniforms, request),
                prompt_tokens, is_active, loads, block_size=dims.block_size, **more)
    chosen = routing.choose(view)
    if is_active is not None:
        behind = (jnp.arange(dims.all_ranks) - chosen) % dims.all_ranks
        chosen = jnp.argmin(jnp.where(is_active, behind, dims.all_ranks)).astype(jnp.int32)
    return chosen


def next_event(context: Context) -> tuple[Event, Bool[Array, ""]]:
    """The next event of a live scenario, and whether it lies too far ahead for now."""
    dims, params, requests, world, _ = context
    coming = params.source.coming(requests, world.source, world.due, world.epoch)
    if dims.has_clients:
        coming, is_timer_timeout, is_again = before(first_timer(requests, world), coming)
    arrival, request, after_it = coming
    wake, phase, executor = earliest_wake(world)
    is_arrival = (arrival < wake) | (arrival.equals(wake) & (phase == w.PASSING))
    now = clock.select(is_arrival, arrival, wake)
    if dims.has_swap:
        # Somebody may rest until a copy is through.
        is_arrival = is_arrival | (arrival.equals(wake) & (phase == w.RESTING))
        now = clock.select(is_arrival, arrival, wake)
    is_door = is_tick = None
    if dims.has_migration:
        poll = next_tick(world)
        is_tick = (poll <= arrival) & ((poll < wake) | (poll.equals(wake) & (phase == w.PASSING)))
        is_arrival, now = is_arrival & ~is_tick, clock.select(is_tick, poll, now)
    is_turn = is_handed = is_idle = None
    if dims.has_role_switching:
        turn = role_switching.next_turn(world.roles)
        is_turn = (turn <= arrival) & ((turn < wake) | (turn.equals(wake) & (phase == w.PASSING)))
        is_arrival, now = is_arrival & ~is_turn, clock.select(is_turn, turn, now)
        is_idle = jnp.isinf(arrival.hi) & jnp.isinf(wake.hi) & jnp.isinf(earliest_door(world)[0].hi)
        if dims.has_failures:
            is_idle = is_idle & jnp.isinf(next_outage(params, world).time.hi)
    if dims.has_moves:
        door, its_executor = earliest_door(world)
        is_door = door <= now
        is_arrival, now = is_arrival & ~is_door, clock.select(is_door, door, now)
    outage = None
    if dims.has_failures:
        # Behind ends and timeouts of its instant, before arrivals and passes.
        outage = next_outage(params, world)
        is_due = (outage.time < wake) | (outage.time.equals(wake) & (phase == w.PASSING))
        is_due = is_due & (outage.time <= arrival) & ~(is_timer_timeout & outage.time.equals(arrival))
        if dims.has_migration:
            is_due = is_due & (outage.time <= poll)
            is_tick = is_tick & ~is_due
        if dims.has_role_switching:
            is_due = is_due & (outage.time <= turn)
            is_turn = is_turn & ~is_due
        if dims.has_moves:
            is_due = is_due & (outage.time < door)
            is_door = is_door & ~is_due
        if dims.has_roles:
            sweep = sweeps.coming(context, outage.executor)
            is_flying = take(world.phase, outage.executor) == w.ENDING
            outage = outage._replace(sweep=sweep._replace(
                is_any=sweep.is_any & is_due & ~outage.is_back & ~is_flying))
        is_arrival, now = is_arrival & ~is_due, clock.select(is_due, outage.time, now)
    is_frozen = (now.hi >= FREEZE_S) | ~jnp.asarray(is_allowed(world, now))
    is_live = (world.num_finished < requests.count) & (world.fault == 0) & ~is_frozen
    is_arrival = is_arrival & is_live
    is_wake = ~is_arrival & is_live
    if outage is not None:
        outage = outage._replace(is_due=is_due & is_live)
        if outage.sweep is not None:
            outage = outage._replace(sweep=outage.sweep._replace(is_any=outage.sweep.is_any & is_live))
        is_wake = is_wake & ~outage.is_due
    has_pair = partner = scales = None
    if dims.has_migration:
        is_tick = is_tick & is_live & ~is_door
        is_wake = is_wake & ~is_tick
        used = used_blocks_now(dims, world, now)
        loads, fleet, of_fleet = loads_of(context, used), world.control.fleet, ()
        if fleet is not None:
            is_check, is_empty = fleet.check <= world.control.poll, world.outstanding == 0
            is_empty = is_empty & (world.control.moves[:, PARTNER] < 0)
            status = fleet.settled(now, is_empty)
            is_up = ~world.is_down if dims.has_failures else None
            of_fleet = status == ON, status == DRAINING
            num_coming = jnp.sum((status == STARTING) & is_up) if dims.has_failures else None
            scales = is_check, *params.scaling.decide(loads, status == ON, jnp.sum(status == STARTING), is_up,
                                                      num_coming)
            if dims.has_failures:
                of_fleet = tuple(one & is_up for one in of_fleet)
        elif dims.has_failures:
            of_fleet = (~world.is_down,)
        has_pair, source, partner = params.migration.next_pair(loads, world.control.paired, *of_fleet)
        if fleet is not None:
            has_pair = has_pair & ~is_check
    if dims.has_moves:
        is_door, is_wake = is_door & is_live, is_wake & ~is_door
        executor = jnp.where(is_door, its_executor, executor)
    if dims.has_role_switching:
        is_turn = is_turn & is_live & ~is_door
        is_wake, is_handed = is_wake & ~is_turn, is_turn & role_switching.is_handing(world.roles)
        executor = jnp.where(is_turn, role_switching.who_acts(world.roles), executor)
        request = jnp.where(is_handed, world.roles.handed.front, request)
    if dims.has_migration:
        executor = jnp.where(is_tick & has_pair, source, executor)
    known = caches.look(context, request, now, used_blocks(context, now)) if caches.are_read(context) else None
    target, rank, is_settling = route(context, request, now, known), jnp.int32(0), None
    if known is not None and known.is_owing is not None:
        # Evictions elsewhere first, until the router can see what is left.
        is_settling = is_arrival & jnp.any(known.is_owing)
        is_arrival = is_arrival & ~is_settling
        target = jnp.where(is_settling, jnp.argmax(known.is_owing).astype(jnp.int32), target)
    met = None if known is None else caches.at_rank(context, known, request, target, is_settling)
    if dims.has_siblings:
        # Before a pass that may ask them, what others have in their caches.
        is_asking, used = is_wake & (phase == w.PASSING), blocks_at_pass(context, now, executor)
        are_owing = siblings.are_owing(context, used, executor)
        is_asked = is_asking & jnp.any(are_owing)
        lender = jnp.argmax(are_owing).astype(jnp.int32)
        is_wake, target = is_wake & ~is_asked, jnp.where(is_asked, lender, target)
        if met is None:
            met = caches.Met(is_asked, take(used, lender), None, None, None, None)
        elif met.is_settling is None:
            met = met._replace(is_settling=is_asked, used=take(used, lender))
        else:
            met = met._replace(is_settling=is_settling | is_asked,
                               used=jnp.where(is_asked, take(used, lender), met.used))
        is_settling = met.is_settling
    is_there = is_arrival if is_settling is None else is_arrival | is_settling
    if dims.num_ranks > 1:
        rank = jnp.where(is_there, target % dims.num_ranks, rank)
        target = target // dims.num_ranks
    if dims.has_role_switching:
        is_there = is_there | is_handed
    executor = jnp.where(is_there, target, executor)
    following = clock.select(is_arrival, after_it, arrival)
    more = {}
    if outage is not None:
        executor = jnp.where(outage.is_due, outage.executor, executor)
        if outage.sweep is not None:
            executor = jnp.where(outage.sweep.is_any, outage.sweep.executor, executor)
        following = clock.select(outage.time <= following, outage.time, following)
    if dims.has_clients:
        is_timeout, is_arrival = is_arrival & is_timer_timeout, is_arrival & ~is_timer_timeout
        clients = params.clients
        waiting = take(w.count_rows(dims).everything(world.counts).rank.waiting.ravel(), target)
        is_full = is_arrival & (world.num_outstanding >= clients.max_outstanding)
        if outage is not None:
            is_full = is_arrival & (is_full | ~jnp.any(able_to_take(context, now)))
            is_again = is_again & ~outage.is_due
            more = dict(outage=outage, is_rerouted=is_again & (take(world.clients, request)[1] == ON_ITS_WAY))
        is_routed = is_arrival & ~is_full & (waiting >= clients.max_waiting)
        is_arrival = is_arrival & ~is_full & ~is_routed
        executor = jnp.where(is_timeout, take(world.routed, request), executor)
        more |= dict(is_timeout=is_timeout, is_again=is_again, is_refused=is_full | is_routed, is_routed=is_routed)
    if dims.has_role_switching:
        is_arrival = is_arrival | is_handed
        more |= dict(is_turn=is_turn, is_handed=is_handed, is_idle=is_idle)
    event = Event(now, following, request, executor, rank, jnp.int32(0), is_arrival, is_wake & (phase == w.ENDING),
                  is_wake & (phase == w.PASSING), is_door, is_tick=is_tick, has_pair=has_pair, partner=partner,
                  scales=scales, met=met, **more)
    if dims.has_swap:
        event = event._replace(is_passing=event.is_passing | (is_wake & (phase == w.RESTING)))
    if dims.has_moves or dims.has_siblings or (params.source.answers and dims.num_executors > 1):
        event = event._replace(is_met=_is_met(dims, world, now, executor))
    if dims.has_remote and dims.num_executors > 1:
        # What ends elsewhere at this instant may be in the store then, and passes use it in the order of executors.
        are_due = (world.wake_hi == now.hi) & (world.wake_lo == now.lo)
        is_met = jnp.any(are_due & (jnp.arange(dims.num_executors) != executor))
        event = event._replace(is_met=event.is_met | is_met)
    return event, is_frozen & (world.num_finished < requests.count) & (world.fault == 0)


def _is_met(dims: Dims, world: World, now: Time, executor: Int[Array, ""]) -> Bool[Array, ""]:
    """Whether a door opens, or an iteration of another executor ends, at this very instant."""
    ends = world.phase == w.ENDING
    if dims.has_siblings:
        # A pass sees what earlier ones of its instant did elsewhere.
        ends = ends | (world.phase == w.PASSING)
    ends = ends & (world.wake_hi == now.hi) & (world.wake_lo == now.lo)
    is_met = jnp.any(ends & (jnp.arange(ends.shape[0]) != executor))
    if dims.has_migration:
        is_met = is_met | next_tick(world).equals(now)
    if dims.has_role_switching:
        is_met = is_met | role_switching.next_turn(world.roles).equals(now)
    return is_met | earliest_door(world)[0].equals(now) if dims.has_moves else is_met
