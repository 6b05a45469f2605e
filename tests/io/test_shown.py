"""What people see: the table, the listings and the plots."""

import dataclasses
import io
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.image import imread
from rich.console import Console

from jaxsim.io import plots, table
from jaxsim.io import result as files
from jaxsim.io.listing import print_groups
from jaxsim.kernels import histogram
from jaxsim.metrics import LATENCIES, PERCENTILES, Result, flatten, request_frame
from tests.metrics.lanes import blank_lane, scenario, simulated, with_everything


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
    for word in ("TTFT", "TPOT", "ITL", "E2E", "queue", "mean", "p50", "p90", "p95", "p99",
                 "200 completed, 0 failed", "TTFT <= 200 ms", "preemptions", "KV memory", "with work", "of the time",
                 "requests an instance on average", "drain included",
                 "vllm-v1@0.9", "2 replicas (least_outstanding)", "200 requests x 3 seeds"):
        assert word in text, word
    assert f"{100 * m['slo']['ttft_attainment']:.1f} %" in text


def test_overloaded_runs_say_so():
    lanes = [simulated(seed, num_instances=1, rate_rps=40.0)[0] for seed in (0, 1, 2)]
    overloaded = Result([scenario(num_seeds=3)], [lanes])
    assert overloaded.metrics[0]["unstable"] is True
    assert "UNSTABLE" in printed(overloaded) and "in 3 of 3 runs" in printed(overloaded)
    calm = Result([scenario(num_seeds=1)], [[simulated(0, num_requests=100, rate_rps=4.0)[0]]])
    assert "UNSTABLE" not in printed(calm) and "TOO SHORT" not in printed(calm) and "±" not in printed(calm)


def test_runs_that_still_fill_up_are_too_short_and_not_unstable():
    arrival = np.arange(100.0)
    short = Result([scenario(num_seeds=1)], [[blank_lane(arrival, arrival + 150.0)]])
    text = " ".join(printed(short).split())
    assert "UNSTABLE" not in text and "TOO SHORT in 1 of 1 runs" in text
    assert "arrivals last 99.0 s, a request runs for 150 s" in text
    for few in (blank_lane(np.arange(9.0), np.arange(9.0) + 50), blank_lane(np.zeros(90), np.arange(90.0) + 1)):
        assert "TOO SHORT" not in printed(Result([scenario(num_seeds=1)], [[few]]))


def test_a_trace_is_named_and_ignored_prefixes_are_told(tmp_path):
    replay = scenario(workload={"kind": "trace", "trace": str(tmp_path / "monday.jsonl")}, num_seeds=1)
    lane = blank_lane([0.0, 1.0], [1.0, 2.0])
    text = printed(Result([replay], [[lane]]))
    assert "trace monday.jsonl, 2 requests" in text and "prefix" not in text and "cost" not in text
    text = printed(Result([replay], [[dataclasses.replace(lane, num_prefix_blocks=7)]]))
    assert "engine.enable_prefix_caching is off" in text


@pytest.mark.parametrize("values, line", [
    ({"cost__host": "none"}, "cost: roofline, no host overhead"),
    ({"engine__preset": "vllm-v0"}, "cost: roofline, host overhead of vllm-v0"),
    ({"engine__preset": "vllm-v0", "cost__host": "vllm-v1"}, None),
    ({"engine__preset": "vllm-v1@0.19"}, None),
    ({"cost__overrides": {"host_step_s": 0.0}}, "cost: roofline, host_step_s overridden"),
    ({"device": {"name": "l40s"}}, "kernel constants are those of rtx_pro_6000: l40s was not measured"),
    ({"cost": {"kind": "fitted", "prefill": {"a": 1.0}, "decode": {"a": 1.0}}}, "cost: fitted coefficients")])
def test_prices_that_differ_are_named(values, line):
    lines = table.describe(scenario(num_seeds=1, **values), blank_lane([0.0], [1.0]))
    assert lines[2:] == ([line] if line else [])


def test_the_layout_is_named():
    """All degrees that share a replica."""
    layout = {"engine__pipeline_parallel_size": 4, "engine__tensor_parallel_size": 2}
    line = table.describe(scenario(num_seeds=1, **layout), blank_lane([0.0], [1.0]))[0]
    assert " x 2 x PP 4" in line


