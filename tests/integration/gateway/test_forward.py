# ruff: noqa: ARG001 - behaviours have the signature that grpc calls
from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio
import pytest
import pytest_asyncio

from tests.integration.gateway.nodes import Rig, details_of, echo, named, own_status, rig

if TYPE_CHECKING:
    from tests.integration.gateway.nodes import Context
from virtfleet.compute.v1 import domain_pb2
from virtfleet_gateway import wire
from virtfleet_gateway.forward import CALLER_METADATA
from virtfleet_gateway.relay import DETAILS_METADATA

GET = "virtfleet.compute.v1.DomainService.GetDomain"
CREATE = "virtfleet.compute.v1.DomainService.CreateDomain"
UPDATE = "virtfleet.compute.v1.DomainService.UpdateDomain"
UPDATE = "virtfleet.compute.v1.DomainService.UpdateDomain"
WATCH = "virtfleet.compute.v1.WatchService.WatchResources"
CONSOLE = "virtfleet.compute.v1.ConsoleService.OpenConsole"
UPLOAD = "virtfleet.storage.v1.VolumeService.UploadVolume"
DOWNLOAD = "virtfleet.storage.v1.VolumeService.DownloadVolume"
LIST_OPERATIONS = "google.longrunning.Operations.ListOperations"
SERVER = "virtfleet.common.v1.AdminService.GetServer"

UNKNOWN_TAIL = wire.delimited(900, b"a field that no release knows")


@pytest_asyncio.fixture
async def fleet() -> AsyncIterator[Rig]:
    async with rig() as made:
        yield made


