"""KV-cache parallelism: what the busiest group of devices reads in an iteration, and how that goes on.

Decodes of contexts of at most `tokens` lie on one group each. So much is approximated: they are taken to be dealt out
evenly, so the busiest group has their sum over the groups, or the longest of them if that is more. Of longer contexts
every group has a shard, the first the largest (`jaxsim.policy.kv_parallel`). Together, with K groups of T tokens,

    busiest = max(longest, sum / K) of contexts up to T  +  T each of those up to K T  +  sum / K of longer ones

which the cost model is given as the context that decodes read. It is affine in the iteration until a context passes T
or K T, or the longest of the short ones is no longer the most, where a jump ends. Which sequence is where takes a look
at all slots of a batch. A chunk's queries meet the shards alike (`KvParallel.pairs`).

Also approximated: linear layers, and the host's part, are priced as if one group ran them for all sequences, where
others could run those of their own; the memory of all groups is one pool; what a merge takes is not hidden behind
launches.
"""

from typing import TYPE_CHECKING, NamedTuple

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxsim.cost.base import UNBOUNDED, BatchStats, DecodePace
from jaxsim.engine.common import Context, Group, take
from jaxsim.kernels import packed
from jaxsim.kernels.loops import where_needed
from jaxsim.policy.kv_parallel import KvParallel
from jaxsim.spec.dims import Dims
from jaxsim.state import world as w
from jaxsim.state.world import Batch, Shards

if TYPE_CHECKING:
    from jaxsim.engine.touched import Touched


class Reads(NamedTuple):
    """What the busiest group reads: context tokens of decodes, and tokens whose partial outputs are merged."""

    context: Float[Array, ""]
    spread: Int[Array, ""]


class Decoding(eqx.Module):
    """Who decodes in the iteration that is formed, and behind it (the prompt that this step places not among them)."""

    first: Shards
    following: Shards


def shards(rule: KvParallel, contexts: Int[Array, " slots"], are_in: Bool[Array, " slots"]) -> Shards:
    """Of decodes that read so many tokens each."""
    is_local, is_whole = contexts <= rule.tokens, contexts > rule.tokens * rule.groups

    def total(which: Bool[Array, " slots"], values: Int[Array, " slots"] | int = 1) -> Int[Array, ""]:
        return jnp.sum(jnp.where(are_in & which, values, 0))

    edge = jnp.where(is_whole, UNBOUNDED, jnp.where(is_local, 1, rule.groups) * rule.tokens - contexts + 1)
    return Shards(
        local=total(is_local), local_tokens=total(is_local, contexts),
        longest=jnp.max(jnp.where(are_in & is_local, contexts, 0)), filling=total(~is_local & ~is_whole),
        whole=total(is_whole), whole_tokens=total(is_whole, contexts),
        edge=jnp.min(jnp.where(are_in, edge, UNBOUNDED)))


def with_one(rule: KvParallel, many: Shards, context: Int[Array, ""], is_there: Bool[Array, ""]) -> Shards:
    """With another sequence, where it is there."""
    one = shards(rule, context[None], is_there[None])
    return Shards(many.local + one.local, many.local_tokens + one.local_tokens, jnp.maximum(many.longest, one.longest),
                  many.filling + one.filling, many.whole + one.whole, many.whole_tokens + one.whole_tokens,
                  jnp.minimum(many.edge, one.edge))


def look(context: Context, t: "Touched", batch: Batch, keys: Int[Array, " slot_width"], retired: Int[Array, ""]
         ) -> Decoding:
    """At all slots of a batch. Those whose prompt this pass completes do not decode in the iteration it forms."""
    rule = context.group.batching.kv_parallel
    are_in = (keys != packed.EMPTY) & (jnp.arange(context.dims.slot_width) != retired)
    offsets = take(context.world.slot_entries, t.rank)[:, w.OFFSET]
    nobody = Shards(*(jnp.int32(0),) * 6, jnp.int32(UNBOUNDED))
    now, following = where_needed(
        batch.count + batch.joining > 0,
        lambda: tuple(shards(rule, offsets + batch.counter + ahead, are_in) for ahead in (1, 2)), (nobody, nobody))
    first = Shards(*(jnp.where(batch.joining == 0, a, b) for a, b in zip(now, batch.shards, strict=True)))
    return Decoding(first, following)


def reads(rule: KvParallel, decoding: Shards, spread_chunks: Int[Array, ""]) -> Reads:
    """Of an iteration of these decodes, and chunks of so many tokens of contexts in several groups."""
    local = jnp.maximum(rule.groups * decoding.longest, decoding.local_tokens)
    context = ((decoding.whole_tokens + local).astype(jnp.float32) / rule.groups
               + (decoding.filling * rule.tokens).astype(jnp.float32))
    return Reads(context, decoding.filling + decoding.whole + spread_chunks)


def paced(rule: KvParallel, pace: DecodePace, decoding: Shards, followers: Int[Array, ""]) -> DecodePace:
    """A pace of the cost model, which takes every sequence to add a token to what is read, as it is for shards."""
    ahead, more = rule.groups * decoding.longest - decoding.local_tokens, decoding.local - rule.groups
    is_longest = ahead >= 0
    # Of the short ones the longest grows by a token, the mean by their number over the groups.
    grown = decoding.whole + jnp.where(is_longest, jnp.minimum(decoding.local, 1) * rule.groups, decoding.local)
    growth_s = pace.growth_s * (grown.astype(jnp.float32) / rule.groups) / jnp.maximum(followers, 1)
    changes = jnp.where(is_longest, more > 0, more < 0)
    until = jnp.abs(ahead) // jnp.maximum(jnp.abs(more), 1) + 1
    horizon = jnp.minimum(decoding.edge, jnp.where(changes, until, UNBOUNDED))
    merge_s = rule.merge_seconds(decoding.filling + decoding.whole)
    return DecodePace(pace.first_s + merge_s, growth_s, jnp.minimum(pace.horizon, horizon))


def stage_parts(dims: Dims, group: Group, stats: BatchStats, reads: Reads) -> Float[Array, " stages+1"]:
    """How long an iteration holds the engine and each stage: merges are in equal parts in the layers of all."""
    each = group.batching.kv_parallel.merge_seconds(reads.spread) / dims.num_stages
    parts = group.cost.stage_seconds(stats, dims.num_stages)
    return parts + jnp.where(jnp.arange(dims.num_stages + 1) == 0, 0.0, each)
