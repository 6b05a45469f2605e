"""Preemption by swap and priorities drawn anew, against the reference, bit for bit."""

from collections import Counter
from dataclasses import replace

import jax
import numpy as np
import pytest

from jaxsim.engine import loop
from jaxsim.engine.outcomes import swapped
from jaxsim.kernels import clock
from jaxsim.policy.swap import Swap
from jaxsim.state import world as w
from tests.engine import cases as c
from tests.reference import simulator
from tests.reference.swapping import Swapping

pytestmark = pytest.mark.unoptimised

FLAGS = simulator.preset("vllm-v0")
WINDOW = 27


def draw_rules(rng: np.random.Generator, case: c.Case, block_size: int, is_drawn: bool) -> Swapping:
    """Host memory from next to none to plenty; copies from free to slower than iterations."""
    need = -(-int(np.max(case.prompt + case.output)) // block_size)
    return Swapping(
        host_blocks=int(rng.choice([2, need, need, 2 * need, 1000])), layers=int(rng.integers(1, 4)),
        bandwidth=2.0 ** int(rng.choice([4, 8, 12])), dispatch_s=float(rng.choice([0.0, 2.0**-9, 2.0**-5])),
        launch_s=float(rng.choice([0.0, 2.0**-9])), run_blocks=int(rng.choice([1, 1, 2, 4])),
        is_async=bool(rng.integers(2)), reuse=bool(rng.random() < 0.75),
        period=int(rng.integers(1, 9)) if is_drawn else 0,
        levels=int(rng.choice([2, 8, 4096])), locality=float(rng.choice([0.0, 0.5, 0.75])))


def swap_of(rules: Swapping) -> Swap:
    """The same rules as the engine reads them."""
    i, x = np.int32, np.float32
    drawn = {}
    if rules.period:
        drawn = dict(period=i(rules.period), levels=i(rules.levels), locality=i(round(rules.locality * 65536)))
    return Swap(i(rules.host_blocks), i(rules.layers), x(rules.block_copy_bytes), x(rules.bandwidth),
                x(rules.dispatch_s), x(rules.launch_s), i(rules.run_blocks), np.bool_(rules.is_async),
                np.bool_(rules.reuse), **drawn)


def params_of(case: c.Case, rules: Swapping):
    """What the engine is told of a case."""
    params = c.make_params(case, FLAGS, "mixed")
    (group,) = params.groups
    return replace(params, groups=(replace(group, batching=replace(group.batching, swap=swap_of(rules))),))


def draw(seed: int, dims, is_drawn: bool) -> list[tuple[c.Case, Swapping]]:
    """Cases with a block more, which who comes back wants to be free."""
    rng = np.random.default_rng(1000 + seed)
    cases = c.draw_many(seed, FLAGS, dims)
    cases = [replace(case, limits=case.limits | dict(num_blocks=case.limits["num_blocks"] + 1)) for case in cases]
    return [(case, draw_rules(rng, case, dims.block_size, is_drawn)) for case in cases]


def differences(got: dict, case: c.Case, rules: Swapping, dims) -> tuple[list[str], simulator.ReferenceResult]:
    """Names of what is not as in the reference."""
    result = c.reference(case, replace(FLAGS, swapping=rules), dims, "mixed")
    want = c.answer(result, dims.num_executors, case.limits["num_blocks"])
    want |= {name: np.array([getattr(r, name) for r in result.requests]) for name in ("swaps", "swap_s")}
    stalled = {i: ticks for state in result.swapping for i, ticks in state.stalled.items()}
    want["stalled_s"] = np.array([clock_seconds(stalled.get(i, 0)) for i in range(len(case))])
    want["peak_blocks"] = np.array([state.peak for state in result.swapping])
    want["swapped_blocks"] = np.array(
        [sum(state.seen[name] for state in result.swapping) for name in ("copied_blocks", "reused_blocks")])
    want |= dict(used_blocks=np.zeros(dims.num_executors, int), host_blocks=np.zeros(dims.num_executors, int),
                 stood_s=np.array([clock_seconds(s.stood) for s in result.swapping]),
                 num_gaps=int((case.output - 1).sum()))
    return c.differences(got, want), result


def clock_seconds(ticks: int) -> float:
    return ticks * clock.GRID_S


def simulate(drawn: list[tuple[c.Case, Swapping]], dims) -> list[dict]:
    """Engine results of a batch, padded to `LANES`."""
    padded = drawn + drawn[:1] * (c.LANES - len(drawn))
    params = c.stack([params_of(*one) for one in padded])
    _, requests = c.inputs([case for case, _ in padded], FLAGS, dims, "mixed")
    world = jax.device_get(loop.run(dims, params, requests))
    results = []
    for lane, (case, _) in enumerate(drawn):
        got, n = c.unpack(dims, world, lane, len(case)), len(case)
        counts = w.count_rows(dims).everything(world.counts[lane]).rank.swap
        got |= swapped(dims, world, np.s_[lane, :n], lane)
        got |= dict(host_blocks=counts.host_blocks.sum(1), stood_s=got["swap_delay_s"], num_gaps=int(got["itl"].sum()))
        results.append(got)
    return results


def compare(drawn, dims) -> tuple[list[list[str]], Counter]:
    """What differs in each case, and what the cases had in them."""
    seen, wrong = Counter(), []
    for (case, rules), got in zip(drawn, simulate(drawn, dims), strict=True):
        names, result = differences(got, case, rules, dims)
        wrong.append(names)
        for state in result.swapping:
            seen.update(state.seen)
        seen.update(requests=len(case), stood=sum(r.swap_s > 0 and not rules.is_async for r in result.requests),
                    came_late=sum(r.swap_s > 0 and rules.is_async for r in result.requests),
                    jumped=max(len(result.iterations) - got["steps"], 0))
    return wrong, seen


@pytest.mark.parametrize("is_drawn", [pytest.param(False, marks=pytest.mark.slow), True], ids=["arrival", "drawn"])
@pytest.mark.parametrize("num_executors", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_engine_equals_reference(num_executors, is_drawn):
    dims = c.dims_of("vllm-v0", num_executors, swap_window=WINDOW)
    seen = Counter()
    for seed in (1, 3) if is_drawn else (0, 1, 3):
        drawn = draw(seed, dims, is_drawn)
        wrong, found = compare(drawn, dims)
        seen += found
        failing = [one for one, names in zip(drawn, wrong, strict=True) if names]
        if failing:
            case, rules = min(failing, key=lambda one: len(one[0]))
            case = c.smallest(case, lambda cases, rules=rules: [
                bool(names) for names in compare([(one, rules) for one in cases], dims)[0]])
            names = compare([(case, rules)], dims)[0][0]
            pytest.fail(f"seed {seed}: {len(failing)} of {len(drawn)} differ; the smallest in {names}: {case} {rules}")
    for name in ("out", "in", "recomputed", "stood", "came_late", "dropped", "reused_blocks", "jumped"):
        assert seen[name] > 3, (name, seen)
    if is_drawn:
        for name in ("drawn_out", "boosted", "ties", "in_and_prompt"):
            assert seen[name] > 20, (name, seen)


def two_requests(**changes) -> tuple[c.Case, Swapping]:
    """Five blocks of four tokens, an iteration a second, half a second to swap two blocks; two alike requests."""
    case = c.Case(
        arrival_s=np.zeros(2), prompt=np.array([4, 4]), output=np.array([10, 10]), max_tokens=np.array([10, 10]),
        priority=np.zeros(2, int), uniforms=np.zeros((2, 2), np.float32),
        limits=dict(max_num_seqs=4, max_num_batched_tokens=64, watermark_blocks=0, num_blocks=5, max_model_len=32),
        coefficients=((1.0, 0, 0, 0, 0),) * 3, router=len(c.MIXED) - 1)
    return case, Swapping(host_blocks=8, layers=1, dispatch_s=0.125, **changes)


@pytest.mark.slow
def test_by_hand():
    """Both have two blocks from t = 1 on. At t = 5 the first takes the last free one and the other, with 8 tokens, is
    swapped out: four copies of an eighth of a second. It wants three free blocks, which there are when the first is
    done, five tokens later; it has five tokens to go.

    The copies stand before iterations: the first ends at 10 + 0.5, the other after 0.5 more at 16. Beside them: the
    first ends at 10, the other is on the way in until 10.5 and ends at 15.5. Of two runs of two blocks: half of it.
    """
    dims = c.dims_of("vllm-v0", 3, swap_window=WINDOW)
    before, beside, grouped = simulate(
        [two_requests(), two_requests(is_async=True), two_requests(run_blocks=2)], dims)
    assert before["finish_s"].tolist() == [10.5, 16.0]
    assert before["stalled_s"].tolist() == [0.0, 5.5]
    assert before["swap_s"].tolist() == [0.5, 1.0] and before["stood_s"].tolist() == [1.0, 0.0, 0.0]
    assert beside["finish_s"].tolist() == [10.0, 15.5]
    assert beside["swap_s"].tolist() == [0.0, 0.5] and beside["stood_s"].tolist() == [0.0, 0.0, 0.0]
    assert grouped["finish_s"].tolist() == [10.25, 15.5]
    for lane in (before, beside, grouped):
        assert lane["swaps"].tolist() == [0, 1] and lane["swapped_blocks"].tolist() == [2, 0]


def test_a_wrong_answer_is_found():
    """The comparison can fail: copies of a layer more show."""
    dims = c.dims_of("vllm-v0", 3, swap_window=WINDOW)
    drawn = draw(0, dims, False)
    slower = [(case, replace(rules, layers=rules.layers + 1)) for case, rules in drawn]
    wrong = [differences(got, *one, dims)[0] for one, got in zip(drawn, simulate(slower, dims), strict=True)]
    assert sum("swap_s" in names for names in wrong) >= 3


@pytest.mark.parametrize("is_drawn", [False, True], ids=["arrival", "drawn"])
def test_copies_that_an_epoch_interrupts(is_drawn):
    """Six seconds of arrivals before the loop must move its epoch, which it then does with copies under way."""
    dims = c.dims_of("vllm-v0", 3, swap_window=WINDOW)
    late = [(replace(case, arrival_s=case.arrival_s + 1.5 * clock.EPOCH_S - 6), rules)
            for case, rules in draw(1, dims, is_drawn)]
    wrong, seen = compare(late, dims)
    assert not any(wrong) and seen["came_late"] > 20 and seen["stood"] > 20
