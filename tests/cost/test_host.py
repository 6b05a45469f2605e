"""What a host does for its GPU: shares of memory by filling water, experts by drawing them, lanes by plain NumPy."""

import jax.numpy as jnp
import msgspec
import numpy as np
import pytest

from jaxsim.cost import host as h
from jaxsim.cost.base import BatchStats
from jaxsim.cost.operators import distinct_experts
from jaxsim.cost.roofline import roofline
from jaxsim.spec.device import load_device
from jaxsim.spec.host_memory import place_weights
from jaxsim.spec.hybrid import HybridSection
from jaxsim.spec.model import load_model

pytestmark = pytest.mark.unoptimised

MIXTRAL, A40, XEON = load_model("mixtral-8x7b"), load_device("a40"), load_device("xeon_8380")

STREAMED = HybridSection(weights="streamed", attention="cpu", cpu="xeon_8380", kv_space_gb=70.0, link_gb_per_s=19.5,
                         cpu_gb_per_s=150.0)


def filled(wants: list[float], capacity: float) -> list[float]:
    """Max-min fair shares: everybody's rises until it has what it wants or nothing is left."""
    shares, left = [0.0] * len(wants), capacity
    thirsty = [i for i, want in enumerate(wants) if want > 0]
    while thirsty and left > 1e-9 * capacity:
        step = min(left / len(thirsty), min(wants[i] - shares[i] for i in thirsty))
        for i in thirsty:
            shares[i] += step
        left -= step * len(thirsty)
        thirsty = [i for i in thirsty if wants[i] - shares[i] > 1e-12 * wants[i]]
    return shares


def test_memory_is_shared_fairly():
    rng = np.random.default_rng(0)
    seen = dict(enough=0, link_has_all=0, even=0, left_over=0)
    for _ in range(1200):
        threads, link, memory = int(rng.integers(1, 64)), rng.uniform(1, 60), rng.uniform(20, 300)
        wanted = rng.uniform(0.05, 1.0) * memory
        cpu, got = h.shared_memory(h.Host(link, memory, np.inf, threads), wanted)
        *each, theirs = filled([wanted / threads] * threads + [link], memory)
        assert (cpu, got) == pytest.approx((sum(each), theirs), rel=1e-9)
        kind = ("enough" if wanted + link <= memory else "link_has_all" if got == link else
                "even" if got == pytest.approx(memory / (threads + 1)) else "left_over")
        seen[kind] += 1
    assert min(seen.values()) > 10, seen


def test_contention_of_a_streaming_host():
    """While 40 threads read 150 GB/s the link has 150/41 of its 19.5 GB/s; what FLOP bound to 130 GB/s leaves it all it
    wants; a number that is given counts in seconds of the bytes; without overlap, or without weights on the link,
    nothing is lost."""
    host = h.host_of(STREAMED, A40, XEON)
    assert host == h.Host(19.5e9, 150e9, 0.5 * 5.9e12, 40)
    # 150 GB, a second of them, and FLOP that take as long, or longer.
    slow = 150 / 130
    for seconds, cpu_s, lost_s in ((0.0, 41 / 40, 41 / 40 * (1 - 150 / 41 / 19.5)), (slow, slow, 0.0), (9.0, 9.0, 0.0),
                                   # 145 GB/s are wanted, 5 are left.
                                   (150 / 145, 150 / 145, 150 / 145 * (1 - 5 / 19.5))):
        found = h.reading(STREAMED, host, 150e9, seconds * host.flops)
        assert (float(found.cpu_s), float(found.lost_s)) == pytest.approx((cpu_s, lost_s), abs=1e-12)
    given = msgspec.structs.replace(STREAMED, contention=0.25)
    assert h.reading(given, host, 150e9, 0.0) == (1.0, 0.25)
    assert h.reading(given, host, 150e9, 9 * host.flops) == (9.0, 0.25)
    for changes in (dict(overlap=False), dict(weights="resident")):
        assert h.reading(msgspec.structs.replace(STREAMED, **changes), host, 150e9, 0.0) == (1.0, 0.0)
    assert h.reading(STREAMED, host, 0.0, host.flops) == (1.0, 0.0)


@pytest.mark.parametrize("experts, per_token, hot, skew", [
    (8, 2, 0, 0.5), (8, 2, 2, 0.5), (256, 8, 0, 0.5), (256, 8, 32, 0.5), (256, 8, 64, 1.2), (64, 6, 16, 0.0)])
