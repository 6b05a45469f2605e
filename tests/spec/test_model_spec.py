"""Model dimensions against published parameter counts, KV sizes and Hugging Face configurations."""

import json

import msgspec
import pytest

from jaxsim._core.errors import InputError
from jaxsim.spec.memory import rank_weight_bytes
from jaxsim.spec.model import ModelSpec, load_model, model_catalogue
from jaxsim.spec.plan import weight_format

# Exact totals of the published checkpoints (safetensors metadata of each repository).
PUBLISHED_PARAMETERS = {
    "llama-2-7b": 6738415616, "llama-2-13b": 13015864320, "llama-2-70b": 68976648192,
    "llama-3.1-8b": 8030261248,
    "llama-3-70b": 70553706496, "llama-3.1-405b": 405853388800, "llama-3.2-1b": 1235814400,
    "llama-3.2-3b": 3212749824, "codellama-34b": 33743970304, "yi-34b": 34388917248, "phi-4": 14659507200,
    "mistral-7b": 7241732096, "mistral-nemo": 12247782400, "mistral-small-24b": 23572403200,
    "mistral-large-2": 122610069504, "mixtral-8x7b": 46702792704, "mixtral-8x22b": 140620634112,
    "dbrx": 131596523520, "qwen2.5-0.5b": 494032768, "qwen2.5-1.5b": 1543714304, "qwen2.5-3b": 3085938688,
    "qwen2.5-7b": 7615616512, "qwen2.5-14b": 14770033664, "qwen2.5-32b": 32763876352,
    "qwen2.5-72b": 72706203648,
    "qwen3-0.6b": 596049920, "qwen3-1.7b": 1720574976, "qwen3-4b": 4022468096, "qwen3-8b": 8190735360,
    "qwen3-14b": 14768307200, "qwen3-32b": 32762123264, "qwen3-30b-a3b": 30532122624,
    "qwen3-235b-a22b": 235093634560, "gpt-oss-20b": 20914757184, "gpt-oss-120b": 116829156672,
    "deepseek-v2-lite": 15706484224, "deepseek-v3": 671026419200, "opt-125m": 125239296,
    "opt-1.3b": 1315758080,
    "gpt2": 124439808, "opt-2.7b": 2651596800, "opt-6.7b": 6658473984, "opt-13b": 12853473280, "opt-30b": 29974540288,
}

# Billions of parameters (active in brackets) and KV bytes a token at 16 bits, to the printed digits.
# Source: standard algebra over the published configurations.
GOLDEN = {
    "llama-3.2-1b": ("1.236", None, 32768), "llama-2-7b": ("6.738", None, 524288),
    "llama-3.1-8b": ("8.030", None, 131072), "llama-2-70b": ("68.98", None, 327680),
    "llama-3.1-70b": ("70.55", None, 327680), "llama-3.1-405b": ("405.9", None, 516096),
    "mistral-large-2": ("122.6", None, 360448), "mixtral-8x7b": ("46.70", "12.88", 131072),
    "Mixtral-8x22B-Instruct-v0.1": ("140.6", "39.16", 229376), "dbrx": ("131.6", "36.47", 163840),
    "deepseek-v3": ("671", None, 70272),
}


def digits(value, printed):
    return f"{value:.{len(printed.partition('.')[2])}f}"


@pytest.mark.parametrize("name", PUBLISHED_PARAMETERS)
def test_parameter_count_is_the_published_one(name):
    assert load_model(name).num_parameters == PUBLISHED_PARAMETERS[name]


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_table(name):
    total, active, kv_bytes = GOLDEN[name]
    model = load_model(name)
    assert digits(model.num_parameters / 1e9, total) == total
    if active:
        assert digits(model.num_active_parameters / 1e9, active) == active
    assert model.kv_bytes_per_token() == kv_bytes


