"""A scenario: model, device, engine, cluster, workload, limits and cost, as `scenario.toml` writes them.

Everything is checked here, on the host, before anything is compiled; what is wrong is told as one
`InputError` that names the dotted field, the value and the remedy.
"""

import itertools
import math
import os
import re
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from jaxsim._core.errors import InputError, suggest
from jaxsim.spec.device import DeviceSpec, load_device
from jaxsim.spec.engine import EngineConfig, Share, Text
from jaxsim.spec.messages import describe, explain, hints
from jaxsim.spec.model import ModelSpec, load_model
from jaxsim.spec.presets import Scheduler, resolve
from jaxsim.spec.toml import dump_toml, parse_toml

SCHEMA_VERSION = 1

MAX_ITERATION_S = 1 << 15
"""An iteration of fitted coefficients may not take more seconds than this (9 hours)."""

Tokens = Annotated[int, Meta(ge=1, le=1 << 27)]
Level = Annotated[float, Meta(ge=0, le=1)]
Positive = Annotated[float, Meta(gt=0)]
NotNegative = Annotated[float, Meta(ge=0)]
Coefficient = Annotated[float, Meta(ge=0, le=MAX_ITERATION_S)]

ArrivalKind = Literal["poisson", "gamma", "weibull", "deterministic", "mmpp", "batch", "closed-loop",
                      "azure-conv-2023", "trace"]
_GENERATED = ("poisson", "gamma", "weibull", "deterministic", "mmpp", "batch", "closed-loop", "azure-conv-2023")
_WITHOUT_RATE = ("batch", "closed-loop")
_FIELDS_OF_KIND = {
    "concurrency": ("closed-loop",),
    "think_s": ("closed-loop",),
    "cv": ("gamma", "weibull"),
    "rate_ratio": ("mmpp",),
    "high_dwell_s": ("mmpp",),
    "low_dwell_s": ("mmpp",),
    "trace": ("trace",),
    "format": ("trace",),
    "slice": ("trace",),
    "sort": ("trace",),
    "drop_failed": ("trace",),
    "input": _GENERATED,
    "output": _GENERATED,
    "lengths_from": _GENERATED,
}
_DEFAULT_REQUESTS = 1000


class _Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """Common rules: immutable, unknown fields refused, defaults not written back."""


class ModelSection(_Section, frozen=True):
    """Which model runs.

        name: a name of `jaxsim list models`, or a Hugging Face id that the catalogue knows.
        config: path of a Hugging Face config.json, instead of a name.
        dimensions: every dimension of a model that is in no catalogue (`jaxsim.spec.model.ModelSpec`); name is then
            only a label.
        dtype: weights and activations (bf16, fp16, fp8, int8, int4, ...); the model's own if left out.
        kv_dtype: KV cache; the same as dtype if left out.
    """

    name: Text | None = None
    config: Text | None = None
    dimensions: dict[str, Any] | None = None
    dtype: Text | None = None
    kv_dtype: Text | None = None

    def spec(self) -> ModelSpec:
        """The model itself. Raises `InputError` where it cannot be had."""
        if self.dimensions is not None:
            return ModelSpec.from_dict({"name": self.name, **self.dimensions}, "model.dimensions")
        return ModelSpec.from_hf_config(self.config) if self.config is not None else load_model(self.name)


class DeviceSection(_Section, frozen=True):
    """What it runs on.

        name: a name of `jaxsim list devices`.
        numbers: every number of a device that is in no catalogue (`jaxsim.spec.device.DeviceSpec`); name is then only
            a label.
    """

    name: Text
    numbers: dict[str, Any] | None = None

    def spec(self) -> DeviceSpec:
        """The device itself. Raises `InputError` where it cannot be had."""
        if self.numbers is not None:
            return DeviceSpec.from_dict({"name": self.name, **self.numbers}, "device.numbers")
        return load_device(self.name)


