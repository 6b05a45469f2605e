"""Derivatives at a fixed schedule: against one that is played again by hand, against differences where no arrival is in
the way, forward against reverse."""

import dataclasses

import numpy as np
import pytest

from jaxsim import InputError, Scenario
from jaxsim.cost.fitted import fitted
from jaxsim.metrics.summary import lane_metrics
from jaxsim.sensitivity import attribution, costs, direct, recorded, runs, schedule
from jaxsim.sensitivity import measures as measuring
from jaxsim.sensitivity.critical_path import LATENCIES, PARTS, critical_paths
from jaxsim.sensitivity.measures import measures
from jaxsim.sensitivity.recorded import record
from tests.sensitivity.replay import latencies, play

pytestmark = pytest.mark.unoptimised

FORM = {"a": 0.01, "b": 1e-5, "c": 1e-7, "d": 1e-5}
FIELDS = [f"cost.{kind}.{letter}" for kind in ("prefill", "decode") for letter in "abcd"]
LATENCY = ["mean_ttft_ms", "p99_ttft_ms", "mean_tpot_ms", "p90_tpot_ms", "mean_e2el_ms", "std_e2el_ms",
           "queueing.mean_ms", "mean_itl_ms"]


def scenario(**workload) -> Scenario:
    """Two instances with memory for few: jumps, cuts, preemptions. The program of the tests of the tape."""
    return Scenario.from_dict({
        "schema_version": 1, "num_seeds": 1, "cluster": {"replicas": 2},
        "engine": {"preset": "vllm-v1", "max_num_seqs": 8, "max_num_batched_tokens": 256, "max_model_len": 256,
                   "num_gpu_blocks_override": 14},
        "workload": {"kind": "poisson", "rate_rps": 14.0, "num_requests": 60, "input": 60,
                     "output": {"kind": "uniform", "min_tokens": 1, "max_tokens": 80}} | workload,
        "cost": {"kind": "fitted", "prefill": FORM, "decode": FORM | {"c": 3e-7}}})


@pytest.fixture(scope="module")
def open_run():
    ((run,),) = record([scenario()])
    return run


def moved(one: Scenario, fields=FIELDS) -> list[direct.Moved]:
    ((_, runs),) = direct.moved([one], fields)
    return runs


@pytest.fixture(scope="module")
def moved_run():
    (run,) = moved(scenario())
    return run


@pytest.fixture(scope="module")
def batch():
    return scenario(kind="batch", rate_rps=None)


def rows_of(one: Scenario) -> np.ndarray:
    """The coefficients in float64: of prefill, decode, mixed."""
    made = fitted(*(one.cost.rows(kind) for kind in ("prefill", "decode", "mixed")), exact=True)
    return (np.asarray(made.coefficients, float) + np.asarray(made.remainders, float))[:, 0]


def test_the_run_is_a_hard_one(open_run):
    assert open_run.result.preemptions.sum() > 5 and open_run.tape.count > 80
    assert np.any(open_run.tape.iterations < open_run.tape.planned)


def test_latencies_are_those_of_the_run(open_run):
    own, lane = schedule.of_run(open_run), open_run.result
    found = latencies(own, own.atoms)
    for name, end_s in (("queue", lane.scheduled_s), ("ttft", lane.first_token_s), ("e2e", lane.finish_s)):
        assert np.allclose(getattr(found, name), end_s - lane.arrival_s, rtol=0, atol=1e-7), name


def test_several_runs_are_one_behind_the_other(open_run, moved_run):
    """Of both latencies are those of each, and derivatives are of the mean: sum of changes to sum of values."""
    slow = scenario(rate_rps=5.0)
    ((other,),), (moved_other,) = record([slow]), moved(slow)
    runs, metrics = [moved_run, moved_other], ["p99_ttft_ms", "mean_e2el_ms", "duration", "utilisation.most_busy_share"]
    both, alone = schedule.of_runs([open_run, other]), [schedule.of_run(run) for run in (open_run, other)]
    assert np.any(alone[1].met < 0) and len(set(both.instance)) == 4
    for ours, *each in zip(latencies(both, both.atoms), *(latencies(own, own.atoms) for own in alone), strict=True):
        assert np.allclose(ours, np.concatenate(each), rtol=0, atol=1e-12)
    found = direct.of_runs(scenario(), runs, FIELDS, metrics)
    parts = [direct.of_runs(scenario(), [run], FIELDS, metrics) for run in runs]
    values = [{name: measures(scenario(), [run.result])[name].value for name in metrics} for run in runs]
    assert set(found) == set(parts[0]) | set(parts[1])
    for name, field in found:
        change, value = (sum(x) for x in zip(*((part.get((name, field), 0.0) * own[name], own[name])
                                               for part, own in zip(parts, values, strict=True)), strict=True))
        assert found[name, field] == pytest.approx(change / value, rel=1e-9, abs=1e-12), (name, field)


