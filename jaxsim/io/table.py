"""The table that `jaxsim run` prints: at most 100 columns, plain text where it is piped."""

from collections.abc import Callable, Mapping
from typing import Any, TextIO

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from jaxsim.metrics import PERCENTILES, Interval, Result, flatten
from jaxsim.spec.presets import load_preset
from jaxsim.spec.scenario import Scenario

WIDTH = 100


def console(file: TextIO | None = None) -> Console:
    """A console of at most 100 columns; a pipe gets plain text of that width."""
    terminal = Console(file=file, highlight=False)
    return Console(file=file, highlight=False, soft_wrap=False,
                   width=min(terminal.width, WIDTH) if terminal.is_terminal else WIDTH)


def number(value: float | None, digits: int = 3) -> str:
    """A number a person reads: three significant digits, more where they stand before the point."""
    if value is None:
        return "-"
    if value == 0:
        return "0"
    size = abs(value)
    if isinstance(value, int):
        return f"{value:,}"
    if size >= 10 ** (digits - 1):
        return f"{value:,.0f}"
    decimals = digits - 1
    while size < 1 and decimals < 6:
        size *= 10
        decimals += 1
    return f"{value:.{decimals - (size >= 10)}f}"


def share(value: float | None) -> str:
    """A share as a percentage."""
    return "-" if value is None else f"{100 * value:.1f} %"


def with_interval(value: float | None, ends: Interval, scale: float = 1.0) -> str:
    """value ± half of its interval."""
    if value is None or ends is None:
        return number(None if value is None else value * scale)
    return f"{number(value * scale)} ± {number((ends[1] - ends[0]) / 2 * scale, 2)}"


def describe(scenario: Scenario, num_requests: int) -> list[str]:
    """What was simulated, in two lines."""
    engine, cluster, workload = scenario.engine, scenario.cluster, scenario.workload
    model = (scenario.model.name or scenario.model.config) if scenario.model else "model of the fitted cost"
    device = f" on {scenario.device.name}" if scenario.device else ""
    degree = f" x {engine.tensor_parallel_size}" if engine.tensor_parallel_size > 1 else ""
    many = f", {cluster.replicas} replicas ({cluster.router})" if cluster.replicas > 1 else ""
    rate = f" at {workload.rate_rps:g} requests/s" if workload.rate_rps else ""
    seeds = f" x {scenario.num_seeds} seeds" if scenario.num_seeds > 1 else ""
    return [f"{model}{device}{degree}{many}, {load_preset(engine.preset).name}",
            f"{workload.kind}{rate}, {num_requests:,} requests{seeds}"]


def _latencies(metrics: Mapping[str, Any], intervals: Mapping[str, Interval], is_rich: bool) -> Table:
    table = Table(box=box.SIMPLE_HEAD if is_rich else box.ASCII2, padding=(0, 1), show_edge=False)
    table.add_column("milliseconds", style="bold")
    for name in ("mean", *(f"p{p}" for p in PERCENTILES)):
        table.add_column(name, justify="right", no_wrap=True)
    flat = flatten(metrics)
    rows = (("TTFT", "{}_ttft_ms"), ("TPOT", "{}_tpot_ms"), ("ITL", "{}_itl_ms"),
            ("end to end", "{}_e2el_ms"), ("in the queue", "queueing.{}_ms"))
    for label, key in rows:
        keys = [key.format(name) for name in ("mean", *(f"p{p}" for p in PERCENTILES))]
        table.add_row(label, *(with_interval(flat[k], intervals.get(k)) for k in keys))
    return table