class ClusterSection(_Section, frozen=True):
    """How many engines, and who chooses among them.

        replicas: independent engines, each with its own queue and KV pool.
        router: a name of `jaxsim list policies`, or the dotted path of a router class; round_robin if left out, or with
            data-parallel ranks vLLM's own balancer among all of them.
        router_weights: numbers of the router, where it has any.
    """

    replicas: Annotated[int, Meta(ge=1, le=4096)] = 1
    router: Text | None = None
    router_weights: dict[str, float] = {}


class FixedLength(_Section, frozen=True, tag_field="kind", tag="fixed"):
    """The same for every request.

        tokens: the length.
    """

    tokens: Tokens


class UniformLength(_Section, frozen=True, tag_field="kind", tag="uniform"):
    """Whole numbers, all equally likely.

        min_tokens: smallest length.
        max_tokens: largest length.
    """

    min_tokens: Tokens
    max_tokens: Tokens


class LogNormalLength(_Section, frozen=True, tag_field="kind", tag="log-normal"):
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


class QuantilesLength(_Section, frozen=True, tag_field="kind", tag="quantiles"):
    """Any measured distribution as a table of its quantiles, linear in between.

        levels: rising from 0 to 1.
        tokens: the quantiles at those levels.
    """

    levels: Annotated[tuple[Level, ...], Meta(min_length=2)]
    tokens: Annotated[tuple[Tokens, ...], Meta(min_length=2)]


Length = Tokens | FixedLength | UniformLength | LogNormalLength | QuantilesLength


class TenantSection(_Section, frozen=True):
    """A class of requests.

        name: a label carried to the results.
        share: its part of the requests, relative to the others.
        priority: smaller is more urgent; counts under engine.scheduling_policy = "priority".
    """

    name: Text
    share: Positive = 1.0
    priority: Annotated[int, Meta(ge=-1_000_000, le=1_000_000)] = 0


class TraceSlice(_Section, frozen=True):
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


