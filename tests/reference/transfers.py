"""Transfers of KV between instances, over links that are served in turn or shared."""

from collections.abc import Iterable
from dataclasses import dataclass

from .clock import Clock
from .state import Job


@dataclass(eq=False)
class Transfer:
    """The KV of one prompt on its way. `work` is the time that what is left of it when it is accepted takes alone,
    without the latency; ticks.
    """

    job: Job
    source: int
    destination: int
    num_bytes: float
    work: float
    accepted: float
    number: int  # in the order accepted
    start: float | None = None
    due: float | None = None  # when it will be delivered, as far as is known

    @property
    def key(self) -> int:
        """Order of deliveries at one instant."""
        return self.number


class FifoLinks:
    """Each link carries one transfer after the other, in the order accepted.

    A transfer occupies the way out of its source and the way into its destination from `start = max(now, both free)` to
    `start + latency + bytes / bandwidth`. With links between pairs of instances both are the link of the pair.
    """

    def __init__(self, latency: float, are_shared: bool):
        self.latency, self.are_shared = latency, are_shared
        self.busy_until: dict[tuple, float] = {}

    def start(self, transfer: Transfer, now: float) -> list[Transfer]:
        """Returns the transfers whose delivery is now known."""
        if self.are_shared:
            ends = [("out of", transfer.source), ("into", transfer.destination)]
        else:
            ends = [(transfer.source, transfer.destination)]
        transfer.start = max(now, *(self.busy_until.get(end, 0) for end in ends))
        transfer.due = transfer.start + self.latency + transfer.work
        for end in ends:
            self.busy_until[end] = transfer.due
        return [transfer]


class FairLinks:
    """Every transfer goes at an equal part of the busier of its two ends: the way out of its source and the way into
    its destination, each shared by whoever is on it. With links between pairs of instances both are the pair's.

    Whenever a transfer begins or ends, anywhere, what is left of each is reckoned anew, rounded up to the tick where
    times are ticks: it was served the time gone by divided by the number of those who share, rounded down. All ends
    that follow if nobody else joins are worked out at every join. A delivery is the end and the latency, in which
    nothing is shared.
    """

    def __init__(self, latency: float, are_shared: bool, clock: Clock):
        self.latency, self.are_shared, self.clock = latency, are_shared, clock
        self.left: dict[Transfer, float] = {}
        self.seen_at = 0

    def start(self, transfer: Transfer, now: float) -> list[Transfer]:
        """Returns the transfers whose delivery is other than it was."""
        self.left, _ = self._served(self.left, self.seen_at, now)
        self.seen_at = now
        transfer.start = now
        self.left[transfer] = transfer.work
        _, ends = self._served(self.left, now, None)
        changed = []
        for other, end in ends.items():
            due = end + self.latency
            if due != other.due:
                other.due = due
                changed.append(other)
        return changed

    def _served(self, left: dict[Transfer, float], at: float, until: float | None
                ) -> tuple[dict[Transfer, float], dict[Transfer, float]]:
        """What is left of whom at `until`, None: until all are through; and who ended when."""
        left, ends = dict(left), {}
        while left:
            parts = {one: self._sharing(one, left) for one in left}
            end, _, first = min((at + left[one] * parts[one], one.key, one) for one in left)
            if until is not None and end > until:
                break
            self._serve(left, parts, end - at)
            ends[first], at = end, end
            del left[first]
        if left:
            self._serve(left, {one: self._sharing(one, left) for one in left}, until - at)
        return left, ends

    def _serve(self, left: dict[Transfer, float], parts: dict[Transfer, int], span: float) -> None:
        for one, sharing in parts.items():
            left[one] -= span // sharing if self.clock.round_times else span / sharing

    def _sharing(self, one: Transfer, among: Iterable[Transfer]) -> int:
        if not self.are_shared:
            return sum((other.source, other.destination) == (one.source, one.destination) for other in among)
        return max(sum(other.source == one.source for other in among),
                   sum(other.destination == one.destination for other in among))
