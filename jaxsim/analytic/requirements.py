"""From a use case to the platform that it needs: capacity, bandwidth, compute and links, by device and in total.

Each resource alone, in closed form, what no platform can do without:

    memory        weights + B (KV(input) + beams KV(output))                            of the fullest device
    bandwidth     max over passes of  bytes / (limit eta_m)                             limit: TTFT of a prompt pass,
    compute       max over passes of  FLOP / (limit eta_c)                              TPOT of a decode pass
    link          max over passes of  wire bytes / (s/2 limit eta_l)                    each way, s: share for links
    link latency  min over passes of  s/2 limit / hops

Together, links have the share s of each limit, half of it for bytes and half for hops, and operators what is left. An
operator takes the longer of its arithmetic and its reads, so each limit asks for more than either alone: FLOP/s and
bytes/s at which both limits are just met, by Newton's method on their logarithms (`balanced`), with links at their
closed forms. Where no such pair exists, because a prompt pass is bound by reads or a decode by arithmetic
whatever the other, both grow over their closed forms by one factor until the tighter limit is met.

A decode pass is the last one of a request, with all of its output behind the prompt; a prompt pass computes all prompts
of the batch at once, unless told how many of them. With pipeline stages a limit is for the way through all of them:
they add capacity, not speed.

    found = requirements("llama-3.1-70b", input_tokens=3000, output_tokens=1000, ttft_ms=500, tpot_ms=20, batch=16,
                         plan=Plan(tensor_parallel_size=4))
    found.rows, found.verdict

Numbers are plain 64-bit floats: models of tens of trillions of parameters are no different. `balanced` and the passes
(`jaxsim.analytic.ideal`) are differentiable in every number, in 32 bits too, to some of their last digits.

Source: GenZ (arXiv 2406.01698) section 7; its form of bandwidth from notes on the paper, of the others reconstructed.
"""

import dataclasses
import functools
import math
import numbers
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import msgspec
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from jaxsim._core.errors import InputError, suggest
from jaxsim._core.precision import enable_x64
from jaxsim.analytic import ideal
from jaxsim.analytic.ideal import WIDER, Memory, Pass, PassSeconds, Platform
from jaxsim.analytic.implicit import root
from jaxsim.analytic.lower import of_scenario
from jaxsim.analytic.steady import steady_state
from jaxsim.cost.operators import DISTINCT_EXPERTS, EXPECTED
from jaxsim.engine import lower
from jaxsim.spec.model import ModelSpec, load_model
from jaxsim.spec.plan import Plan, kv_cache_bytes, plan_of, weight_format
from jaxsim.spec.presets import Scheduler, resolve
from jaxsim.spec.quantization import WeightFormat
from jaxsim.spec.scenario import Scenario

Scalar = Float[Array, ""] | float

STEPS = 60
"""Of Newton's method."""

LONGEST_STEP = 2.0
"""Of a logarithm in one of them."""

MET = 1e-6
"""Relative distance from a limit that counts as met, or what rounding leaves of it (`MET_ROUNDINGS`)."""

MET_ROUNDINGS = 256
"""Last digits that a sum of some tens of operators, and Newton's step from it, may be off: 3e-5 in 32 bits."""

MOST_FACTOR_LOG = 40.0
"""Logarithm of the largest common factor over the closed forms."""


class Efficiencies(NamedTuple):
    """Shares of peaks that are reached.

    Source: compute, GenZ's for eight H100 [secondary], and the asymptote of Vidur's V100 products; memory,
    aiconfigurator's default for all NVIDIA parts; link, NCCL's bus bandwidth over NVLink 4, 64 to 87 % for 2 to 8.
    """

    compute: float = 0.75
    memory: float = 0.8
    link: float = 0.75


USUAL = Efficiencies()


