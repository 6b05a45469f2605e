"""Transfers of KV between instances, over links that are served in turn or shared."""

from collections.abc import Hashable, Iterable
from dataclasses import dataclass

from .clock import Clock
from .state import Job


@dataclass(eq=False)
class Transfer:
    """The KV of one prompt on its way. `work` is the time that what is left of it when it is accepted takes alone,
    without the `latency`; ticks. over: a link that others between these pools share, if there is one; parts: how fast
    it is alone, of which the fastest of all has `WHOLE`, and the most that its source and its destination can do.
    """

    job: Job
    source: int
    destination: int
    num_bytes: float
    work: float
    accepted: float
    number: int  # in the order accepted
    latency: float = 0
    over: Hashable = None
    parts: tuple[int, int, int] = (720720, 720720, 720720)
    start: float | None = None
    delivered: float | None = None
    is_cut: bool = False  # one of its ends went down; its links stay taken
    due: float | None = None  # when it will be delivered, as far as is known

    @property
    def key(self) -> int:
        """Order of deliveries at one instant."""
        return self.number


class FifoLinks:
    """Each link carries one transfer after the other, in the order accepted.

    A transfer occupies the way out of its source and the way into its destination from `start = max(now, both free)` to
    `start + latency + bytes / bandwidth`, and so it does the link that its pools share. With links between pairs of
    instances both are the link of the pair.
    """

    def __init__(self, are_shared: bool):
        self.are_shared = are_shared
        self.busy_until: dict[tuple, float] = {}

    def start(self, transfer: Transfer, now: float) -> list[Transfer]:
        """Returns the transfers whose delivery is now known."""
        if self.are_shared:
            ends = [("out of", transfer.source), ("into", transfer.destination)]
        else:
            ends = [(transfer.source, transfer.destination)]
        if transfer.over is not None:
            ends.append(("over", transfer.over))
        transfer.start = max(now, *(self.busy_until.get(end, 0) for end in ends))
        transfer.due = transfer.start + transfer.latency + transfer.work
        for end in ends:
            self.busy_until[end] = transfer.due
        return [transfer]


class FairLinks:
    """Every transfer goes at an equal part of the busier of its two ends: the way out of its source and the way into
    its destination, each shared by whoever is on it. With links between pairs of instances both are the pair's.

    Whenever a transfer begins or ends, anywhere, what is left of each is reckoned anew, rounded up to the tick where
    times are ticks: it was served the time gone by divided by the number of those who share, rounded down. All ends
    that follow if nobody else joins are worked out at every join. A delivery is the end and the latency, in which
    nothing is shared. A link that pools share is a third end.
    """

    def __init__(self, are_shared: bool, clock: Clock):
        self.are_shared, self.clock = are_shared, clock
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
            due = end + other.latency
            if due != other.due:
                other.due = due
                changed.append(other)
        return changed

    def _served(self, left: dict[Transfer, float], at: float, until: float | None
                ) -> tuple[dict[Transfer, float], dict[Transfer, float]]:
        """What is left of whom at `until`, None: until all are through; and who ended when."""
        left, ends = dict(left), {}
        while left:
            parts = self._speeds(left)
            end, _, first = min((at + self._alone(left[one], *parts[one]), one.key, one) for one in left)
            if until is not None and end > until:
                break
            self._serve(left, parts, end - at)
            ends[first], at = end, end
            del left[first]
        if left:
            self._serve(left, self._speeds(left), until - at)
        return left, ends

    def _alone(self, left: float, parts: int, whole: int) -> float:
        """How long it takes at this speed."""
        return -(-left * whole // parts) if self.clock.round_times else left * whole / parts

    def _serve(self, left: dict[Transfer, float], speeds: dict[Transfer, tuple[int, int]], span: float) -> None:
        for one, (parts, whole) in speeds.items():
            left[one] -= span * parts // whole if self.clock.round_times else span * parts / whole

    def _speeds(self, among: Iterable[Transfer]) -> dict[Transfer, tuple[int, int]]:
        """Of its own speed, parts of a whole."""
        return {one: (1, self._sharing(one, among)) for one in among}

    def _sharing(self, one: Transfer, among: Iterable[Transfer]) -> int:
        over = 0 if one.over is None else sum(other.over == one.over for other in among)
        if not self.are_shared:
            return max(over, sum((other.source, other.destination) == (one.source, one.destination) for other in among))
        return max(over, sum(other.source == one.source for other in among),
                   sum(other.destination == one.destination for other in among))


class MaxMinLinks(FairLinks):
    """As fair ones, at max-min fair speeds: of all things that are used (ways out, ways in, links that pools share,
    what a transfer can do alone) the one that has least for each who is not settled settles all who use it, and so on.

    In whole parts: each gets the whole part of an equal share, those of all things that have equally little at once.
    """

    def _speeds(self, among: Iterable[Transfer]) -> dict[Transfer, tuple[int, int]]:
        room, users = {}, {}
        for one in among:
            alone, sends, takes = one.parts
            things = [(("alone", one), alone), (("out of", one.source), sends), (("into", one.destination), takes)]
            if not self.are_shared:
                things[1:] = [((one.source, one.destination), alone)]
            if one.over is not None:
                things.append((("over", one.over), alone))
            for thing, most in things:
                assert room.setdefault(thing, most) == most
                users.setdefault(thing, []).append(one)
        speeds: dict[Transfer, tuple[int, int]] = {}
        while users:
            share = {thing: room[thing] // len(waiting) for thing, waiting in users.items()}
            least = min(share.values())
            settled = {one for thing in users if share[thing] == least for one in users[thing]}
            for one in settled:
                speeds[one] = least, one.parts[0]
            for thing, waiting in users.items():
                room[thing] -= least * sum(one in settled for one in waiting)
            users = {thing: rest for thing, waiting in users.items()
                     if (rest := [one for one in waiting if one not in settled])}
        return speeds
