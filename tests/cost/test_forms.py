"""The forms against numbers worked out by hand, on a made-up device of 100 TFLOP/s, 1 TB/s and 100 multiprocessors."""

import jax
import jax.numpy as jnp
import pytest

from jaxsim.cost import attention as a
from jaxsim.cost.collectives import CustomAllReduce, Hop, Nccl, over_network
from jaxsim.cost.gemm import ExpertLoad, Experts, Gemm, expected_blocks
from jaxsim.cost.rates import Rates, smooth_maximum
from jaxsim.spec.efficiency import (
    EXPERT_ROWS,
    CustomAllReduceEfficiency,
    DecodeEfficiency,
    ExpertEfficiency,
    GemmEfficiency,
    HopEfficiency,
    LatentEfficiency,
    NcclEfficiency,
    PrefillEfficiency,
)

RATES = Rates(1e14, 1e12, 100)
GEMM = dict(floor_s=1e-6, efficiency=0.5, read_efficiency=0.5, prologue=24.0, source="made up")


def gemm(**rest):
    return Gemm.of(GemmEfficiency(**GEMM | dict(tiles=((100, 100),)) | rest))


def exact(value):
    return pytest.approx(value, rel=1e-5)


def test_smooth_maximum():
    assert float(smooth_maximum(3.0, jnp.asarray(3.0), jnp.asarray(0.0))) == exact(3.0)
    assert float(smooth_maximum(4.0, jnp.asarray(1.0), jnp.asarray(1.0))) == exact(2 ** 0.25)
    assert float(smooth_maximum(4.0, jnp.asarray(0.0), jnp.asarray(0.0))) == 0


@pytest.mark.parametrize("power", [pytest.param(2.5, marks=pytest.mark.slow), 3.0])
def test_derivatives_of_the_smooth_maximum(power):
    """Against the form with its powers written out, to second order, and finite where nothing takes time."""
    def plain(a, b, c):
        return (a**power + b**power + c**power) ** (1 / power)

    def ours(*terms):
        return smooth_maximum(power, *terms)

    for terms in ((1.0, 2.0, 0.5), (1e-3, 2e-3, 1.9e-3)):
        for order in (jax.grad, lambda f, n: jax.grad(jax.grad(f, 0), 1)):
            found, known = (order(f, (0, 1, 2) if order is jax.grad else 0)(*terms) for f in (ours, plain))
            assert [float(x) for x in jax.tree.leaves(found)] == pytest.approx(
                [float(x) for x in jax.tree.leaves(known)], rel=2e-5)
    assert all(jnp.isfinite(x) for x in jax.grad(ours, (0, 1))(0.0, 0.0))


def test_waves_of_tiles():
    """A tile of 100 x 100 and k = 1,000: 2e4 x 1,024 FLOP at 5e11 FLOP/s are 40.96 us."""
    for m, n, waves in ((1, 100, 1), (100, 10_000, 1), (101, 10_000, 2), (1000, 1000, 1), (1000, 1001, 2)):
        _, tiled, memory = gemm().parts(jnp.asarray(float(m)), n, 1000, 2 * n * 1000, RATES)
        assert float(tiled) == exact(waves * 40.96e-6), (m, n)
        assert float(memory) == exact((2e3 * n + 2e3 * m + 2 * m * n) / 0.5e12)
    # 1 us + (40.96^3 + 4.02^3)^(1/3)
    assert float(gemm().seconds(jnp.asarray(10.0), 1000, 1000, 2e6, RATES)) == exact(
        1e-6 + 1e-6 * (40.96 ** 3 + ((2e6 + 2e4 + 2e4) / 0.5e6) ** 3) ** (1 / 3))


