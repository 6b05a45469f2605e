"""Max-min fair parts of links that transfers share, in integers, by progressive filling.

A transfer uses the way out of its source, the way into its target, and the link that their pools share if there is one.
All transfers are given more at the same pace, up to where one of these is full, or a transfer goes as fast as it can
alone; that settles all who use it, and the others go on. Then nobody can have more without taking it from somebody who
has no more than that.

Speeds are whole parts, of which the fastest way has `WHOLE`; a round gives whole parts only, so that up to one part a
transfer is left over where the number does not divide. With that number nothing is, for up to 16 transfers that share
one end.

All transfers under way are looked at as a whole, once a round, O(window^2), where one begins or ends; there are as many
rounds as things to fill at most, and mostly two or three.

Source: Bertsekas and Gallager, Data Networks, section 6.5.2.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int

from jaxsim.state.flights import IN_UNITS, LINK, OUT_UNITS, SOURCE, TARGET, UNITS

WHOLE = 720720
"""Parts of the fastest way: the least common multiple of 1 to 16, below 2^20."""

LEAST_SHARE = 8
"""Parts that each of those who may share a way has at least: rounded down to whole parts, it has no less than 8/9 of
an equal share."""

DIGIT = 10
"""Bits of a digit below: products of two numbers below 2^20, taken by one digit of one of them, are below 2^31."""


def allotted(is_any: Bool[Array, " window"], rows: Int[Array, "window 6"], ways: Int[Array, "window 5"]
             ) -> Int[Array, " window"]:
    """Parts of every transfer; 0 where there is none."""
    def alike(column):
        return column == column[:, None]

    link, alone = ways[:, LINK], ways[:, UNITS]
    shared = ((alike(rows[:, SOURCE]), ways[:, OUT_UNITS]), (alike(rows[:, TARGET]), ways[:, IN_UNITS]),
              (alike(link) & (link >= 0), alone))

    def settle(state):
        given, is_open = state
        bound = alone
        for users, most in shared:
            number = jnp.sum(users & is_open, axis=1, dtype=jnp.int32)
            left = most - jnp.sum(jnp.where(users, given, 0), axis=1, dtype=jnp.int32)
            bound = jnp.minimum(bound, left // jnp.maximum(number, 1))
        level = jnp.min(jnp.where(is_open, bound, WHOLE))
        is_full = is_open & (bound == level)
        return jnp.where(is_full, level, given), is_open & ~is_full

    return lax.while_loop(lambda state: jnp.any(state[1]), settle, (jnp.zeros_like(alone), is_any))[0]


def scaled(units: Int[Array, " window"], ticks: Int[Array, " window"], number: Int[Array, " window"],
           divisor: Int[Array, " window"]
           ) -> tuple[Int[Array, " window"], Int[Array, " window"], Bool[Array, " window"]]:
    """A duration times number / divisor, in whole ticks, rounded down, and whether anything was.

    units, ticks: of 2^-15 s (below 2^30), and of 2^-30 s beyond these; number, divisor: below 2^20. The result has to
    be below 2^15 s.
    """
    mask = (1 << DIGIT) - 1
    digits = (units >> 25, (units >> 15) & mask, (units >> 5) & mask, ((units & 31) << 5) | (ticks >> DIGIT),
              ticks & mask)
    rest, quotient = jnp.zeros_like(units), []
    for digit in digits:
        value = (rest << DIGIT) + digit
        quotient.append(value // divisor)
        rest = value % divisor
    # What the whole divisors come to, and what the rest does.
    carry, product = jnp.zeros_like(units), []
    for digit in reversed(quotient):
        value = digit * number + carry
        product.append(value & mask)
        carry = value >> DIGIT
    upper = rest * (number >> DIGIT)
    lower = ((upper % divisor) << DIGIT) + rest * (number & mask)
    low = product[0] + (product[1] << DIGIT) + (product[2] << 2 * DIGIT)
    low = low + ((upper // divisor) << DIGIT) + lower // divisor
    units = (low >> 15) + (product[3] << 15) + ((product[4] + (carry << DIGIT)) << 25)
    return units, low & ((1 << 15) - 1), lower % divisor != 0


def rounded_up(units: Int[Array, " window"], ticks: Int[Array, " window"], is_more: Bool[Array, " window"]
               ) -> tuple[Int[Array, " window"], Int[Array, " window"]]:
    """A tick later where there is more."""
    ticks = ticks + is_more
    return units + (ticks >> 15), ticks & ((1 << 15) - 1)
