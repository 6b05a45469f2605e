"""Instances that go down: the engine equals the reference bit for bit, ties included.

As in `test_deadlines`; outages begin and end as iterations end, requests arrive, clients give up and other instances go
down or come back.
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
from jaxsim.engine.lower.failures import outages_of_run
from jaxsim.policy import failures as policy
from jaxsim.study import runner
from tests.engine import cases as c
from tests.engine import client_cases as cc
from tests.engine import failure_cases as fc
from tests.engine.test_compiled import computations, inner_body, large_shapes, problems, reached
from tests.reference import simulator

pytestmark = pytest.mark.unoptimised

PROGRAMS = [pytest.param(name, n, id=f"{name}-{n}", marks=[] if (name, n) == ("vllm-v1", 3) else pytest.mark.slow)
            for name, n in (("vllm-v1", 3), ("vllm-v1-async", 3), ("vllm-v1", 1), ("vllm-v1-async", 1), ("vllm-v1", 8),
                            ("sarathi", 3))]

ALWAYS = ("finished", "timed_out", "rejected", "failed", "lost in a prompt", "lost as it decodes", "lost as it waits",
          "as an iteration ends", "within an iteration", "as a request arrives", "back and down at once",
          "no instance is up", "answered at last", "lost again", "a slot held for nobody")
SEVERAL = ("taken by another", "sent on too often", "two go down at once", "timed out elsewhere", "preempted before",
           "preempted elsewhere")


def exercised(case: fc.FailureCase, result: simulator.ReferenceResult) -> Counter:
    """How often what is hard happened."""
    seen, outages = Counter(r.status for r in result.requests), result.outages
    arrivals, begun = {r.arrival_s for r in result.requests}, Counter(start for _, start, _ in case.outages)
    for loss in outages.losses:
        final = result.requests[loss.request]
        is_last = final.sendings == loss.sending
        seen["lost in a prompt"] += loss.ran and loss.emitted == 0
        seen["lost as it decodes"] += loss.ran and loss.emitted > 0
        seen["lost as it waits"] += not loss.ran
        seen["preempted before"] += loss.preemptions > 0
        seen["preempted elsewhere"] += is_last and final.restarts > 0 and final.preemptions > loss.preemptions
        ends = outages.whole_ends.get(loss.instance, ())
        seen["as an iteration ends"] += loss.ran and loss.time_s in ends
        seen["within an iteration"] += loss.ran and loss.time_s not in ends
        seen["as a request arrives"] += loss.time_s in arrivals
        seen["two go down at once"] += begun[loss.time_s] > 1
        seen["sent on too often"] += not loss.is_sent_on and case.most_restarts > 0
        seen["answered at last"] += final.status == "finished" and not is_last
        seen["timed out elsewhere"] += is_last and final.status == "timed_out" and loss.is_sent_on
    spans = {(i, start) for i, start, _ in case.outages}
    seen["back and down at once"] += sum((i, end) in spans for i, _, end in case.outages)
    seen["no instance is up"] += outages.refused_all_down
    seen["lost again"] += sum(r.losses > 1 for r in result.requests)
    seen["taken by another"] += sum(r.restarts for r in result.requests if r.status == "finished")
    seen["a slot held for nobody"] += outages.num_given_up
    return seen


def agree(seed: int, flags: simulator.Flags, dims) -> Counter:
    """All cases of a seed agree; else fails with the smallest case that does not."""
    batch = fc.draw_many(seed, flags, dims)

    def wrong(some, results):
        answers = [fc.answer(result, dims.num_executors, one.clients.case.limits["num_blocks"])
                   for one, result in zip(some, results, strict=True)]
        return [fc.differences(ours, theirs) for ours, theirs in zip(fc.simulate(some, flags, dims), answers,
                                                                     strict=True)]

    return c.agree_and_count(seed, batch, lambda one: fc.reference(one, flags, dims), wrong, exercised)


@pytest.mark.parametrize("name, num_executors", PROGRAMS)
def test_engine_equals_reference(name, num_executors):
    """128 cases, or 512."""
    flags, dims = simulator.preset(name), fc.dims_of(name, num_executors)
    seen = sum((agree(seed, flags, dims) for seed in c.seeds(2, of=8)), Counter())
    hard = ALWAYS + (SEVERAL if num_executors == 3 else ())
    assert all(seen[what] >= 3 for what in hard), seen
    assert seen["finished"] > 150


@pytest.mark.slow
def test_jumps_change_nothing():
    """One iteration at a time gives what jumps give."""
    flags, dims = simulator.preset("vllm-v1"), fc.dims_of("vllm-v1", 3)
    batch = fc.draw_many(21, flags, dims)
    jumping, single = (fc.simulate(batch, flags, d) for d in (dims, replace(dims, max_jump=1)))
    for one, other in zip(jumping, single, strict=True):
        exact = {k: v for k, v in one.items() if k not in ("itl", "held_block_s", "steps")}
        assert cc.unequal(other, exact) == []
        assert one["itl"].sum() == other["itl"].sum()


@pytest.mark.slow
def test_outages_of_idle_instances_change_nothing():
    """Where nothing goes down while requests are there, every bit is as with clients alone."""
    flags, dims = simulator.preset("vllm-v1"), fc.dims_of("vllm-v1", 3)
    batch = cc.draw_many(3, flags, dims)
    calm = [fc.FailureCase(one, ((0, 2.0**20, 2.0**20 + 1),), np.inf) for one in batch]
    plain = cc.simulate(batch, flags, cc.dims_of("vllm-v1", 3))
    for one, other in zip(fc.simulate(calm, flags, dims), plain, strict=True):
        assert [k for k, v in other.items() if not np.array_equal(
            v, one[k], equal_nan=np.asarray(v).dtype.kind == "f")] == []
        assert not one["losses"].any() and not one["restarts"].any()


@pytest.mark.slow
def test_the_loop_body_copies_nothing_large():
    """As of all programs (`test_compiled`)."""
    if jax.default_backend() != "cpu":
        pytest.skip("reads the text of a CPU program")
    flags, dims = simulator.preset("vllm-v1"), fc.dims_of("vllm-v1", 3)
    large, small = large_shapes(dims, c.LANES)
    assert not large & small
    text = loop.run.lower(dims, *fc.inputs(fc.draw_many(0, flags, dims), flags, dims, "mixed")).compile().as_text()
    found = computations(text)
    assert {"scatter", "gather"} <= {i.op for _, _, i in reached(found, inner_body(found))}
    assert problems(text, large) == []


# --- by hand ------------------------------------------------------------------------------------------------


def by_hand(arrival, prompt, output, outages, *, deadline=None, restarts=np.inf, seqs=4, backoff=()) -> dict:
    """Requests on three instances whose iterations take a second each; the first that is up gets everything."""
    count = len(arrival)
    case = c.Case(np.array(arrival, float), np.array(prompt), np.array(output), np.array(output), np.zeros(count, int),
                  np.zeros((count, 2), np.float32),
                  dict(max_num_seqs=seqs, max_num_batched_tokens=64, watermark_blocks=0, num_blocks=40,
                       max_model_len=128), ((1.0, 0, 0, 0, 0),) * 3, router=len(c.MIXED) - 1)
    flags, dims = simulator.preset("vllm-v1"), fc.dims_of("vllm-v1", 3)
    one = cc.ClientCase(case, np.array(deadline or [np.inf] * count, float), np.full(count, np.inf), backoff)
    (lane,) = fc.simulate([fc.FailureCase(one, tuple(outages), restarts)], flags, dims)
    return lane


@pytest.mark.slow
def test_who_was_lost_goes_on_elsewhere():
    """Six tokens, at 1, 2, 3, ... s. At 2.5 the third is under way: its iteration begins again on the next instance at
    once, with prompt and two tokens as one prompt, and ends at 3.5."""
    lane = by_hand([0], [8], [6], [(0, 2.5, 100.0)])
    assert lane["finish_s"].tolist() == [6.5] and lane["first_token_s"].tolist() == [1.0]
    assert lane["instance"].tolist() == [1] and lane["restarts"].tolist() == [1] and lane["stalled_s"].tolist() == [0.0]
    # Two iterations and a lost one, four, none.
    assert lane["num_iterations"].tolist() == [3, 4, 0] and lane["busy_s"].tolist() == [2.5, 4.0, 0.0]


def test_an_iteration_that_ends_then_counts():
    """At 2.0 the second token is out, and nothing is lost but the KV."""
    lane = by_hand([0], [8], [6], [(0, 2.0, 100.0)])
    assert lane["finish_s"].tolist() == [6.0] and lane["num_iterations"].tolist() == [2, 4, 0]
    # The last token comes at that very instant.
    lane = by_hand([0], [8], [2], [(0, 2.0, 100.0)])
    assert lane["finish_s"].tolist() == [2.0] and lane["losses"].tolist() == [0]


def test_an_instance_comes_back_empty():
    """Who comes as it comes back is served there."""
    lane = by_hand([0, 3.0, 4.0], [8] * 3, [10, 2, 2], [(0, 2.5, 4.0)])
    assert lane["instance"].tolist() == [1, 1, 0] and lane["scheduled_s"].tolist() == [0.0, 3.5, 4.0]


def test_who_waits_is_lost_too():
    """One seat: the second waits, and is first at the next instance by its number, as both come at once."""
    lane = by_hand([0, 0.5], [8, 8], [2, 2], [(0, 0.75, 100.0)], seqs=1)
    assert lane["scheduled_s"].tolist() == [0.0, 2.75] and lane["finish_s"].tolist() == [2.75, 4.75]
    assert lane["preemptions"].tolist() == [0, 0] and lane["losses"].tolist() == [1, 1]


def test_nowhere_to_go():
    """All are down: who comes is refused, who was lost has failed, and is sent again if its client does."""
    down = [(i, 1.5, 3.0) for i in range(3)]
    lane = by_hand([0, 2.0], [8, 8], [4, 4], down)
    assert lane["status"].tolist() == ["failed", "rejected"] and lane["ended_s"].tolist() == [1.5, 2.0]
    lane = by_hand([0], [8], [4], down, backoff=(2.0,))
    assert lane["status"].tolist() == ["finished"] and lane["sendings"].tolist() == [2]
    assert lane["finish_s"].tolist() == [7.5] and lane["first_token_s"].tolist() == [4.5]


def test_a_bound_of_restarts():
    """The second outage is one too many; without any bound the third instance serves it."""
    twice = [(0, 1.5, 100.0), (1, 2.0, 100.0)]
    lane = by_hand([0], [8], [4], twice, restarts=1.0)
    assert lane["status"].tolist() == ["failed"] and lane["restarts"].tolist() == [1] and lane["losses"][0] == 2
    assert by_hand([0], [8], [4], twice)["finish_s"].tolist() == [5.0]


def test_a_deadline_stays():
    """The client waits from its own sending on, wherever its request is."""
    lane = by_hand([0, 0], [8, 8], [5, 5], [(0, 2.5, 100.0)], deadline=[5.0, 5.5])
    assert lane["status"].tolist() == ["timed_out", "finished"] and lane["ended_s"].tolist() == [5.0, 5.5]


def test_outages_beyond_an_epoch_of_the_clock():
    """A day later an instance is down for an hour."""
    lane = by_hand([0, 86_400.0], [8, 8], [3, 3], [(0, 86_401.5, 90_000.0)])
    assert lane["ended_s"].tolist() == [3.0, 86_403.5] and lane["restarts"].tolist() == [0, 1]


def test_tables_of_outages():
    """In the order of time, who comes back before who goes down; the way back; overlaps are one."""
    given = [policy.Outage(1, 2.0, 3.0), policy.Outage(0, 3.0, 5.0), policy.Outage(1, 7.0, 8.0)]
    table = policy.failures(given, 16, 3)
    assert table.instance[:6].tolist() == [1, 1, 0, 0, 1, 1]
    assert table.is_back[:6].tolist() == [False, True, False, True, False, True] and np.isinf(table.times[6:, 1]).all()
    assert policy.outages_of(table) == sorted(given)
    many = [policy.Outage(0, 1.0, 2.0), policy.Outage(0, 2.0, 2.5), policy.Outage(1, 2.0, 3.0),
            policy.Outage(0, 2.25, 2.375)]
    assert policy.merged(many) == [policy.Outage(0, 1.0, 2.5), policy.Outage(1, 2.0, 3.0)]
    assert policy.down_seconds(given, 3, 4.0).tolist() == [1.0, 1.0, 0.0]
    with pytest.raises(ValueError, match="do not fit"):
        policy.failures(given, 6, 3)


# --- from a scenario ----------------------------------------------------------------------------------------


def fields(**changes) -> dict:
    """Two small engines that fail every half a second."""
    form = {"a": 0.01, "b": 1e-5, "c": 1e-7, "d": 1e-5}
    tree = {
        "schema_version": 1, "num_seeds": 2,
        "engine": {"preset": "vllm-v1@0.9", "max_num_seqs": 8, "max_num_batched_tokens": 256, "max_model_len": 512,
                   "num_gpu_blocks_override": 64},
        "workload": {"kind": "poisson", "rate_rps": 90, "num_requests": 100, "input": 100,
                     "output": {"kind": "uniform", "min_tokens": 1, "max_tokens": 40}},
        "cluster": {"replicas": 2, "failures": {"mtbf_s": 0.5, "mttr_s": 0.2, "until_s": 1.5}},
        "cost": {"kind": "fitted", "prefill": form, "decode": form}}
    for dotted, value in changes.items():
        *sections, name = dotted.split("__")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
        node[name] = value
    return tree


@pytest.mark.slow
def test_a_scenario_says_what_was_lost_and_a_study_the_same():
    scenario = Scenario.from_dict(fields())
    result = simulate(scenario, record_steps=True)
    frame = result.requests
    status = frame["status"].value_counts()
    assert set(status.index) == {"finished", "rejected", "failed"} and status.min() > 5
    group = result.metrics[0]["outages"]
    assert group["failed"] == status["failed"] / 2 and group["rerouted"] == frame["restarts"].sum() / 2
    assert group["lost"] >= group["rerouted"] + group["failed"] and 0.05 < group["down_share"] < 0.6
    assert frame.loc[frame["status"] == "finished", "e2e_s"].notna().all()
    (runs,), (rows, refused) = result.runs, runner.table([scenario])
    assert not refused and len(rows) == len(runs)
    for row, lane in zip(rows.to_dict("records"), result.lanes[0], strict=True):
        assert row["outages.lost"] == lane.losses.sum() and row["outages.rerouted"] == lane.restarts.sum()
        assert row["outages.number"] == lane.num_outages > 0
        span = np.nanmax(lane.ended_s)
        assert row["outages.down_share"] == pytest.approx(lane.down_s.mean() / span, rel=1e-12)
        assert row["preemptions.total"] == lane.preemptions.sum()
        # The tape adds up, lost iterations cut off where they were.
        for instance in range(2):
            mine = lane.steps["instance"] == instance
            assert lane.steps["duration_s"][mine].sum() == pytest.approx(lane.busy_s[instance], rel=1e-5)


def test_drawn_outages_are_exponential():
    """Up and down for their means, from the seed alone; given ones come on top."""
    given = Scenario.from_dict(fields(cluster__failures={
        "mtbf_s": 30.0, "mttr_s": 10.0, "until_s": 2e4, "outages": [{"instance": 0, "at_s": 1e5, "down_s": 5.0}]}))
    section = given.cluster.failures
    first, again, other = (outages_of_run(section, 2, seed) for seed in (1, 1, 2))
    assert first == again != other and policy.Outage(0, 1e5, 1e5 + 5.0) in first
    for instance in range(2):
        spans = np.array([(o.start_s, o.end_s) for o in first if o.instance == instance and o.start_s < 2e4])
        down, up = spans[:, 1] - spans[:, 0], spans[1:, 0] - spans[:-1, 1]
        assert len(spans) > 400 and np.all(up > 0)
        # Within four standard errors of the means; an exponential deviates by as much as its mean.
        for draws, mean in ((down, 10.0), (up, 30.0)):
            assert abs(draws.mean() - mean) < 4 * mean / len(draws) ** 0.5
            assert abs(draws.std() - mean) < 8 * mean / len(draws) ** 0.5


@pytest.mark.parametrize("changes, field", [
    (dict(cluster__failures={}), "cluster.failures"),
    (dict(cluster__failures={"mtbf_s": 10.0, "until_s": 5.0}), "cluster.failures.mttr_s"),
    (dict(cluster__failures={"mtbf_s": 1e-3, "mttr_s": 1e-3, "until_s": 1e3}), "cluster.failures.mtbf_s"),
    (dict(cluster__failures__max_restarts=2, cluster__failures__on_failure="fail"), "cluster.failures.max_restarts"),
    (dict(cluster__failures={"outages": [{"instance": 2, "at_s": 1, "down_s": 1}]}),
     "cluster.failures.outages[0].instance"),
    (dict(cluster__failures={"outages": [{"instance": 1, "at_s": 1, "down_s": 2},
                                         {"instance": 1, "at_s": 2, "down_s": 2}]}),
     "cluster.failures.outages[1].at_s"),
    (dict(cluster__failures={"on_failure": "wait", "mtbf_s": 1.0}), "cluster.failures.on_failure"),
    (dict(cluster__migration={}, workload__client={"deadline_s": 1.0}), "workload.client"),
    (dict(cluster__migration={}, cluster__admission={"max_waiting": 1}), "cluster.admission"),
    (dict(cluster__router="jaxsim.policy.routing.LlumnixLoad", cluster__admission={"max_waiting": 1}),
     "cluster.admission"),
    (dict(engine__preset="vllm-v0"), "engine.preset"),
    (dict(engine__preset="orca"), "engine.preset"),
    (dict(engine__enable_prefix_caching=True), "engine.enable_prefix_caching"),
    (dict(engine__scheduling_policy="priority"), "engine.scheduling_policy"),
    (dict(engine__pipeline_parallel_size=2), "engine.pipeline_parallel_size"),
    (dict(engine__data_parallel_size=2), "engine.data_parallel_size"),
    (dict(workload__kind="closed-loop", workload__concurrency=2, workload__rate_rps=None), "workload.kind"),
    (dict(cluster__pools=[{"role": "mixed"}, {"role": "mixed"}], cluster__replicas=1), "cluster.pools")])
def test_what_is_not_simulated_is_refused(changes, field):
    with pytest.raises(InputError) as error:
        simulate(Scenario.from_dict(fields(**changes)))
    assert error.value.field == field, error.value


def test_neither_derivatives_nor_environments():
    scenario = Scenario.from_dict(fields())
    for use in (functional.inputs, lambda s: Environment(s, 1.0)):
        with pytest.raises(InputError, match="without an answer"):
            use(scenario)
