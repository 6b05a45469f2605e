"""Requirements against counts and roots worked out here, GenZ's caches, finite differences; and refusals."""

import json

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
import pytest
from scipy.optimize import brentq

import jaxsim
from jaxsim._core.errors import InputError
from jaxsim._core.precision import enable_x64
from jaxsim.analytic import ideal, of_scenario, steady_state
from jaxsim.analytic.requirements import USUAL, Efficiencies, UseCase, alone, balanced, needs, requirements, use_case_of
from jaxsim.planning.platforms import platforms
from jaxsim.spec.model import load_model
from jaxsim.spec.plan import Plan, weight_format
from jaxsim.spec.scenario import Scenario

pytestmark = pytest.mark.unoptimised

LLAMA, MIXTRAL = load_model("llama-3.1-8b"), load_model("mixtral-8x7b")
MIB = 2**20
CHAT = dict(input_tokens=3000, output_tokens=1000, ttft_ms=200, tpot_ms=10)


def case(model=LLAMA, **rest) -> UseCase:
    return UseCase(**dict(model=model, input_tokens=3000, output_tokens=1000, ttft_s=0.2, tpot_s=0.01) | rest)


def total(amounts) -> float:
    return float(np.asarray(amounts).sum())


# Amounts, by the table of operators in docs/cost-model.md


def products(m, n_head, d=4096, heads=32, kv=8, size=128, f=14336, vocab=128256, layers=32):
    """FLOP and bytes of Llama-3.1-8B for m tokens of which n_head are sampled, attention itself left out."""
    flops = layers * 2 * m * (d * (heads + 2 * kv) * size + heads * size * d + 3 * d * f) + 2 * n_head * d * vocab
    moved = 2 * layers * (d * (heads + 2 * kv) * size + m * (d + (heads + 2 * kv) * size)
                          + heads * size * d + m * (heads * size + d)
                          + 2 * d * f + m * (d + 2 * f) + f * d + m * (f + d)
                          + 4 * m * d + m * (heads * size + 4 * kv * size) + 3 * m * f)
    moved += 2 * 2 * m * d + 2 * 2 * n_head * d + 2 * (d * vocab + n_head * (d + vocab)) + 8 * n_head * vocab
    return flops, moved


def test_counts_of_a_prompt():
    with enable_x64(True):
        work = case(batch=3, input_tokens=500, prompts=2).passes()[0]
    flops, moved = products(2 * 500, 2)
    pairs = sum(range(1, 501))
    assert total(work.flops) == pytest.approx(flops + 2 * 32 * 4 * 32 * 128 * pairs, rel=1e-9)
    attention = 2 * 32 * 500 * (2 * 8 * 128 + 2 * 32 * 128) * 2
    assert total(work.bytes) == pytest.approx(moved + attention, rel=1e-9)


@pytest.mark.parametrize("shares", [True, False])
def test_counts_of_a_decode(shares):
    with enable_x64(True):
        work = case(batch=5, beams=4, input_tokens=700, output_tokens=90, shares_prompt=shares).passes()[1]
    flops, moved = products(20, 20)
    assert total(work.flops) == pytest.approx(flops + 32 * 20 * 4 * 32 * 128 * 790, rel=1e-9)
    read = 5 * (700 if shares else 4 * 700) + 20 * 90
    attention = 32 * (read * 2 * 8 * 128 + 20 * 2 * 32 * 128) * 2
    assert total(work.bytes) == pytest.approx(moved + attention, rel=1e-9)


def test_windows_see_what_they_see():
    """Pairs, and tokens read, of gpt-oss: half of its layers look back 128."""
    model = load_model("gpt-oss-120b")
    size = 4 * model.heads * model.head_dim
    for tokens in (50, 128, 129, 1000):
        with enable_x64(True):
            prefill, decode = case(model, input_tokens=tokens, output_tokens=60).passes()
        pairs = sum(18 * min(i, 128) + 18 * i for i in range(1, tokens + 1))
        assert prefill.flops_of("attention", but="attention_output") == pytest.approx(size * pairs, rel=1e-9)
        seen = 18 * (tokens + 60) + 18 * min(tokens + 60, 128)
        assert decode.flops_of("attention", but="attention_output") == pytest.approx(size * seen, rel=1e-9)


