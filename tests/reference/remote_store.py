"""A store that all instances share, behind the prefix cache and host memory of each, block by block.

- What an iteration computes of prompts is in the store when that iteration ends: every full block of each prompt so
  far, whole or in chunks, those that were found or loaded among them.
- With a capacity, room for these is made as they are scheduled. Then every run of them is touched, the end of the
  prompt first, with all blocks of the run that have room: a run is as long as the same prompts share it, and so is what
  only one of them has. The longest untouched blocks go, also where they are on their way.
- A request that is admitted takes what the prefix cache has; from there on every block comes from host memory, or if
  that does not have it from the store, up to the first that neither has.
- An iteration waits for its loads. Those from the store begin when it has answered, and when its egress has given out
  what earlier iterations asked for, if all instances share one; a block takes the link, or the egress where that is
  slower, and keeps the egress for its own time there.

Blocks are known by their content and all that is before them. Nothing is shared with `jaxsim`.

Source: LMCache's connector for vLLM with a local and a remote backend.
"""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from .prefix_cache import Request


@dataclass(frozen=True)
class Remote:
    """link_s: seconds of a block on an instance's link; egress_s: of the egress, None without a limit; latency_s: until
    the store has answered; capacity: blocks, None without a limit."""

    link_s: float
    latency_s: float = 0.0
    egress_s: float | None = None
    capacity: int | None = None


@dataclass(eq=False)
class SharedStore:
    """blocks: those that are there, and who has put them; coming: of each instance, what the iteration in flight or
    being formed will put; egress_free: ticks until which the egress is busy. With a capacity, order: all blocks that
    have room, the longest untouched first; runs: of every block of a known prompt, those with it, in order."""

    capacity: int | None = None
    runs: dict[tuple, list[tuple]] = field(default_factory=dict)
    order: OrderedDict = field(default_factory=OrderedDict)
    num_evicted: int = 0
    evicted_on_the_way: int = 0
    touched_beyond: int = 0  # blocks of runs of which a prompt has less so far
    blocks: dict[tuple, set[int]] = field(default_factory=dict)
    coming: dict[int, set[tuple]] = field(default_factory=dict)
    egress_free: float = 0

    def iteration_ended(self, instance: int) -> None:
        for key in self.coming.pop(instance, ()):
            self.blocks.setdefault(key, set()).add(instance)


    def touch(self, keys: list[tuple]) -> None:
        """Make room for these blocks of a prompt, from its first on; evict others."""
        if self.capacity is None:
            return
        for key in keys:
            self.order.setdefault(key, None)
        done: set[tuple] = set()
        for key in reversed(keys):
            for one in reversed(self.runs.get(key, keys)):
                # What is of nobody else is a run, from behind what is known to where it ends now.
                if one not in done and one in self.order and (key in self.runs or one not in self.runs):
                    self.order.move_to_end(one)
                    self.touched_beyond += one not in keys
                    done.add(one)
        while len(self.order) > self.capacity:
            key, _ = self.order.popitem(last=False)
            self.num_evicted += 1
            self.blocks.pop(key, None)
            for coming in self.coming.values():
                self.evicted_on_the_way += key in coming
                coming.discard(key)


