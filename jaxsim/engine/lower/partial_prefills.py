"""Several partly computed prompts as the loop takes them, with the table of what prompts take alone."""

import numpy as np

from jaxsim._core.errors import InputError
from jaxsim.cost.base import AbstractIterationCost
from jaxsim.engine.lower.alone import prefill_seconds
from jaxsim.engine.lower.systems import System
from jaxsim.policy.chunks import Chunks
from jaxsim.policy.kv_parallel import KvParallel
from jaxsim.policy.partial_prefills import MOST_PARTS, ORDERS, PARTS, WORK_STEPS, PartialPrefills
from jaxsim.spec.scenario import Scenario

MOST_SLACK = 0.4
"""Source: Medha (arXiv 2409.17264), an example there."""

MOST_LONG = 1
"""Source: vLLM's default of max_long_partial_prefills."""

LONG_TOKENS = 32_768
"""Of a prompt that is not long yet: above the contexts of short requests in Medha's evaluation (8 K), below those of
long ones (128 K)."""


def make_partial(scenario: Scenario, system: System, cost: AbstractIterationCost | None, chunks: Chunks | None,
                 groups: KvParallel | None, longest: int | None = None) -> PartialPrefills | None:
    """The order of prompts side by side, and what each takes alone; None where one is at a time. longest: tokens of a
    request there is, the most that there may be unless given; a work does not depend on it. Raises `InputError` for
    works that cannot be counted."""
    engine, s = scenario.engine, system.scheduler
    if s.max_num_partial_prefills == 1:
        return None
    bits = (system.max_model_len // WORK_STEPS).bit_length()
    longest = min(longest or system.max_model_len, system.max_model_len)
    works = np.rint(PARTS * prefill_seconds(cost, s.num_stages, chunks, groups, s.max_num_batched_tokens, longest,
                                            bits))
    works = np.maximum(np.maximum.accumulate(works), 1)
    if works[-1] >= MOST_PARTS or np.diff(works).max() * 2.0**bits >= 2**31:
        raise InputError("engine.max_model_len", system.max_model_len,
                         f"lets in prompts of {longest:,} tokens, which alone take {works[-1] / PARTS:,.0f} s, more"
                         " than can be ranked", "lower it, or use more devices")
    return PartialPrefills(
        np.int32(ORDERS.index(s.order)),
        np.int32(LONG_TOKENS if engine.long_prompt_tokens is None else engine.long_prompt_tokens),
        np.int32(engine.max_long_partial_prefills or MOST_LONG),
        np.float32(MOST_SLACK if engine.most_relative_slack is None else engine.most_relative_slack),
        np.float32(engine.deadline_work_factor or 0.0), works.astype(np.int32), np.int32(bits))
