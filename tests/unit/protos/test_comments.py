"""Every element says what it means: docs, stubs and clients show these comments."""

from __future__ import annotations

import re

from tests.unit.protos import descriptors


def test_every_element_has_a_comment() -> None:
    assert not [element.name for element in descriptors.documented() if not element.comment]


def test_a_comment_is_a_sentence() -> None:
    offenders = [
        f"{element.name}: {element.comment.splitlines()[-1]!r}"
        for element in descriptors.documented()
        if element.comment and not re.search(r"[.:!?`)]$", element.comment)
    ]
    assert not offenders


def test_a_method_begins_with_what_it_does() -> None:
    offenders = [
        f"{element.name}: {element.comment.split()[0]}"
        for element in descriptors.documented()
        if element.kind == "method" and element.comment and not re.match(r"[A-Z][a-z]+s\b", element.comment)
    ]
    assert not offenders


def test_comments_have_no_unfinished_words() -> None:
    words = re.compile(r"\b(TODO|FIXME|XXX|TBD)\b")
    assert not [element.name for element in descriptors.documented() if words.search(element.comment)]
