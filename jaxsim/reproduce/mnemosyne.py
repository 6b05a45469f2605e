"""Mnemosyne and Medha (arXiv 2409.17264): prompts of millions of tokens on pipelines and groups that share their KV.

What one prompt takes alone is replayed chunk by chunk through the stages, with the event engine's own tables: sequence
pipeline parallelism (chunk i + 1 enters the first stage as chunk i leaves it). Beside it stands context parallelism,
one iteration of the engine's ring (`jaxsim.cost.context_parallel`). Decodes of up to ten million tokens, and short
requests behind long ones, are the event engine's.

The cost is the roofline with its calibrated constants, with attention kernels that cut keys as well as queries
(`cost.split_kv`): without them a chunk of 32 tokens keeps one multiprocessor busy with all keys. Nothing is fitted to
the claims.

Short requests beside long ones, in the order of relative slack and in those it is compared with, are the event
engine's too, with four prompts partly computed side by side.

Known gaps: LoongServe's instances grow and shrink, ours compute whole prompts on a ring of one size, all ranks of which
read all of a context in decodes.
"""

import concurrent.futures as futures
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from jaxtyping import Float

from jaxsim.analytic import long_context as lc
from jaxsim.cost.base import BatchStats
from jaxsim.cost.roofline import Roofline, roofline
from jaxsim.cost.tabulated import TabulatedCost
from jaxsim.io.figure import FAINT, INK, LIMIT, drawn, heading
from jaxsim.reproduce.claim import FALLS, RISES, Claim, Factor, Reproduction
from jaxsim.reproduce.runs import means_in_order, simulated, simulated_of, study
from jaxsim.spec.device import load_device
from jaxsim.spec.model import load_model
from jaxsim.spec.plan import Plan

DESCRIPTION = "Mnemosyne: chunks of long prompts through pipelines, KV over groups of GPUs, short requests behind"

PAPER, DERIVED = "arXiv 2409.17264", "arithmetic of the paper's numbers"

SMALL, LARGE, DEVICE, TENSORS = "llama-3-8b", "llama-3-70b", "h100", 8

MILLION, CHUNK = 1_000_000, 2048
"""Tokens of a prompt, and of its chunks where these are of one size."""

STAGES = (1, 2, 4, 8, 16)

ATTENTION_CHUNKS = (32, 64, 128, 512, 2048)

CHUNK_MINUTES = (9.17, 8.60, 8.38, 8.39, 8.31)
"""Of attention in a prefill of a million tokens in growing chunks, of which only the first and last have a size."""

OVERLAP_TOKENS = 24_500
"""Of a GPU, from which ring attention hides its messages. Source: the paper. It is about the FLOP/s of an A100 over
12.5 GB/s of a network: over NVLink, a 24th of that."""

FIVE_PERCENT, POINTS, CHUNK_POINTS, CP_TOLERANCE = 0.05, 0.05, 0.03, 0.15

TBT_MS = 30.0

SIZE, THRESHOLD, INPUT = "engine.kv_parallel_size", "engine.kv_parallel_tokens", "workload.input"

BUDGET, TARGET = "engine.max_num_batched_tokens", "engine.target_batch_time_ms"

LEVELS, TOKENS = "workload.input.levels", "workload.input.tokens"

HALF_OR_TWICE = Factor(2)

RATE, ORDER = "workload.rate_rps", "engine.scheduling_policy"

SHORT_TOKENS = 8000
"""Of a short prompt, at most."""

TENS = 10.0
"""At least, of "tens of times"."""

_COLOURS = ("#56B4E9", "#0072B2", "#E69F00", "#D55E00")


def reproduce(num_seeds: int | None = None) -> Reproduction:
    """All claims of this system; num_seeds: runs of each point instead of the studies' own number."""
    found = _simulated(num_seeds)
    groups, lars, whole = _groups(found["groups"]), found["lars"], found["whole"]
    convoy, adaptive = found["convoy"], found["adaptive"]
    for rows in (convoy, whole):
        rows["share"] = list(map(share_of, rows[LEVELS], rows[TOKENS]))
    prefills = {name: [prefill_s(name, MILLION, CHUNK, stages) for stages in STAGES] for name in (SMALL, LARGE)}
    claims = (*anchors(), *_prefill_claims(prefills), *_chunk_claims(), *_decode_claims(groups),
              *_convoy_claims(convoy, adaptive), *_whole_claims(whole), *_lars_claims(lars, whole),
              *_three_claims(found["2d"], found["3d"]), *_unsimulated())
    return Reproduction(claims, functools.partial(_draw, prefills, groups, convoy, adaptive, lars))


