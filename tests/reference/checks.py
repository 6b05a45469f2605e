"""What must always hold, and requests that can never be served."""

import math
from collections.abc import Sequence
from dataclasses import replace

from .fairness import queue_key
from .flags import CAN_GROW, SORTED, Flags
from .memory import blocks_at_admission, ceil_div, is_expected_to_fit
from .state import Instance, Job, Plan, Request
from .transfers import Transfer


def refuse_impossible(request: Request, flags: Flags) -> None:
    """Raises ValueError for a request that an empty instance could never finish."""
    # A request that can be preempted comes back with everything it emitted.
    can_come_back = flags.track_blocks and flags.reserve in CAN_GROW
    last_context = request.prompt + request.output - 1
    most_to_prefill = last_context if can_come_back else request.prompt
    problem = None
    if not flags.chunked_prefill and most_to_prefill > flags.max_num_batched_tokens:
        problem = f"{most_to_prefill} tokens to prefill exceed max_num_batched_tokens"
    if flags.decode_context_limit is not None and last_context > flags.decode_context_limit:
        problem = f"context {last_context} exceeds decode_context_limit"
    if flags.track_blocks:
        if flags.reserve == "max_model_len" and last_context > flags.max_model_len:
            problem = f"context {last_context} exceeds max_model_len"
        room = flags.num_blocks - flags.watermark_blocks
        if flags.reserve == "none":
            # What is cached is held at admission too, whatever the budget.
            first_chunk = most_to_prefill
            if not flags.prefix_caching:
                first_chunk = min(first_chunk, flags.max_num_batched_tokens)
            fits = ceil_div(last_context, flags.block_size) <= flags.num_blocks
            fits = fits and ceil_div(first_chunk, flags.block_size) <= room
        elif flags.reserve in ("prompt", "expected"):
            # Who comes back from host memory wants a block beyond its own.
            fits = ceil_div(last_context, flags.block_size) + (flags.swapping is not None) <= room
        else:
            fits = blocks_at_admission(Job(request, 0), request.prompt, flags) <= room
        if flags.reserve == "expected":
            empty = Instance(0, replace(flags, new_token_ratio_init=1.0))
            comebacks = [Job(request, 0, emitted=g) for g in range(request.output)]
            fits = fits and all(is_expected_to_fit(empty, job, [], flags) for job in comebacks)
        if not fits:
            problem = "its blocks exceed the pool"
    if flags.prefix_caching and len(request.prefix_hashes) > last_context // flags.block_size:
        raise ValueError(f"request {request.id} has more prefix hashes than full blocks")
    if problem is not None:
        raise ValueError(f"request {request.id} can never be served: {problem}")


def check_instance(instance: Instance, flags: Flags) -> None:
    """Blocks are conserved and cover what was computed; nobody is in two places; limits hold."""
    running, waiting, leaving = instance.running, instance.waiting, instance.leaving
    coming, ready, swapped = instance.in_transfer, instance.ready, instance.swapped
    assert len(running) <= flags.max_num_seqs
    everybody = running + waiting + leaving + instance.unaccepted + coming + ready + swapped + instance.stopped
    assert len({id(job) for job in everybody}) == len(everybody)
    assert all(job.blocks == 0 and job.computed == 0 for job in waiting)
    assert 0 <= instance.free_blocks <= flags.num_blocks
    if instance.cache is not None:
        instance.cache.check()
        held = instance.cache.held
        by_holder = {j.request.id: j.blocks for j in running} | {j.request.id: j.source_blocks for j in leaving}
        assert {name: len(blocks) for name, blocks in held.items()} == by_holder
        num_held = len({block for blocks in held.values() for block in blocks})
        assert instance.free_blocks == instance.cache.num_free == flags.num_blocks - num_held
    else:
        held_here = sum(job.blocks for job in running + coming + ready) + sum(job.source_blocks for job in leaving)
        held_here += sum(job.blocks for job in instance.stopped) + instance.inbound_blocks
        held_here += 0 if instance.swap is None else instance.swap.leaving_blocks
        assert instance.free_blocks + held_here == flags.num_blocks
    assert all(job.blocks == 0 and job.is_prefilled for job in swapped)
    if instance.swap is not None:
        kept = sum(blocks for blocks, _ in instance.swap.kept.values())
        assert instance.swap.host_used == sum(instance.swap.on_host.values()) + kept <= flags.swapping.host_blocks
    if flags.track_blocks:
        assert all(job.blocks * flags.block_size >= job.scheduled_tokens for job in running + ready)
    flying = {id(job) for flight in instance.flights for job, _ in flight}
    assert flying <= set(map(id, running))
    assert len(instance.flights) <= flags.stages or flags.pass_when_stage_free
    if flags.order in SORTED:
        assert waiting == sorted(waiting, key=lambda job: queue_key(job, flags))


