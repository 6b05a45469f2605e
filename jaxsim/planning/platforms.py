"""Which devices of the catalogue meet a use case, and how many of them.

For every device: tensor-parallel ranks that the model can be cut into (whole experts on them, too, where it has any),
each with the fewest pipeline stages whose memory holds weights and cache; of the plans that keep both limits, the one
with the fewest devices, then the shortest TPOT. Seconds are the ideal ones of `jaxsim.analytic.ideal` on the device's
datasheet, under the efficiencies asked for.

Links are those of the catalogue. Source of their latencies: GenZ's collectives, 5 us and 1 us a hop; 20 us to begin
with over PCIe or between nodes (`jaxsim.cost.collectives`).

Known gaps: kernels of a device (simulate it, or `jaxsim plan`); data-parallel ranks and replicas, which hold more
requests, not faster ones; activations: `memory_share` leaves room for them.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax
import numpy as np
import pandas as pd

from jaxsim._core.errors import InputError
from jaxsim.analytic.ideal import Pass, Platform
from jaxsim.analytic.requirements import Efficiencies, Requirements, UseCase, three
from jaxsim.cost.genz import LINK_LATENCY_S, START_S, enable_x64
from jaxsim.spec.device import DeviceSpec, device_catalogue, load_device
from jaxsim.spec.plan import Plan

SLOW_START_S = 20e-6
"""Before a message to another node, or over PCIe. Source: `jaxsim.cost.collectives.over_network`, `over_pcie`."""


class Option(NamedTuple):
    """A plan on a device: seconds of both passes, and the share of the fullest device's memory that is taken."""

    plan: Plan
    ttft_s: float
    tpot_s: float
    memory_share: float

    def misses(self, use: UseCase) -> float:
        """The larger of both times over their limits."""
        return max(self.ttft_s / use.ttft_s, self.tpot_s / use.tpot_s)


@dataclasses.dataclass(frozen=True)
class Platforms:
    """Devices that meet a use case, the fewest of them first, and why others do not.

    table: a row a device; counts: devices that memory, bandwidth and compute alone are worth, of each kind, were they
    spread evenly and without links; refused: why, by device.
    """

    table: pd.DataFrame
    counts: pd.DataFrame
    refused: dict[str, str]


def worth(found: Requirements, memory_bytes: float, bytes_per_s: float, flops: float) -> dict[str, float]:
    """Devices that each resource by itself is worth, from the totals of requirements without any links."""
    return {"memory": found.memory.total_bytes / memory_bytes,
            "bandwidth": found.num_devices * max(found.alone.memory_bytes_per_s) / bytes_per_s,
            "compute": found.num_devices * max(found.alone.flops) / flops}


def platforms(use: UseCase, found: Requirements, names: Iterable[str] | None = None, *, most_devices: int = 1024,
              memory_share: float = 0.9) -> Platforms:
    """Devices that meet a use case: all accelerators of the catalogue, or those with these names.

    found: requirements of the same use on one device (its plan is not read), whose totals `counts` is made of;
    most_devices: that are looked for; memory_share: of visible memory that weights and cache may take. Raises
    `InputError`.
    """
    if not 0 < memory_share <= 1:
        raise InputError("memory_share", memory_share, "is out of range", "give a share above 0, at most 1")
    if most_devices < 1:
        raise InputError("most_devices", most_devices, "is no count of devices", "give 1 or more")
    devices = ([load_device(name) for name in names] if names is not None else
               [d for d in device_catalogue().values() if d.kind != "cpu"])
    rows, counts, refused, late = [], [], {}, {}
    layouts = _Layouts(use, most_devices)
    for device in devices:
        if device.memory_bytes is None and device.visible_memory_bytes is None:
            refused[device.name] = "its memory is not known"
            continue
        room = memory_share * device.usable_memory_bytes
        peak = device.peak(use.fmt.compute).flops
        counts.append({"device": device.name, **worth(found, room, device.memory_bytes_per_s, peak)})
        options = [_option(use, device, *layout, room / memory_share, found.efficiencies)
                   for layout in layouts.within(room)]
        if not options:
            refused[device.name] = f"memory: no plan of at most {most_devices:,} of them holds weights and cache"
            continue
        good = [o for o in options if o.misses(use) <= 1]
        if not good:
            best = min(options, key=lambda o: o.misses(use))
            missed = [f"{name} {three(1e3 * value)} ms" for name, value, limit_s in
                    (("TTFT", best.ttft_s, use.ttft_s), ("TPOT", best.tpot_s, use.tpot_s)) if value > limit_s]
            late[device.name] = best.misses(use), f"{' and '.join(missed)} at best, with {label(best.plan)}"
            continue
        best = min(good, key=lambda o: (o.plan.num_devices, o.tpot_s))
        rows.append({"device": device.name, "devices": best.plan.num_devices, "plan": label(best.plan),
                     "ttft_ms": 1e3 * best.ttft_s, "tpot_ms": 1e3 * best.tpot_s, "memory_share": best.memory_share,
                     "usd_per_h": None if device.usd_per_h is None else device.usd_per_h * best.plan.num_devices})
    columns = ["device", "devices", "plan", "ttft_ms", "tpot_ms", "memory_share", "usd_per_h"]
    table = pd.DataFrame(rows, columns=columns).sort_values(["devices", "tpot_ms"], ignore_index=True)
    # The nearest first.
    refused = {name: why for name, (_, why) in sorted(late.items(), key=lambda item: item[1][0])} | refused
    return Platforms(table, pd.DataFrame(counts, columns=["device", "memory", "bandwidth", "compute"]), refused)


