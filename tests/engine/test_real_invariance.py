"""What a result must not depend on, with real costs, where a sum taken in another order would show.

Bit for bit the same whatever else is in the batch, however wide it is, however much its arrays are padded, and
however long nothing happens.
"""

from dataclasses import replace

import numpy as np
import pytest

from jaxsim.kernels import clock
from tests.engine import cases as c
from tests.engine import real
from tests.engine.laws import broken_laws


@pytest.fixture(scope="module")
def base():
    """A batch with real costs, and its results."""
    batch = real.draw_batch(17, real.tables())
    return batch, c.simulate(batch, real.FLAGS, real.DIMS, real.ROUTER)


def test_laws_hold_with_real_costs(base):
    for case, lane in zip(*base, strict=True):
        assert broken_laws(case, lane, real.DIMS.num_executors, rounding=1e-5) == [], case


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
        assert law in broken_laws(case, lane | changed, real.DIMS.num_executors, rounding=1e-5)


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


def test_stalls_do_not_depend_on_the_time_of_day(base):
    """A duration is the same a month later, bit for bit."""
    shift_s = 30 * DAY_S
    later = [replace(case, arrival_s=case.arrival_s + shift_s) for case in base[0]]
    for now, then in zip(base[1], c.simulate(later, real.FLAGS, real.DIMS, real.ROUTER), strict=True):
        assert_same(now, then, shift_s=shift_s)
        assert np.array_equal(now["stalled_s"], then["stalled_s"])
