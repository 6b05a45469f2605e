"""The table of a study: a row a scenario, its parameters and its metrics with intervals over seeds."""

import hashlib
import json
from pathlib import Path

import msgspec
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from scipy.special import stdtrit

from jaxsim._core.errors import InputError
from jaxsim.io.result import version
from jaxsim.study.plan import Plan
from jaxsim.study.study import Study

STUDY, TILES, TABLE = "study.json", "tiles", "results.parquet"
"""Files of a study's folder."""

FORMAT = "jaxsim study 1"

MAJORITY = ("unstable",)
TEXT = ("fault",)
HALF_WIDTH = ".ci95"
"""Behind a metric's name: half of its 95 % interval over seeds."""


def identity(study: Study) -> str:
    """The text of `study.json`: what makes two studies the same. No clock, no host."""
    fields = {**study.to_dict(), "scenario": study.base_tree()}
    content = msgspec.json.encode(fields, order="deterministic")
    return json.dumps({"format": FORMAT, "jaxsim": version(), "hash": hashlib.sha256(content).hexdigest(),
                       "study": json.loads(content)}, indent=2) + "\n"


def unit(name: str) -> str:
    """Unit of a column by its name, "" for text and verdicts, 1 for shares."""
    name = name.removesuffix(HALF_WIDTH)
    endings = {"_ms": "ms", "_s": "s", "_rps": "1/s", "_share": "1", "attainment": "1", "_tokens": "tokens",
               "_throughput": "1/s", "per_device": "1/s", "usd_per_million_output_tokens": "USD",
               "_goodput": "1/s", "_bytes": "bytes"}
    return "s" if name == "duration" else next((u for end, u in endings.items() if name.endswith(end)), "")


def write(made: Plan, folder: Path) -> Path:
    """Join the tiles to the table; the same bytes whatever order they were run in."""
    names = {tile.name(version()) for tile in made.tiles}
    runs = read_runs(folder, names)
    frame = combine(runs)
    parameters = pd.DataFrame(made.points)
    parameters.insert(0, "point", np.arange(len(parameters)))
    for name in parameters:
        # A column of several kinds of values is text to Parquet.
        if parameters[name].dtype == object and parameters[name].map(type).nunique() > 1:
            parameters[name] = parameters[name].map(lambda v: v if isinstance(v, str) else json.dumps(v))
        elif parameters[name].map(lambda v: isinstance(v, (dict, list))).any():
            parameters[name] = parameters[name].map(json.dumps)
    seeds = pd.Series([made.num_seeds.get(k, 0) for k in range(len(parameters))])
    # Behind the axes, where plots look for their end.
    parameters["num_seeds"] = parameters.pop("num_seeds") if "num_seeds" in parameters else seeds
    reasons = {refusal.point: refusal.reason for refusal in made.refusals}
    parameters["refused"] = [reasons.get(k) for k in range(len(parameters))]
    clash = [name for name in frame.columns if name in parameters.columns and name != "point"]
    table = parameters.merge(frame.drop(columns=clash), on="point", how="left")
    arrow = pa.Table.from_pandas(table, preserve_index=False)
    fields = [field.with_metadata({"unit": unit(field.name)}) if unit(field.name) else field for field in arrow.schema]
    arrow = arrow.cast(pa.schema(fields)).replace_schema_metadata(
        {"jaxsim": FORMAT, "version": version(), "study": (folder / STUDY).read_text(encoding="utf-8"),
         "tiles": json.dumps(sorted(names)), "parameters": json.dumps(list(made.points[0]))})
    path = folder / TABLE
    part = path.with_name(f".{TABLE}.part")
    pq.write_table(arrow, part, compression="zstd")
    part.replace(path)
    return path


def read_runs(folder: Path, names: set[str] | None = None) -> pd.DataFrame:
    """A row a run, in the order of points and seeds."""
    files = sorted(p for p in (folder / TILES).glob("*.parquet") if names is None or p.stem in names)
    if not files:
        return pd.DataFrame({"point": pd.Series(dtype=np.int64), "seed": pd.Series(dtype=np.int64)})
    frame = pd.concat([pq.read_table(path).to_pandas() for path in files], ignore_index=True)
    return frame.sort_values(["point", "seed"], kind="stable", ignore_index=True)


def combine(runs: pd.DataFrame) -> pd.DataFrame:
    """Means over the seeds of a point and half of their intervals, as `jaxsim.metrics.combine` has them."""
    if not len(runs):
        return pd.DataFrame({"point": pd.Series(dtype=np.int64)})
    numbers = [name for name in runs if name not in ("point", "seed", *MAJORITY, *TEXT)]
    grouped = runs.groupby("point", sort=True)
    values = runs[numbers].astype(np.float64)
    by = runs["point"]
    mean, count = values.groupby(by).mean(), values.groupby(by).count()
    found = mean.copy()
    if (grouped.size() > 1).any():
        std = values.groupby(by).std(ddof=1)
        half = stdtrit(np.maximum(count - 1, 1), 0.975) * std / np.sqrt(count)
        half = half.where(count > 1)
        found = pd.concat([found, half.add_suffix(HALF_WIDTH)], axis=1)
    for name in MAJORITY:
        said, yes = grouped[name].count(), grouped[name].sum()
        verdict = (2 * yes > said).astype(object)
        found[name] = verdict.where(2 * said >= grouped.size(), None)
    for name in TEXT:
        found[name] = grouped[name].first()
    return found.reset_index()


def load(folder: str | Path, *, runs: bool = False) -> pd.DataFrame:
    """The table of a study: a row a scenario, or with `runs` a row a seed. Raises `InputError`."""
    folder = Path(folder)
    path = folder / TABLE if folder.is_dir() else folder
    if not path.is_file():
        raise InputError("study", str(folder), "holds no finished study",
                         "give the folder of `jaxsim sweep --out`; run it again to finish it")
    table = pq.read_table(path).to_pandas()
    if not runs:
        return table
    about = pq.read_schema(path).metadata
    parameters = ["point", *json.loads(about[b"parameters"])]
    return read_runs(path.parent, set(json.loads(about[b"tiles"]))).merge(table[parameters], on="point", how="left")
