"""Prompts in a ring, caches cut by tokens, sequence parallelism: algebra and limits."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsim.cost.base import BatchStats
from jaxsim.cost.context_parallel import Ring
from jaxsim.cost.operators import token_work
from jaxsim.cost.roofline import roofline
from jaxsim.spec.device import load_device
from jaxsim.spec.memory import kv_blocks
from jaxsim.spec.model import load_model
from jaxsim.spec.plan import Plan, weight_format

LLAMA, DEEPSEEK, H100, H200 = load_model("llama-3.1-70b"), load_model("deepseek-v3"), load_device("h100"), load_device(
    "h200")


@pytest.mark.parametrize("ranks, tokens", [(2, 8), (4, 64), (8, 160)])
def test_front_and_back_parts_balance_causal_pairs(ranks, tokens):
    """Counted pair by pair, with a history that all queries see."""
    history, part = 24, tokens // (2 * ranks)
    pairs = np.zeros(ranks)
    for block in range(2 * ranks):
        owner = min(block, 2 * ranks - 1 - block)
        pairs[owner] += sum(history + i + 1 for i in range(block * part, (block + 1) * part))
    assert np.all(pairs == pairs[0])
    # prefill_pairs is twice the pairs less the tokens.
    stats = BatchStats.of(3, 99, 1, tokens, history + tokens, float((history + tokens) ** 2 - history**2))
    own = Ring.of(ranks, 1, 0.0, 0.0, 0.0).of_rank(stats)
    assert int(own.prefill_tokens) == tokens // ranks and int(own.prefill_context) == history + tokens
    assert float(own.prefill_pairs) + int(own.prefill_tokens) == 2 * pairs[0]
    assert (int(own.num_decode), int(own.decode_context)) == (3, 99)


def test_chunks_are_padded_to_parts():
    ring = Ring.of(4, 1, 0.0, 0.0, 0.0)
    for tokens, expected in ((0, 0), (1, 2), (8, 2), (9, 4), (4096, 1024)):
        assert int(ring.of_rank(BatchStats.of(0, 0, 1, tokens, tokens, 1.0)).prefill_tokens) == expected
    assert int(Ring.of(1, 1, 0.0, 0.0, 0.0).of_rank(BatchStats.of(0, 0, 1, 7, 7, 49.0)).prefill_tokens) == 7


def test_a_ring_waits_for_the_slower_of_attention_and_link():
    """C steps: the first has its keys, the others wait for theirs if attention is done sooner."""
    ring = Ring.of(4, 10, 1e-6, 1e-9, 5e-5)
    for attention_s, keys in ((1e-2, 4000), (1e-5, 4000), (0.0, 0)):
        send_s, step_s = 10 * (1e-6 + keys / 4 * 1e-9), attention_s / 4
        total = step_s + 3 * max(step_s, send_s) + 3 * 5e-5
        found = attention_s + float(ring.more_seconds(jnp.asarray(attention_s), jnp.int32(keys)))
        assert found == pytest.approx(total, rel=1e-5)


def test_the_keys_of_a_history_do_not_travel():
    """Every rank has them: a small chunk behind a long history costs what it does with free links, but for latency."""
    cost = roofline(LLAMA, H100, Plan(tensor_parallel_size=8, prefill_context_parallel_size=2))
    made = cost.tables(8192, 8)
    free = eqx.tree_at(lambda t: t.ring.key_s, made, 0.0 * made.ring.key_s)
    behind, alone = prompt(64, 500_000), prompt(4096)
    assert float(made.device_seconds(behind)) == pytest.approx(float(free.device_seconds(behind)), rel=1e-3)
    assert float(made.device_seconds(alone)) > float(free.device_seconds(alone))
    # As their own keys alone: all of the history would take more than a tenth of a second.
    assert float(made.ring.layers * made.ring.key_s) * 500_000 > 0.1
    assert sum(map(float, cost.operator_seconds(behind).values())) == pytest.approx(
        float(made.device_seconds(behind)), rel=1e-3)


def prompt(tokens: int, history: int = 0) -> BatchStats:
    return BatchStats.of(0, 0, 1, tokens, history + tokens, float((history + tokens) ** 2 - history**2))


@pytest.mark.slow
def test_long_prompts_on_more_devices():
    """128k tokens of a prompt on four times as many devices take about a quarter; the tables say what operators do."""
    chunk, decodes = prompt(8192, 122880), BatchStats.of(4, 4000)
    seconds, alone = [], []
    for contexts in (1, 4):
        cost = roofline(LLAMA, H100, Plan(tensor_parallel_size=2, prefill_context_parallel_size=contexts))
        parts = {k: float(v) for k, v in cost.operator_seconds(chunk).items()}
        seconds.append(sum(parts.values()))
        tables = cost.tables(8192, 8)
        assert float(tables.device_seconds(chunk)) == pytest.approx(seconds[-1], rel=1e-3)
        assert (tables.ring is None) == (contexts == 1) == ("attention_ring" not in parts)
        assert cost.explain(chunk).device_s == pytest.approx(seconds[-1], rel=1e-4)
        alone.append(float(tables.iteration(decodes)))
    assert 3.6 < seconds[0] / seconds[1] < 4
    # Decodes are computed by all ranks alike.
    assert alone[0] == alone[1]


def test_experts_are_spread_over_context_ranks_too():
    plan = Plan(tensor_parallel_size=8, prefill_context_parallel_size=4, enable_expert_parallel=True)
    assert plan.num_devices == plan.expert_ranks == 32
    load = next(w for w in token_work(DEEPSEEK, plan, weight_format("fp8"), jnp.asarray([64.0])) if w.load).load
    assert float(load.tokens[0]) == 256 and load.local_experts == 8


def test_caches_cut_by_tokens_hold_as_many_times_more():
    """DeepSeek-V3 on TP8: eight copies of the cache, or one; Llama's 8 KV heads on 16 ranks are two."""
    for model, tensors, shards in ((DEEPSEEK, 8, 8), (LLAMA, 16, 2)):
        plans = [Plan(tensor_parallel_size=tensors, decode_context_parallel_size=n) for n in (1, shards)]
        one, many = (kv_blocks(model, H200, plan, block_size=16 * plan.decode_context_parallel_size) for plan in plans)
        assert many.kv_bytes == one.kv_bytes and many.block_bytes == one.block_bytes
        assert many.num_tokens == shards * one.num_tokens


