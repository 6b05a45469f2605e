"""Operator counts against published algebra: MLA and MoE tables, weights and FLOP of whole passes."""

import jax.numpy as jnp
import msgspec
import numpy as np
import pytest

from jaxsim.cost import operators
from jaxsim.cost.base import BatchStats
from jaxsim.cost.operators import attention_work, distinct_experts, head_work, token_work
from jaxsim.cost.roofline import roofline
from jaxsim.spec.device import load_device
from jaxsim.spec.memory import rank_weight_bytes
from jaxsim.spec.model import ModelSpec, load_model
from jaxsim.spec.plan import Plan, weight_format

BF16 = weight_format("bfloat16")

# Expected distinct experts under uniform top-k, for 1, 2, 4, ..., 256 tokens, to the printed digits.
DISTINCT = {
    (8, 2): "2.0 3.5 5.5 7.2 7.9 8.0 8.0 8.0 8.0",
    (16, 4): "4.0 7.0 10.9 14.4 15.8 16.0 16 16 16",
    (64, 6): "6.0 11.4 20.8 34.9 50.8 61.3 63.9 64 64",
    (128, 8): "8.0 15.5 29.1 51.6 82.4 111.8 125.9 128 128",
    (256, 8): "8.0 15.8 30.5 57.4 102 163 222 252 256",
}


def moe(experts, per_token):
    return ModelSpec(name="moe", layers=1, hidden=64, heads=4, kv_heads=4, head_dim=16, ffn=0, vocab=100,
                     max_position=64, experts=experts, experts_per_token=per_token, moe_ffn=32)


@pytest.mark.parametrize("experts, per_token", DISTINCT)
def test_distinct_experts(experts, per_token):
    model, tokens = moe(experts, per_token), jnp.asarray([2.0 ** i for i in range(9)])
    expected = DISTINCT[experts, per_token].split()
    for value, printed in zip(distinct_experts(model, tokens), expected, strict=True):
        assert abs(float(value) - float(printed)) <= 0.5 * 10.0 ** -len(printed.partition(".")[2]) * 1.02
    assert np.all(distinct_experts(model, tokens, operators.TOPK) == per_token)
    assert np.all(distinct_experts(model, tokens, operators.ALL) == experts)


def test_latent_attention():
    """Absorbed decode: 278,528 FLOP over 1,152 bytes; prefill: 81,920 FLOP a query-key pair (DeepSeek-V3)."""
    work = attention_work(load_model("deepseek-v3"), Plan(), 2)
    assert (work.decode_flops, work.decode_bytes) == (278528, 1152)
    # A unit of prefill_pairs is half a pair.
    assert 2 * work.pair_flops == 81920
    assert work.chunk_flops == 2 * 512 * 128 * (128 + 128)
    # The cache is not sharded, the heads are.
    split = attention_work(load_model("deepseek-v3"), Plan(tensor_parallel_size=8), 2)
    assert (split.decode_flops, split.decode_bytes) == (278528 / 8, 1152)


def test_grouped_query_attention():
    """Arithmetic intensity of decode is 2 (H / K) / b: 8 FLOP a byte for 8-way groups in 16 bits."""
    work = attention_work(load_model("llama-3.1-70b"), Plan(), 2)
    assert work.decode_flops / work.decode_bytes == 8
    assert (work.full_layers, work.window_layers) == (80, 0)
    oss = attention_work(load_model("gpt-oss-120b"), Plan(), 2)
    assert (oss.full_layers, oss.window_layers) == (18, 18)
    assert attention_work(load_model("llama-3.1-70b"), Plan(), 1).decode_bytes == work.decode_bytes / 2


def all_work(model, plan, tokens):
    return token_work(model, plan, BF16, jnp.asarray(tokens)) + head_work(model, plan, BF16,
                                                                          jnp.asarray(tokens))


@pytest.mark.parametrize("name", ["llama-3.1-8b", "llama-2-7b", "qwen3-32b", "opt-13b", "mixtral-8x7b",
                                  "qwen3-30b-a3b", "deepseek-v3", "gpt-oss-120b", "dbrx"])
