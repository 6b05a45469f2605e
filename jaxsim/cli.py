"""The `jaxsim` command.

Imports are inside the commands, so that `--help` and `--version` answer at once. Exit status: 0, 2 for a
mistake of the user or a place that cannot be written to (one line on standard error), 3 for a simulation that a
bound stopped, 130 for Ctrl-C.
"""

import argparse
import contextlib
import difflib
import os
import re
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jaxsim.calibrate.command import add_parser as add_calibrate
from jaxsim.planning.command import add_parser as add_plan
from jaxsim.planning.place_command import add_parser as add_place
from jaxsim.reproduce.command import add_parser as add_reproduce
from jaxsim.study.command import add_parser as add_sweep
from jaxsim.study.goodput_command import add_parser as add_goodput
from jaxsim.study.plot_command import add_parser as add_plot
from jaxsim.validate.command import add_parser as add_validate

USER_ERROR, STOPPED, INTERRUPTED = 2, 3, 130

_DISTRIBUTION = "jaxsim-serving"

_FILES = ("summary.json", "requests.parquet", "timeline.json", "latency.png", "load.png", "requests.png")

_made: list[Path] = []
"""Folders made by this process, the inner ones last."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status. Without arguments it takes those of the process, and its Ctrl-C."""
    if arguments is None:
        _leave_on_interrupt()
    try:
        options = _parser().parse_args(arguments)
        if sys.stdout is None:
            return _fail("standard output is closed; send it to a file or to /dev/null")
        if options.command is None:
            _parser().print_help()
            return USER_ERROR
        from jaxsim._core.errors import InputError

        try:
            status = options.command(options)
            sys.stdout.flush()
            return status
        except InputError as error:
            return _fail(str(error))
    except KeyboardInterrupt:
        _say(f"jaxsim: interrupted{_hint}")
        return INTERRUPTED
    except BrokenPipeError:
        _drop_output()
        return 0
    except OSError as error:
        # Python's own streams carry no file name.
        if error.filename is None:
            _drop_output()
        return _fail(f"{error.filename or 'standard output'}: {error.strerror or error};"
                     " make room, or choose another place")
    finally:
        _remove_empty_folders()


def _say(text: str) -> None:
    # Without a standard error print would turn to standard output.
    if sys.stderr is not None:
        with contextlib.suppress(OSError):
            print(text, file=sys.stderr, flush=True)


def _fail(message: str) -> int:
    _say(f"jaxsim: error: {message}")
    return USER_ERROR


