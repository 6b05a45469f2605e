"""Host and front-end seconds from runs: what a run was made with is found again."""

import json
import tomllib

import numpy as np
import pandas as pd
import pytest

from jaxsim import cli
from jaxsim._core.errors import InputError
from jaxsim.calibrate import report, runs
from jaxsim.engine.simulate import simulate
from jaxsim.metrics import request_frame
from jaxsim.spec.scenario import Scenario
from jaxsim.workload import Workload

pytestmark = pytest.mark.unoptimised

TRUE = {"cost.front_end_s": 0.011, "cost.overrides.host_step_s": 2.5e-3}
NUM = 200


def scenario(model: str) -> Scenario:
    return Scenario.from_dict({
        "schema_version": 1, "model": {"name": model}, "device": {"name": "h100"}, "num_seeds": 1,
        "engine": {"max_num_seqs": 64, "max_model_len": 4096, "async_scheduling": False},
        "workload": {"kind": "batch"}})


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Two models, each measured on a system of the same host, with 1 % of noise."""
    rng, pairs, folder = np.random.default_rng(0), [], tmp_path_factory.mktemp("runs")
    for model in ("llama-3.1-8b", "qwen3-14b"):
        system = scenario(model)
        lengths = rng.integers(32, 200, (2, NUM))
        workload = Workload(np.cumsum(rng.exponential(0.08, NUM)), *lengths).from_zero()
        frame = request_frame(simulate(system.with_values(TRUE), workload=workload).lanes[0][0])
        noise = rng.normal(1, 0.01, NUM)
        path = folder / f"{model}.csv"
        pd.DataFrame({"arrival_s": frame["arrival_s"], "input_tokens": lengths[0], "output_tokens": lengths[1],
                      "ttft_s": frame["ttft_s"] * noise, "e2e_s": frame["e2e_s"] * noise}).to_csv(path, index=False)
        (folder / f"{model}.toml").write_text(system.to_toml())
        pairs.append((system, str(path)))
    return pairs, folder


@pytest.mark.slow
def test_the_truth_is_found(measured):
    pairs, _ = measured
    found = runs.fit_runs(runs.EndToEnd.read(pairs, skip=10), list(TRUE))
    for name, value in TRUE.items():
        assert found.fit.values[name] == pytest.approx(value, rel=0.06), name
    assert found.fit.converged and not found.fit.undetermined
    assert np.abs(found.before).max() > 0.1 and np.abs(found.after).max() < 0.02
    # One run alone stands against the prior, which pulls by a scale of 5 %.
    assert np.isfinite(found.held_out).all() and np.abs(found.held_out).max() < 0.05


def test_what_no_run_depends_on_stays_as_it_is(measured, tmp_path):
    """Without asynchronous scheduling its serial part is never paid: the scenario's own number is not written over."""
    pairs, _ = measured
    own = pairs[0][0].with_values({"cost.front_end_s": 0.02, "cost.overrides": {"async_step_s": 7e-4}})
    data = runs.EndToEnd.read([(own, pairs[0][1])])
    found = runs.fit_runs(data, ["cost.front_end_s", "cost.overrides.async_step_s"])
    assert found.fit.undetermined == ("cost.overrides.async_step_s",)
    assert "async_step_s is not determined: no row depends on it." in " ".join(found.fit.sentences())
    assert np.isnan(found.held_out).all() and list(found.overrides()) == ["cost.front_end_s"]
    assert found.present == {"cost.front_end_s": [0.02], "cost.overrides.async_step_s": [7e-4]}
    # Before is the scenario as it is, with 20 ms outside the engine and not the preset's 6.
    lane = simulate(own, workload=data.runs[0].workload).lanes[0][0]
    ttft_s = request_frame(lane)["ttft_s"].mean()
    assert found.before[0, 0] == pytest.approx(ttft_s / data.runs[0].ttft_s.mean() - 1, abs=1e-5)
    text = report.write_runs(found, tmp_path)[0].read_text()
    assert text.startswith("# cost.overrides.async_step_s is not determined by these runs and stays as each scenario"
                           " has it: 0.0007\n") and "async_step_s" not in tomllib.loads(text)["cost"]


def test_where_a_fit_starts(measured):
    """From the scenarios' own numbers; a zero is no number. The default fits what any of the schedulers pays."""
    (one, path), (other, _) = measured[0]
    data = runs.EndToEnd((one.with_values({"cost.front_end_s": 0.0}),
                          other.with_values({"engine.async_scheduling": True, "cost.host": "none"})), (), 0)
    assert data.usual_names() == ["cost.front_end_s", "cost.overrides.host_step_s", "cost.overrides.async_step_s"]
    assert np.isinf(data.parameter("cost.front_end_s").width)
    found = data.parameter("cost.overrides.host_step_s")
    assert (found.start, found.centre, found.width) == (pytest.approx(1e-3), pytest.approx(1e-3), runs.WIDTH)
    fitted = Scenario.from_dict({"schema_version": 1, "workload": {"kind": "batch"}, "engine": {
        "max_model_len": 4096, "num_gpu_blocks_override": 1000}, "cost": {
            "kind": "fitted", "prefill": {"a": 0.01}, "decode": {"a": 0.01}}})
    data = runs.EndToEnd((fitted,), (), 0)
    assert data.usual_names() == ["cost.front_end_s"]
    with pytest.raises(InputError, match="host_step_s': is nothing that a fitted cost has"):
        data.parameter("cost.overrides.host_step_s")
    with pytest.raises(InputError, match="is the same table as"):
        runs.EndToEnd.read([(one, path), (other, path)])


def test_the_command(measured, tmp_path, capsys):
    _, folder = measured
    arguments = ["calibrate", "--output", str(tmp_path / "cal"), "--fit", "cost.front_end_s", "--run",
                 str(folder / "llama-3.1-8b.toml"), str(folder / "llama-3.1-8b.csv")]
    assert cli.main([*arguments, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["runs"][0]["after"]["TTFT"] == pytest.approx(0, abs=0.05)
    text = (tmp_path / "cal" / "overrides.toml").read_text()
    assert text.startswith("[cost]\nfront_end_s = 0.01")
    assert cli.main(arguments) == 0
    out = capsys.readouterr().out
    assert "cost.front_end_s = 0.01" in out and ", was 0.006" in out


@pytest.mark.parametrize("arguments, says", [
    ([], "FILE"), (["--device", "h100", "x.csv"], "--format"),
    (["--skip", "3", "x.csv"], "has no effect without --run"),
    (["--run", "a.toml", "b.csv", "--device", "h100"], "does not go with --run"),
    (["--run", "a.toml", "b.csv"], "a.toml"), (["--run", "default", "b.csv"], "b.csv")])
def test_wrong_options(arguments, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["calibrate", "--output", "cal", *arguments]) == 2
    assert says in capsys.readouterr().err and not (tmp_path / "cal").exists()


def test_wrong_fields(measured):
    pairs, _ = measured
    data = runs.EndToEnd.read(pairs[:1])
    with pytest.raises(InputError, match="cannot be fitted to runs"):
        runs.fit_runs(data, ["cost.front_end"])
    with pytest.raises(InputError, match="names a field twice"):
        runs.fit_runs(data, ["cost.front_end_s"] * 2)
    with pytest.raises(InputError, match="leaves none of 200"):
        runs.EndToEnd.read(pairs[:1], skip=NUM)
