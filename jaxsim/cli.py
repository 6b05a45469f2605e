"""The `jaxsim` command.

Imports are inside the commands, so that `--help` and `--version` answer at once. Exit status: 0, 2 for a
mistake of the user (one line on standard error), 3 for a simulation that a bound stopped, 130 for Ctrl-C.
"""

import argparse
import contextlib
import json
import os
import re
import sys
import time
import warnings
from collections.abc import Sequence
from importlib import metadata, resources
from pathlib import Path
from typing import Any

USER_ERROR, STOPPED, INTERRUPTED = 2, 3, 130

_DISTRIBUTION = "jaxsim-serving"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.command is None:
        parser.print_help()
        return USER_ERROR
    from jaxsim._core.errors import InputError

    try:
        return options.command(options)
    except InputError as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        print("jaxsim: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of a pipe left; Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _fail(message: str) -> int:
    print(f"jaxsim: error: {message}", file=sys.stderr)
    return USER_ERROR


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any, **__: Any) -> None:
        try:
            version = metadata.version(_DISTRIBUTION)
        except metadata.PackageNotFoundError:
            version = "unknown"
        print(f"jaxsim {version}")
        parser.exit()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="jaxsim", description="Simulate an LLM serving system under a workload, exactly and fast.",
        epilog="jaxsim run simulates the embedded default scenario; jaxsim COMMAND --help tells more.")
    parser.add_argument("--version", nargs=0, action=_Version, help="print the version and exit")
    parser.set_defaults(command=None)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")

    run = commands.add_parser(
        "run", help="simulate a scenario, print its table, write its files",
        description="Simulate a scenario over several seeds; print a table and write summary.json,"
                    " requests.parquet and plots.",
        epilog="exit status: 0 done, 2 an input that cannot be used, 3 a bound stopped the simulation")
    run.add_argument("scenario", nargs="?", metavar="SCENARIO",
                     help="a scenario file, or a name of `jaxsim list scenarios` (default: default)")
    run.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", dest="values",
                     help="replace a field, e.g. --set engine.max_num_seqs=64 (repeatable; an empty value is"
                          " the default)")
    run.add_argument("--trace", metavar="FILE", help="replay this trace instead of the scenario's workload")
    run.add_argument("--seeds", type=int, metavar="N", help="independent runs (default: the scenario's, 8)")
    run.add_argument("--out", metavar="DIR", help="folder for the files (default: results/NAME)")
    run.add_argument("--no-plots", action="store_true", help="do not draw the plots")
    run.add_argument("--timeline", action="store_true", help="also write timeline.json for ui.perfetto.dev")
    run.add_argument("--json", action="store_true",
                     help="print summary.json and nothing else on standard output")
    run.add_argument("--from-vllm", metavar="COMMAND",
                     help="take model and engine from a `vllm serve ...` line, the rest from the scenario")
    run.set_defaults(command=_run)

    show = commands.add_parser("list", help="list models, devices, policies or scenarios",
                               description="List what a scenario may name.")
    show.add_argument("what", choices=("models", "devices", "policies", "scenarios"))
    form = show.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON")
    form.add_argument("--markdown", action="store_true",
                      help="print the page docs/schedulers.md (policies only)")
    show.set_defaults(command=_list)

    vllm = commands.add_parser(
        "import-vllm", help="turn a `vllm serve ...` line into a scenario file",
        description="Turn a `vllm serve ...` line into a scenario file on standard output.",
        epilog="example: jaxsim import-vllm --device h100 -- vllm serve MODEL --max-num-seqs 64")
    vllm.add_argument("line", nargs="+", metavar="COMMAND", help="the line, quoted or after --")
    vllm.add_argument("--device", default="h100", help="what it runs on (default: h100)")
    vllm.add_argument("--preset", default="vllm-v1", help="engine version imitated (default: vllm-v1)")
    vllm.set_defaults(command=_import_vllm)

    bench = commands.add_parser("bench", help="measure how fast the simulator is",
                                description="Measure how fast the simulator is on this machine.")
    bench.add_argument("--quick", action="store_true", help="end within 90 seconds")
    bench.add_argument("--json", action="store_true", help="print JSON and nothing else on standard output")
    bench.set_defaults(command=_bench)

    schema = commands.add_parser("schema", help="print the JSON schema of scenario files",
                                 description="Print the JSON schema of scenario files.")
    schema.set_defaults(command=_schema)
    return parser