async def failure(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


# What passes


async def test_unary_bytes_pass_unaltered_and_reach_the_named_node(fleet: Rig) -> None:
    for node in ("n1", "n2"):

        async def answer(request: bytes, context: Context, node: str = node) -> bytes:
            return node.encode() + request

        fleet.nodes[node].unary[GET] = answer
    for node in ("n1", "n2"):
        request = named(f"nodes/{node}/domains/web", UNKNOWN_TAIL)
        assert await fleet.call(GET)(request) == node.encode() + request


async def test_an_update_is_routed_by_the_name_inside_its_resource(fleet: Rig) -> None:
    fleet.nodes["n2"].unary[UPDATE] = echo
    request = wire.delimited(2, b"\x0a\x04spec") + wire.delimited(1, named("nodes/n2/domains/web", UNKNOWN_TAIL))
    assert await fleet.call(UPDATE)(request) == request


async def test_operations_are_routed_by_field_four_never_by_the_filter(fleet: Rig) -> None:
    fleet.nodes["n2"].unary[LIST_OPERATIONS] = echo
    request = named("nodes/n1/services/compute") + wire.delimited(4, b"nodes/n2/services/storage")
    assert await fleet.call(LIST_OPERATIONS)(request) == request


async def test_common_methods_are_routed_by_the_service_segment(fleet: Rig) -> None:
    fleet.nodes["n1"].unary[SERVER] = echo
    request = named("nodes/n1/services/network")
    assert await fleet.call(SERVER)(request) == request
    # An empty name means the process that is called, and the metadata says which that is.
    assert await fleet.call(SERVER)(b"", metadata=(("x-virtfleet-node", "n1/compute"),)) == b""


async def test_metadata_passes_both_ways(fleet: Rig) -> None:
    seen: dict[str, Any] = {}

    async def answer(request: bytes, context: Context) -> bytes:
        seen.update(context.invocation_metadata() or ())
        seen["copies"] = [value for key, value in context.invocation_metadata() or () if key == CALLER_METADATA]
        await context.send_initial_metadata((("early", "1"), ("early-bin", b"\x00\xff")))
        context.set_trailing_metadata((("late", "2"),))
        return b"ok"

    fleet.nodes["n1"].unary[GET] = answer
    call = fleet.call(GET)(
        named("nodes/n1/domains/web"),
        metadata=(
            ("traceparent", "00-aa-bb-01"),
            ("x-own-bin", b"\x01\x02"),
            ("x-virtfleet-node", "n1"),
        ),
    )
    assert await call == b"ok"
    assert seen["traceparent"] == "00-aa-bb-01"
    assert seen["x-own-bin"] == b"\x01\x02"
    assert seen["copies"] == [fleet.gate.passport.conveyed]
    assert "x-virtfleet-node" not in seen
    assert dict(await call.initial_metadata())["early-bin"] == b"\x00\xff"
    assert dict(await call.trailing_metadata())["late"] == "2"


@pytest.mark.parametrize("method", [GET, WATCH, CONSOLE, UPLOAD])
async def test_a_status_of_the_node_passes_unchanged_with_its_details(fleet: Rig, method: str) -> None:
    status = own_status(grpc.StatusCode.UNAVAILABLE, "SERVICE_DRAINING")

    async def refuse(request: Any, context: Context) -> None:
        await context.abort(
            grpc.StatusCode.UNAVAILABLE,
            status.message,
            ((DETAILS_METADATA, status.SerializeToString()), ("hint", "x")),
        )

    fleet.nodes["n1"].stream[method] = refuse
    start = fleet.call(method)
    request = named("nodes/n1/domains/web")
    if method in (CONSOLE, UPLOAD):
        call = start()
        await call.write(request)
        error = await failure(call.read() if method == CONSOLE else call)
    else:
        call = start(request)
        error = await failure(call.read() if method == WATCH else call)
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert error.details() == "the node's own words"
    assert dict(error.trailing_metadata() or ())["hint"] == "x"
    assert details_of(error) == {"reason": "SERVICE_DRAINING", "metadata": {"state": "RUNNING"}, "retry": 3.0}


async def test_the_deadline_travels_and_ends_the_call_at_the_node(fleet: Rig) -> None:
    remaining: list[float | None] = []
    ended = asyncio.Event()

    async def slow(request: bytes, context: Context) -> bytes:
        remaining.append(context.time_remaining())
        try:
            await asyncio.sleep(30)
        finally:
            ended.set()
        return b""

    fleet.nodes["n1"].unary[GET] = slow
    error = await failure(fleet.call(GET)(named("nodes/n1/domains/web"), timeout=2))
    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert remaining[0] is not None
    # The header that carries it is rounded up.
    assert 0.5 < remaining[0] <= 2.1
    await asyncio.wait_for(ended.wait(), 5)
    remaining.clear()
    task = asyncio.ensure_future(fleet.call(GET)(named("nodes/n1/domains/web")))
    while not remaining:
        await asyncio.sleep(0.01)
    assert remaining == [None]
    task.cancel()


@pytest.mark.parametrize("method", [GET, WATCH, CONSOLE, UPLOAD])
async def test_cancelling_reaches_the_node(fleet: Rig, method: str) -> None:
    begun, ended = asyncio.Event(), asyncio.Event()

    async def hang(request: Any, context: Context) -> None:
        if method in (CONSOLE, UPLOAD):
            await context.read()
        begun.set()
        try:
            await asyncio.sleep(30)
        finally:
            ended.set()

    fleet.nodes["n1"].stream[method] = hang
    start = fleet.call(method)
    if method in (CONSOLE, UPLOAD):
        call = start()
        await call.write(named("nodes/n1/domains/web"))
    else:
        call = start(named("nodes/n1/domains/web"))
    task = asyncio.ensure_future(call.read() if method in (WATCH, CONSOLE) else call)
    await asyncio.wait_for(begun.wait(), 5)
    call.cancel()
    await asyncio.wait_for(ended.wait(), 5)
    with contextlib.suppress(asyncio.CancelledError, grpc.aio.AioRpcError):
        await task
    for _ in range(200):
        if not len(fleet.forwarder.open_calls):
            break
        await asyncio.sleep(0.01)
    assert len(fleet.forwarder.open_calls) == 0


async def test_messages_of_three_mebibytes_pass(fleet: Rig) -> None:
    fleet.nodes["n1"].unary[GET] = echo
    request = named("nodes/n1/domains/web", wire.delimited(900, bytes(3 << 20)))
    assert await fleet.call(GET)(request) == request


async def test_ping_pong_and_half_close(fleet: Rig) -> None:
    async def pong(requests: object, context: Context) -> None:
        count = 0
        while (message := await context.read()) is not grpc.aio.EOF:
            count += 1
            await context.write(b"pong " + message)
        # Goes on after the caller has closed its half.
        await context.write(b"after %d" % count)
        context.set_trailing_metadata((("count", str(count)),))

    fleet.nodes["n2"].stream[CONSOLE] = pong
    call = fleet.call(CONSOLE)()
    first = named("nodes/n2/domains/web")
    for message in (first, b"", b"x" * 100_000, named("nodes/n1/domains/other")):
        # Only the first message is looked at.
        await call.write(message)
        assert await call.read() == b"pong " + message
    await call.done_writing()
    assert await call.read() == b"after 4"
    assert await call.read() is grpc.aio.EOF
    assert dict(await call.trailing_metadata())["count"] == "4"


async def test_headers_come_before_the_first_message(fleet: Rig) -> None:
    go_on = asyncio.Event()

    async def stream(request: bytes, context: Context) -> None:
        await context.send_initial_metadata((("early", "1"),))
        await go_on.wait()
        await context.write(b"1")

    fleet.nodes["n1"].stream[WATCH] = stream
    call = fleet.call(WATCH)(named("nodes/n1"))
    assert dict(await asyncio.wait_for(call.initial_metadata(), 5))["early"] == "1"
    go_on.set()
    assert await call.read() == b"1"


async def test_an_upload_streams_and_ends_early_when_the_node_says_so(fleet: Rig) -> None:
    async def count(requests: object, context: Context) -> bytes:
        total = 0
        while (message := await context.read()) is not grpc.aio.EOF:
            total += len(message)
            if b"stop" in message:
                status = own_status(grpc.StatusCode.DATA_LOSS, "CHECKSUM_MISMATCH")
                await context.abort(
                    grpc.StatusCode.DATA_LOSS, status.message, ((DETAILS_METADATA, status.SerializeToString()),)
                )
        return str(total).encode()

    fleet.nodes["n1"].stream[UPLOAD] = count
    call = fleet.call(UPLOAD)()
    first = named("nodes/n1/pools/p/volumes/v")
    await call.write(first)
    for _ in range(20):
        await call.write(bytes(1 << 20))
    await call.done_writing()
    assert await call == str(len(first) + (20 << 20)).encode()

    call = fleet.call(UPLOAD)()
    await call.write(first)
    await call.write(b"stop")
    error = await failure(call)
    assert details_of(error)["reason"] == "CHECKSUM_MISMATCH"


async def test_a_slow_reader_holds_the_node_back(fleet: Rig) -> None:
    sent = 0

    async def flood(request: bytes, context: Context) -> None:
        nonlocal sent
        for _ in range(400):
            await context.write(bytes(1 << 20))
            sent += 1

    fleet.nodes["n1"].stream[DOWNLOAD] = flood
    call = fleet.call(DOWNLOAD)(named("nodes/n1/pools/p/volumes/v"))
    assert len(await call.read()) == 1 << 20
    stable = -1
    while stable != sent:
        stable = sent
        await asyncio.sleep(0.4)
    # What is under way stands in the flow control windows of two connections, not in the gateway.
    assert sent < 60
    call.cancel()


async def test_volume_data_have_a_connection_of_their_own(fleet: Rig) -> None:
    get, watch = "virtfleet.storage.v1.VolumeService.GetVolume", "virtfleet.storage.v1.WatchService.WatchResources"
    peers: dict[str, str] = {}
    node = fleet.nodes["n1"]
    for method in (get, watch, UPLOAD, DOWNLOAD):

        async def note(request: Any, context: Context, method: str = method) -> bytes | None:
            peers[method] = context.peer()
            return None if method in (watch, DOWNLOAD) else b""

        node.stream[method] = note
    request = named("nodes/n1/pools/p/volumes/v")
    await fleet.call(get)(request)
    assert await fleet.call(watch)(named("nodes/n1")).read() is grpc.aio.EOF
    assert await fleet.call(DOWNLOAD)(request).read() is grpc.aio.EOF
    upload = fleet.call(UPLOAD)()
    await upload.write(request)
    await upload.done_writing()
    await upload
    assert peers[get] == peers[watch]
    assert peers[UPLOAD] == peers[DOWNLOAD] != peers[get]


# What is refused


CASES = [
    ("unknown node", GET, named("nodes/n9/domains/web"), (), grpc.StatusCode.NOT_FOUND, "NODE_UNKNOWN"),
    ("no name", GET, b"", (), grpc.StatusCode.INVALID_ARGUMENT, "FIELD_REQUIRED"),
    ("other collection", GET, named("pools/x"), (), grpc.StatusCode.INVALID_ARGUMENT, "NAME_MALFORMED"),
    ("upper case", GET, named("nodes/N1/domains/web"), (), grpc.StatusCode.INVALID_ARGUMENT, "NAME_MALFORMED"),
    ("look-alike", GET, named("nodes/n\u0661/domains/web"), (), grpc.StatusCode.INVALID_ARGUMENT, "NAME_MALFORMED"),
    ("over-long", GET, named("nodes/n1/domains/" + "a" * 2000), (), grpc.StatusCode.INVALID_ARGUMENT, "NAME_MALFORMED"),
    ("newline", GET, named("nodes/n1\n/domains/web"), (), grpc.StatusCode.INVALID_ARGUMENT, "NAME_MALFORMED"),
    (
        "field twice",
        GET,
        named("nodes/n1/domains/a") + named("nodes/n2/domains/a"),
        (),
        grpc.StatusCode.INVALID_ARGUMENT,
        "NAME_MALFORMED",
    ),
    ("not UTF-8", GET, wire.delimited(1, b"nodes/n1/\xff"), (), grpc.StatusCode.INVALID_ARGUMENT, "NAME_MALFORMED"),
    ("cut", GET, b"\x0a\x7fnodes", (), grpc.StatusCode.INVALID_ARGUMENT, "DOCUMENT_INVALID"),
    (
        "cut behind it",
        GET,
        named("nodes/n1/domains/web", b"\x12\x7fx"),
        (),
        grpc.StatusCode.INVALID_ARGUMENT,
        "DOCUMENT_INVALID",
    ),
    (
        "mismatch",
        GET,
        named("nodes/n1/domains/web"),
        (("x-virtfleet-node", "n2"),),
        grpc.StatusCode.INVALID_ARGUMENT,
        "FIELD_CONFLICT",
    ),
    (
        "mismatch of the service",
        GET,
        named("nodes/n1/domains/web"),
        (("x-virtfleet-node", "n1/storage"),),
        grpc.StatusCode.INVALID_ARGUMENT,
        "FIELD_CONFLICT",
    ),
    (
        "metadata malformed",
        GET,
        named("nodes/n1/domains/web"),
        (("x-virtfleet-node", "n1/"),),
        grpc.StatusCode.INVALID_ARGUMENT,
        "NAME_MALFORMED",
    ),
    ("all nodes", CREATE, named("nodes/-"), (), grpc.StatusCode.INVALID_ARGUMENT, "NAME_MALFORMED"),
    (
        "no such service",
        SERVER,
        named("nodes/n1/services/sound"),
        (),
        grpc.StatusCode.INVALID_ARGUMENT,
        "NAME_MALFORMED",
    ),
    ("not allowed", CREATE, named("nodes/n1"), (), grpc.StatusCode.PERMISSION_DENIED, "PERMISSION_MISSING"),
]


@pytest.mark.parametrize(
    ("_why", "method", "request_bytes", "metadata", "code", "reason"), CASES, ids=[c[0] for c in CASES]
)
async def test_what_cannot_be_routed_is_refused_at_once(
    fleet: Rig,
    _why: str,
    method: str,
    request_bytes: bytes,
    metadata: tuple[tuple[str, str], ...],
    code: grpc.StatusCode,
    reason: str,
) -> None:
    reached: list[bytes] = []

    async def note(request: bytes, context: Context) -> bytes:
        reached.append(request)
        return b""

    for node in fleet.nodes.values():
        node.unary[method] = note
    fleet.gate.passport.forbidden = "domains.create"
    error = await failure(fleet.call(method)(request_bytes, metadata=metadata, timeout=10))
    assert error.code() is code
    assert details_of(error)["reason"] == reason
    assert not reached
    assert (method, reason) in fleet.gate.refusals


@pytest.mark.parametrize("values", [(b"forged",), (b"forged", b"twice")], ids=["one", "two"])
@pytest.mark.parametrize("method", [GET, WATCH, CONSOLE, UPLOAD])
async def test_a_forged_caller_is_refused_in_every_kind_of_call(
    fleet: Rig, method: str, values: tuple[bytes, ...]
) -> None:
    reached: list[object] = []

    async def note(request: object, context: Context) -> None:
        reached.append(request)

    fleet.nodes["n1"].stream[method] = note
    metadata = tuple((CALLER_METADATA, value) for value in values)
    request = named("nodes/n1/domains/web")
    if method in (CONSOLE, UPLOAD):
        call = fleet.call(method)(metadata=metadata)
        await call.write(request)
        error = await failure(call.read() if method == CONSOLE else call)
    else:
        call = fleet.call(method)(request, metadata=metadata)
        error = await failure(call.read() if method == WATCH else call)
    assert (error.code(), details_of(error)["reason"]) == (grpc.StatusCode.UNAUTHENTICATED, "CREDENTIALS_INVALID")
    assert not reached
    assert fleet.gate.refusals == [(method, "CREDENTIALS_INVALID")]


async def test_a_stream_without_a_message_is_refused(fleet: Rig) -> None:
    call = fleet.call(UPLOAD)()
    await call.done_writing()
    error = await failure(call)
    assert (error.code(), details_of(error)["reason"]) == (grpc.StatusCode.INVALID_ARGUMENT, "FIELD_REQUIRED")


async def test_a_cordoned_node_takes_no_new_domains(fleet: Rig) -> None:
    fleet.nodes["n1"].unary.update({CREATE: echo, GET: echo})
    fleet.roster.closed.add("n1")
    error = await failure(fleet.call(CREATE)(named("nodes/n1")))
    assert (error.code(), details_of(error)["reason"]) == (grpc.StatusCode.FAILED_PRECONDITION, "NODE_CORDONED")
    assert await fleet.call(GET)(named("nodes/n1/domains/web"))
    fleet.roster.closed.clear()
    assert await fleet.call(CREATE)(named("nodes/n1"))


async def test_a_cordoned_node_takes_no_new_domain_by_a_change_either(fleet: Rig) -> None:
    fleet.nodes["n1"].unary.update({UPDATE: echo})
    fleet.roster.closed.add("n1")
    change = domain_pb2.UpdateDomainRequest(domain=domain_pb2.Domain(name="nodes/n1/domains/web"))
    assert await fleet.call(UPDATE)(change.SerializeToString())
    change.allow_missing = True
    error = await failure(fleet.call(UPDATE)(change.SerializeToString()))
    assert (error.code(), details_of(error)["reason"]) == (grpc.StatusCode.FAILED_PRECONDITION, "NODE_CORDONED")
    fleet.roster.known.add(change.domain.name)
    assert await fleet.call(UPDATE)(change.SerializeToString()), "one that is there is changed"


# Nodes that are away


async def test_a_node_that_is_away_is_told_at_once_and_comes_back(fleet: Rig) -> None:
    node = fleet.nodes["n1"]
    node.unary[GET] = echo
    request = named("nodes/n1/domains/web")
    assert await fleet.call(GET)(request)
    await node.stop()
    started = time.monotonic()
    error = await failure(fleet.call(GET)(request, timeout=30))
    details = details_of(error)
    assert (error.code(), details["reason"]) == (grpc.StatusCode.UNAVAILABLE, "NODE_UNREACHABLE")
    assert details["metadata"]["sent"] == "false"
    assert details["metadata"]["node"] == "nodes/n1"
    assert details["retry"] is not None
    assert time.monotonic() - started < 2
    # The other node is not concerned.
    fleet.nodes["n2"].unary[GET] = echo
    assert await fleet.call(GET)(named("nodes/n2/domains/web"))
    await node.start(node.port)
    deadline = time.monotonic() + 15
    while True:
        try:
            assert await fleet.call(GET)(request, timeout=5) == request
            break
        except grpc.aio.AioRpcError:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.1)


