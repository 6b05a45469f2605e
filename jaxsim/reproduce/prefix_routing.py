"""Routing by prefixes: how much of the prompts caches find, blind and with affinity, and the published routers, also
before a store that all instances share.

The capacity law: with a working set of D blocks, blind routing needs caches of C >= D on each instance, affinity of
D / instances. Of requests that are uniform over G groups, a cache that has room for k whole prefixes of the g that come
to it hits k / g of them; cold, each of the g misses once.

Known gaps: of the published simulation, rate, lengths behind the prefix, router and what counts as a hit are not known.
Here a hit is a request that finds the whole prefix, as the published ceiling of 1 - 150 / 20,000 counts; vLLM drops the
end of a prefix first, so of one that no longer fits a part is still found, and tokens hit more than requests.
"""

import functools
from collections import OrderedDict
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pandas as pd
from jaxtyping import Array, Float, Int

from jaxsim._core.errors import InputError
from jaxsim.engine.simulate import simulate
from jaxsim.io.figure import FAINT, INK, drawn, heading
from jaxsim.policy import cache_routing, routing
from jaxsim.reproduce.claim import Claim, Reproduction
from jaxsim.reproduce.runs import simulated, study

DESCRIPTION = "Prefix routing: hit rates blind and with affinity by the size of caches, and routers side by side"

SOURCE = "third-party simulation"

GROUPS, INSTANCES, PREFIX_BLOCKS = 150, 8, 375
RATIOS = (1, 2, 4, 8, 12)
"""D / C of the study's points, in its order."""

PUBLISHED = {"blind": {1: 94.00, 2: 49.26, 8: 11.77}, "affinity": {1: 99.25, 2: 99.25, 8: 95.47}}
"""Hit rates, %; of 4 and 12 there are none."""

POINT = 1.0
"""Tolerance, in points of a percent, for C <= D / 2."""

ROUTERS: tuple[tuple[str, routing.AbstractRouting], ...] = (
    ("round_robin", routing.RoundRobin()),
    ("random", routing.Random()),
    ("power_of_two", routing.PowerOfTwo()),
    ("least_outstanding", routing.LeastOutstanding()),
    ("prefix_hash", cache_routing.PrefixHash()),
    ("cache_aware", cache_routing.CacheAware()),
    ("cache_aware, smallest tree", cache_routing.CacheAware(smallest_tree=np.float32(1))),
    ("kv_aware", cache_routing.KvAware()),
    ("dynamo_kv", cache_routing.DynamoKV()),
    ("weighted_scorers", cache_routing.WeightedScorers()),
)
"""Routers of the comparison, with their defaults."""


class AnyOf(routing.AbstractRouting):
    """One of `ROUTERS`, by number: all are asked, so that they share a program."""

    which: Float[Array, ""] = np.float32(0)
    reads_kv = True
    reads_waiting = True
    reads_prompt = True
    reads_cache = True
    reads_sent = True
    reads_prefill = True
    reads_noise = True
    route_by = "prefix"

    def choose(self, view: routing.View) -> Int[Array, ""]:
        """The answer of the one."""
        return jnp.stack([rule.choose(view) for _, rule in ROUTERS])[self.which.astype(jnp.int32)]


def reproduce(num_seeds: int | None = None) -> Reproduction:
    """All claims; num_seeds: runs of each point instead of the studies' own number."""
    hits = capacity_hits(num_seeds)
    rows = simulated(study("prefix-routing-routers", num_seeds))
    stored = simulated(study("prefix-routing-store", num_seeds))
    claims = (*capacity_claims(hits), *_router_claims(rows), *store_claims(stored))
    return Reproduction(claims, functools.partial(_draw, hits, rows, stored))


# ---- the capacity law


