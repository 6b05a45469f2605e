"""`jaxsim sweep`: a study file to a table.

Imports are inside the functions, so that the command line answers --help without loading JAX.
"""

import argparse
import itertools
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

LINES_EVERY_S = 10.0
"""Between lines of progress where there is no terminal."""


def add_parser(commands: "argparse._SubParsersAction") -> argparse.ArgumentParser:
    """The command among the others."""
    sweep = commands.add_parser(
        "sweep", help="simulate all scenarios of a study, as one table",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Simulate every scenario of a study file and write one table, results.parquet: a row a\n"
                    "scenario, its parameters, its metrics and their 95 % intervals over seeds. A sweep that was\n"
                    "stopped goes on where it was when the same command is given again.",
        epilog="exit status: 0 done, 2 an input that cannot be used or a place that cannot be written to,\n"
               "130 interrupted: finished tiles are kept")
    sweep.add_argument("study", metavar="STUDY", help="a study file (docs/studies.md)")
    sweep.add_argument("--out", metavar="DIR", help="folder of this study's results (default: results/NAME)")
    sweep.add_argument("--dry-run", action="store_true", help="say what would be run, and how large it is, and stop")
    sweep.add_argument("--closed-form", action="store_true",
                       help="means in closed form instead of a simulation; --out is then a table (.csv or .parquet)")
    sweep.add_argument("--executor", default="local", metavar="WHO",
                       help="local (threads), processes:N, or dask:ADDRESS of a scheduler (default: local)")
    sweep.add_argument("--workers", type=int, metavar="N", help="threads of the local executor (default: processors)")
    sweep.add_argument("--runs-a-tile", type=int, metavar="N",
                       help="runs simulated in one batch; fewer take less memory (default: 256)")
    sweep.add_argument("--requests", action="store_true",
                       help="keep every request of every run as well (some 60 bytes each)")
    sweep.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", dest="values",
                       help="replace a field of the scenario that all start from (repeatable)")
    sweep.add_argument("--json", action="store_true", help="print JSON and nothing else on standard output")
    return sweep


def run(options: argparse.Namespace, values: dict[str, Any], folder: Path) -> None:
    """Run the command; `values`: of --set. Raises `InputError`."""
    from jaxsim._core.errors import InputError
    from jaxsim.io.result import to_json
    from jaxsim.study import results, runner
    from jaxsim.study.lanes import Lanes
    from jaxsim.study.plan import RUNS_A_TILE, plan

    check_workers(options.workers)
    if options.runs_a_tile is not None and options.runs_a_tile < 1:
        raise InputError("--runs-a-tile", options.runs_a_tile, "is not a number of runs",
                         "give at least 1, or leave it out")
    study = chosen(options.study, values)
    if options.closed_form:
        for flag, value, default in (("--dry-run", options.dry_run, False), ("--requests", options.requests, False),
                                     ("--executor", options.executor, "local"), ("--workers", options.workers, None),
                                     ("--runs-a-tile", options.runs_a_tile, None)):
            if value != default:
                raise InputError(flag, value, "has no effect with --closed-form, which simulates nothing",
                                 "leave it out")
        _closed_form(study, options)
        return
    start = time.perf_counter()
    is_new = not options.dry_run and not folder.exists()
    with _progress() as progress:
        if not options.dry_run:
            runner.claim(study, folder)
        made = plan(study, Lanes() if options.dry_run else runner.LANES,
                    runs_a_tile=options.runs_a_tile or RUNS_A_TILE,
                    on_point=lambda done: progress("looking at scenarios", done, 0))
        about = runner.estimate(made)
        if made.refusals and len(made.refusals) == len(made.points) and not study.feasible_only:
            if is_new:
                # The folder is another's when the study is mended.
                shutil.rmtree(folder)
            raise InputError(options.study, f"{len(made.points):,} points", "are all refused",
                             f"mend what they have in common; the first: {made.refusals[0].reason}")
        if not options.dry_run:
            kind, _, number = options.executor.partition(":")
            if kind != "dask":
                # A scheduler's workers have memory of their own.
                runner.check_memory(about, int(number) if number.isdecimal() else options.workers)
            with _executor(options.executor) as executor:
                runner.run_tiles(made, folder, executor=executor, workers=options.workers,
                                 with_requests=options.requests, progress=progress)
            path = results.write(made, folder)
    if options.dry_run:
        text = to_json(about) if options.json else "\n".join(_lines(about)) + "\n"
        sys.stdout.write(text)
        return
    about |= {"elapsed_s": round(time.perf_counter() - start, 3), "table": str(path)}
    if options.json:
        sys.stdout.write(to_json(about))
        return
    print("\n".join(_lines(about)))
    for refusal in made.refusals[:3]:
        print(f"refused: point {refusal.point}: {refusal.reason}")
    if len(made.refusals) > 3:
        where = "left out of the table" if study.feasible_only else "in the column `refused`"
        print(f"refused: {len(made.refusals) - 3:,} more, {where}")
    print(f"{path}: {len(made.points) - (len(made.refusals) if study.feasible_only else 0):,} rows")


