"""Plan search, from Python and from the command line."""

import json
import re

import numpy as np
import pandas as pd
import pytest

from jaxsim import cli
from jaxsim._core.errors import InputError
from jaxsim.planning import search as searching
from jaxsim.planning.command import RANKS
from jaxsim.planning.search import search
from jaxsim.spec.scenario import Scenario

pytestmark = pytest.mark.unoptimised

BASE = {
    "schema_version": 1, "model": {"name": "llama-3.1-8b"}, "device": {"name": "h100"}, "num_seeds": 2,
    "engine": {"max_num_seqs": 32, "max_model_len": 65536, "max_num_batched_tokens": 2048},
    "slo": {"ttft_ms": 300.0, "tpot_ms": 30.0},
    "workload": {"kind": "poisson", "rate_rps": 4.0, "num_requests": 80, "input": 300, "output": 60}}
KINDS = ("v100_pcie_16", "a10", "l4")


@pytest.fixture(scope="module")
def found():
    """Two small devices of three kinds, on which the model fits in some ways only; the two best plans are one program.

    One device alone cannot hold it.
    """
    patch = pytest.MonkeyPatch()
    patch.setattr(searching, "LARGEST_GRID", 32)
    yield search(Scenario.from_dict(BASE), [(name, 2) for name in KINDS], top=2)
    patch.undo()


def test_every_plan_is_in_the_table(found):
    table = found.table
    assert len(table) == 12 and set(zip(table["device"], table["plan"], strict=True)) == {
        (device, plan) for device in KINDS for plan in (
            "TP2", "2 x TP1", "TP1 PP2", "attention DP2 FFN TP2")}
    # What cannot run says why, with the arithmetic; what can, but is not simulated, too.
    misfit = table[(table["device"] == "v100_pcie_16") & (table["plan"] == "2 x TP1")].iloc[0]
    assert "GiB" in misfit["refused"] and np.isnan(misfit["screened.tpot_ms"]) and pd.isna(misfit["rank"])
    others = table[table["plan"].isin(["TP1 PP2", "attention DP2 FFN TP2"]) & (table["device"] == "a10")]
    assert sorted(others["refused"].str.contains("no engine here|below the 2 best", regex=True)) == [True, True]
    assert others["screened.tpot_ms"].notna().all() and others["mean_tpot_ms"].isna().all()


def test_ranks_and_the_front(found):
    table = found.table
    ranked = table[table["rank"].notna()]
    assert list(ranked["rank"]) == [1, 2] and list(ranked.index) == [0, 1]
    assert found.best == 0 and list(ranked["plan"]) == ["TP2", "TP2"]
    meets = ranked["meets_limits"].astype(bool)
    assert meets.all()
    assert ranked[meets]["mean_e2el_ms"].is_monotonic_increasing
    # Nobody on the front is beaten by another in all three.
    axes = ranked[["mean_ttft_ms", "mean_tpot_ms"]].assign(
        less=-ranked["screened.output_tokens_per_s_per_device"]).to_numpy(float)
    for row, is_on in zip(axes, ranked["is_on_front"], strict=True):
        is_beaten = any((other <= row).all() and (other < row).any() for other in axes)
        assert is_on != is_beaten
    assert ranked["is_on_front"].iloc[0]


def test_what_was_screened_is_what_was_simulated(found):
    """At a low load, of all that was simulated: TPOT within 5 %, TTFT within 10 %."""
    ranked = found.table[found.table["rank"].notna()]
    np.testing.assert_allclose(ranked["screened.tpot_ms"], ranked["mean_tpot_ms"], rtol=0.05)
    np.testing.assert_allclose(ranked["screened.ttft_ms"], ranked["mean_ttft_ms"], rtol=0.10)
    assert (ranked["screened.rate_within_limits"] <= ranked["screened.capacity_rps"] * 1.0001).all()
    # At the rate of the scenario a pipeline misses a limit; another plan misses it at any rate.
    rates = found.table.set_index(["device", "plan"])["screened.rate_within_limits"]
    assert 0 < rates["v100_pcie_16", "TP1 PP2"] < 4 and rates["l4", "TP2"] == 0


