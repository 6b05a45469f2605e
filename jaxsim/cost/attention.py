"""Seconds of attention in one layer of one rank: one new token a sequence (decode), and calls that hold prompt chunks.

    decode    floor + combine log2 s + (waves - 1) item + queries + slope x context
              waves = ceil(n K / SMs), s = max(SMs / (n K), 1), slope = pnorm_4(bytes / (BW read), FLOP, passing)
    chunks    floor + pnorm_4(pnorm_2(work / SMs, longest tile), joined reads) + traffic

Decode is affine in the context for a given batch; a chunk's work is affine in the sums the engine keeps. Both become
coefficients before the loop (`CHUNK_COLUMNS`), evaluated in it by `chunk_seconds`.

Source: fits to vLLM operator tables (FlashAttention 2 and 3); docs/cost-model.md has constants, tables and errors.
"""

from typing import NamedTuple

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxsim.cost.rates import TINY_S, Rates, smooth_maximum
from jaxsim.spec.efficiency import DecodeEfficiency, LatentEfficiency, PrefillEfficiency

STREAM_EFFICIENCY = 0.8
"""Of the bandwidth, where a kernel only copies. Source: assumed in the fits of io_factor and copies."""

WINDOW_TILE = 128
"""Tokens a windowed layer reads beyond its window: one tile of keys."""

UNBOUNDED_KEYS = 1e9

LATENT_HEADS = 64
"""Query heads of absorbed latent attention are padded to a multiple of this."""

LATENT_ROWS, LATENT_KEYS = 128, 128
"""Tile of latent prefill."""

SWEPT_BYTES = 256
"""Bytes of K (or V) of a token that `sweep_s` is for: 128 numbers of 16 bits."""

FULL_STEP_SEQUENCES = 32
"""Sequences at which `decode_step_s` has come in whole."""

POWER = 4.0
"""Of the smooth maximum of reads, FLOP and passing."""

LATENT_POWER = 8.0

(PAIR, TOKEN, TILE, TILE_TOKENS, DECODE, DECODE_CONTEXT, LONGEST, LONGEST_KEYS, LONGEST_CONTEXT, READ_KEYS,
 READ_CONTEXT, ADD_TOKEN, ADD_KEYS, MOST_KEYS, APART) = range(15)
"""Columns of chunk coefficients.

Seconds of work per unit of pairs (in full tiles), per new token, per row of tiles, which has so many tokens; per
decoding sequence and per context token of these. Of the longest tile: once, per key of the longest chunk, per context
token of a mean decode. Of reads per key of chunks and per context token. Of traffic per new token and per key. The most
keys a query sees. Whether decodes run apart from chunks (1), with the seconds of a decode-only call.
"""

CHUNK_COLUMNS = 15

NOT_SECONDS = (TILE_TOKENS, MOST_KEYS, APART)
"""Columns that do not grow with the number of layers."""

OF_DECODES = (DECODE, DECODE_CONTEXT, LONGEST_CONTEXT, READ_CONTEXT)
"""Columns of what decodes beside chunks cost."""


class AttentionShape(NamedTuple):
    """Attention of one layer on one rank. cache_bytes: of a cached number; window: 0 = none."""

    heads: int
    kv_heads: int
    head_dim: int
    cache_bytes: float = 2.0
    window: int = 0

    @property
    def decode_bytes(self) -> float:
        """Bytes read for a context token."""
        return 2 * self.kv_heads * self.head_dim * self.cache_bytes


class LatentShape(NamedTuple):
    """Multi-head latent attention of one layer on one rank; narrow: 8-bit weights."""

    heads: int
    latent: int
    rope: int
    nope: int
    value: int
    cache_bytes: float = 2.0
    narrow: bool = False
    hidden: int = 0
    window: int = 0

    @property
    def decode_bytes(self) -> float:
        """Bytes read for a context token."""
        return (self.latent + self.rope) * self.cache_bytes