def _closed_form(study: Any, options: argparse.Namespace) -> None:
    """Print the table of `closed_form`, or write it. Raises `InputError`."""
    from jaxsim._core.errors import InputError
    from jaxsim.io.result import to_json
    from jaxsim.io.table import console, number
    from jaxsim.study.closed_form import closed_form

    out = None if options.out is None else Path(options.out)
    if out is not None and (out.suffix not in (".csv", ".parquet") or not out.parent.is_dir()):
        raise InputError("--out", options.out, "is no table in a folder that is there",
                         "give a name that ends in .csv or .parquet")
    start = time.perf_counter()
    frame, programs = closed_form(study)
    if out is not None:
        frame.to_csv(out, index=False) if out.suffix == ".csv" else frame.to_parquet(out, index=False)
    refused = int(frame["refused"].notna().sum())
    about = {"points": len(frame), "refused": refused, "programs": programs,
             "elapsed_s": round(time.perf_counter() - start, 3)}
    if options.json:
        rows = frame.astype(object).where(frame.notna(), None).to_dict("records")
        sys.stdout.write(to_json(about | {"rows": rows}))
        return
    from rich.table import Table

    shown = Table(box=None, pad_edge=False)
    varied = [name for name in frame.columns[:frame.columns.get_loc("refused")] if name not in ("plan", "devices")]
    # Of a plan its label tells.
    varied = [name for name in varied if not name.startswith("engine.") or not any(
        part in name for part in ("parallel", "eplb", "redundant"))]
    shown.add_column("plan")
    for name in (*(name.split(".")[-1] for name in varied), "devices", "TTFT", "TPOT", "req/s", "tok/s a device",
                 "$/M"):
        shown.add_column(name, justify="right")
    able = frame[frame["refused"].isna()].sort_values("output_tokens_per_s_per_device", ascending=False)
    for row in able.to_dict("records"):
        shown.add_row(row["plan"], *(str(row[name]) for name in varied), str(row["devices"]), *(
            number(row[name]) for name in ("ttft_ms", "tpot_ms", "rate_within_limits", "output_tokens_per_s_per_device",
                                           "usd_per_million_output_tokens")))
    console().print(shown)
    console().print("TTFT, TPOT: means at the study's rate, ms; req/s: the highest rate that keeps means within limits,"
                    " and output tokens/s a device and dollars a million of them there; all in closed form")
    for reason, count in frame["refused"].value_counts().head(3).items():
        print(f"refused: {count} x {reason}")
    print(f"{len(frame):,} points, {refused:,} of them refused; {programs} program{'s' * (programs > 1)};"
          f" {about['elapsed_s']:,.1f} s")


def check_workers(workers: int | None) -> None:
    """Raises `InputError`."""
    from jaxsim._core.errors import InputError

    if workers is not None and workers < 1:
        raise InputError("--workers", workers, "is not a number of threads", "give at least 1, or leave it out")


def scenario_or_study(name: str, values: dict[str, Any]) -> Any:
    """The scenario, or else the study, of a file or a shipped name, with fields replaced. Raises `InputError`."""
    from jaxsim._core.errors import InputError, suggest
    from jaxsim.spec.scenario import Scenario, shipped_scenarios
    from jaxsim.study.study import shipped_studies

    if _is_study(name):
        return chosen(name, values)
    known = [*shipped_scenarios(), *shipped_studies()]
    if name not in known and not Path(name).exists() and not name.endswith(".toml"):
        raise InputError("scenario", name, "no such file, and no scenario or study of that name", suggest(name, known))
    scenario = Scenario.from_toml(name)
    return scenario.with_values(values) if values else scenario


def _is_study(name: str) -> bool:
    import tomllib

    from jaxsim.study.study import shipped_studies

    if not Path(name).is_file():
        return name in shipped_studies()
    try:
        return bool({"axes", "zip", "sample"} & tomllib.loads(Path(name).read_text(encoding="utf-8")).keys())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError):
        # The reader says what is wrong.
        return False


