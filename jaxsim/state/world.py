"""The loop's carry for one scenario.

An executor owns a clock and drives ranks (a waiting queue, a KV pool, slots), a rank runs batches (sequences that
advance together). The three nest in one row an executor, read and written by one gather and one scatter a step;
here an executor has one rank and a rank one batch. Arrays too large for a row (slots, requests) are indexed by
executor or request and touched one entry at a time. A record of `N` requests has row N for masked writes.
"""

from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxsim.kernels import clock, histogram, packed, stack
from jaxsim.kernels.clock import Time
from jaxsim.kernels.queues import Queue
from jaxsim.spec.dims import Dims

ENDING, PASSING, IDLE = 0, 2, 3
"""What an executor's wake-up is: an iteration's end, a scheduling pass, or nothing. Arrivals rank between the
first two at one instant."""

DECODED, FORMED, FILLED, PREEMPTED, CLOSED, WAS_EMPTY, PASS, CHUNKED, ENDED = (1 << i for i in range(9))
"""Progress of a scheduling pass: decodes have their blocks; the forming prompt has its chunk; a prompt is
scheduled; something was preempted; admissions are over; nothing ran when the pass began; a pass is under way at
all; the forming prompt's chunk is settled; the walk over running sequences ended early."""

STUCK, STEP_LIMIT, TOO_SLOW = 1, 2, 4
"""Fault bits: a pass that can schedule nothing and will never be able to; more steps than allowed; an iteration that
takes longer than the clock can hold, or no time that is a number."""

REQUEST, OFFSET, RESERVED, PROMPT, STAMP = range(5)
"""Columns of `World.slot_entries`; the last two only where passes scan the slots. RESERVED: blocks, or under
`reserve="expected"` max_tokens. PROMPT: tokens, or under `order="priority"` the request's rank. STAMP: place in
the running order, or the iteration count at admission."""

EXECUTOR_ROWS = ("wake_hi", "wake_lo", "phase", "counts", "clocks", "residues")
"""Arrays of which a step writes the whole row of its executor."""

EXECUTOR_ARRAYS = (*EXECUTOR_ROWS, "outstanding", "slot_keys", "slot_entries", "slot_previous", "slot_next",
                   "free_slots", "waiting_set")
"""Arrays that have an axis of executors."""


class Executor(eqx.Module):
    """The iteration in flight: `extra` decode iterations follow the first; the first advances the token clock by
    `advance`; `is_committed` once its end was applied; `progress` of the pass; `gap_count` sequences whose next
    token prompt-only iterations delay; `log_row` where the time of its first tokens goes."""

    extra: Int[Array, ""]
    advance: Int[Array, ""]
    is_committed: Int[Array, ""]
    progress: Int[Array, ""]
    gap_count: Int[Array, ""]
    log_row: Int[Array, ""]


class Rank(eqx.Module):
    """A waiting queue (linked by request), a KV pool, and who runs. `forming_*` is the one partially computed
    prompt, `tail` the slot admitted last among those past their prompt, `visible` how many waiting requests a
    pass may see under asynchronous scheduling, `next_stamp` the next place in the order of running sequences.
    `forming_chunk` and `cursor` belong to a pass that walks the running sequences one by one."""

    queue: Queue
    visible: Int[Array, ""]
    running: Int[Array, ""]
    used_blocks: Int[Array, ""]
    peak_blocks: Int[Array, ""]
    forming_slot: Int[Array, ""]
    forming_request: Int[Array, ""]
    forming_computed: Int[Array, ""]
    forming_known: Int[Array, ""]
    tail: Int[Array, ""]
    next_stamp: Int[Array, ""]
    forming_chunk: Int[Array, ""]
    cursor: Int[Array, ""]

    @property
    def waiting(self) -> Int[Array, ""]:
        """Requests in the queue."""
        return self.queue.length


class Batch(eqx.Module):
    """Sequences that decode together, on the lazy token clock: after `counter` iterations a sequence holds
    `d + counter` tokens, and only `count` and the sum of `d` are kept. `joining*` are those whose prompt
    completes in the iteration being formed or in flight, `resuming` of them after a preemption; `chunk_*` its prompt
    chunks; `stalled*` those that sit it out (their offsets were lowered by one in advance, so that the common clock is
    right for them too)."""

    counter: Int[Array, ""]
    count: Int[Array, ""]
    offsets: Int[Array, ""]
    joining: Int[Array, ""]
    joining_offsets: Int[Array, ""]
    joining_first: Int[Array, ""]
    resuming: Int[Array, ""]
    budget: Int[Array, ""]
    num_chunks: Int[Array, ""]
    chunk_tokens: Int[Array, ""]
    chunk_context: Int[Array, ""]
    stalled: Int[Array, ""]
    stalled_offsets: Int[Array, ""]
    num_iterations: Int[Array, ""]


class Counts(eqx.Module):
    """The integer half of an executor's row."""

    executor: Executor
    rank: Rank
    batch: Batch


class Clocks(eqx.Module):
    """The float half: start and pace of the iteration in flight, and integrals over time (two-float).

    first: the first iteration's duration; then iteration j takes `pace + j * growth_s`, durations as exact pairs.
    `gap_s`: time for which sequences past their prompt have waited on prompt-only iterations; `resume_s`: time since
    their preemption, summed over resuming sequences. `ratio` of expected
    outputs that admission reserves for. busy: seconds; running: sequence-seconds; held: block-seconds.
    """

    start: Time
    first: Time
    pace: Time
    growth_s: Float[Array, ""]
    chunk_pairs: Float[Array, ""]
    gap_s: Float[Array, ""]
    resume_s: Float[Array, ""]
    ratio: Float[Array, ""]
    busy: Time
    running: Time
    held: Time


