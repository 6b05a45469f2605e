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
from jaxsim.engine.common import MAX_SPAN_S, Group, Params
from jaxsim.engine.loop import REBASE_COUNTER, STEPS_BETWEEN_REBASES
from jaxsim.kernels import clock
from jaxsim.policy.arrivals import AbstractSource, ClosedLoop, PartArrivals, Sessions, SortedArrivals
from jaxsim.policy.batching import Batching
from jaxsim.policy.cache_routing import PREFIX_TOKENS
from jaxsim.policy.clients import UNBOUNDED, Clients, backoffs, patience
from jaxsim.policy.encoding import Encoder, Encoding
from jaxsim.policy.fairness import OUTPUT_PRICE, PROMPT_PRICE, TokenCounters, most_ahead, token_counters
from jaxsim.policy.hand_over import HandOver
from jaxsim.policy.migration import Migration
from jaxsim.policy.routing import AbstractRouting, DataParallel, router
from jaxsim.policy.scaling import Scaling
from jaxsim.policy.swap import DRAWN_BITS, Swap
from jaxsim.spec.device import DeviceSpec
from jaxsim.spec.dims import Dims
from jaxsim.spec.engine import SwapSection
from jaxsim.spec.memory import MemoryBudget, kv_blocks
from jaxsim.spec.model import ModelSpec
from jaxsim.spec.plan import Plan, kv_cache_bytes
from jaxsim.spec.presets import Scheduler, resolve
from jaxsim.spec.scenario import ClusterSection, FittedCost, ProfiledCost, Scenario
from jaxsim.spec.sections import AdmissionSection, ClientSection, TransferSection, WorkloadSection
from jaxsim.spec.vision import EMBEDDING_BYTES
from jaxsim.state.requests import Images, Requests, pack_requests
from jaxsim.traces import read_lengths, read_trace
from jaxsim.workload import ring
from jaxsim.workload.generator import Tenant
from jaxsim.workload.lengths import Paired
from jaxsim.workload.named import generator
from jaxsim.workload.predictions import with_predictions
from jaxsim.workload.segments import radix_segments
from jaxsim.workload.streams import Stream, stream_key, uniforms
from jaxsim.workload.workload import Workload

MAX_STEPS_A_TOKEN = 4
"""A run that takes more steps than this for every token of its workload is going in circles."""


@dataclass(frozen=True)
class System:
    """A scenario resolved, except for its workload.

    num_blocks: KV blocks of an instance; `memory` their arithmetic where they were derived. pools: where a cluster has
    any, all of them; the rest is then the first's. swap: host memory that victims move to, if they do.
    """

    scheduler: Scheduler
    plan: Plan
    model: ModelSpec | None
    device: DeviceSpec | None
    memory: MemoryBudget | None
    num_blocks: int
    max_model_len: int
    pools: tuple["Pool", ...] = ()
    swap: SwapSection | None = None

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
        system = _resolve_alone(scenario)
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
    system = dataclasses.replace(first.system, pools=tuple(pools))
    _check_pools(system, scenario)
    _check_caches(scenario, system)
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
                ("async_scheduling", True, s.async_scheduling and system.has_parts,
                 "set it to false, or use preset 'vllm-v1@0.9'")):
            if is_wrong and system.has_roles:
                field = where + name if name in scenario.cluster.pools[index].engine else f"engine.{name}"
                raise InputError(field, value, "is not simulated with prefill and decode engines", remedy)
        if s.order == "vtc":
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
    system = System(scheduler, plan, model, device, memory, num_blocks or 0, max_model_len, swap=engine.swap)
    _check_swap(scenario, system)
    if system.num_ranks > 1 and scenario.has_clients:
        raise InputError("engine.data_parallel_size", plan.data_parallel_size,
                         "with ranks that iterate together is not simulated where requests end without an answer",
                         "use 1, or leave out workload.client and cluster.admission")
    if system.num_ranks > 1 and scheduler.num_stages > 1:
        raise InputError("engine.pipeline_parallel_size", scheduler.num_stages,
                         "with data-parallel ranks that iterate together is not there yet",
                         "use 1, or engine.data_parallel_size = 1")
    _check_caches(scenario, system)
    if system.num_ranks > 1 and scheduler.order == "vtc":
        raise InputError("engine.scheduling_policy", "vtc",
                         "is not simulated with data-parallel ranks that iterate together",
                         "use 'fcfs', or engine.data_parallel_size = 1")
    return system


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
    reads_caches = routing.reads_cache or routing.reads_sent or routing.reads_prefill
    if reads_caches and (system.num_ranks > 1 or system.scheduler.num_stages > 1):
        what = "data-parallel ranks that iterate together" if system.num_ranks > 1 else "pipeline stages"
        raise InputError("cluster.router", scenario.cluster.router, f"is not simulated with {what} yet",
                         "use 'prefix_hash', or 'least_outstanding'")


