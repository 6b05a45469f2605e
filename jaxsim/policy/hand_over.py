"""Roles of instances, and how the KV cache of a prompt gets from one that computed it to one that decodes."""

import equinox as eqx
from jaxtyping import Array, Bool, Float, Int

from jaxsim.policy.routing import AbstractRouting


class HandOver(eqx.Module):
    """Which executors compute prompts only, which decode only, and the links between them.

    computes_prompts, decodes: of each executor, whether it does this and no more; all others do both, and hand nothing
    over. routing: which of those that decode gets a request whose prompt is done. most_held: blocks that requests
    accepted by an executor, and not running yet, hold before it accepts no more ("pull": a share of its pool;
    "push": no bound). seconds_per_token: of KV on a link of its own; latency_s: of a transfer, in which it has the
    link. layers: of the model, whose KV is sent one by one while the prompt is computed; 0 where it is sent as a whole.

    Source: DistServe (arXiv 2401.09670) and LLMServe/DistServe `distserve/decoding_stage_scheduler.py` (pull,
    `waiting_block_prop_threshold`); Splitwise (arXiv 2311.18677, section 4.2: layers).
    """

    computes_prompts: Bool[Array, " executors"]
    decodes: Bool[Array, " executors"]
    routing: AbstractRouting
    most_held: Int[Array, " executors"]
    seconds_per_token: Float[Array, ""]
    latency_s: Float[Array, ""]
    layers: Int[Array, ""]
