"""Rates of the links that KV caches travel over."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from jaxsim._core.errors import InputError
from jaxsim.engine import max_min
from jaxsim.engine.lower.systems import Pool, System
from jaxsim.kernels import clock
from jaxsim.spec import links as named
from jaxsim.spec.cluster import TransferSection
from jaxsim.spec.plan import kv_cache_bytes
from jaxsim.spec.scenario import Scenario


def kv_bytes_per_token(scenario: Scenario, system: System) -> float:
    """Bytes of the KV cache of a token. Raises `InputError` where they are not known."""
    if system.model is None:
        raise InputError("model", None, "missing, and the KV cache of a token cannot be known without it",
                         "name a model, also beside a fitted cost")
    return system.model.kv_bytes_per_token(kv_cache_bytes(scenario.kv_dtype, scenario.dtype, system.model))


def migration_rates(scenario: Scenario, system: System) -> tuple[float, float]:
    """Bytes of KV a token, and bytes a second out of or into an engine. Raises `InputError` where they are not
    known.
    """
    given, field = scenario.cluster.migration, "cluster.migration.gb_per_s"
    bytes_per_token = kv_bytes_per_token(scenario, system)
    if given.gb_per_s is not None:
        return bytes_per_token, 1e9 * given.gb_per_s
    if system.device is None:
        raise InputError(field, None, "missing, and without [device] it cannot be derived",
                         "give the bandwidth of a link between engines")
    link = system.device.link_among(2, scenario.num_devices)
    return bytes_per_token, system.plan.num_devices * link.bytes_per_s


def transfer_rates(scenario: Scenario, system: System) -> tuple[float, float]:
    """Bytes of KV a token, and bytes a second of a link between engines. Raises `InputError` where they are not known.

    Every rank of the narrower engine sends or takes what it holds over its own link: its part of the KV heads, or one
    that others hold too, or all of MLA's latent.
    """
    given = scenario.cluster.transfer or TransferSection()
    if not system.scheduler.kv_accounting and given.gb_per_s is None:
        # Where KV has no size it takes no time.
        return 0.0, 1.0
    bytes_per_token = kv_bytes_per_token(scenario, system)
    if given.gb_per_s is not None:
        return bytes_per_token, 1e9 * given.gb_per_s
    pools = [pool for pool in system.pools if pool.role in ("prefill", "decode")]
    if not pools:
        # Nobody hands over anything but embeddings.
        return bytes_per_token, embedding_rate(scenario, system)
    ranks = min(pool.system.plan.tensor_parallel_size for pool in pools)
    # Links that carry the same twice are no faster for it.
    width = kv_cache_bytes(scenario.kv_dtype, scenario.dtype, system.model)
    parts = bytes_per_token / system.model.kv_bytes_per_token(width, ranks)
    return bytes_per_token, parts * _slowest_link(scenario, pools)


def embedding_rate(scenario: Scenario, system: System) -> float:
    """Bytes of embeddings a second from an engine that encodes to one that computes prompts: over the link of one
    device, as no rank holds a part of them only. Raises `InputError` where it is not known."""
    given = scenario.cluster.transfer or TransferSection()
    if given.gb_per_s is not None:
        return 1e9 * given.gb_per_s
    return _slowest_link(scenario, [pool for pool in system.pools if pool.role != "decode"])


def _slowest_link(scenario: Scenario, pools: Sequence[Pool]) -> float:
    """Bytes a second between devices of these pools: over the link of a node as far as the cluster lies in one
    (`DeviceSpec.link_among`); devices that differ are in different nodes."""
    devices = [pool.system.device for pool in pools]
    if None in devices:
        raise InputError("cluster.transfer.gb_per_s", None, "missing, and without [device] it cannot be derived",
                         "give the bandwidth of a link between engines")
    span = scenario.num_devices if all(d == devices[0] for d in devices) else math.inf
    return min(d.link_among(2, span).bytes_per_s for d in devices)


@dataclass(frozen=True)
class Ways:
    """What goes from one pool to another, as tables (source pool, target pool); where nothing does the rate is 0.

    bytes_per_token: of KV; bytes_per_s, latency_s: from one engine to another; shared_link: the link that all of these
    engines share, -1 where there is none; num_shared: of these links; fields: of a scenario, that say how fast it is.
    """

    bytes_per_token: float
    bytes_per_s: Float[np.ndarray, "pools pools"]
    latency_s: Float[np.ndarray, "pools pools"]
    shared_link: Int[np.ndarray, "pools pools"]
    num_shared: int
    fields: dict[tuple[int, int], str]

    def seconds(self, num_bytes: float) -> Float[np.ndarray, "pools pools"]:
        """That so many bytes take; 0 where nothing goes."""
        return np.divide(num_bytes, self.bytes_per_s, out=np.zeros_like(self.bytes_per_s), where=self.bytes_per_s > 0)

    @property
    def units(self) -> Int[np.ndarray, "pools pools"]:
        """How fast each is, in parts of the fastest (`jaxsim.engine.max_min`)."""
        return np.round(max_min.WHOLE * self.bytes_per_s / self.bytes_per_s.max()).astype(np.int32)


def ways_of(scenario: Scenario, system: System) -> Ways | None:
    """The ways between pools, None where all are alike. Raises `InputError` where one is not known."""
    cluster = scenario.cluster
    if not cluster.links:
        return None
    given, links, used = cluster.transfer or TransferSection(), named.links_of(cluster), named.ways(cluster)
    count, fields = len(cluster.pools), {}
    rate, latency_s = np.zeros((count, count)), np.zeros((count, count))
    shared_link, numbers = np.full((count, count), -1, np.int32), {}
    for pair in used:
        index, latency_us = links.get(pair), given.latency_us
        if index is not None:
            link, fields[pair] = cluster.links[index], f"cluster.links[{index}]"
            rate[pair] = 1e9 * link.gb_per_s
            latency_us = latency_us if link.latency_us is None else link.latency_us
            if link.shared:
                shared_link[pair] = numbers.setdefault(index, len(numbers))
        else:
            fields[pair] = "cluster.transfer"
            rate[pair] = _unnamed_rate(scenario, system, pair)
        latency_s[pair] = on_grid(1e-6 * latency_us)
    return Ways(kv_bytes_per_token(scenario, system), rate, latency_s, shared_link, len(numbers), fields)


def _unnamed_rate(scenario: Scenario, system: System, pair: tuple[int, int]) -> float:
    """Bytes a second of a way that no link names. Raises `InputError`."""
    if system.pools[pair[0]].role == "encode":
        return embedding_rate(scenario, system)
    bytes_per_token, bytes_per_s = transfer_rates(scenario, system)
    if not bytes_per_token:
        raise InputError("cluster.transfer.gb_per_s", None, "missing, and KV takes time on [[cluster.links]] and none"
                         f" from {named.name_of(scenario.cluster, pair[0])} to"
                         f" {named.name_of(scenario.cluster, pair[1])}", "give it, or a link for these, too")
    return bytes_per_s


def num_shared_links(scenario: Scenario) -> int:
    """Links that all engines of two pools share."""
    used, links = named.ways(scenario.cluster), named.links_of(scenario.cluster)
    return len({links[pair] for pair in used if pair in links and scenario.cluster.links[links[pair]].shared})


def is_max_min(scenario: Scenario) -> bool:
    """What a transfer leaves of a shared link goes to others."""
    return scenario.cluster.transfer is not None and scenario.cluster.transfer.discipline == "max_min"


FLIGHTS = 64
"""Transfers under way at a time over links that are shared, unless the scenario says."""


def flights_of(scenario: Scenario) -> int:
    """How many transfers may be under way at a time; 0 where each waits for its turn."""
    given = scenario.cluster.transfer
    return (given.most_at_once or FLIGHTS) if given is not None and given.discipline != "fifo" else 0


def on_grid(seconds: float) -> float:
    """A duration as the engine's clock holds it, in a float32: both it and sums of it are then exact."""
    return float(np.float32(np.round(seconds / clock.GRID_S) * clock.GRID_S))
