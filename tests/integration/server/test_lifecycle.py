"""Start and end of a server: sockets and their modes, ports, rotation of certificates, drain, crowds that never speak."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import os
import signal
import socket
import stat
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2

from tests.integration.server import rig as rigs
from tests.integration.server.rig import Refused, ask, refused, running
from tests.pki import Pki
from virtfleet.common.v1 import admin_pb2
from virtfleet.compute.v1 import domain_pb2
from virtfleet.storage.v1 import volume_pb2
from virtfleet_service import errors
from virtfleet_service import server as server_module
from virtfleet_service.call import Call
from virtfleet_service.server import _OPTIONS, Server
from virtfleet_service.settings import SettingsError

WHO = admin_pb2.WhoAmIRequest()
GET = domain_pb2.GetDomainRequest(name="nodes/n1/domains/web")
WATCH_HEALTH = "/grpc.health.v1.Health/Watch"


async def test_local_sockets_have_their_modes_and_go_with_the_server(tmp_path: Path) -> None:
    async with running(tmp_path, socket_group="nogroup") as rig:
        folder = rig.server.socket_dir
        modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
        assert modes == {"admin.sock": 0o600, "operator.sock": 0o660, "viewer.sock": 0o660, "peer.sock": 0o600}
    assert list(folder.iterdir()) == []


async def test_without_a_group_sockets_are_for_their_owner_alone(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        modes = {stat.S_IMODE(path.stat().st_mode) for path in rig.server.socket_dir.iterdir()}
        assert modes == {0o600}


async def test_a_stale_socket_is_replaced_and_a_living_one_is_not(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "compute"
    folder.mkdir(parents=True)
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(folder / "viewer.sock"))
    async with running(tmp_path) as rig:
        await ask(rig.socket("viewer"), rigs.WHO_AM_I, WHO)
        second = Server(rig.settings, service="compute")
        with pytest.raises(SettingsError, match="another process listens"):
            async with second:
                pass
        await ask(rig.socket("admin"), rigs.WHO_AM_I, WHO)
        await ask(rig.socket("viewer"), rigs.WHO_AM_I, WHO)


async def test_a_file_in_the_place_of_a_socket_is_not_removed(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "compute"
    folder.mkdir(parents=True)
    (folder / "admin.sock").write_text("precious")
    rig = rigs.Rig(tmp_path)
    with pytest.raises(SettingsError, match="no socket"):
        async with rig.make():
            pass
    assert (folder / "admin.sock").read_text() == "precious"


async def test_a_second_server_on_the_port_fails(tmp_path: Path) -> None:
    async with running(tmp_path / "a") as first:
        rig = rigs.Rig(tmp_path / "b")
        with pytest.raises(SettingsError, match="cannot listen"):
            async with rig.make(listen=f"127.0.0.1:{first.server.port}"):
                pass
        await ask(first.channel(first.pki.user("a", "viewer")), rigs.GET_DOMAIN, GET)


async def test_a_run_dir_that_is_too_deep_is_named(tmp_path: Path) -> None:
    rig = rigs.Rig(tmp_path)
    with pytest.raises(SettingsError, match="too long"):
        async with rig.make(run_dir=tmp_path / ("x" * 100)):
            pass


async def test_a_missing_certificate_is_named(tmp_path: Path) -> None:
    rig = rigs.Rig(tmp_path)
    assert rig.settings.tls.certificate_file
    rig.settings.tls.certificate_file.unlink()
    with pytest.raises(errors.BackingMissing, match="certificate file"):
        async with rig.make():
            pass


async def test_rotation_reaches_new_connections_and_drops_none(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        user = rig.pki.user("alice", "admin")
        old = rig.channel(user)
        stream: Any = old.unary_stream(rigs.DOWNLOAD)(
            volume_pb2.DownloadVolumeRequest(name="nodes/n1/pools/p/volumes/v").SerializeToString()
        )
        await stream.read()
        before = await ask(rig.channel(user), rigs.GET_SERVER, admin_pb2.GetServerRequest(), admin_pb2.Server)
        fresh = rig.pki.issue("node/n1/compute", lifetime=__import__("datetime").timedelta(hours=7))
        after = await ask(rig.channel(user), rigs.RELOAD, admin_pb2.ReloadCertificatesRequest(), admin_pb2.Server)
        assert after.certificate_expire_time.seconds > before.certificate_expire_time.seconds + 3600
        assert _served_certificate(rig.server.port, rig, user) == fresh.certificate
        rig.volumes.go_on.set()
        assert await stream.read() is not grpc.aio.EOF
        assert await stream.read() is grpc.aio.EOF
        await old.close()


def _served_certificate(port: int, rig: rigs.Rig, user: Any) -> bytes:
    import ssl

    context = ssl.create_default_context(cafile=str(rig.pki.ca_file))
    context.set_alpn_protocols(["h2"])
    context.load_cert_chain(user.certificate_file, user.key_file)
    with (
        socket.create_connection(("127.0.0.1", port), timeout=5) as raw,
        context.wrap_socket(raw, server_hostname="localhost") as secure,
    ):
        der = secure.getpeercert(binary_form=True)
    assert der is not None
    return ssl.DER_cert_to_PEM_cert(der).encode()


async def test_files_that_do_not_fit_leave_the_old_certificate_in_use(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        user = rig.pki.user("alice", "admin")
        rig.settings.tls.key_file.write_bytes(rig.pki.user("other").key)  # type: ignore[union-attr]  # the rig has set it
        for validate_only in (True, False):
            request = admin_pb2.ReloadCertificatesRequest(validate_only=validate_only)
            error = await refused(ask(rig.channel(user), rigs.RELOAD, request))
            assert error.short == ("FAILED_PRECONDITION", "BACKING_MISSING")
        rig.server.refresh()
        await ask(rig.channel(user), rigs.GET_DOMAIN, GET)


async def test_a_new_authority_in_the_bundle_is_trusted(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        second = Pki(tmp_path / "second")
        user = second.user("alice", "viewer")
        channel = rig.channel(user)
        assert (await refused(ask(channel, rigs.GET_DOMAIN, GET, timeout=5))).code is grpc.StatusCode.UNAVAILABLE
        rig.pki.ca_file.write_bytes(rig.pki.pem + second.pem)
        rig.server.refresh()
        await ask(rig.channel(user), rigs.GET_DOMAIN, GET)


async def test_drain_ends_calls_well_and_refuses_new_ones(tmp_path: Path) -> None:
    rig = rigs.Rig(tmp_path)
    server = rig.make(drain_seconds=5.0)
    order: list[str] = []
    go_on = asyncio.Event()

    async def act(_request: Any, _call: Call) -> bytes:
        order.append("call begins")
        await go_on.wait()
        order.append("call ends")
        return b""

    rig.domains.act = act
    async with server:
        channel, health = rig.socket("viewer"), rig.socket("viewer")
        watch: Any = health.unary_stream(WATCH_HEALTH)(b"", timeout=20)
        assert health_pb2.HealthCheckResponse.FromString(await watch.read()).status == 1
        call: Any = channel.unary_unary(rigs.GET_DOMAIN)(GET.SerializeToString(), timeout=20)
        while not order:
            await asyncio.sleep(0.01)

        async def hook() -> None:
            order.append("hook")
            assert health_pb2.HealthCheckResponse.FromString(await watch.read()).status == 2

        def failing() -> None:
            order.append("failing hook")
            raise RuntimeError("of a hook")

        server.on_drain(failing)
        server.on_drain(hook)
        drain = asyncio.create_task(server.drain())
        while "hook" not in order:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        error = await refused(ask(rig.socket("viewer"), rigs.GET_DOMAIN, GET, timeout=5))
        assert error.code is grpc.StatusCode.UNAVAILABLE
        assert not drain.done()
        go_on.set()
        await call
        await drain
        await channel.close()
        await health.close()
    assert order == ["call begins", "failing hook", "hook", "call ends"]


async def test_a_crowd_at_the_end_is_told_to_call_again(tmp_path: Path) -> None:
    """Calls that wait inside gRPC when it stops end with a bare CANCELLED, which no client repeats: none may wait."""
    rig = rigs.Rig(tmp_path)
    over = threading.Event()
    seen: collections.Counter[str] = collections.Counter()

    async def act(_request: Any, _call: Call) -> bytes:
        # As busy as a server can be: what comes in meanwhile waits inside gRPC.
        time.sleep(0.002)
        return b""

    def caller(address: str) -> None:
        options = [("grpc.use_local_subchannel_pool", 1)]
        with grpc.insecure_channel(address, options=options) as channel:
            ask: Any = channel.unary_unary(rigs.GET_DOMAIN)
            while not over.is_set():
                try:
                    ask(GET.SerializeToString(), timeout=20)
                    seen["OK"] += 1
                except grpc.RpcError as error:
                    seen[error.code().name] += 1
                    # As the error's RetryInfo asks.
                    over.wait(1)

    rig.domains.act = act
    async with rig.make(drain_seconds=5.0) as server:
        threads = [threading.Thread(target=caller, args=(f"unix:{server.socket_dir}/viewer.sock",)) for _ in range(60)]
        for thread in threads:
            thread.start()
        while seen["OK"] < 200:
            await asyncio.sleep(0.01)
        await server.drain()
        over.set()
        await asyncio.gather(*(asyncio.to_thread(thread.join) for thread in threads))
    assert set(seen) == {"OK", "UNAVAILABLE"}, seen


async def test_what_does_not_end_in_time_is_told_why(tmp_path: Path) -> None:
    rig = rigs.Rig(tmp_path)

    async def act(_request: Any, _call: Call) -> bytes:
        await asyncio.sleep(60)
        return b""

    rig.domains.act = act
    async with rig.make(drain_seconds=0.5) as server:
        channel = rig.socket("operator")
        call: Any = channel.unary_unary(rigs.GET_DOMAIN)(GET.SerializeToString(), timeout=20)
        stream: Any = channel.unary_stream(rigs.DOWNLOAD)(
            volume_pb2.DownloadVolumeRequest(name="nodes/n1/pools/p/volumes/v").SerializeToString()
        )
        await stream.read()
        async with asyncio.timeout(5):
            await server.drain()
        for ended in (call, stream.read()):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await ended
            error = Refused(caught.value)
            assert error.short == ("UNAVAILABLE", "SERVICE_DRAINING")
            assert error.retry_seconds == 1
        await channel.close()
    assert rig.volumes.ended == ["download"]


async def test_two_thousand_connections_that_never_speak_do_not_hurt(tmp_path: Path) -> None:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    silent: list[socket.socket] = []
    try:
        async with running(tmp_path) as rig:
            user = rig.pki.user("alice", "viewer")
            await ask(rig.channel(user), rigs.GET_DOMAIN, GET)
            for _ in range(2000):
                connection = socket.socket()
                connection.setblocking(False)
                connection.connect_ex(("127.0.0.1", rig.server.port))
                silent.append(connection)
                if len(silent) % 100 == 0:
                    await asyncio.sleep(0.01)
            loop = asyncio.get_running_loop()
            began = loop.time()
            await ask(rig.channel(user), rigs.GET_DOMAIN, GET, timeout=10)
            assert loop.time() - began < 5
            await _closed_by_server(silent[-1])
    finally:
        for connection in silent:
            connection.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def _closed_by_server(connection: socket.socket) -> None:
    async with asyncio.timeout(30):
        while await asyncio.get_running_loop().sock_recv(connection, 4096):
            pass


PROGRAM = """
import sys
from contextlib import asynccontextmanager
from pathlib import Path
from virtfleet_service.server import Server, main
from virtfleet_service.settings import ServiceSettings

