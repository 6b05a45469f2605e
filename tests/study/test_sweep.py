"""Sweeps: the same numbers as runs one by one, the same bytes after any interruption."""

import concurrent.futures
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from jaxsim import cli
from jaxsim._core.errors import InputError
from jaxsim.engine.simulate import simulate
from jaxsim.metrics import combine, flatten
from jaxsim.study import results, runner
from jaxsim.study.lanes import Lanes, ladder
from jaxsim.study.plan import plan
from jaxsim.study.study import Study

BASE = {
    "schema_version": 1, "model": {"name": "llama-3.1-8b"}, "device": {"name": "h100"},
    "engine": {"max_model_len": 65536}, "slo": {"ttft_ms": 100.0, "tpot_ms": 20.0}, "num_seeds": 2,
    "workload": {"kind": "poisson", "rate_rps": 4.0, "num_requests": 60, "input": {
        "kind": "uniform", "min_tokens": 100, "max_tokens": 900},
        "output": {"kind": "uniform", "min_tokens": 1, "max_tokens": 40}}}
AXES = {"workload.rate_rps": [2.0, 40.0], "engine.max_num_seqs": [4, 16], "device.name": ["h100", "a100", "rtx_4090"],
        "model.dtype": ["auto", "fp8"]}
WHERE = ["device.name != 'a100' or model.dtype == 'auto'"]


def small(**fields) -> Study:
    return Study.from_dict({"schema_version": 1, "scenario": BASE, "axes": AXES, "where": WHERE, **fields})


@pytest.fixture(scope="module")
def swept(tmp_path_factory) -> tuple[Study, Path]:
    folder = tmp_path_factory.mktemp("sweep") / "out"
    study = small()
    runner.sweep(study, folder, workers=2, runs_a_tile=8)
    return study, folder


def test_table_equals_runs_one_by_one(swept):
    """Every metric of every scenario, and what was refused with its arithmetic."""
    study, folder = swept
    frame, points = results.load(folder), list(study.points())
    assert len(frame) == len(points) == 20
    is_refused = frame["refused"].notna()
    # 16-bit weights leave an RTX 4090 too little room, a100 runs one format only.
    assert is_refused.sum() > 0 and frame[is_refused]["device.name"].eq("rtx_4090").all()
    assert frame[is_refused]["refused"].str.contains("GiB").all() and frame[is_refused]["mean_ttft_ms"].isna().all()
    kept = [study.scenario_at(points[k]) for k in np.flatnonzero(~is_refused)]
    expected = simulate(kept)
    for row, runs in zip(frame[~is_refused].to_dict("records"), expected.runs, strict=True):
        means, intervals = combine(runs)
        for name, value in flatten(means).items():
            if name.startswith("slo.") and not name.endswith("attainment") or name == "cost.extrapolated_share":
                continue
            got = row[name]
            if value is None:
                assert got is None or got != got, name
            elif isinstance(value, (bool, str)):
                assert got == value, name
            else:
                assert got == pytest.approx(value, rel=1e-9, abs=1e-9), name
        for name, ends in intervals.items():
            if ends is not None and name + results.HALF_WIDTH in row:
                half = row[name + results.HALF_WIDTH]
                assert half == pytest.approx((ends[1] - ends[0]) / 2, rel=1e-6, abs=1e-9), name


def test_columns_have_units_and_provenance(swept):
    study, folder = swept
    schema = pq.read_schema(folder / results.TABLE)
    assert schema.field("mean_ttft_ms").metadata[b"unit"] == b"ms"
    assert schema.field("workload.rate_rps").metadata[b"unit"] == b"1/s"
    assert schema.metadata[b"jaxsim"] == results.FORMAT.encode()
    assert json.loads(schema.metadata[b"study"])["study"]["axes"]["engine.max_num_seqs"] == [4, 16]
    runs = results.load(folder, runs=True)
    assert len(runs) == 2 * results.load(folder)["refused"].isna().sum()
    assert {"seed", "workload.rate_rps", "mean_ttft_ms"} <= set(runs.columns)


