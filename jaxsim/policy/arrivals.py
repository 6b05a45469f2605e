"""How requests arrive: in an open loop, at times given in advance, or in answer to what has ended."""

import abc
import math
from dataclasses import replace
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PyTree

from jaxsim.kernels import clock
from jaxsim.kernels.clock import Time
from jaxsim.state.requests import PARENT, Requests

Stamp = Float[Array, " 3"]
"""A time as (epoch, hi, lo), which no move of the world's epoch touches; hi is infinite for never."""


class Coming(NamedTuple):
    """The next arrival, who it is, and when the one after it comes as far as is known; relative to an epoch."""

    time: Time
    request: Int[Array, ""]
    following: Time


class AbstractSource(eqx.Module):
    """Delivers requests one at a time, each once.

    Its `state` is a pytree of few small arrays, which the loop carries whole; its `due` is an array over requests, of
    which an end may write a few entries. `answers`: it does, that is, an end may bring an arrival about, at that
    instant or later; an arrival at the instant of an end comes before the next scheduling pass.
    """

    answers = False

    def prepare(self, requests: Requests) -> Requests:
        """The requests as the loop is to read them; once, before it."""
        return requests

    @abc.abstractmethod
    def start(self, requests: Requests) -> tuple[PyTree, Float[Array, "due_rows 3"]]:
        """`state` and `due` before the first arrival."""

    def arrivals(self, requests: Requests, due: Float[Array, "due_rows 3"]) -> Float[Array, "rows 3"]:
        """When every request arrived (epoch, hi, lo); `requests` as `prepare` gave them, `due` at the end."""
        return requests.arrival[:, :3]

    @abc.abstractmethod
    def coming(self, requests: Requests, state: PyTree, due: Float[Array, "due_rows 3"], epoch: Int[Array, ""]
               ) -> Coming:
        """What comes next; `clock.never()` where nothing is known to."""

    @abc.abstractmethod
    def delivered(self, state: PyTree, request: Int[Array, ""], is_any: Bool[Array, ""]) -> PyTree:
        """The state once `request`, which was coming, has arrived, if it has."""

    def ended(self, requests: Requests, state: PyTree, due: Float[Array, "due_rows 3"], epoch: Int[Array, ""],
              now: Time, request: Int[Array, ""], is_any: Bool[Array, ""], nowhere: int
              ) -> tuple[PyTree, Int[Array, "*entries"], Float[Array, "*entries 3"]]:
        """The state once `request` has ended, if any has, and the entries of `due` that change (else `nowhere`).

        They are written after the step; `coming` must give the right time before. Called in every step of a source that
        answers, behind `delivered`.
        """
        raise NotImplementedError


def relative_to(epoch: Int[Array, ""], stamp: Stamp) -> Time:
    """A time as an offset within an epoch."""
    of, hi, lo = stamp
    distance = (of - epoch.astype(jnp.float32)) * clock.EPOCH_S
    moved = clock.add(clock.two_sum(jnp.where(jnp.isinf(hi), 0.0, hi), lo), distance)
    return clock.select(jnp.isinf(hi), clock.never(), moved)


class SortedArrivals(AbstractSource):
    """Open loop: the requests' own times, which are sorted.

    stretch: times are multiplied by it and rounded to their grid again, so that a rate can be swept, or traced, over
    one draw; None leaves them as they are.
    """

    stretch: Float[Array, ""] | None = None

    def prepare(self, requests: Requests) -> Requests:
        """The requests with stretched times."""
        return requests if self.stretch is None else requests.stretched(self.stretch)

    def start(self, requests: Requests) -> tuple[Int[Array, ""], Float[Array, "due_rows 3"]]:
        """The first request is the next."""
        return jnp.int32(0), jnp.zeros((1, 3), jnp.float32)

    def coming(self, requests: Requests, state: Int[Array, ""], due: Float[Array, "due_rows 3"], epoch: Int[Array, ""]
               ) -> Coming:
        """One row has this arrival and the next."""
        row = requests.arrival.at[state].get(mode="promise_in_bounds")
        return Coming(relative_to(epoch, row[:3]), state, relative_to(epoch, row[3:]))

    def delivered(self, state: Int[Array, ""], request: Int[Array, ""], is_any: Bool[Array, ""]) -> Int[Array, ""]:
        """On to the next."""
        return state + is_any


