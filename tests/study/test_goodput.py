"""Goodput: found rates against what single runs say."""

import json

import msgspec
import numpy as np
import pytest

from jaxsim import cli
from jaxsim._core.errors import InputError
from jaxsim.engine.simulate import simulate
from jaxsim.spec.scenario import Scenario, SloSection
from jaxsim.study.goodput import scenario_at, search

BASE = {
    "schema_version": 1, "engine": {"max_num_seqs": 8, "num_gpu_blocks_override": 4096, "max_model_len": 4096},
    "num_seeds": 3,
    "cost": {"kind": "fitted", "prefill": [{"a": 0.002, "b": 2e-5}], "decode": [{"a": 0.01, "d": 1e-4}]},
    "workload": {"kind": "poisson", "rate_rps": 1.0, "num_requests": 300, "input": {
        "kind": "uniform", "min_tokens": 100, "max_tokens": 900},
        "output": {"kind": "uniform", "min_tokens": 8, "max_tokens": 72}}}
SLO = SloSection(ttft_ms=150.0, tpot_ms=15.0)


def of(**engine) -> Scenario:
    return Scenario.from_dict({**BASE, "engine": {**BASE["engine"], **engine}})


@pytest.fixture(scope="module")
def found():
    """One at a time, eight, sixteen; and one that no request fits into."""
    systems = [of(max_num_seqs=1), of(), of(max_num_seqs=16), of()]
    tight = msgspec.structs.replace(systems[3].engine, num_gpu_blocks_override=20)
    systems[3] = msgspec.structs.replace(systems[3], engine=tight)
    return systems, search(systems, slo=SLO, attainment=0.9, workers=1)


def attained(scenario: Scenario, rate: float) -> float:
    runs = simulate(Scenario.from_dict({**scenario_at(scenario, rate).to_dict(), "slo": {
        "ttft_ms": 150.0, "tpot_ms": 15.0}})).runs[0]
    return float(np.mean([run["slo"]["attainment"] for run in runs])) if not np.mean(
        [bool(run["unstable"]) for run in runs]) > 0.5 else 0.0


def test_brackets_hold(found):
    """The rate found meets the target in runs of its own, the next one does not, and they are close."""
    systems, frame = found
    for k, system in enumerate(systems[:3]):
        row = frame.iloc[k]
        assert row["next_rps"] <= row["rate_rps"] * 1.02 + 1e-9
        assert attained(system, row["rate_rps"]) >= 0.9 > attained(system, row["next_rps"])
        assert row["attainment"] == pytest.approx(attained(system, row["rate_rps"]))
        assert 0 < row["rate_rps.ci95"] < row["rate_rps"]
    # More at once carry more, up to where the limit on the time per token binds.
    assert frame["rate_rps"][0] < 0.5 * frame["rate_rps"][1] and frame["rate_rps"][1] < frame["rate_rps"][2]
    assert "KV blocks" in frame["refused"][3] and np.isnan(frame["rate_rps"][3])


def test_brackets_that_miss_are_moved(found):
    """Where the first rates are all too high or all too low, the answer is the same."""
    systems, frame = found
    for rates in ((20.0, 90.0), (0.01, 0.05)):
        other = search(systems[:2], slo=SLO, attainment=0.9, rates=rates, workers=1)
        assert other["rate_rps"].to_numpy() == pytest.approx(frame["rate_rps"][:2].to_numpy(), rel=0.03)


def test_rules(found):
    """Each limit by itself asks for less than all at once; a limit that cannot be met gives no rate."""
    systems, frame = found
    separate = search(systems[:2], slo=SLO, attainment=0.9, rule="separate", workers=1)
    assert (separate["rate_rps"] >= 0.98 * frame["rate_rps"][:2]).all()
    none = search(systems[:1], slo=SloSection(ttft_ms=0.01), workers=1).iloc[0]
    assert none["rate_rps"] == 0 and none["next_rps"] > 0 and none["refused"] is None
    every = search(systems[1:2], slo=SloSection(ttft_ms=1e9), workers=1).iloc[0]
    assert 1 < every["rate_rps"] < every["next_rps"] < 1e6


def test_limits_of_their_own(found):
    """Without limits for all, each scenario keeps its own; a warm-up longer than fast runs is refused."""
    mine = [msgspec.structs.replace(of(), slo=SloSection(ttft_ms=ms)) for ms in (60.0, 5000.0)]
    rates = search(mine, workers=1)["rate_rps"]
    assert rates[0] < 0.9 * rates[1]
    with pytest.raises(InputError, match="warmup_s"):
        search([msgspec.structs.replace(of(), warmup_s=5.0)], slo=SLO)


@pytest.mark.parametrize("arguments, field", [
    (dict(slo=SloSection()), "--slo"), (dict(slo=SLO, attainment=1.5), "--attainment"),
    (dict(slo=SLO, rates=(3.0, 1.0)), "--rates"), (dict(slo=SLO, tolerance=0.0), "--tolerance")])
def test_refusals(arguments, field):
    with pytest.raises(InputError) as caught:
        search([of()], **arguments)
    assert caught.value.field == field


def test_command_line(found, tmp_path, capsys):
    path = tmp_path / "mine.toml"
    path.write_text(of().to_toml())
    assert cli.main(["goodput", str(path), "--slo", "ttft:150", "tpot:15", "--json", "--workers", "1"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["rows"][0]["rate_rps"] == pytest.approx(found[1]["rate_rps"][1], rel=0.03)
    study = tmp_path / "study.toml"
    study.write_text('schema_version = 1\nscenario = "mine.toml"\n[axes]\n"engine.max_num_seqs" = [1, 8]\n')
    out = tmp_path / "out.csv"
    assert cli.main(["goodput", str(study), "--slo", "ttft:150", "tpot:15", "--out", str(out), "--workers", "1"]) == 0
    assert "max_num_seqs" in capsys.readouterr().out and len(out.read_text().splitlines()) == 3
    for bad, says in ((["--slo", "ttf:150"], "ttft"), (["--slo", "ttft:x"], "milliseconds"),
                      (["--rates", "1"], "LOW:HIGH"), (["--out", "x.txt"], ".csv"),
                      (["--set", "workload.kind=batch", "--slo", "ttft:1"], "workload")):
        assert cli.main(["goodput", str(path), *bad]) == 2
        assert says in capsys.readouterr().err
