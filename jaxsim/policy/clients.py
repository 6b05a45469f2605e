"""What clients do that get no answer in time, and what the cluster refuses."""

import equinox as eqx
import numpy as np
from jaxtyping import Array, Float, Int

from jaxsim.kernels import clock
from jaxsim.kernels.timers import NEVER, TICK_BITS

UNBOUNDED = np.int32(2**31 - 1)
"""Requests that no bound is ever reached by."""


class Clients(eqx.Module):
    """How long after a sending that failed its client sends again, and how many requests may be there at once.

    backoff: whole seconds and ticks of the clock's grid after the first sending, the second and so on; behind the last
    that is followed by another, `NEVER`. max_waiting: in the queue of an instance, which refuses whoever is routed
    there beyond; max_outstanding: waiting and running anywhere, beyond which the cluster refuses before it routes. How
    long clients wait for an answer is a matter of each request (`Requests.patience`).
    """

    backoff: Int[Array, "sendings 2"]
    max_waiting: Int[Array, ""]
    max_outstanding: Int[Array, ""]


def backoffs(retries: int, backoff_s: float, factor: float) -> Int[np.ndarray, "sendings 2"]:
    """`Clients.backoff`: after sending k (from 0) a wait of backoff_s * factor^k, on the grid of arrivals."""
    waits = instants_of(backoff_s * factor ** np.arange(retries))
    return np.vstack([waits, np.array([NEVER], np.int32)])


def instants_of(seconds: Float[np.ndarray, " waits"]) -> Int[np.ndarray, "waits 2"]:
    """Waits, on the grid of arrivals, as whole seconds and ticks; an infinite one is `NEVER`."""
    is_never = ~np.isfinite(seconds)
    rounded = clock.round_arrivals_reference(np.where(is_never, 0.0, seconds))
    whole = np.floor(rounded)
    parts = np.stack([whole, (rounded - whole) * 2.0**TICK_BITS], axis=-1).astype(np.int32)
    return np.where(is_never[:, None], np.array([NEVER], np.int32), parts)


def patience(deadline_s: Float[np.ndarray, " requests"], first_token_deadline_s: Float[np.ndarray, " requests"]
             ) -> Int[np.ndarray, "requests 4"]:
    """`Requests.patience` of clients that wait so long for the last and the first token; infinite where for ever.

    A first wait, then, if that was for the first token only, the rest of the other.
    """
    # Rounded one by one, so that both deadlines are on the grid, as seen from the sending.
    last_s, first_s = (np.where(np.isfinite(x), clock.round_arrivals_reference(np.where(np.isfinite(x), x, 0.0)), x)
                       for x in (deadline_s, first_token_deadline_s))
    waits_for_first = first_s < last_s
    rest = instants_of(np.where(waits_for_first, last_s, 0.0) - np.where(waits_for_first, first_s, 0.0))
    return np.hstack([instants_of(np.minimum(last_s, first_s)), np.where(waits_for_first[:, None], rest, -1)])
