"""The ways to lay out a model on a number of devices, and the flags that tell an engine to do so."""

import shlex
from collections.abc import Iterator
from typing import Any

import msgspec

from jaxsim._core.errors import InputError
from jaxsim.cost.apex import ParallelPlan, candidate_plans
from jaxsim.spec.model import ModelSpec
from jaxsim.spec.plan import Plan, kv_cache_bytes, weight_format
from jaxsim.spec.presets import Scheduler, load_preset, resolve
from jaxsim.spec.scenario import Scenario
from jaxsim.spec.values import plain

NO_CELLS = ("no engine here copies attention over ranks that share a dense FFN: screened and not simulated")

DTYPES = ("float32", "bfloat16", "float16")
"""vLLM's --dtype among the weight formats."""

ONLINE = ("fp8",)
"""vLLM's --quantization that narrows the weights as it loads them; others need a checkpoint that is narrow already."""

KV_DTYPES = ("fp8", "fp8_e4m3", "fp8_e5m2")
"""vLLM's --kv-cache-dtype, in all versions; "auto" is the width of the activations."""

WITHOUT_FLAG = ("victim", "phase_mix", "reserve", "decode_needs_free_block", "waiting_blocked_after_preempt", "admit",
                "kv_accounting", "decode_context_limit")
"""What a scheduler is bent by (docs/schedulers.md), and vLLM's is not."""


class Candidate(msgspec.Struct, frozen=True, kw_only=True):
    """Copies of an instance of a plan, on a kind of device.

    plan: of one instance; replicas: instances, each a server with its own queue. cells: APEX's plan of cells, where
    attention is copied over `data_parallel_size` ranks that share a dense FFN.
    """

    device: str
    plan: Plan
    replicas: int = 1
    is_cell_level: bool = False

    @property
    def num_devices(self) -> int:
        """Devices of all instances."""
        return self.plan.num_devices * self.replicas

    @property
    def label(self) -> str:
        """As people write it: "2 x TP4", "TP2 DP4 EP"."""
        plan = self.plan
        if self.is_cell_level:
            ranks = plan.tensor_parallel_size * plan.data_parallel_size
            heads = f" TP{plan.tensor_parallel_size}" if plan.tensor_parallel_size > 1 else ""
            parts = [f"attention{heads} DP{plan.data_parallel_size}", f"FFN TP{ranks}"]
        else:
            parts = [f"TP{plan.tensor_parallel_size}"]
            parts += [f"DP{plan.data_parallel_size}"] if plan.data_parallel_size > 1 else []
            parts += ["EP"] if plan.enable_expert_parallel else []
        parts += [f"PP{plan.pipeline_parallel_size}"] if plan.pipeline_parallel_size > 1 else []
        return (f"{self.replicas} x " if self.replicas > 1 else "") + " ".join(parts)

    @property
    def why_not_simulated(self) -> str | None:
        """What the event engine lacks for it; None where it runs it."""
        return NO_CELLS if self.is_cell_level else None

    def values(self) -> dict[str, Any]:
        """Fields of a scenario."""
        plan = self.plan
        return {"engine.tensor_parallel_size": plan.tensor_parallel_size,
                "engine.pipeline_parallel_size": plan.pipeline_parallel_size,
                "engine.data_parallel_size": 1 if self.is_cell_level else plan.data_parallel_size,
                "engine.enable_expert_parallel": plan.enable_expert_parallel, "cluster.replicas": self.replicas}


