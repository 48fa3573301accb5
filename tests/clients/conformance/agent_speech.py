"""What the two Python agents have in common: requests of the protocol as messages of the API, and answers as JSON."""

from __future__ import annotations

import array
import asyncio
import hashlib
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from google.longrunning import operations_pb2

from virtfleet.compute.v1 import console_pb2, domain_pb2, watch_pb2
from virtfleet.storage.v1 import volume_pb2
from virtfleet.type.v1 import resource_pb2
from virtfleet.type.v1 import watch_pb2 as type_watch_pb2
from virtfleet_client import Credentials, VirtfleetError
from virtfleet_client.informer import Change, ChangeKind

Json = dict[str, Any]
CHUNK_BYTES = 256 << 10

FIELDS: dict[str, frozenset[str]] = {
    name: frozenset(fields.split())
    for name, fields in {
        "connect": "address ca_file cert_file key_file",
        "close": "",
        "create": "parent domain_id start power_button_delay_s deadline_s",
        "get": "name deadline_s",
        "list": "parent page_size",
        "update": "name display_name etag",
        "delete": "name",
        "stop": "name timeout_s",
        "wait": "operation deadline_s",
        "cancel": "operation",
        "watch": "as parent resnapshot",
        "watched": "as name",
        "informer": "as parent deadline_s",
        "informed": "as uid node",
        "hold": "as",
        "release": "as",
        "console": "as name epoch offset force",
        "console_write": "as text",
        "console_read": "as",
        "upload": "name size_bytes seed upload_id offset_bytes",
    }.items()
}
"""The requests that an agent knows, and their fields."""


class UnknownStepError(Exception):
    """The harness asks for something that this agent does not know."""


def check(request: Json) -> None:
    """Refuse what the agent does not know.

    Raises:
        UnknownStepError: It does not know the request, or a field of it.
    """
    do = request.get("do")
    if do not in FIELDS:
        raise UnknownStepError(f"unknown request {do!r}")
    unknown = request.keys() - FIELDS[do] - {"id", "do"}
    if unknown:
        raise UnknownStepError(f"{do} has no {', '.join(sorted(unknown))}")


def error_of(error: BaseException) -> Json:
    """Return a failure as the protocol has it."""
    if isinstance(error, UnknownStepError):
        return {"code": "UNKNOWN_STEP", "message": str(error)}
    if isinstance(error, VirtfleetError):
        return {
            "code": error.code().name,
            "reason": error.reason,
            "message": error.details(),
            "metadata": dict(error.metadata),
            "new_name": error.metadata.get("new_name", ""),
            "fields": list(error.fields),
        }
    if isinstance(error, TimeoutError):
        return {
            "code": "DEADLINE_EXCEEDED",
            "reason": "",
            "message": str(error),
            "metadata": {},
            "new_name": "",
            "fields": [],
        }
    return {"code": "UNTYPED", "message": f"{type(error).__name__}: {error}"}


def credentials(request: Json) -> Credentials:
    """Return the certificate files of `connect`."""
    return Credentials(*(Path(request[name]) for name in ("ca_file", "cert_file", "key_file")))


def creation(request: Json) -> domain_pb2.CreateDomainRequest:
    """Return what `create` asks of the fleet."""
    made = domain_pb2.CreateDomainRequest(parent=request["parent"], domain_id=request["domain_id"])
    made.domain.spec.driver = "test"
    made.domain.spec.memory.maximum_bytes = 64 << 20
    if request.get("power_button_delay_s"):
        made.domain.spec.test.power_button_delay.FromNanoseconds(round(request["power_button_delay_s"] * 1e9))
    if request.get("start"):
        made.start.SetInParent()
    return made


def listing(request: Json) -> domain_pb2.ListDomainsRequest:
    """Return what `list` asks of the fleet."""
    return domain_pb2.ListDomainsRequest(
        parent=request["parent"], page_size=request.get("page_size", 0), view=resource_pb2.RESOURCE_VIEW_BASIC
    )