def chunk_seconds(c: Float[Array, "*shape columns"], tokens: Float[Array, "*shape"], chunks: Float[Array, "*shape"],
                  pairs: Float[Array, "*shape"], keys: Float[Array, "*shape"], decodes: Float[Array, "*shape"],
                  context: Float[Array, "*shape"], tiled: Float[Array, "*shape"] | None = None,
                  most: Int[Array, "*shape"] | None = None) -> Float[Array, "*shape"]:
    """Seconds of a call with prompt chunks, its floor excepted.

    tokens, chunks, pairs, keys: `prefill_tokens`, `num_prefill`, `prefill_pairs`, `prefill_context` of `BatchStats`;
    decodes, context: `num_decode` and their (windowed) context; tiled, most: `prefill_tiled` and `prefill_longest`,
    None where chunks are alike.
    """
    some = jnp.maximum(chunks, 1.0)
    each = keys / some
    read = jnp.minimum(each, c[..., MOST_KEYS]) * chunks
    # Rows of tiles, and tokens in these: the last of a chunk is not full. Of unlike chunks as of the mean one.
    rows = chunks * jnp.ceil(tokens / (some * c[..., TILE_TOKENS]))
    full = rows * c[..., TILE_TOKENS]
    tiled = pairs * (full / jnp.maximum(tokens, 1.0)) if tiled is None else tiled
    seen = jnp.minimum(tiled, 2.0 * c[..., MOST_KEYS] * full)
    work = (c[..., PAIR] * seen + c[..., TOKEN] * tokens + c[..., TILE] * rows + c[..., DECODE] * decodes
            + c[..., DECODE_CONTEXT] * context)
    most = jnp.minimum(each if most is None else most, c[..., MOST_KEYS])
    longest = c[..., LONGEST] + jnp.maximum(c[..., LONGEST_KEYS] * most,
                                            c[..., LONGEST_CONTEXT] * context / jnp.maximum(decodes, 1.0))
    reads = c[..., READ_KEYS] * read + c[..., READ_CONTEXT] * context
    alone = work * work + longest * longest
    # TINY_S keeps the derivative finite where a class has no layers.
    joined = jnp.sqrt(jnp.sqrt(alone * alone + (reads * reads) * (reads * reads) + TINY_S * 1e-6))
    return joined + c[..., ADD_TOKEN] * tokens + c[..., ADD_KEYS] * read


UNSPLIT_ITEMS = 1.6
"""Items a multiprocessor from which FlashAttention 2 does not cut contexts. Source: its `num_splits_heuristic`."""


class Tail(eqx.Module):
    """Seconds of the longest context beyond the mean, which an item sweeps after the others are done.

        alone     alone_s (longest - mean), from `fewest` sequences on
        beside    beside_s (hypot(longest, P) - hypot(mean, P)), P keys a prompt chunk, whose own tiles hide it

    Source: measured pairs of unequal and equal batches (LLMServingSim, attention_skew of vLLM 0.19 on an RTX PRO 6000,
    two models, each predicted by the constant of the other: 1.3 to 2.5 % median, 3.3 to 6.3 % at the 90th percentile,
    before 2.2 to 5.1 and 14 to 17 %), and a simulation of list scheduling for the share of multiprocessors.
    """

    alone_s: Float[Array, ""]
    beside_s: Float[Array, ""]
    fewest: Float[Array, ""]

    def alone(self, sequences: Int[Array, ""], context: Int[Array, ""], longest: Int[Array, ""] | int
              ) -> Float[Array, ""]:
        """Of decodes alone, that read `context` tokens and at most `longest` each; 0 is not known."""
        beyond = jnp.maximum(longest - context / jnp.maximum(sequences, 1), 0.0)
        return jnp.where(sequences >= self.fewest, self.alone_s * beyond, 0.0)

    def beside(self, sequences: Int[Array, ""], context: Int[Array, ""], longest: Int[Array, ""] | int,
               chunks: Int[Array, ""], keys: Int[Array, ""]) -> Float[Array, ""]:
        """Of decodes beside chunks that end with `keys` tokens together."""
        mean, keys = context / jnp.maximum(sequences, 1), keys / jnp.maximum(chunks, 1)
        longest = jnp.maximum(longest, mean)
        # Without a kink at 0, where there are no decodes.
        return self.beside_s * (jnp.sqrt(longest**2 + keys**2 + 1.0) - jnp.sqrt(mean**2 + keys**2 + 1.0))


