"""Host memory behind the prefix cache from scenario files: what is refused, what a run says, sessions."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxsim._core.errors import InputError
from jaxsim.engine import lower, simulate
from jaxsim.kernels.clock import Time
from jaxsim.metrics import request_frame
from jaxsim.policy.offload import Offload
from jaxsim.spec.scenario import Scenario, json_schema
from jaxsim.study import runner

pytestmark = pytest.mark.unoptimised

FORM = {"a": 0.01, "b": 1e-4, "c": 1e-7, "d": 1e-5}


def scenario(offload: dict | None = None, engine: dict | None = None, **sections) -> Scenario:
    """Ten groups of prompts, of which the device holds about two: blocks of 16 tokens of llama-3-8b, 2 MiB each."""
    base = {
        "schema_version": 1, "num_seeds": 2, "model": {"name": "llama-3-8b"}, "device": {"name": "a100"},
        "engine": {"preset": "vllm-v1@0.9", "max_num_seqs": 8, "max_model_len": 1024, "num_gpu_blocks_override": 96,
                   "enable_prefix_caching": True,
                   **({} if offload is None else {"offload": {"space_gb": 8.0, **offload}}), **(engine or {})},
        "workload": {"kind": "poisson", "rate_rps": 2.0, "num_requests": 80, "input": 20, "output": 4,
                     "prefix_groups": {"number": 10, "tokens": 512}},
        "cost": {"kind": "fitted", "prefill": FORM, "decode": FORM}}
    return Scenario.from_dict(base | sections)


@pytest.mark.parametrize("field, given", [
    ("engine.enable_prefix_caching", dict(engine={"enable_prefix_caching": False})),
    ("engine.pipeline_parallel_size", dict(engine={"pipeline_parallel_size": 2})),
    ("cluster.pools", dict(cluster={"pools": [{"role": "mixed"}]})),
    ("engine.offload.space_gb", dict(offload={"space_gb": 0.0})),
    ("engine.offload.space_gb", dict(offload={"space_gb": 0.001})),
    ("engine.offload.gb_per_s", dict(offload={"gb_per_s": 0.0})),
    ("engine.offload.gb_per_s", dict(device=None)),
    ("engine.offload.load", dict(offload={"load": "sometimes"})),
    ("model", dict(model=None)),
])
def test_refused(field, given):
    """Each by the field to change, before anything is compiled."""
    given = {"offload": {}} | given
    with pytest.raises(InputError) as caught:
        lower.resolve_system(scenario(**given))
    assert caught.value.field == field


def test_numbers_of_a_scenario():
    """16 tokens of 8 heads of 128 dimensions in 16 bits, K and V of 32 layers: 2 MiB, of which 1 GB holds 476."""
    made = scenario({"space_gb": 1.0, "gb_per_s": 16.0, "load": "by_layer"})
    offload = lower.make_offload(made, lower.resolve_system(made))
    assert int(offload.capacity_blocks) == 476 and int(offload.layers) == 32 and bool(offload.by_layer)
    assert float(offload.seconds_per_block) == pytest.approx(2**21 / 16e9)
    halved = scenario({"gb_per_s": 16.0}, engine={"tensor_parallel_size": 2})
    assert float(lower.make_offload(halved, lower.resolve_system(halved)).seconds_per_block) == pytest.approx(
        2**20 / 16e9)


@pytest.mark.parametrize("compute_s, load_s", [(1.0, 0.25), (0.25, 1.0), (0.5, 0.5), (0.5, 0.0)])
def test_layers_overlap(compute_s, load_s):
    """Against two machines in a row, layer after layer."""
    layers, loaded, computed = 8, 0.0, 0.0
    for _ in range(layers):
        loaded += load_s / layers
        computed = max(computed, loaded) + compute_s / layers
    for by_layer, want in ((True, computed), (False, compute_s + load_s)):
        rules = Offload(jnp.int32(1), jnp.float32(load_s), jnp.int32(layers), jnp.bool_(by_layer))
        took = rules.lengthened(Time(jnp.float32(compute_s), jnp.float32(0)), jnp.int32(1))
        assert float(took.hi) + float(took.lo) == want


@pytest.mark.slow
def test_what_a_run_says():
    """Room for all of it, for some, for none: more of the prompts is found, in fewer seconds."""
    variants = [None, {"space_gb": 0.3}, {"space_gb": 0.3, "load": "by_layer"}, {}, {"load": "by_layer"}]
    result = simulate.simulate([scenario(variant) for variant in variants])
    assert result.faults == () and "loads" not in result.metrics[0]
    few, _, plain, by_layer = (m["loads"] for m in result.metrics[1:])
    ttft = [m["p50_ttft_ms"] for m in result.metrics]
    assert 0.1 < few["loaded_share"] < plain["loaded_share"] and plain["computed_share"] < 0.35
    assert ttft[0] > ttft[1] > ttft[3] > ttft[4]
    assert 0 < by_layer["delay_share"] < plain["delay_share"] and plain["load_s"] > 0
    for lane in result.lanes[3]:
        # All that was there before is found: of every group but its first prompt.
        frame = request_frame(lane)
        groups = np.round((frame["cached_tokens"] + frame["loaded_tokens"]) / 512)
        assert set(groups) == {0, 1} and (groups == 0).sum() <= 10
        assert np.allclose(frame[["queue_s", "prefill_s", "decode_s", "stall_s", "front_end_s"]].sum(axis=1),
                           frame["e2e_s"])
        np.testing.assert_allclose(lane.load_delay_s, lane.load_s, rtol=1e-5)
        blocks = frame["loaded_tokens"].sum() / 16
        # All of them loaded once, over the 32 GB/s of PCIe 4.
        assert np.sum(lane.load_s) == pytest.approx(blocks * 2**21 / 32e9) and blocks > 0


class Reached(Exception):
    """Nothing is to run."""


def test_a_log_has_room_for_the_touches_of_every_run(monkeypatch):
    """Who has room for all needs no log, but has that of another where they share a program: of a study, of seeds."""
    groups = {"kind": "poisson", "rate_rps": 2.0, "num_requests": 80, "input": 20, "output": 4}
    short = scenario({"space_gb": 0.3}, {"max_num_batched_tokens": 64},
                     workload=groups | {"prefix_groups": {"number": 10, "tokens": 512}})
    roomy = scenario({"space_gb": 8.0}, {"max_num_batched_tokens": 64},
                     workload=groups | {"input": 400, "prefix_groups": {"number": 10, "tokens": 512}})
    seen = []

    def captured(dims, runs, lanes):
        seen.append((dims.offload_log, len(runs)))
        raise Reached

    monkeypatch.setattr(runner, "simulate_runs", captured)
    for both in ([short], [short, roomy]):
        with pytest.raises(Reached):
            runner.table(both)
    # 80 prompts of a segment, in 2 + 8 and 2 + 14 chunks, of two entries each; twice that and 4096.
    assert seen == [(1 << 13, 2), (1 << 14, 4)]

    alone = scenario({"space_gb": 0.3}, {"max_num_batched_tokens": 64}, workload=groups | {
        "input": 4, "prefix_groups": {"number": 1, "tokens": 960}})
    system, made = lower.resolve_system(short), [lower.make_workload(one, 0) for one in (short, alone)]
    prefixes = [lower.shared_prefixes(workload, 16) for workload in made]
    dims = simulate.with_prefixes(simulate.dims_of(short, system, 80), prefixes)

    def log_of(which):
        return simulate.with_offload(dims, short, system, made[which], prefixes[which]).offload_log

    assert [log_of(np.s_[:1]), log_of(np.s_[1:]), log_of(np.s_[:])] == [1 << 13, 0, 1 << 14]


@pytest.mark.slow
def test_turns_of_sessions():
    """A turn loads what prompts before it stored; answers are not stored."""
    sessions = {"kind": "poisson", "rate_rps": 1.0, "num_requests": 60, "input": 100, "output": 40,
                "sessions": {"turns": 5, "think_s": 20.0, "context_limit": 1000}}
    result = simulate.simulate([scenario(variant, workload=sessions) for variant in ({}, {"space_gb": 0.2})])
    assert result.faults == ()
    host = [m["loads"]["loaded_share"] for m in result.metrics]
    assert host[0] > 0.3 > host[1] > 0
    for lane in result.lanes[0]:
        found = lane.cached_tokens + lane.loaded_tokens
        assert np.all(found[lane.turn == 0] == 0)
        for session in np.unique(lane.session):
            mine = np.flatnonzero(lane.session == session)
            prompts = lane.input_tokens[mine]
            # Of the prompt before, all whole blocks, at least; never the last token.
            assert np.all(found[mine][1:] >= prompts[:-1] // 16 * 16) and np.all(found[mine] < prompts)


def test_the_schema_knows_the_fields():
    assert all("description" in field for field in json_schema()["$defs"]["OffloadSection"]["properties"].values())
