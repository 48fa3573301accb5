"""Say where something is defined: `python -m tools.where NAME` looks in protos, Python and documents."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator

from tools.check import python_sources
from tools.paths import ROOT

_DEFINITIONS = {
    "*.proto": r"^\s*(?:message|enum|service|rpc|oneof)\s+{name}\b|^\s*(?:[\w.<>, ]+\s)?{name}\s*=\s*\d+",
    "*.py": r"^\s*(?:async def|def|class)\s+{name}\b|^{name}\b\s*[:=]",
}


def definitions(name: str) -> Iterator[str]:
    """Yield `path:line: text` for every definition, and the path of every file or folder of that name."""
    for folder in ("protos/virtfleet", *python_sources(), "docs", "deploy"):
        for path in sorted((ROOT / folder).rglob("*")):
            relative = path.relative_to(ROOT)
            if "__pycache__" in path.parts:
                continue
            if name in {path.stem, path.name}:
                yield str(relative)
            pattern = next((text for suffix, text in _DEFINITIONS.items() if path.match(suffix)), None)
            if pattern and path.is_file():
                expression = re.compile(pattern.replace("{name}", re.escape(name)))
                for number, line in enumerate(path.read_text().splitlines(), 1):
                    if expression.search(line):
                        yield f"{relative}:{number}: {line.strip()}"


def main() -> int:
    """Print all definitions of the name on the command line; returns the exit code."""
    if len(sys.argv) != 2 or not sys.argv[1]:
        print("usage: make where NAME=x", file=sys.stderr)
        return 2
    found = list(definitions(sys.argv[1]))
    print("\n".join(found) or f"nothing is called {sys.argv[1]}")
    return 0 if found else 1


if __name__ == "__main__":
    sys.exit(main())
