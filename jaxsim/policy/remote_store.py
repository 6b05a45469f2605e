"""A store of KV blocks that instances share: how long loads from it take, and what these do to an iteration.

    wait    until the store has answered, latency after the iteration begins, and until its egress is free
    load    host blocks bytes / host rate + blocks bytes / min(link, egress)
    serial     wait + load + compute
    by layer   wait + max(load + compute / layers, compute + load / layers)
    egress     is busy for blocks bytes / egress from the end of the wait on

Loads take the egress in the order in which their iterations begin. Source: LMCache's connector for vLLM, whose local
CPU and remote backends are asked in this order, block after block, and whose loads an iteration waits for.
"""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxsim.kernels import clock
from jaxsim.kernels.clock import Time
from jaxsim.policy.offload import with_loads


class RemoteStore(eqx.Module):
    """What loads from the store take.

    seconds_per_block: of a whole block, on the slower of an instance's link and the egress; latency_s: once for all
    that an iteration loads from the store; layers: of the model; by_layer: loads overlap with the layers before;
    egress_seconds_per_block: for which a block keeps the egress that all share, None without one (`Dims.has_egress`);
    capacity_blocks: of the store, of no meaning where it holds everything (`Dims.remote_log`).
    """

    seconds_per_block: Float[Array, ""]
    latency_s: Float[Array, ""]
    layers: Int[Array, ""]
    by_layer: Bool[Array, ""]
    capacity_blocks: Int[Array, ""]
    egress_seconds_per_block: Float[Array, ""] | None = None

    def wait(self, now: Time, blocks: Int[Array, ""], egress: Time | None) -> tuple[Time, Time | None]:
        """Of an iteration that begins now and loads so many blocks from the store: from now to where they come; and
        when the egress is free then, `egress` before."""
        is_any = blocks > 0
        begin = clock.add(now, clock.on_grid(self.latency_s))
        if egress is not None:
            begin = clock.select(begin < egress, egress, begin)
            busy = clock.on_grid(blocks.astype(jnp.float32) * self.egress_seconds_per_block)
            egress = clock.select(is_any, clock.add(begin, busy), egress)
        nothing = Time(jnp.float32(0), jnp.float32(0))
        return clock.select(is_any, clock.add(begin, Time(-now.hi, -now.lo)), nothing), egress

    def lengthened(self, compute: Time, host_s: Float[Array, ""], blocks: Int[Array, ""], wait: Time) -> Time:
        """How long an iteration takes that loads for `host_s` from host memory and so many blocks from the store, and
        takes `compute` by itself."""
        host = clock.on_grid(host_s)
        load = clock.add(Time(host, jnp.zeros_like(host)),
                         clock.on_grid(blocks.astype(jnp.float32) * self.seconds_per_block))
        return clock.add(with_loads(compute, load, load.hi, self.layers, self.by_layer), wait)
