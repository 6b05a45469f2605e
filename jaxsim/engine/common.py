"""Small things every phase of a step uses."""

from dataclasses import replace
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxsim.cost.base import AbstractIterationCost
from jaxsim.kernels import clock
from jaxsim.kernels.clock import Time
from jaxsim.policy.batching import Batching
from jaxsim.policy.routing import AbstractRouting
from jaxsim.spec.dims import Dims
from jaxsim.state.requests import Requests
from jaxsim.state.world import Counts, World

MAX_SPAN_S = clock.EPOCH_S / 4
"""A jump covers at most about this much time (4.6 hours), and an iteration must."""


class Params(eqx.Module):
    """What a scenario is, besides its workload: policies and costs, all numbers traced."""

    batching: Batching
    routing: AbstractRouting
    cost: AbstractIterationCost
    max_steps: Int[Array, ""]


class Context(NamedTuple):
    """What a step reads and never changes."""

    dims: Dims
    params: Params
    requests: Requests
    world: World


def blocks_for(tokens: Int[Array, ""], dims: Dims) -> Int[Array, ""]:
    """KV blocks that hold `tokens`."""
    return (tokens + (dims.block_size - 1)) >> dims.block_bits


def take(array, *index):
    """One entry by indices known to be in bounds."""
    return array.at[index].get(mode="promise_in_bounds")


def span(pace: Time, growth_s: Float[Array, ""], count: Int[Array, ""]) -> Time:
    """Time of the first `count` iterations of a run: `count pace + growth count (count - 1) / 2`, on the grid."""
    j = count.astype(jnp.float32)
    base = clock.add(clock.multiply(count, pace.hi), clock.on_grid(j * pace.lo))
    return clock.add(base, clock.on_grid(growth_s * (j * (j - 1) * 0.5)))


def iterations_to_reach(pace_s, growth_s, distance_s) -> Int[Array, ""]:
    """The smallest count whose `span` is about `distance_s`; at most one off, which the caller mends."""
    linear = pace_s - 0.5 * growth_s
    root = jnp.sqrt(linear * linear + 2.0 * growth_s * jnp.maximum(distance_s, 0.0))
    count = 2.0 * jnp.maximum(distance_s, 0.0) / jnp.maximum(linear + root, 1e-30)
    return lax.stop_gradient(jnp.ceil(jnp.minimum(count, 1e9)).astype(jnp.int32))


def choose(condition, a, b):
    """Leaf-wise choice between two records."""
    return jax.tree.map(lambda x, y: x if x is y else jnp.where(condition, x, y), a, b)


def has(counts: Counts, flag: int) -> Bool[Array, ""]:
    """Whether the pass has reached `flag`."""
    return (counts.executor.progress & flag) != 0


def mark(counts: Counts, condition: Bool[Array, ""], flag: int) -> Counts:
    """Set `flag` where `condition`."""
    progress = jnp.where(condition, counts.executor.progress | flag, counts.executor.progress)
    return replace(counts, executor=replace(counts.executor, progress=progress))
