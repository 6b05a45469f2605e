"""Mnemosyne's claims: pipelines replayed by other means, coefficients of a study, verdicts that can change."""

import msgspec
import numpy as np
import pandas as pd
import pytest

from jaxsim.reproduce import mnemosyne as m
from jaxsim.reproduce import runs
from jaxsim.reproduce.claim import NO_GATE, NOT_REPRODUCED, REPRODUCED

pytestmark = pytest.mark.unoptimised


def test_a_pipeline_is_its_slowest_way():
    """Of a permutation flow shop: the longest monotone way through the table of chunks and stages."""
    parts = np.random.default_rng(0).random((7, 4))
    ways = np.zeros(parts.shape)
    for chunk, stage in np.ndindex(parts.shape):
        before = [ways[chunk - 1, stage]] * (chunk > 0) + [ways[chunk, stage - 1]] * (stage > 0)
        ways[chunk, stage] = parts[chunk, stage] + max(before, default=0.0)
    assert m.pipelined_s(parts) == pytest.approx(ways[-1, -1])


def test_anchors_follow_from_model_and_device():
    claims = m.anchors()
    assert len(claims) == 6 and {claim.verdict for claim in claims} == {REPRODUCED}


def test_shares_of_long_prompts():
    for name in ("convoy", "whole"):
        points = list(runs.study(f"mnemosyne-{name}").points())
        shares = [m.share_of(point[m.LEVELS], point[m.TOKENS]) for point in points]
        assert set(shares) == {0.0, 0.01, 0.05}
        # "None" is none.
        longest = [max(point[m.TOKENS]) for share, point in zip(shares, points, strict=True) if share == 0.0]
        assert set(longest) == {m.SHORT_TOKENS}


def rows_of(shares, values) -> pd.DataFrame:
    return pd.DataFrame([
        {"seed": seed, "share": share, m.BUDGET: 512, m.RATE: 0.75, m.TARGET: 50.0,
         **{name: value * (1 + 0.01 * seed) for name in ("p50_ttft_ms", "p90_ttft_ms", "p99_ttft_ms", "p99_itl_ms")}}
        for seed in range(4) for share, value in zip(shares, values, strict=True)])


@pytest.mark.parametrize("values, verdict", [
    ((1.0, 8.0, 30.0), REPRODUCED), ((1.0, 1.0, 30.0), NOT_REPRODUCED), ((30.0, 8.0, 1.0), NOT_REPRODUCED)])
def test_the_convoy_must_be_longer_with_every_share(values, verdict):
    shares = (0.0, 0.01, 0.05)
    calm = rows_of((0.0,), (0.5,)).assign(p99_itl_ms=0.01)
    convoy, whole = m._convoy_claims(rows_of(shares, values), calm), m._whole_claims(rows_of(shares, values))
    assert {claim.verdict for claim in (*convoy[:2], *whole[:2])} == {verdict}
    assert convoy[2].verdict == REPRODUCED and {claim.verdict for claim in (convoy[3], *whole[2:])} == {NO_GATE}
    assert whole[3].ours == pytest.approx(values[2] / values[0])


@pytest.mark.parametrize("slack, whole, verdicts", [
    (1.7, 30.0, [REPRODUCED] * 6),
    (3.3, 61.0, [REPRODUCED, REPRODUCED, REPRODUCED, NOT_REPRODUCED, REPRODUCED, NOT_REPRODUCED]),
    # Gates that can be missed from below: a factor of two, and better at all.
    (0.9, 14.0, [NOT_REPRODUCED, REPRODUCED, REPRODUCED, NOT_REPRODUCED, REPRODUCED, NOT_REPRODUCED]),
    (0.5, 0.1, [NOT_REPRODUCED] * 6)])
