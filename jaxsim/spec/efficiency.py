"""How close a device's kernels come to its datasheet: the constants of `jaxsim.cost`'s forms, as TOML holds them.

Shares are of a datasheet peak (FLOP/s, memory or link bytes/s), seconds are of one call of one kernel, rows and
k are counts of matrix elements. Every section names the table it was fitted on. A device without tables takes the
record of its family (`transferred`).
"""

import functools
import tomllib
from collections.abc import Mapping
from importlib import resources
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from jaxsim._core.errors import InputError, suggest
from jaxsim.spec.messages import convert_table

Share = Annotated[float, Meta(gt=0, le=1)]
Seconds = Annotated[float, Meta(ge=0)]
Factor = Annotated[float, Meta(ge=0)]
Tile = tuple[Annotated[int, Meta(ge=1)], Annotated[int, Meta(ge=1)]]
Rows = Annotated[int, Meta(ge=1)]

EXPERT_ROWS = (8, 16, 32, 48, 64, 128)
"""Rows of tiles that kernels of routed experts have: what `moe_align_block_size` pads each expert's rows to."""


class _Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    source: Annotated[str, Meta(min_length=1)]


class GemmEfficiency(_Section, frozen=True):
    """Matrix products of one number format (`jaxsim.cost.gemm`).

    floor_s; efficiency: of the peak, inside a tile; read_efficiency: of the bandwidth. prologue: start and end of a
    tile, in elements of k. tiles: rows x columns of an output tile, of which the fastest runs, or, with
    row_limits, the first whose limit the product's rows keep to, else the last. split: k elements a slice keeps at
    least when tiles are fewer than multiprocessors, 0 = never cut.
    edge: rows of a tile lost to each edge. narrow_efficiency: rate of tiles after the first, against it.
    quantise_efficiency: of the bandwidth, quantising the activations; 0 = they are not. dequantise_rows: rows of a tile
    that take as long as turning its weights into 16 bits; 0 = the weights are multiplied as they are stored.
    """

    floor_s: Seconds
    efficiency: Share
    read_efficiency: Share
    prologue: Factor
    tiles: tuple[Tile, ...]
    row_limits: tuple[Rows, ...] = ()
    split: Factor = 0.0
    edge: Factor = 0.0
    narrow_efficiency: Share = 1.0
    quantise_efficiency: Annotated[float, Meta(ge=0, le=1)] = 0.0
    dequantise_rows: Factor = 0.0

    def __post_init__(self):
        if self.row_limits and len(self.row_limits) != len(self.tiles) - 1:
            raise InputError("efficiency.gemm.row_limits", self.row_limits, "should be one fewer than tiles")


class ExpertEfficiency(_Section, frozen=True):
    """The fused block of routed experts (`jaxsim.cost.gemm`).

    floor_s, kernels_s: of any call, and more as tokens grow to 16. efficiency, read_efficiency, prologue: as in a
    GEMM; half_rows: tile rows at which half of the rate is reached (turning weights into 16 bits counts as such rows).
    row_efficiency: of the bandwidth, for the rows between the products. power: of the smooth maximum of tiles and
    reads, the higher the better a kernel overlaps them. resident: tiles a multiprocessor needs at once to run at its
    rate. unaligned_factor: time of a product whose depth is no multiple of 16, and of reading its weights.
    tiles: rows x columns of a tile, of which the fastest runs, or, with limits, the first whose limit is kept to, else
    the last; limit_of: tokens, tokens for each expert of this rank, or routed rows for each.
    vector_limit: routed rows for each expert of this rank up to which a kernel without tensor cores multiplies, 0 =
    none; vector_efficiency: of the peak, in it; vector_dequantise_rows: rows that take as long as turning the weights
    into 16 bits once for each block of rows (`jaxsim.cost.gemm.VECTOR_ROWS`).
    configs: [experts, inner size of an expert], both on this rank, that have a kernel configuration of their own.
    hidden_multiple, inner_multiple: what the sizes of an expert are padded to a multiple of.
    """

    floor_s: Seconds
    kernels_s: Seconds
    efficiency: Share
    read_efficiency: Share
    prologue: Factor
    half_rows: Factor
    row_efficiency: Share
    power: Annotated[float, Meta(ge=1)] = 2.0
    resident: Annotated[float, Meta(ge=1)] = 1.0
    unaligned_factor: Annotated[float, Meta(ge=1)] = 1.0
    tiles: tuple[Tile, ...] = ((16, 128), (32, 128), (64, 128), (128, 128))
    limits: tuple[Factor, ...] = ()
    limit_of: Literal["tokens", "tokens_per_expert", "rows_per_expert"] = "tokens"
    vector_limit: Factor = 0.0
    vector_efficiency: Share = 1.0
    vector_dequantise_rows: Factor = 0.0
    configs: tuple[tuple[int, int], ...] = ()
    hidden_multiple: Rows = 1
    inner_multiple: Rows = 1

    def __post_init__(self):
        if self.limits and len(self.limits) != len(self.tiles) - 1:
            raise InputError("efficiency.experts.limits", self.limits, "should be one fewer than tiles")
        unknown = {rows for rows, _ in self.tiles} - set(EXPERT_ROWS)
        if unknown:
            raise InputError("efficiency.experts.tiles", self.tiles, "has rows that no kernel of experts has",
                             f"rows are {', '.join(map(str, EXPERT_ROWS))}")


