"""From a scenario to an executor and its load."""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

from jaxsim._core.errors import InputError
from jaxsim.analytic.steady import Executor
from jaxsim.analytic.workload import Load, load_of
from jaxsim.cost.base import AbstractIterationCost
from jaxsim.engine import lower
from jaxsim.spec.scenario import Scenario
from jaxsim.workload import Workload

HELD = {"max_tokens": "all", "max_model_len": "max_model_len"}
"""By what admission reserves; otherwise a sequence holds its context."""

NO_POOL_TOKENS = 1e12
"""Where an engine keeps no account of KV memory."""


def of_scenario(scenario: Scenario, *, num_batches: int | None = None) -> tuple[Executor, Load]:
    """Executor and load of a scenario; arrivals that have no rate are refused.

    num_batches: grid of batch sizes, where several executors shall share a shape. Raises `InputError`.
    """
    system = lower.resolve_system(scenario)
    return executor_of(scenario, system, num_batches=num_batches), load_of_scenario(scenario)


def load_of_scenario(scenario: Scenario, draw: Callable[[Scenario, int], Workload] = lower.make_workload) -> Load:
    """Moments of the requests that its first seed draws; draw: its requests, of a seed. Raises `InputError`."""
    kind = scenario.workload.kind
    if kind in ("closed-loop", "batch"):
        raise InputError("workload.kind", kind, "has no rate of arrivals", "use an open arrival process, or a trace")
    if scenario.workload.has_sessions:
        raise InputError("workload.sessions", kind, "arrive as answers come out, which only a simulation tells",
                         "use single requests, or simulate")
    if scenario.workload.images is not None:
        raise InputError("workload.images", None, "have no closed form: whoever encodes them is another queue",
                         "simulate them")
    return load_of(draw(scenario, scenario.seeds[0]), scenario.workload.rate_rps)


def executor_of(scenario: Scenario, system: lower.System, cost: AbstractIterationCost | None = None, *,
                num_batches: int | None = None, num_ranks: int | None = None) -> Executor:
    """The executor of a resolved scenario.

    cost: instead of the scenario's own; num_ranks: data-parallel ranks that iterate together, instead of those that
    share experts.
    """
    if system.pools:
        raise InputError("cluster.pools", [pool.role for pool in system.pools], "have no closed form",
                         "simulate them, or use cluster.replicas")
    for field, value in (("target_batch_time_ms", scenario.engine.target_batch_time_ms),
                         ("kv_parallel_tokens", scenario.engine.kv_parallel_tokens)):
        if value is not None:
            raise InputError(f"engine.{field}", value, "has no closed form of a steady state",
                             "simulate it, or leave it out")
    if scenario.cluster.replicas % (scenario.cluster.variants or 1):
        raise InputError("cluster.variants", scenario.cluster.variants,
                         f"do not divide cluster.replicas = {scenario.cluster.replicas}: some of these have more"
                         " to do than others, which has no closed form",
                         "use as many replicas of each, or simulate it")
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
    # An engine that waits for its oldest batch has everything in it, but for prompts that overflow the token budget.
    in_flight = s.num_stages if s.pass_on_arrival else 1
    numbers = (s.max_num_seqs, s.max_num_batched_tokens, pool, s.block_size, system.max_model_len, executors,
               lower.front_end_s(scenario, system), in_flight)
    return Executor(cost, *(jnp.asarray(np.float64(x), float) for x in numbers), num_batches=batches,
                    num_ranks=num_ranks, is_mixed=s.phase_mix == "unified", held=HELD.get(s.reserve, "context"),
                    is_async=s.async_scheduling)
