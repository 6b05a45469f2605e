"""Designs: budgets, slopes and search of the closed form; what simulation says of the shipped one."""

import copy
import json

import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest

from jaxsim._core.errors import InputError
from jaxsim.cli.commands import main
from jaxsim.engine import lower
from jaxsim.planning import codesign
from jaxsim.planning.codesign import AROUND, Design, Space, confirmed, more_of_each, neighbours, search, worth_of
from jaxsim.spec.scenario import Scenario
from jaxsim.spec.toml import dump_toml

pytestmark = pytest.mark.unoptimised

TREE = {
    "schema_version": 1, "budgets": {"area": 1000.0, "power": 500.0}, "fixed": {"area": 200.0},
    "resources": [
        {"name": "compute", "numbers": ["kernels.peak_flops", "kernels.attention_flops"], "unit": 1e12,
         "costs": {"area": 0.5, "power": 0.3}},
        {"name": "bandwidth", "numbers": ["kernels.memory_bytes_per_s"], "unit": 1e12, "costs": {"area": 90.0}},
        {"name": "memory", "numbers": ["memory_bytes"], "unit": 1e9, "least": 24.0,
         "costs": {"area": 2.0, "power": 1.0}}],
    "scenario": {"schema_version": 1, "num_seeds": 2, "slo": {"ttft_ms": 400.0, "tpot_ms": 16.0},
                 "model": {"name": "llama-3.1-8b"}, "device": {"name": "h100"},
                 "engine": {"preset": "vllm-v1@0.9", "max_num_seqs": 16, "max_model_len": 1024},
                 "workload": {"kind": "poisson", "rate_rps": 4.0, "num_requests": 1000, "input": 300, "output": 60}}}


@pytest.fixture(scope="module")
def space() -> Space:
    return Space(Design.from_dict(TREE))


@pytest.mark.slow
def test_every_design_is_just_paid_for(space):
    """One budget is spent, none is exceeded, proportions come back."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        z = rng.normal(size=3)
        amounts = np.asarray(space.on_surface(jnp.asarray(z)), np.float64)
        spent = space.costs @ amounts + np.array([200.0, 0.0])
        assert np.all(spent <= np.array([1000.0, 500.0]) * (1 + 1e-5)) and np.all(amounts > [0, 0, 24])
        assert np.max(spent / [1000.0, 500.0]) == pytest.approx(1.0, rel=1e-5)
        again = space.on_surface(jnp.asarray(space.proportions(amounts)))
        assert np.allclose(again, amounts, rtol=1e-4)
    for name, beside in neighbours(space, amounts).items():
        assert np.max((space.costs @ beside + [200.0, 0.0]) / [1000.0, 500.0]) == pytest.approx(1.0, rel=1e-5), name


@pytest.mark.slow
def test_memory_is_room_as_the_engine_has_it(space):
    """At the device's own memory its own blocks; a gigabyte more, the blocks that the engine makes of its share."""
    own = space.start.copy()
    blocks = int(space.deployed.numbers["executor.kv_tokens"]) // 16
    made = space.scenario_of(own, 3.0)
    assert abs(made.engine.num_gpu_blocks_override - blocks) <= 1 and made.workload.rate_rps == 3.0
    assert made.cost.overrides["peak_flops"] == pytest.approx(989.4e12, rel=1e-4)
    more = space.scenario_of(own + [0, 0, 1], 3.0).engine.num_gpu_blocks_override - made.engine.num_gpu_blocks_override
    # 32 layers of 8 heads of 128 keys and values in 2 bytes, 16 tokens a block, 0.9 of the memory.
    assert more == pytest.approx(0.9e9 / (2 * 32 * 8 * 128 * 2 * 16), abs=1.5)


def test_the_crossing_of_a_limit():
    rates = 2.0 * AROUND
    # What is over the limit as a power of the rate is met exactly.
    assert codesign._crossing(rates, (rates / 2.1) ** 3) == pytest.approx(2.1)
    assert np.isnan(codesign._crossing(rates, rates * 10)) and np.isnan(codesign._crossing(rates, rates * 0.01))


