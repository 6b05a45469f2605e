"""Clients that give up, sendings after the first, refusals: the engine equals the reference bit for bit, ties included.

As in `test_parity`; deadlines fall on the ends of iterations, on arrivals and on each other.
"""

from collections import Counter
from dataclasses import replace

import jax
import numpy as np
import pytest

from jaxsim import Scenario, simulate
from jaxsim._core.errors import InputError
from jaxsim.engine import functional, loop
from jaxsim.engine.environment import Environment
from jaxsim.kernels import clock
from jaxsim.metrics import FINISHED, flatten
from jaxsim.metrics.lane import REJECTED
from jaxsim.policy.clients import UNBOUNDED, backoffs, patience
from jaxsim.study import runner
from tests.engine import cases as c
from tests.engine import client_cases as cc
from tests.engine.test_compiled import computations, inner_body, large_shapes, problems, reached
from tests.reference import simulator

pytestmark = pytest.mark.unoptimised

PROGRAMS = [pytest.param(name, n, id=f"{name}-{n}", marks=[] if (name, n) == ("vllm-v1", 3) else pytest.mark.slow)
            for name, n in (("vllm-v1", 3), ("vllm-v1-async", 3), ("vllm-v1", 1), ("vllm-v1-async", 1), ("vllm-v1", 8),
                            ("sarathi", 3), ("orca", 3), ("static", 3), ("tensorrt-llm", 3))]


def exercised(case: cc.ClientCase, result: simulator.ReferenceResult) -> Counter:
    """How often what is hard happened."""
    ends = {record.end_s for record in result.iterations}
    seen = Counter(r.status for r in result.requests)
    for r, both in zip(result.requests, np.isfinite(case.deadline_s + case.first_token_deadline_s), strict=True):
        is_late = r.status == "timed_out"
        seen["waiting"] += is_late and np.isnan(r.scheduled_s)
        seen["in its prompt"] += is_late and not np.isnan(r.scheduled_s) and np.isnan(r.first_token_s)
        seen["after its first token"] += is_late and not np.isnan(r.first_token_s)
        seen["preempted"] += is_late and r.preemptions > 0
        seen["as an iteration ends"] += is_late and r.ended_s in ends
        seen["two deadlines"] += is_late and both and not np.isnan(r.first_token_s)
        seen["answered at last"] += r.status == "finished" and r.sendings > 1
        seen["answered as the client gives up"] += r.status == "finished" and r.ended_s - r.last_sent_s == np.min(
            case.deadline_s[r.id])
    return seen


def agree(seed: int, flags: simulator.Flags, dims) -> Counter:
    """All cases of a seed agree; else fails with the smallest case that does not."""
    batch = cc.draw_many(seed, flags, dims)

    def wrong(some, results):
        return [cc.differences(ours, cc.answer(result, dims.num_executors, one.case.limits["num_blocks"]))
                for one, ours, result in zip(some, cc.simulate(some, flags, dims), results, strict=True)]

    return c.agree_and_count(seed, batch, lambda one: cc.reference(one, flags, dims), wrong, exercised)


@pytest.mark.parametrize("name, num_executors", PROGRAMS)
def test_engine_equals_reference(name, num_executors):
    flags, dims = simulator.preset(name), cc.dims_of(name, num_executors)
    seen = sum((agree(seed, flags, dims) for seed in c.seeds(3, of=4)), Counter())
    hard = ["finished", "timed_out", "rejected", "waiting", "after its first token", "as an iteration ends",
            "two deadlines", "answered at last", "answered as the client gives up"]
    if flags.chunked_prefill:
        hard.append("in its prompt")
    if name in ("vllm-v1", "vllm-v1-async", "sarathi") and num_executors < 8:
        hard.append("preempted")
    assert all(seen[what] >= 3 for what in hard), seen
    assert seen["finished"] > seen["timed_out"] > 100


@pytest.mark.slow
def test_jumps_change_nothing():
    """One iteration at a time gives what jumps give."""
    flags, dims = simulator.preset("vllm-v1"), cc.dims_of("vllm-v1", 3)
    batch = cc.draw_many(21, flags, dims)
    jumping, single = (cc.simulate(batch, flags, d) for d in (dims, replace(dims, max_jump=1)))
    for one, other in zip(jumping, single, strict=True):
        exact = {k: v for k, v in one.items() if k not in ("itl", "held_block_s", "steps")}
        assert cc.unequal(other, exact) == []
        assert one["itl"].sum() == other["itl"].sum()
    assert sum(lane["steps"] for lane in single) > 1.2 * sum(lane["steps"] for lane in jumping)


