"""A scenario: model, device, engine, cluster, workload, limits and cost, as `scenario.toml` writes them.

Everything is checked here, on the host, before anything is compiled; what is wrong is told as one
`InputError` that names the dotted field, the value and the remedy.
"""

import math
import os
import re
from collections.abc import Callable, Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from jaxsim._core.errors import InputError, suggest
from jaxsim._core.records import converted
from jaxsim.spec.cluster import ClusterSection, PoolSection
from jaxsim.spec.costs import FittedCost, ProfiledCost, RooflineCost
from jaxsim.spec.engine import (
    ContextReuseSection,
    EngineConfig,
    OffloadSection,
    QualityRow,
    RedrawSection,
    SwapSection,
)
from jaxsim.spec.messages import explain
from jaxsim.spec.rules import check
from jaxsim.spec.sections import DeviceSection, ModelSection, SloSection
from jaxsim.spec.toml import dump_toml, parse_toml
from jaxsim.spec.values import NotNegative, every_section
from jaxsim.spec.workload import WorkloadSection

__all__ = [
    "ClusterSection", "DeviceSection", "FittedCost", "ModelSection", "ProfiledCost", "RooflineCost", "Scenario",
    "SloSection", "WorkloadSection", "anchored", "assign", "json_schema", "read_tree", "shipped_scenarios",
    "with_paths", "with_paths_of"]

SCHEMA_VERSION = 1
_DEFAULT_REQUESTS = 1000


class Scenario(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """One simulated system under one workload. Build it with `from_toml` or `from_dict`, which check it.

        schema_version: of this format.
        name: a label.
        description: what it shows.
        model: which model runs; may be left out with a fitted cost.
        device: what it runs on; may be left out with a fitted cost.
        engine: the serving engine.
        cluster: replicas and router.
        workload: what arrives.
        slo: limits.
        cost: seconds of an iteration.
        num_seeds: independent runs, from which intervals are made.
        warmup_s: requests that arrive in the first seconds are simulated, and left out of the metrics.
        cooldown_s: so are those that arrive in the last seconds before the last one; rates are then of the time in
            between, so that neither filling nor draining is in them.
    """

    schema_version: Literal[1]
    name: str = ""
    description: str = ""
    model: ModelSection | None = None
    device: DeviceSection | None = None
    engine: EngineConfig = EngineConfig()
    cluster: ClusterSection = ClusterSection()
    workload: WorkloadSection
    slo: SloSection = SloSection()
    cost: RooflineCost | ProfiledCost | FittedCost = RooflineCost()
    num_seeds: Annotated[int, Meta(ge=1, le=10_000)] = 8
    warmup_s: NotNegative = 0.0
    cooldown_s: NotNegative = 0.0

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Scenario":
        """From nested dictionaries as `tomllib` gives them; NumPy scalars and arrays count as numbers and lists.

        Raises `InputError` for the first thing wrong.
        """
        if not isinstance(values, Mapping):
            raise InputError("scenario", values, "is not a table of fields",
                             "give nested dictionaries, or use Scenario.from_toml(path) or Scenario.named(name)")
        return cls.from_builtins(builtins_of(values, ""))

    @classmethod
    def from_builtins(cls, tree: dict[str, Any]) -> "Scenario":
        """The same from a tree of Python's own values, all finite, whose `cost` may be given its kind.

        Raises `InputError` for the first thing wrong.
        """
        cost = tree.get("cost")
        of_fitted = set(FittedCost.__struct_fields__) - set(RooflineCost.__struct_fields__)
        if isinstance(cost, dict) and "kind" not in cost and cost.keys().isdisjoint(of_fitted):
            cost["kind"] = (ProfiledCost if "path" in cost else RooflineCost).__struct_config__.tag
        try:
            scenario = converted(tree, cls)
        except msgspec.ValidationError as error:
            raise explain(str(error), tree, cls) from None
        check(scenario)
        return scenario

    @classmethod
    def from_toml(cls, path: str | Path) -> "Scenario":
        """From a file, or the shipped scenario of that name. Relative paths inside a file count from its folder."""
        return cls.from_dict(read_tree(path))

    @classmethod
    def named(cls, name: str) -> "Scenario":
        """A shipped scenario, by its name in `jaxsim list scenarios`."""
        shipped = shipped_scenarios()
        if not isinstance(name, str) or name not in shipped:
            raise InputError("scenario", name, "no scenario of that name", suggest(str(name), shipped))
        with resources.as_file(shipped[name]) as path:
            return cls.from_dict(read_tree(path))

    @property
    def dtype(self) -> str:
        """Weights and activations, wherever they were given; "auto" is the model's own."""
        return _first_given(self.model and self.model.dtype, self.engine.dtype)

    @property
    def kv_dtype(self) -> str:
        """KV cache, wherever it was given; "auto" is the width of the activations."""
        return _first_given(self.model and self.model.kv_dtype, self.engine.kv_cache_dtype)

    @property
    def num_requests(self) -> int | None:
        """Requests simulated; None is a whole trace."""
        if self.workload.num_requests is None and self.workload.kind != "trace":
            return _DEFAULT_REQUESTS
        return self.workload.num_requests

    def of_pool(self, index: int) -> "Scenario":
        """The scenario of one of its pools alone, without the others. Raises `InputError`."""
        pool = self.cluster.pools[index]
        tree = self.to_dict()
        tree["cluster"] = {"replicas": pool.replicas}
        if self.cluster.encode is not None:
            tree["cluster"]["encode"] = msgspec.to_builtins(self.cluster.encode)
        tree["engine"] = tree.get("engine", {}) | pool.engine
        if pool.device is not None:
            tree["device"] = {"name": pool.device}
        if pool.cost is not None:
            tree["cost"] = msgspec.to_builtins(pool.cost)
        return type(self).from_dict(tree)

    @property
    def devices_of_pools(self) -> tuple[tuple[DeviceSection | None, int, int], ...]:
        """Of every pool, or of all replicas: the device, how many a replica has, and the number of replicas."""
        degrees = ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size", "kv_parallel_size",
                   "prefill_context_parallel_size")
        return tuple(
            (self.device if pool.device is None else DeviceSection(name=pool.device),
             math.prod(pool.engine.get(name, getattr(self.engine, name)) for name in degrees), pool.replicas)
            for pool in self.cluster.pools or (PoolSection(replicas=self.cluster.replicas),))

    @property
    def num_devices(self) -> int:
        """Devices of all replicas."""
        return sum(devices * replicas for _, devices, replicas in self.devices_of_pools)

    @property
    def has_clients(self) -> bool:
        """Whether requests may end without an answer."""
        cluster = self.cluster
        return self.workload.has_deadlines or cluster.admission is not None or cluster.failures is not None

    @property
    def seeds(self) -> tuple[int, ...]:
        """Seed of each of the independent runs."""
        return tuple(self.workload.seed + k for k in range(self.num_seeds))

    def to_dict(self) -> dict[str, Any]:
        """Nested dictionaries without defaults; `from_dict` gives the scenario back."""
        return _without_none(msgspec.to_builtins(self))

    def to_toml(self) -> str:
        """The scenario as a file's text; `from_toml` gives it back."""
        return dump_toml(self.to_dict())

    def checked(self) -> "Scenario":
        """Itself, checked again: for scenarios made by calling the class or `msgspec.structs.replace`."""
        try:
            return type(self).from_dict(self.to_dict())
        except TypeError as error:
            raise InputError("scenario", self.name, str(error), "use plain numbers and strings") from None

    def with_values(self, values: dict[str, Any]) -> "Scenario":
        """A copy with dotted fields replaced, e.g. {"engine.max_num_seqs": 64}; None is the default."""
        if not isinstance(values, Mapping):
            raise InputError("values", values, "is not a table of fields", 'write e.g. {"engine.max_num_seqs": 64}')
        tree = self.to_dict()
        assign(tree, values)
        return type(self).from_dict(tree)


