"""The roofline: limits, monotonicity, gradients, and figures of real systems."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsim._core.errors import InputError
from jaxsim.cost import attention as a
from jaxsim.cost.base import BatchStats
from jaxsim.cost.collectives import CustomAllReduce
from jaxsim.cost.rank import CUDA_GRAPH_SIZES, pad_to_graph
from jaxsim.cost.roofline import notes, roofline
from jaxsim.cost.tabulated import CONTEXT, WINDOW
from jaxsim.spec.device import load_device
from jaxsim.spec.model import load_model
from jaxsim.spec.plan import Plan
from tests.cost.steps import STEPS

pytestmark = pytest.mark.unoptimised

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

@pytest.mark.parametrize("step", STEPS, ids=str)
def test_whole_steps(step):
    assert abs(step.error) < step.within, f"{step.simulated_ms:.2f} of {step.measured_ms:g} ms"


def test_prefill_of_70b_on_two_h100():
    step = make("llama-3.1-70b", tensor_ranks=2, host="vllm-v0").explain(prefill(3017))
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


def test_links_are_of_their_group():
    """Two nodes of data-parallel ranks around experts: tensors stay inside, where vLLM's own all-reduce runs."""
    plan = Plan(tensor_parallel_size=2, data_parallel_size=8, enable_expert_parallel=True)
    both = roofline(load_model("deepseek-v3"), load_device("h100"), plan)
    assert float(both.link_bytes_per_s) == pytest.approx(450e9) and isinstance(both.all_reduce, CustomAllReduce)
    assert float(both.exchange_bytes_per_s) == pytest.approx(50e9)
    inside = roofline(load_model("deepseek-v3"), load_device("h100"), Plan(tensor_parallel_size=2))
    assert seconds_of(both, "all_reduce") == pytest.approx(seconds_of(inside, "all_reduce"))
    assert seconds_of(both, "logits_gather") == pytest.approx(seconds_of(inside, "logits_gather"))
    assert float(both.exchange_gather.between.latency_s) == pytest.approx(20e-6)
    assert float(both.all_gather.latency_s) < 10e-6
    # Without experts to share, ranks are copies and nothing leaves the node.
    assert float(roofline(load_model("llama-3.1-8b"), load_device("h100"), Plan(
        tensor_parallel_size=2, data_parallel_size=8)).exchange_bytes_per_s) == pytest.approx(450e9)
    # One number is for all groups, unless that of experts is given too.
    same = roofline(load_model("deepseek-v3"), load_device("h100"), plan, link_bytes_per_s=1e12)
    assert float(same.link_bytes_per_s) == float(same.exchange_bytes_per_s) == pytest.approx(1e12)
    apart = roofline(load_model("deepseek-v3"), load_device("h100"), plan, exchange_bytes_per_s=1e11,
                     link_bytes_per_s=1e12)
    assert float(apart.exchange_bytes_per_s) == pytest.approx(1e11)


def test_cut_experts_are_shared_over_the_network_too():
    """Two nodes without expert parallelism: the exchange is that of data-parallel ranks, wherever experts lie."""
    cost = roofline(load_model("mixtral-8x7b"), load_device("h100"), Plan(tensor_parallel_size=2, data_parallel_size=8))
    assert cost.num_ranks == 8 and float(cost.exchange_bytes_per_s) == pytest.approx(50e9)
    assert float(cost.link_bytes_per_s) == pytest.approx(450e9)


@pytest.mark.parametrize("ranks, tokens, most, mean, even", [
    # One rank has 1,104 of 1,200 tokens: the other receives these. One of four has 1,800 of 2,700, the others 300 each,
    # and one of those receives 2,400, as each would of four with 800.
    (2, 1200, 1104, 600, 1104), (4, 2700, 1800, 675, 800), (2, 1024, 512, 512, 512), (4, 3200, 800, 800, 800)])
@pytest.mark.parametrize("is_expert_parallel", [True, False])
def test_the_exchange_lasts_until_the_emptiest_rank_has_all(ranks, tokens, most, mean, even, is_expert_parallel):
    """And experts have the tokens there are, each of them once."""
    cost = roofline(load_model("qwen3-30b-a3b"), load_device("h100"),
                    Plan(data_parallel_size=ranks, enable_expert_parallel=is_expert_parallel))
    together = cost.tabulate(2048, 64).together
    works = {w.name: w for w in cost.token_works(jnp.asarray([float(mean)]), together=True)}
    expected = 48 * float(cost.call_seconds(works["experts"])[0])
    for name, width in (("expert_gather", 2048 + 128), ("expert_scatter", 2048)):
        kernel = cost.exchange_gather if name == "expert_gather" else cost.reduce_scatter
        message = jnp.asarray(ranks * even * width * 2.0)
        expected += 48 * float(kernel.seconds(ranks, message, cost.exchange_bytes_per_s))
    found = together.seconds(jnp.bool_(False), jnp.int32(tokens), jnp.int32(most))
    assert float(found) == pytest.approx(expected, rel=2e-3)


