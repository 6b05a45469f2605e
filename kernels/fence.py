"""A deep computation as one kernel in which shared values are computed once.

XLA on CPU fuses every producer into each of its consumers and computes it again there, and starts a kernel for each
fusion. A step of the engine is one graph with some hundred outputs: most of it would be computed dozens of times
(measured: 17,700 fused instructions for 2,000 distinct ones), by hundreds of kernels of some 30 ns overhead each. A
computation that is called is not fused with its surroundings, and one marked `xla_cpu_small_call`, the mark that XLA
gives to small loops, is compiled as a single function. On other backends the compiler is left free.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import jax
import jax.numpy as jnp
from jax.experimental.xla_metadata import set_xla_metadata


def stage(function: Callable, inputs, name: str = "stage"):
    """`function(inputs)`, its results stored before anything that follows.

    Not to be called under `vmap`: the function works on the whole batch. Results that are inputs passed through, by
    identity, cost nothing. `name` shows in the compiled program.
    """
    if jax.default_backend() != "cpu":
        return function(inputs)
    known = {id(leaf): leaf for leaf in jax.tree.leaves(inputs)}
    plan = {}

    def fresh():
        leaves, plan["structure"] = jax.tree.flatten(function(inputs))
        new = list({id(leaf): leaf for leaf in leaves if id(leaf) not in known}.values())
        place = {id(leaf): at for at, leaf in enumerate(new)}
        plan["leaves"] = [place.get(id(leaf), known.get(id(leaf))) for leaf in leaves]
        return [jnp.asarray(leaf) for leaf in new]

    stored = _call(fresh, name)
    leaves = [stored[at] if isinstance(at, int) else at for at in plan["leaves"]]
    return jax.tree.unflatten(plan["structure"], leaves)


def kernel(function: Callable, name: str = "kernel"):
    """`function()`, a computation made of stages, compiled as one kernel.

    If it has operations other than `POSSIBLE` (a sort, a scatter), it runs as it would without this. Everything it
    reads has to be read by a stage: XLA aborts on a kernel with an argument that its simplifications have left
    without a reader, but never takes one from a call. Nor can XLA partition a kernel: where there are several devices
    it is one only under `shard_map`, or `unpartitioned`.
    """
    may_be_partitioned = jax.device_count() > 1 and not (
        _UNPARTITIONED.get() or jax.sharding.get_abstract_mesh().manual_axes)
    if jax.default_backend() != "cpu" or may_be_partitioned:
        return function()
    return _call(function, name, xla_cpu_small_call="true")


_UNPARTITIONED = ContextVar("unpartitioned", default=False)


@contextmanager
def unpartitioned():
    """What is traced inside runs on one device, of however many: none of its arguments is spread over several."""
    token = _UNPARTITIONED.set(True)
    try:
        yield
    finally:
        _UNPARTITIONED.reset(token)


POSSIBLE = frozenset("""
    abs add add_any and argmax argmin atan2 bitcast_convert_type broadcast_in_dim cbrt ceil clamp clz concatenate
    convert_element_type copy cos custom_jvp_call custom_vjp_call div dynamic_slice dynamic_update_slice eq exp
    exp2 expm1 floor gather ge gt integer_pow iota is_finite jit le log log1p logistic lt max min mul ne neg not or pad
    pjit population_count pow reduce_and reduce_max reduce_min reduce_or reduce_prod reduce_sum rem reshape rev round
    rsqrt select_n shift_left shift_right_arithmetic shift_right_logical sign sin slice split sqrt square squeeze stack
    stop_gradient sub tan tanh transpose unstack while xla_metadata_value xor
""".split())
"""Operations that XLA can compile into a kernel of many."""


def _operations(jaxpr) -> Iterator[str]:
    """Names of all operations, also of called functions."""
    for equation in jaxpr.eqns:
        yield equation.primitive.name
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from _operations(inner)


def _call(function: Callable, name: str, **marks: str):
    """Call a function of no arguments that is not to be inlined."""
    def called():
        return function()

    called.__name__ = name
    called = jax.jit(called)
    if marks and not POSSIBLE.issuperset(_operations(called.trace().jaxpr.jaxpr)):
        marks = {}
    leaves, structure = jax.tree.flatten(called())
    # The marks of one result are those of the call that gives it; a stage that only passes inputs on has none.
    if leaves:
        leaves[0] = set_xla_metadata(leaves[0], inlineable="false", **marks)
    return jax.tree.unflatten(structure, leaves)