def candidates(model: ModelSpec, device: str, num_devices: int, *, cells: bool = True) -> list[Candidate]:
    """Every plan on exactly so many devices, whether or not the model can be cut that way or fits.

    Replicas x stages x data-parallel ranks x tensor-parallel ranks is the number of devices, in every way. Experts are
    cut over all ranks or, with EP, spread whole over them. Data-parallel ranks are only there where they share
    experts: of a dense model they are replicas. cells: also copies of attention that share one FFN, as APEX enumerates
    them (`jaxsim.cost.apex.candidate_plans`). Raises `InputError`.
    """
    if not isinstance(num_devices, int) or num_devices < 1:
        raise InputError("--devices", f"{device}:{num_devices}", "is no count of devices", "write e.g. h100:8")
    found = []
    for replicas, stages, data, tensors in _factors(num_devices, 4):
        if stages > model.layers or (data > 1 and not model.experts):
            continue
        for experts in (False, True) if model.experts and data * tensors > 1 else (False,):
            plan = Plan(tensor_parallel_size=tensors, pipeline_parallel_size=stages, data_parallel_size=data,
                        enable_expert_parallel=experts)
            found.append(Candidate(device=device, plan=plan, replicas=replicas))
    if cells and not model.experts:
        found += [Candidate(device=device, replicas=p.replicas, is_cell_level=True, plan=Plan(
            tensor_parallel_size=p.attention_ranks, pipeline_parallel_size=p.stages,
            data_parallel_size=p.attention_replicas)) for p in candidate_plans(model, num_devices) if _is_shared(p)]
    return found


def _is_shared(plan: ParallelPlan) -> bool:
    """Whether copies of attention share one FFN. The opposite, copies of the FFN, saves no memory of KV."""
    return plan.attention_replicas > 1 and plan.ffn_replicas == 1 and plan.stages == 1


