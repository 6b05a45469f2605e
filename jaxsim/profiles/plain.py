"""The generic format: one CSV or Parquet table, a row for each measurement of each operator.

Columns: `operator`, a name of `jaxsim.cost.profile.OPERATORS`; the axes that operator has, of `tokens, sequences,
experts, message_bytes, context_tokens, chunk_tokens, keys_per_token` (others are left blank in its rows); and one of
`time_s, time_ms, time_us, time_ns`, of one call (one layer; one iteration for embedding, lm_head, sampler, final_norm,
host_step). `history_tokens` may stand for keys_per_token = 2 history_tokens + chunk_tokens.

    operator,tokens,sequences,context_tokens,time_us
    qkv,1,,,35.8
    attention_decode,,8,1024,36.9
"""

from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from jaxsim._core.errors import InputError, suggest
from jaxsim.cost.profile import OPERATORS, Profile
from jaxsim.profiles import _table

NAME = "plain"
AXES = ("tokens", "sequences", "experts", "message_bytes", "context_tokens", "chunk_tokens", "keys_per_token")
TIMES = ("time_s", "time_ms", "time_us", "time_ns")


def read(path: str | Path, *, model: str = "", device: str = "", tensor_parallel_size: int = 1,
         expert_parallel_size: int = 1, dtype: str = "auto", kv_dtype: str = "auto",
         provenance: Mapping[str, object] | None = None) -> Profile:
    """Read the table; what it was measured on is not in the file and is given here."""
    path = Path(path)
    frame = _table.read(path, ["operator"], [*AXES, "history_tokens", *TIMES])
    # Surfaces a wrong count of time columns before any row is looked at.
    seconds = pd.Series(_table.times(frame, path, TIMES), frame.index)
    tables = {}
    for name, rows in frame.groupby("operator", sort=False):
        if name not in OPERATORS:
            raise InputError(f"profile {path.name} row {rows.index[0]}, operator", name, "is not known",
                             suggest(name, OPERATORS))
        axes = [_axis(rows, axis, path) for axis in OPERATORS[name].axes]
        tables[name] = _table.table(name, rows, axes, seconds[rows.index].to_numpy(), path)
    return Profile(tables, model, device, tensor_parallel_size, expert_parallel_size, dtype, kv_dtype,
                   {"format": NAME, "files": [path.name], **(provenance or {})})


def _axis(rows: pd.DataFrame, axis: str, path: Path):
    if axis == "keys_per_token" and axis not in rows and "history_tokens" in rows:
        return (2 * _table.numbers(rows, "history_tokens", path)
                + _table.numbers(rows, "chunk_tokens", path))
    if axis not in rows:
        raise InputError(f"profile {path.name}, {rows['operator'].iloc[0]}", axis, "is a column this operator needs",
                         f"add it, or remove the rows of this operator (from row {rows.index[0]})")
    return _table.numbers(rows, axis, path)