def _simulated(num_seeds: int | None) -> dict[str, pd.DataFrame]:
    """Rows of all studies, two at a time: most of what they take is to compile them, on one core each."""
    of_short = functools.partial(simulated_of, most_tokens=SHORT_TOKENS)
    # The longest first.
    runs = {"lars": of_short, "whole": of_short, "convoy": simulated, "adaptive": simulated, "2d": of_short,
            "3d": of_short, "groups": simulated}
    made = [study(f"mnemosyne-{name}", num_seeds) for name in runs]
    with futures.ThreadPoolExecutor(2) as pool:
        return dict(zip(runs, pool.map(lambda run, one: run(one), runs.values(), made), strict=True))


def _claim(claim: str, paper: Any, ours: Any, tolerance: Any, reason: str = "", source: str = PAPER) -> Claim:
    return Claim(system="mnemosyne", claim=claim, source=source, paper=paper, ours=ours, tolerance=tolerance,
                 reason=reason)


# ---- one prompt alone


@functools.cache
def model_of(name: str, stages: int) -> Roofline:
    """A model over so many stages of 8 GPUs."""
    plan = Plan(tensor_parallel_size=TENSORS, pipeline_parallel_size=stages)
    return roofline(load_model(name), load_device(DEVICE), plan, split_kv=True)


@functools.cache
def tables(name: str, stages: int, max_tokens: int = 4096) -> TabulatedCost:
    """What the event engine would read of it."""
    return model_of(name, stages).tabulate(max_tokens, 8)


def chunk_stats(history: np.ndarray, tokens: np.ndarray) -> BatchStats:
    """Of iterations with a chunk each, and nothing else."""
    pairs = tokens * (2.0 * history + tokens)
    zero = np.zeros(len(tokens), np.int32)
    arrays = (zero, zero, zero + 1, tokens, history + tokens, pairs.astype(np.float32), zero, zero, zero)
    return BatchStats(*(jnp.asarray(x, jnp.float32 if x.dtype == np.float32 else jnp.int32) for x in arrays))


def chunks_of(tokens: int, chunk: int) -> tuple[np.ndarray, np.ndarray]:
    """What is computed before each chunk of a prompt, and its tokens."""
    sizes = lc.fixed_chunks(tokens, chunk)
    return np.cumsum(sizes) - sizes, sizes


def pipelined_s(parts: Float[np.ndarray, "chunks stages+1"]) -> float:
    """Chunks one behind the other through the engine and the stages, each of which works on one at a time."""
    free = np.zeros(parts.shape[1])
    for seconds in parts:
        at = 0.0
        for stage, part in enumerate(seconds):
            at = free[stage] = max(at, free[stage]) + part
    return float(free[-1])


def prefill_s(name: str, tokens: int, chunk: int, stages: int) -> float:
    """Seconds of a prompt alone, in chunks of one size."""
    cost, stats = tables(name, stages), chunk_stats(*chunks_of(tokens, chunk))
    if stages == 1:
        return float(np.asarray(jax.jit(jax.vmap(cost.iteration))(stats), float).sum())
    parts = jax.jit(jax.vmap(lambda one: cost.stage_seconds(one, stages)))(stats)
    return pipelined_s(np.asarray(parts, float))


@functools.cache
def ring_of(name: str, ranks: int) -> TabulatedCost:
    """What the event engine would read of a model over a ring of so many ranks of 8 GPUs."""
    plan = Plan(tensor_parallel_size=TENSORS, prefill_context_parallel_size=ranks)
    return roofline(load_model(name), load_device(DEVICE), plan, split_kv=True).tabulate(1 << 20, 8)


