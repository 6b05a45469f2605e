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
  (`jaxsim.spec.device.ServingPower`), also while that is down, pools that of their own devices. A first form: power
  does not follow the batch, prompts are charged as decodes.

Known gaps: percentiles and deviation of ITL come from a histogram with bins at most 1.6 % wide, which
cannot leave out a warm-up; the mean of ITL is exact.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int, Int8

from jaxsim.kernels import histogram
from jaxsim.metrics.fairness import TOKEN_WEIGHTS, fairness_of, service
from jaxsim.metrics.lane import (
    FAILED,
    FINISHED,
    REJECTED,
    STATUS_NAMES,
    TIMED_OUT,
    LaneResult,
    request_frame,
    transfer_begin,
)
from jaxsim.metrics.limits import NO_LIMITS, meets
from jaxsim.metrics.power import Devices, energy
from jaxsim.metrics.stability import is_unstable
from jaxsim.metrics.window import is_measured, measured_span_s, share_inside
from jaxsim.spec.scenario import SloSection
from jaxsim.spec.workload import TenantSection

PERCENTILES = (50, 90, 95, 99)
LATENCIES = ("ttft", "tpot", "itl", "e2el")

ABORTS = ("finished", "preempted", "no_room", "too_many_stages", "outage")
"""Why a migration is given up (`jaxsim.engine.migration`)."""


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
        {} if lane.role_switches is None else {"role_switching": {
            "switches": int(lane.role_switches),
            "mean_drain_s": None if np.isnan(lane.drain_s) else float(lane.drain_s)}}) | (
        {} if lane.swaps is None else {"swaps": _swaps_group(lane, measured)}) | (
        {} if lane.losses is None else {"outages": _outages_group(lane, is_mine)}) | (
        {} if lane.loaded_tokens is None else {"loads": _loads_group(lane, measured)}) | (
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


def _outages_group(lane: LaneResult, is_mine: Bool[np.ndarray, " requests"]) -> dict[str, Any]:
    """Outages of the whole run, and what measured requests had of them."""
    found = outages(is_mine[None], *(np.asarray(x)[None] for x in (
        lane.status, lane.losses, lane.restarts, lane.num_outages, lane.down_s, lane.ended_s)))
    return {name: None if np.isnan(value[0]) else value[0].item() for name, value in found.items()}


def outages(is_measured: Bool[np.ndarray, "runs requests"], status: Int8[np.ndarray, "runs requests"],
            losses: Int[np.ndarray, "runs requests"], restarts: Int[np.ndarray, "runs requests"],
            number: Int[np.ndarray, " runs"], down_s: Float[np.ndarray, "runs instances"],
            ended_s: Float[np.ndarray, "runs requests"]) -> dict[str, np.ndarray]:
    """Outages, the share of the time of all instances from the start of the run to the last end of a request in which
    one was down; how often measured requests were lost and taken by another instance, and how many failed by it for
    good; an entry a run, NaN where nothing ended."""
    whole_s = np.where(np.isnan(ended_s), 0.0, ended_s).max(axis=1)
    share = np.divide(down_s.mean(axis=1), whole_s, out=np.full(len(whole_s), np.nan), where=whole_s > 0)
    return {"number": number, "down_share": share, "lost": np.where(is_measured, losses, 0).sum(axis=1),
            "rerouted": np.where(is_measured, restarts, 0).sum(axis=1),
            "failed": (is_measured & (status == FAILED)).sum(axis=1)}


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
    begun_s = transfer_begin(lane.first_token_s, lane.left_s)
    seconds = (lane.delivered_s - begun_s)[is_mine & ~np.isnan(lane.delivered_s)]
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


def _loads_group(lane: LaneResult, frame: pd.DataFrame) -> dict[str, Any]:
    """Of the prompt tokens of measured requests, those found on the device, loaded from elsewhere, and neither, when
    each was first admitted; with a store that instances share, those of the loaded that came from there; seconds of all
    loads on the links, and the part of the time with an iteration in flight by which they lengthened these."""
    prompt, busy_s = frame["input_tokens"].sum(), float(np.sum(lane.busy_s))
    shares = {name: float(frame[column].sum() / prompt) if prompt else None
              for name, column in (("device_share", "cached_tokens"), ("loaded_share", "loaded_tokens"))}
    fetched = {}
    if lane.fetched_tokens is not None:
        fetched["store_share"] = float(frame["fetched_tokens"].sum() / prompt) if prompt else None
    return {**shares, **fetched, "computed_share": 1 - sum(shares.values()) if prompt else None,
            "load_s": float(np.sum(lane.load_s)),
            "delay_share": float(np.sum(lane.load_delay_s)) / busy_s if busy_s else None}


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
    # Of those that hold KV.
    has_kv = np.broadcast_to(capacity > 0, np.shape(lane.kv_block_s))
    capacity = np.broadcast_to(capacity, has_kv.shape)[has_kv]
    mean = float(np.mean(lane.kv_block_s[has_kv] / capacity)) / duration_s if duration_s else None
    return {"num_blocks": int(capacity.min()), "mean_share": mean,
            "peak_share": float(np.max(lane.kv_peak_blocks[has_kv] / capacity))}


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


def _energy_of(lane: LaneResult, devices: Devices | None, window_s: float | None, output_throughput: float | None
               ) -> dict[str, float | None]:
    nan = math.nan
    nothing = Devices(*(np.full(len(lane.busy_s), nan) for _ in Devices._fields))
    at_work = lane.busy_s if lane.device_busy_s is None else lane.device_busy_s
    share = np.asarray(at_work) / (lane.span_s or nan)
    rest = (nan if value is None else value for value in (window_s, output_throughput))
    on_share = 1.0 if lane.instance_s is None else lane.instance_s / (len(share) * float(np.nanmax(lane.finish_s)))
    found = {name: float(value) for name, value in energy(devices or nothing, share, *rest, on_share).items()}
    return {name: None if math.isnan(value) else value for name, value in found.items()}
