"""From what a user describes to what the loop runs: scenario -> sizes, policies, cost tables, requests."""

import dataclasses
import math
from dataclasses import dataclass
from typing import NamedTuple

import msgspec
import numpy as np
from jaxtyping import Int

from jaxsim._core.errors import InputError
from jaxsim.cost.base import AbstractIterationCost
from jaxsim.cost.fitted import fitted
from jaxsim.cost.roofline import CUDA_GRAPHS, FRONT_ENDS, roofline
from jaxsim.engine import measured
from jaxsim.engine.common import Group, Params
from jaxsim.engine.loop import REBASE_COUNTER, STEPS_BETWEEN_REBASES
from jaxsim.policy.arrivals import AbstractSource, ClosedLoop, Sessions, SortedArrivals
from jaxsim.policy.batching import Batching
from jaxsim.policy.fairness import OUTPUT_PRICE, PROMPT_PRICE, TokenCounters, most_ahead, token_counters
from jaxsim.policy.hand_over import HandOver
from jaxsim.policy.routing import DataParallel, router
from jaxsim.spec.device import DeviceSpec
from jaxsim.spec.dims import Dims
from jaxsim.spec.memory import MemoryBudget, kv_blocks
from jaxsim.spec.model import ModelSpec
from jaxsim.spec.plan import Plan, kv_cache_bytes
from jaxsim.spec.presets import Scheduler, resolve
from jaxsim.spec.scenario import ClusterSection, FittedCost, ProfiledCost, Scenario
from jaxsim.spec.sections import TransferSection
from jaxsim.state.requests import Requests, pack_requests
from jaxsim.traces import read_lengths, read_trace
from jaxsim.workload.generator import Tenant
from jaxsim.workload.lengths import Paired
from jaxsim.workload.named import generator
from jaxsim.workload.predictions import with_predictions
from jaxsim.workload.segments import radix_segments
from jaxsim.workload.workload import Workload

MAX_STEPS_A_TOKEN = 4
"""A run that takes more steps than this for every token of its workload is going in circles."""


@dataclass(frozen=True)
class System:
    """A scenario resolved, except for its workload.

    num_blocks: KV blocks of an instance; `memory` their arithmetic where they were derived. pools: where a cluster has
    any, all of them; the rest is then the first's.
    """

    scheduler: Scheduler
    plan: Plan
    model: ModelSpec | None
    device: DeviceSpec | None
    memory: MemoryBudget | None
    num_blocks: int
    max_model_len: int
    pools: tuple["Pool", ...] = ()

    @property
    def num_executors(self) -> int:
        """Of all pools; one for each replica's ranks that iterate by themselves, where there are none."""
        return sum(pool.replicas for pool in self.pools)

    @property
    def has_roles(self) -> bool:
        """Prompts and outputs are computed by different instances."""
        return any(pool.role != "mixed" for pool in self.pools)

    @property
    def blocks_of_executors(self) -> Int[np.ndarray, " executors"] | None:
        """KV blocks of each, of pools that may differ."""
        if not self.pools:
            return None
        return np.repeat([p.system.num_blocks for p in self.pools], [p.replicas for p in self.pools])

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
    if not scenario.cluster.pools:
        return _resolve_alone(scenario)
    pools = []
    for index, section in enumerate(scenario.cluster.pools):
        one = scenario.of_pool(index)
        try:
            pools.append(Pool(section.role, section.replicas, one, _resolve_alone(one)))
        except InputError as error:
            field = f"cluster.pools[{index}]: {error.field}"
            raise InputError(field, error.value, error.problem, error.remedy) from None
    system = dataclasses.replace(pools[0].system, pools=tuple(pools))
    _check_pools(system, scenario)
    return system


