"""Claims as a table of at most 100 columns, and as files."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from jaxsim.io.table import printed
from jaxsim.reproduce.claim import NO_GATE, NOT_REPRODUCED, REPRODUCED, Claim, Factor, Reproduction

_STYLES = {REPRODUCED: "green", NOT_REPRODUCED: "bold red", NO_GATE: "dim"}
_NOISE = ("noise: every step must exceed half of the 95 % interval of its mean over the seeds, which are the same on"
          " both of its sides")


def print_claims(title: str, claims: Sequence[Claim], file: TextIO | None = None) -> None:
    """Prints the claims of a system, and below them why some have no number, no gate, or another number."""
    printed(lambda out: _draw(title, claims, out), file)


def _draw(title: str, claims: Sequence[Claim], out: Console) -> None:
    out.print(Text(title, style="bold"))
    out.print()
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, expand=True)
    table.add_column("", justify="right", no_wrap=True)
    for name, ratio in (("claim", 30), ("source", 17), ("paper", 9), ("ours", 12)):
        table.add_column(name, ratio=ratio)
    for name in ("within", "verdict"):
        table.add_column(name, no_wrap=True)
    for index, claim in enumerate(claims, start=1):
        table.add_row(f"{index}", Text(claim.claim), Text(claim.source), Text(_paper(claim)), Text(_ours(claim)),
                      Text(_within(claim)), Text(claim.verdict, style=_STYLES[claim.verdict]))
    out.print(table)
    notes = Table(box=None, show_header=False, padding=(0, 2, 0, 0), pad_edge=False)
    notes.add_column(justify="right", no_wrap=True)
    notes.add_column(overflow="fold")
    told: dict[str, list[int]] = {}
    for index, claim in enumerate(claims, start=1):
        if claim.why:
            told.setdefault(claim.why, []).append(index)
    for why, rows in told.items():
        notes.add_row(_rows(rows), Text(why))
    if notes.row_count:
        out.print()
        out.print(notes)
    out.print()
    if any(_within(claim) == "noise" for claim in claims):
        out.print(Text(_NOISE, style="dim"))
    count = Counter(claim.verdict for claim in claims)
    out.print(Text(", ".join(f"{count[verdict]} {verdict}" for verdict in _STYLES)))


def _paper(claim: Claim) -> str:
    if claim.paper is None:
        return "unknown"
    return claim.paper if claim.is_order else _numbers(claim.paper)


def _ours(claim: Claim) -> str:
    if not claim.is_order or claim.ours is None:
        return _numbers(claim.ours)
    signs = {1: "<", -1: ">"}
    steps = [signs.get(s, "=") for s in np.sign(np.diff(claim.ours))]
    first, *rest = (_numbers(value) for value in claim.ours)
    return " ".join([first, *(f"{sign} {value}" for sign, value in zip(steps, rest, strict=True))])


def _within(claim: Claim) -> str:
    if not claim.is_gate:
        return "-"
    if isinstance(claim.tolerance, Factor):
        return str(claim.tolerance)
    if claim.is_order:
        return "noise" if np.any(np.asarray(claim.tolerance) > 0) else "order"
    return f"{100 * claim.tolerance:g} %" if claim.tolerance else "exact"


def _numbers(values: float | Sequence[float] | None) -> str:
    """Four digits, as a person reads them."""
    if values is None:
        return "-"
    return ", ".join("-" if not np.isfinite(v) else f"{v:,.4g}" if abs(v) < 1e4 else f"{v:,.0f}"
                     for v in np.atleast_1d(values))


def _rows(indices: Sequence[int]) -> str:
    """1-3, 5."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][-1] + 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)


def write(title: str, found: Reproduction, plot: Path, text: Path, records: Path) -> None:
    """The plot, the table as printed, and its records, into files."""
    found.draw(plot)
    with open(text, "w", encoding="utf-8") as file:
        print_claims(title, found.claims, file)
    records.write_text(to_json(found.claims), encoding="utf-8")


def to_json(claims: Sequence[Claim]) -> str:
    """Records of claims, as `jaxsim reproduce --json` prints them."""
    return json.dumps([claim.record() for claim in claims], indent=2, allow_nan=False) + "\n"
