"""How long a request of ten million tokens takes to simulate, among 1,000 short ones.

Llama-3-8B on four groups of 8 H100 that share the KV; Poisson arrivals, one a second; the long prompt in the middle, in
chunks that keep an iteration to a time. Short prompts are 256-767 tokens, outputs 64-191. Cases:

    alone     one scenario, 25 ms: some 260,000 chunks, about 39 tokens each at the end
    lanes_8   eight of them together, other arrivals and lengths in each
    slower    one scenario, 100 ms: some 25,000 chunks
    stages_4  one scenario, 25 ms, four pipeline stages, whose batches overlap

Every case runs in a process of its own, pinned to one core, with one XLA thread; compile time is taken apart. Nothing
here asserts a time.
"""

import argparse
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from jaxsim.bench.apart import apart, printed, say, told
from jaxsim.bench.engine import cpu_name, load_average
from jaxsim.engine import loop, lower, simulate
from jaxsim.spec.dims import Dims
from jaxsim.spec.scenario import Scenario
from jaxsim.state import world as w
from jaxsim.workload.workload import Workload

TOKENS, SHORT_REQUESTS, GROUPS = 10_000_000, 1000, 4

CASES: dict[str, dict[str, Any]] = {
    "alone": {}, "lanes_8": {"lanes": 8}, "slower": {"target_ms": 100.0}, "stages_4": {"stages": 4}}
"""Arguments of `inputs`, by name."""


def scenario(tokens: int = TOKENS, target_ms: float = 25.0, stages: int = 1) -> Scenario:
    """The system; its workload is given beside it."""
    return Scenario.from_dict({
        "schema_version": 1, "num_seeds": 1, "device": {"name": "h100"}, "cost": {"kind": "roofline", "split_kv": True},
        "model": {"name": "llama-3-8b", "max_position": tokens + 100_000},
        "engine": {"preset": "vllm-v1@0.9", "tensor_parallel_size": 8, "pipeline_parallel_size": stages,
                   "kv_parallel_size": GROUPS, "kv_parallel_tokens": -(-tokens // GROUPS), "max_num_seqs": 256,
                   "max_num_batched_tokens": 8192, "target_batch_time_ms": target_ms, "min_chunk_tokens": 32},
        "workload": {"kind": "poisson", "rate_rps": 1.0, "num_requests": 1, "input": 100, "output": 20}})


def workload(seed: int, tokens: int = TOKENS, short: int = SHORT_REQUESTS) -> Workload:
    """The short requests, and the long one in their middle."""
    rng = np.random.default_rng(seed)
    arrival = np.cumsum(rng.exponential(1.0, short + 1))
    prompt, output = rng.integers(256, 768, short + 1), rng.integers(64, 192, short + 1)
    prompt[short // 2] = tokens
    return Workload(arrival, prompt, output)


def inputs(lanes: int = 1, tokens: int = TOKENS, short: int = SHORT_REQUESTS, **system) -> tuple:
    """Arguments of `loop.run`; system: as of `scenario`."""
    checked = scenario(tokens, **system).checked()
    made = [simulate.prepare(0, checked, False, workload(seed, tokens, short))[0] for seed in range(lanes)]

    def stacked(trees):
        return jax.tree.map(lambda *leaves: jnp.asarray(np.stack(leaves)), *trees)

    return (made[0].dims, stacked([one.params for one in made]),
            stacked([lower.make_requests(one.workload, one.dims) for one in made]))


def measured(name: str, repeats: int, **changes) -> dict[str, Any]:
    """Processor seconds of a case; changes: other arguments of `inputs`."""
    arguments = CASES[name] | changes
    dims, params, requests = inputs(**arguments)
    began = time.perf_counter()
    program = loop.run.lower(dims, params, requests).compile()
    compile_s = time.perf_counter() - began
    world, seconds = jax.block_until_ready(program(params, requests)), []
    for _ in range(repeats):
        # Processor time: others may be using the core.
        began = time.process_time()
        world = jax.block_until_ready(program(params, requests))
        seconds.append(time.process_time() - began)
    iterations = _iterations(dims, jax.device_get(world))
    return {"name": name, "lanes": len(iterations), "seconds": seconds, "compile_s": compile_s,
            "steps": np.asarray(world.steps).tolist(), "iterations": iterations,
            "us_per_iteration": 1e6 * statistics.median(seconds) / sum(iterations),
            "faults": int(np.count_nonzero(np.asarray(world.fault)))}


def _iterations(dims: Dims, world: w.World) -> list[int]:
    return [int(w.count_rows(dims).everything(row).executor.num_iterations.sum()) for row in world.counts]


def serve(name: str, repeats: str) -> None:
    """Entry of a worker: one case."""
    say(measured(name, int(repeats)))


def main(quick: bool = False, progress: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """Measure; quick: fewer repeats."""
    began, load, rows = time.monotonic(), load_average(), []
    for name in CASES:
        progress(name)
        found = apart(__spec__.name, name, 2 if quick else 5)
        rows.append(found if isinstance(found, dict) else {"name": name, "error": f"ended with {found}"})
    return {"results": rows, "duration_s": time.monotonic() - began, "machine": {
        "cpu": cpu_name(), "jax": jax.__version__, "python": platform.python_version(),
        "is_pinned": hasattr(os, "sched_setaffinity"), "load_average": {"before": load, "after": load_average()}}}


def show(report: dict[str, Any], console: Console | None = None) -> None:
    """Print the report as a table."""
    console = console or Console()
    table = Table(title=f"{TOKENS:,} tokens among {SHORT_REQUESTS:,} short requests, compile time apart",
                  title_justify="left", box=SIMPLE, pad_edge=False)
    table.add_column("case", no_wrap=True)
    for name in ("scenarios", "s", "iterations", "steps", "us/iteration", "compile s"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in report["results"]:
        if "error" in row:
            table.add_row(row["name"], row["error"])
            continue
        table.add_row(row["name"], str(row["lanes"]), f"{statistics.median(row['seconds']):.2f}",
                      f"{sum(row['iterations']):,}", f"{sum(row['steps']):,}", f"{row['us_per_iteration']:.2f}",
                      f"{row['compile_s']:.1f}")
    console.print(table)
    for row in report["results"]:
        if row.get("faults"):
            console.print(f"{row['name']}: a bound stopped {row['faults']} of {row['lanes']} scenarios early")
    machine = report["machine"]
    before, after = (load and f"{load[0]:.1f}" for load in machine["load_average"].values())
    console.print(f"{machine['cpu']}, JAX {machine['jax']}, Python {machine['python']}, load {before or '-'} before,"
                  f" {after or '-'} after; {report['duration_s']:.0f} s\ns: of processor time, of all scenarios")


def command(quick: bool = False, as_json: bool = False) -> int:
    """What `jaxsim bench --suite long-context` does. Exit status."""
    return printed(main(quick, told), as_json, show)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m jaxsim.bench.long_context", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer repeats")
    parser.add_argument("--json", action="store_true", help="print the report as JSON and nothing else")
    options = parser.parse_args()
    sys.exit(command(options.quick, options.json))
