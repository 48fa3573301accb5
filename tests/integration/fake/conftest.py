"""A fake fleet for the tests of a module, and the `virtfleet` command led to it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.fake.fleet import Fake, Outcome, Virtfleet, running
from virtfleet_cli.app import root
from virtfleet_cli.failures import run


@pytest.fixture(scope="module")
def shared() -> Iterator[Fake]:
    with running("--nodes", "4", "--domains", "3") as fake:
        yield fake


@pytest.fixture
def fake(shared: Fake, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Fake]:
    for name, value in shared.variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("VIRTFLEET_COMMAND", str(Path(sys.executable).with_name("virtfleet")))
    monkeypatch.setenv("VIRTFLEET_CONTEXTS_FILE", str(tmp_path / "contexts.json"))
    yield shared
    shared.clear()


@pytest.fixture
def virtfleet(fake: Fake, capsys: pytest.CaptureFixture[str]) -> Virtfleet:
    del fake

    def call(*arguments: str) -> Outcome:
        code = run(root, list(arguments))
        said = capsys.readouterr()
        assert "Traceback" not in said.err
        return code, said.out, said.err

    return call
