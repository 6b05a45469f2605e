"""Seconds of an iteration from measured operator tables, read on regular grids.

`profiled(profile, base, ...)` resamples a `Profile` on the host; the loop reads the result, a `Profiled`. What a
profile does not hold comes from the roofline `base`, and what it does not reach is its edge value scaled by the
roofline's ratio; `coverage` tells how much of a batch's time that is.

    device = by_tokens(tokens) + by_sampled(sampled) + prefill(chunks, keys) + mixed(chunks, keys, n, context)
           = by_sequences[n].device + decode(n, context)                            decode only
    seconds = serial + max(launch, device)

Reduction of a batch: n decodes at their mean context; all chunks as one of their total tokens, with
`prefill_pairs / prefill_tokens` keys a token (for one chunk exact, for several the pairs are kept).
"""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from jaxsim.cost import operators
from jaxsim.cost.attention import Tail
from jaxsim.cost.base import UNBOUNDED, BatchStats, DecodePace
from jaxsim.cost.profile import OPERATORS, Profile, Resampled, interpolate
from jaxsim.cost.profile_checks import check_system, check_units
from jaxsim.cost.profile_rates import TableRates
from jaxsim.cost.rank import Roofline, captured_tokens, pad_to_graph
from jaxsim.cost.tabulated import DECODE_DEVICE, SAMPLED, TOKENS, AbstractTables, Together
from jaxsim.kernels import octaves

DECODES, CONTEXT = (0, 1), (4, 2)
"""Decode attention: sequences, 2 knots an octave (published ones are powers of two); context in units of 16."""

CHUNK, KEYS = (4, 4), (4, 3)
"""Prefill attention: its steps from one wave of tiles to the next lie close."""

MIXED_KEYS, MIXED_DECODES, MIXED_CONTEXT = (8, 0), (0, 0), (4, 0)
"""What decodes add to an iteration with chunks: four axes, so few knots each, and the measured ones for the chunks,
where a wave of tiles more can double the time within 17 tokens."""

MOST_CHUNK_KNOTS = 32

Cell = tuple[Int[Array, ""], Float[Array, ""]]


def _corners(table: Float[Array, "..."], indices: list[Int[Array, ""]]) -> list[Float[Array, ""]]:
    """Entries at the corners of a cell, the last axis fastest."""
    flat, stride, at, offsets = table.reshape(-1), 1, jnp.int32(0), [0]
    for index, size in zip(reversed(indices), reversed(table.shape), strict=True):
        at = at + index * stride
        offsets = offsets + [o + stride for o in offsets]
        stride *= size
    # No index is negative; allowing for it costs three operations a corner.
    return [lax.dynamic_index_in_dim(flat, at + o, keepdims=False, allow_negative_indices=False) for o in offsets]


def _interpolate(table: Float[Array, "..."], cells: list[Cell]) -> Float[Array, ""]:
    """Multilinear interpolation; a cell is its lower index and the share of the way through."""
    corners = _corners(table, [index for index, _ in cells])
    for _, share in reversed(cells):
        corners = [low + (high - low) * share for low, high in zip(corners[::2], corners[1::2], strict=True)]
    return corners[0]


def _cell(grid: octaves.Grid, value: Int[Array, ""], num_knots: int, divisor=None, of=None) -> Cell:
    """The cell of `value`; its share from `of / divisor`, where the value is the whole part of that."""
    index, low, octave = octaves.rung(grid, value, num_knots)
    if divisor is None:
        return index, octaves.share(value.astype(jnp.float32), low, octave)
    over = (of - low * divisor).astype(jnp.float32)
    return index, over / (divisor << octave).astype(jnp.float32)


