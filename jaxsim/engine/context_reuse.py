"""Contexts that siblings have computed: fine-tunes of one base go on from each other's KV (DroidSpeak).

All instances serve receivers. Before the run siblings have computed every context that prompts share
(`workload.prefix_groups`), and keep its KV and its hidden states behind a link; or they are instances of the same run,
and what they have changes (`jaxsim.engine.siblings`). Of a prompt that is admitted, the prefix cache has the first
blocks; of the context the rest comes from a sibling: KV of most layers over the link, the other layers recomputed, in
the iteration that first schedules the request (`jaxsim.policy.context_reuse`). From then on these blocks are the
receiver's own, and cached as any other.

Several admitted in one iteration share the link, one after the other, and recompute one after the other, each priced as
an iteration of its own. Approximated: recomputed tokens do not count toward the token budget; mixed KV decodes as any
other; siblings that are no instances drop nothing, and the link is the receiver's own, whoever they are.
Source: DroidSpeak (arXiv 2411.02820).
"""

from dataclasses import replace

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from jaxsim.cost.base import BatchStats
from jaxsim.engine import siblings
from jaxsim.engine.common import Context, choose
from jaxsim.engine.passes import Placed, Plan
from jaxsim.engine.prefix import Found
from jaxsim.engine.siblings import Loan, Offer
from jaxsim.engine.writes import Put, Writes
from jaxsim.kernels import clock
from jaxsim.kernels.clock import Time
from jaxsim.spec.dims import Dims
from jaxsim.state.world import Clocks, Counts


def look(dims: Dims, known: Int[Array, ""], found: Found) -> Found:
    """With the blocks that come from a sibling, behind those that the prefix cache has; known: tokens."""
    there = jnp.minimum(found.path.end, (known - 1) >> dims.block_bits)
    return replace(found, loaded=jnp.maximum(there - found.blocks, 0))


def recompute(context: Context, counts: Counts, times: Clocks, placed: Placed, found: Found, now: Time | None = None,
              offer: Offer | None = None) -> tuple[Counts, Clocks, Loan | None]:
    """Some layers of the blocks that come from a sibling, for the prompt that was placed.

    now, offer: where siblings are instances of the run, the instant, and which of them gives.
    """
    dims, reuse = context.dims, context.group.batching.reuse
    loaded = jnp.where(placed.is_admitted, found.loaded, 0)
    end = found.blocks + found.loaded
    one = (loaded > 0).astype(jnp.int32)
    pairs = (end * end - found.blocks * found.blocks).astype(jnp.float32) * (dims.block_size * dims.block_size)
    zero = jnp.int32(0)
    seconds = context.group.cost.iteration(BatchStats(
        zero, zero, one, loaded << dims.block_bits, (one * end) << dims.block_bits, one * pairs, one))
    is_mixed, loan = loaded > 0, None
    if offer is not None:
        is_mixed = is_mixed & ~offer.is_same
        times, loan = siblings.borrow(context, now, times, offer, loaded)
    seconds = clock.on_grid(jnp.where(is_mixed, reuse.recomputed_share * seconds, 0.0))
    held = counts.rank.offload
    rank = replace(counts.rank, offload=replace(held, loaded_blocks=held.loaded_blocks + loaded))
    own = replace(times.rank, recompute=clock.add(times.rank.recompute, seconds))
    return replace(counts, rank=rank), replace(times, rank=own), loan


def begin(context: Context, is_starting: Bool[Array, ""], counts: Counts, times: Clocks, plan: Plan
          ) -> tuple[Clocks, Plan]:
    """The iteration that starts, with what it loads and recomputes."""
    own, reuse = times.rank, context.group.batching.reuse
    nothing = Time(jnp.float32(0), jnp.float32(0))
    if own.borrowing is None:
        first = reuse.lengthened(times.batch.first, counts.batch.loading, own.recompute)
    else:
        given = own.borrowing
        first = clock.add(times.batch.first, reuse.together(given.load, own.recompute))
        first = clock.add(clock.add(first, given.waited), given.entry)
        over = replace(given, waited=nothing, entry=nothing, load=nothing)
        own = replace(own, borrowing=choose(is_starting, over, given))
    times = replace(times, rank=replace(own, recompute=choose(is_starting, nothing, own.recompute)))
    return lengthen(is_starting, first, times, plan)


def lengthen(is_starting: Bool[Array, ""], first: Time, times: Clocks, plan: Plan) -> tuple[Clocks, Plan]:
    """The iteration that starts takes `first`, in place of what it takes by itself."""
    compute = times.batch.first
    delay = clock.add(first, Time(-compute.hi, -compute.lo))
    started = replace(times, batch=replace(times.batch, first=first),
                      rank=replace(times.rank, loads=clock.add(times.rank.loads, delay)))
    plan = plan._replace(first_end=clock.add(plan.first_end, delay), end=clock.add(plan.end, delay))
    return choose(is_starting, started, times), plan


def writes(dims: Dims, found: Found, candidate: Int[Array, ""], is_new: Bool[Array, ""]) -> Writes:
    """Tokens that the candidate loads. is_new: it was admitted for the first time."""
    return {"loaded": Put((jnp.where(is_new, candidate, dims.num_requests),), found.loaded << dims.block_bits)}
