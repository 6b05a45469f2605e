"""What can be a parameter: every number of a scenario, by its dotted name.

A number is what the scenario gives, or what stands in its place when it is left out: the calibrated value of a constant
of the roofline (`cost.overrides.*`), the datasheet of a named device (`device.numbers.*`), a limit of the preset
(`engine.*`). Whether one has an effect is seen where the scenario becomes arrays: it does if the compiled loop, the
arrivals, the limits or the devices' power and price are other numbers after a step.
"""

import contextlib
import dataclasses
import fnmatch
import hashlib
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import msgspec
import numpy as np

from jaxsim._core.errors import InputError, suggest
from jaxsim.cost.roofline import override_values, roofline
from jaxsim.engine import lower
from jaxsim.metrics import devices_of
from jaxsim.spec.device import DeviceSpec
from jaxsim.spec.presets import NO_TOKEN_LIMIT
from jaxsim.spec.scenario import DeviceSection, FittedCost, Scenario
from jaxsim.study.lanes import Lanes, Store, stamps
from jaxsim.study.study import check_field

ALL = "all"

CLOCK = "device.clock"
"""Of [device], where a device without one has the highest."""

EXPERIMENT = ("schema_version", "num_seeds", "workload.seed", "workload.num_requests", "warmup_s", "cooldown_s",
              "workload.slice")
"""Numbers of the experiment and not of what it is about."""

DEGREES = ("_parallel_size", "replicas", "num_devices", "variants", "num_redundant_experts", "block_size", "max_stages")
"""Endings of numbers that say of how many parts something is made: other ones are another system."""

_OF_ENGINE = ("max_num_seqs", "max_num_batched_tokens", "gpu_memory_utilization", "watermark",
              "batch_wait_timeout_iters", "batch_wait_max_tokens_ratio", "block_size")
"""Of [engine], where the scheduler has what a preset gives."""

_SAME_AS_OVERRIDES = ("memory_bytes_per_s", "link_bytes_per_s", "internode_bytes_per_s", "efficiency", "bf16_flops",
                      "fp8_flops", "int8_flops", "fp4_flops", "fp32_flops", "num_multiprocessors", "num_cores",
                      "clock")
"""Numbers of a device that `all` leaves to `cost.overrides` and `device.clock`, or that no step of a few per cent leads
to."""

_OVERRIDES = Store(256)
"""Values of overrides, which every one of them asks for."""


class Field(NamedTuple):
    """A number of a scenario: its dotted name, its value, and whether it counts something."""

    name: str
    value: float
    is_whole: bool


class Side(NamedTuple):
    """One step from a scenario: the field's value there, and the scenario; None and why it cannot be simulated."""

    value: float
    scenario: Scenario | None
    reason: str = ""


def field_of(scenario: Scenario, name: str) -> Field:
    """A number of a scenario by name. Raises `InputError` for what is none, or none that a step can change."""
    found = _found(scenario, name)
    if isinstance(found, (bool, np.bool_, str)):
        value = f'"{found}"' if isinstance(found, str) else str(found).lower()
        raise InputError("wrt", name, f"is a choice ({value}), not a number, so it has no derivative",
                         f'study it with an axis: [axes] "{name}" = [{value}, ...]')
    if name.endswith(".priority"):
        raise InputError("wrt", name, "says who goes first: it is a place in an order and not a quantity",
                         f'study it with an axis: [axes] "{name}" = [...]')
    if name in EXPERIMENT or name.startswith("workload.slice."):
        raise InputError("wrt", name, "is of the experiment, and not of what it is about",
                         "ask for a number of the system, its load or its limits")
    if name.endswith(DEGREES):
        raise InputError("wrt", name, "says of how many parts something is made: another one is another system",
                         f'study it with an axis: [axes] "{name}" = [...]')
    if not isinstance(found, (int, float, np.integer, np.floating)):
        raise InputError("wrt", name, "is a table, not a number", "name a number in it")
    if not 0 < found < math.inf:
        raise InputError("wrt", name, f"is {found:g}, of which no per cent are a step",
                         "give it a value above 0 in the scenario")
    is_whole = isinstance(found, (int, np.integer))
    return Field(name, int(found) if is_whole else float(found), is_whole)


