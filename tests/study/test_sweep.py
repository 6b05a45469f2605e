"""Sweeps: the same numbers as runs one by one, the same bytes after any interruption."""

import concurrent.futures
import contextlib
import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from jaxsim import cli
from jaxsim._core.errors import InputError
from jaxsim.engine.simulate import simulate
from jaxsim.metrics import combine, flatten, request_frame
from jaxsim.study import results, runner
from jaxsim.study.command import chosen
from jaxsim.study.lanes import Lanes, ladder
from jaxsim.study.plan import plan
from jaxsim.study.study import Study

pytestmark = pytest.mark.unoptimised

BASE = {
    "schema_version": 1, "model": {"name": "llama-3.1-8b"}, "device": {"name": "h100"},
    "engine": {"max_model_len": 65536}, "slo": {"ttft_ms": 100.0, "tpot_ms": 20.0}, "num_seeds": 2,
    "workload": {"kind": "poisson", "rate_rps": 4.0, "num_requests": 60, "input": {
        "kind": "uniform", "min_tokens": 100, "max_tokens": 900},
        "output": {"kind": "uniform", "min_tokens": 1, "max_tokens": 40}}}
AXES = {"workload.rate_rps": [2.0, 40.0], "engine.max_num_seqs": [4, 16], "device.name": ["l40s", "a100", "rtx_4090"],
        "model.dtype": ["auto", "fp8"]}
"""Devices with one kernel of decode attention, so that one program does for all of them."""
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


def test_feasible_only_leaves_refusals_out(swept, tmp_path):
    """The same tiles, the same rows but the refused ones."""
    study, folder = swept
    made = plan(study, runner.LANES, runs_a_tile=8)
    (tmp_path / results.TILES).symlink_to(folder / results.TILES)
    (tmp_path / results.STUDY).write_text(results.identity(small(feasible_only=True)))
    kept, every = results.load(results.write(made, tmp_path)), results.load(folder)
    every = every[every["refused"].isna()].reset_index(drop=True)
    assert 0 < len(kept) < 20 and kept["point"].equals(every["point"]) and kept["refused"].isna().all()
    assert kept["mean_ttft_ms"].equals(every["mean_ttft_ms"])


def test_columns_have_units_and_provenance(swept):
    study, folder = swept
    schema = pq.read_schema(folder / results.TABLE)
    assert schema.field("energy_j").metadata[b"unit"] == b"J"
    assert b"approximate" in schema.field("energy_j").metadata[b"description"]
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
    # Equal sections are one object, so that plans of many scenarios are small.
    scenarios = [scenario for tile in made.tiles for scenario in tile.scenarios]
    assert len({id(s.engine) for s in scenarios}) == 8 and len({id(s.workload) for s in scenarios}) == 3
    assert made.tiles[0].name("1") != made.tiles[1].name("1") != made.tiles[1].name("2")


