"""Seconds of collectives of a group that spans nodes: fast links inside, a network card for each device between.

N ranks, n in a node, k = ceil(N / n) nodes, a buffer of m bytes (gathered, before it is scattered):

    ring            max(between over N ranks of m / n, inside over N ranks of m)
    hierarchical    all-reduce       reduce-scatter inside + all-reduce between of m / n + all-gather inside
                    all-gather       all-gather between of m / n + all-gather inside; reduce-scatter the other way
    all-to-all      max(inside: (n - 1)/N m, between: (N - n)/N m)

A ring has a channel for each card of a node, so a card carries a share of 1/n, and the same bytes pass every link
inside: the slower of both is its speed. NCCL takes what its tables say is faster; here it is the lesser of ring and
hierarchical, so few bytes on many nodes go by levels (fewer hops), many go round the ring. Cards cannot be shared in an
all-to-all, whose bytes leave a device through its own.

`DeepEp` is the exchange of experts' tokens that knows both levels.

Source: NVIDIA/nccl issue 495 (two nodes of 8 A100 with a 100 Gbit/s card each: 600 Gbit/s of bus bandwidth, so a ring
over all cards), NVIDIA/nccl-tests issue 267 (an all-to-all does not aggregate cards). Known gaps: reduction in the
switches (SHARP, NVLS trees), cards that several devices share, and rails: the network is taken as one switch.
"""

import equinox as eqx
import jax.numpy as jnp
import msgspec
from jaxtyping import Array, Float

from jaxsim.cost.collectives import Nccl, over, over_network
from jaxsim.cost.expert_load import nodes_touched, ranks_touched
from jaxsim.spec.device import DEVICES_PER_NODE, DeviceSpec, Link
from jaxsim.spec.efficiency import Efficiency
from jaxsim.spec.model import ModelSpec
from jaxsim.spec.plan import Plan


