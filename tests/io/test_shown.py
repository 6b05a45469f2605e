"""What people see: the table, the listings and the plots."""

import io

import numpy as np
import pandas as pd
import pytest
from matplotlib.image import imread
from rich.console import Console

from jaxsim.io import plots, table
from jaxsim.io.listing import print_groups
from jaxsim.metrics import Result, request_frame
from tests.metrics.lanes import blank_lane, scenario, simulated


@pytest.fixture(scope="module")
def starved():
    lanes = [simulated(seed, num_blocks=330, rate_rps=14.0, num_requests=200)[0] for seed in (0, 1, 2)]
    return Result([scenario(num_seeds=3)], [lanes])


def printed(result) -> str:
    file = io.StringIO()
    table.print_summary(result, file=file)
    return file.getvalue()


def test_table_says_what_happened(starved):
    text = printed(starved)
    m, ends = starved.metrics[0], starved.intervals[0]
    half = (ends["mean_ttft_ms"][1] - ends["mean_ttft_ms"][0]) / 2
    assert f"{m['mean_ttft_ms']:,.0f} ± {half:,.0f}" in text
    for word in ("TTFT", "TPOT", "ITL", "end to end", "in the queue", "mean", "p50", "p90", "p95", "p99",
                 "200 completed, 0 failed", "TTFT <= 200 ms", "preemptions", "KV memory", "utilisation",
                 "vllm-v1@0.9", "2 replicas (least_outstanding)", "200 requests x 3 seeds"):
        assert word in text, word
    assert f"{100 * m['slo']['ttft_attainment']:.1f} %" in text


def test_unstable_runs_say_so(starved):
    assert starved.metrics[0]["unstable"] is True and "UNSTABLE" in printed(starved)
    calm = Result([scenario(num_seeds=1)], [[simulated(0, num_requests=100, rate_rps=4.0)[0]]])
    assert "UNSTABLE" not in printed(calm) and "±" not in printed(calm)


def test_faults_are_named():
    lane = blank_lane([0.0, 1.0], [1.0, np.nan], fault="step limit of 10")
    assert "stopped by" in printed(Result([scenario(num_seeds=1)], [[lane]]))


def test_piped_text_is_plain_and_fits_100_columns(starved):
    text = printed(starved)
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) <= 100
    assert not any(line != line.rstrip() for line in text.splitlines())


def test_wide_numbers_still_fit(starved):
    slow = [blank_lane(np.zeros(20), np.arange(20) * 1e5 + 1e5, first_token_s=np.arange(20) * 9e4 + 1)
            for _ in range(3)]
    text = printed(Result([scenario(num_seeds=3)], [slow]))
    assert max(map(len, text.splitlines())) <= 100 and "…" not in text


def test_a_terminal_gets_colours(starved):
    file = io.StringIO()
    table._print(starved, 0, Console(file=file, force_terminal=True, width=100))
    assert "\x1b" in file.getvalue()


@pytest.mark.parametrize("value, text", [
    (0, "0"), (0.0, "0"), (1234567, "1,234,567"), (1234.5, "1,234"), (123.4, "123"), (12.34, "12.3"),
    (1.234, "1.23"), (0.1234, "0.123"), (0.01234, "0.0123"), (None, "-")])
def test_numbers_have_three_digits(value, text):
    assert table.number(value) == text


def test_listing_is_a_table_or_paragraphs():
    file = io.StringIO()
    gaps = ["one thing that takes a while to say", "another", "two"]
    print_groups({"short": [{"name": "a", "also": ["long-name", "an"], "n": 3}],
                  "long": [{"name": "b", "also": [], "leaves out": gaps}]}, file)
    lines = file.getvalue().splitlines()
    assert lines[1].split() == ["name", "also", "n"] and lines[2].split() == ["a", "an", "3"]
    assert "b" in lines and any(line.endswith("- two") for line in lines)
    assert not any("also" in line for line in lines[lines.index("long"):])


# ---- plots


def ink(path) -> float:
    """Share of pixels that are not white."""
    return float((imread(path)[..., :3].min(axis=2) < 0.99).mean())


def test_all_plots_are_drawn(starved, tmp_path):
    paths = plots.plot_all(starved, tmp_path)
    assert [p.name for p in paths] == ["latency.png", "load.png", "requests.png"]
    for path in paths:
        assert imread(path).shape[1] == 1430
        assert 0.02 < ink(path) < 0.7


def test_plots_do_without_tape_limits_and_memory(tmp_path):
    lane, _ = simulated(0, num_requests=30, num_instances=1)
    bare = type(lane)(**{**vars(lane), "steps": None, "num_blocks": 0})
    result = Result([scenario(num_seeds=1, slo__ttft_ms=None, slo__tpot_ms=None)], [[bare]])
    for path in plots.plot_all(result, tmp_path):
        assert ink(path) > 0.01


def test_plots_survive_a_run_that_was_stopped(tmp_path):
    lane = blank_lane([0.0, 1.0], [np.nan, np.nan], scheduled_s=np.array([0.5, np.nan]), fault="bound")
    for path in plots.plot_all(Result([scenario(num_seeds=1)], [[lane]]), tmp_path):
        assert path.stat().st_size > 5000


def test_curves_add_up_to_the_integrals(starved):
    lane = starved.lanes[0][0]
    for column, integral in (("used_blocks", lane.kv_block_s.sum()), ("running", lane.running_s.sum())):
        times, total, low, high = plots._over_time(lane, lane.steps[column])
        # Between an iteration's end and the next start nothing is counted, and the curve is thinned to a
        # plot's resolution: a few per cent.
        assert (np.diff(times) * total[:-1]).sum() == pytest.approx(integral, rel=0.08)
        assert (low <= high).all() and (high <= total + 1e-9).all()


def test_waiting_adds_up_to_queues_and_stalls(starved):
    lane = starved.lanes[0][0]
    frame = request_frame(lane)
    assert lane.preemptions.sum() > 0
    times, total, _, _ = plots._waiting(lane)
    waited = frame["queue_s"].sum() + frame["stall_s"].sum()
    assert (np.diff(times) * total[:-1]).sum() == pytest.approx(waited, rel=0.02)


def test_distribution_keeps_its_ends_when_thinned():
    values, shares = plots._cdf(pd.Series(np.arange(1, 100_001) * 1e-3))
    assert len(values) <= 2001 and (values[0], values[-1], shares[-1]) == (1.0, 100_000.0, 1.0)


def test_requests_worth_seeing_are_chosen(starved):
    frame = request_frame(starved.lanes[0][0])
    window = plots._window(frame)
    assert len(window) == 80
    waited = (frame["queue_s"] + frame["stall_s"])
    assert waited[window.index].sum() == pytest.approx(waited.rolling(80).sum().max())