USE_CASES = {
    "question-answering": dict(input_tokens=1000, output_tokens=200, beams=4, ttft_s=0.2, tpot_s=0.010),
    "chat": dict(input_tokens=3000, output_tokens=1000, beams=2, ttft_s=0.2, tpot_s=0.010),
    "question-answering-rag": dict(input_tokens=10_000, output_tokens=200, beams=4, ttft_s=0.4, tpot_s=0.010),
    "summarization": dict(input_tokens=15_000, output_tokens=1000, beams=4, ttft_s=2.0, tpot_s=0.020),
    "code-generation": dict(input_tokens=20_000, output_tokens=50, beams=4, ttft_s=5.0, tpot_s=0.020)}
"""What `UseCase` takes for GenZ's use cases, one request at a time.

Source: abhibambhaniya/GenZ-LLM-Analyzer, commit 12bd09f, variables of its charts: batch, beams, tokens, limits.
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class UseCase:
    """What is asked for.

        model: which model.
        input_tokens, output_tokens: of a request.
        ttft_s: limit of the prompts' pass; tpot_s: of a token.
        batch: requests at once; beams: sequences of each; prompts: those of the batch that one pass computes within
            ttft_s, all of them unless given.
        shares_prompt: beams of a request have the prompt's KV once, in memory and in every read.
        plan: how the model is laid out.
        dtype, kv_dtype: number formats (`jaxsim.spec.plan`); "auto" the model's own.
        distinct_experts: experts that a pass reads: expected of uniform routing, topk (whatever the batch), all.
        memory_share: of a device's visible memory, that weights and cache may take.
        notes: what was chosen where nothing was given, in words.
    """

    model: ModelSpec
    input_tokens: float
    output_tokens: float
    ttft_s: float
    tpot_s: float
    batch: int = 1
    beams: int = 1
    prompts: int | None = None
    shares_prompt: bool = True
    plan: Plan = Plan()
    dtype: str = "auto"
    kv_dtype: str = "auto"
    distinct_experts: str = EXPECTED
    memory_share: float = 0.9
    notes: tuple[str, ...] = dataclasses.field(default=(), compare=False)

    def __post_init__(self):
        for field in ("input_tokens", "output_tokens", "batch", "beams"):
            value = getattr(self, field)
            is_whole = field in ("batch", "beams")
            if isinstance(value, bool) or not isinstance(value, numbers.Integral if is_whole else numbers.Real) or (
                    not 1 <= value < float("inf")):
                raise InputError(field, value, "is no count" if is_whole else "is no length of a request",
                                 f"give a {'whole ' if is_whole else ''}number of at least 1")
        prompts = self.batch if self.prompts is None else self.prompts
        if isinstance(prompts, bool) or not isinstance(prompts, numbers.Integral) or not 1 <= prompts <= self.batch:
            raise InputError("prompts", prompts, f"is no part of a batch of {self.batch}",
                             "give a whole number from 1 to the batch")
        for field in ("ttft_s", "tpot_s"):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, numbers.Real) or not 0 < value < float("inf"):
                raise InputError(field.replace("_s", "_ms"), _milli(value), "is no limit", "give milliseconds above 0")
        if self.distinct_experts not in DISTINCT_EXPERTS:
            raise InputError("distinct_experts", self.distinct_experts, "is not known",
                             suggest(self.distinct_experts, DISTINCT_EXPERTS))
        if self.batch < self.plan.data_parallel_size:
            raise InputError("batch", self.batch, "leaves data-parallel ranks without a request",
                             f"give at least {self.plan.data_parallel_size}")
        self.plan.check(self.model)

    @property
    def remarks(self) -> tuple[str, ...]:
        """What a reader has to know: the notes, and a context that the model has no positions for."""
        tokens, most = self.input_tokens + self.output_tokens, self.model.max_position
        if tokens <= most:
            return self.notes
        return (*self.notes, f"{tokens:,.0f} tokens are more than the {most:,} positions of {self.model.name}")

    @property
    def fmt(self) -> WeightFormat:
        """Format of the weights."""
        return weight_format(self.dtype, self.model)

    @property
    def kv_bytes(self) -> float:
        """Bytes of a number in the cache."""
        return kv_cache_bytes(self.kv_dtype, self.dtype, self.model)

    @property
    def wider(self) -> float:
        """FLOP/s of the weights' type over those of 16-bit products."""
        return WIDER.get(self.fmt.compute, 1.0)

    def with_plan(self, plan: Plan) -> "UseCase":
        """The same under another plan. Raises `InputError`."""
        return dataclasses.replace(self, plan=plan)

    def memory(self) -> Memory:
        """Bytes of weights and cache."""
        return ideal.memory(self.model, self.plan, self.fmt, self.kv_bytes, prompt=self.input_tokens,
                            generated=self.output_tokens, batch=self.batch, beams=self.beams,
                            shares_prompt=self.shares_prompt)

    def passes(self) -> tuple[Pass, Pass]:
        """The prompts' pass, and the last decode pass, of a device."""
        system = (self.model, self.plan, self.fmt, self.kv_bytes)
        return (ideal.prefill_pass(*system, prompt=self.input_tokens, batch=self.prompts or self.batch,
                                   distinct_experts=self.distinct_experts),
                ideal.decode_pass(*system, prompt=self.input_tokens, generated=self.output_tokens, batch=self.batch,
                                  beams=self.beams, shares_prompt=self.shares_prompt,
                                  distinct_experts=self.distinct_experts))


