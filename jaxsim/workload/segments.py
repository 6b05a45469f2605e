"""Prefix block hashes of a workload as radix segments: the host's half of a prefix cache.

Prompts that start alike share KV blocks, and a cache keeps, hits and drops such blocks in runs. A segment is
the longest run of blocks that the same requests share, so a prompt is a short path of segments instead of a
long list of blocks (Mooncake conversation trace: 24 ids a request, 3 segments).
"""

import dataclasses

import numpy as np
from jaxtyping import Int

from jaxsim._core.errors import InputError
from jaxsim.workload.workload import Workload


@dataclasses.dataclass(frozen=True, eq=False)
class PrefixSegments:
    """A compressed trie of the cacheable prompt blocks of a workload. Arrays are int32 and read-only.

    Blocks are the engine's, of block_size tokens, and counted from the start of the prompt. Request i owns the
    path from a root segment to node[i]; it covers blocks 0 to chain_blocks[i] without a gap. Two requests share
    exactly the segments that both paths hold: segments end where two prompts part and where a prompt ends.

    Per segment, in order of first use (so a parent stands before its children, and the segments that request i
    is the first to use are consecutive and the last ones of its path):
    parent: the segment above, -1 at a root. level: segments above it.
    start_blocks, length_blocks: it holds blocks start to start + length of every prompt through it; length >= 1.
    num_sharers: requests whose path holds it; 1 is a private tail. first_request: the earliest of them.

    Per request, in the workload's order:
    node: the deepest segment of its path, -1 if the prompt has no full block with an id.
    num_path_segments: segments of the path, level[node] + 1 or 0.
    chain_blocks: blocks of the path: full blocks of the prompt that have an id; the partial last one has none.
    max_hit_blocks: the most blocks of the path a look-up may return: the last prompt token is always computed,
    so at most (input_tokens - 1) // block_size.

    Source: vLLM V1, `docs/design/prefix_caching.md` ("We only cache full blocks") and
    `KVCacheManager.get_computed_blocks` (`max_cache_hit_length = request.num_tokens - 1`).

    Known gaps: prompt blocks behind the last id and generated blocks have no id and so no segment: they occupy
    the cache, and nobody can hit them.
    """

    block_size: int
    parent: Int[np.ndarray, " segments"]
    level: Int[np.ndarray, " segments"]
    start_blocks: Int[np.ndarray, " segments"]
    length_blocks: Int[np.ndarray, " segments"]
    num_sharers: Int[np.ndarray, " segments"]
    first_request: Int[np.ndarray, " segments"]
    node: Int[np.ndarray, " requests"]
    num_path_segments: Int[np.ndarray, " requests"]
    chain_blocks: Int[np.ndarray, " requests"]
    max_hit_blocks: Int[np.ndarray, " requests"]

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if field.name != "block_size":
                value = np.array(getattr(self, field.name), np.int32)
                value.flags.writeable = False
                object.__setattr__(self, field.name, value)

    def __len__(self) -> int:
        """Segments."""
        return len(self.parent)

    @property
    def end_blocks(self) -> Int[np.ndarray, " segments"]:
        """Blocks from the start of the prompt to the end of each segment."""
        return self.start_blocks + self.length_blocks

    @property
    def max_path_segments(self) -> int:
        """Segments of the longest path: how far a walk from a node to its root can go."""
        return int(self.num_path_segments.max(initial=0))

    def paths(self) -> tuple[Int[np.ndarray, " requests+1"], Int[np.ndarray, " items"]]:
        """All paths, root first, as offsets and one flat list of segments."""
        offsets = np.concatenate([[0], np.cumsum(self.num_path_segments, dtype=np.int64)])
        flat = np.zeros(offsets[-1], np.int32)
        rows, at = np.flatnonzero(self.node >= 0), self.node[self.node >= 0]
        while len(rows):
            flat[offsets[rows] + self.level[at]] = at
            above = self.parent[at]
            rows, at = rows[above >= 0], above[above >= 0]
        return offsets, flat


def prefix_segments(workload: Workload, block_size: int) -> PrefixSegments:
    """The segments of a workload's prompts for an engine with blocks of `block_size` tokens.

    Without prefix hashes there are no segments.
    """
    if workload.prefix_hashes is None:
        offsets, hashes, hashed = np.zeros(len(workload) + 1, np.int64), np.zeros(0, np.int64), block_size
    else:
        offsets, hashes, hashed = workload.prefix_offsets, workload.prefix_hashes, workload.prefix_block_size
    return radix_segments(offsets, hashes, workload.input_tokens, prefix_block_size=hashed, block_size=block_size)


