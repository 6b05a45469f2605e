"""Prefill and decode on different instances: laws over random clusters, and cases worked out by hand.

The simulator itself checks after every event that blocks are conserved on every instance and nobody is lost or in two
places, and at the end that everybody was served once and no link was faster than its bandwidth.
"""

import random
from dataclasses import replace
from fractions import Fraction
from types import SimpleNamespace

import pytest

from .clock import Clock
from .disaggregation_scenarios import random_cluster
from .simulator import BatchStatsRef, Disaggregation, Request, preset, simulate
from .transfers import FairLinks, Transfer

# --- laws -----------------------------------------------------------------------------------------


def first_decodes(result, instance: int):
    """Requests that were handed over to an instance and never preempted, in the order of their first decode there."""
    seen = []
    for record in result.iterations:
        if record.instance == instance:
            seen += [i for i in record.batch if result.requests[i].decode_instance == instance and i not in seen]
    return [i for i in seen if not result.requests[i].preemptions]


def test_laws_on_random_clusters():
    seen = dict.fromkeys(("handed over", "one token", "waited for room", "waited for a link", "preempted", "swapped",
                          "held back", "ready preempted"), 0)
    for seed in range(400):
        (requests, flags, num_instances, router, costs), rules = random_cluster(seed)
        result = simulate(requests, flags, num_instances, router, costs, disaggregation=rules)
        transfers = {t.request: t for t in result.transfers}
        for request, got in zip(requests, result.requests, strict=True):
            role = rules.roles[got.instance]
            assert role != "decode" and (request.id in transfers) == (role == "prefill" and request.output > 1)
            if request.id not in transfers:
                assert got.decode_instance is got.accepted_s is got.delivered_s is None
                seen["one token"] += role == "prefill"
                continue
            transfer = transfers[request.id]
            assert (transfer.source, transfer.destination) == (got.instance, got.decode_instance)
            assert rules.roles[got.decode_instance] == "decode"
            assert transfer.num_bytes == request.prompt * rules.bytes_per_token
            alone = transfer.num_bytes / rules.bandwidth
            left = alone / 4 if rules.overlap_layers else alone
            slack = 2.0**-29
            assert transfer.delivered_s - transfer.start_s >= left + rules.latency_s - slack
            seen["handed over"] += 1
            seen["waited for room"] += got.accepted_s > got.first_token_s
            seen["waited for a link"] += transfer.delivered_s > transfer.accepted_s + rules.latency_s + alone + slack
        ends = {(r.instance, r.end_s) for r in result.iterations}
        arrivals = {(r.instance, r.arrival_s) for r in result.requests}
        for got in result.requests:
            at = (got.instance, got.scheduled_s)
            seen["held back"] += at not in ends and at not in arrivals
        for instance, role in enumerate(rules.roles):
            records = [r for r in result.iterations if r.instance == instance]
            if role == "prefill":
                assert all(r.stats.num_decode == 0 for r in records)
            if role != "decode":
                continue
            num_preemptions = sum(len(r.preempted) for r in records)
            if flags[instance].preemption == "swap":
                assert all(r.stats.num_prefill == 0 for r in records), "computed what was in host memory"
                seen["swapped"] += num_preemptions
            else:
                assert num_preemptions or all(r.stats.num_prefill == 0 for r in records), "computed what was delivered"
                seen["preempted"] += num_preemptions
            delivered = [t for t in result.transfers if t.destination == instance]
            joined = [transfers[i] for i in first_decodes(result, instance)]
            for one, other in zip(joined, joined[1:], strict=False):
                # What takes no time is delivered as it is accepted.
                place = result.transfers.index  # in the order accepted
                assert (one.delivered_s, place(one)) < (other.delivered_s, place(other)), "overtaken among the ready"
            first = {}
            for record in records:
                for i in record.batch:
                    first.setdefault(i, record.start_s)
            assert all(first[t.request] >= t.delivered_s for t in delivered), "ran before its KV was there"
            preempted_at = [(i, r.start_s) for r in records for i in r.preempted]
            seen["ready preempted"] += sum(at <= first[i] for i, at in preempted_at)
    assert min(seen.values()) >= 10, seen


