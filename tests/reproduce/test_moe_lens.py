"""MoE-Lens: claims that need no run, and what becomes of made-up runs."""

import numpy as np
import pandas as pd
import pytest

from jaxsim.reproduce import moe_lens, runs
from jaxsim.reproduce.claim import NO_GATE, NOT_REPRODUCED, REPRODUCED

pytestmark = pytest.mark.unoptimised


def test_published_tables_follow_from_the_closed_forms():
    assert [claim.verdict for claim in moe_lens.table_claims()] == [REPRODUCED] * 4


def test_the_baseline_by_hand():
    """If weights are part of the 52 % of 265 GB, 44 GB are left for KV: 2,610 sequences of 130 tokens, 14 % of what
    saturates; their prompts take the GPU 67 s, of which the link is busy 4.8 s. If it is of what weights leave, 89 GB.
    At 926/128 the first reading leaves nothing, so neither is a gate."""
    decoding, computing = moe_lens.baseline_claims()
    sequences = np.array([0.52 * 265e9 - 93.4e9, 0.52 * (265e9 - 93.4e9)]) / 131072 / 130
    assert decoding.ours == pytest.approx(tuple(sequences / 18_236), rel=0.002)
    assert computing.ours == pytest.approx(tuple(18_236 / (98 * sequences)), rel=0.002)
    assert decoding.verdict == computing.verdict == NO_GATE and "leaves -0.7 GB" in decoding.reason
    assert moe_lens.baseline_rooms_gb(0.35)[0] < 0


def test_closed_forms_are_of_the_scenario():
    """Their token cap is the scenario's, their pass that of its weights."""
    model = moe_lens.closed_form(70.0)
    assert float(model.token_cap) == pytest.approx(18_236)
    assert float(model.pass_s) == pytest.approx(93.4056 / 19.5, rel=1e-4)
    assert float(model.room_tokens) == pytest.approx(70e9 / 131072, rel=1e-4)
    assert float(moe_lens.closed_form(70.0, shares_memory=False).lost_s) == 0


def rows_of(factor: float) -> pd.DataFrame:
    """Runs of the grid that give `factor` times what the closed form says."""
    made = runs.study("moe-lens", 1)
    table = pd.DataFrame(list(made.points()))
    table["output_throughput"] = factor * moe_lens.outputs_per_s(table, "greedy")
    table["num_requests"] = 5000
    table["duration"] = 5000 * table[moe_lens.OUTPUT] / table["output_throughput"]
    table[moe_lens.ITERATIONS] = 70
    return table


def test_agreement_is_a_mean_whichever_is_larger():
    assert moe_lens.accuracy(np.array([1.0, 3.0, 5.0]), np.array([2.0, 3.0, 4.0])) == pytest.approx((0.5 + 1 + 0.8) / 3)


@pytest.mark.slow
@pytest.mark.parametrize("factor, verdict", [(1.0, REPRODUCED), (0.95, REPRODUCED), (0.92, NOT_REPRODUCED),
                                             (1.08, NOT_REPRODUCED)])
def test_closed_form_and_engine_must_agree(factor, verdict):
    rows = rows_of(factor)
    few = rows.iloc[0]
    # 4.8 s an iteration of 17,700 tokens, or four times as many seconds: the GPU has the less to do of them.
    shares = []
    for seconds in (4.8, 19.2):
        steady = pd.DataFrame([{moe_lens.ROOM: 70.0, "num_requests": 20_000, moe_lens.ITERATIONS: 70 + 110,
                                "duration": few["duration"] + 110 * seconds}])
        claims = moe_lens.engine_claims(moe_lens.scenario(), rows, steady)
        shares.append(claims[0].ours)
    assert 0.5 < shares[0] < 1 and shares[1] == pytest.approx(shares[0] / 4, rel=1e-3)
    # The published form is held to what ours is.
    assert claims[1].verdict == verdict and claims[2].tolerance == claims[1].tolerance
    assert claims[3].verdict == claims[4].verdict == NO_GATE


@pytest.mark.parametrize("rag, verdict", [(10.0, REPRODUCED), (200.0, NOT_REPRODUCED)])
def test_overlap_must_be_faster_and_most_for_rag(rag, verdict):
    """RAG's baseline is so slow that it gains most, or hardly slower than overlapped. With the published shares of the
    room, from which the order follows, nothing is a gate."""
    rows = rows_of(1.0)
    serial = pd.DataFrame([
        {moe_lens.PROMPT: p, moe_lens.OUTPUT: g, moe_lens.ROOM: room, "output_throughput": rate}
        for p, g, rate in ((98, 32, 200.0), (98, 64, 200.0), (926, 128, rag)) for room in (24.5, 70.0)])
    claims = moe_lens.speedup_claims(rows, serial)
    assert [claim.verdict for claim in claims[:2]] == [REPRODUCED] * 2
    assert claims[2].verdict == claims[3].verdict == verdict
    assert [claim.verdict for claim in claims[4:]] == [NO_GATE] * 5
    factors = [overlapped / slow for slow, overlapped in (claim.ours for claim in claims[4:7])]
    assert claims[-1].ours == pytest.approx((np.mean(factors), max(factors)))


@pytest.mark.slow
def test_which_resource_next_is_shown_for_several_points():
    claims = moe_lens.resource_claims()
    assert all(claim.verdict == NO_GATE and len(claim.ours) == 4 for claim in claims)
    room, link, memory, gpu = claims[0].ours
    assert 0.8 < room < 1 and 0.8 < link < 1 and 0 < memory < 0.2 and gpu == 0
