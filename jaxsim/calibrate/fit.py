"""Constants of a device from observations: which leaves of each form move, between which bounds, held out by shape.

Few parameters a family, all of them shares of a datasheet peak, seconds, or counts of matrix elements. What kernels
there are (tiles, FlashAttention 2 or 3, which parameters a form has at all) stays that of the device's present record,
its own or its family's; so do the constants of families without rows.
"""

import functools
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import msgspec
import numpy as np
from jaxtyping import Float

from jaxsim._core.errors import InputError
from jaxsim.calibrate import families
from jaxsim.calibrate.families import Observations
from jaxsim.calibrate.least_squares import Fit, Parameter, Problem
from jaxsim.spec.device import DeviceSpec, load_device
from jaxsim.spec.efficiency import Efficiency

SCALE = 0.15
"""Error of a logarithm at which a row starts to count as an outlier."""

MOST_EVALUATIONS = 120

FEWEST_ROWS = 3
"""Rows a parameter needs; families with fewer keep their constants."""

WORSE = 1.2
"""A fit whose median error is so many times that of the present constants is not taken: held out, where these come from
another device, otherwise on the rows it was fitted to."""

SMALLEST_S = 1e-9
"""Lower bound of seconds that may be zero; a fit that ends there says 0."""

MOST_ERROR = 0.5
"""Median error from which a family is not taken: whatever was timed, it is not what the form describes."""

CLOSEST = 0.01
"""Median error below which no fit is called worse."""


MOST_UNLIKE = 50.0
"""A table whose median row is so many times off the present constants is in another unit: kernels lie within 30."""


class Range(NamedTuple):
    """Physical bounds, and the width of the log-normal prior around the present constant (0.5: a factor of 1.65)."""

    lower: float
    upper: float
    width: float


_SHARE, _SLOW = Range(0.1, 1.0, 0.5), Range(0.02, 1.0, 1.0)
_KERNEL, _SOME = Range(2e-7, 2e-4, 1.0), Range(SMALLEST_S, 2e-4, 1.0)

RANGES: dict[str, dict[str, Range]] = {
    "gemm": {
        "floor_s": _KERNEL, "efficiency": _SHARE, "read_efficiency": _SHARE, "prologue": Range(1, 2000, 1.0),
        "split": Range(32, 8192, 1.0), "edge": Range(0.01, 100, 1.0), "narrow_efficiency": _SHARE,
        "quantise_efficiency": _SHARE, "dequantise_rows": Range(0.5, 200, 0.5)},
    "experts": {
        "floor_s": Range(1e-6, 3e-4, 1.0), "kernels_s": _SOME, "efficiency": _SLOW, "read_efficiency": _SLOW,
        "prologue": Range(1, 4000, 1.0), "half_rows": Range(0.1, 1000, 1.0), "row_efficiency": _SLOW,
        "resident": Range(1, 16, 0.5), "unaligned_factor": Range(1, 32, 1.0), "vector_efficiency": Range(0.001, 1, 1.0),
        "vector_dequantise_rows": Range(0.05, 100, 1.0)},
    "decode": {
        "floor_s": _KERNEL, "item_s": Range(1e-8, 2e-5, 1.0), "combine_s": Range(SMALLEST_S, 1e-5, 1.0),
        "read_efficiency": _SHARE, "read_efficiency_8bit": _SHARE, "sweep_s": Range(1e-10, 1e-7, 1.0),
        "swap_s": Range(1e-8, 2e-5, 1.0), "query_factor": Range(0.5, 8, 0.5), "head_exponent": Range(0.01, 1, 1.0),
        "floor_head_exponent": Range(0.01, 1, 1.0), "group_factor": Range(0.01, 2, 1.0),
        "window_s": Range(SMALLEST_S, 1e-5, 1.0)},
    "prefill": {
        "floor_s": _KERNEL, "item_s": Range(1e-8, 1e-4, 1.0), "efficiency": _SHARE, "io_factor": Range(0.05, 5, 1.0),
        "factor_8bit": Range(0.3, 3, 0.5), "factor_head64": Range(0.3, 3, 0.5),
        "joined_read_factor": Range(0.5, 8, 0.5)},
    "latent": {
        "decode_floor_s": Range(1e-6, 3e-4, 1.0), "decode_floor_8bit_s": Range(1e-6, 3e-4, 1.0), "decode_step_s": _SOME,
        "read_efficiency": _SHARE, "read_efficiency_8bit": _SHARE, "flops_efficiency": _SHARE,
        "prefill_floor_s": Range(1e-6, 3e-4, 1.0), "prefill_item_s": Range(1e-8, 1e-4, 1.0),
        "prefill_efficiency": _SHARE, "copies": Range(0.5, 40, 1.0)},
    "elementwise": {"floor_s": Range(2e-7, 2e-5, 0.5), "efficiency": _SHARE},
    "nccl": {
        "latency_s": Range(1e-6, 2e-4, 1.0), "rank_s": Range(1e-8, 2e-5, 1.0),
        "low_efficiency": Range(0.01, 1.0, 1.0), "bulk_latency_s": Range(1e-6, 5e-4, 1.0), "efficiency": _SLOW},
    "custom_all_reduce": {
        "latency_s": Range(1e-6, 2e-4, 1.0), "two_shot_s": Range(1e-7, 2e-4, 1.0), "efficiency": _SLOW,
        "bulk_latency_s": Range(1e-6, 2e-4, 1.0), "bulk_efficiency": _SLOW},
}
"""Leaves that are fitted, by kind.

Source of the bounds: a launch costs the device at least some tenths of a microsecond, no peak is exceeded; the widths
are as wide as constants differ between measured devices (scenarios/devices/efficiency).
"""