@pytest.mark.parametrize("round_times", [True, False])
def test_every_discipline_is_the_same_without_bytes(round_times):
    """Transfers that take the latency alone take no link."""
    for seed in range(60):
        scenario, rules = random_cluster(seed)
        rules = replace(rules, bandwidth=float("inf"))
        runs = [simulate(*scenario, disaggregation=replace(rules, discipline=discipline, links=links),
                         round_times=round_times) for discipline in ("fifo", "fair") for links in ("shared", "pair")]
        assert all(run == runs[0] for run in runs)


def test_one_transfer_at_a_time_is_the_same_in_turn_and_shared():
    num_same = 0
    for seed in range(200):
        scenario, rules = random_cluster(seed)
        runs = [simulate(*scenario, disaggregation=replace(rules, discipline=discipline, links="pair"))
                for discipline in ("fifo", "fair")]
        spans = sorted((t.source, t.destination, t.accepted_s, t.delivered_s) for t in runs[0].transfers)
        if all(a[:2] != b[:2] or a[3] <= b[2] for a, b in zip(spans, spans[1:], strict=False)):
            assert runs[0] == runs[1]
            num_same += rules.bandwidth < 2**12 and rules.bytes_per_token > 0 and len(spans) > 1
    assert num_same >= 5


def test_a_share_beyond_the_pool_is_a_push():
    for seed in range(100):
        scenario, rules = random_cluster(seed)
        pull = simulate(*scenario, disaggregation=replace(rules, hand_over="pull", waiting_block_share=1.001))
        assert pull == simulate(*scenario, disaggregation=replace(rules, hand_over="push"))


def test_prefill_alone_when_blocks_are_plenty():
    """With room for all, prompts are served as if there were no outputs and no other side."""
    num_clusters = 0
    for seed in range(100):
        (requests, flags, num_instances, _, costs), rules = random_cluster(seed)
        flags = [replace(f, num_blocks=4096) for f in flags]
        rules = replace(rules, roles=tuple("prefill" if role == "mixed" else role for role in rules.roles))
        pairs = [(f, c) for f, c, role in zip(flags, costs, rules.roles, strict=True) if role == "prefill"]
        if any(f.reserve not in ("none", "prompt") for f, _ in pairs):
            continue
        num_clusters += 1
        whole = simulate(requests, flags, num_instances, "round_robin", costs, disaggregation=rules).requests
        prompts = [replace(r, output=1, max_tokens=1) for r in requests]
        alone = simulate(prompts, [f for f, _ in pairs], len(pairs), "round_robin", [c for _, c in pairs]).requests
        got = [(r.scheduled_s, r.first_token_s) for r in whole]
        assert got == [(r.scheduled_s, r.first_token_s) for r in alone]
    assert num_clusters > 50


def test_mixed_instances_need_no_rules():
    for seed in range(60):
        (requests, flags, num_instances, router, costs), rules = random_cluster(seed)
        rules = replace(rules, roles=("mixed",) * num_instances)
        given = simulate(requests, flags, num_instances, router, costs, disaggregation=rules)
        plain = simulate(requests, flags, num_instances, router, costs)
        assert (given.requests, given.iterations) == (plain.requests, plain.iterations)


def test_sharing_follows_virtual_time():
    """Ends of a shared link against the textbook: a transfer ends when the virtual time, which runs at 1 / number on
    the way, is that of its start and its work.
    """
    rng = random.Random(3)
    for _ in range(300):
        links = FairLinks(True, Clock(True))
        transfers, now = [], 0
        for number in range(rng.randint(1, 8)):
            now += rng.choice([0, 1, rng.randint(0, 40_000)])
            job = SimpleNamespace(request=SimpleNamespace(id=number))
            transfers.append(Transfer(job, 0, 1, 0.0, 1000 * rng.randint(1, 30), now, number))
            links.start(transfers[-1], now)
        real, virtual, ends, coming = Fraction(0), Fraction(0), {}, list(transfers)
        on_the_way: dict[int, Fraction] = {}
        while coming or on_the_way:
            until = coming[0].accepted if coming else None
            end = min(on_the_way.values(), default=None)
            if end is not None and (until is None or real + (end - virtual) * len(on_the_way) <= until):
                real, virtual = real + (end - virtual) * len(on_the_way), end
                for name in [n for n, at in on_the_way.items() if at == end]:
                    ends[name] = real
                    del on_the_way[name]
                continue
            virtual += (until - real) / len(on_the_way) if on_the_way else 0
            real = Fraction(until)
            transfer = coming.pop(0)
            on_the_way[transfer.job.request.id] = virtual + transfer.work
        # Rounding costs each less than a tick of its own at a change, of which there are two a transfer.
        most = 2 * len(transfers) ** 2
        assert all(ends[t.job.request.id] <= t.due <= ends[t.job.request.id] + most for t in transfers)


