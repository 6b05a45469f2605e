"""Prefix caching against the reference, block by block there and in segments here."""

import random
from dataclasses import replace

import jax
import numpy as np
import pytest

from jaxsim.cost.base import BatchStats
from jaxsim.cost.roofline import roofline
from jaxsim.engine import loop
from jaxsim.engine.simulate import simulate
from jaxsim.spec.device import load_device
from jaxsim.spec.model import load_model
from jaxsim.spec.scenario import Scenario
from jaxsim.workload import Workload
from tests.engine import cases as c
from tests.reference import prefix_cache, simulator
from tests.reference.prefix_scenarios import random_prefixes, random_prompts

pytestmark = pytest.mark.unoptimised

SIZES = dict(block_size=4, num_segments=256, path_width=24, log_size=4096)
"""Room for the segments of every case."""

PROGRAMS = [pytest.param("vllm-v1", 1, marks=pytest.mark.slow), ("vllm-v1", 3),
            pytest.param("vllm-v1-async", 3, marks=pytest.mark.slow),
            pytest.param("vllm-v1-priority", 3, marks=pytest.mark.slow)]


def draw(seed: int, flags: simulator.Flags, dims) -> list[c.Case]:
    """Crowded scenarios whose prompts share blocks."""
    made = []
    for case in c.draw_many(seed, flags, dims):
        rng = random.Random(seed * 1000 + len(made))
        prompt = random_prompts(rng, len(case), dims.block_size, int(case.prompt.max()))
        prompt = np.minimum(prompt, case.prompt.max())
        prefixes = random_prefixes(rng, len(case), dims.block_size, prompt.tolist())
        made.append(replace(case, prompt=prompt, prefixes=prefixes))
    return made


@pytest.fixture
def copies(monkeypatch):
    """Counts blocks that the reference enters a second time: identical prompts of whole blocks, and these alone."""
    seen, extend = [0], prefix_cache.PrefixCache._extend

    def watched(self, request, num_new, tokens):
        extend(self, request, num_new, tokens)
        seen[0] += any(len(blocks) > 1 for blocks in self.blocks_of_key.values())

    monkeypatch.setattr(prefix_cache.PrefixCache, "_extend", watched)
    return seen


@pytest.mark.parametrize("name, num_executors", PROGRAMS)
def test_engine_equals_reference(name, num_executors, copies):
    """Bit for bit, cached tokens included; a second copy of a block is the approximation that the engine names."""
    flags = replace(simulator.preset(name), prefix_caching=True)
    dims = c.dims_of(name, num_executors, **SIZES)
    seen = dict(cases=0, with_copies=0, wrong_with_copies=0, hits=0, preemptions=0, returns=0)
    for seed in range(3):
        batch = draw(seed, flags, dims)
        for case, lane in zip(batch, c.simulate(batch, flags, dims, "mixed", lanes=c.LANES), strict=True):
            copies[0] = 0
            try:
                result = c.reference(case, flags, dims, "mixed")
            except ValueError:
                continue
            want = c.answer(result, dims.num_executors, case.limits["num_blocks"])
            want["cached_tokens"] = np.array([r.cached_tokens for r in result.requests])
            names = c.differences(lane, want)
            if copies[0]:
                seen["with_copies"] += 1
                seen["wrong_with_copies"] += bool(names)
            else:
                assert not names, (seed, names, case)
            seen["cases"] += 1
            seen["hits"] += want["cached_tokens"].sum()
            seen["preemptions"] += want["preemptions"].sum()
            seen["returns"] += sum(r.hit_tokens - r.cached_tokens for r in result.requests)
    assert seen["cases"] > 150 and seen["hits"] > 4000 and seen["preemptions"] > 20 and seen["returns"] > 100, seen
    assert seen["with_copies"] < 0.5 * seen["cases"] and seen["wrong_with_copies"] < 0.05 * seen["cases"], seen


