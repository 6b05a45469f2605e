"""The device a rank runs on: memory, peaks, links, power, price, and the catalogue of known ones."""

import functools
import math
import numbers
import tomllib
from collections.abc import Mapping
from importlib import resources
from typing import Annotated, Any, Literal, NamedTuple

import msgspec
from msgspec import Meta

from jaxsim._core.errors import InputError, suggest
from jaxsim.spec.efficiency import DATASHEET, Efficiency, at_clock, like_of, load_efficiency, transferred
from jaxsim.spec.messages import convert_table

Positive = Annotated[float, Meta(gt=0)]
GIB = 1 << 30

VISIBLE_SHARE = 0.988
"""Share of nominal memory that CUDA shows an engine, where the catalogue says no better.

Source: mean of the RTX 4090 (0.980) and the 96 GiB RTX PRO 6000 (0.996) in aiconfigurator's system specs (shared data).
"""

NOMINAL_MULTIPROCESSORS = 128
"""Equal parts a device is cut into where their number is not known."""

LEAST_CLOCK = 0.7
"""Of the highest, down to which memory is taken to be as fast as ever. Assumed: below some share requests for it are
issued too slowly, and which that is nobody has published; clocks of POLCA and Greener LLMs are above 0.78."""

CLOCK_EXPONENT = 1.35
"""Power of the clock that dynamic watts follow near the highest clock, where 20 to 30 % of the watts are static.

Source: derived from a fifth less peak power of A100s over 1.4 to 1.1 GHz (POLCA, arXiv 2308.12908) and less than 80 %
of the energy of H100s over 2.0 to 1.6 GHz at about the same throughput (Greener LLMs, arXiv 2403.20306): 1.2 to 1.5, of
which this is the middle. Frequency times the square of the voltage, up to 3, would save too much.
"""

_FALLBACK = {"fp4": "fp8", "fp8": "bf16", "int8": "bf16", "bf16": "fp32"}


class Peak(NamedTuple):
    """A peak arithmetic rate and the type it is for (a wider one, where the one asked for is absent)."""

    flops: float
    compute: str


Topology = Literal["switch", "mesh", "pair", "torus", "host"]
"""How devices of a node reach each other.

switch: each has its whole link to any other; mesh: a link to each other of the node, which share `link_bytes_per_s`;
pair: a bridge to one other, else through the host; torus: taken as a switch, but no device reads another's memory;
host: PCIe.
"""


class Link(NamedTuple):
    """Of one device in a group of so many ranks. kind: direct (memory of peers can be read), torus, host, network;
    assumed: numbers that the device does not give, in words."""

    ranks: int
    bytes_per_s: float
    kind: Literal["direct", "torus", "host", "network"]
    assumed: tuple[str, ...] = ()


DEVICES_PER_NODE, NETWORK_BYTES_PER_S, LINK_BYTES_PER_S = 8, 12.5e9, 1e9
"""Where a device does not say: the usual server, 100 Gbit/s, and little enough to be seen."""


