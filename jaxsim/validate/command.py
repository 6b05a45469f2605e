"""`jaxsim validate`: measured runs beside simulated ones.

Imports are inside the functions, so that the command line answers --help without loading JAX.
"""

import argparse
import sys
from pathlib import Path
from typing import Any


def add_parser(commands: "argparse._SubParsersAction") -> argparse.ArgumentParser:
    """The command among the others."""
    check = commands.add_parser(
        "validate", help="replay a measured run, or fixed-concurrency points, and show the errors",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Simulate what was measured and report signed errors, simulated over measured less 1.\n\n"
                    "  --measured FILE  one request a row: arrival_s, input_tokens, output_tokens, ttft_s, e2e_s;\n"
                    "                   optional prefix_block_ids (of the prompt's blocks, separated by spaces)\n"
                    "  --points FILE    one operating point a row: model, device, tensor_parallel_size,\n"
                    "                   data_parallel_size, expert_parallel_size, isl, osl, concurrency, ttft_ms,\n"
                    "                   tpot_ms; optional preset, dtype, kv_dtype, range_ratio",
        epilog="The scenario gives model, device, engine and cost; its workload is not used (it may be left out).\n"
               "exit status: 0 done, 2 an input that cannot be used, 3 a bound stopped the simulation")
    check.add_argument("--scenario", metavar="FILE", help="the system; optional with --points")
    what = check.add_mutually_exclusive_group(required=True)
    what.add_argument("--measured", metavar="FILE", help="a run, request by request (CSV or Parquet)")
    what.add_argument("--points", metavar="FILE", help="operating points at fixed concurrency (CSV or Parquet)")
    check.add_argument("--skip", type=int, default=0, metavar="N",
                       help="leave the first N requests out of the comparison (warm-up), not out of the replay")
    check.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", dest="values",
                       help="replace a field of the scenario (repeatable)")
    check.add_argument("--out", metavar="DIR", help="folder for the files (default: results/validate-NAME)")
    check.add_argument("--no-plots", action="store_true", help="do not draw the plots")
    check.add_argument("--json", action="store_true", help="print JSON and nothing else on standard output")
    return check


FILES = ("validation.json", "validation.csv", "validation.png")
"""What a comparison writes."""

PLACEHOLDERS = {"model": {"name": "llama-3.1-8b"}, "device": {"name": "h100"}}
"""Of a scenario for points, which name both themselves."""


def read_system(path: str, *, is_for_points: bool = False) -> Any:
    """The scenario of a file, without its workload and what belongs to it. Raises `InputError`."""
    from jaxsim.spec.scenario import Scenario, read_tree

    tree = {k: v for k, v in read_tree(path).items() if k not in ("workload", "warmup_s", "num_seeds")}
    cost = tree.get("cost")
    if is_for_points and not (isinstance(cost, dict) and cost.get("kind") == "fitted"):
        for name, value in PLACEHOLDERS.items():
            given = tree.setdefault(name, {})
            if isinstance(given, dict) and not {"name", "config"} & set(given):
                given.update(value)
    return Scenario.from_dict({"workload": {"kind": "batch"}} | tree)


def system(options: argparse.Namespace) -> Any:
    """The scenario of a comparison; None without one. Raises `InputError`."""
    from jaxsim._core.errors import InputError

    if options.points and options.skip:
        raise InputError("--skip", options.skip, "has no effect with --points", "leave it out")
    if options.measured and not options.scenario:
        raise InputError("--scenario", None, "missing, and --measured needs it", "give the system that was measured")
    if not options.scenario:
        if options.values:
            raise InputError("--set", options.values[0], "has no scenario to change", "give one with --scenario")
        return None
    return read_system(options.scenario, is_for_points=bool(options.points))


def run(options: argparse.Namespace, scenario: Any, folder: Path) -> bool:
    """Compare, print, and write files into `folder`; whether a bound stopped the simulation. Raises `InputError`."""
    from jaxsim.io.result import to_json
    from jaxsim.validate import plots, points, replay, show

    if options.points:
        found = points.simulate_points(options.points, scenario)
        content, frame, is_stopped = show.points_json(found), found.frame, found.num_stopped > 0
        is_shown = found.frame[["simulated_ttft_ms", "simulated_tpot_ms"]].notna().any(axis=None)
    else:
        found = replay.replay(scenario, options.measured, skip=options.skip)
        content, frame, is_stopped = show.as_json(found), found.requests, bool(found.lane.fault)
        is_shown = bool(found.metrics)
    text, (as_json, as_csv, as_plot) = to_json(content), (folder / name for name in FILES)
    # Of a former comparison.
    as_plot.unlink(missing_ok=True)
    as_json.write_text(text, encoding="utf-8")
    if options.points:
        frame.to_csv(as_csv, index_label="row")
    else:
        frame.to_csv(as_csv, index=False)
    if is_shown and not options.no_plots:
        (plots.plot_points if options.points else plots.plot_comparison)(found, as_plot)
    if options.json:
        sys.stdout.write(text)
    elif options.points:
        show.print_points(found)
    else:
        show.print_comparison(found)
    return is_stopped
