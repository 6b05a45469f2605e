"""How many instances are on, looked at every `check_s` from the beginning, before the controller of migrations looks.

All that are on are taken together: blocks that are free when all that wait have theirs, by requests. Under `out_below`
the first instance that is off starts and takes requests `startup_s` later; above `in_above`, unless one is starting,
the one with the fewest requests drains. One that is down does neither, and is neither free nor full; one that is on and
down counts among those that may be on, not among those that must be. Where fewer than these are on or starting, and up,
the first that is off and up starts, whatever is free. It is off at the first look, of either controller,
that finds it empty and without a migration.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import inf

from .clock import Clock
from .memory import ceil_div
from .state import Instance


@dataclass(frozen=True)
class Scaling:
    """The band, in blocks a request, and limits of how many are on."""

    check_s: float
    out_below: float
    in_above: float
    startup_s: float
    fewest: int
    most: int


class Fleet:
    """The instances and what they are: off, starting, on, draining."""

    def __init__(self, rules: Scaling, instances: Sequence[Instance], clock: Clock):
        self.rules, self.instances, self.clock = rules, instances, clock
        self.status = ["on" if i < rules.fewest else "off" for i in range(len(instances))]
        self.ready_at, self.since = [0.0] * len(instances), [0.0] * len(instances)
        self.used = 0.0
        self.starts = self.drains = self.drained = self.started_for_lack = 0
        self.changes: list[tuple[float, int]] = []  # who started or began to drain, and when
        self.down: set[int] = set()
        self.down_when = Counter()  # what instances were as they went down

    def able(self, now: float) -> list[int]:
        """Who takes requests."""
        return [i for i in self.those("on", now) if i not in self.down]

    def those(self, status: str, now: float) -> list[int]:
        for i, own in enumerate(self.status):
            if own == "starting" and self.ready_at[i] <= now:
                self.status[i] = "on"
        return [i for i, own in enumerate(self.status) if own == status]

    def switch_off(self, now: float, is_busy) -> None:
        for i in self.those("draining", now):
            if not self.instances[i].outstanding and not is_busy(self.instances[i]):
                self.status[i] = "off"
                self.used += now - self.since[i]
                self.drained += 1

    def look(self, now: float) -> None:
        held = self.those("on", now)
        on = [self.instances[i] for i in held if i not in self.down]
        requests = sum(len(i.running) + len(i.ready) + len(i.waiting) for i in on)
        blocks = sum(i.free_blocks - sum(ceil_div(job.known, i.flags.block_size) for job in i.waiting) for i in on)
        free = Fraction(blocks, requests) if requests else inf
        starting, off = self.those("starting", now), [i for i in self.those("off", now) if i not in self.down]
        up = len(on) + sum(i not in self.down for i in starting)
        is_lacking = up < self.rules.fewest
        self.started_for_lack += bool(is_lacking and free >= self.rules.out_below and off
                                      and len(held) + len(starting) < self.rules.most)
        if (free < self.rules.out_below or is_lacking) and len(held) + len(starting) < self.rules.most and off:
            self.status[off[0]] = "starting"
            self.since[off[0]], self.ready_at[off[0]] = now, now + self.clock.ticks(self.rules.startup_s)
            self.starts += 1
            self.changes.append((now, off[0]))
        elif free > self.rules.in_above and len(on) > self.rules.fewest and not starting:
            least = min(on, key=lambda i: (i.outstanding, i.index))
            self.status[least.index] = "draining"
            self.drains += 1
            self.changes.append((now, least.index))

    def used_until(self, now: float) -> float:
        return self.used + sum(now - self.since[i] for i, own in enumerate(self.status) if own != "off")
