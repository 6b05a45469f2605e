"""A study's table as plots and reports see it: parameters, metrics, what they are called, and which to show."""

import contextlib
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
from jaxtyping import Bool

from jaxsim._core.errors import InputError, suggest
from jaxsim.study.expressions import Expression
from jaxsim.study.results import HALF_WIDTH, TABLE, load, unit

MOST_PANELS = 9
MOST_HUES = 10
MOST_CELLS = 40_000

PER_DEVICE = "output_throughput_per_device"

LATENCIES = {"ttft": "TTFT", "tpot": "TPOT", "itl": "ITL", "e2el": "end-to-end latency"}
_CAPITALS = {"slo": "SLO", "kv": "KV", "ttft": "TTFT", "tpot": "TPOT", "e2e": "E2E"}
_SLOS = {"ttft": "ttft_ms", "tpot": "tpot_ms", "e2el": "e2e_ms"}
_WRITTEN = {"mean_power_w": "mean power, W", "energy_j": "energy, J", "energy_wh": "energy, Wh",
            "energy_j_per_output_token": "energy per output token, J", "window_s": "measured window, s",
            "usd_per_million_output_tokens": "USD per million output tokens"}
_UNITS = {"request_throughput": "requests/s", "request_goodput": "requests/s", "output_throughput": "tokens/s",
          "total_token_throughput": "tokens/s", PER_DEVICE: "tokens/s", "duration": "s"}


def read(folder: str | Path, where: str | None = None) -> pd.DataFrame:
    """The table of a study, with `study.json` in `attrs["study"]`. Raises `InputError`.

    where: keeps rows of which this is true: "workload.rate_rps <= 8 and p99_ttft_ms < 500".
    """
    frame = load(folder)
    path = Path(folder) / TABLE if Path(folder).is_dir() else Path(folder)
    with contextlib.suppress(KeyError, TypeError, ValueError):
        frame.attrs["study"] = json.loads(pq.read_schema(path).metadata[b"study"])
    frame = prepared(frame)
    return frame if where is None else selected(frame, where)


def selected(frame: pd.DataFrame, where: str) -> pd.DataFrame:
    """Rows of which an expression over columns is true. Raises `InputError`."""
    frame = prepared(frame)
    expression = Expression(where, "where")
    columns = {name: frame[known(frame, "where", name)].tolist() for name in expression.fields}
    is_kept = [bool(expression(lambda name, row=row: columns[name][row])) for row in range(len(frame))]
    if not any(is_kept):
        raise InputError("where", where, f"is true of none of the {len(frame):,} rows", "loosen the condition")
    return frame[is_kept]


def parameters(frame: pd.DataFrame) -> list[str]:
    """Columns of axes and derived fields. Raises `InputError` for what is no table of a study."""
    if "num_seeds" not in frame:
        raise InputError("frame", list(frame.columns)[:5], "is no table of a study", "give what jaxsim.load returns")
    return [name for name in frame.columns[:frame.columns.get_loc("num_seeds")] if name != "point"]


def varying(frame: pd.DataFrame) -> list[str]:
    """Parameters with more than one value."""
    return [name for name in parameters(frame) if frame[name].nunique(dropna=False) > 1]


def devices_vary(frame: pd.DataFrame) -> bool:
    """Whether scenarios have different numbers of devices."""
    return "num_devices" in frame and frame["num_devices"].nunique() > 1


def metrics(frame: pd.DataFrame) -> list[str]:
    """Columns of numbers behind the parameters, without the intervals."""
    behind = frame.columns[frame.columns.get_loc("num_seeds") + 1:]
    return [name for name in behind if not name.endswith(HALF_WIDTH) and name != "unstable"
            and is_numeric(frame[name])]


def limits(frame: pd.DataFrame) -> dict[str, float]:
    """Limits in milliseconds that hold for all rows, by latency: ttft, tpot, e2el."""
    slo = study_of(frame).get("scenario", {}).get("slo") or {}
    found = {}
    for latency, field in _SLOS.items():
        column = f"slo.{field}"
        values = frame[column].dropna().unique() if column in parameters(frame) else [slo.get(field)]
        if len(values) == 1 and values[0] is not None:
            found[latency] = float(values[0])
    return found


