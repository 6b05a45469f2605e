"""Least slack first, against the reference, bit for bit, and against what is known of it."""

from collections import Counter
from dataclasses import replace

import jax
import numpy as np
import pytest

from jaxsim._core.errors import InputError
from jaxsim.engine import loop, lower
from jaxsim.engine.simulate import simulate
from jaxsim.policy.slack import Slack
from jaxsim.spec.scenario import Scenario
from jaxsim.state import world as w
from jaxsim.workload import Workload
from tests.engine import cases as c
from tests.engine import test_orders, test_tenants
from tests.reference import simulator

pytestmark = pytest.mark.unoptimised

FLAGS = simulator.preset("vllm-v1-slack")
WINDOW = 21

Drawn = tuple[c.Case, tuple[int, int]]


def dims_of(window: int = WINDOW):
    return c.dims_of("vllm-v1-slack", 3, slack_window=window)


def draw_many(seed: int, dims) -> list[Drawn]:
    """Short of blocks, with a pace at which deadlines, work and what preempted requests have done weigh alike."""
    rng = np.random.default_rng([seed, 13])
    cases = [test_orders.drawn(rng, case) for case in c.draw_many(seed, FLAGS, dims)]
    return [(case, (int(rng.choice([0, 1, 64, 6400])), int(rng.choice([0, 3, 640, 64_000])))) for case in cases]


def run(drawn: list[Drawn], dims) -> list[dict]:
    """Engine results of a batch, padded to `LANES`."""
    padded = drawn + drawn[:1] * (c.LANES - len(drawn))
    params, requests = [], []
    for case, pace in padded:
        most = case.limits["max_model_len"]
        params.append(replace(c.make_params(case, FLAGS, "mixed"), slack=Slack(*map(np.int32, (*pace, most)))))
        made = Workload(case.arrival_s, case.prompt, case.output, case.max_tokens, uniforms=case.uniforms,
                        predicted_tokens=case.predicted, limit_s=case.limit_s)
        requests.append(lower.make_requests(made, dims, order="least_slack", slack=params[-1].slack))
    world = jax.device_get(loop.run(dims, c.stack(params), c.stack(requests)))
    return [c.unpack(dims, world, lane, len(case)) for lane, (case, _) in enumerate(drawn)]


def reference(drawn: Drawn, dims, **flags) -> simulator.ReferenceResult:
    case, pace = drawn
    case = replace(case, predicted=np.minimum(case.predicted, case.limits["max_model_len"]))
    return c.reference(case, replace(FLAGS, pace=pace, **flags), dims, "mixed")


def test_engine_equals_reference():
    """Many lanes in which those preempted go by another slack than they came with, and it matters."""
    dims, seen = dims_of(), Counter()
    for seed in c.seeds(2, of=4):
        drawn = draw_many(seed, dims)
        for one, ours in zip(drawn, run(drawn, dims), strict=True):
            theirs = reference(one, dims)
            want = c.answer(theirs, dims.num_executors, one[0].limits["num_blocks"])
            assert c.differences(ours, want) == [], one
            starts, fixed = test_orders.starts(theirs), reference(one, dims, keeps_slack=True)
            plain = c.reference(one[0], simulator.preset("vllm-v1"), dims, "mixed")
            seen["preemptions"] += sum(request.preemptions for request in theirs.requests)
            seen["again"] += sum(request.preemptions > 1 for request in theirs.requests)
            seen["reordered"] += starts != test_orders.starts(plain)
            seen["settled"] += [r.finish_s for r in theirs.requests] != [r.finish_s for r in fixed.requests]
    assert seen["reordered"] > 20 and seen["preemptions"] > 200 and seen["again"] > 20 and seen["settled"] > 5, seen


def test_a_prediction_beyond_what_a_sequence_may_have():
    """Counts as that, before the run and where somebody was preempted: no key runs over."""
    dims, rng, seen = dims_of(), np.random.default_rng(4), Counter()
    drawn = [(replace(case, predicted=np.where(rng.random(len(case)) < 0.5, 1 << 30, case.predicted)), (64, 64_000))
             for case, _ in draw_many(4, dims)]
    for one, ours in zip(drawn, run(drawn, dims), strict=True):
        theirs = reference(one, dims)
        assert c.differences(ours, c.answer(theirs, dims.num_executors, one[0].limits["num_blocks"])) == [], one
        seen["preempted"] += sum(r.preemptions for r in theirs.requests if one[0].predicted[r.id] == 1 << 30)
        bounded = replace(one[0], predicted=one[0].output)
        seen["reordered"] += test_orders.starts(theirs) != test_orders.starts(reference((bounded, one[1]), dims))
    assert seen["preempted"] > 20 and seen["reordered"] > 5, seen


