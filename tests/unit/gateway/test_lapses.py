"""What has ended says so, and goes."""

from __future__ import annotations

import datetime as dt
import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.unit.gateway.test_enrollment import CALL, KINDS, Desk, enroll
from virtfleet.fleet.v1 import enrollment_pb2, watch_pb2
from virtfleet_gateway import certificates as module
from virtfleet_gateway.authority import Authority, new_request
from virtfleet_gateway.lapses import Lapses
from virtfleet_service.store import Store
from virtfleet_service.watch import WatchHub


@pytest.fixture
async def desk(tmp_path: Path) -> AsyncIterator[Desk]:
    async with Store.open(tmp_path / "g.db", package="virtfleet.fleet.v1", resource_types=KINDS) as store:
        yield Desk(store, Authority.create(tmp_path / "ca"), tmp_path)


def lapses(desk: Desk) -> Lapses:
    return Lapses(desk.store, desk.authority, desk.certificates, desk.tokens)


async def end(desk: Desk, name: str, ago: dt.timedelta) -> None:
    """Let a certificate or token have ended so long ago."""
    row = desk.store.need(name)
    kind = enrollment_pb2.Certificate if row.kind == "certificate" else enrollment_pb2.JoinToken
    message: Any = kind.FromString(row.body)
    message.status.expire_time.FromDatetime(dt.datetime.now(dt.UTC) - ago)
    await desk.store.write(lambda tx: tx.put(row.kind, message, cause="test"))


def certificate_state(desk: Desk, name: str) -> str:
    state = enrollment_pb2.Certificate.FromString(desk.store.need(name).body).status.state
    return enrollment_pb2.CertificateState.Name(state).removeprefix("CERTIFICATE_STATE_")


async def test_certificates_that_have_ended_say_so_and_go_a_day_later(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_LAPSE_SLICE", 1)
    answer = await desk.enrollment.enroll_node(enroll(await desk.token()))
    lately, long_ago, good = (one.certificate for one in answer.certificates)
    revoked = (await desk.enrollment.enroll_node(enroll(await desk.token("n2"), "n2"))).certificates[0].certificate
    await desk.certificates.revoke(enrollment_pb2.RevokeCertificateRequest(name=revoked), CALL)
    for name in (lately, revoked):
        await end(desk, name, dt.timedelta(hours=1))
    await end(desk, long_ago, dt.timedelta(hours=25))
    await lapses(desk).look()
    assert desk.store.get(long_ago) is None
    assert [certificate_state(desk, name) for name in (lately, revoked, good)] == ["EXPIRED", "REVOKED", "VALID"]


async def test_a_certificate_that_nobody_renews_is_told_of_once(desk: Desk) -> None:
    answer = await desk.enrollment.enroll_node(enroll(await desk.token()))
    forgotten, renewed = (one.certificate for one in answer.certificates[:2])

    async def age(name: str) -> None:
        certificate = enrollment_pb2.Certificate.FromString(desk.store.need(name).body)
        now = dt.datetime.now(dt.UTC)
        certificate.status.begin_time.FromDatetime(now - dt.timedelta(hours=9))
        certificate.status.expire_time.FromDatetime(now + dt.timedelta(hours=1))
        await desk.store.write(lambda tx: tx.put("certificate", certificate, cause="test"))

    def told() -> list[str]:
        request = watch_pb2.ListEventsRequest(filter="type=CERTIFICATE_EXPIRING")
        found = watch_pb2.ListEventsResponse.FromString(WatchHub(desk.store).list_events(request))
        return [event.resource for event in found.events]

    await lapses(desk).look()
    assert told() == []
    for name in (forgotten, renewed):
        await age(name)
    new = desk.authority.issue_node(new_request("storage")[1], "n1", "storage", dt.timedelta(days=7))
    await desk.store.write(lambda tx: desk.certificates.record(tx, new.pem, principal="n1", method="RenewCertificate"))
    await lapses(desk).look()
    await lapses(desk).look()
    assert told() == [forgotten]


async def test_tokens_that_nobody_has_used_say_so_and_go_a_day_later(desk: Desk) -> None:
    for node in ("n1", "n2", "n3"):
        await desk.token(node)
    names = {enrollment_pb2.JoinToken.FromString(row.body).spec.node: row.name for row in desk.store.list("join_token")}
    await end(desk, names["nodes/n1"], dt.timedelta(hours=1))
    await end(desk, names["nodes/n2"], dt.timedelta(hours=25))
    await lapses(desk).look()
    left = [enrollment_pb2.JoinToken.FromString(row.body) for row in desk.store.list("join_token")]
    assert {token.spec.node: token.status.state for token in left} == {
        "nodes/n1": enrollment_pb2.JOIN_TOKEN_STATE_EXPIRED,
        "nodes/n3": enrollment_pb2.JOIN_TOKEN_STATE_ACTIVE,
    }
    assert len(desk.store.list_records("tokenHash")) == 2


async def test_the_end_of_the_authority_is_told_a_year_before_once_a_day(
    desk: Desk, caplog: pytest.LogCaptureFixture
) -> None:
    look = lapses(desk)
    caplog.set_level(logging.ERROR)
    ends = desk.authority.not_after
    look.warn(ends - dt.timedelta(days=400))
    assert caplog.messages == []
    for hours in (0, 1, 23, 25):
        look.warn(ends - dt.timedelta(days=300) + dt.timedelta(hours=hours))
    assert caplog.messages == [
        f"the authority of the fleet ends in {days} days, and with it every certificate" for days in (300, 298)
    ]
