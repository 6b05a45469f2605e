"""A process of its own, pinned to one core, that compiles one program and measures cases with it."""

import importlib
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import jax
import numpy as np

from jaxsim.bench.cases import COEFFICIENTS, TICKS_PER_S, Case, Drawn, checksum, draw, engine_answers, engine_inputs
from jaxsim.engine import loop

try:
    import resource
except ImportError:  # Windows has neither this nor load averages
    resource = None

RATIOS = {"bare": "ratio_to_cpp", "bare_native": "ratio_to_cpp_native", "twin": "ratio_to_twin"}
"""Entry of a result by the C++ program it is a ratio to."""

MARK = "jaxsim-bench:"
"""What a line to the parent begins with."""


@dataclass(frozen=True)
class Job:
    """What a worker is told: cases of one program, how often to run each, and where the C++ programs are."""

    kind: str
    cases: list[dict]
    repeats: int
    folder: str
    binaries: dict[str, str] = field(default_factory=dict)


def serve() -> None:
    """Entry of a worker: reads its job, says when it has compiled, waits for leave, measures."""
    job = Job(**json.loads(sys.stdin.readline()))
    if job.kind == "python":
        say({})
        sys.stdin.readline()
        say(_time_reference(Case(**job.cases[0])))
        return
    program = None
    for index, case in enumerate(Case(**c) for c in job.cases):
        drawn = draw(case)
        inputs = engine_inputs(case, drawn)
        if program is None:
            began = time.perf_counter()
            program = loop.run.lower(case.dims, *inputs).compile()
            compile_s = time.perf_counter() - began
        if index == 0:
            say({})
            limit_s = float(sys.stdin.readline())
        result = _time_case(case, drawn, inputs, program, job, limit_s)
        say(result | {"compile_s": compile_s, "shares_program": index > 0})


def _time_case(case: Case, drawn: Drawn, inputs, program, job: Job, limit_s: float) -> dict:
    """Runs the engine and the C++ programs in turn; the first round warms up and counts only if alone."""
    cpp = load("benchmarks/cpp.py") if job.binaries else None
    folder = Path(job.folder)
    programs = {}
    if cpp is not None:
        for name in ("bare", "bare_native"):
            programs[name] = (Path(job.binaries[name]), folder / "standard.bin")
        if case.replicas == 1:
            own = cpp.write_workload(
                folder / f"{case.name}.bin", drawn.arrival_s, drawn.prompt, drawn.output, COEFFICIENTS,
                slots=case.slots, num_blocks=case.num_blocks, budget=case.budget_tokens,
                max_jump=case.dims.max_jump)
            programs["twin"] = (Path(job.binaries["twin"]), own)

    started = time.perf_counter()
    wall_s, cpu_s, others = [], [], {name: [] for name in programs}
    world = None
    while not wall_s or (len(wall_s) <= job.repeats and time.perf_counter() - started < limit_s):
        world = None
        before, before_cpu = time.perf_counter(), time.process_time()
        world = jax.block_until_ready(program(*inputs))
        wall_s.append(time.perf_counter() - before)
        cpu_s.append(time.process_time() - before_cpu)
        for name, (binary, workload) in programs.items():
            timed = cpp.run(binary, workload, 3)
            others[name].append(timed["requests"] / timed["median_s"])
    peak = None
    if resource is not None:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** (20 if sys.platform == "darwin" else 10)
    if len(wall_s) > 1:
        wall_s, cpu_s, others = wall_s[1:], cpu_s[1:], {name: rates[1:] for name, rates in others.items()}

    rates = [case.total / s for s in wall_s]
    memory = program.memory_analysis()
    first, finish, preemptions = engine_answers(world, case.requests)
    result = {
        "name": case.name,
        "requests_per_s_per_core": statistics.median(rates), "best_requests_per_s_per_core": max(rates),
        "requests_per_cpu_s": statistics.median(case.total / s for s in cpu_s),
        "ratio_to_cpp": None, "ratio_to_cpp_native": None, "ratio_to_twin": None, "compile_s": None,
        "peak_mib": peak,
        "program_mib": (memory.temp_size_in_bytes + memory.argument_size_in_bytes
                        + memory.output_size_in_bytes) / 2**20 if memory else None,
        "runs_s": wall_s, "cpu_share": sum(cpu_s) / sum(wall_s), **asdict(case),
        "steps_per_request": float(np.sum(np.asarray(world.steps, np.float64)) / case.total),
        "preemptions_per_request": float(np.sum(preemptions) / case.total),
        "faults": int(np.count_nonzero(np.asarray(world.fault))),
        "mean_ttft_s": float(np.mean(first / TICKS_PER_S - drawn.arrival_s)),
        "mean_e2e_s": float(np.mean(finish / TICKS_PER_S - drawn.arrival_s)),
        "checksum": checksum(first, finish, preemptions), "agreement": None,
    }
    for name, key in RATIOS.items():
        if name in others:
            result[f"{name}_requests_per_s"] = statistics.median(others[name])
            result[key] = statistics.median(a / b for a, b in zip(rates, others[name], strict=True))
    if "twin" in programs:
        cpp.run(*programs["twin"], 1, folder / "answers")
        theirs = cpp.read_answers(folder / "answers", first.shape)
        off = np.maximum(np.abs(theirs.first - first), np.abs(theirs.finish - finish))
        result["agreement"] = {
            "with": "C++ simulator with the same rules",
            "checksum": checksum(theirs.first, theirs.finish, theirs.preemptions),
            "exact_share": float(np.mean((off == 0) & (theirs.preemptions == preemptions))),
            "within_10us_share": float(np.mean(off <= 1e-5 * TICKS_PER_S)),
            "same_preemptions_share": float(np.mean(theirs.preemptions == preemptions))}
    return result