def _check_pools(system: System, scenario: Scenario) -> None:
    """Refuse pools that are not simulated side by side. Raises `InputError`."""
    first = system.scheduler
    for index, pool in enumerate(system.pools):
        s, where = pool.system.scheduler, f"cluster.pools[{index}].engine."
        for name in ("preset", "block_size", "phase_mix", "chunked_prefill", "reserve", "order", "admit", "victim",
                     "async_scheduling", "kv_accounting", "decode_needs_free_block", "waiting_blocked_after_preempt",
                     "num_stages", "gathers"):
            if getattr(s, name) != getattr(first, name):
                raise InputError(where + name, getattr(s, name),
                                 f"differs from the first pool's, {getattr(first, name)!r}",
                                 "pools differ in limits, devices and parallel degrees; give all the same rules")
        if pool.system.plan.data_parallel_size > 1:
            raise InputError(where + "data_parallel_size", pool.system.plan.data_parallel_size,
                             "is not simulated in pools", "use 1, and more replicas for a dense model")
        for name, value, is_wrong, remedy in (
                ("pipeline_parallel_size", s.num_stages, s.num_stages > 1, "use 1"),
                ("scheduling_policy", s.order, s.order != "fcfs", "use 'fcfs'"),
                ("enable_prefix_caching", True, pool.scenario.engine.enable_prefix_caching, "leave it out"),
                ("preset", s.preset, s.phase_mix != "unified" or s.reserve not in ("none", "prompt")
                 or not s.kv_accounting or s.gathers or s.admit != "any_time", "use a preset 'vllm-v1', or 'sarathi'")):
            if is_wrong and system.has_roles:
                raise InputError(where + name, value, "is not simulated with prefill and decode engines", remedy)
        if s.order == "vtc":
            raise InputError(where + "scheduling_policy", s.order, "is not simulated in pools", "use cluster.replicas")


def _resolve_alone(scenario: Scenario) -> System:
    engine = scenario.engine
    plan = Plan(tensor_parallel_size=engine.tensor_parallel_size, data_parallel_size=engine.data_parallel_size,
                pipeline_parallel_size=engine.pipeline_parallel_size,
                enable_expert_parallel=engine.enable_expert_parallel,
                all_to_all=engine.all2all_backend not in ("allgather_reducescatter", "naive"))
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
    if scheduler.order != "fcfs" and (scheduler.async_scheduling or scheduler.phase_mix != "unified"
                                      or scheduler.reserve != "none" or not scheduler.kv_accounting
                                      or (scheduler.order != "priority" and scheduler.admit != "any_time")):
        raise InputError("engine.scheduling_policy", scheduler.order,
                         f"is simulated as vLLM V1 does it, which {scheduler.preset} is not as set here",
                         "use preset = 'vllm-v1@0.9' with async_scheduling = false, or 'fcfs'")
    if not scheduler.kv_accounting and scenario.cluster.router in ("least_kv", "score", "linear"):
        raise InputError("cluster.router", scenario.cluster.router,
                         f"reads KV memory, of which {scheduler.preset} keeps no account",
                         "use 'least_outstanding', or set engine.kv_accounting = true")
    max_model_len = scheduler.max_model_len
    if model is not None and max_model_len > model.max_position:
        raise InputError("engine.max_model_len", max_model_len,
                         f"beyond the {model.max_position} positions of {model.name}", "lower it")
    memory, num_blocks = None, engine.num_gpu_blocks_override
    if num_blocks is None and scheduler.kv_accounting:
        memory = kv_blocks(
            model, device, plan, dtype=scenario.dtype, kv_dtype=scenario.kv_dtype,
            block_size=scheduler.block_size, gpu_memory_utilization=scheduler.gpu_memory_utilization,
            max_num_batched_tokens=min(scheduler.max_num_batched_tokens, max_model_len),
            max_num_seqs=scheduler.max_batch_seqs, max_model_len=max_model_len, rule=scheduler.kv_rule)
        num_blocks = memory.num_blocks
    system = System(scheduler, plan, model, device, memory, num_blocks or 0, max_model_len)
    if system.num_ranks > 1 and scheduler.num_stages > 1:
        raise InputError("engine.pipeline_parallel_size", scheduler.num_stages,
                         "with data-parallel ranks that iterate together is not there yet",
                         "use 1, or engine.data_parallel_size = 1")
    if system.num_ranks > 1 and scheduler.order == "vtc":
        raise InputError("engine.scheduling_policy", "vtc",
                         "is not simulated with data-parallel ranks that iterate together",
                         "use 'fcfs', or engine.data_parallel_size = 1")
    return system


def make_workload(scenario: Scenario, seed: int) -> Workload:
    """Draw or read the requests of one run."""
    return ordered(scenario, _make_workload(scenario, seed), seed)