class WorkloadSection(_Section, frozen=True):
    """What arrives.

        kind: the arrival process, a fitted generator by name, or the replay of a trace.
        rate_rps: mean arrivals a second over the whole cluster. A trace without it keeps its own times.
        num_requests: requests simulated; 1000, or the whole trace, if left out.
        seed: of all random draws; run k of `num_seeds` uses seed + k.
        cv: coefficient of variation of the gaps (gamma, weibull); 1 is as bursty as Poisson.
        concurrency: clients that each have one request at a time (closed-loop).
        think_s: from an answer to the client's next request; 0 if left out (closed-loop).
        rate_ratio: high rate over low rate (mmpp).
        high_dwell_s: mean time at the high rate (mmpp).
        low_dwell_s: mean time at the low rate (mmpp).
        trace: the file replayed.
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
        tenants: classes of requests.
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

    def generator_arguments(self) -> dict[str, Any]:
        """Arguments of `jaxsim.workload.named.generator`, tenants apart; not for a trace."""
        if self.kind == "trace":
            raise ValueError("a trace is read, not generated")
        numbers = {name: getattr(self, name) for name in ("cv", "rate_ratio", "high_dwell_s", "low_dwell_s")}
        laws = {name: _plain(getattr(self, name)) for name in ("input", "output")}
        # Everything at once is any process at an infinite rate.
        kind, rate_rps = {
            **dict.fromkeys(_WITHOUT_RATE, ("deterministic", math.inf)), "mmpp": ("mmpp2", self.rate_rps)}.get(
            self.kind, (self.kind, self.rate_rps))
        given = {**numbers, **laws, "output_limit": self.output_limit, "rate_rps": rate_rps}
        return {"kind": kind, "spearman": self.spearman, **{k: v for k, v in given.items() if v is not None}}


    def trace_options(self) -> dict[str, Any]:
        """Options of `jaxsim.traces.read_trace`, the seed apart; only for a trace."""
        own = {name: getattr(self, name) for name in ("rate_rps", "num_requests", "sort", "drop_failed")}
        part = {} if self.slice is None else {n: getattr(self.slice, n) for n in TraceSlice.__struct_fields__}
        return {name: value for name, value in (own | part).items() if value is not None}


class SloSection(_Section, frozen=True):
    """Limits a good request meets, all of those given at once.

        ttft_ms: time to first token.
        tpot_ms: time per output token after the first.
        e2e_ms: arrival to last token.
    """

    ttft_ms: Positive | None = None
    tpot_ms: Positive | None = None
    e2e_ms: Positive | None = None


class FittedForm(_Section, frozen=True):
    """Seconds: a + b x prefill tokens + c x decode context + d x sequences + e x prefill pairs.

        min_sequences: the form holds from this number of sequences on.
        a: seconds.
        b: seconds a prompt token computed.
        c: seconds a KV token that decodes read, the new one included.
        d: seconds a sequence in the batch.
        e: seconds a unit of (history + chunk)^2 - history^2, summed over prompt chunks.
    """

    min_sequences: Annotated[int, Meta(ge=0)] = 0
    a: Coefficient = 0.0
    b: Coefficient = 0.0
    c: Coefficient = 0.0
    d: Coefficient = 0.0
    e: Coefficient = 0.0

    @property
    def row(self) -> tuple[float, ...]:
        """(min_sequences, a, b, c, d, e), as `jaxsim.cost.fitted.fitted` takes them."""
        return (self.min_sequences, self.a, self.b, self.c, self.d, self.e)


Pieces = FittedForm | tuple[FittedForm, ...]


class RooflineCost(_Section, frozen=True, tag_field="kind", tag="roofline"):
    """Operators against the device's peaks.

        overrides: parameters of the roofline by name, instead of their calibrated values.
        host: whose host overheads are taken; those of the preset's engine if left out.
        distinct_experts: how many experts a batch reads: as expected under uniform routing, the tokens' top-k
            with no overlap, or all.
        front_end_s: seconds of a request outside the engine (HTTP server, tokenizer), in TTFT and end to end; those of
            `host` if left out, 0 where clocks are inside the engine.
    """

    overrides: dict[str, float] = {}
    host: Text | None = None
    distinct_experts: Literal["expected", "topk", "all"] = "expected"
    front_end_s: NotNegative | None = None


class ProfiledCost(_Section, frozen=True, tag_field="kind", tag="profiled"):
    """Measured operator times; the roofline prices what was not measured and continues what was.

        path: a profile that `jaxsim import-profile` wrote, of the model, device and tensor-parallel degree that run.
        overrides: parameters of that roofline by name, instead of their calibrated values.
        host: whose host overheads are taken, unless the profile holds its own; those of the preset's engine if left
            out.
        distinct_experts: as for the roofline; also where a profile's expert times are read.
        front_end_s: as for the roofline.
    """

    path: Text
    overrides: dict[str, float] = {}
    host: Text | None = None
    distinct_experts: Literal["expected", "topk", "all"] = "expected"
    front_end_s: NotNegative | None = None


class FittedCost(_Section, frozen=True, tag_field="kind", tag="fitted"):
    """Coefficients from the user, by composition of the iteration, piecewise in its number of sequences.

        prefill: iterations of prompt chunks only.
        decode: iterations of decodes only.
        mixed: iterations of both; made from the other two if left out.
        exact: keep what float32 rounds off, to compare long runs with another simulator's to the microsecond.
        front_end_s: seconds of a request outside the engine; 0 if left out.
    """

    prefill: Pieces
    decode: Pieces
    mixed: Pieces | None = None
    exact: bool = False
    front_end_s: NotNegative | None = None

    def rows(self, kind: str) -> list[tuple[float, ...]] | None:
        """Rows (min_sequences, a, b, c, d, e) of `prefill`, `decode` or `mixed`; None where left out."""
        forms = getattr(self, kind)
        if forms is None:
            return None
        return [f.row for f in (forms if isinstance(forms, tuple) else (forms,))]


class Scenario(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """One simulated system under one workload. Build it with `from_toml` or `from_dict`, which check it.

        schema_version: of this format.
        name: a label.
        description: what it shows.
        model: which model runs; may be left out with a fitted cost.
        device: what it runs on; may be left out with a fitted cost.
        engine: the serving engine.
        cluster: replicas and router.
        workload: what arrives.
        slo: limits.
        cost: seconds of an iteration.
        num_seeds: independent runs, from which intervals are made.
        warmup_s: requests that arrive in the first seconds are left out of the metrics.
    """

    schema_version: Literal[1]
    name: str = ""
    description: str = ""
    model: ModelSection | None = None
    device: DeviceSection | None = None
    engine: EngineConfig = EngineConfig()
    cluster: ClusterSection = ClusterSection()
    workload: WorkloadSection
    slo: SloSection = SloSection()
    cost: RooflineCost | ProfiledCost | FittedCost = RooflineCost()
    num_seeds: Annotated[int, Meta(ge=1, le=10_000)] = 8
    warmup_s: NotNegative = 0.0

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Scenario":
        """From nested dictionaries as `tomllib` gives them; NumPy scalars and arrays count as numbers and lists.

        Raises `InputError` for the first thing wrong.
        """
        if not isinstance(values, Mapping):
            raise InputError("scenario", values, "is not a table of fields",
                             "give nested dictionaries, or use Scenario.from_toml(path) or Scenario.named(name)")
        tree = _builtin(values, "")
        cost = tree.get("cost")
        of_fitted = set(FittedCost.__struct_fields__) - set(RooflineCost.__struct_fields__)
        if isinstance(cost, dict) and "kind" not in cost and cost.keys().isdisjoint(of_fitted):
            cost["kind"] = (ProfiledCost if "path" in cost else RooflineCost).__struct_config__.tag
        try:
            scenario = msgspec.convert(tree, cls)
        except msgspec.ValidationError as error:
            raise explain(str(error), tree, cls) from None
        _check(scenario)
        return scenario

    @classmethod
    def from_toml(cls, path: str | Path) -> "Scenario":
        """From a file, or the shipped scenario of that name. Relative paths inside a file count from its folder."""
        return cls.from_dict(read_tree(path))

    @classmethod
    def named(cls, name: str) -> "Scenario":
        """A shipped scenario, by its name in `jaxsim list scenarios`."""
        shipped = shipped_scenarios()
        if not isinstance(name, str) or name not in shipped:
            raise InputError("scenario", name, "no scenario of that name", suggest(str(name), shipped))
        with resources.as_file(shipped[name]) as path:
            return cls.from_dict(read_tree(path))

    @property
    def dtype(self) -> str:
        """Weights and activations, wherever they were given; "auto" is the model's own."""
        return _first_given(self.model and self.model.dtype, self.engine.dtype)

    @property
    def kv_dtype(self) -> str:
        """KV cache, wherever it was given; "auto" is the width of the activations."""
        return _first_given(self.model and self.model.kv_dtype, self.engine.kv_cache_dtype)

    @property
    def num_requests(self) -> int | None:
        """Requests simulated; None is a whole trace."""
        if self.workload.num_requests is None and self.workload.kind != "trace":
            return _DEFAULT_REQUESTS
        return self.workload.num_requests

    @property
    def seeds(self) -> tuple[int, ...]:
        """Seed of each of the independent runs."""
        return tuple(self.workload.seed + k for k in range(self.num_seeds))

    def to_dict(self) -> dict[str, Any]:
        """Nested dictionaries without defaults; `from_dict` gives the scenario back."""
        return _without_none(msgspec.to_builtins(self))

    def to_toml(self) -> str:
        """The scenario as a file's text; `from_toml` gives it back."""
        return dump_toml(self.to_dict())

    def checked(self) -> "Scenario":
        """Itself, checked again: for scenarios made by calling the class or `msgspec.structs.replace`."""
        try:
            return type(self).from_dict(self.to_dict())
        except TypeError as error:
            raise InputError("scenario", self.name, str(error), "use plain numbers and strings") from None

    def with_values(self, values: dict[str, Any]) -> "Scenario":
        """A copy with dotted fields replaced, e.g. {"engine.max_num_seqs": 64}; None is the default."""
        if not isinstance(values, Mapping):
            raise InputError("values", values, "is not a table of fields", 'write e.g. {"engine.max_num_seqs": 64}')
        tree = self.to_dict()
        for dotted, value in values.items():
            if not isinstance(dotted, str):
                raise InputError("a field name", dotted, "is not text", 'write e.g. {"engine.max_num_seqs": 64}')
            _assign(tree, dotted, value)
        return type(self).from_dict(tree)


