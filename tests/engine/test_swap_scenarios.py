"""Swapping to host memory from scenario files: what is refused, what a run says, turns of sessions."""

import numpy as np
import pytest

from jaxsim._core.errors import InputError
from jaxsim.engine import lower
from jaxsim.engine.environment import Environment
from jaxsim.engine.simulate import prepare, simulate
from jaxsim.metrics import request_frame
from jaxsim.policy.swap import BOUND_BY_DISPATCH
from jaxsim.spec.scenario import Scenario, json_schema
from jaxsim.workload import Workload

pytestmark = pytest.mark.unoptimised

FORM = {"a": 0.02, "b": 1e-4, "c": 1e-7, "d": 1e-5}


def scenario(swap: dict | None = None, engine: dict | None = None, **sections) -> Scenario:
    """A small engine that is short of blocks: 16 tokens of llama-3-8b in each, 2 MiB."""
    base = {
        "schema_version": 1, "num_seeds": 2, "model": {"name": "llama-3-8b"}, "device": {"name": "a100"},
        "engine": {"preset": "vllm-v0", "max_num_seqs": 8, "max_model_len": 512, "num_gpu_blocks_override": 40,
                   "swap": {"space_gb": 1.0, "dispatch_us": 10.0, "window": 24, **(swap or {})}, **(engine or {})},
        "workload": {"kind": "poisson", "rate_rps": 2.0, "num_requests": 24, "input": 60,
                     "output": {"kind": "uniform", "min_tokens": 20, "max_tokens": 120}},
        "cost": {"kind": "fitted", "prefill": FORM, "decode": FORM}}
    return Scenario.from_dict(base | sections)


@pytest.mark.parametrize("field, given", [
    ("engine.swap", dict(engine={"preset": "vllm-v1"})),
    ("engine.swap", dict(engine={"preset": "sarathi"})),
    ("engine.swap", dict(engine={"preset": "sglang"})),
    ("engine.swap", dict(engine={"enable_chunked_prefill": True})),
    ("engine.swap.space_gb", dict(swap={"space_gb": 0.0})),
    ("engine.swap.space_gb", dict(swap={"space_gb": 0.001})),
    ("engine.swap.pcie_gb_per_s", dict(device=None)),
    ("model", dict(model=None)),
    ("engine.swap.redraw.locality", dict(swap={"redraw": {"period_iterations": 25, "pattern": "markov"}})),
    ("engine.swap.redraw.locality", dict(swap={"redraw": {"period_iterations": 25, "locality": 0.5}})),
    ("engine.swap.redraw.period_iterations", dict(swap={"redraw": {"period_iterations": 0}})),
    ("engine.swap.run_blocks", dict(swap={"run_blocks": 0})),
    ("engine.swap.run_blocks", dict(swap={"run_blocks": 2, "group_blocks": 60})),
    ("engine.swap.group_blocks", dict(swap={"group_blocks": 4096})),
    ("engine.swap.group_blocks", dict(swap={"group_blocks": 60}, engine={"num_gpu_blocks_override": 1 << 23})),
    ("engine.pipeline_parallel_size", dict(engine={"pipeline_parallel_size": 2})),
    ("cluster.pools", dict(cluster={"pools": [{"role": "mixed"}]})),
    ("engine.swap", dict(model={"name": "deepseek-v3"})),
])
def test_refused(field, given):
    """Each by the field to change, before anything is compiled."""
    given = {name: value for name, value in given.items() if value is not None or name in ("model", "device")}
    with pytest.raises(InputError) as caught:
        found = scenario(**given)
        lower.resolve_system(found)
    assert caught.value.field == field


def test_a_request_that_could_never_come_back_is_refused():
    """It needs 12 blocks for 180 tokens, and one more to be free."""
    most = dict(workload={"kind": "batch", "num_requests": 2, "input": 61, "output": 120})
    assert simulate(scenario(engine={"num_gpu_blocks_override": 13}, **most)).faults == ()
    with pytest.raises(InputError, match="needs 13 KV blocks"):
        simulate(scenario(engine={"num_gpu_blocks_override": 12}, **most))


def test_environments_refuse_it():
    with pytest.raises(InputError) as caught:
        Environment(scenario(), tick_s=1.0)
    assert caught.value.field == "engine.swap"


def test_numbers_of_a_scenario():
    """16 tokens of 8 heads of 128 dimensions in 16 bits, K and V of 32 layers: 2 MiB, of which 1 GB holds 476."""
    made = scenario({"run_blocks": 4, "pcie_gb_per_s": 16.0})
    system = lower.resolve_system(made)
    swap = lower.make_swap(made, system)
    assert int(swap.host_blocks) == 476 and float(swap.block_copy_bytes) == 32768.0
    assert float(swap.bytes_per_s) == 16e9 and not swap.draws
    assert swap.bound_by(4) == BOUND_BY_DISPATCH
    halved = scenario(engine={"tensor_parallel_size": 2})
    assert float(lower.make_swap(halved, lower.resolve_system(halved)).block_copy_bytes) == 16384.0


