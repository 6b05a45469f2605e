"""Metrics against their definitions, on real schedules and on hand-made lanes."""

import dataclasses
import math

import numpy as np
import pytest
from scipy import stats

from jaxsim import metrics
from jaxsim._core.errors import InputError
from jaxsim.metrics import Devices, Result, combine, lane_metrics, request_frame
from jaxsim.spec.device import ServingPower, device_catalogue
from jaxsim.spec.scenario import SloSection
from tests.metrics.lanes import blank_lane, scenario, simulated, token_gaps

LIMITS = SloSection(ttft_ms=200.0, tpot_ms=15.0, e2e_ms=3000.0)


@pytest.fixture(scope="module")
def starved():
    """Two instances with too little memory: queueing, preemption and stalls."""
    return simulated(seed=1, num_blocks=330, rate_rps=14.0)


def test_flat_keys_are_those_of_vllms_benchmark_client(starved):
    lane, _ = starved
    keys = lane_metrics(lane, LIMITS).keys()
    for key in ("duration", "completed", "failed", "total_input_tokens", "total_output_tokens",
                "request_throughput", "request_goodput", "output_throughput", "total_token_throughput"):
        assert key in keys
    for statistic in ("mean", "median", "std", "p50", "p90", "p95", "p99"):
        for latency in ("ttft", "tpot", "itl", "e2el"):
            assert f"{statistic}_{latency}_ms" in keys


def test_metrics_follow_their_definitions(starved):
    lane, result = starved
    m = lane_metrics(lane, LIMITS)
    ttft = np.array([r.ttft_s for r in result.requests]) * 1e3
    e2e = np.array([r.e2e_s for r in result.requests]) * 1e3
    many = lane.output_tokens > 1
    tpot = (lane.finish_s - lane.first_token_s)[many] / (lane.output_tokens[many] - 1) * 1e3
    for name, sample in (("ttft", ttft), ("e2el", e2e), ("tpot", tpot)):
        assert m[f"mean_{name}_ms"] == pytest.approx(sample.mean())
        assert m[f"std_{name}_ms"] == pytest.approx(sample.std())
        assert m[f"p95_{name}_ms"] == pytest.approx(np.percentile(sample, 95))
    duration = lane.finish_s.max() - lane.arrival_s.min()
    assert m["duration"] == duration
    assert m["output_throughput"] == pytest.approx(lane.output_tokens.sum() / duration)
    total = (lane.input_tokens + lane.output_tokens).sum()
    assert m["total_token_throughput"] == pytest.approx(total / duration)
    assert m["preemptions"]["total"] == lane.preemptions.sum() > 20
    assert m["kv"]["peak_share"] == lane.kv_peak_blocks.max() / 330


def test_gaps_between_tokens_match_every_single_gap(starved):
    lane, result = starved
    gaps = np.array(token_gaps(result, lane.input_tokens)) * 1e3
    m = lane_metrics(lane)
    assert len(gaps) == (lane.output_tokens - 1).sum()
    assert m["mean_itl_ms"] == pytest.approx(gaps.mean(), rel=1e-9)
    assert m["std_itl_ms"] == pytest.approx(gaps.std(), rel=0.016)
    for percentile in (50, 90, 95, 99):
        assert m[f"p{percentile}_itl_ms"] == pytest.approx(np.percentile(gaps, percentile), rel=0.016)


def test_attainment_is_joint_over_all_requests(starved):
    lane, _ = starved
    ttft, e2e = lane.first_token_s - lane.arrival_s, lane.finish_s - lane.arrival_s
    gaps = np.maximum(lane.output_tokens - 1, 1)
    tpot = (lane.finish_s - lane.first_token_s) / gaps
    good = (ttft <= 0.2) & (tpot <= 0.015) & (e2e <= 3.0)
    m = lane_metrics(lane, LIMITS)
    assert 0 < good.mean() < 1
    assert m["slo"]["attainment"] == good.mean()
    assert m["slo"]["ttft_attainment"] == (ttft <= 0.2).mean()
    assert m["request_goodput"] == pytest.approx(good.sum() / m["duration"])
    assert lane_metrics(lane)["slo"]["attainment"] is None and lane_metrics(lane)["request_goodput"] is None


