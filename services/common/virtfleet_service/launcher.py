"""The asyncio client of the node's launcher, which forks guests and daemons, reaps them and keeps their consoles.

The wire protocol is described in ``services/launcher/virtfleet_launcher/protocol.py``. A client stands for one service
(its socket names it) and sees only the processes that this service spawned. It connects when it is first used and again
whenever the launcher was away; all verbs are idempotent, so a call that was cut off is made again while the patience
lasts. Errors: `LauncherError` with the launcher's reason, and below it `LauncherUnavailable` when nobody answers.
"""

from __future__ import annotations

import array
import asyncio
import base64
import contextlib
import json
import os
import socket
import struct
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from virtfleet_service.launcher_model import (
    Capabilities,
    Connected,
    ConsoleData,
    ConsoleGap,
    Exit,
    Exited,
    LauncherError,
    LauncherUnavailable,
    Layer,
    Limits,
    Process,
    Spawn,
    SpawnConsole,
    SpawnFile,
    SpawnSocket,
    SpawnTap,
    decode_exit,
    decode_process,
    encode_spawn,
    known,
)

__all__ = [
    "Capabilities",
    "Connected",
    "Console",
    "ConsoleData",
    "ConsoleGap",
    "Exit",
    "Exited",
    "LauncherClient",
    "LauncherError",
    "LauncherUnavailable",
    "Layer",
    "Limits",
    "Process",
    "Spawn",
    "SpawnConsole",
    "SpawnFile",
    "SpawnSocket",
    "SpawnTap",
]

_MAX_LINE = 64 * 1024 * 1024
_MAX_REQUEST = 2 * 1024 * 1024
"""The longest line that a launcher takes. Of a longer one it does not know the number, so nobody would be answered."""

_READ = 262144
_MAX_FDS = 32
_FIRST_RETRY_SECONDS = 0.02
_LAST_RETRY_SECONDS = 1.0

_FRAME = struct.Struct(">BBHIQQ")
_DATA, _GAP, _END, _INPUT, _RELEASE = 1, 2, 3, 16, 17
_UNKNOWN_COUNT = 2**64 - 1
_INPUT_CHUNK = 32768