def _milli(value: Any) -> Any:
    return 1e3 * value if isinstance(value, numbers.Real) and not isinstance(value, bool) else value


class Alone(NamedTuple):
    """Closed forms of one device: FLOP/s, bytes/s, link bytes/s, seconds of a hop; of prompt and decode pass."""

    flops: tuple[Scalar, Scalar]
    memory_bytes_per_s: tuple[Scalar, Scalar]
    link_bytes_per_s: tuple[Scalar, Scalar]
    hop_s: tuple[Scalar, Scalar]


def alone(prefill: Pass, decode: Pass, ttft_s: Scalar, tpot_s: Scalar, efficiencies: Efficiencies = USUAL, *,
          link_share: Scalar = 0.2, wider: Scalar = 1.0) -> Alone:
    """What each resource has to be, were all others without limit and had it all of each limit; links have
    `link_share` of it, half for bytes and half for hops. A pass without links asks for no bandwidth, and for no latency
    (infinity)."""
    rows = []
    for work, limit_s in ((prefill, ttft_s), (decode, tpot_s)):
        wire, hops = work.wire_bytes + work.stage_bytes, work.hops + work.stage_hops
        has_links = jnp.asarray(hops) > 0
        link_s = 0.5 * link_share * limit_s
        rows.append((work.scaled_flops(wider) / (limit_s * efficiencies.compute),
                     jnp.sum(work.bytes) / (limit_s * efficiencies.memory), wire / (link_s * efficiencies.link),
                     jnp.where(has_links, link_s / jnp.where(has_links, hops, 1.0), jnp.inf)))
    return Alone(*zip(*rows, strict=True))


class Balanced(NamedTuple):
    """FLOP/s and bytes/s of a device; whether both limits are just met, or only the tighter one."""

    flops: Scalar
    memory_bytes_per_s: Scalar
    is_met_by_both: Scalar