def read_tree(path: str | Path) -> dict[str, Any]:
    """The fields of a scenario file, or of the shipped scenario of that name, not checked yet."""
    remedy = "give a scenario file, or a name of `jaxsim list scenarios`"
    if not isinstance(path, (str, os.PathLike)) or not str(path):
        raise InputError("scenario", path, "is not the path of a file", remedy)
    given, path = str(path), Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise InputError("scenario", given, "is not UTF-8 text", "save it as UTF-8") from None
    except (OSError, ValueError) as error:
        if given in shipped_scenarios():
            return Scenario.named(given).to_dict()
        if isinstance(error, FileNotFoundError) and path.suffix != ".toml":
            raise InputError("scenario", given, "no such file, and no scenario of that name",
                             suggest(given, shipped_scenarios())) from None
        raise InputError("scenario", given, getattr(error, "strerror", None) or "cannot be read", remedy) from None
    return anchored(parse_toml(text, given), path.parent)


def shipped_scenarios() -> dict[str, Any]:
    """Scenario files that come with the package, by name."""
    folder = resources.files("jaxsim.scenarios")
    files = sorted((f for f in folder.iterdir() if f.name.endswith(".toml")), key=lambda f: f.name)
    return {f.name.removesuffix(".toml"): f for f in files}


def _first_given(*dtypes: str | None) -> str:
    return next((d for d in dtypes if d not in (None, "auto")), "auto")


