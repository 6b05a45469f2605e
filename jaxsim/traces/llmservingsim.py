"""LLMServingSim workloads, one JSON object per line: arrival_time_ns, input_toks, output_toks.

Token ids of the prompt (`input_tok_ids`), if every line has them, become chained ids of its full blocks, so
that shared prefixes are seen. The order of lines carries no meaning (the source sorts by arrival), nor does
it here.

Source: casys-kaist/LLMServingSim, docs "JSONL format".

Known gaps: agentic sessions (`sub_requests`) are closed loops, whose later arrivals depend on the simulation;
they are refused.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from jaxsim._core.errors import InputError
from jaxsim.traces._table import FILE, JSON_LINES, Probe, Table, json_lines, keyed, line_places, numbers, ragged

NAME = "llmservingsim"
REQUIRED = ("arrival_time_ns", "input_toks", "output_toks")


def detect(probe: Probe) -> bool:
    """By its keys."""
    return probe.kind == JSON_LINES and (probe.has(*REQUIRED) or probe.has("arrival_time_ns", "sub_requests"))


def read(path: Path, *, max_rows: int | None = None, block_size: int = 16) -> Table:
    """Read the trace; `block_size` is the number of tokens per prefix block made from token ids."""
    records = list(json_lines(path, max_rows))
    for line, record in records:
        if "sub_requests" in record:
            raise InputError(
                f"{FILE} line {line}",
                str(path),
                "is an agentic session (sub_requests)",
                "give independent requests, one per line",
            )
    place = line_places([line for line, _ in records])
    stamps = numbers(keyed(records, "arrival_time_ns", path), "arrival_time_ns", place)
    table = Table(
        # Whole nanoseconds are subtracted as integers: an epoch in nanoseconds does not fit float64.
        arrival_s=(stamps - stamps.min()) / 1e9 if len(stamps) else np.zeros(0),
        input_tokens=numbers(keyed(records, "input_toks", path), "input_toks", place),
        output_tokens=numbers(keyed(records, "output_toks", path), "output_toks", place),
        place=place,
        may_be_unsorted=True,
        is_partial=max_rows is not None and len(records) >= max_rows,
    )
    if records and all(record.get("input_tok_ids") for _, record in records):
        prompts = [record["input_tok_ids"] for _, record in records]
        ragged(prompts, "input_tok_ids", place)  # checks that they are lists of integers
        lengths = np.array([len(p) for p in prompts])
        table.refuse(
            "input_tokens",
            lengths != table.input_tokens,
            "differs from the number of input_tok_ids",
            "fix input_toks",
        )
        table.prefix_offsets, table.prefix_hashes = ragged(
            chained_blocks(prompts, block_size), "blocks", place
        )
        table.prefix_block_size = block_size
    return table


def chained_blocks(prompts: Iterable[Sequence[int]], block_size: int) -> list[list[int]]:
    """Ids of each prompt's full blocks: equal ids where everything up to the block's end is equal."""
    known: dict[tuple[int, tuple[int, ...]], int] = {}
    rows = []
    for prompt in prompts:
        parent, row = -1, []
        for at in range(0, len(prompt) - block_size + 1, block_size):
            parent = known.setdefault((parent, tuple(prompt[at : at + block_size])), len(known))
            row.append(parent)
        rows.append(row)
    return rows
