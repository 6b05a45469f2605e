"""`jaxsim import-profile`: every format becomes one file that a scenario can name; mistakes are one line."""

import json

import pandas as pd
import pytest

from jaxsim import cli
from jaxsim.cost.roofline import roofline
from jaxsim.profiles import READERS, importing, read
from jaxsim.spec.device import load_device
from jaxsim.spec.model import load_model
from tests.profiles.synthetic import COUNTS, layer_files, profile_of

pytestmark = pytest.mark.unoptimised

SYSTEM = ("--model", "llama-3.1-8b", "--device", "h100")


def imported(capsys, tmp_path, *arguments):
    """The profile a command wrote, and what it printed."""
    out = tmp_path / "made.parquet"
    status = cli.main(["import-profile", *map(str, arguments), "--out", str(out)])
    printed = capsys.readouterr()
    assert status == 0, printed.err
    return read(out), printed.out


def refused(capsys, *arguments) -> str:
    """The one line on standard error of a command that ends with status 2."""
    assert cli.main(["import-profile", *map(str, arguments)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("jaxsim: error: ") and err.count("\n") == 1
    return err


@pytest.fixture
def table(tmp_path):
    """A plain table of three operators on an H100."""
    base = roofline(load_model("llama-3.1-8b"), load_device("h100"))
    profile = profile_of(base, ("qkv", "ffn_up", "attention_decode"))
    rows = [{"operator": t.name, **dict(zip(t.axes, point, strict=True)), "time_us": 1e6 * seconds}
            for t in profile.tables.values() for point, seconds in zip(t.points, t.seconds, strict=True)]
    path = tmp_path / "ops.csv"
    pd.DataFrame(rows).to_csv(path, index=False)
    return path


def test_plain(table, tmp_path, capsys):
    profile, out = imported(capsys, tmp_path, "plain", table, *SYSTEM, "--option", "dtype=bf16")
    assert set(profile.tables) == {"qkv", "ffn_up", "attention_decode"}
    assert (profile.model, profile.device, profile.dtype) == (
        "meta-llama/Llama-3.1-8B", load_device("h100").name, "bf16")
    assert profile.provenance["files"] == ["ops.csv"] and len(profile.provenance["sha256"]["ops.csv"]) == 64
    assert profile.provenance["options"] == {"dtype": "bf16"}
    assert "3 operators" in out and "not measured, priced by the roofline: embedding" in out
    assert "attention_prefill" in out and "attention_decode" not in out.split("roofline:")[1]


def test_a_scenario_runs_on_what_was_imported(table, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    imported(capsys, tmp_path, "plain", table, *SYSTEM)
    (tmp_path / "s.toml").write_text(
        'schema_version = 1\nnum_seeds = 1\nmodel.name = "llama-3.1-8b"\ndevice.name = "h100"\n'
        'workload = {kind = "poisson", rate_rps = 5.0, num_requests = 20, input = 100, output = 20}\n'
        'cost = {kind = "profiled", path = "made.parquet"}\n')
    assert cli.main(["run", str(tmp_path / "s.toml"), "--json", "--no-plots", "--out", "out"]) == 0
    content = json.loads(capsys.readouterr().out)
    # Neither attention_output nor ffn_down nor the head were measured.
    assert 0.1 < content["cost"]["extrapolated_share"] < 0.9
    assert cli.main(["run", "s.toml", "--set", "cost.path=none.parquet", "--out", "out"]) == 2
    assert "cost.path = " in (err := capsys.readouterr().err) and "is not there" in err


def test_layer_timings(tmp_path, capsys):
    dense, attention, _, meta = layer_files(tmp_path)
    # The driver's name is not in the catalogue, the profiler's own is.
    meta.write_text(meta.read_text() + "hardware: H100\n")
    profile, _ = imported(capsys, tmp_path, "llmservingsim", dense, attention, meta, *SYSTEM)
    assert profile.provenance["called"] == {"model": "some/model", "device": "H100"}
    assert "call their model some/model, which is not in the catalogue" in profile.provenance["notes"][0]
    assert profile.kv_dtype == "bfloat16"
    assert profile.provenance["vllm_version"] == "0.19.0"
    assert {"qkv", "attention_mixed"} <= set(profile.tables)
    (tmp_path / "x.csv").write_text(dense.read_text())
    same, _ = imported(capsys, tmp_path, "llmservingsim", f"dense={tmp_path / 'x.csv'}", *SYSTEM)
    assert (same.tables["qkv"].seconds == profile.tables["qkv"].seconds).all()


def test_operator_tables_of_another_simulator(tmp_path, capsys):
    rows = [("a100", "meta-llama/Llama-2-7b-hf", m, 1, 0.05 + 1e-3 * m, 0.1 + 2e-3 * m) for m in COUNTS]
    rows += [("h100", *row[1:]) for row in rows]
    path = tmp_path / "linear_ops.csv"
    pd.DataFrame(rows, columns="gpu model num_tokens tp attn_pre_proj_ms mlp_up_proj_ms".split()).to_csv(
        path, index=False)
    system = ("--model", "llama-2-7b", "--device")
    profile, _ = imported(capsys, tmp_path, "vidur", path, *system, "a100")
    assert profile.device == load_device("a100").name and set(profile.tables) == {"qkv", "ffn_up"}
    err = refused(capsys, "vidur", path, *system, "h200", "--out", tmp_path / "o")
    assert "was not measured; measured: a100, h100" in err


def test_kernel_tables(tmp_path, capsys):
    rows = [("bfloat16", m, n, k, 1e-9 * n * k + 1e-5 * m + 0.005) for m in (1, 64, 1024) for n in (2048, 8192, 65536)
            for k in (2048, 8192, 16384)]
    path = tmp_path / "gemm_perf.parquet"
    pd.DataFrame(rows, columns="gemm_dtype m n k latency_ms".split()).to_parquet(path)
    profile, _ = imported(capsys, tmp_path, "aiconfigurator", path, *SYSTEM, "--tensor-parallel-size", "2")
    assert profile.tensor_parallel_size == 2 and {"qkv", "ffn_down", "lm_head"} <= set(profile.tables)
    assert "fp8: was not measured" in refused(
        capsys, "aiconfigurator", path, *SYSTEM, "--option", "dtype=fp8", "--out", tmp_path / "o").replace("'", "")


@pytest.mark.parametrize("arguments, says", [
    (("plain", "none.csv", *SYSTEM), "is not there"),
    (("plian", "ops.csv", *SYSTEM), "did you mean 'plain'"),
    (("plain", "ops.csv", "ops.csv", *SYSTEM), "is a second file for path"),
    (("llmservingsim", "ops.csv", *SYSTEM), "write ROLE=ops.csv, with ROLE one of attention, dense"),
    (("llmservingsim", "meta=ops.csv", *SYSTEM), "lacks the file of the role 'dense'"),
    (("plain", "ops.csv", "--model", "llama-9", "--device", "h100"), "model.name = 'llama-9'"),
    (("plain", "ops.csv", "--model", "llama-3.1-8b", "--device", "h1000"), "device.name = 'h1000'"),
    (("plain", "ops.csv", *SYSTEM, "--tensor-parallel-size", "0"), "--tensor-parallel-size = 0"),
    (("plain", "ops.csv", *SYSTEM, "--option", "dtyp=fp8"), "did you mean 'dtype'"),
    (("plain", "ops.csv", *SYSTEM, "--option", "dtype=8"), "give text"),
    (("plain", "ops.csv", *SYSTEM, "--option", "dtype"), "is not NAME=VALUE"),
    (("plain", "ops.csv", *SYSTEM, "--option", "model=x"), "is not one of the format plain; it has dtype, kv_dtype"),
    (("plain", "ops.csv", *SYSTEM, "--option", "dtype=fb8"), "profile option dtype = 'fb8': is not a weight format"),
    (("plain", "ops.csv", *SYSTEM, "--option", "kv_dtype=fp9"), "did you mean 'fp8'"),
    (("llmservingsim", "dense.csv", "moe.csv", *SYSTEM), "is an operator of experts, and meta-llama/Llama-3.1-8B has"),
    (("llmservingsim", "dense.csv", "meta.yaml", *SYSTEM), "profile.device = 'Some GPU': is not in the catalogue"),
    (("llmservingsim", "dense.csv", "meta=a100.yaml", *SYSTEM), "profile.device = 'A100': is not h100_sxm_80"),
    (("llmservingsim", "dense.csv", "meta=two.yaml", *SYSTEM), "hardware, device = 'A100': is not the device"),
    (("llmservingsim", "dense.csv", "meta=empty.yaml", *SYSTEM), "says neither model nor gpu nor hardware"),
    (("llmservingsim", "dense.csv", "meta=attention.parquet", *SYSTEM), "cannot be read as text"),
    (("llmservingsim", "dense.csv", "attention=dense.csv", *SYSTEM), "is the same table as dense.csv"),
    (("plain", "off.csv", *SYSTEM), "check the unit"),
])
def test_mistakes(table, tmp_path, capsys, monkeypatch, arguments, says):
    monkeypatch.chdir(tmp_path)
    frame = pd.read_csv(table)
    frame.assign(time_us=1e3 * frame["time_us"]).to_csv("off.csv", index=False)
    layer_files(tmp_path)
    for name, text in (("a100", "gpu: A100"), ("two", "gpu: H100\nhardware: A100"), ("empty", "vllm_version: 1")):
        (tmp_path / f"{name}.yaml").write_text(text + "\n")
    assert says in refused(capsys, *arguments, "--out", "o.parquet")
    assert not (tmp_path / "o.parquet").exists() and not list(tmp_path.glob(".o*"))


def test_what_files_do_not_say_is_noted(table, tmp_path, capsys):
    assert cli.main(["import-profile", "plain", str(table), *SYSTEM, "--out", str(tmp_path / "a=b.parquet")]) == 0
    err = capsys.readouterr().err
    assert "note: the files do not say which device they were measured on: taken for h100_sxm_80" in err
    assert "which model they were measured on" in err
    profile = read(tmp_path / "a=b.parquet")
    assert profile.kv_dtype == "bfloat16" and profile.provenance["called"] == {"model": "", "device": ""}


def test_a_place_that_cannot_be_written(table, tmp_path, capsys):
    assert "--out" in refused(capsys, "plain", table, *SYSTEM, "--out", tmp_path / "none" / "o.parquet")
    assert "--out" in refused(capsys, "plain", table, *SYSTEM, "--out", tmp_path)


def test_every_reader_has_roles_and_a_line_of_help(capsys):
    assert set(importing.ROLES) == set(READERS)
    with pytest.raises(SystemExit):
        cli.main(["import-profile", "--help"])
    text = capsys.readouterr().out
    assert all(name in text for name in READERS)
    assert all(role in text for name, roles in importing.ROLES.items() if name != "plain" for role in roles)


# Measured data


@pytest.mark.parametrize("arguments, named", [
    (("llmservingsim", "vllm019_dense_rtxpro6000_llama31_8b.csv", "vllm019_attention_rtxpro6000_llama31_8b.parquet",
      "vllm019_attention_skew_rtxpro6000_llama31_8b.parquet", "vllm019_meta_rtxpro6000_llama31_8b.yaml",
      "--model", "llama-3.1-8b", "--device", "rtx_pro_6000"), "qkv attention_mixed sampler"),
    (("llmservingsim", "vllm019_dense_rtxpro6000_qwen3_30b_a3b.csv", "vllm019_moe_rtxpro6000_qwen3_30b_a3b.csv",
      "vllm019_meta_rtxpro6000_qwen3_30b_a3b.yaml", "--model", "qwen3-30b-a3b", "--device", "rtx_pro_6000"),
     "experts_touched"),
    (("aiconfigurator", "aic_h100_sxm_vllm0.19.0_gemm.parquet", "aic_h100_sxm_vllm0.19.0_context_attention.parquet",
      "aic_h100_sxm_vllm0.19.0_generation_attention.parquet", "aic_h100_sxm_vllm0.19.0_custom_allreduce.parquet",
      "--model", "llama-3.1-70b", "--device", "h100", "--tensor-parallel-size", "4"),
     "lm_head attention_prefill all_reduce"),
    (("vidur", "vidur_linear_ops.parquet", "vidur_collectives.csv", "vidur_cpu_overheads.csv",
      "--model", "llama-2-70b", "--device", "a100", "--tensor-parallel-size", "4"), "host_step all_reduce"),
])
def test_published_profiles(shared_data, tmp_path, capsys, arguments, named):
    files = [shared_data / "ops" / name if name.endswith((".csv", ".parquet", ".yaml")) else name
             for name in arguments]
    if not all(file.exists() for file in files if hasattr(file, "exists")):
        pytest.skip("not in the measured data")
    profile, _ = imported(capsys, tmp_path, *files)
    assert set(named.split()) <= set(profile.tables)
    assert profile.model == load_model(profile.model).name and profile.device == load_device(profile.device).name