class ServingPower(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Board power of a device that serves.

    idle_w: no iteration in flight, the model loaded and clocks up. busy_w: an iteration in flight that mostly
    generates tokens; one of prompts alone draws up to `tdp_w`. Both at the highest clock; at a lower one
    idle + (busy - idle) clock^clock_exponent is drawn at work, and as much as ever without.
    """

    idle_w: Positive
    busy_w: Positive
    clock_exponent: Positive = CLOCK_EXPONENT
    source: str = ""

    def __post_init__(self):
        if not self.idle_w <= self.busy_w < math.inf:
            raise InputError("device.power.busy_w", self.busy_w, f"is below idle_w = {self.idle_w:g}, or not finite",
                             "give watts of a device at work")

    def at_work_w(self, clock: float) -> float:
        """What is drawn at work at a share of the highest clock; `busy_w` itself at 1."""
        if clock == 1.0:
            return self.busy_w
        return self.idle_w + (self.busy_w - self.idle_w) * clock**self.clock_exponent


class DeviceSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One accelerator (or CPU socket), in SI units; None = not known or not there.

    memory_bytes: nominal; visible_memory_bytes: what the driver shows an engine; memory_bytes_per_s: peak.
    bf16_flops (or fp16), fp8_flops, int8_flops, fp4_flops, fp32_flops: dense peaks, FLOP/s.
    link, link_bytes_per_s: scale-up link, per direction per device, and devices_per_node that share it; topology: how
    it joins them, by default "host" for PCIe and where there is no link, else "switch";
    internode_bytes_per_s: network beyond it; host_link, host_link_bytes_per_s: to the CPU.
    tdp_w, idle_w, active_idle_w (clocks up, nothing running), usd_per_h (reference, low, high); power: what a run's
    energy is made of.
    calibration: where its kernel constants come from: "measured" (its own tables), "family:<device>" (those of a
    measured device), "datasheet" (nothing near was measured: those of the H100); calibration_note: what to expect of
    them; efficiency: constants written out, instead.
    clock: of the multiprocessors, as a share of the highest. Arithmetic slows with it, and the time an item of decode
    attention takes for a token (as between devices, `transferred`); memory, links, launches, fixed seconds of kernels
    and the host do not; watts as `ServingPower` says.

    Known gaps: at a lower clock, kernels that convert numbers (8-bit caches, quantisation) and fixed seconds of kernels
    would be somewhat slower too, which nothing public tells apart; prices are list or index values of early 2026 that
    differ 2 to 4 times between providers.
    """

    name: Annotated[str, Meta(min_length=1)]
    kind: Literal["gpu", "tpu", "cpu"] = "gpu"
    memory_bytes_per_s: Positive
    memory_bytes: Annotated[int, Meta(gt=0)] | None = None
    visible_memory_bytes: Annotated[int, Meta(gt=0)] | None = None
    memory_type: str = ""
    bf16_flops: Positive | None = None
    fp8_flops: Positive | None = None
    int8_flops: Positive | None = None
    fp4_flops: Positive | None = None
    fp32_flops: Positive | None = None
    num_multiprocessors: Annotated[int, Meta(ge=1)] | None = None
    num_cores: Annotated[int, Meta(ge=1)] | None = None
    base_hz: Positive | None = None
    clock: float = 1.0
    link: str = ""
    link_bytes_per_s: Positive | None = None
    topology: Topology | None = None
    devices_per_node: Annotated[int, Meta(ge=1)] | None = None
    internode_bytes_per_s: Positive | None = None
    host_link: str = ""
    host_link_bytes_per_s: Positive | None = None
    tdp_w: Positive | None = None
    idle_w: Positive | None = None
    active_idle_w: Positive | None = None
    power: ServingPower | None = None
    usd_per_h: Positive | None = None
    usd_per_h_low: Positive | None = None
    usd_per_h_high: Positive | None = None
    full_name: str = ""
    aliases: tuple[str, ...] = ()
    calibration: Annotated[str, Meta(pattern="^(measured|datasheet|family:.+)$")] = "datasheet"
    calibration_note: str = ""
    efficiency: Efficiency | None = None
    confidence: str = ""
    source: str = ""
    notes: str = ""

    def __post_init__(self):
        for field, value in zip(self.__struct_fields__, msgspec.structs.astuple(self), strict=True):
            is_number = (field.endswith(("_bytes", "_per_s", "_flops", "_hz", "_w", "_per_node"))
                         or field.startswith(("num_", "usd_")))
            is_given = value is not None or field == "memory_bytes_per_s"
            if is_number and is_given and (not isinstance(value, numbers.Real) or not 0 < value < math.inf):
                raise InputError(f"device.{field}", value, "is not a positive number", "give one in SI units")
        if not LEAST_CLOCK <= self.clock <= 1:
            raise InputError("device.clock", self.clock, f"is no share of the highest clock from {LEAST_CLOCK:g} to 1,"
                             " between which memory keeps its speed", "give one, or simulate other device.numbers")
        if self.clock != 1 and self.kind != "gpu":
            raise InputError("device.clock", self.clock, f"is of the multiprocessors of a GPU, and {self.name} is none",
                             "leave it out")
        if self.bf16_flops is None and self.fp32_flops is None:
            raise InputError("device.bf16_flops", None, f"{self.name} has no arithmetic peak",
                             "give bf16_flops or fp32_flops")
        if (self.visible_memory_bytes or 0) > (self.memory_bytes or float("inf")):
            raise InputError("device.visible_memory_bytes", self.visible_memory_bytes,
                             f"more than memory_bytes = {self.memory_bytes}", "lower it, or leave it out")

    @classmethod
    def from_dict(cls, table: Mapping[str, Any], path: str = "device") -> "DeviceSpec":
        """From a table of the fields above, as a scenario file holds it."""
        return convert_table(table, cls, path, "device", "see `jaxsim list devices` for those that are built in")

    def peak(self, compute: str) -> Peak:
        """Dense peak for a number type, or for the next wider one the device has, at its clock.

        fp4 falls back to fp8, fp8 and int8 to bf16, bf16 to fp32: weights stay narrow in memory, the
        arithmetic is done in the wider type (fp8 on an A100 runs in bf16).
        """
        found = self._highest_clock_peak(compute)
        return found if self.clock == 1.0 else found._replace(flops=found.flops * self.clock)

    def _highest_clock_peak(self, compute: str) -> Peak:
        rates = {"bf16": self.bf16_flops, "fp8": self.fp8_flops, "int8": self.int8_flops,
                 "fp4": self.fp4_flops, "fp32": self.fp32_flops}
        if compute not in rates:
            raise InputError("compute type", compute, "is not known", suggest(compute, rates))
        while rates[compute] is None:
            if compute not in _FALLBACK:
                raise InputError("device.fp32_flops", None, f"{self.name} has no fp32 peak", "give one")
            compute = _FALLBACK[compute]
        return Peak(rates[compute], compute)

    @property
    def family(self) -> str:
        """Name of the device whose kernel constants these are."""
        kind, _, name = self.calibration.partition(":")
        return {"measured": self.name, "datasheet": DATASHEET}.get(kind, name)

    def kernel_efficiency(self) -> Efficiency:
        """Constants of its kernels at its clock. Raises `InputError` where `calibration` names no record."""
        return at_clock(self._highest_clock_efficiency(), self.clock)

    def _highest_clock_efficiency(self) -> Efficiency:
        if self.efficiency is not None:
            return self.efficiency
        if self.family == self.name:
            return load_efficiency(self.name, *self._ratios(load_device(like_of(self.name))))
        like = load_device(self.family)
        record = load_efficiency(like.name, *like._ratios(load_device(like_of(like.name))))
        return transferred(record, *self._ratios(like))

    def _ratios(self, like: "DeviceSpec") -> tuple[float, float]:
        """How many times the memory bandwidth of another device, and FLOP/s of a multiprocessor."""
        return self.memory_bytes_per_s / like.memory_bytes_per_s, self._unit_flops / like._unit_flops

    @property
    def _unit_flops(self) -> float:
        # At the highest clock: constants are of a device, whatever its clock is set to.
        return self._highest_clock_peak("bf16").flops / (self.num_multiprocessors or NOMINAL_MULTIPROCESSORS)

    @property
    def usable_memory_bytes(self) -> int:
        """Memory an engine sees before it takes its share."""
        if self.visible_memory_bytes is not None:
            return self.visible_memory_bytes
        if self.memory_bytes is None:
            raise InputError("device.memory_bytes", None, f"the memory of {self.name} is not known",
                             "give device.memory_bytes or engine.num_gpu_blocks_override")
        return int(self.memory_bytes * VISIBLE_SHARE)

    def link_among(self, ranks: int, span: int | None = None) -> Link:
        """The link of a device to the others of a group of so many `ranks`, which lie among `span` devices in a row."""
        span, per_node = span or ranks, self.devices_per_node or DEVICES_PER_NODE
        topology = self.topology or ("host" if not self.link or self.link.startswith("PCIe") else "switch")
        given, assumed = self.link_bytes_per_s, ()
        if topology == "pair" and span > 2:
            topology, given = "host", self.host_link_bytes_per_s
        inside = given or self.host_link_bytes_per_s
        if inside is None:
            inside, assumed = LINK_BYTES_PER_S, (f"a link of {LINK_BYTES_PER_S / 1e9:g} GB/s",)
        elif given is None:
            topology, assumed = "host", (f"a link of {inside / 1e9:g} GB/s, as to the host",)
        if topology == "mesh":
            inside *= max(min(ranks, per_node) - 1, 1) / max(per_node - 1, 1)
        if span <= per_node:
            kind = topology if topology in ("host", "torus") else "direct"
            return Link(ranks, inside, kind, assumed)
        if self.devices_per_node is None:
            assumed += (f"nodes of {per_node} devices",)
        if self.internode_bytes_per_s is None:
            assumed += (f"a network of {NETWORK_BYTES_PER_S / 1e9:g} GB/s a device",)
        return Link(ranks, min(inside, self.internode_bytes_per_s or NETWORK_BYTES_PER_S), "network", assumed)


@functools.cache
def device_catalogue() -> dict[str, DeviceSpec]:
    """Built-in devices by name."""
    devices = {}
    folder = resources.files("jaxsim.scenarios") / "devices"
    for file in sorted(folder.iterdir(), key=lambda f: f.name):
        if file.name.endswith(".toml"):
            for row in tomllib.loads(file.read_text())["device"]:
                spec = DeviceSpec.from_dict(row, path=file.name)
                devices[spec.name] = spec
    return devices


def _fold(name: str) -> str:
    return str(name).strip().lower().replace("-", "_").replace(" ", "_")


@functools.cache
def _device_names() -> dict[str, str]:
    names: dict[str, str] = {}
    for spec in device_catalogue().values():
        for name in (spec.name, spec.full_name, *spec.aliases):
            if name and names.setdefault(_fold(name), spec.name) != spec.name:
                raise ValueError(f"two devices are called {name}")
    return names


def load_device(name: str) -> DeviceSpec:
    """A device of the catalogue by name or alias ("h100", "a100-80gb"); case and dashes do not matter."""
    try:
        return device_catalogue()[_device_names()[_fold(name)]]
    except KeyError:
        hint = suggest(_fold(name), _device_names(), "see `jaxsim list devices`.")
        raise InputError("device.name", name, "is not in the catalogue",
                         f"{hint} Or write its numbers out in a [device.numbers] table") from None
