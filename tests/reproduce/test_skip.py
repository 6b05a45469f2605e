"""SKIP: claims that can be missed, and numbers read off by other means."""

import numpy as np
import pandas as pd
import pytest

from jaxsim.analytic import host_device as lanes
from jaxsim.analytic.host_device import DecodeLanes
from jaxsim.reproduce import skip
from jaxsim.reproduce.claim import NO_GATE, NOT_REPRODUCED, REPRODUCED

pytestmark = pytest.mark.unoptimised


@pytest.fixture(scope="module")
def found():
    return skip.passes()


def with_hosts(monkeypatch, issue_s: float, factor: float) -> None:
    """Other seconds of the hosts a kernel."""
    monkeypatch.setattr(skip, "ISSUE_S", issue_s)
    monkeypatch.setattr(skip, "PLATFORMS", {name: p._replace(factor=factor if name == skip.GH200 else 1.0)
                                            for name, p in skip.PLATFORMS.items()})


@pytest.mark.parametrize("issue_s, factor, are_met", [
    (25e-6, 2.0, (True, True)), (5e-6, 8.0, (False, True)),
    pytest.param(25e-6, 8.0, (True, False), marks=pytest.mark.slow),
    pytest.param(200e-6, 1.0, (False, False), marks=pytest.mark.slow)])
def test_knees_are_the_hosts_seconds_against_the_devices(found, monkeypatch, issue_s, factor, are_met):
    """None of them is a gate: host seconds and lengths are guesses."""
    with_hosts(monkeypatch, issue_s, factor)
    claims = skip.knee_claims(found)
    assert tuple(claim.ours == claim.paper for claim in claims[:2]) == are_met
    assert {claim.verdict for claim in claims} == {NO_GATE}
    # What is asked of the hosts does not depend on what was stated of them.
    low, high = claims[-3].ours
    assert (low < 1e6 * issue_s < high) == are_met[0]


def test_latencies(found, monkeypatch):
    """Where the device limits the host's seconds are not in it; where the host does, they are all."""
    with_hosts(monkeypatch, 20e-6, 3.0)
    large, _, small = skip.latency_claims(found)
    assert large.verdict == REPRODUCED and small.verdict == NO_GATE and len(large.ours) == 2 * len(skip.LENGTHS)
    assert small.ours == pytest.approx((3.0, 3.0), rel=0.01)
    with_hosts(monkeypatch, 20e-6, 100.0)
    assert skip.latency_claims(found)[0].verdict == NOT_REPRODUCED
    with_hosts(monkeypatch, 20e-6, 1.0)
    # The H100 PCIe and the GH200 have the same kernels' constants: between the ratios of their peaks.
    assert 989.4 / 756.5 < skip.device_ratio(found, "BERT", skip.H100) < 4.0 / 2.0


def test_fusion_is_of_launches_alone(found):
    """Where the host limits, the latency falls as the launches do."""
    made = found.passes["GPT-2"]
    best = skip.speedups(made)
    length = skip.CHAINS[int(best.argmax())]
    fused = lanes.chained(made, length)
    seconds = lanes.pass_seconds(skip._cost(skip.specs()["GPT-2"], skip.PLATFORMS[skip.GH200]), fused)
    after = float(lanes.measures(seconds, skip.PLATFORMS[skip.GH200].issue_s, 0.0).latency_s[0])
    before = found.latency_s("GPT-2", skip.GH200, 1.0)
    assert before / after == pytest.approx(best.max(), rel=0.02)
    ideal, longest = skip.fusion_claims(found)
    assert ideal.verdict == NOT_REPRODUCED and longest.verdict == NO_GATE
    assert "405 and 299" in longest.reason


def test_where_something_holds():
    values = np.array([1.0, 2.0, 3.0, 4.0])
    assert skip.interval(values, values > 2) == (3.0, 4.0)
    assert np.isnan(skip.interval(values, values > 9)).all()


@pytest.mark.slow
def test_an_engine_without_graphs():
    """Measured ratios are met by an engine that takes as long whatever the cell, missed by one that does not."""
    tensor = skip.measured_ms(False)
    batches = tuple(n for n, *_ in skip.CELLS.values())

    def engine(ms):
        ms = np.broadcast_to(np.asarray(ms, float), len(batches))
        return DecodeLanes(batches, 0 * ms, 1e-3 * ms, 0.5e-3 * ms, 1e-3 * ms, 1245)

    for ms, verdicts in ((tensor, (NO_GATE, REPRODUCED)), (30.0, (NO_GATE, REPRODUCED)),
                         (np.array(tensor) * [1, 1, 1, 1, 1, 2], (NO_GATE, NOT_REPRODUCED))):
        assert tuple(claim.verdict for claim in skip.eager_engine_claims(engine(ms))[:2]) == verdicts
    assert skip.eager_engine().num_kernels == 1245 and len(skip.eager_engine().host_bound) == 6


def rows(graphs: float, eager: float, none: float) -> pd.DataFrame:
    """Runs of the study: ms a token by kind, at every batch."""
    return pd.DataFrame([{skip.BATCH: batch, skip.IS_EAGER: is_eager, skip.HOST: host, skip.TPOT: ms}
                         for batch in (1, 9, 32) for is_eager, host, ms in (
                             (False, "vllm-v1", graphs), (True, "vllm-v1", eager), (False, "none", none))])


@pytest.mark.parametrize("ms", [7.2, 11.0])
def test_small_batches(ms):
    """No gates: constants come from runs of the same source."""
    claims = skip.host_lane_claims(skip.decode_rows(rows(ms, 11.5, 6.0)))
    assert [claim.verdict for claim in claims] == [NO_GATE] * 3
    assert [claim.ours for claim in claims] == [ms, 6.0, 11.5] and "4.0 ms" in claims[0].reason
    assert ("up to batch 32" in claims[2].reason) == (ms < 11)


@pytest.mark.slow
def test_what_constants_were_fitted_to_is_no_gate():
    llama, qwen = skip.synchronous_claims()
    assert llama.is_gate and not qwen.is_gate and "fitted on these runs" in qwen.reason
