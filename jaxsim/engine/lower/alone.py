"""A prompt alone, chunk by chunk, as the engine's own cost and its own rule for chunks have it: what it takes, and how
many chunks it is cut into."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from jaxsim.cost.base import AbstractIterationCost, BatchStats
from jaxsim.engine import chunks as sizes
from jaxsim.kernels import clock
from jaxsim.policy.chunks import Chunks
from jaxsim.policy.kv_parallel import KvParallel
from jaxsim.policy.partial_prefills import WORK_STEPS

HISTORIES = 256
"""Lengths of history at which chunks are looked at to count them."""


def prefill_seconds(cost: AbstractIterationCost, stages: int, chunks: Chunks, groups: KvParallel | None, budget: int,
                    longest: int, bits: int) -> Float[np.ndarray, " steps+1"]:
    """Of the first 0, 2^bits, 2 2^bits, ... tokens of a prompt alone, in chunks as long as its time allows; of none,
    that of a single one.

    Of one chunk exactly, with the token that it brings about; of more, a straight line between the two ends of chunks
    around it, with a last chunk of the same length and that token. Through pipeline stages chunks follow each other:
    each holds up the next for its slowest stage, and the last has all of its way to go. Right up to the step behind
    `longest` tokens, whatever that is; as much as there beyond.
    """
    stop = ((longest >> bits) + 1) << bits
    ends, seconds = map(np.asarray, _chunked(stages, cost, chunks, groups, np.int32(budget), np.int32(stop),
                                             np.int32(bits)))
    first = int(ends[0, 0])
    tokens = np.arange(WORK_STEPS + 1, dtype=np.int64) << bits
    own = np.asarray(_whole(cost, groups, np.clip(tokens, 1, first).astype(np.int32)), float)
    ends, order = np.unique(ends[ends > 0], return_index=True)
    behind = np.interp(np.minimum(tokens, stop), ends, seconds[seconds > 0][order].astype(float))
    return np.where(tokens <= first, own, behind)


def most_chunks(cost: AbstractIterationCost, chunks: Chunks, groups: KvParallel | None, budget: int,
                prompts: Int[np.ndarray, " requests"]) -> int:
    """Into which all these prompts are cut where each is alone: no fewer, unless a chunk behind more history is longer.
    """
    starts = np.linspace(0, int(prompts.max()), HISTORIES).astype(np.int32)
    tokens = np.asarray(_lengths(cost, chunks, groups, np.int32(budget), starts), np.int64)
    # From one history to the next all chunks are at least as long as at the latter.
    count = np.append(0, np.cumsum(-(-np.diff(starts) // tokens[1:])))
    return int(np.ceil(np.interp(prompts, starts, count)).sum()) + len(prompts)


def _seconds(cost: AbstractIterationCost, groups: KvParallel | None, done: Int[Array, ""], tokens: Int[Array, ""],
             is_last: bool = False, stages: int = 1) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Of an iteration of one chunk, which may be the last of its prompt: all of it, and its slowest stage."""
    end = done + tokens
    low, high = done.astype(jnp.float32), end.astype(jnp.float32)
    context, pairs, merge = end, (high - low) * (high + low), jnp.float32(0)
    if groups is not None:
        context, pairs = groups.shard(end), groups.pairs(done, end)
        merge = groups.merge_seconds(jnp.where(end > groups.tokens, tokens, 0))
    zero = jnp.int32(0)
    stats = BatchStats(zero, zero, jnp.int32(1), tokens, context, pairs, jnp.int32(is_last))
    whole = cost.iteration(stats) + merge
    if stages == 1:
        return whole, whole
    return whole, jnp.max(cost.stage_seconds(stats, stages) + merge / stages)


@jax.jit
def _whole(cost: AbstractIterationCost, groups: KvParallel | None, tokens: Int[np.ndarray, " steps"]):
    return jax.vmap(lambda n: _seconds(cost, groups, jnp.int32(0), n, True)[0])(tokens)


def _length(cost: AbstractIterationCost, chunks: Chunks, groups: KvParallel | None, budget: Int[Array, ""],
            done: Int[Array, ""], last: Int[Array, ""]) -> Int[Array, ""]:
    """Tokens of the chunk behind so many; last: of the one before, as a guess."""
    least = jnp.minimum(chunks.least, budget)

    def seconds(tokens: Int[Array, ""]) -> Float[Array, ""]:
        return _seconds(cost, groups, done, tokens)[0]

    close = sizes.near(chunks.target_s, seconds, last, least, budget)
    found = sizes.search(chunks.target_s, seconds, jnp.where(close.is_known, 0, budget))
    return jnp.maximum(jnp.where(close.is_known, close.most, found), least)


@jax.jit
def _lengths(cost: AbstractIterationCost, chunks: Chunks, groups: KvParallel | None, budget, starts):
    return jax.vmap(lambda done: _length(cost, chunks, groups, budget, done, budget))(starts)


@partial(jax.jit, static_argnums=0)
def _chunked(stages: int, cost: AbstractIterationCost, chunks: Chunks, groups: KvParallel | None, budget, stop, bits):
    """Of the first and the last chunk that ends in each step of the table (the very first in front) where it ends, and
    what the tokens up to there take as a prompt. Zero where none ends; the last is one of those that end up to `stop`,
    or the one beyond."""
    cells = WORK_STEPS + 3

    def continues(carry):
        return carry[0] < stop

    def one(carry):
        done, tokens, total, lost, ends, seconds = carry
        tokens = _length(cost, chunks, groups, budget, done, tokens)
        _, slowest = _seconds(cost, groups, done, tokens, stages=stages)
        whole, _ = _seconds(cost, groups, done, tokens, is_last=True)
        total = clock.two_sum(total, slowest)
        end, lost = done + tokens, lost + total.lo
        cell = jnp.where(done == 0, 0, jnp.minimum(1 + (end >> bits), cells - 1))
        taken = total.hi + lost + (whole - slowest)
        is_first = jnp.array([True, False]) & (ends[cell] == 0) | jnp.array([False, True])
        return (end, tokens, total.hi, lost, ends.at[cell].set(jnp.where(is_first, end, ends[cell])),
                seconds.at[cell].set(jnp.where(is_first, taken, seconds[cell])))

    zero = jnp.float32(0)
    *_, ends, seconds = lax.while_loop(continues, one, (
        jnp.int32(0), budget, zero, zero, jnp.zeros((cells, 2), jnp.int32), jnp.zeros((cells, 2))))
    return ends, seconds
