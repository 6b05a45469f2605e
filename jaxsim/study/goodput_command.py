"""`jaxsim goodput`: the highest rate that keeps the limits.

Imports are inside the functions, so that the command line answers --help without loading JAX.
"""

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

_SHORT_RUN = 10
"""A run of fewer lengths of a request has seen few come and go."""


def add_parser(commands: "argparse._SubParsersAction") -> argparse.ArgumentParser:
    """The command among the others."""
    find = commands.add_parser(
        "goodput", help="find the highest rate at which a scenario, or every one of a study, keeps its limits",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Search the highest rate at which enough requests meet their limits. The brackets of all\n"
                    "scenarios advance together, all their rates and seeds in one batch. A rate at which requests\n"
                    "pile up does not count, however many met the limits in a run that ended.",
        epilog="exit status: 0 done, 2 an input that cannot be used")
    find.add_argument("scenario", metavar="SCENARIO", help="a scenario or study: a file or a shipped name")
    find.add_argument("--slo", nargs="+", default=[], metavar="NAME:MS",
                      help="limits: ttft:200 tpot:50 e2e:10000, milliseconds (default: the scenario's)")
    find.add_argument("--attainment", type=float, default=0.9, metavar="SHARE",
                      help="share of requests that must meet them (default: 0.9)")
    find.add_argument("--rule", choices=("joint", "separate", "both"), default="joint",
                      help="a request meets all limits at once, or each limit is met by itself (DistServe's rule), or a"
                           " row of each")
    find.add_argument("--rates", default="0.1:100", metavar="LOW:HIGH",
                      help="requests/s to begin with, moved if wrong (default: 0.1:100)")
    find.add_argument("--tolerance", type=float, default=0.02, metavar="SHARE", help="of the rate (default: 0.02)")
    find.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", dest="values",
                      help="replace a field of the scenario (repeatable)")
    find.add_argument("--workers", type=int, metavar="N", help="threads (default: processors)")
    find.add_argument("--out", metavar="FILE", help="write the table (.csv or .parquet)")
    find.add_argument("--json", action="store_true", help="print JSON and nothing else on standard output")
    return find


def run(options: argparse.Namespace, values: dict[str, Any]) -> None:
    """Run the command; `values`: of --set. Raises `InputError`."""
    from jaxsim._core.errors import InputError
    from jaxsim.spec.scenario import Scenario
    from jaxsim.study.command import check_workers, scenario_or_study
    from jaxsim.study.goodput import search, search_study

    check_workers(options.workers)
    out = None if options.out is None else Path(options.out)
    if out is not None and out.suffix not in (".csv", ".parquet"):
        raise InputError("--out", options.out, "is no table", "give a name that ends in .csv or .parquet")
    if out is not None and not (out.parent.is_dir() and os.access(out.parent, os.W_OK)):
        raise InputError("--out", options.out, "cannot be written", "give a file in a folder that is there")
    start = time.perf_counter()
    how = dict(slo=limits(options.slo) if options.slo else None, attainment=options.attainment, rule=options.rule,
               rates=_rates(options.rates), tolerance=options.tolerance, workers=options.workers, progress=_told)
    found = scenario_or_study(options.scenario, values)
    if isinstance(found, Scenario):
        frame = search([found], **how).drop(columns="scenario")
    else:
        frame = search_study(found, **how)
    elapsed_s = time.perf_counter() - start
    if out is not None:
        frame.to_csv(out, index=False) if out.suffix == ".csv" else frame.to_parquet(out, index=False)
    if options.json:
        _print_json(frame, elapsed_s)
    else:
        _print(frame, options, elapsed_s)


def _told(what: str, done: int, total: int) -> None:
    print(f"jaxsim: {what}: {total - done:,} of {total:,} open" if done < total else f"jaxsim: {total:,} searched",
          file=sys.stderr)


