"""Policies that look at every running sequence of an instance: O(slots), compiled only where they are used."""

from dataclasses import replace
from typing import NamedTuple

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxsim.engine.common import Group, blocks_for, choose, has, mark
from jaxsim.kernels import packed
from jaxsim.policy.batching import Batching
from jaxsim.spec.dims import Dims
from jaxsim.state import world as w
from jaxsim.state.world import Counts


class Slots(eqx.Module):
    """All slots of a rank, for policies that look at every running sequence: O(slots), and only there."""

    keys: Int[Array, " slot_width"]
    entries: Int[Array, "slot_width entry_fields"]
    retired: Int[Array, ""]

    @property
    def is_decoding(self) -> Bool[Array, " slot_width"]:
        """Slots of sequences past their prompt."""
        return (self.keys != packed.EMPTY) & (jnp.arange(self.keys.shape[0]) != self.retired)

    def with_column(self, column: int, values: Int[Array, " slot_width"]) -> "Slots":
        """The slots with another column of their entries."""
        is_column = jnp.arange(self.entries.shape[1]) == column
        return replace(self, entries=jnp.where(is_column, values[:, None], self.entries))

    def emitted(self, counts: Counts) -> Int[Array, " slot_width"]:
        """Output tokens of each; one less for those placed in this very pass."""
        tokens = self.entries[:, w.OFFSET] + counts.batch.counter + 1 - self.entries[:, w.PROMPT]
        is_new = self.entries[:, w.SINCE] == counts.executor.num_iterations
        return tokens - is_new

    def expected_tokens(self, dims: Dims, rules: Batching, counts: Counts, ratio: Float[Array, ""]
                        ) -> Float[Array, ""]:
        """Output tokens reserved for running sequences: what each may yet ask for, clipped; of those that ran
        before, only the share `ratio`."""
        is_forming = jnp.arange(dims.slot_width) == counts.rank.forming_slot
        is_forming = is_forming & (counts.rank.forming_slot != dims.null_slot)
        known_forming = counts.rank.forming_known - self.entries[:, w.PROMPT]
        emitted = jnp.where(is_forming, known_forming, self.emitted(counts))
        left = jnp.minimum(self.entries[:, w.LIMIT] - emitted, rules.reserve_clip_tokens)
        left = jnp.where(self.is_decoding | is_forming, left, 0)
        is_new = self.entries[:, w.SINCE] == counts.executor.num_iterations
        old, new = jnp.sum(jnp.where(is_new, 0, left)), jnp.sum(jnp.where(is_new, left, 0))
        return old.astype(jnp.float32) * ratio + new.astype(jnp.float32)

    def fewest_outputs(self, dims: Dims, counts: Counts) -> Int[Array, ""]:
        """Slot of the sequence with the fewest output tokens; then the longest prompt; then the latest."""
        choice = self.is_decoding
        for value in (self.emitted(counts), -self.entries[:, w.PROMPT], -self.entries[:, w.REQUEST]):
            value = jnp.where(choice, value, packed.EMPTY)
            choice = choice & (value == jnp.min(value))
        return jnp.where(jnp.any(choice), jnp.argmax(choice), dims.null_slot).astype(jnp.int32)


def is_retracting(dims: Dims, rules: Batching, counts: Counts) -> Bool[Array, ""]:
    """Whether a retraction under way goes on: until every sequence left has room for some tokens more."""
    free_tokens = (rules.num_blocks - counts.rank.used_blocks) << dims.block_bits
    is_tight = free_tokens < rules.retract_free_tokens * counts.batch.count
    return has(counts, w.PREEMPTED) & (counts.batch.count > 1) & is_tight


def next_ratio(rules: Batching, counts: Counts, slots: Slots, ratio: Float[Array, ""]) -> Float[Array, ""]:
    """The reserve ratio after a decode pass: a step down, or what the running need after a retraction."""
    running = slots.is_decoding
    emitted = jnp.sum(jnp.where(running, slots.emitted(counts), 0))
    limit = jnp.sum(jnp.where(running, slots.entries[:, w.LIMIT], 0))
    needed = (emitted + rules.retract_free_tokens * counts.batch.count) / jnp.maximum(limit, 1)
    down = jnp.maximum(ratio - rules.ratio_decay, rules.ratio_floor)
    return jnp.where(has(counts, w.PREEMPTED), jnp.minimum(needed, 1.0), down)


