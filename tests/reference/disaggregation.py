"""Prefill and decode on different instances: roles, the hand-over between them, and what happens at a delivery.

A prompt that completes on a prefill instance emits the first token there. If more are to come the request leaves the
running list at that instant, in running-list order, its blocks stay, and a decode instance is chosen at once, which
has it as `unaccepted`. That one accepts from the front, until one does not fit, whenever

- somebody joins `unaccepted`, a transfer to it ends, or an iteration of it ends (after who finished has left, before
  its pass).

Accepting takes ceil(prompt / block_size) blocks there and hands the transfer to the links. `pull`: while fewer blocks
than a share of the pool are held by requests that are accepted and do not run yet, and enough are free; `push`: when
enough are free. At the delivery the prefill side gives its blocks back (until then they count against admissions there,
and a head of queue that waits for them is tried again), and the request is ready: it joins a pass of the decode
instance as a decode with its context, in the order of deliveries, before the requests that wait (`passes.join_held`).

Source: DistServe (arXiv 2401.09670), LLMServe/DistServe `distserve/decoding_stage_scheduler.py` (pull, its share
`waiting_block_prop_threshold`). Layer-wise overlap: the transfer of a layer may start when the layer is computed
(Splitwise, arXiv 2311.18677, section 4.2).

Known gaps: a decode instance has no prefix cache; a transfer moves the whole prompt whatever the decode side knows;
overlap hides a transfer behind the last iteration of its prompt only, as if the link had been free for it.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from .clock import Clock
from .flags import UNLIMITED, Flags
from .memory import ceil_div, keep_for_transfer, release_source, take
from .routing import ROUTERS, Router
from .state import Instance, Job
from .transfers import FairLinks, FifoLinks, MaxMinLinks, Transfer

WHOLE = 720720

ROLES = ("mixed", "prefill", "decode", "encode")


@dataclass(frozen=True)
class NamedLink:
    """Of what goes from one pool to another: bytes/s and latency; whether all instances of these share it."""

    bandwidth: float
    latency_s: float = 0.0
    is_shared: bool = False


@dataclass(frozen=True)
class Disaggregation:
    """Who does what, and how KV gets from one to the other.

    - roles: of each instance, `mixed`, `prefill`, `decode` or `encode` (`encoding`).
    - decode_router: a name of `ROUTERS` or a function (request, decode instances, handed over so far) -> index.
    - hand_over: `pull` or `push`; waiting_block_share: of a pool, for `pull`.
    - bytes_per_token: KV of one token of a prompt; bandwidth in bytes/s and latency_s of a link. Where no bytes or
      infinite bandwidth leave nothing to wait for, a transfer takes the latency alone and no link.
    - discipline: `fifo`, `fair` or `max_min` (`transfers`); links: one a `pair` of instances, or `shared`: the way out
      of each prefill and into each decode instance.
    - named_links: by the names of two pools, from and to, what is there instead of bandwidth and latency_s; pools: of
      each instance, its role if left out. With any of these a transfer takes a tick at least.
    - overlap_layers: layers of the model, whose KV is sent as each is computed: what is left of a transfer when its
      iteration ends is what took longer than the iteration, at least one layer. 0: sent as a whole.
    """

    roles: Sequence[str]
    decode_router: str | Router = "least_outstanding"
    hand_over: str = "pull"
    waiting_block_share: float = 0.05
    bytes_per_token: float = 0.0
    bandwidth: float = math.inf
    latency_s: float = 0.0
    discipline: str = "fifo"
    links: str = "shared"
    overlap_layers: int = 0
    named_links: Mapping[tuple[str, str], NamedLink] = field(default_factory=dict)
    pools: Sequence[str] | None = None

    def __post_init__(self):
        for name, allowed in (
            ("hand_over", ("pull", "push")),
            ("discipline", ("fifo", "fair", "max_min")),
            ("links", ("shared", "pair")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} = {getattr(self, name)!r}: one of {allowed}")
        if not set(self.roles) <= set(ROLES):
            raise ValueError(f"roles = {self.roles!r}: of {ROLES}")
        if ("prefill" in self.roles) != ("decode" in self.roles):
            raise ValueError("prefill and decode instances need each other")
        if not self.waiting_block_share > 0:
            raise ValueError("waiting_block_share must be positive: nothing would be accepted")
        if not self.bandwidth > 0 or self.bytes_per_token < 0 or self.latency_s < 0:
            raise ValueError("needs bandwidth > 0, bytes_per_token >= 0, latency_s >= 0")

    def refuse_flags(self, all_flags: Sequence[Flags]) -> None:
        """Raises ValueError for rules of an engine that have no meaning in their role."""
        for role, flags in zip(self.roles, all_flags, strict=True):
            if role in ("mixed", "encode") or not flags.track_blocks:
                continue
            if flags.reserve not in ("none", "prompt"):
                raise ValueError(f"role {role} needs reserve none or prompt: the other half holds the rest")
            if role == "decode" and flags.prefix_caching:
                raise ValueError("a decode instance has no prefix cache")
        for role, flags in zip(self.roles, all_flags, strict=True):
            if role == "decode" and flags.decode_context_limit is not None and flags.max_num_seqs < UNLIMITED:
                raise ValueError("decode_context_limit on a decode instance takes all that come")


class HandOver:
    """Moves requests from prefill to decode instances.

    `expect(transfer)` is called for each transfer whose delivery is due at another time than before.
    """

    def __init__(self, rules: Disaggregation, instances: Sequence[Instance], clock: Clock,
                 expect: Callable[[Transfer], None]):
        self.rules, self.instances, self.clock, self.expect = rules, instances, clock, expect
        self.route = ROUTERS[rules.decode_router] if isinstance(rules.decode_router, str) else rules.decode_router
        self.decoding = [instance for instance in instances if instance.role == "decode"]
        are_shared = rules.links == "shared"
        self.links = {"fifo": FifoLinks, "fair": FairLinks, "max_min": MaxMinLinks}[rules.discipline](
            are_shared, *([] if rules.discipline == "fifo" else [clock]))
        self.num_handed_over = 0
        self.transfers: list[Transfer] = []  # in the order accepted
        self.down: set[int] = set()  # instances
        self.lost: list[tuple[str, int]] = []  # how far who was lost on the way had come, and how many tokens it had
        self.waited_for_any = 0  # left with all that decode down

    def leave(self, source: Instance, job: Job, now: float) -> None:
        """A prompt is complete and more tokens are to come."""
        keep_for_transfer(source, job)
        job.left = now
        up = [instance for instance in self.decoding if instance.index not in self.down]
        self.waited_for_any += not up
        able = up or self.decoding
        destination = able[self.route(job.request, able, self.num_handed_over)]
        self.num_handed_over += 1
        job.decode_instance = destination.index
        destination.unaccepted.append(job)
        self.accept(destination, now)

    def accept(self, instance: Instance, now: float) -> None:
        """From the front of `unaccepted`, until one does not fit; nobody while it is down."""
        while instance.unaccepted and instance.index not in self.down:
            job = instance.unaccepted[0]
            blocks = self._blocks(job, instance.flags)
            not_running = sum(other.blocks for other in instance.in_transfer + instance.ready)
            is_over = not_running >= self.rules.waiting_block_share * instance.flags.num_blocks
            if (self.rules.hand_over == "pull" and is_over) or blocks > instance.free_blocks:
                return
            del instance.unaccepted[0]
            take(instance, job, blocks)
            instance.in_transfer.append(job)
            job.accepted = now
            self._send(job, now)

    def deliver(self, transfer: Transfer, now: float) -> None:
        """The decode side has the KV."""
        job = transfer.job
        source, destination = self.instances[transfer.source], self.instances[transfer.destination]
        destination.in_transfer.remove(job)
        release_source(source, job)
        job.delivered = now
        if destination.flags.decode_context_limit is None:
            destination.ready.append(job)
        else:
            destination.running.append(job)  # its only queue
        self.accept(destination, now)

    def break_off(self, failing: Instance, now: float, ask_for_pass: Callable[[Instance], None]) -> list[Job]:
        """An instance goes down. Returns who had its KV there, or on the way from or to there, and runs nowhere.

        Other instances have the blocks back that they held for these. Links stay taken for as long as they were to be.
        """
        lost = []
        for other in self.instances:
            if other is failing:
                continue
            mine = [job for job in other.unaccepted + other.in_transfer if job in failing.leaving]
            for job in mine:
                self._forget(other, job)
                release_source(failing, job)
            if mine:
                self.accept(other, now)
                ask_for_pass(other)
            lost += mine
        for job in failing.in_transfer + failing.unaccepted:
            source = self.instances[job.instance]
            self._forget(failing, job)
            release_source(source, job)
            ask_for_pass(source)
            lost.append(job)
        return lost

    def _forget(self, destination: Instance, job: Job) -> None:
        if job in destination.unaccepted:
            destination.unaccepted.remove(job)
            self.lost.append(("unaccepted", job.emitted))
            return
        destination.in_transfer.remove(job)
        destination.free_blocks += job.blocks
        job.blocks = 0
        self.lost.append(("in transfer", job.emitted))
        for transfer in self.transfers:
            if transfer.job is job and transfer.delivered is None:
                transfer.is_cut = True

    @staticmethod
    def _blocks(job: Job, flags: Flags) -> int:
        return ceil_div(job.computed, flags.block_size) if flags.track_blocks else 0

    def _send(self, job: Job, now: float) -> None:
        num_bytes = job.computed * self.rules.bytes_per_token
        seconds = num_bytes / self.way(job.instance, job.decode_instance).bandwidth
        work = self.clock.ticks(seconds)
        if self.rules.overlap_layers:
            work = max(work - job.iteration, self.clock.ticks(seconds / self.rules.overlap_layers))
        self.send(job, job.instance, job.decode_instance, num_bytes, work, now)

    def send(self, what, source: int, destination: int, num_bytes: float, work: float, now: float) -> None:
        """What is left of it takes `work` alone."""
        way, pair = self.way(source, destination), (self._pool(source), self._pool(destination))
        if self.rules.named_links and self.clock.round_times:
            work = max(work, 1)
        transfer = Transfer(what, source, destination, num_bytes, work, now, len(self.transfers),
                            self.clock.ticks(way.latency_s), pair if way.is_shared else None)
        if self.rules.discipline == "max_min" and self.rules.named_links:
            transfer.parts = self._parts(*pair)
        self.transfers.append(transfer)
        if work > 0:
            changed = self.links.start(transfer, now)
        else:
            transfer.start, transfer.due = now, now + transfer.latency
            changed = [transfer]
        for other in changed:
            self.expect(other)

    def _pool(self, instance: int) -> str:
        return self.instances[instance].role if self.rules.pools is None else self.rules.pools[instance]

    def way(self, source: int, destination: int) -> NamedLink:
        """What goes from one instance to another goes over this."""
        pair = self._pool(source), self._pool(destination)
        return self.rules.named_links.get(pair) or NamedLink(self.rules.bandwidth, self.rules.latency_s)

    def _parts(self, source: str, destination: str) -> tuple[int, int, int]:
        """How fast a way is, and the fastest out of the one pool and into the other, of the fastest of all."""
        speeds = {(self._pool(i.index), self._pool(j.index)): self.way(i.index, j.index).bandwidth
                  for i in self.instances for j in self.instances if (i.role, j.role) == ("prefill", "decode")}
        fastest = max(speeds.values())
        parts = {pair: round(WHOLE * speed / fastest) for pair, speed in speeds.items()}
        return (parts[source, destination], max(n for (i, _), n in parts.items() if i == source),
                max(n for (_, j), n in parts.items() if j == destination))
