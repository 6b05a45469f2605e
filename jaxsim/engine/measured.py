"""The profiled tier in a run: its tables, made once a system, and how much of a run they had to extrapolate.

The loop reads tables and knows nothing of where they come from. The share is found afterwards: the tape and the times
of the requests tell what every iteration held (`batches`), and both tables price it once more on the host.
"""

import functools
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from jaxsim._core.errors import InputError
from jaxsim.cost.base import BatchStats
from jaxsim.cost.profile import Profile
from jaxsim.cost.profile_checks import check_device
from jaxsim.cost.profiled import Profiled, with_extrapolated
from jaxsim.cost.rank import CUDA_GRAPHS, Roofline
from jaxsim.cost.roofline import roofline
from jaxsim.metrics import LaneResult
from jaxsim.profiles import native
from jaxsim.spec.device import DeviceSpec
from jaxsim.spec.model import ModelSpec
from jaxsim.spec.plan import Plan
from jaxsim.spec.presets import Scheduler
from jaxsim.spec.scenario import Scenario

SOON_S = 1e-6
"""Times closer than this are of the same event: the tape and the requests round differently."""

ROWS = 1 << 14
"""Batches priced at once."""


def tables(scenario: Scenario, scheduler: Scheduler, model: ModelSpec, device: DeviceSpec, plan: Plan,
           num_slots: int, longest: int, max_tokens: int | None = None) -> tuple[Profiled, Profiled]:
    """Tables of the scenario's profile and those of their extrapolated part, as host arrays.

    For up to `num_slots` sequences of up to `longest` tokens. Made once for all runs and scenarios that agree in what
    they are made from, for as long as the file stays as it is. Raises `InputError` where it cannot be read or is of
    another system.
    """
    cost = scenario.cost
    base = (model, device, plan, scenario.dtype, scenario.kv_dtype, cost.host or scheduler.host,
            cost.distinct_experts, scenario.engine.moe_backend, tuple(sorted(cost.overrides.items())))
    # A power of two, as that of the tokens.
    most = max(scheduler.most_tokens(num_slots, longest), max_tokens or 0)
    sizes = (most, num_slots, 1 << (longest - 1).bit_length())
    return _tables(cost.path, _stamp(cost.path), base, sizes, CUDA_GRAPHS[scheduler.cudagraph_mode],
                   scheduler.async_scheduling)