def test_every_row_of_the_catalogue_is_sound():
    for model in model_catalogue().values():
        assert model.source
        assert 0 < model.num_active_parameters <= model.num_parameters
        assert hash(model) == hash(msgspec.structs.replace(model))
        # Cutting over ranks loses nothing: sharded parts sum to the whole, replicated ones do not shrink.
        whole = model.layer_parameters()
        if model.heads % 2 == 0 and (model.is_mla or model.kv_heads % 2 == 0):
            half = model.layer_parameters(2)
            assert half.norms <= whole.norms and half.router == whole.router
            assert 2 * half.dense_ffn == pytest.approx(whole.dense_ffn, rel=1e-3)
            assert whole.attention / 2 <= half.attention < whole.attention


def test_kv_cache_shards():
    llama = load_model("llama-3.1-70b")
    assert llama.kv_bytes_per_token(2, 4) == llama.kv_bytes_per_token() / 4
    assert llama.kv_bytes_per_token(1) == llama.kv_bytes_per_token() / 2
    # Eight KV heads over sixteen ranks: each head is held twice.
    assert llama.kv_bytes_per_token(2, 16) == llama.kv_bytes_per_token(2, 8)
    deepseek = load_model("deepseek-v3")
    assert deepseek.kv_bytes_per_token(2, 8) == deepseek.kv_bytes_per_token() == 61 * (512 + 64) * 2


def test_expert_layers():
    deepseek = load_model("deepseek-r1")
    assert (deepseek.num_dense_layers, deepseek.num_moe_layers) == (3, 58)
    assert load_model("gpt-oss-120b").window_layers == 18
    assert load_model("mixtral-8x7b").num_dense_layers == 0


def test_names():
    assert load_model("LLAMA-3.1-8B") is load_model("meta-llama/Meta-Llama-3.1-8B-Instruct")
    copy = load_model("nvidia/Llama-3.1-8B-Instruct-FP8")
    assert copy.dtype == "fp8" and copy.layers == 32 and load_model("Qwen/Qwen3-32B-AWQ").dtype == "int4"
    with pytest.raises(InputError, match="did you mean .*llama-3.1-8b"):
        load_model("lama-3.1-8b")
    with pytest.raises(InputError, match="jaxsim list models") as refusal:
        load_model("zzzz")
    assert len(str(refusal.value)) < 200


def test_a_file_is_no_name(tmp_path):
    (tmp_path / "mine").mkdir()
    for name in (str(tmp_path / "mine"), "./config.json"):
        with pytest.raises(InputError, match="a file, not a name; use model.config"):
            load_model(name)


def hf(**changes):
    config = dict(model_type="llama", hidden_size=4096, intermediate_size=14336, num_attention_heads=32,
                  num_key_value_heads=8, num_hidden_layers=32, vocab_size=128256,
                  max_position_embeddings=131072,
                  tie_word_embeddings=False, torch_dtype="bfloat16")
    return config | changes


def same_dimensions(found, name):
    known = load_model(name)
    drop = dict(name="x", aliases=(), source="", dtype="bfloat16", head_dim=1)
    assert msgspec.structs.replace(found, **drop) == msgspec.structs.replace(known, **drop)