@pytest.mark.slow
def test_clients_that_wait_for_ever_change_nothing():
    """With all deadlines infinite and no bound every bit is as it is without clients."""
    flags, dims = simulator.preset("vllm-v1"), cc.dims_of("vllm-v1", 3)
    batch = c.draw_many(3, flags, dims)
    never = [cc.ClientCase(case, *[np.full(len(case), np.inf)] * 2, ()) for case in batch]
    patient = cc.simulate(never, flags, dims)
    plain = c.simulate(batch, flags, c.dims_of("vllm-v1", 3), "mixed", lanes=c.LANES)
    for one, other in zip(patient, plain, strict=True):
        assert [k for k, v in other.items() if k not in ("instance", "steps") and not np.array_equal(v, one[k])] == []
        assert np.all(one["sendings"] == 1) and np.all(one["status"] == "finished")


@pytest.mark.slow
def test_the_loop_body_copies_nothing_large():
    """As of all programs (`test_compiled`)."""
    if jax.default_backend() != "cpu":
        pytest.skip("reads the text of a CPU program")
    flags, dims = simulator.preset("vllm-v1"), cc.dims_of("vllm-v1", 3)
    large, small = large_shapes(dims, c.LANES)
    assert not large & small
    text = loop.run.lower(dims, *cc.inputs(cc.draw_many(0, flags, dims), flags, dims, "mixed")).compile().as_text()
    found = computations(text)
    assert {"scatter", "gather"} <= {i.op for _, _, i in reached(found, inner_body(found))}
    assert problems(text, large) == []


# --- by hand ------------------------------------------------------------------------------------------------


def by_hand(arrival, prompt, output, deadline, first=None, *, backoff=(), seqs=4, **limits) -> dict:
    """Requests on one engine whose iterations take a second each."""
    count = len(arrival)
    case = c.Case(np.array(arrival, float), np.array(prompt), np.array(output), np.array(output), np.zeros(count, int),
                  np.zeros((count, 2), np.float32),
                  dict(max_num_seqs=seqs, max_num_batched_tokens=64, watermark_blocks=0, num_blocks=40,
                       max_model_len=128), ((1.0, 0, 0, 0, 0),) * 3)
    flags, dims = simulator.preset("vllm-v1"), cc.dims_of("vllm-v1", 3)
    one = cc.ClientCase(case, np.array(deadline, float), np.array(first or [np.inf] * count, float), backoff, **limits)
    (lane,) = cc.simulate([replace(one, case=replace(case, router=len(c.MIXED) - 1))], flags, dims)
    return lane


def test_who_runs_leaves_as_the_iteration_ends():
    """One seat. The first gives up at 2.5, in its third iteration, which ends at 3; then the second has the seat."""
    lane = by_hand([0, 0], [8, 8], [10, 2], [2.5, 100], seqs=1)
    assert lane["status"].tolist() == ["timed_out", "finished"] and lane["ended_s"].tolist() == [2.5, 5.0]
    assert lane["scheduled_s"].tolist() == [0.0, 3.0] and lane["num_iterations"][0] == 5


def test_an_answer_at_the_deadline_is_one():
    """Three tokens at 1, 2 and 3 s."""
    assert by_hand([0], [8], [3], [3.0])["status"].tolist() == ["finished"]
    assert by_hand([0], [8], [3], [3.0 - 2.0**-20])["status"].tolist() == ["timed_out"]
    assert by_hand([0], [8], [3], [np.inf], [1.0])["status"].tolist() == ["finished"]
    assert by_hand([0], [8], [3], [np.inf], [1.0 - 2.0**-20])["status"].tolist() == ["timed_out"]


def test_who_is_sent_again_begins_anew():
    """Gives up at 1.5 while another has the only seat, comes again half a second later, and is served from 4 on."""
    lane = by_hand([0, 0.25], [8, 8], [4, 2], [100, 1.25], backoff=(0.5, 1.0), seqs=1)
    # Sent at 0.25, at 2 (until 3.25), at 4.25 (until 5.5): too late each time but the last, which needs 2 s.
    assert lane["sendings"].tolist() == [1, 3] and lane["status"].tolist() == ["finished", "timed_out"]
    assert lane["ended_s"].tolist() == [4.0, 5.5] and lane["scheduled_s"][1] == 4.25
    assert lane["first_token_s"][1] == 5.25


