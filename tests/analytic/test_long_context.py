"""Very long prompts: Mnemosyne's derived numbers, the chunk of a budget, and a pipeline replayed stage by stage."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsim._core.errors import InputError
from jaxsim.analytic import long_context as lc
from jaxsim.spec.model import load_model

pytestmark = pytest.mark.unoptimised

H100 = dict(peak_flops=989e12, memory_bytes_per_s=3.35e12)
COST = lc.LongContext(fixed_s=2e-3, token_s=4e-6, pair_s=2e-11, weights_s=1e-3, read_s=5e-9, merge_s=5e-4, hop_s=1e-5)


def test_saturating_chunk():
    """37 tokens for 8 query heads a KV head on an H100, twice as many for 4 (the paper says about 40)."""
    ridge = (H100["peak_flops"], H100["memory_bytes_per_s"])
    assert lc.saturating_chunk(*ridge, 8) == pytest.approx(37, abs=0.5)
    assert lc.saturating_chunk(*ridge, 4) == pytest.approx(74, abs=0.5)


def test_work_of_a_million_tokens():
    """2.76e18 FLOP and 46.6 minutes of one H100 with all pairs (published: 2.8e18, at least 48), 24.5 causal."""
    model = load_model("llama-3-70b")
    everything, causal = (lc.prefill_flops(model, 1e6, causal=x) for x in (False, True))
    assert everything == pytest.approx(2.76e18, rel=0.01)
    assert everything / H100["peak_flops"] / 60 == pytest.approx(46.6, rel=0.01)
    assert causal / H100["peak_flops"] / 60 == pytest.approx(24.5, rel=0.02)


def test_ten_million_tokens():
    """KV of 1.31 and 3.28 TB; decodes of 8B over 8 H100 a group in 49.5, 25.1, 12.8 ms."""
    small, large = load_model("llama-3-8b"), load_model("llama-3-70b")
    assert 1e7 * small.kv_bytes_per_token() == pytest.approx(1.31e12, rel=0.005)
    assert 1e7 * large.kv_bytes_per_token() == pytest.approx(3.28e12, rel=0.005)
    cost = lc.long_context(small, gpus=8, **H100)
    for groups, ms in ((1, 49.5), (2, 25.1), (4, 12.8)):
        assert 1e3 * float(cost.decode_s(1e7, groups)) == pytest.approx(ms, rel=0.01)
    slow = lc.long_context(small, gpus=8, fixed_s=8e-3, **H100)
    one, two, four = (1e3 * float(slow.decode_s(1e7, groups)) for groups in (1, 2, 4))
    assert [one, two, four] == pytest.approx([57, 33, 21], rel=0.02)
    assert 1 - two / one == pytest.approx(0.42, abs=0.01)
    assert four < 30 < two


def test_chunk_takes_the_budget():
    history = np.asarray([0.0, 1e3, 1e5, 1e7])
    for groups, rest in ((1, 0.0), (4, 3e-3)):
        chunk = COST.chunk(20e-3, history, groups, rest)
        again = COST.iteration_s(np.asarray(chunk, float), history, groups, rest)
        assert np.allclose(again, 20e-3, rtol=1e-5)
        assert (np.diff(chunk) < 0).all()
    assert COST.chunk(1e-3, 0.0) == 0
    assert jax.grad(lambda budget: COST.chunk(budget, 1e6))(20e-3) > 0


def test_chunk_without_attention_is_linear():
    cost = lc.LongContext(0.0, 1e-6, 0.0, 0.0, 0.0)
    assert cost.chunk(1e-3, 1e6) == pytest.approx(1000)


def test_adaptive_chunks():
    chunks = lc.adaptive_chunks(1_000_000, COST, 20e-3)
    assert chunks.sum() == 1_000_000 and (np.diff(chunks) <= 0).all() and (chunks == chunks.astype(int)).all()
    seconds = np.asarray(COST.chunk_seconds(chunks))
    assert seconds.max() <= 20e-3 * (1 + 1e-5) and seconds[:-1].min() > 0.98 * 20e-3
    assert lc.adaptive_chunks(100, COST, 20e-3).tolist() == [100]
    # Forty-odd thousand chunks of ten million tokens, each whole, none empty.
    many = lc.adaptive_chunks(10_000_000, COST, 20e-3, least=32)
    assert many.sum() == 10_000_000 and many[:-1].min() >= 32
    with pytest.raises(InputError, match="empty iteration"):
        lc.adaptive_chunks(100, COST, 2e-3)
    with pytest.raises(InputError, match="without tokens"):
        lc.adaptive_chunks(100, COST, 20e-3, least=0)


@pytest.mark.parametrize("chunks", [[4000.0, 2000, 1000, 500], [512.0] * 40, [100.0, 5000, 100, 100]])
@pytest.mark.parametrize("stages", [1, 2, 8])
def test_pipeline_stage_by_stage(chunks, stages):
    """A chunk enters a stage when it has left the one before and the chunk ahead has left this one."""
    cost = lc.LongContext(1e-3, 4e-6, 2e-9, 0.0, 0.0)
    leaves = np.zeros(stages + 1)
    for seconds in np.asarray(cost.chunk_seconds(chunks)) / stages:
        leaves[0] = 0.0
        for stage in range(stages):
            leaves[stage + 1] = max(leaves[stage], leaves[stage + 1]) + seconds
    assert float(cost.pipelined_s(chunks, stages)) == pytest.approx(leaves[-1], rel=1e-5)
    assert float(cost.pipelined_s(chunks, 1)) == pytest.approx(float(cost.prefill_s(chunks)), rel=1e-6)


def test_fixed_chunks():
    assert lc.fixed_chunks(10, 4).tolist() == [4, 4, 2]
    assert lc.fixed_chunks(8, 4).tolist() == [4, 4]
    assert float(jnp.sum(COST.chunk_seconds(lc.fixed_chunks(8, 4)))) > float(COST.iteration_s(8.0, 0.0))
