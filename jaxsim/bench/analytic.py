"""How fast closed forms are: configurations a second and core, and what derivatives cost.

A configuration is one decode step of a whole model (Llama-3.1-70B over four devices) with numbers of its own: those of
the device, the batch and the context. All of them go through one jitted call, in tiles that fit the cache; a
derivative is that of the seconds by every one of these numbers. Cases:

    genz      GenZ's operators and collectives (`jaxsim.cost.genz`): 8 numbers of the machine, batch, context
    ideal     jaxsim's counts on peaks and efficiencies (`jaxsim.analytic.ideal`): 11, batch, prompt, output
    roofline  the calibrated kernels of an H100 (`jaxsim.cost.roofline`): all its leaves, batch, context
    table     one system's tables, as the event engine reads them (`jaxsim.cost.tabulated`): batch, context

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
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from jaxsim.analytic import ideal
from jaxsim.analytic.requirements import USUAL
from jaxsim.bench.apart import apart, printed, say, told
from jaxsim.bench.engine import cpu_name, load_average
from jaxsim.cost import genz
from jaxsim.cost.base import BatchStats
from jaxsim.cost.rank import Roofline
from jaxsim.cost.roofline import roofline
from jaxsim.spec.device import load_device
from jaxsim.spec.model import load_model
from jaxsim.spec.plan import Plan, weight_format

MODEL, DEVICE, PLAN = "llama-3.1-70b", "h100", Plan(tensor_parallel_size=4)
COUNT, QUICK_COUNT = 1 << 16, 1 << 13
"""Configurations of a call."""

TILE = 1 << 12
"""Configurations that go through the model together, so that what lies between operators stays in the cache."""

SPREAD = 0.2
"""Half of the range of a device's numbers, relative."""


class Question(NamedTuple):
    """Seconds of one configuration, and its numbers with an axis of configurations in front."""

    seconds: Callable[[Any], jax.Array]
    numbers: Any


def _spread(tree: Any, count: int, rng: np.random.Generator) -> Any:
    """Every floating leaf once a configuration, around its value."""
    def drawn(leaf):
        factors = 1 + SPREAD * (2 * rng.random((count, *np.shape(leaf))) - 1)
        return jnp.asarray(np.asarray(leaf) * factors, jnp.float32)

    return jax.tree.map(drawn, tree)


def _uniform(count: int, rng: np.random.Generator, low: float, high: float) -> jax.Array:
    return jnp.asarray(rng.uniform(low, high, count), jnp.float32)


def genz_question(count: int, rng: np.random.Generator) -> Question:
    """GenZ's decode pass."""
    model = load_model(MODEL)

    def seconds(numbers):
        machine, batch, context = numbers
        return genz.pass_seconds(genz.decode_work(model, PLAN, context=context, batch=batch), machine).total

    machine = genz.Machine.named("H100", 0.75)
    # Efficiencies stay below one.
    machine = eqx.tree_at(lambda m: m.link_efficiency, machine, jnp.asarray(0.75))
    return Question(seconds, (_spread(machine, count, rng), _uniform(count, rng, 1, 256),
                              _uniform(count, rng, 100, 8000)))


def ideal_question(count: int, rng: np.random.Generator) -> Question:
    """A decode pass of jaxsim's counts."""
    model, fmt = load_model(MODEL), weight_format("auto", load_model(MODEL))

    def seconds(numbers):
        platform, batch, prompt, output = numbers
        return ideal.decode_pass(model, PLAN, fmt, 2.0, prompt=prompt, generated=output, batch=batch).seconds(
            platform).total

    device, ranks = load_device(DEVICE), PLAN.num_devices
    flops, link = device.peak("bf16").flops, device.link_among(ranks).bytes_per_s
    platform = ideal.Platform(flops, flops, device.memory_bytes_per_s, link, link, genz.START_S, genz.LINK_LATENCY_S,
                              *USUAL)
    return Question(seconds, (_spread(platform, count, rng), _uniform(count, rng, 1, 256),
                              _uniform(count, rng, 100, 8000), _uniform(count, rng, 1, 1000)))


def roofline_question(count: int, rng: np.random.Generator) -> Question:
    """A decode step of calibrated kernels: device, and the host beside it."""
    numbers, rest = eqx.partition(roofline(load_model(MODEL), load_device(DEVICE), PLAN), eqx.is_inexact_array)

    def seconds(asked):
        leaves, batch, context = asked
        cost: Roofline = eqx.combine(leaves, rest)
        sequences = batch[None]
        slope = cost.decode_attention(sequences)[1]
        device = cost.decode_seconds(sequences, sequences) + slope * sequences * context
        launch, _, serial = cost.host_seconds(sequences)
        return (serial + jnp.maximum(launch, device))[0]

    return Question(seconds, (_spread(numbers, count, rng), _uniform(count, rng, 1, 256),
                              _uniform(count, rng, 100, 8000)))


