"""The sockets of the clients: lines and descriptors in, lines and descriptors out."""

from __future__ import annotations

import array
import contextlib
import os
import select
import socket
from collections import deque
from collections.abc import Callable
from typing import Any

from virtfleet_launcher import protocol, report, rundir
from virtfleet_launcher.loop import Loop
from virtfleet_launcher.protocol import LineBuffer, Refusal, encode

__all__ = ["Connection", "Listener"]

#: What a client does with a request: the connection, the request's number, its verb and the rest.
Handle = Callable[["Connection", int, dict[str, Any]], None]

_READ = 65536
_MAX_CONNECTIONS = 128
_MAX_UNSENT = 8 * 1024 * 1024
_ACCEPT_REST_SECONDS = 0.5


class Listener:
    """One client's socket."""

    def __init__(self, loop: Loop, path: str, client: str, owner: int | None, handle: Handle) -> None:
        """Bind the socket, in the place of one that an earlier launcher left."""
        self._loop = loop
        self._handle = handle
        self._path = path
        self.client = client
        self.connections: set[Connection] = set()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        self._socket = rundir.bind(path, 0o600, 128, owner)
        self._socket.setblocking(False)
        self._listen()

    def _listen(self) -> None:
        self._loop.add(self._socket.fileno(), select.EPOLLIN, self._accept)

    def _accept(self, _events: int) -> None:
        try:
            peer, _ = self._socket.accept()
        except BlockingIOError:
            return
        except OSError as error:
            # Out of descriptors: the caller waits in the backlog, which would wake us without end.
            report.error("cannot accept", client=self.client, error=str(error))
            self._loop.remove(self._socket.fileno())
            self._loop.later(_ACCEPT_REST_SECONDS, self._listen)
            return
        if len(self.connections) >= _MAX_CONNECTIONS:
            report.warning("too many connections", client=self.client)
            peer.close()
            return
        peer.setblocking(False)
        self.connections.add(Connection(self._loop, peer, self, self._handle))

    def close(self) -> None:
        """Remove the socket and hang up on everybody."""
        self._loop.remove(self._socket.fileno())
        self._socket.close()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path)
        for connection in list(self.connections):
            connection.close()


