"""Axes, designs and formulas of a study."""

import math
from pathlib import Path

import numpy as np
import pytest

from jaxsim._core.errors import InputError
from jaxsim.study.expressions import Expression
from jaxsim.study.study import Study, shipped_studies

AXIS = {"engine.max_num_seqs": [8, 16]}


def study(**fields) -> Study:
    return Study.from_dict({"schema_version": 1, **fields})


def test_grid_zip_and_derived_fields():
    made = study(
        axes={"workload.rate_rps": {"from": 1, "to": 16, "num": 5, "scale": "log"}, **AXIS},
        zip=[{"engine.tensor_parallel_size": [1, 2, 4], "device.name": ["h100", "h200", "a100"]}],
        derived={"cluster.replicas": "8 / engine.tensor_parallel_size"}, where=["cluster.replicas < 8"])
    points = list(made.points())
    assert made.num_points_at_most == 30 and len(points) == 20
    assert [p["workload.rate_rps"] for p in points[::4]] == [1, 2, 4, 8, 16]
    assert {(p["engine.tensor_parallel_size"], p["device.name"], p["cluster.replicas"]) for p in points} == {
        (2, "h200", 4), (4, "a100", 2)}
    assert all(isinstance(p["cluster.replicas"], int) for p in points)
    scenario = made.scenario_at(points[-1])
    assert (scenario.engine.tensor_parallel_size, scenario.cluster.replicas) == (4, 2)
    # What no axis names is the scenario's, defaults included.
    where = ["cluster.replicas == 2", "engine.tensor_parallel_size != 1 or num_seeds == 8"]
    assert len(list(study(axes=AXIS, where=where).points())) == 2


def test_axes_reach_into_lists():
    """Of pools by their place, whose settings may be any; the scenario itself stays as it was."""
    pools = [{"role": "prefill"}, {"role": "decode", "replicas": 2}]
    base = {"schema_version": 1, "model": {"name": "llama-3.1-8b"}, "device": {"name": "h100"},
            "cluster": {"pools": pools}, "workload": {"kind": "poisson", "rate_rps": 1.0}}
    made = study(scenario=base, axes={"cluster.pools.0.replicas": [1, 3], "cluster.transfer.gb_per_s": [1.0, 2.0]},
                 zip=[{"cluster.pools.1.engine.max_num_seqs": [8, 16]}])
    points = list(made.points())
    assert len(points) == 8
    found = {(s.cluster.pools[0].replicas, s.cluster.pools[1].engine["max_num_seqs"], s.cluster.transfer.gb_per_s)
             for s in map(made.scenario_at, points)}
    assert found == {(replicas, n, gb) for replicas in (1, 3) for n in (8, 16) for gb in (1.0, 2.0)}
    assert made.base_tree()["cluster"]["pools"] == pools


def test_samples_fill_their_box():
    sample = {"num": 64, "axes": {"workload.rate_rps": {"from": 1, "to": 64, "scale": "log"},
                                  "engine.max_num_seqs": {"from": 8, "to": 64, "whole": True},
                                  "device.name": ["h100", "a100"]}}
    sobol, random = ([*study(sample=sample | {"method": method}).points()] for method in ("sobol", "random"))
    assert sobol == [*study(sample=sample).points()] and sobol != random and len(random) == 64
    rates = np.log2([p["workload.rate_rps"] for p in sobol])
    # One in each 64th: a Sobol sequence is that even.
    assert sorted(np.floor(rates / 6 * 64).astype(int)) == list(range(64))
    assert sum(p["device.name"] == "a100" for p in sobol) == 32
    assert all(isinstance(p["engine.max_num_seqs"], int) and 8 <= p["engine.max_num_seqs"] <= 64 for p in random)


def test_ranges():
    def values(**axis):
        return [p["cost.front_end_s"] for p in study(axes={"cost.front_end_s": axis}).points()]

    assert values(**{"from": 0, "to": 0.3, "num": 4}) == [0.0, 0.1, 0.2, 0.3]
    assert values(**{"from": 1, "to": 9, "num": 3, "whole": True}) == [1, 5, 9]
    assert values(**{"from": 1, "to": 3, "num": 9, "whole": True}) == [1, 2, 3]
    assert values(**{"from": 5, "to": 7, "num": 1}) == [5]


