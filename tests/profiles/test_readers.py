"""Readers: what they make of small files, and what they refuse."""

import numpy as np
import pandas as pd
import pytest

from jaxsim._core.errors import InputError
from jaxsim.profiles import _table, aiconfigurator, llmservingsim, plain, vidur
from jaxsim.spec.plan import Plan
from tests.profiles.synthetic import layer_files


def at(profile, name, *point):
    table = profile.tables[name]
    return float(table.seconds[(table.points == np.asarray(point, float)).all(axis=1)].item())


# LLMServingSim


def test_layer_profile(tmp_path):
    dense, attention, experts, meta = layer_files(tmp_path)
    profile = llmservingsim.read(dense, attention, experts, meta)
    assert (profile.model, profile.device, profile.dtype) == ("some/model", "Some GPU", "bfloat16")
    assert profile.provenance["vllm_version"] == "0.19.0"
    assert at(profile, "qkv", 8) == pytest.approx(10.8e-6)
    assert at(profile, "norms", 8) == pytest.approx(2 * 10.8e-6), "two norms a layer"
    assert at(profile, "lm_head", 64) == pytest.approx(564e-6)
    assert at(profile, "attention_decode", 8, 1024) == pytest.approx((8 + 0.01 * 8 * 1024) * 1e-6)
    assert at(profile, "attention_prefill", 256, 2 * 512 + 256) == pytest.approx((9 + 0.02 * 768) * 1e-6)
    assert at(profile, "attention_mixed", 16, 16, 8, 16) == pytest.approx((12 + 0.32 + 0.02 * 128) * 1e-6)
    assert at(profile, "experts_touched", 8, 16) == pytest.approx(116e-6)
    assert at(llmservingsim.read(dense, tensor_parallel_size=2), "qkv", 1) == pytest.approx(6e-6)


def change(path, edit):
    frame = pd.read_csv(path)
    edited = edit(frame)
    (frame if edited is None else edited).to_csv(path, index=False)


@pytest.mark.parametrize("edit, field, value, says", [
    (lambda f: f.__setitem__("extra", 1), "column", "extra", "is not known"),
    (lambda f: f.__setitem__("time_us", f["time_us"].where(f.index != 4, -3.0)), "row 5, time_us", -3.0, "negative"),
    (lambda f: f.__setitem__("time_us", f["time_us"].where(f.index != 4, np.nan)), "row 5, time_us", np.nan, "finite"),
    (lambda f: f.__setitem__("size", f["size"].where(f.index != 2, 1.5)), "row 3, size", 1.5, "whole"),
    (lambda f: f.__setitem__("layer", f["layer"].where(f.index != 1, "qkvproj")), "row 2, layer", "qkvproj",
     "qkv_proj"),
    (lambda f: f.__setitem__("time_us", f["time_us"] * 1e-3), "row 1, qkv seconds", None, "unit"),
    (lambda f: f.__setitem__("time_us", f["time_us"] * 1e6), "qkv seconds", None, "unit"),
    (lambda f: f.rename(columns={"time_us": "time"}), "profile", None, "lacks the column time_us"),
    (lambda f: f.iloc[:0], "profile", None, "no rows"),
])
def test_bad_layer_tables_are_refused(tmp_path, edit, field, value, says):
    dense = layer_files(tmp_path)[0]
    change(dense, edit)
    with pytest.raises(InputError) as info:
        llmservingsim.read(dense)
    assert field in info.value.field and says in str(info.value)
    assert "dense.csv" in info.value.field or "dense.csv" in str(info.value.value)
    assert info.value.remedy
    if value is not None and value == value:
        assert info.value.value == value


def test_a_degree_that_was_not_measured_is_named(tmp_path):
    with pytest.raises(InputError, match="measured: 1, 2"):
        llmservingsim.read(layer_files(tmp_path)[0], tensor_parallel_size=4)


def test_files_that_are_not_there_or_empty(tmp_path):
    layer_files(tmp_path)
    with pytest.raises(InputError, match="did you mean 'dense.csv'"):
        llmservingsim.read(tmp_path / "dens.csv")
    (tmp_path / "nothing.csv").write_text("")
    with pytest.raises(InputError, match="is empty"):
        llmservingsim.read(tmp_path / "nothing.csv")


# Tables of any kind