def _time_reference(case: Case) -> dict:
    """The plain-Python reference simulator on one scenario."""
    reference = load("tests/reference/simulator.py")
    drawn = draw(case)
    prefill, decode, mixed = COEFFICIENTS

    def cost(s):
        a, b, c, d, e = decode if not s.num_prefill else prefill if not s.num_decode else mixed
        return (a + b * s.prefill_tokens + c * s.decode_context + d * (s.num_decode + s.num_prefill)
                + e * s.prefill_pairs)

    columns = (drawn.arrival_s[0].tolist(), drawn.prompt[0].tolist(), drawn.output[0].tolist())
    requests = [reference.Request(i, *row) for i, row in enumerate(zip(*columns, strict=True))]
    flags = reference.preset("vllm-v1", max_num_seqs=case.slots, max_num_batched_tokens=case.budget_tokens,
                             num_blocks=case.num_blocks, block_size=16)
    began = time.perf_counter()
    reference.simulate(requests, flags, 1, "least_outstanding", cost)
    return {"name": "python", "requests_per_s_per_core": case.total / (time.perf_counter() - began)}


ONE_THREAD = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"

_APART = ("import os, sys\n"
          "if hasattr(os, 'sched_setaffinity'): os.sched_setaffinity(0, {int(sys.argv[1])})\n"
          "from importlib import import_module\n"
          "import_module(sys.argv[2]).serve(*sys.argv[3:])\n")


def apart(module: str, *words: object) -> dict | int:
    """What `serve(*words)` of a module says, in a process of its own on one core, with one XLA thread, that compiles
    everything; if it says nothing, the status with which it ended."""
    core = max(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
    root = str(Path(__file__).resolve().parents[2])
    env = os.environ | {
        "JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {ONE_THREAD}".strip(),
        "OMP_NUM_THREADS": "1", "JAX_ENABLE_COMPILATION_CACHE": "false",
        "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))}
    done = subprocess.run([sys.executable, "-c", _APART, str(core), module, *map(str, words)], env=env,
                          stdout=subprocess.PIPE, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    return json.loads(lines[-1].removeprefix(MARK)) if lines else done.returncode


def say(message: dict) -> None:
    """To the process that `apart` waits in."""
    print(MARK + json.dumps(message), flush=True)


def checkout(relative: str) -> Path | None:
    """A file of the repository this package runs from, if it does."""
    root = Path(__file__).resolve().parents[2]
    return root / relative if (root / "pyproject.toml").is_file() and (root / relative).is_file() else None


def load(relative: str):
    """A module of the repository that is not part of the package; one of a package of its own comes with that."""
    path = checkout(relative)
    package = path.with_name("__init__.py")
    is_part = package.is_file()
    name = f"_jaxsim_bench_{path.parent.name if is_part else path.stem}"
    spec = importlib.util.spec_from_file_location(
        name, package if is_part else path, submodule_search_locations=[str(path.parent)] if is_part else None)
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return importlib.import_module(f"{name}.{path.stem}") if is_part else module
