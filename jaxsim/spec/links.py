"""Which pools a link is between, and over which pairs of pools anything goes at all."""

from jaxsim.spec.cluster import ClusterSection

ROLES = ("mixed", "prefill", "decode", "encode")

TAKES_FROM = {"decode": ("prefill",), "prefill": ("encode",), "mixed": ("encode",)}
"""Of a role, those that send it something: KV of prompts, or embeddings of images."""


def pools_called(cluster: ClusterSection, name: str) -> tuple[int, ...]:
    """Indices of the pool of that name, or of all pools of that role; empty if there are none."""
    named = tuple(k for k, pool in enumerate(cluster.pools) if pool.name == name)
    return named or tuple(k for k, pool in enumerate(cluster.pools) if pool.role == name)


def name_of(cluster: ClusterSection, pool: int) -> str:
    """What to call a pool."""
    return cluster.pools[pool].name or cluster.pools[pool].role


def ways(cluster: ClusterSection) -> list[tuple[int, int]]:
    """Pairs of pools (from, to) of which the one sends something to the other."""
    return [(i, j) for i, source in enumerate(cluster.pools) for j, target in enumerate(cluster.pools)
            if source.role in TAKES_FROM.get(target.role, ())]


def links_of(cluster: ClusterSection) -> dict[tuple[int, int], int]:
    """The index of the link of each pair of pools that has one."""
    return {(i, j): index for index, link in enumerate(cluster.links) for i in pools_called(cluster, link.source)
            for j in pools_called(cluster, link.target)}
