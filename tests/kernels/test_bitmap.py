"""Hierarchical bitmaps against Python sets."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxsim.kernels import bitmap

BATCH, OPERATIONS = 16, 150
SIZES = [1, 2, 31, 32, 33, 1000, 1024, 1025, 40_000]


def run(num_members: int):
    """A batch of sequences of operations; the smallest member after each (meaningless while empty)."""
    def one(row, operation):
        member, is_inserting, is_meant = operation

        def read(position):
            return row[position]

        positions, words = bitmap.change(read, num_members, member, is_inserting, is_meant)
        row = row.at[positions].set(words)
        return row, bitmap.smallest(lambda position: row[position], num_members)

    def lane(operations):
        row = jnp.zeros(bitmap.num_words(num_members), jnp.int32)
        return jax.lax.scan(one, row, operations)

    return jax.jit(jax.vmap(lane))


@pytest.fixture(scope="module", params=SIZES)
def sized(request):
    return request.param, run(request.param)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32))
def test_a_bitmap_is_a_set(sized, seed):
    num_members, program = sized
    rng = np.random.default_rng(seed)
    # Members from both ends and a few neighbourhoods, so that words fill up and run empty.
    pool = np.unique(np.concatenate([[0, num_members - 1], rng.integers(0, num_members, 6)]))
    member = rng.choice(pool, (BATCH, OPERATIONS))
    is_inserting = rng.random((BATCH, OPERATIONS)) < 0.5
    is_meant = rng.random((BATCH, OPERATIONS)) < 0.8
    rows, smallest = program((member.astype(np.int32), is_inserting, is_meant))
    rows, smallest = np.asarray(rows), np.asarray(smallest)
    offsets = bitmap.level_offsets(num_members)
    for lane in range(BATCH):
        members = set()
        for step in range(OPERATIONS):
            if is_meant[lane, step]:
                (members.add if is_inserting[lane, step] else members.discard)(int(member[lane, step]))
            if members:
                assert smallest[lane, step] == min(members)
        # Every level says exactly which words below it are not empty.
        bits = np.unpackbits(rows[lane].astype("<i4").view(np.uint8), bitorder="little").reshape(-1, 32)
        level = members
        for start, end in zip(offsets[:-1], offsets[1:], strict=True):
            assert set(np.flatnonzero(bits[start:end].ravel()).tolist()) == level
            level = {m // 32 for m in level}


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.integers(1, 1 << 22))
def test_levels_are_thirty_second_parts(num_members):
    sizes, part = [], 1
    while not sizes or sizes[-1] > 1:
        part *= 32
        sizes.append((num_members + part - 1) // part)
    assert list(bitmap.level_offsets(num_members)) == np.cumsum([0, *sizes]).tolist()
    assert bitmap.num_words(num_members) == sum(sizes) + 1


@pytest.mark.parametrize("num_members, words", [(1, 2), (32, 2), (33, 4), (1024, 34), (1025, 37)])
def test_words_of_a_row(num_members, words):
    assert bitmap.num_words(num_members) == words