def stall(counts: Counts, slots: Slots, is_stalled: Bool[Array, " slot_width"], bits: int) -> tuple[Counts, Slots]:
    """Let some sequences sit out the next iteration: they stand one token lower on the common clock."""
    batch = counts.batch
    stalled = jnp.sum(is_stalled)
    entries = slots.with_column(w.OFFSET, slots.entries[:, w.OFFSET] - is_stalled).entries
    keys = slots.keys + (is_stalled.astype(jnp.int32) << bits)
    batch = replace(batch, offsets=batch.offsets - stalled, stalled=stalled,
                    stalled_offsets=jnp.sum(jnp.where(is_stalled, entries[:, w.OFFSET], 0)))
    return replace(counts, batch=batch), replace(slots, keys=keys, entries=entries)


class Walked(NamedTuple):
    """What a look along the running sequences came to.

    is_short: the pass must go on with another step; is_preempting: it preempts in this one, `victim` (a slot);
    crossing: blocks the decodes take; is_over: the loop ended early, and is_empty: nobody goes ahead then.
    """

    is_short: Bool[Array, ""]
    is_preempting: Bool[Array, ""]
    victim: Int[Array, ""]
    crossing: Int[Array, ""]
    is_over: Bool[Array, ""]
    is_empty: Bool[Array, ""]


def walk(dims: Dims, group: Group, wants_decode: Bool[Array, ""], may_preempt: Bool[Array, ""], counts: Counts,
         slots: Slots, residue_row: Int[Array, " block_size"]
         ) -> tuple[Counts, Int[Array, " block_size"], Slots, "Walked"]:
    """vLLM V1's loop over running sequences under PRIORITY, one look a step, and only when blocks run short.

    In the order of admission every sequence takes its block; where none is left the running sequence with the
    largest (priority, arrival) is preempted and the same one tried again; if that is the very one, the loop ends
    and those behind it sit out this iteration. The forming prompt comes last, with the chunk it had when it was
    first tried.

    Returns counts, residues, slots and what the walk came to.
    """
    rank, batch = counts.rank, counts.batch
    null = jnp.int32(dims.null_slot)
    free = group.batching.num_blocks - rank.used_blocks
    is_decoding = slots.is_decoding
    stamp = slots.entries[:, w.STAMP]
    crosses = is_decoding & (((slots.entries[:, w.OFFSET] + batch.counter) & (dims.block_size - 1)) == 0)
    crossing = jnp.sum(crosses)
    is_forming = rank.forming_slot != null
    is_over = wants_decode & has(counts, w.ENDED)
    # The forming prompt is reached once all others fit; from then on its chunk stays.
    reaches_forming = wants_decode & is_forming & (crossing <= free) & ~has(counts, w.CHUNKED) & ~is_over
    chunk = jnp.minimum(rank.forming_known - rank.forming_computed, batch.budget)
    chunk = jnp.where(has(counts, w.CHUNKED), rank.forming_chunk, chunk)
    rank = replace(rank, forming_chunk=jnp.where(reaches_forming, chunk, rank.forming_chunk))
    grown = blocks_for(rank.forming_computed + chunk, dims) - blocks_for(rank.forming_computed, dims)
    grown = jnp.where(is_forming, grown, 0)
    is_short_of_decodes = crossing > free
    is_short = wants_decode & ~is_over & (is_short_of_decodes | (crossing + grown > free))
    # Who lacks a block: the next crossing sequence behind the cursor, once those before it used up the free ones.
    before = jnp.sum(crosses & (stamp <= rank.cursor))
    following = jnp.min(jnp.where(crosses & (stamp > rank.cursor), stamp, packed.EMPTY))
    is_advancing = is_short & is_short_of_decodes & (before < free)
    forming_stamp = stamp[rank.forming_slot]
    lacking = jnp.where(is_short_of_decodes, following, forming_stamp)
    is_candidate = is_decoding | ((jnp.arange(dims.slot_width) == rank.forming_slot) & is_forming)
    victim = jnp.argmax(jnp.where(is_candidate, slots.entries[:, w.PLACE], -1)).astype(jnp.int32)
    is_preempting = is_short & ~is_advancing & may_preempt
    ends = is_preempting & (stamp[victim] == lacking)
    cursor = jnp.where(is_advancing, following, jnp.where(ends, lacking, rank.cursor))
    counts = replace(counts, rank=replace(rank, cursor=cursor))
    counts = mark(mark(counts, reaches_forming, w.CHUNKED), ends, w.ENDED)
    # After an early end, those before the cursor go ahead.
    goes = is_decoding & (stamp < rank.cursor)
    is_stalling = is_over & jnp.any(goes)
    stalled, slots = stall(counts, slots, is_stalling & is_decoding & ~goes, dims.slot_bits)
    residue = slots.entries[:, w.OFFSET] & (dims.block_size - 1)
    recounted = jnp.sum((residue[:, None] == jnp.arange(dims.block_size)) & is_decoding[:, None], axis=0)
    residue_row = jnp.where(is_stalling, recounted.astype(jnp.int32), residue_row)
    crossing = jnp.where(is_over, jnp.sum(crosses & goes), crossing)
    walked = Walked(is_short, is_preempting, victim, crossing, is_over, is_over & ~jnp.any(goes))
    return choose(is_stalling, stalled, counts), residue_row, slots, walked