@pytest.mark.slow
def test_a_pipeline_that_misses_a_limit(monkeypatch):
    """Screened as it is simulated, and behind what keeps the limits."""
    monkeypatch.setattr(searching, "LARGEST_GRID", 32)
    ranked = search(Scenario.from_dict(BASE), [("v100_pcie_16", 2)], top=2).table.iloc[:2]
    assert list(ranked["plan"]) == ["TP2", "TP1 PP2"] and list(ranked["rank"]) == [1, 2]
    assert list(ranked["meets_limits"].astype(bool)) == [True, False]
    np.testing.assert_allclose(ranked["screened.tpot_ms"], ranked["mean_tpot_ms"], rtol=0.05)
    np.testing.assert_allclose(ranked["screened.ttft_ms"], ranked["mean_ttft_ms"], rtol=0.10)
    assert 0 < ranked["screened.rate_within_limits"].iloc[1] < 4


def test_the_line_of_the_best(found):
    line = found.vllm_line()
    assert line.startswith("vllm serve meta-llama/Llama-3.1-8B --tensor-parallel-size 2 --max-num-seqs 32 ")
    assert "--max-model-len 65536" in line and "--gpu-memory-utilization 0.9" in line
    with pytest.raises(InputError, match="was not simulated"):
        found.vllm_line(7)


def faked(monkeypatch, found, **columns) -> pd.DataFrame:
    """The table where the two best plans were simulated anew, with these columns, and the third was not."""
    runs = pd.DataFrame({"point": [0, 1], "mean_e2el_ms": [100.0, 900.0], "mean_ttft_ms": [10.0, 90.0],
                         "mean_tpot_ms": [1.0, 9.0], "unstable": [0.0, 0.0], "fault": [None, None],
                         "slo.attainment": [1.0, 1.0], **columns})
    monkeypatch.setattr(searching.runner, "table", lambda *_, **__: (runs, {}))
    blank = found.table.drop(columns=[*searching.SIMULATED, "meets_limits", "is_on_front", "rank"])
    blank["refused"] = blank["refused"].mask(blank["refused"].str.contains("raise --top", na=False))
    rows, base = [0, 1], Scenario.from_dict(BASE)
    table = searching._simulated(blank, [base, base], rows, base, 0.9, None)
    return table.iloc[searching._order(table, "e2e")]


@pytest.mark.parametrize("columns", [{"fault": ["stopped", None]}, {"unstable": [1.0, 0.0]},
                                     {"slo.attainment": [0.5, 1.0]}])
def test_latencies_of_runs_that_went_wrong_do_not_win(monkeypatch, found, columns):
    """A run that was stopped, or in which requests pile up, has the latencies of what had ended."""
    assert list(faked(monkeypatch, found).index[:2]) == [0, 1]
    table = faked(monkeypatch, found, **columns)
    assert list(table.index[:2]) == [1, 0] and list(table["meets_limits"].iloc[:2]) == [True, False]
    is_sound = "slo.attainment" in columns
    assert bool(table["is_on_front"].iloc[1]) == is_sound


def test_what_was_left_out_says_so(monkeypatch, found):
    """By --top: no row without a rank is without a reason."""
    table = faked(monkeypatch, found)
    refused = table.set_index(["device", "plan"])["refused"]
    assert "raise --top" in refused["v100_pcie_16", "TP1 PP2"]
    assert table["refused"].iloc[2:].notna().all() and table["refused"].iloc[:2].isna().all()


def test_a_plan_that_the_scenario_refuses_is_a_row(monkeypatch):
    """Engines that fail have no pipeline stages: the other plans are searched all the same."""
    screened = {f"screened.{name}": 1.0 for name in (
        "ttft_ms", "tpot_ms", "e2e_ms", "rate_within_limits", "output_tokens_per_s_per_device",
        "usd_per_million_output_tokens")} | {"screened.is_stable": True, "refused": None}
    monkeypatch.setattr(searching._Screen, "__call__", lambda *_: screened)
    ran = []
    monkeypatch.setattr(searching.runner, "table", lambda scenarios, **_: (
        ran.extend(scenarios), (pd.DataFrame({"point": []}), dict.fromkeys(range(len(scenarios)), "not run")))[1])
    found = search(Scenario.named("outages"), [("h100", 2)])
    why = found.table.set_index("plan")["refused"]
    assert len(why) == 4 and "engine.pipeline_parallel_size" in why["TP1 PP2"]
    assert (why.drop("TP1 PP2") == "not run").all() and len(ran) == 3


def refused(capsys, *arguments) -> str:
    """The one line on standard error, besides what is being done."""
    assert cli.main(["plan", *arguments]) == 2
    out, err = capsys.readouterr()
    *told, line = err.splitlines()
    assert out == "" and all(x.startswith("jaxsim: screening") for x in told)
    return line


