"""A caller in a process of its own: changes domains without pause and writes down, with fsync, what it was told.

    python -m tests.chaos.writer RECORD TAG SEED     # the fleet from the environment; ends with its standard input

One line of JSON before each call (`intent`) and one behind it (`ack`, `failed`). What fails in a way that the API calls
retryable is sent again with the same request_id; what has failed for good is tried again as a new change, as a
controller would.
"""

from __future__ import annotations

import json
import os
import random
import sys
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any, Final, TextIO

import grpc
from google.protobuf import empty_pb2

from virtfleet.compute.v1 import domain_pb2
from virtfleet.storage.v1 import volume_pb2
from virtfleet_client import Fleet, VirtfleetError, connect
from virtfleet_client.errors import ResourceExists, ResourceNotFound
from virtfleet_client.operations import result_of

NODE: Final = "nodes/n1"
PLACE: Final = "chaos"
"""The pool and the network that the rounds have made."""
THREADS: Final = 3
KEPT_EVERY: Final = 3
"""Of so many guests one stays, running."""
PATIENCE_SECONDS: Final = 60.0
TRIES: Final = 8


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
    """Leads domains through their lives, one after the other.

    Args:
        fleet: The gateway.
        record: Takes what was said.
        prefix: Stands in the ids.
        stop: Set when no new change shall begin.
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
                self._life(f"{self._prefix}-{number}", keep=number % KEPT_EVERY == 0)
            except Gone:
                continue

    def _life(self, domain_id: str, *, keep: bool) -> None:
        name, domains = f"{NODE}/domains/{domain_id}", self._fleet.domains
        create = domain_pb2.CreateDomainRequest(parent=NODE, domain_id=domain_id)
        spec = create.domain.spec
        spec.driver, spec.memory.maximum_bytes, spec.cpu.vcpu_count = "qemu", 64 << 20, 1
        disk = create.new_volumes.add(pool=f"pools/{PLACE}", volume_id=domain_id)
        disk.spec.format, disk.spec.capacity_bytes = volume_pb2.VOLUME_FORMAT_QCOW2, 8 << 20
        spec.disks["root"].volume = f"pools/{PLACE}/volumes/{domain_id}"
        spec.interfaces["lan"].network = f"networks/{PLACE}"
        self._change("create", name, domains.CreateDomain, create)
        self._change("start", name, domains.StartDomain, domain_pb2.StartDomainRequest(name=name, paused=True))
        for number in range(self._chance.randint(1, 3)):
            update = domain_pb2.UpdateDomainRequest(domain=domain_pb2.Domain(name=name, labels={"n": str(number)}))
            update.update_mask.paths.append("labels")
            self._change("update", name, domains.UpdateDomain, update)
        if keep:
            return
        stop = domain_pb2.StopDomainRequest(name=name, mode=domain_pb2.STOP_MODE_FORCE)
        self._change("stop", name, domains.StopDomain, stop)
        delete = domain_pb2.DeleteDomainRequest(name=name, delete_volumes=True)
        self._change("delete", name, domains.DeleteDomain, delete)

    def _change(self, what: str, name: str, method: Callable[..., Any], request: Any) -> None:
        for _ in range(TRIES):
            request.request_id = str(uuid.uuid4())
            self._record.write(say="intent", what=what, name=name, request_id=request.request_id)
            try:
                answer = self._answered(method, request, empty_pb2.Empty if what == "delete" else domain_pb2.Domain)
            except VirtfleetError as error:
                self._record.write(
                    say="failed",
                    what=what,
                    name=name,
                    request_id=request.request_id,
                    code=error.code().name,
                    reason=error.reason,
                    message=error.details(),
                )
                if isinstance(error, ResourceNotFound) or (what == "create" and isinstance(error, ResourceExists)):
                    # A creation that failed after its effect was acknowledged to nobody; what is there is not ours to judge.
                    raise Gone from error
                time.sleep(0.1)
            else:
                uid, generation = getattr(answer, "uid", ""), getattr(answer, "generation", 0)
                self._record.write(
                    say="ack", what=what, name=name, request_id=request.request_id, uid=uid, generation=generation
                )
                return
        raise Gone

    def _answered(self, method: Callable[..., Any], request: Any, kind: Any) -> Any:
        """Return the result; a lost answer is asked for again, a failed operation is not: its request_id is used up."""
        ends_at = time.monotonic() + PATIENCE_SECONDS
        while True:
            try:
                operation = self._fleet.finish(method(request, timeout=10), timeout_seconds=PATIENCE_SECONDS)
                break
            except VirtfleetError as error:
                lost = error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
                if not lost or time.monotonic() > ends_at:
                    raise
                time.sleep(0.1)
        return result_of(operation, kind)


def main() -> None:
    """Run until standard input ends, then finish what was begun."""
    path, tag, seed = sys.argv[1:]
    stop = threading.Event()
    with open(path, "a", encoding="utf-8") as file, connect() as fleet:  # noqa: PTH123 - appended to
        record = Record(file)
        callers = [
            Caller(fleet, record, f"{tag}-{number}", stop, random.Random(f"{seed}/{number}"))
            for number in range(THREADS)
        ]
        threads = [threading.Thread(target=caller.run) for caller in callers]
        for thread in threads:
            thread.start()
        sys.stdin.read()
        stop.set()
        for thread in threads:
            thread.join()
        record.write(say="end")


if __name__ == "__main__":
    main()
