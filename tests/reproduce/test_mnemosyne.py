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
    levels = runs.study("mnemosyne-convoy").axes[m.LEVELS]
    assert [m.share_of(one) for one in levels] == [0.0, 0.01, 0.05]


def rows_of(shares, values) -> pd.DataFrame:
    return pd.DataFrame([
        {"seed": seed, "share": share, m.BUDGET: 512, m.RATE: 0.75, m.TARGET: 50.0,
         **{name: value * (1 + 0.01 * seed) for name in ("p50_ttft_ms", "p90_ttft_ms", "p99_itl_ms")}}
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
    (1.7, 30.0, [REPRODUCED, REPRODUCED]), (8.0, 30.0, [NOT_REPRODUCED, REPRODUCED]),
    (1.0, 90.0, [REPRODUCED, NOT_REPRODUCED])])
def test_relative_slack_beside_other_orders(slack, whole, verdicts):
    """Ratios of means over seeds, of short requests; an order that is not tens of times worse is told."""
    factors = {"fcfs": 40.0, "edf": 9.0, "lrs": slack, "lars": 1.0}
    names = [f"p{level}_of_{what}_ms" for what in ("ttft", "e2el") for level in (50, 90, 99)]
    rows = pd.DataFrame([{"seed": seed, m.ORDER: order, **dict.fromkeys(names, factor * (100.0 + seed))}
                         for seed in range(4) for order, factor in factors.items()])
    theirs = pd.DataFrame([{"seed": seed, "share": share, m.RATE: 0.75, **dict.fromkeys(names, factor * (100.0 + seed))}
                           for seed in range(4) for share, factor in ((0.0, 0.5), (0.05, whole))])
    claims = m._lars_claims(rows, theirs)
    assert [claim.verdict for claim in claims[:5]] == [REPRODUCED] * 4 + [NOT_REPRODUCED]
    assert [claims[5].verdict, claims[7].verdict] == verdicts and claims[6].verdict == NO_GATE
    assert claims[5].ours == pytest.approx(slack) and claims[7].ours == pytest.approx(whole)


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
def test_whole_prompts_have_the_coefficients_of_the_closed_form():
    made = runs.study("mnemosyne-whole").scenario["cost"]
    prompt, decode = m.whole_prompts()
    assert [made["prefill"][k] for k in "abe"] == pytest.approx(prompt, rel=0.005)
    assert [made["decode"][k] for k in "acd"] == pytest.approx(decode, rel=0.005)


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
    assert len(short) == 4 and (short["p99_of_ttft_ms"] < 0.5 * short["p99_ttft_ms"])[short[m.ORDER] == "lars"].all()
