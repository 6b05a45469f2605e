"""Adaptive chunks: the most tokens of a prompt with which the predicted iteration keeps to its time.

The engine's own cost model is asked, whatever it is. First about as many tokens as the last chunk had, one more and
one less: a chunk is rarely much shorter than the one before. Where the answer is not among these, about fifteen lengths
at a time, from the coarsest step to single tokens: up to five rounds for up to 2^20 - 1 tokens. Of any model that takes
no less for more tokens both give the one answer. Where one does, as between two kinds of message, it is a length that
fits, with a next one that does not. `jaxsim.policy.chunks` has the rule, and its closed form.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxsim.cost.base import BatchStats
from jaxsim.engine import kv_parallel, passes
from jaxsim.engine.common import Group
from jaxsim.kernels.loops import repeat
from jaxsim.spec.dims import Dims
from jaxsim.spec.rules.long_contexts import MOST_CHUNK_TOKENS
from jaxsim.state.world import Clocks, Counts

STEP_BITS = 4
"""That each round of the search settles."""

STEPS = -(-MOST_CHUNK_TOKENS.bit_length() // STEP_BITS)
"""Rounds of the search."""

NEAR = (1, 0, -1)
"""Tokens beyond those of the last chunk that are asked for first."""


class Sized(NamedTuple):
    """Tokens of the candidate's next chunk, and whether there is time for it."""

    tokens: Int[Array, ""]
    has_time: Bool[Array, ""]


class Near(NamedTuple):
    """What asking about as many tokens as the last chunk had has shown.

    is_known: the most tokens that fit, or that they are fewer than the least; most: these, or some that are fewer;
    seconds: of the iteration with the larger of `most` and the least.
    """

    is_known: Bool[Array, ""]
    most: Int[Array, ""]
    seconds: Float[Array, ""]


def size(dims: Dims, group: Group, counts: Counts, times: Clocks, longest: Int[Array, ""] | None,
         decoding: "kv_parallel.Decoding | None", known: Int[Array, ""], computed: Int[Array, ""],
         target_s: Float[Array, ""] | None = None) -> Sized:
    """Of a prompt of so many known tokens, of which some are computed, in the batch as it is now; target_s: unless it
    has all of the time."""
    rule, batch = group.batching.chunks, counts.batch
    target_s = rule.target_s if target_s is None else target_s
    most = jnp.minimum(known - computed, batch.budget)
    least = jnp.minimum(rule.least, most)

    def seconds(tokens: Int[Array, ""]) -> Float[Array, ""]:
        return passes.iteration_seconds(
            group, *formed(dims, group, counts, times, longest, decoding, known, computed, tokens))

    close = near(target_s, seconds, counts.rank.forming_chunk, least, most)
    is_known = close.is_known | (most <= 0)
    found = search(target_s, seconds, jnp.where(is_known, 0, most))
    found = jnp.where(close.is_known & (most > 0), close.most, found)
    return Sized(jnp.maximum(found, least), (batch.num_chunks == 0) | (found >= least))


def formed(dims: Dims, group: Group, counts: Counts, times: Clocks, longest: Int[Array, ""] | None,
           decoding: "kv_parallel.Decoding | None", known: Int[Array, ""], computed: Int[Array, ""],
           tokens: Int[Array, ""]) -> "tuple[BatchStats, kv_parallel.Reads | None]":
    """The iteration of the batch as it is now and so many more tokens of a prompt; with KV-cache parallelism, what the
    busiest group does in it."""
    batch = counts.batch
    own, clocks = passes.with_chunk(group, batch, times.batch, computed, tokens)
    is_last = computed + tokens == known
    own = replace(own, joining=batch.joining + is_last)
    behind = longest
    if longest is not None:
        behind = jnp.where(is_last, jnp.maximum(longest, known - batch.counter - 1), longest)
    shared = None
    if decoding is not None:
        shared = kv_parallel.reads(group.batching.kv_parallel, decoding.first, own.spread_chunks)
    stats, _, _ = passes.statistics(dims, group, replace(counts, batch=own),
                                    replace(times, batch=clocks), behind, shared)
    return stats, shared


def near(target_s: Float[Array, ""], seconds: Callable[[Int[Array, ""]], Float[Array, ""]], last: Int[Array, ""],
         least: Int[Array, ""], most: Int[Array, ""]) -> Near:
    """Look around the tokens of the last chunk, brought between the least and the most there may be."""
    guess = jnp.minimum(jnp.maximum(last, least), most)
    tried = guess + jnp.array(NEAR, jnp.int32)
    prices = jax.vmap(seconds)(tried)
    more_fit, fits, fewer_fit = (tried <= most) & ((prices <= target_s) | (tried <= 0))
    is_known = ~more_fit & (fits | fewer_fit | (guess - 1 <= least))
    found = jnp.where(fits, guess, jnp.where(fewer_fit, guess - 1, guess - 2))
    return Near(is_known, found, jnp.where(fits | (guess <= least), prices[1], prices[2]))


def search(target_s: Float[Array, ""], seconds: Callable[[Int[Array, ""]], Float[Array, ""]], most: Int[Array, ""]
           ) -> Int[Array, ""]:
    """The most tokens that fit, up to so many; of no tokens nothing is asked."""
    def ask(state):
        found, step = state
        tried = found + (jnp.arange(1, 1 << STEP_BITS, dtype=jnp.int32) << (step * STEP_BITS))
        fit = (tried <= most) & (jax.vmap(seconds)(tried) <= target_s)
        return found + (jnp.argmin(jnp.append(fit, False)).astype(jnp.int32) << (step * STEP_BITS)), step - 1

    # Coarser steps are beyond the most.
    first = jnp.where(most > 0, jnp.minimum((31 - lax.clz(jnp.maximum(most, 1))) // STEP_BITS, STEPS - 1), -1)
    return repeat(lambda state: state[1] >= 0, ask, (jnp.int32(0), first), STEPS)[0]
