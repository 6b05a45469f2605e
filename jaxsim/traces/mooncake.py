"""Mooncake traces, one JSON object per line: timestamp (ms), input_length, output_length, hash_ids.

`hash_ids` are chained ids of the prompt's blocks of 512 tokens, the last one possibly partial; they are kept
as prefix hashes. Trace tools that borrow the layout (AIPerf, GenAI-Perf input files) are read alike. The
released stamps come in steps of about 3 s: `dither_s=3` spreads them.

Source: kvcache-ai/Mooncake, FAST'25 release.

Known gaps: entries placed by `delay` after an earlier turn instead of a timestamp are refused.
"""

from pathlib import Path

from jaxsim._core.errors import InputError
from jaxsim.traces._table import FILE, JSON_LINES, Probe, Table, json_lines, keyed, line_places, numbers, ragged

NAME = "mooncake"
REQUIRED = ("timestamp", "input_length", "output_length")


def detect(probe: Probe) -> bool:
    """By its keys."""
    return probe.kind == JSON_LINES and probe.has("input_length", "output_length")


def read(path: Path, *, max_rows: int | None = None, block_size: int = 512) -> Table:
    """Read the trace; `block_size` is the number of tokens behind one hash."""
    records = list(json_lines(path, max_rows))
    lines = [line for line, _ in records]
    for line, record in records:
        if "timestamp" not in record and "delay" in record:
            raise InputError(
                f"{FILE} line {line}",
                str(path),
                "has a delay instead of a timestamp",
                "give every request its timestamp in milliseconds",
            )
    place = line_places(lines)
    table = Table(
        arrival_s=numbers(keyed(records, "timestamp", path), "timestamp", place) / 1e3,
        input_tokens=numbers(keyed(records, "input_length", path), "input_length", place),
        output_tokens=numbers(keyed(records, "output_length", path), "output_length", place),
        place=place,
        is_partial=max_rows is not None and len(records) >= max_rows,
    )
    if any("hash_ids" in record for _, record in records):
        rows = (record.get("hash_ids") or [] for _, record in records)
        table.prefix_offsets, table.prefix_hashes = ragged(rows, "hash_ids", place)
        table.prefix_block_size = block_size
    return table
