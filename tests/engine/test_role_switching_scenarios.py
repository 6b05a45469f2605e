"""Engines that change their role, as a user describes them: results, laws, refusals."""

import re

import numpy as np
import pytest

import jaxsim
from jaxsim._core.errors import InputError
from jaxsim.engine import lower
from jaxsim.engine.outcomes import blocks_of
from jaxsim.metrics import request_frame
from jaxsim.policy.role_switching import DECODE, ENCODE, PREFILL
from jaxsim.spec.scenario import Scenario
from tests.engine.test_images import BASE

pytestmark = pytest.mark.unoptimised

POOLS = [{"role": "encode", "engine": {"max_num_seqs": 1}}, {"role": "prefill"}, {"role": "decode", "replicas": 4}]
EVERY = {"sample_s": 1.0, "decide_s": 5.0, "poll_s": 2.0, "drain_check_s": 1.0}


def changed(**values) -> Scenario:
    """One image a request, all at once, an image encoded in a fifth of a second."""
    tree = BASE | {"num_seeds": 1, "cluster": {
        "encode": {"base_ms": 0.0, "tile_ms": 50.0}, "pools": POOLS, "role_switching": EVERY},
        "workload": {"kind": "batch", "num_requests": 100, "input": 22, "output": 4,
                     "images": {"number": 1, "tiles_per_image": 4, "tokens_per_tile": 16}}}
    return Scenario.from_dict(tree).with_values({name.replace("__", "."): value for name, value in values.items()})


@pytest.mark.slow
def test_idle_engines_go_where_the_queue_is():
    """By hand: images wait for 20 s of work of one engine; at 5, 10, ... s a decode engine is told so, which learns it
    a second later or at once, is idle, and encodes a second after that."""
    switching, late, slow = changed(), changed(cluster__role_switching__decide_s=3600.0), changed(
        cluster__role_switching__switch_s=2.0)
    stays = Scenario.from_dict({**late.to_dict(), "cluster": {
        name: value for name, value in late.to_dict()["cluster"].items() if name != "role_switching"}})
    anew = changed(cluster__role_switching__deal_anew=True)
    result = jaxsim.simulate([switching, late, slow, stays, anew])
    lanes = [lanes[0] for lanes in result.lanes]
    assert not any(lane.fault for lane in lanes) and all(lane.is_finished.all() for lane in lanes)
    changes = lanes[0].role_changes
    assert changes[0].tolist() == [2, DECODE, ENCODE, 5, 6, 7, 7]
    assert changes[1].tolist() == [3, DECODE, ENCODE, 10, 10, 11, 11]
    assert lanes[2].role_changes[0].tolist() == [2, DECODE, ENCODE, 5, 6, 7, 9]
    assert lanes[1].role_changes.shape == (0, 7) and lanes[1].role_switches == 0 and np.isnan(lanes[1].drain_s)
    # All images came at once, to the only engine that encoded then: where they stay nothing is won. Dealt anew, after
    # 7 s of 35 images two engines share the rest, until a third joins them at 11 s.
    encoded_s = [np.sort(lane.encoded_s) for lane in lanes]
    np.testing.assert_allclose(encoded_s[0], 0.2 * np.arange(1, 101), atol=1e-5)
    np.testing.assert_array_equal(encoded_s[0], encoded_s[1])
    np.testing.assert_allclose(encoded_s[4][:35], 0.2 * np.arange(1, 36), atol=1e-5)
    assert [(encoded_s[4] <= t + 1e-4).sum() for t in (7, 8, 9, 10, 11)] == [35, 45, 55, 65, 75]
    assert encoded_s[4][-1] < 13
    # Turns at which nothing happens change no bit.
    for field in ("scheduled_s", "first_token_s", "finish_s", "delivered_s", "instance"):
        np.testing.assert_array_equal(getattr(lanes[1], field), getattr(lanes[3], field))
    assert lanes[3].role_switches is None and "role_switching" not in result.metrics[3]
    summary = result.metrics[0]["role_switching"]
    assert summary["switches"] == lanes[0].role_switches >= 2 and summary["mean_drain_s"] == pytest.approx(1.0)
    # Caches of images are no KV, and a share of what an engine had in another role is no share.
    assert set(result.metrics[0]["kv"].values()) == {None} and result.metrics[3]["kv"]["peak_share"] > 0


def test_blocks_of_roles():
    """Known of engines that change between roles which have the same, and of none else."""
    pools, blocks = [{"role": "prefill", "replicas": 2}, {"role": "decode"}], {"engine": {
        "num_gpu_blocks_override": 900}}
    plain = dict(cluster__encode=None, workload__images=None, engine__num_gpu_blocks_override=800)
    for own, known in (({}, [800] * 3), (blocks, 0)):
        system = lower.resolve_system(changed(cluster__pools=[pools[0], pools[1] | own], **plain))
        np.testing.assert_array_equal(blocks_of(system), known)
    assert blocks_of(lower.resolve_system(changed())) == 0


@pytest.mark.slow
def test_a_quiet_workload_is_not_stopped(monkeypatch):
    """Turns go on while nobody is there, 1.5 of them a second at least: an hour of them is more than the rest has
    steps."""
    monkeypatch.setattr(lower, "step_limit", lambda workload, _: 3000)
    quiet = changed(workload__kind="poisson", workload__rate_rps=0.03, num_seeds=5)
    result = jaxsim.simulate(quiet)
    assert result.faults == () and all(lane.is_finished.all() for lane in result.lanes[0])


