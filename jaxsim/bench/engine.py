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
import importlib
import importlib.util
import json
import math
import os
import platform
import queue
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from jaxsim.cost.fitted import fitted
from jaxsim.engine import loop
from jaxsim.engine.common import Group, Params
from jaxsim.kernels import clock
from jaxsim.policy import routing
from jaxsim.policy.batching import Batching
from jaxsim.policy.hand_over import HandOver
from jaxsim.spec.dims import Dims
from jaxsim.state.requests import pack_requests

try:
    import resource
except ImportError:  # Windows has neither this nor load averages
    resource = None

COEFFICIENTS = tuple(tuple(float(np.float32(x)) for x in row) for row in (
    (6.0e-3, 2.5e-5, 0.0, 2.0e-5, 6.6e-10),
    (6.0e-3, 0.0, 5.0e-8, 2.0e-5, 0.0),
    (6.0e-3, 2.5e-5, 5.0e-8, 2.0e-5, 6.6e-10),
))
"""Fitted cost of an 8-billion-parameter Llama 3 on one H100 SXM in bf16: seconds of prefill-only,
decode-only and mixed iterations, as (a, b, c, d, e). a: 16 GB of weights at 80 % of 3.35 TB/s, rounded; b:
16 GFLOP a token at 65 % of 989 TFLOP/s; c: 131,072 bytes of KV a token (8 heads of 128, 32 layers, bf16) at
80 %; d: host and sampling time a sequence; e: 2.6e5 FLOP a unit of attention pairs at 40 %. Round figures,
not a calibration."""

KV_BYTES_PER_TOKEN, LINK_BYTES_PER_S = 131_072, 50e9
"""Of the same model, and a link of 400 Gbit/s, between engines of different roles."""

COST_NOTE = "fitted, about Llama-3-8B in bf16 on one H100 SXM"
RATES_RPS = (4.0, 12.0)
"""Arrivals a second and replica, spread evenly over the scenarios."""

QUICK_SCALING = ("requests_1k", "slots_1024")
"""What a quick run keeps of the scaling cases, besides those that are a main case."""

RATIOS = {"bare": "ratio_to_cpp", "bare_native": "ratio_to_cpp_native", "twin": "ratio_to_twin"}
"""Entry of a result by the C++ program it is a ratio to."""

QUICK_LIMIT_S, QUICK_COMPILE_S, QUICK_LAST_START_S = 84.0, 60.0, 40.0
"""Seconds after which a quick run gives up what is still under way, what has not
compiled, and scaling cases not begun. The command promises 90 s."""

TICKS_PER_S = float(1 << 30)
_BOOT = ("import os, sys\n"
         "if hasattr(os, 'sched_setaffinity'): os.sched_setaffinity(0, {int(sys.argv[1])})\n"
         "from jaxsim.bench.engine import _serve\n"
         "_serve()\n")
_ONE_THREAD = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
_MARK = "jaxsim-bench:"


@dataclass(frozen=True)
class Case:
    """One workload: `scenarios` of `requests` each on `replicas`, least outstanding first, as `vllm-v1`.

    prefill: how many of the replicas compute prompts only, the others then decode only.
    """

    name: str
    replicas: int = 1
    prefill: int = 0
    scenarios: int = 256
    requests: int = 1000
    slots: int = 128
    num_blocks: int = 3750  # of 16 tokens: 60,000
    seed: int = 0

    @property
    def budget_tokens(self) -> int:
        """max_num_batched_tokens: 512, or more where a token for every slot needs it."""
        return max(512, self.slots)

    @property
    def total(self) -> int:
        """Requests of all scenarios."""
        return self.scenarios * self.requests

    @property
    def dims(self) -> Dims:
        """Static sizes; cases of equal sizes share a program."""
        return Dims(self.requests, self.replicas, self.slots, has_roles=self.prefill > 0)


MAIN_CASES = (
    Case("replicas_1"), Case("preempting", num_blocks=500), Case("replicas_8", replicas=8),
    Case("replicas_32", replicas=32), Case("prefill_4_decode_4", replicas=8, prefill=4),
    Case("single_100k", scenarios=1, requests=100_000),
)
REQUEST_CASES = tuple(Case(f"requests_{label}", scenarios=1, requests=count) for label, count in
                      (("1k", 1000), ("10k", 10_000), ("100k", 100_000), ("1M", 1_000_000)))
