"""Seconds of matrix products: tiles of the output, in waves over the multiprocessors, against the bytes they read.

    product   floor + pnorm_3(waves x tile, bytes / (BW read)) [+ quantising the activations]
              weights stored in fewer bits than they are multiplied in cost arithmetic once a tile
    experts   floor + kernels + pnorm_power(weight bytes / (BW read), tiles of both products) + rows / (BW row)
              each expert's rows padded to whole tiles, whose height the engine chooses by its own rule

Source: fits to vLLM operator tables; docs/cost-model.md has the constants, the tables and the errors.
"""

from collections.abc import Mapping
from typing import Literal, NamedTuple

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxsim.cost.rates import Rates, smooth_maximum
from jaxsim.spec.efficiency import ExpertEfficiency, GemmEfficiency

POWER = 3.0
"""Of the smooth maximum of tiles and bytes."""

ALIGNED = 16
"""Numbers that the depth of a product must be a multiple of to be read with vector instructions: Triton specialises
kernels on strides divisible by it, and its loads of others are single numbers."""

VECTOR_ROWS = 16
"""Rows of a block of the kernel without tensor cores. Source: vLLM, `get_default_config` of fused_moe, min(16, M)."""


class Gemm(eqx.Module):
    """Products (m x k) (k x n) of one number format; leaves as in `GemmEfficiency`, None where not there.

        tile    2 (Tm + dequantise) Tn (k / s + prologue) (1 + edge (1/Tm + 1/Tn)) / (peak eta / SMs)
        waves   ceil(N / SMs), N = ceil(m / Tm) ceil(n / Tn);   s = clip(SMs / N, 1, k / split)
        bytes   weights + m k a + 2 m n, with a = 1 where activations are quantised, which adds 3 m k / (BW quantise)

    Weight-only kernels turn each weight into 16 bits once for every tile that reads it, so the cost falls with the
    tile's height: `dequantise` is rows of multiplication that take as long.
    """

    floor_s: Float[Array, ""]
    efficiency: Float[Array, ""]
    read_efficiency: Float[Array, ""]
    prologue: Float[Array, ""]
    edge: Float[Array, ""]
    narrow_efficiency: Float[Array, ""] | None
    split: Float[Array, ""] | None
    quantise_efficiency: Float[Array, ""] | None
    dequantise_rows: Float[Array, ""] | None
    tiles: tuple[tuple[int, int], ...] = eqx.field(static=True)
    row_limits: tuple[int, ...] = eqx.field(static=True)

    @classmethod
    def of(cls, record: GemmEfficiency) -> "Gemm":
        """Leaves from a record."""
        def leaf(value):
            return jnp.asarray(value, float)

        return cls(leaf(record.floor_s), leaf(record.efficiency), leaf(record.read_efficiency), leaf(record.prologue),
                   leaf(record.edge), leaf(record.narrow_efficiency) if record.narrow_efficiency < 1 else None,
                   leaf(record.split) if record.split else None,
                   leaf(record.quantise_efficiency) if record.quantise_efficiency else None,
                   leaf(record.dequantise_rows) if record.dequantise_rows else None,
                   record.tiles, record.row_limits)

    def _tiled(self, index: int, m, n, k, rates: Rates) -> Float[Array, "*shape"]:
        rows, columns = self.tiles[index]
        count, units = jnp.ceil(m / rows) * jnp.ceil(n / columns), rates.num_multiprocessors
        depth = k
        if self.split is not None:
            depth = k / jnp.clip(units / jnp.maximum(count, 1.0), 1.0, jnp.maximum(k / self.split, 1.0))
        rate = rates.flops / units * self.efficiency
        if index and self.narrow_efficiency is not None:
            rate = rate * self.narrow_efficiency
        waves = jnp.maximum(jnp.ceil(count / units), 1.0)
        lost = 1 + self.edge * (1 / rows + 1 / columns)
        worked = rows if self.dequantise_rows is None else rows + self.dequantise_rows
        return waves * 2.0 * worked * columns * (depth + self.prologue) * lost / rate

    def parts(self, m: Float[Array, "*shape"], n: float, k: float, weight_bytes: float, rates: Rates,
              activation_bytes: float = 2.0) -> tuple[Array, Array, Array]:
        """Seconds of floor, tiles and bytes.

        weight_bytes: of the whole matrix; activation_bytes: of one number.
        """
        times = [self._tiled(i, m, n, k, rates) for i in range(len(self.tiles))]
        tiled = times[-1]
        limits = self.row_limits[::-1] or (None,) * (len(times) - 1)
        for time, limit in zip(times[-2::-1], limits, strict=True):
            tiled = jnp.minimum(tiled, time) if limit is None else jnp.where(m <= limit, time, tiled)
        read = activation_bytes if self.quantise_efficiency is None else 1.0
        memory = (weight_bytes + m * k * read + m * n * activation_bytes) / (rates.bytes_per_s * self.read_efficiency)
        return self.floor_s, tiled, memory

    def seconds(self, m: Float[Array, "*shape"], n: float, k: float, weight_bytes: float, rates: Rates,
                activation_bytes: float = 2.0) -> Float[Array, "*shape"]:
        """Seconds of one product; arguments as of `parts`."""
        floor, tiled, memory = self.parts(m, n, k, weight_bytes, rates, activation_bytes)
        seconds = floor + smooth_maximum(POWER, tiled, memory)
        if self.quantise_efficiency is None:
            return seconds
        return seconds + m * k * (1.0 + activation_bytes) / (rates.bytes_per_s * self.quantise_efficiency)


