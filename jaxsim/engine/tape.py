"""The tape: a record for each iteration that starts and the jump behind it; written by steps, read after the loop.

In the loop a record is a row of several arrays of the world (`World.tape_*`), filled in when it starts and, once more,
when it ends. `of_world` makes a `Tape` of them, in which the schedule is laid out for programs: what every record did,
which record it went on from, and at which records a request arrived, joined, got its first token and left. `seconds`
prices the records again: that is the function of costs to differentiate, forward or reverse, at a fixed schedule.
"""

from dataclasses import replace
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxsim.cost.base import AbstractIterationCost, BatchStats
from jaxsim.engine import passes
from jaxsim.engine.common import Group, Params
from jaxsim.engine.lockstep import Turn
from jaxsim.engine.passes import Plan
from jaxsim.engine.writes import Put, Writes
from jaxsim.kernels import clock
from jaxsim.kernels.clock import Time
from jaxsim.policy.arrivals import relative_to
from jaxsim.spec.dims import Dims
from jaxsim.state import world as w
from jaxsim.state.requests import Requests
from jaxsim.state.world import Clocks, Counts, World

COUNTS = ("instance", "running", "waiting", "used_blocks", "iterations", "prefill_tokens", "decode_seqs")
"""Columns of `World.tape_counts`."""


class Following(eqx.Module):
    """What the decode iterations behind the first of a record do, as `AbstractIterationCost.decode` is asked about it.

    context, shared, longest: of the first of them.
    """

    num_sequences: Int[Array, "*shape"]
    context: Int[Array, "*shape"]
    shared: Int[Array, "*shape"]
    longest: Int[Array, "*shape"]


class Tape(eqx.Module):
    """What a run did, a record for every iteration that was formed and the `iterations - 1` decode iterations that
    followed it undisturbed, in the order in which they started.

    count: records of the run; where there are more than `records`, the rest is lost (`is_full`) and nothing here says
    what they did.

    Of records (rows from `count` on are padding, without iterations):
    instance: where. previous: the record before it there, -1 if none. is_contiguous: it starts at the very instant
    `previous` ends; otherwise the instance was idle, and the start is an arrival's. start, end: (epoch, hi, lo), to be
    read with `jaxsim.kernels.clock`; duration_s. planned, iterations: how many were foreseen, and how many were done
    before something cut the jump. first_s, pace_s, growth_s: the first takes `first_s`, number j behind it
    `pace_s + j growth_s`. running, waiting, used_blocks: of the instance at the start, once the batch is formed.
    stats: of the first iteration, as the cost model was asked; following: of those behind it.

    Of requests, records by index, -1 where there is none or it is lost: met: in flight where it arrived, -1 where
    the instance was idle. joined: the first with the request. first_token: its first token comes at the end of the
    first iteration of this one. last: its end is the end of this one.
    """

    count: Int[Array, ""]
    instance: Int[Array, " records"]
    previous: Int[Array, " records"]
    is_contiguous: Bool[Array, " records"]
    start: Float[Array, "records 3"]
    end: Float[Array, "records 3"]
    duration_s: Float[Array, " records"]
    planned: Int[Array, " records"]
    iterations: Int[Array, " records"]
    first_s: Float[Array, " records"]
    pace_s: Float[Array, " records"]
    growth_s: Float[Array, " records"]
    running: Int[Array, " records"]
    waiting: Int[Array, " records"]
    used_blocks: Int[Array, " records"]
    stats: BatchStats
    following: Following
    met: Int[Array, " requests"]
    joined: Int[Array, " requests"]
    first_token: Int[Array, " requests"]
    last: Int[Array, " requests"]

    @property
    def num_lost(self) -> Int[Array, ""]:
        """Records that there was no room for."""
        return jnp.maximum(self.count - self.instance.shape[-1], 0)

    @property
    def is_full(self) -> Bool[Array, ""]:
        """Whether records were lost."""
        return self.num_lost > 0


# --- in the loop --------------------------------------------------------------------------------------------