SLOT_CASES = tuple(Case(f"slots_{count}", slots=count) for count in (64, 128, 256, 512, 1024))
ALIASES = {"requests_100k": "single_100k", "slots_128": "replicas_1"}
"""Scaling cases that are a main case under another name; measured once."""


@dataclass(frozen=True)
class Drawn:
    """Host arrays `(scenarios, requests)`: arrival (seconds, on its grid), prompt and output (tokens)."""

    arrival_s: np.ndarray
    prompt: np.ndarray
    output: np.ndarray
    uniforms: np.ndarray


def draw(case: Case) -> Drawn:
    """The workload of a case: Poisson arrivals, prompts of 256-767 and outputs of 64-191 tokens, uniform."""
    rng = np.random.default_rng(case.seed)
    shape = (case.scenarios, case.requests)
    low, high = RATES_RPS
    rates = low + (high - low) * (np.arange(case.scenarios) + 0.5) / case.scenarios
    gaps = rng.exponential(size=shape) / (rates * case.replicas)[:, None]
    arrival = clock.round_arrivals_reference(np.cumsum(gaps, axis=1))
    return Drawn(arrival, rng.integers(256, 768, shape), rng.integers(64, 192, shape),
                 rng.random((*shape, 2)).astype(np.float32))


def engine_inputs(case: Case, drawn: Drawn, coefficients=COEFFICIENTS):
    """`(params, requests)` of a case, each leaf with a leading axis of scenarios."""
    i, x = jnp.int32, jnp.float32
    batching = Batching(
        max_num_seqs=i(case.slots), max_num_batched_tokens=i(case.budget_tokens), max_model_len=i(4096),
        num_blocks=i(case.num_blocks), watermark_blocks=i(0), decode_context_limit=i(0), ratio_start=x(0.7),
        ratio_floor=x(0.098), ratio_decay=x(0.001), reserve_clip_tokens=i(4096), retract_free_tokens=i(20))
    one = Params((Group(batching, fitted(*coefficients)),), routing.LeastOutstanding(), i(2**31 - 1))
    if case.prefill:
        is_prefill = jnp.arange(case.replicas) < case.prefill
        most_held = jnp.full(case.replicas, math.ceil(0.05 * case.num_blocks), jnp.int32)
        one = replace(one, hand_over=HandOver(
            is_prefill, ~is_prefill, routing.LeastOutstanding(), most_held, x(KV_BYTES_PER_TOKEN / LINK_BYTES_PER_S),
            x(0), i(0)))
    params = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (case.scenarios, *leaf.shape)), one)
    packed = [pack_requests(drawn.arrival_s[b], drawn.prompt[b], drawn.output[b], uniforms=drawn.uniforms[b])
              for b in range(case.scenarios)]
    return params, jax.tree.map(lambda *leaves: jnp.asarray(np.stack(leaves)), *packed)


