"""What readers of profiles share: files, columns, units and filters, with errors that name file, row and remedy."""

import hashlib
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq

from jaxsim._core.errors import InputError, suggest
from jaxsim.cost.profile import OperatorTable
from jaxsim.spec.device import load_device

UNITS = {"seconds": 1.0, "time_s": 1.0, "time_ms": 1e-3, "latency_ms": 1e-3, "median_ms": 1e-3, "time_us": 1e-6,
         "time_ns": 1e-9, "latency_ns": 1e-9}
"""Time columns and what one of their units is in seconds."""


LARGEST_COUNT = 2**31 - 1
"""Of tokens, requests and sizes: what 32 bits hold."""

_SEPARATORS = {"\t": "tabs", ";": "semicolons", "|": "bars"}


def as_path(path: str | Path, field: str = "profile") -> Path:
    """The path, if it is a readable file."""
    path = Path(path).expanduser()
    if not path.exists():
        near = sorted(p.name for p in path.parent.iterdir()) if path.parent.is_dir() else []
        raise InputError(field, str(path), "is not there", suggest(path.name, near, "give a CSV or Parquet table"))
    if not path.is_file():
        raise InputError(field, str(path), "is not a file", "give the table itself")
    return path


def load(path: str | Path, field: str = "profile", *, comment: str | None = None,
         texts: Sequence[str] = ()) -> pd.DataFrame:
    """A CSV or Parquet table as it is, names of columns stripped, none of them twice. Raises `InputError`.

    The index is the row as the file counts it: data rows from 1. comment: what starts one; texts: columns of a CSV
    whose values are not to be taken for numbers.
    """
    path = as_path(path, field)
    is_parquet = path.suffix.lower() in (".parquet", ".pq")
    how = dict(encoding="utf-8-sig", skipinitialspace=True, comment=comment, index_col=False)
    try:
        with warnings.catch_warnings():
            # A row with more values than names would be cut.
            warnings.simplefilter("error", pd.errors.ParserWarning)
            if is_parquet:
                names = [str(name).strip() for name in pq.read_schema(path).names]
            else:
                # Apart from the rows: pandas would call a second column of one name by another.
                first = pd.read_csv(path, header=None, nrows=1, dtype=str, keep_default_na=False, **how)
                names = [name.strip() or f"unnamed {i}" for i, name in enumerate(first.iloc[0])]
            twice = [name for i, name in enumerate(names) if name in names[:i]]
            if twice:
                raise InputError(field, str(path), f"has the column {twice[0]} {names.count(twice[0])} times",
                                 "keep one of them")
            if is_parquet:
                # pandas would make an index of columns that were one.
                frame = pq.read_table(path).to_pandas(ignore_metadata=True)
            else:
                frame = pd.read_csv(path, header=0, names=names, low_memory=False, dtype=dict.fromkeys(texts, str),
                                    **how)
    except pd.errors.EmptyDataError:
        raise InputError(field, str(path), "is empty", "give a table with a header and at least one row") from None
    except InputError:
        raise
    # Every way of packing a file has errors of its own.
    except Exception as error:
        raise InputError(field, str(path), f"cannot be read ({error})", "give a CSV or Parquet table") from error
    frame.columns = names
    frame.index = np.arange(1, len(frame) + 1)
    return frame


def check_columns(frame: pd.DataFrame, path: str | Path, required: Sequence[str], field: str = "profile") -> None:
    """Refuse a table that lacks a column, or has no rows. Raises `InputError`."""
    missing = [name for name in required if name not in frame]
    if missing:
        near = "; ".join(f"for {m}: {s}" for m in missing if "mean" in (s := suggest(m, frame.columns)))
        only = str(frame.columns[0]) if len(frame.columns) == 1 else ""
        between = next((name for mark, name in _SEPARATORS.items() if mark in only), "")
        raise InputError(field, str(path), f"lacks the column{'s' * (len(missing) > 1)} {', '.join(missing)}",
                         f"its values are separated by {between}: use commas" if between else
                         f"found {', '.join(frame.columns)}" + (f" ({near})" if near else ""))
    if frame.empty:
        raise InputError(field, str(path), "holds no rows", "give a table with at least one measurement")


def read(path: str | Path, required: Sequence[str], allowed: Iterable[str] | None = None) -> pd.DataFrame:
    """A CSV or Parquet table that has the required columns and, if `allowed` is given, no others.

    The index is the row as the file counts it: data rows from 1.
    """
    path = Path(path)
    frame = load(path, comment="#")
    check_columns(frame, path, required)
    if allowed is not None:
        known = {*required, *allowed}
        for name in frame.columns:
            if name not in known:
                raise InputError(f"profile {path.name}, column", name, "is not known",
                                 suggest(name, known))
    for name in frame.columns:
        if isinstance(frame[name].dtype, pd.CategoricalDtype):
            frame[name] = frame[name].astype(str)
    return frame


