"""Loops inside the kernel of a step, which go on only as long as some scenario needs them.

XLA on CPU compiles a loop inside a kernel (`jaxsim.kernels.fence`) into that very function, so it costs what its rounds
do: under `vmap` those of the scenario that needs most, while the others keep what they have. Elsewhere every look at a
condition is a trip to the host, so there rounds are unrolled.
"""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool

T = TypeVar("T")


def are_kernels() -> bool:
    """Whether loops are part of a kernel, on the backend that is used."""
    return jax.default_backend() == "cpu"


def repeat(goes_on: Callable[[T], Bool[Array, ""]], body: Callable[[T], T], state: T, most: int) -> T:
    """`state = body(state)` while `goes_on(state)`, which has to be false after at most so many rounds."""
    def masked(state: T) -> T:
        return _chosen(goes_on(state), body(state), state)

    if are_kernels():
        if jax.sharding.get_abstract_mesh().manual_axes:
            # A loop must carry what varies between devices as such all the time, constants too.
            return lax.while_loop(goes_on, masked, _chosen(goes_on(state), state, state))
        return lax.while_loop(goes_on, body, state)
    for _ in range(most):
        state = masked(state)
    return state


def where_needed(condition: Bool[Array, ""], function: Callable[[], T], otherwise: T) -> T:
    """`function()` where the condition holds, else `otherwise`; on CPU not computed where it holds nowhere."""
    return repeat(lambda state: state[0], lambda _: (jnp.bool_(False), function()), (condition, otherwise), 1)[1]


def _chosen(condition: Bool[Array, ""], a: T, b: T) -> T:
    return jax.tree.map(lambda x, y: jnp.where(condition, x, y), a, b)
