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
    """43.8 of 265 GB x 52 % are left for KV: 2,570 sequences of 130 tokens, 14 % of what saturates; their prompts
    take the GPU 66 s, of which the link is busy 4.8 s."""
    decoding, computing = moe_lens.baseline_claims()
    sequences = (0.52 * 265e9 - 93.4e9) / 131072 / 130
    assert decoding.ours == pytest.approx(sequences / 18_236, rel=0.002) and decoding.verdict == REPRODUCED
    assert computing.ours == pytest.approx(18_236 / (98 * sequences), rel=0.002)
    assert computing.verdict == NOT_REPRODUCED


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
    return table


@pytest.mark.slow
@pytest.mark.parametrize("factor, verdict", [(1.0, REPRODUCED), (0.95, REPRODUCED), (0.92, NOT_REPRODUCED),
                                             (1.08, NOT_REPRODUCED)])
def test_closed_form_and_engine_must_agree(factor, verdict):
    rows = rows_of(factor)
    greedy = moe_lens.outputs_per_s(rows, "greedy")
    sim = rows["output_throughput"].to_numpy()
    assert moe_lens.accuracy(greedy, sim) == pytest.approx(min(factor, 1 / factor))
    steady = pd.DataFrame([{moe_lens.ROOM: 70.0, "num_requests": 20_000, "duration": 900.0}])
    claims = moe_lens.engine_claims(moe_lens.scenario(), rows, steady)
    assert claims[1].verdict == verdict and claims[2].verdict == claims[4].verdict == NO_GATE


@pytest.mark.parametrize("rag, verdict", [(10.0, REPRODUCED), (200.0, NOT_REPRODUCED)])
def test_overlap_must_be_faster_and_most_for_rag(rag, verdict):
    """RAG's baseline is so slow that it gains most, or hardly slower than overlapped."""
    rows = rows_of(1.0)
    serial = pd.DataFrame([
        {moe_lens.PROMPT: p, moe_lens.OUTPUT: g, moe_lens.ROOM: room, "output_throughput": rate}
        for p, g, rate in ((98, 32, 200.0), (98, 64, 200.0), (926, 128, rag)) for room in (24.5, 70.0)])
    *each, most, factors = moe_lens.speedup_claims(rows, serial)
    assert [claim.verdict for claim in each[:2]] == [REPRODUCED] * 2
    assert each[2].verdict == most.verdict == verdict and factors.verdict == NO_GATE
    assert np.isclose(factors.ours[1], max(factors.ours[1], factors.ours[0]))


@pytest.mark.slow
def test_which_resource_next_is_shown_for_several_points():
    claims = moe_lens.resource_claims()
    assert all(claim.verdict == NO_GATE and len(claim.ours) == 4 for claim in claims)
    room, link, memory, gpu = claims[0].ours
    assert 0.8 < room < 1 and 0.8 < link < 1 and 0 < memory < 0.2 and gpu == 0