def test_choice_of_tiles():
    m = jnp.asarray([50.0, 60.0, 150.0])
    fastest = gemm(tiles=((100, 100), (50, 100)), narrow_efficiency=0.8)
    # Half a tile at 0.8 of the rate takes 0.625 of the time, as long as it is one wave.
    assert fastest.parts(m, 100, 1000, 0.0, RATES)[1].tolist() == [exact(40.96e-6 * x) for x in (0.625, 0.625, 0.625)]
    by_rows = gemm(tiles=((50, 100), (100, 100)), row_limits=(50,))
    assert by_rows.parts(m, 100, 1000, 0.0, RATES)[1].tolist() == [exact(40.96e-6 * x) for x in (0.5, 1, 1)]
    # One tile of k = 1,000 on 100 multiprocessors in slices of at least 100: ten of them.
    assert float(gemm(split=100.0).parts(m, 100, 1000, 0.0, RATES)[1][0]) == exact(2e4 * 124 / 5e11)
    # An edge of 5 rows on every side of 100: 1 + 5/100 + 5/100.
    assert float(gemm(edge=5.0).parts(m, 100, 1000, 0.0, RATES)[1][0]) == exact(1.1 * 40.96e-6)


def test_quantised_activations():
    """Read in 8 bits, after reading 2 and writing 1 byte of each at a quarter of the bandwidth."""
    plain, quantised = gemm(), gemm(quantise_efficiency=0.25)
    m = jnp.asarray(1e5)
    assert float(quantised.parts(m, 10, 1000, 0.0, RATES)[2]) == exact((1e8 + 2e6) / 0.5e12)
    assert float(quantised.seconds(m, 10, 1000, 0.0, RATES) - 1e-6) == exact(
        3e8 / 0.25e12 + float(smooth_maximum(3.0, plain.parts(m, 10, 1000, 0.0, RATES)[1],
                                             jnp.asarray(1.02e8 / 0.5e12))))


def test_experts():
    kernel = Experts.of(ExpertEfficiency(
        floor_s=10e-6, kernels_s=16e-6, efficiency=0.5, read_efficiency=0.5, prologue=0.0, half_rows=16.0,
        row_efficiency=0.5, power=3.0, tiles=((16, 128), (64, 128)), source="made up"))
    # 4 experts of 1,008 x 1,280, 2 tiles of 16 rows each, or 1 of 64.
    load = ExpertLoad(jnp.asarray(8.0), jnp.asarray(120.0), {16: jnp.asarray(8.0), 64: jnp.asarray(4.0)},
                      jnp.asarray(5e6), 2, 16, 1008, 1280)
    floor, tiled, weights, rows = (float(x) for x in kernel.parts(load, RATES))
    assert floor == exact(18e-6) and weights == exact(1e-5)
    # 8 tokens to 2 experts: 2,560 to 1,280 to 1,008 numbers a row, and 1,008 of the token.
    assert rows == exact(2 * 8 * (2 * (3 * 1280 + 1008) + 1008) / 0.5e12)
    # Tiles of 16 at half of the rate: 8 x 20 of 100 (1.6 waves) of 1,008, 8 x 8 (1 wave) of 1,280 deep; of 64 at 0.8.
    sixteen = (1.6 * 256 * 16 * 1008 + 256 * 16 * 1280) / 2.5e11
    sixty_four = (1.0 * 256 * 64 * 1008 + 256 * 64 * 1280) / 4e11
    assert tiled == exact(min(sixteen, sixty_four))
    assert float(kernel.seconds(load, RATES)) == exact(floor + (tiled ** 3 + weights ** 3) ** (1 / 3) + rows)
    # Sizes padded to 1,024 and 1,536 do as experts of that size do.
    padded = Experts(**{**vars(kernel), "multiples": (256, 512)})
    whole = load._replace(hidden=1024, inner=1536, weight_bytes=load.weight_bytes * 1024 * 1536 / (1008 * 1280))
    assert [float(x) for x in padded.parts(load, RATES)] == [exact(float(x)) for x in kernel.parts(whole, RATES)]
    # A tile each, or a row in T and half a tile.
    assert float(expected_blocks(jnp.asarray(6.0), jnp.asarray(4.0), 16)) == 4
    assert float(expected_blocks(jnp.asarray(256.0), jnp.asarray(4.0), 16)) == exact(4 * (4 + 15 / 32))