def balanced(prefill: Pass, decode: Pass, ttft_s: Scalar, tpot_s: Scalar, least: Platform, *, wider: Scalar = 1.0
             ) -> Balanced:
    """FLOP/s and bytes/s with which both passes take just their limits, links and efficiencies being those of `least`.

    least: with FLOP/s and bytes/s to begin with, at or below what is needed (`alone`).
    Unknown are the logarithms of both over those of `least`, so that nothing is lost to the size of the numbers.
    Logarithms of seconds are convex in them, so Newton's method comes from the side of too little. Derivative: implicit
    function theorem.
    """
    begin = jnp.stack([jnp.asarray(x, float) for x in (least.flops, least.memory_bytes_per_s)])
    digit = float(jnp.finfo(begin.dtype).eps)

    def gaps(more: Float[Array, "2"]) -> Float[Array, "2"]:
        platform = _with(least, *(begin * jnp.exp(more)), wider)
        return jnp.log(jnp.stack([prefill.seconds(platform).total / ttft_s, decode.seconds(platform).total / tpot_s]))

    def solve(function, more):
        def improved(_, more):
            # What decides nothing stays where it is.
            slopes = jax.jacfwd(function)(more) - digit ** 0.5 * jnp.eye(2)
            return more - jnp.clip(jnp.linalg.solve(slopes, function(more)), -LONGEST_STEP, LONGEST_STEP)

        return lax.fori_loop(0, STEPS, improved, more)

    def divided(tangent, y):
        return jnp.linalg.solve(jax.jacfwd(tangent)(jnp.zeros_like(y)) - MET_ROUNDINGS * digit * jnp.eye(2), y)

    more = lax.custom_root(gaps, jnp.zeros_like(begin), solve, divided)
    met = max(MET, MET_ROUNDINGS * digit)
    is_met = jnp.all(jnp.abs(gaps(more)) < met) & jnp.all(more > -met)
    factor = root(lambda x: jnp.max(gaps(jnp.stack([x, x]))), 0.0, MOST_FACTOR_LOG)
    flops, moved = begin * jnp.exp(jnp.where(is_met, more, factor))
    return Balanced(flops, moved, is_met)


def _with(platform: Platform, flops: Scalar, moved: Scalar, wider: Scalar) -> Platform:
    return dataclasses.replace(platform, flops=flops, wide_flops=flops / wider, memory_bytes_per_s=moved)


