"""Comparisons as tables and as JSON."""

import math
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from jaxsim.io.result import plain
from jaxsim.io.table import number, printed
from jaxsim.validate import points as points_file
from jaxsim.validate.points import Points
from jaxsim.validate.replay import LATENCIES, STATISTICS, Comparison

FORMAT = "jaxsim validation 1"

LABELS = {"ttft_ms": "TTFT (ms)", "tpot_ms": "TPOT (ms)", "e2el_ms": "end to end (ms)"}


SHORTEST_NAME = 16
"""Columns that names get at least."""

_RESULTS = ("simulated_ttft_ms", "ttft_ms_error", "simulated_tpot_ms", "tpot_ms_error", "refused")


def percent(share: float | None) -> str:
    """A signed percentage."""
    return "-" if share is None or not math.isfinite(share) else f"{100 * share:+,.1f} %"


def _print_table(out: Console, table: Table) -> None:
    """A table whose first column folds; a narrow terminal breaks lines rather than numbers."""
    for column in table.columns[1:]:
        column.no_wrap = True
    table.columns[0].overflow = "fold"
    whole = out.measure(table, options=out.options.update(width=1000)).maximum
    first = max((len(str(cell)) for cell in table.columns[0].cells), default=0)
    table.width = max(min(whole, out.width), whole - max(first - SHORTEST_NAME, 0))
    out.print(table, crop=False)


def _print_lines(out: Console, lines: list[str]) -> None:
    for line in lines:
        out.print(Text(line), soft_wrap=True)


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
    printed(lambda out: _print_comparison(comparison, out))


def _print_comparison(comparison: Comparison, out: Console) -> None:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("", "", "measured", "simulated", "error", "noise"):
        table.add_column(name, justify="left" if not name else "right")
    for latency in LATENCIES:
        label = LABELS[latency]
        for statistic in STATISTICS:
            m = comparison.metrics.get(f"{statistic}_{latency}")
            if m is not None:
                table.add_row(label, statistic, number(m.measured), number(m.simulated), percent(m.error),
                              "" if m.noise is None else f"± {100 * m.noise:.1f} %",
                              end_section=statistic == STATISTICS[-1])
                label = ""
    m = comparison.metrics.get("output_throughput")
    if m is not None:
        table.add_row("output tokens/s", "", number(m.measured), number(m.simulated), percent(m.error), "")
    scenario = comparison.result.scenarios[0]
    _print_lines(out, [f"{scenario.name or 'scenario'}: {len(comparison.requests):,} of"
                       f" {len(comparison.run.workload):,} requests of {comparison.run.path}"])
    _print_table(out, table)
    u = {name: value for name, value in comparison.utilisation.items() if value is not None}
    parts = [f"{label} {100 * u[key]:.0f} %" for key, label in (
        ("busy", "busy"), ("kv_mean", "KV"), ("kv_peak", "KV peak"), ("cached", "prompt tokens cached"),
        ("extrapolated", "extrapolated device time")) if key in u]
    if "running" in u:
        parts.insert(1, f"{u['running']:.1f} running")
    lines = [f"simulated engine: {', '.join(parts)}"] if parts else []
    lines.append("noise: how far the measured figure would move if measured again (95 %, from stretches of this run)")
    _print_lines(out, lines + [f"note: {note}" for note in comparison.notes])


def points_json(points: Points) -> dict[str, Any]:
    """What `jaxsim validate --points --json` prints; of the file's columns those that mean something here."""
    known = {*points_file.COLUMNS, *points_file.OPTIONAL, *_RESULTS}
    names = [name for name in points.frame.columns if name in known or "." in name]
    rows = [{"row": int(index), **{name: plain(row[name]) for name in names}}
            for index, row in zip(points.frame.index, points.frame.to_dict("records"), strict=True)]
    return {"format": FORMAT, "metrics": points.summary(), "points": rows, "notes": list(points.notes)}


def print_points(points: Points, most: int = 40) -> None:
    """The points with the largest errors first, and the medians."""
    printed(lambda out: _print_points(points, most, out))


def _print_points(points: Points, most: int, out: Console) -> None:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for name in ("system", "isl/osl", "clients", "TTFT (ms)", "error", "TPOT (ms)", "error"):
        table.add_column(name, justify="right" if table.columns else "left")
    frame = points.frame[points.frame["refused"].isna()]
    size = frame[["ttft_ms_error", "tpot_ms_error"]].abs().max(axis=1)
    for row in frame.loc[size.sort_values(ascending=False).index].head(most).to_dict("records"):
        ranks = "".join(f" {short}{row[f'{name}_parallel_size']}" for short, name in (
            ("TP", "tensor"), ("DP", "data"), ("EP", "expert")) if name == "tensor" or row[f"{name}_parallel_size"] > 1)
        cells = []
        for name in ("ttft_ms", "tpot_ms"):
            cells += [f"{number(row[name])} / {number(row[f'simulated_{name}'])}", percent(row[f"{name}_error"])]
        table.add_row(f"{str(row['model']).rpartition('/')[2]} {row['device']}{ranks}", f"{row['isl']}/{row['osl']}",
                      str(row["concurrency"]), *cells)
    if table.rows:
        _print_lines(out, ["measured / simulated, largest errors first"])
        _print_table(out, table)
    lines = [f"{len(frame) - most} points with smaller errors are in the files"] if len(frame) > most else []
    lines += [f"{LABELS[name]}: median absolute error {100 * values['median_absolute_error']:.1f} %, 90th percentile"
              f" {100 * values['p90_absolute_error']:.1f} %, median error {percent(values['median_error'])} over"
              f" {values['count']} points" for name, values in points.summary().items()]
    _print_lines(out, lines + [f"note: {note}" for note in points.notes])
