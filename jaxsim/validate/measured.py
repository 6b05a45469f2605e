"""A measured run: requests as they arrived, with the latencies a client saw."""

import math
import os
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int

from jaxsim._core.errors import InputError, suggest
from jaxsim.workload.workload import Workload

COLUMNS = ("arrival_s", "input_tokens", "output_tokens", "ttft_s", "e2e_s")
"""Columns that a run must have."""

OPTIONAL = ("prefix_block_ids", "prefix_block_size")

FIELD = "measured"

FASTEST_TOKEN_S, SLOWEST_TOKEN_S = 1e-4, 5.0
"""Seconds of an output token, in the median, outside which a file's unit is wrong: no engine generates 10,000 tokens/s
for one request, and nobody waits longer."""


@dataclass(frozen=True, eq=False)
class MeasuredRun:
    """What was sent, and what came back. Requests in order of arrival.

    workload: arrivals from 0, lengths, prefixes. ttft_s, e2e_s: from arrival to the first and to the last token; NaN
    for a request that failed, which is replayed and not compared. num_dropped: rows without tokens, which cannot be.
    was_sorted: whether the file was in order of arrival.
    """

    workload: Workload
    ttft_s: Float[np.ndarray, " requests"]
    e2e_s: Float[np.ndarray, " requests"]
    num_dropped: int
    was_sorted: bool
    path: str

    @property
    def is_answered(self) -> Bool[np.ndarray, " requests"]:
        """Which requests did not fail."""
        return ~np.isnan(self.e2e_s)


def read_table(path: str | Path, field: str, required: tuple[str, ...]) -> pd.DataFrame:
    """A CSV or Parquet table with the required columns. Raises `InputError`."""
    path = Path(path).expanduser()
    remedy = "give a CSV or Parquet file" + (f" with the columns {', '.join(required)}" if required else "")
    if not path.is_file():
        near = sorted(os.listdir(path.parent)) if path.parent.is_dir() else []
        raise InputError(field, str(path), "is not there" if not path.exists() else "is not a file",
                         suggest(path.name, near, remedy))
    try:
        with warnings.catch_warnings():
            # A row with more values than names would be cut.
            warnings.simplefilter("error", pd.errors.ParserWarning)
            frame = (pd.read_parquet(path) if path.suffix in (".parquet", ".pq")
                     else pd.read_csv(path, index_col=False, skipinitialspace=True, encoding="utf-8-sig",
                                      dtype={"prefix_block_ids": str}))
    except (ValueError, OSError, pd.errors.ParserWarning) as error:
        raise InputError(field, str(path), f"cannot be read ({error})", remedy) from error
    frame.columns = [str(name).strip() for name in frame.columns]
    return checked(frame, field, str(path), required)


def checked(frame: pd.DataFrame, field: str, path: str, required: tuple[str, ...]) -> pd.DataFrame:
    """The table, if it has the required columns and any row. Raises `InputError`."""
    missing = [name for name in required if name not in frame.columns]
    if missing:
        raise InputError(field, path, f"lacks the column{'s' * (len(missing) > 1)} {', '.join(missing)}",
                         f"found {', '.join(frame.columns)}; times in seconds")
    if not len(frame):
        raise InputError(field, path, "holds no rows", "give one row at least")
    return frame


def number_column(frame: pd.DataFrame, name: str, field: str, *, low: float = 0.0, is_whole: bool = False,
                  may_be_empty: bool = False) -> Float[np.ndarray, " rows"]:
    """A column as numbers; the first row that is none, or below `low`, is named. Raises `InputError`."""
    values = pd.to_numeric(frame[name], errors="coerce").to_numpy(np.float64, na_value=np.nan)
    is_empty = frame[name].isna().to_numpy()
    bad = ~np.isfinite(values) & ~(is_empty & may_be_empty)
    problem = "is not a finite number"
    if not bad.any():
        bad, problem = values < low, f"is below {low:g}"
    if not bad.any() and is_whole:
        bad, problem = values != np.rint(values), "is not a whole number"
    if bad.any():
        at = int(np.argmax(bad))
        value = frame[name].iloc[at]
        raise InputError(f"{field} row {at + 1}, {name}", value.item() if isinstance(value, np.generic) else value,
                         problem, "correct the row, or leave it out")
    return values


