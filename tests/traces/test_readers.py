"""Every format on small files written here: what is read, what is refused, and with which words."""

import dataclasses
import gzip
import json
import math

import numpy as np
import pandas as pd
import pytest

from jaxsim import traces
from jaxsim._core.errors import InputError
from jaxsim.io.result import write_requests
from jaxsim.metrics import Result
from jaxsim.spec.scenario import Scenario
from jaxsim.traces import detect_format, formats, read_lengths, read_trace
from jaxsim.traces.llmservingsim import chained_blocks
from jaxsim.workload import Deterministic, generator
from jaxsim.workload.arrivals import GRID_S
from tests.metrics.lanes import simulated

AZURE_2023 = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,109
2023-11-16 18:15:51.2224670,879,55
"""
AZURE_2024 = """TIMESTAMP,ContextTokens,GeneratedTokens
2024-05-10 00:00:00.009930+00:00,2162,5
2024-05-10 00:00:01+00:00,2399,6
2024-05-10 00:00:01.250000+00:00,76,0
2024-05-10 00:00:02.500000+00:00,2376,4
"""
BURSTGPT = """Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type
5,ChatGPT,472,18,490,Conversation log
45,ChatGPT,1087,0,1087,Conversation log
45,GPT-4,417,276,693,API log
118,ChatGPT,1360,647,2007,API log
"""
BURSTGPT_NEW = """Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type
0.5,1,3.1,ChatGPT,10,20,30,Conversation log
1.75,,2.0,GPT-4,30,40,70,API log
"""
MOONCAKE = [
    {"timestamp": 0, "input_length": 1030, "output_length": 500, "hash_ids": [0, 1, 2]},
    {"timestamp": 3000, "input_length": 512, "output_length": 3, "hash_ids": [0]},
    {"timestamp": 3000, "input_length": 1500, "output_length": 9, "hash_ids": [0, 1, 5]},
]
VIDUR = "arrived_at,num_prefill_tokens,num_decode_tokens\n0.0,591,140\n0.125,547,248\n"
SIM = [
    {"input_toks": 5, "output_toks": 2, "arrival_time_ns": 2_000_000_000, "input_tok_ids": [1, 2, 3, 4, 5]},
    {"input_toks": 4, "output_toks": 3, "arrival_time_ns": 500_000_000, "input_tok_ids": [1, 2, 3, 4]},
    {"input_toks": 4, "output_toks": 7, "arrival_time_ns": 1_000_000_000, "input_tok_ids": [1, 2, 9, 9]},
]
SHAREGPT = [
    {
        "id": "a",
        "conversations": [{"from": "human", "value": "one two three"}, {"from": "gpt", "value": "four five"}],
    },
    {"id": "b", "conversations": [{"from": "human", "value": "left alone"}]},
    {
        "id": "c",
        "conversations": [{"from": "human", "value": "six"}, {"from": "gpt", "value": "seven eight nine"}],
    },
]
VLLM = {
    "request_rate": 2.0, "max_concurrency": None, "total_input_tokens": 60, "request_throughput": 1.0,
    "input_lens": [10, 20, 30], "output_lens": [5, 2, 7], "start_times": [1000.5, 1000.25, 1001.0],
    "ttfts": [0.1, 0.0, 0.1], "errors": ["", "Connection refused", ""],
}  # fmt: skip


def record(start_ns, isl, osl, error=None):
    metrics = {"input_sequence_length": {"value": isl, "unit": "tokens"},
               "output_sequence_length": {"value": osl, "unit": "tokens"}}  # fmt: skip
    return {"metadata": {"request_start_ns": start_ns, "was_cancelled": error is not None},
            "metrics": {} if error else metrics, "error": error}  # fmt: skip


AIPERF = [
    record(1759813207532900363 + 2_000_000_000, 550, 9),
    record(1759813207532900363, 100, 20),
    record(1759813207532900363 + 10, 1, 1, {"code": 499}),
]
INFERENCE_PERF = [
    {"start_time": 700.5, "end_time": 702.0, "info": {"input_tokens": 11, "output_tokens": 4}, "error": None},
    {"start_time": 700.0, "end_time": 702.0, "info": {"input_tokens": 12, "output_tokens": 5}, "error": None},
    {
        "start_time": 701.0,
        "end_time": 702.0,
        "info": {"input_tokens": 13},
        "error": {"error_type": "Timeout"},
    },
]
PLAIN = """arrival_s,input_tokens,output_tokens,max_tokens,priority,tenant,prefix_block_ids,prefix_block_size
0.5,40,4,10,2,gold,1 2 3,16
1.0,17,3,10,0,silver,1 4,16
1.5,10,2,10,0,gold,,16
"""


def lines(records):
    return "".join(json.dumps(r) + "\n" for r in records)


FILES = {
    "azure": [("t.csv", AZURE_2023), ("t.csv", AZURE_2024)],
    "burstgpt": [("t.csv", BURSTGPT), ("t.csv", BURSTGPT_NEW)],
    "mooncake": [("t.jsonl", lines(MOONCAKE))],
    "vidur": [("t.csv", VIDUR), ("t.csv", "num_prefill_tokens,num_decode_tokens,num_total_tokens\n5,6,11\n")],
    "llmservingsim": [("t.jsonl", lines(SIM))],
    "sharegpt": [("t.json", json.dumps(SHAREGPT)), ("t.json", '[{"prompt_len": 5, "output_len": 6}]')],
    "vllm-bench": [("t.json", json.dumps(VLLM)), ("t.json", lines([VLLM, VLLM])), ("t.jsonl", lines([VLLM]))],
    "aiperf": [("t.jsonl", lines(AIPERF)), ("t.json", '{"experiments": []}')],
    "inference-perf": [("t.json", json.dumps(INFERENCE_PERF))],
    "plain": [
        ("t.csv", PLAIN),
        ("t.tsv", PLAIN.replace(",", "\t")),
        ("t.jsonl", '{"arrival_ms": 1, "input_tokens": 5, "output_tokens": 6}\n'),
    ],
}


@pytest.fixture
def write(tmp_path):
    def write(name, content):
        path = tmp_path / name
        if isinstance(content, str):
            path.write_text(content)
        elif isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_text(json.dumps(content) if name.endswith(".json") else lines(content))
        return path

    return write


# ---- what is read


def test_every_format_has_a_file_here():
    assert set(FILES) == set(formats())


@pytest.mark.parametrize(("name", "file"), [(n, f) for n, files in FILES.items() for f in files])
def test_formats_are_detected(write, name, file):
    assert detect_format(write(*file)) == name


def test_azure_2023(write):
    w = read_trace(write("t.csv", AZURE_2023))
    np.testing.assert_allclose(w.arrival_s, [0.0, 4.314579, 4.541877], atol=GRID_S)
    assert w.input_tokens.tolist() == [374, 396, 879] and w.output_tokens.tolist() == [44, 109, 55]
    assert w.provenance["format"] == "azure" and w.provenance["num_rows"] == 3


def test_azure_2024_offsets_missing_fractions_and_empty_answers(write):
    w = read_trace(write("t.csv", AZURE_2024))
    np.testing.assert_allclose(w.arrival_s, [0.0, 0.99007, 2.49007], atol=GRID_S)
    assert w.input_tokens.tolist() == [2162, 2399, 2376] and w.provenance["num_dropped"] == 1
    with pytest.raises(InputError, match="row 3, output_tokens = 0.*drop_failed=True"):
        read_trace(write("t.csv", AZURE_2024), drop_failed=False)


def test_burstgpt_drops_and_counts_failures(write):
    w = read_trace(write("t.csv", BURSTGPT))
    assert w.arrival_s.tolist() == [0.0, 40.0, 113.0] and w.provenance["num_dropped"] == 1
    assert [w.tenant_names[t] for t in w.tenant] == ["ChatGPT", "GPT-4", "ChatGPT"]
    w = read_trace(write("t.csv", BURSTGPT_NEW))
    assert w.arrival_s.tolist() == [0.0, 1.25] and w.output_tokens.tolist() == [20, 40]


def test_burstgpt_filters(write):
    path = write("t.csv", BURSTGPT)
    assert read_trace(path, model="GPT-4").input_tokens.tolist() == [417]
    assert read_trace(path, log_type="API log").input_tokens.tolist() == [417, 1360]
    assert read_trace(path, log_type="API log", num_requests=1).input_tokens.tolist() == [417]
    with pytest.raises(InputError, match="Model = 'chatgpt'.*did you mean 'ChatGPT'"):
        read_trace(path, model="chatgpt")


def test_mooncake_keeps_hashes(write):
    w = read_trace(write("t.jsonl", MOONCAKE))
    assert w.arrival_s.tolist() == [0.0, 3.0, 3.0] and w.prefix_block_size == 512
    assert [w.prefix_of(i).tolist() for i in range(3)] == [[0, 1, 2], [0], [0, 1, 5]]
    bare = [{k: v for k, v in r.items() if k != "hash_ids"} for r in MOONCAKE]
    assert read_trace(write("bare.jsonl", bare)).prefix_hashes is None


def test_dither_spreads_and_keeps_requests_together(write):
    w = read_trace(write("t.jsonl", MOONCAKE), dither_s=3.0, seed=4, offset_to_zero=False)
    by_output = dict(zip(w.output_tokens.tolist(), w.arrival_s.tolist(), strict=True))
    assert 0 < by_output[500] < 3 < by_output[3] < 6 and 3 < by_output[9] < 6
    assert by_output[3] != by_output[9] and np.all(np.diff(w.arrival_s) > 0)
    prefixes = {int(o): w.prefix_of(i).tolist() for i, o in enumerate(w.output_tokens)}
    assert prefixes == {500: [0, 1, 2], 3: [0], 9: [0, 1, 5]}


def test_vidur(write):
    w = read_trace(write("t.csv", VIDUR))
    assert w.arrival_s.tolist() == [0.0, 0.125] and w.input_tokens.tolist() == [591, 547]


def test_llmservingsim_sorts_and_chains_token_ids(write):
    w = read_trace(write("t.jsonl", SIM), block_size=2)
    assert w.arrival_s.tolist() == [0.0, 0.5, 1.5] and w.output_tokens.tolist() == [3, 7, 2]
    first, second, third = (w.prefix_of(i).tolist() for i in range(3))
    assert (
        first == third and len(first) == 2
    )  # 1 2 | 3 4, and the same with a fifth token outside full blocks
    assert second[0] == first[0] and second[1] != first[1]
    wrong = [{**SIM[0], "input_toks": 9}]
    with pytest.raises(InputError, match="line 1, input_tokens = 9.*input_tok_ids"):
        read_trace(write("wrong.jsonl", wrong))


def test_equal_blocks_after_different_prompts_differ():
    one, other, again = chained_blocks([[1, 2, 9, 9], [3, 4, 9, 9], [1, 2, 9, 9, 5]], 2)
    assert one == again and not set(one) & set(other)


def test_llmservingsim_refuses_sessions(write):
    session = {"session_id": "s", "arrival_time_ns": 0, "sub_requests": []}
    for records, line in (([session], 1), ([SIM[0], session], 2)):
        with pytest.raises(InputError, match=f"line {line}.*sub_requests"):
            read_trace(write("t.jsonl", records))


def test_sharegpt_counts_with_a_tokenizer(write):
    path = write("t.json", SHAREGPT)
    for tokenizer in (str.split, lambda text: len(text.split())):
        inputs, outputs = read_lengths(path, tokenizer=tokenizer)
        assert inputs.tolist() == [3, 1] and outputs.tolist() == [2, 3]
    w = read_trace(path, tokenizer=str.split, rate_rps=4.0, arrivals=Deterministic())
    assert w.arrival_s.tolist() == [0.25, 0.5] and w.provenance["num_dropped"] == 1
    with pytest.raises(InputError, match="row 1.*one two three.*no token counts.*tokenizer="):
        read_lengths(path)


def test_sharegpt_takes_counts_from_the_file(write):
    turns = [{"from": "human", "value": "x", "num_tokens": 7}, {"from": "gpt", "value": "y", "tokens": 8}]
    counted = [
        {"conversations": turns},
        {"input_tokens": 5, "output_tokens": 6},
        {"prompt_len": 1, "output_len": 2},
    ]
    inputs, outputs = read_lengths(write("t.json", counted))
    assert inputs.tolist() == [7, 5, 1] and outputs.tolist() == [8, 6, 2]
    with pytest.raises(InputError, match="row 2.*neither conversations nor token counts"):
        read_lengths(write("t.json", [counted[1], {"text": 3}]))


def test_vllm_bench_sorts_and_drops_errors(write):
    w = read_trace(write("t.json", VLLM))
    assert w.arrival_s.tolist() == [0.0, 0.5] and w.input_tokens.tolist() == [10, 30]
    assert w.provenance["num_dropped"] == 1
    queued = {**VLLM, "queue_times": [0.5, 0.0, 0.25]}
    assert read_trace(write("t.json", queued)).arrival_s.tolist() == [0.0, 0.75]


def test_vllm_bench_without_start_times(write):
    old = {k: v for k, v in VLLM.items() if k != "start_times"}
    with pytest.raises(InputError, match="rate_rps.*no arrival times"):
        read_trace(write("t.json", old))
    for rate in ("inf", math.inf):
        assert read_trace(write("t.json", {**old, "request_rate": rate})).arrival_s.tolist() == [0.0, 0.0]
    with pytest.raises(InputError, match="no arrival times"):
        read_trace(write("t.json", {**old, "request_rate": "inf", "max_concurrency": 8}))


def test_vllm_bench_runs_and_missing_details(write):
    several = write("t.json", lines([VLLM, {**VLLM, "input_lens": [1, 2, 3]}]))
    with pytest.raises(InputError, match="run = None.*2 runs"):
        read_trace(several)
    assert read_trace(several, run=-1).input_tokens.tolist() == [1, 3]
    with pytest.raises(InputError, match="run = 2"):
        read_trace(several, run=2)
    bare = {k: v for k, v in VLLM.items() if k not in ("input_lens", "output_lens")}
    with pytest.raises(InputError, match="input_lens, output_lens; save the benchmark with --save-detailed"):
        read_trace(write("t.json", bare))
    with pytest.raises(InputError, match="start_times = 1: entries for 3"):
        read_trace(write("t.json", {**VLLM, "start_times": [0.0]}))


def test_aiperf_nanoseconds_and_failures(write):
    w = read_trace(write("t.jsonl", AIPERF))
    assert w.arrival_s.tolist() == [0.0, 2.0] and w.input_tokens.tolist() == [100, 550]
    assert (w.provenance["num_rows"], w.provenance["num_dropped"]) == (3, 1)
    start = 1759813207532900363  # float64 would be off by a hundred nanoseconds
    close = write("close.jsonl", [record(start, 1, 1), record(start + 1, 1, 1)])
    assert traces.READERS["aiperf"].read(close).arrival_s.tolist() == [0.0, 1e-9]
    with pytest.raises(InputError, match="line 1.*lacks output_sequence_length"):
        broken = {**AIPERF[0], "metrics": {"input_sequence_length": {"value": 3}}}
        read_trace(write("t.jsonl", [broken]))
    with pytest.raises(InputError, match="GenAI-Perf profile export"):
        read_trace(write("t.json", {"experiments": []}))


def test_inference_perf(write):
    w = read_trace(write("t.json", INFERENCE_PERF))
    assert w.arrival_s.tolist() == [0.0, 0.5] and w.output_tokens.tolist() == [5, 4]
    assert w.provenance["num_dropped"] == 1
    assert read_trace(write("t.json", INFERENCE_PERF), output_tokens=99).output_tokens.tolist() == [99, 99]


def test_plain_csv_with_every_column(write):
    for name, content in (("t.csv", PLAIN), ("t.tsv", PLAIN.replace(",", "\t")), ("t.csv", "\ufeff" + PLAIN)):
        w = read_trace(write(name, content))
        assert w.arrival_s.tolist() == [0.0, 0.5, 1.0]
        assert w.max_tokens.tolist() == [10, 10, 10] and w.priority.tolist() == [2, 0, 0]
        assert [w.tenant_names[t] for t in w.tenant] == ["gold", "silver", "gold"]
        assert [w.prefix_of(i).tolist() for i in range(3)] == [[1, 2, 3], [1, 4], []]
        assert w.prefix_block_size == 16


@pytest.mark.parametrize(("unit", "factor"), [("s", 1), ("ms", 10**3), ("us", 10**6), ("ns", 10**9)])
def test_plain_arrival_units(write, unit, factor):
    text = f"arrival_{unit},input_tokens,output_tokens\n{1 * factor},5,6\n{3 * factor},5,6\n"
    assert read_trace(write("t.csv", text), offset_to_zero=False).arrival_s.tolist() == [1.0, 3.0]


def test_plain_nanoseconds_of_an_epoch_keep_their_microseconds(write):
    start = 1759813207532900363
    text = "arrival_ns,input_tokens,output_tokens\n" + "".join(
        f"{start + i * 10_000},5,6\n" for i in range(3)
    )
    np.testing.assert_allclose(read_trace(write("t.csv", text)).arrival_s, [0.0, 1e-5, 2e-5], atol=2 * GRID_S)


def test_plain_jsonl_block_ids_name_their_size(write):
    rows = [{"arrival_us": 7_000_000, "input_tokens": 40, "output_tokens": 1, "block16_ids": [3, 4]}]
    w = read_trace(write("t.jsonl", rows))
    assert w.prefix_block_size == 16 and w.prefix_hashes.tolist() == [3, 4]


@pytest.mark.parametrize("name", ["t.parquet", "t.csv", "t.jsonl", "t.csv.gz", "t.jsonl.gz"])
def test_a_workload_survives_the_plain_format(tmp_path, name):
    made = generator("gamma", rate_rps=5.0, cv=2.0).sample(0, 50)
    made = read_trace(_save(made.to_frame(), tmp_path / "first.csv"), seed=9)
    again = read_trace(_save(made.to_frame(), tmp_path / name), seed=9)
    for column in ("arrival_s", "input_tokens", "output_tokens", "max_tokens", "priority", "uniforms"):
        np.testing.assert_array_equal(getattr(again, column), getattr(made, column))


def _save(frame, path):
    stem = path.name.removesuffix(".gz")
    if stem.endswith(".parquet"):
        frame.to_parquet(path)
    elif stem.endswith(".csv"):
        frame.to_csv(path, index=False)
    else:
        frame.to_json(path, orient="records", lines=True, double_precision=15)
    return path


def test_parquet_of_a_finished_run(tmp_path):
    """The columns a run's requests.parquet has, lists of block ids included."""
    frame = pd.DataFrame({
        "request_id": [0, 1], "arrival_s": [0.25, 0.75], "input_tokens": [33, 5], "output_tokens": [3, 4],
        "ttft_s": [0.1, None], "tenant": ["a", None], "status": ["finished", "rejected"],
        "prefix_block_ids": [[1, 2], []],
    })  # fmt: skip
    frame.to_parquet(tmp_path / "requests.parquet")
    w = read_trace(tmp_path / "requests.parquet")
    assert w.arrival_s.tolist() == [0.0, 0.5] and w.tenant_names == ("a", "default")
    assert w.prefix_of(0).tolist() == [1, 2] and w.prefix_of(1).tolist() == []


