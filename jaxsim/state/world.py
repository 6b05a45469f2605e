"""The loop's carry for one scenario: executors, their ranks, the batches of these.

An executor owns a clock and drives ranks; a rank is a waiting queue, a KV pool and slots, and runs batches: sequences
that advance together. A plain replica is one of each; data-parallel attention is one executor with many ranks, pipeline
stages are one rank with many batches in flight. The records of an executor, all of its ranks and all of their batches
lie in one row (`Rows`), so that a step reads and writes them at once, whatever their number. Arrays too large for a row
have an axis of ranks or of batches (`OF_RANK`, `OF_BATCH`; all ranks of the first executor, then of the next) or of
requests, and are touched one entry at a time. A record of `N` requests has row N for masked writes.
"""

import functools
import math
from dataclasses import replace
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree, Shaped

from jaxsim.kernels import clock, histogram, packed, stack, timers
from jaxsim.kernels.clock import Time
from jaxsim.kernels.queues import Queue
from jaxsim.spec.dims import Dims
from jaxsim.state.control import Control, no_control
from jaxsim.state.flights import Flights, no_flights
from jaxsim.state.roles import Roles, no_roles

ENDING, PASSING, IDLE, RESTING = 0, 2, 3, 4
"""What an executor's wake-up is: an iteration's end, a scheduling pass, nothing, or nothing although somebody waits,
for blocks that others will give back. Arrivals rank between the first two at one instant."""

DECODED, FORMED, FILLED, PREEMPTED, CLOSED, WAS_EMPTY, PASS, CHUNKED, ENDED, RELEASED = (1 << i for i in range(10))
"""Progress of a scheduling pass: decodes have their blocks; the forming prompt has its chunk; a prompt is
scheduled; something was preempted; admissions are over; nothing ran when the pass began; a pass is under way at
all; the forming prompt's chunk is settled; the walk over running sequences ended early; prompts need not wait for
more."""

STUCK, STEP_LIMIT, TOO_SLOW, STARVED, LOG_FULL, NO_NUMBER = 1, 2, 4, 8, 16, 32
WINDOW_FULL, SLACK_WINDOW_FULL, LINKS_FULL = 64, 128, 256
LINE_FULL = 512
"""Fault bits: a pass that can schedule nothing and will never be able to; more steps than allowed; an iteration that
takes longer than the clock can hold, or no time that is a number; requests are left and nothing will ever happen; more
releases of cached blocks than the log of them holds; an action of an environment whose router has a NaN; more requests
in line than `Dims.swap_window`; more that were preempted and wait than `Dims.slack_window`; more transfers under way
than `Dims.num_flights`; more requests that wait than `Dims.line_window`."""

DRAWN = 1 << 10
"""Further progress: somebody was swapped out for a draw of priorities, or called in."""

NO_SWEEP = (-1, 0, 0, 0)
"""`World.sweep` where nobody has been looked at."""

REQUEST, OFFSET, RESERVED, PROMPT, STAMP = range(5)
LIMIT, PLACE, SINCE = RESERVED, PROMPT, STAMP
"""Columns of `World.slot_entries`; the last two only where passes scan the slots. RESERVED blocks, PROMPT tokens and
the place in the running order (STAMP); under `reserve="expected"` max_tokens (LIMIT) and the iterations of the executor
at admission (SINCE); under `order="priority"` the request's PLACE in that order."""

TENANT_FIELDS = 5
"""Of every tenant in a row of `World.tenants`; one more is of the rank."""

OF_EXECUTOR = ("wake_hi", "wake_lo", "phase", "counts", "clocks")
OF_RANK = ("outstanding", "slot_entries", "slot_previous", "slot_next", "free_slots", "waiting_set", "resident",
           "references", "log", "newest", "sent_blocks", "window", "copies", "tenants", "slot_ends", "stored",
           "touches", "touched", "again", "fresh", "line", "line_due", "tangents")
OF_BATCH = ("residues", "slot_keys")
"""Arrays of `World` by what their first axis counts."""

WHOLE_ROWS = (*OF_EXECUTOR, "residues", "tenants", "tangents")
"""Arrays of which a step writes the whole row of the executor, rank or batch it works on."""


class Executor(eqx.Module):
    """What its ranks share. num_iterations: so far; turn: of several ranks the one that goes on, of a pipeline the
    batch whose pass is under way, else None."""

    num_iterations: Int[Array, "*shape"]
    turn: Int[Array, "*shape"] | None


class Cache(eqx.Module):
    """Blocks that nobody holds: those never used, those released and not evicted (both as they were when evictions were
    last settled); where the log of releases begins and ends; and how many blocks more running requests hold, each by
    itself, than are in use. See `jaxsim.engine.prefix`."""

    never_used: Int[Array, "*shape"]
    released: Int[Array, "*shape"]
    head: Int[Array, "*shape"]
    end: Int[Array, "*shape"]
    shared: Int[Array, "*shape"]


class OffloadCounts(eqx.Module):
    """Of host memory behind the prefix cache: blocks loaded so far, and stored; where the log of touches begins and
    ends. See `jaxsim.engine.offload`. With a store that instances share: of those loaded, the ones that came from
    there."""

    loaded_blocks: Int[Array, "*shape"]
    stored_blocks: Int[Array, "*shape"]
    head: Int[Array, "*shape"]
    end: Int[Array, "*shape"]
    fetched_blocks: Int[Array, "*shape"] | None = None


