"""What derivatives at a fixed schedule cost: `jaxsim bench --suite derivatives`.

Processor time of one core in a process of its own, with one XLA thread, compile time apart, of one scenario under
several seeds: the plain simulation (requests drawn, run, handed back), the same with elasticities by P fields (forward
mode), the same with its schedule recorded, and what reverse mode by all parameters of the cost model adds to that. They
take turns, so that what else the machine does falls on all of them. Ratios are of whole answers: forward to the plain
simulation, reverse to the recorded one.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from jaxsim.bench.apart import apart, printed, say, told
from jaxsim.bench.engine import load_average
from jaxsim.engine.simulate import simulate
from jaxsim.sensitivity import attribution, direct
from jaxsim.sensitivity.costs import cost_model, tangents
from jaxsim.sensitivity.recorded import record
from jaxsim.spec.scenario import Scenario

SCENARIO = "default"

FIELDS = (1, 5, 20)
"""Numbers of fields of forward mode, all of which have an effect."""

PLAIN, RECORDED = "plain", "recorded"

METRICS = attribution.METRICS


def measured(tasks: dict[str, Callable[[], Any]], repeats: int) -> dict[str, tuple[float, float]]:
    """Seconds of the first call, by the clock, and of later ones, of processor time: the median over turns."""
    first_s: dict[str, float] = {}
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for name, task in tasks.items():
        began = time.perf_counter()
        task()
        first_s[name] = time.perf_counter() - began
    for _ in range(repeats):
        for name, task in tasks.items():
            began = time.process_time()
            task()
            seconds[name].append(time.process_time() - began)
    return {name: (first_s[name], statistics.median(seconds[name])) for name in tasks}


def serve(quick: str) -> None:
    """Entry of the process."""
    say(report(bool(int(quick))))


def report(quick: bool) -> dict[str, Any]:
    """Measure, in this process; quick: fewer requests, seeds and repeats."""
    scenario = Scenario.named(SCENARIO)
    if quick:
        scenario = scenario.with_values({"num_seeds": 2, "workload.num_requests": 200})
    began = time.perf_counter()
    (runs,) = record([scenario])
    compiled_s = time.perf_counter() - began
    model = cost_model(runs[0].made, scenario)
    names = [f"cost.overrides.{name}" for name in dict.fromkeys(model.names) if "." not in name]
    names = list(tangents(model, runs[0].made, scenario, names))
    counts = [count for count in FIELDS if count <= len(names)]

    def forward(fields: list[str]) -> Callable[[], Any]:
        return lambda: direct.direct([scenario], fields, METRICS)

    reverse = f"reverse, {len(model.names)} parameters"
    found = measured({PLAIN: lambda: simulate(scenario), RECORDED: lambda: record([scenario]),
                      **{_forward(count): forward(names[:count]) for count in counts},
                      reverse: lambda: attribution.of_runs(scenario, runs, METRICS)}, 5 if quick else 31)
    plain_s, recorded_s = found[PLAIN][1], found[RECORDED][1]
    more: dict[str, dict[str, Any]] = {RECORDED: {"first_s": compiled_s, "ratio": recorded_s / plain_s}}
    for count in counts:
        more[_forward(count)] = {"fields": count, "ratio": found[_forward(count)][1] / plain_s,
                                 "goal": 1 + 0.15 * count}
    ratio = (recorded_s + found[reverse][1]) / recorded_s
    more[reverse] = {"fields": len(model.names), "ratio": ratio, "goal": 2.0}
    return {"scenario": scenario.name, "seeds": scenario.num_seeds, "requests": scenario.num_requests,
            "records": sum(int(run.tape.count) for run in runs), "metrics": len(METRICS),
            "results": [{"name": name, "first_s": first_s, "cpu_s": cpu_s} | more.get(name, {})
                        for name, (first_s, cpu_s) in found.items()],
            "jax": jax.__version__, "load_average": load_average()}


def _forward(count: int) -> str:
    return f"forward, {count} field{'s' * (count > 1)}"


def main(quick: bool = False, progress: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """Measure, in a process of its own. Raises `RuntimeError` where the measurement fails."""
    progress("derivatives")
    found = apart(__spec__.name, int(quick))
    if isinstance(found, int):
        raise RuntimeError(f"the measurement failed with exit status {found}; its error is above")
    return found


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
                  "ratio: forward, a run with derivatives, to the plain one; reverse and its recorded run to that")


def command(quick: bool = False, as_json: bool = False) -> int:
    """What `jaxsim bench --suite derivatives` does. Exit status."""
    return printed(main(quick, told), as_json, show)