def ordered(scenario: Scenario, workload: Workload, seed: int) -> Workload:
    """With what the order of the waiting queue goes by: predicted outputs, limits. Raises `InputError`."""
    order, prediction, slo = scenario.engine.scheduling_policy, scenario.workload.prediction, scenario.slo
    if prediction is not None:
        workload = with_predictions(workload, prediction.sigma, seed)
    if order == "sjf" and workload.predicted_tokens is None:
        raise InputError("workload.prediction", None, "missing, and the trace has no predicted_tokens for 'sjf'",
                         "give e.g. { sigma = 0.0 } for exact predictions of output lengths")
    if order != "edf":
        return workload
    own = {t.name: t.deadline_ms or t.ttft_ms for t in scenario.workload.tenants}
    limits_ms = [own.get(name) or slo.e2e_ms or slo.ttft_ms for name in workload.tenant_names]
    if None in limits_ms:
        raise InputError("workload.tenants", workload.tenant_names[limits_ms.index(None)],
                         "has no limit, and scheduling_policy = 'edf' goes by deadlines",
                         "give its deadline_ms or ttft_ms, or those of [slo]")
    return dataclasses.replace(workload, limit_s=np.array(limits_ms)[workload.tenant] / 1e3)


def _make_workload(scenario: Scenario, seed: int) -> Workload:
    w = scenario.workload
    tenants = tuple(Tenant(t.name, t.share, t.priority) for t in w.tenants)
    if w.kind == "trace":
        return read_trace(w.trace, w.format, seed=seed, **w.trace_options())
    arguments = w.generator_arguments()
    if tenants:
        arguments["tenants"] = tenants
    if w.lengths_from is not None:
        arguments["lengths"] = Paired(*read_lengths(w.lengths_from))
    return generator(**arguments).sample(seed, scenario.num_requests)