def _found(scenario: Scenario, name: str) -> Any:
    """What stands at a dotted name. Raises `InputError` where the scenario has nothing there."""
    head, _, rest = name.partition(".")
    if name.startswith("cost.overrides."):
        return _override(scenario, name.removeprefix("cost.overrides."))
    if name.startswith("device.numbers."):
        return _of_device(scenario, name.removeprefix("device.numbers."))
    if name == CLOCK:
        # 1 where it is left out.
        return _device(scenario, name).clock
    if name == "cost.front_end_s":
        return lower.front_end_s(scenario, lower.resolve_system(scenario))
    is_scheduler = head == "engine" and rest in _OF_ENGINE
    if not is_scheduler:
        check_field(name, "wrt")
    node: Any = scenario
    for key in name.split("."):
        if isinstance(node, (tuple, list)) and key.isdecimal() and int(key) < len(node):
            node = node[int(key)]
        elif isinstance(node, dict):
            node = node.get(key)
        else:
            node = getattr(node, key, None)
    if node is not None:
        return _plain(node)
    if is_scheduler and (value := _of_schedulers(scenario, rest)) is not None:
        return value
    raise InputError("wrt", name, "is not used by this scenario",
                     "give it a value there, or ask for `all` that it uses")


def _plain(node: Any) -> Any:
    return msgspec.to_builtins(node) if isinstance(node, msgspec.Struct) else node


def _of_schedulers(scenario: Scenario, name: str) -> Any:
    """A number of the preset; None where there is no limit. Raises `InputError` where pools differ."""
    system = lower.resolve_system(scenario)
    # A pool with a number of its own does not listen to [engine].
    sections = zip(scenario.cluster.pools, system.pools, strict=True)
    listening = [pool.system for section, pool in sections if name not in section.engine] if system.pools else [system]
    values = {getattr(one.scheduler, name) for one in listening}
    if not values:
        return None
    if len(values) > 1:
        raise InputError("wrt", f"engine.{name}", "differs between the pools", "give it in the scenario")
    value = values.pop()
    return None if value >= NO_TOKEN_LIMIT else value


def _override(scenario: Scenario, name: str) -> float:
    every = [] if isinstance(scenario.cost, FittedCost) else overrides_of(scenario)
    if not every:
        raise InputError("wrt", f"cost.overrides.{name}", "is not used by a scenario with fitted coefficients",
                         "ask for those, e.g. cost.decode.a")
    if name not in every[0]:
        raise InputError("wrt", f"cost.overrides.{name}", "is not a parameter of the roofline",
                         suggest(name, every[0], "docs/cost-model.md, section 3, has their names: FAMILY_LEAF"))
    values = {value for one in every for value in one.get(name, ())}
    if len(values) > 1:
        raise InputError("wrt", f"cost.overrides.{name}", f"stands for numbers that differ"
                         f" ({', '.join(f'{v:.4g}' for v in sorted(values))}), and sets them all to one",
                         "give one of your own in the scenario, or ask for device.numbers.efficiency, by number format")
    return values.pop()


def overrides_of(scenario: Scenario) -> list[dict[str, tuple[float, ...]]]:
    """Of every kind of engines: values by the names of `cost.overrides`. Raises `InputError`."""
    s = scenario
    key = msgspec.msgpack.encode((s.model, s.device, s.engine, s.cluster, s.cost, stamps(s)))
    return _OVERRIDES.get(key, lambda: _overrides_of(scenario))


def _overrides_of(scenario: Scenario) -> list[dict[str, tuple[float, ...]]]:
    system = lower.resolve_system(scenario)
    pools = [pool for pool in lower.kinds_of_pools(system) if pool.role != "encode"]
    found = []
    for one, of in [(pool.scenario, pool.system) for pool in pools] or [(scenario, system)]:
        if isinstance(one.cost, FittedCost):
            continue
        cost, s = one.cost, of.scheduler
        more = {name: getattr(cost, name) for name in ("split_kv", "expert_load") if hasattr(cost, name)}
        found.append(override_values(roofline(
            of.model, of.device, of.plan, one.dtype, one.kv_dtype, host=cost.host or s.host,
            distinct_experts=cost.distinct_experts, moe_backend=one.engine.moe_backend, **more, **cost.overrides),
            cost.overrides))
    return found