def test_resumes_to_the_same_bytes(swept, tmp_path):
    """Tiles that are there are not run again; nor does it matter who ran which, or how they were cut."""
    study, folder = swept
    before = (folder / results.TABLE).read_bytes()
    tiles = sorted((folder / results.TILES).iterdir())
    assert len(tiles) > 2
    stamp = tiles[0].stat().st_mtime_ns
    tiles[1].unlink()
    (folder / results.TILES / ".leftover.1.part").write_bytes(b"half a tile")
    (folder / results.TABLE).unlink()

    class Counting(concurrent.futures.ThreadPoolExecutor):
        submitted = 0

        def submit(self, *args, **kwargs):
            Counting.submitted += 1
            return super().submit(*args, **kwargs)

    with Counting(1) as executor:
        runner.sweep(study, folder, executor=executor, runs_a_tile=8)
    assert Counting.submitted == 1 and tiles[0].stat().st_mtime_ns == stamp
    assert (folder / results.TABLE).read_bytes() == before
    # Another cut of the same study: the same numbers, bit for bit.
    one = results.load(folder).drop(columns="refused")
    runner.sweep(study, tmp_path / "other", workers=1, runs_a_tile=24)
    pd.testing.assert_frame_equal(one, results.load(tmp_path / "other").drop(columns="refused"), check_exact=True)


def test_programs_are_shared():
    """Limits, rates and devices of one kind are numbers of a program; a ladder of slots keeps it so."""
    lanes = Lanes()
    made = plan(small(axes={"workload.rate_rps": [1.0, 2.0, 3.0], "engine.max_num_seqs": [4, 8, 16, 60],
                            "device.name": ["h100", "h200"], "engine.preset": ["vllm-v1", "sarathi"]}, where=[]), lanes)
    assert made.num_programs == 2 and made.num_runs == 96 and not made.refusals
    assert sorted(p for tile in made.tiles for p in tile.points) == list(range(48))
    assert ladder([8, 64, 512, 4096]) == [64, 64, 4096, 4096]
    assert made.tiles[0].name("1") != made.tiles[1].name("1") != made.tiles[1].name("2")


def test_folders_are_of_one_study(swept, tmp_path):
    _, folder = swept
    with pytest.raises(InputError, match="another study"):
        runner.sweep(small(num_seeds=3), folder)
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(InputError, match="no study's"):
        runner.sweep(small(), tmp_path)
    with pytest.raises(InputError, match="no finished study"):
        results.load(tmp_path)


def test_full_disk_keeps_what_is_done(tmp_path, monkeypatch):
    def full(path, content):
        if path.suffix == ".parquet":
            raise OSError(28, "No space left on device")
        path.write_bytes(content)

    monkeypatch.setattr(runner, "replace", full)
    monkeypatch.setattr(runner, "run_tile", lambda tile: b"")
    with pytest.raises(InputError, match="No space left.*kept"):
        runner.sweep(small(), tmp_path / "out", runs_a_tile=8)


def test_more_than_the_machine_is_refused_before_the_run(tmp_path, monkeypatch):
    about = runner.estimate(plan(small(), Lanes()))
    monkeypatch.setattr(runner, "memory_bytes", lambda: about["tile_bytes"])
    with pytest.raises(InputError, match="tiles of [1-9][0-9]* runs would fit"):
        runner.sweep(small(), tmp_path / "out")
    monkeypatch.setattr(runner, "memory_bytes", lambda: 1000)
    with pytest.raises(InputError, match="not even one run"):
        runner.sweep(small(), tmp_path / "out")