def test_separate_rule_differs_from_the_joint_one():
    # 8 % miss TTFT and another 8 % miss TPOT: each p90 is met, 84 % meet both.
    count = 100
    ttft = np.where(np.arange(count) < 8, 1.0, 0.1)
    tpot = np.where(np.arange(count) >= 92, 1.0, 0.01)
    lane = blank_lane(np.zeros(count), ttft + 4 * tpot, first_token_s=ttft)
    slo = lane_metrics(lane, SloSection(ttft_ms=500.0, tpot_ms=100.0))["slo"]
    assert slo["attainment"] == pytest.approx(0.84)
    assert slo["separate_p90"] is True


def test_one_token_outputs_stay_outside_tpot_and_meet_its_limit():
    ones, five = np.array([1, 1, 5]), 1.0 + 4 * 0.02
    lane = blank_lane([0.0, 0.0, 0.0], [1.0, 1.0, five], first_token_s=np.ones(3), output_tokens=ones)
    m = lane_metrics(lane, SloSection(tpot_ms=30.0))
    assert m["mean_tpot_ms"] == pytest.approx(20.0)
    assert m["slo"]["attainment"] == 1.0
    only = blank_lane([0.0], [1.0], first_token_s=np.ones(1), output_tokens=np.ones(1, int))
    assert lane_metrics(only)["mean_tpot_ms"] is None and lane_metrics(only)["p99_itl_ms"] is None


def test_unfinished_requests_fail_and_meet_nothing():
    lane = blank_lane([0.0, 1.0], [2.0, np.nan], first_token_s=np.array([0.5, 1.5]))
    m = lane_metrics(lane, SloSection(ttft_ms=600.0))
    assert (m["completed"], m["failed"]) == (1, 1)
    assert m["slo"]["attainment"] == 0.5


def test_nothing_completed_gives_none_and_never_nan():
    lane = blank_lane([0.0, 1.0], [np.nan, np.nan], scheduled_s=np.full(2, np.nan), fault="step limit")
    flat = metrics.flatten(lane_metrics(lane, LIMITS))
    assert flat["duration"] is None and flat["mean_ttft_ms"] is None and flat["fault"] == "step limit"
    assert not [k for k, v in flat.items() if isinstance(v, float) and not math.isfinite(v)]


def test_warmup_leaves_early_requests_out():
    arrival = np.array([0.0, 1.0, 2.0, 3.0])
    lane = blank_lane(arrival, arrival + [9.0, 9.0, 1.0, 1.0])
    m = lane_metrics(lane, warmup_s=2.0)
    assert (m["completed"], m["num_warmup_requests"]) == (2, 2)
    assert m["mean_e2el_ms"] == pytest.approx(1000.0)
    assert m["duration"] == 2.0


def test_cooldown_leaves_late_requests_out_and_rates_are_of_the_window():
    """What ends in the window counts, whenever it arrived: neither filling nor the drain is in a rate."""
    arrival = np.arange(11.0)
    lane = blank_lane(arrival, arrival + 2.5)
    m = lane_metrics(lane, SloSection(e2e_ms=3000.0), warmup_s=2.0, cooldown_s=4.0)
    # Arrivals 2..6 are measured; the ends of arrivals 0..3 (2.5 to 5.5 s) lie between 2 and 6 s.
    assert (m["num_requests"], m["num_warmup_requests"], m["num_cooldown_requests"]) == (5, 2, 4)
    assert (m["window_s"], m["duration"]) == (4.0, 6.5)
    assert m["request_throughput"] == m["request_goodput"] == 1.0
    # Their first tokens are their last here: five and ten tokens each.
    assert m["output_throughput"] == 5.0 and m["total_token_throughput"] == 15.0
    assert m["completed"] == 5 and m["total_output_tokens"] == 25 and m["slo"]["attainment"] == 1.0
    whole = lane_metrics(lane)
    assert whole["window_s"] == whole["duration"] == 12.5 and whole["request_throughput"] == 11 / 12.5
    # A queue that drains only after arrivals have ended serves less than what arrives, and the window says so.
    slow = blank_lane(arrival, 1.0 + 3.0 * np.arange(1, 12))
    assert lane_metrics(slow, cooldown_s=1.0)["request_throughput"] == pytest.approx(2 / 9)
    # Five tokens from 1 to 5 s after each arrival: of each so many seconds, of 4, lie between 2 and 6 s.
    spread = blank_lane(arrival, arrival + 5.0, first_token_s=arrival + 1.0)
    inside_s = sum(max(min(a + 5, 6) - max(a + 1, 2), 0) for a in range(11))
    assert lane_metrics(spread, warmup_s=2.0, cooldown_s=4.0)["output_throughput"] == pytest.approx(
        5 * inside_s / 4 / 4)
    empty = lane_metrics(lane, warmup_s=6.0, cooldown_s=6.0)
    assert empty["num_requests"] == 0 and empty["window_s"] is None and empty["request_throughput"] is None


