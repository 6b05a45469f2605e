"""Fixed points and roots whose derivatives are those of the equation, not of the iterations that solve it."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

STEPS = 24
"""Of Newton's method; it doubles its digits with each near the solution."""

LEAST_SLOPE = 1e-3
"""Of `x - f(x)`: where arrivals fill nearly all of the time a step stays finite."""

BISECTIONS = 60

Elementwise = Callable[[Float[Array, "*shape"]], Float[Array, "*shape"]]


def _slope(function: Elementwise, x: Float[Array, "*shape"]) -> tuple[Array, Array]:
    return jax.jvp(function, (x,), (jnp.ones_like(x),))


def _divided(tangent: Elementwise, y: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Solve a linear map without cross terms."""
    slope = tangent(jnp.ones_like(y))
    return y / jnp.where(slope == 0, 1.0, slope)


def fixed_point(function: Elementwise, start: Float[Array, "*shape"], most: Float[Array, "*shape"]
                ) -> Float[Array, "*shape"]:
    """x = f(x), entry by entry (f of one entry reads that entry only), by Newton's method from below.

    start: at or below the smallest solution, so that it is the one found; most: no entry goes beyond.
    Source of the derivative: implicit function theorem, dx = df / (1 - f'), in both modes and to any order.
    """
    def solve(residual, x):
        def improved(_, x):
            value, slope = _slope(residual, x)
            return jnp.clip(x - value / jnp.maximum(slope, LEAST_SLOPE), start, most)

        return lax.fori_loop(0, STEPS, improved, x)

    return lax.custom_root(lambda x: x - function(x), lax.stop_gradient(start), solve, _divided)


def root(function: Elementwise, low: Float[Array, ""], high: Float[Array, ""]) -> Float[Array, ""]:
    """x between `low` and `high` at which a falling function is zero; an end where it is zero nowhere.

    By bisection. The derivative is that of the equation, and means nothing at an end.
    """
    low, high = (lax.stop_gradient(jnp.asarray(x, float)) for x in (low, high))

    def solve(function, _):
        def halved(_, ends):
            low, high = ends
            middle = 0.5 * (low + high)
            is_above = function(middle) > 0
            return jnp.where(is_above, middle, low), jnp.where(is_above, high, middle)

        low_end, high_end = lax.fori_loop(0, BISECTIONS, halved, (low, high))
        return 0.5 * (low_end + high_end)

    return lax.custom_root(function, low, solve, _divided)