def read_run(path: str | Path, block_size: int) -> MeasuredRun:
    """Read a run; `block_size`: tokens of a block of `prefix_block_ids`, unless the file says otherwise.

    Columns: `arrival_s`, `input_tokens`, `output_tokens`, `ttft_s`, `e2e_s`; optional `prefix_block_ids` (ids of a
    prompt's blocks, each standing for the whole prompt up to there, separated by spaces; numbers or any words),
    `prefix_block_size`. A request that failed has no `ttft_s` or `e2e_s`. Raises `InputError` naming the row.
    """
    frame = read_table(path, FIELD, COLUMNS)
    arrival_s = number_column(frame, "arrival_s", FIELD, low=-math.inf)
    tokens = [number_column(frame, name, FIELD, is_whole=True) for name in ("input_tokens", "output_tokens")]
    ttft_s, e2e_s = (number_column(frame, name, FIELD, may_be_empty=True) for name in ("ttft_s", "e2e_s"))
    has_failed = np.isnan(ttft_s) | np.isnan(e2e_s)
    is_void = (tokens[0] < 1) | (tokens[1] < 1)
    if (is_void & ~has_failed).any():
        at = int(np.argmax(is_void & ~has_failed))
        name = COLUMNS[1] if tokens[0][at] < 1 else COLUMNS[2]
        raise InputError(f"{FIELD} row {at + 1}, {name}", 0, "is no request, and yet it was answered",
                         "give the true length, or leave ttft_s and e2e_s empty where a request failed")
    wrong = ~has_failed & (ttft_s > e2e_s)
    if wrong.any():
        at = int(np.argmax(wrong))
        raise InputError(f"{FIELD} row {at + 1}, ttft_s", float(ttft_s[at]), f"is more than e2e_s = {e2e_s[at]:g}",
                         "give both from arrival, in seconds")
    if has_failed.all():
        raise InputError(FIELD, str(path), "holds no request that was answered", "fill in ttft_s and e2e_s")
    _check_unit(tokens[1], e2e_s, ~has_failed, path)
    kept = np.flatnonzero(~is_void)
    order = kept[np.argsort(arrival_s[kept], kind="stable")]
    blank = np.where(has_failed, np.nan, 0.0)
    return MeasuredRun(
        Workload(arrival_s[order] - arrival_s[order[0]], *(t[order].astype(np.int64) for t in tokens),
                 provenance={"source": str(path)}, **_prefixes(frame, order, tokens[0], block_size)),
        (ttft_s + blank)[order], (e2e_s + blank)[order], int(is_void.sum()), bool(np.all(np.diff(order) > 0)),
        str(path))


def _check_unit(output, e2e_s, is_answered, path) -> None:
    a_token_s = float(np.median(e2e_s[is_answered] / output[is_answered]))
    if not FASTEST_TOKEN_S <= a_token_s <= SLOWEST_TOKEN_S:
        slow = a_token_s > SLOWEST_TOKEN_S
        raise InputError(f"{FIELD} e2e_s", f"{a_token_s:.3g} s an output token in the median",
                         f"cannot be seconds ({path})",
                         f"{'divide' if slow else 'multiply'} ttft_s and e2e_s by 1000 if they are in "
                         f"{'milliseconds' if slow else 'thousands of seconds'}")


def _prefixes(frame: pd.DataFrame, order: Int[np.ndarray, " kept"], prompt: Float[np.ndarray, " rows"],
              block_size: int) -> dict:
    if "prefix_block_ids" not in frame.columns:
        return {}
    if "prefix_block_size" in frame.columns:
        sizes = np.unique(number_column(frame, "prefix_block_size", FIELD, low=1, is_whole=True))
        if len(sizes) > 1:
            raise InputError(f"{FIELD} prefix_block_size", sizes.tolist(), "is not one number for the whole file",
                             "use one block size")
        block_size = int(sizes[0])
    cells = frame["prefix_block_ids"]
    rows = [[] if cell is None or isinstance(cell, float) else
            cell.split() if isinstance(cell, str) else list(cell) for cell in cells.iloc[order]]
    lengths = np.array([len(row) for row in rows])
    long = lengths > -(-prompt[order] // block_size)
    if long.any():
        at = int(np.argmax(long))
        raise InputError(f"{FIELD} row {order[at] + 1}, prefix_block_ids", f"{lengths[at]} blocks",
                         f"are more than {int(prompt[order[at]])} prompt tokens in blocks of {block_size}",
                         "give prefix_block_size")
    flat = [word for row in rows for word in row]
    numbers = pd.factorize(pd.Series(flat, dtype=object).astype(str))[0] if flat else np.zeros(0, np.int64)
    return {"prefix_offsets": np.concatenate([[0], np.cumsum(lengths)]), "prefix_hashes": numbers.astype(np.int64),
            "prefix_block_size": block_size}
