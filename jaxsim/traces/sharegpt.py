"""ShareGPT-style JSON: a list of conversations. Lengths only, no arrival times.

The first question and its answer of each conversation are taken, as vLLM's benchmark client does;
conversations with fewer than two turns are left out. Lengths are taken, in this order, from
* the record: input_tokens/output_tokens, prompt_len/output_len, or input_len/output_len;
* the first two turns: `num_tokens` or `tokens` (whole numbers);
* `tokenizer`, a callable from text to a list of token ids (or to their number).

Source: the ShareGPT_V3 layout; vLLM's benchmark data sets.

Known gaps: later turns are not used; nothing is pruned by length (the client drops prompts above 1,024
tokens).
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxsim._core.errors import InputError
from jaxsim.traces._table import FILE, JSON, Probe, Table, json_documents, numbers, row_place

NAME = "sharegpt"
REQUIRED = ("conversations",)

_RECORD_KEYS = (("input_tokens", "output_tokens"), ("prompt_len", "output_len"), ("input_len", "output_len"))
_TURN_KEYS = ("num_tokens", "tokens")


def detect(probe: Probe) -> bool:
    """A JSON document whose first record has conversations (or pre-counted lengths)."""
    return (
        probe.kind == JSON
        and isinstance(probe.first, Mapping)
        and (
            probe.has("conversations")
            or probe.has("conversation")
            or any(probe.has(*pair) for pair in _RECORD_KEYS)
        )
    )


def read(path: Path, *, tokenizer: Callable[[str], Any] | None = None) -> Table:
    """Read the lengths."""
    document = json_documents(path)[0]
    if not isinstance(document, list):
        raise InputError(FILE, str(path), "is not a list of conversations", "give a JSON list")
    pairs, rows, num_short = [], [], 0
    for index, record in enumerate(document):
        place = row_place(index)
        if not isinstance(record, Mapping):
            raise InputError(f"{FILE} {place}", record, "is not a JSON object", "give conversations")
        pair = _lengths(record, place, tokenizer)
        if pair is None:
            num_short += 1
            continue
        pairs.append(pair)
        rows.append(index)
    return Table(
        input_tokens=numbers([p for p, _ in pairs], "input_tokens", lambda i: row_place(rows[i])),
        output_tokens=numbers([o for _, o in pairs], "output_tokens", lambda i: row_place(rows[i])),
        place=lambda i: row_place(rows[i]),
        num_failed=num_short,
        drop_failed=True,
    )


def _lengths(
    record: Mapping[str, Any], place: str, tokenizer: Callable[[str], Any] | None
) -> tuple[Any, Any] | None:
    for first, second in _RECORD_KEYS:
        if first in record and second in record:
            return record[first], record[second]
    turns = record.get("conversations", record.get("conversation"))
    if not isinstance(turns, list):
        raise InputError(
            f"{FILE} {place}",
            sorted(record),
            "has neither conversations nor token counts",
            "give conversations, or input_tokens and output_tokens",
        )
    if len(turns) < 2:
        return None
    counts = []
    for turn in turns[:2]:
        if not isinstance(turn, Mapping):
            raise InputError(f"{FILE} {place}", turn, "is not a turn of a conversation", "give from and value")
        count = next((turn[key] for key in _TURN_KEYS if isinstance(turn.get(key), int)), None)
        if count is None:
            text = turn.get("value", turn.get("content"))
            if tokenizer is None:
                raise InputError(
                    f"{FILE} {place}",
                    text,
                    "has no token counts",
                    "add num_tokens to each turn, or in Python pass tokenizer=, a function from text to token ids",
                )
            counted = tokenizer("" if text is None else str(text))
            count = int(counted) if isinstance(counted, (int, np.integer)) else len(counted)
        counts.append(count)
    return counts[0], counts[1]