# --- rules by hand: a second an iteration, a token a second on a link, unless said ------------------

DECODING = dict(max_num_seqs=8, max_num_batched_tokens=64, block_size=4)


def one_second(stats: BatchStatsRef) -> float:
    return 1.0


def serve(requests, prefill=None, decode=None, pools=(1, 1), cost=one_second, **rules):
    """Batches by (instance, start), and the requests."""
    prefill = preset("vllm-v1", **{**DECODING, **(prefill or {})})
    decode = preset("vllm-v1", **{**DECODING, **(decode or {})})
    settings = dict(bytes_per_token=1.0, bandwidth=1.0, hand_over="push")
    result = simulate(
        requests, [prefill] * pools[0] + [decode] * pools[1], sum(pools), "round_robin", cost,
        disaggregation=Disaggregation(("prefill",) * pools[0] + ("decode",) * pools[1], **{**settings, **rules}))
    return {(r.instance, r.start_s): r for r in result.iterations}, result.requests


def test_a_request_from_end_to_end():
    """First token at 1 on instance 0, four seconds on the link, three more tokens on instance 1."""
    steps, [got] = serve([Request(0, 0, 4, 4)])
    assert (got.first_token_s, got.accepted_s, got.delivered_s, got.finish_s) == (1, 1, 5, 8)
    assert (got.instance, got.decode_instance) == (0, 1)
    assert {at: record.batch for at, record in steps.items()} == {
        (0, 0): {0: 4}, (1, 5): {0: 1}, (1, 6): {0: 1}, (1, 7): {0: 1}}
    assert steps[1, 5].stats == BatchStatsRef(1, 5, 0, 0, 0, 0, 1)


def test_one_token_needs_no_decode_instance():
    steps, [got] = serve([Request(0, 0, 4, 1)])
    assert list(steps) == [(0, 0)] and got.finish_s == 1 and got.decode_instance is None


def test_prompts_of_one_iteration_leave_in_running_order():
    """Three are done at 1; the one output token stays, the others go one behind the other over the link."""
    _, got = serve([Request(0, 0, 3, 2), Request(1, 0, 2, 1), Request(2, 0, 5, 2)])
    assert [(r.accepted_s, r.delivered_s) for r in got] == [(1, 4), (None, None), (1, 9)]


@pytest.mark.parametrize(("links", "want"), [("shared", [4, 7, 7, 10]), ("pair", [4, 4, 7, 7])])
def test_shared_ends_and_links_between_pairs(links, want):
    """One source, two destinations in turn, three tokens each: shared, the way out of the source carries all four."""
    requests = [Request(i, 0, 3, 2) for i in range(4)]
    _, got = serve(requests, pools=(1, 2), decode_router="round_robin", links=links)
    assert [r.decode_instance for r in got] == [1, 2, 1, 2]
    assert [r.delivered_s for r in got] == ([4, 7, 10, 13] if links == "shared" else want)


def test_a_busy_way_in_holds_the_way_out():
    """Two sources, two destinations. Request 1 (from 1) waits for the way into 2, and so keeps the way out of 1 for
    request 3, though the way into 3 is free: in turn means in the order accepted.
    """
    requests = [Request(0, 0, 4, 2), Request(1, 0, 2, 2), Request(2, 0, 1, 1), Request(3, 0, 2, 2)]
    to = {0: 0, 1: 0, 3: 1}
    _, got = serve(requests, pools=(2, 2), decode_router=lambda request, *_: to[request.id])
    assert [r.instance for r in got] == [0, 1, 0, 1]
    assert [r.delivered_s for r in got] == [5, 7, None, 9]


def test_equal_parts_of_the_way_in():
    """Four tokens alone from 1 to 3, shared from then on: two are left of the first and take four seconds; two of
    the second's four are left then and go alone.
    """
    _, got = serve([Request(0, 0, 4, 2), Request(1, 2, 4, 2)], discipline="fair")
    assert [(r.accepted_s, r.delivered_s) for r in got] == [(1, 7), (3, 9)]


