"""From what a user describes to what the loop runs: scenario -> sizes, policies, cost tables, requests."""

import dataclasses
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from jaxsim._core.errors import InputError
from jaxsim.cost.base import AbstractIterationCost
from jaxsim.cost.fitted import fitted
from jaxsim.cost.roofline import CUDA_GRAPHS, FRONT_ENDS, roofline
from jaxsim.engine import measured
from jaxsim.engine.common import Group, Params
from jaxsim.engine.loop import REBASE_COUNTER, STEPS_BETWEEN_REBASES
from jaxsim.policy.arrivals import ClosedLoop, SortedArrivals
from jaxsim.policy.batching import Batching
from jaxsim.policy.routing import DataParallel, router
from jaxsim.spec.device import DeviceSpec
from jaxsim.spec.dims import Dims
from jaxsim.spec.memory import MemoryBudget, kv_blocks
from jaxsim.spec.model import ModelSpec
from jaxsim.spec.plan import Plan
from jaxsim.spec.presets import Scheduler, resolve
from jaxsim.spec.scenario import FittedCost, ProfiledCost, Scenario
from jaxsim.state.requests import Requests, pack_requests
from jaxsim.traces import read_lengths, read_trace
from jaxsim.workload.generator import Tenant
from jaxsim.workload.lengths import Paired
from jaxsim.workload.named import generator
from jaxsim.workload.segments import radix_segments
from jaxsim.workload.workload import Workload

MAX_STEPS_A_TOKEN = 4
"""A run that takes more steps than this for every token of its workload is going in circles."""


@dataclass(frozen=True)
class System:
    """A scenario resolved, except for its workload.

    num_blocks: KV blocks of an instance; `memory` their arithmetic where they were derived.
    """

    scheduler: Scheduler
    plan: Plan
    model: ModelSpec | None
    device: DeviceSpec | None
    memory: MemoryBudget | None
    num_blocks: int
    max_model_len: int

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


def resolve_system(scenario: Scenario) -> System:
    """Look everything up, derive the KV pool. Raises `InputError` for whatever does not go together."""
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
    if scheduler.order == "priority" and (scheduler.async_scheduling or scheduler.phase_mix != "unified"
                                          or scheduler.reserve != "none" or not scheduler.kv_accounting):
        raise InputError("engine.scheduling_policy", "priority",
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
    return system


def make_workload(scenario: Scenario, seed: int) -> Workload:
    """Draw or read the requests of one run."""
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


def make_cost(scenario: Scenario, system: System, num_slots: int, longest: int, max_tokens: int | None = None
              ) -> AbstractIterationCost:
    """The cost tables, for up to `num_slots` sequences of up to `longest` tokens.

    max_tokens: of an iteration, where others that share the program need more than this scenario.
    """
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


def make_params(scenario: Scenario, system: System, cost: AbstractIterationCost, max_steps: int) -> Params:
    """Policies and numbers as the loop takes them."""
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
    w, source = scenario.workload, SortedArrivals()
    if w.kind == "closed-loop":
        source = ClosedLoop(integer(w.concurrency), real((w.think_s or 0.0) + front_end_s(scenario, system)))
    name, weights = scenario.cluster.router, scenario.cluster.router_weights
    if name is None and system.plan.data_parallel_size > 1 and not weights:
        routing = DataParallel()
    else:
        routing = router(name or "round_robin", weights)
    return Params((Group(batching, cost),), routing, integer(max_steps), source)


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


def make_requests(workload: Workload, dims: Dims, prefixes: Prefixes | None = None) -> Requests:
    """The workload as the loop reads it, padded."""
    shared = {}
    if prefixes is not None:
        more = dims.path_width - prefixes.paths.shape[1]
        shared = dict(paths=np.pad(prefixes.paths, ((0, 0), (0, more)), constant_values=-1),
                      bounds=np.pad(prefixes.bounds, ((0, 0), (0, more)), mode="edge"),
                      num_segments=dims.num_segments)
    return pack_requests(workload.arrival_s, workload.input_tokens, workload.output_tokens, workload.max_tokens,
                         workload.uniforms, dims.num_requests, workload.priority, **shared)


def shared_prefixes(workload: Workload, block_size: int) -> Prefixes:
    """The segments that prompts share, for blocks of `block_size` tokens.

    A prompt of whole blocks only may find all but its last block, so there a segment ends too. Raises `InputError`
    where the workload's ids stand for tokens that are not whole blocks.
    """
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


def step_limit(workload: Workload, num_ranks: int = 1) -> int:
    """Steps after which a run is stopped; ranks that iterate together take turns."""
    tokens = int(workload.input_tokens.sum()) + int(workload.output_tokens.sum())
    return int(min(1_000 + MAX_STEPS_A_TOKEN * tokens * num_ranks, 2**31 - 1))


