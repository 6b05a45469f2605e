"""Small things every phase of a step uses."""

from dataclasses import replace
from typing import NamedTuple, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PyTree, Shaped

from jaxsim.cost.base import AbstractIterationCost, OneOf
from jaxsim.kernels import clock
from jaxsim.kernels.clock import Time
from jaxsim.policy.arrivals import AbstractSource, SortedArrivals
from jaxsim.policy.batching import Batching
from jaxsim.policy.clients import Clients
from jaxsim.policy.encoding import Encoder, Encoding
from jaxsim.policy.failures import Failures
from jaxsim.policy.fairness import TokenCounters
from jaxsim.policy.hand_over import HandOver
from jaxsim.policy.migration import Migration
from jaxsim.policy.role_switching import RoleSwitching
from jaxsim.policy.routing import AbstractRouting
from jaxsim.policy.scaling import Scaling
from jaxsim.policy.slack import Slack
from jaxsim.spec.dims import Dims
from jaxsim.state.requests import Requests
from jaxsim.state.world import BatchTimes, Counts, World

T = TypeVar("T")

MAX_SPAN_S = clock.EPOCH_S / 4
"""A jump covers at most about this much time (4.6 hours), and an iteration must."""


class Group(eqx.Module):
    """What executors of one kind have in common: how they form batches, and what these cost on their device."""

    batching: Batching
    cost: AbstractIterationCost


class Params(eqx.Module):
    """What a scenario is, besides its workload: policies and costs, all numbers traced.

    groups: kinds of executors. Their batching has the same flags, their costs may be of different classes;
    group_of: index of each executor's, None if there is one group. source: how requests arrive. is_active: which
    instances get any, at least one; None if all do. hand_over: with roles, who computes prompts and who outputs.
    migration: of running requests, None without; scaling: of executors, None where all are on. headroom_blocks: what
    freeness keeps for urgent requests where any run, None where nobody is.
    clients: where requests may end without an answer, who sends them again and who refuses them.
    failures: when executors are down, None where they never are.
    encoding, encoder: images that others encode, or those that compute the prompts.
    counters: with virtual token counters, what tokens cost every tenant.
    variants: fine-tunes that instances serve in turn, None where all serve the same.
    tangents: what the floats of the only cost change by, by each of `Dims.num_tangents` fields, which are in front.
    switching: of roles, None where these stay; a step then sees `hand_over`, `encoding` and `group_of` as they are now.
    """

    groups: tuple[Group, ...]
    routing: AbstractRouting
    max_steps: Int[Array, ""]
    source: AbstractSource = SortedArrivals()
    group_of: Int[Array, " executors"] | None = None
    is_active: Bool[Array, " ranks"] | None = None
    hand_over: HandOver | None = None
    migration: Migration | None = None
    scaling: Scaling | None = None
    headroom_blocks: Int[Array, ""] | None = None
    clients: Clients | None = None
    encoding: Encoding | None = None
    encoder: Encoder | None = None
    counters: TokenCounters | None = None
    slack: Slack | None = None
    failures: Failures | None = None
    switching: RoleSwitching | None = None
    variants: Int[Array, ""] | None = None
    tangents: PyTree | None = None

    def __check_init__(self):
        if len({jax.tree.structure(group.batching) for group in self.groups}) != 1:
            raise ValueError("groups: the flags of their batching differ; only its numbers may")
        if (self.group_of is None) != (len(self.groups) == 1):
            raise ValueError(f"group_of: needed for {len(self.groups)} groups" if self.group_of is None else
                             "group_of: of no use with a single group")

    @property
    def flags(self) -> Batching:
        """Flags of batching, the same for every group. Its numbers are those of the first."""
        return self.groups[0].batching

    def group(self, executor: Int[Array, ""]) -> Group:
        """The group of an executor. Costs of several classes are all evaluated, and one chosen."""
        if self.group_of is None:
            return self.groups[0]
        index = take(self.group_of, executor)
        batching = jax.tree.map(lambda *x: take(jnp.stack(x), index), *(group.batching for group in self.groups))
        return Group(batching, OneOf(tuple(group.cost for group in self.groups), index))

    def of_executors(self, number) -> Array:
        """`number(batching)` of every executor, or one number if all are alike."""
        numbers = [number(group.batching) for group in self.groups]
        return numbers[0] if self.group_of is None else jnp.stack(numbers)[self.group_of]


class Context(NamedTuple):
    """What a step reads and never changes; `group` is that of its executor, once this is known."""

    dims: Dims
    params: Params
    requests: Requests
    world: World
    group: Group | None = None


def blocks_for(tokens: Int[Array, ""], dims: Dims) -> Int[Array, ""]:
    """KV blocks that hold `tokens`."""
    return (tokens + (dims.block_size - 1)) >> dims.block_bits


def take(array: Shaped[Array, "..."], *index: Int[Array, ""]) -> Shaped[Array, "..."]:
    """One entry by indices known to be in bounds."""
    return array.at[index].get(mode="promise_in_bounds")


def span(pace: Time, growth_s: Float[Array, ""], count: Int[Array, ""]) -> Time:
    """Time of the first `count` iterations of a run: `count pace + growth count (count - 1) / 2`, on the grid."""
    j = count.astype(jnp.float32)
    base = clock.add(clock.multiply(count, pace.hi), clock.on_grid(j * pace.lo))
    return clock.add(base, clock.on_grid(growth_s * (j * (j - 1) * 0.5)))


def iterations_to_reach(pace_s: Float[Array, ""], growth_s: Float[Array, ""], distance_s: Float[Array, ""]
                        ) -> Int[Array, ""]:
    """The smallest count whose `span` is about `distance_s`; at most one off, which the caller mends."""
    linear = pace_s - 0.5 * growth_s
    root = jnp.sqrt(linear * linear + 2.0 * growth_s * jnp.maximum(distance_s, 0.0))
    count = 2.0 * jnp.maximum(distance_s, 0.0) / jnp.maximum(linear + root, 1e-30)
    return lax.stop_gradient(jnp.ceil(jnp.minimum(count, 1e9)).astype(jnp.int32))


def choose(condition: Bool[Array, ""], a: T, b: T) -> T:
    """Leaf-wise choice between two records."""
    return jax.tree.map(lambda x, y: x if x is y else jnp.where(condition, x, y), a, b)


def without_chunks(own: BatchTimes) -> BatchTimes:
    """Of a batch that holds no prompt chunk."""
    zero = jnp.float32(0)
    return replace(own, chunk_pairs=zero, chunk_tiled=None if own.chunk_tiled is None else zero)


def has(counts: Counts, flag: int) -> Bool[Array, ""]:
    """Whether the pass has reached `flag`."""
    return (counts.rank.progress & flag) != 0


def mark(counts: Counts, condition: Bool[Array, ""], flag: int) -> Counts:
    """Set `flag` where `condition`."""
    progress = jnp.where(condition, counts.rank.progress | flag, counts.rank.progress)
    return replace(counts, rank=replace(counts.rank, progress=progress))
