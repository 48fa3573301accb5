"""QEMU without us: the arguments of a guest of ours, spawned by a few lines, up to the answer of its monitor."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import socket
import struct
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

_TUNSETIFF = 0x400454CA
_IFF_TAP, _IFF_NO_PI, _IFF_VNET_HDR = 0x0002, 0x1000, 0x4000
_DESCRIPTOR = re.compile(r"\bfd=\d+")
_PATIENCE_SECONDS = 30.0


def arguments_of(pid: int) -> list[str]:
    """Return the argument list of a process."""
    return Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")[:-1]


@dataclass(frozen=True, slots=True)
class Guest:
    """Is a guest that can be spawned again and again.

    Attributes:
        argv: The arguments, with a disk, sockets and a tap of its own.
        descriptors: What it inherits: listening sockets and taps.
        monitor: The path of its monitor.
    """

    argv: Sequence[str]
    descriptors: Sequence[int]
    monitor: Path

    def cycle(self) -> float:
        """Spawn it, shake hands with its monitor, kill it and wait for its end.

        Returns:
            The seconds from before the spawn to the end of the handshake.

        Raises:
            RuntimeError: QEMU ends, or says something else.
        """
        began = time.perf_counter()
        with (
            subprocess.Popen(
                self.argv, pass_fds=self.descriptors, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL
            ) as process,
            socket.socket(socket.AF_UNIX) as connection,
        ):
            try:
                connection.settimeout(_PATIENCE_SECONDS)
                # It listens already: the connection waits in the backlog until QEMU takes it.
                connection.connect(os.fspath(self.monitor))
                _expect(connection, "QMP")
                connection.sendall(b'{"execute":"qmp_capabilities"}\n')
                _expect(connection, "return")
                return time.perf_counter() - began
            finally:
                process.kill()


def _expect(connection: socket.socket, key: str) -> None:
    text = b""
    while not text.endswith(b"\n"):
        piece = connection.recv(4096)
        if not piece:
            raise RuntimeError("QEMU has ended before its monitor answered")
        text += piece
    if key not in json.loads(text.splitlines()[0]):
        raise RuntimeError(f"QEMU says {text!r} where {key} was expected")


@contextmanager
def adapted(argv: Sequence[str], folder: Path) -> Iterator[Guest]:
    """Give the arguments of a guest of ours what it needs to run beside it: its own disks, sockets and taps.

    Args:
        argv: The arguments, as `/proc` shows them.
        folder: Where its files are put; is made.
    """
    folder.mkdir(parents=True)
    adapted_argv: list[str] = []
    descriptors: list[int] = []
    monitor: Path | None = None
    with ExitStack() as stack:
        option = ""
        for word in argv:
            changed = word
            if option == "-blockdev":
                changed = _own_file(word, folder)
            elif option in ("-chardev", "-netdev") and _DESCRIPTOR.search(word):
                name = re.search(r"\bid=([^,]+)", word)
                path = folder / f"{len(descriptors)}.sock"
                number = stack.enter_context(_listener(path) if option == "-chardev" else _tap())
                descriptors.append(number)
                changed = _DESCRIPTOR.sub(f"fd={number}", word)
                if name is not None and any(f"chardev={name.group(1)},mode=control" in other for other in argv):
                    monitor = path
            adapted_argv.append(changed)
            option = word
        if monitor is None:
            raise RuntimeError("the arguments have no monitor")
        yield Guest(adapted_argv, descriptors, monitor)


def _own_file(word: str, folder: Path) -> str:
    node = json.loads(word)
    if "filename" not in node:
        return word
    copy = folder / f"{node['node-name']}.image"
    shutil.copyfile(node["filename"], copy)
    return json.dumps({**node, "filename": os.fspath(copy)}, separators=(",", ":"))


@contextmanager
def _listener(path: Path) -> Iterator[int]:
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(os.fspath(path))
        listening.listen()
        yield listening.fileno()


@contextmanager
def _tap() -> Iterator[int]:
    """Make a tap that vanishes with its descriptor; nothing is ever sent on it."""
    number = os.open("/dev/net/tun", os.O_RDWR)
    try:
        fcntl.ioctl(number, _TUNSETIFF, struct.pack("16sH14x", b"vfbare%d", _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR))
        yield number
    finally:
        os.close(number)
