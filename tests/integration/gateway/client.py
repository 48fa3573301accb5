"""What tests do with a fleet, and a client of its watch that keeps what it is told."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any, Protocol

import grpc
import grpc.aio
import pytest

from virtfleet.compute.v1 import domain_pb2, domain_pb2_grpc
from virtfleet.compute.v1 import watch_pb2 as compute_watch
from virtfleet.compute.v1 import watch_pb2_grpc as compute_watch_grpc
from virtfleet.type.v1 import watch_pb2


class Connected(Protocol):
    """Is a fleet with a connection to its gateway."""

    channel: grpc.aio.Channel


async def create(fleet: Connected, node: str, *ids: str, labels: dict[str, str] | None = None) -> None:
    domains = domain_pb2_grpc.DomainServiceStub(fleet.channel)
    for id_ in ids:
        domain = domain_pb2.Domain(display_name=f"domain {id_}", labels=labels or {})
        domain.spec.title = "a title"
        await domains.CreateDomain(domain_pb2.CreateDomainRequest(parent=f"nodes/{node}", domain_id=id_, domain=domain))


async def list_all(fleet: Connected, **fields: Any) -> domain_pb2.ListDomainsResponse:
    domains = domain_pb2_grpc.DomainServiceStub(fleet.channel)
    return await domains.ListDomains(domain_pb2.ListDomainsRequest(parent="nodes/-", **fields))


def names(answer: Any) -> list[str]:
    return [domain.name for domain in answer.domains]


async def failure(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


class Watcher:
    """Keeps what a client of the fleet's watch would know."""

    def __init__(self, fleet: Connected, **fields: Any) -> None:
        self.known: dict[str, domain_pb2.Domain] = {}
        self.history: list[tuple[str, str, int]] = []
        self.events: list[compute_watch.Event] = []
        self.moves: list[tuple[str, str, str]] = []
        self.statuses: list[tuple[str, int]] = []
        self.token = ""
        self.snapshot_ended = False
        self.closing = ""
        self._resyncing: dict[str, set[str]] = {}
        request = compute_watch.WatchResourcesRequest(
            parent="nodes/-", resource_types=[compute_watch.RESOURCE_TYPE_DOMAIN], **fields
        )
        request.bookmark_interval.FromSeconds(1)
        self.call = compute_watch_grpc.WatchServiceStub(fleet.channel).WatchResources(request)
        self.news = asyncio.Event()
        self.error: grpc.aio.AioRpcError | None = None
        self.task = asyncio.ensure_future(self._run())

    async def _run(self) -> None:
        try:
            async for response in self.call:
                self._take(response)
        except grpc.aio.AioRpcError as error:
            self.error = error
        except asyncio.CancelledError:
            return
        finally:
            self.news.set()

    def _take(self, response: compute_watch.WatchResourcesResponse) -> None:
        assert response.resume_token
        self._take_changes(response)
        self._take_status(response)
        if response.HasField("snapshot_end"):
            self.snapshot_ended = True
        if response.HasField("bookmark") and response.bookmark.HasField("closing"):
            self.closing = response.bookmark.closing.message
        self.token = response.resume_token
        self.news.set()

    def _take_changes(self, response: compute_watch.WatchResourcesResponse) -> None:
        for change in response.changes:
            kind = change.WhichOneof("kind")
            if kind == "put":
                domain = change.put.domain
                self.known[domain.name] = domain
                self.history.append(("put", domain.name, domain.generation))
                for seen in self._resyncing.values():
                    seen.add(domain.name)
            elif kind == "delete":
                self.known.pop(change.delete.name, None)
                self.history.append(("delete", change.delete.name, 0))
            elif kind == "moved":
                self.moves.append((change.moved.uid, change.moved.old_name, change.moved.new_name))
                self.history.append(("moved", change.moved.new_name, 0))
                if change.moved.old_name in self.known:
                    self.known[change.moved.new_name] = self.known.pop(change.moved.old_name)
            elif kind == "event":
                self.events.append(change.event)

    def _take_status(self, response: compute_watch.WatchResourcesResponse) -> None:
        if response.HasField("source_status"):
            node, state = response.source_status.node, response.source_status.state
            self.statuses.append((node, state))
            if state == watch_pb2.SOURCE_STATE_RESYNCING:
                self._resyncing[node] = set()
            elif node in self._resyncing and state == watch_pb2.SOURCE_STATE_LIVE:
                seen = self._resyncing.pop(node)
                for name in [name for name in self.known if name.startswith(f"{node}/") and name not in seen]:
                    del self.known[name]

    @property
    def resyncing(self) -> bool:
        """Tell whether a part is being told anew; a token from within it begins that part again."""
        return bool(self._resyncing)

    async def until(self, good: Any, seconds: float = 15) -> None:
        async with asyncio.timeout(seconds):
            while not good(self):
                assert self.error is None, self.error
                self.news.clear()
                if good(self):
                    return
                await self.news.wait()

    async def stop(self) -> str:
        self.call.cancel()
        self.task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self.task
        return self.token
