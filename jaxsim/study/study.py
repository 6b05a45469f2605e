"""A study: a scenario, and axes over its fields."""

import copy
import itertools
import typing
from collections.abc import Callable, Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from jaxsim._core.errors import InputError, suggest
from jaxsim._core.records import converted
from jaxsim.spec.messages import explain
from jaxsim.spec.scenario import (
    Scenario,
    builtins_of,
    index_in,
    read_tree,
    shipped_scenarios,
    with_paths,
    with_paths_of,
)
from jaxsim.spec.toml import parse_toml
from jaxsim.study import design
from jaxsim.study.design import Axis, Point, Sample
from jaxsim.study.expressions import Expression

MOST_POINTS = 50_000_000
"""A grid beyond is refused: its table alone would not fit into memory."""


class Study(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """Scenarios that differ in a few fields.

        schema_version: of this format.
        name: a label.
        description: what it asks.
        scenario: the scenario that all start from: a file, a shipped name, or a table of its fields.
        num_seeds: independent runs of each, instead of the scenario's own number; the same seeds everywhere, so that
            scenarios differ in what was changed and not in their draws.
        axes: every combination of these: lists, or ranges {from, to, num, scale, whole}.
        zip: axes that advance together, one table each.
        sample: a random or Sobol design over a box.
        derived: fields computed from others, in order: "8 // engine.tensor_parallel_size".
        where: conditions that a point must meet to be part of the study.
        feasible_only: leave points that cannot be simulated out of the table, instead of keeping them with the reason.
    """

    schema_version: Literal[1]
    name: str = ""
    description: str = ""
    scenario: str | dict[str, Any] = "default"
    num_seeds: Annotated[int, Meta(ge=1, le=10_000)] | None = None
    axes: dict[str, Axis] = {}
    zip: list[dict[str, Axis]] = []
    sample: Sample | None = None
    derived: dict[str, str] = {}
    where: list[str] = []
    feasible_only: bool = False

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], folder: Path | None = None) -> "Study":
        """From nested dictionaries. Raises `InputError` for the first thing wrong.

        folder: of relative paths: the scenario's file, and those that the scenario or an axis names.
        """
        if not isinstance(values, Mapping):
            raise InputError("study", values, "is not a table of fields", "give nested dictionaries")
        tree = {key: _lists(value) for key, value in values.items()}
        try:
            study = converted(tree, cls)
        except msgspec.ValidationError as error:
            raise explain(str(error), tree, cls) from None
        if folder is not None:
            study = study.with_paths(lambda path: str(folder / path))
        study._check()
        return study

    @classmethod
    def from_toml(cls, path: str | Path) -> "Study":
        """From a file, or a shipped study by name. Raises `InputError`."""
        given, path = str(path), Path(path)
        shipped = shipped_studies()
        try:
            text = (path if path.exists() or given not in shipped else shipped[given]).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise InputError("study", given, "is not UTF-8 text", "save it as UTF-8") from None
        except OSError as error:
            if given in shipped_scenarios():
                raise InputError("study", given, "is a scenario, and a study has axes",
                                 "use `jaxsim run`, or name it in a study file (docs/studies.md)") from None
            raise InputError("study", given, error.strerror or "cannot be read",
                             suggest(given, shipped, "give a study file (docs/studies.md)")) from None
        tree = parse_toml(text, str(path))
        tree.setdefault("name", path.stem)
        return cls.from_dict(tree, path.parent)

    def with_paths(self, change: Callable[[str], str]) -> "Study":
        """The same with every path to a file as `change` makes it."""
        scenario = self.scenario
        if isinstance(scenario, dict):
            scenario = with_paths(copy.deepcopy(scenario), change)
        elif scenario.endswith(".toml"):
            scenario = change(scenario)

        def axes(given: dict[str, Axis]) -> dict[str, Axis]:
            return {name: [with_paths_of(name, value, change) for value in axis] if isinstance(axis, list) else axis
                    for name, axis in given.items()}

        sample = self.sample and msgspec.structs.replace(self.sample, axes=axes(self.sample.axes))
        return msgspec.structs.replace(self, scenario=scenario, axes=axes(self.axes), zip=[axes(z) for z in self.zip],
                                       sample=sample)

    def _check(self) -> None:
        if not (self.axes or self.zip or self.sample):
            raise InputError("axes", {}, "is empty", 'write e.g. [axes] "workload.rate_rps" = [1, 2, 4]')
        # A scenario that cannot be read is told of first.
        self.base_tree()
        seen: set[str] = set()
        groups = [self.axes, *self.zip, self.sample.axes if self.sample else {}, self.derived]
        for name in itertools.chain(*groups):
            if name in seen:
                raise InputError(f"axes.{name}", name, "is given twice", "name a field in one place only")
            seen.add(name)
            check_field(name, f"axes.{name}")
        for expression in [*self._derived().values(), *self._where()]:
            for name in expression.fields:
                if name not in seen:
                    check_field(name, f"axes.{name}")
        if self.num_points_at_most > MOST_POINTS:
            raise InputError("axes", f"{self.num_points_at_most:,} points", f"is more than {MOST_POINTS:,}",
                             "shorten an axis, or use [sample]")

    @property
    def num_points_at_most(self) -> int:
        """Points before `where`."""
        count = self.sample.num if self.sample else 1
        for name, axis in self.axes.items():
            count *= len(axis) if isinstance(axis, list) else axis.count(name)
        for index, axes in enumerate(self.zip):
            count *= len(design.zipped(axes, f"zip[{index}]"))
        return count

    def base_tree(self) -> dict[str, Any]:
        """Fields of the scenario that all start from."""
        tree = copy.deepcopy(self.scenario) if isinstance(self.scenario, dict) else read_tree(self.scenario)
        tree.setdefault("schema_version", 1)
        if self.num_seeds is not None:
            tree["num_seeds"] = self.num_seeds
        return builtins_of(tree, "")

    def _derived(self) -> dict[str, Expression]:
        return {name: Expression(text, f"derived.{name}") for name, text in self.derived.items()}

    def _where(self) -> list[Expression]:
        return [Expression(text, f"where[{index}]") for index, text in enumerate(self.where)]

    def points(self) -> Iterator[Point]:
        """Every point of the study, in order. Raises `InputError`."""
        parts = [list(design.grid(self.axes))]
        parts += [design.zipped(axes, f"zip[{index}]") for index, axes in enumerate(self.zip)]
        if self.sample is not None:
            parts.append(self.sample.points())
        base, derived, where = self.base_tree(), self._derived(), self._where()
        for combined in itertools.product(*parts):
            point: Point = {}
            for part in combined:
                point |= part

            def field(name: str, point: Point = point) -> Any:
                return point[name] if name in point else _look_up(base, name)

            for name, expression in derived.items():
                value = expression(field)
                # 8 / 2 is a whole number to a field that counts.
                point[name] = int(value) if isinstance(value, float) and value.is_integer() else value
            if all(expression(field) for expression in where):
                yield point

    def scenario_at(self, point: Point, base: dict[str, Any] | None = None) -> Scenario:
        """The scenario of a point; `base`: what `base_tree` gave, to be read once. Raises `InputError`."""
        tree = dict(self.base_tree() if base is None else base)
        if "cost" in tree:
            # Reading it may write into it.
            tree["cost"] = dict(tree["cost"])
        for dotted, value in point.items():
            *sections, last = dotted.split(".")
            node = tree
            for depth, key in enumerate(sections):
                key = index_in(node, key, sections[:depth + 1], value)
                # A shorthand (`input = 512`) gives way to a table.
                inner = node.get(key) if isinstance(node, dict) else node[key]
                node[key] = copy.copy(inner) if isinstance(inner, (dict, list)) else {}
                node = node[key]
            node[index_in(node, last, [*sections, last], value)] = builtins_of(value, dotted)
        return Scenario.from_builtins(tree)

    def to_dict(self) -> dict[str, Any]:
        """Nested dictionaries without defaults; `from_dict` gives the study back."""
        return msgspec.to_builtins(self)


