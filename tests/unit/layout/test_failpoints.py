"""Named places at which a process dies under test: each is used, by its own crash test or by the rounds of chaos."""

from __future__ import annotations

import re
from pathlib import Path

from tools.paths import ROOT

PLACES = re.compile(r'\breach\("([a-z._]+)"\)')


def places() -> dict[str, Path]:
    """Return where each named place is."""
    found: dict[str, Path] = {}
    for folder in ("services", "gateway"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for name in PLACES.findall(path.read_text()):
                assert name not in found, f"{name} is in {found[name]} and in {path}"
                found[name] = path
    return found


def test_every_place_is_one_at_which_a_test_kills() -> None:
    here = Path(__file__)
    tests = [path.read_text() for path in (ROOT / "tests").rglob("*.py") if path != here]
    unused = [name for name in places() if not any(f'"{name}' in text for text in tests)]
    assert not unused, f"no test dies at {unused}"


def test_every_place_that_a_test_names_is_there() -> None:
    """A place that has been renamed is a test that tests nothing."""
    known = places().keys()
    prefixes = {name.partition(".")[0] for name in known}
    named = re.compile(rf'"((?:{"|".join(sorted(prefixes))})\.[a-z]+(?:\.[a-z]+)+)(?::\d+)?"')
    for path in (ROOT / "tests").rglob("test_crashes.py"):
        for name in named.findall(path.read_text()):
            assert name in known, f"{path.relative_to(ROOT)} names {name}, which is nowhere"