@pytest.mark.parametrize("arguments, says", [
    (["--model", "llama-3.1-8b"], "--devices.*missing"),
    (["--devices", "h100:8"], "--model.*missing"),
    (["--model", "llama-3.1-8b", "--devices", "h101:8"], "h100"),
    (["--model", "lama-3.1-8b", "--devices", "h100:8"], "llama-3.1-8b"),
    (["--model", "llama-3.1-8b", "--devices", "h100:0"], "is not NAME:COUNT"),
    (["--model", "llama-3.1-8b", "--devices", "h100"], "is not NAME:COUNT"),
    (["--model", "llama-3.1-8b", "--devices", "h100:1", "--slo", "tft:1"], "is no limit"),
    (["--model", "llama-3.1-8b", "--devices", "h100:1", "--attainment", "2"], "is not a share"),
    (["--model", "llama-3.1-8b", "--devices", "h100:1", "--top", "0"], "leaves nothing"),
    (["--model", "llama-3.1-8b", "--devices", "h100:1", "--out", "x.txt"], "is no table"),
    (["--model", "llama-3.1-8b", "--devices", "h100:1", "--out", "nowhere/x.csv"], "folder that is not there"),
    (["--model", "llama-3.1-8b", "--devices", "h100:2", "--devices", "H100:2"], "is given twice"),
    (["--model", "llama-3.1-8b", "--devices", "h100:1", "--trace", "nowhere.csv"], "nowhere.csv"),
    (["fitted-latency", "--devices", "h100:1"], "does not know how plans differ"),
    (["--model", "llama-3.1-8b", "--devices", "h100:4", "--set", "engine.tensor_parallel_size=2"], "the search varies"),
])
def test_mistakes(capsys, arguments, says):
    assert re.search(says, refused(capsys, *arguments))


def test_executors_of_what_does_not_fit():
    base = Scenario.from_dict(BASE).with_values({"model.name": "llama-3.1-70b"})
    with pytest.raises(InputError, match="no plan can run: l4 TP1: "):
        searching.executors(base, "l4", 1)


def test_no_plan_fits(capsys):
    """Every refusal is shown."""
    err = refused(capsys, "--model", "llama-3.1-70b", "--devices", "l4:2")
    for plan in ("TP2", "2 x TP1", "TP1 PP2", "attention DP2 FFN TP2"):
        assert f"l4 {plan}: " in err
    assert err.count("GiB") >= 8 and "no plan can run" in err


def test_the_command(found, capsys, monkeypatch, tmp_path):
    """What is printed, and what is written, of a search that was done."""
    monkeypatch.setattr("jaxsim.planning.search.search", lambda *args, **options: found)
    arguments = ["plan", "--model", "llama-3.1-8b", *(word for name in KINDS for word in ("--devices", f"{name}:2")),
                 "--rate", "4", "--slo", "ttft:200", "tpot:12", "--out", str(tmp_path / "plans.csv")]
    assert cli.main(arguments) == 0
    text = capsys.readouterr().out
    assert "a10:2 TP2" in text and found.vllm_line() in text and "simulated;" in text
    assert "v100_pcie_16:2 2 x TP1: " in text
    assert all(len(line) <= 100 for line in text.splitlines() if "vllm serve" not in line)
    assert len(pd.read_csv(tmp_path / "plans.csv")) == 12
    assert cli.main([*arguments[:-1], str(tmp_path / "plans.parquet"), "--json"]) == 0
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "plans.parquet")[["plan", "mean_ttft_ms"]],
                                  found.table[["plan", "mean_ttft_ms"]])
    printed = json.loads(capsys.readouterr().out)
    assert len(printed["rows"]) == 12 and printed["best"] == 0 and printed["vllm"] == found.vllm_line()


def test_nothing_is_cut_off_on_a_narrow_terminal(found, capsys, monkeypatch):
    monkeypatch.setattr("jaxsim.planning.search.search", lambda *args, **options: found)
    monkeypatch.setattr("jaxsim.io.table.WIDTH", 80)
    assert cli.main(["plan", "--model", "llama-3.1-8b", "--devices", "a10:2", "--slo", "ttft:300"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("vllm serve")]
    assert "\u2026" not in "".join(lines) and max(map(len, lines)) <= 80
    best, row = next(line for line in lines if line.startswith("1 ")), found.table.iloc[0]
    assert f"{row['mean_tpot_ms']:.1f}" in best and best.rstrip().endswith("*")


def test_orders_are_the_ones_of_the_command():
    assert tuple(searching.COLUMNS) == RANKS == tuple(searching.SCREENED)
