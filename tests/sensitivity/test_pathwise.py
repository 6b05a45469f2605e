"""Pathwise derivatives: differences where schedules are fixed, queueing theory, refusals, the trap of open arrivals.

One program for all queues of one server, one for offline batches and closed loops of an engine each."""

import numpy as np
import pytest

from jaxsim._core.errors import InputError
from jaxsim.sensitivity import pathwise as module
from jaxsim.sensitivity.pathwise import METRICS, RATES, Paths, exactness, of_metric, paths, pathwise
from jaxsim.spec.scenario import Scenario
from jaxsim.state import world
from jaxsim.study import runner
from tests.sensitivity import queues as q

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


# Seconds of a prompt and of each of its tokens: 0.05 s in the mean, at 10 requests a second half of the server's time.
QUEUES = {"M/D/1": (0.05, 0.0), "M/M/1": (0.0, 0.05 / q.TOKENS), "M/G/1": (0.02, 0.03 / q.TOKENS)}


@pytest.mark.slow
@pytest.mark.parametrize("name", QUEUES)
def test_one_server_is_queueing_theory(name):
    """Time in system W = rate E[S^2] / (2 (1 - rho)) + E[S], Pollaczek and Khinchine, by the parts of S and by the
    rate: within four standard errors over seeds, and these are small."""
    (a, b), rate, (mean, square) = QUEUES[name], 10.0, q.moments(name)
    cost = {"kind": "fitted", "prefill": {"a": a, "b": b}, "decode": {"a": 1.0}}
    one = q.scenario(name, num_seeds=16, num_requests=1280, cost=cost).with_values({"workload.rate_rps": rate})

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
@pytest.mark.parametrize("rate", [1.0, 3.0, 6.0])
def test_the_trap_of_open_arrivals_is_there(rate):
    """What a plain derivative through the simulator says of an open system is off by more than ten times, so that what
    this module refuses is worth refusing. Differences: over many paths, with a step that averages over the jumps.

    The table of docs/gradients.md, which `pytest -m slow -s` prints."""
    one = scenario(num_seeds=32, workload=OPEN["workload"] | {"rate_rps": rate})
    # As forward mode gives it; `pathwise` would have refused.
    values, tangents = paths(one, ["cost.decode.a"])
    naive = np.nanmean(tangents["cost.decode.a"].ttft) / np.nanmean(values.ttft)
    changes = differences(one, "cost.decode.a", 0.008, 0.05)

    def true_of(name, mean_s):
        each = changes[name] / (1e3 * mean_s)
        # 95 %, Student's of 32.
        return each.mean(), 2.04 * each.std(ddof=1) / np.sqrt(len(each))

    true, error = true_of("mean_ttft_ms", np.nanmean(values.ttft))
    assert error < 0.7 * true
    assert abs(naive) > 10 * (true + error), (naive, true, error)
    whole = np.nanmean(tangents["cost.decode.a"].e2e) / np.nanmean(values.e2e)
    whole_true, whole_error = true_of("mean_e2el_ms", np.nanmean(values.e2e))
    assert whole > whole_true + 2 * whole_error
    for name, *row in (("TTFT", naive, true, error), ("end to end", whole, whole_true, whole_error)):
        print("| {:g} | mean {} | {:.2f} | {:.2f} ± {:.2f} |".format(rate, name, *row))


