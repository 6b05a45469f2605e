"""A run as a Chrome trace, which Perfetto (ui.perfetto.dev) and chrome://tracing open.

One process an instance: a track of iterations, counters of running, waiting and KV blocks, and one
asynchronous slice a request with its phases inside. Times are microseconds.

Known gaps: all stalls of a request are drawn as one, in front of its decode phase; a request stays with the instance
that computed its prompt, its transfer and its decode phase too.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from jaxsim.metrics import LaneResult, request_frame

MICROSECONDS = 1e6

_COUNTS = ("iterations", "prefill_tokens", "decode_seqs", "running", "waiting", "used_blocks")


def trace_events(lane: LaneResult) -> list[dict[str, Any]]:
    """Events of one run in the Trace Event Format."""
    events: list[dict[str, Any]] = []
    for instance in range(len(lane.busy_s)):
        events += [
            {"ph": "M", "pid": instance + 1, "name": "process_name",
             "args": {"name": f"instance {instance}"}},
            {"ph": "M", "pid": instance + 1, "tid": 1, "name": "thread_name",
             "args": {"name": "iterations"}},
        ]
    if lane.steps is not None:
        events += _iterations(lane.steps)
    return events + _requests(lane)


def _iterations(steps: Any) -> list[dict[str, Any]]:
    columns = {name: np.asarray(values).tolist() for name, values in steps.items()}
    events = []
    for row in range(len(columns["time_s"])):
        step = {name: values[row] for name, values in columns.items()}
        pid, start = int(step["instance"]) + 1, step["time_s"] * MICROSECONDS
        kind = "mixed" if step["prefill_tokens"] and step["decode_seqs"] else (
            "prefill" if step["prefill_tokens"] else "decode")
        count = int(step["iterations"])
        counts = {n: int(step[n]) for n in _COUNTS}
        end = start + step["duration_s"] * MICROSECONDS
        pieces = [(kind, count, start, end)]
        if kind != "decode" and count > 1:
            middle = start + step["first_s"] * MICROSECONDS
            pieces = [(kind, 1, start, middle), ("decode", count - 1, middle, end)]
        events += [
            {"ph": "X", "pid": pid, "tid": 1, "name": name if many == 1 else f"{name} x {many}", "cat": "iteration",
             "ts": begin, "dur": stop - begin, "args": counts | {"iterations": many}}
            for name, many, begin, stop in pieces]
        events += [
            {"ph": "C", "pid": pid, "name": "sequences", "ts": start,
             "args": {"running": counts["running"], "waiting": counts["waiting"]}},
            {"ph": "C", "pid": pid, "name": "KV blocks", "ts": start,
             "args": {"used": counts["used_blocks"]}},
        ]
    return events


def _requests(lane: LaneResult) -> list[dict[str, Any]]:
    frame = request_frame(lane)
    events = []
    for row in frame.itertuples(index=False):
        start = row.arrival_s
        args = {"input_tokens": int(row.input_tokens), "output_tokens": int(row.output_tokens),
                "preemptions": int(row.preemptions), "status": row.status, "tenant": row.tenant}
        common = {"cat": "request", "id": f"r{row.request_id}", "pid": int(row.instance) + 1, "tid": 2}
        slices = []
        for name, length in (("encode", getattr(row, "encode_s", 0.0)), ("embedding", getattr(row, "embedding_s", 0.0)),
                             ("queue", row.queue_s), ("prefill", row.prefill_s), ("transfer", row.transfer_s),
                             ("stall", row.stall_s), ("decode", row.decode_s)):
            if np.isnan(length):
                break
            if length > 0:
                slices.append((name, start, start + length))
            start += length
        if not slices:
            continue
        whole = (f"request {row.request_id}", slices[0][1], slices[-1][2])
        for depth, (name, begin, end) in enumerate((whole, *slices)):
            events.append({"ph": "b", **common, "name": name, "ts": begin * MICROSECONDS,
                           **({"args": args} if depth == 0 else {})})
            if depth:
                events.append({"ph": "e", **common, "name": name, "ts": end * MICROSECONDS})
        events.append({"ph": "e", **common, "name": whole[0], "ts": whole[2] * MICROSECONDS})
    return events


def write_timeline(lane: LaneResult, path: str | Path) -> Path:
    """Writes the trace of one run; returns its path."""
    path = Path(path)
    content = {"displayTimeUnit": "ms", "traceEvents": trace_events(lane)}
    path.write_text(json.dumps(content, separators=(",", ":"), allow_nan=False), encoding="utf-8")
    return path
