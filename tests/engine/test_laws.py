"""What must hold whatever the scenario, and what a result must not depend on.

Laws are checked on every preset, by what the engine says alone. Invariances are checked with real costs, where a sum
taken in another order would show: bit for bit the same whatever else is in the batch, however wide it is, however
much its arrays are padded, and however long nothing happens.
"""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from jaxsim.kernels import clock

from jaxsim.engine import loop
from tests.engine import cases as c
from tests.engine import real
from tests.reference import simulator

SEEDS = settings(max_examples=4, derandomize=True, deadline=None, database=None,
                 phases=(Phase.explicit, Phase.generate))

PROGRAMS = [pytest.param(name, marks=pytest.mark.xdist_group(f"{name}-3")) for name in c.PRESETS]


def busy_seconds(starts: np.ndarray, ends: np.ndarray) -> float:
    """Measure of the union of intervals."""
    total, reach = 0.0, -np.inf
    for start, end in sorted(zip(starts, ends, strict=True)):
        total += max(0.0, end - max(start, reach))
        reach = max(reach, end)
    return total


def broken_laws(case: c.Case, lane: dict, num_instances: int, *, rounding: float = 0.0) -> list[str]:
    """Names of the laws a result breaks; `rounding` is the relative error allowed to sums of durations."""
    arrival, n = case.arrival_s, len(case)
    on = [lane["instance"] == i for i in range(num_instances)]
    in_system = np.array([busy_seconds(arrival[m], lane["finish_s"][m]) for m in on])
    running = np.array([(lane["finish_s"] - lane["scheduled_s"] - lane["stalled_s"])[m].sum() for m in on])

    def near(a, b):
        return bool(np.all(np.abs(a - b) <= rounding * np.abs(b)))

    num_blocks = case.limits["num_blocks"]
    stamps = (arrival, lane["scheduled_s"], lane["first_token_s"], lane["finish_s"])
    laws = {
        "no fault": lane["fault"] == 0,
        "every request finishes, once": lane["finished"] == n,
        "an instance of the cluster": bool(np.all((lane["instance"] >= 0) & (lane["instance"] < num_instances))),
        "clocks do not run back": all(bool(np.all(a <= b)) for a, b in zip(stamps, stamps[1:], strict=False)),
        "blocks at the end": bool(np.all(lane["used_blocks"] == 0)),
        "blocks within the pool": bool(np.all((lane["peak_blocks"] >= 0) & (lane["peak_blocks"] <= num_blocks))),
        "work conservation": near(lane["busy_s"], in_system),
        "Little's law": near(lane["running_s"], running),
        "blocks times seconds": bool(np.all(lane["held_block_s"] <= lane["peak_blocks"] * lane["busy_s"]
                                            * (1 + 1e-6))),
        "stalls are of the preempted": bool(np.all((lane["stalled_s"] > 0) <= (lane["preemptions"] > 0))),
        "stalls lie in the time served": bool(np.all(
            lane["stalled_s"] <= lane["finish_s"] - lane["scheduled_s"])),
        "an iteration computes something": bool(np.all(
            lane["num_iterations"] <= [case.output[m].sum() * (1 + lane["preemptions"][m].sum())
                                       + case.prompt[m].sum() * (1 + lane["preemptions"][m].sum()) for m in on])),
        "seats": max_concurrency(lane) <= case.limits["max_num_seqs"] * num_instances,
    }
    return [name for name, holds in laws.items() if not holds]


def max_concurrency(lane: dict) -> int:
    """Most sequences at once past their first admission, of those never preempted."""
    calm = lane["preemptions"] == 0
    starts, ends = np.sort(lane["scheduled_s"][calm]), np.sort(lane["finish_s"][calm])
    return max((int(np.searchsorted(starts, s, "right") - np.searchsorted(ends, s, "right")) for s in starts),
               default=0)


@pytest.mark.parametrize("name", PROGRAMS)
def test_laws_hold(name):
    flags, dims = simulator.preset(name), c.dims_of(name, 3)

    @SEEDS
    @given(st.integers(0, 2**32))
    def check(seed):
        batch = c.draw_many(seed, flags, dims)
        for case, lane in zip(batch, c.simulate(batch, flags, dims, "mixed"), strict=True):
            assert broken_laws(case, lane, dims.num_instances) == [], case

    check()


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_token_after_the_first_has_its_gap(name):
    """Tokens in = tokens out: the histogram of gaps holds one for each, across preemptions too."""
    flags, dims = simulator.preset(name), c.dims_of(name, 3)
    batch = c.draw_many(8, flags, dims)
    for case, lane in zip(batch, c.simulate(batch, flags, dims, "mixed"), strict=True):
        assert lane["itl"].min() >= 0
        assert lane["itl"].sum() == (case.output - 1).sum(), case


