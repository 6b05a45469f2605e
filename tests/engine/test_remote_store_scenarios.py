"""A store that instances share from scenario files: what is refused, what numbers it is, what a run and a sweep say."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxsim._core.errors import InputError
from jaxsim.engine import lower, simulate
from jaxsim.kernels.clock import Time
from jaxsim.metrics import request_frame
from jaxsim.policy.remote_store import RemoteStore
from jaxsim.spec.scenario import Scenario
from jaxsim.study import runner
from tests.engine import test_offload_scenarios as host

pytestmark = pytest.mark.unoptimised


def scenario(store: dict | None = None, offload: dict | None = None, replicas: int = 4, engine: dict | None = None,
             cluster: dict | None = None, **sections) -> Scenario:
    """The workload of host memory, five times as much of it, on several instances that get prompts in turn."""
    store = {} if store is None else {"remote_store": {"gb_per_s": 12.5, **store}}
    workload = {"kind": "poisson", "rate_rps": 8.0, "num_requests": 120, "input": 20, "output": 4,
                "prefix_groups": {"number": 10, "tokens": 512}}
    return host.scenario(offload, engine, **{
        "workload": workload, "cluster": {"replicas": replicas, "router": "round_robin", **store, **(cluster or {})},
        **sections})


@pytest.mark.parametrize("field, given", [
    ("engine.enable_prefix_caching", dict(engine={"enable_prefix_caching": False})),
    ("engine.pipeline_parallel_size", dict(engine={"pipeline_parallel_size": 2})),
    ("cluster.pools", dict(replicas=1, cluster={"pools": [{"role": "mixed"}]})),
    ("engine.data_parallel_size", dict(model={"name": "mixtral-8x7b"}, engine={
        "data_parallel_size": 2, "enable_expert_parallel": True})),
    ("engine.context_reuse", dict(engine={"context_reuse": {"gb_per_s": 25.0, "recomputed_layers": 4}})),
    ("cluster.remote_store.gb_per_s", dict(store={"gb_per_s": 0.0})),
    ("cluster.remote_store.egress_gb_per_s", dict(store={"egress_gb_per_s": 0.0})),
    ("cluster.remote_store.space_gb", dict(store={"space_gb": 0.0})),
    ("cluster.remote_store.space_gb", dict(store={"space_gb": 0.002})),
    ("cluster.remote_store.latency_us", dict(store={"latency_us": -1.0})),
    ("cluster.remote_store.load", dict(store={"load": "sometimes"})),
    ("cluster.remote_store.load", dict(store={"load": "by_layer"}, offload={})),
    ("model", dict(model=None)),
])
def test_refused(field, given):
    """Each by the field to change, in one line, before anything is compiled."""
    with pytest.raises(InputError) as caught:
        lower.resolve_system(scenario(**{"store": {}, **given}))
    assert caught.value.field == field and caught.value.remedy and "\n" not in str(caught.value)


def test_numbers_of_a_scenario():
    """2 MiB a block of 16 tokens on all devices together, over the slower of link and egress."""
    def made(*args, **given):
        one = scenario(*args, **given)
        return lower.make_remote_store(one, lower.resolve_system(one))

    plain = made({"latency_us": 250.0})
    assert float(plain.seconds_per_block) == pytest.approx(2**21 / 12.5e9)
    assert float(plain.latency_s) == pytest.approx(2.5e-4)
    assert int(made({"space_gb": 1.0}, engine={"tensor_parallel_size": 2}).capacity_blocks) == 476
    assert int(plain.capacity_blocks) == 1 << 30
    assert plain.egress_seconds_per_block is None and not plain.by_layer and int(plain.layers) == 32
    slow = made({"egress_gb_per_s": 5.0}, {"load": "by_layer"}, engine={"tensor_parallel_size": 2})
    assert float(slow.seconds_per_block) == float(slow.egress_seconds_per_block) == pytest.approx(2**21 / 5e9)
    assert bool(slow.by_layer)
    wide = made({"egress_gb_per_s": 50.0, "load": "by_layer"})
    assert float(wide.seconds_per_block) == pytest.approx(2**21 / 12.5e9) and bool(wide.by_layer)
    assert float(wide.egress_seconds_per_block) == pytest.approx(2**21 / 50e9)


@pytest.mark.parametrize("store, flags", [
    (None, (False, False, False)), ({}, (True, False, False)), ({"egress_gb_per_s": 50.0}, (True, True, False)),
    # 10 prefixes of 32 blocks, 120 prompts of one or two more: 1.2 GB at most.
    ({"space_gb": 2.0}, (True, False, False)), ({"space_gb": 0.5}, (True, False, True))])
def test_what_is_left_out_is_not_in_the_program(store, flags):
    """Neither its arrays nor its numbers."""
    (lane, *_) = simulate.prepare(0, scenario(store), False)
    dims = lane.dims
    assert (dims.has_remote, dims.has_egress, dims.remote_log > 0) == flags and not dims.has_offload
    assert (lane.params.flags.remote is not None) == flags[0]


def test_loads_queue_at_the_egress():
    """Three iterations that begin together, of four blocks each: the second waits for the first, the third for both;
    one that begins later waits for nobody then, and one that loads nothing for nothing at all."""
    rules = RemoteStore(jnp.float32(0.5), jnp.float32(0.25), jnp.int32(8), jnp.bool_(False), jnp.int32(1),
                        jnp.float32(0.125))
    egress, begins = Time(jnp.float32(0), jnp.float32(0)), [1.0, 1.0, 1.0, 2.5, 2.5]
    waits = []
    for begin, blocks in zip(begins, [4, 4, 4, 0, 4], strict=True):
        wait, egress = rules.wait(Time(jnp.float32(begin), jnp.float32(0)), jnp.int32(blocks), egress)
        waits.append(float(wait.hi) + float(wait.lo))
    assert waits == [0.25, 0.75, 1.25, 0.0, 0.25] and float(egress.hi) == 3.25
    took = rules.lengthened(Time(jnp.float32(2.0), jnp.float32(0)), jnp.float32(0.5), jnp.int32(4), wait)
    assert float(took.hi) == 2.0 + 0.5 + 4 * 0.5 + 0.25


@pytest.mark.slow
def test_what_a_run_says():
    """Blind routing to four instances, each without what another has computed: with a store a prefix is computed once.
    """
    variants = [scenario(None, {"space_gb": 8.0}), scenario({}), scenario({"load": "by_layer"}),
                scenario({}, {"space_gb": 8.0})]
    result = simulate.simulate(variants)
    assert result.faults == ()
    own, plain, by_layer, both = result.metrics
    assert "store_share" not in own["loads"]
    computed = [m["loads"]["computed_share"] for m in (plain, both, own)]
    assert computed[2] > 1.5 * computed[0] and computed[1] <= computed[0] + 1e-9
    # All from there without host memory; with it only what another instance computed.
    assert plain["loads"]["store_share"] == plain["loads"]["loaded_share"] > 0.3
    assert 0.1 < both["loads"]["store_share"] < both["loads"]["loaded_share"]
    assert own["mean_ttft_ms"] > plain["mean_ttft_ms"] > by_layer["mean_ttft_ms"]
    for lane in result.lanes[1]:
        frame = request_frame(lane)
        assert (frame["fetched_tokens"] == frame["loaded_tokens"]).all()
        # A prefix is found whole, or computed: by the first of its group, and by who comes before that is through.
        groups = np.round((frame["cached_tokens"] + frame["loaded_tokens"]) / 512)
        assert set(groups) == {0, 1} and 10 <= (groups == 0).sum() <= 20
        blocks = frame["fetched_tokens"].sum() / 16
        assert np.sum(lane.load_s) == pytest.approx(blocks * 2**21 / 12.5e9) and blocks > 0
        np.testing.assert_allclose(lane.load_delay_s, lane.load_s, rtol=1e-5)


@pytest.mark.slow
def test_a_study_says_the_same():
    """Columns of a sweep, with all there is."""
    one = scenario({"latency_us": 100.0, "egress_gb_per_s": 5.0, "space_gb": 0.6},
                   {"space_gb": 0.3, "load": "by_layer"})
    rows, refused = runner.table([one])
    assert not refused and len(rows) == one.num_seeds
    (metrics,) = simulate.simulate(one).metrics
    for name in ("device_share", "loaded_share", "store_share", "computed_share", "load_s", "delay_share"):
        assert rows[f"loads.{name}"].mean() == pytest.approx(metrics["loads"][name], rel=1e-6)
        assert metrics["loads"][name] > 0


@pytest.mark.slow
def test_turns_of_sessions():
    """A turn finds in the store what the prompts before it put there, wherever they were computed."""
    sessions = {"kind": "poisson", "rate_rps": 1.0, "num_requests": 60, "input": 100, "output": 40,
                "sessions": {"turns": 5, "think_s": 20.0, "context_limit": 1000}}
    result = simulate.simulate(scenario({"egress_gb_per_s": 5.0}, cluster={"router": "random"}, workload=sessions))
    assert result.faults == () and result.metrics[0]["loads"]["store_share"] > 0.3
    for lane in result.lanes[0]:
        found = lane.cached_tokens + lane.loaded_tokens
        assert np.all(found[lane.turn == 0] == 0)
        moved = 0
        for session in np.unique(lane.session):
            mine = np.flatnonzero(lane.session == session)
            prompts = lane.input_tokens[mine]
            assert np.all(found[mine][1:] >= prompts[:-1] // 16 * 16) and np.all(found[mine] < prompts)
            moved += np.sum(lane.fetched_tokens[mine][1:] * (np.diff(lane.instance[mine]) != 0))
        assert moved > 0