def ranks_in_node(device: DeviceSpec, ranks: int, span: int | None = None) -> int:
    """Of a group of `ranks`, which lie evenly among `span` devices in a row, how many are in one node."""
    stride = max((span or ranks) // ranks, 1)
    return max(min((device.devices_per_node or DEVICES_PER_NODE) // stride, ranks), 1)


class TwoLevel(eqx.Module):
    """A collective of a group that spans nodes.

    between: over the network, among ranks of different nodes; inside: the same collective in a node, scatter and gather
    the parts of a hierarchical one; inside_bytes_per_s: link there. Static. collective: a name in `WIRE`; per_node:
    ranks of a node.
    """

    between: Nccl
    inside: Nccl
    scatter: Nccl
    gather: Nccl
    inside_bytes_per_s: Float[Array, ""]
    collective: str = eqx.field(static=True)
    per_node: int = eqx.field(static=True)

    @classmethod
    def of(cls, record: Efficiency, collective: str, per_node: int, inside: Link) -> "TwoLevel":
        """Of a device's constants, for a name in `WIRE`; inside: the link of a node."""
        def within(name: str) -> Nccl:
            return Nccl.of(over(record.nccl[name], inside.kind), name)

        return cls(Nccl.of(over_network(record.nccl[collective]), collective), within(collective),
                   within("reduce_scatter"), within("all_gather"), jnp.asarray(inside.bytes_per_s, float), collective,
                   per_node)

    @property
    def efficiency(self) -> Float[Array, ""]:
        """Share of the network's bandwidth that many bytes reach, as of `Nccl` on its link."""
        return self.between.efficiency

    def _inside(self, kernel: Nccl, ranks: int, num_bytes) -> Float[Array, "*shape"]:
        if ranks == 1:
            return 0.0 * num_bytes
        return kernel.seconds(ranks, num_bytes, self.inside_bytes_per_s)

    def ring(self, ranks: int, num_bytes: Float[Array, "*shape"], link_bytes_per_s: Float[Array, ""]
             ) -> Float[Array, "*shape"]:
        """Seconds by rings over all cards of a node."""
        return jnp.maximum(self.between.seconds(ranks, num_bytes / self.per_node, link_bytes_per_s),
                           0.0 if self.per_node == 1 else self._inside(self.inside, ranks, num_bytes))

    def hierarchical(self, ranks: int, num_bytes: Float[Array, "*shape"], link_bytes_per_s: Float[Array, ""]
                     ) -> Float[Array, "*shape"]:
        """Seconds level by level."""
        n = self.per_node
        seconds = self.between.seconds(-(-ranks // n), num_bytes / n, link_bytes_per_s)
        if self.collective in ("all_reduce", "reduce_scatter"):
            seconds = seconds + self._inside(self.scatter, n, num_bytes)
        if self.collective in ("all_reduce", "all_gather"):
            seconds = seconds + self._inside(self.gather, n, num_bytes)
        return seconds

    def seconds(self, ranks: int, num_bytes: Float[Array, "*shape"], link_bytes_per_s: Float[Array, ""]
                ) -> Float[Array, "*shape"]:
        """Seconds for a whole buffer of `num_bytes`; link_bytes_per_s: of the network, a device."""
        n = self.per_node
        if ranks <= n:
            return self._inside(self.inside, ranks, num_bytes)
        if self.collective == "all_to_all":
            # As `Nccl` counts: of a buffer all but a rank's own part leaves it.
            outside = self.between.seconds(ranks, num_bytes * ((ranks - n) / (ranks - 1)), link_bytes_per_s)
            return jnp.maximum(outside, self._inside(self.inside, n, num_bytes * (n / ranks)))
        return jnp.minimum(self.ring(ranks, num_bytes, link_bytes_per_s),
                           self.hierarchical(ranks, num_bytes, link_bytes_per_s))


def collective(record: Efficiency, name: str, device: DeviceSpec, link: Link, ranks: int, span: int) -> Nccl | TwoLevel:
    """NCCL's collective for a group of `ranks` among `span` devices whose link is `link`: over the link of a node, over
    the network alone where every rank is in a node of its own, or over both."""
    per_node = ranks_in_node(device, ranks, span)
    if link.kind == "network" and per_node > 1:
        return TwoLevel.of(record, name, per_node, device.link_among(per_node, per_node * (span // ranks)))
    return Nccl.of(over(record.nccl[name], link.kind), name)


class DeepEpConstants(msgspec.Struct, frozen=True, kw_only=True):
    """Of one kind of DeepEP's kernels: seconds of a call in a node and of one over the network, and shares of links."""

    latency_s: float
    network_latency_s: float
    efficiency: float
    network_efficiency: float


class DeepEp(eqx.Module):
    """Dispatch or combine of DeepEP: both levels at once, each at the speed of its links.

        latency + max(inside copies bytes / (link eta), between copies bytes / (network eta))

    low_latency: a copy for every expert of a token, over the network to other nodes and over links inside. Otherwise a
    token goes to a node once, and there to each rank that needs it. inside, between: copies of a token, on average.

    Source: deepseek-ai/DeepEP; constants in `DEEP_EP`. Known gaps: ranks get as many tokens each; a token's experts are
    drawn evenly (within its groups); what overlaps with other work (two batches at once); kernels that are not of low
    latency cannot be captured in a graph, and are launched here as if they were.
    """

    latency_s: Float[Array, ""]
    efficiency: Float[Array, ""]
    network_efficiency: Float[Array, ""]
    inside_bytes_per_s: Float[Array, ""]
    inside: float = eqx.field(static=True)
    between: float = eqx.field(static=True)

    def seconds(self, ranks: int, num_bytes: Float[Array, "*shape"], link_bytes_per_s: Float[Array, ""]
                ) -> Float[Array, "*shape"]:
        """Seconds for tokens of `num_bytes`, counted once each; link_bytes_per_s: of the network where nodes differ."""
        if not self.between:
            return self.latency_s + self.inside * num_bytes / (link_bytes_per_s * self.efficiency)
        inside_s = self.inside * num_bytes / (self.inside_bytes_per_s * self.efficiency)
        outside_s = self.between * num_bytes / (link_bytes_per_s * self.network_efficiency)
        return self.latency_s + jnp.maximum(inside_s, outside_s)


def deep_ep(model: ModelSpec, plan: Plan, device: DeviceSpec, span: int) -> DeepEp:
    """The exchange among `plan.expert_ranks` of `span` devices in a row."""
    ranks, k, constants = plan.expert_ranks, model.experts_per_token, DEEP_EP[plan.deep_ep]
    n = ranks_in_node(device, ranks, span)
    link = device.link_among(n, n * (span // ranks))
    nodes = -(-ranks // n)
    if plan.deep_ep == "low_latency":
        inside, between = k * (min(n, ranks) - 1) / ranks, k * (ranks - min(n, ranks)) / ranks
    else:
        groups, limit = model.expert_groups or 1, model.groups_per_token or 1
        # All but what stays on the device, or in the node.
        inside = ranks_touched(model.experts, k, ranks, groups, limit) * (n - 1) / n
        between = 0.0 if nodes == 1 else nodes_touched(model.experts, k, nodes, groups, limit) * (1 - 1 / nodes)
    latency_s = constants.latency_s if nodes == 1 else constants.network_latency_s
    return DeepEp(*(jnp.asarray(x, float) for x in (latency_s, constants.efficiency, constants.network_efficiency,
                                                    link.bytes_per_s)), float(inside), float(between))


DEEP_EP = {
    "low_latency": DeepEpConstants(latency_s=12e-6, network_latency_s=38e-6, efficiency=0.52, network_efficiency=0.94),
    "high_throughput": DeepEpConstants(latency_s=32e-6, network_latency_s=58e-6, efficiency=0.57,
                                       network_efficiency=0.94)}
"""By kind of kernels.

Source: in a node, least absolute log error over dispatch and combine of DeepEP on 8 H100 (ai-dynamo/aiconfigurator,
SGLang 0.5.12; median error 7 % of low_latency, 14 % of high_throughput with 20 multiprocessors). Network share: 46 to
48 of 50 GB/s a card (NVIDIA/nccl-tests issue 290). Network latency: what DeepEP's table of low-latency kernels on 16 to
64 H800 leaves over the bytes, 32 to 41 us; high_throughput: as much more than in a node, not measured.
"""
