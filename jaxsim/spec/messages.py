"""msgspec's validation messages in the reader's terms: field, value, allowed range or nearest names."""

import functools
import re
import types
import typing
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec

from jaxsim._core.errors import InputError, suggest
from jaxsim._core.records import converted

_SAME_AS = {
    "chunked_prefill": "enable_chunked_prefill", "order": "scheduling_policy", "policy": "scheduling_policy",
    "tp": "tensor_parallel_size", "tensor_parallel": "tensor_parallel_size", "pp": "pipeline_parallel_size",
    "num_blocks": "num_gpu_blocks_override", "rate": "rate_rps", "qps": "rate_rps",
    "request_rate": "rate_rps", "requests": "num_requests", "num_prompts": "num_requests",
    "num_replicas": "replicas", "burstiness": "cv", "max_tokens": "output_limit", "classes": "tenants",
    "ttft": "ttft_ms", "tpot": "tpot_ms", "e2e": "e2e_ms", "kv_cache_dtype": "kv_dtype", "seeds": "num_seeds",
    "mem_fraction_static": "gpu_memory_utilization", "free_gpu_memory_fraction": "gpu_memory_utilization",
    "kv_cache_free_gpu_mem_fraction": "gpu_memory_utilization",
}
"""What people write, and the field they mean."""


def explain(message: str, values: dict[str, Any], root: type) -> InputError:
    """An `InputError` from the text of a `msgspec.ValidationError` for `values` converted to `root`."""
    head, _, tail = message.partition(" - at `$")
    path = tail.rstrip("`").lstrip(".")
    is_key = path.endswith("[...]")
    path = path.removesuffix("[...]")
    steps = _steps(path)
    structs = _structs_at(root, steps, values)
    prefix = f"{path}." if path else ""
    quoted = re.search(r"`([^`]*)`", head)
    if "at `key` in `$" in message:
        at = message.rpartition("at `key` in `$")[2].rstrip("`").lstrip(".")
        keys = look_up(values, _steps(at))
        return InputError(f"a field of {at or 'the scenario'}", next((k for k in keys if not isinstance(k, str)), None),
                          "is not text", "write names of fields as text")
    if "unknown field" in head and quoted:
        name = quoted.group(1)
        fields = {f for s in structs for f in (*hints(s), s.__struct_config__.tag_field) if f}
        meant = _SAME_AS.get(name)
        remedy = f"did you mean {meant!r}?" if meant in fields else suggest(name, fields)
        return InputError(prefix + name, look_up(values, [*steps, name]), "no such field", remedy)
    if "missing required field" in head and quoted:
        name = quoted.group(1)
        words = [describe(hints(s)[name]) for s in structs if name in hints(s)]
        needed = words[0] if words else _tags(structs, name)
        return InputError(prefix + name, None, "missing", f"give {needed}")
    value = look_up(values, steps)
    parents = _structs_at(root, steps[:-1], values) if steps else []
    last = steps[-1] if steps else ""
    hint = next((hints(s)[last] for s in parents if last in hints(s)), None)
    if hint is None:
        tags = [str(s.__struct_config__.tag) for s in parents if s.__struct_config__.tag_field == last]
        if tags:
            return InputError(path, value, "no such choice", suggest(str(value), tags))
        # An element of a list or a table: its own type is in the message.
        problem = head.replace("`", "").replace("Expected ", "expected ")
        return InputError(path + ("[...]" if is_key else ""), value, problem, "correct it")
    choices = [str(c) for m in members(hint) if typing.get_origin(m) is Literal for c in typing.get_args(m)]
    if choices and isinstance(value, str):
        return InputError(path, value, "no such choice", suggest(value, choices))
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    is_out = is_number and any(sign in head for sign in "<>")
    return InputError(path, value, "out of range" if is_out else "cannot be used", f"use {describe(hint)}")


