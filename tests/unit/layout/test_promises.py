"""The list of promises is well formed and names tests that exist; its checker sees what is broken."""

from __future__ import annotations

import ast

import pytest

from tools import promises
from tools.paths import ROOT

HELD = promises.Promise("a", "holds", ("tests/x/test_a.py::test_one",))


def test_every_promise_names_tests_that_exist() -> None:
    missing = []
    for promise in promises.load():
        for test in promise.tests:
            name, _, function = test.partition("::")
            path = ROOT / name
            if not path.exists():
                missing.append(test)
            elif function:
                names = {
                    node.name
                    for node in ast.walk(ast.parse(path.read_text()))
                    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
                }
                if function.partition("[")[0].rpartition("::")[2] not in names:
                    missing.append(test)
    assert not missing


@pytest.mark.parametrize(
    "outcomes",
    [
        {},
        {"tests/x/test_a.py::test_one": "failed"},
        {"tests/x/test_a.py::test_one[a]": "passed", "tests/x/test_a.py::test_one[b]": "failed"},
        {"tests/x/test_a.py::test_one_more": "passed"},
    ],
)
def test_a_promise_without_a_passed_test_is_broken(outcomes: dict[str, str]) -> None:
    assert len(promises.broken([HELD], outcomes)) == 1


@pytest.mark.parametrize("named", ["tests/x/test_a.py::test_one", "tests/x/test_a.py", "tests/x", "tests/x/"])
def test_a_promise_is_held_by_a_test_a_file_or_a_folder(named: str) -> None:
    promise = promises.Promise("a", "holds", (named,))
    assert not promises.broken([promise], {"tests/x/test_a.py::test_one[1]": "passed"})


@pytest.mark.parametrize(
    "content",
    [
        '[[promise]]\nsource = "a"\ntext = "b"',
        '[[promise]]\nsource = "a"\ntext = "b"\ntests = []',
        '[[promise]]\nsource = "a"\ntext = "b"\ntests = ["elsewhere.py"]',
        '[[promise]]\nsource = "a"\ntext = "b"\ntests = ["tests/x"]\nmore = 1',
        '[[promise]]\nsource = "a"\ntext = "b"\ntests = ["tests/x"]\n' * 2,
    ],
)
def test_a_malformed_promise_is_refused(content: str) -> None:
    with pytest.raises(promises.PromiseFileError):
        promises.parse(content)
