"""What contexts cut over ranks change of a scheduler, and what they do not go with."""

import msgspec

from jaxsim._core.errors import InputError
from jaxsim.spec.costs import ProfiledCost
from jaxsim.spec.plan import Plan
from jaxsim.spec.presets import Scheduler
from jaxsim.spec.scenario import Scenario

MOST_BLOCK_TOKENS = 1024
"""Of a block on all ranks: sequences are counted by their tokens beyond the last full one."""


def with_contexts(scenario: Scenario, plan: Plan, scheduler: Scheduler) -> Scheduler:
    """The scheduler of a plan whose contexts are cut over ranks: it deals in blocks of all of them. Raises
    `InputError`."""
    engine, shards, ring = scenario.engine, plan.decode_context_parallel_size, plan.prefill_context_parallel_size
    for field, is_given in (("prefill_context_parallel_size", ring > 1), ("decode_context_parallel_size", shards > 1),
                            ("enable_sequence_parallelism", plan.enable_sequence_parallelism),
                            ("enable_eplb", plan.enable_eplb)):
        if is_given and isinstance(scenario.cost, ProfiledCost):
            raise InputError(f"engine.{field}", getattr(engine, field), "was not measured with the profile",
                             "use cost.kind = 'roofline', or leave it out")
    if shards == 1 and ring == 1:
        return scheduler
    field = "decode_context_parallel_size" if shards > 1 else "prefill_context_parallel_size"
    for other, given in (("engine.swap", engine.swap), ("engine.offload", engine.offload),
                         ("engine.context_reuse", engine.context_reuse),
                         ("cluster.remote_store", scenario.cluster.remote_store),
                         ("cluster.migration", scenario.cluster.migration)):
        if given is not None:
            raise InputError(f"engine.{field}", getattr(engine, field), f"is not simulated with {other}",
                             f"use 1, or leave {other} out")
    budget = scheduler.max_num_batched_tokens
    if budget % (2 * ring):
        raise InputError("engine.max_num_batched_tokens", budget,
                         f"is no multiple of {2 * ring}: {ring} context-parallel ranks take a part from the front and"
                         f" one from the back of a chunk each, and {budget % (2 * ring)} tokens would be left over",
                         f"use {budget - budget % (2 * ring)}")
    tokens = scheduler.block_size * shards
    if shards & (shards - 1) or tokens > MOST_BLOCK_TOKENS:
        raise InputError("engine.decode_context_parallel_size", shards,
                         f"makes blocks of {shards} x {scheduler.block_size} = {tokens} tokens, which are simulated as"
                         f" powers of two up to {MOST_BLOCK_TOKENS}",
                         "use a power of two, or a smaller engine.block_size")
    return msgspec.structs.replace(scheduler, block_size=tokens)