class Row(NamedTuple):
    """One requirement, in SI units.

    alone: of a device, in closed form; per_device and total: together with the others. bound_by: what sets it.
    """

    requirement: str
    unit: str
    alone: float
    per_device: float
    total: float | None
    bound_by: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Requirements:
    """The platform that a use case needs. Plain 64-bit numbers.

    memory: bytes. alone: closed forms; platform: one device that meets the limits, links at their closed forms;
    ttft, tpot: seconds of both passes on it. is_met_by_both: whether neither limit could be tightened.
    """

    use_case: UseCase
    efficiencies: Efficiencies
    link_share: float
    memory: Memory
    prefill: Pass
    decode: Pass
    alone: Alone
    platform: Platform
    ttft: PassSeconds
    tpot: PassSeconds
    is_met_by_both: bool

    @property
    def num_devices(self) -> int:
        """Devices of the plan."""
        return self.use_case.plan.num_devices

    @property
    def has_links(self) -> bool:
        """Whether devices exchange anything."""
        return self.num_devices > 1 and max(self.alone.link_bytes_per_s) > 0

    @functools.cached_property
    def rows(self) -> tuple[Row, ...]:
        """Memory, bandwidth, compute, and links where there are any."""
        n, kept = self.num_devices, self.memory
        weights = kept.weights / kept.device_bytes
        rows = [Row("memory", "B", kept.device_bytes, kept.device_bytes, kept.total_bytes,
                    f"weights {weights:.0%}, KV cache {1 - weights:.0%}")]
        platform, closed = self.platform, self.alone
        rows.append(Row("memory bandwidth", "B/s", max(closed.memory_bytes_per_s), platform.memory_bytes_per_s,
                        n * platform.memory_bytes_per_s, self._reads()))
        rows.append(Row("compute", "FLOP/s", max(closed.flops), platform.flops, n * platform.flops, self._work()))
        if self.has_links:
            bandwidth, hop = closed.link_bytes_per_s, closed.hop_s
            rows.append(Row("link bandwidth, each way", "B/s", max(bandwidth), platform.link_bytes_per_s, None,
                            f"{_limit(bandwidth)}, {self.link_share / 2:.0%} of it"))
            collectives = (self.prefill, self.decode)[hop.index(min(hop))].starts
            rows.append(Row("link latency, at most", "s", min(hop), platform.hop_s, None, f"{_limit(hop, min)},"
                            f" {self.link_share / 2:.0%} of it, {float(collectives):.0f} collectives"))
        return tuple(rows)

    def _reads(self) -> str:
        index = _index(self.alone.memory_bytes_per_s)
        work = (self.prefill, self.decode)[index]
        # Projections of attention are products of weights.
        total, cache = work.bytes_of(""), work.bytes_of("attention", but="attention_output")
        return f"{_limit(self.alone.memory_bytes_per_s)}: KV cache {cache / total:.0%} of reads"

    def _work(self) -> str:
        index = _index(self.alone.flops)
        work = (self.prefill, self.decode)[index]
        wider = self.use_case.wider
        attention = work.flops_of("attention", but="attention_output")
        # Of arithmetic in the weights' type; all of attention is 16-bit.
        share = attention * wider / float(work.scaled_flops(wider, np))
        return f"{_limit(self.alone.flops)}: attention {share:.0%} of FLOP"

    @property
    def verdict(self) -> str:
        """One line."""
        use, kept = self.use_case, self.memory
        whole_s = kept.device_bytes / self.platform.memory_bytes_per_s
        size = f"{use.batch} x {use.beams} beams" if use.beams > 1 else f"{use.batch}"
        devices = f"{self.num_devices} devices" if self.num_devices > 1 else "one device"
        tight = "" if self.is_met_by_both else (
            "; only " + ("TTFT" if self.ttft.total / use.ttft_s > self.tpot.total / use.tpot_s else "TPOT")
            + " is tight")
        return (f"{use.model.name}, batch {size}: {devices} of {three(kept.device_bytes / 1e9)} GB,"
                f" {three(self.platform.memory_bytes_per_s / 1e12)} TB/s and {three(self.platform.flops / 1e12)}"
                f" TFLOP/s ({use.fmt.compute}), which read{'' if self.num_devices > 1 else 's'} all of the memory in"
                f" {three(1e3 * whole_s)} ms{tight}")

    def record(self) -> dict[str, Any]:
        """As JSON has it."""
        use = self.use_case
        return {"model": use.model.name, "num_parameters": use.model.num_parameters,
                "num_active_parameters": use.model.num_active_parameters, "dtype": use.fmt.name,
                "kv_bytes": use.kv_bytes, "compute_type": use.fmt.compute,
                "input_tokens": use.input_tokens, "output_tokens": use.output_tokens, "batch": use.batch,
                "beams": use.beams, "prompts": use.prompts or use.batch, "shares_prompt": use.shares_prompt,
                "distinct_experts": use.distinct_experts,
                "ttft_ms": 1e3 * use.ttft_s, "tpot_ms": 1e3 * use.tpot_s,
                "tensor_parallel_size": use.plan.tensor_parallel_size,
                "pipeline_parallel_size": use.plan.pipeline_parallel_size,
                "data_parallel_size": use.plan.data_parallel_size,
                "enable_expert_parallel": use.plan.enable_expert_parallel, "num_devices": self.num_devices,
                "efficiencies": self.efficiencies._asdict(), "link_share": self.link_share,
                "memory": self.memory._asdict(), "requirements": [row._asdict() for row in self.rows],
                "seconds": {"ttft": self.ttft._asdict() | {"total": self.ttft.total},
                            "tpot": self.tpot._asdict() | {"total": self.tpot.total}},
                "is_met_by_both": self.is_met_by_both, "remarks": list(use.remarks), "verdict": self.verdict}