def test_every_weight_is_read_once_and_multiplied_once(name):
    model = load_model(name)
    works = all_work(model, Plan(), 1.0)
    # Embedding rows are looked up, biases and norms are not matrix products.
    small = model.embedding_parameters - model.tie_embeddings * model.vocab * model.hidden
    weights = model.num_active_parameters - small
    read = sum(w.calls * float(w.weight_bytes) for w in works) / 2
    assert read == pytest.approx(weights, rel=2e-3)
    assert sum(w.calls * float(w.flops) for w in works) == pytest.approx(2 * read, rel=2e-3)


@pytest.mark.parametrize("name", ["llama-3.1-70b", "mixtral-8x7b", "deepseek-v3"])
def test_tensor_parallelism_shares_the_work(name):
    model = load_model(name)
    one = sum(w.calls * float(w.flops) for w in all_work(model, Plan(), 64.0))
    four = sum(w.calls * float(w.flops) for w in all_work(model, Plan(tensor_parallel_size=4), 64.0))
    assert one / 4 <= four < 1.25 * one / 4
    reduced = [w for w in all_work(model, Plan(tensor_parallel_size=4), 64.0) if w.name == "all_reduce"]
    assert reduced[0].calls == 2 * model.layers + 1
    assert float(reduced[0].message_bytes) == 64 * model.hidden * 2


def test_expert_parallelism_exchanges_tokens():
    model = load_model("deepseek-v3")
    plan = Plan(data_parallel_size=8, enable_expert_parallel=True, all_to_all=True)
    works = {w.name: w for w in all_work(model, plan, 32.0)}
    # Dispatch and combine, a call each: k copies of each token.
    exchange = works["expert_exchange"]
    assert exchange.calls == 2 * 58 and float(exchange.message_bytes) == 32 * 8 * 7168 * 2
    assert "all_reduce" not in works
    # 256 tokens over 8 ranks touch what 256 tokens touch in all, an eighth of it each.
    alone = {w.name: w for w in all_work(model, Plan(), 256.0)}
    assert float(works["experts"].weight_bytes) == pytest.approx(float(alone["experts"].weight_bytes) / 8)
    # The busiest rank carries more than its share.
    assert float(works["experts"].flops) > float(alone["experts"].flops) / 8


def test_tensor_ranks_send_a_share_of_the_tokens_each():
    """From 32 tokens eight for each of four: router and shared experts, which are whole, are for these; what comes back
    is gathered once in each of 58 layers, in place of an all-reduce. Sequence parallelism gathers by itself."""
    model = load_model("deepseek-v3")
    plan = Plan(tensor_parallel_size=4, data_parallel_size=8, enable_expert_parallel=True, all_to_all=True)
    works = {w.name: w for w in all_work(model, plan, 30.0)}
    assert works["all_reduce"].calls == 2 * 61 + 1 - 58
    gather = works["expert_output_gather"]
    assert (gather.kind, gather.calls, gather.ranks) == ("all_gather", 58, 4) and not gather.is_exchange
    assert float(gather.message_bytes) == 32 * 7168 * 2
    assert float(works["router"].flops) == 2 * 7168 * 256 * 8
    assert float(works["shared_expert_up"].flops) == 2 * 7168 * 2 * 2048 * 8
    whole, cut = (rank_weight_bytes(model, p) for p in (plan, msgspec.structs.replace(plan, all_to_all=False)))
    assert whole - cut == pytest.approx(58 * 3 * 7168 * 2048 * 3 / 4)
    more = {w.name: w for w in all_work(model, msgspec.structs.replace(plan, enable_sequence_parallelism=True), 30.0)}
    assert "expert_output_gather" not in more and more["sequence_gather"].calls == 2 * 61 + 1 - 58


def test_skewed_experts():
    """One token touches k, many touch all, and in between fewer the more popularities differ."""
    model, tokens = load_model("qwen3-30b-a3b"), np.array([1.0, 16.0, 64.0, 1e5])
    counts = [np.asarray(distinct_experts(model, tokens, skew=v)) for v in (0.0, 0.02, 0.05, 0.3, 0.6, 1.2)]
    np.testing.assert_allclose([c[0] for c in counts], 8, rtol=1e-4)
    np.testing.assert_allclose([c[3] for c in counts[:-1]], 128, rtol=2e-3)
    np.testing.assert_allclose(counts[2], counts[0], rtol=2e-3)
    assert np.all(np.diff(np.array(counts)[2:, 1:3], axis=0) < 0)
    # Against draws: 64 tokens, popularities of a gamma law.
    rng, touched = np.random.default_rng(0), []
    for _ in range(300):
        weight = rng.gamma(1 / 0.36, size=128)
        rate = 64 * 8 * weight / weight.sum()
        touched.append((rng.poisson(rate) > 0).sum())
    assert counts[4][2] == pytest.approx(np.mean(touched), rel=0.02)


