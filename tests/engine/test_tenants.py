"""Orders and tenants as a scenario has them: what is refused, what comes out, and the same in a sweep."""

import json
from fractions import Fraction

import numpy as np
import pytest

import jaxsim
from jaxsim import InputError, Scenario
from jaxsim.engine import lower
from jaxsim.engine import simulate as engine
from jaxsim.metrics import fair_shares, fairness_of, flatten, lane_metrics
from jaxsim.policy.fairness import most_ahead, token_counters
from jaxsim.spec.workload import TenantSection
from jaxsim.study import results as tables
from jaxsim.study import runner
from jaxsim.study.study import Study
from jaxsim.workload import Workload
from jaxsim.workload.predictions import with_predictions
from tests.metrics.test_metrics import blank_lane

pytestmark = pytest.mark.unoptimised

FORM = {"a": 0.01, "b": 1e-5, "c": 1e-7, "d": 1e-4}

BASE = {"schema_version": 1, "num_seeds": 1,
        "engine": {"preset": "vllm-v1@0.9", "max_num_seqs": 4, "max_num_batched_tokens": 256, "max_model_len": 512,
                   "num_gpu_blocks_override": 64, "scheduling_policy": "vtc"},
        "workload": {"kind": "poisson", "rate_rps": 24.0, "num_requests": 160, "input": 100,
                     "output": {"kind": "uniform", "min_tokens": 1, "max_tokens": 60},
                     "prediction": {"sigma": 0.5},
                     "tenants": [{"name": "heavy", "share": 18.0, "deadline_ms": 9000.0, "weight": 2.0},
                                 {"name": "light", "ttft_ms": 700.0}, {"name": "plain"}]},
        "slo": {"ttft_ms": 1500.0},
        "cost": {"kind": "fitted", "prefill": FORM, "decode": FORM}}


def changed(**fields) -> dict:
    """`section__field` replaced in a copy of `BASE`; None takes it away."""
    tree = json.loads(json.dumps(BASE))
    for path, value in fields.items():
        *sections, last = path.split("__")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
        node.pop(last, None)
        if value is not None:
            node[last] = value
    return tree


TRACE = {"workload__kind": "trace", "workload__rate_rps": None, "workload__input": None, "workload__output": None,
         "workload__num_requests": None, "workload__prediction": None}


@pytest.mark.parametrize("fields, field, problem", [
    ({"engine__scheduling_policy": "sjf", "workload__prediction": None}, "workload.prediction", "goes by it"),
    ({"engine__scheduling_policy": "edf", "slo": None}, "workload.tenants[2].deadline_ms", "goes by deadlines"),
    ({"engine__scheduling_policy": "edf", "slo": None, "workload__tenants": None}, "slo.e2e_ms", "goes by deadlines"),
    ({"engine__scheduling_policy": "edf", "workload__kind": "closed-loop", "workload__rate_rps": None,
      "workload__concurrency": 4}, "engine.scheduling_policy", "arrivals, which are results"),
    ({"workload__kind": "closed-loop", "workload__rate_rps": None, "workload__concurrency": 4},
     "engine.scheduling_policy", "answers bring requests about"),
    ({"workload__kind": "conversation"}, "engine.scheduling_policy", "answers bring requests about"),
    ({"engine__scheduling_policy": "sjf", "workload__kind": "conversation"}, "engine.scheduling_policy",
     "not known of sessions"),
    ({"engine__scheduling_policy": "fcfs", "engine__input_token_weight": 1.0}, "engine.input_token_weight",
     "has no effect"),
    ({"engine__input_token_weight": 0.0, "engine__output_token_weight": 0.0}, "engine.output_token_weight",
     "no token would count"),
    ({"engine__enable_prefix_caching": True}, "engine.scheduling_policy", "prefix caching"),
    ({"engine__scheduling_policy": "sjf", "engine__victim": "last_admitted", "engine__enable_prefix_caching": True},
     "engine.scheduling_policy", "prefix caching"),
    ({"engine__victim": "lowest_priority"}, "engine.victim", "does not go with"),
    ({"engine__preset": "vllm-v1@0.19"}, "engine.scheduling_policy", "as vLLM V1 does it"),
    ({"engine__preset": "sarathi"}, "engine.scheduling_policy", "as vLLM V1 does it"),
    ({"engine__preset": "sglang", "engine__num_gpu_blocks_override": 4096}, "engine.scheduling_policy",
     "as vLLM V1 does it"),
    ({"engine__admit": "when_empty"}, "engine.scheduling_policy", "as vLLM V1 does it"),
    ({"engine__pipeline_parallel_size": 2}, "engine.scheduling_policy", "pipeline_parallel_size"),
    ({"engine__data_parallel_size": 2, "engine__enable_expert_parallel": True}, "engine.scheduling_policy",
     "iterate together"),
    ({"cluster": {"pools": [{"replicas": 2}]}}, "cluster.pools[0].engine.scheduling_policy", "in pools"),
    ({"workload__tenants": [{"name": "a", "weight": 1000.0}, {"name": "b", "weight": 0.001}],
      "engine__max_num_seqs": 65536, "engine__max_num_batched_tokens": 1 << 20, "engine__max_model_len": 1 << 20,
      "engine__num_gpu_blocks_override": 1 << 22}, "workload.tenants", "far apart"),
    ({"workload__prediction": {"sigma": -1.0}}, "workload.prediction.sigma", ""),
    ({"workload__tenants": [{"name": "a", "weight": 0.0}]}, "workload.tenants[0].weight", ""),
])
def test_what_is_not_simulated_is_refused(fields, field, problem):
    with pytest.raises(InputError) as caught:
        scenario = Scenario.from_dict(changed(**fields))
        system = lower.resolve_system(scenario)
        workload = lower.make_workload(scenario, 0)
        dims = engine.with_tenants(engine.dims_of(scenario, system, len(workload)), system, [workload])
        lower.with_counters(None, scenario, system, workload, dims)
    assert caught.value.field == field and problem in caught.value.problem and caught.value.remedy


