"""Whether a profile belongs to what runs: its units, its model, parallel degrees and formats, its device."""

from collections.abc import Callable

import numpy as np

from jaxsim._core.errors import InputError
from jaxsim.cost.profile import OperatorTable, Profile
from jaxsim.cost.profile_rates import TableRates
from jaxsim.cost.rank import Roofline
from jaxsim.spec.device import DeviceSpec, load_device
from jaxsim.spec.model import ModelSpec, load_model
from jaxsim.spec.plan import kv_cache_bytes, weight_format

OFF_BY = 100.0
"""A table (its median) or a row this far from the roofline is in another unit: real kernels lie within 30 times."""


def check_units(profile: Profile, base: Roofline) -> None:
    """Refuse tables and single rows that are off by 1000 against the roofline. Raises `InputError` with the row."""
    rates = TableRates(base)
    for name, table in profile.tables.items():
        if name == "host_step":
            continue
        ratio = table.seconds / np.asarray(rates.of(name)(*table.points.T), np.float64)
        middle = float(np.median(ratio))
        if not 1 / OFF_BY < middle < OFF_BY:
            _off(table, int(np.argmin(np.abs(ratio - middle))), middle, "the whole table is")
        far = np.abs(np.log(ratio / middle))
        if far.max() > np.log(3 * OFF_BY):
            _off(table, int(np.argmax(far)), float(ratio[np.argmax(far)]), "this row is")


def _off(table: OperatorTable, index: int, ratio: float, what: str) -> None:
    raise InputError(f"profile {table.place(index)}, {table.name} seconds", float(table.seconds[index]),
                     f"is {ratio:.2g} times what the device's peaks allow for, and {what}",
                     "check the unit of the time column (off by 1000?) and that model and device are those profiled")


def check_system(profile: Profile, base: Roofline) -> None:
    """Refuse a profile of another model shape, parallel degree or width of numbers. Raises `InputError`."""
    model, plan = base.model, base.plan
    measured = _bytes(lambda: weight_format(profile.dtype).linear_bytes)
    if profile.dtype != "auto" and measured and measured != base.weights.linear_bytes:
        raise InputError("profile.dtype", profile.dtype, f"has {measured:g} bytes a weight, the model that runs"
                         f" {base.weights.linear_bytes:g}", "use a profile of that format, or change model.dtype")
    measured = _bytes(lambda: kv_cache_bytes(profile.kv_dtype))
    if profile.kv_dtype != "auto" and measured and measured != base.kv_bytes:
        raise InputError("profile.kv_dtype", profile.kv_dtype, f"has {measured:g} bytes a number, the KV cache that"
                         f" runs {base.kv_bytes:g}", "use a profile of that format, or change model.kv_dtype")
    if profile.tensor_parallel_size != plan.tensor_parallel_size:
        raise InputError("profile.tensor_parallel_size", profile.tensor_parallel_size,
                         f"differs from engine.tensor_parallel_size = {plan.tensor_parallel_size}",
                         "read the profile again for this degree, or change the engine's")
    if "experts" in profile.tables and profile.expert_parallel_size != plan.expert_ranks:
        raise InputError("profile.expert_parallel_size", profile.expert_parallel_size,
                         f"differs from the {plan.expert_ranks} ranks the experts are spread over",
                         "read the expert table for this degree")
    if {"experts", "experts_touched"} & profile.tables.keys() and plan.expert_ranks < base.num_ranks:
        raise InputError("engine.data_parallel_size", plan.data_parallel_size,
                         "cuts each expert over tensor x data ranks, and the profile has them cut over"
                         f" {profile.tensor_parallel_size}",
                         "set engine.enable_expert_parallel = true, or use cost.kind = 'roofline'")
    if profile.model:
        try:
            measured = load_model(profile.model)
        except InputError:
            return
        for field in ("layers", "hidden", "heads", "kv_heads", "head_dim", "ffn", "vocab", "experts"):
            ours, theirs = getattr(model, field), getattr(measured, field)
            if ours != theirs and not _may_differ(field, model, profile):
                raise InputError("profile.model", profile.model, f"has {field} = {theirs}, {model.name} has {ours}",
                                 "use a profile of the model that runs")


def check_device(profile: Profile, device: DeviceSpec) -> None:
    """Refuse a profile of another device, where both are in the catalogue. Raises `InputError`."""
    measured, ours = _known_device(profile.device), _known_device(device.name)
    if measured and ours and measured != ours:
        raise InputError("profile.device", profile.device, f"is not {device.name}, which runs",
                         "use a profile of the device that runs, or change device.name")


def _bytes(width: Callable[[], float]) -> float | None:
    """The width, or None where the format is one that only the source of the profile knows."""
    try:
        return width()
    except InputError:
        return None


def _known_device(name: str) -> str | None:
    try:
        return load_device(name).name
    except InputError:
        return None


def _may_differ(field: str, model: ModelSpec, profile: Profile) -> bool:
    return field == "layers" or (field == "ffn" and not model.num_dense_layers)
