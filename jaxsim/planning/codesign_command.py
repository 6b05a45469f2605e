"""`jaxsim codesign`: what to have more of, how to spend a budget.

Imports are inside the functions, so that the command line answers --help without loading JAX.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

DEFAULT_DESIGN = "accelerator"

_OF_BUDGET = "percent_a_percent_of_"


def add_parser(commands: "argparse._SubParsersAction") -> argparse.ArgumentParser:
    """The command among the others."""
    codesign = commands.add_parser(
        "codesign", help="what to have more of, and the best accelerator for a budget",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="What one more unit of each resource is worth, by its cost, and the amounts that serve most\n"
                    "within the limits for the same budgets: gradients of the closed form, then simulation of the\n"
                    "design and of those beside it. Needs optax (pip install 'jaxsim-serving[design]').",
        epilog="example: jaxsim codesign accelerator --plot design.png\n"
               "exit status: 0 done, 2 an input that cannot be used")
    codesign.add_argument("design", nargs="?", default=DEFAULT_DESIGN, metavar="DESIGN",
                          help=f"a file (docs/gradients.md), or a shipped name (default: {DEFAULT_DESIGN})")
    codesign.add_argument("--next", action="store_true",
                          help="only what each resource is worth to the scenario as it is, without a search")
    codesign.add_argument("--no-confirm", action="store_true", help="closed forms only")
    codesign.add_argument("--plot", metavar="FILE", help="draw it (.png, .svg or .pdf)")
    codesign.add_argument("--json", action="store_true", help="print JSON and nothing else on standard output")
    return codesign


def run(options: argparse.Namespace) -> None:
    """Run `jaxsim codesign`. Raises `InputError`."""
    import numpy as np

    from jaxsim.io.figure import check_name
    from jaxsim.io.result import to_json
    from jaxsim.planning import codesign, codesign_plots

    check_name(options.plot)
    space = codesign.Space(codesign.Design.from_toml(options.design), simulated=not options.no_confirm)
    if options.next:
        worth = codesign.worth_of(space, space.start)
        more = None if options.no_confirm else codesign.confirmed(space, codesign.more_of_each(space, space.start))
        if options.plot:
            codesign_plots.worth(worth, more, Path(options.plot))
        if options.json:
            sys.stdout.write(to_json({"worth": _rows(worth), "confirmed": _rows(more)}))
            return
        _print_worth("what there is", worth)
        _print_confirmed(more)
        return
    found = codesign.search(space)
    amounts, confirmed = (found.amounts, None) if options.no_confirm else codesign.polished(space, found.amounts)
    if options.plot:
        codesign_plots.design(space, found, amounts, confirmed, Path(options.plot))
    if options.json:
        sys.stdout.write(to_json({
            "amounts": dict(zip(space.names, map(float, amounts), strict=True)),
            "closed_form": {
                "amounts": dict(zip(space.names, map(float, found.amounts), strict=True)), "rate_rps": found.rate_rps,
                "starts_rps": [float(x) for x in np.exp(found.history[-1])], "worth": _rows(found.best_worth)},
            "worth": _rows(found.worth), "confirmed": _rows(confirmed)}))
        return
    _print_worth("what there is", found.worth)
    _print_worth("the best for the budgets", found.best_worth)
    print(f"requests/s within limits, in closed form: {found.rate_rps:.2f}; of every start:"
          f" {', '.join(f'{x:.2f}' for x in np.exp(found.history[-1]))}")
    if confirmed is not None:
        chosen = ", ".join(f"{one.name} {amount:.4g} {one.label}"
                           for one, amount in zip(space.design.resources, amounts, strict=True))
        moves = confirmed["round"].iloc[0]
        print(f"after {moves} {'move' if moves == 1 else 'moves'} by simulation: {chosen}")
    spent = space.design.fixed, space.costs @ (amounts - space.least), space.costs @ space.least
    for index, (budget, limit) in enumerate(space.design.budgets.items()):
        print(f"{budget}: {spent[0].get(budget, 0.0) + spent[1][index] + spent[2][index]:.1f} of {limit:g}")
    _print_confirmed(confirmed)


def _rows(frame: Any) -> Any:
    from jaxsim.io.result import plain_rows

    return None if frame is None else plain_rows(frame)


def _print_worth(title: str, worth: Any) -> None:
    names = {"elasticity": "% for 1 %", "more_rps": "rps for a unit"} | {
        name: f"% for 1 % of {name.removeprefix(_OF_BUDGET)}" for name in worth if name.startswith(_OF_BUDGET)}
    shown = worth.rename(columns=names)
    numbers = {name: (lambda value: f"{value:.4g}") for name in shown if shown[name].dtype.kind == "f"}
    print(f"{title} (more requests/s within limits):\n"
          f"{shown.to_string(index=False, na_rep='-', formatters=numbers)}\n")


def _print_confirmed(confirmed: Any) -> None:
    if confirmed is not None:
        if not confirmed["rate_rps"].notna().iloc[0]:
            print(f"\nnot confirmed: {confirmed['design'].iloc[0]!r} crosses no limit at any rate that was simulated")
        shares = {name: 100 * confirmed[name] for name in ("gain", "low", "high")}
        shown = confirmed.assign(**shares).rename(columns={name: f"{name}, %" for name in shares})
        print("\nby simulation (gain over the first, with 95 % from low to high):\n"
              f"{shown.round(2).replace(0.0, 0.0).to_string(index=False, na_rep='-')}")
