"""APEX+: plans, capacity, batching and pipeline rules, and the serving runs it was checked on."""

import math
import random

import numpy as np
import pandas as pd
import pytest

from jaxsim._core.errors import InputError
from jaxsim.cost import apex, operators
from jaxsim.cost.apex import ApexRequest, ParallelPlan, Queue, finish_iteration, next_iteration, replay
from jaxsim.spec.model import load_model

pytestmark = pytest.mark.unoptimised

LLAMA, MIXTRAL = load_model("llama-3-70b"), load_model("mixtral-8x22b")
TP2 = ParallelPlan(1, 1, 1, 2, 1, 2)
PP2 = ParallelPlan(1, 2, 1, 1, 1, 1)
DATA_ATTENTION = ParallelPlan(1, 1, 2, 1, 1, 2)


# Plans and capacity

def test_plans_of_the_example():
    """Published: three plans of Llama-3-70B fit two H100, with 63.8, 75.0 and 63.8 "GB" (GiB) of parameters each."""
    fit = {plan: apex.parameter_bytes(LLAMA, plan) / apex.GIB for plan in apex.candidate_plans(LLAMA, 2)
           if apex.capacity_tokens(LLAMA, plan, 80 * apex.GIB)}
    assert set(fit) == {TP2, PP2, DATA_ATTENTION}
    assert [round(fit[plan] + 1e-9, 1) for plan in (TP2, DATA_ATTENTION, PP2)] == [63.8, 75.0, 63.8]


@pytest.mark.parametrize("devices", [1, 4, 6, 8, 16])
def test_plans_keep_to_the_rules(devices):
    plans = apex.candidate_plans(LLAMA, devices)
    assert len(set(plans)) == len(plans)
    for p in plans:
        assert p.replicas * p.stages * p.attention_replicas * p.attention_ranks == devices
        assert p.replicas * p.stages * p.ffn_replicas * p.ffn_ranks == devices
        assert LLAMA.layers % p.stages == 0
        assert math.gcd(p.attention_replicas, p.ffn_replicas) == 1
    assert ParallelPlan(1, 1, 1, devices, 1, devices) in plans


def test_capacity_is_what_is_left_by_the_parameters_and_a_gibibyte():
    left = 80 * apex.GIB - apex.GIB - apex.parameter_bytes(LLAMA, TP2)
    # 327,680 bytes a token over two ranks.
    assert apex.capacity_tokens(LLAMA, TP2, 80 * apex.GIB) == left // (327_680 / 2)
    # A stage has half of the layers, and shares its device among two batches.
    assert apex.capacity_tokens(LLAMA, PP2, 80 * apex.GIB) == left // (327_680 / 2) // 2
    assert apex.capacity_tokens(LLAMA, ParallelPlan(1, 1, 1, 1, 1, 1), 80 * apex.GIB) == 0


def test_kv_heads_are_copied_where_there_are_too_few():
    over_8, over_16 = (apex.parameter_bytes(LLAMA, ParallelPlan(1, 1, 1, n, 1, n)) for n in (8, 16))
    assert over_16 > over_8 / 2
    assert over_16 - over_8 / 2 == 80 * 2 * 8192 * 128 * 2 / 2


def test_experts_are_shared_by_the_ranks():
    active = 56 * 8 * 3 * 6144 * 16384
    plans = [ParallelPlan(1, 1, 1, n, 1, n) for n in (1, 8)]
    one, eight = (apex.parameter_bytes(MIXTRAL, plan) for plan in plans)
    assert one == pytest.approx(8 * eight)
    assert one == pytest.approx(2 * (active + 56 * 2 * (48 + 8) * 128 * 6144))


# Batching

def two(queue, capacity, clock=0.0, **rest):
    requests = [ApexRequest(0.0, 10, 5), ApexRequest(0.0, 10, 5), ApexRequest(1.0, 10, 5)]
    return next_iteration(requests, queue, clock, capacity, **rest)


