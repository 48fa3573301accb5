from __future__ import annotations

import base64
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.service.rig import call, domain, open_store, put, watching
from virtfleet.compute.v1 import domain_pb2, watch_pb2
from virtfleet.type.v1 import resource_pb2
from virtfleet_service import errors, paging, resources, tokens
from virtfleet_service.paging import list_reply, page, read_page
from virtfleet_service.store import Store
from virtfleet_service.tokens import ResumeToken
from virtfleet_service.watch import WatchHub

BASIC = resource_pb2.RESOURCE_VIEW_BASIC


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    async with open_store(tmp_path / "c.db") as opened:
        yield opened


def ask(**fields: object) -> domain_pb2.ListDomainsRequest:
    return domain_pb2.ListDomainsRequest(parent="nodes/n1", **fields)  # type: ignore[arg-type]  # keywords of any field


def listed(store: Store, **fields: object) -> domain_pb2.ListDomainsResponse:
    reply = list_reply(store, "domain", ask(**fields), domain_pb2.ListDomainsResponse)
    return domain_pb2.ListDomainsResponse.FromString(reply)


def ids(response: domain_pb2.ListDomainsResponse) -> list[str]:
    return [one.name.rpartition("/")[2] for one in response.domains]


async def test_pages_hold_everything_once_in_the_order_of_names(store: Store) -> None:
    made = [domain(f"d{index:03}") for index in range(25)]
    await put(store, *reversed(made), domain("x", node="n2"))
    found: list[str] = []
    token = ""
    sizes = []
    while True:
        response = listed(store, page_size=10, page_token=token)
        found += ids(response)
        sizes.append(len(response.domains))
        token = response.next_page_token
        if not token:
            break
    assert sizes == [10, 10, 5]
    assert found == [f"d{index:03}" for index in range(25)]
    assert listed(store).domains[3] == made[3]


async def test_a_page_that_ends_with_the_last_resource_has_no_token(store: Store) -> None:
    await put(store, domain("a"), domain("b"))
    assert not listed(store, page_size=2).next_page_token
    assert listed(store, page_size=1).next_page_token
    assert not listed(store, filter="labels:none").domains


async def test_a_page_ends_at_one_mebibyte(store: Store) -> None:
    made = []
    for index in range(40):
        one = domain(f"d{index:03}")
        one.annotations["fill"] = "x" * 60_000
        made.append(one)
    await put(store, *made)
    first = listed(store, page_size=40)
    assert 900_000 < first.ByteSize() < 1_100_000
    rest = listed(store, page_size=40, page_token=first.next_page_token)
    assert len(rest.domains) > 0
    assert not set(ids(first)) & set(ids(rest))


async def test_filter_and_view(store: Store) -> None:
    await put(store, *(domain(f"d{index}", env="prod" if index % 2 else "test") for index in range(6)))
    response = listed(store, filter="labels.env = prod", view=BASIC)
    assert ids(response) == ["d1", "d3", "d5"]
    assert not response.domains[0].HasField("spec")
    assert not response.domains[0].status.HasField("resolved_spec")
    assert response.domains[0].status.state == domain_pb2.DOMAIN_STATE_SHUT_OFF
    with pytest.raises(errors.FilterSyntax):
        listed(store, filter="nothing = 1")
    with pytest.raises(errors.FieldOutOfRange) as caught:
        listed(store, page_size=-1)
    assert caught.value.field == "page_size"


async def test_items_are_bytes_where_they_are_as_stored(store: Store) -> None:
    await put(store, domain("a"))
    items, token = page(store, "domain", "nodes/n1", ask(), decode=domain_pb2.Domain.FromString)
    assert not token
    assert isinstance(items[0], bytes)
    (basic,), _ = page(store, "domain", "nodes/n1", ask(), decode=domain_pb2.Domain.FromString, view=BASIC)
    assert isinstance(basic, domain_pb2.Domain)


