"""The table that `jaxsim sensitivity` prints: at most 80 columns."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from rich.table import Table

from jaxsim.io.table import console, number
from jaxsim.sensitivity.total import Row, Sensitivity
from jaxsim.study.view import label, short

WIDTH = 80

MOST_ROWS = 12
"""Of a metric, where there are several."""

LEAST = 0.005
"""Elasticities that are smaller are not printed."""


def signed(value: float | None, digits: int = 2) -> str:
    """An elasticity."""
    text = "-" if value is None else f"{value:+.{digits}f}"
    return text[1:] if value is not None and float(text) == 0 else text


def in_order(rows: Sequence[Row]) -> list[Row]:
    """The largest first, and behind them those whose sign the interval leaves open."""
    return sorted(rows, key=lambda row: (row.total is None, not row.is_sure, -abs(row.total or 0.0)))


def worth_showing(rows: Sequence[Row]) -> list[Row]:
    """Without those that change nothing."""
    return [row for row in in_order(rows) if "no change" not in row.flags
            and (row.total is None or abs(row.total) >= LEAST or row.total_high - row.total_low > 2 * LEAST)]


def flags_text(row: Row) -> str:
    """What to mind, in few words."""
    words = {"whole steps": "whole steps", "no neighbour": "no neighbour"}
    return ", ".join(next((text for key, text in words.items() if flag.startswith(key)), flag) for flag in row.flags)


def print_table(found: Sensitivity, file: Any = None) -> None:
    """Print it."""
    out = console(file)
    out.width = min(out.width, WIDTH)
    names, shown = short(found.fields), []
    for metric in found.metrics:
        rows = [row for row in found.rows if row.metric == metric]
        if len(found.scenarios) > 1:
            _print_over_study(out, found, metric, rows, names)
        else:
            shown += _print_of_point(out, found, metric, rows, names)
    for line in notes(found, shown):
        out.print(line)


def _print_of_point(out: Any, found: Sensitivity, metric: str, rows: Sequence[Row], names: dict[str, str]
                    ) -> Sequence[Row]:
    """Returns the rows that are in it."""
    shown = worth_showing(rows)
    most = MOST_ROWS if len(found.metrics) > 1 else len(shown)
    has_direct = any(row.direct is not None for row in found.rows)
    base = next((row.metric_value for row in rows if row.metric_value is not None), None)
    table = Table(box=None, pad_edge=False)
    table.add_column("by", overflow="ellipsis", no_wrap=True, max_width=34)
    for title in ("total", "±", *(("direct", "gap") if has_direct else ()), "step"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("", overflow="ellipsis", no_wrap=True)
    for row in shown[:most]:
        half = None if row.total is None else (row.total_high - row.total_low) / 2
        cells = [signed(row.total), "-" if half is None else f"{half:.2f}"]
        if has_direct:
            cells += [signed(row.direct), signed(row.feedback)]
        step = "-" if not np.isfinite(row.step) else f"{100 * row.step:.2g} %"
        table.add_row(names[row.field], *cells, step, flags_text(row))
    hidden = len(shown) - most
    still = len(rows) - len(shown)
    out.print(f"\n{label(metric)}: {number(base)}", style="bold")
    out.print(table)
    told = [f"{hidden} smaller or less sure" if hidden > 0 else "", f"{still} without effect on it" if still else ""]
    if any(told):
        out.print(f"and {', '.join(filter(None, told))}")
    return shown[:most]


def _print_over_study(out: Any, found: Sensitivity, metric: str, rows: Sequence[Row], names: dict[str, str]) -> None:
    out.print(f"\n{label(metric)}: total over {len(found.scenarios)} scenarios", style="bold")
    table = Table(box=None, pad_edge=False)
    table.add_column("by", overflow="ellipsis", no_wrap=True, max_width=34)
    for title in ("least", "median", "most", "sure at", "largest at"):
        table.add_column(title, justify="right", no_wrap=True)
    kept = []
    for name in found.fields:
        mine = [row for row in rows if row.field == name and row.total is not None]
        if mine and max(abs(row.total) for row in mine) >= LEAST:
            kept.append((name, mine))
    # Noise is no size: only cells whose sign is known count.
    sure = {name: [row for row in mine if row.is_sure] for name, mine in kept}
    kept.sort(key=lambda item: -float(np.median([abs(row.total) for row in sure[item[0]]] or [-1.0])))
    for name, mine in kept[:MOST_ROWS]:
        totals = [row.total for row in sure[name]]
        ends = [signed(f(totals) if totals else None) for f in (min, np.median, max)]
        largest = max(sure[name], key=lambda row: abs(row.total), default=None)
        table.add_row(names[name], *ends, f"{len(totals)} of {len(mine)}",
                      "-" if largest is None else f"point {largest.point}")
    out.print(table)
    if len(kept) > MOST_ROWS:
        out.print(f"and {len(kept) - MOST_ROWS} smaller or less sure")


def notes(found: Sensitivity, shown: Sequence[Row]) -> Iterator[str]:
    """What the table leaves unsaid; shown: rows whose flags it has."""
    yield (f"\ntotal: per cent of the metric for one per cent of the number, ±: half of a 95 % interval over"
           f" {found.num_seeds} seeds; step: of the number, each way")
    if len(found.scenarios) > 1:
        yield "sure at: points where the interval tells the sign; least, median and most are of these"
    if any(row.direct is not None for row in shown):
        yield "direct: with the schedule held fixed; gap: total - direct, what queueing adds"
    elif found.direct_note:
        yield f"no `direct`: {found.direct_note}"
    said = {"noisy": "noisy: could be of either sign, take more --seeds or a larger --step",
            "saturated": "saturated: requests pile up on one side of the step, so it depends on the length of the run",
            "unstable": "unstable: requests pile up, so values depend on the length of the run",
            "kink": "kink: the sides of the step disagree, so the number holds for neither",
            "one-sided": "one-sided: the other side cannot be simulated, or not in the same program"}
    flags = {flag for row in shown for flag in row.flags}
    yield from (text for flag, text in said.items() if flag in flags)
    yield from found.notes[:3]
    for index, reason in list(found.refused.items())[:3]:
        yield f"refused: point {index}: {reason}"
    yield (f"{len(found.fields)} numbers, {len(found.rows):,} derivatives; {found.num_runs:,} runs in {found.programs}"
           f" program{'s' * (found.programs != 1)}, {found.elapsed_s:.1f} s")
