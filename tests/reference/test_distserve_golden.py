"""Numbers of the public simulator of LLMServe/DistServe, its own backend: prefill and decode on different instances.

Its rules, on top of those in `test_golden`: transfers take no time, a new request goes where fewest prompts are queued
or in the first stage, a prompt that is done where fewest decodes are queued. With PP stages a stage takes the whole
time / PP, prefills PP ms more in each, the first of them what the head of the pipeline adds; the first stage takes a
new batch whenever it is free.
"""

import numpy as np
import pytest

from .simulator import BatchStatsRef, Disaggregation, Request, fewest_prefills, fewest_queued_decodes, preset, simulate
from .test_golden import heavy_tailed_workload

# As in `test_golden`, DistServe engine; KV capacity by (TP, PP).
# Source: LLMServe/DistServe, simdistserve/estimators/profile_data.
FITTED = {
    ("13b", 1): (
        (18.10254647486372, 0.1019122572698738, 7.122264314252114e-06),
        (19.934702624895458, 0.0006269356524350583, 0.03850697740828398),
        (7.1661889468253595, 0.0005798000403396046, 0.15831096191764046),
    ),
    ("13b", 2): (
        (14.742973695171262, 0.06857720739764, 2.4495727400243586e-06),
        (13.294796350285385, 0.00034109219700723494, 0.06296393225243659),
        (10.638741913126715, 0.00031183369638295723, 0.08562913604102729),
    ),
    ("66b", 2): (
        (43.05881348288936, 0.2742292870458432, 2.2478042467169447e-05),
        (48.288015489286245, 0.0009424343535737985, 0.12755020094383188),
        (28.727693993711597, 0.00047448475459061987, 0.29617792360743994),
    ),
    ("66b", 4): (
        (29.441636037717455, 0.151352180625198, 8.317450765979451e-06),
        (30.760284619429587, 0.000451947603788462, 0.063284195750671),
        (27.47082137429487, 0.0004046845541646486, 0.12480667738300383),
    ),
}
CAPACITY = {("13b", 1, 1): 66144, ("13b", 2, 1): 163008, ("66b", 4, 1): 78496}


def stages_cost(model: str, tp: int, pp: int):
    """Seconds in the engine (none) and in each stage."""
    prefill, decode_small, decode_large = FITTED[model, tp]

    def cost(stats: BatchStatsRef) -> list[float]:
        if stats.num_prefill:
            a, b, c = prefill
            whole = a + b * stats.prefill_tokens + c * stats.prefill_pairs
            context_before, constant = stats.prefill_context, 1.0 * pp
        else:
            a, b, c = decode_small if stats.num_decode < 95 else decode_large
            whole = a + b * stats.decode_context + c * stats.num_decode
            context_before, constant = stats.decode_context - stats.num_decode, 0.0
        parts = [whole / pp + constant] * pp
        parts[0] += 2.0 + 0.0001 * context_before
        return [0.0] + [part / 1000 for part in parts]

    return cost


def run(model, plan, arrivals, prompts, outputs, pools=(1, 1), **options):
    """TTFT, decode time, TPOT of each request and the makespan, all in ms; plan: TP, PP of prefill, of decode."""
    flags, costs, stage_costs = [], [], []
    for tp, pp, count in ((*plan[:2], pools[0]), (*plan[2:], pools[1])):
        stages = {"stages": pp, "pass_when_stage_free": True} if pp > 1 else {}
        budget = CAPACITY[(model, *plan[:2])]
        flags += [preset("simdistserve-vllm", max_num_batched_tokens=budget, **stages)] * count
        stage_costs += [stages_cost(model, tp, pp)] * count
        costs += [lambda stats, of=stage_costs[-1]: sum(of(stats))] * count
    rows = zip(arrivals, prompts, outputs, strict=True)
    requests = [Request(i, float(a), p, out + 1) for i, (a, p, out) in enumerate(rows)]
    rules = Disaggregation(("prefill",) * pools[0] + ("decode",) * pools[1], decode_router=fewest_queued_decodes)
    result = simulate(requests, flags, sum(pools), fewest_prefills, costs, stage_cost=stage_costs, disaggregation=rules,
                      **options)
    assert result.merges_left_out == 0, "the public simulator would have put batches together"
    ttft = np.array([1000 * r.ttft_s for r in result.requests])
    decode = np.array([1000 * (r.finish_s - r.first_token_s) for r in result.requests])
    return ttft, decode, decode / np.array(outputs), 1000 * max(r.finish_s for r in result.requests)


@pytest.mark.parametrize(("model", "plan", "want"), [
    ("13b", (1, 1, 1, 1), (75.1999, 89.3885)),
    ("66b", (4, 1, 2, 2), (112.1655, 203.8072)),
])
def test_one_request(model, plan, want):
    ttft, decode, _, _ = run(model, plan, [0.0], [512], [4])
    assert (ttft[0], decode[0]) == pytest.approx(want, abs=1e-3)


@pytest.mark.parametrize("round_times", [True, False])
def test_eight_requests(round_times):
    arrivals = [0.04 * i for i in range(8)]
    ttft, decode, _, _ = run("13b", (1, 1, 1, 1), arrivals, [128, 1024] * 4, [16] * 8, round_times=round_times)
    assert ttft == pytest.approx(
        [34.2768, 133.0313, 252.4112, 212.4112, 172.4112, 390.5456, 350.5456, 310.5456], abs=1e-3)
    assert decode == pytest.approx([362.3331, 390.0787, *[400.2780] * 3, *[402.3566] * 3], abs=1e-3)


