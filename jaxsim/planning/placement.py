"""DistServe's placement: how to lay out prefill and decode engines, and how many of each.

Algorithm 1 (`high`: a fast network between nodes): every configuration is simulated as prefill engine alone, with the
limit of TTFT only, and as decode engine alone, with that of TPOT only. Of each phase the one with the highest goodput
per GPU is taken, as often as the rate asks for. Algorithm 2 (`low`: KV must stay inside a node): stages of the model
are spread over `segments` nodes, in each of which lie the same segment of a prefill and of a decode engine; every pair
that fits a node is simulated as a pair, and the one with the highest goodput per GPU is taken as often as needed.
The goodput of one is bisected; every other is asked first whether it keeps its limits at the lowest rate at which it
would not be behind, and only who does is bisected too (`jaxsim.study.goodput`, in turn). A run is two queues, one
behind the other (`jaxsim.planning.tandem`), of which the second is left out where the first alone misses the limits;
what those do not know is simulated by the event engine, many rates and configurations at once.

A configuration is a number of tensor-parallel ranks that divides the heads and of stages that divides the layers, whose
weights fit. An engine alone is one beside an engine of the other phase that takes no time: prefills beside decodes that
never come, as outputs end with the first token; decodes beside prompts of a microsecond each.

Source: arXiv 2401.09670, section 4.2 and algorithms 1 and 2; its public tool. Known gaps: `high` does not simulate what
prefill and decode engines do to each other (nor does the paper); nor does either the network between segments.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any, Literal

import msgspec
import pandas as pd

from jaxsim._core.errors import InputError
from jaxsim.cost.simdistserve import CHAT_LIMITS_MS, Degrees, Engines, pair
from jaxsim.planning import tandem
from jaxsim.spec.model import ModelSpec
from jaxsim.spec.scenario import Scenario
from jaxsim.spec.sections import SloSection
from jaxsim.study import goodput

Affinity = Literal["high", "low"]

NO_TIME = {"kind": "fitted", "exact": True, "prefill": {"a": 1e-6}, "head": {},
           "decode": [{"a": 1e-6}, {"min_sequences": 1 << 20, "a": 1e-6}]}
"""[cost] of an engine that is not looked at; of the form of `jaxsim.cost.simdistserve`, to be of the same program."""


def chat(model: str) -> Scenario:
    """Workload and limits of a chatbot: log-normal lengths within OPT's 2,048 positions, by their means near those of
    ShareGPT as the paper prepares it (755.5 and 200.3 tokens, which is not confirmed); its lengths are not here."""
    ttft_ms, tpot_ms = CHAT_LIMITS_MS[model]
    return Scenario.from_dict({
        "schema_version": 1, "num_seeds": 2, "cost": NO_TIME,
        "engine": {"num_gpu_blocks_override": 1 << 20, "max_model_len": 2048},
        "slo": {"ttft_ms": ttft_ms, "tpot_ms": tpot_ms},
        "workload": {"kind": "poisson", "rate_rps": 10.0, "num_requests": 1000,
                     "input": {"kind": "log-normal", "mu": 6.2, "sigma": 1.0, "min_tokens": 4, "max_tokens": 1800},
                     "output": {"kind": "log-normal", "mu": 4.9, "sigma": 0.9, "min_tokens": 4, "max_tokens": 247}}})


def configurations(model: ModelSpec, num_devices: int, most_tensors: int, segments: int = 1) -> list[Degrees]:
    """Degrees of engines of up to so many devices: ranks divide the heads, stages times segments the layers."""
    return [Degrees(tensors, stages) for tensors in range(1, most_tensors + 1) if model.heads % tensors == 0
            for stages in range(1, num_devices // tensors + 1) if model.layers % (stages * segments) == 0]


@dataclasses.dataclass(frozen=True, eq=False)
class Placement:
    """What was found.

    table: a row a configuration that was simulated: phase (prefill, decode or pair), prefill and decode degrees,
    devices, goodput and goodput per device in requests/s, the lowest rate known to miss the limits (next_rps: one step
    of the tolerance above the goodput of the best; others miss them at a rate that would be needed to win, and how much
    less they keep up with is not looked for: their goodput is what they are known to meet, NaN if nothing is); the best
    of each phase first. refused: what was not, and why. prefill, decode: the chosen degrees, of whole engines;
    num_prefill, num_decode: how many of each.
    """

    table: pd.DataFrame
    refused: dict[str, str]
    prefill: Degrees
    decode: Degrees
    num_prefill: int
    num_decode: int

    @property
    def num_devices(self) -> int:
        """Of all engines."""
        return self.num_prefill * self.prefill.num_devices + self.num_decode * self.decode.num_devices


def search(scenario: Scenario, model: ModelSpec, engines: Callable[[Degrees], Engines | None], *, devices_per_node: int,
           num_nodes: int, affinity: Affinity = "high", rule: Literal["joint", "separate"] = "joint",
           attainment: float = 0.9, rates: tuple[float, float] = (0.25, 16.0), tolerance: float = 0.05,
           workers: int | None = None) -> Placement:
    """The placement for the rate, workload and limits of a scenario. Raises `InputError`.

    model: its heads and layers say which degrees there are. engines: what is known of an engine of some degrees, None
    where nothing is. rule: whether requests meet both limits at once (`joint`), or enough meet each (`separate`).
    rates: requests/s of one engine to begin with; others as for `jaxsim.study.goodput.search`.
    """
    if scenario.slo.ttft_ms is None or scenario.slo.tpot_ms is None:
        raise InputError("slo", msgspec.to_builtins(scenario.slo), "lacks a limit: prefill engines are measured by"
                         " ttft_ms, decode engines by tpot_ms", "give both")
    if scenario.workload.rate_rps is None:
        raise InputError("workload.rate_rps", None, "is missing", "give the rate that is to be served")
    if devices_per_node < 1 or num_nodes < 1:
        raise InputError("nodes", [num_nodes, devices_per_node], "is no cluster",
                         "give at least one node of one device")
    refused: dict[str, str] = {}
    asked = list((_alone if affinity == "high" else _pairs)(
        scenario, model, engines, devices_per_node, num_nodes, refused))
    if not asked:
        reasons = "; ".join(f"{name}: {why}" for name, why in list(refused.items())[:3])
        raise InputError("nodes", [num_nodes, devices_per_node], f"no configuration can run ({reasons})",
                         "use more devices, or another model")
    is_tandem = all(tandem.follows(one) for _, one in asked)
    found = goodput.search([one for _, one in asked], attainment=attainment, rule=rule, rates=rates,
                           tolerance=tolerance, workers=workers,
                           batches=tandem.Tandem(attainment) if is_tandem else None,
                           contests=[(row["phase"], row["devices"]) for row, _ in asked])
    rows = []
    for (row, _), (_, result) in zip(asked, found.sort_values("scenario").iterrows(), strict=True):
        if isinstance(result.get("refused"), str):
            refused[f"{row['phase']} {row['prefill']} {row['decode']}"] = result["refused"]
            continue
        rate = result["rate_rps"]
        if math.isinf(result.get("next_rps", 0.0)):
            raise InputError("workload.num_requests", scenario.num_requests,
                             f"are so few that {row['prefill'] or row['decode']} keeps its limits in the {row['phase']}"
                             " phase with all of them at once", "raise it: runs at high rates are short")
        rows.append(row | {"goodput_rps": rate, "goodput_rps_per_device": rate / row["devices"],
                           "next_rps": result.get("next_rps"), "limited_by": result["limited_by"]})
    if not rows:
        raise InputError("nodes", [num_nodes, devices_per_node], f"no configuration can run ({refused})", "change it")
    table = pd.DataFrame(rows).sort_values(["phase", "goodput_rps_per_device", "devices"],
                                           ascending=[False, False, True], ignore_index=True)
    return _chosen(table, refused, scenario.workload.rate_rps)


def _chosen(table: pd.DataFrame, refused: dict[str, str], rate_rps: float) -> Placement:
    best = table.groupby("phase").first()
    for phase, row in best.iterrows():
        if not row["goodput_rps"] > 0:
            raise InputError("slo", phase, "is met by no configuration at any rate that was tried",
                             "loosen the limits, or use faster devices")
    count = {phase: math.ceil(rate_rps / row["goodput_rps"]) for phase, row in best.iterrows()}
    prefill, decode = ("pair", "pair") if "pair" in best.index else ("prefill", "decode")
    return Placement(table, refused, best.loc[prefill, "prefill"], best.loc[decode, "decode"], count[prefill],
                     count[decode])


def _alone(scenario, model, engines, devices_per_node, num_nodes, refused) -> Iterable[tuple[dict[str, Any], Scenario]]:
    """Every configuration as a prefill and as a decode engine."""
    found = configurations(model, devices_per_node * num_nodes, devices_per_node)
    # As many stages as any has, which makes all of them runs of one program.
    deepest = Degrees(1, max((degrees.stages for degrees in found if engines(degrees) is not None), default=1))
    for degrees in found:
        known = engines(degrees)
        if known is None:
            refused[str(degrees)] = "does not fit, or nothing is known of it"
            continue
        idle = Engines(NO_TIME, known.tokens)
        whole = {"devices": degrees.num_devices}
        own, other = (degrees, known), (deepest, idle)
        yield ({"phase": "prefill", "prefill": degrees, "decode": None} | whole,
               pair(_with_limits(scenario, ttft_ms=scenario.slo.ttft_ms), own, other, is_prefill_only=True))
        yield ({"phase": "decode", "prefill": None, "decode": degrees} | whole,
               pair(_with_limits(scenario, tpot_ms=scenario.slo.tpot_ms), other, own))


def _pairs(scenario, model, engines, devices_per_node, num_nodes, refused) -> Iterable[tuple[dict[str, Any], Scenario]]:
    """Every pair of which each segment lies in a node."""
    seen = set()
    for segments in range(1, num_nodes + 1):
        if model.layers % segments:
            continue
        inside = configurations(model, devices_per_node, devices_per_node, segments)
        for own, other in ((p, d) for p in inside for d in inside if p.num_devices + d.num_devices <= devices_per_node):
            both = [Degrees(part.tensors, part.stages * segments) for part in (own, other)]
            # The same engines, whether their stages lie in one node or in several.
            if tuple(both) in seen:
                continue
            seen.add(tuple(both))
            known = [engines(degrees) for degrees in both]
            if None in known:
                lacking = both[known.index(None)]
                refused[str(lacking)] = "does not fit, or nothing is known of it"
                continue
            row = {"phase": "pair", "prefill": both[0], "decode": both[1],
                   "devices": sum(degrees.num_devices for degrees in both)}
            yield row, pair(_with_limits(scenario, ttft_ms=scenario.slo.ttft_ms, tpot_ms=scenario.slo.tpot_ms),
                            *zip(both, known, strict=True))


def _with_limits(scenario: Scenario, **limits: float) -> Scenario:
    return msgspec.structs.replace(scenario, slo=SloSection(**limits))
