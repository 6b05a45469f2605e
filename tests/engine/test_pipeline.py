"""Pipeline stages against the reference, which sends every batch through the stages one iteration at a time."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from jaxsim import Environment, functional
from jaxsim._core.errors import InputError
from jaxsim.cost.base import BatchStats
from jaxsim.cost.roofline import roofline
from jaxsim.engine import loop
from jaxsim.engine.simulate import simulate
from jaxsim.spec.device import load_device
from jaxsim.spec.model import load_model
from jaxsim.spec.plan import Plan
from jaxsim.spec.scenario import Scenario
from jaxsim.state import world as w
from jaxsim.workload.workload import Workload
from tests.engine import cases as c
from tests.engine import real, test_prefix
from tests.engine.test_lockstep import has_whole_twins
from tests.engine.test_real_costs import AGREES_S, NEAR_S
from tests.reference import simulator

pytestmark = pytest.mark.unoptimised

STAGES = 4


def pipeline(name: str, **changes) -> simulator.Flags:
    """A preset with so many stages that quarters of dyadic seconds are dyadic."""
    return replace(simulator.preset(name), stages=STAGES, **changes)


def dims_of(name: str, executors: int, **changes):
    """Sizes that tests here share."""
    return c.dims_of(name, executors, num_stages=STAGES, num_batches=STAGES, **changes)


def draw(seed: int, flags: simulator.Flags, dims) -> list[c.Case]:
    """Cases of which some have batches that are full before the rank is."""
    rng = np.random.default_rng(seed)
    cases = c.draw_many(seed, flags, dims)
    if flags.max_batch_seqs == simulator.UNLIMITED:
        return cases
    return [replace(case, limits=case.limits | dict(
        max_batch_seqs=int(rng.integers(1, case.limits["max_num_seqs"] + 1)))) for case in cases]


def compare(batch, flags, dims, router: str) -> dict[str, int]:
    """Bit for bit; returns what the cases had in them."""
    seen = dict(cases=0, preemptions=0, overlapping=0, jumps=0, undisturbed=0)
    padded = batch + batch[:1] * (c.LANES - len(batch))
    world = jax.device_get(loop.run(dims, *c.inputs(padded, flags, dims, router)))
    alone = w.clock_rows(dims).everything(world.clocks).executor.alone
    for lane, case in enumerate(batch):
        try:
            result = c.reference(case, flags, dims, router)
        except ValueError:
            continue
        got = c.unpack(dims, world, lane, len(case))
        c.compare_requests(got, result, f"lane {lane}")
        price = c.dyadic_cost(case)
        for instance in range(dims.num_executors):
            mine = [r for r in result.iterations if r.instance == instance]
            assert got["num_iterations"][instance] == len(mine)
            busy, until = 0.0, -np.inf
            for record in mine:
                seen["overlapping"] += record.start_s < until
                busy += max(record.end_s - max(record.start_s, until), 0.0)
                until = max(until, record.end_s)
            assert got["busy_s"][instance] == busy
            assert alone.hi[lane, instance] + float(alone.lo[lane, instance]) == sum(price(r.stats) for r in mine)
        if not got["preemptions"].any():
            # Who runs does so from the pass that schedules it to its last token.
            running = np.bincount(got["instance"], got["finish_s"] - got["scheduled_s"], dims.num_executors)
            assert np.allclose(got["running_s"], running, rtol=1e-6)
            seen["undisturbed"] += 1
        seen["cases"] += 1
        seen["preemptions"] += int(got["preemptions"].sum())
        seen["jumps"] += len(result.iterations) - got["steps"]
    return seen


@pytest.mark.parametrize("name, executors, changes, preemptions", [
    ("vllm-v1", 2, {}, 5), ("sarathi", 1, dict(pass_on_arrival=True, max_batch_seqs=8), 5),
    ("orca", 1, dict(pass_on_arrival=True), -1)])
def test_engine_equals_reference(name, executors, changes, preemptions):
    """Batches overlap in the stages, prompts are spread over several, blocks run short."""
    flags, dims = pipeline(name, **changes), dims_of(name, executors)
    seen = compare(draw(5, flags, dims), flags, dims, "round_robin")
    assert seen["cases"] > 40 and seen["preemptions"] > preemptions and seen["overlapping"] > 500, seen
    assert seen["undisturbed"] > 3, seen


@pytest.mark.slow
def test_with_prefix_caching():
    """What is cached of a prompt is found by every batch."""
    flags = pipeline("vllm-v1", prefix_caching=True)
    dims = dims_of("vllm-v1", 1, **test_prefix.SIZES)
    # Second copies of a block, which identical prompts of whole blocks make, are what the engine does not follow.
    batch = [case for case in test_prefix.draw(1, flags, dims) if not has_whole_twins(case, dims)]
    seen = compare(batch, flags, dims, "round_robin")
    assert seen["cases"] > 40 and seen["preemptions"] > 5, seen


@pytest.mark.slow
def test_long_runs():
    """Outputs of thousands of tokens, of one batch alone and of several: epochs move, counters are wound back."""
    flags, dims = pipeline("sarathi", pass_on_arrival=True), dims_of("sarathi", 1)
    rng = np.random.default_rng(3)
    cases = [c.draw_long(rng, flags, dims) for _ in range(3)]
    cases = [replace(case, limits=case.limits | dict(num_blocks=2 * case.limits["num_blocks"])) for case in cases]
    seen = compare(cases, flags, dims, "round_robin")
    assert seen["cases"] == 3 and seen["jumps"] > 1000 and seen["overlapping"] > 1000, seen


@pytest.mark.slow
def test_real_costs():
    """A last stage with the LM head, a host, an engine that forms one batch at a time: as far as no arrival is near the
    end of an iteration, like the reference in float64."""
    flags = pipeline("vllm-v1")
    dims = replace(real.DIMS, num_stages=STAGES, num_batches=STAGES)
    batch = real.draw_batch(4, real.tables(STAGES), 16)
    compared = total = 0
    for case, lane in zip(batch, c.simulate(batch, flags, dims, real.ROUTER), strict=True):
        result = c.reference(case, flags, dims, real.ROUTER, real.exact_cost(case.cost),
                             stage_cost=real.exact_stage_cost(case.cost))
        assert lane["fault"] == 0 and lane["finished"] == len(case)
        for name in ("scheduled_s", "first_token_s", "finish_s"):
            want = np.array([getattr(request, name) for request in result.requests])
            is_reliable = want < result.unreliable_from_s(NEAR_S)
            assert np.all(np.abs(lane[name] - want)[is_reliable] < AGREES_S), name
            compared, total = compared + is_reliable.sum(), total + len(want)
    assert compared > 0.5 * total


# ---- what a user sees


def scenario(stages: int, **engine) -> Scenario:
    return Scenario.from_dict({
        "schema_version": 1, "num_seeds": 1, "model": {"name": "llama-3.1-8b"}, "device": {"name": "h100"},
        "engine": {"preset": "vllm-v1@0.15", "pipeline_parallel_size": stages, "max_num_seqs": 16,
                   "max_model_len": 4096} | engine, "workload": {"kind": "batch"}})


def test_a_lone_batch_goes_through_all_stages():
    """Sequences that come together stay in one batch: TPOT is what the roofline explains for all stages."""
    run = scenario(STAGES)
    work = Workload(np.zeros(8), np.full(8, 200), np.full(8, 300))
    lane = simulate(run, workload=work).lanes[0][0]
    plan = Plan(pipeline_parallel_size=STAGES)
    cost = roofline(load_model("llama-3.1-8b"), load_device("h100"), plan, host="vllm-v1")
    explained = np.mean([float(cost.explain(BatchStats.of(8, 8 * (200 + token))).seconds) for token in (1, 150, 299)])
    assert np.mean((lane.finish_s - lane.first_token_s) / 299) == pytest.approx(explained, rel=0.01)
    alone = roofline(load_model("llama-3.1-8b"), load_device("h100"), host="vllm-v1")
    assert explained > float(alone.explain(BatchStats.of(8, 8 * 350)).seconds)


def test_stages_sum_to_the_iteration():
    cost = roofline(load_model("llama-3.1-8b"), load_device("h100"), Plan(pipeline_parallel_size=3)).tabulate(2048, 64)
    for stats in (BatchStats.of(8, 8 * 1000), BatchStats.of(0, 0, 2, 1000, 1000, 5e5),
                  BatchStats.of(5, 500, 1, 99, 99, 99.0)):
        parts = cost.stage_seconds(stats, 3)
        assert float(parts.sum()) == pytest.approx(float(cost.iteration(stats)), rel=1e-6)
        # 10, 11 and 11 layers would be vLLM's 11, 11 and 10: the last has the LM head.
        assert float(parts[1]) == pytest.approx(float(parts[2]), rel=1e-6) and float(parts[3]) != float(parts[2])
    pace = cost.decode(np.int32(8), np.int32(8000))
    assert float(pace.first_s) == pytest.approx(float(cost.iteration(BatchStats.of(8, 8000))), rel=1e-6)


@pytest.mark.slow
def test_prompts_fill_the_stages():
    """Chunks of one prompt follow each other: each enters a stage when it has left the one before, and the chunk before
    has left this one."""
    tokens, budget = 4000, 256
    work = Workload(np.array([0.0] + [100.0] * 7), np.array([tokens] + [200] * 7), np.full(8, 2))
    lane = simulate(scenario(STAGES, max_num_batched_tokens=budget), workload=work).lanes[0][0]
    cost = roofline(load_model("llama-3.1-8b"), load_device("h100"), Plan(pipeline_parallel_size=STAGES)).tabulate(
        budget, 64)
    free, whole = np.zeros(STAGES + 1), 0.0
    for done in range(0, tokens, budget):
        end = min(done + budget, tokens)
        parts = np.asarray(cost.stage_seconds(BatchStats.of(
            0, 0, 1, end - done, end, float(end ** 2 - done ** 2), num_sampled=end == tokens), STAGES))
        left = 0.0
        for stage, seconds in enumerate(parts):
            left = free[stage] = max(left, free[stage]) + seconds
        whole += parts.sum()
    assert lane.first_token_s[0] == pytest.approx(free[-1], rel=1e-3)
    assert free[-1] < 0.5 * whole


@pytest.mark.parametrize("engine, field, remedy", [
    ({"preset": "sglang"}, "engine.pipeline_parallel_size", "vllm-v1"),
    ({"async_scheduling": True}, "engine.async_scheduling", "leave it out"),
    ({"scheduling_policy": "priority", "preset": "vllm-v1@0.9"}, "engine.scheduling_policy", "or one stage"),
    ({"pipeline_parallel_size": 64}, "engine.pipeline_parallel_size", "fewer stages")])
def test_refused(engine, field, remedy):
    with pytest.raises(InputError) as error:
        simulate(scenario(2, **engine))
    assert error.value.field == field and remedy in str(error.value)


def test_the_tape_keeps_every_batch():
    """Of few requests that run for long, in two batches that overlap all the time."""
    workload = {"kind": "batch", "num_requests": 4, "input": 2000, "output": 1500}
    run = Scenario.from_dict(scenario(2, max_num_batched_tokens=2048).to_dict() | {"workload": workload})
    lane = simulate(run, record_steps=True).lanes[0][0]
    assert lane.lost_steps == 0 and len(lane.steps["iterations"]) > 2000


def test_tapes_and_environments_are_refused():
    with pytest.raises(InputError, match="not part of an environment"):
        Environment(scenario(2), 1.0)
    workload = {"kind": "poisson", "rate_rps": 1.0, "num_requests": 4, "input": 100, "output": 10}
    run = Scenario.from_dict(scenario(2).to_dict() | {"workload": workload})
    with pytest.raises(ValueError, match="overlap"):
        functional.simulate_recorded(*functional.inputs(run))