def context_parallel_s(name: str, tokens: int, ranks: int, *, is_striped: bool = True, floor_gpus: int | None = None
                       ) -> float:
    """Seconds of a prompt alone whose tokens are spread over ranks of 8 GPUs, in one iteration of the engine's ring.

    Each rank has an equal part of the tokens; striped, of the pairs too, otherwise the last has the most and all wait
    for it. floor_gpus: share the tokens of a rank, of which those of a GPU are held against `OVERLAP_TOKENS`; below
    it compute, which goes with the square of the tokens, no longer hides messages, which go with their number, so
    attention is longer by the ratio of the two. None: what the link says alone, which the ring always has.
    """
    cost, stats = ring_of(name, ranks), _chunk(0.0, tokens)
    mean_s = float(cost.chunk_attention(cost.ring.of_rank(stats)))
    longest_s = mean_s if is_striped else float(cost.chunk_attention(_chunk(tokens - tokens / ranks, tokens / ranks)))
    exposed = 1.0 if floor_gpus is None else max(OVERLAP_TOKENS * ranks * floor_gpus / tokens, 1.0)
    return float(cost.iteration(stats)) + longest_s * exposed - mean_s


def _chunk(history: float, tokens: float) -> BatchStats:
    """Of an iteration with one chunk."""
    return jax.tree.map(lambda x: x[0], chunk_stats(np.array([history]), np.array([tokens])))


def attention_s(name: str, tokens: int, chunk: int) -> float:
    """Seconds of attention in all chunks of a prompt, its floor included."""
    history, sizes = chunks_of(tokens, chunk)
    seconds = jax.jit(jax.vmap(tables(name, 1).chunk_attention))(chunk_stats(history, sizes))
    return float(np.asarray(seconds, float).sum()) + len(sizes) * float(model_of(name, 1).chunk_floor_s)


def decode_ms(name: str, context: int, stages: int) -> float:
    """A decode of one sequence alone."""
    return 1e3 * float(tables(name, stages).decode(jnp.int32(1), jnp.int32(context)).first_s)


# ---- claims


def points(published: float, within: float = POINTS) -> float:
    """A tolerance of so many points of a share, as a part of what was published."""
    return round(within / published, 3)


def anchors() -> list[Claim]:
    """Numbers that follow from the model and the device alone."""
    small, large, device = load_model(SMALL), load_model(LARGE), load_device(DEVICE)
    peak, memory = device.bf16_flops, device.memory_bytes_per_s
    everything, causal = (lc.prefill_flops(large, MILLION, causal=x) for x in (False, True))
    alone = lc.long_context(small, peak_flops=peak, memory_bytes_per_s=memory, gpus=TENSORS)
    ideal = tuple(1e3 * float(alone.decode_s(1e7, groups)) for groups in (1, 2, 4))
    both = "all pairs, as the paper counts them; causal attention, which is simulated, has half of them"
    return [
        _claim("prefill of 1 M tokens, Llama-3 70B, 10^18 FLOP", 2.8, everything / 1e18, FIVE_PERCENT, both),
        _claim("the same at the peak of one H100, minutes, at least", 48.0, everything / peak / 60, FIVE_PERCENT, both),
        _claim("the same, causal, minutes", 24.5, causal / peak / 60, FIVE_PERCENT, source=DERIVED),
        _claim("KV of 10 M tokens, 8B and 70B, TB", (1.31, 3.28),
               tuple(1e7 * m.kv_bytes_per_token() / 1e12 for m in (small, large)), FIVE_PERCENT, source=DERIVED),
        _claim("tokens that saturate chunked attention, 8 and 4 query heads a KV head", (37.0, 74.0),
               tuple(float(lc.saturating_chunk(peak, memory, heads)) for heads in (8, 4)), FIVE_PERCENT,
               "the paper says about 40 for the first", source=DERIVED),
        _claim("decode at 10 M tokens, 8B on 8 H100 a group, ideal, ms, 1, 2, 4 groups", (49.5, 25.1, 12.8), ideal,
               FIVE_PERCENT, source=DERIVED)]


