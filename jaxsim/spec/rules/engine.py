"""Rules of [engine]: order, swapping, offload, reuse, and what goes with a model and a device."""

from typing import TYPE_CHECKING, Any

from jaxsim._core.errors import InputError
from jaxsim.spec.costs import ProfiledCost, RooflineCost
from jaxsim.spec.engine import SORTED_POLICIES
from jaxsim.spec.presets import Scheduler
from jaxsim.spec.rules.schedulers import scheduler_of
from jaxsim.spec.rules.workload import is_rising
from jaxsim.spec.values import plain

if TYPE_CHECKING:
    from jaxsim.spec.scenario import Scenario


def check_engine(s: "Scenario") -> None:
    """What an engine keeps, and in which order it serves. Raises `InputError`."""
    engine = s.engine
    scheduler = scheduler_of(engine)
    if engine.enable_prefix_caching and (scheduler.phase_mix != "unified" or scheduler.reserve != "none"
                                         or not scheduler.kv_accounting):
        raise InputError("engine.enable_prefix_caching", True,
                         f"is simulated as vLLM V1 does it, which {scheduler.preset} is not as set here",
                         "use a preset 'vllm-v1', or leave it out")
    if engine.swap is not None:
        _check_swap(s, scheduler)
    if engine.offload is not None:
        _check_offload(s)
    if s.cluster.remote_store is not None:
        _check_remote_store(s)
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


Row = tuple[str, Any, bool, str, str]
"""Field, value, whether the rule is broken, problem, remedy."""


def _behind_a_cache(s: "Scenario", field: str, why_model: str) -> tuple[Row, ...]:
    """What all have in common that give blocks to requests which the prefix cache has not."""
    engine, out = s.engine, f"leave {field} out"
    return (
        ("engine.enable_prefix_caching", False, not engine.enable_prefix_caching,
         f"leaves {field} without the prefix cache that it stands behind", f"set it to true, or {out}"),
        ("engine.pipeline_parallel_size", engine.pipeline_parallel_size, engine.pipeline_parallel_size > 1,
         f"is not simulated with {field}", f"use 1, or {out}"),
        ("cluster.pools", [pool.role for pool in s.cluster.pools], bool(s.cluster.pools),
         f"are not simulated with {field}", f"use cluster.replicas, or {out}"),
        ("model", None, s.model is None, f"missing, and {why_model} cannot be known without it",
         f"name a model, also beside a fitted cost, or {out}"))


def _check_offload(s: "Scenario") -> None:
    engine, field = s.engine, "engine.offload"
    for name, given, is_wrong, problem, remedy in (
            *_behind_a_cache(s, field, "the bytes of a KV block"),
            (f"{field}.gb_per_s", None, s.device is None and engine.offload.gb_per_s is None,
             "missing, and without [device] it cannot be derived", "give the bandwidth from host memory")):
        if is_wrong:
            raise InputError(name, given, problem, remedy)


def _check_remote_store(s: "Scenario") -> None:
    given, offload, reuse = s.cluster.remote_store, s.engine.offload, s.engine.context_reuse
    field = "cluster.remote_store"
    for name, value, is_wrong, problem, remedy in (
            *_behind_a_cache(s, field, "the bytes of a KV block"),
            ("engine.context_reuse", reuse and plain(reuse), reuse is not None, f"is not simulated with {field}",
             "leave one of them out"),
            (f"{field}.load", given.load,
             given.load is not None and offload is not None and given.load != offload.load,
             f"differs from engine.offload.load = {offload and offload.load!r}, and one connector loads from both",
             "leave it out, or give both the same")):
        if is_wrong:
            raise InputError(name, value, problem, remedy)


