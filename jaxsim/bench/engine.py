"""How fast the engine is: what `jaxsim bench` measures.

Every case runs in a process of its own, pinned to one core, with one XLA thread. Compile time is taken
apart. Between the runs of the engine the bare C++ loop (one replica, nothing but arrivals, batches and
completions) runs on the same core, and the headline is the ratio of the two: machines differ, and one
machine differs from minute to minute. The answers are reported as well, as a checksum, and, for one
replica, as the share of requests on which a C++ simulator with the same rules agrees to the last bit of the
clock.

The C++ sources and the plain-Python reference are part of the repository, not of the installed package;
without them their columns are null and a note says so. Nothing here asserts a time.
"""

import argparse
import contextlib
import json
import math
import os
import platform
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import jax

from jaxsim.bench.cases import (
    ALIASES,
    COEFFICIENTS,
    COST_NOTE,
    MAIN_CASES,
    REQUEST_CASES,
    SLOT_CASES,
    Case,
    draw,
)
from jaxsim.bench.show import show
from jaxsim.bench.worker import MARK, ONE_THREAD, RATIOS, Job, checkout, load

QUICK_SCALING = ("requests_1k", "slots_1024")
"""What a quick run keeps of the scaling cases, besides those that are a main case."""

QUICK_LIMIT_S, QUICK_COMPILE_S, QUICK_LAST_START_S = 84.0, 60.0, 40.0
"""Seconds after which a quick run gives up what is still under way, what has not
compiled, and scaling cases not begun. The command promises 90 s."""

_BOOT = ("import os, sys\n"
         "if hasattr(os, 'sched_setaffinity'): os.sched_setaffinity(0, {int(sys.argv[1])})\n"
         "from jaxsim.bench.worker import serve\n"
         "serve()\n")


class _Worker:
    """A pinned process; its messages come through a queue, so that waiting for them can be given up."""

    def __init__(self, job: Job, core: int):
        self.job, self.core = job, core
        root = str(Path(__file__).resolve().parents[2])
        inherited = os.environ.get("PYTHONPATH")
        env = os.environ | {
            "JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {ONE_THREAD}".strip(),
            "OMP_NUM_THREADS": "1", "JAX_ENABLE_COMPILATION_CACHE": "false",
            "PYTHONPATH": os.pathsep.join([root, inherited] if inherited else [root])}
        # Errors go to a file: a full pipe nobody reads would stop the worker.
        self._errors = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen([sys.executable, "-c", _BOOT, str(core)], stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, stderr=self._errors, text=True, env=env)
        self._messages: queue.Queue = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        self._tell(json.dumps(asdict(job)))

    def _tell(self, line: str) -> None:
        with contextlib.suppress(BrokenPipeError):  # it has died; what it said last explains
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()

    def _read(self) -> None:
        for line in self.process.stdout:
            if line.startswith(MARK):
                self._messages.put(json.loads(line[len(MARK):]))
        self._messages.put(None)

    def next(self, deadline: float) -> dict:
        """The next message: empty once it has compiled, then results. RuntimeError if there will be none."""
        wait = min(max(deadline - time.monotonic(), 0.01), threading.TIMEOUT_MAX)
        try:
            message = self._messages.get(timeout=wait)
        except queue.Empty:
            raise RuntimeError("out of time") from None
        if message is None:
            self.process.wait()
            self._errors.seek(0)
            lines = self._errors.read().strip().splitlines()
            raise RuntimeError(lines[-1] if lines else f"exit status {self.process.returncode}")
        return message

    def go(self, limit_s: float) -> None:
        """Leave to measure, about `limit_s` a case."""
        self._tell(str(limit_s))

    def close(self) -> None:
        """End it, if it has not ended; twice does no harm."""
        self.process.kill()
        self.process.wait()
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self._errors.close()


def _empty(case: Case, problem: str) -> dict:
    """The entry of a case that was not measured."""
    figures = ("requests_per_s_per_core", "best_requests_per_s_per_core", "requests_per_cpu_s",
               *RATIOS.values(), "compile_s", "peak_mib", "checksum", "agreement")
    return dict.fromkeys(figures) | asdict(case) | {"error": problem}


def _build(folder: Path, notes: list[str]) -> dict[str, str]:
    """The C++ programs and the standard workload, if there are sources and a compiler."""
    if checkout("benchmarks/cpp.py") is None:
        notes.append("no C++ ratio: benchmarks/ is part of the repository, not of the installed package")
        return {}
    cpp = load("benchmarks/cpp.py")
    try:
        binaries = {name: str(cpp.build(name, folder)) for name in cpp.PROGRAMS}
    except RuntimeError as problem:
        notes.append(f"no C++ ratio: {problem}")
        return {}
    case = MAIN_CASES[0]
    drawn = draw(case)
    cpp.write_workload(folder / "standard.bin", drawn.arrival_s, drawn.prompt, drawn.output, COEFFICIENTS,
                       slots=case.slots, num_blocks=case.num_blocks)
    return binaries


