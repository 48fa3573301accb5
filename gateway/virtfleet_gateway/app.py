"""A gateway, put together: the only module that knows all of its parts."""

from __future__ import annotations

import asyncio
import dataclasses
import datetime as dt
import logging
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from google.longrunning import operations_pb2

from virtfleet.common.v1 import operations_pb2 as common_operations_pb2
from virtfleet.fleet.v1 import enrollment_pb2, node_pb2, watch_pb2
from virtfleet.type.v1 import operation_pb2
from virtfleet_gateway.authority import Authority
from virtfleet_gateway.certificates import Certificates
from virtfleet_gateway.channels import Channels
from virtfleet_gateway.credentials import OwnCertificate
from virtfleet_gateway.denial_list import DenialList
from virtfleet_gateway.enrollment import Enrollment, Terms
from virtfleet_gateway.fanout import FanOut
from virtfleet_gateway.fleet import Fleet
from virtfleet_gateway.fleet_operations import FleetOperations
from virtfleet_gateway.index import Index
from virtfleet_gateway.issued import IssuedFolder
from virtfleet_gateway.join_tokens import JoinTokens
from virtfleet_gateway.lapses import Lapses
from virtfleet_gateway.nodes import Registry
from virtfleet_gateway.routing import build_table
from virtfleet_gateway.servicers.enrollment import EnrollmentServicer
from virtfleet_gateway.servicers.nodes import NodeServicer, remove
from virtfleet_gateway.serving import OPERATIONS, GatewayServer
from virtfleet_service.errors import VirtfleetError
from virtfleet_service.operations import Operations
from virtfleet_service.settings import SettingsError, TlsSettings
from virtfleet_service.store import Store
from virtfleet_service.tls import CertificateSource
from virtfleet_service.watch import WatchHub, operation_watch_service, watch_service

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence

    from virtfleet_gateway.channels import Connect
    from virtfleet_gateway.settings import FleetSettings
    from virtfleet_service.denial import Denials
    from virtfleet_service.operations import Handler
    from virtfleet_service.transaction import Transaction

_log = logging.getLogger(__name__)

PACKAGE: Final = "virtfleet.fleet.v1"
RESOURCE_TYPES: Final = {
    "node": node_pb2.Node,
    "certificate": enrollment_pb2.Certificate,
    "join_token": enrollment_pb2.JoinToken,
}

_SWEEP_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class App:
    """Is a gateway that serves."""

    settings: FleetSettings
    server: GatewayServer
    store: Store
    registry: Registry
    index: Index
    channels: Channels
    enrollment: Enrollment
    fleet: Fleet


_OPERATION_SERVICE = common_operations_pb2.DESCRIPTOR.services_by_name["OperationService"]


def _authority(settings: FleetSettings) -> Authority:
    try:
        return Authority.load(settings.authority_dir)
    except (OSError, ValueError) as error:
        advice = ""
        if isinstance(error, FileNotFoundError):
            advice = "; put the copy of the folder back. For a fleet that is new `virtfleet authority init` makes one"
        raise SettingsError(f"authority_dir: {error}{advice}") from error