class Known(NamedTuple):
    """What a step knows before it starts anything.

    record: in flight on the rank, or its last, -1 if none; ended: the one that ends in this step (else the scratch),
    and its iterations; met: the one in flight where a request arrives, else -1.
    """

    record: Int[Array, ""]
    ended: Int[Array, ""]
    iterations: Int[Array, ""]
    met: Int[Array, ""]


def known(dims: Dims, is_ending: Bool[Array, ""], is_running: Bool[Array, ""], counts: Counts) -> Known:
    """Of the counts before the end is settled; `is_running`: the executor has an iteration in flight."""
    batch = counts.batch
    is_settled = ~is_ending | (batch.is_committed != 0)
    ended = jnp.where(is_settled, dims.num_records, jnp.minimum(batch.record, dims.num_records))
    return Known(batch.record, ended, batch.extra + 1, jnp.where(is_running, batch.record, -1))


def of_requests(known: Known, arriving: Int[Array, ""], joining: Int[Array, ""], leaving: Int[Array, ""],
                stamp: Float[Array, " 3"]) -> Writes:
    """The end of a record, and what happens to requests in a step; masked ones are the scratch row."""
    return {"tape_ends": Put((known.ended,), jnp.append(stamp, known.iterations.astype(jnp.float32))),
            "tape_met": Put((arriving,), known.met), "tape_joined": Put((joining,), known.record),
            "tape_last": Put((leaving,), known.record)}


def record(dims: Dims, group: Group, world: World, plan: Plan, rank: Int[Array, ""], stamp: Float[Array, " 3"],
           counts: Counts, times: Clocks, longest: Int[Array, ""] | None, logged: Int[Array, ""]) -> Writes:
    """Append the iteration that starts, and the jump planned behind it, to the tape; past its end, to the scratch."""
    index = jnp.where(plan.is_any, jnp.minimum(world.num_recorded, dims.num_records), dims.num_records)
    own, batch = counts.rank, counts.batch
    row = jnp.stack([rank, own.running, own.waiting, own.used_blocks, batch.extra + 1, batch.chunk_tokens,
                     plan.num_decode])
    return {"tape_times": Put((index,), jnp.concatenate([stamp, _seconds(times)])),
            "tape_counts": Put((index,), row), "tape_stats": Put((index,), _asked(dims, group, counts, times, longest)),
            "tape_first": Put((logged,), world.num_recorded)}


def record_all(dims: Dims, group: Group, world: World, turn: Turn, executor: Int[Array, ""],
               stamp: Float[Array, " 3"], logged: Int[Array, " ranks"]) -> Writes:
    """The same where ranks iterate together: a row for each. Their longest contexts are not kept."""
    counts, times = turn.everything
    places = world.num_recorded + jnp.arange(dims.num_ranks)
    index = jnp.where(turn.is_launching, jnp.minimum(places, dims.num_records), dims.num_records)
    counts = replace(counts, batch=jax.tree.map(lambda x: x[:, 0], counts.batch))
    times = replace(times, batch=jax.tree.map(lambda x: x[:, 0], times.batch))
    own, batch = counts.rank, counts.batch
    rank = executor * dims.num_ranks + jnp.arange(dims.num_ranks)
    decoding = jnp.where(batch.advance == 1, batch.count - batch.stalled, 0)
    rows = jnp.stack([rank, own.running, own.waiting, own.used_blocks, batch.extra + 1, batch.chunk_tokens, decoding],
                     axis=-1)
    stamps = jnp.broadcast_to(stamp, (dims.num_ranks, 3))
    return {"tape_times": Put((index,), jnp.concatenate([stamps, _seconds(times)], -1)),
            "tape_counts": Put((index,), rows), "tape_stats": Put((index,), _asked(dims, group, counts, times, None)),
            "tape_first": Put((logged,), places)}


def _seconds(times: Clocks) -> Float[Array, "*shape 5"]:
    """Seconds of the iterations in flight, and the query-key pairs of their chunks, which are not integers either."""
    own = times.batch
    tiled = jnp.zeros_like(own.chunk_pairs) if own.chunk_tiled is None else own.chunk_tiled
    return jnp.stack([own.first.hi, own.pace.hi, own.growth_s, own.chunk_pairs, tiled], axis=-1)


