"""Fixed points and roots: values, and derivatives of the equation in both modes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsim.analytic.implicit import fixed_point, root


def solved(a, b):
    """x = a + b x^2: (1 - sqrt(1 - 4 a b)) / (2 b), the smaller of two."""
    return fixed_point(lambda x: a + b * x**2, a, 100.0 * a)


def exact(a, b):
    return (1 - jnp.sqrt(1 - 4 * a * b)) / (2 * b)


def test_fixed_point_is_the_smallest_with_exact_derivatives():
    a, b = jnp.asarray([0.1, 0.5, 1.0]), jnp.asarray([0.9, 0.3, 0.2])
    np.testing.assert_allclose(np.asarray(solved(a, b)), np.asarray(exact(a, b)), rtol=1e-5)
    for argument in (0, 1):
        def total(function, argument=argument):
            return lambda *x: jnp.sum(function(*x) ** 2)

        backward, theirs = (np.asarray(jax.grad(total(f), argument)(a, b)) for f in (solved, exact))
        forward = np.asarray(jax.jacfwd(total(solved), argument)(a, b))
        np.testing.assert_allclose(backward, theirs, rtol=1e-3)
        np.testing.assert_allclose(forward, theirs, rtol=1e-3)
    ours, theirs = (float(jax.grad(jax.grad(lambda x, f=f: f(x, 0.2)))(1.0)) for f in (solved, exact))
    assert ours == pytest.approx(theirs, rel=1e-2)


def test_fixed_point_ends_where_there_is_none():
    assert float(fixed_point(lambda x: 1.0 + 2.0 * x, jnp.float32(1.0), jnp.float32(50.0))) == 50.0


def test_root_and_its_derivative():
    def found(c):
        return root(lambda x: c - x**3, jnp.float32(0.0), jnp.float32(10.0))

    assert float(found(8.0)) == pytest.approx(2.0, rel=1e-5)
    assert float(jax.grad(found)(8.0)) == pytest.approx(1 / 12, rel=1e-4)
    np.testing.assert_allclose(jax.vmap(found)(jnp.asarray([1.0, 27.0])), [1.0, 3.0], rtol=1e-5)
    assert float(found(2000.0)) == pytest.approx(10.0)