@pytest.mark.parametrize("change, field", [
    ({"budgets": {"area": 210.0, "power": 500.0}}, "budgets.area"),
    ({"resources": [TREE["resources"][0] | {"costs": {"money": 1.0}}]}, "resources[0].costs"),
    ({"resources": [TREE["resources"][0] | {"costs": {}}]}, "resources[0].costs"),
    ({"resources": [TREE["resources"][0]] * 2}, "resources"),
    pytest.param({"resources": [TREE["resources"][0] | {"numbers": ["kernels.flops"]}]}, "resources[0].numbers",
                 marks=pytest.mark.slow),
    pytest.param({"resources": [TREE["resources"][0] | {"least": 1000.0}], "budgets": {"area": 1e4, "power": 1e4}},
                 "resources[0].least", marks=pytest.mark.slow),
    ({"fixed": {"money": 1.0}}, "fixed"),
    ({"fixed": {"area": -1.0}}, "fixed.area"),
    ({"resources": [TREE["resources"][0], TREE["resources"][0] | {"name": "again"}]}, "resources[1].numbers"),
    ({"scenario": TREE["scenario"] | {"num_seeds": 1}}, "num_seeds"),
    ({"scenario": TREE["scenario"] | {"slo": {"ttft_ms": 300.0, "tpot_ms": 9.0, "e2e_ms": 1e4}}}, "slo.e2e_ms"),
    ({"scenario": TREE["scenario"] | {"workload": TREE["scenario"]["workload"] | {"tenants": [{"name": "a"}]}}},
     "workload.tenants"),
    pytest.param({"resources": [{"name": "rate", "numbers": ["power.busy_w"], "costs": {"area": 1e-3}}]},
                 "resources[0].numbers", marks=pytest.mark.slow),
    ({"scenario": TREE["scenario"] | {"slo": {"ttft_ms": 300.0}}}, "slo.tpot_ms")])
def test_what_cannot_be_designed_is_refused(change, field):
    with pytest.raises(InputError) as told:
        Space(Design.from_dict(copy.deepcopy(TREE) | change))
    assert told.value.field == field


@pytest.mark.slow
def test_worth_is_differences_and_the_search_climbs(space):
    """Elasticities against differences of the closed form; the best is no start, on the surface, and its elasticities a
    unit of the budget that binds are equal: Lagrange's condition."""
    pytest.importorskip("optax")
    found = worth_of(space, space.start).set_index("resource")["elasticity"]
    for index, name in enumerate(space.names):
        h = 0.01
        sides = [space.start * np.exp(sign * h * (np.arange(3) == index)) for sign in (1, -1)]
        above, below = (float(space.asked(jnp.asarray([side], float))[0][0]) for side in sides)
        assert found[name] == pytest.approx((above - below) / (2 * h), abs=0.03), name
    best = search(space, steps=40)
    # It moves: from what there is, by percents, and to where the others come from elsewhere.
    ends = np.exp(best.history[-1])
    assert best.has_own and best.history.shape[1] > 2 and ends[0] > 1.02 * np.exp(best.history[0, 0])
    assert np.ptp(ends) < 0.02 * ends.max() and np.ptp(np.exp(best.history[0])) > 0.04 * ends.max()
    # Lagrange: what is spent of the budget that binds brings the same wherever it goes; the other is not used up.
    spent = (space.costs @ best.amounts + [200.0, 0.0]) / [1000.0, 500.0]
    binding = ("area", "power")[int(np.argmax(spent))]
    assert spent.max() == pytest.approx(1.0, rel=1e-4) and spent.min() < 0.99
    brings = best.best_worth[f"percent_a_percent_of_{binding}"].to_numpy()
    before = best.worth[f"percent_a_percent_of_{binding}"].to_numpy()
    # Memory is at a kink, where one more is worth nothing and one less is; both others count.
    assert brings[0] == pytest.approx(brings[1], rel=0.15), (brings, before)
    assert max(before[:2]) > 1.3 * min(before[:2]) and min(brings[:2]) > 0.1
    rates = {name: float(np.exp(space.asked(jnp.asarray([amounts], float))[0][0]))
             for name, amounts in neighbours(space, best.amounts).items()}
    # By Adam in 32 bits, over tables with kinks.
    assert max(rates.values()) < 1.003 * best.rate_rps, rates