def _plan(quick: bool, only: list[str] | None) -> list[list[Case]]:
    """Cases by worker. A quick run lets cases of one program share a worker and leaves most scaling out."""
    scaling = [c for c in (*REQUEST_CASES, *SLOT_CASES) if c.name not in ALIASES]
    if only:
        scaling = [c for c in scaling if c.name in only]
        chosen = [c for c in MAIN_CASES if c.name in only]
    else:
        chosen = list(MAIN_CASES)
        if quick:
            scaling = [c for c in scaling if c.name in QUICK_SCALING]
    if not quick:
        return [[case] for case in (*chosen, *scaling)]
    groups: dict[tuple, list[Case]] = {}
    for case in (*chosen, *scaling):
        groups.setdefault((case.dims, case.scenarios), []).append(case)
    return list(groups.values())


def main(quick: bool = False, only: list[str] | None = None,
         on_result: Callable[[dict], None] | None = None) -> dict:
    """Measure, and return the report as plain data.

    quick: few repeats, few scaling cases, within 90 s; the next program compiles on another core meanwhile.
    only: names of cases; all by default. on_result: called with every result as it comes.

    Returns `results` (one entry a case: name, requests_per_s_per_core (median of the runs), ratio_to_cpp,
    compile_s, peak_mib, ...), `ratios` (`vs_cpp`, `vs_python`: of `replicas_1` to the bare C++ loop and to
    the plain-Python reference), `scaling` (largest over smallest CPU time a request), `machine` and `notes`.
    What could not be measured is None, with a note.
    """
    known = {c.name for c in (*MAIN_CASES, *REQUEST_CASES, *SLOT_CASES)}
    unknown = sorted(set(only or ()) - known)
    if unknown:
        raise ValueError(f"only = {unknown}: no such case; choose from {', '.join(sorted(known))}")
    began = time.monotonic()
    notes: list[str] = []
    load_before = load_average()
    results: list[dict] = []

    def report(result: dict) -> None:
        results.append(result)
        if on_result is not None:
            on_result(result)

    only = [ALIASES.get(name, name) for name in only] if only else None
    with tempfile.TemporaryDirectory(prefix="jaxsim-bench-") as name:
        folder = Path(name)
        binaries = _build(folder, notes)
        python_rate = _python_rate(folder, notes) if only is None else None
        jobs = [Job("engine", [asdict(c) for c in cases], 3 if quick else 7, name, binaries)
                for cases in _plan(quick, only)]
        if quick:
            _measure_quickly(jobs, began, report)
        else:
            for job in jobs:
                _measure(job, _try_start(job, _cores()[0]), 45.0, math.inf, report)

    by_name = {result["name"]: result for result in results}
    for result in results:
        share = result.get("cpu_share")
        if share is not None and share < 0.9:
            notes.append(f"{result['name']}: had {share:.0%} of its core; others were using it")
        agreement = result["agreement"]
        if agreement is not None and agreement["exact_share"] < 1:
            notes.append(f"{result['name']}: {agreement['exact_share']:.2%} of requests equal the C++ twin's "
                         f"bit for bit, {agreement['within_10us_share']:.2%} within 10 us")
        if result.get("faults"):
            notes.append(f"{result['name']}: {result['faults']} scenarios faulted; its figures are void")
        if "error" in result:
            notes.append(f"{result['name']}: not measured: {result['error']}")
    base = by_name.get("replicas_1", {})
    rate = base.get("requests_per_s_per_core")
    return {
        "results": results,
        "ratios": {"vs_cpp": base.get("ratio_to_cpp"),
                   "vs_python": rate / python_rate if rate and python_rate else None},
        "python_requests_per_s": python_rate,
        "scaling": {"requests": _spread(by_name, REQUEST_CASES), "slots": _spread(by_name, SLOT_CASES)},
        "machine": {
            "device": cpu_name(), "cores": os.cpu_count(), "is_pinned": hasattr(os, "sched_setaffinity"),
            "platform": platform.platform(), "python": platform.python_version(), "jax": jax.__version__,
            "load_average": {"before": load_before, "after": load_average()}},
        "cost": {"kind": COST_NOTE, "coefficients": COEFFICIENTS},
        "cpp": {"ratio_to_cpp": "bare loop, -O3", "ratio_to_cpp_native": "bare loop, -O3 -march=native",
                "ratio_to_twin": "simulator with the same rules, -O3 -march=native"} if binaries else None,
        "is_quick": quick, "duration_s": time.monotonic() - began, "notes": notes,
    }


