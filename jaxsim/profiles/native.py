"""The format jaxsim writes: one Parquet table of all operators, and JSON metadata under the key "jaxsim.profile".

Columns: operator, every axis (null where the operator has none such), seconds. Metadata: schema_version, model, device,
tensor_parallel_size, expert_parallel_size, dtype, kv_dtype, provenance.
"""

import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from jaxsim._core.errors import InputError
from jaxsim.cost.profile import OPERATORS, OperatorTable, Profile
from jaxsim.profiles import _table

NAME = "jaxsim"
KEY = b"jaxsim.profile"
SCHEMA_VERSION = 1
AXES = tuple(sorted({axis for operator in OPERATORS.values() for axis in operator.axes}))
_FIELDS = ("model", "device", "tensor_parallel_size", "expert_parallel_size", "dtype", "kv_dtype")


def write(profile: Profile, path: str | Path) -> Path:
    """Write `profile`; the file appears whole or not at all."""
    path = Path(path)
    columns: dict[str, list] = {"operator": [], **{axis: [] for axis in AXES}, "seconds": []}
    for table in profile.tables.values():
        count = len(table.seconds)
        columns["operator"] += [table.name] * count
        columns["seconds"] += table.seconds.tolist()
        for axis in AXES:
            has = axis in table.axes
            columns[axis] += table.points[:, table.axes.index(axis)].tolist() if has else [None] * count
    meta = {"schema_version": SCHEMA_VERSION, **{name: getattr(profile, name) for name in _FIELDS},
            "provenance": dict(profile.provenance)}
    types = [("operator", pa.string()), *((axis, pa.float64()) for axis in AXES), ("seconds", pa.float64())]
    table = pa.table(columns, schema=pa.schema(types, {KEY: json.dumps(meta).encode()}))
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    pq.write_table(table, partial, compression="zstd")
    os.replace(partial, path)
    return path


def read(path: str | Path) -> Profile:
    """Read a file that `write` made."""
    path = _table.as_path(path)
    try:
        schema = pq.read_schema(path)
    except (OSError, pa.ArrowException) as error:
        raise InputError("profile", str(path), f"cannot be read ({error})", "give a file jaxsim wrote") from error
    raw = (schema.metadata or {}).get(KEY)
    if raw is None:
        raise InputError("profile", str(path), "is not a profile jaxsim wrote",
                         "read it with the reader of its format first, and write that")
    meta = json.loads(raw)
    if meta.get("schema_version") != SCHEMA_VERSION:
        raise InputError(f"profile {path.name}, schema_version", meta.get("schema_version"),
                         f"is not the one this version reads, {SCHEMA_VERSION}", "write the profile again")
    frame = _table.read(path, ["operator", "seconds"], AXES)
    tables = {}
    for name, rows in frame.groupby("operator", sort=False):
        axes = OPERATORS[name].axes if name in OPERATORS else ()
        points = np.stack([_table.numbers(rows, axis, path) for axis in axes], axis=1) if axes else np.zeros((1, 1))
        tables[name] = OperatorTable(name, points, _table.numbers(rows, "seconds", path), path.name,
                                     tuple(f"row {i}" for i in rows.index))
    return Profile(tables, **{name: meta[name] for name in _FIELDS}, provenance=meta["provenance"])
