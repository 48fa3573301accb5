"""A guest's console: the one client of QEMU's socket, its ring, and the readers and the writer behind it.

The launcher always reads, and never waits for a reader: QEMU keeps 278 bytes, then the guest waits on its UART.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket

from virtfleet_launcher import protocol, report, rundir
from virtfleet_launcher.loop import Loop, Timer
from virtfleet_launcher.protocol import FRAME, Refusal
from virtfleet_launcher.ring import Ring, RingError

__all__ = ["Console", "Reader"]

_CHUNK = 65536
_MAX_INPUT = 65536
_MAX_READERS = 64
#: Frames per reader and round, so that one fast reader does not hold up the others.
_FRAMES_PER_ROUND = 4
_FIRST_RETRY_SECONDS = 0.1
_LAST_RETRY_SECONDS = 5.0


class Console:
    """One console of one process."""

    def __init__(self, loop: Loop, socket_path: str, ring_path: str, ring: Ring) -> None:
        """Take over the ring; `connect` or `reconnect` begins to fill it."""
        self._loop = loop
        self._socket_path = socket_path
        self._ring_path = ring_path
        self.ring = ring
        self._peer: socket.socket | None = None
        self._input = bytearray()
        self._readers: list[Reader] = []
        self._retry: Timer | None = None
        self._retry_seconds = _FIRST_RETRY_SECONDS
        self._flush_planned = False
        self.writer: Reader | None = None
        self.ended = False

    @classmethod
    def restore(cls, loop: Loop, socket_path: str, ring_path: str, size: int) -> Console:
        """Take over the ring that another launcher left; a damaged one is replaced, which the log tells."""
        try:
            ring = Ring(ring_path)
        except (RingError, OSError) as error:
            report.error("the ring is lost", path=ring_path, error=repr(error))
            with contextlib.suppress(FileNotFoundError):
                os.unlink(ring_path)
            ring = Ring.create(ring_path, size)
        return cls(loop, socket_path, ring_path, ring)

    def connect(self) -> None:
        """Become the client of the socket.

        Raises:
            OSError: nobody listens there.
        """
        self._peer = rundir.connect(self._socket_path)
        self._loop.add(self._peer.fileno(), select.EPOLLIN, self._ready)

    def reconnect(self) -> None:
        """Become the client again in a new epoch, and try on while that does not work."""
        self._retry = None
        if self.ended:
            return
        try:
            self.connect()
        except OSError as error:
            report.warning("no console", path=self._socket_path, error=str(error))
            self._retry = self._loop.later(self._retry_seconds, self.reconnect)
            self._retry_seconds = min(2 * self._retry_seconds, _LAST_RETRY_SECONDS)
            return
        self.ring.begin_epoch()
        self._plan_flush()

    def _ready(self, events: int) -> None:
        if events & select.EPOLLOUT:
            self._send_input()
        if events & ~select.EPOLLOUT and not self._receive():
            self._disconnect()
            self._retry = self._loop.later(self._retry_seconds, self.reconnect)
            self._retry_seconds = min(2 * self._retry_seconds, _LAST_RETRY_SECONDS)

    def _receive(self) -> bool:
        """Read once and return whether the connection lives."""
        if self._peer is None:
            return False
        try:
            data = self._peer.recv(_CHUNK)
        except BlockingIOError:
            return True
        except OSError:
            return False
        if data:
            self._retry_seconds = _FIRST_RETRY_SECONDS
            self.ring.write(data)
            self._plan_flush()
        return bool(data)

    def _disconnect(self) -> None:
        if self._peer is not None:
            self._loop.remove(self._peer.fileno())
            self._peer.close()
            self._peer = None
        self._input.clear()

    def _plan_flush(self) -> None:
        # Once per round for all that came in it: QEMU sends byte by byte.
        if self._readers and not self._flush_planned:
            self._flush_planned = True
            self._loop.soon(self._flush)

    def _flush(self) -> None:
        self._flush_planned = False
        for reader in list(self._readers):
            reader.flush()

    def write(self, data: bytes) -> None:
        """Type to the guest; without a connection it is dropped, as a terminal without a line would."""
        if self._peer is not None:
            self._input += data
            self._send_input()

    @property
    def input_full(self) -> bool:
        """Whether the writer has to wait until the guest has read."""
        return len(self._input) >= _MAX_INPUT

    def _send_input(self) -> None:
        if self._peer is None:
            return
        try:
            while self._input:
                del self._input[: self._peer.send(self._input)]
        except BlockingIOError:
            self._loop.change(self._peer.fileno(), select.EPOLLIN | select.EPOLLOUT)
            return
        except OSError:
            # The reading side meets the same end and reconnects.
            self._input.clear()
        self._loop.change(self._peer.fileno(), select.EPOLLIN)
        if self.writer is not None:
            self.writer.resume()

    def attach(self, place: tuple[int, int], *, follow: bool, write: bool) -> socket.socket:
        """Add a reader at a place and return its end of the line.

        Raises:
            Refusal: WRITER_BUSY or TOO_MANY.
        """
        if len(self._readers) >= _MAX_READERS:
            raise Refusal("TOO_MANY", f"the console has {_MAX_READERS} readers")
        if write and self.ended:
            raise Refusal("NOT_RUNNING", "nobody reads what would be written")
        if write and self.writer is not None:
            raise Refusal("WRITER_BUSY", "the console has a writer")
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        reader = Reader(self._loop, self, ours, place, follow=follow)
        self._readers.append(reader)
        if write:
            self.writer = reader
        self._plan_flush()
        return theirs

    def detach(self, reader: Reader) -> None:
        """Forget a reader that is closed."""
        if reader in self._readers:
            self._readers.remove(reader)
        if self.writer is reader:
            self.writer = None

    def end(self) -> None:
        """Take what the process has still said, then tell the readers that nothing more will come."""
        while self._peer is not None and (before := self.ring.total) >= 0:
            if not self._receive() or self.ring.total == before:
                break
        self._disconnect()
        if self._retry is not None:
            self._retry.cancel()
        self.ended = True
        self._plan_flush()

    def close(self) -> None:
        """Let go of everything but the files."""
        self.end()
        for reader in list(self._readers):
            reader.close()
        self.ring.close()


class Reader:
    """One attached client: a cursor, and frames under way."""

    def __init__(
        self, loop: Loop, console: Console, line: socket.socket, place: tuple[int, int], *, follow: bool
    ) -> None:
        """Begin at a place (epoch, offset) of the ring."""
        self._loop = loop
        self._console = console
        self._line = line
        self._place = place
        self._follow = follow
        self._outgoing = b""
        self._incoming = bytearray()
        self._ending = False
        self._closed = False
        line.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _CHUNK)
        loop.add(line.fileno(), select.EPOLLIN, self._ready)

    def _ready(self, events: int) -> None:
        if events & select.EPOLLOUT:
            self.flush()
        if not self._closed and events & ~select.EPOLLOUT:
            self._receive()

    def flush(self) -> None:
        """Send what there is and the line takes."""
        if self._closed:
            return
        try:
            for _ in range(_FRAMES_PER_ROUND):
                while self._outgoing:
                    self._outgoing = self._outgoing[self._line.send(self._outgoing) :]
                if self._ending:
                    self.close()
                    return
                self._outgoing = self._next_frame()
                if not self._outgoing:
                    break
        except BlockingIOError:
            # The line is full: the cursor waits, the ring goes on.
            pass
        except OSError:
            self.close()
            return
        self._watch()

    def _next_frame(self) -> bytes:
        piece = self._console.ring.next(*self._place, _CHUNK)
        if piece is None:
            if self._follow and not self._console.ended:
                return b""
            self._ending = True
            return FRAME.pack(protocol.END, 0, 0, 0, *self._place)
        self._place = (piece.epoch, piece.offset + len(piece.data))
        if not piece.gap:
            return FRAME.pack(protocol.DATA, 0, 0, len(piece.data), piece.epoch, piece.offset) + piece.data
        count = protocol.UNKNOWN_COUNT if piece.skipped is None else piece.skipped
        return FRAME.pack(protocol.GAP, 0, 0, 8, piece.epoch, piece.offset) + count.to_bytes(8, "big")

    def _watch(self) -> None:
        waits_for_guest = self._console.writer is self and self._console.input_full
        reading = 0 if waits_for_guest else select.EPOLLIN
        self._loop.change(self._line.fileno(), reading | (select.EPOLLOUT if self._outgoing else 0))

    def resume(self) -> None:
        """Read on: the guest has taken what was typed."""
        if not self._closed:
            self._watch()

    def _receive(self) -> None:
        try:
            data = self._line.recv(_CHUNK)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.close()
            return
        self._incoming += data
        while len(self._incoming) >= FRAME.size:
            kind, _, _, length, _, _ = FRAME.unpack_from(self._incoming)
            releasing = kind == protocol.RELEASE and length == 0
            typing = kind == protocol.INPUT and length <= _MAX_INPUT
            if self._console.writer is not self or not (releasing or typing):
                report.warning("a console client broke the protocol", kind=kind, length=length)
                self.close()
                return
            if len(self._incoming) < FRAME.size + length:
                break
            text = bytes(self._incoming[FRAME.size : FRAME.size + length])
            del self._incoming[: FRAME.size + length]
            if releasing:
                self._console.writer = None
            else:
                self._console.write(text)
        self._watch()

    def close(self) -> None:
        """Hang up."""
        if not self._closed:
            self._closed = True
            self._loop.remove(self._line.fileno())
            self._line.close()
            self._console.detach(self)