def table_question(count: int, rng: np.random.Generator) -> Question:
    """A decode step of one system's tables; counts are whole numbers, so derivatives are by the context's scale."""
    table = roofline(load_model(MODEL), load_device(DEVICE), PLAN).tabulate(2048, 256)

    def seconds(asked):
        batch, context = asked
        sequences = batch.astype(jnp.int32)
        zero = jnp.int32(0)
        tokens = (batch * context).astype(jnp.int32)
        return table.iteration(BatchStats(sequences, tokens, zero, zero, zero, jnp.float32(0), sequences, zero, zero))

    return Question(seconds, (_uniform(count, rng, 1, 256), _uniform(count, rng, 100, 4000)))


QUESTIONS = {"genz": genz_question, "ideal": ideal_question, "roofline": roofline_question, "table": table_question}


def tiled(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A function of one configuration for all of them, a tile at a time."""
    def mapped(numbers):
        cut = jax.tree.map(lambda leaf: leaf.reshape(-1, TILE, *leaf.shape[1:]), numbers)
        found = jax.lax.map(jax.vmap(function), cut)
        return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), found)

    return mapped


def measured(name: str, count: int, repeats: int) -> dict[str, Any]:
    """Configurations a second of processor time of a case, without and with derivatives."""
    question = QUESTIONS[name](count, np.random.default_rng(0))
    found: dict[str, Any] = {"name": name, "configurations": count}
    kinds = {"value": question.seconds, "gradient": jax.value_and_grad(question.seconds)}
    if name == "table":
        del kinds["gradient"]
    for kind, function in kinds.items():
        began = time.perf_counter()
        program = jax.jit(tiled(function)).lower(question.numbers).compile()
        compile_s = time.perf_counter() - began
        seconds, answer = [], jax.block_until_ready(program(question.numbers))
        for _ in range(repeats):
            # Processor time: others may be using the core.
            began = time.process_time()
            answer = jax.block_until_ready(program(question.numbers))
            seconds.append(time.process_time() - began)
        found |= {f"{kind}_s": seconds, f"{kind}_compile_s": compile_s,
                  f"{kind}_per_s": count / statistics.median(seconds)}
        if kind == "value":
            found["mean_step_s"] = float(np.mean(np.asarray(answer, np.float64)))
    found["numbers"] = sum(int(np.prod(leaf.shape[1:])) for leaf in jax.tree.leaves(question.numbers))
    found["gradient_ratio"] = found["value_per_s"] / found["gradient_per_s"] if "gradient" in kinds else None
    return found


def serve(name: str, count: str, repeats: str) -> None:
    """Entry of a worker: one case."""
    say(measured(name, int(count), int(repeats)))


def main(quick: bool = False, progress: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """Measure; quick: fewer configurations and repeats."""
    began, load, rows = time.monotonic(), load_average(), []
    for name in QUESTIONS:
        progress(name)
        found = apart(__spec__.name, name, QUICK_COUNT if quick else COUNT, 5 if quick else 15)
        rows.append(found if isinstance(found, dict) else {"name": name, "error": f"ended with {found}"})
    return {"results": rows, "duration_s": time.monotonic() - began, "machine": {
        "cpu": cpu_name(), "jax": jax.__version__, "python": platform.python_version(),
        "is_pinned": hasattr(os, "sched_setaffinity"), "load_average": {"before": load, "after": load_average()}}}


def show(report: dict[str, Any], console: Console | None = None) -> None:
    """Print the report as a table."""
    console = console or Console()
    table = Table(title=f"Decode steps of {MODEL} on one core, compile time apart", title_justify="left", box=SIMPLE,
                  pad_edge=False)
    table.add_column("case", no_wrap=True)
    for name in ("M/s", "gradients M/s", "ratio", "numbers", "compile s", "step ms"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in report["results"]:
        if "error" in row:
            table.add_row(row["name"], row["error"])
            continue
        ratio, gradient = row["gradient_ratio"], row.get("gradient_per_s")
        found = ["-", "-"] if gradient is None else [f"{gradient / 1e6:.2f}", f"{ratio:.2f}"]
        table.add_row(row["name"], f"{row['value_per_s'] / 1e6:.2f}", *found, f"{row['numbers']}",
                      f"{row['value_compile_s']:.1f}", f"{1e3 * row['mean_step_s']:.2f}")
    console.print(table)
    machine = report["machine"]
    console.print(f"{machine['cpu']}, JAX {machine['jax']}, Python {machine['python']}; {report['duration_s']:.0f} s\n"
                  "M/s: million configurations a second of processor time; numbers: of each; the gradient is by all")


def command(quick: bool = False, as_json: bool = False) -> int:
    """What `jaxsim bench --suite analytic` does. Exit status."""
    return printed(main(quick, told), as_json, show)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m jaxsim.bench.analytic", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer and shorter")
    parser.add_argument("--json", action="store_true", help="print the report as JSON and nothing else")
    options = parser.parse_args()
    sys.exit(command(options.quick, options.json))
