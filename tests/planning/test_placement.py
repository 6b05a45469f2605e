"""Placements of prefill and decode engines: what is enumerated, what is chosen, one search from the command line."""

import re

import numpy as np
import pandas as pd
import pytest

from jaxsim import cli
from jaxsim._core.errors import InputError
from jaxsim.cost.simdistserve import CAPACITY, FITTED, Degrees, Engines, cost_section, published
from jaxsim.planning import placement
from jaxsim.spec.model import load_model

pytestmark = pytest.mark.unoptimised

OPT_13B, OPT_66B = (load_model(f"facebook/{name}") for name in ("opt-13b", "opt-66b"))


def test_degrees_divide_heads_and_layers():
    """OPT-13B has 40 heads and 40 layers, OPT-66B 72 heads and 64 layers."""
    assert placement.configurations(OPT_13B, 4, 4) == [(1, 1), (1, 2), (1, 4), (2, 1), (2, 2), (4, 1)]
    found = placement.configurations(OPT_66B, 32, 8)
    assert {d.tensors for d in found} == {1, 2, 3, 4, 6, 8} and {d.stages for d in found} == {1, 2, 4, 8, 16, 32}
    assert max(d.num_devices for d in found) == 32
    # In each of two nodes lies half the model.
    assert placement.configurations(OPT_66B, 64, 1, segments=2) == [(1, n) for n in (1, 2, 4, 8, 16, 32)]
    assert str(Degrees(4, 2)) == "TP4 PP2" and str(Degrees(3, 1)) == "TP3"


def searched(monkeypatch, goodput_rps, **options):
    """A search in which a scenario's goodput is what `goodput_rps(scenario)` says."""
    asked = []

    def search(scenarios, **_):
        asked.extend(scenarios)
        return pd.DataFrame([{"scenario": k, "rate_rps": goodput_rps(s), "limited_by": "ttft"}
                             for k, s in enumerate(scenarios)])

    monkeypatch.setattr(placement.goodput, "search", search)
    scenario = placement.chat("opt-13b").with_values({"workload.rate_rps": 10.0})
    found = placement.search(scenario, OPT_13B, published("opt-13b"), devices_per_node=4, num_nodes=1, **options)
    return found, asked


def degrees_of(scenario) -> list[tuple[str, int, int]]:
    return [(pool.role, pool.engine["tensor_parallel_size"], pool.engine["pipeline_parallel_size"])
            for pool in scenario.cluster.pools]


def test_phases_are_chosen_apart(monkeypatch):
    """The best per GPU, and as many as the rate asks for, rounded up."""
    def goodput_rps(scenario):
        (_, *prefill), (_, *decode) = degrees_of(scenario)
        if scenario.slo.tpot_ms is None:
            assert scenario.workload.output_limit == 1
            return {(1, 1): 2.0, (2, 1): 5.0}.get(tuple(prefill), 0.1)
        assert scenario.slo.ttft_ms is None and scenario.workload.output_limit is None
        return {(1, 1): 3.0, (2, 1): 5.9}.get(tuple(decode), 0.1)

    found, asked = searched(monkeypatch, goodput_rps)
    # Runs of one program.
    assert len({tuple(sorted(n for *_, n in degrees_of(s)))[-1] for s in asked}) == 1
    # (1, 1), (1, 2), (1, 4), (2, 1), (2, 2), (4, 1), each as both.
    assert len(asked) == 12 and len(found.table) == 12 and found.refused == {}
    assert (found.prefill, found.decode) == ((2, 1), (1, 1))
    assert (found.num_prefill, found.num_decode, found.num_devices) == (2, 4, 8)
    assert found.table.groupby("phase")["goodput_rps_per_device"].first().to_dict() == {"decode": 3.0, "prefill": 2.5}


def test_pairs_lie_in_a_node(monkeypatch):
    found, asked = searched(monkeypatch, lambda s: float(np.prod([t for _, t, _ in degrees_of(s)])), affinity="low")
    for scenario in asked:
        (first, *prefill), (second, *decode) = degrees_of(scenario)
        assert (first, second) == ("prefill", "decode") and np.prod(prefill) + np.prod(decode) <= 4
        assert scenario.slo.ttft_ms == 250 and scenario.slo.tpot_ms == 100
    # 4 requests/s on 4 GPUs; on 2 only 1.
    assert (found.prefill, found.decode) == ((2, 1), (2, 1)) and found.num_prefill == found.num_decode == 3


