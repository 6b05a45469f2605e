"""Host memory, or a sibling's contexts, behind the prefix cache, against the reference, which goes block by block."""

from collections import Counter
from dataclasses import replace

import jax
import numpy as np
import pytest

from jaxsim.engine import loop
from jaxsim.kernels import clock
from jaxsim.policy.context_reuse import ContextReuse
from jaxsim.policy.offload import Offload
from jaxsim.state import world as w
from tests.engine import cases as c
from tests.engine.test_prefix import SIZES, draw
from tests.reference import prefix_cache, simulator
from tests.reference.offload import Offloading, Sibling

pytestmark = pytest.mark.unoptimised

EVERYTHING = 1 << 20
"""Blocks, more than any case stores."""


@pytest.fixture
def copies(monkeypatch):
    """Counts admissions that compute a block again that is cached: of prompts of whole blocks, all of them cached."""
    seen, allocate = [0], prefix_cache.PrefixCache.allocate

    def watched(self, request, num_tokens=None):
        blocks, rest = divmod(request.known_tokens, self.block_size)
        seen[0] += rest == 0 and all(self.blocks_of_key.get(self._key(request, i)) for i in range(blocks))
        return allocate(self, request, num_tokens)

    monkeypatch.setattr(prefix_cache.PrefixCache, "allocate", watched)
    return seen