def test_expert_parallelism_gathers_tokens():
    model = load_model("qwen3-30b-a3b")
    plan = Plan(tensor_parallel_size=2, data_parallel_size=4, enable_expert_parallel=True)
    works = {w.name: w for w in all_work(model, plan, 32.0)}
    # Hidden states and router logits of all ranks' tokens go to each, sums come back.
    gather, scatter = works["expert_gather"], works["expert_scatter"]
    assert gather.calls == scatter.calls == 48 and gather.ranks == scatter.ranks == 4
    assert float(gather.message_bytes) == 4 * 32 * (2048 + 128) * 2
    assert float(scatter.message_bytes) == 4 * 32 * 2048 * 2
    assert works["all_reduce"].calls == 2 * 48 + 1 and "expert_exchange" not in works


def test_tokens_that_are_sent_pass_over_their_own_ranks_rows():
    """All-to-all: the rows of the busiest rank, not those of all; gathered: all rows on every rank."""
    model = load_model("deepseek-v3")
    for all_to_all in (True, False):
        plan = Plan(data_parallel_size=8, enable_expert_parallel=True, all_to_all=all_to_all)
        load = {w.name: w for w in all_work(model, plan, 512.0)}["experts"].load
        pairs = 512.0 * 8
        busiest = np.random.default_rng(0).poisson(pairs, (4000, 8)).max(axis=1).mean()
        assert float(load.tokens) == 8 * 512
        if all_to_all:
            assert float(load.row_tokens) == pytest.approx(busiest / 8, rel=1e-3)
        else:
            assert load.row_tokens is None
    stats = BatchStats.of(0, 0, 1, 2048, 2048, 2048.0 ** 2)
    seconds = [float(roofline(model, load_device("h200"), msgspec.structs.replace(plan, all_to_all=sent))
                     .operator_seconds(stats)["experts"]) for sent in (True, False)]
    assert seconds[0] < 0.8 * seconds[1]


def test_experts_cut_over_data_parallel_ranks():
    """Without expert parallelism: an eighth of all 8 experts a rank, for the tokens of all, which are gathered whatever
    the backend; every layer reduces twice among the two tensor-parallel ranks."""
    plan = Plan(tensor_parallel_size=2, data_parallel_size=4, all_to_all=True)
    works = {w.name: w for w in all_work(load_model("mixtral-8x7b"), plan, 32.0)}
    experts, slice_size = works["experts"], 3 * 4096 * (14336 // 8)
    assert float(experts.flops) == 2 * slice_size * (4 * 32 * 2)
    # 256 pairs touch all 8 of them.
    assert float(experts.weight_bytes) == pytest.approx(8 * slice_size * 2, rel=1e-6)
    assert experts.load.row_tokens is None and experts.load.local_experts == 8
    gather, scatter = works["expert_gather"], works["expert_scatter"]
    assert gather.ranks == scatter.ranks == 4 and gather.calls == scatter.calls == 32
    assert float(gather.message_bytes) == 4 * 32 * (4096 + 8) * 2
    assert float(scatter.message_bytes) == 4 * 32 * 4096 * 2
    assert works["all_reduce"].calls == 2 * 32 + 1 and "expert_exchange" not in works
    # Ranks of a dense model have nothing in common.
    dense = {w.name for w in all_work(load_model("llama-3.1-8b"), plan, 32.0)}
    assert not {"expert_gather", "expert_scatter"} & dense


def test_pipeline_hops():
    works = {w.name: w for w in all_work(load_model("llama-3.1-70b"), Plan(pipeline_parallel_size=4), 10.0)}
    assert works["stage_hop"].calls == 3
    assert float(works["stage_hop"].message_bytes) == 2 * 10 * 8192 * 2