def test_refusals():
    """A queue of one, and a cluster of two."""
    lane = by_hand([0, 0.5, 0.5, 0.5], [8] * 4, [3] * 4, [100] * 4, seqs=1, max_waiting=1)
    assert lane["status"].tolist() == ["finished", "finished", "rejected", "rejected"]
    assert lane["instance"].tolist() == [0, 0, -1, -1] and lane["ended_s"][2] == 0.5
    lane = by_hand([0, 0.5, 0.5, 3.0], [8] * 4, [3] * 4, [100] * 4, seqs=1, max_outstanding=2)
    assert lane["status"].tolist() == ["finished", "finished", "rejected", "finished"]


def test_waits_beyond_an_epoch_of_the_clock():
    """Refused at half a second, and sent again a day later."""
    lane = by_hand([0, 0.5], [8, 8], [3, 3], [100, 100], backoff=(86_400.0,), max_outstanding=1)
    assert lane["sendings"].tolist() == [1, 2] and lane["ended_s"].tolist() == [3.0, 86_403.5]


def test_waits_are_on_the_grid_of_arrivals():
    """Two deadlines are rounded each by itself; backoffs grow by their factor."""
    waits = patience(np.array([1.0, np.inf, 2.0, np.inf]), np.array([0.3, 0.3, 2.0, np.inf]))
    third = round(0.3 * 2**20) * 2**10
    assert waits[0].tolist() == [0, third, 0, 2**30 - third]
    assert waits[1].tolist() == [0, third, 2**31 - 1, 0]
    assert waits[2].tolist() == [2, 0, -1, -1] and waits[3].tolist() == [2**31 - 1, 0, -1, -1]
    assert backoffs(3, 1.5, 2.0).tolist() == [[1, 2**29], [3, 0], [6, 0], [2**31 - 1, 0]]
    assert UNBOUNDED == 2**31 - 1 and clock.ARRIVAL_GRID_S == 2.0**-20


# --- from a scenario ----------------------------------------------------------------------------------------


def fields(**changes) -> dict:
    """A small system that is asked for more than it can do."""
    form = {"a": 0.01, "b": 1e-5, "c": 1e-7, "d": 1e-5}
    tree = {
        "schema_version": 1, "num_seeds": 2,
        "engine": {"preset": "vllm-v1@0.9", "max_num_seqs": 8, "max_num_batched_tokens": 256, "max_model_len": 512,
                   "num_gpu_blocks_override": 64},
        "workload": {"kind": "poisson", "rate_rps": 90, "num_requests": 100, "input": 100,
                     "output": {"kind": "uniform", "min_tokens": 1, "max_tokens": 40},
                     "client": {"deadline_s": 0.9, "first_token_deadline_s": 0.4, "retries": 1, "backoff_s": 0.25}},
        "cluster": {"admission": {"max_waiting": 20}},
        "cost": {"kind": "fitted", "prefill": form, "decode": form}}
    for dotted, value in changes.items():
        section, _, name = dotted.rpartition("__")
        (tree.setdefault(section, {}) if section else tree)[name] = value
    return tree


def test_a_scenario_says_how_requests_ended():
    """Shares are of all that arrived; what is not answered has no latency, and meets no limit."""
    result = simulate(Scenario.from_dict(fields(slo={"ttft_ms": 10_000})))
    frame, ends = result.requests, result.metrics[0]["outcomes"]
    counts = frame["status"].value_counts()
    assert set(counts.index) == {"finished", "timed_out", "rejected"} and counts.min() > 5
    assert ends["timed_out"] == counts["timed_out"] / 2
    for name, share in (("rejected_share", counts["rejected"] / 200), ("failed_share", 1 - counts["finished"] / 200),
                        ("mean_attempts", frame["attempts"].mean())):
        assert ends[name] == pytest.approx(share, rel=1e-12), name
    assert result.metrics[0]["slo"]["attainment"] == pytest.approx(counts["finished"] / 200, rel=1e-12)
    is_done = frame["status"] == "finished"
    assert frame["e2e_s"].notna().equals(is_done) and frame["attempts"].between(1, 2).all()
    # In time, from the last sending; earlier ones come to at most as much again and the backoff.
    assert (frame.loc[is_done & (frame["attempts"] == 1), "e2e_s"] <= 0.9).all()
    assert (frame.loc[is_done & (frame["attempts"] == 2), "e2e_s"] <= 0.9 + 0.25 + 0.9).all()
    assert (frame.loc[frame["status"] == "rejected", "instance"] == -1).all()


