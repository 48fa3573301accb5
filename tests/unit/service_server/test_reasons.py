"""Every error that a caller may see has a reason of the catalogue, and the catalogue has no reason that nobody gives."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from tools.paths import ROOT
from virtfleet_service import errors

KEPT = {"RATE_LIMITED"}
"""Part of the API, and given by no server yet: its entry in the catalogue says so."""


def made() -> Iterator[tuple[str, str]]:
    """Yield (where, name of a class) for each call of something in the sources of servers."""
    for folder in ("services", "gateway"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call):
                    function = node.func
                    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
                    yield f"{path.relative_to(ROOT)}:{node.lineno}", name


def test_nobody_raises_an_error_without_a_reason_of_its_own() -> None:
    leaves = {of.__name__ for of in errors.BY_REASON.values()}
    branches = {
        name for name, of in vars(errors).items() if isinstance(of, type) and issubclass(of, errors.VirtfleetError)
    } - leaves
    assert not [f"{where}: {name}" for where, name in made() if name in branches]


def test_every_reason_is_given_by_somebody() -> None:
    names = {name for _, name in made()}
    unused = {reason for reason, of in errors.BY_REASON.items() if of.__name__ not in names}
    assert unused == KEPT