class Shards(NamedTuple):
    """Of decodes whose KV groups of devices share (`jaxsim.engine.kv_parallel`): those on one group, their context
    tokens, and the longest of them; those that have not filled every group; those that have, and their tokens; in how
    many iterations the first of all leaves its kind."""

    local: Int[Array, "*shape"]
    local_tokens: Int[Array, "*shape"]
    longest: Int[Array, "*shape"]
    filling: Int[Array, "*shape"]
    whole: Int[Array, "*shape"]
    whole_tokens: Int[Array, "*shape"]
    edge: Int[Array, "*shape"]


class SwapCounts(eqx.Module):
    """Requests swapped out (or on the way), and on the way in; blocks of copies out that are not through, which are in
    use; blocks of host memory in use; blocks copied out so far, and those spared since host memory had them. With
    turns kept: the copies of finished turns in the order in which they ended (those that were used or dropped since
    among them), and the blocks of those still there. With block groups: holes among the free blocks beyond one, in
    parts as of `jaxsim.policy.swap`. See `jaxsim.engine.swapping`."""

    out: Int[Array, "*shape"]
    coming: Int[Array, "*shape"]
    leaving_blocks: Int[Array, "*shape"]
    host_blocks: Int[Array, "*shape"]
    copied_blocks: Int[Array, "*shape"]
    spared_blocks: Int[Array, "*shape"]
    turns: Queue | None = None
    turn_blocks: Int[Array, "*shape"] | None = None
    holes: Int[Array, "*shape"] | None = None


class PartialPrompts(eqx.Module):
    """Prompts that are partly computed side by side (`jaxsim.engine.partial_prefills`), a number each in every column:
    slots (the null slot where there is none), requests, tokens computed and known, whether each has had its turn in the
    pass under way; and whether any long one has."""

    slot: tuple[Int[Array, "*shape"], ...] | Int[Array, " prompts"]
    request: tuple[Int[Array, "*shape"], ...] | Int[Array, " prompts"]
    computed: tuple[Int[Array, "*shape"], ...] | Int[Array, " prompts"]
    known: tuple[Int[Array, "*shape"], ...] | Int[Array, " prompts"]
    had_turn: tuple[Int[Array, "*shape"], ...] | Int[Array, " prompts"]
    had_long: Int[Array, "*shape"]


class Rank(eqx.Module):
    """A waiting queue (linked by request), a KV pool, and who runs.

    progress: of the scheduling pass; `forming_*` is the one partially computed prompt (in a pipeline, `forming_batch`
    has its last chunk), `visible` how many waiting requests a pass may see under asynchronous scheduling, `next_stamp`
    the next place in the order of running sequences; `cache` only with prefix caching. `forming_chunk` and `cursor`
    belong to a pass that walks the running sequences one by one; where time limits chunks, `forming_chunk` are the
    tokens of the last. Where whole prompts wait for each other, all
    `forming_*` but the slot, and `cursor`, are those counted (`jaxsim.engine.gathering`). With roles: whose KV is on
    the way here and who has it here and does not run, how many of these a pass may see, the blocks that both hold, and
    those kept for who has left and is not delivered yet. With migration the same, but that `held_blocks` are those of
    who is on the way only; then `killed` are the waiting ones that were preempted, and `first_stamp` is where the
    running order stood when the last pass began. `waiting_blocks` are those that the waiting requests need to begin,
    `urgent` counts urgent ones that run. Where others encode images: tiles in the multimodal cache, and
    those of requests that no pass has taken yet. For routers that ask (`jaxsim.engine.caches`): prompt tokens
    of requests sent here whose first token is not out, less those found in the cache then; tokens of the tree of what
    was sent here. Where links are shared, `in_transfer` are those who have left theirs, `on_links` counts the others.
    `partial`: where several prompts are partly computed; `forming_*` is then that of them which a step works on.
    """

    queue: Queue
    visible: Int[Array, "*shape"]
    running: Int[Array, "*shape"]
    used_blocks: Int[Array, "*shape"]
    peak_blocks: Int[Array, "*shape"]
    forming_slot: Int[Array, "*shape"]
    forming_request: Int[Array, "*shape"]
    forming_computed: Int[Array, "*shape"]
    forming_known: Int[Array, "*shape"]
    next_stamp: Int[Array, "*shape"]
    forming_chunk: Int[Array, "*shape"]
    cursor: Int[Array, "*shape"]
    progress: Int[Array, "*shape"]
    forming_batch: Int[Array, "*shape"] | None
    cache: Cache | None
    in_transfer: Queue | None
    ready: Queue | None
    visible_ready: Int[Array, "*shape"] | None
    held_blocks: Int[Array, "*shape"] | None
    kept_blocks: Int[Array, "*shape"] | None
    waiting_blocks: Int[Array, "*shape"] | None
    killed: Int[Array, "*shape"] | None
    first_stamp: Int[Array, "*shape"] | None
    urgent: Int[Array, "*shape"] | None
    cached_tiles: Int[Array, "*shape"] | None
    waiting_tiles: Int[Array, "*shape"] | None
    prefill_tokens: Int[Array, "*shape"] | None
    tree_tokens: Int[Array, "*shape"] | None
    swap: SwapCounts | None = None
    offload: OffloadCounts | None = None
    on_links: Int[Array, "*shape"] | None = None
    partial: PartialPrompts | None = None

    @property
    def waiting(self) -> Int[Array, "*shape"]:
        """Requests in the queue."""
        return self.queue.length


