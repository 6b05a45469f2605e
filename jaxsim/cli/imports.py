"""`jaxsim import-vllm` and `jaxsim import-profile`: what is written elsewhere, as files that scenarios are made of."""

import argparse
import os
import sys
import warnings
from pathlib import Path

from jaxsim.cli.process import find_devices, say


def add_parsers(commands: "argparse._SubParsersAction") -> None:
    """The commands among the others."""
    vllm = commands.add_parser(
        "import-vllm", help="turn a `vllm serve ...` line into a scenario file",
        description="Turn a `vllm serve ...` line into a scenario file on standard output.",
        epilog="example: jaxsim import-vllm --device h100 -- vllm serve MODEL --max-num-seqs 64")
    vllm.add_argument("line", nargs="+", metavar="COMMAND", help="the line, quoted or after --")
    vllm.add_argument("--device", default="h100", help="what it runs on (default: h100)")
    vllm.add_argument("--preset", default="vllm-v1", help="engine version imitated (default: vllm-v1)")
    vllm.set_defaults(command=_import_vllm)

    profile = commands.add_parser(
        "import-profile", help="turn measured operator times into a profile that scenarios can name",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Turn measured operator times into one file for [cost] kind = \"profiled\", path = FILE.\n\n"
                    "Names of files tell what they hold, or write ROLE=FILE; roles by format:\n"
                    "  llmservingsim   dense, attention, experts, meta, skew\n"
                    "  aiconfigurator  gemm, context_attention, generation_attention, moe, custom_allreduce, nccl,\n"
                    "                  mla_context, mla_generation\n"
                    "  vidur           operators, collectives, cpu_overheads\n"
                    "  plain           one table: operator, its axes, and one of time_s, time_ms, time_us, time_ns",
        epilog="example: jaxsim import-profile llmservingsim dense.csv attention.parquet meta.yaml \\\n"
               "             --model llama-3.1-8b --device rtx_pro_6000 --out llama-8b.parquet")
    profile.add_argument("format", metavar="FORMAT", help="llmservingsim, aiconfigurator, vidur or plain")
    profile.add_argument("files", nargs="+", metavar="FILE", help="a table, or ROLE=FILE")
    profile.add_argument("--model", required=True, metavar="M",
                         help="a name of `jaxsim list models`, or the path of a Hugging Face config.json")
    profile.add_argument("--device", required=True, metavar="D", help="a name of `jaxsim list devices`")
    profile.add_argument("--tensor-parallel-size", type=int, default=1, metavar="N",
                         help="degree whose rows are taken (default: 1)")
    profile.add_argument("--enable-expert-parallel", action="store_true",
                         help="whole experts were spread over the ranks")
    profile.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", dest="options",
                         help="an option of the format's reader, e.g. --option dtype=fp8 (repeatable)")
    profile.add_argument("--out", required=True, metavar="FILE", help="the file written (Parquet)")
    profile.set_defaults(command=_import_profile)


def _import_vllm(options: argparse.Namespace) -> int:
    import shlex

    from jaxsim.spec.vllm import import_vllm

    line = options.line[0] if len(options.line) == 1 else shlex.join(options.line)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        scenario = import_vllm(line, device=options.device, preset=options.preset)
    from jaxsim.engine.lower import resolve_system

    # A line that no machine of that kind could serve is better refused than written down.
    resolve_system(scenario)
    for warning in caught:
        say(f"jaxsim: note: {warning.message}")
    sys.stdout.write(scenario.to_toml())
    return 0


def _import_profile(options: argparse.Namespace) -> int:
    from jaxsim._core.errors import InputError
    from jaxsim.spec.device import load_device
    from jaxsim.spec.model import ModelSpec, load_model
    from jaxsim.spec.plan import Plan
    from jaxsim.spec.toml import parse_value

    named = {}
    for item in options.options:
        name, equals, text = item.partition("=")
        if not equals or not name.strip():
            raise InputError("--option", item, "is not NAME=VALUE", "write e.g. --option dtype=fp8")
        named[name.strip()] = parse_value(text.strip())
    is_config = options.model.endswith(".json")
    model = ModelSpec.from_hf_config(options.model) if is_config else load_model(options.model)
    device = load_device(options.device)
    if options.tensor_parallel_size < 1:
        raise InputError("--tensor-parallel-size", options.tensor_parallel_size, "is not a number of ranks",
                         "give 1 or more")
    plan = Plan(tensor_parallel_size=options.tensor_parallel_size,
                enable_expert_parallel=options.enable_expert_parallel).check(model)
    out = Path(options.out)
    if not out.name or out.is_dir() or not os.access(out.parent, os.W_OK):
        raise InputError("--out", options.out, "cannot be written", "give a file in a folder that is there")
    find_devices()
    from jaxsim.profiles import importing, native

    profile = importing.import_profile(options.format, options.files, model=model, device=device, plan=plan,
                                       options=named)
    native.write(profile, out)
    for note in profile.provenance.get("notes", []):
        say(f"jaxsim: note: {note}")
    points = sum(len(table.seconds) for table in profile.tables.values())
    print(f"{out}: {len(profile.tables)} operators, {points:,} points, {profile.model} on {profile.device}"
          + (f" x {plan.tensor_parallel_size}" if plan.tensor_parallel_size > 1 else ""))
    lacking = importing.not_measured(profile, importing.base_of(profile, model, device, plan))
    if lacking:
        print(f"not measured, priced by the roofline: {', '.join(lacking)}")
    return 0
