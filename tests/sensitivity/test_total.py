"""Central differences: what queueing theory says, what is flagged, what one program does."""

import json
import math
import re

import numpy as np
import pandas as pd
import pytest

import jaxsim
from jaxsim.engine import loop
from jaxsim.sensitivity import total
from jaxsim.sensitivity.heat_map import heat_map
from jaxsim.sensitivity.table import print_table
from jaxsim.sensitivity.tornado import tornado
from jaxsim.study import runner
from jaxsim.study.lanes import Lanes
from jaxsim.study.study import Study
from tests.sensitivity import queues as q

pytestmark = pytest.mark.unoptimised

FIELDS = ("workload.rate_rps", "cost.prefill.b")
METRICS = ("queueing.mean_ms", "mean_e2el_ms", "p99_e2el_ms", "preemptions.total", "mean_tpot_ms")
LAWS = ("M/D/1", "M/G/1", "M/M/1")
SLACK, TIE, OVER = len(LAWS), len(LAWS) + 1, len(LAWS) + 2
"""Places of the scenarios behind the laws: never a queue; every arrival at the end of a service; ever more waiting."""

NUM_REQUESTS = 800


@pytest.fixture(scope="module")
def found():
    """One batch for all: three laws, and what is at the edges. METRICS has one without any value at the end."""
    scenarios = [q.scenario(law, 0.5, num_requests=NUM_REQUESTS) for law in LAWS]
    edges = [q.scenario("M/D/1", load, kind="deterministic", num_requests=NUM_REQUESTS) for load in (0.5, 1.0)]
    over = q.scenario("M/D/1", 1.5, num_requests=NUM_REQUESTS)
    before = loop.run._cache_size()
    made = jaxsim.sensitivity([*scenarios, *edges, over], FIELDS, METRICS[:-1], direct=False)
    return made, loop.run._cache_size() - before


def row(found, point, metric, field):
    (one,) = [r for r in found.rows if (r.point, r.metric, r.field) == (point, metric, field)]
    return one


def test_a_batch_is_one_program(found):
    """Six scenarios, two fields, two steps, both sides, eight seeds; limits and rates compile nothing more."""
    made, compiled = found
    assert made.programs == 1 and compiled <= 1
    assert made.num_runs == 6 * (1 + 2 * 2 * 2) * 8
    assert len(made.rows) == 6 * 2 * 4 and made.num_seeds == 8


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("metric", METRICS[:2])
@pytest.mark.parametrize("field", FIELDS)
def test_total_is_that_of_pollaczek_khinchine(found, law, metric, field):
    """Within a 99.9 % interval of the theory's own difference, which is next to its derivative."""
    one = row(found[0], LAWS.index(law), metric, field)
    want = q.elasticity(law, 0.5, metric, field, one.step)
    half = (one.total_high - one.total_low) / 2
    assert 0 < half < 0.25 * want, "too few requests to tell"
    # 5.41 and 2.36: Student's t with 7 degrees of freedom.
    assert abs(one.total - want) < 5.41 / 2.36 * half
    assert want == pytest.approx(q.elasticity(law, 0.5, metric, field, 0.0), rel=0.01)
    assert one.step == pytest.approx(0.03) and one.method == total.CENTRAL and one.flags == ()
    base = 1e3 * (q.wait_s if metric == "queueing.mean_ms" else q.time_s)(law, 0.5)
    assert one.metric_value == pytest.approx(base, rel=0.2)
    assert one.per_percent == pytest.approx(0.01 * one.total * one.metric_value, rel=0.02)


def test_percentiles_take_larger_steps(found):
    one = row(found[0], 0, "p99_e2el_ms", FIELDS[1])
    assert one.step == pytest.approx(0.1) and one.total > 1


