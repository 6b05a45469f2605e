"""Metrics of runs as sums over latencies and over seconds at work: what each weighs in them, at these runs.

Which request is the slowest, and between which two a percentile lies, is held fixed, as the schedule is. At a fixed
schedule the first request arrives and the last leaves as many iterations after its own arrival as it did, so the
duration changes as the latency of the request that is last to finish. Where arrivals answer ends (sessions, closed
loops) it would not, and neither duration nor what is made of it is here. Nor are counts and shares of limits kept,
percentiles of the time between tokens, which come from a histogram, and rates of a window (`cooldown_s`).
"""

from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from jaxsim.metrics.lane import LaneResult
from jaxsim.metrics.power import Devices, devices_of
from jaxsim.metrics.summary import PERCENTILES
from jaxsim.metrics.window import is_measured
from jaxsim.sensitivity import tenants
from jaxsim.sensitivity.schedule import Latencies
from jaxsim.spec.scenario import Scenario

STATISTICS = ("mean", "median", "std", *(f"p{p}" for p in PERCENTILES), "max")
"""Of latencies; the maximum of queueing alone, which has no other median than p50."""


class Measure(NamedTuple):
    """The sum of a metric over runs, and its derivatives: by latencies of requests, by the seconds that instances are
    at work, by the seconds that requests spend in front of the engine, by the watts of an instance's devices, idle and
    at work. Requests and instances are those of the runs, one run after the other."""

    value: float
    latencies: Latencies
    busy: Float[np.ndarray, " instances"]
    front_end: float
    idle_w: Float[np.ndarray, " instances"]
    busy_w: Float[np.ndarray, " instances"]


class _Runs:
    """What metrics of runs are made of, a row a run; those with fewer requests are padded, with none that is there."""

    def __init__(self, scenario: Scenario, lanes: Sequence[LaneResult]):
        self.lanes, self.lengths = lanes, [lane.num_requests for lane in lanes]
        self.size = max(self.lengths)
        self.is_mine = self.column([is_measured(lane, scenario.warmup_s, scenario.cooldown_s) for lane in lanes], False)
        self.is_finished = self.column([lane.is_finished for lane in lanes], False)
        self.is_done = self.is_mine & self.is_finished
        self.arrival_s, self.scheduled_s, self.first_token_s, self.finish_s = (
            self.column([getattr(lane, name) for lane in lanes], np.nan)
            for name in ("arrival_s", "scheduled_s", "first_token_s", "finish_s"))
        self.outputs, self.inputs = (self.column([getattr(lane, name) for lane in lanes], 0)
                                     for name in ("output_tokens", "input_tokens"))
        self.front_end_s = np.array([lane.front_end_s for lane in lanes])[:, None]

    def column(self, rows: Sequence[np.ndarray], nothing: float) -> np.ndarray:
        """Of every request of every run."""
        if min(self.lengths) == self.size:
            return np.stack(rows)
        made = np.full((len(rows), self.size), nothing, np.asarray(rows[0]).dtype)
        for row, given in zip(made, rows, strict=True):
            row[:len(given)] = given
        return made

    def flat(self, weights: Float[np.ndarray, "runs requests"]) -> Float[np.ndarray, " requests"]:
        """One run after the other, without padding."""
        if min(self.lengths) == self.size:
            return weights.ravel()
        return np.concatenate([row[:length] for row, length in zip(weights, self.lengths, strict=True)])


class _Sum:
    """Grows into a `Measure` of runs: numbers until there is an array to add, as most of them stay 0; a row a run."""

    KINDS = ("front_end", "queue", "ttft", "e2e", "busy", "idle_w", "busy_w")

    def __init__(self, runs: _Runs, **weights: np.ndarray):
        self.runs = runs
        for kind in self.KINDS:
            setattr(self, kind, weights.get(kind, 0.0))

    def plus(self, other: "_Sum", factor: Float[np.ndarray, " runs"]) -> "_Sum":
        """Itself, with so many times another."""
        factor = np.asarray(factor, float).reshape(-1, 1)
        for kind in self.KINDS:
            if isinstance(more := getattr(other, kind), np.ndarray):
                setattr(self, kind, getattr(self, kind) + factor * more)
        return self

    def measure(self, value: Float[np.ndarray, " runs"]) -> Measure:
        runs, instances = self.runs, sum(len(lane.busy_s) for lane in self.runs.lanes)
        latencies = Latencies(*(runs.flat(one) if isinstance(one, np.ndarray) else np.zeros(sum(runs.lengths))
                                for one in (self.queue, self.ttft, self.e2e)))
        busy, idle_w, busy_w = (one.ravel() if isinstance(one, np.ndarray) else np.zeros(instances)
                                for one in (self.busy, self.idle_w, self.busy_w))
        return Measure(float(np.sum(value)), latencies, busy, float(np.sum(self.front_end)), idle_w, busy_w)


