"""Rules of [workload]: lengths, images, prefixes, sessions, clients."""

import itertools
from typing import TYPE_CHECKING, Any

from jaxsim._core.errors import InputError
from jaxsim.spec.costs import FittedCost
from jaxsim.spec.engine import SORTED_POLICIES
from jaxsim.spec.messages import describe, hints
from jaxsim.spec.rules.schedulers import scheduler_of
from jaxsim.spec.rules.sizes import shortest
from jaxsim.spec.values import plain
from jaxsim.spec.workload import (
    FIELDS_OF_KIND,
    SESSION_KINDS,
    WITHOUT_RATE,
    ContinuingTurns,
    LogNormalLength,
    QuantilesLength,
    QuantilesTime,
    SessionsSection,
    WorkloadSection,
)

if TYPE_CHECKING:
    from jaxsim.spec.scenario import Scenario

MAX_BACKOFF_S = 1e6
"""The longest wait before a request is sent again."""


def check_workload(s: "Scenario") -> None:
    """Arrivals, lengths, and what goes with a kind of them. Raises `InputError`."""
    w = s.workload
    for field, kinds in FIELDS_OF_KIND.items():
        value = getattr(w, field)
        if value is not None and w.kind not in kinds:
            raise InputError(f"workload.{field}", plain(value), f"has no effect with kind = {w.kind!r}",
                             "leave it out, or use kind = " + " or ".join(map(repr, kinds)))
    needed = {"gamma": ("cv",), "weibull": ("cv",), "mmpp": ("rate_ratio", "high_dwell_s", "low_dwell_s"),
              "trace": ("trace",), "closed-loop": ("concurrency",)}.get(w.kind, ())
    if w.kind not in ("trace", *WITHOUT_RATE, "azure-conv-2023"):
        needed = ("rate_rps", *needed)
    for field in needed:
        if getattr(w, field) is None:
            raise InputError(f"workload.{field}", None, f"missing, and kind = {w.kind!r} needs it",
                             f"give {describe(hints(WorkloadSection)[field])}")
    if w.kind in WITHOUT_RATE and w.rate_rps is not None:
        why = "all arrive at once" if w.kind == "batch" else "answers bring requests about"
        raise InputError("workload.rate_rps", w.rate_rps, f"has no effect where {why}",
                         "leave it out, or use kind = 'poisson'")
    if w.lengths_from is not None:
        for field in ("input", "output", "spearman"):
            if getattr(w, field):
                raise InputError(f"workload.{field}", plain(getattr(w, field)),
                                 "given together with lengths_from",
                                 "give laws, or a trace to draw the lengths from")
    if w.spearman and w.kind == "trace":
        raise InputError("workload.spearman", w.spearman, "has no effect with kind = 'trace'", "leave it out")
    for field in ("input", "output"):
        _check_length(f"workload.{field}", getattr(w, field))
    if w.has_sessions:
        _check_sessions(s)
    if w.prefix_groups is not None:
        _check_prefix_groups(s)
    names = [t.name for t in w.tenants]
    if len(set(names)) < len(names):
        raise InputError("workload.tenants", names, "two have the same name", "give each its own")
    if w.slice and w.slice.end_s is not None and w.slice.end_s <= w.slice.start_s:
        raise InputError("workload.slice.end_s", w.slice.end_s, f"not after start_s = {w.slice.start_s}",
                         "give a later end")
    span_s = _arrival_span_s(s)
    if s.warmup_s + s.cooldown_s > 0 and span_s is not None and s.warmup_s + s.cooldown_s >= span_s:
        field = "warmup_s" if s.warmup_s >= span_s or not s.cooldown_s else "cooldown_s"
        beside = f" beside warmup_s = {s.warmup_s:g}" if field == "cooldown_s" and s.warmup_s else ""
        raise InputError(field, getattr(s, field),
                         f"leaves no request to measure{beside}: they arrive within about {span_s:.4g} s",
                         "lower it, or raise workload.num_requests")