def _factors(number: int, count: int) -> Iterator[tuple[int, ...]]:
    """Ordered products of `count` factors."""
    if count == 1:
        yield (number,)
        return
    for first in range(1, number + 1):
        if number % first == 0:
            for rest in _factors(number // first, count - 1):
                yield (first, *rest)


def vllm_line(scenario: Scenario, scheduler: Scheduler, candidate: Candidate) -> str:
    """`vllm serve ...` of one instance of a plan. Raises `InputError` for what vLLM has no flags for.

    What decides the timing is written out, what the scenario leaves to vLLM is left to it.
    """
    engine, model, plan = scenario.engine, scenario.model, candidate.plan
    name = load_preset(engine.preset).engine.casefold()
    is_v0 = "v0" in name
    if not name.startswith("vllm"):
        raise InputError("engine.preset", engine.preset, "is not vLLM, whose flags these are",
                         "read the degrees in the table")
    if candidate.is_cell_level:
        raise InputError("plan", candidate.label, "cannot be told to vLLM", "choose another plan")
    name = model.config.removesuffix("/config.json") if model.config is not None else (
        model.name if model.dimensions is not None else model.spec().name)
    flags: list[tuple[str, Any]] = [("tensor-parallel-size", plan.tensor_parallel_size)]
    if plan.pipeline_parallel_size > 1:
        flags.append(("pipeline-parallel-size", plan.pipeline_parallel_size))
    if plan.data_parallel_size > 1:
        flags.append(("data-parallel-size", plan.data_parallel_size))
    if plan.enable_expert_parallel:
        flags.append(("enable-expert-parallel", None))
        if engine.all2all_backend != "allgather_reducescatter":
            flags.append(("all2all-backend", engine.all2all_backend))
        if engine.enable_eplb:
            flags += [("enable-eplb", None), ("num-redundant-experts", engine.num_redundant_experts)]
    if engine.decode_context_parallel_size > 1:
        flags.append(("decode-context-parallel-size", engine.decode_context_parallel_size))
    flags += _formats(scenario)
    flags += [("max-num-seqs", scheduler.max_num_seqs), ("max-num-batched-tokens", scheduler.max_num_batched_tokens)]
    if engine.max_model_len is not None:
        flags.append(("max-model-len", engine.max_model_len))
    flags.append(("gpu-memory-utilization", f"{scheduler.gpu_memory_utilization:g}"))
    if engine.scheduling_policy not in (None, "fcfs", "priority"):
        raise InputError("engine.scheduling_policy", engine.scheduling_policy, "is no policy of vLLM",
                         "use 'fcfs' or 'priority' for a command line")
    _check_flags(scenario, scheduler)
    for field in ("block_size", "num_gpu_blocks_override", "scheduling_policy"):
        if getattr(engine, field) is not None:
            flags.append((field.replace("_", "-"), getattr(engine, field)))
    if is_v0:
        # V0 turns it on by itself for long models, and knows no --no-enable-...
        flags.append((f"enable-chunked-prefill={scheduler.chunked_prefill}", None))
    elif engine.enable_chunked_prefill is not None:
        flags.append((("" if engine.enable_chunked_prefill else "no-") + "enable-chunked-prefill", None))
    if engine.async_scheduling is not None and not is_v0:
        flags.append((("" if engine.async_scheduling else "no-") + "async-scheduling", None))
    if engine.enforce_eager:
        flags.append(("enforce-eager", None))
    if engine.moe_backend != "auto":
        flags.append(("moe-backend", engine.moe_backend))
    if engine.enable_prefix_caching or not is_v0:
        flags.append((("" if engine.enable_prefix_caching else "no-") + "enable-prefix-caching", None))
    words = ["vllm", "serve", name]
    for flag, value in flags:
        words += [f"--{flag}"] + ([] if value is None else [str(value)])
    return shlex.join(words)


def _check_flags(scenario: Scenario, scheduler: Scheduler) -> None:
    """Refuse what decides the timing and has no flag. Raises `InputError`."""
    engine = scenario.engine
    for field, value in (("engine.swap", engine.swap), ("engine.offload", engine.offload),
                         ("engine.context_reuse", engine.context_reuse), ("engine.hybrid", engine.hybrid),
                         ("engine.target_batch_time_ms", engine.target_batch_time_ms),
                         ("engine.kv_parallel_tokens", engine.kv_parallel_tokens),
                         ("engine.enable_sequence_parallelism", engine.enable_sequence_parallelism or None),
                         ("cluster.remote_store", scenario.cluster.remote_store)):
        if value is not None:
            raise InputError(field, plain(value), "is not written as a flag of vLLM",
                             "leave it out, or read the degrees in the table")
    usual = resolve(msgspec.structs.replace(engine, **dict.fromkeys(WITHOUT_FLAG)))
    for name in WITHOUT_FLAG:
        if getattr(engine, name) is not None and getattr(scheduler, name) != getattr(usual, name):
            raise InputError(f"engine.{name}", getattr(engine, name),
                             f"is not what vLLM does, {getattr(usual, name)!r}, and it has no flag for it",
                             "leave it out, or read the degrees in the table")


def _formats(scenario: Scenario) -> list[tuple[str, str]]:
    """Flags of the number formats, where they are not the model's own. Raises `InputError`."""
    model, flags = scenario.model.spec(), []
    own, asked = weight_format("auto", model).name, weight_format(scenario.dtype, model).name
    if asked in DTYPES and own in DTYPES:
        if scenario.dtype != "auto":
            flags.append(("dtype", asked))
    elif asked in ONLINE and own in DTYPES:
        flags.append(("quantization", asked))
    elif asked != own:
        raise InputError("model.dtype", scenario.dtype, f"is no format that vLLM makes of {model.name}, which is {own}",
                         "serve a checkpoint in that format, with the degrees in the table")
    kv = str(scenario.kv_dtype).lower()
    if kv in KV_DTYPES:
        flags.append(("kv-cache-dtype", kv))
    elif kv_cache_bytes(kv, scenario.dtype, model) != weight_format(scenario.dtype, model).activation_bytes:
        raise InputError("model.kv_dtype", scenario.kv_dtype, "is no --kv-cache-dtype of vLLM",
                         "use " + ", ".join(("auto", *KV_DTYPES)))
    return flags
