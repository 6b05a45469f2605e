"""What a step leaves behind: the world's scalars, and what to write to its arrays."""

import jax.numpy as jnp
from jaxtyping import Array

from jaxsim.engine import (
    caches,
    clients,
    context_reuse,
    failures,
    hand_over,
    migration,
    offload,
    partial_prefills,
    prefix,
    remote_store,
    role_switching,
    siblings,
    slack,
    swapping,
    tangents,
    tape,
)
from jaxsim.engine.common import MAX_SPAN_S, Context, choose, take
from jaxsim.engine.parts import is_part
from jaxsim.engine.touched import Touched
from jaxsim.engine.writes import Add, Put, Writes, at
from jaxsim.kernels import bitmap, clock, histogram, packed, queues, stack
from jaxsim.state import world as w
from jaxsim.state.requests import PLACE, PROMPT


def note(context: Context, t: Touched) -> tuple[dict[str, Array], Writes]:
    """The world's scalars by name, and what to write to its arrays."""
    dims, params, _, world, group = context
    rules, event, counts, placed, retired = group.batching, t.event, t.counts, t.placed, t.retired
    now = event.now
    null, scratch = jnp.int32(dims.null_slot), dims.num_requests
    epoch = world.epoch.astype(jnp.float32)
    stamp = jnp.stack([epoch, now.hi, now.lo])
    is_active = event.is_arrival | event.is_ending | event.is_passing
    if event.met is not None and event.met.is_settling is not None:
        is_active = is_active | event.met.is_settling
    is_finished = retired.is_any
    if t.left is not None:
        is_active, is_finished = is_active | event.is_door, is_finished & ~t.left.is_any
        if getattr(t.left, "part", None) is not None:
            is_finished = is_finished & ~t.left.part.is_any
    if dims.has_migration:
        is_active = is_active | event.is_tick
    if t.cut_off is not None:
        is_active = is_active | event.is_timeout | event.is_refused
        if event.outage is not None:
            is_active = is_active | event.outage.is_due
        is_finished = is_finished & (retired.request != scratch)
    logs = t.is_starting & (counts.batch.joining_first > 0)
    own_key = jnp.where(placed.is_completing, placed.key, packed.EMPTY)
    leaving = jnp.where(retired.is_any & (retired.slot != placed.slot), retired.slot, null)
    entering = placed.slot
    is_new = placed.is_admitted & (t.preemptions == 0)
    if t.is_ready is not None:
        is_new = is_new & ~t.is_ready
    is_unplaced = (placed.is_admitted | placed.is_completing) & (t.emitted == 0)
    is_returned = retired.is_any & ~placed.is_admitted
    returned = retired.slot
    writes = {}

    def own(name, *index):
        owner = (event.executor if name in w.OF_EXECUTOR else t.rank if name in w.OF_RANK else t.batch)
        return at(dims, name, owner, *index)

    def row(rows, before, record):
        return record if dims.all_batches == 1 else rows.replaced(before, event.rank, event.batch, record)

    if t.turn is None:
        rows = row(w.count_rows(dims), t.count_row, counts), row(w.clock_rows(dims), t.clock_row, t.times)
        logged = jnp.where(logs, counts.batch.log_row, dims.last_log)
        first_ends = jnp.stack([epoch, t.plan.first_end.hi, t.plan.first_end.lo])
    else:
        rows, started = (t.turn.counts, t.turn.clocks), t.turn.everything[0].batch
        first_end = t.turn.first_end
        logged = jnp.where(t.turn.is_launching & (started.joining_first > 0), started.log_row, dims.last_log).ravel()
        first_ends = jnp.broadcast_to(jnp.stack([epoch, first_end.hi, first_end.lo]), (*logged.shape, 3))

    if rules.grows:
        entering = jnp.where(t.is_preempting, t.victim[0], entering)
        is_returned = is_returned | (t.is_preempting & (t.victim[0] != null))
        returned = jnp.where(t.is_preempting, t.victim[0], returned)
        is_returning = placed.is_admitted & (t.preemptions > 0)
        if t.is_ready is not None:
            is_returning = is_returning & ~t.is_ready
        is_stalling, stalled = t.is_preempting, t.candidate
        if dims.has_migration:
            # Who leaves stands still until it is placed again; a ready one who gives way does already.
            is_returning = is_returning | (placed.is_admitted & t.is_ready)
            is_stalling = (is_stalling & (t.victim[0] != null)) | t.left.is_any
            stalled = jnp.where(t.left.is_any, t.left.request, stalled)
        parts = clock.to_integers(world.epoch, now)
        writes["progress"] = Put((jnp.where(t.is_preempting, t.victim[1], scratch),),
                                 jnp.stack([t.victim_emitted, t.preemptions + 1]))
        writes["stalled"] = Add((jnp.where(is_stalling | is_returning, stalled, scratch),),
                                jnp.where(is_returning, parts, jnp.where(is_stalling, -parts, 0)))
        writes["preempted"] = Put((jnp.where(t.is_preempting, t.victim[1], scratch),), stamp)
        writes["residues"] = Put(own("residues"), t.residue_row)
    if t.switched is not None:
        writes |= role_switching.writes(t.switched)
    link = t.link
    if dims.has_migration:
        index = jnp.where(t.left.is_any, t.left.request, writes["progress"].index[0])
        emitted = jnp.stack([t.left.emitted, take(world.progress, retired.request)[1]])
        writes["progress"] = Put((index,), jnp.where(t.left.is_any, emitted, writes["progress"].value))
        writes["preempted"] = Put((jnp.where(is_stalling, stalled, scratch),), stamp)
        writes |= migration.writes(context, event, t.acted, t.left)
        link = choose(event.is_door, t.acted.link, link)
    elif t.left is not None:
        # A request that leaves has its first token, and waits for the next from now on.
        leaving_now, before = t.left.is_kv, take(world.progress, retired.request)[1]
        index = jnp.where(leaving_now, t.left.request, scratch)
        if rules.grows:
            index = jnp.where(leaving_now, t.left.request, writes["progress"].index[0])
            emitted = jnp.int32(1)
            if dims.has_failures:
                emitted = retired.tokens - take(context.requests.table, retired.request)[PROMPT] + 1
            value = jnp.where(leaving_now, jnp.stack([emitted, before]), writes["progress"].value)
            writes["progress"] = Put((index,), value)
        writes["preempted"] = Put((index,), stamp)
        writes |= hand_over.writes(context, event, t.opened, t.left, t.is_looking, stamp)
        link = choose(event.is_door, t.opened.link, choose(t.left.is_any, t.left.link, link))
    if t.slot_ends is not None:
        writes["slot_ends"] = Put(own("slot_ends"), t.slot_ends)
    if rules.keeps_running_list:
        appending = t.tail, placed.slot, placed.is_completing
        if t.cut_off is not None:
            appending = choose(t.cut_off.is_forming, (t.cut_off.tail, t.cut_off.slot, t.cut_off.is_forming), appending)
        _, *appended = queues.append(*appending, dims.null_slot)
        for name, *links in zip(("slot_previous", "slot_next"), t.unlinked, appended, strict=True):
            indices, values = zip(*links, strict=True)
            writes[name] = Put(own(name, indices), values)
    stack_top = stack.push_at(dims.num_slots - counts.rank.running - 1, is_returned, dims.slot_width - 1)
    if t.found is not None:
        rank = counts.rank
        # The prompt that was placed, whole or in part, is computed up to here.
        computed = jnp.where(placed.is_completing, t.lengths[PROMPT] + t.emitted, rank.forming_computed)
        is_placed = placed.slot != null
        writes |= prefix.writes(context, t.rank, t.found, t.released, t.candidate, is_placed, placed.is_admitted,
                                is_new, computed)
    if t.behind is not None:
        writes |= offload.writes(context, t.rank, t.behind, t.kept, t.candidate, is_new)
    if dims.has_reuse:
        writes |= context_reuse.writes(dims, t.found, t.candidate, is_new)
    if t.puts is not None:
        writes |= remote_store.writes(context, t.rank, t.found, t.own_puts, t.puts, t.candidate, is_new)
    if dims.has_siblings:
        writes |= siblings.writes(context, t.rank, t.found, t.loan, t.candidate, is_placed, is_new, computed,
                                  counts.executor.num_iterations)
    if dims.has_variants:
        variant = take(context.requests.variant, event.request)
        # Who is refused where it was sent has had its turn, as of `num_routed`.
        is_sent = event.is_arrival if event.is_routed is None else event.is_arrival | event.is_routed
        writes["routed_by_variant"] = Add((variant,), is_sent.astype(jnp.int32))
    if event.met is not None:
        writes |= caches.writes(context, event.met, event.request, event.is_arrival, t.rank)
    if t.due is not None:
        writes["due"] = Put((t.due[0],), t.due[1])
    if dims.num_records:
        writes |= (tape.record(dims, group, world, t.plan, t.rank, stamp, counts, t.times, t.longest, logged)
                   if t.turn is None else
                   tape.record_all(dims, group, world, t.turn, event.executor, stamp, logged))
        writes |= tape.of_requests(
            t.taped, jnp.where(event.is_arrival, event.request, scratch), jnp.where(is_new, t.candidate, scratch),
            jnp.where(retired.is_any, retired.request, scratch), stamp)
    if t.moving is not None:
        writes |= tangents.writes(
            dims, t.moving, own("tangents"), t.arrived, arriving=jnp.where(event.is_arrival, event.request, scratch),
            joining=jnp.where(is_new, t.candidate, scratch), logged=logged,
            leaving=jnp.where(retired.is_any, retired.request, scratch))
    if world.routed is not None:
        writes["routed"] = Put((jnp.where(event.is_arrival, event.request, scratch),), t.rank)
    writes |= {
        "wake_hi": Put(own("wake_hi"), t.wake.hi), "wake_lo": Put(own("wake_lo"), t.wake.lo),
        "phase": Put(own("phase"), t.phase),
        "counts": Put(own("counts"), rows[0]), "clocks": Put(own("clocks"), rows[1]),
        "slot_keys": Put(own("slot_keys", (leaving, entering)), (jnp.int32(packed.EMPTY), own_key)),
        "slot_entries": Put(own("slot_entries", placed.slot), placed.entry),
        "free_slots": Put(own("free_slots", stack_top), returned),
        "next_waiting": Put(link[:1], link[1]),
        "placed": Put((jnp.where(is_unplaced, t.candidate, scratch),),
                      jnp.stack([jnp.where(placed.is_first_token, counts.batch.log_row, -1), t.rank])),
        "scheduled": Put((jnp.where(is_new, t.candidate, scratch),), stamp),
        "finished": Put((jnp.where(is_finished, retired.request, scratch),), stamp),
        "first_tokens": Put((logged,), first_ends),
        "itl": Add((histogram.bin_of(t.itl_s),), t.itl_weights),
    }
    if dims.has_migration:
        is_marked = t.acted.marked != null
        slots = jnp.where(is_marked, t.acted.marked, leaving), entering
        writes["slot_keys"] = Put(own("slot_keys", slots), (jnp.where(is_marked, t.acted.key, packed.EMPTY), own_key))
    if t.cut_off is not None:
        writes |= clients.writes(context, t, writes, stamp, own)
    if t.sight is not None:
        writes |= swapping.writes(context, event, t.rank, jnp.where(retired.is_any, retired.request, scratch), placed,
                                  t.moved, t.sight, jnp.where(t.is_passing, t.candidate, scratch), t.ended, t.kept_turn)
    if dims.all_ranks > 1:
        change = event.is_arrival.astype(jnp.int32) - (retired.is_any if t.cut_off is None else is_finished)
        if t.cut_off is not None:
            change = change - t.cut_off.is_any
            if t.left is not None:
                change = change - t.left.is_any
        if t.switched is not None:
            change = change - t.switched.gone
        writes["outstanding"] = Add((t.rank,), change)
        if dims.has_migration:
            gone = t.acted.is_commit.astype(jnp.int32)
            both = jnp.stack([change + t.left.is_any + gone, -gone])
            writes["outstanding"] = Add((jnp.stack([t.rank, t.acted.source]),), both)
        elif t.left is not None:
            target = jnp.where(t.left.is_any, t.left.target, t.rank)
            both = jnp.stack([change, t.left.is_any.astype(jnp.int32)])
            writes["outstanding"] = Add((jnp.stack([t.rank, target]),), both)
    if rules.sorts:
        is_entering = t.is_preempting | (event.is_arrival & ~placed.is_admitted)
        is_leaving = placed.is_admitted & ~event.is_arrival
        if t.again is not None:
            is_entering = event.is_arrival & ~placed.is_admitted
            is_leaving = is_leaving & ~t.is_again
            own_writes, is_full = slack.writes(context, t)
            writes |= own_writes
        member = jnp.where(event.is_arrival, t.places[0], t.lengths[PLACE])
        index, words = bitmap.change(lambda word: take(world.waiting_set, t.rank, word), dims.num_requests, member,
                                     is_entering, is_entering | is_leaving)
        writes["waiting_set"] = Put(own("waiting_set", index), words)
    if t.chosen is not None:
        own_writes, is_full = partial_prefills.writes(context, t)
        writes |= own_writes
    if t.tenants is not None:
        writes["tenants"] = Put(own("tenants"), t.tenants.row)
    if rules.stalls:
        index = jnp.arange(dims.slot_width)
        keys = jnp.where(index == entering, own_key, t.slots.keys)
        writes["slot_keys"] = Put(own("slot_keys"), jnp.where((index == leaving) | (index == null), packed.EMPTY, keys))
        is_entering = (index == entering)[:, None]
        writes["slot_entries"] = Put(own("slot_entries"), jnp.where(is_entering, placed.entry, t.slots.entries))
    in_flight, is_launching = t.times.batch, t.is_starting
    if t.turn is not None:
        in_flight, is_launching = t.turn.everything[1].batch, t.turn.is_launching
    is_possible = jnp.all((in_flight.first.hi <= MAX_SPAN_S) & (in_flight.pace.hi <= MAX_SPAN_S))
    progress = dict(
        steps=world.steps + is_active,
        num_routed=world.num_routed + event.is_arrival, source=t.source,
        num_finished=world.num_finished + is_finished,
        num_logged=world.num_logged + t.opens_log,
        fault=world.fault | jnp.where(t.is_stuck, w.STUCK, 0) | jnp.where(is_launching & ~is_possible, w.TOO_SLOW, 0)
        | (0 if t.found is None else jnp.where(counts.rank.cache.end - counts.rank.cache.head > dims.log_size,
                                               w.LOG_FULL, 0))
        | jnp.where(is_active & (world.steps >= params.max_steps), w.STEP_LIMIT, 0),
        is_frozen=t.is_frozen.astype(jnp.int32))
    if dims.offload_log:
        progress["fault"] = progress["fault"] | offload.fault(dims, counts)
    if t.egress is not None:
        progress["egress"] = jnp.stack(t.egress)
    if dims.remote_log:
        progress |= dict(room=t.puts.room, fault=progress["fault"] | remote_store.fault(dims, t.puts))
    if t.sight is not None:
        is_full = t.sight.overflows | t.moved.overflows
        progress["fault"] = progress["fault"] | jnp.where(is_full, w.WINDOW_FULL, 0)
    if t.again is not None:
        progress["fault"] = progress["fault"] | jnp.where(is_full, w.SLACK_WINDOW_FULL, 0)
    if t.chosen is not None:
        progress["fault"] = progress["fault"] | jnp.where(is_full, w.LINE_FULL, 0)
    if dims.has_migration:
        progress["control"] = t.control
    elif t.left is not None:
        progress |= dict(num_handed_over=world.num_handed_over + t.left.is_kv,
                         num_accepted=world.num_accepted + (t.opened.accepted != scratch))
        if dims.num_flights:
            progress |= dict(flights=t.opened.flights,
                             fault=progress["fault"] | jnp.where(t.opened.overflows, w.LINKS_FULL, 0))
    if t.cut_off is not None:
        progress |= clients.progress(context, t, is_finished)
    if dims.has_failures:
        progress |= failures.progress(context, event, t.cut_off.loss, t.item)
    if dims.has_parts:
        is_dealt = event.is_arrival & is_part(context, event.request)
        progress |= dict(num_dealt=world.num_dealt + is_dealt,
                         num_routed=progress["num_routed"] - is_dealt + t.left.part.is_last)
    if t.switched is not None:
        progress |= dict(roles=t.switched.roles,
                         fault=progress["fault"] | jnp.where(t.switched.is_starved, w.STARVED, 0))
    if dims.num_records:
        progress["num_recorded"] = world.num_recorded + (
            t.plan.is_any if t.turn is None else dims.num_ranks * t.turn.is_launching)
    return progress, writes
