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


@SEEDS
@given(st.integers(1, 1 << 24))
def test_index_bits_are_the_fewest(count):
    bits = packed.index_bits(count)
    assert count - 1 < 1 << bits and (bits == 1 or 1 << (bits - 1) <= count - 1)


@SEEDS
@given(st.integers(0, 2**32), st.integers(1, 20))
def test_packed_keys_sort_by_key_then_index(seed, bits):
    rng = np.random.default_rng(seed)
    key = rng.integers(0, min(1 << (31 - bits), 50), BATCH).astype(np.int32)
    key[0] = (1 << (31 - bits)) - 1
    index = rng.integers(0, 1 << bits, BATCH).astype(np.int32)
    index[0] = (1 << bits) - 1
    together = np.asarray(packed.pack_key(jnp.asarray(key), jnp.asarray(index), bits))
    assert np.array_equal(together, key.astype(np.int64) * (1 << bits) + index)
    assert np.array_equal(np.argsort(together, kind="stable"), np.lexsort((index, key)))
    for back, given_ in zip(packed.unpack_key(jnp.asarray(together), bits), (key, index), strict=True):
        assert np.array_equal(np.asarray(back), given_)


two_smallest = jax.jit(jax.vmap(packed.two_smallest))


@SEEDS
@given(st.integers(0, 2**32))
def test_two_smallest_are_the_first_two_sorted(seed):
    """Distinct numbers of either sign, with some, one or none of the entries in use."""
    rng = np.random.default_rng(seed)
    rows = rng.permuted(np.tile(np.arange(-40, 40), (BATCH, 1)), axis=1) * rng.integers(1, 1 << 24)
    is_used = rng.random((BATCH, 80)) < rng.choice([0.0, 0.02, 0.5, 1.0], (BATCH, 1))
    rows = np.where(is_used, rows, packed.EMPTY).astype(np.int32)
    assert np.array_equal(np.stack(two_smallest(rows), axis=1), np.sort(rows, axis=1)[:, :2])


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


LEAVES = {"int": ((), np.int32), "float": ((), np.float32), "mask": ((), np.bool_), "row": ((2,), np.int32),
          "small": ((), np.int16)}
TREES = st.recursive(st.sampled_from(sorted(LEAVES)), lambda inner: st.lists(inner, max_size=3).map(tuple)
                     | st.dictionaries(st.sampled_from("abc"), inner, max_size=3), max_leaves=8)


@settings(SEEDS, max_examples=40)
@given(TREES, st.integers(0, 2**32))
def test_a_packing_lays_scalars_of_one_type_side_by_side(kinds, seed):
    """Of any record: in the order of its leaves, nothing of a type it has none of."""
    rng = np.random.default_rng(seed)
    like = jax.tree.map(lambda kind: jax.ShapeDtypeStruct(*LEAVES[kind]), kinds)
    records = jax.tree.map(lambda leaf: rng.integers(0, 100, (3, *leaf.shape)).astype(leaf.dtype), like)
    packing = packed.Packing(like)
    groups = packing.pack(jax.tree.map(jnp.asarray, records))
    want = {"int32": [], "float32": [], "other": []}
    for kind, leaf in zip(jax.tree.leaves(kinds), jax.tree.leaves(records), strict=True):
        want[{"int": "int32", "float": "float32"}.get(kind, "other")].append(leaf)
    assert set(groups) == {name for name, leaves in want.items() if leaves}
    for name, group in groups.items():
        assert len(group) == len(want[name])
        assert all(np.array_equal(x, y) and x.dtype == y.dtype for x, y in zip(group, want[name], strict=True))
    back = packing.unpack(groups)
    assert jax.tree.structure(back) == jax.tree.structure(records)
    assert all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(back), jax.tree.leaves(records), strict=True))


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