def test_prompts_join_whole_beside_decodes():
    queue, first = two(Queue(), 100)
    assert first.requests == (0, 1) and first.inputs == (10, 10)
    requests = [ApexRequest(0.0, 10, 5), ApexRequest(0.0, 10, 5), ApexRequest(1.0, 10, 5)]
    queue, done = finish_iteration(requests, queue)
    assert done == () and queue.cached_tokens == 20
    queue, second = two(queue, 100, clock=1.0)
    assert second.inputs == (1, 1, 10) and second.contexts == (11, 11, 0)


@pytest.mark.parametrize("rest, joined", [
    (dict(), 2), (dict(max_batch=1), 1), (dict(max_input_tokens=19), 1), (dict(max_input_tokens=20), 2)])
def test_limits_of_joining(rest, joined):
    assert two(Queue(), 100, **rest)[0].joined == joined


@pytest.mark.parametrize("capacity, joined", [(9, 0), (10, 1), (19, 1), (20, 2), (100, 2)])
def test_requests_join_where_their_kv_fits(capacity, joined):
    assert two(Queue(), capacity)[0].joined == joined


def test_the_newest_running_request_is_evicted():
    queue = Queue((0, 1), (), (1, 1), 2, 20)
    queue, iteration = two(queue, 20)
    assert iteration.evicted == (1,) and iteration.requests == (0,)
    assert queue.stopped == (1,) and queue.joined == 2


def test_nothing_joins_while_one_is_stopped():
    queue = Queue((0,), (1,), (2, 2), 2, 11)
    queue, iteration = two(queue, 24, clock=5.0)
    # 12 cached; the stopped one needs 13, the new one 10.
    assert iteration.requests == (0,) and queue.stopped == (1,) and queue.joined == 2


def test_stopped_requests_resume_by_id_at_the_cost_of_a_token():
    queue = Queue((), (1, 0), (2, 2), 2, 0)
    queue, iteration = two(queue, 100)
    assert iteration.requests == (0, 1) and iteration.inputs == (1, 1)
    assert queue.cached_tokens == 26


@pytest.mark.parametrize("seed", range(8))
def test_replays_keep_to_the_laws(seed):
    rng = random.Random(seed)
    arrivals = sorted(rng.uniform(0, 20) for _ in range(60))
    requests = [ApexRequest(t, rng.randint(1, 40), rng.randint(1, 30)) for t in arrivals]
    capacity, evicted = rng.choice((80, 150, 400)), []

    def seconds(iteration):
        assert 1 <= len(iteration.requests) <= 8
        assert len(set(iteration.requests)) == len(iteration.requests)
        evicted.extend(iteration.evicted)
        return 0.1 + 0.001 * sum(iteration.inputs)

    run = replay(requests, capacity, seconds, max_batch=8)
    assert [len(tokens) for tokens in run.token_seconds] == [r.output_tokens for r in requests]
    assert run.end_s >= arrivals[-1] and run.end_s == pytest.approx(sum(run.iteration_seconds), abs=21)
    assert min(run.iteration_seconds) >= 0.1 and run.tpot_s >= 0.1 and run.ttft_s >= 0.1
    # Roomy runs never evict, tight ones do.
    assert bool(evicted) == (capacity == 80) or capacity == 150


def test_kv_in_use_returns_to_nothing():
    requests = [ApexRequest(0.0, 7, 9), ApexRequest(0.0, 3, 4), ApexRequest(0.0, 5, 1)]
    queue, seen = Queue(), []
    while queue.joined < 3 or queue.running or queue.stopped:
        queue, _ = next_iteration(requests, queue, 0.0, 18)
        seen.append(queue.cached_tokens)
        queue, _ = finish_iteration(requests, queue)
    assert queue.cached_tokens == 0 and max(seen) <= 18


