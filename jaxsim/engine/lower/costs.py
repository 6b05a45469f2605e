"""Cost tables of a scenario."""

from jaxsim.cost.base import AbstractIterationCost
from jaxsim.cost.fitted import fitted
from jaxsim.cost.host import hybrid_cost
from jaxsim.cost.rank import CUDA_GRAPHS
from jaxsim.cost.roofline import EXPERT_SKEW, FRONT_ENDS
from jaxsim.engine import measured
from jaxsim.engine.lower.hybrid import price
from jaxsim.engine.lower.systems import Pool, System, kinds_of_pools
from jaxsim.spec.scenario import FittedCost, ProfiledCost, Scenario


def make_cost(scenario: Scenario, system: System, num_slots: int, longest: int, max_tokens: int | None = None,
              is_one_of_many: bool = False) -> AbstractIterationCost | tuple[AbstractIterationCost, ...]:
    """The cost tables, for up to `num_slots` sequences of up to `longest` tokens; with pools of every kind of them.

    max_tokens: of an iteration, where others that share the program need more than this scenario. is_one_of_many: of
    plans whose tables are made one after the other, without a compiled program for each.
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
    if system.hybrid is not None:
        return hybrid_cost(price(scenario, s, system.model, system.device, system.plan), scenario.engine.hybrid,
                           system.hybrid.weights, system.hybrid.host, most, num_slots,
                           expert_skew=scenario.cost.overrides.get("expert_skew", EXPERT_SKEW),
                           cuda_graphs=CUDA_GRAPHS[s.cudagraph_mode], async_scheduling=s.async_scheduling)
    model = price(scenario, s, system.model, system.device, system.plan)
    made = model.tables if is_one_of_many else model.tabulate
    return made(most, num_slots, cuda_graphs=CUDA_GRAPHS[s.cudagraph_mode], async_scheduling=s.async_scheduling)


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
