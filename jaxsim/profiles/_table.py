"""What readers of profiles share: files, columns, units and filters, with errors that name file, row and remedy."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from jaxsim._core.errors import InputError, suggest
from jaxsim.cost.profile import OperatorTable

UNITS = {"seconds": 1.0, "time_s": 1.0, "time_ms": 1e-3, "latency_ms": 1e-3, "median_ms": 1e-3, "time_us": 1e-6,
         "time_ns": 1e-9, "latency_ns": 1e-9}
"""Time columns and what one of their units is in seconds."""


def as_path(path: str | Path) -> Path:
    """The path, if it is a readable file."""
    path = Path(path).expanduser()
    if not path.exists():
        near = sorted(p.name for p in path.parent.iterdir()) if path.parent.is_dir() else []
        raise InputError("profile", str(path), "is not there", suggest(path.name, near))
    if not path.is_file():
        raise InputError("profile", str(path), "is not a file", "give the table itself")
    return path


def read(path: str | Path, required: Sequence[str], allowed: Iterable[str] | None = None) -> pd.DataFrame:
    """A CSV or Parquet table that has the required columns and, if `allowed` is given, no others.

    The index is the row as the file counts it: data rows from 1.
    """
    path = as_path(path)
    try:
        if path.suffix.lower() in (".parquet", ".pq"):
            frame = pq.read_table(path).to_pandas()
        else:
            frame = pd.read_csv(path, encoding="utf-8-sig", skipinitialspace=True, low_memory=False, comment="#")
    except pd.errors.EmptyDataError:
        raise InputError("profile", str(path), "is empty", "give a table with a header and at least one row") from None
    except (OSError, ValueError, pa.ArrowException) as error:
        raise InputError("profile", str(path), f"cannot be read ({error})", "give a CSV or Parquet table") from error
    frame.columns = [str(name).strip() for name in frame.columns]
    missing = [name for name in required if name not in frame]
    if missing:
        near = "; ".join(f"for {m}: {s}" for m in missing if "mean" in (s := suggest(m, frame.columns)))
        raise InputError("profile", str(path), f"lacks the column{'s' * (len(missing) > 1)} {', '.join(missing)}",
                         f"found {', '.join(frame.columns)}" + (f" ({near})" if near else ""))
    if allowed is not None:
        known = {*required, *allowed}
        for name in frame.columns:
            if name not in known:
                raise InputError(f"profile {path.name}, column", name, "is not known",
                                 suggest(name, known))
    if frame.empty:
        raise InputError("profile", str(path), "holds no rows", "give a table with at least one measurement")
    for name in frame.columns:
        if isinstance(frame[name].dtype, pd.CategoricalDtype):
            frame[name] = frame[name].astype(str)
    frame.index = np.arange(1, len(frame) + 1)
    return frame


def numbers(frame: pd.DataFrame, name: str, path: str | Path, *, is_count: bool = False) -> np.ndarray:
    """A column as float64; the first that is no finite, nonnegative number is named."""
    array = pd.to_numeric(frame[name], errors="coerce").to_numpy(np.float64)
    bad = ~np.isfinite(array) | (array < 0)
    if is_count:
        bad |= array != np.round(array)
    if bad.any():
        at = int(np.argmax(bad))
        value = frame[name].iloc[at]
        problem = "is negative" if np.isfinite(array[at]) and array[at] < 0 else (
            "is not a whole number" if np.isfinite(array[at]) else "is not a finite number")
        raise InputError(f"profile {Path(path).name} row {frame.index[at]}, {name}",
                         value.item() if isinstance(value, np.generic) else value, problem, "fix or remove that row")
    return array


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
