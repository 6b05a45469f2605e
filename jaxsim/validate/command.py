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


def run(options: argparse.Namespace, scenario: Any, folder: Path) -> bool:
    """Compare, print, and write files into `folder`; whether a bound stopped the simulation. Raises `InputError`."""
    from jaxsim.io.result import to_json
    from jaxsim.validate import plots, points, replay, show

    if options.points:
        found = points.simulate_points(options.points, scenario)
        content, frame, is_stopped = show.points_json(found), found.frame, False
    else:
        found = replay.replay(scenario, options.measured, skip=options.skip)
        content, frame, is_stopped = show.as_json(found), found.requests, bool(found.lane.fault)
    (folder / "validation.json").write_text(to_json(content), encoding="utf-8")
    frame.to_csv(folder / "validation.csv", index=False)
    if not options.no_plots:
        (plots.plot_points if options.points else plots.plot_comparison)(found, folder / "validation.png")
    if options.json:
        sys.stdout.write(to_json(content))
    elif options.points:
        show.print_points(found)
    else:
        show.print_comparison(found)
    return is_stopped
