"""Every block of the documentation is run as written, or says why it is not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.clients import doc_blocks
from tests.integration.fake.fleet import Fake, running
from tools import grpcurl
from tools.paths import ROOT

RUN = ("quickstart", "command", "python", "grpcurl")
"""The pages whose shell blocks run against a fleet of two nodes."""

PAGES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md", *sorted((ROOT / "clients").glob("**/README.md"))]


@pytest.fixture(scope="module")
def fake() -> Iterator[Fake]:
    grpcurl.build()
    with running("--nodes", "2", "--domains", "2") as fake:
        yield fake


@pytest.mark.timeout(180)
@pytest.mark.parametrize("page", RUN)
def test_a_page_runs_as_it_is_written(fake: Fake, page: str, tmp_path: Path) -> None:
    ready = fake.ready
    environment = {
        "VIRTFLEET_ADDRESS": ready["address"],
        "VIRTFLEET_CA_FILE": ready["ca_file"],
        "VIRTFLEET_CERT_FILE": ready["cert_file"],
        "VIRTFLEET_KEY_FILE": ready["key_file"],
    }
    said = doc_blocks.run(ROOT / "docs" / f"{page}.md", tmp_path, environment)
    assert "Traceback" not in said
    assert not [name for name in fake.names() if "/domains/d-" not in name], "the page leaves something"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_no_block_is_neither_run_nor_marked(page: Path) -> None:
    silent = [
        f"line {block.line}: {block.language}"
        for block in doc_blocks.blocks(page)
        if block.language in doc_blocks.CHECKED
        and not block.mark
        and not (block.language == "sh" and page.stem in RUN and page.parent.name == "docs")
    ]
    assert not silent
    for block in doc_blocks.blocks(page):
        if block.mark == "run by":
            assert (ROOT / block.why.split("::")[0]).exists(), block.why
