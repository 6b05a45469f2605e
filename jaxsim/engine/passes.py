"""A scheduling pass: decodes take their blocks, prompts are placed, victims go, an iteration starts."""

from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxsim.cost.base import BatchStats, DecodePace
from jaxsim.engine import free_stages, gathering, kv_parallel, partial_prefills, pipeline
from jaxsim.engine.common import MAX_SPAN_S, Group, blocks_for, choose, has, mark, span
from jaxsim.engine.events import Event
from jaxsim.engine.prefix import Found, Release, admit
from jaxsim.engine.slots import Slots
from jaxsim.kernels import clock, packed, queues, residues
from jaxsim.kernels.clock import Time
from jaxsim.policy.batching import Batching
from jaxsim.spec.dims import Dims
from jaxsim.state import world as w
from jaxsim.state.requests import MAX_TOKENS, OUTPUT, PLACE, PROMPT
from jaxsim.state.world import Batch, BatchTimes, Clocks, Counts, Rank

if TYPE_CHECKING:
    from jaxsim.engine.chunks import Sized
    from jaxsim.engine.swapping import Turn


class Placed(NamedTuple):
    """The prompt placed in this step, if any: a new admission, or the forming prompt's next chunk."""

    is_admitted: Bool[Array, ""]
    is_completing: Bool[Array, ""]
    is_first_token: Bool[Array, ""]
    request: Int[Array, ""]
    slot: Int[Array, ""]
    key: Int[Array, ""]
    entry: Int[Array, " entry_fields"]


class Plan(NamedTuple):
    """The iteration (or jump) started in this step, if any."""

    is_any: Bool[Array, ""]
    first_end: Time
    end: Time
    num_decode: Int[Array, ""]


def begin_pass(group: Group, is_passing: Bool[Array, ""], counts: Counts) -> Counts:
    """Fresh token budget and progress flags, unless a pass is already under way."""
    batch, rank = counts.batch, counts.rank
    is_fresh = is_passing & (rank.progress == 0)
    decodes = batch.count if group.batching.is_unified else 0
    was_empty = jnp.where(rank.running == 0, w.WAS_EMPTY, 0)
    if group.batching.async_scheduling:
        is_blind = is_fresh & (rank.running == 0) & (rank.visible == 0)
        if rank.ready is not None:
            is_blind = is_blind & (rank.visible_ready == 0)
            rank = replace(rank, visible_ready=jnp.where(is_blind, rank.ready.length, rank.visible_ready))
        rank = replace(rank, visible=jnp.where(is_blind, rank.waiting, rank.visible))
    if group.batching.walks:
        rank = replace(rank, cursor=jnp.where(is_fresh, -1, rank.cursor))
    counts = Counts(
        counts.executor, replace(rank, progress=jnp.where(is_fresh, w.PASS | was_empty, rank.progress)),
        replace(batch, budget=jnp.where(is_fresh, group.batching.max_num_batched_tokens - decodes, batch.budget)))
    return gathering.begin(group, is_fresh, counts) if group.batching.gathers else counts


def ready_seen(rules: Batching, rank: Rank) -> Int[Array, ""]:
    """How many of those whose KV is here a pass may see."""
    return rank.visible_ready if rules.async_scheduling else rank.ready.length


def is_somebody_hidden(counts: Counts) -> Bool[Array, ""]:
    """Under asynchronous scheduling: whether somebody is here whom the pass does not see."""
    rank = counts.rank
    is_hidden = rank.visible < rank.waiting
    return is_hidden if rank.ready is None else is_hidden | (rank.visible_ready < rank.ready.length)


def seeing_all(condition: Bool[Array, ""], counts: Counts, *, begins_anew: bool = False) -> Counts:
    """The pass sees everybody; begins_anew: the next one does, as one that begins blind and with nobody running."""
    rank = counts.rank
    visible = 0 if begins_anew else rank.waiting
    rank = replace(rank, visible=jnp.where(condition, visible, rank.visible))
    if rank.ready is not None:
        ready = 0 if begins_anew else rank.ready.length
        rank = replace(rank, visible_ready=jnp.where(condition, ready, rank.visible_ready))
    return replace(counts, rank=rank)


