"""Results of vLLM's benchmark client (`vllm bench serve --save-result --save-detailed`), to replay.

Per-request lists: input_lens, output_lens, start_times (s, of the client's clock). Requests with an error or
no output are left out by default and counted. `start_times` are when requests were sent; where the client
held them back to a concurrency limit, newer versions also write queue_times, and the arrival is start minus
queue time. Files of clients without start_times (older vLLM, SGLang) hold lengths only, unless the request
rate was infinite: then everything arrived at once.

Source: vllm/benchmarks/serve.py.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxsim._core.errors import InputError
from jaxsim.traces._table import (
    FILE,
    JSON,
    JSON_LINES,
    Probe,
    Table,
    json_documents,
    missing_columns,
    numbers,
    row_place,
)

NAME = "vllm-bench"
REQUIRED = ("input_lens", "output_lens")


def detect(probe: Probe) -> bool:
    """By its per-request lists, or by the totals of a run saved without them."""
    return probe.kind in (JSON, JSON_LINES) and (
        probe.has(*REQUIRED) or probe.has("total_input_tokens", "request_throughput")
    )


def read(path: Path, *, run: int | None = None) -> Table:
    """Read the requests of a result; `run` picks one (0 the first, -1 the last) of several appended."""
    runs = json_documents(path)
    if run is None and len(runs) > 1:
        raise InputError(
            "workload.slice.run",
            None,
            f"is missing: {path.name} holds {len(runs)} runs",
            "give one (run= in Python), 0 for the first",
        )
    try:
        result = runs[run or 0]
    except IndexError as error:
        raise InputError(
            "workload.slice.run", run, f"is past the {len(runs)} runs of {path.name}", "give a smaller one"
        ) from error
    if not isinstance(result, Mapping):
        raise InputError(
            FILE, str(path), "is not a benchmark result", "give the JSON object the client saved"
        )
    missing = [name for name in REQUIRED if not isinstance(result.get(name), list)]
    if missing:
        error = missing_columns(path, missing, result, "per-request list")
        raise InputError(
            error.field,
            error.value,
            error.problem,
            "save the benchmark with --save-detailed; " + error.remedy,
        )
    input_tokens = numbers(result["input_lens"], "input_lens")
    count = len(input_tokens)
    lists: dict[str, np.ndarray] = {}
    for name in ("output_lens", "start_times", "queue_times"):
        if isinstance(result.get(name), list):
            lists[name] = numbers(result[name], name)
            if len(lists[name]) != count:
                raise InputError(
                    name,
                    len(lists[name]),
                    f"entries for {count} input_lens",
                    "save the run again: the file is inconsistent",
                )
    output_tokens = lists["output_lens"].copy()
    errors = result.get("errors")
    if isinstance(errors, list) and len(errors) == count:
        # A failed request may have streamed some tokens before the error.
        output_tokens[np.array([bool(e) for e in errors], bool)] = 0
    arrival_s = _arrivals(result, lists, count)
    return Table(
        arrival_s=arrival_s,
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        place=row_place,
        drop_failed=True,
        may_be_unsorted=True,
    )


def _arrivals(result: Mapping[str, Any], lists: Mapping[str, np.ndarray], count: int) -> np.ndarray | None:
    if "start_times" in lists:
        queued = lists.get("queue_times", np.zeros(count))
        arrival_s = lists["start_times"] - np.maximum(queued, 0.0)
        # The client's clock starts at its first request, which may have waited too.
        return arrival_s - min(0.0, float(arrival_s.min())) if count else arrival_s
    is_burst = str(result.get("request_rate")).lower() in ("inf", "infinity")
    # With a concurrency limit the client's sending times followed the answers: not known without start_times.
    return np.zeros(count) if is_burst and result.get("max_concurrency") is None else None
