"""Quantised weights: bits that are stored, names, memory, what they do to the time of a step, published scores."""

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxsim._core.errors import InputError
from jaxsim.cost.base import BatchStats
from jaxsim.cost.roofline import roofline
from jaxsim.spec.device import load_device
from jaxsim.spec.memory import kv_blocks, rank_weight_bytes
from jaxsim.spec.model import load_model, model_catalogue
from jaxsim.spec.plan import Plan, kv_cache_bytes, weight_format
from jaxsim.spec.quantization import METHODS, Quantization, linear_matrices, load_quality, quality

# What is stored


@pytest.mark.parametrize("bits, by_group", [
    # AdaDim's storage (fp16 scale, zero point of as many bits): bits a weight at groups of 128, 64, 32.
    (2, (2.141, 2.281, 2.563)), (3, (3.148, 3.297, 3.594)), (4, (4.156, 4.313, 4.625)), (8, (8.188, 8.375, 8.75))])
def test_published_bits_per_weight(bits, by_group):
    for group, published in zip((128, 64, 32), by_group, strict=True):
        record = Quantization(bits=bits, group_size=group)
        # Half of the last digit; 8.1875 lies on the edge.
        assert record.bits_per_weight() == pytest.approx(published, abs=0.0005 + 1e-12)
        for granularity in ("per_output_channel", "per_input_channel"):
            record = msgspec.structs.replace(record, granularity=granularity)
            assert record.bits_per_weight(4096, 11008) == record.bits_per_weight()


@pytest.mark.parametrize("bits, published", [(3, 3.25), (4, 4.25)])
def test_published_bits_with_a_16_bit_zero_point(bits, published):
    assert Quantization(bits=bits, zero_bits=16).bits_per_weight() == published


matrices = st.tuples(st.integers(1, 40), st.integers(1, 40))
records = st.builds(
    Quantization, bits=st.integers(1, 8), group_size=st.none() | st.integers(1, 50),
    scale_bits=st.sampled_from([8, 16]), zero_bits=st.none() | st.integers(0, 16),
    granularity=st.sampled_from(["per_output_channel", "per_input_channel"]),
    method=st.sampled_from(METHODS), activation_bits=st.sampled_from([8, 16]),
    kv_format=st.sampled_from(["auto", "int4", "int8", "fp8", "float16"]))


@given(records, matrices)
def test_stored_bits_are_those_counted_one_group_at_a_time(record, matrix):
    inputs, outputs = matrix
    zero = record.bits if record.zero_bits is None else record.zero_bits
    weights = np.zeros((inputs, outputs) if record.granularity == "per_input_channel" else (outputs, inputs))
    stored = 0
    for channel in weights:
        for start in range(0, len(channel), record.group_size or len(channel)):
            stored += len(channel[start:start + (record.group_size or len(channel))]) * record.bits
            stored += record.scale_bits + zero
    assert record.matrix_bits(inputs, outputs) == stored


def test_partial_groups_take_whole_scales():
    along, across = Quantization(bits=4, group_size=128), Quantization(bits=4, granularity="per_input_channel")
    # 200 inputs are two groups of each of 128 outputs, and one group of each input.
    assert along.num_groups(200, 128) == 256 and across.num_groups(200, 128) == 200
    assert along.bits_per_weight(200, 128) == 4 + 20 * 2 / 200 > along.bits_per_weight()


@pytest.mark.parametrize("fields, message", [
    (dict(bits=16), "quantization.bits = 16.*bfloat16"), (dict(bits=0), "from 1 to 8"), (dict(bits=4.0), "bits"),
    (dict(bits=True), "bits"), (dict(bits=4, group_size=0), "group_size = 0"),
    (dict(bits=4, scale_bits=0), "scale_bits"), (dict(bits=4, zero_bits=-1), "zero_bits"),
    (dict(bits=4, granularity="per_tensor"), "granularity.*per_input_channel"), (dict(bits=4, method="rnt"), "'rtn'"),
    (dict(bits=4, activation_bits=4), "8 or 16"), (dict(bits=4, kv_format="int3"), "int")])
def test_impossible_records(fields, message):
    with pytest.raises(InputError, match=message):
        Quantization(**fields)


def test_impossible_matrices():
    with pytest.raises(InputError, match="no weights"):
        Quantization(bits=4).matrix_bits(0, 8)
    with pytest.raises(InputError, match="without a matrix"):
        Quantization(bits=4, group_size=None).bits_per_weight()


# Names


@given(records)
def test_names_round_trip(record):
    assert Quantization.from_name(record.name) == record
    assert Quantization.from_name(record.name.upper().replace("-", "_")) == record


