"""Readers: rows become columns of the forms; what cannot be a measurement is refused with its row."""

import numpy as np
import pandas as pd
import pytest

from jaxsim._core.errors import InputError
from jaxsim.calibrate import families, fit, loads, tables
from jaxsim.cost.roofline import roofline
from jaxsim.spec.device import load_device
from jaxsim.spec.model import load_model
from tests.calibrate.synthetic import DEVICE, gemm_table
from tests.profiles.synthetic import profile_of

pytestmark = pytest.mark.unoptimised


def read(path, **changes):
    gemm_table(path, **changes)
    return tables.read("aiconfigurator", [path], DEVICE)


def test_products(tmp_path):
    found = read(tmp_path / "gemm.csv")
    o, = found.observations
    frame = pd.read_csv(tmp_path / "gemm.csv")
    assert o.family == "gemm.bf16" and (o.columns["m"] == frame["m"]).all() and o.place(3) == "gemm.csv row 4"
    assert o.seconds == pytest.approx(1e-3 * frame["latency_ms"].to_numpy())
    assert (o.columns["weight_bytes"] == 2 * frame["n"] * frame["k"]).all()
    assert len(found.digests["gemm.csv"]) == 64
    # The table was made with the constants that are there, and 5 % of noise.
    assert fit.errors_of(np.log(families.predicted(o, DEVICE, DEVICE.kernel_efficiency()) / o.seconds)).p90 < 0.12


def test_formats_without_a_form_are_left_out_and_said(tmp_path):
    count = len(gemm_table(tmp_path / "gemm.csv"))
    dtypes = np.where(np.arange(count) % 4 == 0, "int2", "bfloat16")
    found = read(tmp_path / "gemm.csv", gemm_dtype=dtypes)
    assert len(found.observations[0]) == (dtypes == "bfloat16").sum()
    assert found.notes == (f"gemm.csv: {count // 4} rows left out: no form for gemm_dtype int2",)


@pytest.mark.parametrize("changes, says", [
    ({"latency_ms": lambda f: -f.latency_ms}, "gemm.csv row 1, latency_ms = -"),
    ({"latency_ms": lambda f: f.latency_ms.where(f.index != 6)}, "gemm.csv row 7, latency_ms = nan: is not a finite"),
    ({"latency_ms": lambda f: f.latency_ms.where(f.index != 2, 0)}, "gemm.csv row 3, time = 0.0: is not positive"),
    ({"latency_ms": lambda f: f.latency_ms * 1e-3}, "shorter than any kernel; check the unit"),
    ({"m": lambda f: f.m.where(f.index != 4, 0)}, "gemm.csv row 5, m = 0.0: is less than 1"),
    ({"n": lambda f: f.n.where(f.index != 4, 0.5)}, "row 5, n = 0.5: is not a whole number"),
    ({"k": lambda f: f.k * 100}, "times what the datasheet peaks of h100_sxm_80 allow, as is half of gemm.bf16"),
    ({"speed": 3}, "column = 'speed': is not known"),
    ({"time_us": 3}, "has the time columns latency_ms, time_us"),
    ({"device": "NVIDIA H200"}, "gemm.csv row 1, device = 'NVIDIA H200': is h200_sxm_141, not h100_sxm_80"),
    ({"gemm_dtype": "int2"}, "hold no rows that a form is for; gemm.csv: 80 rows left out"),
])
def test_tables_that_cannot_be(tmp_path, changes, says):
    with pytest.raises(InputError) as told:
        read(tmp_path / "gemm.csv", **changes)
    assert says in str(told.value)


