"""Numbers from outside that the reference simulator must reproduce.

- Scheduler traces of vLLM V0 and V1 on a pool of ten blocks; of TensorRT-LLM's batch waiting.
- The public simulator of LLMServe/DistServe (`simdistserve`), its vLLM backend: single requests, small and
  large workloads, goodput by bisection. Its rules: prefills first and whole, as many as fit the token budget,
  which is the KV capacity; decode batches of at most 50000 context tokens; no memory accounting; the first
  token is not counted as output, so a request of `out` tokens there has `out + 1` here.
- M/D/1 queues.
"""

import math
import random
from statistics import NormalDist, mean

import numpy as np
import pytest

from .simulator import BatchStatsRef, Request, preset, simulate

# --- scheduler traces -----------------------------------------------------------------------------

TRACE_REQUESTS = [Request(0, 0.0, 40, 30), Request(1, 0.0, 50, 20), Request(2, 3.0, 30, 40)]


def run_trace(name: str, budget: int):
    flags = preset(name, num_blocks=10, block_size=16, max_num_seqs=4, max_num_batched_tokens=budget)
    result = simulate(TRACE_REQUESTS, flags, 1, "round_robin", lambda stats: 1.0)
    steps = {int(record.start_s): record for record in result.iterations}
    assert sorted(steps) == list(range(len(steps))), "a step was skipped"
    return result, steps


def test_trace_vllm_v1():
    result, steps = run_trace("vllm-v1", 64)
    assert (steps[0].batch, steps[0].free_blocks) == ({0: 40, 1: 24}, 5)
    assert (steps[1].batch, steps[1].free_blocks) == ({0: 1, 1: 26}, 3)
    assert (steps[3].batch, steps[3].free_blocks) == ({0: 1, 1: 1, 2: 30}, 1)
    assert steps[5].free_blocks == 1 and steps[6].free_blocks == 0
    assert (steps[9].batch, steps[9].preempted, steps[9].free_blocks) == ({0: 1, 1: 1}, (2,), 2)
    assert min(step for step in range(10, 55) if 2 in steps[step].batch) == 21
    assert steps[21].batch[2] == 36
    assert max(steps) == 54
    assert [r.preemptions for r in result.requests] == [0, 0, 1]


def test_trace_vllm_v0():
    result, steps = run_trace("vllm-v0", 128)
    assert (steps[0].batch, steps[0].free_blocks) == ({0: 40, 1: 50}, 3)
    assert steps[3].batch == {2: 30}
    assert steps[6].free_blocks == 0 and steps[7].preempted == (2,)
    assert [steps[i].batch for i in (8, 10, 12, 24)] == [{2: 34}, {2: 35}, {2: 36}, {2: 37}]
    assert [i for i in steps if steps[i].preempted] == [7, 9, 11, 13]
    assert max(steps) == 56
    assert [r.preemptions for r in result.requests] == [0, 0, 4]


def test_trace_tensorrt_llm_batch_waiting():
    """By hand from `PyExecutor._waiting_requests`: three iterations at most, or half of 100 tokens."""
    flags = preset("tensorrt-llm-sync-waiting", batch_wait_timeout_iters=3, max_num_batched_tokens=100, max_num_seqs=8)
    arrive = [(0.0, 20, 12), (1.0, 10, 4), (5.0, 30, 3), (6.0, 20, 3), (10.0, 10, 9), (13.0, 10, 2)]
    requests = [Request(i, *shape) for i, shape in enumerate(arrive)]
    steps = [r.batch for r in simulate(requests, flags, 1, "round_robin", lambda stats: 1.0).iterations]
    # Nothing decodes: no wait. Then three iterations pass by, and the count begins anew.
    assert steps[:5] == [{0: 20}, {0: 1}, {0: 1}, {0: 1}, {0: 1, 1: 10}]
    # 2 + 30 tokens wait, 2 + 30 + 20 do not.
    assert steps[5:7] == [{0: 1, 1: 1}, {0: 1, 1: 1, 2: 30, 3: 20}]
    # Two iterations waited, then nothing decodes: it goes, and the two still count for the next.
    assert steps[9:15] == [{0: 1}, {0: 1}, {0: 1}, {4: 10}, {4: 1}, {4: 1, 5: 10}]


# --- simdistserve ---------------------------------------------------------------------------------

