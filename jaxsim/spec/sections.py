"""The sections of a scenario: what each holds, and what the values of one field may be."""

import math
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from jaxsim.spec.device import DeviceSpec, load_device
from jaxsim.spec.engine import Share, Text
from jaxsim.spec.model import ModelSpec, load_model

MAX_ITERATION_S = 1 << 15
"""An iteration of fitted coefficients may not take more seconds than this (9 hours)."""

Tokens = Annotated[int, Meta(ge=1, le=1 << 27)]
Level = Annotated[float, Meta(ge=0, le=1)]
Positive = Annotated[float, Meta(gt=0)]
NotNegative = Annotated[float, Meta(ge=0)]
Turns = Annotated[int, Meta(ge=1, le=1 << 16)]
Wait = Annotated[float, Meta(ge=0, le=1e9)]
Patience = Annotated[float, Meta(ge=1e-6, le=1e8)]
Images = Annotated[int, Meta(ge=0, le=1024)]
Coefficient = Annotated[float, Meta(ge=0, le=MAX_ITERATION_S)]

ArrivalKind = Literal["poisson", "gamma", "weibull", "deterministic", "mmpp", "batch", "closed-loop",
                      "azure-conv-2023", "conversation", "agent", "trace"]
SESSION_KINDS = ("conversation", "agent")
_OPEN = ("poisson", "gamma", "weibull", "deterministic", "mmpp", "batch", "azure-conv-2023", *SESSION_KINDS)
_GENERATED = (*_OPEN, "closed-loop")
WITHOUT_RATE = ("batch", "closed-loop")
FIELDS_OF_KIND = {
    "concurrency": ("closed-loop",),
    "think_s": ("closed-loop",),
    "cv": ("gamma", "weibull"),
    "rate_ratio": ("mmpp",),
    "high_dwell_s": ("mmpp",),
    "low_dwell_s": ("mmpp",),
    "trace": ("trace",),
    "replay": ("trace",),
    "format": ("trace",),
    "slice": ("trace",),
    "sort": ("trace",),
    "drop_failed": ("trace",),
    "input": _GENERATED,
    "output": _GENERATED,
    "lengths_from": _GENERATED,
    "sessions": _OPEN,
    "prefix_groups": tuple(kind for kind in _GENERATED if kind not in SESSION_KINDS),
}


class _Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """Common rules: immutable, unknown fields refused, defaults not written back."""


class ModelSection(_Section, frozen=True):
    """Which model runs.

        name: a name of `jaxsim list models`, or a Hugging Face id that the catalogue knows.
        config: path of a Hugging Face config.json, instead of a name.
        dimensions: every dimension of a model that is in no catalogue (`jaxsim.spec.model.ModelSpec`); name is then
            only a label.
        dtype: weights and activations (bf16, fp16, fp8, int8, int4, ...); the model's own if left out.
        kv_dtype: KV cache; the same as dtype if left out.
    """

    name: Text | None = None
    config: Text | None = None
    dimensions: dict[str, Any] | None = None
    dtype: Text | None = None
    kv_dtype: Text | None = None

    def spec(self) -> ModelSpec:
        """The model itself. Raises `InputError` where it cannot be had."""
        if self.dimensions is not None:
            return ModelSpec.from_dict({"name": self.name, **self.dimensions}, "model.dimensions")
        return ModelSpec.from_hf_config(self.config) if self.config is not None else load_model(self.name)


class DeviceSection(_Section, frozen=True):
    """What it runs on.

        name: a name of `jaxsim list devices`.
        numbers: every number of a device that is in no catalogue (`jaxsim.spec.device.DeviceSpec`); name is then only
            a label.
    """

    name: Text
    numbers: dict[str, Any] | None = None

    def spec(self) -> DeviceSpec:
        """The device itself. Raises `InputError` where it cannot be had."""
        if self.numbers is not None:
            return DeviceSpec.from_dict({"name": self.name, **self.numbers}, "device.numbers")
        return load_device(self.name)


