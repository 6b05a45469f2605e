"""Transfers under way over links that are shared, as the loop carries them from step to step: whole, like `Control`."""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Int

from jaxsim.kernels import clock
from jaxsim.kernels.clock import Time

REQUEST, SOURCE, TARGET, NUMBER, LEFT, LEFT_FINE = range(6)
"""Columns of `Flights.rows`: whose KV, out of and into which executor, its place among those accepted; what is left of
it, as the time that it takes alone: units of 2^-15 s, and of 2^-30 s beyond these."""


LINK, UNITS, OUT_UNITS, IN_UNITS, PARTS = range(5)
"""Columns of `Flights.ways`: the link that pools share, -1 where there is none; how fast it goes alone, how much its
source sends and its target takes at most, and with max-min fairness how fast it has gone since `Flights.at`, all in
parts of which the fastest has `jaxsim.engine.max_min.WHOLE`."""


class Flights(eqx.Module):
    """rows: one a transfer, of no request where there is none; at: when `LEFT` was that; next_end: when the first of
    them ends if nothing else happens, and next_row: which. ways: of each row, what it goes over; None where its two
    ends are all there is to know."""

    rows: Int[Array, "window 6"]
    at: Time
    next_end: Time
    next_row: Int[Array, ""]
    ways: Int[Array, "window 5"] | None = None


def no_flights(window: int, nobody: int, has_ways: bool = False) -> Flights:
    """None under way. nobody: the request of an empty row."""
    rows = jnp.zeros((window, 6), jnp.int32).at[:, REQUEST].set(nobody)
    ways = jnp.ones((window, 5), jnp.int32).at[:, LINK].set(-1) if has_ways else None
    return Flights(rows, Time(jnp.float32(0), jnp.float32(0)), clock.never(), jnp.int32(0), ways)
