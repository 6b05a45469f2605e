"""A second opinion on the event engine: plain Python, a heap of events, one iteration at a time.

Every sequence is an object that holds what it computed, emitted and occupies; a scheduling pass walks lists
of such objects in the order the imitated engine walks them, so preemption is the engine's own sequential loop
and not a closed form. Nothing here is fast and nothing here is shared with `jaxsim`.

With `Flags.stages` an instance is a pipeline: up to so many batches are in flight, one behind the other through the
engine and the stages, each of which works on one at a time. A pass sees the sequences that are not in flight.

Order of events at one instant: (time, phase, index), phases: iteration ends by instance, arrivals by request,
scheduling passes by instance. A pass is atomic; it needs an instance with work and no iteration in flight.

Clock: Python integers, one tick = 2^-30 s, so sums of times are exact. A duration is rounded to the tick, an
arrival to 2^-20 s, both half to even. With `round_times=False` times are float64 seconds as they come.

Source: the schedulers of vLLM (V0 and V1), SGLang, TensorRT-LLM, Sarathi-Serve and Orca (the last two as in
Vidur), and LLMServe/DistServe `simdistserve` (`decode_context_limit`).

Prefix caching (`Flags.prefix_caching`, vLLM V1 only): the pool of an instance is a `PrefixCache`, block by block.

Known gaps: no swapping, no speculation, one chunked prefill at a time; a sequence in flight is never preempted; SGLang
without its radix tree; with asynchronous scheduling a block gets its key when scheduled all the same.
"""

import heapq
import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace

from . import prefix_cache

TICKS_PER_SECOND = 1 << 30
ARRIVAL_GRID_TICKS = 1 << 10  # arrivals lie on 2^-20 s
UNLIMITED = 1 << 30  # a count (sequences, tokens) that never binds