class Batch(eqx.Module):
    """Sequences that decode together, on the lazy token clock: after `counter` iterations a sequence holds
    `d + counter` tokens, and only `count` and the sum of `d` are kept. `tail`: the slot admitted last among them.

    joining*: those whose prompt completes in the iteration being formed or in flight, `resuming` of them after a
    preemption; chunk_*: its prompt chunks; budget: tokens it may still take; stalled*: those that sit it out (their
    offsets were lowered by one in advance, so that the common clock is right for them too). Of the iteration in flight:
    `extra` decode iterations follow the first, which advances the token clock by `advance`; `is_committed` once its end
    was applied; `gap_count` sequences whose next token prompt-only iterations delay; `log_row` where the time of its
    first tokens goes; `record` its place on the tape, if there is one; `taken` in a pipeline, how many of the `extra`
    have taken their blocks, those of all before the jump ends if others may be admitted beside it; with roles that too,
    and `entering`, how many of `count` came with their KV. tiles: of images that the iteration encodes, or where others
    do, whose prompts it completes. `joining_prefill`: of those whose first token the iteration
    computes, their part of the rank's `prefill_tokens`. `is_lost`: where executors fail, the last iteration of the
    jump, or the first without any, did not come to its end. loading: blocks that are loaded for the
    iteration, `fetching` of them from the store that instances share. With KV-cache parallelism: `shards` of those that
    decode in the iteration that is formed, and the tokens of its chunks whose contexts several groups hold.
    longest_chunk: `BatchStats.prefill_longest`, where the cost reads it.
    """

    counter: Int[Array, "*shape"]
    count: Int[Array, "*shape"]
    offsets: Int[Array, "*shape"]
    tail: Int[Array, "*shape"]
    joining: Int[Array, "*shape"]
    joining_offsets: Int[Array, "*shape"]
    joining_first: Int[Array, "*shape"]
    resuming: Int[Array, "*shape"]
    budget: Int[Array, "*shape"]
    num_chunks: Int[Array, "*shape"]
    chunk_tokens: Int[Array, "*shape"]
    chunk_context: Int[Array, "*shape"]
    stalled: Int[Array, "*shape"]
    stalled_offsets: Int[Array, "*shape"]
    extra: Int[Array, "*shape"]
    advance: Int[Array, "*shape"]
    is_committed: Int[Array, "*shape"]
    gap_count: Int[Array, "*shape"]
    log_row: Int[Array, "*shape"]
    record: Int[Array, "*shape"] | None
    taken: Int[Array, "*shape"] | None
    entering: Int[Array, "*shape"] | None
    tiles: Int[Array, "*shape"] | None
    joining_prefill: Int[Array, "*shape"] | None
    is_lost: Int[Array, "*shape"] | None = None
    loading: Int[Array, "*shape"] | None = None
    fetching: Int[Array, "*shape"] | None = None
    shards: Shards | None = None
    spread_chunks: Int[Array, "*shape"] | None = None
    longest_chunk: Int[Array, "*shape"] | None = None


class Counts(eqx.Module):
    """The integers of an executor; of one of its ranks and batches in a step, of all of them with axes
    `executors`, `executors ranks`, `executors ranks batches` in `Rows.everything`."""

    executor: Executor
    rank: Rank
    batch: Batch


class ExecutorTimes(eqx.Module):
    """busy: seconds with an iteration in flight (two-float). Of a pipeline: when the engine and each stage become free,
    up to when busy time is counted, and the seconds of all iterations, each as long as it takes alone; else None."""

    busy: Time
    free: tuple[Time, ...] | None
    counted: Time | None
    alone: Time | None


class SwapTimes(eqx.Module):
    """When the links to host memory and back are free; seconds of copies that come before the next iteration, and of
    all that came before iterations so far (two-float)."""

    link_out: Time
    link_in: Time
    delay: Time
    stood: Time


class BorrowingTimes(eqx.Module):
    """Of contexts that other instances give: for the iteration being formed, how long the own link waits for those of
    the others, and seconds on it of hidden states, and of KV; `linked`: seconds on it so far."""

    waited: Time
    entry: Time
    load: Time
    linked: Time


class RankTimes(eqx.Module):
    """Integrals over time: `running` sequence-seconds, `held` block-seconds (two-float). `ratio` of expected outputs
    that admission reserves for; `loads`: seconds by which loads lengthened iterations; `recompute`: of
    layers of siblings' contexts, in the iteration being formed; `borrowing`: where these are instances of the run."""

    ratio: Float[Array, "*shape"]
    running: Time
    held: Time
    swap: SwapTimes | None = None
    loads: Time | None = None
    recompute: Time | None = None
    borrowing: BorrowingTimes | None = None


class BatchTimes(eqx.Module):
    """Start and pace of the iteration in flight: the first takes `first`, then iteration j takes
    `pace + j * growth_s`, durations as exact pairs.

    chunk_pairs: query-key pairs of the prompt chunks (`BatchStats.prefill_pairs`), `chunk_tiled` those of whole tiles
    (`prefill_tiled`) where the cost reads them. gap_s: time for which sequences past
    their prompt have waited on prompt-only iterations; resume_s: time since their preemption, summed over resuming
    sequences. end: in a pipeline, when the batch returns, `clock.never()` unless it is in flight; else None.
    """

    start: Time
    first: Time
    pace: Time
    growth_s: Float[Array, "*shape"]
    chunk_pairs: Float[Array, "*shape"]
    gap_s: Float[Array, "*shape"]
    resume_s: Float[Array, "*shape"]
    end: Time | None
    chunk_tiled: Float[Array, "*shape"] | None = None


