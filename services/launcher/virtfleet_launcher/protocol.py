r"""The wire protocol between the launcher and its clients.

Transport
    A unix stream socket per client service, ``<run>/<client>.sock``, mode 0600. Each side sends JSON objects, one a
    line (UTF-8, ``\n`` at the end, at most `MAX_LINE` bytes). Descriptors travel as SCM_RIGHTS with the first byte of
    the line that declares them; a receiver takes as many from its queue as the line says, in order. A client sees only
    the processes that were spawned over its own socket.

Requests and replies
    Request ``{"id": N, "verb": V, …}``, reply ``{"id": N, "ok": {…}}`` or
    ``{"id": N, "error": {"reason": R, "message": M, …}}``. Replies may come in another order than requests. An unknown
    field, a wrong type or a value out of range is INVALID and has no effect. A line that is no request at all is
    answered with ``"id": null``; when descriptors wait at that moment the connection is closed too, because nobody can
    tell any more to which line they belong.

Verbs (every field without a default is required)
    ``hello``
        → ``{protocol, version, instance, pid, boot_id, run_dir, guests_dir, single_user, uids: [low, high],
        gids: [low, high], groups: […], executables: […], root_helpers: […], ring_bytes, log_bytes,
        layers: {NAME: {possible, reason}}}``. `instance` is new with each start of the launcher. Layers:
        user, session, no_new_privs, ambient_capabilities, cgroup, memory_limit, cpu_limit, pids_limit, seccomp, tap,
        exit_status_of_adopted. The verb ``capabilities`` is the same.
    ``spawn``
        ``{guest, token, argv: [str], env: {} , cwd: "/", uid, gid: uid, groups: [], umask: 63,
        sockets: [{name, mode: 384, backlog: 16}], taps: [{name, ifname}], files: [{name, path, flags: "r" | "rw"}],
        fds: [name], consoles: [{name, ring_bytes}], limits: {memory_bytes, cpu_millis, pids},
        rlimits: {"NOFILE": [soft, hard]}, ambient_capabilities: [], no_new_privs: true, spec: base64}``
        → the process as in ``inspect``, once exec succeeded.
        ``{fd:NAME}`` in argv and env becomes the descriptor's number in the child. `sockets` are bound and listening in
        the run directory before the fork; a console names one of them, and the launcher is its one client from before
        the first byte. `fds` names the descriptors sent along, in order. `files` opens only what the settings list.
        `spec` is written as file ``spec`` into the run directory. In single-user mode uid and gid may be left out.
        Idempotent by token: the same guest with the same token, running, answers the same; another token is
        ALREADY_RUNNING. What the last run of that guest left (exit, pid, ring, log) is removed first. When it fails
        nothing of it is left.
    ``list`` → ``{processes: [process without argv]}`` · ``inspect {guest}`` → process:
        ``{guest, state: "starting" | "running" | "ended", pid, start_time, boot_id, token, uid, gid, argv, adopted,
        cgroup, cgroup_reason, sockets: {name: path}, consoles: [name], exit}``; `exit` is null or
        ``{guest, pid, outcome: "exited" | "signaled" | "unknown", code, signal, utime, maxrss, time}``: code and signal
        are null where unknown, utime (seconds) and maxrss (KiB) where the launcher was not the parent.
    ``kill {guest, signal}`` → ``{}``; signal is a name of `SIGNALS`, sent through the pidfd. Ended: NOT_RUNNING.
    ``wait {guest}`` → exit, when it has ended; at once when it did before.
    ``watch`` → ``{instance}``, then ``{"event": "exited", "exit": {…}}`` for each ended process that was not forgotten
        and for each that ends: at least once until ``forget``. The file ``exit`` is written before anybody is told.
    ``forget {guest}`` → ``{existed}``; removes run directory and cgroup of an ended process. Running: STILL_RUNNING.
    ``log {guest, bytes: 16384}`` → ``{data: base64}``: the end of what it wrote to stdout and stderr.
    ``connect {guest, socket}`` → ``{fds: 1}`` and one connected descriptor. The socket's path may also be used directly
        by who can reach the run directory; this way no path length and no permission is in the way. Console sockets are
        refused: QEMU serves one client, a second would hang in silence.
    ``console {guest, console: the only one, epoch: null, offset: null, start: "oldest" | "newest", follow: true,
        write: false}`` → ``{fds: 1, epoch, offset}`` and one descriptor that speaks frames (below). With `write` the
        first who asks becomes the writer; another gets WRITER_BUSY until that one releases or closes.

Console frames
    Both ways: header ``>BBHIQQ`` = kind, flags, 0, payload length, epoch, byte offset; then the payload. An offset
    counts all bytes of this run of the guest; an epoch is one launcher's connection to the console, and between two
    epochs an unknown number of bytes is missing. Launcher to client: DATA; GAP (payload: u64 number of bytes that were
    skipped, `UNKNOWN_COUNT` when nobody counted them: new epoch, or an offset of another run); END (nothing more will
    come). Client to launcher, from the writer alone: INPUT, RELEASE. A reader that does not read loses bytes, told by
    GAP, and never slows the guest or other readers.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
import struct
from typing import Any

__all__ = [
    "DATA",
    "END",
    "FRAME",
    "GAP",
    "INPUT",
    "MAX_FDS",
    "MAX_LINE",
    "PROTOCOL",
    "RELEASE",
    "SIGNALS",
    "UNKNOWN_COUNT",
    "Fields",
    "LineBuffer",
    "Refusal",
    "encode",
    "parse_line",
]

PROTOCOL = 1
MAX_LINE = 2 * 1024 * 1024
#: Descriptors that may wait on one connection for the line that declares them.
MAX_FDS = 32

FRAME = struct.Struct(">BBHIQQ")
DATA, GAP, END, INPUT, RELEASE = 1, 2, 3, 16, 17
UNKNOWN_COUNT = 2**64 - 1

SIGNALS = ("TERM", "KILL", "INT", "HUP", "QUIT", "USR1", "USR2", "STOP", "CONT")

GUEST = r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}"
NAME = r"[a-z0-9][a-z0-9._-]{0,31}"
INTERFACE = r"[A-Za-z0-9][A-Za-z0-9._-]{0,14}"
TOKEN = r"[ -~]{1,128}"  # noqa: S105 - a pattern


class Refusal(Exception):
    """A request is answered with an error; nothing of it has any effect."""

    def __init__(self, reason: str, message: str, **details: object) -> None:
        """Make the answer: a stable reason, a text for people and what else a program may need."""
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.details = details

    def payload(self) -> dict[str, object]:
        """Return the error as it goes over the wire."""
        return {"reason": self.reason, "message": self.message, **self.details}


def encode(message: dict[str, object]) -> bytes:
    """Return one line."""
    return json.dumps(message, separators=(",", ":"), allow_nan=False).encode() + b"\n"


def _no_constants(text: str) -> float:
    message = f"{text} is not JSON"
    raise ValueError(message)


def parse_line(line: bytes) -> dict[str, Any]:
    """Return the request of a line, whatever its sender had in mind.

    Raises:
        Refusal: INVALID; it is not a JSON object.
    """
    try:
        value = json.loads(line.decode(), parse_constant=_no_constants)
    except (ValueError, RecursionError) as error:
        reason = "INVALID"
        raise Refusal(reason, f"not a JSON object: {type(error).__name__}") from None
    if not isinstance(value, dict):
        reason = "INVALID"
        raise Refusal(reason, f"not a JSON object but {type(value).__name__}")
    return value


class LineBuffer:
    """Cuts a stream into lines; one that is too long is reported once and skipped up to its end."""

    def __init__(self) -> None:
        """Start at the beginning of a line."""
        self._data = bytearray()
        self._searched = 0
        self._skipping = False

    @property
    def empty(self) -> bool:
        """Whether the stream stands between two lines."""
        return not self._data and not self._skipping

    def feed(self, data: bytes) -> list[bytes | None]:
        """Return the lines that are complete now; None stands for one that was too long."""
        self._data += data
        lines: list[bytes | None] = []
        while (end := self._data.find(b"\n", self._searched)) >= 0:
            line = bytes(self._data[:end])
            del self._data[: end + 1]
            self._searched = 0
            if self._skipping:
                self._skipping = False
            else:
                lines.append(line if len(line) <= MAX_LINE else None)
        self._searched = len(self._data)
        if self._searched > MAX_LINE:
            if not self._skipping:
                lines.append(None)
            self._skipping = True
        if self._skipping:
            self._data.clear()
            self._searched = 0
        return lines


class Fields:
    """Takes an object's fields one by one, checked; `done` refuses what is left over."""

    def __init__(self, value: object, where: str = "") -> None:
        """Read the object that stands at `where` in the request."""
        if not isinstance(value, dict):
            raise self._bad(where or "request", "must be an object")
        self._rest: dict[str, Any] = dict(value)
        self._where = where

    @staticmethod
    def _bad(field: str, message: str) -> Refusal:
        return Refusal("INVALID", f"{field} {message}", field=field)

    def _take(self, name: str, kinds: type | tuple[type, ...], default: object) -> Any:  # noqa: ANN401 - JSON
        value = self._rest.pop(name, default)
        if value is _REQUIRED:
            raise self._bad(self._where + name, "is missing")
        # bool is an int to Python, not to JSON.
        wrong_bool = isinstance(value, bool) and kinds is not bool
        if value is not default and (wrong_bool or not isinstance(value, kinds)):
            raise self._bad(self._where + name, "has the wrong type")
        return value

    def text(self, name: str, pattern: str, default: object = None) -> str:
        """Take a string that matches the whole pattern."""
        value = self._take(name, str, _REQUIRED if default is None else default)
        if not re.fullmatch(pattern, value, re.DOTALL):
            raise self._bad(self._where + name, f"must match {pattern}")
        return str(value)

    def choice(self, name: str, choices: tuple[str, ...], default: object = None) -> str:
        """Take one of some strings."""
        value = self._take(name, str, _REQUIRED if default is None else default)
        if value not in choices:
            raise self._bad(self._where + name, f"must be one of {', '.join(choices)}")
        return str(value)

    def integer(self, name: str, low: int, high: int, default: int | None = None) -> int:
        """Take a whole number within bounds."""
        value: int = self._take(name, int, _REQUIRED if default is None else default)
        if not low <= value <= high:
            raise self._bad(self._where + name, f"must be from {low} to {high}")
        return value

    def optional_integer(self, name: str, low: int, high: int) -> int | None:
        """Take a whole number within bounds, or None where it is absent or null."""
        if self._rest.get(name) is None:
            self._rest.pop(name, None)
            return None
        return self.integer(name, low, high)

    def flag(self, name: str, *, default: bool) -> bool:
        """Take a boolean."""
        return bool(self._take(name, bool, default))

    def data(self, name: str, limit: int) -> bytes:
        """Take base64 text of at most `limit` bytes, empty by default."""
        try:
            value = base64.b64decode(self._take(name, str, ""), validate=True)
        except (binascii.Error, ValueError):
            raise self._bad(self._where + name, "must be base64") from None
        if len(value) > limit:
            raise self._bad(self._where + name, f"must be at most {limit} bytes")
        return value

    def items(self, name: str, limit: int) -> list[Any]:
        """Take a list of at most `limit` items of any kind, empty by default."""
        value: list[Any] = self._take(name, list, [])
        if len(value) > limit:
            raise self._bad(self._where + name, f"must have at most {limit} items")
        return value

    def texts(self, name: str, pattern: str, limit: int) -> list[str]:
        """Take a list of strings that match the whole pattern."""
        value = self.items(name, limit)
        for index, item in enumerate(value):
            if not isinstance(item, str) or not re.fullmatch(pattern, item, re.DOTALL):
                raise self._bad(f"{self._where}{name}[{index}]", f"must be a string that matches {pattern}")
        return value

    def integers(self, name: str, low: int, high: int, limit: int) -> list[int]:
        """Take a list of whole numbers within bounds."""
        value = self.items(name, limit)
        for index, item in enumerate(value):
            if not isinstance(item, int) or isinstance(item, bool) or not low <= item <= high:
                raise self._bad(f"{self._where}{name}[{index}]", f"must be a number from {low} to {high}")
        return value

    def objects(self, name: str, limit: int) -> list[Fields]:
        """Take a list of objects."""
        return [Fields(item, f"{self._where}{name}[{index}].") for index, item in enumerate(self.items(name, limit))]

    def table(self, name: str, pattern: str, limit: int) -> dict[str, Any]:
        """Take an object whose keys match the whole pattern, empty by default."""
        value: dict[str, Any] = self._take(name, dict, {})
        if len(value) > limit:
            raise self._bad(self._where + name, f"must have at most {limit} entries")
        for key in value:
            if not re.fullmatch(pattern, key, re.DOTALL):
                raise self._bad(f"{self._where}{name}", f"has a key that does not match {pattern}")
        return value

    def bad(self, name: str, message: str) -> Refusal:
        """Return the refusal of a field for a reason of the caller's own."""
        return self._bad(self._where + name, message)

    def done(self) -> None:
        """Refuse the fields that nobody took."""
        if self._rest:
            raise self._bad(self._where + min(self._rest)[:100], "is not a known field")


_REQUIRED = object()