class PoolSection(_Section, frozen=True):
    """Some of the engines of a cluster, all alike.

        role: mixed, prefill (prompts, up to the first token), decode (all tokens after it) or encode (images only;
            engine.max_num_seqs is then how many parts of requests it encodes at once).
        replicas: how many.
        device: a name of `jaxsim list devices`, if they run on another than [device].
        engine: fields of [engine] that are other here.
        cost: fitted coefficients of these, instead of [cost].
    """

    role: Literal["mixed", "prefill", "decode", "encode"] = "mixed"
    replicas: Annotated[int, Meta(ge=1, le=4096)] = 1
    device: Text | None = None
    engine: dict[str, Any] = {}
    cost: "FittedCost | None" = None


class TransferSection(_Section, frozen=True):
    """How the KV cache of a prompt gets from a prefill to a decode engine.

        hand_over: pull (a decode engine takes no more while what it has taken and does not run yet holds
            waiting_block_share of its blocks) or push (as soon as its free blocks suffice).
        waiting_block_share: for pull; 0.05, DistServe's, if left out.
        gb_per_s: of a link, out of a prefill and into a decode engine, each of which carries one transfer after the
            other; that of the devices between them if left out, times the ranks of the narrower engine.
        latency_us: of a transfer; none if left out.
        by_layer: layers are sent as they are computed, so that what is left when the prompt is done is what took longer
            than its last iteration, at least one layer; else all of it then.
        router: of decode engines, as cluster.router; least_outstanding if left out.
        router_weights: numbers of that router, where it has any.
    """

    hand_over: Literal["pull", "push"] = "pull"
    waiting_block_share: Annotated[float, Meta(gt=0, le=1)] | None = None
    gb_per_s: Positive | None = None
    latency_us: NotNegative = 0.0
    by_layer: bool = False
    router: Text = "least_outstanding"
    router_weights: dict[str, float] = {}


class MigrationSection(_Section, frozen=True):
    """Running requests move from full engines to free ones while they decode (Llumnix).

        metric: how free an engine is, in KV blocks a request: remaining_steps (of Llumnix's public code) or freeness
            (of its paper).
        choice: who goes: the shortest running request, or the last_come.
        polling_s: between two looks at all engines.
        out_below: engines less free than this send requests, and so do those where a preempted one waits.
        in_above: engines freer than this take them; out_below if left out.
        max_stages: stages of copying after which a migration is given up.
        last_stage_blocks: no more than these are copied while the request stands still.
        gb_per_s: of the link out of or into an engine; that of the device between two of them if left out, times its
            ranks.
        latency_us: of a stage.
    """

    metric: Literal["remaining_steps", "freeness"] = "remaining_steps"
    choice: Literal["shortest", "last_come"] = "shortest"
    polling_s: Annotated[float, Meta(ge=0.001, le=3600)] = 0.05
    out_below: float = 3.0
    in_above: float | None = None
    max_stages: Annotated[int, Meta(ge=1, le=1000)] = 3
    last_stage_blocks: Annotated[int, Meta(ge=1, le=1 << 20)] = 16
    gb_per_s: Positive | None = None
    latency_us: NotNegative = 0.0


class ScalingSection(_Section, frozen=True):
    """Engines are switched on and off, one at a time, to keep the mean freeness of those that are on in a band.

    Freeness is the remaining_steps of all that are on taken together, in KV blocks a request. cluster.replicas is the
    most that are on.

        min_replicas: the fewest, which are on at the beginning.
        check_s: between two looks.
        out_below: one more is started below this.
        in_above: one is drained above this.
        startup_s: from the start of an engine to when it takes requests.
    """

    min_replicas: Annotated[int, Meta(ge=1, le=4096)] = 1
    check_s: Annotated[float, Meta(ge=0.001, le=3600)] = 10.0
    out_below: float = 10.0
    in_above: float = 60.0
    startup_s: Annotated[float, Meta(ge=0, le=3600)] = 0.0
class AdmissionSection(_Section, frozen=True):
    """What the cluster refuses, with an answer at once (HTTP 429).

        max_waiting: an engine refuses who is routed to it while so many wait there.
        max_outstanding: the cluster refuses whoever comes while so many wait or run in all of it.
    """

    max_waiting: Annotated[int, Meta(ge=0, le=1 << 30)] | None = None
    max_outstanding: Annotated[int, Meta(ge=1, le=1 << 30)] | None = None


