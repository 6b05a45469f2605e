"""The prefix cache of vLLM V1, block by block: a second opinion on cached tokens and on evictions.

Every block is an integer with a reference count and perhaps a key; a hit, an eviction and a release are done
the way the engine does them, one block at a time. Nothing here is fast and nothing is shared with `jaxsim`.

- A key stands for a block's tokens and all before them: it is made of the parent's key and the block's hash.
  Only full blocks get one, and get it when their last token is *scheduled*, so a request admitted next, in the
  same pass even, hits them while the first still computes (`KVCacheManager.allocate_slots`, `cache_blocks`).
- A look-up follows the keys from the start to the first miss and stops one token before the end of what is
  known of the request, in whole blocks: a fully cached prompt computes its last block again
  (`KVCacheManager.get_computed_blocks`, `FullAttentionManager.find_longest_cache_hit`).
- Equal blocks are not merged, a block table only grows: both copies stay, and a look-up takes the older entry
  (`BlockHashToBlockMap`: "We currently don't de-duplicate the blocks in the cache"). So of two requests that
  share a prompt the second hits what was scheduled for the first before it came, and computes the rest again.
- A hit block gains a reference and leaves the free queue if it was in it; as it takes a free block away, it
  counts as one in the check that there are enough (`get_num_blocks_to_allocate`).
- New blocks come from the front of the free queue and lose their key there. Nothing else evicts.
- A request that ends or is preempted gives its blocks back in reverse order, those nobody else holds go to the
  end of the free queue: the tail of a chain goes first. From PR 42656 (May 2026) on, blocks without a key go
  to the front instead: `partial_first`.

Source: vllm-project/vllm, `vllm/v1/core/{block_pool,kv_cache_manager,single_type_kv_cache_manager}.py` and
`docs/design/prefix_caching.md`; behaviour before PR 42656 is that of v0.8 to v0.19.

Known gaps: one group of full-attention layers; no sliding window, no lookahead or draft tokens, no watermark,
no connector. The engine's null block is left out: its pool of n blocks is one of n - 1 here, ids less by one.
"""

from collections import OrderedDict
from collections.abc import Hashable, Iterable
from dataclasses import dataclass


@dataclass(eq=False)
class Request:
    """A request as the cache sees it.

    - name: identifies it in one cache; blocks without a hash of their own are equal only under one name.
    - hashes: what distinguishes the tokens of each leading block, full ones only. Blocks behind them (more
      prompt, output) are nobody else's.
    - known_tokens: prompt and output so far; whoever decodes adds one a token, before it is computed.
    """

    name: Hashable
    hashes: tuple[Hashable, ...]
    known_tokens: int


def split_hashes(ids: Iterable[Hashable], ratio: int, full_blocks: int) -> tuple[Hashable, ...]:
    """Hashes of a prompt's full blocks where one id of a trace stands for `ratio` blocks of the engine."""
    return tuple((h, part) for h in ids for part in range(ratio))[:full_blocks]


