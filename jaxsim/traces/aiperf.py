"""Per-request records of AIPerf (`profile_export.jsonl`): what NVIDIA's successor of GenAI-Perf measured.

Each line has metadata.request_start_ns (epoch), metrics.input_sequence_length and
metrics.output_sequence_length ({"value": ..., "unit": "tokens"}), and error. Failed or cancelled requests are
left out and counted. Records come in order of completion and are sorted by start.

Source: ai-dynamo/aiperf, docs "Working with profile export files".

Known gaps: GenAI-Perf's own `profile_export.json` has no token counts and is not read; sending times of a
closed-loop run followed the answers, replaying them as open arrivals is an approximation.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxsim._core.errors import InputError
from jaxsim.traces._table import FILE, JSON, JSON_LINES, Probe, Table, json_lines, line_places, numbers

NAME = "aiperf"
REQUIRED = ("metadata", "metrics")


def detect(probe: Probe) -> bool:
    """By its keys; GenAI-Perf's profile export is recognised so that it can be refused with a reason."""
    return (probe.kind == JSON_LINES and probe.has(*REQUIRED)) or (
        probe.kind == JSON and probe.has("experiments")
    )


def read(path: Path, *, max_rows: int | None = None) -> Table:
    """Read the requests that succeeded."""
    if path.suffix.lower() == ".json":
        raise InputError(
            FILE,
            str(path),
            "is a GenAI-Perf profile export, which has no token counts",
            "use AIPerf's profile_export.jsonl, or the input trace of the run",
        )
    lines, starts, inputs, outputs, num_failed, num_rows = [], [], [], [], 0, 0
    for line, record in json_lines(path, max_rows):
        num_rows += 1
        metadata = record.get("metadata") or {}
        if record.get("error") or metadata.get("was_cancelled"):
            num_failed += 1
            continue
        lines.append(line)
        starts.append(_entry(metadata, "request_start_ns", line, path))
        metrics = record.get("metrics") or {}
        inputs.append(_value(metrics, "input_sequence_length", line, path))
        outputs.append(_value(metrics, "output_sequence_length", line, path))
    place = line_places(lines)
    stamps = numbers(starts, "request_start_ns", place)
    return Table(
        arrival_s=(stamps - stamps.min()) / 1e9 if len(stamps) else np.zeros(0),
        input_tokens=numbers(inputs, "input_sequence_length", place),
        output_tokens=numbers(outputs, "output_sequence_length", place),
        place=place,
        num_failed=num_failed,
        drop_failed=True,
        may_be_unsorted=True,
        is_partial=max_rows is not None and num_rows >= max_rows,
    )


def _entry(record: Mapping[str, Any], key: str, line: int, path: Path) -> Any:
    if key not in record:
        raise InputError(
            f"{FILE} line {line}", str(path), f"lacks {key}", f"found {', '.join(record) or 'none'}"
        )
    return record[key]


def _value(metrics: Mapping[str, Any], key: str, line: int, path: Path) -> Any:
    entry = _entry(metrics, key, line, path)
    return entry.get("value") if isinstance(entry, Mapping) else entry