class Experts(eqx.Module):
    """The fused block of routed experts on one rank; leaves as in `ExpertEfficiency`.

        tiles   sum over both products of max(blocks_T ceil(n / columns) / SMs, resident) x 2 columns (T + half_rows)
                (k + prologue) / (peak eta / SMs),   blocks_T = sum over local experts of ceil(tokens of it / T)
        T       the fastest, or the first whose limit the tokens (or tokens, or rows, for each local expert) keep to
        vector  up to vector_limit rows for each local expert, instead of tiles: sum over both products of
                2 n k (blocks_16 dequantise + rows) / (peak vector_efficiency)
        rows    all m k routed rows, local or not: kernels between the products pass over every one, unless tokens are
                sent to the ranks of their experts

    Source: vLLM's rules: `get_default_config`, `should_moe_wna16_use_cuda` (fused_moe.py), `fused_marlin_moe`, and
    `moe_align_block_size`, which pads the rows of each expert.
    """

    floor_s: Float[Array, ""]
    kernels_s: Float[Array, ""]
    efficiency: Float[Array, ""]
    read_efficiency: Float[Array, ""]
    prologue: Float[Array, ""]
    half_rows: Float[Array, ""]
    row_efficiency: Float[Array, ""]
    resident: Float[Array, ""]
    unaligned_factor: Float[Array, ""]
    vector_efficiency: Float[Array, ""] | None
    vector_dequantise_rows: Float[Array, ""] | None
    tiles: tuple[tuple[int, int], ...] = eqx.field(static=True)
    limits: tuple[float, ...] = eqx.field(static=True)
    limit_of: Literal["tokens", "tokens_per_expert", "rows_per_expert"] = eqx.field(static=True)
    vector_limit: float = eqx.field(static=True)
    power: float = eqx.field(static=True)
    multiples: tuple[int, int] = eqx.field(static=True)

    @classmethod
    def of(cls, record: ExpertEfficiency) -> "Experts":
        """Leaves from a record."""
        names = ("floor_s", "kernels_s", "efficiency", "read_efficiency", "prologue", "half_rows", "row_efficiency",
                 "resident", "unaligned_factor")
        vector = [jnp.asarray(value, float) if record.vector_limit else None
                  for value in (record.vector_efficiency, record.vector_dequantise_rows)]
        return cls(*(jnp.asarray(getattr(record, name), float) for name in names), *vector, record.tiles,
                   record.limits, record.limit_of, record.vector_limit, record.power,
                   (record.hidden_multiple, record.inner_multiple))

    def _chosen(self, seconds: list[Array], load: "ExpertLoad", tokens: Array) -> Array:
        """Seconds of the tile that runs, of those of each."""
        each = tokens / load.local_experts
        amount = {"tokens": tokens, "tokens_per_expert": each, "rows_per_expert": each * load.per_token}[self.limit_of]
        found = seconds[-1]
        for time, limit in zip(seconds[-2::-1], self.limits[::-1] or (None,) * (len(seconds) - 1), strict=True):
            found = jnp.minimum(found, time) if limit is None else jnp.where(amount <= limit, time, found)
        return found

    def parts(self, load: "ExpertLoad", rates: Rates) -> tuple[Array, Array, Array, Array]:
        """Seconds of floor, tiles, weights, and rows between the products."""
        units = rates.num_multiprocessors
        up = 2 if load.gated else 1
        hidden, inner = (-(-size // multiple) * multiple
                         for size, multiple in zip((load.hidden, load.inner), self.multiples, strict=True))
        tokens = load.tokens if load.row_tokens is None else load.row_tokens
        slower = [jnp.where(jnp.asarray(depth) % ALIGNED == 0, 1.0, self.unaligned_factor) for depth in (hidden, inner)]
        products = ((up * inner, hidden, slower[0]), (hidden, inner, slower[1]))
        rate = rates.flops / units * self.efficiency
        tiled = self._chosen([sum(
            jnp.maximum(load.blocks[rows] * -(-width // columns) / units, self.resident)
            * 2 * columns * (rows + self.half_rows) * (depth + self.prologue) * slow / rate
            for width, depth, slow in products) for rows, columns in self.tiles], load, tokens)
        if self.vector_efficiency is not None:
            worked = load.blocks[VECTOR_ROWS] * self.vector_dequantise_rows + load.pairs
            vector = 2.0 * (up + 1) * hidden * inner * worked / (rates.flops * self.vector_efficiency)
            is_few = tokens * load.per_token / load.local_experts <= self.vector_limit
            tiled = jnp.where(is_few, vector, tiled)
        row_bytes = tokens * (load.per_token * ((up + 1) * inner + hidden) + hidden)
        between = load.activation_bytes * row_bytes / (rates.bytes_per_s * self.row_efficiency)
        floor = self.floor_s + self.kernels_s * jnp.minimum(load.tokens / 16, 1.0)
        weight_bytes = load.weight_bytes * (hidden * inner / (load.hidden * load.inner))
        weight_bytes = weight_bytes * (up * slower[0] + slower[1]) / (up + 1)
        return floor, tiled, weight_bytes / (rates.bytes_per_s * self.read_efficiency), between

    def seconds(self, load: "ExpertLoad", rates: Rates) -> Float[Array, "*shape"]:
        """Seconds of one block."""
        floor, tiled, weights, between = self.parts(load, rates)
        return floor + smooth_maximum(self.power, tiled, weights) + between


class ExpertLoad(NamedTuple):
    """What one rank's experts are given.

    tokens: of the ranks together, each to `per_token` experts, of which `local_experts` are here; pairs: rows routed to
    these; blocks: for each tile height, tiles that those rows fill. weight_bytes: of the distinct local experts.
    hidden, inner: sizes of an expert here. row_tokens: tokens whose rows are on this rank, None = all.
    """

    tokens: Float[Array, "*shape"]
    pairs: Float[Array, "*shape"]
    blocks: Mapping[int, Float[Array, "*shape"]]
    weight_bytes: Float[Array, "*shape"]
    per_token: int
    local_experts: float
    hidden: int
    inner: int
    gated: bool = True
    activation_bytes: float = 2.0
    row_tokens: Float[Array, "*shape"] | None = None


def expected_blocks(pairs: Float[Array, "*shape"], distinct: Float[Array, "*shape"], rows: int
                    ) -> Float[Array, "*shape"]:
    """Tiles of so many `rows` that `pairs` routed rows fill on `distinct` experts: D max(1, pairs/(D T) + (1 - 1/T)/2).

    Source: simulation of uniform routing; a tile is half empty on average.
    """
    per_expert = pairs / jnp.maximum(distinct, TINY)
    return distinct * jnp.maximum(1.0, per_expert / rows + (1 - 1 / rows) / 2)


TINY = 1e-6
"""Fewest distinct experts, where there are no tokens."""