def _asked(dims: Dims, group: Group, counts: Counts, times: Clocks, longest: Int[Array, "*shape"] | None
           ) -> Int[Array, "*shape 11"]:
    """The integers of what the cost model was asked about the iteration that starts, once it is in flight."""
    # A start clears the progress of its pass; that it was of prompts only shows in the token clock.
    counts = replace(counts, rank=replace(counts.rank, progress=jnp.where(counts.batch.advance == 0, w.FILLED, 0)))
    stats, followers, context = passes.statistics(dims, group, counts, times, longest)
    shared = passes.shared_tokens(dims, counts, context) if group.batching.prefix_caching else 0
    after = 0 if longest is None else jnp.maximum(longest + counts.batch.counter + 1, 0) + 1
    longest_chunk = 0 if stats.prefill_longest is None else stats.prefill_longest
    fields = (stats.decode_context, stats.num_prefill, stats.prefill_context, longest_chunk, stats.num_sampled,
              stats.decode_shared, stats.longest_context, followers, context, shared, after)
    return jnp.stack([jnp.broadcast_to(field, jnp.shape(followers)) for field in fields], axis=-1)


# --- after the loop -----------------------------------------------------------------------------------------


def of_world(dims: Dims, requests: Requests, world: World, size: int | None = None) -> Tape:
    """The tape of a finished run of one scenario, of whose `dims` `num_records` is not 0.

    size: rows that it has (static), all that there is room for unless given; enough for the run, if those are.
    """
    size = size or dims.num_records
    rows = slice(0, size)
    is_real = jnp.arange(size) < world.num_recorded
    epoch, hi, lo, first_s, pace_s, growth_s, pairs, tiled = world.tape_times[rows].T
    instance, running, waiting, used_blocks, planned, prefill_tokens, num_decode = world.tape_counts[rows].T
    (decode_context, num_prefill, prefill_context, longest_chunk, num_sampled, shared, longest,
     *following) = world.tape_stats[rows].T
    start, end = jnp.stack([epoch, hi, lo], axis=1), world.tape_ends[rows, :3]
    # One that a bound stopped on its way has no end.
    is_done = is_real & (world.tape_ends[rows, 3] > 0)
    iterations = jnp.where(is_done, world.tape_ends[rows, 3].astype(jnp.int32), 0)

    def relative(stamp, to):
        return jax.vmap(lambda stamp, epoch: relative_to(epoch.astype(jnp.int32), stamp))(stamp, to[:, 0])

    end_time, start_time = relative(end, start), Time(hi, lo)
    duration_s = jnp.where(is_done, clock.elapsed(start_time, end_time), 0.0)
    # Neighbours of one instance, in the order of their starts.
    order = jnp.arange(size)
    if dims.all_ranks > 1:
        order = jnp.argsort(jnp.where(is_real, instance, dims.all_ranks), stable=True)
    before = jnp.concatenate([order[:1], order[:-1]])
    has_any = is_real[order] & (instance[before] == instance[order]) & (jnp.arange(size) > 0)
    previous = jnp.full(size, -1).at[order].set(jnp.where(has_any, before, -1).astype(jnp.int32))
    ends_then = relative(end[previous], start)
    is_contiguous = (previous >= 0) & ends_then.equals(start_time)

    # Who joined before anything had started joined the first of the instance; all others the one behind what they saw.
    is_request = (jnp.arange(dims.num_requests) < requests.count)
    of_requests = slice(0, dims.num_requests)
    log_row, rank = world.placed[of_requests].T
    index = jnp.arange(size, dtype=jnp.int32)
    nowhere = size + dims.all_ranks
    place = jnp.where(previous >= 0, previous, size + instance)
    behind = jnp.full(nowhere + 1, -1).at[jnp.where(is_real, place, nowhere)].set(index).at[nowhere].set(-1)
    seen = world.tape_joined[of_requests]
    is_in = is_request & (rank >= 0)
    joined = behind[jnp.where(~is_in | (seen >= size), nowhere, jnp.where(seen >= 0, seen, size + rank))]

    def kept(records, condition):
        return jnp.where(condition & is_request & (records < size), records, -1)

    def padded(value, nothing):
        return jnp.where(is_real, value, nothing)

    stats = BatchStats(
        padded(num_decode, 1), padded(decode_context, 1), padded(num_prefill, 0), padded(prefill_tokens, 0),
        padded(prefill_context, 0), padded(pairs, 0.0), padded(num_sampled, 1), padded(shared, 0), padded(longest, 1),
        *((padded(tiled, 0.0), padded(longest_chunk, 0)) if dims.reads_chunks else ()))
    return Tape(
        count=world.num_recorded, instance=instance, previous=previous, is_contiguous=is_contiguous, start=start,
        end=jnp.where(is_done[:, None], end, jnp.nan), duration_s=duration_s, planned=planned, iterations=iterations,
        first_s=first_s, pace_s=pace_s, growth_s=growth_s, running=running, waiting=waiting, used_blocks=used_blocks,
        stats=stats, following=Following(*(padded(x, y) for x, y in zip(following, (1, 1, 0, 1), strict=True))),
        met=kept(world.tape_met[of_requests], True), joined=joined,
        first_token=kept(world.tape_first[jnp.maximum(log_row, 0)], log_row >= 0),
        last=kept(world.tape_last[of_requests], True))