class World(eqx.Module):
    """Everything the loop carries for one scenario, grouped by what it belongs to."""

    # Progress of the whole scenario.
    epoch: Int[Array, ""]
    steps: Int[Array, ""]
    next_arrival: Int[Array, ""]
    num_finished: Int[Array, ""]
    num_logged: Int[Array, ""]
    fault: Int[Array, ""]
    is_frozen: Int[Array, ""]
    # Executors: what wakes each next, and their rows.
    wake_hi: Float[Array, " instances"]
    wake_lo: Float[Array, " instances"]
    phase: Int[Array, " instances"]
    outstanding: Int[Array, " instances"]
    counts: Int[Array, "instances count_fields"]
    clocks: Float[Array, "instances clock_fields"]
    residues: Int[Array, "instances block_size"]
    # Slots: packed completion keys, entries (columns above), the running list, free slots.
    slot_keys: Int[Array, "instances slot_width"]
    slot_entries: Int[Array, "instances slot_width entry_fields"]
    slot_previous: Int[Array, "instances slot_width"]
    slot_next: Int[Array, "instances slot_width"]
    free_slots: Int[Array, "instances slot_width"]
    # Requests: the waiting queue's links, or its set of ranks, (emitted, preemptions), and what is written once each.
    next_waiting: Int[Array, " rows"]
    waiting_set: Int[Array, "instances words"]
    progress: Int[Array, "rows 2"]
    placed: Int[Array, "rows 2"]
    scheduled: Float[Array, "rows 3"]
    finished: Float[Array, "rows 3"]
    stalled: Int[Array, "rows 3"]
    preempted: Float[Array, "rows 3"]
    first_tokens: Float[Array, "rows 3"]
    # Time between tokens, and the tape: a row a started iteration (or jump) of times (epoch, hi, lo; seconds of the
    # first iteration, of the one behind it, and by how much each that follows is longer) and
    # counts (executor, running, waiting, used blocks, iterations, prompt tokens, decoding).
    itl: Int[Array, " itl_bins"]
    tape_times: Float[Array, "records 6"]
    tape_counts: Int[Array, "records 7"]
    num_recorded: Int[Array, ""]


def _zeros_like_record(cls, **nested):
    fields = {name: nested.get(name) for name in cls.__dataclass_fields__}
    return cls(**{name: jnp.int32(0) if value is None else value for name, value in fields.items()})


def empty_counts(dims: Dims) -> Counts:
    """An executor with nothing to do."""
    null = jnp.int32(dims.null_slot)
    queue = Queue(jnp.int32(0), jnp.int32(0), jnp.int32(0))
    rank = _zeros_like_record(Rank, queue=queue, forming_slot=null, tail=null)
    return Counts(_zeros_like_record(Executor), rank, _zeros_like_record(Batch))


def empty_clocks() -> Clocks:
    """An executor that has not run yet."""
    zero = jnp.float32(0)
    at_zero = Time(zero, zero)
    return Clocks(at_zero, at_zero, at_zero, zero, zero, zero, zero, zero, at_zero, at_zero, at_zero)


def initial_world(dims: Dims, entry_fields: int = 3, waiting_words: int = 1,
                  ratio_start: Float[Array, ""] | float = 0.0) -> World:
    """All queues empty, all pools free, time zero. `entry_fields`: columns of `slot_entries` in use;
    `waiting_words`: of a sorted waiting queue."""
    instances, width, rows = dims.num_instances, dims.slot_width, dims.num_requests + 1

    def ints(*shape, value=0):
        return jnp.full(shape, value, jnp.int32)

    def floats(*shape):
        return jnp.zeros(shape, jnp.float32)

    def repeated(record):
        row = packed.to_row(record)
        return jnp.broadcast_to(row, (instances, *row.shape))

    return World(
        epoch=ints(), steps=ints(), next_arrival=ints(), num_finished=ints(), num_logged=ints(), fault=ints(),
        is_frozen=ints(),
        wake_hi=clock.never((instances,)).hi, wake_lo=floats(instances), phase=ints(instances, value=IDLE),
        outstanding=ints(instances),
        counts=repeated(empty_counts(dims)),
        clocks=repeated(replace(empty_clocks(), ratio=jnp.asarray(ratio_start, jnp.float32))),
        residues=ints(instances, dims.block_size),
        slot_keys=ints(instances, width, value=packed.EMPTY), slot_entries=ints(instances, width, entry_fields),
        slot_previous=ints(instances, width, value=dims.null_slot),
        slot_next=ints(instances, width, value=dims.null_slot),
        free_slots=jnp.broadcast_to(stack.full(dims.num_slots, width), (instances, width)),
        next_waiting=ints(rows), waiting_set=ints(instances, waiting_words), progress=ints(rows, 2),
        placed=ints(rows, 2, value=-1),
        scheduled=floats(rows, 3), finished=floats(rows, 3), stalled=ints(rows, 3), preempted=floats(rows, 3),
        first_tokens=floats(rows, 3), itl=ints(histogram.NUM_BINS),
        tape_times=floats(dims.num_records + 1, 6), tape_counts=ints(dims.num_records + 1, 7), num_recorded=ints())


def row_templates(dims: Dims) -> tuple[Counts, Clocks]:
    """Records that give `packed.from_row` its structure."""
    return jax.eval_shape(lambda: empty_counts(dims)), jax.eval_shape(empty_clocks)
