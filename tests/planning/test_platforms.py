"""Devices of the catalogue against brute force over all plans, and the command from its options to what it prints."""

import json

import jax
import numpy as np
import pytest

from jaxsim import cli
from jaxsim._core.errors import InputError
from jaxsim._core.precision import enable_x64
from jaxsim.analytic.ideal import Pass
from jaxsim.analytic.requirements import USUAL, UseCase, needs
from jaxsim.planning.platforms import label, platform_of, platforms, worth
from jaxsim.planning.requirements_command import amount
from jaxsim.spec.device import load_device
from jaxsim.spec.model import load_model
from jaxsim.spec.plan import Plan

pytestmark = pytest.mark.unoptimised

USE = UseCase(model=load_model("llama-3.1-70b"), input_tokens=1000, output_tokens=500, ttft_s=1.0, tpot_s=0.025,
              batch=8, prompts=1)
NAMES = ("h100", "a100_sxm_80", "l4", "mi300x", "tpu_v5e")


@pytest.fixture(scope="module")
def found():
    return needs(USE)


def brute_force(name: str, most: int, use: UseCase = USE) -> list[tuple[int, float, Plan]]:
    """All plans of at most so many devices that fit and keep both limits: devices, TPOT, plan."""
    device, good = load_device(name), []
    for ranks in (1, 2, 4, 8, 16, 32):
        for stages in range(1, most // ranks + 1):
            plan = Plan(tensor_parallel_size=ranks, pipeline_parallel_size=stages)
            laid = use.with_plan(plan)
            if laid.memory().device_bytes > 0.9 * device.usable_memory_bytes:
                continue
            with enable_x64(True):
                platform = platform_of(device, laid, plan, USUAL)
                ttft, tpot = (float(Pass.seconds(work, platform).total) for work in laid.passes())
            if ttft <= use.ttft_s and tpot <= use.tpot_s:
                good.append((ranks * stages, tpot, plan))
    return good


def test_the_fewest_devices_of_all_plans(found):
    met = platforms(USE, found, NAMES, most_devices=8)
    rows = met.table.set_index("device")
    assert 1 < len(rows) < len(NAMES)
    for name in NAMES:
        device, good = load_device(name).name, brute_force(name, 8)
        assert (device in rows.index) == bool(good) == (device not in met.refused)
        if good:
            devices, tpot, plan = min(good, key=lambda row: row[:2])
            assert rows.loc[device, ["devices", "plan"]].tolist() == [devices, label(plan)]
            assert rows.loc[device, "tpot_ms"] == pytest.approx(1e3 * tpot)
    assert met.table["devices"].is_monotonic_increasing


def test_experts_may_be_whole_on_ranks():
    use = UseCase(model=load_model("mixtral-8x22b"), input_tokens=1000, output_tokens=100, ttft_s=5.0, tpot_s=0.1)
    met = platforms(use, needs(use), ["h100"])
    assert met.table["devices"].tolist() == [4]
    assert platforms(use, needs(use), ["h100"], most_devices=2).refused["h100_sxm_80"].startswith("memory: no plan")


def test_a_slow_device_says_what_it_misses(found):
    met = platforms(USE, found, ["l4"])
    assert not len(met.table) and "TPOT" in met.refused["l4"] and "at best" in met.refused["l4"]


def test_worth_by_resource(found):
    """Weights and cache, reads a limit, FLOP a limit, each over what a device has."""
    counts = worth(found, 80e9, 3e12, 1e15)
    assert counts["memory"] == pytest.approx(found.memory.total_bytes / 80e9)
    assert counts["bandwidth"] == pytest.approx(float(sum(found.decode.bytes)) / 0.8 / USE.tpot_s / 3e12)
    assert counts["compute"] == pytest.approx(float(sum(found.prefill.flops)) / 0.75 / USE.ttft_s / 1e15)


def test_a_narrow_type_that_a_device_has_not():
    """fp8 on an A100: all products run in 16 bits, those that are 16-bit anyway once."""
    use = UseCase(model=load_model("llama-3.1-8b"), input_tokens=1000, output_tokens=500, ttft_s=0.1, tpot_s=0.025,
                  dtype="fp8")
    narrow = needs(use)
    counts = platforms(use, narrow, ["a100_sxm_80", "h100"]).counts.set_index("device")
    flops, is_wide = narrow.prefill.flops, np.array(narrow.prefill.is_wide)
    assert counts.loc["a100_sxm_80", "compute"] == pytest.approx(flops.sum() / 0.1 / 0.75 / 312e12)
    h100 = load_device("h100")
    seconds = flops[is_wide].sum() / h100.peak("bf16").flops + flops[~is_wide].sum() / h100.peak("fp8").flops
    assert counts.loc[h100.name, "compute"] == pytest.approx(seconds / 0.1 / 0.75, rel=1e-3)


def test_links_by_their_kind():
    """NVLink has the efficiency asked for; PCIe and the network theirs, and 20 us before a message, from stage to stage
    too, unless an efficiency is given for all."""
    h100, l4 = load_device("h100"), load_device("l4")
    for device, plan, start_s, share, stage_start_s, stage_share in (
            (h100, Plan(tensor_parallel_size=4, pipeline_parallel_size=2), 5e-6, 0.75, 0.0, 0.75),
            (h100, Plan(tensor_parallel_size=8, pipeline_parallel_size=2), 5e-6, 0.75, 20e-6, 0.72),
            (l4, Plan(tensor_parallel_size=2, pipeline_parallel_size=2), 20e-6, 0.5, 20e-6, 0.5)):
        p = platform_of(device, USE, plan, USUAL)
        assert (p.start_s, p.link_efficiency, p.stage_start_s, p.stage_efficiency) == (
            start_s, share, stage_start_s, stage_share)
        p = platform_of(device, USE, plan, USUAL, 0.6)
        assert p.link_efficiency == p.stage_efficiency == 0.6 and p.stage_start_s == stage_start_s
    laid = USE.with_plan(Plan(tensor_parallel_size=8, pipeline_parallel_size=2))
    with enable_x64(True):
        decode = jax.tree.map(np.asarray, laid.passes()[1])
    near, far = (platform_of(h100, laid, Plan(tensor_parallel_size=8, pipeline_parallel_size=n), USUAL) for n in (1, 2))
    more = 20e-6 + float(decode.stage_bytes) * (1 / far.stage_bytes_per_s / 0.72 - 1 / near.stage_bytes_per_s / 0.75)
    assert decode.seconds(far, np).links - decode.seconds(near, np).links == pytest.approx(more, rel=1e-5)


@pytest.mark.parametrize("given, field", [
    (dict(most_devices=0), "most_devices"), (dict(memory_share=0), "memory_share"),
    (dict(memory_share=1.1), "memory_share"), (dict(names=["h1000"]), "device.name")])
def test_refusals(found, given, field):
    with pytest.raises(InputError) as caught:
        platforms(USE, found, **given)
    assert caught.value.field == field


# The command

OPTIONS = ("--model", "llama-3.1-8b", "--input", "1000", "--output", "200", "--ttft-ms", "300", "--tpot-ms", "20")


def test_the_command_prints_a_table_and_a_verdict(capsys):
    assert cli.main(["requirements", *OPTIONS, "--batch", "4", "--device", "h100", "--device", "l4",
                     "--most-devices", "1"]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 100
    for words in ("memory bandwidth", "TFLOP/s", "h100_sxm_80", "TP1", "l4: ",
                  "verdict: met by 1 x h100_sxm_80 (TP1); bandwidth binds"):
        assert words in out, words


def test_the_command_as_json(capsys):
    assert cli.main(["requirements", "default", "--batch", "2", "--set", "slo.ttft_ms=400", "--device", "h200",
                     "--json", "--tensor-parallel-size", "2", "--compute-efficiency", "0.5"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ttft_ms"] == 400 and found["batch"] == 2 and found["num_devices"] == 2
    assert found["efficiencies"]["compute"] == 0.5
    assert [row["requirement"] for row in found["requirements"]] == [
        "memory", "memory bandwidth", "compute", "link bandwidth, each way", "link latency, at most"]
    assert found["devices"][0]["device"] == "h200_sxm_141" and "binds" in found["verdict"]


def test_use_cases_are_changed_by_other_options(capsys):
    assert cli.main(["requirements", "--model", "llama-3.1-8b", "--use-case", "summarization", "--beams", "2",
                     "--device", "h200", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["input_tokens"], found["output_tokens"], found["beams"]) == (15_000, 1000, 2)
    assert (found["ttft_ms"], found["tpot_ms"]) == (2000, 20)


@pytest.mark.parametrize("arguments, says", [
    ((), "--model = None: is missing"),
    (OPTIONS[:6], "--ttft-ms = None: is missing; give it, or a SCENARIO or --use-case that has it"),
    (("--use-case", "chatt"), "--use-case = 'chatt': is not known; did you mean 'chat'?"),
    (("--use-case", "chat"), "--model = None: is missing; give it, or a SCENARIO that has it"),
    ((*OPTIONS, "--batch", "0"), "batch = 0: is no count; give a whole number of at least 1"),
    ((*OPTIONS, "--beams", "-1"), "beams = -1"),
    ((*OPTIONS, "--tpot-ms", "-1"), "tpot_ms = -1.0: is no limit; give milliseconds above 0"),
    ((*OPTIONS, "--set", "slo.ttft_ms=1"), "--set = 'slo.ttft_ms': has no scenario to change"),
    ((*OPTIONS, "--link-share", "1"), "link_share = 1.0: is out of range; give a share above 0, below 1"),
    ((*OPTIONS, "--tensor-parallel-size", "0"), "engine.tensor_parallel_size = 0"),
    ((*OPTIONS, "--enable-expert-parallel"), "has no experts"),
    ((*OPTIONS, "--device", "h1000"), "device.name = 'h1000': is not in the catalogue"),
    ((*OPTIONS, "--model", "llama-9"), "model.name = 'llama-9'"),
    (("no-such-scenario",), "no-such-scenario"),
])
def test_the_command_refuses(capsys, arguments, says):
    assert cli.main(["requirements", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and says in err


@pytest.mark.parametrize("value, unit, text", [
    (1.5e13, "B", "15.0 TB"), (4e10, "B", "40.0 GB"), (1e6, "B", "0.00100 GB"), (3.15e12, "B/s", "3.15 TB/s"),
    (7.4e17, "FLOP/s", "740 PFLOP/s"), (4.1e-6, "s", "4.10 us"), (None, "B", "-")])
def test_amounts(value, unit, text):
    assert amount(value, unit) == text
