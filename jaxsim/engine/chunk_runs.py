"""Several chunks of one prompt in a step.

While one prompt is computed and nothing else runs, what an iteration does depends on the one before alone: nobody is
admitted before the prompt is done. So a step that starts an iteration with a chunk goes on to its end, and starts the
next one there, as long as it comes before the next arrival, the next chunk has as many tokens as the last or one less
(`chunks.near`), finds blocks and does not complete the prompt; what comes then is a step of its own. It is what
as many steps would do, in the same order: iterations, times, integrals and blocks are the same to the last bit. Which
requests wait does not matter, so arrivals only end a run so that each meets the state of its own time.

Chunks beside decodes, and chunks of a pipeline, whose batches overlap, are a step each; so are all where prompts may be
partly computed side by side, as these are ranked anew for each; where answers bring requests about (sessions, closed
loops) in which several instances meet; with a tape, which has a row for each, or tangents; with control ticks; and on
other backends than CPU, where a loop inside a step waits for the host.
"""

from dataclasses import replace
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from jaxsim.engine import chunks, passes
from jaxsim.engine.common import Context, blocks_for, choose, without_chunks
from jaxsim.engine.events import FREEZE_S
from jaxsim.engine.passes import Plan
from jaxsim.engine.touched import Touched
from jaxsim.kernels import clock
from jaxsim.kernels.clock import Time
from jaxsim.kernels.loops import are_kernels, repeat
from jaxsim.state.world import Clocks, Counts


class Run(NamedTuple):
    """chunks: beyond the first; tokens: of the last; computed, used_blocks: with it; start, first, end: of its
    iteration; busy, running, held: integrals up to its start; is_over: what comes next is for another step."""

    chunks: Int[Array, ""]
    tokens: Int[Array, ""]
    computed: Int[Array, ""]
    used_blocks: Int[Array, ""]
    start: Time
    first: Time
    end: Time
    busy: Time
    running: Time
    held: Time
    is_over: Bool[Array, ""]


def are_possible(context: Context) -> bool:
    """Whether anything of this program has runs: what else may happen between two chunks has to be an arrival."""
    dims, params, _, world, group = context
    return (are_kernels() and group.batching.chunks is not None and dims.max_jump > 1 and dims.num_stages == 1
            and dims.num_ranks == 1 and dims.num_partial == 1 and not dims.num_records and not dims.num_tangents
            and world.until is None
            and not (dims.has_moves or dims.has_clients or dims.has_swap or dims.has_encoder or dims.num_segments
                     or dims.num_tenants)
            and not (params.source.answers and dims.num_executors > 1))


def go_on(context: Context, t: Touched, counts: Counts, times: Clocks, plan: Plan) -> tuple[Counts, Clocks, Plan]:
    """With the chunks that follow at once the one whose iteration was just started."""
    dims, group, batch, rank = context.dims, context.group, counts.batch, counts.rank
    rules, known, own = group.batching, rank.forming_known, times.batch
    # As the end of an iteration and a pass leave it that find nothing but the prompt.
    nothing = {name: jnp.int32(0) for name in ("num_chunks", "chunk_tokens", "chunk_context", "spread_chunks",
                                                 "longest_chunk")
               if getattr(batch, name) is not None}
    fresh = replace(counts, batch=replace(batch, budget=rules.max_num_batched_tokens, **nothing))
    at_rest = replace(times, batch=without_chunks(own))

    def goes_on(run: Run) -> Bool[Array, ""]:
        return (~run.is_over & (run.end < t.event.following) & (run.end.hi < FREEZE_S)
                & (run.chunks < dims.max_jump - 1))

    def formed(run: Run, tokens: Int[Array, ""]):
        return chunks.formed(dims, group, fresh, at_rest, t.longest, t.decoding, known, run.computed, tokens)

    def one_more(run: Run) -> Run:
        most = jnp.minimum(known - run.computed, rules.max_num_batched_tokens)
        least = jnp.minimum(rules.chunks.least, most)
        close = chunks.near(rules.chunks.target_s, lambda tokens: passes.iteration_seconds(group, *formed(run, tokens)),
                            run.tokens, least, most)
        tokens = jnp.maximum(close.most, least)
        computed, used = run.computed + tokens, run.used_blocks
        if rules.reserve == "none":
            used = used + blocks_for(computed, dims) - blocks_for(run.computed, dims)
        first = passes.on_grid(group, formed(run, tokens)[0], close.seconds)
        # The end of the iteration before, as `ending.settle` has it.
        spent_s = run.first.hi
        following = Run(
            run.chunks + 1, tokens, computed, used, run.end, first, clock.add(run.end, first),
            clock.add(run.busy, spent_s), clock.add(run.running, spent_s * rank.running),
            clock.add(run.held, spent_s * (0.5 * (run.used_blocks + run.used_blocks))), jnp.bool_(False))
        is_one = close.is_known & (computed < known) & (used <= rules.num_blocks)
        return choose(is_one, following, run._replace(is_over=jnp.bool_(True)))

    is_alone = ((batch.count == 0) & (batch.joining == 0) & (batch.num_chunks == 1)
                & (rank.forming_slot != dims.null_slot))
    run = repeat(goes_on, one_more, Run(
        jnp.int32(0), batch.chunk_tokens, rank.forming_computed, rank.used_blocks, own.start, own.first, plan.end,
        times.executor.busy, times.rank.running, times.rank.held, ~(t.is_starting & is_alone)), dims.max_jump - 1)
    last, own = passes.with_chunk(group, fresh.batch, at_rest.batch, run.computed - run.tokens, run.tokens)
    ran = Counts(
        replace(counts.executor, num_iterations=counts.executor.num_iterations + run.chunks),
        replace(rank, used_blocks=run.used_blocks, peak_blocks=jnp.maximum(rank.peak_blocks, run.used_blocks),
                forming_computed=run.computed, forming_chunk=run.tokens, next_stamp=rank.next_stamp + run.chunks),
        replace(last, budget=last.budget - run.tokens, counter=batch.counter + run.chunks))
    clocks = replace(
        times, executor=replace(times.executor, busy=run.busy),
        rank=replace(times.rank, running=run.running, held=run.held),
        batch=replace(own, start=run.start, first=run.first))
    is_any = run.chunks > 0
    plan = plan._replace(first_end=clock.select(is_any, run.end, plan.first_end),
                         end=clock.select(is_any, run.end, plan.end))
    return choose(is_any, ran, counts), choose(is_any, clocks, times), plan
