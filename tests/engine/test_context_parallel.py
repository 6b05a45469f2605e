"""Contexts cut over ranks, in the engine: against the reference, which reads the same tables in float64 and has a ring
and blocks of its own. And what is refused, with the arithmetic."""

import equinox as eqx
import numpy as np
import pytest

from jaxsim._core.errors import InputError
from jaxsim.engine import lower
from jaxsim.spec.dims import Dims
from jaxsim.spec.scenario import Scenario
from tests.engine import cases as c
from tests.engine import real

DIMS = Dims(num_requests=40, num_executors=2, num_slots=16, block_size=32)
NEAR_S, AGREES_S = 1e-5, 1e-4

BASE = {"schema_version": 1, "model": {"name": "llama-3.1-8b"}, "device": {"name": "h100"},
        "workload": {"kind": "poisson", "rate_rps": 1.0, "input": 512, "output": 128}}


def scenario(model: str = "llama-3.1-8b", **engine) -> Scenario:
    return Scenario.from_dict({**BASE, "model": {"name": model}, "engine": {"max_model_len": 4096, **engine}})


@pytest.fixture(scope="module")
def pairs():
    """Cases with what the engine and the reference say, and how often a ring waited for its link."""
    made = real.tables(tensor_parallel_size=16, decode_context_parallel_size=2, prefill_context_parallel_size=2)
    rng, batch, waits = np.random.default_rng(11), [], []
    for _ in range(c.LANES):
        case = real.draw_real(rng, made)
        # Rings of 1 to 8 ranks over links that are never, sometimes and always slower than attention.
        ring = eqx.tree_at(lambda r: (r.ranks, r.key_s), case.cost.ring, (
            np.int32(2 ** rng.integers(4)), np.float32(10.0 ** rng.uniform(-10, -7))))
        batch.append(c.replace(case, cost=eqx.tree_at(lambda t: t.ring, case.cost, ring)))
    ours = c.simulate(batch, real.FLAGS, DIMS, real.ROUTER)
    theirs = []
    for case in batch:
        seconds = real.exact_cost(case.cost)
        free = real.exact_cost(eqx.tree_at(lambda t: t.ring.key_s, case.cost, np.float32(0)))
        count = [0, 0]

        def counted(stats, seconds=seconds, free=free, count=count):
            found = seconds(stats)
            count[0] += stats.num_prefill > 0
            count[1] += found > free(stats) + 1e-7
            return found

        theirs.append(c.reference(case, real.FLAGS, DIMS, real.ROUTER, counted))
        waits.append(count)
    return list(zip(batch, ours, theirs, waits, strict=True))


@pytest.mark.slow
def test_the_engine_and_the_reference_agree(pairs):
    """Up to the first near tie to a tenth of a millisecond, over many cases, preemptions included."""
    compared = total = 0
    for case, lane, result, _ in pairs:
        assert lane["fault"] == 0 and lane["finished"] == len(case)
        for name in ("scheduled_s", "first_token_s", "finish_s"):
            want = np.array([getattr(r, name) for r in result.requests])
            is_reliable = want < result.unreliable_from_s(NEAR_S)
            assert np.all(np.abs(lane[name] - want)[is_reliable] < AGREES_S), name
            compared, total = compared + is_reliable.sum(), total + len(want)
    prompts, waited = np.sum([waits for *_, waits in pairs], axis=0)
    preempted = sum(int(lane["preemptions"].sum()) for _, lane, _, _ in pairs)
    print(f"{compared} of {total} stamps, {waited} of {prompts} iterations with prompts wait, {preempted} preempted")
    assert compared > 0.5 * total and 0.1 < waited / prompts < 0.9 and preempted > 0


@pytest.mark.slow
def test_a_plan_without_rings_has_none():
    """Nothing of them in its tables; and blocks of all ranks that share a cache, as many times as large."""
    plain = lower.resolve_system(scenario(tensor_parallel_size=16))
    cut = lower.resolve_system(scenario(tensor_parallel_size=16, decode_context_parallel_size=2))
    assert real.tables().ring is None and plain.scheduler.block_size == 16 and cut.scheduler.block_size == 32
    assert cut.num_blocks == plain.num_blocks


@pytest.mark.parametrize("model, engine, texts", [
    ("llama-3.1-8b", dict(tensor_parallel_size=8, decode_context_parallel_size=2),
     ["engine.decode_context_parallel_size", "8 KV heads 1 times", "use 1"]),
    ("deepseek-v3", dict(tensor_parallel_size=8, decode_context_parallel_size=3), ["1 KV head 8 times", "1 or 2 or 4"]),
    ("llama-3.1-8b", dict(prefill_context_parallel_size=4, max_num_batched_tokens=2050),
     ["engine.max_num_batched_tokens", "no multiple of 8", "2 tokens would be left over", "use 2048"]),
    ("deepseek-v3", dict(tensor_parallel_size=8, data_parallel_size=2, prefill_context_parallel_size=2),
     ["engine.prefill_context_parallel_size", "iterate together"]),
    ("gpt-oss-20b", dict(prefill_context_parallel_size=2), ["sliding windows"]),
    ("llama-3.1-8b", dict(enable_sequence_parallelism=True), ["nobody to share"]),
    ("deepseek-v3", dict(tensor_parallel_size=8, data_parallel_size=6, enable_expert_parallel=True),
     ["48 ranks do not divide the 256 experts", "16 would be left over", "32"]),
    ("deepseek-v3", dict(data_parallel_size=32, enable_expert_parallel=True, enable_eplb=True, num_redundant_experts=8),
     ["256 experts + 8 redundant = 264", "8 would be left over", "0 or 32"]),
    ("deepseek-v3", dict(data_parallel_size=512, enable_expert_parallel=True), ["512 ranks cannot share the 256"]),
    ("deepseek-v3", dict(data_parallel_size=32, enable_expert_parallel=True, num_redundant_experts=32),
     ["without a load balancer"]),
    ("llama-3.1-8b", dict(enable_eplb=True), ["nothing to balance"]),
    ("deepseek-v3", dict(tensor_parallel_size=128, decode_context_parallel_size=128), ["2048 tokens", "up to 1024"]),
    ("deepseek-v3", dict(tensor_parallel_size=8, decode_context_parallel_size=8, enable_prefix_caching=True,
                         offload=dict(space_gb=1.0)), ["engine.decode_context_parallel_size", "engine.offload"])])
def test_refusals(model, engine, texts):
    with pytest.raises(InputError) as refusal:
        lower.resolve_system(scenario(model, **engine))
    for text in texts:
        assert text in str(refusal.value), str(refusal.value)
