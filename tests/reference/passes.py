"""A scheduling pass: who is preempted, admitted, and computes how many tokens in the next iteration."""

from .fairness import queue_key
from .flags import SORTED, UNLIMITED, Flags
from .long_contexts import chunk_in_time
from .memory import (
    blocks_at_admission,
    blocks_for,
    blocks_to_grow,
    grow_cached,
    hold_cached,
    is_expected_to_fit,
    release,
    stored_behind,
    take,
)
from .partial_prefills import compose
from .state import Instance, Job, Plan


def enqueue(instance: Instance, job: Job, flags: Flags, *, at_front: bool) -> None:
    """Front or back of a FCFS queue; its rank in a sorted queue."""
    if instance.counters is not None:
        instance.counters.come_in(job, instance.waiting)
    if flags.order in SORTED:
        instance.waiting.append(job)
        instance.waiting.sort(key=lambda job: queue_key(job, flags))
    elif at_front:
        instance.waiting.insert(0, job)
    else:
        instance.waiting.append(job)


def preempt(instance: Instance, job: Job, plan: Plan, flags: Flags, *, at_front: bool = True) -> None:
    """All its blocks go, its emitted tokens stay. By recomputation it waits again; by swapping it keeps what it
    computed, and its place behind those swapped out before.
    """
    (instance.ready if job in instance.ready else instance.running).remove(job)
    release(instance, job)
    job.preemptions += 1
    plan.preempted.append(job)
    if flags.preemption == "swap" and job.is_prefilled:
        instance.swapped_tokens += job.computed
        instance.swapped.append(job)
        return
    job.lost_tokens += job.computed
    job.computed = 0
    job.is_prefilled = False
    enqueue(instance, job, flags, at_front=at_front)


def schedule_running(instance: Instance, plan: Plan, flags: Flags) -> None:
    """Gives every running job its tokens in list order, preempting where a block is lacking.

    This is vLLM's loop: the victim may be a job that already got its tokens in this pass (they are refunded),
    and when it is the very job that lacks the block the loop ends and what stands after it gets no tokens.
    With last-admitted victims nothing stands after it.

    Who has nothing to compute until a batch returns is passed over, and so is who finds the batch full. Nobody in
    flight is a victim; a prompt in flight goes without its next chunk where it lacks blocks or somebody was
    preempted, and the loop ends.
    """
    position = 0
    while position < len(instance.running):
        job = instance.running[position]
        if job.scheduled_tokens == job.known or len(plan.entries) >= flags.max_batch_seqs:
            position += 1
            continue
        if job.pending and plan.preempted:
            plan.is_short = True
            return
        tokens = 1 if job.is_prefilled else min(job.known - job.scheduled_tokens, plan.budget)
        assert tokens >= 1, "a running job found no budget"
        if not job.is_prefilled:
            tokens = chunk_in_time(plan, job, tokens, flags, instance.predict)
        lacking, must_be_free = blocks_for(job, tokens, flags)
        while instance.free_blocks < must_be_free:
            if flags.victim == "lowest_priority":
                victim = max(instance.running, key=lambda job: queue_key(job, flags))
            else:
                victim = next((j for j in reversed(instance.running[position:]) if not j.pending), None)
            if victim is None:
                plan.is_short = True
                return
            if plan.withdraw(victim):
                position -= 1
            preempt(instance, victim, plan, flags)
            if victim is job:
                plan.is_short = any(j.pending and j.scheduled_tokens < j.known for j in instance.running)
                return
        if instance.cache is not None:
            grow_cached(instance, job, tokens)
        else:
            take(instance, job, lacking)
        plan.add(job, tokens)
        position += 1


def retract_and_decode(instance: Instance, plan: Plan, flags: Flags) -> None:
    """SGLang's decode step: if one token each does not fit, retract until it comfortably does."""

    def lacking(jobs: list[Job]) -> int:
        return sum(blocks_to_grow(job, 1, flags) for job in jobs)

    def is_tight() -> bool:
        free_tokens = instance.free_blocks * flags.block_size
        few = flags.retract_free_tokens * len(instance.running)
        return free_tokens < few or instance.free_blocks < lacking(instance.running)

    if instance.free_blocks < lacking(instance.running):
        while len(instance.running) > 1 and is_tight():
            victim = min(instance.running, key=lambda j: (j.emitted, -j.request.prompt, -j.request.id))
            preempt(instance, victim, plan, flags, at_front=flags.retract_to == "front")
        emitted = sum(job.emitted for job in instance.running)
        limit = sum(job.request.max_tokens for job in instance.running)
        spare = flags.retract_free_tokens * len(instance.running)
        instance.new_token_ratio = min(1.0, (emitted + spare) / limit)
    else:
        instance.new_token_ratio = max(
            flags.new_token_ratio_floor, instance.new_token_ratio - flags.new_token_ratio_decay
        )
    for job in instance.running:
        take(instance, job, blocks_to_grow(job, 1, flags))
        plan.add(job, 1)


def schedule_limited_decodes(instance: Instance, plan: Plan, flags: Flags) -> None:
    """simdistserve's decode step: from the front of the queue while the sum of contexts fits."""
    room = flags.decode_context_limit
    for job in instance.running:
        if job.pending:
            continue  # in a stage, hence not in the queue
        if job.known > room:
            break
        room -= job.known
        plan.add(job, 1)


def comes_first(instance: Instance, visible: set[int] | None) -> bool:
    """Somebody is known whose KV is computed and who does not run: nobody else is admitted."""
    is_ready_known = instance.ready and (visible is None or instance.ready[0].request.id in visible)
    return bool(instance.swapped or is_ready_known)


