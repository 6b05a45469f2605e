"""Margins: where a share is passed, and a system whose shortest way is known."""

import json

import numpy as np
import pandas as pd
import pytest

from jaxsim._core.errors import InputError
from jaxsim.cli.commands import main
from jaxsim.engine.lower import make_workload
from jaxsim.sensitivity import margins as module
from jaxsim.sensitivity import relaxed
from jaxsim.sensitivity.fields import field_of
from jaxsim.sensitivity.margins import NEAR_RADII, RADII, default_fields, margins
from jaxsim.spec.scenario import Scenario
from jaxsim.spec.toml import dump_toml
from jaxsim.study import runner

pytestmark = pytest.mark.unoptimised

FORM = {"a": 0.004, "b": 1e-4, "d": 2e-4}
WORKLOAD = {"kind": "poisson", "rate_rps": 4.0, "num_requests": 128,
            "input": {"kind": "log-normal", "mean_tokens": 300, "sigma": 0.3, "max_tokens": 1000},
            "output": {"kind": "log-normal", "mean_tokens": 40, "sigma": 0.3, "max_tokens": 200}}


def scenario(**changes) -> Scenario:
    return Scenario.from_dict({
        "schema_version": 1, "num_seeds": 2, "slo": {"ttft_ms": 150.0, "tpot_ms": 30.0},
        "engine": {"preset": "vllm-v1@0.9", "max_num_seqs": 16, "max_num_batched_tokens": 1024, "max_model_len": 2048,
                   "num_gpu_blocks_override": 2000},
        "cost": {"kind": "fitted", "prefill": FORM, "decode": FORM},
        "workload": WORKLOAD} | changes)


def test_where_a_share_is_passed():
    values = np.r_[1.0, np.where(RADII < 0.22, 1.0, 0.9)]
    assert module._passed(values, 0.99) == pytest.approx(0.2 + 0.05 * 0.1)
    assert np.isnan(module._passed(np.ones(len(RADII) + 1), 0.99))
    assert module._passed(np.r_[0.995, np.zeros(len(RADII))], 0.99) == pytest.approx(0.05 * 0.005 / 0.995)


def test_what_has_no_margin_is_refused():
    with pytest.raises(InputError, match="no limits"):
        margins(scenario(slo={}))
    with pytest.raises(InputError, match=r"cost.overrides.memory_bytes_per_s"):
        margins(scenario(), ("cost.overrides.memory_bytes_per_s",))
    with pytest.raises(InputError, match="share"):
        margins(scenario(), ("workload.rate_rps",), share=1.0)


@pytest.mark.slow
def test_the_shortest_way_makes_everything_worse_at_once():
    """Shorter than that of any field alone, and no random way is shorter by more than a tenth."""
    fields = ("workload.rate_rps", "workload.input.mean_tokens", "cost.prefill.b")
    found = margins(scenario(), fields, share=0.95)
    assert found.attainment >= 0.95 and all(slope < 0 for slope in found.slopes.values())
    rows = found.table.set_index("way")["radius"]
    steepest = rows.filter(like="steepest").min()
    # What a share of some hundred requests says of a length is a few percent.
    assert steepest < 1.1 * rows.filter(like="random").min()
    assert found.worst["way"] == rows.index[np.nanargmin(rows)] and found.notes == ()
    # Those that never pass it are longer than the longest that is simulated.
    assert rows[list(fields)].fillna(RADII[-1]).min() > 1.1 * steepest
    # Prompts and their cost enter TTFT as a product.
    assert found.slopes["cost.prefill.b"] == pytest.approx(found.slopes["workload.input.mean_tokens"], rel=0.4)
    with pytest.raises(InputError, match="missed already"):
        margins(scenario(slo={"ttft_ms": 20.0}), fields)


def test_what_a_scenario_has_is_what_changes():
    """Calibrated bandwidth, fixed lengths in whole tokens, clients instead of a rate; what there is none of is told."""
    found, notes = default_fields(scenario())
    assert (found, notes) == (("workload.rate_rps", "workload.input.mean_tokens", "workload.output.mean_tokens",
                               "cost.decode.a"), ())
    found, notes = default_fields(Scenario.named("default"))
    assert found == ("workload.rate_rps", "cost.overrides.memory_bytes_per_s")
    assert [note.split()[0] for note in notes] == ["workload.input.mean_tokens", "workload.output.mean_tokens"]
    fixed = scenario(workload={"kind": "closed-loop", "concurrency": 4, "num_requests": 8, "input": 300,
                               "output": {"kind": "fixed", "tokens": 20}})
    found, _ = default_fields(fixed)
    assert found[:3] == ("workload.concurrency", "workload.input", "workload.output.tokens")
    moved = module._moved(fixed, [field_of(fixed, name) for name in found], np.log([1.1, 1.1, 1.0, 1.1]))
    assert moved.workload.concurrency == 4 and moved.workload.input == 330 and moved.workload.output.tokens == 20
    assert moved.cost.decode.a == pytest.approx(0.0044)


