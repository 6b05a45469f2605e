"""Host memory that keeps what turns of sessions end with, and block groups, against the reference, bit for bit."""

from collections import Counter
from dataclasses import replace

import jax
import numpy as np
import pytest

from jaxsim.engine import loop, lower
from jaxsim.engine.outcomes import swapped
from jaxsim.kernels import clock
from jaxsim.policy.arrivals import Sessions
from jaxsim.policy.swap import ONE_HOLE
from jaxsim.state import world as w
from jaxsim.workload import Workload
from tests.engine import cases as c
from tests.engine import test_sessions, test_swap
from tests.engine.test_compiled import large_shapes, problems
from tests.reference import simulator
from tests.reference.swapping import Swapping

pytestmark = pytest.mark.unoptimised

FLAGS = simulator.preset("vllm-v0")
WINDOW = 43

Drawn = tuple[c.Case, Workload, float, Swapping]


def dims_of():
    return c.dims_of("vllm-v0", 2, block_size=4, swap_window=WINDOW, keeps_turns=True, has_block_groups=True)


def draw(rng: np.random.Generator, dims, is_drawn: bool) -> Drawn:
    """Sessions on an engine that is short of blocks, most of them on one instance; groups short enough to differ."""
    case, workload, outside = test_sessions.draw(rng, FLAGS, dims)
    need = -(-int(np.max(case.prompt + case.output)) // dims.block_size)
    limits = case.limits | dict(
        num_blocks=need + case.limits["watermark_blocks"] + 1 + int(rng.integers(0, need + 1)),
        max_num_seqs=max(case.limits["max_num_seqs"], 4))
    if rng.random() < 3 / 4:
        case = replace(case, router=c.MIXED.index("first"))
    # Iterations so long that sessions meet.
    slower = 2.0 ** int(rng.integers(0, 6))
    case = replace(case, limits=limits, coefficients=tuple(tuple(slower * x for x in row) for row in case.coefficients))
    rules = test_swap.draw_rules(rng, case, dims.block_size, is_drawn)
    return case, workload, outside, replace(
        rules, turns=True, run_blocks=1, group_blocks=int(rng.choice([1, 2, 3, 60])),
        host_blocks=int(rng.choice([need // 2 + 1, need, 2 * need, 4 * need, 1000])))


def params_of(drawn: Drawn):
    case, _, outside, rules = drawn
    params = test_swap.params_of(case, rules)
    (group,) = params.groups
    swap = replace(group.batching.swap, group_blocks=np.int32(rules.group_blocks))
    group = replace(group, batching=replace(group.batching, swap=swap))
    return replace(params, groups=(group,), source=Sessions(np.float32(outside)))


def simulate(drawn: list[Drawn], dims) -> list[dict]:
    """Engine results of a batch, padded to `LANES`."""
    padded = drawn + drawn[:1] * (c.LANES - len(drawn))
    params = c.stack([params_of(one) for one in padded])
    requests = c.stack([lower.make_requests(workload, dims) for _, workload, *_ in padded])
    world, lanes = jax.device_get(loop.run(dims, params, requests)), []
    for lane, (case, *_) in enumerate(drawn):
        n, counts = len(case), w.count_rows(dims).everything(world.counts[lane]).rank.swap
        got = c.unpack(dims, world, lane, n) | swapped(dims, world, np.s_[lane, :n], lane)
        lanes.append(got | dict(
            host_blocks=counts.host_blocks.sum(1), turn_blocks=counts.turn_blocks.sum(1),
            holes=counts.holes.sum(1) + ONE_HOLE,
            arrival_s=clock.join_reference(*world.due[lane, :n].T), num_gaps=int(got["itl"].sum()),
            used_blocks=got["used_blocks"] - counts.leaving_blocks.sum(1)))
    return lanes


def reference(drawn: Drawn, dims) -> tuple[dict, simulator.ReferenceResult]:
    """Answers of the reference, and all it says."""
    case, workload, outside, rules = drawn
    before = np.full(len(case), -1)
    successors = workload.successors()
    before[successors[successors >= 0]] = np.flatnonzero(successors >= 0)
    requests = [simulator.Request(
        i, float(case.arrival_s[i]), int(case.prompt[i]), int(case.output[i]), int(case.max_tokens[i]),
        uniforms=tuple(map(float, case.uniforms[i])), after=None if before[i] < 0 else int(before[i]),
        think_s=float(workload.think_s[i]) + outside) for i in range(len(case))]
    flags = replace(FLAGS, **case.limits, block_size=dims.block_size, swapping=rules)
    router = c.MIXED[case.router]
    rule = {"score": c.score_reference(flags.num_blocks, case.score), "first": lambda *_: 0}.get(router, router)
    result = simulator.simulate(requests, flags, dims.num_executors, rule, c.dyadic_cost(case))
    want = c.answer(result, dims.num_executors, flags.num_blocks)
    names = ("arrival_s", "swaps", "swap_s", "cached_tokens")
    want |= {name: np.array([getattr(r, name) for r in result.requests]) for name in names}
    stalled = {i: ticks for state in result.swapping for i, ticks in state.stalled.items()}
    want["stalled_s"] = np.array([test_swap.clock_seconds(stalled.get(i, 0)) for i in range(len(case))])
    want["peak_blocks"] = np.array([state.peak for state in result.swapping])
    want["swapped_blocks"] = np.array(
        [sum(state.seen[name] for state in result.swapping) for name in ("copied_blocks", "reused_blocks")])
    return want | dict(
        used_blocks=np.zeros(dims.num_executors, int), num_gaps=int((case.output - 1).sum()),
        swap_delay_s=np.array([test_swap.clock_seconds(s.stood) for s in result.swapping]),
        holes=np.array([s.pool.holes for s in result.swapping])), result


def draw_many(seed: int, dims, is_drawn: bool) -> tuple[list[Drawn], list[tuple]]:
    rng = np.random.default_rng([seed, is_drawn])
    drawn, want = [], []
    while len(drawn) < c.LANES:
        one = draw(rng, dims, is_drawn)
        try:
            want.append(reference(one, dims))
        except ValueError:
            continue
        drawn.append(one)
    return drawn, want


def compare(drawn: list[Drawn], want: list[tuple], dims) -> tuple[list[list[str]], Counter]:
    """What differs in each case, and what the cases had in them."""
    seen, wrong = Counter(), []
    for one, ours, (theirs, result) in zip(drawn, simulate(drawn, dims), want, strict=True):
        names = c.differences(ours, theirs)
        # Copies that the last answers displaced are dropped in the next pass, which never comes.
        kept = np.array([sum(blocks for blocks, _ in s.kept.values()) for s in result.swapping])
        is_full = ours["host_blocks"] > one[3].host_blocks
        names += [] if np.array_equal(ours["host_blocks"][~is_full], kept[~is_full]) else ["host_blocks"]
        names += [] if np.all(ours["turn_blocks"] == ours["host_blocks"]) else ["turn_blocks"]
        wrong.append(names)
        for state in result.swapping:
            seen.update(state.seen)
            seen["short_groups"] += sum(1 < length < one[3].group_blocks for length in state.pool.lengths)
            seen["lengths"] += len(set(state.pool.lengths)) > 1
        seen["jumped"] += max(len(result.iterations) - ours["steps"], 0)
        seen["stood"] += (theirs["swap_delay_s"] > 0).sum()
    return wrong, seen


@pytest.mark.parametrize("is_drawn", [pytest.param(False, marks=pytest.mark.slow), True], ids=["arrival", "drawn"])
def test_engine_equals_reference(is_drawn):
    """Every time, swap and found token of every request; blocks copied; what host memory has at the end; holes."""
    dims, seen = dims_of(), Counter()
    for seed in c.seeds(2, of=4):
        drawn, want = draw_many(seed, dims, is_drawn)
        wrong, found = compare(drawn, want, dims)
        seen += found
        failing = [(len(one[0]), i) for i, (one, names) in enumerate(zip(drawn, wrong, strict=True)) if names]
        if failing:
            _, i = min(failing)
            case, workload, _, rules = drawn[i]
            pytest.fail(f"seed {seed}: {len(failing)} of {len(drawn)} differ; {wrong[i]}: {case} {workload.session}"
                        f" {workload.think_s} {rules}")
    for name in ("found", "called", "forgotten", "held_up", "kept", "not_kept", "out", "reused_blocks", "short_groups",
                 "lengths", "jumped", "stood"):
        assert seen[name] > 20, (name, seen)
    assert seen["recomputed"] > 5 and (not is_drawn or seen["drawn_out"] > 20), seen


def two_turns(think_s: float = 1.0, **changes) -> Drawn:
    """A turn of 4 and 5 tokens, and one of 12 and 2 that begins with it: four in a block, an iteration a second but for
    prompts, which take half of one and an eighth for each token; an eighth for a copy of a block's K or V."""
    case = c.Case(
        arrival_s=np.zeros(2), prompt=np.array([4, 12]), output=np.array([5, 2]), max_tokens=np.array([5, 2]),
        priority=np.zeros(2, int), uniforms=np.zeros((2, 2), np.float32),
        limits=dict(max_num_seqs=4, max_num_batched_tokens=64, watermark_blocks=0, num_blocks=8, max_model_len=32),
        coefficients=((0.5, 0.125, 0, 0, 0), (1.0, 0, 0, 0, 0), (1.0, 0, 0, 0, 0)), router=c.MIXED.index("first"),
        prefixes=[(), ()])
    workload = Workload(case.arrival_s, case.prompt, case.output, session=[0, 0], turn=[0, 1],
                        think_s=np.array([0.0, think_s]), uniforms=case.uniforms)
    return case, workload, 0.0, Swapping(**(dict(
        host_blocks=8, dispatch_s=0.125, bandwidth=4096.0, group_blocks=1, is_async=True, reuse=True) | changes))


@pytest.mark.slow
def test_by_hand():
    """The first turn ends at t = 5 with 8 tokens in 2 blocks, whose four copies out are through at 5.5. The next one
    comes at 6: four copies in, and 4 of its 12 tokens are left, which take a second: its first token is there at 7.5,
    however copies are made. It finds nothing without reuse, or where host memory has one block: two seconds from 6 on.
    If it comes at 5.25 it waits for the copy out, and is half a second earlier. If both blocks are in one group, and
    its three likewise, there are half as many copies.
    """
    ways = [two_turns(), two_turns(is_async=False), two_turns(reuse=False), two_turns(host_blocks=1),
            two_turns(think_s=0.25), two_turns(group_blocks=60)]
    lanes = simulate(ways, dims_of())
    assert [lane["finish_s"][0] for lane in lanes] == [5.0] * 6
    assert [lane["first_token_s"][1] for lane in lanes] == [7.5, 7.5, 8.0, 8.0, 7.0, 7.25]
    assert [lane["cached_tokens"].tolist() for lane in lanes] == [[0, n] for n in (8, 8, 0, 0, 8, 8)]
    # At 13 tokens the second turn has 4 blocks, of which two were full and there.
    assert [lane["swapped_blocks"].tolist() for lane in lanes] == [[4, 2], [4, 2], [0, 0], [0, 0], [4, 2], [4, 2]]
    assert [lane["swap_s"][1] for lane in lanes] == [0.5, 0.5, 0.0, 0.0, 0.5, 0.25]


@pytest.mark.slow
def test_a_wrong_answer_is_found():
    """The comparison can fail: copies of a layer more show."""
    dims = dims_of()
    drawn, want = draw_many(0, dims, False)
    slower = [(case, workload, outside, replace(rules, layers=rules.layers + 1))
              for case, workload, outside, rules in drawn]
    wrong, _ = compare(slower, want, dims)
    assert sum("finish_s" in names for names in wrong) > 10


@pytest.mark.slow
def test_the_loop_body_copies_nothing_large():
    """Also what is kept, and the queue through it, is written in place."""
    if jax.default_backend() != "cpu":
        pytest.skip("reads the text of a CPU program")
    dims = dims_of()
    drawn, _ = draw_many(0, dims, False)
    params = c.stack([params_of(one) for one in drawn])
    requests = c.stack([lower.make_requests(workload, dims) for _, workload, *_ in drawn])
    due = jax.eval_shape(jax.vmap(params.source.start), requests)[1]
    large = large_shapes(dims, c.LANES)[0] | {tuple(sorted(due.shape))}
    assert problems(loop.run.lower(dims, params, requests).compile().as_text(), large) == []
