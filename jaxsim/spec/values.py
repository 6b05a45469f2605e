"""What the values of one field may be, and what all sections have in common."""

from typing import Annotated, Any

import msgspec
from msgspec import Meta

Tokens = Annotated[int, Meta(ge=1, le=1 << 27)]
Level = Annotated[float, Meta(ge=0, le=1)]
Positive = Annotated[float, Meta(gt=0)]
NotNegative = Annotated[float, Meta(ge=0)]
Turns = Annotated[int, Meta(ge=1, le=1 << 16)]
Wait = Annotated[float, Meta(ge=0, le=1e9)]
Patience = Annotated[float, Meta(ge=1e-6, le=1e8)]
Images = Annotated[int, Meta(ge=0, le=1024)]


class Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """Common rules: immutable, unknown fields refused, defaults not written back."""


def plain(value: Any) -> Any:
    """A section as nested dictionaries; anything else as it is."""
    return msgspec.to_builtins(value) if hasattr(value, "__struct_fields__") else value


def every_section() -> list[type]:
    """The classes that are made of this one, of modules that were imported."""
    return Section.__subclasses__()