def test_relative_slack_beside_other_orders(slack, whole, verdicts):
    """Ratios of means over seeds, of short requests; an order that is not tens of times worse is told."""
    factors = {"fcfs": 40.0, "edf": 9.0, "lrs": slack, "lars": 1.0}
    names = [f"p{level}_{what}_ms" for what in ("of_ttft", "of_e2el", "over_ttft") for level in (50, 90, 99)]
    # At the rate that can be carried, all are twice as good: no gate may be of it.
    rows = pd.DataFrame([
        {"seed": seed, m.ORDER: order, m.RATE: rate,
         **dict.fromkeys(names, (factor if rate == 0.75 or order == "lars" else 0.1) * (100.0 + seed))}
        for seed in range(4) for rate in (0.25, 0.75) for order, factor in factors.items()])
    # More seeds than those of the other study, and what has no long prompts.
    theirs = pd.DataFrame([
        {"seed": seed, "share": share, m.RATE: rate,
         **{name: factor * (100.0 + seed) * (5.8 if "p99" in name else 1.0) for name in names}}
        for seed in range(6) for rate in (0.25, 0.75)
        for share, factor in ((0.0, 0.5), (0.05, whole if rate == 0.75 else 3.0))])
    claims = {claim.claim: claim for claim in m._lars_claims(rows, theirs)}
    gated = [claim for claim in claims.values() if claim.is_gate]
    assert [claim.verdict for claim in gated] == [REPRODUCED] * 4 + [NOT_REPRODUCED] + verdicts
    assert all(claim.verdict == NO_GATE for name, claim in claims.items() if name.startswith(("at 0.25", "what it")))
    assert gated[6].ours == pytest.approx(slack) and gated[8].ours == pytest.approx(whole) == gated[10].ours / 5.8
    calm = next(claim for name, claim in claims.items() if name.startswith("at 0.25 requests/s: LoongServe"))
    assert calm.ours == pytest.approx((3.0, 17.4))


def test_three_dimensions_beside_two():
    two, three = (pd.DataFrame({f"p{level}_{name}_ms": [factor * level] * 3
                                for level in (50, 90) for name in ("tpot", "ttft")}) for factor in (3.0, 2.0))
    claims = m._three_claims(two, three)
    assert {claim.verdict for claim in claims} == {NO_GATE}
    assert claims[0].ours == pytest.approx((1.5, 1.5)) and claims[1].ours == pytest.approx(1.5)


def test_a_ring_below_the_floor():
    """Attention is longer by the floor over the tokens of a GPU, and by nothing from there on."""
    cost, tokens = m.ring_of(m.SMALL, 4), 4 * 12_250
    hidden, half, quarter = (m.context_parallel_s(m.SMALL, tokens * n, 4, floor_gpus=g)
                             for n, g in ((2, 1), (1, 1), (1, 2)))
    assert hidden == m.context_parallel_s(m.SMALL, 2 * tokens, 4)
    alone = m.context_parallel_s(m.SMALL, tokens, 4)
    attention = float(cost.chunk_attention(cost.ring.of_rank(m._chunk(0.0, tokens))))
    assert half - alone == pytest.approx(attention, rel=1e-4)
    assert quarter - alone == pytest.approx(3 * attention, rel=1e-4)
    # A quarter of 49,000^2 pairs / 2, 32 layers of 4,096 numbers over 8 GPUs: not faster than at their peak.
    assert attention >= 4 * 32 * 4096 * tokens**2 / 2 / 4 / 8 / 989e12
    assert m.context_parallel_s(m.SMALL, tokens, 4, is_striped=False) > alone


def test_long_prompts_alone_are_most_of_what_the_engine_can_do():
    """Of the squares of uniform lengths, (b^3 - a^3) / 3 (b - a), by hand: 0.0375 x 1.07e17 FLOP over 5e15."""
    square = (1e6**3 - 128e3**3) / (3 * (1e6 - 128e3))
    flops = 2 * 8.03e9 * 564e3 + 4 * 32 * 4096 * square / 2
    assert m.long_share_of_peak() == pytest.approx(0.0375 * flops / (16 * 312e12), rel=0.01)


