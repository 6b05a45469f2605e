"""Policies and their numbers as the loop takes them."""

import dataclasses
import math

import numpy as np
from jaxtyping import Int

from jaxsim._core.errors import InputError
from jaxsim.cost.base import AbstractIterationCost
from jaxsim.engine.common import Group, Params
from jaxsim.engine.lower.costs import front_end_s
from jaxsim.engine.lower.links import embedding_rate, is_max_min, migration_rates, on_grid, transfer_rates, ways_of
from jaxsim.engine.lower.long_contexts import make_chunks, make_kv_parallel
from jaxsim.engine.lower.partial_prefills import make_partial
from jaxsim.engine.lower.systems import (
    Pool,
    System,
    host_blocks,
    kinds_of_pools,
    knows_prompts,
    of_one,
    offload_blocks,
    recomputed_layers,
    remote_blocks,
    swap_block_bytes,
    whole_block_bytes,
)
from jaxsim.kernels import clock
from jaxsim.policy.arrivals import AbstractSource, ClosedLoop, PartArrivals, Sessions, SortedArrivals
from jaxsim.policy.batching import Batching
from jaxsim.policy.clients import UNBOUNDED, Clients, backoffs, patience
from jaxsim.policy.context_reuse import ContextReuse
from jaxsim.policy.encoding import Encoder, Encoding
from jaxsim.policy.fairness import OUTPUT_PRICE, PROMPT_PRICE, TokenCounters, most_ahead, token_counters
from jaxsim.policy.hand_over import HandOver
from jaxsim.policy.migration import Migration
from jaxsim.policy.offload import Offload
from jaxsim.policy.remote_store import RemoteStore
from jaxsim.policy.role_switching import ROLES, RoleSwitching
from jaxsim.policy.routing import DataParallel, router
from jaxsim.policy.scaling import Scaling
from jaxsim.policy.slack import PARTS_MS, Slack
from jaxsim.policy.swap import DRAWN_BITS, Swap
from jaxsim.spec.cluster import AdmissionSection, TransferSection
from jaxsim.spec.dims import Dims
from jaxsim.spec.plan import kv_cache_bytes
from jaxsim.spec.scenario import Scenario
from jaxsim.spec.vision import EMBEDDING_BYTES
from jaxsim.spec.workload import ClientSection
from jaxsim.workload.workload import Workload


def make_params(scenario: Scenario, system: System, cost: AbstractIterationCost | tuple[AbstractIterationCost, ...],
                max_steps: int, workload: Workload | None = None, longest: int | None = None) -> Params:
    """Policies and numbers as the loop takes them; cost: of `make_cost`; workload: instead of the one that the scenario
    describes; longest: tokens of a request there is, where that is known."""
    groups, group_of = (Group(make_batching(scenario, system, None if system.pools else cost, longest), cost),), None
    has_encoder = scenario.workload.images is not None and not system.has_parts
    if system.pools:
        kinds = kinds_of_pools(system)
        groups = tuple(Group(make_encoding_batching(pool) if pool.role == "encode" else
                             make_batching(pool.scenario, pool.system), one)
                       for pool, one in zip(kinds, cost, strict=True))
        if system.has_free_stages:
            stages = [np.int32(pool.system.scheduler.num_stages) for pool in kinds]
            groups = tuple(Group(dataclasses.replace(g.batching, num_stages=n), g.cost)
                           for g, n in zip(groups, stages, strict=True))
        if len(kinds) > 1:
            of_pool = [next(k for k, kind in enumerate(kinds) if of_one(kind) == of_one(pool))
                       for pool in system.pools]
            group_of = np.repeat(np.array(of_pool, np.int32), [pool.replicas for pool in system.pools])
    name, weights = scenario.cluster.router, scenario.cluster.router_weights
    if name is None and system.plan.data_parallel_size > 1 and not weights:
        routing = DataParallel()
    else:
        routing = router(name or "round_robin", weights)
    return Params(groups, routing, np.int32(max_steps), make_source(scenario, system, workload), group_of,
                  hand_over=make_hand_over(scenario, system) if system.has_roles else None,
                  **make_migration(scenario, system), clients=make_clients(scenario),
                  encoding=make_encoding(scenario, system) if system.has_parts else None,
                  encoder=make_encoder(scenario, system) if has_encoder else None, slack=make_slack(scenario, system),
                  switching=make_role_switching(scenario, system),
                  variants=None if scenario.cluster.variants is None else np.int32(scenario.cluster.variants))


