"""What a run says about itself: latencies, throughput, limits met, queueing, memory, and stability.

Definitions (all seconds inside, milliseconds in keys that end in `_ms`):

* TTFT: from arrival to the end of the iteration that computes the last prompt token.
* TPOT: (finish - first token) / (output tokens - 1). A one-token output has none: it stays outside
  percentiles and meets its limit.
* e2e: from arrival to the last token. ITL: gaps between tokens, those of a preemption included.
* duration: from the first arrival to the last completion, so the drain after the last arrival is part of it and
  of every rate. Percentiles are linear between order statistics.
* attainment and goodput: requests that meet all limits given at once, over all requests that arrived.
* requests that arrive in the first `warmup_s` seconds, or in the last `cooldown_s` before the last arrival, are left
  out of request metrics, never out of the simulation. With a cool-down, rates are those of the window in between,
  whatever arrived when: requests that end in it, prompts whose first token comes in it, and output tokens, of a request
  spread evenly from its first to its last, over the length of the window.
* energy: each device draws `power.busy_w` while its instance has an iteration in flight and `power.idle_w` in between
  (`jaxsim.spec.device.ServingPower`), pools that of their own devices. A first form: power does not follow the batch,
  prompts are charged as decodes.

Known gaps: percentiles and deviation of ITL come from a histogram with bins at most 1.6 % wide, which
cannot leave out a warm-up; the mean of ITL is exact.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int, Int8
from scipy.special import stdtrit

from jaxsim._core.errors import InputError
from jaxsim.kernels import histogram
from jaxsim.spec.device import DeviceSpec
from jaxsim.spec.scenario import Scenario, SloSection
from jaxsim.spec.sections import DeviceSection, TenantSection

FINISHED, UNFINISHED, TIMED_OUT, REJECTED = range(4)
STATUS_NAMES = ("finished", "unfinished", "timed_out", "rejected")

PERCENTILES = (50, 90, 95, 99)
LATENCIES = ("ttft", "tpot", "itl", "e2el")

NO_LIMITS = SloSection()

ABORTS = ("finished", "preempted", "no_room", "too_many_stages")
"""Why a migration is given up (`jaxsim.engine.migration`)."""

Interval = tuple[float, float] | None
"""Ends of a confidence interval; None from too few runs."""

_TREND_BATCHES = 8
_TREND_SCORE = 18
_GROWING_SHARE = 0.05
FAIRNESS_WINDOWS = 10
TOKEN_WEIGHTS = (1.0, 2.0)
"""Service of a prompt token and of an output token, as in the experiments of Sheng et al., OSDI 2024."""
FEWEST_FOR_TREND = 64
"""Requests below which nothing is said about stability."""


@dataclasses.dataclass(frozen=True, eq=False)
class LaneResult:
    """One scenario, one seed, on the host. Requests are in order of arrival, turns of sessions in that of the earliest
    times they could come; a time that never came is NaN.

    arrival_s, scheduled_s, first_token_s, finish_s: arrival, start of the first iteration that computes
        part of the prompt, end of the one that completes it, end of the last.
    stall_s: time between tokens in which the request was not computed (preempted and waiting again).
    prefill_stall_s: the part of `stall_s` before the first token; None where the engine does not tell.
    max_tokens: the limit the engine knew. tenant: index into tenant_names. status: FINISHED, UNFINISHED (when a bound
        stopped the run), TIMED_OUT or REJECTED.
    itl_counts: tokens after the first, by gap, in the bins of `jaxsim.kernels.histogram`; the outer bins take
        what lies beyond.
    busy_s, kv_block_s, running_s: integrals over the run, by instance: seconds with an iteration in flight,
        KV blocks in use times seconds, running sequences times seconds. kv_peak_blocks: the most in use.
    num_blocks: KV blocks of an instance, of each where they differ (0 where memory is no limit). num_iterations: of all
        instances.
    front_end_s: that every request spends outside the engine, in its latencies.
    device_busy_s: seconds that an instance's devices are at work on an iteration: those of `busy_s`, or with pipeline
        stages the mean over these, of which each has its turn; None stands for `busy_s`.
    fault: the bound that stopped the simulation, empty if none did.
    num_prefix_blocks: ids of shared prefix blocks that the workload carries. cached_tokens: of each prompt, those found
        in the prefix cache when it was first admitted; None without one.
    decode_instance, accepted_s, delivered_s: of requests that another instance decodes than computed the prompt: which,
        when it took the request, when it had its KV; -1 and NaN for others, None without roles.
    migrations, downtime_s, last_instance: with migration, how often each request moved, for how long it stood still for
        that, and where it ended; aborted_migrations: those given up, in the order of `ABORTS`; all None without.
    instance_s, starts, drains: with scaling, seconds for which instances were on, starting or draining, summed over
        them up to the last completion; instances started and drained. None without.
    swaps, swap_s: of requests, to host memory, and seconds lost to copies: those by which copies delayed iterations of
        its instance, and those in which its own was on the way in; swap_delay_s: of instances, the former, part of
        `busy_s`; swapped_blocks: of all instances, blocks copied out, and those that were in host memory already. None
        without host memory.
    extrapolated_share: of the device seconds, what a profile did not measure; None without a profile or a tape.
    steps: the tape, if recorded, one row a started iteration or jump: time_s, duration_s, instance, running,
        waiting, used_blocks, iterations, prefill_tokens, decode_seqs. lost_steps: rows that it had no room for.
    attempts, ended_s: with clients that give up or clusters that refuse, how often a request was sent, and when the
        last of these sendings ended, answered or not; None where every request is answered. All times but the arrival,
        `instance` (-1: refused) and `preemptions` are of the last sending.
    session, turn: whose turn a request is, and which; None without sessions. num_context_limited: sessions that ended
        at a context limit.
    num_images: of requests, None without images. encoded_s, embedded_s: of requests with images that other instances
        encode: when the last of them was encoded, and when the embeddings were with the instance that computes the
        prompt; NaN for others, None where there are no such instances.
    predicted_tokens: output tokens as the scheduler was told; None where it was not.
    """

    arrival_s: Float[np.ndarray, " requests"]
    input_tokens: Int[np.ndarray, " requests"]
    output_tokens: Int[np.ndarray, " requests"]
    max_tokens: Int[np.ndarray, " requests"]
    scheduled_s: Float[np.ndarray, " requests"]
    first_token_s: Float[np.ndarray, " requests"]
    finish_s: Float[np.ndarray, " requests"]
    stall_s: Float[np.ndarray, " requests"]
    preemptions: Int[np.ndarray, " requests"]
    instance: Int[np.ndarray, " requests"]
    priority: Int[np.ndarray, " requests"]
    tenant: Int[np.ndarray, " requests"]
    status: Int8[np.ndarray, " requests"]
    itl_counts: Int[np.ndarray, " bins"]
    busy_s: Float[np.ndarray, " instances"]
    kv_block_s: Float[np.ndarray, " instances"]
    kv_peak_blocks: Int[np.ndarray, " instances"]
    running_s: Float[np.ndarray, " instances"]
    num_blocks: int | Int[np.ndarray, " instances"]
    num_iterations: int
    device_busy_s: Float[np.ndarray, " instances"] | None = None
    fault: str = ""
    steps: Mapping[str, np.ndarray] | None = None
    prefill_stall_s: Float[np.ndarray, " requests"] | None = None
    tenant_names: tuple[str, ...] = ("default",)
    num_prefix_blocks: int = 0
    cached_tokens: Int[np.ndarray, " requests"] | None = None
    decode_instance: Int[np.ndarray, " requests"] | None = None
    accepted_s: Float[np.ndarray, " requests"] | None = None
    delivered_s: Float[np.ndarray, " requests"] | None = None
    migrations: Int[np.ndarray, " requests"] | None = None
    downtime_s: Float[np.ndarray, " requests"] | None = None
    last_instance: Int[np.ndarray, " requests"] | None = None
    aborted_migrations: Int[np.ndarray, " causes"] | None = None
    instance_s: float | None = None
    starts: int | None = None
    drains: int | None = None
    extrapolated_share: float | None = None
    front_end_s: float = 0.0
    lost_steps: int = 0
    session: Int[np.ndarray, " requests"] | None = None
    turn: Int[np.ndarray, " requests"] | None = None
    num_context_limited: int = 0
    attempts: Int[np.ndarray, " requests"] | None = None
    ended_s: Float[np.ndarray, " requests"] | None = None
    num_images: Int[np.ndarray, " requests"] | None = None
    encoded_s: Float[np.ndarray, " requests"] | None = None
    embedded_s: Float[np.ndarray, " requests"] | None = None
    swaps: Int[np.ndarray, " requests"] | None = None
    swap_s: Float[np.ndarray, " requests"] | None = None
    swap_delay_s: Float[np.ndarray, " instances"] | None = None
    swapped_blocks: Int[np.ndarray, " 2"] | None = None
    predicted_tokens: Int[np.ndarray, " requests"] | None = None

    @property
    def num_requests(self) -> int:
        """Requests that arrived."""
        return len(self.arrival_s)

    @property
    def is_finished(self) -> Bool[np.ndarray, " requests"]:
        """Which requests completed."""
        return np.asarray(self.status) == FINISHED

    @property
    def duration_s(self) -> float | None:
        """From the first arrival at the engine to the last completion; None if nothing completed."""
        if not self.is_finished.any():
            return None
        return float(self.finish_s[self.is_finished].max() - self.arrival_s[0])

    @property
    def span_s(self) -> float | None:
        """The same, to the last end of any kind; None if nothing ended."""
        if self.ended_s is None or np.isnan(self.ended_s).all():
            return self.duration_s
        return float(np.nanmax(self.ended_s) - self.arrival_s[0])


def request_frame(lane: LaneResult) -> pd.DataFrame:
    """One row a request, in the published columns of `requests.parquet`; a value that does not exist is
    missing.

    front_end_s + encode_s + embedding_s + queue_s + prefill_s + transfer_s + decode_s + stall_s = e2e_s; encode_s (from
    arrival) and embedding_s (from there, its wait to be taken included) only where other instances encode images;
    `transfer_s` is from the first token to where the KV is with the instance that decodes, its wait to be taken
    included. Where the engine does not say which stalls came before the first token, stalls are taken out of the decode
    phase first.
    """
    ttft = lane.first_token_s - lane.arrival_s + lane.front_end_s
    after_first = lane.finish_s - lane.first_token_s
    if lane.prefill_stall_s is None:
        # An unfinished request has no decode phase to take anything from.
        early = np.maximum(lane.stall_s - np.nan_to_num(after_first, nan=0.0), 0.0)
    else:
        early = lane.prefill_stall_s
    transfer = np.zeros(lane.num_requests)
    if lane.delivered_s is not None:
        transfer = np.nan_to_num(lane.delivered_s - lane.first_token_s, nan=0.0)
    images, before_queue = {}, 0.0
    if lane.num_images is not None:
        images = {"images": np.asarray(lane.num_images, np.int64)}
    if lane.encoded_s is not None:
        has_any = np.asarray(lane.num_images) > 0
        images["encode_s"] = np.where(has_any, lane.encoded_s - lane.arrival_s, 0.0)
        images["embedding_s"] = np.where(has_any, lane.embedded_s - lane.encoded_s, 0.0)
        before_queue = images["encode_s"] + images["embedding_s"]
    gaps = np.asarray(lane.output_tokens) - 1
    tpot = np.full(lane.num_requests, np.nan)
    np.divide(after_first, gaps, out=tpot, where=gaps > 0)
    sessions = {} if lane.session is None else {
        "session": np.asarray(lane.session, np.int64), "turn": np.asarray(lane.turn, np.int64)}
    return pd.DataFrame({
        "request_id": np.arange(lane.num_requests, dtype=np.int64),
        "arrival_s": lane.arrival_s,
        "input_tokens": np.asarray(lane.input_tokens, np.int64),
        "output_tokens": np.asarray(lane.output_tokens, np.int64),
        "ttft_s": ttft,
        "tpot_s": tpot,
        "e2e_s": lane.finish_s - lane.arrival_s + lane.front_end_s,
        "queue_s": lane.scheduled_s - lane.arrival_s - before_queue,
        "prefill_s": lane.first_token_s - lane.scheduled_s - early,
        "decode_s": after_first - (lane.stall_s - early) - transfer,
        "stall_s": np.asarray(lane.stall_s, np.float64),
        "transfer_s": transfer,
        "front_end_s": np.full(lane.num_requests, lane.front_end_s),
        "cached_tokens": np.zeros(lane.num_requests, np.int64) if lane.cached_tokens is None else
        np.asarray(lane.cached_tokens, np.int64),
        "preemptions": np.asarray(lane.preemptions, np.int64),
        **({} if lane.swaps is None else {"swaps": np.asarray(lane.swaps, np.int64),
                                          "swap_s": np.asarray(lane.swap_s, np.float64)}),
        "instance": np.asarray(lane.instance, np.int64),
        **({} if lane.decode_instance is None else {"decode_instance": np.asarray(lane.decode_instance, np.int64)}),
        **({} if lane.migrations is None else {
            "migrations": np.asarray(lane.migrations, np.int64), "downtime_s": np.asarray(lane.downtime_s, np.float64),
            "last_instance": np.asarray(lane.last_instance, np.int64)}),
        "tenant": np.asarray(lane.tenant_names, object)[np.asarray(lane.tenant)],
        "priority": np.asarray(lane.priority, np.int64),
        "status": np.asarray(STATUS_NAMES, object)[np.asarray(lane.status)],
        **({} if lane.attempts is None else {"attempts": np.asarray(lane.attempts, np.int64)}),
        **({} if lane.predicted_tokens is None else
           {"predicted_tokens": np.asarray(lane.predicted_tokens, np.int64)}),
        **sessions,
        **images,
    })


def limits_ms(slo: SloSection, tenants: Sequence[TenantSection] = (), names: Sequence[str] = (),
              tenant: Int[np.ndarray, " requests"] | None = None) -> dict[str, Any]:
    """Limits of ttft, tpot and e2e: a number, or one a request where tenants have their own (infinite for none), None
    where nobody has one. tenant: of each request, an index into `names`."""
    found: dict[str, Any] = {}
    for name, own, usual in (("ttft", "ttft_ms", slo.ttft_ms), ("tpot", "tpot_ms", slo.tpot_ms),
                             ("e2e", "deadline_ms", slo.e2e_ms)):
        given = {t.name: getattr(t, own) for t in tenants if getattr(t, own) is not None}
        found[name] = usual
        if given:
            missing = math.inf if usual is None else usual
            found[name] = np.array([given.get(label, missing) for label in names])[tenant]
    return found


def meets(frame: pd.DataFrame, slo: SloSection, tenants: Sequence[TenantSection] = ()
          ) -> dict[str, Bool[np.ndarray, " requests"]]:
    """Which requests meet each limit that is given, and `all` of them. An unfinished request meets none.

    tenants: classes of requests that may have limits of their own.
    """
    finished = (frame["status"] == STATUS_NAMES[FINISHED]).to_numpy()
    met = {}
    names, tenant = np.unique(frame["tenant"].to_numpy().astype(str), return_inverse=True) if tenants else ((), None)
    limits = limits_ms(slo, tenants, names, tenant)
    for name, column in (("ttft", "ttft_s"), ("tpot", "tpot_s"), ("e2e", "e2e_s")):
        limit_ms = limits[name]
        if limit_ms is not None:
            value = frame[column].to_numpy()
            # Only a one-token output is finished and without a value.
            met[name] = finished & (np.isnan(value) | (value <= limit_ms * 1e-3))
    if met:
        met["all"] = np.logical_and.reduce(list(met.values()))
    return met


def is_unstable(lane: LaneResult) -> bool | None:
    """Whether more and more requests were waiting when arrivals ended; None where it is too early to tell.

    Waiting: arrived and never scheduled yet, at each arrival. The means over 8 equal batches of the second
    half of the arrivals must (1) rise by a one-sided Mann-Kendall trend test at 1.6 % (score >= 18 of 28) and
    (2) grow by at least 5 % of the arrivals in between, that is, the system takes up less than 95 % of what
    arrives. (1) alone would flag a trend too small to matter, (2) alone a random excursion.

    Where not those waiting but those running rise so, the run is still filling up: it may settle or not, and
    the answer is None. So it is for fewer than 64 requests, or all at one instant.

    Measured on 200 runs of an M/M/1 queue, 1000 requests each: flagged in 1, 5, 22, 72, 94 and 100 % of
    them at loads 0.8, 0.9, 1, 1.1, 1.2 and 1.5; over several seeds the majority decides (`combine`).
    Known gaps: preempted requests that wait again are not counted, only those that wait behind them.
    """
    return unstable(lane.arrival_s, *waiting_and_running_until(lane.scheduled_s, lane.finish_s, lane.ended_s))


def waiting_and_running_until(scheduled_s: np.ndarray, finish_s: np.ndarray, ended_s: np.ndarray | None
                              ) -> tuple[np.ndarray, np.ndarray]:
    """Until when requests waited and ran, of those too that ended without an answer."""
    return (scheduled_s, finish_s) if ended_s is None else (np.fmin(scheduled_s, ended_s), ended_s)


def unstable(arrival_s: Float[np.ndarray, " requests"], scheduled_s: Float[np.ndarray, " requests"],
             finish_s: Float[np.ndarray, " requests"]) -> bool | None:
    """`is_unstable` of a run with these times; NaN for what never happened."""
    (verdict,) = unstable_rows(arrival_s[None], scheduled_s[None], finish_s[None])
    return None if np.isnan(verdict) else bool(verdict)


def unstable_rows(arrival_s: Float[np.ndarray, "runs requests"], scheduled_s: Float[np.ndarray, "runs requests"],
                  finish_s: Float[np.ndarray, "runs requests"]) -> Float[np.ndarray, " runs"]:
    """The same of many runs: 1 where unstable, 0 where not, NaN where it is too early to tell."""
    rows, count = arrival_s.shape
    if count < FEWEST_FOR_TREND:
        return np.full(rows, np.nan)
    # Turns of sessions need not be in order of arrival.
    arrival_s = np.sort(arrival_s, axis=1)
    waiting = np.arange(1, count + 1) - _so_far(arrival_s, scheduled_s)
    running = np.arange(1, count + 1) - waiting - _so_far(arrival_s, finish_s)
    filling = np.where(_keeps_growing(running), np.nan, 0.0)
    verdict = np.where(_keeps_growing(waiting), 1.0, filling)
    return np.where(arrival_s[:, -1] <= arrival_s[:, 0], np.nan, verdict)


def _so_far(arrival_s: Float[np.ndarray, "runs requests"], times_s: Float[np.ndarray, "runs requests"]
            ) -> Int[np.ndarray, "runs requests"]:
    """How many of the times of a run have come at each of its arrivals."""
    rows, count = arrival_s.shape
    # By the first arrival that is not before it; arrivals are in order, so no time has to be sorted.
    place = np.stack([np.searchsorted(a, t) for a, t in zip(arrival_s, times_s, strict=True)])
    flat = (place + (count + 1) * np.arange(rows)[:, None]).ravel()
    return np.cumsum(np.bincount(flat, minlength=rows * (count + 1)).reshape(rows, -1)[:, :-1], axis=1)


def _keeps_growing(level: Int[np.ndarray, "runs requests"]) -> Bool[np.ndarray, " runs"]:
    """Whether a number of requests, at each arrival, rises over the second half of the arrivals."""
    size = level.shape[1] // 2 // _TREND_BATCHES
    means = level[:, -size * _TREND_BATCHES:].reshape(len(level), _TREND_BATCHES, size).mean(axis=2)
    later, earlier = np.tril_indices(_TREND_BATCHES, -1)
    score = np.sign(means[:, later] - means[:, earlier]).sum(axis=1)
    growth = (means[:, -1] - means[:, 0]) / (size * (_TREND_BATCHES - 1))
    return (score >= _TREND_SCORE) & (growth >= _GROWING_SHARE)


def measured_span_s(arrival_s: Float[np.ndarray, " requests"], warmup_s: float, cooldown_s: float
                    ) -> tuple[float, float]:
    """From when to when requests must arrive to be measured; without a cool-down, however late."""
    if not len(arrival_s):
        return 0.0, math.inf
    return float(arrival_s[0]) + warmup_s, float(np.nanmax(arrival_s)) - cooldown_s if cooldown_s else math.inf


def is_measured(lane: LaneResult, warmup_s: float, cooldown_s: float = 0.0) -> Bool[np.ndarray, " requests"]:
    """Requests that metrics are made of: those that arrive neither in the warm-up nor in the cool-down."""
    _, end_s = measured_span_s(lane.arrival_s, warmup_s, cooldown_s)
    return (lane.arrival_s - lane.arrival_s[:1] >= warmup_s) & (lane.arrival_s <= end_s)


def share_inside(first_s: Any, last_s: Any, start_s: Any, end_s: Any) -> Any:
    """Share of the time from first to last that lies in a window; of an instant, whether it does. NaN stays NaN."""
    length = last_s - first_s
    inside = np.minimum(last_s, end_s) - np.maximum(first_s, start_s)
    return np.where(length > 0, np.maximum(inside, 0.0) / np.where(length > 0, length, 1.0),
                    np.where(np.isnan(length), np.nan, inside >= 0))


def lane_metrics(lane: LaneResult, slo: SloSection = NO_LIMITS, warmup_s: float = 0.0, cooldown_s: float = 0.0,
                 devices: "Devices | None" = None, tenants: Sequence[TenantSection] = (),
                 token_weights: tuple[float, float] = TOKEN_WEIGHTS) -> dict[str, Any]:
    """All metrics of one run: flat keys of vLLM's benchmark client, nested groups. None, never NaN.

    devices: of the instances (`devices_of`); None where their power is not known. tenants: their limits and weights,
    where these are not the usual ones. token_weights: service of a prompt token and of an output token.
    """
    frame = request_frame(lane)
    is_mine = is_measured(lane, warmup_s, cooldown_s)
    is_done = is_mine & lane.is_finished
    measured, done = frame[is_mine], frame[is_done]
    met_by_all = meets(frame, slo, tenants)
    met = {name: mask[is_mine] for name, mask in met_by_all.items()}
    duration_s = None
    if is_done.any():
        duration_s = float(lane.finish_s[is_done].max() - lane.arrival_s[is_mine].min()) + lane.front_end_s
    start_s, end_s = measured_span_s(lane.arrival_s, warmup_s, cooldown_s)
    window_s, is_counted, is_good = duration_s, is_done, is_mine
    inputs, outputs = done["input_tokens"].sum(), done["output_tokens"].sum()
    if end_s < math.inf:
        window_s = end_s - start_s if end_s > start_s else None
        is_counted = is_good = lane.is_finished & (lane.finish_s >= start_s) & (lane.finish_s <= end_s)
        is_begun = (lane.first_token_s >= start_s) & (lane.first_token_s <= end_s)
        inputs = np.asarray(lane.input_tokens)[is_begun].sum()
        outputs = np.nansum(lane.output_tokens * share_inside(lane.first_token_s, lane.finish_s, start_s, end_s))
    num_cooldown = int((lane.arrival_s > end_s).sum())

    def per_second(amount: float) -> float | None:
        return float(amount) / window_s if window_s else None

    utilisation = _utilisation_group(lane)
    result: dict[str, Any] = {
        "duration": duration_s,
        "window_s": window_s,
        "completed": len(done),
        "failed": len(measured) - len(done),
        "total_input_tokens": int(done["input_tokens"].sum()),
        "total_output_tokens": int(done["output_tokens"].sum()),
        "request_throughput": per_second(is_counted.sum()),
        "request_goodput": per_second((met_by_all["all"] & is_good).sum()) if met else None,
        "output_throughput": per_second(outputs),
        "total_token_throughput": per_second(inputs + outputs),
        **_energy_of(lane, devices, window_s, per_second(outputs)),
    }
    for name, column in (("ttft", "ttft_s"), ("tpot", "tpot_s"), ("itl", None), ("e2el", "e2e_s")):
        summary = _gaps(lane, done) if column is None else _distribution(done[column].to_numpy())
        result |= {f"{statistic}_{name}_ms": value for statistic, value in summary.items()}
    if lane.attempts is not None:
        result["outcomes"] = outcomes(*(np.asarray(x)[None] for x in (is_mine, lane.status, lane.attempts)))
        result["outcomes"] = {name: None if np.isnan(value[0]) else value[0].item()
                              for name, value in result["outcomes"].items()}
    return result | {
        "slo": _slo_group(measured, slo, met),
        "queueing": _milliseconds(measured["queue_s"].to_numpy()),
        "preemptions": _preemption_group(measured),
        "tenants": _tenants_group(lane, measured, met, token_weights),
        "kv": _kv_group(lane),
        "utilisation": utilisation,
        "cost": {"extrapolated_share": lane.extrapolated_share},
        "num_requests": len(measured),
        "num_warmup_requests": lane.num_requests - len(measured) - num_cooldown,
        "num_cooldown_requests": num_cooldown,
        "unstable": is_unstable(lane),
        "fault": lane.fault or None,
    } | ({} if lane.decode_instance is None else {"transfers": _transfer_group(lane, is_mine)}) | (
        {} if lane.migrations is None else {"migrations": _migration_group(lane, measured)}) | (
        {} if lane.instance_s is None else {"scaling": _scaling_group(lane)}) | (
        {} if lane.swaps is None else {"swaps": _swaps_group(lane, measured)}) | (
        {} if lane.session is None else {"sessions": _sessions_group(lane, is_mine)}) | (
        {} if len(lane.tenant_names) < 2 else {"fairness": fairness_of(lane, tenants, token_weights)})


def outcomes(is_measured: Bool[np.ndarray, "runs requests"], status: Int8[np.ndarray, "runs requests"],
             attempts: Int[np.ndarray, "runs requests"]) -> dict[str, np.ndarray]:
    """How measured requests ended: counts and shares of those that arrived, an entry a run; NaN if nobody did."""
    count = is_measured.sum(axis=1)

    def share(amount):
        return np.divide(amount, count, out=np.full(len(count), np.nan), where=count > 0)

    found = {}
    for code in (TIMED_OUT, REJECTED):
        number = (is_measured & (status == code)).sum(axis=1)
        found |= {STATUS_NAMES[code]: number, f"{STATUS_NAMES[code]}_share": share(number)}
    return found | {"failed_share": share((is_measured & (status != FINISHED)).sum(axis=1)),
                    "mean_attempts": share(np.where(is_measured, attempts, 0).sum(axis=1))}


def _distribution(seconds: Float[np.ndarray, " values"]) -> dict[str, float | None]:
    """mean, median, std and percentiles, in milliseconds."""
    seconds = seconds[~np.isnan(seconds)] * 1e3
    names = ("mean", "median", "std", *(f"p{p}" for p in PERCENTILES))
    if len(seconds) == 0:
        return dict.fromkeys(names)
    values = (seconds.mean(), np.median(seconds), seconds.std(), *np.percentile(seconds, PERCENTILES))
    return dict(zip(names, map(float, values), strict=True))


def _gaps(lane: LaneResult, done: pd.DataFrame) -> dict[str, float | None]:
    counts = np.asarray(lane.itl_counts, np.float64)
    total = counts.sum()
    gaps = int((done["output_tokens"] - 1).sum())
    if total == 0 or gaps == 0:
        return dict.fromkeys(("mean", "median", "std", *(f"p{p}" for p in PERCENTILES)))
    edges = histogram.edges()
    middles = 0.5 * (edges[1:] + edges[:-1])
    binned_mean = float(counts @ middles / total)
    std = math.sqrt(float(counts @ (middles - binned_mean) ** 2 / total))
    mean = float((done["e2e_s"] - done["ttft_s"]).sum() / gaps)
    percentiles = [value * 1e3 for value in histogram.percentiles(lane.itl_counts, PERCENTILES)]
    return {"mean": mean * 1e3, "median": percentiles[0], "std": std * 1e3,
            **{f"p{p}": value for p, value in zip(PERCENTILES, percentiles, strict=True)}}


def _milliseconds(seconds: Float[np.ndarray, " values"]) -> dict[str, float | None]:
    summary = {f"{name}_ms": value for name, value in _distribution(seconds).items() if name != "median"}
    seconds = seconds[~np.isnan(seconds)]
    return summary | {"max_ms": float(seconds.max() * 1e3) if len(seconds) else None}


def _slo_group(frame: pd.DataFrame, slo: SloSection, met: Mapping[str, np.ndarray]) -> dict[str, Any]:
    group: dict[str, Any] = {"ttft_ms": slo.ttft_ms, "tpot_ms": slo.tpot_ms, "e2e_ms": slo.e2e_ms,
                             "attainment": None, "ttft_attainment": None, "tpot_attainment": None,
                             "e2e_attainment": None, "separate_p90": None}
    if met and len(frame):
        shares = {name: float(mask.mean()) for name, mask in met.items()}
        group["attainment"] = shares.pop("all")
        group |= {f"{name}_attainment": share for name, share in shares.items()}
        # DistServe's rule: the 90th percentile of each metric by itself.
        group["separate_p90"] = all(share >= 0.9 for share in shares.values())
    return group


def _transfer_group(lane: LaneResult, is_mine: Bool[np.ndarray, " requests"]) -> dict[str, Any]:
    """Of requests that another instance decodes than computed the prompt, and whose KV is there."""
    seconds = (lane.delivered_s - lane.first_token_s)[is_mine & ~np.isnan(lane.delivered_s)]
    summary = _milliseconds(seconds)
    return {"requests": len(seconds), "mean_ms": summary["mean_ms"], "p99_ms": summary["p99_ms"]}


def _migration_group(lane: LaneResult, measured: pd.DataFrame) -> dict[str, Any]:
    """Migrations of measured requests; of those that moved, the time that each move stopped them, on average if a
    request moved more than once. Migrations given up are of the whole run."""
    moved = measured[measured["migrations"] > 0]
    summary = _distribution((moved["downtime_s"] / moved["migrations"]).to_numpy())
    return {"total": int(measured["migrations"].sum()), "requests": len(moved),
            **{f"{name}_downtime_ms": summary[name] for name in ("mean", "p50", "p99")},
            **{f"aborted_{cause}": int(n) for cause, n in zip(ABORTS, lane.aborted_migrations, strict=True)}}


def _scaling_group(lane: LaneResult) -> dict[str, Any]:
    """Instances on, starting or draining: seconds, and their mean number up to the last completion."""
    end_s = float(np.nanmax(lane.finish_s)) if lane.is_finished.any() else None
    return {"instance_s": float(lane.instance_s), "mean_instances": float(lane.instance_s) / end_s if end_s else None,
            "starts": int(lane.starts), "drains": int(lane.drains)}


def _preemption_group(frame: pd.DataFrame) -> dict[str, Any]:
    hit = frame[frame["preemptions"] > 0]
    return {"total": int(frame["preemptions"].sum()),
            "requests_share": len(hit) / len(frame) if len(frame) else None,
            "mean_stall_ms": float(hit["stall_s"].mean() * 1e3) if len(hit) else None}


def _swaps_group(lane: LaneResult, frame: pd.DataFrame) -> dict[str, Any]:
    """e2e_share: of the latencies of requests, that lost to copies; delay_share: of the time with an iteration in
    flight, that of copies before it; spared_share: of the blocks that left the device, those not copied."""
    busy_s, e2e_s = float(np.sum(lane.busy_s)), frame["e2e_s"].sum()
    return {"total": int(frame["swaps"].sum()),
            "requests_share": float((frame["swaps"] > 0).mean()) if len(frame) else None,
            "mean_ms": float(frame["swap_s"].mean() * 1e3) if len(frame) else None,
            "e2e_share": float(frame["swap_s"].sum() / e2e_s) if e2e_s else None,
            "delay_share": float(np.sum(lane.swap_delay_s)) / busy_s if busy_s else None,
            "copied_blocks": int(lane.swapped_blocks[0]),
            "spared_share": float(lane.swapped_blocks[1] / lane.swapped_blocks.sum())
            if lane.swapped_blocks.any() else None}


def _tenants_group(lane: LaneResult, frame: pd.DataFrame, met: Mapping[str, np.ndarray],
                   token_weights: tuple[float, float]) -> dict[str, Any]:
    """The main figures of every class of requests, where there are several."""
    if len(lane.tenant_names) < 2:
        return {}
    group: dict[str, Any] = {}
    served = service(lane, np.nanmin(lane.arrival_s), np.nanmax(lane.arrival_s), token_weights)
    for name, own in zip(lane.tenant_names, served, strict=True):
        is_mine = (frame["tenant"] == name).to_numpy()
        mine = frame[is_mine & (frame["status"] == STATUS_NAMES[FINISHED]).to_numpy()]
        group[name] = {"requests": int(is_mine.sum()),
                       "completed": len(mine), "failed": int(is_mine.sum()) - len(mine),
                       "service_share": float(own / served.sum()) if served.sum() > 0 else None,
                       "attainment": float(met["all"][is_mine].mean()) if met and is_mine.any() else None}
        for latency, column in (("ttft", "ttft_s"), ("tpot", "tpot_s"), ("e2el", "e2e_s")):
            summary = _distribution(mine[column].to_numpy())
            group[name] |= {f"{s}_{latency}_ms": summary[s] for s in ("mean", "p50", "p99")}
    return group


def service(lane: LaneResult | Any, start_s: float, end_s: float, token_weights: tuple[float, float] = TOKEN_WEIGHTS
            ) -> Float[np.ndarray, " tenants"]:
    """What every tenant got between two times, in weighted tokens: those of a prompt spread evenly from its first
    iteration to its first token, those of an output from there to its end. Of an unfinished request only what it has
    both ends of counts.
    """
    inside = [np.nan_to_num(share_inside(first, last, start_s, end_s), nan=0.0) for first, last in (
        (lane.scheduled_s, lane.first_token_s), (lane.first_token_s, lane.finish_s))]
    tokens = (token_weights[0] * inside[0] * lane.input_tokens + token_weights[1] * inside[1] * lane.output_tokens)
    return np.bincount(lane.tenant, tokens, len(lane.tenant_names))


def fairness_of(lane: LaneResult | Any, tenants: Sequence[TenantSection] = (),
                token_weights: tuple[float, float] = TOKEN_WEIGHTS) -> dict[str, float | None]:
    """How evenly tenants were served while requests arrived, each by its weight.

    jain_index: Jain's (sum x)^2 / (n sum x^2) of x = service / fair share, which is the weighted max-min share of all
    that was served (`fair_shares`): 1 where everybody got theirs, 1/n where one got all. max_service_gap: over
    `FAIRNESS_WINDOWS` equal windows from the first arrival to the last, the largest difference of service / weight
    between two tenants that both have somebody waiting all through a window; None where there are no two such.

    Source: Jain, Chiu, Hawe, DEC-TR-301, 1984; Sheng et al., OSDI 2024 (arXiv 2401.00588), for the gap.
    """
    given = {t.name: t.weight for t in tenants}
    weight = np.array([given.get(name, 1.0) for name in lane.tenant_names])
    start_s, end_s = float(np.nanmin(lane.arrival_s)), float(np.nanmax(lane.arrival_s))
    served = service(lane, start_s, end_s, token_weights)
    is_there = ~np.isnan(lane.arrival_s)
    demand = np.bincount(lane.tenant[is_there], (token_weights[0] * lane.input_tokens + token_weights[1]
                                                 * lane.output_tokens)[is_there], len(weight))
    due = fair_shares(served.sum(), demand, weight)
    each = served[due > 0] / due[due > 0]
    index = float(each.sum() ** 2 / (len(each) * (each**2).sum())) if each.any() else None
    gap, edges = None, np.linspace(start_s, end_s, FAIRNESS_WINDOWS + 1)
    until_s = np.where(np.isnan(lane.scheduled_s), np.inf, lane.scheduled_s)
    spells = [_spells(lane.arrival_s[lane.tenant == k], until_s[lane.tenant == k]) for k in range(len(weight))]
    for low, high in zip(edges[:-1], edges[1:], strict=True):
        is_backlogged = np.array([bool(np.any((begin <= low) & (end >= high))) for begin, end in spells])
        if is_backlogged.sum() > 1 and high > low:
            among = (service(lane, low, high, token_weights) / weight)[is_backlogged]
            gap = max(gap or 0.0, float(among.max() - among.min()))
    return {"jain_index": index, "max_service_gap": gap}


def fair_shares(total: float, demand: Float[np.ndarray, " tenants"], weight: Float[np.ndarray, " tenants"]
                ) -> Float[np.ndarray, " tenants"]:
    """Weighted max-min shares: in parts by weight, but to nobody more than it asks for, which goes to the others."""
    shares, left, weights = np.zeros(len(demand)), float(total), float(weight.sum())
    for k in np.argsort(demand / weight, kind="stable"):
        shares[k] = min(demand[k], left * weight[k] / weights)
        left, weights = left - shares[k], weights - weight[k]
    return shares


def _spells(begin_s: Float[np.ndarray, " requests"], end_s: Float[np.ndarray, " requests"]
            ) -> tuple[np.ndarray, np.ndarray]:
    """Begins and ends of the times in which at least one of these waits."""
    is_there = ~np.isnan(begin_s)
    order = np.argsort(begin_s[is_there], kind="stable")
    begin_s, end_s = begin_s[is_there][order], np.maximum.accumulate(end_s[is_there][order])
    is_new = np.concatenate([np.ones(min(len(begin_s), 1), bool), begin_s[1:] > end_s[:-1]])
    return begin_s[is_new], end_s[np.concatenate([is_new[1:], np.ones(min(len(begin_s), 1), bool)])]


def _sessions_group(lane: LaneResult, is_mine: Bool[np.ndarray, " requests"]) -> dict[str, Any]:
    """Of sessions whose first turn is measured: from its arrival to the last answer."""
    turns = pd.DataFrame({"session": lane.session, "arrival_s": lane.arrival_s, "is_mine": is_mine,
                          "finish_s": lane.finish_s, "is_finished": lane.is_finished})
    each = turns.groupby("session").agg(
        turns=("session", "size"), arrival_s=("arrival_s", "first"), is_mine=("is_mine", "first"),
        finish_s=("finish_s", "max"), is_finished=("is_finished", "all"))
    each = each[each["is_mine"]]
    done = each[each["is_finished"]]
    duration_s = (done["finish_s"] - done["arrival_s"]).to_numpy() + lane.front_end_s
    group = {"completed": len(done), "failed": len(each) - len(done), "context_limited": lane.num_context_limited,
             "mean_turns": float(each["turns"].mean()) if len(each) else None,
             "mean_duration_s": float(duration_s.mean()) if len(done) else None}
    return group | {f"p{p}_duration_s": float(np.percentile(duration_s, p)) if len(done) else None
                    for p in PERCENTILES}


def _kv_group(lane: LaneResult) -> dict[str, Any]:
    capacity, duration_s = np.asarray(lane.num_blocks), lane.span_s
    if not capacity.any():
        return {"num_blocks": None, "mean_share": None, "peak_share": None}
    mean = float(np.mean(lane.kv_block_s / capacity)) / duration_s if duration_s else None
    return {"num_blocks": int(capacity.min()), "mean_share": mean,
            "peak_share": float(np.max(lane.kv_peak_blocks / capacity))}


def _utilisation_group(lane: LaneResult) -> dict[str, Any]:
    duration_s = lane.span_s
    busy = np.asarray(lane.busy_s) / duration_s if duration_s else None
    at_work = lane.busy_s if lane.device_busy_s is None else lane.device_busy_s
    return {"busy_share": float(busy.mean()) if duration_s else None,
            "device_busy_share": float(np.mean(at_work)) / duration_s if duration_s else None,
            "least_busy_share": float(busy.min()) if duration_s else None,
            "most_busy_share": float(busy.max()) if duration_s else None,
            "mean_running": float(np.mean(lane.running_s)) / duration_s if duration_s else None,
            "num_iterations": int(lane.num_iterations)}


class Devices(NamedTuple):
    """Of every instance, how many devices it has, and what one draws (watts; NaN where not known) and costs a second.

    Instances of one rank after the other where ranks iterate together.
    """

    count: Float[np.ndarray, " instances"]
    idle_w: Float[np.ndarray, " instances"]
    busy_w: Float[np.ndarray, " instances"]
    usd_per_s: Float[np.ndarray, " instances"]


def devices_of(scenario: Scenario, num_instances: int) -> Devices:
    """The devices of the instances of a run, of pools that may differ."""
    rows = []
    pools = scenario.devices_of_pools
    # Data-parallel ranks are instances by themselves.
    ranks = num_instances / sum(replicas for *_, replicas in pools)
    for section, devices, replicas in pools:
        spec = _spec(section)
        power = (spec.power.idle_w, spec.power.busy_w) if spec is not None and spec.power else (math.nan, math.nan)
        usd_per_s = (spec.usd_per_h or math.nan) / 3600 if spec is not None else math.nan
        rows += [(devices / ranks, *power, usd_per_s)] * round(replicas * ranks)
    return Devices(*np.array(rows, np.float64).T)


def energy(devices: Devices, busy_share: Float[np.ndarray, "*runs instances"], window_s: Any, output_throughput: Any
           ) -> dict[str, Any]:
    """Energy of a run, or of runs with an entry a run; NaN where the power of a device is not known.

    devices: arrays as `busy_share`, which is of the time that the devices of an instance work on an iteration.
    window_s: seconds that the energy is of. mean_power_w = sum over instances of devices x (idle + (busy - idle) x
    busy_share), energy = mean_power_w x window. Source: the two-state form of splitwise-sim's power table; known gaps:
    power does not follow the batch, iterations of prompts alone draw more, and hosts, switches and cooling are not in
    it.
    """
    mean_power_w = np.sum(devices.count * (devices.idle_w + (devices.busy_w - devices.idle_w) * busy_share), axis=-1)
    energy_j = mean_power_w * window_s
    tokens = np.where(np.asarray(output_throughput) > 0, output_throughput, np.nan)
    return {"mean_power_w": mean_power_w, "energy_j": energy_j, "energy_wh": energy_j / 3600,
            "energy_j_per_output_token": mean_power_w / tokens}


def _energy_of(lane: LaneResult, devices: Devices | None, window_s: float | None, output_throughput: float | None
               ) -> dict[str, float | None]:
    nan = math.nan
    nothing = Devices(*(np.full(len(lane.busy_s), nan) for _ in Devices._fields))
    at_work = lane.busy_s if lane.device_busy_s is None else lane.device_busy_s
    share = np.asarray(at_work) / (lane.span_s or nan)
    rest = (nan if value is None else value for value in (window_s, output_throughput))
    found = {name: float(value) for name, value in energy(devices or nothing, share, *rest).items()}
    return {name: None if math.isnan(value) else value for name, value in found.items()}


def _spec(device: DeviceSection | None) -> DeviceSpec | None:
    try:
        return device.spec() if device else None
    except InputError:
        # A fitted cost needs no device, so the one named may be in no catalogue.
        return None


def token_weights(scenario: Scenario) -> tuple[float, float]:
    """Service of a prompt token and of an output token, as the scenario counts it."""
    given = scenario.engine.input_token_weight, scenario.engine.output_token_weight
    return tuple(usual if own is None else own for own, usual in zip(given, TOKEN_WEIGHTS, strict=True))


def flatten(metrics: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested groups as dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in metrics.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat


def interval(values: Sequence[float | None], level: float = 0.95) -> Interval:
    """Student-t interval of a mean over independent runs; None from fewer than two values."""
    numbers = np.array([v for v in values if v is not None], np.float64)
    if len(numbers) < 2:
        return None
    half = float(stdtrit(len(numbers) - 1, 0.5 + level / 2) * numbers.std(ddof=1) / math.sqrt(len(numbers)))
    return float(numbers.mean() - half), float(numbers.mean() + half)


def combine(runs: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], dict[str, Interval]]:
    """Metrics of several seeds as their mean, and a 95 % interval of each by dotted key.

    A metric that some seeds lack is averaged over those that have it. `unstable` and `slo.separate_p90` are
    what most seeds say, and None where most say nothing; `fault` is the first.
    """
    means: dict[str, Any] = {}
    intervals: dict[str, Interval] = {}
    for key, first in runs[0].items():
        if isinstance(first, Mapping):
            means[key], inner = combine([run[key] for run in runs])
            intervals |= {f"{key}.{name}": ends for name, ends in inner.items()}
            continue
        values = [run[key] for run in runs if run[key] is not None]
        if not values:
            means[key] = None
        elif isinstance(values[0], bool):
            means[key] = 2 * sum(values) > len(values) if 2 * len(values) >= len(runs) else None
        elif isinstance(values[0], str):
            means[key] = values[0]
        else:
            mean = math.fsum(values) / len(values)
            is_count = all(isinstance(v, int) for v in values) and mean == int(mean)
            means[key] = int(mean) if is_count else mean
            intervals[key] = interval(values)
    return means, intervals


class Result:
    """Scenarios simulated: host arrays a lane, and pandas frames made from them when asked for.

    lanes: for every scenario, for every seed, a `LaneResult`.
    """

    def __init__(self, scenarios: Sequence[Scenario], lanes: Sequence[Sequence[LaneResult]]):
        if len(scenarios) != len(lanes):
            raise ValueError(f"{len(scenarios)} scenarios but lanes for {len(lanes)}")
        self.scenarios = tuple(scenarios)
        self.lanes = tuple(tuple(runs) for runs in lanes)

    def __len__(self) -> int:
        return len(self.scenarios)

    def __repr__(self) -> str:
        return f"Result({len(self)} scenarios, {sum(map(len, self.lanes))} runs)"

    @functools.cached_property
    def runs(self) -> tuple[tuple[dict[str, Any], ...], ...]:
        """Metrics of every seed of every scenario (`lane_metrics`)."""
        return tuple(tuple(lane_metrics(lane, s.slo, s.warmup_s, s.cooldown_s, devices_of(s, len(lane.busy_s)),
                                        s.workload.tenants, token_weights(s))
                           for lane in lanes) for s, lanes in zip(self.scenarios, self.lanes, strict=True))

    @functools.cached_property
    def metrics(self) -> tuple[dict[str, Any], ...]:
        """Metrics of every scenario: mean over its seeds, in the layout of `summary.json`."""
        return tuple(combine(runs)[0] for runs in self.runs)

    @functools.cached_property
    def intervals(self) -> tuple[dict[str, Interval], ...]:
        """95 % intervals over the seeds of every scenario, by dotted key."""
        return tuple(combine(runs)[1] for runs in self.runs)

    @functools.cached_property
    def summary(self) -> pd.DataFrame:
        """One row a scenario: its name and every metric, nested groups as dotted columns."""
        rows = [{"name": s.name, **flatten(m)} for s, m in zip(self.scenarios, self.metrics, strict=True)]
        return pd.DataFrame(rows)

    @functools.cached_property
    def requests(self) -> pd.DataFrame:
        """One row a request of every run: `scenario` and `seed`, then the columns of `request_frame`."""
        frames = []
        for index, (scenario, lanes) in enumerate(zip(self.scenarios, self.lanes, strict=True)):
            for seed, lane in zip(scenario.seeds, lanes, strict=False):
                frame = request_frame(lane)
                frame.insert(0, "scenario", index)
                frame.insert(1, "seed", seed)
                frames.append(frame)
        return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()

    @property
    def faults(self) -> tuple[str, ...]:
        """The bounds that stopped runs, each once."""
        return tuple(dict.fromkeys(lane.fault for lanes in self.lanes for lane in lanes if lane.fault))