class EncodeSection(_Section, frozen=True):
    """The encoding of images: base_ms + tile_ms x tiles for a batch of them.

        base_ms: of a batch.
        tile_ms: of a tile in it.
        cache_tiles: of the multimodal cache of an encode engine, and of one that takes embeddings.
        waiting_tile_share: an engine accepts no more requests while embeddings of those that it has accepted and not
            begun hold this share of its cache.
        split_images: the images of a request are dealt to several encode engines; otherwise one encodes all.
        router: which encode engine gets them, as cluster.router.
        embedding_width: numbers of two bytes of the embedding of a token; the model's hidden size if left out.
    """

    base_ms: NotNegative
    tile_ms: NotNegative
    cache_tiles: Annotated[int, Meta(ge=1, le=1 << 20)] = 3000
    waiting_tile_share: Annotated[float, Meta(gt=0, le=1)] = 0.05
    split_images: bool = True
    router: Text = "round_robin"
    embedding_width: Tokens | None = None


class ClusterSection(_Section, frozen=True):
    """How many engines, and who chooses among them.

        replicas: independent engines, each with its own queue and KV pool.
        router: a name of `jaxsim list policies`, or the dotted path of a router class; round_robin if left out, or with
            data-parallel ranks vLLM's own balancer among all of them.
        router_weights: numbers of the router, where it has any.
        pools: engines that differ, in role, device or settings, instead of replicas.
        migration: of running requests between replicas.
        scaling: replicas are switched on and off.
        headroom_blocks: KV blocks that freeness keeps for requests of a priority below 0 on an engine where one runs.
        admission: what is refused; nothing if left out.
        transfer: of KV between pools, with prefill and decode engines, and of embeddings, with encode engines.
        encode: how images are encoded: by the pools of role encode, otherwise by all that compute prompts.
    """

    replicas: Annotated[int, Meta(ge=1, le=4096)] = 1
    router: Text | None = None
    router_weights: dict[str, float] = {}
    pools: tuple[PoolSection, ...] = ()
    transfer: TransferSection | None = None
    migration: MigrationSection | None = None
    scaling: ScalingSection | None = None
    headroom_blocks: Annotated[int, Meta(ge=1, le=1 << 27)] | None = None
    admission: AdmissionSection | None = None
    encode: EncodeSection | None = None

    @property
    def has_roles(self) -> bool:
        """Prompts and outputs are computed by different engines."""
        return any(pool.role != "mixed" for pool in self.pools)


class FixedLength(_Section, frozen=True, tag_field="kind", tag="fixed"):
    """The same for every request.

        tokens: the length.
    """

    tokens: Tokens


class UniformLength(_Section, frozen=True, tag_field="kind", tag="uniform"):
    """Whole numbers, all equally likely.

        min_tokens: smallest length.
        max_tokens: largest length.
    """

    min_tokens: Tokens
    max_tokens: Tokens


class LogNormalLength(_Section, frozen=True, tag_field="kind", tag="log-normal"):
    """Log-normal, rounded; what lies outside the limits piles up at them.

        mean_tokens: mean before clipping (or give mu).
        mu: mean of the logarithm (or give mean_tokens).
        sigma: standard deviation of the logarithm.
        min_tokens: smallest length.
        max_tokens: largest length.
    """

    sigma: NotNegative
    mean_tokens: Positive | None = None
    mu: float | None = None
    min_tokens: Tokens = 1
    max_tokens: Tokens | None = None


class QuantilesLength(_Section, frozen=True, tag_field="kind", tag="quantiles"):
    """Any measured distribution as a table of its quantiles, linear in between.

        levels: rising from 0 to 1.
        tokens: the quantiles at those levels.
    """

    levels: Annotated[tuple[Level, ...], Meta(min_length=2)]
    tokens: Annotated[tuple[Tokens, ...], Meta(min_length=2)]


Length = Tokens | FixedLength | UniformLength | LogNormalLength | QuantilesLength


class GeometricTurns(_Section, frozen=True, tag_field="kind", tag="geometric"):
    """At least one turn, and after each another one with the same probability.

        mean_turns: mean number, before max_turns.
        max_turns: what lies beyond piles up there.
    """

    mean_turns: Annotated[float, Meta(ge=1, le=1 << 16)]
    max_turns: Turns | None = None


