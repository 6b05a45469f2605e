"""Measured runs of the shared data, simulated with the shipped constants. Bounds: docs/accuracy.md."""

import numpy as np
import pandas as pd
import pytest

from jaxsim.engine.simulate import simulate
from jaxsim.spec.scenario import Scenario
from jaxsim.validate import points
from tests.validate import runs


def errors(comparison, statistic="mean"):
    """Signed, of TTFT, TPOT and end to end."""
    return np.array([comparison.metrics[f"{statistic}_{name}"].error for name in ("ttft_ms", "tpot_ms", "e2el_ms")])


def test_profiled_runs(shared_data, tmp_path):
    """The tables of the same GPU, KV blocks derived, clocks inside the engine."""
    dense, experts = (run.replay(tmp_path) for run in runs.rtx(shared_data, tmp_path))
    assert np.all(np.abs(errors(dense)) < [0.05, 0.015, 0.02]) and np.all(np.abs(errors(dense, "p99")) < 0.05)
    assert np.all(np.abs(errors(experts)) < [0.05, 0.015, 0.02])
    # The target of 5 % is not met by p99 of TTFT: the last of a queue of forty, where 1 % in all iterations is several.
    assert np.all(np.abs(errors(experts, "p99")) < [0.08, 0.05, 0.05])
    assert dense.utilisation["extrapolated"] < 0.01 < experts.utilisation["extrapolated"] < 0.3


def test_runs_behind_http(shared_data, tmp_path):
    """One device, one set of constants, unsaturated and warm."""
    found = np.array([errors(run.replay(tmp_path)) for run in runs.h100(shared_data) if "reasoning" not in run.name])
    assert len(found) == 5
    assert np.all(np.median(np.abs(found), axis=0) < [0.12, 0.05, 0.05])
    assert np.all(np.abs(found[:, 2]) < 0.12)


def test_older_vllm(shared_data):
    """Means of vLLM 0.6 runs at 2, 4 and 8 ranks."""
    found = runs.apex(shared_data)
    assert len(found) == 7
    assert found["tpot_ms_error"].abs().median() < 0.05 and found["ttft_ms_error"].abs().median() < 0.15


@pytest.mark.parametrize("source, step, at_least", [("exact", 1, 5), ("inferred", 3, 8)])
def test_stage_aggregates(shared_data, source, step, at_least):
    """Means by rate stage, of models that no constant was fitted on."""
    found = runs.aggregates(shared_data, source, step)
    assert len(found) >= at_least
    assert found["e2el_ms_error"].abs().median() < 0.07 and found["ttft_ms_error"].abs().median() < 0.18


def test_operating_points_of_vllm(shared_data, tmp_path):
    """Every eighth point of vLLM at fixed concurrency, as published; other engines are in docs/accuracy.md."""
    table = pd.read_csv(shared_data / "runs" / "serving_points_silicon.csv")
    table = table[(table["backend"] == "vllm") & (table["provenance"] == "inferencex-dump") & (table["mode"] == "agg")
                  & (table["ambiguous"] == 0) & table["system"].isin(["h100_sxm", "h200_sxm"])]
    table.iloc[::8].to_csv(tmp_path / "points.csv", index=False)
    found = points.simulate_points(tmp_path / "points.csv").summary()
    assert found["ttft_ms"]["count"] > 25
    assert found["ttft_ms"]["median_absolute_error"] < 0.25 and found["tpot_ms"]["median_absolute_error"] < 0.12


def test_operating_points_of_tensorrt_llm(shared_data, tmp_path):
    """Llama-3.1-70B at 1k/1k, where prompts wait for each other on fewer than 8 devices: each of those by itself."""
    table = pd.read_csv(shared_data / "runs" / "serving_points_silicon.csv")
    table = table[(table["backend"] == "trtllm") & (table["mode"] == "agg") & (table["ambiguous"] == 0)
                  & (table["system"] == "h200_sxm") & table["model_path"].str.contains("70B")
                  & (table["isl"] == 1024) & (table["osl"] == 1024) & (table["tp_size"] < 8)]
    table.iloc[::3].to_csv(tmp_path / "points.csv", index=False)
    found = points.simulate_points(tmp_path / "points.csv")
    assert found.summary()["ttft_ms"]["count"] == 6
    assert found.frame["ttft_ms_error"].abs().max() < 0.1
    assert found.summary()["tpot_ms"]["median_absolute_error"] < 0.12


def test_host_of_tensorrt_llm(shared_data, tmp_path):
    """Llama-3.1-8B on 1 to 8 GPUs with prompts of 2,048, where the host's seconds were fitted on those of 1,024."""
    table = pd.read_csv(shared_data / "runs" / "serving_points_silicon.csv")
    table = table[(table["backend"] == "trtllm") & (table["provenance"] == "nvidia-aic-gap-analysis")
                  & table["model_path"].str.contains("8B") & (table["isl"] == 2048) & (table["concurrency"] <= 32)]
    table.iloc[::3].to_csv(tmp_path / "points.csv", index=False)
    found = points.simulate_points(tmp_path / "points.csv").summary()["tpot_ms"]
    assert found["count"] == 12
    assert found["median_absolute_error"] < 0.12


@pytest.mark.parametrize("capacity_tokens, share", [(1 << 28, 0.374), (4_000_000, 0.185), (16_000_000, 0.342)])
def test_hit_rates_of_a_production_trace(shared_data, capacity_tokens, share):
    """Prompt tokens found in the cache, by its size, within 2 points: Mooncake conversations, one fast engine."""
    block = 256
    scenario = Scenario.from_dict({
        "schema_version": 1, "num_seeds": 1,
        "engine": {"enable_prefix_caching": True, "max_model_len": 1 << 18, "block_size": block, "max_num_seqs": 256,
                   "max_num_batched_tokens": 1 << 20, "num_gpu_blocks_override": capacity_tokens // block},
        "workload": {"kind": "trace", "trace": str(shared_data / "traces" / "mooncake_conversation_trace.jsonl")},
        # Fast enough that hardly anybody waits: what is cached depends on the order of the trace alone.
        "cost": {"kind": "fitted", "prefill": {"a": 1e-3, "b": 1e-8}, "decode": {"a": 1e-3}}})
    lane = simulate(scenario).lanes[0][0]
    assert lane.fault == "" and len(lane.arrival_s) > 12_000
    assert lane.cached_tokens.sum() / lane.input_tokens.sum() == pytest.approx(share, abs=0.02)