def _prefill_claims(prefills: dict[str, list[float]]) -> list[Claim]:
    def efficiency(name: str, stages: int) -> float:
        return prefills[name][0] / (stages * prefills[name][STAGES.index(stages)])

    gpus = TENSORS * STAGES[-1]
    fastest = prefills[SMALL][-1]
    rings = [context_parallel_s(SMALL, MILLION, STAGES[-1], **given) / fastest
             for given in ({"floor_gpus": 1}, {"floor_gpus": TENSORS}, {"is_striped": False})]
    local = MILLION // STAGES[-1]
    peak = gpus * load_device(DEVICE).bf16_flops
    mfus = [lc.prefill_flops(load_model(SMALL), MILLION, causal=x) / fastest / peak for x in (True, False)]
    setting = f"chunks of {CHUNK:,} tokens, TP{TENSORS}"
    ring = ("context parallelism in one iteration of the engine's ring; the pipeline has its ramp, hops and a host in"
            " every chunk")
    return [
        _claim(f"SPP, efficiency at {gpus} H100, 8B, 1 M tokens: 80 % less 5 points, and ours", RISES,
               (0.80 - POINTS, efficiency(SMALL, STAGES[-1])), 0.0, setting),
        _claim("SPP, efficiency at 8 stages, 70B, 1 M tokens", 0.85, efficiency(LARGE, 8), points(0.85),
               f"{setting}; five points either way"),
        _claim(f"MFU at {gpus} H100, 8B, 1 M tokens (50 to 60 %)", 0.55, mfus[0], None,
               f"{setting}; {100 * mfus[0]:.0f} % counting causal pairs, {100 * mfus[1]:.0f} % counting all pairs, as"
               " the paper does elsewhere: which of them it counts here is not said where we could read it"),
        _claim(f"SPP over context parallelism, times faster, 1 M tokens, {gpus} H100", 1.64, rings[0], CP_TOLERANCE,
               f"striped: equal pairs a rank; all messages hidden, as the {local:,} tokens of a rank are more than"
               f" {OVERLAP_TOKENS:,}; {ring}"),
        _claim(f"the same, {OVERLAP_TOKENS:,} tokens read as of each of the {TENSORS} GPUs of a rank", 1.64, rings[1],
               None, f"of which each has {local // TENSORS:,}, so attention is {OVERLAP_TOKENS * TENSORS / local:.1f}"
               " times longer than hidden; whether a GPU or a rank is meant is not said where we could read it"),
        _claim("the same, contiguous parts of the prompt on the ring", 1.64, rings[2], None,
               "the last rank then has the most pairs and all wait for it; which of both was measured is not said"
               " where we could read it")]


def _chunk_claims() -> list[Claim]:
    seconds = [attention_s(LARGE, MILLION, chunk) for chunk in ATTENTION_CHUNKS]
    return [
        _claim("attention of 1 M tokens, 70B, 8 H100: chunks of 32 over chunks of 2,048", 1.11,
               seconds[0] / seconds[-1], points(1.11, CHUNK_POINTS),
               "the calibrated form adds reading the KV in every chunk to attention, where a kernel can hide it"),
        _claim(f"attention of 1 M tokens, minutes, chunks of {', '.join(map(str, ATTENTION_CHUNKS))}", CHUNK_MINUTES,
               tuple(x / 60 for x in seconds), None,
               "the unit and the sizes between the first and the last are not given; causal here")]


def _groups(rows: pd.DataFrame) -> pd.DataFrame:
    """With the number of groups that have a part of the context."""
    in_use = np.ceil(rows[INPUT] / rows[THRESHOLD]).clip(upper=rows[SIZE])
    return rows.assign(groups=in_use.astype(int), tpot_ms=rows["p50_tpot_ms"])


