"""Lanes for tests of what is made from them: real schedules, from the reference simulator."""

import dataclasses

import numpy as np

from jaxsim.kernels import histogram
from jaxsim.metrics import ABORTS, FINISHED, LaneResult
from jaxsim.metrics.lane import FAILED, REJECTED, TIMED_OUT
from jaxsim.spec.scenario import Scenario
from tests.reference import simulator


def token_gaps(result: simulator.ReferenceResult, prompts) -> list[float]:
    """Every gap between tokens of a request, seconds, from the iterations themselves."""
    times: dict[int, list[float]] = {r.id: [] for r in result.requests}
    computed = dict.fromkeys(times, 0)
    for record in result.iterations:
        for request in record.preempted:
            computed[request] = 0
        for request, tokens in record.batch.items():
            computed[request] += tokens
            if computed[request] == prompts[request] + len(times[request]):
                times[request].append(record.end_s)
    return [gap for ends in times.values() for gap in np.diff(ends)]


def lane(result: simulator.ReferenceResult, requests: list[simulator.Request], flags: simulator.Flags,
         num_instances: int) -> LaneResult:
    """The reference's answer as the engine would hand it over."""
    column = lambda name, kind=float: np.array([getattr(r, name) for r in result.requests], kind)  # noqa: E731
    stall, prefill_stall = np.zeros(len(requests)), np.zeros(len(requests))
    waiting_since: dict[int, float] = {}
    steps: dict[str, list] = {k: [] for k in ("time_s", "duration_s", "instance", "running", "waiting",
                                              "used_blocks", "iterations", "prefill_tokens", "decode_seqs")}
    busy, held, running_s = np.zeros(num_instances), np.zeros(num_instances), np.zeros(num_instances)
    peak = np.zeros(num_instances, int)
    by_instance = {i: [r for r in result.requests if r.instance == i] for i in range(num_instances)}
    for record in result.iterations:
        for request in record.preempted:
            waiting_since[request] = record.start_s
        for request in record.batch:
            if request in waiting_since:
                length = record.start_s - waiting_since.pop(request)
                stall[request] += length
                if result.requests[request].first_token_s > record.start_s:
                    prefill_stall[request] += length
        here, now = by_instance[record.instance], record.start_s
        inside = sum(r.scheduled_s <= now < r.finish_s for r in here)
        queued = sum(r.arrival_s <= now < r.scheduled_s for r in here)
        preempted = sum(requests_id in waiting_since for requests_id in (r.id for r in here))
        used = flags.num_blocks - record.free_blocks
        i = record.instance
        busy[i] += record.duration_s
        held[i] += used * record.duration_s
        running_s[i] += (inside - preempted) * record.duration_s
        peak[i] = max(peak[i], used)
        row = (now, record.duration_s, i, inside - preempted, queued + preempted, used, 1,
               record.stats.prefill_tokens, record.stats.num_decode)
        for name, value in zip(steps, row, strict=True):
            steps[name].append(value)
    edges = histogram.edges()
    gaps = np.clip(token_gaps(result, [r.prompt for r in requests]), edges[0], np.nextafter(edges[-1], 0))
    return LaneResult(
        arrival_s=column("arrival_s"),
        input_tokens=np.array([r.prompt for r in requests]),
        output_tokens=np.array([r.output for r in requests]),
        max_tokens=np.array([r.max_tokens for r in requests]),
        scheduled_s=column("scheduled_s"), first_token_s=column("first_token_s"), finish_s=column("finish_s"),
        stall_s=stall, prefill_stall_s=prefill_stall,
        preemptions=column("preemptions", int), instance=column("instance", int),
        priority=np.array([r.priority for r in requests]), tenant=np.zeros(len(requests), int),
        status=np.full(len(requests), FINISHED, np.int8),
        itl_counts=np.histogram(gaps, edges)[0],
        busy_s=busy, kv_block_s=held, kv_peak_blocks=peak, running_s=running_s, num_blocks=flags.num_blocks,
        num_iterations=len(result.iterations), steps={k: np.array(v) for k, v in steps.items()},
    )


def cost(stats: simulator.BatchStatsRef) -> float:
    """Seconds of an iteration: about an 8B model on a large device."""
    return 0.006 + 2.2e-5 * stats.prefill_tokens + 6e-9 * stats.decode_context + 2e-5 * stats.num_decode


def simulated(seed: int = 0, rate_rps: float = 12.0, num_requests: int = 300, num_instances: int = 2,
              **numbers) -> tuple[LaneResult, simulator.ReferenceResult]:
    """A Poisson workload with log-normal lengths through vLLM V1's rules."""
    rng = np.random.default_rng(seed)
    numbers = {"max_num_seqs": 64, "max_num_batched_tokens": 2048, "num_blocks": 1500, **numbers}
    flags = simulator.preset("vllm-v1", **numbers)
    arrivals = np.cumsum(rng.exponential(1 / rate_rps, num_requests))
    prompts = np.clip(rng.lognormal(6.2, 0.9, num_requests), 8, 1900).astype(int)
    outputs = np.clip(rng.lognormal(5.0, 0.7, num_requests), 1, 900).astype(int)
    requests = [simulator.Request(i, float(a), int(p), int(o))
                for i, (a, p, o) in enumerate(zip(arrivals, prompts, outputs, strict=True))]
    result = simulator.simulate(requests, flags, num_instances, "least_outstanding", cost)
    return lane(result, requests, flags, num_instances), result