def decode_need(dims: Dims, group: Group, counts: Counts, residue_row: Int[Array, " block_size"],
                tail_offset: Int[Array, ""], sized: "Sized | None" = None
                ) -> tuple[Int[Array, ""], Int[Array, ""], Int[Array, ""]]:
    """Blocks the decodes of this pass take, blocks that must be free for them to go ahead, and those that the forming
    prompt's next chunk takes beside them; sized: that chunk, where time limits it."""
    rank, batch = counts.rank, counts.batch
    crossing = residues.crossing_at(residue_row, batch.counter)
    if group.batching.decode_needs_free_block == "always":
        tail_crosses = ((tail_offset + batch.counter) & (dims.block_size - 1)) == 0
        need = jnp.where(batch.count > 0, crossing - tail_crosses + 1, 0)
    else:
        need = crossing
    grown = jnp.int32(0)
    if group.batching.reserve == "none" and group.batching.chunked_prefill and group.batching.is_unified:
        chunk = jnp.minimum(rank.forming_known - rank.forming_computed, batch.budget)
        if sized is not None:
            chunk = jnp.minimum(chunk, sized.tokens)
        grown = blocks_for(rank.forming_computed + chunk, dims) - blocks_for(rank.forming_computed, dims)
        grown = jnp.where(rank.forming_slot != dims.null_slot, grown, 0)
    return crossing, need, grown


