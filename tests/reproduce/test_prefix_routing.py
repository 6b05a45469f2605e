"""The capacity law by other means: closed forms, and lists of whole prefixes; what claims say."""

import numpy as np
import pandas as pd
import pytest

from jaxsim.reproduce import prefix_routing as p
from jaxsim.reproduce.claim import NO_GATE, NOT_REPRODUCED, REPRODUCED


def expected(kind: str, ratio: int, num_requests: int = 20_000) -> float:
    """Of requests that come to a cache from g groups, the share with room for k hits, once it is filled."""
    room = p.GROUPS // ratio
    if kind == "blind":
        share, misses = min(room / p.GROUPS, 1.0), p.INSTANCES * min(room, p.GROUPS)
    else:
        groups = np.bincount(np.arange(p.GROUPS) % p.INSTANCES)
        share, misses = float(np.minimum(groups, room).sum() / p.GROUPS), p.GROUPS
    # While a cache fills, up to a miss for every prefix it has room for.
    return 100 * (share - 0.5 * misses / num_requests), 100 * 0.5 * misses / num_requests


@pytest.mark.parametrize("kind", ["blind", "affinity"])
@pytest.mark.parametrize("ratio", [2, 4, 8, 12])
def test_lists_obey_the_law(kind, ratio):
    """Within what filling costs, and three deviations of a count."""
    middle, half = expected(kind, ratio)
    assert abs(p.list_lru(kind, ratio) - middle) < half + 3 * 100 * 0.5 / np.sqrt(20_000)


def test_lists_agree_with_what_is_published():
    """The four that are not the ceiling, within three deviations of a count; the ceiling exactly."""
    for kind, by_ratio in p.PUBLISHED.items():
        for ratio, published in by_ratio.items():
            q = published / 100
            slack = 0 if published == 99.25 else 300 * np.sqrt(q * (1 - q) / 20_000)
            assert p.list_lru(kind, ratio) == pytest.approx(published, abs=slack + 1e-9)


def test_a_point_of_a_percent_decides():
    hits = {kind: {ratio: (value, value) for ratio, value in by.items()} for kind, by in p.PUBLISHED.items()}
    assert {c.verdict for c in p.capacity_claims(hits)} == {REPRODUCED, NO_GATE}
    assert {c.verdict for c in p.capacity_claims({"blind": {4: (24.0, 24.2)}})} == {NO_GATE}
    hits["blind"][2] = hits["blind"][8] = (47.0, 47.0)
    hits["affinity"][2] = (99.24, 99.24)
    verdicts = {c.claim: c.verdict for c in p.capacity_claims(hits)}
    assert sum(v == NOT_REPRODUCED for v in verdicts.values()) == 3


def test_a_store_has_a_row_a_router_and_bandwidth():
    """Means over seeds, of both tiers apart; nobody published them."""
    made = p.study("prefix-routing-store")
    rows = pd.DataFrame([
        {**point, "median_ttft_ms": 20.0 + seed, "p99_ttft_ms": 90.0, "loads.device_share": 0.25,
         "loads.store_share": 0.5} for point in made.points() for seed in range(2)])
    claims = p.store_claims(rows)
    assert len(claims) == len(list(made.points())) == 5 and {claim.verdict for claim in claims} == {NO_GATE}
    assert claims[0].claim.startswith("random, with a store at 3.125 GB/s")
    assert claims[0].ours == (20.5, 90.0, 25.0, 50.0)
    # The same system and requests as without a store.
    bare, behind = (p.study(name).scenario for name in ("prefix-routing-routers", "prefix-routing-store"))
    assert all(bare[section] == behind[section] for section in ("model", "device", "engine", "workload"))


def test_every_router_has_a_row():
    assert len({name for name, _ in p.ROUTERS}) == len(p.ROUTERS) == len(
        p.study("prefix-routing-routers").axes["cluster.router_weights.which"])
