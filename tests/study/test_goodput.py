"""Goodput: found rates against what single runs say."""

import json

import msgspec
import numpy as np
import pandas as pd
import pytest

from jaxsim import cli
from jaxsim._core.errors import InputError
from jaxsim.engine.simulate import simulate
from jaxsim.spec.scenario import Scenario, SloSection
from jaxsim.study import runner
from jaxsim.study.goodput import SHOWN, scenario_at, search, search_study
from jaxsim.study.study import Study

pytestmark = pytest.mark.unoptimised

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
    """One at a time, eight, sixteen; and one that no request fits into. Searches of three share its program."""
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
        other = search(systems[:3], slo=SLO, attainment=0.9, rates=rates, workers=1)
        assert other["rate_rps"].to_numpy() == pytest.approx(frame["rate_rps"][:3].to_numpy(), rel=0.03)


def test_rules(found):
    """Each limit by itself asks for less than all at once; a limit that cannot be met gives no rate."""
    systems, frame = found
    separate = search(systems[:3], slo=SLO, attainment=0.9, rule="separate", workers=1)
    assert (separate["rate_rps"] >= 0.98 * frame["rate_rps"][:3]).all()
    none = search(systems[:3], slo=SloSection(ttft_ms=0.01), workers=1).iloc[0]
    assert none["rate_rps"] == 0 and none["next_rps"] > 0 and none["refused"] is None
    every = search(systems[:3], slo=SloSection(ttft_ms=1e9), workers=1).iloc[1]
    assert 1 < every["rate_rps"] < every["next_rps"] < 1e6


def test_limits_of_their_own(found):
    """Without limits for all, each scenario keeps its own."""
    mine = [msgspec.structs.replace(of(max_num_seqs=n), slo=SloSection(ttft_ms=ms))
            for n, ms in ((8, 60.0), (8, 5000.0), (16, 60.0))]
    rates = search(mine, workers=1)["rate_rps"]
    assert rates[0] < 0.9 * rates[1]


def test_the_window_is_of_the_same_requests_at_all_rates(found):
    """It is given at the scenario's own rate, and stretched with the arrivals; without a rate it is refused."""
    windowed = msgspec.structs.replace(of(), warmup_s=30.0, cooldown_s=60.0)
    counts = [[(m["num_requests"], m["num_warmup_requests"]) for m in simulate(scenario_at(windowed, rate)).runs[0]]
              for rate in (0.5, 1.0, 20.0)]
    assert counts[0] == counts[1] == counts[2] and 150 < counts[0][0][0] < 250 and counts[0][0][1] > 10
    row = search([found[0][0], windowed, found[0][2]], slo=SLO, workers=1).iloc[1]
    assert row["rate_rps"] == pytest.approx(found[1]["rate_rps"][1], rel=0.2)
    no_rate = msgspec.structs.replace(windowed, workload=msgspec.structs.replace(windowed.workload, rate_rps=None))
    with pytest.raises(InputError, match="warmup_s"):
        search([no_rate], slo=SLO)


def test_outages_at_given_times_have_no_goodput():
    """A run at a higher rate is over before they begin; drawn ones are as frequent at every rate."""
    failing = Scenario.from_dict(BASE | {"cluster": {"replicas": 2, "failures": {
        "outages": [{"instance": 0, "at_s": 60.0, "down_s": 5.0}]}}})
    with pytest.raises(InputError) as caught:
        search([failing], slo=SLO)
    assert caught.value.field == "cluster.failures.outages" and "mtbf_s" in caught.value.remedy


@pytest.mark.slow
def test_interval_is_that_of_other_seeds(found):
    """Searches of other seeds scatter as the intervals say."""
    few = [msgspec.structs.replace(of(max_num_seqs=16), num_seeds=4, workload=msgspec.structs.replace(
        of().workload, seed=1000 + 10 * k)) for k in range(24)]
    frame = search(few, slo=SLO, workers=1, tolerance=0.005)
    mean, half = frame["rate_rps"].mean(), frame["rate_rps.ci95"]
    is_in = (frame["rate_rps"] - mean).abs() < half
    assert 20 <= is_in.sum() <= 24 and half.median() < 0.5 * mean
    # 3.18: Student's t at 97.5 % of the 3 degrees of freedom of four seeds.
    assert 0.5 < np.sqrt((half**2).mean()) / 3.18 / frame["rate_rps"].std() < 2


@pytest.mark.slow
def test_closed_brackets_are_not_simulated_on(found, monkeypatch):
    """Rounds take fewer tiles as brackets close, and no round compiles what the first did not."""
    programs, runs = [], []
    simulated = runner.run_tile

    def counting(tile):
        programs.append((tile.slots, tile.tokens, tile.longest, tile.width))
        runs.append(tile.scenarios)
        return simulated(tile)

    monkeypatch.setattr(runner, "run_tile", counting)
    turns = []
    systems = [msgspec.structs.replace(of(max_num_seqs=n), slo=SLO) for n in range(4, 15)]
    # A limit that nothing meets is given up only at the lowest of rates.
    systems.append(msgspec.structs.replace(of(max_num_seqs=16), slo=SloSection(ttft_ms=0.01)))
    frame = search(systems, workers=1, rule="both", rates=(3.0, 40.0),
                   progress=lambda *told: turns.append((told, len(runs))))
    assert len(set(programs)) == 1
    tiles = np.diff([count for _, count in turns])
    assert len(tiles) > 3 and tiles[0] == 2 and tiles[-1] == 1 and (np.diff(tiles) <= 0).all()
    assert {s.engine.max_num_seqs for s in runs[-1]} == {16}
    rates = [(s.engine.max_num_seqs, s.workload.rate_rps) for tile in runs for s in tile]
    assert len(set(rates)) == len(rates)
    assert turns[-1][0][1:] == (24, 24) and frame["rule"].tolist() == ["joint", "separate"] * 12
    assert (frame["rate_rps"][1::2].to_numpy() >= 0.98 * frame["rate_rps"][::2].to_numpy()).all()
    assert (frame["rate_rps"][:-2] > 1).all() and (frame["rate_rps"][-2:] == 0).all()
    assert set(frame["limited_by"]) <= {"ttft", "tpot", "unstable"}


