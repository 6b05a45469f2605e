"""What each tenant is served, and how evenly."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from jaxsim.metrics.lane import LaneResult
from jaxsim.metrics.window import share_inside
from jaxsim.spec.scenario import Scenario
from jaxsim.spec.workload import TenantSection

FAIRNESS_WINDOWS = 10

TOKEN_WEIGHTS = (1.0, 2.0)
"""Service of a prompt token and of an output token, as in the experiments of Sheng et al., OSDI 2024."""


def token_weights(scenario: Scenario) -> tuple[float, float]:
    """Service of a prompt token and of an output token, as the scenario counts it."""
    given = scenario.engine.input_token_weight, scenario.engine.output_token_weight
    return tuple(usual if own is None else own for own, usual in zip(given, TOKEN_WEIGHTS, strict=True))


def service(lane: LaneResult | Any, start_s: float, end_s: float, token_weights: tuple[float, float] = TOKEN_WEIGHTS
            ) -> Float[np.ndarray, " tenants"]:
    """What every tenant got between two times, in weighted tokens: those of a prompt spread evenly from its first
    iteration to its first token, those of an output from there to its end. Of an unfinished request only what it has
    both ends of counts.
    """
    inside = [np.nan_to_num(share_inside(first, last, start_s, end_s), nan=0.0) for first, last in (
        (lane.scheduled_s, lane.first_token_s), (lane.first_token_s, lane.finish_s))]
    tokens = (token_weights[0] * inside[0] * lane.input_tokens + token_weights[1] * inside[1] * lane.output_tokens)
    return np.bincount(lane.tenant, tokens, len(lane.tenant_names))


def fairness_of(lane: LaneResult | Any, tenants: Sequence[TenantSection] = (),
                token_weights: tuple[float, float] = TOKEN_WEIGHTS) -> dict[str, float | None]:
    """How evenly tenants were served while requests arrived, each by its weight.

    jain_index: Jain's (sum x)^2 / (n sum x^2) of x = service / fair share, which is the weighted max-min share of all
    that was served (`fair_shares`): 1 where everybody got theirs, 1/n where one got all. max_service_gap: over
    `FAIRNESS_WINDOWS` equal windows from the first arrival to the last, the largest difference of service / weight
    between two tenants that both have somebody waiting all through a window; None where there are no two such.

    Source: Jain, Chiu, Hawe, DEC-TR-301, 1984; Sheng et al., OSDI 2024 (arXiv 2401.00588), for the gap.
    """
    given = {t.name: t.weight for t in tenants}
    weight = np.array([given.get(name, 1.0) for name in lane.tenant_names])
    start_s, end_s = float(np.nanmin(lane.arrival_s)), float(np.nanmax(lane.arrival_s))
    served = service(lane, start_s, end_s, token_weights)
    is_there = ~np.isnan(lane.arrival_s)
    demand = np.bincount(lane.tenant[is_there], (token_weights[0] * lane.input_tokens + token_weights[1]
                                                 * lane.output_tokens)[is_there], len(weight))
    due = fair_shares(served.sum(), demand, weight)
    each = served[due > 0] / due[due > 0]
    index = float(each.sum() ** 2 / (len(each) * (each**2).sum())) if each.any() else None
    gap, edges = None, np.linspace(start_s, end_s, FAIRNESS_WINDOWS + 1)
    until_s = np.where(np.isnan(lane.scheduled_s), np.inf, lane.scheduled_s)
    spells = [_spells(lane.arrival_s[lane.tenant == k], until_s[lane.tenant == k]) for k in range(len(weight))]
    for low, high in zip(edges[:-1], edges[1:], strict=True):
        is_backlogged = np.array([bool(np.any((begin <= low) & (end >= high))) for begin, end in spells])
        if is_backlogged.sum() > 1 and high > low:
            among = (service(lane, low, high, token_weights) / weight)[is_backlogged]
            gap = max(gap or 0.0, float(among.max() - among.min()))
    return {"jain_index": index, "max_service_gap": gap}


def fair_shares(total: float, demand: Float[np.ndarray, " tenants"], weight: Float[np.ndarray, " tenants"]
                ) -> Float[np.ndarray, " tenants"]:
    """Weighted max-min shares: in parts by weight, but to nobody more than it asks for, which goes to the others."""
    shares, left, weights = np.zeros(len(demand)), float(total), float(weight.sum())
    for k in np.argsort(demand / weight, kind="stable"):
        shares[k] = min(demand[k], left * weight[k] / weights)
        left, weights = left - shares[k], weights - weight[k]
    return shares


def _spells(begin_s: Float[np.ndarray, " requests"], end_s: Float[np.ndarray, " requests"]
            ) -> tuple[np.ndarray, np.ndarray]:
    """Begins and ends of the times in which at least one of these waits."""
    is_there = ~np.isnan(begin_s)
    order = np.argsort(begin_s[is_there], kind="stable")
    begin_s, end_s = begin_s[is_there][order], np.maximum.accumulate(end_s[is_there][order])
    is_new = np.concatenate([np.ones(min(len(begin_s), 1), bool), begin_s[1:] > end_s[:-1]])
    return begin_s[is_new], end_s[np.concatenate([is_new[1:], np.ones(min(len(begin_s), 1), bool)])]
