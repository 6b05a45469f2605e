"""Checked records from plain trees, safely from several threads."""

import threading
from typing import Any, TypeVar

import msgspec

T = TypeVar("T")

_ONE_AT_A_TIME = threading.RLock()
"""msgspec (0.22) makes what it knows of a type at the first use of it, and shows it to other threads half made: these
read through a null pointer. A record may convert others in its own checks, so the lock is taken again by its holder."""


def converted(tree: Any, struct: type[T]) -> T:
    """`msgspec.convert`. Raises `msgspec.ValidationError`."""
    with _ONE_AT_A_TIME:
        return msgspec.convert(tree, struct)