def test_faults_are_named():
    lane = blank_lane([0.0, 1.0], [1.0, np.nan], fault="step limit of 10")
    assert "stopped by" in printed(Result([scenario(num_seeds=1)], [[lane]]))


def test_piped_text_is_plain_and_fits_100_columns(starved):
    text = printed(starved)
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) <= 100
    assert not any(line != line.rstrip() for line in text.splitlines())


def huge(factor):
    """Latencies of that many seconds, which differ between seeds."""
    rng = np.random.default_rng(2)
    times = [factor * rng.uniform(0.5, 1.5, 20) for _ in range(3)]
    return Result([scenario(num_seeds=3)], [[blank_lane(np.zeros(20), 2 * t, first_token_s=t) for t in times]])


def rendered(result, width, is_terminal=False) -> str:
    file = io.StringIO()
    table._print(result, 0, Console(file=file, width=width, force_terminal=is_terminal, color_system=None))
    return file.getvalue()


@pytest.mark.parametrize("is_terminal", [False, True])
@pytest.mark.parametrize("width", [60, 80, 100, 120])
@pytest.mark.parametrize("factor", [None, 10.0, 1e5, 1e12])
def test_every_width_fits_and_keeps_its_labels(starved, factor, width, is_terminal):
    text = rendered(starved if factor is None else huge(factor), width, is_terminal)
    lines = text.splitlines()
    assert max(map(len, lines)) <= width and "…" not in text
    head = next(i for i, line in enumerate(lines) if line.split()[0:1] in (["ms"], ["s"]))
    assert lines[head].replace("|", " ").split()[1:] == ["mean", "p50", "p90", "p95", "p99"]
    assert [line.split()[0] for line in lines[head + 2:head + 7]] == ["TTFT", "TPOT", "ITL", "E2E", "queue"]
    for label in ("requests  ", "throughput  ", "limits met  ", "KV memory  ", "with work  ", "running  "):
        assert any(line.startswith(label) for line in lines), label


def test_intervals_are_dropped_before_the_unit_changes(starved):
    def row(result, width):
        return next(line for line in rendered(result, width).splitlines() if line.startswith(" TTFT"))

    mean = f"{starved.metrics[0]['mean_ttft_ms']:,.0f}"
    assert "±" in row(starved, 100)
    assert "±" not in row(starved, 60) and mean in row(starved, 60)
    wide = huge(1e7)
    seconds = f"{wide.metrics[0]['mean_ttft_ms'] / 1e3:,.0f}"
    assert f" {seconds} " in row(wide, 80)


def test_long_class_names_leave_room():
    lane = blank_lane(np.zeros(2), [1.0, 2.0], tenant=np.array([0, 1]), tenant_names=("a" * 90, "b"))
    lines = rendered(Result([scenario(num_seeds=1)], [[lane]]), 80).splitlines()
    assert max(map(len, lines)) <= 80 and any(
        line.startswith(" aaaa") and line.split("|")[1].strip() == "1" for line in lines)


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


def test_instances_at_rest_run_nothing():
    """By hand: one at work from 0 to 1 and from 3 to 4 s, the other from 0 to 2 in two steps."""
    steps = {"time_s": np.array([0.0, 0.0, 1.0, 3.0]), "duration_s": np.ones(4), "instance": np.array([0, 1, 1, 0]),
             "running": np.array([2, 3, 1, 5])}
    lane = dataclasses.replace(blank_lane([0.0], [4.0], busy_s=np.ones(2)), steps=steps)
    times, total, low, high = plots._over_time(lane, steps["running"])
    at = np.searchsorted(times, [0.5, 1.5, 2.5, 3.5, 4.5], side="right") - 1
    assert total[at].tolist() == [5, 1, 0, 5, 0] and low[at].tolist() == [2, 0, 0, 0, 0]
    assert high[at].tolist() == [3, 1, 0, 5, 0]
    kept = plots._over_time(lane, steps["running"], is_empty_at_rest=False)
    assert kept[1][np.searchsorted(kept[0], [1.5, 2.5], side="right") - 1].tolist() == [3, 2]