def read_tree(path: str | Path) -> dict[str, Any]:
    """The fields of a scenario file, or of the shipped scenario of that name, not checked yet."""
    remedy = "give a scenario file, or a name of `jaxsim list scenarios`"
    if not isinstance(path, (str, os.PathLike)) or not str(path):
        raise InputError("scenario", path, "is not the path of a file", remedy)
    given, path = str(path), Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise InputError("scenario", given, "is not UTF-8 text", "save it as UTF-8") from None
    except (OSError, ValueError) as error:
        if given in shipped_scenarios():
            return Scenario.named(given).to_dict()
        if isinstance(error, FileNotFoundError) and path.suffix != ".toml":
            raise InputError("scenario", given, "no such file, and no scenario of that name",
                             suggest(given, shipped_scenarios())) from None
        raise InputError("scenario", given, getattr(error, "strerror", None) or "cannot be read", remedy) from None
    return _anchor(parse_toml(text, given), path.parent)


def shipped_scenarios() -> dict[str, Any]:
    """Scenario files that come with the package, by name."""
    folder = resources.files("jaxsim.scenarios")
    files = sorted((f for f in folder.iterdir() if f.name.endswith(".toml")), key=lambda f: f.name)
    return {f.name.removesuffix(".toml"): f for f in files}