def _drop_output() -> None:
    """Standard output leads nowhere from here on: Python would complain again when it flushes at exit."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _remove_empty_folders() -> None:
    while _made:
        with contextlib.suppress(OSError):
            _made.pop().rmdir()


_hint = ""
"""What to say after an interruption."""


def _leave_on_interrupt() -> None:
    """Let Ctrl-C end the process at once, whatever it is doing.

    An exception would wait for the end of a compilation or a simulation, come out of half an import as another
    error, and leave compiled code to be torn down under its own threads.
    """
    if threading.current_thread() is not threading.main_thread() or (
            signal.getsignal(signal.SIGINT) is not signal.default_int_handler):
        return
    read, write = os.pipe()
    os.set_blocking(write, False)

    def watch() -> None:
        # Other signals with a handler of Python's write here too.
        while os.read(read, 1) != bytes([signal.SIGINT]):
            pass
        _remove_empty_folders()
        with contextlib.suppress(OSError):
            os.write(2, f"jaxsim: interrupted{_hint}\n".encode())
        os._exit(INTERRUPTED)

    signal.signal(signal.SIGINT, lambda *_: None)
    signal.set_wakeup_fd(write)
    threading.Thread(target=watch, daemon=True).start()


class _Parser(argparse.ArgumentParser):
    """One line for a mistake, with what was probably meant."""

    def error(self, message: str) -> Any:
        message = " ".join(message.split())
        unknown = re.fullmatch(r"unrecognized arguments: (.*)", message)
        remedy = f"see `{self.prog} --help`"
        if unknown:
            first = unknown.group(1).split()[0]
            near = difflib.get_close_matches(first.partition("=")[0], _option_names(self), n=1)
            message = f"unknown argument {unknown.group(1)}"
            remedy = f"did you mean {near[0]}?" if near else "see --help of the command"
        self.exit(_fail(f"{message}; {remedy}"))


def _option_names(parser: argparse.ArgumentParser) -> Iterator[str]:
    for action in parser._actions:
        yield from action.option_strings
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                yield from _option_names(inner)


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any, **__: Any) -> None:
        from importlib import metadata

        try:
            version = metadata.version(_DISTRIBUTION)
        except metadata.PackageNotFoundError:
            version = "unknown"
        print(f"jaxsim {version}")
        parser.exit()


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="jaxsim", description="Simulate an LLM serving system under a workload, exactly and fast.",
        epilog="jaxsim run simulates the embedded default scenario; jaxsim COMMAND --help tells more.")
    parser.add_argument("--version", nargs=0, action=_Version, help="print the version and exit")
    parser.set_defaults(command=None)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")

    run = commands.add_parser(
        "run", help="simulate a scenario, print its table, write its files",
        description="Simulate a scenario over several seeds; print a table and write summary.json,"
                    " requests.parquet and plots.",
        epilog="exit status: 0 done, 2 an input that cannot be used or a place that cannot be written to, 3 a bound"
               " stopped the simulation, 130 interrupted")
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

    show = commands.add_parser("list", help="list models, devices, policies, scenarios or studies",
                               description="List what a scenario may name.")
    show.add_argument("what", choices=("models", "devices", "policies", "scenarios", "studies"))
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

    add_sweep(commands).set_defaults(command=_sweep)
    add_goodput(commands).set_defaults(command=_goodput)
    add_plan(commands).set_defaults(command=_plan)
    add_place(commands).set_defaults(command=_place)
    add_plot(commands)
    add_validate(commands).set_defaults(command=_validate)
    add_calibrate(commands).set_defaults(command=_calibrate)
    add_reproduce(commands).set_defaults(command=_reproduce)

    bench = commands.add_parser("bench", help="measure how fast the simulator is",
                                description="Measure how fast the simulator is on this machine.")
    bench.add_argument("--suite", choices=("engine", "sweeps"), default="engine",
                       help="the compiled loop on one core, or whole sweeps on all of them (default: engine)")
    bench.add_argument("--quick", action="store_true", help="fewer and shorter: the engine within 90 seconds")
    bench.add_argument("--json", action="store_true", help="print JSON and nothing else on standard output")
    bench.set_defaults(command=_bench)

    schema = commands.add_parser("schema", help="print the JSON schema of scenario files",
                                 description="Print the JSON schema of scenario files.")
    schema.set_defaults(command=_schema)
    return parser


# ---- scenarios


def _assignments(items: list[str]) -> dict[str, Any]:
    """Fields and values of --set."""
    from jaxsim._core.errors import InputError
    from jaxsim.spec.toml import parse_value

    values: dict[str, Any] = {}
    for item in items:
        field, equals, text = item.partition("=")
        if not equals or not field.strip():
            raise InputError("--set", item, "is not FIELD=VALUE", "write e.g. --set engine.max_num_seqs=64")
        values[field.strip()] = parse_value(text.strip()) if text.strip() else None
    return values


def _chosen(options: argparse.Namespace) -> Any:
    """The scenario with everything the command line says about it."""
    from jaxsim.spec.scenario import Scenario

    scenario = Scenario.from_toml("default" if options.scenario is None else options.scenario)
    if options.from_vllm is not None:
        scenario = _from_vllm(scenario, options.from_vllm)
    if options.trace is not None:
        tree = scenario.to_dict()
        kept = {k: v for k, v in tree["workload"].items() if k in ("seed", "tenants")}
        tree["workload"] = {"kind": "trace", "trace": options.trace, **kept}
        tree["name"] = Path(options.trace).name.partition(".")[0]
        tree["description"] = f"replay of {options.trace}"
        # A replay is the same in every run, unless something is drawn on top of it.
        tree["num_seeds"] = 1
        scenario = Scenario.from_dict(tree)
    values = _assignments(options.values)
    if options.seeds is not None:
        values["num_seeds"] = options.seeds
    return scenario.with_values(values) if values else scenario


def _from_vllm(scenario: Any, line: str) -> Any:
    """The scenario with model and engine of a `vllm serve` line."""
    from jaxsim.spec.scenario import FittedCost, Scenario
    from jaxsim.spec.vllm import import_vllm

    tree = scenario.to_dict()
    base = {k: v for k, v in tree.items() if k not in ("model", "device", "engine", "name", "description")}
    if isinstance(scenario.cost, FittedCost):
        warnings.warn("the fitted coefficients of the scenario are of another model: the roofline is used instead",
                      stacklevel=2)
        del base["cost"]
    if scenario.device is None:
        warnings.warn("the scenario names no device: h100 is used (--set device.name=...)", stacklevel=2)
    preset = scenario.engine.preset
    imported = import_vllm(line, device=scenario.device.name if scenario.device else "h100",
                           base={"name": "from-vllm", **base},
                           preset=preset if preset.startswith("vllm") else "vllm-v1").to_dict()
    return Scenario.from_dict({**imported, "device": tree.get("device", imported["device"])})


# ---- commands


def _run(options: argparse.Namespace) -> int:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        scenario = _chosen(options)
    for warning in caught:
        _say(f"jaxsim: note: {warning.message}")
    # A name is a label and may hold anything; its folder stays inside results.
    label = "-".join(re.findall(r"[\w.-]*\w", scenario.name)) or "scenario"
    folder = _folder(f"results/{label}" if options.out is None else options.out)

    # Only now: what is wrong with the scenario is told before JAX is loaded.
    _keep_programs()
    _find_devices()
    from jaxsim.engine.simulate import simulate
    from jaxsim.io import result as files

    start = time.perf_counter()
    result = simulate([scenario], record_steps=True)
    elapsed_s = time.perf_counter() - start
    try:
        files.clear(folder)
        written = [files.write_summary(result, folder / "summary.json"),
                   files.write_requests(result, folder / "requests.parquet")]
        if options.timeline:
            from jaxsim.io.timeline import write_timeline

            written.append(write_timeline(result.lanes[0][0], folder / "timeline.json"))
        if not options.no_plots:
            from jaxsim.io.plots import plot_all

            written += plot_all(result, folder)
    except OSError as error:
        return _fail(f"{error.filename or folder}: cannot be written ({error.strerror or error}); make room, or give"
                     " another folder with --out")
    if options.json:
        sys.stdout.write(files.to_json(files.summary(result)))
    else:
        from jaxsim.io.table import print_summary

        print_summary(result)
        total = sum(lane.num_requests for lane in result.lanes[0])
        print(f"\n{total:,} requests simulated in {elapsed_s:.1f} s, compilation included\n{folder}{os.sep}: "
              + ", ".join(path.name for path in written))
    if result.faults:
        _say(f"jaxsim: stopped before the end: {'; '.join(result.faults)}")
        return STOPPED
    return 0


def _keep_programs() -> None:
    """Keep compiled programs between runs, in the user's cache folder, unless JAX was told where to."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(home) / "jaxsim"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
    # XLA takes two tuning hints for processor features and calls every program it loads foreign. JAX itself leaves a 1
    # to its children.
    if os.environ.get("TF_CPP_MIN_LOG_LEVEL", "1") == "1":
        os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"


