"""The model served: dimensions, parameter counts, KV bytes, and where they are read from.

A `ModelSpec` is plain host data (hashable, so that it can be a static part of a compiled program). It comes
from the built-in catalogue (`load_model`), from a Hugging Face `config.json` (`ModelSpec.from_hf_config`) or
from the user's own table (`ModelSpec.from_dict`).
"""

import functools
import json
import numbers
import os
import re
import tomllib
import typing
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import msgspec
from msgspec import Meta

from jaxsim._core.errors import InputError, suggest
from jaxsim.spec.messages import convert_table, hints

MOST = 1 << 31
MOST_LAYERS = 10_000

Count = Annotated[int, Meta(ge=1, le=MOST)]
CountOrNone = Annotated[int, Meta(ge=0, le=MOST)]


class RankShape(NamedTuple):
    """What one tensor-parallel rank holds of a layer."""

    heads: int
    kv_heads: int
    ffn: int
    moe_ffn: int
    num_experts: float
    vocab: float


class LayerParameters(NamedTuple):
    """Parameters of one layer on one rank, by how they are stored and read.

    attention: projections; dense_ffn: the FFN of a dense layer; experts: all routed experts the rank holds;
    shared: shared experts; router; norms: norms, biases and other vectors (never quantised).
    """

    attention: float
    dense_ffn: float
    experts: float
    shared: float
    router: float
    norms: float


class ModelSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A decoder-only transformer.

    name, aliases: canonical Hugging Face id and short names.
    layers, hidden, heads, kv_heads, head_dim, vocab, max_position: the usual dimensions.
    ffn: inner size of a dense FFN; gated: SwiGLU-like (three matrices) or plain (two).
    experts, experts_per_token, moe_ffn: routed experts (0 = none), how many a token takes, inner size of one.
    shared_experts: experts every token takes, of `moe_ffn` each; dense_layers_first: leading layers with a
        dense FFN; moe_layer_period: from there on, every so many-th layer has experts (1 = all).
    expert_groups, groups_per_token: a token's experts are of so many of as many groups (0 = of any).
    kv_lora_rank: greater than 0 for multi-head latent attention (MLA), with q_lora_rank (0 = a plain query
        projection), qk_nope_head_dim, qk_rope_head_dim, v_head_dim.
    sliding_window: tokens a windowed layer looks back, 0 = none; window_layers: how many layers are windowed.
    qkv_bias, output_bias, ffn_bias, norm_bias, router_bias, qk_norm, attention_sinks, learned_positions:
        small things that only count as parameters (learned_positions is the number of position embeddings).
    tie_embeddings: the LM head is the embedding matrix.
    dtype: weight format of the published checkpoint (`jaxsim.spec.plan.weight_format`).
    source: where the dimensions come from.

    Known gaps: encoders, vision towers, multi-token-prediction heads, sparse and linear attention.
    """

    name: Annotated[str, Meta(min_length=1)]
    layers: Annotated[int, Meta(ge=1, le=MOST_LAYERS)]
    hidden: Count
    heads: Count
    kv_heads: Count
    head_dim: Count
    ffn: CountOrNone
    vocab: Count
    max_position: Count
    gated: bool = True
    experts: CountOrNone = 0
    experts_per_token: CountOrNone = 0
    moe_ffn: CountOrNone = 0
    shared_experts: CountOrNone = 0
    dense_layers_first: CountOrNone = 0
    moe_layer_period: Count = 1
    expert_groups: CountOrNone = 0
    groups_per_token: CountOrNone = 0
    kv_lora_rank: CountOrNone = 0
    q_lora_rank: CountOrNone = 0
    qk_nope_head_dim: CountOrNone = 0
    qk_rope_head_dim: CountOrNone = 0
    v_head_dim: CountOrNone = 0
    sliding_window: CountOrNone = 0
    window_layers: CountOrNone = 0
    qkv_bias: bool = False
    output_bias: bool = False
    ffn_bias: bool = False
    norm_bias: bool = False
    router_bias: bool = False
    qk_norm: bool = False
    attention_sinks: bool = False
    learned_positions: CountOrNone = 0
    tie_embeddings: bool = False
    dtype: str = "bfloat16"
    aliases: tuple[str, ...] = ()
    source: str = ""

    def __post_init__(self):
        for field, (low, high) in _ranges().items():
            _check_count(f"model.{field}", getattr(self, field), low, high)
        if not self.is_mla and self.heads % self.kv_heads:
            raise InputError("model.kv_heads", self.kv_heads, f"does not divide heads = {self.heads}",
                             "attention heads share KV heads in equal groups")
        if self.experts:
            if not 1 <= self.experts_per_token <= self.experts:
                raise InputError("model.experts_per_token", self.experts_per_token,
                                 f"must be between 1 and experts = {self.experts}")
            if self.moe_ffn < 1:
                raise InputError("model.moe_ffn", self.moe_ffn, "a model with experts needs their inner size")
            if self.expert_groups and (self.experts % self.expert_groups or not 1 <= self.groups_per_token
                                       <= self.expert_groups or self.experts_per_token
                                       > self.groups_per_token * (self.experts // self.expert_groups)):
                raise InputError("model.expert_groups", self.expert_groups,
                                 f"does not go with {self.experts} experts of which a token takes"
                                 f" {self.experts_per_token}, from groups_per_token = {self.groups_per_token} of them",
                                 "give groups that divide the experts and are large enough, or 0")
        if self.num_dense_layers and self.ffn < 1:
            raise InputError("model.ffn", self.ffn, "a model with dense layers needs their inner size")
        if self.is_mla and min(self.qk_nope_head_dim, self.qk_rope_head_dim, self.v_head_dim) < 1:
            raise InputError("model.kv_lora_rank", self.kv_lora_rank,
                             "latent attention needs qk_nope_head_dim, qk_rope_head_dim and v_head_dim")
        if self.window_layers > self.layers:
            raise InputError("model.window_layers", self.window_layers, f"more than layers = {self.layers}")
        if (self.sliding_window > 0) != (self.window_layers > 0):
            raise InputError("model.sliding_window", self.sliding_window,
                             f"does not go with window_layers = {self.window_layers}",
                             "give both or neither")

    @classmethod
    def from_dict(cls, table: Mapping[str, Any], path: str = "model") -> "ModelSpec":
        """From a table of the fields above, as a scenario file holds it."""
        return convert_table(table, cls, path, "model", "see `jaxsim list models` for those that are built in")

    @classmethod
    def from_hf_config(cls, config: str | os.PathLike | Mapping[str, Any], name: str = "") -> "ModelSpec":
        """From a Hugging Face `config.json`: a mapping, the file, or the folder that holds it."""
        source = "config mapping"
        if not isinstance(config, (str, os.PathLike, Mapping)):
            raise InputError("model.config", config, "is neither a path nor a table",
                             "give a config.json or the folder that holds it")
        if not isinstance(config, Mapping):
            path = Path(config)
            path = path / "config.json" if path.is_dir() else path
            try:
                config = json.loads(path.read_text(encoding="utf-8-sig"))
            except OSError as error:
                raise InputError("model.config", str(path), f"cannot be read ({error.strerror})",
                                 "give a config.json or the folder that holds it") from None
            except ValueError as error:
                raise InputError("model.config", str(path), f"is not JSON ({error})",
                                 "download the file again") from None
            if not isinstance(config, Mapping):
                raise InputError("model.config", str(path), "is not a JSON object",
                                 "give a Hugging Face config.json")
            source, name = str(path), name or path.parent.name
        return _from_hf(config, name or str(config.get("_name_or_path") or config.get("model_type", "model")),
                        source)

    # What it is

    @property
    def is_mla(self) -> bool:
        """Whether attention caches one latent vector a token instead of keys and values."""
        return self.kv_lora_rank > 0

    @property
    def num_moe_layers(self) -> int:
        """Layers with experts."""
        if not self.experts:
            return 0
        return sum((i + 1) % self.moe_layer_period == 0 for i in range(self.dense_layers_first, self.layers))

    @property
    def num_dense_layers(self) -> int:
        """Layers with a dense FFN."""
        return self.layers - self.num_moe_layers

    def rank_shape(self, tensor_ranks: int = 1, expert_ranks: int = 1) -> RankShape:
        """What one rank holds of a layer.

        KV heads are replicated where there are fewer of them than ranks. With `expert_ranks` > 1 experts are
        whole and spread over those ranks; otherwise each is cut over `tensor_ranks`.
        """
        return RankShape(
            heads=self.heads // tensor_ranks,
            kv_heads=max(1, self.kv_heads // tensor_ranks),
            ffn=self.ffn // tensor_ranks,
            moe_ffn=self.moe_ffn if expert_ranks > 1 else self.moe_ffn // tensor_ranks,
            num_experts=self.experts / expert_ranks,
            vocab=self.vocab / tensor_ranks)

    # Parameters

    def layer_parameters(self, tensor_ranks: int = 1, expert_ranks: int = 1) -> LayerParameters:
        """Parameters of one layer on one rank (both kinds of FFN are filled in; a layer has one of them)."""
        d, rank = self.hidden, self.rank_shape(tensor_ranks, expert_ranks)
        matrices = 3 if self.gated else 2
        norms = 2 * d * (2 if self.norm_bias else 1)
        if self.is_mla:
            qk = self.qk_nope_head_dim + self.qk_rope_head_dim
            query = self.q_lora_rank * (d + rank.heads * qk) if self.q_lora_rank else d * rank.heads * qk
            latent = d * (self.kv_lora_rank + self.qk_rope_head_dim)
            expand = self.kv_lora_rank * rank.heads * (self.qk_nope_head_dim + self.v_head_dim)
            attention = query + latent + expand + rank.heads * self.v_head_dim * d
            norms += self.q_lora_rank + self.kv_lora_rank
        else:
            attention = d * (rank.heads + 2 * rank.kv_heads) * self.head_dim + rank.heads * self.head_dim * d
            norms += self.qkv_bias * (rank.heads + 2 * rank.kv_heads) * self.head_dim
            norms += self.qk_norm * 2 * self.head_dim + self.attention_sinks * rank.heads
        norms += self.output_bias * d
        expert = matrices * d * rank.moe_ffn + self.ffn_bias * ((matrices - 1) * rank.moe_ffn + d)
        shared = self.shared_experts * matrices * d * (self.moe_ffn // tensor_ranks)
        dense = matrices * d * rank.ffn + self.ffn_bias * ((matrices - 1) * rank.ffn + d)
        return LayerParameters(attention, dense, rank.num_experts * expert, shared,
                               self.experts * (d + (self.ffn_bias or self.router_bias)), norms)

    @property
    def embedding_parameters(self) -> int:
        """Token and position embeddings."""
        return (self.vocab + self.learned_positions) * self.hidden

    @property
    def head_parameters(self) -> int:
        """LM head and last norm; the head counts nothing where it is the embedding."""
        return self.hidden * ((0 if self.tie_embeddings else self.vocab) + (2 if self.norm_bias else 1))

    def _parameters(self, experts_counted: float) -> int:
        layer = self.layer_parameters()
        experts = layer.experts * (experts_counted / self.experts if self.experts else 0)
        per_layer = self.layers * (layer.attention + layer.norms)
        ffn = self.num_dense_layers * layer.dense_ffn + self.num_moe_layers * (
            experts + layer.shared + layer.router)
        return round(self.embedding_parameters + self.head_parameters + per_layer + ffn)

    @property
    def num_parameters(self) -> int:
        """All parameters."""
        return self._parameters(self.experts)

    @property
    def num_active_parameters(self) -> int:
        """Parameters one token passes through, embeddings included."""
        return self._parameters(self.experts_per_token)

    # KV cache

    def layer_kv_bytes_per_token(self, kv_bytes: float = 2, tensor_ranks: int = 1) -> float:
        """Cache bytes of a token in one layer of one rank. Every rank holds all of MLA's latent."""
        if self.is_mla:
            return (self.kv_lora_rank + self.qk_rope_head_dim) * kv_bytes
        return 2 * self.rank_shape(tensor_ranks).kv_heads * self.head_dim * kv_bytes

    def kv_bytes_per_token(self, kv_bytes: float = 2, tensor_ranks: int = 1) -> float:
        """Cache bytes of a token on one rank, all layers.

        Known gaps: windowed layers are counted in full, as if nothing before the window were freed.
        """
        return self.layers * self.layer_kv_bytes_per_token(kv_bytes, tensor_ranks)


