"""The engine against the reference with real costs, where float32 is not exact.

Both round durations to the clock's grid, but they compute them in float32 and float64, so an arrival very near an
iteration's end can fall on either side of it, and everything after that differs. Up to the first such moment the two
agree to a tenth of a millisecond; after it, in distribution.
"""

import numpy as np
import pytest
from scipy import stats

from jaxsim.cost.base import BatchStats
from jaxsim.engine import lower
from jaxsim.spec.scenario import Scenario
from tests.engine import cases as c
from tests.engine import real
from tests.reference import simulator

NEAR_S, AGREES_S = 1e-5, 1e-4
STAMPS = ("scheduled_s", "first_token_s", "finish_s")


SYSTEMS = [("vllm-v1", 2), *(pytest.param(one, marks=pytest.mark.slow) for one in (("vllm-v0", 3), ("sglang", 1)))]
"""Presets and instances."""


@pytest.fixture(scope="module", params=SYSTEMS, ids=lambda system: f"{system[0]}-{system[1]}")
def system(request):
    """Flags and sizes."""
    name, num_executors = request.param
    return simulator.preset(name), c.replace(real.DIMS, num_executors=num_executors)


@pytest.fixture(scope="module")
def pairs(system):
    """Cases with what the engine and the reference say."""
    flags, dims = system
    batch = real.draw_batch(3, real.tables(), flags=flags)
    ours = c.simulate(batch, flags, dims, real.ROUTER)
    theirs = [c.reference(case, flags, dims, real.ROUTER, real.exact_cost(case.cost)) for case in batch]
    return list(zip(batch, ours, theirs, strict=True))


def column(result, name: str) -> np.ndarray:
    return np.array([getattr(r, name) for r in result.requests])


def test_scenarios_are_hard(pairs):
    """Preempting, queueing, all kinds of cost tables."""
    assert sum(lane["preemptions"].sum() for _, lane, _ in pairs) > 10
    assert sum(int(case.cost.window) > 0 for case, _, _ in pairs) > 10
    assert np.mean([np.mean(lane["scheduled_s"] > case.arrival_s + 0.01) for case, lane, _ in pairs]) > 0.1


def test_all_agrees_before_the_first_near_tie(pairs):
    compared = total = 0
    for case, lane, result in pairs:
        assert lane["fault"] == 0 and lane["finished"] == len(case)
        reliable_until_s = result.unreliable_from_s(NEAR_S)
        for name in STAMPS:
            want = column(result, name)
            is_reliable = want < reliable_until_s
            assert np.all(np.abs(lane[name] - want)[is_reliable] < AGREES_S), name
            compared, total = compared + is_reliable.sum(), total + len(want)
        is_done = column(result, "finish_s") < reliable_until_s
        for name in ("instance", "preemptions"):
            assert np.array_equal(lane[name][is_done], column(result, name)[is_done])
    assert compared > 0.5 * total, "near ties leave too little to compare"


@pytest.mark.parametrize("name", ["ttft", "e2e", "tpot"])
def test_distributions_agree_after_it(pairs, name):
    ours, theirs = [], []
    for case, lane, result in pairs:
        for column_of, into in ((lane.get, ours), (lambda key, r=result: column(r, key), theirs)):
            first, finish = column_of("first_token_s"), column_of("finish_s")
            gaps = np.maximum(case.output - 1, 1)
            into.append({"ttft": first - case.arrival_s, "e2e": finish - case.arrival_s,
                         "tpot": (finish - first) / gaps}[name])
    ours, theirs = np.concatenate(ours), np.concatenate(theirs)
    assert stats.ks_2samp(ours, theirs, method="asymp").statistic < 0.01
    assert np.mean(ours) == pytest.approx(np.mean(theirs), rel=2e-3)
    assert np.quantile(ours, 0.99) == pytest.approx(np.quantile(theirs, 0.99), rel=1e-2)


def test_a_cost_that_is_off_is_found(pairs, system):
    """A device a thousandth slower in every iteration shows in the times."""
    case, _, result = max(pairs, key=lambda pair: pair[2].unreliable_from_s(NEAR_S))
    slower = c.replace(case, cost=c.replace(case.cost, by_sequences=case.cost.by_sequences * np.float32(1.001)))
    (lane,) = c.simulate([slower], *system, real.ROUTER, lanes=c.LANES)
    assert np.any(np.abs(lane["finish_s"] - column(result, "finish_s")) > AGREES_S)


def test_engines_that_capture_only_decodes_launch_the_kernels_of_prompts():
    """TensorRT-LLM: a decode is one launch, a short prompt takes the host's seconds for every kernel."""
    def seconds(preset, batch, **engine):
        scenario = Scenario.from_dict({
            "schema_version": 1, "model": {"name": "llama-3.1-8b"}, "device": {"name": "h100"},
            "engine": {"preset": preset, "max_model_len": 4096, "async_scheduling": False, **engine},
            "workload": {"kind": "batch"}, "cost": {"host": "none"}})
        return float(lower.make_cost(scenario, lower.resolve_system(scenario), 16, 4096).iteration(batch))

    decode, prompt = BatchStats.of(1, 100), BatchStats.of(0, 0, 1, 16, 16, 256)
    assert seconds("tensorrt-llm", decode) == seconds("vllm-v1", decode)
    assert seconds("tensorrt-llm", prompt) > 1.2 * seconds("vllm-v1", prompt)
    assert seconds("tensorrt-llm", prompt) == seconds("tensorrt-llm", prompt, enforce_eager=True)
