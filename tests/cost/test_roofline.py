"""The roofline: limits, monotonicity, gradients, and figures of real systems."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsim._core.errors import InputError
from jaxsim.cost import attention as a
from jaxsim.cost.base import BatchStats
from jaxsim.cost.roofline import CUDA_GRAPH_SIZES, pad_to_graph, roofline
from jaxsim.cost.tabulated import CONTEXT, WINDOW
from jaxsim.spec.device import load_device
from jaxsim.spec.model import load_model
from jaxsim.spec.plan import Plan

try:
    from jax import enable_x64
except ImportError:  # before JAX 0.8
    from jax.experimental import enable_x64


def make(model, device="h100", tensor_ranks=1, dtype="bfloat16", **rest):
    return roofline(load_model(model), load_device(device), Plan(tensor_parallel_size=tensor_ranks), dtype,
                    **rest)


def prefill(tokens, history=0):
    return BatchStats.of(num_prefill=1, prefill_tokens=tokens, prefill_context=history + tokens,
                         prefill_pairs=float((history + tokens) ** 2 - history ** 2))


# Figures of real systems. Operators are calibrated on tables of single kernels, not on these.

@pytest.mark.parametrize("decode, context, measured_ms", [(1, 100, 11.3), (128, 128 * 1200, 27.3)])
def test_decode_step_of_8b_on_an_rtx_pro_6000(decode, context, measured_ms):
    """Source: sum of vLLM 0.19 layer timings (casys-kaist/LLMServingSim); device lane only."""
    step = make("llama-3.1-8b", "rtx_pro_6000").explain(BatchStats.of(decode, context))
    assert 1e3 * step.device_s == pytest.approx(measured_ms, rel=0.06)


def test_prefill_of_70b_on_two_h100():
    """Source: microsoft/apex_plus, vLLM 0.6: mean TTFT 373 ms at low load, about 13 of them outside the step.

    Products of that generation of software ran 15 % slower than those of vLLM 0.19, whose tables the constants are of
    (microsoft/vidur's tables against aiconfigurator's), so the step is too short by up to that.
    """
    step = make("llama-3.1-70b", tensor_ranks=2, host="vllm-v0").explain(prefill(3017))
    assert 0.85 < 1e3 * step.seconds / 360 < 1
    assert step.bound == "compute"
    assert 2 * step.flops == pytest.approx(438e12, rel=0.04)


def test_marlin_multiplies_slower_and_reads_as_fast():
    """gpt-oss with VLLM_MXFP4_USE_MARLIN, which its public runs set: prompts of 8k tokens take 1.5 times as long."""
    auto, marlin = (make("gpt-oss-120b", tensor_ranks=2, dtype="auto", moe_backend=b) for b in ("auto", "marlin"))
    one, other = (float(cost.explain(prefill(8192)).seconds) for cost in (auto, marlin))
    assert 1.4 < other / one < 2.2
    decode = BatchStats.of(4, 4 * 1000)
    assert float(marlin.explain(decode).seconds) == pytest.approx(float(auto.explain(decode).seconds), rel=0.1)
    with pytest.raises(InputError, match="moe_backend"):
        make("mixtral-8x7b", moe_backend="marlin")
    # A dense model has no experts for it.
    assert make("llama-3.1-8b", moe_backend="marlin").explain(decode) == make("llama-3.1-8b").explain(decode)


@pytest.mark.parametrize("tensor_ranks, all_reduce, measured_ms", [
    (2, "nccl", 31.8), (4, "custom", 20.1), (8, "custom", 13.83)])
def test_decode_step_of_70b_under_vllm_06(tensor_ranks, all_reduce, measured_ms):
    """Source: microsoft/apex_plus, chat at 0.25 requests/s; its scripts disable the custom all-reduce for 2 ranks."""
    step = make("llama-3.1-70b", tensor_ranks=tensor_ranks, host="vllm-v0", all_reduce=all_reduce).explain(
        BatchStats.of(1, 150))
    assert 1e3 * step.seconds == pytest.approx(measured_ms, rel=0.06)


@pytest.mark.parametrize("model, device, tensor_ranks, batch, context, measured_ms", [
    # Mean time per output token of vLLM 0.15 (inference-sim), batch = rate x end-to-end time.
    ("llama-2-7b", "h100", 1, 9, 715, 7.23), ("llama-2-7b", "h100", 1, 22, 715, 8.89),
    ("llama-2-7b", "h100", 1, 17, 1758, 11.75),
    ("llama-3.1-8b", "h100", 1, 15, 671, 7.50), ("llama-3.1-8b", "h100", 1, 45, 671, 8.95),
    ("qwen3-14b", "h100", 1, 8, 671, 12.06), ("mistral-nemo", "h100", 1, 12, 690, 9.83),
    ("mistral-nemo", "h100", 2, 4, 671, 5.97), ("codellama-34b", "h100", 2, 9, 671, 13.95),
    ("mixtral-8x7b", "h100", 2, 38, 671, 19.17), ("llama-3.1-8b", "a100", 1, 8, 671, 12.25),
    ("codellama-34b", "a100", 2, 16, 671, 26.34),
])
def test_decode_steps_under_vllm_015(model, device, tensor_ranks, batch, context, measured_ms):
    step = make(model, device, tensor_ranks).explain(BatchStats.of(batch, batch * context),
                                                     async_scheduling=True)
    assert 1e3 * step.seconds == pytest.approx(measured_ms, rel=0.12)


@pytest.mark.parametrize("batch, measured_ms", [(8, 12.85), (16, 17.55), (32, 22.57), (64, 28.94)])
def test_expert_reads_grow_with_the_batch(batch, measured_ms):
    """Source: ML.ENERGY, Qwen3-30B-A3B on H100, vLLM 0.11, median inter-token time."""
    step = make("qwen3-30b-a3b").explain(BatchStats.of(batch, batch * 560))
    assert 1e3 * step.seconds == pytest.approx(measured_ms, rel=0.1)


# Limits

BARE = dict(gemm_floor_s=0, elementwise_floor_s=0, decode_floor_s=0, prefill_floor_s=0, link_bytes_per_s=1e18,
            elementwise_efficiency=1e6)


def test_small_batches_stream_weights():
    cost = make("llama-3.1-70b", tensor_ranks=4)
    weights = 2 * (load_model("llama-3.1-70b").num_parameters - 2 * 128256 * 8192) / 4
    bandwidth = 3.35e12 * float(cost.gemm.read_efficiency)
    # All-reduces of 161 messages have a floor of their own.
    bare = make("llama-3.1-70b", tensor_ranks=4, **BARE, all_reduce_latency_s=0)
    # What the first wave of tiles takes joins smoothly: (1 + x^3)^(1/3).
    assert weights / bandwidth < float(bare.token_seconds(jnp.asarray(1.0))) < 1.06 * weights / bandwidth
    # Sixteen tokens cost hardly more than one.
    assert float(cost.token_seconds(jnp.asarray(16.0)) / cost.token_seconds(jnp.asarray(1.0))) < 1.05
    assert cost.explain(BatchStats.of(1, 10)).bound == "memory"


def test_large_batches_are_compute_bound():
    model = load_model("llama-3.1-70b")
    bare = make("llama-3.1-70b", tensor_ranks=4, **BARE)
    one, two = (float(bare.token_seconds(jnp.asarray(t))) for t in (16384.0, 32768.0))
    flops = 2 * (model.num_parameters - 2 * 128256 * 8192) / 4 * 16384
    # Tiles start and end (prologue / k), and the last wave is not full.
    ideal = flops / (989.4e12 * float(bare.gemm.efficiency))
    assert ideal < two - one < 1.06 * ideal
    assert make("llama-3.1-70b", tensor_ranks=4).explain(prefill(16384)).bound == "compute"


@pytest.mark.parametrize("name", ["llama-3.1-8b", "mixtral-8x7b", "deepseek-v3", "gpt-oss-120b",
                                  "mistral-7b"])
def test_monotone(name):
    cost = make(name, dtype="auto")
    counts = jnp.arange(1.0, 4097.0)
    for seconds in (cost.token_seconds(counts), cost.sampled_seconds(counts)):
        assert np.all(np.diff(np.asarray(seconds)) >= -1e-9)
    table = cost.tabulate(4096, 256)
    attention = np.array(table.attention)
    rows = np.asarray(table.by_sequences)
    assert np.all(rows >= 0) and np.all(rows[:, CONTEXT] + rows[:, WINDOW] > 0)
    # A new token of latent attention is expanded once, by an operator of its own: it is taken off what its key costs.
    attention[:, a.ADD_TOKEN] += attention[:, a.ADD_KEYS]
    assert np.all(attention >= 0) and attention[:, a.PAIR].sum() > 0
    # Faster parts never make a step slower; slower ones never faster.
    stats = BatchStats.of(17, 17 * 900, 1, 300, 800, 800.0 ** 2 - 500 ** 2)
    base = float(table.iteration(stats))
    latent = "latent" if cost.latent else None
    for part, field, sign in ((None, "peak_flops", -1), (None, "memory_bytes_per_s", -1), ("gemm", "efficiency", -1),
                              ("gemm", "read_efficiency", -1), ("gemm", "floor_s", 1), ("gemm", "prologue", 1),
                              (latent or "prefill", "prefill_efficiency" if latent else "efficiency", -1),
                              (latent or "prefill", "prefill_item_s" if latent else "item_s", 1),
                              (None, "host_step_s", 1)):
        leaf = getattr(getattr(cost, part) if part else cost, field)
        changed = make(name, dtype="auto", **{f"{part}_{field}" if part else field: 1.3 * float(leaf)})
        assert sign * (float(changed.tabulate(4096, 256).iteration(stats)) - base) >= -1e-9, field


def test_number_formats():
    eight, sixteen = make("llama-3.1-8b", dtype="fp8"), make("llama-3.1-8b")
    small, large = BatchStats.of(1, 10), prefill(8192)
    assert eight.explain(small).device_s < 0.75 * sixteen.explain(small).device_s
    assert eight.explain(large).device_s < sixteen.explain(large).device_s
    # No fp8 arithmetic on an A100: half the bytes, the same FLOP rate.
    ampere = make("llama-3.1-8b", "a100", dtype="fp8")
    assert float(ampere.peak_flops) == pytest.approx(312e12)
    assert ampere.explain(small).device_s < make("llama-3.1-8b", "a100").explain(small).device_s
    # An 8-bit cache has half of the bytes, read at a lower rate: its kernel is bound by conversion.
    record = load_device("h100").kernel_efficiency().decode
    assert slope(make("llama-3.1-8b", kv_dtype="fp8")) * 2 * record.read_efficiency_8bit == pytest.approx(
        slope(sixteen) * record.read_efficiency, rel=1e-5)
    # Block-scaled weights have kernels of their own; products outside the linear layers stay in 16 bits.
    blocks = make("llama-3.1-8b", dtype="fp8_block")
    assert float(blocks.gemm.floor_s) > float(eight.gemm.floor_s) > float(eight.gemm_16.floor_s)
    assert seconds_of(eight, "lm_head") == pytest.approx(seconds_of(sixteen, "lm_head"))


def slope(cost, batch=64.0):
    """Seconds per context token, all full layers."""
    return float(cost.decode_attention(jnp.asarray(batch))[1])


def seconds_of(cost, name):
    return float(cost.operator_seconds(BatchStats.of(16, 16))[name])


def test_latent_decode_sits_at_the_ridge():
    """DeepSeek-V3 on H100: 0.383 ns a context token and layer in vLLM 0.19 (aiconfigurator)."""
    assert slope(make("deepseek-v3", dtype="auto")) / 61 == pytest.approx(0.383e-9, rel=0.1)
    # Heads are padded to 64: a rank with 16 of them takes as long as one with 64.
    assert slope(make("deepseek-v3", tensor_ranks=8, dtype="auto")) == pytest.approx(
        slope(make("deepseek-v3", tensor_ranks=2, dtype="auto")), rel=1e-6)


def test_latent_prefill_expands_each_token_once():
    """A prompt without history: only `latent_up` expands it. A chunk behind history expands the history again."""
    cost = make("deepseek-v3", tensor_ranks=8, dtype="auto")
    table = cost.chunk_coefficients()[0]
    prompt = (2048.0, 1.0, 2048.0 ** 2, 2048.0, 0.0, 0.0)
    without_expansion = table.at[a.ADD_KEYS].set(0.0).at[a.ADD_TOKEN].add(table[a.ADD_KEYS])
    assert float(a.chunk_seconds(table, *prompt)) == pytest.approx(
        float(a.chunk_seconds(without_expansion, *prompt)), rel=1e-6)
    step = cost.explain(prefill(2048))
    new = next(o for o in step.operators if o.name == "latent_up")
    assert new.flops == 61 * 2 * 2048 * 512 * 16 * 256
    # Everything else there is are pairs: twice the causal pairs, less the tokens, and the diagonal.
    attention = next(o for o in step.operators if o.name == "attention_prefill")
    assert attention.flops == pytest.approx(61 * 16 * 320 * (2048.0 ** 2 + 2048))


def test_windows():
    oss = make("gpt-oss-120b", dtype="auto")
    _, full, windowed, _ = (float(x) for x in oss.decode_attention(jnp.asarray(8.0)))
    assert full == windowed > 0
    assert float(make("llama-3.1-8b").decode_attention(jnp.asarray(8.0))[2]) == 0
    # A layer with a window of 128 reads two tiles of keys at most, in decode and in prefill.
    assert oss.window_reach == 256 and make("llama-3.1-8b").window_reach == 0
    long, longer = (float(oss.operator_seconds(prefill(1024, h))["attention_prefill"]) for h in (31744, 64512))
    assert long < longer < 2 * long
    # A prompt shorter than its window is priced as one without.
    window, none = make("mistral-7b"), make("mistralai/Mistral-7B-v0.3")
    assert float(window.operator_seconds(prefill(2048))["attention_prefill"]) == pytest.approx(
        float(none.operator_seconds(prefill(2048))["attention_prefill"]), rel=0.02)
    assert float(window.operator_seconds(prefill(2048, 20000))["attention_prefill"]) < 0.7 * float(
        none.operator_seconds(prefill(2048, 20000))["attention_prefill"])


def test_links():
    inside, outside = make("llama-3.1-70b", tensor_ranks=8), make("llama-3.1-70b", tensor_ranks=16)
    assert float(inside.link_bytes_per_s) == pytest.approx(450e9)
    assert float(outside.link_bytes_per_s) == pytest.approx(50e9)
    assert make("llama-3.1-70b", "l40s", 8).explain(prefill(4096)).bound == "network"


@pytest.mark.parametrize("device", ["h100", "l40s"])
def test_an_all_reduce_takes_longer_among_more_ranks(device):
    """Measured: NCCL on H100 takes 8.8, 12.3 and 19 us at 2, 4 and 8 ranks (microsoft/apex_plus)."""
    many = [make("llama-3.1-70b", device, n, all_reduce="nccl") for n in (2, 4, 8)]
    seconds = [float(c.all_reduce.seconds(n, jnp.asarray(16384.0), c.link_bytes_per_s))
               for n, c in zip((2, 4, 8), many, strict=True)]
    assert seconds[0] < seconds[1] < seconds[2]
    if device == "h100":
        assert seconds == pytest.approx([8.8e-6, 12.3e-6, 19e-6], rel=0.25)
    # A step has 161 of them.
    assert seconds_of(many[2], "all_reduce") > 161 * seconds[1]


def test_host_lane():
    cost, stats = make("llama-3.2-1b"), BatchStats.of(1, 10)
    graphs, eager = cost.explain(stats), cost.explain(stats, cuda_graphs=False)
    assert eager.bound == "host" and eager.seconds > 2 * graphs.seconds and graphs.bound == "memory"
    assert cost.explain(stats, async_scheduling=True).serial_s < graphs.serial_s
    assert make("llama-3.2-1b", host="none").explain(stats).serial_s == 0
    assert make("mixtral-8x22b", tensor_ranks=8).num_kernels > 56 * 20


def test_cuda_graph_padding():
    counts = np.arange(0, 600)
    padded = pad_to_graph(counts)
    assert np.all(padded >= counts) and padded[0] == 0 and padded[3] == 4 and padded[9] == 16
    assert set(padded[1:513]) == set(CUDA_GRAPH_SIZES) and np.all(padded[513:] == counts[513:])


def test_explain_adds_up():
    for stats in (BatchStats.of(7, 7000), prefill(700, 300), BatchStats.of(20, 30000, 1, 512, 600, 3.5e5)):
        for name, ranks in (("llama-3.1-70b", 2), ("deepseek-v3", 8), ("gpt-oss-20b", 1)):
            step = make(name, "h200", ranks, "auto").explain(stats)
            assert step.seconds == pytest.approx(step.serial_s + max(step.launch_s, step.device_s))
            assert sum(o.seconds for o in step.operators) == pytest.approx(step.device_s)
            assert all(o.seconds >= 0 and o.flops >= 0 and o.bytes >= 0 for o in step.operators)
            assert 0 < step.flops < 989.4e12 * 2 * step.device_s
            assert 0 < step.bytes < 4.8e12 * step.device_s


def test_refusals():
    with pytest.raises(InputError, match="did you mean .*gemm_efficiency"):
        make("llama-3.1-8b", gem_efficiency=0.5)
    with pytest.raises(InputError, match="must be positive"):
        make("llama-3.1-8b", memory_bytes_per_s=-1.0)
    with pytest.raises(InputError, match="vllm-v1"):
        make("llama-3.1-8b", host="vllm-v2")
    with pytest.raises(InputError, match="distinct_experts"):
        make("llama-3.1-8b", distinct_experts="some")
    with pytest.raises(InputError, match="does not divide"):
        make("llama-3.1-8b", tensor_ranks=3)


# Gradients

@pytest.mark.parametrize("name, tensor_ranks, device", [
    ("llama-3.1-8b", 2, "h100"), ("deepseek-v3", 8, "h100"), ("gpt-oss-20b", 1, "h100"), ("mixtral-8x7b", 2, "a100"),
    ("llama-3.1-8b", 2, "rtx_pro_6000")])
def test_gradients_of_table_entries(name, tensor_ranks, device):
    """Every leaf, against central differences in float64, at entries that do not sit on a kink."""
    with enable_x64(True):
        # The number of multiprocessors is a whole number: it has no derivative.
        real, whole = eqx.partition(make(name, device, tensor_ranks=tensor_ranks, dtype="auto"), eqx.is_inexact_array)
        leaves, structure = jax.tree.flatten(real)
        assert all(leaf.dtype == jnp.float64 for leaf in leaves)

        @jax.jit
        def entries(leaves):
            table = eqx.combine(jax.tree.unflatten(structure, leaves), whole).tabulate(600, 40)
            parts = (table.by_tokens[jnp.asarray([1, 20, 50])], table.by_sampled[jnp.asarray([1, 20])],
                     table.by_sequences[jnp.asarray([1, 33])].ravel(), table.attention[:, :-2].ravel())
            return jnp.concatenate(parts)

        # Each entry in units of itself, mixed with random weights, so that small ones count too.
        size = np.asarray(entries(leaves))
        weights = np.random.default_rng(0).uniform(0.5, 1.5, size.shape) / np.where(size != 0, np.abs(size), 1.0)
        total = jax.jit(lambda leaves: jnp.sum(weights * entries(leaves)))
        exact = jax.jit(jax.grad(total))(leaves)
        moved = 0.0
        for i, leaf in enumerate(leaves):
            step = 1e-5 * max(float(leaf), 1e-6)
            up, down = (float(total([*leaves[:i], leaf + s, *leaves[i + 1:]])) for s in (step, -step))
            elasticity = float(exact[i]) * max(float(leaf), 1e-6)
            assert elasticity == pytest.approx((up - down) / 2e-5, rel=1e-5, abs=1e-7), i
            moved += abs(elasticity)
        assert np.all(np.isfinite(np.asarray([float(x) for x in exact]))) and moved > 0.9 * np.sum(size > 0)


@pytest.mark.parametrize("stats", [BatchStats.of(16, 16_000), prefill(512),
                                   BatchStats.of(16, 16_000, 1, 100, 900, 1.7e5)])
@pytest.mark.parametrize("name, device", [("gpt-oss-20b", "h100"), ("llama-3.1-8b", "a100"), ("deepseek-v3", "h200")])
def test_gradients_of_iterations_are_finite(name, device, stats):
    """Also where a class of layers is empty, or nothing decodes."""
    def seconds(cost):
        return cost.tabulate(1024, 32).iteration(stats)

    gradient = eqx.filter_grad(seconds)(make(name, device, dtype="auto"))
    leaves = [np.asarray(x) for x in jax.tree.leaves(gradient)]
    assert all(np.isfinite(x).all() for x in leaves) and sum(abs(float(x)) > 0 for x in leaves) > 10
