"""A scenario resolved: what its names stand for, the KV pools derived, refusals of what does not go together."""

import dataclasses
from dataclasses import dataclass
from typing import NamedTuple

import msgspec
import numpy as np
from jaxtyping import Int

from jaxsim._core.errors import InputError
from jaxsim.engine.lower.contexts import with_contexts
from jaxsim.engine.lower.hybrid import Hybrid, hybrid_blocks, resolve_hybrid
from jaxsim.policy.routing import AbstractRouting, router
from jaxsim.policy.swap import MOST_GROUPED_BLOCKS
from jaxsim.spec.device import DeviceSpec
from jaxsim.spec.engine import SwapSection
from jaxsim.spec.host_memory import HostBudget
from jaxsim.spec.memory import MemoryBudget, kv_blocks
from jaxsim.spec.model import ModelSpec
from jaxsim.spec.plan import Plan, kv_cache_bytes, plan_of
from jaxsim.spec.presets import Scheduler, resolve
from jaxsim.spec.rules.cluster import check_migration, check_role_switching
from jaxsim.spec.rules.partial_prefills import check_partial_prefills
from jaxsim.spec.scenario import ClusterSection, Scenario


@dataclass(frozen=True)
class System:
    """A scenario resolved, except for its workload.

    num_blocks: KV blocks of an instance; `memory` their arithmetic where they were derived. pools: where a cluster has
    any, all of them; the rest is then the first's. swap: host memory that victims move to, if they do. switches_roles:
    engines of the pools change between their roles. hybrid: the host's part, where it has one. has_restarts: engines
    fail, and others compute again what they lose.
    """

    scheduler: Scheduler
    plan: Plan
    model: ModelSpec | None
    device: DeviceSpec | None
    memory: MemoryBudget | HostBudget | None
    num_blocks: int
    max_model_len: int
    pools: tuple["Pool", ...] = ()
    swap: SwapSection | None = None
    switches_roles: bool = False
    hybrid: Hybrid | None = None
    has_restarts: bool = False

    @property
    def num_executors(self) -> int:
        """Of all pools; one for each replica's ranks that iterate by themselves, where there are none."""
        return sum(pool.replicas for pool in self.pools)

    @property
    def has_roles(self) -> bool:
        """Prompts and outputs are computed by different instances."""
        return any(pool.role != "mixed" for pool in self.pools)

    @property
    def num_stages(self) -> int:
        """Of the deepest pipeline."""
        return max(one.scheduler.num_stages for one in (self, *(pool.system for pool in self.pools)))

    @property
    def has_free_stages(self) -> bool:
        """Batches are formed whenever a first stage is free, in all pools if in any."""
        return any(pool.system.scheduler.pass_when_stage_free for pool in self.pools)

    @property
    def has_parts(self) -> bool:
        """Images are encoded by instances of their own."""
        return any(pool.role == "encode" for pool in self.pools)

    @property
    def blocks_of_executors(self) -> Int[np.ndarray, " executors"] | None:
        """KV blocks of each, of pools that may differ; none where images are encoded."""
        if not self.pools:
            return None
        blocks = [0 if p.role == "encode" else p.system.num_blocks for p in self.pools]
        return np.repeat(blocks, [p.replicas for p in self.pools])

    @property
    def num_ranks(self) -> int:
        """Ranks that iterate together, exchanging tokens for their experts."""
        if self.model is None:
            return self.plan.data_parallel_size if self.plan.enable_expert_parallel else 1
        return self.plan.ranks_in_step(self.model)

    @property
    def num_independent(self) -> int:
        """Ranks of a replica that iterate by themselves."""
        return self.plan.data_parallel_size // self.num_ranks


class Pool(NamedTuple):
    """Instances that are alike, as a scenario of them alone."""

    role: str
    replicas: int
    scenario: Scenario
    system: System