def make_source(scenario: Scenario, system: System, workload: Workload | None = None) -> AbstractSource:
    """How requests arrive; workload: instead of the one that the scenario describes."""
    w, outside_s = scenario.workload, front_end_s(scenario, system)
    if w.has_sessions if workload is None else workload.think_s is not None:
        return Sessions(np.float32(outside_s))
    if w.kind == "closed-loop":
        return ClosedLoop(np.int32(w.concurrency), np.float32((w.think_s or 0.0) + outside_s))
    return PartArrivals() if system.has_parts else SortedArrivals()


def make_clients(scenario: Scenario) -> Clients | None:
    """Who sends again and who refuses; None where every request is answered."""
    if not scenario.has_clients:
        return None
    client, admission = scenario.workload.client or ClientSection(), scenario.cluster.admission or AdmissionSection()

    def bound(most: int | None) -> np.int32:
        return UNBOUNDED if most is None else np.int32(most)

    return Clients(backoffs(client.retries, client.backoff_s, client.backoff_factor), bound(admission.max_waiting),
                   bound(admission.max_outstanding))


def make_patience(scenario: Scenario, system: System, workload: Workload) -> Int[np.ndarray, "requests 4"] | None:
    """How long the client of each request waits for the engine; None where every request is answered.

    What a request spends outside the engine is in a client's wait. Raises `InputError` where that is all of it.
    """
    if not scenario.has_clients:
        return None
    outside_s, w = front_end_s(scenario, system), scenario.workload
    waits = []
    for name in ("deadline_s", "first_token_deadline_s"):
        common, own = getattr(w.client, name, None), {t.name: getattr(t, name) for t in w.tenants}
        for field, given in ((f"workload.client.{name}", common),
                             *((f"workload.tenants: {tenant}.{name}", value) for tenant, value in own.items())):
            if given is not None and given - outside_s < clock.ARRIVAL_GRID_S:
                raise InputError(field, given, f"is no more than the {outside_s:g} s that a request spends outside the"
                                               " engine", "raise it, or lower cost.front_end_s")
        by_tenant = np.array([np.inf if (wait := own.get(tenant) or common) is None else wait - outside_s
                              for tenant in workload.tenant_names])
        waits.append(by_tenant[workload.tenant])
    return patience(*waits)


def make_batching(scenario: Scenario, system: System, cost: AbstractIterationCost | None = None,
                  longest: int | None = None) -> Batching:
    """Flags and numbers of the scheduler of an instance; cost, longest: for what goes by them."""
    s = system.scheduler
    integer, real = np.int32, np.float32
    batching = Batching(
        max_num_seqs=integer(s.max_num_seqs), max_num_batched_tokens=integer(s.max_num_batched_tokens),
        max_model_len=integer(system.max_model_len), num_blocks=integer(system.num_blocks),
        watermark_blocks=integer(s.watermark_blocks(system.num_blocks)),
        decode_context_limit=integer(s.decode_context_limit or 0),
        ratio_start=real(s.ratio_start), ratio_floor=real(s.ratio_floor), ratio_decay=real(s.ratio_decay),
        reserve_clip_tokens=integer(s.reserve_clip_tokens), retract_free_tokens=integer(s.retract_free_tokens),
        phase_mix=s.phase_mix, chunked_prefill=s.chunked_prefill, reserve=s.reserve,
        decode_needs_free_block=s.decode_needs_free_block, victim=s.victim,
        waiting_blocked_after_preempt=s.waiting_blocked_after_preempt,
        order=s.order if s.max_num_partial_prefills == 1 else "fcfs", admit=s.admit,
        async_scheduling=s.async_scheduling, kv_accounting=s.kv_accounting,
        has_context_limit=s.decode_context_limit is not None,
        prefix_caching=scenario.engine.enable_prefix_caching)
    chunks, shared = make_chunks(scenario), make_kv_parallel(scenario, system)
    batching = dataclasses.replace(batching, chunks=chunks, kv_parallel=shared,
                                   partial=make_partial(scenario, system, cost, chunks, shared, longest))
    if system.swap is not None:
        batching = dataclasses.replace(batching, swap=make_swap(scenario, system))
    if scenario.engine.offload is not None:
        batching = dataclasses.replace(batching, offload=make_offload(scenario, system))
    if scenario.cluster.remote_store is not None:
        batching = dataclasses.replace(batching, remote=make_remote_store(scenario, system))
    if scenario.engine.context_reuse is not None:
        batching = dataclasses.replace(batching, reuse=make_reuse(scenario, system))
    if s.gathers:
        batching = dataclasses.replace(batching, batch_wait_timeout_iters=integer(s.batch_wait_timeout_iters),
                                       batch_wait_tokens=integer(s.batch_wait_tokens))
    if s.num_stages > 1 and not s.pass_when_stage_free:
        batching = dataclasses.replace(batching, max_batch_seqs=integer(s.max_batch_seqs),
                                       pass_on_arrival=s.pass_on_arrival)
    return batching