def measures(scenario: Scenario, lanes: Sequence[LaneResult], *, answers: bool = False,
             only: Collection[str] | None = None) -> dict[str, Measure]:
    """Those of `jaxsim.metrics.lane_metrics`, by their names there, that are such sums and have a value in every run.

    answers: arrivals answer ends; only: names that are wanted, all unless given.
    """
    runs = _Runs(scenario, lanes)
    found: dict[str, Measure] = {}
    gaps = np.maximum(runs.outputs - 1, 1)
    ttft, e2e = (times - runs.arrival_s + runs.front_end_s for times in (runs.first_token_s, runs.finish_s))
    tpot = np.where(runs.outputs > 1, (runs.finish_s - runs.first_token_s) / gaps, np.nan)
    queue = runs.scheduled_s - runs.arrival_s

    def latency(weights, *, front_end=0.0, **each):
        return _Sum(runs, front_end=front_end * weights.sum(axis=1, keepdims=True),
                    **{kind: weights * factor for kind, factor in each.items()})

    of_latency = {"ttft": (ttft, dict(ttft=1.0, front_end=1.0)), "tpot": (tpot, dict(ttft=-1 / gaps, e2e=1 / gaps)),
                  "e2el": (e2e, dict(e2e=1.0, front_end=1.0))}
    for name, seconds, among, each in (
            *((f"{{}}_{name}_ms", seconds, runs.is_done, each) for name, (seconds, each) in of_latency.items()),
            ("queueing.{}_ms", queue, runs.is_mine, dict(queue=1.0))):
        absent = "median" if name[0] == "q" else "max"
        wanted = [statistic for statistic in STATISTICS
                  if statistic != absent and (only is None or name.format(statistic) in only)]
        for statistic, value, weights in _statistics(seconds, among, wanted):
            found[name.format(statistic)] = latency(1e3 * weights, **each).measure(1e3 * value)
    tenant_names = lanes[0].tenant_names
    for metric in only or ():
        # Of one tenant, when it is asked for.
        name, figure = tenants.parts(metric) or ("", "")
        if name in tenant_names and figure in tenants.LATENCIES and len(tenant_names) > 1:
            statistic, latency_name = tenants.LATENCIES[figure]
            seconds, each = of_latency[latency_name]
            is_own = runs.column([np.asarray(lane.tenant) == list(lane.tenant_names).index(name) for lane in lanes],
                                 False)
            for _, value, weights in _statistics(seconds, runs.is_done & is_own, [statistic]):
                found[metric] = latency(1e3 * weights, **each).measure(1e3 * value)
    num_gaps = np.sum((runs.outputs - 1) * runs.is_done, axis=1)
    if num_gaps.all() and (only is None or "mean_itl_ms" in only):
        one = latency(runs.is_done * (1e3 / num_gaps)[:, None], ttft=-1.0, e2e=1.0)
        found["mean_itl_ms"] = one.measure(1e3 * np.sum(e2e - ttft, axis=1, where=runs.is_done) / num_gaps)
    if not answers and runs.is_done.any(axis=1).all() and (only is None or set(only) - set(found)):
        found |= _of_durations(scenario, runs, only)
    return {name: one for name, one in found.items() if np.isfinite(one.value) and (only is None or name in only)}


