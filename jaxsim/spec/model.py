"""The model served: dimensions, parameter counts, KV bytes, and where they are read from.

A `ModelSpec` is plain host data (hashable, so that it can be a static part of a compiled program). It comes
from the built-in catalogue (`load_model`), from a Hugging Face `config.json` (`ModelSpec.from_hf_config`) or
from the user's own table (`ModelSpec.from_dict`).
"""

import functools
import json
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
from jaxsim.spec import hugging_face
from jaxsim.spec.counts import MOST_LAYERS, Count, CountOrNone, check_count
from jaxsim.spec.messages import convert_table, hints


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
            check_count(f"model.{field}", getattr(self, field), low, high)
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
        row, keys = hugging_face.fields_of(
            config, name or str(config.get("_name_or_path") or config.get("model_type", "model")), source)
        try:
            return cls(**row)
        except InputError as error:
            # In the reader's terms: the keys of the file, not of the spec.
            field = error.field.removeprefix("model.")
            raise InputError("model.config." + keys.get(field, (field,))[0], error.value, error.problem,
                             error.remedy or "correct the config.json") from None

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