def window_note(frame: pd.DataFrame) -> list[str]:
    """What is measured, where a warm-up or a cool-down leaves requests out."""
    scenario, found = study_of(frame).get("scenario", {}), []
    for name, text in (("warmup_s", "the first {} s"), ("cooldown_s", "the last {} s")):
        values = frame[name].unique() if name in parameters(frame) else [scenario.get(name) or 0]
        if any(value > 0 for value in values):
            found.append(text.format(value_text(values[0]) if len(values) == 1 else name))
    if not found:
        return []
    over = "; rates are over the time in between" if any("last" in text for text in found) else ""
    return [f"requests that arrive in {' or '.join(found)} are not measured{over}"]


def label(name: str) -> str:
    """What a metric is called on an axis, with its unit."""
    latency = re.fullmatch(r"(\w+?)_(ttft|tpot|itl|e2el)_ms", name)
    if latency:
        return f"{latency[1]} {LATENCIES[latency[2]]}, ms"
    if name in _WRITTEN:
        return _WRITTEN[name]
    measured = _UNITS.get(name, unit(name))
    words = " ".join(_CAPITALS.get(word, word) for word in re.split(r"[_.]", name.removesuffix("_ms")))
    return f"{words}, {measured}" if measured not in ("", "1") else words


def short(names: Sequence[str]) -> dict[str, str]:
    """The shortest endings that tell fields apart; `device.name` is the device."""
    found = {}
    for name in names:
        parts = (name.removesuffix(".name") if name.count(".") else name).split(".")
        for count in range(1, len(parts) + 1):
            ending = ".".join(parts[-count:])
            others = [n.removesuffix(".name") for n in names if n != name]
            if not any(n == ending or n.endswith("." + ending) for n in others):
                break
        found[name] = ending
    return found


def wrapped(text: str, at: str = "_") -> str:
    """Broken into lines of about ten characters."""
    found = [""]
    for part in re.findall(rf"[^{at}]+{at}?", text):
        if found[-1] and len(found[-1]) + len(part) > 11:
            found.append("")
        found[-1] += part
    return "\n".join(line.strip() for line in found)


def value_text(value: Any) -> str:
    """A parameter's value."""
    if value is None or (isinstance(value, float) and np.isnan(value)):
        return "default"
    if isinstance(value, (bool, np.bool_)) or isinstance(value, str):
        return str(value)
    if isinstance(value, (int, np.integer)):
        return f"{value:,}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def prepared(frame: pd.DataFrame) -> pd.DataFrame:
    """With verdicts on all rows."""
    parameters(frame)
    added: dict[str, Any] = {}
    if not len(frame):
        raise InputError("frame", 0, "has no rows", "loosen the conditions")
    for name in ("refused", "unstable"):
        if name not in frame:
            added[name] = None
    return frame.assign(**added) if added else frame


def study_of(frame: pd.DataFrame) -> dict[str, Any]:
    """The study that a table is of, where it knows."""
    return frame.attrs.get("study", {}).get("study", {})


def is_numeric(column: pd.Series) -> bool:
    """Whether a column holds numbers, verdicts apart."""
    return pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_bool_dtype(column)


def is_true(column: pd.Series) -> Bool[np.ndarray, " rows"]:
    """Verdicts: true is true, and unknown is not."""
    return column.map(lambda value: not pd.isna(value) and bool(value)).to_numpy(bool)


def known(frame: pd.DataFrame, option: str, name: str) -> str:
    """The name, if it is a column. Raises `InputError`."""
    if name not in frame:
        names = ", ".join(parameters(frame))
        raise InputError(option, name, "is no column of this study",
                         suggest(name, frame.columns, f"parameters are {names}; metrics are in docs/results.md"))
    return name


def checked_parameter(frame: pd.DataFrame, option: str, name: str) -> str:
    """The name, if it is a parameter that varies. Raises `InputError`."""
    if known(frame, option, name) in varying(frame):
        return name
    if name in parameters(frame):
        value = value_text(frame[name].iloc[0])
        raise InputError(option, name, f"has one value here, {value}", "name one that varies: "
                         + (", ".join(varying(frame)) or "this table has none"))
    raise InputError(option, name, "is no parameter of this study",
                     suggest(name, varying(frame)) + "; two metrics go against each other with --kind pareto")