def _statistics(seconds: Float[np.ndarray, "runs requests"], among: Bool[np.ndarray, "runs requests"],
                wanted: Collection[str]) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Of the values that are there, the wanted statistics of every run, and what every request weighs in each; none
    where a run has no values."""
    if not wanted:
        return
    is_there = among & ~np.isnan(seconds)
    count = is_there.sum(axis=1)
    if not count.all():
        return
    mean = np.sum(seconds, axis=1, where=is_there) / count
    if "mean" in wanted:
        yield "mean", mean, is_there / count[:, None]
    if "std" in wanted:
        apart = np.where(is_there, seconds - mean[:, None], 0.0)
        std = np.sqrt(np.sum(apart**2, axis=1) / count)
        if std.all():
            yield "std", std, apart / (count * std)[:, None]
    ranked = {name: percent for name, percent in (("median", 50), *((f"p{p}", p) for p in PERCENTILES), ("max", 100))
              if name in wanted}
    if not ranked:
        return
    values, runs = np.where(is_there, seconds, np.inf), np.arange(len(count))
    for name, percent in ranked.items():
        rank = percent / 100 * (count - 1)
        low = rank.astype(int)
        high, part = np.minimum(low + 1, count - 1), rank - low
        ordered = np.partition(values, np.unique([low, high]), axis=1)
        weights, (first, second) = np.zeros(values.shape), (ordered[runs, place] for place in (low, high))
        weights[runs, _at(values, first, low)] += 1 - part
        weights[runs, _at(values, second, high)] += part
        yield name, first + part * (second - first), weights


def _at(values: Float[np.ndarray, "runs requests"], value: Float[np.ndarray, " runs"], place: Int[np.ndarray, " runs"]
        ) -> Int[np.ndarray, " runs"]:
    """Whose value is at a place in the order of a run, the earlier ones first among equals."""
    is_equal = values == value[:, None]
    if np.count_nonzero(is_equal) > len(value):
        before = place - np.sum(values < value[:, None], axis=1)
        is_equal &= np.cumsum(is_equal, axis=1) == before[:, None] + 1
    return is_equal.argmax(axis=1)


def _of_durations(scenario: Scenario, runs: _Runs, only: Collection[str] | None) -> dict[str, Measure]:
    """Duration, rates over it, time at work, power and energy, as far as they are wanted."""
    found: dict[str, Measure] = {}
    is_done = runs.is_done

    def is_wanted(*names: str) -> bool:
        return only is None or any(name in only for name in names)

    def last_of(among: Bool[np.ndarray, "runs requests"], **more: np.ndarray) -> _Sum:
        weights = np.zeros(among.shape)
        weights[np.arange(len(weights)), np.argmax(np.where(among, runs.finish_s, -np.inf), axis=1)] = 1.0
        return _Sum(runs, e2e=weights, **more)

    own, span = last_of(is_done, front_end=np.ones_like(runs.front_end_s)), last_of(runs.is_finished)
    first_s, last_s = (reduce(runs_s, axis=1, where=among, initial=nothing) for reduce, runs_s, among, nothing in (
        (np.min, runs.arrival_s, runs.is_mine, np.inf), (np.max, runs.finish_s, is_done, -np.inf)))
    duration_s = last_s - first_s + runs.front_end_s[:, 0]
    found["duration"] = own.measure(duration_s)
    window, window_s = own, duration_s
    if scenario.cooldown_s:
        end_s = np.nanmax(runs.arrival_s, axis=1) - scenario.cooldown_s
        window, window_s = _Sum(runs), end_s - runs.arrival_s[:, 0] - scenario.warmup_s
    inputs, outputs = (np.sum(tokens * is_done, axis=1) for tokens in (runs.inputs, runs.outputs))
    if not scenario.cooldown_s:
        found["window_s"] = found["duration"]
        for name, amount in (("request_throughput", is_done.sum(axis=1)), ("output_throughput", outputs),
                             ("total_token_throughput", inputs + outputs)):
            if is_wanted(name):
                rate = amount / duration_s
                found[name] = _Sum(runs).plus(own, -rate / duration_s).measure(rate)
    spans = [lane.span_s for lane in runs.lanes]
    if any(span_s is None or span_s <= 0 for span_s in spans):
        return found
    span_s, busy_s = np.array(spans)[:, None], np.stack(
        [lane.busy_s if lane.device_busy_s is None else lane.device_busy_s for lane in runs.lanes])
    share = busy_s / span_s
    instances = np.arange(share.shape[1])

    def shares(weights):
        """Derivative of a weighted sum of `share`."""
        more = _Sum(runs, busy=np.broadcast_to(weights, share.shape) / span_s)
        return more.plus(span, -np.sum(weights * share, axis=1) / span_s[:, 0])

    for name, value, weights in (
            ("busy_share", share.mean(axis=1), 1 / len(instances)),
            ("device_busy_share", share.mean(axis=1), 1 / len(instances)),
            ("least_busy_share", share.min(axis=1), instances == share.argmin(axis=1)[:, None]),
            ("most_busy_share", share.max(axis=1), instances == share.argmax(axis=1)[:, None])):
        if is_wanted(f"utilisation.{name}"):
            found[f"utilisation.{name}"] = shares(weights).measure(value)
    if not is_wanted("mean_power_w", "energy_j", "energy_wh", "energy_j_per_output_token"):
        return found
    devices: Devices = devices_of(scenario, len(instances))
    if runs.lanes[0].instance_s is not None or not np.all(np.isfinite(devices.busy_w)):
        return found
    power_w = np.sum(devices.count * (devices.idle_w + (devices.busy_w - devices.idle_w) * share), axis=1)
    power = shares(devices.count * (devices.busy_w - devices.idle_w))
    power.idle_w, power.busy_w = devices.count * (1 - share), devices.count * share
    energy = _Sum(runs).plus(power, window_s).plus(window, power_w)
    found["mean_power_w"] = power.measure(power_w)
    found["energy_j"] = energy.measure(power_w * window_s)
    if is_wanted("energy_wh"):
        found["energy_wh"] = _Sum(runs).plus(energy, 1 / 3600).measure(power_w * window_s / 3600)
    if not scenario.cooldown_s and outputs.all() and is_wanted("energy_j_per_output_token"):
        found["energy_j_per_output_token"] = _Sum(runs).plus(energy, 1 / outputs).measure(
            power_w * window_s / outputs)
    return found
