"""`jaxsim validate`: what it reads, compares, refuses and writes. Measured runs here are simulated ones, changed."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from jaxsim import cli
from jaxsim._core.errors import InputError
from jaxsim.engine.simulate import simulate
from jaxsim.metrics import request_frame
from jaxsim.spec.scenario import Scenario
from jaxsim.validate import points, show, silicon
from jaxsim.validate.command import read_system
from jaxsim.validate.measured import read_run
from jaxsim.validate.replay import compare, replay, utilisation

pytestmark = pytest.mark.unoptimised

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
    assert found.requests["row"].tolist() == list(range(21, NUM + 1))
    nothing = np.full(NUM, np.nan)
    assert utilisation(replace(found.lane, finish_s=nothing, status=0 * found.lane.status + 1))["busy"] is None


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
    ({"ttft_s": (4, -0.1)}, "row 5, ttft_s = -0.1: is negative"),
    ({"ttft_s": (4, 9.0)}, "row 5, ttft_s = 9.0: is more than e2e_s"),
    ({"output_tokens": (2, 1.5)}, "row 3, output_tokens = 1.5: is not a whole number"),
    ({"output_tokens": (2, 0)}, "row 3, output_tokens = 0: is no request, and yet it was answered"),
    ({"arrival_s": (0, "soon")}, "row 1, arrival_s = soon"),
    ({"input_tokens": (2, 2 ** 31)}, "row 3, input_tokens = 2147483648: is above 2147483647"),
    ({"input_tokens": (2, 2 ** 31 - 2)}, "row 3, input_tokens = 2147483646: and"),
    ({"prefix_block_ids": (7, " ".join(map(str, range(900))))}, "row 8, prefix_block_ids = 900 blocks: are more than"),
    ({"prefix_block_ids": (7, "a b a")}, "row 8, prefix_block_ids = a: is there twice"),
    ({"prefix_block_ids": (7, "a,b")}, "row 8, prefix_block_ids = a,b: is not separated by spaces"),
    ({"prefix_block_ids": (7, "[1 2]")}, "is not separated by spaces"),
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


def test_block_ids_in_any_column(table, tmp_path):
    """Numbers, also with a gap, or words, or lists, under a name with a space."""
    short = table.head(4).assign(input_tokens=16).drop(columns="prefix_block_ids")
    ids = pd.Series([3, 3, None, 5], index=short.index)
    short.assign(**{"prefix_block_ids ": ids.astype(object)}).to_csv(tmp_path / "a.csv", index=False)
    short.assign(prefix_block_ids=ids).to_parquet(tmp_path / "b.parquet")
    short.assign(prefix_block_ids=[[3], [3], [], [5]]).to_parquet(tmp_path / "c.parquet")
    for name in ("a.csv", "b.parquet", "c.parquet"):
        found = read_run(tmp_path / name, 16).workload
        assert found.prefix_hashes.tolist() == [0, 0, 1] and found.prefix_offsets.tolist() == [0, 1, 2, 2, 3], name


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
    # What is 0 when measured has no relative error.
    metrics = compare(frame.assign(measured_ttft_s=[0.0, 0.0], measured_tpot_s=0.0))
    assert not any("ttft" in name or "tpot" in name for name in metrics) and "mean_e2el_ms" in metrics


def test_requests_are_called_by_their_rows(scenario, table, tmp_path, capsys):
    """One longer than the model takes, in a file that is not sorted; arrivals in milliseconds are noted."""
    shuffled = table.sample(frac=1, random_state=0).reset_index(drop=True)
    path = write(shuffled.assign(prefix_block_ids=""), tmp_path / "run.csv", input_tokens=(6, 5000))
    with pytest.raises(InputError, match="measured row 7 = .*exceed max_model_len"):
        replay(scenario, path)
    run = read_run(write(shuffled.assign(arrival_s=1e3 * shuffled["arrival_s"]), tmp_path / "ms.csv"), 16)
    assert run.looks_like_ms and not read_run(write(table, tmp_path / "s.csv"), 16).looks_like_ms
    assert (run.rows == np.argsort(shuffled["arrival_s"], kind="stable") + 1).all()


TOO_SLOW = ["--set", "cost.overrides.host_step_s=1e7"]


def test_a_run_that_stops(scenario, table, tmp_path, capsys):
    """Nothing finishes: status 3, a comparison of what there is, and no plot of a former run beside it."""
    (tmp_path / "system.toml").write_text(scenario.to_toml())
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "validation.png").write_text("old")
    arguments = ["validate", "--scenario", str(tmp_path / "system.toml"), "--measured",
                 write(table, tmp_path / "run.csv"), "--out", str(tmp_path / "out"), *TOO_SLOW]
    assert cli.main([*arguments, "--no-plots"]) == 3
    assert "the simulation stopped before the end: an iteration that takes more" in capsys.readouterr().out
    content = json.loads((tmp_path / "out" / "validation.json").read_text())
    assert content["fault"] and not any("tpot" in name or "e2el" in name for name in content["metrics"])
    assert not (tmp_path / "out" / "validation.png").exists()
    (tmp_path / "out" / "validation.csv").unlink()
    (tmp_path / "out" / "validation.csv").mkdir()
    assert cli.main(arguments) == 2 and "validation.csv in it cannot be replaced" in capsys.readouterr().err


def test_the_scenario_of_a_comparison(tmp_path):
    """Its workload and what goes with it are not used; points bring model and device."""
    path = tmp_path / "s.toml"
    path.write_text('schema_version = 1\nwarmup_s = 5.0\nnum_seeds = 3\n[engine]\nmax_num_seqs = 8\n')
    assert read_system(str(path), is_for_points=True).engine.max_num_seqs == 8
    with pytest.raises(InputError, match="model = None: missing"):
        read_system(str(path))
    path.write_text(path.read_text() + '[model]\nname = "llama-3.1-8b"\n[device]\nname = "h100"\n')
    assert (found := read_system(str(path))).warmup_s == 0 and found.workload.kind == "batch"


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


@pytest.mark.slow
def test_points(tmp_path, capsys):
    rows = [POINT, POINT | {"concurrency": 8, "range_ratio": 0.8}, POINT | {"model": "llama-4-nothing"},
            POINT | {"model": "qwen3-30b-a3b", "data_parallel_size": 2, "expert_parallel_size": 2},
            POINT | {"model": "qwen3-30b-a3b", "tensor_parallel_size": 4, "expert_parallel_size": 2},
            POINT | {"osl": 1, "tpot_ms": 0, "range_ratio": np.inf}]
    path = tmp_path / "points.csv"
    pd.DataFrame(rows).assign(when=pd.Timestamp("2024-01-01")).to_csv(path, index=False)
    with pytest.raises(InputError, match="points row 6, range_ratio = inf"):
        points.read_points(path)
    del rows[5]["range_ratio"]
    pd.DataFrame(rows).assign(when=pd.Timestamp("2024-01-01")).to_parquet(path := tmp_path / "points.Parquet")
    base = Scenario.from_dict(SYSTEM | {"engine": {}, "workload": {"kind": "batch"}, "cluster": {"replicas": 3}})
    found = points.simulate_points(path, base)
    assert found.frame["refused"].notna().tolist() == [False, False, True, False, True, False]
    done = found.frame[found.frame["refused"].isna()]
    assert (done["simulated_tpot_ms"].iloc[:3] > 1).all() and (done["simulated_ttft_ms"] > 5).all()
    assert np.isnan(done["simulated_tpot_ms"].iloc[3]) and np.isnan(done["tpot_ms"].iloc[3])
    assert done["tpot_ms_error"].iloc[0] == pytest.approx(done["simulated_tpot_ms"].iloc[0] / 7.0 - 1)
    # More clients, longer iterations.
    assert done["simulated_tpot_ms"].iloc[1] > done["simulated_tpot_ms"].iloc[0]
    assert found.summary()["tpot_ms"]["count"] == 3 and found.num_stopped == 0
    assert any("[cluster] of the scenario is not used" in note for note in found.notes)
    assert cli.main(["validate", "--points", str(path), "--json", "--out", str(tmp_path / "out")]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert len(printed["points"]) == 6 and printed["metrics"]["ttft_ms"]["median_absolute_error"] >= 0
    assert printed["points"][5]["row"] == 6 and printed["points"][5]["tpot_ms"] is None
    assert "when" not in printed["points"][0]
    assert "2 of 6 points were not simulated, the first: points row 3: model.name" in " ".join(printed["notes"])
    assert (tmp_path / "out" / "validation.png").stat().st_size > 10_000


def test_no_number_of_a_table_is_cut(capsys):
    """Whatever the names, on a pipe and on a narrow terminal."""
    row = POINT | {"model": "a/[b]a-name-that-goes-on-and-on-and-on", "device": "h100_sxm", "isl": 131072, "osl": 8192,
                   "concurrency": 4096, "ttft_ms": 123456.0, "simulated_ttft_ms": 654321.0, "ttft_ms_error": 4.8,
                   "simulated_tpot_ms": np.nan, "tpot_ms_error": np.nan, "refused": None}
    found = points.Points(pd.DataFrame([row], index=[1]), ("a note " + 30 * "of words ",))
    show.print_points(found)
    for width in (20, 80):
        show._print_points(found, 40, Console(width=width, force_terminal=True, markup=False, no_color=True))
    for text in capsys.readouterr().out.split("measured / simulated")[1:]:
        for cell in ("131072/8192", "4096", "123,456 / 654,321", "+480.0 %", "7.00 / -", "[b]", "of words " * 29):
            assert cell in text, cell
        assert "…" not in text and "nan" not in text


def test_points_that_stop(tmp_path, capsys):
    path = tmp_path / "points.csv"
    pd.DataFrame([POINT, POINT]).to_csv(path, index=False)
    (tmp_path / "s.toml").write_text("schema_version = 1\n")
    arguments = ["validate", "--points", str(path), "--scenario", str(tmp_path / "s.toml"), "--out",
                 str(tmp_path / "out"), *TOO_SLOW]
    assert cli.main(arguments) == 3
    assert "2 of 2 points were not simulated, the first: points row 1: an iteration" in capsys.readouterr().out
    assert not (tmp_path / "out" / "validation.png").exists()


@pytest.mark.slow
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
        row, row | {"backend": "trtllm", "precision": "fp8", "model_path": "deepseek-ai/DeepSeek-R1", "isl": 8192},
        row | {"mode": "disagg"}, row | {"ambiguous": 1}, row | {"concurrency": np.nan}]))
    assert len(frame) == 2 and len(notes) == 3
    first, second = frame.to_dict("records")
    assert (first["model"], first["preset"], first["data_parallel_size"]) == ("openai/gpt-oss-120b", "vllm-v1@0.19", 1)
    assert (first["dtype"], first["range_ratio"], first["engine.moe_backend"]) == ("auto", 0.8, "marlin")
    assert (second["dtype"], second["kv_dtype"], second["engine.max_num_batched_tokens"]) == ("fp8", "fp8", 8320)
    assert points.point_scenario({}, second).engine.max_num_batched_tokens == 8320
    assert points.point_scenario({}, first).engine.moe_backend == "marlin"
    by_nvidia = [row | {"backend": name, "provenance": "nvidia-aic-gap-analysis"} for name in ("trtllm", "sglang")]
    first, second = silicon.convert(pd.DataFrame(by_nvidia))[0].to_dict("records")
    # A place for each client, the prompt, and 1,500 tokens more.
    assert points.point_scenario({}, first).engine.max_num_batched_tokens == 16 + 1024 + 1500
    assert points.point_scenario({}, second).engine.max_num_batched_tokens is None


@pytest.mark.parametrize("changes, says", [
    ({"isl": 0}, "row 2, isl"), ({"tpot_ms": -1}, "row 2, tpot_ms"), ({"model": None}, "row 2, model"),
    ({"concurrency": 1.5}, "row 2, concurrency"), ({"tpot_ms": None}, "row 2, tpot_ms"),
    ({"isl": 1 << 31}, "row 2, isl = 2147483648: is above")])
def test_wrong_points_are_named(tmp_path, changes, says):
    path = tmp_path / "points.csv"
    pd.DataFrame([POINT, POINT | changes]).to_csv(path, index=False)
    with pytest.raises(InputError, match=says):
        points.read_points(path)


@pytest.mark.parametrize("changes", [{"tpot_ms": 0.007}, {"ttft_ms": 0.03}])
def test_points_in_seconds_are_refused(tmp_path, changes):
    path = tmp_path / "points.csv"
    pd.DataFrame([POINT | changes]).to_csv(path, index=False)
    with pytest.raises(InputError, match="cannot be milliseconds"):
        points.read_points(path)


def test_points_of_which_none_can_be_simulated(tmp_path):
    path = tmp_path / "points.csv"
    pd.DataFrame([POINT | {"expert_parallel_size": 3}]).to_csv(path, index=False)
    with pytest.raises(InputError, match="points row 1: expert_parallel_size = 3: is neither 1 nor 1") as told:
        points.simulate_points(path)
    assert "jaxsim list" not in str(told.value)
