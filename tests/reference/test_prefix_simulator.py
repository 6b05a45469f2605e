"""The reference simulator with vLLM's prefix cache: laws over random scenarios, and cases worked out by hand."""

import random
from dataclasses import replace

import pytest

from .prefix_scenarios import CACHING, random_prefix_scenario, random_prefixes, random_prompts
from .simulator import PRESETS, Flags, Request, preset, simulate
from .test_laws import assert_work_conserving, dyadic_cost, unit_steps

# --- laws -----------------------------------------------------------------------------------------


def num_common(one: tuple, other: tuple) -> int:
    """Leading hashes that two prompts have in common."""
    common = 0
    while common < min(len(one), len(other)) and one[common] == other[common]:
        common += 1
    return common


@pytest.mark.parametrize("name", CACHING)
def test_laws_on_random_scenarios(name):
    """What the simulator does not check by itself: what may be found in the cache, and that it pays."""
    num_hits = num_own_hits = num_preemptions = num_lost = 0
    for seed in range(120):
        requests, flags, num_instances, router = random_prefix_scenario(name, seed)
        result = simulate(requests, flags, num_instances, router, dyadic_cost)
        assert_work_conserving(result, num_instances)
        assert all(0 <= record.free_blocks <= flags.num_blocks for record in result.iterations)
        sampled = sum(record.stats.num_sampled for record in result.iterations)
        assert sampled == sum(request.output for request in requests)
        for request, got in zip(requests, result.requests, strict=True):
            assert got.status == "finished"
            assert got.cached_tokens % flags.block_size == 0 and got.cached_tokens <= request.prompt - 1
            assert got.cached_tokens <= got.hit_tokens
            assert got.preemptions or got.hit_tokens == got.cached_tokens
            earlier = [
                other.prefix_hashes
                for other, its in zip(requests, result.requests, strict=True)
                if other is not request and its.instance == got.instance and its.scheduled_s <= got.scheduled_s
            ]
            known = max((num_common(request.prefix_hashes, hashes) for hashes in earlier), default=0)
            assert got.cached_tokens <= known * flags.block_size
            num_lost += got.cached_tokens < min(known, (request.prompt - 1) // flags.block_size) * flags.block_size
        num_hits += sum(r.cached_tokens > 0 for r in result.requests)
        num_own_hits += sum(r.hit_tokens > r.cached_tokens for r in result.requests)
        num_preemptions += sum(r.preemptions for r in result.requests)
    # The scenarios hit, evict, preempt, and find again what was preempted.
    assert min(num_hits, num_lost, num_preemptions, num_own_hits) > 50


@pytest.mark.parametrize("name", ["vllm-v1", "vllm-v1-async"])
def test_a_cache_without_limits_finds_all_that_came_before(name):
    """Prompts scheduled whole and nothing evicted: the longest prefix in common with whoever was admitted earlier."""
    num_hits = 0
    for seed in range(60):
        requests, flags, num_instances, router = random_prefix_scenario(name, seed)
        tokens = sum(r.prompt + r.output for r in requests)
        flags = replace(flags, num_blocks=tokens, max_num_batched_tokens=tokens + flags.max_num_seqs)
        result = simulate(requests, flags, num_instances, router, dyadic_cost)
        for number, (request, got) in enumerate(zip(requests, result.requests, strict=True)):
            earlier = [r for r, its in zip(requests[:number], result.requests, strict=False)
                       if its.instance == got.instance]
            blocks = max((num_common(request.prefix_hashes, r.prefix_hashes) for r in earlier), default=0)
            blocks = min(blocks, (request.prompt - 1) // flags.block_size)
            assert got.cached_tokens == got.hit_tokens == blocks * flags.block_size
            num_hits += blocks > 0
    assert num_hits > 100


@pytest.mark.parametrize("name", CACHING)
def test_prompts_that_share_nothing_are_served_as_without_a_cache(name):
    """The same until the first preemption: only a request that comes back finds something, its own."""
    num_calm = num_preempted = 0
    for seed in range(120):
        requests, flags, num_instances, router = random_prefix_scenario(name, seed)
        requests = [
            replace(r, prefix_hashes=tuple((r.id, block) for block in range(len(r.prefix_hashes))))
            for r in requests
        ]
        cached = simulate(requests, flags, num_instances, router, dyadic_cost)
        plain = simulate(requests, replace(flags, prefix_caching=False), num_instances, router, dyadic_cost)
        calm = 0
        for one, other in zip(cached.iterations, plain.iterations, strict=False):
            if one.preempted or other.preempted:
                assert (one.start_s, one.preempted) == (other.start_s, other.preempted)
                # The batch is the same too, unless this is a second pass of the instant, where one may come back.
                assert one == other or set(one.preempted) & {*one.batch, *other.batch}
                num_preempted += 1
                break
            assert one == other
            calm += 1
        else:
            assert cached == plain and calm == len(plain.iterations)
            num_calm += 1
        assert not any(r.cached_tokens for r in cached.requests)
    assert num_calm > 20 and num_preempted > 20


@pytest.mark.parametrize("name", CACHING)
def test_hashes_without_caching_mean_nothing(name):
    for seed in range(10):
        requests, flags, num_instances, router = random_prefix_scenario(name, seed)
        flags = replace(flags, prefix_caching=False)
        bare = [replace(r, prefix_hashes=()) for r in requests]
        result = simulate(requests, flags, num_instances, router, dyadic_cost)
        assert result == simulate(bare, flags, num_instances, router, dyadic_cost)
        assert not any(r.hit_tokens for r in result.requests)


def test_random_prefixes():
    """They fit their prompts; twins, next turns, several roots, hashes behind other parents, exact blocks occur."""
    seen = dict.fromkeys(["twin", "turn", "branch", "roots", "recurs", "exact", "no tail"], 0)
    for seed in range(100):
        rng = random.Random(seed)
        block_size = rng.choice([1, 2, 4, 8])
        prompts = random_prompts(rng, 12, block_size, 64)
        chains = random_prefixes(rng, 12, block_size, prompts)
        assert all(len(c) <= p // block_size for c, p in zip(chains, prompts, strict=True))
        seen["exact"] += any(p % block_size == 0 and len(c) * block_size == p and p // block_size > 1
                             for c, p in zip(chains, prompts, strict=True))
        seen["no tail"] += any(len(c) < p // block_size for c, p in zip(chains, prompts, strict=True))
        seen["roots"] += len({c[0] for c in chains if c}) > 2
        parents = {(block, c[:at]) for c in chains for at, block in enumerate(c)}
        seen["recurs"] += len({block for block, _ in parents}) < len(parents)
        for number, chain in enumerate(chains):
            for before, tokens in zip(chains[:number], prompts, strict=False):
                common = num_common(chain, before)
                seen["twin"] += bool(chain) and chain == before and tokens == prompts[number]
                seen["turn"] += 0 < len(before) == common < len(chain)
                seen["branch"] += 0 < common < min(len(chain), len(before))
    assert min(seen.values()) > 20, seen


# --- cases by hand, iterations of one second ------------------------------------------------------


def caching(name="vllm-v1", **numbers) -> Flags:
    return preset(name, **{"prefix_caching": True, "block_size": 4, "num_blocks": 20, **numbers})


@pytest.mark.parametrize(
    ("prompt", "cached"), [(1, 0), (4, 0), (5, 4), (8, 4), (9, 8), (12, 8), (15, 12), (16, 12), (17, 16), (19, 16)]
)
def test_the_second_of_two_equal_prompts(prompt, cached):
    """It hits floor((prompt - 1) / 4) blocks: the last token is always computed."""
    hashes = tuple("abcd"[: prompt // 4])
    requests = [Request(0, 0, prompt, 2, prefix_hashes=hashes), Request(1, 5, prompt, 2, prefix_hashes=hashes)]
    steps, results = unit_steps(requests, caching())
    assert [(r.cached_tokens, r.hit_tokens) for r in results] == [(0, 0), (cached, cached)]
    assert (steps[0].batch, steps[5].batch) == ({0: prompt}, {1: prompt - cached})
    # Chunks are what is computed, contexts include what is cached.
    stats = steps[5].stats
    assert (stats.num_prefill, stats.prefill_tokens, stats.prefill_context) == (1, prompt - cached, prompt)
    assert stats.prefill_pairs == prompt**2 - cached**2
    # Blocks in use are those of one prompt, hit ones included.
    assert steps[5].free_blocks == steps[0].free_blocks == 20 - -(-prompt // 4)
    assert steps[6].stats.decode_context == prompt + 1


def test_twins_of_one_pass():
    """The second hits what was scheduled for the first just before; both hold those blocks."""
    requests = [Request(i, 0, 13, 2, prefix_hashes=tuple("abc")) for i in range(2)]
    steps, results = unit_steps(requests, caching())
    assert steps[0].batch == {0: 13, 1: 1}
    assert steps[0].free_blocks == 20 - 4 - 1
    assert [r.cached_tokens for r in results] == [0, 12]
    assert [r.finish_s for r in results] == [2, 2]


def test_a_prompt_in_chunks_is_hit_as_far_as_it_is_scheduled():
    """Budget 6. At 1 the first schedules tokens 6 to 9: three tokens are left, and two blocks to be hit."""
    hashes = tuple("abcd")
    requests = [Request(0, 0, 9, 1, prefix_hashes=hashes[:2]), Request(1, 0, 18, 1, prefix_hashes=hashes)]
    steps, results = unit_steps(requests, caching(max_num_seqs=4, max_num_batched_tokens=6))
    assert [steps[t].batch for t in range(4)] == [{0: 6}, {0: 3, 1: 3}, {1: 6}, {1: 1}]
    assert results[1].cached_tokens == 8
    # Two blocks held by both, one partial of the first, one of the second, which is at 11 of 12 tokens.
    assert steps[1].free_blocks == 20 - 4
    assert (steps[1].stats.prefill_context, steps[1].stats.prefill_pairs) == (9 + 11, 81 - 36 + 121 - 64)


@pytest.mark.parametrize(("other", "cached"), [(4, 12), (8, 12), (9, 8), (12, 8), (16, 4), (20, 0)])
def test_pressure_evicts_the_tail_first(other, cached):
    """Five blocks: the first leaves a, b, c behind two empty ones; a stranger takes from the front."""
    requests = [
        Request(0, 0, 12, 1, prefix_hashes=tuple("abc")),
        Request(1, 1, other, 1, prefix_hashes=tuple("vwxyz"[: other // 4])),
        Request(2, 2, 13, 1, prefix_hashes=tuple("abc")),
    ]
    steps, results = unit_steps(requests, caching(num_blocks=5))
    assert [r.cached_tokens for r in results] == [0, 0, cached]
    assert steps[2].batch == {2: 13 - cached}


def test_a_hit_renews_a_prefix():
    """Three blocks. a is hit by the third after b was used, so the stranger that wants two blocks evicts b.

    Free queue after each: 1 2 0, 2 0 1, 1 2 0, 0 2 1.
    """
    requests = [
        Request(0, 0, 4, 1, prefix_hashes=("a",)),
        Request(1, 1, 4, 1, prefix_hashes=("b",)),
        Request(2, 2, 5, 1, prefix_hashes=("a",)),
        Request(3, 3, 8, 1, prefix_hashes=("x", "y")),
    ]
    for last, cached in (("a", 4), ("b", 0)):
        _, results = unit_steps([*requests, Request(4, 4, 5, 1, prefix_hashes=(last,))], caching(num_blocks=3))
        assert [r.cached_tokens for r in results] == [0, 0, 4, 0, cached]


def test_hit_blocks_that_nobody_holds_take_up_free_ones():
    """Request 2 wants one block and hits two that are free, and two are free: it waits, and who is behind it too.

    The cache and the queue stay as they are until request 1 ends at 6.
    """
    requests = [
        Request(0, 0, 8, 1, prefix_hashes=tuple("ab")),
        Request(1, 1, 8, 5, prefix_hashes=tuple("xy")),
        Request(2, 1.5, 12, 1, prefix_hashes=tuple("abc")),
        Request(3, 1.5, 1, 1),
    ]
    steps, results = unit_steps(requests, caching(num_blocks=5))
    assert [steps[t].batch for t in range(1, 7)] == [{1: 8}, *[{1: 1}] * 4, {2: 4, 3: 1}]
    assert [steps[t].free_blocks for t in range(1, 7)] == [3, 2, 2, 2, 2, 1]
    assert [r.cached_tokens for r in results] == [0, 0, 8, 0]


def test_hit_blocks_that_somebody_holds_do_not():
    """As before, with a and b held by request 0 itself: request 2 needs one block of two."""
    requests = [
        Request(0, 0, 8, 9, prefix_hashes=tuple("ab")),
        Request(2, 1.5, 12, 1, prefix_hashes=tuple("abc")),
    ]
    steps, results = unit_steps(requests, caching(num_blocks=5))
    assert (steps[1].free_blocks, steps[2].free_blocks) == (2, 1)
    assert steps[2].batch == {0: 1, 2: 4} and results[1].cached_tokens == 8


def test_a_preempted_request_resumes_with_its_own_blocks():
    """Seven blocks of two. At 3 request 1 lacks one and goes, with six tokens computed, two of them output.

    At 4 its three blocks are free; it wants those and another. At 5 request 0 is gone, and all are found:
    one of its seven tokens is left to compute, and counts as a chunk.
    """
    requests = [Request(0, 0, 4, 5), Request(1, 0, 4, 6)]
    steps, results = unit_steps(requests, caching(num_blocks=7, block_size=2))
    assert [steps[t].batch for t in range(8)] == [
        {0: 4, 1: 4}, {0: 1, 1: 1}, {0: 1, 1: 1}, {0: 1}, {0: 1}, {1: 1}, {1: 1}, {1: 1}
    ]  # fmt: skip
    assert [steps[t].free_blocks for t in range(8)] == [3, 1, 1, 3, 3, 3, 3, 2]
    assert steps[3].preempted == (1,)
    stats = steps[5].stats
    assert (stats.num_decode, stats.prefill_tokens, stats.prefill_context, stats.num_sampled) == (0, 1, 7, 1)
    assert [(r.cached_tokens, r.hit_tokens, r.preemptions) for r in results] == [(0, 0, 0), (0, 6, 1)]
    assert [r.finish_s for r in results] == [5, 8]


def test_a_preempted_request_loses_its_tail_first():
    """Six blocks: request 0 takes the third and then the second block of the one it has pushed out."""
    requests = [Request(0, 0, 4, 6), Request(1, 0, 4, 6)]
    steps, results = unit_steps(requests, caching(num_blocks=6, block_size=2))
    assert [steps[t].free_blocks for t in range(6)] == [2, 0, 0, 2, 2, 1]
    assert steps[3].preempted == (1,) and steps[6].batch == {1: 5}
    assert (results[1].cached_tokens, results[1].hit_tokens) == (0, 2)


def test_the_output_of_another_is_not_hit():
    """Even if its hashes would go on: only full blocks of the prompt have one."""
    requests = [Request(0, 0, 6, 9, prefix_hashes=("a",)), Request(1, 20, 13, 1, prefix_hashes=tuple("abc"))]
    _, results = unit_steps(requests, caching())
    assert results[1].cached_tokens == 4


def test_a_priority_victim_withdrawn_from_the_batch_finds_what_it_computed():
    """At 3 the fourth token of request 0 is taken out again: its block is not hit, as that token is not computed."""
    flags = caching("vllm-v1-priority", num_blocks=4, block_size=2, max_num_seqs=4)
    steps, results = unit_steps([Request(0, 0, 1, 6, priority=1), Request(1, 1, 3, 3, priority=0)], flags)
    assert (steps[3].preempted, steps[3].batch, steps[3].free_blocks) == ((0,), {1: 1}, 1)
    assert steps[4].batch == {0: 2}
    assert results[0].hit_tokens == 2


def test_asynchronous_scheduling_looks_up_when_it_admits():
    """Request 1 is seen at 2, when c of request 0 is scheduled already."""
    requests = [Request(0, 0, 12, 4, prefix_hashes=tuple("abc")), Request(1, 0.5, 13, 1, prefix_hashes=tuple("abc"))]
    flags = caching("vllm-v1-async", max_num_batched_tokens=10, max_num_seqs=4)
    steps, results = unit_steps(requests, flags)
    assert [steps[t].batch for t in range(3)] == [{0: 10}, {0: 2}, {0: 1, 1: 1}]
    assert results[1].cached_tokens == 12


def test_whole_prompts_count_without_what_is_cached():
    """Without chunks a prompt of 12 and a decode do not fit 8 tokens, but 4 of the 12 and a decode do."""
    requests = [Request(0, 0, 8, 4, prefix_hashes=tuple("ab")), Request(1, 1, 12, 1, prefix_hashes=tuple("abc"))]
    flags = caching(chunked_prefill=False, max_num_batched_tokens=12, max_num_seqs=4)
    steps, _ = unit_steps(requests, flags)
    assert steps[1].batch == {0: 1, 1: 4}
    steps, _ = unit_steps([requests[0], replace(requests[1], prefix_hashes=())], flags)
    assert steps[1].batch == {0: 1} and steps[4].batch == {1: 12}


def test_a_cache_is_one_instances():
    requests = [Request(i, i, 9, 1, prefix_hashes=tuple("ab")) for i in range(3)]
    results = simulate(requests, caching(), 2, "round_robin", lambda stats: 1.0).requests
    assert [r.cached_tokens for r in results] == [0, 0, 8]


# --- refusals -------------------------------------------------------------------------------------


def test_more_hashes_than_full_blocks_are_refused():
    request = Request(0, 0, 7, 1, prefix_hashes=("a", "b"))
    with pytest.raises(ValueError, match="more prefix hashes than full blocks"):
        simulate([request], caching(), 1, "round_robin", dyadic_cost)


def test_a_watermark_must_leave_room_for_the_longest_return():
    """Without a cache the first chunk of 4 tokens is what has to fit; with it, all that may be found."""
    request, numbers = Request(0, 0, 16, 4), {"max_num_batched_tokens": 4, "max_num_seqs": 1, "num_blocks": 5}
    simulate([request], preset("vllm-v1", block_size=4, watermark_blocks=1, **numbers), 1, "round_robin", dyadic_cost)
    with pytest.raises(ValueError, match="can never be served"):
        simulate([request], caching(watermark_blocks=1, **numbers), 1, "round_robin", dyadic_cost)


@pytest.mark.parametrize("name", sorted(PRESETS.keys() - set(CACHING)))
def test_other_engines_have_no_cache_here(name):
    with pytest.raises(ValueError, match="prefix_caching"):
        preset(name, prefix_caching=True)
