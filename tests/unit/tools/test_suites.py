"""Suites run side by side; what failed is looked at once more, alone; budgets keep all of it below its limit."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tools import suites
from tools.paths import ROOT

PASSES = "def test_it() -> None:\n    pass\n"
FAILS_ONCE = """
from pathlib import Path

def test_it() -> None:
    mark = Path(__file__).with_suffix(".seen")
    if not mark.exists():
        mark.touch()
        raise AssertionError("the first time")
"""
FAILS = "def test_it() -> None:\n    raise AssertionError('always')\n"


def named() -> list[str]:
    found = re.search(r"^SUITES := (.*)$", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert found
    return found[1].split()


def test_every_suite_has_a_budget_and_all_together_keep_the_limit() -> None:
    assert {"check", *named()} == set(suites.BUDGET_SECONDS)
    planned = suites.BUDGET_SECONDS["check"] + suites.planned_seconds(named(), 2)
    assert planned <= suites.LIMIT_SECONDS


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for suite, content in {"good": PASSES, "shaky": FAILS_ONCE, "bad": FAILS}.items():
        (tmp_path / "tests" / suite).mkdir(parents=True)
        (tmp_path / "tests" / suite / f"test_{suite}.py").write_text(content)
    (tmp_path / "tests" / "conftest.py").write_bytes((ROOT / "tests" / "conftest.py").read_bytes())
    (tmp_path / "tests" / "none").mkdir()
    # The plugins of this repository are none of theirs, and slow to load.
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.setattr(suites, "ROOT", tmp_path)
    monkeypatch.setattr(suites, "RESULTS", tmp_path / "results")
    return tmp_path


@pytest.mark.usefixtures("tree")
def test_what_is_looked_at_once_fails_once() -> None:
    [outcome] = suites.run(["shaky"], 1, once=True)
    assert outcome.code == 1
    assert "second look" not in outcome.closing


@pytest.mark.usefixtures("tree")
def test_what_a_second_look_passes_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    outcomes = {one.suite: one for one in suites.run(["good", "shaky", "bad", "none"], 2)}
    assert [one.code for one in outcomes.values()] == [0, 0, 1, 5]
    assert "1 failed" in outcomes["shaky"].closing
    assert "at the second look 1 passed" in outcomes["shaky"].closing
    assert "tests/shaky/test_shaky.py::test_it" in outcomes["shaky"].closing
    assert outcomes["bad"].failed == ["tests/bad/test_bad.py::test_it"]
    said = capsys.readouterr().out
    assert said.index("--- good") >= 0
    assert "the first time" in said