@pytest.mark.slow
def test_a_study_says_the_same():
    """All metrics of a run stand in a study's table, and requests with how they ended."""
    scenario = Scenario.from_dict(fields())
    (runs,), (rows, refused) = simulate(scenario).runs, runner.table([scenario])
    assert not refused and len(rows) == len(runs)
    for row, run in zip(rows.to_dict("records"), runs, strict=True):
        for name, value in flatten({"outcomes": run["outcomes"], "kv": run["kv"], "u": run["p99_e2el_ms"]}).items():
            assert row["p99_e2el_ms" if name == "u" else name] == pytest.approx(value), name
        assert (row["unstable"] == 1) == bool(run["unstable"])


def test_who_is_refused_at_the_very_start_is_rejected():
    """All come at once, to one engine at which three may wait: the others are sent again at once, and refused again."""
    scenario = Scenario.from_dict(fields(
        workload__kind="batch", workload__rate_rps=None, workload__client={"deadline_s": 9.0, "retries": 1},
        cluster={"admission": {"max_waiting": 3}}))
    (lanes,), (rows, _) = simulate(scenario).lanes, runner.table([scenario])
    for lane, row in zip(lanes, rows.to_dict("records"), strict=True):
        is_done = lane.status == FINISHED
        assert is_done.sum() == row["completed"] == 3 and np.all(lane.status[~is_done] == REJECTED)
        assert np.all(lane.ended_s[~is_done] == 0) and np.all(lane.attempts[~is_done] == 2)
        assert row["outcomes.rejected"] == 97 and row["outcomes.failed_share"] == 0.97


@pytest.mark.slow
def test_classes_wait_differently():
    """A tenant's own deadline goes before the common one."""
    tenants = [{"name": "hasty", "deadline_s": 0.01}, {"name": "patient", "deadline_s": 1e6}, {"name": "common"}]
    result = simulate(Scenario.from_dict(fields(
        workload__tenants=tenants, workload__client={"deadline_s": 0.9}, cluster={"replicas": 1})))
    status = result.requests.groupby("tenant")["status"].agg(lambda s: set(s))
    assert status["hasty"] == {"timed_out"} and status["patient"] == {"finished"}
    assert status["common"] == {"timed_out", "finished"}


@pytest.mark.parametrize("changes, field", [
    (dict(engine__preset="vllm-v0"), "engine.preset"),
    (dict(engine__scheduling_policy="priority"), "engine.scheduling_policy"),
    (dict(engine__enable_prefix_caching=True), "engine.enable_prefix_caching"),
    (dict(workload__kind="closed-loop", workload__concurrency=2, workload__rate_rps=None), "workload.kind"),
    (dict(workload__client={"retries": 2}, cluster={"replicas": 1}), "workload.client.retries"),
    (dict(workload__client={"deadline_s": 1.0, "backoff_s": 1.0}), "workload.client.backoff_s"),
    (dict(workload__client={"deadline_s": 1.0, "retries": 64, "backoff_s": 1.0, "backoff_factor": 2.0}),
     "workload.client.backoff_factor"),
    (dict(workload__client={"deadline_s": -1.0}), "workload.client.deadline_s"),
    (dict(cluster__admission={}), "cluster.admission"),
    (dict(cluster__admission={"max_outstanding": 0}), "cluster.admission.max_outstanding"),
    (dict(cost__front_end_s=0.6), "workload.client.first_token_deadline_s")])
def test_what_is_not_simulated_is_refused(changes, field):
    with pytest.raises(InputError) as error:
        simulate(Scenario.from_dict(fields(**changes)))
    assert error.value.field == field, error.value


def test_neither_derivatives_nor_environments():
    scenario = Scenario.from_dict(fields())
    for use in (functional.inputs, lambda s: Environment(s, 1.0)):
        with pytest.raises(InputError, match="without an answer"):
            use(scenario)