def _stamp(path: str) -> tuple[int, ...]:
    """Changes with the file; what is wrong with it is told by the reader."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return ()
    return found.st_ino, found.st_size, found.st_mtime_ns


@functools.lru_cache(maxsize=8)
def _profile(path: str, stamp: tuple[int, ...]) -> Profile:
    try:
        return native.read(path)
    except InputError as error:
        # What is wrong with the whole file is wrong with the field that names it.
        field = "cost.path" if error.field == "profile" else error.field
        raise InputError(field, error.value, error.problem, error.remedy) from None


@functools.lru_cache(maxsize=64)
def _base(model, device, plan, dtype, kv_dtype, host, distinct_experts, moe_backend, overrides) -> Roofline:
    return roofline(model, device, plan, dtype, kv_dtype, host=host, distinct_experts=distinct_experts,
                    moe_backend=moe_backend, **dict(overrides))


@functools.lru_cache(maxsize=64)
def _tables(path, stamp, base, sizes, cuda_graphs, async_scheduling) -> tuple[Profiled, Profiled]:
    profile = _profile(path, stamp)
    check_device(profile, base[1])
    return jax.device_get(with_extrapolated(profile, _base(*base), *sizes, cuda_graphs=cuda_graphs,
                                            async_scheduling=async_scheduling))


# ---- what a run was made of


_KINDS = {name: np.float32 if name == "prefill_pairs" else np.int32 for name in BatchStats.__dataclass_fields__
          if name not in ("prefill_tiled", "prefill_longest")}


def batches(lane: LaneResult) -> tuple[BatchStats, Int[np.ndarray, " batches"]]:
    """The iterations of a run that kept a tape, as batches, and how many of each.

    A row of the tape is one batch, and another for the iterations planned behind it, at the middle of these.
    Counts and prompt tokens are the tape's. Which requests decode at what context, and which part of a prompt a
    chunk is, follows from the times of the requests and the iterations in between.

    Exact where no prompts share an iteration and nothing is preempted. Shared iterations split their prompt tokens by
    what each prompt needs, and count their chunks as alike. A preempted request loses what it computed evenly over its
    life, and what is computed again counts as a prompt of its own: with a preemption for every fifth request, contexts
    are within 1 % in sum and pairs within 4 % (vLLM V1 rules, against the reference simulator); with several for each,
    pairs are up to 50 % high.
    """
    parts = [_instance(lane, i) for i in np.unique(lane.steps["instance"])]
    columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]} if parts else {}
    if not parts:
        return BatchStats(**{name: np.zeros(0, kind) for name, kind in _KINDS.items()}), np.zeros(0, int)
    weight = columns.pop("weight")
    kept = weight > 0
    return BatchStats(**{name: column[kept].astype(_KINDS[name]) for name, column in columns.items()}), weight[kept]


def _instance(lane: LaneResult, instance: int) -> dict[str, np.ndarray]:
    rows = np.flatnonzero(lane.steps["instance"] == instance)
    tape = {name: np.asarray(column)[rows] for name, column in lane.steps.items()}
    start_s, chunk, iterations = tape["time_s"], tape["prefill_tokens"], tape["iterations"].astype(np.int64)
    # Decoding iterations: those before a row, and whether its first is one.
    decodes = tape["decode_seqs"]
    is_first = (decodes > 0).astype(np.int64)
    before = np.cumsum(iterations - 1 + is_first) - (iterations - 1 + is_first)
    mine = np.flatnonzero((lane.instance == instance) & ~np.isnan(lane.scheduled_s))
    prompt, output = (np.asarray(x)[mine].astype(np.float64) for x in (lane.input_tokens, lane.output_tokens))
    cached = np.zeros_like(prompt) if lane.cached_tokens is None else np.asarray(lane.cached_tokens, float)[mine]
    times = {name: getattr(lane, name)[mine] for name in ("scheduled_s", "first_token_s", "finish_s")}
    last = len(rows) - 1
    # The row that computes the first part of a prompt, the one that computes its end, the one of the last token.
    opens = np.clip(np.searchsorted(start_s, times["scheduled_s"] + SOON_S, "right") - 1, 0, last)
    closes, ends = (np.where(np.isnan(times[name]), last, np.clip(
        np.searchsorted(start_s, times[name] - SOON_S) - 1, opens, last)) for name in ("first_token_s", "finish_s"))
    is_answering = ~np.isnan(times["first_token_s"])

    # Contexts. Twice as many places as rows: the first iteration of a row, then those behind it.
    first_end_s = start_s + tape["first_s"]
    behind_s = np.maximum(tape["duration_s"] - tape["first_s"], SOON_S)
    inside = np.clip((times["finish_s"] - first_end_s[ends]) / behind_s[ends], 0, 1) * (iterations[ends] - 1)
    inside = np.where(np.isnan(inside), iterations[ends] - 1, inside)
    since = before[closes] + is_first[closes]
    span = before[ends] + np.maximum(inside - 1 + is_first[ends], 0) - since
    pace = np.where((output > 2) & ~np.isnan(times["finish_s"]), (output - 2) / np.maximum(span, 1), 1.0)
    starts, stops = 2 * closes + 1, 2 * ends + (inside > 0.5) + 1
    decoding = is_answering & (stops > starts)
    now = np.stack([before, before + 0.5 * iterations - 1 + is_first], axis=1).reshape(-1)
    count, at_zero, rate = (_running_sum(2 * len(rows), starts[decoding], stops[decoding], value[decoding])
                            for value in (np.ones_like(pace), prompt + 1 - pace * since, pace))
    context = np.maximum((at_zero + rate * now) / np.maximum(count, 1), 1.0).reshape(-1, 2)
    # What decodes behind a first iteration with prompts is not on the tape.
    following = np.where(chunk > 0, np.minimum(count[1::2], tape["running"]), decodes)

    keys, num_chunks, completed = _chunks(chunk, opens, closes, prompt, cached, is_answering)
    zeros = np.zeros_like(decodes)
    first = {"num_decode": decodes, "decode_context": np.rint(decodes * context[:, 0]),
             "num_prefill": np.where(chunk > 0, np.maximum(num_chunks, 1), 0), "prefill_tokens": chunk,
             "prefill_context": np.rint(np.where(chunk > 0, (chunk + keys) / 2, 0)), "prefill_pairs": chunk * keys,
             "num_sampled": decodes + completed, "decode_shared": zeros, "longest_context": zeros,
             "weight": np.ones_like(iterations)}
    then = {"num_decode": following, "decode_context": np.rint(following * context[:, 1]), "num_prefill": zeros,
            "prefill_tokens": zeros, "prefill_context": zeros, "prefill_pairs": zeros, "num_sampled": following,
            "decode_shared": zeros, "longest_context": zeros,
            "weight": iterations - 1}
    return {name: np.concatenate([first[name], then[name]]) for name in first}


def _running_sum(size: int, starts: Int[np.ndarray, " requests"], stops: Int[np.ndarray, " requests"],
                 values: Float[np.ndarray, " requests"]) -> Float[np.ndarray, " places"]:
    """At every place the sum of the values of all requests with starts <= place < stops."""
    change = np.bincount(starts, values, size + 1) - np.bincount(stops, values, size + 1)
    return np.cumsum(change)[:size]


def _chunks(chunk: Int[np.ndarray, " rows"], opens: Int[np.ndarray, " requests"],
            closes: Int[np.ndarray, " requests"], prompt: Float[np.ndarray, " requests"],
            cached: Float[np.ndarray, " requests"], is_answering) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Keys a prompt token, prompts with a chunk, prompts completed, of every row.

    A prompt takes its part of the prompt tokens computed between its first row and its last.
    """
    filled = np.flatnonzero(chunk > 0)
    amounts = chunk[filled].astype(np.float64)
    done = np.concatenate([[0.0], np.cumsum(amounts)])
    low, high = np.searchsorted(filled, opens), np.searchsorted(filled, closes, "right")
    counts = np.maximum(high - low, 0)
    request = np.repeat(np.arange(len(opens)), counts)
    at = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts) + low[request]
    whole = np.maximum(done[high] - done[low], 1.0)[request]
    start, end = (cached[request] + (prompt - cached)[request] * (done[at + step] - done[low[request]]) / whole
                  for step in (0, 1))
    pairs, tokens = (np.bincount(at, x, len(filled)) for x in (end**2 - start**2, end - start))
    keys, num_chunks = np.zeros(len(chunk)), np.zeros(len(chunk), int)
    # Without a prompt that is under way it is a preempted one, computed again.
    keys[filled] = np.where(tokens > 0, pairs / np.maximum(tokens, 1e-9), amounts)
    num_chunks[filled] = np.bincount(at, minlength=len(filled))
    return keys, num_chunks, np.bincount(closes[is_answering], minlength=len(chunk))


@jax.jit
def _device_seconds(both: tuple[Profiled, Profiled], stats: BatchStats) -> Float[Any, "2 batches"]:
    return jnp.stack([jax.vmap(cost.device_seconds)(stats) for cost in both])


def extrapolated_share(both: tuple[Profiled, Profiled], lane: LaneResult) -> float | None:
    """Of the device seconds of a run, the share that no measurement stands behind; None without a tape.

    both: as `tables` makes them.
    """
    if lane.steps is None:
        return None
    stats, weight = batches(lane)
    sums = np.zeros(2)
    for low in range(0, len(weight), ROWS):
        some = slice(low, low + ROWS)
        room = ROWS - len(weight[some])
        padded = jax.tree.map(lambda x, some=some, room=room: np.pad(x[some], (0, room)), stats)
        sums += np.asarray(_device_seconds(both, padded), np.float64) @ np.pad(weight[some], (0, room))
    return float(np.clip(sums[1] / sums[0], 0, 1)) if sums[0] > 0 else None
