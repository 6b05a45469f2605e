"""Grids of octaves: cells agree with a search, values with `numpy.interp`, and the default ladder is one of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxsim.kernels import ladder, octaves

GRIDS = [(0, 0), (0, 3), (0, 6), (4, 0), (4, 2), (8, 1)]
MAX = 10_000


@pytest.mark.parametrize("grid", GRIDS)
def test_knots_rise_and_cover(grid):
    knots = octaves.knots(grid, MAX)
    assert knots[0] == 0 and knots[-1] >= MAX > knots[-2]
    assert np.all(np.diff(knots) > 0)
    assert len(octaves.knots(grid, 0)) == 2


def test_the_ladder_is_one_of_them():
    expected = ladder.knots(MAX)
    assert np.array_equal(octaves.knots((0, 3), int(expected[-1])), expected)


@pytest.mark.parametrize("grid", GRIDS)
def test_cells_are_those_of_a_search(grid):
    knots = octaves.knots(grid, MAX)
    values = np.concatenate([np.arange(2_000), knots, knots + 1, knots - 1, [10 * MAX, -3]])
    index, low, octave = (np.asarray(x) for x in jax.jit(
        lambda v: octaves.rung(grid, v, len(knots)))(jnp.asarray(values, jnp.int32)))
    expected = np.clip(np.searchsorted(knots, values, side="right") - 1, 0, len(knots) - 2)
    assert np.array_equal(index, expected)
    assert np.array_equal(low, knots[expected])
    assert np.array_equal(1 << octave, np.diff(knots)[expected])


TABLES = {grid: np.sqrt(octaves.knots(grid, MAX) + 1.0).astype(np.float32) for grid in GRIDS}
READ = {grid: jax.jit(lambda v, grid=grid: octaves.look_up(grid, jnp.asarray(TABLES[grid]), v)) for grid in GRIDS}


@given(st.sampled_from(GRIDS), st.integers(0, MAX))
def test_look_up_is_linear_interpolation(grid, value):
    expected = np.interp(value, octaves.knots(grid, MAX), TABLES[grid])
    assert float(READ[grid](jnp.int32(value))) == pytest.approx(expected, rel=1e-5)


def test_past_the_end_goes_on_straight():
    table = 3.0 * jnp.asarray(octaves.knots((4, 2), 100), jnp.float32)
    assert float(octaves.look_up((4, 2), table, jnp.int32(5_000))) == pytest.approx(15_000)