class Clocks(eqx.Module):
    """The floats of an executor, as `Counts`."""

    executor: ExecutorTimes
    rank: RankTimes
    batch: BatchTimes


class Rows:
    """How `Counts` or `Clocks` lie in the row of an executor: its own fields, those of each rank, of each batch."""

    def __init__(self, dims: Dims, like: Counts | Clocks):
        self.num_ranks, self.num_batches = dims.num_ranks, dims.num_batches
        self._parts = (like.executor, like.rank, like.batch)
        self._record = type(like)
        self._sizes = [len(jax.tree.leaves(part)) for part in self._parts]

    @property
    def width(self) -> int:
        """Fields of a row."""
        own, rank, batch = self._sizes
        return own + self.num_ranks * (rank + self.num_batches * batch)

    def one(self, row: Shaped[Array, " fields"], rank: Int[Array, ""], batch: Int[Array, ""]) -> Counts | Clocks:
        """Scalars of the executor, of one rank, of one of its batches."""
        if self.num_ranks == self.num_batches == 1:
            return packed.from_row(self._record(*self._parts), row)
        everything = self.everything(row)
        at_rank = jax.tree.map(lambda x: x[0] if self.num_ranks == 1 else x[rank], (everything.rank, everything.batch))
        at_batch = jax.tree.map(lambda x: x[0] if self.num_batches == 1 else x[batch], at_rank[1])
        return self._record(everything.executor, at_rank[0], at_batch)

    def replaced(self, row, rank: Int[Array, ""], batch: Int[Array, ""], one: Counts | Clocks
                 ) -> Shaped[Array, " fields"]:
        """The row with `one` in the place of that rank and batch."""
        if self.num_ranks == self.num_batches == 1:
            return packed.to_row(one)
        everything = self.everything(row)
        is_rank = jnp.arange(self.num_ranks) == rank
        is_batch = is_rank[:, None] & (jnp.arange(self.num_batches) == batch)

        def put(where, old, new):
            return jax.tree.map(lambda x, y: jnp.where(where, y, x), old, new)

        return self.row(self._record(one.executor, put(is_rank, everything.rank, one.rank),
                                     put(is_batch, everything.batch, one.batch)))

    def everything(self, rows: Shaped[Array, "*shape fields"]) -> Counts | Clocks:
        """All of it, with axes `*shape`, `*shape ranks`, `*shape ranks batches`; of NumPy's where the rows are."""
        parts, start = [], 0
        for like, size, axes in zip(self._parts, self._sizes, self._axes, strict=True):
            end = start + size * math.prod(axes)
            fields = rows[..., start:end].reshape(*rows.shape[:-1], *axes, size)
            parts.append(jax.tree.unflatten(jax.tree.structure(like), [fields[..., i] for i in range(size)]))
            start = end
        return self._record(*parts)

    def row(self, everything: Counts | Clocks) -> Shaped[Array, "*shape fields"]:
        """The rows again."""
        parts = [jnp.stack(jax.tree.leaves(part), axis=-1)
                 for part in (everything.executor, everything.rank, everything.batch)]
        shape = parts[0].shape[:-1]
        return jnp.concatenate([part.reshape(*shape, -1) for part in parts], axis=-1)

    @property
    def _axes(self):
        return (), (self.num_ranks,), (self.num_ranks, self.num_batches)


