"""Comparisons as tables and as JSON."""

from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from jaxsim.io.table import number
from jaxsim.validate.points import Points
from jaxsim.validate.replay import LATENCIES, STATISTICS, Comparison

FORMAT = "jaxsim validation 1"

LABELS = {"ttft_ms": "TTFT (ms)", "tpot_ms": "TPOT (ms)", "e2el_ms": "end to end (ms)"}


def percent(share: float | None) -> str:
    """A signed percentage."""
    return "" if share is None or not np.isfinite(share) else f"{100 * share:+.1f} %"


def as_json(comparison: Comparison) -> dict[str, Any]:
    """What `jaxsim validate --json` prints; errors signed and relative."""
    return {
        "format": FORMAT,
        "metrics": {name: {"measured": m.measured, "simulated": m.simulated, "error": m.error, "noise": m.noise}
                    for name, m in comparison.metrics.items()},
        "num_compared": len(comparison.requests), "num_replayed": len(comparison.run.workload),
        "utilisation": comparison.utilisation, "fault": comparison.lane.fault or None,
        "notes": list(comparison.notes), "scenario": comparison.result.scenarios[0].to_dict()}


def print_comparison(comparison: Comparison) -> None:
    """Table of errors, utilisation beside them, and notes."""
    console = Console(highlight=False)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("", "", "measured", "simulated", "error", "noise"):
        table.add_column(name, justify="left" if not name else "right")
    for latency in LATENCIES:
        for statistic in STATISTICS:
            m = comparison.metrics.get(f"{statistic}_{latency}")
            if m is not None:
                table.add_row(LABELS[latency] if statistic == "mean" else "", statistic, number(m.measured),
                              number(m.simulated), percent(m.error),
                              "" if m.noise is None else f"± {100 * m.noise:.1f} %",
                              end_section=statistic == STATISTICS[-1])
    m = comparison.metrics.get("output_throughput")
    if m is not None:
        table.add_row("output tokens/s", "", number(m.measured), number(m.simulated), percent(m.error), "")
    scenario = comparison.result.scenarios[0]
    console.print(f"{scenario.name or 'scenario'}: {len(comparison.requests):,} of {len(comparison.run.workload):,}"
                  f" requests of {comparison.run.path}")
    console.print(table)
    u = comparison.utilisation
    parts = [f"busy {100 * u['busy']:.0f} %", f"{u['running']:.1f} running"]
    parts += [f"{label} {100 * u[key]:.0f} %" for key, label in (
        ("kv_mean", "KV"), ("kv_peak", "KV peak"), ("cached", "prompt tokens cached"),
        ("extrapolated", "extrapolated device time")) if key in u]
    console.print("simulated engine: " + ", ".join(parts))
    console.print("noise: how far the measured figure would move if measured again (95 %, from stretches of this run)")
    for note in comparison.notes:
        console.print(f"note: {note}")


def points_json(points: Points) -> dict[str, Any]:
    """What `jaxsim validate --points --json` prints."""
    rows = points.frame.replace({np.nan: None}).to_dict("records")
    return {"format": FORMAT, "metrics": points.summary(), "points": rows, "notes": list(points.notes)}


def print_points(points: Points, most: int = 40) -> None:
    """The points with the largest errors first, and the medians."""
    console = Console(highlight=False)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("model", "device", "ranks", "isl/osl", "clients", "TTFT (ms)", "simulated", "error", "TPOT (ms)",
                 "simulated", "error"):
        table.add_column(name, justify="left" if name in ("model", "device") else "right", no_wrap=True)
    frame = points.frame[points.frame["refused"].isna()]
    size = frame[["ttft_ms_error", "tpot_ms_error"]].abs().max(axis=1)
    for row in frame.loc[size.sort_values(ascending=False).index].head(most).to_dict("records"):
        ranks = f"TP{row['tensor_parallel_size']}" + (
            f" DP{row['data_parallel_size']}" if row["data_parallel_size"] > 1 else "") + (
            f" EP{row['expert_parallel_size']}" if row["expert_parallel_size"] > 1 else "")
        table.add_row(str(row["model"]).rpartition("/")[2], str(row["device"]), ranks, f"{row['isl']}/{row['osl']}",
                      str(row["concurrency"]), number(row["ttft_ms"]), number(row["simulated_ttft_ms"]),
                      percent(row["ttft_ms_error"]), number(row["tpot_ms"]), number(row["simulated_tpot_ms"]),
                      percent(row["tpot_ms_error"]))
    console.print(table)
    if len(frame) > most:
        console.print(f"{len(frame) - most} points with smaller errors are in the files")
    for name, values in points.summary().items():
        console.print(f"{LABELS[name]}: median absolute error {100 * values['median_absolute_error']:.1f} %, 90th"
                      f" percentile {100 * values['p90_absolute_error']:.1f} %, median error"
                      f" {percent(values['median_error'])} over {values['count']} points")
    for note in points.notes:
        console.print(f"note: {note}")
