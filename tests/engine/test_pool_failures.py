"""Instances that go down where prompts and outputs are computed on different ones: the engine equals the reference bit
for bit, ties included.

As in `test_failures`; outages begin and end as transfers do, too.
"""

from collections import Counter
from dataclasses import replace

import jax
import numpy as np
import pytest

from jaxsim import Scenario, simulate
from jaxsim._core.errors import InputError
from jaxsim.engine import loop, lower
from jaxsim.policy import routing
from jaxsim.study import runner
from tests.engine import cases as c
from tests.engine import client_cases as cc
from tests.engine import failure_cases as fc
from tests.engine import link_cases as links
from tests.engine import pool_failure_cases as pc
from tests.engine import test_pools
from tests.engine.test_compiled import computations, inner_body, large_shapes, problems, reached
from tests.reference import simulator

pytestmark = pytest.mark.unoptimised

OFTEN = ("finished", "rejected", "failed", "taken by another", "sent again", "preemptions", "lost as it ran by prefill",
         "lost as it ran by decode", "lost moving by prefill", "lost moving by decode", "lost in transfer",
         "lost unaccepted", "lost with tokens", "handed over after a restart", "nobody for prompts",
         "waited for any to decode", "accepted late")
SELDOM = ("lost ready by decode", "lost as it waited by prefill", "lost as it waited by decode",
          "lost on the way with more than one token", "done by who computes prompts", "lost as it ran by mixed")


def agree(seed: int, flags: simulator.Flags, dims) -> Counter:
    """All cases of a seed agree; else fails with the smallest case that does not."""
    batch = pc.draw_many(seed, flags, dims)

    def wrong(some, results):
        world = pc.simulate(some, flags, dims)
        return [pc.differences(pc.unpack(dims, world, lane, len(one)), pc.answer(result, one))
                for lane, (one, result) in enumerate(zip(some, results, strict=True))]

    return c.agree_and_count(seed, batch, lambda one: pc.reference(one, flags, dims), wrong, pc.exercised)


@pytest.mark.slow
@pytest.mark.parametrize("name, num_links", [("vllm-v1", 0), ("vllm-v1-async", links.NUM_LINKS), ("sarathi", 0)])
def test_engine_equals_reference(name, num_links):
    """256 cases, or 1,024."""
    flags, dims = simulator.preset(name), pc.dims_of(name, num_links=num_links)
    seen = sum((agree(seed, flags, dims) for seed in c.seeds(4, of=16)), Counter())
    print(seen)
    assert all(seen[what] > 10 for what in OFTEN) and all(seen[what] > 1 for what in SELDOM), seen


# --- by hand ------------------------------------------------------------------------------------------------


def by_hand(*many) -> list[dict]:
    """By outages: a request of eight prompt and four output tokens, all iterations of a second, on the first engines
    that are up, two of each role; its KV takes eight seconds to the decode engine."""
    case = c.Case(np.array([0.0]), np.array([8]), np.array([4]), np.array([4]), np.zeros(1, int),
                  np.zeros((1, 2), np.float32),
                  dict(max_num_seqs=4, max_num_batched_tokens=64, watermark_blocks=0, num_blocks=40,
                       max_model_len=128), ((1.0, 0, 0, 0, 0),) * 3, router=2)
    flags, dims = simulator.preset("vllm-v1"), pc.dims_of("vllm-v1")
    rules = simulator.Disaggregation(roles=("prefill", "prefill", "decode", "decode"),
                                     decode_router="least_outstanding", bytes_per_token=1.0, bandwidth=1.0)
    never = np.full(1, np.inf)
    batch = [pc.PoolCase(fc.FailureCase(cc.ClientCase(case, never, never, ()), tuple(outages), np.inf), rules)
             for outages in many]
    params, requests = pc.inputs(batch, flags, dims)
    # A small program.
    router = routing.LeastOutstanding()
    params = replace(params, routing=router, hand_over=replace(params.hand_over, routing=router))
    world = jax.device_get(loop.run(dims, params, requests))
    names = ("first_token_s", "finish_s", "instance", "restarts", *pc.HANDED_OVER)
    found = [pc.unpack(dims, world, lane, 1) for lane in range(len(batch))]
    return [{name: got[name].tolist()[0] for name in names} for got in found]


