"""A measured run: requests as they arrived, with the latencies a client saw."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Number
from pathlib import Path

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int

from jaxsim._core.errors import InputError
from jaxsim.profiles import _table
from jaxsim.workload.workload import Workload

COLUMNS = ("arrival_s", "input_tokens", "output_tokens", "ttft_s", "e2e_s")
"""Columns that a run must have."""

FIELD = "measured"

FASTEST_TOKEN_S, SLOWEST_TOKEN_S = 1e-4, 5.0
"""Seconds of an output token, in the median, outside which a file's unit is wrong: no engine generates 10,000 tokens/s
for one request, and nobody waits longer."""

FEWEST_AT_ONCE, FEWEST_FOR_UNIT = 0.05, 20
"""Requests on their way on average, below which arrivals look like milliseconds; and requests needed to say so."""


@dataclass(frozen=True, eq=False)
class MeasuredRun:
    """What was sent, and what came back. Requests in order of arrival.

    workload: arrivals from 0, lengths, prefixes. ttft_s, e2e_s: from arrival to the first and to the last token; NaN
    for a request that failed, which is replayed and not compared. rows: of the file, from 1. num_dropped: rows without
    tokens, which cannot be replayed. was_sorted: whether the file was in order of arrival.
    """

    workload: Workload
    ttft_s: Float[np.ndarray, " requests"]
    e2e_s: Float[np.ndarray, " requests"]
    rows: Int[np.ndarray, " requests"]
    num_dropped: int
    was_sorted: bool
    path: str

    @property
    def is_answered(self) -> Bool[np.ndarray, " requests"]:
        """Which requests did not fail."""
        return ~np.isnan(self.e2e_s)

    @property
    def mean_at_once(self) -> float:
        """Requests that were on their way on average: arrivals a second times seconds each."""
        span_s = float(self.workload.arrival_s[-1])
        return float(np.nansum(self.e2e_s)) / span_s if span_s > 0 else math.inf

    @property
    def looks_like_ms(self) -> bool:
        """Whether arrivals are so far apart that they are probably not in seconds."""
        return len(self.workload) >= FEWEST_FOR_UNIT and self.mean_at_once < FEWEST_AT_ONCE

    def check_skip(self, skip: int) -> None:
        """Refuse to leave out all requests that were answered. Raises `InputError`."""
        if not 0 <= skip < len(self.workload) or not self.is_answered[skip:].any():
            raise InputError("--skip", skip, f"leaves none of {int(self.is_answered.sum())} answered requests of"
                             f" {self.path} to compare", "give a smaller number, 0 or more")


def read_run(path: str | Path, block_size: int) -> MeasuredRun:
    """Read a run; `block_size`: tokens of a block of `prefix_block_ids`, unless the file says otherwise.

    Columns: `arrival_s`, `input_tokens`, `output_tokens`, `ttft_s`, `e2e_s`; optional `prefix_block_ids` (ids of a
    prompt's blocks, each standing for the whole prompt up to there, separated by spaces; numbers or any words),
    `prefix_block_size`. A request that failed has no `ttft_s` or `e2e_s`. Raises `InputError` naming the row.
    """
    frame = _table.load(path, FIELD, texts=("prefix_block_ids",))
    _table.check_columns(frame, path, COLUMNS, FIELD)
    arrival_s = _table.column(frame, "arrival_s", FIELD, low=-math.inf)
    tokens = [_table.column(frame, name, FIELD, is_whole=True) for name in COLUMNS[1:3]]
    ttft_s, e2e_s = (_table.column(frame, name, FIELD, may_be_empty=True) for name in COLUMNS[3:])
    has_failed = np.isnan(ttft_s) | np.isnan(e2e_s)
    is_void = (tokens[0] < 1) | (tokens[1] < 1)

    def refuse(is_wrong, name, value, problem, remedy):
        if is_wrong.any():
            at = int(np.argmax(is_wrong))
            raise InputError(f"{FIELD} row {at + 1}, {name}", value(at), problem(at), remedy)

    for name, count in zip(COLUMNS[1:3], tokens, strict=True):
        refuse((count < 1) & ~has_failed, name, lambda at: 0, lambda at: "is no request, and yet it was answered",
               "give the true length, or leave ttft_s and e2e_s empty where a request failed")
    refuse(tokens[0] + tokens[1] > _table.LARGEST_COUNT, COLUMNS[1], lambda at: int(tokens[0][at]),
           lambda at: f"and {int(tokens[1][at])} output tokens are more than {_table.LARGEST_COUNT}",
           "fix or remove that row")
    refuse(~has_failed & (ttft_s > e2e_s), "ttft_s", lambda at: float(ttft_s[at]),
           lambda at: f"is more than e2e_s = {e2e_s[at]:g}", "give both from arrival, in seconds")
    if has_failed.all():
        raise InputError(FIELD, str(path), "holds no request that was answered", "fill in ttft_s and e2e_s")
    _check_unit(tokens[1], e2e_s, ~has_failed, path)
    kept = np.flatnonzero(~is_void)
    order = kept[np.argsort(arrival_s[kept], kind="stable")]
    blank = np.where(has_failed, np.nan, 0.0)
    return MeasuredRun(
        Workload(arrival_s[order] - arrival_s[order[0]], *(t[order].astype(np.int64) for t in tokens),
                 provenance={"source": str(path)}, **_prefixes(frame, order, tokens[0], block_size)),
        (ttft_s + blank)[order], (e2e_s + blank)[order], order + 1, int(is_void.sum()),
        bool(np.all(np.diff(order) > 0)), str(path))


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
        sizes = np.unique(_table.column(frame, "prefix_block_size", FIELD, low=1, is_whole=True))
        if len(sizes) > 1:
            raise InputError(f"{FIELD} prefix_block_size", sizes.tolist(), "is not one number for the whole file",
                             "use one block size")
        block_size = int(sizes[0])
    rows = [_ids(cell, at + 1) for at, cell in zip(order, frame["prefix_block_ids"].iloc[order], strict=True)]
    lengths = np.array([len(row) for row in rows])
    long = lengths > -(-prompt[order] // block_size)
    if long.any():
        at = int(np.argmax(long))
        raise InputError(f"{FIELD} row {order[at] + 1}, prefix_block_ids", f"{lengths[at]} blocks",
                         f"are more than {int(prompt[order[at]])} prompt tokens in blocks of {block_size}",
                         "give prefix_block_size")
    flat = [word for row in rows for word in row]
    numbers = pd.factorize(np.array(flat, object))[0] if flat else np.zeros(0, np.int64)
    return {"prefix_offsets": np.concatenate([[0], np.cumsum(lengths)]), "prefix_hashes": numbers.astype(np.int64),
            "prefix_block_size": block_size}


def _ids(cell: object, row: int) -> Sequence[str]:
    """The ids of one cell: words, one number, or a list."""
    if not isinstance(cell, str | np.ndarray | list | tuple):
        # Whole numbers with a gap among them are floats.
        is_whole = isinstance(cell, Number) and cell == cell and cell == int(cell)
        return () if pd.isna(cell) else (str(int(cell)) if is_whole else str(cell),)
    if isinstance(cell, str) and set(cell) & set(",;[("):
        raise InputError(f"{FIELD} row {row}, prefix_block_ids", cell, "is not separated by spaces",
                         "write the ids with spaces between, without brackets")
    words = cell.split() if isinstance(cell, str) else [str(word) for word in cell]
    if len(set(words)) < len(words):
        twice = next(word for i, word in enumerate(words) if word in words[:i])
        raise InputError(f"{FIELD} row {row}, prefix_block_ids", twice, "is there twice, and an id stands for the whole"
                         " prompt up to its block", "number blocks by their content and everything before it")
    return words
