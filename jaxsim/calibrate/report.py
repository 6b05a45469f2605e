"""A calibration for people and programs: text, JSON, TOML constants that can be read back, plots."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from jaxsim._core.errors import InputError
from jaxsim.calibrate.fit import Calibrated, Calibration, Errors, family_of, is_own, written
from jaxsim.calibrate.runs import EngineFit
from jaxsim.io.figure import FAINT, LIMIT, LINE, drawn, heading
from jaxsim.io.result import plain, to_json
from jaxsim.spec.device import DeviceSpec
from jaxsim.spec.toml import dump_toml
from jaxsim.validate.plots import count_outside, plain_logarithms

FORMAT = "jaxsim calibration 1"
WORST_SHAPES = 5
FEWEST_ROWS_OF_A_SHAPE = 3
MOST_POINTS = 4000


def pair(errors: Errors | None) -> str:
    """Median and 90th percentile, in percent."""
    return "-" if errors is None else f"{100 * errors.median:.1f} / {100 * errors.p90:.1f}"


def line(one: Calibrated) -> str:
    """One family on one line."""
    kept = f"; constants kept: {one.refused}" if one.refused else ""
    return (f"{one.family:20s} {len(one.observations):6,} of {one.rows:7,} rows   {pair(one.before):>13s} ->"
            f" {pair(one.after):>13s}   held out {pair(one.held_out):>13s} %   {one.seconds:5.1f} s{kept}")


def print_report(result: Calibration, console: Console) -> None:
    """Errors by family, parameters, what is not identified, worst shapes, and where the rest comes from."""
    device = result.device
    console.print(f"{device.name}: |predicted / measured - 1| in %, median / 90th percentile of the rows used\n")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("family", "rows", "used", "shapes", "before", "after", "held out", "bias"):
        table.add_column(name, justify="left" if name == "family" else "right")
    for one in result.families:
        table.add_row(one.family, f"{one.rows:,}", f"{len(one.observations):,}", f"{len(one.groups):,}",
                      pair(one.before), pair(one.after), pair(one.held_out), f"{100 * one.after.bias:+.1f}")
    console.print(table)
    for one in result.families:
        _print_family(one, console)
    if result.not_measured:
        console.print("\nnot measured, or not taken:", style="bold")
        for name in result.not_measured:
            console.print(f"  {name}: {_kept(result, name)}", soft_wrap=True)
    for note in result.notes:
        console.print(f"note: {note}", soft_wrap=True)


def _kept(result: Calibration, family: str) -> str:
    device, like = result.device, result.device.calibration
    refused = next((one.refused for one in result.families if one.family == family), "")
    whose = ("its present constants" if is_own(device) else
             f"constants of {family_of(device)} (calibration = {like!r}), for the datasheet of {device.name}")
    return whose + (f", as {refused}" if refused else "")


def _print_family(one: Calibrated, console: Console) -> None:
    console.print(f"\n{one.family}", style="bold")
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for name in ("", "present", "fitted", "± by data", "bounds"):
        table.add_column(name, justify="right" if name else "left")
    for name, value in written(one.fit).items():
        error = one.fit.data_errors[name]
        spread = "at bound" if math.isnan(error) else f"{100 * error:.1f} %" if error < 1 else "unknown"
        table.add_row(f"  {name}", f"{one.present[name]:.4g}", f"{value:.4g}", spread,
                      " .. ".join(f"{x:.3g}" for x in one.fit.limits[name]))
    console.print(table)
    if one.refused:
        console.print(f"  Not taken, the present constants stay: {one.refused}.", soft_wrap=True)
    for sentence in one.fit.sentences():
        console.print(f"  {sentence}", soft_wrap=True)
    worst = [g for g in one.groups if g.rows >= FEWEST_ROWS_OF_A_SHAPE] or list(one.groups)
    for group in worst[:WORST_SHAPES]:
        console.print(f"  worst: {group.shape} ({group.rows:,} rows): {pair(group.errors)},"
                      f" bias {100 * group.errors.bias:+.1f}", soft_wrap=True)


def as_json(result: Calibration) -> dict[str, Any]:
    """Everything but the rows. Numbers that are not finite (errors of parameters at a bound) are null."""
    def errors(x: Errors | None):
        return None if x is None else x._asdict()

    def family(one: Calibrated) -> dict[str, Any]:
        fit, values = one.fit, written(one.fit)
        return {
            "rows": one.rows, "rows_used": len(one.observations), "folds": one.folds, "before": errors(one.before),
            "after": errors(one.after), "held_out": errors(one.held_out), "taken": not one.refused,
            "refused": one.refused or None, "converged": fit.converged, "condition": plain(fit.condition),
            "parameters": {name: {
                "present": one.present[name], "value": values[name], "log_error": plain(fit.errors[name]),
                "log_error_by_data": plain(fit.data_errors[name]), "bounds": fit.limits[name],
                "at_bound": fit.bounds.get(name), "determined": name not in fit.undetermined} for name in values},
            "correlated": fit.correlated, "told": fit.sentences(), "left_out": dict(one.observations.left_out),
            "shapes": [{"shape": g.shape, "rows": g.rows, **g.errors._asdict()} for g in one.groups],
            "seconds": round(one.seconds, 2)}

    return {"format": FORMAT, "device": result.device.name, "calibration": result.device.calibration,
            "sha256": result.digests, "families": {one.family: family(one) for one in result.families},
            "not_measured": {name: _kept(result, name) for name in result.not_measured}, "notes": list(result.notes)}


def efficiency_toml(result: Calibration) -> str:
    """The record as `scenarios/devices/efficiency/*.toml` holds one; `Efficiency.from_dict` reads it."""
    head = [f"# Constants of the forms of jaxsim.cost for {result.device.full_name or result.device.name}; fields:"
            " jaxsim.spec.efficiency. Fitted by",
            "# `jaxsim calibrate` (bounded least squares on log error; a share of 1.0 sits at its bound) to:"]
    head += [f"#   {name}  sha256 {digest}" for name, digest in result.digests.items()]
    if result.not_measured:
        head.append(f"# Not from these tables: {', '.join(result.not_measured)}.")
    return "\n".join(head) + "\n\n" + dump_toml(_plain(result.record))


def device_toml(result: Calibration) -> str:
    """The device with these constants, as the `device` of a scenario: paste it there, or give it as --device."""
    numbers = _plain(msgspec.structs.replace(result.device, efficiency=result.record))
    name = numbers.pop("name")
    for key in ("aliases", "calibration", "calibration_note"):
        numbers.pop(key, None)
    return dump_toml({"device": {"name": f"{name}-calibrated", "numbers": numbers}})


def _plain(value: Any) -> Any:
    """Structs as dictionaries without the fields that hold their defaults."""
    if isinstance(value, msgspec.Struct):
        fields = msgspec.structs.fields(value)
        return {f.name: _plain(getattr(value, f.name)) for f in fields if getattr(value, f.name) != f.default}
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, tuple) else value


def read_device(text: dict[str, Any], where: str) -> DeviceSpec:
    """The device of a scenario file or of a written `device.toml`. Raises `InputError`."""
    table = text.get("device")
    if not isinstance(table, dict) or "name" not in table or "numbers" not in table:
        raise InputError(where, sorted(text), "has no [device] with name and numbers",
                         "write a [device.numbers] table, or give a name of `jaxsim list devices`")
    return DeviceSpec.from_dict({"name": table["name"], **table["numbers"]}, "device.numbers")


def plot_family(one: Calibrated, path: str | Path) -> Path:
    """Measured against predicted, and the error over the size of the call."""
    path, o = Path(path), one.observations
    some = np.unique(np.linspace(0, len(o) - 1, MOST_POINTS).astype(int))
    measured, predicted, sizes = o.seconds[some], one.predicted_s[some], o.sizes[some]
    with drawn(path, figsize=(10, 4.4)) as figure:
        left, right = figure.subplots(1, 2)
        left.plot(measured * 1e6, predicted * 1e6, ".", color=LINE, markersize=3, alpha=0.4, rasterized=True)
        ends = np.array([measured.min() / 1.3, measured.max() * 1.3]) * 1e6
        left.plot(ends, ends, color=FAINT, linewidth=1)
        left.fill_between(ends, ends / 1.1, ends * 1.1, color=LIMIT, alpha=0.12, linewidth=0)
        left.set(xscale="log", yscale="log", xlim=ends, ylim=ends, xlabel="measured, microseconds",
                 ylabel="predicted, microseconds", title="Predicted against measured")
        outside = (predicted * 1e6 < ends[0]) | (predicted * 1e6 > ends[1])
        count_outside(left, int(outside.sum()))
        for axis in (left.xaxis, left.yaxis):
            plain_logarithms(axis, *ends)
        errors = 100 * (predicted / measured - 1)
        right.plot(sizes, errors, ".", color=LINE, markersize=3, alpha=0.4, rasterized=True)
        right.axhspan(-10, 10, color=LIMIT, alpha=0.12, linewidth=0)
        right.axhline(0, color=FAINT, linewidth=1)
        if sizes.max() > 8 * max(sizes.min(), 1e-12):
            right.set_xscale("log", base=2)
            # A few powers of two, in binary thousands.
            first, last = math.floor(math.log2(max(sizes.min(), 1))), math.ceil(math.log2(sizes.max()))
            ticks = 2.0 ** np.arange(first, last + 1, max(-(-(last - first) // 8), 1))
            right.set_xticks(ticks, [binary(tick) for tick in ticks])
        count_outside(right, int((np.abs(errors - 25) > 125).sum()))
        right.set(ylim=(-100, 150), xlabel=_SIZES.get(one.observations.kind, "size"),
                  ylabel="error, %", title="Error by size")
        what = "the present constants, kept" if one.refused else "fitted"
        heading(figure, f"{one.family}, {len(o):,} rows, {what}: {pair(one.before if one.refused else one.after)} %,"
                        f" held out by shape {pair(one.held_out)} %; band: 10 %")
    return path


def binary(size: float) -> str:
    """A power of two, large ones as multiples of 1,024 (Ki), 1,024^2 (Mi) and so on."""
    for unit in ("", " Ki", " Mi", " Gi"):
        if size < 1024 or unit == " Gi":
            break
        size /= 1024
    return f"{size:g}{unit}"


_SIZES = {"gemm": "rows m", "experts": "tokens", "decode": "sequences", "prefill": "prompt tokens",
          "latent": "sequences", "elementwise": "bytes", "nccl": "message bytes", "custom_all_reduce": "message bytes"}


def write(result: Calibration, folder: Path, console: Console, *, plots: bool = True) -> list[Path]:
    """All files into a folder; report.txt is as wide as `console`."""
    texts = {"efficiency.toml": efficiency_toml(result), "device.toml": device_toml(result),
             "report.json": to_json(as_json(result))}
    paths = []
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
        paths.append(folder / name)
    with open(folder / "report.txt", "w", encoding="utf-8") as file:
        print_report(result, Console(file=file, highlight=False, markup=False, width=console.width))
    paths.append(folder / "report.txt")
    for one in result.families:
        # Of a former calibration.
        (folder / f"{one.family}.png").unlink(missing_ok=True)
    if plots:
        paths += [plot_family(one, folder / f"{one.family}.png") for one in result.families]
    return paths


# ---- of end-to-end runs


_LATENCIES = ("TTFT", "TPOT", "e2e")


def runs_json(found: EngineFit) -> dict[str, Any]:
    """Values, their errors, and the signed errors of every run."""
    fit = found.fit

    def known(values):
        return {name: plain(float(x)) for name, x in values}

    return {
        "format": FORMAT, "values": dict(fit.values), "log_errors": known(fit.errors.items()),
        "data_log_errors": known(fit.data_errors.items()), "converged": fit.converged,
        "undetermined": list(fit.undetermined), "notes": fit.sentences(),
        "present": {name: list(values) for name, values in found.present.items()}, "overrides": found.overrides(),
        "runs": [{"measured": run.path, **{
            name: known(zip(_LATENCIES, part[i], strict=True)) for name, part in (
                ("before", found.before), ("after", found.after), ("held_out", found.held_out))}}
            for i, run in enumerate(found.data.runs)]}


def write_runs(found: EngineFit, folder: Path) -> list[Path]:
    """`overrides.toml`, fields of a scenario, and `report.json`."""
    tree: dict[str, Any] = {}
    for dotted, value in found.overrides().items():
        *parents, last = dotted.split(".")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = value
    left = "".join(f"# {name} is not determined by these runs and stays as each scenario has it:"
                   f" {_own(found.present[name])}\n" for name in found.fit.undetermined)
    paths = [folder / "overrides.toml", folder / "report.json"]
    paths[0].write_text(left + dump_toml(tree), encoding="utf-8")
    paths[1].write_text(to_json(runs_json(found)), encoding="utf-8")
    return paths


def print_runs(found: EngineFit, console: Console) -> None:
    """Errors run by run, the values, and what is not identified."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("simulated / measured - 1 in %: TTFT, TPOT, e2e")
    for name in ("before", "fitted", "left out"):
        table.add_column(name, justify="right")

    def cell(errors):
        return "-" if np.isnan(errors).all() else ", ".join(f"{100 * e:+.1f}" for e in errors)

    for run, *parts in zip(found.data.runs, found.before, found.after, found.held_out, strict=True):
        table.add_row(Path(run.path).name, *map(cell, parts))
    console.print(table)
    written = found.overrides()
    for name in found.fit.values:
        own, error = _own(found.present[name]), found.fit.data_errors[name]
        spread = " (at its bound)" if math.isnan(error) else f" ± {100 * error:.0f} %"
        console.print(f"{name} = {written[name]:.4g}{spread}, was {own}" if name in written else
                      f"{name}: not determined, stays {own}")
    for text in found.fit.sentences():
        console.print(text, soft_wrap=True)


def _own(values: Sequence[float]) -> str:
    return ", ".join(dict.fromkeys(f"{value:.4g}" for value in values))
