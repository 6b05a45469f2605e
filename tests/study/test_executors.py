"""Tiles run elsewhere: processes that are killed, Dask workers that die, a sweep stopped by Ctrl-C."""

import concurrent.futures
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from jaxsim._core.errors import InputError
from jaxsim.study import command, results, runner
from jaxsim.study.study import Study

pytestmark = pytest.mark.unoptimised

STUDY = {
    "schema_version": 1, "num_seeds": 2,
    "scenario": {
        "schema_version": 1, "engine": {"max_num_seqs": 8, "num_gpu_blocks_override": 4096, "max_model_len": 4096},
        "cost": {"kind": "fitted", "prefill": [{"a": 0.002, "b": 2e-5}], "decode": [{"a": 0.01, "d": 1e-4}]},
        "workload": {"kind": "poisson", "rate_rps": 1.0, "num_requests": 200, "input": 300, "output": {
            "kind": "uniform", "min_tokens": 8, "max_tokens": 72}}},
    "axes": {"workload.rate_rps": {"from": 1, "to": 9, "num": 24}}}


@pytest.fixture(scope="module")
def expected(tmp_path_factory) -> bytes:
    """What threads of this process find."""
    folder = tmp_path_factory.mktemp("threads") / "out"
    runner.sweep(Study.from_dict(STUDY), folder, workers=1, runs_a_tile=8)
    return (folder / results.TABLE).read_bytes()


def test_processes(expected, tmp_path):
    """Tiles and their results travel; nobody needs to share memory."""
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        path = runner.sweep(Study.from_dict(STUDY), tmp_path / "out", executor=pool, runs_a_tile=8)
    assert path.read_bytes() == expected


def test_a_process_that_dies_is_told():
    """And what to do about it, instead of a traceback."""
    with pytest.raises(InputError, match="processes:1.*killed.*same command again.*kept"), command._executor(
            "processes:1") as pool:
        pool.submit(os._exit, 1).result()


@pytest.mark.slow
def test_dask_worker_killed_in_mid_sweep(expected, tmp_path):
    """The others do its tiles again."""
    distributed = pytest.importorskip("distributed")
    folder = tmp_path / "out"
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None,
                                  silence_logs=50) as cluster, distributed.Client(cluster) as client:
        pids = list(client.run(os.getpid).values())

        def kill() -> None:
            # Once tiles come in, one worker goes in the middle of another.
            for _ in range(600):
                if list(folder.glob(f"{results.TILES}/*.parquet")):
                    break
                time.sleep(0.05)
            os.kill(pids[0], signal.SIGKILL)

        killer = threading.Thread(target=kill)
        killer.start()
        with client.get_executor(retries=2) as pool:
            path = runner.sweep(Study.from_dict(STUDY), folder, executor=pool, runs_a_tile=8)
        killer.join()
    assert path.read_bytes() == expected


@pytest.mark.parametrize("kill, status", [(signal.SIGKILL, -9), (signal.SIGINT, 130)])
def test_stopped_and_resumed(expected, tmp_path, kill, status):
    """Whatever stops the command, the same command ends at the same bytes, and finished tiles are not run again."""
    study, out = tmp_path / "study.toml", tmp_path / "out"
    fitted = Study.from_dict(STUDY)
    (tmp_path / "scenario.toml").write_text(fitted.scenario_at({}).to_toml())
    study.write_text('schema_version = 1\nscenario = "scenario.toml"\n[axes]\n'
                     '"workload.rate_rps" = { from = 1, to = 9, num = 400 }\n')
    command = [sys.executable, "-m", "jaxsim", "sweep", str(study), "--out", str(out), "--workers", "1"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    tiles = out / results.TILES
    for _ in range(2400):
        if tiles.is_dir() and list(tiles.glob("*.parquet")):
            break
        time.sleep(0.05)
    process.send_signal(kill)
    told = process.communicate(timeout=60)[1]
    done = {path.name: path.stat().st_mtime_ns for path in tiles.glob("*.parquet")}
    assert process.returncode == status and done and not (out / results.TABLE).exists()
    if kill == signal.SIGINT:
        assert "same command" in told and "Traceback" not in told
    assert runner.sweep(Study.from_toml(study), out, workers=1) == Path(out / results.TABLE)
    assert all((tiles / name).stat().st_mtime_ns == stamp for name, stamp in done.items())
    assert len(results.load(out)) == 400
