"""Vidur trace CSV: arrived_at (s), num_prefill_tokens, num_decode_tokens.

Without `arrived_at` (Vidur's length files) the trace holds lengths only.

Source: microsoft/vidur.
"""

from pathlib import Path

from jaxsim.traces._table import CSV, Probe, Table, numbers, read_csv

NAME = "vidur"
REQUIRED = ("num_prefill_tokens", "num_decode_tokens")


def detect(probe: Probe) -> bool:
    """By its columns."""
    return probe.kind == CSV and probe.has(*REQUIRED)


def read(path: Path, *, max_rows: int | None = None) -> Table:
    """Read the trace."""
    frame, is_partial = read_csv(path, REQUIRED, ("arrived_at",), max_rows=max_rows)
    return Table(
        arrival_s=numbers(frame["arrived_at"], "arrived_at") * 1.0 if "arrived_at" in frame else None,
        input_tokens=numbers(frame["num_prefill_tokens"], "num_prefill_tokens"),
        output_tokens=numbers(frame["num_decode_tokens"], "num_decode_tokens"),
        is_partial=is_partial,
    )
