"""Contexts that instances of one run give each other: fine-tunes of one base that go on from each other's KV.

With `cluster.variants` an instance serves one of so many variants. Of a prompt that is admitted, the prefix cache of
its instance has the first blocks; what is right behind them comes from the instance that has the most blocks of the
prompt from its start on: of another variant with some layers recomputed (`jaxsim.engine.context_reuse`), of the same
variant as plain KV. Of several the one of the same variant first, then the lowest number. It gives what it has now and
no more, and nobody waits for more: what it has evicted, or computes only now, is computed once again.

*What an instance has now*: the blocks that its own prefix cache would find, but for those that its iteration in flight
computes or loads, although a request there would hit them: others get these when that iteration has ended, before the
passes of that instant. For this every segment has the blocks that were there before the iteration which last made them
more, and the number of that iteration (`World.fresh`). Asking is not a hit: nothing moves in the order of eviction.
Passes of one instant are in the order of instances, and one sees what the earlier ones have evicted. So it waits, as
arrivals do for routers that know caches (`jaxsim.engine.caches`), for steps that settle evictions of jumps under way.

*Links*: each instance has one out and one in, which carry one context after the other. A context is on both, from where
both are free, in the order of admissions: its hidden states, then its KV, each with the latency of the link. The
iteration that admits loads its contexts one after the other from its start on, and is longer by all times for which
its own link waited for another's (`World.lenders`).

Approximated: waits for links are not hidden behind layers that are recomputed meanwhile; a lender keeps the blocks that
are under way, whatever it evicts; hidden states take no room and are there wherever KV is; contexts that came from a
sibling are given on as any others, and cost nothing more in quality.
Source: DroidSpeak (arXiv 2411.02820), where agents of one base work on shared contexts; which instance gives, and when,
is not published.
"""

from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from jaxsim.engine import prefix
from jaxsim.engine.common import Context, take
from jaxsim.engine.prefix import Evictions, Found, Path
from jaxsim.engine.writes import Put, Writes, at
from jaxsim.kernels import clock
from jaxsim.kernels.clock import Time
from jaxsim.state import world as w
from jaxsim.state.world import Clocks, World


class Offer(NamedTuple):
    """Who gives what a candidate's own instance lacks, and whether it serves the same variant; until when the link out
    of it is busy."""

    lender: Int[Array, ""]
    is_same: Bool[Array, ""]
    busy_until: Time


class Loan(NamedTuple):
    """What a step changes: the lender of the request that was placed (behind all executors: none), and until when the
    link out of it is busy then."""

    lender: Int[Array, ""]
    busy_until: Time


def evictions(context: Context, used: Int[Array, " executors"]) -> Evictions:
    """What a look at the head of each log settles; used: blocks that every executor holds."""
    dims, params, _, world, _ = context
    num_blocks = jnp.broadcast_to(params.of_executors(lambda batching: batching.num_blocks), dims.num_executors)
    caches = w.count_rows(dims).everything(world.counts).rank.cache

    def one(which, cache, free):
        return prefix.evictions(context, which, cache, free, jnp.bool_(True))

    return jax.vmap(one)(jnp.arange(dims.num_executors), jax.tree.map(jnp.ravel, caches), num_blocks - used)


def are_owing(context: Context, used: Int[Array, " executors"], executor: Int[Array, ""]) -> Bool[Array, " executors"]:
    """Which others have more evictions to settle than one look covers."""
    return (evictions(context, used).owed > 0) & (jnp.arange(context.dims.num_executors) != executor)


def look(context: Context, executor: Int[Array, ""], now: Time, used: Int[Array, " executors"], known: Int[Array, ""],
         found: Found, is_asking: Bool[Array, ""]) -> tuple[Found, Offer, Bool[Array, ""]]:
    """With the blocks that another instance gives, behind those that the prefix cache has.

    used: blocks that every executor holds; known: tokens of the candidate; is_asking: whether it may be admitted in
    this step. Returns who gives, too, and whether all evictions elsewhere are settled.
    """
    dims, world, path = context.dims, context.world, found.path
    executors = jnp.arange(dims.num_executors)
    gone = evictions(context, used)
    there = jax.vmap(prefix.reached, (None, 0, None))(
        path, visible(context, now, path, gone), (known - 1) >> dims.block_bits)
    blocks = jnp.where(executors == executor, 0, jnp.sum(there, axis=1))
    are_same = (executors - executor) % context.params.variants == 0
    lender = jnp.argmax(2 * blocks + are_same).astype(jnp.int32)
    is_settled = ~is_asking | ~jnp.any((gone.owed > 0) & (executors != executor))
    offer = Offer(lender, take(are_same, lender), Time(*take(world.lenders, lender)))
    return replace(found, loaded=jnp.maximum(take(blocks, lender) - found.blocks, 0)), offer, is_settled


