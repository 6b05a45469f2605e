"""Designs: budgets, slopes and search of the closed form; what simulation says of the shipped one."""

import copy

import jax.numpy as jnp
import numpy as np
import pytest

from jaxsim._core.errors import InputError
from jaxsim.cli.commands import main
from jaxsim.planning import codesign
from jaxsim.planning.codesign import AROUND, Design, Space, confirmed, more_of_each, neighbours, search, worth_of

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
    assert best.rate_rps > 1.02 * float(np.exp(best.history[0].max())) or np.ptp(np.exp(best.history[-1])) < 0.02
    rates = {name: float(np.exp(space.asked(jnp.asarray([amounts], float))[0][0]))
             for name, amounts in neighbours(space, best.amounts).items()}
    # By Adam in 32 bits, over tables with kinks.
    assert max(rates.values()) < 1.003 * best.rate_rps, rates


@pytest.mark.slow
def test_simulation_agrees_on_what_is_worth_more(space):
    rows = confirmed(space, more_of_each(space, space.start)).set_index("design")
    assert rows["rate_rps"].notna().all()
    assert np.allclose(rows["rate_rps"], rows["closed_form_rps"], rtol=0.25)
    elasticity = worth_of(space, space.start).set_index("resource")["elasticity"]
    for name in space.names:
        row = rows.loc[f"{name} +10%"]
        assert row["low"] - 0.03 <= 1.1 ** elasticity[name] - 1 <= row["high"] + 0.03, name


def test_the_command_refuses_in_one_line(capsys, tmp_path):
    (tmp_path / "wrong.toml").write_text("schema_version = 2\n")
    (tmp_path / "no.toml").write_text("budgets = [\n")
    for arguments in (["nowhere"], ["accelerator", "--plot", "figure.txt"], [str(tmp_path / "wrong.toml")],
                      [str(tmp_path / "no.toml")]):
        assert main(["codesign", *arguments]) == 2
        assert capsys.readouterr().err.count("\n") == 1