def place(dims: Dims, group: Group, is_open: Bool[Array, ""], counts: Counts, times: Clocks,
          residue_row: Int[Array, " block_size"], lengths: Int[Array, " 4"], emitted: Int[Array, ""],
          request: Int[Array, ""], following: Int[Array, ""], free_slot: Int[Array, ""], slots: Slots | None,
          found: Found | None, is_ready: Bool[Array, ""] | None, ready_stamp: Int[Array, ""] | None = None,
          turn: "Turn | None" = None, sized: "Sized | None" = None
          ) -> tuple[Counts, Clocks, Int[Array, " block_size"], Placed, Bool[Array, ""], Bool[Array, ""]]:
    """Give the forming prompt its chunk, or admit the head of the queue if it fits.

    is_open: whether this step may place anything. lengths: the candidate's (prompt, output, max_tokens, place);
    emitted: its output tokens so far; following: the request behind it in the queue; found: what it has in the prefix
    cache, if there is one; is_ready: with roles, whether the candidate is the first of those whose KV is here;
    ready_stamp: its place, where it got one with its KV; turn: what host memory has of it; sized: its next chunk, where
    time limits that. Returns counts, times,
    residues, what was placed, whether the queue's head is blocked by something that only an event can lift, and
    whether more may be placed at this instant. Where prompts wait for each other, the candidate may only be counted.
    """
    rules = group.batching
    rank, batch = counts.rank, counts.batch
    budget, running, used = batch.budget, rank.running, rank.used_blocks
    seen = rank.visible if rules.async_scheduling else rank.waiting
    if rules.gathers:
        others = gathering.gathered(rank)
        budget, running, used = budget - others.tokens, running + others.requests, used + others.blocks
        seen = seen - others.requests
    prompt, output, max_tokens = lengths[PROMPT], lengths[OUTPUT], lengths[MAX_TOKENS]
    known = prompt + emitted
    null = jnp.int32(dims.null_slot)
    is_forming = jnp.bool_(False)
    if rules.chunked_prefill:
        is_forming = (rank.forming_slot != null) & ~has(counts, w.FORMED)
    cached = 0 if found is None else found.blocks << dims.block_bits
    if found is not None and found.loaded is not None:
        cached = cached + (found.loaded << dims.block_bits)
    computed = jnp.where(is_forming, rank.forming_computed, cached)
    if is_ready is not None:
        # It joins as a decode: of its tokens only the last is to be computed.
        computed, seen = jnp.where(is_ready, known - 1, computed), jnp.where(is_ready, 1, seen)
    if turn is not None:
        computed, seen = turn.tokens, jnp.where(turn.is_here, 1, seen)
    rest = known - computed
    chunk = jnp.minimum(rest, batch.budget) if rules.chunked_prefill else rest
    if rules.walks:
        chunk = jnp.where(is_forming & has(counts, w.CHUNKED), rank.forming_chunk, chunk)
    if sized is not None:
        chunk = jnp.minimum(chunk, sized.tokens)
    reserved = {
        "none": blocks_for(chunk, dims), "prompt": blocks_for(known, dims),
        "expected": blocks_for(known, dims), "max_tokens": blocks_for(prompt + max_tokens, dims),
        "max_model_len": blocks_for(rules.max_model_len, dims)}[rules.reserve]
    if rank.swap is not None:
        # Who is on the way in has a place too.
        running = running + rank.swap.coming
    if not rules.kv_accounting:
        reserved = jnp.int32(0)
    if found is not None:
        reserved = reserved + found.revived
        if found.loaded is not None:
            reserved = reserved + found.loaded
    watermark = rules.watermark_blocks
    if turn is not None:
        # Its blocks are here, and its place.
        reserved = jnp.where(turn.is_here, 0, reserved)
    if is_ready is not None:
        lacking = blocks_for(known, dims) - blocks_for(computed, dims) if rules.kv_accounting else jnp.int32(0)
        must = jnp.maximum(lacking, 1) if rules.decode_needs_free_block == "always" else lacking
        reserved, watermark = jnp.where(is_ready, must, reserved), jnp.where(is_ready, 0, watermark)
    grown = reserved
    if is_ready is not None:
        grown = jnp.where(is_ready, lacking, grown)
    if rules.chunked_prefill:
        more = 0
        if rules.reserve == "none" and rules.kv_accounting:
            more = blocks_for(computed + chunk, dims) - blocks_for(computed, dims)
        grown = jnp.where(is_forming, more, grown)

    has_budget = (budget > 0) if rules.chunked_prefill else (rest <= budget)
    if is_ready is not None and not rules.is_unified:
        has_budget = has_budget | is_ready
    has_slot = running < rules.max_num_seqs
    has_room = jnp.bool_(True)
    if rules.max_batch_seqs is not None:
        has_room = batch.count + batch.num_chunks < rules.max_batch_seqs
    has_blocks = jnp.bool_(True)
    if rules.kv_accounting:
        has_blocks = rules.num_blocks - used - reserved >= watermark
    if turn is not None:
        has_slot, has_blocks = has_slot | turn.is_here, has_blocks | turn.is_here
    if rules.reserve == "expected":
        own = (reserved << dims.block_bits) + jnp.minimum(max_tokens - emitted, rules.reserve_clip_tokens)
        free_tokens = ((rules.num_blocks - rank.used_blocks) << dims.block_bits).astype(jnp.float32)
        others = slots.expected_tokens(dims, rules, counts, times.rank.ratio)
        has_blocks = has_blocks & (own.astype(jnp.float32) < free_tokens - others)
    if sized is not None:
        has_budget = has_budget & sized.has_time
    if rules.partial is not None:
        has_room = has_room & (partial_prefills.has_row(rank, dims.null_slot) | is_forming | (chunk == rest))
    is_closed = has(counts, w.CLOSED)
    if is_ready is not None and rules.waiting_blocked_after_preempt:
        is_closed = is_closed | (has(counts, w.PREEMPTED) & ~is_ready)
    if rules.admit == "when_empty":
        is_closed = is_closed | ~has(counts, w.WAS_EMPTY)
    is_head_tried = is_open & ~is_forming & (seen > 0) & ~is_closed
    fits = is_admitted = is_head_tried & has_budget & has_slot & has_blocks & has_room
    if rules.gathers:
        is_admitted = fits & has(counts, w.RELEASED)
    is_forming = is_open & is_forming & has_room
    if rules.partial is not None:
        is_forming = is_forming & has_budget
    is_placed = is_admitted | is_forming
    # What keeps the head waiting until a sequence leaves, rather than only for this iteration.
    is_held = ~has_slot | ~has_blocks
    if rules.reserve == "expected":
        is_held = jnp.bool_(False)
    if found is not None:
        # What is cached of the head may be evicted while it waits, and its first chunk then need fewer blocks.
        is_held = ~has_slot | (found.least > rules.num_blocks - rank.used_blocks)
    if sized is not None and rules.reserve == "none":
        # While decodes grow, a chunk that fits the time gets shorter and needs fewer blocks.
        least = blocks_for(jnp.minimum(rest, rules.chunks.least), dims)
        is_held = ~has_slot | (rules.num_blocks - used - least < watermark)
    if rules.admit == "when_empty":
        is_held = jnp.bool_(True)
    if rules.partial is not None:
        # Who is first changes with time.
        is_held = jnp.bool_(False)

    is_completing = is_placed & (computed + chunk == known)
    is_partial = is_placed & ~is_completing
    slot = jnp.where(is_forming, rank.forming_slot, jnp.where(is_admitted, free_slot, null))
    # The first iteration advances the token clock in a unified batch; beside a prompt-only one, decodes wait.
    after_first = batch.counter + (1 if rules.is_unified else 0)
    if is_ready is not None and not rules.is_unified:
        after_first = after_first + is_ready
    offset = known - after_first
    is_first_token = is_completing & (emitted == 0)
    one = is_completing.astype(jnp.int32)
    tokens = jnp.where(is_placed, chunk, 0)
    budget_taken, all_in = tokens, one
    if is_ready is not None:
        # Who comes with its KV decodes in this very iteration.
        entering = (is_admitted & is_ready).astype(jnp.int32)
        tokens, one = jnp.where(entering, 0, tokens), one - entering
        if not rules.is_unified:
            budget_taken = tokens
    batch, own = with_chunk(group, batch, times.batch, computed, tokens)
    batch = replace(
        batch, budget=batch.budget - budget_taken, joining=batch.joining + one,
        joining_offsets=batch.joining_offsets + one * offset,
        joining_first=batch.joining_first + is_first_token)
    if is_ready is not None:
        batch = replace(batch, count=batch.count + entering, offsets=batch.offsets + entering * offset,
                        entering=batch.entering + entering)
    times = replace(times, batch=own)
    is_in = is_admitted.astype(jnp.int32)
    used = rank.used_blocks + jnp.where(is_placed, grown, 0)
    is_from_queue = is_admitted
    if is_ready is not None:
        is_from_queue = is_admitted & ~is_ready
        rank = replace(rank, ready=queues.pop_front(rank.ready, following, is_admitted & is_ready))
        if dims.has_roles:
            here = known - 1 if dims.has_failures else prompt
            own_blocks = blocks_for(here, dims) if rules.kv_accounting else 0
            rank = replace(rank, held_blocks=rank.held_blocks - entering * own_blocks)
    if turn is not None:
        is_from_queue = is_admitted & ~turn.is_here
    queue = queues.pop_front(rank.queue, following, is_from_queue)
    if rules.partial is not None:
        # Who waits is in line (`partial_prefills`), and leaves from anywhere: here only their number is kept.
        queue = rank.queue._replace(length=rank.queue.length - is_from_queue)
    rank = replace(
        rank, queue=queue, running=rank.running + is_in, used_blocks=used,
        peak_blocks=jnp.maximum(rank.peak_blocks, used), next_stamp=rank.next_stamp + is_placed)
    if found is not None:
        rank = admit(rank, found, is_admitted)
    if batch.loading is not None:
        batch = replace(batch, loading=batch.loading + jnp.where(is_admitted, found.loaded, 0))
    if batch.fetching is not None:
        batch = replace(batch, fetching=batch.fetching + jnp.where(is_admitted, found.fetched, 0))
    if rules.async_scheduling:
        rank = replace(rank, visible=rank.visible - is_from_queue)
        if is_ready is not None:
            rank = replace(rank, visible_ready=rank.visible_ready - entering)
    if rules.chunked_prefill:
        rank = replace(
            rank, forming_slot=jnp.where(is_partial, slot, jnp.where(is_completing, null, rank.forming_slot)),
            forming_request=jnp.where(is_partial, request, rank.forming_request),
            forming_computed=jnp.where(is_partial, computed + tokens, rank.forming_computed),
            forming_known=jnp.where(is_partial, known, rank.forming_known))
    if sized is not None:
        rank = replace(rank, forming_chunk=jnp.where(is_placed, chunk, rank.forming_chunk))
    if rules.grows:
        residue_row = residue_row + all_in * (jnp.arange(dims.block_size) == (offset & (dims.block_size - 1)))
    counts = Counts(counts.executor, rank, batch)
    counts = mark(counts, is_forming, w.FORMED)
    counts = mark(counts, is_placed & (tokens > 0), w.FILLED)
    left = (rank.visible if rules.async_scheduling else rank.waiting) > 0
    if is_ready is not None:
        left = left | (ready_seen(rules, rank) > 0)
    can_go_on = is_placed & left & (batch.budget > 0) & (rank.running < rules.max_num_seqs) & ~is_closed
    if rules.max_batch_seqs is not None:
        can_go_on = can_go_on & (batch.count + batch.num_chunks < rules.max_batch_seqs)
    if is_ready is not None and rules.has_context_limit:
        # The batch is made of who is in a slot.
        can_go_on = can_go_on | (is_placed & is_ready)
    if sized is not None:
        # One partly computed prompt at a time.
        can_go_on = can_go_on & ~is_partial
    if turn is not None:
        # Others may be called, or here.
        can_go_on = can_go_on | (is_placed & turn.is_here & (batch.budget > 0))
    if rules.gathers:
        is_counted = fits & ~is_admitted
        counts, are_enough = gathering.settle(group, counts, is_counted, is_admitted, request, rest, reserved)
        more_fit = (seen > 1) & (budget > rest) & (running + 1 < rules.max_num_seqs)
        can_go_on = can_go_on | are_enough | (is_counted & more_fit)
    key = packed.pack_key(after_first + (output - emitted - 1), slot, dims.slot_bits)
    entry = [request, offset, max_tokens if rules.reserve == "expected" else reserved]
    if rules.stamps_slots or dims.has_moves:
        stamp = counts.executor.num_iterations if rules.reserve == "expected" else rank.next_stamp
        if ready_stamp is not None:
            stamp = jnp.where(is_ready, ready_stamp, stamp)
        entry += [lengths[PLACE] if rules.sorts else prompt, stamp]
    placed = Placed(is_admitted, is_completing, is_first_token, request, slot, key, jnp.stack(entry))
    is_held = (rank.running >= rules.max_num_seqs) | (is_head_tried & ~fits & is_held)
    if rules.gathers:
        is_held = is_held & (gathering.gathered(counts.rank).requests == 0)
    return counts, times, residue_row, placed, is_held, can_go_on


