"""A compute service for tests: in this process or one of its own, and a client on its local sockets."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import grpc
from google.longrunning import operations_pb2, operations_pb2_grpc
from google.protobuf import duration_pb2, empty_pb2, field_mask_pb2
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from virtfleet.compute.v1 import (
    capability_pb2_grpc,
    console_pb2_grpc,
    domain_pb2,
    domain_pb2_grpc,
    guest_agent_pb2_grpc,
    host_pb2_grpc,
    stats_pb2_grpc,
    watch_pb2,
    watch_pb2_grpc,
)
from virtfleet.type.v1 import operation_pb2
from virtfleet_compute import app
from virtfleet_compute.drivers.test.driver import TestDriver
from virtfleet_compute.drivers.test.settings import Fault
from virtfleet_compute.settings import ComputeSettings

NODE = "n1"
PARENT = f"nodes/{NODE}"
READY_SECONDS = 20

M = TypeVar("M", bound=Message)

State = domain_pb2.DomainState
Reason = domain_pb2.DomainStateReason


class Refused(Exception):
    """An error that the service answered with."""

    def __init__(self, status: status_pb2.Status) -> None:
        super().__init__(f"{status.code} {status.message}")
        self.code = status.code
        info, bad, failure = (
            error_details_pb2.ErrorInfo(),
            error_details_pb2.BadRequest(),
            error_details_pb2.PreconditionFailure(),
        )
        for detail in status.details:
            for kind in (info, bad, failure):
                detail.Unpack(kind)
        self.reason = info.reason
        self.metadata = dict(info.metadata)
        self.fields = [violation.field for violation in bad.field_violations]
        self.subjects = [violation.subject for violation in failure.violations]


def refusal(error: grpc.aio.AioRpcError) -> Refused:
    for key, value in error.trailing_metadata() or ():
        if key == "grpc-status-details-bin":
            return Refused(status_pb2.Status.FromString(value if isinstance(value, bytes) else value.encode()))
    raise error


class Client:
    """Calls the service on one of its sockets."""

    def __init__(self, socket: Path) -> None:
        self.channel = grpc.aio.insecure_channel(
            f"unix:{socket}", options=[("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", -1)]
        )
        self.domains: Any = domain_pb2_grpc.DomainServiceStub(self.channel)
        self.consoles: Any = console_pb2_grpc.ConsoleServiceStub(self.channel)
        self.stats: Any = stats_pb2_grpc.StatsServiceStub(self.channel)
        self.hosts: Any = host_pb2_grpc.HostServiceStub(self.channel)
        self.drivers: Any = capability_pb2_grpc.CapabilityServiceStub(self.channel)
        self.agents: Any = guest_agent_pb2_grpc.GuestAgentServiceStub(self.channel)
        self.watches: Any = watch_pb2_grpc.WatchServiceStub(self.channel)
        self.operations: Any = operations_pb2_grpc.OperationsStub(self.channel)  # type: ignore[no-untyped-call]  # no types

    async def call(self, method: Any, request: Message, *, timeout: float = 30) -> Any:
        try:
            return await method(request, timeout=timeout)
        except grpc.aio.AioRpcError as error:
            raise refusal(error) from None

    async def wait(self, operation: operations_pb2.Operation) -> operations_pb2.Operation:
        if not operation.done:
            request = operations_pb2.WaitOperationRequest(name=operation.name)
            request.timeout.FromSeconds(25)
            operation = await self.call(self.operations.WaitOperation, request)
        assert operation.done
        return operation

    async def do(self, method: Any, request: Message, kind: type[M]) -> M:
        """Run an operation to its end and return its response."""
        operation = await self.wait(await self.call(method, request))
        if operation.HasField("error"):
            raise Refused(operation.error)
        response = kind()
        assert operation.response.Unpack(response)
        return response

    async def create(self, id_: str, **fields: Any) -> domain_pb2.Domain:
        """Create a domain; `start` starts it, further fields are those of the domain."""
        start = fields.pop("start", None)
        request = domain_pb2.CreateDomainRequest(
            parent=PARENT,
            domain_id=id_,
            domain=domain_pb2.Domain(**fields),
            start=domain_pb2.StartOptions(paused=start == "paused") if start else None,
        )
        return await self.do(self.domains.CreateDomain, request, domain_pb2.Domain)

    async def get(self, id_: str, **fields: Any) -> domain_pb2.Domain:
        request = domain_pb2.GetDomainRequest(name=name(id_), **fields)
        answer: domain_pb2.Domain = await self.call(self.domains.GetDomain, request)
        return answer

    async def start(self, id_: str, **fields: Any) -> domain_pb2.Domain:
        request = domain_pb2.StartDomainRequest(name=name(id_), **fields)
        return await self.do(self.domains.StartDomain, request, domain_pb2.Domain)

    async def stop(
        self, id_: str, mode: domain_pb2.StopMode.ValueType = domain_pb2.STOP_MODE_FORCE, **fields: Any
    ) -> domain_pb2.Domain:
        request = domain_pb2.StopDomainRequest(name=name(id_), mode=mode, **fields)
        return await self.do(self.domains.StopDomain, request, domain_pb2.Domain)

    async def delete(self, id_: str, **fields: Any) -> None:
        request = domain_pb2.DeleteDomainRequest(name=name(id_), **fields)
        await self.do(self.domains.DeleteDomain, request, empty_pb2.Empty)

    async def update(self, domain: domain_pb2.Domain, *paths: str, **fields: Any) -> domain_pb2.Domain:
        request = domain_pb2.UpdateDomainRequest(
            domain=domain, update_mask=field_mask_pb2.FieldMask(paths=paths) if paths else None, **fields
        )
        return await self.do(self.domains.UpdateDomain, request, domain_pb2.Domain)

    async def verb(self, verb: str, id_: str, **fields: Any) -> domain_pb2.Domain:
        request = getattr(domain_pb2, f"{verb}DomainRequest")(name=name(id_), **fields)
        return await self.do(getattr(self.domains, f"{verb}Domain"), request, domain_pb2.Domain)

    async def list(self, **fields: Any) -> domain_pb2.ListDomainsResponse:
        request = domain_pb2.ListDomainsRequest(parent=PARENT, **fields)
        answer: domain_pb2.ListDomainsResponse = await self.call(self.domains.ListDomains, request)
        return answer

    async def until(self, id_: str, state: int, *, seconds: float = 10) -> domain_pb2.Domain:
        """Watch until a domain is in a state; the watch tells, nothing is asked again and again."""
        request = watch_pb2.WatchResourcesRequest(parent=PARENT, resource_types=[watch_pb2.RESOURCE_TYPE_DOMAIN])
        stream = self.watches.WatchResources(request, timeout=seconds)
        try:
            async for response in stream:
                for change in response.changes:
                    domain: domain_pb2.Domain = change.put.domain
                    if change.WhichOneof("kind") == "put" and domain.name == name(id_) and domain.status.state == state:
                        return domain
        finally:
            stream.cancel()
        raise AssertionError("the watch ended")

    async def close(self) -> None:
        await self.channel.close()


def name(id_: str) -> str:
    return f"{PARENT}/domains/{id_}"


def seconds(value: float) -> duration_pb2.Duration:
    duration = duration_pb2.Duration()
    duration.FromNanoseconds(int(value * 1e9))
    return duration


def metadata(operation: operations_pb2.Operation) -> operation_pb2.OperationMetadata:
    found = operation_pb2.OperationMetadata()
    assert operation.metadata.Unpack(found)
    return found


@asynccontextmanager
async def folder() -> AsyncIterator[Path]:
    """Short paths: a unix socket's has at most 107 characters."""
    path = Path(tempfile.mkdtemp(prefix="vfc"))
    try:
        yield path
    finally:
        shutil.rmtree(path)


