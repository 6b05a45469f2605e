"""Engines that change their role: the stage with the longest queue gets one from another that has more."""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

ENCODE, PREFILL, DECODE = range(3)
"""Stages, and the roles of engines."""

ROLES = ("encode", "prefill", "decode")
"""Their names, in that order."""


class RoleSwitching(eqx.Module):
    """A controller that samples the queues of all stages every `sample_s` and moves an engine every `decide_s` at most.

    The queue of a stage is what its engines have and do not work on: parts of images, or requests, that wait there,
    are not accepted yet or are on their way, those of engines that are about to leave the stage included. What a
    decision looks at is the mean of the samples since the one before (as a sum: all stages have as many). Its target is
    the stage with the longest queue; where every stage has half of that or more nobody moves. The source is, of the
    other stages with a strictly shorter queue, the one with the most engines, if it has more than one; those already
    asked to leave do not count. Of its engines the one with the fewest requests moves. Ties go to the earlier stage,
    the lower index.

    An engine learns of it at its next poll, every `poll_s`: it takes nobody from then on, and an encode engine hands
    its waiting parts to the others. It works off what it has, which is looked at every `drain_check_s` from then;
    empty, it loads its new weights for `switch_s`, and has its new role. deals_anew: when there is one more that
    encodes, the parts that wait at the others are dealt out again, to all of them.

    roles: of each executor at the beginning. group_of: index of the group (`jaxsim.engine.common.Params.groups`) that
    an executor of each role belongs to, None where there is one group. pool_of: its pool likewise, None where ways
    between pools are alike.

    Source: EPD (arXiv 2501.05460) and its public code: periods of 1, 5, 2 and 1 s, the rule. Assumed, since not
    published: the mean of the samples, who of the source moves, that a decision does not wait for the moves before it,
    that a change takes no time beside the drain (`switch_s` = 0), and `deals_anew`.
    Known gaps: the planner, which replays recent requests for every split, is not there.
    """

    sample_s: Float[Array, ""]
    decide_s: Float[Array, ""]
    poll_s: Float[Array, ""]
    drain_check_s: Float[Array, ""]
    switch_s: Float[Array, ""]
    deals_anew: Bool[Array, ""]
    roles: Int[Array, " executors"]
    group_of: Int[Array, " roles"] | None = None
    pool_of: Int[Array, " roles"] | None = None

    def decide(self, queued: Int[Array, " stages"], engines: Int[Array, " stages"]
               ) -> tuple[Bool[Array, ""], Int[Array, ""], Int[Array, ""]]:
        """Whether an engine moves, from which stage to which.

        queued: of each stage, summed over the samples; engines: that nobody has asked to leave, 0 where there is no
        such stage.
        """
        is_stage = engines > 0
        longest = jnp.max(jnp.where(is_stage, queued, -1))
        target = jnp.argmax(jnp.where(is_stage, queued, -1)).astype(jnp.int32)
        are_all_long = jnp.all(~is_stage | (2 * queued >= longest))
        spare = jnp.where(is_stage & (queued < longest), engines, 0)
        source = jnp.argmax(spare).astype(jnp.int32)
        return ~are_all_long & (jnp.max(spare) > 1), source, target