class DecodeEfficiency(_Section, frozen=True):
    """Attention of one new token a sequence (`jaxsim.cost.attention`).

    kernel: "fa3" splits contexts always, "fa2" only of grouped heads. floor_s; item_s: of each wave of (sequence, KV
    head) items after the first; combine_s: for each doubling of the splits. read_efficiency, read_efficiency_8bit: of
    the bandwidth, by cache width, equal where 8-bit caches were not measured; flops_efficiency: of the 16-bit peak;
    sweep_s: an item passes a token (256 bytes of K or V), tail_s: once the others are done, so that the longest context
    is waited for (0 = it is not);
    swap_s: rearranging grouped queries. query_factor: traffic of queries and outputs. head_exponent,
    floor_head_exponent: of head size / 128, of item_s and floor_s; group_factor: item_s grows by it for each 64 query
    heads a KV head; window_s: of each wave in a windowed layer.
    """

    kernel: Literal["fa2", "fa3"]
    floor_s: Seconds
    item_s: Seconds
    combine_s: Seconds
    read_efficiency: Share
    read_efficiency_8bit: Share
    flops_efficiency: Share = 0.6
    sweep_s: Seconds = 0.0
    swap_s: Seconds = 0.0
    query_factor: Factor = 1.0
    tail_s: Seconds = 0.0
    head_exponent: Factor = 0.0
    floor_head_exponent: Factor = 0.0
    group_factor: Factor = 0.0
    window_s: Seconds = 0.0

    @property
    def is_8bit_measured(self) -> bool:
        """Whether 8-bit caches have a share of their own."""
        return self.read_efficiency_8bit != self.read_efficiency


class PrefillEfficiency(_Section, frozen=True):
    """Attention of calls that hold prompt chunks (`jaxsim.cost.attention`).

    tile_rows, tile_keys: of a tile; packed: whether it holds all query heads of a KV head. floor_s; item_s: of a tile;
    efficiency: of the 16-bit peak; io_factor: traffic of queries, outputs and keys. factor_8bit, factor_head64: time
    with an 8-bit cache, with heads of 64. joined_rows: rows of a tile that a decoding sequence takes for each query
    head in such a call, 0 = it runs as if alone. joined_read_factor: how often its cache is read then.
    """

    packed: bool
    tile_rows: Rows
    tile_keys: Annotated[int, Meta(ge=0)]
    floor_s: Seconds
    item_s: Seconds
    efficiency: Share
    io_factor: Factor
    factor_8bit: Factor = 1.0
    factor_head64: Factor = 1.0
    joined_rows: Annotated[int, Meta(ge=0)] = 0
    joined_read_factor: Factor = 1.0


class LatentEfficiency(_Section, frozen=True):
    """Multi-head latent attention besides its projections (`jaxsim.cost.attention`).

    decode_floor_s, decode_floor_8bit_s: by weight format; decode_step_s: more as sequences grow to 32.
    read_efficiency, read_efficiency_8bit, flops_efficiency: of absorbed decode. prefill_*: of prefill; copies: how
    often queries, keys and values are moved before it.
    """

    decode_floor_s: Seconds
    decode_floor_8bit_s: Seconds
    decode_step_s: Seconds
    read_efficiency: Share
    read_efficiency_8bit: Share
    flops_efficiency: Share
    prefill_floor_s: Seconds
    prefill_item_s: Seconds
    prefill_efficiency: Share
    copies: Factor


class NcclEfficiency(_Section, frozen=True):
    """A collective of NCCL: two protocols (`jaxsim.cost.collectives`).

    latency_s, low_efficiency: of the protocol for small messages; bulk_latency_s, efficiency: for large ones;
    rank_s: for each further rank.
    """

    latency_s: Seconds
    rank_s: Seconds
    low_efficiency: Share
    bulk_latency_s: Seconds
    efficiency: Share


class CustomAllReduceEfficiency(_Section, frozen=True):
    """vLLM's own all-reduce (`jaxsim.cost.collectives`).

    latency_s: one shot; two_shot_s: more in two shots; efficiency: of the link; bulk_latency_s, bulk_efficiency: beyond
    its buffer.
    """

    latency_s: Seconds
    two_shot_s: Seconds
    efficiency: Share
    bulk_latency_s: Seconds
    bulk_efficiency: Share


class HopEfficiency(_Section, frozen=True):
    """A message from one device to another: latency_s, efficiency of the link."""

    latency_s: Seconds
    efficiency: Share


class ElementwiseEfficiency(_Section, frozen=True):
    """Norms, rotary, activation, sampler: floor_s of a kernel, efficiency of the bandwidth."""

    floor_s: Seconds
    efficiency: Share