def test_ring_of_four():
    """Two all-reduces a layer and one of the embedding: 2 x 3 hops, 2 x 3/4 of the bytes; a gather of logits: half."""
    with enable_x64(True):
        work = case(batch=2, plan=Plan(tensor_parallel_size=4, pipeline_parallel_size=2)).passes()[1]
    assert float(work.starts) == 66 and float(work.hops) == 65 * 6 + 3
    assert float(work.wire_bytes) == pytest.approx(65 * 1.5 * 2 * 4096 * 2 + 0.75 * 2 * 128256 * 2)
    assert float(work.stage_hops) == 1 and float(work.stage_bytes) == 2 * 2 * 4096 * 2


# Memory


@pytest.mark.parametrize("name, shares, mib", [
    ("llama-2-7b", True, 450), ("llama-3.1-70b", False, 750), ("mixtral-8x7b", False, 300)])
def test_caches_of_genz(name, shares, mib):
    """GenZ's notebook of platform requirements prints these for 8 bits, 4 beams, 1,000 and 200 tokens: with keys and
    values of every head a prompt is there once, with fewer of them once a beam."""
    use = case(load_model(name), input_tokens=1000, output_tokens=200, beams=4, kv_dtype="int8", shares_prompt=shares)
    assert use.memory().cache == mib * MIB


@pytest.mark.parametrize("name, trillions", [
    ("llama-3.1-70b", 0.0706), ("hypothetical/super-llm-10t-moe", 9.45), ("hypothetical/super-llm-5t-dense", 4.43)])
def test_weights_are_all_parameters(name, trillions):
    use = case(load_model(name), dtype="bf16")
    assert use.memory().weights == use.memory().total_weights == 2 * use.model.num_parameters - (
        2 * use.model.hidden)  # the last norm
    assert use.model.num_parameters / 1e12 == pytest.approx(trillions, rel=1e-3)


@pytest.mark.parametrize("plan", [Plan(tensor_parallel_size=4), Plan(pipeline_parallel_size=5),
                                  Plan(tensor_parallel_size=2, pipeline_parallel_size=3)])
def test_ranks_and_stages_lose_nothing(plan):
    whole, cut = case(batch=7).memory(), case(batch=7, plan=plan).memory()
    assert cut.total_cache == pytest.approx(whole.total_cache)
    # Norms are on every rank.
    assert whole.total_weights <= cut.total_weights < 1.001 * whole.total_weights
    assert cut.device_bytes * plan.num_devices >= cut.total_bytes * (1 - 1e-12)
    assert cut.device_bytes < whole.device_bytes


def test_requests_are_spread_over_data_parallel_ranks():
    use = case(MIXTRAL, batch=7, plan=Plan(data_parallel_size=2))
    assert use.memory().cache == case(MIXTRAL, batch=4).memory().cache
    assert use.memory().total_cache == case(MIXTRAL, batch=7).memory().cache


# Requirements


@pytest.mark.parametrize("name, shares, tflops, mib", [
    ("llama-2-7b", True, 5.275176, 6626), ("mixtral-8x7b", False, 10.344831, 12_332),
    ("llama-3.1-70b", False, 56.019124, 66_030)])
def test_bandwidth_and_compute_of_genz(name, shares, tflops, mib):
    """The same notebook's decode with 10 ms a token: TFLOP/s, and the MB that it reads, weights of two experts and the
    cache. Its reads leave out activations and the LM head, which is 16-bit here."""
    use = case(load_model(name), input_tokens=1000, output_tokens=200, beams=4, dtype="int8", kv_dtype="int8",
               shares_prompt=shares, distinct_experts="topk")
    with enable_x64(True):
        work = use.passes()[1]
        closed = alone(work, work, 0.01, 0.01, Efficiencies(1.0, 1.0, 1.0))
        found = float(closed.flops[1]) / 1e12, float(closed.memory_bytes_per_s[1]) * 0.01 / MIB
    assert found[0] == pytest.approx(tflops, rel=0.05)
    head = 2 * use.model.hidden * use.model.vocab / MIB
    assert mib < found[1] - head < 1.02 * mib


