"""What each verb does: take the fields, ask the table of processes, answer."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

from virtfleet_launcher import __version__, protocol, rundir
from virtfleet_launcher.layers import Layer
from virtfleet_launcher.processes import Process, Processes
from virtfleet_launcher.protocol import Fields, Refusal
from virtfleet_launcher.requests import parse_spawn
from virtfleet_launcher.server import Connection
from virtfleet_launcher.settings import Settings

__all__ = ["Verbs"]

_MAX_PENDING = 1024
_MAX_LOG = 256 * 1024


class Verbs:
    """The launcher's answers."""

    def __init__(
        self, settings: Settings, layers: dict[str, Layer], groups: tuple[int, ...], processes: Processes
    ) -> None:
        """Answer for these processes."""
        self._settings = settings
        self._layers = layers
        self._groups = groups
        self._processes = processes
        self._instance = time.time_ns() // 1000
        self._verbs: dict[str, Callable[[Connection, int, Fields], None]] = {
            "hello": self._hello,
            "capabilities": self._hello,
            "spawn": self._spawn,
            "list": self._list,
            "inspect": self._inspect,
            "kill": self._kill,
            "wait": self._wait,
            "watch": self._watch,
            "forget": self._forget,
            "log": self._log,
            "connect": self._connect,
            "console": self._console,
        }
        self._watching: dict[Connection, Callable[[Process], None]] = {}

    def handle(self, connection: Connection, number: int, request: dict[str, Any]) -> None:
        """Do what a request asks for.

        Raises:
            Refusal: the answer is an error.
        """
        fields = Fields(request)
        verb = fields.text("verb", ".{0,100}")
        call = self._verbs.get(verb)
        if call is None:
            raise Refusal("UNKNOWN_VERB", f"there is no verb {verb!r}")
        call(connection, number, fields)

    def _process(self, connection: Connection, fields: Fields) -> Process:
        return self._processes.get(connection.client, fields.text("guest", protocol.GUEST))

    def _hello(self, connection: Connection, number: int, fields: Fields) -> None:
        fields.done()
        settings = self._settings
        connection.answer(
            number,
            {
                "protocol": protocol.PROTOCOL,
                "version": __version__,
                "instance": self._instance,
                "pid": os.getpid(),
                "boot_id": self._processes.boot_id,
                "run_dir": settings.run_dir,
                "guests_dir": os.path.join(settings.run_dir, "guests"),
                "single_user": settings.single_user,
                "uids": settings.uids,
                "gids": settings.gids,
                "groups": self._groups,
                "executables": settings.executables,
                "root_helpers": settings.allow_root_helpers,
                "ring_bytes": settings.ring_bytes,
                "log_bytes": settings.log_bytes,
                "layers": {name: layer._asdict() for name, layer in self._layers.items()},
            },
        )

    def _spawn(self, connection: Connection, number: int, fields: Fields) -> None:
        request = parse_spawn(fields, self._settings, self._groups)
        passed = connection.take(len(request.fds))
        try:
            self._processes.spawn(connection.client, request, passed, self._answer(connection, number))
        finally:
            for descriptor in passed:
                os.close(descriptor)

    @staticmethod
    def _answer(connection: Connection, number: int) -> Callable[[Process | Refusal], None]:
        def answer(result: Process | Refusal) -> None:
            if isinstance(result, Refusal):
                connection.refuse(number, result)
            else:
                connection.answer(number, result.describe())

        return answer

    def _list(self, connection: Connection, number: int, fields: Fields) -> None:
        fields.done()
        processes = self._processes.of(connection.client)
        connection.answer(number, {"processes": [process.describe(full=False) for process in processes]})

    def _inspect(self, connection: Connection, number: int, fields: Fields) -> None:
        process = self._process(connection, fields)
        fields.done()
        connection.answer(number, process.describe())

    def _kill(self, connection: Connection, number: int, fields: Fields) -> None:
        process = self._process(connection, fields)
        name = fields.choice("signal", protocol.SIGNALS)
        fields.done()
        self._processes.kill(process, name)
        connection.answer(number, {})

    def _wait(self, connection: Connection, number: int, fields: Fields) -> None:
        process = self._process(connection, fields)
        fields.done()
        if process.exit is not None:
            connection.answer(number, process.exit)
            return
        if len(process.waiting) >= _MAX_PENDING:
            raise Refusal("TOO_MANY", f"{_MAX_PENDING} requests wait for {process.guest}")

        def answer(ended: Process | Refusal) -> None:
            # A client keeps its connection for years: nothing of a process may stay with it.
            connection.on_close.discard(leave)
            if isinstance(ended, Process) and ended.exit is not None:
                connection.answer(number, ended.exit)

        def leave() -> None:
            if answer in process.waiting:
                process.waiting.remove(answer)

        process.waiting.append(answer)
        connection.on_close.add(leave)

    def _watch(self, connection: Connection, number: int, fields: Fields) -> None:
        fields.done()
        if connection in self._watching:
            raise Refusal("INVALID", "this connection watches already")

        def tell(process: Process) -> None:
            if process.client in ("", connection.client):
                connection.send({"event": "exited", "exit": process.exit})

        def leave() -> None:
            self._watching.pop(connection, None)
            self._processes.watchers.remove(tell)

        connection.answer(number, {"instance": self._instance})
        for process in self._processes.of(connection.client):
            if process.exit is not None:
                tell(process)
        if not connection.closed:
            self._watching[connection] = tell
            self._processes.watchers.append(tell)
            connection.on_close.add(leave)

    def _forget(self, connection: Connection, number: int, fields: Fields) -> None:
        guest = fields.text("guest", protocol.GUEST)
        fields.done()
        try:
            process = self._processes.get(connection.client, guest)
        except Refusal:
            connection.answer(number, {"existed": False})
            return
        self._processes.forget(process)
        connection.answer(number, {"existed": True})

    def _log(self, connection: Connection, number: int, fields: Fields) -> None:
        process = self._process(connection, fields)
        count = fields.integer("bytes", 0, _MAX_LOG, 16384)
        fields.done()
        connection.answer(number, {"data": self._processes.log(process, count)})

    def _connect(self, connection: Connection, number: int, fields: Fields) -> None:
        process = self._process(connection, fields)
        name = fields.text("socket", protocol.NAME)
        fields.done()
        if name not in process.record.get("sockets", []):
            raise Refusal("NO_SOCKET", f"{process.guest} has no socket {name}")
        if name in process.record.get("consoles", {}):
            raise Refusal("CONSOLE_SOCKET", f"{name} is a console: it has one client, the launcher")
        try:
            peer = rundir.connect(process.directory.file(name))
        except OSError as error:
            raise Refusal("CONNECT_FAILED", f"{name}: {error.strerror}", errno=error.strerror) from error
        connection.answer(number, {"fds": 1}, [peer.detach()])

    def _console(self, connection: Connection, number: int, fields: Fields) -> None:
        process = self._process(connection, fields)
        name = fields.text("console", f"({protocol.NAME})?", "")
        epoch = fields.optional_integer("epoch", 0, 2**63)
        offset = fields.optional_integer("offset", 0, 2**63)
        start = fields.choice("start", ("oldest", "newest"), "oldest")
        follow = fields.flag("follow", default=True)
        write = fields.flag("write", default=False)
        fields.done()
        if (epoch is None) != (offset is None):
            raise fields.bad("epoch and offset", "go together")
        console = self._processes.console(process, name)
        if epoch is not None and offset is not None:
            place = (epoch, offset)
        else:
            place = console.ring.oldest() if start == "oldest" else console.ring.newest()
        line = console.attach(place, follow=follow, write=write)
        connection.answer(number, {"fds": 1, "epoch": place[0], "offset": place[1]}, [line.detach()])
