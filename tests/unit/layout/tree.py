"""The files of the repository, as git knows them: what is made by tools is no part of it."""

from __future__ import annotations

import ast
import functools
import subprocess
from pathlib import Path

from tools.paths import IMPORT_ROOTS, ROOT

PRODUCT_ROOTS = tuple(root for root in IMPORT_ROOTS if "/gen/" not in root)


@functools.cache
def files() -> tuple[Path, ...]:
    """Every file that is committed or would be, relative to the root."""
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return tuple(sorted(Path(name) for name in names.split("\0") if name and (ROOT / name).is_file()))


def generated(path: Path) -> bool:
    return path.is_relative_to("protos/gen")


@functools.cache
def modules() -> tuple[Path, ...]:
    """Python that people wrote."""
    return tuple(path for path in files() if path.suffix == ".py" and not generated(path))


@functools.cache
def product_modules() -> tuple[Path, ...]:
    """Python that is deployed."""
    return tuple(path for path in modules() if any(path.is_relative_to(root) for root in PRODUCT_ROOTS))


@functools.cache
def text(path: Path) -> str:
    return (ROOT / path).read_text(encoding="utf-8", errors="replace")


@functools.cache
def syntax(path: Path) -> ast.Module:
    return ast.parse(text(path), str(path))


def imported(path: Path) -> set[str]:
    """Full names of the modules and members that a module imports, wherever it does so."""
    found: set[str] = set()
    for node in ast.walk(syntax(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def called(path: Path) -> set[str]:
    """Dotted names of everything that a module calls."""
    return {ast.unparse(node.func) for node in ast.walk(syntax(path)) if isinstance(node, ast.Call)}