def make_slack(scenario: Scenario, system: System) -> Slack | None:
    """The pace that least slack goes by, in the parts of `jaxsim.policy.slack`. Raises `InputError`."""
    if system.scheduler.order != "least_slack":
        return None
    engine = scenario.engine
    output, prompt = (round(PARTS_MS * (value or 0.0)) for value in (engine.slack_output_ms, engine.slack_prompt_ms))
    if (output + prompt) * system.max_model_len >= 1 << 30:
        raise InputError("engine.slack_output_ms", engine.slack_output_ms,
                         f"a token, for max_model_len = {system.max_model_len}, is longer than can be ranked",
                         "lower it, engine.slack_prompt_ms or engine.max_model_len")
    return Slack(np.int32(prompt), np.int32(output), np.int32(system.max_model_len))


def make_swap(scenario: Scenario, system: System) -> Swap | None:
    """Host memory, copies and draws of an instance, as the loop takes them."""
    given, integer, real = system.swap, np.int32, np.float32
    if given is None:
        return None
    drawn, layers = {}, system.model.layers
    if given.redraw is not None:
        drawn = dict(period=integer(given.redraw.period_iterations), levels=integer(given.redraw.levels),
                     locality=integer(round((given.redraw.locality or 0.0) * (1 << DRAWN_BITS))))
    link = system.device.host_link_bytes_per_s if given.pcie_gb_per_s is None else 1e9 * given.pcie_gb_per_s
    return Swap(
        host_blocks=integer(host_blocks(scenario, system)), layers=integer(layers),
        block_copy_bytes=real(swap_block_bytes(scenario, system) / (2 * layers)), bytes_per_s=real(link),
        dispatch_s=real(1e-6 * given.dispatch_us), launch_s=real(1e-6 * given.launch_us),
        run_blocks=integer(given.run_blocks or 1), is_async=np.bool_(given.asynchronous), reuse=np.bool_(given.reuse),
        group_blocks=None if given.group_blocks is None else integer(given.group_blocks), **drawn)


def make_offload(scenario: Scenario, system: System) -> Offload:
    """Host memory behind the prefix cache of an instance, and its loads, as the loop takes them."""
    given = scenario.engine.offload
    link = system.device.host_link_bytes_per_s if given.gb_per_s is None else 1e9 * given.gb_per_s
    return Offload(np.int32(offload_blocks(scenario, system)), np.float32(swap_block_bytes(scenario, system) / link),
                   np.int32(system.model.layers), np.bool_(given.load == "by_layer"))


def make_remote_store(scenario: Scenario, system: System) -> RemoteStore:
    """The store that instances share, as the loop takes it."""
    given, offload = scenario.cluster.remote_store, scenario.engine.offload
    load = given.load or ("serial" if offload is None else offload.load)
    size, egress = whole_block_bytes(scenario, system), given.egress_gb_per_s
    slower = given.gb_per_s if egress is None else min(given.gb_per_s, egress)
    return RemoteStore(
        np.float32(size / (1e9 * slower)), np.float32(1e-6 * given.latency_us), np.int32(system.model.layers),
        np.bool_(load == "by_layer"), np.int32(remote_blocks(scenario, system)),
        None if egress is None else np.float32(size / (1e9 * egress)))


HIDDEN_BYTES = 2
"""Of a number of the hidden states: activations are of 16 bits."""


def make_reuse(scenario: Scenario, system: System) -> ContextReuse:
    """Contexts that siblings have computed, as the loop takes them; the link carries those of all devices."""
    given, model, real = scenario.engine.context_reuse, system.model, np.float32
    share = recomputed_layers(scenario) / model.layers
    size = system.scheduler.block_size / (1e9 * given.gb_per_s)
    kv_bytes = model.kv_bytes_per_token(kv_cache_bytes(scenario.kv_dtype, scenario.dtype, model))
    whole_kv_s = None if scenario.cluster.variants is None else real(size * kv_bytes)
    return ContextReuse(real(share), real(size * model.hidden * HIDDEN_BYTES), real(size * (1 - share) * kv_bytes),
                        real(1e-6 * given.latency_us), np.bool_(given.pipelined), whole_kv_s)