def limits(given: list[str]) -> Any:
    """Limits of --slo. Raises `InputError`."""
    from jaxsim._core.errors import InputError, suggest
    from jaxsim.spec.scenario import SloSection

    found = {}
    for item in given:
        name, colon, text = item.replace("=", ":").partition(":")
        if name not in ("ttft", "tpot", "e2e"):
            raise InputError("--slo", item, "is no limit", suggest(name, ("ttft", "tpot", "e2e"), "write ttft:200"))
        try:
            value = float(text)
        except ValueError:
            value = -1.0
        if not (colon and 0 < value < float("inf")):
            raise InputError("--slo", item, "is no limit in milliseconds above 0", f"write e.g. {name}:200")
        if f"{name}_ms" in found:
            raise InputError("--slo", item, "is given twice", "give each limit once")
        found[f"{name}_ms"] = value
    return SloSection(**found)


def _rates(text: str) -> tuple[float, float]:
    from jaxsim._core.errors import InputError

    low, _, high = text.partition(":")
    try:
        return float(low), float(high)
    except ValueError:
        raise InputError("--rates", text, "is not LOW:HIGH", "write e.g. 0.1:100") from None


def _print_json(frame: Any, elapsed_s: float) -> None:
    from jaxsim.io.result import plain_rows, to_json

    # Null: what does not exist, and a bracket without an end.
    sys.stdout.write(to_json({"rows": plain_rows(frame), "elapsed_s": round(elapsed_s, 3)}))


def _print(frame: Any, options: argparse.Namespace, elapsed_s: float) -> None:
    from rich.table import Table

    from jaxsim.io.table import console, number
    from jaxsim.study.view import short, value_text, wrapped

    parameters = list(frame.columns[:frame.columns.get_loc("rule")])
    columns = {"requests/s": "rate_rps", "±": "rate_rps.ci95", "a device": "rate_rps_per_device", "met": "attainment",
               "TTFT p99": "p99_ttft_ms", "TPOT mean": "mean_tpot_ms", "tokens/s": "output_throughput",
               "USD/M": "usd_per_million_output_tokens", "J/token": "energy_j_per_output_token"}
    if not frame["num_devices"].max() > 1:
        del columns["a device"]
    columns = {title: name for title, name in columns.items() if name in ("rate_rps", "attainment")
               or frame[name].notna().any()}
    titles = {name: wrapped(text) for name, text in short(parameters).items()}
    if options.rule == "both":
        titles["rule"] = "rule"

    def made() -> Table:
        table = Table(box=None, pad_edge=False)
        for title in titles.values():
            table.add_column(title, no_wrap=True)
        for title in columns:
            table.add_column(title, justify="right", no_wrap=True)
        table.add_column("limited\nby", no_wrap=True)
        for row in frame.to_dict("records"):
            by = "refused" if isinstance(row["refused"], str) else row["limited_by"]
            table.add_row(*(value_text(row[name]) for name in titles),
                          *(number(row[name]) for name in columns.values()), by if isinstance(by, str) else "-")
        return table

    out = console()
    # What is the same everywhere says nothing, and what matters least makes room.
    spare = [name for name in parameters if len(frame) > 1 and frame[name].nunique(dropna=False) == 1]
    for name in spare:
        del titles[name]
    bounds = [name for name in titles if name.startswith("slo.")]
    for name in ("tokens/s", "J/token", "TPOT mean", "met", *bounds, "TTFT p99", "USD/M"):
        if out.measure(made(), options=out.options.update(width=1000)).maximum > out.width:
            (titles if name in bounds else columns).pop(name, None)
    out.print(made())
    is_short = frame["window_s"] < _SHORT_RUN * frame["mean_e2el_ms"] * 1e-3
    if is_short.any():
        out.print(f"{is_short.sum()} of {frame['window_s'].count()} rates are of runs shorter than {_SHORT_RUN}"
                  " requests one after the other, and may not last: raise workload.num_requests")
    for reason, count in frame["refused"].value_counts().items():
        out.print(f"refused{f', {count} rows' if count > 1 else ''}: {reason}")
    if frame["rate_rps"].notna().any():
        _explain(out, options, elapsed_s)


def _explain(out: Any, options: argparse.Namespace, elapsed_s: float) -> None:
    rule = {"joint": "all limits at once", "separate": "each limit by itself",
            "both": "joint: all limits at once, separate: each by itself"}[options.rule]
    out.print(f"requests/s: the highest rate at which {options.attainment:.0%} of requests meet the limits ({rule}); ±:"
              f" half of a 95 % interval over seeds; TTFT and TPOT in ms; {elapsed_s:.1f} s")
