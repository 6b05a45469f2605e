"""The rules and numbers of an engine, and the engines by name."""

import math
from dataclasses import dataclass, replace

UNLIMITED = 1 << 30  # a count (sequences, tokens) that never binds

SORTED = ("priority", "sjf", "edf", "least_slack")

CAN_GROW = ("none", "prompt", "expected")  # reservations under which a decode may ask for one more block


@dataclass(frozen=True)
class Flags:
    """The rules of one engine and its numbers. Everything is per instance.

    - phase_mix: `unified` puts decodes and prefill chunks in one batch, `prefill_first` never mixes them.
    - chunked_prefill: a prompt may be cut at the token budget.
    - reserve: blocks taken at admission: `none` (those of the first chunk), `prompt`, `max_tokens` (prompt
      and output limit), `max_model_len`, `expected` (those of the prompt, but admitted against an estimate
      of all outputs).
    - decode_needs_free_block: `crossing` (at a block boundary one is taken) or `always` (one must be free
      even between boundaries).
    - victim: who is preempted: `last_admitted`, `lowest_priority`, `fewest_outputs`.
    - waiting_blocked_after_preempt: a pass that preempted admits nobody.
    - order: `fcfs`; sorted by a key, then by id: `priority` (small is urgent), `sjf` (predicted output tokens), `edf`
      (arrival and limit), `least_slack` (that less what is left to do, at `pace`: 64ths of a millisecond of a token
      known and of an output token to come; keeps_slack: as of its arrival, for ever); `vtc`, virtual token counters
      with the `prices` of a prompt and an output token by tenant.
    - admit: `any_time`, or `when_empty` (static batches).
    - async_scheduling: a pass sees only what waited when the iteration that just ended was started.
    - decode_context_limit: decodes are a FIFO, a batch holds at most this many context tokens (simdistserve).
    - track_blocks: False switches all accounting of KV blocks off.
    - retract_to, expected_new_admissions: where SGLang's retracted requests go (`front` or `back` of the
      queue), and whether a request admitted in this same pass is charged by the estimate (`ratio`) or fully
      (`full`); is_expected_strict, resets_ratio_when_idle: whether what it asks for must be less than what is
      left, and whether an engine that falls idle starts from the first ratio again.
    - prefix_caching: blocks of a known prefix are not computed again (`PrefixCache`).
    - batch_wait_timeout_iters, batch_wait_max_tokens_ratio: prompts beside decodes are withdrawn for so many
      iterations, unless the batch fills that share of the token budget (TensorRT-LLM).
    - stages: of a pipeline, as many batches in flight; max_batch_seqs: sequences of one of them; pass_on_arrival: a
      batch is formed as soon as somebody arrives and there is room for one more in flight, instead of when the
      engine has waited for the oldest to return (vLLM V1); pass_when_stage_free: a batch is formed whenever the first
      stage is free, however many are in flight (simdistserve).
    - preemption: `recompute`, or `swap`: who decodes keeps what it computed in host memory, first in line to come back
      (DistServe). The bytes that a pass moves out and in at swap_bandwidth (bytes/s, kv_bytes_per_token each) lengthen
      the iteration it composes, as where the copies go before the kernels in one stream (vLLM V0).
    - offloading: `offload.Offloading`, host memory behind the prefix cache, or `offload.Sibling`, or `lending.Lending`.
    - target_s: that an iteration with a prompt takes at most, with chunks of at least min_chunk_tokens; kv_groups:
      `long_contexts.Groups`, that hold the KV of long contexts together.
    - side_by_side: `partial_prefills.SideBySide`, several prompts that are partly computed at a time.
    - swapping: `swapping.Swapping`, of an engine with the rules of vLLM V0: host memory with its copies, and
      priorities that are drawn anew.
    """

    phase_mix: str = "unified"
    chunked_prefill: bool = True
    reserve: str = "none"
    decode_needs_free_block: str = "crossing"
    victim: str = "last_admitted"
    waiting_blocked_after_preempt: bool = True
    order: str = "fcfs"
    admit: str = "any_time"
    async_scheduling: bool = False
    decode_context_limit: int | None = None
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    watermark_blocks: int = 0
    num_blocks: int = 1024
    block_size: int = 16
    max_model_len: int = 4096
    track_blocks: bool = True
    new_token_ratio_init: float = 0.7
    new_token_ratio_floor: float = 0.098
    new_token_ratio_decay: float = (0.7 - 0.098) / 600
    retract_free_tokens: int = 20
    expected_clip: int = 4096
    retract_to: str = "front"
    expected_new_admissions: str = "ratio"
    is_expected_strict: bool = False
    resets_ratio_when_idle: bool = False
    prefix_caching: bool = False
    batch_wait_timeout_iters: int = 0
    batch_wait_max_tokens_ratio: float = 0.0
    stages: int = 1
    max_batch_seqs: int = UNLIMITED
    pass_on_arrival: bool = False
    pass_when_stage_free: bool = False
    preemption: str = "recompute"
    swap_bandwidth: float = math.inf
    kv_bytes_per_token: float = 0.0
    headroom_blocks: int = 0  # counted as used by freeness (Llumnix) where a request of a priority below 0 runs
    swapping: object = None
    offloading: object = None
    prices: tuple[tuple[float, float], ...] = ()
    pace: tuple[int, int] = (0, 64)
    keeps_slack: bool = False
    target_s: float | None = None
    min_chunk_tokens: int = 1
    kv_groups: object = None
    side_by_side: object = None

    def __post_init__(self):
        for name, allowed in (
            ("phase_mix", ("unified", "prefill_first")),
            ("reserve", ("none", "prompt", "max_tokens", "max_model_len", "expected")),
            ("decode_needs_free_block", ("crossing", "always")),
            ("victim", ("last_admitted", "lowest_priority", "fewest_outputs")),
            ("order", ("fcfs", *SORTED, "vtc")),
            ("admit", ("any_time", "when_empty")),
            ("retract_to", ("front", "back")),
            ("expected_new_admissions", ("ratio", "full")),
            ("preemption", ("recompute", "swap")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} = {getattr(self, name)!r}: one of {allowed}")
        # Combinations no engine has and whose meaning would be a guess are refused.
        if self.victim == "lowest_priority" and self.order not in SORTED:
            raise ValueError("victim=lowest_priority needs a sorted order")
        if self.order == "vtc" and (self.async_scheduling or self.phase_mix != "unified"):
            raise ValueError("order=vtc: unified batches, no asynchronous scheduling")
        if (self.reserve == "expected") != (self.victim == "fewest_outputs"):
            raise ValueError("reserve=expected and victim=fewest_outputs go together")
        if self.reserve == "expected" and self.phase_mix != "prefill_first":
            raise ValueError("reserve=expected needs phase_mix=prefill_first")
        if self.decode_needs_free_block == "always" and self.reserve != "prompt":
            raise ValueError("decode_needs_free_block=always needs reserve=prompt")
        if self.phase_mix == "prefill_first" and self.chunked_prefill and self.reserve == "none":
            raise ValueError("chunked prefill_first needs a reservation: nobody makes room for a chunk")
        if self.phase_mix == "unified" and self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError("a unified batch must have room for one token of each sequence")
        if self.decode_context_limit is not None and (
            self.phase_mix != "prefill_first" or self.chunked_prefill or self.track_blocks
        ):
            raise ValueError("decode_context_limit needs prefill_first, whole prompts, no block accounting")
        if self.prefix_caching and (
            self.phase_mix != "unified" or self.reserve != "none" or not self.track_blocks
        ):
            raise ValueError("prefix_caching needs unified batches, no reservation, block accounting")
        if self.prefix_caching and (self.order, self.victim) not in (
                ("fcfs", "last_admitted"), ("priority", "lowest_priority")):
            raise ValueError("prefix_caching: fcfs or priority, as vLLM has them")
        if self.batch_wait_timeout_iters and (
            self.phase_mix != "unified" or self.chunked_prefill or self.reserve in CAN_GROW or self.order != "fcfs"
        ):
            raise ValueError("batch waiting needs whole prompts beside decodes, all blocks reserved, fcfs")
        if self.pass_when_stage_free != (self.stages > 1 and self.decode_context_limit is not None):
            raise ValueError("pass_when_stage_free goes with stages of simdistserve, and only with them")
        if self.preemption == "swap" and (
            self.reserve not in ("none", "prompt") or self.prefix_caching or self.stages > 1
            or self.victim != "last_admitted"
        ):
            raise ValueError("preemption=swap: last_admitted, reserve none or prompt, one stage, no prefix_caching")
        if self.swapping is not None and (
            self.phase_mix != "prefill_first" or self.chunked_prefill or self.reserve != "prompt" or self.stages > 1
            or self.order != "fcfs" or self.victim != "last_admitted" or self.decode_needs_free_block != "always"
            or self.async_scheduling or self.preemption != "recompute" or not self.waiting_blocked_after_preempt
        ):
            raise ValueError("swapping needs the rules of vLLM V0")
        if self.stages > 1 and not self.pass_when_stage_free and (
            self.phase_mix != "unified" or self.order != "fcfs" or self.admit != "any_time"
            or self.async_scheduling or self.batch_wait_timeout_iters
        ):
            raise ValueError("stages need unified batches, fcfs, admission at any time, no asynchronous scheduling")


# What a preset does not name is the default of Flags; sizes are the caller's business, except where an engine
# ties them to its rules (Orca has no token limit, SGLang's page is one token).
PRESETS: dict[str, dict] = {
    "vllm-v1": {},
    "vllm-v1-priority": {"order": "priority", "victim": "lowest_priority"},
    "vllm-v1-priority-tail": {"order": "priority"},
    "vllm-v1-sjf": {"order": "sjf", "victim": "lowest_priority"},
    "vllm-v1-sjf-tail": {"order": "sjf"},
    "vllm-v1-edf": {"order": "edf", "victim": "lowest_priority"},
    "vllm-v1-slack": {"order": "least_slack"},
    "vllm-v1-vtc": {"order": "vtc", "prices": ((1, 2),) * 3},
    "vllm-v1-async": {"async_scheduling": True},
    "vllm-v0": {
        "phase_mix": "prefill_first",
        "chunked_prefill": False,
        "reserve": "prompt",
        "decode_needs_free_block": "always",
        "watermark_share": 0.01,
    },
    "sarathi": {
        "reserve": "prompt",
        "decode_needs_free_block": "always",
        "waiting_blocked_after_preempt": False,
        "watermark_share": 0.01,
    },
    "orca": {"chunked_prefill": False, "reserve": "max_model_len", "max_num_batched_tokens": UNLIMITED},
    "static": {
        "chunked_prefill": False,
        "reserve": "max_model_len",
        "max_num_batched_tokens": UNLIMITED,
        "admit": "when_empty",
    },
    "tensorrt-llm": {"chunked_prefill": False, "reserve": "max_tokens", "async_scheduling": True},
    "tensorrt-llm-waiting": {
        "chunked_prefill": False,
        "reserve": "max_tokens",
        "async_scheduling": True,
        "batch_wait_timeout_iters": 20,
        "batch_wait_max_tokens_ratio": 0.5,
    },
    "tensorrt-llm-sync-waiting": {
        "chunked_prefill": False,
        "reserve": "max_tokens",
        "batch_wait_timeout_iters": 20,
        "batch_wait_max_tokens_ratio": 0.5,
    },
    "sglang": {
        "phase_mix": "prefill_first",
        "reserve": "expected",
        "victim": "fewest_outputs",
        "block_size": 1,
        "retract_to": "back",
        "expected_new_admissions": "full",
        "is_expected_strict": True,
        "resets_ratio_when_idle": True,
    },
    # The public DistServe simulator, colocated: no memory, whole prompts first, 50000 tokens a decode batch.
    "simdistserve-vllm": {
        "phase_mix": "prefill_first",
        "chunked_prefill": False,
        "track_blocks": False,
        "decode_context_limit": 50_000,
        "max_num_seqs": UNLIMITED,
    },
    # DistServe's own engine: each half has the flags of its stage scheduler.
    "distserve-prefill": {
        "phase_mix": "prefill_first",
        "chunked_prefill": False,
        "reserve": "prompt",
        "max_num_seqs": 128,
        "max_num_batched_tokens": 8192,
    },
    "distserve-decode": {
        "waiting_blocked_after_preempt": False,
        "preemption": "swap",
        "max_num_seqs": 1024,
        "max_num_batched_tokens": 65536,
    },
}


def preset(name: str, **numbers) -> Flags:
    """Flags of a named engine; keyword arguments win. A watermark as a share of the pool is truncated."""
    settings = {**PRESETS[name], **numbers}
    share = settings.pop("watermark_share", None)
    flags = Flags(**settings)
    if share is None or "watermark_blocks" in numbers:
        return flags
    return replace(flags, watermark_blocks=int(share * flags.num_blocks))
