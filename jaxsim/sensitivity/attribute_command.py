"""What `jaxsim sensitivity` does with --attribute and --critical-path.

Imports are inside the functions, so that the command line answers --help without loading JAX.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FILES = ("attribution.png", "critical-path.png")

_TOP = 12


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options, among those of the command."""
    group = parser.add_argument_group(
        "attribution", "instead of derivatives by chosen numbers: what times are made of, at the schedule as it was")
    group.add_argument("--attribute", action="store_true",
                       help="what metrics are made of: by resource, and the parameters of the cost model that matter"
                            " most")
    group.add_argument("--critical-path", action="store_true",
                       help="where the time of a request went: waiting, queueing, its prompt, its decodes, each by"
                            " resource")
    group.add_argument("--request", type=int, metavar="N",
                       help="the request of the critical path, by number, in the first run (default: the 99th"
                            " percentile)")
    group.add_argument("--percentile", type=float, metavar="P",
                       help="the request at a percentile of --latency; -1 is the mean of all")
    group.add_argument("--latency", choices=("ttft", "e2e"),
                       help="time of the critical path: to the first token or to the last (default: ttft)")


def is_asked(options: argparse.Namespace) -> bool:
    """Whether the command is this one."""
    return options.attribute or options.critical_path


def listed(text: str | None, option: str) -> list[str] | None:
    """Names with commas between. Raises `InputError`."""
    from jaxsim._core.errors import InputError

    if text is None:
        return None
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise InputError(option, text, "has an empty name", "put one comma between two names")
    return names


def check_alone(options: argparse.Namespace) -> None:
    """Refuse what says which critical path where none is asked for. Raises `InputError`."""
    _refuse(options, ("request", "percentile", "latency"), "is of --critical-path, which is not asked for",
            "add --critical-path, or leave it out")


def _refuse(options: argparse.Namespace, names: Sequence[str], problem: str, remedy: str) -> None:
    from jaxsim._core.errors import InputError

    for name in names:
        value = getattr(options, name, None)
        if value is not None and value is not False:
            raise InputError(f"--{name.replace('_', '-')}", value, problem, remedy)


def run(options: argparse.Namespace, scenario: Any, folder: Path | None) -> None:
    """Print what was asked for of a scenario, and draw it into a folder unless that is None. Raises `InputError`."""
    from jaxsim._core.errors import InputError
    from jaxsim.sensitivity.recorded import record
    from jaxsim.spec.scenario import Scenario

    if not isinstance(scenario, Scenario):
        option = "--attribute" if options.attribute else "--critical-path"
        raise InputError(option, getattr(scenario, "name", None), "is of one scenario, not of a study",
                         "give a scenario, or ask for direct derivatives over the study")
    _check(options)
    found = {}
    if getattr(options, "no_plots", False):
        folder = None
    # A critical path is of the first run.
    (runs,) = record([scenario if options.attribute else scenario.with_values({"num_seeds": 1})])
    if options.attribute:
        found |= _attribute(options, scenario, runs, folder)
    if options.critical_path:
        found |= _critical_path(options, scenario, runs[0], folder)
    if options.json:
        print(json.dumps(found, indent=2))


def _check(options: argparse.Namespace) -> None:
    from jaxsim._core.errors import InputError

    mine = "--attribute" if options.attribute else "--critical-path"
    _refuse(options, ("wrt", "seeds", "step", "no_direct", "workers"), f"has no effect with {mine}",
            "leave it out; --set num_seeds=N sets the number of runs")
    if not options.critical_path:
        check_alone(options)
    if not options.attribute:
        _refuse(options, ("of",), "has no effect with --critical-path alone", "add --attribute, or leave it out")
    if options.request is not None and options.percentile is not None:
        raise InputError("--request", options.request, "cannot be given with --percentile", "give one of them")
    percentile = options.percentile
    if percentile is not None and not (percentile == -1 or 0 <= percentile <= 100):
        raise InputError("--percentile", percentile, "is not between 0 and 100", "give e.g. 99, or -1 for the mean")


