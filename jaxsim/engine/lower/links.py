"""Rates of the links that KV caches travel over."""

import math
from collections.abc import Sequence

import numpy as np

from jaxsim._core.errors import InputError
from jaxsim.engine.lower.systems import Pool, System
from jaxsim.kernels import clock
from jaxsim.spec.cluster import TransferSection
from jaxsim.spec.plan import kv_cache_bytes
from jaxsim.spec.scenario import Scenario


def migration_rates(scenario: Scenario, system: System) -> tuple[float, float]:
    """Bytes of KV a token, and bytes a second out of or into an engine. Raises `InputError` where they are not
    known.
    """
    given, field = scenario.cluster.migration, "cluster.migration.gb_per_s"
    if system.model is None:
        raise InputError("model", None, "missing, and the KV cache of a token cannot be known without it",
                         "name a model, also beside a fitted cost")
    width = kv_cache_bytes(scenario.kv_dtype, scenario.dtype, system.model)
    bytes_per_token = system.model.kv_bytes_per_token(width)
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
    if system.model is None:
        raise InputError("model", None, "missing, and the KV cache of a token cannot be known without it",
                         "name a model, also beside a fitted cost")
    width = kv_cache_bytes(scenario.kv_dtype, scenario.dtype, system.model)
    bytes_per_token = system.model.kv_bytes_per_token(width)
    if given.gb_per_s is not None:
        return bytes_per_token, 1e9 * given.gb_per_s
    pools = [pool for pool in system.pools if pool.role in ("prefill", "decode")]
    if not pools:
        # Nobody hands over anything but embeddings.
        return bytes_per_token, embedding_rate(scenario, system)
    ranks = min(pool.system.plan.tensor_parallel_size for pool in pools)
    # Links that carry the same twice are no faster for it.
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


FLIGHTS = 64
"""Transfers under way at a time over links that are shared, unless the scenario says."""


def flights_of(scenario: Scenario) -> int:
    """How many transfers may be under way at a time; 0 where each waits for its turn."""
    given = scenario.cluster.transfer
    return (given.most_at_once or FLIGHTS) if given is not None and given.discipline == "fair" else 0


def on_grid(seconds: float) -> float:
    """A duration as the engine's clock holds it, in a float32: both it and sums of it are then exact."""
    return float(np.float32(np.round(seconds / clock.GRID_S) * clock.GRID_S))
