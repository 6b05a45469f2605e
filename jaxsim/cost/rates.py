"""What the forms of single operators share: a device's peaks, and a maximum without a kink."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

TINY_S = 1e-30
"""Keeps derivatives of roots and ratios finite where nothing takes time."""


class Rates(NamedTuple):
    """Datasheet peaks of one device: FLOP/s of the products at hand, memory bytes/s, multiprocessors."""

    flops: Float[Array, ""] | float
    bytes_per_s: Float[Array, ""] | float
    num_multiprocessors: Int[Array, ""] | float


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def smooth_maximum(power: float, *terms: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """(a^p + b^p + ...)^(1/p) of nonnegative terms: at most 2^(1/p) times the larger of two.

    Its derivative by a is (a / result)^(p - 1), which takes one power and not those of every step.
    """
    top = jnp.maximum(terms[0], TINY_S)
    for term in terms[1:]:
        top = jnp.maximum(top, term)
    return top * sum((term / top) ** power for term in terms) ** (1 / power)


@smooth_maximum.defjvp
def _smooth_maximum_jvp(power, terms, tangents):
    found = smooth_maximum(power, *terms)
    below = power - 1
    # Whole powers are products.
    below = int(below) if float(below).is_integer() else below
    least = jnp.maximum(found, TINY_S)
    return found, sum((term / least) ** below * tangent for term, tangent in zip(terms, tangents, strict=True))