def test_bars_of_requests_show_transfers(tmp_path, monkeypatch):
    """A bar is as long as the request: 1 s to the first token, 2 s of transfer, 3 s of decode."""
    lane = dataclasses.replace(
        blank_lane([0.0], [6.0], first_token_s=np.array([1.0])), decode_instance=np.array([1]),
        accepted_s=np.array([1.5]), delivered_s=np.array([3.0]))
    from matplotlib.axes import Axes
    ends, barh = {}, Axes.barh
    monkeypatch.setattr(Axes, "barh", lambda self, y, width, left, label, **rest: (
        ends.update({label: float((left + width)[0])}), barh(self, y, width, left=left, label=label, **rest))[1])
    plots.plot_requests(Result([scenario(num_seeds=1)], [[lane]]), tmp_path / "requests.png")
    assert ends == {"queue": 0.0, "prefill": 1.0, "transfer": 3.0, "decode": 6.0}


def test_curves_that_end_before_the_last_arrival_keep_their_place(tmp_path):
    """A tape that was too short ends before the run, and the plot with it."""
    lane, _ = simulated(0, num_requests=30, num_instances=1)
    steps = {name: values[:5] for name, values in lane.steps.items()}
    assert steps["time_s"][-1] < lane.arrival_s[-1] / 2
    short = Result([scenario(num_seeds=1)], [[dataclasses.replace(lane, steps=steps, lost_steps=99)]])
    whole = Result([scenario(num_seeds=1)], [[lane]])
    shapes = [imread(plots.plot_load(result, tmp_path / "load.png")).shape for result in (whole, short)]
    assert shapes[0] == shapes[1]
    assert "end early: 99 iterations" in " ".join(table.describe(short.scenarios[0], short.lanes[0][0]))


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


def test_waiting_adds_up_where_requests_may_end_without_an_answer(starved):
    """The other way to count gives the same where all are answered."""
    lane = starved.lanes[0][0]
    frame = request_frame(lane)
    times, total, _, _ = plots._waiting(dataclasses.replace(lane, ended_s=lane.finish_s))
    waited = frame["queue_s"].sum() + frame["stall_s"].sum()
    assert (np.diff(times) * total[:-1]).sum() == pytest.approx(waited, rel=0.02)


def at(curve, *when_s) -> list[float]:
    """A curve at some times; before its first it is 0."""
    return np.append(0, curve[1])[np.searchsorted(curve[0], when_s, side="right")].tolist()


def test_who_has_ended_does_not_wait():
    """By hand: served from 1 to 4, given up while waiting at 5, refused at 2, given up while running at 6, and one that
    nobody knows the end of."""
    nan = np.nan
    lane = blank_lane([0.0, 0.0, 2.0, 3.0, 7.0], [4.0, nan, nan, nan, nan],
                      scheduled_s=np.array([1.0, nan, nan, 4.0, nan]), ended_s=np.array([4.0, 5.0, 2.0, 6.0, nan]))
    running, waiting = (curve for _, curve, _, _ in plots._curves(lane))
    assert at(running, 0.5, 1.5, 4.5, 6.5, 9.0) == [0, 1, 1, 0, 0]
    assert at(waiting, 0.5, 1.5, 2.5, 3.5, 4.5, 5.5, 8.0) == [2, 1, 1, 2, 1, 0, 1]


def test_who_was_lost_waits_again():
    """By hand: one that runs from 0 to 2 s, goes down with its instance, and runs on another from 6 to 10 s; one that
    is refused at 1 s, and one that waits from 3 to 5 s and gives up. The tape may end early."""
    steps = {"time_s": np.array([0.0, 6.0]), "duration_s": np.array([2.0, 4.0]), "instance": np.array([0, 1]),
             "running": np.ones(2), "waiting": np.zeros(2), "used_blocks": np.ones(2)}
    nan = np.nan
    lane = blank_lane([0.0, 1.0, 3.0], [10.0, nan, nan], scheduled_s=np.array([0.0, nan, nan]), busy_s=np.ones(2),
                      ended_s=np.array([10.0, 1.0, 5.0]), losses=np.array([1, 0, 0]), steps=steps)
    running, waiting, _ = (curve for _, curve, _, _ in plots._curves(lane))
    assert at(running, 1.0, 3.0, 7.0) == [1, 0, 1]
    assert at(waiting, 0.5, 1.5, 2.5, 4.0, 5.5, 7.0) == [0, 0, 1, 2, 1, 0]
    short = dataclasses.replace(lane, steps={name: values[:1] for name, values in steps.items()})
    assert max(plots._waiting(short)[1]) == 0


