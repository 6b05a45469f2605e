"""The command: what it prints where, what it writes, and its exit status."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

from jaxsim import cli
from jaxsim.cli import commands
from jaxsim.engine.lower import make_workload
from jaxsim.metrics import Result
from jaxsim.reproduce.command import SYSTEMS
from jaxsim.spec.scenario import RooflineCost, Scenario, json_schema, shipped_scenarios
from tests.metrics.lanes import blank_lane, simulated

pytestmark = pytest.mark.unoptimised

TINY = {
    "schema_version": 1, "name": "tiny", "num_seeds": 2,
    "engine": {"num_gpu_blocks_override": 400, "max_model_len": 2048, "max_num_seqs": 8},
    "workload": {"kind": "poisson", "rate_rps": 20.0, "num_requests": 40, "input": 100, "output": 20},
    "slo": {"ttft_ms": 100.0},
    "cost": {"kind": "fitted", "prefill": {"a": 0.004, "b": 2e-5}, "decode": {"a": 0.004, "d": 1e-4}},
}


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A small scenario file in an otherwise empty working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.toml").write_text(Scenario.from_dict(TINY).to_toml())
    return tmp_path / "tiny.toml"


@pytest.fixture
def simulations(monkeypatch):
    """Stands in for the engine: remembers the scenarios, hands back a ready lane for each seed."""
    seen = []
    lane = simulated(0, num_requests=40, num_instances=1)[0]

    def simulate(scenarios, *, record_steps=False):
        assert record_steps
        seen.extend(scenarios)
        return Result(scenarios, [[lane] * s.num_seeds for s in scenarios])

    monkeypatch.setattr("jaxsim.engine.simulate.simulate", simulate)
    return seen


def refused(capsys, *arguments) -> str:
    """The one line on standard error of a command that ends with status 2."""
    assert cli.main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("jaxsim: error: ") and err.count("\n") == 1
    return err


# ---- the whole way, through the engine


def test_run_with_the_engine(tiny, capsys):
    assert cli.main(["run", "tiny.toml", "--json", "--timeline", "--out", "out"]) == 0
    out, _ = capsys.readouterr()
    content = json.loads(out)
    assert content == json.loads((tiny.parent / "out" / "summary.json").read_text())
    assert content["completed"] == 40 and content["total_output_tokens"] == 800
    # 40 requests at 20/s, each at least one prefill and 19 decodes of 4 ms.
    assert 0.08 < content["mean_e2el_ms"] / 1e3 < 1.0 and content["unstable"] is None
    assert {p.name for p in (tiny.parent / "out").iterdir()} == {
        "summary.json", "requests.parquet", "timeline.json", "latency.png", "load.png", "requests.png"}
    frame = pd.read_parquet(tiny.parent / "out" / "requests.parquet")
    assert len(frame) == 80 and frame["ttft_s"].min() >= 0.004


def test_a_trace_replaces_the_workload(tiny, simulations):
    (tiny.parent / "t.csv").write_text("arrival_s,input_tokens,output_tokens\n0,100,5\n0.5,50,9\n2,10,1\n")
    assert cli.main(["run", "tiny.toml", "--trace", "t.csv", "--no-plots"]) == 0
    scenario, = simulations
    assert scenario.to_dict()["workload"] == {"kind": "trace", "trace": "t.csv"} and scenario.num_seeds == 1
    assert (scenario.name, scenario.description) == ("t", "replay of t.csv")
    drawn = make_workload(scenario, 0)
    assert drawn.arrival_s.tolist() == [0.0, 0.5, 2.0] and drawn.output_tokens.tolist() == [5, 9, 1]


# ---- around the engine


def test_table_and_files_by_default(tiny, simulations, capsys):
    assert cli.main(["run", "tiny.toml"]) == 0
    out, err = capsys.readouterr()
    assert "TTFT" in out and "80 requests simulated in" in out and err == ""
    assert (tiny.parent / "results" / "tiny" / "summary.json").exists()
    assert not (tiny.parent / "results" / "tiny" / "timeline.json").exists()


def test_a_name_never_leaves_the_results_folder(tiny, simulations):
    for name, folder in (("../../up and away", "up-and-away"), ("...", "scenario"), ("", "scenario")):
        cli.main(["run", "tiny.toml", "--no-plots", "--set", f'name="{name}"'])
        assert (tiny.parent / "results" / folder / "summary.json").exists()
    assert {p.name for p in tiny.parent.iterdir()} == {"tiny.toml", "results"}


def test_fields_are_set(tiny, simulations):
    cli.main(["run", "tiny.toml", "--no-plots", "--set", "engine.max_num_seqs=64", "--set", "slo.ttft_ms=",
              "--set", "workload.kind=gamma", "--set", "workload.cv = 3", "--seeds", "3"])
    scenario, = simulations
    assert (scenario.engine.max_num_seqs, scenario.workload.kind, scenario.workload.cv) == (64, "gamma", 3.0)
    assert scenario.slo.ttft_ms is None and scenario.num_seeds == 3


def test_default_and_shipped_scenarios(tmp_path, monkeypatch, simulations):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["run", "--no-plots"]) == 0
    assert cli.main(["run", "kv-starved", "--no-plots"]) == 0
    assert [s.name for s in simulations] == ["default", "kv-starved"]
    assert simulations[0].num_requests == 1000 and simulations[0].num_seeds == 8


def test_engine_from_a_vllm_line(tiny, simulations, capsys):
    line = "vllm serve Qwen/Qwen3-8B --max-num-seqs 99 --port 80"
    assert cli.main(["run", "default", "--no-plots", "--from-vllm", line]) == 0
    scenario, = simulations
    assert (scenario.model.name, scenario.device.name) == ("Qwen/Qwen3-8B", "h100")
    assert scenario.engine.max_num_seqs == 99
    assert scenario.workload.kind == "azure-conv-2023" and scenario.slo.ttft_ms
    assert "note: not part of the simulation: --port" in capsys.readouterr().err


def test_fitted_coefficients_do_not_outlive_their_model(tmp_path, monkeypatch, simulations, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = ["run", "fitted-latency", "--no-plots", "--from-vllm", "vllm serve llama-3.1-8b"]
    assert cli.main(arguments) == 0
    assert cli.main([*arguments, "--set", "cost.overrides.gemm_efficiency=0.6"]) == 0
    plain, bent = simulations
    assert plain.cost == RooflineCost() and plain.device.name == "h100" and plain.workload.rate_rps == 2.0
    assert bent.cost == RooflineCost(overrides={"gemm_efficiency": 0.6})
    err = capsys.readouterr().err
    assert "coefficients of the scenario are of another model" in err and "h100 is used" in err


def test_a_bound_that_stops_the_simulation_is_status_3(tiny, monkeypatch, capsys):
    lane = blank_lane([0.0, 1.0], [1.0, float("nan")], fault="more steps than allowed")
    monkeypatch.setattr("jaxsim.engine.simulate.simulate", lambda s, record_steps: Result(s, [[lane, lane]]))
    assert cli.main(["run", "tiny.toml", "--json", "--no-plots"]) == 3
    out, err = capsys.readouterr()
    assert json.loads(out)["fault"] == "more steps than allowed" and json.loads(out)["failed"] == 1
    assert "more steps than allowed" in err


def test_interruption_is_status_130(tiny, monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("jaxsim.engine.simulate.simulate", interrupted)
    assert cli.main(["run", "tiny.toml"]) == 130
    assert capsys.readouterr().err == "jaxsim: interrupted\n"


# ---- mistakes


@pytest.mark.parametrize("arguments, says", [
    (("run", "tiny.tom"), "no such file, and no scenario of that name"),
    (("run", "defualt"), "did you mean 'default'"),
    (("run", "none.toml"), "No such file"),
    (("run", ""), "scenario = ''"),
    (("run", "tiny.toml", "--out", ""), "--out = ''"),
    (("run", "tiny.toml", "--trace", ""), "workload.trace = ''"),
    (("run", "tiny.toml", "--from-vllm", ""), "vllm = ''"),
    (("run", "tiny.toml", "--trace", "nosuch.csv"), "is not there; give the path of a trace file"),
    (("run", "--set", "model.name=tiny.toml"), "is a file, not a name; use model.config"),
    (("run", "--set", "model.name=zzz"), "see `jaxsim list models`"),
    (("run", "--set", "cost.overrides.gemm_eficiency=0.6"), "cost.overrides.gemm_eficiency = 0.6"),
    (("run", "--set", "cost.overrides.gemm_efficiency=-1"), "cost.overrides.gemm_efficiency = -1.0"),
    (("import-vllm", "vllm serve zzz"), "model.name = 'zzz'"),
    (("import-vllm", "--device", "zzz", "vllm serve llama-3.1-8b"), "device.name = 'zzz'"),
    (("import-vllm", "vllm serve llama-3.1-70b"), "does not fit"),
    (("run", "tiny.toml", "--set", "engine.max_num_seqs"), "is not FIELD=VALUE"),
    (("run", "tiny.toml", "--set", "engine.max_num_seqs=lots"), "engine.max_num_seqs = 'lots'"),
    (("run", "tiny.toml", "--set", "engine.nope=1"), "no such field"),
    (("run", "tiny.toml", "--seeds", "0"), "num_seeds = 0: out of range"),
    (("run", "tiny.toml", "--set", "workload.rate_rps=nan"), "not a finite number"),
    (("run", "tiny.toml", "--out", "tiny.toml/x"), "--out"),
    (("run", "tiny.toml", "--from-vllm", "vllm serve m --enable-lora"), "--enable-lora"),
    (("run", "--from-vllm", "vllm serve no-such-model --no-enable-prefix-caching"),
     "model.name = 'no-such-model'"),
    (("run", "tiny.toml", "--trace", "none.csv"), "none.csv"),
    (("run", "tiny.toml", "--set", "cluster.router=rond_robin"), "round_robin"),
    (("run", "--set", "device.name=h1000"), "device.name = 'h1000'"),
    (("run", "--set", "model.name=llama-3.1-70b"), "does not fit"),
    (("run", "tiny.toml", "--set", "workload.input=9000", "--set", "engine.max_model_len="), "max_model_len"),
    (("list", "models", "--markdown"), "--markdown"),
    (("import-vllm", "vllm serve"), "names no model"),
])
def test_mistakes_are_one_line_and_status_2(tiny, capsys, arguments, says):
    assert says in refused(capsys, *arguments)
    assert [p.name for p in tiny.parent.iterdir()] == ["tiny.toml"]


def test_broken_files(tiny, capsys):
    tiny.write_text(tiny.read_text().replace('kind = "poisson"', "kind ="))
    assert "line " in refused(capsys, "run", "tiny.toml")


def test_unknown_commands_and_options_are_one_line_and_status_2(capsys):
    for arguments, says in ((["rum"], "'rum'"), (["run", "--sett", "a=1"], "did you mean --set?"),
                            (["list"], "jaxsim list --help"), (["list", "cats"], "'cats'"),
                            (["run", "--seeds", "few"], "'few'")):
        with pytest.raises(SystemExit) as ended:
            cli.main(arguments)
        assert ended.value.code == 2
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1 and says in err
    assert cli.main([]) == 2
    assert "commands:" in capsys.readouterr().out


def test_files_that_cannot_be_replaced_are_told_before_anything_runs(tiny, simulations, capsys):
    (tiny.parent / "out" / "summary.json").mkdir(parents=True)
    assert "summary.json in it cannot be replaced" in refused(capsys, "run", "tiny.toml", "--out", "out")
    assert simulations == []


def test_files_that_cannot_be_written_are_one_line(tiny, simulations, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device", "out/requests.parquet")

    monkeypatch.setattr("jaxsim.io.result.write_requests", full)
    err = refused(capsys, "run", "tiny.toml", "--out", "out")
    assert "out/requests.parquet: cannot be written (No space left on device)" in err


def test_no_empty_folder_is_left_behind(tiny, monkeypatch):
    def broken(*_, **__):
        raise ZeroDivisionError

    monkeypatch.setattr("jaxsim.engine.simulate.simulate", broken)
    (tiny.parent / "kept").mkdir()
    with pytest.raises(ZeroDivisionError):
        cli.main(["run", "tiny.toml", "--out", "kept/a/b"])
    assert (tiny.parent / "kept").is_dir() and not list((tiny.parent / "kept").iterdir())


# ---- the process


def command(*arguments, **options) -> subprocess.Popen:
    """The command as a process of its own, in a session of its own.

    Without the programs kept by others: where one is loaded, XLA may have something to say on standard error.
    """
    kept = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    options.setdefault("env", kept)
    return subprocess.Popen([sys.executable, "-m", "jaxsim", *arguments], stderr=subprocess.PIPE, text=True,
                            start_new_session=True, **options)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_standard_output_is_status_2():
    with open("/dev/full", "w") as full:
        done = command("list", "scenarios", "--json", stdout=full)
        _, err = done.communicate(timeout=60)
    assert done.returncode == 2 and err.count("\n") == 1 and "standard output: No space left" in err


def test_a_closed_standard_output_is_status_2():
    done = subprocess.Popen(["sh", "-c", f"{sys.executable} -m jaxsim list scenarios >&-"], stderr=subprocess.PIPE,
                            text=True)
    _, err = done.communicate(timeout=60)
    assert done.returncode == 2 and err.count("\n") == 1 and "standard output is closed" in err


@pytest.mark.parametrize("after_s", [0.3, 0.8, 1.5])
def test_ctrl_c_is_status_130_at_any_time(tiny, after_s):
    tiny.write_text(tiny.read_text().replace("num_requests = 40", "num_requests = 200000"))
    child = command("run", "tiny.toml", "--out", "a/b", cwd=tiny.parent, stdout=subprocess.PIPE)
    time.sleep(after_s)
    os.killpg(child.pid, signal.SIGINT)
    out, err = child.communicate(timeout=60)
    assert (child.returncode, out, err) == (130, "", "jaxsim: interrupted\n")
    assert [p.name for p in tiny.parent.iterdir()] == ["tiny.toml"]


def test_a_platform_that_is_not_there_is_one_line(tiny):
    done = command("run", "tiny.toml", cwd=tiny.parent, stdout=subprocess.PIPE,
                   env=os.environ | {"JAX_PLATFORMS": "no-such-platform"})
    out, err = done.communicate(timeout=60)
    assert done.returncode == 2 and out == "" and err.count("\n") == 1
    assert "JAX_PLATFORMS = 'no-such-platform'" in err and "JAX_PLATFORMS=cpu" in err
    assert [p.name for p in tiny.parent.iterdir()] == ["tiny.toml"]


# ---- the other commands


def test_lists(capsys):
    for what, words in (("models", ("llama-3.1-8b", "Mixtral")), ("devices", ("h100", "GiB")),
                        ("scenarios", ("default", "trace-replay")), ("studies", ("batch-limits", "DistServe")),
                        ("policies", ("vllm-v1@0.19", "leaves out", "valid for", "least_slack", "least_outstanding"))):
        assert cli.main(["list", what]) == 0
        text = capsys.readouterr().out
        assert all(word in text for word in words), what
        assert max(map(len, text.splitlines())) <= 100
        assert cli.main(["list", what, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)


def test_listed_scenarios_all_load():
    names = list(shipped_scenarios())
    assert len(names) >= 8 and "default" in names
    for name in names:
        scenario = Scenario.named(name)
        assert scenario.name == name and scenario.description and scenario == Scenario.from_toml(name)


def test_import_vllm_prints_a_scenario_that_loads(tmp_path, capsys):
    line = ["vllm", "serve", "llama-3.1-8b", "--max-num-seqs", "4"]
    assert cli.main(["import-vllm", "--device", "a100", "--", *line]) == 0
    out, err = capsys.readouterr()
    assert "note:" in err
    (tmp_path / "s.toml").write_text(out)
    scenario = Scenario.from_toml(tmp_path / "s.toml")
    assert (scenario.model.name, scenario.device.name, scenario.engine.max_num_seqs) == ("llama-3.1-8b", "a100", 4)


def test_schema_is_printed(capsys):
    assert cli.main(["schema"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(json_schema()))


def test_bench_hands_over(monkeypatch):
    from jaxsim.bench import engine

    monkeypatch.setattr(engine, "command", lambda quick, as_json: 7 if (quick, as_json) == (True, False) else 1)
    assert cli.main(["bench", "--quick"]) == 7


def python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)


def test_help_and_version_load_nothing_heavy():
    code = """