def test_the_longest_that_a_scenario_may_have():
    made = Scenario.from_dict(test_tenants.changed(**FIELDS)).checked()
    system = lower.resolve_system(made)
    assert int(lower.make_slack(made, system).most_tokens) == system.max_model_len


def test_it_makes_the_earliest_job_as_late_as_can_be():
    """R. W. Conway, W. L. Maxwell, L. W. Miller, "Theory of Scheduling", 1967: on one machine the order of slack has
    the largest minimum lateness of all orders."""
    dims, batch = dims_of(), test_orders.single_machine(5)
    lanes, others = run([(case, (0, 64_000)) for case in batch], dims), 0
    for case, lane in zip(batch, lanes, strict=True):
        lateness = (test_orders.completions(case) - case.limit_s).min(axis=1)
        assert lane["fault"] == 0 and (lane["finish_s"] - case.limit_s).min() == lateness.max()
        others += lateness.min() < lateness.max()
    assert others > 50


def test_beyond_the_window_is_a_fault():
    """Nothing else is wrong with lanes in which few wait that were preempted."""
    dims = dims_of(window=1)
    drawn = draw_many(0, dims)
    lanes = run(drawn, dims)
    faults = [lane["fault"] for lane in lanes]
    assert set(faults) == {0, w.SLACK_WINDOW_FULL} and 3 < sum(map(bool, faults)) < len(faults) - 3
    for one, ours in zip(drawn, lanes, strict=True):
        if not ours["fault"]:
            np.testing.assert_array_equal(ours["finish_s"], [r.finish_s for r in reference(one, dims).requests])


FIELDS = {"engine__scheduling_policy": "least_slack", "engine__slack_output_ms": 20.0}


@pytest.mark.parametrize("fields, field, problem", [
    ({"engine__slack_output_ms": None}, "engine.slack_output_ms", "goes by it"),
    ({"engine__scheduling_policy": "edf"}, "engine.slack_output_ms", "has no effect"),
    ({"engine__scheduling_policy": "fcfs", "engine__slack_output_ms": None, "engine__slack_window": 64},
     "engine.slack_window", "has no effect"),
    ({"workload__prediction": None}, "workload.prediction", "goes by it"),
    ({"slo": None}, "workload.tenants[2].deadline_ms", "goes by deadlines"),
    ({"engine__victim": "lowest_priority"}, "engine.victim", "does not go with"),
    ({"engine__enable_prefix_caching": True}, "engine.scheduling_policy", "prefix caching"),
    ({"engine__preset": "vllm-v0"}, "engine.scheduling_policy", "as vLLM V1 does it"),
    ({"engine__slack_output_ms": 10_000.0, "engine__max_model_len": 1 << 20,
      "engine__num_gpu_blocks_override": 1 << 20}, "engine.slack_output_ms", "can be ranked"),
    ({"cluster": {"pools": [{"replicas": 2}]}}, "cluster.pools[0].engine.scheduling_policy", "in pools"),
    ({"cluster": {"admission": {"max_waiting": 9}}}, "engine.scheduling_policy", "use 'fcfs'"),
])
def test_refused(fields, field, problem):
    with pytest.raises(InputError) as caught:
        scenario = Scenario.from_dict(test_tenants.changed(**(FIELDS | fields))).checked()
        lower.make_slack(scenario, lower.resolve_system(scenario))
    assert caught.value.field == field and problem in str(caught.value)


def test_a_scenario():
    """Long answers go first at a pace at which they would else be late: more of them keep their deadline."""
    made = [Scenario.from_dict(test_tenants.changed(**(FIELDS | {"workload__prediction": {"sigma": 0.0}} | more)))
            for more in ({}, {"engine__scheduling_policy": "edf", "engine__slack_output_ms": None})]
    result = simulate(made)
    assert result.faults == ()
    slack, edf = (r for r in result.lanes)
    assert any(not np.array_equal(a.finish_s, b.finish_s) for a, b in zip(slack, edf, strict=True))
