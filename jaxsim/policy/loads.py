"""How free an instance is, by Llumnix: the load that dispatch, migration and scaling look at."""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class Loads(eqx.Module):
    """Numbers of every instance at one instant.

    used_blocks, num_blocks: of the KV pool, those taken for who is on the way here included; running: requests that
    run, or have their KV here and wait for a seat; waiting: those without KV; waiting_blocks: that all of these need to
    be computed as far as they are known, head_blocks: that the first of them needs; reserved_blocks: kept free for
    urgent requests that run here, None where nobody is urgent. killed: waiting ones that were preempted, None without
    migration.
    """

    used_blocks: Int[Array, " instances"]
    num_blocks: Int[Array, " instances"]
    running: Int[Array, " instances"]
    waiting: Int[Array, " instances"]
    waiting_blocks: Int[Array, " instances"]
    head_blocks: Int[Array, " instances"]
    reserved_blocks: Int[Array, " instances"] | None = None
    killed: Int[Array, " instances"] | None = None

    @property
    def virtual_usage(self) -> Int[Array, " instances"]:
        """Blocks in use, those that the head of the queue needs, and those reserved for urgent requests.

        Source: Llumnix (arXiv 2406.03243), Algorithm 1: a waiting request counts only as head of the line.
        """
        usage = self.used_blocks + self.head_blocks
        return usage if self.reserved_blocks is None else usage + self.reserved_blocks


def freeness(loads: Loads) -> Float[Array, " instances"]:
    """(M - sum of virtual usage) / B in blocks a request: for how many blocks more each running request has room.

    B: running requests, at least one. Negative where more is wanted than there is.
    Source: Llumnix (arXiv 2406.03243), section 4.4.
    """
    return (loads.num_blocks - loads.virtual_usage) / jnp.maximum(loads.running, 1)


def remaining_steps(loads: Loads) -> Float[Array, " instances"]:
    """(free blocks - blocks of all that wait) / (running + waiting), infinite where nobody is: for dispatch, scaling.

    Source: AlibabaPAI/llumnix, load metric `remaining_steps`.
    """
    return _per(loads.num_blocks - loads.used_blocks - loads.waiting_blocks, loads.running + loads.waiting)


def remaining_steps_to_migrate(loads: Loads) -> Float[Array, " instances"]:
    """(free blocks - blocks of the head of the queue) / (running + 1 if anybody waits): for pairs to migrate.

    Source: AlibabaPAI/llumnix, load metric `remaining_steps`.
    """
    return _per(loads.num_blocks - loads.used_blocks - loads.head_blocks, loads.running + (loads.waiting > 0))


def _per(blocks: Int[Array, " instances"], requests: Int[Array, " instances"]) -> Float[Array, " instances"]:
    return jnp.where(requests > 0, blocks / jnp.maximum(requests, 1), jnp.inf)