REFUSED = {
    "open arrivals": (OPEN, "engine.max_num_seqs"),
    "a trace": ({"workload": {"kind": "trace", "trace": "example.csv"}}, "engine.max_num_seqs"),
    "thinking": ({"workload": CLOSED["workload"] | {"think_s": 0.5}}, "workload.think_s"),
    "a closed loop over engines": (CLOSED | {"cluster": {"replicas": 2}}, "cluster.replicas"),
    "a closed loop behind a front end": (CLOSED | {"cost": COST | {"front_end_s": 1e-3}}, "cost.front_end_s"),
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
    # Nobody else is there whose iteration the next request could come in the middle of.
    alone = {"workload": CLOSED["workload"] | {"concurrency": 1}, "cost": COST | {"front_end_s": 1e-3}}
    assert exactness(scenario(**alone)) == "closed loop"
    # A roofline has seconds outside the engine unless told.
    one = Scenario.named("default").with_values({
        "workload": BATCH | {"kind": "closed-loop", "concurrency": 5}, "cluster.replicas": 1})
    with pytest.raises(InputError, match="other 4") as told:
        exactness(one)
    assert told.value.field == "cost.front_end_s"
    assert exactness(one.with_values({"cost.front_end_s": 0.0})) == "closed loop"
    alone = OPEN | {"engine": ENGINE | {"max_num_seqs": 1}}
    assert exactness(scenario(**alone)) == "one server, FCFS"
    for cluster in ({"replicas": 2, "router": "round_robin"}, {"replicas": 2}):
        assert exactness(scenario(**alone, cluster=cluster)) == "one server, FCFS"


def test_fields_and_metrics_without_one_are_refused():
    for field, problem in (("engine.max_num_seqs", "whole numbers"), ("workload.input.max_tokens", "whole numbers"),
                           ("cost.mixed.a", "not used"), ("slo.ttft_ms", "no effect"),
                           ("engine.preset", "is a choice")):
        with pytest.raises(InputError, match=problem) as told:
            paths(scenario(workload=BATCH | {"num_requests": 8}), [field])
        assert told.value.field == field
    expecting = scenario(engine={"preset": "sglang", "max_num_seqs": 8, "max_model_len": 256,
                                 "num_gpu_blocks_override": 640, "schedule_conservativeness": 0.5})
    with pytest.raises(InputError, match="only decide what is done next"):
        paths(expecting, ["engine.schedule_conservativeness"])
    with pytest.raises(InputError, match="mean_ttft_ms"):
        pathwise(scenario(), ["cost.decode.a"], ["mean_ttft_s"])
    with pytest.raises(InputError, match=r"slo.*limits"):
        pathwise(scenario(slo={}), ["cost.decode.a"], ["slo_attainment"])


def test_values_are_those_of_a_run_and_limits_those_of_each_request():
    """Throughputs with their counts; attainment by the limits of each one's tenant; TPOT of nobody is refused."""
    values = Paths(np.array([[1.0, 3.0, 5.0]]), np.full((1, 3), np.nan), np.array([[2.0, 4.0, 6.0]]), np.array([8.0]),
                   dict(zip(RATES, (np.array([3.0]), np.array([30.0]), np.array([300.0])), strict=True)))
    slopes = Paths(*(np.ones_like(x) for x in values[:4]))
    for name, count in zip(RATES, (3, 30, 300), strict=True):
        value, slope = of_metric(name, values, slopes, {})
        assert value == pytest.approx(count / 8) and slope == pytest.approx(-count / 64)
    with pytest.raises(InputError, match="has no value"):
        of_metric("p99_tpot_ms", values, slopes, {})
    # One just at its own limit, one far inside, one without a limit.
    own = {"ttft": np.array([[1.0, 300.0, np.inf]])}
    value, slope = of_metric("slo_attainment", values, slopes, own, 0.01)
    assert value == pytest.approx(2.5 / 3) and slope == pytest.approx(-0.25 / 0.01 / 3, rel=1e-5)


@pytest.mark.slow
def test_values_are_those_of_the_simulator():
    """Of tenants with limits of their own: hard attainment, throughputs and latencies as a run has them; and of one
    client behind a front end, differences."""
    tenants = [{"name": "a", "share": 0.5, "ttft_ms": 400.0}, {"name": "b", "share": 0.5, "tpot_ms": 20.0}]
    one = scenario(workload=BATCH | {"tenants": tenants})
    table, refused = runner.table([one])
    assert not refused
    names = ("mean_ttft_ms", "p99_e2el_ms", "duration", *RATES, "slo_attainment")
    found = pathwise(one, ["cost.decode.a"], names, temperature=1e-5).set_index("metric")["value"]
    for name in names:
        column = "slo.attainment" if name == "slo_attainment" else name
        assert found[name] == pytest.approx(table[column].mean(), rel=1e-5), name
    assert 0.2 < found["slo_attainment"] < 0.95
    client = scenario(cost=COST | {"front_end_s": 0.02}, workload=CLOSED["workload"] | {"concurrency": 1})
    fields = {"cost.front_end_s": 0.02, "cost.decode.a": 0.008}
    rows = pathwise(client, list(fields), ["mean_e2el_ms", "duration"]).set_index(["field", "metric"])
    for field, value in fields.items():
        changes = differences(client, field, value, 2e-3)
        for name in ("mean_e2el_ms", "duration"):
            row = rows.loc[field, name]
            assert row["elasticity"] == pytest.approx(changes[name].mean() / row["value"], rel=1e-3), (field, name)
            assert row["elasticity"] > 0.01


def test_a_run_that_a_bound_stopped_is_refused(monkeypatch):
    """What a stopped run left without an end has no times."""
    def stopped(*_):
        nothing = tuple(np.full((4, 40), np.nan) for _ in range(3))
        return lambda *_: ((*nothing, np.zeros(4)), (*nothing, np.zeros(4)), np.array([0, 0, world.STUCK, 0]))

    monkeypatch.setattr(module, "_program", stopped)
    with pytest.raises(InputError, match=r"under seed 2: a scheduling pass could place nothing"):
        paths(scenario(), [])
