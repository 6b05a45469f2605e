"""`jaxsim explain`: where the seconds of an engine's decode iterations go, by lane, and where the host limits."""

import argparse
import sys
from typing import Any

from jaxsim.cli.process import find_devices, keep_programs
from jaxsim.cli.run import assignments

DEFAULT_CONTEXT = 1024
"""Tokens, of models that have as many."""


def add_parser(commands: "argparse._SubParsersAction") -> None:
    """The command among the others."""
    explain = commands.add_parser(
        "explain", help="what limits a decode iteration, host or device, batch by batch",
        description="Print the lanes of a scenario's decode iterations by batch size, without simulating it: work of"
                    " the host that nothing overlaps, launches, the device; and where the launches are what limits.",
        epilog="example: jaxsim explain default --set engine.enforce_eager=true")
    explain.add_argument("scenario", nargs="?", metavar="SCENARIO",
                         help="a scenario file, or a name of `jaxsim list scenarios` (default: default)")
    explain.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", dest="values",
                         help="replace a field, e.g. --set engine.enforce_eager=true (repeatable)")
    explain.add_argument("--context", type=int, default=None, metavar="N",
                         help="tokens in the cache of each sequence (default: 1024, or max_model_len if that is less)")
    explain.add_argument("--json", action="store_true", help="print JSON and nothing else on standard output")
    explain.set_defaults(command=_explain)


def _explain(options: argparse.Namespace) -> int:
    from jaxsim._core.errors import InputError
    from jaxsim.engine.lower import resolve_system
    from jaxsim.spec.scenario import RooflineCost, Scenario

    scenario = Scenario.from_toml("default" if options.scenario is None else options.scenario)
    values = assignments(options.values)
    scenario = scenario.with_values(values) if values else scenario
    if not isinstance(scenario.cost, RooflineCost):
        raise InputError("cost.kind", scenario.to_dict()["cost"]["kind"], "has no lanes to be told apart",
                         "use 'roofline', with a model and a device")
    if scenario.engine.hybrid is not None:
        raise InputError("engine.hybrid", "given", "has lanes of its own, of which this tells none apart",
                         "leave it out, or see `hybrid` in the summary.json of `jaxsim run`")
    if options.context is not None and options.context < 1:
        raise InputError("--context", options.context, "is not a number of tokens", "give 1 or more")
    system = resolve_system(scenario)
    if system.pools:
        raise InputError("cluster.pools", len(system.pools), "are several kinds of engines",
                         "explain a scenario with one of them")
    context = min(DEFAULT_CONTEXT, system.max_model_len) if options.context is None else options.context
    if context > system.max_model_len:
        raise InputError("--context", context, f"is more than max_model_len = {system.max_model_len:,}",
                         "lower it, or raise engine.max_model_len")
    keep_programs()
    find_devices()
    found = _lanes(scenario, system, context)
    if options.json:
        import json

        print(json.dumps(found, indent=2))
        return 0
    from jaxsim.io.listing import print_groups

    print_groups({found["system"]: found["batches"]})
    sys.stdout.write("\n" + "\n".join(_sentences(found)) + "\n")
    return 0


def _lanes(scenario: Any, system: Any, context: int) -> dict[str, Any]:
    """The answer as plain numbers."""
    from jaxsim.analytic.host_device import decode_lanes
    from jaxsim.cost.rank import CUDA_GRAPHS
    from jaxsim.engine.lower.hybrid import price

    s = system.scheduler
    model = price(scenario, s, system.model, system.device, system.plan)
    most = s.max_batch_seqs
    batches = [1 << i for i in range(most.bit_length())]
    batches += [most] if batches[-1] != most else []
    lanes = decode_lanes(model, batches, context, cuda_graphs=CUDA_GRAPHS[s.cudagraph_mode],
                         async_scheduling=s.async_scheduling)
    ranks = f" x {system.plan.num_devices}" if system.plan.num_devices > 1 else ""
    rows = [{"batch": n, "serial ms": round(1e3 * serial, 3), "launches ms": round(1e3 * launch, 3),
             "device ms": round(1e3 * device, 3), "iteration ms": round(1e3 * whole, 3),
             "limits": "launches" if n in lanes.host_bound else "device"}
            for n, serial, launch, device, whole in zip(batches, lanes.serial_s, lanes.launch_s, lanes.device_s,
                                                        lanes.seconds, strict=True)]
    return {"system": f"{system.model.name}, {system.device.name}{ranks}, decodes of {context:,} tokens",
            "cudagraph_mode": s.cudagraph_mode, "async_scheduling": bool(s.async_scheduling),
            "kernels": lanes.num_kernels, "launch_kernel_us": round(1e6 * float(model.launch_kernel_s), 3),
            "host_bound_batches": list(lanes.host_bound),
            "serial_bound_batches": [n for n, serial, launch, device in zip(
                batches, lanes.serial_s, lanes.launch_s, lanes.device_s, strict=True) if serial > max(launch, device)],
            "batches": rows}


def _sentences(found: dict[str, Any]) -> list[str]:
    graphs = ("every kernel is launched" if found["cudagraph_mode"] == "none"
              else f"decodes are captured in graphs ({found['cudagraph_mode']})")
    bound, serial = found["host_bound_batches"], found["serial_bound_batches"]
    limits = (f"launches take longer than the device at batches {', '.join(map(str, bound))}" if bound
              else "the device takes longer than the launches at every batch")
    if serial:
        limits += f"; serial work of the host takes longer than both at batches {', '.join(map(str, serial))}"
    return [f"{found['kernels']:,} kernels an iteration, {found['launch_kernel_us']:g} us of the host each; {graphs}",
            limits]