class Decode(eqx.Module):
    """Attention of one new token a sequence; leaves as in `DecodeEfficiency`."""

    floor_s: Float[Array, ""]
    item_s: Float[Array, ""]
    combine_s: Float[Array, ""]
    read_efficiency: Float[Array, ""]
    read_efficiency_8bit: Float[Array, ""]
    flops_efficiency: Float[Array, ""]
    sweep_s: Float[Array, ""]
    tail_s: Float[Array, ""] | None
    swap_s: Float[Array, ""]
    query_factor: Float[Array, ""]
    head_exponent: Float[Array, ""]
    floor_head_exponent: Float[Array, ""]
    group_factor: Float[Array, ""]
    window_s: Float[Array, ""]
    splits_always: bool = eqx.field(static=True)

    @classmethod
    def of(cls, record: DecodeEfficiency) -> "Decode":
        """Leaves from a record."""
        names = [name for name in record.__struct_fields__ if name not in ("kernel", "source", "tail_s")]
        return cls(**{n: jnp.asarray(getattr(record, n), float) for n in names}, splits_always=record.kernel == "fa3",
                   tail_s=jnp.asarray(record.tail_s, float) if record.tail_s else None)

    def _split(self, shape: AttentionShape, items, rates: Rates):
        splits = jnp.maximum(rates.num_multiprocessors / items, 1.0)
        return splits if self.splits_always or shape.heads > shape.kv_heads else jnp.ones_like(splits)

    def fixed_seconds(self, shape: AttentionShape, sequences: Float[Array, "*shape"], rates: Rates
                      ) -> Float[Array, "*shape"]:
        """Seconds that do not depend on the context, for at least one sequence."""
        n = jnp.maximum(sequences, 1.0)
        items, head = n * shape.kv_heads, shape.head_dim / 128
        waves = jnp.ceil(items / rates.num_multiprocessors)
        item = self.item_s * head ** self.head_exponent * (1 + self.group_factor * shape.heads / shape.kv_heads / 64)
        queries = 4 * n * shape.heads * shape.head_dim * self.query_factor / (rates.bytes_per_s * self.read_efficiency)
        seconds = (self.floor_s * head ** self.floor_head_exponent + (waves - 1) * item + queries
                   + self.combine_s * jnp.log2(self._split(shape, items, rates)))
        if not self.splits_always and shape.heads > shape.kv_heads > 1:
            seconds = seconds + jnp.where(n > 1, self.swap_s, 0.0)
        return seconds + self.window_s * waves if shape.window else seconds

    def slope(self, shape: AttentionShape, sequences: Float[Array, "*shape"], rates: Rates) -> Float[Array, "*shape"]:
        """Seconds per context token."""
        n = jnp.maximum(sequences, 1.0)
        items = n * shape.kv_heads
        share = self.read_efficiency if shape.cache_bytes > 1 else self.read_efficiency_8bit
        memory = shape.decode_bytes / (rates.bytes_per_s * share)
        compute = 4 * shape.heads * shape.head_dim / (rates.flops * self.flops_efficiency)
        passing = (jnp.ceil(items / rates.num_multiprocessors) / self._split(shape, items, rates) / n * self.sweep_s
                   * shape.head_dim * shape.cache_bytes / SWEPT_BYTES)
        return smooth_maximum(POWER, memory + 0 * passing, compute + 0 * passing, passing)

    def tail(self, shape: AttentionShape, rates: Rates, layers: int) -> "Tail | None":
        """What unequal contexts add in so many layers; None where the kernel cuts contexts to equal parts."""
        if self.tail_s is None or not layers:
            return None
        size = shape.head_dim * shape.cache_bytes / SWEPT_BYTES
        read_s = 2 * shape.head_dim * shape.cache_bytes / (rates.bytes_per_s * self.read_efficiency)
        # Of the multiprocessors so many fill the bandwidth: only with fewer at work the tail costs time.
        share = jnp.minimum(self.sweep_s * size / (read_s * rates.num_multiprocessors), 1.0)
        fewest = UNSPLIT_ITEMS * rates.num_multiprocessors / shape.kv_heads if shape.heads > shape.kv_heads else 1.0
        beside_s = layers * size * self.tail_s
        return Tail(beside_s * jnp.cbrt(share), beside_s, jnp.asarray(fewest, float))

    def is_memory_bound(self, shape: AttentionShape, rates: Rates) -> bool:
        """Whether reads outweigh FLOP in the slope."""
        return bool(shape.decode_bytes / (rates.bytes_per_s * self.read_efficiency)
                    >= 4 * shape.heads * shape.head_dim / (rates.flops * self.flops_efficiency))


