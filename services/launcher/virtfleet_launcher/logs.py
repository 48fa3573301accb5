"""What processes write to stdout and stderr: a file each, cut when it is large, so nothing hangs on a pipe of ours."""

from __future__ import annotations

import os
import select
import struct

from virtfleet_launcher import kernel, report
from virtfleet_launcher.loop import Loop
from virtfleet_launcher.rundir import RunDirectory

__all__ = ["Logs"]

_EVENT = struct.Struct("iIII")
_IN_IGNORED = 0x8000


class Logs:
    """Watches the files; the second last half is kept beside as `log.1`."""

    def __init__(self, loop: Loop, limit: int) -> None:
        """Keep each log under about twice `limit` bytes."""
        self._limit = limit
        self._inotify = kernel.inotify()
        self._watched: dict[int, RunDirectory] = {}
        loop.add(self._inotify, select.EPOLLIN, self._ready)

    def open(self, directory: RunDirectory) -> int:
        """Make and watch the log of a new process; the descriptor is for the child."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
        descriptor = os.open(directory.file("log"), flags, 0o600)
        self.watch(directory)
        return descriptor

    def watch(self, directory: RunDirectory) -> None:
        """Watch the log of an adopted process, and cut it if it grew meanwhile."""
        try:
            self._watched[kernel.inotify_watch(self._inotify, directory.file("log"))] = directory
        except OSError as error:
            report.warning("a log is not bounded", path=directory.file("log"), error=str(error))
            return
        self._cut(directory)

    def _ready(self, _events: int) -> None:
        data = os.read(self._inotify, 65536)
        at = 0
        changed: dict[int, None] = {}
        while at < len(data):
            watch, mask, _, length = _EVENT.unpack_from(data, at)
            at += _EVENT.size + length
            if mask & _IN_IGNORED:
                self._watched.pop(watch, None)
            else:
                changed[watch] = None
        for watch in changed:
            if watch in self._watched:
                self._cut(self._watched[watch])

    def _cut(self, directory: RunDirectory) -> None:
        try:
            with open(directory.file("log"), "r+b") as file:
                size = file.seek(0, os.SEEK_END)
                if size <= self._limit:
                    return
                file.seek(size - self._limit // 2)
                directory.write("log.1", file.read(self._limit // 2))
                # The writer appends, so it goes on at the new end.
                file.truncate(0)
        except FileNotFoundError:
            return

    @staticmethod
    def tail(directory: RunDirectory, count: int) -> bytes:
        """Return the last bytes of what a process wrote."""
        result = b""
        for name in ("log", "log.1"):
            try:
                with open(directory.file(name), "rb") as file:
                    wanted = count - len(result)
                    file.seek(max(0, file.seek(0, os.SEEK_END) - wanted))
                    result = file.read(wanted) + result
            except FileNotFoundError:
                continue
        return result