HF_CONFIGS = {
    "llama-3.1-8b": hf(),
    "mistral-7b": hf(model_type="mistral", vocab_size=32000, max_position_embeddings=32768,
                     sliding_window=4096),
    "mixtral-8x7b": hf(model_type="mixtral", vocab_size=32000, max_position_embeddings=32768,
                       num_local_experts=8, num_experts_per_tok=2, sliding_window=None),
    "qwen2.5-7b": hf(model_type="qwen2", hidden_size=3584, intermediate_size=18944, num_attention_heads=28,
                     num_key_value_heads=4, num_hidden_layers=28, vocab_size=152064,
                     max_position_embeddings=32768, sliding_window=131072, use_sliding_window=False,
                     max_window_layers=28),
    "qwen3-8b": hf(model_type="qwen3", head_dim=128, intermediate_size=12288, num_hidden_layers=36,
                   vocab_size=151936, max_position_embeddings=40960, attention_bias=False),
    "qwen3-30b-a3b": hf(model_type="qwen3_moe", hidden_size=2048, head_dim=128, intermediate_size=6144,
                        num_key_value_heads=4, num_hidden_layers=48, vocab_size=151936,
                        max_position_embeddings=40960, num_experts=128, num_experts_per_tok=8,
                        moe_intermediate_size=768, decoder_sparse_step=1, mlp_only_layers=[]),
    "deepseek-v3": hf(model_type="deepseek_v3", hidden_size=7168, intermediate_size=18432,
                      num_attention_heads=128,
                      num_key_value_heads=128, num_hidden_layers=61, vocab_size=129280,
                      max_position_embeddings=163840, n_routed_experts=256, num_experts_per_tok=8,
                      moe_intermediate_size=2048, n_shared_experts=1, first_k_dense_replace=3,
                      moe_layer_freq=1, n_group=8, topk_group=4,
                      kv_lora_rank=512, q_lora_rank=1536, qk_nope_head_dim=128, qk_rope_head_dim=64,
                      v_head_dim=128, topk_method="noaux_tc",
                      quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]}),
    "deepseek-v2-lite": hf(model_type="deepseek_v2", hidden_size=2048, intermediate_size=10944,
                           num_attention_heads=16, num_key_value_heads=16, num_hidden_layers=27,
                           vocab_size=102400, max_position_embeddings=163840, n_routed_experts=64,
                           num_experts_per_tok=6, moe_intermediate_size=1408, n_shared_experts=2,
                           first_k_dense_replace=1, kv_lora_rank=512, q_lora_rank=None, qk_nope_head_dim=128,
                           qk_rope_head_dim=64, v_head_dim=128, topk_method="greedy"),
    "gpt-oss-20b": hf(model_type="gpt_oss", hidden_size=2880, intermediate_size=2880, num_attention_heads=64,
                      head_dim=64, num_hidden_layers=24, vocab_size=201088, num_local_experts=32,
                      num_experts_per_tok=4, sliding_window=128, attention_bias=True,
                      layer_types=["sliding_attention", "full_attention"] * 12,
                      quantization_config={"quant_method": "mxfp4"}),
    "opt-13b": dict(model_type="opt", hidden_size=5120, ffn_dim=20480, num_attention_heads=40,
                    num_hidden_layers=40, vocab_size=50272, max_position_embeddings=2048,
                    word_embed_proj_dim=5120, torch_dtype="float16"),
}


@pytest.mark.parametrize("name", HF_CONFIGS)
def test_hugging_face_config_gives_the_catalogue_row(name):
    found = ModelSpec.from_hf_config(HF_CONFIGS[name])
    if load_model(name).num_dense_layers == 0:
        # A dense size beside experts is never read.
        found = msgspec.structs.replace(found, ffn=load_model(name).ffn)
    same_dimensions(found, name)
    assert found.num_parameters == PUBLISHED_PARAMETERS[name]


def test_hugging_face_number_formats():
    def dtype(**changes):
        return ModelSpec.from_hf_config(hf(**changes)).dtype

    assert dtype() == "bfloat16"
    assert dtype(torch_dtype=None, dtype="float16") == "float16"
    assert dtype(quantization_config={"quant_method": "awq"}) == "awq-int4-g128"
    assert dtype(quantization_config={"quant_method": "fp8"}) == "fp8"
    eight_bits = {"weights": {"num_bits": 8, "type": "int"}, "input_activations": {"num_bits": 8}}
    assert dtype(quantization_config={"quant_method": "compressed-tensors",
                                      "config_groups": {"group_0": eight_bits}}) == "int8"
    with pytest.raises(InputError, match="not known"):
        dtype(quantization_config={"quant_method": "aqlm"})


def compressed(weights, inputs=None, **more):
    return {"quant_method": "compressed-tensors", **more,
            "config_groups": {"group_0": {"weights": weights, "input_activations": inputs}}}


INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128, "symmetric": True}
KIMI = ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", "re:.*mlp\\.(gate|up|gate_up|down)_proj.*"]