@pytest.mark.parametrize("name, content, says", [
    ("a.csv.gz", b"\x1f\x8bnot packed", "cannot be read"), ("a.csv.xz", b"\xfd7zXZ\x00no", "cannot be read"),
    ("a.csv.zip", b"PK no", "cannot be read"), ("a.parquet", b"PAR1 no", "cannot be read"),
    ("a.csv", b"x\xff\xfe\n1\n", "cannot be read"), ("a.csv", b"", "is empty"), ("a.csv", b"x,y\n1,2,3\n", "cannot be"),
    ("a.csv", b"x,y,x \n1,2,3\n", "has the column x 2 times"), ("a.csv", b"y\n1\n", "lacks the column x; found y"),
    ("a.csv", b"x;y\n1;2\n", "separated by semicolons: use commas"),
    ("a.csv", b"x\ty\n1\t2\n", "separated by tabs"), ("a.csv", b"x,y\n", "holds no rows"),
])
def test_tables_that_cannot_be_read(tmp_path, name, content, says):
    (path := tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=says) as info:
        _table.read(path, ["x"])
    assert name in str(info.value) and len(str(info.value).splitlines()) == 1


def test_tables_in_other_clothes(tmp_path):
    (tmp_path / "A.CSV").write_text("\ufeff x ,y,\n7,2,\n\n3,4,\n2,2,\n")
    frame = _table.read(tmp_path / "A.CSV", ["x", "y"])
    assert frame["x"].tolist() == [7, 3, 2] and frame.index.tolist() == [1, 2, 3]
    # What was an index comes back as a column.
    frame[["x", "y"]].set_index("x").to_parquet(tmp_path / "A.PARQUET")
    assert _table.read(tmp_path / "A.PARQUET", ["x", "y"])["x"].tolist() == [7, 3, 2]


@pytest.mark.parametrize("values, says", [
    (pd.to_datetime(["2024-01-01"]), "is of the type datetime64"), (pd.to_timedelta([3], unit="s"), "timedelta64"),
    ([True], "is of the type bool"), ([[1, 2]], "is not a finite number"), ([2.0 ** 31], "is above 2147483647"),
    ([np.inf], "is not a finite number"), ([-1], "is negative"), ([0.5], "is not a whole number"),
])
def test_what_is_no_count(values, says):
    with pytest.raises(InputError, match="of row 1, x = .*" + says):
        _table.column(pd.DataFrame({"x": values}, index=[1]), "x", "of", is_whole=True)


# plain


def test_plain(tmp_path):
    path = tmp_path / "ops.csv"
    path.write_text("operator,tokens,sequences,context_tokens,chunk_tokens,history_tokens,time_us\n"
                    "qkv,1,,,,,35.5\nqkv,64,,,,,40\nattention_decode,,8,1024,,,36.5\n"
                    "attention_prefill,,,,256,512,22\nhost_step,,4,,,,900\n")
    profile = plain.read(path, model="some/model", tensor_parallel_size=2, provenance={"engine": "mine 1.0"})
    assert at(profile, "qkv", 64) == pytest.approx(40e-6)
    assert at(profile, "attention_decode", 8, 1024) == pytest.approx(36.5e-6)
    assert at(profile, "attention_prefill", 256, 1280) == pytest.approx(22e-6)
    assert profile.tensor_parallel_size == 2 and profile.provenance["engine"] == "mine 1.0"


@pytest.mark.parametrize("text, says", [
    ("operator,tokens,time_us\nqvk,1,35\n", "row 1, operator = 'qvk': is not known; did you mean 'qkv'"),
    ("operator,time_us\nqkv,35\n", "is a column this operator needs"),
    ("operator,tokens,time_us\nqkv,,35\n", "row 1, tokens"),
    ("operator,tokens\nqkv,1\n", "has no time column"),
    ("operator,tokens,time_us,time_ms\nqkv,1,35,1\n", "has the time columns time_ms, time_us"),
    ("operator,tokens,time_us\n", "no rows"),
    ("operator,tokens,time_us\nqkv,1,0\n", "must be positive"),
    ("operator,tokens,time_us\nqkv,1,35\nqkv,-2,35\n", "row 2, tokens = -2: is negative"),
])
def test_bad_plain_tables_are_refused(tmp_path, text, says):
    path = tmp_path / "ops.csv"
    path.write_text(text)
    with pytest.raises(InputError) as info:
        plain.read(path)
    assert says in str(info.value) and "ops.csv" in str(info.value)


# aiconfigurator


def family(folder, name, columns, rows):
    path = folder / f"{name}.parquet"
    pd.DataFrame(rows, columns=columns.split()).to_parquet(path)
    return path


