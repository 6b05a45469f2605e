"""How many programs a study takes."""

import pytest

from jaxsim.engine import loop
from jaxsim.engine import simulate as engine
from jaxsim.spec.scenario import Scenario

pytestmark = pytest.mark.unoptimised

RUN = loop.run


def scenario(rate_rps: float = 4.0, max_num_seqs: int = 8, **engine_fields) -> Scenario:
    """A small system with a fitted cost."""
    form = {"a": 0.01, "b": 1e-5, "c": 1e-7, "d": 1e-5}
    return Scenario.from_dict({
        "schema_version": 1, "num_seeds": 2,
        "engine": {"max_num_seqs": max_num_seqs, "max_num_batched_tokens": 256, "max_model_len": 512,
                   "num_gpu_blocks_override": 64, **engine_fields},
        "workload": {"kind": "poisson", "rate_rps": rate_rps, "num_requests": 24, "input": 100,
                     "output": {"kind": "uniform", "min_tokens": 1, "max_tokens": 40}},
        "cost": {"kind": "fitted", "prefill": form, "decode": form}})


@pytest.fixture
def launches(monkeypatch):
    """Arguments of every call of the compiled loop."""
    seen, run = [], loop.run

    def spy(dims, params, requests):
        seen.append((dims, params.flags.max_num_seqs.shape[0]))
        return run(dims, params, requests)

    monkeypatch.setattr(engine.loop, "run", spy)
    return seen


def test_numbers_share_a_program(launches):
    """Three rates and two limits under two seeds are one batch of one program; other numbers compile nothing."""
    grid = [scenario(rate, seqs) for rate in (1.0, 5.0, 20.0) for seqs in (5, 8)]
    before = RUN._cache_size()
    result = engine.simulate(grid)
    assert [lanes for _, lanes in launches] == [12]
    assert RUN._cache_size() <= before + 1
    compiled = RUN._cache_size()
    other = engine.simulate([scenario(rate, seqs, num_gpu_blocks_override=blocks, max_num_batched_tokens=128)
                             for rate in (2.0, 3.0, 30.0) for seqs, blocks in ((6, 40), (7, 99))])
    assert len(launches) == 2 and RUN._cache_size() == compiled
    assert result.faults == other.faults == ()
    # Answers are those of each scenario alone, in the order given.
    rates = [m["mean_e2el_ms"] for m in result.metrics]
    assert rates[0] < rates[4] and rates[1] < rates[5] and len({round(x, 6) for x in rates}) > 4


def test_systems_share_a_program(launches):
    """Models and devices are numbers too: with one preset and one kernel of decode attention they are one program,
    whatever the architecture. (Where the longest context is waited for, the loop looks for it.)"""
    def system(model, device, rate_rps):
        return Scenario.from_dict({
            "schema_version": 1, "num_seeds": 1, "model": {"name": model}, "device": {"name": device},
            "engine": {"max_num_seqs": 8, "max_num_batched_tokens": 256, "max_model_len": 512},
            "workload": {"kind": "poisson", "rate_rps": rate_rps, "num_requests": 24, "input": 100, "output": 20}})

    before = RUN._cache_size()
    result = engine.simulate([system("llama-3.1-8b", "h100", 1.0), system("llama-3.1-8b", "h200", 2.0),
                              system("qwen3-8b", "h100", 9.0)])
    assert [lanes for _, lanes in launches] == [3] and RUN._cache_size() <= before + 1
    assert len({m["mean_e2el_ms"] for m in result.metrics}) == 3


def test_structure_makes_programs(monkeypatch):
    """Another scheduler, block size or number of replicas is another program; a number, a rate or a seed is not."""
    seen = []
    # Nothing needs to run to see what would.
    monkeypatch.setattr(engine.loop, "run", lambda dims, params, requests: seen.append(requests.count.shape[0]))
    monkeypatch.setattr(engine, "lane_result", lambda dims, world, index, lane: lane.scenario)
    monkeypatch.setattr(engine, "Result", lambda scenarios, lanes: lanes)
    replicas = Scenario.from_dict(scenario().to_dict() | {"cluster": {"replicas": 2}})
    mixed = [scenario(1.0), replicas, scenario(block_size=32), scenario(preset="orca"), scenario(9.0, 6)]
    assert engine.simulate(mixed) == [[i, i] for i in range(5)]
    assert sorted(seen) == [2, 2, 2, 4]
