"""`jaxsim list`: what a scenario may name."""

import argparse
import sys
from typing import Any

from jaxsim.cli.process import fail


def add_parser(commands: "argparse._SubParsersAction") -> None:
    """The command among the others."""
    show = commands.add_parser("list", help="list models, devices, policies, scenarios or studies",
                               description="List what a scenario may name.")
    show.add_argument("what", choices=("models", "devices", "policies", "scenarios", "studies"))
    form = show.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON")
    form.add_argument("--markdown", action="store_true",
                      help="print the page docs/schedulers.md (policies only)")
    show.set_defaults(command=_list)


def _list(options: argparse.Namespace) -> int:
    if options.markdown:
        from jaxsim.spec.presets import markdown

        if options.what != "policies":
            return fail(f"--markdown: there is no such page of {options.what}; leave it out")
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
    from jaxsim.spec.engine import ORDERS
    from jaxsim.spec.presets import all_presets

    presets = [{"preset": p.name, "also": list(p.aliases), "imitates": f"{p.engine}, {p.version}",
                "valid for": p.validity, "leaves out": list(p.leaves_out), "unconfirmed": list(p.unconfirmed)}
               for p in all_presets()]
    routers = [{"router": name, "rule": (cls.__doc__ or "").splitlines()[0]}
               for name, cls in routing.routers().items()]
    orders = [{"order": name, "next": rule} for name, rule in ORDERS.items()]
    return {"schedulers (engine.preset)": presets, "orders (engine.scheduling_policy)": orders,
            "routers (cluster.router)": routers}


def _scenarios() -> dict[str, list[dict[str, Any]]]:
    from jaxsim.spec.scenario import Scenario, shipped_scenarios

    return {"scenarios": [{"scenario": name, "shows": Scenario.named(name).description}
                          for name in shipped_scenarios()]}


def _studies() -> dict[str, list[dict[str, Any]]]:
    from jaxsim.study.study import Study, shipped_studies

    return {"studies": [{"study": name, "asks": Study.from_toml(name).description} for name in shipped_studies()]}
