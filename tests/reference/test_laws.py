"""Laws of the reference simulator over random scenarios of every engine, and rules worked out by hand.

The simulator checks conservation of blocks and tokens, limits, the order of time and the empty end by itself;
here it is fed with scenarios tight enough to preempt, on costs and arrivals that tie often.
"""

import random
from types import SimpleNamespace

import pytest

from . import memory, passes, simulator
from .simulator import UNLIMITED, BatchStatsRef, Flags, Request, preset, simulate

PREEMPTING = ("vllm-v1", "vllm-v1-priority", "vllm-v1-async", "vllm-v0", "sarathi", "sglang")
RESERVING = ("orca", "static", "tensorrt-llm", "simdistserve-vllm")


def dyadic_cost(stats: BatchStatsRef) -> float:
    """Exact in float32: a small multiple of 2^-12 s."""
    units = 16 + 2 * stats.prefill_tokens + stats.decode_context // 4 + stats.num_decode + stats.num_prefill
    return units / 2**12


def random_scenario(name: str, seed: int):
    """Requests, flags, number of instances and router of a small scenario that fits its pool, just."""
    rng = random.Random(f"{name} {seed}")
    block_size = 1 if name == "sglang" else rng.choice([1, 2, 4, 8])
    count, horizon = rng.randint(1, 24), rng.choice([0, 64, 512, 2048])
    lengths = [(rng.randint(1, 24), rng.randint(1, 24)) for _ in range(count)]
    limits = [out + rng.choice([0, 0, 5]) for _, out in lengths]
    arrivals = sorted(rng.randint(0, horizon) / 2**10 for _ in range(count))
    requests = [
        Request(i, arrivals[i], p, out, limits[i], rng.randint(0, 2), (rng.random(), rng.random()))
        for i, (p, out) in enumerate(lengths)
    ]
    most = max(p + limit for (p, _), limit in zip(lengths, limits, strict=True))
    max_num_seqs = rng.randint(1, 8)
    smallest = -(-most // block_size)
    numbers = {
        "block_size": block_size,
        "num_blocks": smallest + rng.randint(0, 2 * smallest),
        "max_model_len": most,
        "max_num_seqs": max_num_seqs,
        "max_num_batched_tokens": rng.randint(max_num_seqs, 40),
    }
    if name in ("vllm-v0", "sarathi"):  # one percent of so small a pool is no block
        numbers["watermark_blocks"] = rng.choice([0, 0, 2])
        numbers["num_blocks"] += numbers["watermark_blocks"]
    if not preset(name).chunked_prefill:
        numbers["max_num_batched_tokens"] = max(most, max_num_seqs) + rng.randint(0, 40)
    if name in ("orca", "static"):
        numbers["max_num_batched_tokens"] = UNLIMITED
    if name == "sglang":
        numbers |= {
            "new_token_ratio_init": rng.choice([0.0, 0.25, 0.5]),
            "new_token_ratio_floor": 0.125,
            "new_token_ratio_decay": 0.0625,
            "retract_free_tokens": rng.choice([1, 3]),
        }
    if name == "simdistserve-vllm":
        numbers |= {"decode_context_limit": most + rng.randint(0, 3 * most)}
    router = rng.choice(sorted(simulator.ROUTERS))
    return requests, preset(name, **numbers), rng.randint(1, 3), router


@pytest.mark.parametrize("name", PREEMPTING + RESERVING)
def test_laws_on_random_scenarios(name):
    num_preemptions = num_ties = 0
    for seed in range(60):
        requests, flags, num_instances, router = random_scenario(name, seed)
        result = simulate(requests, flags, num_instances, router, dyadic_cost)
        num_preemptions += sum(r.preemptions for r in result.requests)
        num_ties += result.num_exact_ties
        assert all(r.status == "finished" and 0 <= r.ttft_s <= r.e2e_s for r in result.requests)
        assert_work_conserving(result, num_instances)
        if flags.order == "fcfs":
            for instance in range(num_instances):
                starts = [r.scheduled_s for r in result.requests if r.instance == instance]
                assert starts == sorted(starts), "overtaken in a first-come queue"
    assert num_ties > 0
    assert (num_preemptions > 0) == (name in PREEMPTING)


def assert_work_conserving(result, num_instances: int):
    """An instance pauses only when it has nobody, and starts again at the instant somebody arrives."""
    for instance in range(num_instances):
        served = [r for r in result.requests if r.instance == instance]
        records = [r for r in result.iterations if r.instance == instance]
        arrivals = {r.arrival_s for r in served}
        assert not records or records[0].start_s == min(arrivals)
        for before, after in zip(records, records[1:], strict=False):
            assert before.end_s <= after.start_s
            if before.end_s == after.start_s:
                continue
            assert after.start_s in arrivals
            assert all(r.finish_s <= before.end_s or r.arrival_s >= after.start_s for r in served)


@pytest.mark.parametrize("name", PREEMPTING + RESERVING)
def test_instances_in_turn_are_separate_clusters(name):
    """Round robin over three instances equals three runs of every third request."""
    for seed in range(8):
        requests, flags, _, _ = random_scenario(name, seed)
        together = simulate(requests, flags, 3, "round_robin", dyadic_cost).requests
        for instance in range(3):
            alone = simulate(requests[instance::3], flags, 1, "round_robin", dyadic_cost).requests
            got = [(r.id, r.scheduled_s, r.first_token_s, r.finish_s) for r in together[instance::3]]
            assert got == [(r.id, r.scheduled_s, r.first_token_s, r.finish_s) for r in alone]


# --- the engine's loop against its closed form ----------------------------------------------------


def schedule_running_closed_form(instance, plan, flags):
    """Preempt the last admitted until the sum of needs fits; then everybody gets its tokens."""

    def needs():
        decoding = [job for job in instance.running if job.is_prefilled]
        forming = [job for job in instance.running if not job.is_prefilled]
        crossings = [job.computed % flags.block_size == 0 for job in decoding]
        chunks = [min(job.known - job.computed, plan.budget - len(decoding)) for job in forming]
        if flags.decode_needs_free_block == "always":
            return decoding, forming, chunks, (sum(crossings[:-1]) + 1 if decoding else 0)
        lacking = sum(
            -(-(job.computed + chunk) // flags.block_size) - -(-job.computed // flags.block_size)
            for job, chunk in zip(forming, chunks, strict=True)
        )
        return decoding, forming, chunks, sum(crossings) + lacking

    while needs()[-1] > instance.free_blocks:
        passes.preempt(instance, instance.running[-1], plan, flags)
    decoding, forming, chunks, _ = needs()
    for job, tokens in [(job, 1) for job in decoding] + list(zip(forming, chunks, strict=True)):
        memory.take(instance, job, memory.blocks_to_grow(job, tokens, flags))
        plan.add(job, tokens)


@pytest.mark.parametrize("name", ["vllm-v1", "vllm-v1-async", "vllm-v0", "sarathi"])
def test_sequential_loop_equals_closed_form(name, monkeypatch):
    scenarios = [random_scenario(name, seed) for seed in range(1000, 1080)]
    sequential = [simulate(*scenario, dyadic_cost) for scenario in scenarios]
    monkeypatch.setattr(passes, "schedule_running", schedule_running_closed_form)
    closed = [simulate(*scenario, dyadic_cost) for scenario in scenarios]
    assert sequential == closed
    assert any(r.preemptions for result in sequential for r in result.requests)


# --- rules by hand --------------------------------------------------------------------------------


def unit_steps(requests, flags):
    """Iterations of one second on one instance: {start: record}, and the requests."""
    result = simulate(requests, flags, 1, "round_robin", lambda stats: 1.0)
    return {record.start_s: record for record in result.iterations}, result.requests


def test_priority_victim_that_lacks_the_block_ends_the_loop():
    """The low-priority request preempts itself, the urgent one behind it goes on at the same instant."""
    flags = preset("vllm-v1-priority", num_blocks=4, block_size=2, max_num_seqs=4)
    steps, requests = unit_steps([Request(0, 0, 2, 5, priority=1), Request(1, 1, 2, 5, priority=0)], flags)
    assert [steps[t].free_blocks for t in range(3)] == [3, 1, 0]
    assert (steps[3].preempted, steps[3].batch, steps[3].free_blocks) == ((0,), {1: 1}, 2)
    assert [steps[t].batch for t in (4, 5, 6, 7)] == [{1: 1}, {1: 1}, {0: 5}, {0: 1}]
    assert [r.finish_s for r in requests] == [8, 6]


def test_priority_victim_may_have_been_scheduled_already():
    """The urgent request lacks a block after the other got its token: that one is taken out again."""
    flags = preset("vllm-v1-priority", num_blocks=4, block_size=2, max_num_seqs=4)
    steps, _ = unit_steps([Request(0, 0, 1, 6, priority=1), Request(1, 1, 3, 5, priority=0)], flags)
    assert (steps[2].batch, steps[2].free_blocks) == ({0: 1, 1: 1}, 0)
    assert (steps[3].preempted, steps[3].batch, steps[3].free_blocks) == ((0,), {1: 1}, 1)


def test_nobody_is_skipped_behind_a_withdrawn_victim():
    """As before, with a third request behind: the list moved up by one and it still gets its token."""
    flags = preset("vllm-v1-priority", num_blocks=5, block_size=2, max_num_seqs=4)
    requests = [Request(0, 0, 1, 6, priority=1), Request(1, 1, 3, 5), Request(2, 2, 1, 2)]
    steps, _ = unit_steps(requests, flags)
    assert (steps[2].batch, steps[2].free_blocks) == ({0: 1, 1: 1, 2: 1}, 0)
    assert (steps[3].preempted, steps[3].batch, steps[3].free_blocks) == ((0,), {1: 1, 2: 1}, 1)


def test_the_token_of_a_withdrawn_victim_is_refunded():
    """The chunk behind gets the budget of 4 less one decode, not two."""
    flags = preset("vllm-v1-priority", num_blocks=6, block_size=2, max_num_seqs=4, max_num_batched_tokens=4)
    requests = [Request(0, 0, 3, 6, priority=1), Request(1, 1, 3, 5), Request(2, 2, 9, 1)]
    steps, _ = unit_steps(requests, flags)
    assert (steps[2].batch, steps[2].free_blocks) == ({0: 1, 1: 1, 2: 2}, 0)
    assert (steps[3].preempted, steps[3].batch, steps[3].free_blocks) == ((0,), {1: 1, 2: 3}, 0)


def test_priority_queue_lets_the_urgent_overtake():
    flags = preset("vllm-v1-priority", max_num_seqs=1)
    requests = [Request(0, 0, 4, 2), Request(1, 0.25, 4, 2, priority=1), Request(2, 0.5, 4, 2)]
    _, results = unit_steps(requests, flags)
    assert [r.scheduled_s for r in results] == [0, 4, 2]


@pytest.mark.parametrize(("name", "want"), [("vllm-v1", [0, 1, 1]), ("vllm-v1-async", [0, 2, 2])])
def test_asynchronous_scheduling_sees_arrivals_one_iteration_late(name, want):
    """An arrival in an iteration, and one at its end, wait for the end of the next."""
    requests = [Request(0, 0, 4, 5), Request(1, 0.5, 4, 5), Request(2, 1, 4, 5)]
    _, results = unit_steps(requests, preset(name))
    assert [r.scheduled_s for r in results] == want


def test_asynchronous_scheduling_does_not_idle():
    """With nothing left to run, whoever arrived meanwhile starts at once."""
    _, results = unit_steps([Request(0, 0, 4, 1), Request(1, 0.5, 4, 1)], preset("vllm-v1-async"))
    assert [r.scheduled_s for r in results] == [0, 1]


def loose_sglang(**numbers):
    """SGLang's rules without its margins, so that small pools show them one at a time."""
    loose = {"retract_to": "front", "expected_new_admissions": "ratio", "is_expected_strict": False,
             "resets_ratio_when_idle": False}
    return preset("sglang", **{**loose, **numbers})


def test_sglang_retracts_the_fewest_outputs_longest_prompt_first():
    flags = loose_sglang(
        num_blocks=12,
        new_token_ratio_init=0.0,
        new_token_ratio_floor=0.0,
        new_token_ratio_decay=0.0,
        retract_free_tokens=2,
    )
    steps, results = unit_steps([Request(0, 0, 4, 4), Request(1, 0, 2, 6), Request(2, 0, 1, 5)], flags)
    assert (steps[0].batch, steps[0].free_blocks) == ({0: 4, 1: 2, 2: 1}, 5)
    assert (steps[1].batch, steps[1].free_blocks) == ({0: 1, 1: 1, 2: 1}, 2)
    # Three tokens do not fit in two; all emitted two, request 0 has the longest prompt. The estimate: 8/11.
    assert (steps[2].preempted, steps[2].batch, steps[2].free_blocks) == ((0,), {1: 1, 2: 1}, 5)
    # At 5 request 0 wants 6 + 2 tokens and 6 are free; at 6 it is alone.
    assert [steps[t].batch for t in (5, 6, 7)] == [{1: 1}, {0: 6}, {0: 1}]
    assert [r.finish_s for r in results] == [8, 6, 5]


@pytest.mark.parametrize(("retract_to", "want"), [("front", [8, 10]), ("back", [10, 8])])
def test_where_a_retracted_request_waits(retract_to, want):
    """Request 3 waits when 0 is retracted and needs the whole pool: at 6 whoever is first goes alone."""
    flags = loose_sglang(
        num_blocks=12,
        new_token_ratio_init=0.0,
        new_token_ratio_floor=0.0,
        new_token_ratio_decay=0.0,
        retract_free_tokens=2,
        max_num_seqs=3,
        retract_to=retract_to,
    )
    requests = [Request(0, 0, 4, 4), Request(1, 0, 2, 6), Request(2, 0, 1, 5), Request(3, 1.5, 10, 2)]
    _, results = unit_steps(requests, flags)
    assert [results[0].finish_s, results[3].finish_s] == want


@pytest.mark.parametrize(("expected_new_admissions", "want"), [("ratio", [0, 0]), ("full", [0, 5])])
def test_sglang_admissions_of_one_pass(expected_new_admissions, want):
    """The first leaves 8 tokens, less none or all of the 5 it may still emit; the second wants 6."""
    flags = loose_sglang(
        num_blocks=12,
        new_token_ratio_init=0.0,
        new_token_ratio_floor=0.0,
        expected_new_admissions=expected_new_admissions,
        admit="when_empty",
    )
    _, results = unit_steps([Request(0, 0, 4, 5), Request(1, 0, 2, 4)], flags)
    assert [r.scheduled_s for r in results] == want


def test_limited_decodes_take_turns():
    """Contexts in queue order: 5 + 7 fit the limit; 2 + 6 but not 8; 8 + 3. A misfit stops the batch."""
    flags = preset("simdistserve-vllm", max_num_batched_tokens=64, decode_context_limit=12)
    steps, _ = unit_steps([Request(0, 0, 4, 3), Request(1, 0, 6, 3), Request(2, 0, 1, 3)], flags)
    assert [set(steps[t].batch) for t in range(4)] == [{0, 1, 2}, {0, 1}, {0, 2}, {1, 2}]
    steps, _ = unit_steps([Request(0, 0, 4, 3), Request(1, 0, 8, 3), Request(2, 0, 1, 3)], flags)
    assert [set(steps[t].batch) for t in range(3)] == [{0, 1, 2}, {0}, {1, 2}]


@pytest.mark.parametrize(("name", "want"), [("orca", [0, 0, 1, 3]), ("static", [0, 0, 3, 3])])
def test_static_batches_wait_for_the_longest(name, want):
    requests = [Request(0, 0, 8, 3), Request(1, 0, 8, 1), Request(2, 0, 8, 9), Request(3, 0, 8, 9)]
    _, results = unit_steps(requests, preset(name, max_num_seqs=2, max_model_len=32))
    assert [r.scheduled_s for r in results] == want


@pytest.mark.parametrize(("max_tokens", "want"), [(8, 2), (9, 4)])
def test_guaranteed_no_evict_reserves_the_output_limit(max_tokens, want):
    """Four blocks of 8: the first takes two; 8 + 8 tokens fit beside it, a pass later than they came (the overlap
    scheduler), 8 + 9 wait for its end.
    """
    flags = preset("tensorrt-llm", num_blocks=4, block_size=8)
    requests = [Request(0, 0, 8, 4, 8), Request(1, 1, 8, 4, max_tokens)]
    _, results = unit_steps(requests, flags)
    assert results[1].scheduled_s == want


def test_sarathi_reserves_the_whole_prompt_and_chunks_it():
    flags = preset("sarathi", num_blocks=200, block_size=4, max_num_batched_tokens=8, max_num_seqs=4)
    assert flags.watermark_blocks == 2
    steps, _ = unit_steps([Request(0, 0, 4, 6), Request(1, 1, 20, 2)], flags)
    assert [steps[t].batch for t in range(5)] == [
        {0: 4},
        {0: 1, 1: 7},
        {0: 1, 1: 7},
        {0: 1, 1: 6},
        {0: 1, 1: 1},
    ]
    assert [steps[t].free_blocks for t in range(4)] == [199, 193, 193, 193]


def test_batch_statistics():
    """Second step of a chunked prompt beside a decode: contexts count the token of the step."""
    flags = preset("vllm-v1", max_num_batched_tokens=8, max_num_seqs=4)
    steps, _ = unit_steps([Request(0, 0, 4, 6), Request(1, 1, 20, 2)], flags)
    assert steps[2].stats == BatchStatsRef(
        num_decode=1,
        decode_context=6,
        num_prefill=1,
        prefill_tokens=7,
        prefill_pairs=14**2 - 7**2,
        prefill_context=14,
        num_sampled=1,
        chunks=((7, 7),),
    )
    assert steps[3].stats.num_sampled == 2


def test_routers():
    def instances(*outstanding):
        return [SimpleNamespace(outstanding=n, free_blocks=100 - n) for n in outstanding]

    def choose(name, loads, uniforms=(0.0, 0.0), num_routed=0):
        request = Request(0, 0.0, 1, 1, uniforms=uniforms)
        return simulator.ROUTERS[name](request, instances(*loads), num_routed)

    assert [choose("round_robin", (0, 0, 0), num_routed=n) for n in range(4)] == [0, 1, 2, 0]
    assert [choose("random", (0,) * 4, (u, 0.0)) for u in (0.0, 0.25, 0.999)] == [0, 1, 3]
    assert choose("least_outstanding", (3, 1, 1)) == 1
    assert choose("least_kv", (3, 2, 2)) == 1
    # Three instances, first draw 1: the second draw is 0 or 2.
    assert choose("power_of_two", (1, 2, 3), (0.4, 0.0)) == 0
    assert choose("power_of_two", (1, 2, 3), (0.4, 0.6)) == 1
    assert choose("power_of_two", (2, 2, 2), (0.4, 0.0)) == 1
    assert choose("power_of_two", (2,), (0.4, 0.9)) == 0


def test_routers_see_ends_of_the_instant_and_earlier_arrivals():
    """At 1 s instance 0 has just finished, so it gets the next; the one after goes to the other."""
    requests = [Request(0, 0, 4, 1), Request(1, 0, 4, 9), Request(2, 1, 4, 9), Request(3, 1, 4, 9)]
    results = simulate(requests, preset("vllm-v1"), 2, "least_outstanding", lambda stats: 1.0).requests
    assert [r.instance for r in results] == [0, 1, 0, 0]
    results = simulate(requests, preset("vllm-v1"), 2, "least_kv", lambda stats: 1.0).requests
    assert [r.instance for r in results] == [0, 0, 1, 1]


def test_margins():
    """Iterations end at 1, 2, ..; the second request comes 2^-10 s before 2, the third at 4 exactly."""
    near = 2 - 2**-10
    requests = [Request(0, 0, 4, 8), Request(1, near, 4, 1), Request(2, 4, 4, 1)]
    result = simulate(requests, preset("vllm-v1"), 1, "round_robin", lambda stats: 1.0)
    assert result.smallest_margin_s == 2**-10
    assert result.num_exact_ties == 1
    assert result.unreliable_from_s(2**-9) == near
    assert result.unreliable_from_s(2**-11) == 4
    assert result.unreliable_from_s(2**-11, count_exact_ties=False) == float("inf")


def test_margins_beside_an_exact_tie():
    margins = simulator.arrival_margins([4.0], [[1.0, 4.0], [4.5, 4.0]], float)
    assert sorted(margins) == [(1.0, 3.0), (4.0, 0.0), (4.0, 0.5)]


def test_times_lie_on_their_grids():
    result = simulate([Request(0, 1 / 3, 4, 3)], preset("vllm-v1"), 1, "round_robin", lambda stats: 0.1)
    [request] = result.requests
    assert request.arrival_s == round(2**20 / 3) / 2**20
    assert request.finish_s == request.arrival_s + 3 * round(0.1 * 2**30) / 2**30
    result = simulate(
        [Request(0, 1 / 3, 4, 3)], preset("vllm-v1"), 1, "round_robin", lambda stats: 0.1, round_times=False
    )
    assert result.requests[0].finish_s == 1 / 3 + 0.1 + 0.1 + 0.1


@pytest.mark.parametrize(
    ("name", "numbers", "request_"),
    [
        ("vllm-v1", {"num_blocks": 2}, Request(0, 0, 30, 4)),
        ("vllm-v0", {"max_num_batched_tokens": 32}, Request(0, 0, 30, 4)),
        ("orca", {"max_model_len": 32}, Request(0, 0, 30, 4)),
        ("tensorrt-llm", {"num_blocks": 2}, Request(0, 0, 30, 2, 3)),
        ("sglang", {"num_blocks": 33}, Request(0, 0, 30, 2, 4)),
        ("simdistserve-vllm", {"decode_context_limit": 32}, Request(0, 0, 30, 4)),
    ],
)
def test_impossible_requests_are_refused(name, numbers, request_):
    with pytest.raises(ValueError, match="can never be served"):
        simulate([request_], preset(name, **numbers), 1, "round_robin", dyadic_cost)


@pytest.mark.parametrize(
    "settings",
    [
        {"victim": "lowest_priority"},
        {"reserve": "expected"},
        {"decode_needs_free_block": "always"},
        {"max_num_seqs": 4096},
        {"victim": "oldest"},
    ],
)
def test_meaningless_combinations_are_refused(settings):
    with pytest.raises(ValueError):
        Flags(**settings)
