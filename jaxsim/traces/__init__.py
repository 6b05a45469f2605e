"""Traces: one module per file format, found by listing this package.

A reader module has `NAME`, `REQUIRED` (columns or keys, for error messages), `detect(probe) -> bool` and
`read(path, *, own options) -> Table`. A new format is one new file.
"""

import importlib
import inspect
import pkgutil
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from jaxsim._core.errors import InputError, suggest
from jaxsim.traces import _table
from jaxsim.traces._table import Table
from jaxsim.workload import Workload

READERS: dict[str, ModuleType] = {
    module.NAME: module
    for module in (
        importlib.import_module(f"{__name__}.{info.name}")
        for info in pkgutil.iter_modules(__path__)
        if not info.name.startswith("_")
    )
}
"""Reader modules by format name."""

_COMMON = {
    name for name, p in inspect.signature(_table.to_workload).parameters.items() if p.kind is p.KEYWORD_ONLY
}


def formats() -> tuple[str, ...]:
    """Names of the formats that can be read."""
    return tuple(sorted(READERS))


def detect_format(path: str | Path) -> str:
    """The format of a file, by its extension and its columns or keys."""
    seen = _table.probe(path)
    matches = [name for name, module in READERS.items() if module.detect(seen)]
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise InputError(
            "workload.format",
            None,
            f"is ambiguous for {seen.path.name}: {', '.join(matches)}",
            "choose one (format= in Python)",
        )
    if not seen.columns:
        raise _table.empty(seen.path)
    # The format whose names are best covered is most likely the one meant.
    nearest = max(sorted(READERS), key=lambda n: len(set(READERS[n].REQUIRED) & set(seen.columns)))
    required = READERS[nearest].REQUIRED
    missing = [name for name in required if name not in seen.columns]
    raise InputError(
        _table.FILE,
        str(seen.path),
        f"has the columns {', '.join(seen.columns)}, which no reader knows",
        f"the nearest format is {nearest}, which also needs {', '.join(missing)}; formats: "
        f"{', '.join(formats())}"
        if len(missing) < len(required)
        else f"rename them to input_tokens, output_tokens, arrival_s, or give one of "
        f"the formats {', '.join(formats())}",
    )


def read_trace(path: str | Path, format: str | None = None, **options: Any) -> Workload:
    """Read a trace file into a workload.

    `format` is one of `formats()`; left out, it is found by extension and columns. Options:
    * sort: sort by arrival. Unsorted rows are an error unless the format's rows have no order.
    * drop_failed: leave out requests without output (or input) tokens; the default depends on the format. How
      many were left out is in `provenance["num_dropped"]`.
    * start_s, end_s: only what arrives in this window, seconds from the first arrival; keep: a random share
      of that.
    * start, num_requests: use `num_requests` requests from number `start` on (after sorting and dropping).
    * offset_to_zero (default True): the first arrival becomes 0.
    * rate_scale: speed arrivals up by this factor; or rate_rps: to this mean rate.
    * dither_s: add a uniform draw of up to this many seconds to each arrival (for coarse stamps), then sort.
    * seed: of dithering, routing draws and drawn arrivals.
    * sessions: replay them in a closed loop: a turn comes its recorded think time after the answer before it.
    * for traces without times: rate_rps (required) and arrivals, a process (default Poisson).
    * the reader's own, such as tokenizer (sharegpt), model and log_type (burstgpt), run (vllm-bench and plain),
      scenario (plain), block_size.

    Raises `InputError` naming the place in the file; an option that a scenario has is called by its field.
    """
    path = _table.as_path(path)
    format, reader = _reader(path, format)
    own = _own_options(reader, format, options)
    common = {name: value for name, value in options.items() if name in _COMMON}
    table = _read_enough(reader, path, own, common)
    return _table.to_workload(table, path, format, **common)


def read_lengths(
    path: str | Path, format: str | None = None, *, drop_failed: bool = True, **options: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Input and output tokens of a trace, with or without arrival times: a table for the length laws."""
    path = _table.as_path(path)
    format, reader = _reader(path, format)
    own = _own_options(reader, format, options)
    if "lengths_only" in inspect.signature(reader.read).parameters:
        own["lengths_only"] = True
    table, _ = _table.cleaned(reader.read(path, **own), drop_failed)
    if len(table) == 0:
        raise _table.empty(path)
    return table.input_tokens.astype(np.int64), table.output_tokens.astype(np.int64)


def _reader(path: Path, format: str | None) -> tuple[str, ModuleType]:
    if format is None:
        format = detect_format(path)
    if format not in READERS:
        raise InputError("workload.format", format, "is unknown", suggest(str(format), READERS))
    return format, READERS[format]


def _own_options(reader: ModuleType, format: str, options: dict[str, Any]) -> dict[str, Any]:
    accepted = set(inspect.signature(reader.read).parameters) - {"path", "max_rows", "lengths_only"}
    for name in options:
        if name not in accepted | _COMMON:
            field = f"workload.slice.{name}" if name in ("run", "scenario") else name
            raise InputError(
                field, options[name], f"is not an option of {format} traces", suggest(name, accepted | _COMMON)
            )
    return {name: value for name, value in options.items() if name in accepted}


def _read_enough(reader: ModuleType, path: Path, own: dict[str, Any], common: dict[str, Any]) -> Table:
    """Only as many rows as a slice from the front needs: public traces run to tens of millions of rows."""
    wanted, start = common.get("num_requests"), common.get("start", 0)
    is_front = isinstance(wanted, int) and isinstance(start, int) and wanted > 0 and start >= 0
    is_front = is_front and not any(common.get(name) for name in ("sort", "dither_s", "start_s", "end_s"))
    is_front = is_front and common.get("keep", 1) == 1
    if not is_front or "max_rows" not in inspect.signature(reader.read).parameters:
        return reader.read(path, **own)
    max_rows = start + wanted + 1
    while True:
        table = reader.read(path, max_rows=max_rows, **own)
        if not table.is_partial:
            return table
        if table.may_be_unsorted:
            return reader.read(path, **own)
        if len(_table.cleaned(table, common.get("drop_failed"))[0]) >= start + wanted:
            return table
        max_rows *= 4