def with_chunk(group: Group, batch: Batch, own: BatchTimes, computed: Int[Array, ""], tokens: Int[Array, ""]
               ) -> tuple[Batch, BatchTimes]:
    """A batch with one chunk more, of some tokens behind those computed; of none it is as it was."""
    rule, end, is_any = group.batching.kv_parallel, computed + tokens, tokens > 0
    if rule is None:
        low, high = computed.astype(jnp.float32), end.astype(jnp.float32)
        keys, pairs = end, jnp.where(is_any, (high - low) * (high + low), 0.0)
    else:
        keys, pairs = rule.shard(end), rule.pairs(computed, end)
        batch = replace(batch, spread_chunks=batch.spread_chunks + jnp.where(end > rule.tokens, tokens, 0))
    keys = jnp.where(is_any, keys, 0)
    batch = replace(batch, num_chunks=batch.num_chunks + is_any, chunk_tokens=batch.chunk_tokens + tokens,
                    chunk_context=batch.chunk_context + keys)
    own = replace(own, chunk_pairs=own.chunk_pairs + pairs)
    if own.chunk_tiled is not None and (tile := group.cost.tile_tokens) is not None:
        new = tokens.astype(jnp.float32)
        in_tiles = pairs * (jnp.ceil(new / tile) * tile / jnp.maximum(new, 1.0))
        own = replace(own, chunk_tiled=own.chunk_tiled + in_tiles)
        batch = replace(batch, longest_chunk=jnp.maximum(batch.longest_chunk, keys))
    return batch, own