class ContinuingTurns(_Section, frozen=True, tag_field="kind", tag="continuing"):
    """Any distribution, by the share of sessions that go on after each turn.

        shares: after the first turn, the second and so on; the last holds from there on.
        max_turns: what lies beyond piles up there.
    """

    shares: Annotated[tuple[Level, ...], Meta(min_length=1)]
    max_turns: Turns | None = None


class ExponentialTime(_Section, frozen=True, tag_field="kind", tag="exponential"):
    """Exponential.

        mean_s: mean.
    """

    mean_s: Wait


class LogNormalTime(_Section, frozen=True, tag_field="kind", tag="log-normal"):
    """Log-normal; what lies beyond the limit piles up there.

        median_s: median.
        sigma: standard deviation of the logarithm.
        max_s: the longest.
    """

    median_s: Wait
    sigma: NotNegative
    max_s: Wait | None = None


class QuantilesTime(_Section, frozen=True, tag_field="kind", tag="quantiles"):
    """Any measured distribution as a table of its quantiles, linear in between.

        levels: rising from 0 to 1.
        seconds: the quantiles at those levels.
    """

    levels: Annotated[tuple[Level, ...], Meta(min_length=2)]
    seconds: Annotated[tuple[Wait, ...], Meta(min_length=2)]


class SessionsSection(_Section, frozen=True):
    """Conversations and agentic loops: what arrives are sessions, whose later turns come when answers are out.

    A later prompt is the prompt before it, the answer to it, and new tokens. Whatever `conversation` or `agent` says
    can be left out there; elsewhere turns, think_s and context_limit are needed.

        turns: requests of a session, a number or a law.
        think_s: from the last token of an answer to the next turn, seconds or a law: how long a user thinks, or a tool
            takes.
        new_tokens: what a later turn adds to the context, of the user or a tool's output, tokens or a law; as
            workload.input if left out.
        shared_tokens: of every prompt, the first that all sessions have in common, before those of workload.input.
        context_limit: a session ends before a turn whose prompt and output together would be longer.
    """

    turns: Turns | GeometricTurns | ContinuingTurns | None = None
    think_s: Wait | ExponentialTime | LogNormalTime | QuantilesTime | None = None
    new_tokens: Length | None = None
    shared_tokens: Annotated[int, Meta(ge=0, le=1 << 24)] | None = None
    context_limit: Tokens | None = None


class UniformCount(_Section, frozen=True, tag_field="kind", tag="uniform"):
    """Every whole number of a range is as likely.

        least: smallest.
        most: largest.
    """

    least: Images
    most: Images


class ImagesSection(_Section, frozen=True):
    """Images of requests. Their tokens come on top of `workload.input`.

        number: of a request, or a law.
        tiles_per_image: that an image is cut into.
        tokens_per_tile: of the prompt.
    """

    number: Images | UniformCount
    tiles_per_image: Annotated[int, Meta(ge=1, le=4096)]
    tokens_per_tile: Annotated[int, Meta(ge=1, le=1 << 16)]

    @property
    def range(self) -> tuple[int, int]:
        """Least and most images of a request."""
        n = self.number
        return (n, n) if isinstance(n, int) else (n.least, n.most)


class PrefixGroupsSection(_Section, frozen=True):
    """Prompts that begin alike in groups, as with system prompts, tools or documents that many ask about.

        number: of groups.
        tokens: that the prompts of a group begin with, before those of workload.input; whole KV blocks where prefixes
            are cached.
        distribution: of requests over groups: uniform, or zipf, the k-th in proportion to k^-exponent.
        exponent: of zipf.
    """

    number: Annotated[int, Meta(ge=1, le=1 << 24)]
    tokens: Annotated[int, Meta(ge=1, le=1 << 24)]
    distribution: Literal["uniform", "zipf"] = "uniform"
    exponent: Annotated[float, Meta(ge=0, le=16)] = 1.0


