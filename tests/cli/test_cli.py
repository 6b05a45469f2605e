"""The command: what it prints where, what it writes, and its exit status."""

import json
import subprocess
import sys

import pandas as pd
import pytest

from jaxsim import cli
from jaxsim.engine.lower import make_workload
from jaxsim.metrics import Result
from jaxsim.spec.scenario import Scenario, json_schema
from tests.metrics.lanes import blank_lane, simulated

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


def test_unknown_commands_and_options_are_status_2(capsys):
    for arguments in (["rum"], ["run", "--sett", "a=1"], ["list"], ["list", "cats"]):
        with pytest.raises(SystemExit) as ended:
            cli.main(arguments)
        assert ended.value.code == 2
    assert cli.main([]) == 2
    assert "commands:" in capsys.readouterr().out


# ---- the other commands


def test_lists(capsys):
    for what, words in (("models", ("llama-3.1-8b", "Mixtral")), ("devices", ("h100", "GiB")),
                        ("scenarios", ("default", "trace-replay")),
                        ("policies", ("vllm-v1@0.19", "leaves out", "valid for", "least_outstanding"))):
        assert cli.main(["list", what]) == 0
        text = capsys.readouterr().out
        assert all(word in text for word in words), what
        assert max(map(len, text.splitlines())) <= 100
        assert cli.main(["list", what, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)


def test_listed_scenarios_all_load():
    names = list(cli._shipped())
    assert len(names) >= 8 and "default" in names
    for name in names:
        scenario = cli._load(name)
        assert scenario.name == name and scenario.description


def test_import_vllm_prints_a_scenario_that_loads(tmp_path, capsys):
    line = ["vllm", "serve", "m", "--max-num-seqs", "4"]
    assert cli.main(["import-vllm", "--device", "a100", "--", *line]) == 0
    out, err = capsys.readouterr()
    assert "note:" in err
    (tmp_path / "s.toml").write_text(out)
    scenario = Scenario.from_toml(tmp_path / "s.toml")
    assert (scenario.model.name, scenario.device.name, scenario.engine.max_num_seqs) == ("m", "a100", 4)


def test_schema_is_printed(capsys):
    assert cli.main(["schema"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(json_schema()))


def test_bench_hands_over(monkeypatch):
    import jaxsim.bench

    monkeypatch.setattr(jaxsim.bench, "command", lambda quick, as_json: 7 if (quick, as_json) == (True, False) else 1)
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
