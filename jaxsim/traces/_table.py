"""What readers share: probing a file, columns of numbers, and turning a table into a workload."""

import csv
import dataclasses
import gzip
import io
import json
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from jaxsim._core.errors import InputError, suggest
from jaxsim.workload import AbstractArrivals, Poisson, Stream, Workload, routing_uniforms, stream_key
from jaxsim.workload.arrivals import check_rate
from jaxsim.workload.streams import uniforms
from jaxsim.workload.workload import take_ragged

FILE = "workload.trace"
"""How the file is called in errors: by the field of a scenario that names it."""

CSV, JSON, JSON_LINES, PARQUET = "csv", "json", "json-lines", "parquet"

_KINDS = {
    ".csv": CSV,
    ".tsv": CSV,
    ".txt": CSV,
    ".json": JSON,
    ".jsonl": JSON_LINES,
    ".ndjson": JSON_LINES,
    ".parquet": PARQUET,
    ".pq": PARQUET,
}


# ---- files


def as_path(path: str | Path) -> Path:
    """The path, if it is a readable file."""
    if not isinstance(path, (str, os.PathLike)) or not str(path):
        raise InputError(FILE, path, "is not the path of a file", "give the path of a trace file")
    path = Path(path).expanduser()
    if not path.exists():
        try:
            near = sorted(p.name for p in path.parent.iterdir())
        except OSError:
            near = []
        raise InputError(FILE, str(path), "is not there", suggest(path.name, near, "give the path of a trace file"))
    if not path.is_file():
        raise InputError(FILE, str(path), "is not a file", "give the trace file itself")
    return path


def _suffix(path: Path) -> str:
    return Path(path.stem).suffix.lower() if path.suffix.lower() == ".gz" else path.suffix.lower()


def _separator(path: Path) -> str:
    return "\t" if _suffix(path) == ".tsv" else ","


def open_text(path: Path) -> io.TextIOBase:
    """The file as text, unpacked if it ends in .gz, without a byte order mark."""
    opener = gzip.open if path.suffix.lower() == ".gz" else open
    return opener(path, "rt", encoding="utf-8-sig", newline="")


def _not_text(path: Path, error: Exception) -> InputError:
    return InputError(
        FILE, str(path), f"cannot be read as text ({error})", "give a CSV, JSON or Parquet file"
    )


@dataclasses.dataclass(frozen=True)
class Probe:
    """What the start of a file shows: its kind and the names in its first record (columns or keys)."""

    path: Path
    kind: str
    columns: tuple[str, ...]
    first: Any = None

    def has(self, *names: str) -> bool:
        """Whether all of the names are there."""
        return set(names) <= set(self.columns)


def probe(path: str | Path) -> Probe:
    """Look at a file without reading it all (a JSON document has to be parsed)."""
    path = as_path(path)
    suffix = _suffix(path)
    kind = _KINDS.get(suffix)
    if kind is None:
        raise InputError(FILE, str(path), f"has the unknown extension {suffix!r}", suggest(suffix, _KINDS))
    try:
        if kind == PARQUET:
            return Probe(path, kind, tuple(pq.read_schema(path).names))
        if kind == CSV:
            with open_text(path) as stream:
                header = next(csv.reader(stream, delimiter=_separator(path)), [])
            return Probe(path, kind, tuple(name.strip() for name in header))
        if kind == JSON:
            documents = json_documents(path)
            if len(documents) > 1:
                return Probe(path, JSON_LINES, _keys(documents[0]), documents[0])
            first = documents[0]
            first = first[0] if isinstance(first, list) and first else first
            return Probe(path, kind, _keys(first), first)
        for _, record in json_lines(path):
            return Probe(path, kind, _keys(record), record)
        return Probe(path, kind, ())
    except UnicodeDecodeError as error:
        raise _not_text(path, error) from error
    except (OSError, pa.ArrowException) as error:
        raise InputError(FILE, str(path), f"cannot be read ({error})", "check the file") from error


def _keys(record: Any) -> tuple[str, ...]:
    return tuple(record) if isinstance(record, Mapping) else ()