def three(value: float) -> str:
    """Three digits, more where they stand before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _index(pair: tuple[float, float], best: Any = max) -> int:
    return pair.index(best(pair))


def _limit(pair: tuple[float, float], best: Any = max) -> str:
    return ("TTFT", "TPOT")[_index(pair, best)]


def requirements(model: str | ModelSpec, *, input_tokens: float, output_tokens: float, ttft_ms: float, tpot_ms: float,
                 batch: int = 1, beams: int = 1, prompts: int | None = None, shares_prompt: bool = True,
                 plan: Plan | None = None, dtype: str = "auto", kv_dtype: str = "auto",
                 distinct_experts: str = EXPECTED, efficiencies: Efficiencies = USUAL, link_share: float = 0.2
                 ) -> Requirements:
    """The platform that a use case needs: arguments as in `UseCase`, limits in milliseconds.

    efficiencies: shares of the peaks that are reached; link_share: of each limit, for collectives where there are any.
    Raises `InputError`.
    """
    spec = load_model(model) if isinstance(model, str) else model
    use = UseCase(model=spec, input_tokens=input_tokens, output_tokens=output_tokens, ttft_s=_seconds(ttft_ms),
                  tpot_s=_seconds(tpot_ms), batch=batch, beams=beams, prompts=prompts, shares_prompt=shares_prompt,
                  plan=plan or Plan(), dtype=dtype, kv_dtype=kv_dtype, distinct_experts=distinct_experts)
    return needs(use, efficiencies=efficiencies, link_share=link_share)


def _seconds(value: Any) -> Any:
    return value / 1e3 if isinstance(value, numbers.Real) and not isinstance(value, bool) else value


def needs(use: UseCase, *, efficiencies: Efficiencies = USUAL, link_share: float = 0.2) -> Requirements:
    """The platform that a use case needs. Raises `InputError`."""
    for name, value in (*((f"{k}_efficiency", v) for k, v in efficiencies._asdict().items()),
                        ("link_share", link_share)):
        is_share = isinstance(value, numbers.Real) and not isinstance(value, bool)
        # Something has to be left for operators.
        is_open = name == "link_share"
        if not is_share or not 0 < value <= 1 or (is_open and value == 1):
            raise InputError(name, value, "is out of range",
                             f"give a share above 0, {'below' if is_open else 'at most'} 1")
    with enable_x64(True):
        prefill, decode = use.passes()
        closed = alone(prefill, decode, use.ttft_s, use.tpot_s, efficiencies, link_share=link_share, wider=use.wider)
        closed = jax.tree.map(float, closed)
        has_links = max(closed.link_bytes_per_s) > 0
        link, hop = (max(closed.link_bytes_per_s), min(closed.hop_s)) if has_links else (1.0, 0.0)
        flops = max(closed.flops)
        least = Platform(flops, flops / use.wider, max(closed.memory_bytes_per_s), link, link, 0.0, hop,
                         *efficiencies)
        found = jax.tree.map(float, _balanced(prefill, decode, use.ttft_s, use.tpot_s, least, use.wider))
        platform = _with(least, found.flops, found.memory_bytes_per_s, use.wider)
        ttft, tpot = (PassSeconds(*map(float, work.seconds(platform))) for work in (prefill, decode))
        prefill, decode = (jax.tree.map(np.asarray, work) for work in (prefill, decode))
    return Requirements(use_case=use, efficiencies=efficiencies, link_share=link_share, memory=use.memory(),
                        prefill=prefill, decode=decode, alone=closed, platform=platform, ttft=ttft, tpot=tpot,
                        is_met_by_both=bool(found.is_met_by_both))


_balanced = jax.jit(lambda prefill, decode, ttft_s, tpot_s, least, wider: balanced(
    prefill, decode, ttft_s, tpot_s, least, wider=wider))


LOAD = ("model", "plan", "dtype", "kv_dtype", "input_tokens", "output_tokens", "beams")
"""Fields of a use case that decide how many requests run at a scenario's rate."""


