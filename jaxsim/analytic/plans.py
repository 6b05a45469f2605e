"""Steady states of many systems in one compiled call: plans of one model, whatever their degrees.

A plan decides the shapes of its cost tables: how many ranks meet around experts, how many stages, whether prompts go
round a ring. Here all have the most of each that any has: stages of no layers in front, experts and exchange of no
seconds, a ring of one, and the number of ranks is a number. What is added takes no time, so that every plan has the
steady state that it has alone (`jaxsim.analytic.steady_state`).

    screened(executors, loads, limits)    capacity, state at the load's rate, highest rate within limits, for each

One program for each structure: devices that differ in their kernels of attention, presets that differ in how prompts
are mixed in.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxsim._core.errors import InputError
from jaxsim.analytic.lower import executor_of
from jaxsim.analytic.steady import FULLEST, Executor, Steady, capacity_rps, steady_states
from jaxsim.analytic.workload import Load
from jaxsim.cost.base import AbstractIterationCost, BatchStats, DecodePace
from jaxsim.cost.context_parallel import Ring
from jaxsim.cost.tabulated import DECODE_LAUNCH, MIXED_LAUNCH, SERIAL, TabulatedCost, Together
from jaxsim.engine import lower
from jaxsim.spec.scenario import RooflineCost, Scenario

SHARES = np.linspace(1 / 32, FULLEST, 32, dtype=np.float32)
"""Of the capacity: rates at which limits are looked at; between them states are taken as linear."""

AT_ONCE = 8
"""Plans that are evaluated side by side; the rest waits, so that memory stays small."""


class PlanCost(AbstractIterationCost):
    """Tables of a plan beside which any other of the same model has the same shape.

    tables: of one rank, without what ranks do together, and with the most stages; together: of no seconds where there
    is one rank; ranks: that iterate together.
    """

    tables: TabulatedCost
    together: Together
    ranks: Int[Array, ""]

    def iteration(self, stats: BatchStats) -> Float[Array, ""]:
        """Seconds of one iteration; of several ranks without what they do together, and without their launches."""
        row = self.tables.row(stats.num_decode + stats.num_prefill)
        return jnp.where(self.ranks == 1, self.tables.iteration(stats), row[SERIAL] + self.tables.own_seconds(stats))

    def decode(self, num_sequences: Int[Array, ""], context: Int[Array, ""], shared: Int[Array, ""] | int = 0,
               longest: Int[Array, ""] | int = 0) -> DecodePace:
        """Pace of one rank alone."""
        return self.tables.decode(num_sequences, context, shared, longest)

    def together_seconds(self, is_decode: Bool[Array, ""], tokens: Int[Array, ""], most: Int[Array, ""]
                         ) -> Float[Array, ""]:
        """Experts and exchange."""
        return self.together.seconds(is_decode, tokens, most, self.ranks)

    def host_seconds(self, is_decode: Bool[Array, ""], num_sequences: Int[Array, ""]) -> Float[Array, ""]:
        """Serial and launches, where several ranks wait for them."""
        row = self.tables.row(num_sequences)
        host_s = row[SERIAL] + jnp.where(is_decode, row[DECODE_LAUNCH], row[MIXED_LAUNCH])
        return jnp.where(self.ranks == 1, 0.0, host_s)


def of_scenarios(scenarios: Sequence[Scenario], resolve: Callable[[Scenario], lower.System] = lower.resolve_system
                 ) -> list[Executor | InputError]:
    """An executor each, all with the same shapes where their structure allows; what cannot be is the reason.

    resolve: the system of a scenario; one that keeps them serves who asks again.
    """
    systems: list[lower.System | InputError] = [_resolved(scenario, resolve) for scenario in scenarios]
    able = [s for s in systems if isinstance(s, lower.System)]
    if not able:
        return list(systems)
    batches = max(s.scheduler.max_num_seqs for s in able) + 1
    longest = max(s.max_model_len for s in able)
    tokens = max(s.scheduler.most_tokens(batches - 1, longest) for s in able)
    ranks, stages = max(s.num_ranks for s in able), max(s.num_stages for s in able)
    has_ring = any(s.plan.prefill_context_parallel_size > 1 for s in able)
    found: list[Executor | InputError] = []
    for scenario, system in zip(scenarios, systems, strict=True):
        if isinstance(system, InputError):
            found.append(system)
            continue
        try:
            cost = lower.make_cost(scenario, system, batches - 1, longest, max_tokens=tokens, is_one_of_many=True)
            made = executor_of(scenario, system, _alike(cost, system.num_ranks, stages, has_ring), num_batches=batches)
        except InputError as error:
            found.append(error)
            continue
        found.append(_with_ranks(made, ranks, system.num_ranks))
    return found


def _resolved(scenario: Scenario, resolve: Callable[[Scenario], lower.System]) -> "lower.System | InputError":
    try:
        if not isinstance(scenario.cost, RooflineCost):
            raise InputError("cost.kind", scenario.cost.__struct_config__.tag, "does not know how plans differ",
                             "use a roofline cost, with a model")
        system = resolve(scenario)
        if system.pools:
            raise InputError("cluster.pools", [pool.role for pool in system.pools], "have no closed form",
                             "simulate them, or use cluster.replicas")
        return system
    except InputError as error:
        return error


def _with_ranks(executor: Executor, most: int, ranks: int) -> Executor:
    values = {field: getattr(executor, field) for field in executor.__dataclass_fields__}
    return Executor(**values | {"num_ranks": most, "ranks": jnp.asarray(ranks, float)})


def _alike(cost: TabulatedCost, ranks: int, stages: int, has_ring: bool) -> PlanCost:
    """A plan's tables with as many stages, and everything that others have, of no seconds."""
    dtype = cost.by_tokens.dtype
    own = np.ones(1) if cost.stages is None else np.asarray(cost.stages)
    # In front, as the last stage has the LM head.
    padded = jnp.asarray(np.concatenate([np.zeros(stages - len(own)), own]), dtype)
    ring = cost.ring
    if has_ring and ring is None:
        ring = Ring.of(1, 0, 0.0, 0.0, 0.0)
    none = jnp.zeros_like(cost.by_tokens)
    made = cost.together or Together(jnp.zeros(len(cost.by_sequences), dtype), none, none, jnp.int32(0), 0)
    together = Together(made.by_sequences, made.experts, made.exchange, made.captured, 0)
    tables = TabulatedCost(cost.by_tokens, cost.by_sampled, cost.by_sequences, cost.attention, cost.window, cost.tail,
                           None, padded, ring)
    return PlanCost(tables, together, jnp.asarray(ranks, jnp.int32))


