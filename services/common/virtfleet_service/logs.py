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
from typing import TYPE_CHECKING, Any, Final, TextIO

from virtfleet_service.call import CURRENT
from virtfleet_service.errors import BackendUnreachable

if TYPE_CHECKING:
    from pathlib import Path

    from virtfleet_service.call import Call

_log = logging.getLogger(__name__)

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


def configure(service: str, node: str, level: str = "INFO", stream: TextIO = sys.stderr) -> None:
    """Make the process log JSON lines to a stream, in place of what was configured before."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter(service, node))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)


class AuditLog:
    """Is the file in which every mutation and refusal stands before it is acknowledged.

    One JSON object a line, appended with one write, so that lines of several threads never mix. It is not synced: it
    survives the death of the process, as much as an acknowledged answer on its way does, and a power cut may take its
    last seconds.

    Args:
        path: The file; None: entries go to the log of the process only.
        limit_bytes: Above it the file is renamed to `….1`, in place of the one before.
    """

    def __init__(self, path: Path | None, *, limit_bytes: int = 64 << 20) -> None:
        self._path = path
        self._limit_bytes = limit_bytes
        self._descriptor = -1
        self._size_bytes = 0
        self._broken: OSError | None = None

    def open(self) -> None:
        """Open the file for appending.

        Raises:
            OSError: It cannot be opened.
        """
        if self._path is None or self._descriptor >= 0:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._size_bytes = os.fstat(self._descriptor).st_size

    def close(self) -> None:
        """Close the file; succeeds if it is closed."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def check(self) -> None:
        """Refuse a mutation that could not be recorded.

        Raises:
            BackendUnreachable: The last entry could not be written, and still cannot.
        """
        if self._broken is None:
            return
        self._append({"event": "audit_resumed"})
        if self._broken is not None:
            raise BackendUnreachable(
                f"the audit log cannot be written, so nothing may be changed: {self._broken.strerror}",
                retry_delay_seconds=5,
                cause=self._broken.strerror,
            )

    def record(self, call: Call, *, code: str, reason: str = "", event: str = "call") -> None:
        """Write what became of a call. A failure is logged, and stops mutations until it is mended (`check`)."""
        caller = call.caller
        self._append(
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
        self._append(
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

    def _append(self, entry: dict[str, object]) -> None:
        kept = {key: value for key, value in entry.items() if value not in ("", [])}
        kept = {"time": dt.datetime.now(dt.UTC).isoformat(timespec="microseconds"), **kept}
        if self._descriptor < 0:
            _log.info("audit", extra={"audit": kept})
            return
        line = (json.dumps(kept, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")
        try:
            self._rotate(len(line))
            os.write(self._descriptor, line)
        except OSError as error:
            if self._broken is None:
                _log.critical("the audit log cannot be written: mutations are refused until it can", exc_info=error)
            self._broken = error
        else:
            self._broken = None
            self._size_bytes += len(line)

    def _rotate(self, more_bytes: int) -> None:
        if self._path is None or self._size_bytes + more_bytes <= self._limit_bytes:
            return
        self.close()
        self._path.replace(self._path.with_name(self._path.name + ".1"))
        self.open()
