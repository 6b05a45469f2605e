"""Rules of [[cluster.links]]: what names a way that is used, once."""

import itertools
from typing import TYPE_CHECKING

from jaxsim._core.errors import InputError, suggest
from jaxsim.spec.cluster import ClusterSection, TransferSection
from jaxsim.spec.links import ROLES, links_of, name_of, pools_called, ways
from jaxsim.spec.values import plain

if TYPE_CHECKING:
    from jaxsim.spec.scenario import Scenario


def check_links(s: "Scenario") -> None:
    """Names of pools, and links between them. Raises `InputError`."""
    cluster = s.cluster
    names = [pool.name for pool in cluster.pools]
    for index, name in enumerate(names):
        if name is None:
            continue
        field = f"cluster.pools[{index}].name"
        if name in ROLES:
            raise InputError(field, name, "is a role, and would call all pools of that role", "use another name")
        if name in names[:index]:
            raise InputError(field, name, f"is that of cluster.pools[{names.index(name)}] too", "use another name")
    if not cluster.links:
        return
    if not cluster.has_roles:
        raise InputError("cluster.links", [plain(link) for link in cluster.links],
                         "has no effect without engines of different roles",
                         "add [[cluster.pools]] of role 'prefill' and 'decode', or leave it out")
    used = ways(cluster)
    known = sorted({*filter(None, names), *(pool.role for pool in cluster.pools)})
    seen: dict[tuple[int, int], int] = {}
    for index, link in enumerate(cluster.links):
        where = f"cluster.links[{index}]"
        ends = [pools_called(cluster, name) for name in (link.source, link.target)]
        for end, name, called in zip(("from", "to"), (link.source, link.target), ends, strict=True):
            if not called:
                raise InputError(f"{where}.{end}", name, "is neither the name of a pool nor the role of one",
                                 suggest(name, known))
        pairs = list(itertools.product(*ends))
        if not any(pair in used for pair in pairs):
            there = ", ".join(f"{name_of(cluster, i)} to {name_of(cluster, j)}" for i, j in used)
            raise InputError(where, f"{link.source} to {link.target}", "carries nothing: neither KV of prompts nor"
                             " embeddings go that way", f"use one of: {there}; or leave it out")
        for pair in pairs:
            if pair in seen:
                raise InputError(where, f"{link.source} to {link.target}",
                                 f"is the way of cluster.links[{seen[pair]}] too", "make one of them")
            seen[pair] = index
    given = cluster.transfer or TransferSection()
    if given.gb_per_s is not None and all(pair in seen for pair in used):
        raise InputError("cluster.transfer.gb_per_s", given.gb_per_s,
                         "has no effect: all that is sent goes over cluster.links", "leave it out")
    if given.discipline != "fifo":
        _check_latencies(cluster, given)


def _check_latencies(cluster: ClusterSection, given: TransferSection) -> None:
    """Where links are shared, deliveries to an engine are in the order in which transfers leave their links."""
    links, first = links_of(cluster), {}
    for i, j in ways(cluster):
        index = links.get((i, j))
        own = None if index is None else cluster.links[index].latency_us
        latency_us = given.latency_us if own is None else own
        known = first.setdefault(j, latency_us)
        if latency_us != known:
            field = "cluster.transfer.latency_us" if own is None else f"cluster.links[{index}].latency_us"
            raise InputError(field, latency_us,
                             f"differs from the {known:g} us of others into {name_of(cluster, j)}, which is not"
                             f" simulated with discipline = {given.discipline!r}", "give them the same, or use 'fifo'")
