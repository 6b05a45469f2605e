"""`jaxsim sensitivity`: what limits a deployment, and how much each unit is worth.

Imports are inside the functions, so that the command line answers --help without loading JAX.
"""

import argparse
import re
import sys
from pathlib import Path
from typing import Any

from jaxsim.sensitivity.attribute_command import add_arguments, check_alone, listed

FILES = ("sensitivity.json", "sensitivity.csv", "tornado.png", "heat_map.png")


def add_parser(commands: "argparse._SubParsersAction") -> argparse.ArgumentParser:
    """The command among the others."""
    parser = commands.add_parser(
        "sensitivity", help="what limits it, and what each unit is worth: derivatives of any metric by any number",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Print elasticities, per cent of a metric for one per cent of a number, of a scenario or of every\n"
                    "one of a study: `total`, central differences under common random numbers with a 95 % interval\n"
                    "over seeds, all in one batch; and `direct`, with the schedule held fixed. Writes a tornado plot,\n"
                    "of a study a heat map (docs/sensitivity.md).",
        epilog="example: jaxsim sensitivity default --wrt workload.rate_rps,'cost.overrides.*' --of p99_ttft_ms\n"
               "exit status: 0 done, 2 an input that cannot be used or a place that cannot be written to")
    parser.add_argument("scenario", nargs="?", metavar="SCENARIO",
                        help="a scenario or study: a file or a shipped name (default: default)")
    parser.add_argument("--wrt", metavar="FIELDS",
                        help="numbers by dotted names, with commas, or patterns of names (default: all that have an"
                             " effect)")
    parser.add_argument("--of", metavar="METRICS",
                        help="columns of a study's table, with commas (default: tail and mean of TTFT, mean TPOT,"
                             " goodput and energy where there are any)")
    parser.add_argument("--seeds", type=int, metavar="N", help="independent runs (default: the scenario's, at least 8)")
    parser.add_argument("--step", type=float, metavar="SHARE",
                        help="of every number, each way (default: 0.03 for means, 0.1 for percentiles and attainment)")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", dest="values",
                        help="replace a field of the scenario (repeatable)")
    parser.add_argument("--no-direct", action="store_true", help="leave `direct` out, which records schedules")
    parser.add_argument("--no-plots", action="store_true", help="do not draw the plot")
    parser.add_argument("--workers", type=int, metavar="N", help="threads (default: processors)")
    parser.add_argument("--out", metavar="DIR", help="folder for the files (default: results/sensitivity-NAME)")
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else on standard output")
    add_arguments(parser)
    return parser


def system(options: argparse.Namespace, values: dict[str, Any]) -> Any:
    """The scenario or study of the command line. Raises `InputError`."""
    from jaxsim.study.command import scenario_or_study

    return scenario_or_study("default" if options.scenario is None else options.scenario, values)


def folder_of(options: argparse.Namespace) -> str:
    """Where the files go."""
    if options.out is not None:
        return options.out
    label = "-".join(re.findall(r"[\w.-]*\w", Path(options.scenario or "default").stem)) or "scenario"
    return f"results/sensitivity-{label}"


def run(options: argparse.Namespace, given: Any, folder: Path) -> None:
    """Run the command; `given`: of `system`. Raises `InputError`."""
    from jaxsim._core.errors import InputError
    from jaxsim.sensitivity.total import sensitivity
    from jaxsim.study.command import check_workers

    check_workers(options.workers)
    check_alone(options)
    try:
        found = sensitivity(given, listed(options.wrt, "--wrt") or "all", listed(options.of, "--of"),
                            num_seeds=options.seeds, steps=options.step, direct=not options.no_direct,
                            workers=options.workers, progress=_told)
    except InputError as error:
        names = {"wrt": "--wrt", "of": "--of", "num_seeds": "--seeds", "steps": "--step"}
        raise InputError(names.get(error.field, error.field), error.value, error.problem, error.remedy) from None
    text = found.to_json()
    (folder / FILES[0]).write_text(text, encoding="utf-8")
    found.to_frame().to_csv(folder / FILES[1], index=False)
    # Before anything is drawn: what was computed is not to be lost.
    if options.json:
        sys.stdout.write(text)
    else:
        from jaxsim.sensitivity.table import print_table

        print_table(found)
    sys.stdout.flush()
    written = list(FILES[:2])
    if not options.no_plots:
        try:
            written.append(_draw(found, folder))
        except InputError as error:
            print(f"jaxsim: no plot: {error}", file=sys.stderr)
    if not options.json:
        print(f"{folder}/: " + ", ".join(written))


def _draw(found: Any, folder: Path) -> str:
    """The name of the file. Raises `InputError` where there is nothing to draw."""
    if len(found.scenarios) > 1:
        from jaxsim.sensitivity.heat_map import heat_map

        heat_map(found, out=folder / FILES[3])
        return FILES[3]
    from jaxsim.sensitivity.tornado import tornado

    tornado(found, out=folder / FILES[2])
    return FILES[2]


def _told(what: str, done: int, total: int) -> None:
    if total and done == 0:
        print(f"jaxsim: {what}, {total:,} runs", file=sys.stderr)