async def test_looking_for_matches_is_bounded(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    await put(store, *(domain(f"d{index:03}") for index in range(200)), domain("z", env="prod"))
    monkeypatch.setattr(paging, "SCAN_SECONDS", 0.0)
    token, pages, found = "", 0, list[str]()
    while True:
        response = listed(store, filter="labels.env = prod", page_token=token)
        found += ids(response)
        pages += 1
        token = response.next_page_token
        if not token:
            break
    assert found == ["z"]
    assert pages > 3


async def test_callers_see_their_own_names_only(store: Store) -> None:
    await put(store, domain("a-1"), domain("b-1"), domain("b-2"))
    limited = call("virtfleet.compute.v1.DomainService.ListDomains", roles=("viewer@nodes/n1/domains/b-",))
    limited._authorizer.register(limited.method)
    found = read_page(store, "domain", "nodes/n1", ask(), call=limited)
    assert [domain_pb2.Domain.FromString(item).name for item in found.items] == [  # type: ignore[arg-type]  # bytes here
        "nodes/n1/domains/b-1",
        "nodes/n1/domains/b-2",
    ]


async def test_a_token_tells_its_holder_no_names(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    await put(store, *(domain(f"secret-{index:03}") for index in range(80)), domain("z-1"))
    limited = call("virtfleet.compute.v1.DomainService.ListDomains", roles=("viewer@nodes/n1/domains/z",))
    limited._authorizer.register(limited.method)
    monkeypatch.setattr(paging, "SCAN_SECONDS", 0.0)
    token = read_page(store, "domain", "nodes/n1", ask(), call=limited).next_page_token
    assert token
    raw = base64.urlsafe_b64decode(token + "=" * (-len(token) % 4))
    assert b"secret" not in raw
    assert b"nodes" not in raw


async def test_tokens_fit_their_own_list_only(store: Store, tmp_path: Path) -> None:
    await put(store, *(domain(f"d{index}") for index in range(5)))
    token = listed(store, page_size=2).next_page_token
    assert ids(listed(store, page_size=3, page_token=token)) == ["d2", "d3", "d4"]
    flipped = token[:5] + ("A" if token[5] != "A" else "B") + token[6:]
    for bad in ("x", "ä", "=", token[:-1], token + "A", flipped, token + "=", "A" * 6000):
        with pytest.raises(errors.PageTokenInvalid) as caught:
            listed(store, page_token=bad)
        assert caught.value.field == "page_token"
    for other in ({"filter": "labels:x"}, {"view": BASIC}):
        with pytest.raises(errors.PageTokenInvalid):
            listed(store, page_token=token, **other)
    with pytest.raises(errors.PageTokenInvalid):
        read_page(store, "host", "nodes/n1", ask(page_token=token))
    with pytest.raises(errors.PageTokenInvalid):
        read_page(store, "domain", "nodes/n2", ask(page_token=token))
    async with open_store(tmp_path / "other.db") as elsewhere:
        with pytest.raises(errors.PageTokenInvalid):
            listed(elsewhere, page_token=token)


async def test_a_watch_from_a_list_has_no_gap(store: Store) -> None:
    hub = WatchHub(store)
    made = [domain(f"d{index}") for index in range(4)]
    await put(store, *made)
    first = listed(store, page_size=2)
    resources.touch(made[0])
    await put(store, made[0])
    second = listed(store, page_size=2, page_token=first.next_page_token)
    assert second.resume_token == first.resume_token
    request = watch_pb2.WatchResourcesRequest(parent="nodes/n1", resume_token=second.resume_token)
    async with watching(hub, request) as watcher:
        (change,) = await watcher.until(1)
        assert change.put.domain == made[0]


@given(st.binary(max_size=64), st.binary(min_size=8, max_size=8), st.binary(min_size=8, max_size=8))
def test_a_page_token_opens_with_its_own_binding_only(payload: bytes, binding: bytes, other: bytes) -> None:
    token = tokens.seal(b"key", binding, payload)
    assert tokens.unseal(b"key", binding, token) == payload
    for key, bound in ((b"other", binding), (b"key", other)):
        if (key, bound) != (b"key", binding):
            with pytest.raises(errors.PageTokenInvalid):
                tokens.unseal(key, bound, token)


@given(st.text(max_size=60))
def test_no_text_is_a_token_by_chance(text: str) -> None:
    with pytest.raises(errors.PageTokenInvalid):
        tokens.unseal(b"key", bytes(8), text)
    with pytest.raises(errors.PageTokenInvalid):
        ResumeToken.decode(text)


names = st.from_regex(r"[a-z]{1,5}(/[a-z0-9-]{1,8}){0,5}", fullmatch=True)
places = st.builds(
    ResumeToken,
    st.binary(min_size=16, max_size=16).map(bytes.hex),
    st.integers(0, 2**63),
    st.integers(0, 2**63),
    st.binary(min_size=8, max_size=8),
)


@given(places, st.sampled_from(["", "domain"]), names, st.data())
def test_resume_tokens_survive_and_damage_is_seen(
    token: ResumeToken, kind: str, name: str, data: st.DataObject
) -> None:
    place = ResumeToken(token.store_id, token.seq, token.time_ns, token.binding, kind, name if kind else "")
    text = place.encode()
    assert ResumeToken.decode(text) == place
    at = data.draw(st.integers(0, len(text) - 1))
    character = data.draw(st.sampled_from("ABCxyz019-_="))
    if text[at] != character:
        with pytest.raises(errors.PageTokenInvalid):
            ResumeToken.decode(text[:at] + character + text[at + 1 :])