def test_captured_pieces_pad_all_ranks_to_the_fullest():
    """Up to the largest graph; ranks are not where only decodes are captured."""
    cost = roofline(load_model("qwen3-30b-a3b"), load_device("h100"),
                    Plan(data_parallel_size=2, enable_expert_parallel=True))

    def seconds(tokens, most, graphs=True):
        return float(cost.tabulate(2048, 64, cuda_graphs=graphs).together.seconds(
            jnp.bool_(False), jnp.int32(tokens), jnp.int32(most)))

    assert seconds(300, 250) == seconds(500, 250) == pytest.approx(sum(
        float(part[0]) for part in cost.together_seconds(jnp.asarray([256.0]))), rel=1e-5)
    assert seconds(300, 250, "decodes") < 0.99 * seconds(300, 250)


def test_vllms_all_reduce_wants_peers_that_can_be_read():
    def reduces(device, ranks):
        return isinstance(make("llama-3.1-8b", device, ranks).all_reduce, CustomAllReduce)

    assert reduces("h100", 8) and reduces("mi300x", 2) and reduces("a40", 2)
    assert not reduces("a40", 4) and not reduces("tpu_v5e", 4) and not reduces("l40s", 2)


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


@pytest.mark.parametrize("name, device", [
    ("mixtral-8x7b", "h100"), ("llama-3.1-8b", "h100"), pytest.param("llama-2-7b", "a100", marks=pytest.mark.slow),
    pytest.param("llama-3.1-8b", "rtx_pro_6000", marks=pytest.mark.slow)])
def test_a_chunk_never_makes_a_step_cheaper(name, device):
    """Pieces of an iteration with chunks are padded to captured sizes too; beyond 128 tokens steps are smeared over the
    two or four between knots."""
    table = make(name, device).tabulate(1024, 300)
    for decodes in (3, 5, 9, 17, 33, 65, 129, 257):
        alone = float(table.iteration(BatchStats.of(decodes, 500 * decodes)))
        mixed = float(table.iteration(BatchStats.of(decodes, 500 * decodes, 1, 1, 501, 501.0 ** 2 - 500 ** 2)))
        assert mixed > (alone if decodes < 128 else 0.99 * alone)
    cost, eager = make(name, device), make(name, device).tabulate(1024, 32, cuda_graphs=False)
    assert float(table.by_tokens[9]) == float(table.by_tokens[16]) == pytest.approx(
        float(cost.token_seconds(jnp.asarray(16.0))), rel=1e-5)
    assert float(eager.by_tokens[9]) == pytest.approx(float(cost.token_seconds(jnp.asarray(9.0))), rel=1e-5)


def test_narrow_caches_convert():
    """Chunks over a cache of 4 bits take at least as long as over one of 8."""
    four, eight, sixteen = (np.asarray(make("llama-3.1-8b", kv_dtype=kv).chunk_coefficients())[0, a.PAIR]
                            for kv in ("int4", "fp8", "bf16"))
    assert four == eight > sixteen


def test_windows_in_what_is_explained():
    """Windowed layers multiply too: a prompt inside the window has the FLOP of full ones."""
    def flops(stats, name="mistral-7b"):
        return next(o for o in make(name).explain(stats).operators if o.name == "attention_prefill")

    window, full = flops(prefill(2048)), flops(prefill(2048), "mistralai/Mistral-7B-v0.3")
    assert window.flops == full.flops > 0 and window.bytes == full.bytes > 0
    # 512 tokens behind 16,000: each sees 4,096.
    assert flops(prefill(512, 16_000)).flops == 32 * 2 * 32 * 128 * 2 * 4096 * 512
    assert flops(prefill(512, 16_000)).bytes == 32 * 2 * 8 * 128 * 2 * (4096 + 512)


@pytest.mark.parametrize("device, told", [
    ("a100", 1), ("v100_sxm2_32", 2), ("rtx_pro_6000", 1), ("l40s", 2), ("h100", 0), ("h200", 0)])
def test_8bit_caches_without_a_table_are_told(device, told):
    model, device = load_model("llama-3.1-8b"), load_device(device)
    lines = notes(model, device, kv_dtype="fp8")
    assert len(lines) == told and ("8-bit KV caches were not measured" in " ".join(lines)) == (told > 0), lines
    assert not any("KV" in line for line in notes(model, device))