def _knows(routing: AbstractRouting) -> bool:
    """Whether a router reads anything of `jaxsim.engine.caches`, or random numbers or hashes of its own."""
    return bool(routing.reads_cache or routing.reads_sent or routing.reads_prefill or routing.reads_noise
                or routing.route_by)


def routing_dims(routing: AbstractRouting | None, dims: Dims) -> Dims:
    """Sizes with what a router reads, where there is anything to choose."""
    if routing is None or dims.all_ranks == 1:
        return dims
    return dataclasses.replace(dims, tracks_prefill=bool(routing.reads_prefill), tracks_sent=bool(routing.reads_sent),
                               has_noise=bool(routing.reads_noise), route_by=routing.route_by)


def check_routing(dims: Dims, routing: AbstractRouting) -> None:
    """Refuse a router that reads what a run made for another does not keep. Raises `InputError`."""
    is_there = (dims.num_segments or not routing.reads_cache) and routing_dims(routing, dims) == dims
    if dims.all_ranks > 1 and not is_there:
        raise InputError("routing", type(routing).__name__, "reads what this scenario does not keep",
                         "give the scenario that router, or one that reads no caches, sessions or noise")


TREE_TOKENS = 1 << 24
"""Tokens that the tree of `cache_aware` holds of an instance: SGLang's 2^26 characters, at four a token."""


def check_tracked(dims: Dims, workloads: list[Workload]) -> None:
    """Refuse workloads that a router cannot follow. Raises `InputError`."""
    for workload in workloads:
        if dims.route_by == "session" and workload.session is None:
            raise InputError("cluster.router", "session_affinity", "needs sessions, and the workload has none",
                             "give workload.sessions, or use 'prefix_hash'")
        tokens = int(workload.input_tokens.astype(np.int64).sum())
        if dims.tracks_sent and tokens > TREE_TOKENS * dims.all_ranks and _distinct_tokens(workload) > TREE_TOKENS:
            raise InputError("workload.num_requests", len(workload),
                             f"has prompts of more than the {TREE_TOKENS:,} distinct tokens that the router's tree of"
                             " an instance holds before it forgets, which is not simulated", "simulate fewer")


def _distinct_tokens(workload: Workload) -> int:
    """Of all prompts, at most: blocks that several have in common count once."""
    tokens = int(workload.input_tokens.astype(np.int64).sum())
    if workload.prefix_hashes is None:
        return tokens
    repeated = len(workload.prefix_hashes) - len(np.unique(workload.prefix_hashes))
    return tokens - repeated * workload.prefix_block_size
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
    if host_blocks(scenario, system) < 1:
        raise InputError("engine.swap.space_gb", system.swap.space_gb,
                         f"holds not one KV block of {_swap_block_bytes(scenario, system):,.0f} bytes",
                         "raise it, or leave engine.swap out: preempted requests are recomputed")


