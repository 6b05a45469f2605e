"""A user's mistake is one clear message, told before anything is compiled.

Every bad input of every kind goes the way a user's would: a scenario, `simulate`. Nothing may reach the compiled loop.
"""

import json
import math
import textwrap

import msgspec
import numpy as np
import pytest

import jaxsim
from jaxsim import InputError, Scenario
from jaxsim.engine import loop, lower
from jaxsim.engine.outcomes import FAULTS
from jaxsim.workload import Workload
from tests.engine import cases as c

pytestmark = pytest.mark.unoptimised

NUM_REQUESTS = 24

FORM = {"a": 0.01, "b": 1e-5, "c": 1e-7, "d": 1e-5}

REAL = {"schema_version": 1, "num_seeds": 2, "model": {"name": "llama-3.1-8b"}, "device": {"name": "h100"},
        "workload": {"kind": "poisson", "rate_rps": 2.0, "num_requests": NUM_REQUESTS, "input": 100, "output": 20}}

FITTED = {"schema_version": 1, "num_seeds": 2,
          "engine": {"max_num_seqs": 8, "max_num_batched_tokens": 256, "max_model_len": 512,
                     "num_gpu_blocks_override": 64},
          "workload": {"kind": "poisson", "rate_rps": 4.0, "num_requests": NUM_REQUESTS, "input": 100,
                       "output": {"kind": "uniform", "min_tokens": 1, "max_tokens": 40}},
          "cost": {"kind": "fitted", "prefill": FORM, "decode": FORM}}


@pytest.fixture
def nothing_runs(monkeypatch):
    """The compiled loop must not be reached, nor lowered."""
    def refuse(*_):
        raise AssertionError("a bad input reached the compiled loop")

    monkeypatch.setattr(loop, "run", refuse)


def changed(tree: dict, **fields) -> dict:
    """A copy with `section__field` replaced; None takes a field away."""
    tree = json.loads(json.dumps(tree))
    for path, value in fields.items():
        *sections, last = path.split("__")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
        node.pop(last, None)
        if value is not None:
            node[last] = value
    return tree


def refused(make) -> InputError:
    """The one error of a user's mistake, in the form all of them have."""
    with pytest.raises(InputError) as caught:
        jaxsim.simulate(make())
    error = caught.value
    text = str(error)
    assert "\n" not in text and text.startswith(f"{error.field} = ")
    assert error.field and error.problem
    return error