@asynccontextmanager
async def running():
    settings = ServiceSettings(node="n1", state_dir=Path(sys.argv[1]), run_dir=Path(sys.argv[1]))
    async with Server(settings, service="compute") as server:
        print("up", flush=True)
        yield server
    print("down", flush=True)

sys.exit(main(running))
"""


@contextlib.asynccontextmanager
async def process_of(*prefix: str, folder: Path) -> AsyncIterator[asyncio.subprocess.Process]:
    """A process that serves; killed if the test fails."""
    process = await asyncio.create_subprocess_exec(
        *prefix, sys.executable, "-c", PROGRAM, str(folder), stdout=asyncio.subprocess.PIPE, env=dict(os.environ)
    )
    assert process.stdout is not None
    try:
        async with asyncio.timeout(30):
            assert await process.stdout.readline() == b"up\n"
            yield process
            assert await process.stdout.readline() == b"down\n"
            assert await process.wait() == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


@pytest.fixture
def hang_up_ends() -> Iterator[None]:
    """What nohup has begun would ignore it, these tests and their children too."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("hang_up_ends")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP], ids=lambda number: number.name)
async def test_a_process_serves_until_it_is_told_to_stop(tmp_path: Path, number: signal.Signals) -> None:
    async with process_of(folder=tmp_path) as process:
        channel = grpc.aio.insecure_channel(f"unix:{tmp_path}/compute/viewer.sock")
        await ask(channel, rigs.WHO_AM_I, WHO)
        process.send_signal(number)
    assert list((tmp_path / "compute").iterdir()) == []


