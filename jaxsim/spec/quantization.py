"""Weights in fewer bits: what is stored, exactly, what it is called, and what models are known to score with it.

    bits of a matrix = inputs outputs bits + groups (scale_bits + zero_bits)
    groups           = outputs ceil(inputs / group)      inside output channels
                     = inputs ceil(outputs / group)      inside input channels

`Quantization` is the record, `Quantization.from_name` reads the names that `model.dtype` takes, `load_quality` and
`quality` are the published scores.

Source: group quantisation as in GPTQ, AWQ and AdaDim (arXiv 2309.15531; johnheo/adadim-llm, `pseudo_quantize_tensor`:
a 16-bit scale and a zero point of as many bits as a weight for each group).
"""

import functools
import re
from importlib import resources
from typing import Annotated, Literal, NamedTuple, get_args

import msgspec
from msgspec import Meta

from jaxsim._core.errors import InputError, suggest
from jaxsim.spec.messages import convert_table
from jaxsim.spec.model import ModelSpec, load_model
from jaxsim.spec.toml import parse_toml

ComputeType = Literal["fp32", "bf16", "fp8", "int8", "fp4"]
Granularity = Literal["per_output_channel", "per_input_channel"]
Method = Literal["rtn", "gptq", "awq", "hqq", "omniquant", "autoround"]

METHODS: tuple[str, ...] = get_args(Method)
"""Ways of choosing the values. They change what a model scores, not what is stored or how long it takes."""

MOST_BITS = 8
"""Of a quantised weight; 16 bits are not quantised."""

KV_BYTES = {
    "float32": 4, "fp32": 4, "bfloat16": 2, "bf16": 2, "float16": 2, "fp16": 2, "half": 2,
    "fp8": 1, "fp8_e4m3": 1, "fp8_e5m2": 1, "int8": 1, "int4": 0.5,
}
"""Bytes of a cached number by format."""

_KV_SUFFIXES = {"kv4": "int4", "kv8": "int8", "kvfp8": "fp8", "kv16": "float16"}

EXAMPLES = ("int4-g128", "int3-g128", "int2-g128", "int8-channel", "w4a16-g128", "w4a16-g128-perin",
            "gptq-int4-g128-sym", "w4a8kv4-g128")
"""Names to suggest."""


class WeightFormat(NamedTuple):
    """Bytes of a weight and the arithmetic it is multiplied in.

    linear_bytes: projections and dense FFN; expert_bytes: routed experts; other_bytes: embeddings, LM head,
    norms, router, which engines leave unquantised; activation_bytes; compute: tensor-core type of the matrix
    products; kernel: whose constants its products take, "" for those of the arithmetic.
    """

    name: str
    linear_bytes: float
    expert_bytes: float
    other_bytes: float
    activation_bytes: float
    compute: ComputeType
    kernel: str = ""