def test_hot_experts_against_draws(experts, per_token, hot, skew):
    """Poisson visits to experts of gamma popularities, the hottest of a large pool taken as hot."""
    rng = np.random.default_rng(1)
    pool = 400_000
    popularity = rng.gamma(1 / skew**2, skew**2, pool) if skew else np.ones(pool)
    is_hot = np.zeros(pool, bool)
    is_hot[np.argsort(popularity)[pool - pool * hot // experts:]] = hot > 0
    assert h.hot_share(experts, hot, skew) == pytest.approx(popularity[is_hot].sum() / popularity.sum(), abs=0.004)
    tokens = np.array([1.0, 4.0, 32.0, 500.0])
    ours = h.cold_experts(experts, per_token, hot, skew, tokens)
    # One token touches so many in the mean, which sets the rate of visits.
    if skew:
        a = 1 / skew**2
        rate = a * np.expm1(-np.log1p(-per_token / experts) / a)
    else:
        rate = -np.log1p(-per_token / experts)
    for count, found in zip(tokens, ours, strict=True):
        touched = 1 - np.exp(-rate * count * popularity)
        assert found == pytest.approx(experts * touched[~is_hot].sum() / pool, rel=0.01)


def test_no_hot_experts_are_those_of_the_roofline():
    tokens = np.array([1.0, 3.0, 40.0, 900.0])
    for skew in (0.0, 0.5, 1.0):
        ours = h.cold_experts(8, 2, 0, skew, tokens)
        np.testing.assert_allclose(ours, distinct_experts(MIXTRAL, jnp.asarray(tokens), skew=skew), rtol=2e-4)


def lanes(given: HybridSection, stats: BatchStats, model=MIXTRAL, device=A40, dtype="auto", **overrides):
    cost = roofline(model, device, None, dtype, host="none", **overrides)
    weights, host = place_weights(model, given, dtype), h.host_of(given, device, load_device(given.cpu))
    made = h.hybrid_cost(cost, given, weights, host, 4096, 64)
    return cost, made, np.asarray(made.lanes(stats), float)


MIX = dict(num_decode=16, decode_context=16 * 300, num_prefill=2, prefill_tokens=1000, prefill_context=1200,
           prefill_pairs=700.0**2 - 200**2 + 500**2)


def test_attention_on_the_cpu_by_hand():
    """Mixtral-8x7B: 4,096 bytes of KV a token and layer, 32 layers, 4,096 numbers of queries and of outputs."""
    stats = BatchStats.of(**MIX)
    cost, made, (gpu, cpu, into, out) = lanes(STREAMED, stats)
    weights = 93_405_577_216
    link = 19.5e9
    read = 16 * 300 * 32 * 4096 / (150e9 - 150e9 / 41)
    lost = read * (1 - 150 / 41 / 19.5)
    assert cpu == pytest.approx(read, rel=1e-5)
    assert into == pytest.approx(weights / link + 16 * 32 * 4096 * 2 / link + 200 * 32 * 4096 / link + lost, rel=1e-5)
    assert out == pytest.approx((16 * 32 * (4096 * 2 + 4096) + 1000 * 32 * 4096) / link, rel=1e-5)
    # The GPU has all but the attention of decodes.
    parts = {name: float(s) for name, s in cost.operator_seconds(stats).items()}
    alone = sum(s for name, s in parts.items() if name != "attention_decode")
    assert parts["attention_decode"] > 0 and gpu == pytest.approx(alone, rel=0.01)
    assert float(made.iteration(stats)) == pytest.approx(max(gpu, cpu, into, out))
    serial = msgspec.structs.replace(STREAMED, overlap=False)
    each = lanes(serial, stats)[2]
    assert each[1] == pytest.approx(16 * 300 * 32 * 4096 / 150e9, rel=1e-5)
    assert float(lanes(serial, stats)[1].iteration(stats)) == pytest.approx(each.sum(), rel=1e-6)


@pytest.mark.slow
def test_decodes_on_the_gpu_without_attention():
    stats = BatchStats.of(num_decode=16, decode_context=16 * 300)
    cost, made, (gpu, *_) = lanes(STREAMED, stats)
    longer = BatchStats.of(num_decode=16, decode_context=16 * 3000)
    assert float(made.gpu.iteration(longer)) == gpu
    parts = {name: float(s) for name, s in cost.operator_seconds(stats).items() if not name.startswith("attention_f")}
    alone = sum(s for name, s in parts.items() if name != "attention_decode")
    assert gpu == pytest.approx(alone, rel=1e-3)


CPU_EXPERTS = HybridSection(experts="cpu", cpu="xeon_8380", cpu_gb_per_s=100.0, cpu_tflops=2.0, link_gb_per_s=20.0,
                            popularity="uniform")


@pytest.mark.slow
@pytest.mark.parametrize("tokens, is_read", [(2, True), (2000, False)])
def test_experts_on_the_cpu_by_hand(tokens, is_read):
    """Three matrices of 4,096 x 14,336 in 16 bits: few tokens by their bytes, many by their FLOP."""
    stats = BatchStats.of(num_prefill=1, prefill_tokens=tokens, prefill_context=tokens, prefill_pairs=float(tokens**2))
    cost, made, (gpu, cpu, *_) = lanes(CPU_EXPERTS, stats)
    size = 3 * 4096 * 14336
    distinct = 8 * (1 - 0.75**tokens)
    read, computed = distinct * size * 2 / 100e9, 2 * size * 2 * tokens / 2e12
    assert (read > computed) == is_read
    moved = 2 * tokens * 4096 * 2 / 20e9
    assert cpu == pytest.approx(32 * (max(read, computed) + moved), rel=0.01)
    # Chained, and the GPU computes no experts.
    assert float(made.iteration(stats)) == pytest.approx(gpu + cpu, rel=1e-6)
    parts = cost.operator_seconds(stats)
    assert gpu == pytest.approx(sum(float(s) for name, s in parts.items() if name != "experts"), rel=0.02)


@pytest.mark.slow
def test_readers_share_memory_with_streamed_weights():
    """Experts and attention on the CPU while 3.2 GB stream: of a prompt of 2,000 tokens experts are bound by FLOP and
    take nothing from the link; two decodes' are bound by bytes and read what the link leaves of 100 GB/s; attention
    counts by itself."""
    given = msgspec.structs.replace(CPU_EXPERTS, weights="streamed", overlap=True, attention="cpu", hand_over_us=10.0)
    size, weights = 3 * 4096 * 14336, place_weights(MIXTRAL, given)
    even = 100 / 41
    prompt = BatchStats.of(num_prefill=1, prefill_tokens=2000, prefill_context=2000, prefill_pairs=2000.0**2)
    _, _, (_, cpu, into, _) = lanes(given, prompt)
    assert cpu == pytest.approx(32 * (2 * size * 2 * 2000 / 2e12 + 1e-5), rel=0.01)
    assert into == pytest.approx((weights.streamed + 2000 * 32 * 4096 * 2) / 20e9, rel=1e-3)
    decodes = BatchStats.of(num_decode=2, decode_context=20_000)
    _, made, (_, cpu, into, _) = lanes(given, decodes)
    by_bytes = 32 * 8 * (1 - 0.75**2) * size * 2 / 100e9
    # Attention: 4,096 bytes a token and layer, and 4 FLOP a byte.
    attended = 20_000 * 32 * 4096 / 100e9
    stretched = (by_bytes + attended) * 100 / (100 - even)
    assert cpu == pytest.approx(stretched + 2 * 32 * 1e-5, rel=0.01)
    moved = 2 * 32 * 4096 * 2 * 2
    assert into == pytest.approx((weights.streamed + moved) / 20e9 + stretched * (1 - even / 20), rel=0.01)
    assert float(made.contention) == pytest.approx(1 - even / 20)


@pytest.mark.slow
def test_hot_experts_take_from_the_cpu_what_the_gpu_does_beside():
    """Their rows leave the CPU; where layers wait the slower of both counts, where they overlap each has its lane."""
    tokens = 512
    stats = BatchStats.of(num_prefill=1, prefill_tokens=tokens, prefill_context=tokens, prefill_pairs=float(tokens**2))
    found = {}
    for hot in (0, 4, 8):
        for overlap in (False, True):
            given = msgspec.structs.replace(CPU_EXPERTS, hot_experts=hot, overlap=overlap, hand_over_us=10.0)
            found[hot, overlap] = lanes(given, stats)[2]
    by_cpu = [found[hot, True][1] for hot in (0, 4, 8)]
    assert by_cpu[0] - 32e-5 == pytest.approx(2 * (by_cpu[1] - 32e-5), rel=0.01) and by_cpu[2] == pytest.approx(32e-5)
    by_gpu = [found[hot, True][0] for hot in (0, 4, 8)]
    assert by_gpu[0] < by_gpu[1] < by_gpu[2]
    # With all of them hot the GPU does what it would alone.
    whole = roofline(MIXTRAL, A40, None, host="none").tabulate(4096, 64)
    assert by_gpu[2] == pytest.approx(float(whole.iteration(stats)), rel=0.02)
    moved = 32 * 2 * tokens * 4096 * 2 / 20e9
    assert found[8, False][1] == pytest.approx(by_gpu[2] - by_gpu[0] + moved + 32e-5, rel=0.02)


@pytest.mark.slow
def test_shared_experts_run_beside_those_of_the_cpu():
    model = load_model("deepseek-ai/DeepSeek-V2-Lite")
    stats = BatchStats.of(num_decode=1, decode_context=100)
    given = msgspec.structs.replace(CPU_EXPERTS, cpu="xeon_8380")
    chained, beside = (lanes(msgspec.structs.replace(given, overlap=overlap), stats, model)[2]
                       for overlap in (False, True))
    assert chained[0] < beside[0]
    # Of one token the CPU takes longer than the GPU for the shared ones, so these cost nothing.
    assert chained[1] == pytest.approx(beside[1] + 2 * model.num_moe_layers * 2048 * 2 / 20e9, rel=1e-3)


@pytest.mark.slow
def test_latent_attention_on_the_cpu():
    """DeepSeek-V2-Lite: 576 numbers a token and layer, 16 heads."""
    model = load_model("deepseek-ai/DeepSeek-V2-Lite")
    given = msgspec.structs.replace(STREAMED, contention=0.0)
    stats = BatchStats.of(num_decode=10, decode_context=10_000)
    _, made, (_, cpu, _, out) = lanes(given, stats, model)
    flops_s, read_s = 16 * (4 * 512 + 2 * 64) / 2.95e12, 576 * 2 / 150e9
    assert cpu == pytest.approx(10_000 * model.layers * max(flops_s, read_s), rel=1e-5)
    assert out == pytest.approx(10 * model.layers * (16 * 576 + 576) * 2 / 19.5e9, rel=1e-5)
    assert made.gpu.tail is None


@pytest.mark.slow
def test_the_threshold_is_where_both_take_as_long():
    cost = roofline(MIXTRAL, A40, None, host="none")
    weights, host = place_weights(MIXTRAL, STREAMED), h.host_of(STREAMED, A40, XEON)
    t = h.token_threshold(h.gpu_part(cost, STREAMED), STREAMED, weights, host)
    assert t.layer_s == pytest.approx(93_405_577_216 / 32 / 19.5e9)
    assert t.a_s + t.b_s * t.tokens <= t.layer_s < t.a_s + t.b_s * (t.tokens + 1)
    # The line is the GPU's, within the steps of its tiles.
    at = np.array([2048.0, 8192.0, 16384.0])
    seconds = np.asarray(h.gpu_part(cost, STREAMED).token_seconds(jnp.asarray(at))) / 32
    np.testing.assert_allclose(t.a_s + t.b_s * at, seconds, rtol=0.05)
    # Half the link, twice the tokens, but for the constant.
    slow = h.token_threshold(h.gpu_part(cost, STREAMED), STREAMED, weights, host._replace(link_bytes_per_s=9.75e9))
    assert slow.tokens == pytest.approx(2 * t.tokens, rel=0.01)


def test_the_threshold_counts_hot_experts():
    """Two of eight experts on the GPU: the line is that of its lane, experts among it."""
    given = msgspec.structs.replace(STREAMED, experts="cpu", hot_experts=2, popularity="uniform", overlap=True)
    cost = roofline(MIXTRAL, A40, None, host="none")
    weights, host, gpu = place_weights(MIXTRAL, given), h.host_of(given, A40, XEON), h.gpu_part(cost, given)
    hot, none = (h.token_threshold(gpu, one, weights, host) for one in (
        given, msgspec.structs.replace(given, hot_experts=0)))
    assert hot.layer_s == none.layer_s and hot.tokens < 0.8 * none.tokens
    # A quarter of all rows, so a quarter of what all experts on the GPU add for each token.
    whole = h.token_threshold(cost, STREAMED, weights, host)
    assert hot.b_s - none.b_s == pytest.approx((whole.b_s - none.b_s) / 4, rel=0.1)


@pytest.mark.parametrize("mode, distinct", [("all", 6.0), ("topk", 1.5), ("expected", 6 * (1 - 0.75**3))])
def test_distinct_experts_are_counted_as_elsewhere(mode, distinct):
    """Six of eight on the CPU, two of eight a token, three tokens, all as popular: read at 1 byte a second."""
    cost = roofline(MIXTRAL, A40, None, host="none", distinct_experts=mode)
    host = h.Host(np.inf, 1.0, np.inf, 1)
    given = msgspec.structs.replace(CPU_EXPERTS, hot_experts=2)
    (on_cpu, lost), beside = h._experts(h.gpu_part(cost, given), cost.weights, given, host, np.array([0.0, 3.0]), 0.0)
    assert not lost.any() and on_cpu.tolist() == pytest.approx([0.0, 32 * distinct * 3 * 4096 * 14336 * 2])
    assert float(beside[0]) == 0 < float(beside[1])
