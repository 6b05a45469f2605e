"""Metrics of a run as sums over latencies and over seconds at work: what each weighs in them, at this run.

Which request is the slowest, and between which two a percentile lies, is held fixed, as the schedule is. At a fixed
schedule the first request arrives and the last leaves as many iterations after its own arrival as it did, so the
duration changes as the latency of the request that is last to finish. Where arrivals answer ends (sessions, closed
loops) it would not, and neither duration nor what is made of it is here. Nor are counts and shares of limits kept,
percentiles of the time between tokens, which come from a histogram, and rates of a window (`cooldown_s`).
"""

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

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
    """A metric of a run, and its derivatives: by latencies of requests, by the seconds that instances are at work, by
    the seconds that requests spend in front of the engine, by the watts of an instance's devices, idle and at work."""

    value: float
    latencies: Latencies
    busy: Float[np.ndarray, " instances"]
    front_end: float
    idle_w: Float[np.ndarray, " instances"]
    busy_w: Float[np.ndarray, " instances"]


class _Sum:
    """Grows into a `Measure` of a run: numbers until there is an array to add, as most of them stay 0."""

    def __init__(self, lane: LaneResult):
        self.lane, self.front_end = lane, 0.0
        self.queue = self.ttft = self.e2e = self.busy = self.idle_w = self.busy_w = 0.0

    def plus(self, other: "_Sum", factor: float) -> "_Sum":
        """Itself, with so many times another."""
        for name in ("front_end", "queue", "ttft", "e2e", "busy", "idle_w", "busy_w"):
            setattr(self, name, getattr(self, name) + factor * getattr(other, name))
        return self

    def measure(self, value: float) -> Measure:
        def full(size, *weights):
            return [one if isinstance(one, np.ndarray) else np.zeros(size) + one for one in weights]

        latencies = Latencies(*full(self.lane.num_requests, self.queue, self.ttft, self.e2e))
        busy, idle_w, busy_w = full(len(self.lane.busy_s), self.busy, self.idle_w, self.busy_w)
        return Measure(float(value), latencies, busy, float(self.front_end), idle_w, busy_w)


def together(known: Sequence[dict[str, Measure]]) -> dict[str, Measure]:
    """Sums over runs of the metrics that all of them have, as of one run: its requests and instances are theirs, one
    run after the other, as `jaxsim.sensitivity.schedule.of_runs` has them."""
    def summed(each: list[Measure]) -> Measure:
        value, latencies, busy, front_end, idle_w, busy_w = zip(*each, strict=True)
        return Measure(sum(value), Latencies(*map(np.concatenate, zip(*latencies, strict=True))), np.concatenate(busy),
                       sum(front_end), np.concatenate(idle_w), np.concatenate(busy_w))

    first, *others = known
    return {name: summed([one[name] for one in known]) for name in first if all(name in one for one in others)}