def seconds(work, flops, moved, efficiencies=USUAL, links_s=0.0, wider=1.0):
    """A pass in plain numpy."""
    f = np.asarray(work.flops) * np.where(work.is_wide, wider, 1.0) / flops / efficiencies.compute
    b = np.asarray(work.bytes) / moved / efficiencies.memory
    return float(np.maximum(f, b).sum()) + links_s


def test_one_device():
    found = requirements(LLAMA, **CHAT, batch=8)
    use, shares = found.use_case, found.efficiencies
    flops, moved = (float(np.sum(x)) for x in (found.prefill.flops, found.decode.bytes))
    assert found.alone.flops[0] == pytest.approx(flops / 0.2 / shares.compute)
    assert found.alone.memory_bytes_per_s[1] == pytest.approx(moved / 0.01 / shares.memory)
    assert not found.has_links and len(found.rows) == 3
    p = found.platform
    assert found.is_met_by_both
    assert seconds(found.prefill, p.flops, p.memory_bytes_per_s) == pytest.approx(use.ttft_s, rel=1e-6)
    assert seconds(found.decode, p.flops, p.memory_bytes_per_s) == pytest.approx(use.tpot_s, rel=1e-6)
    assert jaxsim.requirements(LLAMA, **CHAT, batch=8).rows == found.rows
    json.dumps(found.record(), allow_nan=False)


def test_links_take_their_share():
    found = requirements(LLAMA, **CHAT, batch=8, plan=Plan(tensor_parallel_size=4, pipeline_parallel_size=2))
    assert [row.requirement for row in found.rows][3:] == ["link bandwidth, each way", "link latency, at most"]
    for work, limit_s, index in ((found.prefill, 0.2, 0), (found.decode, 0.01, 1)):
        assert found.alone.link_bytes_per_s[index] == pytest.approx(
            float(work.wire_bytes + work.stage_bytes) / (0.1 * limit_s) / found.efficiencies.link)
        assert found.alone.hop_s[index] == pytest.approx(0.1 * limit_s / float(work.hops + work.stage_hops))
        # All of the limit, were links without limit.
        assert found.alone.flops[index] == pytest.approx(total(work.flops) / limit_s / found.efficiencies.compute)
        assert found.alone.memory_bytes_per_s[index] == pytest.approx(
            total(work.bytes) / limit_s / found.efficiencies.memory)
    p, limits = found.platform, (0.2, 0.01)
    assert p.link_bytes_per_s == max(found.alone.link_bytes_per_s) and p.hop_s == min(found.alone.hop_s)
    for work, spent in ((found.prefill, found.ttft), (found.decode, found.tpot)):
        links_s = float((work.hops + work.stage_hops) * p.hop_s + (work.wire_bytes + work.stage_bytes)
                        / p.link_bytes_per_s / found.efficiencies.link)
        assert spent.links == pytest.approx(links_s)
        # Bytes and hops together.
        assert links_s <= 0.2 * limits[work is found.decode] * (1 + 1e-9)
        assert spent.total == pytest.approx(seconds(work, p.flops, p.memory_bytes_per_s, links_s=links_s))
    assert found.rows[1].total == 8 * found.rows[1].per_device


def exists(found) -> bool:
    """Whether FLOP/s and bytes/s with both passes at their limits exist: along those with the prompts at theirs, from
    ample FLOP/s to ample bytes/s, decodes go from too fast to too slow, or the other way."""
    use, wider = found.use_case, found.use_case.wider
    ample = 1e30

    def decode_gap(log_moved):
        moved = np.exp(log_moved)
        flops = np.exp(brentq(lambda x: np.log(seconds(found.prefill, np.exp(x), moved, wider=wider) / use.ttft_s),
                              np.log(1e6), np.log(ample), xtol=1e-13))
        return np.log(seconds(found.decode, flops, moved, wider=wider) / use.tpot_s)

    # Bytes/s with which reads alone take all of the prompts' limit.
    least = brentq(lambda x: np.log(seconds(found.prefill, ample, np.exp(x), wider=wider) / use.ttft_s),
                   np.log(1e6), np.log(ample))
    ends = [decode_gap(x) for x in (least + 1e-7, np.log(ample))]
    return ends[0] > 0 > ends[1]