def test_blocks_of_experts_follow_the_engine():
    """Tiles by vLLM's rules, in tokens, tokens or routed rows for each local expert; few rows without tensor cores."""
    constants = dict(floor_s=0.0, kernels_s=0.0, efficiency=0.5, read_efficiency=0.5, prologue=0.0, half_rows=0.0,
                     row_efficiency=0.5, source="made up")

    def tiled(tokens, pairs, inner=1024, **values):
        blocks = {rows: jnp.asarray(4.0 * -(-pairs // (4 * rows))) for rows in EXPERT_ROWS}
        load = ExpertLoad(jnp.asarray(tokens), jnp.asarray(float(pairs)), blocks, jnp.asarray(0.0), 2, 4, 1024, inner)
        return float(Experts.of(ExpertEfficiency(**constants | values)).parts(load, RATES)[1])

    # 4 experts, 2 a token: Marlin's is the first block of which the mean rows of an expert fill less than 0.9.
    marlin = dict(tiles=((8, 128), (16, 128), (32, 128), (48, 128), (64, 128)), limits=(7.2, 14.4, 28.8, 43.2),
                  limit_of="rows_per_expert")
    for tokens in (1, 14, 15, 28, 29, 57, 58, 86, 87, 4096):
        rows = next((b for b in (8, 16, 32, 48, 64) if tokens * 2 / 4 / b < 0.9), 64)
        assert tiled(float(tokens), 2 * tokens, **marlin) == exact(
            tiled(float(tokens), 2 * tokens, tiles=((rows, 128),))), tokens
    # Triton's default: a token an expert, then tiles of 64.
    default = dict(tiles=((16, 32), (64, 64)), limits=(1.0,), limit_of="tokens_per_expert")
    assert tiled(4.0, 8, **default) == exact(tiled(4.0, 8, tiles=((16, 32),)))
    assert tiled(5.0, 10, **default) == exact(tiled(5.0, 10, tiles=((64, 64),)))
    # 13 tokens are 6.5 rows for each expert: beyond 6 tensor cores multiply. 24 rows, and one block of 16 an expert.
    vector = dict(vector_limit=6.0, vector_efficiency=0.01, vector_dequantise_rows=0.5)
    assert tiled(13.0, 26, **vector) == exact(tiled(13.0, 26))
    peak = RATES.flops
    assert tiled(12.0, 24, **vector) == exact(6 * 1024 * 1024 * (4 * 0.5 + 24) / (0.01 * peak))
    # A multiprocessor that needs four tiles at once takes four times as long for one.
    assert tiled(4.0, 8, resident=4.0) == exact(4 * tiled(4.0, 8, resident=1.0))
    # 1,000 is no multiple of 16: the second product, as deep, is slower.
    first, second = (tiled(4.0, 8, inner=1000, unaligned_factor=f) for f in (1.0, 3.0))
    assert second == exact(first + 2 * first * 1000 / 2024)


DECODE = dict(floor_s=10e-6, item_s=3e-6, combine_s=1e-6, read_efficiency=0.5, read_efficiency_8bit=0.25,
              flops_efficiency=0.5, source="made up")


def test_decode_attention():
    kernel, shape = a.Decode.of(DecodeEfficiency(**DECODE, kernel="fa3")), a.AttentionShape(32, 8, 128)
    n = jnp.asarray([1.0, 12.0, 13.0])
    # 8, 96 and 104 items: 12.5 splits, 1.04 splits, 2 waves; queries and outputs of 4,096 numbers.
    queries = 4 * 4096 / 0.5e12
    assert kernel.fixed_seconds(shape, n, RATES).tolist() == [
        exact(10e-6 + 1e-6 * 3.6438562 + queries), exact(10e-6 + 1e-6 * 0.05889369 + 12 * queries),
        exact(13e-6 + 13 * queries)]
    # 4,096 bytes a token; 16,384 FLOP are a 25th of that.
    assert kernel.slope(shape, n, RATES).tolist() == [exact((8.192e-9 ** 4 + 0.32768e-9 ** 4) ** 0.25)] * 3
    eight = a.AttentionShape(32, 8, 128, 1.0)
    assert float(kernel.slope(eight, n, RATES)[0]) == exact(float(kernel.slope(shape, n, RATES)[0]))


def test_decode_attention_without_splits():
    """FlashAttention 2 with a KV head for each query head: one item walks its context alone."""
    kernel = a.Decode.of(DecodeEfficiency(**DECODE, kernel="fa2", sweep_s=20e-9, swap_s=5e-6))
    shape = a.AttentionShape(8, 8, 128)
    one, many = (float(x) for x in kernel.slope(shape, jnp.asarray([1.0, 100.0]), RATES))
    assert one == pytest.approx(20e-9, rel=0.02) and many == pytest.approx(8.192e-9, rel=0.01)
    grouped = a.AttentionShape(32, 8, 128)
    alone, two = (float(x) for x in kernel.fixed_seconds(grouped, jnp.asarray([1.0, 2.0]), RATES))
    assert two - alone == exact(5e-6 - 1e-6 + 4 * 4096 / 0.5e12)


PREFILL = dict(tile_rows=128, tile_keys=128, floor_s=5e-6, item_s=2e-6, efficiency=0.5, io_factor=1.0, source="made up")


def chunk(kernel, shape, new, history, count=1.0, decodes=0.0, context=0.0):
    c = kernel.coefficients(shape, RATES)
    numbers = (count * new, count, count * ((new + history) ** 2 - history ** 2), count * (new + history), decodes,
               decodes * context)
    return float(a.chunk_seconds(c, *map(jnp.float32, numbers)))


def test_prefill_attention():
    kernel, shape = a.Prefill.of(PrefillEfficiency(packed=True, **PREFILL)), a.AttentionShape(32, 8, 128)
    # A tile of 128 rows packs 4 heads of 32 tokens; 128 x 4 x 128 FLOP a key at 5e11 are 131.072 ns.
    kappa = 131.072e-9
    for new, tiles in ((1024.0, 32), (1000.0, 32), (1.0, 1)):
        mean = 500 + new / 2 + new / tiles / 2 + 64
        work = 8 * tiles / 100 * (2e-6 + kappa * mean)
        longest = 2e-6 + kappa * (500 + new)
        io = 4 * (new * 4096 + (500 + new) * 1024) / 0.8e12
        assert chunk(kernel, shape, new, 500.0) == pytest.approx((work ** 2 + longest ** 2) ** 0.5 + io, rel=1e-4)
    # In a layer with a window of 100, a query sees 132 keys and the rest of its tiles.
    work = 8 * 32 / 100 * (2e-6 + kappa * (132 + 16 + 64))
    assert chunk(kernel, shape._replace(window=100), 1024.0, 0.0) == pytest.approx(
        (work ** 2 + (2e-6 + kappa * 132) ** 2) ** 0.5 + 4 * (1024 * 4096 + 132 * 1024) / 0.8e12, rel=1e-4)


def test_unlike_chunks():
    """A long history, a short chunk, a longer one: tiles counted one by one, the call waits for that with most keys."""
    kernel, shape = a.Prefill.of(PrefillEfficiency(packed=False, **PREFILL)), a.AttentionShape(32, 8, 128)
    chunks, kappa = ((50_000, 130), (0, 7), (300, 300)), 131.072e-9
    c = kernel.coefficients(shape, RATES)
    assert float(c[a.TILE_TOKENS]) == 128
    keys = io = tiles = 0.0
    for history, new in chunks:
        of_chunk = -(-new // 128)
        tiles += of_chunk
        # Its tiles pass the history and, at the mean, half of the chunk; half a tile of keys comes below.
        keys += of_chunk * (history + new / 2)
        io += 4 * (new * 4096 + (history + new) * 1024) / 0.8e12
    new = sum(new for _, new in chunks)
    # Rows of the mean chunk, as many as these here.
    assert tiles == 3 * -(-new / 3 // 128)
    work = 32 / 100 * (tiles * (2e-6 + kappa * 64) + kappa * keys + kappa * new / 2)
    want = (work ** 2 + (2e-6 + kappa * 50_130) ** 2) ** 0.5 + io
    numbers = (new, 3.0, sum((h + n) ** 2 - h ** 2 for h, n in chunks), sum(h + n for h, n in chunks), 0.0, 0.0,
               sum((2 * h + n) * -(-n // 128) * 128 for h, n in chunks), 50_130.0)
    assert float(a.chunk_seconds(c, *map(jnp.float32, numbers))) == pytest.approx(want, rel=1e-4)
    # As if they were alike, what is behind the long history would fill other tiles, and none wait for its keys.
    assert float(a.chunk_seconds(c, *map(jnp.float32, numbers[:-2]))) != pytest.approx(want, rel=0.1)


@pytest.mark.parametrize("chunks", [((0, 8192), (0, 1)), ((0, 512), *[(900, 1)] * 63), ((50_000, 512), (0, 64))])
def test_rows_of_the_mean_chunk_are_close(chunks):
    """Where tiles are not as many as those of as many chunks that are alike, by a hundredth of the call at most."""
    kernel, shape = a.Prefill.of(PrefillEfficiency(packed=False, **PREFILL)), a.AttentionShape(32, 8, 128)
    new, kappa = sum(n for _, n in chunks), 131.072e-9
    rows = sum(-(-n // 128) for _, n in chunks)
    assert rows != len(chunks) * -(-new / len(chunks) // 128)
    tiled = sum((2 * h + n) * -(-n // 128) * 128 for h, n in chunks)
    longest, keys = max(h + n for h, n in chunks), sum(h + n for h, n in chunks)
    work = 32 / 100 * (rows * (2e-6 + kappa * 64) + kappa * tiled / 256 + kappa * new / 2)
    want = (work ** 2 + (2e-6 + kappa * longest) ** 2) ** 0.5 + 4 * (new * 4096 + keys * 1024) / 0.8e12
    numbers = (new, len(chunks), sum((h + n) ** 2 - h ** 2 for h, n in chunks), keys, 0.0, 0.0, tiled, longest)
    found = float(a.chunk_seconds(kernel.coefficients(shape, RATES), *map(jnp.float32, numbers)))
    assert found == pytest.approx(want, rel=0.01) and found != pytest.approx(want, rel=1e-5)


def test_one_of_several_alike_chunks_is_the_longest():
    kernel, shape = a.Prefill.of(PrefillEfficiency(packed=True, **PREFILL)), a.AttentionShape(32, 8, 128)
    c = kernel.coefficients(shape, RATES)
    for history, new, count in ((500, 1000, 3), (0, 17, 5), (100_000, 512, 2)):
        pairs = count * ((new + history) ** 2 - history ** 2)
        sums = map(jnp.float32, (count * new, count, pairs, count * (history + new), 0.0, 0.0))
        own = (jnp.float32(pairs * (-(-new // 32) * 32) / new), jnp.float32(history + new))
        assert float(a.chunk_seconds(c, *sums, *own)) == pytest.approx(
            chunk(kernel, shape, new, history, count), rel=1e-6)


def test_decodes_in_a_call_with_chunks():
    """FlashAttention 2: each takes a tile of 64 rows for each query head, and its cache is read twice."""
    kernel = a.Prefill.of(PrefillEfficiency(packed=False, **PREFILL | dict(tile_keys=0), joined_rows=64,
                                            joined_read_factor=2.0))
    shape = a.AttentionShape(32, 8, 128)
    work = (32 * (2e-6 + 131.072e-9 * (64 + 64)) + 10 * 32 * (2e-6 + 65.536e-9 * 1000)) / 100
    longest = 2e-6 + 65.536e-9 * 1000
    reads = 4096 * (128 + 2 * 10_000) / 0.8e12
    tiled = (work ** 2 + longest ** 2) ** 0.5
    io = 4 * (128 * 4096 + 128 * 1024) / 0.8e12
    assert chunk(kernel, shape, 128.0, 0.0, 1.0, 10.0, 1000.0) == pytest.approx(
        (tiled ** 4 + reads ** 4) ** 0.25 + io, rel=1e-4)


def test_latent_attention():
    kernel = a.Latent.of(LatentEfficiency(
        decode_floor_s=60e-6, decode_floor_8bit_s=20e-6, decode_step_s=30e-6, read_efficiency=0.5,
        read_efficiency_8bit=0.5, flops_efficiency=0.5, prefill_floor_s=0.0, prefill_item_s=0.0, prefill_efficiency=0.5,
        copies=0.0, source="made up"))
    shape = a.LatentShape(16, 512, 64, 128, 128)
    # 64 heads after padding: 139,264 FLOP at 50 TFLOP/s; 1,152 bytes at 0.5 TB/s.
    assert float(kernel.slope(shape, jnp.asarray(4.0), RATES)) == exact((2.78528e-9 ** 8 + 2.304e-9 ** 8) ** 0.125)
    # log2(4) of 5 steps; 16 heads of 2 x 576 + 512 numbers.
    assert float(kernel.fixed_seconds(shape, jnp.asarray(4.0), RATES)) == exact(60e-6 + 12e-6 + 8 * 16 * 1664 / 0.5e12)
    assert float(kernel.fixed_seconds(shape._replace(narrow=True), jnp.asarray(4.0), RATES)) == exact(
        20e-6 + 12e-6 + 8 * 16 * 1664 / 0.5e12)
    # History is expanded again, the chunk's own tokens are not: 2 x 512 x 16 x 256 FLOP for each of 1,000 tokens.
    c = kernel.coefficients(shape, RATES)
    assert float(c[a.ADD_TOKEN] * 24 + c[a.ADD_KEYS] * 1024) == pytest.approx(1000 * 4194304 / 0.5e14, rel=1e-4)


NCCL = NcclEfficiency(latency_s=5e-6, rank_s=1e-6, low_efficiency=0.2, bulk_latency_s=20e-6, efficiency=0.8,
                      source="made up")


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_nccl(ranks):
    all_reduce, gather = Nccl.of(NCCL, "all_reduce"), Nccl.of(NCCL, "all_gather")
    empty = float(all_reduce.seconds(ranks, jnp.asarray(0.0), 1e11))
    assert empty == pytest.approx(5e-6 + (ranks - 1) * 1e-6, rel=1e-3)
    large = 2 * (ranks - 1) / ranks * 1e9 / 0.8e11
    assert float(all_reduce.seconds(ranks, jnp.asarray(1e9), 1e11)) == pytest.approx(large, rel=0.02)
    assert float(gather.seconds(ranks, jnp.asarray(1e9), 1e11)) == pytest.approx(large / 2, rel=0.02)
    assert float(Nccl.of(over_network(NCCL), "all_reduce").seconds(ranks, jnp.asarray(0.0), 1e11)) == pytest.approx(
        20e-6 + (ranks - 1) * 1e-6, rel=0.01)


def test_custom_all_reduce():
    kernel = CustomAllReduce.of(CustomAllReduceEfficiency(
        latency_s=4e-6, two_shot_s=3e-6, efficiency=0.5, bulk_latency_s=20e-6, bulk_efficiency=0.8, source="made up"))
    for ranks, kib, seconds in (
            (2, 4096, 4e-6 + 4096 * 1024 / 5e10), (4, 100, 4e-6 + 3 * 102400 / 5e10),
            (4, 512, 7e-6 + 1.5 * 524288 / 5e10), (8, 256, 7e-6 + 1.75 * 262144 / 5e10),
            (8, 255, 4e-6 + 7 * 261120 / 5e10), (8, 8192, 20e-6 + 1.75 * 8388608 / 8e10)):
        assert float(kernel.seconds(ranks, jnp.asarray(kib * 1024.0), 1e11)) == exact(seconds), (ranks, kib)
    assert float(Hop.of(HopEfficiency(latency_s=8e-6, efficiency=0.5, source="made up")).seconds(
        jnp.asarray(1e6), 1e11)) == exact(28e-6)