def _first_given(*dtypes: str | None) -> str:
    return next((d for d in dtypes if d not in (None, "auto")), "auto")


def _builtin(node: Any, path: str) -> Any:
    """A copy made of dictionaries, lists and Python's own numbers, all of them finite."""
    if isinstance(node, os.PathLike):
        return os.fspath(node)
    if isinstance(node, msgspec.Struct):
        node = msgspec.to_builtins(node)
    elif hasattr(node, "tolist"):
        # NumPy's scalars and arrays, and whatever else behaves like them.
        node = node.tolist()
    if isinstance(node, Mapping):
        return {key: _builtin(value, f"{path}.{key}" if path else str(key)) for key, value in node.items()}
    if isinstance(node, (list, tuple)):
        return [_builtin(value, f"{path}[{index}]") for index, value in enumerate(node)]
    if isinstance(node, float) and not math.isfinite(node):
        raise InputError(path, node, "not a finite number", "leave the field out, or give a finite number")
    return node


def _without_none(node: Any) -> Any:
    if isinstance(node, dict):
        return {k: _without_none(v) for k, v in node.items() if v is not None}
    return [_without_none(v) for v in node] if isinstance(node, (list, tuple)) else node


_PATHS = (("workload", "trace"), ("workload", "lengths_from"), ("model", "config"), ("engine", "preset"),
          ("cost", "path"))


