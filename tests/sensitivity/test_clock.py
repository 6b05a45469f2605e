"""A GPU's clock: what follows it and what does not, what it must be at the highest, its derivatives of both kinds."""

import math

import msgspec
import numpy as np
import pytest

from jaxsim import InputError, Scenario
from jaxsim.cost.base import BatchStats
from jaxsim.cost.roofline import roofline
from jaxsim.engine.simulate import simulate
from jaxsim.metrics import devices_of
from jaxsim.metrics.summary import lane_metrics
from jaxsim.sensitivity import costs, direct, fields
from jaxsim.spec.device import LEAST_CLOCK, load_device
from jaxsim.spec.model import load_model
from jaxsim.study.lanes import Lanes

pytestmark = pytest.mark.unoptimised

TREE = {
    "schema_version": 1, "model": {"name": "llama-3.1-8b"}, "device": {"name": "a100-80gb"}, "num_seeds": 1,
    "engine": {"max_num_seqs": 8, "max_model_len": 4096},
    "workload": {"kind": "batch", "num_requests": 16,
                 "input": {"kind": "uniform", "min_tokens": 50, "max_tokens": 1500},
                 "output": {"kind": "uniform", "min_tokens": 2, "max_tokens": 60}}}


@pytest.fixture(scope="module")
def scenario() -> Scenario:
    return Scenario.from_dict(TREE)


def test_what_follows_the_clock():
    full = load_device("a100-80gb")
    slow = msgspec.structs.replace(full, clock=0.8)
    assert slow.peak("bf16").flops == 0.8 * full.peak("bf16").flops and slow.bf16_flops == full.bf16_flops
    before, after = (vars_of(one.kernel_efficiency()) for one in (full, slow))
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"decode"} and after["decode"].sweep_s == full.kernel_efficiency().decode.sweep_s / 0.8
    models = [roofline(load_model("llama-3.1-8b"), one) for one in (full, slow)]
    assert float(models[1].memory_bytes_per_s) == float(models[0].memory_bytes_per_s)
    ratio = float(models[1].peak_flops / models[0].peak_flops)
    assert ratio == pytest.approx(0.8, rel=1e-6)
    # Dynamic watts alone.
    power = full.power
    assert power.at_work_w(0.8) == pytest.approx(power.idle_w + (power.busy_w - power.idle_w) * 0.8**1.35)


def vars_of(struct):
    return {name: getattr(struct, name) for name in struct.__struct_fields__}


def test_the_highest_clock_is_what_is_left_out(scenario):
    written, lanes = scenario.with_values({"device.clock": 1.0}), Lanes()
    assert fields.fingerprint(written, lanes) == fields.fingerprint(scenario, lanes)
    slower = scenario.with_values({"device.clock": 0.9})
    assert fields.fingerprint(slower, lanes) != fields.fingerprint(scenario, lanes)
    assert fields.field_of(scenario, "device.clock") == ("device.clock", 1.0, False)
    # A number of the device's own is the one of the datasheet, and what was set stays set.
    own = fields.with_value(slower, "device.numbers.bf16_flops", load_device("a100-80gb").bf16_flops)
    assert fields.fingerprint(own, lanes) == fields.fingerprint(slower, lanes)


def test_there_is_a_side_below_alone(scenario):
    low, high = fields.sides(scenario, fields.field_of(scenario, "device.clock"), 0.1, Lanes())
    assert low.scenario.device.clock == math.exp(-0.1) and high.scenario is None and "device.clock" in high.reason


@pytest.mark.parametrize("clock", [1.0, 0.85])
def test_differences_of_watts_are_derivatives(scenario, clock):
    """At the highest clock from below, of the same order."""
    near = costs.neighbours(scenario.with_values({"device.clock": clock}), "device.clock", costs.STEP)
    assert len(near) == (3 if clock == 1.0 else 2)
    watts = costs.slope([weight for _, weight in near], [devices_of(one, 1).busy_w for one, _ in near])
    power = load_device("a100-80gb").power
    assert watts == pytest.approx(1.35 * (power.busy_w - power.idle_w) * clock**1.35, rel=1e-7)