def check_requests(system: System, workload: Workload) -> None:
    """Refuse requests that no schedule can serve. Raises `InputError` for the first."""
    for pool in system.pools:
        # A prompt is all that a prefill engine holds of a request.
        one = np.ones_like(workload.output_tokens)
        prompts = dataclasses.replace(workload, output_tokens=one, max_tokens=one)
        check_requests(pool.system, prompts if pool.role == "prefill" else workload)
    if system.pools:
        return
    s = system.scheduler
    if not workload.arrival_s[-1] <= MAX_ARRIVAL_S:
        raise InputError("workload", f"last arrival at {workload.arrival_s[-1]:.3g} s",
                         f"is beyond the {MAX_ARRIVAL_S:.0g} s that are simulated", "raise the rate, or replay less")
    prompt = workload.input_tokens.astype(np.int64)
    output, limit = workload.output_tokens.astype(np.int64), workload.max_tokens.astype(np.int64)

    def refuse(is_bad, value, problem, remedy):
        if is_bad.any():
            i = int(np.argmax(is_bad))
            raise InputError(f"workload request {i}", f"{prompt[i]} prompt + {limit[i]} output tokens",
                             problem(int(value[i])), remedy)

    is_all = system.model is not None and system.max_model_len >= system.model.max_position
    refuse(prompt + limit > system.max_model_len, prompt + limit,
           lambda n: f"{n} tokens exceed max_model_len = {system.max_model_len}",
           ("" if is_all else "raise engine.max_model_len, ")
           + "cut outputs with workload.output_limit, or leave such requests out")
    recomputed = prompt + output - 1 if s.reserve in ("none", "prompt", "expected") else prompt
    if not s.chunked_prefill:
        refuse(recomputed > s.max_num_batched_tokens, recomputed,
               lambda n: f"{n} tokens in one iteration exceed max_num_batched_tokens ="
                         f" {s.max_num_batched_tokens}, and prompts are not chunked",
               "raise engine.max_num_batched_tokens, or set engine.enable_chunked_prefill = true")
    if not s.kv_accounting:
        return
    held = {"max_tokens": prompt + limit, "max_model_len": np.full_like(prompt, system.max_model_len),
            "expected": prompt + limit + s.retract_free_tokens}.get(s.reserve, prompt + output - 1)
    blocks = -(-held // s.block_size)
    room = system.num_blocks - s.watermark_blocks(system.num_blocks)
    refuse(blocks > room, blocks,
           lambda n: f"needs {n} KV blocks of {s.block_size} tokens, the pool has {room}",
           "raise engine.gpu_memory_utilization or engine.num_gpu_blocks_override, or leave such requests out")


MAX_ARRIVAL_S = 1e9
"""Thirty years."""


def counter_room(dims: Dims) -> int:
    """Output tokens that the packed completion keys can hold; negative where there are too many slots for any."""
    # A counter runs on for so long before it is wound back.
    return (1 << (31 - dims.slot_bits)) - STEPS_BETWEEN_REBASES * dims.max_jump - 2 * REBASE_COUNTER


def check_counters(dims: Dims, workloads: list[Workload]) -> None:
    """Refuse outputs that the packed completion keys cannot hold. Raises `InputError`."""
    room = counter_room(dims)
    longest = max(int(workload.output_tokens.max()) for workload in workloads)
    if longest > room:
        raise InputError("workload.output", longest,
                         f"output tokens are more than the {max(room, 0)} that {dims.num_slots}"
                         " sequences at once leave room for", "shorten outputs, or lower engine.max_num_seqs")


def kinds_of_pools(system: System) -> list[Pool]:
    """The pools whose engines are alike in nothing but their role, each once."""
    kinds: list[Pool] = []
    for pool in system.pools:
        if all(_of_one(pool) != _of_one(other) for other in kinds):
            kinds.append(pool)
    return kinds


def _of_one(pool: Pool) -> Scenario:
    return msgspec.structs.replace(pool.scenario, cluster=ClusterSection())


def make_cost(scenario: Scenario, system: System, num_slots: int, longest: int, max_tokens: int | None = None
              ) -> AbstractIterationCost | tuple[AbstractIterationCost, ...]:
    """The cost tables, for up to `num_slots` sequences of up to `longest` tokens; with pools of every kind of them.

    max_tokens: of an iteration, where others that share the program need more than this scenario.
    """
    if system.pools:
        return tuple(make_cost(pool.scenario, pool.system, num_slots, longest, max_tokens)
                     for pool in kinds_of_pools(system))
    s = system.scheduler
    most = max(s.most_tokens(num_slots, longest), max_tokens or 0)
    if isinstance(scenario.cost, FittedCost):
        return fitted(*(scenario.cost.rows(kind) for kind in ("prefill", "decode", "mixed")),
                      exact=scenario.cost.exact)
    if isinstance(scenario.cost, ProfiledCost):
        return measured.tables(scenario, s, system.model, system.device, system.plan, num_slots, longest, max_tokens)[0]
    model = roofline(system.model, system.device, system.plan, scenario.dtype, scenario.kv_dtype,
                     host=scenario.cost.host or s.host, distinct_experts=scenario.cost.distinct_experts,
                     moe_backend=scenario.engine.moe_backend, **scenario.cost.overrides)
    return model.tabulate(most, num_slots, cuda_graphs=CUDA_GRAPHS[s.cudagraph_mode],
                          async_scheduling=s.async_scheduling)


def front_end_s(scenario: Scenario, system: System) -> float:
    """Seconds that a request spends outside the engine: in the HTTP server, the tokenizer, the way between."""
    if scenario.cost.front_end_s is not None:
        return scenario.cost.front_end_s
    return 0.0 if isinstance(scenario.cost, FittedCost) else FRONT_ENDS[scenario.cost.host or system.scheduler.host]


def make_source(scenario: Scenario, system: System, workload: Workload | None = None) -> AbstractSource:
    """How requests arrive; workload: instead of the one that the scenario describes."""
    w, outside_s = scenario.workload, front_end_s(scenario, system)
    if w.has_sessions if workload is None else workload.think_s is not None:
        return Sessions(np.float32(outside_s))
    if w.kind == "closed-loop":
        return ClosedLoop(np.int32(w.concurrency), np.float32((w.think_s or 0.0) + outside_s))
    return SortedArrivals()


def make_batching(scenario: Scenario, system: System) -> Batching:
    """Flags and numbers of the scheduler of an instance."""
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
        waiting_blocked_after_preempt=s.waiting_blocked_after_preempt, order=s.order, admit=s.admit,
        async_scheduling=s.async_scheduling, kv_accounting=s.kv_accounting,
        has_context_limit=s.decode_context_limit is not None,
        prefix_caching=scenario.engine.enable_prefix_caching)
    if s.gathers:
        batching = dataclasses.replace(batching, batch_wait_timeout_iters=integer(s.batch_wait_timeout_iters),
                                       batch_wait_tokens=integer(s.batch_wait_tokens))
    if s.num_stages > 1:
        batching = dataclasses.replace(batching, max_batch_seqs=integer(s.max_batch_seqs),
                                       pass_on_arrival=s.pass_on_arrival)
    return batching