def test_command_line(swept, tmp_path, capsys):
    path, out = tmp_path / "mine.toml", tmp_path / "out"
    axes = "".join(f'"{name}" = {json.dumps(values)}\n' for name, values in AXES.items())
    scenario = tmp_path / "scenario.toml"
    scenario.write_text(small().scenario_at({}).to_toml())
    path.write_text(f'schema_version = 1\nscenario = "scenario.toml"\nwhere = {json.dumps(WHERE)}\n[axes]\n{axes}')
    assert cli.main(["sweep", str(path), "--out", str(out), "--dry-run"]) == 0
    assert "20 scenarios, " in capsys.readouterr().out and not out.exists()
    assert cli.main(["sweep", str(path), "--out", str(out), "--json", "--workers", "1"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["scenarios"] == 20 and printed["runs"] == 2 * (20 - printed["refused"])
    mine, other = results.load(out), results.load(swept[1])
    assert mine["mean_ttft_ms"].equals(other["mean_ttft_ms"])
    assert cli.main(["sweep", str(path), "--out", str(out), "--set", "num_seeds=3"]) == 2
    assert "another study" in capsys.readouterr().err
    assert cli.main(["sweep", "default"]) == 2 and "is a scenario" in capsys.readouterr().err
    for arguments, says in ((["--executor", "ray"], "processes:N"), (["--workers", "0"], "at least 1"),
                            (["--set", "model.dtype=fp8"], "is an axis")):
        assert cli.main(["sweep", str(path), "--out", str(tmp_path / "new"), *arguments]) == 2
        assert says in capsys.readouterr().err


FITTED = {"kind": "fitted", "prefill": [{"a": 0.002, "b": 2e-5}], "decode": [{"a": 0.01, "d": 1e-4}]}
KINDS = {
    "the generator's own rate": ({"workload": {"kind": "azure-conv-2023", "num_requests": 60}},
                                 {"workload.rate_rps": [500.0, None]}, {}),
    "a rate that is too low": ({}, {"workload.rate_rps": [1e-9, 4.0]}, {}),
    "closed loops": ({"workload": {"kind": "closed-loop", "concurrency": 2, "num_requests": 40, "input": 200,
                                   "output": 20}}, {"workload.concurrency": [2, 6]}, {}),
    "budgets and places": ({}, {}, {"zip": [{"engine.max_num_seqs": [8, 64],
                                             "engine.max_num_batched_tokens": [2040, 512]}]}),
    "forms of fitted costs": ({"cost": FITTED, "engine": {"num_gpu_blocks_override": 4096, "max_model_len": 4096}},
                              {"cost.exact": [False, True]}, {}),
    "pieces of fitted costs": ({"cost": FITTED, "engine": {"num_gpu_blocks_override": 4096, "max_model_len": 4096}},
                               {"cost.decode": [FITTED["decode"], [{"a": 0.01}, {"a": 0.02, "min_sequences": 8}]]}, {}),
    "an override that is none": ({}, {"cost.overrides.nonsense": [1.0], "workload.rate_rps": [2.0]}, {})}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("is_turned", [False, True])
def test_unlike_scenarios_are_as_alone(name, is_turned, tmp_path):
    """Whatever stands beside a scenario, and in whichever order: its row is that of a run by itself, or its refusal."""
    base, axes, more = KINDS[name]
    axes = {field: values[::-1] if is_turned else values for field, values in axes.items()}
    zips = [{k: v[::-1] if is_turned else v for k, v in z.items()} for z in more.get("zip", [])]
    fields = {"zip": zips} if zips else {"axes": axes or {"num_seeds": [1]}}
    study = Study.from_dict({"schema_version": 1, "scenario": {**BASE, "num_seeds": 1, **base}, **fields})
    runner.sweep(study, tmp_path / "out", workers=1)
    for row, point in zip(results.load(tmp_path / "out").to_dict("records"), study.points(), strict=True):
        try:
            alone = simulate(study.scenario_at(point)).metrics[0]
        except InputError:
            assert isinstance(row["refused"], str)
        else:
            assert not isinstance(row["refused"], str)
            for metric in ("duration", "mean_ttft_ms", "p99_tpot_ms"):
                assert row[metric] == pytest.approx(alone[metric], rel=1e-9), metric


def test_prefixes_and_changed_files(tmp_path):
    """Traces with more and fewer segments in one tile; a trace that changes under its name is another study's tile."""
    def write(path, parts, gap):
        lines = [json.dumps({"timestamp": k * gap, "input_length": 1024, "output_length": 10,
                             "hash_ids": [k % parts, 100 + k]}) for k in range(24)]
        path.write_text("\n".join(lines))

    many, few = tmp_path / "many.jsonl", tmp_path / "few.jsonl"
    write(many, 12, 100), write(few, 2, 100)
    base = {**BASE, "num_seeds": 1, "workload": {"kind": "trace", "trace": str(many), "format": "mooncake"},
            "engine": {"enable_prefix_caching": True, "max_model_len": 8192}}
    found = {}
    for order in ([str(many), str(few)], [str(few), str(many)]):
        study = Study.from_dict({"schema_version": 1, "scenario": base, "axes": {"workload.trace": order}})
        folder = tmp_path / Path(order[0]).stem
        runner.sweep(study, folder, workers=1)
        for row, point in zip(results.load(folder).to_dict("records"), study.points(), strict=True):
            lane = simulate(study.scenario_at(point)).lanes[0][0]
            assert row["cached_share"] == lane.cached_tokens.sum() / lane.input_tokens.sum()
            found.setdefault(row["workload.trace"], set()).add((row["mean_ttft_ms"], row["cached_share"]))
    assert all(len(rows) == 1 for rows in found.values()) and len(found) == 2
    write(few, 2, 5000)
    before = results.load(tmp_path / "few")["duration"]
    after = results.load(runner.sweep(study, tmp_path / "few", workers=1).parent)["duration"]
    assert after[0] > 10 * before[0] and after[1] == before[1]
    assert len(results.load(tmp_path / "few", runs=True)) == 2
