"""Scenarios with the costs of a real system: Llama-3.1-8B on H100 behind vLLM V1, as tables.

Some lanes have other numbers in the same tables (a sliding window, a slow host, a device that overtakes it), so that
one program meets every edge of the cost model.
"""

from collections.abc import Callable
from dataclasses import replace

import equinox as eqx
import jax
import numpy as np

from jaxsim.cost import attention as a
from jaxsim.cost import tabulated as t
from jaxsim.engine import lower
from jaxsim.kernels import octaves
from jaxsim.spec.dims import Dims
from jaxsim.spec.scenario import Scenario
from tests.engine.cases import LANES, Case
from tests.reference import simulator

FLAGS = simulator.preset("vllm-v1")
DIMS = Dims(num_requests=40, num_executors=2, num_slots=16, block_size=16, reads_chunks=True)
LONGEST = 1024
ROUTER = "least_outstanding"


def tables(stages: int = 1, **engine) -> t.TabulatedCost:
    """Cost tables of the system, on the host; engine: further fields of it."""
    scenario = Scenario.from_dict({
        "schema_version": 1, "model": {"name": "llama-3.1-8b"}, "device": {"name": "h100"},
        "engine": {"pipeline_parallel_size": stages, **engine},
        "workload": {"kind": "poisson", "rate_rps": 1.0, "input": 512, "output": 128}})
    return jax.device_get(lower.make_cost(scenario, lower.resolve_system(scenario), DIMS.num_slots, LONGEST))


def varied(rng: np.random.Generator, cost: t.TabulatedCost) -> t.TabulatedCost:
    """The same tables with a window, or a host that sometimes is slower than the device."""
    kind = rng.integers(3)
    if kind == 1:
        rows = cost.by_sequences.copy()
        rows[:, t.WINDOW] = 3 * rows[:, t.CONTEXT]
        window = np.int32(rng.integers(50, 600))
        return eqx.tree_at(lambda c: (c.by_sequences, c.window), cost, (rows, window))
    if kind == 2:
        rows = cost.by_sequences.copy()
        # Just above the device's time without context: it overtakes in the middle of a run.
        rows[:, t.DECODE_LAUNCH] = rows[:, t.DECODE_DEVICE] + rng.uniform(0, 2e-4)
        rows[:, t.CONTEXT] *= 20
        attention = cost.attention.copy()
        attention[:, [a.PAIR, a.TOKEN, a.TILE, a.LONGEST_KEYS, a.ADD_KEYS]] *= 20
        return eqx.tree_at(lambda c: (c.by_sequences, c.attention), cost, (rows, attention))
    return cost