def iteration_seconds(group: Group, stats: BatchStats, reads: "kv_parallel.Reads | None") -> Float[Array, ""]:
    """Seconds of an iteration; reads: with KV-cache parallelism, what the busiest group does."""
    seconds = group.cost.iteration(stats)
    return seconds if reads is None else seconds + group.batching.kv_parallel.merge_seconds(reads.spread)


def on_grid(group: Group, stats: BatchStats, seconds: Float[Array, ""]) -> Time:
    """Seconds of an iteration as an exact pair, with what float32 left of them."""
    return Time(clock.on_grid(seconds), clock.on_grid(
        group.cost.iteration_remainder(stats, seconds) + (seconds - clock.on_grid(seconds))))


def statistics(dims: Dims, group: Group, counts: Counts, times: Clocks, longest: Int[Array, ""] | None = None,
               reads: "kv_parallel.Reads | None" = None) -> tuple[BatchStats, Int[Array, ""], Int[Array, ""]]:
    """What the iteration that was formed does; then the sequences that decode behind it, and their context.

    longest: the largest offset among the sequences, where the cost reads it. reads: with KV-cache parallelism, what the
    busiest group reads in place of all contexts. Approximated: beside decodes a prompt that
    completes counts among these from this iteration on.
    """
    rules, batch = group.batching, counts.batch
    is_prompt_only = jnp.bool_(False) if rules.is_unified else has(counts, w.FILLED)
    decodes = jnp.where(is_prompt_only, 0, batch.count - batch.stalled)
    stats = BatchStats(
        decodes, jnp.where(is_prompt_only, 0, batch.offsets - batch.stalled_offsets
                           + decodes * (batch.counter + 1)),
        batch.num_chunks, batch.chunk_tokens, batch.chunk_context, times.batch.chunk_pairs, decodes + batch.joining,
        **({} if group.cost.tile_tokens is None else
           dict(prefill_tiled=times.batch.chunk_tiled, prefill_longest=batch.longest_chunk)))
    if rules.prefix_caching:
        stats = replace(stats, decode_shared=shared_tokens(dims, counts, stats.decode_context))
    if longest is not None:
        at_most = jnp.maximum(longest + batch.counter + 1, 0)
        stats = replace(stats, longest_context=jnp.where(decodes > 0, at_most, 0))
    if reads is not None:
        stats = replace(stats, decode_context=reads.context)
        if longest is not None:
            stats = replace(stats, longest_context=rules.kv_parallel.shard(stats.longest_context))
    after_first = batch.counter + jnp.where(is_prompt_only, 0, 1)
    followers = batch.count + batch.joining
    return stats, followers, batch.offsets + batch.joining_offsets + followers * (after_first + 1)