def make_params(scenario: Scenario, system: System, cost: AbstractIterationCost | tuple[AbstractIterationCost, ...],
                max_steps: int, workload: Workload | None = None) -> Params:
    """Policies and numbers as the loop takes them; cost: of `make_cost`; workload: instead of the one that the scenario
    describes."""
    groups, group_of = (Group(make_batching(scenario, system), cost),), None
    if system.pools:
        kinds = kinds_of_pools(system)
        groups = tuple(Group(make_batching(pool.scenario, pool.system), one)
                       for pool, one in zip(kinds, cost, strict=True))
        if len(kinds) > 1:
            of_pool = [next(k for k, kind in enumerate(kinds) if _of_one(kind) == _of_one(pool))
                       for pool in system.pools]
            group_of = np.repeat(np.array(of_pool, np.int32), [pool.replicas for pool in system.pools])
    name, weights = scenario.cluster.router, scenario.cluster.router_weights
    if name is None and system.plan.data_parallel_size > 1 and not weights:
        routing = DataParallel()
    else:
        routing = router(name or "round_robin", weights)
    return Params(groups, routing, np.int32(max_steps), make_source(scenario, system, workload), group_of,
                  hand_over=make_hand_over(scenario, system) if system.has_roles else None)


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


def make_hand_over(scenario: Scenario, system: System) -> HandOver:
    """Who computes prompts and who outputs, and the links between them."""
    given = scenario.cluster.transfer or TransferSection()
    replicas = [pool.replicas for pool in system.pools]
    roles = np.repeat([pool.role for pool in system.pools], replicas)
    # More blocks than there are bound nothing.
    share = given.waiting_block_share if given.hand_over == "pull" else 2.0
    most = [max(math.ceil(share * pool.system.num_blocks), 1) for pool in system.pools]
    bytes_per_token, bytes_per_s = transfer_rates(scenario, system)
    try:
        routing = router(given.router, given.router_weights)
    except InputError as error:
        field = error.field.replace("cluster.", "cluster.transfer.")
        raise InputError(field, error.value, error.problem, error.remedy) from None
    return HandOver(
        computes_prompts=roles == "prefill", decodes=roles == "decode", routing=routing,
        most_held=np.repeat(np.array(most, np.int32), replicas),
        seconds_per_token=np.float32(bytes_per_token / bytes_per_s), latency_s=np.float32(1e-6 * given.latency_us),
        layers=np.int32(system.model.layers if given.by_layer else 0))


def transfer_rates(scenario: Scenario, system: System) -> tuple[float, float]:
    """Bytes of KV a token, and bytes a second of a link between engines. Raises `InputError` where they are not known.

    Every rank of the narrower engine sends or takes its part over its own link; what joins devices of different pools
    is the link of a node as far as all pools lie in one (`DeviceSpec.link_among`).
    """
    given = scenario.cluster.transfer or TransferSection()
    if system.model is None:
        raise InputError("model", None, "missing, and the KV cache of a token cannot be known without it",
                         "name a model, also beside a fitted cost")
    width = kv_cache_bytes(scenario.kv_dtype, scenario.dtype, system.model)
    bytes_per_token = system.model.kv_bytes_per_token(width)
    if given.gb_per_s is not None:
        return bytes_per_token, 1e9 * given.gb_per_s
    devices = [pool.system.device for pool in system.pools if pool.role != "mixed"]
    if None in devices:
        raise InputError("cluster.transfer.gb_per_s", None, "missing, and without [device] it cannot be derived",
                         "give the bandwidth of a link between engines")
    ranks = min(pool.system.plan.num_devices for pool in system.pools if pool.role != "mixed")
    return bytes_per_token, ranks * min(d.link_among(2, scenario.num_devices).bytes_per_s for d in devices)


class Prefixes(NamedTuple):
    """Paths of all prompts through their segments (-1 behind the end), and the bounds of these in blocks."""

    paths: Int[np.ndarray, "requests path"]
    bounds: Int[np.ndarray, "requests path+1"]

    @property
    def num_segments(self) -> int:
        """Segments of all of them."""
        return int(self.paths.max(initial=-1)) + 1

    @property
    def num_releases(self) -> int:
        """Entries of the log of releases, if nobody is preempted: all segments of a prompt, and what is behind it."""
        return int((self.paths >= 0).sum()) + len(self.paths)


