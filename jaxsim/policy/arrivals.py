"""How requests arrive: in an open loop, at times given in advance, or in answer to what has ended."""

import abc
from typing import NamedTuple

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from jaxsim.kernels import clock
from jaxsim.kernels.clock import Time
from jaxsim.state.requests import Requests

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
    which an end may write one entry. `answers`: it does, that is, an end may bring an arrival about, at that instant or
    later; an arrival at the instant of an end comes before the next scheduling pass.
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

    def ended(self, state: PyTree, epoch: Int[Array, ""], now: Time, is_any: Bool[Array, ""], nowhere: int
              ) -> tuple[PyTree, Int[Array, ""], Stamp]:
        """The state once a request has ended, if any has, and the entry of `due` that changes (else `nowhere`).

        The entry is written after the step; `coming` must give the right answer before.
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

    def ended(self, state: Released, epoch: Int[Array, ""], now: Time, is_any: Bool[Array, ""], nowhere: int
              ) -> tuple[Released, Int[Array, ""], Stamp]:
        """Another request becomes due."""
        due = clock.add(now, clock.on_grid(self.think_s))
        stamp = jnp.stack([epoch.astype(jnp.float32), due.hi, due.lo])
        entry = jnp.where(is_any, jnp.minimum(self.num_clients + state.num_due, nowhere), nowhere)
        state = Released(state.num_first, state.num_others, state.num_due + is_any,
                         jnp.where(is_any, stamp, state.last))
        return state, entry, stamp


def _earlier(a: Time, b: Time) -> Time:
    return clock.select(a <= b, a, b)