@pytest.mark.slow
@pytest.mark.parametrize("model, tensors, shards", [(DEEPSEEK, 8, 8), (LLAMA, 16, 2)])
def test_decode_reads_a_part_of_each_context(model, tensors, shards):
    """Heads of all ranks over a part of the tokens; with free links nothing is lost where reads bound decode."""
    plain, cut = (roofline(model, H100, Plan(tensor_parallel_size=tensors, decode_context_parallel_size=n))
                  for n in (1, shards))
    n = jnp.asarray([32.0])
    (fixed, slope, _, saved), (more, less, none, kept) = (c.decode_attention(n) for c in (plain, cut))
    kernel, shape = cut.latent or cut.decode, cut.attention_shape()
    wide = shape._replace(heads=shape.heads * shards)
    assert float(less[0]) == pytest.approx(model.layers * float(kernel.slope(wide, n, cut.rates())[0]) / shards)
    assert float(less[0]) < float(slope[0]) and float(none[0]) == 0 and float(more[0]) > float(fixed[0])
    # Queries go one way, outputs and their weights the other.
    query, value = (576, 512) if model.is_mla else (128, 128)
    heads = shards * shape.heads
    messages = [(cut.shards.gather, 32 * heads * query * 2), (cut.shards.gather, shards * 32 * heads * 4),
                (cut.shards.scatter, 32 * heads * value * 2)]
    expected = sum(float(k.seconds(shards, jnp.asarray(float(b)), cut.shards.bytes_per_s)) for k, b in messages)
    assert float(more[0]) == pytest.approx(
        model.layers * (expected + float(kernel.fixed_seconds(wide, n, cut.rates())[0])), rel=1e-5)
    # Chunks gather what they read of the cache, not what they bring.
    first, later = (float(cut.tables(2048, 8).device_seconds(prompt(2048, h)) - plain.tables(2048, 8).device_seconds(
        prompt(2048, h))) for h in (0, 65536))
    key_s = float(cut.shards.key_seconds(cut._attention_work.chunk_bytes))
    assert abs(first) < 1e-6 and later == pytest.approx(model.layers * 65536 * key_s, rel=2e-2)


def test_sequence_parallelism():
    """Half of an all-reduce each way, norms on a share of the tokens, nothing else."""
    fmt, tokens = weight_format("bfloat16"), jnp.asarray([100.0])
    plans = (Plan(tensor_parallel_size=8, enable_sequence_parallelism=is_cut) for is_cut in (False, True))
    plain, cut = ({w.name: w for w in token_work(LLAMA, plan, fmt, tokens)} for plan in plans)
    assert cut.keys() ^ plain.keys() == {"all_reduce", "sequence_scatter", "sequence_gather"}
    for name in ("sequence_scatter", "sequence_gather"):
        assert cut[name].calls == 161 and float(cut[name].message_bytes[0]) == 104 * 8192 * 2
    assert float(cut["norms"].activation_bytes[0]) == float(plain["norms"].activation_bytes[0]) / 8
    cost = roofline(LLAMA, H100, Plan(tensor_parallel_size=8, enable_sequence_parallelism=True))
    # As many bytes as NCCL's all-reduce.
    big = jnp.asarray(1e9)
    both = sum(float(k.seconds(8, big, cost.link_bytes_per_s)) for k in (cost.tensor_scatter, cost.all_gather))
    reduce = roofline(LLAMA, H100, Plan(tensor_parallel_size=8), all_reduce="nccl").all_reduce
    assert both == pytest.approx(float(reduce.seconds(8, big, cost.link_bytes_per_s)), rel=0.15)


def test_links_have_derivatives():
    """Of the ring's link, through the tables' ring."""
    plan = Plan(tensor_parallel_size=16, prefill_context_parallel_size=2)

    cost = roofline(LLAMA, H100, plan)

    def seconds(link):
        changed = eqx.tree_at(lambda c: c.pass_bytes_per_s, cost, link)
        return changed.ring.more_seconds(jnp.asarray(0.0), jnp.int32(100_000))

    slope = float(jax.grad(seconds)(jnp.asarray(5e10)))
    assert np.isfinite(slope) and slope < 0