_NEUTRAL = {"sweep_s": 0.0, "swap_s": 0.0, "query_factor": 1.0, "head_exponent": 0.0, "floor_head_exponent": 0.0,
            "group_factor": 0.0, "window_s": 0.0, "edge": 0.0, "factor_8bit": 1.0, "factor_head64": 1.0,
            "joined_read_factor": 1.0, "resident": 1.0, "unaligned_factor": 1.0}
"""Values with which a form does without a parameter; then it is not fitted."""

_ORDER = ("gemm", "elementwise", "experts", "decode", "prefill", "latent", "nccl", "custom_all_reduce")
"""Latent modules hold products, which come before them."""


class Errors(NamedTuple):
    """Of relative errors |predicted / measured - 1|: median, 90th percentile, and the median signed one."""

    median: float
    p90: float
    bias: float


class Group(NamedTuple):
    """Errors of one shape after the fit."""

    shape: str
    rows: int
    errors: Errors


@dataclass(frozen=True)
class Calibrated:
    """One family. rows: in the tables; observations: those that were used. before: with the present constants;
    held_out: each row by a fit without its shape, None where there is one shape only.
    predicted_s: of the rows used, by the constants in the end; groups: worst first. refused: why the fit was not taken.
    """

    family: str
    rows: int
    observations: Observations
    fit: Fit
    present: dict[str, float]
    before: Errors
    after: Errors
    held_out: Errors | None
    folds: int
    groups: tuple[Group, ...]
    predicted_s: Float[np.ndarray, " rows"]
    seconds: float
    refused: str = ""


@dataclass(frozen=True)
class Calibration:
    """All families of a device, the record they make, and the families that keep constants measured elsewhere."""

    device: DeviceSpec
    record: Efficiency
    families: tuple[Calibrated, ...]
    not_measured: tuple[str, ...]
    notes: tuple[str, ...]
    digests: dict[str, str]


def errors_of(logs: Float[np.ndarray, " rows"]) -> Errors:
    """Errors from log(predicted / measured)."""
    relative = np.expm1(logs)
    size = np.abs(relative)
    return Errors(float(np.median(size)), float(np.quantile(size, 0.9)), float(np.median(relative)))


