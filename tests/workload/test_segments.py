"""Radix segments against a trie built block by block, against the reference cache, and on measured traces."""

import dataclasses
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxsim._core.errors import InputError
from jaxsim.traces import read_trace
from jaxsim.workload import Workload
from jaxsim.workload.segments import PrefixSegments, prefix_segments, radix_segments
from tests.reference.prefix_cache import PrefixCache, Request, split_hashes


def ragged(rows):
    offsets = np.concatenate([[0], np.cumsum([len(r) for r in rows], dtype=np.int64)])
    return offsets, np.array([h for r in rows for h in r], np.int64)


def segments_of(rows, tokens, prefix_block_size=16, block_size=16):
    return radix_segments(*ragged(rows), np.array(tokens), prefix_block_size=prefix_block_size, block_size=block_size)


def path(s: PrefixSegments, request):
    """Segments from the root to the request's node, by parents alone."""
    found, at = [], s.node[request]
    while at >= 0:
        found.append(int(at))
        at = s.parent[at]
    return found[::-1]


def chains(rows, tokens, ratio, block_size):
    """Each request's blocks as strings of (id, part), full ones only."""
    return [split_hashes(row, ratio, t // block_size) for row, t in zip(rows, tokens, strict=True)]


def segments_by_hand(strings):
    """The compressed trie from one of single blocks: a list of segments as tuples of blocks, a request's path."""
    users = {}  # a prefix of blocks -> who has it
    for i, blocks in enumerate(strings):
        for n in range(1, len(blocks) + 1):
            users.setdefault(blocks[:n], set()).add(i)
    paths = []
    for blocks in strings:
        cuts = [n for n in range(1, len(blocks)) if users[blocks[:n]] != users[blocks[: n + 1]]]
        bounds = [0, *cuts, len(blocks)] if blocks else []
        paths.append([(blocks[:begin], blocks[:end]) for begin, end in pairwise(bounds)])
    return users, paths


def assert_same(s: PrefixSegments, strings):
    users, paths = segments_by_hand(strings)
    name = {}
    for i, expected in enumerate(paths):
        own = path(s, i)
        assert len(own) == len(expected) == s.num_path_segments[i]
        assert [(s.start_blocks[x], s.end_blocks[x]) for x in own] == [(len(a), len(b)) for a, b in expected]
        for level, (x, (_, blocks)) in enumerate(zip(own, expected, strict=True)):
            assert name.setdefault(x, blocks) == blocks
            assert s.level[x] == level
            assert s.num_sharers[x] == len(users[blocks]) and s.first_request[x] == min(users[blocks])
        new = [x for x in own if s.first_request[x] == i]
        assert new == own[len(own) - len(new) :]
        assert new == list(range(new[0], new[0] + len(new))) if new else True
    assert len(set(name.values())) == len(name) == len(s)
    assert (s.length_blocks >= 1).all() and (s.parent < np.arange(len(s))).all()
    np.testing.assert_array_equal(s.chain_blocks, [len(b) for b in strings])
    offsets, flat = s.paths()
    for i in range(len(strings)):
        assert flat[offsets[i] : offsets[i + 1]].tolist() == path(s, i)


def test_a_case_by_hand():
    # Blocks of 16. Requests 0 and 2 part after two blocks, 1 ends inside their prefix, 3 shares nothing, 4 is 0
    # again, 5 has no full block, 6 no ids.
    rows = [[1, 2, 3, 4], [1], [1, 2, 5], [9, 2], [1, 2, 3, 4], [1], []]
    tokens = [64, 31, 50, 32, 65, 15, 100]
    s = segments_of(rows, tokens)
    assert s.parent.tolist() == [-1, 0, 1, 1, -1]
    assert s.level.tolist() == [0, 1, 2, 2, 0]
    assert s.start_blocks.tolist() == [0, 1, 2, 2, 0]
    assert s.length_blocks.tolist() == [1, 1, 2, 1, 2]
    assert s.num_sharers.tolist() == [4, 3, 2, 1, 1]
    assert s.first_request.tolist() == [0, 0, 0, 2, 3]
    assert s.node.tolist() == [2, 0, 3, 4, 2, -1, -1]
    assert s.num_path_segments.tolist() == [3, 1, 3, 1, 3, 0, 0]
    assert s.chain_blocks.tolist() == [4, 1, 3, 2, 4, 0, 0]
    # The last token is computed: 64 tokens hit 3 blocks, 65 hit 4; 31 hit the one full block they have.
    assert s.max_hit_blocks.tolist() == [3, 1, 3, 1, 4, 0, 0]
    assert s.max_path_segments == 3 and len(s) == 5
    assert s.paths()[1].tolist() == [0, 1, 2, 0, 0, 1, 3, 4, 0, 1, 2]


def test_blocks_of_a_trace_are_split_into_those_of_the_engine():
    # Ids of 64 tokens, blocks of 16: the partial last block of 100 tokens has two full blocks of the engine.
    s = segments_of([[7, 8], [7, 8], [7, 9]], [100, 128, 129], prefix_block_size=64)
    assert s.chain_blocks.tolist() == [6, 8, 8]
    assert s.length_blocks.tolist() == [4, 2, 2, 4]
    assert s.parent.tolist() == [-1, 0, 1, 0]
    assert s.max_hit_blocks.tolist() == [6, 7, 8]


def test_an_id_behind_another_parent_is_another_block():
    s = segments_of([[1, 5, 6], [2, 5, 6]], [48, 48])
    assert len(s) == 2 and s.num_sharers.tolist() == [1, 1]


def test_ids_may_be_any_64_bits():
    low, high = -(2**63), 2**63 - 1
    s = segments_of([[low, 3], [high, 3], [low, -1], [256], [1]], [32] * 5)
    assert s.num_sharers.tolist() == [2, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("block_size", [24, 128, 0, -16, True, 16.0])
def test_a_block_size_that_does_not_divide_is_refused(block_size):
    with pytest.raises(InputError, match="^block_size = "):
        segments_of([[1]], [64], prefix_block_size=64, block_size=block_size)


CASES = st.tuples(
    st.sampled_from([1, 2, 4]),
    st.sampled_from([1, 2]),
    st.lists(st.tuples(st.lists(st.integers(0, 2), max_size=6), st.integers(0, 7)), min_size=1, max_size=24),
)


def expand(case):
    """Ratio, block size, rows of ids, prompt tokens: some prompts end in a partial block, some go past their ids."""
    ratio, block_size, given_rows = case
    rows = [row for row, _ in given_rows]
    whole = ratio * block_size
    tokens = [max(1, len(row) * whole - cut if cut < whole else len(row) * whole + cut) for row, cut in given_rows]
    return ratio, block_size, rows, tokens


@settings(max_examples=400, deadline=None)
@given(CASES)
def test_segments_are_those_of_the_trie(case):
    ratio, block_size, rows, tokens = expand(case)
    strings = chains(rows, tokens, ratio, block_size)
    s = segments_of(rows, tokens, ratio * block_size, block_size)
    assert_same(s, strings)
    limit = [min(len(b), (t - 1) // block_size) for b, t in zip(strings, tokens, strict=True)]
    assert s.max_hit_blocks.tolist() == limit


def unbounded_hits(s: PrefixSegments):
    """Blocks each request finds in a cache that forgets nothing, requests one after the other."""
    ends = [max((s.end_blocks[x] for x in path(s, i) if s.first_request[x] < i), default=0) for i in range(len(s.node))]
    return np.minimum(ends, s.max_hit_blocks)


@settings(max_examples=100, deadline=None)
@given(CASES)
def test_unbounded_hits_are_those_of_the_reference(case):
    ratio, block_size, rows, tokens = expand(case)
    s = segments_of(rows, tokens, ratio * block_size, block_size)
    cache = PrefixCache(4096, block_size)
    hits = []
    for i, (hashes, known) in enumerate(zip(chains(rows, tokens, ratio, block_size), tokens, strict=True)):
        r = Request(i, hashes, known)
        hits.append(cache.lookup(r) // block_size)
        assert cache.allocate(r)
        cache.free(r)
    assert unbounded_hits(s).tolist() == hits


def lru_hits(s: PrefixSegments, num_blocks):
    """Blocks each request finds in a cache of `num_blocks` that knows segments only; each needs one block more.

    Per segment: resident blocks and the last release. Victims: oldest release, then deepest, tail first.
    """
    resident, released = np.zeros(len(s), int), np.full(len(s), -1)
    hits = []
    for i in range(len(s.node)):
        own = path(s, i)
        # From the node up: a segment that is not whole hides what lies below it.
        hit = int(s.chain_blocks[i])
        for x in reversed(own):
            if resident[x] < s.length_blocks[x]:
                hit = s.start_blocks[x] + resident[x]
        hits.append(int(hit))
        need = s.chain_blocks[i] + 1 - hit
        others = [x for x in np.lexsort((-s.start_blocks, released)) if resident[x] and x not in own]
        if num_blocks - resident[own].sum() < need:
            continue
        short = need - (num_blocks - resident.sum())
        for x in others:
            taken = min(max(short, 0), resident[x])
            resident[x] -= taken
            short -= taken
        resident[own], released[own] = s.length_blocks[own], i
    return hits


@settings(max_examples=200, deadline=None)
@given(CASES, st.integers(2, 40))
def test_segments_are_enough_for_an_lru_cache(case, num_blocks):
    """Sequential requests hit the same in a cache of segments as in one of blocks, whatever is evicted."""
    ratio, _, rows, _ = expand(case)
    # One token behind the ids: the whole path can be hit, and there is one block that is never full.
    block_size = 2
    tokens = [len(row) * ratio * block_size + 1 for row in rows]
    s = segments_of(rows, tokens, ratio * block_size, block_size)
    cache = PrefixCache(num_blocks, block_size, partial_first=True)
    hits = []
    for i, (hashes, known) in enumerate(zip(chains(rows, tokens, ratio, block_size), tokens, strict=True)):
        r = Request(i, hashes, known)
        hits.append(cache.lookup(r) // block_size)
        if cache.allocate(r):
            cache.free(r)
    assert lru_hits(s, num_blocks) == hits


def workload(**changes):
    fields = dict(
        arrival_s=[0.0, 1.0, 2.0],
        input_tokens=[64, 40, 70],
        output_tokens=[1, 1, 1],
        prefix_offsets=[0, 2, 4, 7],
        prefix_hashes=[1, 2, 1, 2, 1, 3, 4],
        prefix_block_size=32,
    )
    return Workload(**(fields | changes))


def test_segments_of_a_workload():
    s = prefix_segments(workload(), 16)
    assert s.block_size == 16
    assert s.chain_blocks.tolist() == [4, 2, 4] and s.length_blocks.tolist() == [2, 2, 2]
    assert s.node.tolist() == [1, 0, 2]
    for field in dataclasses.fields(s):
        if field.name != "block_size":
            array = getattr(s, field.name)
            assert array.dtype == np.int32 and not array.flags.writeable
    with pytest.raises(InputError, match="choose a divisor of 32"):
        prefix_segments(workload(), 64)


def test_a_workload_without_prefixes_has_no_segments():
    s = prefix_segments(workload(prefix_offsets=None, prefix_hashes=None, prefix_block_size=None), 16)
    assert len(s) == 0 and s.max_path_segments == 0
    assert s.node.tolist() == [-1, -1, -1] and s.max_hit_blocks.tolist() == [0, 0, 0]
    assert [len(part) for part in s.paths()] == [4, 0]


@pytest.fixture(scope="module")
def mooncake(shared_data):
    file = shared_data / "traces" / "mooncake_conversation_trace.jsonl"
    if not file.is_file():
        pytest.skip("no Mooncake trace in the measured data")
    return read_trace(file)


def test_mooncake_compresses(mooncake):
    """DESIGN.md, section 2: 24 ids a request become 3.1 segments."""
    s = prefix_segments(mooncake, 16)
    assert mooncake.num_prefix_blocks / len(mooncake) == pytest.approx(24, abs=0.05)
    assert s.num_path_segments.mean() == pytest.approx(3.1, abs=0.05)
    # One block of 512 tokens opens every conversation.
    assert (s.parent < 0).sum() == 1 and s.num_sharers[0] == len(mooncake)


@pytest.mark.parametrize("block_size", [16, 512])
def test_mooncake_unbounded_hit_rate(mooncake, block_size):
    """Source: physics/energy-workload-training.md, section 9.6: 37.4 % of prompt tokens."""
    hits = unbounded_hits(prefix_segments(mooncake, block_size)).sum() * block_size
    assert hits / mooncake.input_tokens.sum(dtype=np.int64) == pytest.approx(0.374, abs=0.001)


@pytest.mark.parametrize("name", ["llama31", "qwen3"])
def test_sharegpt_hits_are_the_counted_ones(shared_data, name):
    """Blocks seen before, as counted from the token ids beside the measured runs."""
    run = {"llama31": "vllm_rtxpro6000_llama31_8b_tp1", "qwen3": "vllm_rtxpro6000_qwen3_30b_a3b_dp2ep2"}[name]
    trace, table = shared_data / "traces" / f"sharegpt300_{name}.jsonl", shared_data / "runs" / run / "requests.csv"
    if not (trace.is_file() and table.is_file()):
        pytest.skip("no ShareGPT runs in the measured data")
    w = read_trace(trace)
    s = prefix_segments(w, 16)
    seen = pd.read_csv(table)["prefix_blocks16_seen_before"].to_numpy()
    assert seen.sum() > 0
    np.testing.assert_array_equal(unbounded_hits(dataclasses.replace(s, max_hit_blocks=s.chain_blocks)), seen)
