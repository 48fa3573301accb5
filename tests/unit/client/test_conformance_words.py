"""The file of the conformance cases is refused, with the place, where it says what no runner knows."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.clients.conformance.interpreter import Run
from tests.clients.conformance.words import WORDS, CasesError, read
from tools.paths import ROOT

CASE = """
cases:
  - name: one
    proves: Something.
    worlds: [fake]
    steps:
      - given: web
        node: n1
"""


def test_the_cases_are_read() -> None:
    cases = read(ROOT / "tests/clients/cases.yaml")
    assert {"fake", "real"} == {world for case in cases for world in case.worlds}
    assert all(case.proves.endswith(".") for case in cases)


def test_every_word_is_a_step_that_the_runner_has_and_that_a_case_uses() -> None:
    used = {next(iter(step)) for case in read(ROOT / "tests/clients/cases.yaml") for step in case.steps}
    assert used == set(WORDS)
    assert not [word for word in WORDS if not hasattr(Run, f"_{word}")]


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("given: web", "gives: web", "one: step 1: unknown word `gives`; the words: "),
        ("node: n1", "note: n1", "one: step 1: `given` has no field note; it has node, power_button_delay_s, running"),
        ("[fake]", "[moon]", "one: `worlds` is a list of fake, real"),
        ("proves", "shows", "one: without ['proves'], unknown ['shows']"),
        ("given: web", "compact_logs: n1", "has no field node; it has none"),
        (
            "[fake]\n    steps:",
            "[real]\n    steps:\n      - compact_logs: n1",
            "`compact_logs` can only be done on a fake fleet",
        ),
        ("[fake]", "[real]\n    nodes: 3", "the real fleet has two nodes"),
        ("      - given: web\n        node: n1\n", "      - web\n", "one: step 1: 'web' is no step"),
        ("cases:", "case:", "one key `cases` with a list is expected"),
    ],
)
def test_what_no_runner_knows_is_refused(old: str, new: str, says: str, tmp_path: Path) -> None:
    file = tmp_path / "cases.yaml"
    file.write_text(CASE.replace(old, new, 1))
    with pytest.raises(CasesError) as told:
        read(file)
    assert says in str(told.value)


def test_a_name_stands_once(tmp_path: Path) -> None:
    file = tmp_path / "cases.yaml"
    file.write_text(CASE + CASE.partition("cases:\n")[2])
    with pytest.raises(CasesError, match="one: the name is there twice"):
        read(file)