class TenantSection(_Section, frozen=True):
    """A class of requests.

        name: a label carried to the results.
        share: its part of the requests, relative to the others.
        priority: smaller is more urgent; counts under engine.scheduling_policy = "priority".
        deadline_s: of its clients, instead of workload.client.deadline_s.
        first_token_deadline_s: and instead of workload.client.first_token_deadline_s.
        weight: service that it is entitled to, relative to the others; counts under engine.scheduling_policy = "vtc",
            and in the fairness of the results.
        ttft_ms: its limit of the time to first token, instead of slo.ttft_ms.
        tpot_ms: its limit of the time per output token, instead of slo.tpot_ms.
        deadline_ms: its limit from arrival to last token, instead of slo.e2e_ms. Under engine.scheduling_policy = "edf"
            a request is due at its arrival and the first given of deadline_ms, ttft_ms, slo.e2e_ms, slo.ttft_ms.
    """

    name: Text
    share: Positive = 1.0
    priority: Annotated[int, Meta(ge=-1_000_000, le=1_000_000)] = 0
    deadline_s: Patience | None = None
    first_token_deadline_s: Patience | None = None
    weight: Annotated[float, Meta(ge=0.001, le=1_000)] = 1.0
    ttft_ms: Positive | None = None
    tpot_ms: Positive | None = None
    deadline_ms: Positive | None = None


class ClientSection(_Section, frozen=True):
    """How long clients wait, and what they do then.

        deadline_s: for the last token, from sending; for ever if left out. Then the request is cancelled.
        first_token_deadline_s: for the first token, likewise.
        retries: times that a request is sent again, from scratch, after it was cancelled or refused.
        backoff_s: from there to the next sending.
        backoff_factor: how much longer that is each time.
    """

    deadline_s: Patience | None = None
    first_token_deadline_s: Patience | None = None
    retries: Annotated[int, Meta(ge=0, le=64)] = 0
    backoff_s: Annotated[float, Meta(ge=0, le=1e6)] = 0.0
    backoff_factor: Annotated[float, Meta(ge=1, le=10)] = 1.0


class PredictionSection(_Section, frozen=True):
    """Output lengths as a scheduler is told them: the true ones with a log-normal error.

        sigma: standard deviation of the logarithm of the error; 0 is exact. The median of predictions is the truth.
    """

    sigma: Annotated[float, Meta(ge=0, le=10)] = 0.0


class TraceSlice(_Section, frozen=True):
    """Which part of a trace.

        start_s: requests that arrive before this are left out, seconds from the first.
        end_s: and those from here on.
        keep: share of the rest that is kept, at random.
        run: which run of a file with several: the seed in a `requests.parquet`, the number (0 is the first, -1 the
            last) in a benchmark client's file.
        scenario: which scenario of a table of requests with several.
    """

    start_s: NotNegative = 0.0
    end_s: Positive | None = None
    keep: Share = 1.0
    run: int | None = None
    scenario: int | Text | None = None