def test_newton_finds_what_is_there():
    """Random use cases of one program: both limits are met wherever that can be, else the tighter one."""
    rng, kinds = np.random.default_rng(0), []
    for _ in range(25):
        found = requirements(MIXTRAL, input_tokens=10 ** rng.uniform(1, 5), output_tokens=10 ** rng.uniform(0, 4),
                             batch=int(10 ** rng.uniform(0, 2.5)), ttft_ms=10 ** rng.uniform(1.5, 4.5),
                             tpot_ms=10 ** rng.uniform(0.5, 2.3), prompts=1)
        use = found.use_case
        met = found.ttft.total / use.ttft_s, found.tpot.total / use.tpot_s
        assert max(met) == pytest.approx(1, rel=3e-6)
        assert found.platform.flops >= max(found.alone.flops) * (1 - 1e-5)
        assert found.platform.memory_bytes_per_s >= max(found.alone.memory_bytes_per_s) * (1 - 1e-5)
        assert found.is_met_by_both == exists(found)
        assert (min(met) == pytest.approx(1, rel=3e-6)) == found.is_met_by_both
        kinds.append(found.is_met_by_both)
    assert 5 < sum(kinds) < 23


def solved(use: UseCase, is_wide: bool):
    """FLOP/s, bytes/s and whether both limits are met, in 64 bits or 32."""
    with enable_x64(is_wide):
        prefill, decode = use.passes()
        closed = alone(prefill, decode, use.ttft_s, use.tpot_s)
        least = ideal.Platform(max(closed.flops), max(closed.flops), max(closed.memory_bytes_per_s), 1.0, 1.0, 0.0, 0.0,
                               *USUAL)
        assert least.flops.dtype == (jnp.float64 if is_wide else jnp.float32)
        return [float(x) for x in SOLVE(prefill, decode, use.ttft_s, use.tpot_s, least)]


SOLVE = jax.jit(balanced)


def test_32_bits_are_those_of_64():
    """Where both limits can be met, and where one only; 10^15 FLOP/s have no digits to spare in a logarithm."""
    kinds = []
    for given in (dict(), dict(batch=64), dict(prompts=1, batch=256), dict(tpot_s=10.0),
                  dict(input_tokens=30, output_tokens=2000, batch=64),
                  dict(ttft_s=5.0, input_tokens=100, output_tokens=20, batch=512, prompts=1)):
        (*wide, is_met), (*narrow, is_met_too) = (solved(case(**given), is_wide) for is_wide in (True, False))
        assert narrow == pytest.approx(wide, rel=1e-4) and is_met == is_met_too
        kinds.append(is_met)
    assert {0.0, 1.0} == set(kinds)


@pytest.mark.slow
def test_derivatives_in_32_bits():
    slopes = []
    for is_wide in (True, False):
        with enable_x64(is_wide):
            prefill, decode = case(batch=8).passes()
            closed = alone(prefill, decode, 0.2, 0.01)
            least = ideal.Platform(max(closed.flops), max(closed.flops), max(closed.memory_bytes_per_s), 1.0, 1.0, 0.0,
                                   0.0, *USUAL)
            slopes.append(np.asarray(jax.jit(jax.jacrev(lambda s, *rest: jnp.log(jnp.stack(balanced(
                *rest[:2], *s, rest[2])[:2]))))(jnp.array([0.2, 0.01]), prefill, decode, least), float))
    assert slopes[1] == pytest.approx(slopes[0], rel=1e-3, abs=1e-2)