def _device(scenario: Scenario, name: str) -> DeviceSpec:
    if scenario.device is None:
        raise InputError("wrt", name, "is not used by this scenario, which names no device", "give it a [device]")
    try:
        return scenario.device.spec()
    except InputError:
        raise InputError("wrt", name, f"is of a device in no catalogue ({scenario.device.name})",
                         "give its numbers in [device.numbers]") from None


def _of_device(scenario: Scenario, rest: str) -> Any:
    name = f"device.numbers.{rest}"
    spec = _device(scenario, name)
    node: Any = spec
    for depth, key in enumerate(rest.split(".")):
        if isinstance(node, dict):
            known = list(node)
        else:
            known = list(getattr(node, "__struct_fields__", ()))
        if key not in known:
            raise InputError("wrt", name, "is no number of a device", suggest(key, known))
        node = node[key] if isinstance(node, dict) else getattr(node, key)
        if depth == 0 and key == "efficiency":
            node = spec.kernel_efficiency()
        if node is None:
            raise InputError("wrt", name, f"is not known of {spec.name}", "give it in [device.numbers]")
    return _plain(node)


def with_value(scenario: Scenario, name: str, value: float) -> Scenario:
    """The scenario with another number at a name. Raises `InputError`."""
    if not name.startswith("device.numbers."):
        return scenario.with_values({name: value})
    spec = _device(scenario, name)
    numbers = {key: number for key, number in msgspec.to_builtins(spec).items() if number is not None}
    *path, last = name.removeprefix("device.numbers.").split(".")
    if path[:1] == ["efficiency"]:
        numbers["efficiency"] = msgspec.to_builtins(spec.kernel_efficiency())
    node = numbers
    for key in path:
        node = node[key]
    node[last] = value
    # The catalogue's own name: kernels of a measured device are known by it.
    section = DeviceSection(name=numbers.pop("name"), numbers=numbers)
    return msgspec.structs.replace(scenario, device=section).checked()


def sides(scenario: Scenario, field: Field, step: float, lanes: Lanes) -> tuple[Side, Side]:
    """The scenario a step below and a step above; a field that counts moves by at least one.

    step: of the logarithm. A side that cannot be simulated, or not in the same compiled program, says why.
    """
    found = []
    for sign in (-1, 1):
        value: float = field.value * math.exp(sign * step)
        if field.is_whole:
            value = field.value + sign * max(round(abs(value - field.value)), 1)
        found.append(_side(scenario, field, value, lanes))
    return found[0], found[1]


def _side(scenario: Scenario, field: Field, value: float, lanes: Lanes) -> Side:
    if value <= 0:
        return Side(value, None, f"{field.name} = {value:g} is no value")
    try:
        there = lanes.shared(with_value(scenario, field.name, value))
        one, other = lanes.shape(scenario), lanes.shape(there)
    except InputError as error:
        return Side(value, None, str(error))
    if (one.key, one.num_requests) != (other.key, other.num_requests):
        return Side(value, None, f"{field.name} = {value:g} would be another compiled program")
    return Side(value, there)


# ---- all of a scenario


def names_of(scenario: Scenario) -> list[str]:
    """Every number of a scenario that a derivative could be by, whether or not it has an effect."""
    found = [name for name, _ in _leaves(scenario, "")]
    found += [f"engine.{name}" for name in _OF_ENGINE]
    if not isinstance(scenario.cost, FittedCost):
        every = overrides_of(scenario)
        found += ["cost.front_end_s", *(f"cost.overrides.{name}" for name in (every[0] if every else ()))]
    if scenario.device is not None:
        found.append(CLOCK)
        with contextlib.suppress(InputError):
            # A fitted cost needs no device, so the one named may be in no catalogue.
            found += [f"device.numbers.{name}" for name, _ in _leaves(scenario.device.spec(), "")
                      if name.split(".")[0] not in _SAME_AS_OVERRIDES]
    return list(dict.fromkeys(found))


