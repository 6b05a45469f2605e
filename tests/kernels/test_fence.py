"""Fences: values pass unchanged, and are stored."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxsim.kernels.fence import Fence

BATCH = 16


def graph(is_true, x, k):
    """A small step: floats, integers, masks and rows pass two fences, some of them both."""
    fence = Fence(is_true)
    shared = jnp.sin(x) * 3 + k.astype(jnp.float32)
    mask = shared > 0
    row = jnp.stack([shared, -shared])
    record = {"row": row, "mask": mask}
    record, shared, k = fence(record, shared, k)
    doubled = shared * 2
    shared, doubled, k = fence(shared, doubled, k)
    return record["row"] + doubled, record["mask"], k + 1, shared


def expected(x, k):
    shared = np.asarray(jnp.sin(x) * 3 + k.astype(jnp.float32))
    return np.stack([shared * 3, shared], axis=-1), shared > 0, np.asarray(k) + 1, shared


@jax.jit
def fenced(is_true, x, k):
    return jax.vmap(lambda a, b: graph(is_true, a, b))(x, k)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.integers(0, 2**32))
def test_values_pass_unchanged(seed):
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.normal(size=BATCH), jnp.float32)
    k = jnp.asarray(rng.integers(-9, 9, BATCH), jnp.int32)
    for got, want in zip(fenced(k[0] > -100, x, k), expected(x, k), strict=True):
        assert np.allclose(np.asarray(got), want, rtol=1e-6, atol=1e-6)
        assert np.asarray(got).dtype == np.asarray(want).dtype


def test_a_fence_is_a_conditional_in_the_program():
    """Otherwise it stores nothing and the compiler computes shared values again."""
    x, k = jnp.ones(BATCH), jnp.ones(BATCH, jnp.int32)
    text = fenced.lower(k[0] > -100, x, k).compile().as_text()
    assert text.count(" conditional(") == 2


def test_a_fence_of_none_is_no_fence():
    x, k = jnp.float32(2.0), jnp.int32(3)
    assert Fence(None)(x, k) == (x, k)
    text = jax.jit(lambda a, b: graph(None, a, b)).lower(x, k).compile().as_text()
    assert " conditional(" not in text


def test_what_was_stored_passes_by():
    """A second fence stores only what is new."""
    def body(is_true, x):
        fence = Fence(is_true)
        (y,) = fence(x * 2)
        return fence(y)

    program = jax.make_jaxpr(body)(jnp.bool_(True), jnp.float32(1.0))
    assert sum(str(e.primitive) == "cond" for e in program.eqns) == 1