def visible(context: Context, now: Time, path: Path, gone: Evictions) -> Int[Array, "executors path"]:
    """Blocks of the segments of a path that every executor has, and has computed."""
    dims, world = context.dims, context.world
    counts, times = w.count_rows(dims).everything(world.counts), w.clock_rows(dims).everything(world.clocks).batch
    start, first = (Time(t.hi.ravel(), t.lo.ravel()) for t in (times.start, times.first))
    is_over = (counts.batch.is_committed.ravel() == 1) | (clock.add(start, first) <= now)
    rows = jnp.arange(dims.num_executors)[:, None]
    resident = take(world.resident, rows, path.items[None, :]) - jax.vmap(prefix.gone_of, (None, 0))(path, gone)
    before, iteration = jnp.moveaxis(take(world.fresh, rows, path.items[None, :]), -1, 0)
    is_computing = (iteration == counts.executor.num_iterations[:, None]) & ~is_over[:, None]
    return jnp.where(is_computing, jnp.minimum(resident, before), resident)


def borrow(context: Context, now: Time, times: Clocks, offer: Offer, loaded: Int[Array, ""]) -> tuple[Clocks, Loan]:
    """Blocks that the request which was placed takes on the links; loaded: how many, 0 for none."""
    own, is_any = times.rank.borrowing, loaded > 0
    entry_s, load_s = context.group.batching.reuse.transfer(loaded, offer.is_same)
    entry, load = clock.add(own.entry, entry_s), clock.add(own.load, load_s)
    free = clock.add(clock.add(clock.add(now, own.waited), own.entry), own.load)
    wait = clock.add(offer.busy_until, Time(-free.hi, -free.lo))
    nothing = Time(jnp.float32(0), jnp.float32(0))
    wait = clock.select(is_any & (free < offer.busy_until), wait, nothing)
    end = clock.add(clock.add(clock.add(free, wait), entry_s), load_s)
    own = replace(own, waited=clock.add(own.waited, wait), entry=entry, load=load,
                  linked=clock.add(clock.add(own.linked, entry_s), load_s))
    lender = jnp.where(is_any, offer.lender, context.dims.num_executors)
    return replace(times, rank=replace(times.rank, borrowing=own)), Loan(lender, end)


def writes(context: Context, which: Int[Array, ""], found: Found, loan: Loan, candidate: Int[Array, ""],
           is_placed: Bool[Array, ""], is_new: Bool[Array, ""], computed: Int[Array, ""], iteration: Int[Array, ""]
           ) -> Writes:
    """What a step changes; computed: the candidate's tokens once what was placed of it is, by that iteration of its
    executor; is_new: it was admitted for the first time."""
    dims, path = context.dims, found.path
    filled = jnp.clip((computed >> dims.block_bits) - path.begins, 0, path.lengths)
    grows = is_placed & (filled > found.resident)
    before, last = take(context.world.fresh, which, path.items).T
    before = jnp.where(last == iteration, before, found.resident)
    items = jnp.where(grows, path.items, dims.num_segments)
    lender = jnp.where(loan.lender < dims.num_executors, loan.lender, -1)
    number = jnp.broadcast_to(iteration, before.shape)
    return {
        "fresh": Put(at(dims, "fresh", which, items), jnp.stack([before, number], axis=1)),
        "lenders": Put((loan.lender,), jnp.stack(loan.busy_until)),
        "loaded_from": Put((jnp.where(is_new, candidate, dims.num_requests),), lender)}


def shifted(world: World, back) -> World:
    """Relative to another epoch; what is long over stays so."""
    ends = Time(world.lenders[:, 0], world.lenders[:, 1])
    ends = clock.shift(ends, jnp.broadcast_to(back, ends.hi.shape))
    return replace(world, lenders=jnp.where((ends.hi < 0)[:, None], 0.0, jnp.stack(ends, axis=-1)))
