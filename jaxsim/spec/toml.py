"""TOML text in and out: malformed text is told with its line, and nested dictionaries can be written."""

import json
import re
import tomllib
from typing import Any

from jaxsim._core.errors import InputError


def parse_toml(text: str, where: str) -> dict[str, Any]:
    """TOML text to dictionaries; malformed text is an `InputError` with its line. A byte order mark is no text."""
    text = text.removeprefix("\ufeff")
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        problem = str(error)
        found = re.search(r"line (\d+)", problem)
        lines = text.splitlines()
        number = int(found.group(1)) if found else len(lines)
        shown = lines[number - 1].strip() if 0 < number <= len(lines) else ""
        raise InputError(f"{where}, line {number}", shown, f"malformed TOML: {problem}",
                         "correct that line") from None


def parse_value(text: str) -> Any:
    """A value as TOML writes it (64, 0.5, true, "a", [1, 2], {a = 1}); anything else is a bare string."""
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    return parsed["value"] if parsed.keys() == {"value"} else text


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, str):
        # A JSON string is a TOML basic string, except that TOML wants DEL escaped too.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_toml_key(k)} = {_toml_value(v)}" for k, v in value.items()) + "}"
    return "[" + ", ".join(map(_toml_value, value)) + "]"


def _toml_key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else _toml_value(key)


def dump_toml(tree: dict[str, Any], prefix: str = "") -> str:
    """Nested dictionaries of numbers, strings, booleans, lists and tables as TOML text."""
    plain = {k: v for k, v in tree.items() if not isinstance(v, dict)}
    lines = [f"{_toml_key(k)} = {_toml_value(v)}" for k, v in plain.items()]
    blocks = ["\n".join(lines) + "\n"] if lines else []
    for key, table in tree.items():
        if isinstance(table, dict):
            dotted = f"{prefix}{_toml_key(key)}"
            inner = dump_toml(table, f"{dotted}.")
            has_own = any(not isinstance(v, dict) for v in table.values())
            blocks.append((f"[{dotted}]\n" if has_own or not table else "") + inner)
    return "\n".join(blocks)
