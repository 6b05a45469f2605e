"""Named schedulers: one TOML file each under `scenarios/presets`, resolved against what the user wrote.

A preset says which engine and version it imitates, what it leaves out, where it is valid, and which of its
cells nobody has confirmed. Adding a scheduler is adding a file: names are found by looking.
"""

import functools
import math
import re
from importlib import resources
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from jaxsim._core.errors import InputError, suggest
from jaxsim._core.records import converted
from jaxsim.spec.engine import (
    SORTED_POLICIES,
    Admit,
    BlockRule,
    BlockSize,
    EngineConfig,
    Order,
    PhaseMix,
    Reserve,
    Victim,
)
from jaxsim.spec.memory import kv_rule
from jaxsim.spec.messages import explain
from jaxsim.spec.toml import parse_toml

NO_TOKEN_LIMIT = 1 << 30
"""A token budget that never binds."""

GIB = 1 << 30

CudagraphMode = Literal["full_and_piecewise", "full_decode_only"]


class Flags(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The structure of a scheduler, as `jaxsim.policy.batching.Batching` reads it."""

    phase_mix: PhaseMix
    chunked_prefill: bool
    reserve: Reserve
    decode_needs_free_block: BlockRule
    victim: Victim
    waiting_blocked_after_preempt: bool
    order: Order
    admit: Admit
    async_scheduling: bool
    kv_accounting: bool
    decode_context_limit: Annotated[int, Meta(ge=1)] | None = None


class Numbers(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The engine's own defaults. `at_least_max_model_len`: the token budget grows to the model's limit."""

    max_num_seqs: Annotated[int, Meta(ge=1)]
    max_num_batched_tokens: Annotated[int, Meta(ge=1)]
    block_size: BlockSize
    gpu_memory_utilization: Annotated[float, Meta(gt=0, le=1)]
    watermark: Annotated[float, Meta(ge=0, lt=1)]
    batch_wait_timeout_iters: Annotated[int, Meta(ge=0)] = 0
    batch_wait_max_tokens_ratio: Annotated[float, Meta(ge=0, le=1)] = 0.0
    at_least_max_model_len: bool = False


class DeviceNumbers(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Defaults of some devices only: by memory, in GiB, less names that contain one of `except_names`."""

    min_memory_gib: float = 0.0
    max_memory_gib: float = float("inf")
    except_names: tuple[str, ...] = ()
    max_num_seqs: Annotated[int, Meta(ge=1)] | None = None
    max_num_batched_tokens: Annotated[int, Meta(ge=1)] | None = None

    def applies(self, device_name: str, memory_bytes: float) -> bool:
        """Whether the device is one of these. An unknown device (no memory given) never is."""
        return (memory_bytes > 0 and self.min_memory_gib * GIB <= memory_bytes < self.max_memory_gib * GIB
                and not any(name in device_name.casefold() for name in self.except_names))


class Pipeline(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a scheduler does with pipeline stages, of which each has a batch in flight.

    pass_on_arrival: who arrives is scheduled at once if fewer batches are in flight, instead of when the engine has
    waited for the oldest. batch_limit: `max_num_seqs` limits all batches together, they have equal shares of it
    (`share`), or it limits each (`each`). pass_when_stage_free: a batch is formed whenever the first stage is free,
    however many are in flight.
    """

    pass_on_arrival: bool
    batch_limit: Literal["all", "share", "each"]
    pass_when_stage_free: bool = False


class Expected(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Parameters of `reserve = "expected"`: SGLang's ratio of outputs it reserves for, and its retraction."""

    ratio_start: Annotated[float, Meta(gt=0, le=1)] = 0.7
    ratio_floor_factor: Annotated[float, Meta(gt=0, le=1)] = 0.14
    ratio_decay_steps: Annotated[int, Meta(ge=1)] = 600
    reserve_clip_tokens: Annotated[int, Meta(ge=1)] = 4096
    retract_free_tokens: Annotated[int, Meta(ge=1)] = 20


class Preset(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One file of `scenarios/presets`.

    host: whose host overheads the roofline takes, a name of `jaxsim.cost.roofline.HOSTS`. cudagraph_mode: which
    iterations the engine captures, unless told to run eagerly: prompts in pieces between attention too, or decodes
    only. kv_rule: whose rule
    makes KV blocks of device memory, engine@version, a name of `jaxsim.spec.memory.KV_RULES`. unconfirmed: flags
    and numbers without a confirmed source.
    """

    name: str
    engine: str
    version: str
    source: str
    validity: str
    leaves_out: tuple[str, ...]
    host: str
    flags: Flags
    numbers: Numbers
    cudagraph_mode: CudagraphMode = "full_and_piecewise"
    kv_rule: str = "vllm@0.15"
    aliases: tuple[str, ...] = ()
    unconfirmed: tuple[str, ...] = ()
    expected: Expected = Expected()
    pipeline: Pipeline | None = None
    device_numbers: tuple[DeviceNumbers, ...] = ()


class Scheduler(msgspec.Struct, frozen=True, kw_only=True):
    """A scheduler with every flag and number decided: what `Batching` is made from, less the memory's blocks.

    Tokens are tokens, `watermark` is a share of the blocks. `ratio_decay` is a step of the ratio a decode
    iteration. `max_model_len` is None where neither the user nor the caller knew one. `gathers`: prompts wait for each
    other, for which TensorRT-LLM needs both numbers. num_stages: of a pipeline; `max_num_seqs` is then that of all
    batches in flight, `max_batch_seqs` that of each. pass_when_stage_free: and these are formed whenever the first
    stage is free. max_num_partial_prefills: prompts that are partly computed side by side.
    """

    preset: str
    version: str
    host: str
    cudagraph_mode: str
    kv_rule: str
    phase_mix: str
    chunked_prefill: bool
    reserve: str
    decode_needs_free_block: str
    victim: str
    waiting_blocked_after_preempt: bool
    order: str
    admit: str
    async_scheduling: bool
    kv_accounting: bool
    decode_context_limit: int | None
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int | None
    block_size: int
    gpu_memory_utilization: float
    watermark: float
    gathers: bool
    batch_wait_timeout_iters: int
    batch_wait_max_tokens_ratio: float
    ratio_start: float
    ratio_floor: float
    ratio_decay: float
    reserve_clip_tokens: int
    retract_free_tokens: int
    num_stages: int
    pass_on_arrival: bool
    max_batch_seqs: int
    pass_when_stage_free: bool = False
    max_num_partial_prefills: int = 1

    @property
    def batch_wait_tokens(self) -> int:
        """Tokens, those of the decodes included, for which prompts wait no longer."""
        return math.ceil(self.batch_wait_max_tokens_ratio * self.max_num_batched_tokens)

    def watermark_blocks(self, num_blocks: int) -> int:
        """Blocks that admissions leave free, truncated as the engines do (none below 1/watermark)."""
        return int(self.watermark * num_blocks)

    def most_tokens(self, num_sequences: int, longest: int) -> int:
        """Tokens of the largest iteration of sequences of up to `longest` tokens.

        Raised to a power of two, so that budgets and lengths share programs.
        """
        most = min(self.max_num_batched_tokens + num_sequences, num_sequences * (longest + 1), NO_TOKEN_LIMIT)
        return min(1 << (most - 1).bit_length(), NO_TOKEN_LIMIT)


def _decode(text: str, where: str) -> Preset:
    values = parse_toml(text, where)
    try:
        preset = converted(values, Preset)
    except msgspec.ValidationError as error:
        raise explain(str(error), values, Preset) from None
    kv_rule(preset.kv_rule)
    cells = {"host", "cudagraph_mode", "kv_rule", *Flags.__struct_fields__, *Numbers.__struct_fields__,
             *Expected.__struct_fields__, *Pipeline.__struct_fields__}
    for cell in preset.unconfirmed:
        if cell not in cells:
            raise InputError("engine.preset", where, f"unconfirmed names {cell!r}, which is no cell",
                             suggest(cell, cells))
    return preset


@functools.cache
def all_presets() -> tuple[Preset, ...]:
    """Every shipped preset, by name."""
    folder = resources.files("jaxsim.scenarios").joinpath("presets")
    files = sorted((f for f in folder.iterdir() if f.name.endswith(".toml")), key=lambda f: f.name)
    presets = [_decode(f.read_text(encoding="utf-8"), f.name) for f in files]
    return tuple(sorted(presets, key=lambda p: re.sub(r"\d+", lambda m: m[0].zfill(6), p.name)))


def preset_names() -> tuple[str, ...]:
    """Names and aliases that `engine.preset` accepts."""
    return tuple(sorted(name for p in all_presets() for name in (p.name, *p.aliases)))


def load_preset(name: str) -> Preset:
    """The preset of that name, alias or file (.toml). Raises `InputError` with the nearest names."""
    if name.endswith(".toml"):
        path = Path(name)
        if not path.is_file():
            raise InputError("engine.preset", name, "no such file", "give the path of a preset, or a name")
        return _decode(path.read_text(encoding="utf-8"), name)
    for preset in all_presets():
        if name == preset.name or name in preset.aliases:
            return preset
    raise InputError("engine.preset", name, "no such scheduler", suggest(name, preset_names()))


def resolve(engine: EngineConfig, *, device_name: str = "", memory_bytes: float = 0.0,
            max_model_len: int | None = None) -> Scheduler:
    """The engine section with the preset's defaults filled in.

    device_name, memory_bytes: of one device, for engines whose defaults depend on it; unknown devices get the
    small-device defaults. max_model_len: the model's own limit, used where the user gives none.

    Raises `InputError` for combinations the engine itself refuses or nobody simulates.
    """
    preset = load_preset(engine.preset)
    flags, numbers, expected = preset.flags, preset.numbers, preset.expected
    defaults = {name: getattr(numbers, name) for name in ("max_num_seqs", "max_num_batched_tokens")}
    for row in preset.device_numbers:
        if row.applies(device_name, memory_bytes):
            defaults |= {name: getattr(row, name) for name in defaults if getattr(row, name) is not None}

    def pick(value, default):
        return default if value is None else value

    max_model_len = pick(engine.max_model_len, max_model_len)
    if numbers.at_least_max_model_len and max_model_len is not None:
        defaults["max_num_batched_tokens"] = max(defaults["max_num_batched_tokens"], max_model_len)
    max_num_seqs = pick(engine.max_num_seqs, defaults["max_num_seqs"])
    max_num_batched_tokens = pick(engine.max_num_batched_tokens, defaults["max_num_batched_tokens"])
    phase_mix = pick(engine.phase_mix, flags.phase_mix)
    order = pick(engine.scheduling_policy, flags.order)
    reserve = pick(engine.reserve, flags.reserve)
    # vLLM's PRIORITY policy is both an order of the queue and a choice of victim.
    # SGLang's reserve and its retraction are one mechanism.
    num_partial = pick(engine.max_num_partial_prefills, 1)
    sorts = order in SORTED_POLICIES and num_partial == 1
    usual_victim = ("fewest_outputs" if reserve == "expected" else
                    "lowest_priority" if sorts and order != "least_slack" else "last_admitted")
    victim = pick(engine.victim, usual_victim)

    if phase_mix == "unified" and max_num_batched_tokens < max_num_seqs:
        # Decodes alone could overrun the budget; the engine refuses two explicit values and bends a default.
        if engine.max_num_seqs is not None and engine.max_num_batched_tokens is not None:
            raise InputError("engine.max_num_seqs", max_num_seqs,
                             f"larger than max_num_batched_tokens ({max_num_batched_tokens}), so decodes"
                             " alone could exceed the token budget",
                             f"use at most {max_num_batched_tokens}, or raise engine.max_num_batched_tokens")
        if engine.max_num_seqs is None:
            max_num_seqs = max_num_batched_tokens
        else:
            max_num_batched_tokens = max_num_seqs
    chunked_prefill = pick(engine.enable_chunked_prefill, flags.chunked_prefill)
    block_rule = pick(engine.decode_needs_free_block, flags.decode_needs_free_block)
    kv_accounting = pick(engine.kv_accounting, flags.kv_accounting)
    context_limit = pick(engine.decode_context_limit, flags.decode_context_limit)
    admit = pick(engine.admit, flags.admit)
    wait_iters = pick(engine.batch_wait_timeout_iters, numbers.batch_wait_timeout_iters)
    wait_ratio = pick(engine.batch_wait_max_tokens_ratio, numbers.batch_wait_max_tokens_ratio)
    gathers = wait_iters > 0 and wait_ratio > 0
    # With pipeline stages it is not simulated, and older engines refuse it.
    stages = engine.pipeline_parallel_size
    async_scheduling = pick(engine.async_scheduling, flags.async_scheduling and stages == 1)
    pipeline = _pipeline(preset, stages)
    # Combinations that no engine has, and whose meaning would be a guess.
    for field, value, is_wrong, problem, remedy in (
        ("victim", victim, (victim == "fewest_outputs") != (reserve == "expected"),
         f"does not go with reserve = {reserve!r}", "'fewest_outputs' and reserve 'expected' go together"),
        ("victim", victim, victim == ("fewest_outputs" if sorts else "lowest_priority")
         or (victim == "lowest_priority" and order == "least_slack"),
         f"does not go with scheduling_policy = {order!r}",
         "use 'last_admitted', or a scheduling_policy that sorts, such as 'priority'"),
        ("reserve", reserve, reserve == "expected" and phase_mix != "prefill_first",
         f"does not go with phase_mix = {phase_mix!r}", "set engine.phase_mix = 'prefill_first'"),
        ("decode_needs_free_block", block_rule, block_rule == "always" and reserve != "prompt",
         f"does not go with reserve = {reserve!r}", "use 'crossing', or set engine.reserve = 'prompt'"),
        ("enable_chunked_prefill", chunked_prefill,
         chunked_prefill and phase_mix == "prefill_first" and reserve == "none",
         "prompts that go first and in chunks need a reservation", "use engine.reserve = 'prompt'"),
        ("decode_context_limit", context_limit,
         context_limit is not None and (kv_accounting or chunked_prefill or phase_mix != "prefill_first"),
         "is only simulated for whole prompts first and without KV accounting",
         "use preset = 'distserve-sim-vllm'"),
        ("batch_wait_timeout_iters", wait_iters,
         gathers and (phase_mix != "unified" or chunked_prefill or order != "fcfs" or admit != "any_time"
                      or reserve not in ("max_tokens", "max_model_len")),
         "is simulated for whole prompts beside decodes whose KV blocks are reserved", "use preset = 'tensorrt-llm'"),
        ("batch_wait_timeout_iters", wait_iters, gathers and engine.data_parallel_size > 1,
         "has no effect in TensorRT-LLM with data-parallel attention", "leave it out"),
        ("batch_wait_timeout_iters", wait_iters, wait_iters > 0 and not gathers,
         "has no effect without engine.batch_wait_max_tokens_ratio", "set both, or neither"),
        ("batch_wait_max_tokens_ratio", wait_ratio, wait_ratio > 0 and not gathers,
         "has no effect without engine.batch_wait_timeout_iters", "set both, or neither"),
        ("async_scheduling", async_scheduling, stages > 1 and async_scheduling,
         f"is not simulated with pipeline_parallel_size = {stages}",
         "leave it out: stages are simulated with synchronous scheduling"),
        *((name, value, stages > 1 and is_other and not pipeline.pass_when_stage_free,
           f"is not simulated with pipeline_parallel_size = {stages}", remedy)
          for name, value, is_other, remedy in (
              ("phase_mix", phase_mix, phase_mix != "unified", "use a preset with 'unified', or one stage"),
              ("scheduling_policy", order, order != "fcfs" and num_partial == 1,
               "use 'fcfs', or one stage"),
              ("admit", admit, admit != "any_time", "use 'any_time', or one stage"),
              ("batch_wait_timeout_iters", wait_iters, gathers, "leave it out, or use one stage"),
              ("decode_context_limit", context_limit, context_limit is not None, "leave it out, or use one stage"))),
    ):
        if is_wrong:
            raise InputError(f"engine.{field}", value, problem, remedy)
    if engine.schedule_conservativeness is not None and reserve != "expected":
        raise InputError("engine.schedule_conservativeness", engine.schedule_conservativeness,
                         f"has no effect with reserve = {reserve!r}",
                         "leave it out, or use preset = 'sglang'")
    ratio_start = min(expected.ratio_start * pick(engine.schedule_conservativeness, 1.0), 1.0)
    ratio_floor = ratio_start * expected.ratio_floor_factor
    return Scheduler(
        preset=preset.name, version=preset.version, host=preset.host, kv_rule=preset.kv_rule,
        cudagraph_mode="none" if engine.enforce_eager else preset.cudagraph_mode,
        phase_mix=phase_mix, order=order, reserve=reserve, victim=victim,
        chunked_prefill=chunked_prefill, decode_needs_free_block=block_rule,
        waiting_blocked_after_preempt=pick(engine.waiting_blocked_after_preempt,
                                           flags.waiting_blocked_after_preempt),
        admit=admit,
        async_scheduling=async_scheduling,
        num_stages=stages, pass_on_arrival=pipeline.pass_on_arrival,
        pass_when_stage_free=stages > 1 and pipeline.pass_when_stage_free, max_num_partial_prefills=num_partial,
        max_batch_seqs=max(max_num_seqs // stages, 1) if pipeline.batch_limit == "share" else max_num_seqs,
        kv_accounting=kv_accounting, decode_context_limit=context_limit,
        max_num_seqs=max_num_seqs * (stages if pipeline.batch_limit == "each" else 1),
        max_num_batched_tokens=max_num_batched_tokens, max_model_len=max_model_len,
        block_size=pick(engine.block_size, numbers.block_size),
        gpu_memory_utilization=pick(engine.gpu_memory_utilization, numbers.gpu_memory_utilization),
        watermark=pick(engine.watermark, numbers.watermark),
        gathers=gathers, batch_wait_timeout_iters=wait_iters, batch_wait_max_tokens_ratio=wait_ratio,
        ratio_start=ratio_start, ratio_floor=ratio_floor,
        ratio_decay=(ratio_start - ratio_floor) / expected.ratio_decay_steps,
        reserve_clip_tokens=expected.reserve_clip_tokens, retract_free_tokens=expected.retract_free_tokens)


def _pipeline(preset: Preset, stages: int) -> Pipeline:
    """Of a preset; of none that is read where there are no stages. Raises `InputError` where nobody knows."""
    if stages == 1:
        return Pipeline(pass_on_arrival=False, batch_limit="all")
    if preset.pipeline is None:
        able = sorted({p.name.partition("@")[0] for p in all_presets() if p.pipeline is not None})
        raise InputError("engine.pipeline_parallel_size", stages, f"is not simulated for {preset.name}",
                         f"use 1, or a preset of {', '.join(able)}")
    return preset.pipeline


def _cell(preset: Preset, group: msgspec.Struct, name: str) -> str:
    value = getattr(group, name)
    if name == "max_num_batched_tokens" and value == NO_TOKEN_LIMIT:
        text = "no limit"
    elif name == "max_num_batched_tokens" and preset.numbers.at_least_max_model_len:
        text = f"max({value}, max_model_len)"
    elif value is None:
        text = "-"
    else:
        text = {True: "yes", False: "no"}.get(value, str(value)) if isinstance(value, bool) else str(value)
    rows = [r for r in preset.device_numbers if getattr(r, name, None) is not None]
    for row in rows:
        low, high = row.min_memory_gib, row.max_memory_gib
        where = f"from {low:g} GiB" if high == float("inf") else f"below {high:g} GiB"
        where += "".join(f", not {n.upper()}" for n in row.except_names)
        text += f"; {getattr(row, name)} {where}"
    return text + (" **?**" if name in preset.unconfirmed else "")


def markdown() -> str:
    """The page `docs/schedulers.md`: every flag and number by preset, cells nobody confirmed marked."""
    presets = all_presets()
    lines = [
        "# Schedulers", "",
        "One parametric scheduler, and the flags and default numbers that make it imitate each engine. Made",
        "from `scenarios/presets/*.toml` by `jaxsim list policies --markdown`; a cell marked **?** is not",
        "confirmed by a source. Any cell can be overridden in the `[engine]` section of a scenario.", "",
        "| flag | " + " | ".join(f"`{p.name}`" for p in presets) + " |",
        "|---|" + "---|" * len(presets)]
    for group in ("flags", "numbers"):
        for name in getattr(presets[0], group).__struct_fields__:
            if name != "at_least_max_model_len":
                cells = (_cell(p, getattr(p, group), name) for p in presets)
                lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    lines.append("| `kv_rule` | " + " | ".join(_cell(p, p, "kv_rule") if p.flags.kv_accounting else "-"
                                               for p in presets) + " |")
    lines.append("| `cudagraph_mode` | " + " | ".join(_cell(p, p, "cudagraph_mode") for p in presets) + " |")
    lines.append("| host overhead of | " + " | ".join(_cell(p, p, "host") for p in presets) + " |")
    for name in Expected.__struct_fields__:
        cells = (_cell(p, p.expected, name) if p.flags.reserve == "expected" else "-" for p in presets)
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    for name in Pipeline.__struct_fields__:
        cells = (_cell(p, p.pipeline, name) if p.pipeline else "-" for p in presets)
        lines.append(f"| `pipeline.{name}` | " + " | ".join(cells) + " |")
    lines += ["", "`scheduling_policy = \"priority\"` sets `order` and, unless it is given, `victim =",
              "\"lowest_priority\"`. `max_num_batched_tokens` counts prompt tokens only where `phase_mix` is",
              "`prefill_first`. Two schedulers compare as schedulers only under one host overhead: set",
              "`cost.host` in both; where a preset's own is marked **?** it is that of vLLM V1 in lack of a",
              "measured one. `kv_rule` is the engine, and the version of it, whose split of device memory",
              "gives the KV blocks ([cost-model.md](cost-model.md), section 5); `gpu_memory_utilization` is the",
              "share it calls by another name: SGLang `mem_fraction_static`, TensorRT-LLM",
              "`free_gpu_memory_fraction`. `cudagraph_mode` (vLLM's name) says which iterations are captured: where",
              "it is `full_decode_only` the kernels of an iteration with prompts are launched one by one. `pipeline`:",
              "with pipeline stages, whether who arrives is scheduled as soon as fewer batches than stages are in",
              "flight, and what `max_num_seqs` limits: all batches together, each, or all with equal shares.",
              ""]
    for p in presets:
        also = f" (also `{'`, `'.join(p.aliases)}`)" if p.aliases else ""
        lines += [f"## {p.name}{also}", "", f"Imitates {p.engine}, {p.version}.", "",
                  f"Valid for: {p.validity}", "", "Leaves out:", "",
                  *(f"* {x}" for x in p.leaves_out), "", f"Source: {p.source}.", ""]
    return "\n".join(lines).rstrip() + "\n"