def checked_metric(frame: pd.DataFrame, option: str, name: str) -> str:
    """The name, if it is a metric. Raises `InputError`."""
    if known(frame, option, name) not in metrics(frame):
        raise InputError(option, name, "is no metric", suggest(name, metrics(frame), "metrics are in docs/results.md"))
    if not frame[name].notna().any():
        raise InputError(option, name, "has no value in any row", "choose another metric")
    return name


def values_of(column: pd.Series) -> list[Any]:
    """Numbers in order, others as they come."""
    found = list(column.drop_duplicates())
    return sorted(found, key=lambda v: (v != v, v)) if is_numeric(column) else found


def writer(column: pd.Series) -> Callable[[Any], str]:
    """`value_text`, or all digits where that would make two values one."""
    found = list(column.drop_duplicates())
    if len({value_text(v) for v in found}) == len(found):
        return value_text
    return lambda v: f"{v:.12g}" if isinstance(v, float) and v == v else value_text(v)


# ---- which parameter goes where


def free(frame: pd.DataFrame, chosen: Sequence[str]) -> list[str]:
    """Parameters that still vary where the chosen ones do not; what others decide is left out."""
    fixed, found = list(chosen), []
    for name in varying(frame):
        if name in fixed:
            continue
        groups = frame.groupby(fixed, dropna=False, sort=False)[name] if fixed else None
        count = frame[name].nunique(dropna=False) if groups is None else groups.nunique(dropna=False).max()
        if count > 1:
            fixed.append(name)
            found.append(name)
    return found


def default_x(frame: pd.DataFrame, without: Sequence[str] = ()) -> str:
    """The number with the most values, the rate among equals; without numbers the parameter with the most."""
    names = [name for name in varying(frame) if name not in without]
    if not names:
        raise InputError("x", None, "has nothing to show: no parameter varies", "loosen --where, or widen the study")
    return max(names, key=lambda name: (is_numeric(frame[name]), frame[name].nunique(), name == "workload.rate_rps"))


def default_hue(frame: pd.DataFrame, x: str) -> str | None:
    """Of those that neither x nor others decide, the one with the most values that colours still tell apart."""
    names = [name for name in free(frame, [x]) if frame[name].nunique(dropna=False) <= MOST_HUES]
    return max(names, key=lambda name: frame[name].nunique(dropna=False)) if names else None


def default_metric(frame: pd.DataFrame) -> str:
    """The 99th percentile of the time to first token, or what there is."""
    names = [name for name in metrics(frame) if frame[name].notna().any()]
    for name in ("p99_ttft_ms", "mean_ttft_ms", "p99_e2el_ms", "output_throughput", *names):
        if name in names:
            return name
    raise InputError("y", None, "has no metric to show: no row was simulated", "see the column `refused`")


def choose(frame: pd.DataFrame) -> str:
    """The kind of plot that suits a table: lines, a heat map where those are too many, else a Pareto front."""
    frame = prepared(frame)
    with contextlib.suppress(InputError):
        x, hue, _ = line_axes(frame, None, None, 1)
        if not (is_numeric(frame[x]) and joins_nothing(frame, x, hue)):
            return "lines"
    with contextlib.suppress(InputError):
        map_axes(frame, None, None)
        return "heatmap"
    return "pareto"


