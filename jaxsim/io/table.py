"""The table that `jaxsim run` prints: at most 100 columns, plain text where it is piped."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from jaxsim.cost.roofline import notes
from jaxsim.engine.lower import resolve_system
from jaxsim.metrics import ABORTS, FEWEST_FOR_TREND, PERCENTILES, Interval, LaneResult, Result, flatten
from jaxsim.spec.cluster import PoolSection
from jaxsim.spec.plan import plan_of
from jaxsim.spec.presets import load_preset
from jaxsim.spec.scenario import FittedCost, ProfiledCost, RooflineCost, Scenario

WIDTH = 100

_USUAL_HOST = "vllm-v1"
_LONGEST_LABEL = 24
_WORTH_TELLING = 0.01
_STYLES = {"UNSTABLE": "bold red", "stopped by": "bold red", "TOO SHORT": "bold"}


def console(file: TextIO | None = None) -> Console:
    """A console of at most 100 columns; a pipe gets plain text of that width. Brackets in names are text."""
    terminal = Console(file=file, highlight=False)
    return Console(file=file, highlight=False, soft_wrap=False, markup=False, emoji=False,
                   width=min(terminal.width, WIDTH) if terminal.is_terminal else WIDTH)


def number(value: float | None, digits: int = 3) -> str:
    """A number a person reads: three significant digits, more where they stand before the point; "-" for none."""
    if value is None or not np.isfinite(value):
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


def describe(scenario: Scenario, lane: LaneResult) -> list[str]:
    """What was simulated: the system, the workload, and what else a comparison has to know."""
    engine, cluster, workload = scenario.engine, scenario.cluster, scenario.workload
    preset = load_preset(engine.preset)
    model = (scenario.model.name or scenario.model.config) if scenario.model else "model of the fitted cost"
    device = f" on {scenario.device.name}" if scenario.device else ""
    degree = f" x {engine.tensor_parallel_size}" if engine.tensor_parallel_size > 1 else ""
    if engine.pipeline_parallel_size > 1:
        degree += f" x PP {engine.pipeline_parallel_size}"
    if engine.data_parallel_size > 1:
        degree += f" x DP {engine.data_parallel_size}" + (" EP" if engine.enable_expert_parallel else "")
    if engine.prefill_context_parallel_size > 1:
        degree += f" x PCP {engine.prefill_context_parallel_size}"
    if engine.decode_context_parallel_size > 1:
        degree += f" (DCP {engine.decode_context_parallel_size})"
    usual = "least_loaded rank" if engine.data_parallel_size > 1 else "round_robin"
    many = f", {cluster.replicas} replicas ({cluster.router or usual})" if cluster.replicas > 1 else ""
    if cluster.variants is not None:
        many += f" of {cluster.variants} variants"
    if cluster.pools:
        many = f", {' + '.join(map(_pool, cluster.pools))} ({cluster.router or usual})"
    kind = f"{workload.kind} {Path(workload.trace).name}" if workload.trace else workload.kind
    lengths = f" with lengths from {Path(workload.lengths_from).name}" if workload.lengths_from else ""
    what = "sessions" if workload.has_sessions else "requests"
    rate = f" at {workload.rate_rps:g} {what}/s" if workload.rate_rps else ""
    seeds = f" x {scenario.num_seeds} seeds" if scenario.num_seeds > 1 else ""
    lines = [f"{model}{device}{degree}{many}, {preset.name}",
             f"{kind}{lengths}{rate}, {lane.num_requests:,} requests{seeds}"]
    cost = _unusual_cost(scenario, preset.host)
    if cost:
        lines.append(cost)
    if lane.lost_steps:
        lines.append(f"curves over time and the timeline end early: {lane.lost_steps:,} iterations were not kept")
    if lane.front_end_s:
        lines.append(f"{lane.front_end_s * 1e3:g} ms of TTFT and E2E are outside the engine (cost.front_end_s)")
    if scenario.model and scenario.device and isinstance(scenario.cost, RooflineCost):
        lines += notes(scenario.model.spec(), scenario.device.spec(), plan_of(engine), scenario.dtype,
                       moe_backend=engine.moe_backend, kv_dtype=scenario.kv_dtype)
    if engine.hybrid is not None:
        lines += _hybrid(scenario)
    if lane.num_prefix_blocks and lane.cached_tokens is None:
        lines.append("the trace names shared prefixes, but engine.enable_prefix_caching is off: every prompt is"
                     " computed in full")
    keeps_nothing = lane.cached_tokens is None or (engine.swap is not None and not engine.swap.reuse)
    if lane.session is not None and workload.has_sessions and keeps_nothing:
        lines.append("turns bring their whole context along, but engine.enable_prefix_caching is off: it is computed in"
                     " full every time")
    return lines


def _hybrid(scenario: Scenario) -> list[str]:
    """Where the weights of a GPU and its host are, and where the token cap comes from."""
    system = resolve_system(scenario)
    weights, host, threshold = system.hybrid
    lines = list(system.memory.lines)
    if weights.streamed:
        lines.append(f"{weights.streamed / 1e9:.1f} GB of weights cross the link in every iteration, in"
                     f" {weights.streamed / host.link_bytes_per_s:.3g} s")
    if threshold is not None:
        cap = system.scheduler.max_num_batched_tokens
        taken = " (max_num_batched_tokens)" if cap == threshold.tokens else f"; max_num_batched_tokens = {cap:,}"
        lines.append(f"up to {threshold.tokens:,} tokens an iteration the link takes longest{taken}")
    return lines


def _pool(pool: PoolSection) -> str:
    what = [f"{pool.replicas} {pool.role}", f"on {pool.device}" if pool.device else "",
            f"x {pool.engine['tensor_parallel_size']}" if "tensor_parallel_size" in pool.engine else ""]
    return " ".join(filter(None, what))


def _unusual_cost(scenario: Scenario, preset_host: str) -> str:
    """How iterations are priced, where it is not the usual way: only equal prices make schedulers comparable."""
    cost = scenario.cost
    if isinstance(cost, FittedCost):
        return "cost: fitted coefficients"
    host = cost.host or preset_host
    overheads = "no host overhead" if host == "none" else f"host overhead of {host}"
    parts = [overheads] if host != _USUAL_HOST else []
    if cost.overrides:
        parts.append(f"{', '.join(sorted(cost.overrides))} overridden")
    if cost.distinct_experts != "expected":
        parts.append(f"distinct experts: {cost.distinct_experts}")
    if isinstance(cost, ProfiledCost):
        return ", ".join([f"cost: profile {Path(cost.path).name}", *parts])
    return f"cost: roofline, {', '.join(parts)}" if parts else ""


def _latencies(metrics: Mapping[str, Any], intervals: Mapping[str, Interval], out: Console) -> Table:
    """The widest form that fits: with intervals, without, in seconds, with powers of ten."""
    def plain(value: float | None, _: Interval) -> str:
        return number(value)

    def seconds(value: float | None, _: Interval) -> str:
        return number(None if value is None else value * 1e-3)

    def powers(value: float | None, _: Interval) -> str:
        return "-" if value is None else f"{value * 1e-3:.2g}"

    flat = flatten(metrics)
    forms: list[tuple[str, Callable[[float | None, Interval], str]]] = [
        ("ms", with_interval), ("ms", plain), ("s", seconds), ("s", powers)]
    for unit, text in forms:
        table = _latency_table(flat, intervals, unit, text, out.is_terminal)
        if out.measure(table, options=out.options.update(width=1000)).maximum <= out.width:
            break
    return table


def _latency_table(flat: Mapping[str, Any], intervals: Mapping[str, Interval], unit: str,
                   text: Callable[[float | None, Interval], str], is_rich: bool) -> Table:
    table = Table(box=box.SIMPLE_HEAD if is_rich else box.ASCII2, padding=(0, 1), show_edge=False)
    table.add_column(unit, style="bold", no_wrap=True)
    for name in ("mean", *(f"p{p}" for p in PERCENTILES)):
        table.add_column(name, justify="right", no_wrap=True)
    for label, key in (("TTFT", "{}_ttft_ms"), ("TPOT", "{}_tpot_ms"), ("ITL", "{}_itl_ms"), ("E2E", "{}_e2el_ms"),
                       ("queue", "queueing.{}_ms")):
        keys = [key.format(name) for name in ("mean", *(f"p{p}" for p in PERCENTILES))]
        table.add_row(label, *(text(flat[k], intervals.get(k)) for k in keys))
    return table


def _tenants(tenants: Mapping[str, Mapping[str, Any]], is_rich: bool) -> Table:
    """A row a tenant, milliseconds; names give way where it is narrow."""
    table = Table(box=box.SIMPLE_HEAD if is_rich else box.ASCII2, padding=(0, 1), show_edge=False)
    table.add_column("tenant", style="bold", overflow="ellipsis", max_width=_LONGEST_LABEL)
    columns = {"TTFT\np50": "p50_ttft_ms", "TTFT\np99": "p99_ttft_ms", "TPOT\np99": "p99_tpot_ms",
               "E2E\np99": "p99_e2el_ms"}
    for title in ("requests", "service", *columns, "limits\nmet"):
        table.add_column(title, justify="right", no_wrap=True)
    for name, t in tenants.items():
        failed = f" ({number(t['failed'])} failed)" if t["failed"] else ""
        table.add_row(Text(name), f"{number(t['requests'])}{failed}", share(t["service_share"]),
                      *(number(t[key]) for key in columns.values()), share(t["attainment"]))
    return table


def _facts(m: Mapping[str, Any], intervals: Mapping[str, Interval], runs: Sequence[Mapping[str, Any]],
           lanes: Sequence[LaneResult]) -> list[tuple[str, str]]:
    def flat(key: str, scale: float = 1.0) -> str:
        return with_interval(flatten(m)[key], intervals.get(key), scale)

    facts = [
        ("requests", f"{number(m['completed'])} completed, {number(m['failed'])} failed;"
                     f" rates over {flat('window_s')} s,"
                     f" {'between warm-up and cool-down' if m['num_cooldown_requests'] else 'drain included'}"),
        ("throughput", f"{flat('request_throughput')} requests/s, {flat('output_throughput')} output"
                       f" tokens/s, {flat('total_token_throughput')} tokens/s"),
    ]
    if "outcomes" in m:
        ends = m["outcomes"]
        facts.append(("without an answer", f"{share(ends['failed_share'])} of requests:"
                      f" {share(ends['timed_out_share'])} timed out, {share(ends['rejected_share'])} refused;"
                      f" sent {number(ends['mean_attempts'])} times on average"))
    if "outages" in m:
        out = m["outages"]
        facts.append(("outages", f"{number(out['number'])}, instances down {share(out['down_share'])} of the time;"
                      f" {number(out['lost'])} requests lost, {number(out['rerouted'])} taken by another instance,"
                      f" {number(out['failed'])} failed"))
    slo = m["slo"]
    if slo["attainment"] is not None:
        limits = ", ".join(f"{label} <= {slo[f'{name}_ms']:,.10g} ms: {share(slo[f'{name}_attainment'])}"
                           for name, label in (("ttft", "TTFT"), ("tpot", "TPOT"), ("e2e", "E2E"))
                           if slo[f"{name}_ms"] is not None)
        limits = f"; {limits}" if limits else ", each its tenant's"
        facts += [("goodput", f"{flat('request_goodput')} requests/s"),
                  ("limits met", f"{flat('slo.attainment', 100)} % of requests meet all{limits}")]
    fair = m.get("fairness")
    if fair and fair["jain_index"] is not None:
        gap = fair["max_service_gap"]
        gap = "" if gap is None else (f"; in a tenth of the run two that kept waiting were served up to {number(gap)}"
                                      " weighted tokens apart")
        facts.append(("fairness", f"Jain's index {fair['jain_index']:.3f} of service over fair shares{gap}"))
    hit = m["preemptions"]
    stall = f", {number(hit['mean_stall_ms'])} ms stalled each" if hit["mean_stall_ms"] is not None else ""
    of = f" ({share(hit['requests_share'])} of requests{stall})" if hit["total"] else ""
    facts.append(("preemptions", f"{number(hit['total'])}{of}"))
    moved = m.get("transfers")
    if moved is not None:
        facts.append(("handed over", f"{number(moved['requests'])} requests, from first token to KV at the other engine"
                                     f" {number(moved['mean_ms'])} ms on average, p99 {number(moved['p99_ms'])}"))
    moves = m.get("migrations")
    if moves is not None:
        stop = "" if moves["mean_downtime_ms"] is None else (
            f", stopped {number(moves['mean_downtime_ms'])} ms each, p99 {number(moves['p99_downtime_ms'])}")
        given_up = sum(moves[f"aborted_{cause}"] for cause in ABORTS)
        facts.append(("migrations", f"{number(moves['total'])} of {number(moves['requests'])} requests{stop};"
                                    f" {number(given_up)} given up"))
    swaps = m.get("swaps")
    if swaps is not None:
        lost = "" if swaps["delay_share"] is None else (
            f"; copies stood before iterations for {100 * swaps['delay_share']:.1f} % of the time with one in flight")
        facts.append(("swaps", f"{number(swaps['total'])}, {number(swaps['copied_blocks'])} blocks copied to host"
                               f" memory{lost}"))
    tiers = m.get("loads")
    if tiers is not None and tiers["device_share"] is not None:
        lost = "" if tiers["delay_share"] is None else (
            f"; loads lengthened iterations by {100 * tiers['delay_share']:.1f} % of the time with one in flight")
        shared = f" ({share(tiers['store_share'])} from the store)" if "store_share" in tiers else ""
        facts.append(("prompt tokens", f"{share(tiers['device_share'])} found on the device,"
                                       f" {share(tiers['loaded_share'])} loaded{shared}{lost}"))
    fleet = m.get("scaling")
    if fleet is not None:
        facts.append(("instances", f"{number(fleet['mean_instances'])} on average, {number(fleet['starts'])} started,"
                                   f" {number(fleet['drains'])} drained"))
    switching = m.get("role_switching")
    if switching is not None:
        drained = "" if switching["mean_drain_s"] is None else (
            f", {number(switching['mean_drain_s'])} s on average from its last request taken to the new role")
        facts.append(("role switches", f"{number(switching['switches'])}{drained}"))
    sessions = m.get("sessions")
    if sessions:
        facts.append(("sessions", f"{number(sessions['completed'])} completed, {number(sessions['mean_turns'])} turns"
                                  f" on average, {number(sessions['context_limited'])} ended at the context limit"))
        facts.append(("session duration", f"median {number(sessions['p50_duration_s'])} s, p99"
                                          f" {number(sessions['p99_duration_s'])} s"))
    kv = m["kv"]
    if kv["num_blocks"]:
        facts.append(("KV memory", f"mean {share(kv['mean_share'])}, peak {share(kv['peak_share'])} of"
                                   f" {kv['num_blocks']:,.0f} blocks an instance"))
    use = m["utilisation"]
    if use["busy_share"] is not None:
        spread = "" if use["least_busy_share"] == use["most_busy_share"] else (
            f" (instances {share(use['least_busy_share'])} to {share(use['most_busy_share'])})")
        facts += [("with work", f"{share(use['busy_share'])} of the time{spread}"),
                  ("running", f"{number(use['mean_running'])} requests an instance on average")]
    beyond = m["cost"]["extrapolated_share"]
    if beyond is not None and beyond > _WORTH_TELLING:
        facts.append(("extrapolated", f"{share(beyond)} of the device's time: the profile has no measurements there,"
                                      " the roofline stands in"))
    if m["unstable"]:
        told = sum(run["unstable"] is True for run in runs)
        facts.append(("UNSTABLE", f"in {told} of {len(runs)} runs more and more requests were waiting when arrivals"
                                  " ended, so these latencies depend on the length of the run"))
    elif m["unstable"] is None:
        facts += _too_short(runs, lanes)
    if m["fault"]:
        facts.append(("stopped by", str(m["fault"])))
    return facts


def _too_short(runs: Sequence[Mapping[str, Any]], lanes: Sequence[LaneResult]) -> list[tuple[str, str]]:
    """Says so where runs ended before they could settle; nothing about a handful of requests, or a single burst."""
    spans_s = [lane.arrival_s[-1] - lane.arrival_s[0] for lane in lanes]
    done = [lane.finish_s - lane.scheduled_s for lane in lanes if lane.is_finished.any()]
    if lanes[0].num_requests < FEWEST_FOR_TREND or not min(spans_s) > 0 or not done:
        return []
    told = sum(run["unstable"] is None for run in runs)
    each_s = float(np.mean([np.nanmean(lasts_s) for lasts_s in done]))
    return [("TOO SHORT", f"in {told} of {len(runs)} runs more and more requests were running when arrivals ended:"
                          f" too early to tell whether the load can be served (arrivals last"
                          f" {number(float(np.mean(spans_s)))} s, a request runs for {number(each_s)} s)")]


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
    lanes = result.lanes[index]
    out.print(Text(scenario.name or "scenario", style="bold"))
    for line in describe(scenario, lanes[0]):
        out.print(Text(line))
    out.print()
    out.print(_latencies(metrics, intervals, out))
    out.print()
    facts = Table(box=None, show_header=False, padding=(0, 2, 0, 1), pad_edge=False)
    facts.add_column(style="bold", no_wrap=True, max_width=_LONGEST_LABEL)
    facts.add_column(overflow="fold")
    for name, text in _facts(metrics, intervals, result.runs[index], lanes):
        facts.add_row(name, Text(text, style=_STYLES.get(name, "")))
    out.print(facts)
    if metrics["tenants"]:
        out.print()
        out.print(_tenants(metrics["tenants"], out.is_terminal))
    if any(ends is not None for ends in intervals.values()):
        out.print(Text("±: half of a 95 % interval over the seeds", style="dim"))
