"""Transfers under way over links that are shared, as the loop carries them from step to step: whole, like `Control`."""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Int

from jaxsim.kernels import clock
from jaxsim.kernels.clock import Time

REQUEST, SOURCE, TARGET, NUMBER, LEFT, LEFT_FINE = range(6)
"""Columns of `Flights.rows`: whose KV, out of and into which executor, its place among those accepted; what is left of
it, as the time that it takes alone: units of 2^-15 s, and of 2^-30 s beyond these."""


class Flights(eqx.Module):
    """rows: one a transfer, of no request where there is none; at: when `LEFT` was that; next_end: when the first of
    them ends if nothing else happens, and next_row: which."""

    rows: Int[Array, "window 6"]
    at: Time
    next_end: Time
    next_row: Int[Array, ""]


def no_flights(window: int, nobody: int) -> Flights:
    """None under way. nobody: the request of an empty row."""
    rows = jnp.zeros((window, 6), jnp.int32).at[:, REQUEST].set(nobody)
    return Flights(rows, Time(jnp.float32(0), jnp.float32(0)), clock.never(), jnp.int32(0))
