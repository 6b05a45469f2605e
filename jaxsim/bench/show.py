"""The report of `jaxsim bench` for people."""

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table


def show(report: dict, console: Console | None = None) -> None:
    """Print the report as a table."""
    console = console or Console()
    table = Table(title="Simulated requests on one core, compile time apart", title_justify="left",
                  box=SIMPLE, pad_edge=False, padding=(0, 0, 0, 1))
    table.add_column("case", no_wrap=True)
    for name in ("M req/s", "/bare", "/twin", "compile s", "MiB", "preempted", "=twin"):
        table.add_column(name, justify="right", no_wrap=True)

    def text(value, form="{:.3f}", scale=1.0):
        return "-" if value is None else form.format(value * scale)

    for r in report["results"]:
        table.add_row(
            r["name"], text(r["requests_per_s_per_core"], scale=1e-6), text(r["ratio_to_cpp"]),
            text(r["ratio_to_twin"]), text(r["compile_s"], "{:.1f}"), text(r["peak_mib"], "{:.0f}"),
            text(r.get("preemptions_per_request"), "{:.2f}"),
            text((r["agreement"] or {}).get("exact_share"), "{:.2%}"))
    console.print(table)
    console.print("/bare, /twin: ratios to the bare C++ loop, to a C++ simulator of the same rules;\n"
                  "preempted: times a request; =twin: requests with bit-equal answers\n")
    ratios, scaling, machine = report["ratios"], report["scaling"], report["machine"]
    console.print(f"replicas_1: {text(ratios['vs_cpp'])} of the bare C++ loop, "
                  f"{text(ratios['vs_python'], '{:,.0f}')} times the plain-Python reference")
    console.print(f"CPU time a request, largest over smallest: {text(scaling['requests'], '{:.2f}')} over "
                  f"requests, {text(scaling['slots'], '{:.2f}')} over slots")
    before, after = ((load or [None])[0] for load in machine["load_average"].values())
    console.print(f"{machine['device']}, JAX {machine['jax']}, Python {machine['python']}, load "
                  f"{text(before, '{:.1f}')} before, {text(after, '{:.1f}')} after; {report['duration_s']:.0f} s\n"
                  f"cost: {report['cost']['kind']}")
    for note in report["notes"]:
        console.print(f"note: {note}")