@pytest.mark.usefixtures("hang_up_ends")
async def test_a_process_under_nohup_outlives_its_terminal(tmp_path: Path) -> None:
    async with process_of("nohup", folder=tmp_path) as process:
        process.send_signal(signal.SIGHUP)
        await ask(grpc.aio.insecure_channel(f"unix:{tmp_path}/compute/viewer.sock"), rigs.WHO_AM_I, WHO)
        process.send_signal(signal.SIGTERM)


async def test_a_process_tells_systemd_that_it_serves_and_does_not_need_it(tmp_path: Path) -> None:
    told = "\0virtfleet-test-" + tmp_path.name
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(told)
        systemd.setblocking(False)
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", PROGRAM, str(tmp_path),
            stdout=asyncio.subprocess.PIPE, env={**os.environ, "NOTIFY_SOCKET": "@" + told[1:]},
        )  # fmt: skip
        assert process.stdout is not None
        async with asyncio.timeout(30):
            assert await process.stdout.readline() == b"up\n"
            assert await asyncio.get_running_loop().sock_recv(systemd, 100) == b"READY=1"
    # It has gone: nobody is told of the end, which is in order all the same.
    process.terminate()
    async with asyncio.timeout(30):
        assert await process.stdout.readline() == b"down\n"
        assert await process.wait() == 0