# Fitted coefficients in ms on A100-80GB, vLLM engine: prefill (constant, per token, per squared token),
# decode (constant, per context token, per sequence) below 95 sequences and from there on; KV capacity.
# Source: LLMServe/DistServe, simdistserve/estimators/profile_data.
FITTED = {
    ("13b", 1): (
        (22.052204789310185, 0.14050923870128956, 8.076584822611088e-06),
        (23.475041008414784, 0.000592934466077393, 0.060726861260369455),
        (20.206356173691958, 0.0004907727036234946, 0.1200031385587413),
        66144,
    ),
    ("13b", 2): (
        (27.440806247810684, 0.0905453268062731, 8.452054313246025e-06),
        (24.54058424191086, 0.00022440145424035404, 0.08715787269447899),
        (17.947769467112806, 0.0004570851465217072, 0.11179075830699213),
        163008,
    ),
    ("13b", 4): (
        (30.536322590049405, 0.05150644936810146, 4.232473132942393e-07),
        (25.90114444283343, 7.753634454230709e-05, 0.05528087160867803),
        (23.88388468859458, 0.00028400164093310935, 0.06276523831046728),
        356736,
    ),
    ("66b", 4): (
        (42.965489361973944, 0.2128658422785494, 4.601017396226869e-05),
        (39.58178936012414, 0.0006945721692406896, 0.13580868185596764),
        (40.859718006896806, 0.0004264871259058686, 0.19508372547790553),
        78496,
    ),
    ("66b", 8): (
        (38.931193445523604, 0.1573682229779579, 4.531676245669589e-06),
        (31.176041922273107, 0.00027556543631760213, 0.0679770397053775),
        (29.087774405517447, 0.0006027720257746419, 0.1389608688300688),
        212304,
    ),
}


def fitted_cost(model: str, tp: int):
    """Seconds of an iteration: the fitted law plus what the head of the pipeline adds."""
    prefill, decode_small, decode_large, _ = FITTED[model, tp]

    def cost(stats: BatchStatsRef) -> float:
        if stats.num_prefill:
            a, b, c = prefill
            pipeline_constant = 1.0
            milliseconds = a + b * stats.prefill_tokens + c * stats.prefill_pairs + pipeline_constant
            context_before = stats.prefill_context
        else:
            a, b, c = decode_small if stats.num_decode < 95 else decode_large
            milliseconds = a + b * stats.decode_context + c * stats.num_decode
            context_before = stats.decode_context - stats.num_decode
        return (milliseconds + 2.0 + 0.0001 * context_before) / 1000

    return cost


def run_simdistserve(model, tp, arrivals, prompts, outputs, **options):
    """TTFT, decode time, TPOT of each request and the makespan, all in ms."""
    flags = preset("simdistserve-vllm", max_num_batched_tokens=FITTED[model, tp][3])
    rows = zip(arrivals, prompts, outputs, strict=True)
    requests = [Request(i, float(a), p, out + 1) for i, (a, p, out) in enumerate(rows)]
    result = simulate(requests, flags, 1, "round_robin", fitted_cost(model, tp), **options).requests
    ttft = np.array([1000 * r.ttft_s for r in result])
    decode = np.array([1000 * (r.finish_s - r.first_token_s) for r in result])
    return ttft, decode, decode / np.array(outputs), 1000 * max(r.finish_s for r in result)


def test_simdistserve_one_request():
    ttft, decode, _, _ = run_simdistserve("13b", 1, [0.0], [512], [4])
    assert ttft[0] == pytest.approx(99.1614, abs=1e-3)
    assert decode[0] == pytest.approx(103.5687, abs=1e-3)


@pytest.mark.parametrize("round_times", [True, False])
def test_simdistserve_eight_requests(round_times):
    arrivals = [0.04 * i for i in range(8)]
    ttft, _, _, _ = run_simdistserve("13b", 1, arrivals, [128, 1024] * 4, [16] * 8, round_times=round_times)
    want = [43.1825, 180.6875, 506.9059, 466.9059, 426.9059, 386.9059, 542.5412, 502.5412]
    assert ttft == pytest.approx(want, abs=1e-3)


@pytest.mark.parametrize(
    ("rate", "want"),
    [
        (2, (205.033, 329.545, 89.476, 96.061, 165358.145)),
        (4, (205.345, 333.301, 376.598, 600.502, 151850.783)),
    ],
)
def test_simdistserve_three_hundred_requests(rate, want):
    arrivals = [i / rate for i in range(300)]
    prompts = [64 + (397 * i) % 1900 for i in range(300)]
    outputs = [16 + (131 * i) % 400 for i in range(300)]
    ttft, _, tpot, makespan = run_simdistserve("13b", 1, arrivals, prompts, outputs)
    got = (*np.quantile(ttft, [0.5, 0.9]), *np.quantile(tpot, [0.5, 0.9]), makespan)
    assert got == pytest.approx(want, abs=1e-3)


