"""Packed keys and rows against NumPy."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxsim.kernels import packed

SEEDS = settings(max_examples=25, deadline=None, derandomize=True)
BATCH = 64


@pytest.mark.parametrize("count, bits", [(1, 1), (2, 1), (3, 2), (16, 4), (17, 5), (1024, 10), (1025, 11)])
def test_index_bits_hold_every_index(count, bits):
    assert packed.index_bits(count) == bits
    assert count - 1 < 1 << bits


@pytest.mark.parametrize("width", [16, 48, 272])
def test_one_minimum_is_minimum_and_argmin(width):
    """Ties go to the lowest index, empty entries never win."""
    bits = packed.index_bits(width)

    @jax.jit
    @jax.vmap
    def smallest(keys, is_used):
        index = jnp.arange(width, dtype=jnp.int32)
        row = jnp.where(is_used, packed.pack_key(keys, index, bits), packed.EMPTY)
        return (packed.row_min(row), *packed.unpack_key(packed.row_min(row), bits))

    @SEEDS
    @given(st.integers(0, 2**32))
    def check(seed):
        rng = np.random.default_rng(seed)
        # Few distinct keys, so that ties are common; as large as the bits allow in some rows.
        top = (packed.EMPTY >> bits) - 1
        keys = rng.integers(0, 8, (BATCH, width)) + rng.choice([0, top - 8], (BATCH, 1))
        is_used = rng.random((BATCH, width)) < rng.choice([0.0, 0.05, 0.9], (BATCH, 1))
        low, key, index = (np.asarray(x) for x in smallest(keys.astype(np.int32), is_used))
        masked = np.where(is_used, keys, np.iinfo(np.int64).max)
        is_any = is_used.any(axis=1)
        assert np.array_equal(low == packed.EMPTY, ~is_any)
        assert np.array_equal(key[is_any], masked.min(axis=1)[is_any])
        assert np.array_equal(index[is_any], masked.argmin(axis=1)[is_any])

    check()


class Inner(NamedTuple):
    a: jax.Array
    b: jax.Array


class Record(NamedTuple):
    first: jax.Array
    inner: Inner
    last: jax.Array


@SEEDS
@given(st.integers(0, 2**32))
def test_rows_round_trip(seed):
    values = np.random.default_rng(seed).integers(-(2**31), 2**31 - 1, 4).astype(np.int32)
    record = Record(values[0], Inner(values[1], values[2]), values[3])
    row = packed.to_row(record)
    assert np.array_equal(np.asarray(row), values)
    back = packed.from_row(record, row)
    assert isinstance(back, Record) and isinstance(back.inner, Inner)
    assert jax.tree.leaves(jax.tree.map(lambda x, y: bool(x == y), record, back)) == [True] * 4


def test_a_packing_gives_back_what_it_got():
    """Integer scalars side by side, everything else untouched, a value that occurs twice carried once."""
    packing = packed.Packing()
    rng = np.random.default_rng(1)
    shared = jnp.asarray(rng.integers(0, 99, 5), jnp.int32)
    tree = {"a": (shared, jnp.asarray(rng.random(5), jnp.float32)), "b": [shared],
            "c": {"matrix": jnp.asarray(rng.integers(0, 9, (5, 3)), jnp.int32),
                  "mask": jnp.asarray(rng.random(5) < 0.5), "own": jnp.arange(5, dtype=jnp.int32)}}
    scalars, others = packing.pack(tree)
    assert scalars.shape == (2, 5) and scalars.dtype == jnp.int32
    assert len(others) == 3
    back = packing.unpack((scalars, others))
    assert jax.tree.structure(back) == jax.tree.structure(tree)
    for x, y in zip(jax.tree.leaves(tree), jax.tree.leaves(back), strict=True):
        assert x.dtype == y.dtype and np.array_equal(np.asarray(x), np.asarray(y))


def test_a_packing_that_changed_is_refused():
    packing = packed.Packing()
    x = jnp.arange(4, dtype=jnp.int32)
    packing.pack([x, x])
    with pytest.raises(AssertionError, match="two traces"):
        packing.pack([x, x + 1])
