"""Build the documentation site: `make docs`.

The source is `docs/` with the pages of the clients beside it and those that are made. A link to a page of the
repository becomes one to the page of the site, a link to what a page is made from one to that page, a link to any other
file of the repository becomes plain text, and a link that leads nowhere fails the build.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from tools import protos
from tools.pages import MADE_FROM, made_pages
from tools.paths import BUILD, ROOT

DOCS = ROOT / "docs"
DECISIONS = DOCS / "adr"
SOURCE = BUILD / "site-source"
SITE = BUILD / "site"

_LINK = re.compile(r"(?P<image>!?)\[(?P<text>[^\]]+)\]\((?P<target>[^)\s]+)\)")
_FENCE = re.compile(r"(^ *```.*?^ *```$)", re.DOTALL | re.MULTILINE)
_ELSEWHERE = re.compile(r"[a-z]+:|#")


class DeadLinkError(Exception):
    """A link leads nowhere; the text says which."""


def pages() -> dict[Path, str]:
    """Return the pages of the site: where each is in the repository (decisions: their folder), and its path there."""
    found = {DECISIONS: "adr/index.md", **{ROOT / source: name for name, source in MADE_FROM.items()}}
    found |= {path: path.relative_to(DOCS).as_posix() for path in sorted(DOCS.rglob("*.md"))}
    found[ROOT / "clients" / "README.md"] = "clients/index.md"
    for path in sorted((ROOT / "clients").glob("*/README.md")):
        found[path] = f"clients/{path.parent.name}.md"
    return found


def for_the_site(text: str, page: Path, known: dict[Path, str]) -> str:
    """Return the text of a page with links as they are on the site.

    Raises:
        DeadLinkError: A link leads nowhere in the repository.
    """

    def replace(found: re.Match[str]) -> str:
        if _ELSEWHERE.match(found["target"]):
            return found[0]
        path, _, anchor = found["target"].partition("#")
        goal = (page.parent / path).resolve()
        if not goal.exists():
            raise DeadLinkError(f"{page.relative_to(ROOT)}: {found['target']} leads nowhere")
        there = known.get(goal) or known.get(goal / "README.md")
        if there is None and found["image"] and goal.is_relative_to(DOCS):
            there = goal.relative_to(DOCS).as_posix()
        if there is None:
            return found["text"]
        link = os.path.relpath(there, Path(known[page]).parent) + (f"#{anchor}" if anchor else "")
        return f"{found['image']}[{found['text']}]({link})"

    parts = _FENCE.split(text)
    return "".join(part if number % 2 else _LINK.sub(replace, part) for number, part in enumerate(parts))


def _decisions() -> str:
    lines = [
        f"- [{path.read_text().splitlines()[0].removeprefix('# ')}]({path.name})"
        for path in sorted(DECISIONS.glob("[0-9]*.md"))
    ]
    return "# Decisions\n\n" + "\n".join(lines) + "\n"


def write_source() -> None:
    """Write all pages and pictures to where mkdocs reads them.

    Raises:
        DeadLinkError: A link leads nowhere in the repository.
    """
    shutil.rmtree(SOURCE, ignore_errors=True)
    known = pages()
    made = {**made_pages(protos.write_image(protos.IMAGE)), known[DECISIONS]: _decisions()}
    for path, name in known.items():
        target = SOURCE / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(made[name] if name in made else for_the_site(path.read_text(), path, known))
    for path in DOCS.rglob("*"):
        if path.suffix in (".svg", ".png", ".css"):
            target = SOURCE / path.relative_to(DOCS)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)


def main() -> int:
    """Build the site; returns the exit code."""
    try:
        write_source()
    except DeadLinkError as error:
        print(f"docs: {error}", file=sys.stderr)
        return 1
    command = [
        os.fspath(Path(sys.executable).with_name("mkdocs")),
        "build",
        "--quiet",
        "--strict",
        "--config-file",
        os.fspath(DOCS / "mkdocs.yml"),
    ]
    # The theme's own advertisement.
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, env=environment, check=False)
    if done.returncode == 0:
        print(f"docs: {SITE}/index.html")
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
