"""Images encoded on instances of their own: parts of a request, a cache of tiles, and the way to who computes prompts.

An arriving request with images is dealt out in parts, one an image or one in all, to the encode instances. Such an
instance has a queue of parts and runs batches from its front: while there are fewer parts in the batch than
`max_batch`, and its tiles with those of the parts encoded and still here fit the cache; the first that does not ends
the batch. A batch takes base + tiles x per tile seconds, and all its parts are done at its end, in order.

With its last part a request goes to an instance that computes prompts, chosen at that instant, which accepts from the
front of those it has not, until one does not fit, whenever somebody joins them, a part is delivered to it, or an
iteration of it ends: while accepted requests that no pass has taken hold fewer tiles than a share of its cache, and
there is room. All parts are then sent at once, in order, each out of where it was encoded. When the last is here the
request waits as if it arrived now. Its tiles stay until its first token is out.

Source: EPD (arXiv 2501.05460).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from .clock import Clock
from .disaggregation import HandOver
from .routing import ROUTERS
from .state import Instance, Job, Request
from .transfers import Transfer


@dataclass(frozen=True)
class Encoding:
    """Rules of the encode instances (role `encode` of `Disaggregation`) and of the embeddings' way.

    is_split: a part for each image, otherwise one in all. cache_tiles: of every cache, on both sides; base_s, tile_s:
    of a batch; bytes_per_tile: of embeddings, over the links of KV.
    """

    is_split: bool = True
    dealing: str = "round_robin"
    max_batch: int = 1
    cache_tiles: int = 3000
    waiting_share: float = 0.05
    base_s: float = 0.0
    tile_s: float = 0.0
    bytes_per_tile: float = 0.0


@dataclass(eq=False)
class Part:
    """Some images of a request."""

    job: Job
    tiles: int
    owner: int | None = None
    started: float | None = None
    encoded: float | None = None
    accepted: float | None = None
    delivered: float | None = None

    @property
    def request(self) -> Request:
        return self.job.request


@dataclass(eq=False)
class EncodeInstance:
    """As routers see it: what waits or is being encoded is outstanding."""

    index: int
    cache_tiles: int
    waiting: list[Part] = field(default_factory=list)
    batch: list[Part] = field(default_factory=list)
    leaving: list[Part] = field(default_factory=list)
    is_pass_due: bool = False
    num_iterations: int = 0
    busy: float = 0

    @property
    def outstanding(self) -> int:
        return len(self.waiting) + len(self.batch)

    @property
    def free_blocks(self) -> int:
        return self.cache_tiles - sum(part.tiles for part in self.batch + self.leaving)


class Encoders:
    """All encode instances, and the requests between them and their prompts.

    choose(job) -> the instance that computes its prompt; expect_end, expect_pass: put such an event of an instance into
    the heap; enter(instance, job): the request joins its queue.
    """

    def __init__(self, rules: Encoding, roles: Sequence[str], jobs: Sequence[Job], clock: Clock, hand_over: HandOver,
                 choose: Callable, expect_end: Callable, expect_pass: Callable, enter: Callable,
                 can_switch: bool = False):
        self.rules, self.clock, self.hand_over = rules, clock, hand_over
        self.choose, self.expect_end, self.expect_pass, self.enter = choose, expect_end, expect_pass, enter
        self.instances = {i: EncodeInstance(i, rules.cache_tiles) for i, role in enumerate(roles)
                          if role == "encode" or can_switch}
        self.able = list(self.instances.values())  # who takes parts
        self.num_dealt = 0
        self.parts: dict[int, list[Part]] = {}
        for job in jobs:
            tiles = job.request.tiles
            if tiles:
                self.parts[job.request.id] = [Part(job, n) for n in (tiles if rules.is_split else (sum(tiles),))]
                if sum(tiles) > rules.cache_tiles:
                    raise ValueError(f"request {job.request.id}: more tiles than a cache has")
        self.unaccepted: dict[int, list[Job]] = {}
        self.tiles_held: dict[int, dict[int, int]] = {}  # by instance and request, until the first token
        self.not_taken: dict[int, set[int]] = {}  # requests of these that no pass has taken
        self.waits = 0  # requests that were not accepted at once

    def arrive(self, job: Job) -> None:
        for part in self.parts[job.request.id]:
            self.deal(part)

    def deal(self, part: Part) -> None:
        chosen = self.able[ROUTERS[self.rules.dealing](part.request, self.able, self.num_dealt)]
        self.num_dealt += 1
        part.owner = chosen.index
        chosen.waiting.append(part)
        self.ask(chosen)

    def ask(self, instance: EncodeInstance) -> None:
        if instance.waiting and not instance.batch and not instance.is_pass_due:
            instance.is_pass_due = True
            self.expect_pass(instance.index)

    def start(self, index: int, now: float) -> None:
        instance = self.instances[index]
        instance.is_pass_due = False
        if not instance.waiting:
            return  # others have them now
        while instance.waiting and len(instance.batch) < self.rules.max_batch:
            if instance.waiting[0].tiles > instance.free_blocks:
                break
            instance.batch.append(instance.waiting.pop(0))
        assert instance.free_blocks >= 0
        if not instance.batch:
            assert instance.leaving, "an idle encode instance is stuck"
            return
        for part in instance.batch:
            part.started = now
        tiles = sum(part.tiles for part in instance.batch)
        took = self.clock.ticks(self.rules.base_s + self.rules.tile_s * tiles)
        instance.num_iterations += 1
        instance.busy += took
        self.expect_end(index, now + took)

    def end(self, index: int, now: float) -> None:
        instance = self.instances[index]
        done, instance.batch = instance.batch, []
        instance.leaving += done
        for part in done:
            part.encoded = now
            if all(other.encoded is not None for other in self.parts[part.request.id]):
                target = self.choose(part.job)
                self.unaccepted.setdefault(target.index, []).append(part.job)
                target.embedding.append(part.job)
                self.accept(target, now)
                self.waits += self.parts[part.request.id][0].accepted is None
        self.ask(instance)

    def accept(self, instance: Instance, now: float) -> None:
        queue = self.unaccepted.get(instance.index, [])
        held = self.tiles_held.setdefault(instance.index, {})
        not_taken = self.not_taken.setdefault(instance.index, set())
        while queue:
            job = queue[0]
            tiles = sum(job.request.tiles)
            if sum(held[name] for name in not_taken) >= self.rules.waiting_share * self.rules.cache_tiles:
                return
            if sum(held.values()) + tiles > self.rules.cache_tiles:
                return
            del queue[0]
            held[job.request.id] = tiles
            not_taken.add(job.request.id)
            for part in self.parts[job.request.id]:
                part.accepted = now
                self._send(part, instance, now)

    def _send(self, part: Part, instance: Instance, now: float) -> None:
        num_bytes, over = part.tiles * self.rules.bytes_per_tile, self.hand_over
        seconds = num_bytes / over.way(part.owner, instance.index).bandwidth
        over.send(part, part.owner, instance.index, num_bytes, self.clock.ticks(seconds), now)

    def deliver(self, transfer: Transfer, instance: Instance, now: float) -> None:
        part = transfer.job
        source = self.instances[part.owner]
        source.leaving.remove(part)
        part.delivered = now
        if all(other.delivered is not None for other in self.parts[part.request.id]):
            instance.embedding.remove(part.job)
            self.enter(instance, part.job)
        self.accept(instance, now)
        self.ask(source)

    def taken(self, instance: Instance, job: Job) -> None:
        """A pass has taken it for the first time."""
        self.not_taken.get(instance.index, set()).discard(job.request.id)

    def release(self, instance: Instance, job: Job) -> None:
        """Its first token is out."""
        self.tiles_held.get(instance.index, {}).pop(job.request.id, None)

    def check_end(self) -> None:
        """All parts were encoded and delivered once, and all caches are empty."""
        for instance in self.instances.values():
            assert not instance.waiting and not instance.batch and not instance.leaving
        assert not any(self.unaccepted.values()) and not any(map(len, self.tiles_held.values()))
        for parts in self.parts.values():
            latest = max(part.encoded for part in parts)
            assert all(part.job.arrival <= part.started <= part.encoded <= latest <= part.accepted <= part.delivered
                       <= part.job.scheduled for part in parts)
            assert len({part.accepted for part in parts}) == 1
