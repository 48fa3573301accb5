"""A watcher in a process of its own: writes down what it is told, over every break, its own death included.

    python -m tests.chaos.watcher RECORD PARENT [SERVICE=URI …]     # else the gateway from the environment

Each answer is one line with its changes and its token, written at once. A watcher that finds a record goes on from the
last token in it, so whoever kills it and starts it again must read the same story as if it had lived.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, TextIO

from virtfleet.compute.v1 import watch_pb2 as compute
from virtfleet.network.v1 import watch_pb2 as network
from virtfleet.storage.v1 import watch_pb2 as storage
from virtfleet_client import Fleet, connect

WATCHED: Final[dict[str, tuple[Any, int]]] = {
    "compute": (compute.WatchResourcesRequest, compute.RESOURCE_TYPE_DOMAIN),
    "storage": (storage.WatchResourcesRequest, storage.RESOURCE_TYPE_VOLUME),
    "network": (network.WatchResourcesRequest, network.RESOURCE_TYPE_NETWORK),
}
_INACTIVE: Final = 1
"""Of a network."""


def _changes(service: str, answer: Any) -> Iterator[dict[str, Any]]:
    for change in answer.changes:
        kind = change.WhichOneof("kind")
        if kind == "put":
            told = getattr(change.put, change.put.WhichOneof("resource"))
            line = {"kind": "put", "name": told.name, "uid": told.uid, "generation": told.generation}
            if service == "compute":
                line["active"] = told.status.active
            elif service == "network":
                line["active"] = told.status.state > _INACTIVE
            yield line
        elif kind == "delete":
            yield {"kind": "delete", "name": change.delete.name, "uid": change.delete.uid}


def _markers(answer: Any) -> Iterator[dict[str, Any]]:
    marker = answer.WhichOneof("marker")
    if marker == "snapshot_end":
        yield {"kind": "snapshot"}
    elif marker == "source_status":
        yield {"kind": "source", "state": answer.source_status.state}


def _last_token(path: Path, service: str) -> str:
    """Return where an earlier life of this watcher stood behind its snapshot; empty: nowhere."""
    token, ended = "", False
    for line in path.read_text().splitlines() if path.exists() else ():
        said = json.loads(line)
        if said["service"] == service:
            ended = ended or any(one["kind"] == "snapshot" for one in said["told"])
            token = said["token"] or token
    return token if ended else ""


def _follow(fleet: Fleet, service: str, parent: str, token: str, file: TextIO, lock: threading.Lock) -> None:
    request_class, resource_type = WATCHED[service]
    request = request_class(parent=parent)
    request.resource_types.append(resource_type)
    if token:
        request.resume_token = token
    else:
        request.snapshot.SetInParent()
    for answer in fleet.watch(request, resnapshot=True):
        told = [*_changes(service, answer), *_markers(answer)]
        with lock:
            file.write(json.dumps({"service": service, "told": told, "token": answer.resume_token}) + "\n")
            file.flush()


def _run(path: Path, parent: str, uris: dict[str, str]) -> None:
    if path.exists():
        # The line in which an earlier life ended was not said.
        os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
    tokens = {service: _last_token(path, service) for service in WATCHED}
    lock = threading.Lock()
    with path.open("a", encoding="utf-8") as file:

        def follow(service: str) -> None:
            with connect(uris.get(service, "")) as fleet:
                _follow(fleet, service, parent, tokens[service], file, lock)

        threads = [threading.Thread(target=follow, args=(service,)) for service in WATCHED]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


if __name__ == "__main__":
    _run(Path(sys.argv[1]), sys.argv[2], dict(argument.split("=", 1) for argument in sys.argv[3:]))