class TieredStore:
    """As `offload.HostStore`, of an instance: host memory, and the store behind it. now: tells the time in ticks."""

    def __init__(self, host, rules: Remote, shared: SharedStore, instance: int, now: Callable[[], float]):
        self.host, self.remote, self.shared, self.instance, self.now = host, rules, shared, instance, now
        self.fetching = self.delay = self.loads = 0
        self.seen = host.seen
        self.seen.update(dict.fromkeys(
            ("fetched_blocks", "foreign_blocks", "both", "too_early", "waits", "at_once"), 0))

    @property
    def blocks(self):
        return self.host.blocks

    def find(self, request: Request, start: int, block_size: int) -> int:
        keys = self.host._keys(request, (request.known_tokens - 1) // block_size)[start:]
        for number, key in enumerate(keys):
            if key not in self.host.blocks and key not in self.shared.blocks:
                return number
        return len(keys)

    def load(self, request: Request, start: int, num: int) -> int:
        """Returns how many of these blocks come from the store."""
        keys = self.host._keys(request, start + num + 1)
        fetched = [key for key in keys[start:start + num] if key not in self.host.blocks]
        self.seen["loaded_blocks"] += num
        self.seen["loads_together"] += num > 0 and self.loads > 0
        self.seen["own_blocks"] += max(start + num - max(start, len(request.hashes)), 0)
        self.seen["fetched_blocks"] += len(fetched)
        self.seen["foreign_blocks"] += sum(self.instance not in self.shared.blocks[key] for key in fetched)
        self.seen["both"] += 0 < len(fetched) < num
        # Another instance computes the next one right now.
        self.seen["too_early"] += any(keys[-1] in coming for other, coming in self.shared.coming.items()
                                      if other != self.instance)
        self.loads += num
        self.fetching += len(fetched)
        return len(fetched)

    def store(self, request: Request, tokens: int, block_size: int) -> None:
        self.host.store(request, tokens, block_size)
        keys = self.host._keys(request, tokens // block_size)
        self.shared.coming.setdefault(self.instance, set()).update(keys)
        self.shared.touch(keys)

    def iteration_ended(self) -> None:
        self.shared.iteration_ended(self.instance)

    def lengthened(self, compute: float, ticks, cost=None) -> float:
        rules, host, shared, now = self.remote, self.host.rules, self.shared, self.now()
        own, fetched, self.loads, self.fetching = self.loads - self.fetching, self.fetching, 0, 0
        block_s = rules.link_s if rules.egress_s is None else max(rules.link_s, rules.egress_s)
        begin = now
        if fetched:
            begin = now + ticks(rules.latency_s)
            if rules.egress_s is not None:
                self.seen["waits"] += shared.egress_free > begin
                self.seen["at_once"] += shared.egress_free == begin
                begin = max(begin, shared.egress_free)
                shared.egress_free = begin + ticks(fetched * rules.egress_s)
        # All layers alike, one after the other through the link and through the device, if they overlap at all.
        load_s, layers = own * host.block_s + fetched * block_s, host.layers if host.by_layer else 1
        is_loaded = begin
        done = begin
        for _ in range(layers):
            is_loaded += ticks(load_s / layers)
            done = max(done, is_loaded) + compute / layers
        if host.by_layer and load_s:
            self.seen["bound_by_load" if ticks(load_s) > compute else "covered"] += 1
        self.delay += done - now - compute
        return done - now


def runs_of(requests: list, block_size: int) -> dict[tuple, list[tuple]]:
    """Of every block of a known prompt, the run with it: blocks that the same prompts have, and may find (all but the
    last token of one)."""
    holders: dict[tuple, set] = {}
    for number, request in enumerate(requests):
        parent = None
        for index, content in enumerate(request.prefix_hashes):
            parent = (parent, content)
            may_find = (request.prompt - 1) // block_size > index
            holders.setdefault(parent, set()).update({(number, "has")} | ({(number, "finds")} if may_find else set()))
    together: dict[frozenset, list[tuple]] = {}
    # Parents come before their children, as they were entered.
    for key, those in holders.items():
        together.setdefault(frozenset(those), []).append(key)
    return {key: run for run in together.values() for key in run}


def connect(instances: list, requests: list, now: Callable[[], float]) -> SharedStore | None:
    """Put one store behind the host memory of all instances, if their rules say so."""
    rules = {instance.index: getattr(instance.flags.offloading, "remote", None) for instance in instances}
    first = next((remote for remote in rules.values() if remote is not None), None)
    if first is None:
        return None
    shared = SharedStore(first.capacity, runs_of(requests, instances[0].flags.block_size))
    for instance in instances:
        instance.store = TieredStore(instance.store, rules[instance.index], shared, instance.index, now)
    return shared