@pytest.fixture(scope="module")
def base():
    """A batch with real costs, and its results."""
    batch = real.draw_batch(17, real.tables())
    return batch, c.simulate(batch, real.FLAGS, real.DIMS, real.ROUTER)


REAL = pytest.mark.xdist_group("real")


@REAL
def test_laws_hold_with_real_costs(base):
    for case, lane in zip(*base, strict=True):
        assert broken_laws(case, lane, real.DIMS.num_instances, rounding=1e-5) == [], case


@REAL
def test_broken_laws_are_found(base):
    """The laws can fail: each by the result that breaks it."""
    case, lane = base[0][0], base[1][0]
    later = lane["finish_s"] + 1.0
    for changed, law in [
        ({"finished": len(case) - 1}, "every request finishes, once"),
        ({"scheduled_s": later}, "clocks do not run back"),
        ({"first_token_s": later}, "clocks do not run back"),
        ({"used_blocks": lane["used_blocks"] + 1}, "blocks at the end"),
        ({"peak_blocks": lane["peak_blocks"] * 0 + 10**6}, "blocks within the pool"),
        ({"busy_s": lane["busy_s"] * 1.01}, "work conservation"),
        ({"running_s": lane["running_s"] * 1.01}, "Little's law"),
        ({"stalled_s": lane["stalled_s"] + 1e-3}, "stalls are of the preempted"),
        ({"num_iterations": lane["num_iterations"] + 10**7}, "an iteration computes something"),
    ]:
        assert law in broken_laws(case, lane | changed, real.DIMS.num_instances, rounding=1e-5)


# --- invariance ---------------------------------------------------------------------------------------------


def assert_same(ours: dict, theirs: dict, *, shift_s: float = 0.0, part: slice = slice(None)):
    """Bitwise the same requests, instances apart from where time is counted from."""
    for name in ("instance", "preemptions"):
        assert np.array_equal(ours[name], theirs[name][part]), name
    for name in ("scheduled_s", "first_token_s", "finish_s"):
        assert np.array_equal(ours[name], theirs[name][part] - shift_s), name


def assert_identical(ours: dict, theirs: dict):
    """Bitwise the same in everything."""
    for name, value in ours.items():
        assert np.array_equal(value, theirs[name]), name