@pytest.mark.parametrize("name, fields", [
    ("int3-g128", dict(bits=3)), ("w4g64", dict(bits=4, group_size=64)), ("W4A16_G128", dict(bits=4)),
    ("w4a16-g128-perin", dict(bits=4, granularity="per_input_channel")), ("int4-g128-asym", dict(bits=4)),
    ("awq-int4-g128", dict(bits=4, method="awq")), ("gptq-w8-channel-sym", dict(
        bits=8, group_size=None, zero_bits=0, method="gptq")),
    ("int4-g32-sym-experts", dict(bits=4, group_size=32, zero_bits=0, experts_only=True)),
    ("int4-g64-zero16", dict(bits=4, group_size=64, zero_bits=16)), ("w4a8kv4-g128", dict(
        bits=4, activation_bits=8, kv_format="int4")), ("int4-g128-zero4", dict(bits=4))])
def test_names(name, fields):
    assert Quantization.from_name(name) == Quantization(**fields)


@pytest.mark.parametrize("name, message", [
    ("int3", "does not say how many weights share a scale; write int3-g128"), ("int4-g0", "group_size = 0"),
    ("w16a16-g128", "bits = 16"), ("w4a8-g128-experts", "activations of 16 bits only"),
    ("int4-g128-prein", "did you mean"), ("int3-g12x", "did you mean 'int3-g128'"),
    ("w4a4-g128", "activation_bits = 4"), ("in3-g128", "did you mean.*'int3-g128'")])
def test_impossible_names(name, message):
    with pytest.raises(InputError, match=f"model.dtype = '{name}'.*{message}"):
        weight_format(name)


@pytest.mark.parametrize("name, linear_bytes, compute", [
    ("int4", 0.515625, "bf16"), ("w4a16", 0.515625, "bf16"), ("awq", 0.515625, "bf16"), ("gptq", 0.515625, "bf16"),
    ("int8", 1, "int8"), ("w8a8", 1, "int8"), ("fp4", 0.5625, "fp4"), ("mxfp4", 2, "bf16")])
def test_names_without_a_group_mean_what_they_did(name, linear_bytes, compute):
    fmt = weight_format(name)
    assert (fmt.linear_bytes, fmt.other_bytes, fmt.compute) == (linear_bytes, 2, compute)


def test_kv_cache_of_a_name():
    assert kv_cache_bytes("auto", "int4-g128") == 2 and kv_cache_bytes("auto", "w4a16kv8-g128") == 1
    assert kv_cache_bytes("auto", "w4a8kv4-g128") == 0.5
    # What is said of the cache itself goes before.
    assert kv_cache_bytes("fp8", "w4a8kv4-g128") == 1


# Memory


@pytest.mark.parametrize("name", sorted(model_catalogue()))
def test_quantised_matrices_are_those_of_the_model(name):
    model = load_model(name)
    linear, experts = (sum(n * inputs * outputs for n, inputs, outputs in m) for m in linear_matrices(model))
    # Without the biases of the FFN, which are not quantised.
    layer = msgspec.structs.replace(model, ffn_bias=False).layer_parameters()
    assert experts == model.num_moe_layers * layer.experts
    assert linear == (model.layers * layer.attention + model.num_dense_layers * layer.dense_ffn
                      + model.num_moe_layers * layer.shared)


def test_weights_of_llama_2_70b():
    """138 GB in 16 bits; at 4.156 bits 36 GB if all were quantised, 0.8 more with embeddings and head in 16."""
    model = load_model("llama-2-70b")
    assert rank_weight_bytes(model, Plan(), weight_format("float16")) == pytest.approx(138e9, rel=0.005)
    assert model.num_parameters * Quantization(bits=4).bits_per_weight() / 8 == pytest.approx(36e9, rel=0.01)
    quantised = rank_weight_bytes(model, Plan(), weight_format("int4-g128", model))
    assert 36e9 < quantised < 37e9


@pytest.mark.parametrize("name", ["llama-2-7b", "mixtral-8x7b"])
def test_blocks_grow_as_weights_shrink(name):
    plan = Plan(tensor_parallel_size=2)
    formats = ("float16", "int8-g128", "int4-g128", "int3-g128", "int2-g128")
    budgets = [kv_blocks(load_model(name), load_device("a100"), plan, dtype=f) for f in formats]
    weights, blocks = [b.weight_bytes for b in budgets], [b.num_blocks for b in budgets]
    assert weights == sorted(weights, reverse=True) and blocks == sorted(blocks) and len(set(blocks)) == len(blocks)
    for i in range(len(budgets) - 1):
        # The bytes that weights free become KV blocks, less what fills no whole one.
        freed = (weights[i] - weights[i + 1]) / budgets[i].block_bytes
        assert abs(blocks[i + 1] - blocks[i] - freed) <= 1