PHASE_ITERATION_END, PHASE_ARRIVAL, PHASE_PASS = 0, 1, 2

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
    - order: `fcfs`, or `priority` (small is urgent, then by id).
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
      engine has waited for the oldest to return (vLLM V1).
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

    def __post_init__(self):
        for name, allowed in (
            ("phase_mix", ("unified", "prefill_first")),
            ("reserve", ("none", "prompt", "max_tokens", "max_model_len", "expected")),
            ("decode_needs_free_block", ("crossing", "always")),
            ("victim", ("last_admitted", "lowest_priority", "fewest_outputs")),
            ("order", ("fcfs", "priority")),
            ("admit", ("any_time", "when_empty")),
            ("retract_to", ("front", "back")),
            ("expected_new_admissions", ("ratio", "full")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} = {getattr(self, name)!r}: one of {allowed}")
        # Combinations no engine has and whose meaning would be a guess are refused.
        if (self.order == "priority") != (self.victim == "lowest_priority"):
            raise ValueError("order=priority and victim=lowest_priority go together")
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
        if self.batch_wait_timeout_iters and (
            self.phase_mix != "unified" or self.chunked_prefill or self.reserve in CAN_GROW or self.order != "fcfs"
        ):
            raise ValueError("batch waiting needs whole prompts beside decodes, all blocks reserved, fcfs")
        if self.stages > 1 and (
            self.phase_mix != "unified" or self.order != "fcfs" or self.admit != "any_time"
            or self.async_scheduling or self.batch_wait_timeout_iters
        ):
            raise ValueError("stages need unified batches, fcfs, admission at any time, no asynchronous scheduling")


# What a preset does not name is the default of Flags; sizes are the caller's business, except where an engine
# ties them to its rules (Orca has no token limit, SGLang's page is one token).
PRESETS: dict[str, dict] = {
    "vllm-v1": {},
    "vllm-v1-priority": {"order": "priority", "victim": "lowest_priority"},
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
}


def preset(name: str, **numbers) -> Flags:
    """Flags of a named engine; keyword arguments win. A watermark as a share of the pool is truncated."""
    settings = {**PRESETS[name], **numbers}
    share = settings.pop("watermark_share", None)
    flags = Flags(**settings)
    if share is None or "watermark_blocks" in numbers:
        return flags
    return replace(flags, watermark_blocks=int(share * flags.num_blocks))


@dataclass(frozen=True)
class Request:
    """One request. `max_tokens` is the output limit the engine knows (default: the true output length).

    prefix_hashes: what distinguishes the tokens of each leading full block of the prompt (blocks of the engine);
    blocks behind the last hash are nobody else's.
    """

    id: int
    arrival_s: float
    prompt: int
    output: int
    max_tokens: int | None = None
    priority: int = 0
    uniforms: tuple[float, float] = (0.0, 0.0)
    prefix_hashes: tuple[Hashable, ...] = ()

    def __post_init__(self):
        if self.max_tokens is None:
            object.__setattr__(self, "max_tokens", self.output)
        if self.prompt < 1 or self.output < 1 or self.max_tokens < self.output:
            raise ValueError(f"request {self.id}: needs prompt >= 1 and 1 <= output <= max_tokens")


@dataclass(frozen=True)
class BatchStatsRef:
    """What a cost function is told about one iteration (h = history of a chunk, c = its tokens)."""

    num_decode: int  # decoding sequences
    decode_context: int  # sum of their contexts, the new token included
    num_prefill: int  # chunks
    prefill_tokens: int  # sum of c
    prefill_pairs: int  # sum of (h + c)^2 - h^2
    prefill_context: int  # sum of h + c
    num_sampled: int  # sequences that emit a token at the end


@dataclass(frozen=True)
class RequestResult:
    """What happened to one request; times in seconds, `arrival_s` as simulated (on its grid).

    cached_tokens: tokens found in the prefix cache at the first admission; hit_tokens: at all admissions.
    """

    id: int
    instance: int
    arrival_s: float
    scheduled_s: float  # first admission
    first_token_s: float
    finish_s: float
    preemptions: int
    status: str
    cached_tokens: int = 0
    hit_tokens: int = 0

    @property
    def ttft_s(self) -> float:
        return self.first_token_s - self.arrival_s

    @property
    def e2e_s(self) -> float:
        return self.finish_s - self.arrival_s


@dataclass(frozen=True)
class IterationRecord:
    """One iteration: its batch as {request id: tokens} and the pool just after the pass that composed it.

    `preempted` lists ids in the order they were preempted, also by passes at this instant that scheduled
    nothing.
    """

    instance: int
    start_s: float
    duration_s: float
    batch: dict[int, int]
    free_blocks: int
    preempted: tuple[int, ...]
    stats: BatchStatsRef

    @property
    def end_s(self) -> float:
        return self.start_s + self.duration_s


@dataclass(frozen=True)
class ReferenceResult:
    """Requests in the order given, iterations in the order started, and how close arrivals came to ties.

    `margins` pairs each arrival with the iteration ends (of any instance) next to it, one before, one after
    and one at the same instant if there are: (the earlier of the two times, their distance), in seconds.
    """

    requests: list[RequestResult]
    iterations: list[IterationRecord]
    margins: list[tuple[float, float]]

    @property
    def smallest_margin_s(self) -> float:
        """Smallest nonzero distance between an arrival and an iteration end; infinite if there is none."""
        return min((distance for _, distance in self.margins if distance > 0), default=math.inf)

    @property
    def num_exact_ties(self) -> int:
        """Arrivals at the very instant of an iteration end."""
        return sum(distance == 0 for _, distance in self.margins)

    def unreliable_from_s(self, epsilon_s: float, *, count_exact_ties: bool = True) -> float:
        """First moment when an arrival and an iteration end are under `epsilon_s` apart; else infinite.

        A simulator whose clock errs by less takes the same decisions before this moment. Exact ties count
        unless both sides compute exactly (dyadic costs).
        """
        smallest = 0 if count_exact_ties else math.ulp(0)
        close = [at for at, distance in self.margins if smallest <= distance < epsilon_s]
        return min(close, default=math.inf)


# ----------------------------------------------------------------------------------------------------
# State
# ----------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Job:
    """One request inside the simulation."""

    request: Request
    arrival: float  # ticks, as all times here
    computed: int = 0  # tokens whose KV is held, cached ones included
    pending: int = 0  # tokens in flight
    emitted: int = 0  # output tokens so far; survives preemption
    blocks: int = 0
    is_prefilled: bool = False  # emitted since it was last admitted: decodes from here on
    preemptions: int = 0
    lost_tokens: int = 0  # held and given back by preemptions
    cached_tokens: int | None = None  # found in the prefix cache at the first admission
    hit_tokens: int = 0  # at all admissions
    instance: int | None = None
    scheduled: float | None = None
    first_token: float | None = None
    finish: float | None = None

    @property
    def known(self) -> int:
        """Prompt and emitted tokens: computing up to here emits the next one."""
        return self.request.prompt + self.emitted

    @property
    def scheduled_tokens(self) -> int:
        """Tokens computed or in flight."""
        return self.computed + self.pending

    @property
    def tokens_left(self) -> int:
        """Output tokens the engine must expect."""
        return self.request.max_tokens - self.emitted

    @property
    def for_cache(self) -> prefix_cache.Request:
        """The job as the prefix cache sees it now."""
        return prefix_cache.Request(self.request.id, self.request.prefix_hashes, self.known)


@dataclass(eq=False)
class Instance:
    """One replica: a queue, a running list in admission order, a pool, batches in flight (oldest first).

    With prefix caching the pool is `cache`, and `free_blocks` follows it: blocks nobody holds, cached or not.
    """

    index: int
    free_blocks: int
    new_token_ratio: float
    waiting: list[Job] = field(default_factory=list)
    running: list[Job] = field(default_factory=list)
    flights: list[list[tuple[Job, int]]] = field(default_factory=list)
    stage_free: list[float] = field(default_factory=list)  # when the engine, and each stage, is free
    is_pass_due: bool = False
    # Ids that waited when the iteration that just ended was started; None when idle.
    waiting_at_start: set[int] | None = None
    # Ids preempted by passes at this instant that scheduled nothing.
    preempted_before: list[int] = field(default_factory=list)
    cache: prefix_cache.PrefixCache | None = None
    iterations_waited: int = 0  # by prompts that could have joined (TensorRT-LLM)

    @property
    def outstanding(self) -> int:
        return len(self.waiting) + len(self.running)


@dataclass(eq=False)
class Plan:
    """A pass in the making: who gets how many tokens, who lost its place."""

    entries: list[tuple[Job, int]] = field(default_factory=list)
    preempted: list[Job] = field(default_factory=list)
    budget: int = 0
    is_short: bool = False  # somebody lacked blocks and nobody could be preempted

    def add(self, job: Job, tokens: int) -> None:
        self.entries.append((job, tokens))
        self.budget -= tokens

    def withdraw(self, job: Job) -> bool:
        """Takes a job out again and refunds its tokens; says whether it was in."""
        for position, (planned, tokens) in enumerate(self.entries):
            if planned is job:
                del self.entries[position]
                self.budget += tokens
                return True
        return False


# ----------------------------------------------------------------------------------------------------
# Routing: plain functions (request, instances, requests routed so far) -> index
# ----------------------------------------------------------------------------------------------------


def round_robin(request: Request, instances: Sequence[Instance], num_routed: int) -> int:
    """In turn."""
    return num_routed % len(instances)


def random_choice(request: Request, instances: Sequence[Instance], num_routed: int) -> int:
    """By the request's first uniform."""
    return math.floor(request.uniforms[0] * len(instances))


def least_outstanding(request: Request, instances: Sequence[Instance], num_routed: int) -> int:
    """Fewest waiting and running requests, ties to the lowest index."""
    return min(range(len(instances)), key=lambda i: (instances[i].outstanding, i))


def power_of_two(request: Request, instances: Sequence[Instance], num_routed: int) -> int:
    """The less loaded of two different instances drawn by the request's uniforms, ties to the first drawn."""
    if len(instances) == 1:
        return 0
    first = math.floor(request.uniforms[0] * len(instances))
    second = math.floor(request.uniforms[1] * (len(instances) - 1))
    if second >= first:
        second += 1
    return second if instances[second].outstanding < instances[first].outstanding else first


def least_kv(request: Request, instances: Sequence[Instance], num_routed: int) -> int:
    """Fewest used blocks (pools are of equal size), ties to the lowest index."""
    return min(range(len(instances)), key=lambda i: (-instances[i].free_blocks, i))


Router = Callable[[Request, Sequence[Instance], int], int]
ROUTERS: dict[str, Router] = {
    "round_robin": round_robin,
    "random": random_choice,
    "least_outstanding": least_outstanding,
    "power_of_two": power_of_two,
    "least_kv": least_kv,
}


# ----------------------------------------------------------------------------------------------------
# Memory
# ----------------------------------------------------------------------------------------------------


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def blocks_at_admission(job: Job, chunk: int, flags: Flags) -> int:
    """Blocks an admitted job takes at once."""
    if not flags.track_blocks:
        return 0
    tokens = {
        "none": chunk,
        "prompt": job.known,
        "expected": job.known,
        "max_tokens": job.request.prompt + job.request.max_tokens,
        "max_model_len": flags.max_model_len,
    }[flags.reserve]
    return ceil_div(tokens, flags.block_size)


def blocks_to_grow(job: Job, tokens: int, flags: Flags) -> int:
    """Blocks a running job lacks to compute `tokens` more."""
    if not flags.track_blocks:
        return 0
    lacking = max(0, ceil_div(job.scheduled_tokens + tokens, flags.block_size) - job.blocks)
    assert lacking == 0 or flags.reserve in CAN_GROW, "a full reservation was too small"
    return lacking


def take(instance: Instance, job: Job, blocks: int) -> None:
    assert 0 <= blocks <= instance.free_blocks, "more blocks taken than were free"
    instance.free_blocks -= blocks
    job.blocks += blocks


def release(instance: Instance, job: Job) -> None:
    if instance.cache is not None:
        instance.cache.free(job.for_cache)
        instance.free_blocks = instance.cache.num_free
    else:
        instance.free_blocks += job.blocks
    job.blocks = 0


def hold_cached(instance: Instance, job: Job, chunk: int) -> None:
    """Admission with a prefix cache: the job holds what is cached of it, and room for its first chunk behind."""
    cached = instance.cache.lookup(job.for_cache)
    assert instance.cache.allocate(job.for_cache, chunk), "admitted without room"
    job.computed = cached
    job.hit_tokens += cached
    if job.cached_tokens is None:
        job.cached_tokens = cached
    follow_cache(instance, job)


def grow_cached(instance: Instance, job: Job, tokens: int) -> None:
    """Room in the prefix cache for the next tokens of a running job."""
    assert instance.cache.grow(job.for_cache, tokens), "scheduled without room"
    follow_cache(instance, job)


def follow_cache(instance: Instance, job: Job) -> None:
    job.blocks = len(instance.cache.held[job.request.id])
    instance.free_blocks = instance.cache.num_free


def is_expected_to_fit(instance: Instance, job: Job, admitted_now: list[Job], flags: Flags) -> bool:
    """SGLang's admission test: prompt and all its output against free tokens less what the running expect."""
    free_tokens = instance.free_blocks * flags.block_size
    wanted = ceil_div(job.known, flags.block_size) * flags.block_size
    wanted += min(job.tokens_left, flags.expected_clip)
    expected = 0.0
    for other in instance.running:
        is_full = flags.expected_new_admissions == "full" and other in admitted_now
        ratio = 1.0 if is_full else instance.new_token_ratio
        expected += min(other.tokens_left, flags.expected_clip) * ratio
    left = free_tokens - expected
    return wanted < left or (wanted == left and not flags.is_expected_strict)


# ----------------------------------------------------------------------------------------------------
# A scheduling pass
# ----------------------------------------------------------------------------------------------------


def queue_key(job: Job) -> tuple[int, int]:
    return (job.request.priority, job.request.id)


def enqueue(instance: Instance, job: Job, flags: Flags, *, at_front: bool) -> None:
    """Front or back of a FCFS queue; its rank in a priority queue."""
    if flags.order == "priority":
        instance.waiting.append(job)
        instance.waiting.sort(key=queue_key)
    elif at_front:
        instance.waiting.insert(0, job)
    else:
        instance.waiting.append(job)


def preempt(instance: Instance, job: Job, plan: Plan, flags: Flags, *, at_front: bool = True) -> None:
    """By recomputation: all its blocks go, its emitted tokens stay, it waits again."""
    instance.running.remove(job)
    release(instance, job)
    job.lost_tokens += job.computed
    job.computed = 0
    job.is_prefilled = False
    job.preemptions += 1
    enqueue(instance, job, flags, at_front=at_front)
    plan.preempted.append(job)


def schedule_running(instance: Instance, plan: Plan, flags: Flags) -> None:
    """Gives every running job its tokens in list order, preempting where a block is lacking.

    This is vLLM's loop: the victim may be a job that already got its tokens in this pass (they are refunded),
    and when it is the very job that lacks the block the loop ends and what stands after it gets no tokens.
    With last-admitted victims nothing stands after it.

    Who has nothing to compute until a batch returns is passed over, and so is who finds the batch full. Nobody in
    flight is a victim; a prompt in flight goes without its next chunk where it lacks blocks or somebody was
    preempted, and the loop ends.
    """
    position = 0
    while position < len(instance.running):
        job = instance.running[position]
        if job.scheduled_tokens == job.known or len(plan.entries) >= flags.max_batch_seqs:
            position += 1
            continue
        if job.pending and plan.preempted:
            plan.is_short = True
            return
        tokens = 1 if job.is_prefilled else min(job.known - job.scheduled_tokens, plan.budget)
        assert tokens >= 1, "a running job found no budget"
        lacking = blocks_to_grow(job, tokens, flags)
        must_be_free = lacking
        if job.is_prefilled and flags.track_blocks and flags.decode_needs_free_block == "always":
            must_be_free = max(1, lacking)
        while instance.free_blocks < must_be_free:
            if flags.victim == "lowest_priority":
                victim = max(instance.running, key=queue_key)
            else:
                victim = next((j for j in reversed(instance.running[position:]) if not j.pending), None)
            if victim is None:
                plan.is_short = True
                return
            if plan.withdraw(victim):
                position -= 1
            preempt(instance, victim, plan, flags)
            if victim is job:
                plan.is_short = any(j.pending and j.scheduled_tokens < j.known for j in instance.running)
                return
        if instance.cache is not None:
            grow_cached(instance, job, tokens)
        else:
            take(instance, job, lacking)
        plan.add(job, tokens)
        position += 1


def retract_and_decode(instance: Instance, plan: Plan, flags: Flags) -> None:
    """SGLang's decode step: if one token each does not fit, retract until it comfortably does."""

    def lacking(jobs: list[Job]) -> int:
        return sum(blocks_to_grow(job, 1, flags) for job in jobs)

    def is_tight() -> bool:
        free_tokens = instance.free_blocks * flags.block_size
        few = flags.retract_free_tokens * len(instance.running)
        return free_tokens < few or instance.free_blocks < lacking(instance.running)

    if instance.free_blocks < lacking(instance.running):
        while len(instance.running) > 1 and is_tight():
            victim = min(instance.running, key=lambda j: (j.emitted, -j.request.prompt, -j.request.id))
            preempt(instance, victim, plan, flags, at_front=flags.retract_to == "front")
        emitted = sum(job.emitted for job in instance.running)
        limit = sum(job.request.max_tokens for job in instance.running)
        spare = flags.retract_free_tokens * len(instance.running)
        instance.new_token_ratio = min(1.0, (emitted + spare) / limit)
    else:
        instance.new_token_ratio = max(
            flags.new_token_ratio_floor, instance.new_token_ratio - flags.new_token_ratio_decay
        )
    for job in instance.running:
        take(instance, job, blocks_to_grow(job, 1, flags))
        plan.add(job, 1)


def schedule_limited_decodes(instance: Instance, plan: Plan, flags: Flags) -> None:
    """simdistserve's decode step: from the front of the queue while the sum of contexts fits."""
    room = flags.decode_context_limit
    for job in instance.running:
        if job.known > room:
            break
        room -= job.known
        plan.add(job, 1)


def admit(instance: Instance, plan: Plan, flags: Flags, visible: set[int] | None) -> None:
    """Admits from the front of the queue until one does not fit; only ids in `visible` exist (None: all)."""
    # A prompt that was begun earlier and goes on here counts as admitted here.
    admitted = [job for job, _ in plan.entries if not job.is_prefilled]
    while (
        len(instance.running) < flags.max_num_seqs
        and plan.budget > 0
        and len(plan.entries) < flags.max_batch_seqs
        and not plan.is_short
    ):
        heads = (job for job in instance.waiting if visible is None or job.request.id in visible)
        job = next(heads, None)
        if job is None:
            return
        # With a prefix cache the first chunk starts behind what is cached now.
        cached = 0 if instance.cache is None else instance.cache.lookup(job.for_cache)
        if not flags.chunked_prefill and job.known - cached > plan.budget:
            return
        chunk = min(job.known - cached, plan.budget)
        if instance.cache is not None:
            blocks = instance.cache.blocks_to_allocate(job.for_cache, chunk)
        else:
            blocks = blocks_at_admission(job, chunk, flags)
        if flags.track_blocks and instance.free_blocks - blocks < flags.watermark_blocks:
            return
        if flags.reserve == "expected" and not is_expected_to_fit(instance, job, admitted, flags):
            return
        instance.waiting.remove(job)
        instance.running.append(job)
        admitted.append(job)
        if instance.cache is not None:
            hold_cached(instance, job, chunk)
        else:
            take(instance, job, blocks)
        plan.add(job, chunk)


def wait_for_prompts(instance: Instance, plan: Plan, flags: Flags) -> None:
    """TensorRT-LLM's batch waiting: withdraws the prompts just admitted, if too few, unless they waited long."""
    if not flags.batch_wait_timeout_iters:
        return
    prompts = [job for job, _ in plan.entries if not job.is_prefilled]
    if not prompts or len(prompts) == len(plan.entries):
        return
    scheduled_tokens = sum(tokens for _, tokens in plan.entries)
    is_full = scheduled_tokens >= flags.batch_wait_max_tokens_ratio * flags.max_num_batched_tokens
    if is_full or instance.iterations_waited >= flags.batch_wait_timeout_iters:
        instance.iterations_waited = 0
        return
    instance.iterations_waited += 1
    for job in reversed(prompts):
        plan.withdraw(job)
        instance.running.remove(job)
        release(instance, job)
        enqueue(instance, job, flags, at_front=True)


def scheduling_pass(instance: Instance, flags: Flags, visible: set[int] | None) -> Plan:
    """Composes the next batch of an instance and changes its queue, list and pool accordingly."""
    plan = Plan(budget=flags.max_num_batched_tokens)
    may_admit = flags.admit == "any_time" or not instance.running

    if flags.phase_mix == "unified":
        schedule_running(instance, plan, flags)
        if may_admit and not (plan.preempted and flags.waiting_blocked_after_preempt):
            admit(instance, plan, flags, visible)
        wait_for_prompts(instance, plan, flags)
        return plan

    for job in instance.running:
        if not job.is_prefilled:  # the one partially prefilled job; its blocks were reserved
            plan.add(job, min(job.known - job.computed, plan.budget))
    if may_admit:
        admit(instance, plan, flags, visible)
    if plan.entries:
        return plan
    if flags.decode_context_limit is not None:
        schedule_limited_decodes(instance, plan, flags)
    elif flags.reserve == "expected":
        retract_and_decode(instance, plan, flags)
    else:
        # Decodes are not counted against the prefill budget.
        plan.budget = UNLIMITED
        schedule_running(instance, plan, flags)
    return plan


def batch_stats(entries: list[tuple[Job, int]]) -> BatchStatsRef:
    """Statistics of a composed batch, before it runs."""
    decodes = [job for job, _ in entries if job.is_prefilled]
    chunks = [(job.scheduled_tokens, tokens) for job, tokens in entries if not job.is_prefilled]
    return BatchStatsRef(
        num_decode=len(decodes),
        decode_context=sum(job.computed + 1 for job in decodes),
        num_prefill=len(chunks),
        prefill_tokens=sum(c for _, c in chunks),
        prefill_pairs=sum((h + c) ** 2 - h**2 for h, c in chunks),
        prefill_context=sum(h + c for h, c in chunks),
        num_sampled=sum(job.scheduled_tokens + tokens == job.known for job, tokens in entries),
    )


# ----------------------------------------------------------------------------------------------------
# What must always hold
# ----------------------------------------------------------------------------------------------------


def refuse_impossible(request: Request, flags: Flags) -> None:
    """Raises ValueError for a request that an empty instance could never finish."""
    # A request that can be preempted comes back with everything it emitted.
    can_come_back = flags.track_blocks and flags.reserve in CAN_GROW
    last_context = request.prompt + request.output - 1
    most_to_prefill = last_context if can_come_back else request.prompt
    problem = None
    if not flags.chunked_prefill and most_to_prefill > flags.max_num_batched_tokens:
        problem = f"{most_to_prefill} tokens to prefill exceed max_num_batched_tokens"
    if flags.decode_context_limit is not None and last_context > flags.decode_context_limit:
        problem = f"context {last_context} exceeds decode_context_limit"
    if flags.track_blocks:
        if flags.reserve == "max_model_len" and last_context > flags.max_model_len:
            problem = f"context {last_context} exceeds max_model_len"
        room = flags.num_blocks - flags.watermark_blocks
        if flags.reserve == "none":
            # What is cached is held at admission too, whatever the budget.
            first_chunk = most_to_prefill
            if not flags.prefix_caching:
                first_chunk = min(first_chunk, flags.max_num_batched_tokens)
            fits = ceil_div(last_context, flags.block_size) <= flags.num_blocks
            fits = fits and ceil_div(first_chunk, flags.block_size) <= room
        elif flags.reserve in ("prompt", "expected"):
            fits = ceil_div(last_context, flags.block_size) <= room
        else:
            fits = blocks_at_admission(Job(request, 0), request.prompt, flags) <= room
        if flags.reserve == "expected":
            empty = Instance(0, flags.num_blocks, 1.0)
            comebacks = [Job(request, 0, emitted=g) for g in range(request.output)]
            fits = fits and all(is_expected_to_fit(empty, job, [], flags) for job in comebacks)
        if not fits:
            problem = "its blocks exceed the pool"
    if flags.prefix_caching and len(request.prefix_hashes) > request.prompt // flags.block_size:
        raise ValueError(f"request {request.id} has more prefix hashes than full blocks in its prompt")
    if problem is not None:
        raise ValueError(f"request {request.id} can never be served: {problem}")


def check_instance(instance: Instance, flags: Flags) -> None:
    """Blocks are conserved and cover what was computed; nobody is in two places; limits hold."""
    running, waiting = instance.running, instance.waiting
    assert len(running) <= flags.max_num_seqs
    assert len({id(job) for job in running + waiting}) == len(running) + len(waiting)
    assert all(job.blocks == 0 and job.computed == 0 for job in waiting)
    assert 0 <= instance.free_blocks <= flags.num_blocks
    if instance.cache is not None:
        instance.cache.check()
        held = instance.cache.held
        assert {name: len(blocks) for name, blocks in held.items()} == {j.request.id: j.blocks for j in running}
        num_held = len({block for blocks in held.values() for block in blocks})
        assert instance.free_blocks == instance.cache.num_free == flags.num_blocks - num_held
    else:
        assert instance.free_blocks + sum(job.blocks for job in running) == flags.num_blocks
    if flags.track_blocks:
        assert all(job.blocks * flags.block_size >= job.scheduled_tokens for job in running)
    flying = [job for flight in instance.flights for job, _ in flight]
    assert all(any(job is other for other in running) for job in flying)
    assert len(instance.flights) <= flags.stages
    if flags.order == "priority":
        assert waiting == sorted(waiting, key=queue_key)


def check_between_iterations(instance: Instance, flags: Flags) -> None:
    """At most one job is partially prefilled, and it is the last admitted."""
    check_instance(instance, flags)
    assert all(job.is_prefilled or job.scheduled_tokens == job.known for job in instance.running[:-1])


def check_batch(instance: Instance, plan: Plan, flags: Flags) -> None:
    """Each running job at most once, within the budget, with the blocks for its tokens."""
    jobs = [job for job, _ in plan.entries]
    assert len({id(job) for job in jobs}) == len(jobs)
    assert all(any(job is other for other in instance.running) for job in jobs)
    for job, tokens in plan.entries:
        assert tokens >= 1 and job.scheduled_tokens + tokens <= job.known
        assert not flags.track_blocks or job.blocks * flags.block_size >= job.scheduled_tokens + tokens
    assert len(plan.entries) <= flags.max_batch_seqs
    counted = [n for job, n in plan.entries if flags.phase_mix == "unified" or not job.is_prefilled]
    assert sum(counted) <= flags.max_num_batched_tokens
    if flags.phase_mix == "prefill_first":
        assert len({job.is_prefilled for job in jobs}) <= 1, "prefills and decodes in one batch"


# ----------------------------------------------------------------------------------------------------
# The simulation
# ----------------------------------------------------------------------------------------------------


def simulate(
    requests: Sequence[Request],
    flags: Flags,
    num_instances: int,
    router: str | Router,
    cost: Callable[[BatchStatsRef], float],
    *,
    round_times: bool = True,
    ranks: int = 1,
    stage_cost: Callable[[BatchStatsRef], Sequence[float]] | None = None,
) -> ReferenceResult:
    """Serves all requests to the end.

    Arguments:
    - requests: in order of (arrival, id), ids distinct.
    - router: a name of `ROUTERS` or a function (request, instances, requests routed so far) -> index.
    - cost: seconds of one iteration.
    - round_times: False keeps float64 seconds as they come instead of the grids.
    - ranks: so many instances each, one behind the other, iterate together: none starts or ends before the others.
    - stage_cost: seconds of one iteration in the engine and in each stage of a pipeline; by default nothing in the
      engine, and `cost` in equal parts.

    Raises ValueError for a request that can never be served, AssertionError where a law is broken.
    """
    route = ROUTERS[router] if isinstance(router, str) else router
    if round_times:

        def to_ticks(seconds: float, grid: int) -> int:
            return round(seconds * (TICKS_PER_SECOND // grid)) * grid

        def to_seconds(ticks: int) -> float:
            return ticks / TICKS_PER_SECOND
    else:

        def to_ticks(seconds: float, grid: int) -> float:
            return float(seconds)

        def to_seconds(ticks: float) -> float:
            return ticks

    jobs = [Job(request, to_ticks(request.arrival_s, ARRIVAL_GRID_TICKS)) for request in requests]
    order = [(job.arrival, job.request.id) for job in jobs]
    assert order == sorted(order) and len({i for _, i in order}) == len(order), "requests out of order"
    for request in requests:
        refuse_impossible(request, flags)

    if stage_cost is None:
        def stage_cost(stats):
            return [0.0] + [cost(stats) / flags.stages] * flags.stages

    instances = [Instance(i, flags.num_blocks, flags.new_token_ratio_init) for i in range(num_instances)]
    for instance in instances:
        instance.stage_free = [0] * (flags.stages + 1)
    if flags.prefix_caching:
        for instance in instances:
            instance.cache = prefix_cache.PrefixCache(flags.num_blocks, flags.block_size)
    iterations: list[IterationRecord] = []
    iteration_ends: list[list[float]] = [[] for _ in instances]
    num_routed = 0

    events = [(job.arrival, PHASE_ARRIVAL, number) for number, job in enumerate(jobs)]
    heapq.heapify(events)
    now = 0

    def together(instance: Instance) -> list[Instance]:
        first = instance.index // ranks * ranks
        return instances[first : first + ranks]

    def ask_for_pass(instance: Instance, *, is_return: bool = False) -> None:
        leader = together(instance)[0]
        room = flags.stages if flags.pass_on_arrival or is_return else 1
        if leader.is_pass_due or any(len(i.flights) >= room for i in together(instance)):
            return
        if any(i.outstanding for i in together(instance)):
            leader.is_pass_due = True
            heapq.heappush(events, (now, PHASE_PASS, leader.index))

    def end_iteration(instance: Instance) -> None:
        iteration_ends[instance.index].append(now)
        for job, tokens in instance.flights.pop(0):
            job.computed += tokens
            job.pending -= tokens
            assert job.computed <= job.known
            if job.computed < job.known:
                continue
            job.emitted += 1
            job.is_prefilled = True
            if job.first_token is None:
                job.first_token = now
            if job.emitted == job.request.output:
                job.finish = now
                release(instance, job)
                instance.running.remove(job)
            elif flags.decode_context_limit is not None:
                instance.running.remove(job)  # to the back of the queue of decodes
                instance.running.append(job)
        check_between_iterations(instance, flags)
        if not instance.outstanding:
            instance.waiting_at_start = None  # idle: whoever comes next is seen at once
            if flags.resets_ratio_when_idle:
                instance.new_token_ratio = flags.new_token_ratio_init

    def arrive(job: Job) -> None:
        nonlocal num_routed
        job.instance = route(job.request, instances, num_routed)
        num_routed += 1
        instance = instances[job.instance]
        enqueue(instance, job, flags, at_front=False)
        ask_for_pass(instance)

    def start_iteration(instance: Instance) -> float | None:
        """Returns its duration, None if nothing can be scheduled until a batch returns."""
        visible = instance.waiting_at_start if flags.async_scheduling else None
        plan = scheduling_pass(instance, flags, visible)
        check_batch(instance, plan, flags)
        check_instance(instance, flags)
        instance.preempted_before += [job.request.id for job in plan.preempted]
        if not plan.entries and instance.flights:
            return None
        if not plan.entries:
            # Nothing runs and something waits: the engine's loop comes round at once, seeing everybody.
            assert plan.preempted or visible is not None, "an idle instance with work is stuck"
            instance.waiting_at_start = None
            return start_iteration(instance)
        for job, _ in plan.entries:
            if job.scheduled is None:
                job.scheduled = now
        stats = batch_stats(plan.entries)
        seconds = [cost(stats)] if flags.stages == 1 else stage_cost(stats)
        assert all(math.isfinite(x) and x >= 0 for x in seconds)
        end = now
        for stage, part in enumerate(seconds):
            end = max(end, instance.stage_free[stage]) + to_ticks(part, 1)
            instance.stage_free[stage] = end
        duration = end - now
        iterations.append(
            IterationRecord(
                instance=instance.index,
                start_s=to_seconds(now),
                duration_s=to_seconds(duration),
                batch={job.request.id: tokens for job, tokens in plan.entries},
                free_blocks=instance.free_blocks,
                preempted=tuple(instance.preempted_before),
                stats=stats,
            )
        )
        instance.preempted_before = []
        instance.waiting_at_start = {job.request.id for job in instance.waiting}
        instance.flights.append(plan.entries)
        for job, tokens in plan.entries:
            job.pending += tokens
        return duration

    while events:
        time, phase, index = heapq.heappop(events)
        assert time >= now, "the clock ran back"
        now = time
        if phase == PHASE_ITERATION_END:
            for instance in together(instances[index]):
                if instance.flights:
                    end_iteration(instance)
            ask_for_pass(instances[index], is_return=True)
        elif phase == PHASE_ARRIVAL:
            arrive(jobs[index])
        else:
            instances[index].is_pass_due = False
            if flags.stages > 1:
                while len(instances[index].flights) < flags.stages and instances[index].outstanding:
                    duration = start_iteration(instances[index])
                    if duration is None:
                        break
                    heapq.heappush(events, (now + duration, PHASE_ITERATION_END, index))
                continue
            longest = max(start_iteration(i) for i in together(instances[index]) if i.outstanding)
            heapq.heappush(events, (now + longest, PHASE_ITERATION_END, index))

    for instance in instances:
        assert not instance.waiting and not instance.running and not instance.flights
        assert instance.free_blocks == flags.num_blocks
    for job in jobs:
        assert job.finish is not None and job.emitted == job.request.output
        assert job.computed == job.request.prompt + job.request.output - 1
        assert job.arrival <= job.scheduled <= job.first_token <= job.finish
    assert sum(record.stats.num_sampled for record in iterations) == sum(r.output for r in requests)
    processed = sum(sum(record.batch.values()) for record in iterations)
    assert processed == sum(job.computed + job.lost_tokens - job.hit_tokens for job in jobs)
    assert sum(len(record.preempted) for record in iterations) == sum(job.preemptions for job in jobs)

    return ReferenceResult(
        requests=[
            RequestResult(
                id=job.request.id,
                instance=job.instance,
                arrival_s=to_seconds(job.arrival),
                scheduled_s=to_seconds(job.scheduled),
                first_token_s=to_seconds(job.first_token),
                finish_s=to_seconds(job.finish),
                preemptions=job.preemptions,
                status="finished",
                cached_tokens=job.cached_tokens or 0,
                hit_tokens=job.hit_tokens,
            )
            for job in jobs
        ],
        iterations=iterations,
        margins=arrival_margins([job.arrival for job in jobs], iteration_ends, to_seconds),
    )


def arrival_margins(
    arrivals: list[float], iteration_ends: list[list[float]], to_seconds: Callable[[float], float]
) -> list[tuple[float, float]]:
    """(earlier moment, distance) in seconds of each arrival and the iteration ends next to it."""
    ends = sorted(end for of_instance in iteration_ends for end in of_instance)
    margins = []
    for arrival in arrivals:
        first_at, first_after = bisect_left(ends, arrival), bisect_right(ends, arrival)
        neighbours = ends[max(0, first_at - 1) : first_at] + ends[first_after : first_after + 1]
        neighbours += [arrival] * (first_at < first_after)
        for end in neighbours:
            margins.append((to_seconds(min(arrival, end)), to_seconds(abs(arrival - end))))
    return margins