def update(request: Json) -> domain_pb2.UpdateDomainRequest:
    """Return what `update` asks of the fleet."""
    wanted = domain_pb2.Domain(name=request["name"], display_name=request["display_name"], etag=request.get("etag", ""))
    made = domain_pb2.UpdateDomainRequest(domain=wanted)
    made.update_mask.paths.append("display_name")
    return made


def stopping(request: Json) -> domain_pb2.StopDomainRequest:
    """Return what `stop` asks of the fleet."""
    made = domain_pb2.StopDomainRequest(name=request["name"], mode=domain_pb2.STOP_MODE_GRACEFUL)
    made.grace_period.FromNanoseconds(round(request.get("timeout_s", 30) * 1e9))
    made.inline_wait.SetInParent()
    return made


def operation(request: Json) -> operations_pb2.Operation:
    """Return the operation of a name, as nothing is known of it yet."""
    return operations_pb2.Operation(name=request["operation"])


def watching(request: Json) -> watch_pb2.WatchResourcesRequest:
    """Return what `watch` asks of the fleet."""
    return watch_pb2.WatchResourcesRequest(
        parent=request["parent"],
        resource_types=[watch_pb2.RESOURCE_TYPE_DOMAIN],
        snapshot=type_watch_pb2.WatchSnapshot(),
    )


def state_of(domain: domain_pb2.Domain) -> str:
    """Return the state of a domain without the prefix."""
    return domain_pb2.DomainState.Name(domain.status.state).removeprefix("DOMAIN_STATE_")


def domain_json(domain: domain_pb2.Domain) -> Json:
    """Return a domain as `get` answers it."""
    return {
        "name": domain.name,
        "uid": domain.uid,
        "etag": domain.etag,
        "state": state_of(domain),
        "display_name": domain.display_name,
    }


Gate = TypeVar("Gate", threading.Event, asyncio.Event)


class Held(Generic[Gate]):
    """Stops a reader at its next change while it is held.

    Args:
        gate: What the reader waits for, in the way of its client: it is open while it is set.
    """

    def __init__(self, gate: Gate) -> None:
        self._gate: Gate = gate
        self._gate.set()
        self.stands = False

    def hold(self) -> None:
        """Stop the reader from now on."""
        self._gate.clear()

    def release(self) -> None:
        """Let it go on."""
        self._gate.set()

    @contextmanager
    def passing(self) -> Iterator[Gate]:
        """Note that the reader stands here while it waits for the gate."""
        self.stands = not self._gate.is_set()
        try:
            yield self._gate
        finally:
            self.stands = False


@dataclass
class Watched:
    """Keeps what a watch has told."""

    changes: int = 0
    snapshot_ends: int = 0
    held: bool = False
    ended: bool = False
    error: Json | None = None
    backwards: int = 0
    last: dict[str, Json] = field(default_factory=dict)
    _generations: dict[str, int] = field(default_factory=dict)

    def take(self, answer: watch_pb2.WatchResourcesResponse) -> None:
        """Take an answer of the watch."""
        for change in answer.changes:
            self.changes += 1
            if change.HasField("put"):
                domain = change.put.domain
                self.backwards += domain.generation < self._generations.get(domain.uid, 0)
                self._generations[domain.uid] = domain.generation
                self.last[domain.name] = {
                    "display_name": domain.display_name,
                    "deleted": False,
                    "generation": domain.generation,
                }
            elif change.HasField("delete"):
                self.last[change.delete.name] = {"display_name": "", "deleted": True, "generation": 0}
        self.snapshot_ends += answer.HasField("snapshot_end")

    def json(self, name: str) -> Json:
        """Return the answer to `watched`."""
        return {
            "changes": self.changes,
            "snapshot_ends": self.snapshot_ends,
            "held": self.held,
            "ended": self.ended,
            "error": self.error,
            "backwards": self.backwards,
            "last": self.last.get(name),
        }


