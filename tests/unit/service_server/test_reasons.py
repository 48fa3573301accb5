"""Every error that a caller may see has a reason of the catalogue, and the catalogue has no reason that nobody gives."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from tools.paths import ROOT
from virtfleet_service import errors

KEPT = {"RATE_LIMITED"}
"""Part of the API, and given by no server yet: its entry in the catalogue says so."""


def calls(*folders: str) -> Iterator[tuple[str, str, ast.Call]]:
    """Yield (where, name of what is called, call) for each call in the sources of servers."""
    for folder in folders or ("services", "gateway"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call):
                    function = node.func
                    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
                    yield f"{path.relative_to(ROOT)}:{node.lineno}", name, node


def test_nobody_raises_an_error_without_a_reason_of_its_own() -> None:
    leaves = {of.__name__ for of in errors.BY_REASON.values()}
    branches = {
        name for name, of in vars(errors).items() if isinstance(of, type) and issubclass(of, errors.VirtfleetError)
    } - leaves
    assert not [f"{where}: {name}" for where, name, _ in calls() if name in branches]


def test_every_reason_is_given_by_somebody() -> None:
    names = {name for _, name, _ in calls()}
    unused = {reason for reason, of in errors.BY_REASON.items() if of.__name__ not in names}
    assert unused == KEPT


def test_the_variable_node_of_an_error_is_the_name_of_a_node() -> None:
    """Clients put it into their next request: `nodes/n1`, never `n1`."""
    leaves = {of.__name__ for of in errors.BY_REASON.values()}
    nodes = [
        (where, ast.unparse(keyword.value))
        for where, name, call in calls("services", "gateway", "fake")
        if name in leaves
        for keyword in call.keywords
        if keyword.arg == "node"
    ]
    assert nodes
    names = ("f'nodes/", "name", "node.name", "self._node_name")
    assert not [
        f"{where}: {value}" for where, value in nodes if not value.startswith(names[0]) and value not in names[1:]
    ]
