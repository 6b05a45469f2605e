"""What is left of a record when a request arrives, and sums over records, on numbers made up here."""

import numpy as np
import pytest

from jaxsim.sensitivity import schedule
from jaxsim.sensitivity.schedule import Latencies, Schedule
from tests.sensitivity.replay import latencies


def remaining(atoms, extra, passed_s):
    """Seconds of a record behind a time in it, iteration by iteration; those in flight, and its share passed."""
    first, pace, growth = atoms
    ends = np.cumsum([first, *(pace + j * growth for j in range(int(extra)))])
    lasts = np.diff(ends, prepend=0.0)
    at = int(np.searchsorted(ends, passed_s - schedule.SAME_S))
    at = min(at, len(ends) - 1)
    return ends[-1] - passed_s, at, 1 - (ends[at] - passed_s) / lasts[at]


def test_the_rest_of_a_record_is_what_its_iterations_leave():
    rng = np.random.default_rng(1)
    count = 4000
    atoms = np.stack([rng.uniform(0.01, 0.1, count), rng.uniform(0.01, 0.05, count),
                      rng.uniform(0, 1e-4, count) * rng.integers(0, 2, count)], axis=1)
    extra = rng.integers(0, 40, count).astype(float)
    atoms[extra == 0, 1:] = 0
    spans = [np.cumsum([a[0], *(a[1] + j * a[2] for j in range(int(n)))]) for a, n in zip(atoms, extra, strict=True)]
    passed = np.array([rng.uniform(0, ends[-1]) for ends in spans])
    # A third exactly at a boundary, the last included.
    ties = rng.random(count) < 1 / 3
    passed[ties] = [ends[rng.integers(len(ends))] for ends, tie in zip(spans, ties, strict=True) if tie]
    rest, phase, number = schedule._rests(atoms, extra, passed)
    expected = [remaining(*case) for case in zip(atoms, extra, passed, strict=True)]
    assert np.isfinite(rest).all() and ties.sum() > 1000 and (number == 0).sum() > 200 and (number > 10).sum() > 200
    assert np.allclose((rest * atoms).sum(1), [e[0] for e in expected], rtol=0, atol=1e-7)
    assert np.array_equal(number, [e[1] for e in expected])
    assert np.allclose(phase, [e[2] for e in expected], rtol=0, atol=1e-6)


def test_iterations_without_seconds_are_no_trouble():
    rest, phase, _ = schedule._rests(np.zeros((2, 3)), np.array([0.0, 5.0]), np.zeros(2))
    assert np.isfinite(rest).all() and np.all((phase >= 0) & (phase <= 1))


def made_up(rng) -> Schedule:
    """Two instances with forty records each, sixty requests, some of which never start, have no answer, or no end."""
    records, requests = 80, 60
    extra = rng.integers(0, 6, records).astype(float)
    whole = np.stack([np.ones(records), extra, extra * (extra - 1) / 2], axis=1)
    base = 40 * rng.integers(0, 2, requests)
    marks = base[:, None] + np.sort(rng.integers(0, 39, (requests, 4)), axis=1)
    met, joined, first, last = marks.T
    met = np.where(rng.random(requests) < 0.5, met, -1)
    joined = np.maximum(joined, met + 1)
    behind = np.where(met >= 0, met + 1, joined)
    first, last = np.maximum(first, joined), np.maximum(last, np.maximum(first, joined))
    joined[:3] = first[:3] = last[:3] = -1
    first[3:6] = last[3:6] = -1
    last[6:9] = -1
    rest = np.where(((met >= 0) & (joined >= 0))[:, None], rng.random((requests, 3)), 0.0)
    return Schedule(np.arange(records), np.repeat([0, 1], 40), np.zeros(records),
                    rng.random((records, 3)), whole, met, np.where(joined >= 0, behind, 0), joined, first, last, rest,
                    np.zeros(requests), np.zeros(requests, int))


@pytest.mark.parametrize("seed", range(3))
def test_reverse_is_the_transpose_of_forward(seed):
    """The same bilinear form, of random changes and random weights; those of latencies that are not there are 0."""
    rng = np.random.default_rng(seed)
    own = made_up(rng)
    changes = rng.normal(size=(4, 80, 3))
    there = latencies(own, own.atoms)
    assert [int(np.isnan(x).sum()) for x in there] == [3, 6, 9]
    weights = Latencies(*(np.where(np.isnan(x), 0.0, rng.normal(size=(5, 60)) * (rng.random((5, 60)) < 0.7))
                          for x in there))
    forward = sum(np.nan_to_num(found) @ w.T for found, w in zip(latencies(own, changes), weights, strict=True))
    reverse = np.einsum("irk,jrk->ij", changes, own.transposed(weights))
    assert np.allclose(forward, reverse, rtol=1e-10, atol=1e-10)
    assert np.abs(forward).min() > 1e-3


def test_time_at_work_is_the_sum_of_records():
    own = made_up(np.random.default_rng(7))
    weights = own.busy(np.eye(2))
    for instance in range(2):
        seconds = (own.atoms * own.whole)[own.instance == instance]
        assert (weights[instance] * own.atoms).sum() == pytest.approx(seconds.sum())