def _cores() -> list[int]:
    """Cores to use in turn; the last first, for interrupts tend to go to the first."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0), reverse=True)
    return [0]


def _try_start(job: Job, core: int, deadline: float = math.inf) -> _Worker | str:
    """A worker that has compiled, or why there is none."""
    worker = _Worker(job, core)
    try:
        worker.next(deadline)
    except RuntimeError as problem:
        worker.close()
        return str(problem)
    except BaseException:
        worker.close()
        raise
    return worker


def _measure(job: Job, worker: _Worker | str, limit_s: float, deadline: float,
             report: Callable[[dict], None]) -> None:
    """Let a worker measure its cases; what it does not manage is reported as such."""
    cases = [Case(**c) for c in job.cases]
    problem = worker
    if isinstance(worker, _Worker):
        try:
            worker.go(limit_s)
            while cases:
                report(worker.next(deadline))
                cases.pop(0)
        except RuntimeError as error:
            problem = str(error)
        finally:
            worker.close()
    for case in cases:
        report(_empty(case, problem))


def _measure_quickly(jobs: list[Job], began: float, report: Callable[[dict], None]) -> None:
    """Compile all programs first, one a core at a time, then measure one after the other."""
    free: queue.Queue[int] = queue.Queue()
    for core in _cores():
        free.put(core)

    def start(job: Job) -> _Worker | str:
        core = free.get()
        try:
            is_extra = all(c["name"] in QUICK_SCALING for c in job.cases)
            if time.monotonic() > began + (QUICK_LAST_START_S if is_extra else QUICK_COMPILE_S):
                return "left out for time"
            return _try_start(job, core, began + QUICK_COMPILE_S)
        finally:
            free.put(core)

    with ThreadPoolExecutor(min(len(_cores()), 4)) as pool:
        workers = list(pool.map(start, jobs))
    deadline = began + QUICK_LIMIT_S
    try:
        left = sum(len(job.cases) for job in jobs)
        for job, worker in zip(jobs, workers, strict=True):
            share = 0.7 * (deadline - time.monotonic()) / left
            _measure(job, worker, min(4.0, share), deadline, report)
            left -= len(job.cases)
    finally:
        for worker in workers:
            if isinstance(worker, _Worker):
                worker.close()


def _python_rate(folder: Path, notes: list[str]) -> float | None:
    """Requests a second of the plain-Python reference, or None and a note."""
    if checkout("tests/reference/simulator.py") is None:
        notes.append("no Python ratio: tests/ is part of the repository, not of the installed package")
        return None
    job = Job("python", [asdict(Case("python", scenarios=1))], 1, str(folder))
    deadline = time.monotonic() + 60.0
    results: list[dict] = []
    _measure(job, _try_start(job, _cores()[0], deadline), 0.0, deadline, results.append)
    if "error" in results[0]:
        notes.append(f"no Python ratio: {results[0]['error']}")
        return None
    return results[0]["requests_per_s_per_core"]


def _spread(by_name: dict[str, dict], cases: tuple[Case, ...]) -> float | None:
    """Largest over smallest CPU time a request among the cases measured; None below two."""
    measured = (by_name.get(ALIASES.get(case.name, case.name), {}) for case in cases)
    rates = [r["requests_per_cpu_s"] for r in measured if r.get("requests_per_cpu_s")]
    return max(rates) / min(rates) if len(rates) > 1 else None


def load_average() -> tuple[float, ...] | None:
    """Of the machine, where it tells."""
    return os.getloadavg() if hasattr(os, "getloadavg") else None


def cpu_name() -> str:
    """Of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def command(quick: bool = False, as_json: bool = False, only: list[str] | None = None) -> int:
    """What `jaxsim bench` does: measure and print, the table or JSON; progress on standard error. Exit status."""
    def progress(result: dict) -> None:
        rate = result["requests_per_s_per_core"]
        figure = result.get("error") if rate is None else f"{rate / 1e6:.3f} M requests/s"
        print(f"{result['name']}: {figure}", file=sys.stderr, flush=True)

    report = main(quick, only, progress)
    if as_json:
        print(json.dumps(report, indent=2))
    else:
        show(report)
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m jaxsim.bench.engine", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="within 90 s")
    parser.add_argument("--json", action="store_true", help="print the report as JSON and nothing else")
    parser.add_argument("--only", nargs="+", metavar="CASE", help="only these cases")
    options = parser.parse_args()
    sys.exit(command(options.quick, options.json, options.only))