def convert_table(table: Any, struct: type, path: str, section: str, remedy: str) -> Any:
    """A table as a checked struct; what is wrong is told with the field's place under `path`.

    section: what the struct's own checks write in front of its fields.
    """
    if not isinstance(table, Mapping):
        raise InputError(path, table, "is not a table of fields", remedy)
    values = dict(table)
    try:
        return converted(values, struct)
    except msgspec.ValidationError as error:
        told = error.__cause__ if isinstance(error.__cause__, InputError) else explain(str(error), values, struct)
        field = f"{path}.{told.field.removeprefix(section + '.')}"
        raise InputError(field, told.value, told.problem, told.remedy or remedy) from None


def describe(hint: Any) -> str:
    """A type as a range in words: "a whole number >= 1 and <= 64", "one of a, b", "a table with kind"."""
    words = []
    for member in members(hint):
        meta = None
        if typing.get_origin(member) is Annotated:
            member, meta = typing.get_args(member)[:2]
        origin = typing.get_origin(member)
        if member is type(None):
            continue
        if origin is Literal:
            words.append("one of " + ", ".join(map(str, typing.get_args(member))))
        elif member is bool:
            words.append("true or false")
        elif member in (int, float):
            words.append(" ".join(["a whole number" if member is int else "a number", *_bounds(meta)]))
        elif member is str:
            words.append("text")
        elif origin is tuple:
            words.append("a list")
        elif origin is dict:
            words.append("a table of numbers")
        elif hasattr(member, "__struct_fields__"):
            config = member.__struct_config__
            needed = [f'{config.tag_field} = "{config.tag}"'] if config.tag else []
            needed += [field.encode_name for field in msgspec.structs.fields(member) if field.required]
            words.append("a table" + (f" with {', '.join(needed)}" if needed else ""))
    return " or ".join(dict.fromkeys(words))


def _bounds(meta: Any) -> list[str]:
    signs = (("ge", ">="), ("gt", ">"), ("le", "<="), ("lt", "<"))
    given = [f"{sign} {getattr(meta, name)}" for name, sign in signs if getattr(meta, name, None) is not None]
    return [" and ".join(given)] if given else []


def members(hint: Any) -> tuple[Any, ...]:
    """The alternatives of a union, flat; any other type alone."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return tuple(m for h in typing.get_args(hint) for m in members(h))
    return (hint,)


@functools.cache
def hints(struct: type) -> dict[str, Any]:
    """Field types of a section, with their ranges, by the names that files have."""
    types_of = typing.get_type_hints(struct, include_extras=True)
    return {name: types_of[field] for name, field in zip(struct.__struct_encode_fields__, struct.__struct_fields__,
                                                         strict=True)}


def look_up(tree: Any, steps: list[str | int]) -> Any:
    """What lies at a path; None where nothing does."""
    for step in steps:
        try:
            tree = tree[step]
        except (KeyError, IndexError, TypeError):
            return None
    return tree


def _steps(path: str) -> list[str | int]:
    return [int(index) if index else name for name, index in re.findall(r"\.?([^.\[\]]+)|\[(\d+)\]", path)]


def _structs_at(root: type, steps: list[str | int], values: Any) -> list[type]:
    """The section classes that may stand at a path: one, or several where no tag decides."""
    candidates: list[Any] = [root]
    for step in steps:
        following = []
        for candidate in candidates:
            if isinstance(step, int):
                following += members(next(iter(typing.get_args(candidate)), None))
            elif step in getattr(candidate, "__struct_encode_fields__", ()):
                following += members(hints(candidate)[step])
        candidates = following
    node = look_up(values, steps)
    structs = [c for c in candidates if hasattr(c, "__struct_fields__")]
    tagged = [s for s in structs if isinstance(node, dict) and s.__struct_config__.tag is not None
              and node.get(s.__struct_config__.tag_field) == s.__struct_config__.tag]
    return tagged or structs


def _tags(structs: list[type], name: str) -> str:
    tags = [str(s.__struct_config__.tag) for s in structs if s.__struct_config__.tag_field == name]
    return "one of " + ", ".join(tags)