def _attribute(options: argparse.Namespace, scenario: Any, runs: list[Any], folder: Path | None) -> dict[str, Any]:
    from jaxsim.io.listing import print_groups
    from jaxsim.sensitivity.attribution import of_runs
    from jaxsim.sensitivity.critical_path_plot import plot_attribution

    metrics = listed(getattr(options, "of", None), "--of")
    found = of_runs(scenario, runs, metrics)
    title = f"{scenario.name or 'scenario'}: what its metrics are made of, at the schedule as it was"
    if folder is not None:
        plot_attribution(found, folder / FILES[0], title)
    shares = found.by_resource
    if not options.json:
        rows = [{"metric": name, "value": round(float(found.value[name]), 3),
                 **{resource: _percent(x) for resource, x in shares.loc[name].items() if shares[resource].any()},
                 "all": _percent(shares.loc[name].sum())} for name in shares.index]
        leading = shares.index[0]
        first = found.by_parameter.abs().max().sort_values(ascending=False).index[:_TOP]
        parameters = [{"parameter": name, **{metric: _percent(found.by_parameter.loc[metric, name])
                                             for metric in shares.index[:5]}} for name in first]
        print_groups({title: rows, "percent for 100 percent of a parameter": parameters})
        sys.stdout.write(f"\n{_limit(shares.loc[leading], leading)}\n")
    return {"attribution": {name: {
        "value": float(found.value[name]), "by_resource": {k: float(v) for k, v in shares.loc[name].items()},
        "by_parameter": {k: float(v) for k, v in found.by_parameter.loc[name].items() if v}} for name in shares.index}}


def _percent(share: float) -> str:
    # Without the sign of what rounds to nothing.
    return f"{round(100 * float(share), 1) + 0.0:.1f}"


def _limit(shares: Any, metric: str) -> str:
    name = shares.idxmax()
    return (f"{metric}: {100 * shares[name]:.0f} % of it is {name}: to first order, 10 % less of that is"
            f" {10 * shares[name]:.1f} % less of it, at this schedule")


def _critical_path(options: argparse.Namespace, scenario: Any, run: Any, folder: Path | None) -> dict[str, Any]:
    import pandas as pd

    from jaxsim._core.errors import InputError
    from jaxsim.io.listing import print_groups
    from jaxsim.sensitivity.critical_path import critical_paths
    from jaxsim.sensitivity.critical_path_plot import LEAST_SHARE, plot_path

    paths, latency = critical_paths(scenario, run), options.latency or "ttft"
    if options.request is not None and not 0 <= options.request < run.result.num_requests:
        raise InputError("--request", options.request, f"is none of {run.result.num_requests:,}", "count from 0")
    request, who = options.request, "mean of all requests"
    if request is None and options.percentile != -1:
        percentile = 99.0 if options.percentile is None else options.percentile
        request = paths.at(percentile, latency)
        who = f"request {request:,}, at percentile {percentile:g} of {latency}"
    elif request is not None:
        who = f"request {request:,}"
    table = paths.table(latency, None if request is None else [request])
    total = float(table.to_numpy().sum())
    title = f"{scenario.name or 'scenario'}: {who}, {1e3 * total:,.1f} ms"
    if folder is not None:
        plot_path(table, folder / FILES[1], title)
    stall_s = 0.0 if request is None else float(paths.stall_s[request])
    if not options.json:
        whole = pd.concat([table, table.sum().rename("all").to_frame().T])
        kept = [name for name in whole if abs(whole[name]).max() > LEAST_SHARE * total]
        print_groups({f"{title}; percent of it by resource": [
            {"part": part, "ms": round(1e3 * float(row.sum()), 2), "%": _percent(row.sum() / total),
             **{name: _percent(row[name] / total) for name in kept}}
            for part, row in whole.iterrows() if abs(row).sum() > LEAST_SHARE * total]})
        if stall_s > 0:
            sys.stdout.write(f"\npreempted: {1e3 * stall_s:,.1f} ms of this it waited again, among its own prompt and"
                             " decodes\n")
    return {"critical_path": {"request": request, "latency": latency, "seconds": total, "stall_s": stall_s,
                              "parts": {part: {k: float(v) for k, v in row.items()}
                                        for part, row in table.iterrows()}}}