class PartArrivals(AbstractSource):
    """Open loop: rows in the order of `Requests.order`, in which parts arrive instead of their requests."""

    def start(self, requests: Requests) -> tuple[Int[Array, ""], Float[Array, "due_rows 3"]]:
        """The first in that order is the next."""
        return jnp.int32(0), jnp.zeros((1, 3), jnp.float32)

    def coming(self, requests: Requests, state: Int[Array, ""], due: Float[Array, "due_rows 3"], epoch: Int[Array, ""]
               ) -> Coming:
        """A part comes with its request. Behind the last is the scratch row, which never arrives."""
        rows = requests.order.at[state + jnp.arange(2)].get(mode="promise_in_bounds")
        whose = requests.images.at[rows, PARENT].get(mode="promise_in_bounds")
        stamps = requests.arrival.at[jnp.where(whose < 0, rows, whose)].get(mode="promise_in_bounds")[:, :3]
        return Coming(relative_to(epoch, stamps[0]), rows[0], relative_to(epoch, stamps[1]))

    def delivered(self, state: Int[Array, ""], request: Int[Array, ""], is_any: Bool[Array, ""]) -> Int[Array, ""]:
        """On to the next."""
        return state + is_any


class Released(eqx.Module):
    """State of `ClosedLoop`: how many first requests have arrived; how many others, how many are due or were, and when
    the last of these is."""

    num_first: Int[Array, ""]
    num_others: Int[Array, ""]
    num_due: Int[Array, ""]
    last: Stamp


class ClosedLoop(AbstractSource):
    """A number of clients that each have one request at a time; each sends another `think_s` after its answer.

    The first `num_clients` requests keep their own arrival times. As every client thinks equally long, the others are
    due in the order of the ends that bring them about.
    """

    num_clients: Int[Array, ""]
    think_s: Float[Array, ""]
    answers = True

    def start(self, requests: Requests) -> tuple[Released, Float[Array, "due_rows 3"]]:
        """Every client is about to send its first request."""
        is_first = jnp.arange(requests.arrival.shape[0]) < self.num_clients
        never, zero = jnp.array([0.0, jnp.inf, 0.0]), jnp.int32(0)
        return Released(zero, zero, zero, never), jnp.where(is_first[:, None], requests.arrival[:, :3], never)

    def arrivals(self, requests: Requests, due: Float[Array, "due_rows 3"]) -> Float[Array, "rows 3"]:
        """When they were due."""
        return due

    def coming(self, requests: Requests, state: Released, due: Float[Array, "due_rows 3"], epoch: Int[Array, ""]
               ) -> Coming:
        """The earlier of the next first request and the next other; first requests go first."""
        def at(index, end):
            stamp = due.at[jnp.minimum(index, due.shape[0] - 1)].get(mode="promise_in_bounds")
            # The last may not be written yet.
            is_last = (state.num_due > 0) & (index == self.num_clients + state.num_due - 1)
            stamp = jnp.where(is_last, state.last, stamp)
            is_any = (index < end) & (index < requests.count)
            return clock.select(is_any, relative_to(epoch, stamp), clock.never())

        first = [at(state.num_first + i, self.num_clients) for i in range(2)]
        released = self.num_clients + state.num_others
        other = [at(released + i, self.num_clients + state.num_due) for i in range(2)]
        is_first = first[0] <= other[0]
        return Coming(
            clock.select(is_first, first[0], other[0]), jnp.where(is_first, state.num_first, released),
            clock.select(is_first, _earlier(first[1], other[0]), _earlier(first[0], other[1])))

    def delivered(self, state: Released, request: Int[Array, ""], is_any: Bool[Array, ""]) -> Released:
        """On to the next of its kind."""
        is_first = request < self.num_clients
        return Released(state.num_first + (is_any & is_first), state.num_others + (is_any & ~is_first), state.num_due,
                        state.last)

    def ended(self, requests: Requests, state: Released, due: Float[Array, "due_rows 3"], epoch: Int[Array, ""],
              now: Time, request: Int[Array, ""], is_any: Bool[Array, ""], nowhere: int
              ) -> tuple[Released, Int[Array, ""], Stamp]:
        """Another request becomes due."""
        time = clock.add(now, clock.on_grid(self.think_s))
        stamp = jnp.stack([epoch.astype(jnp.float32), time.hi, time.lo])
        entry = jnp.where(is_any, jnp.minimum(self.num_clients + state.num_due, nowhere), nowhere)
        state = Released(state.num_first, state.num_others, state.num_due + is_any,
                         jnp.where(is_any, stamp, state.last))
        return state, entry, stamp


class Instant(NamedTuple):
    """A time as whole seconds and ticks of the clock's grid, which compare part by part, however far apart."""

    seconds: Int[Array, "*shape"]
    ticks: Int[Array, "*shape"]

    def __lt__(self, other: "Instant") -> Bool[Array, "*shape"]:
        return (self.seconds < other.seconds) | ((self.seconds == other.seconds) & (self.ticks < other.ticks))


TICK_BITS = 30
"""Of a second."""

NEVER = Instant(2**31 - 1, 0)
"""Behind all others."""


