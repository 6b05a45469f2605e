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
from jaxsim.study.lanes import known
from jaxsim.study.plan import Plan
from jaxsim.study.study import Study

STUDY, TILES, REQUESTS, TABLE = "study.json", "tiles", "requests", "results.parquet"
"""Files of a study's folder."""

FORMAT = "jaxsim study 1"

MAJORITY = ("unstable",)
TEXT = ("fault",)
DESCRIPTIONS = {
    "refused": "why the scenario cannot be simulated; empty where it was",
    "unstable": "most seeds had more and more requests waiting when arrivals ended: latencies are of the run's length",
    "duration": "first measured arrival to last measured answer, the drain included",
    "window_s": "what rates are over: the duration, or with a cool-down the time between warm-up and cool-down",
    "usd_per_million_output_tokens": "list prices of the device catalogue",
    "mean_power_w": "approximate: each device at its idle power, or at work on an iteration at the power of"
                    " generating tokens; hosts and cooling are not in it",
    "energy_j": "approximate: mean_power_w x window_s", "energy_wh": "approximate: energy_j / 3600",
    "energy_j_per_output_token": "approximate: mean_power_w / output_throughput"}
"""Of columns whose names leave something unsaid; docs/results.md has them all."""

TILES_AT_ONCE = 64
"""Whose runs are held in memory while the table is made."""

HALF_WIDTH = ".ci95"
"""Behind a metric's name: half of its 95 % interval over seeds."""


def identity(study: Study) -> str:
    """The text of `study.json`. No clock, no host.

    What makes two studies the same is in it as `hash`, where files are known by their content and not by their paths.
    """
    whole = msgspec.structs.replace(study, scenario=study.base_tree())
    known_by = msgspec.json.encode(whole.with_paths(known), order="deterministic")
    return json.dumps({"format": FORMAT, "jaxsim": version(), "hash": hashlib.sha256(known_by).hexdigest(),
                       "study": json.loads(msgspec.json.encode(whole, order="deterministic"))}, indent=2) + "\n"


def is_same(one: str, other: str) -> bool:
    """Whether two texts of `study.json` are of one study, and of one version."""
    try:
        first, second = json.loads(one), json.loads(other)
        return all(first[key] == second[key] for key in ("format", "jaxsim", "hash"))
    except (ValueError, KeyError, TypeError):
        return False


def unit(name: str) -> str:
    """Unit of a column by its name, "" for text and verdicts, 1 for shares."""
    name = name.removesuffix(HALF_WIDTH)
    endings = {"_ms": "ms", "_s": "s", "_rps": "1/s", "_share": "1", "attainment": "1", "_tokens": "tokens",
               "_throughput": "1/s", "per_device": "1/s", "usd_per_million_output_tokens": "USD",
               "_goodput": "1/s", "_bytes": "bytes", "energy_j": "J", "energy_wh": "Wh", "_power_w": "W",
               "_j_per_output_token": "J"}
    return "s" if name == "duration" else next((u for end, u in endings.items() if name.endswith(end)), "")


def write(made: Plan, folder: Path) -> Path:
    """Join the tiles to the table; the same bytes whatever order they were run in.

    Raises `InputError` where there is no room for it: the tiles are kept.
    """
    names = {tile.name(version()) for tile in made.tiles}
    frame = _combined(folder, names)
    if max(made.num_seeds.values(), default=0) < 2:
        frame = frame.drop(columns=[name for name in frame if name.endswith(HALF_WIDTH)])
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
    study = (folder / STUDY).read_text(encoding="utf-8")
    if json.loads(study)["study"].get("feasible_only"):
        parameters = parameters[parameters["refused"].isna()]
    clash = [name for name in frame.columns if name in parameters.columns and name != "point"]
    frame = parameters.merge(frame.drop(columns=clash), on="point", how="left")
    arrow = pa.Table.from_pandas(frame, preserve_index=False)
    arrow = arrow.cast(pa.schema([_described(field) for field in arrow.schema])).replace_schema_metadata(
        {"jaxsim": FORMAT, "version": version(), "study": study,
         "tiles": json.dumps(sorted(names)), "parameters": json.dumps(list(made.points[0]))})
    path = folder / TABLE
    part = path.with_name(f".{TABLE}.part")
    try:
        pq.write_table(arrow, part, compression="zstd")
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise InputError("--out", str(path), error.strerror or str(error),
                         "make room and run the same command again: finished tiles are kept") from None
    return path