def _decode_claims(rows: pd.DataFrame) -> list[Claim]:
    long = rows[rows[INPUT] == rows[INPUT].max()].groupby("groups")["tpot_ms"].mean()
    small = load_model(SMALL)
    bytes_read = 1e7 * small.kv_bytes_per_token() + 2 * small.num_active_parameters
    ideal_ms = 1e3 * bytes_read / (TENSORS * load_device(DEVICE).memory_bytes_per_s)
    setting = "event engine, 8B, TP8, SPP4, 10 M tokens"
    deep = decode_ms(SMALL, 2 * MILLION, 8) / decode_ms(SMALL, 2 * MILLION, 1) - 1
    return [
        _claim("decode at 10 M tokens: two groups take less by", 0.40, float(1 - long[2] / long[1]), points(0.40),
               setting),
        _claim("tokens/s of a sequence of 10 M tokens, two groups (about 30)", 30.0, float(1e3 / long[2]), None,
               f"{setting}; only about"),
        _claim(f"TBT at 10 M tokens with four groups, 128 H100, ms: below {TBT_MS:g}", FALLS,
               (TBT_MS, float(long[4])), 0.0, setting),
        _claim("MBU of a decode at 10 M tokens on one group (up to 92 %)", 0.92, float(ideal_ms / long[1]),
               points(0.92), setting),
        _claim("decode latency at 2 M tokens, SPP 8 over SPP 1, more by", 0.16, deep, points(0.16),
               "hops between stages, and a graph a stage, of an engine that does nothing else between stages; the model"
               " is not said, 8B here")]


def share_of(levels: Sequence[float], tokens: Sequence[int]) -> float:
    """Of long prompts, by the levels and tokens of their quantiles."""
    return round(1 - levels[-2], 4) if tokens[-1] > SHORT_TOKENS else 0.0


def _convoy_claims(convoy: pd.DataFrame, adaptive: pd.DataFrame) -> list[Claim]:
    shares = tuple(sorted(convoy["share"].unique()))
    text = ", ".join(f"{100 * share:g}" for share in shares)
    setting = ("event engine, 8B, TP8 SPP2 of 16 A100, 0.75 requests/s, first come first served; lengths of short"
               " requests are ours; with 5 % long prompts the queue grows with the run, so these are of 400 requests")
    claims = []
    for budget, mine in convoy.groupby(BUDGET):
        for metric, name in (("p50_ttft_ms", "median"), ("p90_ttft_ms", "P90")):
            means, margins = means_in_order(mine, "share", shares, metric)
            claims.append(_claim(f"the convoy: {name} TTFT, ms, {text} % long prompts, chunks of {budget:,}", RISES,
                                 means, margins, setting))
    last = convoy[(convoy["share"] == shares[-1]) & (convoy[BUDGET] == convoy[BUDGET].max())]
    least = adaptive[TARGET].min()
    own = adaptive[adaptive[TARGET] == least]
    both = pd.concat([last.assign(of=0), own.assign(of=1)])
    means, margins = means_in_order(both, "of", (0, 1), "p99_itl_ms")
    claims.append(_claim(
        f"P99 time between tokens, ms: chunks of {convoy[BUDGET].max():,}, then of {least:g} ms", FALLS, means, margins,
        f"{setting}; {100 * shares[-1]:g} % long prompts"))
    claims.append(_claim(
        "time between tokens with long prompts and fixed chunks, s, up to", 1.0, float(last["p99_itl_ms"].mean()) / 1e3,
        None, f"P99, chunks of {convoy[BUDGET].max():,}; a bound, and of which percentile is not said"))
    return claims


def _whole_claims(rows: pd.DataFrame) -> list[Claim]:
    """Of instances that compute whole prompts."""
    shares, top = tuple(sorted(rows["share"].unique())), rows[RATE].max()
    setting = ("event engine, whole prompts on a ring of TP2 CP4 of 8 A100, two instances; LoongServe's elasticity is"
               " left out")
    claims, busy = [], rows[rows[RATE] == top]
    for metric, name in (("p50_ttft_ms", "median"), ("p90_ttft_ms", "P90")):
        means, margins = means_in_order(busy, "share", shares, metric)
        claims.append(_claim(f"whole prompts: {name} TTFT, ms, {', '.join(f'{100 * s:g}' for s in shares)} % long",
                             RISES, means, margins, setting))
    grows = "where long prompts are more than two instances can do: it grows with the length of the run"
    both = f"{grows}; 174 is of P90 in the paper's text, of P99 elsewhere in it"
    for metric, share, published, name, unstable in (
            ("p50_ttft_ms", 0.01, 8.0, "1 % long, median", "which of the percentiles is not said"),
            ("p50_ttft_ms", 0.05, 30.0, "5 % long, P50", grows), ("p90_ttft_ms", 0.05, 174.0, "5 % long, P90", both),
            ("p99_ttft_ms", 0.05, 174.0, "5 % long, P99", both)):
        means = busy.groupby("share")[metric].mean()
        claims.append(_claim(f"whole prompts: {name}, times that without", published, float(means[share] / means[0.0]),
                             None, f"{setting}; of TTFT, {unstable}"))
    return claims


