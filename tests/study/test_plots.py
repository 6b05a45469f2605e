"""Plots and reports of made-up tables: what is chosen, what is refused, what is written. Nothing is simulated."""

import html.parser
import io
import itertools
import json
import re

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxsim import cli
from jaxsim._core.errors import InputError
from jaxsim.study import panels, plots, report, results, view

pytestmark = pytest.mark.unoptimised

RATES = [1.0, 2.0, 4.0, 8.0, 16.0]
AXES = {"workload.rate_rps": RATES, "engine.max_num_seqs": [16, 64], "device.name": ["h100", "a100"]}
PNG = b"\x89PNG"


def made_up(axes=AXES, *, is_refused=lambda row: False, is_unstable=lambda row: row.get("workload.rate_rps", 0) > 10,
            reason="memory = 80: too small; use more", name="made up", **study) -> pd.DataFrame:
    """A table as `view.read` gives it."""
    rows = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    frame = pd.DataFrame(rows)
    frame.insert(0, "point", np.arange(len(frame)))
    rng = np.random.default_rng(0)
    rate = frame["workload.rate_rps"] if "workload.rate_rps" in frame else np.arange(len(frame)) + 1.0
    refused = np.array([is_refused(row) for row in rows])
    frame["num_seeds"] = 4
    frame["refused"] = np.where(refused, reason, None)
    for column, values in {"p99_ttft_ms": 50 + rate ** 2 * rng.uniform(0.9, 1.1, len(rows)),
                           "p99_tpot_ms": 10 + rate, "output_throughput": 200 * rate * rng.uniform(0.9, 1.1, len(rows)),
                           "slo.attainment": 1 / (1 + rate / 20)}.items():
        frame[column] = np.where(refused, np.nan, values)
        frame[column + ".ci95"] = 0.1 * frame[column]
    verdicts = [None if no else bool(is_unstable(row)) for no, row in zip(refused, rows, strict=True)]
    frame["unstable"] = np.array(verdicts, object)
    frame["fault"] = None
    frame.attrs["study"] = {"format": results.FORMAT, "jaxsim": "0.1.0", "hash": "abc", "study": {
        "name": name, "description": "what it asks", **study,
        "scenario": {"slo": {"ttft_ms": 100.0}, "engine": {"preset": "vllm-v1", "tensor_parallel_size": 2}}}}
    return frame


@pytest.fixture
def folder(tmp_path):
    frame = made_up()
    table = pa.Table.from_pandas(frame, preserve_index=False)
    pq.write_table(table.replace_schema_metadata({"study": json.dumps(frame.attrs["study"])}), tmp_path / results.TABLE)
    return tmp_path


def texts(figure) -> str:
    """Everything written in a figure."""
    from matplotlib.text import Text

    return "\n".join(text.get_text() for text in figure.findobj(Text) if text.get_visible())


# ---- the front

points = st.lists(st.tuples(*[st.one_of(st.integers(0, 4).map(float), st.just(float("nan")))] * 3), max_size=25)


@settings(deadline=None, max_examples=200)
@given(points, st.integers(0, 3))
def test_front_is_what_no_other_row_beats(rows, num_lower):
    names = ["a", "b", "c"]
    frame = pd.DataFrame(rows, columns=names, dtype=float)
    lower, higher = names[:num_lower], names[num_lower:]

    def beats(one, other):
        pairs = [(one[n], other[n]) for n in lower] + [(-one[n], -other[n]) for n in higher]
        return all(p <= q for p, q in pairs) and any(p < q for p, q in pairs)

    records = [row for row in frame.to_dict("records")]
    expected = [not any(v != v for v in row.values()) and not any(beats(other, row) for other in records)
                for row in records]
    assert plots.front(frame, lower, higher).tolist() == expected


def test_front_keeps_equals_and_the_order_of_rows():
    frame = pd.DataFrame({"ms": [3.0, 1.0, 1.0, 2.0], "tok": [9.0, 5.0, 5.0, 4.0]}, index=[7, 3, 3, 1])
    assert plots.front(frame, "ms", "tok").tolist() == [True, True, True, False]


