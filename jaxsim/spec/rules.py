"""Rules between the fields of a scenario, and between a scenario and its model and device."""

import functools
import itertools
from typing import TYPE_CHECKING, Any

from jaxsim._core.errors import InputError
from jaxsim.spec.costs import MAX_ITERATION_S, FittedCost, ProfiledCost, RooflineCost
from jaxsim.spec.engine import SORTED_POLICIES, EngineConfig
from jaxsim.spec.messages import describe, hints
from jaxsim.spec.model import ModelSpec
from jaxsim.spec.presets import Scheduler, resolve
from jaxsim.spec.values import plain
from jaxsim.spec.workload import (
    FIELDS_OF_KIND,
    SESSION_KINDS,
    WITHOUT_RATE,
    ContinuingTurns,
    FixedLength,
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


def check(s: "Scenario") -> None:
    """Raises `InputError` for the first rule that a scenario breaks."""
    _check_engine(s)
    _check_system(s)
    _check_pools(s)
    _check_role_switching(s)
    _check_migration(s)
    _check_workload(s)
    _check_clients(s)
    _check_failures(s)
    _check_images(s)
    _check_sizes(s)


def _scheduler(engine: EngineConfig) -> Scheduler:
    # A file may change, a name does not.
    return resolve(engine) if engine.preset.endswith(".toml") else _shipped_scheduler(engine)


@functools.lru_cache(maxsize=1024)
def _shipped_scheduler(engine: EngineConfig) -> Scheduler:
    return resolve(engine)


def _check_engine(s: "Scenario") -> None:
    engine = s.engine
    scheduler = _scheduler(engine)
    if engine.enable_prefix_caching and (scheduler.phase_mix != "unified" or scheduler.reserve != "none"
                                         or not scheduler.kv_accounting):
        raise InputError("engine.enable_prefix_caching", True,
                         f"is simulated as vLLM V1 does it, which {scheduler.preset} is not as set here",
                         "use a preset 'vllm-v1', or leave it out")
    if engine.swap is not None:
        _check_swap(s, scheduler)
    if engine.offload is not None:
        _check_offload(s)
    if engine.context_reuse is not None:
        _check_reuse(s, scheduler)
    _check_order(s, scheduler)
    for ours, theirs in (("dtype", "dtype"), ("kv_dtype", "kv_cache_dtype")):
        given, other = s.model and getattr(s.model, ours), getattr(engine, theirs)
        if {given, other}.isdisjoint((None, "auto")) and given != other:
            raise InputError(f"engine.{theirs}", other, f"differs from model.{ours} = {given!r}",
                             "give one of them")


def _check_swap(s: "Scenario", scheduler: Scheduler) -> None:
    engine, field = s.engine, "engine.swap"
    if (scheduler.phase_mix != "prefill_first" or scheduler.chunked_prefill or scheduler.reserve != "prompt"
            or scheduler.decode_needs_free_block != "always" or scheduler.order != "fcfs" or scheduler.async_scheduling
            or scheduler.admit != "any_time" or not scheduler.kv_accounting
            or not scheduler.waiting_blocked_after_preempt or scheduler.decode_context_limit is not None):
        raise InputError(field, plain(engine.swap), f"is simulated as vLLM V0 does it, which {scheduler.preset} is not"
                         " as set here", "use preset = 'vllm-v0', or leave it out: preempted requests are recomputed")
    if engine.pipeline_parallel_size > 1:
        raise InputError("engine.pipeline_parallel_size", engine.pipeline_parallel_size,
                         "is not simulated with engine.swap", "use 1, or leave engine.swap out")
    if s.cluster.pools:
        raise InputError("cluster.pools", [pool.role for pool in s.cluster.pools], "are not simulated with engine.swap",
                         "use cluster.replicas, or leave engine.swap out")
    if s.model is None:
        raise InputError("model", None, "missing, and the bytes of a KV block cannot be known without it",
                         "name a model, also beside a fitted cost, or leave engine.swap out")
    if s.device is None and engine.swap.pcie_gb_per_s is None:
        raise InputError(f"{field}.pcie_gb_per_s", None, "missing, and without [device] it cannot be derived",
                         "give the bandwidth to host memory")
    if engine.swap.group_blocks is not None and engine.swap.run_blocks is not None:
        raise InputError(f"{field}.run_blocks", engine.swap.run_blocks, "has no effect with group_blocks",
                         "give one of them")
    redraw = engine.swap.redraw
    if redraw is not None and (redraw.pattern == "markov") != (redraw.locality is not None):
        problem = "missing, and 'markov' needs it" if redraw.locality is None else "has no effect with 'random'"
        raise InputError(f"{field}.redraw.locality", redraw.locality, problem,
                         "give a probability" if redraw.locality is None else "leave it out, or use 'markov'")


def _check_offload(s: "Scenario") -> None:
    engine, field = s.engine, "engine.offload"
    for name, given, is_wrong, problem, remedy in (
            ("engine.enable_prefix_caching", False, not engine.enable_prefix_caching,
             f"and {field} is behind a prefix cache", "set it to true, or leave engine.offload out"),
            ("engine.pipeline_parallel_size", engine.pipeline_parallel_size, engine.pipeline_parallel_size > 1,
             f"is not simulated with {field}", "use 1, or leave engine.offload out"),
            ("cluster.pools", [pool.role for pool in s.cluster.pools], bool(s.cluster.pools),
             f"are not simulated with {field}", "use cluster.replicas, or leave engine.offload out"),
            ("model", None, s.model is None, "missing, and the bytes of a KV block cannot be known without it",
             "name a model, also beside a fitted cost, or leave engine.offload out"),
            (f"{field}.gb_per_s", None, s.device is None and engine.offload.gb_per_s is None,
             "missing, and without [device] it cannot be derived", "give the bandwidth from host memory")):
        if is_wrong:
            raise InputError(name, given, problem, remedy)


def _check_reuse(s: "Scenario", scheduler: Scheduler) -> None:
    engine, groups, field = s.engine, s.workload.prefix_groups, "engine.context_reuse"
    given, budget = engine.context_reuse, scheduler.max_num_batched_tokens
    fewest = [row.loss for row in given.quality]
    for name, value, is_wrong, problem, remedy in (
            ("engine.enable_prefix_caching", False, not engine.enable_prefix_caching,
             f"and {field} is behind a prefix cache", "set it to true, or leave engine.context_reuse out"),
            ("engine.offload", engine.offload and plain(engine.offload), engine.offload is not None,
             f"is not simulated with {field}", "leave one of them out"),
            ("engine.pipeline_parallel_size", engine.pipeline_parallel_size, engine.pipeline_parallel_size > 1,
             f"is not simulated with {field}", "use 1, or leave engine.context_reuse out"),
            ("cluster.pools", [pool.role for pool in s.cluster.pools], bool(s.cluster.pools),
             f"are not simulated with {field}", "use cluster.replicas, or leave engine.context_reuse out"),
            ("model", None, s.model is None, "missing, and its layers cannot be known without it",
             "name a model, also beside a fitted cost, or leave engine.context_reuse out"),
            ("workload.prefix_groups", None, groups is None, f"missing, and they are the contexts of {field}",
             "give e.g. { number = 16, tokens = 4096 }, or leave engine.context_reuse out"),
            ("workload.prefix_groups.tokens", groups and groups.tokens, groups is not None and groups.tokens > budget,
             f"are more than the {budget} tokens of an iteration, in which some layers of them are recomputed",
             "raise engine.max_num_batched_tokens, or give fewer"),
            (f"{field}.recomputed_layers", given.recomputed_layers,
             (given.recomputed_layers is None) == (not given.quality), "and a table of quality: exactly one is needed",
             "give recomputed_layers, or quality with max_loss"),
            (f"{field}.max_loss", given.max_loss, (given.max_loss is None) == bool(given.quality),
             "goes with quality, and quality with it", "give both, or recomputed_layers alone"),
            (f"{field}.max_loss", given.max_loss,
             bool(fewest) and given.max_loss is not None and min(fewest) > given.max_loss,
             "is met by no row of quality", "raise it, or measure more layers")):
        if is_wrong:
            raise InputError(name, value, problem, remedy)


def _check_order(s: "Scenario", scheduler: Scheduler) -> None:
    order, w, field = scheduler.order, s.workload, "engine.scheduling_policy"
    for name in ("input_token_weight", "output_token_weight"):
        if getattr(s.engine, name) is not None and order != "vtc":
            raise InputError(f"engine.{name}", getattr(s.engine, name),
                             f"has no effect with scheduling_policy = {order!r}",
                             "leave it out, or use scheduling_policy = 'vtc'")
    if s.engine.input_token_weight == s.engine.output_token_weight == 0:
        raise InputError("engine.output_token_weight", 0.0, "no token would count", "give one of the weights")
    if s.engine.enable_prefix_caching and (order == "vtc" or order in SORTED_POLICIES
                                           and scheduler.victim == "last_admitted"):
        raise InputError(field, order, f"with victim = {scheduler.victim!r} is not simulated with prefix caching",
                         "set engine.enable_prefix_caching = false")
    for name in ("slack_output_ms", "slack_prompt_ms", "slack_window"):
        if getattr(s.engine, name) is not None and order != "least_slack":
            raise InputError(f"engine.{name}", getattr(s.engine, name),
                             f"has no effect with scheduling_policy = {order!r}",
                             "leave it out, or use scheduling_policy = 'least_slack'")
    if order == "least_slack" and s.engine.slack_output_ms is None:
        raise InputError("engine.slack_output_ms", None, "missing, and scheduling_policy = 'least_slack' goes by it",
                         "give the time between tokens that the engine is expected to have")
    if order == "least_slack" and s.workload.images is not None:
        raise InputError(field, order, "is not simulated with images", "use 'fcfs'")
    if order == "least_slack" and s.has_clients:
        raise InputError(field, order, "is not simulated where requests end without an answer", "use 'edf'")
    if order in ("sjf", "least_slack") and w.prediction is None and w.kind != "trace":
        raise InputError("workload.prediction", None, f"missing, and scheduling_policy = {order!r} goes by it",
                         "give e.g. { sigma = 0.0 } for exact predictions of output lengths")
    if order == "vtc" and (w.kind == "closed-loop" or w.has_sessions):
        raise InputError(field, order, "is not simulated yet where answers bring requests about",
                         "use 'fcfs', or an open loop of single requests")
    if order in ("edf", "least_slack") and w.kind == "closed-loop":
        raise InputError(field, order, "goes by arrivals, which are results with kind = 'closed-loop'",
                         "use another policy, or an open loop")
    if order in ("edf", "least_slack") and w.kind != "trace":
        own = [t.deadline_ms or t.ttft_ms for t in w.tenants] or [None]
        if None in own and s.slo.e2e_ms is None and s.slo.ttft_ms is None:
            which = f"workload.tenants[{own.index(None)}].deadline_ms" if w.tenants else "slo.e2e_ms"
            raise InputError(which, None, f"missing, and scheduling_policy = {order!r} goes by deadlines",
                             "give it, or ttft_ms, there or in [slo]")


def _check_system(s: "Scenario") -> None:
    if s.model and (s.model.name is None) == (s.model.config is None):
        raise InputError("model.name", s.model.name, "give exactly one of model.name and model.config",
                         "a name from `jaxsim list models`, or the path of a config.json")
    if s.model and s.model.config is not None and s.model.dimensions is not None:
        raise InputError("model.dimensions", s.model.dimensions, f"comes with model.config = {s.model.config!r}",
                         "give one of them, and a model.name with dimensions")
    if s.model and s.model.dimensions is not None:
        s.model.spec()
    if s.device and s.device.numbers is not None:
        s.device.spec()
    if isinstance(s.cost, RooflineCost | ProfiledCost):
        pools = s.cluster.pools
        for field in ("model", "device"):
            if getattr(s, field) is None and not (field == "device" and pools and all(p.device for p in pools)):
                raise InputError(field, None, f"missing, and a {s.cost.__struct_config__.tag} cost needs it",
                                 f"add a [{field}] section, or give coefficients with cost.kind = 'fitted'")
        for name, value in s.cost.overrides.items():
            if name.endswith("efficiency") and value > 1:
                raise InputError(f"cost.overrides.{name}", value, "is more than all that the device can do",
                                 "give a share above 0 and at most 1, or raise the peak itself")
    else:
        if (s.model is None or s.device is None) and s.engine.num_gpu_blocks_override is None:
            raise InputError("engine.num_gpu_blocks_override", None,
                             "missing, and without [model] and [device] the KV pool cannot be derived",
                             "give the number of KV blocks")
        if s.model is None and s.engine.max_model_len is None:
            raise InputError("engine.max_model_len", None, "missing, and there is no [model] to take it from",
                             "give the limit of prompt + output in tokens")
        for kind in ("prefill", "decode", "mixed"):
            starts = [row[0] for row in s.cost.rows(kind) or [(0,)]]
            if not starts or starts[0] != 0 or not _is_rising(starts):
                raise InputError(f"cost.{kind}", starts, "pieces must start at min_sequences = 0 and rise",
                                 "sort them by min_sequences, the first without it")


def _check_pools(s: "Scenario") -> None:
    cluster = s.cluster
    if not cluster.pools:
        if cluster.transfer is not None:
            raise InputError("cluster.transfer", plain(cluster.transfer), "has no effect without [[cluster.pools]]",
                             "add pools of role 'prefill' and 'decode', or leave it out")
        return
    if cluster.replicas != 1:
        raise InputError("cluster.replicas", cluster.replicas, "given beside [[cluster.pools]]",
                         "give cluster.pools[k].replicas")
    roles = {pool.role for pool in cluster.pools}
    if roles in ({"encode"}, {"encode", "decode"}):
        raise InputError("cluster.pools", sorted(roles), "compute no prompts", "add one of role 'prefill' or 'mixed'")
    for index, pool in enumerate(cluster.pools):
        lacking = {"prefill": "decode", "decode": "prefill"}.get(pool.role)
        if lacking is not None and lacking not in roles:
            cannot = "nobody would compute its prompts" if lacking == "prefill" else "nobody would go on after them"
            raise InputError(f"cluster.pools[{index}].role", pool.role, f"without a pool of role {lacking!r} {cannot}",
                             f"add one of role {lacking!r}, or use 'mixed'")
        try:
            s.of_pool(index)
        except InputError as error:
            section = "device" if error.field.startswith("device") else error.field
            own = {f"engine.{name}" for name in pool.engine} | ({"device"} if pool.device is not None else set())
            if section not in own and (not own or section.startswith("workload.")):
                raise
            # What a pool says, and what does not go together with it.
            where = f"cluster.pools[{index}]" + ("." if section in own else ": ")
            raise InputError(where + section, error.value, error.problem, error.remedy) from None
    if cluster.transfer is not None and not cluster.has_roles:
        raise InputError("cluster.transfer", plain(cluster.transfer), "has no effect where all pools are mixed",
                         "leave it out, or use roles 'prefill' and 'decode'")
    if cluster.transfer is not None and cluster.transfer.hand_over == "push":
        share = cluster.transfer.waiting_block_share
        if share is not None:
            raise InputError("cluster.transfer.waiting_block_share", share, "has no effect with hand_over = 'push'",
                             "leave it out, or use 'pull'")
    if cluster.transfer is not None and cluster.transfer.discipline == "fair" and cluster.encode is not None:
        raise InputError("cluster.transfer.discipline", "fair", "is not simulated where engines encode images",
                         "use 'fifo'")
    if cluster.transfer is not None and cluster.transfer.most_at_once and cluster.transfer.discipline != "fair":
        raise InputError("cluster.transfer.most_at_once", cluster.transfer.most_at_once,
                         "has no effect with discipline = 'fifo'", "leave it out, or use 'fair'")


def _check_role_switching(s: "Scenario") -> None:
    given, cluster = s.cluster.role_switching, s.cluster
    if given is None:
        return
    where, scheduler = "cluster.role_switching", _scheduler(s.engine)
    roles = [pool.role for pool in cluster.pools]
    if not cluster.has_roles:
        raise InputError(where, plain(given), "has no effect without engines of different roles",
                         "add [[cluster.pools]] of role 'prefill' and 'decode', or leave it out")
    if cluster.transfer is not None and cluster.transfer.discipline == "fair":
        raise InputError("cluster.transfer.discipline", "fair", f"is not simulated with [{where}]", "use 'fifo'")
    for index, pool in enumerate(cluster.pools):
        at = f"cluster.pools[{index}]"
        if pool.role == "mixed":
            raise InputError(f"{at}.role", "mixed", f"is not simulated with [{where}]",
                             "use roles 'encode', 'prefill' and 'decode'")
        if roles.index(pool.role) != index:
            raise InputError(f"{at}.role", pool.role, f"is that of another pool, which is not simulated with [{where}]:"
                             " an engine has the settings of its role", "put their replicas together")
        if pool.device is not None:
            raise InputError(f"{at}.device", pool.device, f"is not simulated with [{where}], since engines keep their"
                             " devices", "use one [device] for all")
        degree = pool.engine.get("tensor_parallel_size", s.engine.tensor_parallel_size)
        first = cluster.pools[0].engine.get("tensor_parallel_size", s.engine.tensor_parallel_size)
        if degree != first:
            raise InputError(f"{at}.engine.tensor_parallel_size", degree,
                             f"differs from the first pool's, {first}, and engines keep their devices",
                             "give all the same")
    if max(pool.replicas for pool in cluster.pools) == 1:
        raise InputError("cluster.pools", roles, f"have one engine each, so [{where}] leaves nobody to move",
                         "give one of them more replicas, or leave it out")
    if given.decide_s < given.sample_s:
        raise InputError(f"{where}.decide_s", given.decide_s, f"is below sample_s = {given.sample_s:g}: decisions would"
                         " have nothing to look at", "raise it, or lower sample_s")
    if s.workload.images is not None and "encode" not in roles:
        raise InputError("workload.images", plain(s.workload.images), f"are not simulated with [{where}] and encoders"
                         " beside the model", "add a pool of role 'encode', or leave them out")
    if s.workload.kind == "closed-loop" or s.workload.has_sessions:
        raise InputError("workload.kind", s.workload.kind, f"is not simulated with [{where}] where answers bring"
                         " requests about", "use an open loop")
    if cluster.router in ("llumnix_load", "remaining_steps"):
        raise InputError("cluster.router", cluster.router, f"is not simulated with [{where}]",
                         "use 'least_outstanding'")
    for name, value, is_wrong, remedy in (
            ("preset", scheduler.preset, not scheduler.kv_accounting or scheduler.phase_mix != "unified",
             "use preset 'vllm-v1@0.9', or 'sarathi'"),
            ("async_scheduling", True, scheduler.async_scheduling, "set it to false, or use preset 'vllm-v1@0.9'")):
        if is_wrong:
            raise InputError(f"engine.{name}", value, f"is not simulated with [{where}]", remedy)


def _check_migration(s: "Scenario") -> None:
    cluster, workload, engine = s.cluster, s.workload, s.engine
    moving = next((name for name in ("migration", "scaling") if getattr(cluster, name) is not None), None)
    is_freeness = cluster.migration is not None and cluster.migration.metric == "freeness"
    if cluster.headroom_blocks is not None and cluster.router != "llumnix_load" and not is_freeness:
        raise InputError("cluster.headroom_blocks", cluster.headroom_blocks, "has no effect: nobody asks for freeness",
                         "use router = 'llumnix_load' or migration.metric = 'freeness', or leave it out")
    reads_loads = cluster.router in ("llumnix_load", "remaining_steps")
    if cluster.transfer is not None and cluster.transfer.router in ("llumnix_load", "remaining_steps"):
        raise InputError("cluster.transfer.router", cluster.transfer.router, "is not simulated for decode engines",
                         "use 'least_kv' or 'least_outstanding'")
    if moving is None and not reads_loads:
        return
    where = f"cluster.{moving}" if moving else "cluster.router"
    value = plain(getattr(cluster, moving)) if moving else cluster.router
    scheduler = _scheduler(engine)
    if scheduler.order != "fcfs" and (scheduler.order in ("vtc", "least_slack") or scheduler.victim != "last_admitted"):
        raise InputError("engine.scheduling_policy", scheduler.order,
                         f"is not simulated with {where} where it says who is preempted too",
                         "use 'fcfs', or 'priority' with engine.victim = 'last_admitted'")
    if not scheduler.kv_accounting:
        raise InputError(where, value, f"reads KV memory, of which {scheduler.preset} keeps no account",
                         "use a preset 'vllm-v1'")
    impatient = [t.name for t in workload.tenants if (t.deadline_s, t.first_token_deadline_s) != (None, None)]
    others = (("workload.images", workload.images), ("engine.swap", engine.swap),
              ("workload.client", workload.client if workload.has_deadlines else None),
              ("workload.tenants", impatient or None), ("cluster.admission", cluster.admission),
              ("cluster.failures", cluster.failures))
    for field, given in others:
        if given is not None:
            raise InputError(field, plain(given), f"is not simulated with {where}", "leave one of them out")
    if moving is None:
        return
    if cluster.pools:
        raise InputError(where, value, "is not simulated with [[cluster.pools]]", "use cluster.replicas")
    if cluster.replicas < 2:
        raise InputError("cluster.replicas", cluster.replicas, f"leaves {where} nothing to do",
                         f"use 2 or more, or leave [{where}] out")
    for field, given, is_wrong, remedy in (
            ("data_parallel_size", engine.data_parallel_size, engine.data_parallel_size > 1,
             "use 1, and more replicas for a dense model"),
            ("pipeline_parallel_size", engine.pipeline_parallel_size, engine.pipeline_parallel_size > 1, "use 1"),
            ("enable_prefix_caching", True, engine.enable_prefix_caching, "set it to false"),
            ("async_scheduling", True, scheduler.async_scheduling, "set it to false, or use preset 'vllm-v1@0.9'"),
            ("preset", scheduler.preset, scheduler.phase_mix != "unified" or scheduler.gathers
             or scheduler.reserve not in ("none", "prompt") or scheduler.admit != "any_time",
             "use preset 'vllm-v1@0.9', or 'sarathi'")):
        if is_wrong:
            raise InputError(f"engine.{field}", given, f"is not simulated with [{where}]", remedy)
    if workload.kind == "closed-loop" or workload.has_sessions or workload.replay == "sessions":
        raise InputError("workload.kind", workload.kind, f"is not simulated with [{where}] where answers bring requests"
                         " about", "use an open loop")
    if cluster.scaling is not None:
        fewest = cluster.scaling.min_replicas
        if fewest > cluster.replicas:
            raise InputError("cluster.scaling.min_replicas", fewest,
                             f"is more than cluster.replicas = {cluster.replicas}",
                             "lower it, or raise cluster.replicas")
        if cluster.scaling.out_below > cluster.scaling.in_above:
            raise InputError("cluster.scaling.out_below", cluster.scaling.out_below,
                             f"is above in_above = {cluster.scaling.in_above:g}: engines would come and go",
                             "give a band: out_below under in_above")


def _check_workload(s: "Scenario") -> None:
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


def _check_images(s: "Scenario") -> None:
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
    if _scheduler(s.engine).order == "vtc":
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
    groups, size = s.workload.prefix_groups, _scheduler(s.engine).block_size
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
    if (order := _scheduler(s.engine).order) in SORTED_POLICIES:
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
    limit, first = given.context_limit, _shortest(w.input)
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


def _check_clients(s: "Scenario") -> None:
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
    scheduler = _scheduler(s.engine)
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
            ("cluster.pools", [pool.role for pool in s.cluster.pools], s.cluster.has_roles, "use roles 'mixed'")):
        if is_wrong:
            raise InputError(name, value, f"is not simulated with {what} ({field})", remedy)