def test_nothing_that_waits_has_no_elasticity(found):
    """A metric at zero: no percentage, a slope of zero, and no NaN anywhere."""
    one = row(found[0], SLACK, "queueing.mean_ms", FIELDS[0])
    assert (one.total, one.total_low, one.total_high, one.per_percent) == (None, None, None, 0.0)
    assert one.flags == ("zero",) and one.metric_value == 0
    service = row(found[0], SLACK, "mean_e2el_ms", FIELDS[1])
    assert service.total == pytest.approx(1.0, abs=1e-4) and "all seeds alike" in service.flags
    idle = row(found[0], SLACK, "mean_e2el_ms", FIELDS[0])
    assert idle.total == 0 and "no change" in idle.flags
    for r in found[0].rows:
        numbers = [r.total, r.total_low, r.total_high, r.per_percent, r.metric_value]
        assert all(x is None or math.isfinite(x) for x in numbers), r


def test_ties_and_saturation_are_flagged(found):
    """Arrivals at the very end of services: below nobody waits, above requests pile up."""
    one = row(found[0], TIE, "mean_e2el_ms", FIELDS[0])
    assert one.metric_value == pytest.approx(1e3 * q.SERVICE_S, rel=1e-6)
    assert "kink" in one.flags and one.total > 1
    assert "saturated" in row(found[0], TIE, "p99_e2el_ms", FIELDS[0]).flags
    assert "unstable" in row(found[0], OVER, "mean_e2el_ms", FIELDS[0]).flags


def test_tables_and_plots_hold_every_row(found, tmp_path, capsys):
    made, _ = found
    frame = made.to_frame()
    assert len(frame) == len(made.rows) and frame["scenario"].nunique() == 5
    assert frame["total"].isna().sum() == sum(r.total is None for r in made.rows) > 0
    parsed = json.loads(made.to_json())
    keys = {"metric", "field", "total", "total_low", "total_high", "direct", "method", "flags"}
    assert all(keys <= set(r) for r in parsed["rows"]) and len(parsed["rows"]) == len(made.rows)
    assert {type(r["flags"]) for r in parsed["rows"]} == {list} and len(parsed["points"]) == 6
    assert all(r["direct"] is None for r in parsed["rows"])
    print_table(made)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80 and any("over 6 scenarios" in line for line in lines)
    single = total.dataclasses.replace(
        made, scenarios=made.scenarios[:1], rows=tuple(total.dataclasses.replace(
            r, direct=0.5 if r.field == FIELDS[1] else None) for r in made.rows if r.point == 0))
    print_table(single)
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80 and "+0.50" in text and "gap" in text
    tornado(single, out=tmp_path / "tornado.png")
    heat_map(made, out=tmp_path / "map.png")
    assert all((tmp_path / name).stat().st_size > 5000 for name in ("tornado.png", "map.png"))
    with pytest.raises(jaxsim.InputError, match="has nothing to lay beside it"):
        heat_map(single)
    # A field that a later point of a study does not have.
    lone = total._Run(0, total.Field("slo.ttft_ms", math.nan, False), 0.1, 0, -1, -1, math.nan, math.nan, "is not used")
    empty = total._row("mean_e2el_ms", lone, np.ones((1, 8)), None, None)
    (one,) = json.loads(total.dataclasses.replace(made, rows=(empty,)).to_json())["rows"]
    assert one["total"] is one["value"] is one["step"] is None and one["flags"] == ["no neighbour: is not used"]


def test_derivatives_at_a_fixed_schedule_stand_beside(found, monkeypatch):
    """By place among the scenarios that were simulated, and absent where they have no meaning."""
    row = total._row
    seen = []
    monkeypatch.setattr(total, "_row", lambda *a: seen.append(a[-1]) or row(*a))
    monkeypatch.setattr(total, "_direct", lambda scenarios, fields, metrics, progress: (
        {(0, "mean_e2el_ms", FIELDS[1]): 1.0}, {}))

    class Found:
        frame = pd.DataFrame({"seed": [0, 1]})
        is_unstable = is_stopped = np.zeros(99, bool)

        def values(self, metric):
            return np.ones((99, 8))

    monkeypatch.setattr(total._Batch, "run", lambda self, *_: (Found(), 1))
    made = jaxsim.sensitivity(q.scenario(), FIELDS, ["mean_e2el_ms", "p99_e2el_ms"])
    assert seen == [None, 1.0, None, None]
    assert [r.feedback for r in made.rows] == [None, -1.0, None, None]


