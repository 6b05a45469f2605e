"""The engine against the reference simulator, bit for bit, ties included.

Coefficients, arrivals and limits are dyadic and small, so that float32 is exact and both must agree on every time,
place, stall and preemption. Every router is in every batch, one of them a router that leaves all but one instance
idle; every preset has a cluster of one, of three and of eight.

Seeds 0, 1, ... are drawn; `JAXSIM_EXPLORE=N` in the environment has hypothesis draw N fresh ones a program instead.
"""

import os
from dataclasses import replace

import equinox as eqx
import jax
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
                         marks=[] if n == 3 or (name, n) == ("vllm-v1", 1) else pytest.mark.slow)
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


@pytest.mark.parametrize("name, num_executors", PROGRAMS)
def test_engine_equals_reference(name, num_executors):
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


def test_prompts_that_wait_come_later():
    """What the cases of batch waiting test: most of them are others without it."""
    flags, dims = simulator.preset("tensorrt-llm-waiting"), c.dims_of("tensorrt-llm-waiting", 3)
    cases = c.draw_many(0, flags, dims)
    at_once = [replace(case, limits=case.limits | dict(batch_wait_timeout_iters=0)) for case in cases]
    delays = [np.mean([a.ttft_s - b.ttft_s for a, b in zip(*(c.reference(one, flags, dims, "mixed").requests
                                                            for one in pair), strict=True)])
              for pair in zip(cases, at_once, strict=True)]
    assert np.mean(np.array(delays) > 0) > 0.3


@pytest.mark.parametrize("name", [pytest.param("vllm-v1", id="vllm-v1-3"),
                                  pytest.param("sglang", id="sglang-3", marks=pytest.mark.slow)])
def test_long_outputs(name):
    """Runs of iterations up to the longest there are, and counters beyond where they are wound back."""
    flags, dims = simulator.preset(name), c.dims_of(name, 3)
    rng = np.random.default_rng(2)
    batch = [c.draw_long(rng, flags, dims) for _ in range(c.LANES // 8)]
    results, wrong = compare(batch, flags, dims)
    assert not any(wrong)
    results = [result for result in results if result is not None]
    assert len(results) > 0.9 * len(batch)
    assert sum(r.preemptions for result in results for r in result.requests) > 5
    assert max(len(result.iterations) for result in results) > 2 * dims.max_jump


@pytest.mark.parametrize("name", ["vllm-v1"], ids=["vllm-v1-3"])
def test_jumps_change_nothing(name):
    """One iteration at a time gives what jumps give; gaps between tokens are as many, if not in the same bins."""
    flags, dims = simulator.preset(name), c.dims_of(name, 3)
    batch = c.draw_many(11, flags, dims)
    jumping = c.simulate(batch, flags, dims, "mixed", lanes=c.LANES)
    single = c.simulate(batch, flags, replace(dims, max_jump=1), "mixed", lanes=c.LANES)
    for one, other in zip(jumping, single, strict=True):
        exact = {k: v for k, v in one.items() if k not in ("itl", "held_block_s", "steps")}
        assert c.differences(other, exact) == []
        assert one["itl"].sum() == other["itl"].sum()
    assert sum(lane["steps"] for lane in single) > 1.5 * sum(lane["steps"] for lane in jumping)


TRACE = c.Case(
    arrival_s=np.array([0.0, 0.0, 3.0]), prompt=np.array([40, 50, 30]), output=np.array([30, 20, 40]),
    max_tokens=np.array([30, 20, 40]), priority=np.zeros(3, int), uniforms=np.zeros((3, 2), np.float32),
    limits=dict(max_num_seqs=4, watermark_blocks=0, num_blocks=10, max_model_len=128),
    coefficients=((1.0, 0, 0, 0, 0),) * 3)
"""Ten blocks of 16 tokens, an iteration a second."""


@pytest.mark.parametrize("name, budget, preemptions, last_step", [
    pytest.param("vllm-v1", 64, [0, 0, 1], 54, id="vllm-v1-1"),
    pytest.param("vllm-v0", 128, [0, 0, 4], 56, id="vllm-v0-1")])
def test_golden_trace(name, budget, preemptions, last_step):
    """Traces derived by hand from the schedulers of vLLM V1 and V0."""
    flags, dims = simulator.preset(name), c.dims_of(name, 1)
    trace = replace(TRACE, limits=TRACE.limits | {"max_num_batched_tokens": budget})
    (lane,) = c.simulate([trace], flags, dims, "mixed", lanes=c.LANES)
    assert lane["fault"] == 0
    assert lane["preemptions"].tolist() == preemptions
    assert lane["finish_s"].max() == last_step + 1
    assert lane["num_iterations"].tolist() == [last_step + 1]
    # Request 0 is never disturbed by the other two.
    assert lane["first_token_s"][0] == 1 and lane["peak_blocks"].tolist() == [10]


@pytest.mark.parametrize("name, budget, facts", [
    # iteration: (prompt tokens, decodes, blocks that are free while it runs)
    pytest.param("vllm-v1", 64, {
        0: (64, 0, 5), 1: (26, 1, 3), 2: (0, 2, 3), 3: (30, 2, 1), 6: (0, 3, 0), 9: (0, 2, 2),
        21: (36, 1, None), 54: (0, 1, None)}, id="vllm-v1-1"),
    pytest.param("vllm-v0", 128, {
        0: (90, 0, 3), 3: (30, 0, None), 7: (0, 2, None), 8: (34, 0, None), 9: (0, 2, None), 10: (35, 0, None),
        11: (0, 2, None), 12: (36, 0, None), 13: (0, 2, None), 24: (37, 0, None), 56: (0, 1, None)}, id="vllm-v0-1")])
def test_golden_trace_step_by_step(name, budget, facts):
    """What serving systems' schedulers do in the iterations that the traces speak of, from the tape."""
    flags = simulator.preset(name)
    dims = replace(c.dims_of(name, 1), max_jump=1, num_records=200)
    trace = replace(TRACE, limits=TRACE.limits | {"max_num_batched_tokens": budget})
    world = jax.device_get(loop.run(dims, *c.inputs([trace], flags, dims, "mixed")))
    assert int(world.num_recorded[0]) == max(facts) + 1
    for iteration, (prompt_tokens, decodes, free) in facts.items():
        _, _, _, used, count, tokens, decoding = world.tape_counts[0, iteration]
        assert (count, tokens, decoding) == (1, prompt_tokens, decodes), iteration
        assert free is None or 10 - used == free, iteration


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