@pytest.mark.parametrize("table, name", [
    ({"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True}, "gptq-int4-g128-sym"),
    ({"quant_method": "gptq", "bits": 8, "group_size": -1, "sym": True}, "gptq-int8-channel-sym"),
    ({"quant_method": "gptq", "bits": 3, "group_size": 64, "sym": False}, "gptq-int3-g64"),
    ({"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True}, "awq-int4-g64"),
    ({"quant_method": "awq", "w_bit": 4, "q_group_size": 128, "zero_point": False}, "awq-int4-g128-sym"),
    (compressed(INT4 | {"group_size": 32}), "int4-g32-sym"), (compressed(INT4 | {"symmetric": False}), "int4-g128"),
    (compressed({"num_bits": 8, "type": "int", "strategy": "channel"}), "int8-channel-sym"),
    (compressed({"num_bits": 8, "type": "int", "strategy": "channel"}, {"num_bits": 8, "type": "int"}), "int8"),
    (compressed(INT4, {"num_bits": 8, "type": "int"}), "w4a8-g128-sym"),
    (compressed({"num_bits": 8, "type": "float"}, {"num_bits": 8, "type": "float"}), "fp8"),
    (compressed({"num_bits": 8, "type": "float", "strategy": "block"}, {"num_bits": 8, "type": "float"}), "fp8_block"),
    (compressed({"num_bits": 4, "type": "float", "group_size": 16}, {"num_bits": 4, "type": "float"}), "fp4"),
    (compressed(INT4, ignore=["lm_head"]), "int4-g128-sym")])
def test_hugging_face_quantised_formats(table, name):
    found = ModelSpec.from_hf_config(hf(quantization_config=table))
    assert found.dtype == name and weight_format("auto", found).expert_bytes > 0


@pytest.mark.parametrize("table, key", [
    ({"quant_method": "gptq", "bits": 16, "group_size": 128}, "bits"),
    ({"quant_method": "gptq", "bits": 4, "group_size": 0.5}, "group_size"),
    (compressed({"num_bits": 8, "type": "float"}), "config_groups"), (compressed(INT4, ignore=["re:.*"]), "ignore"),
    (compressed(INT4, {"num_bits": 8, "type": "float"}), "config_groups"),
    (compressed({"num_bits": 4, "type": "float", "group_size": 16}), "config_groups"),
    (compressed(INT4 | {"group_size": None}), "group_size"),
    (compressed(INT4, ignore=["re:.*self_attn.*"]), "ignore"),
    ({"quant_method": "compressed-tensors", "config_groups": {"a": {"weights": INT4}, "b": {
        "weights": INT4 | {"group_size": 64}}}}, "config_groups")])
def test_hugging_face_formats_without_a_name(table, key):
    with pytest.raises(InputError, match=f"{key}.*this format is not known; remove quantization_config") as refusal:
        ModelSpec.from_hf_config(hf(quantization_config=table))
    assert refusal.value.field.startswith("model.config.quantization_config.")


def test_experts_alone_in_four_bits():
    """Kimi-K2.5: groups of 32 with a 16-bit scale in routed experts, all else in 16 bits; 595 GB as published."""
    model = load_model("kimi-k2.5")
    table = compressed(INT4 | {"group_size": 32}, ignore=KIMI)
    assert ModelSpec.from_hf_config(HF_CONFIGS["deepseek-v3"] | {"quantization_config": table}).dtype == model.dtype
    fmt = weight_format("auto", model)
    assert (fmt.linear_bytes, fmt.expert_bytes) == (2, 4.5 / 8)
    assert rank_weight_bytes(model) == pytest.approx(595e9, rel=0.01)


def test_hugging_face_files(tmp_path):
    folder = tmp_path / "my-model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(hf()))
    found = ModelSpec.from_hf_config(folder)
    assert found.name == "my-model" and found == ModelSpec.from_hf_config(folder / "config.json")
    wrapped = ModelSpec.from_hf_config({"model_type": "mistral3", "text_config": hf(model_type="mistral")})
    assert wrapped.layers == 32 and "text_config" in wrapped.source
    (tmp_path / "broken.json").write_text("{")
    for path, message in ((tmp_path / "none.json", "cannot be read"), (tmp_path / "broken.json", "not JSON")):
        with pytest.raises(InputError, match=message):
            ModelSpec.from_hf_config(path)


def test_hugging_face_refusals():
    with pytest.raises(InputError, match="not known; known are .*llama"):
        ModelSpec.from_hf_config(hf(model_type="mamba"))
    incomplete = hf()
    del incomplete["num_hidden_layers"], incomplete["vocab_size"]
    with pytest.raises(InputError, match="lacks num_hidden_layers, vocab_size"):
        ModelSpec.from_hf_config(incomplete)
    with pytest.raises(InputError, match="kv_lora_rank"):
        ModelSpec.from_hf_config(hf(model_type="deepseek_v3"))


@pytest.mark.parametrize("key, value, changes", [
    ("hidden_size", "4096", {}), ("hidden_size", 4096.5, {}), ("num_attention_heads", 0, {}),
    ("num_hidden_layers", True, {}), ("num_hidden_layers", 10**12, {}), ("num_hidden_layers", float("nan"), {}),
    ("vocab_size", [1], {}), ("num_key_value_heads", -8, {}), ("num_key_value_heads", 5, {}),
    ("tie_word_embeddings", "no", {}), ("attention_bias", 1, {}), ("torch_dtype", "weird", {}),
    ("torch_dtype", 16, {}), ("quantization_config", "fp8", {}),
    ("sliding_window", "x", dict(model_type="mistral")), ("sliding_window", -1, {}),
    ("layer_types", "sliding", dict(sliding_window=128)), ("decoder_sparse_step", 0, HF_CONFIGS["qwen3-30b-a3b"]),
    ("num_experts_per_tok", 200, HF_CONFIGS["qwen3-30b-a3b"]),
    ("first_k_dense_replace", "3", HF_CONFIGS["deepseek-v3"]),
    ("moe_layer_freq", 0, HF_CONFIGS["deepseek-v3"]), ("use_sliding_window", "no", HF_CONFIGS["qwen2.5-7b"]),
    ("max_window_layers", 1.5, HF_CONFIGS["qwen2.5-7b"] | dict(use_sliding_window=True)),
])
def test_hugging_face_values_of_the_wrong_kind(key, value, changes):
    with pytest.raises(InputError) as refusal:
        ModelSpec.from_hf_config(hf(**changes) | {key: value})
    error = refusal.value
    assert error.field == f"model.config.{key}" and error.remedy
    assert error.value is value or error.value == value


def test_hugging_face_groups_of_the_wrong_kind():
    for groups in ("x", {"g": 3}, {"g": {"weights": 4}}):
        quantised = {"quant_method": "compressed-tensors", "config_groups": groups}
        with pytest.raises(InputError, match="quantization_config.config_groups.* is not an object"):
            ModelSpec.from_hf_config(hf(quantization_config=quantised))
    for config in (None, 5):
        with pytest.raises(InputError, match="neither a path nor a table"):
            ModelSpec.from_hf_config(config)


def test_a_byte_order_mark_is_no_mistake(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(hf()), encoding="utf-8-sig")
    assert ModelSpec.from_hf_config(tmp_path).layers == 32


TABLE = dict(name="mine", layers=2, hidden=64, heads=32, kv_heads=8, head_dim=16, ffn=128, vocab=100,
             max_position=64)


@pytest.mark.parametrize("make", [lambda: ModelSpec(**TABLE | {"layers": "a"}), lambda: ModelSpec.from_dict(None),
                                  lambda: ModelSpec.from_dict(TABLE | {"layers": None}),
                                  lambda: ModelSpec.from_dict({"name": "mine"})])
def test_tables_of_the_wrong_kind(make):
    with pytest.raises(InputError) as refusal:
        make()
    assert refusal.value.field.startswith("model") and refusal.value.remedy


@pytest.mark.parametrize("changes, message", [
    (dict(heads=30), "does not divide"), (dict(experts=8, experts_per_token=9, moe_ffn=1), "between 1 and"),
    (dict(experts=8, experts_per_token=2), "inner size"), (dict(kv_lora_rank=512), "latent attention needs"),
    (dict(sliding_window=128), "window_layers"), (dict(layers=0), "at least 1|>= 1"), (dict(colour=1),
                                                                                       "colour"),
    (dict(hidden="big"), "hidden"),
])
def test_tables_are_checked(changes, message):
    table = TABLE
    assert ModelSpec.from_dict(table).num_parameters > 0
    with pytest.raises(InputError, match=message):
        ModelSpec.from_dict(table | changes)
