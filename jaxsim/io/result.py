"""Result files: `summary.json` and `requests.parquet`, published and versioned formats."""

import json
import math
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from jaxsim.engine.lower import hybrid_facts, resolve_system
from jaxsim.metrics import Result, request_frame
from jaxsim.spec.presets import load_preset
from jaxsim.spec.scenario import Scenario

FORMAT = "jaxsim summary 1"
"""Changes when a key changes its meaning; new keys do not change it."""

FILES = ("summary.json", "requests.parquet", "timeline.json", "latency.png", "load.png", "requests.png")
"""Everything a run may leave in its folder."""


def clear(folder: str | Path) -> None:
    """Removes what a former run left in a folder, so that no file tells of another run; nothing else is touched."""
    for name in FILES:
        path = Path(folder) / name
        if path.is_file() or path.is_symlink():
            path.unlink()


def version() -> str:
    """Version of the installed distribution."""
    try:
        return metadata.version("jaxsim-serving")
    except metadata.PackageNotFoundError:
        return "unknown"


def provenance(result: Result, index: int = 0) -> dict[str, Any]:
    """What made a summary: versions and the engine imitated. No clock, no host: equal runs, equal bytes."""
    preset = load_preset(result.scenarios[index].engine.preset)
    jax = sys.modules.get("jax")
    return {
        "format": FORMAT,
        "jaxsim": version(),
        "jax": getattr(jax, "__version__", None),
        "backend": jax.default_backend() if jax is not None else None,
        "python": platform.python_version(),
        "imitates": {"preset": preset.name, "engine": preset.engine, "version": preset.version,
                     "leaves_out": list(preset.leaves_out)},
    }


def summary(result: Result, index: int = 0) -> dict[str, Any]:
    """The content of `summary.json` for one scenario.

    Flat keys of vLLM's benchmark client and nested groups (means over seeds); `intervals`, 95 % by dotted
    key; `seeds`, the same metrics of every run; `hybrid`, of a GPU and its host; `scenario`; `provenance`.
    """
    scenario = result.scenarios[index]
    runs = zip(scenario.seeds, result.runs[index], strict=False)
    return {
        **result.metrics[index],
        "intervals": {key: list(ends) for key, ends in result.intervals[index].items() if ends is not None},
        "seeds": [{"seed": seed, **run} for seed, run in runs],
        **({} if scenario.engine.hybrid is None else {"hybrid": _hybrid(scenario)}),
        "scenario": scenario.to_dict(),
        "provenance": provenance(result, index),
    }


def _hybrid(scenario: Scenario) -> dict[str, Any]:
    """Of a GPU and its host: where weights are, and the token cap."""
    system = resolve_system(scenario)
    return hybrid_facts(system.hybrid, system.scheduler, system.memory)


def plain(value: Any) -> Any:
    """As JSON has it: no tuples, no numbers of NumPy, and null for what is missing or not finite."""
    if isinstance(value, dict):
        return {name: plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    value = value.item() if isinstance(value, np.generic) else value
    return None if value is pd.NA or isinstance(value, float) and not math.isfinite(value) else value


def plain_rows(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows of a table as JSON has them."""
    return plain(table.to_dict("records"))


def to_json(content: dict[str, Any]) -> str:
    """Indented JSON. A number that is not finite is a defect, so it raises."""
    return json.dumps(content, indent=2, allow_nan=False) + "\n"


def write_summary(result: Result, path: str | Path, index: int = 0) -> Path:
    """Writes `summary.json`; returns its path."""
    path = Path(path)
    path.write_text(to_json(summary(result, index)), encoding="utf-8")
    return path


def write_requests(result: Result, path: str | Path, index: int = 0) -> Path:
    """Writes `requests.parquet`: one scenario's requests, all seeds; what does not exist is null."""
    scenario, path = result.scenarios[index], Path(path)
    frames = []
    for seed, lane in zip(scenario.seeds, result.lanes[index], strict=False):
        frame = request_frame(lane)
        frame["seed"] = seed
        frames.append(frame)
    table = pa.Table.from_pandas(pd.concat(frames, ignore_index=True), preserve_index=False)
    table = table.replace_schema_metadata({"jaxsim": f"requests 1, written by jaxsim {version()}"})
    pq.write_table(table, path, compression="zstd")
    return path