def capacity_hits(num_seeds: int | None) -> dict[str, dict[int, tuple[float, float]]]:
    """By routing and D / C: requests that find their whole prefix, and prefix tokens found, % over all seeds."""
    made = study("prefix-routing-capacity", num_seeds)
    points = list(made.points())
    result = simulate([made.scenario_at(point) for point in points])
    hits: dict[str, dict[int, tuple[float, float]]] = {"blind": {}, "affinity": {}}
    for index, (point, lanes) in enumerate(zip(points, result.lanes, strict=True)):
        stopped = next((lane.fault for lane in lanes if lane.fault), "")
        if stopped:
            raise InputError("study prefix-routing-capacity", f"point {index}", f"has no result ({stopped})",
                             "change the study")
        found = np.concatenate([lane.cached_tokens for lane in lanes])
        tokens = made.scenario_at(point).workload.prefix_groups.tokens
        kind = "blind" if point["cluster"]["router"] == "round_robin" else "affinity"
        hits[kind][RATIOS[index % len(RATIOS)]] = (
            100 * float(np.mean(found >= tokens)), 100 * float(found.sum() / (tokens * len(found))))
    return hits


def capacity_claims(hits: dict[str, dict[int, tuple[float, float]]]) -> list[Claim]:
    """Those with a published number that is a gate, those without, and the ceiling."""
    claims = []
    for kind, by_ratio in hits.items():
        for ratio, (whole, tokens) in by_ratio.items():
            published = PUBLISHED[kind].get(ratio)
            name = f"hit rate, {kind}, D/C = {ratio}, % of requests"
            lists, owns = list_lru(kind, ratio), list_lru(kind, ratio, own_blocks=1)
            remark = (f"of the prefix tokens {tokens:.2f} % are found; lists of prefixes give {lists:.2f} %, and"
                      f" {owns:.2f} % with a block of each request's own, as here")
            if published == _ceiling(20_000):
                claims.append(_claim(f"{name}: the ceiling", published, whole, 0.0, remark))
            elif published is not None and ratio >= 2:
                claims.append(_claim(name, published, whole, round(POINT / published, 4), remark))
            elif published is not None:
                claims.append(_claim(name, published, whole, None,
                                     f"a gate is published for C <= D/2 only; {remark}"))
            else:
                claims.append(_claim(name, None, whole, None, f"not published; {remark}"))
    return claims


def _claim(name: str, paper: Any, ours: Any, tolerance: float | None, reason: str, source: str = SOURCE) -> Claim:
    return Claim(system="prefix-routing", claim=name, source=source, paper=paper, ours=ours, tolerance=tolerance,
                 reason=reason)


def _ceiling(num_requests: int) -> float:
    """Every group misses once."""
    return round(100 * (1 - GROUPS / num_requests), 2)


