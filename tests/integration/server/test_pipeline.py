"""What a call goes through: names, nodes, unknown fields, rules of the protos, permissions, errors, the audit log."""

from __future__ import annotations

import asyncio
import sqlite3
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.longrunning import operations_pb2
from google.protobuf.message import Message

from tests.integration.server import rig as rigs
from tests.integration.server.rig import ask, refused, running
from virtfleet.common.v1 import admin_pb2
from virtfleet.compute.v1 import domain_pb2
from virtfleet.node.v1 import caller_pb2
from virtfleet_service import errors
from virtfleet_service.call import Call

NAME = "nodes/n1/domains/web"


def field(number: int, value: bytes | int) -> bytes:
    """Encode one field that the classes of this release do not have."""
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def create(**changes: Any) -> domain_pb2.CreateDomainRequest:
    request = domain_pb2.CreateDomainRequest(parent="nodes/n1", domain_id="web", domain=domain_pb2.Domain())
    for name, value in changes.items():
        setattr(request, name, value)
    return request


def restricted(*prefixes: str, role: str = "operator") -> tuple[tuple[str, bytes], ...]:
    caller = caller_pb2.ConveyedCaller(subject="carol", roles=[role], name_prefixes=prefixes)
    return (("x-virtfleet-caller-bin", caller.SerializeToString()),)


