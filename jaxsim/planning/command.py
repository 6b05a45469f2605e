"""`jaxsim plan`: which way to lay a model out on devices.

Imports are inside the functions, so that the command line answers --help without loading JAX.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

RANKS = ("e2e", "ttft", "tpot", "p99_ttft", "p99_tpot", "goodput", "cost")

MOST_LINES = 12
"""Refusals that are printed; all are in the table of --out."""


def add_parser(commands: "argparse._SubParsersAction") -> argparse.ArgumentParser:
    """The command among the others."""
    plan = commands.add_parser(
        "plan", help="search parallel plans: enumerate, screen, simulate, rank",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Enumerate the ways to lay a model out on devices (replicas, tensor, pipeline and data\n"
                    "parallelism, expert parallelism), screen all of them in closed form, simulate the best in one\n"
                    "batch, and print them ranked, with the Pareto front and the `vllm serve` flags of the best.\n"
                    "APEX's cell-level plans (copies of attention that share one FFN) are screened and shown, but\n"
                    "not simulated or ranked: no engine runs them.",
        epilog="example: jaxsim plan --model llama-3.1-70b --devices h100:8 --rate 2 --slo ttft:500 tpot:30 \\\n"
               "             --set engine.max_model_len=16384\n"
               "exit status: 0 done, 2 an input that cannot be used, or no plan that can run")
    plan.add_argument("scenario", nargs="?", metavar="SCENARIO",
                      help="where everything else comes from: a file or a shipped name (default: default, less its"
                           " limits)")
    plan.add_argument("--model", metavar="M", help="a name of `jaxsim list models`, or the path of a config.json")
    plan.add_argument("--devices", action="append", default=[], metavar="NAME:COUNT",
                      help="what it runs on, all of them (repeatable: kinds are compared)")
    plan.add_argument("--trace", metavar="FILE", help="replay this trace instead of the scenario's workload")
    plan.add_argument("--rate", type=float, metavar="RPS", help="requests/s, over all devices")
    plan.add_argument("--slo", nargs="+", default=[], metavar="NAME:MS",
                      help="limits: ttft:200 tpot:50 e2e:10000, milliseconds")
    plan.add_argument("--attainment", type=float, default=0.9, metavar="SHARE",
                      help="share of requests that must meet them (default: 0.9)")
    plan.add_argument("--rank-by", choices=RANKS, default="e2e",
                      help="order of the plans that meet the limits: a mean or percentile that was simulated, or\n"
                           "goodput or cost at the highest rate within limits, in closed form (default: e2e)")
    plan.add_argument("--top", type=int, default=8, metavar="N", help="plans that are simulated (default: 8)")
    plan.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", dest="values",
                      help="replace a field of the scenario (repeatable)")
    plan.add_argument("--seeds", type=int, metavar="N", help="independent runs of each plan")
    plan.add_argument("--workers", type=int, metavar="N", help="threads (default: processors)")
    plan.add_argument("--out", metavar="FILE", help="write the table (.csv or .parquet)")
    plan.add_argument("--json", action="store_true", help="print JSON and nothing else on standard output")
    return plan


def run(options: argparse.Namespace, values: dict[str, Any]) -> None:
    """Run the command; `values`: of --set. Raises `InputError`."""
    from jaxsim._core.errors import InputError
    from jaxsim.io.result import plain_rows, to_json
    from jaxsim.planning.search import search
    from jaxsim.study.command import check_workers

    check_workers(options.workers)
    out = None if options.out is None else Path(options.out)
    if out is not None and out.suffix not in (".csv", ".parquet"):
        raise InputError("--out", options.out, "is no table", "give a name that ends in .csv or .parquet")
    if out is not None and not out.parent.is_dir():
        raise InputError("--out", options.out, "is in a folder that is not there", f"make {out.parent} first")
    kinds = [devices(text) for text in options.devices]
    scenario = chosen(options, values, kinds)
    start = time.perf_counter()
    found = search(scenario, kinds, attainment=options.attainment, top=options.top, rank_by=options.rank_by,
                   workers=options.workers, progress=_told)
    elapsed_s = time.perf_counter() - start
    if out is not None:
        found.table.to_csv(out, index=False) if out.suffix == ".csv" else found.table.to_parquet(out, index=False)
    line = told = None
    if found.best is not None:
        try:
            line = found.vllm_line()
        except InputError as error:
            told = str(error)
    if options.json:
        sys.stdout.write(to_json({"rows": plain_rows(found.table), "best": found.best, "vllm": line,
                                  "elapsed_s": round(elapsed_s, 3)}))
        return
    _print(found, scenario, options, line, told, elapsed_s)


def _told(what: str, done: int, total: int) -> None:
    if done == 0 and total:
        print(f"jaxsim: {what} {total} plan{'s' * (total > 1)}", file=sys.stderr)


def devices(text: str) -> tuple[str, int]:
    """Name and count of NAME:COUNT. Raises `InputError`."""
    from jaxsim._core.errors import InputError
    from jaxsim.spec.device import load_device

    name, colon, count = text.rpartition(":")
    if not colon or not count.isdecimal() or int(count) < 1:
        raise InputError("--devices", text, "is not NAME:COUNT", "write e.g. h100:8")
    return load_device(name).name, int(count)


def chosen(options: argparse.Namespace, values: dict[str, Any], kinds: list[tuple[str, int]]) -> Any:
    """The scenario that all plans start from. Raises `InputError`."""
    from jaxsim._core.errors import InputError
    from jaxsim.planning.candidates import Candidate
    from jaxsim.spec.plan import Plan
    from jaxsim.spec.scenario import Scenario, read_tree
    from jaxsim.study.goodput_command import limits

    if not kinds:
        raise InputError("--devices", None, "is missing", "write e.g. --devices h100:8")
    tree = read_tree("default" if options.scenario is None else options.scenario)
    if options.scenario is None:
        tree.pop("slo", None)
        tree.get("engine", {}).pop("max_num_seqs", None)
    if options.model is not None:
        is_config = options.model.endswith(".json")
        kept = {k: v for k, v in tree.get("model", {}).items() if k in ("dtype", "kv_dtype")}
        tree["model"] = {"config" if is_config else "name": options.model, **kept}
    elif options.scenario is None:
        raise InputError("--model", None, "is missing", "name a model, or a scenario that has one")
    tree["device"] = {"name": kinds[0][0]}
    if options.trace is not None:
        kept = {k: v for k, v in tree["workload"].items() if k in ("seed", "tenants")}
        tree["workload"] = {"kind": "trace", "trace": options.trace, **kept}
        tree["num_seeds"] = 1
    scenario = Scenario.from_dict(tree)
    for field in set(values) & {*Candidate(device="", plan=Plan()).values(), "device.name"}:
        raise InputError(f"--set {field}", values[field], "is what the search varies",
                         "leave it out, and read the row of --out that has it")
    values = dict(values)
    if options.rate is not None:
        values["workload.rate_rps"] = options.rate
    if options.seeds is not None:
        values["num_seeds"] = options.seeds
    if options.slo:
        slo = limits(options.slo)
        values |= {f"slo.{name}": getattr(slo, name) for name in ("ttft_ms", "tpot_ms", "e2e_ms")}
    return scenario.with_values(values) if values else scenario


def _print(found: Any, scenario: Any, options: argparse.Namespace, line: str | None, told: str | None,
           elapsed_s: float) -> None:
    import pandas as pd
    from rich.table import Table

    from jaxsim.io.table import console, number

    rows = found.table.to_dict("records")
    many = found.table["device"].nunique() > 1
    has_limits = found.table["meets_limits"].notna().any()
    has_prices = found.table["screened.usd_per_million_output_tokens"].notna().any() if (
        "screened.usd_per_million_output_tokens" in found.table) else False
    table = Table(box=None, pad_edge=False)
    table.add_column("", no_wrap=True)
    # Wrapped where the rest leaves no room: numbers are never cut off.
    table.add_column("plan")
    for name in ("TTFT", "form", "TPOT", "form", "p99", *(["met"] if has_limits else []), "req/s",
                 *(["$/M"] if has_prices else []), ""):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        if pd.isna(row.get("screened.tpot_ms")):
            continue
        is_ranked, cells = not pd.isna(row["rank"]), []
        for name in ("ttft", "tpot"):
            cells += [number(row[f"mean_{name}_ms"]), number(row[f"screened.{name}_ms"])]
        cells += [number(row["p99_tpot_ms"])]
        if has_limits:
            cells.append("-" if pd.isna(row["slo.attainment"]) else f"{row['slo.attainment']:.0%}")
        cells.append(number(row["screened.rate_within_limits"]))
        if has_prices:
            cells.append(number(row["screened.usd_per_million_output_tokens"]))
        cells.append("*" if row["is_on_front"] else "")
        label = f"{row['device']}:{row['num_devices']} " if many else ""
        state = " UNSTABLE" if is_ranked and row["unstable"] > 0.5 else ""
        state += " STOPPED" if is_ranked and isinstance(row["fault"], str) else ""
        table.add_row(str(row["rank"]) if is_ranked else "-", label + row["plan"] + state, *cells)
    out = console()
    kinds = ", ".join(options.devices)
    out.print(f"{scenario.model.name or scenario.model.config} on {kinds}, {float(found.load.rate_rps):.3g} requests/s,"
              f" {float(found.load.input_tokens):,.0f} prompt and {float(found.load.output_tokens):,.0f} output tokens"
              " on average")
    out.print(table)
    within = "that keeps means within limits" if has_limits else "that can be served"
    out.print("TTFT, TPOT: simulated means, and p99 of TPOT, ms; form: in closed form, not simulated; "
              f"req/s: the highest rate {within}, in closed form"
              + ("; $/M: a million output tokens at it" if has_prices else "")
              + "; *: front of TTFT, TPOT and output tokens at it, by device or dollar")
    _print_refused(out, rows, many)
    if found.best is None:
        simulated = found.table["rank"].notna().any()
        out.print("\nno best plan: " + ("requests pile up in all that were simulated, or a bound stopped them"
                                       if simulated else "none that fits could be simulated (reasons above)"))
    elif line is not None:
        best = rows[found.best]
        count = f" (each of {best['replicas']})" if best["replicas"] > 1 else ""
        missed = " It does not meet the limits." if best["meets_limits"] in (False, 0.0) else ""
        out.print(f"\nbest: {best['plan']} on {best['device']}{count}.{missed}")
        print(line)
    else:
        out.print(f"\nbest: {rows[found.best]['plan']}; {told}")
    simulated = int(found.table["rank"].notna().sum())
    screened = int(found.table["screened.tpot_ms"].notna().sum())
    out.print(f"{len(rows)} plans, {screened} screened, {simulated} simulated; {elapsed_s:.1f} s")


def _print_refused(out: Any, rows: list[dict[str, Any]], many: bool) -> None:
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if isinstance(row["refused"], str):
            label = (f"{row['device']}:{row['num_devices']} " if many else "") + row["plan"]
            reasons.setdefault(row["refused"], []).append(label)
    for reason, labels in list(reasons.items())[:MOST_LINES]:
        out.print(f"\n{', '.join(labels)}: {reason}")
    if len(reasons) > MOST_LINES:
        out.print(f"{len(reasons) - MOST_LINES} more reasons in the column `refused` of --out")
