"""What lies where, and what no committed file may say."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from tests.unit.layout import tree
from tools.paths import IMPORT_ROOTS, ROOT

ROOT_FILES = {
    "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "LICENSE", "Makefile", "pyproject.toml", ".gitignore",
}  # fmt: skip
ROOT_FOLDERS = {
    ".ci", "bench", "clients", "deploy", "docs", "fake", "gateway", "protos", "requirements", "services", "tests", "tools",
}  # fmt: skip
TARGETS = {
    "help", "demo", "up", "test", "check", "protos", "lint", "type", "unit", "contract", "integration", "fleet", "clients",
    "chaos", "bench", "stubs", "docs", "wheels", "where", "clean", "nightly", "env", "system",
}  # fmt: skip
# Written in pieces, so that this file does not find itself.
MACHINE_PATHS = re.compile(
    "|".join([r"/wo" + r"rk/(main|shared)", r"/ro" + r"ot/(?!\w*\.ssh)", r"/ho" + r"me/[a-z]+/", r"\.py" + "env"])
)
LARGEST_FILE_BYTES = 1 << 20


def project(folder: Path) -> dict[str, object]:
    loaded: dict[str, object] = tomllib.loads((folder / "pyproject.toml").read_text())
    return loaded


def test_the_root_holds_configuration_and_documents_only() -> None:
    found_files = {str(path) for path in tree.files() if len(path.parts) == 1}
    found_folders = {path.parts[0] for path in tree.files() if len(path.parts) > 1}
    assert not found_files - ROOT_FILES
    assert not found_folders - ROOT_FOLDERS
    assert not ROOT_FILES - found_files


def test_no_file_names_a_machine_or_its_people() -> None:
    assert not [str(path) for path in tree.files() if MACHINE_PATHS.search(tree.text(path))]


def test_no_file_is_large() -> None:
    # Stores of older releases and the like stay small; images are made on the spot.
    assert not [str(path) for path in tree.files() if (ROOT / path).stat().st_size > LARGEST_FILE_BYTES]


def test_locks_are_whole_and_name_no_address() -> None:
    for lock in sorted((ROOT / "requirements").glob("*.txt")):
        lines = [line for line in lock.read_text().splitlines() if not line.strip().startswith("#")]
        assert not [line for line in lines if "://" in line or line.startswith("--index")]
        pins = [line for line in lines if line and not line.startswith(" ")]
        assert pins
        assert not [line for line in pins if "==" not in line or not line.endswith("\\")]


@pytest.mark.parametrize("root", [root for root in IMPORT_ROOTS if (ROOT / root).is_dir()])
def test_every_import_root_is_a_distribution(root: str) -> None:
    folder = ROOT / root
    while not (folder / "pyproject.toml").exists():
        assert folder != ROOT, f"{root} has no pyproject.toml"
        folder = folder.parent
    assert folder != ROOT, f"{root} has no pyproject.toml of its own"
    content = project(folder)["project"]
    assert isinstance(content, dict)
    assert content["license"] == "Apache-2.0"
    assert content["requires-python"] == ">=3.11"


def test_import_rules_cover_every_package() -> None:
    content = tomllib.loads((ROOT / "pyproject.toml").read_text())
    covered = set(content["tool"]["importlinter"]["root_packages"])
    packages = {
        path.parent.name
        for root in IMPORT_ROOTS
        if "/gen/" not in root
        for path in (ROOT / root).glob("virtfleet_*/__init__.py")
    }
    assert not packages - covered


def test_every_target_of_make_explains_itself() -> None:
    lines = (ROOT / "Makefile").read_text()
    explained = set(re.findall(r"^([a-z-]+):[^\n#]*## \S", lines, flags=re.MULTILINE))
    declared = re.search(r"^\.PHONY:((?:[^\n]*\\\n)*[^\n]*)", lines, flags=re.MULTILINE)
    assert declared
    assert set(declared[1].replace("\\", " ").split()) == explained
    assert explained >= TARGETS


def test_decisions_are_numbered_without_gaps() -> None:
    numbers = sorted(int(path.name[:4]) for path in (ROOT / "docs/adr").glob("[0-9]*.md"))
    assert numbers == list(range(1, len(numbers) + 1))
    for path in (ROOT / "docs/adr").glob("[0-9]*.md"):
        content = path.read_text()
        assert re.match(rf"# {path.name[:4]} \S", content), path.name
        assert [part for part in ("## Context", "## Decision", "## Consequences") if part not in content] == []
        assert len(content.splitlines()) <= 60, path.name