class WorkloadSection(_Section, frozen=True):
    """What arrives.

        kind: the arrival process, a fitted generator by name, or the replay of a trace.
        rate_rps: mean arrivals a second over the whole cluster, of sessions where these arrive. A trace without it
            keeps its own times.
        num_requests: requests simulated; 1000, or the whole trace, if left out. Of sessions, all turns together.
        seed: of all random draws; run k of `num_seeds` uses seed + k.
        cv: coefficient of variation of the gaps (gamma, weibull); 1 is as bursty as Poisson.
        concurrency: clients that each have one request at a time (closed-loop).
        think_s: from an answer to the client's next request; 0 if left out (closed-loop).
        rate_ratio: high rate over low rate (mmpp).
        high_dwell_s: mean time at the high rate (mmpp).
        low_dwell_s: mean time at the low rate (mmpp).
        trace: the file replayed.
        replay: "open" keeps all its times; with "sessions" only the first turn of each session does, and every later
            one comes its recorded think time after the answer before it.
        format: its format; found from the file if left out.
        slice: part of the trace.
        sort: sort the trace by arrival, instead of refusing rows out of order.
        drop_failed: leave out the trace's requests without output or input tokens, instead of refusing them; formats
            that log failures that way do so unless this is false.
        input: prompt length, tokens or a law; that of azure-conv-2023 if left out.
        output: output length, tokens or a law; that of azure-conv-2023 if left out.
        spearman: rank correlation of prompt and output length; azure-conv-2023's own if no length is given.
        lengths_from: a trace whose pairs of lengths are drawn with replacement, instead of laws.
        output_limit: the max_tokens clients send: outputs are cut there, and the engine knows it. If left out
            it is told the exact output length, as in benchmarks that ignore the end-of-sequence token.
        tenants: classes of requests, or of sessions. Of a trace, which has its own, those whose limits or weights are
            other than the rest's.
        prediction: of output lengths, which engine.scheduling_policy = "sjf" goes by; instead of those that a trace may
            have.
        sessions: turns of conversations or agentic loops, instead of single requests.
        client: how long clients wait, and what they do then; for ever if left out.
        images: of requests, which have to be encoded first; none if left out.
        prefix_groups: prompts begin alike in groups, with tokens on top of input.
    """

    kind: ArrivalKind
    rate_rps: Positive | None = None
    num_requests: Annotated[int, Meta(ge=1, le=1 << 27)] | None = None
    seed: Annotated[int, Meta(ge=0, le=1 << 62)] = 0
    cv: Positive | None = None
    concurrency: Annotated[int, Meta(ge=1, le=1 << 20)] | None = None
    think_s: NotNegative | None = None
    rate_ratio: Annotated[float, Meta(ge=1)] | None = None
    high_dwell_s: Positive | None = None
    low_dwell_s: Positive | None = None
    trace: Text | None = None
    replay: Literal["open", "sessions"] | None = None
    format: Text | None = None
    slice: TraceSlice | None = None
    sort: bool | None = None
    drop_failed: bool | None = None
    input: Length | None = None
    output: Length | None = None
    spearman: Annotated[float, Meta(ge=-1, le=1)] = 0.0
    lengths_from: Text | None = None
    output_limit: Tokens | None = None
    tenants: tuple[TenantSection, ...] = ()
    sessions: SessionsSection | None = None
    client: ClientSection | None = None

    images: ImagesSection | None = None
    prefix_groups: PrefixGroupsSection | None = None
    prediction: PredictionSection | None = None

    @property
    def has_deadlines(self) -> bool:
        """Whether clients give up."""
        waits = (self.client, *self.tenants)
        return any(one is not None and (one.deadline_s is not None or one.first_token_deadline_s is not None)
                   for one in waits)

    @property
    def has_sessions(self) -> bool:
        """Whether later turns come when answers are out."""
        return self.sessions is not None or self.kind in SESSION_KINDS or self.replay == "sessions"

    def generator_arguments(self) -> dict[str, Any]:
        """Arguments of `jaxsim.workload.named.generator`, tenants apart; not for a trace."""
        if self.kind == "trace":
            raise ValueError("a trace is read, not generated")
        numbers = {name: getattr(self, name) for name in ("cv", "rate_ratio", "high_dwell_s", "low_dwell_s")}
        laws = {name: plain(getattr(self, name)) for name in ("input", "output")}
        # Everything at once is any process at an infinite rate.
        kind, rate_rps = {
            **dict.fromkeys(WITHOUT_RATE, ("deterministic", math.inf)), "mmpp": ("mmpp2", self.rate_rps)}.get(
            self.kind, (self.kind, self.rate_rps))
        given = {**numbers, **laws, "output_limit": self.output_limit, "rate_rps": rate_rps}
        for name in ("sessions", "prefix_groups"):
            if getattr(self, name) is not None:
                given[name] = plain(getattr(self, name))
        return {"kind": kind, "spearman": self.spearman, **{k: v for k, v in given.items() if v is not None}}

    def trace_options(self) -> dict[str, Any]:
        """Options of `jaxsim.traces.read_trace`, the seed apart; only for a trace."""
        own = {name: getattr(self, name) for name in ("rate_rps", "num_requests", "sort", "drop_failed")}
        own["sessions"] = self.replay == "sessions" or None
        part = {} if self.slice is None else {n: getattr(self.slice, n) for n in TraceSlice.__struct_fields__}
        return {name: value for name, value in (own | part).items() if value is not None}


def plain(value: Any) -> Any:
    """A section as nested dictionaries; anything else as it is."""
    return msgspec.to_builtins(value) if hasattr(value, "__struct_fields__") else value


