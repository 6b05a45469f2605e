"""Compiles and runs the C++ programs of `cpp/`: what the engine is compared with.

`twin` simulates one replica under the rules of preset `vllm-v1`; `bare` is the bare loop every figure is a
ratio to. Both read the same workload file and, for the same requests, must give the same answers as the
engine (`twin` always, `bare` where blocks and budget never bind).
"""

import json
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jaxsim.bench.cases import checksum

SOURCES = Path(__file__).resolve().parent / "cpp"
COMMON = ("-O3", "-std=c++17", "-ffp-contract=off")
"""No contraction into fused multiply-adds beyond those written: durations round where the source says."""

PROGRAMS = {
    "bare": ("bare.cpp", COMMON),
    "bare_native": ("bare.cpp", (*COMMON, "-march=native")),
    "twin": ("twin.cpp", (*COMMON, "-march=native")),
}
"""Source and flags by name. `bare` at plain -O3 is the unit in which the project's speed has been stated
from its first prototype on; with the host's own instructions (`bare_native`) the same loop is about three
times as fast, because its scan for the next completion becomes vector code."""

MAGIC = b"JXSBNCH1"
TICKS_PER_S = float(1 << 30)


@dataclass(frozen=True)
class Answers:
    """What happened to each request: first token and finish (int64 ticks of 2^-30 s), preemptions (int32)."""

    first: np.ndarray
    finish: np.ndarray
    preemptions: np.ndarray

    def checksum(self) -> str:
        """The same as the programs print; requests in the order of the file."""
        return checksum(self.first, self.finish, self.preemptions)


def find_compiler() -> str | None:
    """$CXX, else the first of g++, clang++ and c++ on the path."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++", "c++"]
    return next(filter(None, map(shutil.which, names)), None)


def build(name: str, folder: Path) -> Path:
    """Compile one of `PROGRAMS` into `folder`; RuntimeError without a compiler or if it fails."""
    compiler = find_compiler()
    if compiler is None:
        raise RuntimeError("no C++ compiler (g++ or clang++) found")
    binary = Path(folder) / name
    source, flags = PROGRAMS[name]
    command = [compiler, *flags, "-o", str(binary), str(SOURCES / source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr.strip()}")
    return binary


def write_workload(path: Path, arrival_s, prompt, output, coefficients, *, slots: int, num_blocks: int,
                   block_size: int = 16, budget: int = 512, max_jump: int = 2048) -> Path:
    """Write scenarios for the programs.

    arrival_s (seconds, on the grid of 2^-30), prompt, output (tokens): `(scenarios, requests)`; coefficients:
    the rows (a, b, c, d, e) of the fitted cost for prefill-only, decode-only and mixed iterations.
    """
    arrival = np.rint(np.asarray(arrival_s, np.float64) * TICKS_PER_S).astype("<i8")
    sizes = np.array([*arrival.shape, slots, num_blocks, block_size, budget, max_jump, 0], "<i4")
    parts = (sizes, np.asarray(coefficients, "<f4").reshape(3, 5), arrival,
             np.asarray(prompt, "<i4"), np.asarray(output, "<i4"))
    Path(path).write_bytes(MAGIC + b"".join(part.tobytes() for part in parts))
    return Path(path)


def run(binary: Path, workload: Path, repeats: int = 1, answers: Path | None = None) -> dict:
    """What the program prints: requests, best_s, median_s, checksum, preemptions, iterations, steps."""
    command = [str(binary), str(workload), str(repeats), *([str(answers)] if answers else [])]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def read_answers(path: Path, shape: tuple[int, int]) -> Answers:
    """The answers a program wrote, each `(scenarios, requests)`."""
    raw, count = Path(path).read_bytes(), int(np.prod(shape))
    return Answers(np.frombuffer(raw, "<i8", count).reshape(shape),
                   np.frombuffer(raw, "<i8", count, 8 * count).reshape(shape),
                   np.frombuffer(raw, "<i4", count, 16 * count).reshape(shape))
