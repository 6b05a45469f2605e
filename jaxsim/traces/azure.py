"""Azure LLM inference traces of 2023 and 2024: TIMESTAMP, ContextTokens, GeneratedTokens.

2023 stamps have seven digits (`2023-11-16 18:17:03.9799600`), 2024 ones an offset
(`2024-05-10 00:00:00.009930+00:00`); times are kept relative to the earliest row. A row without generated tokens
has nothing to simulate and is left out by default (counted in the provenance).

Source: Azure/AzurePublicDataset.
"""

from pathlib import Path

import numpy as np
import pandas as pd

from jaxsim._core.errors import InputError
from jaxsim.traces._table import CSV, FILE, Probe, Table, numbers, read_csv, row_place

NAME = "azure"
REQUIRED = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")


def detect(probe: Probe) -> bool:
    """By its columns."""
    return probe.kind == CSV and probe.has(*REQUIRED)


def read(path: Path, *, max_rows: int | None = None) -> Table:
    """Read the trace."""
    frame, is_partial = read_csv(path, REQUIRED, max_rows=max_rows)
    return Table(
        arrival_s=_seconds(frame["TIMESTAMP"]),
        input_tokens=numbers(frame["ContextTokens"], "ContextTokens"),
        output_tokens=numbers(frame["GeneratedTokens"], "GeneratedTokens"),
        drop_failed=True,
        is_partial=is_partial,
    )


def _seconds(stamps: pd.Series) -> np.ndarray:
    """Seconds from the earliest row; differences are taken in nanoseconds, which float64 epochs would lose."""
    times = pd.to_datetime(stamps.astype("string"), format="ISO8601", utc=True, errors="coerce")
    bad = times.isna().to_numpy()
    if bad.any():
        at = int(np.argmax(bad))
        raise InputError(
            f"{FILE} {row_place(at)}, TIMESTAMP",
            stamps.iloc[at],
            "is not a date and time",
            "write it like 2023-11-16 18:17:03.9799600",
        )
    nanoseconds = pd.DatetimeIndex(times).as_unit("ns").asi8
    return (nanoseconds - (nanoseconds.min() if len(nanoseconds) else 0)) / 1e9