def test_latency_occupies_a_link_in_turn_and_none_that_is_shared():
    requests = [Request(0, 0, 2, 2), Request(1, 0, 2, 2)]
    assert [r.delivered_s for r in serve(requests, latency_s=0.5)[1]] == [3.5, 6]
    assert [r.delivered_s for r in serve(requests, latency_s=0.5, discipline="fair")[1]] == [5.5, 5.5]
    assert [r.delivered_s for r in serve(requests, latency_s=0.5, bytes_per_token=0.0)[1]] == [1.5, 1.5]


@pytest.mark.parametrize(("prompt", "want"), [(2, 1), (5, 4), (1, 0.25)])
def test_layers_overlap_with_the_iteration(prompt, want):
    """A second of iteration hides a second of transfer, but a layer of four is left."""
    _, [got] = serve([Request(0, 0, prompt, 2)], overlap_layers=4)
    assert got.delivered_s - got.accepted_s == want


def test_blocks_stay_until_the_transfer_ends():
    """The prefill pool has two blocks. Request 0 keeps both until 9; request 1, which came at 2, starts then."""
    steps, got = serve([Request(0, 0, 8, 2), Request(1, 2, 8, 2)], prefill=dict(num_blocks=2))
    assert (got[0].delivered_s, got[1].scheduled_s) == (9, 9)
    assert (0, 2) not in steps and steps[0, 9].free_blocks == 0


def test_pull_accepts_little_beyond_what_runs():
    """Pool of 20 blocks, a share of one. Request 0 holds a block until it runs, at 5, so request 1 is accepted only
    when an iteration of the decode instance has ended, at 6; push accepts it at once.
    """
    requests = [Request(0, 0, 4, 9), Request(1, 0, 4, 9)]
    _, pull = serve(requests, decode=dict(num_blocks=20), hand_over="pull")
    assert [(r.accepted_s, r.delivered_s) for r in pull] == [(1, 5), (6, 10)]
    _, push = serve(requests, decode=dict(num_blocks=20))
    assert [(r.accepted_s, r.delivered_s) for r in push] == [(1, 5), (1, 9)]


def test_the_first_that_does_not_fit_stops_the_others():
    """Three blocks: request 0 has two from 1 to 6 (three tokens from 5 on need no third), request 1 wants two; the
    third, which would fit, waits behind it.
    """
    requests = [Request(0, 0, 5, 3), Request(1, 0, 8, 2), Request(2, 0, 1, 2)]
    _, got = serve(requests, decode=dict(num_blocks=3))
    assert got[0].delivered_s == 6 and got[0].finish_s == 8
    assert [r.accepted_s for r in got] == [1, 8, 8]


def test_who_is_ready_goes_before_who_waits():
    """Pool of five, both prompts take two and need a third for the next token: request 1, ready, goes without. At 5
    request 0 needs a fourth, finds none and is preempted, as nobody else runs. Then the ready one goes first, though it
    has less; at 11 it is done, and request 0 is computed again.
    """
    steps, got = serve([Request(0, 0, 8, 6), Request(1, 0, 8, 7)], decode=dict(num_blocks=5), bandwidth=float("inf"))
    assert [steps[1, t].batch for t in (1, 4, 5, 10)] == [{0: 1}, {0: 1}, {1: 1}, {1: 1}]
    assert steps[1, 5].preempted == (0,) and steps[1, 11].batch == {0: 13}
    assert [(r.preemptions, r.finish_s) for r in got] == [(1, 12), (0, 11)]


def first_start(steps, instance: int, request: int) -> float:
    return min(start for (at, start), record in steps.items() if at == instance and request in record.batch)


def test_who_is_ready_goes_before_prompts_that_would_be_alone():
    """vLLM V0 on the decode side: at 2 no block is free and request 1 is preempted. At 3 its ten tokens fit and would
    be a batch of their own, but request 2 is ready since then, and joins request 0.
    """
    decode = preset("vllm-v0", **{**DECODING, "num_blocks": 6})
    requests = [Request(0, 0, 8, 4), Request(1, 0, 8, 6), Request(2, 2, 1, 2)]
    result = simulate(requests, [preset("vllm-v1", **DECODING), decode], 2, "round_robin", one_second,
                      disaggregation=Disaggregation(("prefill", "decode"), hand_over="push"))
    steps = {record.start_s: record for record in result.iterations if record.instance == 1}
    assert steps[2].preempted == (1,) and steps[3].free_blocks == 2
    assert [steps[t].batch for t in (1, 2, 3, 4)] == [{0: 1, 1: 1}, {0: 1}, {0: 1, 2: 1}, {1: 10}]