import sys
from jaxsim.cli import main
for arguments in (["--version"], ["--help"], ["run", "--help"]):
    try:
        main(arguments)
    except SystemExit as ended:
        assert ended.code in (0, None)
heavy = {"jax", "numpy", "pandas", "matplotlib", "msgspec", "rich"} & set(sys.modules)
assert not heavy, heavy
"""
    done = python(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("jaxsim ") and "exit status" in done.stdout


def test_scenarios_are_refused_before_jax_is_loaded():
    code = """
import sys
from jaxsim.cli import main
assert main(["run", "--set", "engine.max_num_seqs=0"]) == 2
assert "jax" not in sys.modules and "pandas" not in sys.modules
"""
    done = python(code)
    assert done.returncode == 0, done.stderr


def test_a_reader_that_leaves_is_no_error():
    code = "import sys; from jaxsim.cli import main; sys.exit(main(['list', 'scenarios']))"
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    child.stdout.close()
    _, err = child.communicate(timeout=60)
    assert child.returncode == 0 and err == b""


README = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")


def test_the_lines_of_the_readme_run(tmp_path, monkeypatch, simulations, capsys):
    """Everything in its usage block, with the engine replaced and the benchmark left out."""
    import shlex

    monkeypatch.chdir(tmp_path)
    block, = re.findall(r"```sh\n(jaxsim run --set.*?)```", README, re.S)
    lines = [part.strip() for line in block.splitlines() for part in line.partition(" #")[0].split(";")]
    assert len(lines) >= 9
    for line in lines:
        words = shlex.split(line)
        assert words.pop(0) == "jaxsim"
        if words[0] == "bench" or "--help" in words:
            continue
        if words[0] == "reproduce":
            # tests/reproduce; a whole system takes minutes.
            assert words[1] in SYSTEMS
            continue
        if words[0] in ("sensitivity", "margins", "codesign"):
            # They run engines of their own; tests/sensitivity and tests/planning have them to their end.
            commands._parser().parse_args(words)
            continue
        if words[0] == "run":
            words.append("--no-plots")
            words.remove("--timeline") if "--timeline" in words else None
        if words[0] == "sweep":
            words.append("--dry-run")
        if words[0] == "goodput":
            words += ["--set", "num_seeds=1", "--set", "workload.num_requests=20"]
        if words[0] == "plan":
            # On a quarter of the devices, where 8-bit weights fit, there are fewer ways to compile the closed form of.
            words = [word.replace(":8", ":2") for word in words]
            words += ["--seeds", "1", "--set", "workload.num_requests=20", "--set", "model.dtype=fp8", "--top", "1"]
        assert cli.main(words) == 0, line
    from jaxsim.engine.lower import resolve_system

    assert len(simulations) == 3 and all(resolve_system(s) for s in simulations)


def test_the_example_of_the_readme_runs(monkeypatch):
    import jaxsim

    block, = re.findall(r"```python\n(.*?)```", README, re.S)
    lane = simulated(0, num_requests=40, num_instances=2)[0]
    monkeypatch.setattr("jaxsim.engine.simulate.simulate",
                        lambda scenarios: Result(scenarios, [[lane] * s.num_seeds for s in scenarios]))
    space = {}
    exec(block, space)
    assert len(space["result"].summary) == 6 and jaxsim.Scenario.named("default") == space["base"]


def test_the_readme_counts_what_is_built_in(capsys):
    for what in ("models", "devices"):
        cli.main(["list", what, "--json"])
        assert f"{len(json.loads(capsys.readouterr().out)[what])} {what}" in README