def test_segments_of_a_pair_are_stages(monkeypatch):
    monkeypatch.setattr(placement.goodput, "search", lambda scenarios, **_: pd.DataFrame(
        [{"scenario": k, "rate_rps": 1.0, "limited_by": "ttft"} for k, _ in enumerate(scenarios)]))
    found = placement.search(placement.chat("opt-66b"), OPT_66B, published("opt-66b"), devices_per_node=8, num_nodes=2,
                             affinity="low")
    stages = {(row["prefill"].stages, row["decode"].stages) for _, row in found.table.iterrows()}
    assert (1, 1) in stages and (2, 2) in stages and (2, 4) in stages
    assert all((row["devices"] <= 8) or (row["prefill"].stages % 2 == row["decode"].stages % 2 == 0)
               for _, row in found.table.iterrows())
    assert any("TP1" in name for name in found.refused)


def test_nobody_keeps_the_limits(monkeypatch):
    with pytest.raises(InputError, match="is met by no configuration"):
        searched(monkeypatch, lambda scenario: 0.0)


def test_limits_that_nobody_meets_end_the_search():
    """At rates so low that a run lasts weeks of simulated time."""
    scenario = placement.chat("opt-13b").with_values({
        "workload.num_requests": 200, "num_seeds": 1, "slo.tpot_ms": 5.0})
    with pytest.raises(InputError, match="is met by no configuration"):
        placement.search(scenario, OPT_13B, published("opt-13b"), devices_per_node=2, num_nodes=1)


def test_too_few_requests_say_nothing(monkeypatch):
    """Where all of them at once miss no limit, there is no goodput."""
    monkeypatch.setattr(placement.goodput, "search", lambda scenarios, **_: pd.DataFrame(
        [{"scenario": k, "rate_rps": 1e6, "next_rps": np.inf, "limited_by": None} for k, _ in enumerate(scenarios)]))
    with pytest.raises(InputError, match="workload.num_requests.*all of them at once"):
        placement.search(placement.chat("opt-13b"), OPT_13B, published("opt-13b"), devices_per_node=1, num_nodes=1)


def test_published_engines():
    """Their form, at hand: prefill of 512 tokens, a decode batch of 100 with 60,000 tokens of context."""
    cost = cost_section("distserve", "opt-66b", 4, 2)
    a, b, c = FITTED["distserve", "opt-66b", 4][0]
    whole_ms = (a + b * 512 + c * 512**2) + 2 * 2 * 1.0 + 2.0 + 1e-4 * 512
    form = cost["prefill"]
    assert 1e3 * (form["a"] + form["b"] * 512 + form["e"] * 512**2) == pytest.approx(whole_ms, rel=1e-12)
    a, b, c = FITTED["distserve", "opt-66b", 4][2]
    form = cost["decode"][1]
    assert form["min_sequences"] == 95
    assert 1e3 * (form["a"] + form["c"] * 60_000 + form["d"] * 100) == pytest.approx(
        a + b * 60_000 + c * 100 + 2.0 + 1e-4 * (60_000 - 100), rel=1e-12)
    of = published("opt-66b")
    assert of(Degrees(1, 4)) is None and of(Degrees(2, 1)) is None
    assert isinstance(of(Degrees(4, 4)), Engines) and of(Degrees(4, 4)).tokens == CAPACITY["opt-66b", 4, 2]
    with pytest.raises(InputError, match="use one of 2, 3, 4, 8"):
        cost_section("distserve", "opt-66b", 1)


@pytest.mark.slow
def test_from_the_command_line(capsys, tmp_path):
    out = tmp_path / "found.csv"
    assert cli.main(["place", "--nodes", "1x1", "--rate", "3", "--requests", "40", "--seeds", "1", "--tolerance", "0.3",
                     "--slo", "ttft:250", "tpot:25", "--out", str(out)]) == 0
    text = capsys.readouterr().out
    counts = re.search(r"3 requests/s: (\d+) prefill engines of TP1, (\d+) decode engines of TP1: (\d+) devices", text)
    table = pd.read_csv(out)
    assert list(table["phase"]) == ["prefill", "decode"] and (table["goodput_rps"] > 0).all()
    assert [int(n) for n in counts.groups()[:2]] == list(np.ceil(3 / table["goodput_rps"]).astype(int))


@pytest.mark.parametrize("words, says", [
    (["--nodes", "4by8"], "write nodes and devices"), (["--nodes", "0x8"], "write nodes and devices"),
    (["--out", "no/such/folder.csv"], "--out"), (["--slo", "ttft:200", "--model", "opt-66b", "--nodes", "1x1"], "")])
def test_refused(words, says, capsys):
    assert cli.main(["place", *words]) == 2
    assert says in capsys.readouterr().err
