"""The profiled tier: its own table comes back, paces are exact, cells are linear, gaps are filled and counted."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsim._core.errors import InputError
from jaxsim.cost.base import UNBOUNDED, BatchStats
from jaxsim.cost.profile import OPERATORS, OperatorTable, Profile
from jaxsim.cost.profiled import Profiled, coverage, extrapolated, profiled
from jaxsim.cost.roofline import roofline
from jaxsim.kernels.fence import POSSIBLE, _operations
from jaxsim.profiles import aiconfigurator, llmservingsim, vidur
from jaxsim.spec.device import load_device
from jaxsim.spec.model import load_model
from jaxsim.spec.plan import Plan
from tests.profiles.synthetic import profile_of, wobble

pytestmark = pytest.mark.unoptimised

DENSE = ("embedding", "qkv", "attention_output", "rotary_and_cache_write", "norms", "ffn_up", "ffn_down",
         "ffn_activation", "final_norm", "lm_head", "sampler")
PURE = ("attention_decode", "attention_prefill")
SIZES = (1024, 256, 4096)
DEVICE_LANE = dict(host="none", launch_kernel_s=0.0, launch_graph_s=0.0)


def base_of(model="llama-3.1-8b", device="h100", plan=None, dtype="bfloat16", **rest):
    return roofline(load_model(model), load_device(device), plan, dtype, **{**DEVICE_LANE, **rest})


@pytest.fixture(scope="module")
def base():
    return base_of()


@pytest.fixture(scope="module")
def profile(base):
    return profile_of(base, (*DENSE, *PURE, "attention_mixed"))


@pytest.fixture(scope="module")
def cost(profile, base):
    return profiled(profile, base, *SIZES)


def batches(**fields) -> BatchStats:
    """A grid of batches, a missing field is 0."""
    size = len(next(iter(fields.values())))
    kinds = {name: jnp.float32 if name == "prefill_pairs" else jnp.int32 for name in BatchStats.__dataclass_fields__}
    return BatchStats(*(jnp.asarray(fields.get(name, np.zeros(size)), kind) for name, kind in kinds.items()))


def batches_at(table: OperatorTable) -> BatchStats:
    """The batches at which an attention table was measured."""
    at = dict(zip(table.axes, table.points.T, strict=True))
    fields = {}
    if "chunk_tokens" in at:
        chunk, keys = at["chunk_tokens"], at["keys_per_token"]
        fields |= dict(num_prefill=np.ones_like(chunk), prefill_tokens=chunk, prefill_context=(chunk + keys) / 2,
                       prefill_pairs=chunk * keys)
    if "sequences" in at:
        fields |= dict(num_decode=at["sequences"], decode_context=at["sequences"] * at["context_tokens"])
    return batches(**fields)


def attention_errors(cost: Profiled, table: OperatorTable, layers: int) -> np.ndarray:
    read = jax.jit(lambda c, s: jax.vmap(c.attention)(s))(cost, batches_at(table))
    return np.asarray(read, np.float64) / (layers * table.seconds) - 1


def one_chunk(tokens, history=0, **rest):
    return BatchStats.of(num_prefill=1, prefill_tokens=tokens, prefill_context=history + tokens,
                         prefill_pairs=float((history + tokens) ** 2 - history ** 2), **rest)


# Its own table


@pytest.mark.parametrize("name", [*PURE, "attention_mixed"])
def test_attention_tables_come_back(profile, base, cost, name):
    errors = np.abs(attention_errors(cost, profile.tables[name], base.model.layers))
    assert np.median(errors) < 0.01 and np.quantile(errors, 0.9) < (0.05 if name == "attention_mixed" else 0.02)


def test_token_and_sequence_tables_come_back(profile, base, cost):
    """Summed as an iteration does: seconds of a call x calls of it."""
    once = {"embedding", "final_norm", "lm_head", "sampler"}
    for num_decode in (1, 8, 64, 128):
        expected = sum(profile.tables[name].seconds[profile.tables[name].points[:, 0] == num_decode].item()
                       * (1 if name in once else base.model.layers) for name in DENSE)
        assert float(cost.by_sequences[num_decode, 0]) == pytest.approx(expected, rel=1e-4)


def test_reads_a_table_and_not_the_roofline(base, cost):
    """The made-up profile takes 1.1 to 1.3 times as long."""
    for stats in (BatchStats.of(16, 16_000), one_chunk(512), one_chunk(256, 512, num_decode=16, decode_context=8_000)):
        ratio = float(cost.device_seconds(stats)) / base.explain(stats).device_s
        assert 1.05 < ratio < 1.4


# Paces


@pytest.fixture(scope="module", params=["none", "vllm-v1"])
def hosted(request, profile):
    return profiled(profile, base_of(host=request.param), *SIZES)


@pytest.mark.parametrize("num, context", [(1, 17), (3, 500), (16, 16_000), (100, 90_000), (256, 256 * 4_000)])
def test_pace_is_the_iterations(hosted, num, context):
    cost = hosted
    pace = cost.decode(jnp.int32(num), jnp.int32(context))
    horizon = int(pace.horizon)
    assert horizon >= 1
    steps = np.unique(np.linspace(0, min(horizon, 2_000) - 1, 50).astype(int))
    stats = batches(num_decode=np.full(len(steps), num), decode_context=context + num * steps,
                    num_sampled=np.full(len(steps), num))
    exact = np.asarray(jax.vmap(cost.iteration)(stats))
    assert np.allclose(float(pace.first_s) + steps * float(pace.growth_s), exact, rtol=2e-6, atol=0)
    assert float(pace.growth_s) >= 0


def test_a_pace_ends_at_the_edge_of_its_cell_and_goes_on_behind_it(cost):
    at, edges = 1_000, []
    while len(edges) < 3:
        pace = cost.decode(jnp.int32(4), jnp.int32(4 * at))
        at += int(pace.horizon)
        edges.append(at)
    # An iteration at the edge itself still belongs to the cell before it.
    assert edges == [1025, 1281, 1537]


def test_host_bound_paces_stand_still(profile):
    cost = profiled(profile, base_of(launch_graph_s=6.6e-3), *SIZES)
    pace = cost.decode(jnp.int32(1), jnp.int32(100))
    assert float(pace.growth_s) == 0.0 and 1 <= int(pace.horizon) < UNBOUNDED
    last = BatchStats.of(1, 100 + int(pace.horizon) - 1)
    assert float(cost.iteration(last)) == pytest.approx(float(pace.first_s))


# In the loop


def test_only_operations_that_fit_in_a_kernel(cost):
    stats = BatchStats.of(8, 8_000, 1, 256, 256, 256.0 ** 2)
    used = {*_operations(jax.make_jaxpr(cost.iteration)(stats).jaxpr),
            *_operations(jax.make_jaxpr(cost.decode)(stats.num_decode, stats.decode_context).jaxpr)}
    assert used <= POSSIBLE
    # Gathers and bit counts only: nothing transcendental.
    assert not used & {"exp", "exp2", "log", "log1p", "pow", "sqrt", "cbrt", "expm1", "sort", "scatter"}


def test_differentiable_in_tables_and_statistics(cost):
    stats = one_chunk(300, 700, num_decode=5, decode_context=5_000)
    gradient = eqx.filter_grad(lambda c: c.iteration(stats))(cost)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradient))
    # The result is a weighted sum of table entries, with weights that are the gradient.
    total = sum(float(jnp.vdot(a, b)) for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(
        eqx.filter(cost, eqx.is_inexact_array)), strict=True))
    # `mixed_chunks` holds places, not seconds.
    total -= float(jnp.vdot(gradient.mixed_chunks, cost.mixed_chunks))
    assert total == pytest.approx(float(cost.iteration(stats)), rel=1e-5)


def test_batched_equals_single(cost):
    stats = batches(num_decode=np.arange(1, 65), decode_context=1_000 * np.arange(1, 65),
                    num_prefill=np.arange(64) % 2, prefill_tokens=100 * (np.arange(64) % 2),
                    prefill_context=100 * (np.arange(64) % 2), prefill_pairs=1e4 * (np.arange(64) % 2),
                    num_sampled=np.arange(1, 65))
    together = np.asarray(jax.vmap(cost.iteration)(stats))
    alone = [float(cost.iteration(jax.tree.map(lambda x, i=i: x[i], stats))) for i in range(0, 64, 7)]
    assert np.allclose(together[::7], alone, rtol=1e-6)


def test_nothing_to_do_costs_no_attention(cost):
    assert float(cost.attention(BatchStats.of())) == 0.0
    assert np.isfinite(float(cost.iteration(BatchStats.of())))
    assert np.isfinite(float(cost.decode(jnp.int32(0), jnp.int32(0)).first_s))


# Outside the tables


def test_extrapolates_along_the_roofline(base):
    """The factor at the edge of the table stays, whatever lies beyond."""
    profile = profile_of(base, (*DENSE, *PURE))
    cost = profiled(profile, base, 8192, 256, 32_768)
    edge = profile.tables["qkv"].points[-1:]
    for stats in (BatchStats.of(8, 8 * 30_000), one_chunk(8_000)):
        ratio = float(cost.device_seconds(stats)) / base.explain(stats).device_s
        assert 1.05 < ratio < 1.35
    only = profiled(profile_of(base, ("qkv",)), base, 8192, 256, 4096).by_tokens[-1]
    plain = profiled(profile_of(base, ("lm_head",)), base, 8192, 256, 4096).by_tokens[-1]
    qkv = base.model.layers * float(base.call_seconds(_work(base, "qkv", 8192)))
    assert float(only - plain) / qkv == pytest.approx(wobble(edge).item() - 1, abs=0.01)


def _work(base, name, tokens):
    from jaxsim.cost import operators

    works = operators.token_work(base.model, base.plan, base.weights, jnp.asarray(float(tokens)))
    return next(w for w in works if w.name == name)


def test_coverage(profile, base):
    stats = batches(num_decode=np.array([8, 8, 0, 0, 300]), decode_context=np.array([8_000, 320_000, 0, 0, 300_000]),
                    num_prefill=np.array([0, 0, 1, 1, 0]), prefill_tokens=np.array([0, 0, 512, 8_192, 0]),
                    prefill_pairs=np.array([0, 0, 512.0 ** 2, 8_192.0 ** 2, 0]),
                    num_sampled=np.array([8, 8, 1, 1, 300]))
    share = coverage(profile, base, stats)
    assert share[0] > 0.999 and share[2] > 0.99
    assert share[1] < 0.9 and share[3] < 0.1 and share[4] < 0.8
    only_gemm = coverage(profile_of(base, ("qkv", "ffn_up", "ffn_down")), base, BatchStats.of(8, 8_000))
    assert 0.4 < only_gemm[0] < 0.95
    assert 1 - only_gemm[0] == pytest.approx(
        sum(o.seconds for o in base.explain(BatchStats.of(8, 8_000)).operators
            if o.name not in ("qkv", "ffn_up", "ffn_down"))
        / float(profiled(profile_of(base, ("qkv", "ffn_up", "ffn_down")), base, *SIZES).device_seconds(
            BatchStats.of(8, 8_000))), rel=0.02)
    assert float(extrapolated(profile, base, *SIZES).iteration(BatchStats.of(8, 8_000))) < 1e-6


def test_without_mixed_measurements_decodes_add_up(base):
    cost = profiled(profile_of(base, (*DENSE, *PURE)), base, *SIZES)
    assert cost.mixed_attention is None
    both = one_chunk(256, 0, num_decode=16, decode_context=16_000)
    sum_s = float(cost.attention(one_chunk(256)) + cost.attention(BatchStats.of(16, 16_000)))
    # They share a floor, of 10 us a layer in each.
    assert 0.7 * sum_s < float(cost.attention(both)) < sum_s


def test_several_chunks_cost_less_than_one_of_their_size(cost):
    """Pairs are kept: two prompts of 512 have half of the pairs of one of 1,024."""
    two = BatchStats.of(num_prefill=2, prefill_tokens=1024, prefill_context=1024, prefill_pairs=2 * 512.0 ** 2)
    assert float(cost.attention(one_chunk(512))) < float(cost.attention(two)) < float(cost.attention(one_chunk(1024)))


def test_experts_read_as_many_as_are_touched():
    base = base_of("qwen3-30b-a3b")
    profile = profile_of(base, ("experts_touched", "qkv"))
    cost = profiled(profile, base, *SIZES)
    exact = profile.tables["experts_touched"].seconds
    points = profile.tables["experts_touched"].points
    more = profiled(profile_of(base, ("qkv",)), base, *SIZES)
    spent = float(cost.by_sequences[1, 0] - more.by_sequences[1, 0])
    roofline_s = next(o.seconds for o in base.explain(BatchStats.of(1, 16)).operators if o.name == "experts")
    measured = base.model.num_moe_layers * exact[(points == (1, 8)).all(1)].item()
    assert spent == pytest.approx(measured - roofline_s, rel=0.02)


def test_windowed_layers_stop_reading():
    base = base_of("gpt-oss-120b", dtype="mxfp4")
    cost = profiled(profile_of(base, PURE, lambda points: 1.2), base, *SIZES)
    full = base.model.layers - base.model.window_layers
    a, b = (float(cost.decode(jnp.int32(8), jnp.int32(8 * c)).growth_s) for c in (100, 3_000))
    assert b / a == pytest.approx(full / base.model.layers, rel=0.15)


def test_collectives_are_read_by_bytes():
    base = base_of("llama-3.1-70b", plan=Plan(tensor_parallel_size=4))
    with_it = profiled(profile_of(base, ("qkv", "all_reduce")), base, *SIZES)
    without = profiled(profile_of(base, ("qkv",)), base, *SIZES)
    explained = next(o.seconds for o in base.explain(BatchStats.of(64, 6_400)).operators if o.name == "all_reduce")
    message = np.array([[64.0 * base.model.hidden * 2]])
    assert float(with_it.by_sequences[64, 0] - without.by_sequences[64, 0]) == pytest.approx(
        explained * (wobble(message).item() - 1), rel=0.02)


def test_measured_host_steps_take_the_place_of_the_constants():
    base = base_of(host="vllm-v1")
    table = OperatorTable("host_step", [[1.0], [256.0]], [1e-3, 4e-3])
    cost = profiled(Profile({"host_step": table}), base, *SIZES)
    assert float(cost.by_sequences[1, 3]) == pytest.approx(1e-3)
    assert float(cost.by_sequences[256, 3]) == pytest.approx(4e-3)
    later = profiled(Profile({"host_step": table}), base, *SIZES, async_scheduling=True)
    assert float(later.by_sequences[256, 3]) == pytest.approx(float(base.async_step_s))
    assert float(later.by_sequences[256, 1]) == pytest.approx(4e-3 + float(base.launch_graph_s))


# Errors


@pytest.mark.parametrize("factor", [1e3, 1e-3])
@pytest.mark.parametrize("name", ["qkv", "attention_decode"])
def test_a_table_off_by_1000_is_refused(base, profile, name, factor):
    table = profile.tables[name]
    with pytest.raises(InputError) as info:
        bad = OperatorTable(name, table.points, table.seconds * factor, "ops.csv")
        profiled(Profile({name: bad}), base, *SIZES)
    assert "ops.csv" in info.value.field and "unit" in info.value.remedy


def test_a_row_off_by_1000_is_named(base, profile):
    table = profile.tables["qkv"]
    seconds = np.where(np.arange(len(table.seconds)) == 5, 1e3 * table.seconds, table.seconds)
    bad = OperatorTable("qkv", table.points, seconds, "ops.csv", tuple(f"row {i + 1}" for i in range(len(seconds))))
    with pytest.raises(InputError, match=r"ops.csv row 6, qkv seconds = .*off by 1000"):
        profiled(Profile({"qkv": bad}), base, *SIZES)


def test_a_profile_of_something_else_is_refused(base, profile):
    with pytest.raises(InputError, match="tensor_parallel_size = 2: differs"):
        profiled(Profile(dict(profile.tables), tensor_parallel_size=2), base, *SIZES)
    with pytest.raises(InputError, match="profile.model = 'llama-3.1-70b': has hidden = 8192"):
        profiled(Profile(dict(profile.tables), "llama-3.1-70b"), base, *SIZES)


def test_experts_measured_in_wider_slices_are_refused():
    """Without expert parallelism, data-parallel ranks cut experts further than tensor-parallel ones."""
    base = base_of("mixtral-8x7b", plan=Plan(data_parallel_size=2))
    for name in ("experts", "experts_touched"):
        with pytest.raises(InputError, match="the profile has them cut over 1"):
            profiled(profile_of(base_of("mixtral-8x7b"), (name,)), base, *SIZES)


@pytest.mark.parametrize("is_expert_parallel", [True, False])
def test_what_ranks_do_together_is_the_rooflines_without_a_table(is_expert_parallel):
    """Experts and exchange of ranks that are not alike."""
    base = base_of("mixtral-8x7b", plan=Plan(data_parallel_size=2, enable_expert_parallel=is_expert_parallel))
    cost, expected = profiled(profile_of(base, DENSE[:5]), base, *SIZES), base.tabulate(*SIZES[:2])
    for tokens, most in ((300, 250), (900, 800), (64, 32)):
        asked = (jnp.bool_(most == 32), jnp.int32(tokens), jnp.int32(most))
        assert float(cost.together_seconds(*asked)) == pytest.approx(float(expected.together_seconds(*asked)), rel=1e-5)


def test_every_operator_has_a_rate():
    """No table can be read that could not be extrapolated."""
    assert {n for n in OPERATORS if n.startswith(("attention_", "latent_"))} >= set(PURE)
    base = base_of("deepseek-v3", "h200", Plan(tensor_parallel_size=8), "fp8")
    cost = profiled(profile_of(base, ("latent_decode", "latent_prefill", "experts")), base, *SIZES)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(cost))


# Measured data


def layers(shared_data, name, experts=False):
    file = f"rtxpro6000_{name}"
    ops = shared_data / "ops"
    return llmservingsim.read(
        ops / f"vllm019_dense_{file}.csv", ops / f"vllm019_attention_{file}.parquet",
        ops / f"vllm019_moe_{file}.csv" if experts else None, ops / f"vllm019_meta_{file}.yaml",
        ops / f"vllm019_attention_skew_{file}.parquet")


@pytest.fixture(scope="module")
def measured_8b(shared_data):
    if not (shared_data / "ops" / "vllm019_dense_rtxpro6000_llama31_8b.csv").exists():
        pytest.skip("no layer timings in the measured data")
    profile = layers(shared_data, "llama31_8b")
    base = base_of(device="rtx_pro_6000")
    return profile, base, profiled(profile, base, 2048, 256, 16_384)


@pytest.mark.parametrize("batch, context, milliseconds", [(1, 128, 11.3), (128, 1_200, 27.3)])
def test_measured_decode_step(measured_8b, batch, context, milliseconds):
    """Source: sum of vLLM 0.19 layer timings on an RTX PRO 6000 (casys-kaist/LLMServingSim)."""
    seconds = float(measured_8b[2].device_seconds(BatchStats.of(batch, batch * context)))
    assert 1e3 * seconds == pytest.approx(milliseconds, rel=0.005)


@pytest.mark.parametrize("name, p90", [("attention_decode", 0.01), ("attention_prefill", 0.02),
                                       ("attention_mixed", 0.055)])
def test_measured_attention_comes_back(measured_8b, name, p90):
    profile, base, cost = measured_8b
    errors = np.abs(attention_errors(cost, profile.tables[name], base.model.layers))
    assert np.median(errors) < 0.01 and np.quantile(errors, 0.9) < p90


def test_measured_layers_come_back(measured_8b):
    """Every row of the dense table, summed over operators: what an iteration with chunks reads where nothing is padded
    to captured sizes."""
    profile, base, padded = measured_8b
    cost = profiled(profile, base, 2048, 256, 16_384, cuda_graphs=False)
    assert float(padded.by_tokens[9]) == float(cost.by_tokens[16]) != float(cost.by_tokens[9])
    once = {"embedding"}
    names = [n for n in profile.tables if OPERATORS[n].axes == ("tokens",)]
    tokens = profile.tables["qkv"].points[:, 0]
    expected = sum(profile.tables[n].seconds * (1 if n in once else base.model.layers) for n in names)
    stats = batches(num_prefill=np.ones_like(tokens), prefill_tokens=tokens, prefill_pairs=tokens ** 2)
    head = float(cost.by_sampled[0])
    read = np.asarray(jax.vmap(cost.device_seconds)(stats) - jax.vmap(cost.attention)(stats)) - head
    assert np.allclose(read, expected, rtol=1e-3)
    assert coverage(profile, base, BatchStats.of(128, 128 * 1_200))[0] > 0.99


def test_measured_experts(shared_data):
    if not (shared_data / "ops" / "vllm019_moe_rtxpro6000_qwen3_30b_a3b.csv").exists():
        pytest.skip("no expert timings in the measured data")
    profile = layers(shared_data, "qwen3_30b_a3b", experts=True)
    base = base_of("qwen3-30b-a3b", "rtx_pro_6000", expert_skew=0.0)
    cost = profiled(profile, base, 2048, 256, 16_384)
    # Equally popular, 128 sequences touch all of the 128 experts: 48 layers of 849 us, and the rest.
    without = profiled(Profile({n: t for n, t in profile.tables.items() if n != "experts_touched"}, profile.model),
                       base, 2048, 256, 16_384)
    experts = next(o.seconds for o in base.explain(BatchStats.of(128, 128)).operators if o.name == "experts")
    assert float(cost.by_sequences[128, 0] - without.by_sequences[128, 0]) + experts == pytest.approx(
        48 * 849.3e-6, rel=0.01)


@pytest.mark.parametrize("gpu, version, model, tensor_ranks", [
    ("h100", "0.19.0", "llama-3.1-8b", 1), ("h100", "0.19.0", "llama-3.1-70b", 4),
    ("a100", "0.14.0", "mixtral-8x7b", 2)])
def test_measured_operator_tables(shared_data, gpu, version, model, tensor_ranks):
    """aiconfigurator: attention comes back, and whole steps are what the roofline's calibration says, within 25 %."""
    def file(kind):
        return shared_data / "ops" / f"aic_{gpu}_sxm_vllm{version}_{kind}.parquet"

    if not file("gemm").exists():
        pytest.skip("no operator tables in the measured data")
    plan = Plan(tensor_parallel_size=tensor_ranks)
    profile = aiconfigurator.read(
        model, plan, gemm=file("gemm"), context_attention=file("context_attention"), moe=file("moe"),
        generation_attention=file("generation_attention"), custom_allreduce=file("custom_allreduce"))
    base = base_of(model, gpu, plan)
    cost = profiled(profile, base, 8192, 512, 32_768)
    for name, least in (("attention_decode", 0.9), ("attention_prefill", 0.8)):
        table = profile.tables[name]
        inside = (table.points[:, 0] <= (512 if name == "attention_decode" else 8192)) & (table.points[:, 1] <= 32_768)
        table = OperatorTable(name, table.points[inside], table.seconds[inside])
        errors = np.abs(attention_errors(cost, table, base.model.layers))
        assert np.median(errors) < 0.01 and (errors < 0.02).mean() > least
    for stats in (BatchStats.of(1, 128), BatchStats.of(32, 32_000), BatchStats.of(128, 153_600), one_chunk(2048)):
        assert float(cost.device_seconds(stats)) == pytest.approx(base.explain(stats).device_s, rel=0.25)


def test_measured_vidur(shared_data):
    ops = shared_data / "ops"
    if not (ops / "vidur_linear_ops.parquet").exists():
        pytest.skip("no Vidur tables in the measured data")
    profile = vidur.read(ops / "vidur_linear_ops.parquet", ops / "vidur_collectives.csv",
                         ops / "vidur_cpu_overheads.csv", gpu="a100", model="meta-llama/Llama-2-7b-hf")
    base = base_of("llama-2-7b", "a100", dtype="float16")
    cost = profiled(profile, base, 4096, 256, 4096)
    step = BatchStats.of(16, 16 * 500)
    assert float(cost.device_seconds(step)) == pytest.approx(base.explain(step).device_s, rel=0.25)
    assert 0.5e-3 < float(cost.by_sequences[16, 3]) < 5e-3
