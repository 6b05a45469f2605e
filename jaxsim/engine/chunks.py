"""Adaptive chunks: the most tokens of a prompt with which the predicted iteration keeps to its time.

The engine's own cost model is asked, for fifteen lengths at a time, from the coarsest step to single tokens: five
rounds for up to 2^20 - 1 tokens, of any model that takes no less for more tokens. Where one does, as between two kinds
of message, the chunk is the last in front of the first that does not fit, as far as the steps of the search see it; it
always fits. `jaxsim.policy.chunks` has the rule, and its closed form.
"""

from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxsim.engine import kv_parallel, passes
from jaxsim.engine.common import Group
from jaxsim.spec.dims import Dims
from jaxsim.state.world import Clocks, Counts

STEPS, STEP_BITS = 5, 4
"""Rounds of the search, and bits that each settles."""


class Sized(NamedTuple):
    """Tokens of the candidate's next chunk, and whether there is time for it."""

    tokens: Int[Array, ""]
    has_time: Bool[Array, ""]


def size(dims: Dims, group: Group, counts: Counts, times: Clocks, longest: Int[Array, ""] | None,
         decoding: "kv_parallel.Decoding | None", known: Int[Array, ""], computed: Int[Array, ""],
         target_s: Float[Array, ""] | None = None) -> Sized:
    """Of a prompt of so many known tokens, of which some are computed, in the batch as it is now; target_s: unless it
    has all of the time."""
    rule, batch = group.batching.chunks, counts.batch
    target_s = rule.target_s if target_s is None else target_s
    most = jnp.minimum(known - computed, batch.budget)

    def seconds(tokens: Int[Array, ""]) -> Float[Array, ""]:
        own, pairs = passes.with_chunk(group, batch, times.batch.chunk_pairs, computed, tokens)
        is_last = computed + tokens == known
        own = replace(own, joining=batch.joining + is_last)
        behind = longest
        if longest is not None:
            behind = jnp.where(is_last, jnp.maximum(longest, known - batch.counter - 1), longest)
        shared = None
        if decoding is not None:
            shared = kv_parallel.reads(group.batching.kv_parallel, decoding.first, own.spread_chunks)
        stats, _, _ = passes.statistics(dims, group, replace(counts, batch=own),
                                        replace(times, batch=replace(times.batch, chunk_pairs=pairs)), behind, shared)
        return passes.iteration_seconds(group, stats, shared)

    found = jnp.int32(0)
    for step in reversed(range(STEPS)):
        tried = found + (jnp.arange(1, 1 << STEP_BITS, dtype=jnp.int32) << (step * STEP_BITS))
        fit = (tried <= most) & (jax.vmap(seconds)(tried) <= target_s)
        found = found + (jnp.argmin(jnp.append(fit, False)).astype(jnp.int32) << (step * STEP_BITS))
    least = jnp.minimum(rule.least, most)
    return Sized(jnp.maximum(found, least), (batch.num_chunks == 0) | (found >= least))