def radix_segments(
    prefix_offsets: Int[np.ndarray, " requests+1"],
    prefix_hashes: Int[np.ndarray, " ids"],
    input_tokens: Int[np.ndarray, " requests"],
    *,
    prefix_block_size: int,
    block_size: int,
) -> PrefixSegments:
    """The segments of lists of block ids, each id for `prefix_block_size` tokens, laid out as in `Workload`.

    Two prompts share a block if their ids agree up to and with it; an id that recurs behind another parent is
    another block. An id shared by a full and a partial block stands for their common tokens.

    Prompts are sorted as strings of blocks, a prefix before its extensions; the blocks that neighbours have in
    common then give the trie in one pass. Time: O(ids + requests log requests) comparisons.
    """
    if isinstance(block_size, bool) or not isinstance(block_size, (int, np.integer)) or block_size < 1:
        raise InputError("block_size", block_size, "is not a positive number of tokens", "16 is usual")
    if prefix_block_size % block_size:
        raise InputError(
            "block_size",
            block_size,
            f"does not divide the {prefix_block_size} tokens behind one prefix hash",
            f"choose a divisor of {prefix_block_size}",
        )
    ratio = prefix_block_size // block_size
    offsets = np.asarray(prefix_offsets, np.int64)
    hashes = np.ascontiguousarray(prefix_hashes).astype(np.int64)
    tokens = np.asarray(input_tokens, np.int64)
    chain = np.minimum(np.diff(offsets) * ratio, tokens // block_size)
    num_ids = -(-chain // ratio)

    order, shared = _sorted_chains(offsets[:-1], num_ids, hashes, chain, ratio)
    parent, start, end, node = _trie(order, shared, chain)

    level = np.zeros(len(parent), np.int64)
    above = parent.copy()
    while (above >= 0).any():
        level += above >= 0
        above = np.where(above >= 0, parent[above], -1)

    sharers = np.bincount(node[node >= 0], minlength=len(parent))
    first = np.full(len(parent), len(chain))
    np.minimum.at(first, node[node >= 0], np.flatnonzero(node >= 0))
    for depth in range(level.max(initial=0), 0, -1):
        here = np.flatnonzero(level == depth)
        np.add.at(sharers, parent[here], sharers[here])
        np.minimum.at(first, parent[here], first[here])

    kept = np.lexsort((start, first))
    # One place more than segments, so that -1 stays -1.
    renamed = np.full(len(kept) + 1, -1)
    renamed[kept] = np.arange(len(kept))
    return PrefixSegments(
        block_size=int(block_size),
        parent=renamed[parent[kept]],
        level=level[kept],
        start_blocks=start[kept],
        length_blocks=(end - start)[kept],
        num_sharers=sharers[kept],
        first_request=first[kept],
        node=renamed[node],
        num_path_segments=np.append(level + 1, 0)[node],
        chain_blocks=chain,
        max_hit_blocks=np.minimum(chain, (tokens - 1) // block_size),
    )


def _sorted_chains(
    begin: np.ndarray, num_ids: np.ndarray, hashes: np.ndarray, chain: np.ndarray, ratio: int
) -> tuple[np.ndarray, np.ndarray]:
    """Requests in the order of their strings of blocks, and the blocks each shares with the one before it."""
    raw = hashes.tobytes()
    width = hashes.itemsize
    rows = [hashes[b : b + n] for b, n in zip(begin.tolist(), num_ids.tolist(), strict=True)]
    # Bytes of ids compare in some fixed order, which is all that is needed, and fast. Of two prompts with the
    # same ids the one that ends earlier in the last block is the prefix.
    keys = [
        (raw[b * width : (b + n) * width], c)
        for b, n, c in zip(begin.tolist(), num_ids.tolist(), chain.tolist(), strict=True)
    ]
    order = sorted(range(len(keys)), key=keys.__getitem__)
    shared = np.zeros(len(order), np.int64)
    for position in range(1, len(order)):
        before, row = rows[order[position - 1]], rows[order[position]]
        common = min(len(before), len(row))
        differ = before[:common] != row[:common]
        first = int(differ.argmax()) if common else 0
        shared[position] = first if common and differ[first] else common
    order = np.asarray(order, np.int64)
    shared *= ratio
    shared[1:] = np.minimum(shared[1:], np.minimum(chain[order[1:]], chain[order[:-1]]))
    return order, shared


def _trie(
    order: np.ndarray, shared: np.ndarray, chain: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Parent, start and end of each segment, and each request's node, from the sorted chains."""
    parent: list[int] = []
    start: list[int] = []
    end: list[int] = []
    node = np.full(len(chain), -1)
    path: list[int] = []  # segments of the prompt before, root first

    def add(above: int, first: int, last: int) -> int:
        parent.append(above)
        start.append(first)
        end.append(last)
        return len(parent) - 1

    for request, common, blocks in zip(order.tolist(), shared.tolist(), chain[order].tolist(), strict=True):
        while path and start[path[-1]] >= common:
            path.pop()
        if path and end[path[-1]] > common:
            # The prompts part inside a segment: its upper part is new, so what lies below keeps its parent.
            lower = path.pop()
            upper = add(parent[lower], start[lower], common)
            parent[lower], start[lower] = upper, common
            path.append(upper)
        if blocks > common:
            path.append(add(path[-1] if path else -1, common, blocks))
        if path:
            node[request] = path[-1]
    return (*(np.asarray(values, np.int64) for values in (parent, start, end)), node)
