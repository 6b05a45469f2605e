"""Links between pools in random scenarios, for the engine and the reference alike."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from jaxsim.engine.max_min import WHOLE
from jaxsim.policy.hand_over import HandOver
from tests.reference import simulator
from tests.reference.disaggregation import NamedLink

POOLS = ("prefill a", "prefill b", "decode a", "decode b", "mixed")
"""Of the instances of all cases, so that their tables have one size."""

ENCODING = (*POOLS, "encode a", "encode b")
"""The same where some encode images."""

SENDS_TO = {"prefill": ("decode",), "encode": ("prefill", "mixed"), "decode": (), "mixed": ()}
"""Which roles get something from one."""

NUM_LINKS = 4
"""That pools share, at most."""


def draw_links(rng: np.random.Generator, rules: simulator.Disaggregation) -> simulator.Disaggregation:
    """Most ways have a link, some of which are shared; where all links are, latencies into a pool are alike."""
    # Where all are in one pool, more of them share its links.
    choices = [["a"], ["a", "b"]][rng.integers(2)]
    pools = tuple(role if role == "mixed" else f"{role} {rng.choice(choices)}" for role in rules.roles)
    found: dict[tuple[str, str], NamedLink] = {}
    for pair in ways(ENCODING if "encode" in rules.roles else POOLS):
        if found and rng.random() < 0.25:
            continue
        latency_s = rules.latency_s if rules.discipline != "fifo" else float(rng.choice([0.0, 2.0**-8, 3 * 2.0**-6]))
        is_shared = rng.random() < 0.7 and sum(link.is_shared for link in found.values()) < NUM_LINKS
        found[pair] = NamedLink(rules.bandwidth * 2.0 ** int(rng.integers(-3, 3)), latency_s, bool(is_shared))
    return replace(rules, named_links=found, pools=pools)


def _tables(pools: tuple[str, ...], rules: simulator.Disaggregation, of_link) -> np.ndarray:
    """A number of every way there is, 0 elsewhere."""
    default = NamedLink(rules.bandwidth, rules.latency_s)
    return np.array([[of_link((i, j), rules.named_links.get((i, j), default)) if (i, j) in ways(pools) else 0
                      for j in pools] for i in pools])


def ways(pools: tuple[str, ...]) -> list[tuple[str, str]]:
    """Pairs of pools between which something goes."""
    return [(i, j) for i in pools for j in pools if j.split()[0] in SENDS_TO[i.split()[0]]]


def names_of(rules: simulator.Disaggregation) -> tuple[str, ...]:
    """Pools of a case: those above, or the roles."""
    if rules.pools is None:
        return "encode", "prefill", "decode"
    return ENCODING if "encode" in rules.roles else POOLS


def over_each(rules: simulator.Disaggregation, num_bytes: float) -> np.ndarray:
    """Seconds that so many bytes take, over each way."""
    if not rules.named_links:
        return np.float32(num_bytes / rules.bandwidth)
    return _tables(names_of(rules), rules, lambda _, link: num_bytes / link.bandwidth).astype(np.float32)


def with_links(rules: simulator.Disaggregation, hand_over: HandOver) -> HandOver:
    """What the engine is told of the links of a case, if it has any."""
    if not rules.named_links:
        return hand_over
    pools = names_of(rules)
    shared = [pair for pair, link in rules.named_links.items() if link.is_shared]
    own = rules.roles if rules.pools is None else rules.pools
    units = None
    if rules.discipline == "max_min":
        # Where nobody is nothing goes.
        speeds = _tables(pools, rules, lambda pair, link: link.bandwidth if set(pair) <= set(own) else 0.0)
        units = np.round(WHOLE * speeds / speeds.max()).astype(np.int32)
    return replace(
        hand_over, seconds_per_token=over_each(rules, rules.bytes_per_token),
        latency_s=_tables(pools, rules, lambda _, link: link.latency_s).astype(np.float32),
        pool_of=np.array([pools.index(name) for name in own], np.int32), units=units,
        shared_link=_tables(pools, rules, lambda pair, _: shared.index(pair) if pair in shared else -1
                            ).astype(np.int32))


def exercised(rules: simulator.Disaggregation, transfers) -> Counter:
    """What transfers met, as the reference has it (`TransferRecord`)."""
    seen, behind = Counter(), sorted(transfers, key=lambda t: t.accepted_s)
    own = rules.roles if rules.pools is None else rules.pools
    for number, one in enumerate(behind):
        pair = own[one.source], own[one.destination]
        link = rules.named_links.get(pair)
        seen["named" if link else "not named"] += 1
        if link is None or not link.is_shared:
            continue
        seen["shared"] += 1
        # What keeps it waiting is neither end, but somebody else on the link.
        ends = max((t.delivered_s for t in behind[:number] if one.source == t.source
                    or one.destination == t.destination), default=0.0)
        seen["behind others on it"] += one.start_s > max(one.accepted_s, ends)
        others = [t for t in behind if t.start_s < one.delivered_s and one.start_s < t.delivered_s]
        seen["beside others on it"] += any((own[t.source], own[t.destination]) == pair and t.source != one.source
                                           and t.destination != one.destination for t in others)
    return seen


def ends_of(rules: simulator.Disaggregation, own: tuple[str, ...], source: np.ndarray, target: np.ndarray
            ) -> tuple[np.ndarray, ...]:
    """Of each transfer what it goes over, as numbers: its source, its target, and the link that its pools share, each
    of those that have none by itself."""
    links: Mapping = {pair: k for k, (pair, link) in enumerate(rules.named_links.items()) if link.is_shared}
    pairs = [(own[int(i)], own[int(j)]) for i, j in zip(source, target, strict=True)]
    over = [links.get(pair, 1000 + n) for n, pair in enumerate(pairs)]
    return source, target, np.array(over)


def alone_s(rules: simulator.Disaggregation, own: tuple[str, ...], prompts: np.ndarray, source: np.ndarray,
            target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each transfer the least seconds that it takes alone, sent layer by layer its last layer, and its latency."""
    default = NamedLink(rules.bandwidth, rules.latency_s)
    over = [rules.named_links.get((own[int(i)], own[int(j)]), default) for i, j in zip(source, target, strict=True)]
    seconds = prompts * rules.bytes_per_token / np.array([link.bandwidth for link in over])
    return seconds / max(rules.overlap_layers, 1), np.array([link.latency_s for link in over])
