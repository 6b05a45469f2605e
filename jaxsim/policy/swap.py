"""Preemption by swap: what a copy of KV blocks to host memory takes, and who is to be on the device.

A swap moves the K and the V of each layer by itself, in copies of as many blocks as lie in a row:

    copies = 2 layers ceil(blocks / run_blocks)
    seconds = max(copies dispatch_s, copies launch_s + bytes / bytes_per_s)

The first is the CPU that issues the copies, the second the link that carries them.

Source: FastSwitch (arXiv 2411.18424): vLLM's copies are of one block (`run_blocks` 1), block groups make them long.

How long these are with `group_blocks` is a mean field of the free blocks: so many holes, all as long as their mean.

* Who needs blocks takes them from one hole after the other, at most `group_blocks` (60, not confirmed) in one. Holes
  that are shorter are gone then; others only get shorter.
* Who gives a group back makes a hole more, less one for each end at which it meets free blocks: with a share f of all
  blocks free, 1 - 2 f on average (the argument of Knuth's fifty-percent rule, TAOCP 1, 2.5, with both ends).
* What a request grows by lies in groups as long as those that it found when it came.

So runs are long in a pool that is new or nearly empty, and decay with churn to where a request lies in about 1 / (2 f)
of them: within a third of what an allocator comes to that takes any hole, simulated block by block (it is tested).
Approximated: holes differ in length, and an allocator that looks for the longest finds runs about twice as
long as one that does not; FastSwitch's own splitting and merging of groups is not simulated.
"""

import equinox as eqx
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

MOST_LEVELS = 1 << 12
"""Priorities that can be told apart."""

DRAWN_BITS = 16

ONE_HOLE = 256
"""Parts that a hole among the free blocks is counted in."""

MOST_GROUPED_BLOCKS = 1 << 22
"""Of a pool, so that its parts fit 32 bits."""

BOUND_BY_DISPATCH, BOUND_BY_LINK = "dispatch", "link"