# ---- scenarios


def _shipped() -> dict[str, Any]:
    """Scenario files that come with the package, by name."""
    folder = resources.files("jaxsim.scenarios")
    files = sorted((f for f in folder.iterdir() if f.name.endswith(".toml")), key=lambda f: f.name)
    return {f.name.removesuffix(".toml"): f for f in files}


def _load(name: str) -> Any:
    from jaxsim._core.errors import InputError, suggest
    from jaxsim.spec.scenario import Scenario

    shipped = _shipped()
    if name in shipped and not Path(name).is_file():
        with resources.as_file(shipped[name]) as path:
            return Scenario.from_toml(path)
    if not name.endswith(".toml") and not Path(name).exists():
        raise InputError("scenario", name, "no such file, and no scenario of that name",
                         suggest(name, shipped))
    return Scenario.from_toml(name)


def _chosen(options: argparse.Namespace) -> Any:
    """The scenario with everything the command line says about it."""
    from jaxsim._core.errors import InputError
    from jaxsim.spec.scenario import Scenario
    from jaxsim.spec.toml import parse_value
    from jaxsim.spec.vllm import import_vllm

    scenario = _load(options.scenario or "default")
    if options.from_vllm:
        tree = scenario.to_dict()
        replaced = ("model", "device", "engine", "name", "description")
        base = {k: v for k, v in tree.items() if k not in replaced}
        preset = tree.get("engine", {}).get("preset", "vllm-v1")
        device = scenario.device.name if scenario.device else "h100"
        scenario = import_vllm(options.from_vllm, device=device, base={"name": "from-vllm", **base},
                               preset=preset if preset.startswith("vllm") else "vllm-v1")
    if options.trace:
        tree = scenario.to_dict()
        kept = {k: v for k, v in tree["workload"].items() if k in ("seed", "tenants")}
        tree["workload"] = {"kind": "trace", "trace": options.trace, **kept}
        # A replay is the same in every run, unless something is drawn on top of it.
        tree["num_seeds"] = 1
        scenario = Scenario.from_dict(tree)
    values: dict[str, Any] = {}
    for item in options.values:
        field, equals, text = item.partition("=")
        if not equals or not field.strip():
            raise InputError("--set", item, "is not FIELD=VALUE", "write e.g. --set engine.max_num_seqs=64")
        values[field.strip()] = parse_value(text.strip()) if text.strip() else None
    if options.seeds is not None:
        values["num_seeds"] = options.seeds
    return scenario.with_values(values) if values else scenario


# ---- commands


def _run(options: argparse.Namespace) -> int:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        scenario = _chosen(options)
    for warning in caught:
        print(f"jaxsim: note: {warning.message}", file=sys.stderr)
    # A name is a label and may hold anything; its folder stays inside results.
    label = "-".join(re.findall(r"[\w.-]*\w", scenario.name)) or "scenario"
    folder = _folder(options.out or f"results/{label}")
    if folder is None:
        return _fail(f"--out = {options.out or label!r}: cannot be written; give another folder")

    # Only now: what is wrong with the scenario is told before JAX is loaded.
    _keep_programs()
    from jaxsim._core.errors import InputError
    from jaxsim.engine.simulate import simulate
    from jaxsim.io import result as files

    start = time.perf_counter()
    try:
        result = simulate([scenario], record_steps=True)
    except InputError:
        # Nothing was simulated: leave no empty folders behind.
        with contextlib.suppress(OSError):
            os.removedirs(folder)
        raise
    elapsed_s = time.perf_counter() - start
    written = [files.write_summary(result, folder / "summary.json"),
               files.write_requests(result, folder / "requests.parquet")]
    if options.timeline:
        from jaxsim.io.timeline import write_timeline

        written.append(write_timeline(result.lanes[0][0], folder / "timeline.json"))
    if not options.no_plots:
        from jaxsim.io.plots import plot_all

        written += plot_all(result, folder)
    if options.json:
        sys.stdout.write(files.to_json(files.summary(result)))
    else:
        from jaxsim.io.table import print_summary

        print_summary(result)
        total = sum(lane.num_requests for lane in result.lanes[0])
        print(f"\n{total:,} requests simulated in {elapsed_s:.1f} s, compilation included\n{folder}{os.sep}: "
              + ", ".join(path.name for path in written))
    sys.stdout.flush()
    if result.faults:
        print(f"jaxsim: stopped before the end: {'; '.join(result.faults)}", file=sys.stderr)
        return STOPPED
    return 0