def test_a_trace_may_bring_predictions(tmp_path):
    drawn = lower.make_workload(Scenario.from_dict(BASE), 0)
    drawn.to_frame().to_parquet(tmp_path / "own.parquet")
    drawn.to_frame().drop(columns="predicted_tokens").to_parquet(tmp_path / "none.parquet")

    def read(name, **more):
        fields = TRACE | {"engine__scheduling_policy": "sjf", "workload__trace": str(tmp_path / name)} | more
        return lower.make_workload(Scenario.from_dict(changed(**fields)), 0)

    np.testing.assert_array_equal(read("own.parquet").predicted_tokens, drawn.predicted_tokens)
    exact = read("own.parquet", workload__prediction={"sigma": 0.0})
    np.testing.assert_array_equal(exact.predicted_tokens, drawn.output_tokens)
    with pytest.raises(InputError, match="no predicted_tokens"):
        read("none.parquet")
    due = read("own.parquet", engine__scheduling_policy="edf")
    names = np.array(due.tenant_names)[due.tenant]
    assert {n: set(due.limit_s[names == n]) for n in ("heavy", "light", "plain")} == {
        "heavy": {9.0}, "light": {0.7}, "plain": {1.5}}


def test_predictions_have_a_stream_of_their_own():
    plain = lower.make_workload(Scenario.from_dict(changed(workload__prediction=None)), 3)
    one, other = (lower.make_workload(Scenario.from_dict(changed(workload__prediction={"sigma": s})), 3)
                  for s in (0.5, 1.0))
    for name in ("arrival_s", "input_tokens", "output_tokens", "tenant", "uniforms"):
        np.testing.assert_array_equal(getattr(one, name), getattr(plain, name))
    many = Workload(np.zeros(20_000), np.ones(20_000), np.full(20_000, 1_000_000))
    errors = [np.log(with_predictions(many, sigma, 3).predicted_tokens / 1e6) for sigma in (0.5, 1.0)]
    np.testing.assert_allclose(2 * errors[0], errors[1], atol=2e-5)
    # Of a normal law; 20,000 draws put the mean within 0.02 and the deviation within 2 % of it.
    assert abs(errors[1].mean()) < 0.03 and abs(errors[1].std() - 1) < 0.02
    assert (np.sign(one.predicted_tokens - one.output_tokens) * np.sign(
        other.predicted_tokens - other.output_tokens) >= 0).all()


@pytest.mark.parametrize("prices, weights", [((1, 2), (1, 1)), ((1, 2), (1, 3, 0.7)), ((0.25, 1.5), (2.0, 1.0)),
                                             ((0, 1), (5, 7))])
def test_prices_are_whole_and_in_proportion(prices, weights):
    counters = token_counters(*prices, weights, most_ahead(4096, 28_000 * 16, 128, 4096))
    whole = np.stack([counters.prompt_price, counters.output_price]).tolist()
    exact = [[Fraction(str(p)) / Fraction(str(w)) for w in weights] for p in prices]
    units = {Fraction(n) / x for ns, xs in zip(whole, exact, strict=True) for n, x in zip(ns, xs, strict=True) if x}
    assert len(units) == 1
    assert all((n == 0) == (x == 0) for ns, xs in zip(whole, exact, strict=True) for n, x in zip(ns, xs, strict=True))