async def test_closed_standard_descriptors_are_nobody_elses(tmp_path: Path) -> None:
    """The event loop got their numbers, and libuv ended the process when it was to close one of them."""
    closing = "import os, sys; os.close(0); os.close(2); os.execv(sys.argv[1], sys.argv[1:])"
    command = [sys.executable, "-c", closing, sys.executable, "-c", PROGRAM, str(tmp_path)]
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE, env=dict(os.environ))
    assert process.stdout is not None
    try:
        async with asyncio.timeout(30):
            assert await process.stdout.readline() == b"up\n"
            assert {str(Path(f"/proc/{process.pid}/fd/{number}").readlink()) for number in (0, 2)} == {"/dev/null"}
            process.terminate()
            assert await process.stdout.readline() == b"down\n"
            assert await process.wait() == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def test_settings_that_cannot_be_used_end_the_process_with_a_line(tmp_path: Path) -> None:
    (tmp_path / "compute").mkdir()
    (tmp_path / "compute" / "admin.sock").write_text("")
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", PROGRAM, str(tmp_path), stderr=asyncio.subprocess.PIPE, env=dict(os.environ)
    )
    async with asyncio.timeout(30):
        _, stderr = await process.communicate()
    assert process.returncode == 2
    assert b"in the way" in stderr
    assert b"Traceback" not in stderr