def test_runs_of_unlike_lengths_are_measured_together(open_run):
    """As one by one: of fewer requests, of some that never end, of ties."""
    lane = open_run.result
    times = {name: np.round(getattr(lane, name)[:20], 1) for name in
             ("arrival_s", "scheduled_s", "first_token_s", "finish_s")}
    more = {name: getattr(lane, name)[:20] for name in
            ("input_tokens", "output_tokens", "status", "tenant", "stall_s", "preemptions", "max_tokens", "instance",
             "priority")}
    times["finish_s"][3] = np.nan
    lanes = [lane, dataclasses.replace(lane, **times, **more)]
    both, alone = measures(scenario(), lanes), [measures(scenario(), [one]) for one in lanes]
    assert set(both) == set(alone[0]) & set(alone[1]) and len(both) > 25
    for name, one in both.items():
        each = [known[name] for known in alone]
        assert one.value == pytest.approx(sum(x.value for x in each), rel=1e-12), name
        assert one.front_end == pytest.approx(sum(x.front_end for x in each), rel=1e-12), name
        for ours, *theirs in zip((*one.latencies, *one[2:3], *one[4:]),
                                 *((*x.latencies, *x[2:3], *x[4:]) for x in each), strict=True):
            assert np.allclose(ours, np.concatenate(theirs), rtol=1e-12, atol=1e-15), name


def test_of_equals_the_earlier_ones_are_slower():
    """Percentiles of a run with ties, against a stable order."""
    values = np.array([[3.0, 1.0, 3.0, 2.0, 3.0, 1.0], [5.0, 5.0, 5.0, 5.0, 5.0, 5.0]])
    for place in range(6):
        ordered = np.argsort(values, axis=1, kind="stable")[:, place]
        at = measuring._at(values, np.sort(values, axis=1)[:, place], np.full(2, place))
        assert np.array_equal(at, ordered), place