def join_held(instance: Instance, plan: Plan, flags: Flags, visible: set[int] | None) -> None:
    """Whose KV is computed joins as a decode, in order, swapped ones before ready ones, until one lacks a block.

    Nobody that runs is preempted for them. Where nothing runs and no transfer is under way, those that became ready
    last are: prompts alone can fill a pool, and then none has the block for its next token.
    """
    while comes_first(instance, visible):
        is_full = len(instance.running) >= flags.max_num_seqs or len(plan.entries) >= flags.max_batch_seqs
        if is_full or plan.budget <= 0 or plan.is_short:
            return
        queue = instance.swapped or instance.ready
        job = queue[0]
        lacking, must_be_free = blocks_for(job, 1, flags)
        while instance.free_blocks < must_be_free:
            is_more_to_come = instance.in_transfer or instance.stopped or instance.inbound_blocks
            if instance.running or is_more_to_come or not instance.ready:
                return
            victim = instance.ready[-1]
            preempt(instance, victim, plan, flags)
            if victim is job:
                return
        del queue[0]
        instance.running.append(job)
        take(instance, job, lacking)
        if queue is instance.swapped:
            instance.swapped_tokens += job.computed
        plan.add(job, 1)


def admit(instance: Instance, plan: Plan, flags: Flags, visible: set[int] | None) -> None:
    """Admits from the front of the queue until one does not fit; only ids in `visible` exist (None: all)."""
    # A prompt that was begun earlier and goes on here counts as admitted here.
    admitted = [job for job, _ in plan.entries if not job.is_prefilled]
    while (
        len(instance.running) < flags.max_num_seqs
        and plan.budget > 0
        and len(plan.entries) < flags.max_batch_seqs
        and not plan.is_short
    ):
        heads = (job for job in instance.waiting if visible is None or job.request.id in visible)
        job = next(heads, None) if instance.counters is None else instance.counters.next_of(instance.waiting)
        if job is None:
            return
        # With a prefix cache the first chunk starts behind what is cached now.
        cached = 0 if instance.cache is None else instance.cache.lookup(job.for_cache)
        loaded = stored_behind(instance, job, cached)
        cached += loaded
        if not flags.chunked_prefill and job.known - cached > plan.budget:
            return
        chunk = min(job.known - cached, plan.budget)
        if flags.target_s is not None:
            if any(not j.is_prefilled and j.scheduled_tokens + tokens < j.known for j, tokens in plan.entries):
                return  # a prompt that was cut ends the batch
            chunk = chunk_in_time(plan, job, chunk, flags, instance.predict)
            if chunk is None:
                return
        if instance.cache is not None:
            blocks = instance.cache.blocks_to_allocate(job.for_cache, loaded + chunk)
        else:
            blocks = blocks_at_admission(job, chunk, flags)
        if flags.track_blocks and instance.free_blocks - blocks < flags.watermark_blocks:
            return
        if flags.reserve == "expected" and not is_expected_to_fit(instance, job, admitted, flags):
            return
        instance.waiting.remove(job)
        instance.running.append(job)
        admitted.append(job)
        if instance.counters is not None:
            instance.counters.admit(job)
        if instance.cache is not None:
            hold_cached(instance, job, chunk)
        else:
            take(instance, job, blocks)
        plan.add(job, chunk)


def wait_for_prompts(instance: Instance, plan: Plan, flags: Flags) -> None:
    """TensorRT-LLM's batch waiting: withdraws the prompts just admitted, if too few, unless they waited long."""
    if not flags.batch_wait_timeout_iters:
        return
    prompts = [job for job, _ in plan.entries if not job.is_prefilled]
    if not prompts or len(prompts) == len(plan.entries):
        return
    scheduled_tokens = sum(tokens for _, tokens in plan.entries)
    is_full = scheduled_tokens >= flags.batch_wait_max_tokens_ratio * flags.max_num_batched_tokens
    if is_full or instance.iterations_waited >= flags.batch_wait_timeout_iters:
        instance.iterations_waited = 0
        return
    instance.iterations_waited += 1
    for job in reversed(prompts):
        plan.withdraw(job)
        instance.running.remove(job)
        release(instance, job)
        enqueue(instance, job, flags, at_front=True)


def scheduling_pass(instance: Instance, flags: Flags, visible: set[int] | None) -> Plan:
    """Composes the next batch of an instance and changes its queue, list and pool accordingly."""
    plan = Plan(budget=flags.max_num_batched_tokens)
    if flags.side_by_side is not None:
        compose(instance, plan, flags)
        return plan
    may_admit = flags.admit == "any_time" or not instance.running

    def may_join() -> bool:
        return may_admit and not (plan.preempted and flags.waiting_blocked_after_preempt)

    if flags.phase_mix == "unified":
        schedule_running(instance, plan, flags)
        if may_join():
            join_held(instance, plan, flags, visible)
        if may_join() and not comes_first(instance, visible):
            admit(instance, plan, flags, visible)
        wait_for_prompts(instance, plan, flags)
        return plan

    for job in instance.running:
        if not job.is_prefilled and not job.pending:  # the one partially prefilled job; its blocks were reserved
            plan.add(job, min(job.known - job.computed, plan.budget))
    if may_admit and not comes_first(instance, visible):
        admit(instance, plan, flags, visible)
    if plan.entries:
        return plan
    if flags.decode_context_limit is not None:
        schedule_limited_decodes(instance, plan, flags)
    elif flags.reserve == "expected":
        retract_and_decode(instance, plan, flags)
    else:
        # Decodes are not counted against the prefill budget.
        plan.budget = UNLIMITED
        schedule_running(instance, plan, flags)
        if may_join():
            join_held(instance, plan, flags, visible)
    return plan