async def test_bytes_of_a_handler_pass_through_as_they_are(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:

        async def act(_request: Any, _call: Call) -> bytes:
            return b"\xff\xff no message at all"

        rig.domains.act = act
        answer = await ask(rig.socket("viewer"), rigs.GET_DOMAIN, domain_pb2.GetDomainRequest(name=NAME))
        assert answer == b"\xff\xff no message at all"


@pytest.mark.parametrize(
    "name",
    [
        "nodes/n1/domains/",
        "nodes/n1/domains/Web",
        "nodes/n1/domains/web/",
        "nodes/n1/domains/web\n",
        "nodes/n1/domains/we\x00b",
        "nodes/n1/domains/wéb",
        "nodes/n1/domains/w\u0435b",  # a Cyrillic letter
        "nodes/n1/domains/" + "a" * 64,
        "nodes/n1/pools/web",
        "domains/web",
        "/nodes/n1/domains/web",
        "nodes/n1/domains/../domains/web",
        "nodes/" + "n" * 2000 + "/domains/web",
        "nodes//domains/web",
        "-",
    ],
)
async def test_a_malformed_name_is_refused_with_its_field(tmp_path: Path, name: str) -> None:
    async with running(tmp_path) as rig:
        error = await refused(ask(rig.socket("admin"), rigs.GET_DOMAIN, domain_pb2.GetDomainRequest(name=name)))
        assert error.short == ("INVALID_ARGUMENT", "NAME_MALFORMED")
        assert error.fields == ["name"]
        assert rig.domains.calls == []


async def test_the_routing_field_is_required(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        error = await refused(ask(rig.socket("admin"), rigs.GET_DOMAIN, domain_pb2.GetDomainRequest()))
        assert error.short == ("INVALID_ARGUMENT", "FIELD_REQUIRED")
        assert error.fields == ["name"]
        request = domain_pb2.UpdateDomainRequest(domain=domain_pb2.Domain())
        error = await refused(ask(rig.socket("admin"), rigs.UPDATE_DOMAIN, request))
        assert error.short == ("INVALID_ARGUMENT", "FIELD_REQUIRED")
        assert error.fields == ["domain.name"]


async def test_get_takes_a_uid_and_a_mutation_does_not(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        name = "nodes/n1/domains/6ff0a01c-53f3-4c5c-9bb6-0f7bd16c2f1d"
        await ask(rig.socket("admin"), rigs.GET_DOMAIN, domain_pb2.GetDomainRequest(name=name))
        for target in (name, "nodes/n1/domains/affca01c-53f3-4c5c-9bb6-0f7bd16c2f1d"):
            request = domain_pb2.StartDomainRequest(name=target)
            error = await refused(ask(rig.socket("admin"), rigs.START_DOMAIN, request))
            assert error.short == ("INVALID_ARGUMENT", "NAME_MALFORMED")


@pytest.mark.parametrize(
    ("method", "request_"),
    [
        (rigs.GET_DOMAIN, domain_pb2.GetDomainRequest(name="nodes/n2/domains/web")),
        (rigs.GET_DOMAIN, domain_pb2.GetDomainRequest(name="nodes/-/domains/web")),
        (rigs.GET_DOMAIN, domain_pb2.GetDomainRequest(name="nodes/n11/domains/web")),
        (rigs.LIST_DOMAINS, domain_pb2.ListDomainsRequest(parent="nodes/-")),
        (rigs.START_DOMAIN, domain_pb2.StartDomainRequest(name="nodes/n2/domains/web")),
        (rigs.CREATE_DOMAIN, create(parent="nodes/n2")),
    ],
    ids=["get", "any", "longer", "list", "start", "create"],
)
async def test_a_name_of_another_node_is_refused(tmp_path: Path, method: str, request_: Message) -> None:
    async with running(tmp_path) as rig:
        error = await refused(ask(rig.socket("admin"), method, request_))
        assert error.short == ("FAILED_PRECONDITION", "WRONG_NODE")
        assert error.metadata["node"] == "nodes/n1"


@pytest.mark.parametrize(
    ("place", "code"), [("n1", "OK"), ("n1/compute", "OK"), ("n2", "WRONG_NODE"), ("n1/storage", "WRONG_NODE")]
)
async def test_the_node_in_the_metadata_must_be_this_one(tmp_path: Path, place: str, code: str) -> None:
    async with running(tmp_path) as rig:
        call = ask(
            rig.socket("admin"),
            rigs.GET_DOMAIN,
            domain_pb2.GetDomainRequest(name=NAME),
            metadata=(("x-virtfleet-node", place),),
        )
        if code == "OK":
            await call
        else:
            assert (await refused(call)).short == ("FAILED_PRECONDITION", code)


@pytest.mark.parametrize(
    ("extra", "path"),
    [
        (field(900, 1), "#900"),
        (field(2, field(900, b"x")), "domain.#900"),
        (field(2, field(10, field(900, 7))), "domain.spec.#900"),
        (field(2, field(10, field(40, field(1, b"root") + field(2, field(900, 7))))), "domain.spec.disks.root.#900"),
    ],
)
async def test_a_mutation_with_an_unknown_field_at_any_depth_is_refused(
    tmp_path: Path, extra: bytes, path: str
) -> None:
    async with running(tmp_path) as rig:
        error = await refused(ask(rig.socket("admin"), rigs.CREATE_DOMAIN, create().SerializeToString() + extra))
        assert error.short == ("INVALID_ARGUMENT", "UNKNOWN_FIELD")
        assert error.fields == [path]
        assert rig.domains.calls == []


async def test_a_mutation_with_an_unknown_enum_number_is_refused(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        request = create()
        request.domain.spec.lifetime = 77  # type: ignore[assignment]  # no number of the enum
        error = await refused(ask(rig.socket("admin"), rigs.CREATE_DOMAIN, request))
        assert error.short == ("INVALID_ARGUMENT", "UNKNOWN_FIELD")
        assert error.fields == ["domain.spec.lifetime"]
        assert error.metadata["number"] == "77"


async def test_a_read_ignores_what_it_does_not_know(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        encoded = domain_pb2.GetDomainRequest(name=NAME).SerializeToString() + field(900, 1)
        await ask(rig.socket("viewer"), rigs.GET_DOMAIN, encoded)


@pytest.mark.parametrize(
    ("change", "reason", "path"),
    [
        ({"domain_id": ""}, "FIELD_REQUIRED", "domain_id"),
        ({"domain_id": "Web"}, "NAME_MALFORMED", "domain_id"),
        ({"domain_id": "6ff0a01c-53f3-4c5c-9bb6-0f7bd16c2f1d"}, "NAME_MALFORMED", "domain_id"),
        ({"domain_id": "affca01c-53f3-4c5c-9bb6-0f7bd16c2f1d"}, "NAME_MALFORMED", "domain_id"),
        ({"request_id": "x" * 129}, "FIELD_OUT_OF_RANGE", "request_id"),
    ],
)
async def test_a_broken_rule_names_reason_and_field(
    tmp_path: Path, change: dict[str, str], reason: str, path: str
) -> None:
    async with running(tmp_path) as rig:
        error = await refused(ask(rig.socket("admin"), rigs.CREATE_DOMAIN, create(**change)))
        assert error.short == ("INVALID_ARGUMENT", reason)
        assert error.fields[0] == path


async def test_rules_inside_maps_and_required_messages(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        request = create()
        request.ClearField("domain")
        error = await refused(ask(rig.socket("admin"), rigs.CREATE_DOMAIN, request))
        assert error.short == ("INVALID_ARGUMENT", "FIELD_REQUIRED")
        assert error.fields == ["domain"]
        request = create()
        request.domain.spec.disks["No Id"].SetInParent()
        error = await refused(ask(rig.socket("admin"), rigs.CREATE_DOMAIN, request))
        assert error.short == ("INVALID_ARGUMENT", "NAME_MALFORMED")
        request = create()
        request.domain.labels["a"] = "x" * 5_000
        error = await refused(ask(rig.socket("admin"), rigs.CREATE_DOMAIN, request))
        assert error.short == ("INVALID_ARGUMENT", "FIELD_OUT_OF_RANGE")
        assert error.fields == ["domain.labels.a"]


async def test_a_message_that_is_too_large_has_our_reason(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        request = create()
        request.domain.labels["a"] = "x" * 5_000_000
        error = await refused(ask(rig.socket("admin"), rigs.CREATE_DOMAIN, request))
        assert error.short == ("RESOURCE_EXHAUSTED", "MESSAGE_TOO_LARGE")
        assert error.metadata["limit_bytes"] == str(4 << 20)


async def test_what_is_no_message_is_refused(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        error = await refused(ask(rig.socket("admin"), rigs.GET_DOMAIN, b"\xff\xff\xff"))
        assert error.short == ("INVALID_ARGUMENT", "DOCUMENT_INVALID")


async def test_an_answer_that_clients_could_not_take_is_refused(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:

        async def act(_request: Any, _call: Call) -> bytes:
            return b"x" * (3 << 20) + b"x"

        rig.domains.act = act
        error = await refused(ask(rig.socket("viewer"), rigs.GET_DOMAIN, domain_pb2.GetDomainRequest(name=NAME)))
        assert error.short == ("RESOURCE_EXHAUSTED", "MESSAGE_TOO_LARGE")


@pytest.mark.parametrize("path", ["/virtfleet.compute.v1.DomainService/Nope", "/no.Such/Thing"])
async def test_an_unknown_method_has_our_reason(tmp_path: Path, path: str) -> None:
    async with running(tmp_path) as rig:
        error = await refused(ask(rig.socket("admin"), path, b""))
        assert error.short == ("UNIMPLEMENTED", "METHOD_NOT_IMPLEMENTED")


async def test_a_method_that_is_not_built_yet_says_so(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        request = domain_pb2.DeleteDomainRequest(name=NAME)
        error = await refused(ask(rig.socket("admin"), rigs.START_DOMAIN.replace("Start", "Delete"), request))
        assert error.short == ("UNIMPLEMENTED", "METHOD_NOT_IMPLEMENTED")


async def test_an_error_of_a_handler_reaches_the_client_whole(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:

        async def act(_request: Any, _call: Call) -> bytes:
            raise errors.EtagMismatch("changed meanwhile", resource=NAME, retry_delay_seconds=0.5, etag="e")

        rig.domains.act = act
        error = await refused(ask(rig.socket("viewer"), rigs.GET_DOMAIN, domain_pb2.GetDomainRequest(name=NAME)))
        assert error.short == ("ABORTED", "ETAG_MISMATCH")
        assert error.message == "changed meanwhile"
        assert error.metadata == {"etag": "e", "resource": NAME}
        assert error.retry_seconds == 0.5


async def test_an_unforeseen_error_shows_an_id_of_the_log_and_nothing_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with running(tmp_path) as rig:

        async def act(_request: Any, _call: Call) -> bytes:
            raise sqlite3.OperationalError("no such table: secrets")

        rig.domains.act = act
        error = await refused(ask(rig.socket("viewer"), rigs.GET_DOMAIN, domain_pb2.GetDomainRequest(name=NAME)))
        assert error.short == ("INTERNAL", "UNEXPECTED")
        assert "secrets" not in error.message
        record = next(record for record in caplog.records if record.exc_info)
        assert error.metadata["log_id"] == record.__dict__["log_id"]


async def test_long_variables_do_not_break_the_trailers(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        name = "nodes/n1/domains/" + "ä" * 100_000
        error = await refused(ask(rig.socket("admin"), rigs.GET_DOMAIN, domain_pb2.GetDomainRequest(name=name)))
        assert error.short == ("INVALID_ARGUMENT", "NAME_MALFORMED")
        name = "nodes/n2/domains/a"
        error = await refused(
            ask(
                rig.socket("admin"),
                rigs.GET_DOMAIN,
                domain_pb2.GetDomainRequest(name=name),
                metadata=(("x-virtfleet-node", "n" * 8_000),),
            )
        )
        assert error.short == ("FAILED_PRECONDITION", "WRONG_NODE")


# Permissions.


async def test_references_in_the_body_are_authorised(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        gateway = rig.pki.gateway()
        metadata = restricted("nodes/n1/domains/a-", "nodes/n1/pools/p/volumes/a-")
        request = create(domain_id="a-1")
        request.domain.spec.disks["root"].volume = "pools/p/volumes/a-1"
        await ask(rig.channel(gateway), rigs.CREATE_DOMAIN, request, metadata=metadata)
        for volume in ("pools/p/volumes/b-1", "nodes/n1/pools/p/volumes/b-1"):
            request.domain.spec.disks["root"].volume = volume
            error = await refused(ask(rig.channel(gateway), rigs.CREATE_DOMAIN, request, metadata=metadata))
            assert error.short == ("PERMISSION_DENIED", "PERMISSION_MISSING")
            assert error.metadata["resource"] == "nodes/n1/pools/p/volumes/b-1"
            assert error.metadata["permission"] == "volumes.use"
        assert len(rig.domains.calls) == 1


@pytest.mark.parametrize(
    ("volume", "code", "reason"),
    [
        ("nodes/n2/pools/p/volumes/v", "INVALID_ARGUMENT", "REFERENCE_OTHER_NODE"),
        ("pools/p/volumes/V", "INVALID_ARGUMENT", "NAME_MALFORMED"),
        ("pools/p", "INVALID_ARGUMENT", "NAME_MALFORMED"),
        ("networks/n", "INVALID_ARGUMENT", "NAME_MALFORMED"),
        ("/etc/passwd", "INVALID_ARGUMENT", "NAME_MALFORMED"),
        ("pools/p/volumes/../../x", "INVALID_ARGUMENT", "NAME_MALFORMED"),
    ],
)
async def test_a_reference_that_cannot_be_one_is_refused_with_its_path(
    tmp_path: Path, volume: str, code: str, reason: str
) -> None:
    async with running(tmp_path) as rig:
        request = create()
        request.domain.spec.disks["root"].volume = volume
        error = await refused(ask(rig.socket("admin"), rigs.CREATE_DOMAIN, request))
        assert error.short == (code, reason)
        assert error.fields == ["domain.spec.disks.root.volume"]


async def test_a_uid_reaches_the_handler_which_judges_what_it_finds(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        metadata = restricted("nodes/n1/domains/a-", role="viewer")
        request = domain_pb2.GetDomainRequest(name="nodes/n1/domains/b0000000-0000-4000-8000-000000000000")
        await ask(rig.channel(rig.pki.gateway()), rigs.GET_DOMAIN, request, metadata=metadata)
        (call,) = rig.domains.calls
        assert call.may_see("nodes/n1/domains/a-1")
        with pytest.raises(errors.PermissionMissing):
            call.authorize("nodes/n1/domains/b")


async def test_a_caller_with_prefixes_makes_and_sees_what_it_may(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        gateway = rig.pki.gateway()
        metadata = restricted("nodes/n1/domains/a-")
        listed = await ask(
            rig.channel(gateway),
            rigs.LIST_DOMAINS,
            domain_pb2.ListDomainsRequest(parent="nodes/n1"),
            domain_pb2.ListDomainsResponse,
            metadata=metadata,
        )
        assert [domain.name for domain in listed.domains] == ["nodes/n1/domains/a-1", "nodes/n1/domains/a-2"]
        await ask(rig.channel(gateway), rigs.CREATE_DOMAIN, create(domain_id="a-3"), metadata=metadata)
        error = await refused(ask(rig.channel(gateway), rigs.CREATE_DOMAIN, create(domain_id="b-3"), metadata=metadata))
        assert error.short == ("PERMISSION_DENIED", "PERMISSION_MISSING")
        assert error.metadata["resource"] == "nodes/n1/domains/b-3"
        error = await refused(
            ask(
                rig.channel(gateway),
                rigs.LIST_DOMAINS,
                domain_pb2.ListDomainsRequest(parent="nodes/n1"),
                metadata=restricted("nodes/n2/"),
            )
        )
        assert error.short == ("PERMISSION_DENIED", "PERMISSION_MISSING")


async def test_every_item_of_a_batch_is_authorised(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        gateway = rig.pki.gateway()
        metadata = restricted("nodes/n1/domains/a-")
        batch = domain_pb2.BatchStartDomainsRequest(
            parent="nodes/n1",
            requests=[domain_pb2.StartDomainRequest(name=f"nodes/n1/domains/a-{number}") for number in (1, 2)],
        )
        await ask(rig.channel(gateway), rigs.BATCH_START, batch, metadata=metadata)
        batch.requests.add(name="nodes/n1/domains/b-1")
        error = await refused(ask(rig.channel(gateway), rigs.BATCH_START, batch, metadata=metadata))
        assert error.metadata["resource"] == "nodes/n1/domains/b-1"
        assert error.metadata["permission"] == "domains.start"


async def test_every_item_of_a_batch_that_creates_is_authorised(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        gateway = rig.pki.gateway()
        metadata = restricted("nodes/n1/domains/a-")
        batch = domain_pb2.BatchCreateDomainsRequest(
            parent="nodes/n1", requests=[create(domain_id="a-1"), create(domain_id="a-2", parent="")]
        )
        await ask(rig.channel(gateway), rigs.BATCH_CREATE, batch, metadata=metadata)
        await ask(rig.socket("operator"), rigs.BATCH_CREATE, batch)
        batch.requests[1].domain_id = "b-1"
        error = await refused(ask(rig.channel(gateway), rigs.BATCH_CREATE, batch, metadata=metadata))
        assert error.metadata["resource"] == "nodes/n1/domains/b-1"
        batch.requests[1].domain_id, batch.requests[1].parent = "a-2", "nodes/n2"
        error = await refused(ask(rig.channel(gateway), rigs.BATCH_CREATE, batch, metadata=metadata))
        assert error.short == ("FAILED_PRECONDITION", "WRONG_NODE")


async def test_a_viewer_changes_nothing(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        viewer = rig.pki.user("v", "viewer")
        await ask(rig.channel(viewer), rigs.GET_DOMAIN, domain_pb2.GetDomainRequest(name=NAME))
        error = await refused(ask(rig.channel(viewer), rigs.START_DOMAIN, domain_pb2.StartDomainRequest(name=NAME)))
        assert error.short == ("PERMISSION_DENIED", "PERMISSION_MISSING")
        error = await refused(ask(rig.socket("viewer"), rigs.START_DOMAIN, domain_pb2.StartDomainRequest(name=NAME)))
        assert error.short == ("PERMISSION_DENIED", "READ_ONLY_SOCKET")


# Calls as handlers see them.


async def test_a_handler_sees_deadline_metadata_and_cancellation(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        seen: list[Any] = []
        began, ended = asyncio.Event(), asyncio.Event()

        async def act(_request: Any, call: Call) -> bytes:
            seen.append((call.remaining(), call.metadata("x-mine"), call.trace_id, call.resource))
            began.set()
            try:
                await asyncio.sleep(30)
            except asyncio.CancelledError:
                ended.set()
                raise
            return b""

        rig.domains.act = act
        channel = rig.socket("viewer")
        trace = "4bf92f3577b34da6a3ce929d0e0e4736"
        call = channel.unary_unary(rigs.GET_DOMAIN)(
            domain_pb2.GetDomainRequest(name=NAME).SerializeToString(),
            timeout=20,
            metadata=(("x-mine", "yes"), ("traceparent", f"00-{trace}-00f067aa0ba902b7-01")),
        )
        async with asyncio.timeout(5):
            await began.wait()
            call.cancel()
            await ended.wait()
        remaining, mine, trace_id, resource = seen[0]
        assert 15 < remaining <= 21
        assert (mine, trace_id, resource) == ("yes", trace, NAME)
        assert rig.server.active_calls_count == 0
        await channel.close()


async def test_the_call_outlives_its_answer_for_work_that_goes_on(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        await ask(rig.socket("operator"), rigs.CREATE_DOMAIN, create(request_id="r1"), timeout=20)
        call = rig.domains.calls[0]
        assert call.remaining() is None
        assert call.caller.subject == "local:operator"
        assert call.request_id == "r1"
        assert call.resource == "nodes/n1/domains/web"


async def test_mutations_and_refusals_are_in_the_audit_log_and_reads_are_not(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        await ask(rig.socket("operator"), rigs.CREATE_DOMAIN, create(request_id="r1"), operations_pb2.Operation)
        # Looked at without waiting: it stands there before the answer does.
        entries = rig.audit()
        assert len(entries) == 1
        assert entries[0].pop("time")
        assert entries[0] == {
            "event": "call",
            "method": "virtfleet.compute.v1.DomainService.CreateDomain",
            "subject": "local:operator",
            "roles": ["operator"],
            "transport": "unix",
            "resource": "nodes/n1/domains/web",
            "request_id": "r1",
            "code": "OK",
        }
        await ask(rig.socket("viewer"), rigs.GET_DOMAIN, domain_pb2.GetDomainRequest(name=NAME))
        assert len(rig.audit()) == 1
        await refused(ask(rig.socket("viewer"), rigs.CREATE_DOMAIN, create()))
        await refused(ask(rig.socket("operator"), rigs.CREATE_DOMAIN, create(domain_id="X")))
        assert [(entry["code"], entry["reason"]) for entry in rig.audit()[1:]] == [
            ("PERMISSION_DENIED", "READ_ONLY_SOCKET"),
            ("INVALID_ARGUMENT", "NAME_MALFORMED"),
        ]


async def test_a_request_id_given_twice_to_the_admin_service_does_no_harm(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        request = admin_pb2.ReloadCertificatesRequest(request_id="r")
        first, second = [await ask(rig.socket("admin"), rigs.RELOAD, request, admin_pb2.Server) for _ in range(2)]
        assert first.identity == second.identity == "spiffe://virtfleet.dev/node/n1/compute"


async def test_concurrent_calls_keep_apart(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:

        async def act(request: Any, call: Call) -> Message:
            await asyncio.sleep(0.001)
            assert call.resource == request.name
            return domain_pb2.Domain(name=f"{request.name}", display_name=call.caller.subject)

        rig.domains.act = act
        channels = {role: rig.socket(role) for role in ("admin", "operator", "viewer")}

        async def one(number: int) -> None:
            role = ("admin", "operator", "viewer")[number % 3]
            request = domain_pb2.GetDomainRequest(name=f"nodes/n1/domains/d{number}")
            unary: Any = channels[role].unary_unary(rigs.GET_DOMAIN)
            answer = domain_pb2.Domain.FromString(await unary(request.SerializeToString(), timeout=20))
            assert (answer.name, answer.display_name) == (request.name, f"local:{role}")

        await asyncio.gather(*(one(number) for number in range(300)))
        for channel in channels.values():
            await channel.close()


async def test_metadata_beyond_reason_are_refused(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await ask(
                rig.socket("viewer"),
                rigs.GET_DOMAIN,
                domain_pb2.GetDomainRequest(name=NAME),
                metadata=(("x-much", "x" * 200_000),),
            )
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        await ask(rig.socket("viewer"), rigs.GET_DOMAIN, domain_pb2.GetDomainRequest(name=NAME))
