"""What a swap takes, by hand; priorities that are drawn."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from jaxsim.policy.swap import Swap, drawn
from tests.reference import swapping

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