# ---- what is chosen


def test_axes_are_chosen_from_the_study():
    frame = made_up()
    assert view.varying(frame) == list(AXES)
    assert view.default_x(frame) == "workload.rate_rps"
    assert view.default_hue(frame, "workload.rate_rps") == "engine.max_num_seqs"
    assert view.free(frame, ["workload.rate_rps", "engine.max_num_seqs"]) == ["device.name"]
    assert view.choose(frame) == "lines"
    assert view.default_metric(frame) == "p99_ttft_ms"
    assert view.limits(frame) == {"ttft": 100.0}


def test_what_others_decide_takes_no_panel():
    frame = made_up({"workload.rate_rps": RATES, "engine.tensor_parallel_size": [1, 2, 4]})
    frame.insert(3, "cluster.replicas", 8 // frame["engine.tensor_parallel_size"])
    assert view.free(frame, ["workload.rate_rps"]) == ["engine.tensor_parallel_size"]
    assert len(plots.lines(frame).axes) == 1


@pytest.mark.parametrize("axes, kind", [
    (AXES, "lines"),
    ({"workload.rate_rps": RATES}, "lines"),
    ({"engine.preset": ["vllm-v1", "orca"], "device.name": ["h100", "a100"]}, "lines"),
    ({"workload.rate_rps": list(range(1, 21)), "engine.max_num_seqs": list(range(1, 13))}, "heatmap"),
])
def test_kind_is_chosen(axes, kind):
    assert view.choose(made_up(axes)) == kind


def test_a_sampled_design_is_a_front_and_its_points_are_not_joined():
    rng = np.random.default_rng(0)
    frame = made_up({"workload.rate_rps": list(rng.uniform(1, 30, 40))})
    frame.insert(2, "engine.max_num_seqs", rng.integers(1, 512, 40))
    frame.insert(3, "engine.max_num_batched_tokens", rng.integers(1, 8192, 40))
    assert view.choose(frame) == "pareto"
    assert "not joined" in texts(plots.lines(frame))


def test_throughput_is_by_device_where_their_number_varies():
    frame = made_up({"workload.rate_rps": RATES, "cluster.replicas": [1, 4]})
    devices = frame["cluster.replicas"] * 2.0
    frame = frame.assign(num_devices=devices, **{view.PER_DEVICE: frame["output_throughput"] / devices})
    assert view.label(view.PER_DEVICE) in texts(plots.pareto(frame)).replace("  (↑ better)", "")
    assert view.label(view.PER_DEVICE) not in texts(plots.pareto(made_up()))


def test_where_keeps_rows():
    frame = view.selected(made_up(), "workload.rate_rps <= 4 and device.name == 'h100' and not unstable")
    assert len(frame) == 6 and frame.attrs["study"]["hash"] == "abc"


def test_names_are_short_and_different():
    assert view.short(["device.name", "model.name", "workload.input.tokens", "workload.output.tokens"]) == {
        "device.name": "device", "model.name": "model", "workload.input.tokens": "input.tokens",
        "workload.output.tokens": "output.tokens"}


# ---- what is drawn


def test_lines_tell_of_limits_intervals_and_unstable_points():
    frame = made_up(is_refused=lambda row: row["device.name"] == "a100" and row["engine.max_num_seqs"] == 64)
    figure = plots.lines(frame)
    legend = {text.get_text() for text in figure.legends[0].get_texts()}
    assert {"16", "64", "unstable", "95 % interval", "TTFT limit\n100 ms"} == legend
    assert [axis.get_title("left") for axis in figure.axes] == ["device h100", "device a100"]
    assert all(axis.get_xscale() == "log" for axis in figure.axes)
    assert "5 refused scenarios not shown" in texts(figure)
    hollow = [line for line in figure.axes[0].lines if line.get_markerfacecolor() == "white"]
    assert sum(len(line.get_xdata()) for line in hollow) == 2


def test_linear_axes_stay_linear():
    figure = plots.lines(made_up({"workload.rate_rps": [2.0, 4.0, 6.0, 8.0]}))
    assert figure.axes[0].get_xscale() == "linear"


def test_limits_only_where_the_metric_has_one():
    for metric in ("p99_tpot_ms", "output_throughput"):
        assert "limit" not in texts(plots.lines(made_up(), y=metric))


def test_a_limit_that_is_an_axis_is_drawn_in_its_panel():
    frame = made_up({"workload.rate_rps": RATES, "engine.max_num_seqs": [1, 2, 3], "slo.ttft_ms": [50.0, 200.0]})
    figure = plots.lines(frame)
    dashed = [[line.get_ydata()[0] for line in axis.lines if line.get_linestyle() == "--"] for axis in figure.axes]
    assert dashed == [[50.0], [200.0]]


def test_values_that_round_to_the_same_stay_apart():
    frame = made_up({"workload.rate_rps": RATES, "engine.gpu_memory_utilization": [0.9001, 0.9002]})
    legend = [text.get_text() for text in plots.lines(frame).legends[0].get_texts()]
    assert legend[:2] == ["0.9001", "0.9002"]


def test_a_parameter_that_some_scenarios_leave_to_the_engine():
    frame = made_up({"workload.rate_rps": RATES, "engine.max_num_seqs": [16.0, 64.0, np.nan],
                     "engine.enable_prefix_caching": [False, True]})
    legend = [text.get_text() for text in plots.lines(frame).legends[0].get_texts()]
    assert legend[:3] == ["16", "64", "default"]
    assert len(plots.heatmap(frame, "workload.rate_rps", "engine.max_num_seqs").axes[0].texts) == 15
    plots.pareto(frame)


def test_several_metrics_are_rows():
    figure = plots.lines(made_up(), y=["p99_ttft_ms", "p99_tpot_ms"])
    assert [axis.get_ylabel() for axis in figure.axes] == ["p99 TTFT, ms", "", "p99 TPOT, ms", ""]


def test_heat_map_writes_values_and_marks_cells():
    frame = made_up(is_refused=lambda row: row["engine.max_num_seqs"] == 64 and row["device.name"] == "a100")
    frame = frame[~((frame["workload.rate_rps"] == 8) & (frame["engine.max_num_seqs"] == 16))]
    figure = plots.heatmap(frame, value="p99_tpot_ms")
    legend = {text.get_text() for text in figure.legends[0].get_texts()}
    assert legend == {"refused", "not in the study", "unstable"}
    written = [text.get_text() for text in figure.axes[0].texts]
    assert sorted(written, key=float) == ["11.0", "11.0", "12.0", "12.0", "14.0", "14.0", "18.0", "26.0", "26.0"]


def test_a_large_heat_map_is_not_written_in():
    frame = made_up({"workload.rate_rps": list(range(1, 16)), "engine.max_num_seqs": list(range(1, 6))})
    assert not plots.heatmap(frame).axes[0].texts


def test_pareto_leaves_unstable_out_and_joins_equals():
    frame = made_up({"workload.rate_rps": RATES, "engine.max_num_seqs": [16, 64]})
    twin = frame["engine.max_num_seqs"] == 64
    for metric in ("p99_ttft_ms", "output_throughput"):
        frame.loc[twin, metric] = frame.loc[~twin, metric].to_numpy()
    text = texts(plots.pareto(frame))
    for part in ("16 or 64", "2 unstable scenarios left out", "8 of 8 scenarios are on the front"):
        assert part in text


def test_senses_may_be_turned():
    frame = made_up({"workload.rate_rps": RATES, "engine.max_num_seqs": [16, 64]}, is_unstable=lambda row: False)
    assert "→ better" in texts(plots.pareto(frame, maximise="p99_ttft_ms"))


def test_names_of_users_are_no_mathematics():
    assert "$x_1$" in texts(plots.lines(made_up(name="$x_1$"), out=io.BytesIO()))


def test_numbers_in_cells_are_short():
    assert [panels.compact(v, False) for v in (0, 3.14159, 1234.0, 46449.0, 185429.0, 2.5e6)] == [
        "0", "3.14", "1,234", "46k", "185k", "2.5M"]
    assert panels.compact(0.987, True) == "99 %"


# ---- refusals


@pytest.mark.parametrize("draw, field, says", [
    (lambda f: plots.lines(f, x="workload.rate_rp"), "x", "did you mean 'workload.rate_rps'?"),
    (lambda f: plots.lines(f, y="p99_tftt_ms"), "y", "did you mean 'p99_ttft_ms'"),
    (lambda f: plots.lines(f, y="device.name"), "y", "is no metric"),
    (lambda f: plots.lines(f, x="p99_ttft_ms"), "x", "is no parameter"),
    (lambda f: plots.lines(f, x="workload.rate_rps", hue="workload.rate_rps"), "hue", "is x too"),
    (lambda f: plots.lines(f, out="plot.pdf"), "out", "is neither PNG nor SVG"),
    (lambda f: plots.lines(f, y=["p99_ttft_ms"] * 10), "panels", "9 fit"),
    (lambda f: plots.heatmap(f, value="slo.attainmnt"), "value", "slo.attainment"),
    (lambda f: plots.pareto(f, minimise="slo.attainment"), "minimise", "is neither x nor y"),
    (lambda f: plots.pareto(f.assign(unstable=True)), "unstable", "no stable scenario"),
    (lambda f: view.selected(f, "workload.rate_rps > 100"), "where", "is true of none of the 20 rows"),
    (lambda f: view.selected(f, "rate > 1"), "where", "is no column"),
    (lambda f: plots.lines(view.selected(f, "device.name == 'h100'"), hue="device.name"), "hue", "has one value here"),
    (lambda f: plots.lines(f[["p99_ttft_ms"]]), "frame", "is no table of a study"),
])
def test_what_cannot_be_drawn_is_said(draw, field, says):
    with pytest.raises(InputError) as caught:
        draw(made_up())
    assert caught.value.field == field and says in str(caught.value)


def test_too_many_panels_name_what_to_hold_still():
    frame = made_up({**AXES, "engine.preset": ["vllm-v1", "vllm-v0", "orca", "static", "sarathi"]})
    with pytest.raises(InputError, match="panels.*10 panels, 9 fit") as caught:
        plots.lines(frame, hue="engine.max_num_seqs")
    condition = re.search(r'--where "(.*)"', str(caught.value))[1]
    assert condition == "engine.preset == 'vllm-v1'"
    assert len(plots.lines(view.selected(frame, condition), hue="engine.max_num_seqs").axes) == 2


def test_too_many_colours():
    frame = made_up({"workload.rate_rps": RATES, "engine.max_num_seqs": list(range(1, 14))})
    with pytest.raises(InputError, match="13 values, more than 10 colours"):
        plots.lines(frame, x="workload.rate_rps", hue="engine.max_num_seqs")


def test_nothing_varies_or_nothing_ran():
    with pytest.raises(InputError, match="no parameter varies"):
        plots.lines(made_up({"workload.rate_rps": [1.0]}))
    with pytest.raises(InputError, match="no row was simulated"):
        plots.lines(made_up(is_refused=lambda row: True))


# ---- files and the command


def test_the_command_writes_what_it_says(folder, capsys):
    assert cli.main(["plot", str(folder)]) == 0
    assert capsys.readouterr().out.strip() == str(folder / "lines.png")
    assert (folder / "lines.png").read_bytes().startswith(PNG)
    out = folder / "map.svg"
    assert cli.main(["plot", str(folder), "--kind", "heatmap", "--x", "workload.rate_rps", "--y", "device.name",
                     "p99_tpot_ms", "--where", "engine.max_num_seqs == 16", "--out", str(out)]) == 0
    first = out.read_bytes()
    plots.heatmap(view.read(folder, "engine.max_num_seqs == 16"), "workload.rate_rps", "device.name", "p99_tpot_ms",
                  out=out)
    assert out.read_bytes() == first and b"<dc:date>" not in first
    assert cli.main(["plot", str(folder / results.TABLE), "--kind", "pareto", "--x", "p99_tpot_ms"]) == 0
    assert (folder / "pareto.png").read_bytes().startswith(PNG)


@pytest.mark.parametrize("arguments, says", [
    (["--kind", "heatmap", "--hue", "device.name"], "is not for a heat map"),
    (["--kind", "heatmap", "--y", "p99_ttft_ms", "p99_tpot_ms"], "one field and one metric"),
    (["--kind", "pareto", "--y", "p99_ttft_ms", "p99_tpot_ms"], "more than one metric"),
    (["--report", "x.html", "--kind", "lines"], "is not for a report"),
    (["--report", "x.pdf"], "is no HTML file"),
    (["--x", "workload.rate"], "did you mean 'workload.rate_rps'"),
    (["--out", "missing/plot.png"], "missing/plot.png"),
])
def test_the_command_refuses_in_one_line(folder, capsys, monkeypatch, arguments, says):
    monkeypatch.chdir(folder)
    assert cli.main(["plot", str(folder), *arguments]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1


class _Page(html.parser.HTMLParser):
    """Tags, checked to be balanced, with what they load."""

    EMPTY = {"meta", "img", "wbr"}

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.loads = [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.loads += [value for name, value in attributes if name in ("src", "href", "srcset", "data", "action")]
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_report_is_one_file_that_loads_nothing(folder, capsys):
    path = folder / "report.html"
    assert cli.main(["plot", str(folder), "--report", str(path), "--where", "workload.rate_rps < 20"]) == 0
    assert capsys.readouterr().out.strip() == str(path)
    text = path.read_text(encoding="utf-8")
    page = _Page(text)
    assert "http://" not in text and "https://" not in text and "url(" not in text and "link" not in page.tags
    assert len(page.loads) == 5 and all(load.startswith("data:image/png;base64,") for load in page.loads)
    assert page.tags.count("script") == 1
    for part in ("made up", "what it asks", "0.1.0", "abc", "vLLM", "workload.rate_rps &lt; 20", "not drawn"):
        assert (part in text) == (part != "not drawn"), part
    assert text == report.page(view.read(folder, "workload.rate_rps < 20"), "workload.rate_rps < 20")


def test_report_escapes_names_and_reasons():
    evil = "<script>alert(1)</script>\"'&"
    frame = made_up({"workload.rate_rps": RATES, "device.name": [evil, "h100"]}, name=evil,
                    derived={"device.name": evil}, reason=f"model = 7: {evil}",
                    is_refused=lambda row: row["workload.rate_rps"] == 1.0 and row["device.name"] == evil)
    text = report.page(view.selected(frame, "True"), evil)
    page = _Page(text)
    assert page.tags.count("script") == 1 and "<script>alert" not in text
    assert text.count("&lt;script&gt;alert(1)&lt;/script&gt;&quot;&#x27;&amp;") > 5


def test_report_counts_reasons_and_says_how_many_rows_are_left_out():
    frame = made_up({"workload.rate_rps": RATES, "engine.max_num_seqs": list(range(1, 421))},
                    is_refused=lambda row: row["engine.max_num_seqs"] > 400)
    frame["refused"] = [None if pd.isna(reason) else f"memory = {k}: needs {k}.5 GiB"
                        for k, reason in enumerate(frame["refused"])]
    text = report.page(view.selected(frame, "True"))
    assert f"The first {report.MOST_ROWS:,} of 2,100 rows: 100 more are" in text
    assert text.count("<tr class=") + text.count("<tr><td data-v=") == report.MOST_ROWS
    assert "<p>100 scenarios cannot be simulated" in text and text.count("GiB</td>") == 1
    assert "400 of 2,000 simulated scenarios are unstable" in text


def test_report_of_many_axes_holds_some_still_and_of_nothing_says_so():
    frame = made_up({**AXES, "engine.block_size": [8, 16, 32], "model.dtype": ["auto", "fp8", "int4"]})
    assert "at model.dtype = fp8" in report.page(view.selected(frame, "True"))
    nothing = report.page(view.selected(made_up(is_refused=lambda row: True), "True"))
    assert "not drawn" in nothing and "20 scenarios cannot be simulated" in nothing