def check_cluster(instances: Sequence[Instance], num_unfinished: int | None) -> None:
    """After an event: the blocks of every instance are conserved, every request is in one place and none is lost.

    `num_unfinished` have been routed and are not finished. Who leaves an instance is on its way to another.
    """
    leaving, coming = [], []
    for instance in instances:
        check_instance(instance, instance.flags)
        leaving += instance.leaving
        coming += instance.unaccepted + instance.in_transfer
    assert sorted(map(id, leaving)) == sorted(map(id, coming)), "blocks kept for nobody, or given back too early"
    if num_unfinished is not None:
        assert sum(instance.outstanding for instance in instances) == num_unfinished, "a request was lost, or is twice"


def check_links(transfers: Sequence[Transfer], links: str, discipline: str) -> None:
    """No link carries more than its bandwidth in any span of time, nor a transfer faster than it could alone.

    In units of work, the time that the bytes take alone: what both starts and ends in a span is at most the span. With
    max-min fairness in those of the fastest who uses the link.
    """
    by_link: dict[tuple, list[Transfer]] = {}
    for transfer in transfers:
        assert transfer.accepted <= transfer.start <= transfer.due
        assert transfer.delivered == (None if transfer.is_cut else transfer.due)
        if transfer.work == 0:
            continue
        if links == "pair":
            ends = [(transfer.source, transfer.destination)]
        else:
            ends = [("out of", transfer.source), ("into", transfer.destination)]
        if transfer.over is not None:
            ends.append(("over", transfer.over))
        for end in ends:
            by_link.setdefault(end, []).append(transfer)
    for carried in by_link.values():
        carried.sort(key=lambda transfer: transfer.due - transfer.latency)
        fastest = max(transfer.parts[0] for transfer in carried)
        for first in {transfer.start for transfer in carried}:
            work = 0
            for transfer in carried:
                if transfer.start >= first:
                    parts = transfer.parts[0] if discipline == "max_min" else fastest
                    work += transfer.work * parts / fastest
                    span = transfer.due - transfer.latency - first
                    assert work <= span or math.isclose(work, span), "faster than the link"


def check_between_iterations(instance: Instance, flags: Flags) -> None:
    """At most one job is partially prefilled, and it is the last admitted, unless several may be."""
    check_instance(instance, flags)
    if flags.side_by_side is not None:
        begun = sum(not job.is_prefilled and job.scheduled_tokens < job.known for job in instance.running)
        assert begun <= flags.side_by_side.count
        return
    assert all(job.is_prefilled or job.scheduled_tokens == job.known for job in instance.running[:-1])


def check_batch(instance: Instance, plan: Plan, flags: Flags) -> None:
    """Each running job at most once, within the budget, with the blocks for its tokens."""
    jobs = [job for job, _ in plan.entries]
    assert len({id(job) for job in jobs}) == len(jobs)
    assert all(any(job is other for other in instance.running) for job in jobs)
    for job, tokens in plan.entries:
        assert tokens >= 1 and job.scheduled_tokens + tokens <= job.known
        assert not flags.track_blocks or job.blocks * flags.block_size >= job.scheduled_tokens + tokens
    assert len(plan.entries) <= flags.max_batch_seqs
    counted = [n for job, n in plan.entries if flags.phase_mix == "unified" or not job.is_prefilled]
    assert sum(counted) <= flags.max_num_batched_tokens
    if flags.phase_mix == "prefill_first":
        assert len({job.is_prefilled for job in jobs}) <= 1, "prefills and decodes in one batch"
