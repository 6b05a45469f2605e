"""Pathwise derivatives: differences where schedules are fixed, queueing theory, refusals, the trap of open arrivals.

One program for all queues of one server, one for offline batches and closed loops of an engine each."""

import numpy as np
import pytest

from jaxsim._core.errors import InputError
from jaxsim.sensitivity.pathwise import METRICS, exactness, of_metric, paths, pathwise
from jaxsim.spec.scenario import Scenario

pytestmark = pytest.mark.unoptimised

ENGINE = {"preset": "vllm-v1@0.9", "max_num_seqs": 8, "max_num_batched_tokens": 128, "max_model_len": 256,
          "num_gpu_blocks_override": 40}
COST = {"kind": "fitted", "prefill": {"a": 0.01, "b": 1e-4, "e": 1e-8}, "decode": {"a": 0.008, "c": 1e-6, "d": 1e-4}}
BATCH = {"kind": "batch", "num_requests": 40, "input": {"kind": "uniform", "min_tokens": 8, "max_tokens": 150},
         "output": {"kind": "uniform", "min_tokens": 1, "max_tokens": 60}}


def scenario(**changes) -> Scenario:
    return Scenario.from_dict({"schema_version": 1, "num_seeds": 4, "engine": ENGINE, "cost": COST, "workload": BATCH,
                               "slo": {"ttft_ms": 1500.0, "tpot_ms": 25.0}} | changes)


CLOSED = {"workload": BATCH | {"kind": "closed-loop", "concurrency": 5}}
FIELDS = ("cost.prefill.a", "cost.prefill.b", "cost.prefill.e", "cost.decode.a", "cost.decode.c", "cost.decode.d")
COMPARED = ("mean_ttft_ms", "mean_tpot_ms", "mean_e2el_ms", "p99_ttft_ms", "p99_e2el_ms", "duration",
            "request_throughput", "slo_attainment")
OPEN = {"workload": BATCH | {"kind": "poisson", "rate_rps": 6.0}}


def differences(one: Scenario, field: str, value: float, step: float) -> dict[str, np.ndarray]:
    """Central ones of every metric of every seed by the field's logarithm."""
    limits = {"ttft": 1.5, "tpot": 0.025}
    sides = [paths(one.with_values({field: value * (1 + sign * step)}), [])[0] for sign in (1, -1)]
    found = [{name: of_metric(name, side, side, limits)[0] for name in METRICS} for side in sides]
    return {name: (found[0][name] - found[1][name]) / (2 * step) for name in METRICS}


@pytest.mark.parametrize("kind", [pytest.param("batch", marks=pytest.mark.slow), "closed"])
def test_it_is_the_difference_where_nothing_arrives_by_the_clock(kind):
    """To 1e-3, by every coefficient. Percentiles are of the requests that they are made of, which a step may exchange
    where many are alike: those of TPOT are not compared."""
    one = scenario() if kind == "batch" else scenario(**CLOSED)
    found = pathwise(one, FIELDS, METRICS).set_index(["field", "metric"])
    matter = 0
    for field, value in zip(FIELDS, (0.01, 1e-4, 1e-8, 0.008, 1e-6, 1e-4), strict=True):
        changes = differences(one, field, value, 2e-3)
        for name in COMPARED:
            row = found.loc[field, name]
            expected = changes[name].mean() / row["value"]
            # Beside that, what 32 bits leave of a difference.
            assert row["elasticity"] == pytest.approx(expected, rel=1e-3, abs=6e-5), (field, name)
            matter += abs(row["elasticity"]) > 0.01
    assert matter > 30
    # Every second is one of these, so all of them together are one percent for a percent.
    total = found["elasticity"].unstack()["mean_e2el_ms"].sum()
    assert total == pytest.approx(1.0, rel=1e-4)


def queue(law, a: float, b: float, rate: float) -> Scenario:
    """Prompts alone, one after the other: service is a + b tokens."""
    return Scenario.from_dict({
        "schema_version": 1, "num_seeds": 16, "engine": ENGINE | {
            "max_num_seqs": 1, "max_num_batched_tokens": 4096, "max_model_len": 4096, "num_gpu_blocks_override": 512},
        "cost": {"kind": "fitted", "prefill": {"a": a, "b": b}, "decode": {"a": 1.0}},
        "workload": {"kind": "poisson", "rate_rps": rate, "num_requests": 1280, "input": law, "output": 1}})


LEVELS = np.r_[np.linspace(0, 0.99, 400), 1 - np.geomspace(0.0099, 1e-4, 60), 1.0]
EXPONENTIAL = {"kind": "quantiles", "levels": LEVELS.tolist(),
               "tokens": np.maximum(np.rint(-400 * np.log(np.maximum(1 - LEVELS, 5e-5))), 1).astype(int).tolist()}
QUEUES = {"M/D/1": (400, 0.05, 0.0, 10.0), "M/M/1": (EXPONENTIAL, 0.0, 1.25e-4, 10.0),
          "M/G/1": ({"kind": "uniform", "min_tokens": 1, "max_tokens": 799}, 0.02, 7.5e-5, 10.0)}


def moments(law) -> tuple[float, float]:
    """Means of the tokens and of their square, of the law as it is drawn."""
    u = (np.arange(200_000) + 0.5) / 200_000
    tokens = (np.full(1, 400.0) if law == 400 else np.interp(u, law["levels"], law["tokens"]) if "levels" in law
              else np.arange(1.0, 800.0))
    return tokens.mean(), (tokens**2).mean()


