"""Full pathwise derivatives: of every time of a run along its path, only where that is the whole derivative.

A path is a run at one seed. Its times are sums of costs in an order; where a small change of costs leaves that order as
it is, or changes it where both orders give the same times, the derivative of a time is the derivative of its sum. That
holds for

    an offline batch     all requests are there at time 0, so one engine's iterations follow from counts of tokens
    a closed loop        without thinking, on one engine: a request arrives at the instant another ends, again counts.
                         Seconds in front of the engine would bring it later, in the middle of an iteration of the
                         others: then only of one client, who has no others
    one server, FCFS     `engine.max_num_seqs = 1` on engines that no other's state matters to. Service times are of
                         the request alone, starts are max(arrival, end before) (Lindley's recursion): continuous

With open arrivals it does not hold elsewhere: whether an arrival makes it into an iteration is a jump, and a change of
cost moves all later boundaries past arrivals that stay where they are. The jumps that would compensate for it have no
derivative; what is left is wrong by more than a factor of ten (docs/gradients.md has it measured). So it is refused.

What is differentiated is the simulator itself, in forward mode, over all seeds in one program
(`jaxsim.engine.loop`); a field enters by what it changes in the tables that the loop reads, whose derivative is
a central difference of `STEP` of the field (they are deterministic; on a kink of theirs it is the mean of both sides).
Fields that change a whole number, a size, or a number that only decides a schedule (a router's weights, the growth that
an admission expects) have no such derivative and are refused. So is a run that a bound stopped.

Source: infinitesimal perturbation analysis: Suri and Zazanis, Management Science 34 (1988), for one server; Glasserman,
Gradient Estimation via Perturbation Analysis (1991), for the condition of commuting events.
"""

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
import pandas as pd
from jaxtyping import Float

from jaxsim._core.errors import InputError, suggest
from jaxsim.engine import functional, loop, lower
from jaxsim.engine.outcomes import FAULTS
from jaxsim.metrics.result import interval
from jaxsim.sensitivity import relaxed
from jaxsim.sensitivity.fields import field_of, with_value
from jaxsim.spec.dims import Dims
from jaxsim.spec.scenario import Scenario
from jaxsim.state.requests import OUTPUT, PROMPT

STEP = 2.0**-7
"""Of a field, relative: of the differences of cost tables."""

INSTEAD = "ask for the total (central differences) or the direct derivative (fixed schedule)"

LATENCIES = {"ttft": "ttft", "tpot": "tpot", "e2el": "e2e"}
"""As metrics call them, and as relaxed attainment does."""

STATISTICS = ("mean", "median", "p50", "p90", "p95", "p99")

RATES = ("request_throughput", "output_throughput", "total_token_throughput")

METRICS = (*(f"{statistic}_{name}_ms" for name in LATENCIES for statistic in STATISTICS), "duration", *RATES,
           "slo_attainment")
"""What has a pathwise derivative. The last is relaxed (`jaxsim.sensitivity.relaxed`)."""

_TIMES = (".cost", ".source", "[1].arrival")
"""Parts of what the loop reads, whose numbers are seconds or make them: costs and arrivals. Others decide what is next.
"""


class Paths(NamedTuple):
    """Times of every request of every seed, seconds, NaN where there is none; or their derivatives.

    duration_s: from the first arrival to the last end, of a seed. counts: what each of `RATES` counts, of a seed; None
    of derivatives, as a schedule's counts have none.
    """

    ttft: Float[np.ndarray, "seeds requests"]
    tpot: Float[np.ndarray, "seeds requests"]
    e2e: Float[np.ndarray, "seeds requests"]
    duration_s: Float[np.ndarray, " seeds"]
    counts: Mapping[str, Float[np.ndarray, " seeds"]] | None = None


