"""Rules of adaptive chunks, of KV-cache parallelism, and of how many devices there are."""

from typing import TYPE_CHECKING

from jaxsim._core.errors import InputError
from jaxsim.spec.costs import FittedCost, ProfiledCost
from jaxsim.spec.presets import Scheduler
from jaxsim.spec.rules.schedulers import scheduler_of

if TYPE_CHECKING:
    from jaxsim.spec.scenario import Scenario

MOST_CHUNK_TOKENS = (1 << 20) - 1
"""What the search for a chunk reaches (`jaxsim.engine.chunks`)."""


MOST_TOKENS = 1 << 30
"""That all groups have of a context together before it is spread evenly."""


def check_long_contexts(s: "Scenario") -> None:
    """Raises `InputError`."""
    engine, scheduler = s.engine, scheduler_of(s.engine)
    if engine.min_chunk_tokens is not None and engine.target_batch_time_ms is None:
        raise InputError("engine.min_chunk_tokens", engine.min_chunk_tokens, "has no effect without a time for batches",
                         "give engine.target_batch_time_ms, or leave it out")
    if engine.kv_parallel_tokens is not None and engine.kv_parallel_size == 1:
        raise InputError("engine.kv_parallel_tokens", engine.kv_parallel_tokens, "has no effect with a single group",
                         "give engine.kv_parallel_size, or leave it out")
    if engine.target_batch_time_ms is not None:
        _check_target(s, scheduler)
    if engine.kv_parallel_size > 1:
        _check_groups(s, scheduler)
    _check_devices(s)


def _alike(s: "Scenario", scheduler: Scheduler, field: str) -> None:
    """What neither is simulated with."""
    engine, cluster, out = s.engine, s.cluster, f"leave {field} out"
    for name, value, is_wrong, remedy in (
            ("engine.phase_mix", scheduler.phase_mix, scheduler.phase_mix != "unified",
             "use a preset with 'unified', such as 'vllm-v1@0.9'"),
            ("engine.kv_accounting", False, not scheduler.kv_accounting, "set it to true"),
            ("engine.admit", scheduler.admit, scheduler.admit != "any_time", "use 'any_time'"),
            ("engine.victim", scheduler.victim, scheduler.victim != "last_admitted", "use 'last_admitted'"),
            ("engine.scheduling_policy", scheduler.order, scheduler.order in ("vtc", "least_slack"),
             "use another"),
            ("engine.enable_prefix_caching", True, engine.enable_prefix_caching, f"leave it out, or {out}"),
            ("engine.batch_wait_timeout_iters", scheduler.batch_wait_timeout_iters, scheduler.gathers,
             f"leave it out, or {out}"),
            ("engine.data_parallel_size", engine.data_parallel_size, engine.data_parallel_size > 1,
             "use 1, and cluster.replicas"),
            *((f"engine.{degree}", getattr(engine, degree), getattr(engine, degree) > 1, "use 1")
              for degree in ("prefill_context_parallel_size", "decode_context_parallel_size")),
            ("engine.swap", True, engine.swap is not None, f"leave it out, or {out}"),
            ("cluster.pools", [pool.role for pool in cluster.pools], bool(cluster.pools), "use cluster.replicas"),
            ("cluster.migration", True, cluster.migration is not None, f"leave it out, or {out}"),
            ("cluster.scaling", True, cluster.scaling is not None, f"leave it out, or {out}"),
            ("workload.images", True, s.workload.images is not None, f"leave them out, or {out}"),
            ("workload.client", True, s.has_clients,
             "leave out workload.client, deadlines of tenants, cluster.admission and cluster.failures")):
        if is_wrong:
            raise InputError(name, value, f"is not simulated with {field}", remedy)


def _check_target(s: "Scenario", scheduler: Scheduler) -> None:
    field, most = "engine.target_batch_time_ms", scheduler.max_num_batched_tokens
    _alike(s, scheduler, field)
    if not scheduler.chunked_prefill:
        raise InputError(field, s.engine.target_batch_time_ms, "limits chunks, and prompts are not chunked",
                         "set engine.enable_chunked_prefill = true, or leave it out")
    if scheduler.reserve not in ("none", "prompt") and scheduler.max_num_partial_prefills == 1:
        raise InputError("engine.reserve", scheduler.reserve, f"is not simulated with {field}",
                         "use 'none' or 'prompt'")
    if most > MOST_CHUNK_TOKENS:
        raise InputError("engine.max_num_batched_tokens", most,
                         f"is more than the {MOST_CHUNK_TOKENS:,} tokens up to which a chunk of {field} is looked for",
                         "lower it")
    if (s.engine.min_chunk_tokens or 1) > most:
        raise InputError("engine.min_chunk_tokens", s.engine.min_chunk_tokens,
                         f"is more than max_num_batched_tokens = {most}", "lower it")


def _check_groups(s: "Scenario", scheduler: Scheduler) -> None:
    field, size = "engine.kv_parallel_size", s.engine.kv_parallel_size
    _alike(s, scheduler, field)
    for name, value, is_wrong, problem, remedy in (
            ("engine.kv_parallel_tokens", None, s.engine.kv_parallel_tokens is None,
             f"missing, and with {field} = {size} a group has so much of a context before the next one does",
             "give the tokens, e.g. the longest context over the groups"),
            ("engine.kv_parallel_tokens", s.engine.kv_parallel_tokens,
             size * (s.engine.kv_parallel_tokens or 0) > MOST_TOKENS,
             f"of each of {size} groups are more than the {MOST_TOKENS:,} tokens of a context that are counted",
             "lower it"),
            ("model", None, s.model is None, f"missing, and what a merge of {field} sends cannot be known without it",
             f"name a model, also beside a fitted cost, or leave {field} out"),
            ("device", None, s.device is None, f"missing, and the links of {field} cannot be known without it",
             f"name a device, also beside a fitted cost, or leave {field} out"),
            ("cost.kind", "profiled", isinstance(s.cost, ProfiledCost), f"is not simulated with {field}",
             "use 'roofline' or 'fitted'"),
            ("cost.exact", True, isinstance(s.cost, FittedCost) and s.cost.exact, f"is not simulated with {field}",
             "leave it out"),
            ("engine.preset", scheduler.preset, scheduler.pass_on_arrival,
             f"forms batches in a pipeline as requests arrive, which is not simulated with {field}",
             "use preset = 'vllm-v1@0.9', or engine.pipeline_parallel_size = 1")):
        if is_wrong:
            raise InputError(name, value, problem, remedy)


def _check_devices(s: "Scenario") -> None:
    most, engine = s.cluster.num_devices, s.engine
    if most is None or s.num_devices <= most:
        return
    parts = [f"{value} {name}" for name, value in (
        ("replicas", s.cluster.replicas), ("KV groups", engine.kv_parallel_size),
        ("pipeline stages", engine.pipeline_parallel_size), ("data-parallel ranks", engine.data_parallel_size),
        ("prefill context-parallel groups", engine.prefill_context_parallel_size),
        ("tensor-parallel ranks", engine.tensor_parallel_size)) if value > 1]
    text = "of all pools" if s.cluster.pools else " x ".join(parts) or "one engine"
    field, value = "cluster.num_devices", most
    if engine.kv_parallel_size > 1:
        field, value = "engine.kv_parallel_size", engine.kv_parallel_size
    raise InputError(field, value, f"needs {s.num_devices} devices ({text}), and there are {most}",
                     "lower a degree, or raise cluster.num_devices")