def heavy_tailed_workload():
    """300 requests with log-normal lengths and exponential gaps (at rate 1) from additive recurrences."""

    def uniform(step: float, i: int) -> float:
        return ((i + 1) * step) % 1.0

    normal = NormalDist().inv_cdf
    prompts, outputs, gaps = [], [], []
    for i in range(300):
        prompt = math.exp(6.2 + 1.0 * normal(uniform(0.6180339887498949, i)))
        prompts.append(int(min(1800, max(4, prompt))))
        output = math.exp(4.9 + 0.9 * normal(uniform(0.7548776662466927, i)))
        outputs.append(int(min(2047 - prompts[-1], max(4, output))))
        gaps.append(-math.log(1 - uniform(0.5698402909980532, i)))
    return np.cumsum(gaps), prompts, outputs


@pytest.mark.parametrize(
    ("model", "tp", "ttft_ms", "want"),
    [
        pytest.param("13b", 1, 250, 0.0, marks=pytest.mark.slow),
        ("13b", 2, 250, 2.109),
        ("13b", 4, 250, 1.602),
        ("66b", 4, 400, 0.0),
        ("66b", 8, 400, 0.352),
    ],
)
def test_simdistserve_goodput(model, tp, ttft_ms, want):
    """Highest rate per GPU whose P90 of TTFT and P90 of TPOT are, separately, under their limits."""
    arrivals, prompts, outputs = heavy_tailed_workload()
    low, high = 0.0, 5.0
    while high - low > 0.05:
        rate = (low + high) / 2
        ttft, _, tpot, _ = run_simdistserve(model, tp, arrivals / (rate * tp), prompts, outputs)
        if np.quantile(ttft, 0.9) < ttft_ms and np.quantile(tpot, 0.9) < 100:
            low = rate
        else:
            high = rate
    assert low == pytest.approx(want, abs=5e-4)


# --- queueing theory ------------------------------------------------------------------------------


def run_single_server(arrivals, service_s: float):
    """One sequence at a time, one token each: a single server with constant service."""
    flags = preset("vllm-v1", max_num_seqs=1)
    requests = [Request(i, a, 1, 1) for i, a in enumerate(arrivals)]
    result = simulate(requests, flags, 1, "round_robin", lambda stats: service_s).requests
    return [r.scheduled_s - r.arrival_s for r in result], [r.ttft_s for r in result]


def poisson_arrivals(seed: int, count: int, rate: float) -> list[float]:
    rng = random.Random(seed)
    arrivals, now = [], 0.0
    for _ in range(count):
        now += rng.expovariate(rate)
        arrivals.append(round(now * 2**20) / 2**20)  # on the grid of arrivals
    return arrivals


@pytest.mark.parametrize("load", [0.3, 0.8, 1.5])
def test_waiting_follows_lindley(load):
    """W' = max(0, W + D - gap) holds exactly, stable or not, because all times are dyadic."""
    service_s = 0.0625
    arrivals = poisson_arrivals(1, 4000, load / service_s)
    waits, ttfts = run_single_server(arrivals, service_s)
    want = [0.0]
    for gap in np.diff(arrivals):
        want.append(max(0.0, want[-1] + service_s - gap))
    assert waits == want
    assert ttfts == [wait + service_s for wait in want]


@pytest.mark.parametrize("load", [pytest.param(0.3, marks=pytest.mark.slow), 0.5,
                                  pytest.param(0.7, marks=pytest.mark.slow)])
def test_mean_waiting_is_md1(load):
    """Mean TTFT of an M/D/1 queue, D + R D^2 / (2 (1 - R D)), within 4 standard errors of 50 batch means.

    Batches of 1000 requests are tens of relaxation times of the queue long, so their means are independent; a
    standard error over 3 % of the waiting time would make the test empty.
    """
    service_s, batches, length = 1 / 64, 50, 1000
    rate = load / service_s
    _, ttfts = run_single_server(poisson_arrivals(7, batches * length, rate), service_s)
    means = [mean(ttfts[i * length : (i + 1) * length]) for i in range(batches)]
    error = np.std(means, ddof=1) / math.sqrt(batches)
    waiting = rate * service_s**2 / (2 * (1 - rate * service_s))
    assert error < 0.03 * waiting
    assert abs(mean(means) - service_s - waiting) < 4 * error
