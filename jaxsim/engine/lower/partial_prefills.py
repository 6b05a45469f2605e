"""Several partly computed prompts as the loop takes them, with the table of what prompts take alone."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Float, Int

from jaxsim._core.errors import InputError
from jaxsim.cost.base import AbstractIterationCost, BatchStats
from jaxsim.engine.chunks import STEP_BITS, STEPS
from jaxsim.engine.lower.systems import System
from jaxsim.kernels import clock
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
                 groups: KvParallel | None) -> PartialPrefills | None:
    """The order of prompts side by side, and what each takes alone; None where one is at a time. Raises `InputError`
    for works that cannot be counted."""
    engine, s = scenario.engine, system.scheduler
    if s.max_num_partial_prefills == 1:
        return None
    bits = max((system.max_model_len // WORK_STEPS).bit_length(), 0)
    works = np.rint(PARTS * prefill_seconds(cost, s.num_stages, chunks, groups, s.max_num_batched_tokens,
                                            system.max_model_len, bits))
    works = np.maximum(np.maximum.accumulate(works), 1)
    if works[-1] >= MOST_PARTS or np.diff(works).max() * 2.0**bits >= 2**31:
        raise InputError("engine.max_model_len", system.max_model_len,
                         f"tokens of a prompt alone take {works[-1] / PARTS:,.0f} s, more than can be ranked",
                         "lower it, or use more devices")
    return PartialPrefills(
        np.int32(ORDERS.index(s.order)),
        np.int32(LONG_TOKENS if engine.long_prompt_tokens is None else engine.long_prompt_tokens),
        np.int32(engine.max_long_partial_prefills or MOST_LONG),
        np.float32(MOST_SLACK if engine.most_relative_slack is None else engine.most_relative_slack),
        np.float32(engine.deadline_work_factor or 0.0), works.astype(np.int32), np.int32(bits))


def prefill_seconds(cost: AbstractIterationCost, stages: int, chunks: Chunks, groups: KvParallel | None, budget: int,
                    longest: int, bits: int) -> Float[np.ndarray, " steps+1"]:
    """Of the first 2^bits, twice as many, ... tokens of a prompt alone, in chunks as long as its time allows: those of
    one chunk exactly, of more a straight line between the ends of its own. Of none, those of a single token.

    Through pipeline stages chunks follow each other: each holds up the next for its slowest stage, and the last has
    all of its way to go.
    """
    ends, seconds, ways = map(np.asarray, _chunked(stages, cost, chunks, groups, np.int32(budget), np.int32(longest),
                                                   np.int32(bits)))
    first = int(ends[0])
    tokens = np.arange(WORK_STEPS + 1, dtype=np.int64) << bits
    alone = np.maximum(np.minimum(tokens, first), 1).astype(np.int32)
    own = np.asarray(_whole(cost, groups, alone), float)
    is_end = ends > 0
    order = np.argsort(ends[is_end])
    behind = np.interp(tokens, ends[is_end][order], (seconds + ways)[is_end][order].astype(float))
    return np.where(tokens <= first, own, behind)


def _seconds(cost: AbstractIterationCost, groups: KvParallel | None, done, tokens, stages: int = 1):
    """Of an iteration of one chunk: all of it, and its slowest stage."""
    end = done + tokens
    low, high = done.astype(jnp.float32), end.astype(jnp.float32)
    zero, context, pairs, merge = jnp.int32(0), end, (high - low) * (high + low), jnp.float32(0)
    if groups is not None:
        context, pairs = groups.shard(end), groups.pairs(done, end)
        merge = groups.merge_seconds(jnp.where(end > groups.tokens, tokens, 0))
    stats = BatchStats(zero, zero, jnp.int32(1), tokens, context, pairs, zero)
    whole = cost.iteration(stats) + merge
    if stages == 1:
        return whole, whole
    return whole, jnp.max(cost.stage_seconds(stats, stages) + merge / stages)


@jax.jit
def _whole(cost: AbstractIterationCost, groups: KvParallel | None, tokens: Int[np.ndarray, " steps"]):
    return jax.vmap(lambda n: _seconds(cost, groups, jnp.int32(0), n)[0])(tokens)


@partial(jax.jit, static_argnums=0)
def _chunked(stages: int, cost: AbstractIterationCost, chunks: Chunks, groups: KvParallel | None, budget, longest,
             bits):
    """Of the last chunk that ends in each step of the table (the very first in front): where it ends, seconds until the
    chunk behind it may begin, and what it then still has to go. Zero where none ends."""
    cells = WORK_STEPS + 2

    def continues(carry):
        return carry[0] < longest

    def one(carry):
        done, total, lost, ends, seconds, ways = carry
        most, found = jnp.minimum(budget, longest - done), jnp.int32(0)
        for step in reversed(range(STEPS)):
            tried = found + (jnp.arange(1, 1 << STEP_BITS, dtype=jnp.int32) << (step * STEP_BITS))
            takes = jax.vmap(lambda n: _seconds(cost, groups, done, n)[0])(tried)
            fit = (tried <= most) & (takes <= chunks.target_s)
            found = found + (jnp.argmin(jnp.append(fit, False)).astype(jnp.int32) << (step * STEP_BITS))
        tokens = jnp.maximum(found, jnp.minimum(chunks.least, most))
        whole, slowest = _seconds(cost, groups, done, tokens, stages)
        total = clock.two_sum(total, slowest)
        end, lost = done + tokens, lost + total.lo
        cell = jnp.where(done == 0, 0, 1 + (end >> bits))
        return (end, total.hi, lost, ends.at[cell].set(end), seconds.at[cell].set(total.hi + lost),
                ways.at[cell].set(whole - slowest))

    zero = jnp.float32(0)
    _, _, _, ends, seconds, ways = lax.while_loop(
        continues, one, (jnp.int32(0), zero, zero, jnp.zeros(cells, jnp.int32), jnp.zeros(cells), jnp.zeros(cells)))
    return ends, seconds, ways
