"""Many plans in one program: each as it is alone."""

from collections import Counter

import equinox as eqx
import numpy as np
import pytest

from jaxsim._core.errors import InputError
from jaxsim.analytic import highest_rate, of_scenario, plans, steady_state
from jaxsim.analytic.lower import load_of_scenario
from jaxsim.engine import lower
from jaxsim.spec.scenario import Scenario
from jaxsim.study.closed_form import closed_form
from jaxsim.study.study import Study

pytestmark = [pytest.mark.unoptimised, pytest.mark.slow]

BASE = {"schema_version": 1, "model": {"name": "qwen3-30b-a3b"}, "device": {"name": "h100"}, "num_seeds": 1,
        "engine": {"max_model_len": 4096, "max_num_seqs": 32}, "slo": {"ttft_ms": 500, "tpot_ms": 8},
        "workload": {"kind": "poisson", "rate_rps": 4.0, "num_requests": 60, "input": 512, "output": 128}}

ENGINES = [
    dict(tensor_parallel_size=2), dict(tensor_parallel_size=4, pipeline_parallel_size=2),
    dict(data_parallel_size=4, enable_expert_parallel=True),
    dict(data_parallel_size=16, enable_expert_parallel=True, all2all_backend="deepep_low_latency"),
    dict(tensor_parallel_size=4, prefill_context_parallel_size=2),
    dict(tensor_parallel_size=8, decode_context_parallel_size=2), dict(tensor_parallel_size=3)]
"""One of each kind: stages, ranks that iterate together, a ring, a cache cut by tokens; and one that cannot be."""


def scenario(**engine) -> Scenario:
    return Scenario.from_dict({**BASE, "engine": {**BASE["engine"], **engine}})


def test_each_plan_is_as_alone():
    """One program, and the same numbers as a program for each; what is added for others takes no time."""
    given = [scenario(**engine) for engine in ENGINES]
    made = plans.of_scenarios(given)
    assert [isinstance(one, InputError) for one in made] == [False] * 6 + [True]
    load = load_of_scenario(given[0])
    found = plans.screened(made[:-1], [load] * 6, [(0.5, 0.008, None)] * 6)
    assert found.num_programs == 1
    # Together plans differ in everything.
    assert len({round(float(state.tpot_s), 6) for state in found.states}) == 6
    for one, state, rate in zip(given, found.states, found.rates_rps, strict=False):
        executor, own = of_scenario(one)
        alone = eqx.filter_jit(steady_state)(executor, own)
        for name in ("tpot_s", "ttft_s", "running", "utilisation", "kv_share", "capacity_rps"):
            assert float(getattr(state, name)) == pytest.approx(float(getattr(alone, name)), rel=2e-5), name
        if one.engine.data_parallel_size != 4:
            # A program of its own for each takes long.
            continue
        limit = eqx.filter_jit(highest_rate)(executor, own, ttft_s=0.5, tpot_s=0.008)
        # Between 32 shares of the capacity states are taken as linear.
        assert rate == pytest.approx(float(limit), rel=0.02, abs=0.002 * float(alone.capacity_rps))


def test_a_study_of_plans(monkeypatch):
    """Rows of all points, refusals with their arithmetic, one program; each system looked up once, one draw for all."""
    asked = Counter()

    def counting(name):
        own = getattr(lower, name)

        def counted(*given):
            asked[name] += 1
            return own(*given)

        monkeypatch.setattr(lower, name, counted)

    counting("resolve_system"), counting("make_workload")
    study = Study.from_dict({"schema_version": 1, "scenario": BASE, "axes": {
        "engine.tensor_parallel_size": [1, 3, 4], "engine.data_parallel_size": [1, 4],
        "engine.enable_expert_parallel": [True]}, "where": [
            "engine.tensor_parallel_size * engine.data_parallel_size > 1"]})
    frame, programs = closed_form(study)
    assert asked == {"resolve_system": 5, "make_workload": 1}
    assert programs == 1 and frame["plan"].tolist() == ["TP1 DP4 EP", "TP3 EP", "TP3 DP4 EP", "TP4 EP", "TP4 DP4 EP"]
    refused = frame["refused"].notna()
    assert refused.tolist() == [False, True, True, False, False]
    assert frame["refused"][refused].str.contains("does not divide").all()
    able = frame[~refused]
    assert np.all(able["rate_within_limits"] <= able["capacity_rps"]) and (able["rate_within_limits"] > 0).all()
    np.testing.assert_allclose(able["output_tokens_per_s_per_device"],
                               able["rate_within_limits"] * 128 / able["devices"], rtol=1e-6)
    # Pools have none, nor what no plan can do.
    pools = [{"role": "prefill", "replicas": 1}, {"role": "decode", "replicas": 1}]
    none = Study.from_dict({"schema_version": 1, "scenario": {**BASE, "cluster": {"pools": pools}},
                            "axes": {"workload.rate_rps": [1.0]}})
    with pytest.raises(InputError, match="no closed form"):
        closed_form(none)
