"""Does the installed JAX compute? 0.10.2 does not, on CPU (jax-ml/jax#39103), and is excluded from the dependencies.

There a jitted, vmapped product of a matrix and a vector of three, reduced afterwards, is wrong in the last entries of
batches just over a power of two (2^15 in float32, 2^14 in float64). Small integers make the answer right or wrong.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

SIZES = [(1 << bits) + extra for bits in (14, 15, 16) for extra in (1, 9)]
SHAPES = [(2, 3), (3, 3), (4, 4), (6, 5)]


def reduced(matrix, vector):
    """Products and a reduction over them, as cost models and metrics use them."""
    return jnp.sum((matrix @ vector) ** 2)


@pytest.mark.parametrize("batch", SIZES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_batched_products_are_right(shape, batch):
    rng = np.random.default_rng(batch)
    matrix, matrices = rng.integers(-4, 5, shape), rng.integers(-4, 5, (batch, *shape))
    vectors = rng.integers(-4, 5, (batch, shape[1]))
    shared = jax.jit(jax.vmap(reduced, (None, 0)))(matrix.astype(np.float32), vectors.astype(np.float32))
    own = jax.jit(jax.vmap(reduced))(matrices.astype(np.float32), vectors.astype(np.float32))
    want = np.square(vectors @ matrix.T.astype(np.float64)).sum(axis=1)
    assert np.array_equal(np.asarray(shared, np.float64), want)
    want = np.square(np.einsum("bij,bj->bi", matrices.astype(np.float64), vectors)).sum(axis=1)
    assert np.array_equal(np.asarray(own, np.float64), want)


def test_the_bad_release_is_not_installed():
    assert jax.__version__ != "0.10.2", "this release returns wrong numbers on CPU; install another"
