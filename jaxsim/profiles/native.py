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

from jaxsim._core.errors import InputError, suggest
from jaxsim.cost.profile import OPERATORS, OperatorTable, Profile
from jaxsim.profiles import _table

NAME = "jaxsim"
KEY = b"jaxsim.profile"
SCHEMA_VERSION = 1
AXES = tuple(sorted({axis for operator in OPERATORS.values() for axis in operator.axes}))
_FIELDS = {"model": str, "device": str, "tensor_parallel_size": int, "expert_parallel_size": int, "dtype": str,
           "kv_dtype": str}
_KINDS = {str: "text", int: "a whole number", dict: "a table"}
_AGAIN = "write the profile again (`jaxsim import-profile`)"


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
    try:
        with open(partial, "wb") as file:
            pq.write_table(table, file, compression="zstd")
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        # Errors of a disk that is full do not say which file.
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
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
                         "turn it into one with `jaxsim import-profile`")
    try:
        meta = json.loads(raw)
        version = meta.get("schema_version")
    except (ValueError, AttributeError):
        raise InputError(f"profile {path.name}, metadata", bytes(raw[:60]), "is not a JSON table", _AGAIN) from None
    if version != SCHEMA_VERSION:
        raise InputError(f"profile {path.name}, schema_version", version,
                         f"is not the one this version reads, {SCHEMA_VERSION}", _AGAIN)
    for name, kind in {**_FIELDS, "provenance": dict}.items():
        if type(meta.get(name)) is not kind:
            raise InputError(f"profile {path.name}, {name}", meta.get(name), f"should be {_KINDS[kind]}", _AGAIN)
    frame = _table.read(path, ["operator", "seconds"], AXES)
    tables = {}
    for name, rows in frame.groupby("operator", sort=False):
        if name not in OPERATORS:
            raise InputError(f"profile {path.name} row {rows.index[0]}, operator", name, "is not known",
                             suggest(name, OPERATORS))
        axes = OPERATORS[name].axes
        for axis in axes:
            if axis not in rows:
                raise InputError(f"profile {path.name}, {name}", axis, "is a column this operator needs", _AGAIN)
        points = np.stack([_table.numbers(rows, axis, path) for axis in axes], axis=1)
        tables[name] = OperatorTable(name, points, _table.numbers(rows, "seconds", path), path.name,
                                     tuple(f"row {i}" for i in rows.index))
    return Profile(tables, **{name: meta[name] for name in _FIELDS}, provenance=meta["provenance"])
