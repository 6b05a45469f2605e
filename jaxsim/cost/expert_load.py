"""How tokens fall on the ranks that share experts: the busiest rank, redundant experts, ranks and nodes a token visits.

    busiest     mu ((1 + p) P(w) - p),  w^2 = 1 / (2 mu p (1 + p)),  p = 1 / (1 + 2 c mu)       mu = pairs / R
    P(w)        E[(1 - w^2/9 + w Z/3)^3]: what the largest of R gamma variables of mean 1 and variance w^2 is on
                average, Z the largest of R normal deviates

    balanced    c = 0           routing that favours no expert
    skewed      c = v^2 / E_R   popularities of coefficient of variation v, E_R experts a rank
    placed      c of P(sqrt c) = s, the busiest share that a load balancer leaves; no more than skewed
    worst       together min(k, E_R): all tokens choose the same rank

Popularities are of a gamma law, as for the experts that an iteration reads (`operators.distinct_experts`): a Dirichlet
law of concentration 1/v^2. Pairs of a rank are Poisson given these, so of a negative binomial law of mean mu and
variance mu + c mu^2; that is taken for a gamma law shifted to the same mean, variance and skewness. No rank is the
busiest below the mean or, from one pair on, below one.

Source: a gamma variable as the cube of a normal one, Wilson and Hilferty (PNAS 17, 1931), of which the mean of the
largest follows by quadrature. Load balancer: DeepSeek's EPLB (replicate the expert with the most tokens a copy, pack
what is heaviest to the least loaded rank; groups stay in a node where nodes divide them), as vLLM runs it.
Approximated: it balances the popularities that then hold, and each layer's are drawn anew (`LAYERS` of them). Against
draws (`tests/cost/test_expert_load.py`): within 3 % from two pairs a rank on, 12 % on 256 ranks; with fewer pairs from
5 % below to a third above; as a load balancer leaves them, within 8 %.
"""

import functools
import math
from typing import Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

Routing = Literal["balanced", "skewed", "worst"]
"""How tokens choose ranks."""

TINY = 1e-6
"""Fewest pairs, where there are no tokens."""

LAYERS = 64
"""Draws of popularities over which a load balancer is averaged."""


class _Largest(NamedTuple):
    """Of R normal deviates the largest: its first three moments; and the w at which P(w) is largest, where its cubes
    end to be those of gamma variables."""

    moments: tuple[float, float, float]
    widest: float

    def mean(self, w, arrays=jnp):
        """P(w)."""
        low, slope = 1 - arrays.square(w) / 9, w / 3
        one, two, three = self.moments
        return low**3 + 3 * low**2 * slope * one + 3 * low * slope**2 * two + slope**3 * three


@functools.lru_cache(maxsize=256)
def _largest(ranks: int) -> _Largest:
    z, step = np.linspace(-9, 9, 18_001, retstep=True)
    density = np.exp(-z**2 / 2) / math.sqrt(2 * math.pi)
    below = np.cumsum(density) * step - density * step / 2
    weights = ranks * density * below ** (ranks - 1) * step
    found = _Largest(tuple(float(weights @ z**power) for power in (1, 2, 3)), 0.0)
    w = np.linspace(0, 9, 9001)
    return found._replace(widest=float(w[np.argmax(found.mean(w, np))]))


def busiest_pairs(pairs: Float[Array, " counts"], ranks: int, *, load: Routing = "balanced",
                  local_experts: float = 1.0, skew: Float[Array, ""] | float = 0.0,
                  share: Float[Array, ""] | None = None) -> Float[Array, " counts"]:
    """Tokens times experts on the busiest of `ranks`, of `pairs` on average.

    local_experts: of a rank; skew: coefficient of variation of popularities; share: that a load balancer leaves on the
    busiest rank, in averages. "worst" is bounded by the caller.
    """
    if load == "worst" or ranks == 1:
        return pairs * ranks
    largest, mean = _largest(ranks), jnp.maximum(pairs, TINY)
    variance = jnp.asarray(0.0)
    if load == "skewed":
        variance = jnp.square(jnp.asarray(skew, float)) / local_experts
        if share is not None:
            w = np.linspace(0, largest.widest, 1025)
            variance = jnp.minimum(variance, jnp.square(jnp.interp(share, largest.mean(w, np), w)))
    # Beyond the widest law the busiest rank stays what it is.
    narrow = largest.widest**-2
    shift = jnp.clip(1 / (1 + 2 * variance * mean), jnp.minimum((jnp.sqrt(1 + 2 * narrow / mean) - 1) / 2, 1.0), 1.0)
    w = 1 / jnp.sqrt(jnp.maximum(2 * mean * shift * (1 + shift), narrow))
    busiest = mean * ((1 + shift) * largest.mean(w) - shift)
    return jnp.clip(busiest, jnp.maximum(mean, jnp.minimum(mean * ranks, 1.0)), mean * ranks)


def popularities(experts: int, skew: float, layers: int = LAYERS, seed: int = 0) -> Float[np.ndarray, "layers experts"]:
    """Draws of popularities, each layer's of mean 1."""
    if skew <= 0:
        return np.ones((layers, experts))
    drawn = np.random.default_rng(seed).gamma(1 / skew**2, size=(layers, experts))
    return drawn / drawn.mean(axis=1, keepdims=True)