class Pending(eqx.Module):
    """State of `Sessions`.

    Of every group of requests the earliest instant that one is due, whose it is, and the instant behind it; the same of
    all; and which request has just arrived (-1: none).
    """

    earliest: Instant
    whose: Int[Array, " groups"]
    second: Instant
    first: Instant
    request: Int[Array, ""]
    following: Instant
    gone: Int[Array, ""]


class Sessions(AbstractSource):
    """Turns of sessions: the first ones have their own times, each other one is due its think time after the answer to
    the one before it (`Requests.successor`, `Requests.think`).

    Think times differ, so turns do not become due in the order of the ends that bring them about: what is due is a
    tournament in two rounds over all requests, in groups of about the root of their number. `due` holds when every
    request came or comes, as `arrivals` tells it, and behind that the instants of those still to come, group by group;
    the state has the first two of each group and of all. A step reads the group of who has arrived, and what the state
    has of the others: O(sqrt(requests)), nothing is sorted. Turns that are due at one instant come in the order of
    their numbers.

    front_end_s: between the engine and the client, added to every think time. stretch: as of `SortedArrivals`, for
    first turns only.

    Known gaps: no derivative passes through the time of a later turn; where iterations take no time at all, what
    happens at one instant on several instances may come in another order than the documented one.
    """

    front_end_s: Float[Array, ""]
    stretch: Float[Array, ""] | None = None
    answers = True

    def prepare(self, requests: Requests) -> Requests:
        """The requests with stretched times."""
        return requests if self.stretch is None else requests.stretched(self.stretch)

    def start(self, requests: Requests) -> tuple[Pending, Float[Array, "due_rows 3"]]:
        """First turns are due, no other is."""
        rows, width = _groups(requests)
        arrival = requests.arrival[:, :3]
        is_first = (requests.think[:, 0] < 0) & ~jnp.isinf(arrival[:, 1])
        of, hi, lo = jnp.where(is_first[:, None], arrival, 0.0).T
        pending = _choose(is_first, jax.vmap(_instant)(of.astype(jnp.int32), Time(hi, lo)), NEVER)
        pending = Instant(*(jnp.pad(part, (0, -rows % width), constant_values=never)
                            for part, never in zip(pending, NEVER, strict=True)))
        known = jnp.where(is_first[:, None], arrival, jnp.array([0.0, jnp.inf, 0.0]))
        place, earliest, second = jax.vmap(_two_earliest)(Instant(*(part.reshape(-1, width) for part in pending)))
        whose = jnp.minimum(place + width * jnp.arange(len(place)), rows - 1)
        return _leading(earliest, whose, second), jnp.concatenate([known, _to_floats(pending)])

    def arrivals(self, requests: Requests, due: Float[Array, "due_rows 3"]) -> Float[Array, "rows 3"]:
        """When they were due."""
        return due[:requests.arrival.shape[0]]

    def coming(self, requests: Requests, state: Pending, due: Float[Array, "due_rows 3"], epoch: Int[Array, ""]
               ) -> Coming:
        """The first two of all."""
        return Coming(_time(epoch, state.first), state.request, _time(epoch, state.following))

    def delivered(self, state: Pending, request: Int[Array, ""], is_any: Bool[Array, ""]) -> Pending:
        """Noted; `ended` takes it out."""
        return replace(state, gone=jnp.where(is_any, request, -1))

    def ended(self, requests: Requests, state: Pending, due: Float[Array, "due_rows 3"], epoch: Int[Array, ""],
              now: Time, request: Int[Array, ""], is_any: Bool[Array, ""], nowhere: int
              ) -> tuple[Pending, Int[Array, " 3"], Float[Array, "3 3"]]:
        """Who has arrived is no longer due; the next turn of the session whose answer is out is."""
        rows, width = _groups(requests)
        index = jnp.arange(len(state.whose), dtype=jnp.int32)
        gone = jnp.where(state.gone < 0, nowhere, state.gone)
        begin = gone // width * width
        members = _to_integers(lax.dynamic_slice(due, (rows + begin, 0), (width, 3)))
        members = _choose(jnp.arange(width) == gone - begin, NEVER, members)
        place, earliest, second = _two_earliest(members)
        is_left = index == gone // width
        earliest = _choose(is_left, earliest, state.earliest)
        second = _choose(is_left, second, state.second)
        whose = jnp.where(is_left, jnp.minimum(begin + place, rows - 1), state.whose)

        following = requests.successor.at[request].get(mode="promise_in_bounds")
        is_due = is_any & (following >= 0)
        following = jnp.where(is_due, following, nowhere)
        think = Instant(*requests.think.at[following].get(mode="promise_in_bounds"))
        outside = _instant(jnp.int32(0), Time(clock.on_grid(self.front_end_s), jnp.float32(0)))
        instant = _after(_after(_instant(epoch, now), outside), think)
        is_entered = is_due & (index == following // width)
        is_tied = (instant.seconds == earliest.seconds) & (instant.ticks == earliest.ticks)
        is_ahead = (instant < earliest) | (is_tied & (following < whose))
        behind = _choose(is_ahead, earliest, instant)
        second = _choose(is_entered & (behind < second), behind, second)
        earliest = _choose(is_entered & is_ahead, instant, earliest)
        whose = jnp.where(is_entered & is_ahead, following, whose)
        entries = jnp.stack([following, rows + following, rows + gone])
        pending = _to_floats(Instant(*(jnp.stack([jnp.where(is_due, part, never), jnp.int32(never)])
                                       for part, never in zip(instant, NEVER, strict=True))))
        return _leading(earliest, whose, second), entries, jnp.stack([_stamp(instant), *pending])


def _groups(requests: Requests) -> tuple[int, int]:
    """Rows of requests, and how many are a group: a power of two, at most their root."""
    rows = requests.arrival.shape[0]
    return rows, 1 << int(math.log2(rows) / 2)


def _leading(earliest: Instant, whose: Int[Array, " groups"], second: Instant) -> Pending:
    """With the first two of all, of those of every group."""
    place, first, elsewhere = _two_earliest(earliest)
    behind = Instant(*(part.at[place].get(mode="promise_in_bounds") for part in second))
    return Pending(earliest, whose, second, first, whose.at[place].get(mode="promise_in_bounds"),
                   _choose(behind < elsewhere, behind, elsewhere), jnp.int32(-1))


def _two_earliest(instants: Instant) -> tuple[Int[Array, ""], Instant, Instant]:
    """Place of the first of the smallest instants, that instant, and the smallest without it."""
    index = jnp.arange(len(instants.seconds), dtype=jnp.int32)
    first = _earliest(instants)
    is_first = (instants.seconds == first.seconds) & (instants.ticks == first.ticks)
    place = jnp.min(jnp.where(is_first, index, len(index) - 1))
    return place, first, _earliest(_choose(index == place, NEVER, instants))


def _earliest(instants: Instant) -> Instant:
    seconds = jnp.min(instants.seconds)
    return Instant(seconds, jnp.min(jnp.where(instants.seconds == seconds, instants.ticks, NEVER.seconds)))


def _choose(condition: Bool[Array, "*shape"], a: Instant, b: Instant) -> Instant:
    return Instant(*(jnp.where(condition, x, y) for x, y in zip(a, b, strict=True)))


def _after(instant: Instant, more: Instant) -> Instant:
    """The sum."""
    ticks = instant.ticks + more.ticks
    return Instant(instant.seconds + more.seconds + (ticks >> TICK_BITS), ticks & ((1 << TICK_BITS) - 1))


def _instant(epoch: Int[Array, ""], time: Time) -> Instant:
    """Of a time within an epoch."""
    seconds, units, ticks = clock.to_integers(epoch, time)
    return _after(Instant(seconds, units << 15), Instant(0, ticks))


def _parts(instant: Instant) -> tuple[Int[Array, ""], Time]:
    """Whole epochs of an instant, and the offset, exactly."""
    offset = Time((instant.seconds & 0xFFFF).astype(jnp.float32), jnp.float32(0))
    for part, unit in ((instant.ticks >> 15, 2.0**-15), (instant.ticks & 0x7FFF, clock.GRID_S)):
        offset = clock.add(offset, part.astype(jnp.float32) * unit)
    return instant.seconds >> 16, offset


def _time(epoch: Int[Array, ""], instant: Instant) -> Time:
    """As an offset within an epoch."""
    epochs, offset = _parts(instant)
    time = clock.add(offset, (epochs - epoch).astype(jnp.float32) * clock.EPOCH_S)
    return clock.select(instant.seconds == NEVER.seconds, clock.never(), time)


def _stamp(instant: Instant) -> Stamp:
    """As a stamp."""
    epochs, offset = _parts(instant)
    return jnp.stack([epochs.astype(jnp.float32), offset.hi, offset.lo])


def _to_floats(instants: Instant) -> Float[Array, "instants 3"]:
    """In parts that are exact in a float."""
    seconds, ticks = instants
    return jnp.stack([seconds >> 10, (seconds & 0x3FF) << 10 | ticks >> 20, ticks & 0xFFFFF], -1).astype(jnp.float32)


def _to_integers(parts: Float[Array, "instants 3"]) -> Instant:
    """And back."""
    first, second, third = parts.astype(jnp.int32).T
    return Instant(first << 10 | second >> 10, (second & 0x3FF) << 20 | third)


def _earlier(a: Time, b: Time) -> Time:
    return clock.select(a <= b, a, b)
