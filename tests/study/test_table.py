"""Columns of studies against the metrics of single runs, of everything that not every run has."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest

import jaxsim
from jaxsim.metrics import FINISHED, LaneResult, flatten, lane_metrics, request_frame
from jaxsim.metrics.lane import FAILED, REJECTED, TIMED_OUT
from jaxsim.spec.device import load_device
from jaxsim.spec.scenario import SloSection
from jaxsim.study import runner
from jaxsim.study.table import columns, requests
from jaxsim.study.tile import Runs
from tests.engine import test_context_reuse, test_images, test_role_switching_scenarios
from tests.metrics.lanes import blank_lane, scenario, simulated, with_everything

pytestmark = pytest.mark.unoptimised

LIMITS = SloSection(ttft_ms=200.0, tpot_ms=15.0, e2e_ms=3000.0)

ELSEWHERE = ("mean_power_w", "energy_", "slo.ttft_ms", "slo.tpot_ms", "slo.e2e_ms", "slo.separate_p90", "cost.")
"""Of devices, of the scenario, or of single runs only."""


def runs_of(lanes: list[LaneResult]) -> Runs:
    """A tile's answer that says of each run what a lane says."""
    def stacked(name: str):
        if name == "is_real":
            return np.ones((len(lanes), lanes[0].num_requests), bool)
        values = [getattr(lane, name) for lane in lanes]
        if name == "fault":
            return tuple(values)
        if name == "num_blocks":
            values = [np.broadcast_to(v, len(lane.busy_s)) for v, lane in zip(values, lanes, strict=True)]
        return None if values[0] is None else np.stack([np.asarray(v) for v in values])

    return Runs(**{field.name: stacked(field.name) for field in dataclasses.fields(Runs)})


def same(found, value) -> bool:
    if value is None:
        return found is None or found != found
    return found == value if isinstance(value, (str, bool)) else found == pytest.approx(value, rel=1e-9, abs=1e-12)


def compare(lanes, found, row: int, metrics, names: set[str]) -> None:
    """Every metric of a run that has a column, and all of these names."""
    seen = set()
    for name, value in flatten(metrics).items():
        if name.startswith(ELSEWHERE):
            continue
        assert same(found[name][row], value), (name, found[name][row], value)
        seen.add(name.partition(".")[0])
    assert names <= seen, names - seen


@pytest.mark.parametrize("window_s", [(0.0, 0.0), (2.0, 3.0)])
def test_columns_are_the_metrics_of_single_runs(window_s):
    """Lanes that have all that any has: the two ways to make the same numbers agree, and so do the requests."""
    lanes = [with_everything(simulated(seed, num_blocks=330, rate_rps=14.0, num_requests=200)[0], seed)
             for seed in (0, 1)]
    for lane in lanes:
        assert {FINISHED, TIMED_OUT, REJECTED, FAILED} == set(lane.status.tolist()) and lane.preemptions.sum() > 0
    runs = runs_of(lanes)
    found = columns(runs, [LIMITS] * 2, *(np.full(2, seconds) for seconds in window_s))
    for row, lane in enumerate(lanes):
        compare(lanes, found, row, lane_metrics(lane, LIMITS, *window_s), {
            "outcomes", "outages", "transfers", "migrations", "scaling", "role_switching", "swaps", "loads",
            "sessions"})
    listed, frame = requests(runs), request_frame(lanes[0])
    shared = set(listed) & set(frame.columns)
    assert {"images", "encode_s", "embedding_s", "loaded_tokens", "restarts", "attempts", "swap_s"} <= shared
    mine = listed["run"] == 0
    for name in shared - {"status"}:
        np.testing.assert_allclose(np.asarray(listed[name][mine], float), frame[name].to_numpy(float), atol=1e-12,
                                   err_msg=name)
    assert (listed["status"][mine] == frame["status"]).all()


def test_instances_that_are_off_cost_nothing():
    """By hand: two H100 from 0 to 10 s, one of them on for 5 s; busy for 4 and 2 s."""
    lane = blank_lane([0.0, 1.0], [5.0, 10.0], busy_s=np.array([4.0, 2.0]), device_busy_s=np.array([4.0, 2.0]),
                      instance_s=15.0, starts=1, drains=0, kv_block_s=np.ones(2), running_s=np.ones(2),
                      kv_peak_blocks=np.ones(2, int))
    device, made = load_device("h100"), SimpleNamespace(scenario=scenario())
    for one, on_s in ((lane, 15.0), (dataclasses.replace(lane, instance_s=None), 20.0)):
        out = runs_of([one])
        found = columns(out, [LIMITS], np.zeros(1), np.zeros(1))
        found = runner._per_device([made], found, out)
        power = device.power
        assert found["energy_j"][0] == pytest.approx(power.idle_w * on_s + (power.busy_w - power.idle_w) * 6.0)
        # Ten tokens came out, in ten seconds; a device that is off is not paid for.
        assert found["usd_per_million_output_tokens"][0] == pytest.approx(1e6 * device.usd_per_h / 3600 * on_s / 10)
        assert found["num_devices"][0] == 2 and found["output_throughput_per_device"][0] == pytest.approx(0.5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["loads", "role_switching", "images"])
def test_studies_equal_runs_one_by_one(name):
    """The engine's own answers, of what has columns of its own."""
    load = dict(kind="poisson", rate_rps=6.0, num_requests=40, output=8, prefix_groups={"number": 12, "tokens": 4096})
    made = {"loads": lambda: test_context_reuse.scenario({"recomputed_layers": 4},
                                                         engine={"num_gpu_blocks_override": 1200}, **load),
            "role_switching": test_role_switching_scenarios.changed, "images": test_images.changed}[name]()
    result, (rows, refused) = jaxsim.simulate(made), runner.table([made])
    assert not refused and len(rows) == len(result.lanes[0])
    for row, metrics in enumerate(result.runs[0]):
        compare(result.lanes[0], rows, row, metrics, {name} if name != "images" else {"transfers"})