def drawn(draw, monkeypatch, path):
    """The figure that a plot drew."""
    from matplotlib.figure import Figure

    figures = []
    save = Figure.savefig

    def keep(figure, *args, **kwargs):
        figures.append(figure)
        save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", keep)
    draw(path)
    return figures[0]


def texts(figure) -> list[str]:
    own = [figure._suptitle, figure._supxlabel]
    return [t.get_text() for t in (*own, *(t for axis in figure.axes for t in axis.texts)) if t is not None]


def test_marks_are_those_of_the_table(starved, tmp_path, monkeypatch):
    figure = drawn(lambda path: plots.plot_latencies(starved, path), monkeypatch, tmp_path / "latency.png")
    m, said = starved.metrics[0], texts(figure)
    for name in ("ttft", "tpot", "e2el"):
        for percentile in (50, 90, 99):
            assert f"p{percentile}  {table.number(m[f'p{percentile}_{name}_ms'])}" in said
    assert f"limit 200 ms, met by {100 * m['slo']['ttft_attainment']:.1f} %" in said
    dots = [line.get_xdata()[0] for line in figure.axes[1].lines if line.get_marker() == "o"]
    assert dots == [m[f"p{p}_tpot_ms"] for p in (50, 90, 99)]
    assert said[0] == "small, 3 seeds" and "dots: mean" in said[1] and "single output" not in said[1]


def test_limits_are_written_where_no_curve_is(starved, tmp_path, monkeypatch):
    figure = drawn(lambda path: plots.plot_latencies(starved, path), monkeypatch, tmp_path / "latency.png")
    for axis in figure.axes[:2]:
        (limit,) = [t for t in axis.texts if t.get_text().startswith("limit")]
        box = limit.get_window_extent()
        assert box.y0 >= axis.get_window_extent().y1 and box.x0 >= axis.get_window_extent().x0 - 1
        assert box.y1 <= axis._left_title.get_window_extent().y0 + 1
        assert not [t for t in axis.texts if t.get_bbox_patch() is not None]


def test_what_separates_curve_and_share_is_said(tmp_path, monkeypatch):
    lane = blank_lane(np.zeros(4), [0.1, 0.2, 0.3, np.nan], output_tokens=np.array([1, 5, 5, 5]),
                      first_token_s=np.array([0.1, 0.1, 0.1, 0.2]))
    result = Result([scenario(num_seeds=1)], [[lane]])
    figure = drawn(lambda path: plots.plot_latencies(result, path), monkeypatch, tmp_path / "latency.png")
    note = figure._supxlabel.get_text()
    assert "25 % of requests have a single output token" in note and "meet its limit" in note
    assert "25 % of requests did not finish" in note
    # A request that never finished has a first token, and is in no curve all the same.
    assert all(line.get_xdata().max() <= 300.0 for line in figure.axes[0].lines[:1])


def test_warmup_is_in_no_curve():
    lane = blank_lane([0.0, 1.0, 5.0], [9.0, 9.5, 6.0])
    assert plots._measured(lane, 2.0)["e2e_s"].tolist() == [1.0]


def test_plots_over_time_name_scenario_and_seed(starved, tmp_path, monkeypatch):
    for draw in (plots.plot_load, plots.plot_requests):
        figure = drawn(lambda path, draw=draw: draw(starved, path), monkeypatch, tmp_path / "x.png")
        assert texts(figure)[0] == "small, seed 0 (the first of 3)"
    ticks = [int(label.get_text()) for label in figure.axes[0].get_yticklabels()]
    assert len(ticks) == 8 and all(tick % 10 == 0 for tick in ticks)
    first = figure.axes[0].get_title("left").split()[1]
    assert figure.axes[0].get_yticks()[0] == ticks[0] - int(first)


@pytest.mark.parametrize("value, text", [(3000.0, "3,000"), (10_000, "10,000"), (0.5, "0.5"), (1e6, "1,000,000"),
                                         (0, "0")])
