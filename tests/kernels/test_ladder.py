"""The ladder of knots against NumPy searches and interpolation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxsim.kernels import ladder

SEEDS = settings(max_examples=25, deadline=None, derandomize=True)
LARGEST = (1 << 20) - 1
BATCH = 512
KNOTS = ladder.knots(LARGEST)

rung = jax.jit(ladder.rung)
look_up = jax.jit(jax.vmap(ladder.look_up, (None, 0)))


@pytest.mark.parametrize("largest", [1, 2, 15, 16, 17, 31, 32, 33, 1000, 2048, 131_072, (1 << 27) - 1])
def test_knots_cover_and_are_dense_where_small(largest):
    knots = ladder.knots(largest)
    assert len(knots) == ladder.num_knots(largest)
    assert knots[0] == 0 and knots[-1] >= largest and knots[-2] <= largest
    assert np.array_equal(knots[:17], np.arange(len(knots[:17])))
    spacing = np.diff(knots)
    assert np.all(spacing > 0) and np.all(spacing <= np.maximum(knots[:-1] / 8, 1))


def knots_reference(largest: int) -> list[int]:
    """One by one: 0 to 16, then eight equal steps an octave, until one lies above `largest`."""
    knots = list(range(17))
    while knots[-1] <= largest:
        step = (1 << (knots[-1].bit_length() - 1)) // 8
        knots.append(knots[-1] + step)
    return knots[: int(np.searchsorted(knots, largest, side="right")) + 1]


@settings(SEEDS, max_examples=100)
@given(st.integers(1, 1 << 29) | st.integers(3, 28).map(lambda bits: 1 << bits))
def test_knots_are_those_laid_one_by_one(largest):
    assert ladder.knots(largest).tolist() == knots_reference(largest)
    assert ladder.num_knots(largest) == len(knots_reference(largest))


def check_rungs(values: np.ndarray, knots: np.ndarray):
    index, offset, octave = (np.asarray(x, np.int64) for x in rung(jnp.asarray(values, jnp.int32)))
    want = np.searchsorted(knots, values, side="right") - 1
    assert np.array_equal(index, want)
    assert np.array_equal(offset, values - knots[want])
    assert np.array_equal(1 << octave, knots[want + 1] - knots[want])
    for ours, theirs in zip((index, offset, octave), ladder.rung_reference(values), strict=True):
        assert np.array_equal(ours, theirs)


def test_rungs_of_small_numbers():
    check_rungs(np.arange(5000), ladder.knots(6000))


@SEEDS
@given(st.integers(0, 2**32))
def test_rungs_are_what_a_search_finds(seed):
    rng = np.random.default_rng(seed)
    knots = ladder.knots((1 << 29) - 1)
    values = (np.exp2(rng.uniform(0, 29, BATCH)) - 1).astype(np.int64)
    # On the knots and just beside them, where an error by one hides.
    values[: BATCH // 2] = np.maximum(rng.choice(knots[:-1], BATCH // 2) + rng.integers(-1, 2, BATCH // 2), 0)
    check_rungs(values, knots)


@SEEDS
@given(st.integers(0, 2**32))
def test_look_up_is_linear_interpolation(seed):
    rng = np.random.default_rng(seed)
    table = rng.normal(size=len(KNOTS)).astype(np.float32)
    values = (np.exp2(rng.uniform(0, 20, BATCH)) - 1).astype(np.int32)
    got = np.asarray(look_up(table, values))
    want = np.interp(values, KNOTS, table.astype(np.float64))
    assert np.allclose(got, want, rtol=0, atol=4 * np.finfo(np.float32).eps * np.abs(table).max())
    # Exact where no bit is lost, and at the knots, the last included.
    whole = rng.integers(-32, 33, len(KNOTS)).astype(np.float32)
    assert np.array_equal(np.asarray(look_up(whole, values)), np.interp(values, KNOTS, whole.astype(np.float64)))
    assert np.array_equal(np.asarray(look_up(table, np.minimum(KNOTS, LARGEST + 1).astype(np.int32))), table)


def test_negative_counts_read_the_first_entry():
    assert np.asarray(rung(jnp.asarray([-5]))[0]).tolist() == [0]
