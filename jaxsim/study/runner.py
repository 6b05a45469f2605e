"""Run a study: every tile once, its result one Parquet file, written whole or not at all.

A tile is named by the hash of all it depends on, so a sweep that was stopped goes on where it was, and a tile that
was run twice changes nothing. Whoever runs tiles is a `concurrent.futures.Executor`: threads here, or the caller's.
"""

import concurrent.futures as futures
import dataclasses
import errno
import functools
import io
import itertools
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from jaxsim._core.errors import InputError
from jaxsim.engine.simulate import memory_bytes, touch_log
from jaxsim.io.result import version
from jaxsim.metrics import Devices, devices_of, energy
from jaxsim.spec.scenario import Scenario
from jaxsim.study import results
from jaxsim.study.lanes import Lanes, Run
from jaxsim.study.plan import RUNS_A_TILE, Plan, Tile, plan, plan_of
from jaxsim.study.study import Study
from jaxsim.study.table import columns, requests, tenants_of, whole_s
from jaxsim.study.tile import Runs, simulate_runs

LANES = Lanes()
"""Of this process: tiles of one study share systems, tables and draws."""

_OWN = threading.local()
"""The device of a thread that runs tiles."""

Progress = Callable[..., None]
"""Told what is being done, how much of it is done and how much there is; as `programs`, how many were compiled."""

SECONDS_A_PROGRAM, SECONDS_A_WORK = 12.0, 0.7e-6
"""Of one core, to compile a program and to simulate what `Shape.work` counts: measured on a shared AMD EPYC."""


def run_tile(tile: Tile, with_requests: bool = False) -> tuple[bytes, bytes | None]:
    """A tile's result as the bytes of its file, a row a run; with_requests: and of one with a row a request.

    A pure function of the tile.
    """
    runs, points, seeds, sizes = [], [], [], []
    for point, scenario in zip(tile.points, tile.scenarios, strict=True):
        size, mine = LANES.runs(scenario, tile.slots, tile.tokens, tile.longest)
        sizes.append(size)
        runs += mine
        points += [point] * len(mine)
        seeds += scenario.seeds
    # Room for the prefixes of all.
    dims = dataclasses.replace(sizes[0], **{name: max(getattr(size, name) for size in sizes)
                                            for name in ("num_segments", "path_width", "log_size", "offload_log",
                                                         "remote_log")})
    logs = [name for name in ("offload_log", "remote_log") if getattr(dims, name)]
    if logs:
        # Those that need none alone have a log here, and it takes their touches too.
        each = {(id(run.workload), run.system.scheduler.block_size, run.system.scheduler.max_num_batched_tokens): run
                for run in runs}.values()
        needed = max(touch_log(run.system, run.workload, run.prefixes) for run in each)
        dims = dataclasses.replace(dims, **{name: max(getattr(dims, name), needed) for name in logs})
    with jax.default_device(getattr(_OWN, "device", None)):
        out = simulate_runs(dims, runs, tile.width)
    found = columns(out, [run.scenario.slo for run in runs], np.array([run.scenario.warmup_s for run in runs]),
                    np.array([run.scenario.cooldown_s for run in runs]), tenants_of(runs))
    found |= _per_device(runs, found, out)
    places = {"point": np.array(points, np.int64), "seed": np.array(seeds, np.int64)}
    rows = _parquet(places | found)
    if not with_requests:
        return rows, None
    listed = requests(out)
    run = listed.pop("run")
    return rows, _parquet({name: values[run] for name, values in places.items()} | listed)


def _parquet(columns: dict[str, np.ndarray]) -> bytes:
    table = pa.table({name: pa.array(values, pa.string()) if values.dtype == object else
                      pa.array(values, from_pandas=True) for name, values in columns.items()})
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue()


def _per_device(runs: Sequence[Run], found: Mapping[str, np.ndarray], out: Runs) -> dict[str, np.ndarray]:
    """Throughput by device, and the price and energy of tokens where those of the device are known."""
    output_throughput = found["output_throughput"]
    fleets = [devices_of(run.scenario, out.busy_s.shape[1]) for run in runs]
    devices = Devices(*(np.stack(columns) for columns in zip(*fleets, strict=True)))
    on_share = np.ones(len(runs))
    if out.instance_s is not None:
        end_s = np.max(np.where(out.is_finished, out.finish_s, 0.0), axis=1)
        on_share = out.instance_s / (out.busy_s.shape[1] * np.where(end_s > 0, end_s, np.nan))
    count, usd_per_s = devices.count.sum(axis=1), on_share * (devices.count * devices.usd_per_s).sum(axis=1)
    return {"num_devices": count, "output_throughput_per_device": output_throughput / count,
            "usd_per_million_output_tokens": 1e6 * usd_per_s / np.where(output_throughput > 0, output_throughput,
                                                                        np.nan),
            **energy(devices, out.device_busy_s / whole_s(out)[:, None], found["window_s"], output_throughput,
                     on_share)}