@pytest.fixture
def several(tmp_path):
    """A requests.parquet of two seeds, as a run writes it."""
    lane = simulated(0, num_requests=5, num_instances=1)[0]
    scenario = Scenario.from_dict({
        "schema_version": 1, "num_seeds": 2, "engine": {"num_gpu_blocks_override": 400, "max_model_len": 2048},
        "workload": {"kind": "poisson", "rate_rps": 1.0, "seed": 7},
        "cost": {"kind": "fitted", "prefill": {}, "decode": {}}})
    second = dataclasses.replace(lane, input_tokens=np.asarray(lane.input_tokens) + 1)
    return write_requests(Result([scenario], [[lane, second]]), tmp_path / "requests.parquet")


def test_one_run_of_several_is_read(several, tmp_path):
    for options in ({}, {"num_requests": 2}, {"sort": True}):
        with pytest.raises(InputError, match="slice.run = None.*2 runs, of seed 7, 8.*e.g. workload.slice.run = 7"):
            read_trace(several, **options)
    first, second = read_trace(several, run=7), read_trace(several, run=8)
    np.testing.assert_array_equal(second.input_tokens, first.input_tokens + 1)
    assert len(first) == 5 and first.arrival_s[0] == 0.0
    assert read_trace(several, run=8, num_requests=2).input_tokens.tolist() == second.input_tokens[:2].tolist()
    assert len(read_lengths(several)[0]) == 10
    with pytest.raises(InputError, match="slice.run = 9: is no seed of requests.parquet; give one of 7, 8"):
        read_trace(several, run=9)
    frame = pd.read_parquet(several)
    _save(pd.concat([frame.assign(scenario=0), frame.assign(scenario=1)]), tmp_path / "grid.csv")
    with pytest.raises(InputError, match="slice.scenario = None"):
        read_trace(tmp_path / "grid.csv", run=7)
    assert len(read_trace(tmp_path / "grid.csv", run=7, scenario=1)) == 5


