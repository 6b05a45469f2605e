"""The engine against the reference simulator, bit for bit, ties included.

Coefficients, arrivals and limits are dyadic and small, so that float32 is exact and both must agree on every time,
place, stall and preemption. Every router is in every batch, one of them a router that leaves all but one instance
idle; every preset has a cluster of one, of three and of eight. Here are programs as users get them, of one preset of
each kind of scheduler by default and of every one in the slow tests; `test_presets` has the others, compiled quickly.

Seeds 0, 1, ... are drawn; `JAXSIM_EXPLORE=N` in the environment has hypothesis draw N fresh ones a program instead.
"""

import os
from dataclasses import replace

import equinox as eqx
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from jaxsim.engine import loop
from tests.engine import cases as c
from tests.reference import simulator

EXPLORE = int(os.environ.get("JAXSIM_EXPLORE", "0"))
NUM_SEEDS = {1: 2, 3: 4, 8: 2}
"""By the instances of a cluster."""

IN_CROWDS = ("vllm-v1", "vllm-v1-priority", "vllm-v0", "sglang")
"""Eight are another size than three for one of each kind of scheduler; for all of them where time does not matter."""

PROGRAMS = [pytest.param(name, n, id=f"{name}-{n}",
                         marks=[] if n == 3 and name in IN_CROWDS else pytest.mark.slow)
            for name in c.PRESETS for n in NUM_SEEDS if n < 8 or name in IN_CROWDS or EXPLORE]

PREEMPTING = ("vllm-v1", "vllm-v1-async", "vllm-v1-priority", "vllm-v0", "sarathi", "sglang")


def compare(batch: list[c.Case], flags: simulator.Flags, dims, router: str = "mixed"):
    """Reference results, and for every case what differs (None where the reference refuses it)."""
    ours = c.simulate(batch, flags, dims, router, lanes=c.LANES)
    results, wrong = [], []
    for case, lane in zip(batch, ours, strict=True):
        try:
            result = c.reference(case, flags, dims, router)
        except ValueError:
            results.append(None)
            wrong.append(None)
            continue
        results.append(result)
        wrong.append(c.differences(lane, c.answer(result, dims.num_executors, case.limits["num_blocks"])))
    return results, wrong


def check(seed: int, flags: simulator.Flags, dims) -> list[simulator.ReferenceResult]:
    """All cases of a seed agree; else fails with the smallest case that does not."""
    batch = c.draw_many(seed, flags, dims)
    results, wrong = compare(batch, flags, dims)
    failing = [case for case, names in zip(batch, wrong, strict=True) if names]
    if failing:
        def are_failing(smaller):
            return [bool(names) for names in compare(smaller, flags, dims)[1]]

        case = c.smallest(min(failing, key=len), are_failing)
        names = compare([case], flags, dims)[1][0]
        pytest.fail(f"seed {seed}: {len(failing)} of {len(batch)} differ; the smallest in {names}: {case}")
    results = [result for result in results if result is not None]
    assert len(results) >= 0.9 * len(batch), "too many cases that nobody could serve"
    return results


def check_seeds(name: str, num_executors: int):
    """Every seed of a program agrees, and all of them together are hard."""
    flags, dims = simulator.preset(name), c.dims_of(name, num_executors)
    seen = dict(preemptions=0, ties=0, requests=0, batches=0)

    def agree(seed):
        for result in check(seed, flags, dims):
            seen["preemptions"] += sum(r.preemptions for r in result.requests)
            seen["ties"] += result.num_exact_ties
            seen["requests"] += len(result.requests)
            seen["batches"] += sum(len(record.batch) > 1 for record in result.iterations)

    if EXPLORE:
        # A seed has no smaller one; `smallest` reduces.
        phases = (Phase.explicit, Phase.generate)
        fresh = settings(max_examples=EXPLORE, deadline=None, database=None, phases=phases)
        fresh(given(st.integers(0, 2**32))(agree))()
    for seed in range(0 if EXPLORE else NUM_SEEDS[num_executors]):
        agree(seed)
    # The scenarios must be hard, or agreement says little; the more instances, the fewer requests has each.
    assert seen["ties"] > seen["requests"] / 20
    assert seen["batches"] > seen["requests"] / (2 if num_executors < 8 else 16)
    assert (seen["preemptions"] > seen["requests"] / (200 if num_executors < 8 else 1000)) == (name in PREEMPTING)


def check_jumps(flags: simulator.Flags, dims, without):
    """One iteration at a time gives what jumps give; gaps between tokens are as many, if not in the same bins.

    without: `dims` without jumps.
    """
    batch = c.draw_many(11, flags, dims)
    jumping = c.simulate(batch, flags, dims, "mixed", lanes=c.LANES)
    single = c.simulate(batch, flags, without, "mixed", lanes=c.LANES)
    for one, other in zip(jumping, single, strict=True):
        exact = {k: v for k, v in one.items() if k not in ("itl", "held_block_s", "steps")}
        assert c.differences(other, exact) == []
        assert one["itl"].sum() == other["itl"].sum()
    assert sum(lane["steps"] for lane in single) > 1.5 * sum(lane["steps"] for lane in jumping)


@pytest.mark.parametrize("name, num_executors", PROGRAMS)
def test_engine_equals_reference(name, num_executors):
    check_seeds(name, num_executors)


@pytest.mark.parametrize("name, which", [pytest.param("vllm-v1", (1, 2, 3, 7), id="vllm-v1-3"),
                                         pytest.param("sglang", range(8), id="sglang-3", marks=pytest.mark.slow)])
def test_long_outputs(name, which):
    """Runs of iterations up to the longest there are, and counters beyond where they are wound back.

    which: of eight cases; four of them have fewer iterations, and a router each.
    """
    flags, dims = simulator.preset(name), c.dims_of(name, 3)
    rng = np.random.default_rng(2)
    drawn = [c.draw_long(rng, flags, dims) for _ in range(8)]
    batch = [drawn[k] for k in which]
    results, wrong = compare(batch, flags, dims)
    assert not any(wrong)
    results = [result for result in results if result is not None]
    assert len(results) > 0.9 * len(batch)
    assert sum(r.preemptions for result in results for r in result.requests) > 5
    assert max(len(result.iterations) for result in results) > 2 * dims.max_jump


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vllm-v1"], ids=["vllm-v1-3"])
def test_jumps_change_nothing(name):
    flags, dims = simulator.preset(name), c.dims_of(name, 3)
    check_jumps(flags, dims, replace(dims, max_jump=1))


@pytest.mark.parametrize("name", ["vllm-v1"], ids=["vllm-v1-3"])
def test_a_wrong_answer_is_found(monkeypatch, name):
    """The comparison can fail: one block more in the pool of every lane shows."""
    flags, dims = simulator.preset(name), c.dims_of(name, 3)
    run = loop.run

    def richer(dims, params, requests):
        return run(dims, eqx.tree_at(lambda p: p.groups[0].batching.num_blocks, params, replace_fn=lambda n: n + 1),
                   requests)

    batch = c.draw_many(5, flags, dims)
    assert not any(compare(batch, flags, dims)[1])
    monkeypatch.setattr(loop, "run", richer)
    _, wrong = compare(batch, flags, dims)
    assert sum(map(bool, wrong)) >= 3
    with pytest.raises(pytest.fail.Exception, match="the smallest in"):
        check(5, flags, dims)