def _swap_block_bytes(scenario: Scenario, system: System) -> float:
    """Of a KV block on one device."""
    width = kv_cache_bytes(scenario.kv_dtype, scenario.dtype, system.model)
    per_token = system.model.kv_bytes_per_token(width, system.plan.tensor_parallel_size)
    return system.scheduler.block_size * per_token


def host_blocks(scenario: Scenario, system: System) -> int:
    """KV blocks of host memory."""
    return min(int(1e9 * system.swap.space_gb / _swap_block_bytes(scenario, system)), 1 << 30)


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
        block_copy_bytes=real(_swap_block_bytes(scenario, system) / (2 * layers)), bytes_per_s=real(link),
        dispatch_s=real(1e-6 * given.dispatch_us), launch_s=real(1e-6 * given.launch_us),
        run_blocks=integer(given.run_blocks), is_async=np.bool_(given.asynchronous), reuse=np.bool_(given.reuse),
        **drawn)


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
    return with_images(generator(**arguments).sample(seed, scenario.num_requests), w, seed)


def with_images(workload: Workload, section: WorkloadSection, seed: int) -> Workload:
    """The same with the images of the section, which are in front of the text of a prompt."""
    images = section.images
    if images is None:
        return workload
    least, most = images.range
    draws = uniforms(stream_key(seed, Stream.IMAGES), len(workload), 2)[:, 0]
    number = np.minimum(least + (draws * (most - least + 1)).astype(np.int64), most)
    tokens = number * images.tiles_per_image * images.tokens_per_tile
    return dataclasses.replace(workload, input_tokens=workload.input_tokens + tokens, num_images=number,
                               tiles_per_image=images.tiles_per_image)


def is_split(scenario: Scenario) -> bool:
    """Whether the images of a request are encoded apart."""
    return scenario.cluster.encode is None or scenario.cluster.encode.split_images


def parts_of(workload: Workload, is_split: bool) -> tuple[Int[np.ndarray, " parts"], Int[np.ndarray, " parts"]]:
    """Of each part of the images of a request, whose it is and its tiles."""
    number = workload.num_images
    count = number if is_split else np.minimum(number, 1)
    whose = np.repeat(np.arange(len(workload)), count)
    return whose, (np.ones_like(number) if is_split else number)[whose] * workload.tiles_per_image


def num_rows(scenario: Scenario, system: System, workload: Workload) -> int:
    """Requests, and the parts of images that others encode."""
    return len(workload) + (len(parts_of(workload, is_split(scenario))[0]) if system.has_parts else 0)


