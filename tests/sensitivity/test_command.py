"""`jaxsim sensitivity`: what it prints and writes, and how it ends."""

import json
import subprocess
import sys

import pytest

from jaxsim import cli
from jaxsim.sensitivity import total
from tests.sensitivity import queues as q

pytestmark = pytest.mark.unoptimised


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "queue.toml"
    path.write_text(q.scenario("M/D/1", 0.5, num_requests=200).to_toml())
    return path


def test_help_does_not_wait_for_jax():
    code = ("import sys, contextlib\nfrom jaxsim.cli import main\n"
            "with contextlib.suppress(SystemExit): main(['sensitivity', '--help'])\nassert 'jax' not in sys.modules")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "--wrt FIELDS" in done.stdout, done.stderr


@pytest.mark.parametrize("command", [["sensitivity"], ["goodput", "--slo", "ttft:200"]])
def test_names_of_studies_are_suggested_too(tmp_path, monkeypatch, capsys, command):
    monkeypatch.chdir(tmp_path)
    assert cli.main([command[0], "bottleneck", *command[1:]]) == 2
    assert "no scenario or study of that name; did you mean 'bottlenecks'?" in capsys.readouterr().err


@pytest.mark.parametrize("options, says", [
    (["--wrt", "engine.preset"], "--wrt = 'engine.preset': is a choice"),
    (["--wrt", "a,,b"], "--wrt = 'a,,b': has an empty name"),
    (["--of", "p99_ttft"], "--of = 'p99_ttft': is no metric of a run; did you mean"),
    (["--seeds", "1"], "--seeds = 1: leaves nothing"),
    (["--step", "2"], "--step = 2.0: is not a share"),
    (["--latency", "e2e"], "--latency = 'e2e': is of --critical-path, which is not asked for"),
])
def test_mistakes_are_one_line_and_status_2(file, tmp_path, capsys, options, says):
    assert cli.main(["sensitivity", str(file), "--out", str(tmp_path / "out"), *options]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"jaxsim: error: {says}") and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_json_files_and_tornado(file, tmp_path, capsys):
    out = tmp_path / "out"
    assert cli.main(["sensitivity", str(file), "--wrt", "workload.rate_rps,cost.*", "--of", "mean_e2el_ms",
                     "--out", str(out), "--json", "--no-direct"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert {r["field"] for r in printed["rows"]} >= {"workload.rate_rps", "cost.prefill.b"}
    assert json.loads((out / "sensitivity.json").read_text()) == printed and printed["num_seeds"] == 8
    assert (out / "tornado.png").stat().st_size > 5000 and (out / "sensitivity.csv").read_text().count("\n") > 2
    assert cli.main(["sensitivity", str(file), "--of", "energy_j", "--wrt", "workload.rate_rps",
                     "--out", str(tmp_path / "other")]) == 2
    assert "--of = 'energy_j': is not computed: the power of the device is not known" in capsys.readouterr().err


@pytest.mark.slow
def test_a_study_has_a_heat_map(file, tmp_path, capsys):
    study = tmp_path / "study.toml"
    study.write_text(f'schema_version = 1\nscenario = "{file}"\n[axes]\n"workload.rate_rps" = [32, 64, 96]\n')
    assert cli.main(["sensitivity", str(study), "--wrt", "cost.prefill.b", "--of", "mean_e2el_ms,p99_e2el_ms",
                     "--out", str(tmp_path / "out"), "--no-direct"]) == 0
    assert "total over 3 scenarios" in capsys.readouterr().out
    assert (tmp_path / "out" / "heat_map.png").stat().st_size > 5000


def test_what_cannot_be_drawn_is_printed(tmp_path, capsys, monkeypatch):
    """A map of nothing: the table is out before, and the command ends well."""
    def of(number):
        return total.Row("mean_e2el_ms", "workload.rate_rps", None, None, None, None, total.CENTRAL, ("zero",), number,
                         2.0, 0.0, 0.0, 0.03)

    made = total.Sensitivity((q.scenario(),) * 2, ({"a": 1}, {"a": 2}), ("mean_e2el_ms",), ("workload.rate_rps",),
                             (of(0), of(1)), {}, 8, 1, 1, 0.0, notes=("left out: p99_tpot_ms",))
    monkeypatch.setattr(total, "sensitivity", lambda *_, **__: made)
    assert cli.main(["sensitivity", "--out", str(tmp_path / "out")]) == 0
    told = capsys.readouterr()
    assert "total over 2 scenarios" in told.out and "left out: p99_tpot_ms" in told.out
    assert "no plot: metrics = ['mean_e2el_ms']: have no derivative at any point" in told.err
    assert "sensitivity.csv" in told.out and "heat_map" not in told.out