class Efficiency(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """All constants of a device. gemm, experts: by number format; nccl: by collective."""

    gemm: dict[str, GemmEfficiency]
    experts: dict[str, ExpertEfficiency]
    decode: DecodeEfficiency
    prefill: PrefillEfficiency
    latent: LatentEfficiency
    elementwise: ElementwiseEfficiency
    nccl: dict[str, NcclEfficiency]
    custom_all_reduce: CustomAllReduceEfficiency
    hop: HopEfficiency

    def __post_init__(self):
        for section, needed in (("gemm", ("bf16",)), ("experts", ("bf16",)), ("nccl", COLLECTIVES)):
            for name in needed:
                if name not in getattr(self, section):
                    raise InputError(f"efficiency.{section}.{name}", None, "missing",
                                     f"give a [{section}.{name}] table")

    @classmethod
    def from_dict(cls, table: Mapping[str, Any], path: str = "efficiency") -> "Efficiency":
        """From a table of the sections above."""
        return convert_table(table, cls, path, "efficiency", "see scenarios/devices/efficiency")


_NAMED = ("gemm", "experts", "nccl")
"""Sections of several tables."""

COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")

DATASHEET = "h100_sxm_80"
"""Whose constants a device takes that nobody has measured, nor one like it: the best measured one's."""


MOST_TRANSFERRED = 0.8
"""No share grows beyond what copies reach when it is carried to a slower memory."""


@functools.cache
def _tables(name: str) -> dict[str, Any]:
    """The file called like its device, as it stands. Raises `InputError`."""
    folder = resources.files("jaxsim.scenarios") / "devices" / "efficiency"
    file = folder / f"{name}.toml"
    if not file.is_file():
        known = sorted(f.name.removesuffix(".toml") for f in folder.iterdir() if f.name.endswith(".toml"))
        raise InputError("device.calibration", f"family:{name}", "no such record", suggest(name, known))
    return tomllib.loads(file.read_text(encoding="utf-8"))


def like_of(name: str) -> str:
    """The record that has what the one called `name` has not; itself where it has everything. Raises `InputError`."""
    return _tables(name).get("like", name)


@functools.cache
def load_efficiency(name: str, bandwidth_ratio: float = 1.0, unit_ratio: float = 1.0) -> Efficiency:
    """The record called like its device, with what it lacks from `like_of` it. Raises `InputError`.

    bandwidth_ratio, unit_ratio: of the two devices, as `transferred` takes them.
    """
    tables = {section: value for section, value in _tables(name).items() if section != "like"}
    if like_of(name) != name:
        below = transferred(load_efficiency(like_of(name)), bandwidth_ratio, unit_ratio)
        tables = _merged(msgspec.to_builtins(below), tables)
    return Efficiency.from_dict(tables, f"{name}.toml")


def _merged(below: dict, above: dict) -> dict:
    return below | {k: below[k] | v if k in _NAMED else v for k, v in above.items()}


def section_records(name: str) -> dict[str, str]:
    """Whose tables each section of a record was fitted on: "gemm.bf16", "decode", ... and names of records."""
    found = section_records(like_of(name)) if like_of(name) != name else {}
    for kind, value in _tables(name).items():
        if kind != "like":
            found |= {f"{kind}.{part}": name for part in value} if kind in _NAMED else {kind: name}
    return found


def transferred(record: Efficiency, bandwidth_ratio: float, unit_ratio: float = 1.0) -> Efficiency:
    """The record for a device with so many times the memory bandwidth, and FLOP/s of a multiprocessor.

    Seconds and shares carry over. But kernels that are bound by conversion and not by memory keep their bytes/s: rows
    between expert products, quantisation, 8-bit caches (source: H100 constants against H200 tables); and an item
    passes tokens at the speed of its multiprocessor (source: `sweep_s` of A100 and RTX PRO 6000). A weight takes as
    many instructions to dequantise anywhere, so they are worth more rows where tensor cores are faster.
    """
    def kept(share: float) -> float:
        return min(share / bandwidth_ratio, max(share, MOST_TRANSFERRED))

    replace = msgspec.structs.replace
    return replace(
        record,
        gemm={name: replace(g, quantise_efficiency=kept(g.quantise_efficiency),
                            dequantise_rows=g.dequantise_rows * unit_ratio) for name, g in record.gemm.items()},
        experts={name: replace(e, row_efficiency=kept(e.row_efficiency)) for name, e in record.experts.items()},
        decode=replace(record.decode, read_efficiency_8bit=kept(record.decode.read_efficiency_8bit),
                       sweep_s=record.decode.sweep_s / unit_ratio, tail_s=record.decode.tail_s / unit_ratio))


def at_clock(record: Efficiency, clock: float) -> Efficiency:
    """The record at a share of the highest clock: an item passes tokens at the speed of its multiprocessor (as in
    `transferred`); shares are of peaks that follow the clock by themselves, and other seconds do not."""
    if clock == 1.0:
        return record
    decode = msgspec.structs.replace(record.decode, sweep_s=record.decode.sweep_s / clock,
                                     tail_s=record.decode.tail_s / clock)
    return msgspec.structs.replace(record, decode=decode)