def _leaves(node: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    """Dotted names of numbers in sections, defaults among them."""
    if isinstance(node, msgspec.Struct):
        items = [(field.encode_name, getattr(node, field.name)) for field in msgspec.structs.fields(node)]
    elif isinstance(node, dict):
        items = list(node.items())
    elif isinstance(node, tuple) and node and isinstance(node[0], msgspec.Struct):
        items = [(str(index), value) for index, value in enumerate(node)]
    else:
        if isinstance(node, (int, float)) and not isinstance(node, bool):
            yield prefix.removesuffix("."), node
        return
    for key, value in items:
        if f"{prefix}{key}" not in ("model", "device", "cost.overrides"):
            yield from _leaves(value, f"{prefix}{key}.")


def all_fields(scenario: Scenario, step: float, lanes: Lanes, pattern: str = "*") -> list[Field]:
    """Every number that changes what is simulated, or how it is judged, when it is moved by a step.

    pattern: of the names.
    """
    base = fingerprint(scenario, lanes)
    found = []
    for name in fnmatch.filter(names_of(scenario), pattern):
        try:
            field = field_of(scenario, name)
        except InputError:
            continue
        below, above = sides(scenario, field, step, lanes)
        if any(side.scenario is not None and fingerprint(side.scenario, lanes) != base for side in (above, below)):
            found.append(field)
    return found


def chosen(scenario: Scenario, wrt: str | Sequence[str], step: float, lanes: Lanes) -> list[Field]:
    """The fields that are asked for, each with an effect. Raises `InputError`.

    wrt: names, patterns of names ("cost.overrides.*"), or "all".
    """
    asked = [wrt] if isinstance(wrt, str) else list(wrt)
    if not asked:
        raise InputError("wrt", asked, "names nothing", "name fields of the scenario, or ask for `all`")
    found: dict[str, Field] = {}
    for name in asked:
        if not isinstance(name, str):
            raise InputError("wrt", name, "is no name of a field", "write e.g. workload.rate_rps")
        if name == ALL or "*" in name:
            mine = all_fields(scenario, step, lanes, "*" if name == ALL else name)
            if not mine:
                raise InputError("wrt", name, "matches no number that this scenario uses",
                                 "ask for `all` to see them")
            found |= {field.name: field for field in mine}
        else:
            found[name] = _checked(scenario, name, step, lanes)
    return list(found.values())


def _checked(scenario: Scenario, name: str, step: float, lanes: Lanes) -> Field:
    field = field_of(scenario, name)
    both = sides(scenario, field, step, lanes)
    able = [side.scenario for side in both if side.scenario is not None]
    if not able:
        reasons = "; ".join(dict.fromkeys(side.reason for side in both))
        raise InputError("wrt", name, f"has no neighbour that could be simulated beside {field.value:g} ({reasons})",
                         f'study it with an axis: [axes] "{name}" = [...]')
    base = fingerprint(scenario, lanes)
    if all(fingerprint(one, lanes) == base for one in able):
        raise InputError("wrt", name, "has no effect in this scenario", "ask for `all` to see what has one")
    return field


def fingerprint(scenario: Scenario, lanes: Lanes) -> bytes:
    """Hash of the numbers that a scenario's first run and its verdicts are made of. Raises `InputError`."""
    scenario = lanes.shared(scenario)
    shape = lanes.shape(scenario)
    tokens = max(s.most_tokens(shape.slots, shape.longest) for s in shape.schedulers)
    dims, runs = lanes.runs(scenario, shape.slots, tokens, shape.longest)
    run, found = runs[0], hashlib.sha256()
    columns = [getattr(run.workload, field.name) for field in dataclasses.fields(run.workload)]
    kept = [run.params, run.arrival_s, run.front_end_s, run.patience, devices_of(scenario, dims.all_ranks),
            [column for column in columns if isinstance(column, np.ndarray)]]
    for leaf in jax.tree.leaves(kept):
        array = np.asarray(leaf)
        found.update(f"{array.dtype}{array.shape}".encode() + array.tobytes())
    found.update(msgspec.msgpack.encode((scenario.slo, scenario.workload.tenants)))
    return found.digest()
