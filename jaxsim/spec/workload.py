"""The section of a workload: arrivals, lengths, sessions, tenants, clients."""

import math
from typing import Annotated, Any, Literal

from msgspec import Meta

from jaxsim.spec.engine import Share, Text
from jaxsim.spec.values import Images, Level, NotNegative, Patience, Positive, Section, Tokens, Turns, Wait, plain

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


class FixedLength(Section, frozen=True, tag_field="kind", tag="fixed"):
    """The same for every request.

        tokens: the length.
    """

    tokens: Tokens


class UniformLength(Section, frozen=True, tag_field="kind", tag="uniform"):
    """Whole numbers, all equally likely.

        min_tokens: smallest length.
        max_tokens: largest length.
    """

    min_tokens: Tokens
    max_tokens: Tokens


class LogNormalLength(Section, frozen=True, tag_field="kind", tag="log-normal"):
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


class QuantilesLength(Section, frozen=True, tag_field="kind", tag="quantiles"):
    """Any measured distribution as a table of its quantiles, linear in between.

        levels: rising from 0 to 1.
        tokens: the quantiles at those levels.
    """

    levels: Annotated[tuple[Level, ...], Meta(min_length=2)]
    tokens: Annotated[tuple[Tokens, ...], Meta(min_length=2)]


Length = Tokens | FixedLength | UniformLength | LogNormalLength | QuantilesLength


class GeometricTurns(Section, frozen=True, tag_field="kind", tag="geometric"):
    """At least one turn, and after each another one with the same probability.

        mean_turns: mean number, before max_turns.
        max_turns: what lies beyond piles up there.
    """

    mean_turns: Annotated[float, Meta(ge=1, le=1 << 16)]
    max_turns: Turns | None = None


class ContinuingTurns(Section, frozen=True, tag_field="kind", tag="continuing"):
    """Any distribution, by the share of sessions that go on after each turn.

        shares: after the first turn, the second and so on; the last holds from there on.
        max_turns: what lies beyond piles up there.
    """

    shares: Annotated[tuple[Level, ...], Meta(min_length=1)]
    max_turns: Turns | None = None


class ExponentialTime(Section, frozen=True, tag_field="kind", tag="exponential"):
    """Exponential.

        mean_s: mean.
    """

    mean_s: Wait


class LogNormalTime(Section, frozen=True, tag_field="kind", tag="log-normal"):
    """Log-normal; what lies beyond the limit piles up there.

        median_s: median.
        sigma: standard deviation of the logarithm.
        max_s: the longest.
    """

    median_s: Wait
    sigma: NotNegative
    max_s: Wait | None = None


class QuantilesTime(Section, frozen=True, tag_field="kind", tag="quantiles"):
    """Any measured distribution as a table of its quantiles, linear in between.

        levels: rising from 0 to 1.
        seconds: the quantiles at those levels.
    """

    levels: Annotated[tuple[Level, ...], Meta(min_length=2)]
    seconds: Annotated[tuple[Wait, ...], Meta(min_length=2)]


class SessionsSection(Section, frozen=True):
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


class UniformCount(Section, frozen=True, tag_field="kind", tag="uniform"):
    """Every whole number of a range is as likely.

        least: smallest.
        most: largest.
    """

    least: Images
    most: Images


class ImagesSection(Section, frozen=True):
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


class PrefixGroupsSection(Section, frozen=True):
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


class TenantSection(Section, frozen=True):
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
            and "least_slack" a request is due at its arrival and the first given of deadline_ms, ttft_ms, slo.e2e_ms,
            slo.ttft_ms. With several partly computed prompts ("edf", "lrs", "lars") it is the first given of ttft_ms,
            slo.ttft_ms, deadline_ms, slo.e2e_ms, and what engine.deadline_work_factor adds.
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


class ClientSection(Section, frozen=True):
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


class PredictionSection(Section, frozen=True):
    """Output lengths as a scheduler is told them: the true ones with a log-normal error.

        sigma: standard deviation of the logarithm of the error; 0 is exact. The median of predictions is the truth.
    """

    sigma: Annotated[float, Meta(ge=0, le=10)] = 0.0


class TraceSlice(Section, frozen=True):
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


class WorkloadSection(Section, frozen=True):
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
        prediction: of output lengths, which engine.scheduling_policy = "sjf" and "least_slack" go by; instead of those
            that a trace may have.
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
