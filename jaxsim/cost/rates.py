"""What the forms of single operators share: a device's peaks, and a maximum without a kink."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

TINY_S = 1e-30
"""Keeps derivatives of roots and ratios finite where nothing takes time."""


class Rates(NamedTuple):
    """Datasheet peaks of one device: FLOP/s of the products at hand, memory bytes/s, multiprocessors."""

    flops: Float[Array, ""] | float
    bytes_per_s: Float[Array, ""] | float
    num_multiprocessors: Int[Array, ""] | float


def smooth_maximum(power: float, *terms: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """(a^p + b^p + ...)^(1/p) of nonnegative terms: at most 2^(1/p) times the larger of two."""
    top = jnp.maximum(terms[0], TINY_S)
    for term in terms[1:]:
        top = jnp.maximum(top, term)
    return top * sum((term / top) ** power for term in terms) ** (1 / power)