class Profiled(AbstractTables):
    """Resampled operator tables of one rank: seconds of all layers, on the grids of this module.

    by_tokens: everything that depends on the tokens of an iteration with chunks; by_sampled: LM head and sampler.
    by_sequences: for every count 0..max: device seconds of a decode-only iteration without attention (captured
        graphs padded), host launches of a decode-only and of a mixed iteration, serial host seconds.
    decode_attention: nondecreasing in the context, so that a pace never shrinks.
    prefill_attention: iterations with chunks; mixed_attention: what decodes add to it, and mixed_chunks: where
        among its chunk knots each count of tokens lies (knot + share). Without a measured table of mixed batches both
        are None, and decodes add what they take alone less `attention_floor_s`.

    Every table entry is a differentiable leaf; between knots the result is linear in each statistic.

    tail: what unequal contexts add, by the roofline's form and constants. together, stages: as in `TabulatedCost`.

    Known gaps: chunks enter through sums only.
    """

    by_tokens: Float[Array, " token_knots"]
    by_sampled: Float[Array, " sampled_knots"]
    by_sequences: Float[Array, "sequences 4"]
    decode_attention: Float[Array, "decode_knots context_knots"]
    prefill_attention: Float[Array, "chunk_knots key_knots"]
    mixed_attention: Float[Array, "chunk_knots key_knots decode_knots context_knots"] | None
    mixed_chunks: Float[Array, " tokens"] | None
    attention_floor_s: Float[Array, ""]
    tail: Tail | None = None
    together: Together | None = None
    stages: Float[Array, " stages"] | None = None

    def _decode_attention(self, num_decode, context) -> Float[Array, ""]:
        rows, columns = self.decode_attention.shape
        count = jnp.maximum(num_decode, 1)
        return _interpolate(self.decode_attention, [
            _cell(DECODES, num_decode, rows), _cell(CONTEXT, lax.div(context, count), columns, count, context)])

    def _mixed_attention(self, stats: BatchStats) -> Float[Array, ""]:
        tokens = jnp.maximum(stats.prefill_tokens, 1)
        keys = (stats.prefill_pairs / tokens.astype(jnp.float32)).astype(jnp.int32)
        chunks, columns = self.prefill_attention.shape
        prefill = _interpolate(self.prefill_attention, [
            _cell(CHUNK, stats.prefill_tokens, chunks), _cell(KEYS, keys, columns)])
        if self.mixed_attention is None:
            alone = self._decode_attention(stats.num_decode, stats.distinct_context)
            return prefill + jnp.maximum(alone - self.attention_floor_s, 0.0)
        count = jnp.maximum(stats.num_decode, 1)
        sizes = self.mixed_attention.shape
        position = self.mixed_chunks[jnp.minimum(stats.prefill_tokens, self.mixed_chunks.shape[0] - 1)]
        knot = jnp.minimum(position.astype(jnp.int32), sizes[0] - 2)
        return prefill + _interpolate(self.mixed_attention, [
            (knot, position - knot.astype(jnp.float32)), _cell(MIXED_KEYS, keys, sizes[1]),
            _cell(MIXED_DECODES, stats.num_decode, sizes[2]),
            _cell(MIXED_CONTEXT, lax.div(stats.distinct_context, count), sizes[3], count, stats.distinct_context)])

    def attention(self, stats: BatchStats) -> Float[Array, ""]:
        """Seconds of attention, all layers."""
        alone = self._decode_attention(stats.num_decode, stats.distinct_context)
        mixed = self._mixed_attention(stats)
        if self.tail is not None:
            alone = alone + self.tail.alone(stats.num_decode, stats.decode_context, stats.longest_context)
            mixed = mixed + self.tail.beside(stats.num_decode, stats.decode_context, stats.longest_context,
                                             stats.num_prefill, stats.prefill_context)
        return jnp.where(stats.num_prefill == 0, alone, mixed)

    def own_seconds(self, stats: BatchStats) -> Float[Array, ""]:
        """Device seconds without what ranks do together."""
        plain = (octaves.look_up(TOKENS, self.by_tokens, stats.prefill_tokens + stats.num_decode)
                 + octaves.look_up(SAMPLED, self.by_sampled, stats.num_sampled))
        row = self.row(stats.num_decode)
        return self.attention(stats) + jnp.where(stats.num_prefill == 0, row[DECODE_DEVICE], plain)

    def decode(self, num_sequences: Int[Array, ""], context: Int[Array, ""], shared: Int[Array, ""] | int = 0,
               longest: Int[Array, ""] | int = 0) -> DecodePace:
        """Pace until the mean context leaves its cell or the device overtakes the host."""
        tail_s = 0.0 if self.tail is None else self.tail.alone(num_sequences, context, longest)
        context = context - shared
        row = self.row(num_sequences)
        rows, columns = self.decode_attention.shape
        count = jnp.maximum(num_sequences, 1)
        index, low, octave = octaves.rung(CONTEXT, lax.div(context, count), columns)
        width = jnp.int32(1) << octave
        sequences, share = _cell(DECODES, num_sequences, rows)
        corners = _corners(self.decode_attention, [sequences, index])
        start, end = (low + (high - low) * share for low, high in zip(corners[:2], corners[2:], strict=True))
        growth = (end - start) / width.astype(jnp.float32)
        over = (context - low * count).astype(jnp.float32) / count.astype(jnp.float32)
        device = row[DECODE_DEVICE] + start + growth * over + tail_s
        to_edge = jnp.where(index < columns - 2, lax.div((low + width) * count - context, count) + 1, UNBOUNDED)
        return self.paced(num_sequences, row, device, growth, to_edge)


