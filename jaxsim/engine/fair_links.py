"""Links that transfers share: each goes at an equal part of the busier of its two ends.

With n transfers out of its source and m into its destination a transfer goes at 1 / max(n, m) of the bandwidth, so the
time that is left of it, alone, falls by 1 / max(n, m) a second. Shares change where a transfer begins or ends,
anywhere; at such an instant what is left of each is reckoned anew, in whole ticks of the clock (2^-30 s): what it was
served is rounded down, so that a change costs a transfer less than a tick of its own. Between two changes the first
end follows, exactly: at + left max(n, m). At the end of a transfer the link is free, and after the latency, which
nobody shares, its KV is there.

A link that all executors of two pools share is a third thing to be busy. Where ways are not equally fast, each goes at
its part of its own speed: the time of a link is divided, not its bytes.

All transfers under way, of all executors, are in a table of static size that a step with a door looks at as a whole,
O(window^2): one more than it holds is a fault of the run.

Source: processor sharing. Approximated: what a transfer leaves unused, since its other end is the busier, is not given
to others; with `is_max_min` it is (`jaxsim.engine.max_min`), at the cost of more rounds over that table.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from jaxsim.engine import max_min
from jaxsim.engine.common import Context, take
from jaxsim.kernels import clock
from jaxsim.kernels.clock import Time
from jaxsim.state.flights import LEFT, LEFT_FINE, LINK, NUMBER, PARTS, REQUEST, SOURCE, TARGET, UNITS, Flights

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


def shares(rows: Int[Array, "window 6"], nobody: int, ways: Int[Array, "window 5"] | None = None
           ) -> tuple[Bool[Array, " window"], Int[Array, " window"]]:
    """Which rows hold a transfer, and how many share the busier end of each, or the link of its pools, itself among
    them."""
    is_any = rows[:, REQUEST] != nobody

    def count(column, of=rows):
        return jnp.sum(is_any & (of[:, column] == of[:, column, None]), axis=1, dtype=jnp.int32)

    most = jnp.maximum(jnp.maximum(count(SOURCE), count(TARGET)), 1)
    if ways is not None:
        most = jnp.maximum(most, jnp.where(ways[:, LINK] >= 0, count(LINK, ways), 0))
    return is_any, most


def way_of(context: Context, source: Int[Array, ""], target: Int[Array, ""]) -> Int[Array, " 5"]:
    """What a transfer goes over: a row of `Flights.ways`."""
    rules, link, units = context.params.hand_over, jnp.int32(-1), jnp.full(3, max_min.WHOLE, jnp.int32)
    if rules.shared_link is not None:
        link = rules.over(rules.shared_link, source, target)
    if rules.units is not None:
        out, into = take(rules.pool_of, source), take(rules.pool_of, target)
        units = jnp.stack([take(rules.units, out, into), jnp.max(take(rules.units, out)),
                           jnp.max(take(rules.units.T, into))])
    return jnp.concatenate([link[None], units, jnp.ones(1, jnp.int32)])


def change(flights: Flights, now: Time, nobody: int, *, is_ending: Bool[Array, ""], is_starting: Bool[Array, ""],
           starting: Int[Array, " 4"], work_s: Array, way: Int[Array, " 5"] | None = None,
           is_max_min: bool = False) -> tuple[Flights, Bool[Array, ""]]:
    """The first one ends, or another begins, or neither; starting: the first four columns of its row; work_s: seconds
    that it takes alone; way: what it goes over. Returns whether there is no row for it, too."""
    rows, ways = flights.rows, flights.ways
    is_any, sharing = shares(rows, nobody, ways)
    units, ticks = span(flights.at, now)
    if is_max_min:
        parts = ways[:, PARTS]
        served, served_fine, _ = max_min.scaled(
            jnp.broadcast_to(units, parts.shape), jnp.broadcast_to(ticks, parts.shape), parts, ways[:, UNITS])
    else:
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
    ways = None if ways is None else jnp.where(is_own[:, None], way, ways)
    at = clock.select(is_changing, now, flights.at)

    is_any, sharing = shares(rows, nobody, ways)
    if is_max_min:
        # The others go on as they do, where nothing changes.
        parts = jnp.maximum(max_min.allotted(is_any & is_changing, rows, ways), 1)
        parts = jnp.where(is_changing, parts, ways[:, PARTS])
        ways = ways.at[:, PARTS].set(parts)
        units, ticks = max_min.rounded_up(*max_min.scaled(rows[:, LEFT], rows[:, LEFT_FINE], ways[:, UNITS], parts))
    else:
        fine = rows[:, LEFT_FINE] * sharing
        units = rows[:, LEFT] * sharing + (fine >> 15)
        ticks = fine & (FINE - 1)
    is_first = is_any
    for value in (units, ticks, rows[:, NUMBER]):
        is_first = is_first & (value == jnp.min(jnp.where(is_first, value, jnp.iinfo(jnp.int32).max)))
    row = jnp.argmax(is_first).astype(jnp.int32)
    end = clock.select(jnp.any(is_any), after(at, units[row], ticks[row]), clock.never())
    return Flights(rows, at, end, row, ways), is_starting & ~jnp.any(flights.rows[:, REQUEST] == nobody)


def shifted(flights: Flights, back_s: Array) -> Flights:
    """In an epoch that begins later."""
    return Flights(flights.rows, clock.shift(flights.at, back_s), clock.shift(flights.next_end, back_s),
                   flights.next_row, flights.ways)
