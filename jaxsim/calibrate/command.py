"""`jaxsim calibrate`: constants of a device's kernels from operator tables.

Imports are inside the functions, so that the command line answers --help without loading JAX.
"""

import argparse
import os
import sys
from pathlib import Path

_NAME = "calibrate"


def add_parser(commands: "argparse._SubParsersAction") -> argparse.ArgumentParser:
    """The command among the others; its `command` is `run`."""
    parser = commands.add_parser(
        _NAME, help="fit a device's kernel constants to measured operator times",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Fit the roofline's constants of a device to operator tables: bounded least squares on log error,\n"
                    "held out by shape. Writes efficiency.toml, device.toml (a scenario's [device]), report.txt,\n"
                    "report.json and plots.\n\n"
                    "Formats, and the tables they hold (names of files tell which, or write ROLE=FILE):\n"
                    "  aiconfigurator   gemm, context_attention, generation_attention, moe, custom_allreduce, nccl,\n"
                    "                   mla_context, mla_generation\n"
                    "  profile          files of `jaxsim import-profile`, of any models\n"
                    "  llmservingsim, plain, vidur   layers of one model, with --model",
        epilog="example: jaxsim calibrate --device h100 --format aiconfigurator gemm.parquet moe.parquet --output cal\n"
               "exit status: 0 done, 2 an input that cannot be used or a place that cannot be written to")
    parser.add_argument("files", nargs="*", metavar="FILE", help="a table, or ROLE=FILE")
    parser.add_argument("--device", metavar="D",
                        help="a name of `jaxsim list devices`, or a TOML file with [device] name and [device.numbers]")
    parser.add_argument("--format", metavar="F",
                        help="aiconfigurator, profile, llmservingsim, plain or vidur")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder for the files")
    parser.add_argument("--model", metavar="M", help="model of a profile of layers: a name of `jaxsim list models`")
    parser.add_argument("--tensor-parallel-size", type=int, default=1, metavar="N",
                        help="degree of a profile of layers (default: 1)")
    parser.add_argument("--sample", type=int, default=4000, metavar="N",
                        help="rows of a family that are used, drawn at random (default: 4000)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the sample and the folds (default: 0)")
    parser.add_argument("--folds", type=int, default=5, metavar="K",
                        help="parts of the shapes, each held out once (default: 5)")
    parser.add_argument("--run", nargs=2, action="append", default=[], metavar=("SCENARIO", "MEASURED"), dest="runs",
                        help="instead of tables: a run as `jaxsim validate` takes it (repeatable)")
    parser.add_argument("--fit", action="append", default=[], metavar="FIELD",
                        help="with --run: what to fit (repeatable; default: cost.front_end_s and, for runs with"
                             " asynchronous scheduling, cost.overrides.async_step_s, for others"
                             " cost.overrides.host_step_s)")
    parser.add_argument("--skip", type=int, default=0, metavar="N",
                        help="with --run: the first N requests of each are replayed and not compared")
    parser.add_argument("--no-plots", action="store_true", help="do not draw the plots")
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else on standard output")
    parser.set_defaults(command=run)
    return parser


def run(options: argparse.Namespace) -> int:
    """Runs the command; returns the exit status. Raises `InputError`."""
    from jaxsim._core.errors import InputError

    for name, least in (("sample", 50), ("folds", 2), ("seed", 0), ("tensor_parallel_size", 1)):
        if getattr(options, name) < least:
            raise InputError(f"--{name.replace('_', '-')}", getattr(options, name), "is too small",
                             f"give {least} or more")
    _check_kind(options)
    folder = _checked_folder(options.output)
    if options.runs:
        return _run_of_runs(options, folder)

    from jaxsim.calibrate import fit, report, tables
    from jaxsim.io.result import to_json
    from jaxsim.io.table import console, printed
    from jaxsim.spec.plan import Plan

    device = _device(options.device)
    told = console(sys.stderr)
    read = tables.read(options.format, options.files, device, model=options.model,
                       plan=Plan(tensor_parallel_size=options.tensor_parallel_size))
    result = fit.calibrate(read.observations, device, digests=dict(read.digests), notes=read.notes,
                           sample=options.sample, seed=options.seed, folds=options.folds,
                           progress=lambda one: told.print(report.line(one), soft_wrap=True))
    if all(one.refused for one in result.families):
        why = "; ".join([f"{one.family}: {one.refused}" for one in result.families] + list(result.notes))
        raise InputError("calibration tables", options.files, f"no family was fitted ({why})",
                         "give more rows, or look at what was timed")
    folder.mkdir(parents=True, exist_ok=True)
    written = report.write(result, folder, console(), plots=not options.no_plots)
    if options.json:
        sys.stdout.write(to_json(report.as_json(result)))
    else:
        printed(lambda out: report.print_report(result, out))
        print(f"\n{folder}{os.sep}: {', '.join(path.name for path in written)}")
    return 0


def _check_kind(options: argparse.Namespace) -> None:
    from jaxsim._core.errors import InputError

    tables = {"FILE": options.files, "--device": options.device, "--format": options.format}
    if options.runs:
        for name, value in tables.items():
            if value:
                raise InputError(name, value, "does not go with --run", "fit tables and runs one after the other")
        return
    for name, value in (("--fit", options.fit), ("--skip", options.skip)):
        if value:
            raise InputError(name, value, "has no effect without --run", "leave it out")
    for name, value in tables.items():
        if not value:
            raise InputError(name, value, "missing", "give tables with --device and --format, or runs with --run")


def _run_of_runs(options: argparse.Namespace, folder: Path) -> int:
    from jaxsim.calibrate import report, runs
    from jaxsim.io.result import to_json
    from jaxsim.io.table import console, printed
    from jaxsim.validate.command import read_system

    data = runs.EndToEnd.read([(read_system(scenario), path) for scenario, path in options.runs], options.skip)
    told = console(sys.stderr)
    found = runs.fit_runs(data, options.fit or data.usual_names(), lambda text: told.print(text, soft_wrap=True))
    folder.mkdir(parents=True, exist_ok=True)
    written = report.write_runs(found, folder)
    if options.json:
        sys.stdout.write(to_json(report.runs_json(found)))
    else:
        printed(lambda out: report.print_runs(found, out))
        print(f"\n{folder}{os.sep}: {', '.join(path.name for path in written)}")
    return 0


def _device(name: str):
    """The device by name, or of a TOML file."""
    from jaxsim._core.errors import InputError
    from jaxsim.calibrate.report import read_device
    from jaxsim.spec.device import load_device
    from jaxsim.spec.toml import parse_toml

    if not name.endswith(".toml"):
        return load_device(name)
    try:
        text = Path(name).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError("--device", name, f"cannot be read ({error})", "give a TOML file, or a name") from None
    return read_device(parse_toml(text, name), name)


def _checked_folder(name: str) -> Path:
    """A folder that is there and can be written to, or can be made. Raises `InputError`."""
    from jaxsim._core.errors import InputError

    folder = Path(name).expanduser()
    there = next((path for path in (folder, *folder.absolute().parents) if path.exists()), folder)
    if not name or not there.is_dir() or not os.access(there, os.W_OK):
        raise InputError("--output", name, "is not a folder that can be written", "give another folder")
    return folder
