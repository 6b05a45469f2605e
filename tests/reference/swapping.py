"""Preemption by swap: blocks go to host memory and come back, and priorities that are drawn anew.

The engine is vLLM V0: prompts alone and whole, decodes else. Whoever is preempted moves to host memory, if there is
room; without, it is recomputed. A pass:

1. Where priorities are drawn, and a multiple of `period` iterations is over: all that are here are sorted by priority,
   first come first served where equal. The longest prefix whose tokens fit the pool, less the watermark, and the
   sequences, stays or may come; who runs behind it is swapped out, the last first.
2. Prompts, while the first in line is one and fits. In line are those swapped out, by arrival, then those
   waiting, who is recomputed in front; all by priority where these are drawn. One prompt or more: the iteration is
   theirs.
3. Decodes take their blocks in that order. While none is free the last of the running is preempted.
4. Whose copy into the device is through joins.
5. Unless 3 preempted somebody: from the front of the line, while the first is swapped out, its copy out is through,
   and its blocks and one more leave the watermark free, it comes back with room for its next token.

Not asynchronous: a copy takes time at the front of the iteration, and is through at once otherwise. Asynchronous: each
way carries one copy after the other; blocks are free once the copy out is through; who comes back joins at 4. A pass
that called somebody and has nothing to compute is followed by another at once.

`reuse`: whoever comes back keeps its full blocks in host memory, and is spared copying them out again. Where room lacks
the last of the running that have such a copy loses it.

`turns`, with `reuse`: an answer that is out leaves its blocks in host memory for the next turn. Those without a copy
there are copied out on the link, beside iterations in any case, and are in use until they are through. Where room
lacks, copies of turns go first, that of the answer which was out first; an answer takes the place of no others. If that
is not enough it is not kept. The next turn, at the same instance, waits for the copy to be through; then it comes back
as who is swapped out does, and computes only what is behind it, before the line.

`group_blocks`: blocks lie in groups. See `Pool`.

Source: vLLM 0.3.3 `core/scheduler.py`; FastSwitch (arXiv 2411.18424), sections on its scheduler and swap manager.
"""

import math
from dataclasses import dataclass, field

from .flags import UNLIMITED
from .memory import ceil_div
from .state import Instance, Job, Plan


@dataclass(frozen=True)
class Swapping:
    """Host memory, the copies to it, and priorities. period 0: none are drawn.

    One copy of `run_blocks` blocks, K or V of one layer: `dispatch_s` on the CPU, `launch_s` and its bytes on the wire.
    """

    host_blocks: int
    layers: int = 1
    block_copy_bytes: float = 1.0
    bandwidth: float = math.inf
    dispatch_s: float = 0.0
    launch_s: float = 0.0
    run_blocks: int = 1
    group_blocks: int = 0  # 0: copies are of `run_blocks`
    turns: bool = False
    is_async: bool = False
    reuse: bool = False
    period: int = 0
    levels: int = 4096
    locality: float = 0.0

    def seconds(self, blocks: int, run: int) -> float:
        copies = 2 * self.layers * math.ceil(blocks / run)
        wire = copies * self.launch_s + 2 * self.layers * blocks * self.block_copy_bytes / self.bandwidth
        return max(copies * self.dispatch_s, wire)


def draw(request: int, epoch: int, stream: int) -> int:
    """16 bits that depend on all three: products and shifts of 32 bits."""
    x = (request * 0x9E3779B1 + epoch * 0x85EBCA77 + stream * 0xC2B2AE3D) % 2**32
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = ((x ^ (x >> shift)) * factor) % 2**32
    return (x ^ (x >> 16)) >> 16