def resolve_system(scenario: Scenario) -> System:
    """Look everything up, derive the KV pools. Raises `InputError` for whatever does not go together."""
    _check_loads(scenario)
    failures = scenario.cluster.failures
    has_restarts = failures is not None and failures.on_failure == "reroute"
    if not scenario.cluster.pools:
        system = dataclasses.replace(_resolve_alone(scenario), has_restarts=has_restarts)
        if system.scheduler.pass_when_stage_free:
            raise InputError("engine.pipeline_parallel_size", system.scheduler.num_stages,
                             f"of {system.scheduler.preset} is simulated with prefill and decode engines only",
                             "use 1, or [[cluster.pools]] of these roles")
        return system
    pools = []
    for index, section in enumerate(scenario.cluster.pools):
        one = scenario.of_pool(index)
        try:
            alone = _resolve_alone(one)
            if section.role == "encode":
                # Its pool is the multimodal cache; a batch is bounded by its sequences and by that.
                alone = dataclasses.replace(alone, num_blocks=scenario.cluster.encode.cache_tiles, memory=None)
            pools.append(Pool(section.role, section.replicas, one, alone))
        except InputError as error:
            field = f"cluster.pools[{index}]: {error.field}"
            raise InputError(field, error.value, error.problem, error.remedy) from None
    # What stands for all of them is one that runs the model.
    first = next(pool for pool in pools if pool.role != "encode")
    system = dataclasses.replace(first.system, pools=tuple(pools),
                                 switches_roles=scenario.cluster.role_switching is not None,
                                 has_restarts=has_restarts)
    _check_pools(system, scenario)
    _check_caches(scenario, system)
    if system.has_parts:
        _check_dealing(scenario)
    return system


def _check_pools(system: System, scenario: Scenario) -> None:
    """Refuse pools that are not simulated side by side. Raises `InputError`."""
    first = system.scheduler
    is_free = any(pool.system.scheduler.pass_when_stage_free for pool in system.pools)
    for index, pool in enumerate(system.pools):
        s, where = pool.system.scheduler, f"cluster.pools[{index}].engine."
        for name in ("preset", "block_size", "phase_mix", "chunked_prefill", "reserve", "order", "admit", "victim",
                     "async_scheduling", "kv_accounting", "decode_needs_free_block", "waiting_blocked_after_preempt",
                     "num_stages", "gathers"):
            if getattr(s, name) != getattr(first, name) and not (is_free and name == "num_stages"):
                raise InputError(where + name, getattr(s, name),
                                 f"differs from the first pool's, {getattr(first, name)!r}",
                                 "pools differ in limits, devices and parallel degrees; give all the same rules")
        if pool.system.plan.data_parallel_size > 1:
            raise InputError(where + "data_parallel_size", pool.system.plan.data_parallel_size,
                             "is not simulated in pools", "use 1, and more replicas for a dense model")
        for name, value, is_wrong, remedy in (
                ("pipeline_parallel_size", s.num_stages, s.num_stages > 1 and not is_free, "use 1"),
                ("scheduling_policy", s.order, s.order != "fcfs", "use 'fcfs'"),
                ("enable_prefix_caching", True, pool.scenario.engine.enable_prefix_caching, "leave it out"),
                ("preset", s.preset, (s.phase_mix != "unified" and s.chunked_prefill)
                 or s.reserve not in ("none", "prompt")
                 or not (s.kv_accounting or s.decode_context_limit is not None) or s.gathers or s.admit != "any_time",
                 "use a preset 'vllm-v1', 'vllm-v0', 'sarathi' or 'distserve-sim'"),
                ("preset", s.preset, not s.kv_accounting and system.has_parts,
                 "use preset 'vllm-v1@0.9', 'vllm-v0' or 'sarathi': embeddings wait for places in a cache"),
                ("async_scheduling", True, s.async_scheduling and system.has_parts,
                 "set it to false, or use preset 'vllm-v1@0.9'")):
            if is_wrong and system.has_roles:
                field = where + name if name in scenario.cluster.pools[index].engine else f"engine.{name}"
                raise InputError(field, value, "is not simulated with prefill and decode engines", remedy)
        if s.order in ("vtc", "least_slack"):
            raise InputError(where + "scheduling_policy", s.order, "is not simulated in pools", "use cluster.replicas")
    if is_free and not system.has_roles:
        raise InputError("cluster.pools", "all mixed",
                         f"have pipeline stages as {first.preset} has them, which are simulated with prefill and"
                         " decode engines only", "use roles, or engine.pipeline_parallel_size = 1")
    if is_free and scenario.cluster.transfer is not None and scenario.cluster.transfer.by_layer:
        raise InputError("cluster.transfer.by_layer", True, f"is not simulated with pipeline stages of {first.preset}",
                         "leave it out, or use one stage")