MAX_OUTAGES = 4096
"""Of all engines of a run, about."""


def _check_failures(s: "Scenario") -> None:
    given, cluster, field = s.cluster.failures, s.cluster, "cluster.failures"
    if given is None:
        return
    drawn = {name: getattr(given, name) for name in ("mtbf_s", "mttr_s", "until_s")}
    if not given.outages and not any(drawn.values()):
        raise InputError(field, plain(given), "lets no engine fail",
                         "give outages, or mtbf_s, mttr_s and until_s, or leave it out")
    for name, value in drawn.items():
        if value is None and any(drawn.values()):
            raise InputError(f"{field}.{name}", None, "missing, and outages are drawn by mtbf_s, mttr_s and until_s",
                             "give all three of them, or none")
    if given.max_restarts is not None and given.on_failure == "fail":
        raise InputError(f"{field}.max_restarts", given.max_restarts, "has no effect with on_failure = 'fail'",
                         "leave it out, or use 'reroute'")
    scheduler = _scheduler(s.engine)
    for name, value, is_wrong, remedy in (
            ("cluster.pools", [pool.role for pool in cluster.pools], bool(cluster.pools), "use cluster.replicas"),
            ("engine.data_parallel_size", s.engine.data_parallel_size, s.engine.data_parallel_size > 1,
             "use 1, and more replicas for a dense model"),
            ("engine.preset", scheduler.preset, scheduler.reserve not in ("none", "prompt")
             or not scheduler.kv_accounting or scheduler.victim != "last_admitted", "use a preset 'vllm-v1', or"
             " 'sarathi'")):
        if is_wrong:
            raise InputError(name, value, f"is not simulated with engines that fail ({field})", remedy)
    if given.mtbf_s is not None:
        number = cluster.replicas * (given.until_s / (given.mtbf_s + given.mttr_s) + 1)
        if number > MAX_OUTAGES:
            raise InputError(f"{field}.mtbf_s", given.mtbf_s, f"makes some {number:.0f} outages, more than the"
                             f" {MAX_OUTAGES} simulated", "raise it, or lower until_s or cluster.replicas")
    spans: dict[int, list[tuple[float, float]]] = {}
    for index, one in enumerate(given.outages):
        if one.instance >= cluster.replicas:
            raise InputError(f"{field}.outages[{index}].instance", one.instance,
                             f"is not one of cluster.replicas = {cluster.replicas}", "count from 0")
        for start_s, end_s in spans.get(one.instance, ()):
            if one.at_s < end_s and start_s < one.at_s + one.down_s:
                raise InputError(f"{field}.outages[{index}].at_s", one.at_s,
                                 f"is in another outage of instance {one.instance}, from {start_s:g} to {end_s:g} s",
                                 "make one of them")
        spans.setdefault(one.instance, []).append((one.at_s, one.at_s + one.down_s))


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
    if levels[0] != 0 or levels[-1] != 1 or not _is_rising(levels):
        raise InputError(f"{field}.levels", levels, "do not rise from 0 to 1",
                         "sort them, 0 and 1 included")
    if len(values) != len(levels) or list(values) != sorted(values):
        what = "lengths" if name == "tokens" else "times"
        raise InputError(f"{field}.{name}", values, f"are not {len(levels)} rising {what}",
                         "give one quantile a level")


