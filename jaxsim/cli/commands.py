"""The parser of all commands, and what becomes of them.

Exit status: 0, 2 for a mistake of the user or a place that cannot be written to (one line on standard error), 3 for a
simulation that a bound stopped, 130 for Ctrl-C.
"""

import argparse
import difflib
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jaxsim.calibrate.command import add_parser as add_calibrate
from jaxsim.cli.explain import add_parser as add_explain
from jaxsim.cli.imports import add_parsers as add_imports
from jaxsim.cli.listing import add_parser as add_list
from jaxsim.cli.process import (
    INTERRUPTED,
    STOPPED,
    USER_ERROR,
    drop_output,
    fail,
    find_devices,
    folder_for,
    interrupted,
    keep_programs,
    leave_on_interrupt,
    on_interrupt,
    remove_empty_folders,
    say,
)
from jaxsim.cli.run import add_parser as add_run
from jaxsim.cli.run import assignments
from jaxsim.planning.codesign_command import add_parser as add_codesign
from jaxsim.planning.command import add_parser as add_plan
from jaxsim.planning.place_command import add_parser as add_place
from jaxsim.planning.requirements_command import add_parser as add_requirements
from jaxsim.reproduce.command import add_parser as add_reproduce
from jaxsim.sensitivity.command import add_parser as add_sensitivity
from jaxsim.sensitivity.margins_command import add_parser as add_margins
from jaxsim.study.command import add_parser as add_sweep
from jaxsim.study.goodput_command import add_parser as add_goodput
from jaxsim.study.plot_command import add_parser as add_plot
from jaxsim.validate.command import add_parser as add_validate

