"""Prefill and decode engines as two queues: the public simulator's golden cases, and the event engine."""

import numpy as np
import pandas as pd
import pytest

import jaxsim
from jaxsim.cost.simdistserve import Degrees, pair, published
from jaxsim.planning import placement, tandem
from jaxsim.spec.model import load_model
from jaxsim.spec.scenario import Scenario
from jaxsim.study import goodput
from tests.engine.test_distserve_golden import scenario as golden

pytestmark = pytest.mark.unoptimised

OPT_66B = load_model("facebook/opt-66b")

TOLERANCE_MS = 1e-3


def times(scenario, outputs):
    """TTFT, decode time, TPOT of each request, ms; an output of the golden cases has no first token."""
    out, _ = tandem.run([scenario])
    decode_ms = 1e3 * (out.finish_s - out.first_token_s)[0]
    ttft_ms = 1e3 * (out.first_token_s - out.arrival_s)[0]
    return ttft_ms, decode_ms, decode_ms / np.asarray(outputs), 1e3 * out.finish_s.max()


@pytest.mark.parametrize("model, plan, want", [("13b", (1, 1, 1, 1), (75.1999, 89.3885)),
                                               ("66b", (4, 1, 2, 2), (112.1655, 203.8072))])
def test_one_request(tmp_path, model, plan, want):
    """Published with the simulator's step-faithful twin (tests/engine/test_distserve_golden.py)."""
    ttft, decode, *_ = times(golden(tmp_path, model, plan, [0], [512], [4]), [4])
    assert (ttft[0], decode[0]) == pytest.approx(want, abs=TOLERANCE_MS)


def test_eight_requests(tmp_path):
    made = golden(tmp_path, "13b", (1, 1, 1, 1), np.arange(8) * 0.04, [128, 1024] * 4, [16] * 8)
    ttft, decode, *_ = times(made, [16] * 8)
    assert ttft == pytest.approx([34.2768, 133.0313, 252.4112, 212.4112, 172.4112, 390.5456, 350.5456, 310.5456],
                                 abs=TOLERANCE_MS)
    assert decode == pytest.approx([362.3331, 390.0787, *[400.2780] * 3, *[402.3566] * 3], abs=TOLERANCE_MS)


@pytest.mark.parametrize("plan, rate, want", [
    ((1, 1, 1, 1), 2, (131.576, 223.660, 35.638, 37.962, 160539.045)),
    ((2, 1, 1, 1), 2, (89.717, 146.783, 35.639, 37.964, 160497.390)),
    ((1, 1, 1, 1), 4, (131.576, 223.660, 89.495, 114.917, 99217.459))])
def test_three_hundred_requests(tmp_path, plan, rate, want):
    """At 4 requests/s decodes are beyond 50,000 tokens of context and take turns."""
    i = np.arange(300)
    outputs = 16 + (131 * i) % 400
    ttft, _, tpot, makespan = times(golden(tmp_path, "13b", plan, i / rate, 64 + (397 * i) % 1900, outputs), outputs)
    assert (*np.quantile(ttft, [0.5, 0.9]), *np.quantile(tpot, [0.5, 0.9]), makespan) == pytest.approx(
        want, abs=TOLERANCE_MS)


def crowded(rng: np.random.Generator, seed: int) -> Scenario:
    """A pair of engines of several stages, limits that bind, arrivals that tie."""
    rate = float(rng.choice([4.0, 16.0, 64.0]))
    base = Scenario.from_dict({
        "schema_version": 1, "num_seeds": 1, "cost": placement.NO_TIME,
        "engine": {"num_gpu_blocks_override": 1 << 20, "max_model_len": 2048}, "slo": {"ttft_ms": 400, "tpot_ms": 100},
        "workload": {"kind": "poisson", "rate_rps": rate, "num_requests": 70, "seed": seed,
                     "input": {"kind": "uniform", "min_tokens": 4, "max_tokens": 1900},
                     "output": {"kind": "uniform", "min_tokens": 1, "max_tokens": 90}}})
    known, ways = published("opt-66b"), [Degrees(4, 1), Degrees(2, 2), Degrees(4, 4), Degrees(8, 2), Degrees(2, 4)]
    own, other = (ways[int(k)] for k in rng.integers(len(ways), size=2))
    # As in a search: of one program, and the engine of a stage beside one of more.
    other = Degrees(2, 4) if other == own or max(own.stages, other.stages) != 4 else other
    own = Degrees(4, 1) if own == other else own
    tokens = int(rng.choice([2000, 8000, 80000]))
    return pair(base, (own, known(own)._replace(tokens=tokens)), (other, known(other)))


