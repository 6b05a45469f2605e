"""BurstGPT: Timestamp (s), Model, Request tokens, Response tokens, Total tokens, Log Type.

Newer files add Session ID (of conversations) and Elapsed time (to the full answer, s), which say what to replay in a
closed loop; they are not needed. A request with 0 response tokens failed: it
is left out by default and counted in the provenance. The model is the tenant. Stamps of the first release are
whole seconds (`dither_s=1` spreads them).

Source: HPMLL/BurstGPT.
"""

from pathlib import Path

import numpy as np
import pandas as pd

from jaxsim._core.errors import InputError, suggest
from jaxsim.traces._table import CSV, Probe, Table, empty, numbers, read_csv

NAME = "burstgpt"
REQUIRED = ("Timestamp", "Request tokens", "Response tokens")


def detect(probe: Probe) -> bool:
    """By its columns."""
    return probe.kind == CSV and probe.has(*REQUIRED)


def read(
    path: Path, *, max_rows: int | None = None, model: str | None = None, log_type: str | None = None
) -> Table:
    """Read the trace; `model` ("ChatGPT") and `log_type` ("API log") keep only those rows."""
    filters = {"Model": model, "Log Type": log_type}
    required = [*REQUIRED, *(name for name, value in filters.items() if value is not None)]
    optional = ("Model", "Log Type", "Session ID", "Elapsed time")
    frame, is_partial = read_csv(path, required, optional, max_rows=max_rows)
    if len(frame) == 0:
        raise empty(path)
    table = Table(
        arrival_s=numbers(frame["Timestamp"], "Timestamp").astype(np.float64),
        input_tokens=numbers(frame["Request tokens"], "Request tokens"),
        output_tokens=numbers(frame["Response tokens"], "Response tokens"),
        tenant=frame["Model"].to_numpy() if "Model" in frame else None,
        session=frame["Session ID"].to_numpy() if "Session ID" in frame else None,
        answer_s=pd.to_numeric(frame["Elapsed time"], errors="coerce").to_numpy(np.float64)
        if "Elapsed time" in frame else None,
        drop_failed=True,
        is_partial=is_partial,
    )
    keep = np.ones(len(frame), bool)
    for name, value in filters.items():
        if value is not None:
            labels = frame[name].astype(str)
            keep &= (labels == value).to_numpy()
            if not keep.any() and not is_partial:
                raise InputError(name, value, "keeps no request", suggest(value, labels.unique()))
    return table if keep.all() else table.take(np.flatnonzero(keep))