class Quantization(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How the weights of the linear layers are stored; embeddings, LM head, norms and router stay 16-bit.

        bits: of a weight, an integer.
        group_size: weights that share a scale and a zero point; None = a whole channel.
        scale_bits: of a scale, one a group.
        zero_bits: of a zero point, one a group; None = as many as a weight, 0 = symmetric, none is stored.
        granularity: whether a group lies inside an output channel (along the inputs, as GPTQ and AWQ have it) or
            inside an input channel (along the outputs, so that the weights an outlier multiplies share a group).
        method: how the values were chosen (`METHODS`).
        activation_bits: 16 = weights are dequantised and multiplied in 16 bits; 8 = multiplied as 8-bit integers.
        kv_format: of the KV cache: float16, fp8, int8 or int4; "auto" = as wide as activations.
        experts_only: only routed experts are quantised, the other linear layers stay 16-bit.

    Known gaps: permutations of rows (act-order), sparse outliers kept apart, codebooks, and padding to words (3-bit
    kernels may store 32 weights in 3 words, or each weight in 4 bits).
    """

    bits: int
    group_size: int | None = 128
    scale_bits: int = 16
    zero_bits: int | None = None
    granularity: Granularity = "per_output_channel"
    method: Method = "rtn"
    activation_bits: int = 16
    kv_format: str = "auto"
    experts_only: bool = False

    def __post_init__(self):
        for field, least, most, remedy in (
                ("bits", 1, MOST_BITS, "give 2 to 8, or an unquantised dtype such as bfloat16"),
                ("group_size", 1, 1 << 20, "give 32, 64 or 128, or none for whole channels"),
                ("scale_bits", 1, 32, "give 8, 16 or 32"),
                ("zero_bits", 0, 32, "give the bits of a stored zero point, 0 where there is none")):
            value = getattr(self, field)
            if value is None and field in ("group_size", "zero_bits"):
                continue
            if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
                raise InputError(f"quantization.{field}", value, f"is no whole number from {least} to {most}", remedy)
        for field, known in (("granularity", get_args(Granularity)), ("method", METHODS),
                             ("kv_format", ("auto", *_KV_SUFFIXES.values()))):
            if getattr(self, field) not in known:
                raise InputError(f"quantization.{field}", getattr(self, field), "is not known",
                                 suggest(getattr(self, field), known))
        if self.activation_bits not in (8, 16):
            raise InputError("quantization.activation_bits", self.activation_bits,
                             "activations are multiplied in 8 or in 16 bits", "give 8 or 16")
        if self.experts_only and self.activation_bits != 16:
            raise InputError("quantization.experts_only", True, "goes with activations of 16 bits only",
                             "leave out -experts, or give a16")
        if self.zero_bits == self.bits:
            # One way to say it, so that records that store the same are equal.
            msgspec.structs.force_setattr(self, "zero_bits", None)

    @classmethod
    def from_name(cls, name: str, field: str = "model.dtype") -> "Quantization":
        """The record that a name means.

            [method-]int4-g128[-perin][-sym]      weights of 4 bits, 16-bit products
            [method-]w4a16kv8-g128                the same with activations (16, 8) and KV cache (16, fp8, 8, 4) named

        `-channel` instead of `-g128`: one group a channel. `-perin`: groups inside input channels. `-sym`: no zero
        point; `-zero16`: one of 16 bits; `-scale8`: scales of 8 bits; `-experts`: routed experts only. Case, and "_"
        for "-", do not matter. Raises `InputError` with `field`.
        """
        text = str(name).strip().lower().replace("_", "-")
        found = _NAME.fullmatch(text)
        if found is None and _HEAD.fullmatch(text):
            raise InputError(field, name, "does not say how many weights share a scale",
                             f"write {text}-g128, or {text}-channel for one group a channel")
        if found is None:
            raise InputError(field, name, "is not a quantised format", suggest(text, EXAMPLES))
        part = found.groupdict()
        zero = 0 if part["sym"] else int(part["zero"]) if part["zero"] else None
        try:
            return cls(bits=int(part["int"] or part["w"]), group_size=int(part["group"]) if part["group"] else None,
                       scale_bits=int(part["scale"] or 16), zero_bits=zero,
                       granularity="per_input_channel" if part["perin"] else "per_output_channel",
                       method=part["method"] or "rtn", activation_bits=int(part["act"] or 16),
                       kv_format=_KV_SUFFIXES[part["kv"]] if part["kv"] else "auto",
                       experts_only=bool(part["experts"]))
        except InputError as error:
            raise InputError(field, name, f"{error.field.partition('.')[2]} = {error.value} {error.problem}",
                             error.remedy) from None

    @property
    def name(self) -> str:
        """Its name, which `from_name` reads back."""
        kv = next((suffix for suffix, kv in _KV_SUFFIXES.items() if kv == self.kv_format), "")
        zero = "" if self.zero_bits is None else "-sym" if self.zero_bits == 0 else f"-zero{self.zero_bits}"
        return ("" if self.method == "rtn" else f"{self.method}-") + "".join((
            f"int{self.bits}" if self.activation_bits == 16 and not kv else f"w{self.bits}a{self.activation_bits}{kv}",
            "-channel" if self.group_size is None else f"-g{self.group_size}",
            "-perin" if self.granularity == "per_input_channel" else "", zero,
            "" if self.scale_bits == 16 else f"-scale{self.scale_bits}", "-experts" if self.experts_only else ""))

    # What is stored

    @property
    def group_bits(self) -> int:
        """Bits of a group beside its weights: scale and zero point."""
        return self.scale_bits + (self.bits if self.zero_bits is None else self.zero_bits)

    def num_groups(self, inputs: int, outputs: int) -> int:
        """Groups of a matrix; what is left over at the end of a channel is a group too."""
        along, channels = (outputs, inputs) if self.granularity == "per_input_channel" else (inputs, outputs)
        return channels * -(-along // (self.group_size or along))

    def matrix_bits(self, inputs: int, outputs: int) -> int:
        """Bits stored for a matrix of `inputs` x `outputs` weights. Exact."""
        if min(inputs, outputs) < 1:
            raise InputError("quantization.matrix", (inputs, outputs), "has no weights", "give its two sizes")
        return inputs * outputs * self.bits + self.num_groups(inputs, outputs) * self.group_bits

    def bits_per_weight(self, inputs: int | None = None, outputs: int | None = None) -> float:
        """Bits a weight with its share of scales and zero points; without a matrix, of whole groups."""
        if inputs is not None and outputs is not None:
            return self.matrix_bits(inputs, outputs) / (inputs * outputs)
        if self.group_size is None:
            raise InputError("quantization.group_size", None, "a channel has no length without a matrix",
                             "give inputs and outputs, or a group size")
        return self.bits + self.group_bits / self.group_size

    def weight_format(self, model: ModelSpec | None = None) -> WeightFormat:
        """Bytes and arithmetic as the roofline takes them: the mean over the model's matrices, or of whole groups.

        Known gaps: a matrix that tensor parallelism cuts inside a group has more groups than are counted here.
        """
        linear, experts = linear_matrices(model) if model is not None else ([], [])
        if self.group_size is None and not linear:
            raise InputError("model.dtype", self.name, "has no bytes a weight without a model", "give a group size")

        def mean_bytes(matrices: list[tuple[float, int, int]]) -> float:
            if not matrices:
                return self.bits_per_weight() / 8 if self.group_size else mean_bytes(linear)
            weights = sum(count * inputs * outputs for count, inputs, outputs in matrices)
            return sum(count * self.matrix_bits(inputs, outputs) for count, inputs, outputs in matrices) / weights / 8

        compute = "bf16" if self.activation_bits == 16 else "int8"
        linear_bytes = 2 if self.experts_only else mean_bytes(linear)
        return WeightFormat(self.name, linear_bytes, mean_bytes(experts), 2, 2, compute,
                            WEIGHT_ONLY if self.activation_bits == 16 else "")


WEIGHT_ONLY = "int4"
"""Name of the constants of kernels that dequantise 4-bit weights; other widths are approximated by them."""

_METHOD_NAMES = "|".join(sorted(METHODS, key=len, reverse=True))
_HEAD = re.compile(rf"(?:(?P<method>{_METHOD_NAMES})-)?"
                   rf"(?:int(?P<int>\d+)|w(?P<w>\d+)(?:a(?P<act>\d+)(?P<kv>{'|'.join(_KV_SUFFIXES)})?)?)")
_NAME = re.compile(_HEAD.pattern + r"(?:-?g(?P<group>\d+)|-channel)(?P<perin>-perin)?(?:-perout)?"
                   r"(?:(?P<sym>-sym)|-asym|-zero(?P<zero>\d+))?(?:-scale(?P<scale>\d+))?(?P<experts>-experts)?")


def is_quantization_name(name: str) -> bool:
    """Whether a name is meant for `Quantization.from_name`: it starts as one does."""
    return _HEAD.match(str(name).strip().lower().replace("_", "-")) is not None


def linear_matrices(model: ModelSpec) -> tuple[list[tuple[float, int, int]], list[tuple[float, int, int]]]:
    """(how many, inputs, outputs) of the matrices engines quantise: projections, dense FFN and shared experts; and
    routed experts.

    Their weights add up to `ModelSpec.layer_parameters` less biases.
    """
    d, layers, ups = model.hidden, model.layers, 2 if model.gated else 1
    if model.is_mla:
        qk = model.qk_nope_head_dim + model.qk_rope_head_dim
        latent = model.kv_lora_rank + model.qk_rope_head_dim
        linear = [(layers, d, latent), (layers, model.heads * model.v_head_dim, d),
                  (layers, model.kv_lora_rank, model.heads * (model.qk_nope_head_dim + model.v_head_dim))]
        queries = model.heads * qk
        linear += ([(layers, d, model.q_lora_rank), (layers, model.q_lora_rank, queries)] if model.q_lora_rank
                   else [(layers, d, queries)])
    else:
        heads, kv = model.heads * model.head_dim, model.kv_heads * model.head_dim
        linear = [(layers, d, heads), (2 * layers, d, kv), (layers, heads, d)]

    def ffn(count: float, inner: int) -> list[tuple[float, int, int]]:
        return [(ups * count, d, inner), (count, inner, d)] if count and inner else []

    linear += ffn(model.num_dense_layers, model.ffn)
    linear += ffn(model.num_moe_layers * model.shared_experts, model.moe_ffn)
    return linear, ffn(model.num_moe_layers * model.experts, model.moe_ffn)


# Published quality

Confidence = Literal["source", "secondary"]


class Quality(NamedTuple):
    """One published score.

    model: of the catalogue where it is there; quantization: None = unquantised, in 16 bits. metric, value and its unit;
    is_higher_better. table: where it stands (a file of scenarios/quality): scores of two tables are not comparable,
    since tasks, prompts and normalisation differ. confidence: "source" = read where its authors publish it, "secondary"
    = as others report it.
    """

    model: str
    quantization: Quantization | None
    metric: str
    value: float
    unit: str
    is_higher_better: bool
    table: str
    source: str
    confidence: Confidence


class _Metric(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    unit: str
    better: Literal["higher", "lower"]


class _Scores(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One model and format: scores by metric and then method; `none` for unquantised weights."""

    model: str
    format: str
    scores: dict[str, dict[str, Annotated[float, Meta(ge=0)]]]


class _Table(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    source: Annotated[str, Meta(min_length=1)]
    protocol: str
    confidence: Confidence
    metrics: dict[str, _Metric]
    results: tuple[_Scores, ...]


UNQUANTISED = "float16"
"""Format of weights that are not quantised, in tables of scores."""


@functools.cache
def load_quality() -> tuple[Quality, ...]:
    """All published scores that are shipped."""
    found = []
    folder = resources.files("jaxsim.scenarios") / "quality"
    for file in sorted(folder.iterdir(), key=lambda f: f.name):
        if file.name.endswith(".toml"):
            table = convert_table(parse_toml(file.read_text(encoding="utf-8"), file.name), _Table, file.name, "quality",
                                  "see the other files of scenarios/quality")
            found += _rows(table, file.name.removesuffix(".toml"))
    return tuple(found)


def _rows(table: _Table, name: str) -> list[Quality]:
    rows = []
    for row in table.results:
        for metric, by_method in row.scores.items():
            about = table.metrics.get(metric)
            if about is None:
                raise InputError(f"{name}.metrics.{metric}", None, "missing", suggest(metric, table.metrics))
            for method, value in by_method.items():
                quantization = (None if row.format == UNQUANTISED else
                                msgspec.structs.replace(Quantization.from_name(row.format), method=method))
                rows.append(Quality(_model_name(row.model), quantization, metric, value, about.unit,
                                    about.better == "higher", name, table.source, table.confidence))
    return rows


@functools.cache
def _model_name(name: str) -> str:
    """The catalogue's name of a model, or the one given where it has none."""
    try:
        return load_model(name).name
    except InputError:
        return name


def quality(model: str, quantization: Quantization | str | None, metric: str, table: str = "auto-round", *,
            secondary: bool = False) -> float | None:
    """The published score of a model in a format, or None where that table has none: never interpolated.

    quantization: a record or its name; None or "float16" = unquantised. A score is of bits, group, granularity and
    method; how scales and zeros are stored plays no part, for the tables do not say it, but only 16-bit activations and
    KV cache match. table: a file of scenarios/quality. secondary: also scores that only others report.
    """
    if quantization is None or quantization in (UNQUANTISED, "bfloat16"):
        wanted = None
    else:
        wanted = quantization if isinstance(quantization, Quantization) else Quantization.from_name(quantization)
        if wanted.activation_bits != 16 or wanted.kv_format not in ("auto", "float16"):
            return None
    scores = _indexed()
    if table not in scores:
        raise InputError("quality.table", table, "is no table of scores", suggest(table, scores))
    found = scores[table].get((_model_name(model), metric, _scored(wanted)))
    return found.value if found is not None and (secondary or found.confidence == "source") else None


@functools.cache
def _indexed() -> dict[str, dict[tuple, Quality]]:
    """Scores by table, and in it by model, metric and what tells formats apart."""
    scores: dict[str, dict[tuple, Quality]] = {}
    for row in load_quality():
        key = (row.model, row.metric, _scored(row.quantization))
        if scores.setdefault(row.table, {}).setdefault(key, row) is not row:
            raise InputError(f"{row.table}.results", row.model, f"has two scores of {row.metric} in one format",
                             "keep one")
    return scores


def _scored(quantization: Quantization | None) -> tuple | None:
    """What tells one score from another."""
    q = quantization
    return None if q is None else (q.bits, q.group_size, q.granularity, q.method, q.experts_only)