_DISTRIBUTION = "jaxsim-serving"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status. Without arguments it takes those of the process, and its Ctrl-C."""
    if arguments is None:
        leave_on_interrupt()
    try:
        options = _parser().parse_args(arguments)
        if sys.stdout is None:
            return fail("standard output is closed; send it to a file or to /dev/null")
        if options.command is None:
            _parser().print_help()
            return USER_ERROR
        from jaxsim._core.errors import InputError

        try:
            status = options.command(options)
            sys.stdout.flush()
            return status
        except InputError as error:
            return fail(str(error))
    except KeyboardInterrupt:
        say(interrupted())
        return INTERRUPTED
    except BrokenPipeError:
        drop_output()
        return 0
    except OSError as error:
        # Python's own streams carry no file name.
        if error.filename is None:
            drop_output()
        return fail(f"{error.filename or 'standard output'}: {error.strerror or error};"
                     " make room, or choose another place")
    finally:
        remove_empty_folders()


class _Parser(argparse.ArgumentParser):
    """One line for a mistake, with what was probably meant."""

    _given: list[str] = []

    def parse_args(self, args: list[str] | None = None, namespace: argparse.Namespace | None = None) -> Any:
        self._given = sys.argv[1:] if args is None else list(args)
        return super().parse_args(args, namespace)

    def error(self, message: str) -> Any:
        message = " ".join(message.split())
        unknown = re.fullmatch(r"unrecognized arguments: (.*)", message)
        remedy = f"see `{self.prog} --help`"
        if unknown:
            first = unknown.group(1).split()[0]
            near = difflib.get_close_matches(first.partition("=")[0], _option_names(self, self._given), n=1, cutoff=0.7)
            message = f"unknown argument {unknown.group(1)}"
            remedy = f"did you mean {near[0]}?" if near else "see --help of the command"
        self.exit(fail(f"{message}; {remedy}"))


def _option_names(parser: argparse.ArgumentParser, given: list[str]) -> Iterator[str]:
    """Of a parser, and of the command that was given."""
    for action in parser._actions:
        yield from action.option_strings
        if isinstance(action, argparse._SubParsersAction):
            for inner in [action.choices[name] for name in given if name in action.choices][:1]:
                yield from _option_names(inner, given)


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any, **__: Any) -> None:
        from importlib import metadata

        try:
            version = metadata.version(_DISTRIBUTION)
        except metadata.PackageNotFoundError:
            version = "unknown"
        print(f"jaxsim {version}")
        parser.exit()


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="jaxsim", description="Simulate an LLM serving system under a workload, exactly and fast.",
        epilog="jaxsim run simulates the embedded default scenario; jaxsim COMMAND --help tells more.")
    parser.add_argument("--version", nargs=0, action=_Version, help="print the version and exit")
    parser.set_defaults(command=None)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")

    add_run(commands)
    add_explain(commands)
    add_list(commands)
    add_imports(commands)
    add_sweep(commands).set_defaults(command=_sweep)
    add_goodput(commands).set_defaults(command=_goodput)
    add_plan(commands).set_defaults(command=_plan)
    add_place(commands).set_defaults(command=_place)
    add_requirements(commands).set_defaults(command=_requirements)
    add_codesign(commands).set_defaults(command=_codesign)
    add_margins(commands).set_defaults(command=_margins)
    add_plot(commands)
    add_sensitivity(commands).set_defaults(command=_sensitivity)
    add_validate(commands).set_defaults(command=_validate)
    add_calibrate(commands).set_defaults(command=_calibrate)
    add_reproduce(commands).set_defaults(command=_reproduce)

    bench = commands.add_parser("bench", help="measure how fast the simulator is",
                                description="Measure how fast the simulator is on this machine.")
    bench.add_argument("--suite", choices=("engine", "sweeps", "analytic", "long-context", "derivatives"),
                       default="engine",
                       help="the compiled loop on one core, whole sweeps on all of them, closed forms on one core, a"
                            " prompt of ten million tokens, or derivatives at a fixed schedule (default: engine)")
    bench.add_argument("--quick", action="store_true", help="fewer and shorter: the engine within 90 seconds")
    bench.add_argument("--json", action="store_true", help="print JSON and nothing else on standard output")
    bench.set_defaults(command=_bench)

    schema = commands.add_parser("schema", help="print the JSON schema of scenario files",
                                 description="Print the JSON schema of scenario files.")
    schema.set_defaults(command=_schema)
    return parser


def _sweep(options: argparse.Namespace) -> int:
    from jaxsim.study.command import run

    on_interrupt("; finished tiles are kept, the same command goes on from there")
    keep_programs()
    find_devices()
    label = "-".join(re.findall(r"[\w.-]*\w", Path(options.study).stem)) or "study"
    run(options, assignments(options.values), Path(f"results/{label}" if options.out is None else options.out))
    return 0


def _goodput(options: argparse.Namespace) -> int:
    from jaxsim.study.goodput_command import run

    keep_programs()
    find_devices()
    run(options, assignments(options.values))
    return 0


def _plan(options: argparse.Namespace) -> int:
    from jaxsim.planning.command import run

    keep_programs()
    find_devices()
    run(options, assignments(options.values))
    return 0


def _place(options: argparse.Namespace) -> int:
    from jaxsim.planning.place_command import run

    keep_programs()
    find_devices()
    run(options, assignments(options.values))
    return 0


def _requirements(options: argparse.Namespace) -> int:
    from jaxsim.planning.requirements_command import run

    keep_programs()
    find_devices()
    run(options, assignments(options.values))
    return 0


def _sensitivity(options: argparse.Namespace) -> int:
    from jaxsim.sensitivity import attribute_command as attribution
    from jaxsim.sensitivity.command import FILES, folder_of, run, system

    given = system(options, assignments(options.values))
    folder = folder_for(folder_of(options), FILES + attribution.FILES)
    keep_programs()
    find_devices()
    (attribution.run if attribution.is_asked(options) else run)(options, given, folder)
    return 0


def _codesign(options: argparse.Namespace) -> int:
    from jaxsim.planning.codesign_command import run

    keep_programs()
    find_devices()
    run(options)
    return 0


def _margins(options: argparse.Namespace) -> int:
    from jaxsim.sensitivity.margins_command import run

    keep_programs()
    find_devices()
    run(options, assignments(options.values))
    return 0


def _validate(options: argparse.Namespace) -> int:
    from jaxsim.validate.command import FILES, run, system

    scenario, values = system(options), assignments(options.values)
    if values:
        scenario = scenario.with_values(values)
    label = re.sub(r"[^\w.-]+", "-", (scenario.name if scenario else "") or "points").strip("-.") or "scenario"
    folder = folder_for(f"results/validate-{label}" if options.out is None else options.out, FILES)
    keep_programs()
    find_devices()
    try:
        return STOPPED if run(options, scenario, folder) else 0
    except BrokenPipeError:
        raise
    except OSError as error:
        return fail(f"{error.filename or folder}: cannot be written ({error.strerror or error}); make room, or give"
                     " another folder with --out")


def _calibrate(options: argparse.Namespace) -> int:
    from jaxsim.calibrate.command import run

    keep_programs()
    find_devices()
    try:
        return run(options)
    except BrokenPipeError:
        raise
    except OSError as error:
        return fail(f"{error.filename or options.output}: cannot be written ({error.strerror or error}); make room, or"
                     " give another folder with --output")


def _reproduce(options: argparse.Namespace) -> int:
    from jaxsim.reproduce.command import chosen, files, run

    names = chosen(options)
    folder = folder_for("results/reproduce" if options.out is None else options.out,
                     [file for name in names for file in files(name)])
    keep_programs()
    find_devices()
    run(options, names, folder)
    return 0


def _bench(options: argparse.Namespace) -> int:
    if options.suite == "sweeps":
        from jaxsim.bench.sweeps import command
    elif options.suite == "analytic":
        from jaxsim.bench.analytic import command
    elif options.suite == "derivatives":
        from jaxsim.bench.derivatives import command
    elif options.suite == "long-context":
        from jaxsim.bench.long_context import command
    else:
        from jaxsim.bench.engine import command

    return command(options.quick, options.json)


def _schema(_: argparse.Namespace) -> int:
    import json

    from jaxsim.spec.scenario import json_schema

    print(json.dumps(json_schema(), indent=2))
    return 0