def sliced(frame: pd.DataFrame, chosen: Sequence[str]) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Rows that fit on one page of panels: parameters held at their middle value until they do, and which."""
    held: dict[str, Any] = {}
    while len(combinations(frame, rest := free(frame, chosen))) > MOST_PANELS:
        name = max(rest, key=lambda n: frame[n].nunique(dropna=False))
        values = values_of(frame[name])
        held[name] = values[(len(values) - 1) // 2]
        same = frame[name].isna() if held[name] != held[name] else frame[name] == held[name]
        frame = frame[same]
    return frame, held


def line_axes(frame: pd.DataFrame, x: str | None, hue: str | None, rows: int) -> tuple[str, str | None, list[str]]:
    """x, hue and the fields of panels. Raises `InputError` where those are too many."""
    hue = None if hue is None else checked_parameter(frame, "hue", hue)
    x = default_x(frame, [hue] if hue else []) if x is None else checked_parameter(frame, "x", x)
    if hue == x:
        raise InputError("hue", hue, "is x too", "name two different parameters")
    hue = default_hue(frame, x) if hue is None else hue
    if hue is not None and frame[hue].nunique(dropna=False) > MOST_HUES:
        raise InputError("hue", hue, f"has {frame[hue].nunique():,} values, more than {MOST_HUES} colours tell apart",
                         "choose another --hue, leave values out with --where, or use --kind heatmap")
    return x, hue, _panel_fields(frame, [x, *([hue] if hue else [])], rows)


def map_axes(frame: pd.DataFrame, x: str | None, y: str | None) -> tuple[str, str, list[str]]:
    """Both parameters of a heat map, and those that take panels. Raises `InputError`."""
    x = default_x(frame, [y] if y else []) if x is None else checked_parameter(frame, "x", x)
    if y is None:
        names = free(frame, [x])
        if not names:
            raise InputError("y", None, f"has nothing to show: {x} is all that varies", "use --kind lines")
        y = default_x(frame[names].assign(num_seeds=1))
    checked_parameter(frame, "y", y)
    if x == y:
        raise InputError("y", y, "is x too", "name two different parameters")
    cells = frame[x].nunique(dropna=False) * frame[y].nunique(dropna=False)
    fields = _panel_fields(frame, [x, y], 1)
    if cells > MOST_CELLS or (cells > 100 and len(frame) < 0.1 * cells):
        raise InputError("x, y", [x, y], f"span {cells:,} cells for {len(frame):,} scenarios: they are no grid",
                         "choose two axes of a grid, or use --kind lines or pareto")
    return x, y, fields


def _panel_fields(frame: pd.DataFrame, chosen: Sequence[str], rows: int) -> list[str]:
    """Fields that take a panel a value. Raises `InputError` for more panels than fit."""
    fields = free(frame, chosen)
    count = len(combinations(frame, fields)) * rows
    if count > MOST_PANELS:
        most = max(fields, key=lambda n: frame[n].nunique(dropna=False)) if fields else ""
        value = frame[most].iloc[0] if fields else ""
        remedy = f'hold one still, e.g. --where "{most} == {_literal(value)}"' if fields else "name fewer metrics"
        raise InputError("panels", " x ".join([*fields, *([f"{rows} metrics"] if rows > 1 else [])]),
                         f"would be {count:,} panels, {MOST_PANELS} fit", remedy)
    return fields


def _literal(value: Any) -> str:
    if isinstance(value, str):
        return f"'{value}'"
    return str(value.item() if hasattr(value, "item") else value)


def combinations(frame: pd.DataFrame, fields: Sequence[str]) -> list[tuple]:
    """Values of these fields that occur together, in their order."""
    if not fields:
        return [()]
    write = {name: writer(frame[name]) for name in fields}
    ranks = {name: {write[name](v): k for k, v in enumerate(values_of(frame[name]))} for name in fields}
    rows = list(frame[list(fields)].drop_duplicates().itertuples(index=False, name=None))
    return sorted(rows, key=lambda row: [ranks[n][write[n](v)] for n, v in zip(fields, row, strict=True)])


def rows_where(frame: pd.DataFrame, fields: Sequence[str], values: Sequence[Any]) -> pd.DataFrame:
    """Rows in which fields have these values."""
    is_kept = np.ones(len(frame), bool)
    for name, value in zip(fields, values, strict=True):
        is_kept &= (frame[name].isna() if value is None or value != value else frame[name] == value).to_numpy()
    return frame[is_kept]


def joins_nothing(frame: pd.DataFrame, x: str, hue: str | None) -> bool:
    """Whether other numbers jump about from point to point, as in a sampled design: no line joins those."""
    if not is_numeric(frame[x]):
        return True
    groups = frame.groupby([hue], dropna=False) if hue else [((), frame)]
    others = [n for n in varying(frame) if n not in (x, hue) and is_numeric(frame[n])]
    if any(n in free(frame, [x, *([hue] if hue else [])]) for n in others):
        # Panels hold them still.
        return False
    for _, rows in groups:
        if len(rows) > 2 and rows[x].is_unique:
            ordered = rows.sort_values(x)
            if any(not (ordered[n].is_monotonic_increasing or ordered[n].is_monotonic_decreasing) for n in others):
                return True
    return False