def test_missing_columns_and_empty_tables(tmp_path):
    path = tmp_path / "gemm.csv"
    gemm_table(path).drop(columns=["k"]).to_csv(path, index=False)
    with pytest.raises(InputError, match="lacks the column k"):
        tables.read("aiconfigurator", [path], DEVICE)
    gemm_table(path).head(0).to_csv(path, index=False)
    with pytest.raises(InputError, match="holds no rows"):
        tables.read("aiconfigurator", [path], DEVICE)
    path.write_text("")
    with pytest.raises(InputError, match="is empty"):
        tables.read("aiconfigurator", [path], DEVICE)
    (other := tmp_path / "x.csv").write_text("a\n1\n")
    with pytest.raises(InputError, match="write ROLE="):
        tables.read("aiconfigurator", [other], DEVICE)
    with pytest.raises(InputError, match="is not there"):
        tables.read("aiconfigurator", [tmp_path / "moe.csv"], DEVICE)
    with pytest.raises(InputError, match="did you mean 'aiconfigurator'"):
        tables.read("aiconfigurater", [path], DEVICE)
    with pytest.raises(InputError, match="no file is given"):
        tables.read("aiconfigurator", [], DEVICE)


def test_a_file_given_twice_or_two_of_one_name(tmp_path):
    for folder in ("a=b", "c"):
        (tmp_path / folder).mkdir()
        gemm_table(tmp_path / folder / "gemm.csv")
    (tmp_path / "c" / "gemm.csv").write_text((tmp_path / "c" / "gemm.csv").read_text().replace("H100", "h100"))
    first, other = tmp_path / "a=b" / "gemm.csv", tmp_path / "c" / "gemm.csv"
    assert tables.read("aiconfigurator", [first], DEVICE).observations
    with pytest.raises(InputError, match="is the same table as gemm.csv"):
        tables.read("aiconfigurator", [first, f"gemm={first}"], DEVICE)
    with pytest.raises(InputError, match="has the name of another file"):
        tables.read("aiconfigurator", [first, other], DEVICE)


def test_a_role_may_be_written_and_times_in_any_unit(tmp_path):
    frame = gemm_table(tmp_path / "x.csv")
    frame.drop(columns="latency_ms").assign(time_us=1e3 * frame["latency_ms"]).to_csv(tmp_path / "x.csv", index=False)
    o, = tables.read("aiconfigurator", [f"gemm={tmp_path / 'x.csv'}"], DEVICE).observations
    assert o.seconds == pytest.approx(1e-3 * frame["latency_ms"].to_numpy())


ATTENTION = {"batch_size": [4], "isl": [512], "num_heads": [32], "num_key_value_heads": [8], "head_dim": [128],
             "kv_cache_dtype": ["fp8"], "step": [0], "window_size": [0]}


@pytest.mark.parametrize("name, rows, family, expected", [
    ("context_attention", ATTENTION, "prefill", {"tokens": 2048, "chunks": 4, "pairs": 4 * 512 ** 2, "keys": 2048,
                                                 "cache_bytes": 1}),
    ("generation_attention", {**ATTENTION, "isl": [1], "step": [8191]}, "decode",
     {"sequences": 4, "context": 8192, "heads": 32, "kv_heads": 8, "window": 0}),
    ("moe", {"moe_dtype": ["fp8"], "num_tokens": [64], "hidden_size": [4096], "inter_size": [1536], "topk": [8],
             "num_experts": [128], "moe_tp_size": [2], "moe_ep_size": [4], "distribution": ["balanced"]}, "experts.fp8",
     {"tokens": 64, "inner": 768, "ranks": 4, "number_bytes": 1}),
    ("nccl", {"op_name": ["alltoall"], "nccl_dtype": ["half"], "num_gpus": [8], "message_size": [1 << 24]},
     "nccl.all_to_all", {"ranks": 8, "message_bytes": 2 << 24}),
    ("custom_allreduce", {"num_gpus": [4], "message_size": [1 << 16], "backend": ["vllm_graph"]}, "custom_all_reduce",
     {"ranks": 4, "message_bytes": 2 << 16}),
    ("mla_generation_module", {"batch_size": [4], "kv_cache_dtype": ["fp8"], "isl": [1], "step": [4096],
                               "num_heads": [16], "gemm_type": ["fp8_block"]}, "latent",
     {"heads": 16, "length": 4096, "narrow": 1, "is_prefill": 0, "latent": 512, "query_rank": 1536}),
])
def test_every_role(tmp_path, name, rows, family, expected):
    path = tmp_path / f"{name}.csv"
    pd.DataFrame({**rows, "latency_ms": [1.0]}).to_csv(path, index=False)
    o, = tables.read("aiconfigurator", [path], DEVICE).observations
    assert o.family == family
    assert {k: o.columns[k].tolist() for k in expected} == {k: [v] for k, v in expected.items()}
    assert np.isfinite(families.predicted(o, DEVICE, DEVICE.kernel_efficiency())).all()


