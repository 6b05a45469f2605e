"""Per-request records of inference-perf (`per_request_lifecycle_metrics.json`).

A JSON list of {"start_time": s, "end_time": s, "info": {"input_tokens", "output_tokens"}, "error"}. Failed
requests are left out and counted.

Source: kubernetes-sigs/inference-perf reports.

Known gaps: output_tokens is the client's re-tokenisation of the text and can be far off the number generated
(down to 0); where the run fixed the output length, pass it as `output_tokens`.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from jaxsim._core.errors import InputError
from jaxsim.traces._table import FILE, JSON, Probe, Table, json_documents, numbers, row_place

NAME = "inference-perf"
REQUIRED = ("start_time", "info")


def detect(probe: Probe) -> bool:
    """By the keys of the first record."""
    return probe.kind == JSON and probe.has(*REQUIRED)


def read(path: Path, *, output_tokens: int | None = None) -> Table:
    """Read the requests that succeeded; `output_tokens` overrides the counted outputs."""
    document = json_documents(path)[0]
    if not isinstance(document, list):
        raise InputError(
            FILE, str(path), "is not a list of requests", "give per_request_lifecycle_metrics.json"
        )
    rows, starts, inputs, outputs, num_failed = [], [], [], [], 0
    for index, record in enumerate(document):
        if (
            not isinstance(record, Mapping)
            or "start_time" not in record
            or not isinstance(record.get("info"), Mapping)
        ):
            raise InputError(
                f"{FILE} {row_place(index)}",
                str(path),
                "lacks start_time or info",
                "give per_request_lifecycle_metrics.json",
            )
        if record.get("error"):
            num_failed += 1
            continue
        rows.append(index)
        starts.append(record["start_time"])
        inputs.append(record["info"].get("input_tokens"))
        outputs.append(record["info"].get("output_tokens") if output_tokens is None else output_tokens)

    def place(i: int) -> str:
        return row_place(rows[i])

    return Table(
        arrival_s=numbers(starts, "start_time", place).astype(np.float64),
        input_tokens=numbers(inputs, "info.input_tokens", place),
        output_tokens=numbers(outputs, "info.output_tokens", place),
        place=place,
        num_failed=num_failed,
        drop_failed=True,
        may_be_unsorted=True,
    )
