"""What the controller of a cluster with migration carries from step to step: few numbers of each executor.

The loop carries it whole, as it does the state of a source of arrivals.
"""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from jaxsim.kernels import clock
from jaxsim.kernels.clock import Time

PARTNER, REQUEST, SLOT, STAGE, COPIED, WANTED, LOST, LEAVES = range(8)
"""Columns of `Control.moves`."""

FINISHED, PREEMPTED, NO_ROOM, TOO_MANY_STAGES, OUTAGE = range(5)
"""Why a migration was given up: its request finished or was preempted first, its destination lacked blocks, what was
left to copy was too much once more than allowed, or one of its two executors went down."""

NUM_CAUSES = 5

OFF, STARTING, ON, DRAINING = range(4)
"""What an executor is, in `Fleet.status`."""


class Fleet(eqx.Module):
    """Which executors are on. check: when the next look at all is; ready: when those that start can take requests;
    used: seconds from start to end of all that are off again, less the starts of the others (parts of
    `clock.to_integers`). starts, drains: so far.
    """

    status: Int[Array, " executors"]
    ready: Time
    check: Time
    used: Int[Array, " 3"]
    starts: Int[Array, ""]
    drains: Int[Array, ""]

    def is_on(self, now: Time) -> Bool[Array, " executors"]:
        """Which take requests."""
        return (self.status == ON) | ((self.status == STARTING) & (self.ready <= now))

    def settled(self, now: Time, is_empty: Bool[Array, " executors"]) -> Int[Array, " executors"]:
        """Status now: who was ready by now is on, who drained and is empty is off."""
        status = jnp.where(self.is_on(now), ON, self.status)
        return jnp.where((status == DRAINING) & is_empty, OFF, status)


class Control(eqx.Module):
    """The controller of migrations.

    poll: when it looks at loads next, `clock.never()` while no request is anywhere; paired: executors that have had
    their turn in the look under way. moves: of each executor in a migration the PARTNER (-1: none); of a source also
    the REQUEST and its SLOT, the stages begun, the blocks that its destination has for it, the blocks that it WANTED
    of it for the stage at hand, its preemptions when it began (LOST), and whether it LEAVES at the end of the iteration
    in flight, or has left. started: migrations so far; aborted: those given up, by cause. fleet: None where all
    executors are on.
    """

    poll: Time
    paired: Bool[Array, " executors"]
    moves: Int[Array, "executors 8"]
    started: Int[Array, ""]
    aborted: Int[Array, " causes"]
    fleet: Fleet | None = None


def no_control(num_executors: int, has_scaling: bool = False) -> Control:
    """Before the first arrival."""
    moves = jnp.zeros((num_executors, 8), jnp.int32).at[:, PARTNER].set(-1)
    return Control(clock.never(), jnp.zeros(num_executors, bool), moves, jnp.int32(0),
                   jnp.zeros(NUM_CAUSES, jnp.int32), _no_fleet(num_executors) if has_scaling else None)


def _no_fleet(num_executors: int) -> Fleet:
    return Fleet(jnp.zeros(num_executors, jnp.int32), clock.never((num_executors,)), clock.never(),
                 jnp.zeros(3, jnp.int32), jnp.int32(0), jnp.int32(0))