@functools.cache
def _ranges() -> dict[str, tuple[int, int]]:
    """Smallest and largest value of each dimension."""
    found = {}
    for field, hint in hints(ModelSpec).items():
        base, *metas = typing.get_args(hint) or (None,)
        if base is int:
            found[field] = (metas[0].ge, metas[0].le)
    return found


def _check_count(field: str, value: Any, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or not low <= value <= high:
        raise InputError(field, value, "is no count that a model can have",
                         f"give a whole number >= {low} and <= {high}")


# Hugging Face configurations

_PLAIN = ("llama", "mistral", "qwen2", "qwen3", "mixtral", "qwen3_moe", "gpt_oss")
_LATENT = ("deepseek_v2", "deepseek_v3", "kimi_k2")
SUPPORTED_MODEL_TYPES = (*_PLAIN, *_LATENT, "opt")
"""`model_type` values that `ModelSpec.from_hf_config` understands."""


def _from_hf(config: Mapping[str, Any], name: str, source: str) -> ModelSpec:
    if isinstance(config.get("text_config"), Mapping):
        inner = dict(config["text_config"])
        inner.setdefault("quantization_config", config.get("quantization_config"))
        return _from_hf(inner, name, source + " (text_config)")
    kind = config.get("model_type")
    if kind not in SUPPORTED_MODEL_TYPES:
        raise InputError("model.config.model_type", kind, "this architecture is not known",
                         f"known are {', '.join(SUPPORTED_MODEL_TYPES)}; for others write the dimensions out "
                         "in a [model.dimensions] table")
    names = _OPT_KEYS if kind == "opt" else _KEYS
    required = ["layers", "hidden", "heads", "vocab", "max_position"]
    required += [] if kind == "gpt_oss" else ["ffn"]
    required += ["experts", "experts_per_token"] if kind in ("mixtral", "qwen3_moe", "gpt_oss") else []
    required += ["moe_ffn"] if kind == "qwen3_moe" else []
    if kind in _LATENT:
        required += ["kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"]
    missing = [names[field][0] for field in required if _first(config, names[field]) is None]
    if missing:
        raise InputError("model.config", name, f"a {kind} config lacks {', '.join(missing)}",
                         "give the complete config.json")

    def get(field, default=0):
        key = next((k for k in names[field] if config.get(k) is not None), None)
        if key is None:
            return default
        # Published files write 0 for what a model does not have.
        low = 0 if field in ("experts", "shared_experts", "q_lora_rank", "ffn", "moe_ffn") else 1
        return _hf_count(config, key, low, MOST_LAYERS if field == "layers" else MOST)

    heads = get("heads")
    row = dict(
        name=name, source=source, layers=get("layers"), hidden=get("hidden"), heads=heads,
        kv_heads=get("kv_heads", heads), head_dim=get("head_dim", get("hidden") // heads), ffn=get("ffn"),
        vocab=get("vocab"), max_position=get("max_position"),
        # transformers' own defaults where a published file leaves the key out
        tie_embeddings=_hf_switch(config, "tie_word_embeddings", kind == "opt"),
        qkv_bias=_hf_switch(config, "attention_bias", kind in ("qwen2", "gpt_oss")),
        dtype=_hf_dtype(config))
    row["output_bias"] = row["qkv_bias"] and kind in ("llama", "gpt_oss", "qwen3", "qwen3_moe")
    row["ffn_bias"] = _hf_switch(config, "mlp_bias", False)
    row["qk_norm"] = kind in ("qwen3", "qwen3_moe")
    if kind in ("mixtral", "gpt_oss"):
        row.update(experts=get("experts"), experts_per_token=get("experts_per_token"), moe_ffn=get("ffn"))
    if kind == "gpt_oss":
        row.update(attention_sinks=True, ffn_bias=True)
    if kind == "qwen3_moe":
        if config.get("mlp_only_layers"):
            raise InputError("model.config.mlp_only_layers", config["mlp_only_layers"],
                             "dense layers scattered among expert layers are not supported",
                             "use an empty list to simulate experts in every layer")
        row.update(experts=get("experts"), experts_per_token=get("experts_per_token"), moe_ffn=get("moe_ffn"),
                   moe_layer_period=_hf_count(config, "decoder_sparse_step", 1, default=1))
    if kind in _LATENT:
        row.update(kv_lora_rank=get("kv_lora_rank"), q_lora_rank=get("q_lora_rank"),
                   qk_nope_head_dim=get("qk_nope_head_dim"), qk_rope_head_dim=get("qk_rope_head_dim"),
                   v_head_dim=get("v_head_dim"), head_dim=get("qk_nope_head_dim") + get("qk_rope_head_dim"))
        if get("experts"):
            row.update(experts=get("experts"), experts_per_token=get("experts_per_token"),
                       moe_ffn=get("moe_ffn"), shared_experts=get("shared_experts"),
                       router_bias=config.get("topk_method") == "noaux_tc",
                       dense_layers_first=_hf_count(config, "first_k_dense_replace", 0, default=0),
                       expert_groups=_hf_count(config, "n_group", 0, default=0),
                       groups_per_token=_hf_count(config, "topk_group", 0, default=0),
                       moe_layer_period=_hf_count(config, "moe_layer_freq", 1, default=1))
    if kind == "opt":
        if config.get("word_embed_proj_dim", row["hidden"]) != row["hidden"]:
            raise InputError("model.config.word_embed_proj_dim", config["word_embed_proj_dim"],
                             "projected embeddings (OPT-350M) are not supported", "use another model")
        row.update(gated=False, qkv_bias=True, output_bias=True, ffn_bias=True, norm_bias=True,
                   learned_positions=row["max_position"] + 2)
    row["sliding_window"], row["window_layers"] = _hf_window(config, kind, row["layers"])
    try:
        return ModelSpec(**row)
    except InputError as error:
        # In the reader's terms: the keys of the file, not of the spec.
        field = error.field.removeprefix("model.")
        raise InputError("model.config." + names.get(field, (field,))[0], error.value, error.problem,
                         error.remedy or "correct the config.json") from None


_KEYS = {
    "layers": ("num_hidden_layers",), "hidden": ("hidden_size",), "heads": ("num_attention_heads",),
    "kv_heads": ("num_key_value_heads",), "head_dim": ("head_dim",), "ffn": ("intermediate_size",),
    "vocab": ("vocab_size",), "max_position": ("max_position_embeddings",),
    "experts": ("num_local_experts", "num_experts", "n_routed_experts"),
    "experts_per_token": ("num_experts_per_tok", "experts_per_token"), "moe_ffn": ("moe_intermediate_size",),
    "shared_experts": ("n_shared_experts",), "kv_lora_rank": ("kv_lora_rank",),
    "q_lora_rank": ("q_lora_rank",),
    "qk_nope_head_dim": ("qk_nope_head_dim",), "qk_rope_head_dim": ("qk_rope_head_dim",),
    "v_head_dim": ("v_head_dim",),
}
_OPT_KEYS = _KEYS | {"ffn": ("ffn_dim",)}


def _first(config: Mapping[str, Any], keys: tuple[str, ...]) -> Any:
    return next((config[k] for k in keys if config.get(k) is not None), None)


def _hf_count(config: Mapping[str, Any], key: str, low: int, high: int = MOST, default: int | None = None) -> int:
    value = config.get(key)
    if value is None and default is not None:
        return default
    _check_count(f"model.config.{key}", value, low, high)
    return int(value)


def _hf_switch(config: Mapping[str, Any], key: str, default: bool) -> bool:
    value = config.get(key)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise InputError(f"model.config.{key}", value, "is neither true nor false", "write true or false")
    return value


def _hf_table(value: Any, key: str) -> Mapping[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise InputError(f"model.config.{key}", value, "is not an object",
                         "give the object of the published file, or null")
    return value


def _hf_dtype(config: Mapping[str, Any]) -> str:
    where = "quantization_config"
    quantisation = _hf_table(config.get(where), where)
    method = str(quantisation.get("quant_method") or "").lower()
    by_method = {"fp8": "fp8", "fbgemm_fp8": "fp8", "mxfp4": "mxfp4"}
    if method == "fp8" and quantisation.get("weight_block_size"):
        return "fp8_block"
    if method in by_method:
        return by_method[method]
    if method in ("gptq", "awq"):
        return _hf_grouped(quantisation, method)
    if method == "compressed-tensors":
        return _hf_compressed(quantisation, config)
    if method:
        raise _no_name("quant_method", method)
    key = next((k for k in ("torch_dtype", "dtype") if config.get(k) is not None), None)
    if key is None:
        return "bfloat16"
    name = str(config[key]).removeprefix("torch.")
    if name not in _HF_DTYPES:
        raise InputError(f"model.config.{key}", config[key], "is no number format of weights",
                         suggest(name, _HF_DTYPES))
    return name


def _no_name(key: str, value: Any) -> InputError:
    return InputError(f"model.config.quantization_config.{key}", value, "this format is not known",
                      "remove quantization_config and give model.dtype yourself")


def _hf_grouped(table: Mapping[str, Any], method: str) -> str:
    """Name of what GPTQ and AWQ store: weights in groups along the inputs, 16-bit products.

    What a file leaves out has the libraries' defaults: 4 bits, groups of 128, zero points in AWQ only.
    """
    keys = {"gptq": (("bits",), ("group_size",), "sym"),
            "awq": (("bits", "w_bit"), ("group_size", "q_group_size"), "zero_point")}
    bits, group, zeros = keys[method]
    switch = table.get(zeros)
    has_zeros = (method == "awq") if switch is None else bool(switch) == (method == "awq")
    return _hf_integers(_first(table, bits) or 4, _first(table, group) or 128, not has_zeros, bits[0], group[0],
                        prefix=f"{method}-")


def _hf_integers(bits: Any, group: Any, is_symmetric: bool, bits_key: str, group_key: str, *, activations: int = 16,
                 prefix: str = "", ending: str = "") -> str:
    """Name of integers in groups (-1: one a channel), as `jaxsim.spec.quantization` reads it. Raises `InputError`."""
    if isinstance(bits, bool) or not isinstance(bits, int) or not 1 <= bits <= 8:
        raise _no_name(bits_key, bits)
    if isinstance(group, bool) or not isinstance(group, int) or not (group == -1 or group >= 1):
        raise _no_name(group_key, group)
    head = f"int{bits}" if activations == 16 else f"w{bits}a{activations}"
    return (prefix + head + ("-channel" if group == -1 else f"-g{group}") + ("-sym" if is_symmetric else "") + ending)


def _hf_compressed(table: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """Name of what compressed-tensors stores: one format for all layers, or for routed experts alone.

    Known gaps: single layers, and parts of attention, that are left out count as the others.
    """
    where = "config_groups"
    groups = _hf_table(table.get(where), f"quantization_config.{where}")
    found = {_hf_scheme(_hf_table(group, f"quantization_config.{where}"), f"{where}.{key}")
             for key, group in groups.items()}
    if len(found) != 1:
        raise _no_name(where, sorted(found) or None)
    name, = found
    ignored = table.get("ignore") or ()
    has_experts = bool(_first(config, _KEYS["experts"]))
    there = {"attention": True, "experts": has_experts, "shared": bool(config.get("n_shared_experts")),
             "ffn": not has_experts or bool(config.get("first_k_dense_replace"))}
    parts = {part for part, is_there in there.items() if is_there}
    quantised = {part for part in parts if not _is_ignored(_MODULES[part], ignored)}
    if quantised == parts:
        return name
    if quantised != {"experts"} or not name.startswith("int") or name == "int8":
        raise _no_name("ignore", list(ignored))
    return name + "-experts"


_MODULES = {"attention": "model.layers.3.self_attn.o_proj", "ffn": "model.layers.3.mlp.down_proj",
            "shared": "model.layers.3.mlp.shared_experts.down_proj",
            "experts": "model.layers.3.mlp.experts.0.down_proj"}
"""One module of each kind, to hold patterns of ignored ones against."""


def _is_ignored(module: str, ignored: Any) -> bool:
    """Whether a pattern is for this module in every layer (single layers that are named count as the others)."""
    try:
        return any(str(one).startswith("re:") and re.match(str(one)[3:], module) for one in ignored)
    except re.error:
        raise _no_name("ignore", list(ignored)) from None


def _hf_scheme(group: Mapping[str, Any], where: str) -> str:
    """Name of one group of compressed-tensors."""
    weights = _hf_table(group.get("weights"), f"quantization_config.{where}.weights")
    inputs = _hf_table(group.get("input_activations"), f"quantization_config.{where}.input_activations")
    bits, kind, strategy = weights.get("num_bits"), weights.get("type", "int"), weights.get("strategy")
    widths = (bits, kind, inputs.get("num_bits", 16), inputs.get("type", "int") if inputs else None)
    if widths == (8, "float", 8, "float"):
        return "fp8_block" if strategy == "block" else "fp8"
    if widths == (4, "float", 4, "float") and weights.get("group_size", 16) == 16:
        return "fp4"
    if widths == (8, "int", 8, "int") and strategy in (None, "channel", "tensor"):
        return "int8"
    if kind == "int" and widths[3] in (None, "int") and widths[2] in (8, 16):
        size = -1 if strategy == "channel" else weights.get("group_size")
        return _hf_integers(bits, size, weights.get("symmetric", True) is not False, f"{where}.weights.num_bits",
                            f"{where}.weights.group_size", activations=widths[2])
    raise _no_name(where, f"{kind} weights of {bits} bits, {widths[2]}-bit activations")


_HF_DTYPES = ("bfloat16", "float16", "float32", "float8_e4m3fn", "int8")


def _hf_window(config: Mapping[str, Any], kind: str, layers: int) -> tuple[int, int]:
    window = _hf_count(config, "sliding_window", 0, default=0)
    if not window or (kind.startswith("qwen") and not _hf_switch(config, "use_sliding_window", False)):
        return 0, 0
    types = config.get("layer_types")
    if types:
        if not isinstance(types, (list, tuple)) or len(types) != layers:
            raise InputError("model.config.layer_types", types, f"is not a list of {layers} layers",
                             "give the type of each layer")
        count = sum(t == "sliding_attention" for t in types)
    elif kind == "gpt_oss":
        count = (layers + 1) // 2
    elif kind.startswith("qwen"):
        count = max(layers - _hf_count(config, "max_window_layers", 0, default=layers), 0)
    else:
        count = layers
    return (window, count) if count else (0, 0)


# The catalogue

@functools.cache
def model_catalogue() -> dict[str, ModelSpec]:
    """Built-in models by canonical name."""
    models = {}
    folder = resources.files("jaxsim.scenarios") / "models"
    for file in sorted(folder.iterdir(), key=lambda f: f.name):
        if file.name.endswith(".toml"):
            table = tomllib.loads(file.read_text())
            for row in table["model"]:
                spec = ModelSpec.from_dict(table.get("common", {}) | row, path=file.name)
                models[spec.name] = spec
    return models


@functools.cache
def _model_names() -> dict[str, str]:
    names: dict[str, str] = {}
    for spec in model_catalogue().values():
        for name in (spec.name, spec.name.split("/")[-1], *spec.aliases):
            if names.setdefault(name.lower(), spec.name) != spec.name:
                raise ValueError(f"two models are called {name}")
    return names


_COPIES = (("fp8", "fp8"), ("nvfp4", "fp4"), ("fp4", "fp4"), ("awq", "int4"), ("gptq", "int4"), ("w4a16", "int4"),
           ("w8a8", "int8"))
"""Endings of the names of quantised copies, and their weight formats."""


def load_model(name: str) -> ModelSpec:
    """A model of the catalogue, by Hugging Face id or short name ("llama-3.1-8b"); case does not matter.

    A quantised copy is known by its ending, whoever made it ("nvidia/Llama-3.1-8B-Instruct-FP8").
    """
    names, called = _model_names(), str(name).strip().lower()
    try:
        return model_catalogue()[names[called]]
    except KeyError:
        copied = re.fullmatch(r"(?:.*/)?(.+?)-(fp8(?:-dynamic|-kv)?|(?:nv)?fp4|awq|gptq-int4|w4a16|w8a8)", called)
        if copied and copied[1] in names:
            dtype = next(to for start, to in _COPIES if copied[2].startswith(start))
            return msgspec.structs.replace(model_catalogue()[names[copied[1]]], dtype=dtype)
        config = "model.config, the path of a Hugging Face config.json"
        if str(name).endswith(".json") or os.path.exists(str(name)):
            raise InputError("model.name", name, "is a file, not a name",
                             f"use {config}, instead of model.name") from None
        hint = suggest(str(name), _model_names(), "see `jaxsim list models`.")
        raise InputError("model.name", name, "is not in the catalogue", f"{hint} Or give {config}") from None
