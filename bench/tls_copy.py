"""A copy of bytes over two hops of mutual TLS, with digest and fsync at its end: what an upload costs without us.

    python -m bench.tls_copy sink ADDRESS FOLDER CERTIFICATE KEY CA
    python -m bench.tls_copy relay ADDRESS TARGET CERTIFICATE KEY CA

A transfer begins with one byte. `U` is followed by 8 bytes of length and the bytes; the answer is their SHA-256. `D`
asks for what was sent last: the answer is its length and its bytes.
"""

from __future__ import annotations

import hashlib
import os
import socket
import ssl
import struct
import sys
from collections.abc import Callable, Sequence
from io import BufferedRandom
from pathlib import Path

PIECE_BYTES = 1 << 20
LENGTH = struct.Struct(">Q")
DIGEST_BYTES = 32
UP, DOWN = b"U", b"D"
_FILE = "copy.image"


def context(side: ssl.Purpose, files: Sequence[str]) -> ssl.SSLContext:
    """Return a TLS context that demands a certificate of the fleet from the other side."""
    certificate, key, authority = files
    made = ssl.create_default_context(side, cafile=authority)
    made.load_cert_chain(certificate, key)
    made.verify_mode = ssl.CERT_REQUIRED
    if side is ssl.Purpose.SERVER_AUTH:
        # Found by address; that it has a certificate of the fleet's authority is enough here.
        made.check_hostname = False
    return made


def connect(address: str, files: Sequence[str]) -> ssl.SSLSocket:
    """Connect to `host:port`."""
    host, _, port = address.rpartition(":")
    return context(ssl.Purpose.SERVER_AUTH, files).wrap_socket(socket.create_connection((host, int(port))))


def send(line: ssl.SSLSocket, path: Path) -> bytes:
    """Send a file; returns the digest that the other end has found."""
    line.sendall(UP + LENGTH.pack(path.stat().st_size))
    with path.open("rb") as file:
        while piece := file.read(PIECE_BYTES):
            line.sendall(piece)
    return exactly(line, DIGEST_BYTES)


def fetch(line: ssl.SSLSocket, path: Path) -> bytes:
    """Write what the other end has into a new file, safe from a power cut; returns its digest."""
    line.sendall(DOWN)
    with path.open("xb+") as file:
        _receive(line, _length(line), file.write)
        return settled(file)


def settled(file: BufferedRandom) -> bytes:
    """Return the digest of a file once all of it is on the disk."""
    file.flush()
    os.fsync(file.fileno())
    file.seek(0)
    return hashlib.file_digest(file, "sha256").digest()


def exactly(line: ssl.SSLSocket, count: int) -> bytes:
    """Read so many bytes.

    Raises:
        EOFError: The other end has gone.
    """
    found = b""
    while len(found) < count:
        piece = line.recv(count - len(found))
        if not piece:
            raise EOFError
        found += piece
    return found


def _receive(line: ssl.SSLSocket, length: int, take: Callable[[memoryview], object]) -> None:
    """Read so many bytes and hand them on, piece by piece."""
    buffer = memoryview(bytearray(PIECE_BYTES))
    while length:
        count = line.recv_into(buffer, min(PIECE_BYTES, length))
        if not count:
            raise EOFError
        take(buffer[:count])
        length -= count


def _length(line: ssl.SSLSocket) -> int:
    return int(LENGTH.unpack(exactly(line, LENGTH.size))[0])


def _sink(line: ssl.SSLSocket, folder: Path) -> None:
    if exactly(line, 1) == DOWN:
        _give(line, folder / _FILE)
        return
    digest = hashlib.sha256()
    with (folder / _FILE).open("wb") as file:

        def take(piece: memoryview) -> None:
            digest.update(piece)
            file.write(piece)

        _receive(line, _length(line), take)
        file.flush()
        os.fsync(file.fileno())
    line.sendall(digest.digest())


def _give(line: ssl.SSLSocket, path: Path) -> None:
    line.sendall(LENGTH.pack(path.stat().st_size))
    with path.open("rb") as file:
        while piece := file.read(PIECE_BYTES):
            line.sendall(piece)


def _relay(line: ssl.SSLSocket, onward: ssl.SSLSocket) -> None:
    way = exactly(line, 1)
    onward.sendall(way)
    source, target = (line, onward) if way == UP else (onward, line)
    length = _length(source)
    target.sendall(LENGTH.pack(length))
    _receive(source, length, target.sendall)
    if way == UP:
        line.sendall(exactly(onward, DIGEST_BYTES))


def main() -> None:
    """Serve one transfer after the other."""
    role, address, other, *files = sys.argv[1:]
    host, _, port = address.rpartition(":")
    server = context(ssl.Purpose.CLIENT_AUTH, files)
    with socket.create_server((host, int(port))) as listening:
        while True:
            raw, _ = listening.accept()
            try:
                with server.wrap_socket(raw, server_side=True) as line:
                    if role == "sink":
                        _sink(line, Path(other))
                    else:
                        with connect(other, files) as onward:
                            _relay(line, onward)
            except (EOFError, OSError):
                # Whoever only looks whether somebody listens.
                continue


if __name__ == "__main__":
    main()
