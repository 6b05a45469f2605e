"""Freeness and live migration against the reference, bit for bit, ties included."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from jaxsim.engine import loop
from jaxsim.kernels import clock
from jaxsim.policy import routing
from jaxsim.policy.loads import Loads, freeness, remaining_steps, remaining_steps_to_migrate
from jaxsim.policy.migration import CHOICES, METRICS, Migration
from jaxsim.policy.scaling import Scaling
from jaxsim.state.control import OFF
from tests.engine import cases as c
from tests.reference import simulator

pytestmark = pytest.mark.unoptimised

EXECUTORS = 4


def draw_rules(rng: np.random.Generator, metric: str, choice: str) -> simulator.Migration:
    """Thresholds that a crowded cluster meets, copies from quick to hopeless."""
    out_below = float(rng.choice([1.0, 3.0, 6.0]))
    return simulator.Migration(
        polling_s=2.0 ** -int(rng.integers(0, 6)), out_below=out_below,
        in_above=out_below * float(rng.choice([0.25, 1.0, 1.0, 2.0])), max_stages=int(rng.choice([1, 2, 3, 8])),
        last_stage_blocks=int(rng.choice([1, 1, 2, 16])), block_s=2.0 ** -int(rng.integers(2, 10)),
        latency_s=float(rng.choice([0.0, 2.0**-7])), metric=metric, choice=choice)


def params_of(case: c.Case, rules: simulator.Migration, flags: simulator.Flags):
    """What the engine is told of a case with migration."""
    i, x = np.int32, np.float32
    return replace(c.make_params(case, flags, "freest"), migration=Migration(
        x(rules.polling_s), x(rules.out_below), x(rules.in_above), i(rules.max_stages), i(rules.last_stage_blocks),
        x(rules.block_s), x(rules.latency_s), metric=rules.metric, choice=rules.choice))


def draw_scaling(rng: np.random.Generator) -> simulator.Scaling:
    """Bands that a cluster of few requests leaves on both sides."""
    fewest, out_below = int(rng.integers(1, EXECUTORS)), float(rng.choice([1.0, 3.0, 6.0]))
    return simulator.Scaling(
        check_s=2.0 ** -int(rng.integers(0, 4)), out_below=out_below,
        in_above=out_below * float(rng.choice([1.0, 4.0])),
        startup_s=float(rng.choice([0.0, 0.5, 2.0])), fewest=fewest, most=int(rng.integers(fewest, EXECUTORS + 1)))


def with_scaling(params, rules: simulator.Scaling, headroom_blocks: int):
    """The same, scaled, with room for urgent requests."""
    i, x = np.int32, np.float32
    return replace(params, headroom_blocks=i(headroom_blocks), scaling=Scaling(
        x(rules.check_s), x(rules.out_below), x(rules.in_above), x(rules.startup_s), i(rules.fewest), i(rules.most)))


def draw(seed: int, flags: simulator.Flags, dims, metric: str, choice: str):
    rng = np.random.default_rng(seed)
    return [(case, draw_rules(rng, metric, choice)) for case in c.draw_many(seed, flags, dims)]


def compare(drawn, flags, dims, scalings=None, headroom_blocks: int = 0) -> dict[str, int]:
    """Bit for bit; returns what the cases had in them. scalings: of the cases, with urgent requests."""
    if scalings is not None:
        flags = replace(flags, headroom_blocks=headroom_blocks)
        drawn = [(replace(case, priority=case.priority - 1), rules) for case, rules in drawn]
    seen = dict(cases=0, preemptions=0, migrations=0, started=0, stages=0, jumps=0, put_back=0, twice=0,
                **dict.fromkeys(("finished", "preempted", "no_room", "too_many_stages", "outage"), 0))
    seen |= dict(starts=0, drains=0, drained=0)
    params = [params_of(case, rules, flags) for case, rules in drawn]
    if scalings is not None:
        params = [with_scaling(one, own, headroom_blocks) for one, own in zip(params, scalings, strict=True)]
    params = c.stack(params)
    _, requests = c.inputs([case for case, _ in drawn], flags, dims, "freest")
    world = jax.device_get(loop.run(dims, params, requests))
    for lane, (case, rules) in enumerate(drawn):
        name = f"lane {lane} {rules}"
        try:
            result = c.reference(case, flags, dims, "freest", migration=rules, scaling=scalings and scalings[lane])
        except ValueError:
            assert world.fault[lane], f"{name}: served, which the reference says it cannot be"
            continue
        got, live = c.unpack(dims, world, lane, len(case)), result.live
        c.compare_requests(got, result, name)
        moved = world.moved[lane, :len(case)]
        none = type("None", (), dict(migrations=0, downtime=0, instance=None))
        theirs = [live.moved.get(i, none) for i in range(len(case))]
        ends = [own.instance if own.instance is not None else r.instance
                for own, r in zip(theirs, result.requests, strict=True)]
        np.testing.assert_array_equal(moved[:, 0], [m.migrations for m in theirs], err_msg=name)
        np.testing.assert_array_equal(got["instance"] + moved[:, 1], ends, err_msg=name)
        np.testing.assert_array_equal(clock.from_integers_reference(moved[:, 2:]),
                                      [m.downtime / 2**30 for m in theirs], err_msg=name)
        ours = world.control.aborted[lane]
        np.testing.assert_array_equal(ours, [live.aborted[k] for k in (
            "finished", "preempted", "no_room", "too_many_stages", "outage")], err_msg=name)
        assert world.control.started[lane] == live.started, name
        for instance in range(EXECUTORS):
            mine = [r for r in result.iterations if r.instance == instance]
            assert got["num_iterations"][instance] == len(mine), name
            assert got["busy_s"][instance] == sum(r.duration_s for r in mine), name
        counts = c.w.count_rows(dims).everything(world.counts[lane])
        assert np.array_equal(got["used_blocks"], counts.rank.held_blocks[:, 0]), name
        for count in (counts.rank.waiting_blocks, counts.rank.killed, counts.rank.kept_blocks):
            assert not count.any(), name
        assert np.sum(got["running_s"]) == np.sum(got["finish_s"] - got["scheduled_s"] - got["stalled_s"]), name
        if scalings is not None:
            fleet, own = live.fleet, jax.tree.map(lambda leaf, lane=lane: leaf[lane], world.control.fleet)
            assert (own.starts, own.drains) == (fleet.starts, fleet.drains), name
            is_open = own.status != OFF
            end = got["finish_s"].max()
            used_s = clock.from_integers_reference(own.used) + is_open.sum() * end
            assert used_s == fleet.used_until(end * 2**30) / 2**30, name
            for key in ("starts", "drains", "drained"):
                seen[key] += getattr(fleet, key)
        seen["cases"] += 1
        seen["preemptions"] += int(got["preemptions"].sum())
        seen["migrations"] += int(moved[:, 0].sum())
        seen["twice"] += int((moved[:, 0] > 1).sum())
        seen["started"] += live.started
        seen["stages"] += live.num_stages
        seen["put_back"] += live.refused_at_last
        seen["jumps"] += max(len(result.iterations) - got["steps"], 0)
        for cause, number in live.aborted.items():
            seen[cause] += number
    return seen


@pytest.mark.parametrize("name, metric, choice", [
    ("vllm-v1", *METRICS[:1], *CHOICES[1:]),
    pytest.param("vllm-v1", *METRICS[:1], *CHOICES[:1], marks=pytest.mark.slow),
    pytest.param("vllm-v1", *METRICS[1:], *CHOICES[1:], marks=pytest.mark.slow),
    pytest.param("sarathi", *METRICS[:1], *CHOICES[:1], marks=pytest.mark.slow)])
def test_engine_equals_reference(name, metric, choice):
    flags = simulator.preset(name)
    dims = c.dims_of(name, EXECUTORS, has_migration=True, has_demands=True)
    seen = dict()
    for seed in (1, 2, 3):
        for key, value in compare(draw(seed, flags, dims, metric, choice), flags, dims).items():
            seen[key] = seen.get(key, 0) + value
    assert seen["cases"] > 80 and seen["migrations"] > 50 and seen["preemptions"] > 5 and seen["jumps"] > 10, seen
    assert all(seen[cause] > 0 for cause in ("finished", "preempted", "no_room", "too_many_stages", "twice")), seen


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=pytest.mark.slow) for name in ("vllm-v1", "vllm-v1-priority-tail")])
def test_scaling_and_urgent_requests_equal_the_reference(name):
    """Instances come and go, urgent requests have room kept for them, migrate last, and overtake others in the queue
    where this is sorted."""
    flags = simulator.preset(name)
    dims = c.dims_of(name, EXECUTORS, has_migration=True, has_demands=True, has_scaling=True, has_urgent=True)
    rng = np.random.default_rng(3)
    drawn = draw(3, flags, dims, "freeness", "shortest")
    seen = compare(drawn, flags, dims, [draw_scaling(rng) for _ in drawn], headroom_blocks=6)
    assert seen["cases"] > 40 and seen["starts"] > 20 and seen["drained"] > 10 and seen["migrations"] > 50, seen


def test_routers_that_read_loads():
    """Without migration; in crowds of three."""
    flags, dims = simulator.preset("vllm-v1"), c.dims_of("vllm-v1", 3, has_demands=True)
    batch, places = c.draw_many(5, flags, dims), set()
    for case, lane in zip(batch, c.simulate(batch, flags, dims, "freest", lanes=c.LANES), strict=True):
        try:
            result = c.reference(case, flags, dims, "freest")
        except ValueError:
            assert lane["fault"], "served, which the reference says it cannot be"
            continue
        c.compare_requests(lane, result, "freest")
        places.update(lane["instance"].tolist())
    assert places == {0, 1, 2}


@pytest.mark.parametrize("uniform, is_active, chosen", [
    (0.0, None, 1), (0.49, None, 1), (0.5, None, 3), (0.99, None, 3), (0.0, [True, False, True, True], 3),
    (0.9, [True, False, True, True], 0), (0.9, [False, False, True, False], 2)])
def test_one_of_the_freest_at_random(uniform, is_active, chosen):
    """Steps of 4, 9, 1 and 8 blocks a request; the two freest that take requests."""
    loads = Loads(*map(np.array, ([2, 1, 9, 2], [10, 10, 10, 10], [1, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0],
                                  [0, 0, 0, 0])))
    view = routing.View(np.zeros(4, np.int32), None, None, None, np.int32(0), np.float32([uniform, 0.0]),
                        is_active=None if is_active is None else np.array(is_active), loads=loads)
    assert int(routing.RemainingSteps(top_k=2).choose(view)) == chosen


def test_rules_of_thumb():
    """The paper's freeness counts the head alone, the code's for dispatch all that wait; an empty instance is M / 1 or
    the freest of all."""
    loads = Loads(*map(np.array, ([4, 0], [20, 20], [2, 0], [2, 0], [10, 0], [3, 0])), np.array([5, 0]))
    assert freeness(loads).tolist() == [(20 - 4 - 3 - 5) / 2, 20]
    assert remaining_steps(loads).tolist() == [(20 - 4 - 10) / 4, np.inf]
    assert remaining_steps_to_migrate(loads).tolist() == [pytest.approx((20 - 4 - 3) / 3), np.inf]
