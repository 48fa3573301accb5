"""Calls with everything written down: what is intended, what is told, what is asked for again."""

from __future__ import annotations

import json
import os
import random
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TextIO, TypeVar

import grpc
from google.rpc import code_pb2

from virtfleet.storage.v1 import volume_pb2
from virtfleet_client import Fleet, VirtfleetError
from virtfleet_client.errors import ResourceExists, ResourceNotFound, from_status
from virtfleet_client.operations import result_of

PATIENCE_SECONDS: Final = 60.0
TRIES: Final = 8
KEPT_EVERY: Final = 3
"""Of so many resources one stays, running."""
_LOST: Final = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
_PAUSE_SECONDS: Final = 0.1

Answer = TypeVar("Answer")
Told = Mapping[str, Any]
"""What an acknowledgement says of a resource: `uid`, `generation`, and its `content` if it has any."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Is a change of several resources at once: the method, its response, and the request for some names."""

    method: Callable[..., Any]
    response: Any
    request_of: Callable[[Sequence[str]], Any]


class Gone(Exception):
    """A change failed as often as it was tried."""


class Record:
    """Is the file of what was said; every line is on the disk before anything else happens."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._lock = threading.Lock()

    def write(self, **fields: Any) -> None:
        """Append a line."""
        with self._lock:
            self._file.write(json.dumps({"time": time.time(), **fields}) + "\n")
            self._file.flush()
            os.fsync(self._file.fileno())


class Caller:
    """Leads resources of one kind through their lives, one after the other.

    Args:
        fleet: The gateway.
        record: Takes what was said.
        prefix: Stands in the ids.
        stop: Set when no new life shall begin.
        chance: Decides what is done.
    """

    def __init__(self, fleet: Fleet, record: Record, prefix: str, stop: threading.Event, chance: random.Random) -> None:
        self._fleet = fleet
        self._record = record
        self._prefix = prefix
        self._stop = stop
        self._chance = chance

    def run(self) -> None:
        """Go on until told to stop."""
        number = 0
        while not self._stop.is_set():
            number += 1
            try:
                self._life(number, f"{self._prefix}-{number}", keep=number % KEPT_EVERY == 0)
            except Gone:
                continue

    def _life(self, number: int, resource_id: str, *, keep: bool) -> None:
        raise NotImplementedError

    # One change of one resource.

    def _change(self, what: str, name: str, method: Callable[..., Any], request: Any, kind: Any) -> None:
        """Make a change that is an operation."""

        def attempt(request_id: str) -> Told:
            request.request_id = request_id
            return told(result_of(self._finished(method, request), kind))

        self._insist(what, name, attempt)

    def _insist(self, what: str, name: str, attempt: Callable[[str], Told]) -> None:
        """Try a change until it is acknowledged; each try is a new one, as a controller's would be."""
        for _ in range(TRIES):
            request_id = str(uuid.uuid4())
            said = {"what": what, "name": name, "request_id": request_id}
            self._record.write(say="intent", **said)
            try:
                answer = attempt(request_id)
            except TimeoutError as error:
                self._record.write(say="failed", **said, code="TIMEOUT", reason="", message=str(error))
                raise Gone from error
            except VirtfleetError as error:
                self._failed(said, error)
                if isinstance(error, ResourceNotFound) or (what == "create" and isinstance(error, ResourceExists)):
                    # A creation that failed after its effect was acknowledged to nobody; what is there is not ours to
                    # judge.
                    raise Gone from error
                time.sleep(_PAUSE_SECONDS)
            else:
                self._record.write(say="ack", **said, **answer)
                return
        raise Gone

    def _failed(self, said: Mapping[str, Any], error: VirtfleetError) -> None:
        self._record.write(
            say="failed", **said, code=error.code().name, reason=error.reason, message=error.details() or ""
        )

    # One change of several resources.

    def _change_all(self, what: str, names: Sequence[str], batch: Batch) -> list[str]:
        """Make a change in a batch until each item is acknowledged; returns the names of those that are."""
        left, done = list(names), list[str]()
        for _ in range(TRIES):
            acknowledged, hopeless = self._try_all(what, left, batch)
            done += acknowledged
            left = [name for name in left if name not in acknowledged and name not in hopeless]
            if not left:
                break
            time.sleep(_PAUSE_SECONDS)
        return done

    def _try_all(self, what: str, names: Sequence[str], batch: Batch) -> tuple[list[str], list[str]]:
        """Make a change in a batch; returns the names of which it is acknowledged, and those not to be tried again."""
        request = batch.request_of(names)
        request.request_id = str(uuid.uuid4())
        said = {name: {"what": what, "name": name, "request_id": request.request_id} for name in names}
        for line in said.values():
            self._record.write(say="intent", **line)
        try:
            results = result_of(self._finished(batch.method, request), batch.response).results
        except TimeoutError as error:
            for line in said.values():
                self._record.write(say="failed", **line, code="TIMEOUT", reason="", message=str(error))
            return [], list(names)
        except VirtfleetError as error:
            for line in said.values():
                self._failed(line, error)
            return [], []
        acknowledged, hopeless = list[str](), list[str]()
        for result in results:
            if result.status.code == code_pb2.OK:
                self._record.write(say="ack", **said[result.name], **told(result.domain))
                acknowledged.append(result.name)
                continue
            self._failed(said[result.name], from_status(result.status))
            if result.status.code in (code_pb2.NOT_FOUND, code_pb2.ALREADY_EXISTS):
                hopeless.append(result.name)
        return acknowledged, hopeless

    # Answers.

    def _finished(self, method: Callable[..., Any], request: Any) -> Any:
        """Return an operation that has ended; a lost answer is asked for again."""
        return self._answered(
            lambda: self._fleet.finish(method(request, timeout=10), timeout_seconds=PATIENCE_SECONDS),
            request.request_id,
        )

    def _answered(self, call: Callable[[], Answer], request_id: str) -> Answer:
        """Return an answer; a lost one is asked for again, with the same request_id, for as long as patience lasts."""
        ends_at = time.monotonic() + PATIENCE_SECONDS
        while True:
            try:
                return call()
            except VirtfleetError as error:
                if error.code() not in _LOST or time.monotonic() > ends_at:
                    raise
                self._record.write(say="again", request_id=request_id, code=error.code().name, reason=error.reason)
                time.sleep(_PAUSE_SECONDS)


def told(answer: Any) -> Told:
    """Return what an answer says of a resource."""
    said = {"uid": getattr(answer, "uid", ""), "generation": getattr(answer, "generation", 0)}
    if isinstance(answer, volume_pb2.Volume):
        said["content"] = f"{answer.status.capacity_bytes} bytes"
    return said
