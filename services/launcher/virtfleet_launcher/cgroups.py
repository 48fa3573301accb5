"""A cgroup for each process below one parent directory of cgroup v2."""

from __future__ import annotations

import contextlib
import errno
import os
import select

from virtfleet_launcher import report
from virtfleet_launcher.loop import Loop
from virtfleet_launcher.protocol import Refusal
from virtfleet_launcher.requests import Limits

__all__ = ["Cgroups"]

_SUFFIX = ".guest"
_CONTROLLERS = ("memory", "cpu", "pids")
_CPU_PERIOD_US = 100_000


class Cgroups:
    """Makes, limits and removes cgroups; `reason` says why there are none."""

    def __init__(self, loop: Loop, parent: str) -> None:
        """Prepare the parent: make it, and enable what limits need."""
        self._loop = loop
        self._parent = parent
        self._lingering: dict[str, int] = {}
        self.reason = "" if parent else "no cgroup_parent is set"
        self.missing: dict[str, str] = dict.fromkeys(_CONTROLLERS, self.reason)
        if not parent:
            return
        try:
            self._prepare()
        except OSError as error:
            self.reason = f"{parent}: {error.strerror or error}"
            self.missing = dict.fromkeys(_CONTROLLERS, self.reason)

    def _prepare(self) -> None:
        above = os.path.dirname(self._parent)
        if not os.path.isdir(self._parent):
            if not os.path.exists(os.path.join(above, "cgroup.controllers")):
                raise OSError(errno.ENODEV, f"{above} is no cgroup v2 directory")
            os.mkdir(self._parent)
        if not os.path.exists(os.path.join(self._parent, "cgroup.controllers")):
            raise OSError(errno.ENODEV, "is no cgroup v2 directory")
        for controller in _CONTROLLERS:
            self.missing[controller] = self._enable(above, controller) or self._enable(self._parent, controller)
        self.missing = {name: reason for name, reason in self.missing.items() if reason}

    @staticmethod
    def _enable(directory: str, controller: str) -> str:
        """Hand a controller down to the children of a directory; return why that is not possible."""
        try:
            with open(os.path.join(directory, "cgroup.subtree_control"), encoding="ascii") as file:
                if controller in file.read().split():
                    return ""
            with open(os.path.join(directory, "cgroup.controllers"), encoding="ascii") as file:
                if controller not in file.read().split():
                    return f"the controller {controller} is not available in {directory}"
            _put(os.path.join(directory, "cgroup.subtree_control"), f"+{controller}")
        except OSError as error:
            return f"{directory}: {error.strerror}"
        return ""

    def disable(self, reason: str) -> None:
        """Do without from now on."""
        self.reason = reason
        self.missing = dict.fromkeys(_CONTROLLERS, reason)

    @property
    def possible(self) -> bool:
        """Whether processes get cgroups."""
        return not self.reason

    def path(self, guest: str) -> str:
        """Return the directory of a process."""
        return os.path.join(self._parent, guest + _SUFFIX)

    def check(self, limits: Limits) -> None:
        """Refuse limits that nothing would enforce.

        Raises:
            Refusal: LIMIT_UNSUPPORTED.
        """
        wanted = {"memory": limits.memory_bytes, "cpu": limits.cpu_millis, "pids": limits.pids}
        for controller, value in wanted.items():
            if value is not None and controller in self.missing:
                raise Refusal("LIMIT_UNSUPPORTED", f"no {controller} limit: {self.missing[controller]}")

    def make(self, guest: str, limits: Limits) -> int:
        """Make an empty, limited cgroup and return its open directory.

        What the last run left in it is killed first. On failure nothing is left.

        Raises:
            OSError: EBUSY while what was in it is still dying.
        """
        path = self.path(guest)
        try:
            os.mkdir(path)
        except FileExistsError:
            self._kill(path)
            os.rmdir(path)
            os.mkdir(path)
        self._forget_lingering(path)
        try:
            if limits.memory_bytes is not None:
                _put(os.path.join(path, "memory.max"), str(limits.memory_bytes))
            if limits.cpu_millis is not None:
                quota = limits.cpu_millis * _CPU_PERIOD_US // 1000
                _put(os.path.join(path, "cpu.max"), f"{quota} {_CPU_PERIOD_US}")
            if limits.pids is not None:
                _put(os.path.join(path, "pids.max"), str(limits.pids))
            return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except BaseException:
            os.rmdir(path)
            raise

    def remove(self, guest: str) -> None:
        """Kill what an ended process left in its cgroup and remove it, now or when the last of it has died."""
        path = self.path(guest)
        if not self._parent or path in self._lingering:
            return
        try:
            self._kill(path)
            os.rmdir(path)
        except FileNotFoundError:
            return
        except OSError as error:
            if error.errno != errno.EBUSY:
                report.error("a cgroup cannot be removed", path=path, error=str(error))
                return
            events = os.open(os.path.join(path, "cgroup.events"), os.O_RDONLY | os.O_CLOEXEC)
            self._lingering[path] = events
            self._loop.add(events, select.EPOLLPRI, lambda _events: self._emptied(path))
            # It may have become empty before it was watched.
            self._emptied(path)

    def _emptied(self, path: str) -> None:
        os.pread(self._lingering[path], 256, 0)
        try:
            os.rmdir(path)
        except FileNotFoundError:
            pass
        except OSError as error:
            if error.errno == errno.EBUSY:
                return
            report.error("a cgroup cannot be removed", path=path, error=str(error))
        self._forget_lingering(path)

    def _forget_lingering(self, path: str) -> None:
        events = self._lingering.pop(path, None)
        if events is not None:
            self._loop.remove(events)
            os.close(events)

    def sweep(self, known: set[str]) -> None:
        """Remove the empty cgroups that no process of ours accounts for."""
        if not self.possible:
            return
        for entry in os.scandir(self._parent):
            guest = entry.name.removesuffix(_SUFFIX)
            if entry.name.endswith(_SUFFIX) and entry.is_dir() and guest not in known:
                # Not empty: whoever is in there is no process of this run directory, so it is left alone.
                with contextlib.suppress(OSError):
                    os.rmdir(entry.path)

    @staticmethod
    def _kill(path: str) -> None:
        with open(os.path.join(path, "cgroup.procs"), encoding="ascii") as file:
            populated = bool(file.read(1))
        if populated:
            _put(os.path.join(path, "cgroup.kill"), "1")


def _put(path: str, text: str) -> None:
    with open(path, "w", encoding="ascii") as file:
        file.write(text)