@pytest.mark.slow
def test_derivatives_are_those_of_finite_differences():
    """By both limits, the length of the prompt and the batch, through the counts and the root."""
    with enable_x64(True):
        def logs(numbers):
            ttft_s, tpot_s, prompt, batch = jnp.exp(numbers)
            fmt = weight_format("auto", LLAMA)
            prefill = ideal.prefill_pass(LLAMA, Plan(), fmt, 2.0, prompt=prompt, batch=batch)
            decode = ideal.decode_pass(LLAMA, Plan(), fmt, 2.0, prompt=prompt, generated=500.0, batch=batch)
            closed = alone(prefill, decode, ttft_s, tpot_s)
            least = ideal.Platform(closed.flops[0], closed.flops[0], closed.memory_bytes_per_s[1], 1.0, 1.0, 0.0, 0.0,
                                   *USUAL)
            found = balanced(prefill, decode, ttft_s, tpot_s, least)
            return jnp.log(jnp.stack([found.flops, found.memory_bytes_per_s]))

        logs = jax.jit(logs)
        at = jnp.log(jnp.array([0.3, 0.012, 2000.0, 6.0]))
        slopes = np.asarray(jax.jit(jax.jacrev(logs))(at))
        step = 1e-5
        differences = np.stack([(logs(at.at[i].add(step)) - logs(at.at[i].add(-step))) / (2 * step)
                                for i in range(4)], axis=1)
    assert slopes == pytest.approx(differences, rel=1e-4, abs=1e-6)
    # Half of the time takes more than twice the FLOP/s, as some of a prompt's operators are bound by reads; all of a
    # decode's are.
    assert slopes[0, 0] < -1.1 and slopes[1, 1] == pytest.approx(-1)


def test_a_larger_batch_or_context_never_needs_less():
    few = requirements(LLAMA, **CHAT, batch=4)
    for more in (requirements(LLAMA, **CHAT, batch=8), requirements(LLAMA, **CHAT | {"input_tokens": 5000}, batch=4),
                 requirements(LLAMA, **CHAT | {"tpot_ms": 8}, batch=4), requirements(LLAMA, **CHAT, batch=4, beams=2)):
        pairs = [(getattr(f.platform, name) for f in (few, more)) for name in ("flops", "memory_bytes_per_s")]
        assert any(a < b for a, b in pairs) and few.memory.total_bytes <= more.memory.total_bytes


def test_narrow_weights():
    """fp8: half of the weights' bytes; attention stays 16-bit, so it takes twice the share of fp8 FLOP/s."""
    wide, narrow = (requirements(LLAMA, **CHAT, batch=8, dtype=dtype) for dtype in ("bf16", "fp8"))
    assert narrow.use_case.wider == 2.0 and narrow.platform.wide_flops == narrow.platform.flops / 2
    assert wide.alone.flops[0] < narrow.alone.flops[0] < 2 * wide.alone.flops[0]
    assert narrow.memory.weights < 0.6 * wide.memory.weights


def test_trillions_of_parameters():
    found = requirements("hypothetical/super-llm-10t-moe", input_tokens=2_000_000, output_tokens=2000, beams=4,
                         ttft_ms=60_000, tpot_ms=20, dtype="int8", kv_dtype="int8", plan=Plan(
                             tensor_parallel_size=12, pipeline_parallel_size=32))
    cached = 2 * 128 * 12 * 128 * (2_000_000 + 4 * 2000)
    assert found.memory.total_cache == pytest.approx(cached, rel=1e-12)
    # Embeddings, LM head and routers stay 16-bit.
    assert found.memory.total_weights == pytest.approx(9.4545e12, rel=2e-3)
    assert all(np.isfinite(x) for row in found.rows for x in row[2:4])
    assert "hypothetical/super-llm-10t-moe" in found.verdict and "384 devices" in found.verdict


@pytest.mark.slow
def test_a_scenario_that_keeps_its_limits_is_met_by_its_device():
    """As many requests and prompts as the scenario has at once, not as many as its engine would take."""
    scenario = Scenario.named("default")
    use = use_case_of(scenario)
    assert use.model == scenario.model.spec() and use.plan.tensor_parallel_size == scenario.engine.tensor_parallel_size
    assert use.tpot_s == scenario.slo.tpot_ms / 1e3 and use.memory_share == 0.9
    state = steady_state(*of_scenario(scenario))
    assert state.ttft_s < use.ttft_s and state.tpot_s < use.tpot_s
    assert use.batch == np.ceil(float(state.running) / 2) < scenario.engine.max_num_seqs
    # 8,192 tokens an iteration.
    assert use.prompts == min(np.ceil(8192 / use.input_tokens), use.batch) and use.prompts > 1
    assert [note.split(":")[0] for note in use.notes] == [
        "one of 2 replicas", f"batch {use.batch}", f"prompts of a pass {use.prompts}"]
    met = platforms(use, needs(use), [scenario.device.name])
    assert met.table["devices"].tolist() == [1]


