"""Make XLA compute shared values once, by running the phases of a computation as separate computations.

XLA on CPU fuses every producer into each of its consumers and computes it again there. A step of the engine is one
deep graph with some hundred outputs, so most of it would be computed dozens of times (measured: 17,700 fused
instructions for 2,000 distinct ones). What happens inside a conditional stays there, and what comes out is stored.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool


def stage(is_true: Bool[Array, ""] | None, function: Callable, inputs):
    """`function(inputs)`, its results stored before anything that follows.

    is_true: a scalar that is true at run time and that the compiler cannot know to be, the same for the whole
    batch (so that `vmap` keeps the conditional); None leaves the compiler free. Results that are inputs passed
    through, by identity, cost nothing.
    """
    if is_true is None:
        return function(inputs)
    known = {id(leaf): leaf for leaf in jax.tree.leaves(inputs)}
    plan = {}

    def fresh():
        leaves, plan["structure"] = jax.tree.flatten(function(inputs))
        new = list({id(leaf): leaf for leaf in leaves if id(leaf) not in known}.values())
        place = {id(leaf): at for at, leaf in enumerate(new)}
        plan["leaves"] = [place.get(id(leaf), known.get(id(leaf))) for leaf in leaves]
        return [jnp.asarray(leaf) for leaf in new]

    shapes = jax.eval_shape(fresh)

    def never():
        # One operation that is not element-wise, or XLA would make selects of the conditional.
        odd = jnp.flip(jnp.stack([is_true, ~is_true]))[0]
        return [jnp.full(x.shape, odd).astype(x.dtype) for x in shapes]

    stored = lax.cond(is_true, fresh, never)
    leaves = [stored[at] if isinstance(at, int) else at for at in plan["leaves"]]
    return jax.tree.unflatten(plan["structure"], leaves)
