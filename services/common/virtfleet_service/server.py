"""A server process: its listeners, the services on them, and its orderly end.

    server = Server(settings, service="compute", store_id=lambda: store.store_id)
    server.add(domain_pb2.DESCRIPTOR.services_by_name["DomainService"], Domains(...))
    server.on_drain(hub.close)
    async with server:
        ...                     # serving
                                # drained when the block ends

One gRPC server a listener: on a unix socket gRPC tells nothing about which socket a call came in on, and each has a
role of its own.
"""

from __future__ import annotations

import asyncio
import gc
import grp
import logging
import os
import resource
import signal
import socket
import stat
import sys
import time
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

import grpc

from virtfleet_service import admin, standard
from virtfleet_service.authorization import ADMIN, OPERATOR, SERVICE, VIEWER, Authorizer
from virtfleet_service.call import Call, Caller
from virtfleet_service.errors import ServiceDraining, VirtfleetError
from virtfleet_service.logs import AuditLog
from virtfleet_service.memory import FLOW_OPTIONS, tune_allocator
from virtfleet_service.methods import FOREIGN_RULES, MethodFacts, facts_of
from virtfleet_service.pipeline import ANONYMOUS, LOCAL, PEER, TLS, Listener, Pipeline
from virtfleet_service.schema import StoreError
from virtfleet_service.settings import ServiceSettings, SettingsError, split_address
from virtfleet_service.telemetry import Telemetry
from virtfleet_service.trust import Trust, watch

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping
    from types import TracebackType

    from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor

    from virtfleet.type.v1 import method_pb2
    from virtfleet_service.denial import Denials
    from virtfleet_service.tls import Credentials

_log = logging.getLogger(__name__)

WATCH_PERIOD_SECONDS: Final = 1.0
"""How often files (certificates, policy, denial list) are looked at and the callers of open calls are judged again."""

STREAM_GRACE_SECONDS: Final = 2.0
"""How long a stream may run on after the drain hooks; a console would run for ever."""

_HOOK_LIMIT_SECONDS: Final = 5.0
_TURN_AWAY_LIMIT_SECONDS: Final = 1.0
_TURN_AWAY_PAUSE_SECONDS: Final = 0.05
_PATH_LIMIT_BYTES: Final = 107

_OPTIONS: Final[tuple[tuple[str, int], ...]] = (
    # A second process on the port must fail, not share it.
    ("grpc.so_reuseport", 0),
    # More than validation.REQUEST_LIMIT_BYTES, so that the refusal of a message between the two carries our reason.
    ("grpc.max_receive_message_length", 8 << 20),
    ("grpc.max_send_message_length", -1),
    *FLOW_OPTIONS,
    # Who connects and does not speak is dropped.
    ("grpc.server_handshake_timeout_ms", 10_000),
    # Clients of all languages may ping as their defaults have it: no ENHANCE_YOUR_CALM.
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.http2.max_ping_strikes", 0),
    # A client whose machine is gone is noticed.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    # What a ping is given is a setting of its own, a minute where nobody says else.
    ("grpc.http2.ping_timeout_ms", 20_000),
    ("grpc.enable_channelz", 1),
    # Many small metadata are the clients' right; a megabyte of them is not.
    ("grpc.max_metadata_size", 32 << 10),
    ("grpc.absolute_max_metadata_size", 64 << 10),
)


class _Registered:
    """Is one service that was added."""

    __slots__ = ("facts", "implementation", "local", "name", "peer")

    def __init__(self, name: str, facts: list[MethodFacts], implementation: object, *, peer: bool, local: bool) -> None:
        self.name = name
        self.facts = facts
        self.implementation = implementation
        self.peer = peer
        self.local = local