# ---- rooflines of single operators, for what lies outside the tables


# ---- from a profile to the loop's tables


def _add(*parts: Resampled) -> Resampled:
    return Resampled(*(sum(column) for column in zip(*parts, strict=True)))


def _scaled(part: Resampled, factor: float) -> Resampled:
    return Resampled(part.seconds * factor, part.outside_s * factor)


class _Builder(NamedTuple):
    """Resamples one profile; every method returns seconds of all layers, and how many are extrapolated."""

    profile: Profile
    base: Roofline

    @property
    def rates(self) -> TableRates:
        return TableRates(self.base)

    def table(self, name: str, *axes) -> Resampled:
        """One call on a grid; from the roofline where the profile has no such table."""
        axes = [np.asarray(axis, np.float64) for axis in axes]
        rate, table = self.rates.of(name), self.profile.tables.get(name)
        if table is None:
            seconds = np.asarray(rate(*np.ix_(*axes)), np.float64)
            return Resampled(seconds, seconds)
        return interpolate(table.points, table.seconds, axes, rate)

    def _covering(self, work: str) -> str | None:
        return next((name for name in self.profile.tables if work in OPERATORS[name].covers), None)

    def works(self, works: list[operators.Work], counts) -> Resampled:
        """Operators that depend on one count."""
        counts = np.asarray(counts, np.float64)
        total = Resampled(np.zeros_like(counts), np.zeros_like(counts))
        for work in works:
            name = self._covering(work.name)
            if name is None:
                seconds = np.asarray(self.rates._seconds(work), np.float64) + 0 * counts
                part = Resampled(seconds, seconds)
            elif name.startswith("latent_"):
                continue
            elif name == "experts_touched":
                part = self._experts(counts)
            else:
                at, calls = counts, work.calls
                if OPERATORS[name].axes == ("message_bytes",):
                    # One table entry is one kernel; an exchange has two, with half of the bytes each.
                    calls = work.calls * work.kernels
                    at = np.asarray(work.message_bytes, np.float64) / work.kernels + 0 * counts
                elif name == "experts":
                    at = counts * self.base.num_ranks
                total = _add(total, _scaled(self.table(name, at), calls))
                continue
            total = _add(total, _scaled(part, work.calls))
        return total

    def _experts(self, counts) -> Resampled:
        tokens, touched = self.rates.expert_load(counts)
        touched = np.minimum(touched, self.profile.tables["experts_touched"].points[:, 1].max())
        grids = [np.unique(axis, return_inverse=True) for axis in (tokens, touched)]
        part = self.table("experts_touched", *(values for values, _ in grids))
        return Resampled(*(x[grids[0][1].reshape(-1), grids[1][1].reshape(-1)] for x in part))

    def together(self, counts) -> tuple[Resampled, Resampled]:
        """What ranks that iterate together do with the tokens of all, so many on each: experts, and the exchange."""
        counts = np.asarray(counts, np.float64)
        works = self.base.token_works(jnp.asarray(counts, float), together=True)
        return tuple(self.works([w for w in works if w.is_exchange == is_exchange], counts)
                     for is_exchange in (False, True))

    def tokens(self, counts) -> Resampled:
        """Everything else that depends on the tokens of an iteration, attention excepted."""
        base, counts = self.base, np.asarray(counts, np.float64)
        total = self.works(base.token_works(jnp.asarray(counts, float), together=False), counts)
        for name in ("qk_norm", "residual_add"):
            if name in self.profile.tables:
                total = _add(total, _scaled(self.table(name, counts), base.model.layers))
        return total

    def sampled(self, counts) -> Resampled:
        """LM head and sampler."""
        base, counts = self.base, np.maximum(np.asarray(counts, np.float64), 1)
        return self.works(operators.head_work(base.model, base.plan, base.weights, jnp.asarray(counts, float)), counts)

    @property
    def _kind(self) -> str:
        return "latent_" if any(n.startswith("latent_") for n in self.profile.tables) else "attention_"

    def _layered(self, name: str, axes, window_axis: int, reach: int) -> Resampled:
        """All layers of an attention table; windowed ones see `reach` on the axis at most."""
        model = self.base.model
        total = _scaled(self.table(name, *axes), model.layers - model.window_layers)
        if model.window_layers:
            windowed = name + "_windowed"
            if windowed in self.profile.tables:
                part = self.table(windowed, *axes)
            else:
                inside = np.unique(np.minimum(axes[window_axis], reach))
                back = np.searchsorted(inside, np.minimum(axes[window_axis], reach))
                part = self.table(name, *axes[:window_axis], inside, *axes[window_axis + 1:])
                part = Resampled(*(np.take(x, back, axis=window_axis) for x in part))
            total = _add(total, _scaled(part, model.window_layers))
        return total

    def decode_attention(self, sequences, context) -> Resampled:
        """Decode-only attention; nothing where nothing decodes."""
        part = self._layered(self._kind + "decode", [sequences, context], 1, self.base.model.sliding_window)
        seconds = np.maximum.accumulate(part.seconds, axis=1)
        is_empty = (np.asarray(sequences) == 0)[:, None]
        return Resampled(*(np.where(is_empty, 0.0, x) for x in (seconds, np.minimum(part.outside_s, seconds))))

    def prefill_attention(self, chunk, keys) -> Resampled:
        """Attention of chunks alone."""
        return self._layered(self._kind + "prefill", [chunk, keys], 1, 2 * self.base.model.sliding_window)

    def mixed_chunks(self, max_tokens: int) -> Float[np.ndarray, " chunk_knots"]:
        """Chunk sizes measured in mixed batches, 0, and octaves beyond them."""
        if "attention_mixed" not in self.profile.tables:
            return np.zeros(1)
        measured = np.unique(self.profile.tables["attention_mixed"].points[:, 0])
        if len(measured) > MOST_CHUNK_KNOTS:
            measured = measured[np.linspace(0, len(measured) - 1, MOST_CHUNK_KNOTS).round().astype(int)]
        beyond = measured[-1] * 2.0 ** np.arange(1, max(np.ceil(np.log2(max_tokens / measured[-1])), 0) + 1)
        return np.unique([0, *measured, *beyond])

    def mixed_attention(self, chunk, keys, sequences, context) -> Resampled | None:
        """What decodes add to the attention of chunks."""
        if "attention_mixed" not in self.profile.tables:
            return None
        window, some = self.base.model.sliding_window, sequences[sequences > 0]
        both = self._layered("attention_mixed", [chunk, keys, some, context], 3, window)
        alone = self.prefill_attention(chunk, keys)
        # Of the sum, so much is outside as is not already in the part of the chunks.
        seconds = np.maximum(both.seconds - alone.seconds[:, :, None, None], 0.0)
        outside = np.clip(both.outside_s - alone.outside_s[:, :, None, None], 0.0, seconds)
        zero = np.zeros((*seconds.shape[:2], len(sequences) - len(some), seconds.shape[3]))
        return Resampled(*(np.concatenate([zero, x], axis=2) for x in (seconds, outside)))

    def host(self, counts, cuda_graphs: bool, async_scheduling: bool) -> tuple[np.ndarray, ...]:
        """Launches of decode-only and mixed iterations, serial seconds."""
        base = self.base
        if "host_step" in self.profile.tables:
            base = eqx.tree_at(lambda b: (b.host_step_s, b.host_sequence_s), base, (jnp.zeros(()), jnp.zeros(())))
        lanes = [np.asarray(x, np.float64) for x in base.host_seconds(
            jnp.asarray(counts, float), cuda_graphs=cuda_graphs, async_scheduling=async_scheduling)]
        if "host_step" in self.profile.tables:
            host = self.table("host_step", counts).seconds
            lanes = [lane + host * (async_scheduling != (i == 2)) for i, lane in enumerate(lanes)]
        return tuple(lanes)


