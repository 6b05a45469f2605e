"""From what a user describes to what the loop runs: scenario -> sizes, policies, cost tables, requests.

`systems` resolves a scenario, `workloads` and `prefixes` make its requests, `checks` refuses those that it cannot
serve, `links`, `costs` and `policies` make the numbers of the loop, `requests` packs the rest.
"""

from jaxsim.engine.lower.checks import (
    MAX_ARRIVAL_S,
    check_contexts,
    check_counters,
    check_outages,
    check_requests,
    check_routing,
    check_transfers,
    counter_room,
    routing_dims,
)
from jaxsim.engine.lower.costs import front_end_s, make_cost
from jaxsim.engine.lower.failures import outage_rows, with_failures
from jaxsim.engine.lower.hybrid import hybrid_facts
from jaxsim.engine.lower.links import (
    flights_of,
    is_max_min,
    migration_rates,
    num_shared_links,
    transfer_rates,
    ways_of,
)
from jaxsim.engine.lower.long_contexts import check_sums, check_target, chunk_records
from jaxsim.engine.lower.policies import (
    make_offload,
    make_params,
    make_patience,
    make_remote_store,
    make_reuse,
    make_slack,
    make_swap,
    moves_of,
    with_counters,
)
from jaxsim.engine.lower.prefixes import Prefixes, shared_prefixes
from jaxsim.engine.lower.requests import make_requests
from jaxsim.engine.lower.systems import (
    Pool,
    System,
    kinds_of_pools,
    offload_blocks,
    remote_blocks,
    resolve_system,
)
from jaxsim.engine.lower.workloads import (
    MAX_STEPS_A_TOKEN,
    WATCHED_S,
    is_split,
    make_workload,
    num_rows,
    ordered,
    parts_of,
    step_limit,
)

__all__ = [
    "MAX_ARRIVAL_S", "MAX_STEPS_A_TOKEN", "WATCHED_S", "Pool", "Prefixes", "System", "check_contexts", "check_counters",
    "check_outages",
    "check_requests", "check_routing", "check_sums", "check_target", "check_transfers", "chunk_records", "counter_room",
    "flights_of",
    "front_end_s", "hybrid_facts", "is_max_min", "is_split", "kinds_of_pools", "make_cost", "make_offload",
    "make_params", "make_patience", "make_remote_store", "make_requests", "make_reuse", "make_slack", "make_swap",
    "make_workload", "migration_rates", "moves_of", "num_rows", "num_shared_links", "offload_blocks", "ordered",
    "outage_rows", "parts_of", "remote_blocks", "resolve_system", "routing_dims", "shared_prefixes", "step_limit",
    "transfer_rates", "ways_of", "with_counters",
    "with_failures",
]