def left_out(world: World) -> World:
    """A world, or those of a batch, without what was recorded but for how much it was."""
    names = ("times", "counts", "stats", "ends", "met", "joined", "first", "last")
    return replace(world, **{f"tape_{name}": None for name in names})


def priced(cost: AbstractIterationCost, stats: BatchStats, following: Following
           ) -> tuple[Float[Array, ""], Float[Array, ""], Float[Array, ""]]:
    """First, pace and growth of one record, seconds, as a cost model prices it."""
    pace = cost.decode(jnp.maximum(following.num_sequences, 1), jnp.maximum(following.context, 1), following.shared,
                       following.longest)
    return cost.iteration(stats), pace.first_s, pace.growth_s


def seconds(dims: Dims, params: Params, tape: Tape) -> Float[Array, " records"]:
    """What every record takes under the costs of `params`, the schedule as it was; padding takes none.

    first iteration + sum over the `iterations - 1` behind it, priced one by one with `stats` and `following`: one
    batched evaluation of the cost model, to be differentiated forward or reverse. All NaN if the tape lost records.
    Raises `ValueError` where ranks iterate together, whose seconds are not those of one batch.
    """
    if dims.num_ranks > 1:
        raise ValueError(f"num_ranks = {dims.num_ranks}: where ranks iterate together, no record has a price alone")

    def one(executor, stats, following):
        return priced(params.group(executor).cost, stats, following)

    first_s, pace_s, growth_s = jax.vmap(one)(tape.instance, tape.stats, tape.following)
    extra = jnp.maximum(tape.iterations - 1, 0).astype(jnp.float32)
    behind_s = jnp.where(extra > 0, extra * pace_s + growth_s * (0.5 * extra * (extra - 1)), 0.0)
    total_s = jnp.where(tape.iterations > 0, first_s + behind_s, 0.0)
    return jnp.where(tape.is_full, jnp.nan, total_s)


def read(dims: Dims, world: World, lane: int) -> dict[str, np.ndarray]:
    """Host: iterations of a lane as they went. A run that a bound stopped leaves some as they were planned."""
    length = min(int(world.num_recorded[lane]), dims.num_records)
    epoch, hi, lo, first_s, pace_s, growth_s, *_ = world.tape_times[lane, :length].T
    first_s, pace_s, growth_s = (x.astype(np.float64) for x in (first_s, pace_s, growth_s))
    *end, iterations = world.tape_ends[lane, :length].T
    steps = dict(zip(COUNTS, world.tape_counts[lane, :length].T.copy(), strict=True))
    is_done = iterations > 0
    steps["iterations"] = np.where(is_done, iterations, steps["iterations"]).astype(np.int32)
    start_s, extra = clock.join_reference(epoch, hi, lo), steps["iterations"] - 1.0
    planned_s = first_s + extra * pace_s + growth_s * extra * (extra - 1) / 2
    duration_s = np.where(is_done, clock.join_reference(*end) - start_s, planned_s)
    return {"time_s": start_s, "duration_s": duration_s, "first_s": np.minimum(first_s, duration_s), **steps}