def test_who_is_not_known_to_be_ready_holds_nobody_up():
    """With asynchronous scheduling: request 1 is preempted at 5, request 2 is ready at 5.5, so the pass at 6 knows of
    request 1 alone.
    """
    requests = [Request(0, 0, 8, 6), Request(1, 0, 8, 9), Request(2, 4.5, 1, 2)]
    steps, got = serve(requests, decode=dict(num_blocks=6, async_scheduling=True), bandwidth=float("inf"))
    assert steps[1, 5].preempted == (1,) and got[2].delivered_s == 5.5
    assert [steps[1, t].batch for t in (5, 6, 7)] == [{0: 1}, {1: 13}, {1: 1, 2: 1}]


def test_who_is_swapped_out_comes_before_who_waits():
    """On a mixed instance too. Request 1 is swapped out at 5 and wants three blocks; request 2 would need one."""
    flags = preset("vllm-v1", **{**DECODING, **swapping(num_blocks=6)})
    requests = [Request(0, 0, 8, 9), Request(1, 0, 7, 9), Request(2, 6, 4, 2)]
    result = simulate(requests, flags, 1, "round_robin", one_second)
    steps = {record.start_s: record for record in result.iterations}
    assert steps[5].preempted == (1,) and steps[5].batch == {0: 1}
    assert result.requests[2].scheduled_s == result.requests[0].finish_s == 9
    assert steps[9].batch == {1: 1, 2: 4} and not any(r.stats.num_prefill for t, r in steps.items() if t not in (0, 9))


def test_prompts_that_fill_a_pool_give_way():
    """Two prompts take all four blocks and neither has one for its next token: who became ready last is computed
    again, behind the other.
    """
    steps, got = serve([Request(0, 0, 8, 3), Request(1, 0, 8, 3)], decode=dict(num_blocks=4), bandwidth=float("inf"))
    assert (steps[1, 1].batch, steps[1, 1].preempted, steps[1, 1].free_blocks) == ({0: 1}, (1,), 1)
    assert [r.preemptions for r in got] == [0, 1] and [r.finish_s for r in got] == [3, 5]
    assert steps[1, 3].batch == {1: 9}  # prompt and first token


def swapping(**numbers):
    return {"preemption": "swap", "waiting_blocked_after_preempt": False, "kv_bytes_per_token": 1.0, **numbers}


def test_swapped_out_and_in_again():
    """As above with host memory at four tokens a second: eight out make the iteration at 1 two seconds longer, eight
    in that at 5, and nothing is computed twice.
    """
    steps, got = serve([Request(0, 0, 8, 3), Request(1, 0, 8, 3)], bandwidth=float("inf"),
                       decode=swapping(num_blocks=4, swap_bandwidth=4.0))
    assert (steps[1, 1].batch, steps[1, 1].preempted, steps[1, 1].duration_s) == ({0: 1}, (1,), 3)
    assert (steps[1, 4].batch, steps[1, 4].duration_s) == ({0: 1}, 1)
    assert (steps[1, 5].batch, steps[1, 5].duration_s, steps[1, 5].free_blocks) == ({1: 1}, 3, 1)
    assert [r.finish_s for r in got] == [5, 9]


def test_swapped_before_ready():
    """Request 1 is swapped out at 5, when 0 needs a fourth block; request 2 is ready at 7 and fits, but waits."""
    requests = [Request(0, 0, 8, 9), Request(1, 0, 7, 9), Request(2, 6, 4, 2)]
    steps, got = serve(requests, decode=swapping(num_blocks=6), bandwidth=float("inf"))
    assert steps[1, 5].preempted == (1,) and steps[1, 5].batch == {0: 1}
    assert got[2].delivered_s == 7 and first_start(steps, 1, 2) == got[0].finish_s == 9
    assert steps[1, 9].batch == {1: 1, 2: 1}