def test_scenarios():
    scenario = Scenario.named("default")
    lengths = dict(input_tokens=700.0, output_tokens=2.0)
    use = use_case_of(scenario, batch=3, **lengths)
    assert (use.input_tokens, use.batch, use.prompts) == (700.0, 3, 3)
    # The load is another one.
    use = use_case_of(scenario.with_values({"engine.max_num_batched_tokens": 1500}), **lengths)
    assert (use.batch, use.prompts) == (scenario.engine.max_num_seqs, 3) and "load is changed" in use.notes[1]
    # What others are drawn from has no rate.
    closed = {"kind": "closed-loop", "concurrency": 4, "num_requests": 40, "input": 100, "output": 20}
    for values, why in (({"workload": closed}, "no rate"), ({"engine.gpu_memory_utilization": 0.1}, "no closed form")):
        use = use_case_of(scenario.with_values(values))
        assert use.batch == scenario.engine.max_num_seqs and why in use.notes[1]
    assert use.memory_share == 0.1
    moe = Scenario.named("moe-tensor-parallel").with_values(
        {"cost.distinct_experts": "all", "slo": {"ttft_ms": 1000, "tpot_ms": 50}})
    assert use_case_of(moe, batch=4).distinct_experts == "all"


def test_contexts_beyond_the_model_are_told():
    assert case().remarks == ()
    (remark,) = case(input_tokens=LLAMA.max_position).remarks
    assert "132,072 tokens are more than the 131,072 positions" in remark


@pytest.mark.parametrize("given, field", [
    (dict(batch=0), "batch"), (dict(batch=2.5), "batch"), (dict(beams=True), "beams"), (dict(ttft_ms=0), "ttft_ms"),
    (dict(tpot_ms=float("nan")), "tpot_ms"), (dict(tpot_ms="fast"), "tpot_ms"),
    (dict(input_tokens=0.5), "input_tokens"), (dict(output_tokens=float("inf")), "output_tokens"),
    (dict(prompts=2), "prompts"),
    (dict(distinct_experts="some"), "distinct_experts"), (dict(dtype="fp7"), "model.dtype"),
    (dict(kv_dtype="fp7"), "model.kv_dtype"), (dict(link_share=1), "link_share"), (dict(link_share=0), "link_share"),
    (dict(efficiencies=Efficiencies(compute=1.5)), "compute_efficiency"),
    (dict(efficiencies=Efficiencies(link=0)), "link_efficiency"),
    (dict(plan=Plan(tensor_parallel_size=3)), "engine.tensor_parallel_size"),
    (dict(plan=Plan(data_parallel_size=2)), "batch"),
])
def test_what_makes_no_sense_is_refused(given, field):
    with pytest.raises(InputError) as caught:
        requirements(LLAMA, **CHAT | given)
    assert caught.value.field == field


def test_scenarios_that_lack_something_are_refused():
    scenario = Scenario.named("default")
    with pytest.raises(InputError, match="slo.tpot_ms"):
        use_case_of(scenario.with_values({"slo.tpot_ms": None}))
    with pytest.raises(InputError, match="several platforms"):
        use_case_of(Scenario.named("prefill-decode"))
    with pytest.raises(InputError, match="model"):
        use_case_of(Scenario.named("fitted-latency"))
    for field, value in (("hybrid", {}), ("prefill_context_parallel_size", 2)):
        with pytest.raises(InputError, match=f"engine.{field}"):
            use_case_of(msgspec.structs.replace(scenario, engine=msgspec.structs.replace(
                scenario.engine, **{field: value})))
