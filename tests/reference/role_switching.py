"""Instances that change their role: every `sample_s` the queues are measured, every `decide_s` one instance may be told
to move, which it learns at its next poll.

From then on it takes nobody; an encode instance deals its waiting parts out again, in order, to those that still take
any. Every `drain_check_s` after that it is looked at: once nobody is there and no transfer out of it is under way it
has its new role, `switch_s` later if that is not zero. With `deals_anew` the parts that wait when one more instance
encodes are dealt out again to all that do, those of the first instance first. At one instant: measure, decide, polls by
index, looks by index.

The rule: the stage with the longest queue (mean of the measurements since the last decision) gets an instance, unless
all stages have at least half of that; it comes from the stage with the most instances that nobody has told to move, of
those with a shorter queue, unless there is one only. Those that are down count for nothing. The instance with the
fewest requests moves. Ties: encode before prefill before decode, lower index first.

Source: EPD (arXiv 2501.05460).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

from .clock import Clock
from .disaggregation import HandOver
from .encoding import Encoders
from .flags import Flags
from .state import Instance

STAGES = ("encode", "prefill", "decode")

SAMPLE, DECIDE, FIRST_POLL = 2, 3, 4


@dataclass(frozen=True)
class RoleSwitching:
    """Periods in seconds; flags, cost: of an instance of role `prefill` and of role `decode`."""

    flags: Mapping[str, Flags]
    cost: Mapping[str, Callable]
    sample_s: float = 1.0
    decide_s: float = 5.0
    poll_s: float = 2.0
    drain_check_s: float = 1.0
    switch_s: float = 0.0
    deals_anew: bool = False


@dataclass(eq=False)
class Switch:
    """One instance on its way; ticks, None where it has not come so far."""

    instance: int
    source: str
    target: str
    decided: float
    stopped: float | None = None
    emptied: float | None = None
    changed: float | None = None
    dealt: int = 0  # parts dealt out again
    had: tuple = ()  # what it had when it stopped: waiting, at work, kept for transfers


@dataclass(eq=False)
class Controller:
    """Who is told to move, and when it has.

    push(time, number): a turn of this controller at that time; costs: of all instances, changed here; choosers: told of
    the instances that compute prompts whenever these change.
    """

    rules: RoleSwitching
    instances: Sequence[Instance]
    clock: Clock
    encoders: Encoders | None
    hand_over: HandOver
    costs: list
    push: Callable
    tell: Callable
    measured: dict[str, list[int]] = field(default_factory=dict)
    switches: list[Switch] = field(default_factory=list)
    moving: dict[int, Switch] = field(default_factory=dict)
    other_events: int = 0
    seen_events: int = -1
    num_dealt: int = 0  # parts dealt out again
    down: set[int] = field(default_factory=set)  # instances

    def __post_init__(self):
        self.measured = {stage: [] for stage in STAGES}
        for number, seconds in ((SAMPLE, self.rules.sample_s), (DECIDE, self.rules.decide_s)):
            self.push(self.clock.ticks(seconds), number)
        for instance in self.instances:
            self.push(self.clock.ticks(self.rules.poll_s), FIRST_POLL + instance.index)
        self.refresh()

    def refresh(self) -> None:
        """Those who choose see who takes anybody."""
        taking = [one for one in self.instances
                  if one.index not in self.moving or self.moving[one.index].stopped is None]
        self.tell([one for one in taking if one.role == "prefill"])
        self.hand_over.decoding = [one for one in taking if one.role == "decode"]
        if self.encoders is not None:
            self.encoders.able = [self.encoders.instances[one.index] for one in taking if one.role == "encode"]

    def turn(self, number: int, now: float, is_over: bool, is_quiet: bool) -> None:
        """is_over: nobody is left to serve; is_quiet: only turns of this controller are to come."""
        if is_over:
            return
        count = len(self.instances)
        if number == SAMPLE:
            for stage in STAGES:
                self.measured[stage].append(sum(self.queue(one) for one in self.instances if one.role == stage))
            self.push(now + self.clock.ticks(self.rules.sample_s), SAMPLE)
        elif number == DECIDE:
            is_any = self.decide(now)
            are_still = all(switch.stopped is not None and self.is_held(index) for index, switch in self.moving.items())
            if not is_any and is_quiet and are_still and self.other_events == self.seen_events:
                raise ValueError("nothing will ever happen again")
            self.seen_events = self.other_events
            self.push(now + self.clock.ticks(self.rules.decide_s), DECIDE)
        elif number < FIRST_POLL + count:
            self.poll(number - FIRST_POLL, now)
            self.push(now + self.clock.ticks(self.rules.poll_s), number)
        else:
            self.look(number - FIRST_POLL - count, now)

    def queue(self, one: Instance) -> int:
        if one.role == "encode":
            return len(self.encoders.instances[one.index].waiting)
        return sum(map(len, (one.waiting, one.embedding, one.unaccepted, one.in_transfer, one.ready)))

    def load(self, one: Instance) -> int:
        return self.encoders.instances[one.index].outstanding if one.role == "encode" else one.outstanding

    def is_held(self, index: int) -> bool:
        """Somebody is here, or a transfer out of here is to come."""
        one = self.instances[index]
        return bool(self.load(one) or one.leaving or (self.encoders and self.encoders.instances[index].leaving))

    def decide(self, now: float) -> bool:
        samples, self.measured = self.measured, {stage: [] for stage in STAGES}
        free = {stage: [i for i in self.instances if i.role == stage and i.index not in {*self.moving, *self.down}]
                for stage in STAGES}
        mean = {stage: Fraction(sum(samples[stage]), max(len(samples[stage]), 1)) for stage in STAGES if free[stage]}
        if not mean:
            return False
        target = max(mean, key=lambda stage: mean[stage])
        if all(length >= mean[target] / 2 for length in mean.values()):
            return False
        shorter = [stage for stage in mean if stage != target and mean[stage] < mean[target]]
        source = max(shorter, key=lambda stage: len(free[stage]))
        if len(free[source]) <= 1:
            return False
        who = min(free[source], key=lambda one: (self.load(one), one.index))
        switch = Switch(who.index, source, target, now)
        self.switches.append(switch)
        self.moving[who.index] = switch
        return True

    def poll(self, index: int, now: float) -> None:
        switch = self.moving.get(index)
        if switch is None or switch.stopped is not None:
            return
        switch.stopped = now
        self.refresh()
        if switch.source == "encode":
            own = self.encoders.instances[index]
            switch.had = len(own.waiting), len(own.batch), len(own.leaving)
            waiting, own.waiting = own.waiting, []
            switch.dealt = len(waiting)
            self.num_dealt += len(waiting)
            for part in waiting:
                self.encoders.deal(part)
        else:
            one = self.instances[index]
            switch.had = self.queue(one), len(one.running), len(one.leaving)
        self._look_after(index, now, self.rules.drain_check_s)

    def _look_after(self, index: int, now: float, seconds: float) -> None:
        self.push(now + self.clock.ticks(seconds), FIRST_POLL + len(self.instances) + index)

    def look(self, index: int, now: float) -> None:
        switch, one = self.moving[index], self.instances[index]
        if switch.emptied is None:
            if self.is_held(index):
                self._look_after(index, now, self.rules.drain_check_s)
                return
            assert not one.flights and not one.is_pass_due and one.free_blocks == one.flags.num_blocks
            switch.emptied = now
            if self.rules.switch_s > 0:
                self._look_after(index, now, self.rules.switch_s)
                return
        switch.changed = now
        one.role = switch.target
        if one.role != "encode":
            one.flags, self.costs[index] = self.rules.flags[one.role], self.rules.cost[one.role]
            one.free_blocks = one.flags.num_blocks
        del self.moving[index]
        parts = []
        if self.rules.deals_anew and one.role == "encode":
            for other in self.encoders.able:
                parts += other.waiting
                other.waiting = []
        self.refresh()
        self.num_dealt += len(parts)
        for part in parts:
            self.encoders.deal(part)
