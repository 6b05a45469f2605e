"""Result files: what is written is what happened, and reads back."""

import json
import math

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from jaxsim.io import result as files
from jaxsim.io.timeline import trace_events, write_timeline
from jaxsim.metrics import Result
from jaxsim.spec.scenario import Scenario
from jaxsim.traces import read_trace
from tests.metrics.lanes import blank_lane, scenario, simulated

COLUMNS = ("request_id arrival_s input_tokens output_tokens ttft_s tpot_s e2e_s queue_s prefill_s decode_s"
           " stall_s transfer_s front_end_s cached_tokens preemptions instance tenant status").split()


@pytest.fixture(scope="module")
def result():
    lanes = [simulated(seed, num_blocks=330, rate_rps=14.0, num_requests=150)[0] for seed in (0, 1, 2)]
    return Result([scenario(num_seeds=3)], [lanes])


def numbers(node):
    if isinstance(node, dict):
        node = list(node.values())
    if isinstance(node, list):
        return [x for child in node for x in numbers(child)]
    return [node] if isinstance(node, float) else []


def test_summary_is_flat_and_nested(result, tmp_path):
    content = json.loads(files.write_summary(result, tmp_path / "summary.json").read_text())
    assert content["completed"] == 150
    per_seed = [run["mean_ttft_ms"] for run in content["seeds"]]
    assert content["mean_ttft_ms"] == pytest.approx(np.mean(per_seed)) and len(set(per_seed)) == 3
    low, high = content["intervals"]["mean_ttft_ms"]
    assert low < content["mean_ttft_ms"] < high
    assert [run["seed"] for run in content["seeds"]] == [0, 1, 2]
    assert Scenario.from_dict(content["scenario"]) == result.scenarios[0]
    assert content["provenance"]["imitates"]["preset"] == "vllm-v1@0.9"
    assert content["provenance"]["jaxsim"] == files.version() != "unknown"
    assert all(math.isfinite(x) for x in numbers(content))


def test_equal_runs_give_equal_bytes(result, tmp_path):
    one = files.write_summary(result, tmp_path / "1.json").read_bytes()
    again = Result(result.scenarios, result.lanes)
    assert files.write_summary(again, tmp_path / "2.json").read_bytes() == one


def test_a_defect_never_becomes_nan_in_a_file():
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.to_json({"x": math.nan})


def test_requests_have_the_published_columns(result, tmp_path):
    path = files.write_requests(result, tmp_path / "requests.parquet")
    frame = pd.read_parquet(path)
    assert set(COLUMNS) <= set(frame.columns) and len(frame) == 450
    lane = result.lanes[0][1]
    mine = frame[frame["seed"] == 1]
    assert (mine["ttft_s"].to_numpy() == lane.first_token_s - lane.arrival_s).all()
    assert (mine["preemptions"].to_numpy() == lane.preemptions).all()
    assert set(mine["status"]) == {"finished"} and set(mine["instance"]) == {0, 1}


def test_what_does_not_exist_is_null_in_the_file(tmp_path):
    lane = blank_lane([0.0, 1.0], [2.0, np.nan], first_token_s=np.array([0.5, np.nan]),
                      scheduled_s=np.array([0.0, np.nan]), output_tokens=np.array([1, 5]))
    path = files.write_requests(Result([scenario(num_seeds=1)], [[lane]]), tmp_path / "r.parquet")
    table = pq.read_table(path)
    assert table["tpot_s"].to_pylist() == [None, None]
    assert table["ttft_s"].to_pylist() == [0.5, None] and table["e2e_s"].to_pylist() == [2.0, None]
    assert table["status"].to_pylist() == ["finished", "unfinished"]
    assert table["ttft_s"].null_count == 1