@pytest.mark.slow
@pytest.mark.parametrize("name", QUEUES)
def test_one_server_is_queueing_theory(name):
    """Time in system W = rate E[S^2] / (2 (1 - rho)) + E[S], Pollaczek and Khinchine, by the parts of S and by the
    rate: within four standard errors over seeds, and these are small."""
    law, a, b, rate = QUEUES[name]
    one, (mean, square) = queue(law, a, b, rate), moments(QUEUES[name][0])

    def system_s(a, b, rate):
        service, second = a + b * mean, a * a + 2 * a * b * mean + b * b * square
        return rate * second / (2 * (1 - rate * service)) + service

    fields = [field for field, value in (("cost.prefill.a", a), ("cost.prefill.b", b)) if value] + ["workload.rate_rps"]
    values, tangents = paths(one, fields)
    assert not np.isnan(values.ttft).any()
    assert exactness(one) == "one server, FCFS"
    theory_s = system_s(a, b, rate)
    assert values.ttft.mean() == pytest.approx(theory_s, rel=0.04)
    for field in fields:
        at = {"cost.prefill.a": 0, "cost.prefill.b": 1, "workload.rate_rps": 2}[field]
        point, step = np.array([a, b, rate]), np.eye(3)[at] * 1e-5
        slope = (system_s(*(point * (1 + step))) - system_s(*(point * (1 - step)))) / 2e-5
        each = tangents[field].ttft.mean(axis=1)
        error = each.std(ddof=1) / np.sqrt(len(each))
        assert abs(each.mean() - slope) < 4 * error and error < 0.08 * abs(slope), (field, each.mean(), slope, error)


@pytest.mark.slow
def test_the_trap_of_open_arrivals_is_there():
    """What a plain derivative through the simulator says of an open system is off by more than ten times, so that what
    this module refuses is worth refusing. Differences: over many paths, with a step that averages over the jumps."""
    one = scenario(num_seeds=32, **OPEN)
    # As forward mode gives it; `pathwise` would have refused.
    values, tangents = paths(one, ["cost.decode.a"])
    naive = np.nanmean(tangents["cost.decode.a"].ttft) / np.nanmean(values.ttft)
    change = differences(one, "cost.decode.a", 0.008, 0.05)["mean_ttft_ms"]
    true = change.mean() / (1e3 * np.nanmean(values.ttft))
    error = change.std(ddof=1) / np.sqrt(len(change)) / (1e3 * np.nanmean(values.ttft))
    assert error < 0.3 * true
    assert abs(naive) > 10 * true, (naive, true)


REFUSED = {
    "open arrivals": (OPEN, "engine.max_num_seqs"),
    "a trace": ({"workload": {"kind": "trace", "trace": "example.csv"}}, "engine.max_num_seqs"),
    "thinking": ({"workload": CLOSED["workload"] | {"think_s": 0.5}}, "workload.think_s"),
    "a closed loop over engines": (CLOSED | {"cluster": {"replicas": 2}}, "cluster.replicas"),
    "warm-up": (CLOSED | {"warmup_s": 1e-3}, "warmup_s"),
    "stages": ({"engine": ENGINE | {"pipeline_parallel_size": 2}}, "engine.pipeline_parallel_size"),
    "one server of two, by load": (OPEN | {"engine": ENGINE | {"max_num_seqs": 1}, "cluster": {
        "replicas": 2, "router": "least_outstanding"}}, "cluster.router"),
    "one server, sorted": (OPEN | {"engine": ENGINE | {"max_num_seqs": 1, "scheduling_policy": "priority"}},
                           "engine.scheduling_policy"),
    "a batch in a time budget": ({"engine": ENGINE | {"target_batch_time_ms": 30.0}}, "engine.target_batch_time_ms"),
    "clients": ({"workload": BATCH | {"client": {"deadline_s": 5.0}}}, "workload.client"),
    "scaling": ({"cluster": {"replicas": 2, "migration": {}}}, "cluster.migration")}


@pytest.mark.parametrize("case", REFUSED)
def test_it_is_refused_where_it_would_be_wrong(case):
    """The trap stays closed: with what may be asked for instead."""
    changes, field = REFUSED[case]
    with pytest.raises(InputError, match="pathwise derivative would be wrong.*total.*direct") as told:
        pathwise(scenario(**changes), ["cost.decode.a"])
    assert told.value.field == field


def test_it_is_allowed_where_it_is_exact():
    assert exactness(scenario()) == exactness(scenario(cluster={"replicas": 3})) == "offline batch"
    assert exactness(scenario(**CLOSED)) == "closed loop"
    alone = OPEN | {"engine": ENGINE | {"max_num_seqs": 1}}
    assert exactness(scenario(**alone)) == "one server, FCFS"
    assert exactness(scenario(**alone, cluster={"replicas": 2, "router": "round_robin"})) == "one server, FCFS"


def test_fields_and_metrics_without_one_are_refused():
    for field, problem in (("engine.max_num_seqs", "whole numbers"), ("workload.input.max_tokens", "whole numbers"),
                           ("cost.mixed.a", "no positive number"), ("slo.ttft_ms", "no effect")):
        with pytest.raises(InputError, match=problem):
            paths(scenario(workload=BATCH | {"num_requests": 8}), [field])
    with pytest.raises(InputError, match="mean_ttft_ms"):
        pathwise(scenario(), ["cost.decode.a"], ["mean_ttft_s"])
    with pytest.raises(InputError, match=r"slo.*limits"):
        pathwise(scenario(slo={}), ["cost.decode.a"], ["slo_attainment"])