def _described(field: pa.Field) -> pa.Field:
    """With its unit, and what its name leaves unsaid."""
    about = {"unit": unit(field.name), "description": DESCRIPTIONS.get(field.name, "")}
    return field.with_metadata({key: text for key, text in about.items() if text} or None)


def read_runs(folder: Path, names: set[str] | None = None) -> pd.DataFrame:
    """A row a run, in the order of points and seeds."""
    if names is None:
        files = sorted((folder / TILES).glob("*.parquet"))
    else:
        files = [path for name in sorted(names) if (path := folder / TILES / f"{name}.parquet").is_file()]
    if not files:
        return pd.DataFrame({"point": pd.Series(dtype=np.int64), "seed": pd.Series(dtype=np.int64)})
    frame = pd.concat([pq.read_table(path).to_pandas() for path in files], ignore_index=True)
    return frame.sort_values(["point", "seed"], kind="stable", ignore_index=True)


def _combined(folder: Path, names: set[str]) -> pd.DataFrame:
    """`combine` of all tiles, some at a time: a scenario's seeds are in one, and all runs may not fit into memory."""
    listed = sorted(names)
    parts = [combine(read_runs(folder, set(listed[at:at + TILES_AT_ONCE])))
             for at in range(0, len(listed), TILES_AT_ONCE)]
    if not parts:
        return combine(read_runs(folder, names))
    frame = pd.concat(parts, ignore_index=True)
    parts.clear()
    # Tiles differ in which metrics there are.
    last = (*MAJORITY, *TEXT)
    metrics = [name for name in frame if name not in last and not name.endswith(HALF_WIDTH)]
    frame = frame[[*metrics, *(name for name in frame if name.endswith(HALF_WIDTH)), *last]]
    return frame.sort_values("point", ignore_index=True)


def combine(runs: pd.DataFrame) -> pd.DataFrame:
    """Means over the seeds of a point and half of their intervals, as `jaxsim.metrics.combine` has them."""
    if not len(runs):
        return pd.DataFrame({"point": pd.Series(dtype=np.int64)})
    numbers = [name for name in runs if name not in ("point", "seed", *MAJORITY, *TEXT)]
    grouped = runs.groupby("point", sort=True)
    values = runs[numbers].astype(np.float64)
    by = runs["point"]
    mean, count = values.groupby(by).mean(), values.groupby(by).count()
    half = stdtrit(np.maximum(count - 1, 1), 0.975) * values.groupby(by).std(ddof=1) / np.sqrt(count)
    found = pd.concat([mean, half.where(count > 1).add_suffix(HALF_WIDTH)], axis=1)
    for name in MAJORITY:
        said, yes = grouped[name].count(), grouped[name].sum()
        verdict = (2 * yes > said).astype(object)
        found[name] = verdict.where(2 * said >= grouped.size(), None)
    for name in TEXT:
        found[name] = grouped[name].first()
    return found.reset_index()


def load(folder: str | Path, *, runs: bool = False, requests: bool = False) -> pd.DataFrame:
    """The table of a study: a row a scenario, with `runs` a row a seed, with `requests` a row a request.

    Requests have `point` and `seed` and no parameters of their scenario. Raises `InputError`.
    """
    folder = Path(folder)
    path = folder / TABLE if folder.is_dir() else folder
    if not path.is_file():
        raise InputError("study", str(folder), "holds no finished study",
                         "give the folder of `jaxsim sweep --out`; run it again to finish it")
    table = pq.read_table(path).to_pandas()
    if not (runs or requests):
        return table
    about = pq.read_schema(path).metadata
    names = set(json.loads(about[b"tiles"]))
    if requests:
        return _read_requests(path.parent, names)
    parameters = ["point", *json.loads(about[b"parameters"])]
    return read_runs(path.parent, names).merge(table[parameters], on="point", how="left")


def _read_requests(folder: Path, names: set[str]) -> pd.DataFrame:
    files = [folder / REQUESTS / f"{name}.parquet" for name in sorted(names)]
    missing = [path for path in files if not path.is_file()]
    if missing:
        raise InputError("requests", str(folder), "were not kept", "run `jaxsim sweep` again with --requests")
    frame = pd.concat([pq.read_table(path).to_pandas() for path in files], ignore_index=True)
    return frame.sort_values(["point", "seed", "request_id"], kind="stable", ignore_index=True)
