"""Timers as a tournament tree, against a plain dictionary and its minimum."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsim.kernels import clock, timers
from jaxsim.kernels.timers import NEVER, Instant

SIZES = (1, 2, 16, 17, 56, 256, 300, 4097)


def reader(tree):
    return lambda index: tree[index]


@jax.jit
def changed(tree, size_marker, timer, seconds, parts, is_meant):
    positions, values = timers.change(reader(tree), size_marker.shape[0], timer, Instant(seconds, parts), is_meant)
    return tree.at[positions].set(values)


def expected(known):
    """Instant and number of the first; of ties the lowest number."""
    return min((instant, timer) for timer, instant in enumerate(known))


@pytest.mark.parametrize("size", SIZES)
def test_the_root_is_the_earliest(size):
    """Random sets and clears, many at one instant, some not meant."""
    rng = np.random.default_rng(size)
    known = [(int(s), int(p)) for s, p in zip(rng.integers(0, 4, size), rng.integers(0, 3, size), strict=True)]
    tree = timers.tree(Instant(*jnp.array(known, jnp.int32).T))
    assert tree.shape == (timers.num_rows(size), 3)
    marker, seen = jnp.zeros(size), dict(ties=0, cleared=0, unmeant=0, empty=0)
    for round_ in range(60):
        (seconds, parts), timer = timers.earliest(reader(tree), size)
        want, number = expected(known)
        assert (int(seconds), int(parts)) == want
        if want != tuple(NEVER):
            assert int(timer) == number
        seen["ties"] += known.count(want) > 1
        seen["empty"] += want == tuple(NEVER)
        # The earliest goes off now and then, so that levels above change.
        at = number if round_ % 2 else int(rng.integers(size))
        new = tuple(NEVER) if rng.random() < 0.5 else (int(rng.integers(0, 1 << 30)) >> int(rng.integers(0, 30)),
                                                       int(rng.integers(0, 1 << 31)))
        is_meant = bool(rng.random() < 0.9)
        tree = changed(tree, marker, at, *new, is_meant)
        if is_meant:
            known[at] = new
            seen["cleared"] += new == tuple(NEVER)
        seen["unmeant"] += not is_meant
    assert seen["cleared"] and seen["unmeant"] and (seen["ties"] or size < 16) and (seen["empty"] or size > 2)
    # All of it is what building anew gives.
    fresh = np.asarray(timers.tree(Instant(*jnp.array(known, jnp.int32).T)))
    np.testing.assert_array_equal(np.asarray(tree)[:-1], fresh[:-1])


@pytest.mark.parametrize("size, levels", [(1, 1), (16, 2), (17, 3), (256, 3), (257, 4), (4096, 4)])
def test_a_change_is_a_row_a_level(size, levels):
    tree = timers.tree(Instant(jnp.zeros(size, jnp.int32), jnp.zeros(size, jnp.int32)))
    positions, values = timers.change(reader(tree), size, jnp.int32(size - 1), Instant(jnp.int32(5), jnp.int32(7)),
                                      jnp.bool_(True))
    assert positions.shape == (levels,) and values.shape == (levels, 3)
    assert len(set(positions.tolist())) == levels


def test_instants_are_times():
    """Times of any epoch there and back, and sums that carry."""
    rng = np.random.default_rng(0)
    seconds = np.concatenate([rng.integers(0, 1 << 28, 50), [0, 65535, 65536]]).astype(np.int32)
    ticks = np.concatenate([rng.integers(0, 1 << 30, 50), [0, (1 << 30) - 1, 1]]).astype(np.int32)
    for s, t in zip(seconds, ticks, strict=True):
        instant = Instant(jnp.int32(s), jnp.int32(t))
        epoch = jnp.int32(max(int(s) >> 16, 1) - 1)
        time = timers.time_of(epoch, instant)
        assert float(time.hi) + float(time.lo) == int(s) - 65536 * int(epoch) + int(t) * 2.0**-30
        back = timers.instant_of(epoch, time)
        assert (int(back.seconds), int(back.parts)) == (s, t)
    total = timers.later(Instant(jnp.int32(3), jnp.int32((1 << 30) - 1)), Instant(jnp.int32(1), jnp.int32(2)))
    assert tuple(map(int, total)) == (5, 1)
    never = timers.later(Instant(jnp.int32(3), jnp.int32(1)), Instant(*map(jnp.int32, NEVER)))
    assert tuple(map(int, never)) == NEVER
    assert np.isinf(timers.time_of(jnp.int32(3), never).hi) and clock.EPOCH_S == 65536
