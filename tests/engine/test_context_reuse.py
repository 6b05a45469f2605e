"""Contexts of siblings from scenario files: the closed form, what is refused, layers by quality, what a run says."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxsim._core.errors import InputError
from jaxsim.analytic.context_reuse import context_reuse
from jaxsim.engine import lower, simulate
from jaxsim.spec.scenario import Scenario, json_schema

pytestmark = pytest.mark.unoptimised

CONTEXT, QUESTION = 4096, 64


def scenario(reuse: dict | None, *, engine: dict | None = None, **workload) -> Scenario:
    """One replica that answers questions about contexts."""
    given = {} if reuse is None else {"context_reuse": {"gb_per_s": 25.0, **reuse}}
    return Scenario.from_dict({
        "schema_version": 1, "num_seeds": 1, "model": {"name": "llama-3.1-8b"}, "device": {"name": "a100_sxm_80"},
        "engine": {"preset": "vllm-v1@0.9", "max_num_seqs": 8, "max_num_batched_tokens": 8192, "max_model_len": 8192,
                   "enable_prefix_caching": True, **given, **(engine or {})},
        "workload": {"kind": "batch", "num_requests": 1, "input": QUESTION, "output": 1,
                     "prefix_groups": {"number": 1, "tokens": CONTEXT}} | workload})


@pytest.mark.slow
def test_an_idle_engine_is_the_closed_form():
    """To the clock's grid and the rounding of float32, whatever is recomputed, loaded first or beside it."""
    layers, latency_us = (0, 4, 10, 24, 32), 50.0
    points = [(k, is_pipelined, rate) for k in layers for is_pipelined in (True, False) for rate in (5.0, 100.0)]
    made = [scenario({"recomputed_layers": k, "pipelined": is_pipelined, "gb_per_s": rate, "latency_us": latency_us})
            for k, is_pipelined, rate in points]
    result = simulate.simulate(made)
    system = lower.resolve_system(made[0])
    cost = lower.make_cost(made[0], system, 8, CONTEXT + QUESTION + 1)
    full, seen = simulate.simulate(scenario(None)).lanes[0][0].first_token_s[0], set()
    for (k, is_pipelined, rate), (lane,) in zip(points, result.lanes, strict=True):
        alone = context_reuse(system.model, cost, context_tokens=CONTEXT, suffix_tokens=QUESTION,
                              max_num_batched_tokens=8192, bytes_per_s=1e9 * rate, latency_s=1e-6 * latency_us)
        want = (alone.pipelined_s if is_pipelined else alone.serial_s)(jnp.float32(k))
        assert lane.first_token_s[0] == pytest.approx(float(want), rel=3e-7, abs=2.0**-29)
        assert lane.loaded_tokens[0] == CONTEXT and lane.cached_tokens[0] == 0
        seen.add(bool(lane.first_token_s[0] < full))
    assert seen == {True, False}


@pytest.mark.parametrize("field, reuse, changes", [
    ("engine.enable_prefix_caching", {}, dict(engine={"enable_prefix_caching": False})),
    ("engine.offload", {}, dict(engine={"offload": {"space_gb": 1.0}})),
    ("engine.pipeline_parallel_size", {}, dict(engine={"pipeline_parallel_size": 2})),
    ("workload.prefix_groups", {}, dict(prefix_groups=None)),
    ("workload.prefix_groups.tokens", {}, dict(engine={"max_num_batched_tokens": 1024})),
    ("engine.context_reuse.recomputed_layers", {"recomputed_layers": None}, {}),
    ("engine.context_reuse.recomputed_layers", {"recomputed_layers": 33}, {}),
    ("engine.context_reuse.recomputed_layers", {"quality": [{"recomputed_layers": 4, "loss": 0.1}], "max_loss": 1}, {}),
    ("engine.context_reuse.max_loss", {"max_loss": 1.0}, {}),
    ("engine.context_reuse.max_loss", {"recomputed_layers": None, "max_loss": 0.01,
                                       "quality": [{"recomputed_layers": 4, "loss": 0.1}]}, {}),
    ("engine.context_reuse.gb_per_s", {"gb_per_s": 0.0}, {}),
])
def test_refused(field, reuse, changes):
    """Each by the field to change, before anything is compiled."""
    given = {name: value for name, value in ({"recomputed_layers": 8} | reuse).items() if value is not None}
    with pytest.raises(InputError) as caught:
        lower.resolve_system(scenario(given, **changes))
    assert caught.value.field == field


def test_the_budget_is_that_of_the_device():
    """vLLM takes 8192 tokens an iteration on an H100 unless told, 2048 on an A100."""
    made = scenario({"recomputed_layers": 8}, engine={"max_num_batched_tokens": None})
    with pytest.raises(InputError, match="more than the 2048 tokens of an iteration"):
        lower.resolve_system(made)
    assert lower.resolve_system(made.with_values({"device.name": "h100"})).scheduler.max_num_batched_tokens == 8192


def test_quality_chooses_the_layers():
    """The fewest whose loss is small enough, in whatever order they stand."""
    table = [{"recomputed_layers": k, "loss": loss} for k, loss in ((16, 0.001), (4, 0.05), (8, 0.01), (32, 0.0))]
    for most, layers in ((0.1, 4), (0.01, 8), (0.005, 16), (0.0, 32)):
        made = scenario({"quality": table, "max_loss": most})
        reuse = lower.make_reuse(made, lower.resolve_system(made))
        assert float(reuse.recomputed_share) == layers / 32
        # 16 tokens of 128 KiB of KV and 8 KiB of hidden states each.
        assert float(reuse.kv_s) == pytest.approx((1 - layers / 32) * 16 * 2**17 / 25e9)
        assert float(reuse.hidden_s) == pytest.approx(16 * 2**13 / 25e9)


@pytest.mark.slow
def test_agents_that_share_contexts():
    """Under load, with little room for contexts of one's own: earlier first tokens, and own contexts found as ever."""
    load = dict(kind="poisson", rate_rps=6.0, num_requests=120, output=8, prefix_groups={"number": 12, "tokens": 4096})
    engine = {"num_gpu_blocks_override": 1200}
    result = simulate.simulate([scenario(None, engine=engine, **load)]
                               + [scenario({"recomputed_layers": k}, engine=engine, **load) for k in (4, 16)])
    assert result.faults == () and "loads" not in result.metrics[0]
    ttft = [m["p50_ttft_ms"] for m in result.metrics]
    assert ttft[1] < ttft[2] < ttft[0]
    for lane in (lanes[0] for lanes in result.lanes[1:]):
        np.testing.assert_array_equal(lane.cached_tokens + lane.loaded_tokens, CONTEXT)
        assert (lane.cached_tokens == CONTEXT).any() and (lane.loaded_tokens == CONTEXT).any()
        assert lane.load_delay_s.sum() > 0 and lane.load_s.sum() > 0


def test_the_schema_knows_the_fields():
    definitions = json_schema()["$defs"]
    for name in ("ContextReuseSection", "QualityRow"):
        assert all("description" in field for field in definitions[name]["properties"].values())
