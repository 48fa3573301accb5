"""A watcher in a process of its own: writes down what it is told, over every break, its own death included.

    python -m tests.chaos.watcher RECORD PARENT [SERVICE=URI …]     # else the gateway from the environment

Each answer is one line with its changes and its token, written at once; where a stream broke there is a line that says so
(`cut`). A watcher that finds a record goes on from the last token in it, so whoever kills it and starts it again must read
the same story as if it had lived.
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
from virtfleet.fleet.v1 import enrollment_pb2
from virtfleet.fleet.v1 import watch_pb2 as members
from virtfleet.network.v1 import watch_pb2 as network
from virtfleet.storage.v1 import watch_pb2 as storage
from virtfleet_client import Fleet, connect

WATCHED: Final[dict[str, tuple[Any, tuple[int, ...]]]] = {
    "compute": (compute.WatchResourcesRequest, (compute.RESOURCE_TYPE_DOMAIN,)),
    "storage": (storage.WatchResourcesRequest, (storage.RESOURCE_TYPE_VOLUME, storage.RESOURCE_TYPE_POOL)),
    "network": (network.WatchResourcesRequest, (network.RESOURCE_TYPE_NETWORK, network.RESOURCE_TYPE_PORT)),
    "fleet": (members.WatchResourcesRequest, (members.RESOURCE_TYPE_CERTIFICATE, members.RESOURCE_TYPE_JOIN_TOKEN)),
}
OF_NODES: Final = ("compute", "storage", "network")
_INACTIVE: Final = 1
"""Of networks and pools."""


def _changes(answer: Any) -> Iterator[dict[str, Any]]:
    for change in answer.changes:
        kind = change.WhichOneof("kind")
        if kind == "put":
            resource = change.put.WhichOneof("resource")
            told = getattr(change.put, resource)
            if resource == "certificate":
                yield from _certificate(told)
                continue
            line = {"kind": "put", "name": told.name, "uid": told.uid, "generation": told.generation}
            if resource == "domain":
                line["active"] = told.status.active
            elif resource in ("network", "pool"):
                line["active"] = told.status.state > _INACTIVE
            yield line
        elif kind == "delete" and change.delete.resource_type != "certificate":
            yield {"kind": "delete", "name": change.delete.name, "uid": change.delete.uid}


def _certificate(told: enrollment_pb2.Certificate) -> Iterator[dict[str, Any]]:
    """Tell of a certificate as of its user's: a revocation is its end."""
    _, user, name = told.status.identity.rpartition("/user/")
    if user:
        kind = "delete" if told.status.state == enrollment_pb2.CERTIFICATE_STATE_REVOKED else "put"
        yield {"kind": kind, "name": f"users/{name}", "uid": told.name, "generation": told.generation}


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
    request_class, resource_types = WATCHED[service]
    request = request_class(parent=parent if service in OF_NODES else "")
    request.resource_types.extend(resource_types)

    def write(**fields: Any) -> None:
        with lock:
            file.write(json.dumps({"service": service, **fields}) + "\n")
            file.flush()

    def connection(up: bool) -> None:  # noqa: FBT001 - as it is called
        if not up:
            write(told=[], token="", cut=True)

    if token:
        request.resume_token = token
        write(told=[], token="", cut=True)
    else:
        request.snapshot.SetInParent()
    for answer in fleet.follow(request, resnapshot=True, on_connection=connection):
        write(told=[*_changes(answer), *_markers(answer)], token=answer.resume_token)


def _run(path: Path, parent: str, uris: dict[str, str]) -> None:
    if path.exists():
        # The line in which an earlier life ended was not said.
        os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
    services = OF_NODES if uris else tuple(WATCHED)
    tokens = {service: _last_token(path, service) for service in services}
    lock = threading.Lock()
    with path.open("a", encoding="utf-8") as file:

        def follow(service: str) -> None:
            with connect(uris.get(service, "")) as fleet:
                _follow(fleet, service, parent, tokens[service], file, lock)

        threads = [threading.Thread(target=follow, args=(service,)) for service in services]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


if __name__ == "__main__":
    _run(Path(sys.argv[1]), sys.argv[2], dict(argument.split("=", 1) for argument in sys.argv[3:]))