def test_groups_along_either_axis_take_the_same_bytes_where_they_divide():
    model = load_model("llama-2-70b")
    along, across = (weight_format(n, model) for n in ("int3-g128", "int3-g128-perin"))
    assert along.linear_bytes == across.linear_bytes and along.name != across.name
    # Of whole channels, those of the shorter side cost more.
    along, across = (weight_format(n, model) for n in ("int3-channel", "int3-channel-perin"))
    assert along.linear_bytes != across.linear_bytes and min(along.linear_bytes, across.linear_bytes) > 3 / 8


# Time

DECODE = BatchStats.of(num_decode=1, decode_context=512)
PROMPT = BatchStats.of(num_prefill=1, prefill_tokens=4096, prefill_pairs=4096**2, prefill_context=4096, num_sampled=1)


def seconds(dtype, stats, model="llama-2-7b", device="a100"):
    return roofline(load_model(model), load_device(device), dtype=dtype, host="none").explain(stats).device_s


@pytest.mark.parametrize("device", ["a100", "h100", "rtx_pro_6000"])
def test_decode_is_faster_with_fewer_bits(device):
    times = [seconds(f, DECODE, device=device) for f in ("float16", "int8-g128", "int4-g128", "int3-g128", "int2-g128")]
    assert times == sorted(times, reverse=True)
    # Never by more than the bytes: embeddings, head, attention and floors stay (18 %: the kernel's own bandwidth).
    assert times[2] > times[0] * Quantization(bits=4).bits_per_weight() / 16 / 1.18


@pytest.mark.parametrize("device", ["a100", "h100", "rtx_pro_6000"])
def test_a_long_prompt_is_not(device):
    """It is bound by multiplication, and dequantisation comes on top, whatever the bits."""
    plain, *quantised = (seconds(f, PROMPT, device=device) for f in ("float16", "int4-g128", "int2-g128"))
    assert min(quantised) > plain
    assert quantised[0] == pytest.approx(quantised[1], rel=0.02)


def test_smaller_groups_cost_bandwidth():
    """AdaDim's kernel is faster the larger its groups; so is this one."""
    times = [seconds(f"int4-g{g}", DECODE) for g in (32, 64, 128, 256)]
    assert times == sorted(times, reverse=True) and times[-1] < times[0]


def test_8_bit_products_do_not_dequantise():
    both = [roofline(load_model("llama-2-7b"), load_device("a100"), dtype=f"w4a{a}-g128") for a in (16, 8)]
    assert [cost.gemm.dequantise_rows is None for cost in both] == [False, True]
    assert both[0].gemm_16.dequantise_rows is None
    assert both[1].peak_flops == 2 * both[0].peak_flops


# Published scores


def test_every_score_is_sourced_and_found_again():
    rows = load_quality()
    assert len({(r.table, r.model, r.metric, r.quantization) for r in rows}) == len(rows) > 200
    for row in rows:
        assert row.source and 0 <= row.value <= 100
        assert quality(row.model, row.quantization, row.metric, row.table, secondary=True) == row.value
        found = quality(row.model, row.quantization, row.metric, row.table)
        assert found == (row.value if row.confidence == "source" else None)


@pytest.mark.parametrize("format, table, published", [
    (None, "auto-round", 42.69), ("int4-g128", "auto-round", 40.91), ("gptq-int3-g128", "auto-round", 36.11),
    ("gptq-int4-g128", "marlin", 40.07), (None, "marlin", 41.80)])
def test_scores(format, table, published):
    assert quality("llama-2-7b", format, "mmlu", table) == published


@pytest.mark.parametrize("model, format, metric", [
    ("llama-2-7b", "int5-g128", "mmlu"), ("llama-2-7b", "int3-g64", "mmlu"), ("llama-2-7b", "int3-g128-perin", "mmlu"),
    ("llama-2-7b", "w3a8-g128", "mmlu"), ("llama-2-7b", "w3a16kv4-g128", "mmlu"), ("llama-2-7b", "int3-g128", "gsm8k"),
    ("nobody/knows", "int3-g128", "mmlu")])
def test_what_nobody_published_is_none(model, format, metric):
    """Neighbours are there in every case: nothing is interpolated or taken from them."""
    assert quality("llama-2-7b", "int3-g128", "mmlu") is not None
    assert quality(model, format, metric) is None


def test_unknown_tables():
    with pytest.raises(InputError, match="did you mean 'auto-round'"):
        quality("llama-2-7b", None, "mmlu", "autoround")