@dataclass
class Told:
    """Counts what an informer's handlers were told."""

    counts: dict[str, Counter[str]] = field(default_factory=dict)

    def take(self, change: Change[domain_pb2.Domain]) -> None:
        """Take a change."""
        if change.resource is not None:
            self.counts.setdefault(change.resource.uid, Counter())[change.kind.value] += 1

    def json(self, uid: str) -> Json:
        """Return the counts of one resource."""
        counts = self.counts.get(uid, Counter())
        kinds = (ChangeKind.ADDED, ChangeKind.CHANGED, ChangeKind.MOVED, ChangeKind.DELETED)
        return {kind.value: counts[kind.value] for kind in kinds}


def informed_json(domains: Any, told: Told, request: Json, *, held: bool) -> Json:
    """Return the answer to `informed`; `domains` is an informer of either kind."""
    uid = request.get("uid", "")
    domain = domains.get(uid)
    source = domains.source(request.get("node", ""))
    return {
        "count": len(domains),
        "connected": domains.connected,
        "held": held,
        "source": type_watch_pb2.SourceState.Name(source.state).removeprefix("SOURCE_STATE_"),
        "known": domain is not None,
        "name": domain.name if domain else "",
        "display_name": domain.display_name if domain else "",
        "state": state_of(domain) if domain else "",
        "told": told.json(uid),
    }


@dataclass
class Terminal:
    """Keeps what a console has said."""

    opened: console_pb2.ConsoleOpened | None = None
    text: bytes = b""
    epoch: str = ""
    next_offset: int = 0
    gap: int = 0
    ended: bool = False
    closed: str = ""
    error: Json | None = None

    def take(self, answer: console_pb2.OpenConsoleResponse) -> None:
        """Take a message of the console."""
        match answer.WhichOneof("event"):
            case "opened":
                self.opened = answer.opened
                self.epoch, self.next_offset = answer.opened.epoch, answer.opened.offset
            case "data":
                self.text += answer.data.data
                self.next_offset = answer.data.offset + len(answer.data.data)
            case "gap":
                self.gap += answer.gap.length_bytes
                self.next_offset = answer.gap.offset + answer.gap.length_bytes
            case "closed":
                reason = console_pb2.ConsoleCloseReason.Name(answer.closed.reason)
                self.closed = reason.removeprefix("CONSOLE_CLOSE_REASON_")

    def json(self) -> Json:
        """Return the answer to `console_read`."""
        return {
            "text": self.text.decode(errors="replace"),
            "epoch": self.epoch,
            "next_offset": self.next_offset,
            "gap": self.gap,
            "ended": self.ended,
            "closed": self.closed,
            "error": self.error,
        }

    def opened_json(self) -> Json:
        """Return the answer to `console`."""
        opened = self.opened or console_pb2.ConsoleOpened()
        return {"epoch": opened.epoch, "offset": opened.offset, "writable": opened.writable}


def opening(request: Json) -> console_pb2.OpenConsoleRequest:
    """Return the first message of a console."""
    message = console_pb2.OpenConsoleRequest(name=request["name"])
    message.open.mode = console_pb2.CONSOLE_MODE_READ_WRITE
    message.open.force = request.get("force", True)
    message.open.epoch = request.get("epoch", "")
    message.open.offset = request.get("offset", 0)
    return message


def content(seed: int, size_bytes: int) -> bytes:
    """Return the content of an upload."""
    words = array.array("I", ((seed + word) & 0xFFFFFFFF for word in range(size_bytes // 4)))
    if sys.byteorder == "big":
        words.byteswap()
    return words.tobytes()


def upload_messages(request: Json) -> Iterator[volume_pb2.UploadVolumeRequest]:
    """Yield the messages of one upload."""
    data = content(request["seed"], request["size_bytes"])
    first = volume_pb2.UploadVolumeRequest(name=request["name"])
    first.start.length_bytes = len(data)
    first.start.digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
    first.start.upload_id = request.get("upload_id", "")
    yield first
    for offset in range(request.get("offset_bytes", 0), len(data), CHUNK_BYTES):
        message = volume_pb2.UploadVolumeRequest()
        message.chunk.offset = offset
        message.chunk.data = data[offset : offset + CHUNK_BYTES]
        yield message
