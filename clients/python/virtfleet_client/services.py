"""The stubs of all services of virtfleet on one channel, by the names that the documentation uses."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from google.longrunning import operations_pb2_grpc

from virtfleet.common.v1 import admin_pb2_grpc
from virtfleet.common.v1 import operations_pb2_grpc as common_operations_pb2_grpc
from virtfleet.compute.v1 import (
    capability_pb2_grpc,
    console_pb2_grpc,
    domain_pb2_grpc,
    guest_agent_pb2_grpc,
    host_pb2_grpc,
    stats_pb2_grpc,
)
from virtfleet.fleet.v1 import enrollment_pb2_grpc, node_pb2_grpc
from virtfleet.network.v1 import network_pb2_grpc, port_pb2_grpc
from virtfleet.storage.v1 import pool_pb2_grpc, volume_pb2_grpc


class Services:
    """Gives each gRPC service its stub, made at first use.

    Args:
        channel: A `grpc.Channel` or `grpc.aio.Channel`; the stubs are of the same world.
    """

    def __init__(self, channel: Any) -> None:  # noqa: ANN401  # the two channel classes share no base
        self.channel = channel

    @cached_property
    def domains(self) -> Any:  # noqa: ANN401  # generated stubs differ between the two worlds; the protos document them
        """`virtfleet.compute.v1.DomainService`."""
        return domain_pb2_grpc.DomainServiceStub(self.channel)

    @cached_property
    def consoles(self) -> Any:  # noqa: ANN401  # as domains
        """`virtfleet.compute.v1.ConsoleService`."""
        return console_pb2_grpc.ConsoleServiceStub(self.channel)

    @cached_property
    def stats(self) -> Any:  # noqa: ANN401  # as domains
        """`virtfleet.compute.v1.StatsService`."""
        return stats_pb2_grpc.StatsServiceStub(self.channel)

    @cached_property
    def hosts(self) -> Any:  # noqa: ANN401  # as domains
        """`virtfleet.compute.v1.HostService`."""
        return host_pb2_grpc.HostServiceStub(self.channel)

    @cached_property
    def capabilities(self) -> Any:  # noqa: ANN401  # as domains
        """`virtfleet.compute.v1.CapabilityService`."""
        return capability_pb2_grpc.CapabilityServiceStub(self.channel)

    @cached_property
    def guest_agents(self) -> Any:  # noqa: ANN401  # as domains
        """`virtfleet.compute.v1.GuestAgentService`."""
        return guest_agent_pb2_grpc.GuestAgentServiceStub(self.channel)

    @cached_property
    def pools(self) -> Any:  # noqa: ANN401  # as domains
        """`virtfleet.storage.v1.PoolService`."""
        return pool_pb2_grpc.PoolServiceStub(self.channel)

    @cached_property
    def volumes(self) -> Any:  # noqa: ANN401  # as domains
        """`virtfleet.storage.v1.VolumeService`."""
        return volume_pb2_grpc.VolumeServiceStub(self.channel)

    @cached_property
    def networks(self) -> Any:  # noqa: ANN401  # as domains
        """`virtfleet.network.v1.NetworkService`."""
        return network_pb2_grpc.NetworkServiceStub(self.channel)

    @cached_property
    def ports(self) -> Any:  # noqa: ANN401  # as domains
        """`virtfleet.network.v1.PortService`."""
        return port_pb2_grpc.PortServiceStub(self.channel)

    @cached_property
    def nodes(self) -> Any:  # noqa: ANN401  # as domains
        """`virtfleet.fleet.v1.NodeService`."""
        return node_pb2_grpc.NodeServiceStub(self.channel)

    @cached_property
    def enrollment(self) -> Any:  # noqa: ANN401  # as domains
        """`virtfleet.fleet.v1.EnrollmentService`."""
        return enrollment_pb2_grpc.EnrollmentServiceStub(self.channel)

    @cached_property
    def servers(self) -> Any:  # noqa: ANN401  # as domains
        """`virtfleet.common.v1.AdminService`."""
        return admin_pb2_grpc.AdminServiceStub(self.channel)

    @cached_property
    def access(self) -> Any:  # noqa: ANN401  # as domains
        """`virtfleet.common.v1.AccessService`."""
        return admin_pb2_grpc.AccessServiceStub(self.channel)

    @cached_property
    def operation_watches(self) -> Any:  # noqa: ANN401  # as domains
        """`virtfleet.common.v1.OperationService`."""
        return common_operations_pb2_grpc.OperationServiceStub(self.channel)

    @cached_property
    def operations(self) -> Any:  # noqa: ANN401  # as domains
        """`google.longrunning.Operations`."""
        return operations_pb2_grpc.OperationsStub(self.channel)  # type: ignore[no-untyped-call]  # Google's stubs have no types
