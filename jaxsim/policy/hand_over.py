"""Roles of instances, and how the KV cache of a prompt gets from one that computed it to one that decodes."""

import equinox as eqx
from jaxtyping import Array, Bool, Float, Int, Shaped

from jaxsim.policy.routing import AbstractRouting


class HandOver(eqx.Module):
    """Which executors compute prompts only, which decode only, and the links between them.

    computes_prompts, decodes: of each executor, whether it does this and no more; all others do both, and hand nothing
    over. routing: which of those that decode gets a request whose prompt is done. most_held: blocks that requests
    accepted by an executor, and not running yet, hold before it accepts no more ("pull": a share of its pool;
    "push": no bound). seconds_per_token: of KV on a link of its own; latency_s: of a transfer, in which it has the
    link. layers: of the model, whose KV is sent one by one while the prompt is computed; 0 where it is sent as a whole.

    Where ways differ, pool_of is the pool of each executor, and what depends on the way is a table (source pool, target
    pool): seconds_per_token, latency_s, `Encoding.seconds_per_tile`, shared_link (the link that all of these pools'
    executors share, -1 where there is none; None where none is) and units (how fast it is; see below).
    With max-min fairness, units: of each way, in parts of which the fastest has `jaxsim.engine.max_min.WHOLE`; None
    where all are alike.

    Source: DistServe (arXiv 2401.09670) and LLMServe/DistServe `distserve/decoding_stage_scheduler.py` (pull,
    `waiting_block_prop_threshold`); Splitwise (arXiv 2311.18677, section 4.2: layers).
    """

    computes_prompts: Bool[Array, " executors"]
    decodes: Bool[Array, " executors"]
    routing: AbstractRouting
    most_held: Int[Array, " executors"]
    seconds_per_token: Float[Array, "*ways"]
    latency_s: Float[Array, "*ways"]
    layers: Int[Array, ""]
    pool_of: Int[Array, " executors"] | None = None
    shared_link: Int[Array, "*ways"] | None = None
    units: Int[Array, "*ways"] | None = None

    def over(self, table: Shaped[Array, "*ways"], source: Int[Array, ""], target: Int[Array, ""]
             ) -> Shaped[Array, ""]:
        """What a table says of the way from one executor to another."""
        if self.pool_of is None:
            return table
        pools = (self.pool_of.at[executor].get(mode="promise_in_bounds") for executor in (source, target))
        return table.at[tuple(pools)].get(mode="promise_in_bounds")