def test_ttft_leaves_out_the_wait():
    run = replay([ApexRequest(0.0, 10, 3), ApexRequest(0.0, 10, 3)], 13, lambda iteration: 1.0)
    assert run.end_s == 6.0 and run.ttft_s == 1.0 and run.tpot_s == 1.0


def test_latencies_are_times_the_stages():
    run = replay([ApexRequest(0.0, 10, 3)], 100, lambda iteration: 1.0, stages=2)
    assert run.token_seconds == ((2.0, 2.0, 2.0),)


# Seconds

def test_pipeline_is_as_slow_as_its_slowest_stage():
    assert float(apex.pipeline_seconds(np.array([1.0, 2.0]), 2)) == 3.0
    # Windows (1, 3), (3, 2), (2, 5); the last one, (5, 1), is left out.
    assert float(apex.pipeline_seconds(np.array([1.0, 3.0, 2.0, 5.0, 1.0]), 2)) == 11.0


@pytest.mark.parametrize("tokens, expected", [(1, 1), (3, 1), (4, 1), (8, 2), (1000, 250)])
def test_tokens_of_an_expert(tokens, expected):
    assert apex.expert_tokens(tokens, 2, 8) == expected
    assert float(operators.distinct_experts(MIXTRAL, [float(tokens)], operators.ALL)[0]) == 8


def test_mixed_precision_runs_in_the_widest():
    assert apex.compute_precision("fp8", "fp8", "fp16") == "fp16"
    assert apex.compute_precision("fp8", "fp8", "fp8") == "fp8"


def test_columns_of_the_tables():
    assert [apex.table_columns(n) for n in (1, 128, 129)] == [128, 128, 256]


def test_tables_go_on_as_their_last_slope():
    sizes, seconds = np.array([0.0, 10.0, 20.0]), np.array([1.0, 2.0, 4.0])
    found = apex.tabulated_seconds(np.array([0.0, 5.0, 20.0, 40.0]), sizes, seconds)
    assert np.allclose(found, [1.0, 1.5, 4.0, 8.0])


def test_fits_of_collectives(shared_data):
    """Published: mean error of the fits 3 to 17 % (16-bit rows; a 32-bit all-to-all reads 1,872 us)."""
    files = {"h100": "apex_nccl_H100-SXM-80GB.csv", "h200": "apex_nccl_H200-SXM-141GB.csv"}
    tables = {device: pd.read_csv(shared_data / "ops" / file) for device, file in files.items()}
    errors = []
    for device, collective, ranks in apex.COLLECTIVES:
        table = tables[device]
        name = {"all_to_all": "alltoall", "send_recv": "sendrecv"}.get(collective, collective)
        rows = table[(table.collective == name) & (table.num_gpus_per_node == ranks) & (table["dtype"] == "half")]
        assert len(rows) == 19
        predicted = [apex.alpha_beta_seconds(device, collective, ranks, 1024 * size) for size in rows["size(kb)"]]
        errors.append(np.mean(np.abs(np.array(predicted) / (1e-6 * rows["time(us)"].to_numpy()) - 1)))
    assert (round(min(errors), 2), round(max(errors), 2)) == (0.03, 0.17)


# The measured table

def test_the_measured_table_decomposes():
    """Published: within 3.2 % at an efficiency of 0.82 to 0.91 and 5.1 ms (chat) to 8.8 ms (creation at 0.5)."""
    fits = {name: apex.fit_step({n: cells[name][1] / 1e3 for n, cells in apex.MEASURED_MS.items()}, 141.1e9, 3.35e12,
                                160) for name in apex.WORKLOADS}
    assert round(max(fit.largest_error for fit in fits.values()), 3) == 0.032
    efficiencies = [fit.efficiency for fit in fits.values()]
    assert (round(min(efficiencies), 2), round(max(efficiencies), 2)) == (0.82, 0.91)
    assert round(1e3 * min(fit.fixed_s for fit in fits.values()), 1) == pytest.approx(5.1, abs=0.05)
    assert round(1e3 * fits["creation 0.5"].fixed_s, 1) == 8.8


