"""The reference of vLLM's prefix cache on the engine's documented cases, and on published hit rates."""

import random

import pytest

from jaxsim.traces import read_trace

from .prefix_cache import PrefixCache, Request, split_hashes


def request(name, hashes, tokens):
    return Request(name, tuple(hashes), tokens)


def admitted(cache, name, hashes, tokens, first_chunk=None):
    r = request(name, hashes, tokens)
    assert cache.allocate(r, first_chunk)
    cache.check()
    return r


def decode(cache, r, tokens):
    for _ in range(tokens):
        r.known_tokens += 1
        assert cache.grow(r)
    cache.check()


def queue(cache):
    return list(cache.free_queue)


@pytest.mark.parametrize(
    ("partial_first", "after_first", "after_second", "third"),
    [
        (False, [7, 8, 9, 4, 3, 2], [7, 8, 9, 4, 3, 2, 6, 5, 1, 0], [0, 1, 2, 7, 8, 9, 4, 3]),
        (True, [4, 7, 8, 9, 3, 2], [6, 4, 7, 8, 9, 3, 2, 5, 1, 0], [0, 1, 2, 6, 4, 7, 8, 9]),
    ],
)
def test_example_of_the_design_page(partial_first, after_first, after_second, third):
    """vLLM docs/design/prefix_caching.md, "Example": blocks of 4 tokens, 10 of them."""
    cache = PrefixCache(10, 4, partial_first=partial_first)
    r0 = admitted(cache, 0, "abcd", 15)
    assert cache.held[0] == [0, 1, 2, 3] and cache.key_of_block[3] is None
    decode(cache, r0, 2)
    assert cache.held[0] == [0, 1, 2, 3, 4] and cache.key_of_block[3] is not None
    r1 = request(1, "abxy", 14)
    assert cache.lookup(r1) == 8
    assert cache.allocate(r1) and cache.held[1] == [0, 1, 5, 6]
    assert [cache.references[b] for b in range(7)] == [2, 2, 1, 1, 1, 1, 1]
    cache.free(r0)
    assert queue(cache) == after_first
    cache.free(r1)
    assert queue(cache) == after_second
    r2 = request(2, "abcuvwxyz", 29)
    assert cache.lookup(r2) == 12
    assert cache.allocate(r2) and cache.held[2] == third
    cache.check()


@pytest.mark.parametrize(
    ("partial_first", "first", "second", "new"),
    [(True, [5, 9, 4, 3, 2, 1, 0], [5], 5), (False, [9, 5, 4, 3, 2, 1, 0], [], 9)],
)
def test_case_evict_of_the_engine(partial_first, first, second, new):
    """vLLM tests/v1/core/test_prefix_caching.py, test_evict, in its form since PR 42656 and before."""
    cache = PrefixCache(10, 16, partial_first=partial_first)
    r0 = admitted(cache, 0, "abcde", 5 * 16 + 7)
    r1 = admitted(cache, 1, "xyz", 3 * 16)
    assert cache.num_free == 1
    cache.free(r0)
    assert queue(cache) == first
    cache.free(r1)
    assert queue(cache) == [*first, 8, 7, 6]
    assert cache.lookup(request(2, "ab", 2 * 16 + 3)) == 2 * 16
    admitted(cache, 2, "ab", 2 * 16 + 3)
    assert cache.held[2] == [0, 1, new] and cache.num_free == 7


def test_case_prefill_of_the_engine():
    """vLLM tests/v1/core/test_prefix_caching.py, test_prefill: a hit on blocks in use, on free ones, eviction."""
    cache = PrefixCache(10, 16, partial_first=True)
    r0 = admitted(cache, 0, "abc", 55)
    r1 = request(1, "abc", 53)
    assert cache.lookup(r1) == 48
    assert cache.allocate(r1) and cache.held[1] == [0, 1, 2, 4]
    assert cache.num_free == 5
    cache.free(r0)
    cache.free(r1)
    assert queue(cache) == [4, 3, 5, 6, 7, 8, 9, 2, 1, 0]
    r2 = request(2, "abc", 54)
    assert cache.lookup(r2) == 48
    assert cache.allocate(r2) and cache.held[2] == [0, 1, 2, 4]
    cache.free(r2)
    r3 = request(3, range(10), 160)
    assert cache.lookup(r3) == 0
    assert cache.allocate(r3) and cache.held[3] == [4, 3, 5, 6, 7, 8, 9, 2, 1, 0]
    assert not cache.free_queue and len(cache.blocks_of_key) == 10
    cache.check()