def check_images(s: "Scenario") -> None:
    """Requests with images. Raises `InputError`."""
    w, encode = s.workload, s.cluster.encode
    encoders = [i for i, pool in enumerate(s.cluster.pools) if pool.role == "encode"]
    if w.images is None:
        if encode is not None:
            raise InputError("cluster.encode", plain(encode), "has no effect without images",
                             "give [workload.images], or leave it out")
        if encoders:
            raise InputError(f"cluster.pools[{encoders[0]}].role", "encode", "has nothing to do without images",
                             "give [workload.images], or leave the pool out")
        return
    if encode is None:
        raise InputError("cluster.encode", None, "missing, and images have to be encoded",
                         "give base_ms and tile_ms, and a pool of role 'encode' if others are to do it")
    if w.kind in ("trace", "closed-loop") or w.has_sessions:
        raise InputError("workload.images", plain(w.images), f"are not simulated with kind = {w.kind!r}"
                         + (" and sessions" if w.has_sessions else ""), "use single requests, e.g. kind = 'poisson'")
    least, most = w.images.range
    if least > most:
        raise InputError("workload.images.number.least", least, f"above most = {most}", "swap them")
    if s.engine.enable_prefix_caching:
        raise InputError("engine.enable_prefix_caching", True, "is not simulated with images", "leave it out")
    if s.engine.swap is not None:
        raise InputError("engine.swap", plain(s.engine.swap), "is not simulated with images", "leave it out")
    if scheduler_of(s.engine).order == "vtc":
        raise InputError("engine.scheduling_policy", "vtc", "is not simulated with images", "use 'fcfs'")
    if isinstance(s.cost, FittedCost) and s.cost.exact and not encoders:
        raise InputError("cost.exact", True, "is not there for iterations that encode images", "leave it out")
    tiles = most * w.images.tiles_per_image
    if encoders and tiles > encode.cache_tiles:
        raise InputError("cluster.encode.cache_tiles", encode.cache_tiles,
                         f"is fewer than the {tiles} tiles of a request", f"raise it to {tiles}, or send fewer images")
    if encoders and s.model is None and encode.embedding_width is None:
        raise InputError("cluster.encode.embedding_width", None, "missing, and without [model] it is not known",
                         "give the width of an embedding")


def _check_prefix_groups(s: "Scenario") -> None:
    groups, size = s.workload.prefix_groups, scheduler_of(s.engine).block_size
    if s.workload.sessions is not None:
        raise InputError("workload.prefix_groups", plain(groups), "given together with workload.sessions",
                         "leave one of them out; workload.sessions.shared_tokens is what all sessions share")
    if s.engine.enable_prefix_caching and groups.tokens % size:
        low = groups.tokens // size * size
        raise InputError("workload.prefix_groups.tokens", groups.tokens,
                         f"are not whole KV blocks of {size} tokens, and only those are shared",
                         f"give {low or size} or {low + size}")
    if groups.distribution == "uniform" and groups.exponent != 1.0:
        raise InputError("workload.prefix_groups.exponent", groups.exponent, "has no effect with 'uniform'",
                         "leave it out, or use distribution = 'zipf'")


def _check_sessions(s: "Scenario") -> None:
    w, given, field = s.workload, s.workload.sessions or SessionsSection(), "workload.sessions"
    if (order := scheduler_of(s.engine).order) in SORTED_POLICIES:
        raise InputError("engine.scheduling_policy", order,
                         "ranks requests by when they arrive, which is not known of sessions before the run",
                         "use 'fcfs', or single requests")
    if w.kind == "trace":
        if w.rate_rps is not None:
            raise InputError("workload.rate_rps", w.rate_rps,
                             "cannot be had with replay = 'sessions': later turns come when answers are out",
                             "leave it out, or use replay = 'open'")
        return
    for name in () if w.kind in SESSION_KINDS else ("turns", "think_s", "context_limit"):
        if getattr(given, name) is None:
            raise InputError(f"{field}.{name}", None, f"missing, and sessions with kind = {w.kind!r} need it",
                             f"give {describe(hints(SessionsSection)[name])}, or use kind = "
                             + " or ".join(map(repr, SESSION_KINDS)))
    _check_length(f"{field}.new_tokens", given.new_tokens)
    if given.new_tokens is not None and w.lengths_from is not None:
        raise InputError(f"{field}.new_tokens", plain(given.new_tokens), "given together with workload.lengths_from",
                         "leave one of them out")
    turns, think = given.turns, given.think_s
    if isinstance(turns, ContinuingTurns) and turns.shares[-1] == 1 and turns.max_turns is None:
        raise InputError(f"{field}.turns.shares", turns.shares, "never end",
                         "give a last share below 1, or max_turns")
    if isinstance(think, QuantilesTime):
        _check_quantiles(f"{field}.think_s", think.levels, "seconds", think.seconds)
    limit, first = given.context_limit, shortest(w.input)
    if limit is None:
        return
    shared, known = given.shared_tokens or 0, "" if first is None else f" and input of at least {first}"
    if shared + (first or 1) + 1 > limit:
        raise InputError(f"{field}.context_limit", limit,
                         f"is below the first prompt and its answer: shared_tokens = {shared}{known}",
                         f"raise it to {shared + (first or 1) + 1} or more")
    longest = s.engine.max_model_len
    if longest is not None and limit > longest:
        raise InputError(f"{field}.context_limit", limit, f"is beyond engine.max_model_len = {longest}",
                         f"lower it to {longest}, or raise engine.max_model_len")