@pytest.mark.slow
def test_simulation_agrees_on_what_is_worth_more():
    """The gain of a tenth more, over 16 seeds: its interval is narrow beside the gain, and a closed form that is off by
    a quarter of it would be outside."""
    space = Space(Design.from_dict(TREE | {"scenario": TREE["scenario"] | {"num_seeds": 16}}))
    rows = confirmed(space, more_of_each(space, space.start)).set_index("design")
    assert rows["rate_rps"].notna().all()
    assert np.allclose(rows["rate_rps"], rows["closed_form_rps"], rtol=0.25)
    elasticity = worth_of(space, space.start).set_index("resource")["elasticity"]
    for name in space.names:
        row = rows.loc[f"{name} +10%"]
        assert row["high"] - row["low"] < 0.02, name
        assert row["low"] - 0.015 <= 1.1 ** elasticity[name] - 1 <= row["high"] + 0.015, name
    assert rows["gain"].max() > 0.04


def test_the_command_refuses_in_one_line(capsys, tmp_path):
    (tmp_path / "wrong.toml").write_text("schema_version = 2\n")
    (tmp_path / "no.toml").write_text("budgets = [\n")
    for arguments in (["nowhere"], ["accelerator", "--plot", "figure.txt"], [str(tmp_path / "wrong.toml")],
                      [str(tmp_path / "no.toml")]):
        assert main(["codesign", *arguments]) == 2
        assert capsys.readouterr().err.count("\n") == 1


class Closed:
    """What `confirmed` asks of a space."""

    def __init__(self, closed: list[float], num_seeds: int = 2):
        self.scenario = Scenario.from_dict(TREE["scenario"] | {"num_seeds": num_seeds})
        self.asked, self.names = lambda many: (jnp.log(jnp.asarray(closed)), None), ["compute"]

    def scenario_of(self, amounts, rate_rps):
        return self.scenario.with_values({"workload.rate_rps": float(rate_rps), "name": f"{amounts[0]}"})


def test_rates_go_on_until_a_limit_is_crossed(monkeypatch):
    """A closed form that is off by twice, both ways; what serves nothing, or crosses nothing, has no rate."""
    asked = []

    def simulated(scenarios):
        asked.append([one.workload.rate_rps for one in scenarios])
        rows = [{"point": at, "seed": seed, "mean_ttft_ms": 400 * one.workload.rate_rps / float(one.name) / seed_is,
                 "mean_tpot_ms": np.nan} for at, one in enumerate(scenarios) for seed, seed_is in ((0, 1.0), (1, 1.1))]
        return pd.DataFrame(rows), {}

    monkeypatch.setattr(codesign.runner, "table", simulated)
    designs = {"as foreseen": [4.0], "twice": [8.0], "half": [2.0], "endless": [1e9], "none": [1.0]}
    rows = confirmed(Closed([4.0, 4.0, 4.0, 4.0, codesign.LEAST_RPS]),
                     {name: np.array(x) for name, x in designs.items()}).set_index("design")
    assert rows["rate_rps"].iloc[:3].tolist() == pytest.approx([4.2, 8.4, 2.1])
    assert rows["gain"].iloc[:3].tolist() == pytest.approx([0.0, 1.0, -0.5])
    assert rows.loc[["endless", "none"], ["rate_rps", "gain", "low"]].isna().all(axis=None)
    assert len(asked) == 1 + codesign.WIDER and len(asked[0]) == 4 * len(AROUND) and min(map(min, asked)) > 0.5
    with pytest.raises(InputError, match="num_seeds"):
        confirmed(Closed([4.0], 1), {"one": np.array([4.0])})