def test_what_becomes_of_a_hand_over():
    """Computed at 1 s, there at 9 s, done at 12 s. Whichever end goes down at 5 s: prompt and token are computed anew
    until 6 s, which gives the second token, and KV of nine tokens goes over."""
    calm = dict(first_token_s=1.0, finish_s=12.0, instance=0, restarts=0, decode_instance=2, left_s=1.0, accepted_s=1.0,
                delivered_s=9.0)
    moved = calm | dict(restarts=1, left_s=6.0, accepted_s=6.0)
    found = by_hand([], [(0, 5.0, 100.0)], [(2, 5.0, 100.0)], [(2, 10.5, 100.0)], [(2, 11.5, 100.0)],
                    [(2, 0.5, 20.0), (3, 0.5, 30.0)], [(0, 0.5, 100.0), (2, 0.25, 20.0), (3, 0.25, 30.0)])
    assert found[0] == calm
    # The way into the decode engine is taken up to 9 s, for what was cut off.
    assert found[1] == moved | dict(instance=1, delivered_s=18.0, finish_s=20.0)
    # And so is the way out of the prefill engine.
    assert found[2] == moved | dict(decode_instance=3, delivered_s=18.0, finish_s=20.0)
    # Lost as it runs, with two tokens and a lost iteration: ten tokens go over, the fourth is decoded.
    assert found[3] == calm | dict(restarts=1, decode_instance=3, left_s=11.5, accepted_s=11.5, delivered_s=21.5,
                            finish_s=22.5)
    # The last token is the prefill engine's own.
    last = found[4]
    assert np.isnan([last.pop(name) for name in ("left_s", "accepted_s", "delivered_s")]).all()
    assert last == dict(first_token_s=1.0, finish_s=12.5, instance=0, restarts=1, decode_instance=-1)
    # Nobody to decode until 20 s, when the first is back.
    assert found[5] == calm | dict(accepted_s=20.0, delivered_s=28.0, finish_s=31.0)
    # Lost before its prompt was computed: it leaves with its first token all the same, and waits to be fetched.
    assert found[6] == found[5] | dict(first_token_s=1.5, left_s=1.5, instance=1, restarts=1)


@pytest.mark.slow
def test_the_loop_body_copies_nothing_large():
    """As of all programs (`test_compiled`)."""
    if jax.default_backend() != "cpu":
        pytest.skip("reads the text of a CPU program")
    flags, dims = simulator.preset("vllm-v1"), pc.dims_of("vllm-v1")
    large, small = large_shapes(dims, c.LANES)
    assert not large & small
    text = loop.run.lower(dims, *pc.inputs(pc.draw_many(0, flags, dims), flags, dims)).compile().as_text()
    found = computations(text)
    assert {"scatter", "gather"} <= {i.op for _, _, i in reached(found, inner_body(found))}
    assert problems(text, large) == []


# --- from a scenario ----------------------------------------------------------------------------------------

FAILING = {"mtbf_s": 3.0, "mttr_s": 1.0, "until_s": 6.0}
POOLS = [{"role": "prefill", "replicas": 2}, {"role": "decode", "replicas": 2}]


def scenario(failures=FAILING, pools=POOLS, **changes) -> Scenario:
    """Two engines of each role that fail every three seconds, and links on which KV takes a while."""
    return test_pools.scenario(pools, {"gb_per_s": 1.0}, **{"cluster.failures": failures, "num_seeds": 2} | changes)


