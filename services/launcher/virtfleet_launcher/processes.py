"""All processes: spawned here, adopted from the launcher before, ended and not yet forgotten."""

from __future__ import annotations

import base64
import contextlib
import errno
import os
import re
import select
import signal
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from virtfleet_launcher import birth, kernel, protocol, report
from virtfleet_launcher.cgroups import Cgroups
from virtfleet_launcher.console import Console
from virtfleet_launcher.logs import Logs
from virtfleet_launcher.loop import Loop
from virtfleet_launcher.protocol import Refusal, encode
from virtfleet_launcher.requests import SpawnRequest
from virtfleet_launcher.ring import Ring
from virtfleet_launcher.rundir import RunDirectory
from virtfleet_launcher.settings import Settings

__all__ = ["Process", "Processes"]


def _number(fields: dict[str, Any], name: str) -> int:
    value = fields.get(name)
    return value if type(value) is int and 0 < value < 2**62 else 0


def _left(directory: RunDirectory, name: str) -> dict[str, Any]:
    """Return a file's object that can be done without."""
    try:
        return directory.read(name) or {}
    except OSError as error:
        report.error("a file of a run directory cannot be read", path=directory.file(name), error=str(error))
        return {}


def _sound(record: dict[str, Any]) -> dict[str, Any]:
    """Return what can be used of a record that was damaged, or written by another release."""
    sound: dict[str, Any] = {
        name: value for name, value in record.items() if isinstance(value, _RECORD_FIELDS.get(name, type(None)))
    }
    consoles = sound.get("consoles", {}).items()
    sound["consoles"] = {name: size for name, size in consoles if type(size) is int and 0 < size <= _LARGEST_RING}
    for name in ("sockets", "argv"):
        sound[name] = [item for item in sound.get(name, []) if isinstance(item, str)]
    return sound


Answer = Callable[["Process | Refusal"], None]
_RECORD_FIELDS = {
    "client": str,
    "token": str,
    "argv": list,
    "uid": int,
    "gid": int,
    "sockets": list,
    "consoles": dict,
    "cgroup": str,
}
_EXIT_FIELDS = {"guest", "pid", "outcome", "code", "signal", "utime", "maxrss", "time"}
_LARGEST_RING = 64 * 1024 * 1024
#: How long a dead process may stay a zombie of somebody else before its status is given up.
_REAP_SECONDS = 2.0


class Process:
    """One process and what the launcher knows about it."""

    def __init__(self, guest: str, directory: RunDirectory, record: dict[str, Any]) -> None:
        """Describe a process by the record in its run directory."""
        self.guest = guest
        self.directory = directory
        self.record = record
        self.client: str = record.get("client", "")
        self.token: str = record.get("token", "")
        self.state = "starting"
        self.pid = 0
        self.pidfd = -1
        self.start_time = 0
        self.boot_id = ""
        self.adopted = False
        self.cgroup_reason = ""
        self.fresh_directory = False
        self.exec_pipe = -1
        self.failure: Refusal | None = None
        self.exit: dict[str, Any] | None = None
        self.consoles: dict[str, Console] = {}
        self.starting: list[Answer] = []
        self.waiting: list[Answer] = []

    def describe(self, *, full: bool = True) -> dict[str, object]:
        """Return it as the protocol has it."""
        record = self.record
        result: dict[str, object] = {
            "guest": self.guest,
            "state": self.state,
            "pid": self.pid,
            "start_time": self.start_time,
            "boot_id": self.boot_id,
            "token": self.token,
            "uid": record.get("uid", -1),
            "gid": record.get("gid", -1),
            "adopted": self.adopted,
            "cgroup": record.get("cgroup", ""),
            "cgroup_reason": self.cgroup_reason,
            "sockets": {name: self.directory.file(name) for name in record.get("sockets", [])},
            "consoles": list(record.get("consoles", {})),
            "exit": self.exit,
        }
        if full:
            result["argv"] = record.get("argv", [])
        return result