def test_outages_without_end_are_refused():
    """While somebody waits for an engine to come back, turns go on, 1.7 of them a second: as many as a run is granted,
    for an hour and as long as requests came, and a thousand."""
    pools = [{"role": "prefill", "replicas": 2}, {"role": "decode", "replicas": 2}]

    def checked(down_s):
        one = changed(cluster__pools=pools, cluster__encode=None, workload__images=None, cluster__failures={
            "outages": [{"instance": 3, "at_s": 1.0, "down_s": down_s}]})
        lower.check_outages(one, lower.resolve_system(one), lower.make_workload(one, one.workload.seed))

    checked(3_600.0 + 500.0)
    with pytest.raises(InputError, match="role_switching"):
        checked(3_600.0 + 1_000.0)


@pytest.mark.slow
def test_requests_that_come_later_find_the_new_engines():
    """Twice as many images as one engine encodes: with others beside it they are kept up with."""
    stream = dict(workload__kind="poisson", workload__rate_rps=10.0, workload__num_requests=300)
    result = jaxsim.simulate([changed(**stream), changed(cluster__role_switching__decide_s=3600.0, **stream)])
    (ours,), (theirs,) = result.lanes
    frame = request_frame(ours)
    parts = frame[["front_end_s", "encode_s", "embedding_s", "queue_s", "prefill_s", "transfer_s", "decode_s",
                   "stall_s"]]
    np.testing.assert_allclose(parts.sum(axis=1), frame["e2e_s"], atol=1e-9)
    assert ours.duration_s < 0.75 * theirs.duration_s
    assert set(ours.role_changes[:, 2]) == {ENCODE} and set(ours.role_changes[:, 1]) == {DECODE}


@pytest.mark.slow
def test_prompts_get_engines_from_outputs_and_back():
    """Prefill and decode engines alone: long prompts first, long outputs behind them."""
    pools = [{"role": "prefill", "replicas": 2}, {"role": "decode", "replicas": 4, "engine": {"max_num_seqs": 2}}]
    scenario = changed(
        cluster__pools=pools, cluster__encode=None, workload__images=None, workload__kind="poisson",
        workload__rate_rps=40.0, workload__num_requests=400, workload__input=2000, workload__output=60,
        cluster__role_switching={"sample_s": 0.5, "decide_s": 1.0, "poll_s": 0.5, "drain_check_s": 0.25})
    ((lane,),) = jaxsim.simulate(scenario).lanes
    assert not lane.fault and lane.is_finished.all() and lane.role_switches > 0
    assert {(int(a), int(b)) for a, b in lane.role_changes[:, 1:3]} <= {(PREFILL, DECODE), (DECODE, PREFILL)}
    # A prompt is computed where prompts are computed then.
    is_known = ~np.isnan(lane.role_changes[:, 6])
    for who, _, role, _, stopped_s, _, changed_s in lane.role_changes[is_known]:
        seen = (lane.instance if role == PREFILL else lane.decode_instance) == who
        before = (lane.scheduled_s if role == PREFILL else lane.first_token_s)[seen]
        assert ((before >= changed_s) | (before <= stopped_s)).all()
    times = lane.role_changes[:, 3:][is_known]
    assert (np.diff(times, axis=1) >= 0).all()


@pytest.mark.parametrize(("values", "field", "says"), [
    ({"cluster__pools": None, "cluster__replicas": 4, "cluster__encode": {"base_ms": 1, "tile_ms": 1}},
     "cluster.role_switching", "engines of different roles"),
    ({"cluster__pools": [{}, {}]}, "cluster.role_switching", "engines of different roles"),
    ({"cluster__pools": [*POOLS, {}]}, r"cluster.pools\[3\].role", "not simulated"),
    ({"cluster__pools": [*POOLS, {"role": "decode"}]}, r"cluster.pools\[3\].role", "that of another pool"),
    ({"cluster__pools": [*POOLS[:2], {"role": "decode", "replicas": 4, "device": "h100"}]},
     r"cluster.pools\[2\].device", "keep their devices"),
    ({"cluster__pools": [*POOLS[:2], {"role": "decode", "replicas": 4, "engine": {"tensor_parallel_size": 2}}]},
     r"cluster.pools\[2\].engine.tensor_parallel_size", "keep their devices"),
    ({"cluster__pools": [*POOLS[:2], {"role": "decode"}]}, "cluster.pools", "nobody to move"),
    ({"cluster__role_switching__decide_s": 0.5}, "cluster.role_switching.decide_s", "below sample_s"),
    ({"cluster__role_switching__deal_anew": True, "cluster__pools": POOLS[1:], "workload__images": None,
      "cluster__encode": None}, "cluster.role_switching.deal_anew", "has no effect"),
    ({"cluster__router": "jaxsim.policy.routing.LlumnixLoad"}, "cluster.router", "is not simulated"),
    ({"cluster__transfer": {"router": "jaxsim.policy.routing.RemainingSteps"}}, "cluster.transfer.router", "by loads"),
    ({"cluster__role_switching__poll_s": 0}, "cluster.role_switching.poll_s", "0.001"),
    ({"cluster__role_switching__switch_s": -1}, "cluster.role_switching.switch_s", "0"),
    ({"cluster__pools": POOLS[1:]}, "workload.images", "encoders beside the model"),
    ({"engine__preset": "vllm-v1@0.19"}, "async_scheduling", "is not simulated"),
    ({"engine__preset": "vllm-v0", "cluster__pools": POOLS[1:], "workload__images": None, "cluster__encode": None},
     "engine.preset", "is not simulated"),
    ({"engine__preset": "distserve-sim", "cluster__pools": POOLS[1:], "workload__images": None,
      "cluster__encode": None}, "engine.preset", "is not simulated"),
])
def test_what_is_not_there_is_refused(values, field, says):
    with pytest.raises(InputError, match=says) as error:
        jaxsim.simulate(changed(**values))
    assert re.search(field, error.value.field), error.value.field