def exactness(scenario: Scenario) -> str:
    """Why the pathwise derivative of a scenario is exact: "offline batch", "closed loop" or "one server, FCFS".

    Raises `InputError` where it is not, with the field that makes it so.
    """
    def refuse(field: str, value: Any, why: str) -> InputError:
        return InputError(field, value, f"{why}: the pathwise derivative would be wrong", INSTEAD)

    workload, cluster, engine = scenario.workload, scenario.cluster, scenario.engine
    for section, name in ((cluster, "pools"), (cluster, "migration"), (cluster, "scaling"), (cluster, "role_switching"),
                          (cluster, "failures"), (cluster, "admission"), (cluster, "remote_store"),
                          (cluster, "variants"), (workload, "client"), (workload, "images"), (workload, "sessions"),
                          (engine, "swap"), (engine, "offload"), (engine, "context_reuse"), (engine, "hybrid"),
                          (engine, "target_batch_time_ms"), (engine, "kv_parallel_tokens")):
        value = getattr(section, name)
        if value:
            where = {id(cluster): "cluster", id(workload): "workload"}.get(id(section), "engine")
            raise refuse(f"{where}.{name}", msgspec.to_builtins(value), "makes an order depend on times")
    if workload.has_sessions:
        raise refuse("workload.kind", workload.kind, "has turns that come at times of their own")
    if scenario.warmup_s or scenario.cooldown_s:
        raise refuse("warmup_s" if scenario.warmup_s else "cooldown_s", scenario.warmup_s or scenario.cooldown_s,
                     "leaves requests out by their times")
    system = lower.resolve_system(scenario)
    s = system.scheduler
    if system.num_stages > 1:
        raise refuse("engine.pipeline_parallel_size", system.num_stages, "has batches that overtake each other")
    if s.order == "least_slack":
        raise refuse("engine.scheduling_policy", s.order, "orders requests by the time that they have left")
    engines = cluster.replicas * system.num_independent
    if workload.kind == "batch":
        return "offline batch"
    if workload.kind == "closed-loop":
        if workload.think_s:
            raise refuse("workload.think_s", workload.think_s, "is a time that costs do not move")
        if engines > 1:
            raise refuse("cluster.replicas", engines, "are engines whose ends come in an order that depends on costs")
        outside_s = lower.front_end_s(scenario, system)
        if outside_s and workload.concurrency > 1:
            raise refuse("cost.front_end_s", outside_s, "brings the next request of a client in the middle of an"
                         f" iteration of the other {workload.concurrency - 1}, and which one depends on costs")
        return "closed loop"
    # One request at a time, whatever the others do.
    if s.max_num_seqs > 1:
        raise refuse("engine.max_num_seqs", s.max_num_seqs, f"and arrivals over time (workload.kind ="
                     f" {workload.kind!r}) mean that batches depend on who is there in time")
    for field, value, is_wrong, why in (
            ("engine.scheduling_policy", s.order, s.order != "fcfs", "serves in an order that depends on who waits"),
            ("engine.async_scheduling", True, s.async_scheduling, "sees an arrival one iteration later"),
            ("engine.preset", s.preset, s.gathers or s.pass_on_arrival, "gathers arrivals before it begins"),
            ("engine.enable_prefix_caching", True, bool(engine.enable_prefix_caching),
             "makes a service depend on who came before"),
            ("engine.data_parallel_size", system.num_ranks, system.num_ranks > 1, "has ranks wait for each other"),
            # Left out it is round robin, but of data-parallel ranks, which it is not.
            ("cluster.router", cluster.router, engines > 1 and cluster.router != "round_robin"
             and (cluster.router is not None or system.plan.data_parallel_size > 1),
             "sends requests by what instances have to do")):
        if is_wrong:
            raise refuse(field, value, why)
    return "one server, FCFS"


def pathwise(scenario: Scenario, fields: Sequence[str], metrics: Iterable[str] = ("mean_ttft_ms", "mean_e2el_ms"), *,
             temperature: float = relaxed.TEMPERATURE) -> pd.DataFrame:
    """Elasticities of metrics by fields along the paths of all seeds of a scenario: percent for a percent.

    fields: dotted names with a number in the scenario; metrics: of `METRICS`. A row each: metric, field, value (mean
    over seeds, in the metric's unit), elasticity, low and high (95 % interval over seeds, None from one), why: the
    reason why it is exact. temperature: of "slo_attainment", whose value and elasticity are relaxed ones.

    Raises `InputError` where the derivative is not exact, for a field without one, an unknown metric, one that a run
    has no value of (TPOT of outputs of one token), or a run that a bound stopped.
    """
    metrics, scenario = tuple(metrics), scenario.checked()
    for name in metrics:
        if name not in METRICS:
            raise InputError("metrics", name, "has no pathwise derivative", suggest(name, METRICS))
    if "slo_attainment" in metrics:
        relaxed.check_limits(scenario.slo, scenario.workload.tenants)
    why = exactness(scenario)
    values, tangents = paths(scenario, fields)
    limits = _limits(scenario, values.ttft.shape[1]) if "slo_attainment" in metrics else {}
    rows = []
    for field in fields:
        for name in metrics:
            value, slope = of_metric(name, values, tangents[field], limits, temperature)
            mean = value.mean()
            each = slope / mean if mean else np.full_like(slope, np.nan)
            low, high = interval(each) or (None, None)
            rows.append({"metric": name, "field": field, "value": mean, "elasticity": each.mean(), "low": low,
                         "high": high, "why": why})
    return pd.DataFrame(rows)