def _lars_claims(lars: pd.DataFrame, whole: pd.DataFrame) -> list[Claim]:
    """Of short requests beside long ones: the convoy removed, in four orders, and LoongServe's beside them; at the
    paper's rate, then at one that can be carried."""
    target_ms = study("mnemosyne-lars").scenario["engine"]["target_batch_time_ms"]
    calm, busy = (lars[lars[RATE] == rate] for rate in (lars[RATE].min(), lars[RATE].max()))
    theirs = whole[(whole["share"] == whole["share"].max()) & whole["seed"].isin(lars["seed"])]
    engine = f"event engine, 8B, TP8 SPP2 of 16 A100, 5 % long prompts, batches of {target_ms:g} ms"
    setting = (f"{engine}, {busy[RATE].max():g} requests/s, of which the long ones alone ask for"
               f" {100 * long_share_of_peak():.0f} % of the peak, which is more than can be reached: queues grow with"
               " the run, so these are of 400 requests")
    share = long_share_of_peak() * calm[RATE].max() / busy[RATE].max()
    carried = (f"{engine}; the paper's numbers are of {busy[RATE].max():g} requests/s, at this rate the long ones ask"
               f" for {100 * share:.0f} % of the peak")
    claims = []
    for metric, name in (("p50_of_ttft_ms", "median"), ("p90_of_ttft_ms", "P90"), ("p99_of_ttft_ms", "P99")):
        means, margins = means_in_order(busy, ORDER, ("fcfs", "lars"), metric)
        claims.append(_claim(f"the convoy removed: {name} TTFT of short requests, ms, first come first served, then"
                             " LARS", FALLS, means, margins, setting))
    for metric, name in (("p50_over_ttft_ms", "median"), ("p99_over_ttft_ms", "P99")):
        means, _ = means_in_order(busy, ORDER, ("fcfs", "lars"), metric)
        claims.append(_claim(f"what it costs: {name} TTFT of long prompts, s, first come first served, then LARS", None,
                             tuple(ms / 1e3 for ms in means), None, f"nothing published could be read; {setting}"))
    for order, name in (("fcfs", "first come first served"), ("edf", "EDF")):
        claims.append(_claim(f"{name} over LARS, P99 TTFT of short requests, times: {TENS:g}, and ours", RISES,
                             (TENS, _ratio(busy, "p99_of_ttft_ms", order)), 0.0, setting))
    unsaid = "which measure is meant is not said where we could read it"
    means, margins = means_in_order(busy, ORDER, ("lrs", "lars"), "p50_of_ttft_ms")
    claims += [
        _claim("median TTFT of short requests, ms, by slack alone, then LARS", FALLS, means, margins, setting),
        _claim("LARS over the order of slack alone, times lower median TTFT of short requests", 1.7,
               _ratio(busy, "p50_of_ttft_ms", "lrs"), HALF_OR_TWICE, f"{setting}; {unsaid}"),
        _claim("the same, P99 of the latency to their last token", 1.7, _ratio(busy, "p99_of_e2el_ms", "lrs"), None,
               unsaid)]
    grows = "LoongServe's as of the whole prompts above, whose queue grows with the run"
    for metric, published, name in (
            ("p50_of_ttft_ms", 30.0, "median TTFT"), ("p99_of_ttft_ms", 174.0, "P99 TTFT")):
        of = "short requests beside 5 % long ones"
        means, margins, ratio = _beside_whole(theirs, busy, metric)
        claims += [
            _claim(f"{of}: {name}, ms, LoongServe, then LARS", FALLS, means, margins, grows),
            _claim(f"{of}: {name}, times lower than LoongServe", published, ratio, HALF_OR_TWICE, grows)]
    rate = f"at {calm[RATE].max():g} requests/s"
    for order, name in (("fcfs", "first come first served"), ("edf", "EDF"), ("lrs", "the order of slack alone")):
        claims.append(_claim(f"{rate}: {name} over LARS, median and P99 TTFT of short requests, times", None,
                             tuple(_ratio(calm, f"{p}_of_ttft_ms", order) for p in ("p50", "p99")), None, carried))
    claims.append(_claim(f"{rate}: LoongServe over LARS, median and P99 TTFT of short requests, times", None,
                         tuple(_beside_whole(theirs, calm, f"{p}_of_ttft_ms")[2] for p in ("p50", "p99")), None,
                         carried))
    means, _ = means_in_order(calm, ORDER, ("fcfs", "lars"), "p50_over_ttft_ms")
    claims.append(_claim(f"{rate}: median TTFT of long prompts, s, first come first served, then LARS", None,
                         tuple(ms / 1e3 for ms in means), None, carried))
    return claims


