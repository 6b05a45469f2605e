"""Requests, what becomes of them inside the simulation, and the instances that serve them."""

from collections.abc import Hashable
from dataclasses import dataclass, field

from . import fairness, lending, offload, prefix_cache, remote_store
from .flags import Flags


@dataclass(frozen=True)
class Request:
    """One request. `max_tokens` is the output limit the engine knows (default: the true output length).

    prefix_hashes: what distinguishes the tokens of each leading full block of the prompt (blocks of the engine);
    blocks behind the last hash are nobody else's. They may go on through the output, which the next turn of a session
    finds.

    tiles: of each of its images, whose tokens are part of the prompt.

    after: id of the request whose answer brings this one about, `think_s` after its last token, whatever `arrival_s`.

    deadline_s, first_token_deadline_s: how long its client waits, from each sending, for the last and the first token.
    tenant, predicted (output tokens), limit_s (from the arrival): what orders of the queue go by.
    variant: of the model, that it is for.
    """

    id: int
    arrival_s: float
    prompt: int
    output: int
    max_tokens: int | None = None
    priority: int = 0
    uniforms: tuple[float, float] = (0.0, 0.0)
    prefix_hashes: tuple[Hashable, ...] = ()
    after: int | None = None
    think_s: float = 0.0
    deadline_s: float = float("inf")
    first_token_deadline_s: float = float("inf")
    tiles: tuple[int, ...] = ()
    tenant: int = 0
    predicted: int = 0
    limit_s: float = 0.0
    variant: int = 0

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
    chunks: tuple[tuple[int, int], ...] = ()  # (h, c) of each


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
    loaded_tokens: int | None = None  # from host memory at the first admission
    fetched_tokens: int | None = None  # of these, from a store that instances share
    loaded_from: int | None = None  # the instance that gave them
    instance: int | None = None
    scheduled: float | None = None
    first_token: float | None = None
    finish: float | None = None
    iteration: float = 0  # duration of the last one it was in
    is_newcomer: bool = False  # it migrated and has computed nothing since
    sending: int = 1  # the first, second, ... of its request
    status: str = "sent"
    ended: float | None = None
    is_given_up: bool = False  # its client is gone
    restarts: int = 0  # times that it was sent on, its instance down
    is_on_its_way: bool = False  # to another instance
    preemptions_before: int = 0  # when it was last sent on
    # Disaggregated: who decodes, blocks still held by who prefilled, when the transfer was accepted and over.
    decode_instance: int | None = None
    source_blocks: int = 0
    accepted: float | None = None
    left: float | None = None  # for who decodes
    transfers_before: int = 0  # of everybody, when it was last lost
    delivered: float | None = None
    sequence: int = 0  # arrivals before it

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

    An instance of role `prefill` keeps the blocks of `leaving` requests until their transfers end. One of role `decode`
    has requests that it has not accepted, accepted ones in transfer and ready ones, which hold blocks; all in the order
    they came. `swapped` ones hold blocks of host memory only.
    """

    index: int
    flags: Flags
    role: str = "mixed"
    free_blocks: int = field(init=False)
    new_token_ratio: float = field(init=False)
    waiting: list[Job] = field(default_factory=list)
    running: list[Job] = field(default_factory=list)
    leaving: list[Job] = field(default_factory=list)
    unaccepted: list[Job] = field(default_factory=list)
    in_transfer: list[Job] = field(default_factory=list)
    ready: list[Job] = field(default_factory=list)
    swapped: list[Job] = field(default_factory=list)
    stopped: list[Job] = field(default_factory=list)  # for the last stage of a migration
    inbound_blocks: int = 0  # taken for a request that migrates here
    embedding: list[Job] = field(default_factory=list)  # chosen to compute it, its embeddings are not here yet
    flights: list[list[tuple[Job, int]]] = field(default_factory=list)
    on_first_stage: list[tuple[Job, int]] = field(default_factory=list)  # the batch there
    stage_free: list[float] = field(init=False)  # when the engine, and each stage, is free
    stage_start: list[float] = field(init=False)  # when each last started a batch of decodes
    merges_left_out: int = 0  # batches of decodes that came to a stage where another waited
    is_pass_due: bool = False
    # Ids that waited when the iteration that just ended was started; None when idle.
    waiting_at_start: set[int] | None = None
    # Ids preempted by passes since the last iteration that scheduled nothing.
    preempted_before: list[int] = field(default_factory=list)
    swapped_tokens: int = 0  # moved out of the pool and into it since the last iteration
    cache: prefix_cache.PrefixCache | None = None
    # Behind the cache.
    store: offload.HostStore | offload.SiblingStore | remote_store.TieredStore | lending.Borrower | None = None
    iterations_waited: int = 0  # by prompts that could have joined (TensorRT-LLM)
    swap: object = None  # `swapping.SwapState`
    predict: object = None  # seconds of a batch in the making
    now: object = None  # asks for the time
    counters: "fairness.VirtualTokenCounters | None" = None

    def __post_init__(self):
        self.free_blocks = self.flags.num_blocks
        self.new_token_ratio = self.flags.new_token_ratio_init
        self.stage_free = [0] * (self.flags.stages + 1)
        self.stage_start = [0] * (self.flags.stages + 1)
        if self.flags.order == "vtc":
            self.counters = fairness.VirtualTokenCounters(self.flags.prices)
        if self.flags.prefix_caching:
            self.cache = prefix_cache.PrefixCache(self.flags.num_blocks, self.flags.block_size)
        if self.flags.offloading is not None:
            self.store = (lending.Borrower(self.flags.offloading, self)
                          if isinstance(self.flags.offloading, lending.Lending)
                          else offload.store_of(self.flags.offloading))

    @property
    def can_prefill(self) -> bool:
        return self.role not in ("decode", "encode")

    @property
    def has_work(self) -> bool:
        """Somebody is here that a pass could schedule, now or when blocks are free."""
        is_coming = self.swap is not None and self.in_transfer
        return bool(self.waiting or self.running or self.ready or self.swapped or is_coming)

    @property
    def outstanding(self) -> int:
        """Requests whose next token comes from here."""
        queues = (self.waiting, self.running, self.unaccepted, self.in_transfer, self.ready, self.swapped,
                  self.stopped, self.embedding)
        return sum(not job.is_given_up for queue in queues for job in queue)


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
        chunks=tuple(chunks),
    )
