"""Attention that cuts keys as well as queries: few queries behind many keys fill the device, many change nothing."""

import numpy as np
import pytest

from jaxsim.cost.base import BatchStats
from jaxsim.cost.roofline import roofline
from jaxsim.spec.device import load_device
from jaxsim.spec.model import load_model
from jaxsim.spec.plan import Plan

pytestmark = pytest.mark.unoptimised

MODEL = load_model("llama-3-8b")


def attention_s(tokens: int, history: int, device: str, tensors: int, **more) -> float:
    cost = roofline(MODEL, load_device(device), Plan(tensor_parallel_size=tensors), **more)
    stats = BatchStats.of(0, 0, 1, tokens, history + tokens, tokens * (2.0 * history + tokens))
    return float(cost.operator_seconds(stats)["attention_prefill"])


@pytest.mark.parametrize("device, rows", [("h100", 1), ("a100_sxm_80", 4)])
def test_few_queries_behind_many_keys(device, rows):
    """32 tokens of four query heads to a KV head are a tile of 128 rows, or, where heads are not packed, four that are
    a quarter full: few multiprocessors of more than a hundred, else all."""
    whole, split = (attention_s(32, 1_000_000, device, 8, split_kv=x) for x in (False, True))
    flops = 4 * MODEL.layers * MODEL.heads * MODEL.head_dim * 32 * 1e6 / 8
    reads = MODEL.kv_bytes_per_token() / 8 * 1e6
    spec = load_device(device)
    products_s, reads_s = rows * flops / spec.peak("bf16").flops, reads / spec.memory_bytes_per_s
    assert whole > 20 * split and max(products_s, reads_s) < split < 2 * (products_s + reads_s)


@pytest.mark.parametrize("device", ["h100", pytest.param("a100_sxm_80", marks=pytest.mark.slow)])
def test_many_queries(device):
    """A prompt of thousands of tokens has tiles for all multiprocessors."""
    whole, split = (attention_s(16_384, 0, device, 1, split_kv=x) for x in (False, True))
    assert split <= whole and split == pytest.approx(whole, rel=0.03)


def test_nobody_waits_for_the_longest_context():
    whole, split = (roofline(MODEL, load_device("a100_sxm_80"), split_kv=x).tail for x in (False, True))
    assert whole is not None and split is None
    assert np.isfinite(attention_s(1, 0, "a100_sxm_80", 1, split_kv=True))