class Prefill(eqx.Module):
    """Attention of calls that hold prompt chunks; leaves as in `PrefillEfficiency`.

    splits: the keys of a tile are cut over multiprocessors as well, those of decodes beside chunks too, so that few
    queries behind a long context fill all of them; putting partial outputs together is left out, being a few
    microseconds a layer.
    """

    floor_s: Float[Array, ""]
    item_s: Float[Array, ""]
    efficiency: Float[Array, ""]
    io_factor: Float[Array, ""]
    factor_8bit: Float[Array, ""]
    factor_head64: Float[Array, ""]
    joined_read_factor: Float[Array, ""]
    packed: bool = eqx.field(static=True)
    tile_rows: int = eqx.field(static=True)
    tile_keys: int = eqx.field(static=True)
    joined_rows: int = eqx.field(static=True)
    splits: bool = eqx.field(static=True, default=False)

    @classmethod
    def of(cls, record: PrefillEfficiency) -> "Prefill":
        """Leaves from a record."""
        static = ("packed", "tile_rows", "tile_keys", "joined_rows")
        leaves = [name for name in record.__struct_fields__ if name not in (*static, "source")]
        return cls(**{n: jnp.asarray(getattr(record, n), float) for n in leaves},
                   **{n: getattr(record, n) for n in static})

    def chunk_floor(self, shape: AttentionShape) -> Float[Array, ""]:
        """Seconds of any call."""
        return self.floor_s

    def coefficients(self, shape: AttentionShape, rates: Rates) -> Float[Array, " columns"]:
        """Of `chunk_seconds`.

        A tile of `tile_rows` query rows (packed: of the H/K heads of a KV head) passes its keys at kappa seconds a key:
        those before it, half of its own, and half a tile of keys. Joined decodes take a tile for each query head,
        unsplit.
        """
        units, head = rates.num_multiprocessors, shape.head_dim
        key = 4 * head * seconds_per_flop(rates, self.efficiency)
        key = key * (self.factor_8bit if shape.cache_bytes < 2 else 1.0) * (self.factor_head64 if head == 64 else 1.0)
        kappa = self.tile_rows * key
        tile_tokens = self.tile_rows * (shape.kv_heads / shape.heads if self.packed else 1)
        share = (shape.kv_heads if self.packed else shape.heads) / units
        stream = rates.bytes_per_s * STREAM_EFFICIENCY
        c = [0.0] * CHUNK_COLUMNS
        c[PAIR], c[TOKEN] = share * kappa / (2 * tile_tokens), share * kappa / 2
        c[TILE], c[TILE_TOKENS] = share * (self.item_s + kappa * self.tile_keys / 2), tile_tokens
        c[LONGEST], c[LONGEST_KEYS] = self.item_s, 0.0 if self.splits else kappa
        c[ADD_TOKEN] = 4 * shape.heads * head * self.io_factor / stream
        c[ADD_KEYS] = 4 * shape.kv_heads * head * self.io_factor / stream
        c[MOST_KEYS] = shape.window + tile_tokens if shape.window else UNBOUNDED_KEYS
        c[APART] = 0.0 if self.joined_rows else 1.0
        if self.joined_rows:
            c[DECODE] = shape.heads * self.item_s / units
            c[DECODE_CONTEXT] = shape.heads * self.joined_rows * key / units
            c[LONGEST_CONTEXT] = 0.0 if self.splits else self.joined_rows * key
            c[READ_KEYS] = shape.decode_bytes / stream
            c[READ_CONTEXT] = shape.decode_bytes * self.joined_read_factor / stream
        return jnp.stack([jnp.asarray(x, float) for x in c])


