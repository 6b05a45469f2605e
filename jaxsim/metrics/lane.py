"""One run as host arrays, and the published row of each of its requests."""

import dataclasses
from collections.abc import Mapping

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int, Int8

FINISHED, UNFINISHED, TIMED_OUT, REJECTED, FAILED = range(5)
STATUS_NAMES = ("finished", "unfinished", "timed_out", "rejected", "failed")


@dataclasses.dataclass(frozen=True, eq=False)
class LaneResult:
    """One scenario, one seed, on the host. Requests are in order of arrival, turns of sessions in that of the earliest
    times they could come; a time that never came is NaN.

    arrival_s, scheduled_s, first_token_s, finish_s: arrival, start of the first iteration that computes
        part of the prompt, end of the one that completes it, end of the last.
    stall_s: time between tokens in which the request was not computed (preempted and waiting again).
    prefill_stall_s: the part of `stall_s` before the first token; None where the engine does not tell.
    max_tokens: the limit the engine knew. tenant: index into tenant_names. status: FINISHED, UNFINISHED (when a bound
        stopped the run), TIMED_OUT, REJECTED or FAILED (lost as its instance went down, or with nowhere to go then).
    itl_counts: tokens after the first, by gap, in the bins of `jaxsim.kernels.histogram`; the outer bins take
        what lies beyond.
    busy_s, kv_block_s, running_s: integrals over the run, by instance: seconds with an iteration in flight,
        KV blocks in use times seconds, running sequences times seconds. kv_peak_blocks: the most in use.
    num_blocks: KV blocks of an instance, of each where they differ (0 where memory is no limit, or holds no KV, and for
        all where instances change between roles that differ in it).
    num_iterations: of all instances.
    front_end_s: that every request spends outside the engine, in its latencies.
    device_busy_s: seconds that an instance's devices are at work on an iteration: those of `busy_s`, or with pipeline
        stages the mean over these, of which each has its turn; None stands for `busy_s`.
    fault: the bound that stopped the simulation, empty if none did.
    num_prefix_blocks: ids of shared prefix blocks that the workload carries. cached_tokens: of each prompt, those found
        in the prefix cache when it was first admitted (with engine.swap.reuse and sessions, in host memory); None
        without.
    decode_instance, accepted_s, delivered_s: of requests that another instance decodes than computed the prompt: which,
        when it took the request, when it had its KV; -1 and NaN for others, None without roles. Where instances fail,
        those of the last time, and of none where the request was lost since. left_s: only there, when the request left
        that time for the instance that decodes; None where that is with its first token.
    migrations, downtime_s, last_instance: with migration, how often each request moved, for how long it stood still for
        that, and where it ended; aborted_migrations: those given up, in the order of `ABORTS`; all None without.
    instance_s, starts, drains: with scaling, seconds for which instances were on, starting or draining, summed over
        them up to the last completion; instances started and drained. None without.
    role_switches, drain_s: with roles that change, how often an instance got another, and seconds on average from when
        it took nobody any more to then, of the first 256 decided, NaN if none did; role_changes: of
        those, the instance, the role it left and the one it was to have (0 encode, 1 prefill, 2 decode), and when it
        was decided, took nobody any more, was seen empty, had the new role; NaN for what had not happened. All None
        without.
    swaps, swap_s: of requests, to host memory, and seconds lost to copies: those by which copies delayed iterations of
        its instance, and those in which its own was on the way in; swap_delay_s: of instances, the former, part of
        `busy_s`; swapped_blocks: of all instances, blocks copied out, and those that were in host memory already. None
        without host memory.
    loaded_tokens: of each prompt, those loaded from host memory, or from a sibling, when it was first admitted; load_s:
        of instances, seconds of all loads on the link, latencies apart; load_delay_s: those by which loads, and what is
        recomputed of a sibling's context, lengthened iterations, part of `busy_s`. None where nothing is loaded.
    fetched_tokens: of the loaded ones, those from the store that instances share; None without one.
    variant: that each is for, None where all instances serve the same; loaded_from: with siblings among the instances,
        which of them gave a request what it loaded, -1 where none did; None without.
    extrapolated_share: of the device seconds, what a profile did not measure; None without a profile or a tape.
    steps: the tape, if recorded, one row a started iteration or jump: time_s, duration_s, instance, running,
        waiting, used_blocks, iterations, prefill_tokens, decode_seqs. lost_steps: rows that it had no room for.
    attempts, ended_s: with clients that give up or clusters that refuse, how often a request was sent, and when the
        last of these sendings ended, answered or not; None where every request is answered. All times but the arrival,
        `instance` (-1: refused) and `preemptions` are of the last sending.
    losses, restarts: where instances fail, how often a request was lost as its instance went down, and how often
        another instance took it then, over all sendings; num_outages: that began before the last request ended;
        down_s: of instances, up to there, from the start of the run. None where instances do not fail.
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
    left_s: Float[np.ndarray, " requests"] | None = None
    migrations: Int[np.ndarray, " requests"] | None = None
    downtime_s: Float[np.ndarray, " requests"] | None = None
    last_instance: Int[np.ndarray, " requests"] | None = None
    aborted_migrations: Int[np.ndarray, " causes"] | None = None
    instance_s: float | None = None
    starts: int | None = None
    drains: int | None = None
    role_switches: int | None = None
    drain_s: float | None = None
    role_changes: Float[np.ndarray, "switches 7"] | None = None
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
    loaded_tokens: Int[np.ndarray, " requests"] | None = None
    load_s: Float[np.ndarray, " instances"] | None = None
    load_delay_s: Float[np.ndarray, " instances"] | None = None
    fetched_tokens: Int[np.ndarray, " requests"] | None = None
    variant: Int[np.ndarray, " requests"] | None = None
    loaded_from: Int[np.ndarray, " requests"] | None = None
    predicted_tokens: Int[np.ndarray, " requests"] | None = None
    losses: Int[np.ndarray, " requests"] | None = None
    restarts: Int[np.ndarray, " requests"] | None = None
    num_outages: int | None = None
    down_s: Float[np.ndarray, " instances"] | None = None

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


def transfer_begin(first_token_s: Float[np.ndarray, "*requests"], left_s: Float[np.ndarray, "*requests"] | None
                   ) -> Float[np.ndarray, "*requests"]:
    """When requests left for the instance that decodes: with the first token; where instances fail `left_s`, since who
    was sent on may have had that long before."""
    return first_token_s if left_s is None else left_s


def request_frame(lane: LaneResult) -> pd.DataFrame:
    """One row a request, in the published columns of `requests.parquet`; a value that does not exist is
    missing.

    front_end_s + encode_s + embedding_s + queue_s + prefill_s + transfer_s + decode_s + stall_s = e2e_s; encode_s (from
    arrival) and embedding_s (from there, its wait to be taken included) only where other instances encode images;
    `transfer_s` is from the first token to where the KV is with the instance that decodes, its wait to be taken
    included; of a request that was lost with an instance and sent on, of the last time, from the token with which it
    left then. Where the engine does not say which stalls came before the first token, stalls are taken out of the
    decode phase first.
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
        begun_s = transfer_begin(lane.first_token_s, lane.left_s)
        transfer = np.nan_to_num(lane.delivered_s - begun_s, nan=0.0)
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
        **({} if lane.loaded_tokens is None else {"loaded_tokens": np.asarray(lane.loaded_tokens, np.int64)}),
        **({} if lane.fetched_tokens is None else {"fetched_tokens": np.asarray(lane.fetched_tokens, np.int64)}),
        **({} if lane.loaded_from is None else {"loaded_from": np.asarray(lane.loaded_from, np.int64)}),
        **({} if lane.variant is None else {"variant": np.asarray(lane.variant, np.int64)}),
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
        **({} if lane.restarts is None else {"restarts": np.asarray(lane.restarts, np.int64)}),
        **({} if lane.predicted_tokens is None else
           {"predicted_tokens": np.asarray(lane.predicted_tokens, np.int64)}),
        **sessions,
        **images,
    })
