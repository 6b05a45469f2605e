"""A report of a study: one HTML file that needs nothing else, no network and no folder beside it."""

import base64
import html
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from jaxsim._core.errors import InputError
from jaxsim.io.table import number
from jaxsim.spec.presets import load_preset
from jaxsim.study import plots, view
from jaxsim.study.results import HALF_WIDTH

MOST_ROWS = 2000
MOST_REASONS = 20

METRICS = ("request_throughput", "output_throughput", view.PER_DEVICE, "p50_ttft_ms", "p99_ttft_ms", "p50_tpot_ms",
           "p99_tpot_ms", "p99_e2el_ms", "request_goodput", "slo.attainment", "kv.peak_share", "preemptions.total",
           "usd_per_million_output_tokens", "energy_j_per_output_token")
"""Columns of the table, of those that have values."""

_NUMBER = ' class="n"'

_CAVEATS = (
    "Numbers are means over seeds; intervals are 95 % of what differs between seeds. They do not cover the error of the"
    " model: docs/accuracy.md says how far simulations are off measured runs.",
    "All scenarios have the same seeds, so differences between rows are of what was changed, and intervals of single"
    " rows overstate the doubt about a difference.",
    "Latencies of unstable rows depend on the length of the run, not on the system: more requests, higher numbers.",
    "A scenario whose run was too short to tell counts neither as stable nor as unstable; more requests would tell.",
    "Throughputs are over the duration of a run, the drain after the last arrival included, so they are below the rate"
    " of arrivals in short runs; with a cool-down (cooldown_s) they are of the window in between.",
    "Energy is approximate: each device at its idle power, or with an iteration in flight at the power of generating"
    " tokens; prompts draw more, hosts and cooling are not in it. Devices without published figures have none.",
    "A percentile of few requests is close to the largest value seen; the 99th wants thousands.")

_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 76rem; margin: 0 auto;
  padding: 1.5rem; }
