"""What `--attribute` and `--critical-path` print, draw and refuse."""

import argparse
import json

import pytest

from jaxsim import InputError, Study
from jaxsim.sensitivity import attribute_command
from tests.sensitivity.test_direct import scenario

pytestmark = pytest.mark.unoptimised


def options(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    attribute_command.add_arguments(parser)
    parser.add_argument("--of")
    for name in ("--wrt", "--seeds", "--step", "--workers"):
        parser.add_argument(name)
    parser.add_argument("--no-direct", action="store_true")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args(arguments)


def test_only_its_own_options_are_its_own():
    assert not attribute_command.is_asked(options("--json"))
    assert attribute_command.is_asked(options("--attribute")) and attribute_command.is_asked(options("--critical-path"))


def test_it_prints_and_draws(capsys, tmp_path):
    attribute_command.run(options("--attribute", "--critical-path", "--latency", "e2e"), scenario(), tmp_path)
    text = " ".join(capsys.readouterr().out.split())
    for word in ("mean_ttft_ms", "decode.a", "constant", "iteration in flight", "own decodes", "percentile 99 of e2e"):
        assert word in text, word
    for name in attribute_command.FILES:
        assert (tmp_path / name).stat().st_size > 5000


def test_json_is_all_there_is(capsys, tmp_path):
    given = options("--attribute", "--critical-path", "--json", "--percentile", "-1", "--of", "mean_e2el_ms,duration")
    attribute_command.run(given, scenario(), None)
    found = json.loads(capsys.readouterr().out)
    shares = found["attribution"]["mean_e2el_ms"]
    assert set(found["attribution"]) == {"mean_e2el_ms", "duration"}
    assert sum(shares["by_resource"].values()) == pytest.approx(1, abs=2e-5)
    path = found["critical_path"]
    assert path["request"] is None
    assert sum(sum(part.values()) for part in path["parts"].values()) == pytest.approx(path["seconds"], rel=1e-12)


@pytest.mark.parametrize("arguments, says", [
    (["--critical-path", "--request", "3", "--percentile", "50"], "cannot be given with --percentile"),
    (["--critical-path", "--percentile", "101"], "is not between 0 and 100"),
    (["--critical-path", "--request", "60"], "is none of 60"),
    (["--attribute", "--of", "a,,b"], "--of = 'a,,b': has an empty name"),
    (["--attribute", "--wrt", "workload.rate_rps"], "--wrt = 'workload.rate_rps': has no effect with --attribute"),
    (["--critical-path", "--no-direct"], "--no-direct = True: has no effect with --critical-path"),
    (["--critical-path", "--of", "duration"], "--of = 'duration': has no effect with --critical-path alone"),
    (["--attribute", "--request", "0"], "--request = 0: is of --critical-path, which is not asked for"),
    (["--attribute", "--of", "slo.attainment"], "is no sum of times")])
def test_mistakes_are_told(arguments, says):
    with pytest.raises(InputError, match=says):
        attribute_command.run(options(*arguments), scenario(), None)


def test_a_study_is_refused():
    study = Study.from_dict({"schema_version": 1, "axes": {"workload.rate_rps": [1, 2]}})
    with pytest.raises(InputError, match="of one scenario, not of a study"):
        attribute_command.run(options("--attribute"), study, None)