@pytest.mark.parametrize(("plan", "rate", "want"), [
    ((1, 1, 1, 1), 2, (131.576, 223.660, 35.638, 37.962, 160539.045)),
    ((2, 1, 1, 1), 2, (89.717, 146.783, 35.639, 37.964, 160497.390)),
    ((1, 1, 1, 1), 4, (131.576, 223.660, 89.495, 114.917, 99217.459)),
])
def test_three_hundred_requests(plan, rate, want):
    arrivals = [i / rate for i in range(300)]
    prompts = [64 + (397 * i) % 1900 for i in range(300)]
    outputs = [16 + (131 * i) % 400 for i in range(300)]
    ttft, _, tpot, makespan = run("13b", plan, arrivals, prompts, outputs)
    got = (*np.quantile(ttft, [0.5, 0.9]), *np.quantile(tpot, [0.5, 0.9]), makespan)
    assert got == pytest.approx(want, abs=1e-3)


@pytest.mark.parametrize(("model", "plan", "ttft_ms", "want"), [
    ("13b", (1, 1, 1, 1), 250, 3.320),
    ("13b", (2, 1, 2, 1), 250, 3.477),
    ("66b", (4, 1, 2, 2), 400, 0.586),
])
def test_goodput(model, plan, ttft_ms, want):
    """Highest rate per GPU whose P90 of TTFT and P90 of TPOT are, separately, under their limits."""
    arrivals, prompts, outputs = heavy_tailed_workload()
    num_gpus = plan[0] * plan[1] + plan[2] * plan[3]
    low, high = 0.0, 5.0
    while high - low > 0.05:
        rate = (low + high) / 2
        ttft, _, tpot, _ = run(model, plan, arrivals / (rate * num_gpus), prompts, outputs)
        if np.quantile(ttft, 0.9) < ttft_ms and np.quantile(tpot, 0.9) < 100:
            low = rate
        else:
            high = rate
    assert low == pytest.approx(want, abs=5e-4)


# --- its rules, by hand ---------------------------------------------------------------------------


def dispatched(arrivals_ms, prompts, outputs, pools):
    """(prefill, decode) instance of each request."""
    flags = preset("simdistserve-vllm", max_num_batched_tokens=66144)
    costs = [lambda stats: sum(stages_cost("13b", 1, 1)(stats))] * sum(pools)
    requests = [Request(i, a / 1000, p, out + 1) for i, (a, p, out) in
                enumerate(zip(arrivals_ms, prompts, outputs, strict=True))]
    rules = Disaggregation(("prefill",) * pools[0] + ("decode",) * pools[1], decode_router=fewest_queued_decodes)
    result = simulate(requests, [flags] * sum(pools), sum(pools), fewest_prefills, costs, disaggregation=rules)
    return [(r.instance, r.decode_instance) for r in result.requests]


def test_prompts_go_where_fewest_wait_or_are_computed():
    assert [prefill for prefill, _ in dispatched([0, 1, 2, 3, 4], [512] * 5, [4] * 5, (2, 1))] == [0, 1, 0, 1, 0]
    # Two prompts of one instant go to different instances; at 100 ms, both are done.
    assert [prefill for prefill, _ in dispatched([0, 0, 100, 101], [512] * 4, [4] * 4, (2, 1))] == [0, 1, 0, 1]


def test_decodes_in_a_stage_are_not_counted():
    """A second prompt is done while the first decodes: nobody is queued anywhere, so it goes to the same instance.
    Two done at once find one in the queue, and the other instance.
    """
    assert [decode for _, decode in dispatched([0, 1], [64, 64], [9, 9], (1, 2))] == [1, 1]
    assert [decode for _, decode in dispatched([0, 1, 1], [64] * 3, [9] * 3, (1, 2))] == [1, 1, 2]


@pytest.mark.parametrize("stages", [2, 4])
def test_a_prefill_pipeline_takes_a_prompt_as_soon_as_its_first_stage_is_free(stages):
    """Uniform prompts, one a batch, in stages of D / stages: W' = max(0, W + D / stages - gap), TTFT = W + D."""
    whole_s, count = 0.0625, 1000
    arrivals = np.cumsum(np.random.default_rng(1).geometric(1 / 40, count)) / 2**10
    flags = preset("simdistserve-vllm", max_num_batched_tokens=16)
    requests = [Request(i, a, 16, 2) for i, a in enumerate(arrivals)]
    result = simulate(
        requests, [preset("simdistserve-vllm", max_num_batched_tokens=16, stages=stages, pass_when_stage_free=True),
                   flags], 2, fewest_prefills, lambda stats: whole_s,
        disaggregation=Disaggregation(("prefill", "decode")))
    wait, want = 0.0, []
    for i in range(count):
        wait = max(0.0, wait + whole_s / stages - (arrivals[i] - arrivals[i - 1])) if i else 0.0
        want.append(wait + whole_s)
    assert [r.ttft_s for r in result.requests] == want
    assert sum(w > whole_s for w in want) > 100