def make_requests(workload: Workload, dims: Dims, prefixes: Prefixes | None = None, order: str = "fcfs") -> Requests:
    """The workload as the loop reads it, padded; order: of the waiting queue, as of `Batching`."""
    shared = {}
    if prefixes is not None:
        more = dims.path_width - prefixes.paths.shape[1]
        shared = dict(paths=np.pad(prefixes.paths, ((0, 0), (0, more)), constant_values=-1),
                      bounds=np.pad(prefixes.bounds, ((0, 0), (0, more)), mode="edge"),
                      num_segments=dims.num_segments)
    if workload.think_s is not None:
        shared |= dict(successor=workload.successors(), think_s=workload.think_s)
    key = workload.priority
    if order == "sjf":
        key = workload.predicted_tokens
    if order == "edf":
        key = workload.arrival_s + workload.limit_s
    if dims.num_tenants:
        shared["tenant"] = workload.tenant
    return pack_requests(workload.arrival_s, workload.input_tokens, workload.output_tokens, workload.max_tokens,
                         workload.uniforms, dims.num_requests, key, **shared)


def shared_prefixes(workload: Workload, block_size: int) -> Prefixes:
    """The segments that prompts share, for blocks of `block_size` tokens.

    A prompt of whole blocks only may find all but its last block, so there a segment ends too. Raises `InputError`
    where the workload's ids stand for tokens that are not whole blocks. Without ids, turns of sessions share what they
    have in common (`session_prefixes`).
    """
    if workload.prefix_hashes is None and workload.think_s is not None:
        return session_prefixes(workload, block_size)
    if workload.prefix_hashes is None:
        return Prefixes(np.full((len(workload), 1), -1), np.zeros((len(workload), 2), np.int64))
    offsets, per = workload.prefix_offsets.astype(np.int64), workload.prefix_block_size
    tokens = workload.input_tokens.astype(np.int64)
    most = (tokens - 1) // block_size * block_size
    counts = np.minimum(np.diff(offsets), -(-most // per))
    shorter = np.concatenate([workload.prefix_hashes[a:a + n] for a, n in zip(offsets[:-1], counts, strict=True)])
    segments = radix_segments(
        np.concatenate([offsets, offsets[-1] + np.cumsum(counts)]),
        np.concatenate([workload.prefix_hashes, shorter]), np.concatenate([tokens, np.maximum(most, 1)]),
        prefix_block_size=per, block_size=block_size)
    width, count = max(segments.max_path_segments, 1), len(workload)
    paths, bounds = np.full((count, width), -1), np.zeros((count, width + 1), np.int64)
    starts, flat = segments.paths()
    lengths = np.diff(starts)[:count]
    is_in = np.arange(width) < lengths[:, None]
    paths[is_in] = flat[:starts[count]]
    bounds[:, 1:][is_in] = segments.end_blocks[paths[is_in]]
    return Prefixes(paths, np.maximum.accumulate(bounds, axis=1))


def session_prefixes(workload: Workload, block_size: int) -> Prefixes:
    """Segments of growing contexts: what all sessions begin with, then what each turn of a session adds.

    A turn's path goes on through the whole blocks of its answer, of which the last token is never computed; the next
    turn finds them. Where a prompt is shorter than the context before it, the session's context begins anew.
    """
    prompt, session = workload.input_tokens.astype(np.int64), workload.session
    context = prompt + workload.output_tokens
    ends = np.maximum((context - 1) // block_size, 0)
    shared = workload.shared_tokens // block_size
    paths: list[list[int]] = [[] for _ in prompt]
    bounds: list[list[int]] = [[] for _ in prompt]
    num_segments = int(shared > 0)
    # In the order of turns; a path is that of the turn before it, and more.
    before = np.full(len(prompt), -1)
    successors = workload.successors()
    before[successors[successors >= 0]] = np.flatnonzero(successors >= 0)
    for i in np.lexsort((workload.turn, session)).tolist():
        last = before[i]
        if last >= 0 and prompt[i] >= context[last]:
            paths[i], bounds[i] = paths[last].copy(), bounds[last].copy()
        elif shared and prompt[i] > workload.shared_tokens:
            paths[i], bounds[i] = [0], [shared]
        if ends[i] > (bounds[i][-1] if bounds[i] else 0):
            paths[i].append(num_segments)
            bounds[i].append(int(ends[i]))
            num_segments += 1
    width = max(map(len, paths), default=0) or 1
    return Prefixes(
        np.array([path + [-1] * (width - len(path)) for path in paths]),
        np.array([[0, *at, *[at[-1] if at else 0] * (width - len(at))] for at in bounds], np.int64))


def step_limit(workload: Workload, num_ranks: int = 1) -> int:
    """Steps after which a run is stopped; ranks that iterate together take turns."""
    tokens = int(workload.input_tokens.sum()) + int(workload.output_tokens.sum())
    return int(min(1_000 + MAX_STEPS_A_TOKEN * tokens * num_ranks, 2**31 - 1))