def _dial(path: str) -> socket.socket:
    """Connect to a path of any length (sun_path ends at 107 bytes; through a directory's descriptor it does not)."""
    line = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    line.setblocking(False)
    try:
        directory = os.open(Path(path).parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            line.connect(f"/proc/self/fd/{directory}/{Path(path).name}")
        finally:
            os.close(directory)
    except OSError as error:
        line.close()
        raise LauncherUnavailable(f"{path}: {error.strerror}") from error
    return line


class _Line:
    """One connection: requests out, replies matched by number, events into a queue, descriptors in order."""

    def __init__(self, path: str) -> None:
        self._loop = asyncio.get_running_loop()
        self._socket = _dial(path)
        self._buffer = bytearray()
        self._searched = 0
        self._fds: list[int] = []
        self._waiting: dict[int, asyncio.Future[tuple[dict[str, Any], list[int]]]] = {}
        self._number = 0
        self._sending = asyncio.Lock()
        self.events: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        self.closed = False
        self._loop.add_reader(self._socket.fileno(), self._receive)

    def _receive(self) -> None:
        room = socket.CMSG_SPACE(_MAX_FDS * array.array("i").itemsize)
        try:
            data, ancillary, _, _ = self._socket.recvmsg(_READ, room, socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            return
        except OSError:
            self.close()
            return
        for level, kind, payload in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                self._fds.extend(array.array("i", payload))
        if not data:
            self.close()
            return
        self._buffer += data
        while (end := self._buffer.find(b"\n", self._searched)) >= 0:
            line = bytes(self._buffer[:end])
            del self._buffer[: end + 1]
            self._searched = 0
            self._dispatch(json.loads(line))
        self._searched = len(self._buffer)
        if self._searched > _MAX_LINE:
            self.close()

    def _dispatch(self, message: dict[str, Any]) -> None:
        if "event" in message:
            self.events.put_nowait(message)
            return
        ok = message.get("ok", {})
        fds = [self._fds.pop(0) for _ in range(ok.get("fds", 0))]
        future = self._waiting.pop(message["id"], None) if message.get("id") is not None else None
        if future is None or future.done():
            # Nobody waits any more, or the launcher complains about the line itself and hangs up next.
            _close_all(fds)
        elif "error" in message:
            error = dict(message["error"])
            future.set_exception(LauncherError(error.pop("reason"), error.pop("message"), error))
        else:
            future.set_result((ok, fds))

    async def call(
        self, verb: str, fields: Mapping[str, Any], fds: Sequence[int] = ()
    ) -> tuple[dict[str, Any], list[int]]:
        """Make a request and return its answer and descriptors.

        Raises:
            LauncherError: it was refused, or (LauncherUnavailable) the line broke.
        """
        self._number += 1
        number = self._number
        line = json.dumps({"id": number, "verb": verb, **fields}).encode() + b"\n"
        if len(line) > _MAX_REQUEST:
            raise LauncherError("TOO_LARGE", f"the request has {len(line)} bytes; the limit is {_MAX_REQUEST}")
        future: asyncio.Future[tuple[dict[str, Any], list[int]]] = self._loop.create_future()
        self._waiting[number] = future
        try:
            async with self._sending:
                await self._send(line, fds)
            return await future
        finally:
            self._waiting.pop(number, None)
            if future.done() and not future.cancelled():
                # Whoever was cancelled does not ask any more; the loop shall not complain about it.
                future.exception()

    async def _send(self, line: bytes, fds: Sequence[int]) -> None:
        if self.closed:
            raise LauncherUnavailable("the launcher hung up")
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        try:
            try:
                sent = self._socket.sendmsg([line], rights)
            except BlockingIOError:
                await self._writable()
                sent = self._socket.sendmsg([line], rights)
            while sent < len(line):
                await self._writable()
                sent += self._socket.send(line[sent:])
        except OSError as error:
            self.close()
            raise LauncherUnavailable(f"the launcher hung up: {error.strerror}") from error
        except BaseException:
            # Half a line is out: nothing can follow it.
            self.close()
            raise

    async def _writable(self) -> None:
        if self.closed:
            raise LauncherUnavailable("the launcher hung up")
        ready = asyncio.Event()
        descriptor = self._socket.fileno()
        self._loop.add_writer(descriptor, ready.set)
        try:
            await ready.wait()
        finally:
            if not self.closed:
                self._loop.remove_writer(descriptor)

    def close(self) -> None:
        """Hang up; who waits gets LauncherUnavailable."""
        if self.closed:
            return
        self.closed = True
        self._loop.remove_reader(self._socket.fileno())
        self._loop.remove_writer(self._socket.fileno())
        self._socket.close()
        _close_all(self._fds)
        self._fds.clear()
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(LauncherUnavailable("the launcher hung up before it answered"))
        self.events.put_nowait(None)


def _close_all(fds: Sequence[int]) -> None:
    for descriptor in fds:
        os.close(descriptor)


class LauncherClient:
    """A service's way to its node's launcher; use as ``async with LauncherClient.connect(path) as launcher``."""

    def __init__(self, path: str, *, patience_seconds: float = 5.0, answer_seconds: float = 15.0) -> None:
        """Prepare; nothing is connected yet.

        `patience_seconds` is how long a call waits for a launcher that is away, `answer_seconds` how long for an
        answer.
        """
        self._path = str(Path(path).absolute())
        self._patience_seconds = patience_seconds
        self._answer_seconds = answer_seconds
        self._line: _Line | None = None

    @classmethod
    def connect(cls, path: str, *, patience_seconds: float = 5.0, answer_seconds: float = 15.0) -> Self:
        """Return a client for the socket at `path`; it need not exist yet."""
        return cls(path, patience_seconds=patience_seconds, answer_seconds=answer_seconds)

    async def __aenter__(self) -> Self:
        """Enter; connecting is left to the first call."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Hang up."""
        self.close()

    def close(self) -> None:
        """Hang up; calls under way end with LauncherUnavailable. The client may be used again."""
        if self._line is not None:
            self._line.close()
            self._line = None

    async def _call(
        self, verb: str, fields: Mapping[str, Any], fds: Sequence[int] = (), *, bounded: bool = True
    ) -> tuple[dict[str, Any], list[int]]:
        """Make a call, and again with a new launcher while the patience lasts: every verb is idempotent."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._patience_seconds
        pause = _FIRST_RETRY_SECONDS
        while True:
            try:
                if self._line is None or self._line.closed:
                    self._line = _Line(self._path)
                async with asyncio.timeout(self._answer_seconds if bounded else None):
                    return await self._line.call(verb, fields, fds)
            except TimeoutError:
                raise LauncherUnavailable(f"no answer to {verb} in {self._answer_seconds} s") from None
            except LauncherUnavailable:
                if bounded and loop.time() + pause > deadline:
                    raise
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LAST_RETRY_SECONDS)

    async def capabilities(self) -> Capabilities:
        """Return what the launcher is, may do and cannot do here, with reasons."""
        answer, _ = await self._call("hello", {})
        fields = known(Capabilities, answer)
        for name in ("uids", "gids", "groups", "executables", "root_helpers"):
            fields[name] = tuple(fields[name])
        fields["layers"] = {name: Layer(**known(Layer, layer)) for name, layer in answer["layers"].items()}
        return Capabilities(**fields)

    async def spawn(self, spawn: Spawn, fds: Mapping[str, int] | None = None) -> Process:
        """Start a process and return it when its exec has succeeded.

        `fds` are descriptors of the caller by name (the child gets them as ``{fd:NAME}``); they stay the caller's and
        may be closed afterwards. Idempotent by the token; after a failure nothing is left; after a cancellation it may
        run: `inspect` tells.

        Raises:
            LauncherError: EXEC_FAILED (details: stage, errno), ALREADY_RUNNING, ID_TAKEN, EXECUTABLE_REFUSED,
                UID_REFUSED, CAPABILITY_REFUSED, FILE_REFUSED, LIMIT_UNSUPPORTED, SOCKET_FAILED, TAP_FAILED,
                FILE_FAILED, SPAWN_FAILED, INVALID, TOO_LARGE; LauncherUnavailable.
        """
        passed = dict(fds or {})
        answer, _ = await self._call("spawn", encode_spawn(spawn, list(passed)), list(passed.values()))
        return decode_process(answer)

    async def list_processes(self) -> list[Process]:
        """Return all processes of this service, ended ones that were not forgotten too; without argv."""
        answer, _ = await self._call("list", {})
        return [decode_process(item) for item in answer["processes"]]

    async def inspect(self, guest: str) -> Process:
        """Return one process.

        Raises:
            LauncherError: NOT_FOUND; LauncherUnavailable.
        """
        answer, _ = await self._call("inspect", {"guest": guest})
        return decode_process(answer)

    async def kill(self, guest: str, signal: str = "KILL") -> None:
        """Send a signal by its name without SIG; through a pidfd, so never to a successor of the pid.

        Raises:
            LauncherError: NOT_FOUND, NOT_RUNNING; LauncherUnavailable.
        """
        await self._call("kill", {"guest": guest, "signal": signal})

    async def wait(self, guest: str) -> Exit:
        """Wait for a process's end, over any number of launchers; bound it with `asyncio.timeout`.

        Raises:
            LauncherError: NOT_FOUND, also when it is forgotten meanwhile.
        """
        answer, _ = await self._call("wait", {"guest": guest}, bounded=False)
        return decode_exit(answer)

    async def forget(self, guest: str) -> bool:
        """Remove what is left of an ended process and return whether there was anything. Idempotent.

        Raises:
            LauncherError: STILL_RUNNING; LauncherUnavailable.
        """
        answer, _ = await self._call("forget", {"guest": guest})
        return bool(answer["existed"])

    async def log(self, guest: str, count: int = 16384) -> bytes:
        """Return the end of what a process wrote to stdout and stderr.

        Raises:
            LauncherError: NOT_FOUND; LauncherUnavailable.
        """
        answer, _ = await self._call("log", {"guest": guest, "bytes": count})
        return base64.b64decode(answer["data"])

    async def open_socket(self, guest: str, name: str) -> socket.socket:
        """Return a non-blocking socket connected to one of a process's sockets (QMP); the caller closes it.

        Raises:
            LauncherError: NOT_FOUND, NO_SOCKET, CONSOLE_SOCKET, CONNECT_FAILED (nobody listens any more);
                LauncherUnavailable.
        """
        _, fds = await self._call("connect", {"guest": guest, "socket": name})
        return _adopted(fds[0])

    async def events(self) -> AsyncIterator[Connected | Exited]:
        """Yield `Connected` at each (re)connection, then `Exited` for each process that has ended or ends.

        Never ends by itself and survives the launcher's death; `Exited` comes at least once until `forget`.
        """
        pause = _FIRST_RETRY_SECONDS
        while True:
            try:
                line = _Line(self._path)
            except LauncherUnavailable:
                await asyncio.sleep(pause)
                pause = min(2 * pause, _LAST_RETRY_SECONDS)
                continue
            try:
                with contextlib.suppress(LauncherUnavailable):
                    answer, _ = await line.call("watch", {})
                    pause = _FIRST_RETRY_SECONDS
                    yield Connected(answer["instance"])
                    while (message := await line.events.get()) is not None:
                        if message["event"] == "exited":
                            yield Exited(decode_exit(message["exit"]))
            finally:
                line.close()

    async def console(
        self,
        guest: str,
        *,
        console: str = "",
        epoch: int | None = None,
        offset: int | None = None,
        newest: bool = False,
        follow: bool = True,
        write: bool = False,
    ) -> Console:
        """Attach to a console at a place that an earlier chunk named, else at the oldest (or newest) byte.

        With `write` this becomes the one writer. Without `follow` it ends at the last byte there is. Works for ended
        processes too.

        Raises:
            LauncherError: NOT_FOUND, NO_CONSOLE, WRITER_BUSY, NOT_RUNNING (write after the end), TOO_MANY;
                LauncherUnavailable.
        """
        attached = Console(self, guest, console, follow=follow, write=write)
        await attached.attach(epoch, offset, newest=newest)
        return attached

    async def attach(self, fields: Mapping[str, Any]) -> tuple[int, int, socket.socket]:
        """Attach to a console and return the first place and the line that speaks frames; `console` is for users."""
        answer, fds = await self._call("console", fields)
        return answer["epoch"], answer["offset"], _adopted(fds[0])


def _adopted(descriptor: int) -> socket.socket:
    line = socket.socket(fileno=descriptor)
    line.setblocking(False)
    return line


class Console:
    """An attached console: iterate for chunks, `write` to type. Another launcher is met with a `ConsoleGap`."""

    def __init__(self, client: LauncherClient, guest: str, console: str, *, follow: bool, write: bool) -> None:
        """Prepare; `LauncherClient.console` makes and attaches it."""
        self._client = client
        self._guest = guest
        self._console = console
        self._follow = follow
        self._write = write
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None
        #: The place of the next byte.
        self.epoch = 0
        self.offset = 0

    async def attach(self, epoch: int | None, offset: int | None, *, newest: bool) -> None:
        """Attach at a place; `LauncherClient.console` says what it raises."""
        fields: dict[str, Any] = {
            "guest": self._guest,
            "console": self._console,
            "start": "newest" if newest else "oldest",
            "follow": self._follow,
            "write": self._write,
        }
        if epoch is not None and offset is not None:
            fields |= {"epoch": epoch, "offset": offset}
        self.epoch, self.offset, line = await self._client.attach(fields)
        self._reader, self._writer = await asyncio.open_unix_connection(sock=line)

    async def __aenter__(self) -> Self:
        """Enter; it is attached already."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Detach."""
        await self.close()

    async def close(self) -> None:
        """Detach; the writer's place becomes free."""
        if self._writer is not None:
            self._writer.close()
            # The launcher may have hung up first; either way it is closed.
            with contextlib.suppress(OSError):
                await self._writer.wait_closed()
            self._reader = self._writer = None

    async def __aiter__(self) -> AsyncIterator[ConsoleData | ConsoleGap]:
        """Yield chunks until the process has ended (or, without `follow`, until the last byte).

        Raises:
            LauncherUnavailable: the launcher stayed away for longer than the client's patience.
            LauncherError: NOT_FOUND after a reconnection.
        """
        while self._reader is not None:
            try:
                header = await self._reader.readexactly(_FRAME.size)
                kind, _, _, length, epoch, offset = _FRAME.unpack(header)
                payload = await self._reader.readexactly(length)
            except (asyncio.IncompleteReadError, OSError):
                await self.close()
                await self.attach(self.epoch, self.offset, newest=False)
                continue
            if kind == _END:
                return
            self.epoch, self.offset = epoch, offset
            if kind == _DATA:
                self.offset += length
                yield ConsoleData(epoch, offset, payload)
            elif kind == _GAP:
                count = int.from_bytes(payload, "big")
                yield ConsoleGap(epoch, offset, None if count == _UNKNOWN_COUNT else count)

    async def write(self, data: bytes) -> None:
        """Type to the guest; waits while the guest does not read.

        Raises:
            LauncherError: NOT_WRITER; LauncherUnavailable when the line broke: what was typed may be lost.
        """
        if not self._write:
            raise LauncherError("NOT_WRITER", "the console was attached for reading")
        if self._writer is None:
            raise LauncherUnavailable("the console is not attached")
        try:
            for at in range(0, len(data), _INPUT_CHUNK):
                piece = data[at : at + _INPUT_CHUNK]
                self._writer.write(_FRAME.pack(_INPUT, 0, 0, len(piece), 0, 0) + piece)
                await self._writer.drain()
        except OSError as error:
            raise LauncherUnavailable(f"the console's line broke: {error}") from error

    async def release(self) -> None:
        """Give the writer's place up and go on reading."""
        if self._write and self._writer is not None:
            self._write = False
            self._writer.write(_FRAME.pack(_RELEASE, 0, 0, 0, 0, 0))
            await self._writer.drain()