@asynccontextmanager
async def running(settings: FleetSettings, *, connect: Connect | None = None) -> AsyncIterator[App]:
    """Run a gateway; it drains and stops when the block ends.

    Args:
        settings: The settings.
        connect: Makes the connections to nodes, for whoever holds them in the same process; None: over the network.

    Raises:
        SettingsError: The authority cannot be read, or an address cannot be used.
        VirtfleetError: A store or a certificate cannot be used.
    """
    authority = _authority(settings)
    settings.state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    identity_dir = settings.state_dir / "identity"
    identity_dir.mkdir(exist_ok=True, mode=0o700)
    refreshes: list[Callable[[], object]] = []

    def refresh() -> None:
        for function in refreshes:
            function()

    def denied(denials: Denials) -> None:
        server.take_denials(denials)
        refresh()

    async with AsyncExitStack() as stack:
        store = await stack.enter_async_context(
            Store.open(settings.state_dir / "gateway.db", package=PACKAGE, resource_types=RESOURCE_TYPES)
        )
        # Not before the store is held: a second gateway that is refused leaves the files of the first alone.
        own = OwnCertificate(authority, identity_dir, settings.name, settings.hosts, refresh)
        with _put_off("the gateway's own certificate"):
            own.ensure()
        settings = dataclasses.replace(
            settings,
            trust_domain=authority.trust_domain,
            identity_dir=None,
            tls=TlsSettings(
                certificate_file=own.certificate_file,
                key_file=own.key_file,
                ca_file=own.ca_file,
                denial_list_file=own.denied_file,
            ),
        )
        files = CertificateSource(settings.tls)
        hub = WatchHub(store, ring_bytes=settings.watch_memory_bytes)
        domain = authority.trust_domain
        channels = Channels(files.client_credentials, lambda node, service: f"{service}.{node}.{domain}", connect)
        stack.push_async_callback(channels.close)
        index = Index(
            channels,
            lambda node: registry.changed(node),  # noqa: PLW0108 - the registry comes after it
            ring_bytes=settings.watch_memory_bytes,
        )
        stack.push_async_callback(index.close)
        registry = Registry(store, channels, index)
        stack.push_async_callback(registry.close)
        fan_out = FanOut(channels, lambda: files.current.identity, lambda: server.telemetry.tracer)
        fleet = Fleet(index, channels, fan_out, store.token_key)
        server = GatewayServer(
            settings,
            name=f"gateways/{settings.name}",
            store_id=lambda: store.store_id,
            anonymous_listen=settings.enrollment_listen,
            table=build_table(),
            channels=channels,
            fleet=fleet,
            roster=registry,
        )
        refreshes += [server.refresh, own.look]
        desk = await _open_desk(store, authority, settings, own, denied)
        operations = await stack.enter_async_context(
            Operations(store, "gateway", "", prefix="operations/").running(drain_seconds=settings.drain_seconds)
        )
        await operations.settle({"virtfleet.fleet.v1.NodeService.DeleteNode": _settler(desk.certificates)})
        server.add(
            node_pb2.DESCRIPTOR.services_by_name["NodeService"],
            NodeServicer(store, registry, operations, desk.certificates.expel),
        )
        server.add(
            enrollment_pb2.DESCRIPTOR.services_by_name["EnrollmentService"],
            EnrollmentServicer(store, desk.tokens, desk.enrollment, desk.certificates, desk.denial_list),
        )
        server.add(watch_pb2.DESCRIPTOR.services_by_name["WatchService"], watch_service(hub))
        server.add(OPERATIONS, FleetOperations(operations, fan_out, registry.services, store.token_key))
        server.add(_OPERATION_SERVICE, operation_watch_service(hub, operations.owner))
        server.on_drain(hub.close)
        server.on_drain(fleet.close)
        registry.start()
        await stack.enter_async_context(server)
        desk.denial_list.settle()
        await stack.enter_async_context(
            _together(
                registry.run(),
                own.run(lambda pem: desk.certificates.adopt(pem, own.identity)),
                desk.issued.run(),
                Lapses(store, authority, desk.certificates, desk.tokens).run(),
                _sweep(server, files, channels, desk.denial_list),
            )
        )
        yield App(settings, server, store, registry, index, channels, desk.enrollment, fleet)


@dataclass(frozen=True, slots=True)
class _Desk:
    """Is where members are admitted and certificates issued and denied."""

    denial_list: DenialList
    certificates: Certificates
    tokens: JoinTokens
    enrollment: Enrollment
    issued: IssuedFolder


async def _open_desk(
    store: Store,
    authority: Authority,
    settings: FleetSettings,
    own: OwnCertificate,
    denied: Callable[[Denials], object],
) -> _Desk:
    """Put together what decides about members, with all that has been denied and issued before."""
    terms = Terms(
        gateway_endpoints=settings.member_endpoints or tuple(_first(settings.listen)),
        gateway_identities=(f"spiffe://{authority.trust_domain}/gateway/",),
        node_lifetime=dt.timedelta(seconds=settings.node_certificate_seconds),
    )
    denial_list = DenialList(store, authority, own.denied_file, changed=denied)
    certificates = Certificates(store, authority, denial_list)
    issued = IssuedFolder(settings.authority_dir, certificates)
    await certificates.restore_denials(own.identity)
    # Before it serves: whoever lists certificates finds those of before the start.
    await issued.look()
    with _put_off("the entry of the gateway's own certificate"):
        await certificates.adopt(own.certificate_file.read_bytes(), own.identity)
    return _Desk(
        denial_list,
        certificates,
        JoinTokens(store, authority.key_hash),
        Enrollment(store, authority, terms, certificates, denial_list),
        issued,
    )


@contextmanager
def _put_off(what: str) -> Iterator[None]:
    """Let a full disk not keep a gateway from its start: what is there may be good for days, and is tried again."""
    try:
        yield
    except (OSError, VirtfleetError) as error:
        _log.error("put off: %s: %s", what, error)


def _first(listen: str | Sequence[str]) -> Sequence[str]:
    addresses = listen.split(",") if isinstance(listen, str) else listen
    return [address.strip() for address in addresses if address.strip()][:1]


def _settler(certificates: Certificates) -> Handler:
    """Return what finishes a DeleteNode that a crash has cut: certificates are denied again, and the node goes."""

    async def settle(operation: operations_pb2.Operation, _journal: object) -> Callable[[Transaction], node_pb2.Node]:
        metadata = operation_pb2.OperationMetadata()
        operation.metadata.Unpack(metadata)
        await certificates.expel(metadata.target.removeprefix("nodes/"), metadata.principal)
        return lambda tx: remove(tx, metadata.target)

    return settle


@asynccontextmanager
async def _together(*work: Coroutine[object, object, None]) -> AsyncIterator[None]:
    """Run what goes on in the background; it is cancelled when the block ends, and ends the block when it fails."""
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(one) for one in work]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()


async def _sweep(server: GatewayServer, files: CertificateSource, channels: Channels, denial_list: DenialList) -> None:
    """Cut off denied callers from forwarded streams, and connect anew to nodes with a new certificate."""
    while True:
        await asyncio.sleep(_SWEEP_SECONDS)
        denial_list.settle()
        server.sweep()
        if files.reload_if_changed():
            channels.renew()