def test_nothing_is_held_at_the_end():
    """All references gone, all blocks free, the account of free blocks right."""
    flags = replace(simulator.preset("vllm-v1"), prefix_caching=True)
    dims = c.dims_of("vllm-v1", 1, **SIZES)
    batch = draw(1, flags, dims)
    world = jax.device_get(loop.run(dims, *c.inputs(batch, flags, dims, "mixed")))
    rank = c.w.count_rows(dims).everything(world.counts).rank
    assert not world.fault.any() and not world.references[:, 0, :-1].any()
    assert not rank.used_blocks.any() and not rank.cache.shared.any()
    debt = rank.cache.never_used + rank.cache.released
    assert np.all(debt.ravel() >= [case.limits["num_blocks"] for case in batch])


def can_be_served(case, flags, dims) -> bool:
    """Whether the reference, without prefix caching, does not refuse it."""
    try:
        c.reference(case, flags, dims, "mixed")
    except ValueError:
        return False
    return True


def test_without_prompts_in_common_nothing_changes():
    """Nobody finds anything, unless preempted: the same times as without prefix caching."""
    flags = simulator.preset("vllm-v1")
    dims = c.dims_of("vllm-v1", 3, **SIZES)
    # One that cannot be served would go round until the limit of steps, and all others with it.
    batch = [replace(case, prefixes=[()] * len(case)) for case in draw(2, flags, dims)
             if can_be_served(case, flags, dims)]
    cached = c.simulate(batch, replace(flags, prefix_caching=True), dims, "mixed", lanes=c.LANES)
    plain = c.simulate(batch, flags, c.dims_of("vllm-v1", 3), "mixed", lanes=c.LANES)
    same = [one for one in zip(cached, plain, strict=True) if not one[1]["preemptions"].any()]
    assert len(same) > 20
    for one, other in same:
        assert not one["cached_tokens"].any()
        assert c.differences(one, {k: v for k, v in other.items() if k != "steps"}) == []


@pytest.mark.slow
def test_blocks_in_common_are_read_once():
    """Sequences that share a prefix decode as fast as the cost of the tokens they differ in says."""
    shared, own, output, count = 160, 48, 33, 8
    scenario = Scenario.from_dict({
        "schema_version": 1, "model": {"name": "llama-2-7b"}, "device": {"name": "h100"}, "num_seeds": 1,
        "engine": {"enable_prefix_caching": True, "max_model_len": 1024}, "workload": {"kind": "batch"},
        "cost": {"host": "none"}})
    # The first has computed what the others find when they come, all at once.
    arrival_s = np.r_[0.0, np.full(count, 30.0), 60.0]
    lengths = np.r_[shared + own, np.full(count, shared + own), shared + own]
    ids = [[*range(shared // 16), *range(1000 + 100 * i, 1000 + 100 * i + own // 16)] for i in range(count + 2)]
    workload = Workload(arrival_s, lengths, np.full(count + 2, output), prefix_block_size=16,
                        prefix_offsets=np.r_[0, np.cumsum([len(i) for i in ids])], prefix_hashes=np.concatenate(ids))
    lane = simulate(scenario, workload=workload).lanes[0][0]
    np.testing.assert_array_equal(lane.cached_tokens, np.r_[0, np.full(count + 1, shared)])
    cost = roofline(load_model("llama-2-7b"), load_device("h100"), host="none").tabulate(4096, 64)

    def seconds(num: int, less: int) -> float:
        """From the first token to the last."""
        return sum(float(cost.iteration(BatchStats.of(num, num * (shared + own + 1 + j), decode_shared=less)))
                   for j in range(output - 1))

    took = lane.finish_s - lane.first_token_s
    np.testing.assert_allclose(took[1:-1], seconds(count, (count - 1) * shared), rtol=1e-5)
    np.testing.assert_allclose(took[[0, -1]], seconds(1, 0), rtol=1e-5)
    assert seconds(count, (count - 1) * shared) < 0.98 * seconds(count, 0)