def test_hit_blocks_are_not_evicted_for_the_request_that_hits_them():
    """vLLM tests/v1/core/test_prefix_caching.py, test_computed_blocks_not_evicted."""
    cache = PrefixCache(2, 16)
    r0, r1 = admitted(cache, 0, "a", 16), admitted(cache, 1, "b", 16)
    cache.free(r0)
    cache.free(r1)
    r2 = admitted(cache, 2, "ac", 32)
    assert cache.held[2] == [0, 1]
    cache.free(r2)
    assert cache.lookup(request(3, "ac", 33)) == 32 and cache.lookup(request(4, "b", 17)) == 0


def test_duplicated_blocks():
    """vLLM docs/design/prefix_caching.md, "Duplicated blocks": the same prompt and output twice, blocks of 4."""
    cache = PrefixCache(10, 4)
    hashes = ("ABCD", "EFGH")
    r1 = admitted(cache, 1, hashes, 6)
    decode(cache, r1, 3)
    assert cache.held[1] == [0, 1, 2]
    r2 = request(2, hashes, 6)
    assert cache.lookup(r2) == 4
    assert cache.allocate(r2) and cache.held[2] == [0, 3]
    decode(cache, r2, 1)
    assert cache.key_of_block[3] is None
    decode(cache, r2, 1)
    assert cache.key_of_block[3] == cache.key_of_block[1]
    assert list(cache.blocks_of_key[cache.key_of_block[1]]) == [1, 3]
    # The older entry is the one that is hit, also when only the newer is in use.
    cache.free(r1)
    r3 = admitted(cache, 3, hashes, 9)
    assert cache.held[3] == [0, 1, 4]
    # Without the older entry the newer still is a hit.
    cache.free(r3)
    others = admitted(cache, 4, range(10, 18), 32)
    assert 1 in cache.held[4] and 3 not in cache.held[4]
    assert cache.lookup(request(5, hashes, 9)) == 8
    cache.free(others)


def test_twins_share_what_was_scheduled_before_the_second_came():
    cache = PrefixCache(20, 16)
    first, second = request(0, "abcd", 70), request(1, "abcd", 70)
    assert cache.lookup(first) == cache.lookup(second) == 0
    assert cache.allocate(first, 40)
    # Two full blocks of the first are scheduled; the third is partial and has no key yet.
    assert cache.lookup(second) == 32
    assert cache.allocate(second, 38)
    assert cache.held[1][:2] == cache.held[0][:2]
    assert cache.grow(first, 30)
    assert cache.held == {0: [0, 1, 2, 6, 7], 1: [0, 1, 3, 4, 5]}
    assert [cache.key_of_block[b] for b in (2, 6)] == [cache.key_of_block[b] for b in (3, 4)]
    cache.check()
    cache.free(first)
    # The blocks that the twin holds stay out of the queue; the first one's own copies are in it, tail first.
    assert queue(cache) == [*range(8, 20), 7, 6, 2]


@pytest.mark.parametrize(("tokens", "hit"), [(16, 0), (17, 16), (32, 16), (33, 32), (47, 32), (48, 32), (49, 48)])
def test_a_hit_stops_before_the_last_token(tokens, hit):
    cache = PrefixCache(10, 16)
    cache.free(admitted(cache, 0, "abc", 48))
    assert cache.lookup(request(1, "abc", tokens)) == hit


def test_a_fully_cached_prompt_computes_its_last_block_again():
    cache = PrefixCache(4, 16)
    cache.free(admitted(cache, 0, "abc", 48))
    r = admitted(cache, 1, "abc", 48)
    assert cache.held[1] == [0, 1, 3] and queue(cache) == [2]
    assert list(cache.blocks_of_key[cache.key_of_block[2]]) == [2, 3]
    cache.free(r)
    # The copy nobody hit is the least recently used one.
    assert queue(cache) == [2, 3, 1, 0]


def test_cached_blocks_that_a_hit_takes_from_the_queue_must_fit_too():
    cache = PrefixCache(4, 16)
    cache.free(admitted(cache, 0, "ab", 32))
    other = admitted(cache, 1, "x", 16)
    r = request(2, "ab", 64)
    assert cache.lookup(r) == 32 and cache.num_free == 3
    before = queue(cache)
    assert not cache.allocate(r) and queue(cache) == before and 2 not in cache.held
    assert cache.allocate(r, 16)  # two revived and one new
    assert not cache.grow(r, 16) and len(cache.held[2]) == 3
    cache.free(other)
    assert cache.grow(r, 16)
    cache.check()


def test_a_preempted_request_finds_its_own_output():
    cache = PrefixCache(10, 16)
    r = admitted(cache, 0, "a", 20)
    decode(cache, r, 12)  # 32 tokens computed
    r.known_tokens += 1  # one more is known, not computed
    cache.free(r)
    assert cache.lookup(r) == 32
    assert cache.lookup(request(1, "a", 40)) == 16
    assert cache.allocate(r)
    assert cache.computed[0] == 33 and cache.held[0][:2] == [0, 1]


