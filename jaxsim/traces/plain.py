"""The plain format: a table with input_tokens and output_tokens, as CSV, JSON lines or Parquet.

Arrivals are in one of arrival_s, arrival_ms, arrival_us, arrival_ns; without any, the trace holds lengths
only. Optional: max_tokens, priority, tenant, predicted_tokens (of the output), prefix_block_ids (chained ids of the
prompt's blocks, separated by spaces in a CSV, a list elsewhere) with prefix_block_size (one number for the file;
default 16); session (any label), with think_s (from the answer before to this turn) or e2e_s (to the end of the answer)
to replay it closed. `block16_ids` and the like name ids and size at once. `requests.parquet` of a finished run is such
a table; where its columns `seed` or `scenario` hold several runs, one of them has to be chosen.
"""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from jaxsim._core.errors import InputError
from jaxsim.traces._table import (
    CSV,
    FILE,
    JSON_LINES,
    PARQUET,
    Probe,
    Table,
    empty,
    json_lines,
    line_places,
    missing_columns,
    numbers,
    probe,
    ragged,
    read_csv,
    refuse_duplicates,
    row_place,
)

NAME = "plain"
REQUIRED = ("input_tokens", "output_tokens")

_UNITS = {"arrival_s": 1, "arrival_ms": 10**3, "arrival_us": 10**6, "arrival_ns": 10**9}
_OPTIONAL = ("max_tokens", "priority", "tenant", "prefix_block_ids", "prefix_block_size", "session", "think_s", "e2e_s",
             "predicted_tokens")
_BLOCK_IDS = re.compile(r"block(\d+)_ids")
DEFAULT_BLOCK_SIZE = 16

_RUNS = {"seed": "run", "scenario": "scenario"}
"""Columns that tell runs apart, and the option that chooses among their values."""


def detect(probe: Probe) -> bool:
    """By its columns."""
    return probe.kind in (CSV, JSON_LINES, PARQUET) and probe.has(*REQUIRED)


def read(
    path: Path,
    *,
    max_rows: int | None = None,
    block_size: int | None = None,
    run: int | None = None,
    scenario: int | str | None = None,
    lengths_only: bool = False,
) -> Table:
    """Read the table; `block_size` (tokens per prefix block) goes before what the file says.

    run, scenario: the value of the columns `seed` and `scenario` that is kept. Without times (`lengths_only`) there
    is no harm in several runs.
    """
    seen = probe(path)
    ids_column = next((c for c in seen.columns if c == "prefix_block_ids" or _BLOCK_IDS.fullmatch(c)), None)
    names = dict.fromkeys((*_UNITS, *_OPTIONAL, *_RUNS, ids_column))
    optional = [c for c in names if c in seen.columns]
    if any(c in seen.columns for c in _RUNS):
        # The front of the file may hold one run only and so hide the others.
        max_rows = None
    place = row_place
    if seen.kind == CSV:
        frame, is_partial = read_csv(path, REQUIRED, optional, max_rows)
    elif seen.kind == JSON_LINES:
        records = list(json_lines(path, max_rows))
        frame = pd.DataFrame([record for _, record in records], dtype=object)
        place = line_places([line for line, _ in records])
        is_partial = max_rows is not None and len(records) >= max_rows
    else:
        refuse_duplicates(path, seen.columns, (*REQUIRED, *optional))
        frame, is_partial = _read_parquet(path, seen, [*REQUIRED, *optional], max_rows)
    if len(frame) == 0:
        raise empty(path)
    missing = [name for name in REQUIRED if name not in frame]
    if missing:
        raise missing_columns(path, missing, frame.columns)
    kept = np.ones(len(frame), bool)
    for column, option in _RUNS.items():
        kept &= _of_run(frame, column, option, {"run": run, "scenario": scenario}[option], path, lengths_only)
    table = Table(
        arrival_s=_arrivals(frame, place),
        input_tokens=numbers(frame["input_tokens"], "input_tokens", place),
        output_tokens=numbers(frame["output_tokens"], "output_tokens", place),
        place=place,
        is_partial=is_partial,
    )
    for name in ("max_tokens", "priority", "predicted_tokens"):
        if name in frame:
            setattr(table, name, numbers(frame[name], name, place))
    if "tenant" in frame:
        table.tenant = frame["tenant"].astype(object).where(frame["tenant"].notna(), "default").to_numpy()
    if "session" in frame:
        table.session = frame["session"].to_numpy()
        for name, attribute in (("think_s", "think_s"), ("e2e_s", "answer_s")):
            if name in frame:
                setattr(table, attribute, _times(frame[name], name, place))
    if ids_column is not None:
        rows = [_ids(value, place(i)) for i, value in enumerate(frame[ids_column])]
        table.prefix_offsets, table.prefix_hashes = ragged(rows, ids_column, place)
        table.prefix_block_size = block_size or _block_size(frame, ids_column, place)
    return table if kept.all() else table.take(np.flatnonzero(kept))


