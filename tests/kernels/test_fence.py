"""Stages and kernels: results are those of the function, stored, and computed by one kernel."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from jaxsim.kernels.fence import POSSIBLE, _operations, kernel, stage

BATCH = 16
ON_CPU = pytest.mark.skipif(jax.default_backend() != "cpu", reason="other backends are left free")


def phase(inputs, numpy=jnp):
    """Floats, integers, masks and rows; one input passed through, one result given twice."""
    x, k = inputs["x"], inputs["k"]
    shared = numpy.sin(x) * 3 + k.astype(numpy.float32)
    return {"row": numpy.stack([shared, -shared]), "mask": shared > 0, "shared": (shared, shared), "k": k,
            "next": k + 1}


def both(x, k, stage=stage):
    first = stage(phase, {"x": x, "k": k})
    return stage(phase, {"x": first["shared"][0], "k": first["next"]}), first


@jax.jit
def staged(x, k):
    return kernel(lambda: both(x, k))


def inputs(seed=0):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=BATCH), jnp.float32), jnp.asarray(rng.integers(-9, 9, BATCH), jnp.int32)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.integers(0, 2**32))
def test_a_kernel_of_stages_is_its_function(seed):
    got = staged(*inputs(seed))
    want = both(*map(np.asarray, inputs(seed)), lambda function, inputs: function(inputs, np))
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        assert np.allclose(np.asarray(ours), np.asarray(theirs), rtol=1e-5, atol=1e-5)


@ON_CPU
def test_a_kernel_is_one_call_and_its_stages_are_calls_in_it():
    """Otherwise nothing is stored, the compiler computes shared values again, and starts a kernel for each."""
    text = staged.lower(*inputs()).compile().as_text()
    entry = text[text.index("ENTRY"):]
    assert entry.count(" call(") == 1 and 'xla_cpu_small_call="true"' in entry and " fusion(" not in entry
    assert len(re.findall(r" call\(.*inlineable", text)) == 3


@ON_CPU
def test_what_passes_through_costs_nothing():
    """Only new results are stored, each once, and an input that comes out is the very same."""
    seen = {}

    def body(x, k):
        result = stage(phase, {"x": x, "k": k})
        seen["same"] = result["k"] is k, result["shared"][0] is result["shared"][1]
        return result

    program = jax.make_jaxpr(body)(*inputs())
    (call,) = [e for e in program.eqns if str(e.primitive) in ("jit", "pjit")]
    assert len(call.outvars) == 4
    assert seen["same"] == (True, True)


def test_an_input_that_simplification_leaves_without_a_reader():
    """XLA aborts where a kernel has one; in a stage it is still the operand of a call."""
    def function(inputs):
        x, mask = inputs
        return jnp.where(mask & False, x[1] * 2.0, 0.0) + x[0]

    run = jax.jit(lambda x, mask: kernel(lambda: stage(function, (x, mask))))
    x = jnp.arange(2.0 * BATCH).reshape(2, BATCH)
    assert np.array_equal(np.asarray(run(x, x[0] > 3)), np.arange(BATCH))


def test_under_vmap_and_derivatives():
    """Of a whole kernel, in a loop: what a user's own transformations do."""
    def loop(x):
        def body(carry):
            i, x = carry
            return i + 1, kernel(lambda: stage(lambda x: jnp.sin(x) * 1.5, x))

        return lax.while_loop(lambda carry: carry[0] < 3, body, (0, x))[1]

    def plain(x):
        for _ in range(3):
            x = jnp.sin(x) * 1.5
        return x

    x = jnp.linspace(0.1, 1.0, BATCH)
    assert np.allclose(jax.jit(jax.vmap(loop))(x[:, None])[:, 0], plain(x), rtol=1e-6)
    for ours, theirs in zip(jax.jvp(loop, (x,), (x,)), jax.jvp(plain, (x,), (x,)), strict=True):
        assert np.allclose(ours, theirs, rtol=1e-5)


SAMPLES = {
    "argmax": lambda x, k: jnp.argmax(x),
    "argmin": lambda x, k: jnp.argmin(x),
    "atan2": lambda x, k: jnp.arctan2(x, x + 2),
    "bitcast_convert_type": lambda x, k: lax.bitcast_convert_type(x, jnp.int32),
    "clamp": lambda x, k: lax.clamp(-0.5, x, 0.5),
    "clz": lambda x, k: lax.clz(k),
    "custom_jvp_call": lambda x, k: jax.nn.relu(x) + jax.nn.softplus(x),
    "dynamic_slice": lambda x, k: lax.dynamic_slice(x, (k[0] & 7,), (4,)),
    "dynamic_update_slice": lambda x, k: lax.dynamic_update_slice(x, x[:3] * 2, (k[0] & 7,)),
    "gather": lambda x, k: x[k & 15],
    "add_any": lambda x, k: jax.jvp(lambda y: y * y, (x,), (x,))[1],
    "integer_pow": lambda x, k: x**3,
    "is_finite": lambda x, k: jnp.isfinite(1 / x),
    "pad": lambda x, k: jnp.pad(x, 2),
    "population_count": lambda x, k: lax.population_count(k),
    "pow": lambda x, k: jnp.abs(x) ** x,
    "rem": lambda x, k: k % 7,
    "rev": lambda x, k: x[::-1],
    "split": lambda x, k: lax.split(x, (4, 12))[1],
    "stack": lambda x, k: jnp.stack([x, x + 1], 1),
    "transpose": lambda x, k: x.reshape(4, 4).T,
    "while": lambda x, k: lax.while_loop(lambda a: jnp.sum(a) < 99, lambda a: a * 1.5, jnp.abs(x) + 0.5),
} | {f"reduce_{name}": lambda x, k, name=name: getattr(jnp, name)(x) for name in ("sum", "prod", "min", "max")} | {
    name: lambda x, k, name=name: getattr(jnp, name)(jnp.abs(x) + 0.5)
    for name in ("exp", "exp2", "expm1", "log", "log1p", "sin", "cos", "tan", "tanh", "sqrt", "cbrt", "floor", "ceil",
                 "sign", "square", "round")
} | {name: lambda x, k, name=name: getattr(lax, name)(jnp.abs(x) + 0.5) for name in ("rsqrt", "logistic")}


@ON_CPU
def test_possible_operations_are_possible():
    """One kernel of them all compiles, gives what the operations give, and is one kernel."""
    def everything(inputs):
        return {name: sample(*inputs) for name, sample in SAMPLES.items()}

    run = jax.jit(lambda x, k: kernel(lambda: stage(everything, (x, k))))
    used = set(_operations(jax.make_jaxpr(everything)(inputs()).jaxpr))
    assert set(SAMPLES) - {"pow", "stack"} <= used <= POSSIBLE
    for name, want in everything(inputs()).items():
        assert np.allclose(run(*inputs())[name], want, rtol=1e-5, atol=1e-6), name
    assert "xla_cpu_small_call" in run.lower(*inputs()).compile().as_text()


@ON_CPU
@pytest.mark.parametrize("impossible", [jnp.sort, lambda x: jnp.zeros(BATCH).at[jnp.argsort(x)].set(x),
                                        lambda x: x @ jnp.ones((BATCH, BATCH)), jnp.cumsum, jnp.fft.rfft])
def test_other_operations_take_the_long_way(impossible):
    x, _ = inputs()
    run = jax.jit(lambda x: kernel(lambda: stage(impossible, x)))
    assert np.allclose(run(x), impossible(x), rtol=1e-5, atol=1e-6)
    assert "xla_cpu_small_call" not in run.lower(x).compile().as_text()
