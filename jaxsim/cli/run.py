"""`jaxsim run`: simulate a scenario, print its table, write its files."""

import argparse
import os
import re
import sys
import time
import warnings
from pathlib import Path
from typing import Any

from jaxsim.cli.process import STOPPED, fail, find_devices, folder_for, keep_programs, say

FILES = ("summary.json", "requests.parquet", "timeline.json", "latency.png", "load.png", "requests.png")


def add_parser(commands: "argparse._SubParsersAction") -> None:
    """The command among the others."""
    run = commands.add_parser(
        "run", help="simulate a scenario, print its table, write its files",
        description="Simulate a scenario over several seeds; print a table and write summary.json,"
                    " requests.parquet and plots.",
        epilog="exit status: 0 done, 2 an input that cannot be used or a place that cannot be written to, 3 a bound"
               " stopped the simulation, 130 interrupted")
    run.add_argument("scenario", nargs="?", metavar="SCENARIO",
                     help="a scenario file, or a name of `jaxsim list scenarios` (default: default)")
    run.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", dest="values",
                     help="replace a field, e.g. --set engine.max_num_seqs=64 (repeatable; an empty value is"
                          " the default)")
    run.add_argument("--trace", metavar="FILE", help="replay this trace instead of the scenario's workload")
    run.add_argument("--seeds", type=int, metavar="N", help="independent runs (default: the scenario's, 8)")
    run.add_argument("--out", metavar="DIR", help="folder for the files (default: results/NAME)")
    run.add_argument("--no-plots", action="store_true", help="do not draw the plots")
    run.add_argument("--timeline", action="store_true", help="also write timeline.json for ui.perfetto.dev")
    run.add_argument("--json", action="store_true",
                     help="print summary.json and nothing else on standard output")
    run.add_argument("--from-vllm", metavar="COMMAND",
                     help="take model and engine from a `vllm serve ...` line, the rest from the scenario")
    run.set_defaults(command=_run)


def assignments(items: list[str]) -> dict[str, Any]:
    """Fields and values of --set."""
    from jaxsim._core.errors import InputError
    from jaxsim.spec.toml import parse_value

    values: dict[str, Any] = {}
    for item in items:
        field, equals, text = item.partition("=")
        if not equals or not field.strip():
            raise InputError("--set", item, "is not FIELD=VALUE", "write e.g. --set engine.max_num_seqs=64")
        values[field.strip()] = parse_value(text.strip()) if text.strip() else None
    return values


def _chosen(options: argparse.Namespace) -> Any:
    """The scenario with everything the command line says about it."""
    from jaxsim.spec.scenario import Scenario

    scenario = Scenario.from_toml("default" if options.scenario is None else options.scenario)
    if options.from_vllm is not None:
        scenario = _from_vllm(scenario, options.from_vllm)
    if options.trace is not None:
        tree = scenario.to_dict()
        kept = {k: v for k, v in tree["workload"].items() if k in ("seed", "tenants")}
        tree["workload"] = {"kind": "trace", "trace": options.trace, **kept}
        tree["name"] = Path(options.trace).name.partition(".")[0]
        tree["description"] = f"replay of {options.trace}"
        # A replay is the same in every run, unless something is drawn on top of it.
        tree["num_seeds"] = 1
        scenario = Scenario.from_dict(tree)
    values = assignments(options.values)
    if options.seeds is not None:
        values["num_seeds"] = options.seeds
    return scenario.with_values(values) if values else scenario


def _from_vllm(scenario: Any, line: str) -> Any:
    """The scenario with model and engine of a `vllm serve` line."""
    from jaxsim.spec.scenario import FittedCost, Scenario
    from jaxsim.spec.vllm import import_vllm

    tree = scenario.to_dict()
    base = {k: v for k, v in tree.items() if k not in ("model", "device", "engine", "name", "description")}
    if isinstance(scenario.cost, FittedCost):
        warnings.warn("the fitted coefficients of the scenario are of another model: the roofline is used instead",
                      stacklevel=2)
        del base["cost"]
    if scenario.device is None:
        warnings.warn("the scenario names no device: h100 is used (--set device.name=...)", stacklevel=2)
    preset = scenario.engine.preset
    imported = import_vllm(line, device=scenario.device.name if scenario.device else "h100",
                           base={"name": "from-vllm", **base},
                           preset=preset if preset.startswith("vllm") else "vllm-v1").to_dict()
    return Scenario.from_dict({**imported, "device": tree.get("device", imported["device"])})


def _run(options: argparse.Namespace) -> int:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        scenario = _chosen(options)
    for warning in caught:
        say(f"jaxsim: note: {warning.message}")
    # A name is a label and may hold anything; its folder stays inside results.
    label = "-".join(re.findall(r"[\w.-]*\w", scenario.name)) or "scenario"
    folder = folder_for(f"results/{label}" if options.out is None else options.out, FILES)

    # Only now: what is wrong with the scenario is told before JAX is loaded.
    keep_programs()
    find_devices()
    from jaxsim.engine.simulate import simulate
    from jaxsim.io import result as files

    start = time.perf_counter()
    result = simulate([scenario], record_steps=True)
    elapsed_s = time.perf_counter() - start
    try:
        files.clear(folder)
        written = [files.write_summary(result, folder / "summary.json"),
                   files.write_requests(result, folder / "requests.parquet")]
        if options.timeline:
            from jaxsim.io.timeline import write_timeline

            written.append(write_timeline(result.lanes[0][0], folder / "timeline.json"))
        if not options.no_plots:
            from jaxsim.io.plots import plot_all

            written += plot_all(result, folder)
    except OSError as error:
        return fail(f"{error.filename or folder}: cannot be written ({error.strerror or error}); make room, or give"
                     " another folder with --out")
    if options.json:
        sys.stdout.write(files.to_json(files.summary(result)))
    else:
        from jaxsim.io.table import print_summary

        print_summary(result)
        total = sum(lane.num_requests for lane in result.lanes[0])
        print(f"\n{total:,} requests simulated in {elapsed_s:.1f} s, compilation included\n{folder}{os.sep}: "
              + ", ".join(path.name for path in written))
    if result.faults:
        say(f"jaxsim: stopped before the end: {'; '.join(result.faults)}")
        return STOPPED
    return 0