def test_a_move_is_judged_by_other_seeds(monkeypatch):
    """The neighbour that is best under the first seeds is left again if others say that the closed form's best is
    better."""
    seeds = []

    def judged(space, designs, *, seeds_from):
        seeds.append(seeds_from)
        better = "up +10%" if not seeds_from else "closed form" if len(seeds) == 2 else None
        return pd.DataFrame([{"design": name, "rate_rps": 1.0, "low": 0.01 if name == better else -0.01}
                             for name in designs])

    monkeypatch.setattr(codesign, "confirmed", judged)
    monkeypatch.setattr(codesign, "neighbours", lambda space, amounts: {"up +10%": amounts * 1.1})
    amounts, rows = codesign.polished(Closed([4.0]), np.array([4.0]))
    assert amounts.tolist() == [4.0] and seeds == [0, 2, 4] and rows["round"].iloc[0] == 2


@pytest.mark.slow
def test_memory_is_worth_what_it_holds(space):
    """Where the weights do not fit nothing is served, and a gigabyte more is the only thing that is worth something; an
    engine's watermark is taken off its blocks once."""
    own = space.start.copy()
    own[2] = 14.0
    value, slopes = (np.asarray(x[0]) for x in space.asked(jnp.asarray([own], float)))
    assert np.exp(value) <= codesign.LEAST_RPS and slopes[2] > 0 and slopes[0] == slopes[1] == 0
    engine = TREE["scenario"]["engine"] | {"preset": "vllm-v0"}
    first = Space(Design.from_dict(TREE | {"scenario": TREE["scenario"] | {"engine": engine}}))
    system = lower.resolve_system(first.scenario)
    assert system.scheduler.watermark > 0
    made = first.scenario_of(first.start, 3.0)
    assert abs(made.engine.num_gpu_blocks_override - system.num_blocks) <= 1
    assert float(first.numbers(first.start)["executor.kv_tokens"]) == pytest.approx(
        float(first.deployed.numbers["executor.kv_tokens"]))


@pytest.mark.slow
def test_numbers_of_a_resource_keep_their_proportion():
    """In 8 bits products of weights are twice as fast as attention's of 16, of any amount."""
    model = TREE["scenario"]["model"] | {"dtype": "fp8", "kv_dtype": "bf16"}
    space = Space(Design.from_dict(TREE | {"scenario": TREE["scenario"] | {"model": model}}))
    known, found = space.deployed.numbers, space.numbers(space.start * 1.5)
    peak, attention = "kernels.peak_flops", "kernels.attention_flops"
    assert float(known[peak]) > 1.5 * float(known[attention])
    for name in (peak, attention):
        assert float(found[name]) == pytest.approx(1.5 * float(known[name]), rel=1e-5), name


@pytest.mark.slow
def test_the_command_to_its_end(capsys, tmp_path):
    """As JSON with a figure, and as text: with and without a search, and what cannot be simulated without that."""
    pytest.importorskip("optax")
    tree = TREE | {"scenario": TREE["scenario"] | {"workload": TREE["scenario"]["workload"] | {"num_requests": 100}}}
    path = tmp_path / "small.toml"
    path.write_text(dump_toml(tree))
    for index, flags in enumerate((["--next"], ["--no-confirm"], [])):
        figure = tmp_path / f"{index}.png"
        assert main(["codesign", str(path), *flags, "--json", "--plot", str(figure)]) == 0
        found = json.loads(capsys.readouterr().out)
        assert figure.stat().st_size > 5000 and [row["resource"] for row in found["worth"]] == [
            "compute", "bandwidth", "memory"]
        if flags != ["--next"]:
            assert found.keys() == {"amounts", "closed_form", "worth", "confirmed"}
            assert found["closed_form"].keys() == {"amounts", "rate_rps", "starts_rps", "worth"}
        if flags != ["--no-confirm"]:
            assert found["confirmed"][0]["rate_rps"] > 0 and found["confirmed"][0]["gain"] == 0
    assert main(["codesign", str(path), "--next"]) == 0
    assert "by simulation" in capsys.readouterr().out
