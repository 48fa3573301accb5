"""Write settings as TOML; the standard library only reads it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path


def write(path: Path, table: Mapping[str, object]) -> None:
    """Write a table of strings, numbers, booleans, lists of them, and tables of the same.

    Raises:
        TypeError: A value is of another kind.
    """
    path.write_text("\n".join(_lines(table, "")) + "\n")


def _lines(table: Mapping[str, object], prefix: str) -> list[str]:
    lines, below = [], []
    for key, value in table.items():
        name = json.dumps(key)
        if isinstance(value, Mapping):
            below += ["", f"[{prefix}{name}]", *_lines(value, f"{prefix}{name}.")]
        else:
            lines.append(f"{name} = {_value(value)}")
    return lines + below


def _value(value: object) -> str:
    if isinstance(value, (str, bool, int, float)):
        # JSON and TOML write these alike.
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_value(item) for item in value)}]"
    raise TypeError(f"{value!r} cannot stand in settings")
