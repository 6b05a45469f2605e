"""Instances that go down while requests migrate and instances come and go: the engine equals the reference bit for bit,
ties included, and no law is broken.

As in `test_failures`; outages begin and end as stages of migrations do, too.
"""

from collections import Counter
from dataclasses import replace

import jax
import numpy as np
import pytest

from jaxsim import simulate
from jaxsim.engine import loop
from jaxsim.policy.loads import Loads
from jaxsim.policy.scaling import Scaling
from jaxsim.study import runner
from tests.engine import cases as c
from tests.engine import client_cases as cc
from tests.engine import failure_cases as fc
from tests.engine import moving_failure_cases as mc
from tests.engine import test_migration_scenarios
from tests.engine.test_compiled import computations, inner_body, large_shapes, problems, reached
from tests.reference import simulator

pytestmark = pytest.mark.unoptimised

ALWAYS = ("finished", "failed", "lost as it ran", "lost as it waited", "lost ready", "lost stopped",
          "broken at its source", "broken at its source, stopped", "broken at its destination",
          "broken at its destination, to stop", "broken at its destination, stopped", "sent on and migrated",
          "migrated since", "migrations", "taken by another", "sent again", "preemptions", "preempted before",
          "given up: outage", "given up: finished", "given up: preempted", "given up: no_room")
SCALED = ("rejected", "no instance is up", "down while starting", "down while on", "down while draining",
          "down while off", "starts", "drains", "started as others were down")


def agree(seed: int, flags: simulator.Flags, dims, metric: str, choice: str) -> Counter:
    """All cases of a seed agree; else fails with the smallest case that does not."""
    batch = mc.draw_many(seed, flags, dims, metric, choice)

    def wrong(some, results):
        world = mc.simulate(some, flags, dims)
        return [mc.differences(mc.unpack(dims, world, lane, len(one)), mc.answer(result, one))
                for lane, (one, result) in enumerate(zip(some, results, strict=True))]

    return c.agree_and_count(seed, batch, lambda one: mc.reference(one, flags, dims), wrong, mc.exercised)


@pytest.mark.slow
@pytest.mark.parametrize("name, metric, choice, is_scaled", [
    ("vllm-v1", "remaining_steps", "shortest", False), ("vllm-v1", "freeness", "last_come", True),
    ("sarathi", "remaining_steps", "last_come", True)])
def test_engine_equals_reference(name, metric, choice, is_scaled):
    """192 cases, or 1,024."""
    flags = replace(simulator.preset(name), headroom_blocks=6 if is_scaled else 0)
    dims = mc.dims_of(name, has_scaling=is_scaled, has_urgent=is_scaled)
    seen = sum((agree(seed, flags, dims, metric, choice) for seed in c.seeds(3, of=16)), Counter())
    print(seen)
    assert all(seen[what] >= 3 for what in ALWAYS + (SCALED if is_scaled else ())), seen


@pytest.mark.slow
def test_routers_that_read_loads():
    """Without migration; nobody gives up."""
    flags, dims = simulator.preset("vllm-v1"), fc.dims_of("vllm-v1", 3, has_demands=True)
    batch = fc.draw_many(5, flags, dims, "freest")
    for one in batch:
        never = np.full(len(one), np.inf)
        one.clients = replace(one.clients, deadline_s=never, first_token_deadline_s=never, max_waiting=np.inf,
                              max_outstanding=np.inf)
    seen = Counter()
    for one, ours in zip(batch, fc.simulate(batch, flags, dims, "freest"), strict=True):
        result = fc.reference(one, flags, dims, "freest")
        assert fc.differences(ours, fc.answer(result, 3, one.clients.case.limits["num_blocks"])) == [], one
        seen.update(ours["instance"].tolist())
        seen["taken by another"] += int(ours["restarts"].sum())
    assert all(seen[what] > 10 for what in (0, 1, 2, "taken by another")), seen


@pytest.mark.slow
def test_the_loop_body_copies_nothing_large():
    """As of all programs (`test_compiled`)."""
    if jax.default_backend() != "cpu":
        pytest.skip("reads the text of a CPU program")
    flags, dims = simulator.preset("vllm-v1"), mc.dims_of("vllm-v1", has_scaling=True, has_urgent=True)
    large, small = large_shapes(dims, c.LANES)
    assert not large & small
    batch = mc.draw_many(0, flags, dims, "freeness", "last_come")
    text = loop.run.lower(dims, *mc.inputs(batch, flags, dims)).compile().as_text()
    found = computations(text)
    assert {"scatter", "gather"} <= {i.op for _, _, i in reached(found, inner_body(found))}
    assert problems(text, large) == []


# --- by hand ------------------------------------------------------------------------------------------------


def by_hand(outages) -> dict:
    """A request of eight prompt and three output tokens, on the first instance that is up, whose iterations take a
    second each. At the first look, at 2 s, it has two tokens and stops to migrate to the second instance: three blocks,
    of a second each."""
    case = c.Case(np.array([0.0]), np.array([8]), np.array([3]), np.array([3]), np.zeros(1, int),
                  np.zeros((1, 2), np.float32),
                  dict(max_num_seqs=4, max_num_batched_tokens=64, watermark_blocks=0, num_blocks=40,
                       max_model_len=128), ((1.0, 0, 0, 0, 0),) * 3, router=2)
    flags, dims = simulator.preset("vllm-v1"), mc.dims_of("vllm-v1")
    rules = simulator.Migration(polling_s=2.0, out_below=38.0, in_above=39.0, block_s=1.0)
    never = np.full(1, np.inf)
    one = mc.MovingCase(fc.FailureCase(cc.ClientCase(case, never, never, ()), tuple(outages), np.inf), rules, None)
    got = mc.unpack(dims, mc.simulate([one], flags, dims), 0, 1)
    return {name: got[name].tolist() for name in ("finish_s", "last_instance", "migrations", "restarts", "downtime_s",
                                                  "aborted")}


