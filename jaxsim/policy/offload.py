"""KV blocks kept in host memory behind the prefix cache: how long their loads take, and what these do to an iteration.

    load = blocks bytes / rate
    serial     compute + load
    by layer   max(load + compute / layers, compute + load / layers)

The second is the recurrence of two machines in a row over equal layers: a layer is computed once it is loaded and the
one before it is computed. Source: LMCache's connector for vLLM, which starts all loads of an iteration as its forward
pass begins and waits for those of a layer at that layer, or for all of them first.
"""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxsim.kernels import clock
from jaxsim.kernels.clock import Time


class Offload(eqx.Module):
    """Host memory of an instance. capacity_blocks: that it holds, of no meaning where it holds everything
    (`Dims.offload_log`); seconds_per_block: on the link, of all layers of a device; layers: of the model; by_layer:
    loads overlap with the layers before."""

    capacity_blocks: Int[Array, ""]
    seconds_per_block: Float[Array, ""]
    layers: Int[Array, ""]
    by_layer: Bool[Array, ""]

    def seconds(self, blocks: Int[Array, "*shape"]) -> Float[Array, "*shape"]:
        """Of so many blocks on the link."""
        return blocks.astype(jnp.float32) * self.seconds_per_block

    def lengthened(self, compute: Time, blocks: Int[Array, ""]) -> Time:
        """How long an iteration takes that loads so many blocks, and `compute` by itself."""
        load_s = self.seconds(blocks)
        return with_loads(compute, clock.on_grid(load_s), load_s, self.layers, self.by_layer)


def with_loads(compute: Time, load: Time | Float[Array, ""], load_s: Float[Array, ""], layers: Int[Array, ""],
               by_layer: Bool[Array, ""]) -> Time:
    """How long an iteration takes that loads for `load`, which is about `load_s`, and takes `compute` by itself."""
    layers = layers.astype(jnp.float32)
    load_of_one = clock.on_grid(load_s / layers)
    last = clock.on_grid((compute.hi + compute.lo) / layers)
    load_bound = clock.add(Time(last, jnp.zeros_like(last)), load)
    compute_bound = clock.add(compute, load_of_one)
    overlapped = clock.select(compute_bound < load_bound, load_bound, compute_bound)
    return clock.select(by_layer, overlapped, clock.add(compute, load))