@pytest.mark.parametrize(("is_async", "want"), [(False, 4.5), (True, 5.5)])
def test_asynchronous_scheduling_sees_a_delivery_one_iteration_late(is_async, want):
    """Delivered at 4, in the iteration from 3.5 to 4.5: the next one knows who was there at 3.5."""
    requests = [Request(0, 0, 1, 9), Request(1, 0.5, 1, 3)]
    steps, got = serve(requests, decode=dict(async_scheduling=is_async), latency_s=0.5)
    assert [r.delivered_s for r in got] == [2.5, 4.0]
    assert first_start(steps, 1, 1) == want


def test_margins_with_transfers():
    """Deliveries at 3.25 and 4, an arrival at 4.5, another at the end of an iteration at 1."""
    flags = [preset("vllm-v1", **DECODING)] * 2
    requests = [Request(0, 0, 3, 9), Request(1, 1, 1, 2), Request(2, 4.5, 1, 1)]
    result = simulate(requests, flags, 2, "round_robin", one_second, disaggregation=Disaggregation(
        ("prefill", "decode"), bytes_per_token=0.75, bandwidth=1.0, hand_over="push"))
    assert [r.delivered_s for r in result.requests] == [3.25, 4.0, None]
    # Ends at 1, 2, 5.5 there and at 4.25, 5.25 .. 11.25, 12.25 here.
    assert sorted({distance for _, distance in result.margins if distance > 0})[0] == 0.25
    assert (3.25, 0.75) in result.margins and (4.0, 0.25) in result.margins
    assert result.unreliable_from_s(0.5) == 1.0 and result.unreliable_from_s(0.5, count_exact_ties=False) == 4.0


def test_a_delivery_comes_before_an_iteration_end():
    """simdistserve's queue of decodes takes one of the two at a time. Request 1 is delivered at 2, when the iteration
    of request 0 ends: it is in the queue when request 0 goes to its back.
    """
    flags = preset("simdistserve-vllm", decode_context_limit=8, max_num_batched_tokens=64)
    requests = [Request(0, 0, 4, 4), Request(1, 1, 4, 4)]
    result = simulate(requests, flags, 2, "round_robin", one_second, disaggregation=Disaggregation(
        ("prefill", "decode"), bytes_per_token=0.0))
    assert result.requests[1].delivered_s == 2
    assert [r.batch for r in result.iterations if r.instance == 1] == [{i: 1} for i in (0, 1, 0, 1, 0, 1)]


def test_fewest_outstanding_counts_who_is_on_the_way():
    """Four prompts are done at once: two to each of two decode instances, the lower index first."""
    _, got = serve([Request(i, 0, 2, 2) for i in range(4)], pools=(1, 2))
    assert [r.decode_instance for r in got] == [1, 2, 1, 2]


@pytest.mark.parametrize("rules", [
    dict(roles=("prefill", "mixed")), dict(roles=("decode",)), dict(roles=("prefill", "decoder")),
    dict(hand_over="throw"), dict(waiting_block_share=0.0), dict(bandwidth=0.0), dict(discipline="lifo")])
def test_meaningless_rules_are_refused(rules):
    with pytest.raises(ValueError):
        Disaggregation(**{"roles": ("prefill", "decode"), **rules})


@pytest.mark.parametrize(("prefill", "decode", "match"), [
    ("orca", "vllm-v1", "prefill needs reserve"), ("vllm-v1", "sglang", "decode needs reserve"),
    ("vllm-v1", "caching", "prefix cache")])
def test_engines_without_meaning_in_a_role_are_refused(prefill, decode, match):
    def flags(name):
        return preset("vllm-v1", prefix_caching=True) if name == "caching" else preset(name)

    with pytest.raises(ValueError, match=match):
        simulate([Request(0, 0, 4, 4)], [flags(prefill), flags(decode)], 2, "round_robin", one_second,
                 disaggregation=Disaggregation(("prefill", "decode")))


def test_requests_too_large_for_their_role_are_refused():
    """A pool of two blocks takes a prompt of eight on the prefill side, whatever the output; not on the decode side."""
    serve([Request(0, 0, 8, 5)], prefill=dict(num_blocks=2), decode=dict(num_blocks=3))
    serve([Request(0, 0, 8, 1)], prefill=dict(num_blocks=2), decode=dict(num_blocks=1))
    for numbers in (dict(prefill=dict(num_blocks=1)), dict(decode=dict(num_blocks=2))):
        with pytest.raises(ValueError, match="can never be served"):
            serve([Request(0, 0, 8, 5)], **numbers)
