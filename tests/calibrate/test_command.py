"""`jaxsim calibrate` as a command: files, JSON, mistakes."""

import argparse
import json
import subprocess
import sys
import tomllib

import pytest

from jaxsim._core.errors import InputError
from jaxsim.calibrate import command
from jaxsim.spec.efficiency import Efficiency
from tests.calibrate.synthetic import gemm_table

pytestmark = pytest.mark.unoptimised


def run(*arguments) -> int:
    parser = argparse.ArgumentParser()
    command.add_parser(parser.add_subparsers())
    options = parser.parse_args(["calibrate", *map(str, arguments)])
    return options.command(options)


def test_from_a_table_to_constants(tmp_path, capsys):
    gemm_table(tmp_path / "gemm.csv")
    system = ("--device", "h100", "--format", "aiconfigurator", tmp_path / "gemm.csv", "--folds", "2")
    assert run(*system, "--output", tmp_path / "out" / "deep", "--json") == 0
    out, err = capsys.readouterr()
    content = json.loads(out)
    assert content["format"] == "jaxsim calibration 1" and content["families"]["gemm.bf16"]["taken"]
    assert err.startswith("gemm.bf16 ") and err.count("\n") == 1
    folder = tmp_path / "out" / "deep"
    assert json.loads((folder / "report.json").read_text()) == content
    assert (folder / "gemm.bf16.png").stat().st_size > 10_000 and "held out" in (folder / "report.txt").read_text()
    record = Efficiency.from_dict(tomllib.loads((folder / "efficiency.toml").read_text()))
    assert record.gemm["bf16"].floor_s == pytest.approx(2.479e-6, rel=0.05)
    # What was written is a device to start from.
    again = (folder / "device.toml", *system[2:])
    assert run("--device", *again, "--output", tmp_path / "again", "--no-plots") == 0
    out, _ = capsys.readouterr()
    assert "h100_sxm_80-calibrated" in out and "efficiency.toml" in out and not list((tmp_path / "again").glob("*.png"))


@pytest.mark.parametrize("arguments, says", [
    (("--device", "h1000"), "device.name = 'h1000'"),
    (("--device", "none.toml"), "--device = 'none.toml': cannot be read"),
    (("--device", "gemm.csv.toml"), "has no [device] with name and numbers"),
    (("--format", "plian"), "did you mean 'plain'"),
    (("--sample", "1"), "--sample = 1: is too small"), (("--folds", "1"), "--folds = 1"),
    (("--output", "gemm.csv"), "--output = 'gemm.csv': is not a folder"), (("--format", "plain"), "--model = None"),
    (("--device", "h200"), "is h100_sxm_80, not h200"),
    (("few", "gemm.csv"), "no family was fitted (gemm.bf16: 4 rows"),
])
def test_mistakes(tmp_path, monkeypatch, arguments, says):
    monkeypatch.chdir(tmp_path)
    gemm_table("gemm.csv")
    (tmp_path / "gemm.csv.toml").write_text("a = 1\n")
    if arguments[0] == "few":
        gemm_table("gemm.csv").head(4).to_csv("gemm.csv", index=False)
        arguments = ("--folds", "2")
    given = {"--device": "h100", "--format": "aiconfigurator", "--output": "out", **dict([arguments])}
    with pytest.raises(InputError) as told:
        run("gemm.csv", *(word for pair in given.items() for word in pair))
    assert says in str(told.value) and not (tmp_path / "out").exists()


def test_the_parser_loads_no_jax():
    """--help answers at once."""
    code = "import sys, jaxsim.calibrate.command; sys.exit('jax' in sys.modules or 'pandas' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
