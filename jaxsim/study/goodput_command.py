"""`jaxsim goodput`: the highest rate that keeps the limits.

Imports are inside the functions, so that the command line answers --help without loading JAX.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any


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
    find.add_argument("--rule", choices=("joint", "separate"), default="joint",
                      help="a request meets all limits at once, or each limit is met by itself (DistServe's rule)")
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
    import numpy as np
    import pandas as pd

    from jaxsim._core.errors import InputError
    from jaxsim.io.result import to_json
    from jaxsim.study.command import check_workers
    from jaxsim.study.goodput import search

    check_workers(options.workers)
    out = None if options.out is None else Path(options.out)
    if out is not None and out.suffix not in (".csv", ".parquet"):
        raise InputError("--out", options.out, "is no table", "give a name that ends in .csv or .parquet")
    points, scenarios = _scenarios(options.scenario, values, bool(options.slo))
    start = time.perf_counter()
    found = search(scenarios, slo=limits(options.slo) if options.slo else None, attainment=options.attainment,
                   rule=options.rule, rates=_rates(options.rates), tolerance=options.tolerance,
                   workers=options.workers)
    elapsed_s = time.perf_counter() - start
    frame = pd.concat([pd.DataFrame(points), found.drop(columns="scenario")], axis=1)
    if out is not None:
        frame.to_csv(out, index=False) if out.suffix == ".csv" else frame.to_parquet(out, index=False)
    if options.json:
        rows = frame.astype(object).where(frame.notna(), None).to_dict("records")
        sys.stdout.write(to_json({"rows": [{k: v.item() if isinstance(v, np.generic) else v for k, v in row.items()}
                                           for row in rows], "elapsed_s": round(elapsed_s, 3)}))
        return
    _print(frame, list(points[0]), options, elapsed_s)


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
            raise InputError("--slo", item, "has no number of milliseconds", f"write e.g. {name}:200")
        found[f"{name}_ms"] = value
    return SloSection(**found)


def _rates(text: str) -> tuple[float, float]:
    from jaxsim._core.errors import InputError

    low, _, high = text.partition(":")
    try:
        return float(low), float(high)
    except ValueError:
        raise InputError("--rates", text, "is not LOW:HIGH", "write e.g. 0.1:100") from None


def _scenarios(name: str, values: dict[str, Any], has_slo: bool) -> tuple[list[dict[str, Any]], list[Any]]:
    """Points and scenarios: those of a study, or one. Raises `InputError`."""
    import tomllib

    from jaxsim._core.errors import InputError
    from jaxsim.spec.scenario import Scenario
    from jaxsim.study.command import chosen
    from jaxsim.study.study import shipped_studies

    is_study = name in shipped_studies() and not Path(name).exists()
    if Path(name).is_file():
        try:
            is_study = bool({"axes", "zip", "sample"} & tomllib.loads(Path(name).read_text(encoding="utf-8")).keys())
        except (tomllib.TOMLDecodeError, UnicodeDecodeError):
            # The reader says what is wrong.
            is_study = False
    if not is_study:
        scenario = Scenario.from_toml(name)
        return [{}], [scenario.with_values(values) if values else scenario]
    study = chosen(name, values)
    base, points, scenarios = study.base_tree(), [], []
    for point in study.points():
        if any(name.startswith("slo.") for name in point) and has_slo:
            raise InputError("--slo", "given", "stands against an axis over limits", "leave one of them out")
        if "workload.rate_rps" in point:
            raise InputError("axes.workload.rate_rps", "an axis", "is what is searched for", "leave it out")
        points.append(point)
        scenarios.append(study.scenario_at(point, base))
    return points, scenarios


def _print(frame: Any, names: list[str], options: argparse.Namespace, elapsed_s: float) -> None:
    from rich.table import Table

    from jaxsim.io.table import console, number

    table = Table(box=None, pad_edge=False)
    for name in names:
        table.add_column(name.rpartition(".")[2])
    for name in ("requests/s", "±", "met", "TTFT p99", "TPOT mean", "tokens/s", "USD/M tokens"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in frame.to_dict("records"):
        table.add_row(*(str(row[name]) for name in names), *(number(row[key]) for key in (
            "rate_rps", "rate_rps.ci95", "attainment", "p99_ttft_ms", "mean_tpot_ms", "output_throughput",
            "usd_per_million_output_tokens")))
    out = console()
    out.print(table)
    for index in frame.index[frame["refused"].notna()][:3]:
        out.print(f"refused: row {index}: {frame['refused'][index]}")
    out.print(f"the highest rates that {options.attainment:.0%} of requests meet ({options.rule}); ±: half of a 95 %"
              f" interval over seeds; {elapsed_s:.1f} s")