class Processes:
    """The table of processes; every change of it and of the run directories happens here."""

    def __init__(self, loop: Loop, settings: Settings, cgroups: Cgroups, descriptor_limit: birth.Limit) -> None:
        """Start with an empty table; `adopt` fills it."""
        self._loop = loop
        self._settings = settings
        self._cgroups = cgroups
        self._limit = descriptor_limit
        self._guests = os.path.join(settings.run_dir, "guests")
        self._logs = Logs(loop, settings.log_bytes)
        self._table: dict[str, Process] = {}
        self.boot_id = kernel.boot_id()
        self.watchers: list[Callable[[Process], None]] = []

    # --- finding ---------------------------------------------------------------------------------------------------

    def of(self, client: str) -> list[Process]:
        """Return the processes that a client may see."""
        return [process for process in self._table.values() if process.client in ("", client)]

    def get(self, client: str, guest: str) -> Process:
        """Return one of them.

        Raises:
            Refusal: NOT_FOUND.
        """
        process = self._table.get(guest)
        if process is None or process.client not in ("", client):
            raise Refusal("NOT_FOUND", f"no process {guest}", guest=guest)
        return process

    def adopt(self) -> None:
        """Find what an earlier launcher left: the living are watched again, the dead get their exit."""
        for entry in sorted(os.scandir(self._guests), key=lambda entry: entry.name):
            if entry.is_dir(follow_symlinks=False) and re.fullmatch(protocol.GUEST, entry.name):
                try:
                    self._adopt(entry.name)
                except OSError as error:
                    report.error("a run directory cannot be adopted", guest=entry.name, error=str(error))
        self._cgroups.sweep({process.guest for process in self._table.values() if process.state != "ended"})
        living = sum(process.state == "running" for process in self._table.values())
        report.info("adopted", running=living, ended=len(self._table) - living)

    def _adopt(self, guest: str) -> None:
        directory = RunDirectory(self._guests, guest)
        born = directory.read("pid")
        if not _number(born or {}, "pid"):
            born = self._look_for(directory) or born
        if born is None:
            # The launcher died before the fork: nothing ran, nobody was told that it did.
            directory.remove()
            return
        process = Process(guest, directory, _sound(_left(directory, "record")))
        process.adopted = True
        process.pid, process.start_time = _number(born, "pid"), _number(born, "start_time")
        process.boot_id = str(born.get("boot_id", ""))
        self._table[guest] = process
        left = _left(directory, "exit")
        # Of a damaged one nothing is believed: whether the process lives is asked of the kernel.
        process.exit = left if left.keys() >= _EXIT_FIELDS else None
        if process.exit is not None:
            process.state = "ended"
            self._cgroups.remove(guest)
            return
        process.pidfd = self._find(process)
        if process.pidfd < 0:
            self._conclude(process, None, None)
            return
        process.state = "running"
        self._loop.add(process.pidfd, select.EPOLLIN, lambda events: self._died(process, events))
        self._logs.watch(directory)
        for name, size in process.record.get("consoles", {}).items():
            console = self._restore(process, name, size)
            console.reconnect()

    def _look_for(self, directory: RunDirectory) -> dict[str, Any] | None:
        """Find the living process of a run directory whose pid file is lost or damaged; None: there is none.

        Whoever would take it for ended lets a second one run on the same disks.
        """
        try:
            pid = kernel.writer_of(directory.file("log"))
            if not pid:
                return None
            born = {"pid": pid, "start_time": kernel.start_time(pid), "boot_id": self.boot_id}
        except OSError:
            return None
        report.warning("a process without a sound pid file was found by its log", path=directory.path, pid=pid)
        directory.write("pid", encode(born))
        return born

    def _restore(self, process: Process, name: str, size: int) -> Console:
        path = process.directory.file
        console = Console.restore(self._loop, path(name), path(name + ".ring"), size)
        process.consoles[name] = console
        return console

    def _find(self, process: Process) -> int:
        """Return a pidfd of a recorded process if it still is that process, else -1."""
        if process.boot_id != self.boot_id:
            return -1
        try:
            pidfd = os.pidfd_open(process.pid)
        except (OSError, ValueError, OverflowError):
            return -1
        try:
            # After the pidfd is open the pid cannot come to mean another process.
            if kernel.start_time(process.pid) == process.start_time:
                return pidfd
        except OSError:
            pass
        os.close(pidfd)
        return -1

    # --- starting --------------------------------------------------------------------------------------------------

    def spawn(self, client: str, request: SpawnRequest, passed: list[int], answer: Answer) -> None:
        """Start a process and answer when its exec succeeded or failed; nothing is left of a failure.

        Raises:
            Refusal: ALREADY_RUNNING, ID_TAKEN or what failed before the fork.
        """
        old = self._table.get(request.guest)
        if old is not None and old.client not in ("", client):
            raise Refusal("ID_TAKEN", f"{request.guest} belongs to another client", guest=request.guest)
        if old is not None and old.state != "ended":
            if old.token != request.token:
                raise Refusal("ALREADY_RUNNING", f"{request.guest} runs with another token", guest=request.guest)
            if old.state == "starting":
                old.starting.append(answer)
            else:
                answer(old)
            return
        self._cgroups.check(request.limits)
        if old is not None:
            self._let_go(old)
        process = self._start(client, request, passed)
        process.starting.append(answer)
        self._table[request.guest] = process

    def _start(self, client: str, request: SpawnRequest, passed: list[int]) -> Process:
        directory = RunDirectory(self._guests, request.guest)
        record: dict[str, Any] = {
            "client": client,
            "token": request.token,
            "argv": list(request.argv),
            "uid": request.uid,
            "gid": request.gid,
            "sockets": [item.name for item in request.sockets],
            "consoles": {item.name: item.ring_bytes for item in request.consoles},
            "cgroup": self._cgroups.path(request.guest) if self._cgroups.possible else "",
        }
        process = Process(request.guest, directory, record)
        with ExitStack() as undo, ExitStack() as opened:
            process.fresh_directory = directory.make()
            undo.callback(directory.remove if process.fresh_directory else directory.clear)
            try:
                directory.clear()
                named = birth.descriptors(opened, request, directory, passed)
                self._open_consoles(process, request, undo)
                log = self._logs.open(directory)
                opened.callback(os.close, log)
                directory.write("spec", request.spec)
                cgroup = self._make_cgroup(process, request, undo)
                if cgroup is not None:
                    opened.callback(os.close, cgroup)
                directory.write("record", encode(record))
                born = birth.bear(request, directory, named, log, cgroup, self.boot_id, self._limit)
            except OSError as error:
                code = errno.errorcode.get(error.errno or 0, "")
                raise Refusal("SPAWN_FAILED", str(error), errno=code) from error
            undo.pop_all()
        process.pid, process.pidfd, process.start_time = born.pid, born.pidfd, born.start_time
        process.boot_id, process.exec_pipe = self.boot_id, born.exec_pipe
        self._loop.add(born.exec_pipe, select.EPOLLIN, lambda _events: self._executed(process))
        self._loop.add(born.pidfd, select.EPOLLIN, lambda events: self._died(process, events))
        return process

    def _open_consoles(self, process: Process, request: SpawnRequest, undo: ExitStack) -> None:
        for item in request.consoles:
            ring_path = process.directory.file(item.name + ".ring")
            ring = Ring.create(ring_path, item.ring_bytes)
            console = Console(self._loop, process.directory.file(item.name), ring_path, ring)
            process.consoles[item.name] = console
            undo.callback(console.close)
            # Before the fork: the connection waits in the backlog and has the first byte.
            console.connect()

    def _make_cgroup(self, process: Process, request: SpawnRequest, undo: ExitStack) -> int | None:
        if not self._cgroups.possible:
            process.cgroup_reason = self._cgroups.reason
            return None
        descriptor = self._cgroups.make(request.guest, request.limits)
        undo.callback(self._cgroups.remove, request.guest)
        return descriptor

    def _executed(self, process: Process) -> None:
        """Read the fate of exec: end of file is success; an error is answered when the child has been reaped."""
        try:
            data = os.read(process.exec_pipe, birth.EXEC_ERROR.size)
        except BlockingIOError:
            # Another child just forked holds a copy of the pipe's end for a moment; here the process itself is dead.
            data = b""
        self._loop.remove(process.exec_pipe)
        os.close(process.exec_pipe)
        process.exec_pipe = -1
        if data:
            stage, number = birth.EXEC_ERROR.unpack(data)
            process.failure = Refusal(
                "EXEC_FAILED",
                f"{birth.STAGES[stage]}: {os.strerror(number)}",
                stage=birth.STAGES[stage],
                errno=errno.errorcode.get(number, str(number)),
            )
            return
        process.state = "running"
        self._tell(process.starting, process)

    @staticmethod
    def _tell(answers: list[Answer], value: Process | Refusal) -> None:
        for answer in answers:
            answer(value)
        answers.clear()

    # --- ending ----------------------------------------------------------------------------------------------------

    def _died(self, process: Process, events: int) -> None:
        if process.exec_pipe >= 0:
            self._executed(process)
        try:
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        except ChildProcessError:
            self._died_elsewhere(process, events)
            return
        if pid == 0:
            return
        if process.failure is not None:
            self._undo(process)
            return
        self._conclude(process, status, {"utime": round(usage.ru_utime, 3), "maxrss": usage.ru_maxrss})

    def _died_elsewhere(self, process: Process, events: int) -> None:
        """Take the status of somebody else's child: from the zombie, else from the kernel once it is reaped."""
        dead = kernel.zombie(process.pid, process.start_time)
        if dead is not None:
            self._conclude(process, dead[0], {"utime": round(dead[1], 3)})
            return
        if events & select.EPOLLHUP:
            self._conclude(process, kernel.exit_status(process.pidfd), None)
            return
        # A zombie of which we learn nothing: readable all the time, so wait for the hang-up alone.
        self._loop.change(process.pidfd, 0)
        self._loop.later(_REAP_SECONDS, lambda: self._give_up(process))

    def _give_up(self, process: Process) -> None:
        if process.state != "ended":
            self._conclude(process, kernel.exit_status(process.pidfd), None)

    def _undo(self, process: Process) -> None:
        """Leave nothing of a process whose exec failed."""
        self._let_go(process)
        self._cgroups.remove(process.guest)
        if process.fresh_directory:
            process.directory.remove()
        else:
            process.directory.clear()
        del self._table[process.guest]
        if process.failure is not None:
            self._tell(process.starting, process.failure)

    def _conclude(self, process: Process, status: int | None, usage: dict[str, Any] | None) -> None:
        for console in process.consoles.values():
            console.end()
        code = None if status is None else os.waitstatus_to_exitcode(status)
        process.exit = {
            "guest": process.guest,
            "pid": process.pid,
            "outcome": "unknown" if code is None else "exited" if code >= 0 else "signaled",
            "code": code if code is not None and code >= 0 else None,
            "signal": -code if code is not None and code < 0 else None,
            "utime": None,
            "maxrss": None,
            **(usage or {}),
            "time": round(time.time(), 3),
        }
        try:
            process.directory.write("exit", encode(process.exit))
        except OSError as error:
            # The next launcher will say "unknown"; those who listen now learn the truth.
            report.error("an exit cannot be written", guest=process.guest, error=str(error))
        process.state = "ended"
        self._close_pidfd(process)
        self._tell(process.starting, process)
        self._tell(process.waiting, process)
        # Whoever waits for the end goes on while the kernel takes the group apart; whatever he asks comes after it.
        self._cgroups.remove(process.guest)
        for watcher in list(self.watchers):
            watcher(process)

    def _close_pidfd(self, process: Process) -> None:
        if process.pidfd >= 0:
            self._loop.remove(process.pidfd)
            os.close(process.pidfd)
            process.pidfd = -1

    def _let_go(self, process: Process) -> None:
        """Close all that is open for a process that ended."""
        self._close_pidfd(process)
        for console in process.consoles.values():
            console.close()
        process.consoles.clear()

    # --- what clients ask for --------------------------------------------------------------------------------------

    def kill(self, process: Process, name: str) -> None:
        """Send a signal to the process that is meant, never to one that got its pid.

        Raises:
            Refusal: NOT_RUNNING.
        """
        if process.state == "ended":
            raise Refusal("NOT_RUNNING", f"{process.guest} has ended", guest=process.guest)
        try:
            signal.pidfd_send_signal(process.pidfd, signal.Signals[f"SIG{name}"])
        except ProcessLookupError:
            raise Refusal("NOT_RUNNING", f"{process.guest} has ended", guest=process.guest) from None

    def forget(self, process: Process) -> None:
        """Remove the run directory and cgroup of an ended process.

        Raises:
            Refusal: STILL_RUNNING.
        """
        if process.state != "ended":
            raise Refusal("STILL_RUNNING", f"{process.guest} runs", guest=process.guest)
        self._let_go(process)
        self._cgroups.remove(process.guest)
        process.directory.remove()
        del self._table[process.guest]

    def console(self, process: Process, name: str) -> Console:
        """Return a console, also of a process that ended; without a name the only one.

        Raises:
            Refusal: NO_CONSOLE.
        """
        known = process.record.get("consoles", {})
        if not name and len(known) == 1:
            name = next(iter(known))
        if name not in known:
            raise Refusal("NO_CONSOLE", f"{process.guest} has the consoles {', '.join(known) or 'none'}")
        if name not in process.consoles:
            self._restore(process, name, known[name]).end()
        return process.consoles[name]

    def log(self, process: Process, count: int) -> str:
        """Return the end of what a process wrote, as base64."""
        return base64.b64encode(self._logs.tail(process.directory, count)).decode()

    def stop(self) -> None:
        """Let go of all of them; they go on."""
        with contextlib.suppress(OSError):
            for process in self._table.values():
                self._let_go(process)