# ---- JSON


def json_lines(path: Path, max_rows: int | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number and object of each non-blank line."""
    rows = 0
    with open_text(path) as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            if max_rows is not None and rows >= max_rows:
                return
            rows += 1
            try:
                record = msgspec.json.decode(line)
            except (msgspec.DecodeError, ValueError) as error:
                raise InputError(
                    f"{FILE} line {number}",
                    line.strip(),
                    f"is not valid JSON ({error})",
                    "put one JSON object on each line",
                ) from error
            if not isinstance(record, dict):
                raise InputError(
                    f"{FILE} line {number}",
                    line.strip(),
                    "is not a JSON object",
                    "put one JSON object on each line",
                )
            yield number, record


def json_documents(path: Path) -> list[Any]:
    """The JSON values in a file: usually one; benchmark clients that append leave several."""
    try:
        with open_text(path) as stream:
            text = stream.read()
    except UnicodeDecodeError as error:
        raise _not_text(path, error) from error
    decoder, at, found = json.JSONDecoder(), 0, []
    while True:
        while at < len(text) and text[at].isspace():
            at += 1
        if at == len(text):
            break
        try:
            value, at = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            raise InputError(
                f"{FILE} line {error.lineno}",
                str(path),
                f"is not valid JSON ({error.msg}, column {error.colno})",
                "check that the file is whole",
            ) from error
        found.append(value)
    if not found:
        raise empty(path)
    return found


# ---- columns


def empty(path: Path) -> InputError:
    """The error for a trace without requests."""
    return InputError(FILE, str(path), "holds no requests", "give a trace with at least one")


def missing_columns(
    path: Path, missing: Iterable[str], found: Iterable[str], what: str = "column"
) -> InputError:
    """The error for names that are not there, saying which are."""
    missing, found = list(missing), list(found)
    near = "; ".join(
        f"for {name}: {suggest(name, found)}" for name in missing if "mean" in suggest(name, found)
    )
    return InputError(
        FILE,
        str(path),
        f"lacks the {what}{'s' if len(missing) > 1 else ''} {', '.join(missing)}",
        f"found {', '.join(found) or 'none'}" + (f" ({near})" if near else ""),
    )


def read_csv(
    path: Path, required: Sequence[str], optional: Sequence[str] = (), max_rows: int | None = None
) -> tuple[pd.DataFrame, bool]:
    """The named columns of a CSV file, and whether rows were left unread."""
    found = probe(path).columns
    if not found:
        raise empty(path)
    missing = [name for name in required if name not in found]
    if missing:
        raise missing_columns(path, missing, found)
    refuse_duplicates(path, found, (*required, *optional))
    try:
        with warnings.catch_warnings():
            # Rows longer than the header: pandas would cut them, or call the columns by the wrong names.
            warnings.simplefilter("error", pd.errors.ParserWarning)
            frame = pd.read_csv(
                path,
                nrows=max_rows,
                index_col=False,
                encoding="utf-8-sig",
                skipinitialspace=True,
                sep=_separator(path),
                low_memory=False,
            )
    except pd.errors.ParserWarning as error:
        raise _long_row(path, found) from error
    except pd.errors.EmptyDataError as error:
        raise empty(path) from error
    except pd.errors.ParserError as error:
        raise InputError(FILE, str(path), f"is not well-formed CSV ({error})", "fix that line") from error
    except UnicodeDecodeError as error:
        raise _not_text(path, error) from error
    frame.columns = [name.strip() for name in frame.columns]
    frame = frame[[name for name in frame.columns if name in (*required, *optional)]]
    return frame, max_rows is not None and len(frame) >= max_rows


def refuse_duplicates(path: Path, found: Sequence[str], used: Iterable[str]) -> None:
    """An error for a column that is there twice, if it is one of those used."""
    for name in used:
        if found.count(name) > 1:
            raise InputError(
                FILE, str(path), f"has the column {name} {found.count(name)} times", "keep one of them"
            )


def _long_row(path: Path, header: Sequence[str]) -> InputError:
    """The error for the first row that has more values than the header has names."""
    with open_text(path) as stream:
        rows = csv.reader(stream, delimiter=_separator(path))
        next(rows)
        for index, row in enumerate(row for row in rows if row):
            if len(row) > len(header):
                return InputError(
                    f"{FILE} {row_place(index)}",
                    _separator(path).join(row),
                    f"has {len(row)} values under {len(header)} column names",
                    "give every column a name, or remove what is too much",
                )
    return InputError(FILE, str(path), "has rows longer than its header", "give every column a name")


def row_place(index: int) -> str:
    """How a row of a table is called in errors: data rows count from 1."""
    return f"row {index + 1}"


def line_places(lines: Sequence[int]) -> Callable[[int], str]:
    """How a line of a JSON-lines file is called in errors."""
    return lambda index: f"line {lines[index]}"


def numbers(values: Any, field: str, place: Callable[[int], str] = row_place) -> np.ndarray:
    """A column as numbers (int64 where all are integers, else float64); the first that is none is named."""
    series = pd.Series(values)
    if series.dtype == bool or series.dtype == object or not pd.api.types.is_numeric_dtype(series.dtype):
        series = series.map(lambda v: None if isinstance(v, (bool, list, dict)) else v)
        converted = pd.to_numeric(series, errors="coerce")
    else:
        converted = series
    array = converted.to_numpy()
    if array.dtype.kind in "iu":
        return array.astype(np.int64)
    array = converted.to_numpy(dtype=np.float64, na_value=np.nan)
    bad = ~np.isfinite(array)
    if bad.any():
        at = int(np.argmax(bad))
        value = pd.Series(values).iloc[at]
        raise InputError(
            f"{FILE} {place(at)}, {field}",
            value.item() if isinstance(value, np.generic) else value,
            "is not a finite number",
            "fix or remove that request",
        )
    return array


def keyed(records: Sequence[tuple[int, Mapping[str, Any]]], key: str, path: Path) -> list[Any]:
    """The values of a required key, with an error that names the line where it is missing."""
    values = []
    for line, record in records:
        if key not in record:
            raise InputError(
                f"{FILE} line {line}", str(path), f"lacks the key {key}", f"found {', '.join(record)}"
            )
        values.append(record[key])
    return values


def ragged(
    rows: Iterable[Sequence[int]], field: str, place: Callable[[int], str]
) -> tuple[np.ndarray, np.ndarray]:
    """Lists of block ids as offsets and one flat array."""
    lengths, flat = [], []
    for index, row in enumerate(rows):
        if not isinstance(row, (list, tuple)) or not all(
            isinstance(v, int) and not isinstance(v, bool) for v in row
        ):
            raise InputError(
                f"{FILE} {place(index)}, {field}",
                row,
                "is not a list of whole numbers",
                "give the ids of the prompt's blocks",
            )
        lengths.append(len(row))
        flat.extend(row)
    try:
        return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]), np.array(flat, np.int64)
    except OverflowError as error:
        raise InputError(
            f"{FILE} {field}", max(flat, key=abs), "does not fit 64 bits", "renumber the blocks"
        ) from error


# ---- from a table to a workload


@dataclasses.dataclass
class Table:
    """What a reader hands over: raw columns in file order, checked only for being numbers.

    arrival_s is None for traces of lengths without times. num_failed: requests the reader itself left out
    because the file marks them as failed. drop_failed: whether requests without input or output tokens are
    left out by default (formats that log failures that way). may_be_unsorted: formats whose order of rows
    carries no meaning are sorted without asking. is_partial: rows were left unread (max_rows). session: labels of
    the session each request belongs to, missing for one by itself; think_s: between the answer before it and each
    request; answer_s: from each arrival to the end of its answer, where the think times have to be told from that.
    """

    input_tokens: np.ndarray
    output_tokens: np.ndarray
    arrival_s: np.ndarray | None = None
    max_tokens: np.ndarray | None = None
    priority: np.ndarray | None = None
    tenant: np.ndarray | None = None
    predicted_tokens: np.ndarray | None = None
    prefix_offsets: np.ndarray | None = None
    prefix_hashes: np.ndarray | None = None
    prefix_block_size: int | None = None
    session: np.ndarray | None = None
    think_s: np.ndarray | None = None
    answer_s: np.ndarray | None = None
    place: Callable[[int], str] = row_place
    num_failed: int = 0
    drop_failed: bool = False
    may_be_unsorted: bool = False
    is_partial: bool = False

    def __len__(self) -> int:
        return len(self.input_tokens)

    def take(self, index: np.ndarray) -> "Table":
        """Some rows, in the given order."""
        changes: dict[str, Any] = {"place": lambda i, index=index: self.place(int(index[i]))}
        for name in ("input_tokens", "output_tokens", "arrival_s", "max_tokens", "priority", "tenant", "session",
                     "predicted_tokens",
                     "think_s", "answer_s"):
            column = getattr(self, name)
            if column is not None:
                changes[name] = np.asarray(column)[index]
        if self.prefix_hashes is not None:
            changes["prefix_offsets"], changes["prefix_hashes"] = take_ragged(
                self.prefix_offsets, self.prefix_hashes, index
            )
        return dataclasses.replace(self, **changes)

    def refuse(self, field: str, bad: np.ndarray, problem: str, remedy: str) -> None:
        """Raise for the first row where `bad`, naming its place and value."""
        if np.any(bad):
            at = int(np.argmax(bad))
            raise InputError(
                f"{FILE} {self.place(at)}, {field}",
                np.asarray(getattr(self, field))[at].item(),
                problem,
                remedy,
            )


def cleaned(table: Table, drop_failed: bool | None) -> tuple[Table, int]:
    """The table without failed requests (or an error), and how many were left out; numbers are checked."""
    for field in ("input_tokens", "output_tokens"):
        values = getattr(table, field)
        table.refuse(field, values < 0, "is negative", "fix or remove that request")
        table.refuse(field, values != np.rint(values), "is not a whole number of tokens", "fix that request")
    if table.arrival_s is not None:
        table.refuse("arrival_s", ~np.isfinite(table.arrival_s), "is not a finite time", "fix that request")
        table.refuse("arrival_s", table.arrival_s < 0, "is negative", "count from the first arrival on")
    failed = (table.input_tokens == 0) | (table.output_tokens == 0)
    if table.drop_failed if drop_failed is None else drop_failed:
        if failed.any():
            table = table.take(np.flatnonzero(~failed))
        return table, table.num_failed + int(failed.sum())
    for field in ("input_tokens", "output_tokens"):
        table.refuse(
            field,
            getattr(table, field) == 0,
            "is 0: there is nothing to simulate",
            "set workload.drop_failed = true (drop_failed=True in Python) to leave such requests out",
        )
    return table, table.num_failed


def to_workload(
    table: Table,
    path: Path,
    format: str,
    *,
    sort: bool | None = None,
    drop_failed: bool | None = None,
    start_s: float = 0.0,
    end_s: float | None = None,
    keep: float = 1.0,
    start: int = 0,
    num_requests: int | None = None,
    rate_scale: float | None = None,
    rate_rps: float | None = None,
    offset_to_zero: bool = True,
    dither_s: float = 0.0,
    seed: int = 0,
    arrivals: AbstractArrivals | None = None,
    sessions: bool = False,
) -> Workload:
    """Check, sort, cut and scale a table; `jaxsim.traces.read_trace` documents the options."""
    num_rows = len(table) + table.num_failed
    table, num_dropped = cleaned(table, drop_failed)
    if len(table) == 0:
        if num_dropped:
            raise InputError(
                FILE,
                str(path),
                f"holds no requests but {num_dropped} failed ones",
                "give a trace with at least one answered request",
            )
        raise empty(path)
    if rate_scale is not None and rate_rps is not None:
        raise InputError("rate_scale", rate_scale, f"comes with rate_rps = {rate_rps}", "give one of the two")
    if not (dither_s >= 0 and math.isfinite(dither_s)):
        raise InputError("dither_s", dither_s, "is negative or not finite", "give seconds")
    if table.arrival_s is not None:
        table = _in_window(_ordered(table, sort, dither_s, seed), start_s, end_s)
    elif start_s > 0 or end_s is not None:
        raise InputError(
            "workload.slice.start_s",
            start_s,
            f"or end_s was given, but {path.name} has no times",
            "leave them out",
        )
    table = _front(_thinned(table, keep, seed), start, num_requests)
    workload = _assemble(
        table,
        seed,
        {
            "format": format,
            "path": str(path),
            "num_rows": num_rows,
            "num_dropped": num_dropped,
            "is_partial": table.is_partial,
        },
        **_sessions(table, path, sessions),
    )
    if table.arrival_s is None:
        return _timed(workload, path, seed, rate_scale, rate_rps, arrivals)
    if arrivals is not None:
        raise InputError(
            "arrivals",
            arrivals,
            f"was given, but {path.name} has arrival times",
            "leave it out, or use read_lengths",
        )
    if offset_to_zero:
        workload = workload.from_zero()
    if rate_rps is not None:
        workload = workload.with_rate(rate_rps)
    return workload if rate_scale is None else workload.scaled(rate_scale)


def _timed(
    workload: Workload,
    path: Path,
    seed: int,
    rate_scale: float | None,
    rate_rps: float | None,
    arrivals: AbstractArrivals | None,
) -> Workload:
    """Drawn arrivals for a trace of lengths."""
    if rate_scale is not None:
        raise InputError(
            "rate_scale",
            rate_scale,
            f"was given, but {path.name} has no arrival times to scale",
            "give rate_rps",
        )
    if rate_rps is None:
        raise InputError(
            "workload.rate_rps",
            None,
            f"is missing: {path.name} has lengths but no arrival times",
            "give requests per second (in Python, arrivals= for another process than Poisson)",
        )
    rate_rps = check_rate(rate_rps)
    unit_times = (Poisson() if arrivals is None else arrivals).unit_times(seed, len(workload))
    return dataclasses.replace(
        workload, unit_times=unit_times, rate_rps=rate_rps, arrival_s=unit_times / rate_rps
    )


def _in_window(table: Table, start_s: float, end_s: float | None) -> Table:
    """Rows that arrive from `start_s` on and before `end_s`, seconds from the first."""
    if not (start_s >= 0 and math.isfinite(start_s)):
        raise InputError(
            "workload.slice.start_s",
            start_s,
            "is negative or not finite",
            "give seconds from the first arrival",
        )
    if end_s is not None and not end_s > start_s:
        raise InputError("workload.slice.end_s", end_s, f"is not after start_s = {start_s}", "give a later end")
    if start_s == 0 and end_s is None:
        return table
    since = table.arrival_s - table.arrival_s[0]
    inside = np.flatnonzero((since >= start_s) & (since < (math.inf if end_s is None else end_s)))
    if len(inside) == 0:
        raise InputError(
            "workload.slice.start_s",
            start_s,
            f"and end_s = {end_s} leave no request of {since[-1]:g} s of trace",
            "widen the window",
        )
    return table.take(inside)


def _thinned(table: Table, keep: float, seed: int) -> Table:
    """A random share of the rows; a row kept at one share is kept at every larger one."""
    if not 0 < keep <= 1:
        raise InputError(
            "workload.slice.keep", keep, "is not above 0 and at most 1", "give the share of requests to keep"
        )
    if keep == 1:
        return table
    kept = np.flatnonzero(uniforms(stream_key(seed, Stream.THINNING), len(table))[:, 0] < keep)
    if len(kept) == 0:
        raise InputError(
            "workload.slice.keep", keep, f"keeps none of the {len(table)} requests", "give a larger share"
        )
    return table.take(kept)


def _front(table: Table, start: int, num_requests: int | None) -> Table:
    """`num_requests` rows from number `start` on."""
    for name, value in (("start", start), ("workload.num_requests", num_requests)):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
            raise InputError(name, value, "is not a whole number of requests", "give a count, 0 or more")
    left = len(table) - start
    if left <= 0:
        raise InputError("start", start, f"is past the {len(table)} requests of the trace", "start earlier")
    if num_requests is not None and not 1 <= num_requests <= left:
        raise InputError(
            "workload.num_requests",
            num_requests,
            f"cannot be had: {left} requests are left to use",
            f"ask for 1 to {left}",
        )
    stop = len(table) if num_requests is None else start + num_requests
    return table if start == 0 and stop == len(table) else table.take(np.arange(start, stop))


def _ordered(table: Table, sort: bool | None, dither_s: float, seed: int) -> Table:
    arrival_s = np.asarray(table.arrival_s, np.float64)
    earlier = np.concatenate([[False], np.diff(arrival_s) < 0])
    wants_sort = table.may_be_unsorted if sort is None else sort
    if not wants_sort:
        table.refuse(
            "arrival_s",
            earlier,
            "is before the row in front of it",
            "set workload.sort = true (sort=True in Python) if the order of rows does not matter",
        )
    if dither_s > 0:
        draws = uniforms(stream_key(seed, Stream.DITHER), len(table))[:, 0]
        table = dataclasses.replace(table, arrival_s=arrival_s + dither_s * draws)
        wants_sort = True
    if not wants_sort:
        return table
    order = np.argsort(table.arrival_s, kind="stable")
    return table.take(order)


def _sessions(table: Table, path: Path, is_closed: bool) -> dict[str, np.ndarray]:
    """Session and turn of each request, and where later turns shall wait for answers, their think times."""
    if table.session is None:
        if is_closed:
            raise InputError(
                "workload.replay", "sessions", f"needs sessions, of which {path.name} says nothing", "use 'open'"
            )
        return {}
    codes, values = pd.factorize(pd.Series(table.session))
    alone = codes < 0
    codes[alone] = len(values) + np.arange(alone.sum())
    found = {"session": codes, "turn": pd.Series(codes).groupby(codes).cumcount().to_numpy()}
    if not is_closed:
        return found
    if table.arrival_s is None or (table.think_s is None and table.answer_s is None):
        raise InputError(
            "workload.replay",
            "sessions",
            f"needs think times: {path.name} has neither these, nor arrivals and the time to each answer",
            "use 'open', or add a column think_s or e2e_s",
        )
    is_later = found["turn"] > 0
    think_s = table.think_s
    if think_s is None:
        answered_s = pd.Series(np.asarray(table.arrival_s + table.answer_s, np.float64))
        before = answered_s.groupby(codes).shift(1).to_numpy()
        # One that came before the answer was out cannot have waited for it.
        think_s = np.maximum(table.arrival_s - before, 0.0)
    name = "answer_s" if table.think_s is None else "think_s"
    table.refuse(name, is_later & ~np.isfinite(think_s), "is missing where a turn follows", "leave the session out")
    found["think_s"] = np.where(is_later, think_s, 0.0)
    return found


def _assemble(table: Table, seed: int, provenance: dict[str, Any], **more: np.ndarray) -> Workload:
    count = len(table)
    tenant, names = np.zeros(count, np.int32), ("default",)
    if table.tenant is not None:
        labels = pd.Series(table.tenant).map(str)
        codes, values = pd.factorize(labels, sort=True)
        tenant, names = codes.astype(np.int32), tuple(values)
    arrival_s = np.zeros(count) if table.arrival_s is None else np.asarray(table.arrival_s, np.float64)
    return Workload(
        arrival_s=arrival_s,
        input_tokens=table.input_tokens,
        output_tokens=table.output_tokens,
        max_tokens=table.max_tokens,
        priority=table.priority,
        tenant=tenant,
        tenant_names=names,
        predicted_tokens=table.predicted_tokens,
        prefix_offsets=table.prefix_offsets,
        prefix_hashes=table.prefix_hashes,
        prefix_block_size=table.prefix_block_size,
        uniforms=routing_uniforms(seed, count),
        provenance=provenance,
        **more,
    )