def chosen(path: str, values: dict[str, Any]) -> Any:
    """The study of a file, with fields of its scenario replaced. Raises `InputError`."""
    import msgspec

    from jaxsim._core.errors import InputError
    from jaxsim.spec.scenario import Scenario, assign
    from jaxsim.study.study import Study, check_field

    study = Study.from_toml(path)
    if not values:
        return study
    axes = {*study.axes, *itertools.chain(*study.zip), *study.derived, *(study.sample.axes if study.sample else ())}
    for name in values:
        if name in axes:
            raise InputError("--set", name, "is an axis of the study", "change the study file")
    tree = study.base_tree()
    try:
        Scenario.from_dict(tree)
    except InputError:
        # Axes give what it lacks, so only names can be checked.
        for name in values:
            check_field(name, "--set")
        assign(tree, values)
    else:
        assign(tree, values)
        tree = Scenario.from_dict(tree).to_dict()
    # The study's own number of seeds is in the tree, replaced or not.
    return msgspec.structs.replace(study, scenario=tree, num_seeds=None)


def _lines(about: dict[str, Any]) -> Iterator[str]:
    from jaxsim.io.table import number

    yield (f"{about['scenarios']:,} scenarios, {about['refused']:,} of them refused; {about['runs']:,} runs of"
           f" {about['requests']:,} requests")
    yield (f"{about['programs']} programs, {about['tiles']:,} tiles of up to {about['widest_tile']} runs,"
           f" {about['tile_bytes'] / 2**20:,.0f} MiB a tile")
    if "elapsed_s" not in about:
        yield (f"some {number(about['seconds'])} s of one core, a third of it or three times as much on another"
               " machine, and less where programs are kept from before")
    if "elapsed_s" in about:
        rate = number(about["scenarios"] / max(about["elapsed_s"], 1e-3))
        yield f"{about['elapsed_s']:,.1f} s, {rate} scenarios/s"


@contextmanager
def _progress() -> Iterator[Any]:
    """A bar on a terminal, a line now and then elsewhere, both on standard error."""
    if not sys.stderr.isatty():
        last = [time.monotonic()]

        def line(what: str, done: int, total: int, programs: int = 0) -> None:
            now = time.monotonic()
            if now - last[0] >= LINES_EVERY_S or (total and done == total):
                last[0] = now
                print(f"jaxsim: {what}: {done:,}" + (f" of {total:,} runs" if total else "")
                      + (f", {programs} programs" if programs else ""), file=sys.stderr)

        yield line
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    with Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
                  TextColumn("{task.fields[rate]}"), TimeRemainingColumn(), console=Console(stderr=True),
                  transient=True) as bar:
        task, begun = bar.add_task("", total=None, rate=""), [time.monotonic(), ""]

        def update(what: str, done: int, total: int, programs: int = 0) -> None:
            if what != begun[1]:
                begun[:] = time.monotonic(), what
            rate = done / max(time.monotonic() - begun[0], 1e-6)
            bar.update(task, description=what, completed=done, total=total or None,
                       rate=f"{rate:,.0f}/s" + (f", {programs} programs" if programs else ""))

        yield update


@contextmanager
def _executor(name: str) -> Iterator[Any]:
    """Who runs tiles; None: threads of this process. Raises `InputError`."""
    from jaxsim._core.errors import InputError

    kind, _, rest = name.partition(":")
    if name == "local":
        yield None
    elif kind == "processes" and rest.isdecimal() and int(rest) > 0:
        import multiprocessing
        from concurrent.futures import ProcessPoolExecutor
        from concurrent.futures.process import BrokenProcessPool

        with ProcessPoolExecutor(int(rest), mp_context=multiprocessing.get_context("spawn")) as pool:
            try:
                yield pool
            except BrokenProcessPool:
                raise _died(name) from None
    elif kind == "dask" and rest:
        try:
            from distributed import Client, KilledWorker
        except ImportError:
            raise InputError("--executor", name, "needs Dask", "pip install distributed") from None
        try:
            client = Client(rest, timeout="10s")
        except (OSError, ValueError, TimeoutError) as error:
            raise InputError("--executor", name, f"cannot be reached ({error})",
                             "give the scheduler's address") from None
        with client, client.get_executor(retries=2) as pool:
            try:
                yield pool
            except KilledWorker:
                raise _died(name) from None
    else:
        raise InputError("--executor", name, "is not known", "use local, processes:N or dask:ADDRESS")


def _died(name: str) -> Exception:
    from jaxsim._core.errors import InputError

    return InputError("--executor", name, "lost a worker that was killed, perhaps as memory ran out",
                      "run the same command again, with fewer workers if it did: finished tiles are kept")
