"""Lengths of runs of iterations, forwards and backwards, against exact rational arithmetic."""

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxsim.engine.common import MAX_SPAN_S, blocks_for, iterations_to_reach, span
from jaxsim.kernels.clock import Time
from jaxsim.spec.dims import MAX_JUMP, Dims

SEEDS = settings(max_examples=25, deadline=None, derandomize=True)
TICKS_PER_SECOND = 1 << 30
LANES = 256

spans = jax.jit(jax.vmap(span))
every_span = jax.jit(jax.vmap(lambda pace, growth_s: jax.vmap(lambda j: span(pace, growth_s, j))(jnp.arange(MAX_JUMP))))
guesses = jax.jit(jax.vmap(iterations_to_reach))


def ticks_of(time: Time) -> np.ndarray:
    """Exact ticks of times on the grid."""
    ticks = sum(np.asarray(x, np.float64) for x in time) * TICKS_PER_SECOND
    assert np.array_equal(ticks, np.round(ticks)), "off the grid"
    return ticks.astype(np.int64)


def runs(rng: np.random.Generator) -> tuple[Time, np.ndarray]:
    """Paces of 2^-20 s to 1 s that do not grow, grow by up to themselves, or shrink to half, for up to 2^15 s."""
    pace = np.exp2(rng.uniform(-20, 0, LANES)).astype(np.float32)
    lo = (pace * rng.uniform(-1, 1, LANES) * 2.0**-25).astype(np.float32)
    growth = np.minimum(pace * np.exp2(rng.uniform(-24, 0, LANES)), 2.0**-9).astype(np.float32)
    growth[::4] = 0.0
    growth[1::16] = np.minimum(pace, 2.0**-9)[1::16]
    growth[2::8] = (-pace * rng.random(LANES) / (2 * MAX_JUMP)).astype(np.float32)[2::8]
    return Time(pace, lo), growth


@SEEDS
@given(st.integers(0, 2**32))
def test_span_is_right_to_a_few_roundings(seed):
    """Half a tick for each of its three terms, and what float32 rounds off the two that are not products of a pair."""
    rng = np.random.default_rng(seed)
    pace, growth = runs(rng)
    count = rng.integers(0, MAX_JUMP, LANES).astype(np.int32)
    count[:3] = [0, 1, MAX_JUMP - 1]
    got = ticks_of(spans(pace, growth, count))
    for ticks, hi, lo, per, j in zip(got.tolist(), *(x.tolist() for x in (*pace, growth, count)), strict=True):
        rest, grown = j * Fraction(lo), Fraction(per) * (j * (j - 1) // 2)
        exact = (j * Fraction(hi) + rest + grown) * TICKS_PER_SECOND
        bound = Fraction(3, 2) + (abs(rest) + abs(grown)) * TICKS_PER_SECOND / (1 << 24)
        assert abs(ticks - exact) <= bound * (1 + Fraction(1, 1 << 20))


@SEEDS
@given(st.integers(0, 2**32))
def test_span_of_ticks_is_exact(seed):
    """Where pace and growth are on the grid and the growth a power of two, no product loses a bit."""
    rng = np.random.default_rng(seed)
    hi_ticks = rng.integers(1 << 18, 1 << 24, LANES) << rng.integers(0, 6, LANES)
    lo_ticks = rng.integers(-3, 4, LANES)
    growth_ticks = np.where(rng.random(LANES) < 0.2, 0, 1 << rng.integers(0, 18, LANES))
    count = rng.integers(0, MAX_JUMP, LANES)
    pace = Time(*(np.ldexp(x, -30).astype(np.float32) for x in (hi_ticks, lo_ticks)))
    got = spans(pace, np.ldexp(growth_ticks, -30).astype(np.float32), count.astype(np.int32))
    want = count * (hi_ticks + lo_ticks) + growth_ticks * (count * (count - 1) // 2)
    assert np.array_equal(ticks_of(got), want)


@SEEDS
@given(st.integers(0, 2**32))
def test_iterations_to_reach_is_at_most_one_off(seed):
    """The smallest count whose span is the distance or more, of all counts there are; beyond them if none is.

    In the middle of an iteration, where no rounding decides, it is that count.
    """
    rng = np.random.default_rng(seed)
    pace, growth = runs(rng)
    reached = ticks_of(every_span(pace, growth))
    assert np.all(np.diff(reached, axis=1) > 0)
    # Anywhere, at ends of iterations and a tick beside them, nowhere, behind, and past every end.
    at = reached[np.arange(LANES), rng.integers(0, MAX_JUMP, LANES)]
    share = rng.integers(0, np.where(growth < 0, 7, 8))
    ticks = np.select([share < 2, share < 5, share == 5, share == 6],
                      [(reached[:, -1] * rng.random(LANES)).astype(np.int64), at + rng.integers(-1, 2, LANES), 0,
                       -at], 2 * reached[:, -1] + int(MAX_SPAN_S) * TICKS_PER_SECOND)
    distance = (ticks / TICKS_PER_SECOND).astype(np.float32)
    guess = np.asarray(guesses(pace.hi, growth, distance))
    for got, ends, to in zip(guess.tolist(), reached, ticks, strict=True):
        want = int(np.searchsorted(ends, to))
        assert abs(got - want) <= 1 if want < MAX_JUMP else got >= MAX_JUMP - 1
    count = rng.integers(1, MAX_JUMP, LANES)
    middle = (reached[np.arange(LANES), count - 1] + reached[np.arange(LANES), count]) / (2 * TICKS_PER_SECOND)
    assert np.array_equal(guesses(pace.hi, growth, middle.astype(np.float32)), count)


@SEEDS
@given(st.integers(0, 2**32), st.sampled_from([1, 8, 16, 128]))
def test_blocks_hold_the_tokens(seed, block_size):
    tokens = np.random.default_rng(seed).integers(0, 1 << 24, LANES).astype(np.int32)
    tokens[:9] = [0, 1, 2, block_size - 1, block_size, block_size + 1, 2 * block_size - 1, 2 * block_size, 7]
    dims = Dims(num_requests=1, block_size=block_size)
    assert np.array_equal(blocks_for(tokens, dims), -(-tokens // block_size))