class Pool:
    """How many holes the free blocks of an instance are in, 256ths of one; who takes blocks, takes holes.

    A hole is as long as the mean one. Somebody who needs blocks takes them from one after the other, at most
    `group_blocks` in one; holes that are not longer are gone with that. A group that is given back, with a share f of
    all blocks free, is next to free ones at each end with probability f, and is one hole more, less one for either.
    Blocks that a job grows by lie in groups of the length that it found when it came; they are taken out of the holes
    when it leaves.
    """

    def __init__(self, blocks: int, most: int):
        self.blocks, self.most = blocks, most
        self.holes, self.of = 256, {}
        self.lengths: list[int] = []

    def take(self, job: Job, blocks: int, free: int) -> None:
        mean = 256 * free // self.holes
        length = max(1, min(mean, self.most))
        self.of[job] = (length, ceil_div(blocks, length))
        self.lengths.append(length)
        if length < self.most:
            self.holes -= 256 * (blocks // length)
        self._bound(free - blocks)

    def give(self, job: Job, blocks: int, free: int) -> None:
        length, before = self.of.pop(job)
        groups = ceil_div(blocks, length)
        self.holes += groups * (256 - 2 * (256 * free // self.blocks))
        if length < self.most:
            self.holes -= 256 * (groups - before)
        self._bound(free + blocks)

    def _bound(self, free: int) -> None:
        self.holes = max(256, min(self.holes, 256 * max(free, 1)))


@dataclass(eq=False)
class SwapState:
    """Of one instance. Times are ticks."""

    now: float = 0
    iterations: int = 0
    epoch: int = -1
    served: set = field(default_factory=set)  # on the device when priorities were drawn
    host_used: int = 0
    on_host: dict = field(default_factory=dict)  # blocks of a job in host memory
    kept: dict = field(default_factory=dict)  # of answers that are out, by request in their order: (blocks, tokens)
    coming_turns: dict = field(default_factory=dict)  # tokens of such a copy that is on the way in, by job
    pool: Pool | None = None
    taken: int = 0  # by decodes in the pass, who take theirs once there are enough for all
    leaving: list = field(default_factory=list)  # (job, when its copy out is through, blocks)
    due: dict = field(default_factory=dict)  # when the copy in is through
    decided: dict = field(default_factory=dict)
    busy: dict = field(default_factory=lambda: {"in": 0, "out": 0})
    delay: float = 0  # of the next iteration
    has_called: bool = False  # the last pass called somebody in
    peak: int = 0  # blocks in use after a pass
    stood: float = 0  # sum of such delays of iterations begun
    at_arrival: dict = field(default_factory=dict)
    waited: dict = field(default_factory=dict)  # by request, ticks
    swaps: dict = field(default_factory=dict)
    left_at: dict = field(default_factory=dict)
    stalled: dict = field(default_factory=dict)  # by request, ticks without a place
    seen: dict = field(default_factory=lambda: dict.fromkeys(
        ("out", "in", "recomputed", "dropped", "drawn_out", "reused_blocks", "boosted", "ties", "in_and_prompt",
         "copied_blocks", "kept", "not_kept", "forgotten", "found", "called", "found_tokens", "held_up"), 0))

    @property
    def leaving_blocks(self) -> int:
        return sum(blocks for _, _, blocks in self.leaving)

    def next_due(self) -> float | None:
        times = [due for _, due, _ in self.leaving] + list(self.due.values())
        return min((t for t in times if t > self.now), default=None)


def key_of(instance: Instance, job: Job) -> tuple:
    rules, s = instance.flags.swapping, instance.swap
    if not rules.period:
        return (0, job.sequence)
    level = draw(job.request.id, s.epoch, 0) * rules.levels >> 16
    if job.request.id in s.served and draw(job.request.id, s.epoch, 1) < round(rules.locality * 65536):
        s.seen["boosted"] += 1
        level //= 2
    return (level, job.sequence)


def line_of(instance: Instance) -> list[Job]:
    """Who waits for a place, in order."""
    def key(job):
        return key_of(instance, job)

    if instance.flags.swapping.period:
        return sorted(instance.swapped + instance.waiting, key=key)
    return sorted(instance.swapped, key=key) + instance.waiting


def run_of(instance: Instance, job: Job) -> int:
    """Blocks of a job that lie in a row."""
    rules, pool = instance.flags.swapping, instance.swap.pool
    return rules.run_blocks if pool is None else pool.of[job][0]


def take_groups(instance: Instance, job: Job, blocks: int) -> None:
    if instance.swap.pool is not None:
        instance.swap.pool.take(job, blocks, instance.free_blocks)


def give_groups(instance: Instance, job: Job) -> None:
    if instance.swap.pool is not None:
        instance.swap.pool.give(job, job.blocks, instance.free_blocks + instance.swap.taken)


def forget_first(s: SwapState) -> None:
    blocks, _ = s.kept.pop(next(iter(s.kept)))
    s.host_used -= blocks
    s.seen["forgotten"] += 1


def answer_is_out(instance: Instance, job: Job, now: float, ticks) -> None:
    """The last token of a job: what is kept of it in host memory."""
    rules, s = instance.flags.swapping, instance.swap
    length = run_of(instance, job)
    give_groups(instance, job)
    clean = s.on_host.pop(job, 0)
    s.host_used -= clean
    if not (rules.turns and rules.reuse):
        return
    used_by_turns = sum(blocks for blocks, _ in s.kept.values())
    if job.blocks > rules.host_blocks - s.host_used + used_by_turns:
        s.seen["not_kept"] += 1
        return
    while job.blocks > rules.host_blocks - s.host_used:
        forget_first(s)
    s.host_used += job.blocks
    s.kept[job.request.id] = (job.blocks, job.computed)
    s.seen["kept"] += 1
    s.seen["copied_blocks"] += job.blocks - clean
    s.seen["reused_blocks"] += clean
    s.busy["out"] = max(now, s.busy["out"]) + ticks(rules.seconds(job.blocks - clean, length))
    if s.busy["out"] > now:
        s.leaving.append((job, s.busy["out"], job.blocks))
        job.blocks = 0


def swap_out(instance: Instance, job: Job, plan: Plan, ticks) -> None:
    """To host memory; recomputed where there is no room."""
    rules, s = instance.flags.swapping, instance.swap
    length = run_of(instance, job)
    give_groups(instance, job)
    instance.running.remove(job)
    job.preemptions += 1
    s.left_at[job.request.id] = s.now
    plan.preempted.append(job)
    clean = s.on_host.get(job, 0)
    lacking = job.blocks - clean
    while s.kept and rules.host_blocks - s.host_used < lacking:
        forget_first(s)
    donors = [other for other in instance.running if s.on_host.get(other, 0)]
    donors.sort(key=lambda other: key_of(instance, other))
    while donors and rules.host_blocks - s.host_used < lacking:
        s.host_used -= s.on_host.pop(donors.pop())
        s.seen["dropped"] += 1
    if rules.host_blocks - s.host_used < lacking:
        s.host_used -= s.on_host.pop(job, 0)
        instance.free_blocks += job.blocks
        job.blocks = 0
        job.lost_tokens += job.computed
        job.computed, job.is_prefilled = 0, False
        instance.waiting.insert(0, job)
        s.seen["recomputed"] += 1
        return
    s.host_used += lacking
    s.on_host[job] = job.blocks
    s.seen["out"] += 1
    s.seen["reused_blocks"] += clean
    s.seen["copied_blocks"] += lacking
    s.swaps[job.request.id] = s.swaps.get(job.request.id, 0) + 1
    instance.swapped.append(job)
    length = ticks(rules.seconds(lacking, length))
    if rules.is_async:
        s.busy["out"] = max(s.now, s.busy["out"]) + length
        s.leaving.append((job, s.busy["out"], job.blocks))
    else:
        s.delay += length
        instance.free_blocks += job.blocks
    job.blocks = 0


def note_return(s: SwapState, job: Job) -> None:
    if job.request.id in s.left_at:
        away = s.now - s.left_at.pop(job.request.id)
        s.stalled[job.request.id] = s.stalled.get(job.request.id, 0) + away


def join(instance: Instance, job: Job, plan: Plan) -> None:
    """Its blocks are here."""
    rules, s = instance.flags.swapping, instance.swap
    kept = job.computed // instance.flags.block_size if rules.reuse else 0
    s.host_used -= s.on_host[job] - kept
    s.on_host[job] = kept
    instance.running.append(job)
    note_return(s, job)
    s.seen["in"] += 1
    plan.add(job, 1)


def begin_turn(instance: Instance, job: Job, tokens: int, plan: Plan) -> None:
    """The copy of the turn before is here."""
    s, kept = instance.swap, tokens // instance.flags.block_size
    s.host_used -= s.on_host[job] - kept
    s.on_host[job] = kept
    job.computed = job.cached_tokens = tokens
    job.hit_tokens += tokens
    instance.running.append(job)
    s.seen["found"] += 1
    s.seen["found_tokens"] += tokens
    plan.add(job, job.known - tokens)


def swapping_pass(instance: Instance, ticks) -> Plan:
    flags, rules, s = instance.flags, instance.flags.swapping, instance.swap
    plan, s.has_called = Plan(budget=flags.max_num_batched_tokens), False
    through = [entry for entry in s.leaving if entry[1] <= s.now]
    s.leaving = [entry for entry in s.leaving if entry[1] > s.now]
    instance.free_blocks += sum(blocks for _, _, blocks in through)

    def held() -> int:
        return len(instance.running) + len(instance.in_transfer)

    if rules.period:
        epoch = s.iterations // rules.period
        if epoch != s.epoch:
            s.epoch = epoch
            s.served = {job.request.id for job in instance.running + instance.in_transfer}
        if s.iterations % rules.period == 0:
            everybody = instance.running + instance.in_transfer + instance.swapped + instance.waiting
            everybody.sort(key=lambda job: key_of(instance, job))
            levels = [key_of(instance, job)[0] for job in everybody]
            s.seen["ties"] += len(levels) - len(set(levels))
            room, places, stay = flags.num_blocks - flags.watermark_blocks, flags.max_num_seqs, []
            for job in everybody:
                room, places = room - ceil_div(job.known, flags.block_size), places - 1
                if room < 0 or places < 0:
                    break
                stay.append(job)
            for job in sorted(instance.running, key=lambda job: key_of(instance, job), reverse=True):
                if job not in stay:
                    swap_out(instance, job, plan, ticks)
                    s.seen["drawn_out"] += 1

    while plan.budget > 0:
        # Turns whose copy is here go first, in the order in which they were called.
        here = [job for job in s.coming_turns if s.due[job] <= s.now]
        if here:
            job = here[0]
            tokens = s.coming_turns[job]
            if job.known - tokens > plan.budget:
                break
            del s.coming_turns[job]
            instance.in_transfer.remove(job)
            s.waited[job.request.id] = s.waited.get(job.request.id, 0) + s.now - s.decided[job]
            del s.due[job]
            begin_turn(instance, job, tokens, plan)
            continue
        line = line_of(instance)
        if not line or line[0] not in instance.waiting:
            break
        job = line[0]
        tokens = 0
        if rules.turns and rules.reuse and job.request.after in s.kept and not job.preemptions:
            tokens = s.kept[job.request.after][1]
            if any(other.request.id == job.request.after for other, _, _ in s.leaving):
                s.seen["held_up"] += 1
                break
        blocks = ceil_div(job.known, flags.block_size)
        if held() >= flags.max_num_seqs or instance.free_blocks - blocks < flags.watermark_blocks:
            break
        if job.known - tokens > plan.budget and not (tokens and rules.is_async):
            break
        instance.waiting.remove(job)
        take_groups(instance, job, blocks)
        instance.free_blocks -= blocks
        job.blocks = blocks
        if not tokens:
            instance.running.append(job)
            note_return(s, job)
            plan.add(job, job.known)
            continue
        s.on_host[job], _ = s.kept.pop(job.request.after)
        length = ticks(rules.seconds(s.on_host[job], run_of(instance, job)))
        if rules.is_async:
            s.busy["in"] = max(s.now, s.busy["in"]) + length
            s.due[job], s.decided[job] = s.busy["in"], s.now
            s.coming_turns[job] = tokens
            instance.in_transfer.append(job)
            s.has_called = True
            s.seen["called"] += 1
        else:
            s.delay += length
            begin_turn(instance, job, tokens, plan)
    if plan.entries:
        s.seen["in_and_prompt"] += bool(instance.swapped)
        return plan

    plan.budget, is_short = UNLIMITED, False
    for job in sorted(instance.running, key=lambda job: key_of(instance, job)):
        while job in instance.running and instance.free_blocks < 1:
            victim = max(instance.running, key=lambda job: key_of(instance, job))
            swap_out(instance, victim, plan, ticks)
            is_short = True
        if job not in instance.running:
            break
        lacking = ceil_div(job.known, flags.block_size) - job.blocks
        instance.free_blocks -= lacking
        s.taken += lacking
        job.blocks += lacking
        plan.add(job, 1)
    s.taken = 0

    for job in [job for job in instance.in_transfer if s.due[job] <= s.now and job not in s.coming_turns]:
        instance.in_transfer.remove(job)
        s.waited[job.request.id] = s.waited.get(job.request.id, 0) + s.now - s.decided[job]
        del s.due[job]
        join(instance, job, plan)

    while not is_short:
        line = line_of(instance)
        if not line or line[0] not in instance.swapped or held() >= flags.max_num_seqs:
            break
        job = line[0]
        if any(other is job for other, _, _ in s.leaving):
            break
        if instance.free_blocks - (s.on_host[job] + 1) < flags.watermark_blocks:
            break
        instance.swapped.remove(job)
        job.blocks = ceil_div(job.known, flags.block_size)
        take_groups(instance, job, job.blocks)
        length = ticks(rules.seconds(s.on_host[job], run_of(instance, job)))
        instance.free_blocks -= job.blocks
        if rules.is_async:
            s.busy["in"] = max(s.now, s.busy["in"]) + length
            s.due[job], s.decided[job] = s.busy["in"], s.now
            instance.in_transfer.append(job)
            s.has_called = True
        else:
            s.delay += length
            join(instance, job, plan)
    return plan
