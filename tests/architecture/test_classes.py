"""Classes are abstract (never instantiated, name in Abstract) or final (never subclassed)."""

import abc
import importlib
import inspect
import re
from pathlib import Path

import pytest

import jaxsim
from tests.architecture.test_imports import modules

MESSAGE_BASES = {"Section", "_Section"}
"""Bases that only carry msgspec options, which cannot be given otherwise; nobody makes one."""


def classes(names) -> list[type]:
    """Classes that the named modules define."""
    found = []
    for name in names:
        module = importlib.import_module(name)
        found += [c for c in vars(module).values() if inspect.isclass(c) and c.__module__ == name]
    return found


def problems(found: list[type]) -> list[str]:
    """Subclasses of final classes, and abstract classes that do not say so."""
    wrong = []
    for cls in found:
        for base in cls.__bases__:
            is_ours = base.__module__.split(".")[0] == cls.__module__.split(".")[0]
            if is_ours and not base.__name__.startswith("Abstract") and base.__name__ not in MESSAGE_BASES:
                wrong.append(f"{cls.__module__}.{cls.__name__} subclasses {base.__name__}, which is final")
        is_abstract, says_so = inspect.isabstract(cls), cls.__name__.startswith("Abstract")
        if is_abstract and not says_so:
            wrong.append(f"{cls.__module__}.{cls.__name__} has abstract methods and no Abstract prefix")
        if says_so and not is_abstract:
            wrong.append(f"{cls.__module__}.{cls.__name__} has the Abstract prefix and no abstract method")
    return wrong


@pytest.fixture(scope="module")
def package_classes():
    return classes(name for name, _ in modules() if name != "jaxsim.__main__")


def test_classes_are_abstract_or_final(package_classes):
    assert len(package_classes) > 50
    assert problems(package_classes) == []


def test_every_slot_has_variants(package_classes):
    """An abstract class nobody fills is speculation."""
    for cls in package_classes:
        if inspect.isabstract(cls):
            assert [c for c in package_classes if cls in c.__mro__[1:]], f"nobody subclasses {cls.__name__}"


def test_broken_rules_are_found():
    class Final:
        pass

    class Deeper(Final):
        pass

    class Shape(abc.ABC):
        @abc.abstractmethod
        def area(self):
            """Square metres."""

    class AbstractNothing:
        pass

    assert problems([Final]) == []
    assert ["final" in p for p in problems([Deeper])] == [True]
    assert ["no Abstract prefix" in p for p in problems([Shape])] == [True]
    assert ["no abstract method" in p for p in problems([AbstractNothing])] == [True]


def test_records_are_converted_by_one_thread_at_a_time():
    """`jaxsim._core.records` says why."""
    package = Path(jaxsim.__file__).parent
    typed = re.compile(r"msgspec\.convert\(|from msgspec(\.\w+)? import (?!Meta)|Decoder\(\w*type|decode\([^)]*type=")
    calls = [file.relative_to(package).as_posix() for file in sorted(package.rglob("*.py"))
             if typed.search(file.read_text(encoding="utf-8"))]
    assert calls == ["_core/records.py"]
