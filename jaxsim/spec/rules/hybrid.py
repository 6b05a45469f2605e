"""Rules of [engine.hybrid]."""

from typing import TYPE_CHECKING

from jaxsim._core.errors import InputError
from jaxsim.spec.costs import RooflineCost
from jaxsim.spec.device import load_device

if TYPE_CHECKING:
    from jaxsim.spec.scenario import Scenario

OUT = "leave engine.hybrid out"


def check_hybrid(s: "Scenario") -> None:
    """What runs on a GPU and its host together. Raises `InputError`."""
    engine, given, field = s.engine, s.engine.hybrid, "engine.hybrid"
    for index, pool in enumerate(s.cluster.pools):
        if pool.engine.get("hybrid") is not None:
            raise InputError(f"cluster.pools[{index}].engine.hybrid", "given", "is not simulated in pools",
                             "leave it out, or use cluster.replicas with engine.hybrid")
    if given is None:
        return
    on_cpu = "'cpu' for engine.hybrid.attention or engine.hybrid.experts"
    is_known = given.cpu is not None or None not in (given.cpu_gb_per_s, given.cpu_tflops)
    for name, value, is_wrong, problem, remedy in (
            ("cost.kind", s.cost.__struct_config__.tag, not isinstance(s.cost, RooflineCost),
             f"does not tell what of an iteration moves to the host with {field}", f"use 'roofline', or {OUT}"),
            *((f"engine.{degree}", getattr(engine, degree), getattr(engine, degree) > 1,
               f"is not simulated with {field}", f"use 1, or {OUT}")
              for degree in ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size",
                             "kv_parallel_size", "prefill_context_parallel_size",
                             "decode_context_parallel_size")),
            ("cluster.pools", [pool.role for pool in s.cluster.pools], bool(s.cluster.pools),
             f"are not simulated with {field}", f"use cluster.replicas, or {OUT}"),
            ("cluster.migration", True, s.cluster.migration is not None, f"is not simulated with {field}", OUT),
            ("cluster.remote_store", True, s.cluster.remote_store is not None, f"is not simulated with {field}", OUT),
            ("workload.images", True, s.workload.images is not None, f"are not simulated with {field}", OUT),
            *((f"engine.{name}", True, getattr(engine, name) is not None, f"is not simulated with {field}",
               "leave one of them out") for name in ("swap", "offload", "context_reuse", "target_batch_time_ms")),
            (field, "resident", not (given.is_streamed or given.uses_cpu), "leaves all of the model on the GPU",
             f"give weights = 'streamed', or {on_cpu}; or {OUT}"),
            *((f"{field}.{name}", getattr(given, name), getattr(given, name) is not None and not given.is_streamed,
               "has no effect with weights = 'resident'", "leave it out, or set weights = 'streamed'")
              for name in ("resident_weight_gb", "cpu_offload_gb")),
            (f"{field}.cpu_offload_gb", given.cpu_offload_gb,
             None not in (given.cpu_offload_gb, given.resident_weight_gb), "comes with resident_weight_gb",
             "give one of them"),
            (f"{field}.kv_space_gb", given.kv_space_gb, given.kv_space_gb is not None and given.attention == "gpu",
             "has no effect while KV is on the GPU", "leave it out, or set attention = 'cpu'"),
            (f"{field}.hot_experts", given.hot_experts, given.hot_experts > 0 and given.experts == "gpu",
             "has no effect while all experts are on the GPU", "leave it out, or set experts = 'cpu'"),
            (f"{field}.hand_over_us", given.hand_over_us, given.hand_over_us > 0 and not given.uses_cpu,
             "has no effect while the CPU computes nothing", f"leave it out, or give {on_cpu}"),
            *((f"{field}.{name}", getattr(given, name), getattr(given, name) is not None and not given.uses_cpu,
               "has no effect while the CPU computes nothing", f"leave it out, or give {on_cpu}")
              for name in ("contention", "cpu_gb_per_s", "cpu_tflops", "cpu_threads")),
            (f"{field}.contention", given.contention, given.contention is not None and not given.is_streamed,
             "has no effect with weights = 'resident', as little else crosses the link",
             "leave it out, or set weights = 'streamed'"),
            (f"{field}.popularity", given.popularity, given.popularity != "skewed" and given.experts == "gpu",
             "has no effect while all experts are on the GPU", "leave it out, or set experts = 'cpu'"),
            (f"{field}.contention", given.contention, bool(given.contention) and not given.overlaps,
             "has no effect where the link and the CPU take turns", "leave it out, or set overlap = true"),
            (f"{field}.cpu", None, given.uses_cpu and not is_known,
             f"missing, and what the CPU computes ({'attention' if given.attention == 'cpu' else 'experts'}) cannot be"
             " priced without it", "name a CPU of `jaxsim list devices`, e.g. 'xeon_8380', or give cpu_gb_per_s and"
             " cpu_tflops"),
            ("engine.enable_prefix_caching", True, engine.enable_prefix_caching and given.attention == "cpu",
             f"is not simulated with {field}.attention = 'cpu'", "set it to false")):
        if is_wrong:
            raise InputError(name, value, problem, remedy)
    if given.cpu is not None:
        try:
            kind = load_device(given.cpu).kind
        except InputError as error:
            raise InputError(f"{field}.cpu", given.cpu, error.problem, error.remedy) from None
        if kind != "cpu":
            raise InputError(f"{field}.cpu", given.cpu, f"is a {kind}", "name a CPU, e.g. 'xeon_8380'")
