"""The tape of iterations adds up to what happened, also where arrivals cut jumps short."""

import numpy as np
import pytest

import jaxsim
from jaxsim import Scenario
from jaxsim.io.timeline import trace_events

pytestmark = pytest.mark.unoptimised

FORM = {"a": 0.01, "b": 1e-5, "c": 1e-7, "d": 1e-5}


@pytest.fixture(scope="module", params=["vllm-v1", "vllm-v0", "vllm-v1@0.19"])
def lane(request):
    """Two instances with memory for few: jumps, cuts, preemptions."""
    return jaxsim.simulate(Scenario.from_dict({
        "schema_version": 1, "num_seeds": 1, "cluster": {"replicas": 2},
        "engine": {"preset": request.param, "max_num_seqs": 8, "max_num_batched_tokens": 256, "max_model_len": 256,
                   "num_gpu_blocks_override": 14},
        "workload": {"kind": "poisson", "rate_rps": 14.0, "num_requests": 60, "input": 60,
                     "output": {"kind": "uniform", "min_tokens": 1, "max_tokens": 80}},
        "cost": {"kind": "fitted", "prefill": FORM, "decode": FORM}}), record_steps=True).lanes[0][0]


def test_the_case_is_hard(lane):
    planned_ahead = lane.steps["iterations"] > 1
    assert lane.preemptions.sum() > 0 and planned_ahead.sum() > 20 and (~planned_ahead).sum() > 20


def test_iterations_add_up(lane):
    assert lane.steps["iterations"].sum() == lane.num_iterations
    assert lane.steps["prefill_tokens"].sum() >= lane.input_tokens.sum()


def test_time_adds_up_and_nothing_overlaps(lane):
    for instance in range(2):
        rows = lane.steps["instance"] == instance
        start, lasts = lane.steps["time_s"][rows], lane.steps["duration_s"][rows]
        assert lasts.sum() == pytest.approx(lane.busy_s[instance], rel=1e-6)
        assert np.all(start[1:] >= start[:-1] + lasts[:-1] - 1e-6)
        assert np.all(lasts > 0) and np.all(lane.steps["first_s"][rows] <= lasts)


def test_slices_of_the_timeline_do_not_overlap(lane):
    slices = [e for e in trace_events(lane) if e["ph"] == "X"]
    assert sum(e["args"]["iterations"] for e in slices) == lane.num_iterations
    assert {e["name"].split(" ")[0] for e in slices} <= {"prefill", "decode", "mixed"}
    assert not any(e["name"].startswith(("prefill x", "mixed x")) for e in slices)
    for pid in (1, 2):
        mine = sorted((e["ts"], e["dur"]) for e in slices if e["pid"] == pid)
        assert all(a + d <= b + 1 for (a, d), (b, _) in zip(mine, mine[1:], strict=False))