def draw_real(rng: np.random.Generator, cost: t.TabulatedCost, count: int | None = None,
              flags: simulator.Flags = FLAGS) -> Case:
    """Poisson arrivals, log-normal lengths, in half of the cases a pool that is too small."""
    count = count or int(rng.integers(DIMS.num_requests // 2, DIMS.num_requests + 1))
    rate = np.exp(rng.uniform(np.log(4), np.log(60)))
    arrival = np.round(np.cumsum(rng.exponential(1 / rate, count)) * 2**20) / 2**20
    prompt = np.clip(np.round(np.exp(rng.normal(5.0, 0.9, count))), 1, 800).astype(int)
    output = np.clip(np.round(np.exp(rng.normal(4.0, 0.8, count))), 1, LONGEST - prompt).astype(int)
    seqs = int(rng.integers(4, DIMS.num_slots + 1))
    need = LONGEST // DIMS.block_size + 2 * (flags.reserve == "expected")
    budget = int(rng.choice([64, 256, 2048]))
    limits = dict(max_num_seqs=seqs, max_num_batched_tokens=budget if flags.chunked_prefill else 2048,
                  watermark_blocks=0,
                  num_blocks=need + int(rng.integers(0, 20 if rng.random() < 0.5 else 2000)), max_model_len=LONGEST)
    return Case(arrival, prompt, output, output, np.zeros(count, int), rng.random((count, 2)).astype(np.float32),
                limits, (), cost=varied(rng, cost))


def draw_batch(seed: int, cost: t.TabulatedCost, count: int = LANES,
               flags: simulator.Flags = FLAGS) -> list[Case]:
    """A batch from one seed."""
    rng = np.random.default_rng(seed)
    return [draw_real(rng, cost, flags=flags) for _ in range(count)]


def exact_cost(cost: t.TabulatedCost) -> Callable[[simulator.BatchStatsRef], float]:
    """The same tables read in float64 NumPy: seconds of an iteration, written apart from the engine's."""
    lanes = exact_lanes(cost)

    def seconds(s: simulator.BatchStatsRef) -> float:
        serial, launch, device, _ = lanes(s)
        return float(serial + max(launch, device))

    return seconds


def exact_stage_cost(cost: t.TabulatedCost) -> Callable[[simulator.BatchStatsRef], list[float]]:
    """The same for the engine and each stage: the head belongs to the last, the rest goes by layers."""
    lanes, shares = exact_lanes(cost), cost.stages.astype(np.float64)

    def seconds(s: simulator.BatchStatsRef) -> list[float]:
        serial, launch, device, head = lanes(s)
        on_device = [share * (device - head) for share in shares]
        on_device[-1] += head
        return [serial, *(max(share * launch, own) for share, own in zip(shares, on_device, strict=True))]

    return seconds


def exact_lanes(cost: t.TabulatedCost) -> Callable[[simulator.BatchStatsRef], tuple[float, float, float, float]]:
    """Serial and launch seconds of the host, device seconds, and those of the head among them."""
    by_sequences, attention = cost.by_sequences.astype(np.float64), cost.attention.astype(np.float64)
    by_tokens, by_sampled = cost.by_tokens.astype(np.float64), cost.by_sampled.astype(np.float64)

    def knots_of(grid, table):
        return next(k for n in range(1, 1 << 20, 8) if len(k := octaves.knots(grid, n)) >= len(table))[: len(table)]

    token_knots, sampled_knots = knots_of(t.TOKENS, by_tokens), knots_of(t.SAMPLED, by_sampled)
    window = int(cost.window)
    ring = None if cost.ring is None else [float(leaf) for leaf in jax.tree.leaves(cost.ring)]

    def shared(s: simulator.BatchStatsRef) -> tuple[simulator.BatchStatsRef, float]:
        """What one of the context-parallel ranks computes of an iteration, and what the ring adds to it."""
        if ring is None or not s.num_prefill:
            return s, 0.0
        ranks, layers, latency_s, key_s, floor_s = ring
        ranks = int(ranks)
        tokens = s.prefill_tokens if ranks == 1 else 2 * -(-s.prefill_tokens // (2 * ranks))
        own = replace(s, prefill_tokens=tokens, prefill_pairs=s.prefill_pairs / ranks, chunks=())
        step_s = sum(chunks(c, replace(own, num_decode=0), 0) for c in attention) / ranks
        # What the chunks bring; each rank has the rest of their contexts.
        send_s = layers * (latency_s + s.prefill_tokens / ranks * key_s)
        return own, (ranks - 1) * (max(step_s, send_s) - step_s + floor_s)

    def chunks(c: np.ndarray, s: simulator.BatchStatsRef, context: float) -> float:
        each = s.prefill_tokens / s.num_prefill
        keys = min(s.prefill_context / s.num_prefill, c[a.MOST_KEYS])
        tiles = s.num_prefill * np.ceil(each / c[a.TILE_TOKENS])
        longest, padded = keys, s.prefill_pairs * tiles * c[a.TILE_TOKENS] / s.prefill_tokens
        if s.chunks:
            # Each by itself: its queries in whole tiles.
            longest = min(max(h + new for h, new in s.chunks), c[a.MOST_KEYS])
            padded = sum((2 * h + new) * np.ceil(new / c[a.TILE_TOKENS]) * c[a.TILE_TOKENS] for h, new in s.chunks)
        pairs = min(padded, 2 * c[a.MOST_KEYS] * tiles * c[a.TILE_TOKENS])
        work = (c[a.PAIR] * pairs + c[a.TOKEN] * s.prefill_tokens
                + c[a.TILE] * tiles + c[a.DECODE] * s.num_decode + c[a.DECODE_CONTEXT] * context)
        longest = c[a.LONGEST] + max(c[a.LONGEST_KEYS] * longest, c[a.LONGEST_CONTEXT] * context / max(s.num_decode, 1))
        reads = c[a.READ_KEYS] * keys * s.num_prefill + c[a.READ_CONTEXT] * context
        added = c[a.ADD_TOKEN] * s.prefill_tokens + c[a.ADD_KEYS] * keys * s.num_prefill
        return np.hypot(np.hypot(work, longest) ** 2, reads ** 2) ** 0.5 + added

    def seconds(s: simulator.BatchStatsRef) -> tuple[float, float, float, float]:
        s, waiting_s = shared(s)
        row = by_sequences[min(s.num_decode + s.num_prefill, len(by_sequences) - 1)]
        own = by_sequences[min(s.num_decode, len(by_sequences) - 1)]
        contexts = [s.decode_context, min(s.decode_context, s.num_decode * window)]
        reads = [own[t.CONTEXT] * contexts[0], own[t.WINDOW] * contexts[1]]
        if s.num_prefill:
            device = np.interp(s.prefill_tokens + s.num_decode, token_knots, by_tokens)
            device += np.interp(s.num_sampled, sampled_knots, by_sampled) + own[t.BESIDE]
            device += sum(chunks(c, s, context) + c[a.APART] * read
                          for c, context, read in zip(attention, contexts, reads, strict=True)) + waiting_s
            launch = row[t.MIXED_LAUNCH]
        else:
            device, launch = own[t.DECODE_DEVICE] + sum(reads), row[t.DECODE_LAUNCH]
        head = np.interp(s.num_sampled, sampled_knots, by_sampled)
        return row[t.SERIAL], launch, device, min(head, device)

    return seconds


def without_requests(case: Case, keep: slice, shift_s: float = 0.0) -> Case:
    """Part of a case's requests, earlier by `shift_s`."""
    mask = np.zeros(len(case), bool)
    mask[keep] = True
    part = case.kept(mask)
    return replace(part, arrival_s=part.arrival_s - shift_s)
