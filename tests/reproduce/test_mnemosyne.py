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
