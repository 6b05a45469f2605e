"""Logarithmic histograms against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxsim.kernels import histogram

bin_of = jax.jit(histogram.bin_of)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(0, 2**32))
def test_bins_are_those_between_the_edges(seed):
    """Also at the edges themselves, and what lies beyond them."""
    edges = histogram.edges().astype(np.float32)
    assert np.array_equal(edges, histogram.edges()), "edges are exact in float32"
    rng = np.random.default_rng(seed)
    values = np.concatenate([2.0 ** rng.uniform(-30, 20, 400), rng.choice(edges, 100), [0.0, edges[0], edges[-1]]])
    values = values.astype(np.float32)
    want = np.clip(np.searchsorted(edges, values, side="right") - 1, 0, histogram.NUM_BINS - 1)
    assert np.array_equal(np.asarray(bin_of(jnp.asarray(values))), want)


def test_edges_follow_the_octaves():
    edges = histogram.edges()
    assert len(edges) == histogram.NUM_BINS + 1
    assert edges[0] == 2.0**-20 and edges[-1] == 2.0**12
    assert edges[64 * 7 + 16] == 2.0**-13 * 1.25
    assert np.all(np.diff(edges) / edges[:-1] <= 1 / 64)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.dictionaries(st.integers(0, histogram.NUM_BINS - 1), st.integers(1, 40), min_size=1, max_size=12),
       st.lists(st.sampled_from([0, 1, 25, 50, 90, 99, 99.9, 100]) | st.floats(0, 100), min_size=1, max_size=5))
def test_percentiles_are_those_of_the_counts_spread_out(filled, at):
    """NumPy's, of samples in the middles of equal parts of their bins."""
    edges, counts, samples = histogram.edges(), np.zeros(histogram.NUM_BINS, np.int32), []
    for index, count in sorted(filled.items()):
        counts[index] = count
        samples.append(edges[index] + (np.arange(count) + 0.5) / count * (edges[index + 1] - edges[index]))
    want = np.percentile(np.concatenate(samples), at)
    assert np.allclose(histogram.percentiles(counts, at), want, rtol=1e-9, atol=0)


def test_histogram_percentiles_stay_within_a_bin_of_the_sample():
    rng = np.random.default_rng(3)
    gaps = np.concatenate([rng.lognormal(-4.5, 0.4, 20_000), rng.lognormal(-1, 0.3, 300)])
    counts = np.histogram(gaps, histogram.edges())[0]
    for percentile, value in zip((0, 50, 90, 99, 100), histogram.percentiles(counts, (0, 50, 90, 99, 100)),
                                 strict=True):
        assert value == pytest.approx(np.percentile(gaps, percentile), rel=0.016)


def test_histogram_of_equal_gaps_is_exact_to_the_bin():
    counts = np.histogram(np.full(7, 0.02), histogram.edges())[0]
    low, high = histogram.percentiles(counts, (1, 99))
    edges = histogram.edges()
    bin_index = np.searchsorted(edges, 0.02, side="right") - 1
    assert edges[bin_index] <= low <= high <= edges[bin_index + 1]
    assert histogram.percentiles(np.zeros(histogram.NUM_BINS, int), (50,)) == [None]
