"""Kernel constants of devices: where they come from, and how they are carried over."""

from importlib import resources

import msgspec
import pytest

from jaxsim._core.errors import InputError
from jaxsim.spec.device import DeviceSpec, device_catalogue, load_device
from jaxsim.spec.efficiency import DATASHEET, Efficiency, load_efficiency, section_records

FOLDER = resources.files("jaxsim.scenarios") / "devices" / "efficiency"
RECORDS = sorted(f.name.removesuffix(".toml") for f in FOLDER.iterdir() if f.name.endswith(".toml"))
MINE = dict(name="mine", memory_bytes_per_s=1.675e12, bf16_flops=1e14, memory_bytes=2**34)


def test_every_device_says_where_its_constants_come_from():
    measured = []
    for device in device_catalogue().values():
        assert device.kernel_efficiency().gemm["bf16"].efficiency > 0
        if device.calibration == "measured":
            measured.append(device.name)
        elif device.calibration != "datasheet":
            assert load_device(device.family).calibration == "measured"
        assert device.calibration_note or device.calibration == "datasheet", device.name
    assert sorted(measured) == RECORDS
    assert all(d.calibration == "datasheet" for d in device_catalogue().values() if d.kind != "gpu")


@pytest.mark.parametrize("name", RECORDS)
def test_every_section_names_its_table(name):
    record = load_efficiency(name)
    sections = [*record.gemm.values(), *record.experts.values(), *record.nccl.values(), record.decode, record.prefill,
                record.latent, record.elementwise, record.custom_all_reduce, record.hop]
    assert all(section.source for section in sections)
    # What a record does not have is said to be another's.
    assert ("H100" in record.latent.source) == (name != "h200_sxm_141")


def test_transfer_keeps_what_memory_does_not_bound():
    """Half of the bandwidth: shares of copies double up to 0.8, seconds and shares of reads stay."""
    h100 = load_device("h100").kernel_efficiency()
    mine = DeviceSpec(**MINE, calibration="family:h100").kernel_efficiency()
    assert mine.gemm["bf16"] == h100.gemm["bf16"] and mine.custom_all_reduce == h100.custom_all_reduce
    assert h100.experts["bf16"].row_efficiency == 0.524
    assert mine.experts["bf16"].row_efficiency == 0.8
    assert mine.gemm["fp8_block"].quantise_efficiency == 0.8
    assert mine.decode.read_efficiency == h100.decode.read_efficiency
    # An item passes tokens as fast as its multiprocessor multiplies: 312 / 108 against 100 / 128 TFLOP/s.
    ampere = DeviceSpec(**MINE, calibration="family:a100").kernel_efficiency()
    assert ampere.decode.sweep_s == pytest.approx(2.096e-8 * (312 / 108) / (100 / 128))


def test_what_a_record_borrows_is_transferred():
    """Sections that an RTX PRO 6000 takes from the H100 keep their bytes/s, as in a whole transfer."""
    h100, rtx = load_device("h100").kernel_efficiency(), load_device("rtx_pro_6000").kernel_efficiency()
    ratio = 1.792 / 3.35
    assert rtx.experts["mxfp4"].row_efficiency == pytest.approx(h100.experts["mxfp4"].row_efficiency / ratio)
    assert rtx.gemm["fp8"].quantise_efficiency == 0.8 > h100.gemm["fp8"].quantise_efficiency
    # Its own are as they stand, and so are seconds and other shares.
    assert rtx.experts["bf16"].row_efficiency == 0.4856 and rtx.latent == h100.latent
    assert section_records("rtx_pro_6000")["gemm.fp8"] == "h100_sxm_80"
    assert section_records("rtx_pro_6000")["gemm.bf16"] == section_records("rtx_pro_6000")["decode"] == "rtx_pro_6000"
    assert set(section_records("h100_sxm_80").values()) == {"h100_sxm_80"}


def test_own_devices():
    assert DeviceSpec(**MINE).family == DATASHEET
    record = load_efficiency("rtx_pro_6000")
    assert DeviceSpec(**MINE, efficiency=record).kernel_efficiency() is record
    with pytest.raises(InputError, match="catalogue"):
        DeviceSpec(**MINE, calibration="family:h1000").kernel_efficiency()
    with pytest.raises(InputError, match="no such record.*h100_sxm_80"):
        DeviceSpec(**MINE, calibration="family:l4").kernel_efficiency()
    with pytest.raises(InputError, match="device.calibration"):
        DeviceSpec.from_dict(MINE | dict(calibration="guessed"))


def test_tables_are_checked():
    table = msgspec.to_builtins(load_efficiency("h100_sxm_80"))
    assert Efficiency.from_dict(table) == load_efficiency("h100_sxm_80")
    for path, value, message in (
            (("decode", "read_efficiency"), 1.2, "decode.read_efficiency"), (("decode", "kernel"), "fa4", "fa3"),
            (("gemm", "fp8", "row_limits"), [64], "one fewer than tiles"), (("hop", "speed"), 1, "speed")):
        changed = msgspec.to_builtins(load_efficiency("h100_sxm_80"))
        part = changed
        for step in path[:-1]:
            part = part[step]
        part[path[-1]] = value
        with pytest.raises(InputError, match=message):
            Efficiency.from_dict(changed)
    del table["gemm"]["bf16"]
    with pytest.raises(InputError, match="gemm.bf16"):
        Efficiency.from_dict(table)