def use_case_of(scenario: Scenario, **changes: Any) -> UseCase:
    """The use case of one replica of a scenario: its model, formats, plan, share of memory and limits, and mean lengths
    of the requests that its first seed draws.

    batch: those that decode on average at the replica's share of the rate, on the scenario's own device in closed form
    (`jaxsim.analytic.steady_state`), at most `max_num_seqs` a rank; `max_num_seqs` itself where that load is not
    stable, has no closed form, or `changes` make it another. prompts: as many as `max_num_batched_tokens` hold of the
    mean length, rounded up. `UseCase.notes` say what was chosen. changes: fields of `UseCase` instead. Raises
    `InputError` for what it has not.
    """
    if scenario.model is None and "model" not in changes:
        raise InputError("model", None, "is missing: a fitted cost has none", "name a model")
    if scenario.cluster.pools:
        raise InputError("cluster.pools", [pool.role for pool in scenario.cluster.pools],
                         "are several platforms", "ask for each with a scenario of its own")
    engine = scenario.engine
    if engine.hybrid is not None:
        raise InputError("engine.hybrid", "given", "is a device and its host, of which ideal passes know one",
                         "leave it out, or simulate it")
    given = dict(changes)
    plan = given.setdefault("plan", plan_of(engine))
    for field in ("prefill_context_parallel_size", "decode_context_parallel_size", "kv_parallel_size"):
        if getattr(plan, field) > 1:
            raise InputError(f"engine.{field}", getattr(plan, field), "is not in ideal passes",
                             "use 1, or simulate it")
    if "model" not in given:
        given |= {"model": scenario.model.spec()}
        given.setdefault("dtype", scenario.dtype)
        given.setdefault("kv_dtype", scenario.kv_dtype)
    if hasattr(scenario.cost, "distinct_experts"):
        given.setdefault("distinct_experts", scenario.cost.distinct_experts)
    if not {"input_tokens", "output_tokens"} <= given.keys():
        drawn = lower.make_workload(scenario, scenario.seeds[0])
        for field in ("input_tokens", "output_tokens"):
            given.setdefault(field, float(getattr(drawn, field).mean()))
    for field, limit_ms in (("ttft_s", scenario.slo.ttft_ms), ("tpot_s", scenario.slo.tpot_ms)):
        if field not in given:
            if limit_ms is None:
                raise InputError(f"slo.{field[:-2]}_ms", None, "is missing", "give the limit, in milliseconds")
            given[field] = limit_ms / 1e3
    s, notes, replicas = _scheduler(scenario), [], scenario.cluster.replicas
    if plan.deep_ep:
        plan = given["plan"] = msgspec.structs.replace(plan, deep_ep="")
        notes.append("DeepEP's exchanges as two all-to-alls")
    given.setdefault("memory_share", s.gpu_memory_utilization)
    if replicas > 1:
        notes.append(f"one of {replicas} replicas")
    if "batch" not in given:
        # Of every data-parallel rank.
        most = s.max_num_seqs * plan.data_parallel_size
        running, why = (_running(scenario) if not set(changes) & set(LOAD)
                        else (None, "the scenario's load is changed"))
        given["batch"] = most if running is None else min(max(math.ceil(running), plan.data_parallel_size), most)
        notes.append(f"batch {given['batch']:,}: max_num_seqs, as {why}" if running is None else
                     f"batch {given['batch']:,}: requests that decode on average {why}")
    if "prompts" not in given:
        whole = math.ceil(s.max_num_batched_tokens * plan.data_parallel_size / given["input_tokens"])
        given["prompts"] = min(whole, given["batch"])
        notes.append(f"prompts of a pass {given['prompts']:,}: " + (
            f"max_num_batched_tokens = {s.max_num_batched_tokens:,} over the mean prompt" if whole <= given["batch"]
            else "all of the batch"))
    return UseCase(**given, notes=tuple(notes))


def _scheduler(scenario: Scenario) -> Scheduler:
    """With the defaults of an engine for the scenario's device, where it has one."""
    if scenario.device is None:
        return resolve(scenario.engine)
    device = scenario.device.spec()
    return resolve(scenario.engine, device_name=device.name, memory_bytes=device.memory_bytes or 0.0,
                   max_model_len=None if scenario.model is None else scenario.model.spec().max_position)


def _running(scenario: Scenario) -> tuple[float | None, str]:
    """Requests that decode on average on a replica, where they do in a steady state; and where, or why not."""
    try:
        executor, load = of_scenario(scenario)
    except InputError as error:
        return None, f"there is no closed form: {error.field} {error.problem}"
    state = _steady_state(executor, load)
    if not bool(state.is_stable):
        return None, "the scenario's own devices do not keep up with its rate"
    rate = float(load.rate_rps) / scenario.cluster.replicas
    return float(state.running) / scenario.cluster.replicas, (
        f"at {three(rate)} requests/s on the scenario's own device, in closed form")


_steady_state = eqx.filter_jit(steady_state)