class World(eqx.Module):
    """Everything the loop carries for one scenario, grouped by what it belongs to."""

    # Progress of the whole scenario.
    epoch: Int[Array, ""]
    steps: Int[Array, ""]
    num_routed: Int[Array, ""]
    source: PyTree
    due: Float[Array, "due_rows 3"]
    num_finished: Int[Array, ""]
    num_logged: Int[Array, ""]
    fault: Int[Array, ""]
    is_frozen: Int[Array, ""]
    # Executors: what wakes each next, and their rows.
    wake_hi: Float[Array, " executors"]
    wake_lo: Float[Array, " executors"]
    phase: Int[Array, " executors"]
    counts: Int[Array, "executors count_fields"]
    clocks: Float[Array, "executors clock_fields"]
    # Ranks: requests routed to it and not finished; slots: entries (columns above), the running list, the free ones.
    outstanding: Int[Array, " ranks"]
    slot_entries: Int[Array, "ranks slot_width entry_fields"]
    slot_previous: Int[Array, "ranks slot_width"]
    slot_next: Int[Array, "ranks slot_width"]
    free_slots: Int[Array, "ranks slot_width"]
    # Batches: how many sequences have each residue of tokens by block; completion keys, packed with the rank's slot.
    residues: Int[Array, "batches block_size"]
    slot_keys: Int[Array, "batches slot_width"]
    # Requests: the waiting queue's links, or its set of places; (emitted tokens, preemptions); (row of the first-token
    # log, rank); times (epoch, hi, lo) of the first iteration, the end, the last preemption, and, by row of the log, of
    # first tokens. `stalled` sums the times of returns and takes away those of preemptions, as parts of
    # `clock.to_integers`: seconds without a place once every preemption has its return.
    next_waiting: Int[Array, " rows"]
    waiting_set: Int[Array, "ranks words"]
    progress: Int[Array, "rows 2"]
    placed: Int[Array, "rows 2"]
    scheduled: Float[Array, "rows 3"]
    finished: Float[Array, "rows 3"]
    stalled: Int[Array, "rows 3"]
    preempted: Float[Array, "rows 3"]
    first_tokens: Float[Array, "rows 3"]
    # Time between tokens.
    itl: Int[Array, " itl_bins"]
    # The tape (`jaxsim.engine.tape`), else None: a row a started iteration (or jump) of times (epoch, hi, lo; seconds
    # of the first iteration, of the one behind it, and by how much each that follows is longer; query-key pairs of its
    # chunks), counts (rank, running, waiting, used blocks, iterations, prompt tokens, decoding), what else its cost was
    # asked for, and its end (epoch, hi, lo; iterations done). Of requests: the row in flight when one arrived, the one
    # before it joined, that at whose end it left, and, by row of the first-token log, that of the first tokens.
    tape_times: Float[Array, "records 8"] | None = None
    tape_counts: Int[Array, "records 7"] | None = None
    tape_stats: Int[Array, "records 11"] | None = None
    tape_ends: Float[Array, "records 4"] | None = None
    tape_met: Int[Array, " rows"] | None = None
    tape_joined: Int[Array, " rows"] | None = None
    tape_last: Int[Array, " rows"] | None = None
    tape_first: Int[Array, " rows"] | None = None
    num_recorded: Int[Array, ""] | None = None
    # Tangents (`jaxsim.engine.tangents`), else None: what the times of every executor change by, fields within columns;
    # and marks of this (pairs) at what happens to requests, one kind behind the other.
    tangents: Float[Array, "ranks columns"] | None = None
    tangent_marks: Float[Array, "marks columns"] | None = None
    # Zeros, whose derivative (hi, lo) is what arrivals move by (`jaxsim.engine.forward`), else None.
    arrival_moves: Float[Array, "rows 2"] | None = None
    # Prefix caching, else None: of every segment (then the null one, then two tails a request) the blocks in memory,
    # its newest entry in the log of releases; of segments, who holds them; (blocks of the path that a request shares,
    # keyed blocks behind it), and tokens it found at first.
    resident: Int[Array, "ranks items"] | None = None
    references: Int[Array, "ranks segments"] | None = None
    log: Int[Array, "ranks entries"] | None = None
    newest: Int[Array, "ranks items"] | None = None
    shared: Int[Array, "rows 2"] | None = None
    cached: Int[Array, " rows"] | None = None
    # Where the loop is to stop, and go on later: events from `until` (epoch, hi, lo) on are left alone; the rank that
    # every request was routed to. Else None.
    until: Float[Array, " 3"] | None = None
    routed: Int[Array, " rows"] | None = None
    # Roles (`jaxsim.engine.hand_over`), else None. Of executors, and of none: when its door opens next and for which
    # transfer (hi, lo, number; -1: to see who fits), who it has not accepted (front, back, length), blocks that came
    # back to it and are not taken yet; until when (hi, lo) the links are busy, out of all executors, then into them,
    # then those that pools share. Of requests: the one ready before it, and its transfer (columns as in `hand_over`).
    doors: Float[Array, "doors 3"] | None = None
    unaccepted: Int[Array, "doors 3"] | None = None
    returned: Int[Array, " doors"] | None = None
    links: Float[Array, "ends 2"] | None = None
    ready_before: Int[Array, " rows"] | None = None
    transfers: Float[Array, "rows 9"] | None = None
    num_handed_over: Int[Array, ""] | None = None
    num_accepted: Int[Array, ""] | None = None
    # Links that are shared (`jaxsim.engine.fair_links`), else None; then `links` are not used.
    flights: Flights | None = None
    # Stages that take a batch whenever the first is free (`jaxsim.engine.free_stages`), else None: of slots, when the
    # iteration that each is in ends, or ended (hi, lo).
    slot_ends: Float[Array, "ranks slot_width 2"] | None = None
    # Migration (`jaxsim.engine.migration`), else None; `doors` and `ready_before` as with roles. What its controller
    # keeps; of requests: migrations, by how much the number of their executor has grown, and seconds between leaving
    # one and having all KV at the next (parts of `clock.to_integers`).
    control: Control | None = None
    moved: Int[Array, "rows 5"] | None = None
    # Clients (`jaxsim.engine.clients`), else None. A tree of timers, one a request; of requests: (twice the sendings so
    # far, one more once it is waited for the last token only; how the last sending ended, 0 if it has not or is
    # answered), the slot of who runs (else the null one), and the link back in the waiting queue. All of them that are
    # there, waiting or running. `finished` is then when a request ended, however it did, and `num_finished` has one
    # less for every slot that is still held for nobody.
    timers: Int[Array, "nodes 3"] | None = None
    clients: Int[Array, "rows 2"] | None = None
    slot_of: Int[Array, " rows"] | None = None
    previous_waiting: Int[Array, " rows"] | None = None
    num_outstanding: Int[Array, ""] | None = None
    # Under asynchronous scheduling, of requests the instant (seconds, ticks) of the last sending.
    sent: Int[Array, "rows 2"] | None = None
    # Parts of images (`jaxsim.engine.parts`), else None: of requests, how many steps all parts together have made
    # (encoded, accepted, delivered); and how many parts have been routed.
    steps_of_parts: Int[Array, " rows"] | None = None
    num_dealt: Int[Array, ""] | None = None
    # What routers keep (`jaxsim.engine.caches`), else None: each request's part of `Rank.prefill_tokens`; of segments,
    # blocks that were sent to each rank.
    charged: Int[Array, " rows"] | None = None
    sent_blocks: Int[Array, "ranks segments"] | None = None
    # Swapping to host memory, else None: who is in line, when copies are through (hi, lo), and of requests what swaps
    # came to (columns of both as in `swapping`).
    window: Int[Array, "ranks places window_fields"] | None = None
    copies: Float[Array, "ranks places 2"] | None = None
    swaps: Int[Array, "rows 5"] | None = None
    # With turns kept, else None: of requests, one more than the rank whose host memory has a copy of the whole finished
    # turn (0: none has), and the finished turn behind it. `cached` is then what they found.
    kept: Int[Array, " rows"] | None = None
    next_kept: Int[Array, " rows"] | None = None
    # Least slack, else None: who was preempted and waits (columns as in `jaxsim.engine.slack`).
    again: Int[Array, "ranks places 2"] | None = None
    # Virtual token counters, else None: the tenants' queues and counters (`jaxsim.engine.fair.Tenants`).
    tenants: Int[Array, "ranks tenant_fields"] | None = None
    # Outages (`jaxsim.engine.failures`), else None: the next row of their table, who is down, and of requests how often
    # they were lost (columns as there).
    next_outage: Int[Array, ""] | None = None
    is_down: Bool[Array, " executors"] | None = None
    lost: Int[Array, "rows lost_fields"] | None = None
    # With roles too, what is looked at of hand-overs (`jaxsim.engine.sweeps`); of requests, when they last left for the
    # executor that decodes (epoch, hi, lo).
    sweep: Int[Array, " 4"] | None = None
    left_at: Float[Array, "rows 3"] | None = None
    # Roles that change (`jaxsim.engine.role_switching`), else None: what their controller keeps, and of every switch
    # who and when (columns of `jaxsim.state.roles`).
    roles: Roles | None = None
    switches: Float[Array, "switches 15"] | None = None
    # Host memory behind the prefix cache (`jaxsim.engine.offload`), else None: of every segment (then the null one,
    # then what each request has behind its path) the blocks there, and its newest entry in the log of touches; of
    # requests, tokens loaded at first.
    stored: Int[Array, "ranks items"] | None = None
    touches: Int[Array, "ranks entries"] | None = None
    touched: Int[Array, "ranks items"] | None = None
    loaded: Int[Array, " rows"] | None = None
    # A store that instances share (`jaxsim.engine.remote_store`), else None: of all items as in `stored`, of the first
    # rank, then of the next, what it has put there (columns as in that module); of requests, tokens fetched from there
    # at first; until when (hi, lo) its egress is busy, if all loads share one. Where it does not hold everything: of
    # items, blocks for which it has room, and their newest entry in its log of touches; this; all blocks for which it
    # has room, and where the log begins and ends.
    puts: Int[Array, "entries 3"] | None = None
    fetched: Int[Array, " rows"] | None = None
    egress: Float[Array, " 2"] | None = None
    roomed: Int[Array, " items"] | None = None
    room_touched: Int[Array, " items"] | None = None
    room_touches: Int[Array, " entries"] | None = None
    room: Int[Array, " 3"] | None = None
    # Instances that serve different variants, else None: requests routed so far, by variant. Those that give each other
    # contexts (`jaxsim.engine.siblings`), else None: of segments, the blocks computed before the iteration that last
    # made them more, and the number of that iteration; until when (hi, lo) the link out of each is busy; of requests,
    # who gave what was loaded at first (-1: nobody).
    routed_by_variant: Int[Array, " variants"] | None = None
    fresh: Int[Array, "ranks segments 2"] | None = None
    lenders: Float[Array, "lenders 2"] | None = None
    loaded_from: Int[Array, " rows"] | None = None
    # Several partly computed prompts, else None: who waits (columns as in `jaxsim.engine.partial_prefills`), and when
    # each is due (epoch, hi, lo).
    line: Int[Array, "ranks places 3"] | None = None
    line_due: Float[Array, "ranks places 3"] | None = None