def test_a_run_is_chosen_only_where_there_are_runs(write):
    with pytest.raises(InputError, match="workload.slice.run = 1: was given, but t.csv has no column seed"):
        read_trace(write("t.csv", LONG), run=1)
    with pytest.raises(InputError, match="workload.slice.run = 1: is not an option of azure"):
        read_trace(write("a.csv", AZURE_2023), run=1)


def test_separators_at_the_end_of_every_row_are_no_values(write):
    assert read_trace(write("t.csv", HEADER + "0,1,1,\n1,2,3,\n")).input_tokens.tolist() == [1, 2]


@pytest.mark.parametrize("path", [None, 5, ""])
def test_what_is_no_path_is_refused(path):
    with pytest.raises(InputError, match="is not the path of a file"):
        read_trace(path)


def test_gzip_is_read_as_what_it_holds(tmp_path):
    path = tmp_path / "t.jsonl.gz"
    path.write_bytes(gzip.compress(lines(MOONCAKE).encode()))
    assert read_trace(path).input_tokens.tolist() == [1030, 512, 1500]


# ---- options

LONG = "arrival_s,input_tokens,output_tokens\n" + "".join(
    f"{10 + i / 4},{i + 1},{1 + i % 3}\n" for i in range(40)
)


def test_slices(write):
    path = write("t.csv", LONG)
    w = read_trace(path, start=4, num_requests=3)
    assert w.input_tokens.tolist() == [5, 6, 7] and w.arrival_s.tolist() == [0.0, 0.25, 0.5]
    assert read_trace(path, start=38).input_tokens.tolist() == [39, 40]
    w = read_trace(path, start_s=1.0, end_s=2.0, offset_to_zero=False)
    assert w.arrival_s.tolist() == [11.0, 11.25, 11.5, 11.75]
    kept = read_trace(path, keep=0.5, start_s=1.0)
    assert 5 < len(kept) < 32 and set(kept.input_tokens) <= set(range(5, 41))