def _find_devices() -> None:
    """Let JAX look for its devices now. Raises `InputError` where it finds none."""
    import jax

    from jaxsim._core.errors import InputError

    try:
        jax.devices()
    except RuntimeError as error:
        raise InputError("JAX_PLATFORMS", os.environ.get("JAX_PLATFORMS"),
                         f"JAX cannot start ({str(error).splitlines()[0]})",
                         "set the environment variable JAX_PLATFORMS=cpu, or unset it") from None


def _folder(name: str, files: Sequence[str] = _FILES) -> Path:
    """The folder, made if need be. Raises `InputError` where it or a file in it cannot be written."""
    from jaxsim._core.errors import InputError

    folder, another = Path(name), "give another folder"
    if not name:
        raise InputError("--out", name, "is not a folder", another)
    try:
        for part in reversed((folder, *folder.parents)):
            if not part.exists():
                part.mkdir(exist_ok=True)
                _made.append(part)
        is_folder = folder.is_dir() and os.access(folder, os.W_OK)
    except OSError:
        is_folder = False
    if not is_folder:
        raise InputError("--out", name, "cannot be written", another)
    for path in (folder / file for file in files):
        if path.exists() and not (path.is_file() and os.access(path, os.W_OK)):
            raise InputError("--out", name, f"{path.name} in it cannot be replaced", f"remove it, or {another}")
    return folder


