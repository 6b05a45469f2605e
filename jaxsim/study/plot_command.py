"""`jaxsim plot`: plots and a report of a study's table.

Imports are inside the functions, so that the command line answers --help without loading JAX.
"""

import argparse
from pathlib import Path


def add_parser(commands: "argparse._SubParsersAction") -> argparse.ArgumentParser:
    """The command among the others."""
    plot = commands.add_parser(
        "plot", help="draw the table of a study, or write its report",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Draw the table that `jaxsim sweep` wrote. What is not given is chosen from the study's axes.\n\n"
                    "  lines    metrics (--y) over a parameter (--x), a line a value of --hue\n"
                    "  heatmap  a metric over two parameters: --x FIELD --y FIELD METRIC\n"
                    "  pareto   two metrics (--x, --y), and the scenarios that no other beats in both",
        epilog='example: jaxsim plot results/limits --y p99_ttft_ms p99_tpot_ms --where "device.name == \'h100\'"\n'
               "exit status: 0 done, 2 an input that cannot be used or a place that cannot be written to")
    plot.add_argument("folder", metavar="FOLDER", help="a folder that `jaxsim sweep` wrote, or its results.parquet")
    plot.add_argument("--kind", choices=("auto", "lines", "heatmap", "pareto"), help="what to draw (default: auto)")
    plot.add_argument("--x", metavar="FIELD", help="parameter along x; the metric along x of a Pareto front")
    plot.add_argument("--y", nargs="+", default=[], metavar="METRIC",
                      help="metrics; for a heat map also the parameter along y (default: by kind, docs/studies.md)")
    plot.add_argument("--hue", metavar="FIELD", help="parameter told by colour")
    plot.add_argument("--where", metavar="EXPRESSION",
                      help="only rows of which this is true, e.g. \"workload.rate_rps <= 8 and not unstable\"")
    plot.add_argument("--out", metavar="FILE", help="a .png or .svg file (default: FOLDER/KIND.png)")
    plot.add_argument("--report", metavar="FILE", help="write all of it as one HTML file instead of one plot")
    plot.set_defaults(command=run)
    return plot


def run(options: argparse.Namespace) -> int:
    """Run the command. Raises `InputError`."""
    from jaxsim._core.errors import InputError
    from jaxsim.study import plots, report, view

    if options.report is not None:
        given = [name for name in ("kind", "x", "y", "hue", "out") if getattr(options, name)]
        if given:
            raise InputError(f"--{given[0]}", getattr(options, given[0]), "is not for a report: it has its own plots",
                             "give --where at most")
        if Path(options.report).suffix.lower() not in (".html", ".htm"):
            raise InputError("--report", options.report, "is no HTML file", "end it in .html")
        print(report.write(view.read(options.folder, options.where), options.report, where=options.where))
        return 0
    frame = view.read(options.folder, options.where)
    kind = view.choose(frame) if options.kind in (None, "auto") else options.kind
    folder = Path(options.folder)
    out = Path(options.out) if options.out else (folder if folder.is_dir() else folder.parent) / f"{kind}.png"
    plots.plot(frame, kind, options.x, options.y or None, options.hue, out=out)
    print(out)
    return 0