CASES = {
    # what is wrong: scenario, field, what the message must say
    "unknown model": (changed(REAL, model__name="llama-3.1-8c"), "model.name", ["'llama-3.1-8b'", "did you mean"]),
    "unknown device": (changed(REAL, device__name="h10"), "device.name", ["did you mean"]),
    "unknown preset": (changed(REAL, engine__preset="vllm-v2"), "engine.preset", ["did you mean", "'vllm-v1'"]),
    "unknown router": (changed(REAL, cluster__router="least_outstandin"), "cluster.router",
                       ["did you mean", "least_outstanding"]),
    "unknown field": (changed(REAL, engine__max_num_seq=3), "engine.max_num_seq", ["max_num_seqs"]),
    "unknown dtype": (changed(REAL, model__dtype="bf17"), None, ["did you mean", "bf"]),
    "unknown cost parameter": (changed(REAL, cost={"kind": "roofline", "overrides": {"gemm_eficiency": 0.5}}), None,
                               ["gemm_efficiency"]),
    "model too large": (changed(REAL, model__name="llama-3.1-70b"), None, ["GiB"]),
    "model too large by far": (changed(REAL, model__name="deepseek-v3"), None, ["GiB"]),
    "request longer than the pool": (changed(FITTED, engine__num_gpu_blocks_override=8), None, ["blocks", "8"]),
    "request longer than the model allows": (changed(FITTED, engine__max_model_len=120), None, ["120", "140"]),
    "request longer than a real pool": (
        changed(REAL, engine__gpu_memory_utilization=0.3, engine__preset="sglang", workload__input=120_000), None,
        ["blocks", "pool"]),
    "prompt longer than a batch": (
        changed(REAL, engine__preset="vllm-v0", engine__max_num_batched_tokens=8192, workload__input=9000), None,
        ["9000", "max_num_batched_tokens"]),
    "negative rate": (changed(REAL, workload__rate_rps=-1.0), "workload.rate_rps", ["-1.0", "> 0"]),
    "zero replicas": (changed(REAL, cluster__replicas=0), "cluster.replicas", [">= 1"]),
    "negative coefficient": (changed(FITTED, cost__decode={"a": -0.5}), None, ["-0.5"]),
    "negative override": (changed(REAL, cost={"kind": "roofline", "overrides": {"peak_flops": -1.0}}), None,
                          ["peak_flops", "positive"]),
    "not a number": (changed(REAL, workload__rate_rps=math.nan), "workload.rate_rps", ["nan", "finite"]),
    "infinite": (changed(REAL, slo__ttft_ms=math.inf), "slo.ttft_ms", ["inf", "finite"]),
    "text for a number": (changed(REAL, engine__max_num_seqs="many"), "engine.max_num_seqs", ["many"]),
    "no such trace": (changed(REAL, workload={"kind": "trace", "trace": "/nowhere/at/all.csv"}), None,
                      ["/nowhere/at/all.csv"]),
    "a router without what it reads": (
        changed(FITTED, engine__preset="distserve-sim-vllm", cluster={"router": "least_kv", "replicas": 2}),
        "cluster.router", ["least_kv", "KV memory"]),
    "a router by its path without what it reads": (
        changed(FITTED, engine__preset="distserve-sim-vllm",
                cluster={"router": "jaxsim.policy.routing.LeastKV", "replicas": 2}), "cluster.router", ["KV memory"]),
    "no room for one long sequence": (changed(REAL, device__name="rtx4090"), None, ["131,072", "max_model_len"]),
    "arrivals beyond the clock": (changed(FITTED, workload__rate_rps=1e-12), "workload", ["last arrival", "1e+09"]),
    "more than fits in memory": (changed(REAL, workload__num_requests=2**27), "workload.num_requests",
                                 ["134,217,728 requests", "GiB", "this machine"]),
    "prompts in chunks that wait for each other": (
        changed(REAL, engine__batch_wait_timeout_iters=20, engine__batch_wait_max_tokens_ratio=0.9),
        "engine.batch_wait_timeout_iters", ["20", "whole prompts", "tensorrt-llm"]),
    "ranks whose prompts wait for each other": (
        changed(REAL, engine__preset="tensorrt-llm", engine__batch_wait_timeout_iters=20,
                engine__batch_wait_max_tokens_ratio=0.9, engine__data_parallel_size=2),
        "engine.batch_wait_timeout_iters", ["data-parallel attention"]),
    "waiting for no share": (changed(REAL, engine__preset="tensorrt-llm", engine__batch_wait_timeout_iters=20),
                             "engine.batch_wait_timeout_iters", ["no effect", "set both"]),
    "waiting for no time": (changed(REAL, engine__preset="tensorrt-llm", engine__batch_wait_max_tokens_ratio=0.9),
                            "engine.batch_wait_max_tokens_ratio", ["no effect", "set both"]),
    "too many slots for a batch": (changed(FITTED, engine__max_num_seqs=300), "engine.max_num_seqs", ["256"]),
}


@pytest.mark.parametrize("tree, field, says", CASES.values(), ids=CASES)
def test_bad_scenarios_are_refused(nothing_runs, tree, field, says):
    error = refused(lambda: Scenario.from_dict(tree))
    if field:
        assert error.field == field
    for words in says:
        assert words in str(error)
    assert error.remedy


def test_scenarios_made_by_hand_are_checked_too(nothing_runs):
    """`simulate` does not trust what was not made by `from_dict`."""
    good = Scenario.from_dict(FITTED)
    bad = msgspec.structs.replace(good, workload=msgspec.structs.replace(good.workload, rate_rps=-2.0))
    assert refused(lambda: bad).field == "workload.rate_rps"
    # One bad scenario in a list stops all of them before anything runs.
    assert refused(lambda: [good, bad, good]).field == "scenarios[1]: workload.rate_rps"


HEADER = "arrival_s,input_tokens,output_tokens\n"
TRACES = {
    # what is wrong: name, text, what the message must say
    "unsorted": ("t.csv", HEADER + "0.0,10,5\n2.0,10,5\n1.0,10,5\n", ["1.0"]),
    "empty": ("t.csv", HEADER, ["no "]),
    "nothing at all": ("t.csv", "", []),
    "missing column": ("t.csv", "arrival_s,input_tokens\n0.0,10\n", ["output_tokens", "arrival_s"]),
    "other columns": ("t.csv", "a,b,c\n1,2,3\n", ["a", "b", "c"]),
    "negative length": ("t.csv", HEADER + "0.0,-3,5\n", ["-3"]),
    "length of nothing": ("t.csv", HEADER + "0.0,,5\n", []),
    "not a number": ("t.csv", HEADER + "0.0,10,5\nnan,10,5\n", ["nan"]),
    "text for a number": ("t.csv", HEADER + "0.0,ten,5\n", ["ten"]),
    "broken JSON lines": ("t.jsonl", '{"timestamp": 0, "input_length": 10, "output_length": 5, "hash_ids": []}\n{"ti\n',
                          ["2"]),
    "longer than the pool": ("t.csv", HEADER + "0.0,10,5\n1.0,4000,5\n", ["4000"]),
}


