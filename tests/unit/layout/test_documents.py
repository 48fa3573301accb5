"""Documents lead somewhere: links, their anchors, and the paths that they name in code type."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.unit.layout import tree
from tools.paths import ROOT

DOCUMENTS = [path for path in tree.files() if path.suffix == ".md"]
LINK = re.compile(r"(?<!!)\[[^\]\n]*\]\((?P<target>[^)\s]+)\)")
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
# A path of this tree in code type: it begins with a folder of the root and is written out whole.
NAMED = re.compile(
    r"`(?P<path>(?:bench|clients|deploy|docs|gateway|protos|requirements|services|tests|tools)/[\w./-]+)`",
)
# What tools write and git does not keep.
MADE = {"bench/results.json"}


def anchors(text: str) -> set[str]:
    """Return the anchors of the headings of a document, as hosts of repositories make them."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", text), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def dead_links(document: Path, text: str) -> list[str]:
    """Return the links of a document that lead nowhere in this tree; others' addresses are not asked."""
    dead = []
    for found in LINK.finditer(FENCE.sub("", text)):
        target = found["target"]
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        goal = (ROOT / document).parent / path if path else ROOT / document
        if not goal.exists() or (anchor and anchor not in anchors(goal.read_text())):
            dead.append(f"{document}: {target}")
    return dead


@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_links_lead_somewhere(document: Path) -> None:
    assert not dead_links(document, tree.text(document))


@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_paths_in_documents_exist(document: Path) -> None:
    named = {found["path"].rstrip("/") for found in NAMED.finditer(tree.text(document))}
    assert not sorted(path for path in named - MADE if not (ROOT / path).exists())


def test_a_dead_link_and_a_dead_anchor_are_seen() -> None:
    document = Path("docs/adr/0001-one-pipeline-instead-of-interceptors.md")
    good = "[b](#decision) [d](https://example.test/x) [e](0002-sqlite-with-one-writer.md#context)"
    text = f"[a](../nowhere.md) {good} [c](#nothing)\n```\n[f](gone.md)\n```\n"
    assert dead_links(document, text) == [f"{document}: ../nowhere.md", f"{document}: #nothing"]