def test_max_min_shares():
    """By hand: the small demand is met, the rest is split by weight."""
    assert fair_shares(9.0, np.array([1.0, 10.0, 10.0]), np.ones(3)).tolist() == [1.0, 4.0, 4.0]
    assert fair_shares(9.0, np.array([1.0, 10.0, 10.0]), np.array([1.0, 3.0, 1.0])).tolist() == [1.0, 6.0, 2.0]
    assert fair_shares(30.0, np.array([1.0, 10.0, 10.0]), np.ones(3)).tolist() == [1.0, 10.0, 10.0]


def test_fairness_by_hand():
    """Two tenants that wait all along for ten seconds, one of which gets three quarters."""
    lane = blank_lane(
        [0.0, 0.0, 0.0, 0.0, 10.0], [4.0, 8.0, 20.0, 30.0, 31.0], tenant=np.array([0, 1, 0, 1, 0]),
        tenant_names=("a", "b"), scheduled_s=np.array([0.0, 0.0, 10.0, 10.0, 30.0]),
        first_token_s=np.array([0.0, 0.0, 20.0, 30.0, 31.0]), input_tokens=np.ones(5, int),
        output_tokens=np.array([30, 10, 100, 100, 1]))
    found = fairness_of(lane, token_weights=(0.0, 1.0))
    # Served by the last arrival 30 and 10, of which each could have had 20.
    assert found["jain_index"] == pytest.approx((1.5 + 0.5)**2 / (2 * (1.5**2 + 0.5**2)))
    # In the first second of ten a got 7.5 and b 1.25.
    assert found["max_service_gap"] == pytest.approx(6.25)
    weighted = fairness_of(lane, [TenantSection(name="a", weight=3.0)], (0.0, 1.0))
    assert weighted["jain_index"] == pytest.approx(1.0)
    group = lane_metrics(lane, token_weights=(0.0, 1.0))
    assert group["tenants"]["a"]["service_share"] == pytest.approx(0.75) and group["tenants"]["b"]["requests"] == 2
    assert group["fairness"] == found
    assert "fairness" not in lane_metrics(blank_lane([0.0], [1.0]))


@pytest.fixture(scope="module")
def results():
    """One scenario under every order, alone."""
    return {order: jaxsim.simulate(Scenario.from_dict(changed(engine__scheduling_policy=order)))
            for order in ("fcfs", "sjf", "edf", "vtc")}


@pytest.mark.slow
def test_orders_do_what_they_are_for(results):
    of = {order: result.metrics[0] for order, result in results.items()}
    assert all(m["completed"] == 160 and m["fault"] is None for m in of.values())
    assert of["sjf"]["mean_e2el_ms"] < of["fcfs"]["mean_e2el_ms"]
    light = {order: m["tenants"]["light"]["mean_ttft_ms"] for order, m in of.items()}
    assert light["vtc"] < 0.5 * light["fcfs"] and light["edf"] < light["fcfs"]
    assert of["vtc"]["fairness"]["jain_index"] > of["fcfs"]["fairness"]["jain_index"]
    # Limits of tenants count: those of light are stricter than the rest's.
    frame = results["fcfs"].requests
    is_light = (frame["tenant"] == "light").to_numpy()
    ttft, e2e = (frame[name].to_numpy() for name in ("ttft_s", "e2e_s"))
    met = np.where(is_light, ttft <= 0.7, (ttft <= 1.5) & ((frame["tenant"] != "heavy") | (e2e <= 9.0)))
    assert of["fcfs"]["slo"]["attainment"] == pytest.approx(met.mean()) and 0 < met.mean() < 1
    assert "predicted_tokens" in frame


@pytest.mark.slow
def test_a_sweep_says_the_same(results, tmp_path):
    study = Study.from_dict({"schema_version": 1, "scenario": BASE,
                             "axes": {"engine.scheduling_policy": ["edf", "vtc"]}})
    runner.sweep(study, tmp_path / "out", workers=1)
    table = tables.load(tmp_path / "out")
    names = ("slo.attainment", "slo.ttft_attainment", "slo.e2e_attainment", "fairness.jain_index",
             "fairness.max_service_gap", "mean_e2el_ms", "p99_ttft_ms")
    for order in ("edf", "vtc"):
        row = table[table["engine.scheduling_policy"] == order].iloc[0]
        metrics = flatten(results[order].metrics[0])
        for name in names:
            want = np.nan if metrics[name] is None else metrics[name]
            np.testing.assert_allclose(row[name], want, rtol=1e-9, err_msg=f"{order} {name}")