def test_nothing_sure_is_printed_and_drawn(found, tmp_path, capsys):
    """Cells that may be of either sign; then none with a value, which only the map refuses."""
    made, _ = found
    noisy = total.dataclasses.replace(made, rows=tuple(
        r if r.total is None else total.dataclasses.replace(r, total_low=-9.0, total_high=9.0) for r in made.rows))
    assert not any(r.is_sure for r in noisy.rows)
    print_table(noisy)
    text = capsys.readouterr().out
    counts = re.findall(r"(\d) of \d", text)
    assert set(counts) == {"0"} and len(counts) > 4 and "noisy:" not in text
    heat_map(noisy, out=tmp_path / "map.png")
    assert (tmp_path / "map.png").stat().st_size > 5000
    empty = total.dataclasses.replace(made, rows=tuple(total.dataclasses.replace(
        r, total=None, total_low=None, total_high=None) for r in made.rows))
    with pytest.raises(jaxsim.InputError, match="have no derivative at any point"):
        heat_map(empty, out=tmp_path / "none.png")


def test_columns_of_a_study_are_of_sure_cells(found, capsys):
    """Noise at one point is no size."""
    made, _ = found
    metric, field = "mean_e2el_ms", FIELDS[1]
    loud = tuple(total.dataclasses.replace(r, total=77.0, total_low=-99.0, total_high=253.0)
                 if (r.metric, r.field, r.point) == (metric, field, 0) else r for r in made.rows)
    print_table(total.dataclasses.replace(made, rows=loud, metrics=(metric,)))
    text = capsys.readouterr().out
    assert "5 of 6" in text and "77" not in text


def test_reasons_are_text():
    """As JSON has them."""
    staged = q.scenario(num_requests=20).with_values({"engine.pipeline_parallel_size": 2})
    field = total.Field("cost.prefill.b", q.TOKEN_S, False)
    at_fixed, without = total._direct([staged], [field], ["mean_e2el_ms"], lambda *_, **__: None)
    assert at_fixed == {} and json.loads(json.dumps(without[0])).startswith("engine.pipeline_parallel_size = 'given'")


def test_a_metric_without_a_value_leaves_the_others():
    """What is asked for and turns out to be nowhere is said; where all are, it is refused."""
    class Found:
        def values(self, metric):
            return np.full((2, 3), np.nan if metric == "a" else 1.0)

    assert total._with_values(Found(), [0, 1], ["a", "b"]) == (["b"], ["left out: a has no value in any of the runs"])
    with pytest.raises(jaxsim.InputError, match="have no value in any of the runs"):
        total._with_values(Found(), [0, 1], ["a"])


# ---- the estimator by itself


def test_intervals_cover_what_they_should():
    """Of pairs of correlated log-normal metrics whose means are known: 95 % of 4,000 intervals hold the truth."""
    rng = np.random.default_rng(0)
    want, span, held = 3.0, 0.06, 0
    for _ in range(4000):
        common = rng.lognormal(0, 0.2, 8)
        down = common * math.exp(-want * span / 2) * rng.lognormal(0, 0.01, 8)
        up = common * math.exp(want * span / 2) * rng.lognormal(0, 0.01, 8)
        value, half = total._elasticity(down, up, span)
        held += abs(value - want) < half
    assert held / 4000 == pytest.approx(0.95, abs=0.012)


def test_a_power_is_exact_at_any_step():
    x, h = np.array([0.5, 1.0, 3.0]), 0.4
    value, half = total._elasticity((x * math.exp(-h)) ** 7, (x * math.exp(h)) ** 7, 2 * h)
    assert value == pytest.approx(7, rel=1e-12) and half == pytest.approx(0, abs=1e-9)


def test_kinks_are_told_from_noise():
    rng = np.random.default_rng(1)
    noise = rng.normal(0, 0.01, (3, 8))
    flat, bent = np.ones(8), np.full(8, 1.2)
    assert total._has_kink(flat + noise[0], flat + noise[1], bent + noise[2], 0.9, 1.0, 1.1)
    assert not total._has_kink(flat + 20 * noise[0], flat + 20 * noise[1], bent + 20 * noise[2], 0.9, 1.0, 1.1)
    assert not total._has_kink(0.9 * flat, flat, 1.1 * flat, 0.9, 1.0, 1.1)


# ---- slow: tight bounds


