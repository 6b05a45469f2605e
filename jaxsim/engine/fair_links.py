"""Links that transfers share: each goes at an equal part of the busier of its two ends.

With n transfers out of its source and m into its destination a transfer goes at 1 / max(n, m) of the bandwidth, so the
time that is left of it, alone, falls by 1 / max(n, m) a second. Shares change where a transfer begins or ends,
anywhere; at such an instant what is left of each is reckoned anew, in whole ticks of the clock (2^-30 s): what it was
served is rounded down, so that a change costs a transfer less than a tick of its own. Between two changes the first
end follows, exactly: at + left max(n, m). At the end of a transfer the link is free, and after the latency, which
nobody shares, its KV is there.

All transfers under way, of all executors, are in a table of static size that a step with a door looks at as a whole,
O(window^2): one more than it holds is a fault of the run.

Source: processor sharing. Approximated: what a transfer leaves unused, since its other end is the busier, is not given
to others, as max-min fairness would (Bertsekas and Gallager, Data Networks, section 6.5.2).
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from jaxsim.kernels import clock
from jaxsim.kernels.clock import Time
from jaxsim.state.flights import LEFT, LEFT_FINE, NUMBER, REQUEST, SOURCE, TARGET, Flights

FINE = 1 << 15
"""Ticks in a unit of `LEFT`."""

MOST_S = 2.0**15
"""What is left of a transfer times how many share its link has to stay below, in seconds, to be a whole number here."""


def span(start: Time, end: Time) -> tuple[Int[Array, ""], Int[Array, ""]]:
    """From one time to a later one: units of 2^-15 s, and ticks beyond these."""
    s, u, t = clock.to_integers(jnp.int32(0), end) - clock.to_integers(jnp.int32(0), start)
    return s * FINE + u + (t >> 15), t & (FINE - 1)


def after(time: Time, units: Int[Array, "*shape"], ticks: Int[Array, "*shape"]) -> Time:
    """So much later."""
    time = clock.add(time, (units >> 15).astype(jnp.float32))
    return clock.add(time, Time((units & (FINE - 1)).astype(jnp.float32) * 2.0**-15,
                                ticks.astype(jnp.float32) * jnp.float32(clock.GRID_S)))


def shares(rows: Int[Array, "window 6"], nobody: int) -> tuple[Bool[Array, " window"], Int[Array, " window"]]:
    """Which rows hold a transfer, and how many share the busier end of each, itself among them."""
    is_any = rows[:, REQUEST] != nobody

    def count(column):
        return jnp.sum(is_any & (rows[:, column] == rows[:, column, None]), axis=1, dtype=jnp.int32)

    return is_any, jnp.maximum(jnp.maximum(count(SOURCE), count(TARGET)), 1)


def change(flights: Flights, now: Time, nobody: int, *, is_ending: Bool[Array, ""], is_starting: Bool[Array, ""],
           starting: Int[Array, " 4"], work_s: Array) -> tuple[Flights, Bool[Array, ""]]:
    """The first one ends, or another begins, or neither; starting: the first four columns of its row; work_s: seconds
    that it takes alone. Returns whether there is no row for it, too."""
    rows = flights.rows
    is_any, sharing = shares(rows, nobody)
    units, ticks = span(flights.at, now)
    served, rest = units // sharing, units % sharing
    served_fine = (rest * FINE + ticks) // sharing
    fine = rows[:, LEFT_FINE] - served_fine
    borrow = (fine < 0).astype(jnp.int32)
    left = rows[:, LEFT] - served - borrow
    is_changing = is_ending | is_starting
    is_served = is_changing & is_any
    index = jnp.arange(rows.shape[0])
    is_gone = is_ending & (index == flights.next_row)
    own = jnp.argmax(~is_any)
    is_own = is_starting & (index == own)
    nothing = jnp.zeros_like(work_s)
    begun = jnp.concatenate([starting, jnp.stack(span(Time(nothing, nothing), Time(work_s, nothing)))])
    rows = rows.at[:, LEFT].set(jnp.where(is_served, left, rows[:, LEFT]))
    rows = rows.at[:, LEFT_FINE].set(jnp.where(is_served, fine + borrow * FINE, rows[:, LEFT_FINE]))
    rows = rows.at[:, REQUEST].set(jnp.where(is_gone, nobody, rows[:, REQUEST]))
    rows = jnp.where(is_own[:, None], begun, rows)
    at = clock.select(is_changing, now, flights.at)

    is_any, sharing = shares(rows, nobody)
    fine = rows[:, LEFT_FINE] * sharing
    units = rows[:, LEFT] * sharing + (fine >> 15)
    ticks = fine & (FINE - 1)
    is_first = is_any
    for value in (units, ticks, rows[:, NUMBER]):
        is_first = is_first & (value == jnp.min(jnp.where(is_first, value, jnp.iinfo(jnp.int32).max)))
    row = jnp.argmax(is_first).astype(jnp.int32)
    end = clock.select(jnp.any(is_any), after(at, units[row], ticks[row]), clock.never())
    return Flights(rows, at, end, row), is_starting & ~jnp.any(flights.rows[:, REQUEST] == nobody)


def shifted(flights: Flights, back_s: Array) -> Flights:
    """In an epoch that begins later."""
    return Flights(flights.rows, clock.shift(flights.at, back_s), clock.shift(flights.next_end, back_s),
                   flights.next_row)
