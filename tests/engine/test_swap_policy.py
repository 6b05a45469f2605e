"""What a swap takes, by hand; priorities that are drawn."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsim.policy.swap import ONE_HOLE, Swap, drawn
from tests.reference import swapping

pytestmark = pytest.mark.unoptimised

LLAMA_8B = Swap(
    host_blocks=jnp.int32(1000), layers=jnp.int32(32), block_copy_bytes=jnp.float32(32768.0),
    bytes_per_s=jnp.float32(32e9), dispatch_s=jnp.float32(10e-6), launch_s=jnp.float32(0.0), run_blocks=jnp.int32(1),
    is_async=jnp.bool_(False), reuse=jnp.bool_(False), period=jnp.int32(25), levels=jnp.int32(4096),
    locality=jnp.int32(0))
"""8 KV heads of 128 dimensions in 16 bits: 16 tokens of K in a layer are 32 KiB, 1.024 us at 32 GB/s."""


@pytest.mark.parametrize("blocks, run_blocks, dispatch_s, link_s, bound", [
    # One block: a copy of K and one of V in each of 32 layers.
    (1, 1, 64 * 10e-6, 64 * 1.024e-6, "dispatch"),
    (100, 1, 6400 * 10e-6, 6400 * 1.024e-6, "dispatch"),
    # Ten blocks a copy: 640 copies of 10.24 us.
    (100, 10, 640 * 10e-6, 640 * 10.24e-6, "link"),
    # A copy more for the odd block, which has no more bytes than it has.
    (101, 10, 704 * 10e-6, 6464 * 1.024e-6, "dispatch"),
    (0, 10, 0.0, 0.0, "link"),
])
def test_seconds_of_a_swap(blocks, run_blocks, dispatch_s, link_s, bound):
    swap = replace(LLAMA_8B, run_blocks=jnp.int32(run_blocks))
    assert np.allclose(swap.parts_s(jnp.int32(blocks)), [dispatch_s, link_s], rtol=1e-6)
    assert np.isclose(swap.seconds(jnp.int32(blocks)), max(dispatch_s, link_s), rtol=1e-6)
    assert swap.bound_by(blocks) == bound


def test_each_copy_is_launched():
    """Two microseconds of the link a copy: 64 of them beside the bytes."""
    swap = replace(LLAMA_8B, launch_s=jnp.float32(2e-6), dispatch_s=jnp.float32(0.0))
    assert np.isclose(swap.seconds(jnp.int32(1)), 64 * 3.024e-6, rtol=1e-6)


def test_draws_are_those_of_plain_integers():
    requests, draws = np.meshgrid(np.arange(0, 200_000, 97), [0, 1, 2, 1000, 65_535])
    for stream in (0, 1):
        ours = np.asarray(drawn(jnp.asarray(requests, jnp.int32), jnp.asarray(draws, jnp.int32), stream))
        theirs = np.vectorize(lambda r, d, stream=stream: swapping.draw(int(r), int(d), stream))(requests, draws)
        assert np.array_equal(ours, theirs)
        # Uniform: 16 cells of about 640 each, none off by more than five standard deviations.
        cells = np.bincount(ours.ravel() >> 12, minlength=16)
        assert len(cells) == 16 and np.all(np.abs(cells - ours.size / 16) < 5 * np.sqrt(ours.size / 16))
        # A request's draws have nothing to do with each other.
        assert abs(np.corrcoef(ours)[0, 1]) < 0.1


@pytest.mark.parametrize("locality, mean", [(0.0, 0.5), (0.5, 0.375), (1.0, 0.25)])
def test_who_was_served_is_likelier_to_stay(locality, mean):
    """A halved level: a mean of 1/2 (1 - locality / 2) of all levels."""
    swap = replace(LLAMA_8B, locality=jnp.int32(locality * 65536))
    requests = jnp.arange(20_000)
    served = np.asarray(swap.level(requests, jnp.int32(7), jnp.ones(20_000, bool)))
    others = np.asarray(swap.level(requests, jnp.int32(7), jnp.zeros(20_000, bool)))
    assert served.min() >= 0 and others.max() < 4096
    assert np.isclose(served.mean() / 4096, mean, atol=0.01)
    assert np.isclose(others.mean() / 4096, 0.5, atol=0.01)


def scattered(blocks: int, most: int, full: float, mean: float, seed: int) -> float:
    """Mean length of the groups that somebody's blocks lie in, of an allocator that takes any hole: block by block, in
    a pool of which so much is in use. Who leaves is drawn, and so is what comes."""
    rng, is_used, live, lengths = np.random.default_rng(seed), np.zeros(blocks + 2, bool), [], []
    is_used[[0, -1]] = True
    for step in range(1500):
        lacking = needed = min(1 + int(rng.exponential(mean)), int(full * blocks) // 2)
        while is_used[1:-1].sum() + needed > full * blocks:
            for begin, end in live.pop(rng.integers(len(live))):
                is_used[begin:end] = False
        edges = np.flatnonzero(np.diff(is_used)) + 1
        holes, groups = list(zip(edges[::2], edges[1::2], strict=True)), []
        while lacking:
            begin, end = holes.pop(rng.integers(len(holes)))
            length = min(end - begin, most, lacking)
            is_used[begin:begin + length] = True
            groups.append((begin, begin + length))
            lacking -= length
            if begin + length < end:
                holes.append((begin + length, end))
        live.append(groups)
        if step > 500:
            lengths.append(needed / len(groups))
    return float(np.mean(lengths))


def in_the_mean_field(blocks: int, most: int, full: float, mean: float, seed: int) -> tuple[float, list[int]]:
    """The same as `Swap.taken` and `Swap.given` say it; and how long a group may be, from the first request on."""
    rng, live, lengths, runs, used = np.random.default_rng(seed), [], [], [], 0
    swap, holes = replace(LLAMA_8B, group_blocks=jnp.int32(most)), jnp.int32(ONE_HOLE)
    taken, given = jax.jit(lambda *given: swap.taken(*given)), jax.jit(lambda *given: swap.given(*given))
    for _ in range(1500):
        needed = min(1 + int(rng.exponential(mean)), int(full * blocks) // 2)
        while used + needed > full * blocks:
            own, run, groups = live.pop(rng.integers(len(live)))
            holes, used = given(holes, blocks - used, blocks, own, run, groups), used - own
        holes, run, groups = taken(holes, blocks - used, needed)
        used += needed
        live.append((needed, run, groups))
        lengths.append(needed / int(groups))
        runs.append(int(run))
    return float(np.mean(lengths[501:])), runs


@pytest.mark.parametrize("full, mean", [(0.97, 30), (0.9, 30), (0.9, 10), (0.7, 30), (0.5, 30), (0.9, 120)])
def test_groups_are_as_long_as_an_allocator_finds_them(full, mean):
    """To a third, in pools that are nearly full and half empty. They decay: in a new pool who comes lies in one run, as
    long as that may be."""
    found = scattered(600, 40, full, mean, seed=1)
    ours, runs = in_the_mean_field(600, 40, full, mean, seed=2)
    assert found / 1.33 < ours < found * 1.33, (found, ours)
    assert runs[0] == 40 and (np.mean(runs[501:]) < 35 or full < 0.9)


def test_a_group_of_one_block_is_a_block():
    swap = replace(LLAMA_8B, group_blocks=jnp.int32(1))
    for holes, free, blocks in ((ONE_HOLE, 100, 7), (50 * ONE_HOLE, 60, 60), (3 * ONE_HOLE, 3, 1)):
        _, run, groups = swap.taken(jnp.int32(holes), jnp.int32(free), jnp.int32(blocks))
        assert (int(run), int(groups)) == (1, blocks)
        assert swap.seconds(jnp.int32(blocks), run) == LLAMA_8B.seconds(jnp.int32(blocks))


def test_holes_by_hand():
    """Ten free blocks in two holes, of five each: twelve blocks of the pool are in use.

    Seven blocks at most four at a time: two groups, of which no hole is gone, as they are longer. At most eight: one
    hole whole and two blocks of the next, which stays, in groups of five. Given back, with three of 22 blocks free (34
    of 256): each group a hole more, less twice that share.
    """
    half = jnp.int32(2 * ONE_HOLE), jnp.int32(10), jnp.int32(7)
    assert [int(x) for x in replace(LLAMA_8B, group_blocks=jnp.int32(4)).taken(*half)] == [2 * ONE_HOLE, 4, 2]
    swap = replace(LLAMA_8B, group_blocks=jnp.int32(8))
    holes, run, groups = swap.taken(*half)
    assert [int(holes), int(run), int(groups)] == [ONE_HOLE, 5, 2]
    assert int(swap.given(holes, jnp.int32(3), jnp.int32(22), jnp.int32(7), run, groups)) == 3 * ONE_HOLE - 4 * 34