STAMP_DIGITS = tuple((1 << min(3, 31 - shift), shift) for shift in range(30, -1, -3))
"""Of a place in the running order: how many values each has, and where it lies."""


def front(rules: Batching, counts: Counts, slots: Slots, is_queued: Bool[Array, " slot_width"]) -> Int[Array, ""]:
    """The stamp below which the queued sequences fit the limit of context: the largest there is, where all of them do.

    Found digit by digit, as the context up to a stamp rises with the stamp: O(slots) for each of its eleven digits.
    """
    context = jnp.where(is_queued, slots.entries[:, w.OFFSET] + counts.batch.counter + 1, 0)
    stamps, bound = slots.entries[:, w.STAMP], jnp.int32(0)
    for values, shift in STAMP_DIGITS:
        further = bound + (jnp.arange(1, values, dtype=jnp.int32) << shift)
        total = jnp.sum(jnp.where(stamps < further[:, None], context, 0), axis=1)
        bound = bound + (jnp.sum(total <= rules.decode_context_limit, dtype=jnp.int32) << shift)
    return bound


def limit_context(dims: Dims, rules: Batching, is_any: Bool[Array, ""], counts: Counts, slots: Slots
                  ) -> tuple[Counts, Slots]:
    """Decodes as a queue: from its front while their context fits the limit; then those go to the back.

    Source: the public DistServe simulator (simdistserve), decode batches of at most 50,000 tokens.
    """
    is_decoding = slots.is_decoding
    stamp = jnp.where(is_decoding, slots.entries[:, w.STAMP], packed.EMPTY)
    fits = is_decoding & (stamp < front(rules, counts, slots, is_decoding))
    is_over = is_any & jnp.any(is_decoding & ~fits)
    counts_now, slots = stall(counts, slots, is_over & is_decoding & ~fits, dims.slot_bits)
    # Keep their order, behind everybody else.
    first = jnp.min(jnp.where(fits, stamp, packed.EMPTY))
    last = jnp.max(jnp.where(fits, stamp, 0))
    moved = jnp.where(is_over & fits, stamp - first + counts.rank.next_stamp + 1,
                      slots.entries[:, w.STAMP])
    slots = slots.with_column(w.STAMP, moved)
    rank = replace(counts.rank, next_stamp=counts.rank.next_stamp + jnp.where(is_over, last - first + 1, 0))
    return choose(is_over, replace(counts_now, rank=rank), counts), slots