def _facts(m: Mapping[str, Any], intervals: Mapping[str, Interval], num_runs: int,
           num_unstable: int) -> list[tuple[str, str]]:
    def flat(key: str, scale: float = 1.0) -> str:
        return with_interval(flatten(m)[key], intervals.get(key), scale)

    facts = [
        ("requests", f"{number(m['completed'])} completed, {number(m['failed'])} failed,"
                     f" in {flat('duration')} s"),
        ("throughput", f"{flat('request_throughput')} requests/s, {flat('output_throughput')} output"
                       f" tokens/s, {flat('total_token_throughput')} tokens/s"),
    ]
    slo = m["slo"]
    if slo["attainment"] is not None:
        limits = ", ".join(f"{label} <= {slo[f'{name}_ms']:g} ms: {share(slo[f'{name}_attainment'])}"
                           for name, label in (("ttft", "TTFT"), ("tpot", "TPOT"), ("e2e", "end to end"))
                           if slo[f"{name}_ms"] is not None)
        facts += [("goodput", f"{flat('request_goodput')} requests/s"),
                  ("limits met", f"{flat('slo.attainment', 100)} % of requests meet all; {limits}")]
    for name, tenant in m["tenants"].items():
        met = "" if tenant["attainment"] is None else f", limits met by {share(tenant['attainment'])}"
        ttft = f"TTFT p50 {number(tenant['p50_ttft_ms'])} ms, p99 {number(tenant['p99_ttft_ms'])} ms"
        facts.append((f"  {name}", f"{number(tenant['completed'])} requests, {ttft}{met}"))
    hit = m["preemptions"]
    stall = f", {number(hit['mean_stall_ms'])} ms stalled each" if hit["mean_stall_ms"] is not None else ""
    of = f" ({share(hit['requests_share'])} of requests{stall})" if hit["total"] else ""
    facts.append(("preemptions", f"{number(hit['total'])}{of}"))
    kv = m["kv"]
    if kv["num_blocks"]:
        facts.append(("KV memory", f"mean {share(kv['mean_share'])}, peak {share(kv['peak_share'])} of"
                                   f" {kv['num_blocks']:,.0f} blocks an instance"))
    use = m["utilisation"]
    if use["busy_share"] is not None:
        spread = "" if use["least_busy_share"] == use["most_busy_share"] else (
            f" (instances {share(use['least_busy_share'])} to {share(use['most_busy_share'])})")
        facts.append(("utilisation", f"busy {share(use['busy_share'])}{spread},"
                                     f" {number(use['mean_running'])} running on average"))
    if m["unstable"]:
        facts.append(("UNSTABLE", f"in {num_unstable} of {num_runs} runs the backlog still grew when arrivals"
                                  " ended, so these latencies depend on the length of the run"))
    if m["fault"]:
        facts.append(("stopped by", str(m["fault"])))
    return facts


def printed(draw: Callable[[Console], None], file: TextIO | None = None) -> None:
    """Draws on a terminal as it is; on a file or a pipe without colours and without padding."""
    out = console(file)
    if out.is_terminal:
        draw(out)
        return
    # rich pads every line to the full width, which a pipe has no use for.
    with out.capture() as capture:
        draw(out)
    out.file.write("\n".join(line.rstrip() for line in capture.get().splitlines()) + "\n")


def print_summary(result: Result, index: int = 0, file: TextIO | None = None) -> None:
    """Prints one scenario's table. ± is half of a 95 % interval over the seeds."""
    printed(lambda out: _print(result, index, out), file)


def _print(result: Result, index: int, out: Console) -> None:
    scenario, metrics, intervals = result.scenarios[index], result.metrics[index], result.intervals[index]
    num_unstable = sum(run["unstable"] is True for run in result.runs[index])
    out.print(Text(scenario.name or "scenario", style="bold"))
    for line in describe(scenario, result.lanes[index][0].num_requests):
        out.print(Text(line))
    out.print()
    out.print(_latencies(metrics, intervals, out.is_terminal))
    out.print()
    facts = Table(box=None, show_header=False, padding=(0, 2, 0, 1), pad_edge=False)
    facts.add_column(style="bold", no_wrap=True)
    facts.add_column(overflow="fold")
    for name, text in _facts(metrics, intervals, len(result.runs[index]), num_unstable):
        facts.add_row(name, Text(text, style="bold red" if name in ("UNSTABLE", "stopped by") else ""))
    out.print(facts)
    if any(ends is not None for ends in intervals.values()):
        out.print(Text("±: half of a 95 % interval over the seeds", style="dim"))
