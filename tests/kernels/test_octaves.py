"""Grids of octaves: cells agree with a search, values with `numpy.interp`, and the default ladder is one of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxsim.kernels import ladder, octaves

SEEDS = settings(max_examples=25, deadline=None, derandomize=True)
GRIDS = [(0, 0), (0, 3), (0, 6), (4, 0), (4, 2), (8, 1)]
MAX = 10_000
LANES, BATCH = 16, 64


def knots_reference(grid: octaves.Grid, max_value: int) -> np.ndarray:
    """One by one: 0 to 2 S units, then S equal steps an octave, until one reaches `max_value`."""
    unit, steps = 1 << grid[0], 1 << grid[1]
    knots, width = [0], unit
    while knots[-1] < max_value or len(knots) < 2:
        knots.append(knots[-1] + width)
        if knots[-1] >= 2 * steps * width:
            width *= 2
    return np.array(knots)


@pytest.mark.parametrize("grid", GRIDS)
def test_knots_rise_and_cover(grid):
    knots = octaves.knots(grid, MAX)
    assert knots[0] == 0 and knots[-1] >= MAX > knots[-2]
    assert np.all(np.diff(knots) > 0)
    assert len(octaves.knots(grid, 0)) == 2


@settings(SEEDS, max_examples=100)
@given(st.integers(0, 10), st.integers(0, 6), st.integers(0, 1 << 24) | st.integers(0, 23).map(lambda b: 1 << b))
def test_knots_are_those_laid_one_by_one(unit_bits, sub_bits, max_value):
    grid = unit_bits, sub_bits
    assert octaves.knots(grid, max_value).tolist() == knots_reference(grid, max_value).tolist()


def test_the_ladder_is_one_of_them():
    expected = ladder.knots(MAX)
    assert np.array_equal(octaves.knots((0, 3), int(expected[-1])), expected)


@jax.jit
@jax.vmap
def cells(grid, values, num_knots):
    """Cells and shares of many values on many grids, as one program."""
    index, low, octave = octaves.rung(grid, values, num_knots)
    return index, low, octave, octaves.share(values.astype(jnp.float32), low, octave)


@SEEDS
@given(st.integers(0, 2**32))
def test_cells_are_those_of_a_search(seed):
    """On the knots and beside them, past the end and below zero; without an end by the reference."""
    rng = np.random.default_rng(seed)
    grids, ends = rng.integers(0, (9, 7), (LANES, 2)).astype(np.int32), rng.integers(0, 1 << 17, LANES)
    laid = [knots_reference(tuple(map(int, grid)), int(end)) for grid, end in zip(grids, ends, strict=True)]
    values = np.stack([rng.integers(-5, 2 * end + 10, BATCH) for end in ends])
    values[:, ::2] = np.stack([rng.choice(knots, BATCH // 2) for knots in laid]) + rng.integers(-1, 2, BATCH // 2)
    num_knots = np.array([len(knots) for knots in laid], np.int32)
    got = cells((grids[:, 0], grids[:, 1]), values.astype(np.int32), num_knots)
    for grid, knots, row, index, low, octave, share in zip(grids, laid, values, *map(np.asarray, got), strict=True):
        # A negative value reads the first cell, at a share below zero.
        want = np.clip(np.searchsorted(knots, row, side="right") - 1, 0, len(knots) - 2)
        assert np.array_equal(index, want) and np.array_equal(low, knots[want])
        assert np.array_equal(1 << octave, np.diff(knots)[want])
        assert np.array_equal(share, (row - knots[want]) / np.diff(knots)[want])
        grid = tuple(map(int, grid))
        endless = knots_reference(grid, int(row.max()) + 2)
        want = np.clip(np.searchsorted(endless, row, side="right") - 1, 0, None)
        index, low, octave = octaves.rung_reference(grid, row)
        assert np.array_equal(index, want) and np.array_equal(low, endless[want])
        assert np.array_equal((1 << octave)[want < len(endless) - 1], np.diff(endless)[want[want < len(endless) - 1]])


READ = {grid: jax.jit(jax.vmap(lambda table, value, grid=grid: octaves.look_up(grid, table, value), (None, 0)))
        for grid in GRIDS}


@SEEDS
@given(st.sampled_from(GRIDS), st.integers(0, 2**32))
def test_look_up_is_linear_interpolation(grid, seed):
    """Exact, as no bit of these numbers is lost; past the end along the last cell."""
    rng = np.random.default_rng(seed)
    knots = octaves.knots(grid, MAX)
    table = rng.integers(-64, 65, len(knots)).astype(np.float32)
    values = rng.integers(0, 4 * MAX, 2 * BATCH)
    values[::2] %= MAX
    slope = (table[-1] - table[-2]) / float(knots[-1] - knots[-2])
    want = np.where(values > knots[-1], table[-1] + slope * (values - knots[-1]), np.interp(values, knots, table))
    assert np.array_equal(np.asarray(READ[grid](table, values.astype(np.int32))), want)


def test_past_the_end_goes_on_straight():
    table = 3.0 * jnp.asarray(octaves.knots((4, 2), 100), jnp.float32)
    assert float(octaves.look_up((4, 2), table, jnp.int32(5_000))) == pytest.approx(15_000)