def test_energy_is_between_idle_and_busy():
    """By hand: two devices, an instance busy for 4 of 10 s; without figures there is none."""
    lane = blank_lane([0.0, 1.0], [5.0, 10.0], busy_s=np.array([4.0]))
    m = lane_metrics(lane, devices=Devices(*np.array([[2.0], [100.0], [400.0], [math.nan]])))
    assert m["mean_power_w"] == pytest.approx(2 * (100 + 300 * 0.4))
    assert m["energy_j"] == pytest.approx(2 * (100 * 10 + 300 * 4)) and m["energy_wh"] == m["energy_j"] / 3600
    assert m["energy_j_per_output_token"] == pytest.approx(m["energy_j"] / 10)
    assert lane_metrics(lane)["energy_j"] is None
    for device in device_catalogue().values():
        if device.power:
            assert device.idle_w is None or device.idle_w <= device.power.idle_w
            assert device.power.idle_w < device.power.busy_w <= device.tdp_w and device.power.source
    with pytest.raises(InputError, match="busy_w"):
        ServingPower(idle_w=100.0, busy_w=50.0)


def test_instances_that_are_off_draw_nothing():
    """By hand: two devices, from 0 to 10 s, one of them on for 5 s; busy for 4 and 2 s."""
    lane = blank_lane([0.0, 1.0], [5.0, 10.0], busy_s=np.array([4.0, 2.0]), instance_s=15.0, starts=1, drains=0)
    devices = Devices(*np.array([[1.0, 1.0], [100.0, 100.0], [400.0, 400.0], [math.nan, math.nan]]))
    assert lane_metrics(lane, devices=devices)["energy_j"] == pytest.approx(100 * 15 + 300 * 6)
    always = dataclasses.replace(lane, instance_s=None)
    assert lane_metrics(always, devices=devices)["energy_j"] == pytest.approx(100 * 20 + 300 * 6)


def test_phases_add_up_to_the_whole(starved):
    lane, result = starved
    frame = request_frame(lane)
    parts = frame[["queue_s", "prefill_s", "decode_s", "stall_s"]].sum(axis=1)
    assert np.allclose(parts, frame["e2e_s"], atol=1e-12)
    assert (frame[["queue_s", "prefill_s", "decode_s", "stall_s"]] >= -1e-12).all().all()
    assert (frame["stall_s"] > 0).sum() > 20
    assert (frame["queue_s"].to_numpy() == lane.scheduled_s - lane.arrival_s).all()


def test_stalls_come_out_of_decode_first_where_nobody_says():
    # Stalled 3 s, of which the 2 s decode can hold only 2.
    lane = blank_lane([0.0], [5.0], first_token_s=np.array([3.0]), stall_s=np.array([3.0]))
    row = request_frame(lane).iloc[0]
    assert (row["prefill_s"], row["decode_s"], row["stall_s"]) == (2.0, 0.0, 3.0)


# ---- stability


def _queue(rng, load, count, cv=1.0):
    arrival = np.cumsum(rng.gamma(1 / cv**2, cv**2, count)) / load
    service, finish, free = rng.exponential(1.0, count), np.empty(count), 0.0
    for i in range(count):
        free = finish[i] = max(free, arrival[i]) + service[i]
    return blank_lane(arrival, finish, scheduled_s=finish - service)


@pytest.mark.parametrize("load, low, high", [(0.8, 0.0, 0.05), (0.9, 0.0, 0.12), (1.2, 0.85, 1.0),
                                             (1.5, 0.99, 1.0)])
def test_instability_is_found_in_overloaded_queues_only(load, low, high):
    rng = np.random.default_rng(0)
    share = np.mean([metrics.is_unstable(_queue(rng, load, 1000)) is True for _ in range(60)])
    assert low <= share <= high


def test_stability_cannot_be_told_from_little():
    assert metrics.is_unstable(blank_lane(np.arange(63.0), np.arange(63.0) + 1)) is None
    assert metrics.is_unstable(blank_lane(np.zeros(500), np.arange(500.0))) is None
    assert metrics.is_unstable(blank_lane(np.arange(64.0), np.arange(64.0) + 0.5)) is False


