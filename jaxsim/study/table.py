"""Metrics of many runs at once: the columns of a study's table, the same numbers as `jaxsim.metrics.lane_metrics`.

A metric that does not exist is NaN here, None there. Requests stand in rows that are sorted once a latency, those
without a value behind the rest.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from jaxsim.kernels import histogram
from jaxsim.metrics import (
    ABORTS,
    FINISHED,
    PERCENTILES,
    STATUS_NAMES,
    UNFINISHED,
    fairness_of,
    limits_ms,
    outages,
    outcomes,
    share_inside,
    token_weights,
    transfer_begin,
    unstable_rows,
    waiting_and_running_until,
)
from jaxsim.spec.scenario import SloSection
from jaxsim.spec.workload import TenantSection
from jaxsim.study.lanes import Run
from jaxsim.study.tile import Runs

Columns = dict[str, np.ndarray]


class Tenants(NamedTuple):
    """Whose the requests of a run are: the scenario's sections, names, of each request an index into these; service of
    a prompt token and of an output token."""

    sections: Sequence[TenantSection]
    names: Sequence[str]
    tenant: Int[np.ndarray, " requests"]
    token_weights: tuple[float, float]

    def limits_ms(self, slo: SloSection) -> dict[str, Any]:
        """As of `jaxsim.metrics.limits_ms`."""
        return limits_ms(slo, self.sections, self.names, self.tenant)


def tenants_of(runs: Sequence[Run]) -> list[Tenants] | None:
    """None where no run has several."""
    if all(len(run.workload.tenant_names) < 2 and not run.scenario.workload.tenants for run in runs):
        return None
    return [Tenants(run.scenario.workload.tenants, run.workload.tenant_names, run.workload.tenant,
                    token_weights(run.scenario)) for run in runs]


def columns(runs: Runs, slos: Sequence[SloSection], warmup_s: Float[np.ndarray, " runs"],
            cooldown_s: Float[np.ndarray, " runs"], tenants: Sequence[Tenants] | None = None) -> Columns:
    """All metrics, an entry a run. slos: limits of each run; tenants: of each run, where any has several."""
    arrival_s, real = runs.arrival_s, runs.is_real
    start_s = arrival_s[:, 0] + warmup_s
    # Those that never arrived are NaN.
    end_s = np.where(cooldown_s > 0, np.fmax.reduce(np.where(real, arrival_s, -np.inf), axis=1) - cooldown_s, np.inf)
    is_measured = real & (arrival_s - arrival_s[:, :1] >= warmup_s[:, None]) & (arrival_s <= end_s[:, None])
    is_done = is_measured & runs.is_finished
    ttft = runs.first_token_s - arrival_s + runs.front_end_s[:, None]
    e2e = runs.finish_s - arrival_s + runs.front_end_s[:, None]
    gaps = runs.output_tokens - 1
    tpot = np.where(gaps > 0, (runs.finish_s - runs.first_token_s) / np.maximum(gaps, 1), np.nan)
    completed, measured = is_done.sum(axis=1), is_measured.sum(axis=1)
    first = np.where(is_measured, arrival_s, np.inf).min(axis=1)
    last = np.where(is_done, runs.finish_s, -np.inf).max(axis=1)
    duration = np.where(completed > 0, last - first + runs.front_end_s, np.nan)
    duration = np.where(completed > 0, duration, np.nan)
    met = _met(runs, slos, ttft, tpot, e2e, tenants)
    # With a cool-down, rates are of what ended in the window.
    has_end = np.isfinite(end_s)
    window = np.where(has_end, np.where(end_s > start_s, end_s - start_s, np.nan), duration)
    in_window = runs.is_finished & (runs.finish_s >= start_s[:, None]) & (runs.finish_s <= end_s[:, None])
    is_counted, is_good = (np.where(has_end[:, None], in_window, mask) for mask in (is_done, is_measured))

    def per_second(amount):
        return np.divide(amount, window, out=np.full(len(window), np.nan), where=window > 0)

    input_sum, output_sum = (np.where(is_done, tokens, 0).sum(axis=1) for tokens in (
        runs.input_tokens, runs.output_tokens))
    is_begun = (runs.first_token_s >= start_s[:, None]) & (runs.first_token_s <= end_s[:, None])
    spread = runs.output_tokens * share_inside(runs.first_token_s, runs.finish_s, start_s[:, None], end_s[:, None])
    inputs = np.where(has_end, np.where(is_begun, runs.input_tokens, 0).sum(axis=1), input_sum)
    outputs = np.where(has_end, np.nansum(spread, axis=1), output_sum)
    good = (met["all"] & is_good).sum(axis=1) if met else None
    has_limits = np.array([_has_limits(slo) for slo in slos])
    if tenants is not None:
        has_limits = has_limits | [any(limit is not None for limit in t.limits_ms(slo).values())
                                   for t, slo in zip(tenants, slos, strict=True)]
    found: Columns = {
        "duration": duration, "window_s": window, "completed": completed, "failed": measured - completed,
        "total_input_tokens": input_sum, "total_output_tokens": output_sum,
        "request_throughput": per_second(is_counted.sum(axis=1)),
        "request_goodput": np.where(has_limits, per_second(good), np.nan) if met else np.full(len(duration), np.nan),
        "output_throughput": per_second(outputs), "total_token_throughput": per_second(inputs + outputs)}
    for name, values in (("ttft", ttft), ("tpot", tpot), ("itl", None), ("e2el", e2e)):
        found |= {f"{statistic}_{name}_ms": value for statistic, value in (
            _gaps(runs, is_done, gaps, e2e - ttft) if values is None
            else _distribution(values, is_done & ~np.isnan(values))).items()}
    found |= _attainment(met, is_measured, has_limits)
    queue = runs.scheduled_s - arrival_s - _before_queue(runs)
    is_queued = is_measured & ~np.isnan(queue)
    spread = _distribution(queue, is_queued)
    found |= {f"queueing.{name}_ms": value for name, value in spread.items() if name != "median"}
    found["queueing.max_ms"] = _or_nan(np.where(is_queued, queue, -np.inf).max(axis=1) * 1e3, is_queued.any(axis=1))
    hit = is_measured & (runs.preemptions > 0)
    total = np.where(is_measured, runs.preemptions, 0).sum(axis=1)
    found["preemptions.total"] = total
    found["preemptions.requests_share"] = _ratio(hit.sum(axis=1), measured)
    found["preemptions.mean_stall_ms"] = _ratio(np.where(hit, runs.stall_s, 0).sum(axis=1), hit.sum(axis=1)) * 1e3
    # Of instances, whatever the warm-up.
    whole = whole_s(runs)
    has_kv = runs.num_blocks > 0
    capacity, has_any = np.where(has_kv, runs.num_blocks, np.inf), has_kv.any(axis=1)
    found |= {
        "kv.num_blocks": _or_nan(capacity.min(axis=1), has_any),
        "kv.mean_share": _ratio((runs.kv_block_s / capacity).sum(axis=1), has_kv.sum(axis=1)) / whole,
        "kv.peak_share": _or_nan((runs.kv_peak_blocks / capacity).max(axis=1), has_any),
        "utilisation.busy_share": (runs.busy_s / whole[:, None]).mean(axis=1),
        "utilisation.device_busy_share": (runs.device_busy_s / whole[:, None]).mean(axis=1),
        "utilisation.least_busy_share": (runs.busy_s / whole[:, None]).min(axis=1),
        "utilisation.most_busy_share": (runs.busy_s / whole[:, None]).max(axis=1),
        "utilisation.mean_running": runs.running_s.mean(axis=1) / whole,
        "utilisation.num_iterations": runs.num_iterations, "num_requests": measured,
        "num_warmup_requests": (real & ~is_measured & ~(arrival_s > end_s[:, None])).sum(axis=1),
        "num_cooldown_requests": (real & (arrival_s > end_s[:, None])).sum(axis=1),
        "unstable": _unstable(runs),
        "fault": np.array([text or None for text in runs.fault], object)}
    if runs.attempts is not None:
        ends = outcomes(is_measured, runs.status, runs.attempts)
        found |= {f"outcomes.{name}": value for name, value in ends.items()}
    if runs.losses is not None:
        of_outages = outages(is_measured, runs.status, runs.losses, runs.restarts, runs.num_outages, runs.down_s,
                             runs.ended_s)
        found |= {f"outages.{name}": value for name, value in of_outages.items()}
    if tenants is not None:
        found |= _fairness(runs, tenants)
    if runs.delivered_s is not None:
        begun_s = transfer_begin(runs.first_token_s, runs.left_s)
        waits = np.where(is_measured & (runs.decode_instance >= 0), runs.delivered_s - begun_s, np.nan)
        found["transfers.requests"] = (~np.isnan(waits)).sum(axis=1)
        found["transfers.mean_ms"] = _ratio(np.nansum(waits, axis=1), found["transfers.requests"]) * 1e3
        found["transfers.p99_ms"] = np.array([np.nan if np.isnan(w).all() else 1e3 * np.nanpercentile(w, 99)
                                              for w in waits])
    if runs.migrations is not None:
        moved = is_measured & (runs.migrations > 0)
        each = np.where(moved, runs.downtime_s, 0) / np.maximum(runs.migrations, 1)
        spread = _distribution(each, moved)
        found["migrations.total"] = np.where(is_measured, runs.migrations, 0).sum(axis=1)
        found["migrations.requests"] = moved.sum(axis=1)
        found |= {f"migrations.{name}_downtime_ms": spread[name] for name in ("mean", "p50", "p99")}
        found |= {f"migrations.aborted_{cause}": runs.aborted_migrations[:, k] for k, cause in enumerate(ABORTS)}
    if runs.instance_s is not None:
        last_s = np.where(runs.is_finished, runs.finish_s, -np.inf).max(axis=1)
        found |= {"scaling.instance_s": runs.instance_s, "scaling.mean_instances": runs.instance_s / last_s,
                  "scaling.starts": runs.starts, "scaling.drains": runs.drains}
    if runs.role_switches is not None:
        found |= {"role_switching.switches": runs.role_switches, "role_switching.mean_drain_s": runs.drain_s}
    if runs.session is not None:
        found |= _sessions(runs, is_measured)
    if runs.swaps is not None:
        own, lost_s = np.where(is_measured, runs.swaps, 0), np.where(is_measured, runs.swap_s, 0.0).sum(axis=1)
        found["swaps.total"] = own.sum(axis=1)
        found["swaps.requests_share"] = _ratio((own > 0).sum(axis=1), measured)
        found["swaps.mean_ms"] = _ratio(lost_s, measured) * 1e3
        found["swaps.e2e_share"] = _ratio(lost_s, np.where(is_measured, np.nan_to_num(e2e), 0.0).sum(axis=1))
        found["swaps.delay_share"] = _ratio(runs.swap_delay_s.sum(axis=1), runs.busy_s.sum(axis=1))
        found["swaps.copied_blocks"] = runs.swapped_blocks[:, 0]
        found["swaps.spared_share"] = _ratio(runs.swapped_blocks[:, 1], runs.swapped_blocks.sum(axis=1))
    if runs.loaded_tokens is not None:
        prompt = np.where(is_measured, runs.input_tokens, 0).sum(axis=1)
        for name, tokens in (("device_share", runs.cached_tokens), ("loaded_share", runs.loaded_tokens)):
            found[f"loads.{name}"] = _ratio(np.where(is_measured, tokens, 0).sum(axis=1), prompt)
        found["loads.computed_share"] = 1 - found["loads.device_share"] - found["loads.loaded_share"]
        if runs.fetched_tokens is not None:
            found["loads.store_share"] = _ratio(np.where(is_measured, runs.fetched_tokens, 0).sum(axis=1), prompt)
        found["loads.load_s"] = runs.load_s.sum(axis=1)
        found["loads.delay_share"] = _ratio(runs.load_delay_s.sum(axis=1), runs.busy_s.sum(axis=1))
    if runs.cached_tokens is not None:
        found["cached_share"] = _ratio(np.where(is_measured, runs.cached_tokens, 0).sum(axis=1),
                                       np.where(is_measured, runs.input_tokens, 0).sum(axis=1))
    return found


def whole_s(runs: Runs) -> Float[np.ndarray, " runs"]:
    """Seconds from the first arrival to the last answer, or end without one, whatever the warm-up."""
    is_over, over_s = (runs.is_finished, runs.finish_s) if runs.ended_s is None else (
        ~np.isnan(runs.ended_s), runs.ended_s)
    last = np.where(is_over, over_s, -np.inf).max(axis=1)
    return _or_nan(last - runs.arrival_s[:, 0], is_over.any(axis=1) & (last > runs.arrival_s[:, 0]))


def requests(runs: Runs) -> Columns:
    """Every request of the runs, in order: the columns of `requests.parquet` that a tile knows. run: its row."""
    ttft = runs.first_token_s - runs.arrival_s + runs.front_end_s[:, None]
    e2e = runs.finish_s - runs.arrival_s + runs.front_end_s[:, None]
    gaps = runs.output_tokens - 1
    tpot = np.where(gaps > 0, (runs.finish_s - runs.first_token_s) / np.maximum(gaps, 1), np.nan)
    run, request = np.nonzero(runs.is_real)
    status = np.where(runs.is_finished, FINISHED, UNFINISHED) if runs.status is None else runs.status
    status = np.asarray(STATUS_NAMES, object)[status]
    cached = np.zeros(runs.is_real.shape, np.int64) if runs.cached_tokens is None else runs.cached_tokens
    whole = {"arrival_s": runs.arrival_s, "input_tokens": runs.input_tokens, "output_tokens": runs.output_tokens,
             "ttft_s": ttft, "tpot_s": tpot, "e2e_s": e2e,
             "queue_s": runs.scheduled_s - runs.arrival_s - _before_queue(runs),
             "stall_s": runs.stall_s, **_moves(runs), **_images(runs), **_swaps(runs), "cached_tokens": cached,
             **({} if runs.loaded_tokens is None else {"loaded_tokens": runs.loaded_tokens}),
             **({} if runs.fetched_tokens is None else {"fetched_tokens": runs.fetched_tokens}),
             **({} if runs.loaded_from is None else {"loaded_from": runs.loaded_from}),
             **({} if runs.variant is None else {"variant": runs.variant}),
             "preemptions": runs.preemptions, "status": status,
             **({} if runs.attempts is None else {"attempts": runs.attempts}),
             **({} if runs.restarts is None else {"restarts": runs.restarts})}
    return {"run": run, "request_id": request, **{name: values[runs.is_real] for name, values in whole.items()}}


def _before_queue(runs: Runs) -> np.ndarray | float:
    """Seconds from arrival to where a request could first be scheduled: its images are encoded elsewhere."""
    if runs.embedded_s is None:
        return 0.0
    return np.where(runs.num_images > 0, runs.embedded_s - runs.arrival_s, 0.0)


def _images(runs: Runs) -> Columns:
    found: Columns = {} if runs.num_images is None else {"images": runs.num_images}
    if runs.encoded_s is None:
        return found
    has_any = runs.num_images > 0
    return found | {"encode_s": np.where(has_any, runs.encoded_s - runs.arrival_s, 0.0),
                    "embedding_s": np.where(has_any, runs.embedded_s - runs.encoded_s, 0.0)}


def _moves(runs: Runs) -> Columns:
    if runs.migrations is not None:
        return {"migrations": runs.migrations, "downtime_s": runs.downtime_s, "last_instance": runs.last_instance}
    turns = {} if runs.session is None else {"session": runs.session, "turn": runs.turn}
    if runs.delivered_s is None:
        return turns
    begun_s = transfer_begin(runs.first_token_s, runs.left_s)
    return {"transfer_s": np.nan_to_num(runs.delivered_s - begun_s, nan=0.0),
            "decode_instance": runs.decode_instance, **turns}


def _sessions(runs: Runs, is_measured: Bool[np.ndarray, "runs requests"]) -> Columns:
    """What `jaxsim.metrics` says of sessions, those whose first turn is measured; NaN for runs without any."""
    names = ("completed", "failed", "context_limited", "mean_turns", "mean_duration_s",
             *(f"p{p}_duration_s" for p in PERCENTILES))
    found = np.full((len(names), len(runs.is_real)), np.nan)
    for row, session in enumerate(runs.session):
        mine = np.flatnonzero(session >= 0)
        if not len(mine):
            continue
        # The turns of a session stand in order.
        _, first, of, turns = np.unique(session[mine], return_index=True, return_inverse=True, return_counts=True)
        is_out = np.bincount(of, ~runs.is_finished[row, mine]) > 0
        last_s = np.full(len(turns), -np.inf)
        np.maximum.at(last_s, of, np.where(runs.is_finished[row, mine], runs.finish_s[row, mine], -np.inf))
        is_mine = is_measured[row, mine[first]]
        done = is_mine & ~is_out
        duration_s = (last_s - runs.arrival_s[row, mine[first]])[done] + runs.front_end_s[row]
        found[:3, row] = done.sum(), (is_mine & is_out).sum(), runs.num_context_limited[row]
        found[3, row] = turns[is_mine].mean() if is_mine.any() else np.nan
        if done.any():
            found[4:, row] = duration_s.mean(), *np.percentile(duration_s, PERCENTILES)
    return {f"sessions.{name}": values for name, values in zip(names, found, strict=True)}


def _swaps(runs: Runs) -> Columns:
    return {} if runs.swaps is None else {"swaps": runs.swaps, "swap_s": runs.swap_s}


class _Served(NamedTuple):
    """Of one run, what `fairness_of` reads."""

    arrival_s: np.ndarray
    scheduled_s: np.ndarray
    first_token_s: np.ndarray
    finish_s: np.ndarray
    input_tokens: np.ndarray
    output_tokens: np.ndarray
    tenant: np.ndarray
    tenant_names: Sequence[str]


def _fairness(runs: Runs, tenants: Sequence[Tenants]) -> Columns:
    """NaN where a run has one tenant."""
    found = {f"fairness.{name}": np.full(len(tenants), np.nan) for name in ("jain_index", "max_service_gap")}
    for k, t in enumerate(tenants):
        if len(t.names) > 1:
            columns = (getattr(runs, name)[k, :len(t.tenant)] for name in _Served._fields[:6])
            values = fairness_of(_Served(*columns, t.tenant, t.names), t.sections, t.token_weights)
            for name, value in values.items():
                found[f"fairness.{name}"][k] = np.nan if value is None else value
    return found


def _unstable(runs: Runs) -> Float[np.ndarray, " runs"]:
    found, lengths = np.empty(len(runs.is_real)), runs.is_real.sum(axis=1)
    for length in np.unique(lengths):
        rows = lengths == length
        until = waiting_and_running_until(runs.scheduled_s, runs.finish_s, runs.ended_s)
        found[rows] = unstable_rows(*(x[rows, :length] for x in (runs.arrival_s, *until)))
    return found


def _has_limits(slo: SloSection) -> bool:
    return any(limit is not None for limit in (slo.ttft_ms, slo.tpot_ms, slo.e2e_ms))


def _or_nan(values, is_there):
    return np.where(is_there, values, np.nan)


def _ratio(above, below):
    return np.divide(above, below, out=np.full(len(below), np.nan), where=below > 0)


def _met(runs: Runs, slos: Sequence[SloSection], ttft, tpot, e2e, tenants=None
         ) -> dict[str, Bool[np.ndarray, "runs requests"]]:
    met = {}
    each = [limits_ms(slo) if tenants is None else tenants[k].limits_ms(slo) for k, slo in enumerate(slos)]
    for name, values in (("ttft", ttft), ("tpot", tpot), ("e2e", e2e)):
        limits = [one[name] for one in each]
        if all(limit is None for limit in limits):
            continue
        limit_s = np.array([[np.inf if limit is None else limit * 1e-3] for limit in limits]
                           if tenants is None else [_padded(limit, values.shape[1]) for limit in limits])
        # Only a one-token output is finished and without a value.
        met[name] = runs.is_finished & (np.isnan(values) | (values <= limit_s))
    if met:
        met["all"] = np.logical_and.reduce(list(met.values()))
    return met


def _padded(limit_ms, width: int) -> Float[np.ndarray, " requests"]:
    """Of a run's requests, in seconds."""
    limit_s = np.full(width, np.inf)
    if limit_ms is not None:
        own = np.atleast_1d(limit_ms) * 1e-3
        limit_s[:len(own) if len(own) > 1 else width] = own
    return limit_s