def with_extrapolated(profile: Profile, base: Roofline, max_tokens: int, max_sequences: int, max_context: int, *,
                      cuda_graphs: bool = True, async_scheduling: bool = False) -> tuple[Profiled, Profiled]:
    """What `profiled` and `extrapolated` make, for the price of one."""
    check_system(profile, base)
    check_units(profile, base)
    make = _Builder(profile, base)
    counts = np.arange(max_sequences + 1)
    padded = pad_to_graph(counts) if cuda_graphs else counts
    decode = _add(make.tokens(padded), make.sampled(counts))
    host = make.host(counts, cuda_graphs, async_scheduling)
    contexts = octaves.knots(CONTEXT, max_context)
    attention = make.decode_attention(octaves.knots(DECODES, max_sequences), contexts)
    chunks = make.mixed_chunks(max_tokens)
    mixed = make.mixed_attention(
        chunks, octaves.knots(MIXED_KEYS, 2 * max_context),
        octaves.knots(MIXED_DECODES, max_sequences), octaves.knots(MIXED_CONTEXT, max_context))
    knots, ranks = octaves.knots(TOKENS, max_tokens), base.num_ranks
    run_at = pad_to_graph(knots) if cuda_graphs is True else knots
    joint = (_add(*make.together(padded)), *make.together(run_at)) if ranks > 1 else None
    parts = (make.tokens(run_at), make.sampled(octaves.knots(SAMPLED, max_sequences)),
             decode, attention, make.prefill_attention(octaves.knots(CHUNK, max_tokens),
                                                       octaves.knots(KEYS, 2 * max_context)), mixed)

    def tables(i: int) -> Profiled:
        by_tokens, by_sampled, by_count, decodes, prefills, mix = (None if p is None else p[i] for p in parts)
        lanes = host if i == 0 else tuple(0.0 * lane for lane in host)
        floor = attention[0][1, 0] if i == 0 else 0.0
        places = None if mix is None else np.interp(np.arange(max_tokens + 1), chunks, np.arange(len(chunks)))
        return Profiled(*(None if x is None else jnp.asarray(x, jnp.float32) for x in (
            by_tokens, by_sampled, np.stack([by_count, *lanes], axis=1), decodes, prefills, mix, places,
            floor)), tail=base.tail if i == 0 else None, stages=base.stages, together=joint and Together(
                *(jnp.asarray(part[i], jnp.float32) for part in joint), captured_tokens(cuda_graphs), ranks))

    return tables(0), tables(1)