def paths(scenario: Scenario, fields: Sequence[str]) -> tuple[Paths, dict[str, Paths]]:
    """Times of a scenario's runs, and by field their derivatives by its logarithm, exact or not: nothing is refused
    here but fields without one (`InputError`). The front end's seconds are in."""
    seeds = scenario.seeds
    made = [functional.inputs(scenario, seed) for seed in seeds]
    dims = _one({lane[0] for lane in made})
    numbers = _stacked([lane[1:] for lane in made])
    leaves, structure = jax.tree.flatten(numbers)
    counts = _counts(numbers[1])
    real_requests = int(np.max(numbers[1].count))
    is_number = [np.issubdtype(x.dtype, np.floating) for x in leaves]
    front_s = _front_end_s(scenario)
    program = _program(dims, structure, tuple(is_number))
    kept = [x for x, is_in in zip(leaves, is_number, strict=True) if not is_in]
    real = [x for x, is_in in zip(leaves, is_number, strict=True) if is_in]
    tangents, values = {}, None
    for field in fields or [None]:
        moved, front_slope = ([np.zeros_like(x) for x in real], 0.0) if field is None else _moved(
            scenario, field, seeds, dims, structure, leaves, is_number)
        found, slopes, faults = jax.device_get(program(kept, real, moved))
        for seed, fault in zip(seeds, faults, strict=True):
            if fault:
                told = "; ".join(text for bit, text in FAULTS.items() if fault & bit)
                raise InputError("scenario", scenario.name, f"did not get to its end under seed {seed}: {told}",
                                 "change it as that says")
        values = _paths(found, front_s, real_requests, counts)
        if field is not None:
            tangents[field] = _paths(slopes, front_slope, real_requests)
    return values, tangents


def _paths(found: Any, front_s: float, requests: int, counts: Mapping[str, np.ndarray] | None = None) -> Paths:
    """Without padding, and with what is spent outside the engine."""
    *times, duration_s = (np.asarray(x, np.float64) for x in found)
    ttft, tpot, e2e = (x[:, :requests] for x in times)
    return Paths(ttft + front_s, tpot, e2e + front_s, duration_s + front_s, counts)


def _counts(requests: Any) -> dict[str, np.ndarray]:
    """Of every seed: requests, all of which end, and their tokens."""
    is_real = np.arange(requests.table.shape[1]) < np.asarray(requests.count)[:, None]
    prompt, output = (np.where(is_real, requests.table[..., column], 0).sum(axis=1, dtype=np.float64)
                      for column in (PROMPT, OUTPUT))
    return dict(zip(RATES, (is_real.sum(axis=1).astype(float), output, prompt + output), strict=True))


def _limits(scenario: Scenario, requests: int) -> relaxed.Limits:
    """Of every request of every seed, where tenants have their own."""
    made = [relaxed.limits_s(scenario.slo, scenario.workload.tenants, lower.make_workload(scenario, seed))
            for seed in scenario.seeds]
    return {name: np.stack([np.broadcast_to(one[name], requests) for one in made]) for name in made[0]}


@functools.lru_cache(maxsize=16)
def _program(dims: Dims, structure: Any, is_number: tuple[bool, ...]) -> Any:
    def of_request(params, requests, world):
        found = functional.latencies(dims, params, requests, world)
        due = params.source.arrivals(params.source.prepare(requests), world.due)[:dims.num_requests]
        # Epochs are whole, and as long as no batch lasts.
        arrival_s = due[:, 1] + due[:, 2]
        end_s = jnp.where(found.is_finished, arrival_s + found.e2e_s, -jnp.inf)
        is_real = jnp.arange(dims.num_requests) < requests.count
        first_s = jnp.min(jnp.where(is_real, arrival_s, jnp.inf))
        return found.ttft_s, found.tpot_s, found.e2e_s, jnp.max(end_s) - first_s

    def times(kept, real):
        kept, real = iter(kept), iter(real)
        params, requests = structure.unflatten([next(real) if is_in else next(kept) for is_in in is_number])
        # Lanes of one loop; JAX's rule for `vmap` of `jvp` would take lanes of integers for another axis.
        world = loop.run(dims, params, requests)
        return jax.vmap(of_request)(params, requests, world), world.fault

    def along(kept, real, moved):
        with functional.in_32_bits():
            return jax.jvp(lambda *real: times(kept, real), tuple(real), tuple(moved), has_aux=True)

    return jax.jit(along)


