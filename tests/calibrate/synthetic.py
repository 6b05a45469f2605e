"""Operator tables made by the forms themselves, with known constants and noise."""

import itertools
from dataclasses import replace

import numpy as np
import pandas as pd

from jaxsim.calibrate import families, fit
from jaxsim.calibrate.families import Observations
from jaxsim.spec.device import load_device

DEVICE = load_device("h100")


def observations(family: str, columns: dict, record=None, noise: float = 0.05, seed: int = 0, device=DEVICE
                 ) -> Observations:
    """Rows of a family as the form with `record` times them, log-normal noise on top."""
    columns = {k: np.asarray(v) for k, v in columns.items()}
    count = len(next(iter(columns.values())))
    o = Observations(family, columns, np.ones(count), np.arange(1, count + 1), np.full(count, "made.csv", object), {})
    seconds = families.predicted(o, device, record or device.kernel_efficiency())
    return replace(o, seconds=seconds * np.exp(noise * np.random.default_rng(seed).standard_normal(count)))


def products(sizes=(1, 16, 128, 1024, 8192), shapes=(512, 2048, 8192, 16384)) -> dict:
    m, n, k = np.array(list(itertools.product(sizes, shapes, shapes)), float).T
    return {"m": m, "n": n, "k": k, "weight_bytes": 2 * n * k}


def changed(family: str, **values):
    """The H100's record with other constants of one family."""
    return fit.replaced(DEVICE.kernel_efficiency(), family, values)


def gemm_table(path, **changes):
    """A small aiconfigurator GEMM table of the H100's constants; changes: columns replaced."""
    o = observations("gemm.bf16", products())
    frame = pd.DataFrame({"device": "NVIDIA H100 80GB HBM3", "gemm_dtype": "bfloat16", **{
        name: o.columns[name].astype(int) for name in "mnk"}, "latency_ms": 1e3 * o.seconds}).assign(**changes)
    frame.to_csv(path, index=False)
    return frame