def _resolve_alone(scenario: Scenario) -> System:
    engine = scenario.engine
    plan = plan_of(engine)
    model = device = None
    if scenario.model is not None:
        model = scenario.model.spec()
        plan = plan.check(model)
    if scenario.device is not None:
        device = scenario.device.spec()
    scheduler = resolve(
        engine, device_name=device.name if device else "",
        memory_bytes=device.memory_bytes if device else 0.0,
        max_model_len=model.max_position if model else None)
    scheduler = with_contexts(scenario, plan, scheduler)
    if scheduler.order != "fcfs" and scheduler.max_num_partial_prefills == 1 and (
            scheduler.async_scheduling or scheduler.phase_mix != "unified"
            or scheduler.reserve != "none" or not scheduler.kv_accounting
            or (scheduler.order != "priority" and scheduler.admit != "any_time")):
        raise InputError("engine.scheduling_policy", scheduler.order,
                         f"is simulated as vLLM V1 does it, which {scheduler.preset} is not as set here",
                         "use preset = 'vllm-v1@0.9' with async_scheduling = false, or 'fcfs'")
    named = scenario.cluster.router
    if not scheduler.kv_accounting and named and router(named, scenario.cluster.router_weights).reads_kv:
        raise InputError("cluster.router", scenario.cluster.router,
                         f"reads KV memory, of which {scheduler.preset} keeps no account",
                         "use 'least_outstanding', or set engine.kv_accounting = true")
    max_model_len = scheduler.max_model_len
    if model is not None and max_model_len > model.max_position:
        raise InputError("engine.max_model_len", max_model_len,
                         f"beyond the {model.max_position} positions of {model.name}", "lower it")
    hybrid = None
    if engine.hybrid is not None:
        hybrid, scheduler = resolve_hybrid(scenario, scheduler, model, device, plan)
    memory, num_blocks = None, engine.num_gpu_blocks_override
    if hybrid is not None:
        memory = hybrid_blocks(scenario, scheduler, model, device, max_model_len)
        num_blocks = memory.num_blocks
    elif num_blocks is None and scheduler.kv_accounting:
        memory = kv_blocks(
            model, device, plan, dtype=scenario.dtype, kv_dtype=scenario.kv_dtype,
            block_size=scheduler.block_size, gpu_memory_utilization=scheduler.gpu_memory_utilization,
            max_num_batched_tokens=min(scheduler.max_num_batched_tokens, max_model_len),
            max_num_seqs=scheduler.max_batch_seqs, max_model_len=-(-max_model_len // plan.kv_parallel_size),
            rule=scheduler.kv_rule)
        # Groups that share KV have one pool.
        num_blocks = memory.num_blocks * plan.kv_parallel_size
    if engine.kv_parallel_size > 1 and scheduler.kv_accounting:
        # The busiest has shard(n) = min(n, max(tokens, n / groups)); the even part is in the pool of all of them.
        room = num_blocks // plan.kv_parallel_size * scheduler.block_size
        if min(engine.kv_parallel_tokens, max_model_len) > room:
            raise InputError("engine.kv_parallel_tokens", engine.kv_parallel_tokens,
                             f"of a context are more than a group has room for: {num_blocks:,} KV blocks of"
                             f" {scheduler.block_size} tokens are {room:,} tokens on each of {plan.kv_parallel_size}"
                             " groups", f"give at most {room}, or more devices a group")
    if engine.kv_parallel_size > 1 and model.window_layers:
        raise InputError("engine.kv_parallel_size", engine.kv_parallel_size,
                         f"is not simulated with the windowed layers of {model.name}", "use 1")
    system = System(scheduler, plan, model, device, memory, num_blocks or 0, max_model_len, swap=engine.swap,
                    hybrid=hybrid)
    _check_swap(scenario, system)
    _check_offload(scenario, system)
    _check_remote_store(scenario, system)
    _check_reuse(scenario, system)
    if system.num_ranks > 1 and scenario.has_clients:
        raise InputError("engine.data_parallel_size", plan.data_parallel_size,
                         "with ranks that iterate together is not simulated where requests end without an answer",
                         "use 1, or leave out workload.client, cluster.admission and cluster.failures")
    if system.num_ranks > 1 and scheduler.num_stages > 1:
        raise InputError("engine.pipeline_parallel_size", scheduler.num_stages,
                         "with data-parallel ranks that iterate together is not there yet",
                         "use 1, or engine.data_parallel_size = 1")
    _check_caches(scenario, system)
    if system.num_ranks > 1 and scheduler.order in ("vtc", "least_slack"):
        raise InputError("engine.scheduling_policy", scheduler.order,
                         "is not simulated with data-parallel ranks that iterate together",
                         "use 'fcfs', or engine.data_parallel_size = 1")
    return system


def _check_loads(scenario: Scenario) -> None:
    """Refuse with a router that reads loads, given by the path of its class, what is with those that have names. Raises
    `InputError`."""
    name = scenario.cluster.router
    if name is not None and "." in name and router(name, scenario.cluster.router_weights).reads_loads:
        check_role_switching(scenario, reads_loads=True)
        check_migration(scenario, reads_loads=True)
        check_partial_prefills(scenario, reads_loads=True)


def _check_caches(scenario: Scenario, system: System) -> None:
    """Refuse routers that read what is not there. Raises `InputError`."""
    if scenario.cluster.router is None:
        return
    routing = router(scenario.cluster.router, scenario.cluster.router_weights)
    wants_prompts = routing.reads_cache or routing.reads_sent or routing.route_by == "prefix"
    if wants_prompts and not scenario.engine.enable_prefix_caching:
        raise InputError("cluster.router", scenario.cluster.router,
                         "routes by what prompts have in common, which nobody keeps without prefix caching",
                         "set engine.enable_prefix_caching = true (vLLM V1 presets), or use 'least_outstanding'")
    if routing.route_by and system.has_roles:
        raise InputError("cluster.router", scenario.cluster.router, "is not simulated with prefill and decode engines",
                         "use 'least_outstanding'")
    reads_caches = routing.reads_cache or routing.reads_sent or routing.reads_prefill
    if reads_caches and (system.num_ranks > 1 or system.scheduler.num_stages > 1):
        what = "data-parallel ranks that iterate together" if system.num_ranks > 1 else "pipeline stages"
        raise InputError("cluster.router", scenario.cluster.router, f"is not simulated with {what} yet",
                         "use 'prefix_hash', or 'least_outstanding'")


def knows_prompts(routing: AbstractRouting) -> bool:
    """Whether a router reads anything of `jaxsim.engine.caches`, or random numbers or hashes of its own."""
    return bool(routing.reads_cache or routing.reads_sent or routing.reads_prefill or routing.reads_noise
                or routing.route_by)


def _check_dealing(scenario: Scenario) -> None:
    """Refuse routers of images that read what engines that encode do not keep. Raises `InputError`."""
    name = scenario.cluster.encode.router
    try:
        dealing = router(name, {})
    except InputError as error:
        raise InputError("cluster.encode.router", error.value, error.problem, error.remedy) from None
    if knows_prompts(dealing) or dealing.reads_loads:
        raise InputError("cluster.encode.router", name, "reads what engines that encode do not keep",
                         "use 'round_robin' or 'least_outstanding'")


def _check_swap(scenario: Scenario, system: System) -> None:
    """Refuse what is not simulated with host memory, or none of it. Raises `InputError`."""
    if system.swap is None:
        return
    if system.num_ranks > 1:
        raise InputError("engine.data_parallel_size", system.plan.data_parallel_size,
                         "with ranks that iterate together is not simulated with engine.swap", "use 1")
    if system.model.is_mla:
        raise InputError("engine.swap", system.model.name,
                         "has one latent a token in place of K and V, whose copies are not simulated",
                         "use a model without MLA, or leave it out")
    if system.swap.pcie_gb_per_s is None and system.device.host_link_bytes_per_s is None:
        raise InputError("engine.swap.pcie_gb_per_s", None,
                         f"missing, and the link of {system.device.name} to the host is not known", "give it")
    if system.swap.group_blocks is not None and system.num_blocks > MOST_GROUPED_BLOCKS:
        raise InputError("engine.swap.group_blocks", system.swap.group_blocks,
                         f"is not simulated with more than {MOST_GROUPED_BLOCKS:,} KV blocks", "use run_blocks")
    if host_blocks(scenario, system) < 1:
        raise InputError("engine.swap.space_gb", system.swap.space_gb,
                         f"holds not one KV block of {swap_block_bytes(scenario, system):,.0f} bytes",
                         "raise it, or leave engine.swap out: preempted requests are recomputed")


def _check_offload(scenario: Scenario, system: System) -> None:
    """Refuse what is not simulated with host memory behind the prefix cache, or none of it. Raises `InputError`."""
    given = scenario.engine.offload
    if given is None:
        return
    if system.num_ranks > 1:
        raise InputError("engine.data_parallel_size", system.plan.data_parallel_size,
                         "with ranks that iterate together is not simulated with engine.offload", "use 1")
    if given.gb_per_s is None and system.device.host_link_bytes_per_s is None:
        raise InputError("engine.offload.gb_per_s", None,
                         f"missing, and the link of {system.device.name} to the host is not known", "give it")
    if offload_blocks(scenario, system) < 1:
        raise InputError("engine.offload.space_gb", given.space_gb,
                         f"holds not one KV block of {swap_block_bytes(scenario, system):,.0f} bytes",
                         "raise it, or leave engine.offload out")


def _check_remote_store(scenario: Scenario, system: System) -> None:
    """Refuse what is not simulated with a store that instances share, or none of it. Raises `InputError`."""
    given = scenario.cluster.remote_store
    if given is None:
        return
    if remote_blocks(scenario, system) < 1:
        raise InputError("cluster.remote_store.space_gb", given.space_gb,
                         f"holds not one KV block of {whole_block_bytes(scenario, system):,.0f} bytes",
                         "raise it, or leave it out: the store then holds everything")
    if system.num_ranks > 1:
        raise InputError("engine.data_parallel_size", system.plan.data_parallel_size,
                         "with ranks that iterate together is not simulated with cluster.remote_store", "use 1")


def _check_reuse(scenario: Scenario, system: System) -> None:
    """Refuse what is not simulated with siblings' contexts. Raises `InputError`."""
    if scenario.engine.context_reuse is None:
        return
    if system.num_ranks > 1:
        raise InputError("engine.data_parallel_size", system.plan.data_parallel_size,
                         "with ranks that iterate together is not simulated with engine.context_reuse", "use 1")
    # The budget of an iteration may be a default of the device.
    groups, budget = scenario.workload.prefix_groups, system.scheduler.max_num_batched_tokens
    tokens = 0 if groups is None else groups.tokens
    if tokens > budget:
        raise InputError("workload.prefix_groups.tokens", tokens,
                         f"are more than the {budget} tokens of an iteration, in which some layers of them are"
                         " recomputed", "raise engine.max_num_batched_tokens, or give fewer")
    if recomputed_layers(scenario) > system.model.layers:
        raise InputError("engine.context_reuse.recomputed_layers", recomputed_layers(scenario),
                         f"is more than the {system.model.layers} layers of {system.model.name}", "lower it")


def recomputed_layers(scenario: Scenario) -> int:
    """Layers of a sibling's context that a receiver recomputes: as told, or the fewest that quality allows."""
    given = scenario.engine.context_reuse
    if given.recomputed_layers is not None:
        return given.recomputed_layers
    return min(row.recomputed_layers for row in given.quality if row.loss <= given.max_loss)


def offload_blocks(scenario: Scenario, system: System) -> int:
    """KV blocks of host memory behind the prefix cache."""
    return min(int(1e9 * scenario.engine.offload.space_gb / swap_block_bytes(scenario, system)), 1 << 30)


def remote_blocks(scenario: Scenario, system: System) -> int:
    """KV blocks of the store that instances share; more than there ever are where it has no bound."""
    space_gb = scenario.cluster.remote_store.space_gb
    return min(int(1e9 * (space_gb or 1e12) / whole_block_bytes(scenario, system)), 1 << 30)


def whole_block_bytes(scenario: Scenario, system: System) -> float:
    """Of a KV block on all devices of an engine, what several hold alike once."""
    width = kv_cache_bytes(scenario.kv_dtype, scenario.dtype, system.model)
    return system.scheduler.block_size * system.model.kv_bytes_per_token(width)


def swap_block_bytes(scenario: Scenario, system: System) -> float:
    """Of a KV block on one device."""
    width = kv_cache_bytes(scenario.kv_dtype, scenario.dtype, system.model)
    per_token = system.model.kv_bytes_per_token(width, system.plan.tensor_parallel_size)
    return system.scheduler.block_size * per_token


def host_blocks(scenario: Scenario, system: System) -> int:
    """KV blocks of host memory."""
    return min(int(1e9 * system.swap.space_gb / swap_block_bytes(scenario, system)), 1 << 30)


def kinds_of_pools(system: System) -> list[Pool]:
    """The pools whose engines are alike in nothing but their role, each once."""
    kinds: list[Pool] = []
    for pool in system.pools:
        if all(of_one(pool) != of_one(other) for other in kinds):
            kinds.append(pool)
    return kinds


def of_one(pool: Pool) -> tuple[Scenario, bool]:
    """What makes the engines of a pool what they are: equal for pools that are alike."""
    return msgspec.structs.replace(pool.scenario, cluster=ClusterSection()), pool.role == "encode"
