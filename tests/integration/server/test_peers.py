"""Calls between services of a node: the caller and its deadline travel, errors come back as what they were."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.integration.server import rig as rigs
from tests.integration.server.rig import running
from virtfleet.compute.v1 import domain_pb2
from virtfleet.node.v1 import attachment_pb2
from virtfleet_service import errors
from virtfleet_service.authorization import Authorizer
from virtfleet_service.call import Call, Caller
from virtfleet_service.methods import facts_of
from virtfleet_service.peers import Peer

ATTACH = "AttachmentService.AttachVolume"
DOMAINS = domain_pb2.DESCRIPTOR.services_by_name["DomainService"]
REQUEST = attachment_pb2.AttachVolumeRequest(
    name="nodes/n1/pools/p/volumes/v",
    domain_uid="6ff0a01c-53f3-4c5c-9bb6-0f7bd16c2f1d",
    device_id="root",
    mode=attachment_pb2.ATTACHMENT_MODE_EXCLUSIVE,
)


class Deadline:
    """Stands for the transport of a call: what time it leaves."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def time_remaining(self) -> float:
        return self._seconds

    def invocation_metadata(self) -> tuple[tuple[str, str | bytes], ...]:
        return ()


def call_of(method: str, caller: Caller, seconds: float = 100.0) -> Call:
    facts = facts_of(DOMAINS.methods_by_name[method])
    return Call(facts, caller, Authorizer(), node="n1", context=Deadline(seconds))


def peer(rig: rigs.Rig) -> Peer:
    return Peer(rig.server.socket_dir / "peer.sock", service="compute", node="n1")


async def test_the_caller_travels_with_its_limits(tmp_path: Path) -> None:
    async with running(tmp_path) as rig, peer(rig) as storage:
        caller = Caller("carol", ("operator",), "tls", "gateway", ("nodes/n1/pools/p/volumes/",))
        answer = await storage.call(
            ATTACH, REQUEST, attachment_pb2.AttachVolumeResponse, call_of("GetDomain", caller, 7.0)
        )
        assert answer.attachment_id == "1"
        seen = rig.attachments.calls[0].caller
        assert (seen.subject, seen.roles, seen.via, seen.name_prefixes) == (
            "carol",
            ("operator",),
            "gateway",
            ("nodes/n1/pools/p/volumes/",),
        )
        left = rig.attachments.remaining[0]
        assert left is not None
        assert 6 < left <= 7.1
        outside = Caller("carol", ("operator",), "tls", "", ("nodes/n1/pools/q/",))
        with pytest.raises(errors.PermissionMissing) as caught:
            await storage.call(ATTACH, REQUEST, attachment_pb2.AttachVolumeResponse, call_of("GetDomain", outside))
        assert caught.value.metadata["permission"] == "volumes.attach"
        assert caught.value.resource == "nodes/n1/pools/p/volumes/v"


async def test_the_work_of_an_operation_does_not_end_with_the_callers_deadline(tmp_path: Path) -> None:
    async with running(tmp_path) as rig, peer(rig) as storage:
        call = call_of("StartDomain", Caller("carol", ("operator",)), 0.0)
        await storage.call(ATTACH, REQUEST, attachment_pb2.AttachVolumeResponse, call, timeout_seconds=30)
        left = rig.attachments.remaining[0]
        assert left is not None
        # gRPC sends long deadlines rounded up.
        assert 20 < left <= 31


async def test_a_service_calls_for_itself(tmp_path: Path) -> None:
    async with running(tmp_path) as rig, peer(rig) as storage:
        await storage.call(ATTACH, REQUEST, attachment_pb2.AttachVolumeResponse)
        assert rig.attachments.calls[0].caller.subject == "service:n1/compute"


async def test_errors_come_back_as_they_were(tmp_path: Path) -> None:
    async with running(tmp_path) as rig, peer(rig) as storage:
        rig.attachments.fail = errors.ResourceInUse(
            "held", resource="nodes/n1/pools/p/volumes/v", retry_delay_seconds=2, holder="nodes/n1/domains/a"
        )
        with pytest.raises(errors.ResourceInUse) as caught:
            await storage.call(ATTACH, REQUEST, attachment_pb2.AttachVolumeResponse)
        assert caught.value.message == "held"
        assert caught.value.metadata == {"holder": "nodes/n1/domains/a"}
        assert caught.value.resource == "nodes/n1/pools/p/volumes/v"
        assert caught.value.retry_delay_seconds == 2
        rig.attachments.fail = RuntimeError("of the peer")
        with pytest.raises(errors.Unexpected):
            await storage.call(ATTACH, REQUEST, attachment_pb2.AttachVolumeResponse)


async def test_a_peer_that_is_away_is_unreachable_and_is_found_when_it_comes_back(tmp_path: Path) -> None:
    rig = rigs.Rig(tmp_path)
    async with peer(rig) as storage:
        with pytest.raises(errors.BackendUnreachable) as caught:
            await storage.call(ATTACH, REQUEST, attachment_pb2.AttachVolumeResponse)
        assert caught.value.retry_delay_seconds == 1
        for _ in range(2):
            async with rig.make():
                async with asyncio.timeout(10):
                    while True:
                        try:
                            await storage.call(ATTACH, REQUEST, attachment_pb2.AttachVolumeResponse)
                            break
                        except errors.BackendUnreachable:
                            await asyncio.sleep(0.05)
            with pytest.raises(errors.BackendUnreachable):
                await storage.call(ATTACH, REQUEST, attachment_pb2.AttachVolumeResponse)


async def test_a_peer_that_hangs_costs_its_deadline_and_no_more(tmp_path: Path) -> None:
    async with running(tmp_path) as rig, peer(rig) as storage:
        gone = asyncio.Event()

        async def hang(_request: object, _call: Call) -> None:
            try:
                await asyncio.sleep(60)
            finally:
                gone.set()

        rig.attachments.act = hang
        with pytest.raises(errors.OperationTimedOut):
            await storage.call(ATTACH, REQUEST, attachment_pb2.AttachVolumeResponse, timeout_seconds=0.2)
        async with asyncio.timeout(5):
            await gone.wait()


async def test_a_cancelled_caller_cancels_the_call_at_the_peer(tmp_path: Path) -> None:
    async with running(tmp_path) as rig, peer(rig) as storage:
        began, gone = asyncio.Event(), asyncio.Event()

        async def hang(_request: object, _call: Call) -> None:
            began.set()
            try:
                await asyncio.sleep(60)
            finally:
                gone.set()

        rig.attachments.act = hang
        task = asyncio.create_task(storage.call(ATTACH, REQUEST, attachment_pb2.AttachVolumeResponse))
        async with asyncio.timeout(5):
            await began.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await gone.wait()