class SloSection(_Section, frozen=True):
    """Limits a good request meets, all of those given at once.

        ttft_ms: time to first token.
        tpot_ms: time per output token after the first.
        e2e_ms: arrival to last token.
    """

    ttft_ms: Positive | None = None
    tpot_ms: Positive | None = None
    e2e_ms: Positive | None = None


class FittedForm(_Section, frozen=True):
    """Seconds: a + b x prefill tokens + c x decode context + d x sequences + e x prefill pairs.

        min_sequences: the form holds from this number of sequences on.
        a: seconds.
        b: seconds a prompt token computed.
        c: seconds a KV token that decodes read, the new one included.
        d: seconds a sequence in the batch.
        e: seconds a unit of (history + chunk)^2 - history^2, summed over prompt chunks.
    """

    min_sequences: Annotated[int, Meta(ge=0)] = 0
    a: Coefficient = 0.0
    b: Coefficient = 0.0
    c: Coefficient = 0.0
    d: Coefficient = 0.0
    e: Coefficient = 0.0

    @property
    def row(self) -> tuple[float, ...]:
        """(min_sequences, a, b, c, d, e), as `jaxsim.cost.fitted.fitted` takes them."""
        return (self.min_sequences, self.a, self.b, self.c, self.d, self.e)


Pieces = FittedForm | tuple[FittedForm, ...]


class RooflineCost(_Section, frozen=True, tag_field="kind", tag="roofline"):
    """Operators against the device's peaks.

        overrides: parameters of the roofline by name, instead of their calibrated values.
        host: whose host overheads are taken; those of the preset's engine if left out.
        distinct_experts: how many experts a batch reads: as expected under uniform routing, the tokens' top-k
            with no overlap, or all.
        front_end_s: seconds of a request outside the engine (HTTP server, tokenizer), in TTFT and end to end; those of
            `host` if left out, 0 where clocks are inside the engine.
    """

    overrides: dict[str, float] = {}
    host: Text | None = None
    distinct_experts: Literal["expected", "topk", "all"] = "expected"
    front_end_s: NotNegative | None = None


class ProfiledCost(_Section, frozen=True, tag_field="kind", tag="profiled"):
    """Measured operator times; the roofline prices what was not measured and continues what was.

        path: a profile that `jaxsim import-profile` wrote, of the model, device and tensor-parallel degree that run.
        overrides: parameters of that roofline by name, instead of their calibrated values.
        host: whose host overheads are taken, unless the profile holds its own; those of the preset's engine if left
            out.
        distinct_experts: as for the roofline; also where a profile's expert times are read.
        front_end_s: as for the roofline.
    """

    path: Text
    overrides: dict[str, float] = {}
    host: Text | None = None
    distinct_experts: Literal["expected", "topk", "all"] = "expected"
    front_end_s: NotNegative | None = None


class FittedHead(_Section, frozen=True):
    """Seconds of an iteration that the first of several pipeline stages takes beyond an equal part.

        a: constant.
        c: a token of context that sequences have before the iteration; of prompts, their length.
    """

    a: Coefficient = 0.0
    c: Coefficient = 0.0


class FittedCost(_Section, frozen=True, tag_field="kind", tag="fitted"):
    """Coefficients from the user, by composition of the iteration, piecewise in its number of sequences.

    With pipeline stages they are of the whole way through: every stage has an equal part, but for `head`.

        prefill: iterations of prompt chunks only.
        decode: iterations of decodes only.
        mixed: iterations of both; made from the other two if left out.
        head: the part of these seconds that only the first stage has; none if left out.
        exact: keep what float32 rounds off, to compare long runs with another simulator's to the microsecond.
        front_end_s: seconds of a request outside the engine; 0 if left out.
    """

    prefill: Pieces
    decode: Pieces
    mixed: Pieces | None = None
    head: FittedHead | None = None
    exact: bool = False
    front_end_s: NotNegative | None = None

    def rows(self, kind: str) -> list[tuple[float, ...]] | None:
        """Rows (min_sequences, a, b, c, d, e) of `prefill`, `decode` or `mixed`; None where left out."""
        forms = getattr(self, kind)
        if forms is None:
            return None
        return [f.row for f in (forms if isinstance(forms, tuple) else (forms,))]


def every_section() -> list[type]:
    """The classes above."""
    return _Section.__subclasses__()
