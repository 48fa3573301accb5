"""Logs as JSON lines, and the audit log beside them.

Every entry of a call carries its trace id, method, subject and resource. Requests and answers are never logged: they
may hold secrets, and names say enough.
"""

from __future__ import annotations

import datetime as dt
import json
import logging
import os
import sys
from collections import deque
from typing import TYPE_CHECKING, Any, Final, TextIO

from virtfleet_service.call import CURRENT
from virtfleet_service.errors import BackendUnreachable

if TYPE_CHECKING:
    from pathlib import Path

    from virtfleet_service.call import Call

_log = logging.getLogger(__name__)

ANONYMOUS: Final = "anonymous"
"""The subject of whoever has shown no certificate."""

_REFUSALS: Final = frozenset({"PERMISSION_DENIED", "UNAUTHENTICATED"})

UNWRITTEN_LIMIT_LINES: Final = 1024
"""How many lines are kept while the file takes none: what was under way when it began, and refusals since."""

# What a LogRecord has of its own; anything else was given by `extra`.
_OWN: Final = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class JsonFormatter(logging.Formatter):
    """Writes one JSON object a line.

    Args:
        service: The name of the service, in every line.
        node: The node, in every line.
    """

    def __init__(self, service: str, node: str) -> None:
        super().__init__()
        self._head = {"service": service, "node": node}

    def format(self, record: logging.LogRecord) -> str:
        """Return the line of a record."""
        entry: dict[str, Any] = {
            "time": dt.datetime.fromtimestamp(record.created, dt.UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            **self._head,
            "logger": record.name,
            "message": record.getMessage(),
        }
        call = CURRENT.get()
        if call is not None:
            entry |= {"method": call.method.full_name, "subject": call.caller.subject, "resource": call.resource}
            if call.trace_id:
                entry["trace_id"] = call.trace_id
        entry |= {key: value for key, value in vars(record).items() if key not in _OWN}
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str, ensure_ascii=False)


class OfClients(logging.Filter):
    """Lowers what gRPC tells with a traceback, as an error of the server, and is its client's doing."""

    _BEGINNINGS = (
        # It has gone while its answer was sent: its deadline was over, say.
        "ExecuteBatchError raised in core by servicer method",
        # Its metadata are no UTF-8.
        "Invalid encoding on ",
    )

    def filter(self, record: logging.LogRecord) -> bool:
        """Make such a record a plain one of level INFO."""
        if record.levelno < logging.ERROR or not record.getMessage().startswith(self._BEGINNINGS):
            return True
        record.levelno, record.levelname, record.exc_info = logging.INFO, "INFO", None
        return logging.getLogger().isEnabledFor(logging.INFO)


