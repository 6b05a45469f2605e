"""Axes of a study: lists, ranges, and designs that fill a box, combined into points."""

import itertools
import math
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
from msgspec import Meta

from jaxsim._core.errors import InputError

Point = dict[str, Any]
"""Fields of a scenario by dotted name, and the values they take."""


class Range(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, rename={"from_": "from"}):
    """Values from one end to the other, both included.

        from: the first. to: the last.
        num: how many; not in a sampled design, which has its own number.
        scale: equal steps, or equal ratios.
        whole: rounded to whole numbers, each once.
    """

    from_: float
    to: float
    num: Annotated[int, Meta(ge=1, le=1_000_000)] | None = None
    scale: Literal["linear", "log"] = "linear"
    whole: bool = False

    def checked(self, name: str) -> "Range":
        """Itself. Raises `InputError`."""
        if not (math.isfinite(self.from_) and math.isfinite(self.to)):
            raise InputError(f"axes.{name}", [self.from_, self.to], "has an end that is not finite", "give numbers")
        if self.scale == "log" and not min(self.from_, self.to) > 0:
            raise InputError(f"axes.{name}", [self.from_, self.to], "has no logarithm", "use positive ends, or linear")
        return self

    def at(self, share: np.ndarray) -> list[float | int]:
        """Values at shares of the way, 0 to 1."""
        if self.scale == "log":
            values = self.from_ * (self.to / self.from_) ** share
        else:
            values = self.from_ + (self.to - self.from_) * share
        # Ends are exact, steps without the dust of binary fractions.
        values = np.where(share == 0, self.from_, np.where(share == 1, self.to, values))
        if self.whole:
            return [int(v) for v in np.rint(values)]
        return [float(f"{v:.12g}") for v in values]

    def count(self, name: str) -> int:
        """How many values there are, without making them; rounded ones may be fewer. Raises `InputError`."""
        if self.num is None:
            raise InputError(f"axes.{name}.num", None, "is missing", "give how many values the range has")
        self.checked(name)
        return min(self.num, int(abs(self.to - self.from_)) + 2) if self.whole else self.num

    def values(self, name: str) -> list[float | int]:
        """All of them. Raises `InputError`."""
        self.count(name)
        found = self.at(np.linspace(0, 1, self.num) if self.num > 1 else np.zeros(1))
        return list(dict.fromkeys(found))


Axis = Range | list[Any]


class Sample(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Points spread over a box of ranges.

        method: independent uniform draws, or a scrambled Sobol sequence, which fills the box evenly.
        num: how many points.
        seed: of the draws.
        axes: ranges and lists, by field.
    """

    num: Annotated[int, Meta(ge=1, le=10_000_000)]
    axes: dict[str, Axis]
    method: Literal["random", "sobol"] = "sobol"
    seed: int = 0

    def points(self) -> list[Point]:
        """The design. Raises `InputError`."""
        if not self.axes:
            raise InputError("sample.axes", {}, "is empty", "give at least one range")
        names = list(self.axes)
        if self.method == "sobol":
            # Here, as no other study pays for loading it.
            from scipy.stats import qmc

            sampler = qmc.Sobol(len(names), scramble=True, rng=self.seed)
            # In whole powers of two, of which the first are as even.
            shares = sampler.random_base2(max(self.num - 1, 0).bit_length())[:self.num]
        else:
            shares = np.random.default_rng(self.seed).random((self.num, len(names)))
        columns = []
        for index, (name, axis) in enumerate(self.axes.items()):
            if isinstance(axis, list):
                _not_empty(name, axis)
                columns.append([axis[int(s * len(axis))] for s in shares[:, index]])
            else:
                columns.append(axis.checked(name).at(shares[:, index]))
        return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]


def grid(axes: dict[str, Axis]) -> Iterator[Point]:
    """All combinations, the last axis fastest. Raises `InputError`."""
    columns = [_values(name, axis) for name, axis in axes.items()]
    for row in itertools.product(*columns):
        yield dict(zip(axes, row, strict=True))


def zipped(axes: dict[str, Axis], where: str) -> list[Point]:
    """Axes that advance together. Raises `InputError`."""
    columns = {name: _values(name, axis) for name, axis in axes.items()}
    lengths = {name: len(values) for name, values in columns.items()}
    if not columns:
        raise InputError(where, {}, "is empty", "give at least two axes")
    if len(set(lengths.values())) > 1:
        raise InputError(where, lengths, "has axes of different lengths", "give each as many values")
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _values(name: str, axis: Axis) -> list[Any]:
    values = axis.values(name) if isinstance(axis, Range) else axis
    return _not_empty(name, values)


def _not_empty(name: str, values: list[Any]) -> list[Any]:
    if not values:
        raise InputError(f"axes.{name}", [], "is empty", "give at least one value")
    return values
