"""The run directory of one process: its files, and that nothing ever leaves it."""

from __future__ import annotations

import errno
import json
import os
import re
import socket
from typing import Any

from virtfleet_launcher import protocol, report

__all__ = ["RunDirectory", "bind", "connect"]

_LAST_RUN = ("exit", "pid", "record", "spec", "log", "log.1")


class RunDirectory:
    """`<run>/guests/<guest>`: sockets, pid, record, spec, exit, log and rings."""

    def __init__(self, guests: str, guest: str) -> None:
        """Name the directory; `guest` must be checked, which is checked once more here.

        Raises:
            ValueError: it is no id.
        """
        if not re.fullmatch(protocol.GUEST, guest):
            message = f"{guest!r} is no id"
            raise ValueError(message)
        self.path = os.path.join(guests, guest)

    def file(self, name: str) -> str:
        """Return the path of a file in it."""
        return os.path.join(self.path, name)

    def make(self) -> bool:
        """Make it and return True, or keep what is there and return False."""
        try:
            os.mkdir(self.path, 0o700)
        except FileExistsError:
            return False
        return True

    def write(self, name: str, data: bytes) -> None:
        """Write a file so that it is there as a whole or not at all."""
        with open(self.file(name + ".new"), "wb", opener=_private) as file:
            file.write(data)
        os.rename(self.file(name + ".new"), self.file(name))

    def read(self, name: str) -> dict[str, Any] | None:
        """Return a JSON file's object; None: it is absent; an empty one (told in the log): it holds none.

        Raises:
            OSError: it is there and cannot be read, for want of descriptors perhaps.
        """
        try:
            # Not to wait for whoever would write to a pipe that lies there.
            with open(self.file(name), "rb", opener=_at_once) as file:
                value = json.load(file)
        except FileNotFoundError:
            return None
        except (ValueError, RecursionError) as error:
            report.error("a file of a run directory cannot be read", path=self.file(name), error=str(error))
            return {}
        return value if isinstance(value, dict) else {}

    def clear(self) -> None:
        """Remove what the last run left: a stale exit would hide a running process from the next launcher."""
        for entry in os.scandir(self.path):
            ours = entry.name in _LAST_RUN or entry.name.endswith((".ring", ".new"))
            if ours or (not entry.is_dir(follow_symlinks=False) and not entry.is_file(follow_symlinks=False)):
                os.unlink(entry.path)

    def remove(self) -> bool:
        """Remove the directory with all in it and return whether it was there; links are not followed."""
        if not os.path.isdir(self.path) or os.path.islink(self.path):
            return False
        for _, directories, files, descriptor in os.fwalk(self.path, topdown=False, follow_symlinks=False):
            for name in files:
                os.unlink(name, dir_fd=descriptor)
            for name in directories:
                try:
                    os.rmdir(name, dir_fd=descriptor)
                except NotADirectoryError:
                    os.unlink(name, dir_fd=descriptor)
        os.rmdir(self.path)
        return True


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)


def _at_once(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK)


def bind(path: str, mode: int, backlog: int, owner: int | None = None) -> socket.socket:
    """Return a listening unix socket at a path of any length; nobody can connect before its mode is right."""
    directory = os.open(os.path.dirname(path), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        # sun_path ends at 107 bytes; through the directory's descriptor only the name counts.
        listener.bind(f"/proc/self/fd/{directory}/{os.path.basename(path)}")
        os.chmod(path, mode)
        if owner is not None:
            os.chown(path, owner, -1)
        listener.listen(backlog)
    except BaseException:
        listener.close()
        raise
    finally:
        os.close(directory)
    return listener


def connect(path: str) -> socket.socket:
    """Return a non-blocking socket connected to a path of any length.

    Raises:
        OSError: EAGAIN when the backlog is full, ECONNREFUSED when nobody listens any more.
    """
    directory = os.open(os.path.dirname(path), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    peer = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    peer.setblocking(False)
    try:
        number = peer.connect_ex(f"/proc/self/fd/{directory}/{os.path.basename(path)}")
        if number:
            raise OSError(number, errno.errorcode.get(number, "connect"), path)
    except BaseException:
        peer.close()
        raise
    finally:
        os.close(directory)
    return peer
