"""The methods of node services as the gateway answers them itself, for the node `-`.

For each service of compute, storage and network there is one object here whose methods are made from the descriptors:
lists and reads of what the index holds come from it, other lists and stats from the nodes, watches from the feed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from virtfleet_gateway.lists import FleetReads
from virtfleet_gateway.rounds import Rounds
from virtfleet_gateway.watch import FleetWatch
from virtfleet_service.methods import snake

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor

    from virtfleet_gateway.channels import Channels
    from virtfleet_gateway.fanout import FanOut
    from virtfleet_gateway.index import Index, PackageIndex
    from virtfleet_gateway.shapes import Kind
    from virtfleet_service.call import Call
    from virtfleet_service.telemetry import Meters

_COUNTED: Final = {
    "GetDomainStats": "domain",
    "GetHostStats": "host",
    "BatchGetDomainStats": "domain",
    "StreamDomainStats": "domain",
}
"""Which kind of the index the counters of a method are of; the counters themselves the nodes alone have."""


class FleetService:
    """Answers one service; has a method in snake case for each rpc that has a form for all nodes."""

    def __init__(self, methods: Mapping[str, Callable[[Any, Call], Any]]) -> None:
        for name, method in methods.items():
            setattr(self, name, method)


class Fleet:
    """Makes the services for all nodes.

    Args:
        index: The index.
        channels: The lanes to the nodes.
        fan_out: Asks nodes.
        key: Authenticates page tokens.
    """

    def __init__(self, index: Index, channels: Channels, fan_out: FanOut, key: bytes) -> None:
        self._reads = {service: FleetReads(package, fan_out, key) for service, package in index.packages.items()}
        self._watches = {service: FleetWatch(package, channels) for service, package in index.packages.items()}

    def close(self) -> None:
        """End all watches with a last bookmark."""
        for watch in self._watches.values():
            watch.close()

    def measure(self, meters: Meters) -> None:
        """Show how watches of all nodes have begun."""
        fresh, resumed = (
            "Watches of all nodes that began with a snapshot.",
            "Watches of all nodes that began from a token.",
        )
        meters.gauge("fresh_watches", fresh, lambda: float(self.watch_counts[0]))
        meters.gauge("resumed_watches", resumed, lambda: float(self.watch_counts[1]))

    @property
    def watch_counts(self) -> tuple[int, int]:
        """How many watches of all nodes have begun afresh, and how many have gone on from a token."""
        watches = self._watches.values()
        return sum(watch.fresh_count for watch in watches), sum(watch.resumed_count for watch in watches)

    def service(self, descriptor: ServiceDescriptor) -> tuple[FleetService, list[MethodDescriptor]]:
        """Return the implementation of a service of nodes, and the methods that it has."""
        part = descriptor.file.package.split(".")[1]
        found: dict[str, Callable[[Any, Call], Any]] = {}
        served: list[MethodDescriptor] = []
        for method in descriptor.methods:
            answer = self._method(part, method)
            if answer is not None:
                found[snake(method.name)] = answer
                served.append(method)
        return FleetService(found), served

    def _method(self, service: str, method: MethodDescriptor) -> Callable[[Any, Call], Any] | None:
        reads, watch = self._reads[service], self._watches[service]
        kind = _kind(reads.index, method)
        if method.name == "WatchResources":
            return watch.stream
        if method.containing_service.name == "StatsService":
            return _counters(reads, method)
        if method.name.startswith("BatchGet") and kind is not None:
            return lambda request, call: reads.batch_get(kind, method, request, call)
        if method.name.startswith("List") and "parent" in method.input_type.fields_by_name:
            if kind is not None:
                return lambda request, call: reads.list_indexed(kind, method, request, call)
            return lambda request, call: reads.list_live(method, request, call, counted=None)
        if method.name.startswith("Get") and kind is not None:
            return lambda request, call: reads.get(kind, method, request, call)
        return None


def _counters(reads: FleetReads, method: MethodDescriptor) -> Callable[[Any, Call], Any]:
    """Return what answers a method of counters."""
    kind = reads.index.shape.kind_by_name[_COUNTED[method.name]]
    if method.server_streaming:
        return Rounds(reads, kind).stream
    if method.name.startswith("Get"):
        return lambda request, call: reads.get_live(kind, method, request, call)
    return lambda request, call: reads.list_live(method, request, call, counted=kind)


def _kind(index: PackageIndex, method: MethodDescriptor) -> Kind | None:
    """Return the kind of resource that a method reads; None: none that the index holds."""
    output = method.output_type
    by_message = {kind.message.DESCRIPTOR.full_name: kind for kind in index.shape.kind_by_name.values()}
    if output.full_name in by_message:
        return by_message[output.full_name]
    first = output.fields_by_number.get(1)
    if first is None or first.message_type is None or not first.is_repeated:
        return None
    if first.message_type.full_name in by_message:
        return by_message[first.message_type.full_name]
    # A result of a batch: name, status, resource.
    third = first.message_type.fields_by_number.get(3)
    if third is not None and third.message_type is not None:
        return by_message.get(third.message_type.full_name)
    return None