def test_rows_known_to_be_wrong_are_left_out_and_said(tmp_path):
    rows = {k: v * 4 for k, v in ATTENTION.items()} | {"window_size": [0, 128, 0, 0], "num_heads": [16, 16, 32, 16]}
    path = tmp_path / "context_attention.csv"
    pd.DataFrame({**rows, "latency_ms": 1.0}).to_csv(path, index=False)
    found = tables.read("aiconfigurator", [path], load_device("h200"))
    assert found.observations[0].rows.tolist() == [1, 4]
    assert len(found.notes) == 2 and "did not apply the window" in found.notes[0]


def layers(base_model="llama-3.1-8b", names=("qkv", "norms", "attention_decode", "attention_prefill", "embedding")):
    return profile_of(roofline(load_model(base_model), DEVICE), names, factor=lambda _: 1.0)


def plain(path, profile):
    pd.DataFrame([{"operator": t.name, **dict(zip(t.axes, point, strict=True)), "time_us": 1e6 * seconds}
                  for t in profile.tables.values() for point, seconds in zip(t.points, t.seconds, strict=True)]
                 ).to_csv(path, index=False)


def test_layers_of_a_model(tmp_path):
    """A plain table that the roofline made is what the forms predict, to the last operator."""
    (tmp_path / "a=b").mkdir()
    plain(path := tmp_path / "a=b" / "ops.csv", layers())
    found = tables.read("plain", [path], DEVICE, model="llama-3.1-8b")
    assert list(found.digests) == ["ops.csv"] and "do not say which device" in found.notes[0]
    by = {o.family: o for o in found.observations}
    assert set(by) == {"gemm.bf16", "elementwise", "decode", "prefill"}
    assert set(zip(by["gemm.bf16"].columns["n"], by["gemm.bf16"].columns["k"], strict=True)) == {(6144, 4096)}
    for o in by.values():
        assert families.predicted(o, DEVICE, DEVICE.kernel_efficiency()) == pytest.approx(o.seconds, rel=2e-3), o.family
    assert any("no form is fitted to embedding" in note for note in found.notes)
    assert (by["elementwise"].columns["bytes"] <= tables.CACHED_BYTES).all()


def test_layers_need_a_model(tmp_path):
    plain(path := tmp_path / "ops.csv", layers())
    with pytest.raises(InputError, match="--model = None: is needed"):
        tables.read("plain", [path], DEVICE)


def test_loads():
    """Routed rows are neither lost nor made, whatever the law; a balanced load is even."""
    rng = np.random.default_rng(0)
    for tokens, num_experts, per_token in ((100, 128, 8), (4096, 256, 8)):
        for spread in (False, True):
            x = loads.power_law(tokens, num_experts, per_token, 1.2, rng, spread)
            assert x.sum() == pytest.approx(tokens * per_token, rel=0.02) and x.max() <= tokens and x.min() >= 0
    assert loads.tiles(64, 128, 8, 4, "balanced")[:3] == (32.0, 128.0, 32.0)
    touched, pairs, *tiles = loads.tiles(4096, 128, 8, 4, "power_law_1.2")
    assert 1 <= touched <= 32 and tiles == sorted(tiles, reverse=True)
    # The busiest rank has more than its share, in tiles of 8 rows at least.
    assert tiles[0] * 8 >= 4096 * 8 / 4
    assert pairs >= 4096 * 8 / 4
    assert loads.tiles(4096, 128, 8, 4, "power_law_1.2") == (touched, pairs, *tiles)
