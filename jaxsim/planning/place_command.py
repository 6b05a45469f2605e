"""`jaxsim place`: how to lay out prefill and decode engines, as DistServe chooses it.

Imports are inside the functions, so that the command line answers --help without loading JAX.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

MODELS = ("opt-13b", "opt-66b")


def add_parser(commands: "argparse._SubParsersAction") -> argparse.ArgumentParser:
    """The command among the others."""
    place = commands.add_parser(
        "place", help="search placements of prefill and decode engines",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="DistServe's search: the tensor-parallel ranks and pipeline stages of prefill and of decode\n"
                    "engines with the highest goodput a GPU, and how many of each a rate asks for. Latencies are\n"
                    "the fitted ones of its public simulator (OPT on A100-80GB); workload and limits are a scenario's.",
        epilog="example: jaxsim place --model opt-13b --nodes 1x4 --rate 8 --slo ttft:250 tpot:100\n"
               "exit status: 0 done, 2 an input that cannot be used, or no placement that keeps the limits")
    place.add_argument("scenario", nargs="?", metavar="SCENARIO",
                       help="where workload and limits come from: a file or a shipped name (default: a chatbot with\n"
                            "lengths up to OPT's 2,048 positions and the paper's limits)")
    place.add_argument("--model", choices=MODELS, default="opt-13b", help="whose latencies (default: opt-13b)")
    place.add_argument("--nodes", default="4x8", metavar="NxM", help="nodes, and devices of each (default: 4x8)")
    place.add_argument("--affinity", choices=("high", "low"), default="high",
                       help="high: prefill and decode engines apart, over a fast network between nodes; low: in pairs\n"
                            "inside nodes (default: high)")
    place.add_argument("--rate", type=float, metavar="RPS", help="requests/s to be served")
    place.add_argument("--requests", type=int, metavar="N", help="requests of a run")
    place.add_argument("--seeds", type=int, metavar="N", help="independent runs of each configuration")
    place.add_argument("--slo", nargs="+", default=[], metavar="NAME:MS", help="limits: ttft:200 tpot:50, milliseconds")
    place.add_argument("--attainment", type=float, default=0.9, metavar="SHARE",
                       help="share of requests that must meet them (default: 0.9)")
    place.add_argument("--rule", choices=("joint", "separate"), default="joint",
                       help="whether requests of a pair must meet both limits at once, or enough meet each")
    place.add_argument("--tolerance", type=float, default=0.05, metavar="SHARE",
                       help="relative width of the range of rates at the end (default: 0.05)")
    place.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", dest="values",
                       help="replace a field of the scenario (repeatable)")
    place.add_argument("--workers", type=int, metavar="N", help="threads (default: processors)")
    place.add_argument("--out", metavar="FILE", help="write the table (.csv)")
    return place


def run(options: argparse.Namespace, values: dict[str, Any]) -> None:
    """Run the command; `values`: of --set. Raises `InputError`."""
    from jaxsim.cost.simdistserve import published
    from jaxsim.planning.placement import search
    from jaxsim.spec.model import load_model
    from jaxsim.study.command import check_workers

    check_workers(options.workers)
    num_nodes, per_node = nodes(options.nodes)
    out = table_file(options.out)
    scenario = chosen(options, values)
    model = load_model(f"facebook/{options.model}")
    start = time.perf_counter()
    found = search(scenario, model, published(options.model), devices_per_node=per_node, num_nodes=num_nodes,
                   affinity=options.affinity, rule=options.rule, attainment=options.attainment,
                   tolerance=options.tolerance, workers=options.workers)
    elapsed_s = time.perf_counter() - start
    table = found.table.assign(**{name: found.table[name].map(lambda d: "" if d is None else str(d))
                                  for name in ("prefill", "decode")})
    if out is not None:
        table.to_csv(out, index=False)
    print(table.round(3).to_string(index=False, na_rep="-"))
    for name, why in found.refused.items():
        print(f"jaxsim: {name}: {why}", file=sys.stderr)
    rate = scenario.workload.rate_rps
    print(f"\n{rate:g} requests/s: {found.num_prefill} prefill engines of {found.prefill}, {found.num_decode} decode"
          f" engines of {found.decode}: {found.num_devices} devices; {len(table)} configurations in {elapsed_s:.1f} s")


def nodes(text: str) -> tuple[int, int]:
    """Nodes and devices of each, of NxM. Raises `InputError`."""
    from jaxsim._core.errors import InputError

    first, cross, second = text.partition("x")
    if not cross or not (first.isdecimal() and second.isdecimal()) or not (int(first) and int(second)):
        raise InputError("--nodes", text, "is not NxM", "write nodes and devices of each, e.g. 4x8")
    return int(first), int(second)


def table_file(name: str | None) -> Path | None:
    """Where the table goes. Raises `InputError`."""
    from jaxsim._core.errors import InputError

    if name is None:
        return None
    out = Path(name)
    if out.suffix != ".csv" or not out.parent.is_dir():
        raise InputError("--out", name, "is no table in a folder that is there", "give a name that ends in .csv")
    return out


def chosen(options: argparse.Namespace, values: dict[str, Any]) -> Any:
    """The scenario that says what arrives, and the limits. Raises `InputError`."""
    from jaxsim.planning.placement import chat
    from jaxsim.spec.scenario import Scenario
    from jaxsim.study.goodput_command import limits

    scenario = chat(options.model) if options.scenario is None else Scenario.from_toml(options.scenario)
    values = dict(values)
    for field, value in (("workload.rate_rps", options.rate), ("workload.num_requests", options.requests),
                         ("num_seeds", options.seeds)):
        if value is not None:
            values[field] = value
    if options.slo:
        slo = limits(options.slo)
        values |= {f"slo.{name}": getattr(slo, name) for name in ("ttft_ms", "tpot_ms", "e2e_ms")}
    return scenario.with_values(values) if values else scenario
