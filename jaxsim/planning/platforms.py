"""Which devices of the catalogue meet a use case, and how many of them.

For every device: tensor-parallel ranks that the model can be cut into (whole experts on them, too, where it has any),
each with the fewest pipeline stages whose memory holds weights and cache; of the plans that keep both limits, the one
with the fewest devices, then the shortest TPOT. Seconds are the ideal ones of `jaxsim.analytic.ideal` on the device's
datasheet, under the efficiencies asked for.

Links are those of the catalogue. Source of their latencies: GenZ's collectives, 5 us and 1 us a hop. Over PCIe and
between nodes a collective, or a message from stage to stage, has 20 us to begin with and half (a guess) or 72 % of the
bandwidth (`jaxsim.cost.collectives`); elsewhere it has the efficiency asked for.

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
from jaxsim._core.precision import enable_x64
from jaxsim.analytic.ideal import Pass, Platform
from jaxsim.analytic.requirements import Efficiencies, Requirements, UseCase, three
from jaxsim.cost.collectives import SLOWER, over
from jaxsim.cost.genz import LINK_LATENCY_S, START_S
from jaxsim.spec.device import DeviceSpec, Link, device_catalogue, load_device
from jaxsim.spec.efficiency import HopEfficiency
from jaxsim.spec.plan import Plan

_ANY = HopEfficiency(latency_s=0.0, efficiency=1.0, source="")

SLOW = {kind: over(_ANY, kind) for kind in SLOWER}
"""By kind of link, seconds before a message and share of the bandwidth; other kinds have GenZ's and the one asked for.
Source: `jaxsim.cost.collectives`; what PCIe reaches is a guess."""


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


def worth(found: Requirements, memory_bytes: float, bytes_per_s: float, flops: float, wide_flops: float | None = None
          ) -> dict[str, float]:
    """Devices that each resource by itself is worth, from the totals of requirements without any links.

    flops, wide_flops: of products in the weights' type, and in 16 bits, as the device has them: without the narrow type
    both are one; as for the tensor cores that have it unless given.
    """
    use = found.use_case
    wider = use.wider if wide_flops is None else flops / wide_flops
    compute = max(float(work.scaled_flops(wider, np)) / limit_s
                  for work, limit_s in ((found.prefill, use.ttft_s), (found.decode, use.tpot_s)))
    return {"memory": found.memory.total_bytes / memory_bytes,
            "bandwidth": found.num_devices * max(found.alone.memory_bytes_per_s) / bytes_per_s,
            "compute": found.num_devices * compute / found.efficiencies.compute / flops}


def platforms(use: UseCase, found: Requirements, names: Iterable[str] | None = None, *, most_devices: int = 1024,
              memory_share: float | None = None, link_efficiency: float | None = None) -> Platforms:
    """Devices that meet a use case: all accelerators of the catalogue, or those with these names.

    found: requirements of the same use on one device (its plan is not read), whose totals `counts` is made of;
    most_devices: that are looked for; memory_share: of visible memory that weights and cache may take, the use case's
    unless given; link_efficiency: of all links, those over PCIe and between nodes too. Raises `InputError`.
    """
    memory_share = use.memory_share if memory_share is None else memory_share
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
        peaks = device.peak(use.fmt.compute).flops, device.peak("bf16").flops
        counts.append({"device": device.name, **worth(found, room, device.memory_bytes_per_s, *peaks)})
        options = [_option(use, device, *layout, room / memory_share, found.efficiencies, link_efficiency)
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


def platform_of(device: DeviceSpec, use: UseCase, plan: Plan, efficiencies: Efficiencies,
                link_efficiency: float | None = None) -> Platform:
    """A device of the catalogue as the ideal passes see it, in a group of a plan.

    link_efficiency: of every kind of link, instead of that of `efficiencies` inside a node and those of `SLOW`.
    """
    ranks, stages = plan.tensor_parallel_size, plan.pipeline_parallel_size
    link = device.link_among(max(ranks, 2), ranks)
    between = device.link_among(2, ranks * stages)

    def efficiency(of: Link) -> float:
        if link_efficiency is not None:
            return link_efficiency
        return SLOW[of.kind].efficiency if of.kind in SLOW else efficiencies.link

    return Platform(
        device.peak(use.fmt.compute).flops, device.peak("bf16").flops, device.memory_bytes_per_s, link.bytes_per_s,
        between.bytes_per_s, SLOW[link.kind].latency_s if link.kind in SLOW else START_S, LINK_LATENCY_S,
        efficiencies.compute, efficiencies.memory, efficiency(link),
        SLOW[between.kind].latency_s if between.kind in SLOW else 0.0, efficiency(between))


def _option(use: UseCase, device: DeviceSpec, plan: Plan, held_bytes: float, passes: tuple[Pass, Pass],
            usable_bytes: float, efficiencies: Efficiencies, link_efficiency: float | None) -> Option:
    platform = platform_of(device, use, plan, efficiencies, link_efficiency)
    # In plain numbers: some thousand of them are asked for.
    return Option(plan, *(float(work.seconds(platform, np).total) for work in passes), held_bytes / usable_bytes)
