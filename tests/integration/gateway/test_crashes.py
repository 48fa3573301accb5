"""The gateway killed between what it has recorded and what it tells: asked again, it has done each thing once."""

from __future__ import annotations

import asyncio
import datetime as dt
import os
import sqlite3
import sys
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from google.longrunning import operations_pb2, operations_pb2_grpc
from google.protobuf import field_mask_pb2

from tests.integration.gateway.nodes import details_of
from tests.ports import free_port
from tools import toml
from tools.paths import ROOT
from virtfleet.fleet.v1 import enrollment_pb2, enrollment_pb2_grpc, node_pb2, node_pb2_grpc
from virtfleet_gateway.authority import Authority, new_request

START_SECONDS = 30


class Gateway:
    """A gateway in a process of its own, to be killed; its store is read past it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.listen, self.door = (f"127.0.0.1:{free_port()}" for _ in range(2))
        self._process: asyncio.subprocess.Process | None = None
        authority = Authority.create(folder / "authority")
        key, request = new_request("root")
        pem = authority.issue_user(request, "root", ["admin"], dt.timedelta(hours=1)).pem
        self._credentials = grpc.ssl_channel_credentials(authority.certificate_pem, key, pem)
        self._anonymous = grpc.ssl_channel_credentials(authority.certificate_pem)
        self._channels: list[grpc.aio.Channel] = []
        toml.write(
            folder / "gateway.toml",
            {
                "name": "g1",
                "state_dir": str(folder / "state"),
                "run_dir": str(folder / "run"),
                "authority_dir": str(folder / "authority"),
                "listen": self.listen,
                "enrollment_listen": self.door,
            },
        )

    async def start(self, failpoint: str = "") -> None:
        """Start it and connect."""
        command = (sys.executable, "-m", "virtfleet_gateway", "--config", str(self.folder / "gateway.toml"))
        with (self.folder / "log").open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *command, cwd=ROOT, env={**os.environ, "VIRTFLEET_FAILPOINT": failpoint}, stdout=log, stderr=log
            )
        for channel in self._channels:
            await channel.close()
        options = [("grpc.use_local_subchannel_pool", 1)]
        self._channels = [
            grpc.aio.secure_channel(self.listen, self._credentials, options),
            grpc.aio.secure_channel(self.door, self._anonymous, options),
        ]
        async with asyncio.timeout(START_SECONDS):
            await self._channels[0].channel_ready()
        self.enrollment: Any = enrollment_pb2_grpc.EnrollmentServiceStub(self._channels[0])
        self.nodes: Any = node_pb2_grpc.NodeServiceStub(self._channels[0])
        self.operations: Any = operations_pb2_grpc.OperationsStub(self._channels[0])  # type: ignore[no-untyped-call]  # no types
        self.anonymous: Any = enrollment_pb2_grpc.EnrollmentServiceStub(self._channels[1])

    async def dies_in(self, failpoint: str, call: Callable[[], Awaitable[object]]) -> None:
        """Start it anew with an armed place, have it die in a call, and start it again without."""
        await self.end()
        await self.start(failpoint)
        with pytest.raises(grpc.aio.AioRpcError) as cut:
            await call()
        assert cut.value.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.UNKNOWN), cut.value
        assert self._process is not None
        assert await asyncio.wait_for(self._process.wait(), 10) == -9
        await self.start()

    async def end(self) -> None:
        """Kill it."""
        if self._process is not None and self._process.returncode is None:
            self._process.kill()
            await self._process.wait()

    async def close(self) -> None:
        """End the process and the connections."""
        await self.end()
        for channel in self._channels:
            await channel.close()

    def stored(self, kind: str) -> dict[str, bytes]:
        """Return the resources of a kind as they are in the file."""
        with closing(sqlite3.connect(f"file:{self.folder}/state/gateway.db?mode=ro", uri=True)) as store:
            return dict(store.execute("SELECT name, body FROM resources WHERE kind = ?", (kind,)))

    def certificates(self) -> dict[str, enrollment_pb2.Certificate]:
        """Return the certificates in the store, by identity."""
        found = map(enrollment_pb2.Certificate.FromString, self.stored("certificate").values())
        return {one.status.identity: one for one in found}

    def denied(self) -> set[str]:
        """Return the serial numbers in the file of the denial list."""
        file = self.folder / "state/identity/denied"
        signed = enrollment_pb2.SignedDenialList.FromString(file.read_bytes() if file.exists() else b"")
        return {one.serial_number for one in enrollment_pb2.DenialList.FromString(signed.content).certificates}


@pytest.fixture
async def gateway(tmp_path: Path) -> AsyncIterator[Gateway]:
    made = Gateway(tmp_path)
    await made.start()
    try:
        yield made
    finally:
        await made.close()


def enrolment(token: str, key_request: bytes) -> enrollment_pb2.EnrollNodeRequest:
    service = enrollment_pb2.ServiceEnrollment(
        service="compute", certificate_request=key_request.decode(), endpoint="127.0.0.1:9"
    )
    return enrollment_pb2.EnrollNodeRequest(name="nodes/n1", token=token, services=[service])


async def token_of(gateway: Gateway) -> str:
    request = enrollment_pb2.CreateJoinTokenRequest()
    request.join_token.spec.node = "nodes/n1"
    return str((await gateway.enrollment.CreateJoinToken(request, timeout=10)).token)


async def admitted(gateway: Gateway) -> enrollment_pb2.EnrollNodeResponse:
    _, request = new_request("compute")
    answer: enrollment_pb2.EnrollNodeResponse = await gateway.anonymous.EnrollNode(
        enrolment(await token_of(gateway), request), timeout=10
    )
    return answer


async def test_an_admission_that_was_cut_is_told_to_whoever_asks_the_same(gateway: Gateway) -> None:
    token = await token_of(gateway)
    _, key_request = new_request("compute")
    request = enrolment(token, key_request)
    await gateway.dies_in("enrollment.recorded", lambda: gateway.anonymous.EnrollNode(request, timeout=10))
    assert list(gateway.stored("node")) == ["nodes/n1"]
    before = gateway.certificates()
    answer = await gateway.anonymous.EnrollNode(request, timeout=10)
    [issued] = answer.certificates
    serial = x509.load_pem_x509_certificate(issued.certificate_chain.encode()).serial_number
    assert gateway.certificates() == before, "nothing was issued a second time"
    assert before[issued.identity].name == f"certificates/c{serial:x}"
    # And to nobody else.
    _, other = new_request("compute")
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await gateway.anonymous.EnrollNode(enrolment(token, other), timeout=10)
    assert (refused.value.code(), details_of(refused.value)["reason"]) == (
        grpc.StatusCode.UNAUTHENTICATED,
        "JOIN_TOKEN_INVALID",
    )
    assert gateway.certificates() == before


async def test_a_certificate_is_issued_once(gateway: Gateway) -> None:
    _, key_request = new_request("eve")
    request = enrollment_pb2.IssueUserCertificateRequest(
        user="eve", roles=["viewer"], certificate_request=key_request.decode(), request_id="once"
    )
    await gateway.dies_in("requests.recorded", lambda: gateway.enrollment.IssueUserCertificate(request, timeout=10))
    answer = await gateway.enrollment.IssueUserCertificate(request, timeout=10)
    found = [one for one in gateway.stored("certificate").values() if b"/user/eve" in one]
    assert len(found) == 1
    assert enrollment_pb2.Certificate.FromString(found[0]).name == answer.certificate.certificate
    request.user = "mallory"
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await gateway.enrollment.IssueUserCertificate(request, timeout=10)
    assert (refused.value.code(), details_of(refused.value)["reason"]) == (
        grpc.StatusCode.INVALID_ARGUMENT,
        "REQUEST_ID_REUSED",
    )
    assert not [one for one in gateway.stored("certificate").values() if b"mallory" in one]


async def test_a_revocation_that_was_recorded_holds_although_nobody_was_told(gateway: Gateway) -> None:
    node = (await admitted(gateway)).certificates[0]
    serial = node.certificate.removeprefix("certificates/c")
    request = enrollment_pb2.RevokeCertificateRequest(name=node.certificate, request_id="once")
    await gateway.dies_in("requests.recorded", lambda: gateway.enrollment.RevokeCertificate(request, timeout=10))
    # The process died before it wrote the list to its file: it is there before the next one serves.
    assert gateway.denied() == {serial}
    number = (await gateway.enrollment.GetTrustBundle(enrollment_pb2.GetTrustBundleRequest())).denial_list_number
    answer = await gateway.enrollment.RevokeCertificate(request, timeout=10)
    assert answer.status.state == enrollment_pb2.CERTIFICATE_STATE_REVOKED
    bundle = await gateway.enrollment.GetTrustBundle(enrollment_pb2.GetTrustBundleRequest())
    assert bundle.denial_list_number == number, "it was not denied twice"
    assert gateway.denied() == {serial}


async def test_a_change_of_a_node_is_made_once(gateway: Gateway) -> None:
    await admitted(gateway)
    before = node_pb2.Node.FromString(gateway.stored("node")["nodes/n1"])
    request = node_pb2.UpdateNodeRequest(
        node=node_pb2.Node(name="nodes/n1", labels={"rack": "r1"}),
        update_mask=field_mask_pb2.FieldMask(paths=["labels"]),
        request_id="once",
    )
    await gateway.dies_in("requests.recorded", lambda: gateway.nodes.UpdateNode(request, timeout=10))
    answer = await gateway.nodes.UpdateNode(request, timeout=10)
    after = node_pb2.Node.FromString(gateway.stored("node")["nodes/n1"])
    assert answer.generation == after.generation == before.generation + 1
    assert after.labels == {"rack": "r1"}


@pytest.mark.parametrize(
    "failpoint", ["operations.accepted", "certificates.expelled", "operations.worked", "operations.recorded"]
)
async def test_the_removal_of_a_node_is_finished(gateway: Gateway, failpoint: str) -> None:
    issued = (await admitted(gateway)).certificates[0].certificate
    request = node_pb2.DeleteNodeRequest(name="nodes/n1", request_id="once")
    await gateway.dies_in(failpoint, lambda: gateway.nodes.DeleteNode(request, timeout=10))
    assert gateway.stored("node") == {}
    assert gateway.denied() == {issued.removeprefix("certificates/c")}
    listed = await gateway.operations.ListOperations(operations_pb2.ListOperationsRequest(name="operations"))
    [operation] = listed.operations
    assert operation.done
    assert not operation.HasField("error"), operation
    again = await gateway.nodes.DeleteNode(request, timeout=10)
    assert again.name == operation.name
    assert Counter(gateway.stored("join_token").keys()).total() == 1
    await admitted(gateway)
    assert list(gateway.stored("node")) == ["nodes/n1"]


async def test_a_join_token_whose_answer_was_lost_is_no_second_one(gateway: Gateway) -> None:
    """Its secret was in the answer alone and stands nowhere: who asks again is told so, and may take it back."""
    request = enrollment_pb2.CreateJoinTokenRequest(request_id="once", join_token_id="t1")
    request.join_token.spec.node = "nodes/n1"
    await gateway.dies_in("requests.recorded", lambda: gateway.enrollment.CreateJoinToken(request, timeout=10))
    with pytest.raises(grpc.aio.AioRpcError) as told:
        await gateway.enrollment.CreateJoinToken(request, timeout=10)
    assert (told.value.code(), details_of(told.value)["reason"]) == (grpc.StatusCode.ALREADY_EXISTS, "RESOURCE_EXISTS")
    assert list(gateway.stored("join_token")) == ["joinTokens/t1"]
    await gateway.enrollment.DeleteJoinToken(enrollment_pb2.DeleteJoinTokenRequest(name="joinTokens/t1"), timeout=10)
    assert gateway.stored("join_token") == {}