def test_the_next_turn_hits_the_output_of_the_one_before():
    cache = PrefixCache(10, 16)
    r = admitted(cache, 0, "abc", 20)
    decode(cache, r, 30)  # 50 tokens: three full blocks, two with output
    cache.free(r)
    assert cache.lookup(request(1, "abcd", 70)) == 48


def test_a_block_is_its_hash_behind_its_parents():
    cache = PrefixCache(10, 16)
    cache.free(admitted(cache, 0, "ab", 32))
    assert cache.lookup(request(1, "bb", 64)) == cache.lookup(request(2, "", 64)) == 0
    assert cache.lookup(request(3, "aa", 64)) == 16


def test_ids_of_a_trace_split_into_the_engines_blocks():
    assert split_hashes([7, 9], 2, 3) == ((7, 0), (7, 1), (9, 0))


@pytest.mark.parametrize("seed", range(20))
def test_blocks_are_conserved(seed):
    rng = random.Random(seed)
    cache = PrefixCache(rng.randint(4, 40), rng.choice([1, 2, 4]), partial_first=seed % 2 == 0)
    running = []
    num_hits = num_refused = 0
    for name in range(300):
        hashes = [rng.randrange(2) for _ in range(rng.randrange(8))]
        r = request(name, hashes, rng.randint(max(1, len(hashes) * cache.block_size), 40))
        hit = cache.lookup(r)
        assert hit % cache.block_size == 0 and hit < r.known_tokens
        num_hits += hit > 0
        if cache.allocate(r, rng.randint(1, r.known_tokens - hit)):
            assert cache.computed[name] > hit
            running.append(r)
        else:
            num_refused += 1
        for r in list(running):
            cache.check()
            left = r.known_tokens - cache.computed[r.name]
            if left == 0 and rng.random() < 0.5:
                r.known_tokens += 1
                left = 1
            if left == 0 or not cache.grow(r, rng.randint(1, left)):
                cache.free(r)
                running.remove(r)
    for r in running:
        cache.free(r)
    cache.check()
    assert cache.num_free == cache.num_blocks and num_hits and num_refused


def hit_rate_of_groups(num_instances, capacity, is_blind, num_requests=20_000, groups=150, parts=10):
    """Share of prefix tokens hit: 150 prefixes of 6000 tokens, drawn uniformly, in blocks of a tenth."""
    rng = random.Random(0)
    # One block more for the token behind the prefix, which is never cached.
    caches = [PrefixCache(int(capacity * parts) + 1, 6000 // parts, partial_first=True) for _ in range(num_instances)]
    hit = 0
    for name in range(num_requests):
        group = rng.randrange(groups)
        cache = caches[rng.randrange(num_instances) if is_blind else group % num_instances]
        r = request(name, ((group, part) for part in range(parts)), 6001)
        hit += cache.lookup(r)
        assert cache.allocate(r)
        cache.free(r)
    return 100 * hit / (6000 * num_requests)


@pytest.mark.parametrize(("load", "blind"), [(1, 94.00), (2, 49.26), (8, 11.77)])
def test_capacity_law_of_a_blind_router(load, blind):
    """Hit rate when the working set is `load` times an instance's cache, 8 instances.

    Source: physics/serving.md, section 10 (third-party simulation), tolerance 1 point where the cache is short.
    """
    assert hit_rate_of_groups(8, 150 / load, True) == pytest.approx(blind, abs=1e-9 if load == 1 else 1)


@pytest.mark.parametrize("load", [1, 4])
def test_capacity_law_of_an_affine_router(load):
    """Every prefix misses once as long as an eighth of the working set fits: 1 - 150 / 20000."""
    assert hit_rate_of_groups(8, 150 / load, False) == pytest.approx(99.25, abs=1e-9)


@pytest.mark.parametrize(("capacity_tokens", "percent"), [(150e6, 37.4), (4e6, 18.5), (16e6, 34.2)])
def test_mooncake_hit_rates(shared_data, capacity_tokens, percent):
    """Share of prompt tokens found in a cache of 512-token blocks, prompts one after the other, no outputs.

    Source: physics/energy-workload-training.md, row W1 and section 9.6 (an independent tool), tolerance 2 points.
    """
    path = shared_data / "traces" / "mooncake_conversation_trace.jsonl"
    if not path.is_file():
        pytest.skip("no Mooncake trace in the measured data")
    w = read_trace(path)
    cache = PrefixCache(int(capacity_tokens) // 512, 512, partial_first=True)
    hit = 0
    for i, tokens in enumerate(w.input_tokens.tolist()):
        r = request(i, w.prefix_of(i).tolist()[: tokens // 512], tokens)
        hit += cache.lookup(r)
        assert cache.allocate(r)
        cache.free(r)
    cache.check()
    assert 100 * hit / w.input_tokens.sum(dtype="int64") == pytest.approx(percent, abs=0.1)