def _attainment(met, is_measured, has_limits) -> Columns:
    count = is_measured.sum(axis=1)
    shares = {name: np.where(has_limits, _ratio((mask & is_measured).sum(axis=1), count), np.nan)
              for name, mask in met.items()}
    nothing = np.full(len(count), np.nan)
    found = {"slo.attainment": shares.get("all", nothing)}
    found |= {f"slo.{name}_attainment": shares.get(name, nothing) for name in ("ttft", "tpot", "e2e")}
    return found


def _distribution(seconds: Float[np.ndarray, "runs requests"], is_there: Bool[np.ndarray, "runs requests"]) -> Columns:
    """mean, median, std and percentiles in milliseconds, over the values that are there."""
    count = is_there.sum(axis=1)
    value_ms = np.where(is_there, seconds, 0.0) * 1e3
    mean = _ratio(value_ms.sum(axis=1), count)
    square = np.where(is_there, (value_ms - mean[:, None]) ** 2, 0.0).sum(axis=1)
    ordered = np.sort(np.where(is_there, value_ms, np.inf), axis=1)
    found = {"mean": mean, "median": _percentile(ordered, count, 50), "std": np.sqrt(_ratio(square, count))}
    return found | {f"p{p}": _percentile(ordered, count, p) for p in PERCENTILES}