def parameters(record: Efficiency, family: str) -> list[Parameter]:
    """What is fitted of a family: present constants as starts and centres of the priors."""
    values, kernel = families.section(record, family), families.kernel(record, family)
    found = []
    for name, (lower, upper, width) in RANGES[family.partition(".")[0]].items():
        present = getattr(values, name)
        if getattr(kernel, name) is None or present == _NEUTRAL.get(name):
            continue
        if present < lower:
            # A zero says that nothing was seen, not that it is known to be small.
            found.append(Parameter(name, math.sqrt(lower * upper), lower, upper))
        else:
            centre = min(present, upper)
            found.append(Parameter(name, centre, lower, upper, centre, width))
    return found


def problem(observations: Observations, device: DeviceSpec, record: Efficiency) -> Problem:
    """Log errors of the rows over the parameters of their family."""
    made = families.model(observations, device, record)
    family = observations.family

    def errors(values: dict[str, jax.Array], data: Any) -> jax.Array:
        kernel = families.kernel(record, family)
        leaves = sorted(values)
        kernel = eqx.tree_at(lambda k: [getattr(k, name) for name in leaves], kernel, [values[n] for n in leaves])
        return jnp.log(made.seconds(kernel, data["rows"])) - data["log_s"]

    data = {"rows": made.data, "log_s": np.log(observations.seconds)}
    return Problem.compiled(errors, parameters(record, family), data, scale=SCALE)


def folds_of(groups: np.ndarray, folds: int, seed: int) -> np.ndarray:
    """The fold of each row: groups are dealt whole, in random order."""
    names, inverse = np.unique(groups, return_inverse=True)
    order = np.random.default_rng(seed).permutation(len(names))
    return (np.argsort(order) % folds)[inverse]


def fit_family(observations: Observations, device: DeviceSpec, record: Efficiency, *, sample: int = 4000,
               seed: int = 0, folds: int = 5) -> Calibrated:
    """Fit one family on at most `sample` rows, held out by shape in `folds` parts."""
    start = time.perf_counter()
    used, groups_of = observations.sample(sample, seed), functools.partial(np.unique, return_inverse=True)
    names, group = groups_of(used.groups)
    solver = problem(used, device, record)
    present = {p.name: getattr(families.section(record, used.family), p.name) for p in solver.parameters}
    with np.errstate(divide="ignore"):
        before = solver.errors(present)
    _check_units(used, device, before)
    fit = solver.solve(groups=group, max_evaluations=MOST_EVALUATIONS)
    after = solver.errors(fit.values)
    held, parts = None, min(folds, len(names))
    if parts > 1:
        fold, outside = folds_of(group, parts, seed), np.zeros(len(used))
        for i in range(parts):
            apart = solver.solve((fold != i).astype(float), max_evaluations=MOST_EVALUATIONS)
            outside = np.where(fold == i, solver.errors(apart.values), outside)
        held = errors_of(outside)
    told_before, told_after = errors_of(before), errors_of(after)
    # Constants that were fitted on such tables themselves have seen every shape: only what is fitted here is held out.
    refused = _refused(fit, told_before, (told_after if is_own(device) else held) or told_after)
    logs = before if refused else after
    worst = sorted((Group(str(names[i]), int((group == i).sum()), errors_of(logs[group == i]))
                    for i in range(len(names))), key=lambda g: -g.errors.median)
    return Calibrated(used.family, len(observations), used, fit, present, told_before, told_after, held, parts,
                      tuple(worst), np.exp(logs) * used.seconds, time.perf_counter() - start, refused)


def _check_units(observations: Observations, device: DeviceSpec, logs: np.ndarray) -> None:
    """Refuse a table that is off by 1000 against the present constants. Raises `InputError`."""
    middle = float(np.median(logs))
    if abs(middle) > math.log(MOST_UNLIKE):
        at = int(np.argmin(np.abs(logs - middle)))
        raise InputError(f"{observations.place(at)}, seconds", float(observations.seconds[at]),
                         f"is {math.exp(-middle):.2g} times what the present constants of {device.name} say, as is half"
                         f" of {observations.family}",
                         "the unit looks wrong: check the time column (ns, us, ms, s) and the device")


def _refused(fit: Fit, before: Errors, after: Errors) -> str:
    if not fit.converged:
        return "the fit did not converge"
    if after.median > MOST_ERROR:
        return f"it errs by {100 * after.median:.0f} % in the median: the rows are not of this device's kernels"
    if after.median > max(WORSE * before.median, CLOSEST):
        return f"it errs by {100 * after.median:.1f} %, the present constants by {100 * before.median:.1f} %"
    return ""


