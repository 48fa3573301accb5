"""A watcher in a process of its own: writes down what it is told of domains, over every break.

python -m tests.chaos.watcher RECORD PARENT [URI]     # the gateway from the environment, or a socket of a service
"""

from __future__ import annotations

import json
import sys

from virtfleet.compute.v1 import watch_pb2
from virtfleet_client import connect


def main() -> None:
    """Follow until killed."""
    path, parent = sys.argv[1:3]
    request = watch_pb2.WatchResourcesRequest(parent=parent)
    request.resource_types.append(watch_pb2.RESOURCE_TYPE_DOMAIN)
    request.snapshot.SetInParent()
    with open(path, "a", encoding="utf-8") as file, connect(sys.argv[3] if len(sys.argv) > 3 else "") as fleet:  # noqa: PTH123 - appended to
        for answer in fleet.watch(request, resnapshot=True):
            for change in answer.changes:
                kind = change.WhichOneof("kind")
                if kind == "put":
                    told = change.put.domain
                    line = {"kind": "put", "name": told.name, "uid": told.uid, "generation": told.generation}
                elif kind == "delete":
                    line = {"kind": "delete", "name": change.delete.name, "uid": change.delete.uid}
                else:
                    continue
                file.write(json.dumps(line) + "\n")
            marker = answer.WhichOneof("marker")
            if marker == "snapshot_end":
                file.write(json.dumps({"kind": "snapshot"}) + "\n")
            elif marker == "source_status":
                file.write(json.dumps({"kind": "source", "state": answer.source_status.state}) + "\n")
            file.flush()


if __name__ == "__main__":
    main()