def _zeros(cls, **fields):
    names = cls.__dataclass_fields__
    return cls(**{name: fields.get(name, jnp.int32(0)) for name in names})


def _swap_counts(dims: Dims) -> SwapCounts:
    zero = jnp.int32(0)
    return _zeros(SwapCounts, turns=Queue(zero, zero, zero) if dims.keeps_turns else None,
                  turn_blocks=zero if dims.keeps_turns else None, holes=zero if dims.has_block_groups else None)


def _offload_counts(dims: Dims) -> OffloadCounts:
    return _zeros(OffloadCounts, fetched_blocks=jnp.int32(0) if dims.has_remote else None)


def empty_counts(dims: Dims) -> Counts:
    """An executor, rank and batch with nothing to do."""
    null, zero = jnp.int32(dims.null_slot), jnp.int32(0)
    cache = _zeros(Cache) if dims.num_segments else None
    is_pipeline = dims.num_stages > 1
    rank = _zeros(Rank, queue=Queue(zero, zero, zero), forming_slot=null, cache=cache,
                  forming_batch=zero if is_pipeline else None,
                  **dict.fromkeys(("in_transfer", "ready"), Queue(zero, zero, zero) if dims.has_moves else None),
                  **dict.fromkeys(("visible_ready", "held_blocks", "kept_blocks"), zero if dims.has_moves else None),
                  **dict.fromkeys(("killed", "first_stamp"), zero if dims.has_migration else None),
                  waiting_blocks=zero if dims.has_demands else None, urgent=zero if dims.has_urgent else None,
                  **dict.fromkeys(("cached_tiles", "waiting_tiles"), zero if dims.has_parts else None),
                  prefill_tokens=zero if dims.tracks_prefill else None, tree_tokens=zero if dims.tracks_sent else None,
                  swap=_swap_counts(dims) if dims.has_swap else None,
                  offload=_offload_counts(dims) if dims.has_loads else None,
                  on_links=zero if dims.num_flights else None,
                  partial=PartialPrompts((null,) * dims.num_partial, *((zero,) * dims.num_partial,) * 4, zero)
                  if dims.num_partial > 1 else None)
    executor = Executor(zero, zero if dims.num_ranks > 1 or is_pipeline else None)
    batch = _zeros(Batch, tail=null, record=jnp.int32(-1) if dims.num_records else None,
                   taken=zero if is_pipeline or dims.has_moves else None,
                   entering=zero if dims.has_moves or dims.has_swap else None,
                   tiles=zero if dims.has_parts or dims.has_encoder else None,
                   joining_prefill=zero if dims.tracks_prefill else None,
                   is_lost=zero if dims.has_failures else None, loading=zero if dims.has_loads else None,
                   fetching=zero if dims.has_remote else None,
                   shards=Shards(*(zero,) * 7) if dims.has_kv_parallel else None,
                   spread_chunks=zero if dims.has_kv_parallel else None,
                   longest_chunk=zero if dims.reads_chunks else None)
    return Counts(executor, rank, batch)