@pytest.mark.parametrize("method", [GET, WATCH, CONSOLE, UPLOAD])
async def test_a_node_that_dies_in_mid_call_may_have_done_it(fleet: Rig, method: str) -> None:
    begun = asyncio.Event()

    async def hang(request: Any, context: Context) -> None:
        begun.set()
        await asyncio.sleep(30)

    node = fleet.nodes["n1"]
    node.stream[method] = hang
    start = fleet.call(method)
    if method in (CONSOLE, UPLOAD):
        call = start()
        await call.write(named("nodes/n1/domains/web"))
    else:
        call = start(named("nodes/n1/domains/web"))
    task = asyncio.ensure_future(call.read() if method in (WATCH, CONSOLE) else call)
    await asyncio.wait_for(begun.wait(), 5)
    await node.stop()
    error = await failure(asyncio.wait_for(task, 10))
    details = details_of(error)
    assert (error.code(), details["reason"]) == (grpc.StatusCode.UNAVAILABLE, "NODE_UNREACHABLE")
    assert details["metadata"]["sent"] == "true"


async def test_a_call_that_a_stopping_node_never_took_is_not_said_to_be_cancelled(fleet: Rig) -> None:
    async def dropped(request: bytes, context: Context) -> bytes:
        # What gRPC says of calls that wait inside a server when it stops.
        await context.abort(grpc.StatusCode.CANCELLED, "CANCELLED")

    fleet.nodes["n1"].unary[GET] = dropped
    error = await failure(fleet.call(GET)(named("nodes/n1/domains/web"), timeout=5))
    assert (error.code(), details_of(error)["reason"]) == (grpc.StatusCode.UNAVAILABLE, "NODE_UNREACHABLE")


