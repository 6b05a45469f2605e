"""Costs from coefficients: what is made of them where a form is not given."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxsim.cost.base import BatchStats
from jaxsim.cost.fitted import fitted


def rows(rng, pieces):
    """(min_sequences, a, b, c, d, e)."""
    starts = np.concatenate([[0], np.sort(rng.choice(np.arange(2, 60), pieces - 1, replace=False))])
    return np.column_stack([starts, rng.uniform(0, [0.03, 1e-4, 1e-6, 1e-4, 1e-9], (pieces, 5))])


@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.integers(0, 2**32))
def test_a_mixed_iteration_is_never_cheaper_than_its_parts(seed):
    """Also where the pieces of both forms begin at different batch sizes."""
    rng = np.random.default_rng(seed)
    cost = fitted(rows(rng, rng.integers(1, 4)), rows(rng, rng.integers(1, 4)))
    decodes, chunk, context = rng.integers(1, 80), rng.integers(1, 500), rng.integers(100, 10_000)

    def seconds(decodes, context, chunks, tokens):
        pairs = jnp.float32(float(tokens) ** 2)
        return float(cost.iteration(BatchStats(*(jnp.int32(x) for x in (decodes, context, chunks, tokens, tokens)),
                                               pairs, jnp.int32(decodes + chunks))))

    both = seconds(decodes, context, 1, chunk)
    assert both >= 0.999999 * seconds(decodes, context, 0, 0)
    # Pieces are by sequences, so its prompt alone may fall into another one.
    same = fitted(rows(np.random.default_rng(seed), 1), rows(np.random.default_rng(seed + 1), 1))
    parts = jax.tree.map(lambda x: x, same)
    whole = float(parts.iteration(BatchStats(*(jnp.int32(x) for x in (decodes, context, 1, chunk, chunk)),
                                             jnp.float32(float(chunk) ** 2), jnp.int32(decodes + 1))))
    alone = float(parts.iteration(BatchStats(*(jnp.int32(x) for x in (0, 0, 1, chunk, chunk)),
                                             jnp.float32(float(chunk) ** 2), jnp.int32(1))))
    assert whole >= 0.999999 * alone
