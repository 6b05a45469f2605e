"""How many instances are on: a band of mean freeness, looked at now and then."""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxsim.policy.loads import Loads


class Scaling(eqx.Module):
    """One instance more or less at a time, so that the mean freeness of those that are on stays in a band.

    Every `check_s`: below `out_below` blocks a request the first instance that is off starts, which takes `startup_s`;
    above `in_above` that with the fewest requests drains: nobody comes to it any more, who runs there migrates away
    where migration is on, and empty it goes off at the next look. Never more than `most` or fewer than `fewest`, which
    are on at the beginning.

    Source: Llumnix (arXiv 2406.03243, section 4.4: one at a time, the fewest requests); AlibabaPAI/llumnix (scale
    policy `avg_load`: the load of all taken together, thresholds 10 and 60, every 10 s).
    Known gaps: a draining instance is not taken back, one that starts does not stop.
    """

    check_s: Float[Array, ""]
    out_below: Float[Array, ""]
    in_above: Float[Array, ""]
    startup_s: Float[Array, ""]
    fewest: Int[Array, ""]
    most: Int[Array, ""]

    def decide(self, loads: Loads, is_on: Bool[Array, " instances"], num_starting: Int[Array, ""],
               is_up: Bool[Array, " instances"] | None = None, num_coming: Int[Array, ""] | None = None
               ) -> tuple[Bool[Array, ""], Bool[Array, ""]]:
        """Whether an instance more is wanted, whether one less is.

        is_up: of instances that fail, those that do not at the moment; num_coming: of those that start, how many are
        up. Only who is up is free or full, and fewer than `fewest` of them on or starting want one more, however free
        they are; one that is on and down counts as one of the `most`, since it comes back.
        """
        held = is_on
        if is_up is not None:
            is_on = is_on & is_up
        blocks = loads.num_blocks - loads.used_blocks - loads.waiting_blocks
        blocks = jnp.sum(jnp.where(is_on, blocks, 0))
        requests = jnp.sum(jnp.where(is_on, loads.running + loads.waiting, 0))
        free = jnp.where(requests > 0, blocks / jnp.maximum(requests, 1), jnp.inf)
        num_on = jnp.sum(is_on, dtype=jnp.int32)
        num_held = num_on if is_up is None else jnp.sum(held, dtype=jnp.int32)
        wants_more = free < self.out_below
        if is_up is not None:
            wants_more = wants_more | (num_on + num_coming < self.fewest)
        wants_more = wants_more & (num_held + num_starting < self.most)
        return wants_more, (free > self.in_above) & (num_on > self.fewest) & (num_starting == 0)
