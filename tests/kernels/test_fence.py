"""Stages: results are those of the function, and are stored."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxsim.kernels.fence import stage

BATCH = 16


def phase(inputs):
    """Floats, integers, masks and rows; one input passed through, one result given twice."""
    x, k = inputs["x"], inputs["k"]
    shared = jnp.sin(x) * 3 + k.astype(jnp.float32)
    return {"row": jnp.stack([shared, -shared]), "mask": shared > 0, "shared": (shared, shared), "k": k,
            "next": k + 1}


@jax.jit
def staged(is_true, x, k):
    def both(x, k):
        first = stage(is_true, phase, {"x": x, "k": k})
        return stage(is_true, phase, {"x": first["shared"][0], "k": first["next"]}), first

    return jax.vmap(both)(x, k)


def plain(x, k):
    first = phase({"x": x, "k": k})
    return phase({"x": first["shared"][0], "k": first["next"]}), first


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.integers(0, 2**32))
def test_a_stage_is_its_function(seed):
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.normal(size=BATCH), jnp.float32)
    k = jnp.asarray(rng.integers(-9, 9, BATCH), jnp.int32)
    got, want = staged(k[0] > -100, x, k), jax.vmap(plain)(x, k)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        assert np.allclose(np.asarray(ours), np.asarray(theirs), rtol=1e-5, atol=1e-5)


def test_stages_are_conditionals_in_the_program():
    """Otherwise nothing is stored and the compiler computes shared values again."""
    x, k = jnp.ones(BATCH), jnp.ones(BATCH, jnp.int32)
    text = staged.lower(k[0] > -100, x, k).compile().as_text()
    assert text.count(" conditional(") == 2


def test_what_passes_through_costs_nothing():
    """Only new results are stored, each once, and an input that comes out is the very same."""
    seen = {}

    def body(is_true, x, k):
        inputs = {"x": x, "k": k}
        result = stage(is_true, phase, inputs)
        seen["same"] = result["k"] is k, result["shared"][0] is result["shared"][1]
        return result

    program = jax.make_jaxpr(body)(jnp.bool_(True), jnp.float32(1.0), jnp.int32(2))
    (conditional,) = [e for e in program.eqns if str(e.primitive) == "cond"]
    assert len(conditional.outvars) == 4
    assert seen["same"] == (True, True)


def test_none_leaves_the_compiler_free():
    x, k = jnp.float32(2.0), jnp.int32(3)
    program = jax.make_jaxpr(lambda x, k: stage(None, phase, {"x": x, "k": k}))(x, k)
    assert not [e for e in program.eqns if str(e.primitive) == "cond"]