def builtins_of(node: Any, path: str) -> Any:
    """A copy made of dictionaries, lists and Python's own numbers, all of them finite."""
    if isinstance(node, os.PathLike):
        return os.fspath(node)
    if isinstance(node, msgspec.Struct):
        node = msgspec.to_builtins(node)
    elif hasattr(node, "tolist"):
        # NumPy's scalars and arrays, and whatever else behaves like them.
        node = node.tolist()
    if isinstance(node, Mapping):
        return {key: builtins_of(value, f"{path}.{key}" if path else str(key)) for key, value in node.items()}
    if isinstance(node, (list, tuple)):
        return [builtins_of(value, f"{path}[{index}]") for index, value in enumerate(node)]
    if isinstance(node, float) and not math.isfinite(node):
        raise InputError(path, node, "not a finite number", "leave the field out, or give a finite number")
    return node


def _without_none(node: Any) -> Any:
    if isinstance(node, dict):
        return {k: _without_none(v) for k, v in node.items() if v is not None}
    return [_without_none(v) for v in node] if isinstance(node, (list, tuple)) else node


_PATHS = (("workload", "trace"), ("workload", "lengths_from"), ("model", "config"), ("engine", "preset"),
          ("cost", "path"))


def anchored(tree: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The fields of a file, changed in place: its relative paths are relative to its folder."""
    return with_paths(tree, lambda path: str(folder / path))


def with_paths(tree: dict[str, Any], change: Callable[[str], str]) -> dict[str, Any]:
    """Fields of a scenario, changed in place: every path to a file is what `change` makes of it."""
    for section, last in _PATHS:
        node = tree.get(section)
        if isinstance(node, dict) and last in node:
            node[last] = with_paths_of(f"{section}.{last}", node[last], change)
    return tree


def with_paths_of(field: str, value: Any, change: Callable[[str], str]) -> Any:
    """The value of one dotted field, or section, likewise."""
    if isinstance(value, dict):
        return with_paths({field: dict(value)}, change)[field]
    is_path = tuple(field.split(".")) in _PATHS and isinstance(value, str) and value
    return change(value) if is_path and (field != "engine.preset" or value.endswith(".toml")) else value


def assign(tree: dict[str, Any], values: Mapping[str, Any]) -> None:
    """Replace dotted fields of a tree, in place; None is the default. Raises `InputError`."""
    for dotted, value in values.items():
        if not isinstance(dotted, str):
            raise InputError("a field name", dotted, "is not text", 'write e.g. {"engine.max_num_seqs": 64}')
        _assign(tree, dotted, value)


def _assign(tree: dict[str, Any], dotted: str, value: Any) -> None:
    keys = dotted.split(".")
    if not all(keys):
        raise InputError(dotted, value, "not a field", "write section.field, e.g. engine.max_num_seqs")
    node: Any = tree
    for depth, key in enumerate(keys):
        is_last = depth == len(keys) - 1
        if isinstance(node, list):
            key = index_in(node, key, keys[: depth + 1], value)
        elif not isinstance(node, dict):
            raise InputError(dotted, value, f"{'.'.join(keys[:depth])} has no fields", "write section.field")
        elif is_last and value is None:
            node.pop(key, None)
            return
        elif not is_last and not isinstance(node.get(key), (dict, list)):
            # A shorthand (`input = 512`) gives way to a table.
            node[key] = {}
        if is_last:
            node[key] = value
        else:
            node = node[key]


def index_in(node: Any, key: str, keys: list[str], value: Any) -> str | int:
    """A key of a table as it is, of a list as a number; keys: the path to it. Raises `InputError`."""
    if not isinstance(node, list):
        return key
    if not key.isdecimal() or int(key) >= len(node):
        raise InputError(".".join(keys), value, f"not an index of a list of {len(node)}", "count from 0")
    return int(key)


# ---- JSON schema


def _field_docs(struct: type) -> dict[str, str]:
    """`name: text` lines of a section's docstring (continued on deeper lines)."""
    docs: dict[str, str] = {}
    name = None
    for line in (struct.__doc__ or "").splitlines():
        found = re.match(r" {8}(\w+): (.*)", line)
        if found and found.group(1) in struct.__struct_encode_fields__:
            name = found.group(1)
            docs[name] = found.group(2)
        elif name and re.match(r" {12}\S", line):
            docs[name] += " " + line.strip()
        else:
            name = None
    return docs


def json_schema() -> dict[str, Any]:
    """The JSON schema of `scenario.toml`, descriptions taken from the docstrings."""
    (_,), definitions = msgspec.json.schema_components([Scenario], ref_template="#/$defs/{name}")
    sections = [Scenario, EngineConfig, SwapSection, RedrawSection, OffloadSection, ContextReuseSection, QualityRow,
                *every_section()]
    for struct in sections:
        node = definitions.get(struct.__name__)
        if node is None:
            continue
        node["description"] = (struct.__doc__ or "").split("\n")[0]
        for name, text in _field_docs(struct).items():
            field = node["properties"][name]
            # Siblings of $ref are ignored by older validators.
            field = {"allOf": [field]} if "$ref" in field else field
            node["properties"][name] = {"description": text, **field}
    root = definitions.pop("Scenario")
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **root,
            "title": f"jaxsim scenario, version {SCHEMA_VERSION}", "$defs": definitions}
