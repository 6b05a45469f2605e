"""What derivatives at a fixed schedule cost: `jaxsim bench --suite derivatives`.

Processor time, compile time apart, of one scenario under several seeds: the plain simulation (requests drawn, run,
handed back), the same with its schedule recorded, forward mode by P fields behind it, and reverse mode by all
parameters of the cost model. Ratios are of whole answers: forward to the plain simulation, reverse to the recorded one.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from jaxsim.bench.apart import printed, told
from jaxsim.bench.engine import load_average
from jaxsim.engine.simulate import simulate
from jaxsim.sensitivity import attribution, direct
from jaxsim.sensitivity.costs import cost_model
from jaxsim.sensitivity.recorded import record
from jaxsim.spec.scenario import Scenario

SCENARIO = "default"

FIELDS = (1, 5, 20)
"""Numbers of fields of forward mode."""

METRICS = attribution.METRICS


def measured(task: Callable[[], Any], repeats: int) -> tuple[float, float]:
    """Seconds of the first call, by the clock, and of later ones, of processor time: the median."""
    began = time.perf_counter()
    task()
    first_s, seconds = time.perf_counter() - began, []
    for _ in range(repeats):
        began = time.process_time()
        task()
        seconds.append(time.process_time() - began)
    return first_s, statistics.median(seconds)


def main(quick: bool = False, progress: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """Measure; quick: fewer requests, seeds and repeats."""
    scenario, repeats = Scenario.named(SCENARIO), 5 if quick else 15
    if quick:
        scenario = scenario.with_values({"num_seeds": 2, "workload.num_requests": 200})
    rows: list[dict[str, Any]] = []

    def row(name: str, task: Callable[[], Any]) -> float:
        progress(name)
        first_s, seconds = measured(task, repeats)
        rows.append({"name": name, "first_s": first_s, "cpu_s": seconds})
        return seconds

    plain_s = row("plain", lambda: simulate(scenario))
    recorded_s = row("recorded", lambda: record([scenario]))
    rows[-1]["ratio"] = recorded_s / plain_s
    (runs,) = record([scenario])
    model = cost_model(runs[0].made, scenario)
    names = [f"cost.overrides.{name}" for name in dict.fromkeys(model.names) if "." not in name]
    for count in FIELDS:
        fields = names[:count]
        seconds = row(f"forward, {count} fields",
                      lambda fields=fields: direct.of_runs(scenario, runs, fields, METRICS))
        rows[-1] |= {"fields": count, "ratio": (recorded_s + seconds) / plain_s, "goal": 1 + 0.15 * count}
    seconds = row(f"reverse, {len(model.names)} parameters", lambda: attribution.of_runs(scenario, runs, METRICS))
    rows[-1] |= {"fields": len(model.names), "ratio": (recorded_s + seconds) / recorded_s, "goal": 2.0}
    return {"scenario": scenario.name, "seeds": scenario.num_seeds, "requests": scenario.num_requests,
            "records": sum(int(run.tape.count) for run in runs), "metrics": len(METRICS), "results": rows,
            "jax": jax.__version__, "load_average": load_average()}


def show(report: dict[str, Any], console: Console | None = None) -> None:
    """Print the report as a table."""
    console = console or Console()
    table = Table(title=f"Scenario {report['scenario']}: {report['seeds']} seeds of {report['requests']:,} requests,"
                        f" {report['records']:,} records, {report['metrics']} metrics",
                  title_justify="left", box=SIMPLE, pad_edge=False)
    table.add_column("task", no_wrap=True)
    for name in ("first s", "CPU ms", "ratio", "goal"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in report["results"]:
        ratios = ("-" if row.get(name) is None else f"{row[name]:.2f}" for name in ("ratio", "goal"))
        table.add_row(row["name"], f"{row['first_s']:.1f}", f"{1e3 * row['cpu_s']:.0f}", *ratios)
    console.print(table)
    console.print("first: with compiling, by the clock\n"
                  "ratio: forward and its recorded run to the plain one; reverse and its recorded run to that")


def command(quick: bool = False, as_json: bool = False) -> int:
    """What `jaxsim bench --suite derivatives` does. Exit status."""
    return printed(main(quick, told), as_json, show)