def configure(service: str, node: str, level: str = "INFO", stream: TextIO = sys.stderr) -> None:
    """Make the process log JSON lines to a stream, in place of what was configured before."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter(service, node))
    handler.addFilter(OfClients())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)


class AuditLog:
    """Is where every mutation and refusal stands before it is acknowledged.

    What was done, or was tried by somebody who may do such things, is in the file; who was refused, in another beside
    it (`compute.audit.refused.log`): whoever reaches the port can be refused without end, and must not thereby drive
    out of the file what was done.

    Args:
        path: The file; None: entries go to the log of the process only.
        limit_bytes: Above it a file is renamed to `….1`, in place of the one before.
    """

    def __init__(self, path: Path | None, *, limit_bytes: int = 64 << 20) -> None:
        refusals = path.with_name(f"{path.stem}.refused{path.suffix}") if path is not None else None
        self._done = _Lines(path, limit_bytes)
        self._refused = _Lines(refusals, limit_bytes)

    def open(self) -> None:
        """Open the files for appending.

        Raises:
            OSError: One cannot be opened.
        """
        self._done.open()
        self._refused.open()

    def close(self) -> None:
        """Close the files; succeeds if they are closed."""
        self._done.close()
        self._refused.close()

    def check(self) -> None:
        """Refuse a mutation that could not be recorded.

        Raises:
            BackendUnreachable: An entry could not be written, and still cannot.
        """
        broken = self._done.still_broken() or self._refused.still_broken()
        if broken is not None:
            raise BackendUnreachable(
                f"the audit log cannot be written, so nothing may be changed: {broken.strerror}",
                retry_delay_seconds=5,
                cause=broken.strerror,
            )

    def record(self, call: Call, *, code: str, reason: str = "", event: str = "call") -> None:
        """Write what became of a call. A failure is logged, and stops mutations until it is mended (`check`)."""
        caller = call.caller
        stranger = caller.subject == ANONYMOUS and code not in ("", "OK")
        lines = self._refused if stranger or code in _REFUSALS else self._done
        lines.append(
            {
                "event": event,
                "method": call.method.full_name,
                "subject": caller.subject,
                "roles": list(caller.roles),
                "transport": caller.transport,
                "via": caller.via,
                "resource": call.resource,
                "request_id": call.request_id,
                "code": code,
                "reason": reason,
                "trace_id": call.trace_id,
            }
        )

    def refused(self, method: str, *, peer: str, subject: str, code: str, reason: str, message: str) -> None:
        """Write that somebody was refused before the caller was known."""
        self._refused.append(
            {
                "event": "refused",
                "method": method,
                "subject": subject,
                "peer": peer,
                "code": code,
                "reason": reason,
                "message": message,
            }
        )


class _Lines:
    """Is one file of an audit log.

    One JSON object a line, whole or not at all; for the event loop alone. It is not synced: it survives the death of
    the process, as much as an acknowledged answer on its way does, and a power cut may take its last seconds. Lines
    that the file does not take are kept, and written before any other.

    Args:
        path: The file; None: entries go to the log of the process only.
        limit_bytes: Above it the file is renamed.
    """

    def __init__(self, path: Path | None, limit_bytes: int) -> None:
        self._path = path
        self._limit_bytes = limit_bytes
        self._descriptor = -1
        self._size_bytes = 0
        self._identity = (0, 0)
        self._in_use = False
        self._broken: OSError | None = None
        # Lines that the file has not taken: written first when it takes some again.
        self._unwritten: deque[bytes] = deque()
        self._lost_count = 0

    def open(self) -> None:
        """Open the file for appending."""
        if self._path is None or self._descriptor >= 0:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._open(self._path)
        self._in_use = True

    def close(self) -> None:
        """Close the file; succeeds if it is closed."""
        self._flush()
        if self._in_use and self._unwritten:
            _log.critical("the audit log lacks its last lines", extra={"lost_count": len(self._unwritten)})
        self._in_use = False
        self._let_go()

    def still_broken(self) -> OSError | None:
        """Return why the file takes no lines now; None: it takes them."""
        if self._broken is not None:
            self._flush()
        return self._broken

    def append(self, entry: dict[str, object]) -> None:
        """Write an entry, or keep it until it can be."""
        kept = {key: value for key, value in entry.items() if value not in ("", [])}
        kept = {"time": dt.datetime.now(dt.UTC).isoformat(timespec="microseconds"), **kept}
        if self._path is None or not self._in_use:
            _log.info("audit", extra={"audit": kept})
            return
        if len(self._unwritten) >= UNWRITTEN_LIMIT_LINES:
            self._lost_count += 1
        else:
            self._unwritten.append((json.dumps(kept, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace"))
        self._flush()

    def _open(self, path: Path) -> None:
        # Not to wait for whoever would read, if it is a pipe.
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK
        self._descriptor = os.open(path, flags, 0o600)
        found = os.fstat(self._descriptor)
        self._size_bytes, self._identity = found.st_size, (found.st_dev, found.st_ino)

    def _let_go(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _flush(self) -> None:
        """Write what is unwritten, in order; that it went well again is an entry of its own."""
        if self._path is None or not self._in_use:
            return
        try:
            while self._unwritten:
                line = self._unwritten[0]
                self._make_room(self._path, len(line))
                self._write(line)
                self._size_bytes += len(line)
                self._unwritten.popleft()
        except OSError as error:
            if self._broken is None:
                _log.critical("the audit log cannot be written: mutations are refused until it can", exc_info=error)
            self._broken = error
            return
        if self._broken is not None:
            lost, self._lost_count, self._broken = self._lost_count, 0, None
            self.append({"event": "audit_resumed", "lost_count": lost or ""})

    def _write(self, line: bytes) -> None:
        """Append a line, whole or not at all.

        Raises:
            OSError: It cannot be written whole; what was is taken back.
        """
        written = os.write(self._descriptor, line)
        if written == len(line):
            return
        # A disk that is full in the middle of a line takes its beginning and says nothing.
        try:
            while written < len(line):
                written += os.write(self._descriptor, line[written:])
        except OSError:
            os.ftruncate(self._descriptor, os.fstat(self._descriptor).st_size - written)
            raise

    def _in_place(self, path: Path) -> bool:
        """Tell whether the open file still has its name."""
        try:
            named = path.stat()
        except FileNotFoundError:
            return False
        return (named.st_dev, named.st_ino) == self._identity

    def _make_room(self, path: Path, more_bytes: int) -> None:
        """Have the file open and small enough; what failed at the last line is tried again.

        A file that was moved away (as logrotate does) or deleted takes no more lines: nobody would look for them there.
        """
        if self._descriptor >= 0 and not self._in_place(path):
            _log.warning("the audit log %s was moved or deleted: another one is begun", path)
            self._let_go()
        if self._descriptor < 0:
            self._open(path)
        if self._size_bytes + more_bytes > self._limit_bytes and self._size_bytes:
            path.replace(path.with_name(path.name + ".1"))
            self._let_go()
            self._open(path)
