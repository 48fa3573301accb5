"""Names: what is one and what is none, and what its parts are."""

from __future__ import annotations

import re
import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st

from virtfleet_service import errors, names

ids = st.from_regex(r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?", fullmatch=True, alphabet=st.characters(codec="ascii"))
DOMAIN = "nodes/{node}/domains/{domain}"


@given(st.uuids())
def test_a_uuid_is_never_an_id(value: uuid.UUID) -> None:
    assert not names.is_id(str(value))
    assert not names.is_id(str(value).upper())
    assert names.is_uid(str(value))


@given(ids)
def test_an_id_is_taken_and_found_again_in_a_name(id_: str) -> None:
    if names.is_uid(id_):
        return
    assert names.is_id(id_)
    name = names.child("nodes/n1", "domains", id_)
    assert names.parse(name, DOMAIN) == ("n1", id_)
    assert names.node_of(name) == "n1"
    assert names.id_of(name) == id_
    assert names.collection_of(name) == "domains"
    assert names.parent_of(name) == "nodes/n1"
    assert names.absolute(names.relative(name, "n1"), "n1") == name


@given(st.text(max_size=80))
def test_whatever_is_taken_as_an_id_is_plain_ascii(text: str) -> None:
    if names.is_id(text):
        assert re.fullmatch(r"[a-z][a-z0-9-]*", text, re.ASCII)
        assert len(text) <= 63
        assert not text.endswith("-")


@given(st.text(max_size=600))
def test_whatever_is_taken_as_a_name_holds_nothing_that_surprises(text: str) -> None:
    if names.is_name(text):
        assert text.isascii()
        assert text.isprintable()
        assert ".." not in text.split("/")
        assert "" not in text.split("/")
        assert len(text) <= names.NAME_LIMIT_CHARACTERS


@pytest.mark.parametrize(
    "text", ["", "A", "a-", "-a", "1a", "a" * 64, "a_b", "a.b", "a\n", "a\x00", "\u0430", "\uff41"]
)
def test_what_is_no_id_is_refused_with_its_field(text: str) -> None:
    with pytest.raises(errors.NameMalformed) as caught:
        names.check_id(text, "domain_id")
    assert caught.value.field == "domain_id"


def test_wildcards_and_uids_are_for_those_who_ask() -> None:
    uid = "affca01c-53f3-4c5c-9bb6-0f7bd16c2f1d"
    assert names.parse(f"nodes/n1/domains/{uid}", DOMAIN, uid=True) == ("n1", uid)
    assert names.parse("nodes/-/domains/web", DOMAIN, wildcard=True) == ("-", "web")
    for name in (f"nodes/n1/domains/{uid}", "nodes/-/domains/web", "nodes/n1/domains/web/disks/a"):
        with pytest.raises(errors.NameMalformed):
            names.parse(name, DOMAIN)
    with pytest.raises(errors.NameMalformed):
        names.parse(f"nodes/{uid}/domains/web", DOMAIN)


def test_a_reference_to_another_node_is_refused() -> None:
    assert names.absolute("pools/p", "n1") == "nodes/n1/pools/p"
    assert names.absolute("nodes/n1/pools/p", "n1") == "nodes/n1/pools/p"
    with pytest.raises(errors.ReferenceOtherNode) as caught:
        names.absolute("nodes/n2/pools/p", "n1", field="spec.pool")
    assert caught.value.field == "spec.pool"