def with_counters(params: Params, scenario: Scenario, system: System, workload: Workload, dims: Dims) -> Params:
    """With what tokens cost the tenants of the workload, where these have virtual token counters. Raises
    `InputError`."""
    if not dims.num_tenants:
        return params
    s, engine = system.scheduler, scenario.engine
    given = {t.name: t.weight for t in scenario.workload.tenants}
    weights = [given.get(name, 1.0) for name in workload.tenant_names]
    ahead = most_ahead(system.max_model_len, system.num_blocks * s.block_size, s.max_num_seqs, system.max_model_len)
    prices = [default if weight is None else weight for weight, default in (
        (engine.input_token_weight, PROMPT_PRICE), (engine.output_token_weight, OUTPUT_PRICE))]
    counters = token_counters(*prices, weights, ahead)
    if counters is None:
        raise InputError("workload.tenants", weights, "are weights so far apart that counters of 32 bits do not do",
                         "bring them closer together, or lower engine.max_num_seqs or engine.max_model_len")
    more = dims.num_tenants - len(weights)
    return dataclasses.replace(params, counters=TokenCounters(
        np.pad(counters.prompt_price, (0, more)), np.pad(counters.output_price, (0, more))))


WAITING_BLOCK_SHARE = 0.05
"""Of a pool. Source: `waiting_block_prop_threshold` of LLMServe/DistServe (`jaxsim.policy.hand_over`)."""


def make_hand_over(scenario: Scenario, system: System) -> HandOver:
    """Who computes prompts and who outputs, and the links between them."""
    given = scenario.cluster.transfer or TransferSection()
    replicas = [pool.replicas for pool in system.pools]
    roles = np.repeat([pool.role for pool in system.pools], replicas)
    # More blocks than there are bound nothing.
    share = (given.waiting_block_share or WAITING_BLOCK_SHARE) if given.hand_over == "pull" else 2.0
    most = [max(math.ceil(share * pool.system.num_blocks), 1) for pool in system.pools]
    if scenario.cluster.role_switching is not None:
        # Whoever decodes has those of who decodes.
        most = [m for m, pool in zip(most, system.pools, strict=True) if pool.role == "decode"] * len(most)
    ways = ways_of(scenario, system)
    if ways is None:
        bytes_per_token, bytes_per_s = transfer_rates(scenario, system)
        between = dict(seconds_per_token=np.float32(bytes_per_token / bytes_per_s),
                       latency_s=np.float32(on_grid(1e-6 * given.latency_us)))
    else:
        between = dict(seconds_per_token=ways.seconds(ways.bytes_per_token).astype(np.float32),
                       latency_s=ways.latency_s.astype(np.float32),
                       pool_of=np.repeat(np.arange(len(replicas), dtype=np.int32), replicas),
                       shared_link=ways.shared_link if ways.num_shared else None,
                       units=ways.units if is_max_min(scenario) else None)
    try:
        routing = router(given.router, given.router_weights)
    except InputError as error:
        field = error.field.replace("cluster.", "cluster.transfer.")
        raise InputError(field, error.value, error.problem, error.remedy) from None
    if knows_prompts(routing) or routing.reads_loads:
        raise InputError("cluster.transfer.router", given.router,
                         f"chooses by {'loads' if routing.reads_loads else 'prompts'}, which decode engines do not"
                         " keep",
                         "use 'least_outstanding', or another that reads loads only")
    return HandOver(
        computes_prompts=(roles == "prefill") | (roles == "encode"), decodes=roles == "decode", routing=routing,
        most_held=np.repeat(np.array(most, np.int32), replicas),
        layers=np.int32(system.model.layers if given.by_layer else 0), **between)


def make_encoding_batching(pool: Pool) -> Batching:
    """Of an engine that encodes: so many parts at once, whole."""
    most = np.int32(MOST_PART_TOKENS)
    return dataclasses.replace(make_batching(pool.scenario, pool.system), max_num_batched_tokens=most,
                               watermark_blocks=np.int32(0))


MOST_PART_TOKENS = 1 << 30
"""More than those of all tiles of a cache."""