@pytest.mark.parametrize("values, says", [
    ({"device.clock": 0.5}, "no share of the highest clock from 0.7 to 1"),
    ({"device.clock": 1.1}, "no share of the highest clock"),
    ({"device": {"name": "tpu-v5e", "clock": 0.9}}, "tpu_v5e is none"),
    ({"device.clock": 0.9, "cost": {"kind": "fitted", "prefill": {"a": 0.01}, "decode": {"a": 0.01}}},
     "which a fitted cost is not made of"),
    ({"device": {"name": "mine", "numbers": {"clock": 0.9, "kind": "gpu", "memory_bytes": 80_000_000_000,
                                             "memory_bytes_per_s": 2e12, "bf16_flops": 3e14}},
      "cost": {"kind": "fitted", "prefill": {"a": 0.01}, "decode": {"a": 0.01}}},
     "which a fitted cost is not made of"),
    ({"device.clock": 0.9, "cluster": {"pools": [{"role": "prefill", "replicas": 1, "device": "h100"},
                                                 {"role": "decode", "replicas": 1}]}}, "runs at its highest"),
])
def test_what_has_no_clock_is_refused(scenario, values, says):
    with pytest.raises(InputError, match=says) as error:
        scenario.with_values(values)
    assert error.value.field == "device.clock"


def test_decodes_are_as_fast_at_four_fifths():
    """Greener LLMs (arXiv 2403.20306): at 1.6 GHz about the throughput of 2.0 GHz for most batch sizes."""
    full = load_device("h100")
    models = [roofline(load_model("llama-3.1-8b"), one) for one in (full, msgspec.structs.replace(full, clock=0.8))]
    for batch in (1, 8, 64):
        fast, slow = (float(one.explain(BatchStats.of(batch, batch * 700)).seconds) for one in models)
        assert 0.95 <= fast / slow <= 1.0
    assert LEAST_CLOCK < 0.8


@pytest.mark.slow
@pytest.mark.parametrize("clock", [1.0, 0.85])
def test_direct_by_the_clock_is_the_total_of_a_batch(scenario, clock):
    """Nobody arrives while anything runs, so differences of whole runs say the same; and of times the clock is the sum
    of the arithmetic that follows it."""
    one = scenario.with_values({"device.clock": clock, "device.name": "h100"})
    metrics, below = ["mean_ttft_ms", "mean_tpot_ms", "energy_j"], 0.98
    names = ["device.clock", "cost.overrides.peak_flops", "cost.overrides.attention_flops"]
    found = direct.direct([one], names, metrics)
    runs = simulate([one.with_values({"device.clock": clock * x}) for x in (1.0, below, below**2)])
    values = [lane_metrics(lanes[0]) for lanes in runs.lanes]
    for name in metrics[:2]:
        assert found[0, name, names[0]] == pytest.approx(sum(found[0, name, x] for x in names[1:]), rel=1e-5)
        assert found[0, name, names[0]] < -0.05
        first, second, third = (math.log(one[name]) for one in values)
        total = (-1.5 * first + 2 * second - 0.5 * third) / math.log(below)
        assert found[0, name, names[0]] == pytest.approx(total, rel=0.02), name
    # Energy: what is drawn at work falls, and lasts longer.
    by_times = sum(found[0, "energy_j", x] for x in names[1:])
    assert by_times < 0 < found[0, "energy_j", names[0]] < 1.35 + by_times
    power, busy_w = load_device("h100").power, devices_of(one, 1).busy_w[0]
    lane = runs.lanes[0][0]
    share = float(np.asarray(lane.busy_s)[0] / lane.span_s)
    mean_w = power.idle_w + (busy_w - power.idle_w) * share
    watts = 1.35 * (busy_w - power.idle_w) * share / mean_w
    assert found[0, "energy_j", names[0]] - by_times == pytest.approx(watts, rel=1e-4)
