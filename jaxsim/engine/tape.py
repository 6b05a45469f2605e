"""The tape: a row for each iteration that starts and the jump behind it; written by steps, read on the host."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxsim.engine.lockstep import Turn
from jaxsim.engine.passes import Plan
from jaxsim.engine.writes import Put, Writes
from jaxsim.kernels import clock
from jaxsim.spec.dims import Dims
from jaxsim.state.world import Clocks, Counts, World

COUNTS = ("instance", "running", "waiting", "used_blocks", "iterations", "prefill_tokens", "decode_seqs")
"""Columns of `World.tape_counts`."""


def record(dims: Dims, world: World, plan: Plan, rank: Int[Array, ""], stamp: Float[Array, " 3"],
           counts: Counts, times: Clocks) -> Writes:
    """Append the iteration that starts, and the jump planned behind it, to the tape; past its end, to the scratch."""
    index = jnp.where(plan.is_any, jnp.minimum(world.num_recorded, dims.num_records), dims.num_records)
    seconds = jnp.stack([times.batch.first.hi, times.batch.pace.hi, times.batch.growth_s])
    own, batch = counts.rank, counts.batch
    row = jnp.stack([rank, own.running, own.waiting, own.used_blocks, batch.extra + 1, batch.chunk_tokens,
                     plan.num_decode])
    return {"tape_times": Put((index,), jnp.concatenate([stamp, seconds])), "tape_counts": Put((index,), row)}


def record_all(dims: Dims, world: World, turn: Turn, executor: Int[Array, ""], stamp: Float[Array, " 3"]
               ) -> Writes:
    """The same where ranks iterate together: a row for each."""
    counts, times = turn.everything
    places = world.num_recorded + jnp.arange(dims.num_ranks)
    index = jnp.where(turn.is_launching, jnp.minimum(places, dims.num_records), dims.num_records)
    own, batch, in_flight = counts.rank, *(jax.tree.map(lambda x: x[:, 0], x) for x in (counts.batch, times.batch))
    seconds = jnp.stack([in_flight.first.hi, in_flight.pace.hi, in_flight.growth_s], axis=-1)
    rank = executor * dims.num_ranks + jnp.arange(dims.num_ranks)
    decoding = jnp.where(batch.advance == 1, batch.count - batch.stalled, 0)
    rows = jnp.stack([rank, own.running, own.waiting, own.used_blocks, batch.extra + 1, batch.chunk_tokens, decoding],
                     axis=-1)
    return {"tape_times": Put((index,), jnp.concatenate([jnp.broadcast_to(stamp, (dims.num_ranks, 3)), seconds], -1)),
            "tape_counts": Put((index,), rows)}


def read(dims: Dims, world: World, lane: int) -> dict[str, np.ndarray]:
    """Iterations as they went: a plan that an arrival cut short ends where its instance goes on."""
    length = min(int(world.num_recorded[lane]), dims.num_records)
    epoch, hi, lo, *rest = world.tape_times[lane, :length].T
    first_s, pace_s, growth_s = (x.astype(np.float64) for x in rest)
    steps = dict(zip(COUNTS, world.tape_counts[lane, :length].T.copy(), strict=True))
    start_s, extra = clock.join_reference(epoch, hi, lo), steps["iterations"] - 1.0
    duration_s = first_s + extra * pace_s + growth_s * extra * (extra - 1) / 2
    for instance in range(dims.all_ranks):
        rows = np.flatnonzero(steps["instance"] == instance)
        lasts_s = np.diff(start_s[rows], append=np.inf)
        # A cut takes away whole iterations; less than half of one is rounding.
        slack_s = 0.5 * np.where(extra[rows] > 0, pace_s[rows], first_s[rows])
        is_cut = lasts_s < duration_s[rows] - slack_s
        cut, behind_s = rows[is_cut], lasts_s[is_cut] - first_s[rows[is_cut]]
        linear = pace_s[cut] - growth_s[cut] / 2
        left = 2 * behind_s / (linear + np.sqrt(linear**2 + 2 * growth_s[cut] * np.maximum(behind_s, 0)))
        steps["iterations"][cut] = 1 + np.rint(np.maximum(left, 0))
        duration_s[cut] = lasts_s[is_cut]
    return {"time_s": start_s, "duration_s": duration_s, "first_s": np.minimum(first_s, duration_s), **steps}