def _ratio(rows: pd.DataFrame, metric: str, order: str) -> float:
    """Of means over seeds, in an order and in that of LARS."""
    means = rows.groupby(ORDER)[metric].mean()
    return float(means[order] / means["lars"])


def _beside_whole(whole: pd.DataFrame, lars: pd.DataFrame, metric: str) -> tuple[tuple, tuple, float]:
    """Means of instances of whole prompts and of LARS at its rate, the margin between them, and their ratio."""
    ours = lars[lars[ORDER] == "lars"]
    both = pd.concat([whole[whole[RATE] == lars[RATE].max()].assign(of=0), ours.assign(of=1)])
    means, margins = means_in_order(both, "of", (0, 1), metric)
    return means, margins, means[0] / means[1]


def _three_claims(two: pd.DataFrame, three: pd.DataFrame) -> list[Claim]:
    """Of groups that share the KV, in place of half of the stages, beside chunks of long prompts."""
    chunk = study("mnemosyne-3d").scenario["engine"]["max_num_batched_tokens"]
    setting = (f"event engine, 100 requests, chunks of {chunk:,} tokens, first come first served; the long ones ask"
               f" for {load_of_long():.0f} times the peak of 64 H100: first tokens say how long the run was, and which"
               " requests decode beside chunks, and of how much context, is up to the draws")

    def ratio(metric: str) -> float:
        return float(two[metric].mean() / three[metric].mean())

    name = "SPP8 over SPP4 KVP2, 70B, 64 H100, 5 % of 2 M tokens, 1.75 requests/s"
    return [
        _claim(f"{name}: TPOT, times, P50 and P90 (more than 2)", (2.0, 2.0),
               (ratio("p50_tpot_ms"), ratio("p90_tpot_ms")), None, setting),
        _claim("the same, P50 of TTFT (similar)", 1.0, ratio("p50_ttft_ms"), None, setting)]


def _unsimulated() -> list[Claim]:
    return [
        _claim("capacity, times LoongServe's", 5.7, None, 0.3,
               "at which latency capacity is read is not said where we could read it"),
        _claim("LoongServe's TPOT without long prompts at high load, times Medha's", 5.0, None, HALF_OR_TWICE,
               "decodes on instances that shrink and grow are not simulated; how high the load is, is not said where"
               " we could read it"),
        _claim("two of eight context-parallel instances kept for short requests: long ones that finish, fewer than"
               " with Medha and with LoongServe", (0.2, 0.1), None, points(0.2),
               "up to; engines of which some take requests by their length, and whose long ones are spread over all"
               " others, are not simulated"),
        _claim("a chunk of 512 tokens at 1 M keeps decodes waiting for, ms, 8B on 8 H100", 250.0, None, None,
               "bytes and FLOP say 34 ms at least for 8B, 170 for 70B: the number is not of the model it is given"
               " for")]


def long_share_of_peak() -> float:
    """Causal FLOP a second of 5 % of 0.75 prompts of 128,000 to 1,000,000 tokens a second, over the peak of 16 A100."""
    lengths = np.linspace(128e3, 1e6, 1001)
    peak = 16 * load_device("a100").bf16_flops
    return 0.05 * 0.75 * float(np.mean(lc.prefill_flops(load_model(SMALL), lengths))) / peak