def last_of_jump(counts: Counts) -> BatchStats:
    """The last iteration of the jump in flight, at the mean context."""
    batch = counts.batch
    decodes = batch.count + batch.joining
    context = batch.offsets + batch.joining_offsets + decodes * (batch.counter + batch.advance + batch.extra)
    longest = (context + decodes - 1) // jnp.maximum(decodes, 1)
    return BatchStats.of(decodes, context, longest_context=longest)


def price(dims: Dims, group: Group, counts: Counts, times: Clocks, longest: Int[Array, ""] | None,
          decoding: "kv_parallel.Decoding | None" = None) -> tuple[Float[Array, ""], DecodePace]:
    """Seconds of the iteration that was formed, and the pace of the decode iterations that can follow it; decoding:
    with KV-cache parallelism, who does, the one just placed among those that follow."""
    if decoding is not None:
        rule = group.batching.kv_parallel
        reads = kv_parallel.reads(rule, decoding.first, counts.batch.spread_chunks)
        stats, followers, _ = statistics(dims, group, counts, times, longest, reads)
        then = kv_parallel.reads(rule, decoding.following, jnp.int32(0))
        after = 0 if longest is None else rule.shard(jnp.maximum(longest + counts.batch.counter + 1, 0) + 1)
        pace = group.cost.decode(followers, then.context, 0, after)
        return iteration_seconds(group, stats, reads), kv_parallel.paced(rule, pace, decoding.following, followers)
    stats, followers, context = statistics(dims, group, counts, times, longest)
    shared = shared_tokens(dims, counts, context) if group.batching.prefix_caching else 0
    # One more than in the first iteration, if that moved the clock; where it did not, a token is nothing.
    after = 0 if longest is None else jnp.maximum(longest + counts.batch.counter + 1, 0) + 1
    return group.cost.iteration(stats), group.cost.decode(followers, context, shared, after)


