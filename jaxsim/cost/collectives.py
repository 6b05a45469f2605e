"""Seconds of collectives among the ranks of one group, by message bytes.

    NCCL            softmin_8(low + x / low_eta, bulk + x / eta) + rank (N - 1),   x = wire (N - 1)/N bytes / link
    one shot        latency + (N - 1) bytes / (link eta)
    two shots       latency + more + 2 (N - 1)/N bytes / (link eta)
    one message     latency + bytes / (link eta)

Source: fits to NCCL and vLLM custom all-reduce tables (aiconfigurator); thresholds: vLLM, `custom_all_reduce.cuh`.
"""

import equinox as eqx
import jax.numpy as jnp
import msgspec
from jaxtyping import Array, Float

from jaxsim.spec.efficiency import CustomAllReduceEfficiency, HopEfficiency, NcclEfficiency

WIRE = {"all_reduce": 2.0, "all_gather": 1.0, "reduce_scatter": 1.0, "all_to_all": 1.0}
"""How often (N - 1)/N of the whole buffer crosses a link."""

CUSTOM_RANKS = (2, 4, 6, 8)
"""Group sizes vLLM's all-reduce works for."""

CUSTOM_BYTES = 8 << 20
"""From this on NCCL is called."""

ONE_SHOT_BYTES = {2: CUSTOM_BYTES, 4: 512 << 10, 6: 256 << 10, 8: 256 << 10}
"""Below this, by ranks, every rank reads all others' buffers itself."""

_POWER = 8.0

Record = NcclEfficiency | HopEfficiency


def over_pcie(record: Record) -> Record:
    """Constants between devices without a switch of their own; the latency of a further rank stays.

    Source: a guess, from 25 us for 4 ranks and a quarter of the link on V100 PCIe (microsoft/apex_plus).
    """
    return _slower(record, 20e-6, 0.2, 40e-6, 0.5)


def over_network(record: Record) -> Record:
    """Constants between nodes; the latency of a further rank stays.

    Source: send_recv between two DGX H100, 20 us and 36 of 50 GB/s (microsoft/vidur); the protocol for small messages
    and two A100 nodes (29 us, 7.8 of 25 GB/s) would be slower.
    """
    return _slower(record, 20e-6, 0.36, 40e-6, 0.72)


def _slower(record: Record, latency_s: float, low: float, bulk_s: float, efficiency: float) -> Record:
    if isinstance(record, HopEfficiency):
        return msgspec.structs.replace(record, latency_s=latency_s, efficiency=efficiency)
    return msgspec.structs.replace(record, latency_s=latency_s, low_efficiency=low, bulk_latency_s=bulk_s,
                                   efficiency=efficiency)


SLOWER = {"host": over_pcie, "network": over_network}
"""By kind of link; any other has the constants of a device's own links."""


def over(record: Record, kind: str) -> Record:
    """Constants of messages over a link of this kind."""
    return SLOWER[kind](record) if kind in SLOWER else record


class Nccl(eqx.Module):
    """A collective of NCCL; leaves as in `NcclEfficiency`."""

    latency_s: Float[Array, ""]
    rank_s: Float[Array, ""]
    low_efficiency: Float[Array, ""]
    bulk_latency_s: Float[Array, ""]
    efficiency: Float[Array, ""]
    wire: float = eqx.field(static=True)

    @classmethod
    def of(cls, record: NcclEfficiency, collective: str) -> "Nccl":
        """Leaves from a record, for a name in `WIRE`."""
        names = ("latency_s", "rank_s", "low_efficiency", "bulk_latency_s", "efficiency")
        return cls(*(jnp.asarray(getattr(record, name), float) for name in names), WIRE[collective])

    def seconds(self, ranks: int, num_bytes: Float[Array, "*shape"], link_bytes_per_s: Float[Array, ""]
                ) -> Float[Array, "*shape"]:
        """Seconds for a whole buffer of `num_bytes` (gathered, before it is scattered)."""
        x = self.wire * (ranks - 1) / ranks * num_bytes / link_bytes_per_s
        low, bulk = self.latency_s + x / self.low_efficiency, self.bulk_latency_s + x / self.efficiency
        low, bulk = (t + self.rank_s * (ranks - 1) for t in (low, bulk))
        least = jnp.maximum(jnp.minimum(low, bulk), 1e-12)
        return least * ((jnp.maximum(low, least) / least) ** -_POWER
                        + (jnp.maximum(bulk, least) / least) ** -_POWER) ** (-1 / _POWER)


class CustomAllReduce(eqx.Module):
    """vLLM's all-reduce over a switched link, captured in a graph; leaves as in `CustomAllReduceEfficiency`.

    Known gaps: outside a graph the host's launch of 20 us (H100) or 44 us (A100) hides messages below 2 MB.
    """

    latency_s: Float[Array, ""]
    two_shot_s: Float[Array, ""]
    efficiency: Float[Array, ""]
    bulk_latency_s: Float[Array, ""]
    bulk_efficiency: Float[Array, ""]

    @classmethod
    def of(cls, record: CustomAllReduceEfficiency) -> "CustomAllReduce":
        """Leaves from a record."""
        names = ("latency_s", "two_shot_s", "efficiency", "bulk_latency_s", "bulk_efficiency")
        return cls(*(jnp.asarray(getattr(record, name), float) for name in names))

    def seconds(self, ranks: int, num_bytes: Float[Array, "*shape"], link_bytes_per_s: Float[Array, ""]
                ) -> Float[Array, "*shape"]:
        """Seconds for a message of `num_bytes`."""
        link = link_bytes_per_s * self.efficiency
        ring = 2 * (ranks - 1) / ranks * num_bytes
        one = self.latency_s + (ranks - 1) * num_bytes / link
        two = self.latency_s + self.two_shot_s + ring / link
        bulk = self.bulk_latency_s + ring / (link_bytes_per_s * self.bulk_efficiency)
        small = jnp.where(num_bytes < ONE_SHOT_BYTES[ranks], one, two)
        return jnp.where(num_bytes < CUSTOM_BYTES, small, bulk)


class Hop(eqx.Module):
    """A message between two devices; leaves as in `HopEfficiency`."""

    latency_s: Float[Array, ""]
    efficiency: Float[Array, ""]

    @classmethod
    def of(cls, record: HopEfficiency) -> "Hop":
        """Leaves from a record."""
        return cls(jnp.asarray(record.latency_s, float), jnp.asarray(record.efficiency, float))

    def seconds(self, num_bytes: Float[Array, "*shape"], link_bytes_per_s: Float[Array, ""]) -> Float[Array, "*shape"]:
        """Seconds for `num_bytes`."""
        return self.latency_s + num_bytes / (link_bytes_per_s * self.efficiency)