def _of_run(
    frame: pd.DataFrame, column: str, option: str, wanted: int | str | None, path: Path, may_merge: bool
) -> np.ndarray:
    """Which rows are of the run asked for."""
    field = f"workload.slice.{option}"
    if column not in frame:
        if wanted is not None:
            raise InputError(field, wanted, f"was given, but {path.name} has no column {column}", "leave it out")
        return np.ones(len(frame), bool)
    labels = frame[column].astype(str)
    found = list(labels.unique())
    shown = ", ".join(found[:8]) + (", ..." if len(found) > 8 else "")
    if wanted is None:
        if len(found) > 1 and not may_merge:
            raise InputError(
                field,
                None,
                f"is missing: {path.name} holds {len(found)} runs, of {column} {shown}, each from time 0",
                f"give one of them, e.g. {field} = {found[0]} ({option}= in Python)",
            )
        return np.ones(len(frame), bool)
    if str(wanted) not in found:
        raise InputError(field, wanted, f"is no {column} of {path.name}", f"give one of {shown}")
    return (labels == str(wanted)).to_numpy()


def _read_parquet(
    path: Path, seen: Probe, columns: list[str], max_rows: int | None
) -> tuple[pd.DataFrame, bool]:
    missing = [name for name in REQUIRED if name not in seen.columns]
    if missing:
        raise missing_columns(path, missing, seen.columns)
    try:
        frame = pq.read_table(path, columns=columns).to_pandas()
    except (OSError, pa.ArrowException) as error:
        raise InputError(FILE, str(path), f"cannot be read ({error})", "check the file") from error
    if max_rows is None or len(frame) < max_rows:
        return frame, False
    return frame.iloc[:max_rows], True


def _times(column: pd.Series, name: str, place: Any) -> np.ndarray:
    """Seconds, NaN where there are none."""
    times = np.full(len(column), np.nan)
    is_given = column.notna().to_numpy()
    if is_given.any():
        of = np.flatnonzero(is_given)
        times[is_given] = numbers(column[is_given], name, lambda i: place(int(of[i])))
    return times


def _arrivals(frame: pd.DataFrame, place: Any) -> np.ndarray | None:
    found = [name for name in _UNITS if name in frame]
    if not found:
        return None
    if len(found) > 1:
        raise InputError(
            FILE, ", ".join(found), "gives arrivals more than once", "keep one arrival column"
        )
    return numbers(frame[found[0]], found[0], place) / _UNITS[found[0]]


def _ids(value: Any, place: str) -> list[int]:
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, list):
        return value
    if value is None or (isinstance(value, float) and np.isnan(value)):
        return []
    try:
        return [int(word) for word in str(value).split()]
    except ValueError as error:
        raise InputError(
            f"{FILE} {place}, prefix_block_ids",
            value,
            "is not a list of whole numbers",
            "separate the ids by spaces",
        ) from error


def _block_size(frame: pd.DataFrame, ids_column: str, place: Any) -> int:
    named = _BLOCK_IDS.fullmatch(ids_column)
    if named:
        return int(named.group(1))
    if "prefix_block_size" not in frame:
        return DEFAULT_BLOCK_SIZE
    sizes = np.unique(numbers(frame["prefix_block_size"], "prefix_block_size", place))
    if len(sizes) != 1 or sizes[0] != int(sizes[0]):
        raise InputError(
            "prefix_block_size",
            sizes.tolist(),
            "is not one whole number for the whole file",
            "use one block size",
        )
    return int(sizes[0])