def settings(path: Path, **changes: Any) -> ComputeSettings:
    values: dict[str, Any] = {
        "node": NODE,
        "state_dir": path / "s",
        "run_dir": path / "r",
        "enabled_drivers": ("test",),
        "guest_uid_count": 0,
        "drain_seconds": 1.0,
        **changes,
    }
    return ComputeSettings(**values)


class Service(Client):
    """The service in this process, with a client on the administrator's socket."""

    def __init__(self, running: app.App) -> None:
        super().__init__(running.settings.run_dir / "compute" / "admin.sock")
        self.app = running

    @property
    def driver(self) -> TestDriver:
        found = self.app.context.hypervisors.get("test")
        assert isinstance(found, TestDriver)
        return found

    def faults(self, *faults: Mapping[str, Any]) -> None:
        self.driver.faults.replace([Fault(**fault) for fault in faults])

    def as_(self, role: str) -> Client:
        return Client(self.app.settings.run_dir / "compute" / f"{role}.sock")


@asynccontextmanager
async def service(path: Path, **changes: Any) -> AsyncIterator[Service]:
    async with app.running(settings(path, **changes)) as running:
        client = Service(running)
        try:
            yield client
        finally:
            await client.close()


def toml(value: Any) -> str:
    """Return a value as a settings file has it: tables in lists are of the inline kind."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key} = {toml(one)}" for key, one in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(toml, value)) + "]"
    return json.dumps(value)


class Process:
    """The service as a process of its own, to be killed."""

    def __init__(self, path: Path, **changes: Any) -> None:
        self.path = path
        self._config = path / "compute.toml"
        self._changes = changes
        self._process: asyncio.subprocess.Process | None = None

    def _write_config(self) -> None:
        lines = [
            f'node = "{NODE}"',
            f'state_dir = "{self.path / "s"}"',
            f'run_dir = "{self.path / "r"}"',
            "[compute]",
            'enabled_drivers = ["test"]',
            "guest_uid_count = 0",
            "drain_seconds = 1.0",
        ]
        lines += [f"{key} = {json.dumps(value)}" for key, value in self._changes.items() if key != "drivers"]
        driver = {"state_file": str(self.path / "guests"), **self._changes.get("drivers", {})}
        lines += ["[compute.drivers.test]", *(f"{key} = {toml(value)}" for key, value in driver.items() if value)]
        self._config.write_text("\n".join(lines) + "\n")

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    async def start(self, failpoint: str = "", *, seconds: float = READY_SECONDS) -> Client:
        """Start the process and return a client when it serves."""
        self._write_config()
        environment = {**os.environ, "VIRTFLEET_FAILPOINT": failpoint}
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "virtfleet_compute", "--config", str(self._config), env=environment
        )
        client = Client(self.path / "r" / "compute" / "admin.sock")
        try:
            async with asyncio.timeout(seconds):
                await client.channel.channel_ready()
        except TimeoutError:
            await client.close()
            raise
        return client

    async def died(self) -> int:
        """Wait until the process has ended by itself."""
        assert self._process is not None
        async with asyncio.timeout(READY_SECONDS):
            return await self._process.wait()

    async def kill(self) -> None:
        if self._process is not None and self._process.returncode is None:
            self._process.send_signal(signal.SIGKILL)
            await self._process.wait()
