"""Host memory behind the prefix cache of an instance, block by block: what is stored, loaded and forgotten.

- After a prompt, or a chunk of it, is scheduled, every full block of its tokens so far is in the store, touched from
  the last block to the first: so of what was touched together the end of a prompt is the older. Those beyond the
  capacity go, the longest untouched first. What decodes compute is not stored.
- A request that is admitted takes what the prefix cache has of it, then loads what the store has right behind that, up
  to the block before its last known token.
- The iteration that first schedules a request carries its load, those of all admitted in it one after the other. A
  serial load comes first; layer by layer, a layer is computed once it is loaded and the one before it is computed.

Blocks are known by their content and all that is before them. Nothing is shared with `jaxsim`.

Or a sibling, a fine-tune of the same base, has computed what prompts share: `Sibling`, after DroidSpeak.

Source: LMCache's connector for vLLM, with its defaults (`save_decode_cache: false`), and the LRU of vLLM's own
`OffloadingConnector`, which touches from the end to the start.
"""

from collections import OrderedDict
from dataclasses import dataclass, field

from .prefix_cache import Request


@dataclass(frozen=True)
class Offloading:
    """capacity: blocks of an instance; block_s: seconds that one takes on the link; layers: of the model. remote:
    `remote_store.Remote`, a store behind it that all instances share."""

    capacity: int
    block_s: float
    layers: int = 1
    by_layer: bool = False
    remote: object = None


@dataclass(eq=False)
class HostStore:
    """Of one instance. loading: blocks that the iteration being formed loads; delay: ticks by which loads lengthened
    iterations so far; seen: what happened, by name."""

    rules: Offloading
    blocks: OrderedDict = field(default_factory=OrderedDict)
    loading: int = 0
    delay: float = 0
    seen: dict = field(default_factory=lambda: dict.fromkeys(
        ("loaded_blocks", "loads_together", "evicted_blocks", "own_blocks", "covered", "bound_by_load"), 0))

    def _keys(self, request: Request, num: int) -> list[tuple]:
        keys, parent = [], None
        for index in range(num):
            is_known = index < len(request.hashes)
            parent = (parent, request.hashes[index] if is_known else ("own", request.name, index))
            keys.append(parent)
        return keys

    def find(self, request: Request, start: int, block_size: int) -> int:
        """Blocks from `start` on that need not be computed. Changes nothing."""
        keys = self._keys(request, (request.known_tokens - 1) // block_size)[start:]
        return next((n for n, key in enumerate(keys) if key not in self.blocks), len(keys))

    def load(self, request: Request, start: int, num: int) -> None:
        """So many blocks for a request that is admitted."""
        self.seen["loaded_blocks"] += num
        self.seen["loads_together"] += num > 0 and self.loading > 0
        self.seen["own_blocks"] += max(start + num - max(start, len(request.hashes)), 0)
        self.loading += num

    def store(self, request: Request, tokens: int, block_size: int) -> None:
        """All that is computed of its prompt so far, the end first."""
        for key in reversed(self._keys(request, tokens // block_size)):
            self.blocks[key] = None
            self.blocks.move_to_end(key)
        while len(self.blocks) > self.rules.capacity:
            self.blocks.popitem(last=False)
            self.seen["evicted_blocks"] += 1

    def lengthened(self, compute: float, ticks, cost=None) -> float:
        """Of an iteration that takes `compute` ticks by itself, how long it takes with its loads, in ticks."""
        rules, load_s = self.rules, self.loading * self.rules.block_s
        self.loading = 0
        total = compute + ticks(load_s)
        if rules.by_layer:
            # All layers alike: the loads end to end, then the last layer; or the first load, then all layers.
            load_bound = ticks(load_s) + ticks(compute_s(compute, ticks) / rules.layers)
            compute_bound = compute + ticks(load_s / rules.layers)
            total = max(load_bound, compute_bound)
            if load_s:
                self.seen["bound_by_load" if load_bound > compute_bound else "covered"] += 1
        self.delay += total - compute
        return total


def compute_s(compute: float, ticks) -> float:
    """Seconds of so many ticks, whatever one is."""
    return compute / ticks(1.0)


@dataclass(frozen=True)
class Sibling:
    """Another fine-tune of the base has computed all that prompts share. share: of the layers that are recomputed;
    hidden_s, kv_s: seconds of a block's hidden states, and of its KV in the other layers, on the link; latency_s: of
    the link, for each of both; pipelined: KV comes while layers are recomputed."""

    share: float
    hidden_s: float
    kv_s: float
    latency_s: float = 0.0
    pipelined: bool = True


@dataclass(eq=False)
class SiblingStore:
    """As `HostStore`, of contexts that are all there. given: of the iteration being formed, the blocks that each
    request had and those that it has then; block_size: of the last of them."""

    rules: Sibling
    given: list[tuple[int, int]] = field(default_factory=list)
    block_size: int = 0
    delay: float = 0
    seen: dict = field(default_factory=lambda: dict.fromkeys(
        ("loaded_blocks", "loads_together", "covered", "bound_by_load"), 0))

    def find(self, request: Request, start: int, block_size: int) -> int:
        self.block_size = block_size
        return max(min(len(request.hashes), (request.known_tokens - 1) // block_size) - start, 0)

    def load(self, request: Request, start: int, num: int) -> None:
        if num:
            self.seen["loaded_blocks"] += num
            self.seen["loads_together"] += bool(self.given)
            self.given.append((start, start + num))

    def store(self, request: Request, tokens: int, block_size: int) -> None:
        """Nothing is stored."""

    def lengthened(self, compute: float, ticks, cost) -> float:
        """cost: seconds of an iteration that computes one prompt's tokens from some number to another."""
        rules, given, self.given = self.rules, self.given, []
        if not given:
            return compute
        blocks = sum(end - start for start, end in given)
        size = self.block_size
        recompute = sum(ticks(rules.share * cost(start * size, end * size)) for start, end in given)
        entry = ticks(blocks * rules.hidden_s + rules.latency_s) if rules.share > 0 else 0
        load = ticks(blocks * rules.kv_s + rules.latency_s) if rules.share < 1 else 0
        self.seen["bound_by_load" if load > recompute else "covered"] += 1
        longer = entry + (max(recompute, load) if rules.pipelined else recompute + load)
        self.delay += longer
        return compute + longer


def store_of(rules: Offloading | Sibling) -> HostStore | SiblingStore:
    """What is behind the cache of an instance."""
    return SiblingStore(rules) if isinstance(rules, Sibling) else HostStore(rules)
