"""Transfers of KV between instances, over links that are served in turn or shared."""

from dataclasses import dataclass
from fractions import Fraction

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
    """The way into a destination is shared in equal parts by whoever is on it (processor sharing).

    What is left of each transfer is kept exactly, as fractions of ticks where times are ticks, and all that are on the
    way are recomputed when one joins. Between joins the one with least left goes first, so all ends follow. A delivery
    is the end, rounded up to the tick, and the latency, in which nothing is shared. With links between pairs of
    instances only transfers of one pair share.
    """

    def __init__(self, latency: float, are_shared: bool, clock: Clock):
        self.latency, self.are_shared, self.clock = latency, are_shared, clock
        self.left: dict[tuple, list[tuple[Transfer, Fraction | float]]] = {}
        self.seen_at: dict[tuple, float] = {}

    def start(self, transfer: Transfer, now: float) -> list[Transfer]:
        """Returns the transfers whose delivery is other than it was."""
        link = ("into", transfer.destination) if self.are_shared else (transfer.source, transfer.destination)
        on_the_way = self._advance(link, now)
        transfer.start = now
        work = Fraction(transfer.work) if self.clock.round_times else transfer.work
        on_the_way.append((transfer, work))
        on_the_way.sort(key=lambda entry: (entry[1], entry[0].key))
        self.left[link], self.seen_at[link] = on_the_way, now
        changed = []
        end, served = now, 0
        for position, (other, left) in enumerate(on_the_way):
            end += (left - served) * (len(on_the_way) - position)
            served = left
            due = self.clock.up(end) + self.latency
            if due != other.due:
                other.due = due
                changed.append(other)
        return changed

    def _advance(self, link: tuple, now: float) -> list[tuple[Transfer, Fraction | float]]:
        """Who is still on the way at `now`, with what is left of each; sorted by what is left."""
        on_the_way, at = list(self.left.get(link, [])), self.seen_at.get(link, 0)
        while on_the_way:
            least = on_the_way[0][1]
            end = at + least * len(on_the_way)
            served = least if end <= now else (now - at) / self.clock.exact(len(on_the_way))
            on_the_way = [(transfer, left - served) for transfer, left in on_the_way]
            if end > now:
                break
            at = end
            on_the_way = [entry for entry in on_the_way if entry[1] > 0]
        return on_the_way
