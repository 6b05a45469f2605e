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
def test_two_smallest_with_their_places(width):
    """Ties go to the lowest index, empty entries never win."""
    bits = packed.index_bits(width)

    @jax.jit
    @jax.vmap
    def smallest(keys, is_used):
        index = jnp.arange(width, dtype=jnp.int32)
        first, second = packed.two_smallest(
            jnp.where(is_used, packed.pack_key(keys, index, bits), packed.EMPTY))
        return first, second, *packed.unpack_key(first, bits), *packed.unpack_key(second, bits)

    @SEEDS
    @given(st.integers(0, 2**32))
    def check(seed):
        rng = np.random.default_rng(seed)
        # Few distinct keys, so that ties are common; as large as the bits allow in some rows.
        top = (packed.EMPTY >> bits) - 1
        keys = rng.integers(0, 8, (BATCH, width)) + rng.choice([0, top - 8], (BATCH, 1))
        is_used = rng.random((BATCH, width)) < rng.choice([0.0, 0.05, 0.9], (BATCH, 1))
        first, second, *places = (np.asarray(x) for x in smallest(keys.astype(np.int32), is_used))
        assert np.array_equal(first == packed.EMPTY, is_used.sum(axis=1) < 1)
        assert np.array_equal(second == packed.EMPTY, is_used.sum(axis=1) < 2)
        order = np.argsort(np.where(is_used, keys, np.iinfo(np.int64).max), axis=1, kind="stable")
        for place, (key, index) in enumerate([places[:2], places[2:]]):
            holds = is_used.sum(axis=1) > place
            assert np.array_equal(index[holds], order[holds, place])
            assert np.array_equal(key[holds], np.take_along_axis(keys, order, 1)[holds, place])

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


@SEEDS
@given(st.integers(0, 2**32))
def test_a_packing_gives_back_what_it_got(seed):
    """Scalars of one type side by side, bit for bit; everything else untouched."""
    rng = np.random.default_rng(seed)
    shared = rng.integers(-(2**31), 2**31 - 1, 5).astype(np.int32)
    floats = np.concatenate([rng.normal(size=3), [np.inf, -0.0]]).astype(np.float32)
    tree = {"a": (shared, floats), "b": [shared],
            "c": {"matrix": rng.integers(0, 9, (5, 3)).astype(np.int32), "mask": rng.random(5) < 0.5}}
    packing = packed.Packing(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), tree))
    groups = packing.pack(jax.tree.map(jnp.asarray, tree))
    assert groups["int32"].shape == (2, 5) and groups["float32"].shape == (1, 5) and len(groups["other"]) == 2
    back = packing.unpack(groups)
    assert jax.tree.structure(back) == jax.tree.structure(tree)
    for x, y in zip(jax.tree.leaves(tree), jax.tree.leaves(back), strict=True):
        assert x.dtype == y.dtype and x.tobytes() == np.asarray(y).tobytes()