def shared_tokens(dims: Dims, counts: Counts, context: Int[Array, ""]) -> Int[Array, ""]:
    """Of the context that decodes read, tokens of blocks that others hold too; prompts under way count as others."""
    return jnp.minimum(counts.rank.cache.shared * dims.block_size, context)


def start(dims: Dims, group: Group, is_starting: Bool[Array, ""], event: Event, counts: Counts, times: Clocks,
          residue_row: Int[Array, " block_size"], next_key: Int[Array, ""], is_held: Bool[Array, ""],
          first_s: Float[Array, ""], pace: DecodePace, is_alone: Bool[Array, ""] | bool = True,
          most_extra: Int[Array, ""] | None = None, reads: "kv_parallel.Reads | None" = None
          ) -> tuple[Counts, Clocks, Plan]:
    """Start the iteration that was formed, and the decode iterations that can follow it undisturbed.

    next_key: smallest completion key of the batch, the joining sequences included. is_held: the queue's head,
    if any, can join only after an event. first_s, pace: from `price`. is_alone: no other batch is in flight.
    most_extra: of these, if the queue's head waits. reads: as in `statistics`.
    """
    rules = group.batching
    rank, batch = counts.rank, counts.batch
    is_prompt_only = jnp.bool_(False) if rules.is_unified else has(counts, w.FILLED)
    advance = jnp.where(is_prompt_only, 0, 1)
    after_first = batch.counter + advance
    followers = batch.count + batch.joining
    to_completion = packed.unpack_key(next_key, dims.slot_bits)[0] - after_first
    extra = jnp.minimum(jnp.minimum(to_completion, pace.horizon), dims.max_jump - 1)
    if rules.grows:
        room = rules.num_blocks - rank.used_blocks
        if rules.decode_needs_free_block == "always":
            room = room - 1
        extra = jnp.minimum(extra, residues.times_that_fit(residue_row, followers, after_first, room))
    slowest_s = jnp.maximum(pace.first_s + pace.growth_s * extra.astype(jnp.float32), 1e-9)
    extra = jnp.minimum(extra, jnp.minimum(MAX_SPAN_S / slowest_s, 1e9).astype(jnp.int32))
    has_others = rank.waiting > 0
    if rank.swap is not None:
        has_others = has_others | (rank.swap.out > 0)
    if dims.has_moves:
        has_others = has_others | (rank.ready.length > 0)
        # Who is ready and was not seen goes first when it is, whoever is held now.
        is_held = is_held & ((rank.ready.length == 0) | (ready_seen(rules, rank) > 0))
    may_follow = (followers > 0) & (~has_others | is_held) & (batch.stalled == 0) & is_alone
    if most_extra is not None:
        extra = jnp.where(has_others, jnp.minimum(extra, most_extra), extra)
    if rules.has_context_limit:
        room = rules.decode_context_limit - (batch.offsets + batch.joining_offsets + followers * after_first)
        extra = jnp.minimum(extra, jnp.floor(room / jnp.maximum(followers, 1)).astype(jnp.int32))
    if rules.chunked_prefill:
        may_follow = may_follow & (rank.forming_slot == dims.null_slot)
    extra = jnp.where(may_follow, jnp.maximum(extra, 0), 0)
    # What float32 left of the prices, now that they are stored values.
    stats, followers, context = statistics(dims, group, counts, times, reads=reads)
    first = on_grid(group, stats, first_s)
    run = Time(pace.first_s, group.cost.decode_remainder(followers, context, pace.first_s))
    executor = times.executor
    if dims.num_stages > 1:
        parts = free_stages.stage_parts(dims, group, stats) if dims.has_free_stages else None
        if reads is not None:
            parts = kv_parallel.stage_parts(dims, group, stats, reads)
        first, free = pipeline.enter(dims, group, event.now, stats, first_s, executor, parts)
        executor = replace(executor, free=free, alone=clock.add(executor.alone, first_s))
    first_end = clock.add(event.now, first)
    end = clock.add(first_end, span(run, pace.growth_s, extra))
    if rules.gathers:
        rank = gathering.note_waited(counts).rank
    batch = replace(batch, extra=extra, advance=advance, is_committed=jnp.int32(0))
    rank = replace(rank, progress=jnp.int32(0))
    if rules.async_scheduling:
        rank = replace(rank, visible=rank.waiting)
        if rank.ready is not None:
            rank = replace(rank, visible_ready=rank.ready.length)
    in_flight = replace(times.batch, start=event.now, first=first, pace=run, growth_s=pace.growth_s)
    counts = choose(is_starting, Counts(counts.executor, rank, batch), counts)
    times = choose(is_starting, replace(times, executor=executor, batch=in_flight), times)
    return counts, times, Plan(is_starting, first_end, end, stats.num_decode)


