"""Runs the shell blocks of documentation pages, as they are written."""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from tools.paths import ROOT

CHECKED = ("sh", "bash", "console", "python", "go", "java")
"""The languages of blocks that must be run, or say why they are not."""

_BLOCK = re.compile(
    r"(?:^<!-- (?P<mark>not run|run by): (?P<why>[^\n]+?) -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$",
    re.DOTALL | re.MULTILINE,
)


@dataclass(frozen=True, slots=True)
class Block:
    """Is one fenced block.

    Attributes:
        language: What stands behind the fence.
        text: What is in it.
        mark: `not run`, `run by`, or nothing.
        why: The reason, or the test that runs it.
        line: Where it begins.
    """

    language: str
    text: str
    mark: str
    why: str
    line: int


def blocks(page: Path) -> list[Block]:
    """Return the fenced blocks of a page."""
    content = page.read_text()
    return [
        Block(
            found["language"],
            found["text"],
            found["mark"] or "",
            found["why"] or "",
            content.count("\n", 0, found.start()) + 1,
        )
        for found in _BLOCK.finditer(content)
    ]


def run(page: Path, folder: Path, environment: dict[str, str]) -> str:
    """Run the shell blocks of a page one after the other in one shell; returns what they wrote.

    Raises:
        AssertionError: A line failed.
    """
    script = "\n".join(block.text for block in blocks(page) if block.language == "sh" and not block.mark)
    paths = os.pathsep.join((str(ROOT / ".venv/bin"), str(ROOT / "build/bin"), os.environ["PATH"]))
    done = subprocess.run(
        ["bash", "-euo", "pipefail"],
        input=script,
        cwd=folder,
        env={**os.environ, **environment, "PATH": paths, "VIRTFLEET_CONTEXTS_FILE": str(folder / "contexts.json")},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, f"{page.name}: {done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout + done.stderr
