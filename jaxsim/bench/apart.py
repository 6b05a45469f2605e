"""A process of its own for a measurement, pinned to one core; what it says to the parent; how a suite ends."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

MARK = "jaxsim-bench:"
"""What a line to the parent begins with."""

_BOOT = ("import os, sys\n"
         "if hasattr(os, 'sched_setaffinity'): os.sched_setaffinity(0, {int(sys.argv[1])})\n"
         "import importlib\n"
         "importlib.import_module(sys.argv[2]).serve(*sys.argv[3:])\n")

_ONE_THREAD = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"


def pinned(core: int, module: str, *words: str) -> list[str]:
    """The command that calls `serve(*words)` of a module on one core."""
    return [sys.executable, "-c", _BOOT, str(core), module, *words]


def environment() -> dict[str, str]:
    """Its environment: this package, the CPU, one thread of XLA, no programs of former runs."""
    root = str(Path(__file__).resolve().parents[2])
    return os.environ | {
        "JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {_ONE_THREAD}".strip(),
        "OMP_NUM_THREADS": "1", "JAX_ENABLE_COMPILATION_CACHE": "false",
        "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))}


def say(message: dict[str, Any]) -> None:
    """A message to the parent."""
    print(MARK + json.dumps(message), flush=True)


def said(text: str) -> dict[str, Any] | None:
    """The last message in what a process printed, None without one."""
    lines = [line for line in text.splitlines() if line.startswith(MARK)]
    return json.loads(lines[-1].removeprefix(MARK)) if lines else None


def apart(module: str, *words: object) -> dict[str, Any] | int:
    """What `serve(*words)` of a module says last, in a process of its own on the last core; if it says nothing, the
    status with which it ended."""
    core = max(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
    done = subprocess.run(pinned(core, module, *map(str, words)), env=environment(), stdout=subprocess.PIPE, text=True,
                          check=False)
    found = said(done.stdout)
    return done.returncode if found is None else found


def told(text: str) -> None:
    """Progress, on standard error."""
    print(text, file=sys.stderr, flush=True)


def printed(report: dict[str, Any], as_json: bool, show: Callable[[dict[str, Any]], None]) -> int:
    """The end of every suite: the report as JSON or as its table. Exit status."""
    if as_json:
        print(json.dumps(report, indent=2))
    else:
        show(report)
    return 0