def test_metrics_are_those_of_the_summary(open_run):
    """By name and value; and the derivative of each by a common factor of all latencies is its own value, which Euler
    says of sums, percentiles and deviations alike."""
    known, reference = measures(scenario(), [open_run.result]), {}
    for name, value in lane_metrics(open_run.result).items():
        reference |= {f"{name}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {name: value}
    assert set(LATENCY) <= set(known)
    own = schedule.of_run(open_run)
    seconds = latencies(own, own.atoms)
    for name, one in known.items():
        assert one.value == pytest.approx(reference[name], rel=1e-9, abs=1e-12), name
        if name.endswith("_ms"):
            euler = sum(float(np.nansum(w * x)) for w, x in zip(one.latencies, seconds, strict=True))
            assert euler == pytest.approx(one.value, rel=1e-5, abs=1e-4), name


def test_it_is_what_a_replay_by_hand_gives(open_run):
    one = scenario()
    base, arrival_s = rows_of(one), open_run.result.arrival_s
    played = play(open_run.tape, arrival_s, base, base)
    assert played.cases["first"] > 5 and played.cases["jump"] > 5 and played.cases["idle"] > 1
    assert played.cases["queued"] > 50
    found = direct.of_runs(one, moved(one), FIELDS, [*LATENCY, "duration", "utilisation.busy_share"])
    known = measures(one, [open_run.result])
    step = 0.25
    for field in FIELDS:
        # Latencies are linear in coefficients at a fixed schedule: any step is exact.
        up, down = (play(open_run.tape, arrival_s, base, rows_of(costs.changed(one, field, 1 + s * step)))
                    for s in (1, -1))
        change = {name: (getattr(up, name) - getattr(down, name)) / (2 * step) for name in ("queue", "ttft", "e2e")}
        gaps = open_run.result.output_tokens - 1
        tpot = (change["e2e"] - change["ttft"])[gaps > 0] / gaps[gaps > 0]
        expected = {"mean_ttft_ms": change["ttft"].mean(), "mean_e2el_ms": change["e2e"].mean(),
                    "mean_tpot_ms": tpot.mean(), "queueing.mean_ms": change["queue"].mean()}
        last = int(np.argmax(open_run.result.finish_s))
        expected["duration"] = 1e-3 * change["e2e"][last]
        ranks = np.argsort(open_run.result.first_token_s - arrival_s)
        expected["p99_ttft_ms"] = change["ttft"][ranks[58:]] @ [1 - 0.41, 0.41]
        for name, value in expected.items():
            ours = found.get((name, field), 0.0) * known[name].value * 1e-3
            assert ours == pytest.approx(value, rel=1e-5, abs=1e-9), (name, field)
        span_s = open_run.result.span_s
        share = known["utilisation.busy_share"].value
        busy = (up.busy - down.busy).mean() / (2 * step) / span_s - share * change["e2e"][last] / span_s
        assert found["utilisation.busy_share", field] * share == pytest.approx(busy, rel=1e-5, abs=1e-9)


def test_reverse_is_forward_and_resources_are_all_of_it(open_run):
    one, metrics = scenario(), [name for name in LATENCY if name != "queueing.mean_ms"]
    forward = direct.of_runs(one, moved(one), FIELDS, metrics)
    reverse = attribution.of_runs(one, [open_run], metrics)
    assert np.allclose(reverse.by_resource.sum(axis=1), 1.0, rtol=0, atol=2e-5)
    assert (reverse.by_parameter.abs() > 1e-4).to_numpy().sum() > 30
    # Mixed iterations follow from the coefficients of the others, by kind: all together are all of them.
    for metric in metrics:
        every = sum(forward.get((metric, field), 0.0) for field in FIELDS)
        # Two ways, the one in float32.
        assert every == pytest.approx(float(reverse.by_parameter.loc[metric].sum()), rel=1e-6)
    written = one.with_values({"cost.mixed": dict(zip("abcde", rows_of(one)[2].tolist(), strict=True))})
    fields = [f"cost.{name}" for name in reverse.by_parameter]
    forward = direct.of_runs(written, moved(written, fields), fields, metrics)
    for metric in metrics:
        for name, value in reverse.by_parameter.loc[metric].items():
            assert forward.get((metric, f"cost.{name}"), 0.0) == pytest.approx(value, rel=1e-5, abs=1e-9)


def test_of_a_batch_it_is_the_total_derivative(batch):
    """Nobody arrives while anything runs, so nothing is left out: differences of whole runs agree."""
    metrics, step = ["mean_ttft_ms", "p99_e2el_ms", "mean_tpot_ms", "duration", "output_throughput"], 0.02
    fields = ["cost.prefill.a", "cost.decode.a", "cost.decode.c"]
    found = direct.direct([batch], fields, metrics)
    for field in fields:
        ((up,),), ((down,),) = (record([costs.changed(batch, field, 1 + sign * step)]) for sign in (1, -1))
        for metric in metrics:
            above, below = (measures(batch, [run.result])[metric].value for run in (up, down))
            total = np.log(above / below) / np.log((1 + step) / (1 - step))
            assert found[0, metric, field] == pytest.approx(total, rel=1e-3, abs=1e-6), (metric, field)
    assert any(abs(value) > 0.3 for value in found.values())


def test_who_never_starts_is_in_nothing(open_run, moved_run):
    """Requests without a first iteration, an answer or an end, as a bound leaves them."""
    lost = open_run.tape
    joined, first, last = (np.array(x) for x in (lost.joined, lost.first_token, lost.last))
    joined[:2] = first[:2] = last[:2] = -1
    first[2:4] = last[2:4] = last[4] = -1
    lane, never = open_run.result, np.nan
    status = np.array(lane.status)
    times = {name: np.array(getattr(lane, name)) for name in ("scheduled_s", "first_token_s", "finish_s")}
    times["scheduled_s"][:2] = times["first_token_s"][:4] = times["finish_s"][:5] = never
    status[:5] = 1
    result = dataclasses.replace(lane, status=status, **times)
    run = open_run._replace(result=result, tape=dataclasses.replace(lost, joined=joined, first_token=first, last=last))
    found = direct.of_runs(scenario(), [moved_run._replace(result=result)], FIELDS, LATENCY)
    assert found and np.isfinite(list(found.values())).all()
    assert np.isfinite(attribution.of_runs(scenario(), [run], LATENCY).by_parameter.to_numpy()).all()
    paths = critical_paths(scenario(), run)
    assert np.isnan(paths.latency_s["ttft"][:4]).all() and np.isfinite(paths.table("e2e").to_numpy()).all()
    with pytest.raises(InputError, match="has no ttft"):
        paths.table("ttft", [1])


def test_parts_of_a_critical_path_are_all_of_it(open_run):
    paths, lane = critical_paths(scenario(), open_run), open_run.result
    for name, end_s in (("ttft", lane.first_token_s), ("e2e", lane.finish_s)):
        parts = paths.seconds[:, [PARTS.index(part) for part in LATENCIES[name]]]
        assert np.allclose(parts.sum(axis=(1, 2)), end_s - lane.arrival_s, rtol=1e-12, atol=1e-12)
        assert parts.min() > -1e-6
    # What is waiting is the time in the queue.
    waiting = paths.seconds[:, 1:5].sum(axis=(1, 2))
    assert np.allclose(waiting, lane.scheduled_s - lane.arrival_s, rtol=0, atol=1e-6)
    assert (waiting > 0.05).sum() > 5 and (paths.stall_s > 0).sum() > 3
    by_part = paths.table("e2e").sum(axis=1)
    assert by_part["own decodes"] > 0.1 and by_part["queue: decodes of others"] > 0.01
    assert 0 < by_part["own prompt"] < by_part["own decodes"]
    values = paths.latency_s["ttft"]
    assert (values <= values[paths.at(99)]).mean() >= 0.99 and paths.at(0) == np.argmin(values)


def test_seeds_are_means_before_they_are_shares(open_run, moved_run):
    """Of two runs the elasticity of the mean, which the slower one leads; and reverse alike."""
    metrics, fields = ["mean_ttft_ms", "queueing.mean_ms"], ["cost.prefill.b", "cost.decode.a"]
    one = scenario()
    slow = one.with_values({"workload.rate_rps": 2.0})
    ((quiet,),), runs = record([slow]), [moved_run, *moved(slow)]
    both, reverse = direct.of_runs(one, runs, fields, metrics), attribution.of_runs(one, [open_run, quiet], metrics)
    apart = 0.0
    for metric in metrics:
        values = [measures(one, [run.result])[metric].value for run in runs]
        for field in fields:
            each = [direct.of_runs(one, [run], [field], metrics)[metric, field] for run in runs]
            assert both[metric, field] == pytest.approx(np.dot(each, values) / sum(values), rel=1e-9)
            apart = max(apart, abs(both[metric, field] - np.mean(each)))
        assert reverse.value[metric] == pytest.approx(np.mean(values), rel=1e-12)
        assert float(reverse.by_resource.loc[metric].sum()) == pytest.approx(1, abs=2e-5)
    assert apart > 0.1


def test_a_metric_of_nothing_is_refused(open_run, moved_run):
    """0 in every run: no shares. 0 in one run: the mean over both has them. Not there in one: no mean."""
    def silent(run, **fields):
        return run._replace(result=dataclasses.replace(run.result, **fields))

    one, name = scenario(), "queueing.mean_ms"
    none, moved_none = (silent(run, scheduled_s=np.array(open_run.result.arrival_s)) for run in (open_run, moved_run))
    with pytest.raises(InputError, match="is 0, of which there are no shares"):
        attribution.of_runs(one, [none], [name])
    assert not [pair for pair in direct.of_runs(one, [moved_none], FIELDS, [name]) if pair[0] == name]
    assert list(attribution.of_runs(one, [none, open_run], [name]).value.index) == [name]
    absent = silent(open_run, scheduled_s=np.full(open_run.result.num_requests, np.nan))
    with pytest.raises(InputError, match="has no value in 1 of 2 runs"):
        attribution.of_runs(one, [absent, open_run], [name])
    stopped = silent(open_run, fault="steps")
    with pytest.raises(InputError, match="stopped a run"):
        attribution.of_runs(one, [stopped], [name])


def test_one_name_for_many_leaves_is_their_sum():
    """A name of `cost.overrides` in reverse is all that it stands for; half a name is left out."""
    model = costs.CostModel(None, ("link_bytes_per_s", "exchange_bytes_per_s", "a.b", "expert_skew", "expert_share"),
                            places={"link_bytes_per_s": [0, 1], "exchange_bytes_per_s": [1], "expert_skew": [3],
                                    "hop_latency_s": []})
    found = model.by_name(np.array([[1.0, 2.0, 4.0, 8.0, 16.0]]))
    assert {name: float(x[0]) for name, x in found.items()} == {
        "link_bytes_per_s": 3, "exchange_bytes_per_s": 2, "a.b": 4, "expert_share": 16}


def test_a_scenario_without_derivatives_is_left_out_alone(monkeypatch):
    """Refused before it runs, or stopped by a bound: the other has its derivatives."""
    metrics, fields = ["mean_e2el_ms"], ["cost.decode.a"]
    given = [scenario().with_values({"engine.pipeline_parallel_size": 2}), scenario(),
             scenario().with_values({"workload.rate_rps": 15.0})]
    kept, seen = direct.lane_result, []

    def stopped(dims, world, index, made):
        seen.append(made.scenario)
        return dataclasses.replace(kept(dims, world, index, made), fault="" if made.scenario == 1 else "steps")

    monkeypatch.setattr(direct, "lane_result", stopped)
    # A batch a run: what is left out of a batch has no part in the others.
    monkeypatch.setattr(runs, "BATCH_BYTES", 1)
    found, without = direct.derivatives(given, fields, metrics)
    assert sorted(seen) == [1, 2] and list(found) == [(1, "mean_e2el_ms", "cost.decode.a")]
    assert list(without) == [0, 2] and without[0].field == "engine.pipeline_parallel_size"
    assert without[2].field == "fault"
    with pytest.raises(InputError, match="overlaps iterations"):
        direct.direct(given[:1], fields, metrics)


def test_a_tape_that_was_too_short_is_refused(open_run):
    dims = open_run.made.dims
    lost = dataclasses.replace(open_run.tape, count=np.int32(dims.num_records + 5))
    found = recorded._recorded(dims, None, 0, open_run.made, lost)
    assert isinstance(found, InputError) and "engine.max_num_batched_tokens" in found.remedy


def test_runs_that_do_not_fit_are_refused(monkeypatch):
    monkeypatch.setattr(runs, "memory_bytes", lambda: 1 << 10)
    with pytest.raises(InputError, match="records take about"):
        record([scenario()])
    with pytest.raises(InputError, match="derivatives by 8 fields take about"):
        direct.direct([scenario()], FIELDS, LATENCY)


def test_pairs_without_meaning_are_absent(batch):
    found = direct.direct([scenario()], ["cost.decode.a", "engine.max_num_seqs", "workload.rate_rps", "cost.decode.e",
                                         "cost.front_end_s", "device.numbers.memory_bytes_per_s"],
                          ["mean_tpot_ms", "slo.attainment", "p99_itl_ms", "preemptions.total"])
    assert list(found) == [(0, "mean_tpot_ms", "cost.decode.a")]


@pytest.mark.parametrize("values, field", [
    ({"engine.pipeline_parallel_size": 2}, "engine.pipeline_parallel_size"),
    ({"model.name": "llama-3.1-8b", "device.name": "h100", "cluster.migration": {}}, "cluster.migration"),
    ({"model.name": "llama-3.1-8b", "device.name": "h100", "engine.preset": "vllm-v0", "cluster.replicas": 1,
      "engine.swap": {"space_gb": 4, "dispatch_us": 5}}, "engine.swap"),
    ({"workload.client": {"deadline_s": 3.0}}, "workload.client")])
def test_schedules_that_a_tape_does_not_tell_are_refused(values, field):
    with pytest.raises(InputError, match="no derivative at a fixed schedule") as error:
        record([scenario().with_values(values)])
    assert error.value.field == field and "total derivative" in error.value.remedy


def test_a_metric_that_is_no_sum_of_times_is_refused(open_run):
    with pytest.raises(InputError, match="is no sum of times"):
        attribution.of_runs(scenario(), [open_run], ["slo.attainment"])