def profiled(profile: Profile, base: Roofline, max_tokens: int, max_sequences: int, max_context: int, *,
             cuda_graphs: bool = True, async_scheduling: bool = False) -> Profiled:
    """The tables the loop reads, up to `max_tokens` tokens and `max_sequences` sequences an iteration and `max_context`
    tokens a sequence.

    `base` is a roofline of the same model, device and plan: its host lane, its prices of operators that the profile
    lacks, its ratios outside the tables. Raises `InputError` where the two do not go together.
    """
    return with_extrapolated(profile, base, max_tokens, max_sequences, max_context, cuda_graphs=cuda_graphs,
                             async_scheduling=async_scheduling)[0]


def extrapolated(profile: Profile, base: Roofline, max_tokens: int, max_sequences: int, max_context: int, *,
                 cuda_graphs: bool = True, async_scheduling: bool = False) -> Profiled:
    """The same tables with only those device seconds that no measurement stands behind, and no host.

    A loop that adds up `device_seconds` of both, each iteration, has the extrapolated share of a run, for the price
    of a second look-up. Its paces mean nothing.
    """
    return with_extrapolated(profile, base, max_tokens, max_sequences, max_context, cuda_graphs=cuda_graphs,
                             async_scheduling=async_scheduling)[1]


def coverage(profile: Profile, base: Roofline, stats: BatchStats, *, cuda_graphs: bool = True
             ) -> Float[np.ndarray, " batches"]:
    """Share of each batch's device seconds that measurements stand behind, 0..1.

    `stats`: a grid of batches, every field an array of one axis. Counted as extrapolated: operators priced by the
    roofline, and values past the largest measurement on any axis (in proportion, in cells at the edge).
    Not counted: sizes below the smallest measured; several chunks read as one.
    """
    fields = [np.atleast_1d(np.asarray(x)) for x in jax.tree.leaves(stats)]
    stats = jax.tree.unflatten(jax.tree.structure(stats), [jnp.asarray(x) for x in np.broadcast_arrays(*fields)])
    decodes, context = np.asarray(stats.num_decode), np.asarray(stats.decode_context)
    keys = np.asarray(stats.prefill_pairs) / np.maximum(np.asarray(stats.prefill_tokens), 1)
    longest = max(float((context / np.maximum(decodes, 1)).max()), float(keys.max()) / 2, 1.0)
    most = int((decodes + np.asarray(stats.num_prefill)).max()) + 1
    measured, outside = with_extrapolated(profile, base, int((decodes + np.asarray(stats.prefill_tokens)).max()) + 1,
                                          most, int(np.ceil(longest)) + 1, cuda_graphs=cuda_graphs)
    total, extra = (np.asarray(jax.vmap(c.device_seconds)(stats), np.float64) for c in (measured, outside))
    return 1.0 - np.clip(extra / np.maximum(total, 1e-30), 0.0, 1.0)
