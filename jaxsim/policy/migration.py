"""Who migrates, from where to where: pairs of instances, and the request that goes."""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxsim.policy.loads import Loads, freeness, remaining_steps_to_migrate

METRICS = ("remaining_steps", "freeness")
CHOICES = ("shortest", "last_come")


class Migration(eqx.Module):
    """A controller that looks at all instances every `polling_s` and lets requests migrate from full to free ones.

    Sources are instances with preempted requests that still wait, or less free than `out_below`; destinations those
    without, freer than `in_above`. The least free source is paired with the freest destination, the next with the next;
    a pair of which one has a migration already does nothing. Ties go to the lowest index.

    metric (static): `remaining_steps` of the public code or `freeness` of the paper, both in KV blocks a request
    (`jaxsim.policy.loads`). choice (static): the source sends its `shortest` running decode, or the `last_come`; urgent
    ones only where there is no other.

    max_stages, last_stage_blocks: stages of copying before a migration is given up; blocks at or under which the rest
    is copied with the request stopped. block_s, latency_s: of a block on the way, of a stage.

    Source: Llumnix (arXiv 2406.03243, section 4), AlibabaPAI/llumnix (pair policy `defrag`, request choice `SR`,
    `LCR`). Known gaps: waiting requests do not migrate; the pair policy `balanced` is left out.
    """

    polling_s: Float[Array, ""]
    out_below: Float[Array, ""]
    in_above: Float[Array, ""]
    max_stages: Int[Array, ""]
    last_stage_blocks: Int[Array, ""]
    block_s: Float[Array, ""]
    latency_s: Float[Array, ""]
    metric: str = eqx.field(static=True, default="remaining_steps")
    choice: str = eqx.field(static=True, default="shortest")

    def __check_init__(self):
        for name, allowed in (("metric", METRICS), ("choice", CHOICES)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} = {getattr(self, name)!r}: not one of {', '.join(allowed)}")

    def next_pair(self, loads: Loads, paired: Bool[Array, " instances"],
                  is_on: Bool[Array, " instances"] | None = None, is_draining: Bool[Array, " instances"] | None = None
                  ) -> tuple[Bool[Array, ""], Int[Array, ""], Int[Array, ""]]:
        """Whether a pair is left among those not `paired` yet; its source, its destination.

        is_on, is_draining: None where all are on, or none drains; those that are down are neither. A draining instance
        counts as one with infinitely much in use.
        """
        free = remaining_steps_to_migrate(loads) if self.metric == "remaining_steps" else freeness(loads)
        has_killed = loads.killed > 0
        if is_draining is not None:
            free = jnp.where(is_draining, -jnp.inf, free)
        sends = (has_killed | (free < self.out_below)) & ~paired
        takes = ~has_killed & (free > self.in_above) & ~sends & ~paired
        if is_on is not None:
            takes, sends = takes & is_on, sends & (is_on if is_draining is None else is_on | is_draining)
        source = jnp.argmin(jnp.where(sends, jnp.maximum(free, -3e38), jnp.inf)).astype(jnp.int32)
        destination = jnp.argmax(jnp.where(takes, jnp.minimum(free, 3e38), -jnp.inf)).astype(jnp.int32)
        return jnp.any(sends) & jnp.any(takes), source, destination
