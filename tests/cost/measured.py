"""Operator tables of real kernels: seconds by the forms with a device's constants, and measured ones.

The rows are those `jaxsim.calibrate.tables` reads; where forms take long, `ROWS` of them, the same in every run.
"""

import errno
import functools
import sys
from pathlib import Path

import numpy as np

from jaxsim.calibrate import families, tables
from jaxsim.calibrate.families import Observations
from jaxsim.spec.device import load_device

FILES = {"a100_sxm_80": "aic_a100_sxm_vllm0.14.0", "h100_sxm_80": "aic_h100_sxm_vllm0.19.0",
         "h200_sxm_141": "aic_h200_sxm_vllm0.19.0"}
NCCL_FILES = {"a100_sxm_80": "aic_a100_sxm_nccl2.27.3", "h100_sxm_80": "aic_h100_sxm_nccl2.27.3",
              "h200_sxm_141": "aic_h200_sxm_nccl2.26.2"}
A100, H100, H200, RTX = "a100_sxm_80", "h100_sxm_80", "h200_sxm_141", "rtx_pro_6000"
COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")
RTX_MODELS = {"llama31_8b": "llama-3.1-8b", "qwen3_30b_a3b": "qwen3-30b-a3b"}
SECTIONS = {"bfloat16": "bf16", "fp8": "fp8", "fp8_block": "fp8_block", "int4_wo": "int4"}
ROWS = 1500

Pair = tuple[np.ndarray, np.ndarray]


def record(device: str):
    return load_device(device).kernel_efficiency()


def _there(path: Path) -> Path:
    if not path.is_file():
        raise FileNotFoundError(errno.ENOENT, "no such table", str(path))
    return path


def _read(folder: Path, device: str, table: str) -> dict[str, Observations]:
    """Families of one table; of the RTX PRO 6000 those of all layers of both models."""
    return _layers(folder) if device == RTX else _table(folder, device, table)


@functools.cache
def _table(folder: Path, device: str, table: str) -> dict[str, Observations]:
    files = NCCL_FILES if table == "nccl" else FILES
    found = tables.read("aiconfigurator", [_there(folder / "ops" / f"{files[device]}_{table}.parquet")],
                        load_device(device))
    return {o.family: o for o in found.observations}


@functools.cache
def _layers(folder: Path) -> dict[str, Observations]:
    merged: dict[str, Observations] = {}
    for name, model in RTX_MODELS.items():
        files = [_there(folder / "ops" / f"vllm019_{kind}_rtxpro6000_{name}.{ending}")
                 for kind, ending in (("dense", "csv"), ("attention", "parquet"))]
        if name.startswith("qwen3"):
            files.append(_there(folder / "ops" / f"vllm019_moe_rtxpro6000_{name}.csv"))
        for o in tables.read("llmservingsim", files, load_device(RTX), model=model).observations:
            merged[o.family] = merged[o.family].joined(o) if o.family in merged else o
    return merged


def _pair(folder: Path, device: str, table: str, *names: str, rows: int = ROWS) -> Pair:
    """Predicted and measured seconds of a sample of some families."""
    parts = [o for name, o in _read(folder, device, table).items() if name in names]
    total = sum(map(len, parts))
    parts = [o.sample(max(1, round(rows * len(o) / total))) for o in parts]
    return (np.concatenate([families.predicted(o, load_device(device), record(device)) for o in parts]),
            np.concatenate([o.seconds for o in parts]))


def gemm(folder: Path, device: str, dtype: str) -> Pair:
    # Products cost nothing: all rows.
    return _pair(folder, device, "gemm", f"gemm.{SECTIONS[dtype]}", rows=1 << 20)


def decode(folder: Path, device: str) -> Pair:
    return _pair(folder, device, "generation_attention", "decode")


def prefill(folder: Path, device: str) -> Pair:
    return _pair(folder, device, "context_attention", "prefill")


def mla(folder: Path, device: str, kind: str) -> Pair:
    """Whole modules of DeepSeek-V3: projections, latent attention, rotary and cache write."""
    return _pair(folder, device, f"mla_{kind}_module", "latent")


def experts(folder: Path, device: str, dtype: str) -> Pair:
    """The loads of each row are drawn again."""
    return _pair(folder, device, "moe", f"experts.{SECTIONS[dtype]}", f"experts.{SECTIONS[dtype]}_tuned")


def nccl(folder: Path, device: str, collective: str) -> Pair:
    return _pair(folder, device, "nccl", f"nccl.{collective}")


def all_reduce(folder: Path, device: str) -> Pair:
    return _pair(folder, device, "custom_allreduce", "custom_all_reduce")


def errors(pair: Pair) -> tuple[float, float, float]:
    """Median and 90th percentile of the absolute relative error, and the median signed one."""
    predicted, seconds = (np.asarray(x, np.float64) for x in pair)
    relative = predicted / seconds - 1
    assert np.isfinite(relative).all()
    return float(np.median(np.abs(relative))), float(np.quantile(np.abs(relative), 0.9)), float(np.median(relative))


CASES = [
    *(("gemm", device, "bfloat16") for device in (A100, H100, H200, RTX)),
    *(("gemm", device, dtype) for device in (H100, H200) for dtype in ("fp8", "fp8_block")),
    *((kind, device) for kind in ("decode", "prefill") for device in (A100, H100, H200, RTX)),
    *(("mla", device, kind) for device in (H100, H200) for kind in ("generation", "context")),
    *(("experts", device, "bfloat16") for device in (A100, H100, H200, RTX)),
    *(("experts", device, dtype) for device in (H100, H200) for dtype in ("fp8", "fp8_block", "int4_wo")),
    *(("nccl", device, collective) for device in (A100, H100, H200) for collective in COLLECTIVES),
    *(("all_reduce", device) for device in (A100, H100, H200)),
]
"""Functions of this module and their arguments after the folder."""


if __name__ == "__main__":
    for kind, *arguments in CASES:
        median, p90, signed = errors(globals()[kind](Path(sys.argv[1]), *arguments))
        print(f"{kind:12s} {' '.join(arguments):32s} {100 * median:5.1f} / {100 * p90:5.1f} %, {100 * signed:+.1f} %",
              flush=True)
