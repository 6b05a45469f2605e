"""`jaxsim reproduce`: published claims beside what the simulator says.

Imports are inside the functions, so that the command line answers --help without loading JAX.
"""

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

SYSTEMS = ("apex", "burstgpt", "distserve", "droidspeak", "epd", "fastswitch", "genz", "llumnix", "mnemosyne",
           "moe-lens", "prefix-routing", "skip")
"""What can be reproduced: each is a module of this package with `DESCRIPTION` and `reproduce`."""

ALL = "all"


def add_parser(commands: "argparse._SubParsersAction") -> argparse.ArgumentParser:
    """The command among the others."""
    reproduce = commands.add_parser(
        "reproduce", help="published claims of a system, one by one, beside what the simulator says",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Run a published system's studies and print its claims: what was published, what comes out here,\n"
                    "the tolerance, and the verdict that follows: reproduced, not reproduced, or no gate where no\n"
                    "usable number was published (docs/reproduce/README.md). A claim that is missed stays in the\n"
                    "table with its reason.\n\n"
                    f"names: {', '.join(SYSTEMS)}, {ALL}",
        epilog="example: jaxsim reproduce distserve --out results/distserve\n"
               "exit status: 0 done, whatever the verdicts; 2 a name that is not known, another input that cannot be\n"
               "used, or a place that cannot be written to; 130 interrupted")
    # One that is missing or not known is told of with the list.
    reproduce.add_argument("name", nargs="?", metavar="NAME", help="a system, or all")
    reproduce.add_argument("--json", action="store_true",
                           help="print a JSON list of the claims and nothing else on standard output")
    reproduce.add_argument("--out", metavar="FOLDER",
                           help="folder for NAME.png, NAME.txt (this table) and NAME.json (default: results/reproduce)")
    reproduce.add_argument("--seeds", type=int, metavar="N",
                           help="independent runs of each point, at least 2 (default: the studies' own)")
    return reproduce


def chosen(options: argparse.Namespace) -> tuple[str, ...]:
    """The systems asked for. Raises `InputError`."""
    from jaxsim._core.errors import InputError

    known = (*SYSTEMS, ALL)
    if options.name not in known:
        raise InputError("NAME", options.name, "is missing" if options.name is None else "cannot be reproduced",
                         f"give one of {', '.join(known)}")
    if options.seeds is not None and not 2 <= options.seeds <= 10_000:
        raise InputError("--seeds", options.seeds, "is not a number of runs from 2 to 10000",
                         "give 2 or more: an order needs an interval")
    return SYSTEMS if options.name == ALL else (options.name,)


def files(name: str) -> tuple[str, str, str]:
    """Names of the files of a system: the plot, the table as printed, and its records."""
    return f"{name}.png", f"{name}.txt", f"{name}.json"


def run(options: argparse.Namespace, names: tuple[str, ...], folder: Path) -> None:
    """Run the command, into a folder that is there. Raises `InputError`."""
    import importlib

    from jaxsim.reproduce import show

    claims: list[Any] = []
    for index, name in enumerate(names):
        module = importlib.import_module(f"jaxsim.reproduce.{name.replace('-', '_')}")
        print(f"jaxsim: {module.DESCRIPTION}", file=sys.stderr)
        start = time.perf_counter()
        found = module.reproduce(options.seeds)
        show.write(module.DESCRIPTION, found, *(folder / file for file in files(name)))
        claims += found.claims
        if not options.json:
            print("\n" * (index > 0), end="")
            show.print_claims(module.DESCRIPTION, found.claims)
            print(f"{time.perf_counter() - start:.1f} s; {folder}{os.sep}: {', '.join(files(name))}")
    if options.json:
        sys.stdout.write(show.to_json(claims))