def _keep_programs() -> None:
    """Keep compiled programs between runs, in the user's cache folder, unless JAX was told where to."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(home) / "jaxsim"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
    # XLA takes two tuning hints for processor features and calls every program it loads foreign.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


def _folder(name: str) -> Path | None:
    """The folder, made if need be; None where that or writing into it is impossible."""
    folder = Path(name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return folder if os.access(folder, os.W_OK) else None


def _list(options: argparse.Namespace) -> int:
    if options.markdown:
        from jaxsim.spec.presets import markdown

        if options.what != "policies":
            return _fail(f"--markdown: there is no such page of {options.what}; leave it out")
        sys.stdout.write(markdown())
        return 0
    groups = {"models": _models, "devices": _devices, "policies": _policies,
              "scenarios": _scenarios}[options.what]()
    if options.json:
        print(json.dumps(groups, indent=2))
        return 0
    from jaxsim.io.listing import print_groups

    print_groups(groups)
    return 0


def _models() -> dict[str, list[dict[str, Any]]]:
    from jaxsim.spec.model import model_catalogue

    return {"models": [
        {"name": m.name, "also": [m.name.split("/")[-1].lower(), *m.aliases], "layers": m.layers,
         "experts": f"{m.experts_per_token} of {m.experts}" if m.experts else "-", "limit": m.max_position,
         "dtype": m.dtype}
        for m in model_catalogue().values()]}


def _devices() -> dict[str, list[dict[str, Any]]]:
    from jaxsim.spec.device import device_catalogue

    def scaled(value: float | None, unit: float) -> float | None:
        return None if value is None else round(value / unit, 1)

    return {"devices": [
        {"name": d.name, "also": list(d.aliases), "memory GiB": scaled(d.memory_bytes, 2**30),
         "GB/s": scaled(d.memory_bytes_per_s, 1e9), "bf16 TFLOP/s": scaled(d.bf16_flops, 1e12),
         "fp8 TFLOP/s": scaled(d.fp8_flops, 1e12), "link GB/s": scaled(d.link_bytes_per_s, 1e9)}
        for d in device_catalogue().values()]}


def _policies() -> dict[str, list[dict[str, Any]]]:
    from jaxsim.policy import routing
    from jaxsim.spec.presets import all_presets

    presets = [{"preset": p.name, "also": list(p.aliases), "imitates": f"{p.engine}, {p.version}",
                "valid for": p.validity, "leaves out": list(p.leaves_out), "unconfirmed": list(p.unconfirmed)}
               for p in all_presets()]
    routers = [{"router": name, "rule": (cls.__doc__ or "").splitlines()[0]}
               for name, cls in routing.routers().items()]
    return {"schedulers (engine.preset)": presets, "routers (cluster.router)": routers}


def _scenarios() -> dict[str, list[dict[str, Any]]]:
    rows = []
    for name in _shipped():
        scenario = _load(name)
        rows.append({"scenario": name, "shows": scenario.description})
    return {"scenarios": rows}


def _import_vllm(options: argparse.Namespace) -> int:
    import shlex

    from jaxsim.spec.vllm import import_vllm

    line = options.line[0] if len(options.line) == 1 else shlex.join(options.line)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        scenario = import_vllm(line, device=options.device, preset=options.preset)
    for warning in caught:
        print(f"jaxsim: note: {warning.message}", file=sys.stderr)
    sys.stdout.write(scenario.to_toml())
    return 0


def _bench(options: argparse.Namespace) -> int:
    from jaxsim.bench import command

    return command(options.quick, options.json)


def _schema(_: argparse.Namespace) -> int:
    from jaxsim.spec.scenario import json_schema

    print(json.dumps(json_schema(), indent=2))
    return 0
