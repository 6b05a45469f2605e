"""`jaxsim requirements`: from a use case to the platform that it needs.

Imports are inside the functions, so that the command line answers --help without loading JAX.
"""

import argparse
import sys
from typing import Any

MOST_LINES = 8
"""Devices that do not meet the use case and are printed with their reason; all are in --json."""

SCALES = {"B": ((1e12, "TB"), (1e9, "GB")), "B/s": ((1e12, "TB/s"), (1e9, "GB/s")),
          "FLOP/s": ((1e15, "PFLOP/s"), (1e12, "TFLOP/s")), "s": ((1e-3, "ms"), (1e-6, "us"))}
"""Units a person reads."""


def add_parser(commands: "argparse._SubParsersAction") -> argparse.ArgumentParser:
    """The command among the others."""
    command = commands.add_parser(
        "requirements", help="the platform a use case needs, and which devices meet it",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="What a use case asks of a platform: memory, bandwidth, compute and links, of each device and in\n"
                    "total, in closed form and all together, and which devices of the catalogue meet it, how many of\n"
                    "them. A use case is a model, lengths, a batch and limits: of a scenario, of options, or of both.\n"
                    "Seconds are ideal ones, of peaks and efficiencies: `jaxsim plan` and `jaxsim run` know kernels.",
        epilog="example: jaxsim requirements --model llama-3.1-70b --input 3000 --output 1000 --batch 16 \\\n"
               "             --ttft-ms 500 --tpot-ms 20 --tensor-parallel-size 4\n"
               "exit status: 0 done, whether or not a device meets it; 2 an input that cannot be used")
    command.add_argument("scenario", nargs="?", metavar="SCENARIO",
                         help="a file or a shipped name: its model, formats, degrees, mean lengths and limits, and\n"
                              "as the batch what decodes on average on one of its replicas")
    command.add_argument("--model", metavar="M", help="a name of `jaxsim list models`, or the path of a config.json")
    command.add_argument("--use-case", metavar="NAME",
                         help="lengths, beams and limits of one of GenZ's (docs/requirements.md), which other\n"
                              "options change")
    command.add_argument("--input", type=float, metavar="TOKENS", help="prompt of a request")
    command.add_argument("--output", type=float, metavar="TOKENS", help="output of a request")
    command.add_argument("--batch", type=int, metavar="N", help="requests at once (default: 1, or the scenario's)")
    command.add_argument("--beams", type=int, metavar="N", help="sequences of each request (default: 1)")
    command.add_argument("--prompts", type=int, metavar="N",
                         help="prompts that one pass computes within the TTFT (default: of the whole batch, or\n"
                              "those that a scenario's max_num_batched_tokens hold)")
    command.add_argument("--separate-prompts", action="store_true",
                         help="every beam holds and reads the prompt's KV itself (default: once a request)")
    command.add_argument("--ttft-ms", type=float, metavar="MS", help="limit of the pass over the prompts")
    command.add_argument("--tpot-ms", type=float, metavar="MS", help="limit of an output token")
    command.add_argument("--tensor-parallel-size", type=int, metavar="N", help="ranks of each layer (default: 1)")
    command.add_argument("--pipeline-parallel-size", type=int, metavar="N", help="stages (default: 1)")
    command.add_argument("--data-parallel-size", type=int, metavar="N", help="ranks that share requests (default: 1)")
    command.add_argument("--enable-expert-parallel", action="store_true", help="whole experts on the ranks")
    command.add_argument("--dtype", metavar="FORMAT", help="weights (default: the model's own)")
    command.add_argument("--kv-dtype", metavar="FORMAT", help="KV cache (default: as wide as activations)")
    command.add_argument("--distinct-experts", metavar="HOW",
                         help="experts a pass reads: expected (default), topk (whatever the batch) or all")
    command.add_argument("--compute-efficiency", type=float, metavar="SHARE", help="of peak FLOP/s (default: 0.75)")
    command.add_argument("--memory-efficiency", type=float, metavar="SHARE", help="of peak bandwidth (default: 0.8)")
    command.add_argument("--link-efficiency", type=float, metavar="SHARE",
                         help="of a link's bandwidth (default: 0.75; of a device's PCIe 0.5, between nodes 0.72)")
    command.add_argument("--link-share", type=float, default=0.2, metavar="SHARE",
                         help="of each limit, for links where there are any (default: 0.2)")
    command.add_argument("--device", action="append", dest="devices", metavar="NAME",
                         help="look at this device only (repeatable; default: all accelerators of the catalogue)")
    command.add_argument("--most-devices", type=int, default=1024, metavar="N", help="looked for (default: 1024)")
    command.add_argument("--memory-share", type=float, metavar="SHARE",
                         help="of a device's memory, for weights and cache (default: 0.9, or the scenario's)")
    command.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", dest="values",
                         help="replace a field of the scenario (repeatable)")
    command.add_argument("--json", action="store_true", help="print JSON and nothing else on standard output")
    return command


