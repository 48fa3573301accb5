"""The pictures in the documentation are of what the command does today."""

from __future__ import annotations

import re
from html import unescape
from pathlib import Path

import pytest

from tools import screenshots
from tools.paths import ROOT

SAYS = {
    "lists": ("READY", "n1    web-0", "spare"),
    "changes": ("spec.cpu.vcpu_count", "at next start", "9 stopped, 0 failed"),
    "top": ("DOMAIN", "CPU %", "n1/db"),
    "errors": ("did you mean `domains`?", "RESOURCE_NOT_FOUND", "next: `virtfleet get domains`", "WRONG_STATE"),
}


def words(svg: str) -> str:
    rows = re.findall(r"<text [^>]*>(.*?)</text>", svg)
    return unescape("".join(rows)).replace("\N{NO-BREAK SPACE}", " ")


@pytest.mark.timeout(120)
def test_the_script_makes_the_pictures_that_are_committed() -> None:
    assert {path.stem for path in screenshots.FOLDER.glob("*")} == set(screenshots.SCENES)
    with screenshots.fleet() as variables:
        for name in screenshots.SCENES:
            made = screenshots.picture(name, variables)
            for svg in (made, (screenshots.FOLDER / f"{name}.svg").read_text()):
                assert "://" not in svg.replace("http://www.w3.org/", ""), "a picture fetches nothing"
                for command in screenshots.SCENES[name]:
                    assert f"$ {command}" in words(svg)
                for text in SAYS[name]:
                    assert text in words(svg), (name, words(svg))
                assert "Traceback" not in words(svg)


def test_each_picture_is_shown() -> None:
    page = (ROOT / "docs" / "command.md").read_text()
    for name in screenshots.SCENES:
        assert f"](images/{name}.svg)" in page
        assert Path(ROOT, "docs/images", f"{name}.svg").stat().st_size < 100_000


def test_what_was_drawn_over_is_gone() -> None:
    written = "\x1b[?25l\r\x1b[2Kone \x1b[33m0 %\x1b[0m\r\ntwo 0 %\r\x1b[2K\x1b[1A\x1b[2Kone \x1b[33m9 %\x1b[0m\r\ntwo 9 %\r\n\x1b[?25hend\r\n"
    assert screenshots.screen(written) == "one \x1b[33m9 %\x1b[0m\ntwo 9 %\nend"