def test_rate_options(write):
    path = write("t.csv", LONG)
    assert read_trace(path).mean_rate_rps == pytest.approx(4.0)
    assert read_trace(path, rate_scale=2.0).mean_rate_rps == pytest.approx(8.0)
    assert read_trace(path, rate_rps=20.0).mean_rate_rps == pytest.approx(20.0, rel=1e-5)
    np.testing.assert_array_equal(read_trace(path, rate_rps=20.0).input_tokens, read_trace(path).input_tokens)


def test_lengths_only_traces_get_drawn_arrivals(write):
    path = write("t.csv", "input_tokens,output_tokens\n" + "5,6\n" * 2000)
    w = read_trace(path, rate_rps=8.0, seed=3)
    assert w.mean_rate_rps == pytest.approx(8.0, rel=0.15)
    np.testing.assert_array_equal(w.unit_times, read_trace(path, rate_rps=1.0, seed=3).unit_times)
    inputs, outputs = read_lengths(path)
    assert len(inputs) == len(outputs) == 2000 and inputs.dtype == np.int64


def test_sorting_is_stable_and_asked_for(write):
    text = "arrival_s,input_tokens,output_tokens\n3,1,1\n1,2,1\n1,3,1\n2,4,1\n"
    path = write("t.csv", text)
    with pytest.raises(InputError, match="row 2, arrival_s = 1.*sort=True"):
        read_trace(path)
    assert read_trace(path, sort=True).input_tokens.tolist() == [2, 3, 4, 1]
    assert read_trace(path, sort=True, num_requests=1).input_tokens.tolist() == [2]
    with pytest.raises(InputError, match="row 2, arrival_s = 700.0.*sort=True"):
        read_trace(write("t.json", INFERENCE_PERF), sort=False)