def test_what_a_run_says():
    """Swaps, not recomputation, where there is room; less lost to long copies, and no delay by those beside."""
    drawn = {"redraw": {"period_iterations": 5}}
    variants = [{}, {"run_blocks": 8}, {"run_blocks": 8, "asynchronous": True}, {"space_gb": 0.03}]
    result = simulate([scenario(drawn | variant) for variant in variants])
    assert result.faults == ()
    blocked, grouped, beside, short = (m["swaps"] for m in result.metrics)
    preempted = [m["preemptions"]["total"] for m in result.metrics]
    assert blocked["total"] == preempted[0] > 10 and short["total"] < preempted[3]
    assert blocked["delay_share"] > 3 * grouped["delay_share"] > 0 == beside["delay_share"]
    assert 0 < grouped["e2e_share"] < blocked["e2e_share"] / 3 and 0 < beside["e2e_share"] < 1
    for lane in result.lanes[0]:
        frame = request_frame(lane)
        assert np.allclose(frame[["queue_s", "prefill_s", "decode_s", "stall_s", "front_end_s"]].sum(axis=1),
                           frame["e2e_s"])
        assert np.all(frame["swap_s"] <= frame["e2e_s"]) and frame["swaps"].sum() == lane.swaps.sum()
        assert lane.itl_counts.sum() == (lane.output_tokens - 1).sum()


@pytest.mark.slow
def test_a_small_window_is_a_fault():
    (result,) = simulate(scenario({"redraw": {"period_iterations": 5}, "window": 8},
                                  workload={"kind": "batch", "num_requests": 24, "input": 60, "output": 60})).lanes
    assert all("engine.swap.window" in lane.fault for lane in result)


@pytest.mark.slow
def test_turns_of_sessions():
    """All turns end, each after the one before it."""
    sessions = {"kind": "poisson", "rate_rps": 2.0, "num_requests": 24, "input": 40,
                "output": {"kind": "uniform", "min_tokens": 20, "max_tokens": 60},
                "sessions": {"turns": 4, "think_s": 0.5, "context_limit": 500}}
    result = simulate(scenario({"redraw": {"period_iterations": 5}, "reuse": True, "asynchronous": True},
                               workload=sessions))
    assert result.faults == () and result.metrics[0]["swaps"]["total"] > 3
    for lane in result.lanes[0]:
        for session in np.unique(lane.session):
            mine = lane.session == session
            order = np.argsort(lane.turn[mine])
            starts, ends = lane.arrival_s[mine][order], lane.finish_s[mine][order]
            assert np.allclose(starts[1:], ends[:-1] + 0.5 + lane.front_end_s, atol=1e-5)


@pytest.mark.slow
def test_a_turn_finds_the_one_before_it():
    """One session with room for everything: all but the first turn find all that was computed before, and the last
    answer is copied out block by block once. Without reuse nothing is found, and the prompts take longer."""
    one = {"kind": "poisson", "rate_rps": 0.1, "num_requests": 4, "input": 40, "output": 21,
           "sessions": {"turns": 4, "think_s": 5.0, "context_limit": 500}}
    result = simulate([scenario({"reuse": True, "group_blocks": 60}, workload=one),
                       scenario({"group_blocks": 60}, workload=one)])
    assert result.faults == ()
    for kept, plain in zip(*result.lanes, strict=True):
        order = np.argsort(kept.turn[kept.session == 0])
        mine = np.flatnonzero(kept.session == 0)[order]
        before = kept.input_tokens[mine][:-1] + kept.output_tokens[mine][:-1] - 1
        assert kept.cached_tokens[mine].tolist() == [0, *before] and plain.cached_tokens is None
        assert np.all(kept.first_token_s[mine][1:] - kept.arrival_s[mine][1:]
                      < plain.first_token_s[mine][1:] - plain.arrival_s[mine][1:])
        last = kept.input_tokens + kept.output_tokens - 1
        # Each turn's blocks but the full ones that were there.
        found = kept.cached_tokens // 16
        assert kept.swapped_blocks.tolist() == [int((-(-last // 16) - found).sum()), int(found.sum())]
        assert plain.swapped_blocks.tolist() == [0, 0]


@pytest.mark.parametrize("is_drawn, is_given, reuse", [(True, True, True), (True, False, True), (False, True, True),
                                                       (False, True, False), (True, None, True), (True, None, False)])
def test_turns_are_kept_where_there_are_any(is_drawn, is_given, reuse):
    """By the requests that are run, drawn or given, and only with reuse."""
    sessions = {"kind": "poisson", "rate_rps": 0.1, "num_requests": 4, "input": 40, "output": 21,
                "sessions": {"turns": 4, "think_s": 5.0, "context_limit": 500}}
    given = None if is_given is None else Workload(
        [0.0, 1.0], [10, 30], [4, 4], **(dict(session=[0, 0], turn=[0, 1], think_s=[0.0, 1.0]) if is_given else {}))
    made = scenario({"reuse": reuse}, **({"workload": sessions} if is_drawn else {})).checked()
    lane = prepare(0, made, False, given)[0]
    requests = lower.make_requests(lane.workload, lane.dims)
    has_turns = (is_drawn if is_given is None else is_given) and reuse
    assert lane.dims.keeps_turns == has_turns and (requests.before is not None) == has_turns


def test_the_schema_knows_the_fields():
    definitions = json_schema()["$defs"]
    for name in ("SwapSection", "RedrawSection"):
        assert all("description" in field for field in definitions[name]["properties"].values())