class PrefixCache:
    """The blocks of one instance and who holds them."""

    def __init__(self, num_blocks: int, block_size: int, *, partial_first: bool = False):
        self.num_blocks, self.block_size, self.partial_first = num_blocks, block_size, partial_first
        self.free_queue: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))  # next to go first
        self.references = [0] * num_blocks
        self.key_of_block: list[int | None] = [None] * num_blocks
        self.blocks_of_key: dict[int, dict[int, None]] = {}  # oldest entry first
        self.held: dict[Hashable, list[int]] = {}  # block tables of running requests
        self.computed: dict[Hashable, int] = {}  # tokens scheduled so far, cached ones included
        self._num_keyed: dict[Hashable, int] = {}
        self._keys: dict[tuple[int, Hashable], int] = {}
        self._chains: dict[Hashable, list[int]] = {}

    @property
    def num_free(self) -> int:
        """Blocks nobody holds, cached or not."""
        return len(self.free_queue)

    def lookup(self, request: Request) -> int:
        """Tokens of the request that need not be computed if it is admitted now. Changes nothing."""
        return len(self._hit(request)) * self.block_size

    def blocks_to_allocate(self, request: Request, num_tokens: int) -> int:
        """Free blocks that admission takes: new ones, and those hit that nobody holds. Changes nothing."""
        hit = self._hit(request)
        num_new = self._blocks(len(hit) * self.block_size + num_tokens) - len(hit)
        return num_new + sum(self.references[block] == 0 for block in hit)

    def allocate(self, request: Request, num_tokens: int | None = None) -> bool:
        """Admit a request: hold what is cached, and room for `num_tokens` more (default: all that is known).

        False, and nothing changed, if there are not enough free blocks.
        """
        assert request.name not in self.held, "it is already running"
        hit = self._hit(request)
        cached = len(hit) * self.block_size
        num_tokens = request.known_tokens - cached if num_tokens is None else num_tokens
        assert 1 <= num_tokens <= request.known_tokens - cached
        if self.blocks_to_allocate(request, num_tokens) > self.num_free:
            return False
        num_new = self._blocks(cached + num_tokens) - len(hit)
        for block in hit:
            if self.references[block] == 0:
                del self.free_queue[block]
            self.references[block] += 1
        self.held[request.name] = hit
        self._num_keyed[request.name] = len(hit)
        self._extend(request, num_new, cached + num_tokens)
        return True

    def grow(self, request: Request, num_tokens: int = 1) -> bool:
        """Room for the next `num_tokens` of a running request, known ones; False if there is none."""
        tokens = self.computed[request.name] + num_tokens
        assert num_tokens >= 1 and tokens <= request.known_tokens
        num_new = self._blocks(tokens) - len(self.held[request.name])
        if num_new > self.num_free:
            return False
        self._extend(request, num_new, tokens)
        return True

    def free(self, request: Request) -> None:
        """Give the blocks back: the request has finished or is preempted."""
        released = []
        for block in reversed(self.held.pop(request.name)):
            self.references[block] -= 1
            if self.references[block] == 0:
                released.append(block)
        to_front = [b for b in released if self.partial_first and self.key_of_block[b] is None]
        for block in released:
            self.free_queue[block] = None
        for block in reversed(to_front):
            self.free_queue.move_to_end(block, last=False)
        del self.computed[request.name], self._num_keyed[request.name]
        self._chains.pop(request.name, None)

    def check(self) -> None:
        """What always holds: every block is free or held, is counted once a holder, and is found by its key."""
        holders = [0] * self.num_blocks
        for blocks in self.held.values():
            assert len(set(blocks)) == len(blocks)
            for block in blocks:
                holders[block] += 1
        assert holders == self.references
        assert set(self.free_queue) == {b for b in range(self.num_blocks) if not holders[b]}
        entries = {(b, key) for key, blocks in self.blocks_of_key.items() for b in blocks}
        assert entries == {(b, key) for b, key in enumerate(self.key_of_block) if key is not None}
        assert all(self.blocks_of_key.values())
        for name, blocks in self.held.items():
            full = self.computed[name] // self.block_size
            assert len(blocks) == self._blocks(self.computed[name])
            assert [self.key_of_block[b] for b in blocks[:full]] == self._chains.get(name, [])[:full]
            assert all(self.key_of_block[b] is None for b in blocks[full:])

    def _blocks(self, tokens: int) -> int:
        return -(-tokens // self.block_size)

    def _key(self, request: Request, index: int) -> int:
        chain = self._chains.setdefault(request.name, [])
        while len(chain) <= index:
            at = len(chain)
            content = request.hashes[at] if at < len(request.hashes) else ("of", request.name, at)
            chain.append(self._keys.setdefault((chain[-1] if chain else -1, content), len(self._keys)))
        return chain[index]

    def _hit(self, request: Request) -> list[int]:
        found: list[int] = []
        for index in range((request.known_tokens - 1) // self.block_size):
            entries = self.blocks_of_key.get(self._key(request, index))
            if not entries:
                break
            found.append(next(iter(entries)))
        return found

    def _extend(self, request: Request, num_new: int, tokens: int) -> None:
        blocks = self.held[request.name]
        for _ in range(num_new):
            block, _ = self.free_queue.popitem(last=False)
            key = self.key_of_block[block]
            if key is not None:
                self.key_of_block[block] = None
                del self.blocks_of_key[key][block]
                if not self.blocks_of_key[key]:
                    del self.blocks_of_key[key]
            self.references[block] = 1
            blocks.append(block)
        full = tokens // self.block_size
        for index in range(self._num_keyed[request.name], full):
            key = self._key(request, index)
            self.key_of_block[blocks[index]] = key
            self.blocks_of_key.setdefault(key, {})[blocks[index]] = None
        self.computed[request.name], self._num_keyed[request.name] = tokens, full