@pytest.mark.parametrize("name, device, dtype, plan, told", [
    ("llama-3.1-8b", "h100", "auto", {}, ()), ("mixtral-8x7b", "a100", "auto", {"tensor_parallel_size": 2}, ()),
    ("llama-3.1-8b", "l40s", "auto", {}, ("those of rtx_pro_6000: l40s was not measured",)),
    ("llama-3.1-8b", "rtx_pro_6000", "fp8", {}, ("gemm.fp8: not measured on rtx_pro_6000, constants of h100_sxm_80",)),
    ("llama-3.1-8b", "rtx_pro_6000", "fp4", {}, ("gemm.fp8: not measured on rtx", "fp4 in fp4 was not measured")),
    ("llama-3.1-8b", "a100", "int8", {}, ("constants of h100", "int8 in int8 was not measured: constants of gemm.fp8")),
    ("llama-3.1-8b", "a100", "int4", {}, ("gemm.int4: not measured, constants of [gemm.bf16]",)),
    ("gpt-oss-20b", "a100", "auto", {}, ("experts.mxfp4: not measured on a100", "experts.mxfp4: not measured, const")),
    ("gpt-oss-20b", "h100", "auto", {}, ("experts.mxfp4: not measured, constants of the H200",)),
    ("gpt-oss-20b", "h200", "auto", {}, ()),
    ("mixtral-8x7b", "h100", "int4", {}, ("gemm.int4: not measured, constants of [gemm.bf16]",
                                          "experts.int4_marlin: not measured, constants of [experts.mxfp4_marlin]")),
    ("deepseek-v3", "rtx_pro_6000", "auto", {"tensor_parallel_size": 8},
     ("gemm.fp8_block, latent, experts.fp8_block: not measured on rtx", "over PCIe, whose constants are a guess")),
    ("deepseek-v2-lite", "a100", "auto", {}, ("latent: not measured on a100_sxm_80, constants of h100_sxm_80",)),
    ("llama-3.1-8b", "b200", "fp4", {}, ("those of h100_sxm_80: b200_sxm was not measured", "fp4 in fp4 was not")),
    ("llama-3.1-70b", "gh200", "auto", {"tensor_parallel_size": 16},
     ("gh200_96 was not measured", "nodes of 8 devices", "a network of 12.5 GB/s a device"))])
def test_where_constants_come_from_is_told(name, device, dtype, plan, told):
    found = notes(load_model(name), load_device(device), Plan(**plan), dtype)
    assert len(found) == len(told) and all(part in line for part, line in zip(told, found, strict=True)), found


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
    ("llama-3.1-8b", 2, "h100"), pytest.param("gpt-oss-20b", 1, "h100", marks=pytest.mark.slow),
    pytest.param("deepseek-v3", 8, "h100", marks=pytest.mark.slow),
    pytest.param("mixtral-8x7b", 2, "a100", marks=pytest.mark.slow),
    pytest.param("llama-3.1-8b", 2, "rtx_pro_6000", marks=pytest.mark.slow)])
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
        exact = jax.jit(jax.grad(lambda leaves: jnp.sum(weights * entries(leaves))))(leaves)
        moved = 0.0
        for i, leaf in enumerate(leaves):
            step = 1e-5 * max(float(leaf), 1e-6)
            up, down = (weights @ np.asarray(entries([*leaves[:i], leaf + s, *leaves[i + 1:]])) for s in (step, -step))
            elasticity = float(exact[i]) * max(float(leaf), 1e-6)
            assert elasticity == pytest.approx((up - down) / 2e-5, rel=1e-5, abs=1e-7), i
            moved += abs(elasticity)
        assert np.all(np.isfinite(np.asarray([float(x) for x in exact]))) and moved > 0.9 * np.sum(size > 0)


@pytest.mark.parametrize("name, device", [
    ("llama-3.1-8b", "h100"), pytest.param("gpt-oss-20b", "h100", marks=pytest.mark.slow),
    pytest.param("deepseek-v3", "h200", marks=pytest.mark.slow)])
@pytest.mark.slow
def test_gradients_of_iterations_are_finite(name, device):
    """Also where a class of layers is empty, or nothing decodes."""
    @eqx.filter_jit
    @eqx.filter_grad
    def gradient(cost, stats):
        return cost.tabulate(1024, 32).iteration(stats)

    for stats in (BatchStats.of(16, 16_000), prefill(512), BatchStats.of(16, 16_000, 1, 100, 900, 1.7e5)):
        found = gradient(make(name, device, dtype="auto"), stats)
        leaves = [np.asarray(x) for x in jax.tree.leaves(found)]
        assert all(np.isfinite(x).all() for x in leaves) and sum(abs(float(x)) > 0 for x in leaves) > 10
