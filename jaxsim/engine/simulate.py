"""Simulate scenarios: group those of one structure, run each group as one program, hand back host arrays."""

import dataclasses
import functools
import os
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxsim._core.errors import InputError
from jaxsim.engine import loop, lower, measured
from jaxsim.engine.outcomes import Lane, lane_result
from jaxsim.metrics import LaneResult, Result
from jaxsim.policy.routing import router
from jaxsim.spec.dims import Dims
from jaxsim.spec.engine import SORTED_POLICIES
from jaxsim.spec.scenario import ProfiledCost, RooflineCost, Scenario
from jaxsim.spec.values import plain
from jaxsim.state import world as w
from jaxsim.state.requests import Requests
from jaxsim.workload.workload import Workload

RECORDS_A_REQUEST = 8
"""Rows of the tape a request and rank, on top of a thousand and of one for each chunk of a prompt."""

MOST_BATCH_RECORDS = 1 << 21
"""Rows of the tape for the batches of a pipeline: some 100 MB."""

SMALLEST_SLOTS = 8

MOST_JUMP_BITS = 22
"""Of the iterations of a jump and of the slots together; up to 1,024 sequences a jump is as long as any."""

LINE_WINDOW = 256
"""Requests that wait beside several partly computed prompts, unless `engine.prefill_window` says how many."""

SLACK_WINDOW = 64
"""Preempted requests that wait, unless `engine.slack_window` says how many."""

REQUEST_BYTES = 60
"""Of a request as the loop reads it: arrivals, lengths, uniforms."""


def simulate(scenarios: Scenario | Sequence[Scenario], *, record_steps: bool = False,
             workload: Workload | None = None) -> Result:
    """Simulate every scenario under every one of its seeds.

    record_steps: keep a tape of iterations, for timelines and curves over time.
    workload: requests of all runs, instead of those that the scenarios describe.

    Returns host arrays a run and pandas frames made from them. Raises `InputError` for whatever is wrong with a
    scenario, before anything is compiled. A run that a bound stopped says so in its `fault`.
    """
    scenarios = _listed(scenarios)
    lanes = []
    for index, scenario in enumerate(scenarios):
        try:
            lanes += prepare(index, scenario.checked(), record_steps, workload)
        except InputError as error:
            if len(scenarios) == 1:
                raise
            where = " ".join(filter(None, (f"scenarios[{index}]", scenario.name)))
            raise InputError(f"{where}: {error.field}", error.value, error.problem, error.remedy) from None
    _check_memory([(lane.dims, 1) for lane in lanes])
    results: list[list[LaneResult]] = [[] for _ in scenarios]
    groups: dict = {}
    for lane in lanes:
        groups.setdefault(program_of(lane), []).append(lane)
    done = {}
    for (dims, *_), group in groups.items():
        world = jax.device_get(run_together(group)[1])
        done |= {id(lane): lane_result(dims, world, index, lane) for index, lane in enumerate(group)}
    for lane in lanes:
        results[lane.scenario].append(_with_share(scenarios[lane.scenario], lane, done[id(lane)]))
    return Result(scenarios, results)


def _with_share(scenario: Scenario, lane: Lane, result: LaneResult) -> LaneResult:
    """With the extrapolated share of a profiled cost."""
    # Iterations that overlap do not say which sequences were in them, nor does a request that goes on elsewhere.
    system = lane.system
    if (not isinstance(scenario.cost, ProfiledCost) or result.steps is None or result.lost_steps
            or lane.dims.num_stages > 1 or system.has_roles or len(lower.kinds_of_pools(system)) > 1):
        return result
    both = measured.tables(scenario, system.scheduler, system.model, system.device, system.plan, lane.dims.num_slots,
                           lane.longest)
    return dataclasses.replace(result, extrapolated_share=measured.extrapolated_share(both, result))