class _Fallback(grpc.GenericRpcHandler):
    """Answers what no registered method answers: a gateway's forwarder if there is one, else a refusal."""

    def __init__(self, pipeline: Pipeline, forwarder: grpc.GenericRpcHandler | None) -> None:
        self._pipeline = pipeline
        self._forwarder = forwarder

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Return the handler of a method."""
        if self._forwarder is not None:
            handler = self._forwarder.service(handler_call_details)
            if handler is not None:
                return handler
        return self._pipeline.unknown(handler_call_details.method)


class Server:
    """Serves on TCP with mutual TLS, on one unix socket per role, and on the peer socket.

    Args:
        settings: The settings of the process.
        service: The name of the service: its sockets lie in `{run_dir}/{service}`.
        name: The resource name of the server; empty: `nodes/{node}/services/{service}`.
        store_id: Returns the id of the store.
        authorizer: Judges callers; None: one with the built-in roles.
        node_role: The role of callers with a node's certificate; empty: they are refused.
        anonymous_listen: `host:port` for callers without a certificate (enrolment); empty: none.
    """

    def __init__(
        self,
        settings: ServiceSettings,
        *,
        service: str,
        name: str = "",
        store_id: Callable[[], str] = str,
        authorizer: Authorizer | None = None,
        node_role: str = "",
        anonymous_listen: str = "",
    ) -> None:
        self.settings = settings
        self.service = service
        self.name = name or f"nodes/{settings.node}/services/{service}"
        self.store_id = store_id
        self.authorizer = authorizer or Authorizer()
        self.trust: Trust | None = None
        self.audit = AuditLog(settings.state_dir / f"{service}.audit.log", limit_bytes=settings.audit_limit_bytes)
        self.telemetry = Telemetry(settings.telemetry, service, settings.node)
        self.health = standard.Health()
        self.pipeline = Pipeline(
            node=settings.node,
            service=service,
            authorizer=self.authorizer,
            audit=self.audit,
            meters=self.telemetry.meters,
        )
        self.forwarder: Callable[[Listener], grpc.GenericRpcHandler] | None = None
        self.ports: list[int] = []
        self.anonymous_port = 0
        self._anonymous_listen = anonymous_listen
        self._services: list[_Registered] = []
        self._hooks: list[Callable[[], Awaitable[None] | None]] = []
        self._servers: list[grpc.aio.Server] = []
        self._sockets: list[tuple[Path, int]] = []
        self._node_role = node_role
        self._tasks: list[asyncio.Task[None]] = []
        self._drained: asyncio.Task[None] | None = None
        self.telemetry.meters.gauge("open_calls", "Calls that run now.", lambda: float(self.active_calls_count))

    # What is served.

    def add(
        self,
        service: ServiceDescriptor,
        implementation: object,
        *,
        peer: bool = False,
        local: bool = False,
        rules: Mapping[str, method_pb2.MethodRule] = FOREIGN_RULES,
    ) -> None:
        """Serve a service; before the server starts.

        Args:
            service: Its descriptor.
            implementation: Has one method per rpc in snake case; what it lacks answers METHOD_NOT_IMPLEMENTED.
            peer: On the peer socket only.
            local: On local sockets only.
            rules: Those of methods whose protos have none.

        Raises:
            RuleMissingError: A method has no rule.
        """
        facts = [facts_of(method, rules) for method in service.methods]
        for method in facts:
            self.authorizer.register(method)
        self._services.append(_Registered(service.full_name, facts, implementation, peer=peer, local=local))
        if not peer:
            self.health.set(service.full_name, serving=True)

    def own_call(self, method: MethodDescriptor) -> Call:
        """Make a call of the service itself, for what it does without being asked."""
        caller = Caller(f"service:{self.settings.node}/{self.service}", (SERVICE,))
        return Call(facts_of(method), caller, self.authorizer, node=self.settings.node)

    def on_drain(self, hook: Callable[[], Awaitable[None] | None]) -> None:
        """Have something called when the server drains: after health says NOT_SERVING, before calls are refused."""
        self._hooks.append(hook)

    @property
    def service_names(self) -> list[str]:
        """The full names of the services that reflection shows."""
        return [service.name for service in self._services if not service.peer]

    @property
    def port(self) -> int:
        """The port of the first TCP listener; 0: there is none."""
        return self.ports[0] if self.ports else 0

    @property
    def active_calls_count(self) -> int:
        """How many calls run now."""
        return len(self.pipeline.calls)

    @property
    def denial_list_number(self) -> int:
        """The number of the denial list in force; 0: none."""
        return self.trust.denial_list_number if self.trust is not None else 0

    @property
    def credentials(self) -> Credentials | None:
        """The certificate in use; None: no TLS."""
        return self.trust.credentials if self.trust is not None else None

    @property
    def socket_dir(self) -> Path:
        """Where the local sockets are."""
        return self.settings.run_dir / self.service

    # Start and end.

    async def __aenter__(self) -> Self:
        """Start to serve.

        Raises:
            SettingsError: An address is taken or cannot be used, or the policy file does not parse.
            BackingMissing: A certificate file is absent or does not parse.
            OSError: A folder, socket or log cannot be made.
        """
        settings = self.settings
        self.audit.open()
        try:
            self.trust = Trust(
                settings,
                self.service,
                self.authorizer,
                node_role=self._node_role,
                needed=bool(settings.listen or self._anonymous_listen),
            )
            self.pipeline.authenticator = self.trust.authenticator
            self.telemetry.start()
            self.pipeline.tracer = self.telemetry.tracer
            self._add_standard_services()
            await self.listen()
        except BaseException:
            await self._abandon()
            raise
        self._tasks = [
            asyncio.create_task(watch(self.refresh, WATCH_PERIOD_SECONDS), name=f"{self.service} files"),
            asyncio.create_task(self.trust.keep_membership(self.refresh), name=f"{self.service} membership"),
        ]
        _log.info("serving", extra={"server": self.name, "ports": self.ports, "sockets": str(self.socket_dir)})
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Drain and stop."""
        await self.drain()
        await self._abandon()

    async def drain(self) -> None:
        """Say NOT_SERVING, run the hooks, let calls end within the grace, stop. A second call waits for the first."""
        if self._drained is None:
            self._drained = asyncio.create_task(self._drain(), name=f"{self.service} drain")
        await asyncio.shield(self._drained)

    async def _drain(self) -> None:
        grace_seconds = self.settings.drain_seconds
        self.health.stop()
        for hook in self._hooks:
            try:
                async with asyncio.timeout(_HOOK_LIMIT_SECONDS):
                    done = hook()
                    if done is not None:
                        await done
            except Exception:  # noqa: BLE001  # the boundary of foreign code: the end must come, whatever it does
                _log.exception("a drain hook failed")
        self.pipeline.draining = True
        await self._turn_away()
        error = ServiceDraining("the server has stopped; call again", retry_delay_seconds=1)
        stops = asyncio.gather(*(server.stop(grace_seconds + 1) for server in self._servers))
        await asyncio.wait([stops], timeout=min(STREAM_GRACE_SECONDS, grace_seconds))
        self.pipeline.end_all(error, streams_only=True)
        await asyncio.wait([stops], timeout=max(grace_seconds - STREAM_GRACE_SECONDS, 0.0))
        self.pipeline.end_all(error, streams_only=False)
        await stops

    async def _turn_away(self) -> None:
        """Refuse the calls that wait inside gRPC, until no more come up.

        When gRPC stops it ends what no handler has taken yet with a bare CANCELLED, which no client repeats: on a busy
        server that is a call of every client.
        """
        ends_at = time.monotonic() + _TURN_AWAY_LIMIT_SECONDS
        while time.monotonic() < ends_at:
            seen = self.pipeline.turned_away
            await asyncio.sleep(_TURN_AWAY_PAUSE_SECONDS)
            if self.pipeline.turned_away == seen:
                return

    async def _abandon(self) -> None:
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
            self._tasks.clear()
        for server in self._servers:
            await server.stop(0)
        self._servers.clear()
        for path, inode in self._sockets:
            _remove_socket(path, inode)
        self._sockets.clear()
        # In a thread: it waits for a collector that may be away.
        await asyncio.to_thread(self.telemetry.stop)
        self.audit.close()

    # Listeners.

    def _add_standard_services(self) -> None:
        self.add(admin.ADMIN, admin.AdminService(self))
        self.add(admin.ACCESS, admin.AccessService(self.name, self.authorizer))
        self.add(standard.HEALTH, self.health)
        self.add(standard.CHANNELZ, standard.Channelz(), local=True)
        shown = [*self.service_names, standard.REFLECTION_V1.full_name, standard.REFLECTION_V1ALPHA.full_name]
        for descriptor in (standard.REFLECTION_V1, standard.REFLECTION_V1ALPHA):
            self.add(descriptor, standard.Reflection(shown))

    def handler(self, path: str, listener: Listener) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Make the handler of a method, for who has no listener; None: no service but a peer's own has it."""
        for service in self._services:
            if not service.peer and path.startswith(f"/{service.name}/"):
                facts = [one for one in service.facts if one.name == path.rpartition("/")[2]]
                return next(iter(self._handlers(service, facts, listener).values()), None)
        return None

    def _handlers(
        self, service: _Registered, methods: list[MethodFacts], listener: Listener
    ) -> dict[str, grpc.RpcMethodHandler[Any, Any]]:
        return {facts.name: self.pipeline.handler(facts, service.implementation, listener) for facts in methods}

    async def listen(self) -> None:
        """Open the ways in: TCP and the sockets of this machine.

        Raises:
            SettingsError: One cannot be opened.
        """
        settings = self.settings
        for address in settings.addresses:
            self.ports.append(await self._listen_tcp(Listener(TLS), address, "listen"))
        if self._anonymous_listen:
            self.anonymous_port = await self._listen_tcp(
                Listener(ANONYMOUS), self._anonymous_listen, "enrollment listen"
            )
        self.socket_dir.mkdir(parents=True, exist_ok=True)
        gid = _group(settings.socket_group)
        shared = 0o660 if settings.socket_group else 0o600
        await self._listen_unix(Listener(LOCAL, ADMIN), "admin", 0o600, -1)
        await self._listen_unix(Listener(LOCAL, OPERATOR), "operator", shared, gid)
        await self._listen_unix(Listener(LOCAL, VIEWER), "viewer", shared, gid)
        if any(service.peer for service in self._services):
            await self._listen_unix(Listener(PEER), "peer", 0o600, -1)

    def new_server(self, listener: Listener) -> grpc.aio.Server:
        """Make the gRPC server of one way in; whoever asked for it gives it a port and starts it."""
        server = grpc.aio.server(options=_OPTIONS)
        for service in self._services:
            if service.peer != (listener.kind == PEER) or (service.local and listener.kind != LOCAL):
                continue
            methods = [facts for facts in service.facts if facts.anonymous or listener.kind != ANONYMOUS]
            server.add_registered_method_handlers(service.name, self._handlers(service, methods, listener))
        forwarder = self.forwarder(listener) if self.forwarder is not None else None
        server.add_generic_rpc_handlers((_Fallback(self.pipeline, forwarder),))
        self._servers.append(server)
        return server

    async def _listen_tcp(self, listener: Listener, address: str, setting: str) -> int:
        certificates = self.trust.certificates if self.trust is not None else None
        if certificates is None:
            raise SettingsError(f"{setting}: needs certificates")
        split_address(address, setting)
        server = self.new_server(listener)
        credentials = certificates.server_credentials(require_client_certificate=listener.kind == TLS)
        try:
            port = server.add_secure_port(address, credentials)
        except RuntimeError as error:
            raise SettingsError(
                f"{setting}: cannot listen on {address}; another process has it, or it is not of this host"
            ) from error
        await server.start()
        return port

    async def _listen_unix(self, listener: Listener, name: str, mode: int, gid: int) -> None:
        path = self.socket_dir / f"{name}.sock"
        if len(os.fsencode(path)) > _PATH_LIMIT_BYTES:
            raise SettingsError(f"run_dir: the path {path} is too long for a socket ({_PATH_LIMIT_BYTES} bytes)")
        _clear_socket(path)
        server = self.new_server(listener)
        # Between bind and chmod nobody else may connect either.
        before = os.umask(0o177)
        try:
            server.add_insecure_port(f"unix:{path}")
        except RuntimeError as error:
            raise SettingsError(f"run_dir: cannot listen on {path}") from error
        finally:
            os.umask(before)
        if gid >= 0:
            os.chown(path, -1, gid)
        path.chmod(mode)
        self._sockets.append((path, path.stat().st_ino))
        await server.start()

    # Files that may change.

    def refresh(self) -> None:
        """Look at certificates, policy and denial list, take what is new, and judge the callers of open calls again."""
        if self.trust is not None:
            self.trust.refresh()
            self.pipeline.review()

    def take_denials(self, denials: Denials) -> None:
        """Obey a denial list that is not in the file yet, and judge the callers of open calls by it."""
        if self.trust is not None:
            self.trust.take_denials(denials)
            self.pipeline.review()

    def reload_certificates(self, *, validate_only: bool = False) -> None:
        """Read certificate, key, trust bundle and denial list again.

        Raises:
            BackingMissing: One is absent or does not parse; the old ones stay in use.
        """
        if self.trust is not None:
            self.trust.reload(validate_only=validate_only)
            self.pipeline.review()