def test_a_run_can_be_replayed_from_its_requests(result, tmp_path):
    single = Result([scenario(num_seeds=1)], [result.lanes[0][:1]])
    replayed = read_trace(files.write_requests(single, tmp_path / "requests.parquet"))
    lane = single.lanes[0][0]
    assert np.allclose(replayed.arrival_s, lane.arrival_s - lane.arrival_s[0], atol=2e-6)
    assert (replayed.input_tokens == lane.input_tokens).all()


# ---- timeline


def test_timeline_holds_every_iteration_and_every_phase(result, tmp_path):
    lane = result.lanes[0][0]
    content = json.loads(write_timeline(lane, tmp_path / "timeline.json").read_text())
    events = content["traceEvents"]
    iterations = [e for e in events if e["ph"] == "X"]
    assert len(iterations) == lane.num_iterations
    assert sum(e["args"]["prefill_tokens"] for e in iterations) == lane.steps["prefill_tokens"].sum()
    names = {e["args"]["name"] for e in events if e["ph"] == "M" and e["name"] == "process_name"}
    assert names == {"instance 0", "instance 1"}
    counters = [e for e in events if e["ph"] == "C" and e["name"] == "KV blocks"]
    assert max(e["args"]["used"] for e in counters) == lane.steps["used_blocks"].max()


def test_iterations_of_an_instance_do_not_overlap(result):
    events = [e for e in trace_events(result.lanes[0][0]) if e["ph"] == "X"]
    for pid in (1, 2):
        mine = sorted((e["ts"], e["dur"]) for e in events if e["pid"] == pid)
        assert all(a + d <= b + 1e-3 for (a, d), (b, _) in zip(mine, mine[1:], strict=False))


def test_request_slices_nest_and_cover_the_request(result):
    lane = result.lanes[0][0]
    by_id = {}
    for event in trace_events(lane):
        if event["ph"] in "be":
            by_id.setdefault(event["id"], []).append(event)
    assert len(by_id) == lane.num_requests
    for index in range(lane.num_requests):
        events = by_id[f"r{index}"]
        assert events[0]["ph"] == "b" and events[-1]["ph"] == "e"
        assert events[0]["name"] == events[-1]["name"] == f"request {index}"
        open_slices = []
        for event in events:
            if event["ph"] == "b":
                open_slices.append(event["name"])
            else:
                assert open_slices.pop() == event["name"]
        assert not open_slices
        assert events[0]["ts"] == pytest.approx(lane.arrival_s[index] * 1e6)
        assert events[-1]["ts"] == pytest.approx(lane.finish_s[index] * 1e6)
        inner = sum(e["ts"] * (1 if e["ph"] == "e" else -1) for e in events[1:-1])
        assert inner == pytest.approx((lane.finish_s[index] - lane.arrival_s[index]) * 1e6, abs=1.0)


def test_timeline_of_unfinished_requests_is_cut_short(tmp_path):
    lane = blank_lane([0.0, 1.0], [2.0, np.nan], first_token_s=np.array([0.5, np.nan]),
                      scheduled_s=np.array([0.0, np.nan]))
    write_timeline(lane, tmp_path / "t.json")
    ids = {e.get("id") for e in trace_events(lane) if e["ph"] == "b"}
    assert ids == {"r0"}


def test_plain_values_of_json():
    """No tuples, no numbers of NumPy; null for what is missing or not finite, wherever it is."""
    given = {"a": (1, np.float32(0.5), (np.nan, math.inf)), "b": np.int64(3), "c": pd.NA, "d": np.bool_(True),
             "e": "text", "f": None}
    assert json.loads(files.to_json(files.plain(given))) == {"a": [1, 0.5, [None, None]], "b": 3, "c": None, "d": True,
                                                 "e": "text", "f": None}
    table = pd.DataFrame({"rank": pd.array([1, None], dtype="Int64"), "x": [math.nan, 2.0], "is": [True, False]})
    assert json.loads(files.to_json({"rows": files.plain_rows(table)}))["rows"] == [
        {"rank": 1, "x": None, "is": True}, {"rank": None, "x": 2.0, "is": False}]