def column(frame: pd.DataFrame, name: str, where: str, *, low: float = 0.0, is_whole: bool = False,
           may_be_empty: bool = False) -> np.ndarray:
    """A column as float64; the first row that is no finite number of at least `low` is named, by the index."""
    given = frame[name]
    # Dates and lengths of time would come out as nanoseconds, truth as 0 and 1.
    is_number = given.dtype.kind not in "mMb"
    try:
        array = pd.to_numeric(given if is_number else given.astype(str), errors="coerce").to_numpy(
            np.float64, na_value=np.nan)
    except TypeError:
        # Lists in its cells.
        array = np.full(len(given), np.nan)
    bad = ~np.isfinite(array) & ~(given.isna().to_numpy() & may_be_empty)
    problem = "is not a finite number" if is_number else f"is of the type {given.dtype}, and no number"
    if not bad.any():
        bad, problem = array < low, "is negative" if low == 0 else f"is below {low:g}"
    if not bad.any() and is_whole:
        bad, problem = np.isfinite(array) & (array != np.rint(array)), "is not a whole number"
    if not bad.any() and is_whole:
        bad, problem = array > LARGEST_COUNT, f"is above {LARGEST_COUNT}"
    if bad.any():
        at = int(np.argmax(bad))
        value = given.iloc[at]
        raise InputError(f"{where} row {frame.index[at]}, {name}",
                         value.item() if isinstance(value, np.generic) else value, problem, "fix or remove that row")
    return array


def numbers(frame: pd.DataFrame, name: str, path: str | Path, *, is_count: bool = False) -> np.ndarray:
    """A column of a profile as float64; the first that is no finite, nonnegative number is named."""
    return column(frame, name, f"profile {Path(path).name}", is_whole=is_count)


def known_device(name: str) -> str | None:
    """What the catalogue calls a device; None where it has none of that name."""
    try:
        return load_device(name).name
    except InputError:
        return None


def one_device(names: Mapping[str, str]) -> str:
    """Of what files call their device (name: where it stands) the one the catalogue has, or the first; "" without any.

    Raises `InputError` where they are several.
    """
    found = {known_device(name) or name: name for name in names}
    if len(found) > 1:
        at = list(names)[-1]
        raise InputError(f"profile {names[at]}, device", at, f"is not the device of {names[next(iter(names))]},"
                         f" {next(iter(names))}", "give tables of one device")
    return next(iter(found.values()), "")


def digests(paths: Iterable[Path], field: str = "profile") -> dict[str, str]:
    """SHA-256 by name of file. Raises `InputError` where two files are one, or have one name."""
    found: dict[str, str] = {}
    for path in paths:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        same = next((name for name, other in found.items() if other == digest), None)
        if same is not None:
            raise InputError(field, str(path), f"is the same table as {same}", "give it once")
        if path.name in found:
            raise InputError(field, str(path), "has the name of another file that is given", "rename one of them")
        found[path.name] = digest
    return found


def table(name: str, frame: pd.DataFrame, axes: Mapping[str, np.ndarray] | Sequence[np.ndarray], seconds: np.ndarray,
          path: str | Path) -> OperatorTable:
    """An operator table from columns of `frame`."""
    columns = list(axes.values()) if isinstance(axes, Mapping) else list(axes)
    points = np.stack([np.asarray(c, np.float64) for c in columns], axis=1)
    return OperatorTable(name, points, np.asarray(seconds, np.float64), Path(path).name,
                         tuple(f"row {i}" for i in frame.index))


def times(frame: pd.DataFrame, path: str | Path, columns: Sequence[str] = tuple(UNITS)) -> np.ndarray:
    """The one time column, in seconds."""
    found = [name for name in columns if name in frame]
    if len(found) != 1:
        problem = "has no time column" if not found else f"has the time columns {', '.join(found)}"
        raise InputError("profile", str(path), problem, f"keep one of {', '.join(columns)}")
    return numbers(frame, found[0], path) * UNITS[found[0]]


def select(frame: pd.DataFrame, path: str | Path, **wanted: Any) -> pd.DataFrame:
    """The rows where every named column has the wanted value; the first filter that leaves none is named."""
    for name, value in wanted.items():
        if value is None:
            continue
        kept = frame[frame[name] == value]
        if kept.empty:
            there = sorted(frame[name].unique().tolist(), key=str)
            raise InputError(f"profile {Path(path).name}, {name}", value, "was not measured",
                             f"measured: {', '.join(map(str, there[:40]))}")
        frame = kept
    return frame


def only(frame: pd.DataFrame, name: str, path: str | Path, option: str) -> Any:
    """The single value of a column, or an error that asks for the option that selects one."""
    values = sorted(frame[name].unique().tolist(), key=str)
    if len(values) > 1:
        raise InputError(f"profile {Path(path).name}, {name}", ", ".join(map(str, values[:40])),
                         "is not one value", f"choose one with {option}=")
    return values[0]