def scenario(**values) -> Scenario:
    """A small checked scenario; dotted fields as `with_values` takes them."""
    base = Scenario.from_dict({
        "schema_version": 1, "name": "small", "model": {"name": "llama-3.1-8b"}, "device": {"name": "h100"},
        "cluster": {"replicas": 2, "router": "least_outstanding"},
        "workload": {"kind": "poisson", "rate_rps": 12.0, "num_requests": 300},
        "slo": {"ttft_ms": 200.0, "tpot_ms": 15.0}, "num_seeds": 2})
    return base.with_values({k.replace("__", "."): v for k, v in values.items()})


def blank_lane(arrival_s, finish_s, **fields) -> LaneResult:
    """A lane of which only arrivals and ends matter; NaN in `finish_s` is unfinished."""
    arrival_s, finish_s = np.asarray(arrival_s, float), np.asarray(finish_s, float)
    count = len(arrival_s)
    zeros = np.zeros(count, np.int64)
    defaults = dict(
        arrival_s=arrival_s, input_tokens=zeros + 10, output_tokens=zeros + 5, max_tokens=zeros + 5,
        scheduled_s=arrival_s, first_token_s=finish_s, finish_s=finish_s, stall_s=np.zeros(count),
        preemptions=zeros, instance=zeros, priority=zeros, tenant=zeros,
        status=np.isnan(finish_s).astype(np.int8), itl_counts=np.zeros(2048, np.int64), busy_s=np.ones(1),
        kv_block_s=np.ones(1), kv_peak_blocks=np.ones(1, int), running_s=np.ones(1), num_blocks=10,
        num_iterations=1)
    return LaneResult(**{**defaults, **fields})


def with_everything(lane: LaneResult, seed: int = 0) -> LaneResult:
    """A lane with a value, drawn and of no deeper meaning, wherever a run may have none: of no run, but the columns and
    groups of all of them. Some requests end without an answer."""
    rng = np.random.default_rng(seed)
    count, instances = lane.num_requests, len(lane.busy_s)
    few, times = (lambda: rng.integers(0, 3, count)), (lambda: rng.exponential(0.1, count))
    status = np.where(rng.random(count) < 0.2, rng.choice([TIMED_OUT, REJECTED, FAILED], count), FINISHED)
    is_done = status == FINISHED
    first_token_s, finish_s = (np.where(is_done, x, np.nan) for x in (lane.first_token_s, lane.finish_s))
    has_moved, num_images = is_done & (rng.random(count) < 0.5), few()
    migrations, cached = few(), rng.integers(0, np.asarray(lane.input_tokens) // 2 + 1)
    # Requests are scheduled after their images came.
    embedded_s = np.where(num_images > 0, lane.arrival_s + 0.6 * (lane.scheduled_s - lane.arrival_s), np.nan)
    return dataclasses.replace(
        lane, first_token_s=first_token_s, finish_s=finish_s, status=status.astype(np.int8), attempts=1 + few(),
        ended_s=np.where(is_done, lane.finish_s, lane.arrival_s + times()), device_busy_s=0.9 * np.asarray(lane.busy_s),
        num_prefix_blocks=3, cached_tokens=cached, loaded_tokens=cached // 2, fetched_tokens=cached // 4,
        loaded_from=few() - 1, variant=few(),
        load_s=rng.random(instances),
        load_delay_s=rng.random(instances), decode_instance=np.where(has_moved, 1, -1),
        accepted_s=np.where(has_moved, first_token_s + 0.001, np.nan),
        left_s=np.where(has_moved, first_token_s, np.nan),
        delivered_s=np.where(has_moved, first_token_s + 0.002 + 0.001 * rng.random(count), np.nan),
        migrations=migrations, downtime_s=np.where(migrations > 0, times(), 0.0), last_instance=np.zeros(count, int),
        aborted_migrations=rng.integers(0, 9, len(ABORTS)), instance_s=0.7 * instances * np.nanmax(finish_s), starts=2,
        drains=1, role_switches=2, drain_s=1.5, role_changes=np.ones((2, 7)), extrapolated_share=0.25, lost_steps=1,
        session=np.arange(count) // 3, turn=np.arange(count) % 3, num_context_limited=4, num_images=num_images,
        encoded_s=np.where(num_images > 0, lane.arrival_s + 0.5 * (embedded_s - lane.arrival_s), np.nan),
        embedded_s=embedded_s, swaps=few(), swap_s=times(), swap_delay_s=rng.random(instances),
        swapped_blocks=rng.integers(1, 99, 2), predicted_tokens=1 + few(), losses=2 * few(), restarts=few(),
        num_outages=5, down_s=rng.random(instances))