def rebalance(weight: Float[np.ndarray, "layers experts"], copies: int, ranks: int, nodes: int = 1, groups: int = 1
              ) -> Int[np.ndarray, "layers copies"]:
    """Which expert each place of all ranks holds, `copies / ranks` places a rank, in order of ranks.

    weight: tokens of every expert; copies: places, redundant ones included; groups: of experts, kept in a node where
    nodes divide them, the ranks and the places.
    """
    if groups % nodes or ranks % nodes or copies % nodes:
        nodes = groups = 1
    experts = weight.shape[1]
    size = experts // groups
    places = np.zeros((len(weight), copies), np.int64)
    for row, loads in zip(places, np.asarray(weight, float), strict=True):
        homes = _packed(loads.reshape(groups, size).sum(axis=1), nodes)
        for node in range(nodes):
            # In the order in which the groups were packed.
            members = np.concatenate([np.arange(g * size, (g + 1) * size) for g in homes[node]])
            held = _replicated(loads, members, copies // nodes)
            counts = np.bincount(held, minlength=experts)
            packs = _packed(loads[held] / counts[held], ranks // nodes)
            row[node * (copies // nodes):(node + 1) * (copies // nodes)] = held[np.concatenate(packs)]
    return places


def _replicated(loads: Float[np.ndarray, " experts"], members: Int[np.ndarray, " members"], places: int
                ) -> Int[np.ndarray, " places"]:
    """The members, and again whoever has the most tokens a copy, until all places are taken."""
    held, counts = list(members), np.ones(len(members))
    for _ in range(places - len(members)):
        most = int(np.argmax(loads[members] / counts))
        held.append(members[most])
        counts[most] += 1
    return np.asarray(held)


def _packed(weights: Float[np.ndarray, " items"], packs: int) -> list[list[int]]:
    """Items in as many packs of the same number: the heaviest first, each to the lightest pack that has room."""
    room = len(weights) // packs
    assert room * packs == len(weights), (len(weights), packs)
    if room == 1:
        return [[item] for item in range(packs)]
    found: list[list[int]] = [[] for _ in range(packs)]
    sums = np.zeros(packs)
    for item in np.argsort(-weights, kind="stable"):
        pack = int(np.argmin(np.where([len(one) < room for one in found], sums, np.inf)))
        found[pack].append(int(item))
        sums[pack] += weights[item]
    return found


def rank_loads(weight: Float[np.ndarray, "layers experts"], places: Int[np.ndarray, "layers copies"], ranks: int
               ) -> Float[np.ndarray, "layers ranks"]:
    """Tokens of each rank, where an expert's are shared evenly by its copies."""
    loads = np.zeros((len(weight), ranks))
    for row, one, held in zip(loads, np.asarray(weight, float), places, strict=True):
        each = one / np.maximum(np.bincount(held, minlength=len(one)), 1)
        row[:] = each[held].reshape(ranks, -1).sum(axis=1)
    return loads


@functools.lru_cache(maxsize=256)
def balanced_share(experts: int, redundant: int, ranks: int, nodes: int = 1, groups: int = 1, skew: float = 0.0
                   ) -> tuple[float, float]:
    """Of popularities that a load balancer has placed: the busiest rank's load over the mean of all ranks, and the
    coefficient of variation of the copies' popularity, means over layers."""
    weight = popularities(experts, skew)
    places = rebalance(weight, experts + redundant, ranks, nodes, groups)
    loads = rank_loads(weight, places, ranks)
    each = np.stack([one[held] / np.bincount(held, minlength=experts)[held]
                     for one, held in zip(weight, places, strict=True)])
    return (float((loads.max(axis=1) / loads.mean(axis=1)).mean()),
            float((each.std(axis=1) / each.mean(axis=1)).mean()))


def ranks_touched(experts: int, per_token: int, ranks: int, groups: int = 1, limit: int = 1) -> float:
    """Ranks, of equal shares of the experts in a row, that one token's experts are on, on average.

    groups, limit: a token's experts are of `limit` of so many groups in a row (group-limited routing); 1, 1: of all.
    Source: drawing without replacement, each expert of the groups as likely as any other.
    """
    share, whole = experts / ranks, experts / groups
    if limit >= groups:
        return ranks * _some(share, experts, per_token)
    return sum(_touched((r * share, (r + 1) * share), whole, groups, limit, per_token) for r in range(ranks))


def _touched(part: tuple[float, float], whole: float, groups: int, limit: int, per_token: int) -> float:
    """Probability that a token with experts of `limit` of the groups, of `whole` each, has one between two places."""
    overlaps = [min(part[1], (g + 1) * whole) - max(part[0], g * whole) for g in range(groups)]
    overlaps = [size for size in overlaps if size > 1e-9]
    # Ways to choose so many of the groups that overlap, by what they have of the part.
    ways: dict[tuple[int, float], int] = {(0, 0.0): 1}
    for size in overlaps:
        for (chosen, held), count in list(ways.items()):
            key = chosen + 1, round(held + size, 9)
            ways[key] = ways.get(key, 0) + count
    others, all_ways = groups - len(overlaps), math.comb(groups, limit)
    return sum(count * math.comb(others, limit - chosen) / all_ways * _some(held, limit * whole, per_token)
               for (chosen, held), count in ways.items() if chosen <= limit)


nodes_touched = ranks_touched
"""The same of nodes."""


def _some(part: float, whole: float, drawn: int) -> float:
    """Probability that `drawn` of `whole` have one of a part of them."""
    if whole - part < drawn:
        return 1.0
    return 1.0 - math.exp(_log_binomial(whole - part, drawn) - _log_binomial(whole, drawn))


def _log_binomial(n: float, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