def _anchor(tree: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Relative paths of a file, made relative to its folder."""
    for *parents, last in _PATHS:
        node: Any = tree
        for key in parents:
            node = node.get(key) if isinstance(node, dict) else None
        value = node.get(last) if isinstance(node, dict) else None
        if isinstance(value, str) and value and (last != "preset" or value.endswith(".toml")):
            node[last] = str(folder / value)
    return tree


def _assign(tree: dict[str, Any], dotted: str, value: Any) -> None:
    keys = dotted.split(".")
    if not all(keys):
        raise InputError(dotted, value, "not a field", "write section.field, e.g. engine.max_num_seqs")
    node: Any = tree
    for depth, key in enumerate(keys):
        is_last = depth == len(keys) - 1
        where = ".".join(keys[: depth + 1])
        if isinstance(node, list):
            if not key.isdecimal() or int(key) >= len(node):
                raise InputError(where, value, f"not an index of a list of {len(node)}", "count from 0")
            key = int(key)
        elif not isinstance(node, dict):
            raise InputError(dotted, value, f"{'.'.join(keys[:depth])} has no fields", "write section.field")
        elif is_last and value is None:
            node.pop(key, None)
            return
        elif not is_last and not isinstance(node.get(key), (dict, list)):
            # A shorthand (`input = 512`) gives way to a table.
            node[key] = {}
        if is_last:
            node[key] = value
        else:
            node = node[key]


# ---- rules between fields


def _check(s: Scenario) -> None:
    _check_engine(s)
    _check_system(s)
    _check_workload(s)
    _check_sizes(s)


def _check_engine(s: Scenario) -> None:
    engine = s.engine
    if engine.pipeline_parallel_size != 1:
        raise InputError("engine.pipeline_parallel_size", engine.pipeline_parallel_size, "not there yet",
                         "use 1, and engine.tensor_parallel_size where that is what you need")
    scheduler = resolve(engine)
    if engine.enable_prefix_caching and (scheduler.phase_mix != "unified" or scheduler.reserve != "none"
                                         or not scheduler.kv_accounting):
        raise InputError("engine.enable_prefix_caching", True,
                         f"is simulated as vLLM V1 does it, which {scheduler.preset} is not as set here",
                         "use a preset 'vllm-v1', or leave it out")
    for ours, theirs in (("dtype", "dtype"), ("kv_dtype", "kv_cache_dtype")):
        given, other = s.model and getattr(s.model, ours), getattr(engine, theirs)
        if {given, other}.isdisjoint((None, "auto")) and given != other:
            raise InputError(f"engine.{theirs}", other, f"differs from model.{ours} = {given!r}",
                             "give one of them")


def _check_system(s: Scenario) -> None:
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
        for field in ("model", "device"):
            if getattr(s, field) is None:
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


def _check_workload(s: Scenario) -> None:
    w = s.workload
    for field, kinds in _FIELDS_OF_KIND.items():
        value = getattr(w, field)
        if value is not None and w.kind not in kinds:
            raise InputError(f"workload.{field}", _plain(value), f"has no effect with kind = {w.kind!r}",
                             "leave it out, or use kind = " + " or ".join(map(repr, kinds)))
    needed = {"gamma": ("cv",), "weibull": ("cv",), "mmpp": ("rate_ratio", "high_dwell_s", "low_dwell_s"),
              "trace": ("trace",), "closed-loop": ("concurrency",)}.get(w.kind, ())
    if w.kind not in ("trace", *_WITHOUT_RATE, "azure-conv-2023"):
        needed = ("rate_rps", *needed)
    for field in needed:
        if getattr(w, field) is None:
            raise InputError(f"workload.{field}", None, f"missing, and kind = {w.kind!r} needs it",
                             f"give {describe(hints(WorkloadSection)[field])}")
    if w.kind in _WITHOUT_RATE and w.rate_rps is not None:
        why = "all arrive at once" if w.kind == "batch" else "answers bring requests about"
        raise InputError("workload.rate_rps", w.rate_rps, f"has no effect where {why}",
                         "leave it out, or use kind = 'poisson'")
    if w.lengths_from is not None:
        for field in ("input", "output", "spearman"):
            if getattr(w, field):
                raise InputError(f"workload.{field}", _plain(getattr(w, field)),
                                 "given together with lengths_from",
                                 "give laws, or a trace to draw the lengths from")
    if w.spearman and w.kind == "trace":
        raise InputError("workload.spearman", w.spearman, "has no effect with kind = 'trace'", "leave it out")
    for field in ("input", "output"):
        _check_length(f"workload.{field}", getattr(w, field))
    names = [t.name for t in w.tenants]
    if len(set(names)) < len(names):
        raise InputError("workload.tenants", names, "two have the same name", "give each its own")
    if w.slice and w.slice.end_s is not None and w.slice.end_s <= w.slice.start_s:
        raise InputError("workload.slice.end_s", w.slice.end_s, f"not after start_s = {w.slice.start_s}",
                         "give a later end")
    span_s = _arrival_span_s(s)
    if s.warmup_s > 0 and span_s is not None and s.warmup_s >= span_s:
        raise InputError("warmup_s", s.warmup_s,
                         f"leaves no request to measure: they arrive within about {span_s:.4g} s",
                         "lower it, or raise workload.num_requests")


def _arrival_span_s(s: Scenario) -> float | None:
    """Seconds over which requests arrive, on average; None where only the trace or the generator knows."""
    w = s.workload
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
        levels, tokens = law.levels, law.tokens
        if levels[0] != 0 or levels[-1] != 1 or not _is_rising(levels):
            raise InputError(f"{field}.levels", levels, "do not rise from 0 to 1",
                             "sort them, 0 and 1 included")
        if len(tokens) != len(levels) or list(tokens) != sorted(tokens):
            raise InputError(f"{field}.tokens", tokens, f"are not {len(levels)} rising lengths",
                             "give one quantile a level")


def _is_rising(numbers: Any) -> bool:
    return all(a < b for a, b in itertools.pairwise(numbers))


def _plain(value: Any) -> Any:
    return msgspec.to_builtins(value) if hasattr(value, "__struct_fields__") else value


def _longest(law: Any) -> int | None:
    """The largest length a law can give; None where it is not known here."""
    if isinstance(law, int):
        return law
    if isinstance(law, QuantilesLength):
        return law.tokens[-1]
    return law.tokens if isinstance(law, FixedLength) else getattr(law, "max_tokens", None)


def _check_sizes(s: Scenario) -> None:
    """What can already be said about the longest request; the engine checks the lengths actually drawn."""
    w, engine = s.workload, s.engine
    scheduler = resolve(engine)
    model = _known_model(s)
    prompt, output = _longest(w.input), _longest(w.output)
    if isinstance(s.cost, FittedCost):
        limit = engine.max_model_len or (model.max_position if model else None)
        longest = min((n for n in (limit, prompt and prompt + (output or limit or 0)) if n), default=None)
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


def _known_model(s: Scenario) -> ModelSpec | None:
    """The model, where it can be had: what is wrong with it is told when the system is put together."""
    try:
        return s.model.spec() if s.model else None
    except InputError:
        return None


def _check_coefficients(s: Scenario, scheduler: Scheduler, longest: int) -> None:
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


# ---- JSON schema


def _field_docs(struct: type) -> dict[str, str]:
    """`name: text` lines of a section's docstring (continued on deeper lines)."""
    docs: dict[str, str] = {}
    name = None
    for line in (struct.__doc__ or "").splitlines():
        found = re.match(r" {8}(\w+): (.*)", line)
        if found and found.group(1) in struct.__struct_fields__:
            name = found.group(1)
            docs[name] = found.group(2)
        elif name and re.match(r" {12}\S", line):
            docs[name] += " " + line.strip()
        else:
            name = None
    return docs


def json_schema() -> dict[str, Any]:
    """The JSON schema of `scenario.toml`, descriptions taken from the docstrings."""
    (_,), definitions = msgspec.json.schema_components([Scenario], ref_template="#/$defs/{name}")
    sections = [Scenario, EngineConfig, *(c for c in globals().values() if isinstance(c, type)
                                          and issubclass(c, _Section) and c is not _Section)]
    for struct in sections:
        node = definitions.get(struct.__name__)
        if node is None:
            continue
        node["description"] = (struct.__doc__ or "").split("\n")[0]
        for name, text in _field_docs(struct).items():
            field = node["properties"][name]
            # Siblings of $ref are ignored by older validators.
            field = {"allOf": [field]} if "$ref" in field else field
            node["properties"][name] = {"description": text, **field}
    root = definitions.pop("Scenario")
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **root,
            "title": f"jaxsim scenario, version {SCHEMA_VERSION}", "$defs": definitions}