def make_encoding(scenario: Scenario, system: System) -> Encoding:
    """Who encodes images, and the way of embeddings. Raises `InputError`."""
    given, images = scenario.cluster.encode, scenario.workload.images
    width = given.embedding_width or system.model.hidden
    num_bytes = images.tokens_per_tile * width * EMBEDDING_BYTES
    count = system.num_executors
    most = math.ceil(given.waiting_tile_share * given.cache_tiles)
    ways = ways_of(scenario, system)
    if ways is None:
        seconds_per_tile = np.float32(num_bytes / embedding_rate(scenario, system))
    else:
        seconds_per_tile = ways.seconds(num_bytes).astype(np.float32)
    return Encoding(
        encodes=np.repeat([pool.role == "encode" for pool in system.pools], [pool.replicas for pool in system.pools]),
        dealing=router(given.router, {}), cache_tiles=np.full(count, given.cache_tiles, np.int32),
        most_tiles=np.full(count, most, np.int32),
        seconds_per_tile=seconds_per_tile)


def make_encoder(scenario: Scenario, system: System) -> Encoder:
    """Those that compute prompts encode images too."""
    given, count = scenario.cluster.encode, system.num_executors or scenario.cluster.replicas * system.num_independent
    return Encoder(np.full(count, 1e-3 * given.base_ms, np.float32), np.full(count, 1e-3 * given.tile_ms, np.float32))


def make_role_switching(scenario: Scenario, system: System) -> RoleSwitching | None:
    """Who has which role at the beginning, and when the controller does what; None where roles stay."""
    given, x = scenario.cluster.role_switching, np.float32
    if given is None:
        return None
    kinds, group_of = kinds_of_pools(system), None
    if len(kinds) > 1:
        group_of = np.zeros(len(ROLES), np.int32)
        for pool in system.pools:
            group_of[ROLES.index(pool.role)] = next(k for k, kind in enumerate(kinds) if of_one(kind) == of_one(pool))
    pool_of = None
    if scenario.cluster.links:
        pool_of = np.zeros(len(ROLES), np.int32)
        for index, pool in enumerate(system.pools):
            pool_of[ROLES.index(pool.role)] = index
    roles = [ROLES.index(pool.role) for pool in system.pools for _ in range(pool.replicas)]
    periods = (given.sample_s, given.decide_s, given.poll_s, given.drain_check_s, given.switch_s)
    return RoleSwitching(*(x(on_grid(seconds)) for seconds in periods), np.bool_(given.deal_anew),
                         np.array(roles, np.int32), group_of, pool_of)


def moves_of(scenario: Scenario) -> dict[str, bool]:
    """What of `Dims` says which requests may move, and who asks for loads. Raises `InputError`."""
    cluster = scenario.cluster
    is_moving = cluster.migration is not None or cluster.scaling is not None
    reads_loads = router(cluster.router, cluster.router_weights).reads_loads if cluster.router else False
    return dict(has_migration=is_moving, has_demands=is_moving or reads_loads, has_scaling=cluster.scaling is not None,
                has_urgent=cluster.headroom_blocks is not None)


NEVER_S = 3600.0
"""Between looks that find nothing to migrate."""


def make_migration(scenario: Scenario, system: System) -> dict:
    """Of `Params`: the controllers of migrations and of how many executors are on. Raises `InputError`."""
    cluster, x, i = scenario.cluster, np.float32, np.int32
    found: dict = {}
    given = cluster.migration
    if cluster.headroom_blocks is not None:
        found["headroom_blocks"] = i(cluster.headroom_blocks)
    if cluster.scaling is not None:
        s = cluster.scaling
        found["scaling"] = Scaling(x(on_grid(s.check_s)), x(s.out_below), x(s.in_above), x(on_grid(s.startup_s)),
                                   i(s.min_replicas), i(cluster.replicas))
        if given is None:
            # Nobody is free enough to take anybody.
            found["migration"] = Migration(x(NEVER_S), x(-np.inf), x(np.inf), i(1), i(1), x(0), x(0))
    if given is not None:
        bytes_per_token, bytes_per_s = migration_rates(scenario, system)
        found["migration"] = Migration(
            x(on_grid(given.polling_s)), x(given.out_below),
            x(given.out_below if given.in_above is None else given.in_above), i(given.max_stages),
            i(given.last_stage_blocks), x(system.scheduler.block_size * bytes_per_token / bytes_per_s),
            x(on_grid(1e-6 * given.latency_us)), metric=given.metric, choice=given.choice)
    return found