def _check_reuse(s: "Scenario", scheduler: Scheduler) -> None:
    engine, groups, field = s.engine, s.workload.prefix_groups, "engine.context_reuse"
    given = engine.context_reuse
    fewest = [row.loss for row in given.quality]
    for name, value, is_wrong, problem, remedy in (
            *_behind_a_cache(s, field, "its layers"),
            ("engine.offload", engine.offload and plain(engine.offload), engine.offload is not None,
             f"is not simulated with {field}", "leave one of them out"),
            ("workload.prefix_groups", None, groups is None and s.cluster.variants is None,
             f"missing, and they are the contexts of {field}",
             "give e.g. { number = 16, tokens = 4096 }, cluster.variants and sessions that share contexts, or leave"
             " engine.context_reuse out"),
            ("workload.kind", s.workload.kind, groups is None and not s.workload.has_sessions
             and s.workload.kind != "trace",
             f"brings no prompts that begin alike, and they are the contexts of {field}",
             "give workload.sessions or workload.prefix_groups, or leave engine.context_reuse out"),
            ("cluster.replicas", 1, s.cluster.variants is not None and s.cluster.replicas == 1,
             f"has nobody to take a context from, as {field} does with cluster.variants",
             "use 2 or more, or leave cluster.variants out: siblings have then computed all contexts before the run"),
            ("engine.scheduling_policy", scheduler.order, s.cluster.variants is not None and scheduler.order != "fcfs",
             f"is not simulated with {field} and cluster.variants", "use 'fcfs'"),
            (f"{field}.recomputed_layers", given.recomputed_layers,
             (given.recomputed_layers is None) == (not given.quality),
             "stands against a table of quality: exactly one of them is needed",
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
        raise InputError(field, order, "is not simulated where requests end without an answer", "use 'fcfs'")
    if order in ("sjf", "least_slack") and w.prediction is None and w.kind != "trace":
        raise InputError("workload.prediction", None, f"missing, and scheduling_policy = {order!r} goes by it",
                         "give e.g. { sigma = 0.0 } for exact predictions of output lengths")
    if order == "vtc" and (w.kind == "closed-loop" or w.has_sessions):
        raise InputError(field, order, "is not simulated yet where answers bring requests about",
                         "use 'fcfs', or an open loop of single requests")
    if order in ("edf", "least_slack") and w.kind == "closed-loop":
        raise InputError(field, order, "goes by arrivals, which are results with kind = 'closed-loop'",
                         "use another policy, or an open loop")
    if order in ("edf", "least_slack") and w.kind != "trace" and s.engine.deadline_work_factor is None:
        own = [t.deadline_ms or t.ttft_ms for t in w.tenants] or [None]
        if None in own and s.slo.e2e_ms is None and s.slo.ttft_ms is None:
            which = f"workload.tenants[{own.index(None)}].deadline_ms" if w.tenants else "slo.e2e_ms"
            raise InputError(which, None, f"missing, and scheduling_policy = {order!r} goes by deadlines",
                             "give it, or ttft_ms, there or in [slo]")


def _check_clock(s: "Scenario") -> None:
    clock = s.device.spec().clock
    if clock == 1.0:
        return
    # What is measured, or given as seconds, is of the clock that it was measured at.
    for cost in (s.cost, *(pool.cost for pool in s.cluster.pools if pool.cost is not None)):
        if not isinstance(cost, RooflineCost):
            kind = cost.__struct_config__.tag
            raise InputError("device.clock", clock, f"scales peaks of arithmetic, which a {kind} cost is not made of",
                             "use cost.kind = 'roofline', or leave it out")
    for index, pool in enumerate(s.cluster.pools):
        if pool.device is not None:
            raise InputError("device.clock", clock, f"is not that of cluster.pools[{index}].device = {pool.device!r},"
                             " which runs at its highest", "leave the devices of pools out, or the clock")


def check_system(s: "Scenario") -> None:
    """What needs a model, a device or coefficients. Raises `InputError`."""
    if s.model and (s.model.name is None) == (s.model.config is None):
        raise InputError("model.name", s.model.name, "give exactly one of model.name and model.config",
                         "a name from `jaxsim list models`, or the path of a config.json")
    if s.model and s.model.config is not None and s.model.dimensions is not None:
        raise InputError("model.dimensions", s.model.dimensions, f"comes with model.config = {s.model.config!r}",
                         "give one of them, and a model.name with dimensions")
    if s.model and s.model.dimensions is not None:
        s.model.spec()
    if s.device and (s.device.clock is not None or s.device.numbers is not None):
        _check_clock(s)
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
            if not starts or starts[0] != 0 or not is_rising(starts):
                raise InputError(f"cost.{kind}", starts, "pieces must start at min_sequences = 0 and rise",
                                 "sort them by min_sequences, the first without it")
