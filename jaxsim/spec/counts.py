"""Counts of a model: their limits, and what is refused as none."""

import numbers
from typing import Annotated, Any

from msgspec import Meta

from jaxsim._core.errors import InputError

MOST = 1 << 31
MOST_LAYERS = 10_000

Count = Annotated[int, Meta(ge=1, le=MOST)]
CountOrNone = Annotated[int, Meta(ge=0, le=MOST)]


def check_count(field: str, value: Any, low: int, high: int) -> None:
    """Refuse what is no whole number between the two. Raises `InputError`."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or not low <= value <= high:
        raise InputError(field, value, "is no count that a model can have",
                         f"give a whole number >= {low} and <= {high}")
