"""Migration and scaling as a user describes them."""

import numpy as np
import pytest

from jaxsim import Environment
from jaxsim._core.errors import InputError
from jaxsim.engine import lower
from jaxsim.engine.simulate import prepare, simulate
from jaxsim.metrics import flatten, request_frame
from jaxsim.spec.scenario import Scenario
from jaxsim.study import runner
from jaxsim.study.lanes import Lanes

pytestmark = pytest.mark.unoptimised


def scenario(cluster=None, engine=None, workload=None, **changes) -> Scenario:
    """Three small pools, little memory, long answers; every iteration takes some 20 ms."""
    return Scenario.from_dict({
        "schema_version": 1, "num_seeds": 2, "model": {"name": "llama-1-7b"},
        "engine": {"preset": "vllm-v1@0.9", "max_num_seqs": 16, "max_model_len": 1024, "num_gpu_blocks_override": 80,
                   **(engine or {})},
        "cluster": {"replicas": 3, "router": "llumnix_load", **(cluster or {})},
        "workload": {"kind": "gamma", "cv": 2.0, "rate_rps": 1.5, "num_requests": 60, "input": 100,
                     "output": {"kind": "uniform", "min_tokens": 1, "max_tokens": 500}, **(workload or {})},
        "cost": {"kind": "fitted", "prefill": {"a": 0.02, "b": 1e-4}, "decode": {"a": 0.02, "d": 1e-4}}} | changes)


MIGRATION = {"migration": {"metric": "freeness", "out_below": 8.0, "gb_per_s": 8.0, "latency_us": 500.0}}
SCALING = {"scaling": {"min_replicas": 1, "check_s": 1.0, "startup_s": 2.0}}


@pytest.mark.parametrize("change, field", [
    ({"cluster": {**MIGRATION, "replicas": 1}}, "cluster.replicas"),
    ({"cluster": {"migration": {}}}, "cluster.migration.gb_per_s"),
    ({"cluster": {"migration": {"polling_s": 0.0}}}, "cluster.migration.polling_s"),
    ({"cluster": {"migration": {"last_stage_blocks": 0}}}, "cluster.migration.last_stage_blocks"),
    ({"cluster": {"migration": {"choice": "longest"}}}, "cluster.migration.choice"),
    ({"cluster": {**MIGRATION, "replicas": 1, "pools": [{"replicas": 2}]}}, "cluster.migration"),
    ({"cluster": MIGRATION, "engine": {"enable_prefix_caching": True}}, "engine.enable_prefix_caching"),
    ({"cluster": MIGRATION, "engine": {"async_scheduling": True}}, "engine.async_scheduling"),
    ({"cluster": MIGRATION, "engine": {"pipeline_parallel_size": 2}}, "engine.pipeline_parallel_size"),
    ({"cluster": MIGRATION, "engine": {"preset": "sglang"}}, "engine.preset"),
    ({"cluster": MIGRATION, "engine": {"scheduling_policy": "priority"}}, "engine.scheduling_policy"),
    ({"cluster": MIGRATION, "workload": {"kind": "closed-loop", "cv": None, "rate_rps": None, "concurrency": 4}},
     "workload.kind"),
    ({"cluster": {"scaling": {"min_replicas": 4}}}, "cluster.scaling.min_replicas"),
    ({"cluster": {"scaling": {"out_below": 70.0}}}, "cluster.scaling.out_below"),
    ({"cluster": {"headroom_blocks": 5, "router": "round_robin"}}, "cluster.headroom_blocks"),
    ({"cluster": {"router_weights": {"top_k": 1.5}}}, "cluster.router_weights.top_k"),
    ({"cluster": {"router_weights": {"load_weight": 1.0}}}, "cluster.router_weights.load_weight")])
def test_refusals(change, field):
    with pytest.raises(InputError) as error:
        made = scenario(**change)
        lower.make_params(made, lower.resolve_system(made), None, 1)
    assert error.value.field == field, error.value


@pytest.mark.parametrize("cluster, looks", [
    (MIGRATION, 3 / 0.5), (SCALING, 1.0), ({**MIGRATION, **SCALING}, 3 / 0.5 + 1)])
def test_steps_are_enough_for_all_looks(cluster, looks):
    """As long as requests come, which another rate stretches; a study has the bound of a run alone."""
    cluster = {name: {**given, "polling_s": 0.5} if name == "migration" else given for name, given in cluster.items()}
    steps = []
    for rate in (0.001, 1.5):
        made = scenario(cluster, workload={"kind": "poisson", "cv": None, "rate_rps": rate}, num_seeds=1).checked()
        (lane,) = prepare(0, made, False)
        _, (run,) = Lanes().runs(made, lane.dims.num_slots, 2048, 1024)
        last_s = lane.workload.arrival_s[-1]
        steps.append(int(lane.params.max_steps))
        assert run.max_steps == steps[-1] > looks * last_s and run.arrival_s[-1] == pytest.approx(last_s)
    assert steps[0] > steps[1]


def test_an_environment_refuses_controllers_of_its_own():
    with pytest.raises(InputError, match="cluster.migration"):
        Environment(scenario(MIGRATION), tick_s=1.0)


@pytest.mark.slow
def test_a_run_says_who_moved_and_which_instances_were_on():
    """One program, with and without taking requests; the results of a study are the same."""
    both = [scenario({**MIGRATION, **SCALING, "migration": {**MIGRATION["migration"], "in_above": above}})
            for above in (8.0, 1e9)]
    result = simulate(both)
    assert result.faults == ()
    for index, lanes in enumerate(result.lanes):
        for lane in lanes:
            frame = request_frame(lane)
            parts = frame[["front_end_s", "queue_s", "prefill_s", "decode_s", "stall_s"]].sum(axis=1)
            assert np.allclose(parts, frame["e2e_s"])
            moved = frame["migrations"] > 0
            assert (frame["downtime_s"] > 0).tolist() == moved.tolist() and moved.any() == (index == 0)
            assert (frame["downtime_s"] <= frame["stall_s"] + 1e-9).all()
            # A block is 16 x 0.5 MiB over 8 GB/s, a stage has 0.5 ms on top.
            least_s = frame["migrations"][moved] * (16 * 2**19 / 8e9 + 5e-4)
            assert (frame["downtime_s"][moved] >= least_s - 1e-6).all()
            assert frame["last_instance"].between(0, 2).all()
            end_s = np.nanmax(lane.finish_s)
            assert end_s <= lane.instance_s <= 3 * end_s and lane.starts > 0 and lane.starts >= lane.drains > 0
    rows, refused = runner.table(both)
    assert not refused
    for (_, row), metrics in zip(rows.iterrows(), (m for lanes in result.runs for m in lanes), strict=True):
        flat = flatten(metrics)
        names = [name for name in flat if name.startswith(("migrations.", "scaling."))]
        assert len(names) == 13 and all(
            np.isclose(row[name], np.nan if flat[name] is None else flat[name], equal_nan=True) for name in names)