@dataclass(frozen=True)
class Screened:
    """Plans in closed form, in the order they were given.

    states: at the load's rate; rates_rps: up to which the means of TTFT, TPOT and end-to-end latency keep the limits;
    num_programs: compiled for all of them.
    """

    states: list[Steady]
    rates_rps: list[float]
    num_programs: int


def screened(executors: Sequence[Executor], loads: Sequence[Load], limits_s: Sequence[tuple[float | None, ...]]
             ) -> Screened:
    """Steady states of executors, each under its load, in one compiled call for each structure.

    limits_s: of each, on the means of TTFT, TPOT and end-to-end latency; None is none.
    """
    groups: dict[Hashable, list[int]] = {}
    for index, executor in enumerate(executors):
        leaves, tree = jax.tree.flatten(executor)
        groups.setdefault((tree, tuple(np.shape(leaf) for leaf in leaves)), []).append(index)
    limits = [jnp.asarray([np.inf if x is None else x for x in one], float) for one in limits_s]
    states: list[Steady | None] = [None] * len(executors)
    rates = [0.0] * len(executors)
    for members in groups.values():
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *((executors[k], loads[k], limits[k])
                                                                    for k in members))
        found, highest = jax.device_get(_screen(*stacked, min(AT_ONCE, len(members))))
        for row, index in enumerate(members):
            states[index] = jax.tree.map(lambda x, row=row: x[row], found)
            rates[index] = float(highest[row])
    return Screened(states, rates, len(groups))


@eqx.filter_jit
def _screen(executors: Executor, loads: Load, limits: Float[Array, "plans 3"], at_once: int):
    def one(plan: tuple[Executor, Load, Array]):
        executor, load, limits = plan
        capacity = capacity_rps(executor, load)
        made = steady_states(executor, load, jnp.append(load.rate_rps, capacity * SHARES))
        grid = jax.tree.map(lambda x: x[1:], made)
        seconds = jnp.stack([grid.ttft_s, grid.tpot_s, grid.e2e_s])
        room = jnp.min(1 - seconds / limits[:, None], axis=0)
        return jax.tree.map(lambda x: x[0], made), _first_missed(room, capacity)

    return lax.map(one, (executors, loads, limits), batch_size=at_once)


def _first_missed(room: Float[Array, " shares"], capacity: Float[Array, ""]) -> Float[Array, ""]:
    """Requests/s at which room runs out, linear between shares of the capacity; 0 where there is none at the first."""
    is_missed = room <= 0
    at = jnp.argmax(is_missed)
    before = jnp.maximum(at - 1, 0)
    rates = capacity * SHARES
    part = room[before] / jnp.where(room[before] == room[at], 1.0, room[before] - room[at])
    between = rates[before] + (rates[at] - rates[before]) * part
    return jnp.where(~jnp.any(is_missed), capacity, jnp.where(at == 0, 0.0, between))
