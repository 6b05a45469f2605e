"""Golden cases of the public DistServe simulator (its colocated vLLM rows), through scenarios and the engine.

The numbers are from serving simulations published by others: TTFT, decode time, TPOT and makespan in milliseconds,
OPT-13B on one A100. The first token is not counted as output there, so an output of n tokens is n + 1 here.
"""

import numpy as np
import pandas as pd
import pytest

import jaxsim
from tests.reference.test_golden import FITTED

pytestmark = pytest.mark.unoptimised

TOLERANCE_MS = 1e-3


def simulate(folder, arrivals_ms, prompts, outputs):
    prefill, small, large, capacity = FITTED["13b", 1]
    # Head-of-pipeline overhead: 2 ms + 1e-4 ms a token of context before the step, and 1 ms a prefill.
    head, context = 2.0, 1e-4
    pieces = [{"min_sequences": start, "a": (a + head) / 1e3, "c": (b + context) / 1e3, "d": (c - context) / 1e3}
              for start, (a, b, c) in ((0, small), (95, large))]
    a, b, c = prefill
    trace = folder / "trace.csv"
    pd.DataFrame({"arrival_s": np.asarray(arrivals_ms) / 1e3, "input_tokens": prompts,
                  "output_tokens": np.asarray(outputs) + 1}).to_csv(trace, index=False)
    scenario = jaxsim.Scenario.from_dict({
        "schema_version": 1, "num_seeds": 1,
        "engine": {"preset": "distserve-sim-vllm", "num_gpu_blocks_override": 1, "max_model_len": 4096,
                   "max_num_batched_tokens": capacity},
        "workload": {"kind": "trace", "trace": str(trace)},
        "cost": {"kind": "fitted", "exact": True, "decode": pieces,
                 "prefill": {"a": (a + head + 1.0) / 1e3, "b": (b + context) / 1e3, "e": c / 1e3}}})
    lane = jaxsim.simulate(scenario).lanes[0][0]
    decode_ms = 1e3 * (lane.finish_s - lane.first_token_s)
    return (1e3 * (lane.first_token_s - lane.arrival_s), decode_ms, decode_ms / np.asarray(outputs),
            1e3 * lane.finish_s.max())


@pytest.mark.parametrize("rate, golden", [
    (2, (205.033, 329.545, 89.476, 96.061, 165358.145)),
    (4, (205.345, 333.301, 376.598, 600.502, 151850.783)),
])
def test_one_eight_and_three_hundred_requests(tmp_path, rate, golden):
    """At 4 requests/s the batches hit the limit of 50,000 context tokens and decodes take turns. All three are one run:
    the first end long before the next arrive."""
    i, eight_ms, many_ms = np.arange(300), 2e3, 16e3
    ttft, decode, tpot, makespan = simulate(
        tmp_path, np.concatenate([[0.0], eight_ms + np.arange(8) * 40.0, many_ms + 1e3 * i / rate]),
        np.concatenate([[512], [128, 1024] * 4, 64 + (397 * i) % 1900]),
        np.concatenate([[4], [16] * 8, 16 + (131 * i) % 400]))
    assert (ttft[:9] + decode[:9]).max() < 2e3
    assert ttft[0] == pytest.approx(99.1614, abs=TOLERANCE_MS)
    assert decode[0] == pytest.approx(103.5687, abs=TOLERANCE_MS)
    # Arrivals are rounded to 2^-20 s, about 1e-3 ms, half of which may show.
    assert ttft[1:9] == pytest.approx([43.1825, 180.6875, 506.9059, 466.9059, 426.9059, 386.9059, 542.5412, 502.5412],
                                      abs=TOLERANCE_MS)
    got = (*np.percentile(ttft[9:], (50, 90)), *np.percentile(tpot[9:], (50, 90)), makespan - many_ms)
    assert got == pytest.approx(golden, abs=TOLERANCE_MS)