class Swap(eqx.Module):
    """Host memory, the copies to and from it, and how priorities are drawn.

    host_blocks: KV blocks of host memory; layers: of a device; block_copy_bytes: of one block's K or V in one layer of
    a device; bytes_per_s: of the link, each way; dispatch_s: of the CPU a copy; launch_s: of the link a copy beside its
    bytes; run_blocks: blocks in one copy. is_async: iterations go on during copies, which each way follow one another;
    otherwise they come first in the iteration. reuse: who comes back keeps its full blocks in host memory, and does not
    copy them out again; where room lacks, the least urgent that run lose theirs.

    group_blocks: at most in one group, whose length depends on the holes among the free blocks, then instead of
    `run_blocks`; None (structure) where all copies are of `run_blocks`.

    period: iterations of an instance between draws of priorities; None (structure) where none are drawn. levels: of
    priority, at most `MOST_LEVELS`, 0 the most urgent; locality: of 65536, how often a request that was on the device
    at a draw halves its level (a request served recently is likelier to stay urgent). Priorities are a hash of
    (request, draw): the same in every run.
    """

    host_blocks: Int[Array, ""]
    layers: Int[Array, ""]
    block_copy_bytes: Float[Array, ""]
    bytes_per_s: Float[Array, ""]
    dispatch_s: Float[Array, ""]
    launch_s: Float[Array, ""]
    run_blocks: Int[Array, ""]
    is_async: Bool[Array, ""]
    reuse: Bool[Array, ""]
    period: Int[Array, ""] | None = None
    levels: Int[Array, ""] | None = None
    locality: Int[Array, ""] | None = None
    group_blocks: Int[Array, ""] | None = None

    @property
    def draws(self) -> bool:
        """Priorities are drawn anew."""
        return self.period is not None

    def parts_s(self, blocks: Int[Array, "*shape"], run: Int[Array, "*shape"] | None = None
                ) -> tuple[Float[Array, "*shape"], Float[Array, "*shape"]]:
        """Seconds of so many blocks of the CPU, and of the link; run: that lie in a row, `run_blocks` if left out."""
        run = self.run_blocks if run is None else run
        copies = (2 * self.layers * ((blocks + run - 1) // run)).astype(jnp.float32)
        num_bytes = (2 * self.layers * blocks).astype(jnp.float32) * self.block_copy_bytes
        return copies * self.dispatch_s, copies * self.launch_s + num_bytes / self.bytes_per_s

    def seconds(self, blocks: Int[Array, "*shape"], run: Int[Array, "*shape"] | None = None
                ) -> Float[Array, "*shape"]:
        """Seconds of a swap of so many blocks, one way; run: as of `parts_s`."""
        return jnp.maximum(*self.parts_s(blocks, run))

    def taken(self, holes: Int[Array, ""], free: Int[Array, ""], blocks: Int[Array, ""]
              ) -> tuple[Int[Array, ""], Int[Array, ""], Int[Array, ""]]:
        """Holes that are left where somebody takes blocks out of so many free ones, the length of its groups and their
        number."""
        run = jnp.clip(free * ONE_HOLE // holes, 1, self.group_blocks)
        gone = jnp.where(run < self.group_blocks, ONE_HOLE * (blocks // run), 0)
        return _bounded(holes - gone, free - blocks), run, (blocks + run - 1) // run

    def given(self, holes: Int[Array, ""], free: Int[Array, ""], num_blocks: Int[Array, ""], blocks: Int[Array, ""],
              run: Int[Array, ""], groups_before: Int[Array, ""]) -> Int[Array, ""]:
        """Holes where blocks are given back beside so many free ones of all; run, groups_before: as it took them."""
        groups = (blocks + run - 1) // run
        share = free * ONE_HOLE // jnp.maximum(num_blocks, 1)
        gone = jnp.where(run < self.group_blocks, ONE_HOLE * (groups - groups_before), 0)
        return _bounded(holes + groups * (ONE_HOLE - 2 * share) - gone, free + blocks)

    def bound_by(self, blocks: int) -> str:
        """What a swap of so many blocks waits for, on the host: `BOUND_BY_DISPATCH` or `BOUND_BY_LINK`."""
        dispatch_s, link_s = self.parts_s(jnp.int32(blocks))
        return BOUND_BY_DISPATCH if dispatch_s > link_s else BOUND_BY_LINK

    def level(self, request: Int[Array, "*shape"], draw: Int[Array, ""], was_served: Bool[Array, "*shape"]
              ) -> Int[Array, "*shape"]:
        """Priority of a request at the draw of that number; was_served: it was on the device then."""
        level = (drawn(request, draw, 0) * self.levels) >> DRAWN_BITS
        stays = was_served & (drawn(request, draw, 1) < self.locality)
        return jnp.where(stays, level >> 1, level)


def _bounded(holes: Int[Array, ""], free: Int[Array, ""]) -> Int[Array, ""]:
    """At least one, and each of a block at least."""
    return jnp.clip(holes, ONE_HOLE, ONE_HOLE * jnp.maximum(free, 1))


def drawn(request: Int[Array, "*shape"], draw: Int[Array, ""], stream: int) -> Int[Array, "*shape"]:
    """`DRAWN_BITS` pseudo-random bits of a counter: two rounds of a product and a shift of 32 bits.

    Source of the constants: C. Wellons, hash-prospector, `lowbias32`; the first three are the primes of xxHash32.
    """
    def wrapped(constant: int) -> Int[Array, ""]:
        return jnp.int32(constant - (1 << 32) if constant >= 1 << 31 else constant)

    def shifted(x, bits: int):
        # Logical: of the 32 bits as they are.
        return lax.shift_right_arithmetic(x, jnp.int32(bits)) & ((1 << (32 - bits)) - 1)

    x = request * wrapped(0x9E3779B1) + draw * wrapped(0x85EBCA77) + wrapped(stream * 0xC2B2AE3D % (1 << 32))
    x = (x ^ shifted(x, 16)) * wrapped(0x7FEB352D)
    x = (x ^ shifted(x, 15)) * wrapped(0x846CA68B)
    return shifted(x ^ shifted(x, 16), 16)