def test_study_keeps_what_cannot_be_simulated(found):
    """One table of all points: those refused by a check of fields, those that do not fit, and the rest."""
    base = {**BASE, "slo": {"ttft_ms": 150.0, "tpot_ms": 15.0}}
    study = Study.from_dict({"schema_version": 1, "scenario": base, "axes": {
        "engine.gpu_memory_utilization": [0.9, 1.5], "engine.num_gpu_blocks_override": [4096, 20],
        "engine.max_num_seqs": [1, 8, 16]}})
    frame = search_study(study, workers=1)
    assert frame["engine.num_gpu_blocks_override"].tolist() == ([4096] * 3 + [20] * 3) * 2
    assert frame["rate_rps"][:3].to_numpy() == pytest.approx(found[1]["rate_rps"][:3].to_numpy())
    assert frame["refused"][3:6].str.contains("needs 61 blocks").all()
    assert frame["refused"][6:].str.contains("gpu_memory_utilization").all()
    assert frame["rate_rps"].isna().tolist() == [False] * 3 + [True] * 9
    assert (frame["rate_rps_per_device"][:3] == frame["rate_rps"][:3] / frame["num_devices"][:3]).all()
    kept = search_study(msgspec.structs.replace(study, feasible_only=True), workers=1, rule="both")
    assert kept["rule"].tolist() == ["joint", "separate"] * 3 and kept["refused"].isna().all()
    nothing = msgspec.structs.replace(study, axes={"engine.gpu_memory_utilization": [1.5, 2.0]})
    assert search_study(nothing)["refused"].notna().all()


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
    study.write_text('schema_version = 1\nscenario = "mine.toml"\n[axes]\n"engine.max_num_seqs" = [1, 8, 16]\n')
    out = tmp_path / "out.csv"
    assert cli.main(["goodput", str(study), "--slo", "ttft:150", "tpot:15", "--out", str(out), "--workers", "1"]) == 0
    assert "max_num_" in capsys.readouterr().out and len(out.read_text().splitlines()) == 4
    for bad, says in ((["--slo", "ttf:150"], "ttft"), (["--slo", "ttft:x"], "milliseconds"),
                      (["--rates", "1"], "LOW:HIGH"), (["--out", "x.txt"], ".csv"),
                      (["--set", "workload.kind=batch", "--slo", "ttft:1"], "workload")):
        assert cli.main(["goodput", str(path), *bad]) == 2
        assert says in capsys.readouterr().err


class _MadeUp:
    """Runs of systems whose goodputs are given, and how many there were."""

    def __init__(self, goodputs, is_one_at_a_time):
        self.goodputs, self.asked, self.is_one_at_a_time = goodputs, 0, is_one_at_a_time

    def rates_each(self, owners, scenarios):
        return dict.fromkeys(owners, 4)

    def run(self, asked, workers):
        self.asked += len(asked)
        rows = [{"point": at, "seed": seed, "fault": None, "unstable": 0.0,
                 "slo.attainment": float(s.workload.rate_rps <= self.goodputs[k] * (1 + 1e-9)),
                 "slo.ttft_attainment": 1.0, "slo.tpot_attainment": 0.5,
                 **dict.fromkeys(SHOWN, 1.0)} for at, (k, s) in enumerate(asked) for seed in range(2)]
        return pd.DataFrame(rows), {}


def test_contests_have_the_winners_of_all_rates():
    """In turn and all at once: the same winners with the same rates, ties too, as if every rate had been tried."""
    rng, tolerance, systems = np.random.default_rng(0), 0.05, [of() for _ in range(8)]
    seen, asked = dict(ties=0, hopeless=0, beyond=0), {True: 0, False: 0}
    for _ in range(10):
        # Few of them, so that some tie.
        powers = 20 * rng.integers(-2, 5, len(systems))
        powers[rng.random(len(systems)) < 0.2] = -10_000
        goodputs, divisors = (1 + tolerance) ** powers.astype(float), rng.choice([1, 4], len(systems))
        contests = [(int(k) % 2, int(d)) for k, d in enumerate(divisors)]
        for in_turn in (True, False):
            runs = _MadeUp(goodputs, in_turn)
            frame = search(systems, slo=SLO, rates=(0.25, 16.0), tolerance=tolerance, batches=runs, contests=contests)
            asked[in_turn] += runs.asked
            for contest in range(2):
                mine = [k for k in range(len(systems)) if contests[k][0] == contest and powers[k] > -10_000]
                quotients = {k: goodputs[k] / divisors[k] for k in mine}
                best = [k for k in mine if quotients[k] == max(quotients.values())]
                for k in best:
                    assert frame["rate_rps"][k] == pytest.approx(goodputs[k], rel=1e-12)
                    assert frame["next_rps"][k] == pytest.approx(goodputs[k] * (1 + tolerance), rel=1e-12)
                assert all(frame["next_rps"][k] / divisors[k] <= quotients[best[0]] * (1 + tolerance) * (1 + 1e-9)
                           for k in mine if k not in best)
                seen["ties"] += len(best) > 1
                seen["beyond"] += any(goodputs[k] > 16 for k in best)
                seen["hopeless"] += len(mine) < 4
    assert asked[True] < asked[False]
    assert all(count > 2 for count in seen.values()), seen
