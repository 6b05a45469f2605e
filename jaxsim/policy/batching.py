"""Iteration-level schedulers as one parametric rule: flags choose the engine imitated, numbers are swept.

The flags are structure (another value is another program), the numbers are leaves (another value is free). What
each flag does, in the order of a scheduling pass, is stated in docs/design.md; named combinations are the files of
`scenarios/presets`.
"""

import equinox as eqx
from jaxtyping import Array, Float, Int

from jaxsim.policy.chunks import Chunks
from jaxsim.policy.context_reuse import ContextReuse
from jaxsim.policy.kv_parallel import KvParallel
from jaxsim.policy.offload import Offload
from jaxsim.policy.partial_prefills import PartialPrefills
from jaxsim.policy.remote_store import RemoteStore
from jaxsim.policy.swap import Swap

PHASE_MIXES = ("unified", "prefill_first")
RESERVES = ("none", "prompt", "max_tokens", "max_model_len", "expected")
BLOCK_RULES = ("crossing", "always")
VICTIMS = ("last_admitted", "lowest_priority", "fewest_outputs")
ORDERS = ("fcfs", "priority", "sjf", "edf", "least_slack", "vtc")
SORTED = ("priority", "sjf", "edf", "least_slack")
"""Orders whose keys are known before the run: requests are ranked on the host."""
ADMITS = ("any_time", "when_empty")


