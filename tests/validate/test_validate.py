"""`jaxsim validate`: what it reads, compares, refuses and writes. Measured runs here are simulated ones, changed."""

import json

import numpy as np
import pandas as pd
import pytest

from jaxsim import cli
from jaxsim._core.errors import InputError
from jaxsim.engine.simulate import simulate
from jaxsim.metrics import request_frame
from jaxsim.spec.scenario import Scenario
from jaxsim.validate import points, silicon
from jaxsim.validate.measured import read_run
from jaxsim.validate.replay import compare, replay

SYSTEM = {"schema_version": 1, "name": "one", "model": {"name": "llama-3.1-8b"}, "device": {"name": "h100"},
          "engine": {"max_num_seqs": 64, "enable_prefix_caching": True, "max_model_len": 4096}}
NUM = 260


@pytest.fixture(scope="module")
def scenario():
    return Scenario.from_dict(SYSTEM | {"workload": {"kind": "batch"}})


@pytest.fixture(scope="module")
def table(scenario, tmp_path_factory):
    """A run as another simulation of it would be measured: with latencies that are a tenth longer."""
    rng = np.random.default_rng(1)
    prompt = rng.integers(64, 400, NUM)
    ids = [" ".join(f"{'same' if b < 2 else i}-{b}" for b in range(n // 16)) for i, n in enumerate(prompt)]
    made = pd.DataFrame({"arrival_s": np.round(np.cumsum(rng.exponential(0.1, NUM)) * 1024) / 1024,
                         "input_tokens": prompt, "output_tokens": rng.integers(1, 60, NUM), "prefix_block_ids": ids})
    made["arrival_s"] -= made["arrival_s"].iloc[0]
    made["ttft_s"], made["e2e_s"] = 1e-3, 0.1
    path = tmp_path_factory.mktemp("run") / "run.csv"
    made.to_csv(path, index=False)
    lane = simulate(scenario.with_values({"num_seeds": 1}), workload=read_run(path, 16).workload).lanes[0][0]
    frame = request_frame(lane)
    assert (frame["cached_tokens"] > 0).sum() > NUM // 2
    return made.assign(ttft_s=1.1 * frame["ttft_s"], e2e_s=1.1 * frame["e2e_s"])


def write(table, path, **changes):
    table = table.copy()
    for name, (row, value) in changes.items():
        table[name] = table[name].astype(object)
        table.loc[row, name] = value
    table.to_csv(path, index=False)
    return str(path)


def test_a_run_a_tenth_slower_is_ten_percent_off(scenario, table, tmp_path):
    found = replay(scenario, write(table, tmp_path / "run.csv"), skip=20)
    assert len(found.requests) == NUM - 20
    names = {f"{s}_{m}" for s in ("mean", "p50", "p90", "p95", "p99") for m in ("ttft_ms", "tpot_ms", "e2el_ms")}
    assert set(found.metrics) == names | {"output_throughput"}
    for name in names:
        assert found.metrics[name].error == pytest.approx(1 / 1.1 - 1, abs=1e-6), name
    assert abs(found.metrics["output_throughput"].error) < 0.01
    # The first requests were replayed: what they left in the cache is found.
    assert found.utilisation["cached"] > 0.05
    assert found.metrics["mean_e2el_ms"].noise > 0


def test_rows_may_be_unsorted_failed_or_void(scenario, table, tmp_path):
    shuffled = table.sample(frac=1, random_state=0)
    shuffled.iloc[3, shuffled.columns.get_indexer(["ttft_s", "e2e_s"])] = np.nan
    void = shuffled.iloc[[5]].assign(input_tokens=0, ttft_s=np.nan, e2e_s=np.nan, prefix_block_ids="")
    path = tmp_path / "run.csv"
    pd.concat([shuffled, void]).to_csv(path, index=False)
    found = replay(scenario, str(path))
    assert len(found.requests) == NUM - 1 and len(found.run.workload) == NUM and found.run.num_dropped == 1
    assert found.metrics["p50_e2el_ms"].error == pytest.approx(1 / 1.1 - 1, abs=1e-6)
    notes = " ".join(found.notes)
    assert "1 requests failed" in notes and "1 rows have no tokens" in notes and "sorted by arrival" in notes


@pytest.mark.parametrize("changes, says", [
    ({"ttft_s": (4, -0.1)}, "row 5, ttft_s = -0.1: is below 0"),
    ({"ttft_s": (4, 9.0)}, "row 5, ttft_s = 9.0: is more than e2e_s"),
    ({"output_tokens": (2, 1.5)}, "row 3, output_tokens = 1.5: is not a whole number"),
    ({"output_tokens": (2, 0)}, "row 3, output_tokens = 0: is no request, and yet it was answered"),
    ({"arrival_s": (0, "soon")}, "row 1, arrival_s = soon"),
    ({"prefix_block_ids": (7, "a " * 900)}, "row 8, prefix_block_ids = 900 blocks: are more than"),
])
def test_wrong_rows_are_named(table, tmp_path, changes, says):
    with pytest.raises(InputError) as error:
        read_run(write(table, tmp_path / "run.csv", **changes), 16)
    assert says in str(error.value).replace("'", "")


def test_wrong_files_are_refused(table, tmp_path):
    for name, made, says in (
            ("ms.csv", table.assign(**{name: table[name] * 1e3 for name in ("ttft_s", "e2e_s")}), "divide ttft_s"),
            ("ks.csv", table.assign(**{name: table[name] * 1e-3 for name in ("ttft_s", "e2e_s")}), "multiply ttft_s"),
            ("short.csv", table.drop(columns="e2e_s"), "lacks the column e2e_s"),
            ("empty.csv", table.iloc[:0], "holds no rows"),
            ("failed.csv", table.assign(ttft_s=np.nan, e2e_s=np.nan), "no request that was answered")):
        made.to_csv(tmp_path / name, index=False)
        with pytest.raises(InputError, match=says):
            read_run(tmp_path / name, 16)
    with pytest.raises(InputError, match=r"did you mean 'short.csv'|is not there"):
        read_run(tmp_path / "shor.csv", 16)


def test_skipping_everything_is_refused(scenario, table, tmp_path):
    with pytest.raises(InputError, match="leaves none of 260 answered requests"):
        replay(scenario, write(table, tmp_path / "run.csv"), skip=NUM)


def test_statistics_are_of_the_same_requests():
    """One-token outputs have no TPOT on either side; throughput spans the last end on each."""
    frame = pd.DataFrame({"arrival_s": [0.0, 1.0], "output_tokens": [1, 11], "ttft_s": [0.1, 0.2], "e2e_s": [0.1, 1.2],
                          "tpot_s": [np.nan, 0.1], "measured_ttft_s": [0.2, 0.2], "measured_e2e_s": [0.2, 3.2],
                          "measured_tpot_s": [np.nan, 0.3]})
    metrics = compare(frame)
    assert metrics["mean_tpot_ms"].measured == pytest.approx(300)
    assert metrics["mean_tpot_ms"].simulated == pytest.approx(100)
    assert metrics["mean_ttft_ms"].error == pytest.approx(0.15 / 0.2 - 1)
    assert metrics["output_throughput"].measured == pytest.approx(12 / 4.2)
    assert metrics["output_throughput"].simulated == pytest.approx(12 / 2.2)


def test_the_command(scenario, table, tmp_path, capsys):
    (tmp_path / "system.toml").write_text("\n".join(
        line for line in scenario.to_toml().splitlines() if "workload" not in line and "batch" not in line))
    run = write(table, tmp_path / "run.csv")
    arguments = ["validate", "--scenario", str(tmp_path / "system.toml"), "--measured", run, "--skip", "10",
                 "--out", str(tmp_path / "out")]
    assert cli.main([*arguments, "--json", "--no-plots"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["metrics"]["mean_ttft_ms"].keys() >= {"measured", "simulated", "error"}
    assert printed["metrics"]["p99_e2el_ms"]["error"] == pytest.approx(1 / 1.1 - 1, abs=1e-6)
    assert printed["num_compared"] == NUM - 10
    assert json.loads((tmp_path / "out" / "validation.json").read_text()) == printed
    assert len(pd.read_csv(tmp_path / "out" / "validation.csv")) == NUM - 10
    assert cli.main(arguments) == 0
    out = capsys.readouterr().out
    assert "TTFT (ms)" in out and "-9.1 %" in out and "simulated engine: busy" in out
    assert (tmp_path / "out" / "validation.png").stat().st_size > 10_000


@pytest.mark.parametrize("arguments, says", [
    (["--measured", "run.csv"], "--scenario"),
    (["--points", "p.csv", "--skip", "3"], "--skip"),
    (["--points", "nowhere.csv"], "is not there"),
    (["--points", "p.csv", "--set", "engine.preset=sglang"], "has no scenario to change"),
])
def test_wrong_options(arguments, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["validate", *arguments]) == 2
    assert says in capsys.readouterr().err


POINT = {"model": "llama-3.1-8b", "device": "h100", "tensor_parallel_size": 1, "data_parallel_size": 1,
         "expert_parallel_size": 1, "isl": 512, "osl": 64, "concurrency": 4, "ttft_ms": 30.0, "tpot_ms": 7.0}


def test_points(tmp_path, capsys):
    rows = [POINT, POINT | {"concurrency": 8, "range_ratio": 0.8}, POINT | {"model": "llama-4-nothing"},
            POINT | {"model": "qwen3-30b-a3b", "data_parallel_size": 2, "expert_parallel_size": 2},
            POINT | {"model": "qwen3-30b-a3b", "tensor_parallel_size": 4, "expert_parallel_size": 2}]
    path = tmp_path / "points.csv"
    pd.DataFrame(rows).to_csv(path, index=False)
    found = points.simulate_points(path)
    assert found.frame["refused"].notna().tolist() == [False, False, True, False, True]
    done = found.frame[found.frame["refused"].isna()]
    assert (done["simulated_tpot_ms"] > 1).all() and (done["simulated_ttft_ms"] > 5).all()
    assert done["tpot_ms_error"].iloc[0] == pytest.approx(done["simulated_tpot_ms"].iloc[0] / 7.0 - 1)
    # More clients, longer iterations.
    assert done["simulated_tpot_ms"].iloc[1] > done["simulated_tpot_ms"].iloc[0]
    assert found.summary()["tpot_ms"]["count"] == 3
    assert cli.main(["validate", "--points", str(path), "--json", "--no-plots", "--out", str(tmp_path / "out")]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert len(printed["points"]) == 5 and printed["metrics"]["ttft_ms"]["median_absolute_error"] >= 0
    assert "2 of 5 points were not simulated" in " ".join(printed["notes"])


def test_a_column_with_a_dot_is_a_field(tmp_path):
    rows = [POINT, POINT | {"engine.max_num_seqs": 1}]
    path = tmp_path / "points.csv"
    pd.DataFrame(rows).to_csv(path, index=False)
    frame = points.simulate_points(path).frame
    # One of four clients is served at a time.
    assert frame["simulated_ttft_ms"].iloc[1] > 10 * frame["simulated_ttft_ms"].iloc[0]


def test_aiconfigurators_table_is_read_as_it_is():
    row = {"backend": "vllm", "backend_version": "0.18.0", "model_path": "openai/gpt-oss-120b", "system": "h200_sxm",
           "precision": "fp4", "mode": "agg", "isl": 1024, "osl": 1024, "tp_size": 2, "attention_dp_size": np.nan,
           "moe_ep_size": 1, "concurrency": 16, "ttft_ms": 90.0, "tpot_ms": 8.0, "provenance": "inferencex-dump",
           "ambiguous": 0}
    frame, notes = silicon.convert(pd.DataFrame([
        row, row | {"backend": "trtllm", "precision": "fp8", "model_path": "meta-llama/Llama-3.1-70B", "isl": 8192},
        row | {"mode": "disagg"}, row | {"ambiguous": 1}, row | {"concurrency": np.nan}]))
    assert len(frame) == 2 and len(notes) == 3
    first, second = frame.to_dict("records")
    assert (first["model"], first["preset"], first["data_parallel_size"]) == ("openai/gpt-oss-120b", "vllm-v1@0.19", 1)
    assert (first["dtype"], first["range_ratio"], first["engine.moe_backend"]) == ("auto", 0.8, "marlin")
    assert (second["dtype"], second["kv_dtype"], second["engine.max_num_batched_tokens"]) == ("fp8", "fp8", 8320)
    assert points.point_scenario({}, second).engine.max_num_batched_tokens == 8320
    assert points.point_scenario({}, first).engine.moe_backend == "marlin"


@pytest.mark.parametrize("changes, says", [
    ({"isl": 0}, "row 2, isl"), ({"tpot_ms": -1}, "row 2, tpot_ms"), ({"model": None}, "row 2, model"),
    ({"concurrency": 1.5}, "row 2, concurrency")])
def test_wrong_points_are_named(tmp_path, changes, says):
    path = tmp_path / "points.csv"
    pd.DataFrame([POINT, POINT | changes]).to_csv(path, index=False)
    with pytest.raises(InputError, match=says):
        points.read_points(path)


def test_points_in_seconds_are_refused(tmp_path):
    path = tmp_path / "points.csv"
    pd.DataFrame([POINT | {"tpot_ms": 0.007}]).to_csv(path, index=False)
    with pytest.raises(InputError, match="cannot be milliseconds"):
        points.read_points(path)