def table(scenarios: Sequence[Scenario], workers: int | None = None) -> tuple[pd.DataFrame, dict[int, str]]:
    """Runs of scenarios without a folder: a row a run with `point`, and why some were refused."""
    made = plan_of([lambda s=s: s for s in scenarios], LANES)
    check_memory(estimate(made), workers)
    return rows_of(made.tiles, workers), {refusal.point: refusal.reason for refusal in made.refusals}


def table_and_requests(scenarios: Sequence[Scenario], workers: int | None = None
                       ) -> tuple[pd.DataFrame, pd.DataFrame, dict[int, str]]:
    """The same, with a row a request of all runs, which has `point` and `seed`."""
    made = plan_of([lambda s=s: s for s in scenarios], LANES)
    check_memory(estimate(made), workers)
    with _threads(workers) as pool:
        both = list(pool.map(functools.partial(run_tile, with_requests=True), made.tiles))
    frames = [[pq.read_table(io.BytesIO(content)).to_pandas() for content in contents]
              for contents in zip(*both, strict=True)]
    rows, requests = (pd.concat(parts, ignore_index=True) for parts in frames or ([pd.DataFrame()],) * 2)
    return rows, requests, {refusal.point: refusal.reason for refusal in made.refusals}


def rows_of(tiles: Sequence[Tile], workers: int | None = None) -> pd.DataFrame:
    """What tiles give, without a folder: a row a run, with `point` at least."""
    with _threads(workers) as pool:
        parts = [pq.read_table(io.BytesIO(content)).to_pandas() for content, _ in pool.map(run_tile, tiles)]
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame({"point": pd.Series(dtype=np.int64)})


def sweep(study: Study, folder: str | Path, *, executor: futures.Executor | None = None, workers: int | None = None,
          runs_a_tile: int = RUNS_A_TILE, with_requests: bool = False,
          progress: Progress = lambda *_, **__: None) -> Path:
    """Run what is not there yet of a study, and write its table; returns the path of that.

    folder: of the study's results, and of no other's. executor: who runs tiles, instead of `workers` threads (as many
    as processors, or devices if there are more than one). with_requests: keep every request of every run as well, for
    `load(folder, requests=True)`. Raises `InputError`; Ctrl-C stops after the tiles in flight.
    """
    folder = Path(folder)
    claim(study, folder)
    made = plan(study, LANES, runs_a_tile=runs_a_tile,
                on_point=lambda done: progress("looking at scenarios", done, 0))
    if executor is None:
        # What runs elsewhere takes no memory of this machine.
        check_memory(estimate(made), workers)
    run_tiles(made, folder, executor=executor, workers=workers, with_requests=with_requests, progress=progress)
    return results.write(made, folder)