def measures(scenario: Scenario, lane: LaneResult, *, answers: bool = False, only: Collection[str] | None = None
             ) -> dict[str, Measure]:
    """Those of `jaxsim.metrics.lane_metrics`, by their names there, that are such sums and have a value.

    answers: arrivals answer ends; only: names that are wanted, all unless given.
    """
    is_mine = is_measured(lane, scenario.warmup_s, scenario.cooldown_s)
    is_done = is_mine & lane.is_finished
    found: dict[str, Measure] = {}
    gaps = np.maximum(np.asarray(lane.output_tokens) - 1, 1)
    ttft, e2e = (times - lane.arrival_s + lane.front_end_s for times in (lane.first_token_s, lane.finish_s))
    tpot = np.where(np.asarray(lane.output_tokens) > 1, (lane.finish_s - lane.first_token_s) / gaps, np.nan)
    queue = lane.scheduled_s - lane.arrival_s

    def latency(weights, *, front_end=0.0, **each):
        one = _Sum(lane)
        for kind, factor in each.items():
            setattr(one, kind, weights * factor)
        one.front_end = float(np.sum(weights) * front_end)
        return one

    of_latency = {"ttft": (ttft, dict(ttft=1.0, front_end=1.0)), "tpot": (tpot, dict(ttft=-1 / gaps, e2e=1 / gaps)),
                  "e2el": (e2e, dict(e2e=1.0, front_end=1.0))}
    for name, seconds, among, each in (
            *((f"{{}}_{name}_ms", seconds, is_done, each) for name, (seconds, each) in of_latency.items()),
            ("queueing.{}_ms", queue, is_mine, dict(queue=1.0))):
        absent = "median" if name[0] == "q" else "max"
        wanted = [statistic for statistic in STATISTICS
                  if statistic != absent and (only is None or name.format(statistic) in only)]
        if not wanted:
            continue
        for statistic, (value, weights) in _statistics(seconds, among & ~np.isnan(seconds), wanted).items():
            found[name.format(statistic)] = latency(1e3 * weights, **each).measure(1e3 * value)
    for metric in only or ():
        # Of one tenant, when it is asked for.
        name, figure = tenants.parts(metric) or ("", "")
        if name in lane.tenant_names and figure in tenants.LATENCIES and len(lane.tenant_names) > 1:
            statistic, latency_name = tenants.LATENCIES[figure]
            seconds, each = of_latency[latency_name]
            is_own = is_done & (np.asarray(lane.tenant) == list(lane.tenant_names).index(name)) & ~np.isnan(seconds)
            for value, weights in _statistics(seconds, is_own, [statistic]).values():
                found[metric] = latency(1e3 * weights, **each).measure(1e3 * value)
    num_gaps = np.sum((np.asarray(lane.output_tokens) - 1)[is_done])
    if num_gaps > 0 and (only is None or "mean_itl_ms" in only):
        one = latency(is_done * (1e3 / num_gaps), ttft=-1.0, e2e=1.0)
        found["mean_itl_ms"] = one.measure(1e3 * np.sum((e2e - ttft)[is_done]) / num_gaps)
    if not answers and is_done.any() and (only is None or set(only) - set(found)):
        found |= _of_durations(scenario, lane, is_mine, is_done, only)
    return {name: one for name, one in found.items() if np.isfinite(one.value) and (only is None or name in only)}


def _statistics(seconds: Float[np.ndarray, " requests"], is_there, wanted: Collection[str]
                ) -> dict[str, tuple[float, np.ndarray]]:
    """Of the values that are there, the wanted statistics and what every request weighs in each."""
    rows = np.flatnonzero(is_there)
    if not len(rows):
        return {}
    values, count = seconds[rows], len(rows)
    mean, found = values.mean(), {}

    def spread(places, weights):
        full = np.zeros(len(seconds))
        for place, weight in zip(places, weights, strict=True):
            full[place] += weight
        return full

    if "mean" in wanted:
        found["mean"] = mean, is_there / count
    if "std" in wanted and (std := values.std()) > 0:
        found["std"] = std, np.where(is_there, (seconds - mean) / (count * std), 0.0)
    ranked = [(name, percent) for name, percent in (("median", 50), *((f"p{p}", p) for p in PERCENTILES), ("max", 100))
              if name in wanted]
    for name, percent in ranked:
        rank = percent / 100 * (count - 1)
        low = int(np.floor(rank))
        high, part = min(low + 1, count - 1), rank - low
        ordered = np.partition(values, (low, high))
        (first, second), own = ordered[[low, high]], [rows[_at(values, ordered, place)] for place in (low, high)]
        found[name] = first + part * (second - first), spread(own, [1 - part, part])
    return found


def _at(values: Float[np.ndarray, " count"], ordered: Float[np.ndarray, " count"], place: int) -> int:
    """Which of the values is at a place in their order, the earlier ones first among equals."""
    equal = np.flatnonzero(values == ordered[place])
    return equal[place - np.count_nonzero(values < ordered[place])] if len(equal) > 1 else equal[0]