def run(options: argparse.Namespace, values: dict[str, Any]) -> None:
    """Run the command; `values`: of --set. Raises `InputError`."""
    from jaxsim.analytic.requirements import Efficiencies, needs
    from jaxsim.io.result import plain_rows, to_json
    from jaxsim.planning.platforms import platforms
    from jaxsim.spec.plan import Plan

    use = chosen(options, values)
    given = {name: getattr(options, f"{name}_efficiency") for name in Efficiencies._fields}
    efficiencies = Efficiencies(**{name: value for name, value in given.items() if value is not None})
    found = needs(use, efficiencies=efficiencies, link_share=options.link_share)
    one = found if use.plan == Plan() else needs(use.with_plan(Plan()), efficiencies=efficiencies,
                                                 link_share=options.link_share)
    met = platforms(use, one, options.devices, most_devices=options.most_devices, memory_share=options.memory_share,
                    link_efficiency=options.link_efficiency)
    line = verdict(met)
    if options.json:
        sys.stdout.write(to_json(found.record() | {
            "devices": plain_rows(met.table), "counts": plain_rows(met.counts), "refused": met.refused,
            "verdict": f"{found.verdict}; {line}"}))
        return
    _print(found, met, line)


def chosen(options: argparse.Namespace, values: dict[str, Any]) -> Any:
    """The use case that is asked for. Raises `InputError`."""
    from jaxsim._core.errors import InputError, suggest
    from jaxsim.analytic.requirements import USE_CASES, UseCase, use_case_of
    from jaxsim.spec.model import ModelSpec, load_model
    from jaxsim.spec.plan import Plan
    from jaxsim.spec.scenario import Scenario

    if options.use_case is not None and options.use_case not in USE_CASES:
        raise InputError("--use-case", options.use_case, "is not known", suggest(options.use_case, USE_CASES))
    asked: dict[str, Any] = dict(USE_CASES.get(options.use_case, {}))
    if options.model is not None:
        asked["model"] = (ModelSpec.from_hf_config(options.model) if options.model.endswith(".json")
                          else load_model(options.model))
    for field, flag in (("input_tokens", "input"), ("output_tokens", "output"), ("batch", "batch"), ("beams", "beams"),
                        ("prompts", "prompts"), ("dtype", "dtype"), ("kv_dtype", "kv_dtype"),
                        ("distinct_experts", "distinct_experts")):
        if getattr(options, flag) is not None:
            asked[field] = getattr(options, flag)
    for field in ("ttft", "tpot"):
        if getattr(options, f"{field}_ms") is not None:
            asked[f"{field}_s"] = getattr(options, f"{field}_ms") / 1e3
    if options.separate_prompts:
        asked["shares_prompt"] = False
    degrees = {name: getattr(options, name) for name in
               ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size")
               if getattr(options, name) is not None}
    if options.enable_expert_parallel:
        degrees["enable_expert_parallel"] = True
    if options.scenario is not None:
        scenario = Scenario.from_toml(options.scenario)
        values = dict(values) | {f"engine.{name}": value for name, value in degrees.items()}
        return use_case_of(scenario.with_values(values) if values else scenario, **asked)
    if values:
        raise InputError("--set", next(iter(values)), "has no scenario to change", "name a SCENARIO, or leave it out")
    for field, flag in (("model", "model"), ("input_tokens", "input"), ("output_tokens", "output"),
                        ("ttft_s", "ttft-ms"), ("tpot_s", "tpot-ms")):
        if field not in asked:
            remedy = "give it, or a SCENARIO" + ("" if field == "model" else " or --use-case") + " that has it"
            raise InputError(f"--{flag}", None, "is missing", remedy)
    return UseCase(plan=Plan(**degrees), **asked)