async def test_a_denied_caller_is_cut_off_from_a_call_that_lasts(fleet: Rig) -> None:
    arrived, left = asyncio.Event(), asyncio.Event()

    async def last(request: Any, context: Context) -> bytes:
        arrived.set()
        try:
            await asyncio.Event().wait()
        finally:
            left.set()
        return b""

    from virtfleet_service.errors import CertificateRevoked

    wait = "google.longrunning.Operations.WaitOperation"
    fleet.nodes["n1"].unary[wait] = last
    call = asyncio.ensure_future(fleet.call(wait)(named("nodes/n1/services/compute/operations/op1"), timeout=20))
    await asyncio.wait_for(arrived.wait(), 5)
    fleet.forwarder.sweep()
    assert not call.done()
    fleet.gate.passport.denied = CertificateRevoked("denied", subject="spiffe://virtfleet.dev/user/test")
    fleet.forwarder.sweep()
    error = await failure(asyncio.wait_for(call, 5))
    assert (error.code(), details_of(error)["reason"]) == (grpc.StatusCode.UNAUTHENTICATED, "CERTIFICATE_REVOKED")
    await asyncio.wait_for(left.wait(), 5)


async def test_a_denied_caller_is_cut_off_from_its_open_streams(fleet: Rig) -> None:
    async def tick(request: Any, context: Context) -> None:
        while True:
            await context.write(b"tick")
            await asyncio.sleep(0.05)

    from virtfleet_service.errors import CertificateRevoked

    fleet.nodes["n1"].stream[WATCH] = tick
    call = fleet.call(WATCH)(named("nodes/n1"))
    assert await call.read() == b"tick"
    assert fleet.forwarder.open_calls.sweep() == 0
    fleet.gate.passport.denied = CertificateRevoked("denied", subject="spiffe://virtfleet.dev/user/test")
    assert fleet.forwarder.open_calls.sweep() == 1

    async def drain() -> None:
        while await call.read() is not grpc.aio.EOF:
            pass

    error = await failure(asyncio.wait_for(drain(), 5))
    assert (error.code(), details_of(error)["reason"]) == (grpc.StatusCode.UNAUTHENTICATED, "CERTIFICATE_REVOKED")