h1 { font-size: 1.6rem; margin: 0 0 .3rem; } h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem; }
figure { margin: 1.2rem 0 2rem; } figure img { max-width: 100%; height: auto; display: block; }
figcaption, .faint { color: #555; font-size: .9rem; }
table { border-collapse: collapse; font-size: .88rem; }
th, td { padding: .25rem .6rem; text-align: left; vertical-align: top; border-bottom: 1px solid #e3e3e3; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.wide { overflow: auto; max-height: 42rem; border: 1px solid #ddd; }
.wide th { position: sticky; top: 0; background: #f6f6f6; vertical-align: bottom; }
th button { font: inherit; font-weight: 600; border: 0; background: none; padding: 0; cursor: pointer;
  text-align: inherit; color: inherit; }
th[aria-sort=ascending] button::after { content: " \\25B2"; }
th[aria-sort=descending] button::after { content: " \\25BC"; }
.cards { display: flex; flex-wrap: wrap; gap: .6rem; padding: 0; list-style: none; }
.cards li { border: 1px solid #ddd; border-radius: .4rem; padding: .5rem .9rem; }
.cards b { font-size: 1.3rem; display: block; }
tr.unstable td { color: #8a3a00; } tr.refused td { color: #777; }
pre { overflow: auto; background: #f6f6f6; padding: .8rem; font-size: .82rem; }
@media print { .wide { max-height: none; overflow: visible; } }
"""

_SCRIPT = """
document.querySelectorAll("table.sortable").forEach(function (table) {
  table.querySelectorAll("th button").forEach(function (button) {
    button.addEventListener("click", function () {
      var head = button.parentNode, at = head.cellIndex, body = table.tBodies[0];
      var up = head.getAttribute("aria-sort") !== "ascending";
      var rows = Array.prototype.slice.call(body.rows).map(function (row) {
        var text = row.cells[at].getAttribute("data-v");
        return { row: row, text: text, number: text === "" ? NaN : Number(text) };
      });
      var numeric = head.classList.contains("n");
      rows.sort(function (a, b) {
        if (a.text === "" || b.text === "") { return (a.text === "") - (b.text === ""); }
        var order = numeric ? a.number - b.number : a.text < b.text ? -1 : a.text > b.text ? 1 : 0;
        return up ? order : -order;
      });
      rows.forEach(function (entry) { body.appendChild(entry.row); });
      table.querySelectorAll("th").forEach(function (other) { other.removeAttribute("aria-sort"); });
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
    });
  });
});
"""


def write(frame: pd.DataFrame, path: str | Path, where: str | None = None) -> Path:
    """Write the report of a table, as `view.read` gives it; `where`: what chose its rows. Raises `InputError`."""
    path, text = Path(path), page(frame, where)
    path.write_text(text, encoding="utf-8")
    return path


def page(frame: pd.DataFrame, where: str | None = None) -> str:
    """The HTML of a report. The same table gives the same text: it holds no clock and no host."""
    about = frame.attrs.get("study", {})
    study = about.get("study", {})
    title = study.get("name") or "study"
    counts = _counts(frame)
    parts = [
        f"<h1>{_text(title)}</h1>",
        f"<p>{_text(study['description'])}</p>" if study.get("description") else "",
        f'<p class="faint">Only rows where <code>{_text(where)}</code>.</p>' if where else "",
        *(f'<p class="faint">{_text(note[0].upper() + note[1:])}.</p>' for note in view.window_note(frame)),
        '<ul class="cards">' + "".join(f"<li><b>{n:,}</b> {_text(name)}</li>" for name, n in counts.items()) + "</ul>",
        "<h2>Plots</h2>", *_plots(frame),
        "<h2>Axes</h2>", _axes(frame, study.get("derived", {})),
        "<h2>Unstable and refused</h2>", *_trouble(frame, counts),
        "<h2>Scenarios</h2>", *_table(frame),
        "<h2>What to keep in mind</h2>", _list(_CAVEATS),
        "<h2>Provenance</h2>", *_provenance(frame, about)]
    # The policy stands for what the page promises: nothing is fetched.
    return ('<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:;'
            ' style-src \'unsafe-inline\'; script-src \'unsafe-inline\'">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{_text(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
            + "\n".join(part for part in parts if part) + f"\n<script>{_SCRIPT}</script>\n</body>\n</html>\n")


def _text(value: Any) -> str:
    return html.escape(str(value), quote=True)


def _breaking(name: str) -> str:
    """A column's name that may break after dots and underscores."""
    return re.sub(r"([._])", r"\1<wbr>", _text(name))


def _list(items: Iterable[str]) -> str:
    return "<ul>" + "".join(f"<li>{_text(item)}</li>" for item in items) + "</ul>"


def _verdict(frame: pd.DataFrame) -> list[str]:
    """refused, unstable, stable, or too short to tell, of each row."""
    found = []
    for refused, unstable in zip(frame["refused"], frame["unstable"], strict=True):
        known = not pd.isna(unstable)
        found.append("refused" if not pd.isna(refused) else
                     "too short to tell" if not known else "unstable" if unstable else "stable")
    return found


def _counts(frame: pd.DataFrame) -> dict[str, int]:
    verdicts = pd.Series(_verdict(frame)).value_counts()
    names = ("stable", "unstable", "too short to tell", "refused")
    return {"scenarios": len(frame), **{name: int(verdicts.get(name, 0)) for name in names},
            "seeds of each": int(frame["num_seeds"].max())}


# ---- plots


def _plots(frame: pd.DataFrame) -> Iterator[str]:
    """Key plots; a parameter too many is held at its middle value, and one that cannot be drawn says why."""
    present = [n for n in view.metrics(frame) if frame[n].notna().any()]

    def chosen(names: Sequence[str]) -> list[str]:
        return [name for name in names if name in present]

    def over(metric: str) -> Callable[[pd.DataFrame, Any], Any]:
        return lambda rows, out: plots.lines(rows, y=metric, out=out)

    along = view.default_x(frame) if view.varying(frame) else "nothing"
    drawn = [(f"{view.label(name).partition(',')[0]} over {along}", over(name), _line_fields)
             for name in chosen(["p99_ttft_ms", "p99_tpot_ms", "output_throughput"])]
    drawn += [("Where limits are met" if chosen(["slo.attainment"]) else "Latency over two axes",
               lambda rows, out: plots.heatmap(rows, out=out), _map_fields),
              ("Latency against throughput", lambda rows, out: plots.pareto(rows, out=out), lambda rows: None)]
    for caption, draw, fields in drawn:
        try:
            keep = fields(frame)
            rows, held = (frame, {}) if keep is None else view.sliced(frame, keep)
            stream = io.BytesIO()
            draw(rows, stream)
        except InputError as error:
            yield f'<p class="faint">{_text(caption)}: not drawn. {_text(error)}</p>'
            continue
        if held:
            caption += ", at " + ", ".join(f"{n} = {view.value_text(v)}" for n, v in held.items())
        data = base64.b64encode(stream.getvalue()).decode("ascii")
        yield (f'<figure><img alt="{_text(caption)}" src="data:image/png;base64,{data}">'
               f"<figcaption>{_text(caption)}</figcaption></figure>")


def _line_fields(frame: pd.DataFrame) -> list[str]:
    x = view.default_x(frame)
    hue = view.default_hue(frame, x)
    return [x, *([hue] if hue else [])]


def _map_fields(frame: pd.DataFrame) -> list[str]:
    x = view.default_x(frame)
    others = view.free(frame, [x])
    return [x, *([view.default_x(frame[[*others, "num_seeds"]])] if others else [])]


# ---- text


def _axes(frame: pd.DataFrame, derived: Mapping[str, str]) -> str:
    rows = []
    for name in view.parameters(frame):
        column = frame[name]
        values = list(column.drop_duplicates())
        if pd.api.types.is_numeric_dtype(column):
            values = sorted(values)
        texts = [view.value_text(v) for v in values]
        shown = ", ".join(texts) if len(texts) <= 12 else f"{texts[0]}, {texts[1]}, … {texts[-1]}"
        rows.append(f'<tr><td><code>{_text(name)}</code></td><td class="n">{len(values):,}</td>'
                    f"<td>{_text(shown)}</td>"
                    + (f"<td><code>{_text(derived.get(name, ''))}</code></td>" if derived else "") + "</tr>")
    return ('<table><thead><tr><th>field</th><th class="n">values</th><th>which</th>'
            + ("<th>derived as</th>" if derived else "") + "</tr></thead>"
            f"<tbody>{''.join(rows)}</tbody></table>")


def _trouble(frame: pd.DataFrame, counts: Mapping[str, int]) -> Iterator[str]:
    simulated = counts["scenarios"] - counts["refused"]
    if counts["unstable"]:
        yield (f"<p>{counts['unstable']:,} of {simulated:,} simulated scenarios are unstable: more and more requests"
               " were waiting when arrivals ended, so the system cannot keep up with the rate.</p>")
        yield _unstable_by_axis(frame)
    else:
        yield f"<p>None of {simulated:,} simulated scenarios is unstable.</p>"
    if counts["too short to tell"]:
        yield f"<p>Of {counts['too short to tell']:,} the run was too short to tell.</p>"
    faults = frame["fault"].dropna().value_counts() if "fault" in frame else pd.Series(dtype=int)
    if len(faults):
        yield "<p>Stopped by a bound:</p>" + _list(f"{count:,}: {text}" for text, count in faults.items())
    if not counts["refused"]:
        yield "<p>None was refused.</p>"
        return
    # The same refusal has other numbers at every point.
    groups: dict[str, list[str]] = {}
    for reason in frame["refused"].dropna():
        groups.setdefault(re.sub(r"\d[\d.,]*", "#", reason), []).append(reason)
    ordered = sorted(groups.values(), key=len, reverse=True)
    rows = "".join(f'<tr><td class="n">{len(same):,}</td><td>{_text(same[0])}</td></tr>'
                   for same in ordered[:MOST_REASONS])
    yield (f"<p>{counts['refused']:,} scenarios cannot be simulated. Reasons, with the first point's numbers:</p>"
           f'<table><thead><tr><th class="n">scenarios</th><th>reason</th></tr></thead><tbody>{rows}</tbody></table>')
    if len(ordered) > MOST_REASONS:
        yield f"<p>{len(ordered) - MOST_REASONS:,} more kinds of reasons, in the column <code>refused</code>.</p>"


def _unstable_by_axis(frame: pd.DataFrame) -> str:
    """How many of the simulated are unstable at each value of an axis with few."""
    verdicts = np.array(_verdict(frame))
    rows = []
    for name in view.varying(frame):
        texts = frame[name].map(view.value_text).to_numpy()
        values = list(dict.fromkeys(texts[np.argsort(frame[name].to_numpy(), kind="stable")]
                                    if pd.api.types.is_numeric_dtype(frame[name]) else texts))
        if len(values) > 12:
            continue
        cells = []
        for value in values:
            mine = verdicts[(texts == value) & (verdicts != "refused")]
            cells.append(f"{value}: {np.count_nonzero(mine == 'unstable'):,} of {len(mine):,}")
        rows.append(f"<tr><td><code>{_text(name)}</code></td><td>{_text('; '.join(cells))}</td></tr>")
    return ("<table><thead><tr><th>axis</th><th>unstable at each value</th></tr></thead>"
            f"<tbody>{''.join(rows)}</tbody></table>") if rows else ""


def _table(frame: pd.DataFrame) -> Iterator[str]:
    names = view.parameters(frame)
    shown = [n for n in METRICS if n in frame and frame[n].notna().any()]
    if not view.devices_vary(frame) and view.PER_DEVICE in shown:
        shown.remove(view.PER_DEVICE)
    is_number = {n: n in shown or (pd.api.types.is_numeric_dtype(frame[n]) and not pd.api.types.is_bool_dtype(frame[n]))
                 for n in [*names, *shown]}
    more = len(frame) - MOST_ROWS
    yield ('<p class="faint">Click a heading to sort; ± is half of a 95 % interval over seeds. '
           + (f"The first {MOST_ROWS:,} of {len(frame):,} rows: {more:,} more are" if more > 0 else "All metrics are")
           + " in <code>results.parquet</code>.</p>")
    kinds = {n: _NUMBER if is_number.get(n) else "" for n in [*names, *shown, "verdict"]}
    heads = "".join(f'<th scope="col"{kind}><button type="button">{_breaking(n)}</button></th>'
                    for n, kind in kinds.items())
    body = []
    part = frame.iloc[:MOST_ROWS]
    for row, verdict in zip(part.to_dict("records"), _verdict(part), strict=True):
        cells = [_cell(row[n], view.value_text(row[n]), is_number[n]) for n in names]
        for n in shown:
            half, value = row.get(n + HALF_WIDTH), row[n]
            text = number(value) + (f" ± {number(half, 2)}" if half is not None and half == half and half > 0 else "")
            cells.append(_cell(value, text, True))
        why = f' title="{_text(row["refused"])}"' if verdict == "refused" else ""
        cells.append(f'<td data-v="{_text(verdict)}"{why}>{_text(verdict)}</td>')
        kind = f' class="{verdict}"' if verdict in ("unstable", "refused") else ""
        body.append(f"<tr{kind}>{''.join(cells)}</tr>")
    yield (f'<div class="wide" tabindex="0"><table class="sortable"><thead><tr>{heads}</tr></thead><tbody>\n'
           + "\n".join(body) + "\n</tbody></table></div>")


def _cell(value: Any, text: str, is_number: bool) -> str:
    is_there = not pd.isna(value)
    key = "" if not is_there else repr(float(value)) if is_number else text
    return f'<td data-v="{_text(key)}"{_NUMBER if is_number else ""}>{_text(text)}</td>'


def _provenance(frame: pd.DataFrame, about: Mapping[str, Any]) -> Iterator[str]:
    scenario = about.get("study", {}).get("scenario", {})
    engine = scenario.get("engine") if isinstance(scenario, Mapping) else None
    base = engine.get("preset") if isinstance(engine, Mapping) else None
    names = list(frame["engine.preset"].dropna().unique()) if "engine.preset" in view.parameters(frame) else [base]
    rows = [("jaxsim", about.get("jaxsim", "unknown")), ("format", about.get("format", "unknown")),
            ("hash of the study", about.get("hash", "unknown"))]
    missing: list[str] = []
    for name in names:
        if name is None:
            continue
        try:
            preset = load_preset(str(name))
        except InputError:
            rows.append(("engine imitated", str(name)))
            continue
        rows.append(("engine imitated", f"{preset.engine} {preset.version} (preset {preset.name})"))
        missing += [f"{preset.name} leaves out: {text}" for text in preset.leaves_out]
    yield ("<table><tbody>" + "".join(f'<tr><th scope="row">{_text(k)}</th><td>{_text(v)}</td></tr>' for k, v in rows)
           + "</tbody></table>")
    if missing:
        yield _list(dict.fromkeys(missing))
    if about:
        yield ("<details><summary>The study</summary><pre>" + _text(json.dumps(about.get("study", {}), indent=2))
               + "</pre></details>")