@pytest.mark.parametrize("lasts_s, answer", [(10.0, False), (60.0, False), (120.0, None)])
def test_filling_up_is_not_overload(lasts_s, answer):
    # Nobody waits: as many run as arrive while one runs, and until then their number rises.
    arrival = np.arange(100.0)
    assert metrics.is_unstable(blank_lane(arrival, arrival + lasts_s)) is answer


def test_an_excursion_of_the_queue_is_not_overload():
    arrival = np.arange(160.0)
    wait = np.where((arrival > 100) & (arrival < 130), 20.0, 0.0)
    assert metrics.is_unstable(blank_lane(arrival, arrival + wait + 1, scheduled_s=arrival + wait)) is False


def test_requests_that_never_start_are_waiting():
    arrival = np.arange(500.0)
    stuck = np.arange(500) % 4 == 0
    lane = blank_lane(arrival, np.where(stuck, np.nan, arrival + 0.5), scheduled_s=np.where(stuck, np.nan, arrival))
    assert metrics.is_unstable(lane) is True


# ---- over seeds


def test_interval_is_students():
    values = [1.0, 2.0, 4.0, 7.0]
    low, high = metrics.interval(values)
    expected = stats.t.interval(0.95, 3, loc=np.mean(values), scale=stats.sem(values))
    assert (low, high) == pytest.approx(expected)
    assert metrics.interval([3.0]) is None and metrics.interval([3.0, None]) is None


def test_interval_covers_the_mean_19_times_of_20():
    rng = np.random.default_rng(5)
    ends = [metrics.interval(list(rng.normal(10, 2, 8))) for _ in range(2000)]
    assert np.mean([low <= 10 <= high for low, high in ends]) == pytest.approx(0.95, abs=0.015)


def test_seeds_are_combined_key_by_key():
    runs = [{"completed": 4, "unstable": True, "fault": None, "slo": {"attainment": 0.5}, "x": 1.0},
            {"completed": 4, "unstable": True, "fault": None, "slo": {"attainment": 0.7}, "x": None},
            {"completed": 5, "unstable": False, "fault": "b", "slo": {"attainment": 0.6}, "x": 3.0}]
    means, intervals = combine(runs)
    assert means == {"completed": pytest.approx(13 / 3), "unstable": True, "fault": "b",
                     "slo": {"attainment": pytest.approx(0.6)}, "x": 2.0}
    assert intervals["slo.attainment"][0] < 0.6 < intervals["slo.attainment"][1]
    assert "unstable" not in intervals


@pytest.mark.parametrize("told, answer", [((True, None, None), None), ((True, True, None), True),
                                          ((True, False, None, None), False), ((None, None), None)])
def test_most_seeds_decide_and_may_say_nothing(told, answer):
    assert combine([{"unstable": value} for value in told])[0] == {"unstable": answer}


def test_tenants_are_told_apart():
    tenant = np.array([0, 1, 1, 1])
    lane = blank_lane(np.zeros(4), [1.0, 2.0, 3.0, np.nan], tenant=tenant, tenant_names=("a.b", "c"))
    m = lane_metrics(lane, SloSection(e2e_ms=2500.0))["tenants"]
    assert (m["a.b"]["completed"], m["c"]["completed"], m["c"]["failed"]) == (1, 2, 1)
    assert m["c"]["attainment"] == pytest.approx(1 / 3) and m["c"]["mean_e2el_ms"] == 2500.0
    assert combine([{"tenants": m}, {"tenants": m}])[0]["tenants"] == m
    assert lane_metrics(blank_lane([0.0], [1.0]))["tenants"] == {}


def test_result_frames(starved):
    lane, _ = starved
    result = Result([scenario(num_seeds=2), scenario(name="other", num_seeds=1)], [[lane, lane], [lane]])
    assert list(result.summary["name"]) == ["small", "other"]
    assert result.summary["slo.attainment"].between(0, 1).all()
    assert len(result.requests) == 3 * lane.num_requests
    assert result.requests.groupby(["scenario", "seed"]).size().index.tolist() == [(0, 0), (0, 1), (1, 0)]
    assert result.faults == ()
    with pytest.raises(ValueError, match="2 scenarios but lanes for 1"):
        Result([scenario(), scenario()], [[lane]])