def test_aiconfigurator(tmp_path):
    # Llama-3.1-8B on 2 ranks: qkv is 3072 columns of 4096 rows, which lie between the measured 2048 and 4096.
    gemm = family(tmp_path, "gemm", "gemm_dtype m n k latency_ms", [
        ("bfloat16", m, n, k, 1e-9 * n * k + 1e-4 * m) for m in (1, 64) for n in (2048, 4096, 65536)
        for k in (2048, 4096, 8192)])
    heads = "batch_size isl num_heads num_key_value_heads head_dim kv_cache_dtype step window_size latency_ms"
    context = family(tmp_path, "context", heads, [
        (b, s, 16, 4, 128, "bfloat16", 0, 0, 0.01 + 1e-6 * b * s) for b in (1, 4) for s in (16, 1024)])
    generation = family(tmp_path, "generation", heads, [
        (b, 1, 16, 4, 128, "bfloat16", step, 0, 0.01 + 1e-6 * b * step) for b in (1, 4) for step in (15, 1023)])
    reduce = family(tmp_path, "reduce", "num_gpus message_size latency_ms backend", [
        (2, size, 0.005 + 1e-8 * size, "vllm_graph") for size in (128, 1 << 20)])
    profile = aiconfigurator.read("llama-3.1-8b", Plan(tensor_parallel_size=2), gemm=gemm, context_attention=context,
                                  generation_attention=generation, custom_allreduce=reduce)
    assert at(profile, "qkv", 64) == pytest.approx(1e-3 * (1e-9 * 3072 * 4096 + 6.4e-3), rel=1e-6)
    assert at(profile, "attention_prefill", 4096, 1024) == pytest.approx(1e-3 * (0.01 + 4096e-6))
    assert at(profile, "attention_decode", 4, 1024) == pytest.approx(1e-3 * (0.01 + 4 * 1023e-6))
    assert at(profile, "all_reduce", 2 << 20) == pytest.approx(1e-3 * (0.005 + 1e-8 * (1 << 20)), rel=1e-5)
    assert profile.tensor_parallel_size == 2
    with pytest.raises(InputError, match="num_heads = 32: was not measured"):
        aiconfigurator.read("llama-3.1-8b", context_attention=context)
    with pytest.raises(InputError, match="gemm_dtype = 'fp8': was not measured"):
        aiconfigurator.read("llama-3.1-8b", gemm=gemm, dtype="fp8")
    with pytest.raises(InputError, match="no file is given"):
        aiconfigurator.read("llama-3.1-8b")
    # All rows of all files have to be of one device.
    for path, names in ((context, ["NVIDIA H100 80GB HBM3"]), (reduce, ["h100", "NVIDIA A100-SXM4-80GB"])):
        frame = pd.read_parquet(path)
        frame.assign(device=np.resize(names, len(frame))).to_parquet(path)
    with pytest.raises(InputError, match="reduce.parquet, device = 'NVIDIA A100.*is not the device of context"):
        aiconfigurator.read("llama-3.1-8b", Plan(tensor_parallel_size=2), gemm=gemm, context_attention=context,
                            custom_allreduce=reduce)


# Vidur


def test_vidur(tmp_path):
    operators = tmp_path / "linear.csv"
    pd.DataFrame([("a100", "llama-2-7b", m, 1, 0.05 + 1e-4 * m, 0.03, 0.004, 0.005) for m in (1, 64, 64)],
                 columns="gpu model num_tokens tp attn_pre_proj_ms mlp_up_proj_ms input_layernorm_ms "
                         "post_attention_layernorm_ms".split()).to_csv(operators, index=False)
    host = tmp_path / "cpu.csv"
    pd.DataFrame([("llama-2-7b", 8, 1, 0.2, 0.5, 0.6, 0.1)],
                 columns=["model_name", "batch_size", "tensor_parallel_degree", *vidur.HOST]).to_csv(host, index=False)
    profile = vidur.read(operators, cpu_overheads=host, gpu="a100")
    assert at(profile, "qkv", 64) == pytest.approx(56.4e-6)
    assert at(profile, "norms", 64) == pytest.approx(9e-6)
    assert at(profile, "host_step", 8) == pytest.approx(1.4e-3)
    assert (profile.device, profile.model) == ("a100", "llama-2-7b")
    with pytest.raises(InputError, match="gpu = 'h100': was not measured; measured: a100"):
        vidur.read(operators, gpu="h100")