def claim(study: Study, folder: Path) -> None:
    """Make the folder the study's. Raises `InputError` where it is another's, or cannot be written."""
    text = results.identity(study)
    path = folder / results.STUDY
    try:
        folder.mkdir(parents=True, exist_ok=True)
        own = (results.STUDY, results.TILES, results.REQUESTS)
        is_there = path.exists()
        if is_there and results.is_same(path.read_text(encoding="utf-8"), text):
            pass
        elif is_there and any(folder.rglob("*.parquet")):
            raise InputError("--out", str(folder), "holds the results of another study, or of another version",
                             "give another folder; nothing is overwritten")
        elif any(p.name not in own and not p.name.endswith(".part") for p in folder.iterdir()):
            raise InputError("--out", str(folder), "holds files that are no study's", "give an empty folder")
        else:
            # A study that stopped before its first result, as one that was put right since, holds nothing.
            replace(path, text.encode())
        for name in (results.TILES, results.REQUESTS):
            (folder / name).mkdir(exist_ok=True)
            if not os.access(folder / name, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise InputError("--out", str(folder), error.strerror or str(error), "give another folder") from None


def replace(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def run_tiles(made: Plan, folder: Path, *, executor: futures.Executor | None = None, workers: int | None = None,
              with_requests: bool = False, progress: Progress = lambda *_, **__: None) -> None:
    """Run the tiles that have no file yet."""
    stamp = version()
    names = {tile.name(stamp): tile for tile in made.tiles}
    there = {p.stem for p in (folder / results.TILES).glob("*.parquet")}
    if with_requests:
        there &= {p.stem for p in (folder / results.REQUESTS).glob("*.parquet")}
    missing = {name: tile for name, tile in names.items() if name not in there}
    done = sum(tile.num_runs for name, tile in names.items() if name in there)
    programs: set[int] = set()
    progress("simulating", done, made.num_runs)
    own = None
    if executor is None:
        executor = own = _threads(workers)
    pending: dict[futures.Future, str] = {}
    try:
        for name, tile in missing.items():
            pending[executor.submit(run_tile, tile, with_requests)] = name
        refused = None
        for future in futures.as_completed(pending):
            name = pending[future]
            try:
                content, listed = future.result()
            except InputError as error:
                # The other tiles are worth keeping.
                refused = error
                continue
            if listed is not None:
                # First, as the tile's own file says that it is done.
                _write_tile(folder / results.REQUESTS, name, listed)
            _write_tile(folder / results.TILES, name, content)
            done += missing[name].num_runs
            programs.add(missing[name].program)
            progress("simulating", done, made.num_runs, programs=len(programs))
        if refused is not None:
            raise refused
    except BaseException:
        for future in pending:
            future.cancel()
        raise
    finally:
        if own is not None:
            own.shutdown(wait=True, cancel_futures=True)


def _write_tile(folder: Path, name: str, content: bytes) -> None:
    path = folder / f"{name}.parquet"
    try:
        replace(path, content)
    except OSError as error:
        raise InputError("--out", str(path), error.strerror or str(error),
                         "make room and run the same command again: finished tiles are kept") from None


def _threads(workers: int | None) -> futures.Executor:
    return futures.ThreadPoolExecutor(workers or num_workers(), "tile", initializer=keep_to_devices())


def keep_to_devices(devices: Sequence[jax.Device] = ()) -> Callable[[], None]:
    """What the threads of a pool do first: each keeps its tiles to one device, in turn, of all local ones unless given.
    """
    devices, lock = itertools.cycle(devices or jax.local_devices()), threading.Lock()

    def take() -> None:
        with lock:
            _OWN.device = next(devices)

    return take


def num_workers() -> int:
    """Threads that keep this machine busy: one a processor, as the loop runs on one, or two a device."""
    if jax.default_backend() != "cpu":
        return 2 * jax.local_device_count()
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:
        return os.cpu_count() or 1


def estimate(made: Plan) -> dict[str, Any]:
    """What a plan takes: programs, runs, tiles, and the memory of the largest tile."""
    return {"scenarios": len(made.points), "refused": len(made.refusals), "runs": made.num_runs,
            "requests": sum(tile.num_requests for tile in made.tiles), "tiles": len(made.tiles),
            "programs": made.num_programs, "widest_tile": max((tile.width for tile in made.tiles), default=0),
            "seconds": made.num_programs * SECONDS_A_PROGRAM + sum(tile.work for tile in made.tiles) * SECONDS_A_WORK,
            "tile_bytes": max((tile.width * tile.run_bytes for tile in made.tiles), default=0)}


def check_memory(about: dict[str, Any], workers: int | None = None) -> None:
    """Refuse tiles that this machine cannot hold, `workers` of them at once. Raises `InputError`."""
    room, at_once = memory_bytes(), min(workers or num_workers(), about["tiles"])
    # As drawn and as the loop reads it; the carry, and the results on the host.
    needed = 2 * at_once * about["tile_bytes"]
    if room and needed > room:
        fits = int(about["widest_tile"] * room / needed)
        remedy = (f"tiles of {fits} runs would fit: sweep with --runs-a-tile {fits}, or fewer --workers" if fits else
                  "draw fewer requests or seeds: not even one run fits")
        raise InputError("workload.num_requests", f"{about['widest_tile']} runs a tile, {at_once} tiles at once",
                         f"need about {needed / 2**30:,.0f} GiB, this machine has {room / 2**30:,.0f} GiB",
                         remedy)