def shipped_studies() -> dict[str, Any]:
    """Study files that come with the package, by name."""
    folder = resources.files("jaxsim.scenarios").joinpath("studies")
    return {f.name.removesuffix(".toml"): f for f in sorted(folder.iterdir(), key=lambda f: f.name)
            if f.name.endswith(".toml")}


def _lists(node: Any) -> Any:
    """NumPy arrays, ranges and tuples as lists."""
    if hasattr(node, "tolist"):
        return node.tolist()
    if isinstance(node, (range, tuple)):
        return list(node)
    if isinstance(node, Mapping):
        return {key: _lists(value) for key, value in node.items()}
    return [_lists(value) for value in node] if isinstance(node, list) else node


def check_field(name: str, where: str) -> None:
    """Raises `InputError` for a field that no scenario has; where: it is named."""
    known = sorted(_fields(Scenario))
    head = name.split(".")
    # All tables of a list have the fields of the first.
    alike = ".".join("0" if key.isdecimal() else key for key in head)
    if alike in known or any(alike.startswith(f"{k}.") for k in _OPEN):
        return
    if any(k.startswith(alike + ".") for k in known):
        return
    raise InputError(where, name, "is no field of a scenario",
                     suggest(name, known, f"see docs/studies.md; fields of {head[0]}"))


_OPEN = ("cost.overrides", "cluster.router_weights", "workload.input", "workload.output", "device.numbers",
         "model.dimensions", "cost.prefill", "cost.decode", "cost.mixed", "cluster.pools.0.engine",
         "cluster.transfer.router_weights", "workload.sessions.turns", "workload.sessions.think_s",
         "workload.sessions.new_tokens")
"""Fields that hold others whose names are not fixed, or differ by kind."""


def _fields(struct: Any, prefix: str = "") -> Iterator[str]:
    """Dotted names of all fields of a struct."""
    for field in msgspec.structs.fields(struct):
        name = prefix + field.encode_name
        yield name
        inside = name + (".0." if typing.get_origin(field.type) is tuple else ".")
        for option in (field.type, *getattr(field.type, "__args__", ())):
            if isinstance(option, type) and issubclass(option, msgspec.Struct):
                yield from _fields(option, inside)


def _look_up(tree: dict[str, Any], dotted: str) -> Any:
    node: Any = tree
    for key in dotted.split("."):
        node = node.get(key) if isinstance(node, dict) else None
    if node is not None:
        return node
    found = _default(Scenario, dotted.split("."))
    if found is None:
        raise InputError(dotted, None, "has no value before the preset gives it one",
                         "give it in the scenario, or as an axis")
    return found


def _default(struct: Any, keys: list[str]) -> Any:
    for field in msgspec.structs.fields(struct):
        if field.encode_name != keys[0]:
            continue
        if len(keys) == 1:
            return None if field.default is msgspec.NODEFAULT else field.default
        for option in (field.type, *getattr(field.type, "__args__", ())):
            if isinstance(option, type) and issubclass(option, msgspec.Struct):
                found = _default(option, keys[1:])
                if found is not None:
                    return found
    return None