def test_ticks_are_written_in_one_way(value, text):
    assert plots._thousands(value) == text


def test_distribution_keeps_its_ends_when_thinned():
    values, shares = plots._cdf(pd.Series(np.arange(1, 100_001) * 1e-3))
    assert len(values) <= 2001 and (values[0], values[-1], shares[-1]) == (1.0, 100_000.0, 1.0)


def test_requests_worth_seeing_are_chosen(starved):
    frame = request_frame(starved.lanes[0][0])
    window = plots._window(frame)
    assert len(window) == 80
    waited = (frame["queue_s"] + frame["stall_s"])
    assert waited[window.index].sum() == pytest.approx(waited.rolling(80).sum().max())


# ---- the page that documents them


def documented() -> set[str]:
    """Every code span of docs/results.md, statistics of latencies and short forms of groups written out."""
    text = (Path(__file__).parents[2] / "docs" / "results.md").read_text(encoding="utf-8")
    spans, group = set(), ""
    for span in re.findall(r"`([^`\n]+)`", text):
        spans.add(f"{group}{span}" if span.startswith(".") else span)
        group = span.split(".")[0] if re.fullmatch(r"\w+\.\w+", span) else group
    assert "`STATISTIC_LATENCY_ms`" in text and {"mean", "median", "std", "p50", "ttft", "e2el"} <= spans
    statistics = ("mean", "median", "std", *(f"p{p}" for p in PERCENTILES))
    return spans | {f"{s}_{name}_ms" for s in statistics if s in spans for name in LATENCIES if name in spans}


def test_every_key_and_column_is_on_the_page(starved):
    """Of a run that has all that any run may have."""
    classes = [dataclasses.replace(with_everything(lane, seed), tenant_names=("a", "b"))
               for seed, lane in enumerate(starved.lanes[0])]
    assert all(getattr(classes[0], field.name) is not None for field in dataclasses.fields(classes[0]))
    result = Result(starved.scenarios, [classes])
    content = files.summary(result)
    spans = documented()
    assert set(content["tenants"]) == {"a", "b"} and "tenants.NAME" in spans
    of_a_class = spans | {f"{s}_{latency}_ms" for s in ("mean", "p50", "p99") for latency in ("ttft", "tpot", "e2el")
                          if {f"{s}_", f"{latency}_ms"} <= spans}
    assert set(content["tenants"]["a"]) <= of_a_class
    metrics = {k: v for k, v in content.items() if k not in ("tenants", "intervals", "seeds", "scenario", "provenance")}
    assert set(flatten(metrics)) <= spans, set(flatten(metrics)) - spans
    groups = {"slo", "queueing", "preemptions", "kv", "utilisation", "cost", "tenants", "fairness", "outcomes",
              "outages", "transfers", "migrations", "scaling", "role_switching", "swaps", "loads", "sessions"}
    assert groups <= set(content) <= spans | groups
    provenance = content["provenance"]
    assert set(provenance) | set(provenance["imitates"]) <= spans and provenance["format"] in spans
    assert len(result.requests.columns) > len(starved.requests.columns) + 12
    assert set(result.requests.columns) <= spans, set(result.requests.columns) - spans
    assert set(files.FILES) <= spans


def test_what_the_page_says_of_the_histogram_is_so():
    text = (Path(__file__).parents[2] / "docs" / "results.md").read_text(encoding="utf-8")
    edges = histogram.edges()
    assert "from 2^-20 s to 2^12 s" in text and (edges[0], edges[-1]) == (2.0**-20, 2.0**12)
    assert "at most 1.6 % wide" in text and (np.diff(edges) / edges[:-1]).max() < 0.016


def test_files_of_a_former_run_are_cleared(starved, tmp_path):
    plots.plot_all(starved, tmp_path)
    for name in ("summary.json", "timeline.json", "notes.txt", "latency-mine.png"):
        (tmp_path / name).write_text("old")
    files.write_requests(starved, tmp_path / "requests.parquet")
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "load.png").write_text("old")
    files.clear(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["inner", "latency-mine.png", "notes.txt"]
    assert (tmp_path / "inner" / "load.png").exists()
    files.clear(tmp_path / "nowhere")
