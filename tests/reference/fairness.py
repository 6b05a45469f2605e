"""Orders of the waiting queue other than first come first served: sorted ones, and virtual token counters.

Source: Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024, Algorithm 2 (lines as there); what it does
not say: a preempted request comes in again (lines 7 to 13) at the front of its tenant's, and is charged once.
"""

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import TYPE_CHECKING

from .flags import Flags

if TYPE_CHECKING:
    from .state import Job


def queue_key(job: "Job", flags: Flags) -> tuple:
    """By which a sorted queue is sorted, and the largest of which is preempted."""
    if flags.order == "least_slack":
        return slack_ms(job, flags), job.request.id
    key = {"priority": job.request.priority, "sjf": job.request.predicted,
           "edf": job.request.arrival_s + job.request.limit_s}[flags.order]
    return key, job.request.id


def slack_ms(job: "Job", flags: Flags) -> int:
    """Whole milliseconds to the deadline less those of its work, halves of these up, as of time zero."""
    emitted = 0 if flags.keeps_slack else job.emitted
    work = Fraction(flags.pace[0], 64) * (job.request.prompt + emitted)
    work += Fraction(flags.pace[1], 64) * max(job.request.predicted - emitted, 1)
    return round(1e3 * (job.request.arrival_s + job.request.limit_s)) - math.floor(work + Fraction(1, 2))


class VirtualTokenCounters:
    """The counters of one instance."""

    def __init__(self, prices: Sequence[tuple[float, float]]):
        self.prices = prices
        self.counters = {tenant: 0 for tenant in range(len(prices))}
        self.last: int | None = None  # who left the queue last
        self.lifts = self.lifts_of_empty = 0  # that raised a counter
        self.turns = 0  # when another was next although nobody had come in or gone
        self.head: int | None = None

    def come_in(self, job: "Job", waiting: "list[Job]") -> None:
        u, self.head = job.request.tenant, None
        if any(other.request.tenant == u for other in waiting):  # line 7
            return
        before = self.counters[u]
        if not waiting:
            if self.last is not None:
                self.counters[u] = max(before, self.counters[self.last])  # line 10
            self.lifts_of_empty += self.counters[u] > before
        else:
            self.counters[u] = max(before, min(self.counters[i.request.tenant] for i in waiting))  # line 13
        self.lifts += self.counters[u] > before

    def next_of(self, waiting: "list[Job]") -> "Job | None":
        """Lines 20, 21; of equal counters the first tenant's."""
        if not waiting:
            return None
        k = min((job.request.tenant for job in waiting), key=lambda tenant: (self.counters[tenant], tenant))
        self.turns += self.head not in (None, k)
        self.head = k
        return next(job for job in waiting if job.request.tenant == k)

    def admit(self, job: "Job") -> None:
        """Line 23."""
        self.last, self.head = job.request.tenant, None
        if not job.preemptions:
            self.counters[self.last] += self.prices[self.last][0] * job.request.prompt

    def produce(self, job: "Job") -> None:
        """Line 29, for one of them."""
        self.counters[job.request.tenant] += self.prices[job.request.tenant][1]