def verdict(met: Any) -> str:
    """One line: which device, how many, and what of it binds."""
    if not len(met.table):
        return "no device that was looked at meets it"
    from jaxsim.io.table import number

    best = met.table.iloc[0]
    count = met.counts.set_index("device").loc[best["device"]]
    names = {"memory": "capacity", "bandwidth": "bandwidth", "compute": "compute"}
    order = sorted(names, key=lambda name: -count[name])
    first, *rest = (f"{number(float(count[name]), 2)}" for name in order)
    others = ", ".join(f"{names[name]} {value}" for name, value in zip(order[1:], rest, strict=True))
    return (f"met by {int(best['devices']):,} x {best['device']} ({best['plan']}); {names[order[0]]} binds: alone it is"
            f" worth {first} of them, {others}")


def amount(value: float | None, unit: str) -> str:
    """A value in a unit that people read."""
    from jaxsim.io.table import number

    if value is None:
        return "-"
    scales = SCALES[unit]
    scale, name = next(((s, n) for s, n in scales if value >= s), scales[-1])
    return f"{number(value / scale)} {name}"


def _print(found: Any, met: Any, line: str) -> None:
    from rich.table import Table

    from jaxsim.io.table import console, number

    use, out = found.use_case, console()
    size = f"{use.batch:,} request{'s' * (use.batch > 1)}" + (f" with {use.beams} beams" if use.beams > 1 else "")
    devices = f"{found.num_devices:,} devices" if found.num_devices > 1 else "one device"
    parameters = number(use.model.num_parameters / 1e9)
    if use.model.experts:
        parameters += f" billion parameters, {number(use.model.num_active_parameters / 1e9)} active"
    else:
        parameters += " billion parameters"
    out.print(f"{use.model.name} in {use.fmt.name}: {parameters}")
    out.print(f"{size} of {use.input_tokens:,.0f} + {use.output_tokens:,.0f} tokens, TTFT {number(1e3 * use.ttft_s)}"
              f" ms, TPOT {number(1e3 * use.tpot_s)} ms")
    for remark in use.remarks:
        out.print(remark)
    table = Table(box=None, pad_edge=False)
    table.add_column("requirement", no_wrap=True)
    for name in ("alone", "each device", f"all {devices}" if found.num_devices > 1 else "in all"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("set by")
    for row in found.rows:
        table.add_row(row.requirement, *(amount(x, row.unit) for x in (row.alone, row.per_device, row.total)),
                      row.bound_by)
    out.print(table)
    shares = found.efficiencies
    out.print(f"of {devices}, of {use.fmt.compute} products; efficiencies: compute {shares.compute:g}, memory"
              f" {shares.memory:g}, link {shares.link:g}; alone: were all else without limit; each device: all"
              " together")
    if len(met.table):
        table = Table(box=None, pad_edge=False)
        table.add_column("device", no_wrap=True)
        table.add_column("plan")
        has_prices = met.table["usd_per_h"].notna().any()
        for name in ("devices", "TTFT ms", "TPOT ms", "memory", *(["$/h"] if has_prices else [])):
            table.add_column(name, justify="right", no_wrap=True)
        for row in met.table.to_dict("records"):
            cells = [f"{row['devices']:,}", number(row["ttft_ms"]), number(row["tpot_ms"]),
                     f"{row['memory_share']:.0%}"]
            table.add_row(row["device"], row["plan"], *cells, *([number(row["usd_per_h"])] if has_prices else []))
        out.print()
        out.print(table)
    if met.refused:
        out.print()
    for index, (name, why) in enumerate(met.refused.items()):
        if index < MOST_LINES:
            out.print(f"{name}: {why}")
    if len(met.refused) > MOST_LINES:
        out.print(f"{len(met.refused) - MOST_LINES} more in --json")
    out.print(f"\n{found.verdict}\nverdict: {line}")