def test_a_slice_from_the_front_reads_only_the_front(write, monkeypatch):
    """Public traces have tens of millions of rows; a bad row past the slice is not even seen."""
    path = write("t.csv", LONG + "nonsense,x,y\n")
    assert read_trace(path, num_requests=5).input_tokens.tolist() == [1, 2, 3, 4, 5]
    with pytest.raises(InputError, match="row 41"):
        read_trace(path)
    # Failed rows in front make it read on.
    failing = BURSTGPT + "".join(f"{200 + i},ChatGPT,5,{i // 30},5,API log\n" for i in range(60))
    assert len(read_trace(write("b.csv", failing), num_requests=30)) == 30


# ---- what is refused

HEADER = "arrival_s,input_tokens,output_tokens\n"
HASHED = MOONCAKE[0]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", "", "holds no requests"),
        ("t.jsonl", "\n\n", "holds no requests"),
        ("t.json", "  ", "holds no requests"),
        ("t.json", "[]", "holds no requests"),
        ("t.csv", HEADER, "holds no requests"),
        ("t.csv", AZURE_2023.splitlines()[0] + "\n", "holds no requests"),
        ("t.csv", BURSTGPT.splitlines()[0] + "\n", "holds no requests"),
        ("t.csv", VIDUR.splitlines()[0] + "\n", "holds no requests"),
        ("t.csv", AZURE_2024.splitlines()[0] + "\n2024-05-10 00:00:00,5,0\n", "no requests but 1 failed"),
        ("t.csv", "arrival_s,input_tokens\n0,1\n", "which no reader.*plain.*output_tokens"),
        ("t.csv", "a,b\n0,1\n", "a, b, which no reader knows; rename them to input_tokens"),
        ("t.csv", HEADER + "0,1,1\n1,-4,1\n", "row 2, input_tokens = -4"),
        ("t.csv", HEADER + "0,1,1\n1,,1\n", "row 2, input_tokens = nan"),
        ("t.csv", HEADER + "0,1,1\n1,4,many\n", "row 2, output_tokens = 'many'"),
        ("t.csv", HEADER + "0,1,1\nnan,4,1\n", "row 2, arrival_s = nan"),
        ("t.csv", HEADER + "0,1,1\ninf,4,1\n", "row 2, arrival_s = inf"),
        ("t.csv", HEADER + "0,1,1.5\n", "row 1, output_tokens = 1.5.*whole"),
        ("t.csv", HEADER + "0,1,0\n", "row 1, output_tokens = 0.*drop_failed=True"),
        ("t.csv", HEADER + "0,1,1\n1,2,3,4,5\n", "not well-formed CSV.*line 3"),
        ("t.csv", HEADER + "0,1,1,9\n1,2,3\n", "row 1 = '0,1,1,9': has 4 values under 3 column names"),
        ("t.csv", "arrival_s,input_tokens,output_tokens,input_tokens\n0,1,1,2\n", "column input_tokens 2 times"),
        ("t.csv", HEADER + "-1,1,1\n2,1,1\n", "row 1, arrival_s = -1.*is negative"),
        ("t.csv", VIDUR.replace("\n0.0", "\n-0.5", 1), "row 1, arrival_s = -.*is negative"),
        ("t.jsonl", lines([{**HASHED, "timestamp": -5}]), "line 1, arrival_s = -0.005: is negative"),
        ("t.csv", "arrival_s,arrival_ms,input_tokens,output_tokens\n0,0,1,1\n", "more than once"),
        ("t.csv", AZURE_2023.replace("2023-11-16 18:15:50.9951690", "noon"), "row 2, TIMESTAMP = 'noon'"),
        ("t.csv", BURSTGPT.replace("276", "-276"), "row 3, output_tokens = -276"),
        ("t.jsonl", lines([HASHED]) + '{"timestamp": 5,\n', "line 2 = .*not valid JSON"),
        ("t.jsonl", lines([HASHED]) + "[1]\n", r"line 2 = '\[1\]': is not a JSON object"),
        ("t.jsonl", lines([HASHED]) + '\n{"timestamp": 5, "input_length": 3}\n', "line 3.*lacks the key"),
        ("t.jsonl", lines([{**HASHED, "input_length": None}]), "line 1, input_length = None"),
        ("t.jsonl", lines([{**HASHED, "input_length": True}]), "line 1, input_length = True"),
        ("t.jsonl", lines([{**HASHED, "hash_ids": ["a"]}]), "line 1, hash_ids"),
        ("t.jsonl", lines([{**HASHED, "hash_ids": [2**70]}]), "hash_ids.*64 bits"),
        ("t.jsonl", lines([{**HASHED, "hash_ids": [1, 2, 3, 4]}]), "more blocks of 512"),
        ("t.jsonl", lines([{"delay": 5, "input_length": 5, "output_length": 5}]), "delay instead of"),
        ("t.json", '{"a": 1,\n "b": }', "line 2 = .*not valid JSON"),
        ("t.json", '{"input_lens": 5, "output_lens": [1]}', "--save-detailed"),
        ("t.csv", b"\xff\xfe\x00\x80", "cannot be read as text"),
        ("t.parquet", b"not parquet", "cannot be read"),
        ("t.xlsx", "x", "unknown extension '.xlsx'"),
        ("t.csv", PLAIN.replace("1 4", "1 x"), "row 2, prefix_block_ids = '1 x'"),
        ("t.csv", PLAIN.replace("gold,1 2 3,16", "gold,1 2 3,32"), "prefix_block_size"),
    ],
)  # fmt: skip
def test_bad_files_are_refused_with_the_place(write, name, content, message):
    with pytest.raises(InputError, match=message) as caught:
        read_trace(write(name, content))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sorted": True}, "sorted = True: is not an option of plain.*did you mean 'sort'"),
        ({"tokenizer": len}, "not an option of plain"),
        ({"format": "asure"}, "format = 'asure'.*did you mean 'azure'"),
        ({"format": "azure"}, "lacks the columns TIMESTAMP, ContextTokens, GeneratedTokens; found arrival_s"),
        ({"start": 40}, "start = 40: is past the 40"),
        ({"start": -1}, "start = -1"),
        ({"num_requests": 41}, "num_requests = 41"),
        ({"num_requests": 0}, "num_requests = 0"),
        ({"num_requests": 2.5}, "num_requests = 2.5"),
        ({"rate_scale": 2.0, "rate_rps": 2.0}, "one of the two"),
        ({"rate_scale": -2.0}, "rate_scale = -2.0"),
        ({"rate_rps": 0.0}, "rate_rps = 0.0"),
        ({"dither_s": -1.0}, "dither_s"),
        ({"start_s": 100.0}, "widen the window"),
        ({"start_s": 2.0, "end_s": 1.0}, "end_s = 1.0"),
        ({"keep": 0.0}, "keep = 0.0"),
        ({"keep": 1e-9}, "keeps none of the 40"),
        ({"arrivals": Deterministic()}, "arrivals.*read_lengths"),
    ],
)
def test_bad_options_are_refused(write, options, message):
    with pytest.raises(InputError, match=message):
        read_trace(write("t.csv", LONG), **options)


@pytest.mark.parametrize("options", [{"rate_scale": 2.0}, {"start_s": 1.0}, {"rate_rps": -1.0}])
def test_options_that_need_times(write, options):
    with pytest.raises(InputError, match=next(iter(options))):
        read_trace(write("t.csv", "input_tokens,output_tokens\n5,6\n"), **options)


def test_missing_files_name_their_neighbours(write):
    path = write("azure_conv.csv", AZURE_2023)
    with pytest.raises(InputError, match="is not there; did you mean 'azure_conv.csv'"):
        read_trace(path.with_name("azure_cnv.csv"))
    with pytest.raises(InputError, match="is not there; give the path of a trace file"):
        read_trace(path.with_name("zzz.parquet"))
    with pytest.raises(InputError, match="is not a file"):
        read_trace(path.parent)


def test_two_readers_for_one_file_is_an_error(write, monkeypatch):
    monkeypatch.setitem(traces.READERS, "vidur", _Greedy)
    with pytest.raises(InputError, match="ambiguous.*plain, vidur.*format="):
        read_trace(write("t.csv", LONG))


class _Greedy:
    REQUIRED = ()

    @staticmethod
    def detect(probe):
        return True