class Connection:
    """One connected client; whatever it sends, the worst that happens is that it is hung up on."""

    def __init__(self, loop: Loop, peer: socket.socket, listener: Listener, handle: Handle) -> None:
        """Serve a socket that was accepted."""
        self._loop = loop
        self._socket = peer
        self._listener = listener
        self._handle = handle
        self._lines = LineBuffer()
        self._received: deque[int] = deque()
        self._outgoing: deque[tuple[bytes, list[int]]] = deque()
        self._unsent = 0
        self._hang_up_when_sent = False
        self.client = listener.client
        self.closed = False
        self.on_close: set[Callable[[], None]] = set()
        loop.add(peer.fileno(), select.EPOLLIN, self._ready)

    def _ready(self, events: int) -> None:
        if events & select.EPOLLOUT:
            self._send()
        if not self.closed and events & ~select.EPOLLOUT:
            self._receive()

    # --- in --------------------------------------------------------------------------------------------------------

    def _receive(self) -> None:
        room = socket.CMSG_SPACE((protocol.MAX_FDS + 1) * array.array("i").itemsize)
        try:
            data, ancillary, flags, _ = self._socket.recvmsg(_READ, room, socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            return
        except OSError:
            self.close()
            return
        for level, kind, payload in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                numbers = array.array("i")
                numbers.frombytes(payload[: len(payload) - len(payload) % numbers.itemsize])
                self._received.extend(numbers)
        if not data:
            self.close()
            return
        if flags & socket.MSG_CTRUNC or len(self._received) > protocol.MAX_FDS:
            self._break(Refusal("TOO_MANY", f"more than {protocol.MAX_FDS} descriptors wait for their request"))
            return
        for line in self._lines.feed(data):
            if self.closed or self._hang_up_when_sent:
                return
            self._line(line)
        if self._received and self._lines.empty:
            self._break(Refusal("INVALID", "descriptors that no request declared"))

    def _line(self, line: bytes | None) -> None:
        try:
            if line is None:
                raise Refusal("TOO_LARGE", f"a line is at most {protocol.MAX_LINE} bytes")
            request = protocol.parse_line(line)
            number = request.pop("id", None)
            if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < 2**53:
                raise Refusal("INVALID", "id must be a number from 0 to 2^53", field="id")
        except Refusal as refusal:
            if self._received:
                self._break(refusal)
            else:
                self.send({"id": None, "error": refusal.payload()})
            return
        try:
            self._handle(self, number, request)
        except Refusal as refusal:
            self.refuse(number, refusal)
            if self._received:
                # They belonged to this request, or to nobody; the next must not get them.
                self._break(Refusal("INVALID", "descriptors of a refused request"))
        except Exception as failure:
            self.refuse(number, Refusal("INTERNAL", f"the launcher failed: {type(failure).__name__}"))
            raise

    def take(self, count: int) -> list[int]:
        """Take descriptors off the queue for the request that declares them; the caller closes them.

        Raises:
            Refusal: INVALID; so many have not come.
        """
        if count > len(self._received):
            raise Refusal("INVALID", f"{count} descriptors declared, {len(self._received)} received", field="fds")
        return [self._received.popleft() for _ in range(count)]

    # --- out -------------------------------------------------------------------------------------------------------

    def answer(self, number: int, value: dict[str, object], fds: list[int] | None = None) -> None:
        """Answer a request; the descriptors are closed here, sent or not."""
        self.send({"id": number, "ok": value}, fds)

    def refuse(self, number: int, refusal: Refusal) -> None:
        """Answer a request with an error."""
        self.send({"id": number, "error": refusal.payload()})

    def send(self, message: dict[str, object], fds: list[int] | None = None) -> None:
        """Send a line as soon as the peer takes it; a peer that takes nothing is hung up on."""
        data = encode(message)
        if self.closed or self._unsent + len(data) > _MAX_UNSENT:
            _close_all(fds or [])
            if not self.closed:
                report.warning("a client does not read", client=self.client)
                self.close()
            return
        self._outgoing.append((data, fds or []))
        self._unsent += len(data)
        if len(self._outgoing) == 1:
            self._send()

    def _send(self) -> None:
        try:
            while self._outgoing:
                data, fds = self._outgoing[0]
                rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
                sent = self._socket.sendmsg([data], rights)
                _close_all(fds)
                self._unsent -= sent
                if sent == len(data):
                    self._outgoing.popleft()
                else:
                    self._outgoing[0] = (data[sent:], [])
        except BlockingIOError:
            self._loop.change(self._socket.fileno(), select.EPOLLIN | select.EPOLLOUT)
            return
        except OSError:
            self.close()
            return
        if self._hang_up_when_sent:
            self.close()
        else:
            self._loop.change(self._socket.fileno(), select.EPOLLIN)

    def _break(self, refusal: Refusal) -> None:
        """Say why, then hang up: it cannot be told any more which descriptor belongs to which line."""
        _close_all(list(self._received))
        self._received.clear()
        self._hang_up_when_sent = True
        self.send({"id": None, "error": refusal.payload()})

    def close(self) -> None:
        """Hang up."""
        if self.closed:
            return
        self.closed = True
        self._loop.remove(self._socket.fileno())
        self._socket.close()
        _close_all(list(self._received))
        self._received.clear()
        for _, fds in self._outgoing:
            _close_all(fds)
        self._outgoing.clear()
        self._listener.connections.discard(self)
        for call in list(self.on_close):
            call()


def _close_all(fds: list[int]) -> None:
    for descriptor in fds:
        os.close(descriptor)