def frame_of(scenario: Scenario, ttft_s: np.ndarray, arrival_s: np.ndarray) -> pd.DataFrame:
    return pd.DataFrame({"point": 0, "seed": 0, "request_id": np.arange(len(ttft_s)), "arrival_s": arrival_s,
                         "ttft_s": ttft_s, "tpot_s": 0.001, "e2e_s": 1.0 + ttft_s})


def test_requests_are_those_that_metrics_count_and_keep_their_own_limits():
    """In neither warm-up nor cool-down; a tenant's limit where it has one, and the scenario's of the others."""
    one = scenario(warmup_s=2.0, cooldown_s=3.0)
    arrival_s = np.arange(1.0, 11.0)
    seconds, limits = module._measured(one, frame_of(one, arrival_s, arrival_s))
    assert seconds["ttft"].tolist() == [3.0, 4.0, 5.0, 6.0, 7.0] and limits["ttft"].tolist() == [0.15] * 5
    tenants = scenario(workload=dict(WORKLOAD, num_requests=10, tenants=[
        {"name": "a", "ttft_ms": 10.0}, {"name": "b"}]))
    _, limits = module._measured(tenants, frame_of(tenants, arrival_s, arrival_s))
    drawn = make_workload(tenants, 0)
    is_a = np.array(drawn.tenant_names)[drawn.tenant] == "a"
    assert 0 < is_a.sum() < 10
    assert limits["ttft"].tolist() == np.where(is_a, 0.01, 0.15).tolist() and limits["tpot"].tolist() == [0.03] * 10


def test_a_way_ends_where_nothing_can_be_simulated(monkeypatch):
    """And not the command: attainment there is not known, and the reason is."""
    def simulated(scenarios):
        refused = {index: "no room" for index, one in enumerate(scenarios) if one.cost.prefill.b > 1.3e-4}
        frames = [frame_of(one, np.full(100, 0.1), np.arange(100.0)).assign(point=index)
                  for index, one in enumerate(scenarios) if index not in refused]
        # The rate alone makes things worse: a request a percent.
        for frame, one in zip(frames, [s for i, s in enumerate(scenarios) if i not in refused], strict=True):
            late = int(round(100 * max(np.log(one.workload.rate_rps / 4.0), 0.0)))
            frame.loc[:late - 1, "ttft_s"] = 0.2
        return None, pd.concat(frames), refused

    monkeypatch.setattr(module.runner, "table_and_requests", simulated)
    found = margins(scenario(), ("workload.rate_rps", "cost.prefill.b"), share=0.955)
    rows = found.table.set_index("way")
    assert found.attainment == 1.0
    # Attainment is of 32 bits.
    assert rows.loc["workload.rate_rps", "radius"] == pytest.approx(0.045, rel=1e-5)
    assert pd.isna(rows.loc["workload.rate_rps", "ends"])
    alone = found.curves["cost.prefill.b"]
    # 1e-4 exp(0.25) is the last that can be; the share is passed near, so that is looked at closely.
    assert found.radii is NEAR_RADII and np.isfinite(alone).tolist() == [radius < 0.26 for radius in NEAR_RADII]
    assert np.isnan(rows.loc["cost.prefill.b", "radius"]) and rows.loc["cost.prefill.b", "ends"] == "no room"


@pytest.mark.slow
def test_attainment_is_that_of_a_study_and_limits_are_fields(tmp_path, capsys):
    """The hard one, with tenants and both ends cut off; and the command to its end, of a limit too."""
    one = scenario(warmup_s=2.0, cooldown_s=2.0, slo={"ttft_ms": 60.0, "tpot_ms": 30.0}, workload=dict(
        WORKLOAD, tenants=[{"name": "a", "ttft_ms": 40.0}, {"name": "b", "tpot_ms": 5.0}]))
    table, frame, refused = runner.table_and_requests([one])
    assert not refused
    for seed, theirs in table.set_index("seed")["slo.attainment"].items():
        seconds, limits = module._measured(one, frame[frame["seed"] == seed])
        ours = float(relaxed.hard(seconds, limits))
        assert ours == pytest.approx(theirs) and 0.1 < ours < 0.9 and len(seconds["ttft"]) < 120
    path = tmp_path / "one.toml"
    path.write_text(dump_toml(scenario().to_dict()))
    arguments = ["margins", str(path), "--share", "0.98", "--fields", "slo.ttft_ms", "workload.rate_rps"]
    assert main([*arguments, "--json", "--plot", str(tmp_path / "margins.png")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["slopes"]["slo.ttft_ms"] > 0 > found["slopes"]["workload.rate_rps"]
    assert {"way", "radius", "ends", "slo.ttft_ms"} <= found["ways"][0].keys()
    assert (tmp_path / "margins.png").stat().st_size > 5000
    assert main(arguments) == 0
    assert "attainment now: " in capsys.readouterr().out


def test_the_command_refuses_in_one_line(capsys):
    for arguments in (["default", "--share", "2"], ["nowhere"], ["default", "--plot", "figure.txt"],
                      ["default", "--fields", "workload.kind"]):
        assert main(["margins", *arguments]) == 2
        assert capsys.readouterr().err.count("\n") == 1