@pytest.mark.parametrize("name, text, says", TRACES.values(), ids=TRACES)
def test_bad_traces_are_refused(nothing_runs, tmp_path, name, text, says):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    tree = changed(FITTED, workload={"kind": "trace", "trace": str(path)})
    error = refused(lambda: Scenario.from_dict(tree))
    for words in says:
        assert words in str(error)
    assert error.remedy


def test_missing_columns_are_named_with_those_found(nothing_runs, tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("arrival_s,input_tokens,answer\n0.0,10,5\n", encoding="utf-8")
    error = refused(lambda: Scenario.from_dict(changed(FITTED, workload={"kind": "trace", "trace": str(path)})))
    for word in ("output_tokens", "arrival_s", "input_tokens", "answer"):
        assert word in str(error)


def test_outputs_beyond_the_counters_are_refused(nothing_runs, tmp_path):
    """A completion key holds a slot and an iteration in 32 bits: with 1024 slots, about half a million tokens."""
    path = tmp_path / "t.csv"
    path.write_text(HEADER + "0.0,10,2000000\n" + "1.0,10,2\n" * 1023, encoding="utf-8")
    tree = changed(FITTED, workload={"kind": "trace", "trace": str(path)}, engine__max_num_seqs=1024,
                   engine__max_num_batched_tokens=2048, engine__max_model_len=4_000_000,
                   engine__num_gpu_blocks_override=250_000)
    assert "2000000" in str(refused(lambda: Scenario.from_dict(tree)))


@pytest.mark.parametrize("text, line", [
    ("schema_version = 1\n[workload]\nkind = poisson\n", 3),
    ("schema_version = 1\n\n[workload\nkind = 'poisson'\n", 3),
    ("schema_version = 1\nname = 'never closed\n", 2),
    ("schema_version = 1\nschema_version = 1\n", 2),
])
def test_malformed_toml_names_the_line(nothing_runs, tmp_path, text, line):
    path = tmp_path / "s.toml"
    path.write_text(text, encoding="utf-8")
    error = refused(lambda: Scenario.from_toml(path))
    assert f"line {line}" in str(error) and "s.toml" in str(error)


def test_a_model_that_does_not_fit_shows_the_arithmetic(nothing_runs):
    """Weights, what there is, and what would fit."""
    error = refused(lambda: Scenario.from_dict(changed(REAL, model__name="llama-3.1-70b")))
    text = str(error)
    assert text.count("GiB") >= 2
    assert "tensor_parallel_size" in text


IMAGES = {"workload__images": {"number": 1, "tiles_per_image": 4, "tokens_per_tile": 4},
          "cluster__encode": {"base_ms": 1.0, "tile_ms": 1.0}}
SYNCHRONOUS = {"engine__preset": "vllm-v1@0.9"}


@pytest.mark.parametrize("changes, field", [
    ({"cluster__failures": {"outages": [{"instance": 0, "at_s": 1, "down_s": 1}]}}, "cluster.failures"),
    ({"cluster__admission": {"max_waiting": 3}}, "cluster.admission"),
    ({"workload__client": {"deadline_s": 5.0}}, "workload.client"),
    ({"workload__tenants": [{"name": "hasty", "deadline_s": 5.0}]}, "workload.tenants"),
    ({"engine__scheduling_policy": "priority"}, "engine.scheduling_policy"),
    ({"engine__scheduling_policy": "least_slack", "engine__slack_output_ms": 20.0, "slo": {"e2e_ms": 1000.0},
      "workload__prediction": {"sigma": 0.0}}, "engine.scheduling_policy"),
    ({"cluster__role_switching": {}, "cluster__pools": [{"role": "prefill", "replicas": 2}, {"role": "decode"}]},
     "cluster.role_switching"),
    (IMAGES, "workload.images"),
    ({"engine__context_reuse": {"recomputed_layers": 4, "gb_per_s": 10.0}, "engine__enable_prefix_caching": True,
      "model": {"name": "llama-3.1-8b"}, "device": {"name": "h100"},
      "workload__prefix_groups": {"number": 4, "tokens": 64}}, "engine.context_reuse")])
def test_what_is_refused_with_sessions_is_with_a_workload_of_them(nothing_runs, changes, field):
    """By the field that is there."""
    scenario = Scenario.from_dict(changed(FITTED, **(SYNCHRONOUS | changes)))
    images = {"num_images": [1, 1], "tiles_per_image": 4} if scenario.workload.images else {}
    given = Workload([0.0, 1.0], [40, 80], [4, 4], session=[0, 0], turn=[0, 1], think_s=[0.0, 1.0], **images)
    with pytest.raises(InputError, match="a workload of sessions") as caught:
        jaxsim.simulate(scenario, workload=given)
    assert caught.value.field == field


# --- runs that end badly ------------------------------------------------------------------------------------


def no_nan(node) -> bool:
    json.dumps(node, allow_nan=False)
    return True


def test_a_run_that_is_stopped_says_which_bound(monkeypatch):
    """The step limit, its name in the result, numbers only where there are any."""
    monkeypatch.setattr(lower, "step_limit", lambda workload, _: 30)
    result = jaxsim.simulate(Scenario.from_dict(FITTED))
    assert len(result.faults) == 1 and "steps" in result.faults[0]
    (metrics,) = result.metrics
    assert metrics["fault"] == result.faults[0]
    assert 0 < metrics["failed"] < NUM_REQUESTS and metrics["completed"] + metrics["failed"] == NUM_REQUESTS
    assert all(no_nan(run) for run in (*result.metrics, *result.runs[0]))
    for lane in result.lanes[0]:
        assert np.all(np.isnan(lane.finish_s) == ~lane.is_finished)


def test_a_run_that_never_got_anywhere_has_no_nan(monkeypatch):
    monkeypatch.setattr(lower, "step_limit", lambda workload, _: 0)
    result = jaxsim.simulate(Scenario.from_dict(FITTED))
    (metrics,) = result.metrics
    assert metrics["fault"] and metrics["completed"] == 0
    assert no_nan(metrics)


@pytest.mark.parametrize("form", ["decode", "prefill"])
def test_costs_that_no_clock_can_hold_stop_the_run(form, monkeypatch):
    """Nothing negative, nothing that is not a number, and the cost is named."""
    scenario = Scenario.from_dict(FITTED)
    slow = msgspec.structs.replace(getattr(scenario.cost, form), a=30_000.0)
    result = jaxsim.simulate(msgspec.structs.replace(
        scenario, cost=msgspec.structs.replace(scenario.cost, **{form: slow})))
    (metrics,) = result.metrics
    assert "16384 s" in metrics["fault"] and "cost" in metrics["fault"]
    assert metrics["failed"] > 0 and no_nan(metrics)
    assert (result.requests[["queue_s", "prefill_s", "decode_s", "stall_s"]].fillna(0) >= 0).all().all()


@pytest.mark.parametrize("scenarios", [None, "my.toml", 3, {}, [{}]])
def test_what_is_no_scenario_is_refused(nothing_runs, scenarios):
    with pytest.raises(InputError, match="Scenario.from_toml"):
        jaxsim.simulate(scenarios)


def test_the_scenario_of_a_list_is_named(nothing_runs):
    bad = Scenario.from_dict(changed(REAL, model__name="llama-3.1-70b", name="too large"))
    with pytest.raises(InputError, match=r"scenarios\[1\] too large: "):
        jaxsim.simulate([Scenario.from_dict(REAL), bad])


def test_a_good_run_has_no_fault_and_no_nan():
    result = jaxsim.simulate(Scenario.from_dict(FITTED))
    assert result.faults == ()
    (metrics,) = result.metrics
    assert metrics["fault"] is None and metrics["failed"] == 0 and no_nan(metrics)
    frame = result.requests
    assert len(frame) == 2 * NUM_REQUESTS
    assert not frame.drop(columns=["tpot_s"]).isna().any().any()
    assert (frame["tpot_s"].isna() == (frame["output_tokens"] == 1)).all()


def test_every_fault_has_its_sentence():
    """Each bit that the loop can set is explained."""
    names = ("STUCK", "STEP_LIMIT", "TOO_SLOW", "STARVED", "LOG_FULL", "NO_NUMBER", "WINDOW_FULL", "SLACK_WINDOW_FULL",
             "LINKS_FULL", "LINE_FULL")
    bits = {name: value for name, value in vars(c.w).items() if name in names or name.endswith("_LIMIT")}
    assert set(FAULTS) == set(bits.values())
    assert all(len(text) > 20 and textwrap.dedent(text) == text for text in FAULTS.values())
