"""A Hugging Face `config.json` as the fields of a `ModelSpec`: architectures, dimensions, formats of weights."""

import re
from collections.abc import Mapping
from typing import Any

from jaxsim._core.errors import InputError, suggest
from jaxsim.spec.counts import MOST, MOST_LAYERS, check_count

_PLAIN = ("llama", "mistral", "qwen2", "qwen3", "mixtral", "qwen3_moe", "gpt_oss")
_LATENT = ("deepseek_v2", "deepseek_v3", "kimi_k2")
SUPPORTED_MODEL_TYPES = (*_PLAIN, *_LATENT, "opt")
"""`model_type` values that `ModelSpec.from_hf_config` understands."""


def fields_of(config: Mapping[str, Any], name: str, source: str) -> tuple[dict[str, Any], dict[str, tuple[str, ...]]]:
    """Fields of a `ModelSpec`, and the keys of the file that each is read from. Raises `InputError`."""
    if isinstance(config.get("text_config"), Mapping):
        inner = dict(config["text_config"])
        inner.setdefault("quantization_config", config.get("quantization_config"))
        return fields_of(inner, name, source + " (text_config)")
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
    return row, names


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
    check_count(f"model.config.{key}", value, low, high)
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
