"""How fast whole sweeps are: what `jaxsim bench --suite sweeps` measures.

The study is that of `benchmarks/sweep-10k.toml`: rates x 5 batch limits x 4 devices x 2 presets of 1,000 requests. It
runs in processes of its own, from the study file to the table on disk:

* cold: no compiled program is kept. Wall seconds from the start of Python, memory, and what the processors did.
* workers: the same study again and again in one process, programs compiled before, by one thread and by two in turn.
* devices: the same where the processor is two devices of JAX, and each thread keeps to one.
* counts: processor seconds a scenario over numbers of scenarios, compile time apart.

Processor seconds are split by thread: compiled loops run on XLA's own threads, so what Python's threads take once all
is compiled is the host's. Under contention wall times grow, processor times little.
"""

import argparse
import concurrent.futures as futures
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from jaxsim.bench.apart import printed, said, say, told
from jaxsim.bench.engine import checkout, cpu_name, load_average
from jaxsim.engine import loop
from jaxsim.study import runner
from jaxsim.study.study import Study

STUDY = "benchmarks/sweep-10k.toml"
POINTS_A_RATE = 40
"""Batch limits x devices x presets."""

COUNTS, QUICK_COUNTS = (120, 1000, 10_000, 100_000), (120, 1000, 4000)
ROUNDS = 3


class TimedThreads(futures.ThreadPoolExecutor):
    """Threads that add up the processor seconds of what they are given."""

    def __init__(self, workers: int, devices: Sequence[jax.Device] = ()):
        """workers: threads; devices: that they keep to, in turn, all unless given."""
        super().__init__(workers, thread_name_prefix="tile", initializer=runner.keep_to_devices(devices))
        self.seconds, self._lock = 0.0, threading.Lock()

    def submit(self, fn: Callable, /, *args: Any, **kwargs: Any) -> futures.Future:
        """As of any executor."""
        def timed():
            began = time.thread_time()
            try:
                return fn(*args, **kwargs)
            finally:
                with self._lock:
                    self.seconds += time.thread_time() - began
        return super().submit(timed)


def study_of(num_scenarios: int) -> Study:
    """The study with so many scenarios, in steps of 40: more rates between 1 and 20 a second."""
    path = checkout(STUDY)
    if path is None:
        raise SystemExit(f"error: {STUDY} is part of the repository, not of the installed package")
    study = Study.from_toml(path)
    tree = study.to_dict()
    tree["axes"]["workload.rate_rps"]["num"] = num_scenarios // POINTS_A_RATE
    return Study.from_dict(tree)


def run_once(study: Study, folder: Path, workers: int, devices: Sequence[jax.Device] = ()) -> dict[str, float]:
    """One sweep into a new folder: wall, processor and host seconds."""
    pool = TimedThreads(workers, devices)
    wall, cpu, mine = time.perf_counter(), time.process_time(), time.thread_time()
    with pool:
        runner.sweep(study, folder, executor=pool, workers=workers)
    return {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu,
            "host_s": time.thread_time() - mine + pool.seconds}


# --- In a process of its own ------------------------------------------------------------------


def _cold(scenarios: int, folder: Path) -> dict[str, Any]:
    imports_s, study = time.process_time(), study_of(scenarios)
    run_once(study, folder / "cold", runner.num_workers())
    found = {"scenarios": scenarios, "wall_s": _since_start(), "cpu_s": time.process_time(),
             "programs": loop.run._cache_size(), "peak_mib": _peak_mib()}
    # The same without compiling says what compiling took.
    again = run_once(study, folder / "again", runner.num_workers())
    return {**found, "loop_s": again["cpu_s"] - again["host_s"], "imports_s": imports_s,
            "compile_s": found["cpu_s"] - imports_s - again["cpu_s"],
            "host_share": (imports_s + again["host_s"]) / found["cpu_s"]}


def _workers(scenarios: int, folder: Path) -> dict[str, Any]:
    study, rounds = study_of(scenarios), []
    # Every device compiles for itself, and which of two takes a tile is chance.
    for device in jax.local_devices():
        run_once(study, folder / f"first-{device.id}", 1, [device])
    for index in range(ROUNDS):
        one, two = (run_once(study, folder / f"{index}-{count}", count) for count in (1, 2))
        rounds.append({"ratio": one["wall_s"] / two["wall_s"], "host_share": one["host_s"] / one["cpu_s"],
                       "one": one, "two": two})
    requests = scenarios * 1000
    return {"scenarios": scenarios, "devices": jax.local_device_count(),
            "ratio": statistics.median(r["ratio"] for r in rounds),
            "host_share": statistics.median(r["host_share"] for r in rounds),
            "requests_per_s": requests / min(r["two"]["wall_s"] for r in rounds), "rounds": rounds}