@pytest.mark.slow
def test_event_engine_agrees():
    """To a microsecond, over random pairs; token budgets bind, batches overlap. Decodes beyond the limit of context,
    which take turns, are in the golden cases."""
    rng, seen = np.random.default_rng(2), dict(batched=0, cut=0, single=0)
    many = [crowded(rng, seed) for seed in range(24)]
    assert all(map(tandem.follows, many))
    out, _ = tandem.run(many)
    for k, lanes in enumerate(jaxsim.simulate(many).lanes):
        (lane,) = lanes
        for name in ("scheduled_s", "first_token_s", "finish_s"):
            assert np.abs(getattr(out, name)[k] - getattr(lane, name)).max() < 2e-6, (k, name)
        assert out.num_iterations[k] == np.sum(lane.num_iterations)
        together = np.unique(lane.scheduled_s, return_counts=True)[1]
        seen["batched"] += int((together > 1).sum())
        seen["single"] += int((lane.output_tokens == 1).sum())
        seen["cut"] += sum(lane.input_tokens[lane.scheduled_s == at].sum() > 1500 for at in np.unique(lane.scheduled_s))
    assert all(count > 10 for count in seen.values()), seen


def brute_force(scenarios, divisors, tolerance):
    """Every rate of the grid, for everybody."""
    numbers = range(round(np.log(0.5) / np.log1p(tolerance)), round(np.log(60.0) / np.log1p(tolerance)) + 1)
    found = []
    for scenario, divisor in zip(scenarios, divisors, strict=True):
        rate = 0.0
        for number in numbers:
            frame = tandem.simulate([goodput.scenario_at(scenario, (1 + tolerance) ** number)], [0])
            if frame["slo.attainment"].mean() < 0.9 or (frame["unstable"] > 0.5).mean() > 0.5:
                break
            rate = (1 + tolerance) ** number
        found.append(rate / divisor)
    return found


@pytest.mark.parametrize("affinity", ["high", "low"])
def test_the_search_finds_what_all_rates_do(affinity):
    """The same placement, with the same goodput, as simulating every rate of every configuration."""
    tolerance, devices = 0.3, {"high": 4, "low": 8}[affinity]
    scenario = placement.chat("opt-66b").with_values({
        "workload.num_requests": 120, "num_seeds": 1, "slo.tpot_ms": 45.0, "workload.output.max_tokens": 120})
    options = dict(devices_per_node=devices, num_nodes=1)
    engines, refused = published("opt-66b"), {}
    found = placement.search(scenario, OPT_66B, engines, affinity=affinity, tolerance=tolerance, **options)
    made = placement._alone if affinity == "high" else placement._pairs
    asked = list(made(scenario, OPT_66B, engines, devices, 1, refused))
    exhaustive = brute_force([one for _, one in asked], [row["devices"] for row, _ in asked], tolerance)
    frame = pd.DataFrame([row for row, _ in asked]).assign(best=exhaustive)
    for phase, rows in frame.groupby("phase"):
        mine = found.table[found.table["phase"] == phase].iloc[0]
        best = rows.sort_values(["best", "devices"], ascending=[False, True]).iloc[0]
        assert (mine["prefill"], mine["decode"]) == (best["prefill"], best["decode"]), phase
        assert mine["goodput_rps_per_device"] == pytest.approx(best["best"], rel=1e-12)
        assert best["best"] > 0
        # Whoever was left open could not have won.
        rest = found.table[found.table["phase"] == phase].iloc[1:]
        assert (rest["next_rps"] / rest["devices"]).le(mine["goodput_rps_per_device"] * (1 + tolerance) + 1e-9).all()
        assert len(rest) > 0


def test_what_is_left_to_the_event_engine():
    made = pair(placement.chat("opt-13b"), *((d, published("opt-13b")(d)) for d in (Degrees(1, 1), Degrees(2, 1))))
    assert tandem.follows(made)
    links = [{"from": "prefill", "to": "decode", "gb_per_s": 10.0}]
    for values in ({"workload.num_requests": 2000}, {"cluster.transfer.gb_per_s": 10.0, "model.name": "opt-13b"},
                   {"cluster.links": links, "model.name": "opt-13b"},
                   {"workload.tenants": [{"name": "a", "share": 1.0}]}):
        assert not tandem.follows(made.with_values(values)), values
