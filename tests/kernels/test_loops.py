"""Loops inside a kernel: each lane has the rounds it needs, and only what some lane needs is run."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsim.kernels import loops
from jaxsim.kernels.fence import kernel, stage

BATCH = 16


def halved(x, rounds):
    def once(state):
        return state[0] * 0.5 + 1.0, state[1] - 1

    return loops.repeat(lambda state: state[1] > 0, once, (x, rounds), 7)[0]


def both(x, rounds):
    return halved(x, rounds), loops.where_needed(rounds > 3, lambda: x * 2.0, -x)


@pytest.mark.parametrize("is_cpu", [True, False])
def test_every_lane_has_its_own_rounds(monkeypatch, is_cpu):
    """In a kernel; unrolled, as on other backends, the same."""
    monkeypatch.setattr(loops, "are_kernels", lambda: is_cpu)
    x, rounds = jnp.linspace(-4.0, 9.0, BATCH), jnp.arange(BATCH, dtype=jnp.int32) % 8
    run = jax.jit(lambda x, rounds: kernel(lambda: stage(lambda _: jax.vmap(both)(x, rounds), None)))
    want = np.asarray(x).copy()
    for i, count in enumerate(np.asarray(rounds)):
        for _ in range(count):
            want[i] = want[i] * np.float32(0.5) + np.float32(1.0)
    ours, doubled = run(x, rounds)
    assert np.array_equal(ours, want)
    assert np.array_equal(doubled, np.where(rounds > 3, 2.0 * x, -x))
    if jax.default_backend() == "cpu":
        text = run.lower(x, rounds).compile().as_text()
        entry = text[text.index("ENTRY"):]
        assert len(re.findall(r" while\(", text)) == 2 * is_cpu and entry.count(" call(") == 1
        assert " while(" not in entry and " fusion(" not in entry


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="other backends compute both")
def test_what_nobody_needs_is_not_computed():
    """A loop that would not end is not begun where no lane asks for it."""
    def endless(x):
        return jax.lax.while_loop(lambda a: a < jnp.inf, lambda a: a * 1.0, x)

    run = jax.jit(jax.vmap(lambda x, asks: loops.where_needed(asks, lambda: endless(x), x)))
    assert np.array_equal(run(jnp.ones(BATCH), jnp.zeros(BATCH, bool)), np.ones(BATCH))


def test_derivatives_pass():
    x = jnp.float32(3.0)
    value, slope = jax.jvp(lambda x: halved(x, jnp.int32(3)), (x,), (jnp.float32(1.0),))
    assert value == 3.0 * 0.125 + 1.75 and slope == 0.125