def preempt(dims: Dims, group: Group, is_any: Bool[Array, ""], counts: Counts,
            residue_row: Int[Array, " block_size"], slot: Int[Array, ""], request: Int[Array, ""],
            offset: Int[Array, ""], previous: Int[Array, ""], known_prompt: Int[Array, ""],
            released: Release | None, is_ready: Bool[Array, ""] | None = None
            ) -> tuple[Counts, Int[Array, " block_size"], Int[Array, ""], queues.Link]:
    """Take a sequence off the batch: all its blocks, back to the front of the queue (SGLang: to its end).

    slot, request, offset, previous: of the victim; `known_prompt` its prompt tokens; with prefix caching its blocks are
    `released` already; is_ready: it has its KV here and does not run. Returns counts, residues, the tokens it has
    emitted and the link of the queue that changes.
    """
    rank, batch = counts.rank, counts.batch
    null = jnp.int32(dims.null_slot)
    is_forming = (slot == rank.forming_slot) & (slot != null)
    held_tokens = jnp.where(is_forming, rank.forming_computed, offset + batch.counter)
    if group.batching.reserve != "none":
        held_tokens = jnp.where(is_forming, rank.forming_known, held_tokens)
    emitted = jnp.where(is_forming, rank.forming_known, offset + batch.counter + 1) - known_prompt
    one = is_any.astype(jnp.int32)
    is_decoding = is_any & ~is_forming
    if is_ready is not None:
        is_decoding, one = is_decoding & ~is_ready, one * ~is_ready
    gone = is_decoding.astype(jnp.int32)
    residue_row = residue_row - gone * (jnp.arange(dims.block_size) == (offset & (dims.block_size - 1)))
    push = queues.push_back if group.batching.reserve == "expected" else queues.push_front
    queue, link = push(rank.queue, request, is_any, dims.num_requests)
    rank = replace(
        rank, queue=queue, running=rank.running - one,
        used_blocks=rank.used_blocks - is_any * (blocks_for(held_tokens, dims) if released is None else 0),
        forming_slot=jnp.where(is_any & is_forming, null, rank.forming_slot))
    if group.batching.async_scheduling:
        rank = replace(rank, visible=rank.visible + one)
    batch = replace(batch, count=batch.count - gone, offsets=batch.offsets - gone * offset,
                    tail=jnp.where(is_decoding, previous, batch.tail))
    if group.batching.is_unified:
        batch = replace(batch, budget=batch.budget + gone)
    return Counts(counts.executor, rank, batch), residue_row, emitted, link


def take_blocks(counts: Counts, condition: Bool[Array, ""], blocks: Int[Array, ""]) -> Counts:
    """The decodes of this pass take their blocks."""
    used = counts.rank.used_blocks + jnp.where(condition, blocks, 0)
    rank = replace(counts.rank, used_blocks=used, peak_blocks=jnp.maximum(counts.rank.peak_blocks, used))
    return mark(replace(counts, rank=rank), condition, w.DECODED)