async def test_what_the_system_refuses_at_the_start_ends_the_process_with_a_line(tmp_path: Path) -> None:
    (tmp_path / "compute.audit.log").mkdir()
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", PROGRAM, str(tmp_path), stderr=asyncio.subprocess.PIPE, env=dict(os.environ)
    )
    async with asyncio.timeout(30):
        _, stderr = await process.communicate()
    assert process.returncode == 1
    assert b"cannot start" in stderr
    assert b"compute.audit.log" in stderr
    assert b"Traceback" not in stderr


class Wire:
    """Passes bytes between a client and a server until it is cut without a word, as by a machine that loses power."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.tasks: list[asyncio.Task[None]] = []
        self.writers: list[asyncio.StreamWriter] = []

    async def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inner, outer = await asyncio.open_connection("127.0.0.1", self.port)
        self.writers += [writer, outer]
        self.tasks += [asyncio.create_task(self._pass(reader, outer)), asyncio.create_task(self._pass(inner, writer))]

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            writer.write(data)

    def cut(self) -> None:
        """Pass nothing any more; both connections stay as they are."""
        for task in self.tasks:
            task.cancel()


async def test_a_client_that_is_gone_without_a_word_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After what the server's own options say, here thirty times as fast."""
    assert {"grpc.keepalive_time_ms": 30_000, "grpc.http2.ping_timeout_ms": 20_000}.items() <= dict(_OPTIONS).items()
    hurried = {30_000: 1_000, 20_000: 700}
    monkeypatch.setattr(server_module, "_OPTIONS", tuple((name, hurried.get(value, value)) for name, value in _OPTIONS))
    async with running(tmp_path) as rig:
        wire = Wire(rig.server.port)
        passing = await asyncio.start_server(wire.accept, "127.0.0.1", 0)
        port = passing.sockets[0].getsockname()[1]
        user = rig.pki.user("a", "operator")
        credentials = grpc.ssl_channel_credentials(rig.pki.pem, user.key, user.certificate)
        channel: Any = grpc.aio.secure_channel(f"localhost:{port}", credentials)
        request = volume_pb2.DownloadVolumeRequest(name="nodes/n1/pools/p/volumes/v").SerializeToString()
        call: Any = channel.unary_stream(rigs.DOWNLOAD)(request)
        await call.read()
        await asyncio.sleep(2.5)
        assert rig.server.active_calls_count == 1, "who answers is kept"
        wire.cut()
        async with asyncio.timeout(10):
            while rig.server.active_calls_count:
                await asyncio.sleep(0.05)
        assert rig.volumes.ended == ["download"]
        call.cancel()
        passing.close()
        for writer in wire.writers:
            writer.close()
        await channel.close()


async def test_a_client_that_pings_all_the_time_is_left_in_peace(tmp_path: Path) -> None:
    """Without gRPC, whose own client pings less often than it is told to."""
    ping, goaway, count = 6, 7, 100
    async with running(tmp_path) as rig:
        reader, writer = await asyncio.open_unix_connection(rig.server.socket_dir / "viewer.sock")
        writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4))
        for number in range(count):
            writer.write(frame(ping, number.to_bytes(8, "big")))
            await writer.drain()
            await asyncio.sleep(0.005)
        kinds: list[int] = []
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(1):
                while True:
                    head = await reader.readexactly(9)
                    await reader.readexactly(int.from_bytes(head[:3], "big"))
                    kinds.append(head[3])
        assert kinds.count(ping) == count
        assert goaway not in kinds
        writer.close()
        await writer.wait_closed()


def frame(kind: int, payload: bytes = b"") -> bytes:
    """Return a frame of HTTP/2 that belongs to no stream."""
    return len(payload).to_bytes(3, "big") + bytes((kind, 0)) + bytes(4) + payload