class Batching(eqx.Module):
    """Flags and limits of an iteration-level scheduler.

    Flags (static):
        phase_mix: `unified`, one batch of decodes and prompt chunks; `prefill_first`, prompts alone whenever one
            can be admitted, else decodes alone.
        chunked_prefill: a prompt may be split over iterations to fit the token budget.
        reserve: KV blocks taken at admission: those of the tokens computed now (`none`), of the whole prompt, of
            prompt + max_tokens, of max_model_len, or of the prompt against an expected-growth reserve.
        decode_needs_free_block: a decode step takes a block only when `crossing` into a new one, or wants a free
            block `always`, as vLLM V0 does.
        victim: who is preempted when blocks run short.
        waiting_blocked_after_preempt: nothing is admitted in a pass that preempted.
        order: the waiting queue is first come first served, by (priority, arrival), by (predicted output tokens,
            arrival), by (deadline, arrival) or by slack (`jaxsim.engine.slack`); or the next request is that of the
            tenant with the smallest virtual token counter (`jaxsim.engine.fair`).
        admit: requests join at `any_time`, or only `when_empty` (static batching).
        async_scheduling: a pass sees only requests that waited when the previous iteration started.
        kv_accounting: blocks are tracked at all.
        prefix_caching: blocks of equal prompt prefixes are shared and kept until they are evicted.
        has_context_limit: decodes beyond `decode_context_limit` tokens of context wait their turn.
        pass_on_arrival: in a pipeline, a pass as soon as somebody arrives and fewer batches than stages are in flight;
            otherwise the engine waits for the oldest batch to return, once there is nothing to schedule.

    Numbers: max_num_seqs, max_num_batched_tokens, max_model_len, num_blocks, watermark_blocks;
        decode_context_limit (tokens); ratio_start, ratio_floor, ratio_decay, reserve_clip_tokens and
        retract_free_tokens belong to `reserve="expected"`. batch_wait_timeout_iters, batch_wait_tokens: prompts that
        could join running decodes wait for so many iterations, unless together with them they are so many tokens; None
        where they never wait. max_batch_seqs: sequences of one batch of a pipeline; None without one. num_stages: of a
        pipeline that takes a batch whenever its first stage is free; None elsewhere. swap: host memory that
        victims move to; None where they are recomputed. chunks: how long an iteration with a prompt may take, None
        where only tokens count. kv_parallel: groups of devices that share the KV of long contexts, None where one has
        it all. partial: how several prompts are partly computed side by side, and in which order (that of the queue is
        then `fcfs` here), None where one is at a time.

    Source: the schedulers named in docs/schedulers.md.
    """

    max_num_seqs: Int[Array, ""]
    max_num_batched_tokens: Int[Array, ""]
    max_model_len: Int[Array, ""]
    num_blocks: Int[Array, ""]
    watermark_blocks: Int[Array, ""]
    decode_context_limit: Int[Array, ""]
    ratio_start: Float[Array, ""]
    ratio_floor: Float[Array, ""]
    ratio_decay: Float[Array, ""]
    reserve_clip_tokens: Int[Array, ""]
    retract_free_tokens: Int[Array, ""]

    phase_mix: str = eqx.field(static=True, default="unified")
    chunked_prefill: bool = eqx.field(static=True, default=True)
    reserve: str = eqx.field(static=True, default="none")
    decode_needs_free_block: str = eqx.field(static=True, default="crossing")
    victim: str = eqx.field(static=True, default="last_admitted")
    waiting_blocked_after_preempt: bool = eqx.field(static=True, default=True)
    order: str = eqx.field(static=True, default="fcfs")
    admit: str = eqx.field(static=True, default="any_time")
    async_scheduling: bool = eqx.field(static=True, default=False)
    kv_accounting: bool = eqx.field(static=True, default=True)
    has_context_limit: bool = eqx.field(static=True, default=False)
    prefix_caching: bool = eqx.field(static=True, default=False)
    batch_wait_timeout_iters: Int[Array, ""] | None = None
    batch_wait_tokens: Int[Array, ""] | None = None
    max_batch_seqs: Int[Array, ""] | None = None
    pass_on_arrival: bool = eqx.field(static=True, default=False)
    num_stages: Int[Array, ""] | None = None
    swap: Swap | None = None
    offload: Offload | None = None
    reuse: ContextReuse | None = None
    remote: RemoteStore | None = None
    chunks: Chunks | None = None
    kv_parallel: KvParallel | None = None
    partial: PartialPrefills | None = None

    def __check_init__(self):
        for name, allowed in (("phase_mix", PHASE_MIXES), ("reserve", RESERVES), ("victim", VICTIMS),
                              ("decode_needs_free_block", BLOCK_RULES), ("order", ORDERS), ("admit", ADMITS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} = {getattr(self, name)!r}: not one of {', '.join(allowed)}")
        if self.prefix_caching and not (self.is_unified and self.reserve == "none" and self.kv_accounting):
            raise ValueError("prefix_caching: only with phase_mix = 'unified' and reserve = 'none'")
        if self.swap is not None and (self.is_unified or self.chunked_prefill or self.reserve != "prompt"
                                      or self.decode_needs_free_block != "always" or not self.kv_accounting
                                      or self.async_scheduling or self.admit != "any_time" or self.order != "fcfs"
                                      or not self.waiting_blocked_after_preempt or self.has_context_limit):
            raise ValueError("swap: only with the flags of vLLM V0")
        if (self.offload is not None or self.reuse is not None) and not self.prefix_caching:
            raise ValueError("offload, reuse: only behind a prefix cache")
        if self.remote is not None and not self.prefix_caching:
            raise ValueError("remote: only behind a prefix cache")
        if self.chunks is not None and not (self.is_unified and self.chunked_prefill
                                            and self.reserve in self._reserves_of_chunks and self.admit == "any_time"):
            raise ValueError("chunks: only for prompts in chunks beside decodes")
        if (self.chunks is not None or self.kv_parallel is not None) and (
                not self.is_unified or not self.kv_accounting or self.walks or self.prefix_caching
                or self.order == "vtc" or self.has_context_limit):
            raise ValueError("chunks, kv_parallel: unified batches of known blocks, victims from the tail, no prefix"
                             " caching, no virtual token counters")
        if self.partial is not None and (self.chunks is None or self.async_scheduling or self.order != "fcfs"
                                         or not self.kv_accounting or self.gathers):
            raise ValueError("partial: only with chunks that keep to a time, synchronously, of known blocks; its order"
                             " is a number")
        if self.kv_parallel is not None and self.pass_on_arrival:
            raise ValueError("kv_parallel: not with pass_on_arrival")
        if self.order in ("vtc", "least_slack") and not (
                self.is_unified and self.reserve == "none" and self.kv_accounting and self.admit == "any_time"
                and self.victim == "last_admitted" and not self.async_scheduling):
            raise ValueError(f"order = {self.order!r}: only as vLLM V1 schedules, synchronously")
        if self.gathers and (self.grows or self.chunked_prefill or self.stalls or not self.is_unified
                             or self.admit != "any_time"):
            raise ValueError("batch_wait_timeout_iters: only for whole prompts, first come first served, beside decodes"
                             " whose blocks are reserved")

    @property
    def _reserves_of_chunks(self) -> tuple[str, ...]:
        # Beside others a prompt has all its blocks from the start.
        return ("none", "prompt") if self.partial is None else ("max_tokens", "max_model_len")

    @property
    def is_unified(self) -> bool:
        """Decodes and prompt chunks share an iteration."""
        return self.phase_mix == "unified"

    @property
    def gathers(self) -> bool:
        """Prompts wait until there are enough of them."""
        return self.batch_wait_timeout_iters is not None

    @property
    def grows(self) -> bool:
        """Running sequences take blocks as they decode (nothing but this can make blocks run short)."""
        return self.kv_accounting and self.reserve in ("none", "prompt", "expected")

    @property
    def keeps_running_list(self) -> bool:
        """The engine must know who was admitted last."""
        return self.grows and self.victim == "last_admitted" and self.swap is None

    @property
    def stalls(self) -> bool:
        """A running sequence may sit out an iteration."""
        return self.walks or self.has_context_limit

    @property
    def sorts(self) -> bool:
        """The waiting queue is a set of ranks."""
        return self.order in SORTED

    @property
    def walks(self) -> bool:
        """The victim is the running sequence that stands last in the order, found as vLLM V1's PRIORITY finds it."""
        return self.sorts and self.victim == "lowest_priority"

    @property
    def stamps_slots(self) -> bool:
        """The order of all running sequences matters, not only who was admitted last."""
        return self.scans_slots or self.prefix_caching

    @property
    def scans_slots(self) -> bool:
        """A pass looks at every running sequence of an instance, not only at their sums."""
        return (self.reserve == "expected" or self.walks or self.has_context_limit
                or self.swap is not None)
