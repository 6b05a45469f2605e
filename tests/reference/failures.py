"""Instances that are down for a while: what they lose, and what becomes of it.

An instance that goes down forgets everything: the iteration in flight gives nobody a token, all blocks are free, nobody
runs or waits there. Who was there is sent on by the router at that instant, in the order of arrivals of that instant,
with all tokens that were emitted, which are computed again elsewhere; at most so often, else that sending has failed.
Nobody is sent to an instance that is down. With all of them down whoever comes is refused; who was lost has failed.

Events at one instant: ends of iterations, timeouts, instances that come back, instances that go down (both by number),
looks of controllers, arrivals by request, scheduling passes.

A migration that the instance is in is broken off first (`migration.LiveMigration.break_off`), and so are hand-overs
(`disaggregation.HandOver.break_off`): who is on the way to another instance is lost with either.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from .clock import ARRIVAL_GRID_TICKS, Clock
from .disaggregation import HandOver
from .memory import release
from .migration import LiveMigration
from .state import Instance, Job

PHASE_OUTAGE = 1.75  # behind timeouts, before arrivals
BACK, DOWN = 0, 1


@dataclass(frozen=True)
class Failures:
    """outages: instance, from when and up to when it is down. most_restarts: times that a sending is sent on."""

    outages: tuple[tuple[int, float, float], ...] = ()
    most_restarts: float = float("inf")


@dataclass(frozen=True)
class Loss:
    """One request that was lost: when, in which sending, where, whether it ran, and was sent on; tokens it had."""

    time_s: float
    request: int
    sending: int
    instance: int
    ran: bool
    is_sent_on: bool
    emitted: int
    computed: int
    preemptions: int
    was: str = ""  # ready, or stopped for a migration; else it ran or waited


@dataclass(eq=False)
class Outages:
    """Who is down, and what was lost so far."""

    rules: Failures
    instances: Sequence[Instance]
    clock: Clock
    down: set[int] = field(default_factory=set)
    ends: dict[int, float] = field(default_factory=dict)  # of the iterations in flight
    losses: list[Loss] = field(default_factory=list)
    losses_of: Counter = field(default_factory=Counter)  # by job
    restarts: Counter = field(default_factory=Counter)
    refused_all_down: int = 0
    num_unheard: int = 0
    num_given_up: int = 0  # whose clients were gone, in iterations that were lost
    whole_ends: dict[int, set[float]] = field(default_factory=dict)  # of iterations, by instance (s)
    preempted: list[tuple[float, int]] = field(default_factory=list)  # when (s) and who
    live: LiveMigration | None = None
    hand_over: HandOver | None = None
    ask_for_pass: Callable[[Instance], None] | None = None

    def events(self) -> list[tuple]:
        """The changes, for the heap."""
        found = []
        for instance, start_s, end_s in self.rules.outages:
            start, end = (self.clock.ticks(at, ARRIVAL_GRID_TICKS) for at in (start_s, end_s))
            assert start < end
            found += [(start, PHASE_OUTAGE, (DOWN, instance)), (end, PHASE_OUTAGE, (BACK, instance))]
        return found

    def go_down(self, index: int, now: float) -> tuple[list[Job], list[Job]]:
        """Empties an instance. Returns who is to be sent on, and whose sending has failed."""
        instance = self.instances[index]
        assert index not in self.down, "down twice"
        self.down.add(index)
        self.ends.pop(index, None)
        for flight in instance.flights:
            for job, tokens in flight:
                self.num_unheard += job.scheduled_tokens == job.known
                job.pending -= tokens
                job.lost_tokens += tokens
        instance.flights.clear()
        instance.stage_free = [0] * len(instance.stage_free)
        sent_on, failed = [], []
        stopped = self.live.break_off(instance, now) if self.live else []
        moving = self.hand_over.break_off(instance, now, self.ask_for_pass) if self.hand_over else []
        with_kv = moving + instance.running + instance.ready + stopped
        for job in with_kv + instance.waiting:
            ran = job in with_kv
            if ran:
                release(instance, job)
            if job.is_given_up:
                self.num_given_up += 1
                continue
            self.losses_of[id(job)] += 1
            is_sent_on = job.restarts < self.rules.most_restarts
            self.losses.append(Loss(self.clock.seconds(now), job.request.id, job.sending, index, ran, is_sent_on,
                                    job.emitted, job.computed, job.preemptions,
                                    "ready" if job in instance.ready else "stopped" if job in stopped else
                                    "moving" if job in moving else ""))
            job.decode_instance = job.accepted = job.delivered = job.left = None
            job.transfers_before = len(self.hand_over.transfers) if self.hand_over else 0
            (sent_on if is_sent_on else failed).append(job)
            if is_sent_on:
                job.restarts += 1
                job.is_on_its_way = True
                job.lost_tokens += job.computed
                job.computed, job.is_prefilled, job.is_newcomer = 0, False, False
                job.preemptions_before = job.preemptions
        for queue in (instance.running, instance.waiting, instance.ready):
            queue.clear()
        instance.waiting_at_start = None
        assert instance.free_blocks == instance.flags.num_blocks, "blocks of nobody"
        return sent_on, failed