def check_clients(s: "Scenario") -> None:
    """Clients that give up, and requests that are refused. Raises `InputError`."""
    client, admission, w = s.workload.client, s.cluster.admission, s.workload
    if admission is not None and admission.max_waiting is None and admission.max_outstanding is None:
        raise InputError("cluster.admission", plain(admission), "refuses nothing",
                         "give max_waiting or max_outstanding, or leave it out")
    if client is not None:
        if client.retries and not s.has_clients:
            raise InputError("workload.client.retries", client.retries, "has no effect where every request is answered",
                             "give client.deadline_s or client.first_token_deadline_s, [cluster.admission] or"
                             " [cluster.failures]")
        for name, default in (("backoff_s", 0.0), ("backoff_factor", 1.0)):
            if getattr(client, name) != default and not client.retries:
                raise InputError(f"workload.client.{name}", getattr(client, name), "has no effect without retries",
                                 "give client.retries, or leave it out")
        longest = client.backoff_s * client.backoff_factor ** max(client.retries - 1, 0)
        if longest > MAX_BACKOFF_S:
            raise InputError("workload.client.backoff_factor", client.backoff_factor,
                             f"makes the last wait {longest:.3g} s, more than the {MAX_BACKOFF_S:.0e} s simulated",
                             "lower it, retries or backoff_s")
    if not s.has_clients:
        return
    field, what = (("workload.client", "clients that give up") if w.has_deadlines else
                   ("cluster.admission", "refused requests") if s.cluster.admission is not None else
                   ("cluster.failures", "engines that fail"))
    scheduler = scheduler_of(s.engine)
    for name, value, is_wrong, remedy in (
            ("workload.kind", w.kind, w.kind == "closed-loop", "use an open loop, as kind = 'poisson'"),
            ("workload.sessions", plain(w.sessions), w.has_sessions, "use single requests"),
            ("engine.scheduling_policy", scheduler.order, scheduler.order != "fcfs", "use 'fcfs'"),
            ("engine.enable_prefix_caching", True, s.engine.enable_prefix_caching, "leave it out"),
            ("workload.images", w.images and plain(w.images), w.images is not None, "leave them out"),
            ("engine.pipeline_parallel_size", scheduler.num_stages, scheduler.num_stages > 1, "use 1"),
            ("engine.preset", scheduler.preset, scheduler.phase_mix != "unified" or scheduler.gathers
             or scheduler.reserve == "expected" or scheduler.decode_context_limit is not None,
             "use a preset 'vllm-v1', 'sarathi' or 'orca'"),
            ("cluster.pools", [pool.role for pool in s.cluster.pools], s.cluster.has_roles
             and (w.has_deadlines or s.cluster.admission is not None),
             # Pools that are all mixed are not simulated with engines that fail.
             "use roles 'mixed'" if s.cluster.failures is None else "use cluster.replicas")):
        if is_wrong:
            raise InputError(name, value, f"is not simulated with {what} ({field})", remedy)


def _arrival_span_s(s: "Scenario") -> float | None:
    """Seconds over which requests arrive, on average; None where only the trace or the generator knows."""
    w = s.workload
    if w.has_sessions:
        return None
    if w.kind == "batch":
        return 0.0
    if w.rate_rps is not None:
        return s.num_requests / w.rate_rps if s.num_requests is not None else None
    return w.slice.end_s - w.slice.start_s if w.slice and w.slice.end_s is not None else None


def _check_length(field: str, law: Any) -> None:
    low, high = getattr(law, "min_tokens", None), getattr(law, "max_tokens", None)
    if low is not None and high is not None and low > high:
        raise InputError(f"{field}.min_tokens", low, f"above max_tokens = {high}", "swap them")
    if isinstance(law, LogNormalLength) and (law.mu is None) == (law.mean_tokens is None):
        raise InputError(f"{field}.mean_tokens", law.mean_tokens, f"comes with mu = {law.mu}",
                         "give exactly one of mean_tokens and mu")
    if isinstance(law, QuantilesLength):
        _check_quantiles(field, law.levels, "tokens", law.tokens)


def _check_quantiles(field: str, levels: Any, name: str, values: Any) -> None:
    if levels[0] != 0 or levels[-1] != 1 or not is_rising(levels):
        raise InputError(f"{field}.levels", levels, "do not rise from 0 to 1",
                         "sort them, 0 and 1 included")
    if len(values) != len(levels) or list(values) != sorted(values):
        what = "lengths" if name == "tokens" else "times"
        raise InputError(f"{field}.{name}", values, f"are not {len(levels)} rising {what}",
                         "give one quantile a level")


def is_rising(numbers: Any) -> bool:
    """Whether each number is above the one before."""
    return all(a < b for a, b in itertools.pairwise(numbers))