def check_requests(system: System, workload: Workload) -> None:
    """Refuse requests that no schedule can serve. Raises `InputError` for the first."""
    for pool in system.pools:
        if pool.role == "encode":
            continue
        # A prompt is all that a prefill engine holds of a request.
        one = np.ones_like(workload.output_tokens)
        prompts = dataclasses.replace(workload, output_tokens=one, max_tokens=one)
        check_requests(pool.system, prompts if pool.role == "prefill" else workload)
    if system.pools:
        return
    s = system.scheduler
    if workload.num_images is not None and (s.num_stages > 1 or system.num_ranks > 1):
        raise InputError("workload.images", int(workload.num_images.max()),
                         "are not simulated with pipeline stages or ranks that iterate together",
                         "use engine.pipeline_parallel_size = 1 and no expert parallelism")
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
    if s.decode_context_limit is not None:
        refuse(prompt + output > s.decode_context_limit, prompt + output,
               lambda n: f"{n} tokens of context exceed decode_context_limit = {s.decode_context_limit}, so it would"
                         " never decode", "raise engine.decode_context_limit, or leave such requests out")
    if not s.kv_accounting:
        return
    held = {"max_tokens": prompt + limit, "max_model_len": np.full_like(prompt, system.max_model_len),
            "expected": prompt + limit + s.retract_free_tokens}.get(s.reserve, prompt + output - 1)
    # Who comes back from host memory wants a block beyond its own.
    blocks = -(-held // s.block_size) + (system.swap is not None)
    if system.swap is not None and system.swap.redraw is not None and len(prompt) >= MOST_DRAWN:
        raise InputError("engine.swap.redraw", len(prompt), f"requests are more than the {MOST_DRAWN - 1} whose"
                         " priorities can be drawn", "leave it out, or simulate in parts")
    room = system.num_blocks - s.watermark_blocks(system.num_blocks)
    refuse(blocks > room, blocks,
           lambda n: f"needs {n} KV blocks of {s.block_size} tokens, the pool has {room}",
           "raise engine.gpu_memory_utilization or engine.num_gpu_blocks_override, or leave such requests out")


MOST_DRAWN = 1 << 18
"""Requests whose priority and order of arrival are one word."""

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
    check_tracked(dims, workloads)
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


def _of_one(pool: Pool) -> tuple[Scenario, bool]:
    return msgspec.structs.replace(pool.scenario, cluster=ClusterSection()), pool.role == "encode"


def make_cost(scenario: Scenario, system: System, num_slots: int, longest: int, max_tokens: int | None = None
              ) -> AbstractIterationCost | tuple[AbstractIterationCost, ...]:
    """The cost tables, for up to `num_slots` sequences of up to `longest` tokens; with pools of every kind of them.

    max_tokens: of an iteration, where others that share the program need more than this scenario.
    """
    if system.pools:
        return tuple(_encoding_cost(pool) if pool.role == "encode" else
                     make_cost(pool.scenario, pool.system, num_slots, longest, max_tokens)
                     for pool in kinds_of_pools(system))
    s = system.scheduler
    most = max(s.most_tokens(num_slots, longest), max_tokens or 0)
    if isinstance(scenario.cost, FittedCost):
        head = scenario.cost.head and (scenario.cost.head.a, scenario.cost.head.c)
        return fitted(*(scenario.cost.rows(kind) for kind in ("prefill", "decode", "mixed")),
                      exact=scenario.cost.exact, head=head)
    if isinstance(scenario.cost, ProfiledCost):
        return measured.tables(scenario, s, system.model, system.device, system.plan, num_slots, longest, max_tokens)[0]
    model = roofline(system.model, system.device, system.plan, scenario.dtype, scenario.kv_dtype,
                     host=scenario.cost.host or s.host, distinct_experts=scenario.cost.distinct_experts,
                     moe_backend=scenario.engine.moe_backend, **scenario.cost.overrides)
    return model.tabulate(most, num_slots, cuda_graphs=CUDA_GRAPHS[s.cudagraph_mode],
                          async_scheduling=s.async_scheduling)


def _encoding_cost(pool: Pool) -> AbstractIterationCost:
    """Of a pool that encodes; a tile is a block of tokens there."""
    given = pool.scenario.cluster.encode
    row = (1e-3 * given.base_ms, 1e-3 * given.tile_ms / pool.system.scheduler.block_size, 0.0, 0.0, 0.0)
    return fitted(row, row)


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
    if system.swap is not None:
        batching = dataclasses.replace(batching, swap=make_swap(scenario, system))
    if s.gathers:
        batching = dataclasses.replace(batching, batch_wait_timeout_iters=integer(s.batch_wait_timeout_iters),
                                       batch_wait_tokens=integer(s.batch_wait_tokens))
    if s.num_stages > 1 and not s.pass_when_stage_free:
        batching = dataclasses.replace(batching, max_batch_seqs=integer(s.max_batch_seqs),
                                       pass_on_arrival=s.pass_on_arrival)
    return batching


def make_params(scenario: Scenario, system: System, cost: AbstractIterationCost | tuple[AbstractIterationCost, ...],
                max_steps: int, workload: Workload | None = None) -> Params:
    """Policies and numbers as the loop takes them; cost: of `make_cost`; workload: instead of the one that the scenario
    describes."""
    groups, group_of = (Group(make_batching(scenario, system), cost),), None
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
            of_pool = [next(k for k, kind in enumerate(kinds) if _of_one(kind) == _of_one(pool))
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
                  encoder=make_encoder(scenario, system) if has_encoder else None)


WAITING_BLOCK_SHARE = 0.05
"""Of a pool. Source: `waiting_block_prop_threshold` of LLMServe/DistServe (`jaxsim.policy.hand_over`)."""


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
    try:
        dealing = router(given.router, {})
    except InputError as error:
        raise InputError("cluster.encode.router", error.value, error.problem, error.remedy) from None
    width = given.embedding_width or system.model.hidden
    num_bytes = images.tokens_per_tile * width * EMBEDDING_BYTES
    count = system.num_executors
    most = math.ceil(given.waiting_tile_share * given.cache_tiles)
    return Encoding(
        encodes=np.repeat([pool.role == "encode" for pool in system.pools], [pool.replicas for pool in system.pools]),
        dealing=dealing, cache_tiles=np.full(count, given.cache_tiles, np.int32),
        most_tiles=np.full(count, most, np.int32),
        seconds_per_tile=np.float32(num_bytes / transfer_rates(scenario, system)[1]))


def make_encoder(scenario: Scenario, system: System) -> Encoder:
    """Those that compute prompts encode images too."""
    given, count = scenario.cluster.encode, system.num_executors or scenario.cluster.replicas * system.num_independent
    return Encoder(np.full(count, 1e-3 * given.base_ms, np.float32), np.full(count, 1e-3 * given.tile_ms, np.float32))


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
    share = (given.waiting_block_share or WAITING_BLOCK_SHARE) if given.hand_over == "pull" else 2.0
    most = [max(math.ceil(share * pool.system.num_blocks), 1) for pool in system.pools]
    bytes_per_token, bytes_per_s = transfer_rates(scenario, system)
    try:
        routing = router(given.router, given.router_weights)
    except InputError as error:
        field = error.field.replace("cluster.", "cluster.transfer.")
        raise InputError(field, error.value, error.problem, error.remedy) from None
    if _knows(routing):
        raise InputError("cluster.transfer.router", given.router,
                         "chooses by prompts, which decode engines do not keep",
                         "use 'least_outstanding', or another that reads loads only")
    return HandOver(
        computes_prompts=(roles == "prefill") | (roles == "encode"), decodes=roles == "decode", routing=routing,
        most_held=np.repeat(np.array(most, np.int32), replicas),
        seconds_per_token=np.float32(bytes_per_token / bytes_per_s), latency_s=np.float32(1e-6 * given.latency_us),
        layers=np.int32(system.model.layers if given.by_layer else 0))


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


def on_grid(seconds: float) -> float:
    """A duration as the engine's clock holds it, in a float32: both it and sums of it are then exact."""
    return float(np.float32(np.round(seconds / clock.GRID_S) * clock.GRID_S))


def migration_rates(scenario: Scenario, system: System) -> tuple[float, float]:
    """Bytes of KV a token, and bytes a second out of or into an engine. Raises `InputError` where they are not
    known.
    """
    given, field = scenario.cluster.migration, "cluster.migration.gb_per_s"
    if system.model is None:
        raise InputError("model", None, "missing, and the KV cache of a token cannot be known without it",
                         "name a model, also beside a fitted cost")
    width = kv_cache_bytes(scenario.kv_dtype, scenario.dtype, system.model)
    bytes_per_token = system.model.kv_bytes_per_token(width)
    if given.gb_per_s is not None:
        return bytes_per_token, 1e9 * given.gb_per_s
    if system.device is None:
        raise InputError(field, None, "missing, and without [device] it cannot be derived",
                         "give the bandwidth of a link between engines")
    link = system.device.link_among(2, scenario.num_devices)
    return bytes_per_token, system.plan.num_devices * link.bytes_per_s


def transfer_rates(scenario: Scenario, system: System) -> tuple[float, float]:
    """Bytes of KV a token, and bytes a second of a link between engines. Raises `InputError` where they are not known.

    Every rank of the narrower engine sends or takes what it holds over its own link: its part of the KV heads, or one
    that others hold too, or all of MLA's latent. What joins devices that are alike is the link of a node as far as all
    pools lie in one (`DeviceSpec.link_among`); different ones are in different nodes.
    """
    given = scenario.cluster.transfer or TransferSection()
    if not system.scheduler.kv_accounting and given.gb_per_s is None:
        # Where KV has no size it takes no time.
        return 0.0, 1.0
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
    ranks = min(pool.system.plan.tensor_parallel_size for pool in system.pools if pool.role != "mixed")
    # Links that carry the same twice are no faster for it.
    parts = bytes_per_token / system.model.kv_bytes_per_token(width, ranks)
    span = scenario.num_devices if all(d == devices[0] for d in devices) else math.inf
    return bytes_per_token, parts * min(d.link_among(2, span).bytes_per_s for d in devices)


def check_transfers(scenario: Scenario, system: System, workload: Workload) -> None:
    """Refuse links so slow that the clock cannot tell when a transfer ends. Raises `InputError`."""
    if not system.has_roles:
        return
    given, (bytes_per_token, bytes_per_s) = scenario.cluster.transfer, transfer_rates(scenario, system)
    latency_s = 1e-6 * given.latency_us if given else 0.0
    seconds = latency_s + workload.input_tokens * (bytes_per_token / bytes_per_s)
    for what, value, most in (("one transfer", seconds.max(), MAX_SPAN_S),
                              ("all transfers, one after the other", seconds.sum(), MAX_ARRIVAL_S)):
        if not value <= most:
            raise InputError("cluster.transfer", f"{value:.3g} s for {what}",
                             f"is beyond the {most:g} s that are simulated",
                             "raise cluster.transfer.gb_per_s, or lower cluster.transfer.latency_us")


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


def make_requests(workload: Workload, dims: Dims, prefixes: Prefixes | None = None, *,
                  patience: Int[np.ndarray, "requests 4"] | None = None, is_split: bool = True,
                  order: str = "fcfs") -> Requests:
    """The workload as the loop reads it, padded. patience: of `make_patience`; is_split: images of a request are
    encoded apart; order: of the waiting queue, as of `Batching`."""
    shared = {} if patience is None else dict(patience=patience)
    if workload.num_images is not None and (dims.has_parts or dims.has_encoder):
        none = np.zeros(0, np.int64)
        whose, tiles = parts_of(workload, is_split) if dims.has_parts else (none, none)
        shared["images"] = Images(workload.num_images * workload.tiles_per_image, whose, tiles, dims.block_size)
    if prefixes is not None:
        more = dims.path_width - prefixes.paths.shape[1]
        shared |= dict(paths=np.pad(prefixes.paths, ((0, 0), (0, more)), constant_values=-1),
                      bounds=np.pad(prefixes.bounds, ((0, 0), (0, more)), mode="edge"),
                      num_segments=dims.num_segments)
    if dims.route_by == "prefix":
        shared["home"] = ring.homes(ring.prefix_keys(prefixes.paths, prefixes.bounds, workload.input_tokens,
                                                     PREFIX_TOKENS, dims.block_size), dims.all_ranks)
    if dims.route_by == "session":
        shared["home"] = ring.homes(workload.session, dims.all_ranks)
    if dims.has_noise:
        shared["noise"] = ring.gumbels(workload.uniforms, dims.all_ranks)
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
                         workload.uniforms, dims.num_requests, key, has_urgent=dims.has_urgent, **shared)


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
    if workload.num_images is not None:
        # Steps of the parts: dealt, begun, ended, accepted, delivered.
        tokens += 8 * int(workload.num_images.sum())
    return int(min(1_000 + MAX_STEPS_A_TOKEN * tokens * num_ranks, 2**31 - 1))


