"""`jaxsim explain`: lanes of decodes without a simulation, and what it refuses."""

import json

import pytest

from jaxsim import cli

pytestmark = pytest.mark.unoptimised


def test_where_the_host_limits(capsys):
    """Without graphs launches take as long whatever the batch, and the device overtakes them at some batch."""
    values = ["--set", "engine.enforce_eager=true", "--set", "engine.max_num_seqs=200"]
    assert cli.main(["explain", *values, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    rows = found["batches"]
    assert [row["batch"] for row in rows] == [1, 2, 4, 8, 16, 32, 64, 128, 200] and found["cudagraph_mode"] == "none"
    assert {row["launches ms"] for row in rows} == {round(found["kernels"] * found["launch_kernel_us"] / 1e3, 3)}
    limits = [row["limits"] for row in rows]
    assert limits == sorted(limits, reverse=True) and set(limits) == {"launches", "device"}
    assert found["host_bound_batches"] == [row["batch"] for row in rows if row["device ms"] < row["launches ms"]]
    for row in rows:
        longest = max(row["launches ms"], row["device ms"])
        assert row["iteration ms"] == pytest.approx(row["serial ms"] + longest, abs=2e-3)
    assert found["serial_bound_batches"] == [row["batch"] for row in rows if row["serial ms"] > max(
        row["launches ms"], row["device ms"])]


@pytest.mark.slow
def test_a_table(capsys):
    assert cli.main(["explain", "moe-tensor-parallel", "--context", "300"]) == 0
    out = capsys.readouterr().out
    assert "decodes of 300 tokens" in out and "captured in graphs" in out
    assert "the device takes longer than the launches at every batch" in out


@pytest.mark.parametrize("words, says", [
    (["fitted-latency"], "cost.kind = 'fitted': has no lanes"), (["prefill-decode"], "cluster.pools = 2"),
    (["--context", "0"], "--context = 0"),
    (["--context", "2001", "--set", "engine.max_model_len=2000"], "is more than max_model_len = 2,000"),
    (["--set", "engine.hybrid.weights=streamed"], "engine.hybrid = 'given'"),
    (["no-such"], "no-such"), (["--set", "engine.max_num_seqs"], "--set")])
def test_refusals(words, says, capsys):
    assert cli.main(["explain", *words]) == 2
    captured = capsys.readouterr()
    assert says in captured.err and captured.out == "" and captured.err.count("\n") == 1