@REAL
def test_order_and_neighbours_do_not_matter(base):
    batch, results = base
    order = np.random.default_rng(0).permutation(len(batch))
    for index, lane in zip(order, c.simulate([batch[i] for i in order], real.FLAGS, real.DIMS, real.ROUTER),
                           strict=True):
        assert_identical(lane, results[index])
    # The first half beside other neighbours, which end later or earlier.
    others = real.draw_batch(99, real.tables())
    mixed = batch[: c.LANES // 2] + others[c.LANES // 2:]
    for lane, want in zip(c.simulate(mixed, real.FLAGS, real.DIMS, real.ROUTER)[: c.LANES // 2], results,
                          strict=False):
        assert_identical(lane, want)


@REAL
@pytest.mark.parametrize("width, changes", [
    pytest.param(7, {"num_requests": real.DIMS.num_requests + 23}, id="7-lanes-more-requests"),
    pytest.param(1, {"num_slots": 40}, id="1-lane-more-slots")])
def test_batch_width_and_padding_do_not_matter(base, width, changes):
    """Width and padding change at once, to compile less; both must change nothing."""
    batch, results = base
    dims = replace(real.DIMS, **changes)
    for start in range(0, 14, width):
        ours = c.simulate(batch[start: start + width], real.FLAGS, dims, real.ROUTER)
        for lane, want in zip(ours, results[start: start + width], strict=True):
            assert_identical({k: v for k, v in lane.items() if k not in ("counter", "steps")}, want)


# --- long times ---------------------------------------------------------------------------------------------

DAY_S = 86_400.0
GAPS_S = {"whole-epochs": 40 * clock.EPOCH_S, "30-days": 30 * DAY_S, "odd": 30 * DAY_S + 0.123456}


@REAL
@pytest.mark.parametrize("gap_s", GAPS_S.values(), ids=GAPS_S)
def test_a_gap_of_a_month_changes_nothing(base, gap_s):
    """The second half equals that half run alone, at its own time and from time zero, bit for bit."""
    gap_s = float(clock.round_arrivals_reference(np.array([gap_s]))[0])
    wholes, halves, moved, shifts = [], [], [], []
    for case in base[0][: c.LANES // 3]:
        middle = len(case) // 2
        arrival = case.arrival_s.copy()
        # All of the first half is long done when the second begins.
        arrival[middle:] += gap_s
        whole = replace(case, arrival_s=arrival)
        shift_s = gap_s + np.floor(case.arrival_s[middle])
        wholes.append(whole)
        halves.append(real.without_requests(whole, slice(middle, None)))
        moved.append(real.without_requests(whole, slice(middle, None), shift_s))
        shifts.append(shift_s)
    results = c.simulate(wholes + halves + moved, real.FLAGS, real.DIMS, real.ROUTER, lanes=c.LANES)
    count = len(wholes)
    for i, case in enumerate(wholes):
        second = slice(len(case) // 2, None)
        whole, half, from_zero = results[i], results[count + i], results[2 * count + i]
        assert whole["fault"] == half["fault"] == from_zero["fault"] == 0
        assert_same(half, whole, part=second)
        assert_same(from_zero, whole, part=second, shift_s=shifts[i])
        # The first half knows nothing of what comes a month later.
        assert np.all(whole["finish_s"][: len(case) // 2] < gap_s)


@REAL
def test_stalls_do_not_depend_on_the_time_of_day(base):
    """A duration is the same a month later, bit for bit."""
    shift_s = 30 * DAY_S
    later = [replace(case, arrival_s=case.arrival_s + shift_s) for case in base[0]]
    for now, then in zip(base[1], c.simulate(later, real.FLAGS, real.DIMS, real.ROUTER), strict=True):
        assert_same(now, then, shift_s=shift_s)
        assert np.array_equal(now["stalled_s"], then["stalled_s"])


def long_cases(flags: simulator.Flags) -> list[c.Case]:
    """Outputs of tens of thousands of tokens, and many shorter ones one after the other; dyadic and exact."""
    rng = np.random.default_rng(4)
    batch = []
    for k in range(6):
        is_long = k < 4
        count = 4 if is_long else c.NUM_REQUESTS
        output = rng.integers(15_000, 25_000, count) if is_long else rng.integers(400, 900, count)
        prompt = rng.integers(1, 60, count)
        arrival = np.cumsum(rng.integers(0, 4000 if is_long else 40, count) * 2.0**-4)
        largest = int(np.max(prompt + output))
        need = -(-largest // 16) + 1
        # Contexts enter only where float32 stays exact over a jump.
        context = 0.0 if is_long else 2.0**-14
        row = (2.0**-6, 2.0**-9, context, 2.0**-8, 0.0)
        budget = int(rng.integers(8, 40)) if flags.chunked_prefill else largest
        limits = dict(max_num_seqs=2 + k % 2, max_num_batched_tokens=budget, watermark_blocks=0,
                      num_blocks=need + int(rng.integers(0, need // 2)), max_model_len=largest)
        batch.append(c.Case(arrival, prompt, output, output, np.zeros(count, int), np.zeros((count, 2), np.float32),
                            limits, (row,) * 3))
    return batch


@pytest.mark.parametrize("name", [
    pytest.param("vllm-v1", marks=pytest.mark.xdist_group("vllm-v1-1")),
    pytest.param("vllm-v0", marks=pytest.mark.xdist_group("vllm-v0-1"))])
def test_counters_wind_back(name):
    """Iteration counters far beyond where they are wound back, preemptions at contexts of thousands of tokens."""
    flags, dims = simulator.preset(name), c.dims_of(name, 1)
    batch = long_cases(flags)
    preemptions = 0
    for case, lane in zip(batch, c.simulate(batch, flags, dims, "mixed", lanes=c.LANES), strict=True):
        result = c.reference(case, flags, dims, "mixed")
        assert c.differences(lane, c.answer(result, 1, case.limits["num_blocks"])) == []
        assert broken_laws(case, lane, 1) == []
        preemptions += lane["preemptions"].sum()
        assert lane["num_iterations"].max() > loop.REBASE_COUNTER
        assert lane["counter"].max() < lane["num_iterations"].max()
    assert preemptions > 0