@pytest.mark.slow
def test_what_becomes_of_a_migration():
    """It is through at 5 s. Its destination goes down at 3.5 s: it goes on where it was. Its source does: it goes on
    where it was to go, with prompt and two tokens computed anew."""
    nothing = [0, 0, 0, 0, 0]
    moved = dict(finish_s=[6.0], last_instance=[1], migrations=[1], restarts=[0], downtime_s=[3.0], aborted=nothing)
    assert by_hand([]) == by_hand([(0, 5.5, 100.0)]) == moved
    stayed = dict(finish_s=[4.5], last_instance=[0], migrations=[0], restarts=[0], downtime_s=[1.5],
                  aborted=[0, 0, 0, 0, 1])
    assert by_hand([(1, 3.5, 100.0)]) == stayed
    assert by_hand([(0, 3.5, 100.0)]) == stayed | dict(last_instance=[1], restarts=[1])


def test_as_few_as_may_be():
    """Of three instances one at least: the first, which is on, is down. The second is off, and up."""
    rules = Scaling(np.float32(1), np.float32(0), np.float32(9), np.float32(0), np.int32(1), np.int32(3))
    zeros = np.zeros(3, np.int32)
    loads = Loads(zeros, np.full(3, 40, np.int32), zeros, zeros, zeros, zeros)

    def decided(is_up, is_starting):
        is_starting = np.array(is_starting)
        return [bool(x) for x in rules.decide(loads, np.array([True, False, False]), is_starting.sum(),
                                              np.array(is_up), (is_starting & is_up).sum())]

    assert decided([True, True, True], [False] * 3) == [False, False]
    assert decided([False, True, True], [False] * 3) == [True, False]
    # Enough start; or would, if that one were up.
    assert decided([False, True, True], [False, True, False]) == [False, False]
    assert decided([False, False, True], [False, True, False]) == [True, False]


@pytest.mark.slow
def test_instances_start_for_those_that_are_down():
    """One of three is on, goes down at 0.5 s for good, and nobody is there. At the look at 1 s the second starts and
    takes requests at 2 s: who comes at 1.5 s is refused, who comes at 2.5 s is served in three iterations."""
    case = c.Case(np.array([1.5, 2.5]), np.array([8, 8]), np.array([3, 3]), np.array([3, 3]), np.zeros(2, int),
                  np.zeros((2, 2), np.float32),
                  dict(max_num_seqs=4, max_num_batched_tokens=64, watermark_blocks=0, num_blocks=40,
                       max_model_len=128), ((1.0, 0, 0, 0, 0),) * 3, router=2)
    flags = replace(simulator.preset("vllm-v1"), headroom_blocks=6)
    dims = mc.dims_of("vllm-v1", has_scaling=True, has_urgent=True)
    never = np.full(2, np.inf)
    failing = fc.FailureCase(cc.ClientCase(case, never, never, ()), ((0, 0.5, 100.0),), np.inf)
    scaling = simulator.Scaling(check_s=1.0, out_below=1.0, in_above=1000.0, startup_s=1.0, fewest=1, most=3)
    one = mc.MovingCase(failing, simulator.Migration(polling_s=2.0, out_below=0.0, in_above=39.0), scaling)
    got, theirs = mc.unpack(dims, mc.simulate([one], flags, dims), 0, 2), mc.reference(one, flags, dims)
    assert mc.differences(got, mc.answer(theirs, one)) == []
    assert got["status"].tolist() == ["rejected", "finished"] and got["instance"].tolist() == [-1, 1]
    assert got["finish_s"][1] == 5.5 and (got["starts"], got["drains"]) == (1, 0)
    assert theirs.live.fleet.started_for_lack == 1


# --- from a scenario ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_scenario_says_what_was_lost_and_a_study_the_same():
    failing = {"mtbf_s": 15.0, "mttr_s": 4.0, "until_s": 40.0}
    made = test_migration_scenarios.scenario(
        test_migration_scenarios.MIGRATION | test_migration_scenarios.SCALING | {"failures": failing, "replicas": 4})
    result = simulate(made, record_steps=True)
    frame, (runs,) = result.requests, result.runs
    assert set(frame["status"]) <= {"finished", "failed", "rejected"}
    assert frame["last_instance"].between(-1, 3).all() and frame["migrations"].sum() > 0 < frame["restarts"].sum()
    rows, refused = runner.table([made])
    assert not refused and len(rows) == len(runs)
    for row, lane in zip(rows.to_dict("records"), result.lanes[0], strict=True):
        assert row["migrations.total"] == lane.migrations.sum()
        assert [row[f"migrations.aborted_{cause}"] for cause in mc.CAUSES] == lane.aborted_migrations.tolist()
        assert row["outages.lost"] == lane.losses.sum() > 0 and row["outages.rerouted"] == lane.restarts.sum()
        assert row["scaling.instance_s"] == lane.instance_s
        for instance in range(4):
            mine = lane.steps["instance"] == instance
            assert lane.steps["duration_s"][mine].sum() == pytest.approx(lane.busy_s[instance], rel=1e-5)
