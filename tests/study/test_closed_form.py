"""`jaxsim sweep --closed-form`: what it refuses, and what the shipped study of plans asks. Numbers: tests/analytic."""

import pytest

from jaxsim import cli
from jaxsim.spec.plan import plan_of
from jaxsim.study.lanes import Lanes
from jaxsim.study.plan import plan
from jaxsim.study.study import Study


@pytest.mark.parametrize("words, text", [
    (["--dry-run"], "simulates nothing"), (["--requests"], "simulates nothing"),
    (["--out", "table.txt"], "ends in .csv or .parquet"), (["--out", "nowhere/table.csv"], "a folder that is there")])
def test_options_that_do_not_go_together(words, text, capsys):
    assert cli.main(["sweep", "wide-ep", "--closed-form", *words]) == 2
    assert text in capsys.readouterr().err


def test_the_shipped_study_has_plans_of_every_kind():
    """8 to 128 devices; stages, contexts and data-parallel ranks; tokens gathered and sent; a balancer or none."""
    study = Study.from_toml("wide-ep")
    base, seen = study.base_tree(), []
    for point in study.points():
        scenario = study.scenario_at(point, base)
        seen.append((plan_of(scenario.engine), scenario.num_devices))
    assert len({(plan, plan.deep_ep) for plan, _ in seen}) == len(seen) > 50
    assert {8, 16, 32, 64, 128} == {devices for _, devices in seen}
    for kind in ("data_parallel_size", "pipeline_parallel_size", "prefill_context_parallel_size",
                 "decode_context_parallel_size", "num_redundant_experts"):
        assert len({getattr(plan, kind) for plan, _ in seen}) > 1, kind
    assert {plan.deep_ep for plan, _ in seen} == {"", "high_throughput", "low_latency"}
    # A redundant expert for every rank keeps places a multiple of the ranks.
    assert all(plan.num_redundant_experts in (0, plan.expert_ranks) for plan, _ in seen)


@pytest.mark.slow
def test_plans_that_share_a_program_of_the_event_engine():
    """Degrees that are arithmetic: tensors, how tokens travel, redundant experts. Ranks that iterate together: not."""
    base = Study.from_toml("wide-ep").base_tree()
    base |= {"model": {"name": "qwen3-30b-a3b"}, "num_seeds": 1}
    base["workload"]["num_requests"] = 20
    axes = {"engine.tensor_parallel_size": [2, 4], "engine.enable_eplb": [False, True],
            "engine.all2all_backend": ["allgather_reducescatter", "deepep_low_latency"],
            "engine.enable_sequence_parallelism": [False, True]}
    derived = {"engine.num_redundant_experts": "4 * engine.tensor_parallel_size if engine.enable_eplb else 0"}
    for ranks, programs in (([4], 1), ([2, 4], 2)):
        more = {"engine.data_parallel_size": ranks} if len(ranks) == 1 else {
            "engine.data_parallel_size": ranks, "engine.enable_eplb": [False],
            "engine.enable_sequence_parallelism": [False], "engine.tensor_parallel_size": [2]}
        study = Study.from_dict({"schema_version": 1, "scenario": base, "axes": axes | more, "derived": derived})
        made = plan(study, Lanes())
        assert made.num_programs == programs and not made.refusals, made.refusals


def test_a_refused_point_is_its_own_whatever_comes_first():
    """What a balancer of experts needs is told of the point that lacks it, not of the one behind."""
    for loads in (["balanced", "skewed"], ["skewed", "balanced"]):
        made = plan(Study.from_dict({
            "schema_version": 1, "num_seeds": 1, "axes": {"cost.expert_load": loads},
            "scenario": {"schema_version": 1, "model": {"name": "qwen3-30b-a3b"}, "device": {"name": "h100"},
                         "engine": {"tensor_parallel_size": 2, "enable_expert_parallel": True, "enable_eplb": True,
                                    "max_model_len": 4096},
                         "workload": {"kind": "poisson", "rate_rps": 1.0, "num_requests": 8, "input": 64, "output": 8}},
        }), Lanes())
        assert [loads[refusal.point] for refusal in made.refusals] == ["balanced"]
        assert sum(len(tile.points) for tile in made.tiles) == 1