def label(plan: Plan) -> str:
    """As people write it: "TP4 PP2", "TP8 EP"."""
    parts = [f"TP{plan.tensor_parallel_size}"] + (["EP"] if plan.enable_expert_parallel else [])
    return " ".join(parts + ([f"PP{plan.pipeline_parallel_size}"] if plan.pipeline_parallel_size > 1 else []))


class _Layouts:
    """Plans of a model with the fewest stages that fit, and their passes, which no device changes."""

    def __init__(self, use: UseCase, most_devices: int):
        self.use, self.most, self.passes = use, most_devices, {}
        self.ranks: Sequence[tuple[int, bool]] = []
        model = use.model
        for ranks in range(1, min(most_devices, model.heads) + 1):
            for spread in (False, True) if model.experts and ranks > 1 else (False,):
                try:
                    Plan(tensor_parallel_size=ranks, enable_expert_parallel=spread).check(model)
                except InputError:
                    continue
                self.ranks.append((ranks, spread))
        self.bytes: dict[Plan, float] = {}

    def within(self, room: float) -> list[tuple[Plan, float, tuple[Pass, Pass]]]:
        """Plans whose fullest device has no more than so many bytes, those bytes, and their passes."""
        found = []
        for ranks, spread in self.ranks:
            most = min(self.use.model.layers, self.most // ranks)
            if self._held(ranks, spread, most) > room:
                continue
            # More stages never hold more on the fullest.
            low, high = 1, most
            while low < high:
                middle = (low + high) // 2
                if self._held(ranks, spread, middle) > room:
                    low = middle + 1
                else:
                    high = middle
            plan = self._plan(ranks, spread, low)
            if plan not in self.passes:
                with enable_x64(True):
                    passes = self.use.with_plan(plan).passes()
                self.passes[plan] = jax.tree.map(np.asarray, passes)
            found.append((plan, self._held(ranks, spread, low), self.passes[plan]))
        return found

    @staticmethod
    def _plan(ranks: int, spread: bool, stages: int) -> Plan:
        return Plan(tensor_parallel_size=ranks, pipeline_parallel_size=stages, enable_expert_parallel=spread)

    def _held(self, ranks: int, spread: bool, stages: int) -> float:
        plan = self._plan(ranks, spread, stages)
        if plan not in self.bytes:
            self.bytes[plan] = self.use.with_plan(plan).memory().device_bytes
        return self.bytes[plan]


def platform_of(device: DeviceSpec, use: UseCase, plan: Plan, efficiencies: Efficiencies) -> Platform:
    """A device of the catalogue as the ideal passes see it, in a group of a plan."""
    ranks, stages = plan.tensor_parallel_size, plan.pipeline_parallel_size
    link = device.link_among(max(ranks, 2), ranks)
    between = device.link_among(2, ranks * stages)
    start_s = SLOW_START_S if link.kind in ("host", "network") else START_S
    return Platform(device.peak(use.fmt.compute).flops, device.peak("bf16").flops, device.memory_bytes_per_s,
                    link.bytes_per_s, between.bytes_per_s, start_s, LINK_LATENCY_S, *efficiencies)


def _option(use: UseCase, device: DeviceSpec, plan: Plan, held_bytes: float, passes: tuple[Pass, Pass],
            usable_bytes: float, efficiencies: Efficiencies) -> Option:
    platform = platform_of(device, use, plan, efficiencies)
    return Option(plan, *(_seconds(work, platform) for work in passes), held_bytes / usable_bytes)


def _seconds(work: Pass, platform: Platform) -> float:
    """`Pass.seconds` in plain numbers: some thousand of them are asked for."""
    p = platform
    flops, moved, is_wide = (np.asarray(x) for x in (work.flops, work.bytes, work.is_wide))
    arithmetic = flops / (np.where(is_wide, p.wide_flops, p.flops) * p.compute_efficiency)
    operators = np.maximum(arithmetic, moved / (p.memory_bytes_per_s * p.memory_efficiency))
    links = (work.starts * p.start_s + (work.hops + work.stage_hops) * p.hop_s
             + work.wire_bytes / (p.link_bytes_per_s * p.link_efficiency)
             + work.stage_bytes / (p.stage_bytes_per_s * p.link_efficiency))
    return float(operators.sum() + links)