def test_a_fit_gives_its_step_back():
    steps = {n: apex.step_seconds(5e-3, 1e11, n, 3e12, 0.85, 160) for n in (2, 4, 8)}
    fit = apex.fit_step(steps, 1e11, 3e12, 160)
    assert fit.fixed_s == pytest.approx(5e-3) and fit.efficiency == pytest.approx(0.85)
    assert fit.largest_error < 1e-9


@pytest.mark.parametrize("ranks, workload", [(2, name) for name in apex.WORKLOADS])
def test_measured_tpot_and_ttft_at_two_ranks(ranks, workload):
    ttft_ms, tpot_ms = apex.MEASURED_MS[ranks][workload]
    found = apex.predicted(ranks, workload)
    assert 1e3 * float(found.tpot_s) == pytest.approx(tpot_ms, rel=0.05)
    assert 1e3 * float(found.ttft_s) == pytest.approx(ttft_ms, rel=0.13)


def test_measured_tpot_at_eight_ranks():
    """Within 10 % of five cells; creation at 0.5 is missed by 17 %, and prompts are half as long as measured."""
    error = {name: 1e3 * float(apex.predicted(8, name).tpot_s) / cells[1] - 1
             for name, cells in apex.MEASURED_MS[8].items()}
    missed = error.pop("creation 0.5")
    assert -0.2 < missed < -0.1
    assert all(-0.11 < e < 0 for e in error.values())
    whole, cut = (1e3 * float(apex.predicted(8, "summarization 0.25", chunk).ttft_s) for chunk in (None, 512))
    assert whole < 0.65 * 231 and cut == pytest.approx(231, rel=0.15)


def test_steady_state_of_an_idle_replica():
    idle = apex.steady_state(0.2, np.array([0.01, 0.02]), 0.0, 100, front_end_s=0.005)
    assert float(idle.tpot_s) == pytest.approx(0.01) and float(idle.ttft_s) == pytest.approx(0.205)
    # One other on average: batch 2.
    busy = apex.steady_state(0.0, np.array([0.01, 0.02, 0.03]), 0.5, 100)
    assert float(busy.tpot_s) == pytest.approx(0.02) and float(busy.others) == pytest.approx(1.0)


@pytest.mark.parametrize("call, field", [
    (lambda: apex.candidate_plans(LLAMA, 0), "num_devices"),
    (lambda: apex.capacity_tokens(load_model("deepseek-v3"), TP2, 1e12), "model.name"),
    (lambda: replay([ApexRequest(0.0, 10, 5)], 14, lambda iteration: 1.0), "requests[0]"),
    (lambda: replay([ApexRequest(0.0, 0, 5)], 14, lambda iteration: 1.0), "requests[0]"),
    (lambda: replay([ApexRequest(1.0, 1, 1), ApexRequest(0.0, 1, 1)], 9, lambda iteration: 1.0),
     "requests[1].arrival_s"),
    (lambda: apex.pipeline_seconds(np.ones(3), 0), "stages"),
    (lambda: apex.compute_precision("int3"), "dtype"),
    (lambda: apex.compute_precision(), "dtype"),
    (lambda: apex.alpha_beta_seconds("h100", "all_reduce", 3, 1.0), "collective"),
    (lambda: apex.fit_step({2: 0.01}, 1e11, 3e12, 160), "tpot_s"),
    (lambda: apex.steady_state(3.0, np.ones(4), 0.5, 1), "rate_per_s"),
    (lambda: apex.steady_state(0.0, np.full(2, 0.02), 1.0, 100), "decode_s"),
    (lambda: apex.predicted(3, "chat 0.5"), "workload"),
])
def test_errors_name_the_field(call, field):
    with pytest.raises(InputError) as caught:
        call()
    assert caught.value.field == field