@pytest.mark.slow
def test_total_and_direct_of_a_real_cost():
    """An override, a number of the device, one kernel's efficiency and the front end; beside it a scenario whose tape
    does not tell. With nobody waiting both derivatives are the same."""
    base = {"schema_version": 1, "model": {"name": "llama-3.1-8b"}, "device": {"name": "h100"},
            "engine": {"max_num_seqs": 8, "max_num_batched_tokens": 512, "max_model_len": 2048},
            "workload": {"kind": "poisson", "rate_rps": 0.05, "num_requests": 24, "input": 300, "output": 24}}
    able = jaxsim.Scenario.from_dict(base)
    unable = jaxsim.Scenario.from_dict(base | {"engine": base["engine"] | {"pipeline_parallel_size": 2}})
    fields = ["cost.overrides.memory_bytes_per_s", "device.numbers.bf16_flops",
              "device.numbers.efficiency.gemm.bf16.read_efficiency", "cost.front_end_s"]
    made = jaxsim.sensitivity([able, unable], fields, ["mean_e2el_ms"])
    own = {r.field: r for r in made.rows if r.point == 0}
    assert sum(abs(r.total) > 0.02 for r in own.values()) >= 3
    for r in own.values():
        assert r.direct == pytest.approx(r.total, abs=0.01), r
    assert all(r.direct is None for r in made.rows if r.point == 1)
    assert made.direct_note == ""
    (note,) = made.notes
    assert note.startswith("no direct at point 1: engine.pipeline_parallel_size")

@pytest.mark.slow
def test_loads_by_theory_within_a_few_per_cent():
    """Longer runs, more seeds, higher loads."""
    loads = (0.3, 0.8)
    made = jaxsim.sensitivity([q.scenario(law, load, num_requests=6000, num_seeds=16) for law in LAWS
                               for load in loads], FIELDS, METRICS[:2], direct=False)
    assert made.programs == 1
    cases = [(law, load) for law in LAWS for load in loads]
    checked = 0
    for one in made.rows:
        law, load = cases[one.point]
        want = q.elasticity(law, load, one.metric, one.field, one.step)
        half = (one.total_high - one.total_low) / 2
        assert half < 0.15 * want, one
        # 4.07 and 2.13: Student's t with 15 degrees of freedom.
        assert abs(one.total - want) < 4.07 / 2.13 * half, (one, want)
        checked += 1
    assert checked == 24


@pytest.mark.slow
def test_intervals_of_runs_cover_the_theory():
    """Of 60 independent groups of eight seeds."""
    many = [q.scenario("M/D/1", 0.5, seed=1000 + 8 * k) for k in range(60)]
    made = jaxsim.sensitivity(many, FIELDS[1:], METRICS[1:2], direct=False)
    want = q.elasticity("M/D/1", 0.5, METRICS[1], FIELDS[1], 0.03)
    held = sum(r.total_low < want < r.total_high for r in made.rows)
    assert 51 <= held <= 60


@pytest.mark.slow
def test_a_study_has_rows_at_every_point(monkeypatch):
    """Points that cannot be simulated are kept with the reason; tables are made once a scenario, field and side."""
    monkeypatch.setattr(total, "LANES", Lanes())
    monkeypatch.setattr(runner, "LANES", total.LANES)
    base = q.scenario("M/D/1", 0.5, num_requests=200).to_dict()
    study = Study.from_dict({"schema_version": 1, "scenario": base, "axes": {
        "workload.rate_rps": [32.0, 64.0], "engine.num_gpu_blocks_override": [1024, 2]}})
    made_costs = []
    make = total.LANES._costs.get
    monkeypatch.setattr(total.LANES._costs, "get", lambda key, f: make(key, lambda: made_costs.append(key) or f()))
    made = jaxsim.sensitivity(study, "cost.prefill.b", "mean_e2el_ms", direct=False)
    assert set(made.refused) == {1, 3} and [r.point for r in made.rows] == [0, 2]
    assert made.rows[0].total < made.rows[1].total
    assert len(made_costs) == len(set(made_costs)) <= 2 * 3
    frame = made.to_frame()
    assert frame["workload.rate_rps"].tolist() == [32.0, 64.0]
