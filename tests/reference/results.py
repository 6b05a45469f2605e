"""What a simulation of the reference answers."""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable
from dataclasses import dataclass, field

from .failures import Outages
from .migration import LiveMigration
from .state import BatchStatsRef


@dataclass(frozen=True)
class RequestResult:
    """What happened to one request; times in seconds, `arrival_s` as simulated (on its grid).

    cached_tokens: tokens found in the prefix cache at the first admission; hit_tokens: at all admissions.
    decode_instance, accepted_s, delivered_s: who decoded, and when the transfer to it was accepted and over; None where
    `instance` did it all. With clients, of the last of so many sendings, at last_sent_s, but for arrival_s; status is
    then also timed_out or rejected, and ended_s when that was.
    `instance` did it all. loaded_tokens: at the first admission, from behind the cache; fetched_tokens: of these, from
    a store that instances share. swaps: to host memory; swap_s: seconds between arrival and end by which copies delayed
    iterations of the instance, and those in which this one's own copy was on the way in.
    """

    id: int
    instance: int
    arrival_s: float
    scheduled_s: float  # first admission
    first_token_s: float
    finish_s: float
    preemptions: int
    status: str
    cached_tokens: int = 0
    hit_tokens: int = 0
    decode_instance: int | None = None
    accepted_s: float | None = None
    left_s: float | None = None  # when it left, since it was last lost
    delivered_s: float | None = None
    ended_s: float | None = None
    sendings: int = 1
    last_sent_s: float | None = None
    swaps: int = 0
    swap_s: float = 0.0
    losses: int = 0  # times that an instance went down with it
    restarts: int = 0  # times that another took it then
    loaded_tokens: int = 0
    fetched_tokens: int = 0
    loaded_from: int | None = None  # the instance that gave them, if one did

    @property
    def ttft_s(self) -> float:
        return self.first_token_s - self.arrival_s

    @property
    def e2e_s(self) -> float:
        return self.finish_s - self.arrival_s


@dataclass(frozen=True)
class IterationRecord:
    """One iteration: its batch as {request id: tokens} and the pool just after the pass that composed it.

    `preempted` lists ids in the order they were preempted, also by passes before it that scheduled nothing.
    """

    instance: int
    start_s: float
    duration_s: float
    batch: dict[int, int]
    free_blocks: int
    preempted: tuple[int, ...]
    stats: BatchStatsRef

    @property
    def end_s(self) -> float:
        return self.start_s + self.duration_s


@dataclass(frozen=True)
class TransferRecord:
    """One transfer of KV: it was accepted, had a link to itself or its share of one, and was delivered."""

    request: int
    source: int
    destination: int
    num_bytes: float
    accepted_s: float
    start_s: float
    delivered_s: float


@dataclass(frozen=True)
class PartRecord:
    """Some images of a request: where and when they were encoded, and their embeddings' way."""

    request: int
    owner: int
    tiles: int
    started_s: float
    encoded_s: float
    accepted_s: float
    delivered_s: float


@dataclass(frozen=True)
class ReferenceResult:
    """Requests in the order given, iterations in the order started, and how close arrivals came to ties.

    `transfers` are in the order accepted. `merges_left_out`: times when simdistserve would have put two batches of
    decodes into one before a stage. `live`: the controller of migrations, as it was at the end;
    `outages`: the same of instances that fail; `hand_over`: of hand-overs between instances.
    `lifts`: of virtual token counters that were raised as a request came in;
    `lifts_of_empty`: of these into an empty queue. `turns`: when another request was next only as counters went up.

    `margins` pairs each arrival with the iteration ends (of any instance) next to it, one before, one after
    and one at the same instant if there are: (the earlier of the two times, their distance), in seconds. With
    transfers, deliveries count with the iteration ends, and the order of these among each other decides too (who is
    handed over first, what a router sees), so neighbours that are not at one instant are pairs as well.
    """

    requests: list[RequestResult]
    iterations: list[IterationRecord]
    margins: list[tuple[float, float]]
    transfers: list[TransferRecord] = field(default_factory=list)
    merges_left_out: int = 0
    live: LiveMigration | None = None
    outages: Outages | None = None
    hand_over: object = field(default=None, compare=False)
    parts: list[PartRecord] = field(default_factory=list)
    encode_iterations: dict[int, tuple[int, float]] = field(default_factory=dict)  # number and busy seconds
    encode_waits: int = 0  # requests whose embeddings were not accepted at once
    swapping: list = field(default_factory=list)
    switches: list = field(default_factory=list)  # of roles, in the order decided (`role_switching.Switch`)
    dealt_again: int = 0  # parts of images
    stores: list = field(default_factory=list)
    shared_store: object = None
    lifts: int = 0
    lifts_of_empty: int = 0
    turns: int = 0

    @property
    def smallest_margin_s(self) -> float:
        """Smallest nonzero distance of a pair; infinite if there is none."""
        return min((distance for _, distance in self.margins if distance > 0), default=math.inf)

    @property
    def num_exact_ties(self) -> int:
        """Arrivals at the very instant of an iteration end."""
        return sum(distance == 0 for _, distance in self.margins)

    def unreliable_from_s(self, epsilon_s: float, *, count_exact_ties: bool = True) -> float:
        """First moment when a pair is under `epsilon_s` apart; else infinite.

        A simulator whose clock errs by less takes the same decisions before this moment. Exact ties count
        unless both sides compute exactly (dyadic costs).
        """
        smallest = 0 if count_exact_ties else math.ulp(0)
        close = [at for at, distance in self.margins if smallest <= distance < epsilon_s]
        return min(close, default=math.inf)


def arrival_margins(
    arrivals: list[float], iteration_ends: list[list[float]], to_seconds: Callable[[float], float]
) -> list[tuple[float, float]]:
    """(earlier moment, distance) in seconds of each arrival and the iteration ends next to it."""
    ends = sorted(end for of_instance in iteration_ends for end in of_instance)
    margins = []
    for arrival in arrivals:
        first_at, first_after = bisect_left(ends, arrival), bisect_right(ends, arrival)
        neighbours = ends[max(0, first_at - 1) : first_at] + ends[first_after : first_after + 1]
        neighbours += [arrival] * (first_at < first_after)
        for end in neighbours:
            margins.append((to_seconds(min(arrival, end)), to_seconds(abs(arrival - end))))
    return margins


def neighbour_margins(
    times: list[list[float]], to_seconds: Callable[[float], float]
) -> list[tuple[float, float]]:
    """(moment, distance to the next) in seconds of all distinct times."""
    distinct = sorted({time for some in times for time in some})
    return [(to_seconds(a), to_seconds(b - a)) for a, b in zip(distinct, distinct[1:], strict=False)]
