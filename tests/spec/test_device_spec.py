"""The device catalogue: derived figures against published ones, look-up, fall-backs."""

import csv
from pathlib import Path

import pytest

from jaxsim._core.errors import InputError
from jaxsim.spec.device import VISIBLE_SHARE, DeviceSpec, device_catalogue, load_device

# Tokens at which a 16-bit GEMM turns from memory- to compute-bound, (bytes / 2) peak / bandwidth.
RIDGE_TOKENS = {"a100-80gb": 153, "h100": 295, "h200": 206, "b200": 292, "mi300x": 247, "a40": 215,
                "tpu_v5e": 241,
                "tpu_v5p": 166, "tpu_v6e": 560}


@pytest.mark.parametrize("name", RIDGE_TOKENS)
def test_ridge(name):
    device = load_device(name)
    assert round(device.peak("bf16").flops / device.memory_bytes_per_s) == RIDGE_TOKENS[name]


def test_every_row_is_sound():
    for device in device_catalogue().values():
        assert device.source and device.confidence
        assert 1e11 < device.memory_bytes_per_s < 1e13
        narrow, wide = device.peak("fp8").flops, device.peak("bf16").flops
        assert narrow >= wide > 1e12
        for low, high in ((device.idle_w, device.tdp_w), (device.usd_per_h_low, device.usd_per_h_high)):
            assert low is None or high is None or low <= high
        # A sparse peak would be twice as far from the fp32 one.
        if device.name.startswith("h100_sxm"):
            assert device.bf16_flops < 1e15
    assert len(device_catalogue()) >= 29


GIGA, TERA = 1e9, 1e12
COLUMNS = {
    "cores": ("num_cores", 1), "base_ghz": ("base_hz", GIGA), "mem_gb": ("memory_bytes", 2**30),
    "mem_bw_gbs": ("memory_bytes_per_s", GIGA), "bf16_dense_tflops": ("bf16_flops", TERA),
    "fp8_dense_tflops": ("fp8_flops", TERA), "int8_dense_tops": ("int8_flops", TERA),
    "fp4_dense_tflops": ("fp4_flops", TERA), "fp32_tflops": ("fp32_flops", TERA),
    "scaleup_gbs_per_dir": ("link_bytes_per_s", GIGA), "host_gbs_per_dir": ("host_link_bytes_per_s", GIGA),
    "tdp_w": ("tdp_w", 1), "idle_w": ("idle_w", 1), "active_idle_w": ("active_idle_w", 1),
    "usd_h_low": ("usd_per_h_low", 1), "usd_h_ref": ("usd_per_h", 1), "usd_h_high": ("usd_per_h_high", 1),
}
"""Numbers of the shared table: their fields and units. What is not known there is not known here."""


def test_numbers_are_those_of_the_shared_table():
    file = Path(__file__).resolve().parents[3] / "shared" / "physics" / "hardware.csv"
    if not file.is_file():
        pytest.skip(f"no table of devices at {file}")
    with file.open(newline="") as lines:
        rows = {row["id"]: row for row in csv.DictReader(lines)}
    named = rows.keys() & device_catalogue().keys()
    assert len(named) >= 28
    wrong = []
    for name in sorted(named):
        for column, (field, unit) in COLUMNS.items():
            text, ours = rows[name][column], getattr(load_device(name), field)
            theirs = None if text in ("", "unknown") else pytest.approx(float(text) * unit, rel=1e-12)
            if ours != theirs:
                wrong.append(f"{name}.{field}: {ours}, {column} = {text}")
    assert not wrong


def test_look_up():
    assert load_device("H100") is load_device("h100_sxm_80") is load_device("NVIDIA H100 80GB HBM3")
    assert load_device("rtx pro 6000").memory_bytes_per_s == 1.792e12
    with pytest.raises(InputError, match="did you mean .*h200"):
        load_device("h20")
    with pytest.raises(InputError, match="jaxsim list devices.*device.numbers"):
        load_device("?")


