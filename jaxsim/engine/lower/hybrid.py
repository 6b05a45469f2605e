"""A GPU and its host together: where weights are, rates, KV blocks, and the token cap of streamed weights."""

from typing import Any, NamedTuple

import msgspec

from jaxsim._core.errors import InputError
from jaxsim.cost.host import Host, Threshold, gpu_part, host_of, token_threshold
from jaxsim.cost.rank import Roofline
from jaxsim.cost.roofline import EXPERT_SKEW, roofline
from jaxsim.spec.device import DeviceSpec, load_device
from jaxsim.spec.host_memory import HostBudget, Weights, host_blocks, place_weights, tokens_that_fit
from jaxsim.spec.model import ModelSpec
from jaxsim.spec.plan import Plan
from jaxsim.spec.presets import NO_TOKEN_LIMIT, Scheduler
from jaxsim.spec.scenario import Scenario


class Hybrid(NamedTuple):
    """A section resolved. threshold: of streamed weights behind a GPU that works beside the link; None else."""

    weights: Weights
    host: Host
    threshold: Threshold | None


def price(scenario: Scenario, s: Scheduler, model: ModelSpec, device: DeviceSpec, plan: Plan) -> Roofline:
    """The roofline of a scenario, of everything on the GPU."""
    cost = scenario.cost
    return roofline(model, device, plan, scenario.dtype, scenario.kv_dtype, host=cost.host or s.host,
                    distinct_experts=cost.distinct_experts, moe_backend=scenario.engine.moe_backend,
                    split_kv=cost.split_kv, expert_load=cost.expert_load, **cost.overrides)


def resolve_hybrid(scenario: Scenario, s: Scheduler, model: ModelSpec, device: DeviceSpec, plan: Plan
                   ) -> tuple[Hybrid, Scheduler]:
    """Weights and rates, and the scheduler with the token cap that follows where the user gave none.

    Under streaming an iteration of fewer tokens than the threshold lasts as long as one of so many, and one of more
    lasts longer, so that is the cap (MoE-Lens, n_real), or as many as the GPU has memory for: of engines that chunk
    prompts and admit at any time, and never below the preset's own. Raises `InputError`.
    """
    given = scenario.engine.hybrid
    if given.attention == "cpu" and model.sliding_window:
        raise InputError("engine.hybrid.attention", "cpu", f"is not simulated with the sliding window of {model.name}",
                         "use 'gpu'")
    weights, host = place_weights(model, given, scenario.dtype), host_of(given, device, _cpu(scenario))
    threshold = None
    if given.is_streamed and given.overlaps and weights.streamed > 0:
        threshold = token_threshold(gpu_part(price(scenario, s, model, device, plan), given), given, weights, host,
                                    expert_skew=scenario.cost.overrides.get("expert_skew", EXPERT_SKEW))
        if (scenario.engine.max_num_batched_tokens is None and s.chunked_prefill and s.admit == "any_time"
                and s.max_num_batched_tokens < NO_TOKEN_LIMIT):
            cap = tokens_that_fit(
                model, device, given, weights, threshold.tokens, dtype=scenario.dtype, max_num_seqs=s.max_batch_seqs,
                gpu_memory_utilization=s.gpu_memory_utilization, rule=s.kv_rule)
            s = msgspec.structs.replace(s, max_num_batched_tokens=max(s.max_num_batched_tokens, cap))
    return Hybrid(weights, host, threshold), s


def hybrid_blocks(scenario: Scenario, s: Scheduler, model: ModelSpec, device: DeviceSpec, max_model_len: int
                  ) -> HostBudget:
    """KV blocks, and whether all the rest fits. Raises `InputError`."""
    # Where nothing bounds an iteration a batch goes through the GPU in parts.
    tokens = max_model_len if s.max_num_batched_tokens >= NO_TOKEN_LIMIT else s.max_num_batched_tokens
    return host_blocks(
        model, device, _cpu(scenario), scenario.engine.hybrid, dtype=scenario.dtype, kv_dtype=scenario.kv_dtype,
        block_size=s.block_size, gpu_memory_utilization=s.gpu_memory_utilization,
        max_num_batched_tokens=tokens, max_num_seqs=s.max_batch_seqs, max_model_len=max_model_len, rule=s.kv_rule,
        num_gpu_blocks_override=scenario.engine.num_gpu_blocks_override)


def _cpu(scenario: Scenario) -> DeviceSpec | None:
    name = scenario.engine.hybrid.cpu
    return None if name is None else load_device(name)


def hybrid_facts(hybrid: Hybrid, s: Scheduler, memory: HostBudget | None) -> dict[str, Any]:
    """What a summary says of it: weights by place and KV, in bytes; the link's rate and seconds of a pass of weights
    alone; the token cap, and where weights are streamed beside the GPU its threshold with the line it follows from."""
    weights, host, threshold = hybrid
    facts = {"gpu_weight_bytes": weights.on_gpu, "streamed_weight_bytes": weights.streamed,
             "cpu_weight_bytes": weights.on_cpu, "link_bytes_per_s": host.link_bytes_per_s,
             "pass_s": weights.streamed / host.link_bytes_per_s, "max_num_batched_tokens": s.max_num_batched_tokens}
    if threshold is not None:
        facts |= {"threshold_tokens": threshold.tokens, "gpu_layer_a_s": threshold.a_s, "gpu_layer_b_s": threshold.b_s,
                  "link_layer_s": threshold.layer_s}
    if memory is not None:
        facts |= {"kv_bytes": memory.kv_bytes, "kv_on_host": memory.is_on_host}
    return facts
