"""Ranks that iterate together against the reference, which keeps them in step one iteration at a time."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsim.cost.base import BatchStats
from jaxsim.cost.fitted import FittedCost
from jaxsim.cost.roofline import roofline
from jaxsim.engine import loop, lower
from jaxsim.engine.simulate import simulate
from jaxsim.spec.scenario import Scenario
from jaxsim.state import world as w
from jaxsim.workload.workload import Workload
from tests.engine import cases as c
from tests.engine import test_prefix
from tests.reference import simulator

pytestmark = pytest.mark.unoptimised

RANKS = 3


def compare(batch, flags, dims, router: str) -> dict[str, int]:
    """Bit for bit; returns what the cases had in them."""
    seen = dict(cases=0, preemptions=0, uneven=0)
    world = jax.device_get(loop.run(dims, *c.inputs(batch, flags, dims, router)))
    for lane, case in enumerate(batch):
        try:
            result = c.reference(case, flags, dims, router)
        except ValueError:
            continue
        got = c.unpack(dims, world, lane, len(case))
        c.compare_requests(got, result, f"lane {lane}")
        starts = {}
        for record in result.iterations:
            starts.setdefault((record.start_s, record.instance // dims.num_ranks), []).append(record)
        assert got["num_iterations"].sum() == len(starts)
        seen["cases"] += 1
        seen["preemptions"] += int(got["preemptions"].sum())
        seen["uneven"] += sum(len({r.duration_s for r in records}) > 1 for records in starts.values())
    return seen


@pytest.mark.parametrize("name, executors, preemptions", [
    ("vllm-v1", 1, 5), ("vllm-v1-async", 2, 5), ("vllm-v0", 1, 5), ("static", 1, -1)])
def test_engine_equals_reference(name, executors, preemptions):
    """Queues, pools and batches of their own; starts and ends in common."""
    flags = simulator.preset(name)
    dims = replace(c.dims_of(name, executors), num_ranks=RANKS)
    seen = compare(c.draw_many(5, flags, dims), flags, dims, "round_robin")
    assert seen["cases"] > 40 and seen["preemptions"] > preemptions and seen["uneven"] > 500, seen


def test_expected_reserve_fades_where_something_is_decoded():
    """SGLang: a rank that runs along keeps its ratio. Long outputs, a tight pool, a dyadic decay."""
    flags = simulator.preset("sglang")
    dims = replace(c.dims_of("sglang", 1), num_ranks=RANKS)
    batch = []
    for case in (*c.draw_many(10, flags, dims), *c.draw_many(11, flags, dims)):
        limits = case.limits | dict(
            new_token_ratio_init=0.75, new_token_ratio_decay=2.0**-5, new_token_ratio_floor=0.0, expected_clip=4096,
            num_blocks=case.limits["num_blocks"] + 6, max_model_len=case.limits["max_model_len"] + 60,
            max_num_batched_tokens=case.limits["max_num_batched_tokens"] + 60)
        batch.append(replace(case, output=case.output + 20, max_tokens=case.output + 50, limits=limits))
    seen = compare(batch, flags, dims, "random")
    assert seen["cases"] > 80 and seen["preemptions"] > 5, seen


@pytest.mark.parametrize("preset, is_eager, is_expert_parallel", [
    ("vllm-v1@0.9", True, True), pytest.param("vllm-v1@0.15", False, True, marks=pytest.mark.slow),
    pytest.param("vllm-v1@0.15", False, False, marks=pytest.mark.slow)])
def test_lanes_of_ranks_join_once(preset, is_eager, is_expert_parallel):
    """Experts run under the host's launches: TPOT of ranks that are all alike is what the roofline explains."""
    scenario = Scenario.from_dict({
        "schema_version": 1, "num_seeds": 1, "model": {"name": "qwen3-30b-a3b"}, "device": {"name": "h100"},
        "engine": {"preset": preset, "data_parallel_size": 2, "enable_expert_parallel": is_expert_parallel,
                   "max_num_seqs": 16, "enforce_eager": is_eager, "max_model_len": 4096},
        "workload": {"kind": "batch"}})
    work = Workload(np.zeros(32), np.full(32, 200), np.full(32, 300))
    lane = simulate(scenario, workload=work).lanes[0][0]
    system = lower.resolve_system(scenario)
    cost = roofline(system.model, system.device, system.plan, host=system.scheduler.host)
    explained = np.mean([float(cost.explain(
        BatchStats.of(16, 16 * (200 + token), longest_context=200 + token), cuda_graphs=not is_eager,
        async_scheduling=system.scheduler.async_scheduling).seconds) for token in (1, 100, 200, 299)])
    tpot_s = np.mean((lane.finish_s - lane.first_token_s) / 299)
    assert tpot_s == pytest.approx(explained, rel=0.02)


def test_what_ranks_do_together_must_be_possible(monkeypatch):
    """An exchange that takes no time that is a number stops the run, as one's own seconds do."""
    flags = simulator.preset("vllm-v1")
    dims = replace(c.dims_of("vllm-v1", 1), num_ranks=RANKS)
    monkeypatch.setattr(FittedCost, "together_seconds", lambda *_: jnp.float32(jnp.nan))
    jax.clear_caches()
    world = jax.device_get(loop.run(dims, *c.inputs(c.draw_many(5, flags, dims), flags, dims, "round_robin")))
    jax.clear_caches()
    assert np.all(world.fault & w.TOO_SLOW)


@pytest.mark.slow
def test_with_prefix_caching():
    """Every rank finds what it has computed itself."""
    flags = replace(simulator.preset("vllm-v1"), prefix_caching=True)
    dims = replace(c.dims_of("vllm-v1", 1, **test_prefix.SIZES), num_ranks=2)
    # Identical prompts of whole blocks make second copies, which the engine does not follow.
    batch = [case for case in test_prefix.draw(7, flags, dims) if not has_whole_twins(case, dims)]
    seen = compare(batch, flags, dims, "round_robin")
    assert seen["cases"] > 10 and seen["uneven"] > 100, seen


def has_whole_twins(case, dims) -> bool:
    """Whether two prompts are the same and fill their blocks."""
    whole = [tuple(ids) for ids, n in zip(case.prefixes, case.prompt, strict=True) if n % dims.block_size == 0 and ids]
    return len(set(whole)) < len(whole)