@pytest.mark.slow
def test_a_scenario_says_what_was_lost_and_a_study_the_same():
    result = simulate(scenario())
    frame, (runs,) = result.requests, result.runs
    phases = ["front_end_s", "queue_s", "prefill_s", "transfer_s", "decode_s", "stall_s"]
    done = frame[frame["status"] == "finished"]
    assert np.allclose(done[phases].sum(axis=1), done["e2e_s"]) and done[phases].min().min() > -1e-9
    assert done["restarts"].sum() > 2 and set(frame["status"]) <= {"finished", "failed", "rejected"}
    assert frame["instance"].isin([-1, 0, 1]).all() and frame["decode_instance"].isin([-1, 2, 3]).all()
    assert (done.loc[(done["restarts"] == 0) & (done["output_tokens"] > 1), "decode_instance"] >= 2).all()
    rows, refused = runner.table([scenario()])
    assert not refused and len(rows) == len(runs)
    for row, lane in zip(rows.to_dict("records"), result.lanes[0], strict=True):
        waits = lane.delivered_s - lane.left_s
        is_over = ~np.isnan(lane.left_s)
        assert np.array_equal(is_over, ~np.isnan(lane.delivered_s))
        assert (lane.left_s[is_over] <= lane.accepted_s[is_over]).all()
        is_calm = is_over & (lane.losses == 0)
        assert is_calm.any() and np.array_equal(lane.left_s[is_calm], lane.first_token_s[is_calm])
        assert row["transfers.requests"] == (~np.isnan(waits)).sum()
        assert row["transfers.mean_ms"] == pytest.approx(1e3 * np.nanmean(waits), rel=1e-9)
        assert row["outages.rerouted"] == lane.restarts.sum() and row["outages.lost"] == lane.losses.sum() > 0


@pytest.mark.parametrize("changes, field", [
    ({"cluster.transfer.discipline": "fair"}, "cluster.transfer.discipline"),
    ({"workload.client": {"deadline_s": 5.0}}, "cluster.pools"),
    ({"cluster.admission": {"max_waiting": 4}}, "cluster.pools"),
    ({"engine.preset": "vllm-v0"}, "engine.preset"),
    ({"cluster.failures": {"outages": [{"instance": 4, "at_s": 1, "down_s": 1}]}},
     "cluster.failures.outages[0].instance"),
    # What the engines of the pools are counts, too.
    ({"cluster.pools": [pool | {"engine": {"preset": "vllm-v0"}} for pool in POOLS]}, "cluster.pools[0].engine.preset"),
    ({"cluster.pools": [pool | {"engine": {"preset": "distserve-sim", "num_gpu_blocks_override": None}}
                        for pool in POOLS]}, "cluster.pools[0].engine.preset"),
    ({"cluster.pools": [pool | {"engine": {"kv_accounting": False}} for pool in POOLS]},
     "cluster.pools[0].engine.kv_accounting"),
    ({"cluster.pools": [POOLS[0], POOLS[1] | {"engine": {"reserve": "max_tokens"}}]},
     "cluster.pools[1].engine.reserve"),
    # Room for the prompt, but not for what it is to compute again.
    ({"cluster.pools": [POOLS[0] | {"engine": {"num_gpu_blocks_override": 58}}, POOLS[1]],
      "workload.output": {"kind": "log-normal", "mean_tokens": 40.0, "sigma": 0.5}}, "workload request"),
])
def test_what_is_not_simulated_is_refused(changes, field):
    with pytest.raises(InputError) as error:
        simulate(scenario(**changes))
    assert error.value.field.startswith(field), error.value


def test_remedies_are_ones():
    """Deadlines with engines that fail: what is advised is simulated."""
    with pytest.raises(InputError) as error:
        scenario(**{"workload.client": {"deadline_s": 5.0}})
    assert error.value.remedy == "use cluster.replicas"
    tree = scenario().to_dict()
    tree["cluster"] = {"replicas": 4, "failures": FAILING}
    tree["workload"]["client"] = {"deadline_s": 5.0}
    assert Scenario.from_dict(tree).cluster.replicas == 4
    with pytest.raises(InputError) as error:
        scenario(FAILING | {"mtbf_s": 1e-3, "mttr_s": 1e-3})
    assert error.value.field == "cluster.failures.mtbf_s" and "cluster.pools[k].replicas" in error.value.remedy


def test_nobody_computes_again_what_fails():
    """With on_failure = "fail" prefill engines need room for the prompts alone."""
    changes = {"cluster.pools": [POOLS[0] | {"engine": {"num_gpu_blocks_override": 58}}, POOLS[1]],
               "workload.output": {"kind": "log-normal", "mean_tokens": 40.0, "sigma": 0.5}}
    for on_failure in ("reroute", "fail"):
        one = scenario(FAILING | {"on_failure": on_failure}, **changes)
        system, workload = lower.resolve_system(one), lower.make_workload(one, one.workload.seed)
        assert system.has_restarts == (on_failure == "reroute")
        if system.has_restarts:
            with pytest.raises(InputError, match="KV blocks"):
                lower.check_requests(system, workload)
        else:
            lower.check_requests(system, workload)
