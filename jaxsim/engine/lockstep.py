"""Ranks that iterate together: data-parallel attention around experts that all of them exchange.

Every rank has its own queue, KV pool and batch, but the exchange of the experts' tokens makes each wait for the slowest
in every layer. So an iteration of the executor takes as long as that of its slowest rank, jumps last as long as no rank
has anything to decide, and a rank without requests runs along (engines let it compute a dummy batch). At the end of an
iteration the ranks take turns within the instant: each settles and retires, then each runs its scheduling pass; the
last to form its batch starts the iteration of all.

Source: vllm-project/vllm, `vllm/v1/engine/core.py` (`DPEngineCoreProc`). Approximated: ranks wait for each other once
an iteration and not once a layer, so the slowest is so in all layers.
"""

from dataclasses import replace
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxsim.cost.base import DecodePace
from jaxsim.engine.common import MAX_SPAN_S, Context, Group, choose, span
from jaxsim.engine.events import Event
from jaxsim.kernels import clock
from jaxsim.kernels.clock import Time
from jaxsim.spec.dims import Dims
from jaxsim.state import world as w
from jaxsim.state.world import Batch, BatchTimes, Clocks, Counts


class Turn(NamedTuple):
    """What a step leaves of an executor's rows, and the iteration that all ranks start in it, if any.

    counts, clocks: the rows. wake, phase: of the executor. batches: of all ranks, as they start.
    """

    counts: Int[Array, " count_fields"]
    clocks: Float[Array, " clock_fields"]
    wake: Time
    phase: Int[Array, ""]
    is_launching: Bool[Array, ""]
    first_end: Time
    everything: tuple[Counts, Clocks]


def runs_along(dims: Dims, is_any: Bool[Array, ""], counts: Counts, times: Clocks) -> tuple[Counts, Clocks]:
    """A rank without requests: it takes no time, and sets no end to a jump."""
    zero = jnp.float32(0)
    batch = replace(counts.batch, extra=jnp.int32(dims.max_jump - 1), advance=jnp.int32(1), is_committed=jnp.int32(0))
    own = replace(times.batch, first=Time(zero, zero), pace=Time(zero, zero), growth_s=zero)
    return (choose(is_any, replace(counts, batch=batch), counts), choose(is_any, replace(times, batch=own), times))


def take_turn(context: Context, event: Event, rows: tuple[Array, Array], counts: Counts, times: Clocks, *,
              cut_extra: Int[Array, ""], has_ended: Bool[Array, ""], is_formed: Bool[Array, ""],
              phase: Int[Array, ""], wake: Time) -> Turn:
    """End the turn of a rank, or go on with it.

    rows: of the executor as the step found them. counts, times: of the rank after the step, with what it would start
    alone. cut_extra: what an arrival leaves of a jump, or many. has_ended, is_formed: its turn to settle, or to form a
    batch, is over. phase, wake: of the executor, as far as an arrival changed them.
    """
    dims = context.dims
    count_rows, clock_rows = w.count_rows(dims), w.clock_rows(dims)
    is_last = event.rank == dims.num_ranks - 1
    is_over = has_ended | is_formed
    is_launching = is_formed & is_last
    following = jnp.where(is_last, 0, event.rank + 1)
    counts = replace(counts, executor=replace(
        counts.executor, turn=jnp.where(is_over, following, counts.executor.turn)))
    everyone = count_rows.everything(count_rows.replaced(rows[0], event.rank, event.batch, counts))
    clocks = clock_rows.everything(clock_rows.replaced(rows[1], event.rank, event.batch, times))
    batch, own = together(context.group, everyone.batch, clocks.batch, event.now)
    if dims.num_records:
        records = context.world.num_recorded + jnp.arange(dims.num_ranks)[:, None]
        batch = replace(batch, record=jnp.broadcast_to(records, batch.record.shape))
    extra = jnp.minimum(everyone.batch.extra, cut_extra)
    everyone = replace(everyone, batch=choose(is_launching, batch, replace(everyone.batch, extra=extra)))
    clocks = replace(clocks, batch=choose(is_launching, own, clocks.batch))

    at_first = (jnp.int32(0), jnp.int32(0))
    first, pace = (Time(t.hi[at_first], t.lo[at_first]) for t in (own.first, own.pace))
    first_end = clock.add(event.now, first)
    end = clock.add(first_end, span(pace, own.growth_s[at_first], batch.extra[at_first]))
    has_work = jnp.any((everyone.rank.running > 0) | (everyone.rank.waiting > 0))
    is_woken = event.is_arrival & (phase == w.IDLE)
    is_settled = has_ended & is_last
    is_going_on = event.is_ending | event.is_passing | is_woken
    phase = jnp.where(is_woken | (is_settled & has_work), w.PASSING, phase)
    phase = jnp.where(is_settled & ~has_work, w.IDLE, phase)
    phase = jnp.where(is_launching, w.ENDING, phase)
    wake = clock.select(is_going_on, event.now, wake)
    wake = clock.select(is_settled & ~has_work, clock.never(), wake)
    wake = clock.select(is_launching, end, wake)
    return Turn(count_rows.row(everyone), clock_rows.row(clocks), wake, phase, is_launching, first_end,
                (everyone, clocks))


