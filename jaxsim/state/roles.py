"""What the controller of roles carries from step to step: few numbers of each executor.

The loop carries it whole, as it does the controller of migrations.
"""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxsim.kernels import clock
from jaxsim.kernels.clock import Time
from jaxsim.kernels.queues import Queue

STAYS, ASKED, DRAINS, LOADS = range(4)
"""What an executor is about: its role, or one that it is to leave, unknown to it; that it takes nobody for; that its
weights are loaded for."""

EXECUTOR, SOURCE, TARGET, DECIDED, STOPPED, EMPTIED, CHANGED = 0, 1, 2, 3, 6, 9, 12
"""Columns of `World.switches`: which executor, from which role to which, and when (epoch, hi, lo; -1: not yet) that was
decided, it stopped taking anybody, was seen empty, had its new role."""

SWITCH_FIELDS = 15

MOST_SWITCHES = 256
"""Rows of `World.switches`; later ones are counted and not kept."""


class Roles(eqx.Module):
    """Who has which role, and what the controller is about.

    role, next_role: of each executor (`jaxsim.policy.role_switching`), the latter where it does not stay; check: when
    it is next looked at whether it is empty, or when it has loaded; row: of the switch it is in, in `World.switches`.
    sample, decide, poll: when each happens next; queued: of each stage, the samples since the last decision, summed.
    handed: parts that an executor had waiting and that others are to take at this instant; num_handed: so far. dealing:
    who has to give away what waits there first; again: this very instant, while there is anything of that.
    num_switches: decided so far; num_changed: done. steps: of the scenario, at the last decision.
    """

    role: Int[Array, " executors"]
    next_role: Int[Array, " executors"]
    status: Int[Array, " executors"]
    check: Time
    row: Int[Array, " executors"]
    sample: Time
    decide: Time
    poll: Time
    queued: Int[Array, " stages"]
    handed: Queue
    dealing: Bool[Array, " executors"]
    again: Time
    num_handed: Int[Array, ""]
    num_switches: Int[Array, ""]
    num_changed: Int[Array, ""]
    steps: Int[Array, ""]


def no_roles(num_executors: int) -> tuple[Roles, Float[Array, "switches 15"]]:
    """Before anything is known of them; and what is kept of switches."""
    zeros, zero = jnp.zeros(num_executors, jnp.int32), jnp.int32(0)
    never = clock.never()
    roles = Roles(zeros, zeros, zeros, clock.never((num_executors,)), zeros, never, never, never,
                  jnp.zeros(3, jnp.int32), Queue(zero, zero, zero), jnp.zeros(num_executors, bool), never, zero, zero,
                  zero, jnp.int32(-1))
    return roles, -jnp.ones((MOST_SWITCHES + 1, SWITCH_FIELDS), jnp.float32)