def _moved(scenario: Scenario, field: str, seeds: Sequence[int], dims: Dims, structure: Any, leaves: list,
           is_number: list[bool]) -> tuple[list, float]:
    """Derivatives of what the loop reads by the logarithm of a field, and of the front end's seconds."""
    value = number_of(scenario, field)
    try:
        sides = [with_value(scenario, field, value * (1 + sign * STEP)) for sign in (1, -1)]
    except InputError as error:
        raise (_is_structure(field, value) if error.field == field else error) from None
    found = []
    for side in sides:
        made = [functional.inputs(side, seed) for seed in seeds]
        other, there = jax.tree.flatten(_stacked([lane[1:] for lane in made]))
        if {lane[0] for lane in made} != {dims} or there != structure:
            raise _is_structure(field, value)
        found.append(other)
    moved, is_any = [], False
    places, _ = jax.tree.flatten_with_path(structure.unflatten(leaves))
    for (place, _), leaf, above, below, is_in in zip(places, leaves, *found, is_number, strict=True):
        if is_in and not any(part in jax.tree_util.keystr(place) for part in _TIMES):
            if not np.array_equal(above, below):
                raise InputError(field, value, "changes numbers that only decide what is done next, and no time: where"
                                 " that jumps there is no pathwise derivative", INSTEAD)
            moved.append(np.zeros_like(leaf))
        elif is_in:
            # Padding is infinite on both sides.
            change = np.subtract(above, below, where=np.isfinite(leaf), out=np.zeros_like(leaf)) / (2 * STEP)
            moved.append(change.astype(leaf.dtype))
            is_any |= bool(np.any(change))
        elif not (np.array_equal(leaf, above) and np.array_equal(leaf, below)):
            raise _is_structure(field, value)
    ends = [_front_end_s(side) for side in sides]
    front_slope = (ends[0] - ends[1]) / (2 * STEP)
    if not (is_any or front_slope):
        raise InputError(field, value, "has no effect on any time of this scenario",
                         "ask for a field of costs or arrivals, or for the total derivative")
    return moved, front_slope


def _is_structure(field: str, value: Any) -> InputError:
    return InputError(field, value,
                      "changes whole numbers that a schedule is made of, which have no pathwise derivative", INSTEAD)


def number_of(scenario: Scenario, field: str) -> float:
    """The positive number of a scenario by name, its own or what stands in its place. Raises `InputError`."""
    try:
        return float(field_of(scenario, field).value)
    except InputError as error:
        # Of a table of coefficients it is the field, not an argument, that is wrong.
        raise InputError(field, error.value, error.problem, error.remedy) from None


def _front_end_s(scenario: Scenario) -> float:
    return float(lower.front_end_s(scenario, lower.resolve_system(scenario)))


def _one(found: set) -> Any:
    if len(found) > 1:
        raise InputError("num_seeds", len(found), "kinds of programs are needed, as seeds are of different sizes",
                         "use num_seeds = 1, or lengths with limits (max_tokens)")
    return next(iter(found))


def _stacked(trees: list) -> Any:
    return jax.tree.map(lambda *leaves: np.stack([np.asarray(x) for x in leaves]), *trees)


def of_metric(name: str, values: Paths, tangents: Paths, limits: relaxed.Limits,
              temperature: float = relaxed.TEMPERATURE) -> tuple[np.ndarray, np.ndarray]:
    """A metric of every seed, in its unit, and its derivative: tangents of any kind that are shaped as the times.
    Raises `InputError` where a run has no value of it."""
    if name == "duration":
        return values.duration_s, tangents.duration_s
    if name in RATES:
        rate = values.counts[name] / values.duration_s
        return rate, -rate * tangents.duration_s / values.duration_s
    if name == "slo_attainment":
        given, moved = ({short: getattr(one, short) for short in relaxed.NAMES} for one in (values, tangents))
        return tuple(np.asarray(x, np.float64) for x in relaxed.slope(given, moved, limits, temperature))
    statistic, latency, _ = name.split("_")
    seconds, slopes = (1e3 * getattr(one, LATENCIES[latency]) for one in (values, tangents))
    if not np.isfinite(seconds).any(axis=1).all():
        raise InputError("metrics", name, "has no value: no request of a run has this time (an output of one token has"
                         " no time per output token)", "ask for another metric, or for longer outputs")
    both = [_statistic(statistic, x[np.isfinite(x)], t[np.isfinite(x)]) for x, t in zip(seconds, slopes, strict=True)]
    return tuple(np.array(both).T)


def _statistic(name: str, values: np.ndarray, slopes: np.ndarray) -> tuple[float, float]:
    """Mean or percentile (linear), and its derivative: that of the requests it is made of."""
    if name == "mean":
        return values.mean(), slopes.mean()
    share = 0.5 if name == "median" else int(name[1:]) / 100
    order = np.argsort(values, kind="stable")
    at = share * (len(values) - 1)
    low = int(at)
    high, part = min(low + 1, len(values) - 1), at - low
    return tuple(x[order[low]] * (1 - part) + x[order[high]] * part for x in (values, slopes))