def draw_rules(rng: np.random.Generator, case: c.Case, block_size: int, is_bounded: bool) -> Offloading:
    """Room for less than a prompt up to all of them; loads from nothing to longer than iterations."""
    need = -(-int(case.prompt.max() + case.output.max()) // block_size)
    capacity = EVERYTHING
    if is_bounded:
        capacity = int(rng.choice([need // 2, need, 2 * need, 4 * need, EVERYTHING]))
    return Offloading(capacity, float(rng.choice([0.0, 2.0**-7, 2.0**-4, 2.0**-1])),
                      int(rng.choice([1, 2, 4, 32])), bool(rng.integers(2)))


def draw_sibling(rng: np.random.Generator) -> Sibling:
    """From no layer to all; links from nothing to slower than layers."""
    return Sibling(float(rng.choice([0.0, 0.125, 0.25, 0.5, 1.0])), float(rng.choice([0.0, 2.0**-10, 2.0**-7])),
                   float(rng.choice([2.0**-10, 2.0**-6, 2.0**-3])), float(rng.choice([0.0, 2.0**-6])),
                   bool(rng.random() < 0.7))


def draw_cases(seed: int, flags: simulator.Flags, dims) -> list[tuple[c.Case, Offloading | Sibling]]:
    """Pools that hold little more than one request, so that there is something to load."""
    rng, drawn = np.random.default_rng(700 + seed), []
    for case in draw(seed, flags, dims):
        need = -(-int(np.max(case.prompt + case.output)) // dims.block_size)
        num_blocks = min(case.limits["num_blocks"], need + int(rng.integers(0, need + 1)))
        case = replace(case, limits=case.limits | dict(num_blocks=num_blocks))
        drawn.append((case, draw_sibling(rng) if dims.has_reuse else
                      draw_rules(rng, case, dims.block_size, dims.offload_log > 0)))
    return drawn


def as_read(rules: Offloading | Sibling) -> dict:
    """The same rules as the engine reads them."""
    if isinstance(rules, Sibling):
        numbers = (rules.share, rules.hidden_s, rules.kv_s, rules.latency_s)
        return dict(reuse=ContextReuse(*map(np.float32, numbers), np.bool_(rules.pipelined)))
    return dict(offload=Offload(np.int32(rules.capacity), np.float32(rules.block_s), np.int32(rules.layers),
                                np.bool_(rules.by_layer)))


def params_of(case: c.Case, flags: simulator.Flags, rules: Offloading | Sibling):
    """What the engine is told of a case."""
    params = c.make_params(case, flags, "mixed")
    (group,) = params.groups
    return replace(params, groups=(replace(group, batching=replace(group.batching, **as_read(rules))),))


def simulate(drawn: list[tuple[c.Case, Offloading | Sibling]], flags: simulator.Flags, dims) -> list[dict]:
    """Engine results of a batch, padded to `LANES`."""
    padded = drawn + drawn[:1] * (c.LANES - len(drawn))
    params = c.stack([params_of(case, flags, rules) for case, rules in padded])
    _, requests = c.inputs([case for case, _ in padded], flags, dims, "mixed")
    world = jax.device_get(loop.run(dims, params, requests))
    results = []
    for lane, (case, _) in enumerate(drawn):
        got, n = c.unpack(dims, world, lane, len(case)), len(case)
        held = w.count_rows(dims).everything(world.counts[lane]).rank.offload
        loads = w.clock_rows(dims).everything(world.clocks[lane]).rank.loads
        got |= dict(loaded_tokens=world.loaded[lane, :n], loaded_blocks=held.loaded_blocks.sum(1),
                    loads_s=(loads.hi.astype(float) + loads.lo).sum(1))
        if dims.has_offload:
            is_item = np.arange(world.stored.shape[-1]) != dims.num_segments
            got |= dict(stored_blocks=held.stored_blocks.sum(1), in_segments=world.stored[lane][:, is_item].sum(1))
        results.append(got)
    return results


def compare(drawn, flags, dims, copies, seen) -> None:
    """Everything bit for bit, but where the engine has a second copy of a block, which it says is approximated."""
    for (case, rules), got in zip(drawn, simulate(drawn, flags, dims), strict=True):
        copies[0] = 0
        try:
            result = c.reference(case, replace(flags, offloading=rules), dims, "mixed")
        except ValueError:
            continue
        want = c.answer(result, dims.num_executors, case.limits["num_blocks"])
        for name in ("cached_tokens", "loaded_tokens"):
            want[name] = np.array([getattr(r, name) for r in result.requests])
        want["loaded_blocks"] = np.array([store.seen["loaded_blocks"] for store in result.stores])
        want["loads_s"] = np.array([store.delay * clock.GRID_S for store in result.stores])
        names = c.differences(got, want)
        if dims.has_offload:
            # What is beyond the capacity is settled before the next prompt.
            stored = np.minimum(got["stored_blocks"], rules.capacity)
            kept = [len(store.blocks) for store in result.stores]
            if list(stored) != kept or list(got["stored_blocks"]) != list(got["in_segments"]):
                names.append("stored")
        seen.update(cases=1)
        if copies[0]:
            seen.update(with_copies=1, wrong_with_copies=bool(names))
            continue
        assert not names, (names, case, rules)
        for store in result.stores:
            seen.update(store.seen)
        seen.update(cached=want["cached_tokens"].sum(), loaded=want["loaded_tokens"].sum(),
                    preemptions=want["preemptions"].sum(),
                    returns=sum(store.seen.get("own_blocks", 0) > 0 for store in result.stores),
                    longer=(want["loads_s"] > 0).sum(), jumped=max(len(result.iterations) - got["steps"], 0))


@pytest.mark.parametrize("name, num_executors, log", [
    pytest.param("vllm-v1", 3, 0, marks=pytest.mark.slow), ("vllm-v1-async", 3, 4096),
    pytest.param("vllm-v1", 3, 4096, marks=pytest.mark.slow),
    pytest.param("vllm-v1-priority", 3, 4096, marks=pytest.mark.slow),
    pytest.param("vllm-v1", 1, 4096, marks=pytest.mark.slow)])
def test_engine_equals_reference(name, num_executors, log, copies):
    """Where host memory holds everything, and where the longest untouched blocks go first."""
    flags = replace(simulator.preset(name), prefix_caching=True)
    dims = c.dims_of(name, num_executors, **SIZES, has_offload=True, offload_log=log)
    seen = Counter()
    for seed in range(3):
        compare(draw_cases(seed, flags, dims), flags, dims, copies, seen)
    assert seen["cases"] > 150 and seen["cached"] > 2000 and seen["loaded"] > 200, seen
    assert seen["preemptions"] > 20 and seen["loads_together"] > 5 and seen["longer"] > 30, seen
    assert seen["covered"] > 5 and seen["bound_by_load"] > 5 and seen["returns"] > 3, seen
    assert (seen["evicted_blocks"] > 500) == (log > 0), seen
    assert seen["with_copies"] < 0.5 * seen["cases"], seen
    assert seen["wrong_with_copies"] < 0.08 * seen["cases"], seen


@pytest.mark.slow
def test_siblings_equal_reference(copies):
    """What prompts share comes from a sibling: hidden states, KV of some layers, the others recomputed."""
    flags = replace(simulator.preset("vllm-v1"), prefix_caching=True)
    dims = c.dims_of("vllm-v1", 3, **SIZES, has_reuse=True)
    seen = Counter()
    for seed in range(3):
        compare(draw_cases(seed, flags, dims), flags, dims, copies, seen)
    assert seen["cases"] > 150 and seen["cached"] > 2000 and seen["loaded"] > 2000, seen
    assert seen["preemptions"] > 20 and seen["loads_together"] > 20 and seen["longer"] > 100, seen
    assert seen["covered"] > 50 and seen["bound_by_load"] > 50, seen
    assert seen["wrong_with_copies"] <= seen["with_copies"] < 0.5 * seen["cases"], seen
    assert seen["wrong_with_copies"] < 0.08 * seen["cases"], seen