def _is_rising(numbers: Any) -> bool:
    return all(a < b for a, b in itertools.pairwise(numbers))


def _longest(law: Any) -> int | None:
    """The largest length a law can give; None where it is not known here."""
    if isinstance(law, int):
        return law
    if isinstance(law, QuantilesLength):
        return law.tokens[-1]
    return law.tokens if isinstance(law, FixedLength) else getattr(law, "max_tokens", None)


def _shortest(law: Any) -> int | None:
    """The smallest length a law can give; None where it is not known here."""
    if law is None or isinstance(law, int):
        return law
    if isinstance(law, QuantilesLength):
        return law.tokens[0]
    return law.tokens if isinstance(law, FixedLength) else law.min_tokens


def _check_sizes(s: "Scenario") -> None:
    """What can already be said about the longest request; the engine checks the lengths actually drawn."""
    w, engine = s.workload, s.engine
    scheduler = _scheduler(engine)
    model = _known_model(s)
    prompt, output = _longest(w.input), _longest(w.output)
    if prompt is not None and w.prefix_groups is not None:
        prompt += w.prefix_groups.tokens
    if isinstance(s.cost, FittedCost):
        limit = engine.max_model_len or (model.max_position if model else None)
        most = prompt and prompt + (output or limit or 0)
        if w.has_sessions:
            most = w.sessions and w.sessions.context_limit
        longest = min((n for n in (limit, most) if n), default=None)
        if longest is not None:
            _check_coefficients(s, scheduler, longest)
    if prompt is None:
        return
    total = prompt + (output or 1)
    text = f"prompt {prompt} + output {output}" if output else f"prompt {prompt}"
    if model is not None and total > model.max_position:
        raise InputError("workload.input", prompt,
                         f"the longest request needs {total} tokens ({text}), beyond the {model.max_position} positions"
                         f" of {model.name}", "shorten workload.input or workload.output, or use a model with more")
    if engine.max_model_len is not None and total > engine.max_model_len:
        raise InputError("engine.max_model_len", engine.max_model_len,
                         f"the longest request needs {total} tokens ({text})",
                         f"raise it to {total}, or shorten workload.input or workload.output")
    if not scheduler.chunked_prefill and engine.max_num_batched_tokens is not None:
        if prompt > engine.max_num_batched_tokens:
            raise InputError("engine.max_num_batched_tokens", engine.max_num_batched_tokens,
                             f"a prompt of {prompt} tokens never fits one iteration without chunked prefill",
                             f"raise it to {prompt}, or set engine.enable_chunked_prefill = true")
    blocks = engine.num_gpu_blocks_override
    if blocks is not None and scheduler.kv_accounting:
        needed = -(-(total - 1) // scheduler.block_size)
        if needed > blocks:
            raise InputError("engine.num_gpu_blocks_override", blocks,
                             f"the longest request ({text}) needs {needed} blocks of"
                             f" {scheduler.block_size} tokens",
                             f"give at least {needed} blocks, or shorten the requests")


def _known_model(s: "Scenario") -> ModelSpec | None:
    """The model, where it can be had: what is wrong with it is told when the system is put together."""
    try:
        return s.model.spec() if s.model else None
    except InputError:
        return None


def _check_coefficients(s: "Scenario", scheduler: Scheduler, longest: int) -> None:
    """Refuse coefficients by which the largest batch of the longest requests would never end."""
    sequences = min(scheduler.max_num_seqs, s.num_requests or scheduler.max_num_seqs)
    context = sequences * longest
    tokens = min(scheduler.max_num_batched_tokens, context)
    pairs = min(2 * longest * tokens, sequences * longest**2)
    counts = {"prefill": (1, tokens, 0, sequences, pairs), "decode": (1, 0, context, sequences, 0),
              "mixed": (1, tokens, context, sequences, pairs)}
    for kind, most in counts.items():
        for start, *row in s.cost.rows(kind) or []:
            terms = [number * count for number, count in zip(row, most, strict=True)]
            if start <= sequences and sum(terms) > MAX_ITERATION_S:
                at = terms.index(max(terms))
                raise InputError(f"cost.{kind}.{'abcde'[at]}", row[at],
                                 f"an iteration of {sequences} sequences of up to {longest} tokens could take"
                                 f" {sum(terms):.3g} s, more than the {MAX_ITERATION_S} s that are simulated",
                                 "lower it (coefficients are in seconds), engine.max_num_seqs or"
                                 " engine.max_model_len")