def load_of_long() -> float:
    """Causal FLOP a second of 5 % of 1.75 prompts of 2 M tokens a second, over the peak of 64 H100."""
    peak = 64 * load_device(DEVICE).bf16_flops
    return 0.05 * 1.75 * lc.prefill_flops(load_model(LARGE), 2 * MILLION) / peak


# ---- the plot


def _draw(prefills: dict[str, list[float]], groups: pd.DataFrame, convoy: pd.DataFrame, adaptive: pd.DataFrame,
          lars: pd.DataFrame, path: Path) -> None:
    with drawn(path, figsize=(21, 4.6)) as figure:
        first, second, third, last, fifth = figure.subplots(1, 5)
        gpus = TENSORS * np.array(STAGES)
        for (name, seconds), colour in zip(prefills.items(), _COLOURS[1::2], strict=True):
            first.plot(gpus, seconds, "o-", color=colour, label=name)
            first.plot(gpus, seconds[0] * TENSORS / gpus, ":", color=colour, linewidth=1)
        first.plot(gpus[2:], [context_parallel_s(SMALL, MILLION, n) for n in STAGES[2:]], "s--", color=FAINT,
                   label=f"{SMALL}, context parallel")
        first.set_xscale("log", base=2)
        first.set_yscale("log")
        first.set_xticks(gpus, [f"{n}" for n in gpus])
        first.set_title("Prefill of 1 M tokens, s (dotted: ideal)")
        first.set_xlabel("H100, eight a stage")
        first.legend(loc="lower left")
        for (tokens, mine), colour in zip(groups.groupby(INPUT), _COLOURS[1::2], strict=True):
            means = mine.groupby("groups")["tpot_ms"].mean()
            second.plot(means.index, means, "o-", color=colour, label=f"{tokens / 1e6:g} M tokens")
        second.axhline(TBT_MS, color=LIMIT, linewidth=1, linestyle=(0, (4, 3)))
        second.set_xscale("log", base=2)
        second.set_xticks([1, 2, 4, 8], ["1", "2", "4", "8"])
        second.set_ylim(bottom=0)
        second.set_title("Time per output token, ms")
        second.set_xlabel("groups of 32 H100 that share the KV")
        second.legend(loc="upper right")
        for (budget, mine), colour in zip(convoy.groupby(BUDGET), _COLOURS[1::2], strict=True):
            means = mine.groupby("share")["p50_ttft_ms"].mean() / 1e3
            third.plot(100 * means.index, means, "o-", color=colour, label=f"chunks of {budget:,}")
        third.set_yscale("log")
        third.set_title("Median TTFT, s, first come first served")
        third.set_xlabel("% prompts of 128,000 to 1,000,000 tokens")
        third.legend(loc="lower right")
        means = adaptive.groupby(TARGET)["p99_itl_ms"].mean()
        last.plot(means.index, means, "o-", color=INK, label="adaptive chunks")
        last.plot(means.index, means.index, ":", color=FAINT, label="the target")
        worst = convoy[convoy["share"] == convoy["share"].max()].groupby(BUDGET)["p99_itl_ms"].mean()
        for (budget, value), colour in zip(worst.items(), _COLOURS[1::2], strict=True):
            last.axhline(value, color=colour, linewidth=1, label=f"chunks of {budget:,}")
        last.set_ylim(0, 1.5 * worst.max())
        last.set_title("P99 time between tokens, ms")
        last.set_xlabel("target batch time, ms")
        last.legend(loc="upper left")
        orders = {"fcfs": "first come", "edf": "EDF", "lrs": "slack", "lars": "LARS"}
        busy = lars[lars[RATE] == lars[RATE].max()]
        means = busy.groupby(ORDER)[["p50_of_ttft_ms", "p99_of_ttft_ms"]].mean().loc[list(orders)] / 1e3
        for column, name, colour in zip(means, ("median", "P99"), _COLOURS[1::2], strict=True):
            fifth.plot(list(orders.values()), means[column], "o", color=colour, label=name)
        fifth.set_yscale("log")
        fifth.set_title("TTFT of short beside 5 % long, s")
        fifth.set_xlabel("order of prompts, four partly computed")
        fifth.legend(loc="lower left")
        heading(figure, "Mnemosyne: a prompt alone, replayed chunk by chunk; decodes and queues in the event engine")