def _group(name: str) -> int:
    if not name:
        return -1
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError as error:
        raise SettingsError(f"socket_group: there is no group `{name}`") from error


def _clear_socket(path: Path) -> None:
    """Remove the socket of a process that is gone; gRPC itself would take that of a living one away too.

    Raises:
        SettingsError: A process listens there, or something else than a socket is in the way.
    """
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise SettingsError(f"run_dir: {path} is in the way and no socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1)
        try:
            probe.connect(os.fspath(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
            return
        except FileNotFoundError:
            return
    raise SettingsError(f"run_dir: another process listens on {path}")


def _remove_socket(path: Path, inode: int) -> None:
    try:
        if path.stat().st_ino == inode:
            path.unlink()
    except FileNotFoundError:
        return


def raise_descriptor_limit() -> None:
    """Allow the process as many descriptors as the system lets it have: each connection is one."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def hold_standard_descriptors() -> None:
    """Open what is closed of the first three: libuv, given their numbers, aborts when it is to close one."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)


def notify(state: str) -> None:
    """Tell systemd, if it started the process, how it is (sd_notify)."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel:
        try:
            channel.connect("\0" + address[1:] if address.startswith("@") else address)
            channel.send(state.encode())
        except OSError as error:
            # Inherited from somebody who has gone; no reason not to serve, or to stop in disorder.
            _log.warning("%s could not be told to %s: %s", state, address, error)


class StartRefused(Exception):
    """The system refuses a file, folder or address that the process needs; the text says which."""


async def serve(running: Callable[[], AbstractAsyncContextManager[object]]) -> None:
    """Run a process from its start to SIGTERM, SIGINT or SIGHUP: the terminal that it was started at may be closed.

    Args:
        running: Returns the context manager that is the process while it is entered.

    Raises:
        StartRefused: The system refuses something that it needs to start.
    """
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    me = asyncio.current_task()

    def on_signal() -> None:
        if stop.is_set() and me is not None:
            # Whoever asks twice does not want to wait for calls to end.
            me.cancel()
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        # nohup(1) means what it says.
        if number is not signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
            loop.add_signal_handler(number, on_signal)
    started = False
    try:
        async with running():
            started = True
            # What is there now stays: the collector need not look at it again, and forked pages stay shared.
            gc.collect()
            gc.freeze()
            notify("READY=1")
            await stop.wait()
            notify("STOPPING=1")
    except OSError as error:
        if started:
            raise
        raise StartRefused(f"cannot start: {error}") from error


def main(running: Callable[[], AbstractAsyncContextManager[object]]) -> int:
    """Be the process of a service: raise limits, run on uvloop until told to stop, return the exit code.

    Args:
        running: Returns the context manager that is the process while it is entered: `lambda: app.running(settings)`.
    """
    import uvloop

    hold_standard_descriptors()
    raise_descriptor_limit()
    tune_allocator()
    try:
        uvloop.run(serve(running))
    except SettingsError as error:
        print(error, file=sys.stderr)  # noqa: T201  # for whoever started it by hand; there may be no log yet
        return 2
    except (StoreError, StartRefused) as error:
        print(error, file=sys.stderr)  # noqa: T201  # it says what to do; where it was raised helps nobody
        return 1
    except VirtfleetError as error:
        print(f"{error.reason}: {error.message}", file=sys.stderr)  # noqa: T201
        return 1
    except asyncio.CancelledError:
        return 130
    return 0
