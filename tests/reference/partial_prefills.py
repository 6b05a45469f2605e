"""Several partly computed prompts side by side, in the order of deadlines, slack or relative slack.

Lists of jobs, looked at one after the other; slack in whole parts of a second (2^-16 s), relative slack in float32.
Source: Medha, arXiv 2409.17264; who fits where is said in `compose`.
"""

from dataclasses import dataclass, field, replace
from fractions import Fraction
from math import floor

import numpy as np

from .flags import Flags
from .long_contexts import chunk_in_time
from .memory import blocks_at_admission, take
from .state import Instance, Job, Plan

PART = Fraction(1, 1 << 16)
MOST = 1 << 30


@dataclass
class Seen:
    """What happened: prompts that a later one passed while partly computed, of which long ones; passes in which a long
    one stood back since another had its chunk; prompts that stood back for time, and for a row; batches of several
    prompts; equal keys at the front."""

    passed: int = 0
    passed_long: int = 0
    one_long_only: int = 0
    no_time: int = 0
    no_row: int = 0
    shared: int = 0
    tied: int = 0
    shares: set = field(default_factory=set)


@dataclass(frozen=True)
class SideBySide:
    """count: rows of partly computed prompts; order: fcfs, edf, lrs or lars; long_tokens: longer prompts are long, of
    which at most most_long are begun; most_slack: of relative slack, by which a long one leaves time to others; factor:
    of the work, by which requests are due later; works: parts of prompts of 0, step, 2 step, ... tokens."""

    count: int
    order: str
    long_tokens: int
    most_long: int
    most_slack: float
    factor: float
    works: tuple[int, ...]
    step: int
    seen: Seen = field(default_factory=Seen, compare=False)

    def work(self, tokens: int) -> int:
        cell, rest = divmod(tokens, self.step)
        rise = self.works[cell + 1] - self.works[cell]
        return self.works[cell] + (rise * rest) // self.step

    def is_long(self, job: Job) -> bool:
        return job.request.prompt > self.long_tokens

    def left(self, job: Job, now: int) -> int:
        """Parts until it is due, the nearest number; now: ticks of 2^-30 s."""
        more = np.rint(np.float32(self.factor) * np.float32(self.work(job.request.prompt)))
        limit = round(Fraction(job.request.limit_s) / PART) + int(more)
        until = Fraction(job.arrival - now, 1 << 30) / PART + limit
        return min(max(floor(until + Fraction(1, 2)), -MOST), MOST)

    def slack(self, job: Job, now: int) -> int:
        done = self.work(job.scheduled_tokens) if job.scheduled_tokens else 0
        return self.left(job, now) - (self.work(job.request.prompt) - done)

    def relative(self, job: Job, now: int) -> np.float32:
        return np.float32(self.slack(job, now)) / np.float32(self.work(job.request.prompt))

    def key(self, job: Job, now: int):
        return {"fcfs": lambda: job.request.id, "edf": lambda: self.left(job, now),
                "lrs": lambda: self.slack(job, now), "lars": lambda: self.relative(job, now)}[self.order]()

    def target(self, job: Job, now: int, target_s: float) -> float:
        if self.order != "lars" or not self.is_long(job):
            return target_s
        share = np.float32(1) - np.clip(self.relative(job, now), np.float32(0), np.float32(self.most_slack))
        return float(np.float32(share * np.float32(target_s)))


def compose(instance: Instance, plan: Plan, flags: Flags) -> None:
    """All decodes, then one prompt after the other.

    Whoever has the smallest key of those begun and those waiting has its turn, and only one: as many tokens as fit the
    time. One that is begun goes without if none fit. One that waits and does not fit keeps all others waiting, unless
    it is long and only time lacks. One long prompt a batch. Nobody is preempted: all blocks were taken at the start.
    """
    rules: SideBySide = flags.side_by_side
    now, seen = instance.now(), rules.seen

    def is_full() -> bool:
        return len(plan.entries) >= flags.max_batch_seqs

    for job in instance.running:
        if job.is_prefilled and not job.pending and not is_full():
            plan.add(job, 1)
    begun = [job for job in instance.running if not job.is_prefilled and job.scheduled_tokens < job.known]
    had_turn: list[Job] = []
    is_open, long_turn = True, False
    while plan.budget > 0 and not is_full():
        rows = [job for job in instance.running if not job.is_prefilled and job.scheduled_tokens + _of(plan, job)
                < job.known]
        queue = [job for job in rows if job not in had_turn]
        longs = sum(map(rules.is_long, rows))
        queue += [job for job in instance.waiting if is_open and (longs < rules.most_long or not rules.is_long(job))]
        barred = [job for job in queue if long_turn and rules.is_long(job)]
        seen.one_long_only += bool(barred)
        queue = [job for job in queue if job not in barred]
        if not queue:
            break
        job = min(queue, key=lambda one: (rules.key(one, now), one.request.id))
        seen.tied += sum(rules.key(one, now) == rules.key(job, now) for one in queue) > 1
        is_begun = job in rows
        most = min(job.known - job.scheduled_tokens, plan.budget)
        target = rules.target(job, now, flags.target_s)
        tokens = chunk_in_time(plan, job, most, replace(flags, target_s=target), instance.predict)
        had_turn.append(job)
        if tokens is None:
            seen.no_time += 1
            if rules.is_long(job):
                long_turn = True
            elif not is_begun:
                is_open = False
            continue
        if not is_begun:
            blocks = blocks_at_admission(job, tokens, flags)
            is_cut = tokens < job.known
            fits = (len(instance.running) < flags.max_num_seqs
                    and instance.free_blocks - blocks >= flags.watermark_blocks)
            seen.no_row += fits and is_cut and len(rows) >= rules.count
            if not fits or (is_cut and len(rows) >= rules.count):
                is_open = False
                continue
            instance.waiting.remove(job)
            instance.running.append(job)
            take(instance, job, blocks)
            is_passing = [one for one in begun if one not in had_turn and one.request.id < job.request.id]
            seen.passed += bool(is_passing)
            seen.passed_long += any(map(rules.is_long, is_passing))
        plan.add(job, tokens)
        if rules.is_long(job):
            seen.shares.add(target / flags.target_s)
            long_turn = True
    chunks = [job for job, _ in plan.entries if not job.is_prefilled]
    seen.shared += len(chunks) > 1
    assert sum(map(rules.is_long, chunks)) <= 1


def _of(plan: Plan, job: Job) -> int:
    return sum(tokens for other, tokens in plan.entries if other is job)
