"""Contexts that instances give each other, block by block, for the reference: who has what now, and on which link.

A job that is admitted takes what its own prefix cache has of it, then what another instance has right behind that. To
have a block is to have it in the prefix cache, under its key, and to have computed it: blocks that the iteration in
flight there computes or loads are not asked for. The instance with the longest chain from the start of the prompt
gives, of several one of the same variant, then the first.

Every instance has a link out and one in. A context is on both from where both are free; hidden states first. Who has
them from another variant computes a share of the layers meanwhile, at what an iteration of these tokens alone costs.

Nothing here is shared with `jaxsim`. Source: DroidSpeak (arXiv 2411.02820).
"""

from collections import Counter
from dataclasses import dataclass, field

from .prefix_cache import Request


@dataclass(frozen=True)
class Lending:
    """share: of the layers that are computed again; hidden_s, kv_s, whole_kv_s: seconds on a link of a block's hidden
    states, of its KV in the other layers, and in all; latency_s: of either transfer; pipelined: KV comes meanwhile."""

    share: float
    hidden_s: float
    kv_s: float
    whole_kv_s: float
    latency_s: float = 0.0
    pipelined: bool = True


@dataclass(eq=False)
class Borrower:
    """What an instance takes from the others. waited, hidden, kv, layers: ticks, of the iteration being formed; linked:
    on its link so far; delay: by which iterations were longer; lender: of the last context asked for."""

    rules: Lending
    own: object
    now: float = 0
    waited: float = 0
    hidden: float = 0
    kv: float = 0
    layers: list = field(default_factory=list)
    linked: float = 0
    delay: float = 0
    lender: int | None = None
    seen: Counter = field(default_factory=Counter)
    loaded_blocks: int = 0
    ever: set = field(default_factory=set)
    asked_for: dict = field(default_factory=dict)  # by job, the first block of what is loaded in the iteration formed
    coming: dict = field(default_factory=dict)  # and in the one in flight
    asked: tuple = ()

    def meet(self, instances: list, variants: int, links_out: dict, ticks) -> None:
        """All of them, how many variants they serve, and when their links out are free, which all of them write to."""
        self.instances, self.variants, self.links_out, self.ticks = instances, variants, links_out, ticks

    def is_same(self, other) -> bool:
        return other.index % self.variants == self.own.index % self.variants

    def _chain(self, other, request: Request) -> tuple[int, bool]:
        """Blocks that another instance has from the start on, and whether only the iteration in flight keeps it from
        having more."""
        size = self.own.flags.block_size
        unfinished = {other.cache.held[job.request.id][index] for flight in other.flights for job, _ in flight
                      for index in range(other.store.coming.get(job.request.id, job.computed // size),
                                         job.scheduled_tokens // size)}
        asked = Request(("asked", request.name), request.hashes, request.known_tokens)
        for index in range(min(len(request.hashes), (request.known_tokens - 1) // size)):
            key = other.cache._key(asked, index)
            blocks = set(other.cache.blocks_of_key.get(key, ()))
            if not blocks - unfinished:
                return index, bool(blocks)
        return min(len(request.hashes), (request.known_tokens - 1) // size), False

    def find(self, request: Request, start: int, block_size: int) -> int:
        best, self.lender, most, early = 0, None, [], False
        for other in self.instances:
            if other is self.own:
                continue
            blocks, is_early = self._chain(other, request)
            early |= is_early and blocks >= start
            most.append((blocks, self.is_same(other), other.index))
        self.asked = early, most
        if most:
            best = max(blocks for blocks, *_ in most)
            self.lender = min((not is_same, index) for blocks, is_same, index in most if blocks == best)[1]
        return max(best - start, 0)

    def load(self, request: Request, start: int, num: int) -> None:
        early, most = self.asked
        self.seen["too_early"] += early
        whole = min(len(request.hashes), (request.known_tokens - 1) // self.own.flags.block_size)
        following = request.hashes[: start + num + 1]
        self.seen["dropped"] += start + num < whole and not early and any(
            following in other.store.ever for other in self.instances if other is not self.own)
        if not num:
            return
        self.loaded_blocks += num
        self.asked_for[request.name] = start
        rules, lender = self.rules, self.instances[self.lender]
        is_same = self.is_same(lender)
        hidden = kv = 0
        if is_same:
            kv = self.ticks(num * rules.whole_kv_s + rules.latency_s)
        else:
            if rules.share > 0:
                hidden = self.ticks(num * rules.hidden_s + rules.latency_s)
            if rules.share < 1:
                kv = self.ticks(num * rules.kv_s + rules.latency_s)
            self.layers.append((start, start + num))
        mine = self.now + self.waited + self.hidden + self.kv
        begin = max(mine, self.links_out.get(self.lender, 0))
        self.links_out[self.lender] = begin + hidden + kv
        self.waited, self.hidden, self.kv = self.waited + begin - mine, self.hidden + hidden, self.kv + kv
        self.linked += hidden + kv
        self.seen["waits"] += begin > mine
        self.seen["loads"] += 1
        self.seen["from_same" if is_same else "from_sibling"] += 1
        self.seen["together"] += len(self.layers) > 1
        self.seen["behind_own"] += start > 0
        self.seen["parts"] += start + num < whole
        self.seen["ties"] += sum(blocks == start + num for blocks, *_ in most) > 1

    def store(self, request: Request, tokens: int, block_size: int) -> None:
        """Nothing is kept but what the cache keeps; only what was here at all is noted."""
        for index in range(min(len(request.hashes), tokens // block_size)):
            self.ever.add(request.hashes[: index + 1])

    def lengthened(self, compute: float, ticks, cost) -> float:
        """cost: seconds of an iteration that computes one prompt's tokens from some number to another."""
        size = self.own.flags.block_size
        again = sum(ticks(self.rules.share * cost(start * size, end * size)) for start, end in self.layers)
        if self.layers and self.kv:
            self.seen["bound_by_link" if self.kv > again else "bound_by_layers"] += 1
        longer = self.waited + self.hidden + (max(again, self.kv) if self.rules.pipelined else again + self.kv)
        self.waited = self.hidden = self.kv = 0
        self.layers, self.coming, self.asked_for = [], self.asked_for, {}
        self.delay += longer
        return compute + longer