def _listed(scenarios) -> list[Scenario]:
    listed = [scenarios] if isinstance(scenarios, Scenario) else scenarios
    if isinstance(listed, (str, bytes, dict)) or not isinstance(listed, Iterable):
        raise InputError("scenarios", scenarios, "is not a Scenario or a list of them",
                         "make one with Scenario.from_toml(path) or Scenario.from_dict(fields)")
    listed = list(listed)
    for index, scenario in enumerate(listed):
        if not isinstance(scenario, Scenario):
            raise InputError(f"scenarios[{index}]", scenario, "is not a Scenario",
                             "make one with Scenario.from_toml(path) or Scenario.from_dict(fields)")
    return listed


def _check_memory(runs: Sequence[tuple[Dims, int]]) -> None:
    """Refuse a batch that this machine cannot hold, before anything is allocated for it.

    runs: sizes, and how many of them.
    """
    # As drawn and as the loop reads it; the carry, and the results on the host.
    needed, room = 2 * sum(run_bytes(dims) * count for dims, count in runs), memory_bytes()
    if room and needed > room:
        most = max((dims for dims, _ in runs), key=run_bytes)
        raise InputError(
            "workload.num_requests", most.num_requests,
            f"{sum(count for _, count in runs):,} runs of up to {most.num_requests:,} requests, {most.num_executors}"
            f" replicas and {most.num_slots} sequences need about {needed / 2**30:,.0f} GiB, this machine has"
            f" {room / 2**30:,.0f} GiB",
            "lower it, num_seeds, cluster.replicas or engine.max_num_seqs, or simulate in parts")


@functools.lru_cache(maxsize=1024)
def run_bytes(dims: Dims) -> int:
    """Memory of one run in a batch: what it carries, and its requests."""
    state = jax.eval_shape(lambda: w.initial_world(dims, entry_fields=5))
    arrays = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    return arrays + REQUEST_BYTES * dims.num_requests


def memory_bytes() -> int:
    """Memory of the default device, of the host where it does not tell; 0 if unknown."""
    stats = jax.local_devices()[0].memory_stats() or {}
    try:
        return stats.get("bytes_limit") or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return 0


def program_of(lane: Lane) -> tuple:
    """What runs of one program have in common; the sizes first."""
    leaves, structure = jax.tree.flatten(lane.params)
    return lane.dims, structure, tuple(map(np.shape, leaves))


def run_together(lanes: Sequence[Lane]) -> tuple[Requests, w.World]:
    """Run lanes of one program as a batch: their requests as the loop got them, and the world it left, on device."""
    dims = lanes[0].dims
    params = _stack([lane.params for lane in lanes])
    requests = _stack([lower.make_requests(lane.workload, dims, lane.prefixes, patience=lane.patience,
                                           is_split=lane.is_split, order=lane.params.flags.order,
                                           slack=lane.params.slack) for lane in lanes])
    return requests, loop.run_on_one_device(dims, params, requests)


def _stack(trees):
    return jax.tree.map(lambda *leaves: jnp.asarray(np.stack(leaves)), *trees)


def _check_sessions(scenario: Scenario, system: lower.System) -> None:
    """Refuse a workload whose later turns come when answers are out, where a scenario with sessions would be. Raises
    `InputError`."""
    cluster, order, workload = scenario.cluster, system.scheduler.order, scenario.workload
    waits = ("deadline_s", "first_token_deadline_s")
    impatient = [t.name for t in workload.tenants if any(getattr(t, name) is not None for name in waits)]
    is_impatient = any(getattr(workload.client, name, None) is not None for name in waits)
    for field, value in (
            ("workload.client", workload.client if is_impatient else None), ("workload.tenants", impatient or None),
            ("cluster.admission", cluster.admission), ("cluster.failures", cluster.failures),
            ("cluster.migration", cluster.migration), ("cluster.scaling", cluster.scaling),
            ("cluster.role_switching", cluster.role_switching), ("workload.images", workload.images),
            ("engine.context_reuse", None if cluster.variants is not None else scenario.engine.context_reuse),
            ("engine.max_num_partial_prefills", scenario.engine.max_num_partial_prefills
             if system.scheduler.max_num_partial_prefills > 1 else None),
            ("engine.scheduling_policy", order if order in ("vtc", *SORTED_POLICIES) else None)):
        if value is not None:
            raise InputError(field, plain(value), "is not simulated with a workload of sessions", "leave it out")