@pytest.mark.parametrize("fields, field, says", [
    ({}, "axes", "is empty"),
    ({"axes": {"workload.rate_rp": [1]}}, "axes.workload.rate_rp", None),
    ({"axes": {"engine.max_num_seq": [1]}}, "axes.engine.max_num_seq", "engine.max_num_seqs"),
    ({"axes": {"enginee.max_num_seqs": [1]}}, "axes.enginee.max_num_seqs", "engine.max_num_seqs"),
    ({"axes": {"cluster.pools.replicas": [1]}}, "axes.cluster.pools.replicas", "cluster.pools.0.replicas"),
    ({"axes": {"cluster.pools.0.replica": [1]}}, "axes.cluster.pools.0.replica", "cluster.pools.0.replicas"),
    ({"axes": {"engine.max_num_seqs": []}}, "axes.engine.max_num_seqs", "is empty"),
    ({"axes": {"cost.front_end_s": {"from": 0, "to": 1, "num": 3, "scale": "log"}}}, "axes.cost.front_end_s", "log"),
    ({"axes": {"cost.front_end_s": {"from": 0, "to": 1}}}, "axes.cost.front_end_s.num", "missing"),
    ({"axes": AXIS, "zip": [AXIS]}, "axes.engine.max_num_seqs", "twice"),
    ({"zip": [{**AXIS, "num_seeds": [1]}]}, "zip[0]", "different lengths"),
    ({"axes": AXIS, "where": ["__import__('os')"]}, "where[0]", "arithmetic"),
    ({"axes": AXIS, "where": ["engine.max_num_seqs >"]}, "where[0]", "not an expression"),
    ({"axes": AXIS, "where": ["foo.bar > 1"]}, "axes.foo.bar", "no field"),
    ({"axes": AXIS, "where": ["engine.block_size > 8"]}, "engine.block_size", "preset"),
    ({"axes": AXIS, "where": ["engine.max_num_seqs / 0"]}, "where[0]", "division"),
    ({"axes": AXIS, "where": ["2 ** 100 > engine.max_num_seqs"]}, "where[0]", "power"),
    ({"axes": AXIS, "derived": {"cluster.replicas": "'a' + 1"}}, "derived.cluster.replicas", "cannot be computed"),
    ({"axes": {"num_seeds": {"from": 1, "to": 9, "num": 1000000}, "warmup_s": {"from": 0, "to": 9, "num": 1000000}}},
     "axes", "more than"),
    ({"axis": AXIS}, "axis", "axes"),
    ({"axes": AXIS, "schema_version": 2}, "schema_version", None)])
def test_refusals(fields, field, says):
    with pytest.raises(InputError) as caught:
        list(study(**fields).points())
    assert caught.value.field == field and (says is None or says in str(caught.value))


def test_shipped_studies():
    assert shipped_studies()
    for name in shipped_studies():
        made = Study.from_toml(name)
        points = list(made.points())
        assert points and made.description and made.scenario_at(points[0])
    with pytest.raises(InputError, match="batch-limits"):
        Study.from_toml("batch-limit")


def test_expressions():
    fields = {"a.b": 3, "c": 0.5, "name": "x"}
    for text, value in (("a.b * 2 + 1", 7), ("a.b if c < 1 else 0", 3), ("not (c > 0 and a.b == 3)", False),
                        ("min(a.b, 2) ** 3 % 5", 3), ("name in ['x', 'y']", True), ("1 < a.b < 3", False),
                        ("ceil(a.b * c) - floor(c)", 2), ("log2(8)", 3.0), ("-a.b // 2", -2)):
        assert Expression(text, "here")(fields.__getitem__) == value
    assert Expression("a.b + c * a.b", "here").fields == {"a.b", "c"}
    assert math.isclose(Expression("sqrt(2)", "here")(fields.__getitem__), math.sqrt(2))


def test_paths_count_from_the_folder_of_the_study(tmp_path, monkeypatch):
    """Those of an inline scenario and those of an axis, from wherever it is read."""
    folder = tmp_path / "mine"
    folder.mkdir()
    trace = ("schema_version = 1\n[scenario]\nschema_version = 1\nnum_seeds = 1\n"
             'cost = {{ kind = "fitted", prefill = {{ b = 1e-5 }}, decode = {{ a = 0.01 }} }}\n'
             'engine = {{ num_gpu_blocks_override = 100, max_model_len = 512 }}\n'
             'workload = {{ kind = "trace", trace = "{trace}" }}\n[axes]\n{axes}\n')
    for name in ("a.csv", "b.csv"):
        (folder / name).write_text("arrival_s,input_tokens,output_tokens\n0,10,2\n1,20,3\n")
    (folder / "inline.toml").write_text(trace.format(trace="a.csv", axes='"engine.max_num_seqs" = [1, 2]'))
    (folder / "axis.toml").write_text(trace.format(
        trace="a.csv", axes='"workload.trace" = ["a.csv", "b.csv"]\n"engine.preset" = ["vllm-v1", "mine.toml"]'))
    monkeypatch.chdir(tmp_path)
    for given in ("mine/inline.toml", str(folder / "inline.toml")):
        made = Study.from_toml(given)
        scenario = made.scenario_at(next(made.points()))
        assert Path(scenario.workload.trace).samefile(folder / "a.csv")
    points = list(Study.from_toml("mine/axis.toml").points())
    assert [Path(p["workload.trace"]).name for p in points[::2]] == ["a.csv", "b.csv"]
    assert all(Path(p["workload.trace"]).is_file() for p in points)
    assert [p["engine.preset"] for p in points[:2]] == ["vllm-v1", "mine/mine.toml"]
    # A table from Python has no folder: its paths are the caller's.
    plain = study(axes={"workload.trace": ["a.csv"]})
    assert next(plain.points())["workload.trace"] == "a.csv"


def test_a_window_without_requests_is_refused():
    """A cool-down by itself, or beside a warm-up, that leaves nothing of the arrivals."""
    made = study(axes={"warmup_s": [0.0, 100.0], "cooldown_s": [10.0, 200.0]})
    base = made.base_tree()
    base["workload"] = {**base["workload"], "rate_rps": 4.0, "num_requests": 1000}
    scenarios = [made.scenario_at(point, base) for point in list(made.points())[:3]]
    assert [(s.warmup_s, s.cooldown_s) for s in scenarios] == [(0, 10), (0, 200), (100, 10)]
    with pytest.raises(InputError, match="cooldown_s = 200.*beside warmup_s = 100.*within about 250 s"):
        made.scenario_at({"warmup_s": 100.0, "cooldown_s": 200.0}, base)