def later(time: Time, other_s: Float[Array, ""]) -> Time:
    """The longer of two durations."""
    return clock.select(time.hi < other_s, Time(other_s, jnp.float32(0)), time)


def together(group: Group, batch: Batch, own: BatchTimes, now: Time) -> tuple[Batch, BatchTimes]:
    """All ranks' batches, each of which would start alone, with the iteration that they start together.

    The slowest first iteration; of the paces the slowest, as long as it is that, and no rank's jump is over. To both
    comes what the ranks do with the tokens of all, unless the slowest host takes longer than that anyway.
    """
    def of(rank):
        return DecodePace(Time(own.pace.hi[rank, 0], own.pace.lo[rank, 0]), own.growth_s[rank, 0], batch.extra[rank, 0])

    num_ranks = batch.extra.shape[0]
    first, slowest = Time(own.first.hi[0, 0], own.first.lo[0, 0]), of(0)
    for rank in range(1, num_ranks):
        other, one = Time(own.first.hi[rank, 0], own.first.lo[rank, 0]), of(rank)
        first = clock.select(first < other, other, first)
        is_slower = (slowest.first_s < one.first_s) | (slowest.first_s.equals(one.first_s)
                                                       & (slowest.growth_s < one.growth_s))
        slowest = choose(is_slower, one, slowest)
    extra = jnp.min(batch.extra[:, 0])
    for rank in range(num_ranks):
        one = of(rank)
        faster = one.growth_s - slowest.growth_s
        overtakes = jnp.where(faster > 0, (slowest.first_s.hi - one.first_s.hi) / jnp.where(faster > 0, faster, 1.0),
                              1e9)
        extra = jnp.minimum(extra, jnp.minimum(overtakes, 1e9).astype(jnp.int32))
    decodes = jnp.where(batch.advance == 1, batch.count - batch.stalled, 0)
    followers = batch.count + batch.joining
    has_chunks, no_chunks = jnp.any(batch.num_chunks > 0), jnp.bool_(True)
    cost, most = group.cost, jnp.max(followers)
    first = Time(first.hi + clock.on_grid(cost.together_seconds(
        ~has_chunks, jnp.sum(decodes + batch.chunk_tokens), jnp.max(decodes + batch.chunk_tokens))), first.lo)
    for rank in range(num_ranks):
        host_s = cost.host_seconds(batch.num_chunks[rank, 0] == 0, decodes[rank, 0] + batch.num_chunks[rank, 0])
        first = later(first, clock.on_grid(host_s))
    device_s = slowest.first_s.hi + cost.together_seconds(no_chunks, jnp.sum(followers), most)
    # Host seconds grow with the sequences.
    host_s = cost.host_seconds(no_chunks, most)
    is_host_bound, growth_s = host_s > device_s, slowest.growth_s
    to_device = jnp.where(is_host_bound & (growth_s > 0), (host_s - device_s) / jnp.where(growth_s > 0, growth_s, 1.0),
                          1e9)
    extra = jnp.minimum(extra, jnp.maximum(jnp.minimum(to_device, 1e9).astype(jnp.int32), 1))
    slowest = replace(slowest, first_s=later(Time(device_s, slowest.first_s.lo), host_s),
                      growth_s=jnp.where(is_host_bound, 0.0, growth_s))
    longest_s = jnp.maximum(slowest.first_s.hi + slowest.growth_s * extra.astype(jnp.float32), 1e-9)
    extra = jnp.minimum(extra, jnp.minimum(MAX_SPAN_S / longest_s, 1e9).astype(jnp.int32))

    def everywhere(value):
        return jnp.broadcast_to(value, batch.extra.shape)

    def times(t: Time) -> Time:
        return Time(everywhere(t.hi), everywhere(t.lo))

    return (replace(batch, extra=everywhere(extra)),
            replace(own, start=times(now), first=times(first), pace=times(slowest.first_s),
                    growth_s=everywhere(slowest.growth_s)))
