"""From a scenario to an executor and its load."""

import dataclasses

import jax.numpy as jnp
import msgspec
import numpy as np

from jaxsim._core.errors import InputError
from jaxsim.analytic.steady import Executor
from jaxsim.analytic.workload import Load, load_of
from jaxsim.cost.base import AbstractIterationCost
from jaxsim.engine import lower
from jaxsim.spec.memory import kv_blocks
from jaxsim.spec.scenario import Scenario

HELD = {"max_tokens": "all", "max_model_len": "max_model_len"}
"""By what admission reserves; otherwise a sequence holds its context."""

NO_POOL_TOKENS = 1e12
"""Where an engine keeps no account of KV memory."""


def of_scenario(scenario: Scenario, *, num_batches: int | None = None, stages: int = 1) -> tuple[Executor, Load]:
    """Executor and load of a scenario; arrivals that have no rate are refused.

    num_batches: grid of batch sizes, where several executors shall share a shape. stages: of a pipeline, which a
    scenario cannot name yet: its devices are then `stages` times as many. Raises `InputError`.
    """
    return executor_of(scenario, system_of(scenario, stages), num_batches=num_batches), load_of_scenario(scenario)


def load_of_scenario(scenario: Scenario) -> Load:
    """Moments of the requests that its first seed draws. Raises `InputError`."""
    kind = scenario.workload.kind
    if kind in ("closed-loop", "batch"):
        raise InputError("workload.kind", kind, "has no rate of arrivals", "use an open arrival process, or a trace")
    workload = lower.make_workload(scenario, scenario.seeds[0])
    return load_of(workload, scenario.workload.rate_rps)


def system_of(scenario: Scenario, stages: int = 1) -> lower.System:
    """The scenario resolved, as the event engine has it, with pipeline stages. Raises `InputError`."""
    if stages == 1:
        return lower.resolve_system(scenario)
    # Weights may fit only where they are cut over the stages.
    given = msgspec.structs.replace(scenario.engine, num_gpu_blocks_override=1)
    system = lower.resolve_system(msgspec.structs.replace(scenario, engine=given))
    plan, s = msgspec.structs.replace(system.plan, pipeline_parallel_size=stages).check(system.model), system.scheduler
    memory = kv_blocks(system.model, system.device, plan, dtype=scenario.dtype, kv_dtype=scenario.kv_dtype,
                       block_size=s.block_size, gpu_memory_utilization=s.gpu_memory_utilization,
                       max_num_batched_tokens=min(s.max_num_batched_tokens, system.max_model_len),
                       max_num_seqs=s.max_num_seqs, max_model_len=system.max_model_len, rule=s.kv_rule)
    blocks = scenario.engine.num_gpu_blocks_override or memory.num_blocks
    return dataclasses.replace(system, plan=plan, memory=memory, num_blocks=blocks)


def executor_of(scenario: Scenario, system: lower.System, cost: AbstractIterationCost | None = None, *,
                num_batches: int | None = None, num_ranks: int | None = None) -> Executor:
    """The executor of a resolved scenario.

    cost: instead of the scenario's own; num_ranks: data-parallel ranks that iterate together, instead of those that
    share experts.
    """
    num_ranks = num_ranks or system.num_ranks
    s = system.scheduler
    batches = num_batches or s.max_num_seqs + 1
    if batches <= s.max_num_seqs:
        raise InputError("num_batches", batches, f"does not hold max_num_seqs = {s.max_num_seqs}",
                         "give at least one more")
    if cost is None:
        cost = lower.make_cost(scenario, system, batches - 1, system.max_model_len)
    pool = system.num_blocks * s.block_size * (1 - s.watermark) if s.kv_accounting else NO_POOL_TOKENS
    executors = scenario.cluster.replicas * system.plan.data_parallel_size // num_ranks
    numbers = (s.max_num_seqs, s.max_num_batched_tokens, pool, s.block_size, system.max_model_len, executors,
               lower.front_end_s(scenario, system), system.plan.pipeline_parallel_size)
    return Executor(cost, *(jnp.asarray(np.float64(x), float) for x in numbers), num_batches=batches,
                    num_ranks=num_ranks, is_mixed=s.phase_mix == "unified", held=HELD.get(s.reserve, "context"),
                    is_async=s.async_scheduling)
