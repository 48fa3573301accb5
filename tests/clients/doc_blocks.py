"""Finds the code in documentation pages, fenced or indented, and runs shell blocks as they are written."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt

from tools.paths import ROOT

FREE = ("mermaid", "text")
"""What is no code: diagrams, and text of a fixed width (a listing, an answer)."""

_MARK = re.compile(r"<!-- (?P<mark>not run|run by): (?P<why>.+?) -->\s*", re.DOTALL)
_COMMAND = re.compile(
    r"^\s*(?:[$#] )?(?:sudo )?(?:apt-get|cd|curl|echo|export|git|go|grpcurl|make|mkdir|mvn|pip|python3?|systemctl|uv|virtfleet"
    r"|virtfleet-\w+)(?=\s+[\w./-])"
)


@dataclass(frozen=True, slots=True)
class Block:
    """Is one block of code.

    Attributes:
        language: What stands behind the fence; `indented` where there is none.
        text: What is in it.
        mark: `not run`, `run by`, or nothing.
        why: The reason, or the test that runs it.
        line: Where it begins.
        section: The heading above it.
    """

    language: str
    text: str
    mark: str
    why: str
    line: int
    section: str


def blocks_of(content: str) -> list[Block]:
    """Return all code of a page that stands in blocks of its own, wherever it is: in lists and quotations too."""
    found = []
    section, mark, why = "", "", ""
    tokens = MarkdownIt("commonmark").parse(content)
    for number, token in enumerate(tokens):
        if token.type == "heading_open":
            section = tokens[number + 1].content
        if token.type in ("fence", "code_block"):
            language = token.info.strip() if token.type == "fence" else "indented"
            line = token.map[0] + 1 if token.map else 0
            found.append(Block(language, token.content, mark, why, line, section))
        comment = _MARK.fullmatch(token.content) if token.type == "html_block" else None
        mark, why = (comment["mark"], " ".join(comment["why"].split())) if comment else ("", "")
    return found


def blocks(page: Path) -> list[Block]:
    """Return all code of a page that stands in blocks of its own."""
    return blocks_of(page.read_text())


def inline_code(page: Path) -> list[tuple[int, str]]:
    """Return what stands in code type within sentences and tables, with the line of its paragraph."""
    return [
        (token.map[0] + 1 if token.map else 0, child.content.replace("\\|", "|"))
        for token in MarkdownIt("commonmark").enable("table").parse(page.read_text())
        for child in token.children or ()
        if child.type == "code_inline"
    ]


def is_silent(block: Block, *, runs: bool) -> bool:
    """Tell whether a block is neither run nor says why it is not.

    Args:
        block: The block.
        runs: Whether the shell blocks of its page are run as they stand.
    """
    if block.language in ("", "indented"):
        return True
    if block.language in FREE:
        # Text is no way out: a command is a command.
        return block.language == "text" and any(_COMMAND.match(line) for line in block.text.splitlines())
    return not block.mark and not (runs and block.language == "sh")


def environment(folder: Path, variables: dict[str, str]) -> dict[str, str]:
    """Return the environment of a reader: our programs on the path, contexts and nothing else in a folder of its own."""
    paths = os.pathsep.join((str(ROOT / ".venv/bin"), str(ROOT / "build/bin"), os.environ["PATH"]))
    own = {"PATH": paths, "VIRTFLEET_CONTEXTS_FILE": str(folder / "contexts.json")}
    return {**os.environ, **own, **variables}


def run_blocks(name: str, texts: Iterable[str], folder: Path, variables: dict[str, str], seconds: float = 150) -> str:
    """Run shell blocks one after the other in one shell; returns what they wrote.

    The script is a file and its standard input is empty: a command that reads it takes no line of the script.

    Raises:
        AssertionError: A line failed.
    """
    script = folder / f"{name}.sh"
    script.write_text("\n".join(texts))
    done = subprocess.run(
        ["bash", "-euo", "pipefail", str(script)],
        cwd=folder,
        env=environment(folder, variables),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )
    assert done.returncode == 0, f"{name}: {done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout + done.stderr


def run(page: Path, folder: Path, variables: dict[str, str]) -> str:
    """Run all unmarked shell blocks of a page; returns what they wrote.

    Raises:
        AssertionError: A line failed.
    """
    texts = [block.text for block in blocks(page) if block.language == "sh" and not block.mark]
    return run_blocks(page.stem, texts, folder, variables)


@contextmanager
def line_running(
    script: str, environment: dict[str, str], folder: Path, output: Path
) -> Iterator[subprocess.Popen[bytes]]:
    """Run lines of a page that do not end by themselves, and interrupt them as Ctrl-C does, with all below them."""
    with output.open("wb") as sink:
        process = subprocess.Popen(
            ["bash", "-euc", script], cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=sink, stderr=sink,
            start_new_session=True,
        )  # fmt: skip
    try:
        yield process
    finally:
        os.killpg(process.pid, signal.SIGINT)
        try:
            process.wait(30)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