def empty_clocks(dims: Dims) -> Clocks:
    """The same, before its first iteration."""
    zero = jnp.float32(0)
    at_zero, free, counted, alone, end = Time(zero, zero), None, None, None, None
    if dims.num_stages > 1:
        free, counted, alone, end = (at_zero,) * (dims.num_stages + 1), at_zero, at_zero, clock.never()
    return Clocks(ExecutorTimes(at_zero, free, counted, alone), RankTimes(
        zero, at_zero, at_zero, SwapTimes(at_zero, at_zero, at_zero, at_zero) if dims.has_swap else None,
        at_zero if dims.has_loads else None, at_zero if dims.has_reuse else None,
        BorrowingTimes(at_zero, at_zero, at_zero, at_zero) if dims.has_siblings else None),
                  BatchTimes(at_zero, at_zero, at_zero, zero, zero, zero, zero, end,
                             zero if dims.reads_chunks else None))


@functools.cache
def count_rows(dims: Dims) -> Rows:
    """Layout of `World.counts`."""
    return Rows(dims, jax.eval_shape(lambda: empty_counts(dims)))


@functools.cache
def clock_rows(dims: Dims) -> Rows:
    """Layout of `World.clocks`."""
    return Rows(dims, jax.eval_shape(lambda: empty_clocks(dims)))


