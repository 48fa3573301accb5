"""The set-up asks for what is needed: a fleet for less than its tests, and a Java that is new enough."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools import system


def packages(*, tests: bool) -> set[str]:
    return {need.package for need in system.needs(tests=tests)}


def test_a_fleet_needs_neither_compilers_nor_maven() -> None:
    only_tests = packages(tests=True) - packages(tests=False)
    assert only_tests >= {"gcc", "libc6-dev", "systemd", "default-jdk-headless", "maven"}
    assert packages(tests=False) < packages(tests=True)
    assert "dnsmasq-base" in packages(tests=False)


@pytest.mark.parametrize(
    ("said", "release"),
    [("javac 17.0.15", 17), ("javac 21", 21), ("javac 1.8.0_402", 8), ("javac 25-ea", 25), ("something else", 0)],
)
def test_the_release_of_java_is_read(said: str, release: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = tmp_path / "bin" / "javac"
    compiler.parent.mkdir()
    compiler.write_text(f"#!/bin/sh\necho '{said}'\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("JAVA_HOME", str(tmp_path))
    assert system.java_release() == release
    assert system.Need("jdk", java=system.OLDEST_JAVA).present() == (release >= system.OLDEST_JAVA)


def test_a_java_home_without_a_compiler_is_no_java(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAVA_HOME", str(tmp_path))
    assert system.java_release() == 0


def test_programs_and_files_are_looked_for() -> None:
    assert system.Need("x", program="sh").present()
    assert not system.Need("x", program="no-such-program").present()
    assert not system.Need("x", program="sh", files="no/such/file").present()
