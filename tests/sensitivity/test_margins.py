"""Margins: where a share is passed, and a system whose shortest way is known."""

import numpy as np
import pytest

from jaxsim._core.errors import InputError
from jaxsim.cli.commands import main
from jaxsim.sensitivity import margins as module
from jaxsim.sensitivity.margins import RADII, margins
from jaxsim.spec.scenario import Scenario

pytestmark = pytest.mark.unoptimised

FORM = {"a": 0.004, "b": 1e-4, "d": 2e-4}


def scenario(**changes) -> Scenario:
    return Scenario.from_dict({
        "schema_version": 1, "num_seeds": 2, "slo": {"ttft_ms": 150.0, "tpot_ms": 30.0},
        "engine": {"preset": "vllm-v1@0.9", "max_num_seqs": 16, "max_num_batched_tokens": 1024, "max_model_len": 2048,
                   "num_gpu_blocks_override": 2000},
        "cost": {"kind": "fitted", "prefill": FORM, "decode": FORM},
        "workload": {"kind": "poisson", "rate_rps": 4.0, "num_requests": 128,
                     "input": {"kind": "log-normal", "mean_tokens": 300, "sigma": 0.3, "max_tokens": 1000},
                     "output": {"kind": "log-normal", "mean_tokens": 40, "sigma": 0.3, "max_tokens": 200}}} | changes)


def test_where_a_share_is_passed():
    values = np.r_[1.0, np.where(RADII < 0.22, 1.0, 0.9)]
    assert module._passed(values, 0.99) == pytest.approx(0.2 + 0.05 * 0.1)
    assert np.isnan(module._passed(np.ones(len(RADII) + 1), 0.99))
    assert module._passed(np.r_[0.995, np.zeros(len(RADII))], 0.99) == pytest.approx(0.05 * 0.005 / 0.995)


def test_what_has_no_margin_is_refused():
    with pytest.raises(InputError, match="no limits"):
        margins(scenario(slo={}))
    with pytest.raises(InputError, match=r"cost.overrides.memory_bytes_per_s"):
        margins(scenario())
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
    assert found.worst["radius"] <= steepest < 1.1 * found.worst["radius"]
    # Those that never pass it are longer than the longest that is simulated.
    assert rows[list(fields)].fillna(RADII[-1]).min() > 1.1 * steepest
    # Prompts and their cost enter TTFT as a product.
    assert found.slopes["cost.prefill.b"] == pytest.approx(found.slopes["workload.input.mean_tokens"], rel=0.4)
    with pytest.raises(InputError, match="missed already"):
        margins(scenario(slo={"ttft_ms": 20.0}), fields)


def test_the_command_refuses_in_one_line(capsys):
    for arguments in (["default", "--share", "2"], ["nowhere"], ["default", "--plot", "figure.txt"],
                      ["default", "--fields", "workload.kind"]):
        assert main(["margins", *arguments]) == 2
        assert capsys.readouterr().err.count("\n") == 1