def test_folders_are_of_one_study(swept, tmp_path):
    _, folder = swept
    with pytest.raises(InputError, match="another study"):
        runner.sweep(small(num_seeds=3), folder)
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(InputError, match="no study's"):
        runner.sweep(small(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    # One that was put right before it had any result.
    runner.claim(small(num_seeds=3), tmp_path / "new")
    runner.claim(small(), tmp_path / "new")
    assert results.is_same((tmp_path / "new" / results.STUDY).read_text(), results.identity(small()))
    assert not results.is_same("{}", results.identity(small()))
    with pytest.raises(InputError, match="no finished study"):
        results.load(tmp_path)


@contextlib.contextmanager
def no_file_beyond(most_bytes: int):
    """The system itself refuses to let a file grow, as a full disk does."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_full_disk_keeps_what_is_done(swept, tmp_path):
    """No room for a tile, then none for the table: both are told, nothing half written stays, the rest is kept."""
    study, folder = swept
    out, whole = tmp_path / "out", (folder / results.TABLE).read_bytes()
    with no_file_beyond(4000), pytest.raises(InputError, match="File too large.*same command again.*kept"):
        runner.sweep(study, out, workers=1, runs_a_tile=8)
    assert not list(out.rglob("*.part")) and not list(out.rglob("*.parquet"))
    with no_file_beyond(len(whole) - 1), pytest.raises(InputError, match="results.parquet.*File too large.*kept"):
        runner.sweep(study, out, workers=1, runs_a_tile=8)
    kept = {path: path.stat().st_mtime_ns for path in (out / results.TILES).iterdir()}
    assert kept.keys() and not list(out.rglob("*.part")) and not (out / results.TABLE).exists()
    runner.sweep(study, out, workers=1, runs_a_tile=8)
    assert (out / results.TABLE).read_bytes() == whole
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in kept.items())


def test_more_than_the_machine_is_refused_before_the_run(tmp_path):
    """Runs of so many requests that a usual tile outgrows this machine's own memory; the size it names does fit."""
    def of(num_requests, axes):
        base = {**BASE, "workload": {**BASE["workload"], "rate_rps": 1e4, "num_requests": num_requests}}
        return small(scenario=base, num_seeds=1, axes=axes, where=[])

    few, many = (runner.estimate(plan(of(count, {"num_seeds": [1]}), Lanes()))["tile_bytes"] for count in (1000, 9000))
    # Half as many again as 64 runs in one tile have room for, as drawn and as the loop reads them.
    num_requests = int(1.5 * runner.memory_bytes() / (2 * 64 * (many - few) / 8000 / 8))
    study = of(num_requests, {"cost.front_end_s": {"from": 0, "to": 1, "num": 64}})
    with pytest.raises(InputError, match="this machine has .* GiB") as caught:
        runner.sweep(study, tmp_path / "out", workers=1)
    assert not list((tmp_path / "out" / results.TILES).iterdir())
    fits = int(re.search(r"tiles of ([1-9]\d*) runs would fit: sweep with --runs-a-tile \1", str(caught.value))[1])
    assert fits < 64
    runner.check_memory(runner.estimate(plan(study, runner.LANES, runs_a_tile=fits)), workers=1)
    # Elsewhere there may be room.
    class Elsewhere(concurrent.futures.ThreadPoolExecutor):
        def submit(self, *_, **__):
            raise BrokenPipeError("was asked")

    with Elsewhere(1) as executor, pytest.raises(BrokenPipeError, match="was asked"):
        runner.sweep(study, tmp_path / "out", executor=executor)
    # Not even one run.
    with pytest.raises(InputError, match="not even one run"):
        runner.check_memory(runner.estimate(plan(study, runner.LANES)) | {"tile_bytes": 2**60}, workers=1)


def test_requests_are_those_of_runs_one_by_one(swept, tmp_path):
    """Kept when asked for, also of a study that was run without them; the rows of a run's own frame."""
    study, folder = swept
    with pytest.raises(InputError, match="again with --requests"):
        results.load(folder, requests=True)
    runner.sweep(study, folder, workers=2, runs_a_tile=8, with_requests=True)
    frame, table = results.load(folder, requests=True), results.load(folder)
    kept = np.flatnonzero(table["refused"].isna())
    assert frame.groupby(["point", "seed"]).size().eq(60).all() and set(frame["point"]) == set(kept)
    (lanes,) = simulate(study.scenario_at(list(study.points())[kept[0]])).lanes
    for lane, (_, mine) in zip(lanes, frame[frame["point"] == kept[0]].groupby("seed"), strict=True):
        alone = request_frame(lane)
        for name in set(mine) - {"point", "seed"}:
            if name == "status":
                assert list(mine[name]) == list(alone[name])
            else:
                np.testing.assert_allclose(mine[name], alone[name], rtol=1e-12, atol=1e-12, err_msg=name)


def test_command_line(swept, tmp_path, capsys):
    path, out = tmp_path / "mine.toml", tmp_path / "out"
    axes = "".join(f'"{name}" = {json.dumps(values)}\n' for name, values in AXES.items())
    scenario = tmp_path / "scenario.toml"
    scenario.write_text(small().scenario_at({}).to_toml())
    path.write_text(f'schema_version = 1\nscenario = "scenario.toml"\nwhere = {json.dumps(WHERE)}\n[axes]\n{axes}')
    assert cli.main(["sweep", str(path), "--out", str(out), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "20 scenarios, " in said and " s of one core" in said and not out.exists()
    assert cli.main(["sweep", str(path), "--out", str(out), "--json", "--workers", "1", "--runs-a-tile", "24"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["scenarios"] == 20 and printed["runs"] == 2 * (20 - printed["refused"])
    mine, other = results.load(out), results.load(swept[1])
    assert mine["mean_ttft_ms"].equals(other["mean_ttft_ms"])
    assert cli.main(["sweep", str(path), "--out", str(out), "--set", "num_seeds=3"]) == 2
    assert "another study" in capsys.readouterr().err
    assert cli.main(["sweep", "default"]) == 2 and "is a scenario" in capsys.readouterr().err
    for arguments, says in ((["--executor", "ray"], "processes:N"), (["--executor", "processes:two"], "processes:N"),
                            (["--workers", "0"], "at least 1"),
                            (["--set", "model.dtype=fp8"], "is an axis")):
        assert cli.main(["sweep", str(path), "--out", str(tmp_path / "new"), *arguments]) == 2
        assert says in capsys.readouterr().err


def test_a_study_without_a_point_to_simulate_fails_and_leaves_nothing(tmp_path, capsys):
    path, out = tmp_path / "mine.toml", tmp_path / "out"
    (tmp_path / "scenario.toml").write_text(small().scenario_at({}).to_toml())
    path.write_text('schema_version = 1\nscenario = "scenario.toml"\n[axes]\n"engine.max_model_len" = [2, 3]\n')
    assert cli.main(["sweep", str(path), "--out", str(out)]) == 2
    assert "2 points': are all refused" in capsys.readouterr().err and not out.exists()


def test_a_study_is_the_same_wherever_its_files_lie(tmp_path, monkeypatch):
    """Read from another folder, or moved with what it names, it goes on; with another content of a file it does not."""
    def known(path) -> tuple[str, list[str]]:
        study = Study.from_toml(path)
        return json.loads(results.identity(study))["hash"], [t.name("1") for t in plan(study, Lanes()).tiles]

    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    for name in ("a.csv", "b.csv"):
        (here / name).write_text(f"arrival_s,input_tokens,output_tokens\n0,10,2\n1,20,{ord(name[0]) - 90}\n")
    base = small(scenario={**BASE, "workload": {"kind": "trace", "trace": "a.csv"}})
    (here / "scenario.toml").write_text(base.scenario_at({}).to_toml())
    (here / "study.toml").write_text('schema_version = 1\nscenario = "scenario.toml"\n[axes]\n'
                                     '"workload.trace" = ["a.csv", "b.csv"]\n')
    first = known(here / "study.toml")
    monkeypatch.chdir(tmp_path)
    assert known("here/study.toml") == first
    here.rename(there)
    monkeypatch.chdir(there)
    assert known("study.toml") == first
    (there / "b.csv").write_text((there / "a.csv").read_text())
    assert known("study.toml")[0] != first[0] and known("study.toml")[1] != first[1]


def test_fields_set_on_the_command_line(tmp_path, capsys):
    """In whole scenarios, in those that only axes make whole, and over the study's own number of seeds."""
    def file(scenario: str, more: str) -> str:
        (tmp_path / "study.toml").write_text(f"schema_version = 1\nnum_seeds = 4\n{more}\n[scenario]\n"
                                             f"schema_version = 1\n{scenario}")
        return str(tmp_path / "study.toml")

    whole = f"engine = {{ max_num_seqs = 8 }}\nworkload = {{ kind = 'batch', num_requests = 8 }}\n{FITTED_TOML}"
    axis = "axes = { 'engine.max_num_batched_tokens' = [64, 128] }"
    lacking = "device = { name = 'h100' }\nworkload = { kind = 'batch', num_requests = 8 }\n"
    models = "axes = { 'model.name' = ['llama-3.1-8b'] }"
    for path in (file(whole, axis), file(lacking, models)):
        study = chosen(path, {"workload.num_requests": 16, "num_seeds": 3})
        scenario = study.scenario_at(next(study.points()))
        assert (scenario.workload.num_requests, scenario.num_seeds, scenario.workload.kind) == (16, 3, "batch")
        with pytest.raises(InputError, match="workload.num_requests|no such field"):
            chosen(path, {"workload.num_request": 16})
    sample = "sample = { num = 4, axes = { 'workload.num_requests' = [8, 16] } }"
    with pytest.raises(InputError, match="is an axis"):
        chosen(file(whole, sample), {"workload.num_requests": 16})
    # Nothing is left, and that many rows there are.
    path = file(whole, "feasible_only = true\naxes = { 'engine.pipeline_parallel_size' = [64, 128] }")
    assert cli.main(["sweep", path, "--out", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.endswith("results.parquet: 0 rows\n")
    assert cli.main(["sweep", path, "--out", str(tmp_path / "out"), "--runs-a-tile", "0"]) == 2
    assert "--runs-a-tile = 0" in capsys.readouterr().err


FITTED_TOML = "cost = { kind = 'fitted', prefill = { b = 1e-5 }, decode = { a = 0.01 } }\n"
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

OFTEN = ("a rate that is too low", "an override that is none")


@pytest.mark.slow
@pytest.mark.parametrize("name", [
    pytest.param(name, marks=[pytest.mark.slow] * (name not in OFTEN)) for name in KINDS])
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


@pytest.mark.slow
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
    with pytest.raises(InputError, match="another study"):
        runner.sweep(study, tmp_path / "few", workers=1)
    after = results.load(runner.sweep(study, tmp_path / "again", workers=1).parent)["duration"]
    assert after[0] > 10 * before[0] and after[1] == before[1]
    assert len(results.load(tmp_path / "again", runs=True)) == 2


@pytest.mark.slow
def test_windows_equal_runs_one_by_one(tmp_path):
    """With a warm-up, a cool-down, both and neither: rates of the window, and the energy of known devices."""
    windows = {"warmup_s": [0.0, 2.0, 0.0, 3.0], "cooldown_s": [0.0, 0.0, 4.0, 2.5]}
    study = small(axes={"device.name": ["h100", "a100_pcie_80"]}, zip=[windows], where=[])
    runner.sweep(study, tmp_path / "out", workers=1)
    frame, points = results.load(tmp_path / "out"), list(study.points())
    expected = simulate([study.scenario_at(point) for point in points])
    for row, metrics in zip(frame.to_dict("records"), expected.metrics, strict=True):
        for name in ("window_s", "duration", "completed", "total_output_tokens", "request_throughput",
                     "request_goodput", "output_throughput", "total_token_throughput", "num_warmup_requests",
                     "num_cooldown_requests", "p99_ttft_ms", "mean_power_w", "energy_j", "energy_wh",
                     "energy_j_per_output_token"):
            value = metrics[name]
            assert row[name] == pytest.approx(np.nan if value is None else value, rel=1e-9, nan_ok=True), name
        assert np.isnan(row["energy_j"]) == (row["device.name"] == "a100_pcie_80")
    assert {"cooldown_s", "warmup_s"} <= set(frame.columns) and frame["num_cooldown_requests"].max() > 0