def _counts(scenarios: int, folder: Path) -> dict[str, Any]:
    study = study_of(scenarios)
    # So that the second is without compiling; its tiles are as wide, so its programs the same.
    run_once(study if scenarios <= 10_000 else study_of(10_000), folder / "first", runner.num_workers())
    found = run_once(study, folder / "second", runner.num_workers())
    return {"scenarios": scenarios, "cpu_ms": 1e3 * found["cpu_s"] / scenarios,
            "wall_ms": 1e3 * found["wall_s"] / scenarios, "host_ms": 1e3 * found["host_s"] / scenarios,
            "peak_mib": _peak_mib()}


def _since_start() -> float:
    """Seconds since this process began, by its own processor clock where nothing better is known."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, ValueError):
        return time.process_time()


def _peak_mib() -> float | None:
    try:
        status = Path("/proc/self/status").read_text()
        return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) / 1024
    except (OSError, StopIteration):
        return None


_CASES = {"cold": _cold, "workers": _workers, "devices": _workers, "counts": _counts}
_FLAGS = {"devices": "--xla_force_host_platform_device_count=2"}
"""What XLA is told, beside what it is told already."""


def _apart(case: str, scenarios: int) -> dict[str, Any]:
    """A case in a process of its own, without compiled programs of earlier ones."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("JAX_COMPILATION_CACHE")}
    env["XLA_FLAGS"] = " ".join(filter(None, (env.get("XLA_FLAGS"), _FLAGS.get(case))))
    done = subprocess.run([sys.executable, "-m", "jaxsim.bench.sweeps", "--case", case, str(scenarios)], env=env,
                          stdout=subprocess.PIPE, text=True, check=False)
    return said(done.stdout) or {"scenarios": scenarios, "error": f"ended with {done.returncode}"}


# --- The parent -------------------------------------------------------------------------------


def main(quick: bool = False, progress: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """Measure; quick: a thousand scenarios where there are ten."""
    began, load = time.monotonic(), load_average()
    size, counts = (1000, QUICK_COUNTS) if quick else (10_000, COUNTS)
    report: dict[str, Any] = {"machine": {
        "cpu": cpu_name(), "cores": runner.num_workers(), "device": jax.devices()[0].device_kind,
        "jax": jax.__version__, "python": ".".join(map(str, sys.version_info[:3]))}}
    for name, asked in (("cold", (size,)), ("workers", (size,)), ("devices", (size,)), ("counts", counts)):
        report[name] = []
        for count in asked:
            progress(f"{name}: {count:,} scenarios")
            report[name].append(_apart(name, count))
    report["machine"]["load_average"] = {"before": load, "after": load_average()}
    report["duration_s"] = time.monotonic() - began
    return report


def show(report: dict[str, Any], console: Console | None = None) -> None:
    """Print the report as tables."""
    console = console or Console()
    columns = {
        "cold": ("From a cold start", {
            "wall_s": "seconds", "cpu_s": "processor s", "imports_s": "imports s", "compile_s": "compiling s",
            "loop_s": "loop s", "host_share": "host share", "programs": "programs", "peak_mib": "MiB"}),
        "workers": ("Compiled before", {"ratio": "two workers / one", "host_share": "host share",
                                        "requests_per_s": "requests/s"}),
        "devices": ("Compiled before, two devices", {"ratio": "two devices / one", "host_share": "host share",
                                                    "requests_per_s": "requests/s"}),
        "counts": ("Milliseconds a scenario, compiled before",
                   {"cpu_ms": "processor", "host_ms": "host", "wall_ms": "wall", "peak_mib": "MiB"})}
    for name, (title, shown) in columns.items():
        table = Table(title=title, title_justify="left", box=SIMPLE, pad_edge=False)
        table.add_column("scenarios", justify="right")
        for label in shown.values():
            table.add_column(label, justify="right")
        for row in report[name]:
            table.add_row(f"{row['scenarios']:,}", *(_text(key, row) for key in shown))
        console.print(table)
    machine = report["machine"]
    console.print(f"{machine['cpu']}, {machine['cores']} cores, {machine['device']}, JAX {machine['jax']}, Python"
                  f" {machine['python']}; {report['duration_s']:.0f} s\nhost share: processor seconds that are neither"
                  " the compiled loop nor compiling")


def _text(key: str, row: dict[str, Any]) -> str:
    value = row.get(key)
    if value is None:
        return row.get("error", "-")
    if key.endswith("share"):
        return f"{value:.1%}"
    return f"{value:,.0f}" if key in ("programs", "peak_mib", "requests_per_s") else f"{value:.2f}"


def command(quick: bool = False, as_json: bool = False) -> int:
    """What `jaxsim bench --suite sweeps` does. Exit status."""
    return printed(main(quick, told), as_json, show)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m jaxsim.bench.sweeps", description=__doc__.splitlines()[0])
    parser.add_argument("--case", nargs=2, metavar=("CASE", "SCENARIOS"), required=True,
                        help=f"one case, here: {', '.join(_CASES)}")
    name, number = parser.parse_args().case
    with tempfile.TemporaryDirectory(prefix="jaxsim-bench-") as scratch:
        say(_CASES[name](int(number), Path(scratch)))