@functools.cache
def list_lru(kind: str, ratio: int, own_blocks: int = 0, num_requests: int = 20_000, seed: int = 0) -> float:
    """Hit rate, % of requests, of a list of prefixes an instance, the least recently used losing its last blocks first.

    A second opinion, without an engine or time. Groups go to instances in turn with affinity, requests do blindly;
    each request leaves so many blocks of its own behind as well.
    """
    rng = np.random.default_rng(seed)
    lists: list[OrderedDict[int, int]] = [OrderedDict() for _ in range(INSTANCES)]
    free, hits = [GROUPS * PREFIX_BLOCKS // ratio] * INSTANCES, 0
    for number, group in enumerate(rng.integers(0, GROUPS, num_requests).tolist()):
        at = (group if kind == "affinity" else number) % INSTANCES
        there = lists[at].pop(group, 0)
        hits += there == PREFIX_BLOCKS
        free[at] -= PREFIX_BLOCKS - there + own_blocks
        while free[at] < 0:
            oldest, blocks = next(iter(lists[at].items()))
            lost = min(blocks, -free[at])
            free[at] += lost
            lists[at][oldest] -= lost
            if lost == blocks:
                del lists[at][oldest]
        if own_blocks:
            lists[at][GROUPS + number] = own_blocks
        lists[at][group] = PREFIX_BLOCKS
    return 100 * hits / num_requests


# ---- routers side by side


def _router_claims(rows: pd.DataFrame) -> list[Claim]:
    claims = []
    for number, (name, _) in enumerate(ROUTERS):
        mine = rows[rows["cluster.router_weights.which"] == number]
        imbalance = mine["utilisation.most_busy_share"] / mine["utilisation.busy_share"]
        ours = (mine["median_ttft_ms"].mean(), mine["p99_ttft_ms"].mean(), 100 * mine["cached_share"].mean(),
                imbalance.mean())
        claims.append(_claim(
            f"{name}: TTFT p50 and p99, ms; prompt tokens found, %; busiest instance / mean", None,
            tuple(map(float, ours)), None,
            "workload, cost model and load are ours: nobody published all of these routers under one", "none"))
    return claims


GB_PER_S = "cluster.remote_store.gb_per_s"


def store_claims(rows: pd.DataFrame) -> list[Claim]:
    """Of routers before a store that all instances share, by the bandwidth of the links to it."""
    claims = []
    for (number, rate), mine in rows.groupby(["cluster.router_weights.which", GB_PER_S]):
        ours = (mine["median_ttft_ms"].mean(), mine["p99_ttft_ms"].mean(), 100 * mine["loads.device_share"].mean(),
                100 * mine["loads.store_share"].mean())
        claims.append(_claim(
            f"{ROUTERS[int(number)][0]}, with a store at {rate:g} GB/s: TTFT p50 and p99, ms; prompt tokens found on"
            " the device and in the store, %", None, tuple(map(float, ours)), None,
            "workload, cost model, load and store are ours: nobody published routers with and without one", "none"))
    return claims


def _draw(hits: dict[str, dict[int, tuple[float, float]]], rows: pd.DataFrame, stored: pd.DataFrame, path: Path
          ) -> None:
    with drawn(path, figsize=(11, 5)) as figure:
        left, right = figure.subplots(1, 2, width_ratios=(1, 1.3))
        _draw_capacity(left, hits)
        _draw_routers(right, rows, stored)
        heading(figure, "Routing by prefixes: what caches find, and what it is worth")


def _draw_capacity(axis: Any, hits: dict[str, dict[int, tuple[float, float]]]) -> None:
    for kind, colour in (("blind", "#D55E00"), ("affinity", "#0072B2")):
        ratios = list(hits[kind])
        axis.plot(ratios, [hits[kind][r][0] for r in ratios], "o-", color=colour, label=f"{kind}, requests")
        axis.plot(ratios, [hits[kind][r][1] for r in ratios], ":", color=colour, label=f"{kind}, tokens")
        axis.plot(list(PUBLISHED[kind]), list(PUBLISHED[kind].values()), "D", markersize=9, markerfacecolor="none",
                  markeredgecolor=INK, linestyle="none", label="published" if kind == "affinity" else None)
    axis.axvline(INSTANCES, color=FAINT, linewidth=0.8)
    axis.set_xticks(RATIOS)
    axis.set_ylim(0, 105)
    axis.set_title("Eight caches, 150 prefixes")
    axis.set_xlabel("D / C, working set over one cache")
    axis.set_ylabel("found, %")
    axis.legend(loc="center right", bbox_to_anchor=(1.0, 0.45))


def _draw_routers(axis: Any, rows: pd.DataFrame, stored: pd.DataFrame) -> None:
    found = stored.assign(cached_share=stored["loads.device_share"] + stored["loads.store_share"])
    columns = ["median_ttft_ms", "p99_ttft_ms", "cached_share"]
    behind = found.groupby(["cluster.router_weights.which", GB_PER_S])[columns].mean()
    names = [name for name, _ in ROUTERS]
    names += [f"{ROUTERS[int(number)][0]}, store {rate:g} GB/s" for number, rate in behind.index]
    means = pd.concat([rows.groupby("cluster.router_weights.which")[columns].mean(), behind], ignore_index=True)
    place = np.arange(len(names))
    axis.barh(place, means["p99_ttft_ms"], color="#56B4E9", label="p99")
    axis.barh(place, means["median_ttft_ms"], color="#0072B2", label="p50")
    for at, share in zip(place, means["cached_share"], strict=True):
        axis.annotate(f" {100 * share:.0f} %", (means["p99_ttft_ms"].iloc[at], at), va="center", fontsize=8.5,
                      color=INK)
    axis.set_yticks(place, names)
    axis.invert_yaxis()
    axis.set_xscale("log")
    ticks = (20, 50, 100, 200, 500, 1000, 2000)
    axis.set_xticks(ticks, [f"{tick}" for tick in ticks])
    axis.minorticks_off()
    axis.set_xlim(15, 4500)
    axis.set_title("TTFT, and prompt tokens found")
    axis.set_xlabel("ms")
    axis.legend(loc="lower right")