def prepare(index: int, scenario: Scenario, record_steps: bool, given: Workload | None = None) -> list[Lane]:
    """The runs of a checked scenario, one a seed. Raises `InputError` for what cannot be simulated."""
    system = lower.resolve_system(scenario)
    if given is None and scenario.num_requests is not None:
        _check_memory([(dims_of(scenario, system, scenario.num_requests), scenario.num_seeds)])
    if given is not None and (given.num_images is None) != (scenario.workload.images is None):
        raise InputError("workload", None, "and the scenario do not agree on images",
                         "leave [workload.images] out of the scenario, or give a workload with them")
    if given is not None and given.think_s is not None and not scenario.workload.has_sessions:
        _check_sessions(scenario, system)
    workloads = [lower.make_workload(scenario, seed) if given is None else lower.ordered(scenario, given, seed)
                 for seed in scenario.seeds]
    for workload in workloads:
        lower.check_requests(system, workload)
        lower.check_transfers(scenario, system, workload)
        lower.check_outages(scenario, system, workload)
    most = max(lower.num_rows(scenario, system, workload) for workload in workloads)
    longest = max(int((workload.input_tokens + workload.output_tokens).max()) for workload in workloads)
    dims = dims_of(scenario, system, most)
    if given is not None:
        dims = dataclasses.replace(dims, keeps_turns=keeps_turns(system) and given.think_s is not None)
    if record_steps:
        budget = min(one.scheduler.max_num_batched_tokens for one in (system, *(pool.system for pool in system.pools)))
        chunks = max(int((w.input_tokens // budget).sum()) for w in workloads)
        rows = RECORDS_A_REQUEST * most
        if dims.num_stages > 1:
            # Batches that overlap are recorded one by one, and there are at most as many as tokens.
            rows = max(rows, min(max(int(w.output_tokens.sum()) for w in workloads), MOST_BATCH_RECORDS))
        dims = dataclasses.replace(dims, num_records=dims.num_ranks * (rows + 1000 + chunks))
    prefixes = [None] * len(workloads)
    if scenario.engine.enable_prefix_caching:
        prefixes = [lower.shared_prefixes(workload, system.scheduler.block_size) for workload in workloads]
        dims = with_prefixes(dims, prefixes)
    dims = with_offload(dims, scenario, system, workloads, prefixes)
    dims = with_tenants(dims, system, workloads)
    lower.check_counters(dims, workloads)
    for workload in workloads:
        lower.check_sums(dims, system, workload)
    cost = jax.device_get(lower.make_cost(scenario, system, dims.num_slots, longest))
    lower.check_target(scenario, cost)
    if record_steps:
        dims = dataclasses.replace(dims, num_records=dims.num_records + lower.chunk_records(
            scenario, system, cost, workloads))
    # Of all seeds but for their bound.
    params = lower.make_params(scenario, system, cost, 0, workloads[0], longest)
    return [Lane(index, system, workload, dims,
                  lower.with_failures(lower.with_counters(
                      dataclasses.replace(params, max_steps=np.int32(most_steps(scenario, dims, workload))),
                      scenario, system, workload, dims), scenario, dims, seed),
                  longest,
                  prefix, lower.front_end_s(scenario, system), lower.make_patience(scenario, system, workload),
                  lower.is_split(scenario))
            for seed, workload, prefix in zip(scenario.seeds, workloads, prefixes, strict=True)]


def turns(dims: Dims) -> int:
    """How many take turns in what a token costs in steps: ranks, or executors that a controller looks at."""
    return dims.num_executors if dims.has_migration else dims.num_ranks


def with_prefixes(dims: Dims, prefixes: list[lower.Prefixes]) -> Dims:
    """Sizes with room for the segments that prompts share."""
    # Powers of two, so that runs share programs; the log has room for as many releases again after preemptions.
    def padded(size: int) -> int:
        return 1 << max(size - 1, 1).bit_length()

    return dataclasses.replace(
        dims, num_segments=padded(max(p.num_segments for p in prefixes) + 1),
        path_width=padded(max(p.paths.shape[1] for p in prefixes)),
        log_size=padded(2 * max(p.num_releases for p in prefixes) + 4096))


def with_offload(dims: Dims, scenario: Scenario, system: lower.System, workloads: list[Workload],
                 prefixes: list[lower.Prefixes | None]) -> Dims:
    """Sizes with what is behind the prefix cache: siblings, or a store that instances share, and host memory, both with
    a log of their touches unless they hold all that there could be."""
    given = scenario.cluster.remote_store
    if given is not None:
        dims = dataclasses.replace(
            dims, has_remote=True, has_egress=given.egress_gb_per_s is not None,
            remote_log=log_of_touches(lower.remote_blocks(scenario, system), system, workloads, prefixes))
    if scenario.engine.context_reuse is not None:
        if scenario.cluster.variants is not None:
            lower.check_contexts(system, prefixes)
        return dataclasses.replace(dims, has_reuse=True, has_siblings=scenario.cluster.variants is not None)
    if scenario.engine.offload is None:
        return dims
    log = log_of_touches(lower.offload_blocks(scenario, system), system, workloads, prefixes)
    return dataclasses.replace(dims, has_offload=True, offload_log=log)


def log_of_touches(capacity: int, system: lower.System, workloads: list[Workload],
                   prefixes: list[lower.Prefixes | None]) -> int:
    """Entries of the log of touches of a tier of so many blocks; 0 if it holds all that any workload could store."""
    s = system.scheduler
    for workload, prefix in zip(workloads, prefixes, strict=True):
        if offloaded_at_most(workload, prefix, s.block_size, s.max_num_batched_tokens)[0] > capacity:
            # Every run has the log then, also one that would have room for all.
            return max(touch_log(system, *one) for one in zip(workloads, prefixes, strict=True))
    return 0


def touch_log(system: lower.System, workload: Workload, prefixes: lower.Prefixes) -> int:
    """Rows of the log of touches of a tier, with room for as many again after preemptions."""
    s = system.scheduler
    touches = offloaded_at_most(workload, prefixes, s.block_size, s.max_num_batched_tokens)[1]
    return 1 << (2 * touches + 4096 - 1).bit_length()


def offloaded_at_most(workload: Workload, prefixes: lower.Prefixes, block_size: int, budget: int) -> tuple[int, int]:
    """Blocks that a workload could store in host memory, and entries of segments that it touches if nobody is
    preempted, in chunks of `budget` tokens."""
    is_in = prefixes.paths >= 0
    lengths = np.zeros(prefixes.num_segments, np.int64)
    lengths[prefixes.paths[is_in]] = np.diff(prefixes.bounds, axis=1)[is_in]
    tokens = workload.input_tokens.astype(np.int64) + workload.output_tokens
    own = np.maximum(tokens // block_size - prefixes.bounds[:, -1], 0)
    return int(lengths.sum() + own.sum()), int(((is_in.sum(axis=1) + 1) * (2 + tokens // budget)).sum())


def with_tenants(dims: Dims, system: lower.System, workloads: list[Workload]) -> Dims:
    """Sizes with room for the tenants of virtual token counters, where these are the order."""
    if system.scheduler.order != "vtc":
        return dims
    return dataclasses.replace(dims, num_tenants=max(len(workload.tenant_names) for workload in workloads))


def keeps_turns(system: lower.System) -> bool:
    """Whether host memory keeps what the next turn of a session, if there are any, begins with."""
    return system.swap is not None and system.swap.reuse


def dims_of(scenario: Scenario, system: lower.System, num_requests: int) -> Dims:
    """Sizes of the arrays of a scenario with so many requests."""
    # Never more slots than could be filled; powers of two, so that scenarios share programs.
    most = max(one.scheduler.max_num_seqs for one in (system, *(pool.system for pool in system.pools)))
    slots = max(min(most, num_requests), SMALLEST_SLOTS)
    # Padded by up to an eighth, for the same reason.
    step = 1 << max(num_requests.bit_length() - 4, 0)
    num_requests = -(-num_requests // step) * step
    routing = scenario.cluster.router and router(scenario.cluster.router, scenario.cluster.router_weights)
    num_executors = system.num_executors or scenario.cluster.replicas * system.num_independent
    rows = lower.outage_rows(scenario, num_executors)
    dims = Dims(num_requests=num_requests, has_clients=scenario.has_clients, num_outages=rows,
                # With every outage a first token may be lost.
                num_more_logs=(sendings(scenario) - 1) * num_requests + rows, num_executors=num_executors,
                num_ranks=system.num_ranks, has_roles=system.has_roles, has_parts=system.has_parts,
                has_role_switching=scenario.cluster.role_switching is not None,
                has_variants=scenario.cluster.variants is not None,
                num_flights=lower.flights_of(scenario), num_links=lower.num_shared_links(scenario),
                is_max_min=lower.is_max_min(scenario), **lower.moves_of(scenario),
                # What cannot have one is refused with its requests (`lower.check_requests`).
                has_encoder=(scenario.workload.images is not None and not system.has_parts and system.num_ranks == 1
                             and system.scheduler.num_stages == 1),
                num_stages=system.num_stages, num_batches=1 if system.has_free_stages else system.num_stages,
                num_slots=1 << (slots - 1).bit_length(), block_size=system.scheduler.block_size,
                swap_window=system.swap.window if system.swap is not None else 0,
                keeps_turns=keeps_turns(system) and scenario.workload.has_sessions,
                slack_window=(scenario.engine.slack_window or SLACK_WINDOW) * (system.scheduler.order == "least_slack"),
                has_block_groups=system.swap is not None and system.swap.group_blocks is not None,
                has_kv_parallel=system.plan.kv_parallel_size > 1, num_partial=system.scheduler.max_num_partial_prefills,
                line_window=(scenario.engine.prefill_window or LINE_WINDOW)
                * (system.scheduler.max_num_partial_prefills > 1),
                reads_chunks=any(isinstance(one.cost, RooflineCost)
                                 for one in (scenario, *(pool.scenario for pool in system.pools))))
    # Beside thousands of slots a packed key has fewer bits for iterations: half of them for jumps between rebases.
    dims = dataclasses.replace(dims, max_jump=min(dims.max_jump, 1 << (MOST_JUMP_BITS - dims.slot_bits)))
    return lower.routing_dims(routing, dims)


def sendings(scenario: Scenario) -> int:
    """How often a request is sent, at most."""
    return 1 + (scenario.workload.client.retries if scenario.has_clients and scenario.workload.client else 0)


def looks_a_second(scenario: Scenario, dims: Dims) -> float:
    """Steps that controllers take in a second in which nothing happens, at most."""
    cluster, looks = scenario.cluster, 0.0
    if (given := cluster.migration) is not None:
        looks += dims.num_executors / given.polling_s
    if (given := cluster.scaling) is not None:
        looks += 1 / given.check_s
    if (given := cluster.role_switching) is not None:
        looks += 1 / given.sample_s + 1 / given.decide_s + 1 / given.poll_s + dims.num_executors / given.drain_check_s
    return looks


def most_steps(scenario: Scenario, dims: Dims, workload: Workload, last_s: float | None = None) -> int:
    """Steps after which a run is stopped, every sending and outage counted, and every look of a controller.

    last_s: the last arrival, where it is not the workload's own.
    """
    # They look while there are requests: as long as they come, twice, and a while.
    last_s = float(workload.arrival_s[-1]) if last_s is None else last_s
    looks = looks_a_second(scenario, dims) * (2 * last_s + lower.WATCHED_S)
    # An outage may have everything computed again.
    steps = lower.step_limit(workload, turns(dims)) * sendings(scenario) * (1 + dims.num_outages)
    return int(min(steps + looks, 2**31 - 1))