def written(fit: Fit) -> dict[str, float]:
    """Values as they are written down: four digits; seconds at the bound that stands for nothing are 0."""
    def one(name: str, value: float) -> float:
        is_none = fit.bounds.get(name) == "lower" and fit.limits[name][0] <= SMALLEST_S
        return 0.0 if is_none else float(f"{value:.4g}")

    return {name: one(name, value) for name, value in fit.values.items()}


def replaced(record: Efficiency, family: str, values: dict[str, Any]) -> Efficiency:
    """The record with fields of one section replaced."""
    kind, _, name = family.partition(".")
    made = msgspec.structs.replace(families.section(record, family), **values)
    return msgspec.structs.replace(record, **{kind: getattr(record, kind) | {name: made} if name else made})


def family_names(record: Efficiency) -> list[str]:
    """All families of a record."""
    found = []
    for kind in record.__struct_fields__:
        part = getattr(record, kind)
        found += [f"{kind}.{name}" for name in part] if isinstance(part, dict) else [kind]
    return found


def calibrate(observations: Iterable[Observations], device: DeviceSpec, *, digests: dict[str, str] | None = None,
              notes: Iterable[str] = (), sample: int = 4000, seed: int = 0, folds: int = 5,
              progress: Callable[[Calibrated], None] = lambda _: None) -> Calibration:
    """Fit every family that has rows; the others keep what `device.kernel_efficiency()` says.

    digests: SHA-256 by file name, for the sources. sample: rows of a family that are used. folds: of the held-out
    figures. progress: called after each family.
    """
    digests, told, found = dict(digests or {}), list(notes), []
    record = inherited(device)
    for o in sorted(observations, key=lambda o: (_ORDER.index(o.kind), o.family)):
        count = len(parameters(record, o.family))
        if len(o) < FEWEST_ROWS * count:
            told.append(f"{o.family}: {len(o)} rows are too few for {count} parameters, not fitted")
            continue
        one = fit_family(o, device, record, sample=sample, seed=seed, folds=folds)
        if not one.refused:
            values = {**written(one.fit), "source": _source(one, digests)}
            record = replaced(record, o.family, values)
        found.append(one)
        progress(one)
    measured = {one.family for one in found if not one.refused}
    return Calibration(device, record, tuple(found),
                       tuple(name for name in family_names(record) if name not in measured), tuple(told), digests)


def is_own(device: DeviceSpec) -> bool:
    """Whether the present constants are the device's own."""
    return device.efficiency is not None or device.family == device.name


def family_of(device: DeviceSpec) -> str:
    """Name in the catalogue of the device whose constants these are."""
    return device.name if is_own(device) else load_device(device.family).name


def inherited(device: DeviceSpec) -> Efficiency:
    """The device's present record; where that is another device's, every source says so."""
    record = device.kernel_efficiency()
    if is_own(device):
        return record
    whose = family_of(device)
    for name in family_names(record):
        source = families.section(record, name).source
        record = replaced(record, name, {"source": f"not measured: constants of {whose}, for the datasheet of"
                                                   f" {device.name}; there: {source}"})
    return record


def _source(one: Calibrated, digests: dict[str, str]) -> str:
    files = ", ".join(f"{name} (sha256 {digests[name][:12]})" if name in digests else str(name)
                      for name in dict.fromkeys(one.observations.files.tolist()))
    used = f"{len(one.observations):,} of " if len(one.observations) < one.rows else ""
    held = (f", held out by shape {100 * one.held_out.median:.1f} / {100 * one.held_out.p90:.1f} %"
            if one.held_out else ", one shape: nothing held out")
    weak = f"; not determined: {', '.join(one.fit.undetermined)}" if one.fit.undetermined else ""
    return (f"jaxsim calibrate, {files}, {used}{one.rows:,} rows, error {100 * one.after.median:.1f} /"
            f" {100 * one.after.p90:.1f} % (median / p90){held}{weak}")