def test_peak_falls_back_to_a_wider_type():
    a100 = load_device("a100")
    assert a100.peak("fp8") == (312e12, "bf16")
    assert a100.peak("fp4") == (312e12, "bf16")
    assert a100.peak("int8") == (624e12, "int8")
    assert load_device("h100").peak("fp4").compute == "fp8"
    assert load_device("epyc_9654").peak("bf16").compute == "fp32"
    with pytest.raises(InputError, match="not known"):
        a100.peak("fp6")
    with pytest.raises(InputError, match="no fp32 peak"):
        load_device("tpu_v5e").peak("fp32")


def test_memory():
    assert load_device("h100").usable_memory_bytes == int(VISIBLE_SHARE * 80 * 2**30)
    assert load_device("rtx4090").usable_memory_bytes == 25250627584
    plain = DeviceSpec(name="mine", memory_bytes_per_s=1e12, bf16_flops=1e14, memory_bytes=2**34)
    assert 0.97 * 2**34 < plain.usable_memory_bytes < 2**34
    with pytest.raises(InputError, match="memory .* is not known"):
        load_device("xeon_8462y").usable_memory_bytes  # noqa: B018


def test_memory_is_discounted_once():
    """96 GiB nominal, of which CUDA shows 102,641,958,912 bytes (aiconfigurator's system specs)."""
    device = load_device("rtx_pro_6000")
    assert device.memory_bytes == 96 * 2**30 and device.usable_memory_bytes == 102_641_958_912


def test_links_by_topology():
    def link(name, *group):
        found = load_device(name).link_among(*group)
        return found.bytes_per_s / 1e9, found.kind

    assert link("h100", 2) == link("h100", 8) == (450, "direct") and link("h100", 16) == (50, "network")
    # A mesh: a link of 64 GB/s for each pair. Bridges join two; more go through the host.
    assert [link("mi300x", n)[0] for n in (2, 4, 8)] == pytest.approx([64, 192, 448])
    assert link("a40", 2) == (56.25, "direct") and link("a40", 4) == (32, "host") == link("a40", 2, 4)
    assert link("rtx6000_turing", 2) == (50, "direct") and link("rtx6000_turing", 3) == (16, "host")
    assert link("l40s", 2) == (32, "host") and link("tpu_v5e", 4) == (200, "torus")
    # Eight data-parallel ranks of two devices each are two nodes.
    assert link("h100", 8, 16) == (50, "network")


def test_links_that_are_assumed_are_said():
    plain = dict(name="mine", memory_bytes_per_s=1e12, bf16_flops=1e14)
    assert DeviceSpec(**plain).link_among(2)[1:] == (1e9, "host", ("a link of 1 GB/s",))
    hosted = DeviceSpec(**plain, link="NVLink9", host_link_bytes_per_s=64e9).link_among(2)
    assert hosted.kind == "host" and hosted.assumed == ("a link of 64 GB/s, as to the host",)
    assert load_device("gh200").link_among(16).assumed == ("nodes of 8 devices", "a network of 12.5 GB/s a device")
    assert load_device("h100").link_among(16).assumed == ()
    with pytest.raises(InputError, match="topology"):
        DeviceSpec.from_dict(plain | dict(topology="star"))


@pytest.mark.parametrize("changes, message", [
    (dict(memory_bytes_per_s=0), "memory_bytes_per_s|> 0"), (dict(bf16_flops=None), "no arithmetic peak"),
    (dict(visible_memory_bytes=2**40), "more than memory_bytes"), (dict(colour="red"), "colour"),
])
def test_tables_are_checked(changes, message):
    table = dict(name="mine", memory_bytes_per_s=1e12, bf16_flops=1e14, memory_bytes=2**34)
    assert DeviceSpec.from_dict(table).name == "mine"
    with pytest.raises(InputError, match=message):
        DeviceSpec.from_dict({k: v for k, v in (table | changes).items() if v is not None})


@pytest.mark.parametrize("changes", [dict(memory_bytes_per_s="fast"), dict(memory_bytes=-1), dict(tdp_w=float("inf")),
                                     dict(memory_bytes_per_s=None)])
def test_numbers_of_the_wrong_kind(changes):
    field, = changes
    with pytest.raises(InputError) as refusal:
        DeviceSpec(**dict(name="mine", memory_bytes_per_s=1e12, bf16_flops=1e14) | changes)
    assert refusal.value.field == f"device.{field}"
    with pytest.raises(InputError, match="not a table"):
        DeviceSpec.from_dict(None)
