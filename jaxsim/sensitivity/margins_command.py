"""`jaxsim margins`: how little has to change until limits are missed.

Imports are inside the functions, so that the command line answers --help without loading JAX.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

DEFAULT_SCENARIO = "chat-with-margin"


def add_parser(commands: "argparse._SubParsersAction") -> argparse.ArgumentParser:
    """The command among the others."""
    margins = commands.add_parser(
        "margins", help="how little has to change until limits are missed",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="The smallest joint change of rate, lengths and bandwidth at which fewer requests than asked for\n"
                    "keep the limits, by slopes of relaxed attainment, and what each field alone could change.",
        epilog="example: jaxsim margins chat-with-margin --plot margins.png\n"
               "exit status: 0 done, 2 an input that cannot be used")
    margins.add_argument("scenario", nargs="?", default=DEFAULT_SCENARIO, metavar="SCENARIO",
                         help=f"a file or a shipped name, with limits (default: {DEFAULT_SCENARIO})")
    margins.add_argument("--fields", nargs="+", metavar="FIELD", help="that change (default: rate, lengths, memory"
                                                                      " bandwidth, as far as the scenario has them)")
    margins.add_argument("--share", type=float, default=0.99, metavar="SHARE",
                         help="of the requests that are to keep the limits (default: 0.99)")
    margins.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", dest="values",
                         help="replace a field of the scenario (repeatable)")
    margins.add_argument("--plot", metavar="FILE", help="draw it (.png, .svg or .pdf)")
    margins.add_argument("--json", action="store_true", help="print JSON and nothing else on standard output")
    return margins


def run(options: argparse.Namespace, values: dict[str, Any]) -> None:
    """Run `jaxsim margins`; `values`: of --set. Raises `InputError`."""
    from jaxsim.io.figure import check_name
    from jaxsim.io.result import plain, plain_rows, to_json
    from jaxsim.sensitivity import margins_plot
    from jaxsim.sensitivity.margins import margins
    from jaxsim.spec.scenario import Scenario
    from jaxsim.study.view import short

    check_name(options.plot)
    scenario = Scenario.from_toml(options.scenario)
    found = margins(scenario.with_values(values) if values else scenario, options.fields, share=options.share)
    if options.plot:
        margins_plot.draw(found, Path(options.plot))
    if options.json:
        sys.stdout.write(to_json(plain({"attainment": found.attainment, "share": found.share, "slopes": found.slopes,
                                        "notes": list(found.notes), "ways": plain_rows(found.table)})))
        return
    for note in found.notes:
        print(note)
    print(f"attainment now: {found.attainment:.2%}; length of a change: the root of the sum of squared logarithms;"
          " fields in percent")
    names = short(found.fields)
    shown = found.table.drop(columns="ends").replace({"way": names})
    # Without the sign of what rounds to nothing.
    shown = (shown.round(dict.fromkeys(found.fields, 1) | {"radius": 3}).replace(0.0, 0.0)
             .rename(columns=names | {"radius": "length"}))
    print(shown.to_string(index=False, na_rep="-"))
    for way, why in found.table.loc[found.table["ends"].notna(), ["way", "ends"]].to_numpy():
        print(f"{way} ends where {why}")
    if found.table["radius"].isna().all():
        print(f"\nno way that was tried leads below {found.share:.0%}")
        return
    worst = found.worst
    changes = ", ".join(f"{field} {worst[field]:+.1f} %" for field in found.fields)
    print(f"\nverdict: a change of length {worst['radius']:.3f} is enough ({worst['way']}): {changes}")