def _list(options: argparse.Namespace) -> int:
    if options.markdown:
        from jaxsim.spec.presets import markdown

        if options.what != "policies":
            return _fail(f"--markdown: there is no such page of {options.what}; leave it out")
        sys.stdout.write(markdown())
        return 0
    groups = {"models": _models, "devices": _devices, "policies": _policies,
              "scenarios": _scenarios, "studies": _studies}[options.what]()
    if options.json:
        import json

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
    from jaxsim.spec.scenario import Scenario, shipped_scenarios

    return {"scenarios": [{"scenario": name, "shows": Scenario.named(name).description}
                          for name in shipped_scenarios()]}


def _studies() -> dict[str, list[dict[str, Any]]]:
    from jaxsim.study.study import Study, shipped_studies

    return {"studies": [{"study": name, "asks": Study.from_toml(name).description} for name in shipped_studies()]}


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
        _say(f"jaxsim: note: {warning.message}")
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
    _find_devices()
    from jaxsim.profiles import importing, native

    profile = importing.import_profile(options.format, options.files, model=model, device=device, plan=plan,
                                       options=named)
    native.write(profile, out)
    for note in profile.provenance.get("notes", []):
        _say(f"jaxsim: note: {note}")
    points = sum(len(table.seconds) for table in profile.tables.values())
    print(f"{out}: {len(profile.tables)} operators, {points:,} points, {profile.model} on {profile.device}"
          + (f" x {plan.tensor_parallel_size}" if plan.tensor_parallel_size > 1 else ""))
    lacking = importing.not_measured(profile, importing.base_of(profile, model, device, plan))
    if lacking:
        print(f"not measured, priced by the roofline: {', '.join(lacking)}")
    return 0


def _sweep(options: argparse.Namespace) -> int:
    global _hint
    from jaxsim.study.command import run

    _hint = "; finished tiles are kept, the same command goes on from there"
    _keep_programs()
    _find_devices()
    label = "-".join(re.findall(r"[\w.-]*\w", Path(options.study).stem)) or "study"
    run(options, _assignments(options.values), Path(f"results/{label}" if options.out is None else options.out))
    return 0


def _goodput(options: argparse.Namespace) -> int:
    from jaxsim.study.goodput_command import run

    _keep_programs()
    _find_devices()
    run(options, _assignments(options.values))
    return 0


def _plan(options: argparse.Namespace) -> int:
    from jaxsim.planning.command import run

    _keep_programs()
    _find_devices()
    run(options, _assignments(options.values))
    return 0


def _place(options: argparse.Namespace) -> int:
    from jaxsim.planning.place_command import run

    _keep_programs()
    _find_devices()
    run(options, _assignments(options.values))
    return 0


def _validate(options: argparse.Namespace) -> int:
    from jaxsim.validate.command import FILES, run, system

    scenario, values = system(options), _assignments(options.values)
    if values:
        scenario = scenario.with_values(values)
    label = re.sub(r"[^\w.-]+", "-", (scenario.name if scenario else "") or "points").strip("-.") or "scenario"
    folder = _folder(f"results/validate-{label}" if options.out is None else options.out, FILES)
    _keep_programs()
    _find_devices()
    try:
        return STOPPED if run(options, scenario, folder) else 0
    except BrokenPipeError:
        raise
    except OSError as error:
        return _fail(f"{error.filename or folder}: cannot be written ({error.strerror or error}); make room, or give"
                     " another folder with --out")


def _calibrate(options: argparse.Namespace) -> int:
    from jaxsim.calibrate.command import run

    _keep_programs()
    _find_devices()
    try:
        return run(options)
    except BrokenPipeError:
        raise
    except OSError as error:
        return _fail(f"{error.filename or options.output}: cannot be written ({error.strerror or error}); make room, or"
                     " give another folder with --output")


def _reproduce(options: argparse.Namespace) -> int:
    from jaxsim.reproduce.command import chosen, files, run

    names = chosen(options)
    folder = _folder("results/reproduce" if options.out is None else options.out,
                     [file for name in names for file in files(name)])
    _keep_programs()
    _find_devices()
    run(options, names, folder)
    return 0


def _bench(options: argparse.Namespace) -> int:
    if options.suite == "sweeps":
        from jaxsim.bench.sweeps import command
    else:
        from jaxsim.bench.engine import command

    return command(options.quick, options.json)


def _schema(_: argparse.Namespace) -> int:
    import json

    from jaxsim.spec.scenario import json_schema

    print(json.dumps(json_schema(), indent=2))
    return 0
