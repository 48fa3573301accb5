"""The service that steers the fleet, at an address of its own."""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from virtfleet.fake.v1 import fake_pb2
from virtfleet_fake.clock import MovableLoop
from virtfleet_fake.fleet import Fleet
from virtfleet_service.authorization import ADMIN
from virtfleet_service.call import Call
from virtfleet_service.errors import FieldOutOfRange, NodeUnknown
from virtfleet_service.pipeline import LOCAL, Listener
from virtfleet_service.server import Server
from virtfleet_service.settings import ServiceSettings, SettingsError, split_address

_NODE_PREFIX = "nodes/"


class FakeServicer:
    """Answers `virtfleet.fake.v1.FakeService`."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    async def get_fake(self, _request: fake_pb2.GetFakeRequest, _call: Call) -> fake_pb2.Fake:
        """Answer GetFake."""
        fresh, resumed = self._fleet.watch_counts
        answer = fake_pb2.Fake(
            nodes=sorted(self._fleet.nodes),
            faults=self._fleet.faults.present,
            connection_count=self._fleet.door.connection_count,
            fresh_watch_count=fresh,
            resumed_watch_count=resumed,
            call_counts=[
                fake_pb2.MethodCallCount(method=method, call_count=count)
                for method, count in sorted(self._fleet.call_counts.items())
            ],
        )
        answer.time_offset.FromNanoseconds(round(_loop().offset_seconds * 1e9))
        return answer

    async def inject_fault(self, request: fake_pb2.InjectFaultRequest, _call: Call) -> fake_pb2.Fault:
        """Answer InjectFault."""
        fault = fake_pb2.Fault()
        fault.CopyFrom(request.fault)
        if request.name:
            fault.node = self._node(request.name)
        if request.validate_only:
            self._fleet.faults.check(fault)
            return fault
        return await self._fleet.faults.inject(fault)

    async def clear_faults(self, request: fake_pb2.ClearFaultsRequest, _call: Call) -> fake_pb2.ClearFaultsResponse:
        """Answer ClearFaults."""
        node = self._node(request.name) if request.name else ""
        count = await self._fleet.faults.clear(node, request.fault_id, count_only=request.validate_only)
        return fake_pb2.ClearFaultsResponse(cleared_count=count)

    async def advance_time(self, request: fake_pb2.AdvanceTimeRequest, _call: Call) -> fake_pb2.AdvanceTimeResponse:
        """Answer AdvanceTime."""
        seconds = request.duration.ToNanoseconds() / 1e9
        if seconds <= 0:
            raise FieldOutOfRange("time moves forward only", field="duration")
        offset = _loop().offset_seconds if request.validate_only else _loop().advance(seconds)
        answer = fake_pb2.AdvanceTimeResponse()
        answer.time_offset.FromNanoseconds(round(offset * 1e9))
        return answer

    async def cut_connections(
        self, request: fake_pb2.CutConnectionsRequest, _call: Call
    ) -> fake_pb2.CutConnectionsResponse:
        """Answer CutConnections."""
        door = self._fleet.door
        count = door.connection_count if request.validate_only else await door.cut()
        return fake_pb2.CutConnectionsResponse(connection_count=count)

    async def restart_gateway(
        self, request: fake_pb2.RestartGatewayRequest, _call: Call
    ) -> fake_pb2.RestartGatewayResponse:
        """Answer RestartGateway."""
        if not request.validate_only:
            # A caller who goes away does not leave the fleet without a gateway.
            await asyncio.shield(
                self._fleet.restart_gateway(request.pause.ToTimedelta().total_seconds(), drain=request.drain)
            )
        return fake_pb2.RestartGatewayResponse()

    async def compact_logs(self, request: fake_pb2.CompactLogsRequest, _call: Call) -> fake_pb2.CompactLogsResponse:
        """Answer CompactLogs."""
        chosen = [self._node(request.name)] if request.name else list(self._fleet.nodes)
        for node in () if request.validate_only else chosen:
            await self._fleet.nodes[node].compact()
        return fake_pb2.CompactLogsResponse()

    async def move_domain(self, request: fake_pb2.MoveDomainRequest, _call: Call) -> fake_pb2.MoveDomainResponse:
        """Answer MoveDomain."""
        source = self._fleet.nodes[self._node("/".join(request.name.split("/")[:2]))]
        target = self._fleet.nodes.get(request.target_node)
        if target is None:
            raise NodeUnknown(f"the fleet has no node {request.target_node}", node=f"nodes/{request.target_node}")
        new_name = await source.move(request.name, target, dry=request.validate_only)
        return fake_pb2.MoveDomainResponse(new_name=new_name)

    def _node(self, name: str) -> str:
        node = name.removeprefix(_NODE_PREFIX)
        if node not in self._fleet.nodes:
            raise NodeUnknown(f"the fleet has no node {node}", node=f"nodes/{node}")
        return node


def _loop() -> MovableLoop:
    loop = asyncio.get_running_loop()
    if not isinstance(loop, MovableLoop):
        raise TypeError("the fleet runs on a MovableLoop")
    return loop


class ControlServer(Server):
    """Serves in the clear on loopback: who steers the fleet is the test that started it.

    Attributes:
        address: Where, once it has started.
    """

    def __init__(self, settings: ServiceSettings, listen: str) -> None:
        super().__init__(settings, service="control", name="fakes/control", store_id=lambda: "")
        self._host, self._port = split_address(listen, "control_listen")
        self.address = ""

    async def listen(self) -> None:
        """Open the one port.

        Raises:
            SettingsError: It is taken, or not on loopback.
        """
        if self._host != "localhost" and not ipaddress.ip_address(self._host).is_loopback:
            raise SettingsError(f"control_listen: {self._host} is not on loopback, and nobody proves who he is here")
        server = self.new_server(Listener(LOCAL, ADMIN))
        try:
            port = server.add_insecure_port(f"{self._host}:{self._port}")
        except RuntimeError as error:
            raise SettingsError(f"control_listen: cannot listen on {self._host}:{self._port}") from error
        await server.start()
        self.address = f"{self._host}:{port}"


@asynccontextmanager
async def serving(fleet: Fleet, listen: str) -> AsyncIterator[str]:
    """Serve while entered; gives the address."""
    settings = ServiceSettings(
        state_dir=fleet.folder / "control", run_dir=fleet.folder, drain_seconds=0.0, log_level="warning"
    )
    settings.state_dir.mkdir()
    server = ControlServer(settings, listen)
    server.add(fake_pb2.DESCRIPTOR.services_by_name["FakeService"], FakeServicer(fleet))
    async with server:
        yield server.address