class Latent(eqx.Module):
    """Latent attention: absorbed in decode, expanded in prefill; leaves as in `LatentEfficiency`.

    Known gaps: chunks and decodes of one iteration run one after the other.
    """

    decode_floor_s: Float[Array, ""]
    decode_floor_8bit_s: Float[Array, ""]
    decode_step_s: Float[Array, ""]
    read_efficiency: Float[Array, ""]
    read_efficiency_8bit: Float[Array, ""]
    flops_efficiency: Float[Array, ""]
    prefill_floor_s: Float[Array, ""]
    prefill_item_s: Float[Array, ""]
    prefill_efficiency: Float[Array, ""]
    copies: Float[Array, ""]

    @classmethod
    def of(cls, record: LatentEfficiency) -> "Latent":
        """Leaves from a record."""
        return cls(**{n: jnp.asarray(getattr(record, n), float) for n in record.__struct_fields__ if n != "source"})

    def fixed_seconds(self, shape: LatentShape, sequences: Float[Array, "*shape"], rates: Rates
                      ) -> Float[Array, "*shape"]:
        """Seconds that do not depend on the context, for at least one sequence: floor, queries and outputs."""
        n = jnp.maximum(sequences, 1.0)
        floor = self.decode_floor_8bit_s if shape.narrow else self.decode_floor_s
        step = jnp.minimum(jnp.log2(n) / jnp.log2(float(FULL_STEP_SEQUENCES)), 1.0)
        queries = 2 * n * shape.heads * (2 * (shape.latent + shape.rope) + shape.latent)
        return floor + self.decode_step_s * step + queries / (rates.bytes_per_s * self.read_efficiency)

    def slope(self, shape: LatentShape, sequences: Float[Array, "*shape"], rates: Rates) -> Float[Array, "*shape"]:
        """Seconds per context token; query heads are padded to `LATENT_HEADS`."""
        share = self.read_efficiency if shape.cache_bytes > 1 else self.read_efficiency_8bit
        memory = shape.decode_bytes / (rates.bytes_per_s * share)
        compute = self._padded_flops(shape) / (rates.flops * self.flops_efficiency)
        seconds = smooth_maximum(LATENT_POWER, memory, compute)
        return seconds + 0 * sequences

    @staticmethod
    def _padded_flops(shape: LatentShape) -> int:
        return -(-shape.heads // LATENT_HEADS) * LATENT_HEADS * (4 * shape.latent + 2 * shape.rope)

    def is_memory_bound(self, shape: LatentShape, rates: Rates) -> bool:
        """Whether reads outweigh FLOP in the slope."""
        return bool(shape.decode_bytes / (rates.bytes_per_s * self.read_efficiency)
                    >= self._padded_flops(shape) / (rates.flops * self.flops_efficiency))

    def chunk_floor(self, shape: LatentShape) -> Float[Array, ""]:
        """Seconds of any call."""
        return self.prefill_floor_s

    def coefficients(self, shape: LatentShape, rates: Rates) -> Float[Array, " columns"]:
        """Of `chunk_seconds`.

        The chunk's own tokens are expanded by the operator `latent_up`; what is read from the cache is expanded again,
        so a key costs 2 d_c H (d_nope + d_v) FLOP and its copies, and a new token is taken off.
        """
        units = rates.num_multiprocessors
        width = shape.nope + shape.rope + shape.value
        kappa = 2 * LATENT_ROWS * width * seconds_per_flop(rates, self.prefill_efficiency)
        share = shape.heads / units
        stream = rates.bytes_per_s * STREAM_EFFICIENCY
        copied = 2 * shape.heads * width * self.copies / stream
        again = 2 * shape.latent * shape.heads * (shape.nope + shape.value) / (rates.flops * self.prefill_efficiency)
        again = again + copied * (shape.nope + shape.value) / width
        c = [0.0] * CHUNK_COLUMNS
        c[PAIR], c[TOKEN] = share * kappa / (2 * LATENT_ROWS), share * kappa / 2
        c[TILE], c[TILE_TOKENS] = share * (self.prefill_item_s + kappa * LATENT_KEYS / 2), LATENT_ROWS
        c[LONGEST], c[LONGEST_KEYS] = self.prefill_item_s, kappa
        c[ADD_TOKEN] = copied + 8 * shape.hidden / stream - again
        c[ADD_KEYS] = again
        c[MOST_KEYS], c[APART] = UNBOUNDED_KEYS, 1.0
        return jnp.stack([jnp.asarray(x, float) for x in c])


def seconds_per_flop(rates: Rates, efficiency: Float[Array, ""]) -> Float[Array, ""]:
    """Seconds of a FLOP on one multiprocessor."""
    return rates.num_multiprocessors / (rates.flops * efficiency)