def _of_durations(scenario: Scenario, lane: LaneResult, is_mine, is_done, only: Collection[str] | None
                  ) -> dict[str, Measure]:
    """Duration, rates over it, time at work, power and energy, as far as they are wanted."""
    found: dict[str, Measure] = {}

    def is_wanted(*names: str) -> bool:
        return only is None or any(name in only for name in names)

    def last_of(among: Any) -> _Sum:
        one = _Sum(lane)
        rows = np.flatnonzero(among)
        one.e2e = np.zeros(lane.num_requests)
        one.e2e[rows[np.argmax(lane.finish_s[rows])]] = 1.0
        return one

    own, span, span_s = last_of(is_done), last_of(lane.is_finished), lane.span_s
    own.front_end = 1.0
    duration_s = float(lane.finish_s[is_done].max() - lane.arrival_s[is_mine].min()) + lane.front_end_s
    found["duration"] = own.measure(duration_s)
    window, window_s = own, duration_s
    if scenario.cooldown_s:
        end_s = float(np.nanmax(lane.arrival_s)) - scenario.cooldown_s
        window, window_s = _Sum(lane), end_s - float(lane.arrival_s[0]) - scenario.warmup_s
    inputs, outputs = (int(np.asarray(tokens)[is_done].sum()) for tokens in (lane.input_tokens, lane.output_tokens))
    if not scenario.cooldown_s:
        found["window_s"] = found["duration"]
        for name, amount in (("request_throughput", is_done.sum()), ("output_throughput", outputs),
                             ("total_token_throughput", inputs + outputs)):
            if not is_wanted(name):
                continue
            rate = float(amount) / duration_s
            found[name] = _Sum(lane).plus(own, -rate / duration_s).measure(rate)
    if span_s is None or span_s <= 0:
        return found
    at_work = np.asarray(lane.busy_s if lane.device_busy_s is None else lane.device_busy_s)
    share, instances = at_work / span_s, np.arange(len(at_work))

    def shares(weights):
        """Derivative of a weighted sum of `share`."""
        one = _Sum(lane).plus(span, -float(np.sum(weights * share)) / span_s)
        one.busy = one.busy + weights / span_s
        return one

    for name, value, weights in (
            ("busy_share", share.mean(), 1 / len(share)), ("device_busy_share", share.mean(), 1 / len(share)),
            ("least_busy_share", share.min(), instances == share.argmin()),
            ("most_busy_share", share.max(), instances == share.argmax())):
        if is_wanted(f"utilisation.{name}"):
            found[f"utilisation.{name}"] = shares(np.broadcast_to(weights, share.shape).astype(float)).measure(value)
    if not is_wanted("mean_power_w", "energy_j", "energy_wh", "energy_j_per_output_token"):
        return found
    devices: Devices = devices_of(scenario, len(share))
    if lane.instance_s is not None or not np.all(np.isfinite(devices.busy_w)):
        return found
    power_w = float(np.sum(devices.count * (devices.idle_w + (devices.busy_w - devices.idle_w) * share)))
    power = shares(devices.count * (devices.busy_w - devices.idle_w))
    power.idle_w, power.busy_w = devices.count * (1 - share), devices.count * share
    energy = _Sum(lane).plus(power, window_s).plus(window, power_w)
    found["mean_power_w"] = power.measure(power_w)
    found["energy_j"] = energy.measure(power_w * window_s)
    if is_wanted("energy_wh"):
        found["energy_wh"] = _Sum(lane).plus(energy, 1 / 3600).measure(power_w * window_s / 3600)
    if not scenario.cooldown_s and outputs and is_wanted("energy_j_per_output_token"):
        found["energy_j_per_output_token"] = _Sum(lane).plus(energy, 1 / outputs).measure(
            power_w * window_s / outputs)
    return found