def test_groups_in_use():
    """A threshold beyond the context leaves it on one group."""
    rows = m._groups(pd.DataFrame({m.INPUT: [10, 10, 10, 2], m.THRESHOLD: [12, 3, 3, 1], m.SIZE: [2, 2, 8, 8],
                                   "p50_tpot_ms": 1.0}))
    assert rows["groups"].tolist() == [1, 2, 4, 2]


@pytest.mark.slow
def test_whole_prompts_are_on_the_ring():
    """A prompt alone on an instance takes its iteration over four ranks; a short one hides no message of its ring."""
    made = runs.study("mnemosyne-whole", 2)
    lengths = [1000, 200_000]
    made = msgspec.structs.replace(made, zip=[], axes={m.INPUT: lengths}, scenario=made.scenario | {
        "workload": {"kind": "batch", "num_requests": 1, "input": 1000, "output": 8}})
    ttft_s = runs.simulated(made).groupby(m.INPUT)["p50_ttft_ms"].mean() / 1e3
    plan = m.Plan(tensor_parallel_size=2, prefill_context_parallel_size=4)
    cost = m.roofline(m.load_model(m.SMALL), m.load_device("a100_sxm_80"), plan, split_kv=True).tabulate(1 << 20, 8)
    alone_s = [float(cost.iteration(m._chunk(0.0, tokens))) for tokens in lengths]
    # The host of this engine, which the tables above do not have, is the same for both.
    assert ttft_s[200_000] - ttft_s[1000] == pytest.approx(alone_s[1] - alone_s[0], rel=0.01)
    assert ttft_s[1000] > alone_s[0]
    short = cost.ring.more_seconds(cost.chunk_attention(cost.ring.of_rank(m._chunk(0.0, 1000))), np.int32(1000))
    assert float(short) > 4 * 3 * float(cost.ring.floor_s) / 4


@pytest.mark.slow
def test_the_replay_is_the_event_engine():
    """A prompt of 200,000 tokens over four stages, alone: the time of its first token, on the study's first group."""
    made = runs.study("mnemosyne-groups", 2)
    made = msgspec.structs.replace(made, scenario={**made.scenario, "workload": {
        **made.scenario["workload"], "input": 200_000}}, axes={m.INPUT: [200_000]})
    rows = runs.simulated(made)
    alone = rows[rows[m.THRESHOLD] == rows[m.THRESHOLD].max()]
    want = m.prefill_s(m.SMALL, 200_000, 4096, 4)
    # Outside of the engine: the server, the tokenizer.
    assert alone["p50_ttft_ms"].to_numpy() / 1e3 == pytest.approx(want, abs=0.01)
    assert m.prefill_s(m.SMALL, 200_000, 4096, 1) > 3 * want


@pytest.mark.slow
def test_percentiles_of_short_requests():
    """Of prompts of any length they are those of all; of short ones beside long ones that take seconds, less."""
    made = runs.study("mnemosyne-lars", 2)
    workload = made.scenario["workload"] | {"num_requests": 12, "input": {
        "kind": "quantiles", "levels": [0.0, 0.5, 0.51, 1.0], "tokens": [16, 2000, 100_000, 200_000]}}
    made = msgspec.structs.replace(made, scenario=made.scenario | {"workload": workload},
                                   axes={m.ORDER: ["fcfs", "lars"]})
    whole, short = runs.simulated_of(made, 1 << 24), runs.simulated_of(made, m.SHORT_TOKENS)
    for level in (50, 90, 99):
        for name in ("ttft", "e2el"):
            assert whole[f"p{level}_of_{name}_ms"].to_numpy() == pytest.approx(whole[f"p{level}_{name}_ms"].to_numpy())
    assert short["p50_over_ttft_ms"].max() > short["p99_of_ttft_ms"].max() and whole["p50_over_ttft_ms"].isna().all()
    assert len(short) == 4 and (short["p99_of_ttft_ms"] < 0.5 * short["p99_ttft_ms"])[short[m.ORDER] == "lars"].all()