def engine_answers(world, num_requests: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """First token and finish (int64 ticks of 2^-30 s) and preemptions, each `(scenarios, requests)`."""
    def seconds(times):
        return clock.join_reference(*np.moveaxis(np.asarray(times), -1, 0))

    def ticks(times_s):
        return np.rint(times_s * TICKS_PER_S).astype(np.int64)

    rows = np.asarray(world.placed)[:, :num_requests, 0]
    first = ticks(np.take_along_axis(seconds(world.first_tokens), rows, axis=1))
    finish = ticks(seconds(world.finished)[:, :num_requests])
    return first, finish, np.asarray(world.progress)[:, :num_requests, 1]


def checksum(first: np.ndarray, finish: np.ndarray, preemptions: np.ndarray) -> str:
    """One number for all answers, requests in order; the C++ programs print the same for the same answers."""
    columns = [np.asarray(a).ravel().astype(np.uint64) for a in (first, finish, preemptions)]
    weights = (np.uint64(0xC2B2AE3D27D4EB4F), np.uint64(0x9E3779B97F4A7C15), np.uint64(1))
    one = sum(column * weight for column, weight in zip(columns, weights, strict=True))
    odd = 2 * np.arange(one.size, dtype=np.uint64) + np.uint64(1)
    return f"{int(np.sum(one * odd, dtype=np.uint64)):016x}"


# --- The worker: one process, one core, one program -------------------------------------------


@dataclass(frozen=True)
class Job:
    """What a worker is told: cases of one program, how often to run each, and where the C++ programs are."""

    kind: str
    cases: list[dict]
    repeats: int
    folder: str
    binaries: dict[str, str] = field(default_factory=dict)


def _say(message: dict) -> None:
    print(_MARK + json.dumps(message), flush=True)


def _serve() -> None:
    """Entry of a worker: reads its job, says when it has compiled, waits for leave, measures."""
    job = Job(**json.loads(sys.stdin.readline()))
    if job.kind == "python":
        _say({})
        sys.stdin.readline()
        _say(_time_reference(Case(**job.cases[0])))
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
            _say({})
            limit_s = float(sys.stdin.readline())
        result = _time_case(case, drawn, inputs, program, job, limit_s)
        _say(result | {"compile_s": compile_s, "shares_program": index > 0})


def _time_case(case: Case, drawn: Drawn, inputs, program, job: Job, limit_s: float) -> dict:
    """Runs the engine and the C++ programs in turn; the first round warms up and counts only if alone."""
    cpp = _load("benchmarks/cpp.py") if job.binaries else None
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
    reference = _load("tests/reference/simulator.py")
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


# --- The parent -------------------------------------------------------------------------------


def checkout(relative: str) -> Path | None:
    """A file of the repository this package runs from, if it does."""
    root = Path(__file__).resolve().parents[2]
    return root / relative if (root / "pyproject.toml").is_file() and (root / relative).is_file() else None


def _load(relative: str):
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


class _Worker:
    """A pinned process; its messages come through a queue, so that waiting for them can be given up."""

    def __init__(self, job: Job, core: int):
        self.job, self.core = job, core
        root = str(Path(__file__).resolve().parents[2])
        inherited = os.environ.get("PYTHONPATH")
        env = os.environ | {
            "JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {_ONE_THREAD}".strip(),
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
            if line.startswith(_MARK):
                self._messages.put(json.loads(line[len(_MARK):]))
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
    cpp = _load("benchmarks/cpp.py")
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


# --- For people -------------------------------------------------------------------------------


def show(report: dict, console: Console | None = None) -> None:
    """Print the report as a table."""
    console = console or Console()
    table = Table(title="Simulated requests on one core, compile time apart", title_justify="left",
                  box=SIMPLE, pad_edge=False)
    table.add_column("case", no_wrap=True)
    for name in ("M req/s", "/bare", "/twin", "compile s", "MiB", "preempted", "=twin"):
        table.add_column(name, justify="right", no_wrap=True)

    def text(value, form="{:.3f}", scale=1.0):
        return "-" if value is None else form.format(value * scale)

    for r in report["results"]:
        table.add_row(
            r["name"], text(r["requests_per_s_per_core"], scale=1e-6), text(r["ratio_to_cpp"]),
            text(r["ratio_to_twin"]), text(r["compile_s"], "{:.1f}"), text(r["peak_mib"], "{:.0f}"),
            text(r.get("preemptions_per_request"), "{:.2f}"),
            text((r["agreement"] or {}).get("exact_share"), "{:.2%}"))
    console.print(table)
    console.print("/bare, /twin: ratios to the bare C++ loop, to a C++ simulator of the same rules;\n"
                  "preempted: times a request; =twin: requests with bit-equal answers\n")
    ratios, scaling, machine = report["ratios"], report["scaling"], report["machine"]
    console.print(f"replicas_1: {text(ratios['vs_cpp'])} of the bare C++ loop, "
                  f"{text(ratios['vs_python'], '{:,.0f}')} times the plain-Python reference")
    console.print(f"CPU time a request, largest over smallest: {text(scaling['requests'], '{:.2f}')} over "
                  f"requests, {text(scaling['slots'], '{:.2f}')} over slots")
    before, after = ((load or [None])[0] for load in machine["load_average"].values())
    console.print(f"{machine['device']}, JAX {machine['jax']}, Python {machine['python']}, load "
                  f"{text(before, '{:.1f}')} before, {text(after, '{:.1f}')} after; {report['duration_s']:.0f} s\n"
                  f"cost: {report['cost']['kind']}")
    for note in report["notes"]:
        console.print(f"note: {note}")


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