def _percentile(ordered: Float[np.ndarray, "runs requests"], count, percent: float) -> Float[np.ndarray, " runs"]:
    """Linear between order statistics, as NumPy's."""
    rank = percent / 100 * np.maximum(count - 1, 0)
    low = np.floor(rank).astype(np.int64)
    high = np.minimum(low + 1, np.maximum(count - 1, 0))
    a, b = (np.take_along_axis(ordered, at[:, None], axis=1)[:, 0] for at in (low, high))
    with np.errstate(invalid="ignore"):
        value = np.where(rank - low < 0.5, a + (b - a) * (rank - low), b - (b - a) * (1 - (rank - low)))
    return _or_nan(value, count > 0)


def _gaps(runs: Runs, is_done, gaps, after_first) -> Columns:
    """Of the time between tokens: the mean is exact, the rest from the histogram."""
    counts = runs.itl_counts
    total, number = counts.sum(axis=1), np.where(is_done, gaps, 0).sum(axis=1)
    is_there = (total > 0) & (number > 0)
    edges = histogram.edges()
    middles = 0.5 * (edges[1:] + edges[:-1])
    first, second = (counts.astype(np.float64) @ np.stack([middles, middles**2], axis=1)).T
    binned = _ratio(first, total)
    std = np.sqrt(np.maximum(_ratio(second, total) - binned**2, 0.0))
    mean = _ratio(np.where(is_done, after_first, 0.0).sum(axis=1), number)
    at = histogram.percentiles_of_rows(runs.itl_counts, (50, *PERCENTILES)) * 1e3
    found = {"mean": mean * 1e3, "median": at[:, 0], "std": std * 1e3}
    found |= {f"p{p}": at[:, 1 + k] for k, p in enumerate(PERCENTILES)}
    return {name: _or_nan(values, is_there) for name, values in found.items()}