def initial_world(dims: Dims, source: PyTree = (), due: Float[Array, "due_rows 3"] | None = None,
                  entry_fields: int = 3, waiting_words: int = 1,
                  ratio_start: Float[Array, " executors"] | float = 0.0,
                  num_blocks: Int[Array, " executors"] | int = 0) -> World:
    """All queues empty, all pools free, time zero.

    source, due: state of the arrivals; entry_fields: columns of `slot_entries` in use; waiting_words: of a sorted
    waiting queue; ratio_start, num_blocks: of each executor.
    """
    executors, width, rows = dims.num_executors, dims.slot_width, dims.num_requests + 1
    ranks, batches = dims.all_ranks, dims.all_batches

    def ints(*shape, value=0):
        return jnp.full(shape, value, jnp.int32)

    def floats(*shape):
        return jnp.zeros(shape, jnp.float32)

    def everywhere(record):
        axes = (executors,), (executors, dims.num_ranks), (executors, dims.num_ranks, dims.num_batches)
        parts = (record.executor, record.rank, record.batch)
        return type(record)(*(jax.tree.map(lambda x, axes=axes: jnp.broadcast_to(x, axes), part)
                              for part, axes in zip(parts, axes, strict=True)))

    times = everywhere(empty_clocks(dims))
    ratio = jnp.broadcast_to(jnp.asarray(ratio_start, jnp.float32), (executors,))[:, None]
    times = replace(times, rank=replace(times.rank, ratio=jnp.broadcast_to(ratio, times.rank.ratio.shape)))
    counts, cached = everywhere(empty_counts(dims)), {}
    if dims.num_segments:
        never_used = jnp.broadcast_to(jnp.asarray(num_blocks, jnp.int32), (executors,))[:, None]
        cache = replace(counts.rank.cache, never_used=jnp.broadcast_to(never_used, (executors, dims.num_ranks)))
        counts = replace(counts, rank=replace(counts.rank, cache=cache))
        items = dims.num_segments + 1 + 2 * rows
        cached = dict(resident=ints(ranks, items), newest=ints(ranks, items, value=-1),
                      references=ints(ranks, dims.num_segments + 1), log=ints(ranks, dims.log_size + 1),
                      shared=ints(rows, 2), cached=ints(rows))
    if dims.has_loads:
        cached["loaded"] = ints(rows)
    if dims.has_variants:
        cached["routed_by_variant"] = ints(executors)
    if dims.has_siblings:
        fresh = jnp.broadcast_to(jnp.array([0, -1], jnp.int32), (ranks, dims.num_segments + 1, 2))
        cached |= dict(fresh=fresh, lenders=floats(executors + 1, 2), loaded_from=ints(rows, value=-1))
    if dims.has_offload:
        items = dims.num_segments + 1 + rows
        cached |= dict(stored=ints(ranks, items))
        if dims.offload_log:
            cached |= dict(touches=ints(ranks, dims.offload_log + 1), touched=ints(ranks, items, value=-1))
    if dims.has_remote:
        items = dims.num_segments + 1 + rows
        cached |= dict(puts=ints(ranks * items, 3), fetched=ints(rows))
        if dims.remote_log:
            cached |= dict(roomed=ints(items), room_touched=ints(items, value=-1),
                           room_touches=ints(dims.remote_log + 1), room=ints(3))
    if dims.has_egress:
        cached["egress"] = floats(2)
    tape, records = {}, dims.num_records + 1
    if dims.num_records:
        tape = dict(tape_times=floats(records, 8), tape_counts=ints(records, 7), tape_stats=ints(records, 11),
                    tape_ends=floats(records, 4), num_recorded=ints())
        tape |= {name: ints(rows, value=-1) for name in ("tape_met", "tape_joined", "tape_last")}
        tape |= dict(tape_first=ints(rows + dims.num_more_logs, value=-1))
    if dims.num_tangents:
        marks = 4 * (rows + dims.num_more_logs)
        tape |= dict(tangents=floats(ranks, 5 * dims.num_tangents), tangent_marks=floats(marks, 2 * dims.num_tangents))
    if dims.num_tenants:
        cached["tenants"] = ints(ranks, TENANT_FIELDS * dims.num_tenants + 1)
    if dims.slack_window:
        cached["again"] = ints(ranks, dims.slack_window + 1, 2)
    if dims.num_partial > 1:
        cached |= dict(line=ints(ranks, dims.line_window + 1, 3), line_due=floats(ranks, dims.line_window + 1, 3))
    roles, doors = {}, executors + 1
    if dims.has_roles:
        roles = dict(
            doors=jnp.broadcast_to(jnp.array([jnp.inf, 0.0, -1.0], jnp.float32), (doors, 3)),
            unaccepted=ints(doors, 3), returned=ints(doors),
            links=floats(2 * doors + dims.num_links, 2), ready_before=ints(rows),
            transfers=jnp.broadcast_to(-jnp.ones(9, jnp.float32), (rows, 9)), num_handed_over=ints(),
            num_accepted=ints())
    if dims.num_flights:
        roles["flights"] = no_flights(dims.num_flights, dims.num_requests, bool(dims.num_links or dims.is_max_min))
    if dims.has_free_stages:
        roles["slot_ends"] = floats(ranks, width, 2)
    if dims.has_role_switching:
        roles |= dict(zip(("roles", "switches"), no_roles(executors), strict=True))
    if dims.has_migration:
        roles = dict(
            doors=jnp.broadcast_to(jnp.array([jnp.inf, 0.0, -1.0], jnp.float32), (doors, 3)), ready_before=ints(rows),
            control=no_control(executors, dims.has_scaling), moved=ints(rows, 5))
    clients = {}
    if dims.has_clients:
        clients = dict(timers=ints(timers.num_rows(dims.num_requests), 3), clients=ints(rows, 2),
                       slot_of=ints(rows, value=dims.null_slot), previous_waiting=ints(rows), num_outstanding=ints(),
                       routed=ints(rows, value=-1))
    if dims.has_failures:
        clients |= dict(next_outage=ints(), is_down=jnp.zeros(executors, bool), lost=ints(rows, 6 + dims.has_migration))
        clients |= dict(sweep=jnp.array(NO_SWEEP, jnp.int32) if dims.has_roles else None,
                        left_at=floats(rows, 3) if dims.has_roles else None)
    if dims.has_parts:
        roles |= dict(steps_of_parts=ints(rows), num_dealt=ints())
    kept = {}
    if dims.tracks_prefill:
        kept["charged"] = ints(rows)
    if dims.tracks_sent:
        kept["sent_blocks"] = ints(ranks, dims.num_segments + 1)
    swapping = {}
    if dims.has_swap:
        places = dims.swap_window + 1
        fields = 6 if dims.has_block_groups else 5
        swapping = dict(window=ints(ranks, places, fields), copies=floats(ranks, places, 2), swaps=ints(rows, 5))
    if dims.keeps_turns:
        swapping |= dict(kept=ints(rows), next_kept=ints(rows), cached=ints(rows))
    return World(
        epoch=ints(), steps=ints(), num_routed=ints(), source=source,
        due=floats(1, 3) if due is None else due, num_finished=ints(), num_logged=ints(),
        fault=ints(), is_frozen=ints(),
        wake_hi=clock.never((executors,)).hi, wake_lo=floats(executors), phase=ints(executors, value=IDLE),
        counts=count_rows(dims).row(counts), clocks=clock_rows(dims).row(times),
        outstanding=ints(ranks), slot_entries=ints(ranks, width, entry_fields),
        slot_previous=ints(ranks, width, value=dims.null_slot), slot_next=ints(ranks, width, value=dims.null_slot),
        free_slots=jnp.broadcast_to(stack.full(dims.num_slots, width), (ranks, width)),
        residues=ints(batches, dims.block_size), slot_keys=ints(batches, width, value=packed.EMPTY),
        next_waiting=ints(rows), waiting_set=ints(ranks, waiting_words), progress=ints(rows, 2),
        placed=ints(rows, 2, value=-1),
        scheduled=floats(rows, 3), finished=floats(rows, 3), stalled=ints(rows, 3), preempted=floats(rows, 3),
        first_tokens=floats(rows + dims.num_more_logs, 3), itl=ints(histogram.NUM_BINS),
        **tape, **cached, **roles, **clients, **kept, **swapping)
