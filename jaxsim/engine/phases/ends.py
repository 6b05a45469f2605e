"""An iteration that ended: tokens come out, sequences leave."""

from dataclasses import replace
from functools import partial

import jax.numpy as jnp

from jaxsim.engine import (
    decode_queue,
    ending,
    fair,
    free_stages,
    hand_over,
    kv_parallel,
    migration,
    prefix,
    swapping,
    tangents,
    tape,
)
from jaxsim.engine.common import Context, take
from jaxsim.engine.slots import Slots
from jaxsim.engine.touched import Touched
from jaxsim.kernels import packed, queues
from jaxsim.state import world as w


def settle(context: Context, t: Touched) -> Touched:
    """Settle the iteration that ended."""
    if context.dims.has_free_stages:
        # Counted when it was launched.
        return t
    counts, times, itl_s, itl_weights = ending.settle(
        context.dims, context.group, t.event, t.counts, t.times, t.residue_row)
    taped = None
    if context.dims.num_records:
        is_running = t.event.is_arrival & (t.phase == w.ENDING)
        taped = tape.known(context.dims, t.event.is_ending, is_running, t.counts)
    tenants = None if t.tenants is None else fair.settle(context, t)
    moving = None if t.moving is None else tangents.settle(t.moving, t.event.is_ending, t.counts.batch)
    return replace(t, counts=counts, times=times, itl_s=itl_s, itl_weights=itl_weights, taped=taped, tenants=tenants,
                   moving=moving)


def retire(context: Context, t: Touched) -> Touched:
    """Retire one sequence whose last token the iteration produced."""
    dims, params, requests, world, group = context
    event, counts, keys = t.event, t.counts, take(world.slot_keys, t.batch)
    here = free_stages.keys_here(context, event, t.rank, keys) if dims.has_free_stages else keys
    counts, residue_row, retired, has_more, next_key = ending.retire(
        dims, group, event, counts, here, lambda slot: take(world.slot_entries, t.rank, slot), t.residue_row,
        take(world.slot_entries, t.rank)[:, w.STAMP]
        if group.batching.prefix_caching or dims.has_roles or dims.keeps_turns or dims.has_block_groups else None,
        partial((hand_over if dims.has_roles else migration).is_leaving, context, event) if dims.has_moves else None)
    if dims.has_urgent:
        gone = retired.is_any * take(requests.is_urgent, retired.request)
        counts = replace(counts, rank=replace(counts.rank, urgent=counts.rank.urgent - gone))
    tail, unlinked, slots = counts.batch.tail, None, None
    if group.batching.keeps_running_list:
        tail, *unlinked = queues.unlink(
            tail, retired.slot, take(world.slot_previous, t.rank, retired.slot),
            take(world.slot_next, t.rank, retired.slot), retired.is_any, dims.null_slot)
        counts = replace(counts, batch=replace(counts.batch, tail=tail))
    if group.batching.scans_slots:
        slots = Slots(keys, take(world.slot_entries, t.rank), retired.slot)
    if group.batching.has_context_limit and dims.has_roles:
        has_ended = event.is_ending & ~has_more
        is_behind = hand_over.comes_behind(context, event, t.opened, t.wake, t.phase)
        counts, moved = decode_queue.ran(counts, slots, has_ended | is_behind)
        if dims.has_free_stages:
            moved = free_stages.returning(context, event, t.rank, slots, has_ended)
        counts, slots = decode_queue.to_the_back(counts, slots, moved)
        counts, opened = hand_over.take_place(context, counts, t.opened)
        t = replace(t, opened=opened)
    if dims.has_swap:
        counts, times, ended = swapping.leave(
            context, event, t.rank, counts, t.times, retired, t.counts.rank.used_blocks)
        t = replace(t, times=times, ended=ended)
    longest = None
    if group.cost.reads_longest:
        is_in = (keys != packed.EMPTY) & (jnp.arange(dims.slot_width) != retired.slot)
        longest = jnp.max(jnp.where(is_in, take(world.slot_entries, t.rank)[:, w.OFFSET], -packed.EMPTY))
    decoding = None
    if group.batching.kv_parallel is not None:
        decoding = kv_parallel.look(context, t, counts.batch, keys, retired.slot)
        counts = replace(counts, batch=replace(counts.batch, shards=decoding.first))
    released = None
    if group.batching.prefix_caching:
        preemptions = take(world.progress, retired.request)[1]
        rank, released = prefix.release(context, t.rank, counts.rank, retired.request, retired.is_any, retired.tokens,
                                        preemptions)
        rank = replace(rank, used_blocks=rank.used_blocks - released.freed)
        counts = replace(counts, rank=rank)
    left = is_looking = None
    if dims.has_roles:
        left = hand_over.leave(context, event, retired, t.times)
        is_looking = event.is_ending & ~has_more & hand_over.fits(context, event, counts, t.opened.front)
        # What that leads to at this instant comes before the pass; blocks of a transfer that takes time come later.
        is_instant = left.is_any & (left.seconds <= 0)
        if params.hand_over.pool_of is None:
            is_instant = is_instant & (params.hand_over.latency_s <= 0)
        event = event._replace(is_met=event.is_met | is_instant | is_looking)
    control = t.control
    if dims.has_migration:
        left, control, opens = migration.leave(context, event, retired, control)
        event = event._replace(is_met=event.is_met | opens)
    tenants = None if t.tenants is None else fair.retire(context, t.tenants, retired)
    source, due = t.source, None
    if params.source.answers:
        is_over = retired.is_any if left is None else retired.is_any & ~left.is_any
        source, *entry = params.source.ended(requests, source, world.due, world.epoch, event.now, retired.request,
                                             is_over, dims.num_requests)
        due = tuple(entry)
        event = event._replace(following=params.source.coming(requests, source, world.due, world.epoch).time)
    return replace(t, event=event, counts=counts, residue_row=residue_row, source=source, due=due, released=released,
                   left=left, is_looking=is_looking, retired=retired, has_more=has_more, next_key=next_key, tail=tail,
                   longest=longest, unlinked=unlinked and tuple(unlinked), slots=slots, control=control,
                   tenants=tenants, decoding=decoding)
